//! A worker of the test's own, on the node and without the supervisor: what `warren vmm` does with its descriptors,
//! its requests and its guest, down to its last words.
//!
//! Runs on the node as root (`vm-rig` does, see docs/testing.md). Everything here panics when it fails, as a test
//! does: the message is what the test outside shows.
//!
//! ```no_run
//! let vm = qemu_tests::rig::Setup::new().vcpus(2).start();
//! assert_eq!(vm.sh("nproc"), "2\n");
//! assert_eq!(vm.stop().reason, "stopped");
//! ```

pub mod outside;
mod process;
mod tap;

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use warren::sandbox::worker::{AGENT_PORT, LastWords, send_with_descriptors};
use warren::storage::overlay;
use warren::wire::{Error, Fields, Message, Request};

use crate::client::{Client, Reply};
use crate::connection::Connection;
use crate::files::TempDir;
use crate::timing;

pub use process::{Worker, overhead_kib};
pub use tap::{Tap, TapFlags, own_network, switch_on};

/// What the node's image has for its guests.
const SHARE: &str = "/usr/share/warren";
const MIB: u64 = 1 << 20;

/// A microVM to be started: base template, 1 processor, 128 MiB, a disk of 512 MiB, unless told otherwise.
#[derive(Debug)]
pub struct Setup {
    kernel: PathBuf,
    initramfs: PathBuf,
    base: PathBuf,
    places: Option<PathBuf>,
    disk_mib: u64,
    vcpus: u8,
    memory_mib: u64,
    command_line: String,
    keys: Vec<(String, String)>,
    /// State, memory and overlay of a snapshot, instead of a kernel.
    snapshot: Option<(File, File, PathBuf)>,
    /// That overlay is shared, below an empty one.
    shares_disk: bool,
    /// Key, what stands before `fd:N` in its value, descriptor.
    descriptors: Vec<(String, String, OwnedFd)>,
    working_set: Option<File>,
    prepare: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self::new()
    }
}

impl Setup {
    /// The node's own guest.
    pub fn new() -> Self {
        let share = Path::new(SHARE);
        Self {
            kernel: share.join("vmlinux"),
            initramfs: share.join("initramfs.img"),
            base: share.join("templates/base/rootfs.img"),
            places: None,
            disk_mib: 512,
            vcpus: 1,
            memory_mib: 128,
            command_line: String::new(),
            keys: Vec::new(),
            snapshot: None,
            shares_disk: false,
            descriptors: Vec::new(),
            working_set: None,
            prepare: false,
        }
    }

    /// With what such guests touch at once, for a restored one.
    pub fn working_set(mut self, set: &File) -> Self {
        self.working_set = Some(set.try_clone().expect("a descriptor can be copied"));
        self
    }

    /// With all of a snapshot that can be made before made by `vm.prepare`: `Vm::prepared` is the worker's answer.
    pub fn prepared(mut self) -> Self {
        self.prepare = true;
        self
    }

    /// What that snapshot was taken of, going on where it stood, with a copy of its disk.
    pub fn restored(mut self, snapshot: &Snapshot) -> Self {
        (self.vcpus, self.memory_mib) = (snapshot.vcpus, snapshot.memory_mib);
        let path = |name: &str| snapshot.home.path().join(name);
        self.snapshot = Some((open(&path("state")), open(&path("memory")), path("overlay")));
        self
    }

    /// The same with an empty overlay over its disk, which all clones share.
    pub fn cloned(self, snapshot: &Snapshot) -> Self {
        Self { shares_disk: true, ..self.restored(snapshot) }
    }

    /// With that many processors.
    pub fn vcpus(mut self, vcpus: u8) -> Self {
        self.vcpus = vcpus;
        self
    }

    /// With that much memory.
    pub fn memory_mib(mut self, memory_mib: u64) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// With a root disk of that size.
    pub fn disk_mib(mut self, disk_mib: u64) -> Self {
        self.disk_mib = disk_mib;
        self
    }

    /// With its overlay, log and socket in a new directory below this one (on the data disk, say) instead of in memory.
    pub fn places_below(mut self, directory: &Path) -> Self {
        self.places = Some(directory.to_path_buf());
        self
    }

    /// With these kernel parameters after the worker's own.
    pub fn command_line(mut self, text: &str) -> Self {
        self.command_line = text.to_string();
        self
    }

    /// With another kernel and no initramfs: a guest without Linux, which has no agent.
    pub fn bare_kernel(mut self, kernel: &Path) -> Self {
        self.kernel = kernel.to_path_buf();
        self.initramfs = PathBuf::from("/dev/null");
        self
    }

    /// With another base image under the root disk.
    pub fn base(mut self, base: &Path) -> Self {
        self.base = base.to_path_buf();
        self
    }

    /// With one more key of `vm.start`.
    pub fn set(mut self, key: &str, value: impl ToString) -> Self {
        self.keys.push((key.to_string(), value.to_string()));
        self
    }

    /// With one more descriptor: `key=fd:N` in `vm.start`, N being its place.
    pub fn descriptor(self, key: &str, descriptor: impl Into<OwnedFd>) -> Self {
        self.descriptor_with(key, "", descriptor)
    }

    /// The same with something before `fd:N`: `descriptor_with("disk", "data:rw:", file)`.
    pub fn descriptor_with(mut self, key: &str, prefix: &str, descriptor: impl Into<OwnedFd>) -> Self {
        self.descriptors.push((key.to_string(), prefix.to_string(), descriptor.into()));
        self
    }

    /// Starts it; the guest runs when this returns. `Vm::agent` waits for more.
    ///
    /// # Panics
    /// When the worker refuses.
    pub fn start(self) -> Vm {
        self.try_start().unwrap_or_else(|(error, words)| panic!("vm.start failed: {error}; last words: {words:?}"))
    }

    /// The same for a start that may be refused: gives the worker's error and last words (`stopped`, by the rig, when
    /// it did not understand the request).
    pub fn try_start(self) -> Result<Vm, (Error, Option<LastWords>)> {
        let home = match &self.places {
            Some(parent) => TempDir::below(parent),
            None => TempDir::new(),
        };
        let home = home.expect("a directory can be made");
        let path = |name: &str| home.path().join(name);
        let create = |name: &str| {
            let file = File::options().read(true).write(true).create_new(true).open(path(name));
            file.unwrap_or_else(|e| panic!("{name} cannot be made: {e}"))
        };
        let base = open(&self.base);
        // Of a block device as well.
        let base_bytes = (&base).seek(SeekFrom::End(0)).expect("a base has a size");
        let overlay = create("overlay");
        let frozen = self.snapshot.as_ref().map(|(.., overlay)| open(overlay));
        if let Some(frozen) = frozen.as_ref().filter(|_| !self.shares_disk) {
            copy_sparse(frozen, &overlay);
        } else {
            overlay::create(&overlay, self.disk_mib * MIB, base_bytes, [0; 32]).expect("an overlay can be made");
        }
        create("serial");
        let serial = File::options().read(true).append(true).open(path("serial")).expect("it was just made");
        let listener = UnixListener::bind(path("socket")).expect("a socket can be bound");
        listener.set_nonblocking(true).expect("a socket takes flags");
        let last_words = create("last-words");
        let process = Worker::spawn(&listener, &last_words, &path("log"));

        let kvm = File::options().read(true).write(true).open("/dev/kvm").expect("the node has KVM");
        let mut request =
            Request::new("start", "vm.start").set("vcpus", self.vcpus).set("memory_mib", self.memory_mib).set("cid", 3);
        let source = match self.snapshot {
            Some((state, memory, _)) => [("state", state), ("memory", memory)],
            None => {
                request = request.set("cmdline", &self.command_line);
                [("kernel", open(&self.kernel)), ("initramfs", open(&self.initramfs))]
            }
        };
        let stream = UnixStream::connect(path("socket")).expect("the worker's socket exists");
        stream.set_read_timeout(Some(timing::hang())).expect("a socket takes a time limit");
        let mut prepared = None;
        if self.prepare {
            let mut request = Request::new("prepare", "vm.prepare").set("name", "rig").set("vcpus", self.vcpus);
            request = request.set("memory_mib", self.memory_mib);
            let mut descriptors = vec![("kvm", kvm.as_fd())];
            descriptors.extend(source.iter().map(|(key, file)| (*key, file.as_fd())));
            descriptors.extend(self.working_set.as_ref().map(|set| ("working_set", set.as_fd())));
            for (index, (key, _)) in descriptors.iter().enumerate() {
                request = request.set(key, format!("fd:{index}"));
            }
            let raw: Vec<_> = descriptors.iter().map(|(_, descriptor)| *descriptor).collect();
            let began = Instant::now();
            send_with_descriptors(&stream, request, &raw).expect("vm.prepare can be sent");
            match Connection::over(stream.try_clone().expect("a descriptor can be copied")).receive() {
                Ok(Message::Ok { fields, .. }) => prepared = Some((fields, began.elapsed())),
                other => panic!("vm.prepare gave {other:?}"),
            }
        }
        let own = [("kvm", kvm), ("serial", serial), ("base", base), ("overlay", overlay)];
        let layer = frozen.filter(|_| self.shares_disk).map(|layer| ("layer", layer));
        let own = own.into_iter().chain(source).chain(layer);
        let mut descriptors: Vec<(String, String, OwnedFd)> =
            own.map(|(key, file)| (key.to_string(), String::new(), file.into())).collect();
        descriptors.extend(self.descriptors);
        descriptors.extend(self.working_set.map(|set| ("working_set".to_string(), String::new(), set.into())));
        if self.prepare {
            request = request.set("prepared", "rig");
        }
        for (index, (key, prefix, _)) in descriptors.iter().enumerate() {
            request = request.set(key, format!("{prefix}fd:{index}"));
        }
        for (key, value) in &self.keys {
            request = request.set(key, value);
        }
        let began = Instant::now();
        let raw: Vec<_> = descriptors.iter().map(|(_, _, descriptor)| descriptor.as_fd()).collect();
        send_with_descriptors(&stream, request, &raw).expect("vm.start can be sent");
        // Open until a worker that refused is told to stop: it ends when nobody is left who could start it.
        let mut connection = Connection::over(stream);
        let answer = connection.receive();
        let vm = Vm {
            home,
            process,
            shape: (self.vcpus, self.memory_mib),
            prepared,
            began,
            took: began.elapsed(),
            control: OnceLock::new(),
            agent: OnceLock::new(),
        };
        match answer.unwrap_or_else(|e| panic!("no answer to vm.start ({e}); the worker's log: {}", vm.log())) {
            Message::Ok { .. } => Ok(vm),
            // A request that it does not understand leaves the worker waiting for another one.
            Message::Err { error, .. } => Err((error, vm.stop().words)),
            other => panic!("{other:?} is no answer to vm.start"),
        }
    }
}

/// Writes a file in an agent's guest.
fn write_file(agent: &Client, path: &str, mode: u32, content: &[u8]) {
    let request = Request::new("", "file.write").set("path", path).set("mode", format!("{mode:04o}"));
    let call = agent.start(request.set("user", 0));
    assert!(call.writer().write("content", content), "writing {path} in the guest broke off");
    call.writer().end("content");
    call.finish_ok();
}

/// `Vm::put_guest_tool` for any guest with an agent.
pub fn put_guest_tool(agent: &Client) -> &'static str {
    let own = std::env::current_exe().expect("a running program has a path");
    let tool = fs::read(own.with_file_name("guest-tool")).expect("guest-tool lies beside this program");
    write_file(agent, "/run/guest-tool", 0o755, &tool);
    "/run/guest-tool"
}

/// Copies a file and leaves its holes holes: the node's memory is what it is copied to.
fn copy_sparse(from: &File, to: &File) {
    let len = from.metadata().expect("a file has a length").len();
    to.set_len(len).expect("a file can be made longer");
    let mut page = vec![0; 64 << 10];
    let mut at = 0;
    loop {
        // SAFETY: takes plain numbers; -1 where there is no more data.
        let data = unsafe { libc::lseek(from.as_fd().as_raw_fd(), at as i64, libc::SEEK_DATA) };
        let Ok(data) = u64::try_from(data) else { return };
        let count = from.read_at(&mut page, data).expect("a file can be read");
        to.write_all_at(&page[..count], data).expect("a file can be copied");
        at = data + count as u64;
    }
}

fn open(path: &Path) -> File {
    File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// How a worker ended.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status: 0 for an orderly end.
    pub status: std::process::ExitStatus,
    /// What it left in its last-words file.
    pub words: Option<LastWords>,
    /// The word of its last words, "" where there are none.
    pub reason: String,
    /// What the guest wrote to its serial port.
    pub serial: String,
    /// What the worker wrote to its standard error.
    pub log: String,
}

/// A snapshot: the files that `Setup::restored` takes.
#[derive(Debug)]
pub struct Snapshot {
    home: TempDir,
    vcpus: u8,
    memory_mib: u64,
    /// What the worker had written to its standard error.
    pub log: String,
}

impl Snapshot {
    /// One of its files: `state`, `memory` or `overlay`.
    pub fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    /// What its memory takes on the medium, in octets.
    pub fn memory_bytes(&self) -> u64 {
        fs::metadata(self.path("memory")).expect("it has memory").blocks() * 512
    }
}

/// A running microVM. Dropping it kills its worker.
#[derive(Debug)]
pub struct Vm {
    process: Worker,
    /// Processors and MiB of memory.
    shape: (u8, u64),
    /// What the worker said to `vm.prepare`, and how long that took.
    pub prepared: Option<(Fields, Duration)>,
    began: Instant,
    took: Duration,
    control: OnceLock<Client>,
    agent: OnceLock<Client>,
    home: TempDir,
}

impl Vm {
    /// A new connection to the worker's socket.
    pub fn connect(&self) -> Client {
        Client::open(&self.socket()).expect("the worker listens")
    }

    /// The worker's socket.
    pub fn socket(&self) -> PathBuf {
        self.home.path().join("socket")
    }

    /// What its files take where they are, in KiB: overlay, console's log and the others.
    pub fn files_kib(&self) -> u64 {
        let names = fs::read_dir(self.home.path()).into_iter().flatten().flatten();
        names.map(|entry| entry.metadata().map_or(0, |meta| meta.blocks() / 2)).sum()
    }

    /// When `vm.start` was sent.
    pub fn began(&self) -> Instant {
        self.began
    }

    /// How long it took the worker to answer that: the guest ran then.
    pub fn took(&self) -> Duration {
        self.took
    }

    /// The connection to the worker that this value uses itself.
    pub fn control(&self) -> &Client {
        self.control.get_or_init(|| self.connect())
    }

    /// The worker's process.
    pub fn process(&self) -> &Worker {
        &self.process
    }

    /// The link to the guest's agent; the first call waits for it and configures the guest as the supervisor does.
    ///
    /// # Panics
    /// When the agent does not come; the message has the console's end.
    pub fn agent(&self) -> &Client {
        self.agent.get_or_init(|| {
            let link = self.connect();
            link.ok(Request::new("", "vsock.accept").set("port", AGENT_PORT));
            let end = Instant::now() + timing::hang() * 2;
            let greeting = loop {
                if let Some(message) = link.stray_within("hello", Duration::from_millis(200)) {
                    break message;
                }
                let why = if let Some(why) = link.closed() {
                    why
                } else if Instant::now() > end {
                    "it is silent".to_string()
                } else {
                    continue;
                };
                panic!("no agent: {why}; the console ends with:\n{}", tail(&self.serial(), 30));
            };
            assert!(matches!(greeting, Message::Ok { .. }), "the agent greets with {greeting:?}");
            let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
            let configure = Request::new("", "system.configure").set("hostname", "rig").set("clock_ns", clock);
            link.ok(configure.set("grow", true));
            link
        })
    }

    /// Takes a snapshot and ends it. `page_map` says whether its worker is told which pages it has: without, all of its
    /// memory is looked at.
    pub fn freeze(self, page_map: bool) -> Snapshot {
        let (snapshot, captured) = self.capture(page_map, true, false);
        assert!(snapshot.memory_bytes() > 0, "{captured:?}");
        self.end_frozen(snapshot)
    }

    /// Ends it, held as it is, and takes its disk as the snapshot's.
    pub fn end_frozen(self, mut snapshot: Snapshot) -> Snapshot {
        let overlay = self.home.path().join("overlay");
        // Its file is gone with its directory.
        let kept = open(&overlay);
        let end = self.stop();
        assert_eq!(end.reason, "stopped", "{end:?}");
        let copy = File::create_new(snapshot.home.path().join("overlay")).expect("a file can be made");
        copy_sparse(&kept, &copy);
        snapshot.log = end.log;
        snapshot
    }

    /// Takes a snapshot; with `hold` the guest stands still afterwards, with `diff` the memory is what differs from what
    /// it was restored from. The reply to `vm.capture` comes with it.
    pub fn capture(&self, page_map: bool, hold: bool, diff: bool) -> (Snapshot, Fields) {
        let home = TempDir::new().expect("a directory can be made");
        let create = |name: &str| {
            let file = File::options().read(true).write(true).create_new(true).open(home.path().join(name));
            file.expect("a file can be made")
        };
        let (vcpus, memory_mib) = self.shape;
        let (state, memory) = (create("state"), create("memory"));
        memory.set_len(memory_mib * MIB).expect("a file can be made longer");
        let (mut read, write) = io::pipe().expect("a pipe can be made");
        let mut descriptors: Vec<OwnedFd> = vec![state.into(), memory.into(), write.into()];
        let mut request = Request::new("capture", "vm.capture").set("state", "fd:0").set("memory", "fd:1");
        request = request.set("done", "fd:2").set("hold", hold).set("diff", diff);
        if page_map {
            descriptors.push(open(Path::new(&format!("/proc/{}/pagemap", self.process.pid()))).into());
            request = request.set("page_map", "fd:3");
        }
        let stream = UnixStream::connect(self.home.path().join("socket")).expect("the worker's socket exists");
        stream.set_read_timeout(Some(timing::hang())).expect("a socket takes a time limit");
        let raw: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        send_with_descriptors(&stream, request, &raw).expect("vm.capture can be sent");
        drop(descriptors);
        let captured = match Connection::over(stream).receive() {
            Ok(Message::Ok { fields, .. }) => fields,
            other => panic!("vm.capture gave {other:?}; the worker's log: {}", self.log()),
        };
        let mut done = Vec::new();
        read.read_to_end(&mut done).expect("a pipe can be read");
        assert_eq!(done, [0; 4], "the child says so when all is written");
        (Snapshot { home, vcpus, memory_mib, log: String::new() }, captured)
    }

    /// Has the worker write down which pages of its memory file the guest has changed so far. Gives the file and how many.
    pub fn working_set(&self) -> (File, u64) {
        let path = self.home.path().join("working-set");
        let into = File::options().read(true).write(true).create(true).truncate(true).open(&path);
        let into = into.expect("a file can be made");
        let page_map = open(Path::new(&format!("/proc/{}/pagemap", self.process.pid())));
        let stream = UnixStream::connect(self.socket()).expect("the worker's socket exists");
        stream.set_read_timeout(Some(timing::hang())).expect("a socket takes a time limit");
        let request = Request::new("set", "vm.working_set").set("page_map", "fd:0").set("into", "fd:1");
        send_with_descriptors(&stream, request, &[page_map.as_fd(), into.as_fd()]).expect("it can be sent");
        match Connection::over(stream).receive() {
            Ok(Message::Ok { fields, .. }) => (into, fields.number("pages").expect("it says how many")),
            other => panic!("vm.working_set gave {other:?}; the worker's log: {}", self.log()),
        }
    }

    /// The link to a restored guest's agent.
    pub fn restored_agent(&self) -> &Client {
        self.agent.get_or_init(|| {
            let link = self.connect();
            link.ok(Request::new("", "vsock.connect").set("port", AGENT_PORT));
            link
        })
    }

    /// The request that runs a command in the guest as root.
    pub fn exec_request(&self, argv: &[&str]) -> Request {
        // A restored guest knows the programs of its former life.
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let request = argv.iter().fold(Request::new("", "exec.start"), |request, word| request.arg(word));
        request.set("id", id).set("user", 0).set("cwd", "/")
    }

    /// Runs a command in the guest as root; the whole reply is for the caller to judge.
    pub fn exec(&self, argv: &[&str]) -> Reply {
        self.agent().ok(self.exec_request(argv))
    }

    /// Runs a line of shell in the guest as root and gives what it printed.
    ///
    /// # Panics
    /// When it does not end with 0.
    pub fn sh(&self, script: &str) -> String {
        let reply = self.exec(&["sh", "-c", script]);
        let (out, err) = (reply.text("stdout"), reply.text("stderr"));
        assert_eq!(reply.field("exit"), "0", "in the guest `{script}` said {out:?} and {err:?}");
        out
    }

    /// Writes a file in the guest.
    pub fn write_file(&self, path: &str, mode: u32, content: &[u8]) {
        write_file(self.agent(), path, mode, content);
    }

    /// Reads a file of the guest.
    pub fn read_file(&self, path: &str) -> Vec<u8> {
        let mut reply = self.agent().ok(Request::new("", "file.read").set("path", path));
        reply.data.remove("content").unwrap_or_default()
    }

    /// Puts `guest-tool` into the guest as /run/guest-tool (see docs/testing.md) and gives that path.
    pub fn put_guest_tool(&self) -> &'static str {
        put_guest_tool(self.agent())
    }

    /// `vm.stats`.
    pub fn stats(&self) -> Fields {
        self.control().ok(Request::new("", "vm.stats")).fields
    }

    /// One number of `vm.stats`.
    pub fn stat(&self, key: &str) -> u64 {
        let stats = self.stats();
        stats.number(key).unwrap_or_else(|| panic!("vm.stats has no {key}: {stats:?}"))
    }

    /// What the guest wrote to its serial port so far.
    pub fn serial(&self) -> String {
        text(&self.home.path().join("serial"))
    }

    /// What the worker wrote to its standard error so far.
    pub fn log(&self) -> String {
        text(&self.home.path().join("log"))
    }

    /// Whether its worker has ended.
    pub fn has_ended(&mut self) -> bool {
        self.process.wait(Duration::ZERO).is_some()
    }

    /// A connection for messages, which gives errors where `connect` panics; reads give up after `timing::hang()`.
    pub fn open(&self) -> io::Result<Connection> {
        let connection = Connection::open(&self.home.path().join("socket"))?;
        connection.stream().set_read_timeout(Some(timing::hang()))?;
        Ok(connection)
    }

    /// Ends it by `vm.stop`.
    pub fn stop(self) -> Ended {
        // It may end by itself meanwhile, and its socket with it.
        let control = Client::open(&self.home.path().join("socket"));
        let _call = control.map(|control| control.start(Request::new("", "vm.stop")));
        self.wait(timing::hang())
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it does not end in time.
    pub fn wait(mut self, limit: Duration) -> Ended {
        let Some(status) = self.process.wait(limit) else {
            panic!(
                "the worker runs on after {limit:?}; its log: {}\nthe console ends with:\n{}",
                self.log(),
                tail(&self.serial(), 30)
            );
        };
        let words = LastWords::read(&self.home.path().join("last-words"));
        let reason = words.as_ref().map(|words| words.reason.clone()).unwrap_or_default();
        Ended { status, reason, words, serial: self.serial(), log: self.log() }
    }
}

fn text(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).replace('\r', "")
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
