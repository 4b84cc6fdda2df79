use std::sync::Arc;

use crate::sentinel::log::files::{Files, Memory};
use crate::sentinel::log::{Fsync, Log, Options, Policy, Reader, read_dictionary, read_samples, segment_name};
use crate::sentinel::model::{Batch, Identity, Kind, Sample, SeriesTable};

/// A segment of any contents is read to its end, and the log goes on after it. The first octet says where the contents
/// begin: 0 as a file, 1 and 2 as a payload.
pub fn sentinel_log(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else { return };
    match kind {
        1 => drop(read_dictionary(data)),
        2 => drop(read_samples(data)),
        _ => segment(data),
    }
}

fn segment(data: &[u8]) {
    let files: Arc<dyn Files> = Arc::new(Memory::default());
    for number in 1..3 {
        files.create(&segment_name(number), 0).unwrap().write_at(data, 0).unwrap();
    }
    let table = Arc::new(SeriesTable::new(1000));
    let options = Options::new(1 << 20, Policy::DropOldest, Fsync::Never);
    let log = Log::open(files, options, Arc::clone(&table), &["one".to_string()]).unwrap();
    let log = Arc::new(log);
    let series = table.intern(Identity::new("after", Kind::Gauge, [("a", "b")]).unwrap()).unwrap();
    log.append(&Batch { samples: vec![Sample { series, timestamp_ms: 1, value: 2.0 }] }).unwrap();
    let mut reader = Reader::new(&log, "one");
    let mut last = None;
    while let Some(block) = reader.next_block().unwrap() {
        last = block.samples.last().cloned();
        log.acknowledge("one", reader.position());
    }
    assert_eq!(last.map(|sample| sample.series.name().to_string()).as_deref(), Some("after"));
    assert_eq!(log.stats().pending["one"].0, 0);
}
