//! Devices driven end to end by a driver in the test, over registers and rings in guest memory.

mod balloon;
mod block;
mod hostile;
mod mmio;
mod queue;
mod rate;
mod rng;
mod serial;
mod set;

use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::storage::overlay::{self, BLOCK};

/// An anonymous file of that length.
pub(in crate::vmm::devices) fn scratch(len: u64) -> File {
    let file = File::from(memfd_create(c"device-test", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    file
}

/// Base and overlay of a disk of `blocks` blocks; each block of the base holds its number plus one.
pub(super) fn disk(blocks: u64) -> (File, File) {
    let base = scratch(0);
    for block in 0..blocks {
        base.write_all_at(&[(block as u8).wrapping_add(1); BLOCK as usize], block * BLOCK).unwrap();
    }
    let file = scratch(0);
    overlay::create(&file, blocks * BLOCK, blocks * BLOCK, [0; 32]).unwrap();
    (base, file)
}
