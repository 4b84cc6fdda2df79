//! Traces: what creates and executions spend their time on.

use qemu_tests::fault::next_supervisor;
use qemu_tests::{Fields, Node, Reply, Request, Sandbox, shared};

fn trace(node: &Node, sandbox: &Sandbox, exec: Option<u64>) -> Reply {
    let request = sandbox.request("sandbox.trace");
    node.control().ok(exec.iter().fold(request, |request, exec| request.set("exec", exec)))
}

fn spans(rows: &[Fields]) -> Vec<&str> {
    rows.iter().filter_map(|row| row.get("span")).collect()
}

/// All of it is over, nothing failed, and the slowest span is the one that took longest.
fn assert_whole(trace: &Reply) {
    let times = trace.items.iter().map(|row| (row.number("start_us"), row.number("duration_us")));
    let times: Vec<(u64, u64)> = times.map(|(start, took)| (start.expect("start"), took.expect("an end"))).collect();
    assert_eq!(times.iter().map(|(start, took)| start + took).max(), trace.fields.number("total_us"), "{trace:?}");
    let longest = times.iter().map(|(_, took)| took).max();
    let slowest = trace.items.iter().find(|row| row.get("span") == trace.fields.get("slowest")).expect("slowest");
    assert_eq!(slowest.number("duration_us").as_ref(), longest, "{trace:?}");
    assert_eq!(trace.fields.get("failed"), None, "{trace:?}");
}

#[test]
fn a_create_says_what_it_waited_for_also_after_its_supervisor_was_killed() {
    let turn = shared::node();
    let node: &Node = &turn;
    let plain = node.sandbox(&[("cold", "true")]);
    let booted = trace(node, &plain, None);
    assert_whole(&booted);
    assert_eq!(
        spans(&booted.items),
        ["validate", "admit", "storage", "allocate", "vm", "boot", "agent-ready", "register"],
    );
    let online = node.sandbox(&[("network", "on")]);
    let restored = trace(node, &online, None);
    assert_whole(&restored);
    assert!(spans(&restored.items).contains(&"network"), "{restored:?}");

    let killed = node.supervisor();
    node.sh(&format!("kill -9 {killed}"));
    next_supervisor(node, killed);
    let kept = trace(node, &plain, None);
    let but_last = |reply: &Reply| reply.items[..reply.items.len() - 1].to_vec();
    assert_eq!(but_last(&kept), but_last(&booted), "what was written when it was registered");
}

#[test]
fn an_execution_says_how_long_it_waited_and_ran_while_it_runs_and_on_record() {
    let turn = shared::node();
    let node: &Node = &turn;
    let sandbox = node.sandbox(&[]);
    let waits = sandbox.exec_request(&["sh", "-c", "echo begun; read line; exit 3"]).set("stdin", true);
    let mut call = sandbox.start(waits);
    call.item();
    call.read_until("stdout", "begun");
    let live = trace(node, &sandbox, Some(1));
    assert_eq!(spans(&live.items), ["validate", "start", "run"]);
    assert!(live.items[2].get("duration_us").is_none(), "it goes on: {live:?}");
    call.writer().end("stdin");
    call.finish_ok();
    assert_whole(&trace(node, &sandbox, Some(1)));

    let run = sandbox.start(sandbox.request("code.run").set("language", "sh"));
    let writer = run.writer();
    assert!(writer.write("source", b"echo made > made.txt\n"));
    writer.end("source");
    run.finish_ok();
    let of_code = trace(node, &sandbox, Some(2));
    assert_whole(&of_code);
    // It may have begun before anybody was told that it waits.
    let mut said = spans(&of_code.items);
    said.retain(|span| *span != "queue");
    assert_eq!(said, ["validate", "start", "run"]);
    let missing = sandbox.client().err(sandbox.exec_request(&["/no/such/program"]));
    let failed = trace(node, &sandbox, Some(3));
    assert_eq!(failed.field("failed"), "start", "{failed:?}");
    assert!(failed.items[1].get("error").is_some_and(|error| error.contains(&missing.message)), "{failed:?}");

    // The same is on record, beside the files.
    let id = sandbox.inspect().get("id").expect("its id").to_string();
    let rows = node.control().ok(Request::new("", "history.list").set("sandbox", &id)).items;
    let record = |at: usize| {
        node.control().ok(Request::new("", "history.inspect").arg(rows[at].get("record").expect("a number"))).items
    };
    assert_eq!(record(1)[0].get("artifact"), Some("/workspace/made.txt"));
    assert_eq!(record(1)[1..], of_code.items[..]);
    assert_eq!(record(0), failed.items);

    let said = node.run(&["warren", "trace", &id, "2"]).stdout;
    assert!(said.starts_with("SPAN") && said.contains("\nrun ") && said.contains("slowest"), "{said}");
}
