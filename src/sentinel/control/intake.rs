//! What the collector hands its batches to: the processor stage, then the log.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use crate::sentinel::log::{AppendError, Log};
use crate::sentinel::model::Batch;
use crate::sentinel::process::Processor;
use crate::sentinel::task::{Refusal, Sink};

/// The sink of the whole sentinel.
pub struct Intake {
    processor: RwLock<Arc<Processor>>,
    log: Arc<Log>,
    unprocessed: AtomicU64,
}

impl Intake {
    /// Into `log`, through `processor`.
    pub fn new(processor: Processor, log: Arc<Log>) -> Self {
        Self { processor: RwLock::new(Arc::new(processor)), log, unprocessed: AtomicU64::new(0) }
    }

    /// Other rules from now on.
    pub fn set_processor(&self, processor: Processor) {
        *self.processor.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(processor);
    }

    /// The rules in force.
    pub fn processor(&self) -> Arc<Processor> {
        Arc::clone(&self.processor.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Samples that could not become what the rules said.
    pub fn unprocessed(&self) -> u64 {
        self.unprocessed.load(Ordering::Relaxed)
    }
}

impl Sink for Intake {
    fn offer(&self, batch: &Batch) -> Result<(), Refusal> {
        let (batch, failed) = self.processor().apply(batch);
        self.unprocessed.fetch_add(failed, Ordering::Relaxed);
        self.log.append(&batch).map_err(|error| match error {
            AppendError::Busy => Refusal::Busy,
            AppendError::Full(_) | AppendError::Io(_) => Refusal::Full,
            AppendError::Closed => Refusal::Stopping,
        })
    }
}
