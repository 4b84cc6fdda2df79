//! `identity thaw` and `identity renew`: a guest that becomes another one while it runs, without the snapshot that this is
//! for.

use std::fs;
use std::io::{ErrorKind, Read};
use std::net::TcpStream;
use std::time::Duration;

use qemu_tests::client::{Call, Client};
use qemu_tests::rig::{Setup, Tap, TapFlags, Vm, own_network};
use qemu_tests::timing::{hang, wait_for};
use warren::sandbox::worker::AGENT_PORT;
use warren::wire::{Fields, Message, Request};

const NODE: &str = "10.9.1.0";
const GUEST: &str = "10.9.1.1";
const MAC: &str = "02:00:00:00:00:01";
/// Whom the guest becomes: nobody whose frames its worker lets pass.
const OTHER: &str = "10.9.2.1";
const OTHER_MAC: &str = "02:00:00:00:00:02";

pub fn run(arguments: &[&str]) {
    own_network();
    match arguments {
        ["thaw"] => thaw(),
        ["renew"] => renew(),
        _ => panic!("usage: vm-rig identity thaw | renew"),
    }
}

/// Starts a program that counts in /run/count for as long as it lives, and leaves the processor to others in between.
fn start_counter(vm: &Vm) -> Call {
    let script = "n=0; while :; do n=$((n+1)); echo $n > /run/count; sleep 0.02; done";
    vm.agent().start(vm.exec_request(&["sh", "-c", script]))
}

/// What it has reached. The agent reads the file itself, so this works while everybody else stands still; nothing at
/// the moment when the file is written anew.
fn count(vm: &Vm) -> Option<u64> {
    let content = vm.agent().call(Request::new("", "file.read").set("path", "/run/count")).ok()?;
    content.text("content").trim().parse().ok()
}

fn assert_counts(vm: &Vm) {
    let before = wait_for("the counter to begin", || count(vm));
    wait_for("the counter to go on", || (count(vm)? > before).then_some(()));
}

fn assert_stands_still(vm: &Vm) {
    let before = count(vm);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(count(vm), before, "a frozen program went on");
}

fn freeze(vm: &Vm, id: &str) {
    let reply = vm.agent().ok(Request::new("", "system.freeze").set("wait_ms", 10_000).set("id", id));
    assert_eq!(reply.field("frozen"), "true");
    assert!(reply.fields.number("procs").is_some_and(|procs| procs > 0), "{:?}", reply.fields);
}

/// What a file says line by line: `key=value`.
fn notice(vm: &Vm) -> Fields {
    let text = String::from_utf8(vm.read_file("/run/warren/generation")).expect("text");
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    pairs.fold(Fields::new(), |fields, (key, value)| fields.with(key, value))
}

fn number(text: &str, key: &str) -> i128 {
    let found = text.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
    found.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {key} in {text:?}"))
}

/// The monotonic clock, from a program.
fn monotonic(vm: &Vm) -> i128 {
    number(&vm.sh("/run/guest-tool clock until=/"), "monotonic_ns")
}

fn thaw() {
    let tap = Tap::create("guest1", TapFlags { vnet_header: 12, offloads: 0 });
    fs::write("/proc/sys/net/ipv6/conf/guest1/disable_ipv6", "1").expect("root may set it");
    tap.up(&format!("{NODE}/31"));
    let setup = Setup::new().descriptor("tap", tap.file.try_clone().expect("a descriptor can be copied"));
    let vm = setup.set("mac", MAC).set("ipv4", GUEST).start();
    let configure = Request::new("", "system.configure").set("address", format!("{GUEST}/31"));
    vm.agent().ok(configure.set("gateway", NODE));
    vm.put_guest_tool();
    assert_eq!(notice(&vm).get("generation"), Some("0"), "there is a notice from the start");

    let counter = start_counter(&vm);
    let mut watcher = vm.agent().start(vm.exec_request(&["/run/guest-tool", "clock", "until=/run/stop"]));
    watcher.read_until("stdout", "watching");
    let mut taker = vm.agent().start(vm.exec_request(&["/run/guest-tool", "tcp-receive", "port=5001"]));
    taker.read_until("stdout", "listening=");
    let mut peer = TcpStream::connect((GUEST, 5001)).expect("the guest listens");
    vm.sh("ip route add 10.77.0.0/16 via 10.9.1.0; ip addr add 10.9.9.9/32 dev eth0; ip neigh show dev eth0 | grep -q 10.9.1.0");
    vm.sh("chmod 600 /etc/hosts; echo stale > /etc/machine-id; chmod 640 /etc/machine-id");
    assert_counts(&vm);

    let before = monotonic(&vm);
    freeze(&vm, "parent");
    assert_stands_still(&vm);
    let second = vm.connect();
    second.ok(Request::new("", "vsock.connect").set("port", AGENT_PORT));
    match second.stray("hello") {
        Message::Ok { fields, .. } => assert_eq!((fields.get("frozen"), fields.get("resumed")), (Some("true"), None)),
        other => panic!("{other:?}"),
    }
    let mut late = vm.agent().start(vm.exec_request(&["echo", "late"]));
    assert!(late.message_within(Duration::from_millis(500)).is_none(), "it ran although all were frozen");

    // What fails leaves everybody where they are, and says where it failed.
    vm.agent().ok(Request::new("", "file.remove").set("path", "/run/warren").set("recursive", true));
    vm.write_file("/run/warren", 0o644, b"not a directory");
    let error = vm.agent().err(Request::new("", "system.thaw").set("id", "clone").set("hostname", "half"));
    assert_eq!(error.fields.get("step"), Some("notice"), "{error}");
    assert_stands_still(&vm);
    vm.agent().ok(Request::new("", "file.remove").set("path", "/run/warren"));
    let error = vm.agent().err(Request::new("", "system.thaw").set("machine_id", "x"));
    assert_eq!(error.code, "BAD_ARGUMENT");
    assert_stands_still(&vm);

    // Three days on.
    let clock: i128 = 1_900_000_000_123_456_789;
    let seed: Vec<u8> = (0..64).collect();
    let request = Request::new("", "system.thaw").set("id", "clone").set("generation", 8).set("hostname", "clone-1");
    let request = request.set("clock_ns", clock).set_bytes("seed", &seed);
    let request = request.set("machine_id", "0123456789abcdef0123456789abcdef").set("mac", OTHER_MAC);
    let request = request.set("address", format!("{OTHER}/31")).set("gateway", "10.9.2.0").set("mtu", 1400);
    let reply = vm.agent().ok(request.set("dns", "9.9.9.9"));
    assert_eq!(reply.field("generation"), "8");
    assert_counts(&vm);
    assert_eq!(late.finish_ok().text("stdout"), "late\n");

    // The clock was set to what was said, at a moment between these two.
    let clocks = vm.sh("/run/guest-tool clock until=/");
    let (after, realtime) = (number(&clocks, "monotonic_ns"), number(&clocks, "realtime_ns"));
    let set_at = after - (realtime - clock);
    assert!((before..=after).contains(&set_at), "{before} {set_at} {after}");

    let said = notice(&vm);
    assert_eq!(
        [said.get("generation"), said.get("id"), said.get("previous")],
        [Some("8"), Some("clone"), Some("parent")]
    );
    let told: i128 = said.get("time_ns").and_then(|time| time.parse().ok()).expect("a time");
    // Written before the answer, so not later than the whole took.
    let took: i128 = reply.field("took_us").parse().expect("a number");
    assert!((clock..=clock + (took + 1) * 1000).contains(&told), "{clock} {told}, {took} us");
    println!("thaw took_us={took} notice_after_us={}", (told - clock) / 1000);
    assert_eq!(vm.sh("hostname; cat /proc/sys/kernel/hostname"), "clone-1\nclone-1\n");
    assert_eq!(vm.sh("cat /etc/machine-id; stat -c %a /etc/machine-id"), "0123456789abcdef0123456789abcdef\n640\n");
    let hosts = vm.sh("cat /etc/hosts; stat -c %a /etc/hosts");
    assert!(hosts.contains("127.0.1.1 clone-1\n") && !hosts.contains(" rig") && hosts.ends_with("600\n"), "{hosts}");
    assert_eq!(vm.sh("cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu"), format!("{OTHER_MAC}\n1400\n"));
    let addresses = vm.sh("ip -4 -o addr show dev eth0");
    assert!(addresses.contains(&format!("{OTHER}/31")) && addresses.lines().count() == 1, "{addresses}");
    let routes = vm.sh("ip route");
    assert!(routes.contains("default via 10.9.2.0 dev eth0") && !routes.contains("10.77."), "{routes}");
    assert_eq!(vm.sh("ip neigh show dev eth0"), "");
    assert_eq!(vm.sh("cat /etc/resolv.conf"), "nameserver 9.9.9.9\n");

    // A connection of the old address ends in the guest, and its peer hears nothing of it.
    let reply = taker.finish_ok();
    assert_eq!(reply.field("exit"), "1");
    assert!(reply.text("stderr").contains("Software caused connection abort"), "{}", reply.text("stderr"));
    peer.set_read_timeout(Some(Duration::from_millis(500))).expect("a socket takes a time limit");
    let heard = peer.read(&mut [0; 1]).expect_err("the peer heard something");
    assert_eq!(heard.kind(), ErrorKind::WouldBlock);

    // Back again, with another seed: everything works as before.
    let random = || vm.sh("head -c 32 /dev/urandom | od -An -tx1");
    // A program watches the notice as docs/snapshots.md says.
    let mut notified = vm.agent().start(vm.exec_request(&["/run/guest-tool", "moved-to", "directory=/run/warren"]));
    notified.read_until("stdout", "watching");
    let first = random();
    freeze(&vm, "clone");
    assert_stands_still(&vm);
    let request = Request::new("", "system.thaw").set("generation", 9).set_bytes("seed", &[7; 512]).set("mac", MAC);
    vm.agent().ok(request.set("address", format!("{GUEST}/31")).set("gateway", NODE));
    assert_ne!(first, random());
    assert_eq!(notified.finish_ok().text("stdout"), "name=generation\n");
    vm.sh(&format!("ping -c 1 -W 20 {NODE}"));
    let said = notice(&vm);
    assert_eq!(
        [said.get("generation"), said.get("id"), said.get("previous")],
        [Some("9"), Some("clone"), Some("clone")]
    );
    // And without anything to be told it is just a thaw.
    freeze(&vm, "clone");
    assert_eq!(vm.agent().ok(Request::new("", "system.thaw")).field("generation"), "9");
    assert_counts(&vm);

    vm.sh("touch /run/stop");
    let watched = watcher.finish_ok();
    assert_eq!(watched.field("exit"), "0", "{}", watched.text("stderr"));
    drop(counter);
    assert_eq!(vm.stop().reason, "stopped");
}

/// The greeting on a link that waits for the agent's call.
fn greeting(link: &Client) -> Fields {
    match link.stray_within("hello", hang()) {
        Some(Message::Ok { fields, .. }) => fields,
        other => panic!("no agent: {other:?}, {:?}", link.closed()),
    }
}

/// The guest's kernel takes note that it is another machine, and its agent calls again at once.
fn renew() {
    let vm = Setup::new().start();
    let (first, counter) = (vm.agent(), start_counter(&vm));
    assert_counts(&vm);
    let boot = first.ok(Request::new("", "hello")).field("boot").to_string();
    let bound = vm.sh("ls /sys/bus/platform/drivers/vmgenid /sys/bus/platform/drivers/acpi-ged");
    assert!(bound.contains("WRRN0001:00") && bound.contains("ACPI0013:00"), "{bound}");
    let news = || vm.sh("dmesg | grep -c 'crng reseeded due to virtual machine fork'; true").trim().to_string();
    assert_eq!(news(), "0");

    // An end that the host makes is no reason to call: the host comes when it wants.
    let second = vm.connect();
    second.ok(Request::new("", "vsock.connect").set("port", AGENT_PORT));
    assert_eq!(greeting(&second).get("boot"), Some(boot.as_str()));
    drop(second);
    wait_for("the link to be gone", || (vm.stat("vsock_connections") == 1).then_some(()));
    let waiting = vm.connect();
    let accept = waiting.start(Request::new("", "vsock.accept").set("port", AGENT_PORT));
    assert!(waiting.stray_within("hello", Duration::from_secs(1)).is_none(), "the agent called");

    vm.control().ok(Request::new("", "vm.renew"));
    accept.finish_ok();
    let again = greeting(&waiting);
    assert_eq!((again.get("boot"), again.get("resumed")), (Some(boot.as_str()), Some("true")));
    wait_for("the old link's end", || first.closed());
    // Programs have heard nothing of it.
    let rows = waiting.ok(Request::new("", "exec.list")).items;
    let counters: Vec<_> = rows.iter().filter(|row| row.get("state") == Some("running")).collect();
    assert_eq!(counters.len(), 1, "{rows:?}");
    let sh = |script: &str| {
        let request =
            ["sh", "-c", script].iter().fold(Request::new("", "exec.start"), |request, word| request.arg(word));
        waiting.ok(request.set("user", 0)).text("stdout")
    };
    let count = || sh("cat /run/count").trim().parse::<u64>().ok();
    let before = wait_for("what it has reached", count);
    wait_for("the counter to go on", || (count()? > before).then_some(()));
    assert_eq!(sh("dmesg | grep -c 'crng reseeded due to virtual machine fork'"), "1\n");

    // Nobody waits this time; it goes on trying, and not without end at once.
    let packets = vm.stat("vsock_tx_packets");
    vm.control().ok(Request::new("", "vm.renew"));
    wait_for("the second link's end", || waiting.closed());
    std::thread::sleep(Duration::from_secs(3));
    let tries = vm.stat("vsock_tx_packets") - packets;
    assert!(tries < 100, "{tries} packets");
    let third = vm.connect();
    third.ok(Request::new("", "vsock.accept").set("port", AGENT_PORT));
    assert_eq!(greeting(&third).get("resumed"), Some("true"));
    println!("packets while nobody answered: {tries}");
    drop(counter);
    assert_eq!(vm.stop().reason, "stopped");
}
