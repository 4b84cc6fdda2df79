//! One program that init keeps running.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use nix::unistd::Pid;

use super::client::ChildStatus;
use super::spawn::Program;

/// The first restart is quick: running sandboxes wait for a supervisor that was killed.
const FIRST: Duration = Duration::from_millis(20);
const SECOND: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(5);
/// Having run this long, a program counts as good again.
const GOOD: Duration = Duration::from_secs(30);

/// How long to wait before each restart: 20 ms, then 100 ms doubling up to 5 s, from the start again after 30 s of
/// good running.
#[derive(Debug, Default)]
struct Backoff {
    last: Option<Duration>,
}

impl Backoff {
    fn next(&mut self, ran: Duration) -> Duration {
        let delay = match self.last {
            _ if ran >= GOOD => FIRST,
            None => FIRST,
            Some(FIRST) => SECOND,
            Some(last) => (last * 2).min(LONGEST),
        };
        self.last = Some(delay);
        delay
    }
}

#[derive(Debug)]
enum Phase {
    Running { pid: Pid, since: Instant },
    Waiting { until: Instant },
}

/// A program that is started again when it ends.
#[derive(Debug)]
pub struct Service {
    name: String,
    program: Program,
    group: Option<File>,
    backoff: Backoff,
    phase: Phase,
}

impl Service {
    /// Due to start at once.
    pub fn new(name: String, program: Program, group: Option<File>) -> Self {
        Self { name, program, group, backoff: Backoff::default(), phase: Phase::Waiting { until: Instant::now() } }
    }

    /// When it must be started; `None` while it runs.
    pub fn due(&self) -> Option<Instant> {
        match self.phase {
            Phase::Running { .. } => None,
            Phase::Waiting { until } => Some(until),
        }
    }

    /// Its process while it runs.
    pub fn pid(&self) -> Option<Pid> {
        match self.phase {
            Phase::Running { pid, .. } => Some(pid),
            Phase::Waiting { .. } => None,
        }
    }

    /// Starts it, with `link` as its descriptor 3. Whether it runs now.
    pub fn start(&mut self, link: Option<&OwnedFd>) -> bool {
        let started = self.program.start(self.group.as_ref(), link).or_else(|error| {
            if self.group.is_none() {
                return Err(error);
            }
            // Better without limits than not at all.
            log::error!("cannot start {} in its control group: {error}", self.name);
            self.program.start(None, link)
        });
        match started {
            Ok(pid) => {
                self.phase = Phase::Running { pid, since: Instant::now() };
                log::info!("{} runs as process {pid}", self.name);
                true
            }
            Err(error) => {
                let delay = self.backoff.next(Duration::ZERO);
                self.phase = Phase::Waiting { until: Instant::now() + delay };
                log::error!("cannot start {}: {error}; tried again in {} ms", self.name, delay.as_millis());
                false
            }
        }
    }

    /// Its process has ended: it waits for its restart now, which the caller starts where the node goes on.
    pub fn ended(&mut self, status: ChildStatus, stopping: bool) {
        let ran = match self.phase {
            Phase::Running { since, .. } => since.elapsed(),
            Phase::Waiting { .. } => Duration::ZERO,
        };
        let delay = self.backoff.next(ran);
        self.phase = Phase::Waiting { until: Instant::now() + delay };
        let how = match status {
            ChildStatus::Code(code) => format!("ended with code {code}"),
            ChildStatus::Signal(signal) => format!("was ended by signal {signal}"),
        };
        if stopping {
            log::info!("{} {how}", self.name);
        } else {
            log::error!("{} {how} after {} ms; restarts in {} ms", self.name, ran.as_millis(), delay.as_millis());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restarts_begin_quickly_and_slow_down_to_five_seconds() {
        let mut backoff = Backoff::default();
        let delays: Vec<u128> = (0..9).map(|_| backoff.next(Duration::from_secs(1)).as_millis()).collect();
        assert_eq!(delays, [20, 100, 200, 400, 800, 1600, 3200, 5000, 5000]);
    }

    #[test]
    fn half_a_minute_of_good_running_makes_restarts_quick_again() {
        let mut backoff = Backoff::default();
        for _ in 0..9 {
            backoff.next(Duration::ZERO);
        }
        assert_eq!(backoff.next(GOOD), FIRST);
        assert_eq!(backoff.next(Duration::ZERO), SECOND);
    }
}
