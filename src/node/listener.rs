//! The control socket itself.

use std::fs;
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};

use mio::net::{UnixListener, UnixStream};
use nix::unistd::geteuid;

use crate::sentinel;
use crate::wire::{Code, Error, Message};

/// A listening Unix socket that only its owner may use, and the node's sentinel.
#[derive(Debug)]
pub struct Listener {
    listener: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Binds the socket; one that an earlier supervisor left is replaced.
    pub fn bind(path: &Path) -> io::Result<Self> {
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        match fs::remove_file(path) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        // Who is not root has no group to give it to, and no sentinel.
        if geteuid().is_root() {
            chown(path, None, Some(sentinel::USER))?;
            fs::set_permissions(path, fs::Permissions::from_mode(0o660))?;
        }
        Ok(Self { listener, path: path.to_path_buf() })
    }

    /// The descriptor, to register with the loop.
    pub fn descriptor(&self) -> RawFd {
        self.listener.as_raw_fd()
    }

    /// The next connection.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => return Ok(Some(stream)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Tells a connection that is one too many, and closes it.
    pub fn refuse(mut stream: UnixStream, max: u64) {
        let error = Error::new(Code::NoCapacity, format!("{max} clients are connected, the limit of this node"))
            .with("max", max);
        // It gets what its socket takes at once: a fresh one takes this.
        let _ = stream.write(&Message::err("-", error).to_bytes());
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}
