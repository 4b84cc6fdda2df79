//! Thousands of random histories on a disk that fails, against what a log promises.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::super::files::Files;
use super::super::{DropReason, Fsync, Log, Options, Policy, Reader};
use super::faults::{Chances, Faulty, Random};
use super::{Source, open};

const DESTINATIONS: [&str; 2] = ["one", "two"];

/// What one destination was given.
#[derive(Default)]
struct Receiver {
    /// Times that each sample arrived and was acknowledged.
    got: BTreeMap<u64, u32>,
    /// Samples counted as dropped by processes that have ended, without those never accepted.
    dropped: i64,
}

struct History {
    random: Random,
    disk: Faulty,
    options: Options,
    source: Source,
    log: Arc<Log>,
    readers: Vec<Reader>,
    receivers: Vec<Receiver>,
    /// Numbers of samples that were accepted.
    accepted: Vec<u64>,
    /// Of those, the ones that were accepted since a sync succeeded: a crash may lose them.
    at_risk: Vec<u64>,
    lost_at_crash: u64,
}

impl History {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let disk = Faulty::new(random.next(), 1 << 20);
        let fsync = if random.per_mille(600) { Fsync::Always } else { Fsync::Interval(Duration::ZERO) };
        // Small enough that limits are met in some histories.
        let max_bytes = if random.per_mille(300) { 16 * 1024 } else { 1 << 20 };
        let options = Options { segment_bytes: 4096, ..Options::new(max_bytes, Policy::DropOldest, fsync) };
        let source = Source::new(20);
        let log = open(&(Arc::new(disk.clone()) as Arc<dyn Files>), &options, &source, &DESTINATIONS);
        let readers = DESTINATIONS.iter().map(|name| Reader::new(&log, name)).collect();
        Self {
            random,
            disk,
            options,
            source,
            log,
            readers,
            receivers: DESTINATIONS.iter().map(|_| Receiver::default()).collect(),
            accepted: Vec::new(),
            at_risk: Vec::new(),
            lost_at_crash: 0,
        }
    }

    fn step(&mut self) {
        match self.random.below(100) {
            0..45 => self.append(),
            45..75 => self.deliver(),
            75..85 => self.tick(),
            85..92 => self.change_chances(),
            92..96 => self.restart(true),
            _ => self.restart(false),
        }
    }

    fn append(&mut self) {
        let count = 1 + self.random.below(60) as usize;
        let first = self.source.next;
        let batch = self.source.batch(count);
        if self.log.append(&batch).is_ok() {
            self.accepted.extend(first..first + count as u64);
            if self.options.fsync != Fsync::Always {
                self.at_risk.extend(first..first + count as u64);
            }
        } else {
            // Refused and counted as dropped, which is not about accepted ones.
            self.receivers.iter_mut().for_each(|receiver| receiver.dropped -= count as i64);
        }
    }

    /// A lane's work: read some, then acknowledge it or give up.
    fn deliver(&mut self) {
        let n = self.random.below(2) as usize;
        let (reader, name) = (&mut self.readers[n], DESTINATIONS[n]);
        let first = reader.position();
        let mut numbers = Vec::new();
        for _ in 0..1 + self.random.below(4) {
            let Some(block) = reader.next_block().unwrap() else { break };
            numbers.extend(block.samples.iter().map(|sample| self.source.number(sample)));
        }
        assert!(numbers.is_sorted_by(|a, b| a < b), "out of order");
        self.log.begin(name, first..reader.position());
        if self.random.per_mille(300) {
            self.log.release(name, DropReason::Size);
            reader.rewind();
        } else {
            self.log.acknowledge(name, reader.position());
            for number in numbers {
                *self.receivers[n].got.entry(number).or_default() += 1;
            }
        }
    }

    fn tick(&mut self) {
        let errors = self.log.stats().fsync_errors;
        self.log.tick();
        // After an error nothing is known of what was written before it.
        if errors == 0 && self.log.stats().fsync_errors == 0 {
            self.at_risk.clear();
        }
    }

    fn change_chances(&mut self) {
        let chances = match self.random.below(3) {
            0 => Chances::default(),
            _ => {
                let mut some = || if self.random.per_mille(300) { self.random.below(400) } else { 0 };
                Chances {
                    short_write: some(),
                    write_error: some(),
                    sync_error: some(),
                    directory_sync_error: some(),
                    create_error: some(),
                    remove_error: some(),
                }
            }
        };
        self.disk.set(chances);
        let full = self.random.per_mille(150);
        self.disk.set_capacity(if full { 10 * 1024 } else { 1 << 20 });
    }

    /// The process ends, cleanly or by a crash of the machine or by a kill, and comes back.
    fn restart(&mut self, clean: bool) {
        let killed = !clean && self.random.per_mille(500);
        let mut clean_end = false;
        if clean {
            self.disk.set(Chances::default());
            clean_end = self.log.finish().is_ok();
        }
        let stats = self.log.stats();
        for (name, receiver) in DESTINATIONS.iter().zip(&mut self.receivers) {
            receiver.dropped += stats.dropped_for(name) as i64;
        }
        let errors = stats.fsync_errors;
        if clean {
            assert!(clean_end);
        } else if !killed {
            self.disk.crash();
            self.lost_at_crash += self.at_risk.len() as u64;
        }
        if !killed && (errors == 0 || !clean) {
            self.at_risk.clear();
        }
        self.disk.set(Chances::default());
        self.reopen();
    }

    fn reopen(&mut self) {
        let files: Arc<dyn Files> = Arc::new(self.disk.clone());
        self.log = open(&files, &self.options, &self.source, &DESTINATIONS);
        self.readers = DESTINATIONS.iter().map(|name| Reader::new(&self.log, name)).collect();
    }

    /// Everything is delivered; then the books must balance.
    fn settle(mut self, seed: u64) {
        self.disk.set(Chances::default());
        self.disk.set_capacity(1 << 20);
        for ((name, reader), receiver) in DESTINATIONS.iter().zip(&mut self.readers).zip(&mut self.receivers) {
            while let Some(block) = reader.next_block().unwrap() {
                for sample in &block.samples {
                    *receiver.got.entry(self.source.number(sample)).or_default() += 1;
                }
                self.log.acknowledge(name, reader.position());
            }
        }
        let stats = self.log.stats();
        for (n, receiver) in self.receivers.iter().enumerate() {
            let name = DESTINATIONS[n];
            assert_eq!(stats.pending[name].0, 0, "seed {seed}");
            let dropped = receiver.dropped + stats.dropped_for(name) as i64;
            let missing = self.accepted.iter().filter(|number| !receiver.got.contains_key(number)).count() as i64;
            assert!(
                missing <= dropped + self.lost_at_crash as i64,
                "seed {seed}: {name} misses {missing} of {}, {dropped} counted, {} lost at crashes ({:?})",
                self.accepted.len(),
                self.lost_at_crash,
                self.options,
            );
        }
    }
}

#[test]
fn whatever_fails_and_whenever_it_crashes_what_was_accepted_arrives_or_is_counted() {
    // A debug build is ten times slower.
    let seeds = if cfg!(debug_assertions) { 1000 } else { 20_000 };
    for seed in 0..seeds {
        let mut history = History::new(seed);
        for _ in 0..50 {
            history.step();
        }
        history.settle(seed);
    }
}
