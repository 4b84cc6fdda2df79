//! After each turn of the loop: whatever became sendable is sent, and credit is passed on where there is room.

use super::feeding::pour;
use super::instance::{Route, Worker};
use super::requests::Job;
use super::supervisor::Supervisor;
use crate::control::client::{ANSWERS_HIGH, ANSWERS_MAX};
use crate::sandbox::claims::{UNANSWERED_MAX, UNREAD_MAX};
use crate::sandbox::exec::{OUTPUTS, Sink};
use crate::sandbox::flow::QUEUE_HIGH;
use crate::sandbox::id::SandboxId;
use crate::wire::{Code, Error, Fields, INITIAL_CREDIT, Message};

impl Supervisor {
    /// Sends until nobody is touched any more: sending to one may allow another to send.
    pub(super) fn settle(&mut self) {
        loop {
            if let Some(id) = self.touched_sandboxes.pop_first() {
                self.settle_sandbox(&id);
            } else if let Some(key) = self.touched_clients.pop_first() {
                self.settle_client(key);
            } else {
                return;
            }
        }
    }

    fn settle_sandbox(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        pour(sandbox);
        let Some(worker) = &mut sandbox.worker else { return };
        // A failing link shows as closed when it is read.
        let _ = worker.link.flush();
        for exec in sandbox.execs.values_mut() {
            let Some(route) = exec.route.clone() else { continue };
            for (index, channel) in OUTPUTS.iter().enumerate() {
                if let Some(octets) = exec.grant(index) {
                    worker.agent.send(&Message::credit(&route, channel, octets));
                }
            }
            let input = exec.input();
            let Some((key, tag)) = exec.feeder().map(|viewer| (viewer.client, viewer.tag.clone())) else { continue };
            let queued = worker.agent.queued();
            let grant = if exec.code.is_some() { exec.feed.grant(queued) } else { exec.stdin.grant(queued) };
            if let Some(octets) = grant
                && let Some(client) = self.clients.get_mut(&key)
            {
                client.send(&Message::credit(&tag, input, octets));
                self.touched_clients.insert(key);
            }
        }
        for (key, client) in &mut self.clients {
            let mut grants = Vec::new();
            for (tag, job) in &mut client.jobs {
                if let Job::Relay { sandbox, up, .. } = job
                    && sandbox == id
                    && let Some(octets) = up.grant(worker.agent.queued())
                {
                    grants.push(Message::credit(tag, "content", octets));
                }
            }
            for grant in grants {
                client.send(&grant);
                self.touched_clients.insert(*key);
            }
        }
        let _ = worker.agent.flush();
        if worker.agent.has_unsent() {
            self.again.insert(worker.tokens[2]);
        }
        if let Some(what) = unread(worker) {
            self.agent_lost(id, Error::new(Code::LinkLost, what));
        } else if worker.link.queued() > UNREAD_MAX {
            let what =
                format!("its worker left {} octets unread, over the limit of {UNREAD_MAX}", worker.link.queued());
            self.worker_lost(id, &Error::new(Code::LinkLost, what));
        }
    }

    fn settle_client(&mut self, key: u64) {
        let Some(client) = self.clients.get(&key) else { return };
        let was_full = client.queued() >= ANSWERS_HIGH;
        if client.jobs.is_empty() {
            self.flush_client(key, was_full);
            return;
        }
        let tags: Vec<String> = client.jobs.keys().cloned().collect();
        for tag in tags {
            self.settle_job(key, &tag);
        }
        self.flush_client(key, was_full);
    }

    fn settle_job(&mut self, key: u64, tag: &str) {
        let Some(client) = self.clients.get_mut(&key) else { return };
        let Some(mut job) = client.jobs.remove(tag) else { return };
        let ended = match &mut job {
            Job::Exec { sandbox, number } => {
                let Some(sandbox) = self.sandboxes.get_mut(sandbox) else { return };
                let Some(exec) = sandbox.execs.get_mut(number) else { return };
                match exec.viewers.iter().position(|v| v.client == key && v.tag == tag) {
                    Some(at) => {
                        let ended = exec.pump(at, client);
                        if ended {
                            exec.viewers.remove(at);
                        }
                        if exec.route.is_some() {
                            self.touched_sandboxes.insert(sandbox.id.clone());
                        }
                        ended
                    }
                    None => true,
                }
            }
            Job::Relay { sandbox, route, down, lost, .. } => {
                if let Some(count) = lost.as_mut().filter(|lost| **lost > 0)
                    && client.queued() < QUEUE_HIGH
                {
                    let fields = Fields::new().with("event", "lost").with("count", std::mem::take(count));
                    client.send(&Message::item(tag, fields));
                }
                if let Some(octets) = down.grant(client.queued())
                    && let Some(worker) = self.sandboxes.get_mut(sandbox).and_then(|sandbox| sandbox.worker.as_mut())
                {
                    worker.agent.send(&Message::credit(route, "content", octets));
                    self.touched_sandboxes.insert(sandbox.clone());
                }
                false
            }
            Job::Logs(reader) => {
                let sandbox = reader.sandbox().and_then(|id| self.sandboxes.get(id));
                let live = sandbox.is_some_and(|sandbox| sandbox.worker.is_some());
                reader.pump(tag, client, live)
            }
            Job::Events(reader) => reader.pump(&self.events, tag, client),
            Job::Export(download) => download.pump(tag, client),
            Job::Restore { upload, .. } | Job::Import(upload) => {
                if let Some(octets) = upload.grant() {
                    client.send(&Message::credit(tag, "content", octets));
                }
                false
            }
            Job::Wait(_)
            | Job::Inquiry { .. }
            | Job::NetworkChange(_)
            | Job::NodeStop
            | Job::Drain
            | Job::Backup
            | Job::Ledger
            | Job::Snapshot
            | Job::Warm
            | Job::Build(_)
            | Job::Fork { .. }
            | Job::Packages { .. }
            | Job::Reading(_) => false,
        };
        if !ended && let Some(client) = self.clients.get_mut(&key) {
            client.jobs.insert(tag.to_string(), job);
        }
    }

    fn flush_client(&mut self, key: u64, was_full: bool) {
        self.audit_ends(key);
        let Some(client) = self.clients.get_mut(&key) else { return };
        let before = client.queued();
        let flushed = client.flush();
        let (after, idle, closed) = (client.queued(), client.jobs.is_empty(), client.half_closed);
        match flushed {
            Err(_) => self.drop_client(key),
            Ok(true) if closed && idle => self.drop_client(key),
            Ok(_) if after > ANSWERS_MAX => {
                log::warn!("client {key} takes no answers: {after} octets are queued; it is dropped");
                self.drop_client(key);
            }
            Ok(_) => {
                if after < before && !idle {
                    // There is room again: more may be sendable.
                    self.touched_clients.insert(key);
                }
                if was_full && after < ANSWERS_HIGH {
                    if let Some(token) = self.client_tokens.get(&key) {
                        self.again.insert(*token);
                    }
                    self.release_held(key);
                }
            }
        }
    }
}

/// What is wrong with an agent that leaves too much unread, or unanswered. What streams may have under way does not count.
fn unread(worker: &Worker) -> Option<String> {
    let queued = worker.agent.queued();
    if !worker.agent.is_ready() || queued <= UNREAD_MAX && worker.routes.len() <= UNANSWERED_MAX {
        return None;
    }
    let streams = worker.routes.values().filter(|route| matches!(route, Route::Exec(_) | Route::Relay { .. })).count();
    left_behind(queued, streams, worker.routes.len() - streams)
}

/// The same of so many octets that wait, so many requests that have a window for theirs, and so many others.
fn left_behind(queued: usize, streams: usize, others: usize) -> Option<String> {
    let window = usize::try_from(INITIAL_CREDIT).unwrap_or(usize::MAX);
    let max = UNREAD_MAX.saturating_add(streams.saturating_mul(window));
    if queued > max {
        return Some(format!("it left {queued} octets unread, over the limit of {max}"));
    }
    let over = others > UNANSWERED_MAX;
    over.then(|| format!("it left {others} requests unanswered, over the limit of {UNANSWERED_MAX}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_agent_leaves_behind_is_bounded_by_its_streams_and_by_a_number_of_requests() {
        let window = usize::try_from(INITIAL_CREDIT).expect("it fits");
        assert_eq!(left_behind(UNREAD_MAX, 0, UNANSWERED_MAX), None);
        assert_eq!(left_behind(UNREAD_MAX + 3 * window, 3, 0), None);
        let octets = left_behind(UNREAD_MAX + 3 * window + 1, 3, 0).expect("too much");
        assert!(
            octets.contains("octets unread") && octets.ends_with(&(UNREAD_MAX + 3 * window).to_string()),
            "{octets}"
        );
        let requests = left_behind(0, 0, UNANSWERED_MAX + 1).expect("too many");
        assert_eq!(requests, "it left 16385 requests unanswered, over the limit of 16384");
    }
}
