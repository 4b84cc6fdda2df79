//! The service at 169.254.169.254: who a sandbox is, what its programs log, and what hostile programs get of it.

use qemu_tests::fault::next_supervisor;
use qemu_tests::{Call, Code, Fields, Node, Request, Sandbox, shared, timing};

fn id_of(sandbox: &Sandbox) -> String {
    sandbox.client().ok(sandbox.request("sandbox.inspect")).field("id").to_string()
}

/// What a server at the address says to these octets.
fn http(sandbox: &Sandbox, octets: &[u8]) -> String {
    let call = sandbox.start(sandbox.exec_request(&["nc", "169.254.169.254", "80"]).set("stdin", true));
    let writer = call.writer();
    if writer.write("stdin", octets) {
        writer.end("stdin");
    }
    call.finish().map(|reply| reply.text("stdout")).unwrap_or_default()
}

fn get(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n").into_bytes()
}

fn post(body: &str) -> Vec<u8> {
    format!("POST /logs HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

fn me(sandbox: &Sandbox) -> serde_json::Value {
    let answer = http(sandbox, &get("/me"));
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    serde_json::from_str(body).unwrap_or_else(|e| panic!("{e}: {answer}"))
}

fn status(answer: &str) -> &str {
    answer.split(' ').nth(1).unwrap_or("none")
}

fn logs(sandbox: &Sandbox) -> Vec<serde_json::Value> {
    let text = sandbox.client().ok(sandbox.request("sandbox.logs").set("source", "guest")).text("log");
    text.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
}

#[test]
fn a_sandbox_hears_who_it_is_and_a_clone_who_it_has_become() {
    let node = shared::node();
    let sandbox = node.sandbox(&[("name", "box"), ("label", "team=blue \"7\"")]);
    let id = id_of(&sandbox);
    let expected = |id: &str, name: Option<&str>| {
        let mut me = serde_json::json!({ "id": id, "template": "base", "metadata": { "team": "blue \"7\"" } });
        if let Some(name) = name {
            me["name"] = name.into();
        }
        me
    };
    assert_eq!(me(&sandbox), expected(&id, Some("box")));
    assert_eq!(sandbox.sh("wget -qO- http://169.254.169.254/me | head -c 6"), "{\"id\":");
    let networked = node.sandbox(&[("network", "on")]);
    assert_eq!(me(&networked)["id"], id_of(&networked).as_str());
    assert_eq!(networked.sh("ip -4 addr show dev lo | grep -c 169.254.169.254/32"), "1\n");

    // A program that asks over and over hears no other id once it is the clone's.
    let snapshot = sandbox.client().ok(sandbox.request("snapshot.create")).field("id").to_string();
    let clone = node.control().ok(Request::new("", "snapshot.fork").arg(&id)).items[0].get("id").map(str::to_string);
    let clone = Sandbox::of(node.control(), &clone.expect("a clone has an id"));
    let told = me(&clone);
    assert_eq!((&told["id"], &told["metadata"]["team"]), (&id_of(&clone).as_str().into(), &"blue \"7\"".into()));
    assert_eq!(me(&sandbox)["id"], id.as_str());
    node.control().ok(sandbox.request("sandbox.rollback").set("snapshot", &snapshot));
    assert_eq!(me(&sandbox), expected(&id, Some("box")));
    node.control().ok(sandbox.request("sandbox.pause"));
    node.control().ok(sandbox.request("sandbox.resume"));
    assert_eq!(me(&sandbox), expected(&id, Some("box")));
}

/// Reads a followed log until it has these octets.
fn read_until(call: &mut Call, end: &str) -> String {
    call.read_until("log", end)
}

#[test]
fn what_programs_log_is_attributed_followed_and_outlives_a_supervisor() {
    let node = shared::node();
    let (one, other) = (node.sandbox(&[]), node.sandbox(&[]));
    let mut follower = one.start(one.request("sandbox.logs").set("source", "guest").set("follow", true));
    assert_eq!(status(&http(&one, &post("{\"n\":1}\n{\"sandbox\":\"forged\"}\n"))), "202");
    assert_eq!(status(&http(&other, &post("\"theirs\""))), "202");
    read_until(&mut follower, "forged");
    let rows = timing::wait_for("two lines", || Some(logs(&one)).filter(|rows| rows.len() == 2));
    let own = id_of(&one);
    assert!(rows.iter().all(|row| row["sandbox"] == own.as_str() && row["time_ms"].is_u64()), "{rows:?}");
    assert_eq!((&rows[0]["log"]["n"], &rows[1]["log"]["sandbox"]), (&1.into(), &"forged".into()));
    let part = |key: &str, value: &str| {
        let request = one.request("sandbox.logs").set("source", "guest").set(key, value);
        one.client().ok(request).text("log").lines().count()
    };
    assert_eq!((part("tail", "0"), part("tail", "1"), part("tail", "7")), (0, 1, 2));
    let last = rows[1]["time_ms"].as_u64().expect("a time");
    assert_eq!((part("since_ms", "1"), part("since_ms", &(last + 1).to_string())), (2, 0));
    let error = one.client().err(one.request("sandbox.logs").set("since_ms", last));
    assert!(error.is(Code::BadArgument) && error.fields.get("argument") == Some("since_ms"), "{error}");
    let theirs = timing::wait_for("the other's", || Some(logs(&other)).filter(|rows| rows.len() == 1));
    assert_eq!(theirs[0]["log"], "theirs");

    let killed = node.supervisor();
    node.sh(&format!("kill -9 {killed}"));
    next_supervisor(&node, killed);
    let answer = timing::wait_for("the service after another supervisor came", || {
        one.client().call(one.exec_request(&["true"])).ok()?;
        Some(http(&one, &post("{\"n\":3}"))).filter(|answer| status(answer) == "202")
    });
    assert!(answer.ends_with("{\"lines\":1}\n"), "{answer}");
    let rows = timing::wait_for("a third line", || Some(logs(&one)).filter(|rows| rows.len() == 3));
    assert_eq!(rows[2]["log"]["n"], 3);
    assert_eq!(me(&one)["id"], own.as_str());
}

/// KiB that the agent of a sandbox has resident.
fn agent_kib(sandbox: &Sandbox) -> u64 {
    let words = sandbox.client().ok(sandbox.exec_request(&["cat", "/proc/1/statm"]).set("user", 0)).text("stdout");
    words.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).expect("statm has numbers") * 4
}

fn running(node: &Node, sandbox: &Sandbox) -> Vec<Fields> {
    node.control().ok(sandbox.request("exec.list")).items
}

#[test]
fn hostile_requests_are_typed_errors_and_cost_nobody_else_anything() {
    let node = shared::node();
    let (hostile, other) = (node.sandbox(&[]), node.sandbox(&[]));
    let giant = format!("POST /logs HTTP/1.1\r\nContent-Length: {}\r\n\r\n", 1u64 << 40);
    let head = format!("GET /me HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(20_000));
    for (octets, expected) in [
        (b"\x16\x03\x01\x00\xff\n\n".to_vec(), "400"),
        (get("/latest/user-data"), "404"),
        (get("/logs"), "405"),
        (post("{\"a\":"), "400"),
        (post(&"[".repeat(60_000)), "400"),
        (post(&format!("\"{}\"", "x".repeat(17_000))), "400"),
        (post(&"1\n".repeat(40_000)), "413"),
        (giant.into_bytes(), "413"),
        (head.into_bytes(), "431"),
        (b"POST /logs HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n1\r\n0\r\n\r\n".to_vec(), "501"),
        (b"GET /me HTTP/1.1\r\n\r\nGET /me HTTP/1.1\r\n\r\n".repeat(1000), "200"),
    ] {
        let answer = http(&hostile, &octets);
        assert_eq!(status(&answer), expected, "{answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "one answer to a connection: {answer}");
    }

    // Many that begin and never end: who comes after them is served.
    let slow: Vec<Call> = (0..24)
        .map(|_| {
            let mut call = hostile.start(hostile.exec_request(&["nc", "169.254.169.254", "80"]).set("stdin", true));
            call.item();
            assert!(call.writer().write("stdin", b"POST /logs HTTP/1.1\r\nContent-Length: 65536\r\n\r\n{"));
            call
        })
        .collect();
    assert_eq!(me(&hostile)["id"], id_of(&hostile).as_str());
    let kib = agent_kib(&hostile);
    assert!(kib <= 4096, "the agent has {kib} KiB");
    drop(slow);

    // More than the node takes: refused, and what is kept stays bounded.
    let line = format!("{{\"x\":\"{}\"}}\n", "y".repeat(15_000));
    let body = line.repeat(4);
    let answers: Vec<String> = (0..30).map(|_| status(&http(&hostile, &post(&body))).to_string()).collect();
    assert!(answers.iter().any(|answer| answer == "202"), "{answers:?}");
    // The same at once, from one program.
    let request = post(&body);
    let put = hostile.start(hostile.request("file.write").set("path", "/tmp/request"));
    assert!(put.writer().write("content", &request));
    put.writer().end("content");
    put.finish_ok();
    let flood = "for i in 1 2 3 4 5 6 7 8; do nc 169.254.169.254 80 < /tmp/request & done; wait";
    let answers = hostile.exec(&["sh", "-c", flood]).text("stdout");
    assert!(answers.contains("HTTP/1.1 429 ") && answers.contains("Retry-After: 1"), "{answers}");
    let stored = node.sh(&format!("stat -c %s /data/sandboxes/{}/guest.log", id_of(&hostile)));
    assert!(stored.trim().parse::<u64>().expect("a size") <= (1 << 20) + 16, "{stored}");
    assert!(logs(&hostile).iter().all(|row| row["log"]["x"].is_string()));

    assert_eq!(me(&other)["id"], id_of(&other).as_str());
    assert!(logs(&other).is_empty());
    timing::wait_for("those programs to end", || {
        running(&node, &hostile).iter().all(|row| row.get("state") != Some("running")).then_some(())
    });
    assert_eq!(me(&hostile)["id"], id_of(&hostile).as_str());
    assert_eq!(hostile.exec(&["true"]).field("exit"), "0");
}
