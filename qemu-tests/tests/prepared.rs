//! Workers that have prepared a template's snapshot before anybody asks for a sandbox of it.

use qemu_tests::node::{Boot, Node};
use qemu_tests::{Request, Sandbox, timing};

const SHAPE: [(&str, &str); 2] = [("memory_mib", "128"), ("network", "on")];

fn take_snapshot(node: &Node) -> String {
    let request = Request::new("", "template.snapshot").arg("base").set("memory_mib", 128).set("network", "on");
    node.control().ok(request).field("id").to_string()
}

/// Waits until both workers that wait have prepared.
fn all_prepared(node: &Node) {
    timing::wait_for("two workers that prepared", || {
        let pool = node.pool("workers");
        (pool.number("ready") == Some(2) && pool.number("prepared") == Some(2)).then_some(())
    });
}

/// Workers that have the memory of a snapshot mapped.
fn mapping(node: &Node, snapshot: &str) -> u64 {
    let count = node.sh(&format!("cat /proc/[0-9]*/maps 2>/dev/null | grep /snapshots/{snapshot}/memory | wc -l"));
    count.trim().parse().expect("a number")
}

/// What is anonymous of the memory of the workers that wait, in KiB, each.
fn own_kib(node: &Node) -> Vec<u64> {
    let own = |id: &String| {
        let status = node.sh(&format!("grep RssAnon /proc/{}/status", node.worker(id)));
        status.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).unwrap_or(0)
    };
    node.idle_homes().iter().map(own).collect()
}

#[test]
fn a_template_of_the_same_image_has_no_part_in_anothers_sandboxes() {
    let node = Boot::kernel().start();
    let of_base = take_snapshot(&node);
    node.control().ok(Request::new("", "template.tag").arg("base").set("name", "other"));
    let other = Request::new("", "template.snapshot").arg("other").set("memory_mib", 128).set("network", "on");
    let of_other = node.control().ok(other).field("id").to_string();
    // Each has its own: neither took the other's away.
    let kept = |template: &str| {
        let rows = node.control().ok(Request::new("", "snapshot.list")).items;
        let mut of = rows.iter().filter(|row| row.get("template") == Some(template));
        of.next().and_then(|row| row.get("id")).map(str::to_string)
    };
    assert_eq!((kept("base"), kept("other")), (Some(of_base.clone()), Some(of_other.clone())));
    node.control().ok(Request::new("", "snapshot.remove").arg(&of_base));
    let sandbox = node.sandbox(&SHAPE);
    let spans = node.control().ok(sandbox.request("sandbox.trace")).items;
    assert!(
        spans.iter().any(|span| span.get("span") == Some("boot")),
        "it goes on from nothing of the other's: {spans:?}"
    );
    sandbox.remove().expect("a sandbox can be removed");
}

#[test]
fn a_sandbox_of_a_template_takes_a_worker_that_prepared_its_snapshot() {
    let node = Boot::kernel().start();
    let snapshot = take_snapshot(&node);
    all_prepared(&node);
    timing::wait_for("its memory to be mapped", || (mapping(&node, &snapshot) > 0).then_some(()));
    // The first shows what such guests touch, and those that wait have that from then on; also where it goes at once.
    let first = node.sandbox(&SHAPE);
    let told = |sandbox: &Sandbox| sandbox.sh("hostname; cat /etc/machine-id /proc/sys/kernel/random/uuid");
    let firsts = told(&first);
    first.remove().expect("a sandbox can be removed");
    all_prepared(&node);
    timing::wait_for("their pages", || own_kib(&node).iter().all(|kib| *kib > 1024).then_some(()));

    let idle = node.idle_homes();
    let second = node.sandbox(&SHAPE);
    assert!(idle.contains(&second.id), "{} is none of {idle:?}", second.id);
    let seconds = told(&second);
    assert!(seconds.starts_with(&format!("{}\n", second.id)), "{seconds}");
    assert!(firsts.lines().zip(seconds.lines()).all(|(one, other)| one != other), "{firsts}{seconds}");
    let clock = |text: String| text.trim().parse::<i64>().expect("a number");
    let before = clock(node.sh("date +%s"));
    let inside = clock(second.sh("date +%s"));
    assert!((before..=clock(node.sh("date +%s"))).contains(&inside), "its clock is the node's");
    assert!(second.sh("ip addr show dev eth0").contains("inet "), "it has its address");

    // What goes on from nothing, or is of another shape, gets a worker as well.
    all_prepared(&node);
    let cold = node.sandbox(&[("memory_mib", "128"), ("network", "on"), ("cold", "true")]);
    let other = node.sandbox(&[("memory_mib", "96")]);
    let third = node.sandbox(&SHAPE);
    for sandbox in [&cold, &other, &third] {
        assert_eq!(sandbox.sh("hostname"), format!("{}\n", sandbox.id));
    }
    for sandbox in [second, cold, other, third] {
        sandbox.remove().expect("a sandbox can be removed");
    }

    // The next snapshot takes the place of this one, which nobody keeps from going.
    let next = take_snapshot(&node);
    all_prepared(&node);
    timing::wait_for("the next one's memory to be mapped", || (mapping(&node, &next) > 0).then_some(()));
    timing::wait_for("nobody to map the one before", || (mapping(&node, &snapshot) == 0).then_some(()));
    node.control().ok(Request::new("", "snapshot.remove").arg(&next));
    timing::wait_for("nobody to map what was removed", || (mapping(&node, &next) == 0).then_some(()));
    timing::wait_for("two workers without", || {
        let pool = node.pool("workers");
        (pool.number("ready") == Some(2) && pool.number("prepared") == Some(0)).then_some(())
    });
    node.assert_ledger_agrees();
}
