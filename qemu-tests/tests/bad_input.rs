//! Every kind of bad input: a typed error, and the node as it was before.

use qemu_tests::state::NodeState;
use qemu_tests::{Code, Message, Node, Request, Sandbox, shared, timing};

/// `sandbox.create` with these keys fails with that code and leaves nothing.
fn create_fails(keys: &[(&str, &str)], code: Code) {
    let node = shared::node();
    let before = NodeState::of(&node);
    let error = node.control().err(Sandbox::create_request(keys));
    assert!(error.is(code), "{keys:?}: {error}");
    before.assert_restored(&node);
}

#[test]
fn an_unknown_template_is_not_found() {
    create_fails(&[("template", "no-such-template")], Code::NotFound);
}

#[test]
fn a_template_name_that_is_a_path_is_refused() {
    let node = shared::node();
    for name in ["../base", "/etc", "base/../base", ""] {
        let error = node.control().err(Sandbox::create_request(&[("template", name)]));
        assert!(error.is(Code::NotFound) || error.is(Code::BadArgument), "{name:?}: {error}");
    }
}

#[test]
fn no_vcpu_at_all_is_out_of_range() {
    create_fails(&[("vcpus", "0")], Code::OutOfRange);
}

#[test]
fn seventeen_vcpus_are_out_of_range() {
    create_fails(&[("vcpus", "17")], Code::OutOfRange);
}

#[test]
fn one_mebibyte_of_memory_is_out_of_range() {
    create_fails(&[("memory_mib", "1")], Code::OutOfRange);
}

#[test]
fn one_pebibyte_of_memory_is_out_of_range() {
    create_fails(&[("memory_mib", "1073741824")], Code::OutOfRange);
}

/// Runs `sandbox.create` while a file of the node is spoilt by a line of shell, and mends it afterwards.
fn create_with_spoilt(file: &str, spoil: &str, code: &[Code]) {
    let node = shared::node();
    // The node hashes its base image when it starts; with a sandbox it is through.
    drop(node.sandbox(&[]));
    let before = NodeState::of(&node);
    node.sh(&format!("cp -p {file} /tmp/good && {spoil}"));
    let result = node.control().call(Sandbox::create_request(&[]));
    node.sh(&format!("cp -p /tmp/good {file} && rm /tmp/good"));
    match result {
        Ok(reply) => {
            drop(Sandbox::of(node.control(), reply.field("id")));
            panic!("a sandbox was created though `{spoil}`");
        }
        Err(e) => assert!(code.iter().any(|code| e.is(*code)), "`{spoil}`: {e}"),
    }
    before.assert_restored(&node);
    assert_eq!(node.sandbox(&[]).exec(&["echo", "mended"]).text("stdout"), "mended\n");
}

#[test]
fn a_missing_guest_kernel_is_a_typed_error() {
    let file = "/usr/share/warren/vmlinux";
    create_with_spoilt(file, &format!("rm {file}"), &[Code::NotFound, Code::Corrupt, Code::VmFailed]);
}

#[test]
fn a_guest_kernel_that_is_no_kernel_is_corrupt() {
    let file = "/usr/share/warren/vmlinux";
    create_with_spoilt(file, &format!("head -c 100000 /dev/urandom > {file}"), &[Code::Corrupt]);
}

#[test]
fn a_guest_kernel_that_is_cut_short_is_corrupt() {
    let file = "/usr/share/warren/vmlinux";
    create_with_spoilt(file, &format!("truncate -s 200000 {file}"), &[Code::Corrupt]);
}

#[test]
fn an_empty_guest_kernel_is_corrupt() {
    let file = "/usr/share/warren/vmlinux";
    create_with_spoilt(file, &format!(": > {file}"), &[Code::Corrupt]);
}

#[test]
fn a_base_image_that_is_cut_short_is_corrupt() {
    let file = "/usr/share/warren/templates/base/rootfs.img";
    create_with_spoilt(file, &format!("truncate -s 4096 {file}"), &[Code::Corrupt]);
}

#[test]
fn a_base_image_with_one_wrong_block_is_corrupt() {
    let file = "/usr/share/warren/templates/base/rootfs.img";
    let spoil = format!("dd if=/dev/urandom of={file} bs=4096 seek=100 count=1 conv=notrunc 2>/dev/null");
    create_with_spoilt(file, &spoil, &[Code::Corrupt]);
}

#[test]
fn an_unknown_verb_is_refused() {
    let node = shared::node();
    let error = node.control().err(Request::new("", "sandbox.fly"));
    assert!(error.is(Code::UnknownVerb), "{error}");
}

#[test]
fn an_unknown_key_is_refused_before_anything_is_done() {
    create_fails(&[("colour", "green")], Code::UnknownArgument);
}

#[test]
fn a_key_given_twice_or_of_the_wrong_type_is_refused() {
    create_fails(&[("vcpus", "1"), ("vcpus", "2")], Code::BadArgument);
    create_fails(&[("vcpus", "two")], Code::BadArgument);
}

#[test]
fn an_exec_without_a_program_or_in_no_sandbox_is_refused() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    let error = node.control().err(sandbox.request("exec.start"));
    assert!(error.is(Code::MissingArgument), "{error}");
    let error = node.control().err(Request::new("", "exec.start").arg("nosuchsandbox").arg("true"));
    assert!(error.is(Code::NotFound), "{error}");
}

/// Sends raw octets over a connection of its own and gives the first error without a tag; the connection has to
/// answer afterwards as if nothing had happened.
fn spoilt_line(node: &Node, octets: &[u8]) -> qemu_tests::Error {
    let client = node.connect();
    client.send_raw(octets).expect("the socket takes it");
    let error = match client.stray("-") {
        Message::Err { error, .. } => error,
        other => panic!("{other:?} is no answer to a bad line"),
    };
    client.ok(Request::new("", "hello"));
    error
}

#[test]
fn broken_quoting_is_a_bad_line_and_the_connection_goes_on() {
    let node = shared::node();
    let client = node.connect();
    client.send_raw(b"q1 sandbox.create name=\"never closed\n").unwrap();
    match client.stray("q1") {
        Message::Err { error, .. } => assert!(error.is(Code::BadLine), "{error}"),
        other => panic!("{other:?} is no answer to broken quoting"),
    }
    client.ok(Request::new("", "hello"));
}

#[test]
fn a_line_of_sixty_five_kibibytes_is_too_long_and_the_connection_goes_on() {
    let node = shared::node();
    let mut line = b"1 hello ".to_vec();
    line.resize(65 * 1024, b'x');
    line.push(b'\n');
    let error = spoilt_line(&node, &line);
    assert!(error.is(Code::LineTooLong), "{error}");
}

#[test]
fn binary_garbage_is_a_bad_line_and_the_connection_goes_on() {
    let node = shared::node();
    let garbage: Vec<u8> = (0..=255u8).rev().cycle().take(3000).chain([b'\n']).collect();
    let error = spoilt_line(&node, &garbage);
    assert!(error.is(Code::BadLine), "{error}");
}

/// What the node's own socket (without the bridge in between) answers to raw octets.
fn talk(node: &Node, octets: &[u8]) -> String {
    let request = qemu_tests::node::root_exec(&["node-tool", "talk", "/run/warren/control.sock"]);
    let call = node.root().start(request.set("stdin", true));
    let writer = call.writer();
    assert!(writer.write("stdin", octets));
    writer.end("stdin");
    call.finish_ok().text("stdout")
}

#[test]
fn the_nodes_own_socket_answers_bad_lines_with_typed_errors_too() {
    let node = shared::node();
    let mut octets = b"1 hello\nq2 sandbox.create name=\"never closed\n\xff\xfe\x00\n".to_vec();
    octets.extend(std::iter::repeat_n(b'y', 65 * 1024));
    octets.extend(b"\n5 no.such.verb\n6 data stdin 99999999999\n");
    let answer = talk(&node, &octets);
    for expected in [
        "1 ok ",
        "q2 err BAD_LINE ",
        "- err BAD_LINE ",
        "- err LINE_TOO_LONG ",
        "5 err UNKNOWN_VERB ",
        "6 err DATA_TOO_LONG ",
    ] {
        assert!(answer.lines().any(|line| line.starts_with(expected)), "no {expected:?} in:\n{answer}");
    }
    node.control().ok(Request::new("", "hello"));
}

#[test]
fn a_client_that_goes_in_the_middle_of_a_stream_costs_nothing() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    sandbox.exec(&["true"]);
    let before = NodeState::of(&node);
    // Without the threads of its kernel, some of which go when they are through with what a boot left them.
    let processes = "grep -l . /proc/[0-9]*/cmdline 2>/dev/null | wc -l";
    let in_guest = sandbox.sh(processes);

    let client = node.connect();
    let mut output = client.start(sandbox.exec_request(&["yes"]));
    output.read_until("stdout", "y\n");
    let input = client.start(sandbox.exec_request(&["cat"]).set("stdin", true));
    assert!(input.writer().write("stdin", b"half a"));
    let file = client.start(sandbox.request("file.write").set("path", "half"));
    assert!(file.writer().write("content", b"half a file"));
    client.send_raw(b"t9 data stdin 1000\nnot all of it").unwrap();
    client.cut();

    timing::wait_for("the vanished client's programs to end", || {
        let rows = sandbox.client().ok(sandbox.request("exec.list")).items;
        rows.iter().all(|row| row.get("state") != Some("running")).then_some(())
    });
    timing::wait_for("the sandbox's processes to be as before", || (sandbox.sh(processes) == in_guest).then_some(()));
    assert_eq!(sandbox.sh("ls -a /workspace | wc -l"), "2\n", "half a file is no file");
    // Output of finished programs is kept for who attaches later.
    let kept = format!("/data/sandboxes/{}/exec/", sandbox.id);
    before.assert_restored_but(&node, |line| line.contains(&kept));
}

#[test]
fn more_than_the_credit_is_refused() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    let client = node.connect();
    // sleep never reads, so no credit beyond the first comes back once the pipe is full.
    let call = client.start(sandbox.exec_request(&["sleep", "1000"]).set("stdin", true));
    let tag = call.tag().to_string();
    let mut octets = Vec::new();
    for _ in 0..40 {
        Message::data(&tag, "stdin", vec![0; 16 * 1024]).encode(&mut octets);
    }
    client.send_raw(&octets).unwrap();
    let error = call.finish().expect_err("640 KiB are more than is allowed");
    assert!(error.is(Code::CreditExceeded), "{error}");
    client.ok(Request::new("", "hello"));
}
