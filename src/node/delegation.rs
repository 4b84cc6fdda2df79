//! The control groups of a supervisor that no `warren init` started. Its group is what the host's service manager gave it
//! (systemd: `Delegate=yes`, and `DelegateSubgroup=supervise`, so that it can be started again beside what runs); below it
//! are one for itself and one for its sandboxes. Under init both are there already.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Where the host has its control groups.
pub(super) const ROOT: &str = "/sys/fs/cgroup";
/// The supervisor's own group, below what it was given: a group with children that have limits has no processes itself
/// (Documentation/admin-guide/cgroup-v2.rst, "No Internal Process Constraint").
const OWN: &str = "supervise";
/// That of the sandboxes.
const SANDBOXES: &str = "sandboxes";
/// What a sandbox's limits need.
const CONTROLLERS: [&str; 4] = ["memory", "cpu", "io", "pids"];

/// Makes both groups and moves the caller into its own. Gives that of the sandboxes.
///
/// # Errors
/// With the file and what it was to take, where the host does not hand a controller on.
pub(super) fn settle() -> io::Result<PathBuf> {
    let own = fs::read_to_string("/proc/self/cgroup")?;
    let given = given(&own).ok_or_else(|| io::Error::other("the host has no control groups of version 2"))?;
    let base = Path::new(ROOT).join(given);
    let (supervise, sandboxes) = (base.join(OWN), base.join(SANDBOXES));
    for group in [&supervise, &sandboxes] {
        fs::create_dir_all(group).map_err(|e| named(group, "cannot be made", &e))?;
    }
    write(&supervise.join("cgroup.procs"), "0")?;
    for group in [&base, &sandboxes] {
        // One by one, so that the error names the one that is not there.
        for controller in CONTROLLERS {
            write(&group.join("cgroup.subtree_control"), &format!("+{controller}"))?;
        }
    }
    Ok(sandboxes)
}

/// The group that a process was given, below the root, from its /proc/PID/cgroup (cgroups(7)).
fn given(text: &str) -> Option<&str> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    // An earlier supervisor made its own, or the service manager did.
    let (above, last) = path.rsplit_once('/').unwrap_or(("", path));
    Some(if last == OWN { above } else { path })
}

fn write(file: &Path, value: &str) -> io::Result<()> {
    fs::write(file, value).map_err(|e| named(file, &format!("does not take {value}"), &e))
}

fn named(path: &Path, what: &str, cause: &io::Error) -> io::Error {
    io::Error::new(cause.kind(), format!("{} {what}: {cause}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_is_the_one_that_was_given_also_for_who_was_started_in_its_own() {
        assert_eq!(given("0::/system.slice/warren.service\n"), Some("system.slice/warren.service"));
        assert_eq!(given("0::/system.slice/warren.service/supervise\n"), Some("system.slice/warren.service"));
        assert_eq!(given("1:name=systemd:/x\n0::/\n"), Some(""));
        assert_eq!(given("0::/supervise\n"), Some(""));
        assert_eq!(given("0::/x-supervise\n"), Some("x-supervise"));
        assert_eq!(given("4:memory:/x\n"), None);
    }
}
