//! Ends of processes: init is the parent of services and workers and inherits every orphan.
//!
//! The end of a worker is kept until a supervisor acknowledged it, because the supervisor may be dead just then.
//! A zombie still tells its cgroup, and with it the sandbox; so that is read before it is reaped.

use std::collections::VecDeque;
use std::fs;
use std::io;

use super::client::{ChildExit, ChildStatus};

/// Ends kept at most. Only a supervisor that never acknowledges gets there; then the oldest go.
const MAX_KEPT: usize = 65_536;

/// Ends of workers that no supervisor has acknowledged, oldest first.
#[derive(Debug, Default)]
pub struct Kept {
    exits: VecDeque<ChildExit>,
}

impl Kept {
    /// Keeps one.
    pub fn push(&mut self, exit: ChildExit) {
        if self.exits.len() == MAX_KEPT {
            self.exits.pop_front();
        }
        self.exits.push_back(exit);
    }

    /// Forgets the oldest of that process id. Whether there was one.
    pub fn acknowledge(&mut self, pid: u32) -> bool {
        let found = self.exits.iter().position(|exit| exit.pid == pid);
        found.map(|at| self.exits.remove(at)).is_some()
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &ChildExit> {
        self.exits.iter()
    }
}

/// What `reap` found.
#[derive(Debug, PartialEq, Eq)]
pub enum Reaped {
    /// A child that has ended; it is gone now.
    Exit(ChildExit),
    /// There are children, and all live.
    NoneNow,
    /// There are no children.
    NoChildren,
}

/// Takes one child that has ended. Never waits.
pub fn reap() -> Reaped {
    match wait(libc::P_ALL, 0, libc::WEXITED | libc::WNOHANG | libc::WNOWAIT) {
        Ok(None) => Reaped::NoneNow,
        Ok(Some((pid, status))) => {
            let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
            // Now it goes; its process id may be used again from here on.
            if let Err(error) = wait(libc::P_PID, pid, libc::WEXITED | libc::WNOHANG) {
                log::error!("cannot reap process {pid}: {error}");
            }
            Reaped::Exit(ChildExit { pid, cgroup: parse_cgroup(&cgroup).to_string(), status })
        }
        Err(_) => Reaped::NoChildren,
    }
}

/// waitid(2). nix's form fails for a child that was ended by a real-time signal.
fn wait(kind: libc::idtype_t, pid: u32, options: i32) -> io::Result<Option<(u32, ChildStatus)>> {
    // SAFETY: all zeros is a valid `siginfo_t`.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    loop {
        // SAFETY: the kernel writes one `siginfo_t` to the pointer, which is of a live one.
        if unsafe { libc::waitid(kind, pid, &mut info, options) } == 0 {
            break;
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    // SAFETY: waitid has filled these members, or left them zero where nobody has ended.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    let status = if info.si_code == libc::CLD_EXITED { ChildStatus::Code(status) } else { ChildStatus::Signal(status) };
    Ok(u32::try_from(pid).ok().filter(|&pid| pid > 0).map(|pid| (pid, status)))
}

/// The path in `0::/path`. The kernel marks a group that was removed meanwhile.
fn parse_cgroup(text: &str) -> &str {
    let path = text.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default();
    path.strip_suffix(" (deleted)").unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(pid: u32, id: &str) -> ChildExit {
        ChildExit { pid, cgroup: format!("/sandboxes/{id}"), status: ChildStatus::Code(0) }
    }

    #[test]
    fn an_exit_is_kept_until_it_is_acknowledged() {
        let mut kept = Kept::default();
        kept.push(exit(7, "a"));
        kept.push(exit(8, "b"));
        kept.push(exit(7, "c")); // the process id came round again
        assert!(kept.acknowledge(7));
        assert!(!kept.acknowledge(9));
        assert_eq!(kept.iter().filter_map(ChildExit::sandbox).collect::<Vec<_>>(), ["b", "c"]);
        assert!(kept.acknowledge(7) && kept.acknowledge(8) && !kept.acknowledge(7));
    }

    #[test]
    fn a_supervisor_that_never_acknowledges_costs_bounded_memory() {
        let mut kept = Kept::default();
        for pid in 0..MAX_KEPT as u32 + 10 {
            kept.push(exit(pid, "a"));
        }
        assert_eq!(kept.iter().count(), MAX_KEPT);
        assert!(kept.iter().next().is_some_and(|oldest| oldest.pid == 10));
    }

    #[test]
    fn the_group_of_a_zombie_is_read_also_when_it_was_removed() {
        assert_eq!(parse_cgroup("0::/sandboxes/abc\n"), "/sandboxes/abc");
        assert_eq!(parse_cgroup("1:name=x:/y\n0::/sandboxes/abc (deleted)\n"), "/sandboxes/abc");
        assert_eq!(parse_cgroup(""), "");
    }

    #[test]
    fn codes_and_signals_are_told_apart_also_real_time_ones() {
        for (script, expected) in [
            ("exit 3", ChildStatus::Code(3)),
            ("kill -9 $$", ChildStatus::Signal(9)),
            ("kill -40 $$", ChildStatus::Signal(40)),
        ] {
            let mut child = std::process::Command::new("/bin/sh").args(["-c", script]).spawn().unwrap();
            let found = wait(libc::P_PID, child.id(), libc::WEXITED | libc::WNOWAIT).unwrap();
            assert_eq!(found, Some((child.id(), expected)), "{script}");
            child.wait().unwrap();
        }
    }
}
