//! What the collector hands its batches to: the processor stage, windows, then the log.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use crate::sentinel::aggregate::Aggregator;
use crate::sentinel::log::{AppendError, Log};
use crate::sentinel::model::Batch;
use crate::sentinel::process::Processor;
use crate::sentinel::task::{Refusal, Sink};

/// The sink of the whole sentinel.
pub struct Intake {
    stages: RwLock<(Arc<Processor>, Arc<Aggregator>)>,
    log: Arc<Log>,
    unprocessed: AtomicU64,
}

impl Intake {
    /// Into `log`, through `processor` and `aggregator`.
    pub fn new(processor: Processor, aggregator: Aggregator, log: Arc<Log>) -> Self {
        let stages = RwLock::new((Arc::new(processor), Arc::new(aggregator)));
        Self { stages, log, unprocessed: AtomicU64::new(0) }
    }

    /// Other rules from now on.
    pub fn set_processor(&self, processor: Processor) {
        self.stages.write().unwrap_or_else(PoisonError::into_inner).0 = Arc::new(processor);
    }

    /// Other windows from now on; those that are open end.
    pub fn set_aggregator(&self, aggregator: Aggregator) {
        self.close_windows(None);
        self.stages.write().unwrap_or_else(PoisonError::into_inner).1 = Arc::new(aggregator);
    }

    fn stages(&self) -> (Arc<Processor>, Arc<Aggregator>) {
        self.stages.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The rules in force.
    pub fn processor(&self) -> Arc<Processor> {
        self.stages().0
    }

    /// Samples that could not become what the rules said.
    pub fn unprocessed(&self) -> u64 {
        self.unprocessed.load(Ordering::Relaxed) + self.stages().1.lost()
    }

    /// Ends windows whose time is over, or all, and puts into the log what they give.
    pub fn close_windows(&self, now_ms: Option<i64>) {
        let (_, aggregator) = self.stages();
        if !aggregator.is_idle() {
            aggregator.close_due(now_ms);
            self.put_out(&aggregator);
        }
    }

    fn put_out(&self, aggregator: &Aggregator) {
        // What a full or closed log refuses it has counted.
        aggregator.put_out(|batch| !matches!(self.log.append(batch), Err(AppendError::Busy)));
    }
}

impl Sink for Intake {
    fn offer(&self, batch: &Batch) -> Result<(), Refusal> {
        let (processor, aggregator) = self.stages();
        let (batch, failed) = processor.apply(batch);
        self.unprocessed.fetch_add(failed, Ordering::Relaxed);
        let append = |batch: &Batch| {
            self.log.append(batch).map_err(|error| match error {
                AppendError::Busy => Refusal::Busy,
                AppendError::Full(_) | AppendError::Io(_) => Refusal::Full,
                AppendError::Closed => Refusal::Stopping,
            })
        };
        if aggregator.is_idle() {
            return append(&batch);
        }
        // Into the windows only once it is taken: who is told to come again comes with the same batch.
        let through = aggregator.through(&batch);
        if !through.samples.is_empty() {
            append(&through)?;
        }
        aggregator.add(&batch);
        self.put_out(&aggregator);
        Ok(())
    }
}
