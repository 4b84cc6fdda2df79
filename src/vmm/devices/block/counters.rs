//! What a disk did so far, for other threads to read at any time.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::wire::Fields;

/// Buckets of the latency histogram: bucket n counts requests that took less than 2^n microseconds (and 2^(n-1) or
/// more); the last one everything from about 4 seconds on.
pub const LATENCY_BUCKETS: usize = 24;

/// Counters of one disk. Each is written by the disk's own thread only.
#[derive(Debug, Default)]
pub struct BlockCounters {
    /// Requests of all kinds.
    pub requests: AtomicU64,
    /// Read requests.
    pub reads: AtomicU64,
    /// Write requests.
    pub writes: AtomicU64,
    /// Flush requests.
    pub flushes: AtomicU64,
    /// Discard and write-zeroes requests.
    pub discards: AtomicU64,
    /// Octets read by the guest.
    pub read_bytes: AtomicU64,
    /// Octets written by the guest.
    pub written_bytes: AtomicU64,
    /// Octets discarded or made zeroes by the guest.
    pub discarded_bytes: AtomicU64,
    /// Requests that ended in an I/O error.
    pub errors: AtomicU64,
    /// Of these, how many because the node had no room for what the guest wrote.
    pub without_room: AtomicU64,
    /// How often requests had to wait for their limit.
    pub throttled: AtomicU64,
    /// Requests that wait or are under way now, as far as the device has seen.
    pub queue: AtomicU64,
    /// Time from a request's start to its answer.
    pub latency: [AtomicU64; LATENCY_BUCKETS],
}

impl BlockCounters {
    /// Counts how long a request took.
    pub fn took(&self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let bucket = (u64::BITS - micros.leading_zeros()) as usize;
        add(&self.latency[bucket.min(LATENCY_BUCKETS - 1)], 1);
    }

    /// All counters as fields of a row.
    pub fn fields(&self, fields: Fields) -> Fields {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let latency: Vec<String> = self.latency.iter().map(|bucket| load(bucket).to_string()).collect();
        fields
            .with("requests", load(&self.requests))
            .with("reads", load(&self.reads))
            .with("writes", load(&self.writes))
            .with("flushes", load(&self.flushes))
            .with("discards", load(&self.discards))
            .with("read_bytes", load(&self.read_bytes))
            .with("written_bytes", load(&self.written_bytes))
            .with("discarded_bytes", load(&self.discarded_bytes))
            .with("errors", load(&self.errors))
            .with("without_room", load(&self.without_room))
            .with("throttled", load(&self.throttled))
            .with("queue", load(&self.queue))
            .with("latency_us", latency.join(","))
    }
}

/// Adds to a counter; nobody else writes it.
pub fn add(counter: &AtomicU64, more: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_fall_into_buckets_of_powers_of_two() {
        let counters = BlockCounters::default();
        for (micros, bucket) in [(0, 0), (1, 1), (2, 2), (3, 2), (4, 3), (1023, 10), (1024, 11), (1 << 22, 23)] {
            let before = counters.latency[bucket].load(Ordering::Relaxed);
            counters.took(Duration::from_micros(micros));
            assert_eq!(counters.latency[bucket].load(Ordering::Relaxed), before + 1, "{micros}");
        }
        counters.took(Duration::MAX);
        assert_eq!(counters.latency[23].load(Ordering::Relaxed), 2);
        let fields = counters.fields(Fields::new());
        assert_eq!(fields.get("latency_us"), Some("1,1,2,1,0,0,0,0,0,0,1,1,0,0,0,0,0,0,0,0,0,0,0,2"));
    }
}
