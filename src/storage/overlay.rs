//! The private copy-on-write layer of one sandbox's disk over a read-only base.
//!
//! One file, little endian:
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
//! otherwise it comes from the base, and is zeroes where the base has ended. The file is sparse and its
//! length is fixed at creation.
//!
//! Durability: blocks are written at once, but new bits stay in memory until `flush`, which syncs the data,
//! writes the bits, and syncs again. So a bit on the medium always stands for data on the medium, and a
//! process or power lost at any moment costs only what was not flushed. Single blocks that were in the file
//! before are overwritten in place, as on any disk.
//!
//! A discarded block's place becomes a hole, then its bit is set as a written one's would be, so that the base does
//! not show again; where the base has ended, blocks without a bit are zeroes already. Remains of writes whose bits
//! were lost are under the hole too.

use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::space;

/// Unit of copying between base and overlay, in octets.
pub const BLOCK: u64 = 4096;
/// Largest disk, in octets.
pub const MAX_DISK: u64 = 16 << 40;

const MAGIC: &[u8; 8] = b"WARRENOV";
const VERSION: u32 = 1;
const HEADER: usize = 80;
const BITMAP_OFFSET: u64 = 4096;
/// The bitmap is held and written in pages of this many octets.
const PAGE: usize = 4096;
const BLOCKS_PER_PAGE: u64 = PAGE as u64 * 8;

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

/// Why an overlay could not be made or opened.
#[derive(Debug)]
pub enum OverlayError {
    /// The host could not do it.
    Io {
        /// What was being done.
        doing: &'static str,
        /// The host's reason.
        cause: io::Error,
    },
    /// The file does not start as an overlay does.
    NotAnOverlay,
    /// A field of the header has a value that it cannot have.
    Field {
        /// Its name.
        field: &'static str,
        /// As found.
        value: u64,
        /// What may stand there.
        expected: String,
    },
    /// A file is shorter than its header, or the overlay's, says.
    TooShort {
        /// Which file.
        file: &'static str,
        /// As found, in octets.
        len: u64,
        /// Least length, in octets.
        expected: u64,
    },
    /// The bitmap has bits beyond the last block.
    BitsBeyondEnd,
}

impl OverlayError {
    /// Whether the file's contents are at fault rather than the host.
    pub fn is_corrupt(&self) -> bool {
        !matches!(self, Self::Io { .. })
    }
}

impl fmt::Display for OverlayError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io { doing, cause } => write!(f, "{doing}: {cause}"),
            Self::NotAnOverlay => f.write_str("the file is not an overlay"),
            Self::Field { field, value, expected } => {
                write!(f, "overlay header: {field} is {value}, must be {expected}")
            }
            Self::TooShort { file, len, expected } => write!(f, "{file} has {len} octets, needs {expected}"),
            Self::BitsBeyondEnd => f.write_str("the overlay's bitmap has bits beyond the disk's end"),
        }
    }
}

impl std::error::Error for OverlayError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { cause, .. } => Some(cause),
            _ => None,
        }
    }
}

fn while_doing(doing: &'static str) -> impl FnOnce(io::Error) -> OverlayError {
    move |cause| OverlayError::Io { doing, cause }
}

/// The header's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Geometry {
    disk_bytes: u64,
    base_bytes: u64,
    base_sha256: [u8; 32],
}

impl Geometry {
    fn check(&self) -> Result<(), OverlayError> {
        let (disk, base) = (self.disk_bytes, self.base_bytes);
        if disk == 0 || disk % BLOCK != 0 || disk > MAX_DISK {
            let expected = format!("a multiple of {BLOCK} up to {MAX_DISK}");
            return Err(OverlayError::Field { field: "disk size", value: disk, expected });
        }
        if base % BLOCK != 0 || base > disk {
            let expected = format!("a multiple of {BLOCK} up to the disk size of {disk}");
            return Err(OverlayError::Field { field: "base size", value: base, expected });
        }
        Ok(())
    }

    fn blocks(&self) -> u64 {
        self.disk_bytes / BLOCK
    }

    fn data_offset(&self) -> u64 {
        (BITMAP_OFFSET + self.blocks().div_ceil(8)).next_multiple_of(BLOCK)
    }

    fn file_bytes(&self) -> u64 {
        self.data_offset() + self.disk_bytes
    }

    fn encode(&self) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[12..16].copy_from_slice(&(BLOCK as u32).to_le_bytes());
        header[16..24].copy_from_slice(&self.disk_bytes.to_le_bytes());
        header[24..32].copy_from_slice(&self.base_bytes.to_le_bytes());
        header[32..40].copy_from_slice(&BITMAP_OFFSET.to_le_bytes());
        header[40..48].copy_from_slice(&self.data_offset().to_le_bytes());
        header[48..].copy_from_slice(&self.base_sha256);
        header
    }

    fn decode(header: &[u8; BITMAP_OFFSET as usize]) -> Result<Self, OverlayError> {
        let u32_at = |at: usize| u64::from(u32::from_le_bytes([0, 1, 2, 3].map(|i| header[at + i])));
        let u64_at = |at: usize| u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|i| header[at + i]));
        let exact = |field, value, expected: u64| {
            if value == expected {
                Ok(())
            } else {
                Err(OverlayError::Field { field, value, expected: expected.to_string() })
            }
        };
        if &header[..8] != MAGIC {
            return Err(OverlayError::NotAnOverlay);
        }
        exact("version", u32_at(8), u64::from(VERSION))?;
        exact("block size", u32_at(12), BLOCK)?;
        let mut base_sha256 = [0; 32];
        base_sha256.copy_from_slice(&header[48..HEADER]);
        let geometry = Self { disk_bytes: u64_at(16), base_bytes: u64_at(24), base_sha256 };
        geometry.check()?;
        exact("bitmap offset", u64_at(32), BITMAP_OFFSET)?;
        exact("data offset", u64_at(40), geometry.data_offset())?;
        if let Some(&octet) = header[HEADER..].iter().find(|&&octet| octet != 0) {
            exact("reserved octet", u64::from(octet), 0)?;
        }
        Ok(geometry)
    }
}

/// Writes an empty overlay into `file`, whatever it held. Sizes in octets, multiples of `BLOCK`;
/// `base_bytes` at most `disk_bytes`. Nothing is synced: the first flush does that, and a file that was cut
/// by a lost host before is refused by `open`.
pub fn create(file: &File, disk_bytes: u64, base_bytes: u64, base_sha256: [u8; 32]) -> Result<(), OverlayError> {
    let geometry = Geometry { disk_bytes, base_bytes, base_sha256 };
    geometry.check()?;
    file.set_len(0).map_err(while_doing("emptying the overlay"))?;
    file.set_len(geometry.file_bytes()).map_err(while_doing("sizing the overlay"))?;
    file.write_all_at(&geometry.encode(), 0).map_err(while_doing("writing the overlay's header"))
}

/// Which blocks are in the overlay. Pages without a bit take no memory.
struct Bitmap {
    pages: Vec<Option<Box<Page>>>,
    /// Pages with bits that are not on the medium.
    dirty: Vec<usize>,
}

struct Page {
    octets: [u8; PAGE],
    dirty: bool,
}

impl Bitmap {
    fn new(blocks: u64) -> Self {
        let mut pages = Vec::new();
        pages.resize_with(blocks.div_ceil(BLOCKS_PER_PAGE) as usize, || None);
        Self { pages, dirty: Vec::new() }
    }

    /// The state of `block`, and the first block after it of another state, `end` at most.
    fn run(&self, block: u64, end: u64) -> (bool, u64) {
        let state = self.get(block);
        let mut next = block + 1;
        while next < end {
            match &self.pages[(next / BLOCKS_PER_PAGE) as usize] {
                None if state => break,
                None => next = (next / BLOCKS_PER_PAGE + 1) * BLOCKS_PER_PAGE,
                Some(page) => {
                    let bit = (next % BLOCKS_PER_PAGE) as usize;
                    let octet = page.octets[bit / 8];
                    if bit.is_multiple_of(8) && octet == if state { 0xff } else { 0 } {
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

    fn get(&self, block: u64) -> bool {
        let bit = (block % BLOCKS_PER_PAGE) as usize;
        match &self.pages[(block / BLOCKS_PER_PAGE) as usize] {
            Some(page) => page.octets[bit / 8] >> (bit % 8) & 1 == 1,
            None => false,
        }
    }

    fn set(&mut self, block: u64) {
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

/// An open overlay with its base: one disk. It has one owner and no locks.
pub struct Overlay {
    file: File,
    base: File,
    geometry: Geometry,
    bitmap: Bitmap,
    /// Data was written since the last sync.
    unsynced: bool,
    /// A sync failed. The kernel may have dropped the pages it could not write, so no later sync can be
    /// trusted to cover them: nothing is written any more.
    failed: bool,
}

impl fmt::Debug for Overlay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Overlay").field("geometry", &self.geometry).finish_non_exhaustive()
    }
}

impl Overlay {
    /// Opens an overlay (readable and writable) over its base (readable), a regular file or a block device
    /// each. The overlay's contents are checked in full; nothing in it is trusted.
    pub fn open(file: File, base: File) -> Result<Self, OverlayError> {
        let file_len = (&file).seek(SeekFrom::End(0)).map_err(while_doing("measuring the overlay"))?;
        let base_len = (&base).seek(SeekFrom::End(0)).map_err(while_doing("measuring the base"))?;
        let too_short = |file, len, expected| Err(OverlayError::TooShort { file, len, expected });
        if file_len < BITMAP_OFFSET {
            return too_short("the overlay", file_len, BITMAP_OFFSET);
        }
        let mut header = [0; BITMAP_OFFSET as usize];
        file.read_exact_at(&mut header, 0).map_err(while_doing("reading the overlay's header"))?;
        let geometry = Geometry::decode(&header)?;
        if file_len < geometry.file_bytes() {
            return too_short("the overlay", file_len, geometry.file_bytes());
        }
        if base_len < geometry.base_bytes {
            return too_short("the base", base_len, geometry.base_bytes);
        }
        let bitmap = read_bitmap(&file, &geometry)?;
        Ok(Self { file, base, geometry, bitmap, unsynced: false, failed: false })
    }

    /// Size of the disk, in octets.
    pub fn disk_bytes(&self) -> u64 {
        self.geometry.disk_bytes
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
            let (in_overlay, run_end) = self.bitmap.run(position / BLOCK, end.div_ceil(BLOCK));
            let stop = end.min(run_end * BLOCK);
            let within = |from: u64, to: u64| (from - offset) as usize..(to - offset) as usize;
            if in_overlay {
                sink.fill(within(position, stop), &self.file, self.geometry.data_offset() + position)?;
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
        // Only now: a failed write leaves new blocks as they were in the base.
        for block in first..=last {
            self.bitmap.set(block);
        }
        Ok(())
    }

    /// Brings a block of the base into its place here, in full: the place may hold the remains of a write
    /// whose bit was lost. The caller sets the bit once the block has its new data.
    fn copy_up(&self, block: u64) -> io::Result<()> {
        if self.bitmap.get(block) {
            return Ok(());
        }
        let mut octets = [0; BLOCK as usize];
        let offset = block * BLOCK;
        if offset < self.geometry.base_bytes {
            self.base.read_exact_at(&mut octets, offset)?;
        }
        self.file.write_all_at(&octets, self.geometry.data_offset() + offset)
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
        // Only now, as for a write. A hole where the base has ended needs no bit.
        let end = if unmap { blocks.end.min(self.geometry.base_bytes / BLOCK) } else { blocks.end };
        for block in blocks.start..end {
            self.bitmap.set(block);
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
        if self.bitmap.dirty.is_empty() {
            return Ok(());
        }
        for &index in &self.bitmap.dirty {
            if let Some(page) = &self.bitmap.pages[index] {
                let written = self.file.write_all_at(&page.octets, BITMAP_OFFSET + (index * PAGE) as u64);
                // For want of room nothing is lost: the bits are here, and the next flush writes them.
                self.failed = written.as_ref().is_err_and(|e| !space::is_full(e));
                written?;
            }
        }
        self.sync_data()?;
        for index in self.bitmap.dirty.drain(..) {
            if let Some(page) = &mut self.bitmap.pages[index] {
                page.dirty = false;
            }
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

/// Reads the bitmap; holes are skipped, so that a huge disk of few blocks opens at once.
fn read_bitmap(file: &File, geometry: &Geometry) -> Result<Bitmap, OverlayError> {
    let mut bitmap = Bitmap::new(geometry.blocks());
    let end = BITMAP_OFFSET + geometry.blocks().div_ceil(8);
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
        let blocks = (geometry.blocks() - index as u64 * BLOCKS_PER_PAGE).min(BLOCKS_PER_PAGE) as usize;
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

/// The first offset from `from` on that may hold data; the end of the file when none does.
fn next_data(file: &File, from: u64) -> io::Result<u64> {
    use nix::errno::Errno;
    use nix::unistd::{Whence, lseek};
    match lseek(file, from as i64, Whence::SeekData) {
        Ok(at) => Ok(at.max(from as i64) as u64),
        Err(Errno::ENXIO) => Ok(u64::MAX),
        // A block device or a file system that does not know holes.
        Err(Errno::EINVAL) => Ok(from),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests;
