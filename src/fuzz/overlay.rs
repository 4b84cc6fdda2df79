use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::Input;
use crate::storage::overlay::{self as layers, BLOCK, Overlay};

fn scratch() -> File {
    File::from(memfd_create(c"warren-fuzz", MFdFlags::MFD_CLOEXEC).unwrap())
}

fn share(file: &File) -> File {
    file.try_clone().unwrap()
}

/// A file of any contents is refused, or is a disk that reads and writes as one and opens again, also as a frozen layer
/// and merged. And whatever is done to a disk of layers, it holds what a vector would.
///
/// The first 4 octets: blocks to lengthen the file by, blocks of the base, two for the access.
pub fn overlay(data: &[u8]) {
    steps(data);
    let mut input = Input(data);
    let (more, base_blocks) = (u64::from(input.u8()), u64::from(input.u8()));
    let (first, len) = (u64::from(input.u8()) * 97, usize::from(input.u8()) * 61);
    let file = scratch();
    file.write_all_at(input.0, 0).unwrap();
    file.set_len(input.0.len() as u64 + more * BLOCK).unwrap();
    let base = scratch();
    base.set_len(base_blocks * BLOCK).unwrap();
    let Ok(mut overlay) = Overlay::open(share(&file), Vec::new(), share(&base)) else {
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
    let mut overlay = Overlay::open(share(&file), Vec::new(), share(&base)).unwrap();
    let holds = |overlay: &Overlay| {
        let mut back = vec![0; len];
        overlay.read_at(offset, &mut back).unwrap();
        assert_eq!(back, pattern);
    };
    holds(&overlay);

    let empty = || {
        let new = scratch();
        layers::create(&new, size, overlay.base_bytes(), overlay.base_sha256()).unwrap();
        new
    };
    let (top, other, merged) = (empty(), empty(), scratch());
    overlay.push(top).unwrap();
    holds(&overlay);
    layers::merge(&[&other, &file], &merged).unwrap();
    for layer in [file, merged] {
        let stack = Overlay::open(share(&other), vec![layer], share(&base)).unwrap();
        holds(&stack);
    }
}

/// Blocks of the disk that `steps` works on, of which the first are the base's.
const BLOCKS: u64 = 12;
const BASE_BLOCKS: u64 = 5;

/// Takes the octets as what is done to a disk, three each: what, where, how much.
fn steps(data: &[u8]) {
    const SIZE: usize = (BLOCKS * BLOCK) as usize;
    let new_layer = || {
        let file = scratch();
        layers::create(&file, BLOCKS * BLOCK, BASE_BLOCKS * BLOCK, [9; 32]).unwrap();
        file
    };
    let base = scratch();
    let mut model = vec![0; SIZE];
    model[..(BASE_BLOCKS * BLOCK) as usize].fill(0xba);
    base.write_all_at(&model[..(BASE_BLOCKS * BLOCK) as usize], 0).unwrap();
    // Newest first.
    let mut files = vec![new_layer()];
    let open = |files: &[File]| {
        let frozen = files[1..].iter().map(share).collect();
        Overlay::open(share(&files[0]), frozen, share(&base)).unwrap()
    };
    let mut disk = open(&files);
    for (n, step) in data.chunks_exact(3).take(96).enumerate() {
        let offset = usize::from(step[1]) * (SIZE / 256) + usize::from(step[1] & 1);
        let len = (usize::from(step[2]) * 101).min(SIZE - offset);
        let inner = offset.next_multiple_of(BLOCK as usize)..(offset + len) / BLOCK as usize * BLOCK as usize;
        match step[0] % 8 {
            0..=2 => {
                let octets = vec![n as u8 + 1; len];
                disk.write_at(offset as u64, &octets).unwrap();
                model[offset..offset + len].copy_from_slice(&octets);
            }
            3 => {
                disk.discard(offset as u64, len as u64).unwrap();
                if inner.start < inner.end {
                    model[inner].fill(0);
                }
            }
            4 => {
                disk.write_zeroes(offset as u64, len as u64, step[2] & 1 == 0).unwrap();
                model[offset..offset + len].fill(0);
            }
            5 if files.len() <= layers::MAX_LAYERS => {
                let new = new_layer();
                disk.push(share(&new)).unwrap();
                files.insert(0, new);
            }
            6 if files.len() > 2 => {
                let from = 1 + usize::from(step[1]) % (files.len() - 1);
                let to = from + 1 + usize::from(step[2]) % (files.len() - from);
                let merged = scratch();
                layers::merge(&files[from..to].iter().collect::<Vec<_>>(), &merged).unwrap();
                files.splice(from..to, [merged]);
                disk.flush().unwrap();
                disk = open(&files);
            }
            _ => {
                disk.flush().unwrap();
                disk = open(&files);
            }
        }
        let mut found = vec![0; len];
        disk.read_at(offset as u64, &mut found).unwrap();
        assert!(found == model[offset..offset + len], "step {n}");
    }
    let mut found = vec![0; SIZE];
    disk.read_at(0, &mut found).unwrap();
    assert!(found == model);
}
