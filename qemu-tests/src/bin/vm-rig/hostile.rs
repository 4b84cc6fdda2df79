//! `hostile MODE key=value…`: boots `hostile-guest` in a worker of its own and watches the worker.
//!
//! `seed=`, `rounds=` and `second=1` (a second processor joins in) go to the guest. `expect=` lists the ends that are
//! allowed, by the word in the last words. Whatever the guest does, the worker has to answer `vm.stats`, to end when
//! told to, and to stay within its memory and descriptors.
//!
//! `emulated=1` says that the node's processor is QEMU's. That raises page faults now and then that no page table
//! explains (docs/testing.md, "Known"): a guest that ended by a triple fault that it did not make itself gets one more
//! run, which has to pass.

use std::fs::File;
use std::io::{self, Write};
use std::net::UdpSocket;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use qemu_tests::connection::Connection;
use qemu_tests::rig::{Ended, Setup, Tap, TapFlags, Vm};
use qemu_tests::timing;
use warren::wire::{Message, Request};

const MEMORY_MIB: u64 = 64;
/// Private memory that a worker may have outside of its guest's, in KiB.
const OVERHEAD_MAX_KIB: u64 = 8 * 1024;
/// What the worker may say of a guest's faults, in octets.
const LOG_MAX: usize = 64 * 1024;
/// Links to the guest's vsock; the worker may take them a little later than they are made.
const LINKS: usize = 8;
/// A guest that has said that it is stuck gets that long to show otherwise.
const STUCK: Duration = Duration::from_millis(500);

pub fn run(arguments: &[&str]) {
    let (mode, keys) = arguments.split_first().expect("hostile MODE key=value...");
    let value = |key: &str| keys.iter().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
    let expected: Vec<&str> = value("expect").unwrap_or("guest-poweroff").split(',').collect();
    let rounds = value("rounds").unwrap_or("10");
    let second = value("second") == Some("1");
    let line = format!(
        "mode={mode} seed={} rounds={rounds} second={}",
        value("seed").unwrap_or("1"),
        value("second").unwrap_or("0")
    );
    let attempt = || attempt(mode, &line, second);
    let (mut end, mut most) = attempt();
    if value("emulated") == Some("1") && !expected.contains(&"guest-reset") && is_unexplained(&end) {
        println!("again, because of a triple fault that is not the guest's: {end:?}");
        (end, most) = attempt();
    }
    let told = || format!("{line}: {end:?}");
    assert!(expected.contains(&end.reason.as_str()), "{}", told());
    assert!(end.serial.contains("hostile: mode") || end.serial.len() > 200_000, "the guest never came up: {}", told());
    assert!(!end.serial.contains("fault of its own"), "{}", told());
    if end.reason == "guest-poweroff" && *mode != "power-off" {
        assert!(end.serial.contains("hostile: done"), "{}", told());
    }
    if *mode == "stray-exception" {
        assert!(end.serial.contains("exception 6 error 0x0"), "{}", told());
        assert!(!is_unexplained(&end), "{}", told());
    }
    assert!(most.overhead_kib <= OVERHEAD_MAX_KIB, "the worker took {} KiB: {}", most.overhead_kib, told());
    assert!(most.descriptors <= most.descriptors_at_start + LINKS + 2, "the worker opened descriptors: {}", told());
    assert!(end.log.len() <= LOG_MAX, "the worker's log has {} octets", end.log.len());
}

/// Runs the guest once, tells how it ended, and gives what the worker took at most.
fn attempt(mode: &str, line: &str, second: bool) -> (Ended, Most) {
    let tap = network();
    let mut vm = Setup::new()
        .bare_kernel("/test/hostile-guest".as_ref())
        .memory_mib(MEMORY_MIB)
        .vcpus(if second { 2 } else { 1 })
        .command_line(line)
        .descriptor_with("disk", "attacked:rw:", disk("rw"))
        .descriptor_with("disk", "looked-at:ro:", disk("ro"))
        .descriptor("tap", tap.file.try_clone().expect("a descriptor can be copied"))
        .set("mac", "02:00:00:00:00:01")
        .start();
    // Somebody to talk to for the guest's vsock.
    let links: Vec<UnixStream> = (0..LINKS as u32).filter_map(|n| link(&vm, 1024 + n).ok()).collect();
    let most = watch(&mut vm);
    drop(links);
    let end = vm.stop();

    let last = end.serial.lines().rev().find_map(|line| line.strip_prefix("hostile: round ")).unwrap_or("none");
    println!(
        "mode={mode} reason={} last_round={last} exceptions={} overhead_kib={} descriptors={} log_octets={}",
        end.reason,
        end.serial.matches(" by exception ").count(),
        most.overhead_kib,
        most.descriptors,
        end.log.len()
    );
    (end, most)
}

/// Whether the guest ended by a triple fault and had not said why: it tells exceptions that come outside of a round, and
/// faults of its own, before it gives up; one inside a round ends that round alone.
fn is_unexplained(end: &Ended) -> bool {
    let faulted = end.words.as_ref().is_some_and(|words| words.detail.starts_with("triple fault"));
    faulted && !["outside of a round", "fault of its own"].iter().any(|text| end.serial.contains(text))
}

/// A small disk without a file of its own left behind.
fn disk(name: &str) -> File {
    let path = std::env::temp_dir().join(format!("hostile-{}-{name}", std::process::id()));
    let file = File::options().read(true).write(true).create_new(true).open(&path).expect("a file can be made");
    std::fs::remove_file(path).expect("it was just made");
    file.set_len(8 << 20).expect("a new file takes a length");
    file
}

/// A network device on which the node has something for the guest all the time.
fn network() -> Tap {
    let tap = Tap::create("hostile", TapFlags { vnet_header: 12, offloads: 0 });
    tap.up("10.66.0.0/31");
    tap.neighbour("10.66.0.1", "02:00:00:00:00:01");
    let socket = UdpSocket::bind("10.66.0.0:0").expect("the node has that address");
    std::thread::spawn(move || {
        // Ends with the program; the queue of a guest that takes nothing is bounded by the kernel.
        for len in (0..1400).step_by(7).cycle() {
            let _ = socket.send_to(&[0x55; 1400][..len], "10.66.0.1:9");
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    tap
}

/// A stream that wants to go to a port of the guest, with something in it.
fn link(vm: &Vm, port: u32) -> io::Result<UnixStream> {
    let mut connection = vm.open()?;
    connection.send(&Message::Request(Request::new("join", "vsock.connect").set("port", port)))?;
    connection.stream().set_nonblocking(true)?;
    connection.stream().write_all(&[0x55; 4096])?;
    connection.stream().try_clone()
}

#[derive(Default)]
struct Most {
    overhead_kib: u64,
    descriptors: usize,
    descriptors_at_start: usize,
}

/// Asks the worker until its guest has ended or says that it is stuck.
fn watch(vm: &mut Vm) -> Most {
    let mut most = Most { descriptors_at_start: vm.process().descriptors(), ..Most::default() };
    let mut control = vm.open().ok();
    let end = Instant::now() + timing::hang() * 4;
    let mut stuck_since = None;
    while !vm.has_ended() {
        assert!(Instant::now() < end, "the guest neither ends nor says that it is stuck: {}", vm.serial());
        if let Some(connection) = &mut control
            && let Err(e) = ask(connection)
        {
            // The end of the worker is the one reason not to answer.
            assert!(
                !matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut),
                "vm.stats is not answered"
            );
            control = None;
        }
        most.overhead_kib = most.overhead_kib.max(vm.process().overhead_kib(MEMORY_MIB).unwrap_or(0));
        most.descriptors = most.descriptors.max(vm.process().descriptors());
        let serial = vm.serial();
        if ["hostile: halts", "hostile: spins", "hostile: waits"].iter().any(|text| serial.contains(text))
            && stuck_since.get_or_insert_with(Instant::now).elapsed() > STUCK
        {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    most
}

fn ask(connection: &mut Connection) -> io::Result<()> {
    connection.send(&Message::Request(Request::new("s", "vm.stats")))?;
    loop {
        let message = connection.receive()?;
        if message.is_final() {
            return Ok(());
        }
    }
}
