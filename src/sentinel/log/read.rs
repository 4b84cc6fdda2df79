//! A destination's way through the log.

use std::io;
use std::sync::Arc;

use super::block::{read_dictionary, read_samples};
use super::record::{RecordHeader, RecordKind};
use super::scan::Scanner;
use super::write::MAX_DICTIONARY;
use super::{DropReason, Log, Segment, segment_name};
use crate::sentinel::model::{Identity, Sample, Series};

/// Times that a place is tried to be read before the rest of its segment is given up.
const READ_TRIES: u32 = 5;

/// Samples that follow each other in the log.
#[derive(Debug)]
pub struct Block {
    /// Sequence number of the first.
    pub first: u64,
    /// At least one.
    pub samples: Vec<Sample>,
    /// When they were accepted: milliseconds since 1970-01-01 UTC.
    pub accepted_ms: i64,
}

impl Block {
    /// The sequence number after the last.
    pub fn end(&self) -> u64 {
        self.first + self.samples.len() as u64
    }
}

/// Reads the log for one destination, from its cursor on.
pub struct Reader {
    log: Arc<Log>,
    destination: String,
    /// The next sample to be read.
    position: u64,
    open: Option<Open>,
    failures: u32,
}

struct Open {
    number: u64,
    scanner: Scanner,
    dictionary: Vec<Option<Arc<Series>>>,
    damaged: u64,
}

impl Reader {
    /// Begins at the cursor of `destination`.
    pub fn new(log: &Arc<Log>, destination: &str) -> Self {
        let position = log.lock().cursors.get(destination).map_or(0, |progress| progress.sequence);
        Self { log: Arc::clone(log), destination: destination.into(), position, open: None, failures: 0 }
    }

    /// The sequence number of the next sample.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Goes back to what was read but not acknowledged.
    pub fn rewind(&mut self) {
        self.position = self.log.lock().cursors.get(&self.destination).map_or(0, |progress| progress.sequence);
        self.open = None;
    }

    /// The next samples, if there are any yet. After an error the same place is tried again, a few times.
    pub fn next_block(&mut self) -> io::Result<Option<Block>> {
        loop {
            let (number, segment) = match self.segment() {
                Ok(found) => found,
                Err(next) => {
                    // Numbers that no segment has are of samples lost with the machine's power.
                    self.lose_until(next);
                    return Ok(None);
                }
            };
            match self.read(number, segment) {
                Ok(Some(block)) => {
                    self.failures = 0;
                    return Ok(Some(block));
                }
                Ok(None) if segment.sealed => self.leave(segment),
                Ok(None) => return Ok(None),
                // Removed meanwhile, and what that costs was counted.
                Err(e) if e.kind() == io::ErrorKind::NotFound && !self.log.lock().segments.contains_key(&number) => {}
                Err(e) => {
                    self.open = None;
                    self.failures += 1;
                    if self.failures < READ_TRIES || !segment.sealed {
                        return Err(e);
                    }
                    log::warn!("buffer segment {number} cannot be read, the rest of it is given up: {e}");
                    self.failures = 0;
                    self.leave(segment);
                }
            }
        }
    }

    /// The segment with the next sample; where there is none, the number that the next accepted sample gets.
    fn segment(&mut self) -> Result<(u64, Segment), u64> {
        let state = self.log.lock();
        if let Some(progress) = state.cursors.get(&self.destination) {
            self.position = self.position.max(progress.evicted);
        }
        let holds = |(_, segment): &(&u64, &Segment)| segment.end > self.position;
        state.segments.iter().find(holds).map(|(&number, &segment)| (number, segment)).ok_or(state.next)
    }

    /// Goes on to the next segment; what was to be in this one and was not found is lost.
    fn leave(&mut self, segment: Segment) {
        self.lose_until(segment.end);
        self.open = None;
    }

    fn lose_until(&mut self, sequence: u64) {
        if sequence > self.position {
            let lost = sequence - self.position;
            self.log.lock().stats.drop_samples(&self.destination, DropReason::Damaged, lost);
            self.pass(sequence);
        }
    }

    /// Goes on to `sequence` without having found anything; what is not there needs no acknowledgement.
    fn pass(&mut self, sequence: u64) {
        if let Some(progress) = self.log.lock().cursors.get_mut(&self.destination)
            && progress.sequence == self.position
        {
            progress.sequence = sequence;
        }
        self.position = sequence;
    }

    fn read(&mut self, number: u64, segment: Segment) -> io::Result<Option<Block>> {
        if self.open.as_ref().is_none_or(|open| open.number != number) {
            let file = self.log.files.open(&segment_name(number))?;
            let (dictionary, damaged) = (Vec::new(), 0);
            self.open = Some(Open { number, scanner: Scanner::new(file), dictionary, damaged });
        }
        self.lose_until(segment.first);
        loop {
            let Some(open) = &mut self.open else { return Ok(None) };
            let next = open.scanner.next(segment.data_end)?;
            let Some((header, payload)) = next else { return Ok(None) };
            // Refused when it was written, but not cut off; its numbers were given to others.
            if header.end() > segment.end {
                return Ok(None);
            }
            let mut damaged = false;
            let mut block = None;
            match header.kind {
                RecordKind::Dictionary => match read_dictionary(payload) {
                    Ok((first, series)) => learn(&mut open.dictionary, first, series, &self.log),
                    Err(_) => damaged = true,
                },
                RecordKind::Samples if header.end() <= self.position => {}
                RecordKind::Samples => match samples(header, payload, &open.dictionary) {
                    Some(samples) => block = Some(samples),
                    None => damaged = true,
                },
            }
            let places = open.scanner.damaged() + u64::from(damaged);
            let seen = std::mem::replace(&mut open.damaged, open.scanner.damaged());
            if places > seen {
                let stats = &mut self.log.lock().stats;
                *stats.damaged_records.entry(self.destination.clone()).or_default() += places - seen;
            }
            if let Some((samples, unknown)) = block {
                self.lose_until(header.sequence);
                let skip = (self.position - header.sequence) as usize;
                match self.block(header, samples, unknown, skip) {
                    Some(block) => {
                        self.position = header.end();
                        return Ok(Some(block));
                    }
                    None => self.pass(header.end()),
                }
            }
        }
    }

    /// What is left of a record's samples from number `skip` on.
    fn block(&self, header: RecordHeader, samples: Vec<Option<Sample>>, unknown: usize, skip: usize) -> Option<Block> {
        let first = header.sequence + skip as u64;
        let known: Vec<Sample> = samples.into_iter().skip(skip).flatten().collect();
        if unknown > 0 {
            // Their series stood in a record that is damaged twice.
            let lost = header.end() - first - known.len() as u64;
            self.log.lock().stats.drop_samples(&self.destination, DropReason::Damaged, lost);
        }
        (!known.is_empty()).then_some(Block { first, samples: known, accepted_ms: header.accepted_ms })
    }
}

fn learn(dictionary: &mut Vec<Option<Arc<Series>>>, first: u32, series: Vec<Identity>, log: &Log) {
    let (first, end) = (first as usize, first as usize + series.len());
    // The second copy says nothing new, and no segment that we wrote goes so far.
    if end > MAX_DICTIONARY as usize || (first < end && dictionary.get(end - 1).is_some_and(Option::is_some)) {
        return;
    }
    if dictionary.len() < end {
        dictionary.resize(end, None);
    }
    for (slot, identity) in dictionary[first..].iter_mut().zip(series) {
        *slot = Some(log.table.adopt(identity));
    }
}

type Read = (Vec<Option<Sample>>, usize);

/// A record's samples, nothing in the place of those whose series is not known, and how many those are.
fn samples(header: RecordHeader, payload: &[u8], dictionary: &[Option<Arc<Series>>]) -> Option<Read> {
    let raw = read_samples(payload).ok().filter(|raw| raw.len() == header.samples as usize)?;
    let samples: Vec<Option<Sample>> = raw
        .iter()
        .map(|raw| {
            let series = dictionary.get(raw.number as usize)?.clone()?;
            Some(Sample { series, timestamp_ms: raw.timestamp_ms, value: raw.value })
        })
        .collect();
    let unknown = samples.iter().filter(|sample| sample.is_none()).count();
    Some((samples, unknown))
}
