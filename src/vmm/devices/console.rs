//! The log of a guest's console: a file that stays small, written by a thread of its own, so that neither a guest that
//! prints without end nor a disk that does not answer holds up anybody else.
//!
//! The file is a regular file opened for reading and appending (`O_RDWR | O_APPEND`). It never grows over
//! `LOG_BYTES`: when a write would make it so, the file is cut to zero and begins anew with its own last
//! `KEEP_BYTES`. A reader that follows it sees the file shrink and starts again at 0. Text is written by lines;
//! an unfinished line follows after `FLUSH_AFTER`.
//!
//! What the guest prints waits in `PENDING_BYTES` for the thread, and the thread writes no more than `LIMITS`: beyond
//! that octets are dropped, and the log says how many.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::rate::{Limiter, Limits, Rate};
use crate::vmm::jail::{self, lists::Kind};

/// Longest log file, in octets.
pub const LOG_BYTES: u64 = 1 << 20;
/// What stays of it when it is full, in octets.
pub const KEEP_BYTES: u64 = 256 << 10;
/// How long an unfinished line waits.
pub const FLUSH_AFTER: Duration = Duration::from_millis(100);
/// Octets that wait to be written at most.
pub const PENDING_BYTES: usize = 64 << 10;
/// A whole log at once, and then what a verbose kernel prints at its busiest.
const LIMITS: Limits = Limits { bytes: Some(Rate { per_second: 256 << 10, burst: 1 << 20 }), operations: None };
/// A line longer than this is written in pieces.
const LINE: usize = 1024;
/// Stack of the thread, in octets: what it writes is on the heap.
const STACK: usize = 64 << 10;

/// What the guest printed and the thread has not taken yet.
#[derive(Default)]
struct Pending {
    octets: Vec<u8>,
    /// Octets dropped since the thread last said so.
    dropped: u64,
    /// There is the end of a line, or as much as a long one.
    line: bool,
    /// Somebody waits for everything to be written.
    flushing: bool,
    /// The thread is to end.
    closing: bool,
    /// The thread writes.
    writing: bool,
}

#[derive(Default)]
struct Shared {
    pending: Mutex<Pending>,
    /// The thread waits for this.
    something: Condvar,
    /// Who flushes waits for this.
    written: Condvar,
    dropped: AtomicU64,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The log. Dropping it ends its thread, which writes what is left; nobody waits for that.
pub struct ConsoleLog {
    shared: Arc<Shared>,
}

impl ConsoleLog {
    /// A log in `file`. Fails when the host has no threads left or the file cannot be measured.
    pub fn start(file: File) -> io::Result<Self> {
        let len = file.metadata()?.len();
        let shared = Arc::new(Shared::default());
        let theirs = shared.clone();
        let mut log = LogFile { file, len, failures: 0 };
        jail::spawn(Kind::Log, "console".into(), STACK, move || serve(&theirs, &mut log))?;
        Ok(Self { shared })
    }

    /// Takes an octet of the guest's. Never waits for the file.
    pub fn print(&self, octet: u8) {
        let mut pending = self.shared.lock();
        if pending.octets.len() >= PENDING_BYTES {
            pending.dropped += 1;
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        pending.octets.push(octet);
        let line = octet == b'\n' || pending.octets.len() >= LINE;
        // The first octet starts the wait for the rest of its line, the line's end ends it.
        if pending.octets.len() == 1 || (line && !pending.line) {
            pending.line |= line;
            self.shared.something.notify_one();
        }
    }

    /// Octets that were dropped so far because they came too fast.
    pub fn dropped(&self) -> u64 {
        self.shared.dropped.load(Ordering::Relaxed)
    }

    /// Waits until everything printed so far is in the file, but no longer than that.
    pub fn flush(&self, wait: Duration) {
        let mut pending = self.shared.lock();
        pending.flushing = true;
        self.shared.something.notify_one();
        let busy = |pending: &mut Pending| pending.writing || !pending.octets.is_empty() || pending.dropped > 0;
        let waited = self.shared.written.wait_timeout_while(pending, wait, busy);
        waited.unwrap_or_else(PoisonError::into_inner).0.flushing = false;
    }
}

impl Drop for ConsoleLog {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.something.notify_one();
    }
}

/// The thread.
fn serve(shared: &Shared, log: &mut LogFile) {
    let mut limiter = Limiter::new(LIMITS, Instant::now());
    let mut text = Vec::new();
    while let Some(dropped) = next(shared, &mut limiter, &mut text) {
        if dropped > 0 {
            let newline = if text.last() == Some(&b'\n') { "" } else { "\n" };
            text.extend_from_slice(format!("{newline}[{dropped} octets came too fast and are left out]\n").as_bytes());
        }
        log.write(&text);
        limiter.take(text.len() as u64, 1);
        text.clear();
        shared.lock().writing = false;
        shared.written.notify_all();
    }
}

/// Waits for text that may be written now, and takes all of it with the number of octets dropped after it. `None`: the
/// log has ended.
fn next(shared: &Shared, limiter: &mut Limiter, text: &mut Vec<u8>) -> Option<u64> {
    let mut pending = shared.lock();
    let mut unfinished_since = None;
    loop {
        let now = Instant::now();
        let hurry = pending.flushing || pending.closing;
        let wait = if pending.octets.is_empty() && pending.dropped == 0 {
            if pending.closing {
                return None;
            }
            unfinished_since = None;
            None
        } else if hurry {
            Some(Duration::ZERO)
        } else if let Some(wait) = limiter.wait(now) {
            Some(wait)
        } else if pending.line {
            Some(Duration::ZERO)
        } else {
            let since = *unfinished_since.get_or_insert(now);
            Some((since + FLUSH_AFTER).saturating_duration_since(now))
        };
        pending = match wait {
            Some(Duration::ZERO) => {
                std::mem::swap(&mut pending.octets, text);
                pending.line = false;
                pending.writing = true;
                return Some(std::mem::take(&mut pending.dropped));
            }
            Some(wait) => shared.something.wait_timeout(pending, wait).unwrap_or_else(PoisonError::into_inner).0,
            None => shared.something.wait(pending).unwrap_or_else(PoisonError::into_inner),
        };
    }
}

/// The file with its bound.
struct LogFile {
    file: File,
    len: u64,
    failures: u64,
}

impl LogFile {
    fn write(&mut self, text: &[u8]) {
        let result = self.make_room(text.len() as u64).and_then(|()| self.file.write_all(text));
        match result {
            Ok(()) => self.len += text.len() as u64,
            // The log is a best effort: a full disk must not stop the guest. One line tells of it.
            Err(error) => {
                if self.failures == 0 {
                    log::warn!("serial: the log file cannot be written: {error}");
                }
                self.failures += 1;
            }
        }
    }

    fn make_room(&mut self, more: u64) -> io::Result<()> {
        if self.len + more <= LOG_BYTES {
            return Ok(());
        }
        let mut keep = vec![0; KEEP_BYTES.min(self.len) as usize];
        // Without the right to read, nothing is kept.
        let from = self.len - keep.len() as u64;
        if self.file.read_exact_at(&mut keep, from).is_err() {
            keep.clear();
        }
        // Not from the middle of a line.
        let start = keep.iter().position(|&octet| octet == b'\n').map_or(0, |at| at + 1);
        self.file.set_len(0)?;
        self.len = 0;
        self.file.write_all(&keep[start..])?;
        self.len = (keep.len() - start) as u64;
        Ok(())
    }
}
