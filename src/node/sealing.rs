//! Memory files of snapshots are sealed (`storage::verity`) one after the other, once they are ready: until then they are
//! used as they are. Where the file system has no seals, nothing is done.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::supervisor::{Done, Supervisor};
use crate::storage::snapshots::{SnapshotKind, SnapshotRow, SnapshotState};
use crate::storage::space::data_extents;
use crate::storage::state::Change;
use crate::storage::verity::{self, Digest, SealError};

/// How often, and after which pauses, a file is tried again that its writer has not closed yet.
const TRIES: u32 = 50;
const AGAIN: Duration = Duration::from_millis(100);

/// What is known of sealing.
#[derive(Debug, Default)]
pub(super) struct Seals {
    /// The snapshot whose memory is being sealed.
    under_way: Option<String>,
    /// The file system has none.
    unsupported: bool,
    /// Snapshots whose memory could not be sealed.
    failed: BTreeSet<String>,
}

impl Supervisor {
    /// Seals the next memory file that is ready and is not sealed.
    pub(super) fn seal_snapshots(&mut self) {
        let seals = &self.snapshots.seals;
        if seals.under_way.is_some() || seals.unsupported || self.stopping.is_some() {
            return;
        }
        let next = self.snapshots.store.snapshots().find(|row| {
            let stays = matches!(row.kind, SnapshotKind::Snapshot | SnapshotKind::Template);
            let whole = row.state == SnapshotState::Ready && row.memory_below.is_none() && row.memory_seal.is_none();
            stays && whole && !seals.failed.contains(&row.id)
        });
        let Some(id) = next.map(|row| row.id.clone()) else { return };
        let (path, snapshot) = (self.snapshots.shelves.memory(&id), id.clone());
        match self.background.run("seal", move || Done::Sealed { snapshot, result: seal(&path) }) {
            Ok(()) => self.snapshots.seals.under_way = Some(id),
            Err(e) => log::warn!("no thread to seal a snapshot's memory: {e}"),
        }
    }

    /// A memory file is sealed, or cannot be.
    pub(super) fn sealed(&mut self, id: &str, result: Result<Digest, SealError>) {
        self.snapshots.seals.under_way = None;
        let row = self.snapshots.store.snapshot(id).filter(|row| row.state == SnapshotState::Ready).cloned();
        match (result, row) {
            (Ok(digest), Some(row)) => {
                let row = SnapshotRow { memory_seal: Some(verity::to_hex(&digest)), ..row };
                self.snapshots.store.put_snapshot(row.clone());
                self.database.submit(Change::PutSnapshot(Box::new(row)));
            }
            (Err(SealError::Unsupported), _) => {
                log::info!("snapshots are not sealed: the data partition's file system has no fs-verity");
                self.snapshots.seals.unsupported = true;
            }
            (Err(e), Some(_)) => {
                log::warn!("the memory of snapshot {id} is not sealed: {e}");
                self.snapshots.seals.failed.insert(id.to_string());
            }
            // It is gone.
            (_, None) => {}
        }
        self.seal_snapshots();
    }
}

/// Seals a file, as the only thing that this thread does: it takes what processor time nobody else wants. Blocks.
fn seal(path: &Path) -> Result<Digest, SealError> {
    let idle = libc::sched_param { sched_priority: 0 };
    // SAFETY: the kernel reads a live struct, and changes nothing but how this thread is scheduled.
    if unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const idle) } != 0 {
        log::warn!("a seal is not made in idle time only: {}", std::io::Error::last_os_error());
    }
    let file = File::open(path).map_err(SealError::Io)?;
    let mut tries = 0;
    let digest = loop {
        match verity::seal(&file) {
            Err(SealError::InUse) if tries < TRIES => {
                tries += 1;
                std::thread::sleep(AGAIN);
            }
            other => break other?,
        }
    };
    // The tree is over the holes too: their zeroes need not stay in memory.
    let len = file.metadata().map_err(SealError::Io)?.len();
    let mut hole = 0;
    for extent in data_extents(&file, 0..len) {
        let extent = extent.map_err(SealError::Io)?;
        forget(&file, hole, extent.start);
        hole = extent.end;
    }
    forget(&file, hole, len);
    Ok(digest)
}

/// Lets the kernel drop a range of a file from memory, where it can.
fn forget(file: &File, from: u64, to: u64) {
    if let (Ok(offset), Ok(len)) = (i64::try_from(from), i64::try_from(to - from))
        && len > 0
        && let Err(e) = posix_fadvise(file.as_fd(), offset, len, PosixFadviseAdvice::POSIX_FADV_DONTNEED)
    {
        log::warn!("a sealed file stays in memory: {e}");
    }
}
