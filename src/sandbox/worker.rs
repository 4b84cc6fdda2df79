//! The supervisor's end of a worker's socket.

use std::fs::File;
use std::io::{self, IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::stat::{major, minor};

use super::claims;
use crate::wire::{Code, Decoded, Error, Fields, Message, OLDEST_WORKER_LINK, Request, WORKER_LINK};

/// The vsock port that the agent listens on, and announces itself to.
pub const AGENT_PORT: u32 = 1024;

/// Connects to a worker; the worker's listening socket exists before the worker does, so this does not wait.
pub fn connect(socket: &Path) -> io::Result<UnixStream> {
    UnixStream::connect(socket)
}

/// Sends a request with descriptors on a connection on which nothing waits to be sent.
pub fn send_with_descriptors(
    stream: &impl AsRawFd,
    request: Request,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
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

/// Why a worker did not write a snapshot.
#[derive(Debug)]
pub enum CaptureError {
    /// It says why.
    Refused(Error),
    /// The link to it, or a write of its child's.
    Io(io::Error),
}

impl std::fmt::Display for CaptureError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Refused(error) => error.fmt(f),
            Self::Io(e) => e.fmt(f),
        }
    }
}

impl From<io::Error> for CaptureError {
    fn from(e: io::Error) -> Self {
        Self::Io(e)
    }
}

/// A snapshot that a child of a worker is writing.
#[derive(Debug)]
pub struct Capture {
    /// What the worker says of it.
    pub fields: Fields,
    done: io::PipeReader,
}

/// Has a worker make its guest stand still and begin to write its state and its memory into these files; `memory` is as
/// long as the guest's memory. With `next`, an empty overlay and its name, the guest's root disk is frozen at the same
/// instant, and it goes on; else it is held. With `below`, a flat memory file that the guest may have been restored from,
/// the memory may be a difference to that: `Capture::is_difference` tells. Blocks until all is decided; `Capture::finish`
/// waits for the files. The guest goes on where this fails.
///
/// # Errors
/// The worker's own, or the link's. Whether the disk was frozen all the same, `next_overlay` tells.
pub fn begin_capture(
    socket: &Path,
    pid: i32,
    state: &File,
    memory: &File,
    next: Option<(&str, &File)>,
    below: Option<&File>,
) -> Result<Capture, CaptureError> {
    let below = below.filter(|below| {
        maps(pid, below).unwrap_or_else(|e| {
            log::warn!("whether worker {pid} maps a memory file is not known, and its memory written as a whole: {e}");
            false
        })
    });
    let stream = connect(socket)?;
    stream.set_read_timeout(Some(CAPTURE))?;
    let (done, theirs) = io::pipe()?;
    let page_map = File::open(format!("/proc/{pid}/pagemap"))?;
    let request = Request::new("capture", "vm.capture")
        .set("state", "fd:0")
        .set("memory", "fd:1")
        .set("done", "fd:2")
        .set("page_map", "fd:3");
    let mut descriptors = vec![state.as_fd(), memory.as_fd(), theirs.as_fd(), page_map.as_fd()];
    let request = match next {
        Some((name, file)) => {
            descriptors.push(file.as_fd());
            request.set("overlay", "fd:4").set("overlay_name", name)
        }
        None => request.set("hold", true),
    };
    let request = if below.is_some() { request.set("diff", true) } else { request };
    send_with_descriptors(&stream, request, &descriptors)?;
    drop(theirs);
    Ok(Capture { fields: read_answer(&stream, CAPTURE)?, done })
}

/// Whether a process has that file in its memory, by its own list (proc_pid_maps(5)).
fn maps(pid: i32, file: &File) -> io::Result<bool> {
    let meta = file.metadata()?;
    let device = format!("{:02x}:{:02x}", major(meta.dev()), minor(meta.dev()));
    let inode = meta.ino().to_string();
    let listed = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    Ok(listed.lines().any(|line| {
        let mut words = line.split_ascii_whitespace().skip(3);
        words.next() == Some(&device) && words.next() == Some(&inode)
    }))
}

impl Capture {
    /// The memory file has only what differs from the one that the guest was restored from.
    pub fn is_difference(&self) -> bool {
        self.fields.get("diff") == Some("true")
    }

    /// Waits until all is written; nothing is synced.
    ///
    /// # Errors
    /// That of the write that failed.
    pub fn finish(mut self) -> io::Result<Fields> {
        // The child's last word; none where it was killed.
        let mut octets = [0; 4];
        let read = self.done.read_exact(&mut octets);
        read.map_err(|_| io::Error::other("the process that writes it was killed"))?;
        match i32::from_le_bytes(octets) {
            0 => Ok(self.fields),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

/// Name of the overlay that a worker's guest writes to since a snapshot; `None` where it goes on with the one it was
/// started with. Blocks.
pub fn next_overlay(socket: &Path) -> Result<Option<String>, CaptureError> {
    let stream = connect(socket)?;
    send_with_descriptors(&stream, Request::new("hello", "hello"), &[])?;
    Ok(read_answer(&stream, GREETING)?.get("overlay").map(str::to_string))
}

/// Tag of the request below.
pub const LEARN: &str = "learn";

/// Has a worker write down, in the file that this gives, which pages of its memory file its guest has touched so far, for those
/// that go on from the same one later. Its answer comes by the link that it is asked by, on which nothing is queued.
pub fn ask_working_set(link: &impl AsRawFd, pid: i32) -> io::Result<File> {
    let page_map = File::open(format!("/proc/{pid}/pagemap"))?;
    let into = File::from(memfd_create(c"working-set", MFdFlags::MFD_CLOEXEC)?);
    let request = Request::new(LEARN, "vm.working_set").set("page_map", "fd:0").set("into", "fd:1");
    send_with_descriptors(link, request, &[page_map.as_fd(), into.as_fd()])?;
    Ok(into)
}

/// The final answer to the one request of a connection, all of which has to come within that time.
fn read_answer(mut stream: &UnixStream, within: Duration) -> Result<Fields, CaptureError> {
    let until = Instant::now() + within;
    let mut left = ANSWER_BYTES;
    let mut decoder = crate::wire::Decoder::new();
    let mut octets = [0; 4096];
    loop {
        match decoder.next() {
            Some(Decoded::Message(Message::Ok { fields, .. })) => return Ok(fields),
            Some(Decoded::Message(Message::Err { error, .. })) => {
                return Err(CaptureError::Refused(claims::error(error)));
            }
            Some(_) => continue,
            None => {}
        }
        let wait = until.saturating_duration_since(Instant::now());
        if wait.is_zero() || left == 0 {
            let message = format!("no answer within {} s and {ANSWER_BYTES} octets", within.as_secs());
            return Err(io::Error::new(io::ErrorKind::TimedOut, message).into());
        }
        stream.set_read_timeout(Some(wait))?;
        let count = stream.read(&mut octets)?;
        left = left.saturating_sub(count);
        match count {
            0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            count => decoder.push(&octets[..count]),
        }
    }
}

/// How long a worker may take to hold its guest: longer than it gives itself.
const CAPTURE: Duration = Duration::from_secs(30);
/// How long it may take to say what it is.
const GREETING: Duration = Duration::from_secs(5);
/// Octets of everything that comes before an answer, and of it.
const ANSWER_BYTES: usize = 256 * 1024;

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
                reason: claims::sentence(fields.get("reason")?),
                detail: claims::sentence(fields.get("detail").unwrap_or_default()),
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
    fn a_worker_that_says_anything_but_an_answer_is_not_listened_to_for_long() {
        use std::io::Write;
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        // Nothing, empty lines, and greetings without end.
        let error = read_answer(&ours, Duration::from_millis(20)).unwrap_err();
        assert!(matches!(&error, CaptureError::Io(e) if e.kind() != io::ErrorKind::UnexpectedEof), "{error:?}");
        for noise in [&b"\n"[..], b"hello item state=waiting\n"] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let flood = noise.repeat(512 * 1024 / noise.len());
            let writer = std::thread::spawn(move || theirs.write_all(&flood));
            let error = read_answer(&ours, Duration::from_secs(600)).unwrap_err();
            assert!(matches!(&error, CaptureError::Io(e) if e.kind() == io::ErrorKind::TimedOut), "{error:?}");
            drop(ours);
            assert!(writer.join().unwrap().is_err(), "not all of it was read");
        }
        theirs.write_all(b"hello ok overlay=one\n").unwrap();
        assert_eq!(read_answer(&ours, GREETING).unwrap().get("overlay"), Some("one"));
    }

    #[test]
    fn a_process_maps_its_program_and_not_another_file() {
        let (own, pid) = (File::open("/proc/self/exe").unwrap(), std::process::id() as i32);
        assert!(maps(pid, &own).unwrap());
        assert!(!maps(pid, &File::open("/proc/self/status").unwrap()).unwrap());
        assert!(maps(0, &own).is_err());
    }

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
