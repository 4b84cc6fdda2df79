//! From a snapshot to sandboxes: `snapshot.fork` makes new ones, `sandbox.rollback` puts one back.
//!
//! A rollback: an empty overlay is made; the sandbox's row says `resuming`, with the snapshot, its disk's layer and that
//! overlay, durably; its worker is ended; another goes on from the snapshot. From the row on, the sandbox is what it was in
//! the snapshot: whatever ends the supervisor or the new worker leaves it paused there.

use std::fs;
use std::io::{self, Read, Seek};

use super::checkpoint::{Want, drop_other_overlays, overlay_shape};
use super::faults::{self, Point};
use super::finish::Extent;
use super::flattening::Waiting;
use super::instance::{Awaited, Route, Sandbox, Waiter};
use super::requests::Job;
use super::snapshots::Then;
use super::start::MIB;
use super::supervisor::{Done, Supervisor, now_ms};
use crate::sandbox::id::SandboxId;
use crate::sandbox::lifecycle::State;
use crate::sandbox::spec::{Defaults, Spec};
use crate::sandbox::time_limits::TimeLimits;
use crate::sandbox::worker;
use crate::storage::snapshots::files;
use crate::storage::snapshots::{SnapshotKind, SnapshotRow, SnapshotState};
use crate::storage::state::{Change, SandboxRow};
use crate::vmm::snapshot::working_set::MAX_BYTES as WORKING_SET_BYTES;
use crate::wire::{Code, Error, Fields, Message, Request};

/// Octets of randomness that a guest gets which goes on from a snapshot.
const SEED: usize = 64;

/// What a snapshot's settings mean that do not say; they say all of it.
pub(super) const SETTINGS: Defaults = Defaults { vcpus: 1, memory_mib: 512, time_limits: TimeLimits::NONE };

/// How far a rollback is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RollingBack {
    /// A thread makes its overlay.
    Preparing,
    /// The row is on its way to the database; what it was before.
    Recording(Box<SandboxRow>),
    /// The worker of before ends.
    Ending,
}

impl Supervisor {
    // ---- New sandboxes ----

    /// A client wants sandboxes that go on from a snapshot, or from what a sandbox is now.
    pub(super) fn ask_fork(&mut self, key: u64, tag: &str, from: &str, count: u64) -> Result<(), Error> {
        let missing = match self.find_running(key, from) {
            Ok(sandbox) => {
                let id = sandbox.id.clone();
                let want = Want::Fork { key, tag: tag.to_string(), count };
                self.begin_snapshot(&id, None, SnapshotKind::Fork, want)?;
                self.add_job(key, tag, Job::Fork { left: count, failed: None });
                return Ok(());
            }
            Err(error) => error,
        };
        if !missing.is(Code::NotFound) {
            return Err(missing);
        }
        let snapshot = self.find_snapshot(key, from).map_err(|error| match error.is(Code::NotFound) {
            true => Error::new(Code::NotFound, format!("no sandbox or snapshot {from}")),
            false => error,
        })?;
        self.add_job(key, tag, Job::Fork { left: count, failed: None });
        self.fork_from(key, tag, &snapshot, count);
        Ok(())
    }

    /// Makes the sandboxes of a fork.
    pub(super) fn fork_from(&mut self, key: u64, tag: &str, snapshot: &str, count: u64) {
        faults::pass(Point::ForkBegun);
        let row = self.snapshots.ready(snapshot).cloned();
        let owner = self.clients.get(&key).map(|client| client.identity().owner.clone());
        let waits = |node: &Self| {
            node.clients.get(&key).is_some_and(|client| matches!(client.jobs.get(tag), Some(Job::Fork { .. })))
        };
        for _ in 0..count {
            if !waits(self) {
                break;
            }
            let made = row.clone().and_then(|row| {
                let mut spec = Spec::of_line(&row.settings, SETTINGS)?;
                // Whatever it was taken of: this one is nobody's builder.
                spec.builds_no_more();
                let waiter = Waiter { client: key, tag: tag.to_string(), what: Awaited::Forked };
                self.create(spec, owner.clone().unwrap_or_default(), Some(waiter), Some(&row))
            });
            if let Err(error) = made {
                self.forked(key, tag, Err(error));
            }
        }
        // The sandboxes have what they need of it.
        if row.is_ok_and(|row| row.kind == SnapshotKind::Fork) {
            self.let_go_of_snapshot(snapshot);
        }
    }

    /// One sandbox of a fork runs, or will not.
    pub(super) fn forked(&mut self, key: u64, tag: &str, result: Result<&SandboxId, Error>) {
        let job = self.clients.get_mut(&key).and_then(|client| client.jobs.get_mut(tag));
        let Some(Job::Fork { left, failed }) = job else { return };
        *left = left.saturating_sub(1);
        if let Err(error) = &result {
            failed.get_or_insert(error.clone());
        }
        let end = (*left == 0).then(|| failed.clone());
        if let Ok(id) = result {
            self.answer(key, &Message::item(tag, Fields::new().with("id", id)));
        }
        match end {
            Some(None) => self.finish(key, &Message::ok(tag, Fields::new())),
            Some(Some(error)) => self.finish(key, &Message::err(tag, error)),
            None => {}
        }
    }

    /// Nobody waits for a fork any more: sandboxes that nobody was told of go.
    pub(super) fn forget_fork(&mut self, key: u64, tag: &str) {
        let is_of = |waiter: &Waiter| waiter.what == Awaited::Forked && waiter.client == key && waiter.tag == tag;
        let ids: Vec<SandboxId> =
            self.sandboxes.values().filter(|s| s.waiters.iter().any(is_of)).map(|s| s.id.clone()).collect();
        for id in ids {
            if let Some(sandbox) = self.sandboxes.get_mut(&id) {
                sandbox.waiters.retain(|waiter| !is_of(waiter));
            }
            self.remove(&id);
        }
    }

    // ---- Templates ----

    /// A client wants sandboxes of that shape to start from a snapshot of one that has started.
    pub(super) fn ask_template_snapshot(&mut self, key: u64, tag: &str, spec: Spec) -> Result<(), Error> {
        let owner = self.clients.get(&key).map(|client| client.identity().owner.clone()).unwrap_or_default();
        let waiter = Waiter { client: key, tag: tag.to_string(), what: Awaited::Prepared };
        let id = self.create(spec, owner, Some(waiter), None)?;
        self.add_job(key, tag, Job::Wait(id));
        Ok(())
    }

    /// A sandbox that was made for its template's snapshot runs.
    pub(super) fn template_ready(&mut self, key: u64, tag: &str, id: &SandboxId) {
        let want = Want::Template { key, tag: tag.to_string() };
        if let Err(error) = self.begin_snapshot(id, None, SnapshotKind::Template, want) {
            self.finish(key, &Message::err(tag, error));
            self.remove(id);
        }
    }

    /// A template has a snapshot to start sandboxes from: what it was taken of goes, and those before it that are of the
    /// same shape.
    pub(super) fn template_prepared(&mut self, key: u64, tag: &str, id: &SandboxId, snapshot: &str) {
        self.remove(id);
        let new = self.snapshots.store.snapshot(snapshot).cloned();
        if let Some(new) = &new {
            self.prefer_snapshot(new);
        }
        let old = self.snapshots.store.snapshots().filter(|row| {
            let same = |new: &SnapshotRow| row.id != new.id && is_for(row, new) && has_network(row) == has_network(new);
            row.kind == SnapshotKind::Template && row.state == SnapshotState::Ready && new.as_ref().is_some_and(same)
        });
        let old: Vec<String> = old.map(|row| row.id.clone()).collect();
        for id in old {
            self.let_go_of_snapshot(&id);
        }
        self.finish(key, &Message::ok(tag, Fields::new().with("id", snapshot)));
    }

    /// The snapshot that a new sandbox can start from.
    pub(super) fn template_origin(&self, spec: &Spec) -> Option<SnapshotRow> {
        let template = self.catalogue.get(&spec.template).ok().filter(|_| spec.disks.is_empty())?;
        // What its start command has open it could write to for ever.
        if spec.read_only && !template.manifest.build.start.is_empty() {
            return None;
        }
        let base_mib = template.manifest.size_bytes.div_ceil(MIB);
        let disk_mib = spec.disk_mib.unwrap_or(base_mib + self.config.sandbox.default_extra_disk_mib);
        let wanted = SnapshotRow {
            template: spec.template.clone(),
            template_sha256: template.manifest.sha256_hex(),
            vcpus: spec.vcpus.into(),
            memory_bytes: u64::from(spec.memory_mib) * MIB,
            disk_bytes: disk_mib * MIB,
            ..SnapshotRow::default()
        };
        let rows = self.snapshots.store.snapshots();
        let mut rows = rows.filter(|row| row.kind == SnapshotKind::Template && row.state == SnapshotState::Ready);
        rows.find(|row| {
            !self.snapshots.unfit.contains(&row.id)
                && is_for(row, &wanted)
                && has_network(row) == spec.network.is_some()
        })
        .cloned()
    }

    /// Makes a sandbox that goes on from its template's snapshot, or, where that fails at once, one that is booted.
    pub(super) fn create_or_boot(
        &mut self,
        spec: Spec,
        owner: String,
        waiter: Waiter,
        origin: Option<&SnapshotRow>,
    ) -> Result<SandboxId, Error> {
        let made = self.create(spec.clone(), owner.clone(), Some(waiter.clone()), origin);
        match (made, origin) {
            (Err(error), Some(row)) if is_the_snapshots(&error) => {
                log::warn!("no sandbox starts from its template's snapshot {}: {error}; it is booted", row.id);
                self.create(spec, owner, Some(waiter), None)
            }
            (made, _) => made,
        }
    }

    /// A sandbox that could not go on from its template's snapshot: another is made in its place that is booted, with
    /// all that was asked for but the id, for whoever waits. Whether that is so. Not a fork: that is to go on from there.
    pub(super) fn boot_instead(&mut self, id: &SandboxId, error: &Error) -> bool {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return false };
        let Some(snapshot) = sandbox.origin().map(str::to_string) else { return false };
        let of_template =
            self.snapshots.store.snapshot(&snapshot).is_some_and(|row| row.kind == SnapshotKind::Template);
        let wanted = |waiter: &Waiter| matches!(waiter.what, Awaited::Created { .. });
        if !of_template || !is_the_snapshots(error) || sandbox.removing {
            return false;
        }
        if error.is(Code::CpuMismatch) || error.is(Code::Corrupt) {
            self.snapshots.unfit.insert(snapshot.clone());
        }
        if sandbox.waiters.is_empty() || !sandbox.waiters.iter().all(wanted) {
            return false;
        }
        log::warn!("sandbox {id} cannot start from its template's snapshot {snapshot}: {error}; another is booted");
        let waiters = std::mem::take(&mut sandbox.waiters);
        let (spec, owner) = (sandbox.spec.clone(), sandbox.owner.clone());
        // The name is the other's.
        sandbox.spec.name = None;
        self.remove(id);
        for waiter in waiters {
            let (client, tag) = (waiter.client, waiter.tag.clone());
            match self.create(spec.clone(), owner.clone(), Some(waiter), None) {
                Ok(new) if self.sandboxes.contains_key(&new) => self.add_job(client, &tag, Job::Wait(new)),
                Ok(_) => {}
                Err(error) => self.finish(client, &Message::err(&tag, error)),
            }
        }
        true
    }

    /// Templates that changed, or went, take their snapshots with them.
    pub(super) fn drop_template_snapshots(&mut self) {
        let rows = self.snapshots.store.snapshots();
        let goes = |row: &&SnapshotRow| matches!(row.kind, SnapshotKind::Template | SnapshotKind::Step);
        let rows = rows.filter(goes).filter(|row| row.state == SnapshotState::Ready);
        let stale = rows.filter(|row| {
            let here = self.catalogue.get(&row.template).map(|template| template.manifest.sha256_hex());
            here.ok().as_ref() != Some(&row.template_sha256)
        });
        let stale: Vec<String> = stale.map(|row| row.id.clone()).collect();
        for id in stale {
            log::info!("snapshot {id} goes: its template is another, or gone");
            self.let_go_of_snapshot(&id);
        }
    }

    /// Nobody sees a snapshot any more.
    pub(super) fn let_go_of_snapshot(&mut self, snapshot: &str) {
        let Some(change) = files::removal(&self.snapshots.store, snapshot) else { return };
        if let Change::PutSnapshot(row) = &change {
            self.snapshots.store.put_snapshot((**row).clone());
        }
        self.database.submit(change);
        self.collect();
    }

    // ---- Guests that go on from a snapshot ----

    /// The agent of a guest that goes on from a snapshot is there: it is told who it is, and then its programs go on.
    pub(super) fn introduce(&mut self, id: &SandboxId) {
        let mut seed = [0; SEED];
        if let Err(e) = crate::sandbox::id::random(&mut seed) {
            self.fail_start(id, Error::new(Code::Internal, format!("no random numbers: {e}")));
            return;
        }
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let thaw = Request::new("", "system.thaw")
            .set("id", id)
            .set("hostname", sandbox.spec.name.as_deref().unwrap_or(id.as_str()))
            .set("clock_ns", u128::from(now_ms()) * 1_000_000)
            .set_bytes("seed", &seed);
        // A new sandbox is another machine; one that goes on where it was is not.
        let thaw = match sandbox.state == State::Starting {
            true => thaw.set("machine_id", seed[..16].iter().map(|octet| format!("{octet:02x}")).collect::<String>()),
            false => thaw,
        };
        let thaw = match &sandbox.slot {
            Some(slot) => thaw.set("mac", slot.mac.map(|octet| format!("{octet:02x}")).join(":")),
            None => thaw,
        };
        let thaw = sandbox.configure_network(thaw, &self.config.network.dns);
        // Its programs have its own environment, whatever that of the snapshot's was.
        let own = super::start::with_environment(Request::new("", "system.configure"), &sandbox.spec, &self.catalogue);
        let Some(worker) = &mut sandbox.worker else { return };
        let tag = worker.agent.request(own);
        worker.routes.insert(tag, Route::Unheeded);
        let tag = worker.agent.request(thaw);
        worker.routes.insert(tag, Route::Introduce);
        self.touched_sandboxes.insert(id.clone());
        // The programs that a new sandbox came with have numbers, which no new one may get. The agent answers in this order.
        if sandbox.state == State::Starting {
            self.survey(id);
        }
    }

    /// A guest knows who it is, or cannot be told: its network opens, and what runs in it is heard.
    pub(super) fn introduced(&mut self, id: &SandboxId, outcome: Result<(), Error>) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let (starting, is_new) = (sandbox.is_booting(), sandbox.state == State::Starting);
        if let Err(error) = outcome {
            let message = format!("the guest could not be told who it is: {}", error.message);
            match starting {
                true => self.fail_start(id, Error::new(Code::VmFailed, message)),
                false => log::error!("sandbox {id}: {message}"),
            }
            return;
        }
        faults::pass(Point::Introduced);
        if let Some(worker) = &mut sandbox.worker {
            worker.link.send(&Message::Request(Request::new("open", "vm.open")));
        }
        sandbox.reason.clear();
        self.touched_sandboxes.insert(id.clone());
        // A new sandbox runs when it is known what runs in it, which was asked with this.
        if !is_new {
            if starting {
                self.runs(id);
            }
            self.survey(id);
        }
    }

    /// The first guest that goes on from a snapshot and runs a program shows what those after it will touch at once. It is
    /// asked by the link that it would be told to stop by, so that it answers also where it is removed right after. Best effort.
    pub(super) fn learn_working_set(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let (Some(snapshot), Some(worker)) = (sandbox.snapshot.clone(), &mut sandbox.worker) else { return };
        let lasts = |row: &SnapshotRow| matches!(row.kind, SnapshotKind::Template | SnapshotKind::Snapshot);
        if worker.learning.is_some()
            || worker.link.queued() > 0
            || self.snapshots.learned.contains(&snapshot)
            || !self.snapshots.ready(&snapshot).is_ok_and(lasts)
        {
            return;
        }
        if self.snapshots.shelves.working_set(&snapshot).exists() {
            self.snapshots.learned.insert(snapshot);
            return;
        }
        let pid = worker.pid;
        match worker::ask_working_set(worker.link.stream(), pid) {
            Ok(set) => worker.learning = Some((snapshot, set)),
            Err(e) => log::warn!("worker {pid} cannot be asked what its guest touched: {e}"),
        }
    }

    /// A worker has told what its guest touched, or why it cannot.
    pub(super) fn learned_working_set(&mut self, id: &SandboxId, outcome: Result<(), Error>) {
        let worker = self.sandboxes.get_mut(id).and_then(|sandbox| sandbox.worker.as_mut());
        let Some((snapshot, set)) = worker.and_then(|worker| worker.learning.take()) else { return };
        // Where it is being removed, that has waited for this.
        self.kill_removed(id);
        if let Err(error) = outcome {
            log::warn!("what guests of snapshot {snapshot} touch at once is not known: {error}");
            return;
        }
        if self.snapshots.ready(&snapshot).is_err() || !self.snapshots.learned.insert(snapshot.clone()) {
            return;
        }
        let path = self.snapshots.shelves.working_set(&snapshot);
        let keep = move || -> io::Result<()> {
            let mut octets = Vec::new();
            let (mut set, being_written) = (set, path.with_extension("new"));
            set.rewind()?;
            // A worker wrote it, and may have gone on.
            set.take(WORKING_SET_BYTES as u64).read_to_end(&mut octets)?;
            fs::write(&being_written, octets)?;
            fs::rename(being_written, path)
        };
        let started = self.background.run("working set", move || {
            if let Err(e) = keep() {
                log::warn!("what guests of a snapshot touch at once cannot be kept: {e}");
            }
            Done::Learned
        });
        if let Err(e) = started {
            log::warn!("no thread: {e}");
        }
    }

    // ---- Rollback ----

    /// A client wants a sandbox to be what it was in a snapshot of it.
    pub(super) fn ask_rollback(&mut self, key: u64, tag: &str, given: &str, snapshot: &str) -> Result<(), Error> {
        let id = self.find(key, given)?;
        let snapshot = self.find_snapshot(key, snapshot)?;
        let row = self.snapshots.ready(&snapshot)?.clone();
        if self.stopping.is_some() {
            return Err(Error::new(Code::Stopping, "the node is stopping"));
        }
        let Some(sandbox) = self.sandboxes.get_mut(&id) else { return Ok(()) };
        check_rollback(sandbox, &row)?;
        sandbox.go_on()?;
        // First of all: a memory that cannot be made whole leaves the sandbox as it is.
        let whole = self.await_whole(&snapshot, Waiting::Rollback(id.clone()))?;
        if whole {
            self.prepare_rollback(&id, &snapshot)?;
        } else if let Some(sandbox) = self.sandboxes.get_mut(&id) {
            sandbox.rolling_back = Some(RollingBack::Preparing);
        }
        self.await_(key, tag, &id, Awaited::Resumed);
        Ok(())
    }

    /// The memory that a sandbox is to be put back to is whole, or cannot be.
    pub(super) fn rollback_begins(&mut self, id: &SandboxId, snapshot: &str, whole: Result<(), Error>) {
        if self.sandboxes.get(id).is_none_or(|sandbox| sandbox.rolling_back != Some(RollingBack::Preparing)) {
            return;
        }
        if let Err(error) = whole.and_then(|()| self.prepare_rollback(id, snapshot)) {
            self.rollback_refused(id, &error);
        }
    }

    /// Has a thread make the overlay of a rollback.
    fn prepare_rollback(&mut self, id: &SandboxId, snapshot: &str) -> Result<(), Error> {
        let row = self.snapshots.ready(snapshot)?;
        let shape = overlay_shape(self.catalogue.get(&row.template)?, row.disk_bytes);
        let random = SandboxId::random().map_err(|e| Error::new(Code::Internal, format!("no random id: {e}")))?;
        let name = format!("{}-{random}", files::OVERLAY);
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return Ok(()) };
        let (home, owned, snapshot) = (sandbox.home.clone(), id.clone(), snapshot.to_string());
        let work = move || {
            let result = files::make_overlay(home.dir(), &name, &shape, &mut faults::storage);
            Done::RollbackPrepared { sandbox: owned, snapshot, overlay: name, result: result.map(drop) }
        };
        let started = self.background.run("rollback", work);
        started.map_err(|e| Error::new(Code::NoCapacity, format!("no thread: {e}")))?;
        sandbox.rolling_back = Some(RollingBack::Preparing);
        Ok(())
    }

    /// A rollback came to nothing before it was begun: the sandbox is as it was.
    fn rollback_refused(&mut self, id: &SandboxId, error: &Error) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        sandbox.rolling_back = None;
        drop_other_overlays(sandbox);
        self.answer_waiters(id, Awaited::Resumed, error);
        if self.sandboxes.get(id).is_some_and(|s| s.worker.as_ref().is_some_and(|worker| worker.dead)) {
            self.bury_anyway(id);
        }
    }

    /// The overlay of a rollback is there, or cannot be made.
    pub(super) fn rollback_prepared(&mut self, id: &SandboxId, snapshot: &str, overlay: &str, result: io::Result<()>) {
        let row = self.snapshots.ready(snapshot).cloned();
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        sandbox.rolling_back = None;
        let made = result.map_err(|e| Error::of_io(Code::VmFailed, format!("no overlay for the rollback: {e}"), &e));
        // Much may have happened meanwhile.
        let ready = made.and(row).and_then(|row| check_rollback(sandbox, &row).map(|()| row));
        let row = match ready {
            Ok(row) => row,
            Err(error) => return self.rollback_refused(id, &error),
        };
        let before = sandbox.row();
        if let Err(error) = sandbox.state.become_(State::Resuming) {
            log::error!("sandbox {id}: {error}");
        }
        (sandbox.layer, sandbox.snapshot) = (row.layer, Some(row.id));
        sandbox.home.use_overlay(overlay);
        sandbox.rolling_back = Some(RollingBack::Recording(Box::new(before)));
        let ticket = self.database.submit_durable(Change::PutSandbox(Box::new(sandbox.row())));
        self.snapshots.after(ticket, Then::RolledBack(id.clone()));
        self.hold(id);
    }

    /// The sandbox is, by its row, what it was in the snapshot; or the row was refused.
    pub(super) fn rollback_written(&mut self, id: &SandboxId, refused: Option<Error>) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let Some(RollingBack::Recording(before)) = sandbox.rolling_back.take() else { return };
        if let Some(error) = refused {
            sandbox.state = State::parse(&before.state).unwrap_or(State::Error);
            (sandbox.layer, sandbox.snapshot) = (before.layer, before.snapshot);
            sandbox.home.use_overlay(before.overlay.as_deref().unwrap_or(files::OVERLAY));
            drop_other_overlays(sandbox);
            self.hold(id);
            self.answer_waiters(id, Awaited::Resumed, &error);
            if self.sandboxes.get(id).is_some_and(|s| s.worker.as_ref().is_some_and(|worker| worker.dead)) {
                self.bury_anyway(id);
            }
            return;
        }
        faults::pass(Point::RollbackWritten);
        sandbox.rolling_back = Some(RollingBack::Ending);
        if sandbox.worker.is_none() {
            // Where a thread works with what it is paused as, `pause_settled` goes on.
            if !sandbox.settling {
                self.rollback_ended(id);
            }
            return;
        }
        if let Err(e) = sandbox.home.kill() {
            log::error!("sandbox {id} cannot be killed: {e}");
        }
        self.bury(id);
    }

    /// The worker of before is gone, and so is what it had: another goes on from the snapshot.
    pub(super) fn rollback_ended(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        sandbox.rolling_back = None;
        faults::pass(Point::RollbackEnded);
        drop_other_overlays(sandbox);
        sandbox.home.drop_paused();
        // The snapshot that it mapped before may be nobody's now.
        self.collect();
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        sandbox.hung_ms = None;
        // What ran is what ran then: the guest says.
        sandbox.returned = true;
        let running: Vec<u64> = sandbox.execs.values().filter(|e| e.outcome.is_none()).map(|e| e.number).collect();
        self.execs_ended(id, running, &Error::new(Code::LinkLost, "the sandbox was put back to a snapshot"));
        if let Err(error) = self.settle_worker(id, None).and_then(|()| self.schedule(id)) {
            self.fail_start(id, error);
        }
    }

    /// The worker of a sandbox that is rolled back has ended. Whether it is one.
    pub(super) fn rollback_buried(&mut self, id: &SandboxId) -> bool {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return false };
        if sandbox.rolling_back != Some(RollingBack::Ending) || sandbox.removing {
            return false;
        }
        self.release(id, Extent::Worker);
        true
    }

    /// The agent of a guest that was put back is there. From now on its disk is no longer the snapshot's: first its row
    /// says so.
    pub(super) fn returned_agent_ready(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        faults::pass(Point::AgentReturned);
        let row = SandboxRow { state: State::Running.to_string(), ..sandbox.row() };
        let ticket = self.database.submit_durable(Change::PutSandbox(Box::new(row)));
        self.snapshots.after(ticket, Then::Returned(id.clone()));
    }

    /// The row of a sandbox that was put back says that it runs.
    pub(super) fn returned(&mut self, id: &SandboxId, refused: Option<Error>) {
        if self.sandboxes.get(id).is_none_or(|sandbox| sandbox.state != State::Resuming) {
            return;
        }
        match refused {
            None => {
                faults::pass(Point::ReturnWritten);
                self.introduce(id);
            }
            Some(error) => self.fail_start(id, error),
        }
    }
}

/// Whether a start may have failed because of the snapshot that it was from.
fn is_the_snapshots(error: &Error) -> bool {
    [Code::VmFailed, Code::Corrupt, Code::CpuMismatch, Code::GuestTimeout].iter().any(|code| error.is(*code))
}

/// Whether two snapshots are of one template and of machines of one shape. Another template may have the same image, and a start
/// command of whoever made it.
fn is_for(row: &SnapshotRow, other: &SnapshotRow) -> bool {
    let shape = |row: &SnapshotRow| (row.vcpus, row.memory_bytes, row.disk_bytes);
    let template = |row: &SnapshotRow| (row.template.clone(), row.template_sha256.clone());
    template(row) == template(other) && shape(row) == shape(other)
}

/// Whether the machine of a snapshot has a network device.
fn has_network(row: &SnapshotRow) -> bool {
    Spec::of_line(&row.settings, SETTINGS).is_ok_and(|spec| spec.network.is_some())
}

/// Whether a sandbox can go back to a snapshot.
fn check_rollback(sandbox: &Sandbox, row: &SnapshotRow) -> Result<(), Error> {
    let id = &sandbox.id;
    let refused = |what: String| {
        let error = Error::new(Code::BadState, what).with("sandbox", id).with("snapshot", &row.id);
        Err(error)
    };
    if row.sandbox.as_deref() != Some(id.as_str()) {
        return refused(format!("snapshot {} is not one of sandbox {id}: fork it", row.id));
    }
    if sandbox.snapshotting.is_some() || sandbox.rolling_back.is_some() || sandbox.restarting {
        return refused(format!("sandbox {id} is being taken a snapshot of, put back, or started again"));
    }
    if sandbox.releasing || sandbox.removing {
        return refused(format!("what is left of sandbox {id}'s worker is still being taken down"));
    }
    if !matches!(sandbox.state, State::Running | State::Paused | State::Stopped | State::Error) {
        return refused(format!("sandbox {id} is {}", sandbox.state));
    }
    Ok(())
}
