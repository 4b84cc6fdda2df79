//! Long stacks of frozen layers are merged in the background, one run of layers at a time (`Store::merge_plan`).
//!
//! The merged layer is a new file. When it is on the medium, one transaction puts its row and changes all that referred to
//! the layers that it stands for; their rows and files go after that. Disks that are open go on with the files that they have.

use std::fs::{self, File};
use std::io;
use std::time::Duration;

use super::faults::{self, Point};
use super::fork::RollingBack;
use super::snapshots::Then;
use super::supervisor::{Done, Supervisor, Timer};
use crate::sandbox::id::SandboxId;
use crate::storage::memory_file::taken;
use crate::storage::overlay;
use crate::storage::snapshots::Shelves;
use crate::storage::snapshots::files::unhindered;
use crate::storage::snapshots::store::{Dependent, Merge};
use crate::storage::state::{Change, LayerRow};
use crate::wire::Error;

/// Most frozen layers of a disk that are left as they are, where nobody needs them one by one.
const LONGEST: usize = 8;
/// Pause before a merge is tried again that failed.
const AGAIN: Duration = Duration::from_secs(60);

/// The merge that is under way.
#[derive(Debug)]
pub(super) struct Merging {
    plan: Merge,
    /// Id of the layer to come.
    pub layer: String,
    /// Its rows are on their way to the database: what they stand for has to stay.
    pub committing: bool,
}

impl Supervisor {
    /// Begins a merge where there is one to do and none under way.
    pub(super) fn merge_layers(&mut self) {
        if self.snapshots.merging.is_some() || self.stopping.is_some() {
            return;
        }
        let Some(plan) = self.snapshots.store.merge_plan(LONGEST).into_iter().next() else { return };
        let layer = match SandboxId::random() {
            Ok(id) => id.to_string(),
            Err(e) => return log::error!("no random id: {e}"),
        };
        let (shelves, layers, id) = (self.snapshots.shelves.clone(), plan.layers.clone(), layer.clone());
        let started = self.background.run("merge", move || {
            let result = merge(&shelves, &layers, &id);
            if result.is_err() {
                drop_file(&shelves, &id);
            }
            Done::Merged(result)
        });
        match started {
            Ok(()) => self.snapshots.merging = Some(Merging { plan, layer, committing: false }),
            Err(e) => {
                log::error!("no thread to merge layers: {e}");
                self.timers.after(AGAIN, Timer::Merge);
            }
        }
    }

    /// A merged layer is on the medium, with the room that it takes; or there is none.
    pub(super) fn merged(&mut self, result: io::Result<u64>) {
        let Some(merging) = &mut self.snapshots.merging else { return };
        let bytes = match result {
            Ok(bytes) => bytes,
            Err(e) => {
                log::warn!("{} layers of a disk cannot be merged: {e}", merging.plan.layers.len());
                self.snapshots.merging = None;
                self.timers.after(AGAIN, Timer::Merge);
                return self.sweep_snapshots();
            }
        };
        merging.committing = true;
        let (plan, id) = (merging.plan.clone(), merging.layer.clone());
        if !is_still_so(&self.snapshots.store, &plan) {
            // Somebody removed what they were for, say.
            self.drop_merged(&id);
            return;
        }
        let merged = LayerRow { id: id.clone(), below: plan.below.clone(), bytes };
        let (layers, snapshots) = self.snapshots.store.replace_layers(&plan, &merged);
        let mut changes: Vec<Change> = layers.iter().cloned().map(Change::PutLayer).collect();
        changes.extend(snapshots.iter().cloned().map(|row| Change::PutSnapshot(Box::new(row))));
        layers.into_iter().for_each(|row| self.snapshots.store.put_layer(row));
        snapshots.into_iter().for_each(|row| self.snapshots.store.put_snapshot(row));
        changes.extend(self.follow(&plan.layers[0], &id));
        let ticket = self.database.submit_durable(Change::Together(changes));
        self.snapshots.after(ticket, Then::Merged);
    }

    /// Sandboxes whose newest layer was `from` have `to`: the changes of their rows.
    fn follow(&mut self, from: &str, to: &str) -> Vec<Change> {
        let mut changes = Vec::new();
        let mut changed = Vec::new();
        for sandbox in self.sandboxes.values_mut() {
            if let Some(RollingBack::Recording(before)) = &mut sandbox.rolling_back
                && before.layer.as_deref() == Some(from)
            {
                before.layer = Some(to.to_string());
            }
            if sandbox.layer.as_deref() == Some(from) {
                sandbox.layer = Some(to.to_string());
                changed.push(sandbox.id.clone());
                if !sandbox.removing {
                    changes.push(Change::PutSandbox(Box::new(sandbox.row())));
                }
            }
        }
        changed.iter().for_each(|id| self.hold(id));
        changes
    }

    /// The rows of a merge are in the database: what it stands for goes. Or they were refused, and all is as it was.
    pub(super) fn merge_written(&mut self, refused: Option<&Error>) {
        let Some(merging) = &self.snapshots.merging else { return };
        let (plan, id) = (merging.plan.clone(), merging.layer.clone());
        if refused.is_none() {
            faults::pass(Point::MergeWritten);
            log::info!("{} frozen layers were merged to {id}", plan.layers.len());
            self.snapshots.merging = None;
            // This asks for the next one, too.
            self.collect();
            return self.sweep_snapshots();
        }
        // Rows that were written meanwhile may have the merged layer: they are put again.
        let newest = plan.layers[0].clone();
        let store = &mut self.snapshots.store;
        let back = |layer: &Option<String>| layer.as_ref() == Some(&id);
        let layers: Vec<LayerRow> = store.layers().filter(|row| back(&row.below)).cloned().collect();
        let snapshots: Vec<_> = store.snapshots().filter(|row| back(&row.layer)).cloned().collect();
        let mut changes = Vec::new();
        for row in layers {
            let row = LayerRow { below: Some(newest.clone()), ..row };
            changes.push(Change::PutLayer(row.clone()));
            store.put_layer(row);
        }
        for mut row in snapshots {
            row.layer = Some(newest.clone());
            changes.push(Change::PutSnapshot(Box::new(row.clone())));
            store.put_snapshot(row);
        }
        store.remove_layer(&id);
        changes.extend(self.follow(&id, &newest));
        self.database.submit(Change::Together(changes));
        self.drop_merged(&id);
    }

    /// A merge came to nothing: its file goes, and it is looked again later whether there is one to do.
    fn drop_merged(&mut self, id: &str) {
        self.snapshots.merging = None;
        let (shelves, id) = (self.snapshots.shelves.clone(), id.to_string());
        self.clear(move || drop_file(&shelves, &id));
        self.timers.after(AGAIN, Timer::Merge);
        self.sweep_snapshots();
    }
}

/// Whether a plan can still be carried out: its layers are one over the other, and nobody needs those below the first.
fn is_still_so(store: &crate::storage::snapshots::Store, plan: &Merge) -> bool {
    let below = |at: usize| plan.layers.get(at + 1).or(plan.below.as_ref());
    plan.layers.iter().enumerate().all(|(at, id)| {
        let alone = |above: &String| store.layer_dependents(id) == [Dependent::Layer(above.clone())];
        store.layer(id).is_some_and(|row| row.below.as_ref() == below(at))
            && at.checked_sub(1).is_none_or(|above| alone(&plan.layers[above]))
    })
}

/// Merges layers, newest first, to one of that id. Gives the room that it takes; it is on the medium with its name. Blocks.
fn merge(shelves: &Shelves, layers: &[String], id: &str) -> io::Result<u64> {
    let files = shelves.open_layers(layers)?;
    let out = shelves.make_layer(id)?;
    faults::reached(Point::MergeBegun)?;
    overlay::merge(&files.iter().collect::<Vec<&File>>(), &out).map_err(io::Error::other)?;
    shelves.sync_layers(&mut unhindered)?;
    faults::reached(Point::MergeSynced)?;
    taken(&out)
}

fn drop_file(shelves: &Shelves, id: &str) {
    if let Err(e) = fs::remove_file(shelves.layer(id))
        && e.kind() != io::ErrorKind::NotFound
    {
        log::error!("layer {id}, which nobody has, stays: {e}");
    }
}
