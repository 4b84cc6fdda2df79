//! From the initramfs to the sandbox's root disk.
//!
//! `enter_root` is on the critical path of a cold boot: it does what the greeting needs and no more.
//! What programs of the sandbox need on top is in `CHORES`, done when the loop is idle or when the
//! first request asks for it.

use std::fs;
use std::io::Write;
use std::os::fd::{AsFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, symlink};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::resource::{Resource, setrlimit};

use super::{loopback, report, socket};

/// Where the initramfs mounts the root disk before it becomes the root.
const NEW_ROOT: &str = "/newroot";
/// The kernel probes virtio-mmio before it starts init, so the disk is normally there at once.
const ROOT_DISK: &str = "/dev/vda";
const ROOT_DISK_TRIES: u32 = 200;
const ROOT_DISK_PAUSE: Duration = Duration::from_millis(10);
/// What the initramfs of a builder of templates has besides.
const MASON: &str = "/mason";
/// Where the builder's programs find it.
const PROGRAM: &str = "/run/warren/mason";

/// That program, until it has its place.
static BUILDER: OnceLock<Mutex<Option<fs::File>>> = OnceLock::new();

/// What the boot leaves for the agent's loop.
#[derive(Debug)]
pub(super) struct Booted {
    /// The listening vsock; `None` without a vsock device.
    pub listener: Option<OwnedFd>,
    /// The connection to the host.
    pub uplink: Option<OwnedFd>,
    /// Whether the greeting went out on `uplink` already.
    pub greeted: bool,
}

/// Mounts the root disk and makes it the root. `greeting` is sent to the host as soon as that is done.
///
/// # Errors
/// A sentence, when the root disk cannot be mounted; the vsock is then in the second part, to report it.
pub(super) fn enter_root(greeting: &[u8]) -> Result<Booted, (String, Booted)> {
    let devices = attach("devtmpfs", "/dev", "devtmpfs", MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC, "");
    occupy_standard_descriptors();
    // The listener first: the host may connect as soon as it hears of us. The connection is made
    // while the disk is mounted.
    let listener = socket::listen_vsock();
    let uplink = socket::connect_to_host();
    if let Err(errno) = listener.as_ref().and(uplink.as_ref()) {
        report(&format!("no vsock: {errno}"));
    }
    let mut booted = Booted { listener: listener.ok(), uplink: uplink.ok(), greeted: false };
    let rooted = devices
        // It is there already.
        .or_else(|errno| if errno == Errno::EBUSY { Ok(()) } else { Err(errno) })
        .map_err(|errno| format!("cannot mount devtmpfs: {errno}"))
        .and_then(|()| mount_root_disk())
        .and_then(|()| switch_root().map_err(|errno| format!("cannot switch to the root disk: {errno}")));
    if let Err(sentence) = rooted {
        return Err((sentence, booted));
    }
    booted.greet(greeting);
    Ok(booted)
}

impl Booted {
    /// Sends the greeting if the connection to the host is there.
    pub(super) fn greet(&mut self, greeting: &[u8]) {
        if let (false, Some(uplink)) = (self.greeted, &self.uplink) {
            self.greeted = socket::try_send(uplink.as_fd(), greeting);
        }
    }
}

/// The kernel opens 0, 1 and 2 on /dev/console when the initramfs has that node. Without it they are
/// free, and a socket that got one of them would end up as some program's stdout.
fn occupy_standard_descriptors() {
    for _ in 0..3 {
        let Ok(null) = fs::OpenOptions::new().read(true).write(true).open("/dev/null") else { return };
        let fd = OwnedFd::from(null);
        if std::os::fd::AsRawFd::as_raw_fd(&fd) > 2 {
            return;
        }
        let _ = fd.into_raw_fd();
    }
}

fn mount_root_disk() -> Result<(), String> {
    make_directory(NEW_ROOT, 0o755);
    let mut tries = 0;
    loop {
        // noatime: a read must not write to the sandbox's overlay. noinit_itable: nor must the kernel's
        // background initialisation of inode tables that mke2fs left out.
        match attach(ROOT_DISK, NEW_ROOT, "ext4", MsFlags::MS_NOATIME, "noinit_itable") {
            Ok(()) => return Ok(()),
            Err(Errno::ENOENT | Errno::ENXIO | Errno::ENODEV | Errno::ENOTBLK) if tries < ROOT_DISK_TRIES => {
                tries += 1;
                std::thread::sleep(ROOT_DISK_PAUSE);
            }
            Err(errno) => return Err(format!("cannot mount {ROOT_DISK} as ext4: {errno}")),
        }
    }
}

fn switch_root() -> nix::Result<()> {
    make_directory("/newroot/dev", 0o755);
    relocate("/dev", "/newroot/dev")?;
    // The initramfs stays mounted below for good; its files need not.
    let _ = nix::unistd::unlink("/init");
    if let Ok(mason) = fs::File::open(MASON) {
        let _ = nix::unistd::unlink(MASON);
        let _ = BUILDER.set(Mutex::new(Some(mason)));
    }
    nix::unistd::chdir(NEW_ROOT)?;
    relocate(".", "/")?;
    nix::unistd::chroot(".")?;
    nix::unistd::chdir("/")
}

fn attach(source: &str, target: &str, kind: &str, flags: MsFlags, data: &str) -> nix::Result<()> {
    match mount(Some(source), target, Some(kind), flags, Some(data)) {
        Err(Errno::ENOENT) if target == "/dev" => {
            make_directory(target, 0o755);
            mount(Some(source), target, Some(kind), flags, Some(data))
        }
        other => other,
    }
}

fn relocate(from: &str, to: &str) -> nix::Result<()> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_MOVE, None::<&str>)
}

/// Makes a directory of exactly that mode; one that is there keeps its own.
fn make_directory(path: &str, mode: u32) {
    if fs::DirBuilder::new().mode(mode).create(path).is_ok() && mode & 0o022 != 0 {
        // The umask took these bits.
        let _ = fs::set_permissions(path, fs::Permissions::from_mode(mode));
    }
}

/// Mounts a file system of the kernel's, on a directory that the template may lack.
fn provide(kind: &str, target: &str, flags: MsFlags, data: &str) {
    let mounted = match attach(kind, target, kind, flags, data) {
        Err(Errno::ENOENT) => {
            make_directory(target, 0o755);
            attach(kind, target, kind, flags, data)
        }
        other => other,
    };
    if let Err(errno) = mounted {
        report(&format!("cannot mount {kind} on {target}: {errno}"));
    }
}

const SEALED: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);
const NO_DEVICES: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);

/// Each of these is short, so that a request that arrives meanwhile waits for one of them at most.
pub(super) const CHORES: &[fn()] = &[
    || provide("proc", "/proc", SEALED, ""),
    || provide("sysfs", "/sys", SEALED, ""),
    || provide("devpts", "/dev/pts", MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC, "gid=5,mode=620,ptmxmode=666"),
    || provide("tmpfs", "/dev/shm", NO_DEVICES, "mode=1777"),
    || provide("tmpfs", "/run", NO_DEVICES, "mode=755,size=25%"),
    provide_mason,
    || provide("cgroup2", "/sys/fs/cgroup", SEALED, ""),
    link_descriptors,
    // /tmp is on the disk: it is the template's, and what is put there does not take memory.
    || make_directory("/tmp", 0o1777),
    default_hosts,
    raise_own_limits,
    || {
        if let Err(errno) = loopback::up() {
            report(&format!("cannot bring lo up: {errno}"));
        }
    },
];

/// Whether this sandbox builds a template.
pub(super) fn is_builder() -> bool {
    BUILDER.get().is_some()
}

/// In memory, where it is no part of the template.
fn provide_mason() {
    let Some(mut mason) = BUILDER.get().and_then(|held| held.lock().ok()?.take()) else { return };
    make_directory("/run/warren", 0o755);
    let new = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o755).open(PROGRAM);
    if let Err(e) = new.and_then(|mut program| std::io::copy(&mut mason, &mut program)) {
        report(&format!("{PROGRAM}: {e}"));
    }
}

/// udev would make these; there is none.
fn link_descriptors() {
    let links = [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ];
    for (target, link) in links {
        let _ = symlink(target, link);
    }
}

/// A template's own file is left alone.
fn default_hosts() {
    let new = fs::OpenOptions::new().write(true).create_new(true).open("/etc/hosts");
    if let Ok(mut hosts) = new {
        let _ = hosts.write_all(b"127.0.0.1 localhost\n::1 localhost\n");
    }
}

/// Descriptors for a thousand programs' pipes. What programs get is set for each of them.
fn raise_own_limits() {
    let _ = setrlimit(Resource::RLIMIT_NOFILE, 65536, 524288);
}

/// Tells the host why the sandbox cannot start, and powers off.
pub(super) fn give_up(mut booted: Booted, last_word: &[u8]) -> ! {
    for _ in 0..100 {
        booted.greet(last_word);
        if booted.greeted || booted.uplink.is_none() {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    super::system::power_off()
}
