//! What sandboxes hold: the record and the kernel agree, a resource that is used up harms nobody, the record can be copied
//! and put back.

use qemu_tests::node::Boot;
use qemu_tests::state::NodeState;
use qemu_tests::{Code, Fields, Node, Request, Sandbox, shared, timing};

fn differences(node: &Node) -> Vec<Fields> {
    node.control().ok(Request::new("", "node.ledger")).items
}

/// Waits for a row about a resource of that name.
fn named(node: &Node, resource: &str, part: &str) -> Fields {
    timing::wait_for(&format!("a row about {part}"), || {
        let fits = |row: &Fields| {
            row.get("resource") == Some(resource) && row.get("name").is_some_and(|name| name.contains(part))
        };
        differences(node).into_iter().find(fits)
    })
}

#[test]
fn whatever_is_there_or_missing_behind_its_back_is_named() {
    let node = shared::node();
    let sandbox = node.sandbox(&[("network", "on")]);
    let id = sandbox.id.clone();
    node.assert_ledger_agrees();
    let all = node.control().ok(Request::new("", "node.ledger").set("all", true)).items;
    let own: Vec<&str> =
        all.iter().filter(|row| row.get("sandbox") == Some(&id)).filter_map(|row| row.get("state")).collect();
    assert_eq!(own, ["active"; 8], "{all:?}");

    node.sh("mkdir /sys/fs/cgroup/sandboxes/strayxxxxxxx && mkdir /data/sandboxes/strayyyyyyyy");
    assert_eq!(named(&node, "cgroup", "strayxxxxxxx").get("record"), Some("none"));
    assert_eq!(named(&node, "directory", "strayyyyyyyy").get("kernel"), Some("present"));
    node.sh("rmdir /sys/fs/cgroup/sandboxes/strayxxxxxxx /data/sandboxes/strayyyyyyyy");
    node.sh("touch /data/overlays/stray && mkdir -p /data/sandboxes/m && mount -t tmpfs none /data/sandboxes/m");
    assert_eq!(named(&node, "disk", "stray").get("record"), Some("none"));
    assert_eq!(named(&node, "mount", "/data/sandboxes/m").get("kernel"), Some("present"));
    node.sh("umount /data/sandboxes/m; rmdir /data/sandboxes/m; rm /data/overlays/stray");
    node.assert_ledger_agrees();

    // What is a sandbox's own.
    node.sh(&format!("mv /run/warren/sandboxes/{id}.sock /run/away"));
    let row = named(&node, "socket", &id);
    assert_eq!((row.get("record"), row.get("kernel")), (Some("active"), Some("absent")), "{row:?}");
    node.sh(&format!(
        "mv /run/away /run/warren/sandboxes/{id}.sock; echo max > /sys/fs/cgroup/sandboxes/{id}/memory.max"
    ));
    assert_eq!(named(&node, "memory", &id).get("kernel"), Some("no limit"));
    node.sh(&format!("echo 256M > /sys/fs/cgroup/sandboxes/{id}/memory.max"));
    node.assert_ledger_agrees();
    sandbox.remove().expect("a sandbox can be removed");
}

#[test]
fn a_supervisor_that_comes_after_settles_what_was_left() {
    let node = shared::node();
    let kept = node.sandbox(&[("network", "on")]);
    let before = NodeState::of(&node);
    let supervisor = node.supervisor();
    // A directory of nobody, and a record of what is not there any more.
    node.sh(&format!("mkdir /data/sandboxes/strayzzzzzzz; kill -9 {supervisor}"));
    timing::wait_for("another supervisor", || (node.supervisor() != supervisor).then_some(()));
    timing::wait_for("its answer", || node.control().call(Request::new("", "hello")).ok());
    timing::wait_for("the directory to be gone", || {
        node.sh("ls /data/sandboxes").find("strayzzz").is_none().then_some(())
    });
    let said = node.control().ok(Request::new("", "node.ledger")).fields;
    assert!(said.number("reclaimed").is_some_and(|count| count >= 1), "{said:?}");
    before.assert_restored(&node);
    assert_eq!(kept.exec(&["echo", "on"]).text("stdout"), "on\n");
    kept.remove().expect("a sandbox taken over can be removed");
}

/// What the node says of a sandbox for whose writes it has no room.
const NO_ROOM: &str = "no room for what the sandbox writes";

#[test]
fn a_full_data_partition_refuses_what_needs_room_and_harms_nobody() {
    // A guest whose overlay has no room for its first writes says so in words of its own.
    let node = Boot::kernel().allow(NO_ROOM).start();
    let kept = node.sandbox(&[]);
    kept.sh("echo kept > /workspace/file; sync");
    let before = NodeState::of(&node);
    let writing = node.sandbox(&[]);
    timing::wait_for("the pools to be filled", || {
        let ready = ["workers", "overlays"].map(|pool| node.pool(pool).number("ready").unwrap_or(0));
        ready.iter().all(|ready| *ready >= 2).then_some(())
    });
    node.fill_data();
    // What was made beforehand is still there to be had, and its guest finds no room for what it writes first. After that
    // nothing can be made.
    let (mut made, mut of_guests, mut of_node) = (Vec::new(), Vec::new(), Vec::new());
    timing::wait_for("a refusal of what is not there beforehand", || {
        match node.control().call(Sandbox::create_request(&[])) {
            Ok(reply) => made.push(Sandbox::of(node.control(), reply.field("id"))),
            Err(error) => {
                assert!(error.is(Code::NoCapacity) && !error.message.is_empty(), "{error}");
                let of_guest = error.message.contains(NO_ROOM);
                assert_eq!(error.fields.get("resource") == Some("disk"), of_guest, "{error}");
                if of_guest { of_guests.push(error) } else { of_node.push(error) }
            }
        }
        (!of_node.is_empty()).then_some(())
    });
    assert!(!of_guests.is_empty(), "pooled overlays have room where there is none: {made:?} {of_node:?}");
    // Output that cannot be kept ends its program, and nothing else.
    let unkept = node.control().err(kept.exec_request(&["cat", "/workspace/file"]));
    assert!(unkept.is(Code::NoCapacity) && unkept.message.contains("cannot be kept"), "{unkept}");
    assert_eq!(unkept.fields.get("resource"), Some("disk"), "{unkept}");
    assert_eq!(kept.exec(&["grep", "-q", "kept", "/workspace/file"]).field("exit"), "0");
    // What a guest cannot write is the node's want of room, not the file's fault.
    let call = writing.start(writing.request("file.write").set("path", "/workspace/large"));
    let writer = call.writer();
    if writer.write("content", &vec![b'x'; 8 << 20]) {
        writer.end("content");
    }
    let first = call.finish();
    let call = writing.start(writing.request("exec.start").arg("sync"));
    let synced = call.finish();
    let call = writing.start(writing.request("file.write").set("path", "/workspace/small"));
    let writer = call.writer();
    if writer.write("content", b"x") {
        writer.end("content");
    }
    let refused =
        first.err().or_else(|| call.finish().err()).unwrap_or_else(|| panic!("it could be written: {synced:?}"));
    assert!(refused.is(Code::NoCapacity) && refused.fields.get("resource") == Some("disk"), "{refused}");
    assert!(["EIO", "EROFS"].contains(&refused.fields.get("errno").unwrap_or_default()), "{refused:?}");
    assert!(node.control().call(Request::new("", "node.info")).is_ok());
    node.free_data();
    for sandbox in made.into_iter().chain([writing]) {
        sandbox.remove().expect("a sandbox can be removed");
    }
    timing::wait_for("room to be used again", || {
        let made = node.control().call(Sandbox::create_request(&[])).ok()?;
        let sandbox = Sandbox::of(node.control(), made.field("id"));
        assert_eq!(sandbox.exec(&["echo", "well"]).text("stdout"), "well\n");
        sandbox.sh("dd if=/dev/zero of=/workspace/large bs=1M count=8 2>/dev/null; sync");
        sandbox.remove().ok()
    });
    assert_eq!(kept.exec(&["cat", "/workspace/file"]).text("stdout"), "kept\n");
    // What its programs said is kept with it.
    before.assert_restored_but(&node, |line| line.contains(&kept.id));
    node.power_off();
}

#[test]
fn user_ids_and_slots_that_are_used_up_come_back() {
    let seconds = (30 * timing::factor()).min(600);
    let config = format!(
        "[sandbox]\nboot_timeout_s = {seconds}\nstop_timeout_s = {seconds}\n[jail]\nuid_count = 3\n\
         [worker_pool]\nwait_ms = 200\n[network]\nmax = 1\nmin_ready = 1\nwait_ms = 200\n"
    );
    let node = Boot::kernel().file("/etc/warren/warren.toml", 0o644, config.into_bytes()).start();
    let first = node.sandbox(&[("network", "on")]);
    let refused = node.control().err(Sandbox::create_request(&[("network", "on")]));
    assert!(refused.is(Code::NoCapacity) && refused.message.contains("slot"), "{refused}");
    // Of what could not be created the trace is there, with the error in the span that failed.
    let trace = Request::new("", "sandbox.trace").arg(refused.fields.get("sandbox").expect("its id"));
    let trace = node.control().ok(trace);
    assert_eq!((refused.fields.get("span"), trace.field("failed")), (Some("network"), "network"), "{trace:?}");
    let failed = trace.items.iter().find(|row| row.get("error").is_some()).expect("a span with the error");
    assert!(failed.get("error").is_some_and(|error| error.contains("slot")), "{failed:?}");
    let second = node.sandbox(&[]);
    let third = node.sandbox(&[]);
    let refused = node.control().err(Sandbox::create_request(&[]));
    assert!(refused.is(Code::NoCapacity) && refused.fields.get("resource") == Some("uid"), "{refused}");
    assert_eq!(refused.fields.get("span"), Some("allocate"), "{refused}");
    for sandbox in [&first, &second, &third] {
        assert_eq!(sandbox.exec(&["echo", "on"]).text("stdout"), "on\n");
    }
    // A worker that dies gives its id back, and its slot.
    node.sh(&format!("kill -9 {}", node.worker(&first.id)));
    timing::wait_for("the sandbox to be in error", || (first.state() == "error").then_some(()));
    let again = timing::wait_for("its id to be used again", || {
        node.control().call(Sandbox::create_request(&[("network", "on")])).ok()
    });
    let again = Sandbox::of(node.control(), again.field("id"));
    assert_eq!(again.exec(&["echo", "on"]).text("stdout"), "on\n");
    for sandbox in [first, second, third, again] {
        sandbox.remove().expect("a sandbox can be removed");
    }
    node.power_off();
}

/// A file on the node from `node.backup`.
fn backup(node: &Node) -> Vec<u8> {
    let mut reply = node.control().ok(Request::new("", "node.backup"));
    let content = reply.data.remove("content").unwrap_or_default();
    assert_eq!(reply.fields.number("size"), Some(content.len() as u64));
    content
}

fn restore(node: &Node, content: &[u8], force: bool) -> Result<Fields, qemu_tests::Error> {
    let request = Request::new("", "node.restore");
    let call = node.control().start(if force { request.set("force", true) } else { request });
    let writer = call.writer();
    if writer.write("content", content) {
        writer.end("content");
    }
    call.finish().map(|reply| reply.fields)
}

#[test]
fn a_backup_that_is_put_back_is_what_the_node_knows_then() {
    let node = shared::node();
    let kept = node.sandbox(&[("name", "kept")]);
    let copy = backup(&node);
    assert!(copy.starts_with(b"SQLite format 3\0"));
    let listed = || node.control().ok(Request::new("", "sandbox.list")).items.len();
    let later = node.sandbox(&[("name", "later")]);

    // What is none, and what would lose a sandbox, is refused, and nothing changes.
    for damaged in [&b"no database"[..], &copy[..copy.len() / 2], &[0; 8192]] {
        let error = restore(&node, damaged, false).expect_err("it is none");
        assert!(error.is(Code::Corrupt), "{error}");
    }
    let error = restore(&node, &copy, false).expect_err("it does not know `later`");
    assert!(error.is(Code::BadState), "{error}");
    assert_eq!((listed(), later.state().as_str()), (2, "running"));

    let supervisor = node.supervisor();
    let fields = restore(&node, &copy, true).expect("it is whole");
    assert_eq!(fields.number("sandboxes"), Some(1), "{fields:?}");
    timing::wait_for("another supervisor", || (node.supervisor() != supervisor).then_some(()));
    timing::wait_for("its answer", || node.control().call(Request::new("", "hello")).ok());
    assert_eq!(listed(), 1);
    assert_eq!(kept.exec(&["echo", "on"]).text("stdout"), "on\n", "it ran on all the while");
    let lost = later.keep();
    timing::wait_for("what it does not know to be gone", || {
        node.sh("ls /data/sandboxes").find(&lost).is_none().then_some(())
    });
    let rows = node.control().ok(Request::new("", "node.audit")).items;
    let restored = rows.iter().find(|row| row.get("verb") == Some("node.restore"));
    assert_eq!(restored.and_then(|row| row.get("result")), Some("ok"), "{rows:?}");
    assert_eq!(node.run(&["test", "-s", "/data/state.db.replaced"]).exit, 0, "the one before is kept");
    assert_eq!(node.run(&["sh", "-c", "ls /data | grep -E 'backup|restore'"]).stdout, "", "nothing else is left");
    kept.remove().expect("a sandbox taken over can be removed");
}
