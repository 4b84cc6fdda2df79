//! Which blocks are in a layer.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::format::{BITMAP_OFFSET, OverlayError, while_doing};
use crate::storage::space::next_data;

/// The bitmap is held and written in pages of this many octets.
const PAGE: usize = 4096;
pub(super) const BLOCKS_PER_PAGE: u64 = PAGE as u64 * 8;

/// Pages without a bit take no memory.
pub(super) struct Bitmap {
    pages: Vec<Option<Box<Page>>>,
    /// Pages with bits that are not on the medium.
    dirty: Vec<usize>,
}

struct Page {
    octets: [u8; PAGE],
    dirty: bool,
}

impl Bitmap {
    pub fn new(blocks: u64) -> Self {
        let mut pages = Vec::new();
        pages.resize_with(blocks.div_ceil(BLOCKS_PER_PAGE) as usize, || None);
        Self { pages, dirty: Vec::new() }
    }

    /// Reads the bitmap of a layer of `blocks` blocks; holes are skipped, so that a huge disk of few blocks opens at once.
    pub fn read(file: &File, blocks: u64) -> Result<Self, OverlayError> {
        let mut bitmap = Self::new(blocks);
        let end = BITMAP_OFFSET + blocks.div_ceil(8);
        let mut position = BITMAP_OFFSET;
        while position < end {
            position = next_data(file, position).map_err(while_doing("looking for data in the overlay"))?;
            if position >= end {
                break;
            }
            let index = ((position - BITMAP_OFFSET) / PAGE as u64) as usize;
            let mut octets = [0; PAGE];
            let start = BITMAP_OFFSET + (index * PAGE) as u64;
            file.read_exact_at(&mut octets, start).map_err(while_doing("reading the overlay's bitmap"))?;
            let blocks = (blocks - index as u64 * BLOCKS_PER_PAGE).min(BLOCKS_PER_PAGE) as usize;
            // The last page reaches up to the data; what is beyond the last block must be clear.
            let (whole, rest) = (blocks / 8, blocks % 8);
            let beyond = octets[(whole + usize::from(rest > 0)).min(PAGE)..].iter().any(|&octet| octet != 0)
                || (rest > 0 && octets[whole] >> rest != 0);
            if beyond {
                return Err(OverlayError::BitsBeyondEnd);
            }
            if octets.iter().any(|&octet| octet != 0) {
                bitmap.pages[index] = Some(Box::new(Page { octets, dirty: false }));
            }
            position = start + PAGE as u64;
        }
        Ok(bitmap)
    }

    /// Writes the pages that have new bits. They count as written once `written` was called.
    pub fn write(&self, file: &File) -> io::Result<()> {
        for &index in &self.dirty {
            if let Some(page) = &self.pages[index] {
                file.write_all_at(&page.octets, BITMAP_OFFSET + (index * PAGE) as u64)?;
            }
        }
        Ok(())
    }

    /// What `write` wrote is on the medium.
    pub fn written(&mut self) {
        for index in self.dirty.drain(..) {
            if let Some(page) = &mut self.pages[index] {
                page.dirty = false;
            }
        }
    }

    pub fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// Pages that take memory.
    #[cfg(test)]
    pub fn pages(&self) -> usize {
        self.pages.iter().flatten().count()
    }

    /// The state of `block`, and the first block after it of another state, `end` at most.
    pub fn run(&self, block: u64, end: u64) -> (bool, u64) {
        let state = self.get(block);
        let mut next = block + 1;
        while next < end {
            match &self.pages[(next / BLOCKS_PER_PAGE) as usize] {
                None if state => break,
                None => next = (next / BLOCKS_PER_PAGE + 1) * BLOCKS_PER_PAGE,
                Some(page) => {
                    let bit = (next % BLOCKS_PER_PAGE) as usize;
                    let octet = page.octets[bit / 8];
                    // Most of a bitmap is long runs: they are looked through by words.
                    if bit.is_multiple_of(64)
                        && page.octets[bit / 8..].first_chunk() == Some(&[if state { 0xff } else { 0 }; 8])
                    {
                        next += 64;
                    } else if bit.is_multiple_of(8) && octet == if state { 0xff } else { 0 } {
                        next += 8;
                    } else if (octet >> (bit % 8) & 1 == 1) == state {
                        next += 1;
                    } else {
                        break;
                    }
                }
            }
        }
        (state, next.min(end))
    }

    pub fn get(&self, block: u64) -> bool {
        let bit = (block % BLOCKS_PER_PAGE) as usize;
        match &self.pages[(block / BLOCKS_PER_PAGE) as usize] {
            Some(page) => page.octets[bit / 8] >> (bit % 8) & 1 == 1,
            None => false,
        }
    }

    pub fn set(&mut self, block: u64) {
        let index = (block / BLOCKS_PER_PAGE) as usize;
        let bit = (block % BLOCKS_PER_PAGE) as usize;
        let page = self.pages[index].get_or_insert_with(|| Box::new(Page { octets: [0; PAGE], dirty: false }));
        let mask = 1 << (bit % 8);
        if page.octets[bit / 8] & mask == 0 {
            page.octets[bit / 8] |= mask;
            if !page.dirty {
                page.dirty = true;
                self.dirty.push(index);
            }
        }
    }
}
