//! Files of snapshots and layers, and the order in which files and rows change, so that a supervisor that is killed or a
//! power cut at any point leaves the old or the new.
//!
//! A sandbox's own overlay has a name that stands in its row; each freeze gives it another. So a row decides which of two
//! overlays is in use, and nothing is ever renamed.
//!
//! A snapshot of a sandbox that runs on:
//!
//! 1. its row, `making`, with the id of the layer and the name of the overlay to come: durable
//! 2. `begin`: directory, files, next overlay: on the medium
//! 3. the worker, its guest paused: `Overlay::push` of the next overlay, state, memory
//! 4. `settle`: all synced; the old overlay is linked as the layer
//! 5. one transaction: snapshot `ready`, the layer's row, the sandbox's `layer` and `overlay`: durable
//! 6. `drop_overlay`: the old overlay's name in the sandbox's directory goes
//!
//! Until 5 there is no snapshot. But from 3 on the guest may have written to the next overlay, and have been told that it is
//! on the medium: so `recover` carries the disk's half forward wherever the next overlay is there, which changes nothing
//! that a guest can see: an empty overlay over a frozen one is the same disk.
//!
//! Memory that is a difference to another's has a name of its own, `difference`: a reader that knows of none finds no
//! memory rather than half of one. It is made whole (`flatten`), gets the name `memory`, and then its row changes.
//!
//! A pause has no layer and no next overlay; 5 makes its sandbox paused as well. A rollback makes an overlay, changes
//! `layer`, `overlay` and `snapshot` of the row, and drops the old one. A removal changes the row to `removing`; rows that
//! nobody needs (`Store::garbage`) go in one transaction, their files after it (`sweep`).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::rows::{LayerRow, SnapshotState};
use super::store::{Flatten, Garbage, Store};
use crate::storage::memory_file::{self, MemoryFileError, taken};
use crate::storage::overlay::{self, OverlayError};
use crate::storage::state::Change;

/// Name of a sandbox's own overlay where its row has none; those of others begin with it.
pub const OVERLAY: &str = "overlay";

/// A point between two steps: where a test has the supervisor die.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FaultPoint {
    /// The row of a snapshot that is being made is written.
    RowWritten,
    /// Its directory is there.
    DirectoryMade,
    /// Its files are there, empty.
    FilesMade,
    /// The overlay that a sandbox goes on with is there.
    OverlayMade,
    /// The worker has frozen the old overlay.
    Pushed,
    /// The guest runs again, or is gone.
    Captured,
    /// State and memory are on the medium.
    FilesSynced,
    /// The old overlay has its name as a layer.
    LayerLinked,
    /// The transaction that makes it so is written.
    Committed,
    /// The old overlay's name is gone.
    OverlayDropped,
    /// The holes of a memory file that is a difference are filled.
    Filled,
    /// A flattened memory file or merged layer is on the medium.
    Copied,
    /// A row says that something is to be removed, or that it is gone.
    RemovalWritten,
    /// A file or directory without a row is gone.
    Swept,
}

impl FaultPoint {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::RowWritten,
        Self::DirectoryMade,
        Self::FilesMade,
        Self::OverlayMade,
        Self::Pushed,
        Self::Captured,
        Self::FilesSynced,
        Self::LayerLinked,
        Self::Committed,
        Self::OverlayDropped,
        Self::Filled,
        Self::Copied,
        Self::RemovalWritten,
        Self::Swept,
    ];
}

/// Called at each point; an error ends the work there.
pub type Reached<'a> = &'a mut dyn FnMut(FaultPoint) -> io::Result<()>;

/// Goes on at every point.
pub fn unhindered(_: FaultPoint) -> io::Result<()> {
    Ok(())
}

/// What an overlay is made for; see `overlay::create`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Size of the disk, in octets.
    pub disk_bytes: u64,
    /// Size of the base, in octets.
    pub base_bytes: u64,
    /// Digest of the base.
    pub base_sha256: [u8; 32],
}

/// Where snapshots and layers are.
#[derive(Debug, Clone)]
pub struct Shelves {
    snapshots: PathBuf,
    layers: PathBuf,
}

/// Names of files of snapshots and layers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listed {
    /// `ID/NAME`; `ID/` of an empty directory.
    pub snapshots: BTreeSet<String>,
    /// Ids.
    pub layers: BTreeSet<String>,
}

/// The empty files of a snapshot, for its worker.
#[derive(Debug)]
pub struct SnapshotFiles {
    /// Readable and writable.
    pub state: File,
    /// Readable and writable, of the memory's length.
    pub memory: File,
}

impl Shelves {
    /// Beside the sandboxes' directories, which have to be on the same file system: overlays become layers by a link.
    pub fn beside(sandboxes: &Path) -> Self {
        let parent = sandboxes.parent().unwrap_or(sandboxes);
        Self { snapshots: parent.join("snapshots"), layers: parent.join("layers") }
    }

    /// Makes the directories that are not there.
    pub fn prepare(&self) -> io::Result<()> {
        for dir in [&self.snapshots, &self.layers] {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        }
        Ok(())
    }

    /// Directory of a snapshot.
    pub fn snapshot(&self, id: &str) -> PathBuf {
        self.snapshots.join(id)
    }

    /// State file of a snapshot.
    pub fn state(&self, id: &str) -> PathBuf {
        self.snapshot(id).join("state")
    }

    /// Memory file of a snapshot, flat.
    pub fn memory(&self, id: &str) -> PathBuf {
        self.snapshot(id).join("memory")
    }

    /// Memory file of a snapshot as long as it is a difference to another's.
    pub fn difference(&self, id: &str) -> PathBuf {
        self.snapshot(id).join("difference")
    }

    /// Memory file of a snapshot, whichever it is, for reading.
    pub fn open_memory(&self, id: &str) -> io::Result<File> {
        match File::open(self.difference(id)) {
            Err(e) if e.kind() == ErrorKind::NotFound => File::open(self.memory(id)),
            other => other,
        }
    }

    /// What guests that go on from a snapshot change at once. A hint: it may be missing.
    pub fn working_set(&self, id: &str) -> PathBuf {
        self.snapshot(id).join("working-set")
    }

    /// File of a frozen layer.
    pub fn layer(&self, id: &str) -> PathBuf {
        self.layers.join(id)
    }

    /// State and memory of a snapshot, for reading.
    pub fn open(&self, id: &str) -> io::Result<(File, File)> {
        Ok((File::open(self.state(id))?, File::open(self.memory(id))?))
    }

    /// Opens layers for reading, in the order of `ids`.
    pub fn open_layers(&self, ids: &[String]) -> io::Result<Vec<File>> {
        ids.iter().map(|id| File::open(self.layer(id))).collect()
    }

    /// Step 2: makes a snapshot's directory with its empty files; `memory_bytes` as in its row.
    pub fn begin(&self, id: &str, memory_bytes: u64, reached: Reached<'_>) -> io::Result<SnapshotFiles> {
        fs::DirBuilder::new().mode(0o700).create(self.snapshot(id))?;
        reached(FaultPoint::DirectoryMade)?;
        let files = SnapshotFiles { state: make(&self.state(id))?, memory: make(&self.memory(id))? };
        memory_file::create(&files.memory, memory_bytes).map_err(io::Error::other)?;
        reached(FaultPoint::FilesMade)?;
        Ok(files)
    }

    /// Step 4, first half: state and memory are on the medium on return; the memory as the difference that it is, where it
    /// is one. Gives the room that they take.
    pub fn sync(&self, id: &str, is_difference: bool, reached: Reached<'_>) -> io::Result<u64> {
        if is_difference {
            fs::rename(self.memory(id), self.difference(id))?;
        }
        let (state, memory) = (File::open(self.state(id))?, self.open_memory(id)?);
        state.sync_all()?;
        memory.sync_all()?;
        sync_dir(&self.snapshot(id))?;
        sync_dir(&self.snapshots)?;
        reached(FaultPoint::FilesSynced)?;
        Ok(taken(&state)?.saturating_add(taken(&memory)?))
    }

    /// Makes the memory of a snapshot flat: it is on the medium with that name on return, also where it was before. What it
    /// was a difference to has to stay until no row says so any more. Gives the room that its files take.
    ///
    /// # Errors
    /// Then it is the difference that it was, and takes no more room.
    pub fn flatten(&self, step: &Flatten, memory_bytes: u64, reached: Reached<'_>) -> Result<u64, MemoryFileError> {
        let io = |doing| move |cause| MemoryFileError::Io { doing, cause };
        let id = &step.snapshot;
        match File::options().read(true).write(true).open(self.difference(id)) {
            Ok(diff) => {
                for below in &step.below {
                    let below = self.open_memory(below).map_err(io("opening what is below the diff"))?;
                    memory_file::flatten(&diff, &below, memory_bytes)?;
                    reached(FaultPoint::Filled).map_err(io("copying pages into the diff"))?;
                }
                fs::rename(self.difference(id), self.memory(id)).map_err(io("renaming the diff"))?;
            }
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(io("opening the diff")(e)),
        }
        sync_dir(&self.snapshot(id)).map_err(io("syncing its directory"))?;
        reached(FaultPoint::Copied).map_err(io("syncing its directory"))?;
        let room = || Ok(taken(&File::open(self.state(id))?)?.saturating_add(taken(&File::open(self.memory(id))?)?));
        room().map_err(io("measuring the memory file"))
    }

    /// Step 4, second half: a sandbox's overlay gets its name as a layer, if it has not got it yet. Gives the room that it
    /// takes.
    pub fn link_layer(&self, overlay: &Path, id: &str, reached: Reached<'_>) -> io::Result<u64> {
        let layer = self.layer(id);
        match fs::hard_link(overlay, &layer) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists && is_same(overlay, &layer)? => {}
            other => other?,
        }
        sync_dir(&self.layers)?;
        reached(FaultPoint::LayerLinked)?;
        taken(&File::open(layer)?)
    }

    /// Makes the directory of a snapshot that is imported, with its state file: readable and writable. Without a row it is
    /// swept at the next start, as the others of it are.
    pub fn make_state(&self, id: &str) -> io::Result<File> {
        fs::DirBuilder::new().mode(0o700).create(self.snapshot(id))?;
        make(&self.state(id))
    }

    /// Makes the memory file of a snapshot that is imported, in its directory: readable and writable.
    pub fn make_memory(&self, id: &str) -> io::Result<File> {
        make(&self.memory(id))
    }

    /// Makes a file for a merged or imported layer: readable and writable. Without a row it is swept at the next start.
    pub fn make_layer(&self, id: &str) -> io::Result<File> {
        make(&self.layer(id))
    }

    /// A file that `make_layer` made is on the medium with its name.
    pub fn sync_layers(&self, reached: Reached<'_>) -> io::Result<()> {
        sync_dir(&self.layers)?;
        reached(FaultPoint::Copied)
    }

    /// What is there: state and memory files as `ID/state` and `ID/memory` or `ID/difference`, with whatever else is beside them, and layers.
    pub fn list(&self) -> io::Result<Listed> {
        let mut listed = Listed { layers: names(&self.layers)?.into_iter().collect(), ..Listed::default() };
        for id in names(&self.snapshots)? {
            let files = match names(&self.snapshot(&id)) {
                // No directory.
                Err(_) => vec![String::new()],
                Ok(files) => files,
            };
            listed.snapshots.extend(files.iter().map(|name| format!("{id}/{name}")));
            if files.is_empty() {
                listed.snapshots.insert(format!("{id}/"));
            }
        }
        Ok(listed)
    }

    /// Takes away what has no row: directories of snapshots, files of layers, overlays that a sandbox neither uses nor goes on
    /// with. `owners` are all sandboxes that have a directory and a row. Nobody may be making layers meanwhile.
    pub fn sweep(&self, store: &Store, owners: &BTreeMap<String, Owner>, reached: Reached<'_>) -> io::Result<()> {
        for name in names(&self.snapshots)? {
            if store.snapshot(&name).is_none() {
                remove(&self.snapshot(&name))?;
                reached(FaultPoint::Swept)?;
            }
        }
        for name in names(&self.layers)? {
            if store.layer(&name).is_none() {
                remove(&self.layer(&name))?;
                reached(FaultPoint::Swept)?;
            }
        }
        let next = store.interrupted();
        let next: BTreeSet<(&str, &str)> =
            next.iter().filter_map(|row| Some((row.sandbox.as_deref()?, row.next_overlay.as_deref()?))).collect();
        for (id, owner) in owners {
            for name in names(&owner.home)? {
                let used = name == owner.overlay || next.contains(&(id.as_str(), name.as_str()));
                if name.starts_with(OVERLAY) && !used {
                    remove(&owner.home.join(&name))?;
                    reached(FaultPoint::Swept)?;
                }
            }
        }
        Ok(())
    }
}

/// A sandbox that has a directory, as `recover` and `sweep` need it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// Its directory.
    pub home: PathBuf,
    /// Name of its own overlay, as its row has it (`OVERLAY` where that has none).
    pub overlay: String,
    /// Where its worker lives: whether that has frozen the overlay and goes on with the next, as the worker says. (How many
    /// layers it has does not tell: merges change the rows' number.) `None` where there is no worker.
    pub pushed: Option<bool>,
}

/// Step 2: makes an empty overlay in a sandbox's directory. It is on the medium on return, so that a push is quick.
pub fn make_overlay(home: &Path, name: &str, shape: &Shape, reached: Reached<'_>) -> io::Result<File> {
    let file = make(&home.join(name))?;
    let created = overlay::create(&file, shape.disk_bytes, shape.base_bytes, shape.base_sha256);
    // A full disk is to be known as one.
    created.map_err(|e| match e {
        OverlayError::Io { cause, .. } if cause.raw_os_error().is_some() => cause,
        other => io::Error::other(other),
    })?;
    file.sync_all()?;
    sync_dir(home)?;
    reached(FaultPoint::OverlayMade)?;
    Ok(file)
}

/// Step 6: an overlay that no row names goes from a sandbox's directory.
pub fn drop_overlay(home: &Path, name: &str, reached: Reached<'_>) -> io::Result<()> {
    remove(&home.join(name))?;
    reached(FaultPoint::OverlayDropped)
}

/// At a start: what becomes of the snapshots that were being made. It carries the disks' half of each forward where the
/// guest may have gone on with its next overlay, and gives the changes, which the caller commits together, durably. Then
/// rows that nobody needs go (`garbage_changes`), and `sweep` takes the rest.
pub fn recover(
    store: &Store,
    owners: &BTreeMap<String, Owner>,
    shelves: &Shelves,
    reached: Reached<'_>,
) -> io::Result<Vec<Change>> {
    let mut changes = Vec::new();
    for row in store.interrupted() {
        changes.push(Change::RemoveSnapshot { id: row.id.clone() });
        let (Some(id), Some(next), Some(layer)) = (&row.sandbox, &row.next_overlay, &row.layer) else { continue };
        let Some(owner) = owners.get(id) else { continue };
        let is_there = owner.home.join(next).try_exists()?;
        if !is_there || owner.overlay == *next || owner.pushed == Some(false) {
            continue;
        }
        let bytes = shelves.link_layer(&owner.home.join(&owner.overlay), layer, reached)?;
        let holding = store.holding(id).cloned().unwrap_or_default();
        changes.push(Change::PutLayer(LayerRow { id: layer.clone(), below: holding.layer, bytes }));
        changes.push(Change::Rebase {
            id: id.clone(),
            layer: Some(layer.clone()),
            snapshot: holding.snapshot,
            overlay: Some(next.clone()),
        });
    }
    Ok(changes)
}

/// The changes that remove rows, to be committed together.
pub fn garbage_changes(garbage: &Garbage) -> Vec<Change> {
    let snapshots = garbage.snapshots.iter().map(|id| Change::RemoveSnapshot { id: id.clone() });
    snapshots.chain(garbage.layers.iter().map(|id| Change::RemoveLayer { id: id.clone() })).collect()
}

/// The change that makes a snapshot one that is being removed: nobody sees it from then on, and its name is free.
pub fn removal(store: &Store, id: &str) -> Option<Change> {
    let mut row = store.snapshot(id)?.clone();
    row.state = SnapshotState::Removing;
    Some(Change::PutSnapshot(Box::new(row)))
}

fn make(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
}

fn remove(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    match removed {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn is_same(one: &Path, other: &Path) -> io::Result<bool> {
    let (one, other) = (fs::symlink_metadata(one)?, fs::symlink_metadata(other)?);
    Ok((one.dev(), one.ino()) == (other.dev(), other.ino()))
}

/// Names in a directory that are UTF-8, as all of ours are; none where it is not there.
fn names(dir: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry?.file_name().into_string());
    }
    Ok(names)
}
