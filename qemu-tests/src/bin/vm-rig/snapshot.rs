//! `snapshot`: microVMs that are taken out of their worker and put into others.

use qemu_tests::rig::{Setup, Vm};
use qemu_tests::timing;
use warren::vmm::snapshot::Saved;
use warren::vmm::snapshot::saved::Part;
use warren::wire::Request;

pub fn run(arguments: &[&str]) {
    match arguments {
        ["again"] => again_and_again(),
        ["processors"] => processors(),
        ["running"] => running(),
        ["refused"] => refused(),
        ["processor"] => processor(),
        _ => panic!("usage: snapshot again|processors|running|refused|processor"),
    }
}

/// A counter that goes on for as long as the guest does, and how far it is.
const COUNT: &str = "n=0; while :; do n=$((n+1)); echo $n > /run/count; sleep 0.05; done";

fn counter(vm: &Vm) -> u64 {
    // At times it is just being written.
    timing::wait_for("a count", || vm.sh("cat /run/count").trim().parse().ok())
}

/// Waits until the counter has gone on.
fn goes_on(vm: &Vm, from: u64) {
    timing::wait_for("the counter to go on", || (counter(vm) > from + 2).then_some(()));
}

fn start_counter(vm: &Vm) {
    vm.sh(&format!("( {COUNT} ) > /dev/null 2>&1 &"));
    timing::wait_for("the counter's start", || {
        vm.exec(&["test", "-s", "/run/count"]).field("exit").eq("0").then_some(())
    });
}

/// Each time the same: files, memory, a running program.
fn again_and_again() {
    let mut vm = Setup::new().start();
    let tool = vm.put_guest_tool();
    let content: Vec<u8> = (0..200_000u32).map(|n| (n * 11 % 253) as u8).collect();
    vm.write_file("/workspace/numbers", 0o640, &content);
    vm.write_file("/run/numbers", 0o640, &content);
    start_counter(&vm);
    for round in 0..5 {
        let from = counter(&vm);
        let snapshot = vm.freeze(round % 2 == 0);
        println!("round={round} memory_kib={}", snapshot.memory_bytes() >> 10);
        vm = Setup::new().restored(&snapshot).start();
        vm.restored_agent();
        goes_on(&vm, from);
        assert!(vm.read_file("/workspace/numbers") == content, "a file on the disk, round {round}");
        assert!(vm.read_file("/run/numbers") == content, "a file in memory, round {round}");
        vm.sh(&format!("echo {round} >> /workspace/rounds; sync"));
        assert_eq!(vm.sh(&format!("{tool} memory mib=8 times=1")), "mib=8 times=1\n");
    }
    assert_eq!(vm.sh("cat /workspace/rounds"), "0\n1\n2\n3\n4\n");
    assert_eq!(vm.stop().reason, "stopped");
}

/// Several processors, all of them at work, with one time.
fn processors() {
    for vcpus in [2, 4] {
        let vm = Setup::new().vcpus(vcpus).start();
        let tool = vm.put_guest_tool();
        start_counter(&vm);
        let monotonic = |vm: &Vm| -> f64 {
            let text = vm.sh("cat /proc/uptime");
            text.split(' ').next().and_then(|seconds| seconds.parse().ok()).expect("there is an uptime")
        };
        let (from, before) = (counter(&vm), monotonic(&vm));
        let vm = Setup::new().restored(&vm.freeze(true)).start();
        vm.restored_agent();
        goes_on(&vm, from);
        let after = monotonic(&vm);
        assert!(after >= before, "{after} after {before}");
        let lines = vm.sh(&format!("{tool} cpu threads={vcpus} rounds=100000"));
        assert_eq!(lines.lines().count(), usize::from(vcpus));
        let log = vm.sh("dmesg | grep -i -E 'lockup|stall|unstable|call trace' || true");
        assert_eq!(log, "", "the guest's kernel complains");
        println!(
            "vcpus={vcpus} clocksource={}",
            vm.sh("cat /sys/devices/system/clocksource/clocksource0/current_clocksource")
        );
    }
}

/// The guest runs on, and what was taken of it starts as often as one likes.
fn running() {
    let vm = Setup::new().start();
    start_counter(&vm);
    vm.sh("echo before > /run/word; sync");
    let (snapshot, captured) = vm.capture(true, true, true);
    println!(
        "stopped_us={} memory_bytes={}",
        captured.get("stopped_us").unwrap_or("?"),
        captured.get("memory_bytes").unwrap_or("?")
    );
    let held = vm.control().ok(Request::new("", "hello")).fields;
    assert_eq!(held.get("held"), Some("true"));
    vm.control().ok(Request::new("", "vm.resume"));
    let at = counter(&vm);
    goes_on(&vm, at);
    let (second, captured) = vm.capture(true, false, true);
    assert_eq!(captured.get("diff"), Some("false"));
    goes_on(&vm, counter(&vm));
    drop(second);
    vm.sh("echo after > /run/word");
    let snapshot = vm.end_frozen(snapshot);
    let clones: Vec<Vm> = (0..3).map(|_| Setup::new().restored(&snapshot).start()).collect();
    for (n, clone) in clones.iter().enumerate() {
        clone.restored_agent();
        assert_eq!(clone.sh("cat /run/word"), "before\n");
        clone.sh(&format!("echo {n} > /run/word; dd if=/dev/zero of=/run/own bs=1M count=4 2>/dev/null"));
    }
    for (n, clone) in clones.iter().enumerate() {
        assert_eq!(clone.sh("cat /run/word"), format!("{n}\n"), "clones have nothing in common");
    }
    // What one of them changed at once is prepared for the next, which is none the worse for it.
    let (set, pages) = clones[1].working_set();
    println!("working_set={pages}");
    assert!(pages > 100, "{pages} pages");
    let next = Setup::new().restored(&snapshot).working_set(&set).start();
    let changed = next.process().guest_kib(128).expect("its mappings can be read");
    assert!(changed >= pages * 4, "{changed} KiB of {pages} pages");
    next.restored_agent();
    assert_eq!(next.sh("cat /run/word"), "before\n");
    drop(next);
    // One that was prepared before it was asked for has them, and time has not passed for it.
    let next = Setup::new().restored(&snapshot).working_set(&set).prepared().start();
    let (prepared, _) = next.prepared.as_ref().expect("the worker prepared it");
    let number = |key: &str| prepared.number(key).unwrap_or(0);
    println!("own={} mapped={}", number("own"), number("mapped"));
    assert!(number("own") >= pages * 9 / 10 && number("mapped") > number("own"), "{prepared:?}");
    next.restored_agent();
    assert_eq!(next.sh("cat /run/word"), "before\n");
    goes_on(&next, counter(&next));
    drop(next);
    // What a clone's snapshot has is what it changed.
    let (diff, captured) = clones[0].capture(true, false, true);
    assert_eq!(captured.get("diff"), Some("true"));
    let changed = diff.memory_bytes();
    println!("diff_kib={} of {}", changed >> 10, snapshot.memory_bytes() >> 10);
    assert!((4 << 20..48 << 20).contains(&changed), "{changed} octets differ");
}

/// What is no snapshot, or another guest's.
fn refused() {
    let vm = Setup::new().start();
    vm.agent();
    let snapshot = vm.freeze(true);
    let refused = |setup: Setup| setup.try_start().expect_err("it was taken").0;
    let error = refused(Setup::new().restored(&snapshot).vcpus(2));
    assert_eq!(error.code, "CORRUPT", "{error}");
    let state = std::fs::read(snapshot.path("state")).expect("it has a state");
    let write = |octets: &[u8]| std::fs::write(snapshot.path("state"), octets).expect("a file can be written");
    for at in [0, state.len() / 2, state.len() - 3] {
        let mut bad = state.clone();
        bad[at] ^= 4;
        write(&bad);
        assert_eq!(refused(Setup::new().restored(&snapshot)).code, "CORRUPT", "octet {at}");
    }
    write(&state[..state.len() / 2]);
    assert_eq!(refused(Setup::new().restored(&snapshot)).code, "CORRUPT");
    write(&state);
    let memory = std::fs::OpenOptions::new().write(true).open(snapshot.path("memory")).expect("it has memory");
    memory.set_len(64 << 20).expect("a file can be cut");
    let error = refused(Setup::new().restored(&snapshot));
    assert_eq!(error.code, "CORRUPT", "{error}");
    memory.set_len(128 << 20).expect("a file can be made longer");
    let error = refused(Setup::new().restored(&snapshot).descriptor_with("disk", "more:rw:", memory));
    assert_eq!(error.code, "CORRUPT", "another device: {error}");
}

/// A state whose processor could do what this one cannot.
fn processor() {
    let vm = Setup::new().start();
    vm.agent();
    let snapshot = vm.freeze(true);
    let state = std::fs::read(snapshot.path("state")).expect("it has a state");
    let write = |octets: &[u8]| std::fs::write(snapshot.path("state"), octets).expect("a file can be written");
    let refused = |change: &dyn Fn(&mut Leaf)| {
        write(&with_cpuid(&state, change));
        let (error, words) = Setup::new().restored(&snapshot).try_start().expect_err("it was taken");
        println!("{error}");
        assert_eq!(error.code, "CPU_MISMATCH", "{error}");
        assert_eq!(words.map(|words| words.reason).as_deref(), Some("start-failed"));
        error
    };
    let error = refused(&|entry| match (entry.function, entry.index) {
        (0x1, 0) => entry.ecx |= 1 << 12 | 1 << 29,
        (0x7, 0) => (entry.ebx, entry.edx) = (entry.ebx | 1 << 16, entry.edx | 1 << 23),
        _ => {}
    });
    let missing = error.fields.get("missing").expect("it says what is missing");
    for name in ["avx512f", "avx512_fp16"] {
        assert!(missing.split(' ').any(|word| word == name), "{missing}");
        assert!(error.message.contains(name), "{error}");
    }
    let error = refused(&|entry| {
        if entry.function == 0 {
            let word = |octets: &[u8; 4]| u32::from_le_bytes(*octets);
            (entry.ebx, entry.edx, entry.ecx) = (word(b"Genu"), word(b"ineI"), word(b"ntel"));
        }
    });
    assert_eq!((error.fields.get("vendor"), error.fields.get("missing")), (Some("GenuineIntel"), Some("")));
    assert_ne!(error.fields.get("host_vendor"), Some("GenuineIntel"));
    // With nothing changed but less asked for, it goes on.
    write(&with_cpuid(&state, &|entry| {
        if (entry.function, entry.index) == (0x7, 0) {
            entry.ebx &= !(1 << 29);
        }
    }));
    let vm = Setup::new().restored(&snapshot).start();
    vm.restored_agent();
    assert_eq!(vm.sh("echo on"), "on\n");
}

/// What a CPUID entry of a state is changed by.
#[derive(Default)]
struct Leaf {
    function: u32,
    index: u32,
    ebx: u32,
    ecx: u32,
    edx: u32,
}

/// The same state with other CPUID entries.
fn with_cpuid(state: &[u8], change: &dyn Fn(&mut Leaf)) -> Vec<u8> {
    const LEN: usize = 40;
    let saved = Saved::decode(state).expect("it can be read");
    let mut other = Saved::default();
    for part in saved.parts() {
        let entries = if part.name() == "cpuid" { part.bytes("entries").expect("it has entries") } else { None };
        let Some(entries) = entries else {
            other.push(part.clone());
            continue;
        };
        let mut octets = Vec::with_capacity(entries.len());
        for entry in entries.chunks_exact(LEN) {
            // function, index, flags, eax, ebx, ecx, edx, padding: <asm/kvm.h>.
            let mut words: Vec<u32> =
                entry.as_chunks::<4>().0.iter().map(|octets| u32::from_le_bytes(*octets)).collect();
            let mut leaf = Leaf { function: words[0], index: words[1], ..Leaf::default() };
            [leaf.ebx, leaf.ecx, leaf.edx] = [words[4], words[5], words[6]];
            change(&mut leaf);
            words[4..7].copy_from_slice(&[leaf.ebx, leaf.ecx, leaf.edx]);
            words.iter().for_each(|word| octets.extend(word.to_le_bytes()));
        }
        other.push(Part::new("cpuid", part.index()).with_bytes("entries", &octets));
    }
    other.encode()
}
