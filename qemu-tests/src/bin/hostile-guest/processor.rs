//! What a processor can do without a device: ports, MSRs, CPUID, hypercalls, interrupt controllers, addresses.

use super::{Attack, cpu};

/// The local APIC, which is in KVM.
pub const LAPIC: u64 = 0xfee0_0000;
const IOAPIC: u64 = 0xfec0_0000;

/// Serial port, keyboard controller, panic, power, PIT, PICs, CMOS, PCI, VGA, and neighbours.
const PORTS: &[u16] = &[
    0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x40, 0x43, 0x60, 0x61, 0x64, 0x70, 0x71, 0x80, 0x92, 0xb2, 0x2f8, 0x3c0, 0x3d4,
    0x3f8, 0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x3fd, 0x3fe, 0x3ff, 0x400, 0x504, 0x505, 0x506, 0x5ff, 0x600, 0x601, 0x602,
    0x603, 0xcf8, 0xcfc, 0xffff, 0x3f6, 0x3f7, 0x63, 0x65,
];

/// Whether a write there may end the guest, as `platform` has it; the width counts, since a write covers several ports.
fn ends_guest(port: u16) -> bool {
    [0x64, 0x505, 0x600, 0x602, 0x92].iter().any(|end| port <= *end && port + 4 > *end)
}

/// Reads and writes of all widths, single and by string instructions.
pub fn ports(attack: &mut Attack) {
    let Attack { random, arena, .. } = attack;
    for _ in 0..64 {
        let port = if random.one_in(6) { random.number() as u16 } else { random.pick(PORTS) };
        let value = random.nasty();
        match random.below(10) {
            0..5 if port < u16::MAX - 4 && ends_guest(port) => {}
            0 | 1 => cpu::out8(port, value as u8),
            2 => cpu::out16(port, value as u16),
            3 => cpu::out32(port, value as u32),
            4 => cpu::out_string(port, arena.0 + random.below(0x10000), random.below(2000)),
            5 => cpu::in_string(port, arena.0 + random.below(0x10000), random.below(256)),
            6 => drop(core::hint::black_box(cpu::in16(port))),
            7 => drop(core::hint::black_box(cpu::in32(port))),
            _ => drop(core::hint::black_box(cpu::in8(port))),
        }
    }
}

/// The ranges of MSRs that mean something (Linux asm/msr-index.h, asm/kvm_para.h, asm/hyperv-tlfs.h).
const MSRS: &[(u32, u64)] = &[
    (0x0, 0x20),
    (0x1b, 1),
    (0x3a, 1),
    (0x48, 2),
    (0x79, 0x20),
    (0xc0, 0x30),
    (0x10a, 2),
    (0x174, 3),
    (0x179, 8),
    (0x186, 0x20),
    (0x1d9, 8),
    (0x200, 0x80),
    (0x2ff, 1),
    (0x345, 1),
    (0x38d, 8),
    (0x3f1, 1),
    (0x400, 0x80),
    (0x480, 0x20),
    (0x560, 0x20),
    (0x600, 1),
    (0x6e0, 1),
    (0x800, 0x100),
    (0xda0, 1),
    (0x11, 2),
    (0x4000_0000, 0x110),
    (0x4b56_4d00, 0x10),
    (0xc000_0080, 0x10),
    (0xc000_0100, 8),
    (0xc001_0000, 0x140),
    (0xc001_1020, 0x20),
];

/// Registers of KVM's that hold an address that the host writes to: pointed into the arena, else this kernel is gone.
const KVM_ADDRESSES: [u32; 8] =
    [0x11, 0x12, 0x4b56_4d00, 0x4b56_4d01, 0x4b56_4d02, 0x4b56_4d03, 0x4b56_4d04, 0x4b56_4d05];

/// Storms of each kind. An exception ends the round, so each kind is its own.
pub fn round(attack: &mut Attack) {
    let Attack { random, arena, .. } = attack;
    match random.below(5) {
        0 => {
            for _ in 0..64 {
                let base = random.pick(&[0, 0x8000_0000, 0x4000_0000, 0x4000_0100, 0xc000_0000]);
                let leaf = if random.one_in(8) { random.number() as u32 } else { base + random.below(48) as u32 };
                cpu::cpuid(leaf, random.nasty() as u32);
            }
        }
        1 | 2 => {
            let (base, len) = random.pick(MSRS);
            let index = if random.one_in(16) { random.number() as u32 } else { base + random.below(len) as u32 };
            let mut value = if random.one_in(2) { random.nasty() } else { cpu::read_msr(index) };
            if KVM_ADDRESSES.contains(&index) {
                value = (arena.0 + random.below(0x10_0000)) | random.below(8);
            }
            if random.one_in(3) {
                value ^= 1 << random.below(64);
            }
            // The local APIC is moved or switched off by the mode that is about it; long mode is needed to go on.
            if index != 0x1b && index != 0xc000_0080 {
                cpu::write_msr(index, value);
            } else if index == 0xc000_0080 {
                cpu::write_msr(index, value | 0x500);
            }
        }
        3 => {
            let amd = random.one_in(2);
            for _ in 0..16 {
                let number = if random.one_in(4) { random.nasty() } else { random.below(16) };
                // Numbers of KVM's clock pairing and of sharing pages hold addresses: those of the arena.
                let arguments = [arena.0 + random.below(0x10_0000), random.nasty(), random.nasty(), random.below(4)];
                cpu::hypercall(amd, number, arguments);
            }
        }
        _ => {
            let value = if random.one_in(2) { random.nasty() } else { arena.0 };
            cpu::forbidden(random.below(17), value);
        }
    }
}

/// The interrupt controllers: vectors, timers, messages to processors that are not there.
pub fn interrupts(attack: &mut Attack) {
    let Attack { random, .. } = attack;
    for _ in 0..48 {
        match random.below(8) {
            // A message: any kind, to anybody but this processor and the second one.
            0 | 1 => {
                let kind = random.below(8) << 8;
                let vector = random.below(256);
                cpu::write32(LAPIC + 0x310, (2 + random.below(254) as u32) << 24);
                cpu::write32(LAPIC + 0x300, (vector | kind | (random.number() & 0x8000)) as u32);
            }
            // To itself: an interrupt.
            2 => cpu::write32(LAPIC + 0x300, 0x4_0000 | (32 + random.below(224) as u32)),
            3 => {
                cpu::write32(
                    LAPIC + 0x320,
                    random.pick(&[0x20, 0x2_0020, 0x4_0020, 0x1_0000]) + random.below(200) as u32,
                );
                cpu::write32(LAPIC + 0x3e0, random.below(16) as u32);
                cpu::write32(LAPIC + 0x380, 1 + random.below(5000) as u32);
            }
            4 => {
                let offset = random.below(0x40) * 0x10;
                // Not its enabling, not its messages.
                if offset != 0xf0 && offset != 0x300 && offset != 0x20 {
                    cpu::write32(LAPIC + offset, random.nasty() as u32);
                }
            }
            5 => {
                cpu::write32(IOAPIC, random.below(0x50) as u32);
                cpu::write32(IOAPIC + 0x10, random.nasty() as u32);
            }
            6 => drop(core::hint::black_box(cpu::read32(LAPIC + random.below(0x100) * 0x10))),
            _ => cpu::breathe(),
        }
    }
    // Timers are off for the rounds to come.
    cpu::write32(LAPIC + 0x320, 0x1_0000);
    cpu::breathe();
}

/// Addresses without RAM, at its edges, and copies over them.
pub fn space(attack: &mut Attack) {
    let Attack { random, arena, .. } = attack;
    for _ in 0..32 {
        let address = match random.below(6) {
            0 => arena.1 - random.below(16),
            1 => 0xc000_0000 + random.below(0x1000_0000),
            2 => 0xd000_0000 + random.below(0x4_0000),
            3 => (4 << 30) + random.below(4 << 30),
            4 => 0xa_0000 + random.below(0x4_0000),
            _ => arena.1 + random.below(0xc000_0000 - arena.1),
        };
        match random.below(8) {
            0 => cpu::write64(address, random.nasty()),
            1 => cpu::write8(address, random.nasty() as u8),
            2 => cpu::move_string(arena.0 + random.below(4096), address, random.below(64)),
            3 => cpu::move_string(address, arena.0 + random.below(4096), random.below(64)),
            4 => cpu::touch128(address),
            5 => cpu::write32(address, random.nasty() as u32),
            6 => drop(core::hint::black_box(cpu::read16(address))),
            _ => drop(core::hint::black_box(cpu::read64(address))),
        }
    }
}
