//! Time limits of sandboxes: when the next of them is over, and what is done then.
//!
//! A sandbox that has limits has one timer, for the one that is over first. Use puts an idle timeout off without touching
//! that: it looks when it is due.

use std::time::Duration;

use super::finish::Extent;
use super::instance::{Route, Sandbox};
use super::supervisor::{Supervisor, Timer, now_ms};
use crate::sandbox::id::SandboxId;
use crate::sandbox::lifecycle::State;
use crate::sandbox::spec::Spec;
use crate::sandbox::time_limits::{AtEnd, Change, Clock, TimeLimit};
use crate::wire::{Code, Error, Fields, Message};

/// Limits go by the node's clock, which may be set: it is looked at least this often.
const LOOK: Duration = Duration::from_secs(600);
/// When what was done at the end of a limit is looked at again, and done again where it came to nothing.
const AGAIN: Duration = Duration::from_secs(10);

/// What a sandbox's clocks stand at.
#[derive(Debug, Default)]
pub struct Clocks {
    /// When its time to live is over, in Unix milliseconds.
    pub ttl_until_ms: Option<u64>,
    /// When a client last used it, in Unix milliseconds.
    pub last_used_ms: Option<u64>,
    /// It runs, and that was noted as use.
    awake: bool,
    /// When it is looked at next, in Unix milliseconds.
    timed_ms: Option<u64>,
    /// Its disk went when its time was over.
    disk_gone: bool,
}

impl Clocks {
    /// Of a sandbox of an earlier supervisor. When it was used is not known any more.
    pub fn of_row(ttl_until_ms: Option<u64>) -> Self {
        Self { ttl_until_ms, ..Self::default() }
    }
}

/// `ms` after so many seconds.
fn after(ms: u64, limit: TimeLimit) -> u64 {
    ms.saturating_add(limit.seconds.saturating_mul(1000))
}

impl Sandbox {
    /// Its time to live begins now.
    pub fn begin_ttl(&mut self, now: u64) {
        self.clocks.ttl_until_ms = self.spec.time_limits.get(Clock::Ttl).map(|limit| after(now, limit));
    }

    /// A client uses it.
    pub fn is_used(&mut self) {
        self.clocks.last_used_ms = Some(now_ms());
    }

    /// Whether a client's program, code run or file request is under way.
    pub fn is_executing(&self) -> bool {
        let mut running = self.execs.values().filter(|exec| exec.outcome.is_none());
        let relays = |route: &Route| matches!(route, Route::Relay { .. });
        running.any(|exec| !exec.viewers.is_empty() || exec.code.is_some())
            || self.worker.as_ref().is_some_and(|worker| worker.routes.values().any(relays))
    }

    /// A client wants it to go on: one whose time to live was over gets another.
    ///
    /// # Errors
    /// `BAD_STATE` where its lifetime is over.
    pub fn go_on(&mut self) -> Result<(), Error> {
        let now = now_ms();
        if let Some(limit) = self.spec.time_limits.get(Clock::Lifetime)
            && after(self.created_ms, limit) <= now
        {
            let message = format!(
                "sandbox {} has had its {} s: only sandbox.update max_lifetime= lets it go on",
                self.id, limit.seconds
            );
            return Err(Error::new(Code::BadState, message).with("state", self.state).with("max_lifetime", limit));
        }
        if self.clocks.ttl_until_ms.is_some_and(|until| until <= now) {
            self.begin_ttl(now);
        }
        Ok(())
    }

    /// The limit that is over first, with when that is.
    fn next_limit(&self) -> Option<(u64, Clock, TimeLimit)> {
        let ended = match self.state {
            _ if self.parked.is_some() || self.removing => return None,
            State::Running | State::Paused => false,
            State::Stopped | State::Error if !self.clocks.disk_gone => true,
            _ => return None,
        };
        let limits = Clock::ALL.into_iter().filter_map(|clock| Some((clock, self.spec.time_limits.get(clock)?)));
        let limits = limits.filter(|(clock, limit)| match self.state {
            State::Running => true,
            State::Paused => *clock != Clock::Idle && limit.at_end == AtEnd::Stop,
            // Its disk is kept until then.
            _ => ended && *clock == Clock::Ttl,
        });
        let due = limits.filter_map(|(clock, limit)| {
            let at = match clock {
                Clock::Ttl => self.clocks.ttl_until_ms?,
                Clock::Idle => after(self.clocks.last_used_ms?, limit),
                Clock::Lifetime => after(self.created_ms, limit),
            };
            Some((at, clock, limit))
        });
        due.min_by_key(|(at, ..)| *at)
    }

    /// Its clocks as fields of a reply.
    pub fn clock_fields(&self, fields: Fields) -> Fields {
        let times = [("ttl_until_ms", self.clocks.ttl_until_ms), ("last_used_ms", self.clocks.last_used_ms)];
        let times = times.into_iter().filter_map(|(key, time)| Some((key, time?)));
        times.fold(fields.with("executing", self.is_executing()), |fields, (key, time)| fields.with(key, time))
    }
}

/// A sandbox with a disk that is the node's cannot be paused, so no limit can do that.
pub(super) fn check(spec: &Spec) -> Result<(), Error> {
    if spec.time_limits.may_pause() && spec.disks.iter().any(|disk| disk.is_the_nodes()) {
        let message = "a sandbox with a disk that is the node's cannot be paused, also not by a time limit";
        return Err(Error::new(Code::BadArgument, message).with("argument", "disk"));
    }
    Ok(())
}

impl Supervisor {
    /// Changes what limits a sandbox has. One of its time to live that is named begins now.
    pub(super) fn ask_time_limits(
        &mut self,
        key: u64,
        tag: &str,
        id: &SandboxId,
        changes: &[Change],
    ) -> Result<(), Error> {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return Ok(()) };
        let limits = sandbox.spec.time_limits.with(changes);
        let spec = Spec { time_limits: limits, ..sandbox.spec.clone() };
        check(&spec)?;
        sandbox.spec = spec;
        if changes.iter().any(|(clock, _)| *clock == Clock::Ttl) {
            sandbox.begin_ttl(now_ms());
        }
        let fields = sandbox.clock_fields(limits.fields(Fields::new().with("id", id)));
        // A timer for later than the new limits does not do.
        sandbox.clocks.timed_ms = None;
        self.record(id);
        self.answer(key, &Message::ok(tag, fields));
        Ok(())
    }

    /// A sandbox's state or limits are others: the timer for the first of these is set, where it is not yet.
    pub(super) fn time_sandbox(&mut self, id: &SandboxId) {
        let now = now_ms();
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let runs = sandbox.state == State::Running && sandbox.parked.is_none();
        if runs && !sandbox.clocks.awake {
            sandbox.clocks.last_used_ms = Some(now);
        }
        sandbox.clocks.awake = runs;
        let Some((due, ..)) = sandbox.next_limit() else { return };
        self.look_at_limits(id, due.saturating_sub(now));
    }

    /// Sets the timer, unless one for before is set.
    fn look_at_limits(&mut self, id: &SandboxId, wait_ms: u64) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let wait = Duration::from_millis(wait_ms).min(LOOK);
        let at = now_ms().saturating_add(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX));
        if sandbox.clocks.timed_ms.is_none_or(|timed| at < timed) {
            sandbox.clocks.timed_ms = Some(at);
            self.timers.after(wait, Timer::TimeLimit(id.clone(), at));
        }
    }

    /// A sandbox's limits are looked at. `timed` tells the timer that counts from those before it.
    pub(super) fn time_limit_due(&mut self, id: &SandboxId, timed: u64) {
        let now = now_ms();
        let Some(sandbox) = self.sandboxes.get_mut(id).filter(|s| s.clocks.timed_ms == Some(timed)) else { return };
        sandbox.clocks.timed_ms = None;
        if sandbox.is_executing() {
            sandbox.clocks.last_used_ms = Some(now);
        }
        match sandbox.next_limit() {
            Some((due, clock, limit)) if due <= now => {
                self.end_of_time(id, clock, limit);
                self.look_at_limits(id, u64::try_from(AGAIN.as_millis()).unwrap_or(u64::MAX));
            }
            _ => self.time_sandbox(id),
        }
    }

    /// A sandbox has had its time.
    fn end_of_time(&mut self, id: &SandboxId, clock: Clock, limit: TimeLimit) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let reason = clock.reason(limit);
        let ended = matches!(sandbox.state, State::Stopped | State::Error);
        let done = match limit.at_end {
            _ if ended => self.drop_ended(id),
            AtEnd::Stop => self.stop(id, None),
            AtEnd::Pause => self.begin_pause(id),
        };
        match done {
            Ok(()) if ended => {}
            Ok(()) => {
                log::info!("sandbox {id}: {reason}");
                if let Some(sandbox) = self.sandboxes.get_mut(id) {
                    sandbox.reason = reason;
                }
                self.record(id);
            }
            Err(error) => log::warn!("sandbox {id}: {reason}, but it goes on: {error}"),
        }
    }

    /// The disk of a sandbox that has ended goes; its record, logs and outputs stay.
    fn drop_ended(&mut self, id: &SandboxId) -> Result<(), Error> {
        self.stop_restarting(id)?;
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return Ok(()) };
        if sandbox.releasing || sandbox.worker.is_some() {
            return Ok(());
        }
        sandbox.clocks.disk_gone = true;
        if !sandbox.home.overlay().exists() {
            return Ok(());
        }
        log::info!("sandbox {id}: its time is over, its disk goes");
        self.release(id, Extent::AllButLogs);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::fork::SETTINGS;

    #[test]
    fn what_cannot_be_paused_takes_no_limit_that_pauses() {
        let spec = |line: &str| Spec::of_line(&format!("settings sandbox.create {line}"), SETTINGS).expect("a spec");
        for fine in ["ttl=5:pause", "disk=a:file:a.img ttl=5:stop", "disk=a:new:64 max_lifetime=5:pause"] {
            assert_eq!(check(&spec(fine)), Ok(()), "{fine}");
        }
        for bad in ["disk=a:file:a.img ttl=5:pause", "disk=a:device:sdb idle_timeout=5:pause"] {
            let error = check(&spec(bad)).expect_err(bad);
            assert!(error.is(Code::BadArgument), "{error}");
        }
    }
}
