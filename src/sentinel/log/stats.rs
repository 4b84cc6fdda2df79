//! What the log counts.

use std::collections::BTreeMap;
use std::time::Duration;

/// Why a sample that was accepted, or was to be, never reaches a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DropReason {
    /// The log was as large as it may be.
    Size,
    /// It became too old.
    Age,
    /// The disk was full, or would have had too little left.
    DiskFull,
    /// The disk failed.
    Io,
    /// It stood in a damaged record, or was lost with the machine's power before it was durable.
    Damaged,
    /// The receiver refused it.
    Rejected,
    /// Its destination is not configured any more.
    DestinationRemoved,
}

impl DropReason {
    /// Its name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Size => "size",
            Self::Age => "age",
            Self::DiskFull => "disk_full",
            Self::Io => "io_error",
            Self::Damaged => "damaged",
            Self::Rejected => "rejected",
            Self::DestinationRemoved => "destination_removed",
        }
    }
}

/// Counts since the start, and what there is now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stats {
    /// Octets that the segments take.
    pub bytes: u64,
    /// Segments.
    pub segments: u64,
    /// The sequence number that the next accepted sample gets.
    pub next_sequence: u64,
    /// By destination: samples not acknowledged yet, and since when (at most) the oldest has been waiting, in
    /// milliseconds since 1970-01-01 UTC.
    pub pending: BTreeMap<String, (u64, Option<i64>)>,
    /// Samples accepted.
    pub accepted: u64,
    /// Octets written into segments.
    pub written_bytes: u64,
    /// Samples dropped, by destination and reason.
    pub dropped: BTreeMap<(String, DropReason), u64>,
    /// Samples not taken under the policy `block`: not dropped here.
    pub held_off: u64,
    /// Places in segments that could not be read, by destination that came across them.
    pub damaged_records: BTreeMap<String, u64>,
    /// Destinations that had to begin with the oldest sample because their cursor was gone.
    pub cursors_lost: u64,
    /// Times that data was made durable, and how long that took altogether.
    pub fsyncs: u64,
    /// See `fsyncs`.
    pub fsync_time: Duration,
    /// Times that failed.
    pub fsync_errors: u64,
    /// Octets cut off the end of the newest segment at start because they were no whole record.
    pub torn_bytes: u64,
}

impl Stats {
    /// Counts samples dropped.
    pub fn drop_samples(&mut self, destination: &str, reason: DropReason, samples: u64) {
        if samples > 0 {
            *self.dropped.entry((destination.to_string(), reason)).or_default() += samples;
        }
    }

    /// Samples dropped for a destination, whatever the reason.
    pub fn dropped_for(&self, destination: &str) -> u64 {
        self.dropped.iter().filter(|((name, _), _)| name == destination).map(|(_, count)| count).sum()
    }
}
