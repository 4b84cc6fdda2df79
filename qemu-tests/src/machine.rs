//! QEMU: its command line, its process, its sockets.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use crate::artefacts::Artefact;
use crate::console::Console;
use crate::files::{Disk, TempDir};
use crate::process::Process;
use crate::qmp::Qmp;
use crate::timing;

/// The CPU that software emulation shows: AMD's, because that is the virtualization it emulates. A fixed
/// model, so that measurements compare.
pub const EMULATED_CPU: &str = "EPYC,+svm,+npt";

/// How the machine keeps time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// As the world outside.
    Wall,
    /// One instruction is one nanosecond: measurements repeat. One CPU, software emulation.
    Virtual,
}

/// What QEMU is to boot.
#[derive(Debug)]
pub enum Firmware {
    /// A kernel, directly, with an initramfs and a command line.
    Kernel {
        /// bzImage.
        kernel: PathBuf,
        /// All archives in one file.
        initramfs: PathBuf,
        /// The kernel's command line.
        cmdline: String,
    },
    /// OVMF, which boots the first disk.
    Uefi,
}

/// Everything QEMU has to know.
#[derive(Debug)]
pub struct Config<'a> {
    /// What to boot.
    pub firmware: Firmware,
    /// How time passes.
    pub clock: Clock,
    /// CPUs, 1 or more.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Writable disks, in order.
    pub disks: Vec<&'a Disk>,
    /// Writes to the last of them are logged to a file beside it: see `writes`.
    pub logged: bool,
    /// Images attached read-only, after the disks.
    pub read_only: Vec<PathBuf>,
}

/// A running QEMU.
#[derive(Debug)]
pub struct Machine {
    // Fields drop in this order: first the process, then the directory with its sockets.
    process: Process,
    qmp: Mutex<Option<Qmp>>,
    dir: TempDir,
}

impl Machine {
    /// Starts QEMU. It has made its sockets when this returns.
    pub fn start(config: &Config<'_>, dir: TempDir) -> io::Result<Self> {
        let mut command = Command::new("qemu-system-x86_64");
        let path = dir.path();
        command.args(["-M", if matches!(config.firmware, Firmware::Uefi) { "q35" } else { "pc" }]);
        command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
        match config.clock {
            Clock::Wall if timing::hardware_virtualization() => command.args(["-accel", "kvm", "-cpu", "host"]),
            Clock::Wall => command.args(["-accel", "tcg,thread=multi", "-cpu", EMULATED_CPU]),
            Clock::Virtual => command.args(["-accel", "tcg", "-cpu", EMULATED_CPU]).args([
                "-icount",
                "shift=0,sleep=off",
                "-rtc",
                "clock=vm",
            ]),
        };
        command.args(["-smp", &config.cpus.to_string(), "-m", &config.memory_mib.to_string()]);
        match &config.firmware {
            Firmware::Kernel { kernel, initramfs, cmdline } => {
                command.arg("-kernel").arg(kernel).arg("-initrd").arg(initramfs).args(["-append", cmdline]);
            }
            Firmware::Uefi => {
                let variables = path.join("uefi-variables.fd");
                fs::copy("/usr/share/OVMF/OVMF_VARS_4M.fd", &variables)?;
                command.args(["-drive", "if=pflash,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd"]);
                command.args(["-drive", &format!("if=pflash,format=raw,file={}", variables.display())]);
            }
        }
        command.args(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]);
        for name in ["control", "test"] {
            command.args(["-chardev", &socket(name, &path.join(format!("{name}.port")))]);
            command
                .args(["-device", &format!("virtserialport,id={name}-port,chardev={name},name=org.warren.{name}.0")]);
        }
        command.args(["-chardev", &format!("file,id=console,path={}", path.join("console").display())]);
        command.args(["-serial", "chardev:console"]);
        command.args(["-chardev", &socket("monitor", &path.join("monitor"))]);
        command.args(["-mon", "chardev=monitor,mode=control"]);
        // A power cut is the end of the QEMU process: what the node flushed is in this machine's page cache by
        // then, so that it need not go to the medium.
        let disks = config.disks.iter().map(|disk| (disk.path(), "off"));
        let images = config.read_only.iter().map(|image| (image.clone(), "on"));
        let logged = if config.logged { config.disks.len().checked_sub(1) } else { None };
        for (number, (file, read_only)) in disks.chain(images).enumerate() {
            if Some(number) == logged {
                log_writes(&mut command, number, config.disks[number])?;
                continue;
            }
            let file = file.display();
            command.args([
                "-drive",
                &format!(
                    "file={file},format=raw,if=none,id=disk{number},cache=unsafe,readonly={read_only},discard=unmap"
                ),
                "-device",
                &format!("virtio-blk-pci,drive=disk{number}"),
            ]);
        }
        let log = path.join("qemu.log");
        command.stdin(std::process::Stdio::null());
        command.stdout(fs::File::create(&log)?).stderr(fs::OpenOptions::new().append(true).open(&log)?);
        let process = Process::spawn(command)?;
        let machine = Self { process, qmp: Mutex::new(None), dir };
        machine.wait_for_socket("monitor")?;
        Ok(machine)
    }

    fn wait_for_socket(&self, name: &str) -> io::Result<()> {
        let path = self.dir.path().join(name);
        timing::wait_for("QEMU's monitor socket", || {
            if path.exists() {
                return Some(Ok(()));
            }
            let status = self.process.ended()?;
            let log = fs::read_to_string(self.dir.path().join("qemu.log")).unwrap_or_default();
            Some(Err(io::Error::other(format!("QEMU ended with {status}: {log}"))))
        })
    }

    /// The directory of this machine's sockets and logs.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// QEMU's end of the virtio-serial port `org.warren.NAME.0`. It takes one client at a time.
    pub fn port(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.port"))
    }

    /// What the serial console showed.
    pub fn console(&self) -> Console {
        Console::new(&self.dir.path().join("console"))
    }

    /// Runs a command of QEMU's monitor.
    pub fn monitor(&self, command: &str, arguments: serde_json::Value) -> io::Result<serde_json::Value> {
        let mut qmp = self.qmp.lock().expect("no thread panics with this lock");
        if qmp.is_none() {
            *qmp = Some(Qmp::open(&self.dir.path().join("monitor"))?);
        }
        match qmp.as_mut() {
            Some(qmp) => qmp.execute(command, arguments),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Whether QEMU still runs.
    pub fn is_running(&self) -> bool {
        self.process.ended().is_none()
    }

    /// Waits for QEMU's own end, as after the node has powered off. Whether it came in time.
    pub fn wait(&self, time: Duration) -> bool {
        self.process.wait(time).is_some()
    }

    /// Cuts the power.
    pub fn kill(&self) {
        self.process.kill();
    }
}

/// Attaches a disk whose writes and flushes go to a log as well. The files themselves need not go to the medium.
fn log_writes(command: &mut Command, number: usize, disk: &Disk) -> io::Result<()> {
    fs::File::create(disk.log_path())?;
    let file = |path: PathBuf| serde_json::json!({"driver": "file", "filename": path, "cache": {"no-flush": true}, "discard": "unmap"});
    let node = serde_json::json!({
        "driver": "blklogwrites", "node-name": format!("disk{number}"), "log-sector-size": 512,
        "file": file(disk.path()), "log": file(disk.log_path()),
    });
    command.arg("-blockdev").arg(node.to_string());
    command.arg("-device").arg(format!("virtio-blk-pci,drive=disk{number}"));
    Ok(())
}

fn socket(id: &str, path: &Path) -> String {
    format!("socket,id={id},path={},server=on,wait=off", path.display())
}

/// What stands in the condition column of a measurement: QEMU's version, how it runs and keeps time, the CPU model.
pub fn description(clock: Clock) -> String {
    let version = Command::new("qemu-system-x86_64").arg("--version").output();
    let text = version.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let version = text.split_whitespace().nth(3).unwrap_or("unknown").to_string();
    match clock {
        Clock::Virtual => format!("QEMU {version} TCG icount, {EMULATED_CPU}, 1 CPU"),
        Clock::Wall if timing::hardware_virtualization() => {
            format!("QEMU {version} KVM, wall time, host's CPU, 2 CPUs")
        }
        Clock::Wall => format!("QEMU {version} TCG, wall time, {EMULATED_CPU}, 2 CPUs"),
    }
}

/// The kernel that boots the node directly, and the end of its command line that every boot shares.
pub fn host_kernel() -> (PathBuf, &'static str) {
    // loglevel=5: warnings are level 4 and have to be seen. panic=-1 with -no-reboot: QEMU ends when the node's
    // kernel panics, instead of hanging. The other two are for an emulator that the machine under it does not
    // schedule in time: the kernel's test of its timer fails there; and the kernel corrects its first measurement
    // of the TSC, which without TSC scaling (TCG has none) leaves KVM's guests without timer interrupts where the
    // two differ by more than the tolerance.
    (Artefact::HostKernel.path(), "console=ttyS0 loglevel=5 panic=-1 no_timer_check kvm.tsc_tolerance_ppm=20000")
}
