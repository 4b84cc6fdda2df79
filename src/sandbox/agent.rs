//! The supervisor's link to a sandbox's agent, through the worker's socket.

use std::collections::VecDeque;
use std::io;
use std::path::Path;

use mio::net::UnixStream;

use super::claims;
use super::worker::{self, AGENT_PORT};
use crate::wire::{Code, Decoded, Error, Filled, Link, Message, Request};

/// How the link comes about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Approach {
    /// The agent connects to the host once it is up: a new sandbox.
    Accept,
    /// The host connects to the agent: a sandbox that runs already.
    Connect,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The worker has not yet made the connection.
    Joining,
    /// The connection stands; the agent has not said who it is.
    Greeting,
    /// Requests may be sent.
    Ready,
    /// It is over.
    Lost,
}

/// What the link brought.
#[derive(Debug)]
pub enum Heard {
    /// The agent is there: requests may be sent from now on.
    Ready,
    /// An answer, or anything else, to one of our requests.
    Message(Message),
    /// The agent, or the worker, broke the protocol or refused; the link is of no more use.
    Broken(Error),
}

/// A link to an agent. The agent is hostile: what it sends is bounded by the decoder and by credit.
#[derive(Debug)]
pub struct Agent {
    link: Link<UnixStream>,
    phase: Phase,
    next_tag: u64,
    /// It greeted with all programs frozen.
    frozen: bool,
    /// Answers to requests that could not be sent.
    unsent: VecDeque<Message>,
}

impl Agent {
    /// Begins a link over the worker's socket; `hear` tells when it stands.
    pub fn open(socket: &Path, approach: Approach) -> io::Result<Self> {
        let mut agent = Self::prepare(socket)?;
        agent.join(approach);
        Ok(agent)
    }

    /// Connects to the worker and asks it for nothing yet: `join` does.
    pub fn prepare(socket: &Path) -> io::Result<Self> {
        let stream = worker::connect(socket)?;
        stream.set_nonblocking(true)?;
        let link = Link::new(UnixStream::from_std(stream));
        Ok(Self { link, phase: Phase::Joining, next_tag: 1, frozen: false, unsent: VecDeque::new() })
    }

    /// Asks the worker to make the connection; once.
    pub fn join(&mut self, approach: Approach) {
        let verb = match approach {
            Approach::Accept => "vsock.accept",
            Approach::Connect => "vsock.connect",
        };
        self.link.send(&Message::Request(Request::new("join", verb).set("port", AGENT_PORT)));
    }

    /// The stream, to register with the loop.
    pub fn stream(&mut self) -> &mut UnixStream {
        self.link.stream()
    }

    /// Whether requests may be sent.
    pub fn is_ready(&self) -> bool {
        self.phase == Phase::Ready
    }

    /// Whether it said, when it greeted, that the guest's programs stand still.
    pub fn is_frozen(&self) -> bool {
        self.frozen
    }

    /// Reads once; see `Link::fill`.
    pub fn fill(&mut self) -> io::Result<Filled> {
        self.link.fill()
    }

    /// The next thing that was heard.
    pub fn hear(&mut self) -> Option<Heard> {
        if let Some(answer) = self.unsent.pop_front() {
            return Some(Heard::Message(answer));
        }
        let message = match self.link.next()? {
            Decoded::Message(message) => claims::message(message),
            Decoded::Bad { error, .. } => {
                return Some(Heard::Broken(Error::new(
                    Code::LinkLost,
                    format!("the agent sent garbage: {}", error.message),
                )));
            }
        };
        match (self.phase, &message) {
            (Phase::Joining, Message::Ok { tag, .. }) if tag == "join" => {
                self.phase = Phase::Greeting;
                self.hear()
            }
            (Phase::Joining, Message::Err { error, .. }) => Some(Heard::Broken(error.clone())),
            (Phase::Greeting, Message::Ok { tag, fields }) if tag == "hello" => {
                self.phase = Phase::Ready;
                self.frozen = fields.get("frozen") == Some("true");
                Some(Heard::Ready)
            }
            // It says why it cannot serve: a root disk that is no file system, say.
            (Phase::Greeting, Message::Err { tag, error }) if tag == "hello" => Some(Heard::Broken(error.clone())),
            (Phase::Ready, _) => Some(Heard::Message(message)),
            _ => Some(Heard::Broken(Error::new(Code::LinkLost, "the agent did not greet as it must"))),
        }
    }

    /// Sends a request under a fresh tag, which it gives back.
    pub fn request(&mut self, mut request: Request) -> String {
        let tag = self.next_tag.to_string();
        self.next_tag += 1;
        request.tag.clone_from(&tag);
        let what = format!("{} to the agent", request.verb);
        let request = Message::Request(request);
        match request.over_long() {
            None => self.link.send(&request),
            // It would not know under which tag to refuse that.
            Some(length) => self.unsent.push_back(Message::err(&tag, Error::line_too_long(&what, length))),
        }
        tag
    }

    /// Whether `hear` has something that no stream brings.
    pub fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// The link is of no more use.
    pub fn lose(&mut self) {
        self.phase = Phase::Lost;
        self.unsent.clear();
    }

    /// Queues a message.
    pub fn send(&mut self, message: &Message) {
        self.link.send(message);
    }

    /// Octets queued toward the agent.
    pub fn queued(&self) -> usize {
        self.link.queued()
    }

    /// Writes what the stream takes.
    pub fn flush(&mut self) -> io::Result<bool> {
        self.link.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::wire::MAX_LINE;

    /// An agent whose side of the link says that.
    fn agent(name: &str, said: &[u8]) -> (Agent, std::os::unix::net::UnixStream) {
        let path = std::env::temp_dir().join(format!("warren-agent-{name}-{}", std::process::id()));
        let listener = UnixListener::bind(&path).expect("a socket");
        let agent = Agent::open(&path, Approach::Connect).expect("it connects");
        let (mut peer, _) = listener.accept().expect("it is there");
        std::fs::remove_file(&path).expect("clean up");
        peer.write_all(said).expect("the socket takes it");
        (agent, peer)
    }

    fn hear(agent: &mut Agent) -> Heard {
        loop {
            match agent.hear() {
                Some(heard) => return heard,
                None => assert_eq!(agent.fill().expect("the peer is there"), Filled::More),
            }
        }
    }

    #[test]
    fn a_request_that_makes_too_long_a_line_is_answered_and_not_sent() {
        let (mut agent, _peer) = agent("long", b"join ok\nhello ok\n");
        assert!(matches!(hear(&mut agent), Heard::Ready));
        let queued = agent.queued();
        let tag = agent.request(Request::new("", "file.stat").set("path", "x".repeat(MAX_LINE)));
        assert!(agent.has_unsent() && agent.queued() == queued);
        let Heard::Message(Message::Err { tag: answered, error }) = hear(&mut agent) else { panic!("no answer") };
        assert!(answered == tag && error.is(Code::LineTooLong), "{error}");
        agent.request(Request::new("", "file.stat").set("path", "x"));
        assert!(!agent.has_unsent() && agent.queued() > queued);
        agent.lose();
        assert!(!agent.is_ready());
    }

    #[test]
    fn what_it_says_of_its_failure_is_cut() {
        let said = format!("join ok\nhello err INTERNAL \"{}\"\n", "why ".repeat(15_000));
        let (mut agent, _peer) = agent("cut", said.as_bytes());
        let Heard::Broken(error) = hear(&mut agent) else { panic!("it serves") };
        assert!(error.message.len() < 1100 && error.message.starts_with("why why"), "{}", error.message.len());
    }
}
