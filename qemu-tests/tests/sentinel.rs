//! The sentinel on the node: started by init, without rights, measuring the node and its sandboxes. The reference core on
//! the node is its receiver.

use std::collections::BTreeSet;

use qemu_tests::{Boot, Node, Request, timing};
use serde_json::Value;

const CORE: &str = "127.0.0.1:9480";

fn boot() -> Node {
    let seconds = (30 * timing::factor()).min(600);
    let configuration = format!(
        "[sandbox]\nboot_timeout_s = {seconds}\nstop_timeout_s = {seconds}\n\
         [sentinel]\nid = \"s1\"\nsender = {{ mode = \"core\", flush_ms = 100, retry_ms = 100, retry_longest_s = 1 }}\n\
         [sentinel.core]\nurl = \"http://{CORE}\"\n\
         [[sentinel.task]]\nid = \"node\"\nplugin = \"node\"\ninterval_ms = 1000\n\
         [[sentinel.task]]\nid = \"sandboxes\"\nplugin = \"sandbox\"\ninterval_ms = 1000\n\
         config = {{ labels = [\"team\"] }}\n"
    );
    Boot::kernel()
        .file("/etc/warren/warren.toml", 0o600, configuration.into_bytes())
        .parameter(&format!("\"warren.service=/usr/bin/warren sentinel core-sim --listen {CORE} --out /data/samples\""))
        .start()
}

/// Every sample that has arrived, by name.
fn samples(node: &Node, name: &str) -> Vec<Value> {
    let text = String::from_utf8_lossy(&node.read_file("/data/samples")).into_owned();
    let all = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    all.filter(|sample| sample["name"] == name).collect()
}

fn arrived(node: &Node, name: &str) -> Vec<Value> {
    timing::wait_for(name, || Some(samples(node, name)).filter(|found| !found.is_empty()))
}

/// What the core says of it.
fn core(node: &Node) -> Value {
    let text = node.sh(&format!("wget -q -O - http://{CORE}/api/v1/state"));
    serde_json::from_str::<Value>(&text).expect("the core answers in JSON")["s1"].clone()
}

/// The process id of the sentinel.
fn sentinel(node: &Node) -> String {
    timing::wait_for("a sentinel on the node", || {
        let text = node.sh("cat /sys/fs/cgroup/sentinel/cgroup.procs");
        text.lines().next().map(str::to_string)
    })
}

#[test]
fn the_sentinel_delivers_what_the_node_and_its_sandboxes_use_has_no_rights_and_survives_its_death() {
    let node = boot();
    let sandbox = node.sandbox(&[("name", "web"), ("label", "team=red"), ("env", "TOKEN=swordfish")]);

    // The node's own metrics, and those of the sandbox with what was asked for of its labels.
    arrived(&node, "node_memory_MemTotal_bytes");
    for name in [
        "warren_sandbox_cpu_seconds_total",
        "warren_sandbox_memory_resident_bytes",
        "warren_sandbox_disk_reads_total",
        "warren_sandbox_kvm_exits_total",
    ] {
        let found = arrived(&node, name);
        let labels = &found[0]["labels"];
        assert_eq!((&labels["sandbox"], &labels["name"]), (&Value::from(&*sandbox.id), &Value::from("web")), "{name}");
        assert_eq!((&labels["template"], &labels["label_team"]), (&Value::from("base"), &Value::from("red")));
        assert_eq!(labels["sentinel"], "warren");
        assert!(found[0]["value"].as_f64() > Some(0.0), "{name}: {found:?}");
    }
    assert!(samples(&node, "warren_node_info").iter().all(|sample| sample["labels"]["id"].is_string()));

    // Its own user, no right but for ping's, and it gains none; its group is limited.
    let pid = sentinel(&node);
    let status = node.sh(&format!("cat /proc/{pid}/status"));
    let field = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key));
        line.unwrap_or_default().split_whitespace().map(str::to_string).collect::<Vec<_>>()
    };
    assert_eq!(field("Uid:"), ["900"; 4]);
    assert_eq!(field("Gid:"), ["900"; 4]);
    assert!(field("Groups:").is_empty());
    assert_eq!(
        (field("CapEff:"), field("CapPrm:")),
        (vec!["0000000000002000".into()], vec!["0000000000002000".into()])
    );
    assert_eq!((field("CapBnd:"), field("CapInh:")), (vec!["0".repeat(16)], vec!["0".repeat(16)]));
    assert_eq!(field("NoNewPrivs:"), ["1"]);
    assert_ne!(node.sh("cat /sys/fs/cgroup/sentinel/memory.max"), "max\n");

    // As its user one sees sandboxes, without their environment, and changes nothing.
    let as_sentinel = |argv: &str| {
        let request = Request::new("", "exec.start").arg("sh").arg("-c").arg(format!("warren {argv}"));
        node.root().ok(request.set("user", 900).set("cwd", "/").set("env", "PATH=/test/bin:/usr/bin:/bin"))
    };
    let list = as_sentinel("ps --json");
    assert!(list.text("stdout").contains(&sandbox.id), "{list:?}");
    assert!(!list.text("stdout").contains("swordfish"));
    let removal = as_sentinel(&format!("rm -f {}", sandbox.id));
    assert!(removal.text("stderr").contains("FORBIDDEN"), "{removal:?}");
    assert_eq!(sandbox.state(), "running");

    // Killed in the middle: init starts another one, which goes on where it was.
    let before = core(&node)["samples"].as_u64();
    node.sh(&format!("kill -9 {pid}"));
    timing::wait_for("samples of another sentinel", || {
        let now = core(&node);
        (sentinel(&node) != pid && now["samples"].as_u64() > before.map(|count| count + 1000)).then_some(())
    });
    assert_eq!(core(&node)["missing"], 0);

    // So does a new supervisor, whom the sentinel finds by itself.
    let times = |node: &Node| -> BTreeSet<i64> {
        let found = samples(node, "warren_sandbox_cpu_seconds_total");
        found.iter().filter_map(|sample| sample["timestamp"].as_i64()).collect()
    };
    let supervisor = node.supervisor();
    node.sh(&format!("kill -9 {supervisor}"));
    timing::wait_for("another supervisor", || (node.supervisor() != supervisor).then_some(()));
    timing::wait_for("its answer", || node.control().call(Request::new("", "hello")).ok());
    let last = times(&node).last().copied();
    timing::wait_for("samples by way of the new supervisor", || (times(&node).last().copied() > last).then_some(()));

    // A sandbox that is gone has ended series.
    let id = sandbox.id.clone();
    sandbox.remove().expect("a running sandbox is removed by force");
    timing::wait_for("the end of its series", || {
        let found = samples(&node, "warren_sandbox_cpu_seconds_total");
        found.iter().any(|sample| sample["labels"]["sandbox"] == *id && sample["value"] == "stale").then_some(())
    });

    // Stopped in order: what it had accepted is on the disk with what it had sent.
    let mut disks = node.power_off();
    let node = Boot::kernel().data_disk(disks.pop().expect("the data disk")).start();
    let fsck = node.run(&["warren", "sentinel", "buffer", "fsck", "/data/sentinel/buffer"]);
    assert_eq!(fsck.exit, 0, "{fsck:?}");
    assert_eq!(node.sh("cat /sys/fs/cgroup/sentinel/cgroup.procs"), "", "without its table there is none");
    node.power_off();
}
