//! Sandboxes that ran on without a supervisor: their agents are met before clients are.
//!
//! A client's first request to the next supervisor may be for such a sandbox. Until its agent has said which programs run
//! there is nobody to ask, so that the control socket and the control port wait for the agents, but not for long: any of
//! them may be a hostile guest's that never says a word.

use std::collections::BTreeSet;
use std::time::Duration;

use super::supervisor::{Supervisor, Timer};
use crate::sandbox::id::SandboxId;

/// How long clients wait for agents. One on a busy node has a few milliseconds to do.
const PATIENCE: Duration = Duration::from_secs(5);

/// Whose agents have not been met.
#[derive(Debug, Default)]
pub(super) struct Meeting {
    strangers: BTreeSet<SandboxId>,
    /// There is a socket that clients may be waiting at.
    clients_wait: bool,
}

impl Meeting {
    /// A sandbox runs on.
    pub(super) fn expect(&mut self, id: &SandboxId) {
        self.strangers.insert(id.clone());
    }

    /// Whether clients may be taken.
    pub(super) fn is_over(&self) -> bool {
        self.strangers.is_empty()
    }
}

impl Supervisor {
    /// The control socket is there: clients are taken from now on, or once the agents are met.
    pub(super) fn receive_clients(&mut self) {
        self.meeting.clients_wait = true;
        if self.meeting.is_over() {
            self.open_door();
        } else {
            self.timers.after(PATIENCE, Timer::Meeting);
        }
    }

    /// An agent has said what runs, or will not.
    pub(super) fn met(&mut self, id: &SandboxId) {
        if self.meeting.strangers.remove(id) && self.meeting.is_over() {
            self.open_door();
        }
    }

    /// The agents have had their time.
    pub(super) fn meeting_expired(&mut self) {
        let strangers = std::mem::take(&mut self.meeting.strangers);
        if strangers.is_empty() {
            return;
        }
        for id in strangers {
            log::warn!("sandbox {id}: its agent has said nothing in {} s; it is not waited for", PATIENCE.as_secs());
        }
        self.open_door();
    }

    fn open_door(&mut self) {
        if std::mem::take(&mut self.meeting.clients_wait) && self.stopping.is_none() {
            self.accept();
            self.open_port();
        }
    }
}
