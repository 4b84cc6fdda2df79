//! What an earlier supervisor left: sandboxes that run are taken over, the rest is written down or taken down.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use mio::net::UnixStream;

use super::agents::GREETING;
use super::finish::Extent;
use super::health::Probe;
use super::history::OpenRecords;
use super::instance::{Sandbox, Worker};
use super::supervisor::{Done, Supervisor, Timer, now_ms};
use crate::sandbox::agent::Agent;
use crate::sandbox::census::user_of;
use crate::sandbox::claims::Listing;
use crate::sandbox::death;
use crate::sandbox::exec::{CodeRun, Exec};
use crate::sandbox::home::{Home, Places};
use crate::sandbox::id::SandboxId;
use crate::sandbox::ledger::{Account, Resource};
use crate::sandbox::lifecycle::State;
use crate::sandbox::limits::Oom;
use crate::sandbox::worker::{self, LastWords};
use crate::storage::state::{AllocationRow, Change, ExecutionRow, SandboxRow, Snapshot};
use crate::wire::{Code, Error, Fields, Link, Message, Request};

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
    /// It is paused as it was, and what is left of a worker goes.
    Paused,
    /// It was not there yet when the supervisor died, and nobody waits for it any more.
    Discard,
    /// It has ended.
    Ended(State, String),
}

/// `has_paused`: the files of a pause are whole and count.
fn fate(
    state: State,
    alive: bool,
    has_paused: bool,
    fresh_boot: bool,
    words: Option<&LastWords>,
    why: impl FnOnce() -> String,
) -> Fate {
    match state {
        // Its programs stand still as long as the files count.
        State::Resuming if has_paused => Fate::Paused,
        // The worker put its disks on their media before it said so.
        State::Pausing if has_paused && !alive && words.is_some_and(|words| words.reason == "stopped") => Fate::Paused,
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
    pub(super) fn adopt(&mut self, snapshot: &Snapshot, sandboxes: &[SandboxRow], fresh_boot: bool) {
        let mut discarded = Vec::new();
        let open = &snapshot.open_records;
        let mut open: OpenRecords =
            open.iter().map(|record| ((record.sandbox.clone(), record.exec), record.id)).collect();
        let mut recorded = recorded(&snapshot.allocations);
        for row in sandboxes {
            let Some(mut sandbox) = Sandbox::from_row(row, |id| self.places.of(id)) else {
                log::error!("the state database has a sandbox that cannot be read: {row:?}");
                continue;
            };
            let processes = sandbox.home.processes();
            let words = LastWords::read(&sandbox.home.last_words());
            let oom = Oom::of(sandbox.home.cgroup());
            let id = sandbox.id.clone();
            self.take_executions(&mut sandbox, &snapshot.executions, &mut open);
            // Its directory goes last when a sandbox is removed: that was done, but for the row.
            if !sandbox.home.is_there() {
                self.snapshots.store.release(id.as_str());
                give_back_records(&sandbox, &mut open);
                discarded.push(sandbox.home);
                continue;
            }
            let console = || sandbox.home.console_tail(death::CONSOLE_TAIL);
            let why = || death::reason(words.as_ref(), None, oom, &console());
            // A sandbox that was to go on from a snapshot is, until it does, paused in that.
            let in_snapshot = sandbox.state == State::Resuming && sandbox.snapshot.is_some();
            let paused = in_snapshot || sandbox.home.has_paused();
            let fate = match sandbox.spec.is_builder() {
                // Its client's request ended with the supervisor before.
                true => Fate::Discard,
                false => fate(sandbox.state, !processes.is_empty(), paused, fresh_boot, words.as_ref(), why),
            };
            match fate {
                Fate::Keep => {
                    let holds = sandbox.home.holds_worker();
                    self.sandboxes.insert(id.clone(), sandbox);
                    self.take_over_account(&id, recorded.remove(&id).as_ref(), false);
                    if holds {
                        self.let_go(&id, true);
                    }
                    self.restart_later(&id);
                    self.settle_pause(&id);
                }
                Fate::Paused => {
                    sandbox.state = State::Paused;
                    if in_snapshot {
                        sandbox.home.drop_paused();
                    } else {
                        sandbox.snapshot = None;
                    }
                    self.sandboxes.insert(id.clone(), sandbox);
                    self.take_over_account(&id, recorded.remove(&id).as_ref(), false);
                    self.record(&id);
                    self.let_go(&id, true);
                    self.settle_pause(&id);
                }
                Fate::Discard => {
                    self.snapshots.store.release(id.as_str());
                    give_back_records(&sandbox, &mut open);
                    discarded.push(sandbox.home);
                }
                Fate::Ended(state, reason) => {
                    log::warn!("sandbox {id}: {reason}");
                    sandbox.state = state;
                    sandbox.reason = reason;
                    sandbox.ended_ms = Some(now_ms());
                    end_execs(&mut sandbox);
                    self.sandboxes.insert(id.clone(), sandbox);
                    self.take_over_account(&id, recorded.remove(&id).as_ref(), false);
                    self.record(&id);
                    // After a power loss the disk is what is left to save.
                    let restarts = self.restart_later(&id);
                    self.let_go(&id, fresh_boot || restarts || state == State::Stopped);
                }
                Fate::Adopt => {
                    self.take_over_slot(&mut sandbox, row.net_address.as_deref());
                    self.sandboxes.insert(id.clone(), sandbox);
                    self.take_over_account(&id, recorded.remove(&id).as_ref(), true);
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
        let ids: Vec<SandboxId> = self.sandboxes.keys().cloned().collect();
        ids.iter().for_each(|id| self.time_sandbox(id));
        self.sweep(discarded, recorded);
        self.end_records(open);
    }

    fn take_executions(&self, sandbox: &mut Sandbox, executions: &[ExecutionRow], open: &mut OpenRecords) {
        let capacity = self.config.sandbox.exec_ring_kib * 1024;
        for row in executions.iter().filter(|row| row.sandbox_id == sandbox.id.as_str()) {
            let argv = row.argv.iter().map(|arg| arg.clone().into_bytes()).collect();
            let mut exec = Exec::new(row.exec_id, argv, row.started_ms);
            if let Some(language) = &row.language {
                exec.is_run(CodeRun { language: language.clone(), context: row.context, running: true });
            }
            exec.reopen(&sandbox.home, capacity);
            exec.record = open.remove(&(row.sandbox_id.clone(), row.exec_id));
            if row.state != "running" {
                let mut fields = Fields::new();
                for (key, value) in [("exit", row.exit), ("signal", row.signal)] {
                    if let Some(value) = value {
                        fields = fields.with(key, value);
                    }
                }
                exec.ended_ms = row.ended_ms;
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
        let mut link = Link::new(UnixStream::from_std(stream));
        // It may be of another version of Warren: it is asked for nothing else before it has said so (`greeted`).
        link.send(&Message::Request(Request::new(GREETING, "hello")));
        let mut agent = Agent::prepare(sandbox.home.socket())?;
        let stopping = sandbox.state == State::Stopping;
        let descriptors = (pidfd.as_raw_fd(), link.stream_ref().as_raw_fd(), agent.stream().as_raw_fd());
        let tokens = self.watch_worker(id, descriptors.0, descriptors.1, descriptors.2)?;
        let uid = u64::try_from(pid).ok().and_then(user_of).ok_or(io::ErrorKind::NotFound)?;
        self.uids.claim(uid);
        self.ledger.with(id, |account| {
            account.note(Resource::User, uid);
            account.note(Resource::Process, u64::try_from(pid).unwrap_or(0));
            Ok(())
        });
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
                asked: vec![GREETING],
                listing: Listing::default(),
                tokens,
                refusal: None,
                status: None,
                told_to_stop: false,
                dead: false,
                agent_losses: 0,
                probe: Probe::default(),
                verdict: None,
                foreign: None,
                disk_full: false,
                learning: None,
            });
        }
        self.touched_sandboxes.insert(id.clone());
        self.watch_health(id);
        if stopping {
            self.timers.after(Duration::ZERO, Timer::Stop(id.clone()));
        } else {
            self.meeting.expect(id);
        }
        log::info!("sandbox {id} runs on under worker {pid}");
        Ok(())
    }

    /// Takes down what a sandbox that has ended still holds.
    fn let_go(&mut self, id: &SandboxId, keep_disk: bool) {
        let extent = if keep_disk { Extent::Worker } else { Extent::AllButLogs };
        self.ledger.with(id, |account| {
            account.give_back(&extent.resources());
            Ok(())
        });
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let (home, owned) = (sandbox.home.clone(), id.clone());
        // Its worker may take a moment to die, and until then nobody else is to have its user: `released` gives it back.
        sandbox.uid = users(&home, self.ledger.of(id)).into_iter().next();
        sandbox.uid.iter().for_each(|uid| self.uids.claim(*uid));
        sandbox.releasing = true;
        let started = self.background.run("release", move || {
            let result = if keep_disk { home.release_worker() } else { home.release() };
            Done::Released { sandbox: owned, gone: false, result }
        });
        if let Err(e) = started {
            log::error!("sandbox {id}: no thread to take it down: {e}");
            sandbox.releasing = false;
        }
    }

    /// Takes down what belongs to no sandbox, and settles accounts of nobody: `recorded` are those that no sandbox has.
    fn sweep(&mut self, mut homes: Vec<Home>, mut recorded: BTreeMap<SandboxId, Account>) {
        let listed: BTreeSet<SandboxId> = homes.iter().filter_map(|home| SandboxId::parse(home.id()?)).collect();
        homes.extend(strays(&self.places, |id| self.sandboxes.contains_key(id) || listed.contains(id)));
        let (mut ids, mut taken) = (Vec::new(), Vec::new());
        for home in &homes {
            let Some(id) = home.id().and_then(SandboxId::parse) else { continue };
            let mut account = recorded.remove(&id).unwrap_or_else(Account::of_strays);
            account.give_back(Resource::ALL);
            taken.extend(users(home, Some(&account)));
            self.ledger.open(&id, account);
            ids.push(id);
        }
        for id in ids {
            self.database.submit(Change::RemoveSandbox { id: id.to_string() });
        }
        for id in recorded.into_keys() {
            // Nothing of it was taken yet, or all was given back.
            self.ledger.vanished += 1;
            self.database.submit(Change::RemoveAllocation { sandbox_id: id.to_string() });
        }
        if homes.is_empty() {
            return;
        }
        // Their workers may take a moment to die, and until then nobody else is to have their user.
        taken.iter().for_each(|uid| self.uids.claim(*uid));
        let started = self.background.run("sweep", move || {
            let remove = |home: &Home| (home.id().and_then(SandboxId::parse), home.remove());
            Done::Swept { homes: homes.iter().map(remove).collect(), users: taken }
        });
        if let Err(e) = started {
            log::error!("no thread to take leftovers down: {e}");
        }
    }

    /// Leftovers were taken down, or could not be: then the ledger keeps them, and so does their user.
    pub(super) fn swept(&mut self, homes: Vec<(Option<SandboxId>, io::Result<()>)>, users: &[u32]) {
        let (mut reclaimed, mut failed) = (0, 0);
        for (id, result) in homes {
            let Some(id) = id else { continue };
            self.ledger.with(&id, |account| {
                account.given_back(Resource::ALL, result.is_ok());
                Ok(())
            });
            match result {
                Ok(()) => {
                    reclaimed += 1;
                    self.close_account(&id);
                }
                Err(e) => {
                    failed += 1;
                    log::error!("leftovers of sandbox {id} cannot be taken down: {e}");
                    self.post(&id);
                }
            }
        }
        if failed == 0 {
            users.iter().for_each(|uid| self.uids.give_back(*uid));
        }
        self.ledger.reclaimed += reclaimed;
        log::warn!("reclaimed {reclaimed} leftovers of an earlier run");
    }
}

/// Accounts as an earlier supervisor wrote them.
fn recorded(rows: &[AllocationRow]) -> BTreeMap<SandboxId, Account> {
    let account = |row: &AllocationRow| {
        let read = SandboxId::parse(&row.sandbox_id).zip(Account::parse(&row.held));
        if read.is_none() {
            log::error!("the state database has an account that cannot be read: {row:?}");
        }
        read
    };
    rows.iter().filter_map(account).collect()
}

/// User ids that processes in a home run by, or may.
fn users(home: &Home, account: Option<&Account>) -> BTreeSet<u32> {
    let running: BTreeSet<u32> = home.processes().into_iter().filter_map(|pid| user_of(pid.try_into().ok()?)).collect();
    let noted = account.and_then(|account| account.get(Resource::User)).filter(|entry| !entry.holding.is_free());
    let noted = noted.and_then(|entry| u32::try_from(entry.value?).ok());
    running.into_iter().chain(noted).collect()
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

/// Records of a sandbox that goes are ended with those of sandboxes that went before.
fn give_back_records(sandbox: &Sandbox, open: &mut OpenRecords) {
    let records = sandbox.execs.values().filter_map(|exec| Some(((sandbox.id.to_string(), exec.number), exec.record?)));
    open.extend(records);
}

fn end_execs(sandbox: &mut Sandbox) {
    for exec in sandbox.execs.values_mut().filter(|exec| exec.outcome.is_none()) {
        exec.finish(Err(Error::new(Code::LinkLost, format!("the sandbox ended: {}", sandbox.reason))));
    }
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
        assert_eq!(fate(State::Running, true, false, false, None, dead), Fate::Adopt);
        assert_eq!(
            fate(State::Running, false, false, true, None, dead),
            Fate::Ended(State::Error, "node lost power".into())
        );
        let off = LastWords { reason: "guest-poweroff".into(), detail: String::new() };
        assert_eq!(
            fate(State::Running, false, false, false, Some(&off), dead),
            Fate::Ended(State::Stopped, "the guest powered off".into())
        );
        assert!(matches!(fate(State::Running, false, false, false, None, dead), Fate::Ended(State::Error, _)));
    }

    #[test]
    fn a_dying_worker_has_its_user_until_it_is_gone() {
        let root = std::env::temp_dir().join(format!("warren-adopt-{}", std::process::id()));
        let places = Places { disks: root.join("d"), sockets: root.join("s"), cgroups: root.join("c") };
        let id = SandboxId::parse("abcdefghijkl").unwrap();
        fs::create_dir_all(places.cgroups.join(id.as_str())).unwrap();
        let home = places.of(&id);
        assert_eq!(users(&home, None), BTreeSet::new());
        fs::write(home.cgroup().join("cgroup.procs"), format!("{}\n", std::process::id())).unwrap();
        let own = nix::unistd::getuid().as_raw();
        assert_eq!(users(&home, None), BTreeSet::from([own]), "by its process");
        // One that was recorded and is not seen: it may be about to be started, or on its way out.
        let account = |text: &str| Account::parse(text).unwrap();
        fs::write(home.cgroup().join("cgroup.procs"), "").unwrap();
        assert_eq!(users(&home, Some(&account("user=active:2100000000"))), BTreeSet::from([2_100_000_000]));
        assert_eq!(users(&home, Some(&account("user=released:2100000000"))), BTreeSet::new());
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn a_pause_or_resume_that_was_cut_short_leaves_the_old_or_the_new() {
        let off = LastWords { reason: "stopped".into(), detail: String::new() };
        let pausing = |alive, files, words: Option<&LastWords>| fate(State::Pausing, alive, files, false, words, dead);
        assert_eq!(pausing(true, false, None), Fate::Adopt, "it runs on");
        assert_eq!(pausing(true, true, None), Fate::Adopt, "its disks may not be on their media");
        assert_eq!(pausing(false, true, Some(&off)), Fate::Paused);
        assert!(matches!(pausing(false, true, None), Fate::Ended(State::Error, _)));
        assert!(matches!(pausing(false, false, Some(&off)), Fate::Ended(State::Error, _)));
        for (alive, fresh_boot) in [(true, false), (false, false), (false, true)] {
            assert_eq!(fate(State::Resuming, alive, true, fresh_boot, None, dead), Fate::Paused);
        }
        assert_eq!(fate(State::Resuming, true, false, false, None, dead), Fate::Adopt, "its programs may run already");
        assert!(matches!(fate(State::Resuming, false, false, true, None, dead), Fate::Ended(State::Error, _)));
        assert_eq!(fate(State::Paused, false, true, true, None, dead), Fate::Keep);
    }

    #[test]
    fn a_sandbox_that_never_ran_is_discarded_and_one_that_ended_is_kept() {
        for state in [State::Pending, State::Scheduling, State::Creating, State::Starting] {
            assert_eq!(fate(state, true, false, false, None, dead), Fate::Discard);
        }
        for state in [State::Stopped, State::Error] {
            assert_eq!(fate(state, false, false, true, None, dead), Fate::Keep);
        }
        assert_eq!(
            fate(State::Stopping, false, false, true, None, dead),
            Fate::Ended(State::Stopped, "stopped".into())
        );
    }
}
