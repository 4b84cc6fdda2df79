//! What guest memory is mapped from: fresh anonymous memory, or the file of a snapshot that a restored guest goes on from.
//!
//! Of the latter the worker has to remember more than the mapping: where the file has data, and what the guest gave up, for
//! there the file's octets must not show again.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;
use std::sync::{Mutex, PoisonError};

use super::PAGE;

/// Mappings start at a multiple of this, so that transparent huge pages and KVM's large pages fit.
const HUGE_PAGE: usize = 2 << 20;

/// A hole of a memory file that is shorter, in octets, is mapped with what is around it: each mapping costs a start time.
const LEAST_HOLE: u64 = 512 << 10;

/// An owned private mapping: anonymous memory, or a restored guest's on top of its file.
pub(super) struct Mapping {
    start: *mut libc::c_void,
    len: usize,
}

// SAFETY: the mapping is plain memory without thread affinity; all access to it goes through the checked
// accessors of `GuestMemory`, which make no references and tolerate concurrent change.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` octets (a multiple of a page) of zeroes, in huge pages where that can be.
    pub(super) fn new(len: usize) -> io::Result<Self> {
        let mapping = Self::small(len)?;
        // A fault in guest memory costs an exit and is the largest part of a guest's boot; 15 faults instead of 5,000 took
        // it from 97 to 68 virtual ms, for 5 MiB more of memory. Best effort: it changes no behaviour.
        // SAFETY: the range is our own mapping.
        unsafe { libc::madvise(mapping.start, len, libc::MADV_HUGEPAGE) };
        Ok(mapping)
    }

    /// The same, page by page, at a multiple of `HUGE_PAGE`.
    fn small(len: usize) -> io::Result<Self> {
        let padded = len.checked_add(HUGE_PAGE).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: a fresh private anonymous mapping at an address of the kernel's choice touches nothing
        // that exists.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                padded,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let head = (start as usize).next_multiple_of(HUGE_PAGE) - start as usize;
        let tail = padded - head - len;
        let aligned = start.wrapping_byte_add(head);
        if head > 0 {
            // SAFETY: the first `head` octets of our own mapping; nothing points there.
            unsafe { libc::munmap(start, head) };
        }
        if tail > 0 {
            // SAFETY: the last `tail` octets of our own mapping; nothing points there.
            unsafe { libc::munmap(aligned.wrapping_byte_add(len), tail) };
        }
        // A core dump of a worker is no place for a guest's memory. Best effort: it changes no behaviour.
        // SAFETY: the range is our own mapping.
        unsafe { libc::madvise(aligned, len, libc::MADV_DONTDUMP) };
        Ok(Self { start: aligned, len })
    }

    /// The same over a file, from `offset` (a multiple of a page) on: what is written stays in this process. `data` is where
    /// the file has any. Its large holes stay anonymous memory: a page there is zeroed when it is first written, where one
    /// of the file would be made in the page cache first, and then copied.
    pub(super) fn of_file(len: usize, file: &File, offset: u64, data: &[(u64, u64)]) -> io::Result<Self> {
        let mapping = Self::small(len)?;
        for (start, end) in joined(data, offset, len as u64) {
            let at = libc::off_t::try_from(offset + start).map_err(|_| io::ErrorKind::InvalidInput)?;
            // SAFETY: replaces a part of our own mapping, to which nothing points yet; `Drop` unmaps the whole, whatever it
            // consists of then.
            let mapped = unsafe {
                libc::mmap(
                    mapping.start.wrapping_byte_add(start as usize),
                    (end - start) as usize,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED,
                    file.as_fd().as_raw_fd(),
                    at,
                )
            };
            if mapped == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
        }
        // SAFETY: the range is our own mapping. Best effort, as above.
        unsafe { libc::madvise(mapping.start, len, libc::MADV_DONTDUMP) };
        Ok(mapping)
    }
}

impl Mapping {
    /// Where it begins in this process.
    pub(super) fn host_addr(&self) -> u64 {
        self.start as u64
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `start`/`len` are what is left of our own mapping; accessors borrow the `GuestMemory`
        // that owns it, so none is under way.
        unsafe { libc::munmap(self.start, self.len) };
    }
}

/// What is known of a restored guest's memory beside its mappings.
pub(super) struct Restored {
    /// Where its file has data: offsets, start and end, in ascending order.
    data: Vec<(u64, u64)>,
    /// Host addresses, start and end, of what the guest gave up: such a page is no longer the file's. At most as many as
    /// the kernel lets a process have mappings.
    given_up: Mutex<BTreeMap<u64, u64>>,
}

impl Restored {
    /// Nothing is given up of it yet.
    pub(super) fn new(data: Vec<(u64, u64)>) -> Self {
        Self { data, given_up: Mutex::default() }
    }

    /// Where its file has data: offsets, start and end, in ascending order.
    pub(super) fn data(&self) -> &[(u64, u64)] {
        &self.data
    }

    /// What of a range of host addresses was given up: start and end, in ascending order.
    pub(super) fn given_up(&self, range: Range<u64>) -> Vec<(u64, u64)> {
        let ranges = self.given_up.lock().unwrap_or_else(PoisonError::into_inner);
        ranges.range(range).map(|(start, end)| (*start, *end)).collect()
    }

    /// Puts fresh memory in the place of a range, which is no longer the file's from then on.
    ///
    /// # Safety
    /// The range is whole pages of one of the guest's mappings, and the caller lives with its octets changing.
    pub(super) unsafe fn give_up(&self, base: *mut libc::c_void, len: usize) -> io::Result<()> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        // SAFETY: by the caller's promise; `Drop` of the mapping unmaps the range, whatever it consists of.
        if unsafe { libc::mmap(base, len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) } == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the range is our own mapping. Best effort: it changes no behaviour.
        unsafe { libc::madvise(base, len, libc::MADV_DONTDUMP) };
        let start = base as u64;
        remember(&mut self.given_up.lock().unwrap_or_else(PoisonError::into_inner), start, start + len as u64);
        Ok(())
    }
}

/// Where the first `bytes` octets of a file have data (lseek(2), SEEK_DATA), rounded outwards to pages.
pub(super) fn data_of(file: &File, bytes: u64) -> io::Result<Vec<(u64, u64)>> {
    let seek = |from: u64, whence| -> io::Result<u64> {
        let from = libc::off_t::try_from(from).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: takes plain numbers.
        let at = unsafe { libc::lseek(file.as_raw_fd(), from, whence) };
        u64::try_from(at).map_err(|_| io::Error::last_os_error())
    };
    let (mut found, mut at) = (Vec::new(), 0);
    while at < bytes {
        let start = match seek(at, libc::SEEK_DATA) {
            Ok(start) => start,
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => break,
            Err(e) => return Err(e),
        };
        let end = seek(start, libc::SEEK_HOLE)?;
        found.push((start / PAGE * PAGE, end.next_multiple_of(PAGE).min(bytes)));
        at = end.max(start + 1);
    }
    Ok(found)
}

/// What of the ranges is in the `len` octets from `offset` on, counted from there; those that are close to each other as one.
fn joined(data: &[(u64, u64)], offset: u64, len: u64) -> Vec<(u64, u64)> {
    let inside = |at: u64| at.clamp(offset, offset + len) - offset;
    let mut found: Vec<(u64, u64)> = Vec::new();
    for (start, end) in data.iter().map(|(start, end)| (inside(*start), inside(*end))) {
        match found.last_mut() {
            _ if start == end => {}
            Some((_, last)) if start - *last < LEAST_HOLE => *last = end,
            _ => found.push((start, end)),
        }
    }
    found
}

/// Adds a range to a set of them, which are apart from each other.
fn remember(ranges: &mut BTreeMap<u64, u64>, mut start: u64, mut end: u64) {
    while let Some((&other, &other_end)) = ranges.range(..=end).next_back()
        && other_end >= start
    {
        ranges.remove(&other);
        (start, end) = (start.min(other), end.max(other_end));
    }
    ranges.insert(start, end);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_a_file_are_cut_to_a_mapping_and_joined_over_small_holes() {
        const MIB: u64 = 1 << 20;
        let data = [(0, PAGE), (2 * PAGE, 3 * PAGE), (2 * MIB, 3 * MIB), (5 * MIB, 8 * MIB)];
        assert_eq!(joined(&data, 0, 8 * MIB), [(0, 3 * PAGE), (2 * MIB, 3 * MIB), (5 * MIB, 8 * MIB)]);
        assert_eq!(joined(&data, MIB, 5 * MIB), [(MIB, 2 * MIB), (4 * MIB, 5 * MIB)]);
        assert_eq!(joined(&data, 3 * MIB, MIB), []);
        assert_eq!(joined(&[], 0, MIB), []);
    }
}
