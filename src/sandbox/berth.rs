//! A home with its worker in it, and nobody else yet: the worker is jailed and waits for `vm.start`.
//!
//! Its id becomes that of the sandbox that moves in: a cgroup cannot be renamed. Nothing records it. A supervisor that
//! finds a home without a sandbox takes it down, and its worker has ended by then, because the one link to it is closed.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use super::home::{Home, Opened};
use super::spawn::{Birth, Spawned, Spawner};
use super::worker;

/// A home whose worker waits.
#[derive(Debug)]
pub struct Berth {
    /// Where.
    pub home: Home,
    /// In the node's pid namespace.
    pub pid: i32,
    /// Becomes readable when the worker has ended.
    pub pidfd: OwnedFd,
    /// The link to it, blocking. The worker ends when it is closed.
    pub link: UnixStream,
    /// Takes the guest's serial log.
    pub serial: File,
}

impl Berth {
    /// Makes a home, or what a worker needs of one that is there, and starts its worker by the user id `uid`. Blocks on the
    /// file system; on failure nothing stays that was not there.
    pub fn make(home: Home, uid: u32, spawner: &Spawner) -> io::Result<Self> {
        let renewed = home.is_there();
        let opened = if renewed { home.renew() } else { home.make() };
        let made = opened.and_then(|opened| Self::try_make(&home, opened, uid, spawner));
        if made.is_err() {
            if renewed { home.release_worker() } else { home.remove() }?;
        }
        made.map(|(spawned, link, serial)| Self { home, pid: spawned.pid, pidfd: spawned.pidfd, link, serial })
    }

    fn try_make(home: &Home, opened: Opened, uid: u32, spawner: &Spawner) -> io::Result<(Spawned, UnixStream, File)> {
        let Opened { serial, last_words, log, listener, cgroup } = opened;
        // Before the worker is there, so that there is no moment in which it would not notice that its maker is gone.
        let link = worker::connect(home.socket())?;
        let birth =
            Birth { cgroup: Some(&cgroup), listener: listener.as_fd(), last_words: &last_words, log: &log, uid };
        Ok((spawner.spawn(&birth)?, link, serial))
    }

    /// Whether its worker lives. Does not wait.
    pub fn is_alive(&self) -> bool {
        let mut poll = libc::pollfd { fd: self.pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one live structure, and no time to wait.
        unsafe { libc::poll(&raw mut poll, 1, 0) == 0 }
    }
}
