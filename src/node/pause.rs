//! From a running sandbox to files, and back: `sandbox.pause` and `sandbox.resume`.
//!
//! A pause: the row says `pausing`; the guest's programs are frozen; the worker holds the guest and has a child write its
//! state and memory into `pausing/`; both are synced and the directory becomes `paused/`; the worker puts its disks on
//! their media and ends; the row says `paused`, and only then is the client answered. A supervisor that dies over it
//! leaves a worker, which the next one lets run on, or none and `paused/`, which is a paused sandbox.
//!
//! A resume: another worker takes the files; its guest's programs stay frozen and its network closed until it knows who
//! it is. Before they go on, `paused/` is renamed: what they do from then on to the disk does not go with these files. So
//! a sandbox that was about to be resumed is paused as long as `paused/` is there.
//!
//! The memory of a sandbox that went on from a pause or a snapshot is written as what differs from that. When the worker is gone,
//! a thread makes it whole, and a resume waits for that (`Home::settle_paused`).

use std::path::Path;
use std::time::Instant;

use super::capture::FREEZE;
use super::faults::{self, Point};
use super::flattening::to_error;
use super::fork::RollingBack;
use super::instance::Awaited;
use super::start::MIB;
use super::supervisor::{Done, Supervisor};
use crate::sandbox::home::{Home, Settling};
use crate::sandbox::id::SandboxId;
use crate::sandbox::lifecycle::State;
use crate::sandbox::worker;
use crate::storage::memory_file;
use crate::storage::snapshots::SnapshotRow;
use crate::wire::{Code, Error, Fields, Message, Request};

/// How far a pause is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pausing {
    /// The row is on its way to the database.
    Recording,
    /// The agent was asked to freeze the guest's programs, at this time.
    Freezing(Instant),
    /// A thread waits for the files.
    Capturing,
    /// The files are whole: the worker ends.
    Ending,
}

impl Supervisor {
    /// A client wants a sandbox paused.
    pub(super) fn ask_pause(&mut self, key: u64, tag: &str, given: &str) -> Result<(), Error> {
        let id = self.find_running(key, given)?.id.clone();
        self.begin_pause(&id)?;
        self.await_(key, tag, &id, Awaited::Paused);
        Ok(())
    }

    /// Begins to pause a sandbox that runs.
    pub(super) fn begin_pause(&mut self, id: &SandboxId) -> Result<(), Error> {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return Ok(()) };
        if sandbox.spec.disks.iter().any(|disk| disk.is_the_nodes()) {
            // What others write to it meanwhile would not go with the memory.
            let message = format!("sandbox {id} has a disk that is the node's: it cannot be paused");
            return Err(Error::new(Code::BadState, message));
        }
        if sandbox.snapshotting.is_some() || sandbox.rolling_back.is_some() {
            return Err(Error::new(Code::BadState, format!("sandbox {id} is being taken a snapshot of or put back")));
        }
        sandbox.state.become_(State::Pausing)?;
        sandbox.pausing = Some(Pausing::Recording);
        // The time of one before this is nobody's any more.
        sandbox.capture = None;
        let writing = self.record(id);
        if let Some(sandbox) = self.sandboxes.get_mut(id) {
            sandbox.writing = writing;
        }
        Ok(())
    }

    /// The row says `pausing`: whoever comes after a kill knows.
    pub(super) fn pausing_recorded(&mut self, id: &SandboxId) {
        if self.sandboxes.get(id).is_none_or(|sandbox| sandbox.pausing != Some(Pausing::Recording)) {
            return;
        }
        let began = self.limit_capture(id, Point::PauseWritten);
        if let Some(sandbox) = self.sandboxes.get_mut(id) {
            sandbox.pausing = Some(Pausing::Freezing(began));
        }
        self.ask_freeze(id);
    }

    /// The agent has had its time to freeze the guest's programs.
    pub(super) fn freeze_expired(&mut self, id: &SandboxId) {
        if self.snapshot_freeze_expired(id) {
            self.frozen_for_snapshot(id, false);
            return;
        }
        // The time may be of a pause before this one.
        let pausing = self.sandboxes.get(id).and_then(|sandbox| sandbox.pausing);
        if matches!(pausing, Some(Pausing::Freezing(since)) if since.elapsed() >= FREEZE) {
            self.frozen(id, false);
        }
    }

    /// The guest's programs stand still, or do not in time: the machine is taken.
    pub(super) fn frozen(&mut self, id: &SandboxId, frozen: bool) {
        if self.frozen_for_snapshot(id, frozen) {
            return;
        }
        let freezing = |pausing| matches!(pausing, Some(Pausing::Freezing(_)));
        let Some(sandbox) = self.sandboxes.get_mut(id).filter(|sandbox| freezing(sandbox.pausing)) else { return };
        let Some(worker) = &sandbox.worker else { return };
        if !frozen {
            log::warn!("sandbox {id}: not all of its programs stand still: they are paused as they are");
        }
        sandbox.pausing = Some(Pausing::Capturing);
        let (home, pid, owned) = (sandbox.home.clone(), worker.pid, id.clone());
        let memory_bytes = u64::from(sandbox.spec.memory_mib) * MIB;
        let flat = |row: &&SnapshotRow| row.memory_below.is_none() && row.memory_bytes == memory_bytes;
        let below = sandbox.snapshot.as_deref().and_then(|id| self.snapshots.store.snapshot(id)).filter(flat);
        let below = below.map(|row| self.snapshots.shelves.memory(&row.id));
        let work =
            move || Done::Captured { sandbox: owned, result: capture(&home, pid, memory_bytes, below.as_deref()) };
        let started = self.background.run("pause", work);
        if let Err(e) = started {
            self.pause_failed(id, Error::new(Code::NoCapacity, format!("no thread: {e}")));
        }
    }

    /// The files of a pause are whole, or cannot be.
    pub(super) fn captured(&mut self, id: &SandboxId, result: Result<Fields, Error>) {
        let Some(sandbox) = self.sandboxes.get_mut(id).filter(|s| s.pausing == Some(Pausing::Capturing)) else {
            return;
        };
        if sandbox.worker.as_ref().is_none_or(|worker| worker.dead) {
            // It ended over it, and was kept until nobody writes into its home any more.
            sandbox.pausing = None;
            self.bury_anyway(id);
            return;
        }
        match result {
            Ok(_) => {
                faults::pass(Point::PauseCommitted);
                sandbox.pausing = Some(Pausing::Ending);
                if let Some(worker) = sandbox.worker.as_mut().filter(|worker| !worker.dead) {
                    worker.told_to_stop = true;
                    worker.link.send(&Message::Request(Request::new("stop", "vm.stop")));
                    self.touched_sandboxes.insert(id.clone());
                }
            }
            Err(error) => self.pause_failed(id, error),
        }
    }

    /// A pause came to nothing: the sandbox runs on as it was.
    fn pause_failed(&mut self, id: &SandboxId, error: Error) {
        log::warn!("sandbox {id} cannot be paused: {error}");
        self.answer_waiters(id, Awaited::Paused, &error);
        self.run_on(id);
    }

    /// Lets a guest that was held for a pause go on.
    pub(super) fn run_on(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        sandbox.pausing = None;
        let Some(worker) = sandbox.worker.as_mut().filter(|worker| !worker.dead) else { return };
        worker.link.send(&Message::Request(Request::new("resume", "vm.resume")));
        if let Err(e) = sandbox.state.become_(State::Running) {
            log::error!("sandbox {id}: {e}");
        }
        sandbox.home.drop_paused();
        self.touched_sandboxes.insert(id.clone());
        self.thaw(id);
        self.watch_health(id);
        self.record(id);
        if (self.stopping.as_ref().is_some_and(|stopping| !stopping.hands_over) || self.is_drained_by_now())
            && let Err(e) = self.stop(id, None)
        {
            log::error!("sandbox {id}: {e}");
        }
    }

    /// Has a thread make the memory whole that a sandbox is paused as, where it is not. Whether there is one.
    pub(super) fn settle_pause(&mut self, id: &SandboxId) -> bool {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return false };
        let is_paused = matches!(sandbox.state, State::Paused | State::Resuming) && sandbox.origin().is_none();
        if sandbox.settling || !is_paused || !sandbox.home.has_paused() || sandbox.home.is_settled() {
            return sandbox.settling;
        }
        let (home, owned) = (sandbox.home.clone(), id.clone());
        let memory_bytes = u64::from(sandbox.spec.memory_mib) * MIB;
        let started = self.background.run("settle", move || {
            let result = home.settle_paused(memory_bytes, &mut |point| {
                faults::reached(match point {
                    Settling::Begun => Point::SettleBegun,
                    Settling::Copied => Point::SettleCopied,
                    Settling::Renamed => Point::SettleRenamed,
                })
            });
            Done::PauseSettled { sandbox: owned, result: result.map_err(|e| to_error(&e)) }
        });
        match started {
            Ok(()) => sandbox.settling = true,
            // Who resumes it is told that its memory is not there.
            Err(e) => log::error!("sandbox {id}: no thread to make its memory whole: {e}"),
        }
        sandbox.settling
    }

    /// What a sandbox is paused as is whole, or cannot be: what waited for that goes on.
    pub(super) fn pause_settled(&mut self, id: &SandboxId, result: Result<(), Error>) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        sandbox.settling = false;
        if let Err(error) = &result {
            log::warn!("sandbox {id}: {error}");
        }
        if let Some(extent) = sandbox.after_settling.take() {
            return self.release(id, extent);
        }
        let waits = sandbox.state == State::Resuming && sandbox.worker.is_none();
        match &sandbox.rolling_back {
            Some(RollingBack::Ending) if waits => self.rollback_ended(id),
            None if sandbox.state == State::Stopped => self.drop_paused(id),
            None if waits && sandbox.origin().is_none() => {
                if let Err(error) = result.and_then(|()| self.schedule(id)) {
                    self.fail_start(id, error);
                }
            }
            _ => {}
        }
    }

    /// A client wants a paused sandbox back.
    pub(super) fn ask_resume(&mut self, key: u64, tag: &str, given: &str) -> Result<(), Error> {
        let id = self.find(key, given)?;
        if self.stopping.is_some() {
            return Err(Error::new(Code::Stopping, "the node is stopping"));
        }
        if self.drain.is_some() {
            return Err(Error::new(Code::Draining, "the node is being drained: node.undrain takes that back"));
        }
        let Some(sandbox) = self.sandboxes.get_mut(&id) else { return Ok(()) };
        if sandbox.releasing
            || sandbox.rolling_back.is_some()
            || sandbox.worker.is_some() && sandbox.state == State::Paused
        {
            let message = format!("what is left of sandbox {id}'s worker is still being taken down");
            return Err(Error::new(Code::BadState, message));
        }
        sandbox.go_on()?;
        sandbox.state.become_(State::Resuming)?;
        sandbox.reason.clear();
        self.await_(key, tag, &id, Awaited::Resumed);
        self.record(&id);
        if let Err(error) = self.settle_worker(&id, None).and_then(|()| self.schedule(&id)) {
            self.fail_start(&id, error);
        }
        Ok(())
    }

    /// A resume came to nothing: the sandbox is paused as it was, if its files are still there.
    pub(super) fn resume_failed(&mut self, id: &SandboxId, error: &Error) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        log::warn!("sandbox {id} could not be resumed: {error}");
        if sandbox.worker.is_some() {
            // Its end comes back here.
            if let Err(e) = sandbox.home.kill() {
                log::error!("sandbox {id} cannot be killed: {e}");
            }
            self.answer_waiters(id, Awaited::Resumed, error);
            return;
        }
        let back = if sandbox.home.has_paused() || sandbox.origin().is_some() { State::Paused } else { State::Error };
        if let Err(e) = sandbox.state.become_(back) {
            log::error!("sandbox {id}: {e}");
        }
        sandbox.reason = format!("resume-failed: {}", error.message);
        self.answer_waiters(id, Awaited::Resumed, error);
        if back == State::Error {
            self.after_failure(id);
        } else {
            self.release(id, super::finish::Extent::Worker);
        }
        self.record(id);
    }

    /// The agent of a resumed guest is there. Its files are no longer what the sandbox is, and then it is told who it is.
    pub(super) fn resumed_agent_ready(&mut self, id: &SandboxId) {
        faults::pass(Point::AgentResumed);
        let Some(sandbox) = self.sandboxes.get(id) else { return };
        let (home, owned) = (sandbox.home.clone(), id.clone());
        let started =
            self.background.run("resume", move || Done::Unpaused { sandbox: owned, result: home.leave_paused() });
        if let Err(e) = started {
            self.fail_start(id, Error::new(Code::NoCapacity, format!("no thread: {e}")));
        }
    }

    /// The files of a resumed sandbox are out of the way: its programs may go on.
    pub(super) fn unpaused(&mut self, id: &SandboxId, result: std::io::Result<()>) {
        if let Err(e) = result {
            let error = Error::new(Code::Internal, format!("what it was paused as cannot be put away: {e}"));
            self.fail_start(id, error);
            return;
        }
        faults::pass(Point::Unpaused);
        if self.sandboxes.get(id).is_some_and(|sandbox| sandbox.state == State::Resuming) {
            self.introduce(id);
        }
    }
}

/// Has a worker write its guest's state and memory, and syncs them. Blocks: not for the supervisor's loop.
/// The memory may be a difference to that of the snapshot that `below` is, or to what the sandbox was paused as before.
fn capture(home: &Home, pid: i32, memory_bytes: u64, below: Option<&Path>) -> Result<Fields, Error> {
    let io = |what: &'static str| {
        move |e: std::io::Error| Error::of_io(Code::VmFailed, format!("the sandbox cannot be paused: {what}: {e}"), &e)
    };
    let files = home.begin_pause(memory_bytes, below).map_err(io("its files"))?;
    let captured = worker::begin_capture(home.socket(), pid, &files.state, &files.memory, None, files.below.as_ref());
    let captured = captured.map_err(|e| match e {
        worker::CaptureError::Refused(error) => error,
        worker::CaptureError::Io(e) => io("its worker")(e),
    });
    let done = captured.and_then(|capture| {
        let is_difference = capture.is_difference();
        let fields = capture.finish().map_err(io("its worker"))?;
        faults::reached(Point::PauseCaptured).map_err(io("its files"))?;
        if is_difference {
            let written = fields.number("memory_bytes");
            memory_file::check_difference(&files.memory, memory_bytes, written).map_err(io("its memory"))?;
        }
        home.commit_pause(&files, is_difference).map_err(io("its files"))?;
        Ok(fields)
    });
    if done.is_err() {
        home.drop_paused();
    }
    done
}
