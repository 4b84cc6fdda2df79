//! Snapshots of sandboxes that run on, sandboxes that are put back to one, and sandboxes that go on from one.

use std::collections::BTreeSet;

use qemu_tests::state::NodeState;
use qemu_tests::witness::files;
use qemu_tests::{Code, Node, Request, Sandbox, shared, timing};

/// A program of the sandbox that counts in memory and says so on its output, for as long as it lives.
const COUNT: &str = "n=0; while :; do n=$((n+1)); echo $n; echo $n > /dev/shm/count; sleep 0.05; done";

fn start_counter(sandbox: &Sandbox) {
    sandbox.client().ok(sandbox.exec_request(&["sh", "-c", COUNT]).set("detach", true));
    timing::wait_for("the counter's start", || (counter(sandbox) > 2).then_some(()));
}

fn counter(sandbox: &Sandbox) -> u64 {
    sandbox.sh("cat /dev/shm/count 2>/dev/null || echo 0").trim().parse().unwrap_or(0)
}

/// Takes a snapshot of a running sandbox; its id.
fn snapshot(sandbox: &Sandbox) -> String {
    sandbox.client().ok(sandbox.request("snapshot.create")).field("id").to_string()
}

fn rollback(sandbox: &Sandbox, snapshot: &str) {
    sandbox.client().ok(sandbox.request("sandbox.rollback").set("snapshot", snapshot));
    assert_eq!(sandbox.state(), "running");
}

fn fork(node: &Node, from: &str, count: u64) -> Vec<Sandbox> {
    let reply = node.control().ok(Request::new("", "snapshot.fork").arg(from).set("n", count));
    let ids: Vec<String> = reply.items.iter().map(|item| item.get("id").expect("an id").to_string()).collect();
    assert_eq!(ids.len() as u64, count);
    ids.iter().map(|id| Sandbox::of(node.control(), id)).collect()
}

#[test]
fn a_sandbox_goes_back_to_what_it_was() {
    let node = shared::node();
    // Not before the template is hashed.
    drop(node.sandbox(&[]));
    let (before, state) = (files(&node), NodeState::of(&node));
    let sandbox = node.sandbox(&[("memory_mib", "256")]);
    sandbox.sh("echo one > /workspace/file; echo one > /dev/shm/file");
    start_counter(&sandbox);
    let first = snapshot(&sandbox);
    let then = counter(&sandbox);
    timing::wait_for("it runs on", || (counter(&sandbox) > then + 5).then_some(()));
    sandbox.sh("echo two > /workspace/file; echo two > /dev/shm/file; rm -f /workspace/none; sync");
    let second = snapshot(&sandbox);
    sandbox.sh("rm /workspace/file; sync");
    // A single look may find the file while it is being written.
    timing::wait_for("it runs on", || (counter(&sandbox) > then).then_some(()));
    for (id, word) in [(&first, "one"), (&second, "two"), (&first, "one")] {
        rollback(&sandbox, id);
        assert_eq!(sandbox.sh("cat /workspace/file /dev/shm/file"), format!("{word}\n{word}\n"));
        let back = counter(&sandbox);
        timing::wait_for("its program goes on", || (counter(&sandbox) > back).then_some(()));
    }
    let rows = node.control().ok(Request::new("", "snapshot.list").set("sandbox", &sandbox.id)).items;
    assert_eq!(rows.len(), 2, "{rows:?}");
    for id in [&first, &second] {
        node.control().ok(Request::new("", "snapshot.remove").arg(id));
    }
    assert!(node.control().err(Request::new("", "snapshot.inspect").arg(&first)).is(Code::NotFound));
    assert_eq!(sandbox.sh("cat /workspace/file /dev/shm/file"), "one\none\n");
    sandbox.remove().expect("it can be removed");
    timing::wait_for("nothing to be left", || (files(&node) == before).then_some(()));
    state.assert_restored(&node);
}

#[test]
fn forks_are_machines_of_their_own_with_the_same_memory() {
    let node = shared::node();
    // Not before the template is hashed.
    drop(node.sandbox(&[]));
    let (before, state) = (files(&node), NodeState::of(&node));
    let parent = node.sandbox(&[("network", "on")]);
    let id = "head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \\n' > /etc/machine-id";
    parent.client().ok(parent.exec_request(&["sh", "-c", id]).set("user", 0));
    parent.sh("echo disk > /workspace/file; echo memory > /dev/shm/file");
    start_counter(&parent);
    let forks = fork(&node, &parent.id, 3);
    let mut said = BTreeSet::new();
    for sandbox in forks.iter().chain([&parent]) {
        assert_eq!(sandbox.sh("cat /workspace/file /dev/shm/file"), "disk\nmemory\n");
        let count = counter(sandbox);
        timing::wait_for("its program goes on", || (counter(sandbox) > count).then_some(()));
        for script in [
            "head -c 16 /dev/urandom | sha256sum",
            "cat /proc/sys/kernel/random/uuid",
            "hostname",
            "cat /etc/machine-id",
            "ip -o -4 addr show eth0 | awk '{print $4}'",
            "cat /sys/class/net/eth0/address",
        ] {
            assert!(said.insert(sandbox.sh(script)), "`{script}` in {} said the same as in another", sandbox.id);
        }
        sandbox.sh(&format!("echo {} > /workspace/own", sandbox.id));
    }
    for sandbox in forks.iter().chain([&parent]) {
        assert_eq!(sandbox.sh("cat /workspace/own"), format!("{}\n", sandbox.id));
    }
    for sandbox in forks {
        sandbox.remove().expect("it can be removed");
    }
    assert_eq!(parent.sh("cat /workspace/file"), "disk\n");
    parent.remove().expect("it can be removed");
    timing::wait_for("nothing to be left", || (files(&node) == before).then_some(()));
    state.assert_restored(&node);
}
