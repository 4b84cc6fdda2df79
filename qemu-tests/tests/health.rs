//! Guests that fail: each end is told apart, one that hangs is seen, and what is to be started again is.

use qemu_tests::{Boot, Fields, Node, Request, Sandbox, timing};

/// A node that finds a hung guest within some seconds.
fn boot() -> Node {
    let seconds = (30 * timing::factor()).min(600);
    let answer = timing::factor().min(10);
    let configuration = format!(
        "[sandbox]\nboot_timeout_s = {seconds}\nstop_timeout_s = {seconds}\n\
         [health]\nprobe_interval_s = 1\nprobe_timeout_s = {answer}\nprobe_failures = 2\n"
    );
    Boot::kernel().file("/etc/warren/warren.toml", 0o644, configuration.into_bytes()).start()
}

fn text(row: &Fields, key: &str) -> String {
    row.get(key).unwrap_or_default().to_string()
}

fn kill_worker(node: &Node, sandbox: &Sandbox) {
    node.sh(&format!("kill -9 {}", node.worker(&sandbox.id)));
}

/// Starts what ends its guest, as root.
fn begin(sandbox: &Sandbox, argv: &[&str]) {
    sandbox.client().ok(sandbox.exec_request(argv).set("user", 0).set("detach", true));
}

/// Waits until a sandbox runs that was started again so many times.
fn runs_again(sandbox: &Sandbox, restarts: u64) -> Fields {
    timing::wait_for("the sandbox to run again", || {
        let row = sandbox.inspect();
        (row.get("state") == Some("running") && row.number("restarts") == Some(restarts)).then_some(row)
    })
}

fn fails(sandbox: &Sandbox) -> Fields {
    timing::wait_for("the sandbox to be in error", || (sandbox.state() == "error").then(|| sandbox.inspect()))
}

#[test]
fn what_failed_is_started_again_on_its_disk_as_often_as_its_policy_says() {
    let node = boot();
    let keys = [("restart", "on-failure:2"), ("disk", "data:new:4"), ("network", "on")];
    let sandbox = node.sandbox(&keys);
    sandbox.sh("echo kept > /workspace/file; sync");
    let row = sandbox.inspect();
    assert_eq!(
        (row.get("restart"), row.get("restarts"), row.get("health")),
        (Some("on-failure:2"), Some("0"), Some("ok"))
    );
    kill_worker(&node, &sandbox);
    let row = runs_again(&sandbox, 1);
    assert!(text(&row, "reason").starts_with("worker-killed: "), "{row:?}");
    assert_eq!(sandbox.sh("cat /workspace/file"), "kept\n");
    assert_eq!(sandbox.sh("cat /sys/block/vdb/serial").trim(), "data");

    // The supervisor dies while it waits.
    kill_worker(&node, &sandbox);
    let row = fails(&sandbox);
    assert!(row.number("restart_at_ms").is_some(), "{row:?}");
    let supervisor = node.supervisor();
    node.sh(&format!("kill -9 {supervisor}"));
    timing::wait_for("another supervisor", || (node.supervisor() != supervisor).then_some(()));
    timing::wait_for("its answer", || node.control().call(Request::new("", "hello")).ok());
    runs_again(&sandbox, 2);
    assert_eq!(sandbox.sh("cat /workspace/file"), "kept\n");

    // Twice was asked for.
    kill_worker(&node, &sandbox);
    let row = fails(&sandbox);
    assert_eq!((row.get("restart_at_ms"), row.get("restarts")), (None, Some("2")));
    sandbox.remove().expect("a sandbox in error can be removed");

    // A guest that switches itself off, and one that is stopped, have not failed; nor is one started that is stopped
    // while it waits.
    let off = node.sandbox(&[("restart", "on-failure")]);
    begin(&off, &["poweroff", "-f"]);
    timing::wait_for("its end", || (off.state() == "stopped").then_some(()));
    let waiting = node.sandbox(&[("restart", "on-failure")]);
    kill_worker(&node, &waiting);
    fails(&waiting);
    waiting.stop();
    assert_eq!(waiting.state(), "stopped");
    let drained = node.sandbox(&[("restart", "on-failure")]);
    let mut drain = node.control().start(Request::new("", "node.drain"));
    drain.item();
    kill_worker(&node, &drained);
    drain.finish_ok();
    assert_eq!((drained.state(), drained.inspect().get("restart_at_ms")), ("error".to_string(), None));
    node.control().ok(Request::new("", "node.undrain"));
    runs_again(&drained, 1);
    for sandbox in [off, waiting, drained] {
        sandbox.remove().expect("each can be removed");
    }
    node.power_off();
}

#[test]
fn a_hung_guest_is_seen_and_ended_only_where_its_policy_says_so() {
    let node = boot();
    let freeze = |sandbox: &Sandbox, on: u8| {
        node.sh(&format!("echo {on} > /sys/fs/cgroup/sandboxes/{}/cgroup.freeze", sandbox.id));
    };
    let patient = node.sandbox(&[]);
    freeze(&patient, 1);
    let row = timing::wait_for("the guest to be seen as hung", || {
        let row = patient.inspect();
        (row.get("health") == Some("hung")).then_some(row)
    });
    assert_eq!(row.get("state"), Some("running"));
    let reason = text(&row, "reason");
    assert!(reason.starts_with("guest-hung: ") && reason.ends_with("stand still"), "{reason}");
    freeze(&patient, 0);
    timing::wait_for("it to answer again", || (patient.inspect().get("health") == Some("ok")).then_some(()));
    assert_eq!(patient.exec(&["echo", "on"]).text("stdout"), "on\n");

    let sandbox = node.sandbox(&[("restart", "on-failure")]);
    freeze(&sandbox, 1);
    let row = runs_again(&sandbox, 1);
    assert!(text(&row, "reason").starts_with("guest-hung: "), "{row:?}");
    assert_eq!(sandbox.exec(&["echo", "again"]).text("stdout"), "again\n");

    // A guest that freezes its own agent and goes on computing.
    let ice = "/sys/fs/cgroup/ice";
    let script =
        format!("mkdir {ice} && echo 1 > {ice}/cgroup.procs && echo 1 > {ice}/cgroup.freeze; while :; do :; done");
    begin(&sandbox, &["sh", "-c", &script]);
    let row = runs_again(&sandbox, 2);
    let reason = text(&row, "reason");
    assert!(reason.starts_with("guest-hung: ") && reason.ends_with("spin"), "{reason}");
    for sandbox in [patient, sandbox] {
        sandbox.remove().expect("each can be removed");
    }
    node.power_off();
}

#[test]
fn a_program_that_the_guest_kills_for_memory_is_told_from_a_guest_that_has_none_left() {
    let node = boot();
    let sandbox = node.sandbox(&[("memory_mib", "128")]);
    let killed = sandbox.exec(&["tail", "/dev/zero"]);
    assert_eq!((killed.field("signal"), killed.field("oom")), ("9", "true"));
    assert_eq!(sandbox.exec(&["echo", "on"]).text("stdout"), "on\n");
    let greedy = "echo -1000 > /proc/self/oom_score_adj; exec tail /dev/zero";
    begin(&sandbox, &["sh", "-c", greedy]);
    let row = fails(&sandbox);
    assert!(text(&row, "reason").starts_with("guest-oom: "), "{row:?}");
    sandbox.remove().expect("a sandbox in error can be removed");
    node.power_off();
}

#[test]
fn a_worker_that_the_node_kills_for_want_of_memory_says_so_and_the_others_go_on() {
    let node = Boot::kernel().memory_mib(1536).allow("oom-kill").allow("ut of memory").allow("Call Trace:").start();
    let supervisor = node.supervisor();
    let other = node.sandbox(&[]);
    // Half of it is what a file in memory may take there, which has to be more than the node can find.
    let sandbox = node.sandbox(&[("memory_mib", "1400")]);
    // All but a part of what is free goes to a file in memory, which nobody can be killed for.
    let available = node.info().number("memory_available_mib").expect("the node knows what it has");
    let taken = available.saturating_sub(160);
    node.sh(&format!(
        "mkdir -p /tmp/full && mount -t tmpfs -o size={taken}m none /tmp/full && \
         head -c {taken}m /dev/zero > /tmp/full/file 2>/dev/null || true"
    ));
    // No zeroes: the node's kernel takes pages of nothing else back (mm/huge_memory.c, underused huge pages).
    begin(&sandbox, &["sh", "-c", "while cat /usr/bin/busybox; do :; done >> /dev/shm/file"]);
    let row = fails(&sandbox);
    node.sh("umount /tmp/full && rmdir /tmp/full");
    assert!(text(&row, "reason").starts_with("host-oom: "), "{row:?}");
    assert_eq!(other.exec(&["echo", "on"]).text("stdout"), "on\n");
    assert_eq!(node.supervisor(), supervisor);
    assert_eq!(node.sandbox(&[]).exec(&["echo", "well"]).text("stdout"), "well\n");
    sandbox.remove().expect("a sandbox in error can be removed");
    node.power_off();
}
