use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::Input;
use crate::storage::overlay::{BLOCK, Overlay};

fn scratch() -> File {
    File::from(memfd_create(c"warren-fuzz", MFdFlags::MFD_CLOEXEC).unwrap())
}

/// A file of any contents is refused, or is a disk that reads and writes as one and opens again.
///
/// The first 4 octets: blocks to lengthen the file by, blocks of the base, two for the access.
pub fn overlay(data: &[u8]) {
    let mut input = Input(data);
    let (more, base_blocks) = (u64::from(input.u8()), u64::from(input.u8()));
    let (first, len) = (u64::from(input.u8()) * 97, usize::from(input.u8()) * 61);
    let file = scratch();
    file.write_all_at(input.0, 0).unwrap();
    file.set_len(input.0.len() as u64 + more * BLOCK).unwrap();
    let base = scratch();
    base.set_len(base_blocks * BLOCK).unwrap();
    let Ok(mut overlay) = Overlay::open(file.try_clone().unwrap(), base.try_clone().unwrap()) else {
        return;
    };
    let size = overlay.disk_bytes();
    // The end of the disk, and beyond.
    assert!(overlay.read_at(size, &mut [0]).is_err());
    assert!(overlay.write_at(u64::MAX, &[0; 2]).is_err());
    let offset = first % size;
    let len = len.min((size - offset) as usize);
    let pattern: Vec<u8> = (0..len).map(|n| n as u8 ^ 0x5a).collect();
    overlay.write_at(offset, &pattern).unwrap();
    overlay.flush().unwrap();
    drop(overlay);
    let overlay = Overlay::open(file, base).unwrap();
    let mut back = vec![0; len];
    overlay.read_at(offset, &mut back).unwrap();
    assert_eq!(back, pattern);
}
