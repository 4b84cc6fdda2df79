//! What a process that is killed at the worst moment leaves to the next one.

use std::sync::Arc;

use super::super::files::{Files, Memory};
use super::super::segment_name;
use super::{Source, drain, open, options};

/// A log with three batches whose process was killed before its cursors were saved.
fn killed() -> (Arc<dyn Files>, Source) {
    let files: Arc<dyn Files> = Arc::new(Memory::default());
    let mut source = Source::new(40);
    let log = open(&files, &options(1 << 22, 1 << 20), &source, &["one", "two"]);
    for _ in 0..3 {
        log.append(&source.batch(100)).unwrap();
    }
    (files, source)
}

#[test]
fn a_kill_right_after_a_segments_end_makes_nothing_that_was_delivered_count_as_lost() {
    let (files, mut source) = killed();
    let log = open(&files, &options(1 << 22, 1 << 20), &source, &["one", "two"]);
    log.append(&source.batch(100)).unwrap();
    let all: Vec<u64> = (0..400).collect();
    assert_eq!((drain(&log, &source, "one"), drain(&log, &source, "two")), (all.clone(), all));
    assert!(!files.list().unwrap().contains(&segment_name(1)));
    drop(log);
    let log = open(&files, &options(1 << 22, 1 << 20), &source, &["one", "two"]);
    let again: Vec<u64> = (300..400).collect();
    for name in ["one", "two"] {
        let repeated = drain(&log, &source, name);
        assert!(repeated.is_empty() || repeated == again, "{name}: {repeated:?}");
        assert_eq!(log.stats().dropped_for(name), 0, "{name}");
    }
}

#[test]
fn sequence_numbers_are_never_given_twice_whoever_is_killed_when() {
    for removed_by_age in [false, true] {
        let (files, mut source) = killed();
        let log = open(&files, &options(1 << 22, 1 << 20), &source, &["one", "two"]);
        if removed_by_age {
            log.drop_older(i64::MAX);
        } else {
            drain(&log, &source, "one");
            drain(&log, &source, "two");
        }
        assert!(!files.list().unwrap().iter().any(|name| name.ends_with(".seg")));
        drop(log);
        let log = open(&files, &options(1 << 22, 1 << 20), &source, &["one", "two"]);
        assert_eq!(log.stats().next_sequence, 300);
        // A segment was begun and nothing put into it.
        log.append(&source.batch(1)).unwrap();
        files.open(&segment_name(1)).unwrap().set_len(super::super::record::SEGMENT_HEADER).unwrap();
        for name in files.list().unwrap().iter().filter(|name| name.ends_with(".cursor")) {
            files.remove(name).unwrap();
        }
        drop(log);
        let log = open(&files, &options(1 << 22, 1 << 20), &source, &["one", "two"]);
        assert_eq!(log.stats().next_sequence, 300);
    }
}
