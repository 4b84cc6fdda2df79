//! What an earlier supervisor left: sandboxes that run are taken over, the rest is written down or taken down.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use mio::net::UnixStream;

use super::health::Probe;
use super::instance::{Sandbox, Worker};
use super::supervisor::{Done, Supervisor, Timer, now_ms};
use crate::sandbox::agent::{Agent, Approach};
use crate::sandbox::death;
use crate::sandbox::exec::Exec;
use crate::sandbox::home::{Home, Places};
use crate::sandbox::id::SandboxId;
use crate::sandbox::lifecycle::State;
use crate::sandbox::limits::Oom;
use crate::sandbox::worker::{self, LastWords};
use crate::storage::state::{ExecutionRow, SandboxRow};
use crate::wire::{Code, Error, Fields, Link};

/// Marks that a supervisor has run since the node booted. `true` when this is the first.
pub(super) fn mark_boot(run: &Path) -> bool {
    OpenOptions::new().write(true).create_new(true).open(run.join("supervised")).is_ok()
}

/// What becomes of a sandbox of an earlier supervisor.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    /// As it is.
    Keep,
    /// It runs: its worker is taken over.
    Adopt,
    /// It was not there yet when the supervisor died, and nobody waits for it any more.
    Discard,
    /// It has ended.
    Ended(State, String),
}

fn fate(state: State, alive: bool, fresh_boot: bool, words: Option<&LastWords>, why: impl FnOnce() -> String) -> Fate {
    match state {
        State::Stopped | State::Error | State::Paused => Fate::Keep,
        State::Pending | State::Scheduling | State::Creating | State::Starting => Fate::Discard,
        State::Stopping if !alive => Fate::Ended(State::Stopped, "stopped".to_string()),
        _ if alive => Fate::Adopt,
        _ if fresh_boot => Fate::Ended(State::Error, "node lost power".to_string()),
        _ => match words {
            Some(words) if words.reason == "guest-poweroff" => {
                Fate::Ended(State::Stopped, "the guest powered off".to_string())
            }
            _ => Fate::Ended(State::Error, why()),
        },
    }
}

impl Supervisor {
    pub(super) fn adopt(&mut self, sandboxes: &[SandboxRow], executions: &[ExecutionRow], fresh_boot: bool) {
        let mut discarded = Vec::new();
        for row in sandboxes {
            let Some(mut sandbox) = Sandbox::from_row(row, |id| self.places.of(id)) else {
                log::error!("the state database has a sandbox that cannot be read: {row:?}");
                continue;
            };
            let processes = sandbox.home.processes();
            let words = LastWords::read(&sandbox.home.last_words());
            let oom = Oom::of(sandbox.home.cgroup());
            let id = sandbox.id.clone();
            self.take_executions(&mut sandbox, executions);
            // Its directory goes last when a sandbox is removed: that was done, but for the row.
            if !sandbox.home.is_there() {
                discarded.push(sandbox.home);
                continue;
            }
            let console = || sandbox.home.console_tail(death::CONSOLE_TAIL);
            let why = || death::reason(words.as_ref(), None, oom, &console());
            match fate(sandbox.state, !processes.is_empty(), fresh_boot, words.as_ref(), why) {
                Fate::Keep => {
                    let holds = sandbox.home.holds_worker();
                    self.sandboxes.insert(id.clone(), sandbox);
                    if holds {
                        self.let_go(&id, true);
                    }
                    self.restart_later(&id);
                }
                Fate::Discard => discarded.push(sandbox.home),
                Fate::Ended(state, reason) => {
                    log::warn!("sandbox {id}: {reason}");
                    sandbox.state = state;
                    sandbox.reason = reason;
                    sandbox.ended_ms = Some(now_ms());
                    end_execs(&mut sandbox);
                    self.sandboxes.insert(id.clone(), sandbox);
                    self.record(&id);
                    // After a power loss the disk is what is left to save.
                    let restarts = self.restart_later(&id);
                    self.let_go(&id, fresh_boot || restarts || state == State::Stopped);
                }
                Fate::Adopt => {
                    self.take_over_slot(&mut sandbox, row.net_address.as_deref());
                    self.sandboxes.insert(id.clone(), sandbox);
                    if let Err(e) = self.take_over_worker(&id, processes[0]) {
                        log::error!("sandbox {id} cannot be taken over: {e}");
                        if let Some(sandbox) = self.sandboxes.get_mut(&id) {
                            (sandbox.slot, sandbox.holds_slot) = (None, false);
                            sandbox.state = State::Error;
                            sandbox.reason = format!("its worker could not be taken over: {e}");
                            sandbox.ended_ms = Some(now_ms());
                            end_execs(sandbox);
                        }
                        self.record(&id);
                        let restarts = self.restart_later(&id);
                        self.let_go(&id, restarts);
                    }
                }
            }
        }
        self.sweep(discarded);
    }

    fn take_executions(&self, sandbox: &mut Sandbox, executions: &[ExecutionRow]) {
        let capacity = self.config.sandbox.exec_ring_kib * 1024;
        for row in executions.iter().filter(|row| row.sandbox_id == sandbox.id.as_str()) {
            let argv = row.argv.iter().map(|arg| arg.clone().into_bytes()).collect();
            let mut exec = Exec::new(row.exec_id, argv, row.started_ms);
            exec.reopen(&sandbox.home, capacity);
            if row.state != "running" {
                let mut fields = Fields::new();
                for (key, value) in [("exit", row.exit), ("signal", row.signal)] {
                    if let Some(value) = value {
                        fields = fields.with(key, value);
                    }
                }
                exec.finish(Ok(fields));
            }
            sandbox.next_exec = sandbox.next_exec.max(row.exec_id + 1);
            sandbox.execs.insert(row.exec_id, exec);
        }
    }

    /// The slot goes with the worker. Without it the sandbox reaches nothing.
    fn take_over_slot(&self, sandbox: &mut Sandbox, address: Option<&str>) {
        let Some(address) = address else { return };
        sandbox.slot = address.parse().ok().and_then(|address| self.network_settings.plan.slot_of(address));
        sandbox.holds_slot = sandbox.slot.is_some();
        if !sandbox.holds_slot {
            let (id, range) = (&sandbox.id, self.network_settings.plan.range());
            log::error!("sandbox {id} has the address {address}, which is not in network.range {range} any more");
        }
    }

    fn take_over_worker(&mut self, id: &SandboxId, pid: i32) -> io::Result<()> {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return Ok(()) };
        let pidfd = open_pidfd(pid)?;
        // Only after the descriptor is there is it sure that the number still means the worker.
        if !sandbox.home.processes().contains(&pid) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let stream = worker::connect(sandbox.home.socket())?;
        stream.set_nonblocking(true)?;
        let link = Link::new(UnixStream::from_std(stream));
        let mut agent = Agent::open(sandbox.home.socket(), Approach::Connect)?;
        let stopping = sandbox.state == State::Stopping;
        let descriptors = (pidfd.as_raw_fd(), link.stream_ref().as_raw_fd(), agent.stream().as_raw_fd());
        let tokens = self.watch_worker(id, descriptors.0, descriptors.1, descriptors.2)?;
        let uid = user_of(pid)?;
        self.uids.claim(uid);
        if let Some(sandbox) = self.sandboxes.get_mut(id) {
            sandbox.uid = Some(uid);
            sandbox.worker = Some(Worker {
                pid,
                _pidfd: pidfd,
                link,
                agent,
                routes: std::collections::HashMap::new(),
                inquiries: std::collections::HashMap::new(),
                next_inquiry: 0,
                tokens,
                refusal: None,
                status: None,
                told_to_stop: false,
                dead: false,
                agent_losses: 0,
                probe: Probe::default(),
                verdict: None,
            });
        }
        self.touched_sandboxes.insert(id.clone());
        self.watch_health(id);
        if stopping {
            self.timers.after(Duration::ZERO, Timer::Stop(id.clone()));
        }
        log::info!("sandbox {id} runs on under worker {pid}");
        Ok(())
    }

    /// Takes down what a sandbox that has ended still holds.
    fn let_go(&mut self, id: &SandboxId, keep_disk: bool) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        sandbox.releasing = true;
        let (home, owned) = (sandbox.home.clone(), id.clone());
        let started = self.background.run("release", move || {
            let result = if keep_disk { home.release_worker() } else { home.release() };
            Done::Released { sandbox: owned, gone: false, result }
        });
        if let Err(e) = started {
            log::error!("sandbox {id}: no thread to take it down: {e}");
            sandbox.releasing = false;
        }
    }

    /// Takes down what belongs to no sandbox.
    fn sweep(&mut self, mut homes: Vec<Home>) {
        homes.extend(strays(&self.places, |id| self.sandboxes.contains_key(id)));
        if homes.is_empty() {
            return;
        }
        let ids: Vec<String> = homes.iter().filter_map(|home| home.id().map(str::to_string)).collect();
        for id in ids {
            self.database.submit(crate::storage::state::Change::RemoveSandbox { id });
        }
        // Their workers may take a moment to die, and until then nobody else is to have their user.
        let users: Vec<u32> = homes.iter().flat_map(Home::processes).filter_map(|pid| user_of(pid).ok()).collect();
        users.iter().for_each(|uid| self.uids.claim(*uid));
        let started = self.background.run("sweep", move || {
            let mut reclaimed = 0;
            for home in homes {
                match home.remove() {
                    Ok(()) => reclaimed += 1,
                    Err(e) => log::error!("leftover {home:?} cannot be taken down: {e}"),
                }
            }
            Done::Swept { reclaimed, users }
        });
        if let Err(e) = started {
            log::error!("no thread to take leftovers down: {e}");
        }
    }
}

/// Directories, sockets and cgroups that no known sandbox has.
fn strays(places: &Places, known: impl Fn(&SandboxId) -> bool) -> Vec<Home> {
    let mut ids = std::collections::BTreeSet::new();
    for dir in [&places.disks, &places.sockets, &places.cgroups] {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let stem = name.to_str().map(|name| name.strip_suffix(".sock").unwrap_or(name));
            ids.extend(stem.and_then(SandboxId::parse));
        }
    }
    ids.iter().filter(|id| !known(id)).map(|id| places.of(id)).collect()
}

fn end_execs(sandbox: &mut Sandbox) {
    for exec in sandbox.execs.values_mut().filter(|exec| exec.outcome.is_none()) {
        exec.finish(Err(Error::new(Code::LinkLost, format!("the sandbox ended: {}", sandbox.reason))));
    }
}

/// The real user id of a process (proc_pid_status(5)).
fn user_of(pid: i32) -> io::Result<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let ids = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    let id = ids.and_then(|ids| ids.split_whitespace().next()?.parse().ok());
    id.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn open_pidfd(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and gives a new descriptor or -1.
    let descriptor = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let descriptor = i32::try_from(descriptor).map_err(|_| io::ErrorKind::InvalidData)?;
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made it, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dead() -> String {
        "worker-ended".to_string()
    }

    #[test]
    fn a_running_sandbox_is_adopted_only_with_its_worker() {
        assert_eq!(fate(State::Running, true, false, None, dead), Fate::Adopt);
        assert_eq!(fate(State::Running, false, true, None, dead), Fate::Ended(State::Error, "node lost power".into()));
        let off = LastWords { reason: "guest-poweroff".into(), detail: String::new() };
        assert_eq!(
            fate(State::Running, false, false, Some(&off), dead),
            Fate::Ended(State::Stopped, "the guest powered off".into())
        );
        assert!(matches!(fate(State::Running, false, false, None, dead), Fate::Ended(State::Error, _)));
    }

    #[test]
    fn a_sandbox_that_never_ran_is_discarded_and_one_that_ended_is_kept() {
        for state in [State::Pending, State::Scheduling, State::Creating, State::Starting] {
            assert_eq!(fate(state, true, false, None, dead), Fate::Discard);
        }
        for state in [State::Stopped, State::Error] {
            assert_eq!(fate(state, false, true, None, dead), Fate::Keep);
        }
        assert_eq!(fate(State::Stopping, false, true, None, dead), Fate::Ended(State::Stopped, "stopped".into()));
    }
}
