//! The copy-on-write layers of one sandbox's disk over a read-only base: one that is written, over any number of frozen
//! ones. A block is read from the newest layer that has it.
//!
//! A layer is one file, little endian:
//!
//! | offset | field |
//! |---|---|
//! | 0 | magic `WARRENOV` |
//! | 8 | u32 version, 1 |
//! | 12 | u32 block size, 4096 |
//! | 16 | u64 disk size in octets, a multiple of 4096 |
//! | 24 | u64 base size in octets, a multiple of 4096, at most the disk size |
//! | 32 | u64 offset of the bitmap, 4096 |
//! | 40 | u64 offset of the data, the first multiple of 4096 after the bitmap |
//! | 48 | SHA-256 of the base, 32 octets |
//! | 80 | zeroes up to 4096 |
//!
//! Bit n of the bitmap (octet n / 8, bit n % 8) says that block n is in this file, at data + n × 4096;
//! otherwise it comes from the layer below, at last from the base, and is zeroes where the base has ended. The file is sparse and its
//! length is fixed at creation.
//!
//! Durability: blocks are written at once, but new bits stay in memory until `flush`, which syncs the data,
//! writes the bits, and syncs again. So a bit on the medium always stands for data on the medium, and a
//! process or power lost at any moment costs only what was not flushed. Single blocks that were in the file
//! before are overwritten in place, as on any disk.
//!
//! A discarded block's place becomes a hole, then its bit is set as a written one's would be, so that what is below does
//! not show again; where the base has ended and no layer has the block, it is zeroes already without a bit. Remains
//! of writes whose bits were lost are under the hole too.
//!
//! A frozen layer is never written again. `push` freezes the written layer and puts an empty one on top; `merge` makes one
//! layer of several that follow each other.

mod bitmap;
mod format;
mod frozen;
mod merge;

use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use self::bitmap::Bitmap;
pub use self::format::{BLOCK, MAX_DISK, OverlayError, create};
use self::format::{Geometry, length, while_doing};
use self::frozen::Frozen;
pub use self::merge::merge;
use super::space;

/// Most frozen layers of a disk.
pub const MAX_LAYERS: usize = 64;

/// Where octets of a read go. Ranges are within the buffer that is being read into.
pub trait Sink {
    /// Fills `range` from `file` at `offset`. All of it, or an error.
    fn fill(&mut self, range: Range<usize>, file: &File, offset: u64) -> io::Result<()>;
    /// Sets `range` to zeroes.
    fn zero(&mut self, range: Range<usize>);
}

/// Where octets of a write come from.
pub trait Source {
    /// Writes `range` to `file` at `offset`. All of it, or an error.
    fn drain(&mut self, range: Range<usize>, file: &File, offset: u64) -> io::Result<()>;
}

impl Sink for &mut [u8] {
    fn fill(&mut self, range: Range<usize>, file: &File, offset: u64) -> io::Result<()> {
        file.read_exact_at(&mut self[range], offset)
    }

    fn zero(&mut self, range: Range<usize>) {
        self[range].fill(0);
    }
}

impl Source for &[u8] {
    fn drain(&mut self, range: Range<usize>, file: &File, offset: u64) -> io::Result<()> {
        file.write_all_at(&self[range], offset)
    }
}

/// No more than zeroes.
struct Zeroes;

impl Source for Zeroes {
    fn drain(&mut self, range: Range<usize>, file: &File, offset: u64) -> io::Result<()> {
        space::write_zeroes(file, offset, range.len() as u64)
    }
}

/// Length of a layer's file of a disk of that size, in octets.
pub fn file_bytes(disk_bytes: u64) -> Result<u64, OverlayError> {
    let geometry = Geometry { disk_bytes, base_bytes: 0, base_sha256: [0; 32] };
    geometry.check()?;
    Ok(geometry.file_bytes())
}

/// Whether these files (newest first, readable, at least one) are frozen layers of one disk; gives its size, in octets, and the
/// digest of the base that they were made over.
pub fn check_layers(layers: &[&File]) -> Result<(u64, [u8; 32]), OverlayError> {
    let (geometry, _) = Frozen::share(layers)?;
    Ok((geometry.disk_bytes, geometry.base_sha256))
}

/// Open layers with their base: one disk. It has one owner and no locks.
pub struct Overlay {
    /// The layer that is written.
    file: File,
    frozen: Frozen,
    base: File,
    geometry: Geometry,
    /// Of the layer that is written.
    bitmap: Bitmap,
    /// Data was written since the last sync.
    unsynced: bool,
    /// A sync failed. The kernel may have dropped the pages it could not write, so no later sync can be
    /// trusted to cover them: nothing is written any more.
    failed: bool,
}

impl fmt::Debug for Overlay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Overlay")
            .field("geometry", &self.geometry)
            .field("frozen", &self.frozen.count())
            .finish_non_exhaustive()
    }
}

impl Overlay {
    /// Opens a disk: its top layer (readable and writable), the frozen layers below it (readable; newest first, at most
    /// `MAX_LAYERS`), and the base (readable), a regular file or a block device each. The layers' contents are checked in
    /// full; nothing in them is trusted. All have to be of the same sizes and the same base.
    pub fn open(top: File, layers: Vec<File>, base: File) -> Result<Self, OverlayError> {
        let (geometry, bitmap) = format::read(&top)?;
        let base_len = length(&base).map_err(while_doing("measuring the base"))?;
        if base_len < geometry.base_bytes {
            return Err(OverlayError::TooShort { file: "the base", len: base_len, expected: geometry.base_bytes });
        }
        let frozen = Frozen::open(layers, &geometry)?;
        Ok(Self { file: top, frozen, base, geometry, bitmap, unsynced: false, failed: false })
    }

    /// Freezes the top layer, which becomes the newest frozen one, and goes on with `new_top`: an empty layer of the same
    /// sizes and base (`create`). When it returns, all that was written before is on the medium, and the new layer is.
    /// On an error the disk is as it was, or `failed` as after a flush.
    ///
    /// It syncs: a caller that is in a hurry flushes shortly before, and gives a layer that is on the medium already.
    pub fn push(&mut self, new_top: File) -> Result<(), OverlayError> {
        self.frozen.check_room()?;
        format::check_blank(&new_top, &self.geometry)?;
        new_top.sync_data().map_err(while_doing("syncing the new layer"))?;
        // Also when nothing was written: its header may never have been synced.
        self.unsynced = true;
        self.flush().map_err(while_doing("syncing the layer that is to be frozen"))?;
        let old_top = std::mem::replace(&mut self.file, new_top);
        let old_bitmap = std::mem::replace(&mut self.bitmap, Bitmap::new(self.geometry.blocks()));
        self.frozen.add(old_top, &old_bitmap, &self.geometry)
    }

    /// Frozen layers.
    pub fn layers(&self) -> usize {
        self.frozen.count()
    }

    /// Size of the disk, in octets.
    pub fn disk_bytes(&self) -> u64 {
        self.geometry.disk_bytes
    }

    /// Size of the base, in octets.
    pub fn base_bytes(&self) -> u64 {
        self.geometry.base_bytes
    }

    /// Digest of the base that this overlay was made for.
    pub fn base_sha256(&self) -> [u8; 32] {
        self.geometry.base_sha256
    }

    fn check_range(&self, offset: u64, len: u64) -> io::Result<u64> {
        match offset.checked_add(len) {
            Some(end) if end <= self.geometry.disk_bytes => Ok(end),
            _ => Err(io::Error::new(ErrorKind::InvalidInput, "beyond the end of the disk")),
        }
    }

    /// Reads `len` octets of the disk at `offset` into `sink`, at any alignment: one transfer for each run of
    /// blocks from the same file.
    pub fn read(&self, offset: u64, len: usize, mut sink: impl Sink) -> io::Result<()> {
        let end = self.check_range(offset, len as u64)?;
        let mut position = offset;
        while position < end {
            let (in_top, run_end) = self.bitmap.run(position / BLOCK, end.div_ceil(BLOCK));
            let (layer, run_end) =
                if in_top { (Some(&self.file), run_end) } else { self.frozen.run(position / BLOCK, run_end) };
            let stop = end.min(run_end * BLOCK);
            let within = |from: u64, to: u64| (from - offset) as usize..(to - offset) as usize;
            if let Some(layer) = layer {
                sink.fill(within(position, stop), layer, self.geometry.data_offset() + position)?;
            } else {
                let base_stop = stop.min(self.geometry.base_bytes).max(position);
                if position < base_stop {
                    sink.fill(within(position, base_stop), &self.base, position)?;
                }
                if base_stop < stop {
                    sink.zero(within(base_stop, stop));
                }
            }
            position = stop;
        }
        Ok(())
    }

    /// Writes `len` octets from `source` to the disk at `offset`, at any alignment: one transfer, after at
    /// most two blocks were copied up. On an error the range may hold old and new data mixed.
    pub fn write(&mut self, offset: u64, len: usize, mut source: impl Source) -> io::Result<()> {
        let end = self.check_range(offset, len as u64)?;
        self.check_failed()?;
        if len == 0 {
            return Ok(());
        }
        self.unsynced = true;
        let (first, last) = (offset / BLOCK, (end - 1) / BLOCK);
        if !offset.is_multiple_of(BLOCK) || (first == last && end % BLOCK != 0) {
            self.copy_up(first)?;
        }
        if first != last && end % BLOCK != 0 {
            self.copy_up(last)?;
        }
        source.drain(0..len, &self.file, self.geometry.data_offset() + offset)?;
        // Only now: a failed write leaves new blocks as they were below.
        for block in first..=last {
            self.bitmap.set(block);
        }
        Ok(())
    }

    /// Brings a block from below into its place in the top layer, in full: the place may hold the remains of a write
    /// whose bit was lost. The caller sets the bit once the block has its new data.
    fn copy_up(&self, block: u64) -> io::Result<()> {
        if self.bitmap.get(block) {
            return Ok(());
        }
        let mut octets = [0; BLOCK as usize];
        let (offset, place) = (block * BLOCK, self.geometry.data_offset() + block * BLOCK);
        if let (Some(layer), _) = self.frozen.run(block, block + 1) {
            layer.read_exact_at(&mut octets, place)?;
        } else if offset < self.geometry.base_bytes {
            self.base.read_exact_at(&mut octets, offset)?;
        }
        self.file.write_all_at(&octets, place)
    }

    /// Makes the whole blocks in a range read as zeroes and gives their space back. Parts of blocks at its ends
    /// stay as they are.
    pub fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let end = self.check_range(offset, len)?;
        self.check_failed()?;
        let (first, last) = (offset.div_ceil(BLOCK), end / BLOCK);
        if first < last { self.clear(first..last, true, space::punch) } else { Ok(()) }
    }

    /// Makes a range read as zeroes, at any alignment; with `unmap` the space of its whole blocks is given back.
    pub fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let end = self.check_range(offset, len)?;
        self.check_failed()?;
        let (first, last) = (offset.div_ceil(BLOCK), end / BLOCK);
        if first >= last {
            return self.write(offset, len as usize, Zeroes);
        }
        self.write(offset, (first * BLOCK - offset) as usize, Zeroes)?;
        self.clear(first..last, unmap, |file, offset, len| space::zero(file, offset, len, unmap))?;
        self.write(last * BLOCK, (end - last * BLOCK) as usize, Zeroes)
    }

    /// Makes blocks read as zeroes by `how`, which gets their place in the file: a hole that may be given up
    /// (`unmap`), or allocated zeroes.
    fn clear(
        &mut self,
        blocks: Range<u64>,
        unmap: bool,
        how: impl FnOnce(&File, u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        self.unsynced = true;
        let (offset, len) = (self.geometry.data_offset() + blocks.start * BLOCK, (blocks.end - blocks.start) * BLOCK);
        how(&self.file, offset, len)?;
        // Only now, as for a write. A hole where nothing is below needs no bit.
        let base_end = if unmap { blocks.end.min(self.geometry.base_bytes / BLOCK) } else { blocks.end };
        for block in blocks.start..base_end {
            self.bitmap.set(block);
        }
        let mut block = blocks.start.max(base_end);
        while block < blocks.end {
            let (layer, run_end) = self.frozen.run(block, blocks.end);
            if layer.is_some() {
                (block..run_end).for_each(|block| self.bitmap.set(block));
            }
            block = run_end;
        }
        Ok(())
    }

    fn check_failed(&self) -> io::Result<()> {
        if self.failed { Err(io::Error::other("an earlier sync of the overlay failed")) } else { Ok(()) }
    }

    /// Returns when everything written before is on the medium.
    pub fn flush(&mut self) -> io::Result<()> {
        self.check_failed()?;
        if !self.unsynced {
            return Ok(());
        }
        self.sync()?;
        self.unsynced = false;
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_data()?;
        if self.bitmap.is_dirty() {
            let written = self.bitmap.write(&self.file);
            // For want of room nothing is lost: the bits are here, and the next flush writes them.
            self.failed = written.as_ref().is_err_and(|e| !space::is_full(e));
            written?;
            self.sync_data()?;
            self.bitmap.written();
        }
        Ok(())
    }

    fn sync_data(&mut self) -> io::Result<()> {
        let synced = self.file.sync_data();
        self.failed = synced.is_err();
        synced
    }

    /// Reads into a plain buffer.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.read(offset, into.len(), into)
    }

    /// Writes from a plain buffer.
    pub fn write_at(&mut self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.write(offset, from.len(), from)
    }
}

#[cfg(test)]
mod layer_tests;
#[cfg(test)]
mod tests;
