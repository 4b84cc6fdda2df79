//! One link's turn: read requests, let those under way go on, write what they said.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::time::Instant;

use super::agent::{Agent, Door, Due};
use super::children::start_error;
use super::connection::{Connection, Job, QUEUE_HIGH};
use super::exec::{Exec, Visit as ExecVisit};
use super::{port, socket};
use crate::wire::{Decoded, Error, Fields, Filled, Link, Message};

/// Rounds of reading and writing on one link before the others get their turn.
const ROUNDS: usize = 16;

/// What a visit to a request found.
#[derive(Debug, PartialEq, Eq)]
enum Visit {
    /// It waits: for credit, for room in the link's queue, for a thread, or for the client.
    Idle,
    /// There is more to do.
    Progress,
    /// The request has been answered.
    Done,
}

impl Agent {
    /// Visits what was marked, until nothing moves.
    pub(super) fn work(&mut self) {
        self.serve_contexts();
        while let Some(id) = self.busy_execs.pop_first() {
            let Some(exec) = self.execs.get_mut(&id) else { continue };
            match &exec.attached {
                Some(attachment) => {
                    self.busy_links.insert(attachment.link);
                }
                None if exec.run.as_ref().is_some_and(|run| run.cancelled) => {
                    // It is not to be held up by what it writes and nobody reads.
                    let scratch = &mut self.scratch;
                    exec.outputs().for_each(|output| output.discard(scratch));
                }
                None => {
                    if let ExecVisit::Failed(failure) = exec.advance() {
                        self.fail_start(id, failure);
                    }
                }
            }
        }
        // Links that have more to do after their rounds come again after a look at the events.
        for id in std::mem::take(&mut self.busy_links) {
            let Some(mut connection) = self.links.remove(&id) else { continue };
            let more = self.serve(id, &mut connection);
            if connection.broken {
                self.bury(id, connection);
                continue;
            }
            if more {
                self.busy_links.insert(id);
            }
            self.links.insert(id, connection);
        }
    }

    /// Serves one link for some rounds. `true` when there is more to do at once.
    pub(super) fn serve(&mut self, id: u64, connection: &mut Connection) -> bool {
        if connection.connecting {
            match socket::connected(connection.link.stream().as_fd()) {
                Ok(true) => {
                    connection.connecting = false;
                    self.answered(id);
                }
                Ok(false) => return false,
                Err(_) => {
                    // Nobody waits on the host: it will come to the listener when it wants, or `bury` calls again.
                    connection.broken = true;
                    return false;
                }
            }
        }
        for _ in 0..ROUNDS {
            let mut progress = self.read(id, connection);
            if connection.link.queued() < QUEUE_HIGH {
                progress |= self.pump(connection);
            }
            if connection.writable && connection.link.queued() > 0 {
                match connection.link.flush() {
                    Ok(true) => progress = true,
                    Ok(false) => connection.writable = false,
                    Err(e) => connection.fail_by(&e),
                }
            }
            if connection.broken || !progress {
                return false;
            }
        }
        true
    }

    pub(super) fn read(&mut self, id: u64, connection: &mut Connection) -> bool {
        if !connection.readable || connection.link.queued() >= QUEUE_HIGH {
            return false;
        }
        match connection.link.fill() {
            Ok(Filled::More) => {}
            Ok(Filled::Drained) => {
                connection.readable = false;
                return false;
            }
            Ok(Filled::Closed) => {
                connection.broken = true;
                return false;
            }
            Err(e) => {
                connection.fail_by(&e);
                return false;
            }
        }
        while let Some(decoded) = connection.link.next() {
            match decoded {
                Decoded::Message(message) => self.handle(id, connection, message),
                Decoded::Bad { tag, error } => match connection.position(&tag) {
                    // A frame of a request's is lost, and the request with it.
                    Some(_) => {
                        self.abandon(connection, &tag, error);
                    }
                    None => connection.link.send(&Message::err(&tag, error)),
                },
            }
        }
        true
    }

    /// Lets every request on the link go on, in turns.
    pub(super) fn pump(&mut self, connection: &mut Connection) -> bool {
        let mut progress = false;
        let mut failures = Vec::new();
        let mut cgroups = Vec::new();
        let mut settled = Vec::new();
        let freeze = connection.jobs.iter().any(|slot| matches!(slot.job, Job::Freeze(_)));
        let freeze = freeze.then(|| (self.freeze_is_decided(), self.freeze_fields()));
        let Connection { link, jobs, .. } = connection;
        let (execs, scratch) = (&mut self.execs, self.scratch.as_mut_slice());
        jobs.retain_mut(|slot| {
            let visit = match &mut slot.job {
                Job::Exec(id) => match execs.get_mut(id) {
                    None => Visit::Done,
                    Some(exec) => match exec.pump(link, &slot.tag, scratch) {
                        visit @ (ExecVisit::Idle | ExecVisit::Progress) => {
                            settled.extend(Self::is_settled(exec).then_some(*id));
                            if visit == ExecVisit::Idle { Visit::Idle } else { Visit::Progress }
                        }
                        ExecVisit::Done => {
                            exec.attached = None;
                            cgroups.extend(exec.cgroup.take());
                            Visit::Done
                        }
                        ExecVisit::Failed(failure) => {
                            failures.push((*id, failure));
                            link.send(&Message::err(&slot.tag, start_error(exec, failure)));
                            exec.attached = None;
                            Visit::Done
                        }
                    },
                },
                Job::ExecList(next) => list_execs(execs, next, link, &slot.tag),
                Job::Task(task) => {
                    task.pump(link.queued());
                    Visit::Idle
                }
                Job::Service => Visit::Idle,
                Job::Freeze(until) => match &freeze {
                    Some((decided, fields)) if *decided || *until <= Instant::now() => {
                        link.send(&Message::ok(&slot.tag, fields.clone()));
                        Visit::Done
                    }
                    _ => Visit::Idle,
                },
            };
            progress |= visit != Visit::Idle;
            visit != Visit::Done
        });
        if let Some(users) = &mut self.users {
            cgroups.into_iter().for_each(|cgroup| users.retire(cgroup));
        }
        settled.into_iter().for_each(|id| self.settled(id));
        for (id, failure) in failures {
            self.fail_start(id, failure);
        }
        // When the queue is full, those behind would otherwise never have their turn.
        if connection.link.queued() >= QUEUE_HIGH && connection.jobs.len() > 1 {
            connection.jobs.rotate_left(1);
        }
        progress
    }

    /// Ends a request with an error, and what it was doing with it; a program is killed by `cancel` only.
    pub(super) fn abandon(&mut self, connection: &mut Connection, tag: &str, error: Error) {
        if let Some(Job::Exec(id)) = connection.take(tag)
            && let Some(exec) = self.execs.get_mut(&id)
        {
            exec.attached = None;
            self.drop_run(id);
        }
        connection.link.send(&Message::err(tag, error));
    }

    /// A link is gone. Its programs go on, for another link to attach to.
    pub(super) fn bury(&mut self, id: u64, connection: Connection) {
        for slot in &connection.jobs {
            if let Job::Exec(exec) = slot.job
                && let Some(exec) = self.execs.get_mut(&exec)
                && exec.attached.as_ref().is_some_and(|attachment| attachment.link == id)
            {
                exec.attached = None;
            }
        }
        let torn = connection.torn;
        drop(connection);
        self.lost(id, torn);
        if let Door::Port(port) = &mut self.door {
            port.disconnected();
            self.due.insert((Instant::now() + port::PAUSE, Due::Port));
        }
    }
}

fn list_execs(execs: &BTreeMap<u64, Exec>, next: &mut u64, link: &mut Link<File>, tag: &str) -> Visit {
    for (&id, exec) in execs.range(*next..) {
        if link.queued() >= QUEUE_HIGH {
            return Visit::Idle;
        }
        link.send(&Message::item(tag, exec.row()));
        *next = id.saturating_add(1);
    }
    link.send(&Message::ok(tag, Fields::new()));
    Visit::Done
}
