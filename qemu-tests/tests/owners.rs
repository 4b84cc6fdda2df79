//! Who may do what: peers of the control socket, owners of sandboxes, the audit log.

use std::sync::OnceLock;

use qemu_tests::node::Boot;
use qemu_tests::{Code, Node, Request, timing};

const CONFIG: &str = r#"
[control]
socket_mode = "0666"
peers = [
    { uid = 1000, role = "operator", owner = "ann" },
    { uid = 1001, role = "operator", owner = "bob" },
    { uid = 1002, role = "viewer", owner = "ann" },
]
"#;

fn node() -> Node {
    Boot::kernel().file("/etc/warren/warren.toml", 0o644, CONFIG.into()).start()
}

/// What the command line says to a user of the node: exit code, output, complaint.
fn warren(node: &Node, uid: u32, arguments: &[&str]) -> (u64, String, String) {
    static PROGRAM: OnceLock<String> = OnceLock::new();
    let program = PROGRAM.get_or_init(|| {
        // PID 1 is the same program, at a place of the boot's choosing.
        node.sh("cp /proc/1/exe /test/warren && chmod 755 /test /test/warren");
        "/test/warren".to_string()
    });
    let request = Request::new("", "exec.start").arg(program);
    let request = arguments.iter().fold(request, |request, argument| request.arg(argument));
    let reply = node.root().ok(request.set("user", uid).set("cwd", "/"));
    let exit = reply.fields.number("exit").expect("it exits");
    (exit, reply.text("stdout").trim_end().to_string(), reply.text("stderr").trim_end().to_string())
}

fn ok(node: &Node, uid: u32, arguments: &[&str]) -> String {
    let (exit, stdout, stderr) = warren(node, uid, arguments);
    assert_eq!((exit, stderr.as_str()), (0, ""), "{uid}: {arguments:?}");
    stdout
}

/// The code of the error that it fails with.
fn refused(node: &Node, uid: u32, arguments: &[&str]) -> String {
    let (exit, stdout, stderr) = warren(node, uid, arguments);
    assert_ne!(exit, 0, "{uid}: {arguments:?}: {stdout}");
    let code = stderr.strip_prefix("error: ").and_then(|rest| rest.split(':').next());
    code.unwrap_or_else(|| panic!("{uid}: {arguments:?}: {stderr}")).to_string()
}

#[test]
fn owners_are_nothing_to_each_other_and_each_change_is_on_record() {
    let node = node();
    const ANN: u32 = 1000;
    const BOB: u32 = 1001;
    const EVE: u32 = 1003;
    const LOOKER: u32 = 1002;

    // The same name is free for each.
    let id = ok(&node, ANN, &["create", "--name", "box", "--memory", "128", "--env", "TOKEN=secret"]);
    let bobs = ok(&node, BOB, &["create", "--name", "box", "--memory", "128"]);
    assert_eq!(refused(&node, ANN, &["create", "--name", "box"]), Code::AlreadyExists.as_str());
    assert_eq!(ok(&node, ANN, &["ps", "-q"]), id);
    assert_eq!(ok(&node, BOB, &["ps", "-q"]), bobs);
    assert_eq!(ok(&node, ANN, &["exec", "box", "--", "echo", "hers"]), "hers");
    for arguments in [
        &["inspect", &id][..],
        &["exec", &id, "--", "true"],
        &["stop", &id],
        &["rm", "-f", &id],
        &["logs", &id],
        &["cp", "/etc/hosts", &format!("{id}:/workspace/x")],
    ] {
        let code = refused(&node, BOB, arguments);
        assert_eq!(code, Code::NotFound.as_str(), "{arguments:?} says that there is something");
    }

    // A viewer sees what its owner has, and changes nothing.
    assert_eq!(ok(&node, LOOKER, &["ps", "-q"]), id);
    for arguments in [&["create"][..], &["stop", "box"], &["exec", "box", "--", "true"], &["rm", "-f", "box"]] {
        assert_eq!(refused(&node, LOOKER, arguments), Code::Forbidden.as_str(), "{arguments:?}");
    }
    // What is the node's is an admin's.
    for arguments in
        [&["node", "stop"][..], &["node", "audit"], &["create", "--owner", "bob"], &["create", "--disk", "x:file:y"]]
    {
        assert_eq!(refused(&node, ANN, arguments), Code::Forbidden.as_str(), "{arguments:?}");
    }
    assert_eq!(refused(&node, EVE, &["ps"]), Code::Forbidden.as_str());

    // An admin sees all, must say whose where names are the same, and makes them for others.
    let control = node.control();
    let listed = control.ok(Request::new("", "sandbox.list"));
    let mut owners: Vec<_> = listed.items.iter().filter_map(|row| row.get("owner")).collect();
    owners.sort_unstable();
    assert_eq!(owners, ["ann", "bob"]);
    assert!(control.err(Request::new("", "sandbox.inspect").arg("box")).is(Code::BadArgument));
    let given = control.ok(Request::new("", "sandbox.create").set("owner", "bob").set("memory_mib", 128));
    let given = given.field("id").to_string();
    assert_eq!(ok(&node, BOB, &["exec", &given, "--", "echo", "his"]), "his");

    // A supervisor that comes after knows whose they are.
    let supervisor = node.supervisor();
    node.sh(&format!("kill -9 {supervisor}"));
    timing::wait_for("another supervisor", || (node.supervisor() != supervisor).then_some(()));
    timing::wait_for("its answer", || control.call(Request::new("", "hello")).ok());
    assert_eq!(ok(&node, ANN, &["ps", "-q"]), id);
    assert_eq!(ok(&node, ANN, &["rm", "-f", "box"]), "box");
    ok(&node, BOB, &["rm", "-f", &bobs, &given]);

    let rows = control.ok(Request::new("", "node.audit").set("limit", 1000)).items;
    let of = |owner: &str, verb: &str, sandbox: &str, result: &str| {
        let wanted = [("owner", owner), ("verb", verb), ("sandbox", sandbox), ("result", result)];
        let fits = |row: &&qemu_tests::Fields| wanted.iter().all(|(key, value)| row.get(key) == Some(*value));
        let found: Vec<_> = rows.iter().filter(fits).collect();
        assert!(!found.is_empty(), "no row for {owner} {verb} {sandbox} {result} among {rows:?}");
        found[0].clone()
    };
    let row = of("ann", "sandbox.create", &id, "ok");
    assert!(row.get("peer").is_some_and(|peer| peer.starts_with("uid=1000 pid=")), "{row:?}");
    assert!(row.get("arguments").is_some_and(|text| text.contains("TOKEN=...") && !text.contains("secret")), "{row:?}");
    of("ann", "exec.start", &id, "ok");
    of("bob", "sandbox.remove", &id, Code::NotFound.as_str());
    of("ann", "sandbox.remove", &id, "ok");
    of("root", "sandbox.create", &given, "ok");
    let refusals = rows.iter().filter(|row| row.get("result") == Some(Code::Forbidden.as_str()));
    assert!(refusals.count() >= 7, "{rows:?}");
    assert!(rows.iter().all(|row| row.get("verb") != Some("sandbox.list")), "looking changes nothing");
    // The newest row first, and pages that go on where one ends.
    let ids: Vec<u64> = rows.iter().filter_map(|row| row.number("audit")).collect();
    assert!(ids.windows(2).all(|pair| pair[0] == pair[1] + 1), "{ids:?}");
    let page = control.ok(Request::new("", "node.audit").set("limit", 2).set("before", ids[1])).items;
    assert_eq!(page.iter().filter_map(|row| row.number("audit")).collect::<Vec<_>>(), ids[2..4]);
    node.power_off();
}
