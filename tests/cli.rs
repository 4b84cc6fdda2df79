//! The built program against a pretended node: what it prints where, its exit codes, its streams.

#![allow(clippy::unwrap_used)] // a failed unwrap is a failed test

mod fake;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use fake::{Node, Scratch};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, tcgetattr};
use nix::unistd::Pid;
use serde_json::Value;
use warren::wire::Fields;

fn warren(node: &Node) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_warren"));
    command.env("WARREN_SOCKET", &node.socket).env_remove("TERM").stdin(Stdio::null());
    command
}

fn run(node: &Node, args: &[&str]) -> Output {
    warren(node).args(args).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Waits for the end; a test that hangs fails instead.
fn finish(child: &mut Child) -> i32 {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code().unwrap_or(-1);
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            panic!("the program does not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn create_prints_the_id_alone() {
    let node = Node::start();
    let output = run(&node, &["create", "-t", "base", "--memory", "1G", "-e", "A=b c", "-l", "team=x"]);
    assert_eq!((stdout(&output).as_str(), output.status.code()), ("abcdefghijkl\n", Some(0)));
    assert_eq!(stderr(&output), "");
    let request = node.await_seen("sandbox.create");
    assert!(request.ends_with(r#"template=base memory_mib=1024 env="A=b c" label="team=x""#), "{request}");
}

#[test]
fn an_error_is_one_line_with_its_code_and_exit_code_1() {
    let node = Node::start();
    let output = run(&node, &["create", "none"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!((stdout(&output).as_str(), stderr(&output).as_str()), ("", "error: NOT_FOUND: no template none\n"));
    let output = run(&node, &["inspect", "nobody"]);
    assert_eq!(stderr(&output), "error: NOT_FOUND: no sandbox nobody?[2J\n");
}

#[test]
fn misuse_is_exit_code_2_and_asks_nothing_of_the_node() {
    let node = Node::start();
    for args in [
        &[][..],
        &["no-such-verb"],
        &["create", "--memory", "lots"],
        &["exec", "sb"],
        &["attach", "-t", "sb", "4"],
        &["attach", "-it", "sb", "4"],
        &["exec", "-it", "sb", "cat"],
        &["cp", "a", "b"],
        &["cp", "sb:a", "sb:b"],
        &["cp", "sb:", "b"],
        &["rm"],
    ] {
        let output = run(&node, args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(stdout(&output).is_empty() && !stderr(&output).is_empty(), "{args:?}");
    }
    assert!(node.store.lock().unwrap().seen.is_empty());
}

#[test]
fn help_and_version_need_no_node() {
    for args in [&["--help"][..], &["--version"], &["exec", "--help"], &["completion", "bash"]] {
        let output = Command::new(env!("CARGO_BIN_EXE_warren")).args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert!(stdout(&output).contains("warren"), "{args:?}");
    }
}

#[test]
fn a_node_that_is_not_there_is_an_error_with_a_code() {
    for (args, code) in [(&["ps"][..], 1), (&["exec", "sb", "true"], 125)] {
        let output =
            Command::new(env!("CARGO_BIN_EXE_warren")).args(["--socket", "/nonexistent"]).args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(code));
        assert!(stderr(&output).starts_with("error: CONNECT_FAILED: no node answers at /nonexistent: "));
    }
}

#[test]
fn json_is_one_document() {
    let node = Node::start();
    let parse = |args: &[&str]| -> Value { serde_json::from_str(&stdout(&run(&node, args))).unwrap() };
    assert_eq!(parse(&["--json", "create"])["id"], "abcdefghijkl");
    let all = parse(&["ps", "-a", "--json"]);
    assert_eq!(all.as_array().unwrap().len(), 2);
    assert_eq!((&all[0]["name"], &all[0]["vcpus"], &all[0]["labels"]["team"]), (&"7".into(), &1.into(), &"a".into()));
    assert_eq!(parse(&["ps", "--json"]).as_array().unwrap().len(), 1);
    assert_eq!(parse(&["inspect", "one", "two"]).as_array().unwrap().len(), 2);
    assert_eq!(parse(&["--json", "node"])["memory_mib"], 2048);
    assert_eq!(parse(&["--json", "template", "ls"])[0]["name"], "base");
    assert_eq!(parse(&["--json", "rm", "one"])[0]["id"], "one");
}

#[test]
fn ps_is_a_table_of_what_is_not_stopped() {
    let node = Node::start();
    let text = stdout(&run(&node, &["ps"]));
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 2);
    assert!(
        lines[0].starts_with("ID             NAME   TEMPLATE   STATE     CPUS   MEMORY    NETWORK   CREATED"),
        "{text}"
    );
    assert!(lines[1].starts_with("abcdefghijkl   7      base       running   1      512 MiB   "), "{text}");
    assert_eq!(stdout(&run(&node, &["ps", "-aq"])), "abcdefghijkl\nmnopqrstuvwx\n");
}

#[test]
fn top_is_a_table_of_what_running_sandboxes_use() {
    let node = Node::start();
    let text = stdout(&run(&node, &["top"]));
    let lines: Vec<&str> = text.lines().collect();
    let heading = "ID             CPU TIME   USED    CACHE   MEMORY    HOST   DISK   READ    WRITTEN";
    assert_eq!(lines[0], heading, "{text}");
    assert_eq!(lines[1], "abcdefghijkl   1.23 s     2 MiB           512 MiB                 4 KiB", "{text}");
    assert_eq!(lines.len(), 2, "what ended while it was looked at is left out: {text}");
    // Who is asked for by name and does not run is an error.
    let output = run(&node, &["top", "--json", "abcdefghijkl", "mnopqrstuvwx"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).starts_with("error: BAD_STATE: "), "{}", stderr(&output));
    let document: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!((document.as_array().unwrap().len(), &document[0]["cpu_ms"]), (1, &1234.into()));
}

#[test]
fn update_says_what_it_changed() {
    let node = Node::start();
    assert_eq!(stdout(&run(&node, &["update", "--memory-target", "1G", "sb"])), "sb\n");
    node.await_seen("sandbox.update sb memory_target_mib=1024");
    let output = run(&node, &["--json", "update", "sb", "--memory-target", "64"]);
    let document: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(document["memory_target_mib"], 64);
    assert_eq!(stdout(&run(&node, &["update", "sb", "--cpu-quota", "50", "--disk-iops", "0"])), "sb\n");
    node.await_seen("sandbox.update sb cpu_quota=50 disk_iops=0");
    assert_eq!(run(&node, &["update", "sb"]).status.code(), Some(2));
}

#[test]
fn rm_goes_on_after_a_failure() {
    let node = Node::start();
    let output = run(&node, &["rm", "-f", "a", "nobody", "b"]);
    assert_eq!((stdout(&output).as_str(), output.status.code()), ("a\nb\n", Some(1)));
    node.await_seen("sandbox.remove b force=true");
}

#[test]
fn exec_passes_exit_codes_and_streams_through() {
    let node = Node::start();
    assert_eq!(run(&node, &["exec", "sb", "exit", "137"]).status.code(), Some(137));
    assert_eq!(run(&node, &["exec", "sb", "--", "exit", "0"]).status.code(), Some(0));
    let output = run(&node, &["exec", "sb", "out", "text"]);
    assert_eq!((stdout(&output).as_str(), stderr(&output).as_str()), ("text", ""));
    let output = run(&node, &["exec", "sb", "err", "text"]);
    assert_eq!((stdout(&output).as_str(), stderr(&output).as_str(), output.status.code()), ("", "text", Some(3)));
    let output = run(&node, &["exec", "sb", "missing"]);
    assert_eq!(output.status.code(), Some(127));
    assert_eq!(stderr(&output), "error: EXEC_FAILED: missing: no such file\n");
    assert_eq!(run(&node, &["exec", "nobody", "out", "x"]).status.code(), Some(125));
    assert_eq!(stdout(&run(&node, &["exec", "-d", "sb", "wait"])), "4\n");
    assert_eq!(stdout(&run(&node, &["exec", "-dit", "other", "sh"])), "4\n");
    let request = node.await_seen("exec.start other");
    assert!(request.ends_with("tty=true cols=80 rows=24 stdin=true detach=true"), "{request}");
}

#[test]
fn exec_options_reach_the_node() {
    let node = Node::start();
    let mut command = warren(&node);
    command.env("FROM_HERE", "x=y").env_remove("NOT_SET");
    let output = command
        .args(["exec", "-e", "A=1", "-e", "FROM_HERE", "-e", "NOT_SET", "-w", "/tmp", "-u", "root"])
        .args(["--timeout", "1500ms", "sb", "env"])
        .output()
        .unwrap();
    assert_eq!(stdout(&output), "A=1\nFROM_HERE=x=y");
    let request = node.await_seen("exec.start");
    assert!(request.ends_with("cwd=/tmp user=root timeout_ms=1500"), "{request}");
}

#[test]
fn sixteen_mib_pass_through_stdin_and_stdout_unchanged() {
    let node = Node::start();
    let content: Vec<u8> = (0..16u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut child =
        warren(&node).args(["exec", "-i", "sb", "cat"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let sent = content.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&sent).unwrap());
    let mut back = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut back).unwrap();
    writer.join().unwrap();
    assert_eq!(finish(&mut child), 0);
    assert!(back == content, "{} octets came back of {}", back.len(), content.len());
}

#[test]
fn stdin_is_not_touched_without_i() {
    let node = Node::start();
    let mut child = warren(&node).args(["exec", "sb", "exit", "5"]).stdin(Stdio::piped()).spawn().unwrap();
    assert_eq!(finish(&mut child), 5);
    assert!(!node.await_seen("exec.start").contains("stdin"));
}

#[test]
fn a_reader_that_goes_away_cancels_the_command() {
    let node = Node::start();
    let mut child = warren(&node).args(["exec", "sb", "flood"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut some = [0u8; 1000];
    let mut pipe = child.stdout.take().unwrap();
    pipe.read_exact(&mut some).unwrap();
    drop(pipe);
    assert_eq!(finish(&mut child), 141);
    node.await_seen(" cancel");
}

#[test]
fn a_reader_that_stops_stops_the_command() {
    let node = Node::start();
    let mut child = warren(&node).args(["exec", "sb", "flood"]).stdout(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let rss = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap().to_string();
    let kib: u64 = rss.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(kib < 8 * 1024, "{rss}");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn signals_without_a_terminal_go_to_the_remote_group() {
    let node = Node::start();
    for (signal, name, code) in [(Signal::SIGTERM, "TERM", 143), (Signal::SIGINT, "INT", 130)] {
        node.store.lock().unwrap().seen.clear();
        let mut child = warren(&node).args(["exec", "sb", "wait"]).spawn().unwrap();
        node.await_seen("exec.start");
        kill(Pid::from_raw(child.id() as i32), signal).unwrap();
        assert_eq!(finish(&mut child), code);
        node.await_seen(&format!("exec.signal sb exec=4 signal={name}"));
    }
}

#[test]
fn a_killed_client_is_gone_for_the_node() {
    let node = Node::start();
    let mut child = warren(&node).args(["exec", "sb", "wait"]).spawn().unwrap();
    node.await_seen("exec.start");
    child.kill().unwrap();
    child.wait().unwrap();
    node.await_seen("gone");
}

#[test]
fn run_creates_runs_and_removes() {
    let node = Node::start();
    let output = run(&node, &["run", "--rm", "--vcpus", "2", "base", "err", "oops"]);
    assert_eq!((stderr(&output).as_str(), output.status.code()), ("oops", Some(3)));
    node.await_seen("sandbox.create template=base vcpus=2");
    node.await_seen("sandbox.remove abcdefghijkl force=true");

    let node = Node::start();
    assert_eq!(run(&node, &["run", "none", "exit", "0"]).status.code(), Some(125));
    assert_eq!(run(&node, &["run", "base", "--", "exit", "9"]).status.code(), Some(9));
    assert!(!node.store.lock().unwrap().seen.iter().any(|line| line.contains("sandbox.remove")));
    assert_eq!(stdout(&run(&node, &["run", "-d", "base", "wait"])), "abcdefghijkl\n");
}

#[test]
fn an_interrupt_while_run_creates_cancels_the_creation() {
    let node = Node::start();
    let mut child = warren(&node).args(["run", "--rm", "slow", "exit", "0"]).spawn().unwrap();
    node.await_seen("sandbox.create");
    kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
    assert_eq!(finish(&mut child), 130);
    node.await_seen("1 cancel");
}

#[test]
fn a_shell_without_a_terminal_reads_its_commands_from_stdin() {
    let node = Node::start();
    let mut child = warren(&node).args(["sh", "sb"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"echo hi\n").unwrap();
    assert_eq!(finish(&mut child), 0);
    let request = node.await_seen("exec.start");
    assert!(request.ends_with("exec.start sb /bin/sh stdin=true"), "{request}");
}

#[test]
fn logs_are_printed_as_they_are() {
    let node = Node::start();
    assert_eq!(stdout(&run(&node, &["logs", "sb"])), "[    0.0] Linux\n");
    assert_eq!(stdout(&run(&node, &["logs", "hostile"])), "\x1b]0;owned\x07\tover\n");
    assert!(run(&node, &["logs", "-n", "5", "--guest", "--since", "1h", "sb"]).status.success());
    node.await_seen("sandbox.logs sb source=guest tail=5 since_ms=");
    assert_eq!(run(&node, &["logs", "--since", "1h", "sb"]).status.code(), Some(2), "a console has no times");
}

#[test]
fn a_log_cannot_drive_a_terminal() {
    let node = Node::start();
    let (mut child, mut ours, _theirs) = on_terminal(warren(&node).args(["logs", "hostile"]));
    assert_eq!(read_until(&mut ours, "over\r\n"), "\\x1b]0;owned\\x07\tover\r\n");
    assert!(child.wait().expect("it ends").success());
}

#[test]
fn what_a_slow_reader_lost_is_said_beside_what_is_printed() {
    let node = Node::start();
    let logs = run(&node, &["logs", "-f", "sb"]);
    assert_eq!(stdout(&logs), "[    0.0] Linux\n");
    assert_eq!(stderr(&logs), "warning: at least 5 octets are lost here\n");
    let events = run(&node, &["events", "-f"]);
    assert!(stdout(&events).contains("sandbox.running"), "{}", stdout(&events));
    assert_eq!(stderr(&events), "warning: 7 events are lost here\n");
}

/// The program on a terminal of 100 by 30: the child, our side, and theirs to look at.
fn on_terminal(command: &mut Command) -> (Child, File, File) {
    let size = Winsize { ws_row: 30, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = openpty(&size, None).unwrap();
    let (ours, theirs) = (File::from(pty.master), File::from(pty.slave));
    for (fd, flags) in [(&ours, 1), (&theirs, 1)] {
        nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::from_bits_truncate(flags))).unwrap();
    }
    command.stdin(theirs.try_clone().unwrap()).stdout(theirs.try_clone().unwrap()).stderr(theirs.try_clone().unwrap());
    // SAFETY: between fork and exec only setsid(2) and ioctl(2) are called, both async-signal-safe, on the standard
    // input that was just put in place.
    let child = unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            nix::errno::Errno::result(libc::ioctl(0, libc::TIOCSCTTY, 0))?;
            Ok(())
        })
    }
    .spawn()
    .unwrap();
    (child, ours, theirs)
}

fn read_until(terminal: &mut File, wanted: &str) -> String {
    let mut seen = Vec::new();
    let mut chunk = [0u8; 1024];
    while !String::from_utf8_lossy(&seen).contains(wanted) {
        let n = terminal.read(&mut chunk).unwrap();
        seen.extend_from_slice(&chunk[..n]);
    }
    String::from_utf8_lossy(&seen).into_owned()
}

fn is_raw(terminal: &File) -> bool {
    !tcgetattr(terminal).unwrap().local_flags.contains(LocalFlags::ICANON)
}

#[test]
fn a_terminal_is_raw_while_the_command_runs_follows_its_size_and_is_set_back() {
    let node = Node::start();
    let mut command = warren(&node);
    command.env("TERM", "xterm").args(["exec", "-it", "sb", "size"]);
    let (mut child, mut ours, theirs) = on_terminal(&mut command);
    read_until(&mut ours, "100x30\r\n");
    let request = node.await_seen("exec.start");
    assert!(request.contains("tty=true cols=100 rows=30 stdin=true"), "{request}");
    assert!(request.contains("env=\"TERM=xterm\""), "{request}");
    assert!(is_raw(&theirs));

    let size = Winsize { ws_row: 40, ws_col: 120, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one `winsize`, which outlives the call; the descriptor is open.
    assert_eq!(unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&ours), libc::TIOCSWINSZ, &raw const size) }, 0);
    read_until(&mut ours, "120x40\r\n");

    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(finish(&mut child), 143);
    assert!(!is_raw(&theirs));
    node.await_seen(" cancel");
}

#[test]
fn keys_reach_the_command_as_they_are_and_the_terminal_is_set_back_at_its_end() {
    let node = Node::start();
    let (mut child, mut ours, theirs) = on_terminal(warren(&node).args(["exec", "-it", "sb", "cat"]));
    node.await_seen("exec.start");
    let deadline = Instant::now() + Duration::from_secs(5);
    while !is_raw(&theirs) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    // In raw mode ^C is an octet like any other, and nothing but the command echoes it.
    ours.write_all(b"a\x03b").unwrap();
    assert_eq!(read_until(&mut ours, "b"), "a\x03b");
    kill(Pid::from_raw(child.id() as i32), Signal::SIGHUP).unwrap();
    assert_eq!(finish(&mut child), 129);
    assert!(!is_raw(&theirs));
}

#[test]
fn a_terminal_that_is_attached_to_has_our_size_is_fed_and_is_left_by_a_key() {
    let node = Node::start();
    let (mut child, mut ours, theirs) = on_terminal(warren(&node).args(["attach", "-it", "sb", "4"]));
    let request = node.await_seen("exec.attach");
    assert!(request.ends_with("exec.attach sb exec=4 stdin=true"), "{request}");
    node.await_seen("exec.resize sb exec=4 cols=100 rows=30");
    assert!(is_raw(&theirs));
    ours.write_all(b"a\x03b").unwrap();
    read_until(&mut ours, "a\x03b");
    ours.write_all(b"last\x1dtoo late").unwrap();
    assert_eq!(finish(&mut child), 0);
    assert!(!is_raw(&theirs));
    node.await_seen(" cancel");
    assert!(!node.store.lock().unwrap().seen.iter().any(|line| line.contains("end stdin")), "it stays open");
}

#[test]
fn the_end_of_our_input_ends_that_of_what_is_attached_to() {
    let node = Node::start();
    let mut command = warren(&node);
    let mut child =
        command.args(["attach", "-i", "sb", "4"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"fed").unwrap();
    let mut back = String::new();
    child.stdout.take().unwrap().read_to_string(&mut back).unwrap();
    assert_eq!((finish(&mut child), back.as_str()), (0, "fed"));
    node.await_seen("end stdin");
}

#[test]
fn cp_takes_a_file_both_ways_with_its_mode() {
    let (node, scratch) = (Node::start(), Scratch::new());
    node.put("/", 0o755, None);
    node.put("/dir", 0o755, None);
    let (from, back) = (scratch.path("from"), scratch.path("back"));
    let content: Vec<u8> = (0..3_000_001u32).map(|i| (i % 251) as u8).collect();
    fs::write(&from, &content).unwrap();
    fs::set_permissions(&from, fs::Permissions::from_mode(0o751)).unwrap();
    let cp = |a: &str, b: &str| {
        let output = run(&node, &["cp", a, b]);
        assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""));
    };
    cp(from.to_str().unwrap(), "sb:/dir");
    assert_eq!(node.content("/dir/from"), Some((0o751, Some(content.clone()))));
    cp("sb:/dir/from", back.to_str().unwrap());
    assert!(fs::read(&back).unwrap() == content);
    assert_eq!(fs::metadata(&back).unwrap().permissions().mode() & 0o7777, 0o751);
    // An empty file, and one whose size is the credit: their ends need no credit.
    for size in [0, 256 * 1024] {
        fs::write(&from, vec![1u8; size]).unwrap();
        cp(from.to_str().unwrap(), "sb:/exact");
        assert_eq!(node.content("/exact").unwrap().1.unwrap().len(), size);
    }
    let left: Vec<_> = fs::read_dir(scratch.path(".")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[test]
fn cp_takes_standard_streams() {
    let node = Node::start();
    let mut child = warren(&node).args(["cp", "-", "sb:/x"]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"piped").unwrap();
    assert_eq!(finish(&mut child), 0);
    assert_eq!(node.content("/x"), Some((0o644, Some(b"piped".to_vec()))));
    assert_eq!(stdout(&run(&node, &["cp", "sb:/x", "-"])), "piped");
    // Of a directory it is an archive, and an archive is taken where a directory is.
    node.put("/d", 0o755, None);
    node.put("/d/file", 0o600, Some(b"content"));
    let archive = run(&node, &["cp", "sb:/d", "-"]).stdout;
    assert_eq!(archive.len() % 512, 0);
    node.put("/e", 0o755, None);
    let mut child = warren(&node).args(["cp", "-", "sb:/e"]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&archive).unwrap();
    assert_eq!(finish(&mut child), 0);
    assert_eq!(node.content("/e/d/file"), Some((0o600, Some(b"content".to_vec()))));
    let mut child =
        warren(&node).args(["cp", "-", "sb:/e"]).stdin(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&archive[..700]).unwrap();
    assert_ne!(finish(&mut child), 0, "it ends within a file");
    let output = run(&node, &["cp", "sb:/absent", "-"]);
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(1), "error: NOT_FOUND: there is no /absent\n"));
}

#[test]
fn cp_takes_trees_both_ways() {
    let (node, scratch) = (Node::start(), Scratch::new());
    node.put("/work", 0o755, None);
    let tree = scratch.path("tree");
    fs::create_dir_all(tree.join("a/b")).unwrap();
    fs::write(tree.join("one"), "1").unwrap();
    fs::write(tree.join("a/b/two"), "2").unwrap();
    fs::set_permissions(tree.join("a/b"), fs::Permissions::from_mode(0o555)).unwrap();
    assert_eq!(run(&node, &["cp", tree.to_str().unwrap(), "sb:/work"]).status.code(), Some(0));
    assert_eq!(node.content("/work/tree/a/b/two"), Some((0o644, Some(b"2".to_vec()))));
    assert_eq!(node.content("/work/tree/a/b"), Some((0o555, None)));
    assert_eq!(run(&node, &["cp", tree.join(".").to_str().unwrap(), "sb:/work"]).status.code(), Some(0));
    assert_eq!(node.content("/work/one"), Some((0o644, Some(b"1".to_vec()))));

    let back = scratch.path("back");
    assert_eq!(run(&node, &["cp", "sb:/work/tree", back.to_str().unwrap()]).status.code(), Some(0));
    assert_eq!(fs::read(back.join("a/b/two")).unwrap(), b"2");
    assert_eq!(fs::metadata(back.join("a/b")).unwrap().permissions().mode() & 0o777, 0o555);
    for path in [tree.join("a/b"), back.join("a/b")] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
}

#[test]
fn a_hostile_tree_cannot_write_outside_of_its_directory() {
    let (node, scratch) = (Node::start(), Scratch::new());
    node.put("/t", 0o755, None);
    node.put("/t/ok", 0o644, Some(b"ok"));
    node.put("/t/../escaped", 0o644, Some(b"no"));
    let outside = scratch.path("outside");
    fs::create_dir(&outside).unwrap();
    let entry = |name: &str, kind: &str| Fields::new().with("name", name).with("kind", kind).with("mode", "4755");
    let link = entry("trap", "link").with("target", outside.display());
    let strange = vec![entry("../escaped", "file"), entry("..", "dir"), link, entry("trap", "dir")];
    node.store.lock().unwrap().strange.insert("/t".to_string(), strange);
    node.put("/t/trap/inside", 0o644, Some(b"no"));
    let to = scratch.path("to");
    let output = run(&node, &["cp", "sb:/t", to.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert_eq!(fs::read(to.join("ok")).unwrap(), b"ok");
    assert!(!scratch.path("escaped").exists());
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
}
