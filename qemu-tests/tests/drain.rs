//! The end of things in order: a node that is drained, and a supervisor that another one takes the place of.

use std::time::Duration;

use qemu_tests::{Boot, Code, Fields, Node, Request, Sandbox, shared, timing};

/// All values of a key.
fn all(fields: &Fields, key: &str) -> Vec<String> {
    let pairs = fields.0.iter().filter(|(name, _)| name == key);
    pairs.map(|(_, value)| String::from_utf8_lossy(value).into_owned()).collect()
}

fn status(node: &Node) -> String {
    node.info().get("status").unwrap_or_default().to_string()
}

/// Waits for the supervisor after the one that ended, and until it answers.
fn next_supervisor(node: &Node, ended: u64) {
    timing::wait_for("another supervisor", || (node.supervisor() != ended).then_some(()));
    timing::wait_for("its answer", || node.control().call(Request::new("", "hello")).ok());
}

#[test]
fn a_drained_node_takes_nothing_new_and_answers_once_nothing_runs_and_all_is_written() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    let other = node.sandbox(&[]);
    let mut drain = node.control().start(Request::new("", "node.drain"));
    assert_eq!(drain.item().get("sandboxes"), Some("2"));
    assert_eq!(status(&node), "draining");
    let refused = node.control().err(Sandbox::create_request(&[]));
    assert!(refused.is(Code::Draining), "{refused}");
    // Those that run go on, until they end by themselves.
    assert_eq!(sandbox.exec(&["echo", "on"]).text("stdout"), "on\n");
    other.stop();
    timing::wait_for("a step", || (drain.item().get("sandboxes") == Some("1")).then_some(()));

    // It lasts over a kill of the supervisor; a client asks again, now with a deadline.
    let killed = node.supervisor();
    node.sh(&format!("kill -9 {killed}"));
    assert_eq!(drain.finish().expect_err("its supervisor is gone").code, "NODE_RESTARTED");
    next_supervisor(&node, killed);
    assert_eq!((status(&node), sandbox.state()), ("draining".to_string(), "running".to_string()));
    assert!(node.control().err(Sandbox::create_request(&[])).is(Code::Draining));
    let mut drain = node.control().start(Request::new("", "node.drain").set("deadline_s", 1));
    assert_eq!(drain.item().get("sandboxes"), Some("1"));
    let done = drain.finish_ok();
    assert_eq!((done.field("sandboxes"), done.field("sentinel")), ("0", "none"));
    assert_eq!((sandbox.state(), sandbox.inspect().get("reason")), ("stopped".to_string(), Some("stopped")));
    // What was answered is in the audit log with its result.
    let audit = node.control().ok(Request::new("", "node.audit").set("limit", 50)).items;
    let refused = audit.iter().find(|row| row.get("verb") == Some("sandbox.create")).expect("the refused create");
    assert_eq!(refused.get("result"), Some("DRAINING"));

    node.control().ok(Request::new("", "node.undrain"));
    assert_eq!(status(&node), "healthy");
    assert_eq!(node.sandbox(&[]).exec(&["echo", "again"]).text("stdout"), "again\n");
    let out = node.sh("warren node drain --deadline 0 && warren node undrain");
    assert!(out.contains("0 sandboxes left"), "{out}");
    for sandbox in [sandbox, other] {
        sandbox.remove().expect("what has ended can be removed");
    }
}

#[test]
fn whoever_takes_a_drain_back_ends_the_wait_for_it() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    let mut drain = node.control().start(Request::new("", "node.drain"));
    drain.item();
    // A client that goes away does not end the drain.
    let mut second = node.control().start(Request::new("", "node.drain").set("deadline_s", 3600));
    second.item();
    second.cancel();
    assert!(second.finish().expect_err("cancelled").is(Code::Cancelled));
    assert_eq!(status(&node), "draining");
    assert!(node.info().number("drain_until_ms").is_some());
    node.control().ok(Request::new("", "node.undrain"));
    assert!(drain.finish().expect_err("it was taken back").is(Code::Cancelled));
    assert_eq!((status(&node), sandbox.state()), ("healthy".to_string(), "running".to_string()));
}

#[test]
fn a_newer_program_takes_over_from_a_supervisor_that_is_told_to_end() {
    let node = Boot::kernel().start();
    let sandbox = node.sandbox(&[]);
    let script = "n=0; while [ ! -e /workspace/stop ]; do echo line $n; n=$((n+1)); sleep 0.2; done; echo end";
    let started = node.control().ok(sandbox.exec_request(&["sh", "-c", script]).set("detach", true));
    let exec = started.field("exec").to_string();
    // One that a client watches: its end is not the program's.
    let waits = "echo begun; while [ ! -e /workspace/mark ]; do sleep 0.1; done; cat /workspace/mark";
    let mut watched = sandbox.start(sandbox.exec_request(&["sh", "-c", waits]));
    let second = watched.item().get("exec").expect("its number").to_string();
    watched.read_until("stdout", "begun\n");
    let worker = node.worker(&sandbox.id);

    // The same program as another file, of another content.
    node.sh("cp /usr/bin/warren /usr/bin/warren.new && echo newer >> /usr/bin/warren.new");
    node.sh("mv /usr/bin/warren.new /usr/bin/warren");
    let old = node.supervisor();
    node.sh(&format!("kill -TERM {old}"));
    assert_eq!(watched.finish().expect_err("its supervisor has ended").code, "NODE_RESTARTED");
    next_supervisor(&node, old);
    let new = node.supervisor();
    assert_eq!(node.sh(&format!("tail -c 6 /proc/{new}/exe")), "newer\n");
    assert_eq!((sandbox.state(), node.worker(&sandbox.id)), ("running".to_string(), worker));
    assert!(!node.console_text().contains("failed to stop"), "{}", node.console_tail(40));

    sandbox.sh("echo marked > /workspace/next && mv /workspace/next /workspace/mark");
    let replayed = node.control().ok(sandbox.request("exec.attach").set("exec", &second));
    assert_eq!((replayed.field("exit"), &*replayed.text("stdout")), ("0", "begun\nmarked\n"));
    std::thread::sleep(Duration::from_millis(500));
    sandbox.sh("touch /workspace/stop");
    let replayed = node.control().ok(sandbox.request("exec.attach").set("exec", &exec));
    let out = replayed.text("stdout");
    let mut expected: String = (0..out.lines().count() - 1).map(|n| format!("line {n}\n")).collect();
    expected.push_str("end\n");
    assert_eq!(out, expected);
    // Sandboxes of the old program and of the new one, side by side.
    assert_eq!(node.sandbox(&[]).exec(&["echo", "new"]).text("stdout"), "new\n");
    assert_eq!(sandbox.exec(&["echo", "old"]).text("stdout"), "old\n");
    sandbox.remove().expect("a sandbox taken over can be removed");
    node.power_off();
}

#[test]
fn an_external_that_is_away_is_named_and_the_node_serves() {
    let configuration = "[sandbox]\nboot_timeout_s = 600\nstop_timeout_s = 600\n\
         [sentinel]\nid = \"s1\"\nsender = { flush_ms = 100, retry_ms = 100, retry_longest_s = 1 }\n\
         [[sentinel.target]]\nname = \"metrics\"\nkind = \"prometheus\"\nurl = \"http://127.0.0.1:9/api/v1/write\"\n\
         [[sentinel.task]]\nid = \"node\"\nplugin = \"node\"\ninterval_ms = 1000\n";
    let node = Boot::kernel().file("/etc/warren/warren.toml", 0o600, configuration.as_bytes().to_vec()).start();
    let info = timing::wait_for("the external to be seen", || {
        let info = node.info();
        all(&info, "away").iter().any(|line| line.starts_with("metrics: ")).then_some(info)
    });
    assert_eq!(info.get("status"), Some("healthy"));
    let externals = all(&info, "external");
    assert_eq!(externals[0], "sentinel:closed", "{externals:?}");
    assert!(["metrics:open", "metrics:half-open"].contains(&&*externals[1]), "{externals:?}");
    assert_eq!(node.sandbox(&[]).exec(&["echo", "on"]).text("stdout"), "on\n");
    // What cannot be sent does not hold up a drain; it stays in the sentinel's log.
    let done = node.control().ok(Request::new("", "node.drain").set("deadline_s", 0));
    assert_eq!(done.field("sentinel"), "behind");
    node.power_off();
}

#[test]
fn a_drain_can_pause_what_still_runs() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    sandbox.sh("echo memory > /dev/shm/file");
    let drain = Request::new("", "node.drain").set("deadline_s", 0).set("action", "pause");
    assert_eq!(node.control().ok(drain).field("sandboxes"), "0");
    assert_eq!(sandbox.state(), "paused");
    assert!(node.control().err(sandbox.request("sandbox.resume")).is(Code::Draining));
    node.control().ok(Request::new("", "node.undrain"));
    node.control().ok(sandbox.request("sandbox.resume"));
    assert_eq!(sandbox.sh("cat /dev/shm/file"), "memory\n");
    sandbox.remove().expect("it can be removed");
    let error = node.control().err(Request::new("", "node.drain").set("action", "forget"));
    assert!(error.is(Code::BadArgument), "{error}");
}
