//! Appending, and making room.

use std::io;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Instant;

use super::block::{BySeries, Encoder, MAX_SERIES};
use super::files::{LogFile, write_full};
use super::record::{self, MAX_SAMPLES, RecordHeader, RecordKind, SEGMENT_HEADER, SegmentHeader};
use super::{AppendError, DropReason, Fsync, Log, Options, Policy, Segment, State, now_ms, segment_name};
use crate::sentinel::model::{Batch, Sample, Series, SeriesId};

/// Most series that one segment names.
pub const MAX_DICTIONARY: u32 = 1 << 20;
/// Octets of series put into one dictionary record.
const DICTIONARY_BYTES: usize = 512 * 1024;
/// Octets of a segment that is made smaller because the disk has no room for one of the usual size.
const SMALLEST: u64 = 64 * 1024;
/// Samples put into one record.
const RECORD_SAMPLES: usize = 2048;
const _: () = assert!(RECORD_SAMPLES <= MAX_SAMPLES);

/// What only the appending thread touches.
pub struct Writer {
    options: Options,
    current: Option<Current>,
    next_number: u64,
    encoder: Encoder,
    /// The series' numbers of the samples being written.
    numbers: Vec<u32>,
    out: Vec<u8>,
    synced: Instant,
}

struct Current {
    number: u64,
    file: Arc<dyn LogFile>,
    /// Octets allocated.
    size: u64,
    /// Where the next record goes.
    offset: u64,
    /// The series that it names already.
    dictionary: BySeries<u32>,
    /// The same by their numbers.
    named: Vec<SeriesId>,
    /// Something was written since it was last made durable.
    dirty: bool,
}

impl Writer {
    pub fn new(options: Options, next_number: u64) -> Self {
        let (encoder, numbers, out) = (Encoder::default(), Vec::new(), Vec::new());
        Self { options, current: None, next_number, encoder, numbers, out, synced: Instant::now() }
    }

    /// Writes the records of `samples` into `self.out`, for the current segment. Nothing when its dictionary is full.
    fn encode(&mut self, samples: &[Sample], first: u64, now: i64) -> Option<()> {
        let current = self.current.as_mut()?;
        self.out.clear();
        let number_of_first = current.named.len() as u32;
        let mut fresh: Vec<Arc<Series>> = Vec::new();
        // What says the same as last time says it in the same order: mostly the next number is the one.
        let mut next = 0;
        let numbers = samples.iter().map(|sample| {
            let id = sample.series.id();
            let number = match current.named.get(next as usize) {
                Some(named) if *named == id => next,
                _ => *current.dictionary.entry(id).or_insert_with(|| {
                    fresh.push(Arc::clone(&sample.series));
                    current.named.push(id);
                    current.named.len() as u32 - 1
                }),
            };
            next = number + 1;
            number
        });
        self.numbers.clear();
        self.numbers.extend(numbers);
        if current.named.len() as u32 > MAX_DICTIONARY {
            return None;
        }
        let header = |kind, samples, sequence| RecordHeader { kind, samples, sequence, accepted_ms: now };
        let mut number = number_of_first;
        for part in parts(&fresh) {
            let payload = self.encoder.dictionary(number, part)?;
            record::encode(header(RecordKind::Dictionary, 0, first), payload, &mut self.out);
            number += part.len() as u32;
        }
        let dictionary = self.out.len();
        let mut sequence = first;
        for (part, numbers) in samples.chunks(RECORD_SAMPLES).zip(self.numbers.chunks(RECORD_SAMPLES)) {
            let payload = self.encoder.samples(part, numbers)?;
            record::encode(header(RecordKind::Samples, part.len() as u32, sequence), payload, &mut self.out);
            sequence += part.len() as u64;
        }
        // Once more, so that one damaged record cannot make others unreadable.
        self.out.extend_from_within(..dictionary);
        Some(())
    }
}

/// Series in groups that one dictionary record can hold.
fn parts(series: &[Arc<Series>]) -> impl Iterator<Item = &[Arc<Series>]> {
    let mut rest = series;
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let fits = |series: &&Arc<Series>| {
            bytes += series.size();
            bytes <= DICTIONARY_BYTES
        };
        let count = rest.iter().take(MAX_SERIES).take_while(fits).count();
        let (part, after) = rest.split_at(count);
        rest = after;
        (!part.is_empty()).then_some(part)
    })
}

impl Log {
    /// Accepts all of a batch or nothing of it. What is accepted is durable as `fsync` says.
    pub fn append(&self, batch: &Batch) -> Result<(), AppendError> {
        if batch.samples.is_empty() {
            return Ok(());
        }
        let result = self.try_append(&batch.samples);
        let reason = match &result {
            Ok(()) => return result,
            Err(AppendError::Full(reason)) => Some(*reason),
            Err(AppendError::Io(_)) => Some(DropReason::Io),
            Err(AppendError::Busy | AppendError::Closed) => None,
        };
        let state = &mut *self.lock();
        let count = batch.samples.len() as u64;
        match reason {
            Some(reason) => state.cursors.keys().for_each(|name| state.stats.drop_samples(name, reason, count)),
            None => state.stats.held_off += count,
        }
        result
    }

    fn try_append(&self, samples: &[Sample]) -> Result<(), AppendError> {
        let mut writer = self.writer();
        let first = {
            let state = self.lock();
            if state.closed {
                return Err(AppendError::Closed);
            }
            state.next
        };
        let now = now_ms();
        self.encode(&mut writer, samples, first, now)?;
        let Writer { options, current: Some(current), out, .. } = &mut *writer else {
            return Err(AppendError::Closed);
        };
        let mut result = write_full(&*current.file, out, current.offset);
        current.dirty = true;
        if result.is_ok() && options.fsync == Fsync::Always {
            current.dirty = false;
            result = self.sync(&*current.file);
        }
        if let Err(e) = result {
            log::warn!("buffer segment {}: {e}", current.number);
            // Whatever is there of it is cut off, and never read before that.
            self.seal(&mut writer);
            return Err(AppendError::Io(e));
        }
        current.offset += out.len() as u64;
        let state = &mut *self.lock();
        state.next = first + samples.len() as u64;
        state.stats.accepted += samples.len() as u64;
        state.stats.written_bytes += out.len() as u64;
        if let Some(segment) = state.segments.get_mut(&current.number) {
            segment.end = state.next;
            segment.data_end = current.offset;
            segment.newest_ms = now;
        }
        self.grown.notify_all();
        Ok(())
    }

    /// Encodes samples for a segment that has room for them, which is begun where there is none.
    fn encode(&self, writer: &mut Writer, samples: &[Sample], first: u64, now: i64) -> Result<(), AppendError> {
        let mut need = 0;
        loop {
            if writer.current.is_none() {
                writer.current = Some(self.begin_segment(writer, need, first, now)?);
            }
            let encoded = writer.encode(samples, first, now).is_some();
            let len = writer.out.len() as u64;
            let Some(current) = &writer.current else { continue };
            if encoded && current.offset + len <= current.size {
                return Ok(());
            }
            if !encoded && current.offset == SEGMENT_HEADER {
                return Err(AppendError::Io(io::Error::other("a batch has too many series")));
            }
            need = SEGMENT_HEADER + len;
            self.seal(writer);
        }
    }

    /// Makes a segment of at least `need` octets, and room for it where the policy allows.
    fn begin_segment(&self, writer: &mut Writer, need: u64, first: u64, now: i64) -> Result<Current, AppendError> {
        let number = writer.next_number;
        let mut size = writer.options.segment_bytes.max(need);
        let file = loop {
            let reason = match self.create(&writer.options, number, size) {
                Ok(file) => break file,
                // A small disk has room for a small segment.
                Err(AppendError::Full(DropReason::DiskFull)) if size / 4 >= SMALLEST.max(need) => {
                    size /= 4;
                    continue;
                }
                Err(AppendError::Full(reason)) => reason,
                Err(error) => return Err(error),
            };
            match writer.options.policy {
                Policy::DropOldest if size <= writer.options.max_bytes && self.evict_oldest(reason) => {}
                Policy::Block => return Err(AppendError::Busy),
                Policy::DropOldest | Policy::DropNew => return Err(AppendError::Full(reason)),
            }
        };
        writer.next_number += 1;
        let header = SegmentHeader { log: self.id, first, created_ms: now };
        let durable = write_full(&*file, &header.encode(), 0).and_then(|()| match writer.options.fsync {
            Fsync::Never => Ok(()),
            _ => self.sync(&*file).and_then(|()| self.files.sync_directory()),
        });
        if let Err(e) = durable {
            self.remove_segments(&[number]);
            return Err(AppendError::Io(e));
        }
        let segment = Segment {
            first,
            end: first,
            bytes: size,
            data_end: SEGMENT_HEADER,
            sealed: false,
            oldest_ms: now,
            newest_ms: now,
        };
        self.lock().segments.insert(number, segment);
        let (dictionary, named) = (BySeries::default(), Vec::new());
        Ok(Current { number, file, size, offset: SEGMENT_HEADER, dictionary, named, dirty: false })
    }

    /// Allocates a segment within the limits. [`AppendError::Full`] says which one is in the way.
    fn create(&self, options: &Options, number: u64, size: u64) -> Result<Arc<dyn LogFile>, AppendError> {
        if Self::bytes(&self.lock()).saturating_add(size) > options.max_bytes {
            return Err(AppendError::Full(DropReason::Size));
        }
        if options.min_free_bytes > 0 {
            let free = self.files.free().map_err(AppendError::Io)?;
            if free < options.min_free_bytes.saturating_add(size) {
                return Err(AppendError::Full(DropReason::DiskFull));
            }
        }
        self.files.create(&segment_name(number), size).map_err(|e| match e.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => AppendError::Full(DropReason::DiskFull),
            _ => AppendError::Io(e),
        })
    }

    /// Removes the oldest segment that is not being written, and counts what that costs. Whether there was one.
    fn evict_oldest(&self, reason: DropReason) -> bool {
        let number = {
            let state = &mut *self.lock();
            let Some((&number, &segment)) = state.segments.iter().find(|(_, segment)| segment.sealed) else {
                return false;
            };
            state.segments.remove(&number);
            evict(state, segment, reason);
            number
        };
        self.remove_passed(&[number]);
        true
    }

    /// Ends the current segment: nothing is appended to it any more, and what it does not need is given back.
    fn seal(&self, writer: &mut Writer) {
        let Some(current) = writer.current.take() else { return };
        if current.offset == SEGMENT_HEADER {
            self.lock().segments.remove(&current.number);
            self.remove_segments(&[current.number]);
            return;
        }
        let cut = current.file.set_len(current.offset);
        let durable = cut.and_then(|()| match writer.options.fsync {
            Fsync::Never => Ok(()),
            _ => self.sync(&*current.file),
        });
        if let Err(e) = &durable {
            // What it holds was durable or, with an interval, may be lost with the machine's power: as promised.
            log::warn!("buffer segment {} cannot be ended: {e}", current.number);
        }
        if let Some(segment) = self.lock().segments.get_mut(&current.number) {
            segment.sealed = true;
            if durable.is_ok() {
                segment.bytes = current.offset;
            }
        }
    }

    fn sync(&self, file: &dyn LogFile) -> io::Result<()> {
        let start = Instant::now();
        let result = file.sync();
        let stats = &mut self.lock().stats;
        stats.fsyncs += 1;
        stats.fsync_time += start.elapsed();
        stats.fsync_errors += u64::from(result.is_err());
        result
    }

    /// What time asks for: makes durable what the interval says, drops what is too old, saves the cursors. To be called
    /// about once a second, and as often as the interval of `fsync`.
    pub fn tick(&self) {
        self.sync_if_due();
        let max_age = self.writer().options.max_age;
        if let Some(age) = max_age {
            self.drop_older(now_ms().saturating_sub(age.as_millis() as i64));
        }
        if let Err(e) = self.save_cursors() {
            log::warn!("buffer cursors cannot be saved: {e}");
        }
    }

    fn sync_if_due(&self) {
        let (number, file) = {
            let writer = &mut *self.writer();
            let Fsync::Interval(interval) = writer.options.fsync else { return };
            let Some(current) = &mut writer.current else { return };
            if !current.dirty || writer.synced.elapsed() < interval {
                return;
            }
            current.dirty = false;
            writer.synced = Instant::now();
            (current.number, Arc::clone(&current.file))
        };
        // Without the lock: nobody who appends waits for the disk.
        if let Err(e) = self.sync(&*file) {
            log::warn!("buffer segment {number} cannot be made durable: {e}");
            let writer = &mut *self.writer();
            if writer.current.as_ref().is_some_and(|current| current.number == number) {
                self.seal(writer);
            }
        }
    }

    /// Drops every segment whose newest sample was accepted before `limit_ms`.
    pub(super) fn drop_older(&self, limit_ms: i64) {
        let old = |segment: &Segment| segment.newest_ms < limit_ms && segment.end > segment.first;
        let writer = &mut *self.writer();
        let current = writer.current.as_ref().map(|current| current.number);
        if current.is_some_and(|number| self.lock().segments.get(&number).is_some_and(old)) {
            self.seal(writer);
        }
        while self.lock().segments.values().next().is_some_and(|oldest| oldest.sealed && old(oldest)) {
            self.evict_oldest(DropReason::Age);
        }
    }

    /// Changes the limits from now on.
    pub fn set_options(&self, options: Options) {
        self.writer().options = options;
    }

    /// Ends the log in good order: nothing is accepted any more, everything is durable.
    pub fn finish(&self) -> io::Result<()> {
        self.close();
        self.seal(&mut self.writer());
        self.save_cursors()?;
        let done = Self::take_finished(&mut self.lock());
        self.remove_segments(&done);
        Ok(())
    }

    fn writer(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts what each destination loses with a segment.
fn evict(state: &mut State, segment: Segment, reason: DropReason) {
    for (name, progress) in &mut state.cursors {
        let start = progress.sequence.max(segment.first);
        let unsent = segment.end.saturating_sub(start);
        // What is just being sent may still arrive.
        let flying = progress
            .in_flight
            .as_ref()
            .map_or(0, |range| range.end.min(segment.end).saturating_sub(range.start.max(start)));
        state.stats.drop_samples(name, reason, unsent.saturating_sub(flying));
        progress.sequence = progress.sequence.max(segment.end);
        progress.evicted = progress.evicted.max(segment.end);
    }
}
