use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::Input;
use crate::storage::medium::Medium;
use crate::storage::raw::RawDisk;
use crate::vmm::devices::block::Block;
use crate::vmm::devices::driver;
use crate::vmm::devices::mmio::{MmioTransport, Window};
use crate::vmm::memory::GuestMemory;

const RAM: u64 = 64 << 10;
const DATA: u64 = 0x4000;
const ROOM: u64 = RAM - DATA;
const DISK: u64 = 16 << 10;

/// Whatever a driver puts into a request (kind, sector, ranges, cuts of the buffers): the device answers every chain,
/// says OK or one of its errors, stays within the disk, and a read-only disk never changes.
///
/// The first octet: read-only or not. Then requests: octets of the readable and writable part, in what pieces, and
/// what stands in the readable part.
pub fn block(data: &[u8]) {
    let mut input = Input(data);
    let read_only = input.u8() & 1 != 0;
    let file = File::from(memfd_create(c"warren-fuzz", MFdFlags::MFD_CLOEXEC).unwrap());
    file.write_all_at(&[0x5a; DISK as usize], 0).unwrap();
    let disk = RawDisk::open(file.try_clone().unwrap(), read_only).unwrap();
    let memory = GuestMemory::new(RAM).unwrap();
    let window = MmioTransport::new(memory.clone(), Block::new(Medium::Raw(disk), "fuzz")).unwrap();
    let mut queue = driver::start(&window, 0, 1, 64, 0).remove(0);
    while !input.ended() {
        let (readable, writable) = (u64::from(input.u16()) % 600, u64::from(input.u16()) % 9000);
        let cut = u64::from(input.u8()) + 1;
        for at in 0..readable {
            memory.write(DATA + at, &[input.u8()]).unwrap();
        }
        let mut buffers = Vec::new();
        let mut put = |start: u64, len: u64, write: bool| {
            let (first, rest) = (cut.min(len), len - cut.min(len));
            buffers.extend([(DATA + start, first as u32, write), (DATA + start + first, rest as u32, write)]);
        };
        put(0, readable, false);
        put(ROOM / 2, writable, true);
        memory.write(DATA + ROOM / 2 + writable.max(1) - 1, &[0xee]).unwrap();
        buffers.retain(|buffer| buffer.1 > 0);
        if buffers.is_empty() {
            continue;
        }
        let head = queue.add(&memory, &buffers);
        window.serve(0);
        let (used, written) = queue.used(&memory).expect("a chain was not answered");
        assert_eq!((used, u64::from(written)), (head, writable));
        if writable > 0 {
            let mut status = [0];
            memory.read(DATA + ROOM / 2 + writable - 1, &mut status).unwrap();
            assert!(status[0] <= 2, "status {}", status[0]);
        }
    }
    assert_eq!(file.metadata().unwrap().len(), DISK);
    if read_only {
        let mut octets = [0; DISK as usize];
        file.read_exact_at(&mut octets, 0).unwrap();
        assert_eq!(octets, [0x5a; DISK as usize]);
    }
}
