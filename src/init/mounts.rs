//! The kernel's file systems, as a table.

use std::fs;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};

struct Mount {
    kind: &'static str,
    target: &'static str,
    flags: MsFlags,
    options: &'static str,
}

const NOSUID: MsFlags = MsFlags::MS_NOSUID;
const NOSUID_NODEV: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);
const NOTHING: MsFlags = NOSUID_NODEV.union(MsFlags::MS_NOEXEC);

/// In this order: some lie in others.
const MOUNTS: &[Mount] = &[
    Mount { kind: "proc", target: "/proc", flags: NOTHING, options: "" },
    Mount { kind: "sysfs", target: "/sys", flags: NOTHING, options: "" },
    Mount { kind: "devtmpfs", target: "/dev", flags: NOSUID, options: "mode=0755" },
    Mount { kind: "devpts", target: "/dev/pts", flags: NOSUID, options: "mode=0620,ptmxmode=0666" },
    Mount { kind: "tmpfs", target: "/dev/shm", flags: NOSUID_NODEV, options: "mode=1777" },
    Mount { kind: "tmpfs", target: "/run", flags: NOSUID_NODEV, options: "mode=0755" },
    Mount { kind: "tmpfs", target: "/tmp", flags: NOSUID_NODEV, options: "mode=1777" },
    // favordynmods: without it every move of a process into a cgroup waits 10 to 20 ms for an RCU grace period.
    Mount { kind: "cgroup2", target: "/sys/fs/cgroup", flags: NOTHING, options: "nsdelegate,favordynmods" },
];

/// Mounts the table; gives a sentence for each that failed.
pub fn mount_all() -> Vec<String> {
    MOUNTS.iter().filter_map(|entry| mount_one(entry).err()).collect()
}

fn mount_one(entry: &Mount) -> Result<(), String> {
    let Mount { kind, target, flags, options } = entry;
    if !Path::new(target).exists() {
        fs::create_dir_all(target).map_err(|error| format!("cannot make {target}: {error}"))?;
    }
    let try_with = |options: &str| match mount(Some(*kind), *target, Some(*kind), *flags, Some(options)) {
        // The kernel mounts /dev itself with CONFIG_DEVTMPFS_MOUNT.
        Ok(()) | Err(Errno::EBUSY) => Ok(()),
        Err(error) => Err(error),
    };
    match try_with(options) {
        Err(Errno::EINVAL) => try_with(""), // an option that this kernel does not know
        other => other,
    }
    .map_err(|error| format!("cannot mount {kind} on {target}: {error}"))
}
