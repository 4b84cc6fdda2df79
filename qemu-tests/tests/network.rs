//! The sandboxes' network: what the packet policy does with each frame (`vm-rig network`), and what real guests reach of
//! an internet made of a network namespace (`vm-rig internet`).

use std::process::Command;

use qemu_tests::internet::{HOST, Internet, OTHER};
use qemu_tests::node::Boot;
use qemu_tests::timing::{self, wait_for};
use qemu_tests::{Node, Sandbox, shared};
use warren::wire::{Code, Request};

/// Whether a TCP connection to port 80 is answered within seconds. What must not pass is dropped without a word; that it
/// was not merely slow is seen where it would have arrived.
fn reaches(sandbox: &Sandbox, host: &str) -> bool {
    sandbox.sh(&format!("echo hello | timeout 4 nc -w 4 {host} 80 2>/dev/null; true")) == "hello\n"
}

fn assert_reaches(sandbox: &Sandbox, host: &str) {
    assert!((0..5).any(|_| reaches(sandbox, host)), "{host} is not reached");
}

fn on(node: &Node, keys: &[(&str, &str)]) -> Sandbox {
    node.sandbox(&[&[("network", "on")], keys].concat())
}

fn update(sandbox: &Sandbox, keys: &[(&str, &str)]) -> qemu_tests::client::Reply {
    let request = keys.iter().fold(sandbox.request("sandbox.update"), |request, (key, value)| request.set(key, value));
    sandbox.client().ok(request)
}

/// `nft`, after `put_nft`: the node's kernel runs no scripts.
const NFT: &str = "/test/nft/ld-linux-x86-64.so.2 --library-path /test/nft /test/nft/nft.program";

/// Puts Debian's nft with its libraries on the node.
fn put_nft(node: &Node) {
    let output = Command::new("ldd").arg("/usr/sbin/nft").output().expect("ldd is part of libc-bin");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let paths = text.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    node.sh("mkdir -p /test/nft");
    for path in paths.chain(["/usr/sbin/nft"]) {
        let octets = std::fs::read(path).unwrap_or_else(|e| panic!("{path}: {e}; nftables is in `make deps`"));
        let name = path.rsplit('/').next().unwrap_or_default();
        let name = if name == "nft" { "nft.program" } else { name };
        node.write_file(&format!("/test/nft/{name}"), 0o755, &octets);
    }
}

#[test]
fn each_frame_fares_as_the_policy_says() {
    print!("{}", shared::node().rig(&["network", "matrix"]));
}

#[test]
fn a_change_holds_from_its_answer_on_and_nothing_stays_of_a_sandbox_that_is_gone() {
    let node = shared::node();
    put_nft(&node);
    print!("{}", node.rig(&["network", "change"]));
}

#[test]
fn an_exhausted_pool_refuses_in_time_and_serves_again() {
    print!("{}", shared::node().rig(&["network", "pool"]));
}

#[test]
fn debians_nft_lists_the_nodes_rules_as_those_of_a_text() {
    let node = shared::node();
    put_nft(&node);
    node.write_file("/test/ruleset.nft", 0o644, include_bytes!("network/ruleset.nft"));
    let said = node.rig(&["network", "rules", "/test/ruleset.nft"]);
    let mut lists = said.lines().map(|line| {
        let value: serde_json::Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        let mut objects = value["nftables"].as_array().expect("a list").clone();
        // The kernel's own numbers of objects differ.
        for object in &mut objects {
            for (_, inner) in object.as_object_mut().expect("an object") {
                inner.as_object_mut().map(|inner| inner.remove("handle"));
            }
        }
        objects.iter().map(ToString::to_string).collect::<std::collections::BTreeSet<_>>()
    });
    let (ours, theirs) = (lists.next().expect("our list"), lists.next().expect("their list"));
    assert!(ours.len() > 20, "{ours:?}");
    let difference: Vec<&String> = ours.symmetric_difference(&theirs).collect();
    assert!(difference.is_empty(), "{difference:#?}");
}

#[test]
fn a_guest_reaches_the_internet_and_nothing_else() {
    let node = shared::node();
    let internet = Internet::of(&node);
    let (a, b, off) = (on(&node, &[]), on(&node, &[]), node.sandbox(&[]));
    assert_eq!(a.inspect().get("network"), Some("on"));
    let address = |sandbox: &Sandbox| sandbox.inspect().get("address").expect("it has one").to_string();
    assert!(a.sh("ip addr show eth0").contains(&format!("inet {}/31", address(&a))));
    assert_eq!(a.sh("cat /etc/resolv.conf"), "nameserver 1.1.1.1\nnameserver 9.9.9.9\n");
    assert_reaches(&a, HOST);
    assert_reaches(&b, OTHER);
    a.put_guest_tool();
    a.sh("/run/guest-tool udp-send to=1.2.3.4:53 count=3");
    assert!(internet.count(HOST, "tcp") >= 6);
    wait_for("three datagrams", || (internet.count(HOST, "udp") == 3).then_some(()));

    // Everything that somebody listens on, and must not be reached.
    node.sh("nc -ll -p 80 -e echo hello > /dev/null 2>&1 & echo");
    b.sh("nc -ll -p 80 -e echo hello > /dev/null 2>&1 & echo");
    let gateway = a.sh("ip route show default").split_whitespace().nth(2).expect("a gateway").to_string();
    for host in [gateway.as_str(), "93.0.0.1", &address(&b), "10.0.0.5", "192.168.1.1", "127.0.0.1"] {
        assert!(!reaches(&a, host), "{host} is reached");
    }
    node.sh("killall nc");
    assert_eq!((internet.count("10.0.0.5", "tcp"), internet.count("192.168.1.1", "tcp")), (0, 0));

    // Without a network there is no device, and none comes later.
    assert_eq!(off.inspect().get("network"), Some("off"));
    assert_eq!(off.sh("ls /sys/class/net"), "lo\n");
    let error = node.control().err(off.request("sandbox.update").set("network", "on"));
    assert!(error.is(Code::BadState), "{error}");
    assert_eq!(update(&off, &[("network", "off")]).field("network"), "off");
}

#[test]
fn a_guest_with_lists_reaches_what_they_leave_and_a_change_cuts_what_it_forbids() {
    let node = shared::node();
    let internet = Internet::of(&node);
    let sandbox = on(&node, &[("allow", "1.0.0.0/8,5.6.0.0/16"), ("deny", "5.6.7.0/25")]);
    assert_reaches(&sandbox, HOST);
    assert!(!reaches(&sandbox, OTHER));
    assert_eq!(internet.count(OTHER, "tcp"), 0);
    update(&sandbox, &[("network", "on")]);
    assert_reaches(&sandbox, OTHER);

    // A connection that goes on, and datagrams all the while.
    let mut call = sandbox.start(sandbox.exec_request(&["nc", OTHER, "80"]).set("stdin", true));
    call.item();
    let writer = call.writer();
    assert!(writer.write("stdin", b"one\n"));
    call.read_until("stdout", "one\n");
    sandbox.put_guest_tool();
    let flood = "while true; do /run/guest-tool udp-send to=5.6.7.8:53 count=1; usleep 50000; done";
    let request = sandbox.exec_request(&["sh", "-c", flood]).set("user", 0).set("detach", true);
    sandbox.client().ok(request);
    wait_for("the flood", || (internet.count(OTHER, "udp") > 5).then_some(()));
    let reply = update(&sandbox, &[("network", "on"), ("deny", OTHER)]);
    assert!(reply.fields.number("flows_cut").is_some_and(|cut| cut >= 2), "{reply:?}");
    // What was on its way past the node at that moment is given time to arrive; then nothing may come any more.
    std::thread::sleep(std::time::Duration::from_millis(500));
    let before = (internet.count(OTHER, "tcp"), internet.count(OTHER, "udp"));
    assert!(writer.write("stdin", b"two\n"));
    std::thread::sleep(std::time::Duration::from_secs(3));
    assert_eq!((internet.count(OTHER, "tcp"), internet.count(OTHER, "udp")), before, "after the change");
    assert_reaches(&sandbox, HOST);
    let row = sandbox.inspect();
    assert_eq!((row.get("network"), row.get("deny")), (Some("on"), Some("5.6.7.8/32")));
    update(&sandbox, &[("network", "off")]);
    assert!(!reaches(&sandbox, HOST), "off");
    let error = sandbox.client().err(sandbox.request("sandbox.update").set("network", "on").set("allow", "10.0.0.0/8"));
    assert!(error.is(Code::BadArgument) && error.message.contains("RFC 1918"), "{error}");
}

#[test]
fn nothing_of_a_network_stays_when_its_sandbox_is_removed() {
    let node = shared::node();
    put_nft(&node);
    let _internet = Internet::of(&node);
    // The pool has then what it needs for one.
    drop(on(&node, &[]));
    let traces = || {
        let links = "ls /sys/class/net | grep ^wt; ip neigh | grep 'dev wt'; ip addr | grep 'wt'; ip route | grep wt";
        node.sh(&format!("{NFT} -s list table inet warren; {links}"))
    };
    let before = traces();
    let sandbox = on(&node, &[("deny", OTHER)]);
    assert_reaches(&sandbox, HOST);
    let address = sandbox.inspect().get("address").expect("it has one").to_string();
    let flows = || node.rig(&["network", "flows", &address]);
    assert_ne!(flows(), "0\n");
    assert!(traces().contains(&format!(". {address}")), "{}", traces());
    sandbox.remove().expect("a sandbox can be removed");
    assert_eq!(flows(), "0\n");
    wait_for("the pool to be as it was", || (traces() == before).then_some(()));
}

#[test]
fn a_killed_supervisor_cuts_no_connection_and_the_next_one_keeps_the_policy() {
    let node = shared::node();
    let _internet = Internet::of(&node);
    let (sandbox, gone) = (on(&node, &[("deny", OTHER)]), on(&node, &[]));
    let address = sandbox.inspect().get("address").expect("it has one").to_string();
    // It goes on by itself: the client's own link to its program breaks with the supervisor.
    let script = format!("n=0; while true; do echo $n; n=$((n+1)); sleep 1; done | nc {HOST} 80 > /run/echoed");
    sandbox.client().ok(sandbox.exec_request(&["sh", "-c", &script]).set("user", 0).set("detach", true));
    let echoed = || sandbox.sh("cat /run/echoed 2> /dev/null | wc -l").trim().parse::<u64>().unwrap_or(0);
    wait_for("the connection", || (echoed() > 1).then_some(()));
    let supervisor = node.supervisor();
    node.sh(&format!("kill -9 {supervisor}; kill -9 {}", node.worker(&gone.id)));
    wait_for("another supervisor", || (node.supervisor() != supervisor).then_some(()));
    // The bridge may still be telling of the restart.
    wait_for("its answer", || node.control().call(Request::new("", "hello")).ok());
    qemu_tests::witness::answers(&sandbox);
    let now = echoed();
    wait_for("the connection to go on", || (echoed() > now + 1).then_some(()));
    assert_eq!(sandbox.inspect().get("address"), Some(address.as_str()));
    assert!(!reaches(&sandbox, OTHER), "the policy holds");
    // The slot is nobody else's, and goes when its sandbox does.
    let next = on(&node, &[]);
    assert_ne!(next.inspect().get("address"), Some(address.as_str()));
    assert_reaches(&next, OTHER);
    update(&sandbox, &[("network", "on"), ("deny", HOST)]);
    let now = echoed();
    std::thread::sleep(std::time::Duration::from_secs(3));
    assert_eq!(echoed(), now, "the change cut it");
    assert_reaches(&sandbox, OTHER);
    sandbox.remove().expect("a sandbox can be removed");
    gone.remove().expect("a sandbox in error can be removed");
    assert_reaches(&next, HOST);
}

#[test]
fn a_node_without_free_slots_says_so_and_recovers_by_itself() {
    let seconds = (30 * timing::factor()).min(600);
    let text = format!(
        "[sandbox]\nboot_timeout_s = {seconds}\nstop_timeout_s = {seconds}\n[network]\nmax = 1\nmin_ready = 0\nwait_ms = 300\n"
    );
    let node = Boot::kernel().file("/etc/warren/warren.toml", 0o644, text.into_bytes()).start();
    let sandbox = on(&node, &[]);
    let error = node.control().err(Sandbox::create_request(&[("network", "on")]));
    assert!(error.is(Code::NoCapacity), "{error}");
    assert_eq!(error.fields.get("max"), Some("1"));
    assert_eq!(sandbox.sh("echo on"), "on\n");
    // One that waits gets the slot of one that goes.
    sandbox.remove().expect("a sandbox can be removed");
    let next = on(&node, &[]);
    assert_eq!(next.sh("cat /sys/class/net/eth0/address").trim(), "02:77:0a:c9:00:01");
    drop(next);
    node.power_off();
}
