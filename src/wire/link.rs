//! A non-blocking stream that carries messages: reads into a `Decoder`, writes from a bounded queue.

use std::io::{self, ErrorKind, Read, Write};

use super::decode::{Decoded, Decoder};
use super::message::Message;

/// What a `Link` found when it read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filled {
    /// The stream has nothing more for now.
    Drained,
    /// There may be more: handle what came first, then read again.
    More,
    /// The peer closed its side.
    Closed,
}

/// One end of a message stream over a non-blocking descriptor.
#[derive(Debug)]
pub struct Link<S> {
    stream: S,
    decoder: Decoder,
    out: Vec<u8>,
    written: usize,
    /// The last read gave as much as a short one can.
    streams: bool,
}

/// What is read at once, in octets: first, and while that is not enough.
const FEW: usize = 2 << 10;
const MUCH: usize = 64 << 10;

impl<S: Read + Write> Link<S> {
    /// Wraps a non-blocking stream.
    pub fn new(stream: S) -> Self {
        Self { stream, decoder: Decoder::new(), out: Vec::new(), written: 0, streams: false }
    }

    /// The stream itself, to register or shut down.
    pub fn stream(&mut self) -> &mut S {
        &mut self.stream
    }

    /// The stream itself, to look at.
    pub fn stream_ref(&self) -> &S {
        &self.stream
    }

    /// Takes the link apart for a stream that goes on without messages: the stream, octets that were read and
    /// belong to no message yet, octets that wait to be written.
    pub fn into_parts(mut self) -> (S, Vec<u8>, Vec<u8>) {
        let unsent = self.out.split_off(self.written);
        (self.stream, self.decoder.into_rest(), unsent)
    }

    /// Reads once, at most 64 KiB. Call `next` until `None` after each; repeat while this gives `More`
    /// (descriptors are registered edge-triggered).
    pub fn fill(&mut self) -> io::Result<Filled> {
        // A request or an answer is short, and what it is read to is zeroed first: each page that this touches is one more
        // that a clone has for itself.
        if self.streams { self.fill_much() } else { self.fill_by(&mut [0; FEW]) }
    }

    /// Apart, so that others have no such stack.
    #[inline(never)]
    fn fill_much(&mut self) -> io::Result<Filled> {
        self.fill_by(&mut [0; MUCH])
    }

    fn fill_by(&mut self, chunk: &mut [u8]) -> io::Result<Filled> {
        loop {
            match self.stream.read(chunk) {
                Ok(0) => return Ok(Filled::Closed),
                Ok(n) => {
                    self.streams = n >= FEW;
                    self.decoder.push(&chunk[..n]);
                    return Ok(Filled::More);
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(Filled::Drained),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// The next whole message that was read.
    #[allow(clippy::should_implement_trait)] // not an iterator: `None` is not the end
    pub fn next(&mut self) -> Option<Decoded> {
        self.decoder.next()
    }

    /// Queues a message; `flush` writes it.
    pub fn send(&mut self, message: &Message) {
        message.encode(&mut self.out);
    }

    /// Queues a `data` frame without a copy of its payload in a message.
    pub fn send_data(&mut self, tag: &str, channel: &str, payload: &[u8]) {
        super::encode::data(&mut self.out, tag, channel, payload);
    }

    /// Octets queued and not yet written: what a caller bounds before it sends more.
    pub fn queued(&self) -> usize {
        self.out.len() - self.written
    }

    /// Writes what the stream takes now. `Ok(true)` when the queue is empty, `Ok(false)` when the stream is full.
    pub fn flush(&mut self) -> io::Result<bool> {
        while self.written < self.out.len() {
            match self.stream.write(&self.out[self.written..]) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => self.written += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    // Give back what was written once it is most of the buffer, so that it cannot grow for ever.
                    if self.written > self.out.len() / 2 {
                        self.out.drain(..self.written);
                        self.written = 0;
                    }
                    return Ok(false);
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        self.out.clear();
        self.written = 0;
        self.out.shrink_to(64 * 1024);
        Ok(true)
    }
}
