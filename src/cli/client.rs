//! A client of the control socket: many requests at once on one connection, credit both ways.
//!
//! One thread owns a client. It blocks only where it says so, and holds no more of a stream than its credit
//! allows: octets count as taken when `consumed` says so.
//!
//! ```no_run
//! use warren::cli::client::Client;
//! use warren::wire::Request;
//!
//! let mut client = Client::connect("/run/warren/control.sock".as_ref())?;
//! let sandbox = client.call(Request::new("", "sandbox.create").set("template", "base"))?;
//! let id = sandbox.fields.get("id").unwrap_or_default().to_string();
//! let done = client.call(Request::new("", "exec.start").arg(&id).arg("uname").arg("-a"))?;
//! println!("{:?} {:?}", done.fields.number("exit"), done.channel("stdout"));
//! # Ok::<(), warren::wire::Error>(())
//! ```

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::wire::{Decoded, Error, FRAME, Fields, Filled, INITIAL_CREDIT, Link, MAX_LINE, Message, Request};

/// Nothing answers at the socket.
pub const CONNECT_FAILED: &str = "CONNECT_FAILED";
/// The node closed the connection while a request was under way.
pub const CONNECTION_LOST: &str = "CONNECTION_LOST";
/// The node said something that is not of the protocol.
pub const PROTOCOL_ERROR: &str = "PROTOCOL_ERROR";
/// The answer has more rows than are taken: see `Client::bound`.
pub const TOO_MANY_ROWS: &str = "TOO_MANY_ROWS";
/// What a row counts beside its keys and values, in octets.
const ROW: usize = 64;
/// The answer did not come in the time that the caller gave.
pub const CLIENT_TIMEOUT: &str = "CLIENT_TIMEOUT";
/// The descriptor given to `Client::interrupt_on` became readable.
pub const INTERRUPTED: &str = "INTERRUPTED";
/// A file or stream on this side failed.
pub const LOCAL_IO: &str = "LOCAL_IO";

/// Octets of requests and data that may wait for the socket before `write` takes no more.
const MAX_QUEUED: usize = 256 * 1024;
/// Consumed octets are given back as credit in steps of at least this many.
const CREDIT_STEP: u64 = INITIAL_CREDIT / 4;

/// An error of this side, in the form that the node's errors have.
pub fn local(code: &str, message: impl Into<String>) -> Error {
    Error { code: code.to_string(), message: message.into(), fields: Fields::new() }
}

/// One request under way.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Call(String);

/// What happened to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A row of a list or stream.
    Item(Fields),
    /// Octets of one of the request's streams. Say `consumed` when they are dealt with.
    Data {
        /// Which stream.
        channel: String,
        /// The octets.
        payload: Vec<u8>,
    },
    /// Nothing more comes on this stream.
    End {
        /// Which stream.
        channel: String,
    },
    /// The request has ended; the call is no longer known.
    Done(Result<Fields, Error>),
}

/// Everything a request was answered with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reply {
    /// Of the final `ok`.
    pub fields: Fields,
    /// The rows, in order.
    pub items: Vec<Fields>,
    /// The streams, whole.
    pub channels: BTreeMap<String, Vec<u8>>,
}

impl Reply {
    /// What came on a stream; empty where nothing did.
    pub fn channel(&self, name: &str) -> &[u8] {
        self.channels.get(name).map_or(&[], Vec::as_slice)
    }
}

#[derive(Debug, Default)]
struct CallState {
    events: VecDeque<Event>,
    /// Octets that may still be sent, for each channel that was written or credited.
    allowed: HashMap<String, u64>,
    /// Octets consumed and not yet given back, for each channel.
    owed: HashMap<String, u64>,
    ended: bool,
}

/// A connection to a node.
#[derive(Debug)]
pub struct Client {
    link: Link<UnixStream>,
    next_tag: u64,
    calls: HashMap<String, CallState>,
    /// Set when the connection is of no more use: every call that is under way fails with it.
    lost: Option<Error>,
    interrupt: Option<OwnedFd>,
    /// When everything here that blocks fails.
    until: Option<Instant>,
    /// Octets of rows that are still taken.
    rows_left: usize,
}

impl Client {
    /// Connects to a control socket. Fails with `CONNECT_FAILED`.
    pub fn connect(path: &Path) -> Result<Self, Error> {
        let failed = |e: io::Error| local(CONNECT_FAILED, format!("no node answers at {}: {e}", path.display()));
        let stream = UnixStream::connect(path).map_err(failed)?;
        Self::of(stream).map_err(failed)
    }

    /// On a connection that is there already.
    pub fn of(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            link: Link::new(stream),
            next_tag: 1,
            calls: HashMap::new(),
            lost: None,
            interrupt: None,
            until: None,
            rows_left: usize::MAX,
        })
    }

    /// From now on everything here that blocks fails with `CLIENT_TIMEOUT` after `time`, and the connection is given up with
    /// `TOO_MANY_ROWS` after so many octets of rows. For who asks things of sandboxes that may answer without end.
    pub fn bound(&mut self, time: Duration, rows: usize) {
        (self.until, self.rows_left) = (Some(Instant::now() + time), rows);
    }

    /// Reads what has come, and fails where the connection is of no more use.
    pub fn check(&mut self) -> Result<(), Error> {
        self.pump();
        self.lost.clone().map_or(Ok(()), Err)
    }

    /// Tries again and again until a node at this socket answers `hello`, at most for `time`.
    pub fn connect_within(path: &Path, time: Duration) -> Result<Self, Error> {
        let deadline = Instant::now() + time;
        loop {
            let answered = Self::connect(path).and_then(|mut client| {
                client.call_within(Request::new("", "hello"), deadline.saturating_duration_since(Instant::now()))?;
                Ok(client)
            });
            match answered {
                Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(50)),
                done => return done,
            }
        }
    }

    /// From now on everything here that blocks ends with `INTERRUPTED` when `fd` becomes readable.
    pub fn interrupt_on(&mut self, fd: Option<OwnedFd>) {
        self.interrupt = fd;
    }

    /// Sends a request; the tag in it is replaced. Fails when the request is longer than a line may be.
    pub fn start(&mut self, mut request: Request) -> Result<Call, Error> {
        request.tag = self.next_tag.to_string();
        let tag = request.tag.clone();
        let message = Message::Request(request);
        let length = message.to_bytes().len();
        if length > MAX_LINE {
            let sentence = format!("the request takes {length} octets; a line may have {MAX_LINE}");
            return Err(local("LINE_TOO_LONG", sentence).with("max", MAX_LINE));
        }
        self.next_tag += 1;
        self.link.send(&message);
        self.calls.insert(tag.clone(), CallState::default());
        self.write_out();
        Ok(Call(tag))
    }

    /// Sends a request and gathers everything that it is answered with. Blocks.
    pub fn call(&mut self, request: Request) -> Result<Reply, Error> {
        let call = self.start(request)?;
        self.wait(&call, None)
    }

    /// As `call`, but cancels the request and fails with `CLIENT_TIMEOUT` after `time`.
    pub fn call_within(&mut self, request: Request, time: Duration) -> Result<Reply, Error> {
        let call = self.start(request)?;
        self.wait(&call, Some(Instant::now() + time))
    }

    /// Gathers everything that a request is answered with. Blocks; cancels the request at the deadline.
    pub fn wait(&mut self, call: &Call, deadline: Option<Instant>) -> Result<Reply, Error> {
        let mut reply = Reply::default();
        loop {
            match self.next(call, deadline) {
                Ok(Event::Item(fields)) => reply.items.push(fields),
                Ok(Event::Data { channel, payload }) => {
                    self.consumed(call, &channel, payload.len());
                    reply.channels.entry(channel).or_default().extend_from_slice(&payload);
                }
                Ok(Event::End { .. }) => {}
                Ok(Event::Done(Ok(fields))) => return Ok(Reply { fields, ..reply }),
                Ok(Event::Done(Err(error))) => return Err(error),
                Err(error) => {
                    self.abandon(call);
                    return Err(error);
                }
            }
        }
    }

    /// The next event of a request. Blocks, at most until `deadline`. Fails with `CLIENT_TIMEOUT`, `INTERRUPTED`
    /// or what broke the connection.
    pub fn next(&mut self, call: &Call, deadline: Option<Instant>) -> Result<Event, Error> {
        loop {
            if let Some(event) = self.try_next(call)? {
                return Ok(event);
            }
            self.turn(deadline)?;
        }
    }

    /// The next event of a request where one has arrived. Does not block and does not read: see `pump`.
    pub fn try_next(&mut self, call: &Call) -> Result<Option<Event>, Error> {
        let Some(state) = self.calls.get_mut(&call.0) else {
            return Err(local(PROTOCOL_ERROR, format!("request {} is not under way", call.0)));
        };
        if let Some(event) = state.events.pop_front() {
            if matches!(event, Event::Done(_)) {
                self.calls.remove(&call.0);
            }
            return Ok(Some(event));
        }
        self.lost.clone().map_or(Ok(None), Err)
    }

    /// How many octets `write` would take now.
    pub fn room(&self, call: &Call, channel: &str) -> usize {
        let Some(state) = self.calls.get(&call.0).filter(|state| !state.ended) else { return 0 };
        let allowed = state.allowed.get(channel).copied().unwrap_or(INITIAL_CREDIT);
        MAX_QUEUED.saturating_sub(self.link.queued()).min(usize::try_from(allowed).unwrap_or(usize::MAX))
    }

    /// Sends octets on a stream of a request, as many as its credit and the queue allow; gives their number.
    pub fn write(&mut self, call: &Call, channel: &str, octets: &[u8]) -> usize {
        let take = self.room(call, channel).min(octets.len());
        let Some(state) = self.calls.get_mut(&call.0).filter(|_| take > 0) else { return 0 };
        *state.allowed.entry(channel.to_string()).or_insert(INITIAL_CREDIT) -= take as u64;
        for frame in octets[..take].chunks(FRAME) {
            self.link.send(&Message::data(&call.0, channel, frame));
        }
        self.write_out();
        take
    }

    /// Ends a stream of a request.
    pub fn end(&mut self, call: &Call, channel: &str) {
        self.link.send(&Message::end(&call.0, channel));
        self.write_out();
    }

    /// Says that octets of a stream are dealt with, so that the node may send as many more.
    pub fn consumed(&mut self, call: &Call, channel: &str, octets: usize) {
        let Some(state) = self.calls.get_mut(&call.0).filter(|state| !state.ended) else { return };
        let owed = state.owed.entry(channel.to_string()).or_insert(0);
        *owed += octets as u64;
        if *owed >= CREDIT_STEP {
            let give = std::mem::take(owed);
            self.link.send(&Message::credit(&call.0, channel, give));
            self.write_out();
        }
    }

    /// Asks the node to end a request. Its final answer still comes, as a rule `CANCELLED`.
    pub fn cancel(&mut self, call: &Call) {
        if self.calls.get(&call.0).is_some_and(|state| !state.ended) {
            self.link.send(&Message::Cancel { tag: call.0.clone() });
            self.write_out();
        }
    }

    /// Cancels a request and forgets it: what still comes for it is dropped.
    pub fn abandon(&mut self, call: &Call) {
        self.cancel(call);
        self.calls.remove(&call.0);
    }

    /// Lets a request run on without anybody who waits for its answer.
    pub fn forget(&mut self, call: &Call) {
        self.calls.remove(&call.0);
    }

    /// Sends a request together with the octets of one of its streams, and hands everything of its other streams
    /// to `sink` as it comes. Memory is bounded by credit. Blocks; the source is read when there is room for it.
    pub fn transfer(
        &mut self,
        request: Request,
        source: Option<(&str, &mut dyn Read)>,
        sink: &mut dyn FnMut(&str, &[u8]) -> io::Result<()>,
    ) -> Result<Reply, Error> {
        let call = self.start(request)?;
        let done = self.transfer_of(&call, source, sink);
        if done.is_err() {
            self.abandon(&call);
        }
        done
    }

    fn transfer_of(
        &mut self,
        call: &Call,
        mut source: Option<(&str, &mut dyn Read)>,
        sink: &mut dyn FnMut(&str, &[u8]) -> io::Result<()>,
    ) -> Result<Reply, Error> {
        let mut reply = Reply::default();
        let mut chunk = vec![0u8; FRAME];
        // What was read and not yet sent. The source is read also when there is no credit: its end needs none.
        let mut held = 0..0;
        let broken = |e: io::Error| local(LOCAL_IO, e.to_string());
        loop {
            while let Some(event) = self.try_next(call)? {
                match event {
                    Event::Item(fields) => reply.items.push(fields),
                    Event::Data { channel, payload } => {
                        sink(&channel, &payload).map_err(broken)?;
                        self.consumed(call, &channel, payload.len());
                    }
                    Event::End { .. } => {}
                    Event::Done(result) => return result.map(|fields| Reply { fields, ..reply }),
                }
            }
            let Some((channel, reader)) = &mut source else {
                self.turn(None)?;
                continue;
            };
            if held.is_empty() {
                match reader.read(&mut chunk) {
                    Ok(0) => {
                        self.end(call, channel);
                        source = None;
                        continue;
                    }
                    Ok(n) => held = 0..n,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                    Err(e) => return Err(broken(e)),
                }
            }
            held.start += self.write(call, channel, &chunk[held.clone()]);
            if held.is_empty() {
                self.pump();
                self.check_interrupt()?;
            } else {
                self.turn(None)?;
            }
        }
    }

    /// Reads and writes what is possible without blocking. What broke the connection comes out of `try_next`.
    pub fn pump(&mut self) {
        self.write_out();
        while self.lost.is_none() {
            match self.link.fill() {
                Ok(Filled::Drained) => break,
                Ok(Filled::More) => self.sort(),
                Ok(Filled::Closed) => self.lose(local(CONNECTION_LOST, "the node closed the connection")),
                Err(e) => self.lose(local(CONNECTION_LOST, format!("the connection to the node broke: {e}"))),
            }
        }
        self.write_out();
    }

    /// Whether octets wait for the socket: then poll for writing too.
    pub fn wants_write(&self) -> bool {
        self.link.queued() > 0
    }

    /// The socket, for a poll of the caller's own.
    pub fn with_fd<R>(&mut self, use_it: impl FnOnce(BorrowedFd<'_>) -> R) -> R {
        use_it(UnixStream::as_fd(self.link.stream()))
    }

    /// Waits until the socket is ready and pumps. Fails as `next` does.
    pub fn turn(&mut self, deadline: Option<Instant>) -> Result<(), Error> {
        let deadline = deadline.into_iter().chain(self.until).min();
        let timeout = match deadline.map(|d| d.saturating_duration_since(Instant::now())) {
            None => PollTimeout::NONE,
            Some(left) if left.is_zero() => return Err(local(CLIENT_TIMEOUT, "the node did not answer in time")),
            Some(left) => PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX),
        };
        let interest = if self.wants_write() { PollFlags::POLLIN | PollFlags::POLLOUT } else { PollFlags::POLLIN };
        let mut fds = vec![PollFd::new(UnixStream::as_fd(self.link.stream()), interest)];
        if let Some(interrupt) = &self.interrupt {
            fds.push(PollFd::new(interrupt.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(local(LOCAL_IO, format!("poll: {e}"))),
        }
        let interrupted = fds.get(1).is_some_and(|fd| fd.any() == Some(true));
        drop(fds);
        self.pump();
        if interrupted { Err(local(INTERRUPTED, "interrupted")) } else { Ok(()) }
    }

    fn check_interrupt(&self) -> Result<(), Error> {
        let Some(interrupt) = &self.interrupt else { return Ok(()) };
        let mut fds = [PollFd::new(interrupt.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::ZERO) {
            Ok(n) if n > 0 => Err(local(INTERRUPTED, "interrupted")),
            _ => Ok(()),
        }
    }

    fn write_out(&mut self) {
        // A peer that has closed its side may still have sent its last words: reading finds out.
        let _ = self.link.flush();
    }

    fn lose(&mut self, error: Error) {
        self.lost.get_or_insert(error);
    }

    /// Hands arrived messages to their calls.
    fn sort(&mut self) {
        while let Some(found) = self.link.next() {
            let message = match found {
                Decoded::Message(message) => message,
                Decoded::Bad { error, .. } => {
                    return self.lose(local(PROTOCOL_ERROR, format!("the node sent a bad line: {}", error.message)));
                }
            };
            if let (Message::Err { error, .. }, "-") = (&message, message.tag()) {
                // The node could not tell which request it was: any of them may wait for ever.
                return self.lose(error.clone());
            }
            if let Message::Item { fields, .. } = &message {
                let size = ROW + fields.0.iter().map(|(key, value)| key.len() + value.len()).sum::<usize>();
                match self.rows_left.checked_sub(size) {
                    Some(left) => self.rows_left = left,
                    None => return self.lose(local(TOO_MANY_ROWS, "the answer has more rows than are taken")),
                }
            }
            let Some(state) = self.calls.get_mut(message.tag()).filter(|state| !state.ended) else { continue };
            let event = match message {
                Message::Ok { fields, .. } => Event::Done(Ok(fields)),
                Message::Err { error, .. } => Event::Done(Err(error)),
                Message::Item { fields, .. } => Event::Item(fields),
                Message::Data { channel, payload, .. } => Event::Data { channel, payload },
                Message::End { channel, .. } => Event::End { channel },
                Message::Credit { channel, octets, .. } => {
                    let allowed = state.allowed.entry(channel).or_insert(INITIAL_CREDIT);
                    *allowed = allowed.saturating_add(octets);
                    continue;
                }
                Message::Request(_) | Message::Cancel { .. } => continue,
            };
            state.ended = matches!(event, Event::Done(_));
            state.events.push_back(event);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// A client and the node's end of its connection.
    fn pair() -> (Client, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let client = Client::of(ours).unwrap();
        theirs.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        (client, theirs)
    }

    #[test]
    fn interleaved_answers_find_their_requests() {
        let (mut client, mut node) = pair();
        let first = client.start(Request::new("", "a")).unwrap();
        let second = client.start(Request::new("", "b")).unwrap();
        node.write_all(b"2 item n=1\n1 data stdout 2\nhi\n2 ok x=2\n9 ok\n1 err NOT_FOUND \"no\"\n").unwrap();
        let reply = client.wait(&second, None).unwrap();
        assert_eq!((reply.items.len(), reply.fields.number("x")), (1, Some(2)));
        assert_eq!(
            client.next(&first, None),
            Ok(Event::Data { channel: "stdout".to_string(), payload: b"hi".to_vec() })
        );
        assert!(matches!(client.next(&first, None), Ok(Event::Done(Err(error))) if error.code == "NOT_FOUND"));
    }

    #[test]
    fn who_is_bounded_waits_for_nobody_for_ever_and_takes_no_rows_without_end() {
        let (mut client, mut node) = pair();
        client.bound(Duration::from_millis(20), 10 * (ROW + 2));
        let call = client.start(Request::new("", "a")).unwrap();
        assert!(matches!(client.next(&call, None), Err(error) if error.code == CLIENT_TIMEOUT));
        client.bound(Duration::from_secs(60), 10 * (ROW + 2));
        node.write_all(&b"1 item n=1\n".repeat(10)).unwrap();
        assert!((0..10).all(|_| matches!(client.next(&call, None), Ok(Event::Item(_)))));
        node.write_all(b"1 item n=1\n").unwrap();
        assert!(matches!(client.next(&call, None), Err(error) if error.code == TOO_MANY_ROWS));
    }

    #[test]
    fn a_write_stops_at_the_credit_and_goes_on_with_more() {
        let (mut client, mut node) = pair();
        let reader = std::thread::spawn(move || {
            let mut decoder = crate::wire::Decoder::new();
            let (mut seen, mut chunk) = (0usize, [0u8; 65536]);
            loop {
                let n = node.read(&mut chunk).unwrap();
                decoder.push(&chunk[..n]);
                while let Some(found) = decoder.next() {
                    match found {
                        Decoded::Message(Message::Data { payload, .. }) => {
                            assert!(payload.len() <= FRAME);
                            seen += payload.len();
                            if seen as u64 == INITIAL_CREDIT {
                                node.write_all(b"1 credit content 1000\n").unwrap();
                            }
                        }
                        Decoded::Message(Message::End { .. }) => {
                            node.write_all(format!("1 ok size={seen}\n").as_bytes()).unwrap();
                            return seen;
                        }
                        _ => {}
                    }
                }
            }
        });
        let content = vec![7u8; INITIAL_CREDIT as usize + 1000];
        let done =
            client.transfer(Request::new("", "file.write"), Some(("content", &mut &content[..])), &mut |_, _| Ok(()));
        assert_eq!(done.unwrap().fields.number("size"), Some(content.len() as u64));
        assert_eq!(reader.join().unwrap(), content.len());
    }

    #[test]
    fn consumed_octets_come_back_as_credit() {
        let (mut client, mut node) = pair();
        let call = client.start(Request::new("", "a")).unwrap();
        client.consumed(&call, "stdout", CREDIT_STEP as usize - 1);
        client.consumed(&call, "stdout", 1);
        let mut chunk = [0u8; 100];
        let n = node.read(&mut chunk).unwrap();
        assert_eq!(&chunk[..n], format!("1 a\n1 credit stdout {CREDIT_STEP}\n").as_bytes());
    }

    #[test]
    fn a_lost_connection_fails_what_is_under_way_after_what_came_before() {
        let (mut client, mut node) = pair();
        let call = client.start(Request::new("", "a")).unwrap();
        node.write_all(b"1 item n=1\n").unwrap();
        drop(node);
        assert!(matches!(client.next(&call, None), Ok(Event::Item(_))));
        assert_eq!(client.next(&call, None).unwrap_err().code, CONNECTION_LOST);
    }

    #[test]
    fn a_wait_ends_at_its_deadline_and_cancels() {
        let (mut client, mut node) = pair();
        let error = client.call_within(Request::new("", "a"), Duration::from_millis(20)).unwrap_err();
        assert_eq!(error.code, CLIENT_TIMEOUT);
        let mut chunk = [0u8; 100];
        let n = node.read(&mut chunk).unwrap();
        assert_eq!(&chunk[..n], b"1 a\n1 cancel\n");
    }

    #[test]
    fn a_request_over_the_line_limit_is_refused_here() {
        let (mut client, _node) = pair();
        let error = client.start(Request::new("", "a").arg(vec![b'x'; MAX_LINE])).unwrap_err();
        assert_eq!(error.code, "LINE_TOO_LONG");
    }
}
