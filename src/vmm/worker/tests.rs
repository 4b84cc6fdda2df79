use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::*;

/// A worker on a thread of the test, and its files.
struct Running {
    directory: PathBuf,
    thread: JoinHandle<End>,
}

impl Running {
    fn start() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("warren-worker-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let listener = StdListener::bind(directory.join("socket")).unwrap();
        listener.set_nonblocking(true).unwrap();
        let record = File::create(directory.join("last-words")).unwrap();
        let thread = std::thread::spawn(move || {
            Worker::new(listener).and_then(|worker| worker.run(&LastWords::in_file(record))).unwrap()
        });
        Self { directory, thread }
    }

    fn connect(&self) -> StdStream {
        StdStream::connect(self.directory.join("socket")).unwrap()
    }

    /// Waits for the worker's end; gives it and the record.
    fn end(self) -> (End, String) {
        let end = self.thread.join().unwrap();
        let record = std::fs::read_to_string(self.directory.join("last-words")).unwrap();
        std::fs::remove_dir_all(&self.directory).unwrap();
        (end, record)
    }
}

/// Sends a line and reads one back.
fn ask(stream: &mut StdStream, line: &str) -> String {
    stream.write_all(line.as_bytes()).unwrap();
    read_line(stream)
}

fn read_line(stream: &mut StdStream) -> String {
    let mut line = String::new();
    let mut octet = [0];
    while !line.ends_with('\n') && stream.read(&mut octet).unwrap() == 1 {
        line.push(octet[0] as char);
    }
    line
}

const START: &str =
    "2 vm.start memory_mib=64 cid=3 kvm=fd:0 kernel=fd:1 initramfs=fd:2 serial=fd:3 base=fd:4 overlay=fd:5\n";

/// Sends `vm.start` with six descriptors of /dev/null.
fn start_with_nothing(stream: &StdStream) {
    let null = File::options().read(true).write(true).open("/dev/null").unwrap();
    let control = [ControlMessage::ScmRights(&[null.as_raw_fd(); 6])];
    let line = [IoSlice::new(START.as_bytes())];
    sendmsg::<()>(stream.as_raw_fd(), &line, &control, MsgFlags::empty(), None).unwrap();
}

#[test]
fn requests_that_make_no_sense_are_answered_and_cost_nothing() {
    let worker = Running::start();
    let mut stream = worker.connect();
    assert_eq!(ask(&mut stream, "1 hello\n"), format!("1 ok protocol=1 link={WORKER_LINK} role=worker\n"));
    assert!(ask(&mut stream, "1 sandbox.create\n").starts_with("1 err UNKNOWN_VERB "));
    assert!(ask(&mut stream, "1 hello twice\n").starts_with("1 err UNKNOWN_ARGUMENT "));
    assert!(ask(&mut stream, "1 vm.stats\n").starts_with("1 err BAD_STATE "));
    assert!(ask(&mut stream, "1 vm.stats wait_ms=10001\n").starts_with("1 err OUT_OF_RANGE "));
    assert!(ask(&mut stream, "1 vm.balloon target_mib=64\n").starts_with("1 err BAD_STATE "));
    assert!(ask(&mut stream, "1 vm.renew\n").starts_with("1 err BAD_STATE "));
    assert!(ask(&mut stream, "1 vm.renew 1\n").starts_with("1 err UNKNOWN_ARGUMENT "));
    assert!(ask(&mut stream, "1 vm.limits disk_iops=5\n").starts_with("1 err BAD_STATE "));
    assert!(ask(&mut stream, "1 serial.input \"x\\n\"\n").starts_with("1 err BAD_STATE "));
    assert!(ask(&mut stream, "1 serial.input\n").starts_with("1 err MISSING_ARGUMENT "));
    assert!(ask(&mut stream, "1 vm.balloon\n").starts_with("1 err MISSING_ARGUMENT "));
    assert!(ask(&mut stream, "1 vm.balloon target_mib=31\n").starts_with("1 err OUT_OF_RANGE "));
    assert!(ask(&mut stream, "1 vsock.connect port=1024\n").starts_with("1 err BAD_STATE "));
    assert!(ask(&mut stream, "1 vsock.accept\n").starts_with("1 err MISSING_ARGUMENT "));
    assert!(ask(&mut stream, "1 vm.start memory_mib=1 cid=3\n").starts_with("1 err OUT_OF_RANGE "));
    assert!(ask(&mut stream, START).starts_with("2 err BAD_ARGUMENT "), "no descriptors came with it");
    assert!(ask(&mut stream, "\"\n").starts_with("- err BAD_LINE "));
    assert!(ask(&mut stream, "1 ok\n").starts_with("1 err BAD_LINE "));
    assert!(ask(&mut stream, "1 vm.stop\n").starts_with("1 ok"));
    assert_eq!(worker.end().0.reason, Reason::Stopped);
}

#[test]
fn a_failed_start_is_answered_watched_recorded_and_the_end() {
    let worker = Running::start();
    let mut watcher = worker.connect();
    watcher.write_all(b"w vm.watch\n").unwrap();
    assert!(ask(&mut watcher, "1 hello\n").starts_with("1 ok"), "the watch is in place");
    let mut stream = worker.connect();
    start_with_nothing(&stream);
    assert!(read_line(&mut stream).starts_with("2 err CORRUPT "));
    assert!(read_line(&mut watcher).starts_with("w item event=exited reason=start-failed detail="));
    assert_eq!(read_line(&mut watcher), "w ok\n");
    let (end, record) = worker.end();
    assert_eq!(end.reason, Reason::StartFailed);
    assert!(record.starts_with("- item reason=start-failed detail="), "{record}");
}

#[test]
fn a_worker_that_nobody_started_ends_with_its_last_connection() {
    let worker = Running::start();
    let (mut first, mut second) = (worker.connect(), worker.connect());
    assert!(ask(&mut first, "1 hello\n").starts_with("1 ok"));
    assert!(ask(&mut second, "1 hello\n").starts_with("1 ok"));
    drop(first);
    assert!(ask(&mut second, "2 hello\n").starts_with("2 ok"), "there is still somebody");
    drop(second);
    let (end, record) = worker.end();
    assert_eq!(end.reason, Reason::Stopped);
    assert!(record.contains("nobody is left"), "{record}");
}

#[test]
fn a_cancelled_watch_hears_nothing_more() {
    let worker = Running::start();
    let mut stream = worker.connect();
    stream.write_all(b"w vm.watch\n").unwrap();
    assert!(ask(&mut stream, "w cancel\n").starts_with("w err CANCELLED "));
    assert_eq!(ask(&mut stream, "s vm.stop\n"), "s ok\n");
    assert_eq!(read_line(&mut stream), "", "the connection ends");
    let (end, record) = worker.end();
    assert_eq!(end.reason, Reason::Stopped);
    assert!(record.starts_with("- item reason=stopped "), "{record}");
}

#[test]
fn a_client_that_vanishes_takes_nothing_with_it() {
    let worker = Running::start();
    for octets in [&b"1 vm.watch\n"[..], b"1 vm.sta", b"\xff\xfe\n", b""] {
        worker.connect().write_all(octets).unwrap();
    }
    let mut stream = worker.connect();
    assert_eq!(ask(&mut stream, "1 vm.stop\n"), "1 ok\n");
    assert_eq!(worker.end().0.reason, Reason::Stopped);
}
