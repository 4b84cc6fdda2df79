//! The machine a guest sees: processors and their topology, memory, interrupts, and the ways it ends.

use std::collections::BTreeSet;

use qemu_tests::state::NodeState;
use qemu_tests::{Code, Message, Node, Sandbox, shared, timing};
use warren::wire::{Decoded, Decoder, Fields};

/// Guests of several processors say this, rather than the default of 128 MiB.
const SMP_MEMORY: &str = "256";

fn guest(node: &Node, vcpus: u32) -> Sandbox {
    node.sandbox(&[("vcpus", &vcpus.to_string()), ("memory_mib", SMP_MEMORY)])
}

/// One file of each processor's topology directory, in the processors' order.
fn topology(sandbox: &Sandbox, vcpus: u32, file: &str) -> Vec<String> {
    let script = format!("for n in $(seq 0 {}); do cat /sys/devices/system/cpu/cpu$n/topology/{file}; done", vcpus - 1);
    sandbox.sh(&script).lines().map(str::to_string).collect()
}

/// The values of one key of /proc/cpuinfo, in the processors' order.
fn cpuinfo(text: &str, key: &str) -> Vec<String> {
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs.filter(|(k, _)| k.trim() == key).map(|(_, value)| value.trim().to_string()).collect()
}

/// As the kernel writes a set of the first processors.
fn all_of(vcpus: u32) -> String {
    if vcpus == 1 { "0".to_string() } else { format!("0-{}", vcpus - 1) }
}

#[test]
fn a_guest_of_1_2_4_or_16_processors_reports_one_socket_of_single_threaded_cores() {
    let node = shared::node();
    for vcpus in [1, 2, 4, 16] {
        let sandbox = guest(&node, vcpus);
        let numbers: Vec<String> = (0..vcpus).map(|n| n.to_string()).collect();
        assert_eq!(sandbox.sh("cat /sys/devices/system/cpu/online").trim(), all_of(vcpus));
        assert_eq!(sandbox.sh("cat /sys/devices/system/cpu/present").trim(), all_of(vcpus));
        assert_eq!(sandbox.sh("nproc").trim(), vcpus.to_string());

        assert_eq!(topology(&sandbox, vcpus, "core_id"), numbers);
        assert_eq!(topology(&sandbox, vcpus, "thread_siblings_list"), numbers);
        let same = |value: &str| vec![value.to_string(); vcpus as usize];
        assert_eq!(topology(&sandbox, vcpus, "physical_package_id"), same("0"));
        assert_eq!(topology(&sandbox, vcpus, "die_id"), same("0"));
        assert_eq!(topology(&sandbox, vcpus, "package_cpus_list"), same(&all_of(vcpus)));

        let text = sandbox.sh("cat /proc/cpuinfo");
        assert_eq!(cpuinfo(&text, "processor"), numbers);
        assert_eq!(cpuinfo(&text, "apicid"), numbers);
        assert_eq!(cpuinfo(&text, "initial apicid"), numbers);
        assert_eq!(cpuinfo(&text, "core id"), numbers);
        assert_eq!(cpuinfo(&text, "physical id"), same("0"));
        assert_eq!(cpuinfo(&text, "cpu cores"), same(&vcpus.to_string()));
        assert_eq!(cpuinfo(&text, "siblings"), same(&vcpus.to_string()));
        // A processor that differs from the first would be told of by the kernel.
        let log = sandbox.sh("dmesg");
        assert!(!log.contains("[Firmware Bug]"), "{log}");
    }
}

/// The ranges of RAM that the guest's kernel was given, as (start, end).
fn ram(sandbox: &Sandbox) -> Vec<(u64, u64)> {
    let text = sandbox.sh("grep 'System RAM' /proc/iomem");
    let hex = |text: &str| u64::from_str_radix(text.trim(), 16).expect("a number in /proc/iomem");
    let ranges = text.lines().filter_map(|line| line.split_once(" : ")?.0.split_once('-'));
    ranges.map(|(start, end)| (hex(start), hex(end) + 1)).collect()
}

fn kib(meminfo: &str, key: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(key)).expect("a line of /proc/meminfo");
    line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().expect("a number of KiB")
}

#[test]
fn a_guest_reports_its_memory_on_both_sides_of_the_hole_below_four_gib() {
    const MIB: u64 = 1 << 20;
    let node = shared::node();
    for mib in [64, 65, 3072, 3073, 4096] {
        let sandbox = node.sandbox(&[("memory_mib", &mib.to_string())]);
        // The kernel keeps page 0 for itself; the PC's hole below 1 MiB is no RAM.
        let low_end = (mib * MIB).min(3 << 30);
        let mut expected = vec![(0x1000, 0xa_0000), (MIB, low_end)];
        if mib > 3072 {
            expected.push((4 << 30, (4 << 30) + (mib - 3072) * MIB));
        }
        assert_eq!(ram(&sandbox), expected, "{mib} MiB");
        let total = kib(&sandbox.sh("cat /proc/meminfo"), "MemTotal");
        // The page array (1/64), the kernel and its tables come off; nothing is set aside for devices that cannot
        // reach all of it.
        assert!(total < mib * 1024 && total > mib * 1024 * 63 / 64 - 24 * 1024, "{mib} MiB: MemTotal {total} KiB");
    }
}

#[test]
fn memory_beyond_four_gib_holds_what_is_written_to_it() {
    let node = shared::node();
    let sandbox = node.sandbox(&[("memory_mib", "4096")]);
    // The kernel takes pages from the highest zone first: the gibibyte beyond the hole.
    let free = |zone: &str| -> u64 {
        let text = sandbox.sh("cat /proc/zoneinfo");
        let (_, zone) = text.split_once(&format!("zone {zone:>8}")).expect("the zone is there");
        let pages = zone.lines().find_map(|line| line.trim().strip_prefix("pages free"));
        pages.and_then(|n| n.trim().parse().ok()).expect("a number of pages")
    };
    let before = free("Normal");
    sandbox.sh("mkdir /tmp/high && mount -t tmpfs -o size=256m none /tmp/high");
    let sum = sandbox.sh("dd if=/dev/urandom bs=1M count=96 2>/dev/null | tee /tmp/high/noise | sha256sum");
    let taken = before.saturating_sub(free("Normal"));
    assert!(taken >= 64 << 20 >> 12, "{taken} pages were taken from beyond 4 GiB");
    assert_eq!(sandbox.sh("sha256sum < /tmp/high/noise"), sum);
}

/// What each processor counted in the rows of /proc/interrupts that begin with one of `names`.
fn interrupts(sandbox: &Sandbox, vcpus: usize, names: &[&str]) -> Vec<u64> {
    let mut counts = vec![0; vcpus];
    for line in sandbox.sh("cat /proc/interrupts").lines() {
        let mut words = line.split_whitespace();
        if !words.next().is_some_and(|name| names.contains(&name.trim_end_matches(':'))) {
            continue;
        }
        for (count, word) in counts.iter_mut().zip(words) {
            *count += word.parse::<u64>().expect("a count in /proc/interrupts");
        }
    }
    counts
}

/// Ticks that each processor spent in user space.
fn user_ticks(sandbox: &Sandbox) -> Vec<u64> {
    let text = sandbox.sh("cat /proc/stat");
    let rows = text.lines().filter(|line| line.starts_with("cpu") && !line.starts_with("cpu "));
    rows.map(|line| line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("ticks")).collect()
}

#[test]
fn every_processor_works_while_interrupts_flow() {
    const VCPUS: usize = 4;
    let node = shared::node();
    let sandbox = guest(&node, VCPUS as u32);
    let loops: Vec<_> = (0..VCPUS)
        .map(|n| {
            let mask = format!("{:x}", 1 << n);
            let mut call = sandbox.start(sandbox.exec_request(&["taskset", &mask, "sh", "-c", "while :; do :; done"]));
            call.item();
            call
        })
        .collect();
    let (ticks, timers) = (user_ticks(&sandbox), interrupts(&sandbox, VCPUS, &["LOC"]));
    let calls = interrupts(&sandbox, VCPUS, &["RES", "CAL", "TLB"]);
    let grew = |before: &[u64], now: &[u64], by: u64| before.iter().zip(now).all(|(old, new)| *new >= old + by);
    let mut rounds = 0;
    timing::wait_for("progress, timer interrupts and calls on every processor", || {
        // Work for every processor that another one has to be told of by an interrupt, and a program on each.
        sandbox.sh("echo 1 > /proc/sys/vm/drop_caches");
        for n in 0..VCPUS {
            assert_eq!(sandbox.exec(&["taskset", &format!("{:x}", 1 << n), "echo", "here"]).text("stdout"), "here\n");
        }
        rounds += 1;
        let worked = grew(&ticks, &user_ticks(&sandbox), 25);
        let ticked = grew(&timers, &interrupts(&sandbox, VCPUS, &["LOC"]), 25);
        let called = grew(&calls, &interrupts(&sandbox, VCPUS, &["RES", "CAL", "TLB"]), 5);
        (worked && ticked && called && rounds >= 3).then_some(())
    });
    // All of them are still at it.
    for call in loops {
        call.cancel();
        let error = call.finish().expect_err("an endless loop does not end by itself");
        assert!(error.is(Code::Cancelled), "{error}");
    }
    let log = sandbox.sh("dmesg");
    for trouble in ["stall", "soft lockup", "clocksource: timekeeping watchdog", "Marking clocksource"] {
        assert!(!log.contains(trouble), "{log}");
    }
}

/// Runs what ends a guest, and gives state and reason of the sandbox.
fn end_by(sandbox: &Sandbox, script: &str) -> (String, String) {
    let call = sandbox.start(sandbox.exec_request(&["sh", "-c", script]).set("user", 0));
    timing::wait_for("the guest's end", || (sandbox.state() != "running").then_some(()));
    // A guest that is gone answers no exec.
    call.finish().expect_err("the exec ended with its guest");
    let row = sandbox.inspect();
    let field = |key| row.get(key).unwrap_or_default().to_string();
    (field("state"), field("reason"))
}

#[test]
fn power_off_reset_panic_triple_fault_and_stop_are_told_apart() {
    let node = shared::node();
    let ended = |script: &str| end_by(&node.sandbox(&[]), script);

    let (state, reason) = ended("poweroff -f");
    assert_eq!((state.as_str(), reason.as_str()), ("stopped", "the guest powered off"));

    let (state, reason) = ended("reboot -f");
    assert_eq!(state, "error");
    assert!(reason.contains("guest-reset") && reason.contains("asked for a reset"), "{reason}");

    let (state, reason) = ended("echo 2 > /proc/sys/vm/panic_on_oom; tail /dev/zero");
    assert_eq!(state, "error");
    assert!(reason.starts_with("guest-oom: "), "{reason}");

    let (state, reason) = ended("echo triple > /sys/kernel/reboot/type; reboot -f");
    assert_eq!(state, "error");
    assert!(reason.contains("guest-reset") && reason.contains("triple fault"), "{reason}");

    // By the guest's own shutdown, and at once by the worker.
    for timeout in [u64::from(timing::factor()) * 10_000, 0] {
        let sandbox = node.sandbox(&[]);
        sandbox.client().ok(sandbox.request("sandbox.stop").set("timeout_ms", timeout));
        let row = sandbox.inspect();
        assert_eq!((row.get("state"), row.get("reason")), (Some("stopped"), Some("stopped")));
        let words = node.sh(&format!("cat /data/sandboxes/{}/last-words", sandbox.id));
        let reason = if timeout == 0 { "reason=stopped" } else { "reason=guest-poweroff" };
        assert!(words.contains(reason), "{words}");
    }
}

#[test]
fn memory_that_cannot_be_had_is_a_typed_error_and_leaves_nothing() {
    let node = shared::node();
    drop(node.sandbox(&[]));
    let before = NodeState::of(&node);
    // Strict accounting: the host does not promise more than it has.
    node.sh("echo 2 > /proc/sys/vm/overcommit_memory");
    let error = node.control().err(Sandbox::create_request(&[("memory_mib", "32768")]));
    node.sh("echo 0 > /proc/sys/vm/overcommit_memory");
    assert!(error.is(Code::NoCapacity), "{error}");
    assert!(error.message.contains("34359738368"), "{error}");
    before.assert_restored(&node);
    assert_eq!(node.sandbox(&[]).exec(&["echo", "on"]).text("stdout"), "on\n");
}

#[test]
fn the_largest_guest_takes_its_memory_as_it_uses_it() {
    let node = shared::node();
    let sandbox = node.sandbox(&[("memory_mib", "32768"), ("vcpus", "2")]);
    assert_eq!(ram(&sandbox).last(), Some(&(4 << 30, 33 << 30)));
    let worker = node.worker(&sandbox.id);
    let status = node.sh(&format!("cat /proc/{worker}/status"));
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line of /proc/PID/status");
    let resident: u64 = resident.trim().trim_end_matches(" kB").parse().expect("a number of KiB");
    assert!(resident < 2 << 20, "{resident} KiB are resident");
}

#[test]
fn sizes_out_of_range_are_refused_by_name() {
    let node = shared::node();
    let known: BTreeSet<String> = ["vcpus", "memory_mib"].map(str::to_string).into();
    for (key, value) in [("vcpus", "0"), ("vcpus", "17"), ("memory_mib", "63"), ("memory_mib", "32769")] {
        let error = node.control().err(Sandbox::create_request(&[(key, value)]));
        assert!(error.is(Code::OutOfRange), "{error}");
        assert!(known.iter().any(|name| error.message.contains(name.as_str())), "{error}");
    }
}

/// What a sandbox's worker counts.
fn stats(node: &Node, sandbox: &Sandbox) -> Fields {
    let script = format!("echo '1 vm.stats' | node-tool talk /run/warren/sandboxes/{}.sock", sandbox.id);
    let mut decoder = Decoder::new();
    decoder.push(node.sh(&script).as_bytes());
    loop {
        match decoder.next() {
            Some(Decoded::Message(Message::Ok { fields, .. })) => return fields,
            Some(Decoded::Message(Message::Item { .. })) => {}
            other => panic!("vm.stats is answered by {other:?}"),
        }
    }
}

#[test]
fn exits_are_counted_by_reason() {
    let node = shared::node();
    let sandbox = guest(&node, 2);
    let before = stats(&node, &sandbox);
    // Doorbells and interrupts end in KVM; each character of the console comes to the worker.
    sandbox.sh("echo on the console > /dev/console; sleep 0.2");
    let after = stats(&node, &sandbox);
    let grew = |key: &str| {
        let number = |fields: &Fields| fields.number(key).unwrap_or_else(|| panic!("{key} is no number: {fields:?}"));
        number(&after).checked_sub(number(&before)).unwrap_or_else(|| panic!("{key} fell"))
    };
    for key in ["exits", "exits_io", "kvm_exits", "kvm_exits_halt", "kvm_exits_io"] {
        assert!(grew(key) > 0, "{key} did not grow: {after:?}");
    }
    assert!(grew("kvm_exits") > grew("exits"), "{after:?}");
    assert!(grew("exits_io") >= "on the console".len() as u64, "{after:?}");
    let parts: u64 = ["halt", "interrupt", "io", "mmio"].iter().map(|part| grew(&format!("kvm_exits_{part}"))).sum();
    assert!(parts <= grew("kvm_exits"), "{after:?}");
}
