//! Every virtio-mmio window (virtio 1.2 §4.2.2), whatever device is behind it.

use super::random::Random;
use super::{Attack, cpu};

const FIRST: u64 = 0xd000_0000;
const WINDOW: u64 = 0x1000;
const MAGIC: u32 = 0x7472_6976;

pub const QUEUE_SELECT: u64 = 0x30;
pub const QUEUE_SIZE_MAX: u64 = 0x34;
pub const QUEUE_SIZE: u64 = 0x38;
pub const QUEUE_READY: u64 = 0x44;
pub const NOTIFY: u64 = 0x50;
pub const STATUS: u64 = 0x70;

/// The registers there are, reserved ones next to them, and the configuration space.
const REGISTERS: &[u64] = &[
    0x00, 0x04, 0x08, 0x0c, 0x10, 0x14, 0x18, 0x20, 0x24, 0x28, 0x2c, 0x30, 0x34, 0x38, 0x3c, 0x40, 0x44, 0x48, 0x4c,
    0x50, 0x54, 0x60, 0x64, 0x68, 0x70, 0x74, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4, 0xac, 0xb0, 0xb4, 0xb8, 0xbc, 0xc0,
    0xfc, 0x100, 0x104, 0x108, 0x10c, 0x110, 0x118, 0x11c, 0x120, 0x128, 0x130, 0x13c, 0x140, 0x1fc, 0x200, 0xffc,
];

/// The windows with a device.
pub struct Devices {
    found: [Device; 32],
    count: usize,
}

/// A window.
#[derive(Clone, Copy)]
pub struct Device {
    /// Guest-physical address.
    pub base: u64,
    /// Virtio device type.
    pub kind: u32,
}

impl Devices {
    /// Looks for devices by their magic number; a window without a device does not end the search.
    pub fn find() -> Self {
        let mut devices = Self { found: [Device { base: FIRST, kind: 0 }; 32], count: 0 };
        for base in (0..64).map(|n| FIRST + n * WINDOW) {
            if cpu::read32(base) == MAGIC && devices.count < devices.found.len() {
                devices.found[devices.count] = Device { base, kind: cpu::read32(base + 8) };
                devices.count += 1;
            }
        }
        devices
    }

    pub fn count(&self) -> usize {
        self.count
    }

    /// One of them.
    pub fn pick(&self, random: &mut Random) -> Device {
        self.found[random.below(self.count.max(1) as u64) as usize]
    }
}

impl Device {
    pub fn write(self, register: u64, value: u32) {
        cpu::write32(self.base + register, value);
    }

    pub fn read(self, register: u64) -> u32 {
        cpu::read32(self.base + register)
    }

    /// Writes both halves of an address.
    pub fn write64(self, register: u64, value: u64) {
        self.write(register, value as u32);
        self.write(register + 4, (value >> 32) as u32);
    }

    /// Takes a driver's steps up to FEATURES_OK, with features that may be offered or not. `true` when they were taken.
    pub fn negotiate(self, random: &mut Random) -> bool {
        self.write(STATUS, 0);
        self.write(STATUS, 1);
        self.write(STATUS, 3);
        for half in 0..2 {
            self.write(0x14, half);
            let offered = self.read(0x10);
            self.write(0x24, half);
            let mut taken = if random.one_in(4) { offered & random.number() as u32 } else { offered };
            if half == 1 {
                taken |= 1; // VIRTIO_F_VERSION_1
            }
            if random.one_in(16) {
                taken = random.number() as u32;
            }
            self.write(0x20, taken);
        }
        self.write(STATUS, 11);
        self.read(STATUS) == 11
    }
}

/// An access of any width and kind in a window.
fn touch(random: &mut Random, device: Device) {
    let mut offset = if random.one_in(8) { random.below(WINDOW) } else { random.pick(REGISTERS) };
    if random.one_in(16) {
        offset += random.below(8);
    }
    let address = device.base + offset;
    let value = random.nasty();
    match random.below(12) {
        0..3 => cpu::write32(address, value as u32),
        3 => cpu::write8(address, value as u8),
        4 => cpu::write16(address, value as u16),
        5 => cpu::write64(address, value),
        6 => drop(core::hint::black_box(cpu::read8(address))),
        7 => drop(core::hint::black_box(cpu::read16(address))),
        8 => drop(core::hint::black_box(cpu::read64(address))),
        9 => cpu::touch128(address),
        _ => drop(core::hint::black_box(cpu::read32(address))),
    }
}

/// Noise in the registers of one device, as its status jumps about.
pub fn registers(attack: &mut Attack) {
    let Attack { random, devices, .. } = attack;
    let device = devices.pick(random);
    for _ in 0..64 {
        match random.below(24) {
            0 => device.write(STATUS, random.pick(&[0, 1, 3, 11, 15, 7, 0x80, 0x40, 0xff, 12, u32::MAX])),
            1 => drop(device.negotiate(random)),
            _ => touch(random, device),
        }
    }
}

/// Notifications as fast as they go, to queues there are and others, on all devices.
pub fn doorbells(attack: &mut Attack) {
    let Attack { random, devices, .. } = attack;
    for _ in 0..4 {
        let device = devices.pick(random);
        let queue = if random.one_in(4) { random.nasty() as u32 } else { random.below(4) as u32 };
        for _ in 0..256 {
            device.write(NOTIFY, queue);
        }
    }
}
