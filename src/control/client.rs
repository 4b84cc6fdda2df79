//! One connection of the control socket, or the virtio-serial port: the same to the rest of the node.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use mio::net::UnixStream;

use super::access::Identity;
use super::port::Port;
use crate::sandbox::exec::Sink;
use crate::wire::{Code, Decoded, Error, Filled, Link, Message};

/// Octets queued toward a client before its requests are no longer read: it must take answers first.
pub const ANSWERS_HIGH: usize = 1024 * 1024;
/// Octets queued toward a client before it is given up.
pub const ANSWERS_MAX: usize = 16 * 1024 * 1024;

#[derive(Debug)]
enum Transport {
    Socket(Link<UnixStream>),
    Port(Box<Port>),
}

/// A row of the audit log whose request was not answered yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Noted {
    /// Its number.
    pub row: u64,
    /// It says which sandbox it is about: no answer says that better, and some are guests'.
    pub names_sandbox: bool,
}

/// How a request ended that is in the audit log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Its row.
    pub audit: u64,
    /// `ok`, or the code of the error.
    pub result: String,
    /// What the answer says it was about.
    pub sandbox: Option<String>,
}

/// A connection and its requests under way; `J` is what the supervisor keeps for each.
#[derive(Debug)]
pub struct Client<J> {
    transport: Transport,
    /// Requests under way by their tags.
    pub jobs: HashMap<String, J>,
    /// Rows of the audit log, by the tags of requests that were not answered yet.
    pub audits: HashMap<String, Noted>,
    /// Requests of those that were.
    pub ended: Vec<Ended>,
    /// The client has closed its sending side; it still gets its answers.
    pub half_closed: bool,
    identity: Identity,
    max_jobs: usize,
}

impl<J> Client<J> {
    /// A client of the control socket.
    pub fn socket(stream: UnixStream, identity: Identity, max_jobs: usize) -> Self {
        Self::new(Transport::Socket(Link::new(stream)), identity, max_jobs)
    }

    /// The clients behind a bridge, as one.
    pub fn port(port: Port, max_jobs: usize) -> Self {
        Self::new(Transport::Port(Box::new(port)), Identity::port(), max_jobs)
    }

    fn new(transport: Transport, identity: Identity, max_jobs: usize) -> Self {
        let (jobs, audits, ended) = (HashMap::new(), HashMap::new(), Vec::new());
        Self { transport, jobs, audits, ended, half_closed: false, identity, max_jobs }
    }

    /// Who it is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The port, where this is one.
    pub fn as_port(&mut self) -> Option<&mut Port> {
        match &mut self.transport {
            Transport::Port(port) => Some(port),
            Transport::Socket(_) => None,
        }
    }

    /// The descriptor, to register with the loop.
    pub fn descriptor(&mut self) -> RawFd {
        match &mut self.transport {
            Transport::Socket(link) => link.stream().as_raw_fd(),
            Transport::Port(port) => port.descriptor(),
        }
    }

    /// Reads once; see `Link::fill`.
    pub fn fill(&mut self) -> io::Result<Filled> {
        match &mut self.transport {
            Transport::Socket(link) => link.fill(),
            Transport::Port(port) => port.fill(),
        }
    }

    /// The next message.
    #[allow(clippy::should_implement_trait)] // not an iterator: `None` is not the end
    pub fn next(&mut self) -> Option<Decoded> {
        match &mut self.transport {
            Transport::Socket(link) => link.next(),
            Transport::Port(port) => port.next(),
        }
    }

    /// Writes what the connection takes. `Ok(true)` when nothing is queued.
    pub fn flush(&mut self) -> io::Result<bool> {
        match &mut self.transport {
            Transport::Socket(link) => link.flush(),
            Transport::Port(port) => port.flush(),
        }
    }

    /// Whether a request may begin under this tag.
    pub fn admit(&self, tag: &str) -> Result<(), Error> {
        if self.jobs.contains_key(tag) {
            return Err(Error::new(Code::TagInUse, format!("tag {tag} is in use by a request under way")));
        }
        if self.jobs.len() >= self.max_jobs {
            return Err(Error::new(
                Code::TooManyRequests,
                format!("{} requests are under way, the limit of this connection", self.max_jobs),
            )
            .with("max", self.max_jobs));
        }
        Ok(())
    }

    /// Sends what is no answer to a request that was taken, whatever its tag.
    pub fn send_aside(&mut self, message: &Message) {
        let fitting = message.over_long().map(|length| fit(message, length));
        let message = fitting.as_ref().unwrap_or(message);
        match &mut self.transport {
            Transport::Socket(link) => link.send(message),
            Transport::Port(port) => port.send(message),
        }
    }

    fn note_end(&mut self, message: &Message) {
        let (tag, result, fields) = match message {
            Message::Ok { tag, fields } => (tag, "ok", Some(fields)),
            Message::Err { tag, error } => (tag, error.code.as_str(), None),
            _ => return,
        };
        if let Some(Noted { row, names_sandbox }) = self.audits.remove(tag) {
            let fields = fields.filter(|_| !names_sandbox);
            let sandbox = fields.and_then(|fields| fields.get("id")).map(str::to_string);
            self.ended.push(Ended { audit: row, result: result.to_string(), sandbox });
        }
    }

    /// Ends a request with its final answer.
    pub fn finish(&mut self, message: &Message) {
        self.jobs.remove(message.tag());
        self.send(message);
    }
}

impl<J> Sink for Client<J> {
    fn send(&mut self, message: &Message) {
        self.note_end(message);
        self.send_aside(message);
    }

    fn queued(&self) -> usize {
        match &self.transport {
            Transport::Socket(link) => link.queued(),
            Transport::Port(port) => port.queued(),
        }
    }
}

/// What is sent instead of a message that makes too long a line: a row without its longest values, whose keys it names.
fn fit(message: &Message, length: usize) -> Message {
    let (Message::Ok { tag, fields } | Message::Item { tag, fields }) = message else {
        return Message::err(message.tag(), Error::line_too_long("the answer", length));
    };
    let (mut fields, mut left_out) = (fields.clone(), BTreeSet::new());
    loop {
        let named = left_out.iter().fold(fields.clone(), |fields, key| fields.with("left_out", key));
        let row = match message {
            Message::Ok { .. } => Message::ok(tag, named),
            _ => Message::item(tag, named),
        };
        let longest = fields.0.iter().enumerate().max_by_key(|(_, (_, value))| value.len()).map(|(at, _)| at);
        match longest.filter(|_| row.over_long().is_some()) {
            Some(at) => left_out.insert(fields.0.remove(at).0),
            None => return row,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::access::Identity;
    use crate::wire::{Decoder, Fields, MAX_LINE};

    fn client() -> (Client<()>, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        (Client::socket(ours, Identity::port(), 10), theirs)
    }

    #[test]
    fn only_a_row_that_names_no_sandbox_takes_one_from_its_answer() {
        let (mut client, _peer) = client();
        client.audits.insert("1".to_string(), Noted { row: 1, names_sandbox: false });
        client.audits.insert("2".to_string(), Noted { row: 2, names_sandbox: true });
        for tag in ["1", "2"] {
            client.send(&Message::ok(tag, Fields::new().with("id", "anothersandb")));
        }
        let said: Vec<_> = client.ended.iter().map(|ended| (ended.audit, ended.sandbox.as_deref())).collect();
        assert_eq!(said, [(1, Some("anothersandb")), (2, None)]);
    }

    #[test]
    fn no_line_that_is_sent_is_too_long() {
        use std::io::Read;
        let (mut client, mut peer) = client();
        let row = || Fields::new().with("id", "a").with("env", "x".repeat(40_000)).with("env", "y".repeat(30_000));
        client.send(&Message::item("1", row()));
        client.send(&Message::ok("1", row().with("more", "\0".repeat(10_000))));
        client.send(&Message::err("2", Error::new(Code::Internal, "z".repeat(MAX_LINE))));
        let mut decoder = Decoder::new();
        let mut seen = Vec::new();
        loop {
            let done = client.flush().expect("the peer is there");
            let mut chunk = vec![0; 1 << 20];
            let count = peer.read(&mut chunk).expect("something was sent");
            decoder.push(&chunk[..count]);
            while let Some(found) = decoder.next() {
                seen.push(found);
            }
            if done && decoder.is_idle() && seen.len() == 3 {
                break;
            }
        }
        let Decoded::Message(Message::Item { fields, .. }) = &seen[0] else { panic!("{:?}", seen[0]) };
        assert_eq!((fields.get("id"), fields.get("left_out")), (Some("a"), Some("env")));
        assert_eq!(fields.bytes("env").map(<[u8]>::len), Some(30_000), "only the longest goes");
        let Decoded::Message(Message::Ok { fields, .. }) = &seen[1] else { panic!("{:?}", seen[1]) };
        assert!(fields.get("id").is_some() && fields.get("left_out").is_some());
        let Decoded::Message(Message::Err { error, .. }) = &seen[2] else { panic!("{:?}", seen[2]) };
        assert!(error.is(Code::LineTooLong) && error.fields.number("max") == Some(MAX_LINE as u64), "{error}");
    }
}
