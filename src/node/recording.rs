//! Rows of sandboxes and their programs on the way to the state database, and what is to happen once they are there.

use std::time::Duration;

use super::supervisor::{Supervisor, Timer, now_ms};
use crate::sandbox::id::SandboxId;
use crate::storage::state::{Change, StateError, Ticket};

/// Pause before rows that could not be written are put again.
const RECORD_AGAIN: Duration = Duration::from_secs(5);

impl Supervisor {
    /// Takes no more rows and writes what there is, once more what was refused before. Whether that is done.
    pub(super) fn close_database(&mut self) -> bool {
        if self.unrecorded && !self.database.is_ending() {
            self.record_all();
        }
        self.database.end()
    }

    /// The database refused a change: all rows are put again in a while. Until then more of these say nothing new.
    pub(super) fn refused(&mut self, error: &StateError) {
        if !std::mem::replace(&mut self.unrecorded, true) {
            log::error!("state database: {error}");
            self.timers.after(RECORD_AGAIN, Timer::Record);
        }
    }

    /// Puts every row again. A put replaces the whole row, so doing it twice is fine.
    pub(super) fn record_all(&mut self) {
        self.unrecorded = false;
        let ids: Vec<SandboxId> = self.sandboxes.keys().cloned().collect();
        for id in ids {
            self.post(&id);
            self.record(&id);
            let numbers: Vec<u64> = self.sandboxes.get(&id).into_iter().flat_map(|s| s.execs.keys().copied()).collect();
            numbers.into_iter().for_each(|number| self.record_exec(&id, number));
        }
    }

    /// Writes a sandbox's row to the database. One that is being removed has none any more.
    pub(super) fn record(&mut self, id: &SandboxId) -> Option<Ticket> {
        self.time_sandbox(id);
        self.tell_state(id);
        let sandbox = self.sandboxes.get(id).filter(|sandbox| !sandbox.removing)?;
        Some(self.database.submit(Change::PutSandbox(Box::new(sandbox.row()))))
    }

    /// Writes a program's row to the database, unless its sandbox is being removed, and its record in the history.
    pub(super) fn record_exec(&mut self, id: &SandboxId, number: u64) {
        let Some(sandbox) = self.sandboxes.get(id) else { return };
        if let Some(exec) = sandbox.execs.get(&number).filter(|_| !sandbox.removing) {
            let row = sandbox.execution_row(exec, now_ms());
            self.database.submit(Change::PutExecution(Box::new(row)));
        }
        self.record_history(id, number);
    }

    /// A change is in the database, or was refused for good: clients that waited for it are told. A supervisor that is
    /// killed, or a node that loses power, then knows all that anybody was told.
    pub(super) fn written(&mut self, ticket: Ticket) {
        self.drain_written(ticket);
        let of = self.sandboxes.values_mut().find(|sandbox| sandbox.writing == Some(ticket));
        let Some(sandbox) = of else { return };
        sandbox.writing = None;
        sandbox.trace.close();
        let id = sandbox.id.clone();
        if sandbox.gone {
            self.removed(&id);
        } else {
            self.notify_waiters(&id);
            self.pausing_recorded(&id);
        }
    }
}
