//! `warren bridge` between real clients and a pretended QEMU.

#![allow(clippy::unwrap_used)] // a failed unwrap is a failed test

mod fake;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use fake::Scratch;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long anything here may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// One end of a stream of lines.
struct Peer(BufReader<UnixStream>);

impl Peer {
    fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self(BufReader::new(stream))
    }

    fn say(&mut self, text: impl AsRef<[u8]>) {
        self.0.get_mut().write_all(text.as_ref()).unwrap();
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line.trim_end_matches('\n').to_string()
    }

    /// The next line must be this one.
    fn hear(&mut self, wanted: &str) {
        assert_eq!(self.line(), wanted);
    }
}

struct Bridge {
    child: Child,
    qemu: UnixListener,
    listen: PathBuf,
    scratch: Scratch,
}

impl Drop for Bridge {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Bridge {
    fn start() -> Self {
        let scratch = Scratch::new();
        let (chardev, listen) = (scratch.path("qemu.sock"), scratch.path("control.sock"));
        let child = Command::new(env!("CARGO_BIN_EXE_warren"))
            .args(["bridge", "--wait", "10s", "--chardev"])
            .arg(&chardev)
            .arg("--listen")
            .arg(&listen)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // QEMU comes a moment later than its bridge.
        std::thread::sleep(Duration::from_millis(100));
        let qemu = UnixListener::bind(&chardev).unwrap();
        Self { child, qemu, listen, scratch }
    }

    /// The node's end of the port, greeted.
    fn node(&self) -> Peer {
        let mut node = Peer::new(self.qemu.accept().unwrap().0);
        node.say("- item event=port session=s1\n");
        node.hear("");
        node.hear("- port.sync session=s1");
        node
    }

    fn client(&self) -> Peer {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match UnixStream::connect(&self.listen) {
                Ok(stream) => return Peer::new(stream),
                Err(e) => assert!(Instant::now() < deadline, "{e}"),
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn code(&mut self) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the bridge does not end");
    }
}

#[test]
fn two_clients_with_the_same_tags_do_not_see_each_other() {
    let bridge = Bridge::start();
    let mut node = bridge.node();
    let (mut one, mut two) = (bridge.client(), bridge.client());
    one.say("1 exec.start a cat stdin=true\n");
    let first = node.line();
    two.say("1 exec.start b cat stdin=true\n");
    let second = node.line();
    let tag = |line: &str| line.split(' ').next().unwrap().to_string();
    let (a, b) = (tag(&first), tag(&second));
    assert_ne!(a, b);
    assert_eq!(first, format!("{a} exec.start a cat stdin=true"));
    one.say("1 data stdin 3\none\n");
    node.hear(&format!("{a} data stdin 3"));
    node.hear("one");
    node.say(format!("{b} data stdout 3\nto2\n{a} credit stdin 3\n{a} ok exit=1\n{b} ok exit=2\n"));
    for wanted in ["1 credit stdin 3", "1 ok exit=1"] {
        one.hear(wanted);
    }
    for wanted in ["1 data stdout 3", "to2", "1 ok exit=2"] {
        two.hear(wanted);
    }
    let mode = std::fs::metadata(&bridge.listen).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn requests_wait_for_the_node_to_come_up() {
    let bridge = Bridge::start();
    let mut client = bridge.client();
    client.say("x hello\n");
    std::thread::sleep(Duration::from_millis(200));
    let mut node = bridge.node();
    node.hear("1.x hello");
    node.say("1.x ok protocol=1\n");
    client.hear("x ok protocol=1");
}

#[test]
fn a_vanished_clients_requests_are_cancelled_and_a_half_closed_ones_are_answered() {
    let bridge = Bridge::start();
    let mut node = bridge.node();
    let mut half = bridge.client();
    half.say("h hello\n");
    node.hear("1.h hello");
    half.0.get_mut().shutdown(std::net::Shutdown::Write).unwrap();
    let mut gone = bridge.client();
    gone.say("g sandbox.create\ng2 data stdin 1000\nhalf of a frame");
    node.hear("2.g sandbox.create");
    drop(gone);
    node.hear("2.g cancel");
    node.say("2.g err CANCELLED \"\"\n1.h ok\n");
    half.hear("h ok");
    assert_eq!(half.0.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_new_supervisor_ends_what_the_old_one_was_asked() {
    let bridge = Bridge::start();
    let mut node = bridge.node();
    let mut client = bridge.client();
    client.say("1 exec.start a b\n");
    node.hear("1.1 exec.start a b");
    node.say("- item event=port session=s2\n");
    node.hear("");
    node.hear("- port.sync session=s2");
    assert!(client.line().starts_with("1 err NODE_RESTARTED "));
    client.say("1 hello\n");
    node.hear("1.1 hello");
    node.say("1.1 ok\n");
    client.hear("1 ok");
}

#[test]
fn a_node_switched_off_in_the_middle_of_a_frame_is_found_again() {
    let bridge = Bridge::start();
    let mut node = bridge.node();
    let mut client = bridge.client();
    client.say("1 exec.start a b\n");
    node.hear("1.1 exec.start a b");
    node.say("1.1 data stdout 16384\nnot all of it");
    node.say("- item event=port session=s2\n");
    assert!(client.line().starts_with("1 err NODE_RESTARTED "));
    node.hear("");
    node.hear("- port.sync session=s2");
}

#[test]
fn garbage_costs_its_sender_an_answer_and_nobody_else_anything() {
    let bridge = Bridge::start();
    let mut node = bridge.node();
    let (mut bad, mut good) = (bridge.client(), bridge.client());
    good.say("1 sandbox.list\n");
    node.hear("2.1 sandbox.list");
    bad.say(b"\xff\xfe\x00\n7 x \"open\n8 item a=1\n");
    bad.say(vec![b'z'; 70_000]);
    bad.say("\n9 data c 9999999999\n");
    for wanted in
        ["- err BAD_LINE ", "7 err BAD_LINE ", "8 err BAD_LINE ", "- err LINE_TOO_LONG ", "9 err DATA_TOO_LONG "]
    {
        let line = bad.line();
        assert!(line.starts_with(wanted), "{line}");
    }
    good.say("2 hello\n");
    node.hear("2.2 hello");
    node.say("2.2 ok\n2.1 ok\n");
    good.hear("2 ok");
    good.hear("1 ok");
}

#[test]
fn a_client_that_does_not_read_is_dropped_and_the_others_go_on() {
    let bridge = Bridge::start();
    let mut node = bridge.node();
    let (mut slow, mut good) = (bridge.client(), bridge.client());
    slow.say("1 exec.start a flood\n");
    node.hear("1.1 exec.start a flood");
    good.say("1 hello\n");
    node.hear("2.1 hello");
    let frame = [&b"1.1 data stdout 16384\n"[..], &[b'x'; 16384], b"\n"].concat();
    for _ in 0..600 {
        node.say(&frame);
    }
    node.say("2.1 ok\n");
    good.hear("1 ok");
    node.hear("1.1 cancel");
}

#[test]
fn one_clients_upload_does_not_hold_up_anothers_question() {
    let bridge = Bridge::start();
    let mut node = bridge.node();
    let (mut big, mut small) = (bridge.client(), bridge.client());
    big.say("1 file.write a path=/x\n");
    node.hear("1.1 file.write a path=/x");
    let frame = [&b"1 data content 1048576\n"[..], &vec![b'x'; 1 << 20], b"\n"].concat();
    let writer = std::thread::spawn(move || {
        big.say(&frame);
        big.say(&frame);
        big
    });
    std::thread::sleep(Duration::from_millis(300));
    small.say("q hello\n");
    std::thread::sleep(Duration::from_millis(100));
    // The node reads only now: the question must come long before the end of what waits.
    let mut before = 0;
    loop {
        let line = node.line();
        if line == "2.q hello" {
            break;
        }
        let length: usize = line.strip_prefix("1.1 data content ").unwrap().parse().unwrap();
        assert!(length <= 16384);
        node.0.read_exact(&mut vec![0; length + 1]).unwrap();
        before += length;
    }
    assert!(before <= 1 << 20, "{before} octets came first");
    while before < 2 << 20 {
        let line = node.line();
        let length: usize = line.strip_prefix("1.1 data content ").unwrap().parse().unwrap();
        node.0.read_exact(&mut vec![0; length + 1]).unwrap();
        before += length;
    }
    drop(writer.join().unwrap());
}

#[test]
fn the_end_of_qemu_is_the_end_of_the_bridge() {
    let mut bridge = Bridge::start();
    let mut node = bridge.node();
    let mut client = bridge.client();
    client.say("1 node.stop\n");
    node.hear("1.1 node.stop");
    std::fs::remove_file(bridge.scratch.path("qemu.sock")).unwrap();
    drop(node);
    assert!(client.line().starts_with("1 err LINK_LOST "));
    assert_eq!(bridge.code(), Some(0));
    assert!(!bridge.listen.exists());
}

#[test]
fn a_qemu_that_comes_back_is_greeted_again() {
    let bridge = Bridge::start();
    drop(bridge.node());
    let mut node = bridge.node();
    let mut client = bridge.client();
    client.say("1 hello\n");
    let line = node.line();
    assert!(line.ends_with(".1 hello"), "{line}");
}

#[test]
fn a_signal_ends_the_bridge_and_removes_its_socket() {
    let mut bridge = Bridge::start();
    let _node = bridge.node();
    drop(bridge.client());
    kill(Pid::from_raw(bridge.child.id() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(bridge.code(), Some(0));
    assert!(!bridge.listen.exists());
}

#[test]
fn a_socket_in_use_is_refused_and_a_stale_one_replaced() {
    let scratch = Scratch::new();
    let listen = scratch.path("control.sock");
    let start = || {
        Command::new(env!("CARGO_BIN_EXE_warren"))
            .args(["bridge", "--wait", "0s", "--chardev", "/nonexistent", "--listen"])
            .arg(&listen)
            .output()
            .unwrap()
    };
    let used = UnixListener::bind(&listen).unwrap();
    let output = start();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).starts_with("error: LOCAL_IO: cannot listen at "));
    assert!(listen.exists());
    drop(used);
    let output = start();
    assert!(String::from_utf8_lossy(&output.stderr).starts_with("error: CONNECT_FAILED: QEMU's socket /nonexistent "));
    assert!(!listen.exists());
}
