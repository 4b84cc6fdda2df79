//! The one log between collection and all destinations.
//!
//! Samples are appended once; each destination reads them with its own [`Reader`] and says with
//! [`Log::acknowledge`] how far its receiver has taken them. What is on disk says itself what it is (`record`, `block`);
//! nothing else is needed to read it. The files:
//!
//! * `NNNNNNNNNNNNNNNN.seg`: segments, numbered upwards. Only the last one grows. Its space is allocated before anything
//!   is accepted into it, so a full disk is met before and not after. A segment is removed when every destination
//!   has acknowledged all of it, or when a limit asks for it: then what it costs each destination is counted.
//! * `DESTINATION.0.cursor`, `.1.cursor`: see `cursor`.
//!
//! An append that failed leaves nothing that is ever read: the segment is cut where it was and a new one begun. So is
//! every segment found at start: nothing is appended to what a crash may have damaged.
//!
//! What a crash may cost: with [`Fsync::Always`] nothing that was accepted, with [`Fsync::Interval`] what was accepted
//! since the last interval and only if the machine died with the process, with [`Fsync::Never`] what the kernel had not
//! written yet. A cursor is made durable once a second, so a crash repeats what was acknowledged within that time.
//!
//! A segment is removed only once the cursors that passed it are durable: otherwise a kill right after would make the
//! next process give its sequence numbers to other samples, which a core would take for repeats.
//!
//! Threads: any may append; each destination's reader belongs to its lane. Three locks, taken in this order: the writer
//! (held while writing), that of the cursors' files, the state (never held during input or output).

mod block;
mod crc32c;
pub mod cursor;
pub mod files;
mod open;
mod read;
pub mod record;
pub mod scan;
mod stats;
#[cfg(test)]
mod tests;
mod write;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use files::Files;

pub use block::{BadBlock, BySeries, RawSample, read_dictionary, read_samples};
pub use read::{Block, Reader};
pub use stats::{DropReason, Stats};

use super::model::SeriesTable;
use write::Writer;

/// What happens to new samples when there is no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// The oldest segment makes room for them.
    #[default]
    DropOldest,
    /// They are dropped.
    DropNew,
    /// They are not taken; whoever brings them is to come again.
    Block,
}

/// When what was accepted is made durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fsync {
    /// Before it is accepted.
    Always,
    /// This often.
    Interval(Duration),
    /// When the kernel likes.
    Never,
}

/// Limits and rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Most octets of all segments together.
    pub max_bytes: u64,
    /// Octets of one segment; at most a quarter of `max_bytes`.
    pub segment_bytes: u64,
    /// Older samples are dropped.
    pub max_age: Option<Duration>,
    /// So much is left free on the disk.
    pub min_free_bytes: u64,
    /// What happens to new samples when there is no room.
    pub policy: Policy,
    /// When what was accepted is made durable.
    pub fsync: Fsync,
}

impl Options {
    /// With a size of segments that suits: a sixteenth of all, 64 KiB–16 MiB.
    pub fn new(max_bytes: u64, policy: Policy, fsync: Fsync) -> Self {
        let segment_bytes = (max_bytes / 16).clamp(64 * 1024, 16 * 1024 * 1024);
        Self { max_bytes, segment_bytes, max_age: None, min_free_bytes: 0, policy, fsync }
    }
}

/// Why samples were not accepted.
#[derive(Debug)]
pub enum AppendError {
    /// No room for this reason, and the policy is [`Policy::DropNew`] or nothing older is left to drop.
    Full(DropReason),
    /// No room, and the policy is [`Policy::Block`].
    Busy,
    /// The disk failed.
    Io(io::Error),
    /// The log is closed.
    Closed,
}

impl fmt::Display for AppendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full(reason) => write!(f, "the buffer is full ({})", reason.name()),
            Self::Busy => f.write_str("the buffer is full and waits for its destinations"),
            Self::Io(e) => write!(f, "the buffer cannot be written: {e}"),
            Self::Closed => f.write_str("the buffer is closed"),
        }
    }
}

/// The log. See the module.
pub struct Log {
    files: Arc<dyn Files>,
    table: Arc<SeriesTable>,
    id: u64,
    writer: Mutex<Writer>,
    state: Mutex<State>,
    /// Held while cursors are written: of each one's two files the older is written over.
    saving: Mutex<()>,
    /// Told when samples were appended or the log was closed.
    grown: Condvar,
}

struct State {
    /// By number.
    segments: BTreeMap<u64, Segment>,
    /// By destination.
    cursors: BTreeMap<String, Progress>,
    /// Sequence number of the next sample to be accepted.
    next: u64,
    closed: bool,
    stats: Stats,
}

#[derive(Debug, Clone, Copy)]
struct Segment {
    /// Samples `first..end` are or were in it.
    first: u64,
    end: u64,
    /// What it takes on the disk.
    bytes: u64,
    /// Records stand before this offset.
    data_end: u64,
    /// Nothing is appended to it any more.
    sealed: bool,
    /// When it was begun and when something was last accepted into it.
    oldest_ms: i64,
    newest_ms: i64,
}

#[derive(Debug, Default)]
struct Progress {
    /// Every sample before this one was acknowledged, or dropped and counted.
    sequence: u64,
    /// Being sent: dropped only when the lane gives it up.
    in_flight: Option<Range<u64>>,
    /// Samples before this one are not in the log any more.
    evicted: u64,
    /// What the newest file says.
    saved: u64,
    generation: u64,
}

impl Log {
    /// Octets that all segments take.
    fn bytes(state: &State) -> u64 {
        state.segments.values().map(|segment| segment.bytes).sum()
    }

    /// Chosen when the log was made.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Samples `range` are being sent: a limit does not count them as dropped unless they are given up.
    pub fn begin(&self, destination: &str, range: Range<u64>) {
        if let Some(progress) = self.lock().cursors.get_mut(destination) {
            progress.in_flight = Some(range);
        }
    }

    /// What was being sent is given up for now: what is not in the log any more is thereby dropped.
    pub fn release(&self, destination: &str, reason: DropReason) {
        let state = &mut *self.lock();
        if let Some(progress) = state.cursors.get_mut(destination)
            && let Some(range) = progress.in_flight.take()
        {
            let lost = range.end.min(progress.evicted).saturating_sub(range.start);
            state.stats.drop_samples(destination, reason, lost);
        }
    }

    /// The receiver has taken every sample before `sequence` (or refused it for good): it is never read again for
    /// this destination, and segments that everybody is done with are removed.
    pub fn acknowledge(&self, destination: &str, sequence: u64) {
        let done = {
            let state = &mut *self.lock();
            if let Some(progress) = state.cursors.get_mut(destination) {
                progress.sequence = progress.sequence.max(sequence);
                progress.in_flight = None;
            }
            Self::take_finished(state)
        };
        self.remove_passed(&done);
    }

    /// Takes out the sealed segments that no destination needs any more.
    fn take_finished(state: &mut State) -> Vec<u64> {
        let needed = state.cursors.values().map(|progress| progress.sequence).min().unwrap_or(u64::MAX);
        let done: Vec<u64> = state
            .segments
            .iter()
            .take_while(|(_, segment)| segment.sealed && segment.end <= needed)
            .map(|(&number, _)| number)
            .collect();
        for number in &done {
            state.segments.remove(number);
        }
        done
    }

    /// Removes segments that were taken out of the state. The cursors become durable first; failing that (a full disk,
    /// which this makes room on) a crash before the next try may use numbers twice.
    fn remove_passed(&self, numbers: &[u64]) {
        if numbers.is_empty() {
            return;
        }
        if let Err(e) = self.save_cursors() {
            log::debug!("buffer cursors cannot be saved before a segment is removed: {e}");
        }
        self.remove_segments(numbers);
    }

    fn remove_segments(&self, numbers: &[u64]) {
        for &number in numbers {
            // Left over, it is found at the next start and every cursor has passed it.
            if let Err(e) = self.files.remove(&segment_name(number)) {
                log::warn!("buffer segment {number} cannot be removed: {e}");
            }
        }
    }

    /// Sets who reads the log. A new one begins with the oldest sample; of one that is gone everything it had not got
    /// is counted as dropped.
    pub fn set_destinations(&self, names: &[String]) -> io::Result<()> {
        let gone: Vec<String> = {
            let state = &mut *self.lock();
            let oldest = state.segments.values().next().map_or(state.next, |segment| segment.first);
            let gone: Vec<String> = state.cursors.keys().filter(|name| !names.contains(name)).cloned().collect();
            for name in &gone {
                if let Some(progress) = state.cursors.remove(name) {
                    let left = state.next.saturating_sub(progress.sequence);
                    state.stats.drop_samples(name, DropReason::DestinationRemoved, left);
                }
            }
            for name in names {
                state.cursors.entry(name.clone()).or_insert_with(|| Progress {
                    sequence: oldest,
                    evicted: oldest,
                    ..Progress::default()
                });
            }
            gone
        };
        for name in gone {
            cursor::forget(&*self.files, &name)?;
        }
        let done = Self::take_finished(&mut self.lock());
        self.remove_passed(&done);
        Ok(())
    }

    /// Makes the cursors durable that have moved.
    pub fn save_cursors(&self) -> io::Result<()> {
        let _saving = self.saving.lock().unwrap_or_else(PoisonError::into_inner);
        let moved: Vec<(String, cursor::Cursor)> = self
            .lock()
            .cursors
            .iter()
            .filter(|(_, progress)| progress.saved != progress.sequence)
            .map(|(name, progress)| {
                // One that cannot be written is tried again in the same file: the other one is good.
                let (generation, sequence) = (progress.generation + 1, progress.sequence);
                (name.clone(), cursor::Cursor { log: self.id, generation, sequence })
            })
            .collect();
        for (name, cursor) in moved {
            cursor::save(&*self.files, &name, &cursor)?;
            if let Some(progress) = self.lock().cursors.get_mut(&name) {
                (progress.saved, progress.generation) = (cursor.sequence, cursor.generation);
            }
        }
        Ok(())
    }

    /// The receiver will never take the samples before `sequence` that it has not acknowledged, `count` of them: they
    /// are counted as dropped.
    pub fn refuse(&self, destination: &str, sequence: u64, count: u64) {
        self.lock().stats.drop_samples(destination, DropReason::Rejected, count);
        self.acknowledge(destination, sequence);
    }

    /// Waits until a sample with this sequence number or a later one was accepted, or the log was closed, or the time
    /// is over, or `stop` says so (looked at when [`Log::wake`] is called). Whether there is one.
    pub fn wait(&self, sequence: u64, time: Duration, stop: impl Fn() -> bool) -> bool {
        let state = self.lock();
        let waiting = |state: &mut State| state.next <= sequence && !state.closed && !stop();
        let (state, _) = self.grown.wait_timeout_while(state, time, waiting).unwrap_or_else(PoisonError::into_inner);
        state.next > sequence
    }

    /// Lets everybody who waits look at their `stop`.
    pub fn wake(&self) {
        drop(self.lock());
        self.grown.notify_all();
    }

    /// Ends every wait. Nothing is accepted any more; reading and acknowledging go on.
    pub fn close(&self) {
        self.lock().closed = true;
        self.grown.notify_all();
    }

    /// What there is to tell.
    pub fn stats(&self) -> Stats {
        let state = self.lock();
        let mut stats = state.stats.clone();
        stats.bytes = Self::bytes(&state);
        stats.segments = state.segments.len() as u64;
        stats.next_sequence = state.next;
        for (name, progress) in &state.cursors {
            let pending = state.next.saturating_sub(progress.sequence);
            let holds = |segment: &&Segment| segment.end > progress.sequence;
            let since = (pending > 0).then(|| state.segments.values().find(holds)).flatten();
            stats.pending.insert(name.clone(), (pending, since.map(|segment| segment.oldest_ms)));
        }
        stats
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is finished before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The file of a segment.
pub fn segment_name(number: u64) -> String {
    format!("{number:016x}.seg")
}

/// The segment that a file of this name is.
pub fn segment_number(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".seg")?;
    if digits.len() == 16 { u64::from_str_radix(digits, 16).ok() } else { None }
}

/// Milliseconds since 1970-01-01 UTC.
pub fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64)
}
