//! The control protocol over a virtio-serial port: how a developer's host reaches a node in QEMU.
//!
//! A port is one byte stream without connections, so both ends must find the start of a message after either was
//! killed. Two rules do that. The node writes whole messages only, each in one write of at most 32 KiB, which
//! virtio_console takes or refuses as a whole. And on every new host connection the node sends
//! `- item event=port session=NONCE` and ignores all input until the line `- port.sync session=NONCE`.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::sandbox::id::SandboxId;
use crate::wire::{Decoded, Decoder, FRAME, Fields, Filled, Message};

/// The port's name, as QEMU's `virtserialport,name=` gives it.
pub const NAME: &str = "org.warren.control.0";

/// The node's end of the port.
#[derive(Debug)]
pub struct Port {
    file: File,
    decoder: Decoder,
    out: VecDeque<Vec<u8>>,
    queued: usize,
    session: Option<Session>,
}

#[derive(Debug)]
struct Session {
    nonce: String,
    synced: bool,
    /// The end of the input before the synchronising line, at most one line long.
    window: Vec<u8>,
}

impl Port {
    /// Opens the port, non-blocking. Only one process can have it open.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        Ok(Self { file, decoder: Decoder::new(), out: VecDeque::new(), queued: 0, session: None })
    }

    /// The descriptor, to register with the loop.
    pub fn descriptor(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Looks whether the host side is there. `Some(false)`: it went away since the last look, and with it every
    /// request; `Some(true)`: it is new, and was greeted; `None`: as before.
    pub fn look(&mut self) -> io::Result<Option<bool>> {
        let mut fds = [PollFd::new(self.file.as_fd(), PollFlags::POLLIN | PollFlags::POLLOUT)];
        poll(&mut fds, PollTimeout::ZERO)?;
        let away = fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP));
        match (away, self.session.is_some()) {
            (true, true) => {
                self.reset();
                Ok(Some(false))
            }
            (false, false) => {
                self.greet()?;
                Ok(Some(true))
            }
            _ => Ok(None),
        }
    }

    fn reset(&mut self) {
        self.session = None;
        self.decoder = Decoder::new();
        self.out.clear();
        self.queued = 0;
    }

    fn greet(&mut self) -> io::Result<()> {
        self.reset();
        let nonce = SandboxId::random()?.as_str().to_string();
        self.send(&Message::item("-", Fields::new().with("event", "port").with("session", &nonce)));
        self.session = Some(Session { nonce, synced: false, window: Vec::new() });
        Ok(())
    }

    /// Reads once; see `Link::fill`. A host that is away gives `Drained`.
    pub fn fill(&mut self) -> io::Result<Filled> {
        let mut chunk = [0u8; 32 * 1024];
        match self.file.read(&mut chunk) {
            Ok(0) => Ok(Filled::Drained),
            Ok(n) => {
                self.take(&chunk[..n]);
                Ok(Filled::More)
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(Filled::Drained),
            Err(e) => Err(e),
        }
    }

    fn take(&mut self, octets: &[u8]) {
        let Some(session) = &mut self.session else { return };
        if session.synced {
            self.decoder.push(octets);
            return;
        }
        session.window.extend_from_slice(octets);
        let line = format!("\n- port.sync session={}\n", session.nonce);
        match session.window.windows(line.len()).position(|w| w == line.as_bytes()) {
            Some(at) => {
                session.synced = true;
                self.decoder.push(&session.window[at + line.len()..]);
                session.window = Vec::new();
            }
            None => {
                let surplus = session.window.len().saturating_sub(line.len());
                session.window.drain(..surplus);
            }
        }
    }

    /// The next message. A synchronising line that came twice is none.
    #[allow(clippy::should_implement_trait)] // not an iterator: `None` is not the end
    pub fn next(&mut self) -> Option<Decoded> {
        loop {
            match self.decoder.next()? {
                Decoded::Message(Message::Request(request)) if request.verb == "port.sync" => {}
                other => return Some(other),
            }
        }
    }

    /// Queues a message, in frames that fit one write each.
    pub fn send(&mut self, message: &Message) {
        if let Message::Data { tag, channel, payload } = message
            && payload.len() > FRAME
        {
            for piece in payload.chunks(FRAME) {
                self.enqueue(Message::data(tag, channel, piece).to_bytes());
            }
            return;
        }
        self.enqueue(message.to_bytes());
    }

    fn enqueue(&mut self, octets: Vec<u8>) {
        self.queued += octets.len();
        self.out.push_back(octets);
    }

    /// Octets queued toward the host.
    pub fn queued(&self) -> usize {
        self.queued
    }

    /// Writes what the port takes. `Ok(true)` when the queue is empty.
    pub fn flush(&mut self) -> io::Result<bool> {
        while let Some(message) = self.out.front() {
            match self.file.write(message) {
                Ok(n) => {
                    // Only a line over 32 KiB is taken in part: the rest must go next.
                    self.queued -= n;
                    let rest = message.get(n..).filter(|rest| !rest.is_empty()).map(<[u8]>::to_vec);
                    self.out.pop_front();
                    if let Some(rest) = rest {
                        self.out.push_front(rest);
                    }
                }
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return Ok(false),
                Err(e) => return Err(e),
            }
        }
        Ok(true)
    }
}
