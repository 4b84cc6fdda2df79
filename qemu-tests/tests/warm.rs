//! Sandboxes that are started before anybody asks for one.

use qemu_tests::node::{Boot, Node};
use qemu_tests::{Request, Sandbox, timing};

const CONFIG: &str = "[[warm]]\ntemplate = \"base\"\nmemory_mib = 128\nmin_ready = 2\nwait_ms = 60000\n";

fn node() -> Node {
    Boot::kernel().file("/etc/warren/warren.toml", 0o644, CONFIG.as_bytes().to_vec()).start()
}

fn number(node: &Node, key: &str) -> u64 {
    node.pool("warm").number(key).unwrap_or_else(|| panic!("the pool has no {key}"))
}

fn full(node: &Node) {
    timing::wait_for("two that are ready", || (number(node, "ready") == 2).then_some(()));
}

/// Homes of sandboxes that no client sees.
fn hidden(node: &Node) -> Vec<String> {
    let seen: Vec<String> = node
        .control()
        .ok(Request::new("", "sandbox.list"))
        .items
        .iter()
        .filter_map(|row| row.get("id").map(str::to_string))
        .collect();
    let idle = node.idle_homes();
    let homes = node.sh("ls /data/sandboxes");
    homes.lines().filter(|id| !idle.contains(*id) && !seen.iter().any(|s| s == id)).map(str::to_string).collect()
}

#[test]
fn a_request_gets_one_that_has_started_and_another_takes_its_place() {
    let node = node();
    full(&node);
    let ready = hidden(&node);
    assert_eq!(ready.len(), 2, "{ready:?}");
    assert!(node.control().ok(Request::new("", "sandbox.list")).items.is_empty());
    let sandbox = node.sandbox(&[("memory_mib", "128"), ("name", "mine"), ("env", "COLOUR=blue"), ("label", "a=b")]);
    assert!(ready.contains(&sandbox.id), "{} is none of {ready:?}", sandbox.id);
    assert_eq!(sandbox.sh("hostname; echo $COLOUR"), "mine\nblue\n");
    let row = sandbox.inspect();
    assert_eq!((row.get("name"), row.get("label"), row.get("state")), (Some("mine"), Some("a=b"), Some("running")));
    // Another shape is made as ever.
    let other = node.sandbox(&[("memory_mib", "192")]);
    assert!(!ready.contains(&other.id));
    full(&node);
    assert_eq!((number(&node, "hits"), number(&node, "misses")), (1, 0));

    // From a snapshot of the template they are started too.
    let snapshot = Request::new("", "template.snapshot").arg("base").set("memory_mib", 128);
    node.control().ok(snapshot);
    for _ in 0..3 {
        full(&node);
        let next = node.sandbox(&[("memory_mib", "128")]);
        assert_eq!(next.sh("hostname"), format!("{}\n", next.id));
    }
    assert_eq!(number(&node, "hits"), 4);
    node.assert_ledger_agrees();
}

#[test]
fn what_waits_is_nobodys_and_goes_with_its_supervisor() {
    let node = node();
    full(&node);
    let before = hidden(&node);
    // One whose worker dies is replaced.
    node.sh(&format!("kill -9 {}", node.worker(&before[0])));
    timing::wait_for("another in its place", || {
        let now = hidden(&node);
        (number(&node, "ready") == 2 && !now.contains(&before[0])).then_some(())
    });
    let before = hidden(&node);
    let killed = node.supervisor();
    node.sh(&format!("kill -9 {killed}"));
    timing::wait_for("another supervisor", || (node.supervisor() != killed).then_some(()));
    timing::wait_for("its answer", || node.control().call(Request::new("", "hello")).ok());
    full(&node);
    let after = hidden(&node);
    assert!(after.iter().all(|id| !before.contains(id)), "{before:?} {after:?}");
    node.assert_ledger_agrees();
    // A drain ends them, and they come back after it.
    node.control().ok(Request::new("", "node.drain"));
    assert_eq!((number(&node, "ready"), hidden(&node)), (0, Vec::new()));
    node.control().ok(Request::new("", "node.undrain"));
    full(&node);
    let sandbox: Sandbox = node.sandbox(&[("memory_mib", "128")]);
    assert_eq!(sandbox.exec(&["echo", "well"]).text("stdout"), "well\n");
}
