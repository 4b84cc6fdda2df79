//! Draining: no new sandbox is taken, those that run come to their end or are ended at a deadline, and every queue is
//! emptied. It lasts until it is taken back, also over restarts.

use std::time::Duration;

use super::requests::Job;
use super::supervisor::{Supervisor, Timer, now_ms};
use crate::sandbox::id::SandboxId;
use crate::storage::state::{Change, DrainRow, Ticket};
use crate::wire::{Code, Error, Fields, Message};

/// The node is being drained.
#[derive(Debug, Default)]
pub(super) struct Drain {
    /// Until when, and what happens then.
    pub row: DrainRow,
    /// Requests to answer when it is done.
    waiters: Vec<(u64, String)>,
    /// How many sandboxes were left when that was last told.
    told: Option<usize>,
    /// The row behind which all is on the medium, once no sandbox is left.
    flushing: Option<Ticket>,
    /// All is on the medium.
    flushed: bool,
}

impl Supervisor {
    /// Goes on with a drain that an earlier supervisor began.
    pub(super) fn resume_drain(&mut self, drain: Option<DrainRow>) {
        let Some(row) = drain else { return };
        log::info!("the node is still being drained");
        self.drain = Some(Drain { row, ..Drain::default() });
        self.time_drain();
    }

    /// Begins to drain the node, or changes by when it is to be.
    pub(super) fn ask_drain(&mut self, key: u64, tag: &str, deadline: Option<Duration>, pauses: bool) {
        let until_ms =
            deadline.map(|time| now_ms().saturating_add(u64::try_from(time.as_millis()).unwrap_or(u64::MAX)));
        let drain = self.drain.get_or_insert_default();
        drain.row = DrainRow { until_ms: until_ms.or(drain.row.until_ms), pauses };
        drain.waiters.push((key, tag.to_string()));
        // The new one has to be told as well, and what was written since is behind another row.
        (drain.told, drain.flushing, drain.flushed) = (None, None, false);
        let kept = drain.row;
        log::info!("the node is drained for a client");
        self.database.submit(Change::Drain(Some(kept)));
        self.add_job(key, tag, Job::Drain);
        self.empty_warm();
        self.time_drain();
    }

    /// New sandboxes are taken again.
    pub(super) fn undrain(&mut self) {
        let Some(drain) = self.drain.take() else { return };
        log::info!("the node is not drained any more");
        self.database.submit(Change::Drain(None));
        for (client, tag) in drain.waiters {
            let error = Error::new(Code::Cancelled, "node.undrain took it back");
            self.finish(client, &Message::err(&tag, error));
        }
        self.resume_restarts();
        self.warm.look = true;
    }

    /// A client does not wait for it any more. It goes on.
    pub(super) fn forget_drain(&mut self, key: u64, tag: &str) {
        if let Some(drain) = &mut self.drain {
            drain.waiters.retain(|(client, other)| *client != key || other != tag);
        }
    }

    /// Whether sandboxes have had their time.
    pub(super) fn is_drained_by_now(&self) -> bool {
        self.drain.as_ref().and_then(|drain| drain.row.until_ms).is_some_and(|until| until <= now_ms())
    }

    fn time_drain(&mut self) {
        if let Some(until) = self.drain.as_ref().and_then(|drain| drain.row.until_ms) {
            self.timers.after(Duration::from_millis(until.saturating_sub(now_ms())), Timer::Drain);
        }
    }

    /// Sandboxes have had their time.
    pub(super) fn drain_expired(&mut self) {
        let Some(DrainRow { until_ms: until, pauses }) = self.drain.as_ref().map(|drain| drain.row) else { return };
        if until.is_none_or(|until| until > now_ms()) {
            // Taken back or put off meanwhile.
            return;
        }
        let live = self.sandboxes.values().filter(|sandbox| sandbox.state.is_live() || sandbox.restarting);
        let live: Vec<SandboxId> = live.map(|sandbox| sandbox.id.clone()).collect();
        for id in live {
            if pauses && self.begin_pause(&id).is_ok() {
                log::info!("sandbox {id} is paused: the node is drained");
                continue;
            }
            log::info!("sandbox {id} is stopped: the node is drained");
            if self.stop(&id, None).is_err() {
                self.remove(&id);
            }
        }
    }

    /// After each turn of the loop: how far it has come.
    pub(super) fn tend_drain(&mut self) {
        if self.drain.as_ref().is_none_or(|drain| drain.waiters.is_empty()) {
            return;
        }
        let busy =
            self.sandboxes.values().filter(|s| s.state.is_live() || s.worker.is_some() || s.restarting || s.releasing);
        let left = busy.count();
        let Some(drain) = &mut self.drain else { return };
        if drain.told != Some(left) {
            drain.told = Some(left);
            let step = Fields::new().with("sandboxes", left);
            let until = drain.row.until_ms.map(|until| until.saturating_sub(now_ms()));
            let step = until.into_iter().fold(step, |step, left| step.with("deadline_ms", left));
            let items: Vec<_> = drain.waiters.iter().map(|(to, tag)| (*to, Message::item(tag, step.clone()))).collect();
            items.iter().for_each(|(client, item)| self.answer(*client, item));
        }
        let Some(drain) = &mut self.drain else { return };
        if left > 0 {
            (drain.flushing, drain.flushed) = (None, false);
        } else if drain.flushing.is_none() {
            // Rows are written in their order: behind this one there is nothing of what was said before.
            drain.flushing = Some(self.database.submit(Change::Drain(Some(drain.row))));
        } else if drain.flushed
            && let Some(told) = self.sentinel_flushed()
        {
            let Some(drain) = &mut self.drain else { return };
            let done = Fields::new().with("sandboxes", 0).with("sentinel", told);
            for (client, tag) in std::mem::take(&mut drain.waiters) {
                self.finish(client, &Message::ok(&tag, done.clone()));
            }
        }
    }

    /// A row is on the medium.
    pub(super) fn drain_written(&mut self, ticket: Ticket) {
        if let Some(drain) = self.drain.as_mut().filter(|drain| drain.flushing == Some(ticket)) {
            drain.flushed = true;
            self.flush_sentinel();
        }
    }
}
