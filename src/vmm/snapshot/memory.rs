//! A guest's memory as a file: RAM without its hole, zero pages as holes.
//!
//! A flat file has everything. A diff has, as data, each page that a restored guest changed since (zeroes among them);
//! its holes stand for the memory file that the guest was restored from. Which pages those are the kernel tells by the
//! worker's page map (pagemap(7), PAGEMAP_SCAN), whose descriptor comes from the supervisor. A diff has to be made flat
//! before a guest is restored from it: one that is not much shorter than the whole is not worth that.

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;

use crate::vmm::memory::{GuestMemory, PAGE, Region};

/// What is copied at once, in octets.
const CHUNK: usize = 256 << 10;
/// Ranges that one look into the page map gives.
const REGIONS: usize = 1024;

/// <linux/fs.h>: `_IOWR('f', 16, struct pm_scan_arg)`.
pub const PAGEMAP_SCAN: u64 = 0xc060_6610;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// What of the memory is to be written, decided while the guest stands still.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Guest-physical start, offset in the file and length, in octets; in ascending order.
    ranges: Vec<(u64, u64, u64)>,
    /// The file is a diff: zero pages are data too.
    pub is_diff: bool,
}

impl Plan {
    /// Looks which pages there are. Without a page map everything is written, which is right and slower. With `diff`, only
    /// what differs from the file that the guest was restored from, where that is at most half of the whole.
    pub fn new(memory: &GuestMemory, page_map: Option<&File>, diff: bool) -> io::Result<Self> {
        let can_differ = diff && memory.is_restored() && page_map.is_some();
        let (mut whole, mut differing, mut offset) = (Vec::new(), Vec::new(), 0);
        for region in memory.regions() {
            let own = match page_map {
                Some(page_map) => own_pages(region, page_map)?,
                None => vec![(0, region.size)],
            };
            let inside = |at: u64| at.clamp(offset, offset + region.size) - offset;
            let data = memory.file_data().iter().map(|(start, end)| (inside(*start), inside(*end)));
            let data: Vec<(u64, u64)> = data.filter(|(start, end)| start < end).collect();
            let placed = |found: Vec<(u64, u64)>| {
                let place = |(start, end)| (region.guest_addr + start, offset + start, end - start);
                merged(found).into_iter().map(place).collect::<Vec<_>>()
            };
            if can_differ {
                differing.extend(placed([own.clone(), given_up(memory, region, &data)].concat()));
            }
            whole.extend(placed([own, data].concat()));
            offset += region.size;
        }
        let (whole, differing) = (Self { ranges: whole, is_diff: false }, Self { ranges: differing, is_diff: true });
        Ok(if can_differ && differing.bytes() <= whole.bytes() / 2 { differing } else { whole })
    }

    /// Octets that `write` looks at.
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|(_, _, len)| len).sum()
    }

    /// Writes them. Takes no memory beyond `buffer` (`Plan::buffer`), so that a child of a process with threads may.
    pub fn write(&self, memory: &GuestMemory, file: &File, buffer: &mut [u8]) -> io::Result<()> {
        for &(addr, offset, len) in &self.ranges {
            let mut done = 0;
            while done < len {
                let part = usize::try_from(len - done).map_or(buffer.len(), |left| left.min(buffer.len()));
                let octets = &mut buffer[..part];
                memory.read(addr + done, octets).map_err(|_| io::ErrorKind::InvalidInput)?;
                self.write_part(octets, file, offset + done)?;
                done += part as u64;
            }
        }
        Ok(())
    }

    fn write_part(&self, octets: &[u8], file: &File, offset: u64) -> io::Result<()> {
        if self.is_diff {
            return file.write_all_at(octets, offset);
        }
        let page = PAGE as usize;
        let mut start = 0;
        while start < octets.len() {
            let end_of = |at: usize| (at + page).min(octets.len());
            let mut end = start;
            while end < octets.len() && !is_zero(&octets[end..end_of(end)]) {
                end = end_of(end);
            }
            if end > start {
                file.write_all_at(&octets[start..end], offset + start as u64)?;
            }
            start = end;
            while start < octets.len() && is_zero(&octets[start..end_of(start)]) {
                start = end_of(start);
            }
        }
        Ok(())
    }

    /// What `write` copies by.
    pub fn buffer() -> Vec<u8> {
        vec![0; CHUNK]
    }
}

fn is_zero(page: &[u8]) -> bool {
    let (words, rest) = page.as_chunks::<8>();
    words.iter().all(|word| u64::from_ne_bytes(*word) == 0) && rest.iter().all(|octet| *octet == 0)
}

/// The pages of a region that are this process' own, and those that the guest gave up: start and end in the region.
pub(super) fn own_pages(region: &Region, page_map: &File) -> io::Result<Vec<(u64, u64)>> {
    // Neither a file's page nor the page of zeroes.
    pages(region, page_map, PAGE_IS_FILE | PAGE_IS_PFNZERO)
}

/// The pages of a region that are mapped and still its file's: start and end in the region.
pub(super) fn file_pages(region: &Region, page_map: &File) -> io::Result<Vec<(u64, u64)>> {
    pages(region, page_map, PAGE_IS_PFNZERO)
}

/// The pages of a region that are present or swapped, and of those, a file's or not by `inverted`.
fn pages(region: &Region, page_map: &File, inverted: u64) -> io::Result<Vec<(u64, u64)>> {
    let mut found: Vec<(u64, u64)> = Vec::new();
    let end = region.host_addr + region.size;
    let mut at = region.host_addr;
    let mut rows = [PageRegion::default(); REGIONS];
    while at < end {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            start: at,
            end,
            vec: rows.as_mut_ptr() as u64,
            vec_len: REGIONS as u64,
            category_inverted: inverted,
            category_mask: PAGE_IS_FILE | PAGE_IS_PFNZERO,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask: PAGE_IS_PRESENT,
            ..ScanArg::default()
        };
        // SAFETY: the argument is a live structure of the size that it says, and `rows` has as many places as it says.
        let count = unsafe { libc::ioctl(page_map.as_fd().as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        found.extend(rows[..count.min(REGIONS)].iter().map(|row| (row.start, row.end)));
        if arg.walk_end <= at {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the page map does not go on"));
        }
        at = arg.walk_end;
    }
    Ok(found.into_iter().map(|(start, end)| (start - region.host_addr, end - region.host_addr)).collect())
}

/// What the guest gave up of what its file has data for: start and end in the region. Elsewhere it is zero already.
fn given_up(memory: &GuestMemory, region: &Region, data: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut found = Vec::new();
    for (start, end) in memory.given_up(region) {
        let (start, end) = (start - region.host_addr, end - region.host_addr);
        let first = data.partition_point(|(_, data_end)| *data_end <= start);
        let inside = data[first..].iter().take_while(|(data_start, _)| *data_start < end);
        found.extend(inside.map(|(data_start, data_end)| (start.max(*data_start), end.min(*data_end))));
    }
    found
}

/// The same ranges, in ascending order and apart from each other.
fn merged(mut ranges: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    ranges.sort_unstable();
    let mut merged: Vec<(u64, u64)> = Vec::with_capacity(ranges.len());
    for (start, end) in ranges {
        match merged.last_mut() {
            Some((_, last)) if *last >= start => *last = (*last).max(end),
            _ => merged.push((start, end)),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};

    fn file(len: u64) -> File {
        let file = File::from(memfd_create(c"memory", MFdFlags::empty()).unwrap());
        file.set_len(len).unwrap();
        file
    }

    fn page_map() -> File {
        File::open("/proc/self/pagemap").unwrap()
    }

    fn has_scan() -> bool {
        Plan::new(&GuestMemory::new(PAGE).unwrap(), Some(&page_map()), true).is_ok()
    }

    fn contents(file: &File) -> Vec<u8> {
        let mut octets = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut octets, 0).unwrap();
        octets
    }

    #[test]
    fn all_that_is_not_zero_is_written_and_comes_back() {
        let len = 8 << 20;
        let memory = GuestMemory::new(len).unwrap();
        memory.write(5 * PAGE + 100, b"here").unwrap();
        memory.write(len - 1, b"z").unwrap();
        for page_map in [None, has_scan().then(page_map)] {
            let plan = Plan::new(&memory, page_map.as_ref(), true).unwrap();
            assert!(!plan.is_diff);
            let saved = file(len);
            plan.write(&memory, &saved, &mut Plan::buffer()).unwrap();
            let restored = GuestMemory::restored(&saved, len).unwrap();
            let mut octets = [0; 4];
            restored.read(5 * PAGE + 100, &mut octets).unwrap();
            assert_eq!(&octets, b"here");
            restored.read(len - 4, &mut octets).unwrap();
            assert_eq!(octets, [0, 0, 0, b'z']);
        }
    }

    #[test]
    fn a_diff_has_what_changed_and_what_was_given_up() {
        if !has_scan() {
            return;
        }
        let len = 4 << 20;
        let below = file(len);
        // The second half of it is a hole.
        below.write_all_at(&vec![7; len as usize / 2], 0).unwrap();
        let memory = GuestMemory::restored(&below, len).unwrap();
        memory.write(2 * PAGE, b"new").unwrap();
        memory.zero(9 * PAGE, PAGE as usize).unwrap();
        let mut octet = [0; 1];
        memory.read(20 * PAGE, &mut octet).unwrap();
        memory.discard(memory.slice(30 * PAGE, 3 * PAGE as usize).unwrap()).unwrap();
        memory.discard(memory.slice(len / 2, len as usize / 4).unwrap()).unwrap();
        memory.read(30 * PAGE, &mut octet).unwrap();
        assert_eq!(octet, [0], "the file's octets must not show again");
        memory.write(31 * PAGE, b"again").unwrap();
        let plan = Plan::new(&memory, Some(&page_map()), true).unwrap();
        assert!(plan.is_diff);
        assert_eq!(plan.bytes(), 5 * PAGE);
        let diff = file(len);
        plan.write(&memory, &diff, &mut Plan::buffer()).unwrap();
        let octets = contents(&diff);
        assert_eq!(&octets[2 * PAGE as usize..][..3], b"new");
        assert_eq!(octets[2 * PAGE as usize + 3], 7, "whole pages");
        assert_eq!(&octets[31 * PAGE as usize..][..5], b"again");
        let half = vec![7; len as usize / 2];
        assert!(contents(&below)[..half.len()] == half, "the file below is as it was");
        let mut whole = vec![7; len as usize];
        memory.read(0, &mut whole).unwrap();
        let plan = Plan::new(&memory, Some(&page_map()), false).unwrap();
        let flat = file(len);
        plan.write(&memory, &flat, &mut Plan::buffer()).unwrap();
        assert!(!plan.is_diff && contents(&flat) == whole, "a flat file needs no other");
    }

    #[test]
    fn what_has_changed_for_the_most_part_is_written_as_a_whole() {
        if !has_scan() {
            return;
        }
        let len = 64 * PAGE;
        let below = file(len);
        below.write_all_at(&vec![7; 40 * PAGE as usize], 0).unwrap();
        let memory = GuestMemory::restored(&below, len).unwrap();
        for (pages, is_diff) in [(0, true), (20, true), (21, false), (40, false)] {
            memory.write(0, &vec![8; pages * PAGE as usize]).unwrap();
            let plan = Plan::new(&memory, Some(&page_map()), true).unwrap();
            assert_eq!(plan.is_diff, is_diff, "{pages} pages of 40");
            assert_eq!(plan.bytes(), if is_diff { pages as u64 } else { 40 } * PAGE);
        }
    }
}
