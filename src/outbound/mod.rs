//! Calls to what is not part of the node: every one has a deadline, is made again after growing random waits, and stops
//! for a while where the other side is away.
//!
//! A [`Guard`] is one external: a circuit breaker with its waits and counts. It makes no call itself: who calls asks it
//! first ([`Guard::admit`]) and tells it how the call ended ([`Guard::note`]), or leaves both to [`Guard::call`]. What
//! counts against the external is the caller's word, an [`Answered`]: a receiver that refuses what it was sent is there.
//!
//! ```text
//!            failures in a row               `open` is over
//!   closed ────────────────────► open ─────────────────────► half-open (one call)
//!      ▲                          ▲                             │        │
//!      │                          └────────── it failed ────────┘        │
//!      └────────────────────────────── it did not ───────────────────────┘
//! ```
//!
//! Time and chance come from outside, so that tests need neither.

use std::fmt;
use std::time::{Duration, Instant};

/// How long waits are and how much is borne.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Calls that fail one after the other until the breaker opens, at least 1.
    pub failures: u32,
    /// How long it stays open before one call may try; up to a tenth is added, so that many do not come at once.
    pub open: Duration,
    /// The wait before a call is made again is at most this; it doubles.
    pub first: Duration,
    /// The doubling ends here.
    pub longest: Duration,
    /// For one call, whole.
    pub deadline: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self { failures: 5, open: seconds(60), first: seconds(1), longest: seconds(30), deadline: seconds(10) }
    }
}

/// Where a breaker stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BreakerState {
    /// Calls go through.
    #[default]
    Closed,
    /// None does until its time is over.
    Open,
    /// Its time was over: one call is under way to see.
    HalfOpen,
}

impl BreakerState {
    /// Its number in metrics: 0, 1, 2.
    pub fn number(self) -> u8 {
        self as u8
    }

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half-open",
        }
    }
}

impl fmt::Display for BreakerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How a call ended, as far as the external's health goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answered {
    /// It is there: it did what was asked, or refused it for good.
    Reached,
    /// It counts against it: no answer, or one that says "later". With how long it wants to be left alone.
    Failed(Option<Duration>),
}

/// What was counted since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Calls made.
    pub calls: u64,
    /// Those that counted against the external.
    pub failures: u64,
    /// Calls not made because the breaker was open.
    pub refused: u64,
    /// Times that the breaker opened.
    pub opened: u64,
}

/// Time, for those who may have to wait.
pub trait Clock {
    /// Now.
    fn now(&self) -> Instant;
    /// Waits. Whether to go on: `false` when whoever waits is to end.
    fn wait(&self, time: Duration) -> bool;
}

/// Why a call was not made, or not made again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// The breaker is open for so long.
    Open(Duration),
    /// Who calls is to end.
    Stopped,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open(left) => write!(f, "away; asked again in {} s", left.as_secs_f64().ceil()),
            Self::Stopped => f.write_str("ending"),
        }
    }
}

/// The breaker of one external.
#[derive(Debug)]
pub struct Guard {
    policy: Policy,
    state: BreakerState,
    /// Failures since the last call that reached it.
    in_a_row: u32,
    open_until: Option<Instant>,
    random: u64,
    counts: Counts,
}

impl Guard {
    /// A closed one. `seed` is what its random waits follow from.
    pub fn new(policy: Policy, seed: u64) -> Self {
        // xorshift goes nowhere from zero.
        let random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        Self { policy, state: BreakerState::Closed, in_a_row: 0, open_until: None, random, counts: Counts::default() }
    }

    /// Where it stands.
    pub fn state(&self) -> BreakerState {
        self.state
    }

    /// What it has counted.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// A call is about to be made: by when it must have ended, or for how long none may be made. After `Ok` the end has to
    /// be told by [`Self::note`].
    pub fn admit(&mut self, now: Instant) -> Result<Instant, Duration> {
        let left = match self.state {
            BreakerState::Closed => Duration::ZERO,
            BreakerState::Open => self.open_until.map_or(Duration::ZERO, |until| until.saturating_duration_since(now)),
            BreakerState::HalfOpen => self.policy.deadline,
        };
        if !left.is_zero() {
            self.counts.refused += 1;
            return Err(left);
        }
        if self.state == BreakerState::Open {
            self.state = BreakerState::HalfOpen;
        }
        self.counts.calls += 1;
        Ok(now + self.policy.deadline)
    }

    /// A call has ended. How long to wait before the next one if this one failed: a random part of the growing limit
    /// ("full jitter"), or all the time that the breaker is open; never less than the external asked for.
    pub fn note(&mut self, now: Instant, outcome: Answered) -> Duration {
        let Answered::Failed(asked) = outcome else {
            self.state = BreakerState::Closed;
            self.in_a_row = 0;
            self.open_until = None;
            return Duration::ZERO;
        };
        self.counts.failures += 1;
        self.in_a_row = self.in_a_row.saturating_add(1);
        let asked = asked.unwrap_or_default();
        if self.in_a_row < self.policy.failures {
            let doubled = self.policy.first.saturating_mul(1 << (self.in_a_row - 1).min(20));
            return doubled.min(self.policy.longest).mul_f64(self.fraction()).max(asked);
        }
        if self.state == BreakerState::Closed {
            self.counts.opened += 1;
        }
        self.state = BreakerState::Open;
        let wait = self.policy.open.mul_f64(1.0 + self.fraction() / 10.0).max(asked);
        self.open_until = Some(now + wait);
        wait
    }

    /// Makes a call, and again while it fails and `tries` are left; not while the breaker is open. `work` gets the
    /// deadline of each, `judge` says what its result counts for. The last result is given, whatever it was.
    pub fn call<R>(
        &mut self,
        clock: &impl Clock,
        tries: u32,
        mut work: impl FnMut(Instant) -> R,
        judge: impl Fn(&R) -> Answered,
    ) -> Result<R, Refused> {
        let mut left = tries.max(1);
        loop {
            let deadline = self.admit(clock.now()).map_err(Refused::Open)?;
            let result = work(deadline);
            let outcome = judge(&result);
            let wait = self.note(clock.now(), outcome);
            left -= 1;
            if outcome == Answered::Reached || left == 0 || self.state == BreakerState::Open {
                return Ok(result);
            }
            if !clock.wait(wait) {
                return Err(Refused::Stopped);
            }
        }
    }

    /// A number from 0 to less than 1 (xorshift64).
    fn fraction(&mut self) -> f64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const FAILED: Answered = Answered::Failed(None);

    /// Time that passes only by waiting.
    struct Fake {
        start: Instant,
        passed: Cell<Duration>,
        waits: RefCell<Vec<Duration>>,
        patience: Cell<usize>,
    }

    impl Fake {
        fn new() -> Self {
            let (passed, waits) = (Cell::default(), RefCell::default());
            Self { start: Instant::now(), passed, waits, patience: Cell::new(usize::MAX) }
        }

        fn pass(&self, time: Duration) {
            self.passed.set(self.passed.get() + time);
        }
    }

    impl Clock for Fake {
        fn now(&self) -> Instant {
            self.start + self.passed.get()
        }

        fn wait(&self, time: Duration) -> bool {
            self.pass(time);
            self.waits.borrow_mut().push(time);
            self.waits.borrow().len() < self.patience.get()
        }
    }

    #[test]
    fn five_failures_open_it_for_a_minute_then_one_call_may_try() {
        let clock = Fake::new();
        let mut guard = Guard::new(Policy::default(), 1);
        for _ in 0..4 {
            guard.admit(clock.now()).expect("closed");
            guard.note(clock.now(), FAILED);
            assert_eq!(guard.state(), BreakerState::Closed);
        }
        for opened in 0..3 {
            guard.admit(clock.now()).expect("its time is over");
            let wait = guard.note(clock.now(), FAILED);
            assert!((60 * SECOND..=66 * SECOND).contains(&wait), "{wait:?}");
            assert_eq!(guard.state(), BreakerState::Open);
            clock.pass(59 * SECOND);
            assert!(guard.admit(clock.now()).expect_err("open") > Duration::ZERO, "round {opened}");
            clock.pass(7 * SECOND);
        }
        assert_eq!(guard.admit(clock.now()), Ok(clock.now() + 10 * SECOND));
        assert_eq!(guard.state(), BreakerState::HalfOpen);
        assert!(guard.admit(clock.now()).is_err(), "a second probe");
        assert_eq!(guard.note(clock.now(), Answered::Reached), Duration::ZERO);
        assert_eq!(guard.state(), BreakerState::Closed);
        assert_eq!(guard.counts(), Counts { calls: 8, failures: 7, refused: 4, opened: 1 });
        guard.admit(clock.now()).expect("closed again");
        guard.note(clock.now(), FAILED);
        assert_eq!(guard.state(), BreakerState::Closed, "it counts anew");
    }

    #[test]
    fn waits_grow_to_their_limit_are_spread_and_honour_what_the_external_asks() {
        let policy = Policy { failures: 12, longest: 60 * SECOND, ..Policy::default() };
        let mut seen = Vec::new();
        for seed in 1..200 {
            let mut guard = Guard::new(policy, seed);
            let now = Instant::now();
            for n in 0..11u32 {
                let wait = guard.note(now, FAILED);
                assert!(wait <= (SECOND * (1 << n)).min(60 * SECOND), "{n}: {wait:?}");
                seen.push(wait.as_millis() / 100);
            }
            assert!(guard.note(now, Answered::Failed(Some(90 * SECOND))) >= 90 * SECOND);
            let left = guard.admit(now).expect_err("it is left alone for as long as it asked");
            assert!(left >= 90 * SECOND);
        }
        seen.sort_unstable();
        seen.dedup();
        assert!(seen.len() > 300);
    }

    #[test]
    fn the_same_seed_gives_the_same_waits() {
        let waits = |seed| {
            let mut guard = Guard::new(Policy::default(), seed);
            (0..20).map(|_| guard.note(Instant::now(), FAILED)).collect::<Vec<_>>()
        };
        assert_eq!(waits(7), waits(7));
        assert_ne!(waits(7), waits(8));
    }

    #[test]
    fn a_call_is_made_again_until_it_succeeds_or_its_tries_are_used_up() {
        let clock = Fake::new();
        let mut guard = Guard::new(Policy::default(), 3);
        let judge = |answer: &Result<u8, u8>| if answer.is_ok() { Answered::Reached } else { FAILED };
        let mut answers = [Err(1), Err(2), Ok(3)].into_iter();
        assert_eq!(guard.call(&clock, 3, |_| answers.next().unwrap(), judge), Ok(Ok(3)));
        assert_eq!(clock.waits.borrow().len(), 2);
        assert_eq!(guard.call(&clock, 2, |_| Err(9), judge), Ok(Err(9)));
        // Its tries are not used up, but the breaker opens.
        assert_eq!(guard.call(&clock, 100, |_| Err(9), judge), Ok(Err(9)));
        assert_eq!((guard.state(), guard.counts().calls), (BreakerState::Open, 8));
        let refused = guard.call(&clock, 1, |_| -> Result<u8, u8> { panic!("called") }, judge);
        assert!(matches!(refused, Err(Refused::Open(left)) if left > 50 * SECOND));
    }

    #[test]
    fn what_does_not_count_leaves_it_closed() {
        let clock = Fake::new();
        let mut guard = Guard::new(Policy::default(), 3);
        for _ in 0..50 {
            let refusal = guard.call(
                &clock,
                3,
                |_| 400,
                |status| match status {
                    500.. => FAILED,
                    _ => Answered::Reached,
                },
            );
            assert_eq!(refusal, Ok(400));
        }
        assert_eq!((guard.state(), guard.counts().calls), (BreakerState::Closed, 50));
    }

    #[test]
    fn whoever_is_to_end_does_not_try_again() {
        let clock = Fake::new();
        clock.patience.set(1);
        let mut guard = Guard::new(Policy::default(), 3);
        assert_eq!(guard.call(&clock, 5, |_| (), |()| FAILED), Err(Refused::Stopped));
        assert_eq!(guard.counts().calls, 1);
    }
}
