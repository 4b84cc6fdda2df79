//! One connection of the control socket, or the virtio-serial port: the same to the rest of the node.

use std::collections::HashMap;
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
    pub audits: HashMap<String, u64>,
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
        if let Some(audit) = self.audits.remove(tag) {
            let sandbox = fields.and_then(|fields| fields.get("id")).map(str::to_string);
            self.ended.push(Ended { audit, result: result.to_string(), sandbox });
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
