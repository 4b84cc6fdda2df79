//! Programs in a sandbox: streams, terminals, signals, limits, exit codes.

use std::collections::BTreeSet;

use qemu_tests::stand_in::next_supervisor;
use qemu_tests::{Call, Client, Code, Fields, Message, Request, Sandbox, shared, timing};
use sha2::{Digest, Sha256};

/// Octets without a pattern, the same on every run.
fn noise(length: usize) -> Vec<u8> {
    let mut x = 0x9e37_79b9_7f4a_7c15_u64;
    let mut octets = Vec::with_capacity(length + 8);
    while octets.len() < length {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        octets.extend_from_slice(&x.to_le_bytes());
    }
    octets.truncate(length);
    octets
}

/// Waits until a process of the sandbox has ended.
fn wait_until_gone(sandbox: &Sandbox, pid: &str) {
    timing::wait_for(&format!("process {pid} in the sandbox to end"), || {
        // A zombie that waits to be reaped has ended too.
        let look = format!("grep ^State /proc/{pid}/status 2>/dev/null || true");
        let state = sandbox.exec(&["sh", "-c", &look]).text("stdout");
        (state.is_empty() || state.contains('Z')).then_some(())
    });
}

#[test]
fn standard_output_and_standard_error_are_separate_streams() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    let reply = sandbox.exec(&["sh", "-c", "echo to out; echo to err >&2"]);
    assert_eq!(reply.text("stdout"), "to out\n");
    assert_eq!(reply.text("stderr"), "to err\n");
}

#[test]
fn exit_codes_and_signals_are_passed_on() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    assert_eq!(sandbox.exec(&["true"]).field("exit"), "0");
    assert_eq!(sandbox.exec(&["false"]).field("exit"), "1");
    assert_eq!(sandbox.exec(&["sh", "-c", "exit 42"]).field("exit"), "42");
    let killed = sandbox.exec(&["sh", "-c", "kill -9 $$"]);
    assert_eq!(killed.field("exit"), "137");
    assert_eq!(killed.field("signal"), "9");
}

#[test]
fn a_program_that_cannot_be_started_is_a_typed_error() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    let missing = sandbox.client().err(sandbox.exec_request(&["/no/such/program"]));
    assert!(missing.is(Code::ExecFailed), "{missing}");
    assert_eq!(missing.fields.get("exit"), Some("127"));
    assert_eq!(missing.fields.get("errno"), Some("ENOENT"));
    let denied = sandbox.client().err(sandbox.exec_request(&["/etc/passwd"]));
    assert!(denied.is(Code::ExecFailed), "{denied}");
    assert_eq!(denied.fields.get("exit"), Some("126"));
}

#[test]
fn environment_directory_and_user_are_as_asked_for() {
    let node = shared::node();
    let sandbox = node.sandbox(&[("env", "FROM_CREATE=1")]);
    let shown = "echo $FROM_CREATE $FROM_EXEC; pwd; id -u";
    let asked =
        sandbox.exec_request(&["sh", "-c", shown]).set("env", "FROM_EXEC=a b").set("cwd", "/tmp").set("user", 0);
    assert_eq!(sandbox.client().ok(asked).text("stdout"), "1 a b\n/tmp\n0\n");
    assert_eq!(sandbox.exec(&["sh", "-c", shown]).text("stdout"), "1\n/workspace\n1000\n", "the template's defaults");
}

#[test]
fn sixty_four_mebibytes_through_standard_input_come_back_unchanged() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    let sent = noise(64 << 20);
    let mut call = sandbox.start(sandbox.exec_request(&["cat"]).set("stdin", true));
    let writer = call.writer();
    let (count, hash) = std::thread::scope(|scope| {
        scope.spawn(|| {
            assert!(writer.write("stdin", &sent), "the exec ended before it had read everything");
            writer.end("stdin");
        });
        let (mut count, mut hash) = (0, Sha256::new());
        loop {
            match call.message() {
                Message::Data { channel, payload, .. } if channel == "stdout" => {
                    count += payload.len();
                    hash.update(&payload);
                }
                Message::Ok { fields, .. } => {
                    assert_eq!(fields.get("exit"), Some("0"));
                    break;
                }
                Message::Err { error, .. } => panic!("cat failed: {error}"),
                _ => {}
            }
        }
        (count, hash.finalize())
    });
    assert_eq!(count, sent.len());
    assert_eq!(hash, Sha256::digest(&sent));
}

#[test]
fn a_reader_that_stops_holds_the_writer_and_nobody_else() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    let mut call = sandbox.start(sandbox.exec_request(&["yes"]));
    call.hold_credit();
    let mut came = 0;
    while let Some(message) = call.message_within(timing::limit(1)) {
        if let Message::Data { payload, .. } = message {
            came += payload.len() as u64;
        }
    }
    assert_eq!(came, warren::wire::INITIAL_CREDIT, "exactly the initial credit comes");
    assert_eq!(sandbox.exec(&["echo", "still here"]).text("stdout"), "still here\n");
    call.grant("stdout", 1000);
    let Message::Data { payload, .. } = call.message() else { panic!("credit brings data") };
    assert!(payload.len() <= 1000);
}

#[test]
fn a_hundred_programs_run_at_once() {
    let node = shared::node();
    let sandbox = node.sandbox(&[("memory_mib", "256")]);
    // Each waits for a line, so that all of them run before the first one ends.
    let calls: Vec<_> = (0..100)
        .map(|n| {
            let script = format!("read line; echo {n} $line");
            sandbox.start(sandbox.exec_request(&["sh", "-c", &script]).set("stdin", true))
        })
        .collect();
    timing::wait_for("a hundred programs that run or have ended", || {
        let rows = sandbox.client().ok(sandbox.request("exec.list")).items;
        let running = rows.iter().filter(|row| row.get("state") == Some("running")).count();
        (running == 100 || rows.iter().any(|row| row.get("state") == Some("failed"))).then_some(())
    });
    // All that is resident of it, its program among that; and what it has written itself.
    let agent = sandbox.sh("grep -e ^VmRSS -e ^Rss /proc/1/status");
    let kib = |key: &str| {
        let line = agent.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).expect("a number")
    };
    println!("the agent with a hundred programs: {agent}");
    assert!(kib("VmRSS") <= 2048, "{agent}");
    assert!(kib("RssAnon") <= 512, "{agent}");
    for call in &calls {
        call.writer().write("stdin", b"done\n");
        call.writer().end("stdin");
    }
    let mut answers = BTreeSet::new();
    for call in calls {
        let reply = call.finish_ok();
        assert_eq!(reply.field("exit"), "0");
        answers.insert(reply.text("stdout"));
    }
    let expected: BTreeSet<String> = (0..100).map(|n| format!("{n} done\n")).collect();
    assert_eq!(answers, expected);
}

#[test]
fn a_terminal_shows_its_size_and_every_new_one() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    let script = "trap 'stty size' WINCH; stty size; while :; do sleep 0.1; done";
    let request = sandbox.exec_request(&["sh", "-c", script]);
    let mut call = sandbox.start(request.set("tty", true).set("cols", 80).set("rows", 24).set("stdin", true));
    let exec = call.item().get("exec").expect("a row with the exec's number").to_string();
    call.read_until("stdout", "24 80");
    sandbox.client().ok(sandbox.request("exec.resize").set("exec", &exec).set("cols", 132).set("rows", 43));
    call.read_until("stdout", "43 132");
    // The interrupt key goes through the terminal's line discipline to the foreground group.
    assert!(call.writer().write("stdin", b"\x03"));
    let reply = call.finish_ok();
    assert_eq!(reply.field("exit"), "130");
}

#[test]
fn a_signal_goes_to_the_whole_group() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    let script = "sh -c 'sleep 1000 & echo grandchild $!; wait' & wait";
    let mut call = sandbox.start(sandbox.exec_request(&["sh", "-c", script]));
    let exec = call.item().get("exec").expect("a row with the exec's number").to_string();
    let text = call.read_until("stdout", "\n");
    let grandchild = text.trim().strip_prefix("grandchild ").expect("its pid is printed").to_string();
    sandbox.client().ok(sandbox.request("exec.signal").set("exec", &exec).set("signal", "TERM"));
    let reply = call.finish_ok();
    assert_eq!(reply.field("exit"), "143");
    assert_eq!(reply.field("signal"), "15");
    wait_until_gone(&sandbox, &grandchild);
}

#[test]
fn a_time_limit_ends_the_whole_group_and_says_so() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    // A shell that ignores polite signals, with a child.
    let script = "trap '' TERM INT; sleep 1000 & echo child $!; wait";
    let request = sandbox.exec_request(&["sh", "-c", script]).set("timeout_ms", 500 * timing::factor());
    let reply = sandbox.client().ok(request);
    assert_eq!(reply.field("timeout"), "true");
    assert_eq!(reply.field("exit"), "137");
    assert_eq!(reply.field("signal"), "9");
    let text = reply.text("stdout");
    wait_until_gone(&sandbox, text.trim().strip_prefix("child ").expect("its pid is printed"));
}

#[test]
fn a_cancelled_program_is_killed() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    let mut call = sandbox.start(sandbox.exec_request(&["sh", "-c", "echo pid $$; exec sleep 1000"]));
    let text = call.read_until("stdout", "\n");
    call.cancel();
    let error = call.finish().expect_err("a cancelled exec does not succeed");
    assert!(error.is(Code::Cancelled), "{error}");
    wait_until_gone(&sandbox, text.trim().strip_prefix("pid ").expect("its pid is printed"));
}

#[test]
fn a_program_in_the_background_is_listed_and_its_output_can_be_read_later() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    let script = "echo first; sleep 1; echo second";
    let started = sandbox.client().ok(sandbox.exec_request(&["sh", "-c", script]).set("detach", true));
    let exec = started
        .fields
        .get("exec")
        .or_else(|| started.items.first().and_then(|row| row.get("exec")))
        .expect("the exec's number")
        .to_string();
    let rows = sandbox.client().ok(sandbox.request("exec.list")).items;
    assert!(rows.iter().any(|row| row.get("exec") == Some(&exec)), "{rows:?}");
    for _ in 0..2 {
        let replayed = sandbox.client().ok(sandbox.request("exec.attach").set("exec", &exec));
        assert_eq!(replayed.text("stdout"), "first\nsecond\n");
        assert_eq!(replayed.field("exit"), "0");
    }
}

/// A program in the background whose standard input is open.
struct Fed<'a> {
    sandbox: &'a Sandbox,
    exec: String,
}

impl<'a> Fed<'a> {
    fn start(sandbox: &'a Sandbox, request: Request) -> Self {
        let started = sandbox.client().ok(request.set("stdin", true).set("detach", true));
        Self { sandbox, exec: started.field("exec").to_string() }
    }

    fn shell(sandbox: &'a Sandbox, script: &str) -> Self {
        Self::start(sandbox, sandbox.exec_request(&["sh", "-c", script]))
    }

    fn attach(&self) -> Request {
        self.sandbox.request("exec.attach").set("exec", &self.exec)
    }

    /// Attaches to feed it, beginning at that octet.
    fn feed(&self, client: &Client, offset: u64) -> Call {
        let mut call = client.start(self.attach().set("stdin", true));
        let row = call.item();
        assert_eq!((row.get("exec"), row.number("stdin_offset")), (Some(self.exec.as_str()), Some(offset)), "{row:?}");
        call
    }

    /// The same, as soon as nobody else does and what came before is read.
    fn feed_next(&self, client: &Client, offset: u64, until: Code) -> Call {
        timing::wait_for("the turn to feed it", || {
            let mut call = client.start(self.attach().set("stdin", true));
            match call.message() {
                Message::Item { fields, .. } => {
                    assert_eq!(fields.number("stdin_offset"), Some(offset), "{fields:?}");
                    Some(call)
                }
                Message::Err { error, .. } if error.is(until) => None,
                other => panic!("neither a row nor {until:?}: {other:?}"),
            }
        })
    }

    /// Why it cannot be fed.
    fn refused(&self) -> String {
        let error = self.sandbox.client().err(self.attach().set("stdin", true));
        assert!(error.is(Code::BadState), "{error}");
        assert_eq!(error.fields.get("exec"), Some(self.exec.as_str()), "{error}");
        error.message
    }
}

fn cancelled(call: Call) {
    call.cancel();
    let error = call.finish().expect_err("it was cancelled");
    assert!(error.is(Code::Cancelled), "{error}");
}

#[test]
fn a_program_in_the_background_is_fed_by_one_client_after_the_other() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    let cat = Fed::start(&sandbox, sandbox.exec_request(&["cat"]));
    let (first, second) = (node.connect(), node.connect());
    let mut call = cat.feed(&first, 0);
    assert!(call.writer().write("stdin", b"one\n"));
    assert_eq!(call.read_until("stdout", "\n"), "one\n");
    assert!(cat.refused().contains("another client"), "{}", cat.refused());
    // To watch is another matter; what a watcher sends reaches nobody.
    let mut watcher = second.start(cat.attach());
    assert!(watcher.writer().write("stdin", b"not this\n"));
    watcher.writer().end("stdin");
    watcher.read_until("stdout", "one\n");
    first.cut();
    let mut call = cat.feed_next(&second, 4, Code::BadState);
    assert!(call.writer().write("stdin", b"two\n"));
    assert_eq!(call.read_until("stdout", "two\n"), "one\ntwo\n");
    cancelled(call);
    let call = cat.feed(sandbox.client(), 8);
    assert!(call.writer().write("stdin", b"three\n"));
    call.writer().end("stdin");
    let reply = call.finish_ok();
    assert_eq!((reply.field("exit"), reply.text("stdout").as_str()), ("0", "one\ntwo\nthree\n"));
    assert_eq!(watcher.finish_ok().text("stdout"), "two\nthree\n");
    assert!(cat.refused().contains("has ended"), "{}", cat.refused());
    assert_eq!(sandbox.client().ok(cat.attach()).text("stdout"), "one\ntwo\nthree\n");
    let audit = node.control().ok(Request::new("", "node.audit").set("limit", 100)).items;
    let attached = |row: &&Fields| row.get("verb") == Some("exec.attach") && row.get("sandbox") == Some(&sandbox.id);
    assert!(audit.iter().filter(attached).count() >= 5, "who feeds a program is on record");
}

#[test]
fn nothing_is_lost_or_doubled_when_feeders_go_before_a_program_has_read_what_they_sent() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    let hash = Fed::shell(&sandbox, "while [ ! -e /workspace/go ]; do sleep 0.05; done; exec sha256sum");
    let window = warren::wire::INITIAL_CREDIT;
    let sent = noise(4 << 20);
    let part = |from: u64, to: u64| &sent[from as usize..to as usize];
    for turn in 0..2 {
        let call = hash.feed(sandbox.client(), turn * window);
        // A window needs no credit, and its end is not waited for.
        assert!(call.writer().write("stdin", part(turn * window, (turn + 1) * window)));
        cancelled(call);
    }
    // What the program has not read yet and its agent has no room for is the most that waits.
    let full = sandbox.client().err(hash.attach().set("stdin", true));
    assert!(full.is(Code::NoCapacity) && full.fields.number("waiting").is_some_and(|n| n <= window), "{full}");
    sandbox.sh("touch /workspace/go");
    let call = hash.feed_next(sandbox.client(), 2 * window, Code::NoCapacity);
    assert!(call.writer().write("stdin", &sent[2 * window as usize..]));
    call.writer().end("stdin");
    let expected: String = Sha256::digest(&sent).iter().map(|octet| format!("{octet:02x}")).collect();
    assert_eq!(call.finish_ok().text("stdout"), format!("{expected}  -\n"));
}

#[test]
fn what_cannot_be_fed_is_a_typed_error() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    let started = sandbox.client().ok(sandbox.exec_request(&["sleep", "1000"]).set("detach", true));
    let without = Fed { sandbox: &sandbox, exec: started.field("exec").to_string() };
    assert!(without.refused().contains("not open"), "{}", without.refused());
    let closed = Fed::shell(&sandbox, "cat; echo over; exec sleep 1000");
    let mut call = closed.feed(sandbox.client(), 0);
    call.writer().end("stdin");
    call.read_until("stdout", "over");
    cancelled(call);
    assert!(closed.refused().contains("not open"), "{}", closed.refused());
    // One whose owner feeds it.
    let mut owner = sandbox.start(sandbox.exec_request(&["cat"]).set("stdin", true));
    let exec = owner.item().get("exec").expect("a number").to_string();
    let owned = Fed { sandbox: &sandbox, exec };
    assert!(owned.refused().contains("another client"), "{}", owned.refused());
    // A code run has a source, and no standard input.
    let run = sandbox.start(sandbox.request("code.run").set("language", "sh").set("detach", true));
    assert!(run.writer().write("source", b"sleep 1000"));
    run.writer().end("source");
    let run = Fed { sandbox: &sandbox, exec: run.finish_ok().field("exec").to_string() };
    assert!(run.refused().contains("code run"), "{}", run.refused());
    let nobody = sandbox.client().err(sandbox.request("exec.attach").set("exec", 999).set("stdin", true));
    assert!(nobody.is(Code::NotFound), "{nobody}");
    // After a restart it is the agent that says which of them are open.
    let fed = Fed::shell(&sandbox, "echo on; exec cat");
    let mut watched = sandbox.start(fed.attach());
    watched.read_until("stdout", "on");
    drop((owner, watched));
    next_supervisor(&node);
    for closed in [without, closed, run] {
        closed.refused();
    }
    cancelled(fed.feed(sandbox.client(), 0));
    sandbox.client().ok(sandbox.request("sandbox.stop"));
    assert!(fed.refused().contains("ended"), "{}", fed.refused());
}

#[test]
fn a_program_is_fed_on_after_a_restart_of_the_supervisor_and_over_a_pause() {
    let node = shared::node();
    let sandbox = node.sandbox(&[("memory_mib", "128")]);
    let cat = Fed::start(&sandbox, sandbox.exec_request(&["cat"]));
    let mut call = cat.feed(sandbox.client(), 0);
    assert!(call.writer().write("stdin", b"one\n"));
    call.read_until("stdout", "one\n");
    next_supervisor(&node);
    assert_eq!(call.finish().expect_err("its supervisor is gone").code, "NODE_RESTARTED");
    let mut call = cat.feed(sandbox.client(), 4);
    assert!(call.writer().write("stdin", b"two\n"));
    call.read_until("stdout", "two\n");
    // What is sent while it stands still is there when it goes on.
    sandbox.client().ok(sandbox.request("sandbox.pause"));
    assert!(call.writer().write("stdin", b"three\n"));
    sandbox.client().ok(sandbox.request("sandbox.resume"));
    call.read_until("stdout", "three\n");
    call.writer().end("stdin");
    assert_eq!(call.finish_ok().field("exit"), "0");
    assert_eq!(sandbox.client().ok(cat.attach()).text("stdout"), "one\ntwo\nthree\n");
}

#[test]
fn a_terminal_in_the_background_is_typed_into_later() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    let script = "trap 'stty size' WINCH; stty -echo; echo ready; while :; do sleep 0.1; done";
    let request = sandbox.exec_request(&["sh", "-c", script]).set("tty", true).set("cols", 80).set("rows", 24);
    let shell = Fed::start(&sandbox, request);
    let mut call = shell.feed(sandbox.client(), 0);
    call.read_until("stdout", "ready");
    sandbox.client().ok(sandbox.request("exec.resize").set("exec", &shell.exec).set("cols", 132).set("rows", 43));
    call.read_until("stdout", "43 132");
    assert!(call.writer().write("stdin", b"\x03"));
    assert_eq!(call.finish_ok().field("exit"), "130");
}

/// What an attach took to its end: octets of standard output, how many were said to be lost, and the output's end.
fn take_all(mut call: qemu_tests::Call) -> (u64, u64, String) {
    let (mut came, mut lost, mut end) = (0, 0, Vec::new());
    loop {
        match call.message() {
            Message::Item { fields, .. } => lost += fields.number("lost").unwrap_or(0),
            Message::Data { channel, payload, .. } if channel == "stdout" => {
                came += payload.len() as u64;
                end.extend(payload);
                end.drain(..end.len().saturating_sub(16));
            }
            Message::Ok { fields, .. } => {
                assert_eq!(fields.get("exit"), Some("0"));
                return (came, lost, String::from_utf8_lossy(&end).into_owned());
            }
            Message::Err { error, .. } => panic!("the attach failed: {error}"),
            _ => {}
        }
    }
}

#[test]
fn those_who_attach_and_do_not_read_hold_up_nobody_and_are_told_exactly_what_they_lost() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    let wait = |file: &str| format!("while [ ! -e /workspace/{file} ]; do sleep 0.05; done");
    let write = "head -c 3000000 /dev/zero; echo written > /workspace/written";
    let script = format!("{}; {write}; {}; echo; echo the end", wait("begin"), wait("go"));
    let started = sandbox.client().ok(sandbox.exec_request(&["sh", "-c", &script]).set("detach", true));
    let exec = started.fields.get("exec").or_else(|| started.items.first()?.get("exec")).expect("a number").to_string();
    let attach = |client: &qemu_tests::Client| client.start(sandbox.request("exec.attach").set("exec", &exec));
    // One reads nothing at all, one a little; both have connections of their own.
    let clients = [node.connect(), node.connect()];
    let (mut dead, mut slow) = (attach(&clients[0]), attach(&clients[1]));
    dead.hold_credit();
    slow.hold_credit();
    sandbox.sh("touch /workspace/begin");
    slow.grant("stdout", 1000);
    timing::wait_for("the program to have written all of it", || {
        (sandbox.sh("ls /workspace").contains("written")).then_some(())
    });
    // One who comes after the ring was full is told what is gone, and has the rest as it comes.
    let late = attach(sandbox.client());
    sandbox.sh("touch /workspace/go");
    let (came, lost, end) = take_all(late);
    assert_eq!((came + lost, end.as_str()), (3_000_009, "\0\0\0\0\0\0\0\nthe end\n"));
    assert!(lost > 1_000_000 && came >= 1 << 20, "{lost} lost, {came} came");
    // The slow one reads on, over what it lost.
    slow.grant("stdout", 1 << 40);
    let (came, lost, end) = take_all(slow);
    assert_eq!((came + lost, end.as_str()), (3_000_009, "\0\0\0\0\0\0\0\nthe end\n"));
    assert!(lost > 0, "it was overtaken");
    drop((dead, clients));
    // The command line says it.
    let output = qemu_tests::templates::warren(&node, &["attach", &sandbox.id, &exec]);
    assert_eq!((output.code, output.stdout.len()), (Some(0), 1 << 20));
    assert!(output.stderr.contains(&format!("warning: {} octets", 3_000_009 - (1 << 20))), "{}", output.stderr);
}

#[test]
fn a_grandchild_that_keeps_the_pipes_does_not_hold_the_result() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    let reply = sandbox.exec(&["sh", "-c", "sleep 1000 & echo started"]);
    assert_eq!(reply.field("exit"), "0");
    assert_eq!(reply.text("stdout"), "started\n");
}

#[test]
fn the_result_tells_processor_time_and_peak_memory() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    let reply = sandbox.exec(&["sh", "-c", "i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done"]);
    assert!(reply.fields.number("cpu_ms").is_some_and(|ms| ms > 0), "{:?}", reply.fields);
    assert!(reply.fields.number("peak_kib").is_some_and(|kib| kib > 0), "{:?}", reply.fields);
}
