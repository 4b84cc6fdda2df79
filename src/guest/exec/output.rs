//! One output stream of a program: from its pipe to a link, within the receiver's credit.
//!
//! Offsets count octets since the program started. What was sent and not yet credited is held, so that
//! another link can take the stream over without loss. Nothing is read that may not be sent at
//! once: a receiver that stops holds the program by its pipe, not memory.
//!
//! ```text
//! 0 ......... base ........... sent ........ end ....... granted
//!   credited       held, sent       held          may yet be read and sent
//! ```

use std::cell::Cell;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::AsRawFd;
use std::rc::Rc;

use crate::guest::connection::QUEUE_HIGH;
use crate::wire::{FRAME, INITIAL_CREDIT, Link, Message};

/// Octets that all streams together hold for links that may come; beyond it a stream gives up what it has sent.
const HELD_MAX: usize = 8 * 1024 * 1024;

/// What all streams hold together.
pub(crate) type Held = Rc<Cell<usize>>;

/// An output stream.
#[derive(Debug)]
pub(crate) struct Output {
    channel: &'static str,
    source: Option<File>,
    /// The descriptor was announced as readable and has not said `EAGAIN` since.
    pub readable: bool,
    held: VecDeque<u8>,
    held_by_all: Held,
    base: u64,
    sent: u64,
    granted: u64,
    /// Where the stream ends although its pipe is still open.
    limit: Option<u64>,
    end_sent: bool,
    /// More may come although there is nothing to read from: not yet, or by `append`.
    more: bool,
}

impl Output {
    /// A stream from a non-blocking descriptor. `None`: a stream that has ended, of which no link hears.
    pub(super) fn new(channel: &'static str, source: Option<File>, held_by_all: Held) -> Self {
        Self {
            channel,
            end_sent: source.is_none(),
            source,
            readable: false,
            held: VecDeque::new(),
            held_by_all,
            base: 0,
            sent: 0,
            granted: INITIAL_CREDIT,
            limit: None,
            more: false,
        }
    }

    /// A stream whose source comes later.
    pub(super) fn later(channel: &'static str, held_by_all: Held) -> Self {
        let mut output = Self::new(channel, None, held_by_all);
        (output.end_sent, output.more) = (false, true);
        output
    }

    /// The source of a stream that was made by `later`.
    pub(crate) fn open(&mut self, source: File) {
        // What is in the pipe already is announced too, but this is sooner.
        (self.source, self.readable) = (Some(source), true);
    }

    /// Adds octets behind all that was read.
    pub(crate) fn append(&mut self, octets: &[u8]) {
        self.held.extend(octets);
        self.held_by_all.set(self.held_by_all.get() + octets.len());
    }

    /// Nothing is appended any more.
    pub(crate) fn finish(&mut self) {
        self.more = false;
    }

    /// Reads what is there and drops it: nobody will ask for it.
    pub(crate) fn discard(&mut self, scratch: &mut [u8]) {
        let Some(source) = &mut self.source else { return };
        // Somebody may write without end: the next event brings us here again.
        for _ in 0..16 {
            match source.read(scratch) {
                Ok(0) => break,
                Ok(_) => {}
                Err(_) => return,
            }
        }
    }

    /// The channel's name.
    pub(super) fn channel(&self) -> &'static str {
        self.channel
    }

    /// Offset behind the last octet that was read.
    pub(super) fn offset(&self) -> u64 {
        self.base + self.held.len() as u64
    }

    /// Whether the program can write no more.
    pub(crate) fn is_closed(&self) -> bool {
        self.source.is_none()
    }

    /// Whether the link was told that this is all.
    pub(super) fn is_done(&self) -> bool {
        self.end_sent
    }

    /// The receiver has taken that many octets and allows as many more.
    pub(super) fn credit(&mut self, octets: u64) {
        self.granted = self.granted.saturating_add(octets);
        let taken = (self.granted - INITIAL_CREDIT).min(self.sent);
        self.forget_before(taken);
    }

    /// What is read of it does not count any more.
    pub(crate) fn drop_source(&mut self) {
        self.source = None;
    }

    /// Starts over on another link, at `offset` or as near to it as what is held allows; gives the offset.
    pub(super) fn rewind(&mut self, offset: u64) -> u64 {
        let start = offset.clamp(self.base, self.offset());
        self.forget_before(start);
        self.sent = start;
        self.granted = start.saturating_add(INITIAL_CREDIT);
        // A terminal's stderr, which never was a stream, stays unheard of.
        self.end_sent = self.channel.is_empty();
        start
    }

    /// Takes what is in the pipe now and no more: the program has ended, and others hold its pipe.
    pub(crate) fn cut(&mut self) {
        if let (None, Some(source)) = (self.limit, &self.source) {
            let mut waiting: libc::c_int = 0;
            // SAFETY: the descriptor is open and FIONREAD writes one int.
            let asked = unsafe { libc::ioctl(source.as_raw_fd(), libc::FIONREAD, &mut waiting) };
            let waiting = if asked == 0 { u64::try_from(waiting).unwrap_or(0) } else { 0 };
            self.limit = Some(self.offset().saturating_add(waiting));
        }
        self.close_at_limit();
    }

    /// Sends what may be sent. `true` when it did something.
    pub(super) fn pump(&mut self, link: &mut Link<File>, tag: &str, scratch: &mut [u8]) -> bool {
        let mut progress = false;
        while link.queued() < QUEUE_HIGH && self.sent < self.granted {
            if !self.send_held(link, tag) && !self.read(scratch) {
                break;
            }
            progress = true;
        }
        if self.source.is_none() && !self.more && self.sent == self.offset() && !self.end_sent {
            link.send(&Message::end(tag, self.channel));
            self.end_sent = true;
            progress = true;
        }
        progress
    }

    /// Sends a frame of what was read and not yet sent.
    fn send_held(&mut self, link: &mut Link<File>, tag: &str) -> bool {
        let skip = usize::try_from(self.sent - self.base).unwrap_or(usize::MAX);
        let (first, second) = self.held.as_slices();
        let unsent = match first.get(skip..) {
            Some(rest) if !rest.is_empty() => rest,
            _ => second.get(skip.saturating_sub(first.len())..).unwrap_or_default(),
        };
        let allowed = usize::try_from(self.granted - self.sent).unwrap_or(usize::MAX);
        let frame = unsent.get(..unsent.len().min(FRAME).min(allowed)).unwrap_or_default();
        if frame.is_empty() {
            return false;
        }
        link.send_data(tag, self.channel, frame);
        self.sent += frame.len() as u64;
        if self.held_by_all.get() > HELD_MAX {
            self.forget_before(self.sent);
        }
        true
    }

    /// Reads once. `true` when there is something to send.
    fn read(&mut self, scratch: &mut [u8]) -> bool {
        let room =
            (self.granted - self.sent).min(self.limit.map_or(u64::MAX, |limit| limit.saturating_sub(self.offset())));
        let room = usize::try_from(room).unwrap_or(usize::MAX).min(scratch.len());
        let (Some(source), true, Some(buffer)) = (&mut self.source, self.readable, scratch.get_mut(..room)) else {
            return false;
        };
        loop {
            match source.read(buffer) {
                Ok(0) => self.source = None,
                Ok(n) => {
                    self.held.extend(buffer.get(..n).unwrap_or_default());
                    self.held_by_all.set(self.held_by_all.get() + n);
                    self.close_at_limit();
                    return true;
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    self.readable = false;
                    // The pipe held less than was announced: someone else read from it.
                    if self.limit.is_some() {
                        self.source = None;
                    }
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                // EIO: a terminal that no process has open any more.
                Err(_) => self.source = None,
            }
            return false;
        }
    }

    fn close_at_limit(&mut self) {
        if self.limit.is_some_and(|limit| self.offset() >= limit) {
            self.source = None;
        }
    }

    fn forget_before(&mut self, offset: u64) {
        let count = usize::try_from(offset.saturating_sub(self.base)).unwrap_or(usize::MAX).min(self.held.len());
        if count == self.held.len() {
            self.held.clear();
            // A busy stream empties all the time: only what is idle gives its memory back.
            if self.source.is_none() {
                self.held = VecDeque::new();
            }
        } else {
            self.held.drain(..count);
        }
        self.base += count as u64;
        self.held_by_all.set(self.held_by_all.get().saturating_sub(count));
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        self.held_by_all.set(self.held_by_all.get().saturating_sub(self.held.len()));
    }
}
