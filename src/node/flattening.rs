//! Memory that is a difference to another snapshot's is made whole in the background (`storage::memory_file::flatten`): a
//! sandbox goes on from whole files only. One at a time by itself, soon after it was taken; at once where somebody waits.
//!
//! The holes of the diff's own file are filled with what is below them, which changes nothing of what the two are together.
//! When all is on the medium, the row no longer names the one below, and only when that is durable may the latter go.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::faults::{self, Point};
use super::snapshots::Then;
use super::supervisor::{Done, Supervisor, Timer};
use crate::sandbox::id::SandboxId;
use crate::storage::memory_file::MemoryFileError;
use crate::storage::snapshots::store::Flatten;
use crate::storage::snapshots::{Shelves, SnapshotRow};
use crate::storage::state::Change;
use crate::wire::{Code, Error, Message};

/// Pause before it is tried again by itself what failed.
const AGAIN: Duration = Duration::from_secs(300);

/// What is known of making memory whole.
#[derive(Debug, Default)]
pub(super) struct Flattening {
    /// Those under way, by snapshot.
    under_way: BTreeMap<String, Step>,
    /// Those that failed: they are tried again after a while, or where somebody asks.
    failed: BTreeSet<String>,
    /// Who waits for one, beside sandboxes that are to start from it.
    waiting: Vec<(String, Waiting)>,
}

/// How far it is with one.
#[derive(Debug)]
enum Step {
    /// A thread copies.
    Copying,
    /// It is whole. Its row, which named that snapshot, is on its way to the database.
    Committing(String),
}

/// Who waits for a snapshot's memory to be whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Waiting {
    /// A sandbox that is to be put back to it.
    Rollback(SandboxId),
    /// A client that wants it as one file.
    Export { key: u64, tag: String },
}

impl Flattening {
    /// Rows are on their way to the database without which what they named may not go.
    pub fn is_committing(&self) -> bool {
        self.under_way.values().any(|step| matches!(step, Step::Committing(_)))
    }
}

impl Supervisor {
    /// Makes the next diff whole, where none is under way.
    pub(super) fn flatten_snapshots(&mut self) {
        let flattening = &self.snapshots.flattening;
        if !flattening.under_way.is_empty() || self.stopping.is_some() {
            return;
        }
        let plan = self.snapshots.store.flatten_plan();
        let Some(next) = plan.into_iter().find(|step| !flattening.failed.contains(&step.snapshot)) else { return };
        let id = next.snapshot.clone();
        if let Err(error) = self.begin_flatten(next) {
            log::warn!("the memory of snapshot {id} stays a difference: {error}");
            self.flatten_failed(&id);
        }
    }

    /// It is time to try again what failed.
    pub(super) fn flatten_again(&mut self) {
        self.snapshots.flattening.failed.clear();
        self.flatten_snapshots();
    }

    /// Whether a sandbox can go on from a snapshot now. Otherwise it is made so, and `flattened` goes on.
    ///
    /// # Errors
    /// `NOT_FOUND`, and where it can never be.
    pub(super) fn want_whole(&mut self, id: &str) -> Result<bool, Error> {
        let row = self.snapshots.store.snapshot(id);
        let row = row.ok_or_else(|| Error::new(Code::NotFound, format!("no snapshot {id}")).with("snapshot", id))?;
        if row.memory_below.is_none() {
            return Ok(true);
        }
        if !self.snapshots.flattening.under_way.contains_key(id) {
            let missing = || format!("the memory of snapshot {id} is a difference to that of one that is missing");
            let step = self.snapshots.store.flatten_step(id);
            self.begin_flatten(step.ok_or_else(|| Error::new(Code::Corrupt, missing()).with("snapshot", id))?)?;
        }
        Ok(false)
    }

    /// `want_whole`, for who is told when it is.
    pub(super) fn await_whole(&mut self, id: &str, who: Waiting) -> Result<bool, Error> {
        let whole = self.want_whole(id)?;
        if !whole {
            self.snapshots.flattening.waiting.push((id.to_string(), who));
        }
        Ok(whole)
    }

    fn begin_flatten(&mut self, step: Flatten) -> Result<(), Error> {
        let id = step.snapshot.clone();
        let bytes = self.snapshots.store.snapshot(&id).map_or(0, |row| row.memory_bytes);
        let shelves = self.snapshots.shelves.clone();
        let work = move || Done::Flattened {
            result: flatten(&shelves, &step, bytes).map_err(|e| to_error(&e).with("snapshot", &step.snapshot)),
            snapshot: step.snapshot,
        };
        let started = self.background.run("flatten", work);
        started.map_err(|e| Error::new(Code::NoCapacity, format!("no thread: {e}")))?;
        self.snapshots.flattening.under_way.insert(id, Step::Copying);
        Ok(())
    }

    /// A snapshot's memory is whole and on the medium, with the room that its files take; or it stays what it was.
    pub(super) fn flattened(&mut self, id: &str, result: Result<u64, Error>) {
        self.snapshots.flattening.under_way.remove(id);
        let row = self.snapshots.store.snapshot(id).cloned();
        let outcome = match (result, row) {
            (Ok(bytes), Some(SnapshotRow { memory_below: Some(below), .. })) => {
                self.whole(id, below, bytes);
                Ok(())
            }
            (Err(error), Some(_)) => {
                log::warn!("snapshot {id}: {error}");
                self.flatten_failed(id);
                Err(error)
            }
            // It went meanwhile. Who waits for it is told so when it looks.
            (_, _) => Ok(()),
        };
        let waiting = &mut self.snapshots.flattening.waiting;
        let waiting: Vec<Waiting> = waiting.extract_if(.., |(of, _)| of == id).map(|(_, who)| who).collect();
        for who in waiting {
            match who {
                Waiting::Rollback(sandbox) => self.rollback_begins(&sandbox, id, outcome.clone()),
                Waiting::Export { key, tag } => self.export_begins(key, &tag, id, outcome.clone()),
            }
        }
        for sandbox in self.scheduled(|sandbox| sandbox.origin() == Some(id)) {
            if let Err(error) = outcome.clone().and_then(|()| self.schedule(&sandbox)) {
                self.fail_start(&sandbox, error);
            }
        }
        self.flatten_snapshots();
    }

    /// The row says that its memory is whole, in memory now and in the database soon.
    fn whole(&mut self, id: &str, below: String, bytes: u64) {
        let Some(row) = self.snapshots.store.snapshot(id).cloned() else { return };
        let row = SnapshotRow { memory_below: None, bytes, ..row };
        self.snapshots.store.put_snapshot(row.clone());
        let ticket = self.database.submit_durable(Change::PutSnapshot(Box::new(row)));
        self.snapshots.after(ticket, Then::Flattened(id.to_string()));
        self.snapshots.flattening.under_way.insert(id.to_string(), Step::Committing(below));
    }

    /// The row is in the database: what it named may go. Or it was refused, and names that again.
    pub(super) fn flatten_written(&mut self, id: &str, refused: Option<&Error>) {
        let Some(Step::Committing(below)) = self.snapshots.flattening.under_way.remove(id) else { return };
        if refused.is_some() {
            if let Some(row) = self.snapshots.store.snapshot(id).cloned() {
                self.snapshots.store.put_snapshot(SnapshotRow { memory_below: Some(below), ..row });
            }
            return self.flatten_failed(id);
        }
        faults::pass(Point::FlattenWritten);
        self.retain_snapshots();
        self.collect();
        self.seal_snapshots();
        self.flatten_snapshots();
    }

    fn flatten_failed(&mut self, id: &str) {
        if self.snapshots.flattening.failed.is_empty() {
            self.timers.after(AGAIN, Timer::Flatten);
        }
        self.snapshots.flattening.failed.insert(id.to_string());
    }

    // ---- Those who wait ----

    /// The memory that a client wants as one file is whole, or cannot be.
    fn export_begins(&mut self, key: u64, tag: &str, id: &str, whole: Result<(), Error>) {
        let Some(client) = self.clients.get_mut(&key) else { return };
        if client.jobs.remove(tag).is_none() {
            return;
        }
        if let Err(error) = whole.and_then(|()| self.begin_export(key, tag, id)) {
            self.finish(key, &Message::err(tag, error));
        }
    }
}

/// Makes the memory of a snapshot whole. Gives the room that its files take. Blocks.
fn flatten(shelves: &Shelves, step: &Flatten, memory_bytes: u64) -> Result<u64, MemoryFileError> {
    let begun = faults::reached(Point::FlattenBegun);
    begun.map_err(|cause| MemoryFileError::Io { doing: "opening the diff", cause })?;
    shelves.flatten(step, memory_bytes, &mut faults::storage)
}

/// What a client is told of a memory that stays a difference.
pub(super) fn to_error(error: &MemoryFileError) -> Error {
    let message = format!("its memory, a difference to that of another, cannot be made whole: {error}");
    match error {
        MemoryFileError::Io { cause, .. } if cause.kind() != std::io::ErrorKind::NotFound => {
            Error::of_io(Code::VmFailed, message, cause)
        }
        _ => Error::new(Code::Corrupt, message),
    }
}
