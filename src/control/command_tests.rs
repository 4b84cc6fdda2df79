use super::super::programs::FILE_KEYS;
use super::*;
use crate::sandbox::time_limits::TimeLimits;

const DEFAULTS: Defaults = Defaults { vcpus: 1, memory_mib: 512, time_limits: TimeLimits::NONE };

#[test]
fn unknown_verbs_keys_and_values_are_typed_errors() {
    let of = |request| Command::of(request, DEFAULTS).expect_err("refused");
    assert!(of(Request::new("1", "sandbox.destroy")).is(Code::UnknownVerb));
    assert!(of(Request::new("1", "sandbox.create").set("cpus", 2)).is(Code::UnknownArgument));
    assert!(of(Request::new("1", "sandbox.inspect")).is(Code::MissingArgument));
    assert!(of(Request::new("1", "sandbox.inspect").arg("a").arg("b")).is(Code::UnknownArgument));
    assert!(of(Request::new("1", "sandbox.list").set("state", "alive")).is(Code::BadArgument));
    assert!(of(Request::new("1", "exec.start").arg("a")).is(Code::MissingArgument));
    assert!(of(Request::new("1", "exec.resize").arg("a").set("exec", 1).set("cols", 65536)).is(Code::OutOfRange));
    assert!(of(Request::new("1", "file.read").arg("a")).is(Code::MissingArgument));
    assert!(of(Request::new("1", "file.list").arg("a").set("path", "/").set("mode", 1)).is(Code::UnknownArgument));
}

#[test]
fn an_exec_becomes_the_agents_request() {
    let request = Request::new("9", "exec.start").arg("sb").arg("echo").arg("a=b").set("tty", true).set("cols", 80);
    let Ok(Command::ExecStart { sandbox, argv, request, detach }) = Command::of(request, DEFAULTS) else {
        panic!("not an exec");
    };
    assert_eq!((sandbox.as_str(), argv.len(), detach), ("sb", 2, false));
    assert_eq!(request, Request::new("", "exec.start").arg("echo").arg("a=b").set("tty", true).set("cols", 80));
}

#[test]
fn an_exec_may_be_left_alone_with_its_stdin_open_and_attached_to_feed_it() {
    let request = Request::new("9", "exec.start").arg("sb").arg("cat").set("stdin", true).set("detach", true);
    let Ok(Command::ExecStart { request, detach: true, .. }) = Command::of(request, DEFAULTS) else { panic!() };
    assert_eq!(request, Request::new("", "exec.start").arg("cat").set("stdin", true));
    for (said, feeds) in [("true", true), ("false", false)] {
        let request = Request::new("9", "exec.attach").arg("sb").set("exec", 4).set("stdin", said);
        assert!(
            matches!(Command::of(request, DEFAULTS), Ok(Command::ExecAttach { exec: 4, feeds: f, .. }) if f == feeds)
        );
    }
    let request = Request::new("9", "exec.attach").arg("sb").set("exec", 4).set("stdin", "open");
    assert!(Command::of(request, DEFAULTS).is_err_and(|error| error.is(Code::BadArgument)));
}

#[test]
fn what_changes_something_is_audited_and_no_viewers() {
    for (name, role, audited) in [
        ("hello", Role::Monitor, false),
        ("sandbox.list", Role::Monitor, false),
        ("sandbox.logs", Role::Viewer, false),
        ("sandbox.create", Role::Operator, true),
        ("exec.start", Role::Operator, true),
        ("exec.attach", Role::Operator, false),
        ("file.read", Role::Operator, false),
        ("file.write", Role::Operator, true),
        ("snapshot.export", Role::Operator, true),
        ("snapshot.import", Role::Operator, true),
        ("node.stop", Role::Admin, true),
        ("node.drain", Role::Admin, true),
        ("node.undrain", Role::Admin, true),
        ("node.audit", Role::Admin, false),
        ("node.ledger", Role::Admin, false),
        ("node.backup", Role::Admin, true),
        ("node.restore", Role::Admin, true),
    ] {
        let verb = Verb::of(name).expect("a verb");
        assert_eq!((verb.role(), verb.is_audited()), (role, audited), "{name}");
    }
}

#[test]
fn every_file_verb_has_its_keys() {
    for verb in VERBS.iter().filter(|verb| verb.name.starts_with("file.")) {
        assert!(FILE_KEYS.iter().any(|(name, _)| *name == verb.name), "{}", verb.name);
    }
}
