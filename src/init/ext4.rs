//! As much of ext4 as finding and growing the data partition needs (Documentation/filesystems/ext4/super.rst).
//! The disk may hold anything: every number is checked before it is used.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// Where the superblock begins, and how long it is, in octets.
const SUPERBLOCK_AT: u64 = 1024;
const SUPERBLOCK_LEN: usize = 1024;
const MAGIC: u16 = 0xef53;
const INCOMPAT_64BIT: u32 = 0x80;

// Linux: fs/ext4/ext4.h, EXT4_IOC_RESIZE_FS.
nix::ioctl_write_ptr!(ext4_resize, b'f', 16, u64);

/// What a superblock says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// Volume name, at most 16 octets.
    pub label: Vec<u8>,
    /// In octets: 1 KiB to 64 KiB, a power of two.
    pub block_size: u64,
    /// Of the file system, in blocks.
    pub blocks: u64,
}

impl Superblock {
    /// Reads it from a device; `None` where there is no ext4.
    pub fn read(device: &File) -> Option<Self> {
        let mut octets = [0; SUPERBLOCK_LEN];
        device.read_exact_at(&mut octets, SUPERBLOCK_AT).ok()?;
        Self::parse(&octets)
    }

    fn parse(octets: &[u8; SUPERBLOCK_LEN]) -> Option<Self> {
        let u16_at = |at: usize| u16::from_le_bytes([octets[at], octets[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([octets[at], octets[at + 1], octets[at + 2], octets[at + 3]]);
        if u16_at(0x38) != MAGIC {
            return None;
        }
        let shift = u32_at(0x18);
        if shift > 6 {
            return None; // s_log_block_size: 64 KiB at most
        }
        let high = if u32_at(0x60) & INCOMPAT_64BIT != 0 { u32_at(0x150) } else { 0 };
        let blocks = u64::from(high) << 32 | u64::from(u32_at(0x4));
        let block_size = 1024 << shift;
        blocks.checked_mul(block_size).filter(|&octets| octets > 0)?;
        let name = &octets[0x78..0x88];
        let label = name.split(|&b| b == 0).next().unwrap_or_default().to_vec();
        Some(Self { label, block_size, blocks })
    }
}

/// Grows a mounted file system to the size of its device. `mounted` is any file or folder in it. Gives the new
/// size in octets where it grew.
pub fn grow(mounted: &File, mut device: &File, superblock: &Superblock) -> io::Result<Option<u64>> {
    let blocks = device.seek(SeekFrom::End(0))? / superblock.block_size;
    if blocks <= superblock.blocks {
        return Ok(None);
    }
    // SAFETY: the descriptor is open and the kernel reads one u64 from the pointer.
    unsafe { ext4_resize(mounted.as_raw_fd(), &blocks) }?;
    Ok(Some(blocks * superblock.block_size))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn superblock() -> [u8; SUPERBLOCK_LEN] {
        let mut octets = [0; SUPERBLOCK_LEN];
        octets[0x38..0x3a].copy_from_slice(&MAGIC.to_le_bytes());
        octets[0x18] = 2;
        octets[0x4..0x8].copy_from_slice(&16384u32.to_le_bytes());
        octets[0x78..0x83].copy_from_slice(b"warren-data");
        octets
    }

    #[test]
    fn label_and_size_are_read() {
        let found = Superblock::parse(&superblock()).unwrap();
        assert_eq!(found, Superblock { label: b"warren-data".to_vec(), block_size: 4096, blocks: 16384 });
    }

    #[test]
    fn the_high_half_of_the_size_counts_only_with_its_feature() {
        let mut octets = superblock();
        octets[0x150] = 1;
        assert_eq!(Superblock::parse(&octets).unwrap().blocks, 16384);
        octets[0x60] = 0x80;
        assert_eq!(Superblock::parse(&octets).unwrap().blocks, 16384 + (1 << 32));
    }

    #[test]
    fn a_damaged_superblock_is_none() {
        for (at, value) in [(0x38, 0), (0x18, 7), (0x1b, 0xff), (0x5, 0)] {
            let mut octets = superblock();
            octets[at] = value;
            assert_eq!(Superblock::parse(&octets), None, "octet {at:#x}");
        }
        let mut octets = superblock();
        octets[0x60] = 0x80;
        octets[0x150..0x154].fill(0xff); // more octets than 64 bits count
        assert_eq!(Superblock::parse(&octets), None);
        assert_eq!(Superblock::parse(&[0xff; SUPERBLOCK_LEN]), None);
    }

    #[test]
    fn a_label_may_fill_its_field() {
        let mut octets = superblock();
        octets[0x78..0x88].fill(b'x');
        assert_eq!(Superblock::parse(&octets).unwrap().label, [b'x'; 16]);
    }

    #[test]
    fn a_short_device_has_no_file_system() {
        let path = std::env::temp_dir().join(format!("warren-ext4-{}", std::process::id()));
        std::fs::write(&path, [0; 1500]).unwrap();
        let found = Superblock::read(&File::open(&path).unwrap());
        std::fs::remove_file(&path).unwrap();
        assert_eq!(found, None);
    }
}
