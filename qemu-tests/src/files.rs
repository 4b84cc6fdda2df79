//! Temporary directories and disks that vanish with the test.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

static NEXT: AtomicU64 = AtomicU64::new(0);

/// A directory that is removed with all it holds when dropped.
#[derive(Debug)]
pub struct TempDir(PathBuf);

impl TempDir {
    /// Makes one. Its path is short: a Unix socket's address takes 107 octets.
    pub fn new() -> io::Result<Self> {
        Self::below(&std::env::temp_dir())
    }

    /// Makes one in `parent`.
    pub fn below(parent: &Path) -> io::Result<Self> {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!("warren-test-{}-{number}", std::process::id()));
        fs::create_dir(&path)?;
        Ok(Self(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A disk of the node, in a file of its own, so that it can outlive the machine it was in.
#[derive(Debug)]
pub struct Disk {
    dir: TempDir,
}

impl Disk {
    /// A writable copy of an image, grown (sparsely) to at least `octets`.
    pub fn copy_of(image: &Path, octets: u64) -> io::Result<Self> {
        let disk = Self { dir: TempDir::new()? };
        fs::copy(image, disk.path())?;
        let file = File::options().write(true).open(disk.path())?;
        if file.metadata()?.len() < octets {
            file.set_len(octets)?;
        }
        Ok(disk)
    }

    /// A place for an image that is not there yet.
    pub fn empty() -> io::Result<Self> {
        Ok(Self { dir: TempDir::new()? })
    }

    /// Where a log of what is written to it may be: it goes with the disk.
    pub fn log_path(&self) -> PathBuf {
        self.dir.path().join("writes.log")
    }

    /// The image's file.
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("disk.img")
    }
}
