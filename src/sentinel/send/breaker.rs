//! How long to wait after a failure: a few quick tries, then the breaker opens and single probes are let through.

use std::time::Duration;

/// Where a breaker stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BreakerState {
    /// Requests go through.
    #[default]
    Closed,
    /// None does until the wait is over.
    Open,
    /// The wait was over: one request is under way to see.
    HalfOpen,
}

impl BreakerState {
    /// Its number in metrics: 0, 1, 2.
    pub fn number(self) -> u8 {
        self as u8
    }
}

/// Counts failures of one destination. Only what counts against the receiver is told to it: no answer, 408, 429, 5xx.
#[derive(Debug)]
pub struct Breaker {
    state: BreakerState,
    failures: u32,
    retries: u32,
    first: Duration,
    longest: Duration,
    random: u64,
}

impl Breaker {
    /// Opens after `retries` tries that failed after the first one. Waits grow from `first`, doubling, to `longest`.
    pub fn new(retries: u32, first: Duration, longest: Duration, seed: u64) -> Self {
        Self { state: BreakerState::Closed, failures: 0, retries, first, longest, random: seed | 1 }
    }

    /// Where it stands.
    pub fn state(&self) -> BreakerState {
        self.state
    }

    /// A request is about to be made.
    pub fn attempt(&mut self) {
        if self.state == BreakerState::Open {
            self.state = BreakerState::HalfOpen;
        }
    }

    /// The receiver answered as it should.
    pub fn succeeded(&mut self) {
        self.state = BreakerState::Closed;
        self.failures = 0;
    }

    /// It did not. How long to wait before the next request: a random part of the growing limit ("full jitter"), so
    /// that many senders do not come back together; never less than the receiver asked for. An open breaker waits at
    /// least half of it.
    pub fn failed(&mut self, asked: Option<Duration>) -> Duration {
        self.failures = self.failures.saturating_add(1);
        if self.failures > self.retries {
            self.state = BreakerState::Open;
        }
        let doubled = self.first.saturating_mul(1 << (self.failures - 1).min(20));
        let limit = doubled.min(self.longest);
        let part = match self.state {
            BreakerState::Closed => limit.mul_f64(self.fraction()),
            _ => limit.mul_f64(0.5 + self.fraction() / 2.0),
        };
        part.max(asked.unwrap_or_default())
    }

    fn fraction(&mut self) -> f64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn waits_grow_to_their_limit_are_spread_and_honour_what_the_receiver_asks() {
        let mut seen = Vec::new();
        for seed in 1..200 {
            let mut breaker = Breaker::new(3, SECOND, 60 * SECOND, seed * 7919);
            for n in 0..20u32 {
                let limit = (SECOND * (1 << n.min(10))).min(60 * SECOND);
                let wait = breaker.failed(None);
                assert!(wait <= limit);
                assert!(n < 3 || wait >= limit / 2);
                seen.push(wait.as_millis() / 100);
            }
            assert!(breaker.failed(Some(90 * SECOND)) >= 90 * SECOND);
        }
        seen.sort_unstable();
        seen.dedup();
        assert!(seen.len() > 300);
    }

    #[test]
    fn it_opens_after_the_quick_tries_lets_one_probe_through_and_closes_on_success() {
        let mut breaker = Breaker::new(3, SECOND, SECOND, 1);
        for _ in 0..3 {
            breaker.attempt();
            breaker.failed(None);
            assert_eq!(breaker.state(), BreakerState::Closed);
        }
        for _ in 0..2 {
            breaker.attempt();
            breaker.failed(None);
            assert_eq!(breaker.state(), BreakerState::Open);
            breaker.attempt();
            assert_eq!(breaker.state(), BreakerState::HalfOpen);
        }
        breaker.succeeded();
        assert_eq!(breaker.state(), BreakerState::Closed);
        breaker.failed(None);
        assert_eq!(breaker.state(), BreakerState::Closed);
    }
}
