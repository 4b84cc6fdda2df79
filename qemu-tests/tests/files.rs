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
