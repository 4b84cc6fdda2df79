//! The sandbox as a whole: its name, clock and disk, its load, its end.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, chown};
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, kill};
use nix::sys::statvfs::statvfs;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use nix::unistd::{Pid, gethostname, sethostname};

use super::network::Network;
use super::report;
use super::settings::Settings;
use super::settings::check_environment;
use crate::wire::{Args, Code, Error, Fields};

/// The root file system's device.
const ROOT_DISK: &str = "/dev/vda";

/// `system.configure`: what the node tells a sandbox after its boot.
///
/// Arguments are checked before the first of them takes effect.
pub(super) fn configure(settings: &mut Settings, mut args: Args, pid1: bool) -> Result<Fields, Error> {
    let hostname = host_name(&mut args)?;
    let clock = clock(&mut args)?;
    let env = args.all("env");
    let user = args.text("user")?;
    let cwd = args.bytes("cwd")?;
    let grow = args.flag("grow")?;
    let read_only = args.flag("read_only")?;
    let network = Network::parse(&mut args)?;
    args.finish()?;
    check_environment(&env)?;
    let cwd = match cwd {
        Some(cwd) if !cwd.starts_with(b"/") => {
            return Err(Error::new(Code::BadArgument, "cwd is not absolute").with("argument", "cwd"));
        }
        Some(cwd) => Some(super::files::resolve(Path::new("/"), &cwd)?),
        None => None,
    };
    if let Some(user) = user {
        super::exec::resolve(&user)?;
        settings.user = Some(user);
    }
    if let Some(cwd) = cwd {
        settings.cwd = cwd;
    }
    if !env.is_empty() {
        settings.env = env;
    }
    settings.read_only |= read_only;
    if !pid1 {
        // On a machine that is not a sandbox these are not the agent's.
        return Ok(Fields::new());
    }
    if let Some(clock) = clock {
        set_clock(clock)?;
    }
    if let Some(name) = hostname {
        set_host_name(&name)?;
    }
    if let Some(network) = network {
        network.apply()?;
    }
    if grow {
        grow_root().map_err(|errno| failed("grow the root file system", errno))?;
    }
    make_home(settings);
    Ok(Fields::new())
}

fn failed(what: &str, errno: Errno) -> Error {
    Error::new(Code::Internal, format!("cannot {what}: {}", errno.desc())).with("errno", format!("{errno:?}"))
}

/// `clock_ns=`: the time since 1970 in nanoseconds.
pub(super) fn clock(args: &mut Args) -> Result<Option<Duration>, Error> {
    Ok(args.number("clock_ns", 0..=i64::MAX as u64)?.map(Duration::from_nanos))
}

/// Sets CLOCK_REALTIME. Other clocks go on as they do.
pub(super) fn set_clock(since_1970: Duration) -> Result<(), Error> {
    let time = TimeSpec::from_duration(since_1970);
    clock_settime(ClockId::CLOCK_REALTIME, time).map_err(|errno| failed("set the clock", errno))
}

/// `hostname=`
pub(super) fn host_name(args: &mut Args) -> Result<Option<String>, Error> {
    let Some(name) = args.text("hostname")? else { return Ok(None) };
    let fits =
        (1..=63).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.'));
    if fits {
        return Ok(Some(name));
    }
    Err(Error::new(Code::BadArgument, format!("hostname={name} is not a host name of 1 to 63 octets"))
        .with("argument", "hostname"))
}

/// Sets the host's name.
pub(super) fn set_host_name(name: &str) -> Result<(), Error> {
    let previous = gethostname().unwrap_or_default();
    sethostname(name).map_err(|errno| failed("set the host name", errno))?;
    introduce(name, previous.as_encoded_bytes());
    Ok(())
}

/// Programs expect to find the address of their own host. A line that is there is left alone, but for the one that was
/// written here for the previous name.
fn introduce(name: &str, previous: &[u8]) {
    let hosts = super::read_file("/etc/hosts");
    if hosts.len() as u64 >= super::FILE_MAX {
        return;
    }
    let Some(text) = introduced(&hosts, name, previous) else { return };
    // On a full disk what was there stays where it can.
    let _ = match text.strip_prefix(hosts.as_slice()) {
        Some(more) => {
            let mut file = fs::OpenOptions::new();
            // It may be a FIFO that nobody reads.
            let file = file.append(true).create(true).custom_flags(libc::O_NONBLOCK).open("/etc/hosts");
            file.and_then(|mut file| file.write_all(more))
        }
        // In place: of a file that is emptied first, ext4 allocates and writes the blocks when it is closed.
        None => fs::OpenOptions::new().write(true).open("/etc/hosts").and_then(|file| {
            file.write_all_at(&text, 0)?;
            file.set_len(text.len() as u64)
        }),
    };
}

/// /etc/hosts with the new name; `None` when it stays.
fn introduced(hosts: &[u8], name: &str, previous: &[u8]) -> Option<Vec<u8>> {
    let is_known = hosts
        .split(|&b| b == b'\n')
        .any(|line| line.split(u8::is_ascii_whitespace).skip(1).any(|word| word == name.as_bytes()));
    if is_known {
        return None;
    }
    if hosts.is_empty() {
        return Some(format!("127.0.0.1 localhost\n::1 localhost\n127.0.1.1 {name}\n").into_bytes());
    }
    let (own, before) = (format!("127.0.1.1 {name}").into_bytes(), [b"127.0.1.1 ", previous].concat());
    let mut lines: Vec<&[u8]> = hosts.split(|&b| b == b'\n').collect();
    if let Some(line) = lines.iter_mut().find(|line| ***line == before) {
        *line = &own;
        return Some(lines.join(&b'\n'));
    }
    let break_before: &[u8] = if hosts.ends_with(b"\n") { b"" } else { b"\n" };
    Some([hosts, break_before, &own, b"\n"].concat())
}

/// The working directory of programs is there and theirs, also where the template has none.
fn make_home(settings: &Settings) {
    let made = fs::DirBuilder::new().mode(0o755).create(&settings.cwd);
    if let (Ok(()), Ok(owner)) = (made, settings.owner(None)) {
        let _ = chown(&settings.cwd, Some(owner.uid), Some(owner.gid));
    }
}

/// `_IOW('f', 16, __u64)`, fs/ext4/ext4.h: grows a mounted file system to that many of its blocks.
const EXT4_IOC_RESIZE_FS: libc::c_ulong = 0x4008_6610;
/// `_IOR(0x12, 114, size_t)`, include/uapi/linux/fs.h: a block device's size in octets.
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;

/// Grows the root file system to its disk.
fn grow_root() -> nix::Result<()> {
    let open = |path: &str| File::open(path).map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)));
    let (root, disk) = (open("/")?, open(ROOT_DISK)?);
    let mut octets: u64 = 0;
    // SAFETY: the descriptor is open and BLKGETSIZE64 writes one u64.
    Errno::result(unsafe { libc::ioctl(disk.as_raw_fd(), BLKGETSIZE64, &mut octets) })?;
    let block = statvfs("/")?.block_size();
    let blocks = octets.checked_div(block).ok_or(Errno::EINVAL)?;
    // SAFETY: the descriptor is open and EXT4_IOC_RESIZE_FS reads one u64.
    Errno::result(unsafe { libc::ioctl(root.as_raw_fd(), EXT4_IOC_RESIZE_FS, &blocks) }).map(drop)
}

/// `system.stats`
pub(super) fn stats(running: usize) -> Fields {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = |key: &str| {
        meminfo
            .lines()
            .find_map(|line| line.strip_prefix(key)?.trim().split(' ').next()?.parse::<u64>().ok())
            .unwrap_or(0)
    };
    let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let uptime_s = uptime.split('.').next().and_then(|seconds| seconds.parse::<u64>().ok()).unwrap_or(0);
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let mut fields = Fields::new()
        .with("memory_total_kib", kib("MemTotal:"))
        .with("memory_available_kib", kib("MemAvailable:"))
        .with("uptime_s", uptime_s)
        .with("load1", load.split(' ').next().unwrap_or_default())
        .with("execs_running", running);
    if let Ok(root) = statvfs("/") {
        let mib = |blocks: u64| blocks.saturating_mul(root.fragment_size()) >> 20;
        fields = fields.with("disk_total_mib", mib(root.blocks())).with("disk_free_mib", mib(root.blocks_available()));
    }
    fields
}

/// Sends SIGTERM to every process. `false` when there is none.
pub(super) fn ask_all_to_end() -> bool {
    kill(Pid::from_raw(-1), Signal::SIGTERM).is_ok()
}

/// Ends every process, writes everything to disk, and powers the machine off.
pub(super) fn power_off() -> ! {
    let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
    nix::unistd::sync();
    // Read-only, so that the journal is clean. The killed may still be on their way out.
    for _ in 0..50 {
        match mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, None::<&str>) {
            Err(Errno::EBUSY) => std::thread::sleep(Duration::from_millis(2)),
            _ => break,
        }
    }
    let Err(errno) = reboot(RebootMode::RB_POWER_OFF);
    report(&format!("cannot power off: {errno}"));
    // The end of PID 1 is a kernel panic, which ends the machine too.
    std::process::exit(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_of_a_previous_name_becomes_that_of_the_new_one() {
        let introduced = |hosts: &str, name: &str, previous: &str| {
            introduced(hosts.as_bytes(), name, previous.as_bytes()).map(|text| String::from_utf8(text).unwrap())
        };
        assert_eq!(introduced("", "a", "").unwrap(), "127.0.0.1 localhost\n::1 localhost\n127.0.1.1 a\n");
        assert_eq!(introduced("127.0.0.1 localhost\n", "a", "x").unwrap(), "127.0.0.1 localhost\n127.0.1.1 a\n");
        assert_eq!(introduced("1.1.1.1 x", "a", "").unwrap(), "1.1.1.1 x\n127.0.1.1 a\n");
        assert_eq!(introduced("127.0.1.1 a\n1.1.1.1 x\n", "b", "a").unwrap(), "127.0.1.1 b\n1.1.1.1 x\n");
        assert_eq!(introduced("127.0.1.1 a alias\n", "b", "a").unwrap(), "127.0.1.1 a alias\n127.0.1.1 b\n");
        assert_eq!(introduced("10.0.0.1 other a\n", "a", "b"), None);
    }
}
