//! Space of files and block devices: where there is data, copying it, giving it back, and zeroes without writing them.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};

/// Octets of zeroes written at once where the host has no better way.
const ZEROES: usize = 64 << 10;
/// Octets that are copied at once where the kernel does not.
const COPIED: usize = 256 << 10;
/// Octets that the kernel is asked to copy at once: it looks for signals only between them.
const MOST_COPIED: u64 = 64 << 20;

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

/// The first offset from `from` on that may hold data; `u64::MAX` when none does.
pub fn next_data(file: &File, from: u64) -> io::Result<u64> {
    match seek(file, from, Whence::SeekData) {
        Ok(at) => Ok(at.max(from)),
        Err(Errno::ENXIO) => Ok(u64::MAX),
        // A block device or a file system that does not know holes.
        Err(Errno::EINVAL) => Ok(from),
        Err(errno) => Err(errno.into()),
    }
}

/// The first offset from `from` on that is in a hole, the file's end among them; `from` must hold data.
fn next_hole(file: &File, from: u64) -> io::Result<u64> {
    match seek(file, from, Whence::SeekHole) {
        Ok(at) => Ok(at),
        Err(Errno::EINVAL) => Ok(u64::MAX),
        Err(errno) => Err(errno.into()),
    }
}

fn seek(file: &File, from: u64, whence: Whence) -> Result<u64, Errno> {
    let from = i64::try_from(from).map_err(|_| Errno::EINVAL)?;
    // The kernel gives no negative offset.
    lseek(file, from, whence).map(|at| u64::try_from(at).unwrap_or(0))
}

/// The parts of a range that may hold data, in order; what is between them is holes. It uses the file's position.
/// After an error it ends.
pub fn data_extents(file: &File, range: Range<u64>) -> impl Iterator<Item = io::Result<Range<u64>>> {
    let Range { start: mut position, end } = range;
    std::iter::from_fn(move || {
        if position >= end {
            return None;
        }
        let mut find = || {
            let start = next_data(file, position)?.min(end);
            // A hole that is punched meanwhile, by nobody of ours, must not keep us here for ever.
            let stop = if start < end { next_hole(file, start)?.clamp(start + 1, end) } else { end };
            position = stop;
            Ok(start..stop)
        };
        match find() {
            Ok(extent) if extent.is_empty() => None,
            Ok(extent) => Some(Ok(extent)),
            Err(error) => {
                position = end;
                Some(Err(error))
            }
        }
    })
}

/// Copies a range between two files, in the kernel where that can. All of it, or an error; where the first file ends
/// before, `UnexpectedEof`.
pub fn copy(from: &File, mut from_offset: u64, to: &File, mut to_offset: u64, mut len: u64) -> io::Result<()> {
    while len > 0 {
        let copied = match copy_in_kernel(from, from_offset, to, to_offset, len.min(MOST_COPIED) as usize) {
            Err(Errno::EINTR) => continue,
            Ok(copied) if copied > 0 => copied,
            // Nothing: the file has ended, which reading tells, or is one that only tells its length when read.
            Ok(_) | Err(Errno::EXDEV | Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ENOSYS) => {
                return copy_by_hand(from, from_offset, to, to_offset, len);
            }
            Err(errno) => return Err(errno.into()),
        };
        let copied = copied as u64;
        (from_offset, to_offset, len) = (from_offset + copied, to_offset + copied, len - copied);
    }
    Ok(())
}

fn copy_in_kernel(from: &File, from_offset: u64, to: &File, to_offset: u64, len: usize) -> Result<usize, Errno> {
    let signed = |n: u64| i64::try_from(n).map_err(|_| Errno::EOVERFLOW);
    let (mut read, mut write) = (signed(from_offset)?, signed(to_offset)?);
    // Not by the C library's function: the standard library refers to that weakly, and a static program that is linked as one
    // then has it at address 0.
    // SAFETY: both descriptors are open for the length of the call, and the offsets are live variables.
    let copied = unsafe {
        libc::syscall(
            libc::SYS_copy_file_range,
            from.as_raw_fd(),
            &raw mut read,
            to.as_raw_fd(),
            &raw mut write,
            len,
            0,
        )
    };
    Errno::result(copied).map(|copied| copied.unsigned_abs() as usize)
}

fn copy_by_hand(from: &File, mut from_offset: u64, to: &File, mut to_offset: u64, mut len: u64) -> io::Result<()> {
    let mut buffer = vec![0; len.min(COPIED as u64) as usize];
    while len > 0 {
        let step = len.min(COPIED as u64);
        let part = &mut buffer[..step as usize];
        from.read_exact_at(part, from_offset)?;
        to.write_all_at(part, to_offset)?;
        (from_offset, to_offset, len) = (from_offset + step, to_offset + step, len - step);
    }
    Ok(())
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
