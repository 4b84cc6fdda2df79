//! Caps and policies.

use std::sync::Arc;

use super::super::files::{Files, Memory};
use super::super::{AppendError, DropReason, Fsync, Options, Policy, Reader};
use super::faults::Faulty;
use super::{Source, drain, open, options};

const SEGMENT: u64 = 8 * 1024;

fn dropped(log: &super::Log, destination: &str, reason: DropReason) -> u64 {
    log.stats().dropped.get(&(destination.to_string(), reason)).copied().unwrap_or(0)
}

#[test]
fn at_the_cap_the_oldest_make_room_and_every_one_of_them_is_counted() {
    let files: Arc<dyn Files> = Arc::new(Memory::default());
    let mut source = Source::new(10);
    let log = open(&files, &options(4 * SEGMENT, SEGMENT), &source, &["one", "two"]);
    for n in 0..400 {
        log.append(&source.batch(100)).unwrap();
        assert!(log.stats().bytes <= 4 * SEGMENT);
        if n == 20 {
            assert_eq!(drain(&log, &source, "two").len(), 2100);
        }
    }
    let got = drain(&log, &source, "one");
    assert_eq!(got.last(), Some(&39_999));
    assert_eq!(got.len() as u64 + dropped(&log, "one", DropReason::Size), 40_000);
    let got = drain(&log, &source, "two");
    assert_eq!(got.len() as u64 + dropped(&log, "two", DropReason::Size), 40_000 - 2100);
}

#[test]
fn with_drop_new_what_is_there_stays_and_the_new_is_counted() {
    let files: Arc<dyn Files> = Arc::new(Memory::default());
    let mut source = Source::new(10);
    let options = Options { policy: Policy::DropNew, ..options(2 * SEGMENT, SEGMENT) };
    let log = open(&files, &options, &source, &["one"]);
    let refused = (0..200).filter(|_| log.append(&source.batch(100)).is_err()).count() as u64;
    assert!(refused > 0);
    assert_eq!(dropped(&log, "one", DropReason::Size), refused * 100);
    assert_eq!(drain(&log, &source, "one"), (0..20_000 - refused * 100).collect::<Vec<_>>());
    assert!(log.append(&source.batch(100)).is_ok());
}

#[test]
fn with_block_nothing_is_dropped() {
    let files: Arc<dyn Files> = Arc::new(Memory::default());
    let mut source = Source::new(10);
    let options = Options { policy: Policy::Block, ..options(2 * SEGMENT, SEGMENT) };
    let log = open(&files, &options, &source, &["one"]);
    let mut got = Vec::new();
    let mut waits = 0;
    for _ in 0..300 {
        let batch = source.batch(100);
        while let Err(error) = log.append(&batch) {
            assert!(matches!(error, AppendError::Busy));
            waits += 1;
            got.extend(drain(&log, &source, "one"));
        }
    }
    got.extend(drain(&log, &source, "one"));
    assert_eq!(got, (0..30_000).collect::<Vec<_>>());
    assert!(waits > 0 && log.stats().dropped.is_empty());
    assert_eq!(log.stats().held_off, waits * 100);
}

#[test]
fn a_full_disk_is_met_before_anything_is_accepted_and_outlived() {
    for policy in [Policy::DropOldest, Policy::DropNew] {
        let disk = Faulty::new(1, 5 * SEGMENT as usize);
        let files: Arc<dyn Files> = Arc::new(disk.clone());
        let mut source = Source::new(10);
        let options = Options { policy, ..options(1 << 20, SEGMENT) };
        let log = open(&files, &options, &source, &["one"]);
        let append = |source: &mut Source, times: usize| {
            (0..times).filter(|_| log.append(&source.batch(100)).is_err()).count() as u64 * 100
        };
        let refused = append(&mut source, 200);
        assert_eq!(refused > 0, policy == Policy::DropNew);
        // Somebody else takes all there is.
        disk.set_capacity(0);
        let refused = refused + append(&mut source, 100);
        disk.set_capacity(1 << 20);
        assert_eq!(append(&mut source, 50), 0);
        let got = drain(&log, &source, "one");
        assert_eq!(got.last(), Some(&34_999));
        assert_eq!(got.len() as u64 + dropped(&log, "one", DropReason::DiskFull), 35_000, "{policy:?}");
        assert!(policy == Policy::DropOldest || got.len() as u64 + refused == 35_000);
    }
}

#[test]
fn some_of_the_disk_is_left_free() {
    let disk = Faulty::new(1, 8 * SEGMENT as usize);
    let files: Arc<dyn Files> = Arc::new(disk);
    let mut source = Source::new(10);
    let options = Options { min_free_bytes: 4 * SEGMENT, ..options(1 << 20, SEGMENT) };
    let log = open(&files, &options, &source, &["one"]);
    for _ in 0..200 {
        log.append(&source.batch(100)).unwrap();
        assert!(files.free().unwrap() >= 4 * SEGMENT);
    }
    assert!(dropped(&log, "one", DropReason::DiskFull) > 0);
}

#[test]
fn what_became_too_old_is_dropped() {
    let files: Arc<dyn Files> = Arc::new(Memory::default());
    let mut source = Source::new(10);
    let log = open(&files, &options(1 << 20, SEGMENT), &source, &["one"]);
    log.append(&source.batch(100)).unwrap();
    log.drop_older(super::super::now_ms() - 60_000);
    assert!(log.stats().dropped.is_empty());
    log.drop_older(super::super::now_ms() + 60_000);
    assert_eq!(dropped(&log, "one", DropReason::Age), 100);
    log.append(&source.batch(10)).unwrap();
    assert_eq!(drain(&log, &source, "one"), (100..110).collect::<Vec<_>>());
}

#[test]
fn what_is_being_sent_counts_as_dropped_only_when_it_is_given_up() {
    for given_up in [false, true] {
        let files: Arc<dyn Files> = Arc::new(Memory::default());
        let mut source = Source::new(10);
        let log = open(&files, &options(4 * SEGMENT, SEGMENT), &source, &["one"]);
        log.append(&source.batch(100)).unwrap();
        let mut reader = Reader::new(&log, "one");
        assert_eq!(reader.next_block().unwrap().unwrap().samples.len(), 100);
        log.begin("one", 0..100);
        log.append(&source.batch(50)).unwrap();
        log.drop_older(i64::MAX);
        assert_eq!(dropped(&log, "one", DropReason::Age), 50);
        if given_up {
            log.release("one", DropReason::Age);
        } else {
            log.acknowledge("one", 100);
        }
        assert_eq!(dropped(&log, "one", DropReason::Age), if given_up { 150 } else { 50 });
        assert_eq!(log.stats().pending["one"].0, 0);
    }
}

#[test]
fn a_segment_goes_when_the_last_destination_has_it_all() {
    let files: Arc<dyn Files> = Arc::new(Memory::default());
    let mut source = Source::new(10);
    let log = open(&files, &options(1 << 20, SEGMENT), &source, &["one", "two"]);
    for _ in 0..200 {
        log.append(&source.batch(100)).unwrap();
    }
    let segments = log.stats().segments;
    assert!(segments > 3);
    drain(&log, &source, "one");
    assert_eq!(log.stats().segments, segments);
    log.set_destinations(&["one".to_string()]).unwrap();
    assert_eq!(log.stats().segments, 1);
    assert_eq!(dropped(&log, "two", DropReason::DestinationRemoved), 20_000);
}

#[test]
fn a_batch_larger_than_a_segment_gets_one_of_its_own() {
    let files: Arc<dyn Files> = Arc::new(Memory::default());
    let mut source = Source::new(5000);
    let log = open(&files, &Options { fsync: Fsync::Never, ..options(1 << 22, SEGMENT) }, &source, &["one"]);
    log.append(&source.batch(10)).unwrap();
    log.append(&source.batch(20_000)).unwrap();
    assert_eq!(drain(&log, &source, "one").len(), 20_010);
}
