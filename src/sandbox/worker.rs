//! The supervisor's end of a worker's socket.

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::wire::{Message, Request};

/// The vsock port that the agent listens on, and announces itself to.
pub const AGENT_PORT: u32 = 1024;

/// Connects to a worker; the worker's listening socket exists before the worker does, so this does not wait.
pub fn connect(socket: &Path) -> io::Result<UnixStream> {
    UnixStream::connect(socket)
}

/// Sends a request with descriptors on a fresh, still blocking connection.
pub fn send_with_descriptors(stream: &UnixStream, request: Request, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let line = Message::Request(request).to_bytes();
    let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let sent = sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(&line)],
        &[ControlMessage::ScmRights(&raw)],
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    if sent == line.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Why a worker says it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastWords {
    /// A word such as `guest-poweroff` or `kvm-error`.
    pub reason: String,
    /// A sentence, where there is more to say.
    pub detail: String,
}

impl LastWords {
    /// Reads a last-words record; `None` when the worker left none.
    pub fn read(path: &Path) -> Option<Self> {
        use std::io::Read;
        let mut octets = Vec::new();
        std::fs::File::open(path).ok()?.take(8192).read_to_end(&mut octets).ok()?;
        let mut decoder = crate::wire::Decoder::new();
        decoder.push(octets.split(|&b| b == 0).next()?);
        match decoder.next()? {
            crate::wire::Decoded::Message(Message::Item { fields, .. }) => Some(Self {
                reason: fields.get("reason")?.to_string(),
                detail: fields.get("detail").unwrap_or_default().to_string(),
            }),
            _ => None,
        }
    }

    /// The record as one sentence.
    pub fn sentence(&self) -> String {
        if self.detail.is_empty() { self.reason.clone() } else { format!("{}: {}", self.reason, self.detail) }
    }
}
