//! Finding out, at start, what the last process left.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::sync::{Arc, Condvar, Mutex};

use super::files::{Files, read_full};
use super::record::{MAX_SEQUENCE, SEGMENT_HEADER, SegmentHeader};
use super::scan::Scanner;
use super::write::Writer;
use super::{Log, Options, Progress, Segment, State, Stats, cursor, now_ms, segment_name, segment_number};
use crate::sentinel::model::SeriesTable;

impl Log {
    /// Opens the log in a directory, or begins one. Whatever the files look like, what is whole in them is kept.
    /// Reads the headers of all segments and the newest one wholly.
    pub fn open(
        files: Arc<dyn Files>,
        options: Options,
        table: Arc<SeriesTable>,
        destinations: &[String],
    ) -> io::Result<Self> {
        let names = files.list()?;
        let mut numbers: Vec<u64> = names.iter().filter_map(|name| segment_number(name)).collect();
        numbers.sort_unstable();
        let mut headers: Vec<(u64, SegmentHeader)> = Vec::new();
        for &number in &numbers {
            match identify(&*files, number)? {
                Some(header) => headers.push((number, header)),
                None => remove(&*files, number),
            }
        }
        let mut id = headers.iter().rev().map(|(_, header)| header.log).find(|&id| id != UNKNOWN);
        for name in names.iter().filter_map(|name| cursor::destination(name)) {
            if id.is_none() {
                id = cursor::load(&*files, name, None)?.map(|cursor| cursor.log);
            }
        }
        let id = match id {
            Some(id) => id,
            None => random()?,
        };
        headers.retain(|(number, header)| {
            let ours = header.log == id || header.log == UNKNOWN;
            if !ours {
                log::warn!("buffer segment {number} belongs to another log and is left alone");
            }
            ours
        });
        let mut stats = Stats::default();
        let segments = segments(&*files, &headers, &mut stats)?;
        let oldest = segments.values().next().map_or(0, |segment| segment.first);
        // A segment with nothing in it still says which numbers were given before it.
        let begun = headers.iter().map(|(_, header)| header.first);
        let mut next = segments.values().map(|segment| segment.end).chain(begun).max().unwrap_or(0);
        let mut cursors = BTreeMap::new();
        for name in destinations {
            let found = cursor::load(&*files, name, Some(id))?.filter(|cursor| cursor.sequence < MAX_SEQUENCE);
            if found.is_none() && !segments.is_empty() {
                log::warn!("destination {name} has no cursor: it gets everything from the oldest sample on");
                stats.cursors_lost += 1;
            }
            let (sequence, generation) = found.map_or((oldest, 0), |cursor| (cursor.sequence, cursor.generation));
            // Samples that were acknowledged and are lost all the same: their numbers are not used again.
            next = next.max(sequence);
            let at = sequence.max(oldest);
            cursors.insert(
                name.clone(),
                Progress { sequence: at, evicted: oldest, saved: sequence, generation, in_flight: None },
            );
        }
        for name in names.iter().filter_map(|name| cursor::destination(name)) {
            if !destinations.iter().any(|destination| destination == name) {
                cursor::forget(&*files, name)?;
            }
        }
        let next_number = numbers.last().map_or(1, |last| last + 1);
        let log = Self {
            files,
            table,
            id,
            writer: Mutex::new(Writer::new(options, next_number)),
            saving: Mutex::default(),
            state: Mutex::new(State { segments, cursors, next, closed: false, stats }),
            grown: Condvar::new(),
        };
        let done = Self::take_finished(&mut log.lock());
        log.remove_segments(&done);
        Ok(log)
    }
}

/// In the header of a segment whose own is damaged.
const UNKNOWN: u64 = 0;

/// A segment's header; where that is damaged, what its first record tells. Nothing: there is nothing in it.
pub(super) fn identify(files: &dyn Files, number: u64) -> io::Result<Option<SegmentHeader>> {
    let file = files.open(&segment_name(number))?;
    let mut raw = [0; SEGMENT_HEADER as usize];
    let len = read_full(&*file, &mut raw, 0)?;
    if let Some(header) = SegmentHeader::decode(&raw[..len]) {
        return Ok(Some(header));
    }
    let limit = file.length()?;
    let mut scanner = Scanner::new(file);
    let first = scanner.next(limit)?.map(|(record, _)| record);
    Ok(first.map(|record| SegmentHeader { log: UNKNOWN, first: record.sequence, created_ms: record.accepted_ms }))
}

/// What the segments hold. The end of the newest is found by reading it, and cut; where any other ends is told by the
/// one after it.
fn segments(
    files: &dyn Files,
    headers: &[(u64, SegmentHeader)],
    stats: &mut Stats,
) -> io::Result<BTreeMap<u64, Segment>> {
    let mut segments = BTreeMap::new();
    for (n, &(number, header)) in headers.iter().enumerate() {
        let file = files.open(&segment_name(number))?;
        let bytes = file.length()?;
        let mut segment = Segment {
            first: header.first,
            end: header.first,
            bytes,
            data_end: bytes,
            sealed: true,
            oldest_ms: header.created_ms,
            newest_ms: header.created_ms,
        };
        if let Some((_, after)) = headers.get(n + 1) {
            segment.end = after.first.max(header.first);
            segment.newest_ms = after.created_ms;
        } else {
            let mut scanner = Scanner::new(Arc::clone(&file));
            while let Some((record, _)) = scanner.next(bytes)? {
                segment.end = segment.end.max(record.end());
                segment.newest_ms = record.accepted_ms;
            }
            segment.data_end = scanner.good_end();
            stats.torn_bytes = scanner.data_end().saturating_sub(scanner.good_end());
            if segment.end > segment.first {
                // Failing that it stays as long as it is, and is read as far as it is good.
                let cut = file.set_len(segment.data_end).and_then(|()| file.sync());
                match cut {
                    Ok(()) => segment.bytes = segment.data_end,
                    Err(e) => log::warn!("buffer segment {number} cannot be cut: {e}"),
                }
            }
        }
        if segment.end > segment.first {
            segments.insert(number, segment);
        } else {
            remove(files, number);
        }
    }
    let now = now_ms();
    for segment in segments.values_mut() {
        // A clock that was ahead must not keep samples for ever.
        segment.newest_ms = segment.newest_ms.min(now);
    }
    Ok(segments)
}

/// Removes a segment with nothing in it.
fn remove(files: &dyn Files, number: u64) {
    if let Err(e) = files.remove(&segment_name(number)) {
        log::warn!("empty buffer segment {number} cannot be removed: {e}");
    }
}

fn random() -> io::Result<u64> {
    let mut octets = [0; 8];
    File::open("/dev/urandom")?.read_exact(&mut octets)?;
    Ok(u64::from_le_bytes(octets).max(UNKNOWN + 1))
}
