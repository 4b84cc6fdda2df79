//! What creates and executions spend their time on (`sandbox/trace.rs`): the spans of a create, and who asks for them.

use std::time::Instant;

use super::supervisor::Supervisor;
use crate::sandbox::id::SandboxId;
use crate::sandbox::trace::Trace;
use crate::wire::{Code, Error, Fields, Message};

/// From the request to its check against what the node may take.
pub(super) const VALIDATE: &str = "validate";
/// Until its template is known to be whole.
pub(super) const ADMIT: &str = "admit";
/// Until it has a worker: a user id, a control group, a closed jail.
const ALLOCATE: &str = "allocate";
/// Until it has its TAP and rules, where it is to have a network.
const NETWORK: &str = "network";
/// Until it has its overlay.
const STORAGE: &str = "storage";
/// Until its machine is made.
pub(super) const VM: &str = "vm";
/// From the machine's first instruction to the agent's greeting.
const BOOT: &str = "boot";
/// The same of one that goes on from a snapshot.
const RESTORE: &str = "restore";
/// From the greeting until the guest has its settings.
pub(super) const AGENT_READY: &str = "agent-ready";
/// Until it is in the database that it runs.
pub(super) const REGISTER: &str = "register";

/// Of a code run: until the packages that it asks for are in its sandbox.
pub(super) const PACKAGES: &str = "packages";
/// Of an execution: until the agent has started it.
pub(super) const START: &str = "start";
/// Of a code run: until its source and its context are there.
pub(super) const QUEUE: &str = "queue";
/// Of an execution: until it has ended.
pub(super) const RUN: &str = "run";

/// Creates that failed, whose traces are kept.
const FAILED_KEPT: usize = 64;

/// A create that failed, of which nothing else is left.
#[derive(Debug)]
pub(super) struct FailedCreate {
    id: SandboxId,
    owner: String,
    trace: Trace,
}

impl Supervisor {
    /// When what is being done was asked for.
    pub(super) fn asked(&self) -> Instant {
        self.taken.unwrap_or_else(Instant::now)
    }

    /// The trace of what the request being taken asks for, or that of one that goes on.
    pub(super) fn new_trace(&mut self) -> Trace {
        if let Some(trace) = self.went_on.take() {
            return trace;
        }
        let mut trace = Trace::since(self.asked());
        trace.begin_at_once(VALIDATE);
        trace
    }

    /// Does something to the trace of a sandbox that is being created.
    pub(super) fn trace(&mut self, id: &SandboxId, change: impl FnOnce(&mut Trace)) {
        if let Some(sandbox) = self.sandboxes.get_mut(id) {
            change(&mut sandbox.trace);
        }
    }

    /// Whether a sandbox has its slot, its overlay and its worker.
    pub(super) fn trace_allocation(&mut self, id: &SandboxId, has: [bool; 3]) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let spans = [(NETWORK, has[0]), (STORAGE, has[1]), (ALLOCATE, has[2])];
        for (span, has) in spans.into_iter().filter(|(span, _)| *span != NETWORK || sandbox.spec.network.is_some()) {
            sandbox.trace.begin(span);
            if has {
                sandbox.trace.end(span);
            }
        }
    }

    /// A sandbox's worker has made its machine, which runs.
    pub(super) fn machine_made(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let span = if sandbox.origin().is_some() { RESTORE } else { BOOT };
        sandbox.trace.next(span);
    }

    /// Notes why a create failed; the error that says in which span.
    pub(super) fn trace_failure(&mut self, id: &SandboxId, error: Error) -> Error {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return error };
        let blamed = match error.fields.get("resource") {
            Some("slot") => Some(NETWORK),
            Some("overlay") => Some(STORAGE),
            Some("worker" | "uid") => Some(ALLOCATE),
            _ => None,
        };
        sandbox.trace.fail(blamed, &error);
        let failed = sandbox.trace.summary().get("failed").map(str::to_string);
        let failure = FailedCreate { id: id.clone(), owner: sandbox.owner.clone(), trace: sandbox.trace.clone() };
        self.failed_creates.truncate(FAILED_KEPT - 1);
        self.failed_creates.push_front(failure);
        failed.into_iter().fold(error, |error, span| error.with("span", span))
    }

    /// `sandbox.trace`
    pub(super) fn ask_trace(&mut self, key: u64, tag: &str, given: &str, exec: Option<u64>) -> Result<(), Error> {
        let found = self.find(key, given);
        let trace = match (&found, exec) {
            (Ok(id), None) => self.sandboxes.get(id).map(|sandbox| sandbox.trace.clone()),
            (Ok(id), Some(number)) => {
                let exec = self.sandboxes.get(id).and_then(|sandbox| sandbox.execs.get(&number));
                let missing = || Error::new(Code::NotFound, format!("sandbox {id} has no exec {number}"));
                Some(exec.ok_or_else(|| missing().with("exec", number))?.trace.clone())
            }
            (Err(_), None) => {
                let only = self.only_owner(key);
                let mine = |failed: &&FailedCreate| only.as_ref().is_none_or(|owner| *owner == failed.owner);
                let failed = self.failed_creates.iter().filter(mine).find(|failed| failed.id.as_str() == given);
                failed.map(|failed| failed.trace.clone())
            }
            (Err(_), Some(_)) => None,
        };
        let Some(trace) = trace else { return found.map(drop) };
        trace.rows().for_each(|row| self.answer(key, &Message::item(tag, row)));
        let id = found.map_or_else(|_| given.to_string(), |id| id.to_string());
        let fields = Fields::new().with("id", id);
        let fields = exec.iter().fold(fields, |fields, number| fields.with("exec", number));
        let summary = trace.summary().0.into_iter();
        let fields = summary.fold(fields, |mut fields, field| {
            fields.0.push(field);
            fields
        });
        self.answer(key, &Message::ok(tag, fields));
        Ok(())
    }
}
