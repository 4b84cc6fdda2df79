//! Contents that pass between a client and a thread of the node that reads or writes them like a file: neither is waited
//! for by the loop, and no more is held than credit and a short queue allow.

use std::fmt;
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, channel, sync_channel};

use crate::sandbox::exec::Sink;
use crate::sandbox::flow::{Gate, QUEUE_HIGH};
use crate::wire::{Code, Error, FRAME, Fields, INITIAL_CREDIT, Message};

/// The channel of both directions.
pub(super) const CHANNEL: &str = "content";
/// Frames that wait for a client.
const QUEUE: usize = 16;

/// Tells the loop that something moved. Called on the thread.
type Moved = Box<dyn Fn() + Send>;

/// What a client sends, on the loop's side.
#[derive(Debug)]
pub struct Upload {
    up: Gate,
    to: Sender<Piece>,
    /// Octets that the thread has not taken yet.
    queued: Arc<AtomicUsize>,
    bytes: u64,
    max: u64,
}

#[derive(Debug)]
enum Piece {
    Octets(Vec<u8>),
    End,
}

/// What a client sends, as the thread reads it. A client that is gone before the end is an error of kind
/// `ConnectionAborted`.
pub(super) struct Feed {
    from: Receiver<Piece>,
    queued: Arc<AtomicUsize>,
    moved: Moved,
    piece: Vec<u8>,
    at: usize,
    ended: bool,
}

impl fmt::Debug for Feed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Feed").field("ended", &self.ended).finish_non_exhaustive()
    }
}

/// A way from a client to a thread, for `max` octets at most. `moved` is called when the client may get more credit.
pub(super) fn upload(max: u64, moved: impl Fn() + Send + 'static) -> (Upload, Feed) {
    let (to, from) = channel();
    let queued = Arc::new(AtomicUsize::new(0));
    let mut up = Gate::default();
    // One more, so that what is too long is seen.
    up.allow(max.saturating_add(1));
    let feed =
        Feed { from, queued: Arc::clone(&queued), moved: Box::new(moved), piece: Vec::new(), at: 0, ended: false };
    (Upload { up, to, queued, bytes: 0, max }, feed)
}

impl Upload {
    /// Takes octets that the client sent.
    ///
    /// # Errors
    /// `CREDIT_EXCEEDED`, `OUT_OF_RANGE`.
    pub fn take(&mut self, octets: Vec<u8>) -> Result<(), Error> {
        self.up.take(CHANNEL, octets.len())?;
        self.bytes = self.bytes.saturating_add(octets.len() as u64);
        if self.bytes > self.max {
            let message = format!("what was sent is longer than {} octets", self.max);
            return Err(Error::new(Code::OutOfRange, message).with("max", self.max));
        }
        self.queued.fetch_add(octets.len(), Ordering::Relaxed);
        // A thread that has failed says so by itself.
        let _ = self.to.send(Piece::Octets(octets));
        Ok(())
    }

    /// The client has sent all.
    pub fn end(&mut self) {
        let _ = self.to.send(Piece::End);
    }

    /// Credit for the client, as far as what it sent was taken.
    pub fn grant(&mut self) -> Option<u64> {
        self.up.grant(self.queued.load(Ordering::Relaxed))
    }
}

impl Read for Feed {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.at == self.piece.len() {
            if !self.piece.is_empty() {
                self.queued.fetch_sub(self.piece.len(), Ordering::Relaxed);
                (self.moved)();
                (self.piece, self.at) = (Vec::new(), 0);
            }
            if self.ended {
                return Ok(0);
            }
            match self.from.recv() {
                Ok(Piece::Octets(octets)) => self.piece = octets,
                Ok(Piece::End) => self.ended = true,
                Err(_) => return Err(io::ErrorKind::ConnectionAborted.into()),
            }
        }
        let len = into.len().min(self.piece.len() - self.at);
        into[..len].copy_from_slice(&self.piece[self.at..self.at + len]);
        self.at += len;
        Ok(len)
    }
}

/// What a client gets, on the loop's side.
#[derive(Debug)]
pub struct Download {
    from: Receiver<Part>,
    credit: u64,
    /// What is still to be sent of the last piece.
    rest: Vec<u8>,
    bytes: u64,
}

#[derive(Debug)]
enum Part {
    Octets(Vec<u8>),
    End(Result<Fields, Error>),
}

/// What a client gets, as the thread writes it. A client that is gone is an error of kind `BrokenPipe`.
pub(super) struct Outlet {
    to: SyncSender<Part>,
    moved: Moved,
}

impl fmt::Debug for Outlet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outlet").finish_non_exhaustive()
    }
}

/// A way from a thread to a client. `moved` is called when there is something for it.
pub(super) fn download(moved: impl Fn() + Send + 'static) -> (Outlet, Download) {
    let (to, from) = sync_channel(QUEUE);
    let outlet = Outlet { to, moved: Box::new(moved) };
    (outlet, Download { from, credit: INITIAL_CREDIT, rest: Vec::new(), bytes: 0 })
}

impl Outlet {
    /// All was written, or cannot be: the request's answer.
    pub fn end(self, result: Result<Fields, Error>) {
        if self.to.send(Part::End(result)).is_ok() {
            (self.moved)();
        }
    }
}

impl Write for Outlet {
    fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
        let len = octets.len().min(FRAME);
        let sent = self.to.send(Part::Octets(octets[..len].to_vec()));
        sent.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        (self.moved)();
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Download {
    /// The client allows more octets.
    pub fn credit(&mut self, octets: u64) {
        self.credit = self.credit.saturating_add(octets);
    }

    /// Sends what is there and allowed. `true` when the request was answered.
    pub fn pump(&mut self, tag: &str, sink: &mut dyn Sink) -> bool {
        loop {
            if self.rest.is_empty() {
                let lost = || Part::End(Err(Error::new(Code::Internal, "whoever wrote it has ended")));
                match self.from.try_recv().or_else(|e| if e == TryRecvError::Empty { Err(e) } else { Ok(lost()) }) {
                    Ok(Part::Octets(octets)) => self.rest = octets,
                    Ok(Part::End(Ok(fields))) => {
                        sink.send(&Message::end(tag, CHANNEL));
                        sink.send(&Message::ok(tag, fields.with("size", self.bytes)));
                        return true;
                    }
                    Ok(Part::End(Err(error))) => {
                        sink.send(&Message::err(tag, error));
                        return true;
                    }
                    Err(_) => return false,
                }
            }
            let len = usize::try_from(self.credit).unwrap_or(FRAME).min(self.rest.len());
            if len == 0 || sink.queued() >= QUEUE_HIGH {
                return false;
            }
            let later = self.rest.split_off(len);
            sink.send(&Message::data(tag, CHANNEL, std::mem::replace(&mut self.rest, later)));
            self.credit -= len as u64;
            self.bytes += len as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes all, with a queue that never fills.
    #[derive(Default)]
    struct Taken(Vec<Message>);

    impl Sink for Taken {
        fn send(&mut self, message: &Message) {
            self.0.push(message.clone());
        }

        fn queued(&self) -> usize {
            0
        }
    }

    #[test]
    fn a_thread_reads_what_a_client_sends_and_is_told_when_it_is_gone() {
        let (mut upload, mut feed) = upload(1000, || {});
        upload.take(vec![1; 600]).unwrap();
        upload.take(Vec::new()).unwrap();
        let mut octets = [0; 500];
        feed.read_exact(&mut octets).unwrap();
        upload.take(vec![2; 400]).unwrap();
        let mut rest = [0; 500];
        feed.read_exact(&mut rest).unwrap();
        assert_eq!((octets, &rest[..100], &rest[100..]), ([1; 500], &[1; 100][..], &[2; 400][..]));
        assert!(upload.take(vec![3]).unwrap_err().is(Code::OutOfRange));
        upload.end();
        drop(upload);
        // The octet that was too many never came.
        assert_eq!(feed.read(&mut octets).unwrap(), 0);
        let (upload, mut feed) = super::upload(1000, || {});
        drop(upload);
        assert_eq!(feed.read(&mut octets).unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
    }

    #[test]
    fn a_client_gets_what_it_allows_and_then_the_end() {
        let (mut outlet, mut download) = download(|| {});
        let total = INITIAL_CREDIT as usize + 10;
        let writer = std::thread::spawn(move || {
            outlet.write_all(&vec![7; total]).unwrap();
            outlet.end(Ok(Fields::new().with("id", "x")));
        });
        let mut sink = Taken::default();
        let sent = |sink: &Taken| -> usize {
            let octets = sink
                .0
                .iter()
                .map(|message| if let Message::Data { payload, .. } = message { payload.len() } else { 0 });
            octets.sum()
        };
        while sent(&sink) < total - 10 {
            assert!(!download.pump("t", &mut sink));
            std::thread::yield_now();
        }
        assert!(!download.pump("t", &mut sink));
        assert_eq!(sent(&sink), total - 10);
        download.credit(10);
        while !download.pump("t", &mut sink) {
            std::thread::yield_now();
        }
        writer.join().unwrap();
        assert_eq!(sent(&sink), total);
        let Some(Message::Ok { fields, .. }) = sink.0.last() else { panic!("{:?}", sink.0.last()) };
        assert_eq!((fields.get("id"), fields.number("size")), (Some("x"), Some(total as u64)));
    }

    #[test]
    fn a_thread_whose_client_is_gone_ends() {
        let (mut outlet, download) = download(|| {});
        drop(download);
        assert_eq!(outlet.write(&[1]).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
