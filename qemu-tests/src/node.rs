//! A booted node: how it is started, how the tests reach it, how it ends.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use warren::wire::{Fields, Message, Request};

use crate::artefacts::{self, Artefact};
use crate::client::{Client, Reply};
use crate::console::{self, Console};
use crate::cpio::Archive;
use crate::files::{Disk, TempDir};
use crate::machine::{Clock, Config, Firmware, Machine, host_kernel};
use crate::process::Process;
use crate::sandbox::Sandbox;
use crate::timing;

/// Disk of the data partition that the node grows its file system to.
pub const DATA_DISK_OCTETS: u64 = 8 << 30;

/// How long an emulated node may sleep through.
const AWAKE: Duration = Duration::from_secs(1);

/// A node to be booted.
#[derive(Debug)]
pub struct Boot {
    image: Option<Disk>,
    data: Option<Disk>,
    templates: Vec<PathBuf>,
    files: Vec<(String, u32, Vec<u8>)>,
    cmdline: Vec<String>,
    clock: Clock,
    cpus: u32,
    memory_mib: u32,
    allowed: Vec<String>,
    logged: bool,
    root_port: bool,
    service: String,
}

impl Boot {
    /// Boots the kernel directly, with a fresh data disk. The tests' programs are on the node under /test.
    pub fn kernel() -> Self {
        let data = Disk::copy_of(&Artefact::DataImage.path(), DATA_DISK_OCTETS).expect("the data disk can be copied");
        Self { data: Some(data), ..Self::bare() }
    }

    /// Boots the disk image under UEFI firmware, as a user would. Nothing is added to it, so there is no
    /// `Node::run`.
    pub fn image() -> Self {
        let image = Disk::copy_of(&Artefact::DiskImage.path(), 0).expect("the disk image can be copied");
        Self { image: Some(image), root_port: false, ..Self::bare() }
    }

    /// Boots the kernel directly without any disk: all the node's data is in memory.
    pub fn diskless() -> Self {
        Self::bare()
    }

    fn bare() -> Self {
        Self {
            image: None,
            data: None,
            templates: Vec::new(),
            files: Vec::new(),
            cmdline: Vec::new(),
            clock: Clock::Wall,
            cpus: timing::processors(),
            memory_mib: 4096,
            allowed: Vec::new(),
            logged: false,
            root_port: true,
            service: "/test/burrow --serve /dev/virtio-ports/org.warren.test.0".to_string(),
        }
    }

    /// With this data disk instead of a fresh one.
    pub fn data_disk(mut self, disk: Disk) -> Self {
        self.data = Some(disk);
        self
    }

    /// With a log of what is written to the data disk: `writes` reads it.
    pub fn log_writes(mut self) -> Self {
        self.logged = true;
        self
    }

    /// With this disk, which the image was written to once, instead of a fresh copy.
    pub fn image_disk(mut self, disk: Disk) -> Self {
        self.image = Some(disk);
        self
    }

    /// With a disk of templates; the shipped one is `Artefact::TemplateDisk`. The node imports from it after
    /// its start, which takes seconds.
    pub fn template_disk(mut self, path: &Path) -> Self {
        self.templates.push(path.to_path_buf());
        self
    }

    /// With a file in the node's root, in place of the one there.
    pub fn file(mut self, path: &str, mode: u32, content: Vec<u8>) -> Self {
        self.files.push((path.to_string(), mode, content));
        self
    }

    /// With one more parameter of the host kernel.
    pub fn parameter(mut self, parameter: &str) -> Self {
        self.cmdline.push(parameter.to_string());
        self
    }

    /// With virtual time, for measurements: one CPU, one instruction a nanosecond.
    pub fn virtual_time(mut self) -> Self {
        self.clock = Clock::Virtual;
        self.cpus = 1;
        self
    }

    /// With this much memory instead of 4 GiB.
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// With this program (a path and arguments) on the node instead of the agent behind `Node::run`.
    pub fn only_service(mut self, argv: &str) -> Self {
        self.service = argv.to_string();
        self.root_port = false;
        self
    }

    /// Console lines that contain this are no fault in this test.
    pub fn allow(mut self, text: &str) -> Self {
        self.allowed.push(text.to_string());
        self
    }

    /// Boots, and waits until the control socket answers. A node that QEMU's software CPU has made fall over is booted once
    /// more, and that is printed (docs/testing.md, "Known").
    ///
    /// # Panics
    /// When the node does not come up; the message ends with the console's last lines.
    pub fn start(self) -> Node {
        let (has_image, again) = (self.image.is_some(), self.without_disks());
        let node = self.power_on();
        let Err(why) = node.ready() else { return node };
        let emulated = !timing::hardware_virtualization();
        assert!(emulated && console::has_impossible_flags(&node.console_text()), "{why}");
        println!("the emulated processor had flags that none can have; the node is booted once more. {why}");
        let mut disks = node.fallen().into_iter();
        let image = if has_image { disks.next() } else { None };
        let node = Self { image, data: disks.next(), ..again }.power_on();
        node.wait_until_ready();
        node
    }

    /// The same, with no disk that is written to.
    fn without_disks(&self) -> Self {
        Self {
            image: None,
            data: None,
            templates: self.templates.clone(),
            files: self.files.clone(),
            cmdline: self.cmdline.clone(),
            allowed: self.allowed.clone(),
            service: self.service.clone(),
            ..*self
        }
    }

    /// Boots, and returns at once: for a node that is not expected to come up.
    pub fn power_on(self) -> Node {
        let dir = TempDir::new().expect("a temporary directory can be made");
        let firmware = if self.image.is_some() {
            Firmware::Uefi
        } else {
            let (kernel, parameters) = host_kernel();
            let initramfs = self.initramfs(dir.path());
            let mut cmdline = parameters.to_string();
            for parameter in &self.cmdline {
                cmdline.push(' ');
                cmdline.push_str(parameter);
            }
            cmdline.push_str(&format!(" \"warren.service={}\"", self.service));
            Firmware::Kernel { kernel, initramfs, cmdline }
        };
        let disks: Vec<Disk> = self.image.into_iter().chain(self.data).collect();
        let config = Config {
            firmware,
            clock: self.clock,
            cpus: self.cpus,
            memory_mib: self.memory_mib,
            disks: disks.iter().collect(),
            logged: self.logged,
            read_only: self.templates,
        };
        let machine = Machine::start(&config, dir).unwrap_or_else(|e| panic!("QEMU does not start: {e}"));
        let console = Mutex::new(machine.console());
        let bridge = start_bridge(&machine);
        let root = self.root_port.then(|| Client::open(&machine.port("test")).expect("QEMU listens for the test port"));
        if let (Clock::Wall, Some(root)) = (self.clock, &root)
            && !timing::hardware_virtualization()
        {
            keep_awake(root.clone());
        }
        Node {
            control: OnceLock::new(),
            root,
            root_greeted: OnceLock::new(),
            rig_there: OnceLock::new(),
            bridge,
            machine,
            disks,
            console,
            allowed: self.allowed,
        }
    }

    /// The node's initramfs with the tests' archive behind it.
    fn initramfs(&self, dir: &Path) -> PathBuf {
        let busybox = artefacts::busybox(dir);
        let mut archive = Archive::new();
        archive.directory("/test");
        archive.directory("/test/bin");
        archive.file("/test/bin/busybox", 0o755, &read(&busybox));
        for applet in applets(&busybox) {
            archive.link(&format!("/test/bin/{applet}"), "busybox");
        }
        archive.file("/test/burrow", 0o755, &read(&Artefact::Burrow.path()));
        archive.file("/test/bin/node-tool", 0o755, &read(&artefacts::node_tool("node-tool")));
        // The node's own limits are for hardware.
        let seconds = (30 * timing::factor()).min(600);
        let configuration = format!(
            "[sandbox]\nboot_timeout_s = {seconds}\nstop_timeout_s = {seconds}\n[health]\nprobe_timeout_s = {seconds}\n"
        );
        archive.file("/etc/warren/warren.toml", 0o644, configuration.as_bytes());
        for (path, mode, content) in &self.files {
            archive.file(path, *mode, content);
        }
        let path = dir.join("initramfs");
        let mut whole = read(&Artefact::HostInitramfs.path());
        whole.resize(whole.len().next_multiple_of(512), 0);
        whole.extend_from_slice(&archive.finish());
        fs::write(&path, whole).expect("the temporary directory takes an initramfs");
        path
    }
}

fn read(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap_or_else(|e| panic!("{} cannot be read: {e}", path.display()))
}

fn applets(busybox: &Path) -> Vec<String> {
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(busybox, executable).expect("a file of ours takes a new mode");
    let output = Command::new(busybox).arg("--list").output().expect("a static busybox runs anywhere");
    String::from_utf8_lossy(&output.stdout).lines().filter(|name| *name != "busybox").map(str::to_string).collect()
}

fn start_bridge(machine: &Machine) -> Process {
    let mut command = Command::new(Artefact::Warren.path());
    command.arg("bridge").arg("--chardev").arg(machine.port("control"));
    command.arg("--listen").arg(machine.dir().join("control.sock"));
    let log = fs::File::create(machine.dir().join("bridge.log")).expect("the temporary directory takes a log");
    command.stdin(std::process::Stdio::null());
    command.stdout(log.try_clone().expect("a descriptor can be cloned")).stderr(log);
    Process::spawn(command).unwrap_or_else(|e| panic!("`warren bridge` does not start: {e}"))
}

/// Asks something of the agent on the node again and again, until the node is gone. QEMU's software CPU loses an interrupt
/// now and then and sleeps on with it pending; the next one, which this brings, wakes it (docs/testing.md, "Known").
fn keep_awake(root: Client) {
    thread::spawn(move || {
        while root.closed().is_none() {
            // The answer is nobody's concern.
            drop(root.start(Request::new("", "exec.list")));
            thread::sleep(AWAKE);
        }
    });
}

/// What a command on the node came to.
#[derive(Debug, Clone)]
pub struct Output {
    /// Exit code; 128 + signal for one that was killed.
    pub exit: u64,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// A running node. Dropping it cuts its power.
#[derive(Debug)]
pub struct Node {
    // Fields drop in this order: connections, then the bridge, then QEMU, then its disks.
    control: OnceLock<Client>,
    root: Option<Client>,
    root_greeted: OnceLock<()>,
    /// Where vm-rig was put, once it was.
    rig_there: OnceLock<String>,
    bridge: Process,
    machine: Machine,
    disks: Vec<Disk>,
    console: Mutex<Console>,
    allowed: Vec<String>,
}

/// Takes all room on the data partition, to the last block.
const FILL: &str = "mkdir /data/full; n=0; for size in 1073741824 67108864 1048576 65536 4096; do \
    while fallocate -l $size /data/full/$n 2>/dev/null; do n=$((n+1)); done; rm -f /data/full/$n; done; sync";

impl Node {
    /// The connection to the control socket that the tests share.
    pub fn control(&self) -> &Client {
        self.control.get_or_init(|| self.connect())
    }

    /// A connection of its own to the control socket.
    pub fn connect(&self) -> Client {
        let path = self.socket();
        timing::wait_for("the bridge's socket", || Client::open(&path).ok())
    }

    /// The control socket on this machine, as `warren --socket` takes it.
    pub fn socket(&self) -> PathBuf {
        self.machine.dir().join("control.sock")
    }

    /// QEMU.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Creates a sandbox; `keys` are as for `sandbox.create`.
    ///
    /// # Panics
    /// When it fails.
    pub fn sandbox(&self, keys: &[(&str, &str)]) -> Sandbox {
        Sandbox::create(self.control(), keys)
    }

    /// The client's side of the port through which the node takes commands as root.
    pub fn root(&self) -> &Client {
        let root = self.root.as_ref().expect("this node was booted with the tests' programs");
        self.root_greeted.get_or_init(|| match root.stray("hello") {
            Message::Ok { .. } => {}
            other => panic!("the agent on the node greets with {other:?}"),
        });
        root
    }

    /// Runs a command on the node as root.
    pub fn run(&self, argv: &[&str]) -> Output {
        let reply = self.root().ok(root_exec(argv));
        if let Some(exec) = reply.items.first().and_then(|row| row.get("exec")) {
            // The agent keeps what it knows of a program until then.
            self.root().ok(Request::new("", "exec.forget").set("exec", exec));
        }
        Output {
            exit: reply.fields.number("exit").unwrap_or(u64::MAX),
            stdout: reply.text("stdout"),
            stderr: reply.text("stderr"),
        }
    }

    /// Runs a line of shell on the node as root and gives what it printed.
    ///
    /// # Panics
    /// When it does not end with 0.
    pub fn sh(&self, script: &str) -> String {
        let output = self.run(&["sh", "-c", script]);
        assert_eq!(output.exit, 0, "on the node `{script}` said {:?} and {:?}", output.stdout, output.stderr);
        output.stdout
    }

    /// Puts a program of this machine on the node and runs it there as root: how tests that need /dev/kvm,
    /// cgroups or network devices are run. The whole reply is for the caller to judge.
    pub fn run_program(&self, program: &Path, arguments: &[&str]) -> Reply {
        let path = self.put_program(program);
        let mut argv = vec![path.as_str()];
        argv.extend(arguments);
        self.root().ok(root_exec(&argv))
    }

    fn put_program(&self, program: &Path) -> String {
        let path = format!("/test/{}", program.file_name().unwrap_or_default().to_string_lossy());
        self.write_file(&path, 0o755, &read(program));
        path
    }

    /// Where `vm-rig` is on the node, put there by the first call.
    pub fn rig_program(&self) -> &str {
        self.rig_there.get_or_init(|| {
            self.put_program(&artefacts::node_tool("guest-tool"));
            self.put_program(&artefacts::node_tool("hostile-guest"));
            self.put_program(&artefacts::node_tool("jail-probe"));
            self.put_program(&artefacts::node_tool("vm-rig"))
        })
    }

    /// Runs a scenario of `vm-rig` on the node (see docs/testing.md) and gives what it printed.
    ///
    /// # Panics
    /// When it fails; the message is its standard error.
    pub fn rig(&self, arguments: &[&str]) -> String {
        let mut argv = vec![self.rig_program()];
        argv.extend(arguments);
        let factor = format!("WARREN_TEST_TIME_FACTOR={}", timing::factor());
        let mut call = self.root().start(root_exec(&argv).set("env", factor));
        // A scenario may be silent for longer than a node may be; its own limits hold.
        let mut reply = Reply::default();
        let end = Instant::now() + timing::hang() * 10;
        loop {
            match call.message_within(end.saturating_duration_since(Instant::now())) {
                Some(Message::Ok { fields, .. }) => break reply.fields = fields,
                Some(Message::Data { channel, payload, .. }) => reply.data.entry(channel).or_default().extend(payload),
                Some(Message::Err { error, .. }) => panic!("vm-rig {arguments:?} does not start: {error}"),
                Some(_) => {}
                None => panic!("vm-rig {arguments:?} does not end; it said {:?}", reply.text("stderr")),
            }
        }
        let (out, err) = (reply.text("stdout"), reply.text("stderr"));
        assert_eq!(reply.field("exit"), "0", "vm-rig {arguments:?} failed:\n{err}\n{out}");
        out
    }

    /// Writes a file on the node.
    pub fn write_file(&self, path: &str, mode: u32, content: &[u8]) {
        let request = Request::new("", "file.write").set("path", path).set("mode", format!("{mode:04o}"));
        let call = self.root().start(request.set("user", 0));
        let writer = call.writer();
        assert!(writer.write("content", content), "writing {path} on the node broke off");
        writer.end("content");
        call.finish_ok();
    }

    /// Reads a file of the node.
    pub fn read_file(&self, path: &str) -> Vec<u8> {
        let mut reply = self.root().ok(Request::new("", "file.read").set("path", path));
        reply.data.remove("content").unwrap_or_default()
    }

    /// The process id of the supervisor, once there is one.
    pub fn supervisor(&self) -> u64 {
        timing::wait_for("a supervisor on the node", || {
            self.sh("node-tool processes").lines().find_map(|line| {
                let (pid, argv) = line.split_once(' ')?;
                argv.ends_with(" supervise").then(|| pid.parse().ok())?
            })
        })
    }

    /// The process id of a sandbox's worker, by its cgroup.
    pub fn worker(&self, id: &str) -> u64 {
        let text = self.sh(&format!("cat /sys/fs/cgroup/sandboxes/{id}/cgroup.procs"));
        text.lines().next().and_then(|line| line.parse().ok()).unwrap_or_else(|| panic!("sandbox {id} has no worker"))
    }

    /// Waits until the control socket answers.
    ///
    /// # Panics
    /// When it does not, with the console's last lines.
    pub fn wait_until_ready(&self) {
        self.ready().unwrap_or_else(|why| panic!("{why}"));
    }

    /// The same; why it does not.
    fn ready(&self) -> Result<(), String> {
        let end = Instant::now() + timing::hang() * 2;
        let hello = std::thread::scope(|scope| {
            let answer = scope.spawn(|| {
                let mut call = self.control().start(Request::new("", "hello"));
                while Instant::now() < end && self.machine.is_running() && self.bridge.ended().is_none() {
                    if let Some(message) = call.message_within(Duration::from_millis(200)) {
                        return Some(message);
                    }
                }
                None
            });
            answer.join().ok().flatten()
        });
        if matches!(hello, Some(Message::Ok { .. })) {
            return Ok(());
        }
        let bridge = fs::read_to_string(self.machine.dir().join("bridge.log")).unwrap_or_default();
        Err(format!(
            "the node does not answer ({hello:?}; QEMU {}).\nThe bridge says: {bridge}\nThe console ends with:\n{}",
            if self.machine.is_running() { "runs" } else { "has ended" },
            self.console_tail(40)
        ))
    }

    /// The last lines of the console.
    pub fn console_tail(&self, lines: usize) -> String {
        self.console.lock().expect("no thread panics with this lock").tail(lines)
    }

    /// All of the console so far.
    pub fn console_text(&self) -> String {
        self.console.lock().expect("no thread panics with this lock").text()
    }

    /// The faults on the console since the last call.
    pub fn new_splats(&self) -> Vec<String> {
        self.console.lock().expect("no thread panics with this lock").new_splats(&self.allowed)
    }

    /// Octets that the log of writes to the data disk has by now.
    pub fn logged_octets(&self) -> u64 {
        let disk = self.disks.last().expect("it has a disk");
        fs::metadata(disk.log_path()).map_or(0, |meta| meta.len())
    }

    /// Whether QEMU still runs.
    pub fn is_running(&self) -> bool {
        self.machine.is_running()
    }

    /// Takes all room on the data partition, to the last block, until `free_data`.
    pub fn fill_data(&self) {
        self.sh(FILL);
    }

    /// Gives back what `fill_data` took.
    pub fn free_data(&self) {
        self.sh("rm -r /data/full; sync");
    }

    /// Waits until the node's record of what sandboxes hold and its kernel agree.
    ///
    /// # Panics
    /// When they do not; the message lists where they differ.
    pub fn assert_ledger_agrees(&self) {
        let end = Instant::now() + timing::hang();
        loop {
            let rows = self.control().ok(Request::new("", "node.ledger")).items;
            if rows.is_empty() {
                return;
            }
            assert!(Instant::now() < end, "record and kernel differ on the node: {rows:#?}");
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// Asks the node to power off in order and waits until QEMU has ended. Gives back its disks.
    ///
    /// # Panics
    /// When it does not end, or its console shows a fault.
    pub fn power_off(self) -> Vec<Disk> {
        if self.machine.is_running() {
            self.assert_ledger_agrees();
        }
        // The answer may be lost with the node.
        let call = self.control().start(Request::new("", "node.stop"));
        self.wait_for_end("node.stop");
        drop(call);
        self.into_disks()
    }

    /// Waits until the node has powered off by itself.
    ///
    /// # Panics
    /// When it does not.
    pub fn wait_for_end(&self, after: &str) {
        assert!(
            self.machine.wait(timing::hang()),
            "the node did not power off after {after}; the console ends with:\n{}",
            self.console_tail(40)
        );
    }

    /// Cuts the power. Gives back the disks as they were at that moment.
    ///
    /// # Panics
    /// When the console shows a fault.
    pub fn power_cut(self) -> Vec<Disk> {
        self.machine.kill();
        self.into_disks()
    }

    /// The disks of a node whose end was not its own fault.
    fn fallen(mut self) -> Vec<Disk> {
        self.machine.kill();
        self.bridge.kill();
        std::mem::take(&mut self.disks)
    }

    /// The disks of a node that has ended.
    ///
    /// # Panics
    /// When the console shows a fault.
    pub fn into_disks(mut self) -> Vec<Disk> {
        self.machine.kill();
        self.bridge.kill();
        let splats = console::splats(&self.console_text(), &self.allowed);
        assert!(splats.is_empty(), "the node's console shows faults:\n{}", splats.join("\n"));
        std::mem::take(&mut self.disks)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // The directory goes with the machine; what a failure's reader needs goes beside the build.
            let _ = self.keep_console();
        }
    }
}

impl Node {
    /// Copies the console to build/test-consoles/ and says so on standard error.
    pub fn keep_console(&self) -> io::Result<()> {
        let directory = artefacts::build_directory().join("test-consoles");
        fs::create_dir_all(&directory)?;
        let name = std::thread::current().name().unwrap_or("test").replace("::", ".");
        let path = directory.join(format!("{name}.log"));
        fs::write(&path, self.console_text())?;
        writeln!(io::stderr(), "the node's console is kept in {}", path.display())
    }

    /// A pool as `node.info` shows it.
    ///
    /// # Panics
    /// When there is none of that name.
    pub fn pool(&self, name: &str) -> Fields {
        let items = self.control().ok(Request::new("", "node.info")).items;
        let found = items.into_iter().find(|item| item.get("pool") == Some(name));
        found.unwrap_or_else(|| panic!("there is no pool {name}"))
    }

    /// Ids of the homes with a worker that no sandbox has yet.
    pub fn idle_homes(&self) -> BTreeSet<String> {
        let ids = self.pool("workers").0.into_iter().filter(|(key, _)| key == "idle");
        ids.map(|(_, id)| String::from_utf8_lossy(&id).into_owned()).collect()
    }

    /// What `node.info` says.
    pub fn info(&self) -> Fields {
        self.control().ok(Request::new("", "node.info")).fields
    }
}

/// A request that runs a command as root with the tests' programs at hand.
pub fn root_exec(argv: &[&str]) -> Request {
    let request = argv.iter().fold(Request::new("", "exec.start"), |request, argument| request.arg(argument));
    request.set("user", 0).set("cwd", "/").set("env", "PATH=/test/bin:/usr/bin:/bin")
}
