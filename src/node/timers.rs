//! What the loop must do later.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

/// Due times with what is due. A timer is never taken back: who gets it looks whether it still matters.
#[derive(Debug)]
pub struct Timers<T> {
    heap: BinaryHeap<Reverse<(Instant, u64)>>,
    what: std::collections::HashMap<u64, T>,
    next: u64,
}

impl<T> Default for Timers<T> {
    fn default() -> Self {
        Self { heap: BinaryHeap::new(), what: std::collections::HashMap::new(), next: 0 }
    }
}

impl<T> Timers<T> {
    /// Adds a timer.
    pub fn after(&mut self, delay: Duration, what: T) {
        self.heap.push(Reverse((Instant::now() + delay, self.next)));
        self.what.insert(self.next, what);
        self.next += 1;
    }

    /// How long the loop may sleep.
    pub fn sleep(&self) -> Option<Duration> {
        self.heap.peek().map(|Reverse((due, _))| due.saturating_duration_since(Instant::now()))
    }

    /// The next timer that is due.
    pub fn due(&mut self) -> Option<T> {
        let Reverse((due, _)) = self.heap.peek()?;
        if *due > Instant::now() {
            return None;
        }
        let Reverse((_, key)) = self.heap.pop()?;
        self.what.remove(&key)
    }
}
