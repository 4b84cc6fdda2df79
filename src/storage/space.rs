//! Space of files and block devices: giving it back, and zeroes without writing them.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

/// Octets of zeroes written at once where the host has no better way.
const ZEROES: usize = 64 << 10;

nix::ioctl_write_ptr_bad!(
    /// <linux/fs.h> BLKDISCARD: offset and length in octets, multiples of a logical sector.
    blkdiscard,
    nix::request_code_none!(0x12, 119),
    [u64; 2]
);

/// Gives the space of a range of a regular file back; it reads as zeroes then. The length of the file stays.
pub fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    allocate(file, FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE, offset, len)
}

/// Tells a block device that a range, of whole sectors, is not needed any more. What it reads as is the device's
/// choice.
pub fn discard_sectors(device: &File, offset: u64, len: u64) -> io::Result<()> {
    // SAFETY: the descriptor is open for the length of the call, and the kernel reads two u64 from a live array.
    unsafe { blkdiscard(device.as_raw_fd(), &[offset, len]) }.map(drop).map_err(io::Error::from)
}

/// Makes a range of a file or block device read as zeroes, by whatever way is the shortest: with `unmap` its space
/// may be given back, otherwise it stays allocated.
pub fn zero(file: &File, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
    if unmap {
        match punch(file, offset, len) {
            Err(e) if is_unsupported(&e) => {}
            other => return other,
        }
    }
    let flags = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    match allocate(file, flags, offset, len) {
        // A file system without it, or a part of a block device's sector.
        Err(e) if is_unsupported(&e) || e.kind() == ErrorKind::InvalidInput => write_zeroes(file, offset, len),
        other => other,
    }
}

/// Whether the host has no such operation for this file, rather than having failed at it.
pub fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY))
}

/// Whether the host has no room for what was to be written.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}

/// Writes zeroes, octet by octet.
pub fn write_zeroes(file: &File, mut offset: u64, mut len: u64) -> io::Result<()> {
    let zeroes = vec![0; len.min(ZEROES as u64) as usize];
    while len > 0 {
        let step = len.min(ZEROES as u64);
        file.write_all_at(&zeroes[..step as usize], offset)?;
        (offset, len) = (offset + step, len - step);
    }
    Ok(())
}

fn allocate(file: &File, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
    let signed = |n: u64| i64::try_from(n).map_err(|_| io::Error::from(ErrorKind::InvalidInput));
    let (offset, len) = (signed(offset)?, signed(len)?);
    if len == 0 {
        return Ok(());
    }
    loop {
        match fallocate(file, flags, offset, len) {
            Err(Errno::EINTR) => {}
            other => return other.map_err(io::Error::from),
        }
    }
}
