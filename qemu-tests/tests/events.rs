//! Events of sandboxes, executions and templates, and lists of sandboxes by what they have in common.

use qemu_tests::fault::next_supervisor;
use qemu_tests::files::TempDir;
use qemu_tests::templates::{build, fails, remove, small};
use qemu_tests::{Call, Code, Fields, Request, shared};

fn watch(node: &qemu_tests::Node) -> Call {
    node.control().start(Request::new("", "events.watch").set("follow", true))
}

/// Events of a call until one of a kind.
fn until(call: &mut Call, kind: &str) -> Vec<Fields> {
    let mut rows = vec![call.item()];
    while rows.last().and_then(|row| row.get("kind")) != Some(kind) {
        rows.push(call.item());
    }
    rows
}

fn kinds(rows: &[Fields]) -> Vec<&str> {
    rows.iter().filter_map(|row| row.get("kind")).collect()
}

#[test]
fn events_come_in_order_are_filtered_and_go_on_after_a_restart() {
    let node = shared::node();
    let mut live = watch(&node);
    let sandbox = node.sandbox(&[("name", "told")]);
    let id = sandbox.client().ok(sandbox.request("sandbox.inspect")).field("id").to_string();
    sandbox.exec(&["sh", "-c", "exit 4"]);
    let rows = until(&mut live, "exec.ended");
    assert_eq!(kinds(&rows), ["sandbox.starting", "sandbox.running", "exec.started", "exec.ended"]);
    assert!(rows.iter().all(|row| row.get("sandbox") == Some(id.as_str()) && row.get("owner") == Some("root")));
    assert_eq!((rows[2].get("detail"), rows[3].get("detail")), (Some("sh -c 'exit 4'"), Some("exit 4")));
    let first = rows[0].number("seq").expect("a number");
    let numbers = rows.iter().map(|row| row.number("seq")).collect::<Vec<_>>();
    assert_eq!(numbers, [first, first + 1, first + 2, first + 3].map(Some));

    let killed = node.supervisor();
    node.sh(&format!("kill -9 {killed}"));
    next_supervisor(&node, killed);
    let replay = |request: Request| node.control().ok(request.set("after", first - 1)).items;
    let all = replay(Request::new("", "events.watch"));
    assert_eq!(kinds(&all[..4]), kinds(&rows));
    assert_eq!(all[0].number("seq"), Some(first));
    let sandbox_only = replay(Request::new("", "events.watch").set("kind", "sandbox").set("sandbox", "told"));
    assert_eq!(kinds(&sandbox_only)[..2], ["sandbox.starting", "sandbox.running"]);
    let ended = replay(Request::new("", "events.watch").set("kind", "exec.ended").set("sandbox", &id));
    assert_eq!(kinds(&ended), ["exec.ended"]);
    assert!(replay(Request::new("", "events.watch").set("owner", "nobody")).is_empty());

    let mut live = watch(&node);
    sandbox.remove().expect("removed");
    let rows = until(&mut live, "sandbox.removed");
    assert!(rows[0].number("seq").is_some_and(|seq| seq > first + 3), "numbers go on: {rows:?}");
}

#[test]
fn what_becomes_of_templates_is_told() {
    let node = shared::node();
    let place = TempDir::new().unwrap();
    let recipe = |text: &str| std::fs::write(place.path().join("Dockerfile"), text).unwrap();
    let path = place.path().display().to_string();
    let mut live = node.control().start(Request::new("", "events.watch").set("follow", true).set("kind", "template"));
    recipe("FROM base\nRUN exit 3\n");
    fails(&node, &small("told", &["--no-cache"], &path), "BUILD_FAILED");
    recipe("FROM base\nRUN echo x > /x\n");
    build(&node, &small("told", &["--no-cache"], &path));
    node.control().ok(Request::new("", "template.tag").arg("told").set("name", "told:again"));
    remove(&node, "told");
    remove(&node, "told:again");
    let rows: Vec<Fields> = (0..5).map(|_| live.item()).collect();
    let expected = ["build_failed", "built", "tagged", "removed", "removed"].map(|kind| format!("template.{kind}"));
    assert_eq!(kinds(&rows), expected);
    let templates: Vec<_> = rows.iter().map(|row| row.get("template").expect("a name")).collect();
    assert_eq!(templates, ["told", "told", "told:again", "told", "told:again"]);
    assert!(rows.iter().all(|row| row.get("owner") == Some("root") && row.get("sandbox").is_none()), "{rows:?}");
    assert!(rows[1].get("detail").is_some_and(|detail| detail.len() == 64) && rows[2].get("detail") == Some("told"));
    // They are kept as others are.
    let killed = node.supervisor();
    node.sh(&format!("kill -9 {killed}"));
    next_supervisor(&node, killed);
    let after = rows[0].number("seq").expect("a number") - 1;
    let again = node.control().ok(Request::new("", "events.watch").set("after", after).set("kind", "template")).items;
    assert_eq!(again, rows);
}

#[test]
fn lists_are_of_sandboxes_with_what_was_asked_for_page_by_page() {
    let node = shared::node();
    let one = node.sandbox(&[("label", "team=blue"), ("label", "tier=1")]);
    let two = node.sandbox(&[("label", "team=red")]);
    let three = node.sandbox(&[("label", "team=blue")]);
    let inspect = |sandbox: &qemu_tests::Sandbox| sandbox.client().ok(sandbox.request("sandbox.inspect")).fields;
    let id = |sandbox: &qemu_tests::Sandbox| inspect(sandbox).get("id").expect("an id").to_string();
    let sorted = |mut ids: Vec<String>| {
        ids.sort();
        ids
    };
    let list = |keys: &[(&str, &str)]| -> Vec<String> {
        let request =
            keys.iter().fold(Request::new("", "sandbox.list"), |request, (key, value)| request.set(key, *value));
        let rows = node.control().ok(request).items;
        rows.iter().map(|row| row.get("id").expect("an id").to_string()).collect()
    };
    let blue = sorted(vec![id(&one), id(&three)]);
    assert_eq!(list(&[("label", "team=blue")]), blue);
    assert_eq!(list(&[("label", "team=blue"), ("label", "tier")]), [id(&one)]);
    assert_eq!(list(&[("label", "team"), ("template", "base"), ("state", "running")]).len(), 3);
    assert!(list(&[("template", "python")]).is_empty() && list(&[("label", "team=green")]).is_empty());
    assert_eq!(list(&[("label", "team=blue"), ("limit", "1")]), blue[..1]);
    assert_eq!(list(&[("label", "team=blue"), ("after", &blue[0])]), blue[1..]);

    // What runs, and what was used last.
    let running = two.start(two.exec_request(&["sleep", "1000"]));
    assert_eq!(list(&[("executing", "true")]), [id(&two)]);
    assert_eq!(list(&[("executing", "false")]), blue);
    let used = inspect(&two).number("last_used_ms").expect("a time");
    assert!(used >= inspect(&two).number("created_ms").expect("a time"));
    assert_eq!(list(&[("used_since_ms", &(used + 1).to_string())]), [] as [String; 0]);
    assert!(list(&[("used_since_ms", &used.to_string()), ("label", "team=red")]).len() == 1);
    assert!(list(&[("created_until_ms", "1")]).is_empty());
    running.cancel();
    let error = node.control().err(Request::new("", "sandbox.list").set("executing", "busy"));
    assert!(error.is(Code::BadArgument), "{error}");
}
