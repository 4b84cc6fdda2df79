//! The guest agent as a program of this machine, driven by its protocol.

#![allow(clippy::unwrap_used, reason = "helpers of tests; clippy excuses only functions marked as tests")]

mod client;
mod files;
mod freeze;

use std::io::{BufRead, Write};
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use client::{Agent, shell};
use warren::wire::{Code, FRAME, INITIAL_CREDIT, Message, Request};

fn is_gone(pid: &str) -> bool {
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        match std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())) {
            Err(_) => return true,
            Ok(stat) if stat.contains(") Z ") => return true,
            Ok(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
    false
}

/// Looks until something holds.
pub fn until(what: &str, holds: impl Fn() -> bool) {
    let started = std::time::Instant::now();
    while !holds() {
        assert!(started.elapsed() < Duration::from_secs(60), "{what}: never");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Numbers that a receiver can check without the sender's copy.
pub fn pattern(length: usize) -> Vec<u8> {
    (0..length as u64 / 8 + 1).flat_map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()).take(length).collect()
}

#[test]
fn exit_codes_and_signals_come_through() {
    let agent = Agent::start();
    let mut client = agent.connect();
    for code in [0, 1, 7, 137, 255] {
        let ran = client.run(shell(&format!("exit {code}")));
        assert_eq!(ran.result.number("exit"), Some(code));
        assert_eq!(ran.result.get("signal"), None);
        assert!(ran.result.number("cpu_ms").is_some() && ran.result.number("peak_kib").is_some());
    }
    let killed = client.run(shell("kill -9 $$"));
    assert_eq!((killed.result.number("exit"), killed.result.number("signal")), (Some(137), Some(9)));
}

#[test]
fn stdout_and_stderr_are_separate_streams() {
    let agent = Agent::start();
    let ran = agent.connect().run(shell("echo out; echo err >&2"));
    assert_eq!((ran.stdout.as_slice(), ran.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
}

#[test]
fn the_program_is_found_in_the_path_of_its_own_environment() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let script = agent.directory().join("tool");
    std::fs::write(&script, "#!/bin/sh\necho \"$GREETING from $PWD\"\n").unwrap();
    std::fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).unwrap();
    let ran = client.run(
        Request::new("x", "exec.start")
            .arg("tool")
            .set("env", format!("PATH=/nowhere:{}", agent.directory().display()))
            .set("env", "GREETING=hello")
            .set("cwd", "/"),
    );
    assert_eq!(ran.stdout, b"hello from /\n");
}

#[test]
fn what_cannot_be_run_is_a_typed_error_and_leaves_nothing() {
    let agent = Agent::start();
    let mut client = agent.connect();
    std::fs::write(agent.directory().join("plain"), "x").unwrap();
    let start = |program: &str| Request::new("x", "exec.start").arg(program);
    for (request, errno, exit) in [
        (start("no-such-program"), "ENOENT", "127"),
        (start("/no/such/program"), "ENOENT", "127"),
        (start(""), "ENOENT", "127"),
        (start("./plain"), "EACCES", "126"),
        (start("true").set("cwd", "/no/such/directory"), "ENOENT", "126"),
    ] {
        let error = client.refused(request);
        assert!(error.is(Code::ExecFailed), "{error}");
        assert_eq!((error.fields.get("errno"), error.fields.get("exit")), (Some(errno), Some(exit)), "{error}");
    }
    assert!(client.rows(Request::new("l", "exec.list")).is_empty());
}

#[test]
fn stdin_reaches_the_program_and_so_does_its_end() {
    let agent = Agent::start();
    let mut client = agent.connect();
    client.start(shell("cat; echo end").set("stdin", true));
    client.send(&Message::data("x", "stdin", "some "));
    client.send(&Message::data("x", "stdin", "words\n"));
    client.send(&Message::end("x", "stdin"));
    assert_eq!(client.finish("x").stdout, b"some words\nend\n");
    // Without stdin=true there is nothing to read.
    assert_eq!(client.run(shell("cat; echo end")).stdout, b"end\n");
}

#[test]
fn sixty_four_mebibytes_pass_through_a_program_unchanged() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let sent = pattern(64 << 20);
    let started = Instant::now();
    client.start(Request::new("x", "exec.start").arg("cat").set("stdin", true));
    let mut chunks = sent.chunks(FRAME).peekable();
    let (mut allowed, mut owed) = (INITIAL_CREDIT, 0);
    let mut received = Vec::with_capacity(sent.len());
    loop {
        while let Some(chunk) = chunks.next_if(|chunk| chunk.len() as u64 <= allowed) {
            allowed -= chunk.len() as u64;
            client.send(&Message::data("x", "stdin", chunk));
            if chunks.peek().is_none() {
                client.send(&Message::end("x", "stdin"));
            }
        }
        match client.next() {
            Message::Data { payload, .. } => {
                owed += payload.len() as u64;
                received.extend(payload);
                if owed >= 64 * 1024 {
                    client.send(&Message::credit("x", "stdout", owed));
                    owed = 0;
                }
            }
            Message::Credit { octets, .. } => allowed += octets,
            Message::End { .. } => {}
            Message::Ok { .. } => break,
            other => panic!("unexpected: {other:?}"),
        }
    }
    assert!(received == sent, "{} octets came back", received.len());
    eprintln!("64 MiB echoed in {:?}", started.elapsed());
}

#[test]
fn a_hundred_programs_run_at_once() {
    let agent = Agent::start();
    let mut client = agent.connect();
    for n in 0..100 {
        let mut request = shell(&format!("read go; echo {n}; exit {}", n % 50)).set("stdin", true);
        request.tag = format!("t{n}");
        client.request(request);
    }
    let mut started = 0;
    while started < 100 {
        match client.next() {
            Message::Item { .. } => started += 1,
            other => panic!("unexpected: {other:?}"),
        }
    }
    for n in 0..100 {
        client.send(&Message::data(&format!("t{n}"), "stdin", "go\n"));
    }
    let (mut results, mut output) = (std::collections::BTreeMap::new(), std::collections::BTreeMap::new());
    while results.len() < 100 {
        match client.next() {
            Message::Ok { tag, fields } => drop(results.insert(tag, fields.number("exit"))),
            Message::Data { tag, payload, .. } => drop(output.insert(tag, payload)),
            Message::End { .. } => {}
            other => panic!("unexpected: {other:?}"),
        }
    }
    for n in 0..100 {
        assert_eq!(results[&format!("t{n}")], Some(n % 50));
        assert_eq!(output[&format!("t{n}")], format!("{n}\n").as_bytes());
    }
}

#[test]
fn a_signal_goes_to_the_whole_group() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let id = client.start(shell("sleep 1000 & echo $!; wait"));
    let grandchild = client.wait_for("\n");
    client.done_beside(Request::new("s", "exec.signal").set("exec", id).set("signal", "TERM"));
    let ran = client.finish("x");
    assert_eq!((ran.result.number("exit"), ran.result.number("signal")), (Some(143), Some(15)));
    assert!(is_gone(&grandchild), "the grandchild {grandchild} lives");
    let error = client.refused(Request::new("s", "exec.signal").set("exec", id).set("signal", 9));
    assert!(error.is(Code::BadState), "{error}");
}

#[test]
fn a_timeout_kills_the_whole_group_and_says_so() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let started = Instant::now();
    client.start(shell("trap '' TERM; sleep 1000 & echo $!; wait").set("timeout_ms", 300));
    let grandchild = client.wait_for("\n");
    let ran = client.finish("x");
    assert_eq!(ran.result.get("timeout"), Some("true"));
    assert_eq!((ran.result.number("exit"), ran.result.number("signal")), (Some(137), Some(9)));
    assert!(started.elapsed() >= Duration::from_millis(300));
    assert!(is_gone(&grandchild), "the grandchild {grandchild} lives");
}

#[test]
fn a_timeout_also_kills_daemons_where_there_are_cgroups() {
    let agent = Agent::start();
    let mut client = agent.connect();
    client.start(shell("setsid sh -c 'sleep 1000 & echo $!; wait' & wait").set("timeout_ms", 500));
    let daemon = client.wait_for("\n");
    if agent.cgroup().is_some() {
        assert_eq!(client.finish("x").result.get("timeout"), Some("true"));
        assert!(is_gone(&daemon), "the daemon {daemon} lives");
    } else {
        let pid = nix::unistd::Pid::from_raw(daemon.trim().parse().unwrap());
        client.finish("x");
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    }
}

#[test]
fn a_program_that_ended_leaves_no_cgroup() {
    let agent = Agent::start();
    let mut client = agent.connect();
    client.run(shell("exit 0"));
    client.run(shell("sleep 1 >/dev/null 2>&1 & exit 0"));
    let Some(cgroup) = agent.cgroup() else { return };
    let left = || {
        let entries = std::fs::read_dir(&cgroup).unwrap().flatten();
        entries.filter(|entry| entry.file_type().unwrap().is_dir()).map(|entry| entry.file_name()).collect::<Vec<_>>()
    };
    assert_eq!(left(), ["exec-2"], "the daemon's own");
    let deadline = Instant::now() + Duration::from_secs(30);
    while !left().is_empty() {
        assert!(Instant::now() < deadline, "the daemon has gone, its cgroup has not");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Tells an agent to end when the test does, so that it cleans up.
struct Ended(std::process::Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.0.id().cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn a_character_device_is_served_too() {
    let pty = nix::pty::openpty(None, None).unwrap();
    let mut raw = nix::sys::termios::tcgetattr(&pty.slave).unwrap();
    nix::sys::termios::cfmakeraw(&mut raw);
    nix::sys::termios::tcsetattr(&pty.slave, nix::sys::termios::SetArg::TCSANOW, &raw).unwrap();
    let name = nix::unistd::ttyname(&pty.slave).unwrap();
    let burrow = std::process::Command::new(env!("CARGO_BIN_EXE_burrow")).arg("--serve").arg(name).spawn().unwrap();
    let _ended = Ended(burrow);
    let mut host = std::fs::File::from(pty.master);
    let mut lines = std::io::BufReader::new(host.try_clone().unwrap()).lines();
    assert!(lines.next().unwrap().unwrap().starts_with("hello ok protocol=1 agent=burrow"));
    host.write_all(b"1 exec.start echo words user=0\n").unwrap();
    let answer: Vec<String> = lines.map_while(Result::ok).take_while(|line| !line.contains(" exit=")).collect();
    assert!(answer.iter().any(|line| line == "words"), "{answer:?}");
}

#[test]
fn a_program_that_ends_in_time_is_not_touched_by_its_timeout() {
    let agent = Agent::start();
    let ran = agent.connect().run(shell("exit 3").set("timeout_ms", 60_000));
    assert_eq!((ran.result.number("exit"), ran.result.get("timeout")), (Some(3), None));
}

#[test]
fn cancelling_kills_the_program_with_its_daemons() {
    let agent = Agent::start();
    let mut client = agent.connect();
    client.start(shell("setsid sleep 1000 & sleep 1000 & echo $!; wait"));
    let grandchild = client.wait_for("\n");
    client.send(&Message::Cancel { tag: "x".to_string() });
    match client.next() {
        Message::Err { tag, error } => assert!(tag == "x" && error.is(Code::Cancelled), "{error}"),
        other => panic!("unexpected: {other:?}"),
    }
    assert!(is_gone(&grandchild), "the grandchild {grandchild} lives");
}

#[test]
fn daemons_do_not_hold_the_answer_up_for_long() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let started = Instant::now();
    let ran = client.run(shell("echo before; sleep 1000 & exit 5"));
    assert_eq!((ran.result.number("exit"), ran.stdout.as_slice()), (Some(5), &b"before\n"[..]));
    assert!(started.elapsed() > Duration::from_millis(900) && started.elapsed() < Duration::from_secs(10));
    // One that writes without end does not either.
    let ran = client.run(shell("yes & exit 6"));
    assert_eq!(ran.result.number("exit"), Some(6));
}

#[test]
fn a_terminal_has_the_size_it_is_given_and_notices_a_new_one() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let script = "trap 'stty size' WINCH; stty size; tty >/dev/null && echo ready; \
                  while :; do read line && break; done; echo got $line";
    let id = client.start(shell(script).set("tty", true).set("stdin", true).set("cols", 91).set("rows", 17));
    let seen = client.wait_for("ready");
    assert!(seen.contains("17 91"), "{seen}");
    client.done_beside(Request::new("r", "exec.resize").set("exec", id).set("cols", 120).set("rows", 40));
    client.wait_for("40 120");
    client.send(&Message::data("x", "stdin", "words\n"));
    let ran = client.finish("x");
    assert!(String::from_utf8_lossy(&ran.stdout).contains("got words"));
    assert_eq!(ran.result.number("exit"), Some(0));
}

#[test]
fn the_end_of_stdin_ends_the_input_of_a_terminal() {
    let agent = Agent::start();
    let mut client = agent.connect();
    client.start(shell("cat; echo over").set("tty", true).set("stdin", true));
    client.send(&Message::data("x", "stdin", "unfinished"));
    client.send(&Message::end("x", "stdin"));
    let ran = client.finish("x");
    assert!(String::from_utf8_lossy(&ran.stdout).contains("over"));
}

#[test]
fn ctrl_c_interrupts_what_runs_on_a_terminal() {
    let agent = Agent::start();
    let mut client = agent.connect();
    client.start(shell("echo there; exec sleep 1000").set("tty", true).set("stdin", true));
    // Before that it may not have its terminal yet, and would not hear.
    client.wait_for("there");
    client.send(&Message::data("x", "stdin", "\x03"));
    assert_eq!(client.finish("x").result.number("signal"), Some(2));
}

#[test]
fn another_link_takes_over_where_a_lost_one_stopped() {
    let agent = Agent::start();
    let mut first = agent.connect();
    let id = first.start(shell("echo one; read go; echo two; echo err >&2; exit 4").set("stdin", true));
    assert_eq!(first.wait_for("\n"), "one\n");
    drop(first);

    let mut second = agent.connect();
    let attach = |stdout: u64| Request::new("y", "exec.attach").set("exec", id).set("stdout", stdout).set("stderr", 0);
    second.request(attach(4));
    match second.next() {
        Message::Item { fields, .. } => {
            assert_eq!((fields.number("stdout_offset"), fields.number("stderr_offset")), (Some(4), Some(0)));
            assert_eq!((fields.number("stdin_offset"), fields.number("stdin_credit")), (Some(0), Some(INITIAL_CREDIT)));
        }
        other => panic!("unexpected: {other:?}"),
    }
    second.send(&Message::data("y", "stdin", "go\n"));
    let mut third = agent.connect();
    // The second link had what is before offset 4; nothing after that was credited, so it can still be had.
    third.request(attach(0));
    let ran = third.finish("y");
    assert_eq!((ran.stdout.as_slice(), ran.stderr.as_slice()), (&b"two\n"[..], &b"err\n"[..]));
    assert_eq!(ran.result.number("exit"), Some(4));

    // The end can be had again, by who has seen all before it.
    let rows = third.rows(Request::new("l", "exec.list"));
    assert_eq!(rows.len(), 1);
    assert_eq!((rows[0].get("state"), rows[0].number("exit")), (Some("exited"), Some(4)));
    third.request(attach(8));
    match third.next() {
        Message::Item { fields, .. } => assert_eq!(fields.number("stdout_offset"), Some(8)),
        other => panic!("unexpected: {other:?}"),
    }
    assert_eq!(third.finish("y").result.number("exit"), Some(4));
    third.done(Request::new("f", "exec.forget").set("exec", id));
    assert!(third.refused(attach(0)).is(Code::NotFound));
}

#[test]
fn a_program_waits_for_a_reader_that_stops() {
    let agent = Agent::start();
    let mut client = agent.connect();
    client.start(Request::new("x", "exec.start").arg("head").arg("-c").arg("2000000").arg("/dev/zero"));
    let mut received = 0;
    while received < INITIAL_CREDIT {
        match client.next() {
            Message::Data { payload, .. } => received += payload.len() as u64,
            other => panic!("unexpected: {other:?}"),
        }
    }
    assert_eq!(received, INITIAL_CREDIT);
    let row = &client.rows(Request::new("l", "exec.list"))[0];
    assert_eq!((row.get("state"), row.number("stdout_offset")), (Some("running"), Some(INITIAL_CREDIT)));
    client.send(&Message::credit("x", "stdout", 10_000_000));
    assert_eq!(client.finish("x").stdout.len() as u64 + received, 2_000_000);
}

#[test]
fn a_link_that_takes_over_may_send_what_the_one_before_left_of_the_window() {
    let agent = Agent::start();
    let mut first = agent.connect();
    let id = first.start(shell("echo there; exec sleep 1000").set("stdin", true));
    first.wait_for("there");
    for _ in 0..INITIAL_CREDIT / FRAME as u64 {
        first.send(&Message::data("x", "stdin", vec![b'x'; FRAME]));
    }
    // Once this is answered all of that is there.
    first.done_beside(Request::new("l", "exec.list"));
    drop(first);
    // However often: what waits for the program is never more than a window. Its pipe has taken the rest.
    for _ in 0..6 {
        let mut next = agent.connect();
        next.request(Request::new("y", "exec.attach").set("exec", id).set("stdout", 6));
        let Message::Item { fields, .. } = next.next() else { panic!("no row") };
        assert_eq!((fields.number("stdin_offset"), fields.number("stdin_credit")), (Some(INITIAL_CREDIT), Some(65536)));
    }
}

#[test]
fn more_than_the_credit_is_refused() {
    let agent = Agent::start();
    let mut client = agent.connect();
    client.start(shell("sleep 1000").set("stdin", true));
    // More than the pipe takes, for which new credit comes, and the first credit together.
    for _ in 0..30 {
        client.send(&Message::data("x", "stdin", vec![b'x'; FRAME]));
    }
    let answer = std::iter::repeat_with(|| client.next()).find(|message| !matches!(message, Message::Credit { .. }));
    match answer.unwrap() {
        Message::Err { tag, error } => assert!(tag == "x" && error.is(Code::CreditExceeded), "{error}"),
        other => panic!("unexpected: {other:?}"),
    }
}

#[test]
fn bad_requests_are_typed_errors_and_the_link_goes_on() {
    let agent = Agent::start();
    let mut client = agent.connect();
    for (line, tag, code) in [
        ("\"\n", "-", Code::BadLine),
        ("a \"\n", "a", Code::BadLine),
        ("a exec.start \"open\n", "a", Code::BadLine),
        ("a no.verb\n", "a", Code::UnknownVerb),
        ("a hello x=1\n", "a", Code::UnknownArgument),
        ("a hello x\n", "a", Code::UnknownArgument),
        ("a exec.start\n", "a", Code::MissingArgument),
        ("a exec.start true timeout_ms=0\n", "a", Code::OutOfRange),
        ("a exec.start true timeout_ms=soon\n", "a", Code::BadArgument),
        ("a exec.start true tty=1\n", "a", Code::BadArgument),
        ("a exec.start true user=no-such-user\n", "a", Code::BadArgument),
        ("a exec.start true env==x\n", "a", Code::BadLine),
        ("a exec.start true env=x\n", "a", Code::BadArgument),
        ("a exec.start \"a\\x00b\"\n", "a", Code::BadArgument),
        ("a exec.start true id=0\n", "a", Code::OutOfRange),
        ("a exec.signal exec=7 signal=TERM\n", "a", Code::NotFound),
        ("a exec.signal signal=TERM\n", "a", Code::MissingArgument),
        ("a exec.attach exec=7\n", "a", Code::NotFound),
        ("a exec.resize exec=7 cols=1\n", "a", Code::NotFound),
        ("a exec.forget exec=18446744073709551615\n", "a", Code::OutOfRange),
        ("a file.read path=\"\"\n", "a", Code::BadArgument),
        ("a file.write path=x mode=9\n", "a", Code::BadArgument),
        ("a file.write path=x mode=+7\n", "a", Code::BadArgument),
        ("a system.poweroff\n", "a", Code::BadState),
        ("a data stdin 99999999\n", "a", Code::DataTooLong),
    ] {
        let mut octets = line.as_bytes().to_vec();
        if line.contains("99999999") {
            octets.extend(vec![0; 99_999_999 + 1]);
        }
        client.raw(&octets);
        match client.next() {
            Message::Err { tag: of, error } => assert!(of == tag && error.is(code), "{line}: {of} {error}"),
            other => panic!("{line}: {other:?}"),
        }
    }
    // Replies, data, credit and cancels for what is not there are dropped.
    client.raw(b"q ok\nq err X \"y\"\nq item\nq data stdin 3\nabc\nq end stdin\nq credit stdout 5\nq cancel\n");
    client.raw(&vec![b'x'; 70_000]);
    client.raw(b"\n");
    match client.next() {
        Message::Err { tag, error } => assert!(tag == "-" && error.is(Code::LineTooLong), "{error}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(client.done(Request::new("h", "hello")).number("protocol"), Some(1));
    let error = {
        client.start(shell("sleep 1000"));
        client.refused(Request::new("x", "hello"))
    };
    assert!(error.is(Code::TagInUse), "{error}");
}

#[test]
fn a_number_can_be_chosen_once() {
    let agent = Agent::start();
    let mut client = agent.connect();
    assert_eq!(client.start(shell("exit 0").set("id", 77)), 77);
    client.finish("x");
    assert!(client.refused(shell("exit 0").set("id", 77)).is(Code::AlreadyExists));
    assert_eq!(client.start(shell("exit 0")), 78);
}

#[test]
fn a_client_that_goes_away_in_the_middle_leaves_the_agent_well() {
    let agent = Agent::start();
    let files = || std::fs::read_dir(agent.directory()).unwrap().count();
    let before = files();
    for cut in ["a exec.sta", "a data stdin 1000\nabc", "w file.write path=cut\nw data content 5\nhello\nw data cont"] {
        let mut client = agent.connect();
        client.raw(cut.as_bytes());
    }
    let mut client = agent.connect();
    assert_eq!(client.run(shell("exit 9")).result.number("exit"), Some(9));
    until("no half-written file is left", || files() == before);
}

#[test]
fn idle_the_agent_is_small() {
    let agent = Agent::start();
    let mut client = agent.connect();
    for _ in 0..3 {
        client.run(shell("head -c 3000000 /dev/zero"));
    }
    for row in client.rows(Request::new("l", "exec.list")) {
        client.done(Request::new("f", "exec.forget").set("exec", row.number("exec").unwrap()));
    }
    std::thread::sleep(Duration::from_millis(2500));
    // /proc/PID/status counts in batches; the page tables do not.
    let rollup = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", agent.pid())).unwrap();
    let rss = rollup.lines().find_map(|line| line.strip_prefix("Rss:")).unwrap();
    let kib: u64 = rss.trim().trim_end_matches(" kB").parse().unwrap();
    // Unoptimized code is spread over more pages.
    let limit = if cfg!(debug_assertions) { 2560 } else { 1024 };
    assert!(kib <= limit, "{kib} KiB are resident");
}
