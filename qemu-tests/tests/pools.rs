//! What the node makes before anybody asks for it: workers and overlays.

use std::collections::BTreeSet;

use qemu_tests::node::{Boot, Node, root_exec};
use qemu_tests::{Code, Sandbox, shared, timing};

fn number(node: &Node, pool: &str, key: &str) -> u64 {
    node.pool(pool).number(key).unwrap_or_else(|| panic!("pool {pool} has no {key}"))
}

/// Waits until a pool is full again.
fn full(node: &Node, pool: &str) {
    timing::wait_for("the pool to be filled", || (number(node, pool, "ready") == 2).then_some(()));
}

fn with(config: &str) -> Node {
    Boot::kernel().file("/etc/warren/warren.toml", 0o644, config.as_bytes().to_vec()).start()
}

#[test]
fn a_sandbox_takes_what_is_ready_and_it_is_made_again() {
    let node = shared::node();
    full(&node, "workers");
    full(&node, "overlays");
    let count = |pool: &str| ["hits", "misses", "made", "in_use"].map(|key| number(&node, pool, key));
    let (workers, overlays) = (count("workers"), count("overlays"));
    let idle = node.idle_homes();
    let pids: Vec<u64> = idle.iter().map(|id| node.worker(id)).collect();
    let sandbox = node.sandbox(&[]);
    assert!(idle.contains(&sandbox.id), "{} is none of {idle:?}", sandbox.id);
    assert!(pids.contains(&node.worker(&sandbox.id)), "its worker was there before");
    full(&node, "workers");
    full(&node, "overlays");
    for (before, after) in [(workers, count("workers")), (overlays, count("overlays"))] {
        let [hits, misses, made, in_use] = before;
        assert_eq!(after, [hits + 1, misses, made + 1, in_use + 1]);
    }
    assert!(!node.idle_homes().contains(&sandbox.id));
    sandbox.remove().expect("a sandbox can be removed");
    timing::wait_for("its places to be free", || {
        let free = |pool: &str, before: u64| number(&node, pool, "in_use") == before;
        (free("workers", workers[3]) && free("overlays", overlays[3])).then_some(())
    });
}

#[test]
fn a_disk_of_another_size_than_the_last_is_as_large_as_was_asked_for() {
    let node = shared::node();
    for mib in [600_u64, 900, 600] {
        full(&node, "overlays");
        let sandbox = node.sandbox(&[("disk_mib", &mib.to_string())]);
        assert_eq!(sandbox.sh("cat /sys/block/vda/size").trim(), (mib * 2048).to_string());
        sandbox.sh("dd if=/dev/urandom of=/file bs=1M count=4 2>/dev/null; sync; echo 3 > /proc/sys/vm/drop_caches");
        sandbox.sh("cat /file > /dev/null");
    }
}

#[test]
fn a_waiting_worker_that_dies_is_named_and_replaced() {
    let node = shared::node();
    full(&node, "workers");
    let (idle, failed) = (node.idle_homes(), number(&node, "workers", "failed"));
    let victim = idle.first().expect("two wait").clone();
    node.sh(&format!("kill -9 {}", node.worker(&victim)));
    timing::wait_for("its end to be noticed", || (number(&node, "workers", "failed") > failed).then_some(()));
    // It is of no use to whoever comes next.
    let sandbox = node.sandbox(&[]);
    assert_ne!(sandbox.id, victim);
    full(&node, "workers");
    assert!(!node.idle_homes().contains(&victim));
    let left =
        || node.run(&["ls", "-d", &format!("/data/sandboxes/{victim}"), &format!("/sys/fs/cgroup/sandboxes/{victim}")]);
    timing::wait_for("its home to be taken down", || left().stdout.is_empty().then_some(()));
}

#[test]
fn a_supervisor_that_is_killed_leaves_no_waiting_worker_behind() {
    let node = shared::node();
    full(&node, "workers");
    let sandbox = node.sandbox(&[]);
    full(&node, "workers");
    full(&node, "overlays");
    let idle = node.idle_homes();
    let pids: Vec<u64> = idle.iter().map(|id| node.worker(id)).collect();
    let overlays = node.sh("ls /data/overlays");
    let killed = node.supervisor();
    node.sh(&format!("kill -9 {killed}"));
    timing::wait_for("another supervisor", || (node.supervisor() != killed).then_some(()));
    timing::wait_for("its answer", || node.control().call(qemu_tests::Request::new("", "hello")).ok());
    full(&node, "workers");
    full(&node, "overlays");
    timing::wait_for("the old homes to be taken down", || {
        let homes = node.sh("ls /data/sandboxes /sys/fs/cgroup/sandboxes /run/warren/sandboxes");
        let gone = idle.iter().all(|id| !homes.contains(id.as_str()));
        let ended = pids.iter().all(|pid| node.run(&["test", "-e", &format!("/proc/{pid}")]).exit != 0);
        let now = node.sh("ls /data/overlays");
        (gone && ended && overlays.lines().all(|file| !now.contains(file))).then_some(())
    });
    assert!(idle.is_disjoint(&node.idle_homes()));
    assert_eq!(node.sh("ls /data/overlays").lines().count(), 2);
    assert_eq!(number(&node, "workers", "in_use"), 1, "the sandbox that runs on has its place");
    assert_eq!(sandbox.exec(&["echo", "on"]).text("stdout"), "on\n");
}

#[test]
fn where_all_are_in_use_a_sandbox_waits_for_a_place_and_is_told_when_none_comes_free() {
    let node = with("[worker_pool]\nmax = 1\nmin_ready = 0\nwait_ms = 20000\n[overlay_pool]\nmin_ready = 0\n");
    assert_eq!(node.idle_homes(), BTreeSet::new());
    let first = node.sandbox(&[]);
    let error = node.control().err(Sandbox::create_request(&[]));
    assert!(error.is(Code::NoCapacity), "{error}");
    assert_eq!((error.fields.get("resource"), error.fields.get("max")), (Some("worker"), Some("1")), "{error}");
    let waiting = node.control().start(Sandbox::create_request(&[]));
    timing::wait_for("it to wait", || (number(&node, "workers", "waiting") == 1).then_some(()));
    first.remove().expect("a sandbox can be removed");
    let id = waiting.finish_ok().field("id").to_string();
    let second = Sandbox::of(node.control(), &id);
    assert_eq!(second.exec(&["echo", "in"]).text("stdout"), "in\n");
    let pool = node.pool("workers");
    for (key, value) in [("made", "2"), ("hits", "0"), ("misses", "3"), ("waited", "2"), ("late", "1"), ("failed", "0")]
    {
        assert_eq!(pool.get(key), Some(value), "{key} of {pool:?}");
    }
    // The removed, the waiting and the refused left nothing.
    assert_eq!(node.sh("ls /data/sandboxes; ls /data/overlays"), format!("{id}\n"));
    drop(second);
    node.power_off();
}

#[test]
fn a_worker_whose_end_nobody_would_notice_is_taken_down() {
    let node = Boot::kernel().start();
    let keeper = node.sandbox(&[]);
    full(&node, "workers");
    let victim = node.idle_homes().first().expect("two wait").clone();
    // From here on nothing new of root's can be watched: what a user has registered with epoll counts (epoll(7)).
    let limit = "/proc/sys/fs/epoll/max_user_watches";
    let script = format!(
        "was=$(cat {limit}); echo 6 > {limit}; kill -9 {}; n=0; \
         while [ -e /data/sandboxes/{} ] && [ $n -lt 6000 ]; do sleep 0.1; n=$((n+1)); done; echo $was > {limit}",
        node.worker(&victim),
        keeper.id
    );
    let limited = node.root().start(root_exec(&["sh", "-c", &script]));
    let is_told = |text: &str| text.contains("cannot be watched");
    timing::wait_for("a worker that cannot be watched", || {
        node.pool("workers").get("problem").is_some_and(is_told).then_some(())
    });
    // One that is ready cannot be asked anything, and one that is ordered cannot be watched.
    let ready = number(&node, "workers", "ready");
    for _ in 0..ready + 2 {
        let error = node.control().err(Sandbox::create_request(&[]));
        assert!(error.is(Code::NoCapacity) && is_told(&error.message), "{error}");
    }
    timing::wait_for("their places to be free", || (number(&node, "workers", "in_use") == 1).then_some(()));
    let id = keeper.id.clone();
    keeper.remove().expect("a sandbox can be removed");
    assert_eq!(limited.finish_ok().field("exit"), "0");
    full(&node, "workers");
    assert_eq!(node.sandbox(&[]).exec(&["echo", "well"]).text("stdout"), "well\n");
    full(&node, "workers");
    let idle = node.idle_homes();
    assert!(!idle.contains(&id));
    timing::wait_for("no home to be there but those that are ready", || {
        let homes = node.sh("ls /data/sandboxes");
        let groups = node.sh("cd /sys/fs/cgroup/sandboxes && ls -d */");
        let all = |text: &str| text.lines().all(|line| idle.contains(line.trim_end_matches('/')));
        (all(&homes) && all(&groups)).then_some(())
    });
    node.power_off();
}
