//! One connection of the control socket, or the virtio-serial port: the same to the rest of the node.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use mio::net::UnixStream;

use super::port::Port;
use super::role::Role;
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

/// A connection and its requests under way; `J` is what the supervisor keeps for each.
#[derive(Debug)]
pub struct Client<J> {
    transport: Transport,
    /// What it may ask.
    pub role: Role,
    /// Requests under way by their tags.
    pub jobs: HashMap<String, J>,
    /// The client has closed its sending side; it still gets its answers.
    pub half_closed: bool,
    max_jobs: usize,
}

impl<J> Client<J> {
    /// A client of the control socket.
    pub fn socket(stream: UnixStream, role: Role, max_jobs: usize) -> Self {
        Self {
            transport: Transport::Socket(Link::new(stream)),
            role,
            jobs: HashMap::new(),
            half_closed: false,
            max_jobs,
        }
    }

    /// The clients behind a bridge, as one.
    pub fn port(port: Port, max_jobs: usize) -> Self {
        Self {
            transport: Transport::Port(Box::new(port)),
            role: Role::Admin,
            jobs: HashMap::new(),
            half_closed: false,
            max_jobs,
        }
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

    /// Ends a request with its final answer.
    pub fn finish(&mut self, message: &Message) {
        self.jobs.remove(message.tag());
        self.send(message);
    }
}

impl<J> Sink for Client<J> {
    fn send(&mut self, message: &Message) {
        match &mut self.transport {
            Transport::Socket(link) => link.send(message),
            Transport::Port(port) => port.send(message),
        }
    }

    fn queued(&self) -> usize {
        match &self.transport {
            Transport::Socket(link) => link.queued(),
            Transport::Port(port) => port.queued(),
        }
    }
}
