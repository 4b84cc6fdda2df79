//! One-purpose settings of the machine: log, limits, host name, loopback, what happens on a panic.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd};

use nix::sys::reboot::set_cad_enabled;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// Descriptors of one process: a supervisor of 1,000 sandboxes with 1,000 execs needs several thousand.
const DESCRIPTORS: u64 = 1_048_576;

/// (file, value)
const SETTINGS: &[(&str, &str)] = &[
    // Log lines of user space are not dropped by the rate limit: the writers are our own.
    ("/proc/sys/kernel/printk_devkmsg", "on"),
    // Each sandbox has about ten threads.
    ("/proc/sys/kernel/pid_max", "4194304"),
    // The workers' empty network namespace is really empty: no tunnel devices that nobody asked for.
    ("/proc/sys/net/core/fb_tunnels_only_for_init_net", "1"),
    // Nothing on the node needs user namespaces, through which a process without rights reaches much of the kernel.
    ("/proc/sys/user/max_user_namespaces", "0"),
    // Huge pages are put together only where all the small ones are in use: else the kernel would fill up again what
    // guests gave back with their balloon and by free-page reporting.
    ("/sys/kernel/mm/transparent_hugepage/khugepaged/max_ptes_none", "0"),
];

/// Sends standard output and error to /dev/kmsg, for init and all that it starts: so a line reaches every
/// console, in order with the kernel's own, and survives a crash in pstore.
pub fn log_to_kernel() {
    let kmsg = OpenOptions::new().write(true).open("/dev/kmsg");
    let console = || OpenOptions::new().write(true).open("/dev/console");
    if let Ok(log) = kmsg.or_else(|_| console()) {
        replace(log, &[libc::STDOUT_FILENO, libc::STDERR_FILENO]);
    }
    if let Ok(null) = File::open("/dev/null") {
        replace(null, &[libc::STDIN_FILENO]);
    }
}

fn replace(file: File, descriptors: &[i32]) {
    let fd = file.into_raw_fd();
    for &descriptor in descriptors {
        if fd == descriptor {
            // SAFETY: F_SETFD on an open descriptor; it must outlive exec like the two others.
            unsafe { libc::fcntl(fd, libc::F_SETFD, 0) };
        } else {
            // SAFETY: both are plain numbers; 0 to 2 are not owned by any Rust object.
            unsafe { libc::dup2(fd, descriptor) };
        }
    }
    if !(0..=2).contains(&fd) {
        // SAFETY: `into_raw_fd` made it ours, and nothing else has it.
        unsafe { libc::close(fd) };
    }
}

/// A panic of init ends the machine: the message goes to the log, then the kernel panics because PID 1 is gone,
/// which writes to every console and to pstore and starts the machine again.
pub fn die_loudly() {
    std::panic::set_hook(Box::new(|info| {
        log::error!("{info}");
        // SAFETY: ends the process at once; nothing of it is used after.
        unsafe { libc::_exit(70) }
    }));
}

/// Everything else. What fails is reported; the node goes on.
pub fn set_up(name: &str) {
    for (file, value) in SETTINGS {
        report(&format!("set {file}"), fs::write(file, format!("{value}\n")));
    }
    report("set kernel/panic", restart_after_panic());
    // Three keys must not restart a node; the kernel sends SIGINT instead, which is an ordered restart.
    report("take Ctrl-Alt-Del", set_cad_enabled(false).map_err(io::Error::from));
    let limit = setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS, DESCRIPTORS);
    report("raise the limit of descriptors", limit.map_err(io::Error::from));
    report("set the host name", nix::unistd::sethostname(name).map_err(io::Error::from));
    report("bring up the loopback interface", loopback_up());
}

fn report(what: &str, result: io::Result<()>) {
    if let Err(error) = result {
        log::error!("cannot {what}: {error}");
    }
}

/// Unless the command line says otherwise: nobody stands beside a node.
fn restart_after_panic() -> io::Result<()> {
    const FILE: &str = "/proc/sys/kernel/panic";
    if fs::read_to_string(FILE)?.trim() == "0" {
        fs::write(FILE, "10")?;
    }
    Ok(())
}

fn loopback_up() -> io::Result<()> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: all zeros is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, &from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from as libc::c_char;
    }
    // SAFETY: SIOCGIFFLAGS reads the name from and writes the flags to the `ifreq` it is given.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: SIOCGIFFLAGS has just filled this member of the union.
    unsafe { request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short };
    // SAFETY: SIOCSIFFLAGS only reads the `ifreq`.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
