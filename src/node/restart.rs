//! Sandboxes that failed and are to be started again: after a while, by a fresh boot on the disk that they had. Until the
//! agent answers they are in error, as the table of states has it, with a worker that is on its way.

use std::time::Duration;

use super::finish::Extent;
use super::supervisor::{Supervisor, Timer, now_ms};
use crate::sandbox::id::SandboxId;
use crate::sandbox::lifecycle::State;
use crate::sandbox::restart::GOOD_MS;
use crate::wire::{Code, Error};

/// Pause where what is left of the worker before is still being taken down.
const AGAIN: Duration = Duration::from_millis(100);

impl Supervisor {
    /// A sandbox is in error and has no worker: what it does not need any more is taken down, and it is started again later
    /// where its policy says so.
    pub(super) fn after_failure(&mut self, id: &SandboxId) {
        let extent = if self.restart_later(id) { Extent::Worker } else { Extent::AllButLogs };
        self.release(id, extent);
    }

    /// Whether a sandbox in error is to be started again; if so, when it is time it will be. Its disk is kept then.
    pub(super) fn restart_later(&mut self, id: &SandboxId) -> bool {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return false };
        if sandbox.state != State::Error || sandbox.removing {
            return false;
        }
        if let (Some(from), Some(to)) = (sandbox.started_ms, sandbox.ended_ms)
            && to.saturating_sub(from) >= GOOD_MS
        {
            sandbox.restarts_in_row = 0;
        }
        let Some(wait) = sandbox.spec.restart.wait(sandbox.restarts_in_row) else { return false };
        // Else the next supervisor sees to it, or whoever takes the drain back.
        if self.stopping.is_none() && self.drain.is_none() {
            sandbox.restart_at_ms = Some(now_ms().saturating_add(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX)));
            log::info!("sandbox {id} is started again in {} s", wait.as_secs());
            self.timers.after(wait, Timer::Restart(id.clone()));
        }
        true
    }

    /// Sees to all that are in error and are to be started again.
    pub(super) fn resume_restarts(&mut self) {
        let failed = self.sandboxes.values().filter(|s| s.state == State::Error && !s.restarting);
        let failed: Vec<SandboxId> = failed.map(|sandbox| sandbox.id.clone()).collect();
        for id in failed {
            self.restart_later(&id);
        }
    }

    /// It is time to start a sandbox again.
    pub(super) fn restart(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let due = sandbox.restart_at_ms.is_some_and(|at| at <= now_ms());
        if sandbox.state != State::Error || sandbox.removing || sandbox.restarting || !due {
            return;
        }
        if self.stopping.is_some() || self.drain.is_some() {
            sandbox.restart_at_ms = None;
            return;
        }
        if sandbox.releasing || sandbox.worker.is_some() {
            self.timers.after(AGAIN, Timer::Restart(id.clone()));
            return;
        }
        sandbox.restart_at_ms = None;
        sandbox.restarting = true;
        // If it does not come up, that was no run that would make it good again.
        sandbox.started_ms = None;
        sandbox.restarts += 1;
        sandbox.restarts_in_row += 1;
        log::info!("sandbox {id} is started again, the {}. time in a row", sandbox.restarts_in_row);
        // First: a supervisor that dies over it must not try for ever.
        self.record(id);
        if let Err(error) = self.settle_worker(id, None).and_then(|()| self.schedule(id)) {
            self.fail_start(id, error);
        }
    }

    /// A restart came to nothing.
    pub(super) fn restart_failed(&mut self, id: &SandboxId, error: &Error) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        log::warn!("sandbox {id} could not be started again: {error}");
        sandbox.restarting = false;
        sandbox.reason = format!("start-failed: {}", error.message);
        sandbox.ended_ms = Some(now_ms());
        if sandbox.worker.is_some() {
            // Its end comes back to `after_failure`.
            if let Err(e) = sandbox.home.kill() {
                log::error!("sandbox {id} cannot be killed: {e}");
            }
        } else {
            self.after_failure(id);
        }
        self.record(id);
    }

    /// A sandbox in error is stopped: it is not started again, and what runs of it ends.
    pub(super) fn stop_restarting(&mut self, id: &SandboxId) -> Result<(), Error> {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return Ok(()) };
        if sandbox.restart_at_ms.take().is_none() && !sandbox.restarting {
            return Ok(());
        }
        sandbox.state.become_(State::Stopped)?;
        sandbox.reason = "stopped".to_string();
        let begun = std::mem::take(&mut sandbox.restarting);
        if sandbox.worker.is_some() {
            sandbox
                .home
                .kill()
                .map_err(|e| Error::new(Code::Internal, format!("sandbox {id} cannot be killed: {e}")))?;
        } else if begun {
            self.release(id, Extent::Worker);
        }
        self.record(id);
        Ok(())
    }
}
