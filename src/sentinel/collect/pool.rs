//! A few threads for what blocks: reading /proc, asking file systems for their room. A job that never comes back (a dead
//! network file system) costs one thread; the others go on, and the queue is bounded by the number of runs.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::runtime::{Note, Notes};
use super::service::Finished;
use crate::sentinel::schedule::RunId;

/// What a thread is to do.
pub type Job = Box<dyn FnOnce() -> Finished + Send>;

#[derive(Default)]
struct Queue {
    jobs: VecDeque<(RunId, Job)>,
    idle: usize,
    threads: usize,
    closed: bool,
}

/// Threads and their queue. Threads are started when there is work and none is idle.
pub struct Pool {
    shared: Arc<(Mutex<Queue>, Condvar)>,
    limit: usize,
    notes: Notes,
}

impl Pool {
    /// At most `limit` threads; ends of jobs come as notes.
    pub fn new(limit: usize, notes: Notes) -> Self {
        Self { shared: Arc::default(), limit: limit.max(1), notes }
    }

    /// Adds a job.
    pub fn submit(&mut self, run: RunId, job: Job) {
        let mut queue = lock(&self.shared.0);
        queue.jobs.push_back((run, job));
        if queue.idle >= queue.jobs.len() {
            self.shared.1.notify_one();
            return;
        }
        if queue.threads < self.limit {
            let (shared, notes) = (Arc::clone(&self.shared), self.notes.clone());
            let started = std::thread::Builder::new().name("collect-pool".into()).spawn(move || work(&shared, &notes));
            match started {
                Ok(_) => queue.threads += 1,
                // The job waits for the threads that there are; without any it meets its deadline.
                Err(e) => log::warn!("collect: cannot start a thread: {e}"),
            }
        }
    }

    /// Takes a job back that no thread has begun.
    pub fn take_back(&mut self, run: RunId) -> bool {
        let mut queue = lock(&self.shared.0);
        let before = queue.jobs.len();
        queue.jobs.retain(|(id, _)| *id != run);
        queue.jobs.len() < before
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        lock(&self.shared.0).closed = true;
        self.shared.1.notify_all();
    }
}

fn lock(queue: &Mutex<Queue>) -> MutexGuard<'_, Queue> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}

fn work(shared: &(Mutex<Queue>, Condvar), notes: &Notes) {
    let mut queue = lock(&shared.0);
    loop {
        if let Some((run, job)) = queue.jobs.pop_front() {
            drop(queue);
            let finished = job();
            notes.send(Note::Worked(run, finished));
            queue = lock(&shared.0);
        } else if queue.closed {
            return;
        } else {
            queue.idle += 1;
            queue = shared.1.wait(queue).unwrap_or_else(PoisonError::into_inner);
            queue.idle -= 1;
        }
    }
}
