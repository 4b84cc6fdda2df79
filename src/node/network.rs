//! Sandboxes and their network slots: asked for before a sandbox is made, given back when its worker has ended.

use super::components::Progress;
use super::instance::Sandbox;
use super::requests::Job;
use super::supervisor::{Done, Supervisor};
use crate::network::policy::Policy;
use crate::network::{Adopted, Network, NetworkError, Report};
use crate::sandbox::id::SandboxId;
use crate::sandbox::ledger::Resource;
use crate::sandbox::lifecycle::State;
use crate::sandbox::network;
use crate::wire::{Code, Error, Fields, Message, Request};

/// A client's change of a sandbox's network under way.
#[derive(Debug)]
pub(super) struct NetworkChange {
    sandbox: SandboxId,
    policy: Policy,
    /// The client and the tag of its request; `None` when it no longer wants the answer.
    waiter: Option<(u64, String)>,
}

pub(super) fn to_error(error: &NetworkError) -> Error {
    let code = match error {
        NetworkError::Exhausted { .. } | NetworkError::Tap(_) => Code::NoCapacity,
        NetworkError::Kernel(_) => Code::Internal,
        NetworkError::Unknown => Code::BadState,
    };
    let shown = Error::new(code, error.to_string());
    match error {
        NetworkError::Exhausted { max, .. } => shown.with("resource", "slot").with("max", max),
        NetworkError::Kernel(error) => shown.with("errno", format!("{:?}", error.errno)),
        NetworkError::Tap(_) => shown.with("resource", "slot"),
        NetworkError::Unknown => shown,
    }
}

impl Supervisor {
    /// Starts the network, with the slots of the sandboxes that were taken over.
    pub(super) fn start_network(&mut self) {
        let running = self.sandboxes.values().filter(|sandbox| sandbox.worker.is_some());
        let adopted = running.filter_map(|sandbox| {
            let number = sandbox.slot.as_ref()?.number;
            Some(Adopted { owner: sandbox.id.to_string(), number, policy: sandbox.spec.network.clone()? })
        });
        let adopted: Vec<Adopted> = adopted.collect();
        let done = self.background.reporter();
        match Network::start(self.network_settings.clone(), adopted, move |report| done(Done::Network(report))) {
            Ok(network) => self.network = Some(network),
            Err(e) => log::error!("no thread for the network: {e}"),
        }
    }

    /// The network's thread ends. Slots in use stay.
    pub(super) fn stop_network(&mut self) -> Result<Progress, String> {
        let Some(network) = &self.network else { return Ok(Progress::Done) };
        network.end();
        if !network.has_ended() {
            return Ok(Progress::Waits("its thread".to_string()));
        }
        self.network = None;
        Ok(Progress::Done)
    }

    /// Sees to it that a sandbox that is to have a network has its slot. `false` when that is still to come.
    pub(super) fn has_slot(&mut self, id: &SandboxId) -> Result<bool, Error> {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return Ok(true) };
        let Some(policy) = sandbox.spec.network.clone() else { return Ok(true) };
        if sandbox.slot.is_some() {
            return Ok(true);
        }
        let Some(network) = &self.network else {
            return Err(Error::new(Code::NoCapacity, "the network could not be started on this node"));
        };
        if !std::mem::replace(&mut sandbox.holds_slot, true) {
            network.lease(id.as_str(), policy);
        }
        Ok(false)
    }

    /// The network did something.
    pub(super) fn network_reported(&mut self, report: Report) {
        match report {
            Report::Leased { owner, result } => {
                let Some(id) = SandboxId::parse(&owner) else { return };
                let Some(sandbox) = self.sandboxes.get_mut(&id) else { return };
                if !sandbox.holds_slot || sandbox.removing {
                    // It is being given back.
                    return;
                }
                let scheduled = match result {
                    Ok(lease) => {
                        let number = lease.slot.number;
                        self.ledger.taken(&id, &[Resource::Slot]);
                        self.ledger.with(&id, |account| {
                            account.note(Resource::Slot, number);
                            Ok(())
                        });
                        sandbox.slot = Some(lease.slot);
                        sandbox.tap = Some(lease.tap);
                        self.schedule(&id)
                    }
                    Err(error) => {
                        sandbox.holds_slot = false;
                        Err(to_error(&error))
                    }
                };
                if let Err(error) = scheduled {
                    self.fail_start(&id, error);
                }
            }
            Report::Changed { ticket, result, .. } => self.network_changed(ticket, result),
            Report::Released { owner } => {
                if let Some(id) = SandboxId::parse(&owner) {
                    self.slot_released(&id);
                }
            }
            Report::Checked { ticket, result } => self.network_checked(ticket, result),
            Report::Reclaimed { count } => {
                self.ledger.reclaimed += count as u64;
                log::warn!("reclaimed {count} network interfaces of an earlier run");
            }
        }
    }

    /// Asks for another policy of a running sandbox; its client is answered when that holds.
    pub(super) fn ask_network(&mut self, key: u64, tag: &str, id: &SandboxId, policy: Policy) -> Result<(), Error> {
        let Some(sandbox) = self.sandboxes.get(id) else { return Ok(()) };
        if sandbox.state != State::Running {
            let error = Error::new(Code::BadState, format!("sandbox {id} is {}, not running", sandbox.state));
            return Err(error.with("state", sandbox.state));
        }
        let (Some(network), Some(_)) = (&self.network, &sandbox.slot) else {
            if policy == Policy::off() {
                let fields = network::fields(None, Fields::new().with("id", id));
                self.answer(key, &Message::ok(tag, fields));
                return Ok(());
            }
            let message = format!("sandbox {id} was created without a network: it has no network device");
            return Err(Error::new(Code::BadState, message).with("state", sandbox.state));
        };
        self.last_ticket += 1;
        let ticket = self.last_ticket;
        network.change(id.as_str(), policy.clone(), ticket);
        let waiter = Some((key, tag.to_string()));
        self.network_changes.insert(ticket, NetworkChange { sandbox: id.clone(), policy, waiter });
        self.add_job(key, tag, Job::NetworkChange(ticket));
        Ok(())
    }

    /// A client no longer wants the answer; the change is made all the same.
    pub(super) fn forget_network_change(&mut self, ticket: u64) {
        if let Some(change) = self.network_changes.get_mut(&ticket) {
            change.waiter = None;
        }
    }

    fn network_changed(&mut self, ticket: u64, result: Result<usize, NetworkError>) {
        let Some(NetworkChange { sandbox: id, policy, waiter }) = self.network_changes.remove(&ticket) else { return };
        let answer = match result {
            Ok(cut) => {
                let fields = network::fields(Some(&policy), Fields::new().with("id", &id)).with("flows_cut", cut);
                if let Some(sandbox) = self.sandboxes.get_mut(&id) {
                    sandbox.spec.network = Some(policy);
                }
                self.record(&id);
                Ok(fields)
            }
            Err(error) => Err(to_error(&error).with("sandbox", &id)),
        };
        let Some((key, tag)) = waiter else { return };
        let message = match answer {
            Ok(fields) => Message::ok(&tag, fields),
            Err(error) => Message::err(&tag, error),
        };
        self.finish(key, &message);
    }
}

impl Sandbox {
    /// What the agent is told of the network.
    pub(super) fn configure_network(&self, request: Request, dns: &[String]) -> Request {
        let Some(slot) = &self.slot else { return request };
        let request = request
            .set("address", format!("{}/31", slot.guest))
            .set("gateway", slot.node)
            .set("mtu", crate::network::MTU);
        dns.iter().fold(request, |request, server| request.set("dns", server))
    }
}
