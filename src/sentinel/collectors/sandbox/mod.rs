//! `sandbox`: what this node's sandboxes use. The supervisor is asked on its control socket, as any client asks it: it adds
//! what the kernel counts for a sandbox's cgroup and what its worker and guest say.
//!
//! A worker runs hostile code and may not answer; it costs the run no more than the supervisor's own limit of a few
//! seconds, and its sandbox only. Asking blocks, so a run is a job of the pool.

mod rows;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use super::{checked, manifest};
use crate::cli::client::{Call, Client};
use crate::sentinel::collect::{Cancelled, Finished, Gatherer, Io, Plan, Run, Service};
use crate::sentinel::model::Kind;
use crate::sentinel::plugin::{FieldError, Manifest};
use crate::sentinel::schedule::RunId;
use crate::sentinel::task::Task;
use crate::wire::{Error, Fields, Request};

/// Sandboxes asked for at once: the supervisor, their workers and guests have other work too.
const AT_ONCE: usize = 32;

/// The service.
pub struct Sandboxes {
    manifest: Manifest,
}

/// What one task measures.
#[derive(Clone)]
struct SandboxPlan {
    socket: PathBuf,
    labels: Vec<String>,
    most: usize,
}

impl Sandboxes {
    /// The service.
    #[allow(clippy::new_without_default)] // like the others, whose `new` takes something
    pub fn new() -> Self {
        Self { manifest: manifest("sandbox") }
    }
}

impl Service for Sandboxes {
    fn prepare(&mut self, task: &Task) -> Result<Plan, FieldError> {
        let (device, config) = checked(&self.manifest, task)?;
        Ok(Arc::new(SandboxPlan {
            socket: device.text("socket").into(),
            labels: config.texts("labels").into_iter().map(str::to_string).collect(),
            most: config.whole("sandboxes"),
        }))
    }

    fn begin(&mut self, run: Run, io: &mut Io<'_>) {
        let Some(plan) = run.plan::<SandboxPlan>().cloned() else { return };
        let (table, task, started_ms, deadline) =
            (Arc::clone(io.table), Arc::clone(&run.task), run.started_ms, run.deadline);
        io.work(
            run.id,
            Box::new(move || {
                let mut out = Gatherer::new(&table, &task.labels, started_ms);
                let error = plan.measure(&mut out, deadline).err().map(|e| e.to_string());
                out.gauge("warren_up", f64::from(u8::from(error.is_none())));
                Finished { gathered: out.done(), error }
            }),
        );
    }

    fn cancel(&mut self, run: RunId, io: &mut Io<'_>) -> Cancelled {
        if io.unwork(run) { Cancelled::Gone(Finished::failure("no thread was free")) } else { Cancelled::Held }
    }
}

impl SandboxPlan {
    fn measure(&self, out: &mut Gatherer<'_>, deadline: Instant) -> Result<(), Error> {
        let mut client = Client::connect(&self.socket)?;
        let mut ask = |request: Request| {
            let call = client.start(request)?;
            client.wait(&call, Some(deadline))
        };
        rows::node(&ask(Request::new("", "node.info"))?.fields, out);
        let sandboxes = ask(Request::new("", "sandbox.list"))?.items;
        rows::states(&sandboxes, out);
        let running: Vec<Fields> =
            sandboxes.into_iter().filter(|row| row.get("state") == Some("running")).take(self.most).collect();
        let mut under_way: VecDeque<(&Fields, Call)> = VecDeque::new();
        let mut unanswered = 0u64;
        let mut rest = running.iter();
        loop {
            while under_way.len() < AT_ONCE
                && let Some(sandbox) = rest.next()
            {
                let Some(id) = sandbox.get("id") else { continue };
                under_way.push_back((sandbox, client.start(Request::new("", "sandbox.stats").arg(id))?));
            }
            let Some((sandbox, call)) = under_way.pop_front() else { break };
            match client.wait(&call, Some(deadline)) {
                Ok(reply) => rows::sandbox(sandbox, &self.labels, &reply, out),
                // It has ended since, or its worker does not answer: the others are measured all the same.
                Err(error) if node_said(&error) => unanswered += 1,
                Err(error) => return Err(error),
            }
        }
        out.add::<&str, &str>("warren_sandboxes_unanswered", Kind::Gauge, &[], unanswered as f64);
        Ok(())
    }
}

/// Whether an error is the node's answer, not the end of the connection or of the time.
fn node_said(error: &Error) -> bool {
    use crate::cli::client::{CLIENT_TIMEOUT, CONNECTION_LOST, PROTOCOL_ERROR};
    ![CLIENT_TIMEOUT, CONNECTION_LOST, PROTOCOL_ERROR].contains(&&*error.code)
}

#[cfg(test)]
mod tests;
