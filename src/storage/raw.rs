//! A disk that is a regular file or a block device of the host as it is: nothing under it, nothing around it.

use std::fs::File;
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;

use super::overlay::{Sink, Source};
use super::space;

/// Unit of a disk's size where nothing says otherwise, in octets.
pub const SECTOR: u64 = 512;
/// Largest logical sector of a block device that is served, in octets.
const MAX_SECTOR: u64 = 4096;

nix::ioctl_read_bad!(
    /// <linux/fs.h> BLKSSZGET: octets of a logical sector.
    blksszget,
    nix::request_code_none!(0x12, 104),
    libc::c_int
);

/// An open disk. It has one owner and no locks.
#[derive(Debug)]
pub struct RawDisk {
    file: File,
    /// Octets, a multiple of `sector`.
    bytes: u64,
    sector: u64,
    device: bool,
    read_only: bool,
    /// Data was written since the last sync.
    unsynced: bool,
    /// A sync failed: what the kernel dropped then, no later sync covers. Nothing is written any more.
    failed: bool,
}

impl RawDisk {
    /// Opens a disk. The descriptor must be open for reading, and for writing unless `read_only`. What is beyond the
    /// last whole sector is no part of the disk.
    pub fn open(file: File, read_only: bool) -> io::Result<Self> {
        let invalid = |why: String| io::Error::new(ErrorKind::InvalidInput, why);
        let kind = file.metadata()?.file_type();
        let device = kind.is_block_device();
        if !device && !kind.is_file() {
            return Err(invalid("neither a regular file nor a block device".to_string()));
        }
        let sector = if device { logical_sector(&file)? } else { SECTOR };
        if !sector.is_power_of_two() || !(SECTOR..=MAX_SECTOR).contains(&sector) {
            return Err(invalid(format!("logical sectors of {sector} octets: must be {SECTOR} to {MAX_SECTOR}")));
        }
        // For a block device this is its size as well.
        let bytes = (&file).seek(SeekFrom::End(0))? / sector * sector;
        if bytes == 0 {
            return Err(invalid(format!("holds less than one sector of {sector} octets")));
        }
        Ok(Self { file, bytes, sector, device, read_only, unsynced: false, failed: false })
    }

    /// Size of the disk, in octets.
    pub fn disk_bytes(&self) -> u64 {
        self.bytes
    }

    /// Octets of a logical sector: 512 to 4096.
    pub fn sector(&self) -> u64 {
        self.sector
    }

    /// Whether it refuses to be changed.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn check_range(&self, offset: u64, len: u64) -> io::Result<u64> {
        match offset.checked_add(len) {
            Some(end) if end <= self.bytes => Ok(end),
            _ => Err(io::Error::new(ErrorKind::InvalidInput, "beyond the end of the disk")),
        }
    }

    fn check_change(&self, offset: u64, len: u64) -> io::Result<u64> {
        if self.read_only {
            return Err(io::Error::new(ErrorKind::ReadOnlyFilesystem, "the disk is read-only"));
        }
        if self.failed {
            return Err(io::Error::other("an earlier sync of the disk failed"));
        }
        self.check_range(offset, len)
    }

    /// Reads `len` octets at `offset` into `sink`, at any alignment.
    pub fn read(&self, offset: u64, len: usize, mut sink: impl Sink) -> io::Result<()> {
        self.check_range(offset, len as u64)?;
        if len == 0 { Ok(()) } else { sink.fill(0..len, &self.file, offset) }
    }

    /// Writes `len` octets from `source` at `offset`, at any alignment. On an error the range may hold old and new
    /// data mixed.
    pub fn write(&mut self, offset: u64, len: usize, mut source: impl Source) -> io::Result<()> {
        self.check_change(offset, len as u64)?;
        if len == 0 {
            return Ok(());
        }
        self.unsynced = true;
        source.drain(0..len, &self.file, offset)
    }

    /// Gives the whole sectors of a range back to the host. A file reads as zeroes there afterwards; a device as it
    /// chooses.
    pub fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let end = self.check_change(offset, len)?;
        let (start, end) = (offset.next_multiple_of(self.sector), end / self.sector * self.sector);
        if start >= end {
            return Ok(());
        }
        self.unsynced = true;
        if self.device {
            space::discard_sectors(&self.file, start, end - start)
        } else {
            space::punch(&self.file, start, end - start)
        }
    }

    /// Makes a range read as zeroes; with `unmap` its space may be given back.
    pub fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.check_change(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        self.unsynced = true;
        space::zero(&self.file, offset, len, unmap)
    }

    /// Returns when everything written before is on the medium.
    pub fn flush(&mut self) -> io::Result<()> {
        if self.failed {
            return Err(io::Error::other("an earlier sync of the disk failed"));
        }
        if !self.unsynced {
            return Ok(());
        }
        let result = self.file.sync_data();
        match result {
            Ok(()) => self.unsynced = false,
            Err(_) => self.failed = true,
        }
        result
    }
}

fn logical_sector(device: &File) -> io::Result<u64> {
    let mut octets = 0;
    // SAFETY: the descriptor is open for the length of the call, and the kernel writes one int into a live variable.
    unsafe { blksszget(device.as_raw_fd(), &raw mut octets) }?;
    u64::try_from(octets).map_err(|_| ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;
    use crate::vmm::devices::driver::Seed;

    fn file(len: u64) -> File {
        let file = File::from(memfd_create(c"raw-test", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(len).unwrap();
        file
    }

    fn read(disk: &RawDisk, offset: u64, len: usize) -> Vec<u8> {
        let mut octets = vec![0xee; len];
        disk.read(offset, len, &mut octets[..]).unwrap();
        octets
    }

    #[test]
    fn the_disk_ends_with_its_last_whole_sector() {
        let disk = RawDisk::open(file(1234), false).unwrap();
        assert_eq!((disk.disk_bytes(), disk.sector()), (1024, 512));
        assert!(disk.read(1024, 1, &mut [0][..]).is_err());
        assert!(disk.read(u64::MAX, 2, &mut [0; 2][..]).is_err());
        for bad in [file(511), file(0), File::open("/dev/null").unwrap(), File::open("/tmp").unwrap()] {
            assert!(RawDisk::open(bad, true).is_err());
        }
    }

    #[test]
    fn a_read_only_disk_refuses_every_change_although_its_file_is_writable() {
        let file = file(8192);
        file.write_all_at(&[7; 8192], 0).unwrap();
        let mut disk = RawDisk::open(file.try_clone().unwrap(), true).unwrap();
        for result in [
            disk.write(0, 1, &[1][..]),
            disk.discard(0, 4096),
            disk.write_zeroes(0, 4096, true),
            disk.write_zeroes(0, 1, false),
        ] {
            assert_eq!(result.unwrap_err().kind(), ErrorKind::ReadOnlyFilesystem);
        }
        disk.flush().unwrap();
        assert_eq!(read(&disk, 0, 8192), [7; 8192]);
    }

    #[test]
    fn a_discarded_range_gives_its_space_back_and_reads_as_zeroes() {
        let file = file(1 << 20);
        let mut disk = RawDisk::open(file.try_clone().unwrap(), false).unwrap();
        disk.write(0, 1 << 20, &vec![9; 1 << 20][..]).unwrap();
        let before = file.metadata().unwrap().blocks();
        disk.discard(4096 + 1, (512 << 10) - 1).unwrap();
        let freed = before - file.metadata().unwrap().blocks();
        assert!(freed * 512 >= (512 << 10) - 4096, "{freed}");
        // The part of a sector at the start stays.
        assert_eq!(read(&disk, 4096 + 511, 2), [9, 0]);
        assert_eq!(read(&disk, 4096 + (512 << 10) - 1, 2), [0, 9]);
        assert_eq!(file.metadata().unwrap().len(), 1 << 20);
        for (offset, len) in [(1 << 20, 1), (0, (1 << 20) + 1), (u64::MAX, 2)] {
            assert!(disk.discard(offset, len).is_err());
            assert!(disk.write_zeroes(offset, len, false).is_err());
        }
    }

    #[test]
    fn a_disk_is_what_a_vector_is() {
        for seed in 0..8 {
            let mut random = Seed(seed);
            let size = (1 + random.below(60)) * SECTOR;
            let mut disk = RawDisk::open(file(size), false).unwrap();
            let mut model = vec![0; size as usize];
            for step in 0..200 {
                let offset = random.below(size);
                let len = random.below(size - offset + 1) as usize;
                let (start, end) = (offset as usize, offset as usize + len);
                match random.below(8) {
                    0..3 => {
                        let new = random.octets(len);
                        disk.write(offset, len, &new[..]).unwrap();
                        model[start..end].copy_from_slice(&new);
                    }
                    3 => {
                        disk.discard(offset, len as u64).unwrap();
                        let (first, last) = (start.next_multiple_of(512), end / 512 * 512);
                        if first < last {
                            model[first..last].fill(0);
                        }
                    }
                    4 => {
                        disk.write_zeroes(offset, len as u64, step % 2 == 0).unwrap();
                        model[start..end].fill(0);
                    }
                    5 => disk.flush().unwrap(),
                    _ => assert!(read(&disk, offset, len) == model[start..end], "seed {seed} step {step}"),
                }
            }
        }
    }
}
