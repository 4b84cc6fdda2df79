//! Many copies of one guest take of the node's memory what they write.

use std::collections::BTreeSet;

use qemu_tests::{Request, Sandbox, shared, timing};

/// Memory of the guest that is forked, in MiB.
const GUEST_MIB: &str = "256";

/// What its program has in memory before it is forked, in MiB.
const DATA_MIB: u64 = 32;

/// What a copy may take of the node, in MiB: its worker, and what its kernel, its agent and its program write. 6.0 to 8.7
/// were measured, by how much the first copy had done when its working set was asked for: the others have those pages at
/// once. A copy of the data alone would be 32.
const COPY_MIB: u64 = 12;

/// Builds a large array of random numbers and waits for some of 1, 2 …: then it adds up every second, third … of the array.
const PROGRAM: &str = r#"
import os, time, numpy
data = numpy.random.default_rng().integers(0, 1 << 62, MIB << 17, dtype=numpy.uint64)
os.mkfifo('/workspace/result')
open('/workspace/ready', 'w').write('%d\n' % data.nbytes)
while True:
    try:
        words = open('/workspace/go').read().split()
    except OSError:
        words = []
    if words and words[-1] == 'end':
        os.remove('/workspace/go')
        results = ['%s %d\n' % (n, data[::int(n) + 1].sum()) for n in words[:-1]]
        open('/workspace/result', 'w').writelines(results)
    time.sleep(0.1)
"#;

fn ask(sandbox: &Sandbox, numbers: &[u64]) {
    let words: Vec<String> = numbers.iter().map(u64::to_string).collect();
    sandbox.sh(&format!(
        "echo {} end > /workspace/next && chmod 666 /workspace/next && mv /workspace/next /workspace/go",
        words.join(" ")
    ));
}

fn answer(sandbox: &Sandbox) -> Vec<(u64, u64)> {
    // A pipe: to look again and again would cost pages as well.
    let text = sandbox.sh("cat /workspace/result");
    let pair = |line: &str| line.split_once(' ').map(|(n, result)| (n.parse().unwrap(), result.parse().unwrap()));
    text.lines().filter_map(pair).collect()
}

#[test]
fn forks_of_python_with_numpy_compute_at_once_and_take_what_they_write() {
    let count: u64 = std::env::var("WARREN_SOAK_FORKS").ok().and_then(|text| text.parse().ok()).unwrap_or(8);
    let node = shared::node_with_code();
    timing::wait_for("the template", || {
        let rows = node.control().ok(Request::new("", "template.list")).items;
        rows.iter().any(|row| row.get("name") == Some("code")).then_some(())
    });
    let parent = node.sandbox(&[("template", "code"), ("memory_mib", GUEST_MIB)]);
    let program = PROGRAM.replace("MIB", &DATA_MIB.to_string());
    parent.client().ok(parent.exec_request(&["python3", "-c", &program]).set("detach", true));
    timing::wait_for("its data", || {
        (parent.exec(&["test", "-s", "/workspace/ready"]).field("exit") == "0").then_some(())
    });
    let available = || {
        node.sh(
            "sync; echo 3 > /proc/sys/vm/drop_caches; sed -n 's/^MemAvailable: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo",
        )
        .trim()
        .parse::<u64>()
        .expect("a number")
    };
    // The first has what all share brought in.
    let first = node.control().ok(Request::new("", "snapshot.create").arg(&parent.id)).field("id").to_string();
    let fork = |n: u64| -> Vec<Sandbox> {
        let reply = node.control().ok(Request::new("", "snapshot.fork").arg(&first).set("n", n));
        reply.items.iter().filter_map(|item| item.get("id")).map(|id| Sandbox::of(node.control(), id)).collect()
    };
    let mut clones = fork(1);
    ask(&clones[0], &[0]);
    answer(&clones[0]);
    let before = available();
    clones.extend(fork(count));
    assert_eq!(clones.len() as u64, count + 1);
    for (clone, n) in clones[1..].iter().zip(1..) {
        ask(clone, &[n]);
    }
    let computed: Vec<(u64, u64)> = clones[1..].iter().flat_map(answer).collect();
    let after = available();
    let each = before.saturating_sub(after) / count;
    println!("{count} forks took {each} KiB each");
    assert!(each <= COPY_MIB << 10, "a fork takes {each} KiB of the node");
    // The parent has the same data, and computes all of it by itself.
    ask(&parent, &(1..=count).collect::<Vec<u64>>());
    assert_eq!(answer(&parent), computed);
    let results: BTreeSet<u64> = computed.iter().map(|(_, result)| *result).collect();
    assert_eq!(results.len() as u64, count, "each computed another thing");
    for clone in clones {
        clone.remove().expect("a clone can be removed");
    }
    node.control().ok(Request::new("", "snapshot.remove").arg(&first));
}
