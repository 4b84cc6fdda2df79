//! What guests write: kept apart, kept at all, never in the base.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::process::Command;

use qemu_tests::files::TempDir;
use qemu_tests::node::root_exec;
use qemu_tests::{Message, Node, shared};
use sha2::{Digest, Sha256};

/// Writes a sandbox's disk, as the node holds it, to a file on this machine.
fn copy_disk(node: &Node, id: &str, template: &str, to: &File) {
    let overlay = format!("/data/sandboxes/{id}/overlay");
    let base = format!("/usr/share/warren/templates/{template}/rootfs.img");
    let mut call = node.root().start(root_exec(&["node-tool", "disk", &overlay, &base]));
    // Records of offset (8 octets), length (4 octets), content: holes are left out.
    let mut pending: Vec<u8> = Vec::new();
    let mut complaint = Vec::new();
    loop {
        match call.message() {
            Message::Data { channel, payload, .. } if channel == "stderr" => complaint.extend(payload),
            Message::Data { payload, .. } => pending.extend(payload),
            Message::Ok { fields, .. } => {
                assert_eq!(fields.get("exit"), Some("0"), "{}", String::from_utf8_lossy(&complaint));
                break;
            }
            Message::Err { error, .. } => panic!("node-tool does not start: {error}"),
            _ => {}
        }
        let mut at = 0;
        while let Some(header) = pending.get(at..at + 12) {
            let offset = u64::from_le_bytes(header[..8].try_into().unwrap());
            let length = u32::from_le_bytes(header[8..].try_into().unwrap()) as usize;
            let Some(content) = pending.get(at + 12..at + 12 + length) else { break };
            to.write_all_at(content, offset).expect("the disk's copy can be written");
            at += 12 + length;
        }
        pending.drain(..at);
    }
    assert!(pending.is_empty(), "the disk ends in the middle of a record");
}

/// The hash of a file inside of an ext4 image.
fn hash_in_image(image: &std::path::Path, file: &str, scratch: &TempDir) -> String {
    let out = scratch.path().join("content");
    let dump = format!("dump {file} {}", out.display());
    let status = Command::new("/sbin/debugfs").args(["-R", &dump]).arg(image).output().expect("e2fsprogs is installed");
    let mut content = File::open(&out).unwrap_or_else(|e| panic!("{file} is not in the image ({e}): {status:?}"));
    let mut hash = Sha256::new();
    let mut chunk = vec![0; 1 << 20];
    loop {
        match content.read(&mut chunk).expect("a file of ours can be read") {
            0 => break,
            n => hash.update(&chunk[..n]),
        }
    }
    hash.finalize().iter().map(|octet| format!("{octet:02x}")).collect()
}

#[test]
fn two_sandboxes_do_not_see_each_others_disk() {
    let node = shared::node();
    let (one, two) = (node.sandbox(&[]), node.sandbox(&[]));
    one.sh("echo one > /workspace/mine; echo 1 >> /etc/passwd; sync");
    two.sh("echo two > /workspace/mine; sync");
    assert_eq!(one.sh("cat /workspace/mine"), "one\n");
    assert_eq!(two.sh("cat /workspace/mine"), "two\n");
    assert_eq!(two.sh("tail -c 2 /etc/passwd | grep -c ^1 || true"), "0\n");
    let three = node.sandbox(&[]);
    assert_eq!(three.sh("ls /workspace"), "", "a new sandbox starts from the base");
}

#[test]
fn what_a_guest_synced_is_read_back_in_the_guest_and_from_its_overlay() {
    let node = shared::node();
    let base = "sha256sum /usr/share/warren/templates/base/rootfs.img";
    let base_before = node.sh(base);
    let sandbox = node.sandbox(&[("disk_mib", "1024"), ("memory_mib", "192")]);
    // 256 MiB in which no two blocks are equal: noise, shifted by a counter in front of each copy.
    sandbox.sh("cd /workspace; head -c 8388480 /dev/urandom > /tmp/noise; \
         n=0; while [ $n -lt 32 ]; do printf '%0128d' $n; cat /tmp/noise; n=$((n + 1)); done > big; \
         sync; echo 3 > /proc/sys/vm/drop_caches");
    assert_eq!(sandbox.sh("stat -c %s /workspace/big"), format!("{}\n", 256 << 20));
    let in_guest = sandbox.sh("sha256sum /workspace/big");
    let in_guest = in_guest.split(' ').next().unwrap_or_default();
    sandbox.stop();
    assert_eq!(sandbox.state(), "stopped");
    assert_eq!(node.run(&["ls", &format!("/sys/fs/cgroup/sandboxes/{}", sandbox.id)]).exit, 1, "the worker is gone");

    let scratch = TempDir::new().unwrap();
    let image = scratch.path().join("disk");
    let file = File::options().create_new(true).read(true).write(true).open(&image).unwrap();
    file.set_len(1024 << 20).unwrap();
    copy_disk(&node, &sandbox.id, "base", &file);
    assert_eq!(hash_in_image(&image, "/workspace/big", &scratch), in_guest);
    let check = Command::new("/sbin/e2fsck").args(["-fn"]).arg(&image).output().expect("e2fsprogs is installed");
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
    assert_eq!(node.sh(base), base_before, "the base has not changed");
}

#[test]
fn a_sandbox_sees_the_disk_size_it_asked_for() {
    let node = shared::node();
    let sandbox = node.sandbox(&[("disk_mib", "2048")]);
    let kib: u64 = sandbox.sh("df -k / | tail -1 | awk '{ print $2 }'").trim().parse().expect("a number");
    assert!(kib > 1_900_000, "the root file system has {kib} KiB");
    assert_eq!(sandbox.sh("cat /sys/block/vda/size"), format!("{}\n", 2048 * 2048));
}

#[test]
fn a_removed_sandbox_leaves_nothing() {
    let node = shared::node();
    // The first sandbox may leave caches and directories that stay.
    drop(node.sandbox(&[]));
    let before = qemu_tests::state::NodeState::of(&node);
    let sandbox = node.sandbox(&[]);
    sandbox.sh("echo x > /workspace/x");
    sandbox.remove().expect("a running sandbox is removed by force");
    before.assert_restored(&node);
}
