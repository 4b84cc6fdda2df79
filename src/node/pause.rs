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

use std::io::Read;
use std::time::{Duration, Instant};

use super::instance::{Awaited, Route, Waiter};
use super::start::MIB;
use super::supervisor::{Done, Supervisor, Timer, now_ms};
use crate::sandbox::home::Home;
use crate::sandbox::id::SandboxId;
use crate::sandbox::lifecycle::State;
use crate::sandbox::worker;
use crate::wire::{Code, Error, Fields, Message, Request};

/// How long the guest's programs have to stand still, in milliseconds. One that does not (it waits in the kernel for a
/// disk) is taken as it is.
const FREEZE_MS: u64 = 1000;
/// How long the agent has to say that they do.
const FREEZE: Duration = Duration::from_secs(5);
/// Octets of randomness that a resumed guest gets.
const SEED: usize = 64;

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
        let sandbox = self.find_running(key, given)?;
        let id = sandbox.id.clone();
        if sandbox.spec.disks.iter().any(|disk| disk.is_the_nodes()) {
            // What others write to it meanwhile would not go with the memory.
            let message = format!("sandbox {id} has a disk that is the node's: it cannot be paused");
            return Err(Error::new(Code::BadState, message));
        }
        sandbox.state.become_(State::Pausing)?;
        sandbox.pausing = Some(Pausing::Recording);
        self.await_(key, tag, &id, Awaited::Paused);
        let writing = self.record(&id);
        if let Some(sandbox) = self.sandboxes.get_mut(&id) {
            sandbox.writing = writing;
        }
        Ok(())
    }

    /// The row says `pausing`: whoever comes after a kill knows.
    pub(super) fn pausing_recorded(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id).filter(|s| s.pausing == Some(Pausing::Recording)) else {
            return;
        };
        let Some(worker) = &mut sandbox.worker else { return };
        sandbox.pausing = Some(Pausing::Freezing(Instant::now()));
        let freeze = Request::new("", "system.freeze").set("wait_ms", FREEZE_MS).set("id", id);
        let tag = worker.agent.request(freeze);
        worker.routes.insert(tag, Route::Freeze);
        self.touched_sandboxes.insert(id.clone());
        self.timers.after(FREEZE, Timer::Freeze(id.clone()));
    }

    /// The agent has had its time to freeze the guest's programs.
    pub(super) fn freeze_expired(&mut self, id: &SandboxId) {
        // The time may be of a pause before this one.
        let pausing = self.sandboxes.get(id).and_then(|sandbox| sandbox.pausing);
        if matches!(pausing, Some(Pausing::Freezing(since)) if since.elapsed() >= FREEZE) {
            self.frozen(id, false);
        }
    }

    /// The guest's programs stand still, or do not in time: the machine is taken.
    pub(super) fn frozen(&mut self, id: &SandboxId, frozen: bool) {
        let freezing = |pausing| matches!(pausing, Some(Pausing::Freezing(_)));
        let Some(sandbox) = self.sandboxes.get_mut(id).filter(|sandbox| freezing(sandbox.pausing)) else { return };
        let Some(worker) = &sandbox.worker else { return };
        if !frozen {
            log::warn!("sandbox {id}: not all of its programs stand still: they are paused as they are");
        }
        sandbox.pausing = Some(Pausing::Capturing);
        let (home, pid, owned) = (sandbox.home.clone(), worker.pid, id.clone());
        let memory_bytes = u64::from(sandbox.spec.memory_mib) * MIB;
        let started = self
            .background
            .run("pause", move || Done::Captured { sandbox: owned, result: capture(&home, pid, memory_bytes) });
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
        if worker.agent.is_ready() {
            let tag = worker.agent.request(Request::new("", "system.thaw"));
            worker.routes.insert(tag, Route::Unheeded);
        }
        if let Err(e) = sandbox.state.become_(State::Running) {
            log::error!("sandbox {id}: {e}");
        }
        sandbox.home.drop_paused();
        self.touched_sandboxes.insert(id.clone());
        self.watch_health(id);
        self.record(id);
        if self.stopping.as_ref().is_some_and(|stopping| !stopping.hands_over)
            && let Err(e) = self.stop(id, None)
        {
            log::error!("sandbox {id}: {e}");
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
        if sandbox.releasing || sandbox.worker.is_some() && sandbox.state == State::Paused {
            let message = format!("what is left of sandbox {id}'s worker is still being taken down");
            return Err(Error::new(Code::BadState, message));
        }
        sandbox.state.become_(State::Resuming)?;
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
        let back = if sandbox.home.has_paused() { State::Paused } else { State::Error };
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
        let Some(sandbox) = self.sandboxes.get_mut(id).filter(|s| s.state == State::Resuming) else { return };
        let mut seed = [0; SEED];
        if let Err(e) = getrandom(&mut seed) {
            self.fail_start(id, Error::new(Code::Internal, format!("no random numbers: {e}")));
            return;
        }
        let thaw = Request::new("", "system.thaw")
            .set("id", id)
            .set("hostname", sandbox.spec.name.as_deref().unwrap_or(id.as_str()))
            .set("clock_ns", u128::from(now_ms()) * 1_000_000)
            .set_bytes("seed", &seed);
        let thaw = match &sandbox.slot {
            Some(slot) => thaw.set("mac", slot.mac.map(|octet| format!("{octet:02x}")).join(":")),
            None => thaw,
        };
        let thaw = sandbox.configure_network(thaw, &self.config.network.dns);
        let Some(worker) = &mut sandbox.worker else { return };
        let tag = worker.agent.request(thaw);
        worker.routes.insert(tag, Route::Configure);
        self.touched_sandboxes.insert(id.clone());
    }

    /// A resumed guest knows who it is: its network opens, and what ran in it goes on to be heard.
    pub(super) fn resumed(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        if let Some(worker) = &mut sandbox.worker {
            worker.link.send(&Message::Request(Request::new("open", "vm.open")));
        }
        sandbox.reason.clear();
        self.touched_sandboxes.insert(id.clone());
        self.survey(id);
    }

    /// Ends the requests that wait for something of a sandbox with an error.
    fn answer_waiters(&mut self, id: &SandboxId, what: Awaited, error: &Error) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let waiters: Vec<Waiter> = sandbox.waiters.extract_if(.., |waiter| waiter.what == what).collect();
        for waiter in waiters {
            self.finish(waiter.client, &Message::err(&waiter.tag, error.clone().with("sandbox", id)));
        }
    }
}

/// Has a worker write its guest's state and memory, and syncs them. Blocks: not for the supervisor's loop.
fn capture(home: &Home, pid: i32, memory_bytes: u64) -> Result<Fields, Error> {
    let io = |what: &'static str| {
        move |e: std::io::Error| {
            let code = if e.raw_os_error() == Some(libc::ENOSPC) { Code::NoCapacity } else { Code::VmFailed };
            Error::new(code, format!("the sandbox cannot be paused: {what}: {e}"))
        }
    };
    let (state, memory) = home.begin_pause(memory_bytes).map_err(io("its files"))?;
    let captured = worker::capture(home.socket(), pid, &state, &memory).map_err(|e| match e {
        worker::CaptureError::Refused(error) => error,
        worker::CaptureError::Io(e) => io("its worker")(e),
    });
    let done = captured.and_then(|fields| {
        home.commit_pause(&state, &memory).map_err(io("its files"))?;
        Ok(fields)
    });
    if done.is_err() {
        home.drop_paused();
    }
    done
}

/// Random numbers of the node's kernel.
fn getrandom(into: &mut [u8]) -> std::io::Result<()> {
    std::fs::File::open("/dev/urandom")?.read_exact(into)
}
