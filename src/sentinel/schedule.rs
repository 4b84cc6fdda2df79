//! When each task runs: a pure state machine. The clock comes from outside, as milliseconds on a line that never goes
//! back; nothing here reads a clock, starts a thread or waits.
//!
//! * A task's slots are at `offset + n × interval`, where the offset is a hash of its id: tasks of one interval are
//!   spread over it, a slot never depends on when the last run ended (no drift), and a restart finds the same slots.
//! * A task is run at most once at a time. A slot that comes while it still runs, or still waits for room, is skipped
//!   and counted.
//! * A run has a deadline. When it comes, [`Action::Expire`] says so; whoever cannot take the run back (a thread in a
//!   system call) says that it is held, and the task starts no other until it is released.
//! * A failed run is tried again before the next slot, in time that ends with the slot.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use super::task::{Task, TaskSet};

/// A task that became known runs first within this many milliseconds, however long its interval.
const FIRST_WITHIN: u64 = 10_000;
/// First pause before a failed run is tried again; it doubles with each attempt.
const RETRY_AFTER: u64 = 1_000;
/// A try that would have less time than this is not made.
const RETRY_LEAST: u64 = 100;

/// Why a slot was skipped: the previous run goes on.
pub const STILL_RUNNING: &str = "the previous run is still going";
/// Why a slot was skipped: there was no room for the run.
pub const NO_ROOM: &str = "too many runs at once";
/// Why a slot was skipped: it had passed before anybody looked (a suspended machine).
pub const LATE: &str = "the slot had passed";
/// Why a slot was skipped: the last run met its deadline and cannot be taken back.
pub const HELD: &str = "the last run has not come back";

/// Names one run for the life of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RunId(pub u64);

/// Where a task is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Has never run to an end, or waits for room.
    Pending,
    /// A run is under way.
    Running,
    /// The last run gave its samples.
    Success,
    /// The last run failed.
    Failed,
}

impl State {
    /// As `sentinel tasks` shows it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Success => "success",
            Self::Failed => "failed",
        }
    }
}

/// What is known of a task's runs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Counts {
    /// Runs started, retries included.
    pub runs: u64,
    /// Runs that gave their samples.
    pub success: u64,
    /// Runs that failed.
    pub failed: u64,
    /// Runs that were tries after a failed one.
    pub retries: u64,
    /// Slots at which no run was started, by reason.
    pub skipped: BTreeMap<&'static str, u64>,
    /// Of the last run that failed.
    pub last_error: Option<String>,
    /// How long the last run took, in milliseconds.
    pub last_duration: u64,
    /// Samples of the last successful run.
    pub last_samples: u64,
}

/// What is to be done now.
#[derive(Debug, Clone)]
pub enum Action {
    /// Start this run.
    Start(Start),
    /// This run has met its deadline: end it, then call [`Schedule::finish`].
    Expire(RunId),
    /// A slot of this task passed without a run.
    Skipped {
        /// The task's id.
        task: Arc<Task>,
        /// One of the reasons above.
        reason: &'static str,
        /// How many slots.
        slots: u64,
    },
}

/// A run to be started.
#[derive(Debug, Clone)]
pub struct Start {
    /// The run.
    pub run: RunId,
    /// What runs.
    pub task: Arc<Task>,
    /// The time at which it must have ended.
    pub deadline: u64,
    /// 0 for the slot's own run, then counting its retries.
    pub attempt: u32,
    /// How late it starts after its slot, in milliseconds.
    pub lag: u64,
}

/// What a changed set of tasks ends.
#[derive(Debug, Default)]
pub struct Changes {
    /// Runs of tasks that are gone or have changed: end them. They are forgotten already.
    pub ended: Vec<RunId>,
    /// Ids that are gone.
    pub removed: Vec<String>,
    /// Ids that are new or have another content.
    pub changed: Vec<String>,
}

/// What a run's end means.
#[derive(Debug, Clone, PartialEq)]
pub struct Ended {
    /// What ran.
    pub task: Arc<Task>,
    /// From start to end, in milliseconds.
    pub duration: u64,
    /// Whether it will be tried again before its next slot.
    pub retried: bool,
}

#[derive(Debug)]
struct Entry {
    task: Arc<Task>,
    /// The slot that comes next.
    due: u64,
    /// Waits for room since this slot.
    waiting: Option<Wait>,
    run: Option<RunId>,
    held: bool,
    state: State,
    counts: Counts,
    /// Tells heap entries of this life of the task from older ones.
    key: u64,
}

#[derive(Debug, Clone, Copy)]
struct Wait {
    since: u64,
    attempt: u32,
}

#[derive(Debug)]
struct Running {
    id: String,
    started: u64,
    attempt: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// First at its time: a run whose timeout is the interval makes room for the slot.
    Deadline(RunId),
    Slot(u64),
    Retry(u64, u32),
}

/// All tasks, their slots and their runs.
#[derive(Debug)]
pub struct Schedule {
    limit: usize,
    entries: HashMap<String, Entry>,
    ids: HashMap<u64, String>,
    running: HashMap<RunId, Running>,
    due: BinaryHeap<Reverse<(u64, Event)>>,
    /// Tasks that wait for room: the higher priority first, then the older slot.
    ready: BTreeSet<(Reverse<u8>, u64, u64)>,
    next: u64,
    stopping: bool,
}

impl Schedule {
    /// A schedule that has at most `limit` runs under way at once; the others wait in order of priority.
    pub fn new(limit: usize) -> Self {
        Self {
            limit: limit.max(1),
            entries: HashMap::new(),
            ids: HashMap::new(),
            running: HashMap::new(),
            due: BinaryHeap::new(),
            ready: BTreeSet::new(),
            next: 0,
            stopping: false,
        }
    }

    /// Puts another set in force. A task with the same id and content keeps its slots, its counts and its run; one whose
    /// content changed keeps its counts.
    pub fn replace(&mut self, set: &TaskSet, now: u64) -> Changes {
        let mut changes = Changes::default();
        let wanted: HashMap<&str, &Task> = set.tasks.iter().map(|task| (task.id.as_str(), task)).collect();
        let gone: Vec<String> = self.entries.keys().filter(|id| !wanted.contains_key(id.as_str())).cloned().collect();
        for id in gone {
            self.remove(&id, &mut changes);
            changes.removed.push(id);
        }
        for (id, task) in wanted {
            let (mut counts, mut held) = (Counts::default(), None);
            if let Some(entry) = self.entries.get(id) {
                if *entry.task == *task {
                    continue;
                }
                counts = entry.counts.clone();
                held = entry.run.filter(|_| entry.held);
                self.remove(id, &mut changes);
            }
            changes.changed.push(id.to_string());
            self.add(task, counts, held, now);
        }
        let live = 2 * (self.entries.len() + self.running.len()) + 64;
        if self.due.len() > 2 * live {
            let all = std::mem::take(&mut self.due);
            self.due = all.into_iter().filter(|Reverse((_, event))| self.matters(event)).collect();
        }
        changes
    }

    fn add(&mut self, task: &Task, counts: Counts, held: Option<RunId>, now: u64) {
        let key = self.number();
        let due = first_slot(task, now);
        self.due.push(Reverse((due, Event::Slot(key))));
        self.ids.insert(key, task.id.clone());
        let task = Arc::new(task.clone());
        let state = State::Pending;
        let entry = Entry { task, due, waiting: None, run: held, held: held.is_some(), state, counts, key };
        self.entries.insert(entry.task.id.clone(), entry);
    }

    fn remove(&mut self, id: &str, changes: &mut Changes) {
        let Some(entry) = self.entries.remove(id) else { return };
        self.ids.remove(&entry.key);
        if let Some(wait) = entry.waiting {
            self.ready.remove(&(Reverse(entry.task.priority), wait.since, entry.key));
        }
        if let Some(run) = entry.run
            && self.running.remove(&run).is_some()
        {
            changes.ended.push(run);
        }
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn matters(&self, event: &Event) -> bool {
        match event {
            Event::Slot(key) | Event::Retry(key, _) => self.ids.contains_key(key),
            Event::Deadline(run) => self.running.contains_key(run),
        }
    }

    /// When [`Schedule::poll`] is to be called next, unless a run ends before.
    pub fn wake_at(&self) -> Option<u64> {
        self.due.peek().map(|Reverse((at, _))| *at)
    }

    /// What is to be done at this time; call until it gives `None`.
    pub fn poll(&mut self, now: u64) -> Option<Action> {
        while let Some(Reverse((at, event))) = self.due.peek().copied() {
            if at > now {
                break;
            }
            self.due.pop();
            let action = match event {
                Event::Deadline(run) => self.expire(run),
                Event::Slot(key) => self.slot(key, at, now),
                Event::Retry(key, attempt) => {
                    self.retry(key, attempt, at);
                    None
                }
            };
            if action.is_some() {
                return action;
            }
        }
        self.start_one(now).map(Action::Start)
    }

    fn expire(&self, run: RunId) -> Option<Action> {
        self.running.contains_key(&run).then_some(Action::Expire(run))
    }

    /// A task's slot has come: it becomes ready, or the slot is skipped.
    fn slot(&mut self, key: u64, at: u64, now: u64) -> Option<Action> {
        let entry = self.ids.get(&key).and_then(|id| self.entries.get_mut(id))?;
        let interval = millis(entry.task.interval);
        // The next slot on the task's own line; the first run may have been before it.
        let next = next_slot(&entry.task, now);
        let missed = (next - at).div_ceil(interval).saturating_sub(1);
        entry.due = next;
        self.due.push(Reverse((next, Event::Slot(key))));
        if self.stopping {
            return None;
        }
        let skip = if entry.held {
            Some(HELD)
        } else if entry.run.is_some() {
            Some(STILL_RUNNING)
        } else if entry.waiting.is_some_and(|wait| wait.attempt == 0) {
            Some(NO_ROOM)
        } else {
            None
        };
        if let Some(reason) = skip {
            *entry.counts.skipped.entry(reason).or_default() += missed + 1;
            return Some(Action::Skipped { task: Arc::clone(&entry.task), reason, slots: missed + 1 });
        }
        if let Some(wait) = entry.waiting.take() {
            // A retry that found no room gives way to the slot's own run.
            self.ready.remove(&(Reverse(entry.task.priority), wait.since, key));
        }
        entry.waiting = Some(Wait { since: at, attempt: 0 });
        self.ready.insert((Reverse(entry.task.priority), at, key));
        if missed == 0 {
            return None;
        }
        *entry.counts.skipped.entry(LATE).or_default() += missed;
        Some(Action::Skipped { task: Arc::clone(&entry.task), reason: LATE, slots: missed })
    }

    fn retry(&mut self, key: u64, attempt: u32, at: u64) {
        let Some(entry) = self.ids.get(&key).and_then(|id| self.entries.get_mut(id)) else { return };
        if entry.run.is_none() && entry.waiting.is_none() && !entry.held && !self.stopping {
            entry.waiting = Some(Wait { since: at, attempt });
            self.ready.insert((Reverse(entry.task.priority), at, key));
        }
    }

    fn start_one(&mut self, now: u64) -> Option<Start> {
        while self.running.len() < self.limit {
            let (_, _, key) = self.ready.pop_first()?;
            let run = RunId(self.number());
            let Some(entry) = self.ids.get(&key).and_then(|id| self.entries.get_mut(id)) else { continue };
            let Some(wait) = entry.waiting.take() else { continue };
            let timeout = millis(entry.task.timeout);
            let mut deadline = now + timeout;
            if entry.due.saturating_sub(now) >= timeout / 2 {
                // A start that was a little late must not cost the next slot where the timeout is the interval.
                deadline = deadline.min(entry.due);
            }
            if wait.attempt > 0 {
                if now + RETRY_LEAST > entry.due {
                    continue;
                }
                // A try never costs the next slot.
                deadline = deadline.min(entry.due);
                entry.counts.retries += 1;
            }
            entry.run = Some(run);
            entry.state = State::Running;
            entry.counts.runs += 1;
            let id = entry.task.id.clone();
            self.running.insert(run, Running { id, started: now, attempt: wait.attempt });
            self.due.push(Reverse((deadline, Event::Deadline(run))));
            let (task, lag) = (Arc::clone(&entry.task), now.saturating_sub(wait.since));
            return Some(Start { run, task, deadline, attempt: wait.attempt, lag });
        }
        None
    }

    /// Says how a run ended: with so many samples, or with an error. `held` says that it could not be taken back: then
    /// the task starts no other run until [`Schedule::release`]. `None` for a run that is no longer known.
    pub fn finish(&mut self, run: RunId, result: Result<u64, String>, held: bool, now: u64) -> Option<Ended> {
        let running = self.running.remove(&run)?;
        let entry = self.entries.get_mut(&running.id)?;
        let duration = now.saturating_sub(running.started);
        entry.run = held.then_some(run);
        entry.held = held;
        entry.counts.last_duration = duration;
        let mut retried = false;
        match result {
            Ok(samples) => {
                entry.state = State::Success;
                entry.counts.success += 1;
                entry.counts.last_samples = samples;
            }
            Err(error) => {
                entry.state = State::Failed;
                entry.counts.failed += 1;
                entry.counts.last_error = Some(error);
                let attempt = running.attempt + 1;
                let at = now + (RETRY_AFTER << (attempt - 1).min(10));
                if attempt <= entry.task.retries && !held && !self.stopping && at + RETRY_LEAST <= entry.due {
                    self.due.push(Reverse((at, Event::Retry(entry.key, attempt))));
                    retried = true;
                }
            }
        }
        Some(Ended { task: Arc::clone(&entry.task), duration, retried })
    }

    /// A held run has come back at last.
    pub fn release(&mut self, run: RunId) {
        if let Some(entry) = self.entries.values_mut().find(|entry| entry.held && entry.run == Some(run)) {
            entry.held = false;
            entry.run = None;
        }
    }

    /// Has a task run now, besides its slots, unless it runs or waits already.
    pub fn run_now(&mut self, id: &str, now: u64) {
        if let Some(entry) = self.entries.get_mut(id)
            && entry.run.is_none()
            && entry.waiting.is_none()
            && !self.stopping
        {
            entry.waiting = Some(Wait { since: now, attempt: 0 });
            self.ready.insert((Reverse(entry.task.priority), now, entry.key));
        }
    }

    /// Starts nothing any more; what runs goes on.
    pub fn stop(&mut self) {
        self.stopping = true;
        self.ready.clear();
        self.entries.values_mut().for_each(|entry| entry.waiting = None);
    }

    /// Runs under way, held ones not counted.
    pub fn under_way(&self) -> usize {
        self.running.len()
    }

    /// Runs that are to be ended because the sentinel stops.
    pub fn runs(&self) -> Vec<RunId> {
        self.running.keys().copied().collect()
    }

    /// Every task with its state, its next slot and its counts, in no order.
    pub fn tasks(&self) -> impl Iterator<Item = (&Arc<Task>, State, u64, &Counts)> {
        self.entries.values().map(|entry| {
            let state = if entry.waiting.is_some() { State::Pending } else { entry.state };
            (&entry.task, state, entry.due, &entry.counts)
        })
    }
}

/// A duration in whole milliseconds, at least one.
fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX / 4).clamp(1, u64::MAX / 4)
}

/// Where in its interval a task's slots are: the same on every machine and after every restart.
pub fn offset(id: &str, interval: u64) -> u64 {
    // FNV-1a, then a multiply and shift because FNV's low bits differ little for ids that end in a number.
    let hash = id
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, octet| (hash ^ u64::from(octet)).wrapping_mul(0x0100_0000_01b3));
    let mixed = (hash ^ (hash >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 32) % interval.max(1)
}

/// The first slot of a task that lies after `now`.
fn next_slot(task: &Task, now: u64) -> u64 {
    let interval = millis(task.interval);
    let offset = offset(&task.id, interval);
    let passed = if now < offset { 0 } else { (now - offset) / interval + 1 };
    offset + passed * interval
}

/// When a task that just became known runs first: at its slot, or soon where that is far away.
fn first_slot(task: &Task, now: u64) -> u64 {
    let slot = next_slot(task, now);
    let early = now + 1 + offset(&task.id, millis(task.interval)) % FIRST_WITHIN;
    if early + millis(task.timeout) <= slot { early } else { slot }
}

#[cfg(test)]
mod tests;
