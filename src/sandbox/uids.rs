//! User ids of workers: one for each that runs, from a range that nothing else on the host uses.

use std::collections::BTreeSet;
use std::ops::Range;

/// Who has which. An id that was given back is given out again as late as possible.
#[derive(Debug)]
pub struct Uids {
    range: Range<u32>,
    taken: BTreeSet<u32>,
    next: u32,
}

impl Uids {
    /// Nobody has one of `range` yet; it must not be empty.
    pub fn new(range: Range<u32>) -> Self {
        Self { next: range.start, range, taken: BTreeSet::new() }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.range.len()
    }

    /// The next one that is free; `None` when all are taken.
    pub fn take(&mut self) -> Option<u32> {
        let free = |from: Range<u32>, taken: &BTreeSet<u32>| from.into_iter().find(|uid| !taken.contains(uid));
        let uid = free(self.next..self.range.end, &self.taken).or_else(|| free(self.range.clone(), &self.taken))?;
        self.taken.insert(uid);
        self.next = uid + 1;
        Some(uid)
    }

    /// A worker that runs on from an earlier supervisor has this one, in or out of the range.
    pub fn claim(&mut self, uid: u32) {
        self.taken.insert(uid);
    }

    /// The process that had it is gone.
    pub fn give_back(&mut self, uid: u32) {
        self.taken.remove(&uid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_its_own_and_all_come_back() {
        let mut uids = Uids::new(10..13);
        assert_eq!([uids.take(), uids.take()], [Some(10), Some(11)]);
        uids.give_back(10);
        assert_eq!([uids.take(), uids.take(), uids.take()], [Some(12), Some(10), None], "not the one just given back");
        uids.give_back(11);
        assert_eq!(uids.take(), Some(11));
    }

    #[test]
    fn what_runs_on_is_not_given_out() {
        let mut uids = Uids::new(10..12);
        uids.claim(10);
        uids.claim(5);
        assert_eq!([uids.take(), uids.take()], [Some(11), None]);
        uids.give_back(5);
        assert_eq!(uids.take(), None, "it was never in the range");
    }
}
