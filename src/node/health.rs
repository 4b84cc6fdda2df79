//! Whether guests live: every agent is asked now and then, and one that does not answer several times has hung.
//!
//! One timer turns a wheel with a slot a second; a sandbox is in one slot at a time. Who was heard since the last look
//! is not asked. The question is `hello`, which every agent has answered since there are agents.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use super::instance::Route;
use super::supervisor::{Supervisor, Timer, now_ms};
use crate::sandbox::id::SandboxId;
use crate::sandbox::lifecycle::State;
use crate::sandbox::restart::Restart;
use crate::wire::Request;

/// Between two slots of the wheel.
const TICK: Duration = Duration::from_secs(1);

/// Things that are due in a number of ticks.
#[derive(Debug)]
pub(super) struct Wheel<T> {
    slots: Vec<Vec<T>>,
    at: usize,
}

impl<T> Wheel<T> {
    /// For times of up to `longest` ticks.
    pub fn new(longest: u64) -> Self {
        let slots = usize::try_from(longest).unwrap_or(0).max(1) + 1;
        Self { slots: (0..slots).map(|_| Vec::new()).collect(), at: 0 }
    }

    /// Puts a thing in that is due in so many ticks, at least one and at most the wheel's longest.
    pub fn put(&mut self, ticks: u64, thing: T) {
        let ticks = usize::try_from(ticks).unwrap_or(usize::MAX).clamp(1, self.slots.len() - 1);
        let slot = (self.at + ticks) % self.slots.len();
        self.slots[slot].push(thing);
    }

    /// The next tick: what is due.
    pub fn turn(&mut self) -> Vec<T> {
        self.at = (self.at + 1) % self.slots.len();
        std::mem::take(&mut self.slots[self.at])
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.slots.iter().all(Vec::is_empty)
    }
}

/// Who is in the wheel: a sandbox, and the process of the worker that it is about.
pub(super) type Watched = (SandboxId, i32);

/// What is known of a worker's agent.
#[derive(Debug, Default)]
pub(super) struct Probe {
    /// It said something since the last look.
    pub heard: bool,
    /// It was asked and has not answered.
    asked: bool,
    /// Looks in a row without a word of it.
    silent: u64,
    /// When the first of these was, and what the worker had used of processors by then, in microseconds.
    since: Option<(Instant, u64)>,
}

impl Probe {
    /// An answer has come.
    pub fn answered(&mut self) {
        self.asked = false;
    }
}

impl Supervisor {
    /// Begins to look after the agent of a sandbox that runs.
    pub(super) fn watch_health(&mut self, id: &SandboxId) {
        let Some(pid) = self.sandboxes.get(id).and_then(|sandbox| sandbox.worker.as_ref()).map(|worker| worker.pid)
        else {
            return;
        };
        if self.probes.is_empty() {
            self.timers.after(TICK, Timer::Probe);
        }
        self.probes.put(self.config.health.probe_interval_s, (id.clone(), pid));
    }

    /// A second is over.
    pub(super) fn probe_tick(&mut self) {
        for (id, pid) in self.probes.turn() {
            if let Some(ticks) = self.probe(&id, pid) {
                self.probes.put(ticks, (id, pid));
            }
        }
        if !self.probes.is_empty() {
            self.timers.after(TICK, Timer::Probe);
        }
    }

    /// Looks at one agent. When to look again; `None`: never.
    fn probe(&mut self, id: &SandboxId, pid: i32) -> Option<u64> {
        let settings = &self.config.health;
        let (interval, timeout, failures) =
            (settings.probe_interval_s, settings.probe_timeout_s, settings.probe_failures);
        let sandbox = self.sandboxes.get_mut(id)?;
        let (running, policy) = (sandbox.state == State::Running, sandbox.spec.restart);
        let worker = sandbox.worker.as_mut().filter(|worker| running && !worker.dead && worker.pid == pid)?;
        if worker.foreign.is_some() {
            return None;
        }
        // An agent that is not read until a client has taken its answers cannot be heard.
        let held = self.held.iter().any(|(_, token)| *token == worker.tokens[2]);
        if std::mem::take(&mut worker.probe.heard) || held {
            worker.probe.silent = 0;
            if sandbox.hung_ms.take().is_some() {
                log::warn!("sandbox {id}: its agent answers again");
                sandbox.reason.clear();
            }
            return Some(interval);
        }
        if !worker.probe.asked && worker.agent.is_ready() {
            worker.probe.asked = true;
            let tag = worker.agent.request(Request::new("", "hello"));
            worker.routes.insert(tag, Route::Probe);
            self.touched_sandboxes.insert(id.clone());
            return Some(timeout);
        }
        worker.probe.silent += 1;
        if worker.probe.silent == 1 {
            worker.probe.since = Some((Instant::now(), cpu_us(sandbox.home.cgroup())));
        }
        if worker.probe.silent < failures {
            return Some(timeout);
        }
        let (since, used) = worker.probe.since.unwrap_or((Instant::now(), 0));
        let used = cpu_us(sandbox.home.cgroup()).saturating_sub(used);
        let reason = hung(failures * timeout, since.elapsed(), used);
        if policy != Restart::Never {
            log::warn!("sandbox {id}: {reason}: it is ended");
            worker.verdict = Some(reason);
            if let Err(e) = sandbox.home.kill() {
                log::error!("sandbox {id} cannot be killed: {e}");
            }
            return Some(timeout);
        }
        // Nobody asked for its end: whatever it was doing may still be of use.
        if sandbox.hung_ms.is_none() {
            log::warn!("sandbox {id}: {reason}");
            sandbox.hung_ms = Some(now_ms());
            sandbox.reason = reason;
        }
        Some(interval)
    }
}

/// Processor time of a control group, in microseconds.
fn cpu_us(cgroup: &Path) -> u64 {
    let text = fs::read_to_string(cgroup.join("cpu.stat")).unwrap_or_default();
    let usage = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
    usage.and_then(|number| number.parse().ok()).unwrap_or(0)
}

fn hung(silent_s: u64, watched: Duration, used_us: u64) -> String {
    let used = used_us as f64 / (watched.as_micros() as f64).max(1.0);
    let how = match used {
        0.5.. => "its processors spin",
        0.02.. => "its processors do some work",
        _ => "its processors stand still",
    };
    format!("guest-hung: its agent has not answered for {silent_s} s; {how}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn things_come_out_of_the_wheel_when_they_are_due() {
        let mut wheel = Wheel::new(10);
        for ticks in [1, 3, 10] {
            wheel.put(ticks, ticks);
        }
        wheel.put(0, 100);
        wheel.put(99, 199);
        let turns: Vec<Vec<u64>> = (0..10).map(|_| wheel.turn()).collect();
        assert_eq!(turns[0], [1, 100], "what is due at once comes with the next tick");
        assert_eq!(turns[2], [3]);
        assert_eq!(turns[9], [10, 199], "no time is longer than the wheel's");
        assert!(wheel.is_empty() && turns.iter().flatten().count() == 5);
        wheel.put(10, 7);
        assert!(!wheel.is_empty());
        assert_eq!((0..10).flat_map(|_| wheel.turn()).collect::<Vec<_>>(), [7]);
    }

    #[test]
    fn a_guest_that_spins_is_told_from_one_that_stands_still() {
        let of = |used| hung(30, Duration::from_secs(20), used);
        assert!(of(19_000_000).ends_with("its processors spin"));
        assert!(of(1_000_000).ends_with("some work"));
        assert!(of(1000).ends_with("stand still"));
        assert!(hung(30, Duration::ZERO, 0).starts_with("guest-hung: its agent has not answered for 30 s"));
    }
}
