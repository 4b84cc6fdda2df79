use std::cell::RefCell;
use std::io;

use crate::vmm::boot::elf::{KernelFile, load};
use crate::vmm::boot::layout::KERNEL_START;

/// End of the memory of the guest that the kernel is for.
const END: u64 = 16 << 20;

struct Octets<'a> {
    octets: &'a [u8],
    loaded: RefCell<Vec<(u64, u64)>>,
}

impl KernelFile for Octets<'_> {
    fn octets(&self) -> io::Result<u64> {
        Ok(self.octets.len() as u64)
    }

    fn read_exact_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap();
        into.copy_from_slice(&self.octets[start..start + into.len()]);
        Ok(())
    }

    fn load(&self, offset: u64, addr: u64, len: u64) -> io::Result<()> {
        assert!(offset.checked_add(len).unwrap() <= self.octets.len() as u64, "a segment beyond the file was loaded");
        assert!(addr >= KERNEL_START && addr.checked_add(len).unwrap() <= END, "a segment is outside of memory");
        self.loaded.borrow_mut().push((addr, addr + len));
        Ok(())
    }
}

/// Any octets as a kernel: refused with nothing loaded, or its segments lie inside the file and the memory, none over
/// another, and it is entered in one of them.
pub fn elf(data: &[u8]) {
    let file = Octets { octets: data, loaded: RefCell::default() };
    let result = load(&file, END);
    let mut loaded = file.loaded.into_inner();
    match result {
        Ok(kernel) => {
            assert!(loaded.iter().any(|range| (range.0..range.1).contains(&kernel.entry)));
            assert!(loaded.iter().all(|range| range.1 <= kernel.end) && kernel.end <= END);
            loaded.retain(|range| range.0 < range.1);
            loaded.sort_unstable();
            assert!(loaded.windows(2).all(|pair| pair[0].1 <= pair[1].0), "segments overlap: {loaded:x?}");
        }
        Err(error) => {
            assert!(loaded.is_empty(), "a bad kernel was loaded in part");
            assert!(!error.to_string().is_empty());
        }
    }
}
