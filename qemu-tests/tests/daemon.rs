//! The supervisor as a daemon of an ordinary host: no `warren init` started it, and directories, socket, network and control
//! groups are what it was given.

use qemu_tests::{Node, Output, shared, timing};

const CONTROL: &str = "/run/daemon/control.sock";
const GROUP: &str = "/sys/fs/cgroup/daemon";

/// Beside the node's own supervisor: other directories, other users, and a network namespace for its slots and rules.
fn prepare(node: &Node) {
    let seconds = (30 * timing::factor()).min(600);
    let config = format!(
        "[control]\nsocket = \"{CONTROL}\"\n[paths]\ndata = \"/data/daemon\"\nrun = \"/run/daemon\"\n\
         [disks]\ndirectory = \"/data/daemon/disks\"\n[jail]\nuid_first = 2200000000\n\
         [sandbox]\nboot_timeout_s = {seconds}\nstop_timeout_s = {seconds}\n"
    );
    node.sh(&format!("mkdir -p /data/daemon /run/daemon {GROUP}"));
    node.write_file("/data/daemon/warren.toml", 0o600, config.as_bytes());
}

/// Starts it in a group as a service manager would. Ports of the node are not its own.
fn start(node: &Node, group: &str) -> String {
    node.sh(&format!(
        "sh -c 'echo 0 > {group}/cgroup.procs && exec unshare -n -m sh -c \"mount -t tmpfs none /dev/virtio-ports; \
         exec warren supervise --config /data/daemon/warren.toml\"' < /dev/null >> /data/daemon/log 2>&1 &"
    ));
    timing::wait_for("the daemon's answer", || (warren(node, &["ps"]).exit == 0).then_some(()));
    node.sh(&format!("cat {GROUP}/supervise/cgroup.procs")).trim().to_string()
}

fn warren(node: &Node, arguments: &[&str]) -> Output {
    node.run(&[&["warren", "--socket", CONTROL], arguments].concat())
}

fn said(node: &Node, arguments: &[&str]) -> String {
    let output = warren(node, arguments);
    let log = || node.sh("tail -n 20 /data/daemon/log");
    assert_eq!(output.exit, 0, "{arguments:?}: {output:?}\n{}", log());
    output.stdout
}

/// Waits until its record and the kernel agree: pools may be being filled.
fn ledger_agrees(node: &Node) {
    timing::wait_for("record and kernel to agree", || (warren(node, &["node", "ledger"]).exit == 0).then_some(()));
}

#[test]
fn a_supervisor_that_no_init_started_serves_and_the_next_takes_over_after_a_kill() {
    let node = shared::node();
    prepare(&node);
    let first = start(&node, GROUP);
    let id = said(&node, &["create", "--memory", "128M"]).trim().to_string();
    assert_eq!(said(&node, &["exec", &id, "--", "echo", "on"]), "on\n");
    let group = format!("{GROUP}/sandboxes/{id}");
    assert_eq!(node.sh(&format!("cat {group}/memory.max")).trim(), ((128 + 2 + 64) << 20).to_string());
    let worker = node.sh(&format!("cat {group}/cgroup.procs"));
    said(&node, &["exec", "-d", &id, "--", "sh", "-c", "sleep 1; echo kept > /workspace/file; sleep 1000"]);
    ledger_agrees(&node);

    node.sh(&format!("kill -9 {first}"));
    let second = start(&node, &format!("{GROUP}/supervise"));
    assert_ne!(first, second);
    let again = timing::wait_for("the agent to be reached and the file to be written", || {
        Some(warren(&node, &["exec", &id, "--", "cat", "/workspace/file"]))
            .filter(|output| output.exit == 0 && !output.stdout.is_empty())
    });
    assert_eq!(again.stdout, "kept\n");
    assert_eq!(node.sh(&format!("cat {group}/cgroup.procs")), worker, "it runs on under the same worker");
    ledger_agrees(&node);

    // Nobody tells how a worker ended; that it did is seen.
    node.sh(&format!("kill -9 {}", worker.trim()));
    timing::wait_for("its end to be seen", || said(&node, &["ps", "-a"]).contains("error").then_some(()));
    assert!(said(&node, &["inspect", &id]).contains("worker-ended"), "{}", said(&node, &["inspect", &id]));
    said(&node, &["rm", "-f", &id]);
    let next = said(&node, &["create", "--memory", "128M"]).trim().to_string();
    assert_eq!(said(&node, &["exec", &next, "--", "echo", "next"]), "next\n");

    // Who stops the host runs this first.
    said(&node, &["node", "stop"]);
    timing::wait_for("its end", || node.sh(&format!("cat {GROUP}/supervise/cgroup.procs")).is_empty().then_some(()));
    timing::wait_for("its groups to be empty", || {
        let left = node.sh(&format!("sed -n 's/^populated //p' {GROUP}/cgroup.events"));
        (left.trim() == "0").then_some(())
    });
    node.sh(&format!("rm -r /data/daemon /run/daemon; rmdir {GROUP}/sandboxes {GROUP}/supervise {GROUP}"));
}
