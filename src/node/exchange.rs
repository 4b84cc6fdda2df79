//! `snapshot.export` and `snapshot.import`: a snapshot as one file (`storage::snapshots::bundle`), to and from clients.
//!
//! An import has no rows until all of it is on the medium, was checked and fits to this node; then one transaction makes
//! them. Until then its files are nobody's for whoever comes after this supervisor, and go.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufWriter, Read};

use super::faults::{self, Point};
use super::flattening::Waiting;
use super::fork::SETTINGS;
use super::requests::Job;
use super::snapshots::Then;
use super::start::MIB;
use super::supervisor::{Done, Supervisor, now_ms};
use super::transfer::{self, Feed, Outlet};
use crate::sandbox::id::SandboxId;
use crate::sandbox::spec::{MAX_DISK_MIB, MEMORY_MIB, Spec};
use crate::storage::memory_file::taken;
use crate::storage::snapshots::bundle::{self, BundleError, Files, Imported, Limits, Manifest, Part};
use crate::storage::snapshots::files::unhindered;
use crate::storage::snapshots::{Shelves, SnapshotKind, SnapshotRow, SnapshotState};
use crate::storage::state::{Change, LayerRow};
use crate::vmm::snapshot::Saved;
use crate::wire::{Code, Error, FRAME, Fields};

/// Exports, and imports, at once: each has a thread.
const MOST: usize = 4;

/// A snapshot that a client sends.
#[derive(Debug)]
pub(super) struct Arrival {
    owner: String,
    name: Option<String>,
    /// What it is to be, once its rows are on their way to the database.
    rows: Option<Rows>,
}

#[derive(Debug, Clone)]
struct Rows {
    snapshot: SnapshotRow,
    /// Newest first.
    layers: Vec<LayerRow>,
}

/// A snapshot whose files are there and whole.
#[derive(Debug)]
pub(super) struct Arrived {
    manifest: Manifest,
    /// Room that state and memory take, in octets.
    bytes: u64,
    /// Room that each layer takes, newest first.
    layers: Vec<u64>,
}

/// Snapshots that are arriving, by the ids that they will have. Their layers' ids begin with those.
pub(super) type Arrivals = BTreeMap<String, Arrival>;

impl Supervisor {
    fn refuse_more(&self, what: &str, is: impl Fn(&Job) -> bool) -> Result<(), Error> {
        let count = self.clients.values().flat_map(|client| client.jobs.values()).filter(|job| is(job)).count();
        if count < MOST {
            return Ok(());
        }
        let message = format!("{count} {what} of snapshots are under way, the most at once");
        Err(Error::new(Code::NoCapacity, message).with("resource", what).with("max", MOST))
    }

    /// A client wants a snapshot as one file.
    pub(super) fn ask_export(&mut self, key: u64, tag: &str, given: &str) -> Result<(), Error> {
        let id = self.find_snapshot(key, given)?;
        self.snapshots.ready(&id)?;
        if !self.await_whole(&id, Waiting::Export { key, tag: tag.to_string() })? {
            self.add_job(key, tag, Job::Snapshot);
            return Ok(());
        }
        self.begin_export(key, tag, &id)
    }

    /// A client gets a snapshot, whose memory is whole, as one file.
    pub(super) fn begin_export(&mut self, key: u64, tag: &str, id: &str) -> Result<(), Error> {
        self.refuse_more("exports", |job| matches!(job, Job::Export(_)))?;
        let row = self.snapshots.ready(id)?;
        let layers = self.snapshots.store.layers_from(row.layer.as_deref());
        let layers = layers.ok_or_else(|| Error::new(Code::Corrupt, "a frozen layer of its disk is missing"))?;
        let manifest = Manifest {
            warren: env!("CARGO_PKG_VERSION").to_string(),
            name: row.name.clone(),
            template: row.template.clone(),
            template_sha256: row.template_sha256.clone(),
            created_ms: row.created_ms,
            vcpus: row.vcpus,
            memory_bytes: row.memory_bytes,
            disk_bytes: row.disk_bytes,
            settings: row.settings.clone(),
            ..Manifest::default()
        };
        // Open before anything else happens: whatever is removed or merged from now on, they stay as they are.
        let shelves = &self.snapshots.shelves;
        let opened = shelves.open(id).and_then(|files| Ok((files, shelves.open_layers(&layers)?)));
        let ((state, memory), layers) =
            opened.map_err(|e| Error::new(Code::Corrupt, format!("a file of snapshot {id}: {e}")))?;
        let report = self.background.reporter();
        let (outlet, download) = transfer::download(move || report(Done::Moved(key)));
        let id = id.to_string();
        let work = move || {
            export(&id, &manifest, &Files { state: &state, memory: &memory, layers: &layers }, outlet);
            Done::Moved(key)
        };
        self.background.run("export", work).map_err(|e| Error::new(Code::NoCapacity, format!("no thread: {e}")))?;
        self.add_job(key, tag, Job::Export(download));
        Ok(())
    }

    /// A client is about to send a snapshot.
    pub(super) fn ask_import(&mut self, key: u64, tag: &str, name: Option<String>) -> Result<(), Error> {
        if self.stopping.is_some() {
            return Err(Error::new(Code::Stopping, "the node is stopping"));
        }
        self.refuse_more("imports", |job| matches!(job, Job::Import(_)))?;
        let Some(client) = self.clients.get(&key) else { return Ok(()) };
        let owner = client.identity().owner.clone();
        name.iter().try_for_each(|name| self.snapshot_name_is_free(&owner, name))?;
        let id = SandboxId::random().map_err(|e| Error::new(Code::Internal, format!("no random id: {e}")))?.to_string();
        let room = nix::sys::statvfs::statvfs(&self.config.paths.data)
            .map_err(|e| Error::new(Code::Internal, format!("{}: {e}", self.config.paths.data.display())))?;
        let limits = Limits {
            memory_bytes: MEMORY_MIB.end() * MIB,
            disk_bytes: MAX_DISK_MIB * MIB,
            bytes: room.blocks_available().saturating_mul(room.fragment_size()),
        };
        let report = self.background.reporter();
        let (upload, feed) = transfer::upload(u64::MAX, move || report(Done::Moved(key)));
        let (shelves, snapshot, whose) = (self.snapshots.shelves.clone(), id.clone(), tag.to_string());
        let work = move || {
            let result = import(feed, &limits, &shelves, &snapshot);
            if result.is_err() {
                remove(&shelves, &snapshot);
            }
            Done::SnapshotImported { client: key, tag: whose, snapshot, result }
        };
        self.background.run("import", work).map_err(|e| Error::new(Code::NoCapacity, format!("no thread: {e}")))?;
        self.snapshots.arriving.insert(id, Arrival { owner, name, rows: None });
        self.add_job(key, tag, Job::Import(upload));
        Ok(())
    }

    /// A snapshot that a client sent is there with all its files, or there is nothing of it.
    pub(super) fn snapshot_imported(&mut self, key: u64, tag: &str, id: &str, result: Result<Arrived, Error>) {
        let (nothing, waits) = (result.is_err(), self.clients.get(&key).is_some_and(|c| c.jobs.contains_key(tag)));
        let gone = || Error::new(Code::Cancelled, "nobody waits for it any more");
        let rows = result.and_then(|arrived| if waits { self.judge(id, &arrived) } else { Err(gone()) });
        match rows {
            Ok(rows) => {
                let layers = rows.layers.iter().cloned().map(Change::PutLayer);
                let changes = layers.chain([Change::PutSnapshot(Box::new(rows.snapshot.clone()))]).collect();
                if let Some(arrival) = self.snapshots.arriving.get_mut(id) {
                    arrival.rows = Some(rows);
                }
                let ticket = self.database.submit_durable(Change::Together(changes));
                let (tag, snapshot) = (tag.to_string(), id.to_string());
                self.snapshots.after(ticket, Then::Imported { client: key, tag, snapshot });
            }
            Err(error) => {
                self.snapshots.arriving.remove(id);
                if !nothing {
                    self.remove_arrived(id);
                }
                if waits {
                    self.answer_import(key, tag, Err(error));
                }
                self.sweep_snapshots();
            }
        }
    }

    /// The rows of a snapshot that was sent are in the database, or were refused.
    pub(super) fn import_written(&mut self, key: u64, tag: &str, id: &str, refused: Option<Error>) {
        let rows = self.snapshots.arriving.remove(id).and_then(|arrival| arrival.rows);
        match (refused, rows) {
            (None, Some(rows)) => {
                faults::pass(Point::ImportWritten);
                rows.layers.into_iter().for_each(|layer| self.snapshots.store.put_layer(layer));
                self.snapshots.store.put_snapshot(rows.snapshot);
                self.retain_snapshots();
                self.seal_snapshots();
                self.answer_import(key, tag, Ok(id));
            }
            (refused, _) => {
                self.remove_arrived(id);
                let error = refused.unwrap_or_else(|| Error::new(Code::Internal, "its rows are lost"));
                self.answer_import(key, tag, Err(error));
            }
        }
        self.sweep_snapshots();
        self.collect();
    }

    fn answer_import(&mut self, key: u64, tag: &str, result: Result<&str, Error>) {
        let job = self.clients.get_mut(&key).and_then(|client| client.jobs.remove(tag));
        if job.is_some() {
            let answer = match result {
                Ok(id) => crate::wire::Message::ok(tag, Fields::new().with("id", id)),
                Err(error) => crate::wire::Message::err(tag, error),
            };
            self.finish(key, &answer);
        }
    }

    fn remove_arrived(&mut self, id: &str) {
        let (shelves, id) = (self.snapshots.shelves.clone(), id.to_string());
        self.clear(move || remove(&shelves, &id));
    }

    /// What a snapshot that was sent is here. Its sizes and digests are right; what it says is its sender's.
    fn judge(&self, id: &str, arrived: &Arrived) -> Result<Rows, Error> {
        let Arrived { manifest, bytes, layers } = arrived;
        let corrupt = |what: String| Error::new(Code::Corrupt, format!("the exported snapshot: {what}"));
        let (owner, name) = match self.snapshots.arriving.get(id) {
            Some(arrival) => (arrival.owner.clone(), arrival.name.clone()),
            None => return Err(Error::new(Code::Internal, "nobody sends that snapshot")),
        };
        name.iter().try_for_each(|name| self.snapshot_name_is_free(&owner, name))?;
        let spec = Spec::of_line(&manifest.settings, SETTINGS)?;
        let shape = (
            u32::from(spec.vcpus),
            u64::from(spec.memory_mib) * MIB,
            spec.disk_mib.unwrap_or(0).saturating_mul(MIB),
            spec.template.as_str(),
        );
        let said = (manifest.vcpus, manifest.memory_bytes, manifest.disk_bytes, manifest.template.as_str());
        if shape != said {
            return Err(corrupt(format!("its sandbox has {shape:?}, its manifest {said:?}")));
        }
        if let Some(disk) = spec.disks.first() {
            return Err(corrupt(format!("it has the disk {} beside its root disk", disk.name)));
        }
        let template = self.catalogue.get(&manifest.template).map_err(|error| {
            Error::new(
                error_code(&error),
                format!("the snapshot is of template {}, which is not here", manifest.template),
            )
            .with("template", &manifest.template)
        })?;
        let here = template.manifest.sha256_hex();
        if here != manifest.template_sha256 {
            let message = format!(
                "template {} has another content here than the snapshot's: {here}, not {}",
                manifest.template, manifest.template_sha256
            );
            return Err(Error::new(Code::BadState, message).with("template", &manifest.template).with("sha256", here));
        }
        let layer_id = |number: usize| layer_id(id, number);
        let snapshot = SnapshotRow {
            id: id.to_string(),
            name,
            owner,
            template: manifest.template.clone(),
            template_sha256: manifest.template_sha256.clone(),
            // Its time here: what it was elsewhere does not count when it is to go.
            created_ms: now_ms(),
            vcpus: manifest.vcpus,
            memory_bytes: manifest.memory_bytes,
            disk_bytes: manifest.disk_bytes,
            kind: SnapshotKind::Snapshot,
            state: SnapshotState::Ready,
            layer: Some(layer_id(0)),
            bytes: *bytes,
            settings: spec.to_line(),
            ..SnapshotRow::default()
        };
        let last = layers.len().saturating_sub(1);
        let row = |(number, bytes): (usize, &u64)| LayerRow {
            id: layer_id(number),
            below: (number < last).then(|| layer_id(number + 1)),
            bytes: *bytes,
        };
        Ok(Rows { snapshot, layers: layers.iter().enumerate().map(row).collect() })
    }
}

fn error_code(error: &Error) -> Code {
    if error.is(Code::NotFound) { Code::NotFound } else { Code::Corrupt }
}

/// Id of a layer of a snapshot that is sent, 0 the newest.
fn layer_id(snapshot: &str, number: usize) -> String {
    format!("{snapshot}-{number}")
}

/// Takes away whatever is there of a snapshot that was sent. Blocks.
fn remove(shelves: &Shelves, id: &str) {
    let mut removed = vec![fs::remove_dir_all(shelves.snapshot(id))];
    for number in 0.. {
        match fs::remove_file(shelves.layer(&layer_id(id, number))) {
            // They were made one after the other.
            Err(e) if e.kind() == io::ErrorKind::NotFound => break,
            other => removed.push(other),
        }
        if removed.last().is_some_and(Result::is_err) {
            break;
        }
    }
    for e in removed.into_iter().filter_map(Result::err).filter(|e| e.kind() != io::ErrorKind::NotFound) {
        log::error!("a file of snapshot {id}, which was not taken, stays: {e}");
    }
}

/// Writes a snapshot to a client. Blocks.
fn export(id: &str, manifest: &Manifest, files: &Files<'_>, outlet: Outlet) {
    let mut out = BufWriter::with_capacity(FRAME, outlet);
    let written = bundle::export(manifest, files, &mut out);
    let (outlet, unwritten) = match out.into_inner() {
        Ok(outlet) => (outlet, None),
        Err(e) => {
            let (error, buffer) = e.into_parts();
            (buffer.into_parts().0, Some(error))
        }
    };
    let result = written.map_err(|e| to_error(&e)).and_then(|()| match unwritten {
        None => Ok(Fields::new().with("id", id)),
        Some(e) => Err(Error::new(Code::LinkLost, e.to_string())),
    });
    outlet.end(result);
}

/// Takes a snapshot from a client and checks all of it that can be checked without the node's state. Its files are on the
/// medium on return. Blocks.
fn import(mut feed: Feed, limits: &Limits, shelves: &Shelves, id: &str) -> Result<Arrived, Error> {
    let found = bundle::import(&mut feed, limits, |part| match part {
        Part::Memory => shelves.make_memory(id),
        Part::Layer(number) => shelves.make_layer(&layer_id(id, number as usize)),
        _ => shelves.make_state(id),
    });
    let Imported { manifest, state, memory, layers, base_sha256 } = found.map_err(|e| to_error(&e))?;
    let io = |e: io::Error| to_error(&BundleError::Io { part: Part::End, cause: e });
    let corrupt = |what: String| Error::new(Code::Corrupt, format!("the exported snapshot: {what}"));
    if feed.read(&mut [0]).map_err(io)? > 0 {
        return Err(corrupt("there is more behind its end".to_string()));
    }
    let base = base_sha256.map(|digest| digest.iter().map(|octet| format!("{octet:02x}")).collect::<String>());
    if base.as_ref() != Some(&manifest.template_sha256) {
        let base = base.unwrap_or_else(|| "none".to_string());
        return Err(corrupt(format!("its disk is over image {base}, its template is {}", manifest.template_sha256)));
    }
    let octets = fs::read(shelves.state(id)).map_err(io)?;
    let shape = Saved::decode(&octets).and_then(|saved| saved.shape());
    let shape = shape.map_err(|e| corrupt(format!("its state: {e}")))?;
    if (u32::from(shape.0), shape.1) != (manifest.vcpus, manifest.memory_bytes) {
        return Err(corrupt(format!("its state is of a machine of {shape:?}")));
    }
    drop((state, memory));
    faults::reached(Point::ImportReceived).map_err(io)?;
    let bytes = shelves.sync(id, false, &mut unhindered).map_err(io)?;
    shelves.sync_layers(&mut unhindered).map_err(io)?;
    faults::reached(Point::ImportSynced).map_err(io)?;
    let layers = layers.iter().map(taken).collect::<io::Result<_>>().map_err(io)?;
    Ok(Arrived { manifest, bytes, layers })
}

/// What a client is told.
fn to_error(error: &BundleError) -> Error {
    let message = error.to_string();
    match error {
        BundleError::Newer { found } => {
            Error::new(Code::VersionMismatch, message).with("version", found).with("max", bundle::VERSION)
        }
        BundleError::Value { field: "octets", limit, .. } => {
            let message = format!("{message}: there is no more room on the data partition");
            Error::disk_full(message).with("max", limit)
        }
        BundleError::Value { field: field @ ("memory_bytes" | "disk_bytes" | "layers"), limit, .. } => {
            Error::new(Code::OutOfRange, message).with("argument", field).with("max", limit)
        }
        BundleError::Io { cause, .. }
            if matches!(cause.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::BrokenPipe) =>
        {
            Error::new(Code::LinkLost, message)
        }
        BundleError::Io { cause, .. } => Error::of_io(Code::Internal, message, cause),
        _ => Error::new(Code::Corrupt, message),
    }
}
