//! Workers of other versions of Warren: one of the version before is taken over, one of a later version runs on untouched.

use qemu_tests::{Code, Node, Request, Sandbox, shared, timing};
use warren::wire::WORKER_LINK;

/// From now on whoever connects to a sandbox's worker is told another version of its link.
fn claim(node: &Node, sandbox: &Sandbox, version: &str) {
    let (socket, real) = (socket(sandbox), real(sandbox));
    // It writes nothing, and must not hold the shell's output open.
    node.sh(&format!(
        "node-tool claim {version} {real} {socket} < /dev/null > /dev/null 2>&1 & \
         until [ -S {real} ] && [ -S {socket} ]; do sleep 0.1; done"
    ));
}

fn socket(sandbox: &Sandbox) -> String {
    format!("/run/warren/sandboxes/{}.sock", sandbox.id)
}

fn real(sandbox: &Sandbox) -> String {
    format!("/run/{}.real", sandbox.id)
}

/// Ends what stands before a worker.
fn confess(node: &Node, sandbox: &Sandbox) {
    let (socket, real) = (socket(sandbox), real(sandbox));
    node.sh(&format!(
        "for pid in $(node-tool processes | grep '^[0-9]* node-tool claim .* {real} ' | cut -d' ' -f1); do kill -9 $pid; done; mv {real} {socket}"
    ));
}

/// Kills the supervisor and waits for the next one.
fn next_supervisor(node: &Node) {
    let killed = node.supervisor();
    node.sh(&format!("kill -9 {killed}"));
    timing::wait_for("another supervisor", || (node.supervisor() != killed).then_some(()));
    timing::wait_for("its answer", || node.control().call(Request::new("", "hello")).ok());
}

/// Runs a program as soon as the supervisor has reached the agent.
fn says_on(node: &Node, sandbox: &Sandbox) {
    let said =
        timing::wait_for("the agent to be reached", || node.control().call(sandbox.exec_request(&["echo", "on"])).ok());
    assert_eq!(said.text("stdout"), "on\n");
}

#[test]
fn a_worker_of_the_version_before_is_taken_over_and_one_of_the_next_runs_on_out_of_reach() {
    let node = shared::node();
    let (old, newer) = (node.sandbox(&[]), node.sandbox(&[]));
    let worker = node.worker(&newer.id);
    claim(&node, &old, "-");
    claim(&node, &newer, &(WORKER_LINK + 1).to_string());
    next_supervisor(&node);
    says_on(&node, &old);
    assert_eq!(old.inspect().get("reason"), None);
    assert!(node.control().call(old.request("sandbox.stats")).is_ok());

    let row = timing::wait_for("the newer worker to be named", || {
        Some(newer.inspect()).filter(|row| row.get("reason").is_some_and(|reason| reason.contains("worker link")))
    });
    assert_eq!(row.get("state"), Some("running"), "{row:?}");
    for request in [newer.exec_request(&["true"]), newer.request("sandbox.stats")] {
        let error = node.control().err(request);
        assert!(error.is(Code::VersionMismatch), "{error}");
        assert_eq!(error.fields.number("version"), Some(WORKER_LINK + 1), "{error:?}");
    }
    assert_eq!(node.worker(&newer.id), worker);

    // A supervisor that speaks its version finds it as it was.
    confess(&node, &newer);
    next_supervisor(&node);
    says_on(&node, &newer);
    assert_eq!((newer.inspect().get("reason"), node.worker(&newer.id)), (None, worker));

    // It can be ended without a word.
    claim(&node, &newer, &(WORKER_LINK + 1).to_string());
    next_supervisor(&node);
    timing::wait_for("it to be named again", || newer.inspect().get("reason").map(drop));
    newer.stop();
    assert_eq!(newer.state(), "stopped");
    confess(&node, &old);
    node.sh(&format!(
        "for pid in $(node-tool processes | grep '^[0-9]* node-tool claim ' | cut -d' ' -f1); do kill -9 $pid; done; rm -f {}",
        real(&newer)
    ));
    for sandbox in [old, newer] {
        sandbox.remove().expect("both can be removed");
    }
}
