//! Snapshots on the node: what there is of them, who sees it, how they go, and what becomes of what an earlier supervisor
//! left half done. How they are made: `checkpoint`; what they are for: `fork`, `rollback`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io;
use std::time::Duration;

use super::checkpoint::Making;
use super::exchange::Arrivals;
use super::faults::{self, Point};
use super::flattening::Flattening;
use super::merging::Merging;
use super::requests::choose;
use super::sealing::Seals;
use super::supervisor::{Done, Supervisor, Timer, now_ms};
use crate::sandbox::census::Difference;
use crate::sandbox::home::{Home, Places};
use crate::sandbox::id::SandboxId;
use crate::sandbox::worker;
use crate::storage::memory_file;
use crate::storage::snapshots::files::{self, FaultPoint, Listed, OVERLAY, Owner};
use crate::storage::snapshots::retention;
use crate::storage::snapshots::store::Garbage;
use crate::storage::snapshots::{Holding, Shelves, SnapshotKind, SnapshotRow, SnapshotState, Store};
use crate::storage::state::{Change, LayerRow, SandboxRow, Snapshot as Rows, StateError, Ticket};
use crate::storage::verity;
use crate::wire::{Code, Error, Fields, Message};

/// Pause before a change is asked for again that the database refused.
pub(super) const AGAIN: Duration = Duration::from_secs(5);

/// How often snapshots are looked at for their age.
pub(super) const RETENTION: Duration = Duration::from_secs(3600);

/// The node's snapshots.
#[derive(Debug)]
pub(super) struct Snapshots {
    pub store: Store,
    pub shelves: Shelves,
    /// What is sealed of them.
    pub seals: Seals,
    /// Templates' snapshots that no sandbox of this node can start from, as one has found.
    pub unfit: BTreeSet<String>,
    /// How often files are being removed whose rows are gone.
    pub clearing: usize,
    /// The merge of layers that is under way.
    pub merging: Option<Merging>,
    /// Memory that is being made whole.
    pub flattening: Flattening,
    /// Those that clients send.
    pub arriving: Arrivals,
    /// Those that are being made, by id.
    pub making: BTreeMap<String, Making>,
    /// What goes on when a change is in the database.
    tickets: HashMap<Ticket, Then>,
    /// Files without a row are to be looked for once nothing is being made.
    sweep: bool,
    /// Those of which it was asked what their guests change at once.
    pub learned: BTreeSet<String>,
    /// Sandboxes that a supervisor before this one was taking a snapshot of.
    pub interrupted: BTreeSet<SandboxId>,
}

/// What a change in the database was for.
#[derive(Debug)]
pub(super) enum Then {
    /// The row of a snapshot that is to be made.
    Begun(String),
    /// A snapshot is made, or its disk's half is.
    Committed(String),
    /// A sandbox is about to go back to a snapshot.
    RolledBack(SandboxId),
    /// It is there.
    Returned(SandboxId),
    /// Nobody sees a snapshot any more: who asked for that.
    Removed { client: u64, tag: String, id: String },
    /// Rows that nobody needed are gone.
    Collected(Garbage),
    /// A snapshot that a client sent is one.
    Imported { client: u64, tag: String, snapshot: String },
    /// Layers were merged.
    Merged,
    /// The memory of a snapshot is whole.
    Flattened(String),
    /// What an earlier supervisor left half done is settled.
    Recovered,
}

impl Snapshots {
    /// None yet: `recover` brings them in.
    pub fn new(places: &Places) -> Self {
        Self {
            store: Store::default(),
            shelves: Shelves::beside(&places.disks),
            seals: Seals::default(),
            unfit: BTreeSet::new(),
            clearing: 0,
            merging: None,
            flattening: Flattening::default(),
            arriving: Arrivals::new(),
            making: BTreeMap::new(),
            tickets: HashMap::new(),
            sweep: false,
            learned: BTreeSet::new(),
            interrupted: BTreeSet::new(),
        }
    }

    /// Goes on when that change is in the database.
    pub fn after(&mut self, ticket: Ticket, then: Then) {
        self.tickets.insert(ticket, then);
    }

    /// State and memory of a snapshot, for reading. A memory file of another length than the row has it, another than
    /// the one that was sealed, or one that is a difference is an error.
    pub fn open(&self, id: &str) -> io::Result<(File, File)> {
        let row = self.store.snapshot(id).ok_or(io::ErrorKind::NotFound)?;
        if row.memory_below.is_some() {
            return Err(io::Error::other("its memory is a difference to that of another"));
        }
        let (state, memory) = self.shelves.open(id)?;
        let seal = match &row.memory_seal {
            None => None,
            Some(text) => Some(verity::of_hex(text).ok_or_else(|| io::Error::other("its seal is no digest"))?),
        };
        memory_file::check(&memory, row.memory_bytes, seal.as_ref()).map_err(io::Error::other)?;
        Ok((state, memory))
    }

    /// Where rows and files differ. What is being made or removed does not.
    pub fn differences(&self, found: &Listed) -> BTreeSet<Difference> {
        let difference = |resource: &str, name: String, record: &str, kernel: &str| Difference {
            sandbox: None,
            resource: resource.to_string(),
            name,
            record: record.to_string(),
            kernel: kernel.to_string(),
        };
        let arrives = |id: &str| self.arriving.keys().any(|key| id.split('-').next() == Some(key));
        let settled = self.clearing == 0;
        let mut all = BTreeSet::new();
        for row in self.store.snapshots().filter(|row| row.state != SnapshotState::Making) {
            let memory = if row.memory_below.is_some() { "difference" } else { "memory" };
            let files = ["state", memory].map(|file| format!("{}/{file}", row.id)).into_iter();
            let missing = files.filter(|name| !found.snapshots.contains(name));
            all.extend(missing.map(|name| difference("snapshot", name, row.state.word(), "absent")));
        }
        let strays = found.snapshots.iter().filter(|name| {
            let id = name.split('/').next().unwrap_or_default();
            settled && self.store.snapshot(id).is_none() && !arrives(id)
        });
        all.extend(strays.map(|name| difference("snapshot", name.clone(), "none", "present")));
        let missing = self.store.layers().filter(|row| !found.layers.contains(&row.id));
        all.extend(missing.map(|row| difference("layer", row.id.clone(), "ready", "absent")));
        let coming: BTreeSet<&str> =
            self.making.keys().filter_map(|id| self.store.snapshot(id)?.layer.as_deref()).collect();
        let strays = found.layers.iter().filter(|id| {
            let merged = self.merging.as_ref().is_some_and(|merging| merging.layer == **id);
            settled && self.store.layer(id).is_none() && !coming.contains(id.as_str()) && !merged && !arrives(id)
        });
        all.extend(strays.map(|id| difference("layer", id.clone(), "none", "present")));
        all
    }

    /// A snapshot that can be used.
    pub fn ready(&self, id: &str) -> Result<&SnapshotRow, Error> {
        let row = self.store.snapshot(id).filter(|row| row.state == SnapshotState::Ready);
        row.ok_or_else(|| Error::new(Code::NotFound, format!("no snapshot {id}")).with("snapshot", id))
    }
}

impl Supervisor {
    /// Settles what an earlier supervisor left half done, and gives the sandboxes' rows as they are then. Before sandboxes
    /// are taken over.
    pub(super) fn recover_snapshots(&mut self, rows: &Rows) -> Vec<SandboxRow> {
        let mut sandboxes = rows.sandboxes.clone();
        if let Err(e) = self.snapshots.shelves.prepare() {
            log::error!("snapshots cannot be kept: {e}");
        }
        let holdings = sandboxes
            .iter()
            .map(|row| (row.id.clone(), Holding { layer: row.layer.clone(), snapshot: row.snapshot.clone() }));
        self.snapshots.store = Store::new(rows.snapshots.clone(), rows.layers.clone(), holdings);
        let interrupted = self.snapshots.store.interrupted();
        let interrupted = interrupted.iter().filter_map(|row| SandboxId::parse(row.sandbox.as_deref()?));
        self.snapshots.interrupted = interrupted.collect();
        let owners = self.owners(&sandboxes);
        let mut changes =
            match files::recover(&self.snapshots.store, &owners, &self.snapshots.shelves, &mut faults::storage) {
                Ok(changes) => changes,
                Err(e) => {
                    log::error!("snapshots that were being made cannot be settled: {e}");
                    return sandboxes;
                }
            };
        // What was made for one purpose has none without whoever wanted it.
        let passing = |row: &&SnapshotRow| matches!(row.kind, SnapshotKind::Export | SnapshotKind::Fork);
        let passing = self.snapshots.store.snapshots().filter(passing).filter(|row| row.state == SnapshotState::Ready);
        changes.extend(passing.filter_map(|row| files::removal(&self.snapshots.store, &row.id)).collect::<Vec<_>>());
        for change in &changes {
            self.take_change(change, &mut sandboxes);
        }
        self.snapshots.sweep = true;
        let ticket = self.database.submit_durable(Change::Together(changes));
        self.snapshots.after(ticket, Then::Recovered);
        sandboxes
    }

    /// What a change of recovery's means for what is in memory.
    fn take_change(&mut self, change: &Change, sandboxes: &mut [SandboxRow]) {
        let store = &mut self.snapshots.store;
        match change {
            Change::RemoveSnapshot { id } => {
                log::warn!("snapshot {id} was being made when the supervisor before this one ended: it is none");
                store.remove_snapshot(id);
            }
            Change::PutSnapshot(row) => store.put_snapshot((**row).clone()),
            Change::PutLayer(row) => store.put_layer(row.clone()),
            Change::Rebase { id, layer, snapshot, overlay } => {
                store.hold(id, Holding { layer: layer.clone(), snapshot: snapshot.clone() });
                if let Some(row) = sandboxes.iter_mut().find(|row| row.id == *id) {
                    (row.layer, row.overlay) = (layer.clone(), overlay.clone());
                }
            }
            _ => {}
        }
    }

    /// The sandboxes that have a directory; of those a snapshot was being made of, also what their workers say.
    fn owners(&self, rows: &[SandboxRow]) -> BTreeMap<String, Owner> {
        let interrupted = self.snapshots.store.interrupted();
        let mut owners = BTreeMap::new();
        for row in rows {
            let Some(home) = SandboxId::parse(&row.id).map(|id| self.places.of(&id)).filter(Home::is_there) else {
                continue;
            };
            let next = interrupted.iter().find(|snapshot| snapshot.sandbox.as_ref() == Some(&row.id));
            let next = next.and_then(|snapshot| snapshot.next_overlay.as_deref());
            let pushed = next.filter(|_| !home.processes().is_empty()).and_then(|next| has_pushed(&home, next));
            let overlay = row.overlay.clone().unwrap_or_else(|| OVERLAY.to_string());
            owners.insert(row.id.clone(), Owner { home: home.dir().to_path_buf(), overlay, pushed });
        }
        owners
    }

    /// A change is in the database, or was refused. Whether it was one of ours.
    pub(super) fn snapshot_written(&mut self, ticket: Ticket, result: &Result<(), StateError>) -> bool {
        let Some(then) = self.snapshots.tickets.remove(&ticket) else { return false };
        let refused = result.as_ref().err().map(|e| {
            log::error!("state database: {e}");
            let message = format!("the state database: {e}");
            match e {
                StateError::DiskFull(_) => Error::disk_full(message),
                StateError::Conflict(_) => Error::new(Code::AlreadyExists, message),
                _ => Error::new(Code::Internal, message),
            }
        });
        match (then, refused) {
            (Then::Begun(id), None) => self.snapshot_begun(&id),
            (Then::Begun(id), Some(error)) => self.snapshot_failed(&id, error),
            (Then::Committed(id), None) => self.snapshot_committed(&id),
            (Then::Committed(id), Some(_)) => self.timers.after(AGAIN, Timer::Snapshot(id)),
            (Then::RolledBack(id), refused) => self.rollback_written(&id, refused),
            (Then::Returned(id), refused) => self.returned(&id, refused),
            (Then::Removed { client, tag, id }, None) => {
                faults::pass(Point::Storage(FaultPoint::RemovalWritten));
                self.finish(client, &Message::ok(&tag, Fields::new().with("id", id)));
                self.collect();
            }
            (Then::Removed { client, tag, .. }, Some(error)) => self.finish(client, &Message::err(&tag, error)),
            (Then::Collected(garbage), None) => {
                faults::pass(Point::Collected);
                // Workers that have prepared what goes now end with it.
                self.look_at_pools();
                self.clear_away(garbage);
            }
            // They are without rows in memory, and stay until the next start.
            (Then::Collected(_), Some(_)) => self.cleared(&[]),
            (Then::Imported { client, tag, snapshot }, refused) => {
                self.import_written(client, &tag, &snapshot, refused);
            }
            (Then::Merged, refused) => self.merge_written(refused.as_ref()),
            (Then::Flattened(id), refused) => self.flatten_written(&id, refused.as_ref()),
            (Then::Recovered, None) => {
                self.sweep_snapshots();
                self.retain_snapshots();
                self.seal_snapshots();
                self.flatten_snapshots();
            }
            (Then::Recovered, Some(_)) => self.snapshots.sweep = false,
        }
        true
    }

    /// Takes away what has no row, once nothing is being made.
    pub(super) fn sweep_snapshots(&mut self) {
        let shelves = &self.snapshots;
        let busy = !shelves.making.is_empty() || !shelves.arriving.is_empty() || shelves.merging.is_some();
        if !shelves.sweep || busy {
            return;
        }
        self.snapshots.sweep = false;
        let owners =
            self.sandboxes.values().filter(|sandbox| sandbox.home.is_there() && sandbox.rolling_back.is_none());
        let owners = owners.map(|sandbox| {
            let (home, overlay) = (sandbox.home.dir().to_path_buf(), sandbox.home.overlay_name().to_string());
            (sandbox.id.to_string(), Owner { home, overlay, pushed: None })
        });
        let owners = owners.collect();
        if let Err(e) = self.snapshots.shelves.sweep(&self.snapshots.store, &owners, &mut faults::storage) {
            log::error!("files of snapshots that nobody has cannot be taken away: {e}");
        }
        self.collect();
    }

    /// Rows that nobody needs go, and their files after them.
    pub(super) fn collect(&mut self) {
        let merges = self.snapshots.merging.as_ref().is_some_and(|merging| merging.committing);
        if merges || self.snapshots.flattening.is_committing() {
            // What was merged or copied goes only when the database knows that; then this is called again.
            return;
        }
        let garbage = self.snapshots.store.garbage();
        if garbage == Garbage::default() {
            return self.merge_layers();
        }
        garbage.snapshots.iter().for_each(|id| drop(self.snapshots.store.remove_snapshot(id)));
        garbage.layers.iter().for_each(|id| drop(self.snapshots.store.remove_layer(id)));
        self.remove_garbage(garbage);
        self.merge_layers();
    }

    /// Rows go, and when that is in the database, their files.
    pub(super) fn remove_garbage(&mut self, garbage: Garbage) {
        let ticket = self.database.submit_durable(Change::Together(files::garbage_changes(&garbage)));
        self.snapshots.clearing += 1;
        self.snapshots.after(ticket, Then::Collected(garbage));
    }

    /// Snapshots that are too many, too old or too large for their owners go.
    pub(super) fn retain_snapshots(&mut self) {
        let retention = self.config.snapshots.retention();
        let rows = self.snapshots.store.snapshots();
        for id in retention::expired(rows, &BTreeSet::new(), retention, now_ms()) {
            log::info!("snapshot {id} is beyond what is kept of its owner's: it goes");
            self.let_go_of_snapshot(&id);
        }
    }

    /// It is time to look what is kept.
    pub(super) fn retention_due(&mut self) {
        self.retain_snapshots();
        self.timers.after(RETENTION, Timer::Retention);
    }

    /// Removes files whose rows are gone.
    fn clear_away(&mut self, garbage: Garbage) {
        let shelves = self.snapshots.shelves.clone();
        let started = self.background.run("snapshots", move || {
            let snapshots = garbage.snapshots.iter().map(|id| fs::remove_dir_all(shelves.snapshot(id)));
            let layers = garbage.layers.iter().map(|id| fs::remove_file(shelves.layer(id)));
            let each = snapshots.chain(layers).inspect(|_| faults::pass(Point::Storage(FaultPoint::Swept)));
            let failed = each.filter_map(Result::err);
            Done::Cleared(failed.filter(|e| e.kind() != io::ErrorKind::NotFound).collect())
        });
        if let Err(e) = started {
            log::error!("no thread to remove snapshots' files: {e}");
            self.cleared(&[]);
        }
    }

    /// Has a thread remove files without rows.
    pub(super) fn clear(&mut self, work: impl FnOnce() + Send + 'static) {
        self.snapshots.clearing += 1;
        let started = self.background.run("snapshots", move || {
            work();
            Done::Cleared(Vec::new())
        });
        if let Err(e) = started {
            log::error!("no thread to remove snapshots' files: {e}");
            self.cleared(&[]);
        }
    }

    /// Files whose rows are gone were removed, but for these.
    pub(super) fn cleared(&mut self, errors: &[io::Error]) {
        self.snapshots.clearing = self.snapshots.clearing.saturating_sub(1);
        errors.iter().for_each(|e| log::error!("a snapshot's file stays: {e}"));
    }

    /// What a sandbox needs of frozen files is this from now on.
    pub(super) fn hold(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get(id) else { return };
        let holding = Holding { layer: sandbox.layer.clone(), snapshot: sandbox.snapshot.clone() };
        self.snapshots.store.hold(id.as_str(), holding);
    }

    // ---- What clients ask ----

    /// The snapshot that is meant: by id, name or the unique start of an id.
    pub(super) fn find_snapshot(&self, key: u64, given: &str) -> Result<String, Error> {
        let Some(client) = self.clients.get(&key) else { return Ok(String::new()) };
        let who = client.identity();
        choose("snapshot", given, &who.owner, || {
            let seen = self.snapshots.store.snapshots().filter(|row| shown(row) && who.sees(&row.owner));
            seen.map(|row| (row.id.as_str(), row.name.as_deref(), row.owner.as_str()))
        })
    }

    pub(super) fn list_snapshots(&mut self, key: u64, tag: &str, sandbox: Option<&str>) {
        let Some(client) = self.clients.get(&key) else { return };
        let seen = self.snapshots.store.snapshots().filter(|row| shown(row) && client.identity().sees(&row.owner));
        let seen = seen.filter(|row| sandbox.is_none_or(|id| row.sandbox.as_deref() == Some(id)));
        let rows: Vec<Fields> = seen.map(|row| self.snapshot_fields(row)).collect();
        for row in rows {
            self.answer(key, &Message::item(tag, row));
        }
        self.answer(key, &Message::ok(tag, Fields::new()));
    }

    pub(super) fn inspect_snapshot(&mut self, key: u64, tag: &str, given: &str) -> Result<(), Error> {
        let id = self.find_snapshot(key, given)?;
        let fields = self.snapshots.store.snapshot(&id).map(|row| self.snapshot_fields(row)).unwrap_or_default();
        self.answer(key, &Message::ok(tag, fields));
        Ok(())
    }

    pub(super) fn remove_snapshot(&mut self, key: u64, tag: &str, given: &str) -> Result<(), Error> {
        let id = self.find_snapshot(key, given)?;
        let row = self.snapshots.ready(&id)?;
        if !matches!(row.kind, SnapshotKind::Snapshot | SnapshotKind::Template) {
            return Err(Error::new(
                Code::BadState,
                format!("snapshot {id} goes by itself: it is of kind {}", row.kind),
            ));
        }
        let Some(change) = files::removal(&self.snapshots.store, &id) else { return Ok(()) };
        if let Change::PutSnapshot(row) = &change {
            self.snapshots.store.put_snapshot((**row).clone());
        }
        let ticket = self.database.submit_durable(change);
        self.add_job(key, tag, super::requests::Job::Snapshot);
        self.snapshots.after(ticket, Then::Removed { client: key, tag: tag.to_string(), id });
        Ok(())
    }

    /// Whether an owner's new snapshot can have that name.
    pub(super) fn snapshot_name_is_free(&self, owner: &str, name: &str) -> Result<(), Error> {
        let mut rows = self.snapshots.store.snapshots().filter(|row| row.state != SnapshotState::Removing);
        match rows.find(|row| row.owner == owner && row.name.as_deref() == Some(name)) {
            None => Ok(()),
            Some(other) => {
                let message = format!("name={name} is taken by snapshot {}", other.id);
                Err(Error::new(Code::AlreadyExists, message).with("snapshot", &other.id))
            }
        }
    }

    /// A snapshot as clients see it.
    fn snapshot_fields(&self, row: &SnapshotRow) -> Fields {
        let fields = Fields::new().with("id", &row.id);
        let named = [("name", &row.name), ("sandbox", &row.sandbox), ("difference_to", &row.memory_below)];
        let named = named.into_iter().filter_map(|(key, value)| Some((key, value.as_ref()?)));
        let fields = named.fold(fields.with("owner", &row.owner), |fields, (key, value)| fields.with(key, value));
        let layers = self.snapshots.store.layers_from(row.layer.as_deref()).unwrap_or_default();
        let layer_bytes =
            layers.iter().filter_map(|id| self.snapshots.store.layer(id)).map(|layer: &LayerRow| layer.bytes);
        fields
            .with("kind", row.kind)
            .with("state", row.state)
            .with("template", &row.template)
            .with("vcpus", row.vcpus)
            .with("memory_mib", row.memory_bytes >> 20)
            .with("disk_mib", row.disk_bytes >> 20)
            .with("created_ms", row.created_ms)
            .with("bytes", row.bytes)
            .with("sealed", row.memory_seal.is_some())
            .with("layers", layers.len())
            .with("layer_bytes", layer_bytes.sum::<u64>())
    }
}

/// Whether clients see a snapshot: not those that are being made or removed, nor what is made in passing.
fn shown(row: &SnapshotRow) -> bool {
    row.state == SnapshotState::Ready && matches!(row.kind, SnapshotKind::Snapshot | SnapshotKind::Template)
}

/// Whether a worker that runs writes to this overlay, as it says itself. One that does not answer is ended: then nobody
/// writes to either.
pub(super) fn has_pushed(home: &Home, next: &str) -> Option<bool> {
    match worker::next_overlay(home.socket()) {
        Ok(overlay) => Some(overlay.as_deref() == Some(next)),
        Err(e) => {
            log::error!("a worker does not say which disk it writes to: {e}; it is ended");
            if let Err(e) = home.kill() {
                log::error!("it cannot be ended: {e}");
            }
            None
        }
    }
}
