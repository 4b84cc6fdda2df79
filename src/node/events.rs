//! EventLog: what became of sandboxes, executions and templates, watched by clients. A client that reads slowly is told how many it
//! missed, and holds up nobody.

use std::collections::VecDeque;

use super::requests::Job;
use super::supervisor::{Supervisor, now_ms};
use crate::control::events::EventQuery;
use crate::sandbox::exec::Sink;
use crate::sandbox::flow::QUEUE_HIGH;
use crate::sandbox::id::SandboxId;
use crate::storage::events::{AT_HAND, EventRow};
use crate::storage::state::Change;
use crate::wire::{Error, Fields, Message};

/// Longest detail, in characters.
const DETAIL: usize = 256;

/// A template was not built.
pub(super) const BUILD_FAILED: &str = "template.build_failed";

/// The newest events.
#[derive(Debug)]
pub(super) struct EventLog {
    rows: VecDeque<EventRow>,
    next: u64,
    /// Somebody may watch.
    watched: bool,
}

impl EventLog {
    /// What an earlier supervisor left.
    pub(super) fn new(rows: Vec<EventRow>) -> Self {
        let next = rows.last().map_or(1, |row| row.seq + 1);
        Self { rows: rows.into(), next, watched: false }
    }

    fn oldest(&self) -> u64 {
        self.rows.front().map_or(self.next, |row| row.seq)
    }
}

/// One client's watching.
#[derive(Debug)]
pub struct EventReader {
    /// Number of the next event to look at.
    next: u64,
    query: EventQuery,
    /// Whose alone it sees.
    owner: Option<String>,
}

impl EventReader {
    fn wants(&self, row: &EventRow) -> bool {
        let is = |wanted: &Option<String>, value: &str| wanted.as_ref().is_none_or(|wanted| wanted == value);
        let kind = |kind: &String| row.kind == *kind || row.kind.strip_prefix(kind).is_some_and(|r| r.starts_with('.'));
        // Templates are everybody's; how a build fails is not.
        let shared = !row.template.is_empty() && row.kind != BUILD_FAILED;
        (shared || is(&self.owner, &row.owner))
            && is(&self.query.owner, &row.owner)
            && is(&self.query.sandbox, &row.sandbox)
            && self.query.kind.as_ref().is_none_or(kind)
    }

    /// Sends what there is and the client takes. `true` when that is all that it wants.
    pub(super) fn pump(&mut self, events: &EventLog, tag: &str, sink: &mut dyn Sink) -> bool {
        while self.next < events.next {
            if sink.queued() >= QUEUE_HIGH {
                return false;
            }
            let oldest = events.oldest();
            if self.next < oldest {
                // EventLog from before the first that was ever kept are not lost but were never there.
                sink.send(&Message::item(tag, Fields::new().with("lost", oldest - self.next)));
                self.next = oldest;
            }
            let at = usize::try_from(self.next - oldest).unwrap_or(usize::MAX);
            self.next += 1;
            if let Some(row) = events.rows.get(at).filter(|row| self.wants(row)) {
                sink.send(&Message::item(tag, fields(row)));
            }
        }
        if !self.query.follow {
            sink.send(&Message::ok(tag, Fields::new().with("seq", events.next - 1)));
        }
        !self.query.follow
    }
}

fn fields(row: &EventRow) -> Fields {
    let fields = Fields::new().with("seq", row.seq).with("time_ms", row.time_ms).with("kind", &row.kind);
    let about = [("owner", &row.owner), ("sandbox", &row.sandbox), ("template", &row.template)];
    let about = about.into_iter().filter(|(_, value)| !value.is_empty());
    let fields = about.fold(fields, |fields, (key, value)| fields.with(key, value));
    let fields = row.exec.iter().fold(fields, |fields, exec| fields.with("exec", exec));
    if row.detail.is_empty() { fields } else { fields.with("detail", &row.detail) }
}

impl Supervisor {
    /// Something happened.
    pub(super) fn tell(&mut self, kind: &str, id: &SandboxId, exec: Option<u64>, detail: &str) {
        let Some(sandbox) = self.sandboxes.get(id).filter(|sandbox| sandbox.parked.is_none()) else { return };
        let (owner, sandbox) = (sandbox.owner.clone(), id.to_string());
        self.add_event(EventRow { owner, sandbox, exec, ..EventRow::default() }, kind, detail);
    }

    /// Something became of a template; `owner` asked for it.
    pub(super) fn tell_template(&mut self, kind: &str, template: &str, owner: &str, detail: &str) {
        let (owner, template) = (owner.to_string(), template.to_string());
        self.add_event(EventRow { owner, template, ..EventRow::default() }, kind, detail);
    }

    /// Whoever a client is, as the owner of what it asks for.
    pub(super) fn owner_of_client(&self, key: u64) -> String {
        self.clients.get(&key).map(|client| client.identity().owner.clone()).unwrap_or_default()
    }

    fn add_event(&mut self, row: EventRow, kind: &str, detail: &str) {
        let (kind, detail) = (kind.to_string(), detail.chars().take(DETAIL).collect());
        let row = EventRow { seq: self.events.next, time_ms: now_ms(), kind, detail, ..row };
        self.events.next += 1;
        self.events.rows.push_back(row.clone());
        if self.events.rows.len() as u64 > AT_HAND {
            self.events.rows.pop_front();
        }
        self.database.submit(Change::Event(Box::new(row)));
        if self.events.watched {
            let watchers: Vec<u64> = self
                .clients
                .iter()
                .filter(|(_, client)| client.jobs.values().any(|job| matches!(job, Job::Events(_))))
                .map(|(key, _)| *key)
                .collect();
            self.events.watched = !watchers.is_empty();
            self.touched_clients.extend(watchers);
        }
    }

    /// Tells of a sandbox that its state is another than was told before.
    pub(super) fn tell_state(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id).filter(|sandbox| sandbox.parked.is_none()) else { return };
        let state = sandbox.state;
        if sandbox.told_state.replace(state) != Some(state) {
            let reason = sandbox.reason.clone();
            self.tell(&format!("sandbox.{state}"), id, None, &reason);
        }
    }

    /// `events.watch`
    pub(super) fn ask_events(&mut self, key: u64, tag: &str, mut query: EventQuery) -> Result<(), Error> {
        query.sandbox = query.sandbox.map(|given| self.find(key, &given).map_or(given, |id| id.to_string()));
        let next = match query.after {
            Some(after) => (after + 1).min(self.events.next),
            None if query.follow => self.events.next,
            None => self.events.oldest(),
        };
        let owner = self.only_owner(key);
        self.events.watched = true;
        self.add_job(key, tag, Job::Events(Box::new(EventReader { next, query, owner })));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Taken {
        messages: Vec<Message>,
        queued: usize,
    }

    impl Sink for Taken {
        fn send(&mut self, message: &Message) {
            self.messages.push(message.clone());
        }
        fn queued(&self) -> usize {
            self.queued
        }
    }

    fn seen(taken: &mut Taken, key: &str) -> Vec<u64> {
        let items = std::mem::take(&mut taken.messages);
        let fields = items.iter().filter_map(|message| match message {
            Message::Item { fields, .. } => fields.number(key),
            _ => None,
        });
        fields.collect()
    }

    #[test]
    fn who_reads_slowly_hears_how_many_are_lost_and_others_events_are_not_there() {
        let row = |seq: u64| EventRow {
            seq,
            kind: if seq.is_multiple_of(2) { "exec.ended" } else { "sandbox.running" }.to_string(),
            owner: if seq < 4 { "bob" } else { "ann" }.to_string(),
            ..EventRow::default()
        };
        let mut events = EventLog::new((1..=6).map(row).collect());
        let query = |follow: bool| EventQuery { follow, ..EventQuery::default() };
        let reader =
            |query: EventQuery, owner: Option<&str>| EventReader { next: 1, query, owner: owner.map(Into::into) };
        let mut taken = Taken::default();
        assert!(reader(query(false), None).pump(&events, "t", &mut taken));
        assert!(matches!(taken.messages.last(), Some(Message::Ok { .. })));
        assert_eq!(seen(&mut taken, "seq"), [1, 2, 3, 4, 5, 6]);
        reader(query(false), Some("ann")).pump(&events, "t", &mut taken);
        assert_eq!(seen(&mut taken, "seq"), [4, 5, 6]);
        let exec = EventQuery { kind: Some("exec".to_string()), ..query(false) };
        reader(exec, None).pump(&events, "t", &mut taken);
        assert_eq!(seen(&mut taken, "seq"), [2, 4, 6]);

        let mut slow = reader(query(true), None);
        taken.queued = QUEUE_HIGH;
        assert!(!slow.pump(&events, "t", &mut taken));
        events.rows.drain(..3);
        taken.queued = 0;
        assert!(!slow.pump(&events, "t", &mut taken));
        let items = taken.messages.clone();
        assert_eq!(seen(&mut taken, "seq"), [4, 5, 6]);
        taken.messages = items;
        assert_eq!(seen(&mut taken, "lost"), [3]);
    }
}
