//! One connection to the agent and the requests under way on it.

use std::fs::File;
use std::io;
use std::sync::OnceLock;
use std::time::Instant;

use super::tasks::Task;
use crate::wire::{Code, Error, Fields, Link, Message, PROTOCOL_VERSION};

/// Octets queued on a link from which on nothing more is produced for it, and none of its requests are read.
pub(super) const QUEUE_HIGH: usize = 256 * 1024;
/// Requests under way on one link at most.
pub(super) const REQUESTS_MAX: usize = 1024;

/// A request under way.
#[derive(Debug)]
pub(super) enum Job {
    /// The streams of a program, by its number.
    Exec(u64),
    /// The list of programs, from this number on.
    ExecList(u64),
    /// A file operation, on a thread.
    Task(Task),
    /// Until all programs stand still, or this time.
    Freeze(Instant),
    /// What programs log, for as long as the node takes it.
    Service,
}

/// A tag and its request.
#[derive(Debug)]
pub(super) struct Slot {
    pub tag: String,
    pub job: Job,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub link: Link<File>,
    /// The descriptor was announced as readable and has not said `EAGAIN` since.
    pub readable: bool,
    /// As `readable`, for writing.
    pub writable: bool,
    /// Not yet established.
    pub connecting: bool,
    /// The stream has failed or was closed.
    pub broken: bool,
    /// It did not end: it was taken away, as by a restore.
    pub torn: bool,
    pub jobs: Vec<Slot>,
}

impl Connection {
    /// A connection over a non-blocking stream.
    pub(super) fn new(stream: File) -> Self {
        Self {
            link: Link::new(stream),
            readable: true,
            writable: true,
            connecting: false,
            broken: false,
            torn: false,
            jobs: Vec::new(),
        }
    }

    /// Notes that the stream failed with that error.
    pub(super) fn fail_by(&mut self, error: &io::Error) {
        self.broken = true;
        // A peer that goes, or resets a connection, is the end of the stream (0 octets, EPIPE). A vsock says these two
        // only when the whole transport was reset (vsock_connectible_recvmsg, virtio_vsock_reset_sock).
        self.torn |= matches!(error.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNRESET));
    }

    /// Where the request of this tag is among `jobs`.
    pub(super) fn position(&self, tag: &str) -> Option<usize> {
        self.jobs.iter().position(|slot| slot.tag == tag)
    }

    /// The request of this tag.
    pub(super) fn job(&mut self, tag: &str) -> Option<&mut Job> {
        self.jobs.iter_mut().find(|slot| slot.tag == tag).map(|slot| &mut slot.job)
    }

    /// Takes the request of this tag out.
    pub(super) fn take(&mut self, tag: &str) -> Option<Job> {
        self.position(tag).map(|at| self.jobs.swap_remove(at).job)
    }

    /// Ends the request of this tag with an error.
    pub(super) fn fail(&mut self, tag: &str, error: Error) {
        self.take(tag);
        self.link.send(&Message::err(tag, error));
    }

    /// Whether a request of this tag can begin.
    pub(super) fn admit(&self, tag: &str) -> Result<(), Error> {
        if self.position(tag).is_some() {
            return Err(Error::new(Code::TagInUse, format!("tag {tag} is in use by a running request")));
        }
        if self.jobs.len() >= REQUESTS_MAX {
            return Err(Error::new(
                Code::TooManyRequests,
                format!("{REQUESTS_MAX} requests are under way on this link, which is the limit"),
            )
            .with("max", REQUESTS_MAX));
        }
        Ok(())
    }
}

/// What the agent says about itself, unasked at the start of each connection and as the answer to `hello`. `boot` is
/// the same for as long as this agent lives, and in all that are made of its memory.
pub(super) fn hello() -> Fields {
    Fields::new()
        .with("protocol", PROTOCOL_VERSION)
        .with("agent", "burrow")
        .with("version", env!("CARGO_PKG_VERSION"))
        .with("boot", boot())
}

/// The first line of a connection.
pub(super) fn greeting(hello: Fields) -> Message {
    Message::ok("hello", hello)
}

/// 16 hexadecimal digits, chosen when first asked for.
fn boot() -> &'static str {
    static BOOT: OnceLock<String> = OnceLock::new();
    BOOT.get_or_init(|| {
        let mut octets = [0; 8];
        // SAFETY: getrandom writes at most as many octets as there are. It does not wait for the kernel's pool to be
        // seeded, which early in a boot it may not be: the number is no secret.
        unsafe { libc::getrandom(octets.as_mut_ptr().cast(), octets.len(), libc::GRND_INSECURE) };
        format!("{:016x}", u64::from_ne_bytes(octets))
    })
}
