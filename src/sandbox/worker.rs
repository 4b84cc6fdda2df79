//! The supervisor's end of a worker's socket.

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::wire::{Code, Error, Fields, Message, OLDEST_WORKER_LINK, Request, WORKER_LINK};

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

/// The version of its link that a worker's greeting names. The first said nothing of it.
///
/// # Errors
/// `VERSION_MISMATCH` where that is none that this supervisor speaks.
pub fn link_version(greeting: &Fields) -> Result<u64, Error> {
    let version = greeting.get("link").map_or(Some(1), |text| text.parse().ok());
    if let Some(version) = version.filter(|version| (OLDEST_WORKER_LINK..=WORKER_LINK).contains(version)) {
        return Ok(version);
    }
    let said: String = greeting.get("link").unwrap_or("1").chars().filter(|c| !c.is_control()).take(20).collect();
    let message = format!(
        "its worker speaks version {said} of the worker link, this supervisor {OLDEST_WORKER_LINK} and {WORKER_LINK}"
    );
    let error = Error::new(Code::VersionMismatch, message).with("version", said);
    Err(error.with("min", OLDEST_WORKER_LINK).with("max", WORKER_LINK))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_of_this_version_or_the_one_before_is_spoken_to_and_no_other() {
        let of = |link: &str| link_version(&Fields::new().with("protocol", 1).with("link", link));
        assert_eq!(of(&WORKER_LINK.to_string()), Ok(WORKER_LINK));
        assert_eq!(of(&OLDEST_WORKER_LINK.to_string()), Ok(OLDEST_WORKER_LINK));
        assert_eq!(link_version(&Fields::new().with("protocol", 1)), Ok(1), "the first did not say");
        for foreign in
            [(WORKER_LINK + 1).to_string(), (OLDEST_WORKER_LINK - 1).to_string(), String::new(), "x".repeat(500)]
        {
            let error = of(&foreign).unwrap_err();
            assert!(error.is(Code::VersionMismatch) && error.message.len() < 120, "{error}");
            assert_eq!(error.fields.number("max"), Some(WORKER_LINK));
        }
    }
}
