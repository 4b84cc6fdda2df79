//! The serial console: what goes in, and what comes out.

use qemu_tests::node::root_exec;
use qemu_tests::{Node, Sandbox, shared, timing};

/// Sends a request to a sandbox's worker; gives the answer's line.
fn ask_worker(node: &Node, sandbox: &Sandbox, line: &str) -> String {
    let socket = format!("/run/warren/sandboxes/{}.sock", sandbox.id);
    let call = node.root().start(root_exec(&["node-tool", "talk", &socket]).set("stdin", true));
    let writer = call.writer();
    assert!(writer.write("stdin", line.as_bytes()), "the node's tool takes a line");
    writer.end("stdin");
    call.finish_ok().text("stdout")
}

#[test]
fn what_is_sent_to_the_console_reaches_a_program_that_reads_it() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    let reader = "stty -F /dev/ttyS0 raw -echo; echo ready > /workspace/ready; head -c 6 /dev/ttyS0 > /workspace/got";
    sandbox.client().ok(sandbox.exec_request(&["sh", "-c", reader]).set("user", 0).set("detach", true));
    timing::wait_for("a program that reads the console", || {
        let seen = sandbox.sh("cat /workspace/ready 2>/dev/null || true");
        (seen == "ready\n").then_some(())
    });
    assert_eq!(ask_worker(&node, &sandbox, "1 serial.input hel\n"), "1 ok taken=3\n");
    assert_eq!(ask_worker(&node, &sandbox, "1 serial.input \"lo\\n\"\n"), "1 ok taken=3\n");
    timing::wait_for("the program to have it", || (sandbox.sh("wc -c < /workspace/got") == "6\n").then_some(()));
    assert_eq!(sandbox.sh("cat /workspace/got"), "hello\n");
}

#[test]
fn what_nobody_reads_is_taken_up_to_a_bound_and_the_rest_is_the_senders() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    let line = format!("1 serial.input {}\n", "x".repeat(3000));
    let taken: u64 = (0..3)
        .map(|_| {
            let answer = ask_worker(&node, &sandbox, &line);
            let number = answer.trim_end().strip_prefix("1 ok taken=").and_then(|number| number.parse::<u64>().ok());
            number.unwrap_or_else(|| panic!("{answer:?}"))
        })
        .sum();
    assert!((4096..9000).contains(&taken), "{taken}");
    assert_eq!(sandbox.sh("echo on"), "on\n");
}

#[test]
fn what_a_guest_prints_is_in_its_log() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    sandbox.sh("echo printed by a program > /dev/ttyS0");
    let log = timing::wait_for("the line in the log", || {
        let log = sandbox.client().ok(sandbox.request("sandbox.logs")).text("log");
        log.contains("printed by a program").then_some(log)
    });
    assert!(log.len() <= 1 << 20);
    timing::wait_for("its last two lines", || {
        let [whole, tail] = [None, Some(2)].map(|lines| {
            let request = sandbox.request("sandbox.logs");
            let request = lines.iter().fold(request, |request, lines| request.set("tail", lines));
            sandbox.client().ok(request).text("log")
        });
        // It may have grown in between.
        (whole.ends_with(&tail) && tail.lines().count() == 2).then_some(())
    });
}
