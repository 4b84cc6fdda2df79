//! A guest that attacks its machine monitor: a kernel of our own, booted by `vm-rig hostile` in Linux' place.
//!
//! It takes from its command line `seed=N` (what is done follows from it alone), `rounds=N` and `mode=NAME`, does that
//! many rounds of the mode, tells each on the serial port, and powers off. Modes are in the table below. The last ones
//! end the guest in some other way, or leave it stuck.

#![no_std]
#![no_main]

mod cpu;
mod devices;
mod ends;
mod processor;
mod random;
mod rings;
mod text;

use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, Ordering};
use random::Random;

/// What the worker left for a guest that starts.
struct Boot {
    /// First address of RAM that nothing here uses, and the end of low RAM.
    arena: (u64, u64),
}

/// What attacks work on.
struct Attack {
    random: Random,
    arena: (u64, u64),
    devices: devices::Devices,
}

/// One round of a mode.
type Round = fn(&mut Attack);

const MODES: &[(&str, Round)] = &[
    ("registers", devices::registers),
    ("rings", rings::round),
    ("doorbells", devices::doorbells),
    ("ports", processor::ports),
    ("processor", processor::round),
    ("interrupts", processor::interrupts),
    ("space", processor::space),
    ("mix", mix),
    ("triple-fault", ends::triple_fault),
    ("stray-exception", ends::exception),
    ("jump", ends::jump),
    ("halt", ends::halt),
    ("spin", ends::spin),
    ("init", ends::init),
    ("exotic", ends::exotic),
    ("power-off", ends::power_off),
    ("reset", ends::reset),
    ("keyboard-reset", ends::keyboard_reset),
    ("panic", ends::panic),
];

/// Anything of the modes that are to leave the guest running.
fn mix(attack: &mut Attack) {
    let rounds: [Round; 8] = [
        rings::round,
        rings::round,
        rings::round,
        devices::registers,
        devices::doorbells,
        processor::ports,
        processor::space,
        processor::round,
    ];
    let choice = attack.random.below(rounds.len() as u64 + 1) as usize;
    rounds.get(choice).copied().unwrap_or(processor::interrupts)(attack);
}

/// Where the first processor begins; `info` is the PVH start_info.
#[unsafe(no_mangle)]
extern "C" fn kernel_main(info: u64) -> ! {
    cpu::load_tables();
    let line = text::CommandLine::of(info);
    let boot = Boot { arena: (cpu::kernel_end().next_multiple_of(1 << 21), cpu::low_ram_end(info)) };
    let (seed, rounds) = (line.number("seed=", 1), line.number("rounds=", 10));
    let Some(&(name, round)) = line.value("mode=").and_then(|mode| MODES.iter().find(|(name, _)| *name == mode)) else {
        say!("hostile: no such mode\n");
        cpu::power_off();
    };
    let devices = devices::Devices::find();
    say!("hostile: mode {} seed {} rounds {} devices {}\n", name, seed, rounds, devices.count());
    let mut attack = Attack { random: Random(seed), arena: boot.arena, devices };
    if line.number("second=", 0) == 1 {
        if (0..50).any(|_| cpu::start_second(&SECOND)) {
            say!("hostile: two processors\n");
        } else {
            say!("hostile: fault of its own: no second processor\n");
        }
    }
    for number in 0..rounds {
        // A round is one seed of its own, so that a failing one can be run alone.
        attack.random = Random(seed.wrapping_mul(1_000_003).wrapping_add(number));
        if name == "stray-exception" {
            round(&mut attack);
        }
        match cpu::guarded(round, &mut attack) {
            None => say!("hostile: round {}\n", number),
            Some(exception) => say!("hostile: round {} by {}\n", number, exception),
        }
    }
    say!("hostile: done\n");
    cpu::power_off();
}

/// Whether the second processor runs.
static SECOND: AtomicBool = AtomicBool::new(false);

/// Where the second processor begins: it attacks the devices' registers all the time.
#[unsafe(no_mangle)]
extern "C" fn second_main() -> ! {
    SECOND.store(true, Ordering::Relaxed);
    let mut attack = Attack { random: Random(cpu::time()), arena: (0, 0), devices: devices::Devices::find() };
    loop {
        devices::registers(&mut attack);
    }
}

#[panic_handler]
fn on_panic(info: &PanicInfo<'_>) -> ! {
    say!("hostile: fault of its own: {}\n", info.message());
    cpu::triple_fault()
}
