//! What a running sandbox may take, changed while it runs.

use qemu_tests::{Code, Reply, Request, Sandbox, shared, timing};

fn update(sandbox: &Sandbox, limits: &[(&str, u64)]) -> Request {
    limits.iter().fold(sandbox.request("sandbox.update"), |request, (key, limit)| request.set(key, *limit))
}

/// How often requests of the root disk waited for the limit.
fn throttled(stats: &Reply) -> u64 {
    let row = stats.items.iter().find(|row| row.get("disk") == Some("root"));
    row.and_then(|row| row.number("throttled")).expect("the root disk has a row")
}

#[test]
fn limits_of_a_running_sandbox_change_in_its_worker_and_its_control_group_and_outlive_the_supervisor() {
    let node = shared::node();
    let sandbox = node.sandbox(&[("network", "on"), ("cpu_quota", "80")]);
    let group = format!("/sys/fs/cgroup/sandboxes/{}", sandbox.id);
    let group_has = |file: &str| node.sh(&format!("cat {group}/{file}"));
    assert_eq!(group_has("cpu.max"), "80000 100000\n");
    let changed = node.control().ok(update(&sandbox, &[("cpu_quota", 50), ("disk_iops", 50), ("net_mbps", 5)]));
    for (key, value) in [("cpu_quota", "50"), ("disk_iops", "50"), ("net_mbps", "5")] {
        assert_eq!(changed.fields.get(key), Some(value));
    }
    assert_eq!(group_has("cpu.max"), "50000 100000\n");
    assert!(group_has("io.max").trim().ends_with("rbps=max wbps=max riops=100 wiops=100"), "{}", group_has("io.max"));

    let stats = || node.control().ok(sandbox.request("sandbox.stats"));
    assert_eq!(throttled(&stats()), 0);
    let read = "dd if=/dev/vda of=/dev/null bs=4k count=100 iflag=direct 2>/dev/null";
    sandbox.sh(read);
    assert!(throttled(&stats()) > 0, "100 requests at once are more than 50 a second allow");

    let killed = node.supervisor();
    node.sh(&format!("kill -9 {killed}"));
    timing::wait_for("another supervisor", || (node.supervisor() != killed).then_some(()));
    timing::wait_for("its answer", || node.control().call(Request::new("", "hello")).ok());
    assert_eq!(sandbox.inspect().get("disk_iops"), Some("50"));
    let changed = node.control().ok(update(&sandbox, &[("disk_iops", 0), ("cpu_quota", 0)]));
    assert_eq!((changed.fields.get("disk_iops"), changed.fields.get("net_mbps")), (None, Some("5")));
    assert_eq!((group_has("cpu.max"), group_has("io.max")), ("200000 100000\n".to_string(), String::new()));
    // The guest's own reads waited too, up to the moment at which the limit went.
    let waited = throttled(&stats());
    timing::wait_for("its agent to be reached again", || node.control().call(sandbox.exec_request(&["true"])).ok());
    sandbox.sh(read);
    assert_eq!(throttled(&stats()), waited, "nothing waits any more");
}

#[test]
fn limits_that_cannot_be_are_refused_and_change_nothing() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    let refused = |limits: &[(&str, u64)]| node.control().err(update(&sandbox, limits));
    let error = refused(&[("cpu_quota", 101), ("disk_iops", 5)]);
    assert!(error.is(Code::OutOfRange), "{error}");
    assert_eq!(error.fields.get("max"), Some("100"));
    assert!(refused(&[("net_mbps", 5)]).is(Code::BadState), "it has no network device");
    assert!(refused(&[("disk_iops", 10_000_001)]).is(Code::OutOfRange));
    assert!(refused(&[("disk_iops", 5), ("memory_target_mib", 64)]).is(Code::BadArgument));
    assert_eq!(sandbox.inspect().get("disk_iops"), None);
    assert_eq!(node.sh(&format!("cat /sys/fs/cgroup/sandboxes/{}/cpu.max", sandbox.id)), "200000 100000\n");
}
