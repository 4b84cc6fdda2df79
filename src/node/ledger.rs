//! The supervisor's ledger: accounts of what sandboxes hold, written down before it is taken and erased after it was given
//! back, and `node.ledger`, which compares them with the kernel.
//!
//! One row of the database holds all of a sandbox's resources. It is written before its home is made, with all that the
//! sandbox may come to have, so that a create that finds a worker ready waits for nothing. The row need not be on the medium
//! by then: a kill leaves what was written, and what a power cut leaves of a sandbox is its directory alone, which is found
//! without a record.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::time::Duration;

use super::finish::Extent;
use super::requests::Job;
use super::supervisor::{Done, Supervisor, Timer};
use crate::network::{Checked, NetworkError};
use crate::sandbox::census::{Census, Difference};
use crate::sandbox::home::Home;
use crate::sandbox::id::SandboxId;
use crate::sandbox::ledger::{Account, Holding, IllegalMove, OF_WORKER, Resource};
use crate::storage::snapshots::files::Listed;
use crate::storage::state::{AllocationRow, Change, StateError, Ticket};
use crate::wire::{Code, Error, Fields, Message};

/// Pause before the second look: a difference is one when it is there in both. What was on its way in the first is there,
/// or gone, by then.
const SECOND_LOOK: Duration = Duration::from_millis(200);

/// The accounts, and what is under way with them.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    accounts: BTreeMap<SandboxId, Account>,
    /// Homes that wait for their accounts to be in the database.
    bookings: HashMap<Ticket, Booking>,
    look: Option<Look>,
    /// Requests that came during a look: they get the next.
    waiting: Vec<(u64, String)>,
    /// What this supervisor took down because nobody had it.
    pub reclaimed: u64,
    /// What it found written down and nowhere else.
    pub vanished: u64,
}

/// A home that is made once its account is in the database.
#[derive(Debug, Clone)]
pub(super) struct Booking {
    /// The sandbox that is to have it, now or later.
    pub id: SandboxId,
    /// Its worker's place in the pool.
    pub place: u32,
    /// Its worker's user id.
    pub uid: u32,
    /// There is a sandbox that waits for it.
    pub ordered: bool,
}

/// A comparison under way.
#[derive(Debug, Default)]
struct Look {
    waiters: Vec<(u64, String)>,
    ticket: u64,
    census: Option<(Census, Listed)>,
    network: Option<Result<Checked, NetworkError>>,
    /// Of the first look, during the second.
    before: Option<BTreeSet<Difference>>,
}

impl Ledger {
    /// Opens an account.
    pub fn open(&mut self, id: &SandboxId, account: Account) {
        self.accounts.insert(id.clone(), account);
    }

    /// The account of a sandbox.
    pub fn of(&self, id: &SandboxId) -> Option<&Account> {
        self.accounts.get(id)
    }

    /// Changes an account, where there is one.
    pub fn with(&mut self, id: &SandboxId, change: impl FnOnce(&mut Account) -> Result<(), IllegalMove>) {
        if let Some(account) = self.accounts.get_mut(id)
            && let Err(refused) = change(account)
        {
            log::error!("ledger of sandbox {id}: {refused}");
        }
    }

    /// These were taken.
    pub fn taken(&mut self, id: &SandboxId, resources: &[Resource]) {
        self.with(id, |account| {
            let taken = resources.iter().filter(|resource| !account.holding(**resource).is_held());
            let taken: Vec<&Resource> = taken.collect();
            let moved = taken.into_iter().map(|resource| account.advance(*resource, Holding::Reserved));
            moved.collect::<Vec<_>>().into_iter().collect()
        });
    }

    /// A worker has ended; out of order, it is lost first.
    pub fn worker_ended(&mut self, id: &SandboxId, in_order: bool) {
        self.with(id, |account| {
            if !in_order && account.holding(Resource::Process) == Holding::Active {
                account.advance(Resource::Process, Holding::Error)?;
            }
            account.give_back(&[Resource::Process, Resource::Memory]);
            account.given_back(&[Resource::Process], true);
            Ok(())
        });
    }

    /// What an account has an entry for and is not free.
    pub fn rows(&self) -> impl Iterator<Item = Fields> {
        self.accounts.iter().flat_map(|(id, account)| {
            account.entries().iter().map(move |entry| {
                let fields = Fields::new().with("sandbox", id).with("resource", entry.resource);
                let fields = fields.with("state", entry.holding);
                entry.value.iter().fold(fields, |fields, value| fields.with("value", value))
            })
        })
    }
}

impl Extent {
    /// What of a sandbox is given back with it.
    pub(super) fn resources(self) -> Vec<Resource> {
        match self {
            Self::Worker => OF_WORKER.to_vec(),
            Self::AllButLogs => OF_WORKER.iter().copied().chain([Resource::Disk]).collect(),
            Self::Everything => Resource::ALL.to_vec(),
        }
    }
}

impl Supervisor {
    /// Opens the account of a home that is to be made, for a sandbox or for whichever comes, of all that a sandbox may
    /// have there. `booked` goes on.
    pub(super) fn book(&mut self, booking: Booking) {
        let id = booking.id.clone();
        // One that is started again has its directory and its disk.
        let kept =
            |resource: Resource| self.ledger.of(&id).and_then(|old| old.get(resource)).filter(|e| e.holding.is_held());
        let mut account = Account::of(
            Resource::ALL
                .iter()
                .map(|resource| (*resource, kept(*resource).map_or(Holding::Pending, |entry| entry.holding))),
        );
        let values = Resource::ALL.iter().filter_map(|resource| Some((*resource, kept(*resource)?.value?)));
        values.for_each(|(resource, value)| account.note(resource, value));
        account.note(Resource::User, booking.uid);
        self.ledger.open(&id, account);
        self.fit_account(&id);
        self.ledger.with(&id, |account| account.advance_all(Holding::Pending, Holding::Scheduled));
        if let Some(ticket) = self.post(&id) {
            self.ledger.bookings.insert(ticket, booking);
        }
    }

    /// A home has its sandbox: what that is not to have is no longer in the account.
    pub(super) fn fit_account(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get(id) else { return };
        let (memory, networked) = (sandbox.spec.memory_mib, sandbox.spec.network.is_some());
        self.ledger.with(id, |account| {
            account.note(Resource::Memory, memory);
            if !networked {
                account.strike(Resource::Slot);
            }
            Ok(())
        });
    }

    /// Whether a sandbox's account is in the database.
    pub(super) fn is_booked(&self, id: &SandboxId) -> bool {
        let account = self.ledger.of(id);
        account.is_some_and(|a| !matches!(a.holding(Resource::User), Holding::Pending | Holding::Scheduled))
    }

    /// An account is in the database, or was refused: its home is made, or is not. `false` when the ticket is another
    /// change's.
    pub(super) fn booked(&mut self, ticket: Ticket, result: &Result<(), StateError>) -> bool {
        let Some(booking) = self.ledger.bookings.remove(&ticket) else { return false };
        let Booking { id, place, uid, ordered } = booking.clone();
        let begun = match result {
            Ok(()) => {
                self.ledger.with(&id, |account| account.advance_all(Holding::Scheduled, Holding::Allocated));
                self.begin_worker(booking).map_err(|e| io::Error::other(format!("no thread: {e}")))
            }
            Err(error) => Err(io::Error::other(format!("the ledger cannot be written: {error}"))),
        };
        match begun {
            // The slot may be asked for as well.
            Ok(()) if self.sandboxes.get(&id).is_some_and(|sandbox| !sandbox.removing) => self.schedule_or_fail(&id),
            Ok(()) => {}
            Err(error) => self.worker_made(&id, (place, uid), ordered, Err(error)),
        }
        true
    }

    /// Writes a sandbox's account as it is.
    pub(super) fn post(&mut self, id: &SandboxId) -> Option<Ticket> {
        let row = AllocationRow { sandbox_id: id.to_string(), held: self.ledger.of(id)?.to_text() };
        Some(self.database.submit(Change::PutAllocation(row)))
    }

    /// Nothing of a sandbox is left: its account goes.
    pub(super) fn close_account(&mut self, id: &SandboxId) {
        if self.ledger.accounts.remove(id).is_some() {
            self.database.submit(Change::RemoveAllocation { sandbox_id: id.to_string() });
        }
    }

    /// The account of a sandbox that an earlier supervisor left, by what is there of it. What the record has beside that
    /// is counted.
    pub(super) fn take_over_account(&mut self, id: &SandboxId, recorded: Option<&Account>, runs: bool) {
        let Some(sandbox) = self.sandboxes.get(id) else { return };
        let home = &sandbox.home;
        let slot = sandbox.slot.as_ref().map(|slot| slot.number);
        let account = standing(home, recorded, runs, sandbox.spec.memory_mib.into(), slot);
        let lost = recorded.map_or(0, |recorded| {
            recorded.entries().iter().filter(|e| e.holding.is_held() && !account.holding(e.resource).is_held()).count()
        });
        self.ledger.vanished += lost as u64;
        self.ledger.open(id, account);
        self.post(id);
    }

    /// Answers `node.ledger`.
    pub(super) fn ask_ledger(&mut self, key: u64, tag: &str, all: bool) {
        if all {
            let rows: Vec<Fields> = self.ledger.rows().collect();
            let count = rows.len();
            for row in rows {
                self.answer(key, &Message::item(tag, row));
            }
            self.answer(key, &Message::ok(tag, Fields::new().with("entries", count)));
            return;
        }
        self.add_job(key, tag, Job::Ledger);
        self.ledger.waiting.push((key, tag.to_string()));
        self.next_look();
    }

    /// Begins a comparison for all who wait for one, unless one is under way.
    fn next_look(&mut self) {
        if self.ledger.look.is_some() || self.ledger.waiting.is_empty() {
            return;
        }
        self.ledger.look = Some(Look { waiters: std::mem::take(&mut self.ledger.waiting), ..Look::default() });
        self.look();
    }

    /// Reads the kernel, off the loop.
    pub(super) fn look(&mut self) {
        self.last_ticket += 1;
        let ticket = self.last_ticket;
        let Some(look) = &mut self.ledger.look else { return };
        (look.ticket, look.census, look.network) = (ticket, None, None);
        match &self.network {
            Some(network) => network.check(ticket),
            None => look.network = Some(Ok(Checked::default())),
        }
        let (places, users) = (self.places.clone(), self.config.jail.uids());
        let spares = self.pools.directory().to_path_buf();
        let shelves = self.snapshots.shelves.clone();
        let work = move || Done::Counted(Census::take(&places, &spares, &users), shelves.list());
        if let Err(e) = self.background.run("ledger", work) {
            let error = Error::new(Code::NoCapacity, format!("no thread: {e}"));
            self.end_look(Err(error));
        }
    }

    /// The kernel's part but for the network was read.
    pub(super) fn counted(&mut self, census: Census, listed: io::Result<Listed>) {
        let listed = match listed {
            Ok(listed) => listed,
            Err(e) => return self.end_look(Err(Error::new(Code::Internal, format!("files of snapshots: {e}")))),
        };
        if let Some(look) = &mut self.ledger.look {
            look.census = Some((census, listed));
        }
        self.compare();
    }

    /// The network's part was read and compared.
    pub(super) fn network_checked(&mut self, ticket: u64, result: Result<Checked, NetworkError>) {
        if let Some(look) = self.ledger.look.as_mut().filter(|look| look.ticket == ticket) {
            look.network = Some(result);
        }
        self.compare();
    }

    fn compare(&mut self) {
        let Some(look) = &mut self.ledger.look else { return };
        if look.census.is_none() || look.network.is_none() {
            return;
        }
        let (Some((census, listed)), Some(network)) = (look.census.take(), look.network.take()) else { return };
        let checked = match network {
            Ok(checked) => checked,
            Err(error) => return self.end_look(Err(super::network::to_error(&error))),
        };
        let accounts = &self.ledger.accounts;
        let mut found = census.differences(accounts.iter().map(|(id, account)| (id.as_str(), account)), &self.places);
        let mut spares: BTreeSet<String> = self.pools.spare_overlays().collect();
        spares.extend(self.sandboxes.values().filter_map(|sandbox| sandbox.held.spare_overlay()));
        found.extend(census.spare_differences(&spares));
        found.extend(slots(accounts, &checked));
        found.extend(self.snapshots.differences(&listed));
        let Some(look) = &mut self.ledger.look else { return };
        match look.before.take() {
            None if !found.is_empty() => {
                look.before = Some(found);
                self.timers.after(SECOND_LOOK, Timer::Look);
            }
            before => {
                let both = before.map_or(found.clone(), |before| before.intersection(&found).cloned().collect());
                self.end_look(Ok(both));
            }
        }
    }

    fn end_look(&mut self, result: Result<BTreeSet<Difference>, Error>) {
        let Some(look) = self.ledger.look.take() else { return };
        let counts = Fields::new().with("reclaimed", self.ledger.reclaimed).with("vanished", self.ledger.vanished);
        let entries: usize = self.ledger.accounts.values().map(|account| account.entries().len()).sum();
        let counts = counts.with("entries", entries);
        for (key, tag) in look.waiters {
            if !self.clients.get(&key).is_some_and(|client| matches!(client.jobs.get(&tag), Some(Job::Ledger))) {
                continue; // it no longer wants the answer
            }
            match &result {
                Ok(differences) => {
                    for difference in differences {
                        self.answer(key, &Message::item(&tag, fields(difference)));
                    }
                    let end = Fields::new().with("differences", differences.len());
                    let end = Fields(end.0.into_iter().chain(counts.0.clone()).collect());
                    self.finish(key, &Message::ok(&tag, end));
                }
                Err(error) => self.finish(key, &Message::err(&tag, error.clone())),
            }
        }
        self.next_look();
    }
}

/// The account of a sandbox whose supervisor is gone. A worker's things are its own while it runs, and being given back
/// when it does not.
fn standing(home: &Home, recorded: Option<&Account>, runs: bool, memory_mib: u64, slot: Option<u32>) -> Account {
    let resources = Resource::ALL.iter().filter(|resource| **resource != Resource::Slot || slot.is_some());
    let held = |resource: &Resource| match resource {
        Resource::Directory => home.is_there(),
        Resource::Disk => !home.overlays().is_empty(),
        _ => runs,
    };
    let leftovers = home.holds_worker();
    let words = resources.map(|resource| {
        let holding = match held(resource) {
            true => Holding::Active,
            false if leftovers && OF_WORKER.contains(resource) => Holding::Releasing,
            false => Holding::Released,
        };
        (*resource, holding)
    });
    let mut account = Account::of(words);
    account.note(Resource::Memory, memory_mib);
    for entry in recorded.iter().flat_map(|recorded| recorded.entries()) {
        if let Some(value) = entry.value {
            account.note(entry.resource, value);
        }
    }
    slot.iter().for_each(|number| account.note(Resource::Slot, *number));
    account
}

/// Where the accounts and the network's books differ, and where these and the kernel do.
fn slots(accounts: &BTreeMap<SandboxId, Account>, checked: &Checked) -> BTreeSet<Difference> {
    let entry_of = |owner: &str| accounts.get(&SandboxId::parse(owner)?)?.get(Resource::Slot);
    let difference = |owner: Option<&str>, name: String, record: String, kernel: String| Difference {
        sandbox: owner.map(str::to_string),
        resource: Resource::Slot.to_string(),
        name,
        record,
        kernel,
    };
    let mut all = BTreeSet::new();
    let held: BTreeMap<&str, u32> = checked.held.iter().map(|(owner, number)| (owner.as_str(), *number)).collect();
    for (owner, number) in &held {
        let entry = entry_of(owner);
        let record = entry.map_or("none", |entry| entry.holding.as_str());
        let other =
            entry.is_some_and(|e| e.holding.is_held() && e.value.is_some_and(|value| value != u64::from(*number)));
        if other || entry.is_none_or(|entry| entry.holding.is_free()) {
            all.insert(difference(Some(owner), number.to_string(), record.to_string(), "present".to_string()));
        }
    }
    for (id, account) in accounts {
        let Some(entry) = account.get(Resource::Slot) else { continue };
        let missing = entry.holding.is_held() && !held.contains_key(id.as_str());
        if missing || entry.holding == Holding::Error {
            let name = entry.value.map(|value| value.to_string()).unwrap_or_default();
            all.insert(difference(Some(id.as_str()), name, entry.holding.to_string(), "absent".to_string()));
        }
    }
    for found in &checked.differences {
        let owner = found.owner.as_deref();
        // While it is on its way it may be there or not.
        if owner.and_then(entry_of).is_some_and(|entry| !entry.holding.is_held()) {
            continue;
        }
        let (record, kernel) = if found.recorded { ("active", "absent") } else { ("none", "present") };
        all.insert(difference(owner, found.name.clone(), record.to_string(), kernel.to_string()));
    }
    all
}

fn fields(difference: &Difference) -> Fields {
    let fields = difference.sandbox.iter().fold(Fields::new(), |fields, id| fields.with("sandbox", id));
    fields
        .with("resource", &difference.resource)
        .with("name", &difference.name)
        .with("record", &difference.record)
        .with("kernel", &difference.kernel)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::check;

    fn accounts(text: &str) -> BTreeMap<SandboxId, Account> {
        BTreeMap::from([(SandboxId::parse("abcdefghijkl").unwrap(), Account::parse(text).unwrap())])
    }

    fn found(text: &str, held: &[(&str, u32)], differences: &[check::Difference]) -> Vec<String> {
        let checked = Checked {
            held: held.iter().map(|(owner, number)| ((*owner).to_string(), *number)).collect(),
            differences: differences.iter().cloned().collect(),
        };
        let all = slots(&accounts(text), &checked);
        all.iter().map(|d| format!("{} {} {}", d.name, d.record, d.kernel)).collect()
    }

    #[test]
    fn a_slot_is_in_the_account_of_who_has_it() {
        let owner = "abcdefghijkl";
        assert_eq!(found("slot=active:3", &[(owner, 3)], &[]), Vec::<String>::new());
        assert_eq!(found("slot=allocated", &[(owner, 3)], &[]), Vec::<String>::new());
        assert_eq!(found("slot=releasing:3", &[], &[]), Vec::<String>::new());
        assert_eq!(found("slot=active:3", &[(owner, 4)], &[]), ["4 active present"]);
        assert_eq!(found("slot=active:3", &[], &[]), ["3 active absent"]);
        assert_eq!(found("slot=error:3", &[], &[]), ["3 error absent"]);
        assert_eq!(found("slot=released:3", &[(owner, 3)], &[]), ["3 released present"]);
        assert_eq!(found("cgroup=active", &[(owner, 3)], &[]), ["3 none present"]);
        assert_eq!(found("", &[("zbcdefghijkl", 3)], &[]), ["3 none present"]);
    }

    #[test]
    fn what_the_kernel_lacks_of_a_slot_on_its_way_is_no_difference() {
        let owner = || Some("abcdefghijkl".to_string());
        let lost = check::Difference { owner: owner(), name: "interface wt3".to_string(), recorded: true };
        let stray = check::Difference { owner: None, name: "chain slot9".to_string(), recorded: false };
        let both = [lost, stray];
        let held = [("abcdefghijkl", 3)];
        assert_eq!(found("slot=releasing:3", &held, &both), ["chain slot9 none present"]);
        assert_eq!(found("slot=active:3", &held, &both), ["chain slot9 none present", "interface wt3 active absent"]);
    }
}
