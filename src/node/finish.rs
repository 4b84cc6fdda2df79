//! From a running sandbox to none: stops, deaths, removal, the node's own end.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use super::agents::no_room;
use super::components::Progress;
use super::fork::RollingBack;
use super::instance::{Awaited, Route, Waiter, Worker};
use super::pause::Pausing;
use super::start::with_console;
use super::supervisor::{Done, Source, Stopping, Supervisor, Timer, now_ms};
use crate::init::StopMode;
use crate::sandbox::agent::{Agent, Approach};
use crate::sandbox::death;
use crate::sandbox::exec::Sink;
use crate::sandbox::id::SandboxId;
use crate::sandbox::ledger::Resource;
use crate::sandbox::lifecycle::State;
use crate::sandbox::limits::Oom;
use crate::sandbox::worker::LastWords;
use crate::storage::state::Change;
use crate::wire::{Code, Error, Fields, Message, Request};

/// How long init may take to tell how a worker ended.
const OBITUARY: Duration = Duration::from_millis(500);
/// How long the worker of a sandbox that is removed may take to tell what its guest touched.
const LEARNING: Duration = Duration::from_secs(1);
/// How long a worker may take to end a machine at once, before it is killed.
const WORKER_STOP: Duration = Duration::from_secs(3);
/// Pause before a lost agent link is made anew, and how often that is tried.
const RELINK: Duration = Duration::from_millis(200);
const MAX_RELINKS: u32 = 3;

impl Supervisor {
    /// Shuts a sandbox down: the guest first, by force after `timeout`. Fine for one that has ended.
    pub(super) fn stop(&mut self, id: &SandboxId, timeout: Option<Duration>) -> Result<(), Error> {
        let timeout = timeout.unwrap_or(Duration::from_secs(self.config.sandbox.stop_timeout_s));
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return Ok(()) };
        match sandbox.state {
            State::Error => return self.stop_restarting(id),
            State::Stopped | State::Stopping => return Ok(()),
            State::Paused => return self.stop_paused(id),
            State::Pending | State::Scheduling => {
                self.fail_start(id, Error::new(Code::Cancelled, "the sandbox was stopped before it started"));
                return Ok(());
            }
            _ => sandbox.state.become_(State::Stopping)?,
        }
        sandbox.reason = "stopped".to_string();
        if let Some(worker) = sandbox.worker.as_mut().filter(|worker| worker.agent.is_ready() && !timeout.is_zero()) {
            let tag = worker.agent.request(Request::new("", "system.poweroff"));
            worker.routes.insert(tag, Route::PowerOff);
            self.touched_sandboxes.insert(id.clone());
            self.timers.after(timeout, Timer::Stop(id.clone()));
        } else {
            self.stop_expired(id);
        }
        self.record(id);
        Ok(())
    }

    /// A paused sandbox is stopped: its disk is kept as a power cut would leave it.
    fn stop_paused(&mut self, id: &SandboxId) -> Result<(), Error> {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return Ok(()) };
        sandbox.state.become_(State::Stopping)?;
        sandbox.state.become_(State::Stopped)?;
        sandbox.reason = "stopped".to_string();
        sandbox.ended_ms = Some(now_ms());
        let running: Vec<u64> = sandbox.execs.values().filter(|e| e.outcome.is_none()).map(|e| e.number).collect();
        self.execs_ended(id, running, &Error::new(Code::LinkLost, "the sandbox was stopped"));
        // Its row first: paused without files it could be nothing.
        let writing = self.record(id);
        if let Some(sandbox) = self.sandboxes.get_mut(id) {
            sandbox.writing = writing;
            sandbox.releasing = true;
            if !sandbox.settling {
                self.drop_paused(id);
            }
        }
        Ok(())
    }

    /// The files that a sandbox was paused as go.
    pub(super) fn drop_paused(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let (home, owned) = (sandbox.home.clone(), id.clone());
        let started = self.background.run("release", move || {
            home.drop_paused();
            Done::Released { sandbox: owned, gone: false, result: Ok(()) }
        });
        if let Err(e) = started {
            log::error!("sandbox {id}: no thread to take its files down: {e}");
            sandbox.releasing = false;
        }
    }

    /// The guest did not shut down in time: its worker ends the machine, or is ended itself.
    pub(super) fn stop_expired(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let Some(worker) = sandbox.worker.as_mut().filter(|worker| !worker.dead) else { return };
        if sandbox.state != State::Stopping {
            return;
        }
        // One of another version is not asked.
        if std::mem::replace(&mut worker.told_to_stop, true) || worker.foreign.is_some() {
            log::warn!("sandbox {id}: worker {} does not stop; it is killed", worker.pid);
            sandbox.reason = "killed: its worker did not stop".to_string();
            if let Err(e) = sandbox.home.kill() {
                log::error!("sandbox {id} cannot be killed: {e}");
            }
            return;
        }
        worker.link.send(&Message::Request(Request::new("stop", "vm.stop")));
        self.touched_sandboxes.insert(id.clone());
        self.timers.after(WORKER_STOP, Timer::Stop(id.clone()));
    }

    /// A worker's process has ended; why may still be on its way.
    pub(super) fn worker_ended(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return self.waiting_worker_ended(id) };
        let Some(worker) = &mut sandbox.worker else { return self.waiting_worker_ended(id) };
        if std::mem::replace(&mut worker.dead, true) {
            return;
        }
        let token = worker.tokens[1];
        self.read_worker(id, token);
        self.timers.after(OBITUARY, Timer::Obituary(id.clone()));
        self.bury(id);
    }

    /// Ends the sandbox of a worker that is known to have ended, once it is known how.
    pub(super) fn bury(&mut self, id: &SandboxId) {
        let has_init = self.init.as_ref().is_some_and(|init| !init.is_lost());
        let Some(sandbox) = self.sandboxes.get(id) else { return };
        let Some(worker) = &sandbox.worker else { return };
        let told = worker.status.is_some() || LastWords::read(&sandbox.home.last_words()).is_some() || !has_init;
        if (worker.dead || worker.status.is_some()) && told {
            self.bury_anyway(id);
        }
    }

    /// Ends the sandbox of a worker that has ended.
    pub(super) fn bury_anyway(&mut self, id: &SandboxId) {
        self.met(id);
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let recording = matches!(sandbox.rolling_back, Some(RollingBack::Preparing | RollingBack::Recording(_)));
        if sandbox.pausing == Some(Pausing::Capturing) || sandbox.snapshotting.is_some() || recording {
            // A thread still has files in its home, or its row is on its way: the end of that comes back here.
            return;
        }
        let Some(worker) = sandbox.worker.take_if(|worker| worker.dead || worker.status.is_some()) else { return };
        let words = LastWords::read(&sandbox.home.last_words());
        let oom = Oom::of(sandbox.home.cgroup());
        let cause = worker.verdict.clone();
        let console = || sandbox.home.console_tail(death::CONSOLE_TAIL);
        let cause = cause.unwrap_or_else(|| death::reason(words.as_ref(), worker.status, oom, &console()));
        let (refusal, disk_full) = (worker.refusal.clone(), worker.disk_full);
        let pid = worker.pid;
        let in_order =
            words.as_ref().is_some_and(|words| matches!(words.reason.as_str(), "guest-poweroff" | "stopped"));
        // What runs in it is on disk with it, or still is.
        let paused = in_order && sandbox.pausing == Some(Pausing::Ending)
            || sandbox.state == State::Resuming && (sandbox.home.has_paused() || sandbox.origin().is_some());
        self.close_worker(id, worker, &cause, paused);

        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        sandbox.ended_ms = Some(now_ms());
        self.ledger.worker_ended(id, in_order);
        sandbox.hung_ms = None;
        let pausing = sandbox.pausing.take();
        if self.rollback_buried(id) {
            return;
        }
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        match sandbox.state {
            State::Starting | State::Error
                if !sandbox.removing && (sandbox.restarting || sandbox.state == State::Starting) =>
            {
                let error = refusal.unwrap_or_else(|| {
                    let error =
                        Error::new(Code::VmFailed, format!("the machine ended before its agent answered: {cause}"));
                    with_console(error, sandbox)
                });
                let error = if disk_full { no_room(&error.message) } else { error };
                self.fail_start(id, error);
                return;
            }
            State::Pausing if paused && pausing.is_some() => {
                super::faults::pass(super::faults::Point::PauseEnded);
                // It has a memory of its own now.
                (sandbox.state, sandbox.snapshot) = (State::Paused, None);
            }
            State::Resuming if !sandbox.removing => {
                let error =
                    refusal.unwrap_or_else(|| Error::new(Code::VmFailed, format!("the machine ended: {cause}")));
                self.resume_failed(id, &error);
                return;
            }
            State::Running if in_order => {
                sandbox.state = State::Stopped;
                sandbox.reason = "the guest powered off".to_string();
            }
            State::Stopping => sandbox.state = State::Stopped,
            State::Error | State::Stopped => {}
            _ => {
                log::warn!("sandbox {id}: worker {pid} is gone: {cause}");
                if pausing.is_some() {
                    sandbox.home.drop_paused();
                }
                sandbox.state = State::Error;
                sandbox.reason = cause;
            }
        }
        let state = self.sandboxes.get(id).map(|sandbox| sandbox.state);
        if self.sandboxes.get(id).is_some_and(|sandbox| sandbox.removing) {
            self.release(id, Extent::Everything);
        } else if state == Some(State::Paused) {
            self.hold(id);
            self.collect();
            self.release(id, Extent::Worker);
            self.settle_pause(id);
            let writing = self.record(id);
            if let Some(sandbox) = self.sandboxes.get_mut(id) {
                sandbox.writing = writing;
            }
            return;
        } else if self.sandboxes.get(id).is_some_and(|sandbox| sandbox.state == State::Error) {
            self.after_failure(id);
        } else {
            self.release(id, Extent::Worker);
        }
        self.record(id);
    }

    /// Lets go of a worker: nobody hears from it any more.
    fn close_worker(&mut self, id: &SandboxId, worker: Worker, cause: &str, paused: bool) {
        for token in worker.tokens {
            self.unwatch(token);
        }
        self.lose_routes(id, worker.routes, cause);
        for inquiry in worker.inquiries.into_values() {
            let error = Error::new(Code::LinkLost, format!("sandbox {id}: {cause}"));
            self.finish(inquiry.client, &Message::err(&inquiry.tag, error));
        }
        if paused {
            let execs = self.sandboxes.get_mut(id).into_iter().flat_map(|sandbox| sandbox.execs.values_mut());
            execs.for_each(|exec| exec.route = None);
            return;
        }
        let running: Vec<u64> = match self.sandboxes.get(id) {
            Some(sandbox) => sandbox.execs.values().filter(|e| e.outcome.is_none()).map(|e| e.number).collect(),
            None => Vec::new(),
        };
        self.execs_ended(id, running, &Error::new(Code::LinkLost, format!("the sandbox ended: {cause}")));
    }

    fn lose_routes(&mut self, id: &SandboxId, routes: std::collections::HashMap<String, Route>, cause: &str) {
        for route in routes.into_values() {
            if let Route::Relay { client, tag } = route {
                let error = Error::new(Code::LinkLost, format!("sandbox {id}: {cause}"));
                self.finish(client, &Message::err(&tag, error));
            }
        }
    }

    /// The link to an agent broke while its worker lives. It is made anew a few times; then the sandbox is given up.
    pub(super) fn agent_lost(&mut self, id: &SandboxId, error: Error) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let Some(worker) = &mut sandbox.worker else { return };
        let token = std::mem::replace(&mut worker.tokens[2], mio::Token(usize::MAX));
        // Nobody sends to it any more.
        worker.agent.lose();
        let routes = std::mem::take(&mut worker.routes);
        worker.agent_losses += 1;
        for exec in sandbox.execs.values_mut() {
            exec.route = None;
        }
        if sandbox.state == State::Starting && !error.is(Code::LinkLost) {
            // The agent said why it cannot serve; the machine ends next.
            worker.refusal.get_or_insert(error.clone());
        }
        if sandbox.state == State::Running {
            if worker.agent_losses > MAX_RELINKS {
                log::error!("sandbox {id}: {error}; it is given up");
                worker.verdict = Some(format!("agent-lost: its agent was lost: {}", error.message));
                if let Err(e) = sandbox.home.kill() {
                    log::error!("sandbox {id} cannot be killed: {e}");
                }
            } else {
                self.timers.after(RELINK, Timer::Relink(id.clone()));
            }
        }
        self.unwatch(token);
        self.lose_routes(id, routes, &error.message);
    }

    /// A worker broke its link's protocol: it is ended, and its sandbox with it.
    pub(super) fn worker_lost(&mut self, id: &SandboxId, error: &Error) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let Some(worker) = sandbox.worker.as_mut().filter(|worker| !worker.dead && worker.verdict.is_none()) else {
            return;
        };
        log::error!("sandbox {id}: {error}; it is given up");
        worker.verdict = Some(format!("worker-lost: {}", error.message));
        if let Err(e) = sandbox.home.kill() {
            log::error!("sandbox {id} cannot be killed: {e}");
        }
    }

    /// Makes a lost link to an agent anew.
    pub(super) fn relink(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        if sandbox.state != State::Running || sandbox.worker.as_ref().is_none_or(|worker| worker.dead) {
            return;
        }
        let opened = Agent::open(sandbox.home.socket(), Approach::Connect).and_then(|mut agent| {
            let token = self.watch(agent.stream().as_raw_fd(), Source::Agent(id.clone()))?;
            Ok((agent, token))
        });
        match (opened, self.sandboxes.get_mut(id).and_then(|sandbox| sandbox.worker.as_mut())) {
            (Ok((agent, token)), Some(worker)) => {
                worker.agent = agent;
                worker.tokens[2] = token;
                self.touched_sandboxes.insert(id.clone());
            }
            (Err(e), _) => self.agent_lost(id, Error::new(Code::LinkLost, e.to_string())),
            _ => {}
        }
    }

    /// Takes a sandbox away, by force if it has a worker.
    pub(super) fn remove(&mut self, id: &SandboxId) {
        self.unparked_by_end(id, "it was removed");
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let mut removed = false;
        let removing = std::mem::replace(&mut sandbox.removing, true);
        if removing && sandbox.worker.is_some() {
            return;
        }
        if !removing {
            // First: what of it is there when the row is not, the next supervisor takes down.
            removed = true;
            sandbox.writing = Some(self.database.submit(Change::RemoveSandbox { id: id.to_string() }));
        }
        let unborn = |w: &mut Waiter| {
            let what = w.what;
            matches!(what, Awaited::Created { .. } | Awaited::Forked | Awaited::Prepared)
                || matches!(what, Awaited::Builder | Awaited::Tried | Awaited::Halted)
        };
        let pending: Vec<_> = sandbox.waiters.extract_if(.., unborn).collect();
        if let Some(worker) = &sandbox.worker {
            if worker.learning.is_some() && !worker.dead {
                // What it is telling is of use to others: `learned_working_set` comes back here.
                self.timers.after(LEARNING, Timer::Kill(id.clone()));
            } else {
                self.kill_removed(id);
            }
        } else if !sandbox.releasing {
            self.release(id, Extent::Everything);
        }
        if removed {
            self.tell("sandbox.removed", id, None, "");
        }
        for waiter in pending {
            let error = Error::new(Code::Cancelled, "the sandbox was removed before it ran");
            match waiter.what {
                Awaited::Forked => self.forked(waiter.client, &waiter.tag, Err(error)),
                _ => self.finish(waiter.client, &Message::err(&waiter.tag, error)),
            }
        }
    }

    /// Ends the worker of a sandbox that is removed.
    pub(super) fn kill_removed(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get(id).filter(|s| s.removing && s.worker.is_some()) else { return };
        if let Err(e) = sandbox.home.kill() {
            log::error!("sandbox {id} cannot be killed: {e}");
        }
    }

    pub(super) fn release(&mut self, id: &SandboxId, extent: Extent) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        sandbox.releasing = true;
        if sandbox.settling && extent != Extent::Worker {
            // A thread works with its files: `pause_settled` goes on.
            sandbox.after_settling = Some(extent);
            return;
        }
        if self.waits_for_its_worker(id, extent) {
            return;
        }
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        sandbox.tap = None;
        self.ledger.with(id, |account| {
            account.give_back(&extent.resources());
            Ok(())
        });
        if let (true, Some(network)) = (std::mem::take(&mut sandbox.holds_slot), &self.network) {
            // Its end of the network first: `slot_released` goes on.
            sandbox.after_network = Some(extent);
            network.release(id.as_str());
            return;
        }
        let (home, owned) = (sandbox.home.clone(), id.clone());
        let started = self.background.run("release", move || {
            let result = match extent {
                Extent::Worker => home.release_worker(),
                Extent::AllButLogs => home.release(),
                Extent::Everything => home.remove(),
            };
            Done::Released { sandbox: owned, gone: extent == Extent::Everything, result }
        });
        if let Err(e) = started {
            log::error!("sandbox {id}: no thread to take it down: {e}");
            sandbox.releasing = false;
        }
    }

    /// A sandbox's network slot is given back: the rest follows.
    pub(super) fn slot_released(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        sandbox.slot = None;
        self.ledger.with(id, |account| {
            account.given_back(&[Resource::Slot], true);
            Ok(())
        });
        if let Some(extent) = sandbox.after_network.take() {
            self.record(id);
            self.release(id, extent);
        }
    }

    /// Things of a sandbox were taken down.
    pub(super) fn released(&mut self, id: &SandboxId, gone: bool, result: io::Result<()>) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        sandbox.releasing = false;
        self.ledger.with(id, |account| {
            account.given_back(Resource::ALL, result.is_ok());
            Ok(())
        });
        if let Err(e) = result {
            log::error!("sandbox {id} cannot be taken down: {e}");
            let error = Error::new(Code::Internal, format!("sandbox {id} cannot be taken down: {e}"));
            sandbox.removing = false;
            for waiter in std::mem::take(&mut sandbox.waiters) {
                self.finish(waiter.client, &Message::err(&waiter.tag, error.clone()));
            }
            self.post(id);
            self.record(id);
            return;
        }
        self.give_back(id);
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        if sandbox.rolling_back == Some(RollingBack::Ending) && !sandbox.removing {
            self.post(id);
            self.rollback_ended(id);
            return;
        }
        if !gone {
            if sandbox.removing {
                self.release(id, Extent::Everything);
            } else {
                self.post(id);
                self.notify_waiters(id);
            }
            return;
        }
        sandbox.gone = true;
        let written = sandbox.writing.is_none();
        self.close_account(id);
        if written {
            self.removed(id);
        }
    }

    /// Nothing of a sandbox is left, on the node or in the database.
    pub(super) fn removed(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.remove(id) else { return };
        self.snapshots.store.release(id.as_str());
        self.collect();
        for waiter in sandbox.waiters {
            self.finish(waiter.client, &Message::ok(&waiter.tag, Fields::new().with("id", id)));
        }
        for viewer in sandbox.execs.into_values().flat_map(|exec| exec.viewers) {
            let error = Error::new(Code::NotFound, format!("sandbox {id} was removed"));
            self.finish(viewer.client, &Message::err(&viewer.tag, error));
        }
    }

    /// Begins the end of the node: the sandboxes are stopped, then everything else. `mode` is what init is asked for then.
    pub(super) fn begin_stop(&mut self, mode: Option<StopMode>, waiter: Option<(u64, String)>) {
        let stopping = self.stopping.get_or_insert_default();
        stopping.hands_over = false;
        stopping.mode = stopping.mode.or(mode);
        stopping.waiters.extend(waiter);
        self.empty_warm();
        let ids: Vec<SandboxId> = self.sandboxes.keys().cloned().collect();
        for id in ids {
            let state = self.sandboxes.get(&id).map(|sandbox| sandbox.state);
            match state {
                // On disk, or on the way there: it outlasts the node's end.
                Some(State::Paused | State::Pausing) => {}
                Some(State::Resuming) => self.fail_start(&id, Error::new(Code::Stopping, "the node is stopping")),
                _ if self.stop(&id, None).is_err() => self.remove(&id),
                _ => {}
            }
        }
    }

    /// Begins the end of this process only.
    pub(super) fn hand_over(&mut self) {
        self.stopping.get_or_insert_with(|| Stopping { hands_over: true, ..Stopping::default() });
        self.empty_warm();
    }

    /// Sandboxes may be asked for.
    pub(super) fn open_admission(&mut self) {
        log::info!("node {} answers on {}", self.node_id, self.config.control.socket.display());
    }

    /// Nothing new is taken, and what was begun has come to its end: sandboxes that stop or start, those that stay apart.
    pub(super) fn close_admission(&mut self) -> Result<Progress, String> {
        let Some(stopping) = &mut self.stopping else { return Ok(Progress::Done) };
        let hands_over = stopping.hands_over;
        let busy = self.sandboxes.values().filter(|sandbox| {
            let changing = sandbox.snapshotting.is_some() || sandbox.rolling_back.is_some();
            let stays = hands_over && sandbox.state == State::Running && !sandbox.removing && !changing;
            sandbox.releasing || sandbox.restarting || (sandbox.state.is_live() || sandbox.worker.is_some()) && !stays
        });
        let busy: Vec<&str> = busy.map(|sandbox| sandbox.id.as_str()).collect();
        if !busy.is_empty() {
            return Ok(Progress::Waits(format!("these have not come to an end: {}", busy.join(" "))));
        }
        for (client, tag) in std::mem::take(&mut stopping.waiters) {
            self.finish(client, &Message::ok(&tag, Fields::new()));
        }
        Ok(Progress::Done)
    }

    /// Everything has stopped: init is asked for what comes next.
    pub(super) fn request_stop(&mut self) {
        let mode = self.stopping.as_ref().and_then(|stopping| stopping.mode);
        if let (Some(mode), Some(init)) = (mode, &mut self.init) {
            init.request_stop(mode);
        }
    }

    /// Octets of answers that clients have not taken yet.
    pub(super) fn unread_answers(&mut self) -> usize {
        self.touched_clients.extend(self.clients.keys());
        self.settle();
        self.clients.values().map(|client| client.queued()).sum()
    }
}

/// How much of a sandbox is taken down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// Socket and cgroup; the disk stays.
    Worker,
    /// The disk as well; logs and outputs stay.
    AllButLogs,
    /// Everything.
    Everything,
}
