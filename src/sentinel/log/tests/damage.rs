//! Files damaged while nobody looks.

use std::sync::Arc;

use super::super::files::{Disk, Files, Memory, read_full};
use super::super::{DropReason, segment_name};
use super::{Source, drain, open, options};

const BATCH: usize = 300;
const BATCHES: usize = 12;

/// A copy of all files.
fn copy(files: &dyn Files) -> Arc<dyn Files> {
    let copy = Memory::default();
    for name in files.list().unwrap() {
        let octets = read(files, &name);
        copy.create(&name, 0).unwrap().write_at(&octets, 0).unwrap();
    }
    Arc::new(copy)
}

fn read(files: &dyn Files, name: &str) -> Vec<u8> {
    let file = files.open(name).unwrap();
    let mut octets = vec![0; file.length().unwrap() as usize];
    read_full(&*file, &mut octets, 0).unwrap();
    octets
}

/// A log of one segment, whose process was killed.
fn written() -> (Arc<dyn Files>, Source, Vec<u8>) {
    let files: Arc<dyn Files> = Arc::new(Memory::default());
    let mut source = Source::new(40);
    let log = open(&files, &options(1 << 22, 1 << 20), &source, &["one"]);
    for _ in 0..BATCHES {
        log.append(&source.batch(BATCH)).unwrap();
    }
    drop(log);
    let octets = read(&*files, &segment_name(1));
    (files, source, octets)
}

#[test]
fn a_tail_cut_by_1_to_200_octets_costs_at_most_the_last_record() {
    let (files, source, octets) = written();
    for cut in 1..=200 {
        let files = copy(&*files);
        files.open(&segment_name(1)).unwrap().set_len((octets.len() - cut) as u64).unwrap();
        let log = open(&files, &options(1 << 22, 1 << 20), &source, &["one"]);
        let got = drain(&log, &source, "one");
        assert_eq!(got, (0..((BATCHES - 1) * BATCH) as u64).collect::<Vec<_>>(), "cut by {cut}");
        assert!(log.stats().torn_bytes > 0);
    }
}

#[test]
fn any_flipped_octet_costs_at_most_its_record_and_the_loss_is_counted() {
    let (files, source, octets) = written();
    for at in (0..octets.len()).step_by(if cfg!(debug_assertions) { 9 } else { 1 }) {
        let files = copy(&*files);
        files.open(&segment_name(1)).unwrap().write_at(&[octets[at] ^ 0x10], at as u64).unwrap();
        let log = open(&files, &options(1 << 22, 1 << 20), &source, &["one"]);
        let got = drain(&log, &source, "one");
        assert!(got.is_sorted_by(|a, b| a < b));
        let missing: Vec<u64> = (0..(BATCHES * BATCH) as u64).filter(|n| got.binary_search(n).is_err()).collect();
        assert!(missing.is_empty() || missing.len() == BATCH, "octet {at}: {} missing", missing.len());
        assert!(missing.first().is_none_or(|first| first % BATCH as u64 == 0));
        // A damaged end cannot be told from one that was never finished.
        let stats = log.stats();
        let counted = stats.dropped.get(&("one".into(), DropReason::Damaged)).copied().unwrap_or(0);
        assert!(counted == missing.len() as u64 || (counted == 0 && stats.torn_bytes > 0), "octet {at}");
    }
}

#[test]
fn a_cursor_emptied_or_deleted_means_everything_again_and_never_nothing() {
    let (files, source, _) = written();
    let log = open(&files, &options(1 << 22, 1 << 20), &source, &["one", "two"]);
    log.acknowledge("one", 1000);
    log.save_cursors().unwrap();
    log.acknowledge("one", 2000);
    log.save_cursors().unwrap();
    drop(log);
    for (damage, from) in [(0, 2000), (1, 1000), (2, 0), (3, 0)] {
        let files = copy(&*files);
        match damage {
            0 => {}
            1 => files.open("one.0.cursor").unwrap().set_len(0).unwrap(),
            2 => (0..2).for_each(|slot| files.open(&format!("one.{slot}.cursor")).unwrap().set_len(0).unwrap()),
            _ => (0..2).for_each(|slot| files.remove(&format!("one.{slot}.cursor")).unwrap()),
        }
        let log = open(&files, &options(1 << 22, 1 << 20), &source, &["one", "two"]);
        assert_eq!(drain(&log, &source, "one").first(), Some(&from), "damage {damage}");
        assert_eq!(drain(&log, &source, "two").len(), BATCHES * BATCH);
    }
}

#[test]
fn a_log_on_a_real_disk_belongs_to_one_process_and_comes_back() {
    let directory = std::env::temp_dir().join(format!("warren-sentinel-log-{}", std::process::id()));
    let mut source = Source::new(5);
    for round in 0..3 {
        let files: Arc<dyn Files> = Arc::new(Disk::take(&directory).unwrap());
        assert!(Disk::take(&directory).is_err());
        let log = open(&files, &options(1 << 22, 1 << 20), &source, &["one"]);
        log.append(&source.batch(100)).unwrap();
        if round == 1 {
            assert_eq!(drain(&log, &source, "one").len(), 200);
        }
        log.finish().unwrap();
        assert!(log.append(&source.batch(1)).is_err());
        source.next -= 1;
    }
    let files: Arc<dyn Files> = Arc::new(Disk::take(&directory).unwrap());
    let log = open(&files, &options(1 << 22, 1 << 20), &source, &["one"]);
    assert_eq!(drain(&log, &source, "one"), (200..300).collect::<Vec<_>>());
    drop((log, files));
    std::fs::remove_dir_all(directory).unwrap();
}
