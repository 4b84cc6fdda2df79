//! Rounds after which the guest has ended, is stuck, or may be either.

use super::processor::LAPIC;
use super::{Attack, cpu, say};

pub fn triple_fault(_: &mut Attack) {
    cpu::triple_fault();
}

/// An exception. This kernel's loop starts this round in such a way that nothing catches it.
pub fn exception(_: &mut Attack) {
    cpu::forbidden(0, 0);
}

/// Goes on in a device, in nothing, or in data.
pub fn jump(attack: &mut Attack) {
    let place = attack.random.below(4);
    let address = match place {
        0 => 0xd000_0000,
        1 => attack.arena.1 + 0x10_0000,
        2 => LAPIC,
        _ => attack.arena.0 + attack.random.below(4096),
    };
    cpu::jump(address);
}

/// Stops for ever: only `vm.stop` ends this.
pub fn halt(_: &mut Attack) {
    say!("hostile: halts\n");
    loop {
        cpu::halt(false);
    }
}

/// Runs for ever without an exit.
pub fn spin(_: &mut Attack) {
    say!("hostile: spins\n");
    loop {
        core::hint::spin_loop();
    }
}

/// Sends itself to the state before its start.
pub fn init(_: &mut Attack) {
    say!("hostile: waits for a start\n");
    cpu::write32(LAPIC + 0x300, 0x4_4500);
    loop {
        cpu::halt(true);
    }
}

/// Accesses to devices that KVM has to emulate, or cannot.
pub fn exotic(attack: &mut Attack) {
    let device = attack.devices.pick(&mut attack.random).base;
    match attack.random.below(4) {
        0 => cpu::exchange(device + 0x70, attack.random.nasty()),
        1 => cpu::push_at(device + 0x108),
        2 => cpu::move_string(device, device + 0x100, 64),
        _ => cpu::move_string(attack.arena.1 - 16, device + 0xff0, 64),
    }
}

pub fn power_off(_: &mut Attack) {
    cpu::power_off();
}

pub fn reset(_: &mut Attack) {
    cpu::out8(0x602, 1);
}

pub fn keyboard_reset(_: &mut Attack) {
    cpu::out8(0x64, 0xfe);
}

pub fn panic(_: &mut Attack) {
    cpu::out8(0x505, 1);
}
