//! All tasks in force, the file's and the core's, and what became of their runs.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::sentinel::task::{Outcome, Report, Reports, Task, TaskSet, TaskSource};

/// Reports kept for the core until it has them.
const MAX_REPORTS: usize = 10_000;
/// Upper bounds of the histogram of run times, in seconds.
pub const BUCKETS: [f64; 10] = [0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0];

/// Counts of runs since the start.
#[derive(Debug, Clone, Default)]
pub struct RunCounts {
    /// Runs that handed over samples.
    pub success: u64,
    /// Runs that failed.
    pub failed: u64,
    /// Runs that were not started, by reason.
    pub skipped: BTreeMap<&'static str, u64>,
    /// Runs by duration: not more than each bound of [`BUCKETS`].
    pub buckets: [u64; BUCKETS.len()],
    /// Seconds of all runs together.
    pub seconds: f64,
    /// Reports that the core never got because too many waited.
    pub reports_dropped: u64,
}

#[derive(Default)]
struct Book {
    own: Vec<Task>,
    from_core: Vec<Task>,
    core_version: String,
    current: Arc<TaskSet>,
    counts: RunCounts,
    keep_reports: bool,
    reports: VecDeque<Report>,
}

/// The book. Shared by all threads.
#[derive(Default)]
pub struct TaskBook(Mutex<Book>);

impl TaskBook {
    fn lock(&self) -> MutexGuard<'_, Book> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the file's tasks.
    pub fn set_own(&self, tasks: Vec<Task>) {
        let book = &mut *self.lock();
        if book.own != tasks {
            book.own = tasks;
            book.publish();
        }
    }

    /// Sets the core's tasks. Of two tasks with one id the file's counts.
    pub fn set_from_core(&self, version: String, tasks: Vec<Task>) {
        let book = &mut *self.lock();
        book.core_version = version;
        if book.from_core != tasks {
            book.from_core = tasks;
            book.publish();
        }
    }

    /// The version of the core's tasks that are in force; empty: none are.
    pub fn core_version(&self) -> String {
        self.lock().core_version.clone()
    }

    /// Whether there is a core that wants reports.
    pub fn keep_reports(&self, keep: bool) {
        self.lock().keep_reports = keep;
    }

    /// Counts of runs.
    pub fn counts(&self) -> RunCounts {
        self.lock().counts.clone()
    }

    /// Takes the oldest reports out.
    pub fn take_reports(&self, limit: usize) -> Vec<Report> {
        let book = &mut *self.lock();
        let count = book.reports.len().min(limit);
        book.reports.drain(..count).collect()
    }

    /// Puts back, in front, what the core did not take.
    pub fn put_back(&self, reports: Vec<Report>) {
        let book = &mut *self.lock();
        for report in reports.into_iter().rev() {
            if book.reports.len() < MAX_REPORTS {
                book.reports.push_front(report);
            } else {
                book.counts.reports_dropped += 1;
            }
        }
    }
}

impl Book {
    fn publish(&mut self) {
        let mut tasks = self.own.clone();
        tasks.extend(self.from_core.iter().filter(|task| !self.own.iter().any(|own| own.id == task.id)).cloned());
        self.current = Arc::new(TaskSet { version: self.current.version + 1, tasks });
    }
}

impl TaskSource for TaskBook {
    fn current(&self) -> Arc<TaskSet> {
        Arc::clone(&self.lock().current)
    }
}

impl Reports for TaskBook {
    fn report(&self, report: Report) {
        let book = &mut *self.lock();
        let seconds = report.duration.as_secs_f64();
        match &report.outcome {
            Outcome::Success => book.counts.success += 1,
            Outcome::Failed(_) => book.counts.failed += 1,
            Outcome::Skipped(reason) => *book.counts.skipped.entry(reason).or_default() += 1,
        }
        if !matches!(report.outcome, Outcome::Skipped(_)) {
            book.counts.seconds += seconds;
            for (bucket, bound) in book.counts.buckets.iter_mut().zip(BUCKETS) {
                *bucket += u64::from(seconds <= bound);
            }
        }
        if book.keep_reports {
            if book.reports.len() == MAX_REPORTS {
                book.reports.pop_front();
                book.counts.reports_dropped += 1;
            }
            book.reports.push_back(report);
        }
    }
}
