//! The log as a whole: in memory, on a disk that fails, on one that is damaged.

mod damage;
mod faults;
mod histories;
mod kills;
mod limits;

use std::sync::Arc;

use super::files::Files;
use super::{Fsync, Log, Options, Policy, Reader};
use crate::sentinel::model::{Batch, Identity, Kind, Sample, Series, SeriesTable};

/// Series by number, and batches of them whose values are all different.
struct Source {
    table: Arc<SeriesTable>,
    series: Vec<Arc<Series>>,
    next: u64,
}

impl Source {
    fn new(series: usize) -> Self {
        let table = Arc::new(SeriesTable::new(10_000));
        let of = |n: usize| {
            let labels = [("job", "test".to_string()), ("instance", format!("host-{n}"))];
            table.intern(Identity::new("value", Kind::Gauge, labels).unwrap()).unwrap()
        };
        let series = (0..series).map(of).collect();
        Self { table, series, next: 0 }
    }

    /// The next `count` samples: sample number n is of series n (in turn) and has value n.
    fn batch(&mut self, count: usize) -> Batch {
        let sample = |n: u64| Sample {
            series: Arc::clone(&self.series[n as usize % self.series.len()]),
            timestamp_ms: 1_700_000_000_000 + n as i64,
            value: n as f64,
        };
        let samples = (self.next..self.next + count as u64).map(sample).collect();
        self.next += count as u64;
        Batch { samples }
    }

    /// The number of a sample, after checking that it is what [`Source::batch`] made.
    fn number(&self, sample: &Sample) -> u64 {
        let n = sample.value as u64;
        assert_eq!(sample.timestamp_ms, 1_700_000_000_000 + n as i64);
        assert_eq!(**sample.series, **self.series[n as usize % self.series.len()]);
        n
    }
}

fn options(max_bytes: u64, segment_bytes: u64) -> Options {
    Options { segment_bytes, ..Options::new(max_bytes, Policy::DropOldest, Fsync::Always) }
}

fn open(files: &Arc<dyn Files>, options: &Options, source: &Source, destinations: &[&str]) -> Arc<Log> {
    let names: Vec<String> = destinations.iter().map(|name| name.to_string()).collect();
    Arc::new(Log::open(Arc::clone(files), options.clone(), Arc::clone(&source.table), &names).unwrap())
}

/// Reads to the end, acknowledging everything; gives the samples' numbers.
fn drain(log: &Arc<Log>, source: &Source, destination: &str) -> Vec<u64> {
    let mut reader = Reader::new(log, destination);
    let mut numbers = Vec::new();
    while let Some(block) = reader.next_block().unwrap() {
        numbers.extend(block.samples.iter().map(|sample| source.number(sample)));
        log.acknowledge(destination, reader.position());
    }
    numbers
}
