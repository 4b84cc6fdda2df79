//! What a sandbox may take of the node, as its control group's limits (Documentation/admin-guide/cgroup-v2.rst). They are
//! there before its worker is.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Beyond the guest's memory: the worker itself takes less than 1 MiB, KVM's tables for a processor about as much, streams
/// to the guest their buffers; the rest is for the page cache of its files, which the kernel can take back.
const OVERHEAD_BYTES: u64 = 64 << 20;
/// Page tables of the host and of KVM take 8 octets each for 4 KiB of guest memory, KVM's own notes as much again.
const TABLES: u64 = 64;
/// Beside processors and disks: the device thread, the console's log, and two for what KVM starts by itself.
const OTHER_THREADS: u64 = 4;
/// Period of `cpu.max`, in microseconds.
const PERIOD_US: u64 = 100_000;

/// A sandbox's limits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Its processors.
    pub vcpus: u64,
    /// Time of processors that it may take, in hundredths of one; what its own may take and one more when not said.
    pub cpu_quota: Option<u64>,
    /// Its guest's memory, in octets.
    pub memory_bytes: u64,
    /// All of its disks, the root disk among them.
    pub disks: u64,
    /// Length of those of its files that are in memory because the node has no disk, in octets.
    pub files_in_memory: u64,
    /// Limit of its worker's own for requests to its disks, for each second.
    pub disk_iops: Option<u64>,
    /// The same for octets.
    pub disk_bytes_per_s: Option<u64>,
}

impl Limits {
    /// File and content, in the order in which they are written.
    fn settings(&self) -> [(&'static str, String); 4] {
        let memory = self.memory_bytes + self.memory_bytes / TABLES + OVERHEAD_BYTES + self.files_in_memory;
        [
            ("memory.max", memory.to_string()),
            ("memory.oom.group", "1".to_string()),
            ("pids.max", (self.vcpus + self.disks + OTHER_THREADS).to_string()),
            ("cpu.max", self.cpu()),
        ]
    }

    /// The content of `cpu.max`.
    fn cpu(&self) -> String {
        // One more than the guest has processors: its disks and devices are served beside it.
        let hundredths = self.cpu_quota.unwrap_or((self.vcpus + 1) * 100);
        format!("{} {PERIOD_US}", hundredths * (PERIOD_US / 100))
    }

    /// Puts them on an empty group, whose sandbox has `file` on its disk. A limit that this host cannot keep is an error
    /// that names its file.
    pub fn apply(&self, cgroup: &Path, file: &File) -> io::Result<()> {
        for (name, value) in self.settings() {
            set(cgroup, name, &value)?;
        }
        if self.disk_iops.is_some() || self.disk_bytes_per_s.is_some() { self.limit_io(cgroup, file) } else { Ok(()) }
    }

    /// Puts those of processors and disks on a group that is in use.
    pub fn change(&self, cgroup: &Path, file: &File) -> io::Result<()> {
        set(cgroup, "cpu.max", &self.cpu())?;
        self.limit_io(cgroup, file)
    }

    fn limit_io(&self, cgroup: &Path, file: &File) -> io::Result<()> {
        match device_under(file) {
            Some(device) => set(cgroup, "io.max", &format!("{device} {}", self.io_limit())),
            None => Ok(()),
        }
    }

    /// What the group's processes may do to the device under its files. The worker keeps its limits itself, to the
    /// request; this one is for a worker that does not, and leaves room for the overlay's own maps.
    fn io_limit(&self) -> String {
        let word = |limit: Option<u64>| limit.map_or("max".to_string(), |limit| limit.saturating_mul(2).to_string());
        let (iops, bytes) = (word(self.disk_iops), word(self.disk_bytes_per_s));
        format!("riops={iops} wiops={iops} rbps={bytes} wbps={bytes}")
    }
}

/// Lets a group take so many octets more for a while, and gives what its limit was before.
pub fn lend_memory(cgroup: &Path, octets: u64) -> io::Result<u64> {
    let text = fs::read_to_string(cgroup.join("memory.max"))?;
    let before: u64 = text.trim().parse().map_err(|_| io::Error::other(format!("memory.max is {}", text.trim())))?;
    set(cgroup, "memory.max", &before.saturating_add(octets).to_string())?;
    Ok(before)
}

/// Puts a group's limit back that `lend_memory` gave.
pub fn give_back_memory(cgroup: &Path, max: u64) -> io::Result<()> {
    set(cgroup, "memory.max", &max.to_string())
}

fn set(cgroup: &Path, name: &str, value: &str) -> io::Result<()> {
    fs::write(cgroup.join(name), value).map_err(|e| io::Error::new(e.kind(), format!("{name}={value}: {e}")))
}

/// Whether the kernel killed in a group for memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Oom {
    /// It did not.
    None,
    /// The group was at its own limit.
    OwnLimit,
    /// It was not: the node had no memory left.
    Node,
}

impl Oom {
    /// As the group's `memory.events` says: `oom_kill` counts kills by any kind of shortage, `oom` shortages at this group's
    /// own limit (Documentation/admin-guide/cgroup-v2.rst).
    pub fn of(cgroup: &Path) -> Self {
        Self::parse(&fs::read_to_string(cgroup.join("memory.events")).unwrap_or_default())
    }

    fn parse(events: &str) -> Self {
        let count = |key: &str| -> u64 {
            let line = events.lines().find_map(|line| line.strip_prefix(key));
            line.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
        };
        match (count("oom_kill "), count("oom ")) {
            (0, _) => Self::None,
            (_, 0) => Self::Node,
            _ => Self::OwnLimit,
        }
    }
}

/// Major and minor number of the disk that a file lies on: of the whole one, not of its partition. `None` where it lies on
/// none.
fn device_under(file: &File) -> Option<String> {
    let device = file.metadata().ok()?.dev();
    let place = format!("/sys/dev/block/{}:{}", libc::major(device), libc::minor(device));
    let place = fs::canonicalize(place).ok()?;
    let whole = if place.join("partition").exists() { place.parent()? } else { &place };
    Some(fs::read_to_string(whole.join("dev")).ok()?.trim().to_string())
}

/// Whether a file is kept in memory: then the pages that its sandbox writes are charged to the sandbox.
pub fn is_in_memory(file: &File) -> bool {
    // SAFETY: statfs is plain data, for which all zeroes is a valid value.
    let mut about: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, and the kernel fills the structure.
    let done = unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut about) };
    const RAMFS_MAGIC: i64 = 0x8584_58f6;
    done == 0 && [libc::TMPFS_MAGIC, RAMFS_MAGIC].contains(&about.f_type)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_at_its_limit_is_told_from_a_node_without_memory() {
        assert_eq!(Oom::parse("low 0\nhigh 0\nmax 12\noom 1\noom_kill 1\noom_group_kill 1\n"), Oom::OwnLimit);
        assert_eq!(Oom::parse("low 0\nhigh 0\nmax 0\noom 0\noom_kill 3\noom_group_kill 1\n"), Oom::Node);
        assert_eq!(Oom::parse("max 90\noom 2\noom_kill 0\n"), Oom::None);
        assert_eq!(Oom::parse(""), Oom::None);
    }

    #[test]
    fn a_sandbox_gets_what_it_was_promised_and_what_that_costs() {
        let limits = Limits { vcpus: 2, memory_bytes: 512 << 20, disks: 1, ..Limits::default() };
        let [memory, _, pids, cpu] = limits.settings();
        assert_eq!(memory, ("memory.max", ((512 + 8 + 64) << 20).to_string()));
        assert_eq!(pids, ("pids.max", "7".to_string()));
        assert_eq!(cpu, ("cpu.max", "300000 100000".to_string()));
        let in_memory = Limits { files_in_memory: 1 << 30, ..limits };
        assert_eq!(Limits { cpu_quota: Some(50), ..limits }.settings()[3].1, "50000 100000");
        let slow = Limits { disk_iops: Some(100), ..limits };
        assert_eq!(slow.io_limit(), "riops=200 wiops=200 rbps=max wbps=max");
        let slow = Limits { disk_bytes_per_s: Some(1000), ..slow };
        assert_eq!(slow.io_limit(), "riops=200 wiops=200 rbps=2000 wbps=2000");
        assert_eq!(in_memory.settings()[0].1, ((1024 + 512 + 8 + 64) << 20).to_string());
    }
}
