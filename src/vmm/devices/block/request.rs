//! Requests of a block driver, from a chain's readable buffers to checked numbers (virtio 1.2 §5.2.6).
//!
//! Everything is copied out of guest memory once and used from the copy.

use std::io::{self, ErrorKind};

use crate::vmm::devices::segments::Segments;

/// Unit of the driver's addresses, whatever the block size is.
pub const SECTOR: u64 = 512;
/// Octets before a request's data.
pub const HEADER: usize = 16;
/// Ranges of one discard or write-zeroes request.
pub const MAX_RANGES: usize = 32;
/// Most sectors of one range to discard: 1 GiB. Bounds how long a request takes.
pub const MAX_DISCARD: u32 = (1 << 30) / SECTOR as u32;
/// Most sectors of one range to write zeroes to: 64 MiB, as the host may have to write each of them.
pub const MAX_ZEROES: u32 = (64 << 20) / SECTOR as u32;

const RANGE: usize = 16;
const FLAG_UNMAP: u32 = 1;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// What a driver asks for. Places and lengths are in octets; that they are on the disk is the medium's to check.
#[derive(Debug, PartialEq, Eq)]
pub enum Request {
    /// To fill all writable buffers but the last octet.
    Read {
        /// Where from.
        offset: u64,
    },
    /// To write what follows the header.
    Write {
        /// Where to.
        offset: u64,
        /// How much.
        len: usize,
    },
    /// Everything written is to be on the medium.
    Flush,
    /// The disk's name.
    GetId,
    /// The ranges are not needed any more.
    Discard(Ranges),
    /// The ranges are to read as zeroes.
    WriteZeroes(Ranges),
    /// Nothing that this device knows, or with flags that it does not know.
    Unsupported,
}

/// One range of a discard or write-zeroes request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Range {
    /// Start.
    pub offset: u64,
    /// Length.
    pub len: u64,
    /// Its space may be given back.
    pub unmap: bool,
}

/// The ranges of one request: 1 to `MAX_RANGES`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ranges {
    ranges: [Range; MAX_RANGES],
    count: usize,
}

impl std::ops::Deref for Ranges {
    type Target = [Range];

    fn deref(&self) -> &[Range] {
        &self.ranges[..self.count]
    }
}

fn invalid(why: &'static str) -> io::Error {
    io::Error::new(ErrorKind::InvalidInput, why)
}

impl Request {
    /// Reads a request; `data_in` is how much the driver wants to be filled.
    pub fn parse(readable: &Segments<'_>, data_in: usize) -> io::Result<Self> {
        let mut header = [0; HEADER];
        if readable.copy_to(0, &mut header) < HEADER {
            return Err(invalid("request without a whole header"));
        }
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let len = readable.len() - HEADER;
        Ok(match u32::from_le_bytes([t0, t1, t2, t3]) {
            T_IN => Self::Read { offset: place(sector, data_in)? },
            T_OUT => Self::Write { offset: place(sector, len)?, len },
            T_FLUSH => Self::Flush,
            T_GET_ID => Self::GetId,
            T_DISCARD => match Ranges::parse(readable, len, MAX_DISCARD)? {
                // §5.2.6.2: a discard with the unmap flag is not supported, nor is any unknown flag.
                Some(ranges) if !ranges.iter().any(|range| range.unmap) => Self::Discard(ranges),
                _ => Self::Unsupported,
            },
            T_WRITE_ZEROES => Ranges::parse(readable, len, MAX_ZEROES)?.map_or(Self::Unsupported, Self::WriteZeroes),
            _ => Self::Unsupported,
        })
    }
}

impl Ranges {
    /// Reads `len` octets of ranges; `None` when one has a flag that nobody knows.
    fn parse(readable: &Segments<'_>, len: usize, max_sectors: u32) -> io::Result<Option<Self>> {
        if len == 0 || !len.is_multiple_of(RANGE) {
            return Err(invalid("ranges of a length that is no multiple of one"));
        }
        if len > MAX_RANGES * RANGE {
            return Err(invalid("more ranges than the device takes"));
        }
        let mut octets = [0; MAX_RANGES * RANGE];
        readable.copy_to(HEADER, &mut octets[..len]);
        let mut ranges = Self { ranges: Default::default(), count: len / RANGE };
        for (range, octets) in ranges.ranges.iter_mut().zip(octets[..len].as_chunks::<RANGE>().0) {
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = *octets;
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            let flags = u32::from_le_bytes(flags);
            if flags & !FLAG_UNMAP != 0 {
                return Ok(None);
            }
            if sectors > max_sectors {
                return Err(invalid("range of more sectors than the device takes"));
            }
            let len = u64::from(sectors) * SECTOR;
            let offset = place(u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]), 0)?;
            *range = Range { offset, len, unmap: flags & FLAG_UNMAP != 0 };
        }
        Ok(Some(ranges))
    }
}

/// Where a request starts on the disk. The disk checks that it ends inside.
fn place(sector: u64, len: usize) -> io::Result<u64> {
    if !(len as u64).is_multiple_of(SECTOR) {
        return Err(invalid("length is no multiple of a sector"));
    }
    sector.checked_mul(SECTOR).ok_or_else(|| invalid("sector number out of range"))
}
