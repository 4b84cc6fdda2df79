//! Sandboxes that have had their time: each clock, each end, changes on the way, and what is kept over ends of the
//! supervisor and of the node.

use qemu_tests::{Boot, Fields, Node, Request, Sandbox, shared, timing, witness};

fn settles(sandbox: &Sandbox, state: &str) -> Fields {
    timing::wait_for(&format!("the sandbox to be {state}"), || {
        let row = sandbox.inspect();
        (row.get("state") == Some(state)).then_some(row)
    })
}

fn update(sandbox: &Sandbox, key: &str, limit: &str) -> Fields {
    sandbox.client().ok(sandbox.request("sandbox.update").set(key, limit)).fields
}

fn resume(sandbox: &Sandbox) {
    // What is left of the worker before may still be taken down.
    timing::wait_for("a resume that is taken", || sandbox.client().call(sandbox.request("sandbox.resume")).ok());
}

fn reason(row: &Fields) -> &str {
    row.get("reason").unwrap_or_default()
}

fn overlay_is_there(node: &Node, sandbox: &Sandbox) -> bool {
    node.sh(&format!("ls /data/sandboxes/{}", sandbox.id)).contains("overlay")
}

#[test]
fn a_time_to_live_ends_in_a_stop_or_in_pauses_and_can_be_extended() {
    let node = shared::node();
    let sandbox = node.sandbox(&[("ttl", "600")]);
    let row = sandbox.inspect();
    assert_eq!(
        (row.get("ttl"), row.get("idle_timeout"), row.get("max_lifetime")),
        (Some("600:stop"), Some("none"), Some("none"))
    );
    let (created, until) = (row.number("created_ms").expect("a time"), row.number("ttl_until_ms").expect("a time"));
    assert_eq!(until - created, 600_000);
    let extended = update(&sandbox, "ttl", "1200").number("ttl_until_ms").expect("a time");
    assert!(extended > until + 500_000, "{until} became {extended}");
    witness::say(&sandbox, "here");
    witness::start(&sandbox);

    update(&sandbox, "ttl", "1:pause");
    let row = settles(&sandbox, "paused");
    assert_eq!(reason(&row), "ttl: its 1 s are over");
    // Each resume is worth another time to live.
    let over = update(&sandbox, "ttl", "4:pause").number("ttl_until_ms").expect("a time");
    timing::wait_for("that time to be over as well", || {
        let now: u64 = node.sh("date +%s").trim().parse().expect("seconds");
        (now * 1000 > over).then_some(())
    });
    resume(&sandbox);
    assert!(sandbox.inspect().number("ttl_until_ms") > Some(over), "{:?}", sandbox.inspect());
    settles(&sandbox, "paused");
    update(&sandbox, "ttl", "none");
    resume(&sandbox);
    assert_eq!(witness::word(&sandbox), "here");
    witness::goes_on(&sandbox);

    update(&sandbox, "ttl", "1:stop");
    let row = settles(&sandbox, "stopped");
    assert_eq!(reason(&row), "ttl: its 1 s are over");
    timing::wait_for("its disk to go", || (!overlay_is_there(&node, &sandbox)).then_some(()));
    assert_eq!(reason(&sandbox.inspect()), "ttl: its 1 s are over", "why it ended stays");
    timing::wait_for("record and kernel to agree", || {
        (node.run(&["warren", "node", "ledger"]).exit == 0).then_some(())
    });

    // A paused one that is to be stopped.
    let other = node.sandbox(&[]);
    other.client().ok(other.request("sandbox.pause"));
    update(&other, "ttl", "1");
    assert_eq!(reason(&settles(&other, "stopped")), "ttl: its 1 s are over");
}

#[test]
fn what_is_used_is_not_idle() {
    let node = shared::node();
    let sandbox = node.sandbox(&[("idle_timeout", "600:pause")]);
    update(&sandbox, "idle_timeout", "3:pause");
    // Longer than that, with somebody who waits for it.
    let slept = sandbox.exec(&["sleep", "8"]);
    assert_eq!(slept.field("exit"), "0");
    let row = settles(&sandbox, "paused");
    assert_eq!(reason(&row), "idle-timeout: nobody used it for 3 s");
    assert_eq!(row.get("executing"), Some("false"));

    // A program that nobody waits for is no use.
    resume(&sandbox);
    sandbox.client().ok(sandbox.exec_request(&["sleep", "1000"]).set("detach", true));
    settles(&sandbox, "paused");
    update(&sandbox, "idle_timeout", "none");
    resume(&sandbox);
    assert_eq!(sandbox.exec(&["true"]).field("exit"), "0");
}

#[test]
fn a_lifetime_that_is_over_is_over() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    update(&sandbox, "max_lifetime", "1:pause");
    assert_eq!(reason(&settles(&sandbox, "paused")), "max-lifetime: its 1 s are over");
    timing::wait_for("its worker to be gone", || sandbox.inspect().get("pid").is_none().then_some(()));
    let error = timing::wait_for("the refusal", || {
        let error = sandbox.client().err(sandbox.request("sandbox.resume"));
        error.message.contains("max_lifetime").then_some(error)
    });
    assert_eq!(error.fields.get("max_lifetime"), Some("1:pause"));
    update(&sandbox, "max_lifetime", "none");
    resume(&sandbox);
    update(&sandbox, "max_lifetime", "1:stop");
    assert_eq!(reason(&settles(&sandbox, "stopped")), "max-lifetime: its 1 s are over");
}

#[test]
fn limits_are_said_on_the_command_line_and_bad_ones_are_refused() {
    let node = shared::node();
    let created = node.run(&["warren", "create", "--ttl", "10m:pause", "--idle-timeout", "90", "--max-lifetime", "1h"]);
    assert_eq!(created.exit, 0, "{created:?}");
    let sandbox = Sandbox::of(node.control(), created.stdout.trim());
    let changed = node.run(&["warren", "update", &sandbox.id, "--ttl", "none", "--idle-timeout", "2m:pause"]);
    assert_eq!(changed.exit, 0, "{changed:?}");
    let row = sandbox.inspect();
    assert_eq!(
        (row.get("ttl"), row.get("idle_timeout"), row.get("max_lifetime")),
        (Some("none"), Some("120:pause"), Some("3600:stop"))
    );
    assert_eq!(node.run(&["warren", "create", "--ttl", "10m:kill"]).exit, 2);
    for (limit, code) in [("0", "OUT_OF_RANGE"), ("31622401", "OUT_OF_RANGE"), ("5:kill", "BAD_ARGUMENT")] {
        let error = sandbox.client().err(sandbox.request("sandbox.update").set("ttl", limit));
        assert_eq!((error.code.as_str(), error.fields.get("argument")), (code, Some("ttl")), "{error}");
        let error = node.control().err(Request::new("", "sandbox.create").set("max_lifetime", limit));
        assert_eq!((error.code.as_str(), error.fields.get("argument")), (code, Some("max_lifetime")), "{error}");
    }
    assert_eq!(sandbox.inspect().get("ttl"), Some("none"));
}

#[test]
fn time_goes_on_without_supervisor_and_node() {
    let seconds = (30 * timing::factor()).min(600);
    let config = format!(
        "[sandbox]\ndefault_max_lifetime = \"3000:pause\"\nboot_timeout_s = {seconds}\nstop_timeout_s = {seconds}\n"
    );
    let boot = || Boot::kernel().file("/etc/warren/warren.toml", 0o644, config.clone().into_bytes());
    let node = boot().start();
    let (short, long) = (node.sandbox(&[]), node.sandbox(&[("ttl", "1000")]));
    assert_eq!(short.inspect().get("max_lifetime"), Some("3000:pause"));
    let supervisor = node.supervisor();
    update(&short, "ttl", "4");
    node.sh(&format!("kill -9 {supervisor}"));
    timing::wait_for("another supervisor", || (node.supervisor() != supervisor).then_some(()));
    timing::wait_for("its answer", || node.control().call(Request::new("", "hello")).ok());
    assert_eq!(reason(&settles(&short, "stopped")), "ttl: its 4 s are over");
    let until = long.inspect().number("ttl_until_ms");

    let (_, long) = (short.keep(), long.keep());
    let node = boot().data_disk(node.power_cut().remove(0)).start();
    let long = Sandbox::of(node.control(), &long);
    let row = long.inspect();
    assert_eq!((row.get("state"), reason(&row)), (Some("error"), "node lost power"));
    assert_eq!(row.number("ttl_until_ms"), until);
    assert!(overlay_is_there(&node, &long), "its disk is what is left to save");
    update(&long, "ttl", "1");
    timing::wait_for("its disk to go", || (!overlay_is_there(&node, &long)).then_some(()));
    assert_eq!(reason(&long.inspect()), "node lost power");
    node.assert_ledger_agrees();
    long.keep();
}
