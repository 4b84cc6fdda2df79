//! The history of executions: what each came to, whose it is, how long it stays, and that nothing is left open.

use qemu_tests::fault::next_supervisor;
use qemu_tests::node::Boot;
use qemu_tests::{Code, Fields, Node, Reply, Request, Sandbox, shared, timing};

/// The records of a sandbox, newest first.
fn records(node: &Node, sandbox: &str) -> Vec<Fields> {
    node.control().ok(Request::new("", "history.list").set("sandbox", sandbox)).items
}

fn record(node: &Node, row: &Fields) -> Reply {
    node.control().ok(Request::new("", "history.inspect").arg(row.get("record").expect("a row has a number")))
}

fn code(sandbox: &Sandbox, source: &[u8]) -> Reply {
    let call = sandbox.start(sandbox.request("code.run").set("language", "sh"));
    let writer = call.writer();
    assert!(writer.write("source", source));
    writer.end("source");
    call.finish_ok()
}

fn get<'a>(fields: &'a Fields, keys: &[&str]) -> Vec<&'a str> {
    keys.iter().map(|key| fields.get(key).unwrap_or("-")).collect()
}

#[test]
fn programs_and_code_are_on_record_also_when_their_sandbox_is_gone() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    let id = sandbox.client().ok(sandbox.request("sandbox.inspect")).field("id").to_string();
    sandbox.exec(&["sh", "-c", "echo out; echo 'err or' >&2; exit 3"]);
    let source = format!("echo made > made.txt\necho {}\n", "x".repeat(100_000));
    code(&sandbox, source.as_bytes());
    let missing = sandbox.client().err(sandbox.exec_request(&["/no/such/program"]));
    assert!(missing.is(Code::ExecFailed), "{missing}");
    sandbox.remove().expect("removed");

    let rows = records(&node, &id);
    let keys = ["exec", "kind", "language", "state", "exit", "code"];
    assert_eq!(
        rows.iter().map(|row| get(row, &keys)).collect::<Vec<_>>(),
        [
            ["3", "exec", "-", "failed", "127", "EXEC_FAILED"],
            ["2", "code", "sh", "completed", "0", "-"],
            ["1", "exec", "-", "failed", "3", "-"],
        ]
    );
    let program = record(&node, &rows[2]);
    assert_eq!(program.field("command"), "sh -c 'echo out; echo '\\''err or'\\'' >&2; exit 3'");
    assert_eq!((program.text("stdout").as_str(), program.text("stderr").as_str()), ("out\n", "err or\n"));
    assert!(program.fields.number("ended_ms") >= program.fields.number("started_ms"));
    assert!(program.fields.number("peak_kib").is_some_and(|kib| kib > 0) && program.fields.get("cpu_ms").is_some());
    let run = record(&node, &rows[1]);
    assert_eq!(run.text("source"), source[..64 * 1024], "the start of it");
    assert_eq!(run.fields.number("source_bytes"), Some(source.len() as u64));
    assert_eq!(run.fields.number("stdout_bytes"), Some(100_001));
    assert_eq!(run.text("stdout"), format!("{}\n", "x".repeat(16 * 1024 - 1)), "the end of it");
    let files = run.items.iter().filter(|item| item.get("artifact").is_some());
    let files = files.map(|item| get(item, &["artifact", "size"])).collect::<Vec<_>>();
    assert_eq!(files, [["/workspace/made.txt", "5"]]);

    // Filters, and page by page.
    let list = || Request::new("", "history.list").set("sandbox", &id);
    let numbers = |request| {
        let rows = node.control().ok(request).items;
        rows.iter().map(|row| row.get("exec").unwrap_or("-").to_string()).collect::<Vec<_>>()
    };
    assert_eq!(numbers(list().set("kind", "code")), ["2"]);
    assert_eq!(numbers(list().set("state", "failed").set("limit", 1)), ["3"]);
    let last = rows[0].get("record").expect("number");
    assert_eq!(numbers(list().set("state", "failed").set("limit", 1).set("before", last)), ["1"]);
    assert_eq!(numbers(list().set("until_ms", 1)), [] as [&str; 0]);
    let none = node.control().err(Request::new("", "history.inspect").arg("999999999"));
    assert!(none.is(Code::NotFound), "{none}");
}

#[test]
fn what_runs_when_the_supervisor_dies_ends_on_record_and_what_dies_with_it_has_failed() {
    let node = shared::node();
    let stays = node.sandbox(&[("name", "stays")]);
    let goes = node.sandbox(&[("name", "goes")]);
    let detached = |sandbox: &Sandbox, script: &str| {
        sandbox.client().ok(sandbox.exec_request(&["sh", "-c", script]).set("detach", true));
    };
    detached(&stays, "while [ ! -e go ]; do sleep 0.1; done; echo went");
    detached(&goes, "sleep 1000");
    let running = |node: &Node, sandbox: &str| {
        timing::wait_for("a record of a running program", || {
            records(node, sandbox).into_iter().find(|row| row.get("state") == Some("running"))
        })
    };
    let ended = |node: &Node, row: &Fields| {
        timing::wait_for("the end of a record", || {
            Some(record(node, row)).filter(|record| record.fields.get("ended_ms").is_some())
        })
    };
    let (survivor, victim) = (running(&node, "stays"), running(&node, "goes"));

    // The worker of one goes while no supervisor is there to see it.
    let (killed, id) = (node.supervisor(), goes.client().ok(goes.request("sandbox.inspect")).field("id").to_string());
    node.sh(&format!("kill -STOP {killed}; kill -9 {}; kill -9 {killed}", node.worker(&id)));
    next_supervisor(&node, killed);
    let victim = ended(&node, &victim);
    assert_eq!(get(&victim.fields, &["state", "code"]), ["failed", "LINK_LOST"]);
    assert!(victim.field("message").starts_with("the sandbox ended"), "{:?}", victim.fields);
    timing::wait_for("the other's agent", || stays.client().call(stays.exec_request(&["touch", "go"])).ok());
    let survivor = ended(&node, &survivor);
    assert_eq!(get(&survivor.fields, &["state", "exit"]), ["completed", "0"]);
    assert_eq!(survivor.text("stdout"), "went\n");
    let open = node.control().ok(Request::new("", "history.list").set("state", "running"));
    assert!(open.items.is_empty(), "{:?}", open.items);
}

#[test]
fn records_are_their_owners_and_go_when_they_are_too_many_or_too_old() {
    const CONFIG: &str = r#"
[control]
socket_mode = "0666"
peers = [
    { uid = 1000, role = "operator", owner = "ann" },
    { uid = 1001, role = "viewer", owner = "bob" },
]
[history]
keep_source = false
output_kib = 0
max_count = 5
"#;
    let node = Boot::kernel().file("/etc/warren/warren.toml", 0o644, CONFIG.into()).start();
    node.sh("cp /proc/1/exe /test/warren && chmod 755 /test /test/warren");
    let warren = |uid: u32, arguments: &[&str]| {
        let request = Request::new("", "exec.start").arg("/test/warren");
        let request = arguments.iter().fold(request, |request, argument| request.arg(argument));
        node.root().ok(request.set("user", uid).set("cwd", "/"))
    };
    let id = warren(1000, &["create", "--memory", "128"]).text("stdout").trim_end().to_string();
    for _ in 0..8 {
        warren(1000, &["exec", &id, "--", "echo", "secret"]);
    }
    let listed = |uid: u32| {
        let rows = warren(uid, &["history", "--json"]).text("stdout");
        serde_json::from_str::<Vec<serde_json::Value>>(&rows).expect("JSON")
    };
    // The sweep of a start takes what is too many.
    let killed = node.supervisor();
    node.sh(&format!("kill -9 {killed}"));
    next_supervisor(&node, killed);
    let rows = timing::wait_for("the sweep", || Some(listed(1000)).filter(|rows| rows.len() == 5));
    assert!(rows.iter().all(|row| row["owner"] == "ann" && row["command"] == "echo"), "{rows:?}");
    let first = rows[0]["record"].to_string();
    let shown = warren(1000, &["history", &first, "--json"]).text("stdout");
    assert!(shown.contains("\"state\": \"completed\"") && !shown.contains("secret"), "{shown}");
    assert!(listed(1001).is_empty(), "there is nothing of hers for another");
    assert!(warren(1001, &["history", &first]).text("stderr").contains("NOT_FOUND"));
    assert_eq!(listed(0).len(), 5, "an admin sees all");
    let table = warren(1000, &["history", "-n", "2"]).text("stdout");
    assert!(table.starts_with("ID ") && table.lines().count() == 3, "{table}");
}
