//! Requests that wait for something of a sandbox: that it runs, is paused, has ended.

use super::instance::{Awaited, Waiter};
use super::requests::Job;
use super::supervisor::Supervisor;
use crate::sandbox::id::SandboxId;
use crate::sandbox::lifecycle::State;
use crate::wire::{Code, Error, Fields, Message};

impl Supervisor {
    /// A client's request waits for something of a sandbox from now on.
    pub(super) fn await_(&mut self, key: u64, tag: &str, id: &SandboxId, what: Awaited) {
        self.add_job(key, tag, Job::Wait(id.clone()));
        if let Some(sandbox) = self.sandboxes.get_mut(id) {
            sandbox.waiters.push(Waiter { client: key, tag: tag.to_string(), what });
        }
        self.notify_waiters(id);
    }

    /// Tells the sandbox's waiters where it is; those who have what they wait for are answered.
    pub(super) fn notify_waiters(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let state = sandbox.state;
        // It may have ended again by now: it did run.
        let written = sandbox.writing.is_none();
        let has_run = sandbox.started_ms.is_some() && written;
        let settled = written && sandbox.rolling_back.is_none();
        let releasing = sandbox.releasing;
        let (mut forked, mut prepared) = (Vec::new(), Vec::new());
        let (mut builder, mut halted) = (false, Vec::new());
        let mut answers = Vec::new();
        sandbox.waiters.retain(|waiter| match waiter.what {
            Awaited::Created { .. } if has_run => {
                answers.push((waiter.client, Message::ok(&waiter.tag, Fields::new().with("id", id))));
                false
            }
            Awaited::Created { progress } => {
                if progress {
                    answers.push((
                        waiter.client,
                        Message::item(&waiter.tag, Fields::new().with("id", id).with("state", state)),
                    ));
                }
                true
            }
            Awaited::Stopped if !state.is_live() => {
                let fields = Fields::new().with("state", state).with("reason", &sandbox.reason);
                answers.push((waiter.client, Message::ok(&waiter.tag, fields)));
                false
            }
            Awaited::Paused if state == State::Paused && written && !sandbox.releasing => {
                answers.push((waiter.client, Message::ok(&waiter.tag, Fields::new().with("id", id))));
                false
            }
            Awaited::Prepared if has_run => {
                prepared.push((waiter.client, waiter.tag.clone()));
                false
            }
            Awaited::Builder if has_run => {
                builder = true;
                false
            }
            Awaited::Tried if has_run => {
                builder = true;
                answers.push((waiter.client, Message::ok(&waiter.tag, Fields::new().with("sandbox", id))));
                false
            }
            Awaited::Halted if !state.is_live() && settled && !releasing => {
                halted.push((waiter.client, waiter.tag.clone()));
                false
            }
            Awaited::Forked if has_run => {
                forked.push((waiter.client, waiter.tag.clone()));
                false
            }
            Awaited::Resumed if state == State::Running && settled => {
                answers.push((waiter.client, Message::ok(&waiter.tag, Fields::new().with("id", id))));
                false
            }
            // It has ended over it.
            Awaited::Paused | Awaited::Resumed if matches!(state, State::Stopped | State::Error) && settled => {
                let error = Error::new(Code::VmFailed, format!("the sandbox ended: {}", sandbox.reason));
                answers.push((waiter.client, Message::err(&waiter.tag, error.with("sandbox", id))));
                false
            }
            Awaited::Stopped
            | Awaited::Removed
            | Awaited::Paused
            | Awaited::Resumed
            | Awaited::Forked
            | Awaited::Prepared
            | Awaited::Builder
            | Awaited::Tried
            | Awaited::Halted => true,
        });
        if builder {
            self.builder_ready(id);
        }
        for (client, tag) in halted {
            self.builder_halted(client, &tag, id);
        }
        for (client, tag) in prepared {
            self.template_ready(client, &tag, id);
        }
        for (client, tag) in forked {
            self.forked(client, &tag, Ok(id));
        }
        for (client, message) in answers {
            if message.is_final() {
                self.finish(client, &message);
            } else {
                self.answer(client, &message);
            }
        }
    }

    /// Ends the requests that wait for something of a sandbox with an error.
    pub(super) fn answer_waiters(&mut self, id: &SandboxId, what: Awaited, error: &Error) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let waiters: Vec<Waiter> = sandbox.waiters.extract_if(.., |waiter| waiter.what == what).collect();
        for waiter in waiters {
            self.finish(waiter.client, &Message::err(&waiter.tag, error.clone().with("sandbox", id)));
        }
    }

    /// A client no longer waits. A sandbox whose id nobody was told is of no use to anybody.
    pub(super) fn cancel_wait(&mut self, key: u64, tag: &str, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let Some(at) = sandbox.waiters.iter().position(|w| w.client == key && w.tag == tag) else { return };
        let waiter = sandbox.waiters.remove(at);
        if matches!(waiter.what, Awaited::Created { .. }) {
            self.remove(id);
        }
    }
}
