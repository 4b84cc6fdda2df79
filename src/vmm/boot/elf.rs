//! Loads an uncompressed Linux kernel: an ELF64 executable with a PVH entry note.
//!
//! The file is treated as hostile: each field is checked before it is used, all arithmetic is checked,
//! loops and buffers are bounded. Only loadable segments are read, straight into guest memory; what is zero
//! in a segment needs no work, since fresh guest memory is zero.
//!
//! Sources: System V ABI (ELF-64 object file format), Xen `public/elfnote.h` and `misc/pvh.pandoc`.

use std::fmt;
use std::io;
use std::ops::Range;

use super::layout::KERNEL_START;

/// Length of the ELF64 file header.
const HEADER_LEN: usize = 64;
/// Length of an ELF64 program header.
const PROGRAM_HEADER_LEN: usize = 56;
/// Most program headers of a kernel; Linux has about six.
const MAX_PROGRAM_HEADERS: usize = 64;
/// Longest note segment that is searched, in octets; Linux' is under 1 KiB.
const MAX_NOTES_LEN: u64 = 64 * 1024;

const MACHINE_X86_64: u16 = 62;
const TYPE_EXEC: u16 = 2;
const TYPE_DYN: u16 = 3;
const SEGMENT_LOAD: u32 = 1;
const SEGMENT_NOTE: u32 = 4;
/// Xen's note with the 32-bit physical entry point, the one that PVH enters at.
const NOTE_PHYS32_ENTRY: u32 = 18;

/// Why a kernel cannot be loaded.
#[derive(Debug)]
pub enum ElfError {
    /// A read of the file or into guest memory failed.
    Read(io::Error),
    /// A structure lies beyond the end of the file.
    Truncated {
        /// Which structure.
        what: &'static str,
        /// Its offset in the file.
        offset: u64,
        /// Its length in octets.
        len: u64,
        /// Length of the file in octets.
        file: u64,
    },
    /// The file is no ELF64 executable for x86-64.
    NotAKernel(&'static str),
    /// A count or length is over its limit.
    TooMany {
        /// What is counted.
        what: &'static str,
        /// How many there are.
        count: u64,
        /// How many there may be.
        limit: u64,
    },
    /// A segment's sizes contradict each other.
    BadSegment {
        /// Number of the program header.
        index: usize,
        /// What is wrong.
        why: &'static str,
    },
    /// A segment lies outside of the memory that a kernel may use.
    OutOfMemory {
        /// Number of the program header.
        index: usize,
        /// Guest-physical range that it wants.
        wants: Range<u64>,
        /// Guest-physical range that there is.
        has: Range<u64>,
    },
    /// Two segments share addresses.
    Overlap {
        /// Number of one program header.
        one: usize,
        /// Number of the other.
        other: usize,
    },
    /// The note of the PVH entry is missing or damaged.
    NoEntry(&'static str),
    /// The entry point lies in no segment.
    EntryOutside(u64),
}

impl fmt::Display for ElfError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read(e) => write!(f, "kernel cannot be read: {e}"),
            Self::Truncated { what, offset, len, file } => {
                write!(f, "kernel is cut off: {what} at {offset:#x}+{len:#x}, but the file has {file:#x} octets")
            }
            Self::NotAKernel(why) => write!(f, "kernel is not an ELF64 x86-64 executable: {why}"),
            Self::TooMany { what, count, limit } => write!(f, "kernel has {what} {count}, over the limit of {limit}"),
            Self::BadSegment { index, why } => write!(f, "kernel segment {index}: {why}"),
            Self::OutOfMemory { index, wants, has } => {
                write!(f, "kernel segment {index} wants memory {wants:#x?}, kernels get {has:#x?}")
            }
            Self::Overlap { one, other } => write!(f, "kernel segments {one} and {other} overlap"),
            Self::NoEntry(why) => write!(f, "kernel has no PVH entry: {why}"),
            Self::EntryOutside(entry) => write!(f, "kernel entry {entry:#x} is in no segment"),
        }
    }
}

impl std::error::Error for ElfError {}

/// Where a kernel comes from: a file, or octets in tests.
pub trait KernelFile {
    /// Length in octets.
    fn octets(&self) -> io::Result<u64>;
    /// Fills `into` from `offset`; the caller has checked both against the length.
    fn read_exact_at(&self, into: &mut [u8], offset: u64) -> io::Result<()>;
    /// Reads `len` octets from `offset` into guest memory at `addr`.
    fn load(&self, offset: u64, addr: u64, len: u64) -> io::Result<()>;
}

/// A loadable segment, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Segment {
    index: usize,
    offset: u64,
    file_len: u64,
    addr: u64,
    end: u64,
}

/// A kernel in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadedKernel {
    /// Guest-physical address of the PVH entry.
    pub entry: u64,
    /// First address after the kernel's last segment, its zeroed part included.
    pub end: u64,
}

/// Checks the kernel and loads its segments into guest memory from 1 MiB up to `memory_end`. Nothing is loaded
/// from a file that fails a check.
pub fn load(file: &impl KernelFile, memory_end: u64) -> Result<LoadedKernel, ElfError> {
    let file_len = file.octets().map_err(ElfError::Read)?;
    let mut header = [0; HEADER_LEN];
    read(file, file_len, "file header", 0, &mut header)?;
    check_identity(&header)?;

    let table_offset = u64_at(&header, 32);
    let entry_len = usize::from(u16_at(&header, 54));
    let count = usize::from(u16_at(&header, 56));
    if entry_len != PROGRAM_HEADER_LEN {
        return Err(ElfError::NotAKernel("its program headers are not 56 octets long"));
    }
    if count > MAX_PROGRAM_HEADERS {
        return Err(ElfError::TooMany {
            what: "program headers",
            count: count as u64,
            limit: MAX_PROGRAM_HEADERS as u64,
        });
    }
    let mut table = [0; MAX_PROGRAM_HEADERS * PROGRAM_HEADER_LEN];
    let table = &mut table[..count * PROGRAM_HEADER_LEN];
    read(file, file_len, "program headers", table_offset, table)?;

    let mut segments: Vec<Segment> = Vec::with_capacity(count);
    let mut entry = None;
    for (index, header) in table.chunks_exact(PROGRAM_HEADER_LEN).enumerate() {
        match u32_at(header, 0) {
            SEGMENT_LOAD => {
                if let Some(segment) = check_segment(index, header, file_len, memory_end)? {
                    if let Some(other) = segments.iter().find(|s| s.addr < segment.end && segment.addr < s.end) {
                        return Err(ElfError::Overlap { one: other.index, other: index });
                    }
                    segments.push(segment);
                }
            }
            SEGMENT_NOTE if entry.is_none() => {
                entry = find_entry(file, file_len, u64_at(header, 8), u64_at(header, 32))?;
            }
            _ => {}
        }
    }
    let entry = entry.ok_or(ElfError::NoEntry("there is no XEN_ELFNOTE_PHYS32_ENTRY"))?;
    if !segments.iter().any(|s| entry >= s.addr && entry < s.addr + s.file_len) {
        return Err(ElfError::EntryOutside(entry));
    }
    for segment in &segments {
        file.load(segment.offset, segment.addr, segment.file_len).map_err(ElfError::Read)?;
    }
    // There is a segment: the entry is in one.
    let end = segments.iter().map(|s| s.end).max().unwrap_or(KERNEL_START);
    Ok(LoadedKernel { entry, end })
}

fn check_identity(header: &[u8; HEADER_LEN]) -> Result<(), ElfError> {
    if header[..4] != *b"\x7fELF" {
        return Err(ElfError::NotAKernel("its first octets are not 7f 45 4c 46"));
    }
    if header[4] != 2 || header[5] != 1 || header[6] != 1 {
        return Err(ElfError::NotAKernel("it is not 64-bit little-endian ELF version 1"));
    }
    if !matches!(u16_at(header, 16), TYPE_EXEC | TYPE_DYN) {
        return Err(ElfError::NotAKernel("it is not an executable"));
    }
    if u16_at(header, 18) != MACHINE_X86_64 {
        return Err(ElfError::NotAKernel("it is for another processor"));
    }
    Ok(())
}

/// Checks one loadable segment; an empty one gives `None`.
fn check_segment(index: usize, header: &[u8], file_len: u64, memory_end: u64) -> Result<Option<Segment>, ElfError> {
    let (offset, addr) = (u64_at(header, 8), u64_at(header, 24));
    let (in_file, in_memory) = (u64_at(header, 32), u64_at(header, 40));
    if in_file > in_memory {
        return Err(ElfError::BadSegment { index, why: "it is larger in the file than in memory" });
    }
    if in_memory == 0 {
        return Ok(None);
    }
    if offset.checked_add(in_file).is_none_or(|end| end > file_len) {
        return Err(ElfError::Truncated { what: "segment", offset, len: in_file, file: file_len });
    }
    let Some(end) = addr.checked_add(in_memory) else {
        return Err(ElfError::BadSegment { index, why: "its addresses wrap around" });
    };
    if addr < KERNEL_START || end > memory_end {
        return Err(ElfError::OutOfMemory { index, wants: addr..end, has: KERNEL_START..memory_end });
    }
    Ok(Some(Segment { index, offset, file_len: in_file, addr, end }))
}

/// Looks for the PVH entry in a note segment.
fn find_entry(file: &impl KernelFile, file_len: u64, offset: u64, len: u64) -> Result<Option<u64>, ElfError> {
    if len > MAX_NOTES_LEN {
        return Err(ElfError::TooMany { what: "a note segment of octets:", count: len, limit: MAX_NOTES_LEN });
    }
    let mut notes = vec![0; len as usize];
    read(file, file_len, "note segment", offset, &mut notes)?;
    let mut rest = &notes[..];
    while rest.len() >= 12 {
        let (name_len, desc_len, kind) = (u32_at(rest, 0) as usize, u32_at(rest, 4) as usize, u32_at(rest, 8));
        // Both parts are padded to 4 octets. The lengths are 32 bits wide, so the sums fit a usize.
        let desc_start = 12 + name_len.next_multiple_of(4);
        let desc_end = desc_start + desc_len;
        if desc_end > rest.len() {
            return Err(ElfError::NoEntry("a note runs over the end of its segment"));
        }
        if kind == NOTE_PHYS32_ENTRY && rest[12..12 + name_len] == *b"Xen\0" {
            return match rest[desc_start..desc_end] {
                [a, b, c, d] | [a, b, c, d, 0, 0, 0, 0] => Ok(Some(u64::from(u32::from_le_bytes([a, b, c, d])))),
                _ => Err(ElfError::NoEntry("its note does not hold a 32-bit address")),
            };
        }
        rest = rest.get(desc_end.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(None)
}

/// Reads a structure after a check that the file has it.
fn read(
    file: &impl KernelFile,
    file_len: u64,
    what: &'static str,
    offset: u64,
    into: &mut [u8],
) -> Result<(), ElfError> {
    let len = into.len() as u64;
    if offset.checked_add(len).is_none_or(|end| end > file_len) {
        return Err(ElfError::Truncated { what, offset, len, file: file_len });
    }
    file.read_exact_at(into, offset).map_err(ElfError::Read)
}

fn u16_at(octets: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([octets[at], octets[at + 1]])
}

fn u32_at(octets: &[u8], at: usize) -> u32 {
    u32::from(u16_at(octets, at)) | u32::from(u16_at(octets, at + 2)) << 16
}

fn u64_at(octets: &[u8], at: usize) -> u64 {
    u64::from(u32_at(octets, at)) | u64::from(u32_at(octets, at + 4)) << 32
}

#[cfg(test)]
mod tests;
