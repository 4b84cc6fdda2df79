//! The guest's physical memory, as the worker sees it.
//!
//! The guest may change any octet at any time, so no Rust reference to guest memory is ever made:
//! access goes through raw pointers, by copies and by atomics, and every address and length is checked
//! first. All threads of the worker share one mapping; `GuestMemory` is a cheap handle to it.
//!
//! Layout: RAM from 0 up to the MMIO gap at 3 GiB, the rest from 4 GiB on.

mod mapping;

use std::fmt;
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use mapping::{Mapping, Restored};

/// Start of the hole in RAM that holds MMIO windows, IOAPIC and LAPIC.
pub const GAP_START: u64 = 3 << 30;
/// End of that hole: RAM goes on here.
pub const GAP_END: u64 = 4 << 30;
/// Granularity of a memory size, in octets.
pub const PAGE: u64 = 4096;
/// Largest memory of a guest, in octets.
pub const MAX_BYTES: u64 = 1 << 40;
/// Slices that one system call takes (`IOV_MAX` of Linux).
pub const MAX_SLICES: usize = 1024;

/// Why guest memory could not be made or reached.
#[derive(Debug)]
pub enum MemoryError {
    /// The size is zero, no multiple of a page, or over `MAX_BYTES`.
    Size {
        /// What was asked for, in octets.
        bytes: u64,
    },
    /// The host did not map it.
    Map {
        /// What was asked for, in octets.
        bytes: u64,
        /// The host's reason.
        cause: io::Error,
    },
    /// A snapshot's memory file is not as long as the guest's memory.
    File {
        /// As found, in octets.
        len: u64,
        /// What was asked for, in octets.
        bytes: u64,
    },
    /// The range is not wholly inside one region of RAM.
    OutOfRange {
        /// Guest-physical start.
        addr: u64,
        /// Length, in octets.
        len: u64,
    },
    /// An atomic access to an address that is no multiple of its size.
    Unaligned {
        /// Guest-physical address.
        addr: u64,
    },
}

impl fmt::Display for MemoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Size { bytes } => {
                write!(f, "guest memory of {bytes} octets: must be a multiple of {PAGE}, from {PAGE} to {MAX_BYTES}")
            }
            Self::Map { bytes, cause } => write!(f, "guest memory of {bytes} octets cannot be mapped: {cause}"),
            Self::File { len, bytes } => write!(f, "a memory file of {len} octets is not one of a guest with {bytes}"),
            Self::OutOfRange { addr, len } => write!(f, "guest range {addr:#x}+{len:#x} is outside of RAM"),
            Self::Unaligned { addr } => write!(f, "guest address {addr:#x} is not aligned"),
        }
    }
}

impl std::error::Error for MemoryError {}

/// One contiguous range of RAM: what becomes one KVM memory slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Guest-physical start; a multiple of `PAGE`.
    pub guest_addr: u64,
    /// Length in octets; a multiple of `PAGE`.
    pub size: u64,
    /// Where it is mapped in this process.
    pub host_addr: u64,
}

struct Inner {
    regions: Vec<Region>,
    /// Keeps the regions mapped; in the order of `regions`.
    _mappings: Vec<Mapping>,
    restored: Option<Restored>,
}

/// A handle to the guest's memory. Clones share the same memory; it is unmapped with the last one.
#[derive(Clone)]
pub struct GuestMemory {
    inner: Arc<Inner>,
}

impl fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestMemory").field("regions", &self.inner.regions).finish()
    }
}

impl GuestMemory {
    /// Maps `bytes` (a multiple of `PAGE`, 1 page to `MAX_BYTES`) of zeroed memory. Pages are taken from the
    /// host when they are first touched.
    pub fn new(bytes: u64) -> Result<Self, MemoryError> {
        Self::map(bytes, None)
    }

    /// The memory of a snapshot: `file` has RAM without its hole, `bytes` long. The file never changes through it, and
    /// must not change otherwise.
    pub fn restored(file: &File, bytes: u64) -> Result<Self, MemoryError> {
        let len = file.metadata().map_err(|cause| MemoryError::Map { bytes, cause })?.len();
        // A page beyond the file's end would kill the process.
        if len != bytes {
            return Err(MemoryError::File { len, bytes });
        }
        Self::map(bytes, Some(file))
    }

    fn map(bytes: u64, file: Option<&File>) -> Result<Self, MemoryError> {
        if bytes == 0 || !bytes.is_multiple_of(PAGE) || bytes > MAX_BYTES {
            return Err(MemoryError::Size { bytes });
        }
        let data = file.map(|file| mapping::data_of(file, bytes)).transpose();
        let data = data.map_err(|cause| MemoryError::Map { bytes, cause })?;
        let low = bytes.min(GAP_START);
        let mut regions = Vec::with_capacity(2);
        let mut mappings = Vec::with_capacity(2);
        for (guest_addr, size) in [(0, low), (GAP_END, bytes - low)] {
            if size == 0 {
                continue;
            }
            let offset = regions.iter().map(|region: &Region| region.size).sum();
            let mapping = match file {
                None => Mapping::new(size as usize),
                Some(file) => Mapping::of_file(size as usize, file, offset, data.as_deref().unwrap_or_default()),
            };
            let mapping = mapping.map_err(|cause| MemoryError::Map { bytes, cause })?;
            regions.push(Region { guest_addr, size, host_addr: mapping.host_addr() });
            mappings.push(mapping);
        }
        Ok(Self { inner: Arc::new(Inner { regions, _mappings: mappings, restored: data.map(Restored::new) }) })
    }

    /// Whether it came from a file.
    pub fn is_restored(&self) -> bool {
        self.inner.restored.is_some()
    }

    /// Where the file of a restored guest has data: offsets, start and end, in ascending order.
    pub fn file_data(&self) -> &[(u64, u64)] {
        self.inner.restored.as_ref().map_or(&[], Restored::data)
    }

    /// What a restored guest gave up of a region so far: host addresses, start and end. In ascending order.
    pub fn given_up(&self, region: &Region) -> Vec<(u64, u64)> {
        let (start, end) = (region.host_addr, region.host_addr + region.size);
        self.inner.restored.as_ref().map_or_else(Vec::new, |restored| restored.given_up(start..end))
    }

    /// The ranges of RAM, in ascending order; one or two.
    pub fn regions(&self) -> &[Region] {
        &self.inner.regions
    }

    /// RAM in all, in octets.
    pub fn size(&self) -> u64 {
        self.regions().iter().map(|r| r.size).sum()
    }

    /// Whether `addr..addr + len` is wholly inside one region.
    pub fn contains(&self, addr: u64, len: u64) -> bool {
        self.host_pointer(addr, len).is_ok()
    }

    /// Where `addr` is in this process, when `len` octets from there on are inside one region.
    fn host_pointer(&self, addr: u64, len: u64) -> Result<*mut u8, MemoryError> {
        for region in &self.inner.regions {
            if let Some(offset) = addr.checked_sub(region.guest_addr)
                && offset <= region.size
                && len <= region.size - offset
            {
                return Ok((region.host_addr + offset) as *mut u8);
            }
        }
        Err(MemoryError::OutOfRange { addr, len })
    }

    /// A checked range for vectored I/O. A length of 0 is fine anywhere inside RAM.
    pub fn slice(&self, addr: u64, len: usize) -> Result<GuestSlice<'_>, MemoryError> {
        let base = self.host_pointer(addr, len as u64)?;
        Ok(GuestSlice { iovec: libc::iovec { iov_base: base.cast(), iov_len: len }, memory: PhantomData })
    }

    /// Copies guest memory into `into`. The guest may be writing meanwhile: the copy is then a mixture.
    pub fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        self.slice(addr, into.len())?.copy_to(into);
        Ok(())
    }

    /// Copies `from` into guest memory.
    pub fn write(&self, addr: u64, from: &[u8]) -> Result<(), MemoryError> {
        self.slice(addr, from.len())?.copy_from(from);
        Ok(())
    }

    /// Sets `len` octets of guest memory to zero.
    pub fn zero(&self, addr: u64, len: usize) -> Result<(), MemoryError> {
        self.slice(addr, len)?.zero();
        Ok(())
    }

    /// Gives the whole pages inside a range back to the host; gives how many octets they were. The one place that
    /// decides how.
    ///
    /// Callers know that the guest gave the range up: it may hold old octets or zeroes afterwards, and what the guest
    /// writes meanwhile may be lost, until this returns. From then on it is ordinary memory again that reads as zeroes
    /// until it is written. An error leaves every octet as it was.
    ///
    /// Dropping pages of anonymous memory makes zeroes. A private mapping of a file would show the file's octets again:
    /// there, fresh anonymous memory is mapped over the range.
    pub fn discard(&self, slice: GuestSlice<'_>) -> io::Result<usize> {
        let start = slice.iovec.iov_base as usize;
        // Inside of a mapping, so that no end is near the end of the address space.
        let (from, to) = (start.next_multiple_of(PAGE as usize), (start + slice.len()) / PAGE as usize * PAGE as usize);
        if from >= to {
            return Ok(0);
        }
        let base = slice.iovec.iov_base.wrapping_byte_add(from - start);
        if let Some(restored) = &self.inner.restored {
            // SAFETY: whole pages of a checked range of one of our mappings, which the slice's borrow keeps alive. No
            // reference to its octets exists, and their change is what every accessor here expects of guest memory.
            unsafe { restored.give_up(base, to - from) }?;
            return Ok(to - from);
        }
        // SAFETY: whole pages of a checked range of a private anonymous mapping that the slice's borrow keeps alive. No
        // reference to its octets exists, and their change is what every accessor here expects of guest memory.
        if unsafe { libc::madvise(base, to - from, libc::MADV_DONTNEED) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(to - from)
    }

    /// Guest-physical address of a range that is given by its offset in the memory file, where one region has all of it.
    pub fn at(&self, mut offset: u64, len: u64) -> Option<u64> {
        for region in self.regions() {
            if offset < region.size {
                return (len <= region.size - offset).then_some(region.guest_addr + offset);
            }
            offset -= region.size;
        }
        None
    }

    /// Makes pages of a restored guest its own, with what its file has in them, before anybody touches them. The range is
    /// whole pages of that file: offset and length, in octets. `false` where it is outside of RAM, or the host has none.
    pub fn make_own(&self, offset: u64, len: u64) -> bool {
        let slice = self.at(offset, len).and_then(|addr| self.slice(addr, len as usize).ok());
        slice.is_some_and(|slice| {
            // SAFETY: a checked range of one of our mappings; its octets stay what they are.
            unsafe { libc::madvise(slice.iovec.iov_base, slice.len(), libc::MADV_POPULATE_WRITE) == 0 }
        })
    }

    fn read_array<const N: usize>(&self, addr: u64) -> Result<[u8; N], MemoryError> {
        let mut octets = [0; N];
        self.read(addr, &mut octets)?;
        Ok(octets)
    }

    /// Reads a little-endian number at any address.
    pub fn read_u16(&self, addr: u64) -> Result<u16, MemoryError> {
        Ok(u16::from_le_bytes(self.read_array(addr)?))
    }

    /// Reads a little-endian number at any address.
    pub fn read_u32(&self, addr: u64) -> Result<u32, MemoryError> {
        Ok(u32::from_le_bytes(self.read_array(addr)?))
    }

    /// Reads a little-endian number at any address.
    pub fn read_u64(&self, addr: u64) -> Result<u64, MemoryError> {
        Ok(u64::from_le_bytes(self.read_array(addr)?))
    }

    /// Writes a little-endian number at any address.
    pub fn write_u16(&self, addr: u64, value: u16) -> Result<(), MemoryError> {
        self.write(addr, &value.to_le_bytes())
    }

    /// Writes a little-endian number at any address.
    pub fn write_u32(&self, addr: u64, value: u32) -> Result<(), MemoryError> {
        self.write(addr, &value.to_le_bytes())
    }

    /// Writes a little-endian number at any address.
    pub fn write_u64(&self, addr: u64, value: u64) -> Result<(), MemoryError> {
        self.write(addr, &value.to_le_bytes())
    }

    /// Loads a ring index: atomic, little endian, at an even address.
    pub fn load_u16(&self, addr: u64, order: Ordering) -> Result<u16, MemoryError> {
        let pointer = self.atomic_u16(addr)?;
        // SAFETY: `atomic_u16` checked range and alignment; the mapping lives as long as `self`. All other
        // accesses of this process to ring indices are atomic too, or come from the guest.
        Ok(u16::from_le(unsafe { AtomicU16::from_ptr(pointer) }.load(order)))
    }

    /// Stores a ring index: atomic, little endian, at an even address.
    pub fn store_u16(&self, addr: u64, value: u16, order: Ordering) -> Result<(), MemoryError> {
        let pointer = self.atomic_u16(addr)?;
        // SAFETY: as in `load_u16`.
        unsafe { AtomicU16::from_ptr(pointer) }.store(value.to_le(), order);
        Ok(())
    }

    fn atomic_u16(&self, addr: u64) -> Result<*mut u16, MemoryError> {
        // Regions start at multiples of a page both in the guest and here, so alignment carries over.
        if !addr.is_multiple_of(2) {
            return Err(MemoryError::Unaligned { addr });
        }
        Ok(self.host_pointer(addr, 2)?.cast())
    }
}

/// A checked range of guest memory, laid out as a `struct iovec`. It borrows the memory, so it cannot
/// outlive the mapping.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct GuestSlice<'m> {
    iovec: libc::iovec,
    memory: PhantomData<&'m GuestMemory>,
}

impl fmt::Debug for GuestSlice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GuestSlice({:p}+{:#x})", self.iovec.iov_base, self.iovec.iov_len)
    }
}

impl<'m> GuestSlice<'m> {
    /// Length, in octets.
    pub fn len(&self) -> usize {
        self.iovec.iov_len
    }

    /// Whether it has no octets.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The octets from `offset` on, `len` at most; both are cut to what there is.
    pub fn part(&self, offset: usize, len: usize) -> GuestSlice<'m> {
        let offset = offset.min(self.len());
        let len = len.min(self.len() - offset);
        let base = self.iovec.iov_base.wrapping_byte_add(offset);
        GuestSlice { iovec: libc::iovec { iov_base: base, iov_len: len }, memory: PhantomData }
    }

    /// Whether `other` lies wholly inside this range.
    pub fn encloses(&self, other: &GuestSlice<'_>) -> bool {
        let (start, inner) = (self.iovec.iov_base as usize, other.iovec.iov_base as usize);
        inner.checked_sub(start).is_some_and(|offset| offset <= self.len() && other.len() <= self.len() - offset)
    }

    /// Copies the first octets out; gives how many (the shorter of the two lengths).
    pub fn copy_to(&self, into: &mut [u8]) -> usize {
        let len = self.len().min(into.len());
        // SAFETY: the slice was checked to be inside a live mapping that `'m` keeps alive, `len` is within
        // both; a Rust buffer never overlaps guest memory, to which no references exist.
        unsafe { ptr::copy_nonoverlapping(self.iovec.iov_base.cast::<u8>(), into.as_mut_ptr(), len) };
        len
    }

    /// Copies octets in at the start; gives how many (the shorter of the two lengths).
    pub fn copy_from(&self, from: &[u8]) -> usize {
        let len = self.len().min(from.len());
        // SAFETY: as in `copy_to`.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), self.iovec.iov_base.cast::<u8>(), len) };
        len
    }

    /// Sets all octets to zero.
    pub fn zero(&self) {
        // SAFETY: as in `copy_to`.
        unsafe { ptr::write_bytes(self.iovec.iov_base.cast::<u8>(), 0, self.len()) };
    }
}

fn check(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn iovecs(slices: &[GuestSlice<'_>]) -> (*const libc::iovec, usize) {
    // `GuestSlice` is transparent over `iovec`. More slices than a call takes make a short transfer.
    (slices.as_ptr().cast(), slices.len().min(MAX_SLICES))
}

/// Reads from a file at `offset` straight into guest memory; gives the octets read, which may be fewer.
pub fn read_at(file: BorrowedFd<'_>, slices: &[GuestSlice<'_>], offset: u64) -> io::Result<usize> {
    let (vector, count) = iovecs(slices);
    let offset = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: `vector` has `count` entries, each a checked range of guest memory that outlives the call.
    check(unsafe { libc::preadv(file.as_raw_fd(), vector, count as i32, offset) })
}

/// Writes guest memory to a file at `offset`; gives the octets written, which may be fewer.
pub fn write_at(file: BorrowedFd<'_>, slices: &[GuestSlice<'_>], offset: u64) -> io::Result<usize> {
    let (vector, count) = iovecs(slices);
    let offset = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: as in `read_at`; the kernel only reads the ranges.
    check(unsafe { libc::pwritev(file.as_raw_fd(), vector, count as i32, offset) })
}

/// Receives from a stream socket straight into guest memory, without waiting. `Ok(0)` is the end of the
/// stream (or no room in `slices`).
pub fn receive(socket: BorrowedFd<'_>, slices: &[GuestSlice<'_>]) -> io::Result<usize> {
    let header = message(slices);
    // SAFETY: `header` points at checked ranges of guest memory that outlive the call, and has neither
    // address nor control buffer.
    check(unsafe { libc::recvmsg(socket.as_raw_fd(), (&raw const header).cast_mut(), libc::MSG_DONTWAIT) })
}

/// Sends guest memory to a stream socket, without waiting and without a SIGPIPE.
pub fn send(socket: BorrowedFd<'_>, slices: &[GuestSlice<'_>]) -> io::Result<usize> {
    let header = message(slices);
    // SAFETY: as in `receive`; the kernel only reads the ranges.
    check(unsafe { libc::sendmsg(socket.as_raw_fd(), &header, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) })
}

/// The same of octets of our own: one system call for both, which the worker's jail lists.
pub fn send_octets(socket: BorrowedFd<'_>, octets: &[u8]) -> io::Result<usize> {
    let mut vector = libc::iovec { iov_base: octets.as_ptr().cast_mut().cast(), iov_len: octets.len() };
    // SAFETY: `msghdr` is plain data for which all zeroes (no name, no control) is a valid value.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    (header.msg_iov, header.msg_iovlen) = (&raw mut vector, 1);
    // SAFETY: `header` points at `octets`, which outlive the call; the kernel only reads them.
    check(unsafe { libc::sendmsg(socket.as_raw_fd(), &header, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) })
}

/// Reads one frame of a packet device into guest memory, and what does not fit there into `rest`; gives its length.
/// A frame that is longer than both is cut.
pub fn read_frame(file: BorrowedFd<'_>, slices: &[GuestSlice<'_>], rest: &mut [u8]) -> io::Result<usize> {
    let rest = libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() };
    let mut vector = VECTOR;
    let count = join(&mut vector, slices.iter().map(|slice| slice.iovec).chain([rest]))?;
    // SAFETY: the first `count` entries of `vector` are set: checked ranges of guest memory, and `rest`, which is
    // borrowed mutably; all outlive the call.
    check(unsafe { libc::readv(file.as_raw_fd(), vector.as_ptr().cast(), count) })
}

/// Writes one frame to a packet device: `head`, then guest memory.
pub fn write_frame<'m>(
    file: BorrowedFd<'_>,
    head: &[u8],
    slices: impl Iterator<Item = GuestSlice<'m>>,
) -> io::Result<usize> {
    let head = libc::iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() };
    let mut vector = VECTOR;
    let count = join(&mut vector, [head].into_iter().chain(slices.map(|slice| slice.iovec)))?;
    // SAFETY: the first `count` entries of `vector` are set: `head` and checked ranges of guest memory, which outlive
    // the call; the kernel only reads them.
    check(unsafe { libc::writev(file.as_raw_fd(), vector.as_ptr().cast(), count) })
}

/// Room for the slices of one call.
type Vector = [MaybeUninit<libc::iovec>; MAX_SLICES];
const VECTOR: Vector = [const { MaybeUninit::uninit() }; MAX_SLICES];

/// Sets the first entries of a vector; gives how many.
fn join(vector: &mut Vector, entries: impl Iterator<Item = libc::iovec>) -> io::Result<i32> {
    let mut count = 0;
    for entry in entries {
        vector.get_mut(count).ok_or(io::ErrorKind::InvalidInput)?.write(entry);
        count += 1;
    }
    Ok(count as i32)
}

/// Fills guest memory from the host's random number generator; gives the octets filled, which may be fewer.
pub fn random(slice: GuestSlice<'_>) -> io::Result<usize> {
    // SAFETY: the slice is a checked range of guest memory that outlives the call.
    check(unsafe { libc::getrandom(slice.iovec.iov_base, slice.len(), 0) })
}

fn message(slices: &[GuestSlice<'_>]) -> libc::msghdr {
    let (vector, count) = iovecs(slices);
    // SAFETY: `msghdr` is plain data for which all zeroes (no name, no control) is a valid value.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = vector.cast_mut();
    header.msg_iovlen = count;
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        for bytes in [0, 1, 4095, 4097, MAX_BYTES + PAGE, u64::MAX] {
            assert!(matches!(GuestMemory::new(bytes), Err(MemoryError::Size { .. })), "{bytes}");
        }
    }

    #[test]
    fn memory_beyond_three_gib_goes_on_at_four_gib() {
        let memory = GuestMemory::new((3 << 30) + (1 << 20)).unwrap();
        let regions = memory.regions();
        assert_eq!(regions.len(), 2);
        assert_eq!((regions[0].guest_addr, regions[0].size), (0, 3 << 30));
        assert_eq!((regions[1].guest_addr, regions[1].size), (4 << 30, 1 << 20));
        assert_eq!(regions[0].host_addr % (2 << 20), 0);
        memory.write_u32((4 << 30) + 8, 0x1234_5678).unwrap();
        assert_eq!(memory.read_u32((4 << 30) + 8).unwrap(), 0x1234_5678);
        assert!(memory.read_u16((3 << 30) - 1).is_err());
        assert!(memory.read_u16(3 << 30).is_err());
        assert!(memory.read_u64((4 << 30) + (1 << 20) - 7).is_err());
    }

    #[test]
    fn ranges_are_checked_to_the_last_octet() {
        let memory = GuestMemory::new(8192).unwrap();
        assert!(memory.contains(0, 8192));
        assert!(memory.contains(8192, 0));
        assert!(!memory.contains(8193, 0));
        assert!(!memory.contains(1, 8192));
        assert!(!memory.contains(u64::MAX, 2));
        assert!(!memory.contains(2, u64::MAX));
        assert!(memory.slice(8191, 1).is_ok());
        assert!(memory.slice(8191, 2).is_err());
    }

    #[test]
    fn indices_need_even_addresses() {
        let memory = GuestMemory::new(4096).unwrap();
        memory.store_u16(2, 0xbeef, Ordering::Release).unwrap();
        assert_eq!(memory.load_u16(2, Ordering::Acquire).unwrap(), 0xbeef);
        assert!(matches!(memory.load_u16(1, Ordering::Acquire), Err(MemoryError::Unaligned { addr: 1 })));
        assert!(memory.load_u16(4096, Ordering::Acquire).is_err());
    }

    #[test]
    fn whole_pages_inside_a_range_are_given_back_and_read_as_zeroes() {
        let memory = GuestMemory::new(64 << 10).unwrap();
        memory.write(0, &[7; 64 << 10]).unwrap();
        assert_eq!(memory.discard(memory.slice(100, 3 * 4096).unwrap()).unwrap(), 2 * 4096);
        assert_eq!(memory.discard(memory.slice(0x8001, 4096).unwrap()).unwrap(), 0);
        assert_eq!(memory.discard(memory.slice(64 << 10, 0).unwrap()).unwrap(), 0);
        let mut octets = [0; 64 << 10];
        memory.read(0, &mut octets).unwrap();
        for (at, octet) in octets.iter().enumerate() {
            assert_eq!(*octet, if (4096..3 * 4096).contains(&at) { 0 } else { 7 }, "{at}");
        }
    }

    #[test]
    fn parts_are_cut_to_what_there_is() {
        let memory = GuestMemory::new(4096).unwrap();
        memory.write(100, b"abcdef").unwrap();
        let slice = memory.slice(100, 6).unwrap();
        let mut octets = [0; 8];
        assert_eq!(slice.part(2, 3).copy_to(&mut octets), 3);
        assert_eq!(&octets[..3], b"cde");
        assert_eq!(slice.part(4, 100).len(), 2);
        assert!(slice.part(7, 1).is_empty());
    }
}
