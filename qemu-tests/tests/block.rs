//! Disks of a sandbox beside its root disk: what they are, who may have them, and that nothing flushed is lost.

use std::time::{Duration, Instant};

use qemu_tests::artefacts::node_tool;
use qemu_tests::sandbox::Sandbox;
use qemu_tests::state::NodeState;
use qemu_tests::{Boot, Message, Node, timing};
use warren::wire::Request;

/// The tests' configuration with two RAM disks: one for guests, one that carries a file system for disk files.
fn boot() -> Boot {
    let seconds = (30 * timing::factor()).min(600);
    let configuration = format!(
        "[sandbox]\nboot_timeout_s = {seconds}\nstop_timeout_s = {seconds}\n[disks]\ndevices = {{ ram = \"/dev/ram0\" }}\n"
    );
    Boot::kernel().parameter("brd.rd_nr=2").parameter("brd.rd_size=65536").file(
        "/etc/warren/warren.toml",
        0o644,
        configuration.into_bytes(),
    )
}

/// Copies the tool for the inside of guests into a sandbox.
fn put_tool(sandbox: &Sandbox) {
    let tool = std::fs::read(node_tool("guest-tool")).expect("the tool was built with the tests");
    let request = sandbox.request("file.write").set("path", "/tmp/guest-tool").set("mode", "0755").set("user", 0);
    let call = sandbox.start(request);
    let writer = call.writer();
    assert!(writer.write("content", &tool), "the sandbox takes no file");
    writer.end("content");
    call.finish_ok();
}

fn extra_disks_have_their_names_sizes_and_users(node: &Node) {
    node.sh("printf 'from the node' > /data/disks/models.img; truncate -s 1M /data/disks/models.img");
    let before_hash = node.sh("sha256sum /data/disks/models.img");
    drop(node.sandbox(&[]));
    let before = NodeState::of(node);
    let disks = [("disk", "data:new:64"), ("disk", "models:file:models.img:ro"), ("disk", "ram:device:ram")];
    let sandbox = node.sandbox(&disks);
    let found =
        sandbox.sh("for d in vda vdb vdc vdd; do cd /sys/block/$d; echo $(cat serial) $(cat size) $(cat ro); done");
    let root: u64 = found.split(' ').nth(1).and_then(|size| size.parse().ok()).expect("the root disk has a size");
    assert_eq!(found, format!("root {root} 0\ndata 131072 0\nmodels 2048 1\nram 131072 0\n"));
    assert_eq!(sandbox.sh("head -c 13 /dev/vdc"), "from the node");
    assert_ne!(sandbox.exec(&["sh", "-c", "echo x > /dev/vdc"]).field("exit"), "0");
    // A file system on each writable one, given back what it was.
    for disk in ["vdb", "vdd"] {
        sandbox.sh(&format!(
            "mke2fs /dev/{disk} > /tmp/out 2>&1 && mkdir -p /mnt/{disk} && mount -t ext4 /dev/{disk} /mnt/{disk} && \
             head -c 8000000 /dev/urandom > /mnt/{disk}/noise && sync && sha256sum < /mnt/{disk}/noise > /tmp/{disk} && \
             umount /mnt/{disk} && mount -t ext4 /dev/{disk} /mnt/{disk} && sha256sum < /mnt/{disk}/noise | cmp - /tmp/{disk}"
        ));
    }
    // What a file system trims, the node gets back: first written, then trimmed.
    let blocks = |node: &Node| -> u64 {
        let id = &sandbox.id;
        node.sh(&format!("stat -c %b /data/sandboxes/{id}/disks/data")).trim().parse().expect("a number")
    };
    let full = blocks(node);
    sandbox.sh("rm /mnt/vdb/noise; sync; fstrim /mnt/vdb; umount /mnt/vdb");
    assert!(full - blocks(node) > 12_000, "{full} blocks became {}", blocks(node));

    let inspected = sandbox.inspect();
    let shown: Vec<&str> =
        inspected.0.iter().filter(|(key, _)| key == "disk").map(|(_, v)| std::str::from_utf8(v).unwrap()).collect();
    assert_eq!(shown, ["data:new:64", "models:file:models.img:ro", "ram:device:ram"]);

    // Another may read what is read-only, and have nothing that is writable here.
    let client = node.control();
    for disk in ["m:file:models.img", "r:device:ram", "r:device:ram:ro"] {
        let error = client.err(Sandbox::create_request(&[("disk", disk)]));
        assert_eq!(error.code, "IN_USE", "{disk}: {error}");
    }
    for (disk, code) in
        [("x:file:none", "NOT_FOUND"), ("x:device:none", "NOT_FOUND"), ("x:file:../state.db", "BAD_ARGUMENT")]
    {
        assert_eq!(client.err(Sandbox::create_request(&[("disk", disk)])).code, code, "{disk}");
    }
    node.sandbox(&[("disk", "m:file:models.img:ro")]).remove().expect("a sandbox that reads is removed");
    sandbox.remove().expect("a sandbox with disks is removed");
    before.assert_restored(node);
    assert_eq!(node.sh("sha256sum /data/disks/models.img"), before_hash, "a read-only file has changed");
    node.sandbox(&[("disk", "m:file:models.img")]).remove().expect("a free file is given again");
    // All eight.
    let eight: Vec<String> = (0..8).map(|n| format!("d{n}:new:1")).collect();
    let eight: Vec<(&str, &str)> = eight.iter().map(|disk| ("disk", disk.as_str())).collect();
    let sandbox = node.sandbox(&eight);
    assert_eq!(sandbox.sh("cat /sys/block/vdi/serial"), "d7");
    sandbox.sh("echo last > /dev/vdi; sync; head -c 5 /dev/vdi | grep -q last");
}

fn random_work_on_a_file_a_device_and_the_root_disk_is_what_it_should_be(node: &Node) {
    node.sh("truncate -s 48M /data/disks/work.img; dd if=/dev/zero of=/dev/ram0 bs=1M 2>&1 || true");
    let sandbox = node.sandbox(&[("disk", "work:file:work.img"), ("disk", "ram:device:ram"), ("disk_iops", "100000")]);
    put_tool(&sandbox);
    for (n, device) in ["vdb", "vdc"].into_iter().enumerate() {
        let said = sandbox.sh(&format!("/tmp/guest-tool disk device=/dev/{device} seed={} steps=600", n + 1));
        assert!(said.contains("flushed=600"), "{said}");
    }
    // A hole was punched in the middle of the root disk's file system: it goes on.
    sandbox.sh("head -c 20000000 /dev/urandom > /workspace/x; sync; rm /workspace/x; sync; fstrim / && echo ok > /workspace/y; sync");
}

fn a_disk_that_does_not_answer_stalls_itself_only(node: &Node) {
    node.sh("mke2fs /dev/ram1 > /tmp/out 2>&1; mkdir -p /mnt/cold; mount -t ext4 /dev/ram1 /mnt/cold; \
         truncate -s 16M /mnt/cold/stuck.img; \
         mount --bind /mnt/cold /data/disks");
    let sandbox = node.sandbox(&[("disk", "stuck:file:stuck.img"), ("disk", "fine:new:16")]);
    sandbox.sh("dd if=/dev/zero of=/dev/vdb bs=4k count=1 oflag=direct 2>/dev/null");
    node.sh("fsfreeze --freeze /mnt/cold");
    let request =
        sandbox.exec_request(&["sh", "-c", "dd if=/dev/zero of=/dev/vdb bs=4k count=64 oflag=direct"]).set("user", 0);
    let mut stuck = sandbox.start(request);
    assert!(matches!(stuck.message(), Message::Item { .. }));
    // The other disks, the virtual socket and the supervisor go on.
    for _ in 0..3 {
        sandbox.sh("dd if=/dev/urandom of=/dev/vdc bs=64k count=16 oflag=direct 2>/dev/null; echo x > /workspace/x; sync -d /workspace/x || sync /workspace/x");
    }
    assert_eq!(node.sandbox(&[]).sh("echo fine"), "fine\n");
    node.sh("fsfreeze --unfreeze /mnt/cold");
    loop {
        match stuck.message() {
            Message::Ok { fields, .. } => break assert_eq!(fields.get("exit"), Some("0")),
            Message::Err { error, .. } => panic!("{error}"),
            _ => {}
        }
    }
    // An end while it does not answer: the worker says so and does not wait for ever.
    node.sh("fsfreeze --freeze /mnt/cold");
    let request =
        sandbox.exec_request(&["sh", "-c", "dd if=/dev/zero of=/dev/vdb bs=4k count=1 oflag=direct"]).set("user", 0);
    let mut stuck = sandbox.start(request);
    assert!(matches!(stuck.message(), Message::Item { .. }));
    sandbox.sh("sleep 1");
    let stop = sandbox.start(sandbox.request("sandbox.stop").set("timeout_ms", 0));
    let words = format!("/data/sandboxes/{}/last-words", sandbox.id);
    let end = Instant::now() + timing::hang();
    while !node.run(&["cat", &words]).stdout.contains("disk stuck does not answer") {
        assert!(Instant::now() < end, "the worker left no word: {:?}", node.run(&["cat", &words]));
        std::thread::sleep(Duration::from_millis(200));
    }
    node.sh("fsfreeze --unfreeze /mnt/cold");
    stop.finish_ok();
    assert_eq!(sandbox.state(), "stopped");
    sandbox.remove().expect("a stopped sandbox is removed");
    node.sh("umount /data/disks; umount /mnt/cold");
}

#[test]
fn further_disks_work_and_one_that_hangs_is_alone() {
    let node = boot().start();
    extra_disks_have_their_names_sizes_and_users(&node);
    random_work_on_a_file_a_device_and_the_root_disk_is_what_it_should_be(&node);
    a_disk_that_does_not_answer_stalls_itself_only(&node);
    node.rig(&["disks", "/dev/ram0"]);
    node.power_off();
}

#[test]
fn what_was_flushed_is_there_after_a_power_cut() {
    let node = boot().start();
    node.sh("truncate -s 32M /data/disks/cut.img; sync");
    let sandbox = node.sandbox(&[("disk", "cut:file:cut.img")]);
    put_tool(&sandbox);
    const STEPS: u64 = 1_000_000;
    let tool = format!("exec /tmp/guest-tool disk device=/dev/vdb seed=7 steps={STEPS}");
    let mut work = sandbox.start(sandbox.exec_request(&["sh", "-c", &tool]).set("user", 0));
    // Until a few flushes were told of; then at once.
    let mut said = String::new();
    while said.lines().count() < 6 {
        match work.message() {
            Message::Data { payload, .. } => said.push_str(&String::from_utf8_lossy(&payload)),
            Message::Item { .. } => {}
            other => panic!("the tool ended: {other:?} after {said}"),
        }
    }
    sandbox.keep();
    let data = node.power_cut().pop().expect("the data disk comes back");
    drop(work);
    let whole_lines = &said[..said.rfind('\n').expect("there were lines") + 1];
    let flushed =
        whole_lines.lines().last().and_then(|line| line.strip_prefix("flushed=")).expect("a line of the tool");

    let node = boot().data_disk(data).start();
    let sandbox = node.sandbox(&[("disk", "cut:file:cut.img")]);
    put_tool(&sandbox);
    // More steps than can have been done: each may have reached the disk.
    let most = flushed.parse::<u64>().expect("a number") + 2000;
    let check = format!("/tmp/guest-tool disk-check device=/dev/vdb seed=7 flushed={flushed} steps={most}");
    let told = sandbox.sh(&check);
    assert!(told.starts_with("blocks=8192 "), "{told}");
    drop(sandbox);
    let _ = node.control().ok(Request::new("", "node.info"));
    node.power_off();
}
