//! Rate limits: token buckets for octets and for operations (packets, requests).
//!
//! A piece of work may go when no bucket is in debt, and is paid for afterwards with what it really was; the bucket may
//! go into debt by that one piece. So a frame whose length is known only after it was read, and a request larger than
//! the burst, need no special case, and what passes in any span of time is at most
//! `burst + per_second * time + one piece`.
//!
//! Time is given by the caller. Levels are counted in tokens times nanoseconds, so that nothing is lost to rounding.

use std::time::{Duration, Instant};

const NANOS: u128 = 1_000_000_000;
/// A device that has to wait waits for this much time's tokens at least (or for a full bucket): it then goes on with a
/// batch and not with single pieces, each after a timer of its own.
const LEAST_WAIT: Duration = Duration::from_millis(1);

/// Tokens that come in, and how many can be saved up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Tokens for each second, 1 at least.
    pub per_second: u64,
    /// Most tokens that are there at once, 1 at least.
    pub burst: u64,
}

impl Rate {
    /// A rate whose burst is what comes in during a tenth of a second.
    pub fn per_second(per_second: u64) -> Self {
        Self { per_second, burst: (per_second / 10).max(1) }
    }
}

/// What limits one direction of one device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Of octets.
    pub bytes: Option<Rate>,
    /// Of packets or requests.
    pub operations: Option<Rate>,
}

/// A change of limits: what is not named stays, and what is named without a rate is limited no more.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LimitsChange {
    /// Of octets.
    pub bytes: Option<Option<Rate>>,
    /// Of packets or requests.
    pub operations: Option<Option<Rate>>,
}

#[derive(Debug, Clone)]
struct Bucket {
    /// Tokens for each second, which is also level for each nanosecond.
    per_second: u128,
    /// Level of a full bucket.
    full: i128,
    /// Tokens times `NANOS`; negative: debt.
    level: i128,
    filled_at: Instant,
}

impl Bucket {
    /// A full bucket.
    fn new(rate: Rate, now: Instant) -> Self {
        let full = (u128::from(rate.burst.max(1)) * NANOS) as i128; // below 2^94
        Self { per_second: u128::from(rate.per_second.max(1)), full, level: full, filled_at: now }
    }

    fn fill(&mut self, now: Instant) {
        // A clock that goes back adds nothing, and takes nothing away.
        let nanos = now.saturating_duration_since(self.filled_at).as_nanos();
        if nanos > 0 {
            self.filled_at = now;
            let more = i128::try_from(self.per_second.saturating_mul(nanos)).unwrap_or(i128::MAX);
            self.level = self.level.saturating_add(more).min(self.full);
        }
    }

    /// How long until work may go on; `None` when it may now.
    fn wait(&mut self, now: Instant) -> Option<Duration> {
        self.fill(now);
        if self.level > 0 {
            return None;
        }
        let enough = ((self.per_second * LEAST_WAIT.as_nanos()) as i128).min(self.full);
        let nanos = (enough - self.level).unsigned_abs().div_ceil(self.per_second);
        Some(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
    }

    fn take(&mut self, tokens: u64) {
        self.level = self.level.saturating_sub((u128::from(tokens) * NANOS) as i128);
    }
}

/// The buckets of one direction of one device. Without limits it costs a comparison.
#[derive(Debug, Clone)]
pub struct Limiter {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
}

impl Limiter {
    /// Full buckets.
    pub fn new(limits: Limits, now: Instant) -> Self {
        let bucket = |rate: Option<Rate>| rate.map(|rate| Bucket::new(rate, now));
        Self { bytes: bucket(limits.bytes), operations: bucket(limits.operations) }
    }

    /// Changes limits; buckets that are changed begin full. Who waits is to ask again.
    pub fn change(&mut self, change: LimitsChange, now: Instant) {
        let bucket = |rate: Option<Rate>| rate.map(|rate| Bucket::new(rate, now));
        if let Some(bytes) = change.bytes {
            self.bytes = bucket(bytes);
        }
        if let Some(operations) = change.operations {
            self.operations = bucket(operations);
        }
    }

    /// Whether there is any limit. Who asks first saves reading the clock.
    pub fn is_limited(&self) -> bool {
        self.bytes.is_some() || self.operations.is_some()
    }

    /// `None`: the next piece may go. Otherwise how long it has to wait; asking earlier does no harm.
    pub fn wait(&mut self, now: Instant) -> Option<Duration> {
        let waits = [&mut self.bytes, &mut self.operations].map(|bucket| bucket.as_mut().and_then(|b| b.wait(now)));
        waits.into_iter().flatten().max()
    }

    /// Pays for pieces that went.
    pub fn take(&mut self, bytes: u64, operations: u64) {
        if let Some(bucket) = &mut self.bytes {
            bucket.take(bytes);
        }
        if let Some(bucket) = &mut self.operations {
            bucket.take(operations);
        }
    }
}
