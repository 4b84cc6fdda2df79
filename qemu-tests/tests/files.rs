//! Files of a sandbox, through the control socket.

use qemu_tests::{Code, Request, Sandbox, shared};

fn write(sandbox: &Sandbox, request: Request, content: &[u8]) {
    let call = sandbox.start(request);
    let writer = call.writer();
    assert!(writer.write("content", content));
    writer.end("content");
    assert_eq!(call.finish_ok().fields.number("size"), Some(content.len() as u64));
}

#[test]
fn a_file_is_written_whole_and_read_back() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    let content: Vec<u8> = (0..3_000_000u32).map(|n| (n * 7 % 251) as u8).collect();
    write(&sandbox, sandbox.request("file.write").set("path", "numbers").set("mode", "0640"), &content);
    let read = sandbox.client().ok(sandbox.request("file.read").set("path", "/workspace/numbers"));
    assert!(read.octets("content") == content.as_slice());
    let part = sandbox.request("file.read").set("path", "numbers").set("offset", 1_000_000).set("length", 10);
    assert_eq!(sandbox.client().ok(part).octets("content"), &content[1_000_000..1_000_010]);
    let stat = sandbox.client().ok(sandbox.request("file.stat").set("path", "numbers"));
    let fields = stat.items.first().unwrap_or(&stat.fields);
    assert_eq!(fields.get("mode"), Some("0640"));
    assert_eq!(fields.number("size"), Some(3_000_000));
    assert_eq!(fields.get("uid"), Some("1000"));
}

#[test]
fn a_write_that_breaks_off_leaves_the_old_file() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    write(&sandbox, sandbox.request("file.write").set("path", "note"), b"old");
    let call = sandbox.start(sandbox.request("file.write").set("path", "note"));
    assert!(call.writer().write("content", b"new, but never finished"));
    call.cancel();
    assert!(call.finish().is_err());
    assert_eq!(sandbox.sh("cat /workspace/note; ls -a /workspace | wc -l"), "old3\n");
}

#[test]
fn directories_are_made_listed_moved_and_removed() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    let client = sandbox.client();
    client.ok(sandbox.request("file.mkdir").set("path", "a/b").set("parents", true));
    write(&sandbox, sandbox.request("file.write").set("path", "a/b/one two"), b"x");
    write(&sandbox, sandbox.request("file.write").set("path", "a/b/one two").set("append", true), b"y");
    sandbox.sh("ln -s b /workspace/a/link");
    let mut rows: Vec<(String, String)> = client
        .ok(sandbox.request("file.list").set("path", "a"))
        .items
        .iter()
        .map(|row| (row.get("name").unwrap_or_default().into(), row.get("kind").unwrap_or_default().into()))
        .collect();
    rows.sort();
    assert_eq!(rows, [("b".into(), "dir".into()), ("link".into(), "link".into())]);
    client.ok(sandbox.request("file.move").set("from", "a/b").set("to", "a/c"));
    assert_eq!(sandbox.sh("cat '/workspace/a/c/one two'"), "xy");
    let full = client.err(sandbox.request("file.remove").set("path", "a"));
    assert!(full.is(Code::FileFailed), "{full}");
    client.ok(sandbox.request("file.remove").set("path", "a").set("recursive", true));
    assert_eq!(sandbox.sh("ls /workspace"), "");
}

#[test]
fn a_missing_file_is_not_found() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    for verb in ["file.read", "file.stat", "file.list", "file.remove"] {
        let error = sandbox.client().err(sandbox.request(verb).set("path", "/no/such/file"));
        assert!(error.is(Code::NotFound), "{verb}: {error}");
    }
}

#[test]
fn what_is_no_file_to_read_is_a_typed_error_and_a_file_that_grows_has_an_end() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    let client = sandbox.client();
    sandbox.sh("mkfifo pipe; mkdir dir; ln -s loop loop; echo 12345 > short");
    let kcore = sandbox.exec(&["test", "-e", "/proc/kcore"]).field("exit") == "0";
    let cases =
        [("dir", "EISDIR"), ("pipe", "EINVAL"), ("/dev/zero", "EINVAL"), ("loop", "ELOOP"), ("short/x", "ENOTDIR")];
    let kcore = kcore.then_some(("/proc/kcore", "EFBIG"));
    for (path, errno) in cases.into_iter().chain(kcore) {
        let error = client.err(sandbox.request("file.read").set("path", path));
        assert!(error.is(Code::FileFailed) && error.fields.get("errno") == Some(errno), "{path}: {error}");
    }
    for (path, errno) in [("dir", "EISDIR"), ("pipe", "EINVAL"), ("/dev/null", "EINVAL"), ("short/x", "ENOTDIR")] {
        let call = sandbox.start(sandbox.request("file.write").set("path", path));
        call.writer().end("content");
        let error = call.finish().expect_err("nothing is written there");
        assert!(error.is(Code::FileFailed) && error.fields.get("errno") == Some(errno), "{path}: {error}");
    }
    // Of the kernel's own files nobody knows the length.
    let status = client.ok(sandbox.request("file.read").set("path", "/proc/self/status")).text("content");
    assert!(status.contains("\nPid:\t1\n"), "{status}");

    let writer = sandbox.exec_request(&["sh", "-c", "while true; do echo grows; done > growing"]).set("detach", true);
    client.ok(writer);
    qemu_tests::timing::wait_for("a file that grows", || {
        let stat = client.call(sandbox.request("file.stat").set("path", "growing")).ok()?;
        stat.fields.number("size").filter(|size| *size > 100_000)
    });
    let read = client.ok(sandbox.request("file.read").set("path", "growing"));
    assert_eq!(read.fields.number("size"), Some(read.octets("content").len() as u64));
}

#[test]
fn a_write_that_finds_the_disk_full_is_a_typed_error_and_leaves_the_old_file() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    write(&sandbox, sandbox.request("file.write").set("path", "kept").set("mode", "0600"), b"old");
    // Most of it without a write of each block.
    let fill = "free=$(df -k / | tail -1 | awk '{ print $4 }'); fallocate -l $((free * 1000)) /filler; \
                dd if=/dev/zero of=/workspace/filler bs=1M 2>/dev/null; sync";
    sandbox.client().ok(sandbox.exec_request(&["sh", "-c", fill]).set("user", 0));
    let call = sandbox.start(sandbox.request("file.write").set("path", "kept"));
    let writer = call.writer();
    if writer.write("content", &vec![7; 1 << 20]) {
        writer.end("content");
    }
    let error = call.finish().expect_err("there is no room");
    assert!(error.fields.get("errno") == Some("ENOSPC"), "{error}");
    assert_eq!(sandbox.sh("cat kept; stat -c %a kept; ls -a | grep -c part || true"), "old600\n0\n");
    sandbox.client().ok(sandbox.request("file.remove").set("path", "filler"));
    write(&sandbox, sandbox.request("file.write").set("path", "kept"), &[7; 1000]);
}

#[test]
fn changes_are_watched_below_a_path_and_a_slow_watcher_holds_up_nobody() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    sandbox.sh("mkdir -p tree/deep");
    let watch = |path: &str| {
        let request = sandbox.request("file.watch").set("path", path).set("recursive", true);
        let mut call = sandbox.start(request);
        assert_eq!(call.item().get("event"), Some("watching"));
        call
    };
    let mut call = watch("tree");
    write(&sandbox, sandbox.request("file.write").set("path", "tree/whole"), b"x");
    sandbox.sh("cd tree; echo x > deep/a; mv deep/a b; mkdir new; touch new/c; rm -r deep");
    let mut seen = Vec::new();
    while seen.last().is_none_or(|row: &String| row != "remove deep") {
        let row = call.item();
        let short = |key: &str| row.get(key).map(|path| path.trim_start_matches("/workspace/tree/").to_string());
        seen.extend(
            [row.get("event").map(str::to_string), short("path"), short("to")]
                .into_iter()
                .flatten()
                .reduce(|line, word| format!("{line} {word}")),
        );
    }
    for expected in ["write whole", "create deep/a", "write deep/a", "move deep/a b", "create new", "create new/c"] {
        assert!(seen.iter().any(|row| row == expected), "{expected}: {seen:?}");
    }
    assert!(!seen.iter().any(|row| row.contains(".part")), "{seen:?}");
    call.cancel();
    assert!(call.finish().expect_err("cancelled").is(Code::Cancelled));
    let error = sandbox.client().err(sandbox.request("file.watch").set("path", "nowhere"));
    assert!(error.is(Code::NotFound), "{error}");

    // A client that takes nothing is told that it missed something, and the sandbox answers others meanwhile.
    let slow = node.connect();
    let mut lazy = slow.start(sandbox.request("file.watch").set("path", "tree"));
    assert_eq!(lazy.item().get("event"), Some("watching"));
    sandbox.sh("cd tree; i=0; while [ $i -lt 3000 ]; do : > f$i; rm f$i; i=$((i + 1)); done");
    assert_eq!(sandbox.sh("echo answers"), "answers\n");
    sandbox.sh("rm -r tree");
    let ended = lazy.finish();
    assert!(ended.is_ok_and(|reply| reply.items.len() > 100), "the watch ends with its directory");
}
