//! What a worker still can do once its jail is closed, on the node's own kernel.

use qemu_tests::node::{Boot, Node};
use qemu_tests::{Code, Request, Sandbox, shared, timing};

/// Namespaces that each worker has for itself.
const OWN: [&str; 5] = ["mnt", "pid", "ipc", "uts", "cgroup"];

/// The values of a line of `status`, one for each thread of the process.
fn of_all_threads(node: &Node, pid: u64, key: &str) -> Vec<String> {
    let text = node.sh(&format!("cat /proc/{pid}/task/*/status"));
    let values = text.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    let values: Vec<String> = values.map(|value| value.trim().replace('\t', " ")).collect();
    assert!(values.len() >= 4, "a worker has threads for processor, disk, log and devices: {values:?}");
    values
}

fn namespace(node: &Node, process: &str, kind: &str) -> String {
    node.sh(&format!("readlink /proc/{process}/ns/{kind}")).trim().to_string()
}

#[test]
fn no_thread_of_a_worker_has_a_privilege_or_can_gain_one() {
    let node = shared::node();
    let sandbox = node.sandbox(&[("vcpus", "2")]);
    let pid = node.worker(&sandbox.id);
    let all = |key: &str| of_all_threads(&node, pid, key);
    for key in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert!(all(key).iter().all(|set| set == "0000000000000000"), "{key}: {:?}", all(key));
    }
    assert!(all("NoNewPrivs").iter().all(|value| value == "1"));
    assert!(all("Groups").iter().all(String::is_empty), "{:?}", all("Groups"));
    let uid: u32 = all("Uid")[0].split(' ').next().and_then(|id| id.parse().ok()).expect("a user id");
    assert!((2_100_000_000..2_100_065_536).contains(&uid), "{uid}");
    for key in ["Uid", "Gid"] {
        assert!(all(key).iter().all(|ids| *ids == format!("{uid} {uid} {uid} {uid}")), "{key}: {:?}", all(key));
    }
    let other = node.sandbox(&[]);
    assert_ne!(of_all_threads(&node, node.worker(&other.id), "Uid")[0], all("Uid")[0], "each has its own");
}

#[test]
fn a_worker_sees_nothing_but_an_empty_root_and_a_network_without_links() {
    let node = shared::node();
    let (one, other) = (node.sandbox(&[]), node.sandbox(&[]));
    let (pid, other) = (node.worker(&one.id), node.worker(&other.id));
    for kind in OWN {
        let of = |process: &str| namespace(&node, process, kind);
        assert_ne!(of(&pid.to_string()), of("1"), "{kind}");
        assert_ne!(of(&pid.to_string()), of(&other.to_string()), "{kind}");
    }
    let net = namespace(&node, &pid.to_string(), "net");
    assert_ne!(net, namespace(&node, "1", "net"));
    assert_eq!(net, namespace(&node, &other.to_string(), "net"), "one empty network serves all");
    let links = node.sh(&format!("tail -n +3 /proc/{pid}/net/dev"));
    let links: Vec<&str> = links.lines().filter_map(|line| line.split(':').next()).map(str::trim).collect();
    assert_eq!(links, ["lo"]);
    assert_eq!(node.sh(&format!("cat /proc/{pid}/net/route | tail -n +2")), "", "no route");

    assert_eq!(node.sh(&format!("ls -A /proc/{pid}/root/")), "");
    let made = node.run(&["touch", &format!("/proc/{pid}/root/file")]);
    assert_ne!(made.exit, 0, "not even root can write there");
    assert!(made.stderr.contains("Read-only"), "{}", made.stderr);
    assert_eq!(node.sh(&format!("readlink /proc/{pid}/cwd")).trim(), "/");
    let mounts = node.sh(&format!("cat /proc/{pid}/mounts"));
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(mounts.contains("tmpfs ro,nosuid,nodev,noexec"), "{mounts}");
}

#[test]
fn a_worker_has_limits_and_only_descriptors_that_it_needs() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    let pid = node.worker(&sandbox.id);
    let limits = node.sh(&format!("cat /proc/{pid}/limits"));
    let overlay = node.sh(&format!("stat -c %s /data/sandboxes/{}/overlay", sandbox.id));
    for (name, limit) in [
        ("Max core file size", "0"),
        ("Max open files", "2048"),
        ("Max processes", "64"),
        ("Max locked memory", "0"),
        ("Max file size", overlay.trim()),
    ] {
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{limits}"));
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(words[..2], [limit, limit], "{name}");
    }

    let home = format!("/data/sandboxes/{}", sandbox.id);
    let links = node.sh(&format!("cd /proc/{pid}/fd && for fd in *; do readlink $fd; done"));
    let explained = |link: &str| {
        let files = ["overlay", "serial.log", "last-words", "worker.log"].map(|name| format!("{home}/{name}"));
        files.iter().any(|file| file == link)
            || link == "/dev/null" // standard input
            || link.ends_with("/base/rootfs.img") // read-only
            || link.starts_with("socket:") // its listener, the supervisor's links
            || ["[eventfd]", "[eventpoll]", "[timerfd]"].iter().any(|kind| *link == format!("anon_inode:{kind}"))
            || link.starts_with("anon_inode:kvm-v") // its machine and processors
            || link.starts_with("anon_inode:kvm-") && link.contains("stats")
            || link == "/dev/kvm"
    };
    let unexplained: Vec<&str> = links.lines().filter(|link| !explained(link)).collect();
    assert!(unexplained.is_empty(), "{unexplained:?} of {links}");
}

#[test]
fn a_worker_that_a_guest_has_taken_over_can_do_nothing_with_it() {
    let node = shared::node();
    let told = node.rig(&["jail"]);
    assert!(told.contains("killed="), "{told}");
}

#[test]
fn a_sandbox_has_limits_from_its_first_moment_and_one_that_runs_into_them_is_told_from_a_crash() {
    let node = Boot::kernel().allow("oom-kill").allow("ut of memory").allow("Call Trace:").start();
    let sandbox = node.sandbox(&[("vcpus", "2"), ("memory_mib", "128")]);
    let group = format!("/sys/fs/cgroup/sandboxes/{}", sandbox.id);
    let slow = node.sandbox(&[("disk_iops", "100")]);
    let limits = node.sh(&format!("cat /sys/fs/cgroup/sandboxes/{}/io.max", slow.id));
    assert!(limits.trim().ends_with("rbps=max wbps=max riops=200 wiops=200"), "{limits:?}");
    let limits = node.sh(&format!("cd {group} && cat memory.max pids.max cpu.max io.max"));
    assert_eq!(limits, format!("{}\n7\n300000 100000\n", (128 + 2 + 64) << 20));
    sandbox.sh("cat /bin/* > /dev/null");
    let threads = node.sh(&format!("cat {group}/pids.current"));
    assert!(threads.trim().parse::<u32>().expect("a number") <= 7, "{threads}");
    assert!(node.sh(&format!("cat {group}/memory.events")).contains("oom_kill 0"));

    node.sh(&format!("echo 16M > {group}/memory.max"));
    timing::wait_for("the sandbox to be in error", || (sandbox.state() == "error").then_some(()));
    let reason = sandbox.inspect().get("reason").unwrap_or_default().to_string();
    assert!(reason.starts_with("worker-oom: "), "{reason}");
    sandbox.remove().expect("a sandbox in error can be removed");
    node.power_off();
}

#[test]
fn a_node_without_a_user_id_left_says_so_and_goes_on_when_one_comes_back() {
    let config = b"[jail]\nuid_count = 1\n".to_vec();
    let node = Boot::kernel().file("/etc/warren/warren.toml", 0o644, config).start();
    let first = node.sandbox(&[]);
    let refused = || {
        let error = node.control().err(Sandbox::create_request(&[]));
        assert!(error.is(Code::NoCapacity), "{error}");
        assert_eq!(error.fields.get("resource"), Some("uid"), "{error}");
    };
    refused();
    assert_eq!(first.exec(&["echo", "unharmed"]).text("stdout"), "unharmed\n");
    // The next supervisor knows what a worker that runs on has.
    let supervisor = node.supervisor();
    node.sh(&format!("kill -9 {supervisor}"));
    timing::wait_for("another supervisor", || (node.supervisor() != supervisor).then_some(()));
    // What was under way when it was killed is answered with an error once.
    let hello = || node.control().call(Request::new("", "hello")).ok().map(drop);
    timing::wait_for("the next supervisor's answer", hello);
    refused();
    first.remove().expect("a sandbox can be removed");
    assert_eq!(node.sandbox(&[]).exec(&["echo", "next"]).text("stdout"), "next\n");
    node.power_off();
}

#[test]
fn a_worker_that_nobody_confined_refuses_to_run() {
    let node = shared::node();
    let run = "warren vmm 3< /dev/null 4> /tmp/words 2> /dev/null; echo $?; cat /tmp/words; rm /tmp/words";
    let said = node.sh(run);
    assert!(said.starts_with("1\n") && said.contains("the jail is open: it runs as root"), "{said}");
}
