//! What stands behind a block device of a guest.

use std::fs::File;
use std::io;

use super::overlay::{BLOCK, Overlay, OverlayError, Sink, Source};
use super::raw::{RawDisk, SECTOR};

/// One disk. Offsets and lengths are octets; everything beyond the disk's end is refused.
#[derive(Debug)]
pub enum Medium {
    /// A private layer over layers and a base that others may share.
    Overlay(Overlay),
    /// A file or block device as it is.
    Raw(RawDisk),
}

/// Calls the same method of whichever it is.
macro_rules! either {
    ($self:ident, $disk:ident => $call:expr) => {
        match $self {
            Self::Overlay($disk) => $call,
            Self::Raw($disk) => $call,
        }
    };
}

impl Medium {
    /// Size.
    pub fn disk_bytes(&self) -> u64 {
        either!(self, disk => disk.disk_bytes())
    }

    /// Logical sector that the guest is told of, 512 to 4096.
    pub fn sector(&self) -> u64 {
        match self {
            // So that any file system mounts.
            Self::Overlay(_) => SECTOR,
            Self::Raw(disk) => disk.sector(),
        }
    }

    /// What is best discarded at once: less may stay as it is.
    pub fn granularity(&self) -> u64 {
        match self {
            Self::Overlay(_) => BLOCK,
            Self::Raw(disk) => disk.sector(),
        }
    }

    /// Whether it refuses to be changed.
    pub fn is_read_only(&self) -> bool {
        match self {
            Self::Overlay(_) => false,
            Self::Raw(disk) => disk.is_read_only(),
        }
    }

    /// Reads into `sink`.
    pub fn read(&self, offset: u64, len: usize, sink: impl Sink) -> io::Result<()> {
        either!(self, disk => disk.read(offset, len, sink))
    }

    /// Writes from `source`.
    pub fn write(&mut self, offset: u64, len: usize, source: impl Source) -> io::Result<()> {
        either!(self, disk => disk.write(offset, len, source))
    }

    /// Gives whole units of `granularity` in the range back to the host.
    pub fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        either!(self, disk => disk.discard(offset, len))
    }

    /// Makes the range read as zeroes; with `unmap` its space may be given back.
    pub fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        either!(self, disk => disk.write_zeroes(offset, len, unmap))
    }

    /// Returns when everything written before is on the medium.
    pub fn flush(&mut self) -> io::Result<()> {
        either!(self, disk => disk.flush())
    }

    /// Freezes what was written and goes on with an empty layer (`Overlay::push`). A raw disk has no layers: it is
    /// refused.
    pub fn push(&mut self, new_top: File) -> Result<(), OverlayError> {
        match self {
            Self::Overlay(disk) => disk.push(new_top),
            Self::Raw(_) => Err(OverlayError::NotAnOverlay),
        }
    }
}
