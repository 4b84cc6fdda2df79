//! A program's stdin: from a link to its pipe, with credit given back as the program reads.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{ErrorKind, Write};

use crate::wire::{Code, Error, INITIAL_CREDIT, Link, Message};

/// Credit is given back in portions of this many octets.
const CREDIT_PORTION: u64 = 64 * 1024;
/// Small chunks are joined up to this size, so that a chunk's own cost does not count.
const CHUNK: usize = 16 * 1024;
/// Ctrl-D: what ends the input of a terminal.
const END_OF_INPUT: u8 = 4;

/// A program's stdin.
#[derive(Debug)]
pub(crate) struct Input {
    sink: Option<File>,
    /// The descriptor was announced as writable and has not said `EAGAIN` since.
    pub writable: bool,
    terminal: bool,
    queue: VecDeque<Vec<u8>>,
    /// Octets of the first chunk that were written.
    written: usize,
    /// Octets in `queue` that were not written.
    queued: usize,
    received: u64,
    granted: u64,
    /// Octets that were taken and for which no credit was given back yet.
    owed: u64,
    ended: bool,
    last: Option<u8>,
}

impl Input {
    /// A stdin that writes to a non-blocking descriptor. `None`: the program has /dev/null.
    pub(super) fn new(sink: Option<File>, terminal: bool) -> Self {
        Self {
            ended: sink.is_none(),
            sink,
            writable: true,
            terminal,
            queue: VecDeque::new(),
            written: 0,
            queued: 0,
            received: 0,
            granted: INITIAL_CREDIT,
            owed: 0,
            last: None,
        }
    }

    /// Octets that were received so far.
    pub(super) fn offset(&self) -> u64 {
        self.received
    }

    /// Whether more may be sent.
    pub(super) fn is_open(&self) -> bool {
        !self.ended
    }

    /// Takes a chunk.
    pub(crate) fn push(&mut self, chunk: Vec<u8>) -> Result<(), Error> {
        if self.ended {
            return Err(Error::new(Code::BadState, "stdin is not open: exec.start without stdin=true, or ended"));
        }
        self.received += chunk.len() as u64;
        if self.received > self.granted {
            return Err(Error::new(
                Code::CreditExceeded,
                format!("stdin has {} octets, credit is for {}", self.received, self.granted),
            )
            .with("channel", "stdin"));
        }
        let Some(&last) = chunk.last() else { return Ok(()) };
        self.last = Some(last);
        if self.sink.is_none() {
            self.owed += chunk.len() as u64;
            return Ok(());
        }
        self.queued += chunk.len();
        match self.queue.back_mut() {
            Some(back) if back.len() + chunk.len() <= CHUNK => back.extend_from_slice(&chunk),
            _ => self.queue.push_back(chunk),
        }
        Ok(())
    }

    /// Nothing more comes.
    pub(crate) fn end(&mut self) {
        if self.ended {
            return;
        }
        self.ended = true;
        if self.terminal && self.sink.is_some() {
            // After an unfinished line the first Ctrl-D only hands that line over.
            let count = if self.last.is_none_or(|octet| octet == b'\n') { 1 } else { 2 };
            self.queued += count;
            self.queue.push_back(vec![END_OF_INPUT; count]);
        }
    }

    /// The program has gone: what is queued and what comes is dropped.
    pub(super) fn close(&mut self) {
        self.sink = None;
        self.writable = false;
        self.queue = VecDeque::new();
        self.owed += self.queued as u64;
        (self.queued, self.written) = (0, 0);
    }

    /// A new link takes over. Gives how many octets it may send from `offset()` on: with what is still queued, as many as ever
    /// wait for a program.
    pub(super) fn renew_credit(&mut self) -> u64 {
        let credit = INITIAL_CREDIT.saturating_sub(self.queued as u64);
        self.granted = self.received.saturating_add(credit);
        self.owed = 0;
        credit
    }

    /// Writes what the pipe takes. `true` when it did something.
    pub(super) fn pump(&mut self) -> bool {
        let mut progress = false;
        while let (true, Some(sink), Some(chunk)) = (self.writable, &mut self.sink, self.queue.front()) {
            match sink.write(chunk.get(self.written..).unwrap_or_default()) {
                Ok(n) => {
                    self.written += n;
                    self.queued = self.queued.saturating_sub(n);
                    self.owed += n as u64;
                    if self.written >= chunk.len() {
                        self.queue.pop_front();
                        self.written = 0;
                    }
                    progress = true;
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.writable = false,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                // The program closed its stdin.
                Err(_) => self.close(),
            }
        }
        // A terminal stays open: its other half is the output.
        if self.ended && self.queue.is_empty() && self.sink.is_some() && !self.terminal {
            self.sink = None;
            progress = true;
        }
        progress
    }

    /// Gives credit back once there is a portion of it.
    pub(super) fn give_credit(&mut self, link: &mut Link<File>, tag: &str) {
        if self.owed >= CREDIT_PORTION && !self.ended {
            link.send(&Message::credit(tag, "stdin", self.owed));
            self.granted = self.granted.saturating_add(self.owed);
            self.owed = 0;
        }
    }
}
