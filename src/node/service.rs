//! The node's part of the guest's own service: each agent is told who its sandbox is, and says what programs log.
//! docs/guest.md.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::json;

use super::instance::{Route, Sandbox};
use super::supervisor::{Supervisor, Timer, now_ms};
use crate::sandbox::id::SandboxId;
use crate::wire::{Message, Request};

/// How often a guest is allowed more.
const REFILL: Duration = Duration::from_secs(1);

impl Supervisor {
    /// Tells an agent who its sandbox is. To be said before its programs go on.
    pub(super) fn serve_guest(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let me = me(sandbox);
        let Some(worker) = &mut sandbox.worker else { return };
        let tag = worker.agent.request(Request::new("", "service.serve").set("me", me));
        worker.routes.insert(tag.clone(), Route::Service);
        sandbox.guest_log.begin(tag);
        self.touched_sandboxes.insert(id.clone());
    }

    /// An agent says what programs log. One of an earlier version refuses, and its sandbox has no such service.
    pub(super) fn guest_says(&mut self, id: &SandboxId, message: &Message) {
        let Message::Data { payload, .. } = message else { return };
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        if let Err(error) = sandbox.guest_log.take(&sandbox.home, id.as_str(), now_ms(), payload) {
            return self.agent_lost(id, error);
        }
        if !std::mem::replace(&mut sandbox.guest_log.refilling, true) {
            self.timers.after(REFILL, Timer::GuestLog(id.clone()));
        }
    }

    /// A second is over.
    pub(super) fn refill_guest_log(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let agent = sandbox.worker.as_mut().map(|worker| &mut worker.agent).filter(|agent| agent.is_ready());
        let Some((agent, (route, octets))) = agent.and_then(|agent| Some((agent, sandbox.guest_log.refill()?))) else {
            sandbox.guest_log.refilling = false;
            return;
        };
        agent.send(&Message::credit(route, "logs", octets));
        self.touched_sandboxes.insert(id.clone());
        self.timers.after(REFILL, Timer::GuestLog(id.clone()));
    }
}

/// What a sandbox hears of itself.
fn me(sandbox: &Sandbox) -> String {
    let labels: BTreeMap<&str, &str> =
        sandbox.spec.labels.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    let mut me = json!({ "id": sandbox.id.as_str(), "template": sandbox.spec.template, "metadata": labels });
    if let Some(name) = &sandbox.spec.name {
        me["name"] = json!(name);
    }
    me.to_string()
}
