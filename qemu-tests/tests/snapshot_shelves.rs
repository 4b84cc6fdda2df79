//! What the node does with snapshots by itself: old ones go, long stacks of layers are merged, files are sealed and compared
//! with their rows, and templates' snapshots are no obstacle.

use std::collections::BTreeSet;

use qemu_tests::node::Boot;
use qemu_tests::state::NodeState;
use qemu_tests::witness::files;
use qemu_tests::{Code, Fields, Node, Request, Sandbox, shared, timing};

fn layers(node: &Node) -> usize {
    files(node).iter().filter(|name| name.starts_with("layers/")).count()
}

fn snapshots(node: &Node) -> Vec<Fields> {
    node.control().ok(Request::new("", "snapshot.list")).items
}

fn ids(node: &Node) -> BTreeSet<String> {
    snapshots(node).iter().filter_map(|row| row.get("id").map(str::to_string)).collect()
}

/// Takes a snapshot of a running sandbox; its id.
fn snapshot(sandbox: &Sandbox) -> String {
    sandbox.client().ok(sandbox.request("snapshot.create")).field("id").to_string()
}

fn fork(node: &Node, from: &str) -> Sandbox {
    let reply = node.control().ok(Request::new("", "snapshot.fork").arg(from));
    Sandbox::of(node.control(), reply.items[0].get("id").expect("an id"))
}

/// Another supervisor in place of the one that is killed.
fn replace_supervisor(node: &Node) {
    let supervisor = node.supervisor();
    node.sh(&format!("kill -9 {supervisor}"));
    timing::wait_for("another supervisor", || (node.supervisor() != supervisor).then_some(()));
    timing::wait_for("its answer", || node.control().call(Request::new("", "hello")).ok());
}

/// What a sandbox's disk has to be after so many rounds.
fn assert_rounds(sandbox: &Sandbox, rounds: usize) {
    let expected: String = (0..rounds).map(|round| format!("round {round}\n")).collect();
    assert_eq!(sandbox.sh("cat /workspace/rounds"), expected);
    assert_eq!(sandbox.sh("cd /workspace && sha256sum -c sums | grep -vc OK || true"), "0\n");
}

#[test]
fn old_snapshots_go_and_what_they_leave_of_disks_is_merged() {
    let seconds = (30 * timing::factor()).min(600);
    let configuration = format!(
        "[sandbox]\nboot_timeout_s = {seconds}\nstop_timeout_s = {seconds}\n[health]\nprobe_timeout_s = {seconds}\n\
         [snapshots]\nmax_count = 2\nmax_age_s = 3600\n"
    );
    let node = Boot::kernel().file("/etc/warren/warren.toml", 0o644, configuration.into_bytes()).start();
    let before = files(&node);
    let sandbox = node.sandbox(&[("memory_mib", "64")]);
    let mut taken = Vec::new();
    for round in 0..11 {
        sandbox.sh(&format!(
            "cd /workspace && echo round {round} >> rounds && head -c 200000 /dev/urandom > data{} && rm -f sums && \
             sha256sum data* > sums && sync",
            round % 3
        ));
        taken.push(snapshot(&sandbox));
    }
    // Each went for another, and their owner is told what there is.
    assert_eq!(ids(&node), taken[9..].iter().cloned().collect());
    assert!(node.control().err(sandbox.request("sandbox.rollback").set("snapshot", &taken[0])).is(Code::NotFound));
    // Two snapshots with a layer each that is theirs, and what is below them.
    timing::wait_for("the layers to be merged", || (layers(&node) <= 8).then_some(()));
    node.assert_ledger_agrees();
    assert_rounds(&sandbox, 11);
    sandbox.sh("echo on >> /workspace/rounds; sync");
    sandbox.client().ok(sandbox.request("sandbox.rollback").set("snapshot", &taken[9]));
    assert_rounds(&sandbox, 10);
    let forked = fork(&node, &taken[10]);
    assert_rounds(&forked, 11);
    forked.remove().expect("it can be removed");

    // Two hours later, none is young enough, for whoever comes then.
    node.sh("date -s @$(($(date +%s) + 7200)) > /dev/null");
    replace_supervisor(&node);
    timing::wait_for("the snapshots to be gone", || snapshots(&node).is_empty().then_some(()));
    timing::wait_for("its agent", || node.control().call(sandbox.exec_request(&["true"])).ok());
    assert_rounds(&sandbox, 10);
    sandbox.client().ok(sandbox.request("sandbox.pause"));
    sandbox.client().ok(sandbox.request("sandbox.resume"));
    assert_rounds(&sandbox, 10);
    sandbox.remove().expect("it can be removed");
    timing::wait_for("nothing to be left", || (files(&node) == before).then_some(()));
    node.assert_ledger_agrees();
    node.power_off();
}

/// Waits for a difference between rows and files.
fn difference(node: &Node, resource: &str, part: &str) -> Fields {
    timing::wait_for(&format!("a row about {part}"), || {
        let rows = node.control().ok(Request::new("", "node.ledger")).items;
        let fits = |row: &Fields| {
            row.get("resource") == Some(resource) && row.get("name").is_some_and(|name| name.contains(part))
        };
        rows.into_iter().find(fits)
    })
}

#[test]
fn rows_and_files_are_compared_and_another_memory_is_refused() {
    let node = shared::node();
    // From then on the template is known to be whole: nothing reads it any more.
    node.sandbox(&[]).remove().expect("it can be removed");
    let (before, state) = (files(&node), NodeState::of(&node));
    let sandbox = node.sandbox(&[("memory_mib", "64")]);
    let id = snapshot(&sandbox);
    node.assert_ledger_agrees();
    node.sh("touch /data/layers/strayx && mkdir /data/snapshots/strayy");
    assert_eq!(difference(&node, "layer", "strayx").get("kernel"), Some("present"));
    assert_eq!(difference(&node, "snapshot", "strayy").get("record"), Some("none"));
    node.sh(
        "rm /data/layers/strayx && rmdir /data/snapshots/strayy && mv /data/layers /data/moved && mkdir /data/layers",
    );
    assert_eq!(difference(&node, "layer", "").get("kernel"), Some("absent"));
    node.sh(&format!("rmdir /data/layers && mv /data/moved /data/layers && mv /data/snapshots/{id}/state /data/state"));
    let row = difference(&node, "snapshot", &format!("{id}/state"));
    assert_eq!((row.get("record"), row.get("kernel")), (Some("ready"), Some("absent")));
    node.sh(&format!("mv /data/state /data/snapshots/{id}/state"));
    node.assert_ledger_agrees();

    // Every node's data partition can seal.
    timing::wait_for("the seal", || {
        let row = node.control().ok(Request::new("", "snapshot.inspect").arg(&id)).fields;
        (row.get("sealed") == Some("true")).then_some(())
    });
    let memory = format!("/data/snapshots/{id}/memory");
    node.sh(&format!(
        "! (: >> {memory}) 2>/dev/null && cp {memory} /data/copy && mv {memory} /data/sealed && mv /data/copy {memory}"
    ));
    let refused = node.control().err(Request::new("", "snapshot.fork").arg(&id));
    assert!(refused.is(Code::Corrupt) && refused.message.contains("not the one that was sealed"), "{refused}");
    node.sh(&format!("mv /data/sealed {memory}"));
    let forked = fork(&node, &id);
    assert_eq!(forked.sh("echo on"), "on\n");
    forked.remove().expect("it can be removed");
    node.control().ok(Request::new("", "snapshot.remove").arg(&id));
    sandbox.remove().expect("it can be removed");
    timing::wait_for("nothing to be left", || (files(&node) == before).then_some(()));
    state.assert_restored(&node);
    node.assert_ledger_agrees();
}

#[test]
fn a_templates_snapshot_that_is_no_use_is_no_obstacle() {
    // A worker that prepared it before would need neither file.
    let config = b"[sandbox]\nprepared = 0\n".to_vec();
    let node = Boot::kernel().file("/etc/warren/warren.toml", 0o644, config).start();
    // From then on the template is known to be whole: nothing reads it any more.
    node.sandbox(&[]).remove().expect("it can be removed");
    let (before, state) = (files(&node), NodeState::of(&node));
    let shape = [("memory_mib", "96"), ("name", "same")];
    let request = || Request::new("", "template.snapshot").arg("base").set("memory_mib", 96);
    let id = node.control().ok(request()).field("id").to_string();
    let restored = node.sandbox(&shape);
    assert_eq!(restored.sh("echo on; hostname"), "on\nsame\n");
    restored.remove().expect("it can be removed");
    // Its state is nothing any more, which only the worker sees.
    node.sh(&format!("printf x | dd of=/data/snapshots/{id}/state conv=notrunc 2>/dev/null"));
    for _ in 0..2 {
        let booted = node.sandbox(&shape);
        assert_eq!(booted.sh("echo on; hostname"), "on\nsame\n");
        assert_eq!(booted.inspect().get("name"), Some("same"));
        booted.remove().expect("it can be removed");
    }
    // Only the first of them was tried.
    assert_eq!(node.console_text().matches("cannot start from its template's snapshot").count(), 1);
    // Who asks for what was in it is told.
    let refused = node.control().err(Request::new("", "snapshot.fork").arg(&id));
    assert!(!refused.message.is_empty(), "{refused}");
    // Nor one whose file is gone, which is seen before anything is begun.
    let second = node.control().ok(request()).field("id").to_string();
    assert_ne!(second, id);
    node.sh(&format!("mv /data/snapshots/{second}/memory /data/memory"));
    let booted = node.sandbox(&shape);
    assert_eq!(booted.sh("echo on"), "on\n");
    booted.remove().expect("it can be removed");
    node.sh(&format!("mv /data/memory /data/snapshots/{second}/memory"));

    // Of a template that is another now there is no snapshot.
    let manifest = "/usr/share/warren/templates/base/manifest.toml";
    node.sh(&format!("cp {manifest} /run/manifest && sed -i 's/^sha256 = \"....../sha256 = \"000000/' {manifest}"));
    replace_supervisor(&node);
    timing::wait_for("the snapshot to be gone", || snapshots(&node).is_empty().then_some(()));
    node.sh(&format!("cat /run/manifest > {manifest} && rm /run/manifest"));
    replace_supervisor(&node);
    timing::wait_for("nothing to be left", || (files(&node) == before).then_some(()));
    state.assert_restored(&node);
    node.assert_ledger_agrees();
}
