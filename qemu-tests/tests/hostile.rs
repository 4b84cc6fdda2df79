//! Guests that attack their worker: at worst it ends with a reason, and nobody else notices.
//!
//! Each run is `vm-rig hostile` with a mode of `hostile-guest`. `WARREN_HOSTILE_ROUNDS` makes the runs longer (40),
//! `WARREN_HOSTILE_SEED` makes them others (1); both are printed with what came of each run.

use qemu_tests::state::NodeState;
use qemu_tests::{Node, Sandbox, shared, timing};

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// A sandbox with something on its disk, which has to be as it was when the attacks are over.
struct Neighbour {
    sandbox: Sandbox,
    sum: String,
}

const SUM: &str = "echo 3 > /proc/sys/vm/drop_caches; sha256sum /workspace/kept";

impl Neighbour {
    fn new(node: &Node) -> Self {
        let sandbox = node.sandbox(&[]);
        sandbox.sh("head -c 4000000 /dev/urandom > /workspace/kept; sync");
        let sum = sandbox.sh(SUM);
        Self { sandbox, sum }
    }

    fn assert_well(&self) {
        assert_eq!(self.sandbox.exec(&["echo", "on"]).text("stdout"), "on\n");
        assert_eq!(self.sandbox.sh(SUM), self.sum, "the neighbour's disk is not what it was");
    }
}

/// Runs modes, with the keys of `vm-rig hostile` behind them, one after the other beside a sandbox.
fn attack(modes: &[(&str, &str)], rounds: u64) {
    let node = shared::node();
    // The first sandbox may leave caches and directories that stay.
    drop(node.sandbox(&[]));
    let before = NodeState::of(&node);
    let neighbour = Neighbour::new(&node);
    let seed = setting("WARREN_HOSTILE_SEED", 1);
    for (mode, expected) in modes {
        let (seed, rounds, expected) =
            (format!("seed={seed}"), format!("rounds={rounds}"), format!("expect={expected}"));
        let emulated = if timing::hardware_virtualization() { "emulated=0" } else { "emulated=1" };
        let words = ["hostile"].into_iter().chain(mode.split(' '));
        let arguments: Vec<&str> = words.chain([seed.as_str(), rounds.as_str(), expected.as_str(), emulated]).collect();
        let said = node.rig(&arguments);
        println!("{seed} {}", said.trim_end());
        neighbour.assert_well();
    }
    drop(neighbour);
    before.assert_restored(&node);
}

#[test]
fn garbage_at_devices_leaves_the_guest_running() {
    let rounds = setting("WARREN_HOSTILE_ROUNDS", 40);
    attack(&[("registers", "guest-poweroff"), ("doorbells", "guest-poweroff"), ("ports", "guest-poweroff")], rounds);
}

#[test]
fn garbage_in_rings_costs_at_most_the_guest() {
    // A device that is told to writes to the guest's own code.
    attack(&[("rings", "guest-poweroff,guest-reset,kvm-error")], setting("WARREN_HOSTILE_ROUNDS", 40));
}

#[test]
fn garbage_at_the_processor_costs_at_most_the_guest() {
    let rounds = setting("WARREN_HOSTILE_ROUNDS", 40);
    let any = "guest-poweroff,guest-reset,kvm-error";
    attack(&[("processor", any), ("interrupts", any), ("space", any), ("mix", any)], rounds);
}

#[test]
fn a_second_processor_that_joins_in_costs_at_most_the_guest() {
    let any = "guest-poweroff,guest-reset,kvm-error";
    attack(&[("rings second=1", any), ("mix second=1", any)], setting("WARREN_HOSTILE_ROUNDS", 40) / 2);
}

#[test]
fn each_end_has_its_reason() {
    attack(
        &[
            ("power-off", "guest-poweroff"),
            ("reset", "guest-reset"),
            ("keyboard-reset", "guest-reset"),
            ("triple-fault", "guest-reset"),
            ("stray-exception", "guest-reset"),
            ("panic", "guest-panic"),
            ("jump", "guest-reset,kvm-error,guest-poweroff"),
            ("exotic", "kvm-error,guest-reset,guest-poweroff"),
            ("halt", "stopped"),
            ("spin", "stopped"),
            ("init", "stopped,kvm-error"), // a first processor goes to the reset vector, where there is nothing
        ],
        8,
    );
}
