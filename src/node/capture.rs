//! What pauses and snapshots have in common: the guest's programs are frozen first, and all of it has its time.
//!
//! A worker that never finishes would otherwise be waited for without end: no limit of a sandbox holds while it is being paused, and
//! one that a snapshot is being taken of cannot be paused or put back. A sandbox is in one of the two at a time, so there is one
//! time for both.

use std::io;
use std::time::{Duration, Instant};

use super::faults::{self, Point};
use super::instance::{Awaited, Route};
use super::supervisor::{Supervisor, Timer};
use crate::sandbox::id::SandboxId;
use crate::wire::{Code, Error, Request};

/// How long the agent has to say that the guest's programs stand still.
pub(super) const FREEZE: Duration = Duration::from_secs(5);
/// How long they have to do so, in milliseconds. One that does not (it waits in the kernel for a disk) is taken as it is.
const FREEZE_MS: u64 = 1000;
/// How long it may all take, with a second for each `SLOWEST_MIB` of memory besides: more than any medium needs.
const LIMIT: Duration = Duration::from_secs(60);
const SLOWEST_MIB: u64 = 16;
/// The same where a test wants it soon.
const SOON: Duration = Duration::from_secs(1);

fn limit(memory_mib: u32) -> Duration {
    LIMIT + Duration::from_secs(u64::from(memory_mib) / SLOWEST_MIB)
}

impl Supervisor {
    /// A pause or a snapshot of a sandbox begins, at a point.
    pub(super) fn limit_capture(&mut self, id: &SandboxId, point: Point) -> Instant {
        let is_late = faults::reached(point).is_err_and(|e| e.kind() == io::ErrorKind::TimedOut);
        let began = Instant::now();
        if let Some(sandbox) = self.sandboxes.get_mut(id) {
            let most = if is_late { SOON } else { limit(sandbox.spec.memory_mib) };
            sandbox.capture = Some((began, most));
            self.timers.after(most, Timer::Capture(id.clone(), began));
        }
        began
    }

    /// A pause or a snapshot has had its time: where it still waits for the worker, that is ended.
    pub(super) fn capture_expired(&mut self, id: &SandboxId, since: Instant) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let Some((_, most)) = sandbox.capture.take_if(|(began, _)| *began == since) else { return };
        let late = |what: &str| {
            let ms = most.as_millis();
            let message = format!("sandbox {id}: its worker did not write what a {what} needs within {ms} ms");
            Error::new(Code::Timeout, message).with("timeout_ms", ms)
        };
        let what = match &sandbox.snapshotting {
            _ if sandbox.pausing.is_some() => "pause",
            Some(snapshot) => {
                let making = self.snapshots.making.get_mut(snapshot);
                if !making.is_some_and(|making| making.give_up(late("snapshot"))) {
                    return;
                }
                "snapshot"
            }
            None => return,
        };
        let error = late(what);
        log::error!("{}: it is ended", error.message);
        if let Some(worker) = &mut sandbox.worker {
            worker.verdict =
                Some(format!("{what}-timeout: its worker did not write or end within {} ms", most.as_millis()));
        }
        if let Err(e) = sandbox.home.kill() {
            log::error!("sandbox {id} cannot be killed: {e}");
        }
        // Who waits for a snapshot is told when what there is of it is gone.
        self.answer_waiters(id, Awaited::Paused, &error);
    }

    /// Asks the agent to freeze the guest's programs; `Route::Freeze` or `Timer::Freeze` goes on. `false` where there is none.
    pub(super) fn ask_freeze(&mut self, id: &SandboxId) -> bool {
        let worker = self.sandboxes.get_mut(id).and_then(|sandbox| sandbox.worker.as_mut());
        let Some(worker) = worker.filter(|worker| !worker.dead && worker.agent.is_ready()) else { return false };
        let freeze = Request::new("", "system.freeze").set("wait_ms", FREEZE_MS).set("id", id);
        let tag = worker.agent.request(freeze);
        worker.routes.insert(tag, Route::Freeze);
        self.touched_sandboxes.insert(id.clone());
        self.timers.after(FREEZE, Timer::Freeze(id.clone()));
        true
    }

    /// Lets the guest's programs go on as they are.
    pub(super) fn thaw(&mut self, id: &SandboxId) {
        let worker = self.sandboxes.get_mut(id).and_then(|sandbox| sandbox.worker.as_mut());
        let Some(worker) = worker.filter(|worker| !worker.dead && worker.agent.is_ready()) else { return };
        let tag = worker.agent.request(Request::new("", "system.thaw"));
        worker.routes.insert(tag, Route::Unheeded);
        self.touched_sandboxes.insert(id.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_larger_memory_has_more_time() {
        assert_eq!(limit(1), Duration::from_secs(60));
        assert_eq!(limit(512), Duration::from_secs(92));
        assert_eq!(limit(32 * 1024), Duration::from_secs(60 + 2048));
    }
}
