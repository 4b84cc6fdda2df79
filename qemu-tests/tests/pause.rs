//! Sandboxes that are put on disk and go on: by the same supervisor, a later one, and after the node was off.

use qemu_tests::{Boot, Code, Node, Request, Sandbox, shared, timing};

/// A program of the sandbox that counts in memory and says so on its output, for as long as it lives.
const COUNT: &str = "n=0; while :; do n=$((n+1)); echo $n; echo $n > /dev/shm/count; sleep 0.05; done";

/// Starts it; its number among the sandbox's programs.
fn start_counter(sandbox: &Sandbox) -> u64 {
    let request = sandbox.exec_request(&["sh", "-c", COUNT]).set("detach", true);
    let number = sandbox.client().ok(request).fields.number("exec").expect("a program has a number");
    timing::wait_for("the counter's start", || (counter(sandbox) > 2).then_some(()));
    number
}

fn counter(sandbox: &Sandbox) -> u64 {
    sandbox.sh("cat /dev/shm/count 2>/dev/null || echo 0").trim().parse().unwrap_or(0)
}

/// Waits until it has gone on from there, and not begun anew.
fn goes_on(sandbox: &Sandbox, from: u64) {
    timing::wait_for("the counter to go on", || {
        let now = counter(sandbox);
        assert!(now >= from || now == 0, "{now} after {from}");
        (now > from + 2).then_some(())
    });
}

fn pause(sandbox: &Sandbox) {
    sandbox.client().ok(sandbox.request("sandbox.pause"));
    let row = sandbox.inspect();
    assert_eq!((row.get("state"), row.get("pid")), (Some("paused"), None));
}

fn resume(sandbox: &Sandbox) {
    sandbox.client().ok(sandbox.request("sandbox.resume"));
    assert_eq!(sandbox.state(), "running");
}

fn other_supervisor(node: &Node, killed: u64) {
    timing::wait_for("another supervisor", || (node.supervisor() != killed).then_some(()));
    timing::wait_for("its answer", || node.control().call(Request::new("", "hello")).ok());
}

#[test]
fn a_paused_sandbox_goes_on_where_it_was() {
    let node = shared::node();
    let sandbox = node.sandbox(&[("name", "sleeper"), ("memory_mib", "256")]);
    sandbox.sh("echo disk > /workspace/file; echo memory > /dev/shm/file");
    let exec = start_counter(&sandbox);
    let worker = node.worker(&sandbox.id);
    for round in 0..3 {
        let from = counter(&sandbox);
        pause(&sandbox);
        assert_eq!(node.sh(&format!("test -e /proc/{worker} || echo gone")), "gone\n", "its memory is free");
        let error = sandbox.client().err(sandbox.exec_request(&["true"]));
        assert!(error.is(Code::BadState), "{error}");
        let error = sandbox.client().err(sandbox.request("sandbox.pause"));
        assert!(error.is(Code::BadState), "{error}");
        resume(&sandbox);
        goes_on(&sandbox, from);
        assert_eq!(sandbox.sh("cat /workspace/file /dev/shm/file; hostname"), "disk\nmemory\nsleeper\n");
        sandbox.sh(&format!("echo {round} >> /workspace/rounds"));
    }
    assert_eq!(sandbox.sh("cat /workspace/rounds"), "0\n1\n2\n");
    let (node_s, guest_s): (i64, i64) =
        (node.sh("date +%s").trim().parse().unwrap(), sandbox.sh("date +%s").trim().parse().unwrap());
    assert!((node_s - guest_s).abs() <= 60, "the clock is right: {node_s} and {guest_s}");
    // The program's output has no gap and no repetition.
    sandbox.client().ok(sandbox.request("exec.signal").set("exec", exec).set("signal", "KILL"));
    let reply = sandbox.client().ok(sandbox.request("exec.attach").set("exec", exec));
    let said = reply.text("stdout");
    let whole = said.lines().zip(1..).all(|(line, n)| line.parse() == Ok(n));
    assert!(whole, "{said}");
}

#[test]
fn a_paused_sandbox_is_there_after_the_node_was_off() {
    let node = Boot::kernel().start();
    let sandbox = node.sandbox(&[("network", "on"), ("vcpus", "2")]);
    sandbox.sh("echo disk > /workspace/file");
    start_counter(&sandbox);
    let from = counter(&sandbox);
    pause(&sandbox);
    let kept = sandbox.keep();
    // One power cut, and one end in order: neither wakes it.
    let disk = node.power_cut().pop().expect("the data disk comes back");
    let node = Boot::kernel().data_disk(disk).start();
    assert_eq!(Sandbox::of(node.control(), &kept).keep(), kept);
    let disk = node.power_off().pop().expect("the data disk comes back");
    let node = Boot::kernel().data_disk(disk).start();
    let sandbox = Sandbox::of(node.control(), &kept);
    assert_eq!(sandbox.state(), "paused");
    resume(&sandbox);
    goes_on(&sandbox, from);
    assert_eq!(sandbox.sh("cat /workspace/file"), "disk\n");
    let address = sandbox.inspect().get("address").expect("it has an address").to_string();
    assert!(sandbox.sh("ip -4 addr show eth0").contains(&address), "the guest has the address that it has now");
    sandbox.remove().expect("it can be removed");
    node.power_off();
}

#[test]
fn a_supervisor_that_dies_over_a_pause_or_a_resume_leaves_the_one_state_or_the_other() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    start_counter(&sandbox);
    let (mut seen, mut last) = ([0, 0], 0);
    for round in 0..12_u32 {
        let paused = sandbox.state() == "paused";
        last = if paused { last } else { counter(&sandbox) };
        let verb = if paused { "sandbox.resume" } else { "sandbox.pause" };
        let _call = sandbox.client().start(sandbox.request(verb));
        // From the first step to about the last.
        std::thread::sleep(std::time::Duration::from_millis(u64::from(round % 6 * 40 * timing::factor())));
        let supervisor = node.supervisor();
        node.sh(&format!("kill -9 {supervisor}"));
        other_supervisor(&node, supervisor);
        let state = timing::wait_for("a state that stays", || {
            let state = node.control().ok(sandbox.request("sandbox.inspect")).fields;
            state.get("state").filter(|state| ["running", "paused"].contains(state)).map(str::to_string)
        });
        seen[usize::from(state == "paused")] += 1;
        let on = Sandbox::of(node.control(), &sandbox.id);
        if state == "running" {
            timing::wait_for("its agent", || on.client().call(on.exec_request(&["true"])).ok());
            goes_on(&on, last);
        } else {
            timing::wait_for("what is left of its worker to go", || {
                on.client().call(on.request("sandbox.resume")).ok()
            });
            goes_on(&on, last);
            if round % 2 == 0 {
                pause(&on);
            }
        }
        on.keep();
    }
    println!("running {} times, paused {} times", seen[0], seen[1]);
}

#[test]
fn a_pause_that_finds_no_room_changes_nothing() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    start_counter(&sandbox);
    let from = counter(&sandbox);
    let data = "/data";
    node.sh(&format!(
        "dd if=/dev/zero of={data}/filler bs=1M 2>/dev/null; dd if=/dev/zero of={data}/filler2 bs=4k 2>/dev/null; true"
    ));
    let error = sandbox.client().err(sandbox.request("sandbox.pause"));
    node.sh(&format!("rm -f {data}/filler {data}/filler2"));
    assert!(error.is(Code::NoCapacity), "{error}");
    assert_eq!(sandbox.state(), "running");
    goes_on(&sandbox, from);
    pause(&sandbox);
    resume(&sandbox);
    goes_on(&sandbox, from);
}

#[test]
fn a_paused_sandbox_can_be_stopped_and_removed() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    start_counter(&sandbox);
    pause(&sandbox);
    let error = sandbox.client().err(sandbox.request("sandbox.resume").set("surprise", 1));
    assert!(error.is(Code::UnknownArgument), "{error}");
    sandbox.stop();
    assert_eq!(sandbox.state(), "stopped");
    assert!(sandbox.client().err(sandbox.request("sandbox.resume")).is(Code::BadState));
    let files = format!("ls -d /data/sandboxes/{}/paused 2>/dev/null; true", sandbox.id);
    timing::wait_for("its files to go", || node.sh(&files).is_empty().then_some(()));
    let other = node.sandbox(&[]);
    pause(&other);
    other.remove().expect("a paused sandbox can be removed");
}
