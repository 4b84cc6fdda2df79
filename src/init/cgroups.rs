//! The node's control groups: `supervise` for the supervisor, `sentinel` for the sentinel, `services` for extra programs,
//! `sandboxes` with one child for each sandbox, made by the supervisor.

use std::fs::{self, File};
use std::path::Path;

const ROOT: &str = "/sys/fs/cgroup";
/// Where the supervisor runs.
pub const SUPERVISE: &str = "/sys/fs/cgroup/supervise";
/// Where extra services run.
pub const SERVICES: &str = "/sys/fs/cgroup/services";
/// Where the sentinel runs, within limits: what it measures must not suffer from it.
pub const SENTINEL: &str = "/sys/fs/cgroup/sentinel";
const SENTINEL_LIMITS: [(&str, &str); 3] = [("memory.max", "268435456"), ("pids.max", "1024"), ("cpu.weight", "20")];
const SANDBOXES: &str = "/sys/fs/cgroup/sandboxes";
/// Every group with children hands these on to them.
const CONTROLLERS: [&str; 4] = ["memory", "cpu", "io", "pids"];

/// Makes the groups. A missing controller is reported: limits of that kind are then not kept.
pub fn set_up() {
    enable_controllers(ROOT);
    for group in [SUPERVISE, SENTINEL, SERVICES, SANDBOXES] {
        if let Err(error) = fs::create_dir_all(group) {
            log::error!("cannot make {group}: {error}");
        }
    }
    for (file, value) in SENTINEL_LIMITS {
        if let Err(error) = fs::write(Path::new(SENTINEL).join(file), value) {
            log::error!("cannot set {file} of {SENTINEL}: {error}");
        }
    }
    enable_controllers(SANDBOXES);
}

/// A group's folder, to start a process in it.
pub fn open(group: &str) -> Option<File> {
    File::open(group).map_err(|error| log::error!("cannot open {group}: {error}")).ok()
}

/// One by one: written together, one that the kernel lacks would fail them all.
fn enable_controllers(group: &str) {
    let file = Path::new(group).join("cgroup.subtree_control");
    for controller in CONTROLLERS {
        if let Err(error) = fs::write(&file, format!("+{controller}")) {
            log::error!("cannot enable {controller} in {}: {error}", file.display());
        }
    }
}
