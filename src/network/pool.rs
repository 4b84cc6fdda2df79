//! The pool of slots: which numbers are taken, what is ready, who waits. It decides; making and destroying is its
//! owner's. Numbers come from memory: the lowest that is free.

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

/// What bounds a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// So many are kept ready for the next to come.
    pub min_ready: u32,
    /// So many are there at most, ready, in use or being destroyed.
    pub max: u32,
    /// One beyond `min_ready` goes when nobody used it for so long.
    pub idle: Duration,
    /// One is not used again when it is older.
    pub age: Duration,
    /// Who finds none waits so long at most.
    pub wait: Duration,
}

/// Something ready, with its number.
#[derive(Debug)]
pub struct Item<T> {
    /// Its slot.
    pub number: u32,
    /// What was made for it.
    pub thing: T,
    /// When it was made.
    pub made: Instant,
}

/// A pool of things, each with the number of its slot. `W` is who waits.
#[derive(Debug)]
pub struct Pool<T, W> {
    limits: Limits,
    taken: BTreeSet<u32>,
    /// Those that were given back last are last, with the time of that.
    ready: VecDeque<(Item<T>, Instant)>,
    waiting: VecDeque<(W, Instant)>,
}

impl<T, W: PartialEq> Pool<T, W> {
    /// An empty one.
    pub fn new(limits: Limits) -> Self {
        Self { limits, taken: BTreeSet::new(), ready: VecDeque::new(), waiting: VecDeque::new() }
    }

    /// Most that are there at once.
    pub fn max(&self) -> u32 {
        self.limits.max
    }

    /// How many are ready.
    pub fn ready(&self) -> usize {
        self.ready.len()
    }

    /// The numbers of those that are ready.
    pub fn ready_numbers(&self) -> impl Iterator<Item = u32> {
        self.ready.iter().map(|(item, _)| item.number)
    }

    /// How many numbers are taken.
    pub fn taken(&self) -> usize {
        self.taken.len()
    }

    /// Takes a number that something has already.
    pub fn adopt(&mut self, number: u32) {
        self.taken.insert(number);
    }

    /// Somebody waits from now on.
    pub fn wait(&mut self, who: W, now: Instant) {
        self.waiting.push_back((who, now + self.limits.wait));
    }

    /// Somebody waits no longer. `false` when they did not.
    pub fn forget(&mut self, who: &W) -> bool {
        let before = self.waiting.len();
        self.waiting.retain(|(waiting, _)| waiting != who);
        self.waiting.len() < before
    }

    /// The next who waits, with something that is ready.
    pub fn serve(&mut self) -> Option<(W, Item<T>)> {
        if self.waiting.is_empty() {
            return None;
        }
        // The one that was used last is the one whose memory is warm, and lets the others grow old.
        let (item, _) = self.ready.pop_back()?;
        let (who, _) = self.waiting.pop_front()?;
        Some((who, item))
    }

    /// The number of one that is to be made now, which is taken with this.
    pub fn wanted(&mut self) -> Option<u32> {
        let wanted = self.waiting.len() + self.limits.min_ready as usize;
        if self.ready.len() >= wanted || self.taken.len() >= self.limits.max as usize {
            return None;
        }
        let number = (0..).zip(&self.taken).find(|(n, taken)| n != *taken).map(|(n, _)| n);
        let number = number.unwrap_or(self.taken.len() as u32);
        self.taken.insert(number);
        Some(number)
    }

    /// One was made, or came back. Gives it again when it is too old to be used.
    pub fn put(&mut self, item: Item<T>, now: Instant) -> Option<Item<T>> {
        if now.saturating_duration_since(item.made) >= self.limits.age {
            return Some(item);
        }
        self.ready.push_back((item, now));
        None
    }

    /// It could not be made, or is destroyed: its number is free.
    pub fn freed(&mut self, number: u32) {
        self.taken.remove(&number);
    }

    /// Those that are to be destroyed: too old, or idle and not needed.
    pub fn expired(&mut self, now: Instant) -> Vec<Item<T>> {
        let mut gone = Vec::new();
        let mut kept = VecDeque::new();
        let mut ready = std::mem::take(&mut self.ready);
        let mut surplus = ready.len().saturating_sub(self.limits.min_ready as usize);
        // Those that were given back first are looked at first.
        while let Some((item, since)) = ready.pop_front() {
            let old = now.saturating_duration_since(item.made) >= self.limits.age;
            let idle = surplus > 0 && now.saturating_duration_since(since) >= self.limits.idle;
            if old || idle {
                surplus = surplus.saturating_sub(1);
                gone.push(item);
            } else {
                kept.push_back((item, since));
            }
        }
        self.ready = kept;
        gone
    }

    /// Who has waited long enough.
    pub fn too_late(&mut self, now: Instant) -> Vec<W> {
        let mut late = Vec::new();
        while self.waiting.front().is_some_and(|(_, deadline)| *deadline <= now) {
            late.extend(self.waiting.pop_front().map(|(who, _)| who));
        }
        late
    }

    /// When `expired` or `too_late` may have something to say next.
    pub fn next_look(&self) -> Option<Instant> {
        let waiting = self.waiting.front().map(|(_, deadline)| *deadline);
        let surplus = self.ready.len() > self.limits.min_ready as usize;
        let idle = self.ready.front().filter(|_| surplus).map(|(_, since)| *since + self.limits.idle);
        let old = self.ready.iter().map(|(item, _)| item.made + self.limits.age).min();
        [waiting, idle, old].into_iter().flatten().min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn limits() -> Limits {
        Limits { min_ready: 2, max: 4, idle: SECOND * 10, age: SECOND * 100, wait: SECOND }
    }

    fn fill(pool: &mut Pool<(), char>, now: Instant) {
        while let Some(number) = pool.wanted() {
            assert!(pool.put(Item { number, thing: (), made: now }, now).is_none());
        }
    }

    #[test]
    fn so_many_are_kept_ready_and_no_more_than_the_most_are_made() {
        let now = Instant::now();
        let mut pool = Pool::new(limits());
        fill(&mut pool, now);
        assert_eq!((pool.ready(), pool.taken()), (2, 2));
        let mut used = Vec::new();
        for who in ['a', 'b', 'c', 'd', 'e'] {
            pool.wait(who, now);
            fill(&mut pool, now);
            used.extend(pool.serve());
        }
        let numbers: Vec<u32> = used.iter().map(|(_, item)| item.number).collect();
        assert_eq!((numbers.len(), pool.ready(), pool.taken()), (4, 0, 4));
        assert_eq!(pool.too_late(now), []);
        assert_eq!(pool.next_look(), Some(now + SECOND));
        assert_eq!(pool.too_late(now + SECOND), ['e']);
        // One comes back: who waits gets it.
        pool.wait('f', now);
        let (_, item) = used.remove(2);
        let number = item.number;
        assert!(pool.put(item, now).is_none());
        let (who, item) = pool.serve().unwrap();
        assert_eq!((who, item.number), ('f', number));
        assert!(pool.serve().is_none());
    }

    #[test]
    fn the_lowest_free_number_is_given_and_an_adopted_one_is_not() {
        let mut pool: Pool<(), char> = Pool::new(limits());
        pool.adopt(1);
        assert_eq!((pool.wanted(), pool.wanted()), (Some(0), Some(2)));
        pool.freed(0);
        assert_eq!(pool.wanted(), Some(0));
    }

    #[test]
    fn what_is_idle_or_old_goes() {
        let now = Instant::now();
        let mut pool: Pool<(), char> = Pool::new(limits());
        for number in 0..3 {
            pool.adopt(number);
            pool.put(Item { number, thing: (), made: now }, now);
        }
        assert_eq!(pool.expired(now + SECOND * 9).len(), 0);
        let gone = pool.expired(now + SECOND * 10);
        assert_eq!(gone.iter().map(|item| item.number).collect::<Vec<_>>(), [0], "two stay ready");
        assert_eq!(pool.expired(now + SECOND * 99).len(), 0);
        assert_eq!(pool.expired(now + SECOND * 100).len(), 2, "however few there are");
        let late = now + SECOND * 100;
        assert!(pool.put(Item { number: 3, thing: (), made: now }, late).is_some(), "it is not used again");
    }

    #[test]
    fn who_waits_no_longer_gets_nothing() {
        let now = Instant::now();
        let mut pool: Pool<(), char> = Pool::new(limits());
        pool.wait('a', now);
        pool.wait('b', now);
        assert!(pool.forget(&'a') && !pool.forget(&'a'));
        fill(&mut pool, now);
        assert_eq!(pool.serve().map(|(who, _)| who), Some('b'));
    }
}
