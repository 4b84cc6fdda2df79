//! Sudden ends: of a worker, of the supervisor, of the whole node.

use qemu_tests::node::Boot;
use qemu_tests::state::NodeState;
use qemu_tests::{Request, Sandbox, shared, timing};

#[test]
fn a_killed_worker_puts_its_sandbox_in_error_and_touches_no_other() {
    let node = shared::node();
    let other = node.sandbox(&[]);
    let on = || assert_eq!(other.exec(&["echo", "on"]).text("stdout"), "on\n");
    on();
    let before = NodeState::of(&node);
    let sandbox = node.sandbox(&[]);
    let mut running = sandbox.start(sandbox.exec_request(&["sleep", "1000"]));
    running.item();
    node.sh(&format!("kill -9 {}", node.worker(&sandbox.id)));
    let error = running.finish().expect_err("an exec does not survive its sandbox");
    assert!(["LINK_LOST", "VM_FAILED", "BAD_STATE"].contains(&error.code.as_str()), "{error}");
    timing::wait_for("the sandbox to be in error", || (sandbox.state() == "error").then_some(()));
    let reason = sandbox.inspect().get("reason").unwrap_or_default().to_string();
    assert!(reason.contains("kill") || reason.contains("signal 9"), "reason {reason:?}");
    let refused = node.control().err(sandbox.exec_request(&["true"]));
    assert!(refused.is(qemu_tests::Code::BadState), "{refused}");
    // Overlay, cgroup, sockets and descriptors go at once; logs and last words stay with the row.
    let home = format!("file /data/sandboxes/{}", sandbox.id);
    before.assert_restored_but(&node, |line| line.starts_with(&home) && !line.ends_with("/overlay"));
    sandbox.remove().expect("a sandbox in error can be removed");
    before.assert_restored(&node);
    on();
}

#[test]
fn a_killed_supervisor_is_restarted_and_running_sandboxes_go_on() {
    let node = shared::node();
    let sandbox = node.sandbox(&[("name", "survivor")]);
    let stopped = node.sandbox(&[]);
    stopped.stop();
    // Writes numbered lines all the while, more than any buffer on the way holds.
    let script = "n=0; while [ $n -lt 60000 ]; do echo line $n; n=$((n + 1)); done; cat /workspace/mark";
    sandbox.sh("echo the end > /workspace/mark");
    let mut call = sandbox.start(sandbox.exec_request(&["sh", "-c", script]));
    let exec = call.item().get("exec").expect("the exec's number").to_string();
    call.read_until("stdout", "line 1000\n");
    let supervisor = node.supervisor();
    node.sh(&format!("kill -9 {supervisor}"));
    let lost = call.finish().expect_err("the bridge says that the request is lost");
    assert_eq!(lost.code, "NODE_RESTARTED");

    timing::wait_for("another supervisor", || (node.supervisor() != supervisor).then_some(()));
    node.control().ok(Request::new("", "hello"));
    assert_eq!(sandbox.state(), "running");
    assert_eq!(stopped.state(), "stopped");
    assert_eq!(sandbox.exec(&["echo", "again"]).text("stdout"), "again\n");
    // Everything the program writes is there, from its first line to its last.
    let replayed = node.control().ok(sandbox.request("exec.attach").set("exec", &exec));
    assert_eq!(replayed.field("exit"), "0");
    assert!(replayed.items.iter().all(|row| row.number("lost").unwrap_or(0) == 0), "{:?}", replayed.items);
    let mut expected: String = (0..60_000).map(|n| format!("line {n}\n")).collect();
    expected.push_str("the end\n");
    let got = replayed.text("stdout");
    assert_eq!(got.len(), expected.len());
    assert!(got == expected, "the replayed output is not what was written");
    // A sandbox can be made, and both can be removed.
    assert_eq!(node.sandbox(&[]).exec(&["echo", "new"]).text("stdout"), "new\n");
    sandbox.remove().expect("a sandbox taken over can be removed");
}

#[test]
fn a_supervisor_killed_while_it_creates_a_sandbox_leaves_none_behind() {
    let node = shared::node();
    drop(node.sandbox(&[]));
    let before = NodeState::of(&node);
    let rows = node.control().ok(Request::new("", "sandbox.list")).items.len();
    let mut call = node.control().start(Sandbox::create_request(&[("progress", "true")]));
    call.item();
    node.sh(&format!("kill -9 {}", node.supervisor()));
    let _ = call.finish();
    node.control().ok(Request::new("", "hello"));
    // The new supervisor has no agent for it: it ends in error, or is gone; removing it leaves nothing.
    for row in node.control().ok(Request::new("", "sandbox.list")).items {
        drop(Sandbox::of(node.control(), row.get("id").unwrap_or_default()));
    }
    before.assert_restored(&node);
    assert!(node.control().ok(Request::new("", "sandbox.list")).items.len() <= rows);
}

#[test]
fn state_survives_an_orderly_end_and_a_power_cut() {
    let node = Boot::kernel().start();
    let ordered = node.sandbox(&[("name", "ordered")]);
    ordered.sh("echo kept > /workspace/file");
    let ordered = ordered.keep();
    let mut disks = node.power_off();

    let disk = disks.pop().expect("the data disk");
    let node = Boot::kernel().data_disk(disk).start();
    assert_eq!(Sandbox::of(node.control(), &ordered).keep(), ordered);
    let row = node.control().ok(Request::new("", "sandbox.inspect").arg(&ordered)).fields;
    assert_eq!(row.get("state"), Some("stopped"), "{row:?}");
    let cut = node.sandbox(&[("name", "cut")]);
    cut.sh("echo synced > /workspace/file; sync");
    let cut = cut.keep();
    let mut disks = node.power_cut();

    let disk = disks.pop().expect("the data disk");
    let node = Boot::kernel().data_disk(disk).start();
    let row = node.control().ok(Request::new("", "sandbox.inspect").arg(&cut)).fields;
    assert_eq!(row.get("state"), Some("error"), "{row:?}");
    assert_eq!(row.get("reason"), Some("node lost power"), "{row:?}");
    assert_eq!(node.run(&["test", "-s", &format!("/data/sandboxes/{cut}/overlay")]).exit, 0, "its overlay is kept");
    let row = node.control().ok(Request::new("", "sandbox.inspect").arg(&ordered)).fields;
    assert_eq!(row.get("state"), Some("stopped"), "{row:?}");
    for id in [&cut, &ordered] {
        Sandbox::of(node.control(), id).remove().expect("both can be removed");
    }
    assert_eq!(node.sandbox(&[]).exec(&["echo", "well"]).text("stdout"), "well\n");
    node.power_off();
}

#[test]
fn the_power_button_ends_the_node_in_order() {
    let node = Boot::kernel().start();
    let id = node.sandbox(&[]).keep();
    node.machine().monitor("system_powerdown", serde_json::json!({})).expect("QEMU presses the button");
    node.wait_for_end("its power button was pressed");
    let disk = node.into_disks().pop().expect("the data disk");
    let node = Boot::kernel().data_disk(disk).start();
    let row = node.control().ok(Request::new("", "sandbox.inspect").arg(&id)).fields;
    assert_eq!(row.get("state"), Some("stopped"), "{row:?}");
    node.power_off();
}
