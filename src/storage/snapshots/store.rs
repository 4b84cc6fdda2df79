//! What of snapshots and frozen layers is needed, by whom, and what can go. Plain data: the rows, and questions about them.
//!
//! Whether something is needed follows from who can reach it along `below`, `layer` and `snapshot`; it is never counted.
//! A row whose reference leads nowhere keeps nothing alive, and loops end.

use std::collections::{BTreeMap, BTreeSet};

use super::rows::{LayerRow, SnapshotKind, SnapshotRow, SnapshotState};

/// What of frozen files a sandbox needs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Holding {
    /// The newest frozen layer under its own overlay.
    pub layer: Option<String>,
    /// The snapshot that it is paused in, or whose memory file its worker maps.
    pub snapshot: Option<String>,
}

/// The rows.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Store {
    snapshots: BTreeMap<String, SnapshotRow>,
    layers: BTreeMap<String, LayerRow>,
    sandboxes: BTreeMap<String, Holding>,
}

/// Rows that nobody needs. They are removed in one transaction, and their files after it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Garbage {
    /// Snapshots.
    pub snapshots: Vec<String>,
    /// Frozen layers.
    pub layers: Vec<String>,
}

/// Who needs something.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dependent {
    /// A sandbox, for its disk or memory.
    Sandbox(String),
    /// A snapshot, for its disk or memory.
    Snapshot(String),
    /// A frozen layer above.
    Layer(String),
}

/// A diff that can be made flat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flatten {
    /// Whose memory file.
    pub snapshot: String,
    /// What fills its holes, one after the other (`memory_file::flatten`): the last one is flat. Its `memory_below` is
    /// `None` afterwards.
    pub below: Vec<String>,
}

/// Frozen layers that can be made one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Merge {
    /// They follow each other, newest first, at least two. Only the newest is referred to by anything but one of them: the
    /// new layer takes its place, over what is below the oldest.
    pub layers: Vec<String>,
    /// What is below the oldest.
    pub below: Option<String>,
}

impl Store {
    /// With these rows.
    pub fn new(
        snapshots: impl IntoIterator<Item = SnapshotRow>,
        layers: impl IntoIterator<Item = LayerRow>,
        sandboxes: impl IntoIterator<Item = (String, Holding)>,
    ) -> Self {
        Self {
            snapshots: snapshots.into_iter().map(|row| (row.id.clone(), row)).collect(),
            layers: layers.into_iter().map(|row| (row.id.clone(), row)).collect(),
            sandboxes: sandboxes.into_iter().collect(),
        }
    }

    // ---- Rows ----

    /// All snapshots, by id.
    pub fn snapshots(&self) -> impl Iterator<Item = &SnapshotRow> {
        self.snapshots.values()
    }

    /// All frozen layers, by id.
    pub fn layers(&self) -> impl Iterator<Item = &LayerRow> {
        self.layers.values()
    }

    /// One snapshot.
    pub fn snapshot(&self, id: &str) -> Option<&SnapshotRow> {
        self.snapshots.get(id)
    }

    /// One layer.
    pub fn layer(&self, id: &str) -> Option<&LayerRow> {
        self.layers.get(id)
    }

    /// What a sandbox has of frozen files.
    pub fn holding(&self, sandbox: &str) -> Option<&Holding> {
        self.sandboxes.get(sandbox)
    }

    /// Adds or replaces a snapshot.
    pub fn put_snapshot(&mut self, row: SnapshotRow) {
        self.snapshots.insert(row.id.clone(), row);
    }

    /// Forgets a snapshot.
    pub fn remove_snapshot(&mut self, id: &str) -> Option<SnapshotRow> {
        self.snapshots.remove(id)
    }

    /// Adds or replaces a layer.
    pub fn put_layer(&mut self, row: LayerRow) {
        self.layers.insert(row.id.clone(), row);
    }

    /// Forgets a layer.
    pub fn remove_layer(&mut self, id: &str) -> Option<LayerRow> {
        self.layers.remove(id)
    }

    /// What a sandbox has of frozen files from now on.
    pub fn hold(&mut self, sandbox: &str, holding: Holding) {
        self.sandboxes.insert(sandbox.to_string(), holding);
    }

    /// A sandbox is gone.
    pub fn release(&mut self, sandbox: &str) {
        self.sandboxes.remove(sandbox);
    }

    // ---- Questions ----

    /// The frozen layers from `newest` down to the base: what `Overlay::open` and `layer=` take. `None` where one of
    /// them is missing, or they go in a circle.
    pub fn layers_from(&self, newest: Option<&str>) -> Option<Vec<String>> {
        chain(newest, self.layers.len(), |id| Some(self.layers.get(id)?.below.as_deref()))
    }

    /// The snapshots whose memory shows in the holes of this one's, the nearest first. `None` where one of them is
    /// missing, or they go in a circle.
    pub fn memory_below(&self, id: &str) -> Option<Vec<String>> {
        let first = self.snapshots.get(id)?.memory_below.as_deref();
        chain(first, self.snapshots.len(), |id| Some(self.snapshots.get(id)?.memory_below.as_deref()))
    }

    /// Snapshots that were being made when the supervisor ended: at a start, nobody makes them any more. What becomes of
    /// them: `files::recover`.
    pub fn interrupted(&self) -> Vec<&SnapshotRow> {
        self.snapshots.values().filter(|row| row.state == SnapshotState::Making).collect()
    }

    /// Whether a snapshot is there for its own sake.
    fn stays(row: &SnapshotRow) -> bool {
        match row.state {
            SnapshotState::Making => true,
            SnapshotState::Ready => row.kind != SnapshotKind::Pause,
            SnapshotState::Removing => false,
        }
    }

    /// Snapshots and layers that somebody needs.
    fn live(&self) -> (BTreeSet<&str>, BTreeSet<&str>) {
        let held = self.sandboxes.values().filter_map(|holding| holding.snapshot.as_deref());
        let own = self.snapshots.values().filter(|row| Self::stays(row)).map(|row| row.id.as_str());
        let first: Vec<&str> = held.chain(own).filter(|id| self.snapshots.contains_key(*id)).collect();
        let below = |id: &str| self.snapshots.get(id).map(|row| row.memory_below.as_deref().into_iter().collect());
        let snapshots = reach(first, below);
        // What is ready is whole. The disk of a snapshot that is being removed is nobody's: only its memory may be.
        let disks = snapshots.iter().filter_map(|&id| self.snapshots.get(id));
        let disks = disks.filter(|row| row.state != SnapshotState::Removing).filter_map(|row| row.layer.as_deref());
        let disks = disks.chain(self.sandboxes.values().filter_map(|holding| holding.layer.as_deref()));
        let layers =
            reach(disks.collect(), |id| self.layers.get(id).map(|row| row.below.as_deref().into_iter().collect()));
        (snapshots, layers)
    }

    /// What nobody needs: not reached from a sandbox, from a snapshot that stays, or from one that is being made.
    pub fn garbage(&self) -> Garbage {
        let (snapshots, layers) = self.live();
        let dead = |ids: Vec<&String>, live: &BTreeSet<&str>| {
            ids.into_iter().filter(|id| !live.contains(id.as_str())).cloned().collect()
        };
        Garbage {
            snapshots: dead(self.snapshots.keys().collect(), &snapshots),
            layers: dead(self.layers.keys().collect(), &layers),
        }
    }

    /// Who needs a snapshot: sandboxes that are paused in it or map its memory, snapshots whose memory is over its. While there is
    /// one, it cannot go at once.
    pub fn dependents(&self, id: &str) -> Vec<Dependent> {
        let sandboxes = self.sandboxes.iter().filter(|(_, holding)| holding.snapshot.as_deref() == Some(id));
        let above = self.snapshots.values().filter(|row| row.memory_below.as_deref() == Some(id));
        let sandboxes = sandboxes.map(|(sandbox, _)| Dependent::Sandbox(sandbox.clone()));
        sandboxes.chain(above.map(|row| Dependent::Snapshot(row.id.clone()))).collect()
    }

    /// The rows that change when `merged` takes the place of a plan's layers, without the sandboxes': the merged layer, and
    /// the layers and snapshots that referred to the newest of them. A sandbox whose `layer` that was has `merged.id` then.
    pub fn replace_layers(&self, plan: &Merge, merged: &LayerRow) -> (Vec<LayerRow>, Vec<SnapshotRow>) {
        let Some(newest) = plan.layers.first() else { return (Vec::new(), Vec::new()) };
        let mut layers = vec![LayerRow { below: plan.below.clone(), ..merged.clone() }];
        let above = self.layers.values().filter(|row| row.below.as_ref() == Some(newest));
        layers.extend(above.map(|row| LayerRow { below: Some(merged.id.clone()), ..row.clone() }));
        let snapshots = self.snapshots.values().filter(|row| row.layer.as_ref() == Some(newest));
        (layers, snapshots.map(|row| SnapshotRow { layer: Some(merged.id.clone()), ..row.clone() }).collect())
    }

    /// Who needs a layer: sandboxes and snapshots whose newest it is, and layers over it.
    pub fn layer_dependents(&self, id: &str) -> Vec<Dependent> {
        let is = |layer: &Option<String>| layer.as_deref() == Some(id);
        let sandboxes = self.sandboxes.iter().filter(|(_, holding)| is(&holding.layer));
        let snapshots = self.snapshots.values().filter(|row| row.state != SnapshotState::Removing && is(&row.layer));
        let above = self.layers.values().filter(|row| is(&row.below));
        let sandboxes = sandboxes.map(|(sandbox, _)| Dependent::Sandbox(sandbox.clone()));
        let snapshots = snapshots.map(|row| Dependent::Snapshot(row.id.clone()));
        sandboxes.chain(snapshots).chain(above.map(|row| Dependent::Layer(row.id.clone()))).collect()
    }

    /// The diffs that are ready, in an order in which each is over a flat file when its turn comes, if need be across
    /// snapshots that are being removed. Those stay as they are: nobody restores from them.
    pub fn flatten_plan(&self) -> Vec<Flatten> {
        let ready = |row: &&SnapshotRow| row.state == SnapshotState::Ready && row.memory_below.is_some();
        let is_making = |id: &String| self.snapshots.get(id).is_some_and(|row| row.state == SnapshotState::Making);
        let mut chains: Vec<(&str, Vec<String>)> = self
            .snapshots
            .values()
            .filter(ready)
            .filter_map(|row| Some((row.id.as_str(), self.memory_below(&row.id)?)))
            .filter(|(_, below)| !below.iter().any(is_making))
            .collect();
        chains.sort_by_key(|(id, below)| (below.len(), *id));
        let is_flat_by_then = |id: &str| {
            self.snapshots.get(id).is_some_and(|row| row.memory_below.is_none() || row.state == SnapshotState::Ready)
        };
        let steps = chains.into_iter().map(|(id, mut below)| {
            let end = below.iter().position(|below| is_flat_by_then(below)).map_or(below.len(), |at| at + 1);
            below.truncate(end);
            Flatten { snapshot: id.to_string(), below }
        });
        steps.collect()
    }

    /// What makes one diff flat, whatever else is one. `None` where it is none, or where something below it is missing.
    pub fn flatten_step(&self, id: &str) -> Option<Flatten> {
        let below = self.memory_below(id).filter(|below| !below.is_empty())?;
        Some(Flatten { snapshot: id.to_string(), below })
    }

    /// Runs of layers that nobody needs one by one, where a disk has more than `longest` of them. Disks that are open
    /// meanwhile go on with the files that they have. Do one, change the rows, and ask again: each changes what the others
    /// refer to.
    pub fn merge_plan(&self, longest: usize) -> Vec<Merge> {
        let (_, live) = self.live();
        let tops = self.sandboxes.values().filter_map(|holding| holding.layer.as_deref());
        let taken = self.snapshots.values().filter(|row| row.state != SnapshotState::Removing);
        let tops: BTreeSet<&str> = tops.chain(taken.filter_map(|row| row.layer.as_deref())).collect();
        let mut above: BTreeMap<&str, usize> = BTreeMap::new();
        for layer in self.layers.values().filter(|layer| live.contains(layer.id.as_str())) {
            if let Some(below) = &layer.below {
                *above.entry(below).or_default() += 1;
            }
        }
        let shared = |id: &str| tops.contains(id) || above.get(id).copied().unwrap_or(0) != 1;
        let (mut plan, mut planned) = (Vec::new(), BTreeSet::new());
        for top in &tops {
            let Some(chain) = self.layers_from(Some(top)) else { continue };
            if chain.len() <= longest {
                continue;
            }
            let mut run: Vec<String> = Vec::new();
            let mut end = |run: &mut Vec<String>, below: Option<String>| {
                let layers = std::mem::take(run);
                if layers.len() > 1 && planned.insert(layers[0].clone()) {
                    plan.push(Merge { layers, below });
                }
            };
            for id in chain {
                if shared(&id) {
                    end(&mut run, Some(id.clone()));
                }
                run.push(id);
            }
            end(&mut run, None);
        }
        plan
    }
}

/// What can be reached from `first`, as far as it is there.
fn reach<'a>(first: Vec<&'a str>, next: impl Fn(&str) -> Option<Vec<&'a str>>) -> BTreeSet<&'a str> {
    let (mut found, mut todo) = (BTreeSet::new(), first);
    while let Some(id) = todo.pop() {
        if let Some(more) = next(id)
            && found.insert(id)
        {
            todo.extend(more);
        }
    }
    found
}

/// All from `first` down, each with what `below` says is under it; `None` where one is missing, or there are more than `most`.
fn chain<'a>(
    first: Option<&'a str>,
    most: usize,
    below: impl Fn(&str) -> Option<Option<&'a str>>,
) -> Option<Vec<String>> {
    let (mut found, mut next) = (Vec::new(), first);
    while let Some(id) = next {
        next = below(id)?;
        if found.len() >= most {
            return None;
        }
        found.push(id.to_string());
    }
    Some(found)
}
