//! The edge between collection and the rest: what is to be collected ([`TaskSource`]), where it goes ([`Sink`]) and
//! what became of each run ([`Reports`]). The scheduler and the plugins know only these; the controller provides them.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::model::Batch;
use super::secret::Given;

/// A thing to be collected from again and again.
#[derive(Clone, PartialEq)]
pub struct Task {
    /// Unique among the tasks in force; a task with the same id and equal content keeps its phase over a reload.
    pub id: String,
    /// Name of the plugin that runs it.
    pub plugin: String,
    /// What is asked: the plugin's device fields by name. May hold secrets: never logged, never shown.
    pub device: Given,
    /// The plugin's own settings for this task. May hold secrets as well.
    pub config: Given,
    /// Added to every sample of the task, over the plugin's own where both name one.
    pub labels: BTreeMap<String, String>,
    /// From one run's start to the next one's.
    pub interval: Duration,
    /// A run that takes longer is ended and failed. At most the interval.
    pub timeout: Duration,
    /// Of tasks due at the same time the higher goes first.
    pub priority: u8,
    /// How often a failed run is tried again before the next one is due.
    pub retries: u32,
}

impl fmt::Debug for Task {
    /// Without `device` and `config`: they may hold secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Task").field("id", &self.id).field("plugin", &self.plugin).finish_non_exhaustive()
    }
}

/// All tasks that are to run from now on.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TaskSet {
    /// Changes with every change of the set.
    pub version: u64,
    /// Ids are unique.
    pub tasks: Vec<Task>,
}

/// Where the scheduler learns what is to run.
pub trait TaskSource: Send + Sync {
    /// The set in force. Cheap: the scheduler asks on every tick and compares versions. Never blocks.
    fn current(&self) -> Arc<TaskSet>;
}

/// Why a batch was not taken. Whoever offered it counts it; the sink has counted it under its own reason as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The buffer is full and its policy is to drop what is new.
    Full,
    /// The buffer is full and its policy is to make the producer wait: keep the batch (bounded) and offer it again at
    /// the next run, or drop it and count.
    Busy,
    /// The sentinel is stopping.
    Stopping,
}

/// Where collected samples go.
pub trait Sink: Send + Sync {
    /// Takes the whole batch or none of it. Bounded and quick: at most one write to the log, never a wait for a
    /// destination. Callable from any thread.
    fn offer(&self, batch: &Batch) -> Result<(), Refusal>;
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Its samples were handed over.
    Success,
    /// It was not started: the one before still ran, or every worker was busy. With the reason.
    Skipped(&'static str),
    /// With the error, which holds no secret.
    Failed(String),
}

/// What became of one run.
#[derive(Debug, Clone)]
pub struct Report {
    /// The task's id.
    pub task: String,
    /// Start of the run: milliseconds since 1970-01-01 UTC.
    pub started_ms: i64,
    /// From start to end.
    pub duration: Duration,
    /// Samples it gave.
    pub samples: u64,
    /// How it ended.
    pub outcome: Outcome,
}

/// Where reports go: counted in the self metrics and sent to the core.
pub trait Reports: Send + Sync {
    /// Never blocks; a report that finds no room is dropped and counted.
    fn report(&self, report: Report);
}
