use std::fs::File;

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::Input;
use crate::storage::medium::Medium;
use crate::storage::raw::RawDisk;
use crate::vmm::devices::balloon::Balloon;
use crate::vmm::devices::block::Block;
use crate::vmm::devices::driver::{self, read, write};
use crate::vmm::devices::mmio::{MmioTransport, WINDOW, Window};
use crate::vmm::devices::rng::Rng;
use crate::vmm::devices::vsock::Vsock;
use crate::vmm::memory::GuestMemory;

const RAM: u64 = 256 << 10;
const STATUS: u64 = 0x70;
const NOTIFY: u64 = 0x50;

/// Any accesses to any device's window, between a driver's right steps: the status is always one of a driver's steps,
/// the device comes to rest, and a reset makes it usable again, whatever came before.
///
/// The first octet picks the device. Then steps of an octet and what they need.
pub fn mmio(data: &[u8]) {
    let mut input = Input(data);
    let memory = GuestMemory::new(RAM).unwrap();
    match input.u8() % 4 {
        0 => {
            let file = File::from(memfd_create(c"warren-fuzz", MFdFlags::MFD_CLOEXEC).unwrap());
            file.set_len(64 << 10).unwrap();
            let disk = RawDisk::open(file, false).unwrap();
            drive(
                &mut input,
                &memory,
                &MmioTransport::new(memory.clone(), Block::new(Medium::Raw(disk), "fuzz")).unwrap(),
            );
        }
        1 => drive(&mut input, &memory, &MmioTransport::new(memory.clone(), Vsock::new(3).unwrap()).unwrap()),
        2 => drive(&mut input, &memory, &MmioTransport::new(memory.clone(), Balloon::new(RAM)).unwrap()),
        _ => drive(&mut input, &memory, &MmioTransport::new(memory.clone(), Rng::new()).unwrap()),
    }
}

fn drive(input: &mut Input<'_>, memory: &GuestMemory, window: &dyn Window) {
    let queues = window.queue_events().len();
    let mut rings = Vec::new();
    while !input.ended() {
        match input.u8() % 10 {
            0 => rings = driver::start(window, driver::EVENT_IDX | driver::INDIRECT, queues, 16, 0),
            1 => write(window, u64::from(input.u8()) * 4, input.u32()),
            2 => {
                let (offset, width) = (u64::from(input.u16()) % WINDOW, usize::from(input.u8() % 9));
                window.write(offset, &input.u64().to_le_bytes()[..width]);
            }
            3 => {
                let (offset, width) = (u64::from(input.u16()) % WINDOW, usize::from(input.u8() % 9));
                window.read(offset, &mut [0; 8][..width]);
            }
            4 => memory.write_u64(u64::from(input.u32()) % (RAM - 8), input.u64()).unwrap(),
            5 => write(window, STATUS, u32::from(input.u8())),
            6 | 7 if !rings.is_empty() => {
                let at = usize::from(input.u8()) % rings.len();
                let parts = 1 + input.u8() % 3;
                let buffers: Vec<_> = (0..parts)
                    .map(|part| (u64::from(input.u32()) % (RAM + 64), u32::from(input.u16()), part + 1 == parts))
                    .collect();
                rings[at].add(memory, &buffers);
                write(window, NOTIFY, at as u32);
            }
            8 => {
                window.interrupt().read().ok();
                driver::interrupted(window);
            }
            _ => driver::run(window),
        }
        let status = read(window, STATUS);
        assert!(status & !0xcf == 0 && [0, 1, 3, 11, 15].contains(&(status & 0xf)), "status {status:#x}");
    }
    driver::run(window);
    memory.zero(0, RAM as usize).unwrap();
    driver::start(window, 0, queues, 16, 0);
    driver::run(window);
    assert_eq!(read(window, STATUS), 15);
}
