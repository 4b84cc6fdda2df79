//! Memory that guests give back: what they free, what the balloon takes, and what they say of it.

use std::time::Duration;

use qemu_tests::timing::{hang, wait_for};
use qemu_tests::{Node, Sandbox, shared};
use warren::wire::{Code, Fields, Request};

/// What a worker has of the node's memory, in KiB.
fn resident_kib(node: &Node, worker: u64) -> u64 {
    let text = node.sh(&format!("grep VmRSS /proc/{worker}/status"));
    text.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).unwrap_or_else(|| panic!("{text:?}"))
}

fn stats(sandbox: &Sandbox) -> Fields {
    sandbox.client().ok(sandbox.request("sandbox.stats")).fields
}

fn number(fields: &Fields, key: &str) -> u64 {
    fields.number(key).unwrap_or_else(|| panic!("no {key} in {fields:?}"))
}

/// Looks once a second until something holds.
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    wait_for(what, || {
        let held = holds();
        if !held {
            std::thread::sleep(Duration::from_secs(1));
        }
        held.then_some(())
    });
}

/// A program in the sandbox that holds this much memory until its `sleep` is killed.
fn hold(sandbox: &Sandbox, mib: u64) {
    let script = format!("dd if=/dev/zero bs={mib}M count=1 2>/dev/null | sleep 100000");
    let request = sandbox.exec_request(&["sh", "-c", &script]);
    sandbox.client().ok(request.set("user", 0).set("detach", true));
}

#[test]
fn memory_that_a_guest_frees_returns_to_the_node() {
    const GIB: u64 = 1 << 20;
    let node = shared::node();
    let sandbox = node.sandbox(&[("memory_mib", "1536")]);
    let worker = node.worker(&sandbox.id);
    let before = resident_kib(&node, worker);
    hold(&sandbox, 1024);
    until("the guest has its memory", || resident_kib(&node, worker) >= before + GIB - GIB / 20);
    sandbox.sh("killall sleep");
    until("the node has it back", || resident_kib(&node, worker) <= before + GIB / 20);
    let said = stats(&sandbox);
    assert!(number(&said, "memory_reported_kib") >= GIB - GIB / 20, "{said:?}");
    assert!(number(&said, "memory_resident_kib") <= before + GIB / 20, "{said:?}");
    assert_eq!(sandbox.sh("echo still here"), "still here\n");
}

#[test]
fn a_smaller_target_takes_memory_from_a_guest_and_a_larger_one_gives_it_back() {
    let node = shared::node();
    let sandbox = node.sandbox(&[("memory_mib", "512"), ("disk_mib", "1024")]);
    let worker = node.worker(&sandbox.id);
    // A file that was written is no free memory: only the balloon makes the guest let go of it.
    sandbox.sh("dd if=/dev/zero of=/workspace/big bs=1M count=256 2>/dev/null; sync");
    until("the file is in memory", || resident_kib(&node, worker) > 256 << 10);
    let update = |mib: u64| sandbox.client().ok(sandbox.request("sandbox.update").set("memory_target_mib", mib));
    assert_eq!(update(128).field("memory_target_mib"), "128");
    until("the balloon is full", || number(&stats(&sandbox), "memory_balloon_kib") == 384 << 10);
    assert_eq!(number(&stats(&sandbox), "memory_target_mib"), 128);
    until("the node has it back", || resident_kib(&node, worker) < 160 << 10);
    assert_eq!(sandbox.sh("echo alive; wc -c < /workspace/big"), format!("alive\n{}\n", 256 << 20));

    update(512);
    until("the balloon is empty", || number(&stats(&sandbox), "memory_balloon_kib") == 0);
    hold(&sandbox, 320);
    until("the guest uses what it got", || resident_kib(&node, worker) > 320 << 10);
    sandbox.sh("killall sleep");
}

#[test]
fn a_target_too_small_for_its_programs_kills_none_of_them() {
    let node = shared::node();
    let sandbox = node.sandbox(&[("memory_mib", "256")]);
    hold(&sandbox, 128);
    until("the program has its memory", || number(&stats(&sandbox), "memory_used_kib") > 128 << 10);
    sandbox.client().ok(sandbox.request("sandbox.update").set("memory_target_mib", 32));
    until("the balloon takes what it can", || number(&stats(&sandbox), "memory_balloon_kib") > 32 << 10);
    // A new program needs memory, which the balloon gives back.
    assert_eq!(sandbox.sh("dd if=/dev/zero of=/dev/null bs=24M count=1 2>/dev/null; pidof sleep | wc -w"), "1\n");
    assert_eq!(number(&stats(&sandbox), "oom_kills"), 0);
}

#[test]
fn statistics_are_the_guests_and_plausible() {
    let node = shared::node();
    let sandbox = node.sandbox(&[("memory_mib", "256")]);
    let first = stats(&sandbox);
    assert_eq!(first.get("state"), Some("running"));
    assert_eq!((number(&first, "memory_mib"), number(&first, "memory_target_mib")), (256, 256));
    let used = number(&first, "memory_used_kib");
    assert!(used > 1024 && used < 128 << 10, "{first:?}");
    assert!(number(&first, "memory_available_kib") > 128 << 10, "{first:?}");
    assert!(number(&first, "memory_age_ms") <= u64::try_from(hang().as_millis()).unwrap(), "{first:?}");
    assert!(number(&first, "cpu_ms") > 0 && number(&first, "exits") > 0, "{first:?}");
    assert!(number(&first, "block_read_bytes") > 0, "{first:?}");
    hold(&sandbox, 64);
    until("the guest says what it uses", || number(&stats(&sandbox), "memory_used_kib") >= used + (60 << 10));
    sandbox.sh("killall sleep; dd if=/dev/zero of=/workspace/x bs=1M count=8 2>/dev/null; sync");
    let reply = sandbox.client().ok(sandbox.request("sandbox.stats"));
    assert_eq!(reply.items[0].get("disk"), Some("root"), "{reply:?}");
    assert!(number(&reply.items[0], "writes") > 0, "{reply:?}");
    let second = reply.fields;
    let grown = |key| number(&second, key) - number(&first, key);
    assert!(grown("block_written_bytes") >= 8 << 20 && grown("disk_used_kib") >= 8 << 10, "{first:?} {second:?}");
    assert!(grown("cpu_ms") > 0, "{first:?} {second:?}");
}

#[test]
fn what_cannot_be_is_refused() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    let update = |key: &str, value: &str| sandbox.client().err(sandbox.request("sandbox.update").set(key, value));
    let error = update("memory_target_mib", "129");
    assert!(error.is(Code::OutOfRange), "{error}");
    assert_eq!((error.fields.get("min"), error.fields.get("max")), (Some("32"), Some("128")));
    assert!(update("memory_target_mib", "31").is(Code::OutOfRange));
    assert!(update("vcpus", "2").is(Code::MissingArgument));
    let request = sandbox.request("sandbox.update").set("memory_target_mib", 64).set("vcpus", 2);
    assert!(sandbox.client().err(request).is(Code::UnknownArgument));
    assert!(sandbox.client().err(sandbox.request("sandbox.update")).is(Code::MissingArgument));
    sandbox.stop();
    for request in [sandbox.request("sandbox.stats"), sandbox.request("sandbox.update").set("memory_target_mib", 64)] {
        let error = sandbox.client().err(request);
        assert!(error.is(Code::BadState), "{error}");
        assert_eq!(error.fields.get("state"), Some("stopped"));
    }
    assert!(node.control().err(Request::new("", "sandbox.stats").arg("nobody")).is(Code::NotFound));
}

#[test]
fn a_worker_that_does_not_answer_costs_its_clients_an_error() {
    let node = shared::node();
    let (stuck, other) = (node.sandbox(&[]), node.sandbox(&[]));
    let worker = node.worker(&stuck.id);
    node.sh(&format!("kill -STOP {worker}"));
    let call = stuck.start(stuck.request("sandbox.stats"));
    assert!(number(&stats(&other), "cpu_ms") > 0, "others are answered meanwhile");
    let error = call.finish().expect_err("a stopped process says nothing");
    assert!(error.is(Code::LinkLost), "{error}");
    node.sh(&format!("kill -CONT {worker}"));
    assert!(number(&stats(&stuck), "cpu_ms") > 0);
    // One that is killed meanwhile.
    node.sh(&format!("kill -STOP {worker}"));
    let call = stuck.start(stuck.request("sandbox.stats"));
    node.sh(&format!("kill -KILL {worker}"));
    let error = call.finish().expect_err("a killed process says nothing");
    assert!(error.is(Code::LinkLost), "{error}");
}
