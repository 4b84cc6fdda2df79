//! Guests that are paused, put back and copied again and again, and see nothing of it: `WARREN_SOAK_PAUSES` (8; soak 100),
//! `WARREN_SOAK_CHAIN` (4 to 6; 20) and `WARREN_SOAK_FORKS` (8; 50) say how often.

use std::collections::BTreeSet;

use qemu_tests::internet::{HOST, Internet};
use qemu_tests::witness::files;
use qemu_tests::{Code, Fields, Node, Request, Sandbox, shared, timing, witness};

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn take(sandbox: &Sandbox) -> String {
    sandbox.client().ok(sandbox.request("snapshot.create")).field("id").to_string()
}

fn back(sandbox: &Sandbox, snapshot: &str) {
    sandbox.client().ok(sandbox.request("sandbox.rollback").set("snapshot", snapshot));
}

fn forget(node: &Node, snapshot: &str) {
    node.control().ok(Request::new("", "snapshot.remove").arg(snapshot));
}

fn fork(node: &Node, from: &str, count: u64) -> Vec<Sandbox> {
    let reply = node.control().ok(Request::new("", "snapshot.fork").arg(from).set("n", count));
    let ids: Vec<&str> = reply.items.iter().filter_map(|item| item.get("id")).collect();
    assert_eq!(ids.len() as u64, count, "{:?}", reply.items);
    ids.iter().map(|id| Sandbox::of(node.control(), id)).collect()
}

fn detach(sandbox: &Sandbox, script: &str) {
    let request = sandbox.exec_request(&["sh", "-c", script]).set("user", 0).set("detach", true);
    sandbox.client().ok(request);
}

fn gone(node: &Node, before: &BTreeSet<String>) {
    timing::wait_for("nothing to be left", || (files(node) == *before).then_some(()));
}

/// What a guest's kernel says where a processor stood still for too long, or its clock did not.
fn console_is_clean(node: &Node, sandbox: &Sandbox) {
    let bad = "soft lockup|hard LOCKUP|detected stalls|self-detected stall|hung_task|blocked for more|clocksource.*unstable|\
               Marking TSC unstable|BUG:|Call Trace";
    let log = format!("grep -E '{bad}' /data/sandboxes/{}/serial.log; true", sandbox.id);
    assert_eq!(node.sh(&log), "", "the console of {}", sandbox.id);
}

/// A program with a pattern in its memory, files, and two programs with a pipe between them: what does not hold is
/// written down.
const CHECKER: &str = "cd /workspace; dd if=/dev/urandom of=file bs=64k count=32 2>/dev/null; \
    sha256sum file > file.sum; dd if=/dev/urandom of=/dev/shm/file bs=64k count=64 2>/dev/null; sha256sum /dev/shm/file > /dev/shm/file.sum; \
    (n=0; while :; do n=$((n+1)); echo $n; sleep 0.05; done) | \
    (w=0; while read n; do w=$((w+1)); [ $n = $w ] || echo pipe $n $w >> /dev/shm/wrong; echo $n > /dev/shm/piped; done) & \
    p=$(head -c 300000 /dev/urandom | md5sum; head -c 200000 /dev/urandom | od -An -tx1); s=$(echo \"$p\" | md5sum); c=0; \
    while :; do [ \"$(echo \"$p\" | md5sum)\" = \"$s\" ] || echo memory >> /dev/shm/wrong; c=$((c+1)); echo $c > /dev/shm/rounds; \
    sleep 0.2; done";

#[test]
fn a_guest_that_is_paused_again_and_again_finds_everything_as_it_was() {
    let node = shared::node();
    let state = witness::quiet(&node);
    let sandbox = node.sandbox(&[]);
    detach(&sandbox, CHECKER);
    let number = |name: &str| {
        sandbox.sh(&format!("cat /dev/shm/{name} 2>/dev/null || echo 0")).trim().parse::<u64>().unwrap_or(0)
    };
    timing::wait_for("the checker", || (number("rounds") > 0 && number("piped") > 0).then_some(()));
    for round in 0..setting("WARREN_SOAK_PAUSES", 8) {
        let (rounds, piped) = (number("rounds"), number("piped"));
        sandbox.client().ok(sandbox.request("sandbox.pause"));
        sandbox.client().ok(sandbox.request("sandbox.resume"));
        timing::wait_for("both to go on", || (number("rounds") > rounds && number("piped") > piped).then_some(()));
        let wrong = sandbox.sh("cat /dev/shm/wrong 2>/dev/null; cd /workspace && sha256sum -c file.sum /dev/shm/file.sum 2>&1 | grep -v ': OK$'; true");
        assert_eq!(wrong, "", "after {round} rounds");
        // The disk is read, not only what the guest has of it in memory.
        sandbox.sh("echo 3 > /proc/sys/vm/drop_caches");
    }
    console_is_clean(&node, &sandbox);
    sandbox.remove().expect("it can be removed");
    state.assert_restored(&node);
}

#[test]
fn the_ends_of_a_long_chain_stay_when_its_middle_goes() {
    let node = shared::node();
    let (before, state) = (files(&node), witness::quiet(&node));
    let sandbox = node.sandbox(&[]);
    witness::start(&sandbox);
    let sums = "cd /workspace && cat /workspace/* /dev/shm/f* | sha256sum";
    let mut chain = Vec::new();
    let deep = setting("WARREN_SOAK_CHAIN", 6);
    for link in 0..deep {
        witness::say(&sandbox, &format!("link-{link}"));
        let more = format!(
            "head -c 40000 /dev/urandom > /workspace/f{link}; head -c 40000 /dev/urandom > /dev/shm/f{link}; \
             head -c 4096 /dev/urandom | dd of=/workspace/f0 conv=notrunc 2>/dev/null; sync"
        );
        sandbox.sh(&more);
        chain.push((take(&sandbox), format!("link-{link}"), sandbox.sh(sums)));
    }
    for (id, ..) in &chain[1..chain.len() - 1] {
        forget(&node, id);
    }
    let (first, last) = (&chain[0], chain.last().expect("it is long"));
    for (id, word, sum) in [last, first, last, first] {
        back(&sandbox, id);
        assert_eq!(witness::word(&sandbox), *word);
        sandbox.sh("echo 3 > /proc/sys/vm/drop_caches");
        assert_eq!(sandbox.sh(sums), *sum, "{word}");
        witness::goes_on(&sandbox);
        witness::say(&sandbox, "another");
    }
    for (id, ..) in [first, last] {
        forget(&node, id);
    }
    sandbox.remove().expect("it can be removed");
    gone(&node, &before);
    state.assert_restored(&node);
}

/// A snapshot, and what the node said of it.
fn take_told(sandbox: &Sandbox) -> Fields {
    sandbox.client().ok(sandbox.request("snapshot.create")).fields
}

fn inspect(node: &Node, snapshot: &str) -> Fields {
    node.control().ok(Request::new("", "snapshot.inspect").arg(snapshot)).fields
}

/// The checker in a guest found nothing, and it goes on.
fn nothing_is_wrong(sandbox: &Sandbox, when: &str) {
    let number = |name: &str| sandbox.sh(&format!("cat /dev/shm/{name}")).trim().parse::<u64>().unwrap_or(0);
    let (rounds, piped) = (number("rounds"), number("piped"));
    timing::wait_for("both to go on", || (number("rounds") > rounds && number("piped") > piped).then_some(()));
    let wrong = sandbox.sh(
        "cat /dev/shm/wrong 2>/dev/null; cd /workspace && sha256sum -c file.sum /dev/shm/file.sum 2>&1 | grep -v ': OK$'; true",
    );
    assert_eq!(wrong, "", "{when}");
}

#[test]
fn each_of_a_chain_of_differences_is_whole_whatever_goes_of_the_others() {
    let node = shared::node();
    let (before, state) = (files(&node), witness::quiet(&node));
    let sandbox = node.sandbox(&[]);
    detach(&sandbox, CHECKER);
    timing::wait_for("the checker", || {
        let is_there = sandbox.sh("test -s /dev/shm/rounds && test -s /dev/shm/piped && echo yes; true");
        (is_there == "yes\n").then_some(())
    });
    witness::load(&sandbox);
    let sums = "cd /workspace && cat l* /dev/shm/l* | sha256sum";
    let write = |link: u64| {
        sandbox.sh(&format!(
            "head -c 40000 /dev/urandom > /workspace/l{link}; head -c 900000 /dev/urandom > /dev/shm/l{link}; \
             head -c 4096 /dev/urandom | dd of=/dev/shm/l0 conv=notrunc 2>/dev/null; rm -f /dev/shm/gone; \
             head -c 500000 /dev/urandom > /dev/shm/gone; sync"
        ));
        sandbox.sh(sums)
    };
    let sum = write(0);
    let told = take_told(&sandbox);
    assert_eq!(told.get("difference_to"), None, "a guest that was booted differs from nothing");
    let whole = told.number("bytes").expect("its size");
    let mut chain = vec![(told.get("id").expect("an id").to_string(), sum)];
    let mut differences = Vec::new();
    for link in 1..=setting("WARREN_SOAK_CHAIN", 4) {
        let below = chain.last().expect("there is one").0.clone();
        back(&sandbox, &below);
        let sum = write(link);
        let told = take_told(&sandbox);
        let id = told.get("id").expect("an id").to_string();
        assert_eq!(told.get("difference_to"), Some(&*below), "{told:?}");
        let bytes = told.number("bytes").expect("its size");
        assert!(bytes < whole / 2, "{bytes} octets of {whole}");
        differences.push(bytes);
        chain.push((id, sum));
        // Removed while it is what the next one differs from.
        if link == 2 {
            forget(&node, &below);
            chain.remove(1);
        }
    }
    println!("{whole} octets are the first, {differences:?} those after it");
    for (id, _) in &chain {
        timing::wait_for("the memory to be whole", || {
            let row = inspect(&node, id);
            (row.get("difference_to").is_none() && row.get("sealed") == Some("true")).then_some(row)
        });
        let names = node.sh(&format!("ls /data/snapshots/{id} | tr '\\n' ' '"));
        assert!(names.contains("memory") && !names.contains("difference"), "{names}");
    }
    forget(&node, &chain.remove(chain.len() / 2).0);
    for (id, sum) in chain.iter().rev().chain(&chain[..1]) {
        back(&sandbox, id);
        sandbox.sh("echo 3 > /proc/sys/vm/drop_caches");
        assert_eq!(sandbox.sh(sums), *sum);
        nothing_is_wrong(&sandbox, id);
    }
    console_is_clean(&node, &sandbox);
    // As one file it is all of the memory, also asked for at once.
    let told = take_told(&sandbox);
    let id = told.get("id").expect("an id");
    assert!(told.get("difference_to").is_some(), "{told:?}");
    let printed =
        node.sh(&format!("warren snapshot export {id} /data/exported && warren snapshot import /data/exported"));
    let imported = printed.split_whitespace().last().expect("an id");
    let clone = fork(&node, imported, 1).pop().expect("a clone");
    assert_eq!(clone.sh(sums), chain[0].1);
    nothing_is_wrong(&clone, "after export and import");
    clone.remove().expect("it can be removed");
    node.sh("rm /data/exported");
    for id in chain.iter().map(|(id, _)| id.as_str()).chain([id, imported]) {
        forget(&node, id);
    }
    sandbox.remove().expect("it can be removed");
    gone(&node, &before);
    state.assert_restored(&node);
}

#[test]
fn a_full_disk_refuses_and_leaves_a_sandbox_that_runs_on() {
    let node = shared::node();
    let (before, state) = (files(&node), witness::quiet(&node));
    let sandbox = node.sandbox(&[]);
    witness::start(&sandbox);
    witness::say(&sandbox, "then");
    let then = take(&sandbox);
    witness::say(&sandbox, "now");
    let requests = [
        sandbox.request("snapshot.create"),
        sandbox.request("sandbox.rollback").set("snapshot", &then),
        Request::new("", "snapshot.fork").arg(&sandbox.id).set("n", 2),
        sandbox.request("sandbox.pause"),
    ];
    for request in requests {
        node.fill_data();
        let result = node.control().call(request.clone());
        node.free_data();
        let error = result.expect_err("there is no room");
        assert!(error.is(Code::NoCapacity), "{request:?}: {error}");
        assert_eq!(sandbox.state(), "running", "{request:?}");
        assert_eq!(witness::word(&sandbox), "now", "{request:?}");
        witness::goes_on(&sandbox);
        node.assert_ledger_agrees();
    }
    for clone in fork(&node, &sandbox.id, 2) {
        assert_eq!(witness::word(&clone), "now");
        clone.remove().expect("a clone can be removed");
    }
    let now = take(&sandbox);
    back(&sandbox, &then);
    assert_eq!(witness::word(&sandbox), "then");
    back(&sandbox, &now);
    assert_eq!(witness::word(&sandbox), "now");
    for id in [&then, &now] {
        forget(&node, id);
    }
    sandbox.remove().expect("it can be removed");
    gone(&node, &before);
    state.assert_restored(&node);
}

#[test]
fn a_connection_of_before_a_fork_ends_in_the_clone_and_goes_on_in_its_parent() {
    let node = shared::node();
    let internet = Internet::of(&node);
    let parent = node.sandbox(&[("network", "on")]);
    // It ends by itself where its connection does.
    let script = format!(
        "n=0; (while true; do n=$((n+1)); echo $n; sleep 0.2; done) | nc {HOST} 80 > /run/echoed; echo ended > /run/end"
    );
    detach(&parent, &script);
    let echoed =
        |sandbox: &Sandbox| sandbox.sh("cat /run/echoed 2>/dev/null | wc -l").trim().parse::<u64>().unwrap_or(0);
    timing::wait_for("the connection", || (echoed(&parent) > 3).then_some(()));
    let address = |sandbox: &Sandbox| sandbox.inspect().get("address").expect("it has one").to_string();
    let sent = |sandbox: &Sandbox| {
        let device = node.sh(&format!("ip route get {}", address(sandbox)));
        let device = device.split_whitespace().skip_while(|word| *word != "dev").nth(1).expect("a device").to_string();
        // What the node receives there is what the guest sends.
        node.sh(&format!("cat /sys/class/net/{device}/statistics/rx_packets")).trim().parse::<u64>().expect("a number")
    };
    let before = echoed(&parent);
    let clone = fork(&node, &parent.id, 1).pop().expect("a clone");
    assert_ne!(address(&clone), address(&parent));
    timing::wait_for("the connection to end in the clone", || {
        (clone.sh("cat /run/end 2>/dev/null; true") == "ended\n").then_some(())
    });
    let said = echoed(&clone);
    timing::wait_for("the connection to go on in the parent", || {
        (echoed(&parent) > before.max(said) + 5).then_some(())
    });
    // Of the clone's connection nothing left it, under whatever address.
    assert_eq!(sent(&clone), 0, "packets of the clone");
    assert_eq!(echoed(&clone), said, "nothing more came to it");
    assert_eq!(parent.sh("cat /run/end 2>/dev/null; true"), "");
    // Every line of the parent's came back once, in order.
    let lines = parent.sh("cat /run/echoed");
    let whole = lines.lines().zip(1_u64..).all(|(line, n)| line.parse() == Ok(n));
    assert!(whole, "{lines}");
    // Under its own address it reaches whom it likes, which is seen where the silence was.
    let hello = clone.sh(&format!("echo hello | timeout 20 nc -w 20 {HOST} 80"));
    assert_eq!(hello, "hello\n");
    assert!(sent(&clone) > 0);
    assert!(internet.count(HOST, "tcp") > 0);
    for sandbox in [clone, parent] {
        sandbox.remove().expect("it can be removed");
    }
}

/// Moves the node's clock by so many seconds.
fn jump(node: &Node, seconds: i64) {
    node.sh(&format!("date -s @$(( $(date +%s) + {seconds} )) > /dev/null"));
}

/// The guest's wall clock is the node's.
fn same_time(node: &Node, sandbox: &Sandbox) {
    let of = |text: String| text.trim().parse::<i64>().expect("a number");
    let (node_s, guest_s) = (of(node.sh("date +%s")), of(sandbox.sh("date +%s")));
    assert!((node_s - guest_s).abs() <= 60, "the node's clock says {node_s}, that of {} {guest_s}", sandbox.id);
}

/// Puts a program into a guest that watches its monotonic clock, on each processor.
fn watch_clock(sandbox: &Sandbox) {
    sandbox.put_guest_tool();
    detach(sandbox, "/run/guest-tool clock until=/run/enough > /run/clock 2>&1; echo exit $? >> /run/clock");
    timing::wait_for("the watch", || sandbox.sh("cat /run/clock 2>/dev/null; true").contains("watching").then_some(()));
}

fn clock_never_went_back(sandbox: &Sandbox) {
    sandbox.sh("touch /run/enough");
    let said =
        timing::wait_for("the watch's end", || Some(sandbox.sh("cat /run/clock")).filter(|said| said.contains("exit")));
    assert!(said.ends_with("exit 0\n") && said.contains("looks="), "{said}");
}

#[test]
fn three_days_that_pass_during_a_pause_are_days_only_to_the_wall_clock() {
    const DAYS: i64 = 3 * 24 * 3600;
    let node = shared::node();
    let sandbox = node.sandbox(&[("vcpus", "2")]);
    witness::start(&sandbox);
    watch_clock(&sandbox);
    // Long enough not to end before the pause, short enough that it ends: by the monotonic clock.
    let sleeper = "a=$(cut -d. -f1 /proc/uptime); sleep 60; b=$(cut -d. -f1 /proc/uptime); echo $((b-a)) > /run/slept";
    detach(&sandbox, sleeper);
    for days in [DAYS, -DAYS] {
        sandbox.client().ok(sandbox.request("sandbox.pause"));
        jump(&node, days);
        let resumed = sandbox.client().call(sandbox.request("sandbox.resume"));
        if days > 0 && resumed.is_err() {
            jump(&node, -days);
        }
        resumed.expect("it goes on");
        same_time(&node, &sandbox);
        witness::goes_on(&sandbox);
        assert_eq!(sandbox.exec(&["sleep", "1"]).field("exit"), "0");
    }
    let slept = timing::wait_for("the sleeper's end", || {
        sandbox.sh("cat /run/slept 2>/dev/null; true").trim().parse::<i64>().ok()
    });
    assert!((59..DAYS / 2).contains(&slept), "it slept {slept} s by the monotonic clock");
    clock_never_went_back(&sandbox);
    console_is_clean(&node, &sandbox);
    sandbox.remove().expect("it can be removed");
}

#[test]
fn guests_of_one_two_and_four_processors_are_forked_with_clocks_in_step() {
    let node = shared::node();
    let (before, state) = (files(&node), witness::quiet(&node));
    for vcpus in ["1", "2", "4"] {
        let parent = node.sandbox(&[("vcpus", vcpus)]);
        witness::start(&parent);
        witness::say(&parent, "shared");
        watch_clock(&parent);
        let clones = fork(&node, &parent.id, 2);
        for sandbox in clones.iter().chain([&parent]) {
            assert_eq!(sandbox.sh("nproc").trim(), vcpus);
            assert_eq!(witness::word(sandbox), "shared");
            witness::goes_on(sandbox);
            same_time(&node, sandbox);
            // All of its processors are there and work.
            sandbox.sh("for p in 1 2 3 4; do (n=0; while [ $n -lt 2000 ]; do n=$((n+1)); done) & done; wait");
            clock_never_went_back(sandbox);
            console_is_clean(&node, sandbox);
        }
        for sandbox in clones.into_iter().chain([parent]) {
            sandbox.remove().expect("it can be removed");
        }
    }
    gone(&node, &before);
    state.assert_restored(&node);
}
