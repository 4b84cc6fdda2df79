//! The supervisor's end of its link to init: exits of workers come in, acknowledgements and the wish to stop go out.
//!
//! Workers are init's children, so only init learns how they ended. It keeps each exit until it is acknowledged:
//! a supervisor that was killed meanwhile still gets it. On a plain host there is no such link.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream as StdStream;

use mio::net::UnixStream;
use mio::{Interest, Registry, Token};

use crate::wire::{Decoded, Fields, Filled, Link, Message, Request};

/// The descriptor that a supervisor inherits from init.
pub const LINK_FD: RawFd = 3;
/// Set by init to the number of that descriptor, so that a stray descriptor 3 is not taken for it.
pub const LINK_VARIABLE: &str = "WARREN_INIT_LINK";

/// Tags of the requests on this link; what init answers is told apart by them.
const WATCH: &str = "watch";
const ACK: &str = "ack";
const STOP: &str = "stop";

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChildStatus {
    /// It exited with this code.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
}

/// The end of one process that was init's child and no service of init's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChildExit {
    /// Its process id; it may be in use again by now, so find the sandbox by `cgroup`.
    pub pid: u32,
    /// Its cgroup below /sys/fs/cgroup, such as `/sandboxes/abc123`; empty where it was not known.
    pub cgroup: String,
    /// Code or signal.
    pub status: ChildStatus,
}

impl ChildExit {
    /// The sandbox whose worker this was: the last part of `/sandboxes/ID`.
    pub fn sandbox(&self) -> Option<&str> {
        self.cgroup.strip_prefix("/sandboxes/").filter(|id| !id.is_empty() && !id.contains('/'))
    }

    /// The fields that carry it.
    pub fn to_fields(&self) -> Fields {
        let fields = Fields::new().with("pid", self.pid).with("cgroup", &self.cgroup);
        match self.status {
            ChildStatus::Code(code) => fields.with("code", code),
            ChildStatus::Signal(signal) => fields.with("signal", signal),
        }
    }

    /// The way back.
    pub fn from_fields(fields: &Fields) -> Option<Self> {
        let pid = fields.number("pid")?.try_into().ok()?;
        let cgroup = fields.get("cgroup")?.to_string();
        let status = match (fields.get("code"), fields.get("signal")) {
            (Some(code), None) => ChildStatus::Code(code.parse().ok()?),
            (None, Some(signal)) => ChildStatus::Signal(signal.parse().ok()?),
            _ => return None,
        };
        Some(Self { pid, cgroup, status })
    }
}

/// What the node does when it has stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopMode {
    /// Power off.
    PowerOff,
    /// Start again.
    Reboot,
}

impl StopMode {
    /// As it is written in `mode=`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::PowerOff => "poweroff",
            Self::Reboot => "reboot",
        }
    }

    /// The way back.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "poweroff" => Some(Self::PowerOff),
            "reboot" => Some(Self::Reboot),
            _ => None,
        }
    }
}

/// The supervisor's end of the link. Never blocks; used by the supervisor's loop only.
#[derive(Debug)]
pub struct ExitWatch {
    link: Link<UnixStream>,
    lost: bool,
    stopping: bool,
}

impl ExitWatch {
    /// Takes the link that init left at descriptor 3; `None` on a plain host. Call once, before threads start.
    pub fn inherit() -> Option<Self> {
        let named = std::env::var(LINK_VARIABLE).ok()?;
        if named != LINK_FD.to_string() {
            return None;
        }
        // SAFETY: init's variable says that this descriptor is open and ours alone, and the caller calls once.
        let owned = unsafe { OwnedFd::from_raw_fd(LINK_FD) };
        // A worker must not inherit it.
        nix::fcntl::fcntl(&owned, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC)).ok()?;
        Self::new(StdStream::from(owned)).ok()
    }

    /// Over any stream socket, for tests and `inherit`. Asks for the exits at once.
    pub fn new(stream: StdStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let mut watch = Self { link: Link::new(UnixStream::from_std(stream)), lost: false, stopping: false };
        watch.send(Request::new(WATCH, "exits.watch"));
        Ok(watch)
    }

    /// Registers the link; call `read_events` on each event of that token, readable or writable.
    pub fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        registry.register(self.link.stream(), token, Interest::READABLE | Interest::WRITABLE)
    }

    /// Exits that arrived, oldest first; each comes again to the next supervisor unless acknowledged.
    pub fn read_events(&mut self) -> Vec<ChildExit> {
        let mut exits = Vec::new();
        self.flush();
        while !self.lost {
            match self.link.fill() {
                Ok(Filled::More) => self.take(&mut exits),
                Ok(Filled::Drained) => break,
                Ok(Filled::Closed) => self.lose("init closed it"),
                Err(error) => self.lose(&error.to_string()),
            }
        }
        exits
    }

    /// Tells init that this exit was dealt with.
    pub fn ack(&mut self, pid: u32) {
        self.send(Request::new(ACK, "exits.ack").set("pid", pid));
    }

    /// Asks init to stop the node. The sandboxes must have been stopped: what still runs is killed.
    pub fn request_stop(&mut self, mode: StopMode) {
        self.stopping = true;
        self.send(Request::new(STOP, "node.stop").set("mode", mode.as_str()));
    }

    /// Whether the link broke; then nothing more comes.
    pub fn is_lost(&self) -> bool {
        self.lost
    }

    fn take(&mut self, exits: &mut Vec<ChildExit>) {
        while let Some(decoded) = self.link.next() {
            match decoded {
                Decoded::Message(Message::Item { tag, fields }) if tag == WATCH => {
                    match ChildExit::from_fields(&fields) {
                        Some(exit) => exits.push(exit),
                        None => log::error!("link to init: not an exit: {fields:?}"),
                    }
                }
                Decoded::Message(Message::Ok { .. }) => {}
                other => log::error!("link to init: unexpected {other:?}"),
            }
        }
    }

    fn send(&mut self, request: Request) {
        if !self.lost {
            self.link.send(&Message::Request(request));
            self.flush();
        }
    }

    fn flush(&mut self) {
        if let Err(error) = self.link.flush() {
            self.lose(&error.to_string());
        }
    }

    fn lose(&mut self, why: &str) {
        // Init closes the link when it stops the node.
        if !self.lost && !self.stopping {
            log::error!("link to init is lost: {why}");
        }
        self.lost = true;
    }
}
