//! Guests that attack their worker, and workers and agents that attack the supervisor: at worst their sandbox ends with a reason,
//! and nobody else notices.
//!
//! Each run of the former is `vm-rig hostile` with a mode of `hostile-guest`. `WARREN_HOSTILE_ROUNDS` makes the runs longer (40),
//! `WARREN_HOSTILE_SEED` makes them others (1); both are printed with what came of each run.

use qemu_tests::fault::{Blow, assert_agree, strike};
use qemu_tests::stand_in::{StandIn, next_supervisor};
use qemu_tests::state::NodeState;
use qemu_tests::{Code, Message, Node, Request, Sandbox, shared, timing};
use warren::node::faults::Point;
use warren::storage::snapshots::files::FaultPoint;

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

    /// Waits until another supervisor has its agent.
    fn wait_for_agent(&self) {
        let asked = || self.sandbox.client().call(self.sandbox.exec_request(&["true"])).ok();
        timing::wait_for("the neighbour's agent", asked);
    }

    fn assert_well(&self) {
        assert_eq!(self.sandbox.exec(&["echo", "on"]).text("stdout"), "on\n");
        assert_eq!(self.sandbox.sh(SUM), self.sum, "the neighbour's disk is not what it was");
    }
}

/// Runs modes, with the keys of `vm-rig hostile` behind them, one after the other beside a sandbox.
fn attack(modes: &[(&str, &str)], rounds: u64) {
    let node = shared::node_with_faults();
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

/// Waits until a sandbox has ended, and gives why. A neighbour does not notice.
fn reason_of_the_end(sandbox: &Sandbox, neighbour: &Neighbour) -> String {
    timing::wait_for("a sandbox to be given up", || {
        neighbour.assert_well();
        (sandbox.state() == "error").then_some(())
    });
    sandbox.inspect().get("reason").unwrap_or_default().to_string()
}

#[test]
fn a_worker_or_an_agent_that_floods_the_supervisor_is_given_up_and_nobody_else_notices() {
    let node = shared::node_with_faults();
    let neighbour = Neighbour::new(&node);
    let modes = [
        ("greet", "worker-lost: its worker answered hello, which it was not asked"),
        ("list", "agent-lost: its agent was lost: it lists 1028 running programs that nobody started, over the limit"),
        ("refuse", "agent-lost: its agent was lost: why why"),
    ];
    let posing = modes.map(|(mode, _)| {
        let sandbox = node.sandbox(&[("memory_mib", "128")]);
        let stand_in = StandIn::start(&node, &sandbox, &format!("pose {mode}"));
        (sandbox, stand_in)
    });
    next_supervisor(&node);
    neighbour.wait_for_agent();
    for ((sandbox, _), (mode, expected)) in posing.iter().zip(modes) {
        let reason = reason_of_the_end(sandbox, &neighbour);
        assert!(reason.starts_with(expected) && reason.len() < 1200, "{mode}: {reason}");
        println!("{mode}: {}", &reason[..reason.len().min(120)]);
    }
    assert!(node.control().ok(Request::new("", "sandbox.list")).items.len() >= 4, "no row is too long for a list");
    for (sandbox, stand_in) in posing {
        sandbox.remove().expect("it can be removed");
        stand_in.end();
    }
}

#[test]
fn an_agent_that_says_or_reads_nothing_holds_up_nobody() {
    let node = shared::node_with_faults();
    let neighbour = Neighbour::new(&node);
    let [(blank, before_blank), (deaf, before_deaf), (begin, before_begin)] = ["blank", "deaf", "begin"].map(|mode| {
        let sandbox = node.sandbox(&[("memory_mib", "128")]);
        let stand_in = StandIn::start(&node, &sandbox, &format!("pose {mode}"));
        (sandbox, stand_in)
    });
    next_supervisor(&node);
    neighbour.wait_for_agent();
    neighbour.assert_well();
    assert_eq!(blank.state(), "running");

    // What its agent says of one program without end reaches its client once, and the client's other requests go on.
    let client = node.connect();
    let started = || {
        let mut call = client.start(begin.exec_request(&["true"]));
        let first = call.message();
        matches!(first, Message::Item { .. }).then_some(call)
    };
    let mut call = timing::wait_for("the agent to be reached", started);
    assert_eq!(client.ok(neighbour.sandbox.exec_request(&["echo", "on"])).text("stdout"), "on\n");
    assert!(call.message_within(timing::limit(1)).is_none());
    client.cut();
    for (sandbox, stand_in) in [(blank, before_blank), (begin, before_begin)] {
        sandbox.remove().expect("it can be removed");
        stand_in.end();
    }

    // Requests that nobody reads and nobody waits for.
    let client = node.connect();
    let stat = |path: &str| client.start(deaf.request("file.stat").set("path", path));
    let waiting = timing::wait_for("the agent to be reached", || {
        let mut call = stat("/");
        match call.message_within(timing::limit(1)) {
            None => Some(call),
            Some(answer) => {
                println!("{answer:?}");
                None
            }
        }
    });
    let long = "x".repeat(60_000);
    for _ in 0..100 {
        stat(&long).cancel();
    }
    let error = waiting.finish().expect_err("nobody answers it");
    assert!(error.is(Code::LinkLost) && error.message.contains("octets unread, over the limit of"), "{error}");
    neighbour.assert_well();
    deaf.remove().expect("it can be removed");
    before_deaf.end();
}

#[test]
fn a_worker_that_never_finishes_writing_is_ended_when_its_time_is_over() {
    let node = shared::node_with_faults();
    let neighbour = Neighbour::new(&node);
    let modes = [
        ("pause", "sandbox.pause", Point::PauseWritten),
        ("snapshot", "snapshot.create", Point::Storage(FaultPoint::RowWritten)),
    ];
    let posing = modes.map(|_| {
        let sandbox = node.sandbox(&[("memory_mib", "128")]);
        let stand_in = StandIn::start(&node, &sandbox, "pose hold");
        stand_in.join_worker(&sandbox);
        (sandbox, stand_in)
    });
    next_supervisor(&node);
    neighbour.wait_for_agent();
    for ((sandbox, stand_in), (what, verb, point)) in posing.into_iter().zip(modes) {
        let asked = || node.control().call(sandbox.request("file.stat").set("path", "/")).ok();
        timing::wait_for("the agent to be reached", asked);
        let error = strike(&node, &[(point, Blow::Late)], sandbox.request(verb)).expect_err("nothing is written");
        assert!(error.is(Code::Timeout) && error.fields.get("timeout_ms") == Some("1000"), "{what}: {error}");
        let reason = reason_of_the_end(&sandbox, &neighbour);
        assert!(reason.starts_with(&format!("{what}-timeout: ")), "{what}: {reason}");
        assert!(node.control().ok(Request::new("", "snapshot.list")).items.is_empty());
        assert_agree(&node, what);
        sandbox.remove().expect("it can be removed");
        stand_in.end();
    }
}
