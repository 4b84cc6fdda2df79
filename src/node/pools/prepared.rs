//! Workers that have made what they can of a template's snapshot before anybody asks for a sandbox of it.
//!
//! Sandboxes often start from the same template one after the other. So of the workers that wait, some map the memory of the
//! snapshot that the last sandbox went on from, make the virtual machine and its processors, and map for it what such
//! guests touch at once. A request that goes on from that snapshot gets one of them. One that does not loses nothing: a
//! worker that is started otherwise drops what it prepared.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;

use super::workers::Idle;
use crate::node::supervisor::Supervisor;
use crate::sandbox::worker;
use crate::storage::snapshots::{SnapshotKind, SnapshotRow};
use crate::wire::Request;

/// Tag of the request on a worker's link.
pub(in crate::node) const PREPARE: &str = "prepare";

/// What a worker that waits was told to prepare.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::node) struct Prepared {
    /// The snapshot.
    pub snapshot: String,
    /// It was told what such guests touch.
    with_set: bool,
}

impl Supervisor {
    /// Sandboxes go on from a template's snapshot: the next ones are likely to do the same.
    pub(in crate::node) fn prefer_snapshot(&mut self, row: &SnapshotRow) {
        if row.kind == SnapshotKind::Template && self.pools.preferred.as_ref() != Some(&row.id) {
            self.pools.preferred = Some(row.id.clone());
        }
        self.pools.look = true;
    }

    /// Whether sandboxes can go on from a snapshot of a template.
    fn is_usable(&self, snapshot: &str) -> bool {
        let row = self.snapshots.ready(snapshot);
        row.is_ok_and(|row| row.kind == SnapshotKind::Template) && !self.snapshots.unfit.contains(snapshot)
    }

    /// Has workers that wait prepare what is likely to be asked for. One that has prepared what nobody can ask for any more
    /// ends: it would keep files that were removed.
    pub(super) fn tend_prepared(&mut self) {
        let stale = |node: &Self, idle: &Idle| idle.prepared.as_ref().is_some_and(|p| !node.is_usable(&p.snapshot));
        let stale: Vec<_> = self.pools.workers.ready().filter(|idle| stale(self, idle)).map(|i| i.id.clone()).collect();
        for id in stale {
            if let Some(item) = self.pools.workers.lost(|idle| idle.id == id) {
                self.end_idle(item);
            }
        }
        // What is on its way comes first: `runs` has this looked at again.
        if self.sandboxes.values().any(|sandbox| sandbox.is_booting() && sandbox.parked.is_none()) {
            return;
        }
        let Some(snapshot) = self.pools.preferred.clone() else { return };
        if !self.is_usable(&snapshot) {
            self.pools.preferred = None;
            return;
        }
        let Ok(row) = self.snapshots.ready(&snapshot).cloned() else { return };
        let set = File::open(self.snapshots.shelves.working_set(&snapshot)).ok();
        let wanted = Prepared { snapshot, with_set: set.is_some() };
        let most = usize::try_from(self.config.sandbox.prepared).unwrap_or(usize::MAX);
        let is_wanted = |idle: &&Idle| idle.prepared.as_ref() == Some(&wanted);
        let mut missing = most.saturating_sub(self.pools.workers.ready().filter(is_wanted).count());
        let files = match missing {
            0 => return,
            _ => OpenOptions::new().read(true).write(true).open("/dev/kvm"),
        };
        let files = files.and_then(|kvm| self.snapshots.open(&wanted.snapshot).map(|files| (kvm, files)));
        let (kvm, (state, memory)) = match files {
            Ok(files) => files,
            Err(e) => {
                log::warn!("nothing of snapshot {} can be prepared: {e}", wanted.snapshot);
                self.pools.preferred = None;
                return;
            }
        };
        for idle in self.pools.workers.ready_mut() {
            if missing == 0 {
                break;
            }
            if idle.prepared.as_ref() == Some(&wanted) {
                continue;
            }
            let mut request = Request::new(PREPARE, "vm.prepare")
                .set("name", &wanted.snapshot)
                .set("vcpus", row.vcpus)
                .set("memory_mib", row.memory_bytes >> 20)
                .set("kvm", "fd:0")
                .set("state", "fd:1")
                .set("memory", "fd:2");
            let mut descriptors = vec![kvm.as_fd(), state.as_fd(), memory.as_fd()];
            if let Some(set) = &set {
                request = request.set("working_set", "fd:3");
                descriptors.push(set.as_fd());
            }
            // Whether it does, is seen when it is started: it goes on without, and its answer is in the log.
            let sent: io::Result<()> = worker::send_with_descriptors(&idle.berth.link, request, &descriptors);
            if let Err(e) = sent {
                log::warn!("worker {} cannot be told to prepare: {e}", idle.berth.pid);
            }
            idle.prepared = Some(wanted.clone());
            missing -= 1;
        }
    }
}
