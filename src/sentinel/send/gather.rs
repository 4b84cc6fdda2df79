//! Batches of the size that a destination wants, out of blocks of whatever size the log has.

use std::collections::VecDeque;

use crate::sentinel::log::Block;
use crate::sentinel::model::Sample;

/// Samples that are sent together.
#[derive(Debug, Clone)]
pub struct Outgoing {
    /// Sequence number of the first.
    pub first: u64,
    /// Once this is delivered, every sample before this number is.
    pub end: u64,
    /// At least one.
    pub samples: Vec<Sample>,
}

impl Outgoing {
    /// In two, for a receiver to which it was too large. Nothing when it is a single sample.
    pub fn split(mut self) -> Result<(Self, Self), Self> {
        if self.samples.len() < 2 {
            return Err(self);
        }
        let half = self.samples.len() / 2;
        let after = self.samples.split_off(half);
        let middle = self.first + half as u64;
        let second = Self { first: middle, end: self.end, samples: after };
        self.end = middle;
        Ok((self, second))
    }
}

/// Blocks that were read and not sent yet.
#[derive(Debug, Default)]
pub struct Gathered {
    /// With the number after each one's last sample: damaged samples make it larger than its count says.
    blocks: VecDeque<(Block, u64)>,
    count: usize,
}

impl Gathered {
    /// Adds what follows.
    pub fn push(&mut self, block: Block, end: u64) {
        self.count += block.samples.len();
        self.blocks.push_back((block, end));
    }

    /// Samples held.
    pub fn len(&self) -> usize {
        self.count
    }

    /// The next `limit` samples, or as many as there are.
    pub fn take(&mut self, limit: usize) -> Option<Outgoing> {
        let first = self.blocks.front()?.0.first;
        let mut out = Outgoing { first, end: first, samples: Vec::with_capacity(limit.min(self.count)) };
        while let Some((mut block, end)) = self.blocks.pop_front() {
            let room = limit - out.samples.len();
            if block.samples.len() > room {
                let after = block.samples.split_off(room);
                let middle = block.first + room as u64;
                out.samples.append(&mut block.samples);
                out.end = middle;
                let rest = Block { first: middle, samples: after, accepted_ms: block.accepted_ms };
                self.blocks.push_front((rest, end));
                break;
            }
            out.samples.append(&mut block.samples);
            out.end = end;
            if out.samples.len() == limit {
                break;
            }
        }
        self.count -= out.samples.len();
        Some(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sentinel::model::{Identity, Kind, SeriesTable};

    #[test]
    fn batches_have_the_size_that_is_wanted_and_miss_nothing() {
        let table = SeriesTable::new(1);
        let series = table.intern(Identity::new("a", Kind::Gauge, [("b", "c")]).unwrap()).unwrap();
        let sample = |n: u64| Sample { series: series.clone(), timestamp_ms: n as i64, value: 0.0 };
        let mut gathered = Gathered::default();
        let mut next = 0;
        for size in [1, 5, 2, 7, 1] {
            let block = Block { first: next, samples: (next..next + size).map(sample).collect(), accepted_ms: 0 };
            next += size;
            gathered.push(block, next);
        }
        let mut seen = Vec::new();
        let mut at = 0;
        while let Some(out) = gathered.take(3) {
            assert_eq!(out.first, at);
            assert_eq!(out.end, at + out.samples.len() as u64);
            at = out.end;
            seen.extend(out.samples.iter().map(|sample| sample.timestamp_ms));
        }
        assert_eq!(seen, (0..16).collect::<Vec<_>>());
        assert_eq!(gathered.len(), 0);
        let whole = Outgoing { first: 5, end: 8, samples: (5..8).map(sample).collect() };
        let (one, two) = whole.split().unwrap();
        assert_eq!((one.first, one.end, two.first, two.end), (5, 6, 6, 8));
        assert!(one.split().is_err());
    }
}
