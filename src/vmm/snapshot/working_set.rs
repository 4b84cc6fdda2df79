//! Which pages of a memory file a restored guest changes at once, every time: made its own before it runs, they cost one
//! call for each run of them; each that the guest meets by itself costs an exit, often two, and a fault.
//!
//! The file: for each run two little-endian 32-bit numbers, its first page (counted in the memory file) and how many
//! pages. It is a hint: what of it cannot be is left out, and a guest without it runs as well.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::memory::own_pages;
use crate::vmm::memory::{GuestMemory, PAGE};

/// Longest file, in octets.
const MAX_BYTES: usize = 128 << 10;
/// Most pages that are made a guest's own before it runs: 32 MiB.
const MAX_PAGES: u64 = 8192;
/// Octets of a run.
const RUN: usize = 8;

/// Runs of pages: first and how many, in ascending order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WorkingSet(Vec<(u32, u32)>);

impl WorkingSet {
    /// What a restored guest has changed so far of the pages that its file has data for. `page_map` is /proc/PID/pagemap of
    /// this process.
    pub fn of(memory: &GuestMemory, page_map: &File) -> io::Result<Self> {
        let mut runs = Vec::new();
        let (data, mut offset) = (memory.file_data(), 0);
        for region in memory.regions() {
            for (start, end) in own_pages(region, page_map)? {
                let (start, end) = (offset + start, offset + end);
                let first = data.partition_point(|(_, data_end)| *data_end <= start);
                for (data_start, data_end) in data[first..].iter().take_while(|(data_start, _)| *data_start < end) {
                    let (start, end) = (start.max(*data_start), end.min(*data_end));
                    runs.push(((start / PAGE) as u32, ((end - start) / PAGE) as u32));
                }
            }
            offset += region.size;
        }
        runs.truncate(MAX_BYTES / RUN);
        Ok(Self(runs))
    }

    /// Pages in all.
    pub fn pages(&self) -> u64 {
        self.0.iter().map(|(_, pages)| u64::from(*pages)).sum()
    }

    /// Writes the file.
    pub fn write(&self, file: &File) -> io::Result<()> {
        let octets: Vec<u8> =
            self.0.iter().flat_map(|(first, pages)| [first.to_le_bytes(), pages.to_le_bytes()]).flatten().collect();
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
        Ok(Self(octets.as_chunks::<RUN>().0.iter().map(|run| (number(run, 0), number(run, 4))).collect()))
    }

    /// Makes the pages the guest's own. Gives how many they were.
    pub fn prepare(&self, memory: &GuestMemory) -> u64 {
        let mut prepared = 0;
        for (first, pages) in &self.0 {
            if prepared + u64::from(*pages) > MAX_PAGES {
                break;
            }
            if memory.make_own(u64::from(*first) * PAGE, u64::from(*pages) * PAGE) {
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
        assert_eq!(set.0, [(3, 2), (9, 1)]);
        let kept = file();
        set.write(&kept).unwrap();
        let next = GuestMemory::restored(&below, len).unwrap();
        assert_eq!(WorkingSet::read(&kept).unwrap(), set);
        assert_eq!(WorkingSet::of(&next, &page_map).unwrap().pages(), 0);
        assert_eq!(set.prepare(&next), 3);
        assert_eq!(WorkingSet::of(&next, &page_map).unwrap(), set);
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
        assert_eq!((set.0.len(), set.prepare(&memory)), (3, 0));
        let set = WorkingSet(vec![(255, 2), (256, 1), (u32::MAX, 1), (254, 2), (0, 0)]);
        assert_eq!(set.prepare(&memory), 2);
        assert_eq!(WorkingSet(vec![(0, 8193)]).prepare(&memory), 0);
        damaged.set_len(1 << 30).unwrap();
        assert_eq!(WorkingSet::read(&damaged).unwrap().0.len(), MAX_BYTES / RUN);
    }
}
