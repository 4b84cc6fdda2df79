//! A snapshot as one file: to another node and on from there; files that are none.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use qemu_tests::artefacts::Artefact;
use qemu_tests::files::TempDir;
use qemu_tests::node::Boot;
use qemu_tests::state::NodeState;
use qemu_tests::witness::files;
use qemu_tests::{Code, Error, Node, Request, Sandbox, timing};
use sha2::{Digest, Sha256};

/// A program of the sandbox that counts in memory for as long as it lives.
const COUNT: &str = "n=0; while :; do n=$((n+1)); echo $n > /dev/shm/count; sleep 0.05; done";

fn warren(node: &Node, arguments: &[&str]) -> Output {
    let mut command = Command::new(Artefact::Warren.path());
    command.arg("--socket").arg(node.socket()).args(arguments).stdin(std::process::Stdio::null());
    command.output().expect("warren starts")
}

/// What a command that has to succeed printed.
fn printed(node: &Node, arguments: &[&str]) -> String {
    let output = warren(node, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim_end().to_string()
}

fn counter(sandbox: &Sandbox) -> u64 {
    sandbox.sh("cat /dev/shm/count 2>/dev/null || echo 0").trim().parse().unwrap_or(0)
}

/// Sends a file as a snapshot.
fn import(node: &Node, octets: &[u8]) -> Result<String, Error> {
    let call = node.control().start(Request::new("", "snapshot.import"));
    let writer = call.writer();
    if writer.write("content", octets) {
        writer.end("content");
    }
    call.finish().map(|reply| reply.field("id").to_string())
}

const HEAD: usize = 16;
const NO_MORE: u64 = u64::MAX;

fn word(octets: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(octets[at..at + 8].try_into().expect("eight octets"))
}

/// Where each part of an exported snapshot ends; its last 32 octets are its digest.
fn parts(octets: &[u8]) -> Vec<usize> {
    let (mut at, mut ends) = (HEAD, Vec::new());
    while at < octets.len() {
        at += 16;
        while word(octets, at) != NO_MORE {
            at += 16 + usize::try_from(word(octets, at + 8)).expect("a length of ours");
        }
        at += 16 + 32;
        ends.push(at);
    }
    ends
}

/// A manifest as the part of a file that it is.
fn manifest(text: &str) -> Vec<u8> {
    let mut part = Vec::from(1u32.to_le_bytes());
    part.extend(0u32.to_le_bytes());
    for word in [text.len() as u64, 0, text.len() as u64] {
        part.extend(word.to_le_bytes());
    }
    part.extend(text.as_bytes());
    part.extend(NO_MORE.to_le_bytes());
    part.extend(0u64.to_le_bytes());
    let digest = Sha256::digest(&part);
    part.extend(digest);
    part
}

/// The same snapshot with another manifest and the digests that belong to it: what somebody makes who means harm.
fn forged(octets: &[u8], change: impl Fn(&mut serde_json::Value)) -> Vec<u8> {
    let ends = parts(octets);
    let mut said: serde_json::Value = serde_json::from_slice(&octets[HEAD + 32..ends[0] - 48]).expect("a manifest");
    change(&mut said);
    let mut forged = [&octets[..HEAD], &manifest(&said.to_string())].concat();
    forged.extend(&octets[ends[0]..octets.len() - 32]);
    let mut digests = Sha256::new();
    parts(&[&forged[..], &[0; 32]].concat())
        .iter()
        .rev()
        .skip(1)
        .rev()
        .for_each(|end| digests.update(&forged[end - 32..*end]));
    forged.extend(digests.finalize());
    forged
}

#[test]
fn a_snapshot_goes_on_on_another_node() {
    let dir = TempDir::new().expect("a temporary directory can be made");
    let file = dir.path().join("snapshot");
    let path = file.display().to_string();
    let then = {
        let node = Boot::kernel().start();
        let sandbox = node.sandbox(&[("memory_mib", "128"), ("env", "GREETING=hello")]);
        sandbox.sh("echo disk > /workspace/file; echo memory > /dev/shm/file; head -c 3000000 /dev/urandom > /workspace/large; sync");
        sandbox.client().ok(sandbox.exec_request(&["sh", "-c", COUNT]).set("detach", true));
        timing::wait_for("the counter's start", || (counter(&sandbox) > 2).then_some(()));
        // More than one layer goes along.
        node.control().ok(sandbox.request("snapshot.create"));
        sandbox.sh("echo more >> /workspace/file; sha256sum /workspace/large > /workspace/sum; sync");
        let then = counter(&sandbox);
        let id = node.control().ok(sandbox.request("snapshot.create").set("name", "first")).field("id").to_string();
        assert_eq!(printed(&node, &["snapshot", "export", "first", &path]), "");
        let refused = warren(&node, &["snapshot", "export", &id, &path]);
        assert!(!refused.status.success(), "a file that is there is not overwritten");
        let reply = node.control().ok(Request::new("", "snapshot.export").arg(&id));
        assert!(reply.octets("content") == fs::read(&file).expect("it was written"), "both ways are the same");
        assert_eq!(reply.fields.number("size"), fs::metadata(&file).ok().map(|meta| meta.len()));
        node.power_off();
        then
    };

    let node = Boot::kernel().start();
    // From then on the template is known to be whole: nothing reads it any more.
    node.sandbox(&[]).remove().expect("it can be removed");
    let (before, state) = (files(&node), NodeState::of(&node));
    let id = printed(&node, &["snapshot", "import", &path, "--name", "came"]);
    let row = node.control().ok(Request::new("", "snapshot.inspect").arg("came")).fields;
    let seen = ["id", "kind", "template", "memory_mib", "layers"].map(|key| row.get(key).unwrap_or_default());
    assert_eq!(seen, [id.as_str(), "snapshot", "base", "128", "2"], "{row:?}");
    let taken = warren(&node, &["snapshot", "import", &path, "--name", "came"]);
    assert!(String::from_utf8_lossy(&taken.stderr).contains("is taken by snapshot"), "{taken:?}");
    let forks = printed(&node, &["fork", "came", "-n", "2"]);
    let forks: Vec<Sandbox> = forks.lines().map(|id| Sandbox::of(node.control(), id)).collect();
    assert_eq!(forks.len(), 2);
    for fork in &forks {
        assert_eq!(fork.sh("cat /workspace/file /dev/shm/file; echo $GREETING"), "disk\nmore\nmemory\nhello\n");
        assert_eq!(fork.sh("sha256sum -c /workspace/sum"), "/workspace/large: OK\n");
        let count = counter(fork);
        assert!(count >= then, "{count} after {then}");
        timing::wait_for("its program goes on", || (counter(fork) > count).then_some(()));
    }
    // A snapshot of what came goes as any other.
    let again = node.control().ok(forks[0].request("snapshot.create")).field("id").to_string();
    for fork in forks {
        fork.remove().expect("it can be removed");
    }

    hostile(&node, &file);

    for id in [&id, &again] {
        node.control().ok(Request::new("", "snapshot.remove").arg(id));
    }
    timing::wait_for("nothing to be left", || (files(&node) == before).then_some(()));
    state.assert_restored(&node);
    node.assert_ledger_agrees();
    node.power_off();
}

/// Files that are no snapshots of this node: each is refused for what it is, and nothing of it is left.
fn hostile(node: &Node, file: &Path) {
    let before = files(node);
    let whole = fs::read(file).expect("it was written");
    let ends = parts(&whole);
    let refused = |octets: &[u8], code: Code, part: &str| {
        let error = import(node, octets).expect_err(part);
        assert!(error.is(code) && error.message.contains(part), "{error}, not {part}");
        error
    };
    // Cut anywhere.
    refused(&[], Code::Corrupt, "no exported snapshot");
    refused(&whole[..10], Code::Corrupt, "no exported snapshot");
    for (end, part) in
        [(ends[0] - 1, "manifest"), (ends[1] - 40, "state"), (ends[1] + 5000, "memory"), (whole.len() - 1, "end")]
    {
        refused(&whole[..end], Code::Corrupt, &format!("ends in its part: {part}"));
    }
    refused(&[&whole[..], &[0]].concat(), Code::Corrupt, "more behind its end");
    // A bit that is another.
    for (at, part) in
        [(3, "no exported snapshot"), (HEAD + 40, "manifest"), (ends[0] + 100, "state"), (whole.len() - 9, "end")]
    {
        let mut damaged = whole.clone();
        damaged[at] ^= 4;
        refused(&damaged, Code::Corrupt, part);
    }
    let mut damaged = whole.clone();
    damaged[ends[2] - 100] ^= 1;
    refused(&damaged, Code::Corrupt, "damaged in its part: memory");
    // Of another version.
    let mut newer = whole.clone();
    newer[8] = 2;
    let error = refused(&newer, Code::VersionMismatch, "has version 2");
    assert_eq!(error.fields.get("max"), Some("1"));
    // Right digests over what cannot be.
    for (key, value, max) in
        [("memory_bytes", 1u64 << 50, 32u64 << 30), ("disk_bytes", 1 << 60, 1 << 40), ("layers", 65, 64)]
    {
        let error = refused(&forged(&whole, |said| said[key] = value.into()), Code::OutOfRange, key);
        assert_eq!(error.fields.number("max"), Some(max), "{error}");
    }
    let other = "0".repeat(64);
    for (key, value, code, part) in [
        ("memory_bytes", serde_json::json!(64 << 20), Code::Corrupt, "length"),
        ("vcpus", 2.into(), Code::Corrupt, "its state"),
        ("template", "absent".into(), Code::Corrupt, "its manifest"),
        ("template_sha256", other.as_str().into(), Code::Corrupt, "its disk is over image"),
        ("settings", "settings sandbox.create template=absent".into(), Code::Corrupt, "its manifest"),
        ("settings", "nothing".into(), Code::Corrupt, "settings"),
    ] {
        refused(&forged(&whole, |said| said[key] = value.clone()), code, part);
    }
    // A device of the node is nothing that a file gives away.
    let with_disk = forged(&whole, |said| {
        said["settings"] = format!("{} disk=x:device:scratch", said["settings"].as_str().expect("a line")).into();
    });
    refused(&with_disk, Code::Corrupt, "disk x");
    let absent = forged(&whole, |said| {
        said["template"] = "absent".into();
        said["settings"] =
            said["settings"].as_str().expect("a line").replace("template=base", "template=absent").into();
    });
    refused(&absent, Code::NotFound, "template absent");
    // A client that goes over it.
    let call = node.control().start(Request::new("", "snapshot.import"));
    assert!(call.writer().write("content", &whole[..ends[1] + 100_000]));
    call.cancel();
    drop(call);
    timing::wait_for("nothing to be left of what was sent", || (files(node) == before).then_some(()));
}
