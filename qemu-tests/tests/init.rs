//! PID 1: the data partition, a supervisor that does not come up, one that does not go away.

use std::fs::File;

use qemu_tests::{Boot, Node, timing};

/// Waits until the console has said something; gives all that it said.
fn said(node: &Node, text: &str) -> String {
    timing::wait_for(text, || Some(node.console_text()).filter(|console| console.contains(text)))
}

/// To what init says it has grown the data partition.
fn grown(node: &Node) -> String {
    let log = node.sh("dmesg");
    let to = log.lines().find_map(|line| line.split_once("data partition grown to ")?.1.split_once(" in "));
    to.map(|(size, _)| size.to_string()).unwrap_or_default()
}

fn data_mib(node: &Node) -> u64 {
    let text = node.sh("df -m /data | tail -1 | awk '{ print $2 }'");
    text.trim().parse().unwrap_or_else(|_| panic!("df says {text:?}"))
}

#[test]
fn the_data_file_system_grows_to_its_disk_whenever_that_is_larger() {
    let node = Boot::kernel().start();
    assert_eq!(grown(&node), "8192 MiB");
    assert!(data_mib(&node) > 7500);
    node.sh("echo kept > /data/mark");
    let mut disks = node.power_off();

    // The same disk: there is nothing to grow.
    let disk = disks.pop().expect("the data disk");
    let node = Boot::kernel().data_disk(disk).start();
    assert_eq!(grown(&node), "");
    assert_eq!(node.sh("cat /data/mark"), "kept\n");
    let mut disks = node.power_off();

    // A larger one, as after the move to another machine.
    let disk = disks.pop().expect("the data disk");
    let file = File::options().write(true).open(disk.path()).expect("the disk is a file");
    file.set_len(10 << 30).expect("a sparse file takes no room");
    let node = Boot::kernel().data_disk(disk).start();
    assert_eq!(grown(&node), "10240 MiB");
    assert!(data_mib(&node) > 9500);
    assert_eq!(node.sh("cat /data/mark"), "kept\n");
    node.power_off();
}

#[test]
fn a_node_without_a_data_disk_keeps_its_data_in_memory_and_says_so() {
    let node = Boot::diskless().start();
    said(&node, "no data partition (ext4 labelled warren-data): data is kept in memory");
    assert_eq!(node.sh("grep ' /data ' /proc/mounts | cut -d' ' -f1"), "tmpfs\n");
    let sandbox = node.sandbox(&[]);
    assert_eq!(sandbox.sh("echo x > /workspace/x; sync; cat /workspace/x"), "x\n");
    sandbox.remove().expect("a running sandbox is removed by force");
    node.power_off();
}

#[test]
fn a_supervisor_that_ends_at_once_is_restarted_more_and_more_slowly_until_it_stays() {
    let broken = b"[node]\ncolour = \"red\"\n".to_vec();
    let node = Boot::kernel().file("/etc/warren/warren.toml", 0o644, broken).power_on();
    let console = said(&node, "restarts in 800 ms");
    let mut from = 0;
    for delay in ["20", "100", "200", "400", "800"] {
        let line = format!("restarts in {delay} ms");
        let at = console[from..].find(&line).unwrap_or_else(|| panic!("no {line:?} in its turn:\n{console}"));
        from += at + line.len();
    }
    assert!(console.contains("/etc/warren/warren.toml:2"), "the reason is on the console:\n{console}");
    // What the kernel makes of memory that guests gave back is set whether or not a supervisor runs.
    assert_eq!(node.sh("cat /sys/kernel/mm/transparent_hugepage/khugepaged/max_ptes_none"), "0\n");
    // Nobody has to restart anything once the cause is gone.
    node.write_file("/etc/warren/warren.toml", 0o644, b"[node]\nname = \"mended\"\n");
    node.wait_until_ready();
    assert_eq!(node.info().get("name"), Some("mended"));
    node.power_off();
}

#[test]
fn a_supervisor_that_hangs_does_not_keep_the_node_from_stopping_in_order() {
    let node = Boot::kernel().start();
    node.sandbox(&[]).keep();
    node.sh("echo kept > /data/mark");
    let supervisor = node.supervisor();
    node.sh(&format!("kill -STOP {supervisor}; kill -TERM 1"));
    node.wait_for_end("SIGTERM to init");
    let mut disks = node.into_disks();

    // What was written is there, and the file system was clean: unlike after a power cut.
    let recovered = |node: &Node| node.sh("dmesg | grep -c 'EXT4-fs.*recovery complete' || true");
    let node = Boot::kernel().data_disk(disks.pop().expect("the data disk")).start();
    assert_eq!(node.sh("cat /data/mark"), "kept\n");
    assert_eq!(recovered(&node), "0\n");
    node.sh("echo more > /data/more; sync");
    let mut disks = node.power_cut();
    let node = Boot::kernel().data_disk(disks.pop().expect("the data disk")).start();
    assert_eq!(recovered(&node), "1\n");
    node.power_off();
}
