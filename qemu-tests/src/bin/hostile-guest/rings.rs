//! Queues: set up well, badly or nearly well, filled with requests that are nearly right, changed while they are served.

use super::devices::{self, Device};
use super::random::Random;
use super::{Attack, cpu};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Room of one queue in the arena, and of the buffers behind all queues.
const QUEUE_ROOM: u64 = 0x4000;
const QUEUES: u64 = 8;
const BUFFERS: u64 = QUEUE_ROOM * QUEUES;

/// A queue as the device was told of it.
#[derive(Clone, Copy, Default)]
struct Queue {
    size: u64,
    descriptors: u64,
    driver: u64,
    device: u64,
    available: u16,
}

/// An address for a ring or a buffer: mostly in the arena, at times where it hurts.
fn address(random: &mut Random, arena: (u64, u64)) -> u64 {
    let (start, end) = arena;
    match random.below(24) {
        0 => end - random.below(0x2000),            // over the end of RAM
        1 => 0xd000_0000 + random.below(0x10000),   // devices
        2 => 0xfec0_0000 + random.below(0x30_0000), // interrupt controllers
        3 => random.nasty(),
        4 => u64::MAX - random.below(0x10000),   // wraps around
        5 => 0xc000_0000 - random.below(0x2000), // the hole's edge
        6 => (4 << 30) - random.below(0x2000),
        7 => start + random.below(BUFFERS), // the rings themselves
        _ => start + BUFFERS + random.below(end - start - BUFFERS),
    }
}

/// A length: mostly of a request's part, at times one that hurts.
fn length(random: &mut Random) -> u32 {
    match random.below(12) {
        0 => random.nasty() as u32,
        1 => u32::MAX - random.below(0x2000) as u32,
        2 => 0,
        3 => random.below(16) as u32 * 4096,
        4 => random.pick(&[1, 12, 16, 44, 512, 1514, 4096, 65536]),
        _ => random.below(2048) as u32,
    }
}

/// Brings a device to life with queues of all qualities. `None` when it refuses.
fn set_up(attack: &mut Attack, device: Device) -> Option<[Queue; QUEUES as usize]> {
    let Attack { random, arena, .. } = attack;
    if !device.negotiate(random) {
        return None;
    }
    let mut queues = [Queue::default(); QUEUES as usize];
    for (index, queue) in (0..QUEUES).zip(&mut queues) {
        device.write(devices::QUEUE_SELECT, index as u32);
        let max = u64::from(device.read(devices::QUEUE_SIZE_MAX));
        if max == 0 && !random.one_in(8) {
            break;
        }
        let base = arena.0 + index * QUEUE_ROOM;
        let size = if random.one_in(12) { random.nasty() & 0xffff_ffff } else { 1 << random.below(9) };
        *queue = Queue { size, descriptors: base, driver: base + 0x1000, device: base + 0x2000, available: 0 };
        match random.below(16) {
            0 => queue.descriptors = address(random, *arena),
            1 => queue.driver = address(random, *arena),
            2 => queue.device = address(random, *arena),
            3 => (queue.driver, queue.device) = (base, base),
            4 => queue.device = base + QUEUE_ROOM, // the next queue's descriptors
            5 => queue.descriptors = arena.1 - random.below(8) * 16 - 16,
            _ => {}
        }
        device.write(devices::QUEUE_SIZE, queue.size as u32);
        device.write64(0x80, queue.descriptors);
        device.write64(0x90, queue.driver);
        device.write64(0xa0, queue.device);
        device.write(devices::QUEUE_READY, if random.one_in(32) { random.nasty() as u32 } else { 1 });
        for at in [queue.driver, queue.device] {
            if within(at, *arena) {
                cpu::write32(at, 0);
            }
        }
    }
    device.write(devices::STATUS, 15);
    Some(queues)
}

fn within(address: u64, arena: (u64, u64)) -> bool {
    address >= arena.0 && address.checked_add(0x2000).is_some_and(|end| end <= arena.1)
}

/// Writes a descriptor.
fn describe(table: u64, index: u64, address: u64, len: u32, flags: u16, next: u16) {
    let at = table + 16 * index;
    cpu::write64(at, address);
    cpu::write32(at + 8, len);
    cpu::write16(at + 12, flags);
    cpu::write16(at + 14, next);
}

/// The start of a request as the device type has it (virtio 1.2 §5), its numbers small enough to mean something.
fn header(random: &mut Random, kind: u32, at: u64) -> u32 {
    match kind {
        1 => frame(random, at),
        // Block: type, reserved, sector.
        2 => {
            let types = [0, 1, 4, 8, 11, 13, 0, 1, 14, 16, 20, 21, 0x8000_0000, u32::MAX];
            cpu::write32(at, random.pick(&types));
            cpu::write32(at + 4, random.nasty() as u32);
            cpu::write64(at + 8, if random.one_in(4) { random.nasty() } else { random.below(1 << 20) });
            16
        }
        // Balloon: page numbers, of the arena or anything.
        5 => {
            for n in 0..64 {
                let page = if random.one_in(8) { random.nasty() as u32 } else { 0x3000 + random.below(0x800) as u32 };
                cpu::write32(at + 4 * n, page);
            }
            random.below(257) as u32
        }
        // Vsock: addresses, ports, length, type, operation, flags, credit.
        19 => {
            cpu::write64(at, if random.one_in(8) { random.nasty() } else { 3 });
            cpu::write64(at + 8, if random.one_in(8) { random.nasty() } else { 2 });
            cpu::write32(at + 16, random.below(16) as u32 + 1024);
            cpu::write32(at + 20, random.below(16) as u32 + random.pick(&[1024, 1 << 30]));
            cpu::write32(at + 24, length(random));
            cpu::write32(at + 28, random.below(9) as u32 * 65536 + if random.one_in(8) { 2 } else { 1 });
            cpu::write32(at + 32, random.below(4) as u32);
            cpu::write32(at + 36, random.nasty() as u32);
            cpu::write32(at + 40, random.nasty() as u32);
            44
        }
        _ => length(random) & 0xffff,
    }
}

/// A network header (virtio 1.2 §5.1.6) that lies about segments and checksums, and a frame from the address that the
/// device lets through, so that the lies reach the host's network stack.
fn frame(random: &mut Random, at: u64) -> u32 {
    let small = |random: &mut Random| if random.one_in(6) { random.nasty() as u16 } else { random.below(120) as u16 };
    cpu::write8(at, random.pick(&[0, 1, 1, 1, 2, 4, 0xff]));
    cpu::write8(at + 1, random.pick(&[0, 1, 1, 3, 4, 5, 0x81, 0x80, 0xff]));
    for field in 1..6 {
        cpu::write16(at + 2 * field, small(random));
    }
    // Destination, source, type: IPv4, IPv6, ARP, VLAN, anything.
    let destinations = [[0xff; 6], [0x02, 0, 0, 0, 0, 0x02], [0x33, 0x33, 0, 0, 0, 1]];
    let source = if random.one_in(8) { [random.number() as u8; 6] } else { [0x02, 0, 0, 0, 0, 0x01] };
    let destination = random.pick(&destinations);
    for (n, octet) in (12..).zip(destination.iter().chain(&source)) {
        cpu::write8(at + n, *octet);
    }
    cpu::write16(at + 24, random.pick(&[0x0008, 0x0008, 0x0008, 0xdd86, 0x0608, 0x0081, 0xffff]));
    // An IPv4 header from the guest's address, with a protocol and lengths of all qualities; noise behind it.
    for n in 0..64 {
        cpu::write8(at + 26 + n, random.nasty() as u8);
    }
    cpu::write8(at + 26, random.pick(&[0x45, 0x45, 0x45, 0x4f, 0x60, 0x40]));
    cpu::write16(at + 28, small(random).swap_bytes());
    cpu::write16(at + 32, random.pick(&[0x0040, 0, 0x0020, 0xff1f]));
    cpu::write8(at + 35, random.pick(&[6, 6, 17, 17, 1, 4, 41, 47, 132]));
    for (n, octet) in (38..).zip([10u8, 66, 0, 1, 10, 66, 0, 0]) {
        cpu::write8(at + n, octet);
    }
    if random.one_in(8) { random.below(26) as u32 } else { 26 + random.below(1600) as u32 }
}

/// Makes a chain in a table of `size` entries; gives its first index.
fn chain(attack: &mut Attack, kind: u32, table: u64, size: u64, indirect: bool) -> u16 {
    let Attack { random, arena, .. } = attack;
    let first = random.below(size);
    let parts = if random.one_in(32) { size + 2 } else { 1 + random.below(4) };
    let mut index = first;
    for part in 0..parts {
        let mut at = address(random, *arena);
        let mut len = length(random);
        let mut flags = if part > 0 && random.one_in(2) { WRITE } else { 0 };
        if part == 0 && within(at, *arena) {
            len = header(random, kind, at);
        }
        if part + 1 == parts && !random.one_in(4) {
            (len, flags) = (random.pick(&[1, 1, 20, 4096]), WRITE);
        }
        let mut next = (index + 1) % size;
        if random.one_in(24) {
            next = random.nasty() & 0xffff; // loops and jumps out of the table
        }
        if part + 1 < parts || random.one_in(24) {
            flags |= NEXT;
        }
        if random.one_in(48) {
            flags = random.number() as u16;
        }
        if !indirect && random.one_in(8) {
            // A table that is right, empty, odd, huge, itself, or contains another.
            let entries = 1 + random.below(8);
            at = arena.0 + BUFFERS + random.below(256) * 16;
            for n in 0..entries {
                let inner = if random.one_in(16) { INDIRECT } else { NEXT * u16::from(n + 1 < entries) };
                let target = address(random, *arena);
                describe(at, n, target, length(random), inner | random.pick(&[0, WRITE]), (n + 1) as u16);
            }
            flags = INDIRECT;
            len = match random.below(8) {
                0 => random.nasty() as u32,
                1 => !15,
                _ => entries as u32 * 16,
            };
            if random.one_in(16) {
                at = table;
            }
        }
        describe(table, index, at, len, flags, next as u16);
        index = next % size;
    }
    first as u16
}

/// One device, its queues, and a few dozen requests.
pub fn round(attack: &mut Attack) {
    let device = attack.devices.pick(&mut attack.random);
    let Some(mut queues) = set_up(attack, device) else { return };
    for _ in 0..48 {
        let choice = attack.random.below(QUEUES) as usize;
        let index = if attack.random.one_in(3) { choice } else { choice % 3 };
        let queue = &mut queues[index];
        // What cannot be written to is tried by the device alone.
        let usable = queue.size.is_power_of_two() && queue.size <= 256;
        if usable && within(queue.descriptors, attack.arena) && within(queue.driver, attack.arena) {
            let added = 1 + attack.random.below(6);
            for _ in 0..added {
                let head = chain(attack, device.kind, queue.descriptors, queue.size, false);
                let slot = u64::from(queue.available) % queue.size;
                let entry = if attack.random.one_in(32) { attack.random.nasty() as u16 } else { head };
                cpu::write16(queue.driver + 4 + 2 * slot, entry);
                queue.available = queue.available.wrapping_add(1);
            }
            if attack.random.one_in(24) {
                queue.available = queue.available.wrapping_add(attack.random.nasty() as u16);
            }
            cpu::write16(queue.driver, attack.random.pick(&[0, 0, 1, u16::MAX]));
            cpu::write16(queue.driver + 4 + 2 * queue.size, attack.random.nasty() as u16);
            cpu::write16(queue.driver + 2, queue.available);
        }
        device.write(devices::NOTIFY, index as u32);
        after(attack, device, &queues[index]);
    }
}

/// While the device is at it: a reset, other descriptors, other registers, or a wait for it.
fn after(attack: &mut Attack, device: Device, queue: &Queue) {
    let Attack { random, arena, .. } = attack;
    match random.below(16) {
        0 => {
            device.write(devices::STATUS, 0);
            set_up(attack, device);
        }
        1 => {
            for _ in 0..64 {
                if within(queue.descriptors, *arena) {
                    let at = queue.descriptors + random.below(256) * 16;
                    cpu::write64(at, random.nasty());
                    cpu::write64(at + 8, random.number());
                }
            }
        }
        2 => device.write(devices::QUEUE_READY, random.below(2) as u32),
        3 => device.write(0x64, random.number() as u32),
        4 => cpu::write32(device.base + 0x100 + random.below(64) * 4, random.nasty() as u32),
        5 => drop(core::hint::black_box(cpu::read64(device.base + 0x100 + random.below(64)))),
        6..9 => (0..2000).for_each(|_| core::hint::spin_loop()),
        _ => {}
    }
}
