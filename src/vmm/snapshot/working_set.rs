//! Which pages of a memory file a restored guest touches at once, every time. Those that it changes are made its own before
//! it runs: one call for each run of them, where each that the guest meets by itself costs an exit, often two, and a fault. In
//! a machine that is prepared before it is asked for the others are mapped as well.
//!
//! The file: for each run two little-endian 32-bit numbers, its first page (counted in the memory file) and how many
//! pages, with the highest bit set where they were read only. It is a hint: what of it cannot be is left out, and a guest without
//! it runs as well.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::memory::{file_pages, own_pages};
use crate::vmm::memory::{GuestMemory, PAGE};

/// Longest file, in octets.
pub const MAX_BYTES: usize = 128 << 10;
/// Most pages that are prepared before a guest runs: 32 MiB.
const MAX_PAGES: u64 = 8192;
/// Octets of a run.
const RUN: usize = 8;
/// Of the second number: these pages were read, and not changed.
const READ: u32 = 1 << 31;

/// What a guest did with pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Touched {
    /// It changed them.
    Changed,
    /// It changed or read them.
    Any,
}

/// Runs of pages: first, how many, and whether they were changed; in ascending order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WorkingSet(Vec<(u32, u32, bool)>);

impl WorkingSet {
    /// What a restored guest has touched so far of the pages that its file has data for. `page_map` is /proc/PID/pagemap of
    /// this process. Pages that the host mapped beside one that was read are among those that were read.
    pub fn of(memory: &GuestMemory, page_map: &File) -> io::Result<Self> {
        let mut runs = Vec::new();
        let (data, mut offset) = (memory.file_data(), 0);
        for region in memory.regions() {
            let own = own_pages(region, page_map)?.into_iter().map(|range| (range, true));
            let read = file_pages(region, page_map)?.into_iter().map(|range| (range, false));
            let mut touched: Vec<_> = own.chain(read).collect();
            touched.sort_unstable();
            for ((start, end), changed) in touched {
                let (start, end) = (offset + start, offset + end);
                let first = data.partition_point(|(_, data_end)| *data_end <= start);
                for (data_start, data_end) in data[first..].iter().take_while(|(data_start, _)| *data_start < end) {
                    let (start, end) = (start.max(*data_start), end.min(*data_end));
                    runs.push(((start / PAGE) as u32, ((end - start) / PAGE) as u32, changed));
                }
            }
            offset += region.size;
        }
        runs.truncate(MAX_BYTES / RUN);
        Ok(Self(runs))
    }

    /// Pages in all that were changed.
    pub fn pages(&self) -> u64 {
        self.0.iter().filter(|(_, _, changed)| *changed).map(|(_, pages, _)| u64::from(*pages)).sum()
    }

    /// Writes the file.
    pub fn write(&self, file: &File) -> io::Result<()> {
        let numbers =
            |(first, pages, changed): &(u32, u32, bool)| [*first, if *changed { *pages } else { *pages | READ }];
        let octets: Vec<u8> = self.0.iter().flat_map(numbers).flat_map(u32::to_le_bytes).collect();
        file.write_all_at(&octets, 0)
    }

    /// Reads a file, whoever wrote it.
    pub fn read(file: &File) -> io::Result<Self> {
        let len = usize::try_from(file.metadata()?.len()).map_or(MAX_BYTES, |len| len.min(MAX_BYTES));
        let mut octets = vec![0; len / RUN * RUN];
        file.read_exact_at(&mut octets, 0)?;
        let number = |octets: &[u8; RUN], at: usize| {
            let word = octets[at..].first_chunk().copied().unwrap_or_default();
            u32::from_le_bytes(word)
        };
        let run = |run: &[u8; RUN]| (number(run, 0), number(run, 4) & !READ, number(run, 4) & READ == 0);
        Ok(Self(octets.as_chunks::<RUN>().0.iter().map(run).collect()))
    }

    /// Prepares the pages that were touched so, by offset and length in the memory file, in octets. Gives how many could be.
    pub fn prepare(&self, touched: Touched, mut one: impl FnMut(u64, u64) -> bool) -> u64 {
        let (mut tried, mut prepared) = (0, 0);
        for (first, pages, _) in self.0.iter().filter(|(_, _, changed)| touched == Touched::Any || *changed) {
            tried += u64::from(*pages);
            if tried > MAX_PAGES {
                break;
            }
            if one(u64::from(*first) * PAGE, u64::from(*pages) * PAGE) {
                prepared += u64::from(*pages);
            }
        }
        prepared
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};

    fn file() -> File {
        File::from(memfd_create(c"set", MFdFlags::empty()).unwrap())
    }

    #[test]
    fn what_one_guest_changed_is_made_the_nexts_own() {
        let (len, below, page_map) = (4 << 20, file(), File::open("/proc/self/pagemap").unwrap());
        below.write_all_at(&vec![7; 2 << 20], 0).unwrap();
        below.set_len(len).unwrap();
        let memory = GuestMemory::restored(&below, len).unwrap();
        memory.write(3 * PAGE, &[1; 2 * PAGE as usize]).unwrap();
        memory.write(9 * PAGE, b"one").unwrap();
        // A page of no file.
        memory.write(3 << 20, b"fresh").unwrap();
        // A kernel without PAGEMAP_SCAN.
        let Ok(set) = WorkingSet::of(&memory, &page_map) else { return };
        let changed: Vec<_> = set.0.iter().filter(|(_, _, changed)| *changed).collect();
        assert_eq!(changed, [&(3, 2, true), &(9, 1, true)]);
        let kept = file();
        set.write(&kept).unwrap();
        let next = GuestMemory::restored(&below, len).unwrap();
        assert_eq!(WorkingSet::read(&kept).unwrap(), set);
        assert_eq!(WorkingSet::of(&next, &page_map).unwrap().pages(), 0);
        assert_eq!(set.prepare(Touched::Changed, |offset, len| next.make_own(offset, len)), 3);
        let own = |set: &WorkingSet| set.0.iter().filter(|run| run.2).copied().collect::<Vec<_>>();
        assert_eq!(own(&WorkingSet::of(&next, &page_map).unwrap()), own(&set));
        let mut octet = [0];
        next.read(3 * PAGE, &mut octet).unwrap();
        assert_eq!(octet, [7], "with the file's contents");
    }

    #[test]
    fn what_cannot_be_is_left_out() {
        let memory = GuestMemory::new(1 << 20).unwrap();
        let damaged = file();
        damaged.write_all_at(&[0xff; 3 * RUN + 5], 0).unwrap();
        let set = WorkingSet::read(&damaged).unwrap();
        let prepare = |set: &WorkingSet, touched| set.prepare(touched, |offset, len| memory.make_own(offset, len));
        assert_eq!((set.0.len(), prepare(&set, Touched::Any)), (3, 0));
        let changed =
            |runs: &[(u32, u32)]| WorkingSet(runs.iter().map(|(first, pages)| (*first, *pages, true)).collect());
        let set = changed(&[(255, 2), (256, 1), (u32::MAX, 1), (254, 2), (0, 0)]);
        assert_eq!(prepare(&set, Touched::Changed), 2);
        assert_eq!(prepare(&changed(&[(0, 8193)]), Touched::Changed), 0);
        // What was only read is nobody's own.
        let kept = file();
        WorkingSet(vec![(0, 3, false), (9, 1, true)]).write(&kept).unwrap();
        let set = WorkingSet::read(&kept).unwrap();
        assert_eq!((set.pages(), prepare(&set, Touched::Changed), prepare(&set, Touched::Any)), (1, 1, 4));
        damaged.set_len(1 << 30).unwrap();
        assert_eq!(WorkingSet::read(&damaged).unwrap().0.len(), MAX_BYTES / RUN);
    }
}
