//! A snapshot of a sandbox that runs on: `snapshot.create`.
//!
//! The order in which files and rows change is that of `storage::snapshots::files`. The guest's programs are frozen first,
//! and thawed as soon as the worker has taken the machine: a child of it then writes what the memory was at that instant.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::capture::FREEZE;
use super::faults::{self, Point};
use super::instance::Sandbox;
use super::requests::Job;
use super::snapshots::{AGAIN, Then, has_pushed};
use super::start::MIB;
use super::supervisor::{Done, Supervisor, Timer, now_ms};
use crate::sandbox::home::Home;
use crate::sandbox::id::SandboxId;
use crate::sandbox::limits;
use crate::sandbox::worker::{self, Capture, CaptureError};
use crate::storage::memory_file::{self, MemoryFileError};
use crate::storage::overlay::MAX_LAYERS;
use crate::storage::snapshots::files::{self, FaultPoint, Shape};
use crate::storage::snapshots::{Shelves, SnapshotKind, SnapshotRow, SnapshotState};
use crate::storage::state::{Change, LayerRow};
use crate::storage::templates::Template;
use crate::wire::{Code, Error, Fields, Message};

/// A snapshot that is being made.
#[derive(Debug)]
pub(super) struct Making {
    sandbox: SandboxId,
    step: Step,
    want: Want,
    /// The worker has written all that it is to write.
    written: Arc<AtomicBool>,
    /// Octets of the disk's layer, once that is frozen.
    layer_bytes: Option<u64>,
    /// Why there will be no snapshot: only its disk's half is carried to its end.
    failure: Option<Error>,
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// The row is on its way to the database.
    Recording,
    /// The agent was asked to freeze the guest's programs, at this time.
    Freezing(Instant),
    /// A thread has the worker take the machine.
    Holding,
    /// A thread waits for the files.
    Writing,
    /// The rows that make it a snapshot are on their way to the database.
    Committing,
}

impl Making {
    /// Has it fail where it still waits for its worker. Whether it does.
    pub(super) fn give_up(&mut self, error: Error) -> bool {
        let waits = matches!(self.step, Step::Freezing(_) | Step::Holding | Step::Writing)
            && self.failure.is_none()
            && !self.written.load(Ordering::Relaxed);
        if waits {
            self.failure = Some(error);
        }
        waits
    }
}

/// What it is wanted for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Want {
    /// A client asked for it.
    Client { key: u64, tag: String },
    /// So many sandboxes are to go on from it.
    Fork { key: u64, tag: String, count: u64 },
    /// Sandboxes of its template are to start from it; the sandbox was made for that.
    Template { key: u64, tag: String },
    /// The template that is tried in the sandbox is to get its name.
    Publish { key: u64, tag: String },
    /// The sandbox builds a template: the next build is to go on from there.
    Step { key: u64, tag: String },
}

/// What became of the worker's taking of the machine.
#[derive(Debug)]
pub(super) struct Held {
    result: Result<Capture, Error>,
    /// The disk's overlay is frozen, and the next one in use.
    pushed: bool,
    /// Limit of the worker's memory before, to be put back.
    memory_max: Option<u64>,
}

/// What became of a snapshot's files.
#[derive(Debug)]
pub(super) struct Written {
    /// Octets that state and memory take, and whether the memory is a difference to what is below.
    files: Result<(u64, bool), Error>,
    /// Octets of the frozen layer; `None` where there is none.
    layer: Option<io::Result<u64>>,
}

impl Supervisor {
    /// A client wants a snapshot of a running sandbox.
    pub(super) fn ask_snapshot(&mut self, key: u64, tag: &str, given: &str, name: Option<String>) -> Result<(), Error> {
        let id = self.find_running(key, given)?.id.clone();
        let want = Want::Client { key, tag: tag.to_string() };
        self.begin_snapshot(&id, name, SnapshotKind::Snapshot, want)?;
        self.add_job(key, tag, Job::Snapshot);
        Ok(())
    }

    /// Begins a snapshot of a sandbox that runs.
    pub(super) fn begin_snapshot(
        &mut self,
        id: &SandboxId,
        name: Option<String>,
        kind: SnapshotKind,
        want: Want,
    ) -> Result<(), Error> {
        let Some(sandbox) = self.sandboxes.get(id) else { return Ok(()) };
        let refused =
            |what: String| Err(Error::new(Code::BadState, format!("sandbox {id} {what}")).with("sandbox", id));
        if self.stopping.is_some() {
            return Err(Error::new(Code::Stopping, "the node is stopping"));
        }
        if let Some(other) = &sandbox.snapshotting {
            return refused(format!("is being taken a snapshot of already ({other})"));
        }
        if sandbox.rolling_back.is_some() {
            return refused("is being put back to a snapshot".to_string());
        }
        if let Some(disk) = sandbox.spec.disks.first() {
            return refused(format!(
                "has the disk {} beside its root disk: that cannot be part of a snapshot",
                disk.name
            ));
        }
        let layers = self.snapshots.store.layers_from(sandbox.layer.as_deref()).map_or(0, |layers| layers.len());
        if layers >= MAX_LAYERS {
            let message = format!("the disk of sandbox {id} has {layers} frozen layers, the most that it can have");
            return Err(Error::new(Code::NoCapacity, message).with("resource", "layers").with("max", MAX_LAYERS));
        }
        name.iter().try_for_each(|name| self.snapshot_name_is_free(&sandbox.owner, name))?;
        let random = || SandboxId::random().map_err(|e| Error::new(Code::Internal, format!("no random id: {e}")));
        let (snapshot, layer) = (random()?.to_string(), random()?.to_string());
        let row = SnapshotRow {
            id: snapshot.clone(),
            name,
            owner: sandbox.owner.clone(),
            sandbox: Some(id.to_string()),
            template: sandbox.spec.template.clone(),
            template_sha256: sandbox.template_sha256.clone(),
            created_ms: now_ms(),
            vcpus: sandbox.spec.vcpus.into(),
            memory_bytes: u64::from(sandbox.spec.memory_mib) * MIB,
            disk_bytes: sandbox.spec.disk_mib.unwrap_or(0) * MIB,
            kind,
            state: SnapshotState::Making,
            memory_below: self.below(sandbox, kind),
            next_overlay: Some(format!("{}-{snapshot}", files::OVERLAY)),
            layer: Some(layer),
            settings: sandbox.spec.to_line(),
            ..SnapshotRow::default()
        };
        self.snapshots.store.put_snapshot(row.clone());
        let ticket = self.database.submit_durable(Change::PutSnapshot(Box::new(row)));
        self.snapshots.after(ticket, Then::Begun(snapshot.clone()));
        if let Some(sandbox) = self.sandboxes.get_mut(id) {
            (sandbox.snapshotting, sandbox.capture) = (Some(snapshot.clone()), None);
        }
        let (sandbox, written) = (id.clone(), Arc::default());
        let making = Making { sandbox, step: Step::Recording, want, written, layer_bytes: None, failure: None };
        self.snapshots.making.insert(snapshot, making);
        Ok(())
    }

    /// The snapshot that the memory of a new one may be a difference to: what the sandbox's worker has mapped. Not for those
    /// that others go on from at once, for which it would have to be made whole first.
    fn below(&self, sandbox: &Sandbox, kind: SnapshotKind) -> Option<String> {
        let row = sandbox.snapshot.as_deref().and_then(|id| self.snapshots.store.snapshot(id))?;
        let same = row.memory_bytes == u64::from(sandbox.spec.memory_mib) * MIB;
        (kind == SnapshotKind::Snapshot && same && row.memory_below.is_none()).then(|| row.id.clone())
    }

    /// The row is durable: the programs are frozen.
    pub(super) fn snapshot_begun(&mut self, snapshot: &str) {
        let Some(id) = self.snapshots.making.get(snapshot).map(|making| making.sandbox.clone()) else { return };
        let began = self.limit_capture(&id, Point::Storage(FaultPoint::RowWritten));
        let Some(making) = self.snapshots.making.get_mut(snapshot) else { return };
        making.step = Step::Freezing(began);
        if !self.ask_freeze(&id) {
            self.snapshot_failed(snapshot, Error::new(Code::LinkLost, "the sandbox ended before it was taken"));
        }
    }

    /// The programs of a sandbox stand still, or have had their time. Whether that was for a snapshot.
    pub(super) fn frozen_for_snapshot(&mut self, id: &SandboxId, frozen: bool) -> bool {
        let Some(snapshot) = self.sandboxes.get(id).and_then(|sandbox| sandbox.snapshotting.clone()) else {
            return false;
        };
        let Some(making) = self.snapshots.making.get_mut(&snapshot) else { return false };
        // An answer that comes after the time is over is none any more.
        if !matches!(making.step, Step::Freezing(_)) {
            return true;
        }
        making.step = Step::Holding;
        if !frozen {
            log::warn!("sandbox {id}: not all of its programs stand still: the snapshot has them as they are");
        }
        if let Err(error) = self.hold_for_snapshot(id, &snapshot) {
            self.thaw(id);
            self.snapshot_failed(&snapshot, error);
        }
        true
    }

    /// Whether the time to freeze the programs for a snapshot is over.
    pub(super) fn snapshot_freeze_expired(&self, id: &SandboxId) -> bool {
        let snapshot = self.sandboxes.get(id).and_then(|sandbox| sandbox.snapshotting.as_ref());
        let step = snapshot.and_then(|snapshot| self.snapshots.making.get(snapshot)).map(|making| making.step);
        matches!(step, Some(Step::Freezing(since)) if since.elapsed() >= FREEZE)
    }

    fn hold_for_snapshot(&mut self, id: &SandboxId, snapshot: &str) -> Result<(), Error> {
        let gone = || Error::new(Code::LinkLost, "the sandbox ended before it was taken");
        let sandbox = self.sandboxes.get(id).ok_or_else(gone)?;
        let worker = sandbox.worker.as_ref().filter(|worker| !worker.dead).ok_or_else(gone)?;
        let row = self.snapshots.store.snapshot(snapshot).ok_or_else(gone)?.clone();
        let shape = overlay_shape(self.catalogue.get(&row.template)?, row.disk_bytes);
        let (home, pid, shelves) = (sandbox.home.clone(), worker.pid, self.snapshots.shelves.clone());
        let owned = snapshot.to_string();
        let work = move || Done::SnapshotHeld { snapshot: owned, held: hold(&row, &shape, &home, pid, &shelves) };
        self.background.run("snapshot", work).map_err(|e| Error::new(Code::NoCapacity, format!("no thread: {e}")))
    }

    /// The worker has taken the machine, or not: its guest runs again, and its programs may.
    pub(super) fn snapshot_held(&mut self, snapshot: &str, held: Held) {
        let Some(making) = self.snapshots.making.get_mut(snapshot) else { return };
        making.step = Step::Writing;
        let (id, all) = (making.sandbox.clone(), Arc::clone(&making.written));
        self.thaw(&id);
        let Some(sandbox) = self.sandboxes.get(&id) else { return };
        let Some(row) = self.snapshots.store.snapshot(snapshot) else { return };
        let (home, shelves, row) = (sandbox.home.clone(), self.snapshots.shelves.clone(), row.clone());
        let owned = snapshot.to_string();
        let work = move || Done::SnapshotWritten { snapshot: owned, written: write(held, &row, &home, &shelves, &all) };
        if let Err(e) = self.background.run("snapshot", work) {
            // What was taken is lost with the thread that was not started; its disk's half is settled at the next start.
            log::error!("snapshot {snapshot}: no thread: {e}");
            self.timers.after(AGAIN, Timer::Snapshot(snapshot.to_string()));
        }
    }

    /// A snapshot's files are whole, or cannot be.
    pub(super) fn snapshot_written_out(&mut self, snapshot: &str, written: Written) {
        let Some(making) = self.snapshots.making.get_mut(snapshot) else { return };
        let (bytes, is_difference) = match written.files {
            Ok(found) => found,
            Err(error) => {
                making.failure.get_or_insert(error);
                (0, false)
            }
        };
        match written.layer {
            Some(Ok(bytes)) => making.layer_bytes = Some(bytes),
            Some(Err(e)) => {
                log::error!("snapshot {snapshot}: the layer of its disk cannot be kept: {e}");
                making.failure.get_or_insert(failed("the layer of its disk")(e));
                self.timers.after(AGAIN, Timer::Snapshot(snapshot.to_string()));
                return;
            }
            None => {
                let none = || Error::new(Code::VmFailed, "the disk was not frozen");
                let error = making.failure.clone().unwrap_or_else(none);
                return self.snapshot_failed(snapshot, error);
            }
        }
        if let Some(row) = self.snapshots.store.snapshot(snapshot) {
            let memory_below = row.memory_below.clone().filter(|_| is_difference);
            self.snapshots.store.put_snapshot(SnapshotRow { bytes, memory_below, ..row.clone() });
        }
        self.commit_snapshot(snapshot);
    }

    /// The transaction that makes it a snapshot, or that carries its disk's half forward.
    fn commit_snapshot(&mut self, snapshot: &str) {
        let Some(making) = self.snapshots.making.get_mut(snapshot) else { return };
        let (Some(row), Some(bytes)) = (self.snapshots.store.snapshot(snapshot).cloned(), making.layer_bytes) else {
            return;
        };
        let (Some(layer), Some(next)) = (row.layer.clone(), row.next_overlay.clone()) else { return };
        making.step = Step::Committing;
        let failed = making.failure.is_some();
        let mut changes = Vec::new();
        if let Some(sandbox) = self.sandboxes.get_mut(&making.sandbox) {
            if sandbox.layer.as_ref() != Some(&layer) {
                let below = sandbox.layer.replace(layer.clone());
                sandbox.home.use_overlay(&next);
                self.snapshots.store.put_layer(LayerRow { id: layer.clone(), below, bytes });
            }
            if !sandbox.removing {
                changes.push(Change::PutSandbox(Box::new(sandbox.row())));
            }
        }
        changes.extend(self.snapshots.store.layer(&layer).cloned().map(Change::PutLayer));
        let ready = SnapshotRow { state: SnapshotState::Ready, next_overlay: None, ..row };
        changes.push(match failed {
            true => Change::RemoveSnapshot { id: snapshot.to_string() },
            false => Change::PutSnapshot(Box::new(ready)),
        });
        let id = making.sandbox.clone();
        self.hold(&id);
        let ticket = self.database.submit_durable(Change::Together(changes));
        self.snapshots.after(ticket, Then::Committed(snapshot.to_string()));
    }

    /// It is time to try again what did not work: to keep the layer, or to write the rows.
    pub(super) fn snapshot_again(&mut self, snapshot: &str) {
        let Some(making) = self.snapshots.making.get(snapshot) else { return };
        if making.step == Step::Committing {
            return self.commit_snapshot(snapshot);
        }
        let (Some(sandbox), Some(row)) =
            (self.sandboxes.get(&making.sandbox), self.snapshots.store.snapshot(snapshot).cloned())
        else {
            return;
        };
        let (home, shelves, owned) = (sandbox.home.clone(), self.snapshots.shelves.clone(), snapshot.to_string());
        let failure = making.failure.clone().unwrap_or_else(|| Error::new(Code::NoCapacity, "no thread for its files"));
        let work = move || {
            let layer = Some(link(&row, &home, &shelves));
            Done::SnapshotWritten { snapshot: owned, written: Written { files: Err(failure), layer } }
        };
        if let Err(e) = self.background.run("snapshot", work) {
            log::error!("snapshot {snapshot}: no thread: {e}");
            self.timers.after(AGAIN, Timer::Snapshot(snapshot.to_string()));
        }
    }

    /// All of it is in the database.
    pub(super) fn snapshot_committed(&mut self, snapshot: &str) {
        faults::pass(Point::Storage(FaultPoint::Committed));
        let Some(making) = self.snapshots.making.get(snapshot) else { return };
        let (id, failure) = (making.sandbox.clone(), making.failure.clone());
        if let Some(sandbox) = self.sandboxes.get(&id) {
            drop_other_overlays(sandbox);
            faults::pass(Point::Storage(FaultPoint::OverlayDropped));
        }
        match (failure, self.snapshots.store.snapshot(snapshot).cloned()) {
            (Some(error), _) => return self.snapshot_failed(snapshot, error),
            (None, Some(row)) => {
                let ready = SnapshotRow { state: SnapshotState::Ready, next_overlay: None, ..row };
                self.snapshots.store.put_snapshot(ready);
            }
            (None, None) => {}
        }
        let Some(making) = self.end_snapshot(snapshot) else { return };
        let row = self.snapshots.store.snapshot(snapshot);
        let (bytes, below) = row.map(|row| (row.bytes, row.memory_below.clone())).unwrap_or_default();
        self.seal_snapshots();
        self.flatten_snapshots();
        match making.want {
            Want::Client { key, tag } => {
                self.retain_snapshots();
                let fields = Fields::new().with("id", snapshot).with("bytes", bytes);
                let fields = below.iter().fold(fields, |fields, below| fields.with("difference_to", below));
                self.finish(key, &Message::ok(&tag, fields));
            }
            Want::Fork { key, tag, count } => self.fork_from(key, &tag, snapshot, count),
            Want::Publish { key, tag } => self.trial_taken(key, &tag, &id, snapshot),
            Want::Step { key, tag } => {
                self.retain_steps();
                self.finish(key, &Message::ok(&tag, Fields::new().with("kept", true)));
            }
            Want::Template { key, tag } => self.template_prepared(key, &tag, &id, snapshot),
        }
        self.collect();
    }

    /// There will be no snapshot: what there is of it goes.
    pub(super) fn snapshot_failed(&mut self, snapshot: &str, error: Error) {
        let row = self.snapshots.store.remove_snapshot(snapshot);
        let Some(making) = self.end_snapshot(snapshot) else { return };
        let id = making.sandbox;
        // What came first is why.
        let error = making.failure.unwrap_or(error);
        log::warn!("sandbox {id}: no snapshot {snapshot}: {error}");
        // Its row goes with its files, as those that nobody needs do.
        if row.is_some() {
            let garbage = crate::storage::snapshots::store::Garbage {
                snapshots: vec![snapshot.to_string()],
                ..Default::default()
            };
            self.remove_garbage(garbage);
        }
        if matches!(making.want, Want::Template { .. }) {
            self.remove(&id);
        }
        match making.want {
            Want::Client { key, tag }
            | Want::Fork { key, tag, .. }
            | Want::Template { key, tag }
            | Want::Publish { key, tag }
            | Want::Step { key, tag } => {
                self.finish(key, &Message::err(&tag, error.with("sandbox", &id)));
            }
        }
        self.collect();
    }

    /// A snapshot is made, or is not going to be: its sandbox may go its way.
    fn end_snapshot(&mut self, snapshot: &str) -> Option<Making> {
        let making = self.snapshots.making.remove(snapshot)?;
        if let Some(sandbox) = self.sandboxes.get_mut(&making.sandbox) {
            sandbox.snapshotting = None;
            if sandbox.worker.as_ref().is_some_and(|worker| worker.dead) {
                // It ended over it, and was kept until nobody writes into its home any more.
                self.bury_anyway(&making.sandbox);
            }
        }
        self.sweep_snapshots();
        Some(making)
    }
}

/// The shape of a root disk's overlay.
pub(super) fn overlay_shape(template: &Template, disk_bytes: u64) -> Shape {
    Shape { disk_bytes, base_bytes: template.manifest.size_bytes, base_sha256: template.manifest.sha256 }
}

/// Overlays that are no longer in use have their names as layers, or are nobody's.
pub(super) fn drop_other_overlays(sandbox: &Sandbox) {
    let own = sandbox.home.overlay();
    for other in sandbox.home.overlays().into_iter().filter(|path| *path != own) {
        if let Err(e) = std::fs::remove_file(&other) {
            log::warn!("{} cannot be removed: {e}", other.display());
        }
    }
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> Error {
    move |e| Error::of_io(Code::VmFailed, format!("the snapshot cannot be taken: {what}: {e}"), &e)
}

/// Makes the files of a snapshot and has the worker take the machine. Blocks.
fn hold(row: &SnapshotRow, shape: &Shape, home: &Home, pid: i32, shelves: &Shelves) -> Held {
    let next = row.next_overlay.as_deref().unwrap_or_default();
    let made = shelves.begin(&row.id, row.memory_bytes, &mut faults::storage).map_err(failed("its files"));
    let made = made.and_then(|files| {
        let overlay =
            files::make_overlay(home.dir(), next, shape, &mut faults::storage).map_err(failed("its overlay"))?;
        Ok((files, overlay))
    });
    let (files, overlay) = match made {
        Ok(made) => made,
        Err(error) => return Held { result: Err(error), pushed: false, memory_max: None },
    };
    let below =
        row.memory_below.as_deref().and_then(|below| open_below(shelves, below, &files.memory, row.memory_bytes));
    // Pages that the guest changes while the child writes are there twice.
    let memory_max = limits::lend_memory(home.cgroup(), row.memory_bytes);
    let memory_max = memory_max.inspect_err(|e| log::warn!("no more memory for a snapshot: {e}")).ok();
    let taken =
        worker::begin_capture(home.socket(), pid, &files.state, &files.memory, Some((next, &overlay)), below.as_ref());
    if taken.is_ok() {
        faults::pass(Point::Storage(FaultPoint::Pushed));
    }
    match taken {
        Ok(capture) => Held { result: Ok(capture), pushed: true, memory_max },
        Err(e) => {
            let error = match e {
                CaptureError::Refused(error) => error,
                CaptureError::Io(e) => failed("its worker")(e),
            };
            // A worker that has ended, or is ended now, writes to neither.
            Held { result: Err(error), pushed: has_pushed(home, next).unwrap_or(true), memory_max }
        }
    }
}

/// The memory file that another may be a difference to, where the file system can tell the two apart. `memory` is that
/// other, still empty.
fn open_below(shelves: &Shelves, below: &str, memory: &File, memory_bytes: u64) -> Option<File> {
    let opened = File::open(shelves.memory(below)).map_err(|cause| MemoryFileError::Io { doing: "opening it", cause });
    match opened.and_then(|file| Ok((memory_file::keeps_holes(memory, memory_bytes)?, file))) {
        Ok((keeps_holes, file)) => Some(file).filter(|_| keeps_holes),
        Err(e) => {
            log::warn!("the memory of snapshot {below} is nothing to be a difference to: {e}");
            None
        }
    }
}

/// Waits for a snapshot's files and puts them on the medium. Blocks.
fn write(held: Held, row: &SnapshotRow, home: &Home, shelves: &Shelves, all: &AtomicBool) -> Written {
    let files = held.result.and_then(|capture| {
        let is_difference = capture.is_difference();
        let written = capture.finish().map_err(failed("its memory"))?.number("memory_bytes");
        all.store(true, Ordering::Relaxed);
        faults::storage(FaultPoint::Captured).map_err(failed("its memory"))?;
        let bytes = shelves.sync(&row.id, is_difference, &mut faults::storage).map_err(failed("its files"))?;
        if is_difference {
            let checked = shelves.open_memory(&row.id);
            let checked = checked.and_then(|memory| memory_file::check_difference(&memory, row.memory_bytes, written));
            checked.map_err(failed("its memory"))?;
        }
        Ok((bytes, is_difference))
    });
    if let Some(max) = held.memory_max
        && let Err(e) = limits::give_back_memory(home.cgroup(), max)
    {
        log::warn!("{}: memory that was lent for a snapshot: {e}", row.id);
    }
    let layer = held.pushed.then(|| link(row, home, shelves));
    if !held.pushed
        && let Some(next) = &row.next_overlay
        && let Err(e) = files::drop_overlay(home.dir(), next, &mut faults::storage)
    {
        log::warn!("overlay {next} of snapshot {} cannot be removed: {e}", row.id);
    }
    Written { files, layer }
}

/// The overlay that was frozen gets its name as a layer.
fn link(row: &SnapshotRow, home: &Home, shelves: &Shelves) -> io::Result<u64> {
    let layer = row.layer.as_deref().ok_or(io::ErrorKind::InvalidInput)?;
    shelves.link_layer(&home.overlay(), layer, &mut faults::storage)
}
