//! A pool of things that are made before anybody needs them: what is ready, how many there are, who waits. It decides;
//! making and destroying is its owner's, and so is the clock. Network slots, overlays and workers each have one.
//!
//! Each thing has a number, its place: the lowest that is free. Who finds nothing ready either waits for whatever gets
//! ready next (`wait`, `serve`), or has one made for itself (`order`, `next_order`), where a thing is of use to nobody else.

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

/// What bounds a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// So many are kept ready for the next to come; none where it is 0.
    pub min_ready: u32,
    /// So many are there at most, ready, in use, being made or being destroyed.
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
    /// Its place.
    pub number: u32,
    /// What was made for it.
    pub thing: T,
    /// When it was made.
    pub made: Instant,
}

/// What happened in a pool since it was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Things that were made.
    pub made: u64,
    /// Who came and found one ready.
    pub hits: u64,
    /// Who came and found none.
    pub misses: u64,
    /// Of these, who had to wait for a place because as many as may be were there.
    pub waited: u64,
    /// Of these, who waited until the deadline in vain.
    pub late: u64,
    /// Things that were destroyed unused: too old, or idle.
    pub expired: u64,
    /// Things that could not be made, or broke before anybody used them.
    pub failed: u64,
}

/// A pool as it is now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Shown {
    /// How many are ready.
    pub ready: usize,
    /// How many are being made to be ready.
    pub making: usize,
    /// How many are with somebody, or being destroyed.
    pub in_use: usize,
    /// Who waits.
    pub waiting: usize,
    /// What happened.
    pub counters: Counters,
    /// Why the last one could not be made, until one could.
    pub problem: Option<String>,
}

/// Pause after the first failure, doubled with each further one up to the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// A pool of things, each with the number of its place. `W` is who waits.
#[derive(Debug)]
pub struct Pool<T, W> {
    limits: Limits,
    taken: BTreeSet<u32>,
    /// Of these, how many are being made to be ready.
    making: usize,
    /// Those that were given back last are last, with the time of that.
    ready: VecDeque<(Item<T>, Instant)>,
    waiting: VecDeque<(W, Instant)>,
    counters: Counters,
    /// Failures since anybody got one.
    failures: u32,
    /// None is made to be ready before.
    pause: Option<Instant>,
    problem: Option<String>,
}

impl<T, W: PartialEq> Pool<T, W> {
    /// An empty one.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            taken: BTreeSet::new(),
            making: 0,
            ready: VecDeque::new(),
            waiting: VecDeque::new(),
            counters: Counters::default(),
            failures: 0,
            pause: None,
            problem: None,
        }
    }

    /// What bounds it.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// The pool as it is now.
    pub fn shown(&self) -> Shown {
        Shown {
            ready: self.ready.len(),
            making: self.making,
            in_use: self.taken.len().saturating_sub(self.ready.len() + self.making),
            waiting: self.waiting.len(),
            counters: self.counters,
            problem: self.problem.clone(),
        }
    }

    /// What is ready.
    pub fn ready(&self) -> impl Iterator<Item = &T> {
        self.ready.iter().map(|(item, _)| &item.thing)
    }

    /// What is ready, to be changed.
    pub fn ready_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.ready.iter_mut().map(|(item, _)| &mut item.thing)
    }

    /// Numbers of what is ready.
    pub fn ready_numbers(&self) -> impl Iterator<Item = u32> {
        self.ready.iter().map(|(item, _)| item.number)
    }

    /// Takes a number that something has already.
    pub fn adopt(&mut self, number: u32) {
        self.taken.insert(number);
    }

    /// Takes the lowest free number for something that is there already, however many there are.
    pub fn adopt_any(&mut self) -> u32 {
        let number = (0..).zip(&self.taken).find(|(n, taken)| n != *taken).map(|(n, _)| n);
        let number = number.unwrap_or(self.taken.len() as u32);
        self.taken.insert(number);
        number
    }

    /// Takes something that is ready. Who gets none waits, or has one made.
    pub fn take(&mut self, now: Instant) -> Option<Item<T>> {
        self.take_best(now, |_| 0)
    }

    /// Takes what is ready that has the highest rank.
    pub fn take_best(&mut self, now: Instant, rank: impl Fn(&T) -> u32) -> Option<Item<T>> {
        let taken = self.pop(now, rank);
        match taken {
            Some(_) => self.counters.hits += 1,
            None => self.counters.misses += 1,
        }
        taken
    }

    /// The one that was used last is the one whose memory is warm, and lets the others grow old.
    fn pop(&mut self, now: Instant, rank: impl Fn(&T) -> u32) -> Option<Item<T>> {
        let age = self.limits.age;
        let young = |item: &Item<T>| now.saturating_duration_since(item.made) < age;
        let ready = self.ready.iter().enumerate().filter(|(_, (item, _))| young(item));
        let (at, _) = ready.max_by_key(|(_, (item, _))| rank(&item.thing))?;
        self.failures = 0;
        self.ready.remove(at).map(|(item, _)| item)
    }

    /// Somebody who took nothing waits from now on.
    pub fn wait(&mut self, who: W, now: Instant) {
        if !self.has_place() {
            self.counters.waited += 1;
        }
        self.waiting.push_back((who, now + self.limits.wait));
    }

    /// Somebody waits no longer. `false` when they did not.
    pub fn forget(&mut self, who: &W) -> bool {
        let before = self.waiting.len();
        self.forget_if(|waiting| waiting == who);
        self.waiting.len() < before
    }

    /// Those of whom that is so wait no longer.
    pub fn forget_if(&mut self, which: impl Fn(&W) -> bool) {
        self.waiting.retain(|(waiting, _)| !which(waiting));
    }

    /// Nobody waits any longer; gives all who did.
    pub fn give_up(&mut self) -> Vec<W> {
        self.waiting.drain(..).map(|(who, _)| who).collect()
    }

    /// Whether anybody waits.
    pub fn is_waited_for(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// The next who waits, with something that is ready.
    pub fn serve(&mut self, now: Instant) -> Option<(W, Item<T>)> {
        if self.waiting.is_empty() {
            return None;
        }
        let item = self.pop(now, |_| 0)?;
        let (who, _) = self.waiting.pop_front()?;
        Some((who, item))
    }

    /// Whether one more may be there.
    pub fn has_place(&self) -> bool {
        self.taken.len() < self.limits.max as usize
    }

    /// The number of one that is to be made to be ready now, which is taken with this; followed by `made` or `failed`.
    /// Beside those that somebody waits for, one is made after the other.
    pub fn wanted(&mut self, now: Instant) -> Option<u32> {
        let wanted = self.waiting.len() + self.limits.min_ready as usize;
        let enough = self.ready.len() + self.making >= wanted || self.making > self.waiting.len();
        // Who waits is told that it fails, and so need not wait for the end of a pause.
        let pauses = self.waiting.is_empty() && self.pause.is_some_and(|pause| now < pause);
        if enough || pauses || !self.has_place() {
            return None;
        }
        self.making += 1;
        Some(self.adopt_any())
    }

    /// The number of one that is to be made for somebody who found none ready; followed by `delivered` or `broke`.
    pub fn order(&mut self) -> Option<u32> {
        self.has_place().then(|| self.adopt_any())
    }

    /// The same for the first who waits.
    pub fn next_order(&mut self) -> Option<(W, u32)> {
        if !self.has_place() {
            return None;
        }
        let (who, _) = self.waiting.pop_front()?;
        Some((who, self.adopt_any()))
    }

    /// One that was ordered is there.
    pub fn delivered(&mut self) {
        self.counters.made += 1;
        self.problem = None;
    }

    /// One that was wanted was made.
    pub fn made(&mut self, item: Item<T>, now: Instant) {
        self.making = self.making.saturating_sub(1);
        self.delivered();
        self.ready.push_back((item, now));
    }

    /// One came back. Gives it again when it is too old to be used.
    pub fn put_back(&mut self, item: Item<T>, now: Instant) -> Option<Item<T>> {
        if now.saturating_duration_since(item.made) >= self.limits.age {
            self.counters.expired += 1;
            return Some(item);
        }
        self.ready.push_back((item, now));
        None
    }

    /// One that was wanted could not be made: its number is free, and no other is made for a while.
    pub fn failed(&mut self, number: u32, why: String, now: Instant) {
        self.spoiled(why, now);
        self.freed(number);
    }

    /// One that was wanted was made and is of no use; its number is free when `freed` says so.
    pub fn spoiled(&mut self, why: String, now: Instant) {
        self.making = self.making.saturating_sub(1);
        self.broke(why, now);
    }

    /// One that was ordered could not be made, or one that was ready broke; its number is free when `freed` says so.
    pub fn broke(&mut self, why: String, now: Instant) {
        self.counters.failed += 1;
        let pause = FIRST_PAUSE.saturating_mul(1 << self.failures.min(16)).min(LONGEST_PAUSE);
        self.failures += 1;
        self.pause = Some(now + pause);
        self.problem = Some(why);
    }

    /// Takes out of what is ready the one that `which` says is broken.
    pub fn lost(&mut self, which: impl Fn(&T) -> bool) -> Option<Item<T>> {
        let at = self.ready.iter().position(|(item, _)| which(&item.thing))?;
        self.ready.remove(at).map(|(item, _)| item)
    }

    /// It is destroyed: its number is free.
    pub fn freed(&mut self, number: u32) {
        self.taken.remove(&number);
    }

    /// No more is made to be ready; gives what is, to be destroyed.
    pub fn drain(&mut self) -> Vec<Item<T>> {
        self.limits.min_ready = 0;
        self.ready.drain(..).map(|(item, _)| item).collect()
    }

    /// Those that are to be destroyed: too old, or idle and not needed.
    pub fn expired(&mut self, now: Instant) -> Vec<Item<T>> {
        self.pause.take_if(|pause| *pause <= now);
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
        self.counters.expired += gone.len() as u64;
        gone
    }

    /// Who has waited long enough.
    pub fn too_late(&mut self, now: Instant) -> Vec<W> {
        let mut late = Vec::new();
        while self.waiting.front().is_some_and(|(_, deadline)| *deadline <= now) {
            late.extend(self.waiting.pop_front().map(|(who, _)| who));
        }
        self.counters.late += late.len() as u64;
        late
    }

    /// When `expired`, `too_late` or `wanted` may have something to say next.
    pub fn next_look(&self) -> Option<Instant> {
        let waiting = self.waiting.front().map(|(_, deadline)| *deadline);
        let surplus = self.ready.len() > self.limits.min_ready as usize;
        let idle = self.ready.front().filter(|_| surplus).map(|(_, since)| *since + self.limits.idle);
        let old = self.ready.iter().map(|(item, _)| item.made + self.limits.age).min();
        let short = self.ready.len() + self.making < self.limits.min_ready as usize && self.has_place();
        let pause = self.pause.filter(|_| short);
        [waiting, idle, old, pause].into_iter().flatten().min()
    }
}

#[cfg(test)]
mod tests;
