//! Workers of other versions of Warren: one of the version before is taken over, one of a later version runs on untouched.

use qemu_tests::stand_in::{StandIn, next_supervisor};
use qemu_tests::{Code, Node, Sandbox, shared, timing};
use warren::wire::WORKER_LINK;

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
    let claim = |sandbox: &Sandbox, version: &str| StandIn::start(&node, sandbox, &format!("claim {version}"));
    let before_old = claim(&old, "-");
    let before_newer = claim(&newer, &(WORKER_LINK + 1).to_string());
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
    before_newer.end();
    next_supervisor(&node);
    says_on(&node, &newer);
    assert_eq!((newer.inspect().get("reason"), node.worker(&newer.id)), (None, worker));

    // It can be ended without a word.
    let before_newer = claim(&newer, &(WORKER_LINK + 1).to_string());
    next_supervisor(&node);
    timing::wait_for("it to be named again", || newer.inspect().get("reason").map(drop));
    newer.stop();
    assert_eq!(newer.state(), "stopped");
    before_old.end();
    before_newer.end();
    for sandbox in [old, newer] {
        sandbox.remove().expect("both can be removed");
    }
}
