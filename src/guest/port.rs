//! A character device as the agent's door: a virtio-serial port, on which the host is there or not.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How long to wait before the next look at a port without a host.
pub(super) const PAUSE: Duration = Duration::from_millis(50);

/// A port, by turns without the host and taken by a connection.
#[derive(Debug)]
pub(super) struct Port {
    path: PathBuf,
    /// Open while the host is not there; a connection owns the descriptor otherwise.
    waiting: Option<File>,
    taken: bool,
}

impl Port {
    /// Opens the device.
    pub(super) fn open(path: &Path) -> std::io::Result<Self> {
        Ok(Self { path: path.to_path_buf(), waiting: Some(open(path)?), taken: false })
    }

    /// Whether the host side is awaited.
    pub(super) fn is_waiting(&self) -> bool {
        !self.taken
    }

    /// The descriptor, when the host side is there.
    pub(super) fn connect(&mut self) -> Option<File> {
        if self.taken {
            return None;
        }
        if self.waiting.is_none() {
            // One that fails is tried again at the next look.
            self.waiting = Some(open(&self.path).ok()?);
        }
        let there = self.waiting.as_ref().is_some_and(|file| {
            let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLIN | PollFlags::POLLOUT)];
            let asked = poll(&mut fds, PollTimeout::ZERO);
            let found = fds.first().and_then(PollFd::revents).unwrap_or(PollFlags::empty());
            asked.is_ok() && !found.contains(PollFlags::POLLHUP)
        });
        if !there {
            return None;
        }
        self.taken = true;
        self.waiting.take()
    }

    /// The connection has ended and its descriptor is closed, which drops what the last host had sent.
    pub(super) fn disconnected(&mut self) {
        self.taken = false;
    }
}

fn open(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)
}
