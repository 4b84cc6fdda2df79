//! A supervisor that dies at each point of each operation, and at each point of the recovery from that: real files, rows
//! in memory that change as transactions do.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::files::{
    FaultPoint, OVERLAY, Owner, Reached, Shape, Shelves, drop_overlay, garbage_changes, make_overlay, recover, removal,
    unhindered,
};
use super::*;
use crate::storage::memory_file;
use crate::storage::overlay::{self, BLOCK, Overlay};
use crate::storage::state::Change;

const BLOCKS: u64 = 12;
const SHAPE: Shape = Shape { disk_bytes: BLOCKS * BLOCK, base_bytes: 4 * BLOCK, base_sha256: [3; 32] };
const MEMORY: u64 = 8 * memory_file::PAGE;

/// A disk, by the first octet of each block.
type Disk = Vec<u8>;

/// A memory, by the first octet of each page.
type Memory = Vec<u8>;

/// What the database has.
#[derive(Clone, Default)]
struct Rows {
    store: Store,
    /// Name of each sandbox's own overlay.
    overlays: BTreeMap<String, String>,
}

impl Rows {
    /// One transaction.
    fn commit(&mut self, changes: &[Change]) {
        for change in changes {
            match change {
                Change::PutSnapshot(row) => self.store.put_snapshot((**row).clone()),
                Change::RemoveSnapshot { id } => drop(self.store.remove_snapshot(id)),
                Change::PutLayer(row) => self.store.put_layer(row.clone()),
                Change::RemoveLayer { id } => drop(self.store.remove_layer(id)),
                Change::Rebase { id, layer, snapshot, overlay } => {
                    self.store.hold(id, Holding { layer: layer.clone(), snapshot: snapshot.clone() });
                    self.overlays.insert(id.clone(), overlay.clone().unwrap_or_else(|| OVERLAY.to_string()));
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

struct World {
    root: PathBuf,
    base: File,
    shelves: Shelves,
    rows: Rows,
    /// What each sandbox's disk has to hold: flushed, or in doubt between two.
    disks: BTreeMap<String, Vec<Disk>>,
    /// What each snapshot's disk and memory have to hold, once it is there.
    kept: BTreeMap<String, (Disk, Memory)>,
    overlays_made: u32,
}

impl World {
    /// In memory where there is such a place: everything is synced all the time.
    fn place(name: &str) -> PathBuf {
        let memory = PathBuf::from("/dev/shm");
        let parent = if memory.is_dir() { memory } else { std::env::temp_dir() };
        parent.join(format!("warren-{name}-{}", std::process::id()))
    }

    fn new(root: PathBuf) -> Self {
        let _ = fs::remove_dir_all(&root);
        fs::create_dir_all(root.join("sandboxes")).unwrap();
        let shelves = Shelves::beside(&root.join("sandboxes"));
        shelves.prepare().unwrap();
        fs::write(root.join("base"), vec![0xba; SHAPE.base_bytes as usize]).unwrap();
        let base = File::open(root.join("base")).unwrap();
        let (rows, disks, kept) = Default::default();
        let mut world = Self { root, base, shelves, rows, disks, kept, overlays_made: 0 };
        world.add("a", None);
        world
    }

    fn home(&self, id: &str) -> PathBuf {
        self.root.join("sandboxes").join(id)
    }

    fn add(&mut self, id: &str, layer: Option<String>) {
        fs::create_dir(self.home(id)).unwrap();
        make_overlay(&self.home(id), OVERLAY, &SHAPE, &mut unhindered).unwrap();
        self.rows.commit(&[Change::Rebase { id: id.to_string(), layer, snapshot: None, overlay: None }]);
        let now = self.read(id);
        self.disks.insert(id.to_string(), vec![now]);
    }

    fn overlay_path(&self, id: &str) -> PathBuf {
        self.home(id).join(&self.rows.overlays[id])
    }

    fn open(&self, top: File, newest: Option<&str>) -> Overlay {
        let layers = self.rows.store.layers_from(newest).expect("a layer's row is missing");
        let files = self.shelves.open_layers(&layers).expect("a layer's file is missing");
        Overlay::open(top, files, self.base.try_clone().unwrap()).unwrap()
    }

    /// A sandbox's disk as a worker opens it.
    fn worker(&self, id: &str) -> Overlay {
        let top = File::options().read(true).write(true).open(self.overlay_path(id)).unwrap();
        self.open(top, self.rows.store.holding(id).unwrap().layer.as_deref())
    }

    fn read(&self, id: &str) -> Disk {
        content(&self.worker(id))
    }

    fn owners(&self) -> BTreeMap<String, Owner> {
        let owner = |(id, overlay): (&String, &String)| {
            (id.clone(), Owner { home: self.home(id), overlay: overlay.clone(), pushed: None })
        };
        self.rows.overlays.iter().map(owner).collect()
    }

    fn next_name(&mut self) -> String {
        self.overlays_made += 1;
        format!("{OVERLAY}-{}", self.overlays_made)
    }

    /// The guest writes and flushes.
    fn write(&mut self, id: &str, disk: &mut Overlay, block: u64, octet: u8) {
        disk.write_at(block * BLOCK, &[octet; BLOCK as usize]).unwrap();
        disk.flush().unwrap();
        self.disks.insert(id.to_string(), vec![content(disk)]);
    }

    /// A snapshot of a sandbox that runs on, over the memory of another where that is given.
    fn snapshot(&mut self, id: &str, snap: &str, below: Option<&str>, reached: Reached<'_>) -> io::Result<()> {
        let (home, next) = (self.home(id), self.next_name());
        let old = self.rows.overlays[id].clone();
        let holding = self.rows.store.holding(id).unwrap().clone();
        let mut row = SnapshotRow {
            id: snap.to_string(),
            sandbox: Some(id.to_string()),
            memory_bytes: MEMORY,
            memory_below: below.map(ToString::to_string),
            layer: Some(format!("layer-{snap}")),
            next_overlay: Some(next.clone()),
            ..SnapshotRow::default()
        };
        let layer = row.layer.clone();
        self.rows.commit(&[Change::PutSnapshot(Box::new(row.clone()))]);
        reached(FaultPoint::RowWritten)?;
        let files = self.shelves.begin(snap, MEMORY, reached)?;
        let top = make_overlay(&home, &next, &SHAPE, reached)?;
        // The worker.
        let mut disk = self.worker(id);
        let frozen = content(&disk);
        disk.push(top).unwrap();
        reached(FaultPoint::Pushed)?;
        let octet = snap.as_bytes()[1];
        let mut memory = below.map_or(vec![0; (MEMORY / memory_file::PAGE) as usize], |id| self.kept[id].1.clone());
        memory[usize::from(octet % 8)] = octet;
        let page = u64::from(octet % 8);
        files.memory.write_all_at(&[octet; memory_file::PAGE as usize], page * memory_file::PAGE).unwrap();
        files.state.write_all_at(b"state", 0).unwrap();
        self.write(id, &mut disk, 5, octet);
        reached(FaultPoint::Captured)?;
        row.bytes = self.shelves.sync(snap, below.is_some(), reached)?;
        let bytes = self.shelves.link_layer(&home.join(&old), &format!("layer-{snap}"), reached)?;
        (row.state, row.next_overlay) = (SnapshotState::Ready, None);
        self.rows.commit(&[
            Change::PutSnapshot(Box::new(row)),
            Change::PutLayer(LayerRow { id: format!("layer-{snap}"), below: holding.layer, bytes }),
            Change::Rebase { id: id.to_string(), layer, snapshot: holding.snapshot, overlay: Some(next) },
        ]);
        self.kept.insert(snap.to_string(), (frozen, memory));
        reached(FaultPoint::Committed)?;
        drop_overlay(&home, &old, reached)
    }

    fn rollback(&mut self, id: &str, snap: &str, reached: Reached<'_>) -> io::Result<()> {
        let (home, next) = (self.home(id), self.next_name());
        let old = self.rows.overlays[id].clone();
        make_overlay(&home, &next, &SHAPE, reached)?;
        let layer = self.rows.store.snapshot(snap).unwrap().layer.clone();
        let change = Change::Rebase { id: id.to_string(), layer, snapshot: Some(snap.into()), overlay: Some(next) };
        self.rows.commit(&[change]);
        self.disks.insert(id.to_string(), vec![self.kept[snap].0.clone()]);
        reached(FaultPoint::Committed)?;
        drop_overlay(&home, &old, reached)
    }

    fn flatten(&mut self, reached: Reached<'_>) -> io::Result<()> {
        for step in self.rows.store.flatten_plan() {
            self.shelves.flatten(&step, MEMORY, reached).map_err(io::Error::other)?;
            let mut row = self.rows.store.snapshot(&step.snapshot).unwrap().clone();
            row.memory_below = None;
            self.rows.commit(&[Change::PutSnapshot(Box::new(row))]);
            reached(FaultPoint::Committed)?;
        }
        Ok(())
    }

    fn merge(&mut self, reached: Reached<'_>) -> io::Result<()> {
        while let Some(plan) = self.rows.store.merge_plan(1).first().cloned() {
            let id = format!("merged-{}", self.next_name());
            let files = self.shelves.open_layers(&plan.layers)?;
            let out = self.shelves.make_layer(&id)?;
            overlay::merge(&files.iter().collect::<Vec<_>>(), &out).unwrap();
            self.shelves.sync_layers(reached)?;
            let bytes = memory_file::taken(&out)?;
            let merged = LayerRow { id: id.clone(), below: None, bytes };
            let (layers, snapshots) = self.rows.store.replace_layers(&plan, &merged);
            let mut changes: Vec<Change> = layers.into_iter().map(Change::PutLayer).collect();
            changes.extend(snapshots.into_iter().map(|row| Change::PutSnapshot(Box::new(row))));
            for (sandbox, overlay) in &self.rows.overlays {
                let holding = self.rows.store.holding(sandbox).unwrap();
                if holding.layer.as_ref() == plan.layers.first() {
                    let (snapshot, overlay) = (holding.snapshot.clone(), Some(overlay.clone()));
                    changes.push(Change::Rebase { id: sandbox.clone(), layer: Some(id.clone()), snapshot, overlay });
                }
            }
            self.rows.commit(&changes);
            reached(FaultPoint::Committed)?;
            self.collect(reached)?;
        }
        Ok(())
    }

    fn remove(&mut self, snap: &str, reached: Reached<'_>) -> io::Result<()> {
        let change = removal(&self.rows.store, snap).unwrap();
        self.rows.commit(&[change]);
        self.kept.remove(snap);
        reached(FaultPoint::RemovalWritten)?;
        self.collect(reached)
    }

    fn collect(&mut self, reached: Reached<'_>) -> io::Result<()> {
        let changes = garbage_changes(&self.rows.store.garbage());
        self.rows.commit(&changes);
        reached(FaultPoint::RemovalWritten)?;
        self.shelves.sweep(&self.rows.store, &self.owners(), reached)
    }

    /// What a supervisor does at its start.
    fn start(&mut self, reached: Reached<'_>) -> io::Result<()> {
        let changes = recover(&self.rows.store, &self.owners(), &self.shelves, reached)?;
        self.rows.commit(&changes);
        reached(FaultPoint::Committed)?;
        self.collect(reached)
    }

    /// All operations, one after the other.
    fn run(&mut self, reached: Reached<'_>) -> io::Result<()> {
        let mut disk = self.worker("a");
        self.write("a", &mut disk, 1, 0x11);
        self.write("a", &mut disk, 7, 0x12);
        drop(disk);
        self.snapshot("a", "s1", None, reached)?;
        let mut disk = self.worker("a");
        self.write("a", &mut disk, 1, 0x21);
        drop(disk);
        self.snapshot("a", "s2", Some("s1"), reached)?;
        self.snapshot("a", "s3", Some("s2"), reached)?;
        self.add("b", self.rows.store.snapshot("s2").unwrap().layer.clone());
        let mut disk = self.worker("b");
        self.write("b", &mut disk, 9, 0xb0);
        drop(disk);
        self.rollback("a", "s1", reached)?;
        let mut disk = self.worker("a");
        self.write("a", &mut disk, 8, 0x31);
        drop(disk);
        self.remove("s2", reached)?;
        self.flatten(reached)?;
        self.collect(reached)?;
        self.snapshot("b", "s4", None, reached)?;
        self.snapshot("b", "s5", None, reached)?;
        self.snapshot("b", "s6", None, reached)?;
        self.remove("s5", reached)?;
        self.merge(reached)?;
        self.remove("s1", reached)
    }

    /// Each sandbox and snapshot is whole, and nothing else is there.
    fn check(&self, when: &str) {
        for (id, allowed) in &self.disks {
            let found = self.read(id);
            assert!(allowed.contains(&found), "{when}: disk of {id}: {found:x?}, not {allowed:x?}");
        }
        for row in self.rows.store.snapshots().filter(|row| row.state == SnapshotState::Ready) {
            let (disk, expected) = self.kept.get(&row.id).unwrap_or_else(|| panic!("{when}: {} is there", row.id));
            let top = make_overlay(&self.root, "probe", &SHAPE, &mut unhindered).unwrap();
            assert_eq!(content(&self.open(top, row.layer.as_deref())), *disk, "{when}: disk of {}", row.id);
            fs::remove_file(self.root.join("probe")).unwrap();
            let mut memory = vec![0; MEMORY as usize];
            let mut chain = self.rows.store.memory_below(&row.id).expect("memory below is missing");
            chain.insert(0, row.id.clone());
            for id in chain.iter().rev() {
                let file = self.shelves.open_memory(id).unwrap();
                memory_file::check(&file, MEMORY, None).unwrap();
                for extent in crate::storage::space::data_extents(&file, 0..MEMORY).map(Result::unwrap) {
                    file.read_exact_at(&mut memory[extent.start as usize..extent.end as usize], extent.start).unwrap();
                }
            }
            let memory: Memory = memory.chunks(memory_file::PAGE as usize).map(|page| page[0]).collect();
            assert_eq!(memory, *expected, "{when}: memory of {}", row.id);
            assert_eq!(fs::read(self.shelves.state(&row.id)).unwrap(), b"state");
        }
        for id in self.kept.keys() {
            let state = self.rows.store.snapshot(id).map(|row| row.state);
            assert_eq!(state, Some(SnapshotState::Ready), "{when}: {id} is gone");
        }
        assert!(self.rows.store.interrupted().is_empty(), "{when}");
        let names = |dir: PathBuf| {
            let mut names: Vec<String> =
                fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        let ids: Vec<&str> = self.rows.store.snapshots().map(|row| row.id.as_str()).collect();
        assert_eq!(names(self.root.join("snapshots")), ids, "{when}");
        let ids: Vec<&str> = self.rows.store.layers().map(|row| row.id.as_str()).collect();
        assert_eq!(names(self.root.join("layers")), ids, "{when}");
        for (id, overlay) in &self.rows.overlays {
            assert_eq!(names(self.home(id)), [overlay.as_str()], "{when}: {id}");
        }
    }
}

fn content(disk: &Overlay) -> Disk {
    let mut octets = vec![0; SHAPE.disk_bytes as usize];
    disk.read_at(0, &mut octets).unwrap();
    octets.chunks(BLOCK as usize).map(|block| block[0]).collect()
}

/// Dies at the `at`-th point, from 0; gives the point.
fn dies_at(mut at: usize, died: &mut Option<FaultPoint>) -> impl FnMut(FaultPoint) -> io::Result<()> {
    move |point| {
        if at == 0 {
            *died = Some(point);
            return Err(io::Error::other("killed"));
        }
        at -= 1;
        Ok(())
    }
}

#[test]
fn a_supervisor_that_dies_anywhere_leaves_the_old_or_the_new_and_nothing_else() {
    let root = World::place("snapshots");
    let mut seen = std::collections::BTreeSet::new();
    for at in 0.. {
        let mut recoveries = 0;
        loop {
            let mut world = World::new(root.clone());
            let mut died = None;
            let result = world.run(&mut dies_at(at, &mut died));
            let when = format!("point {at}, {died:?}, recovery {recoveries}");
            assert_eq!(result.is_err(), died.is_some(), "{when}: {result:?}");
            // The recovery dies as well, at each of its points in turn.
            let mut again = None;
            let recovered = world.start(&mut dies_at(recoveries, &mut again));
            assert_eq!(recovered.is_err(), again.is_some(), "{when}: {recovered:?}");
            world.start(&mut unhindered).unwrap();
            world.check(&when);
            seen.extend(died);
            recoveries += 1;
            if died.is_none() {
                assert_eq!(seen.len(), FaultPoint::ALL.len(), "points that no operation reached: {seen:?}");
                fs::remove_dir_all(root).unwrap();
                return;
            }
            if again.is_none() {
                break;
            }
        }
    }
}

#[test]
fn a_worker_that_lives_decides_whether_its_overlay_was_frozen() {
    let root = World::place("snapshots-alive");
    for pushed in [false, true] {
        let mut world = World::new(root.clone());
        let stop = |point: FaultPoint| {
            if point == FaultPoint::OverlayMade { Err(io::Error::other("killed")) } else { Ok(()) }
        };
        world.snapshot("a", "s1", None, &mut { stop }).unwrap_err();
        let mut owners = world.owners();
        owners.get_mut("a").unwrap().pushed = Some(pushed);
        let changes = recover(&world.rows.store, &owners, &world.shelves, &mut unhindered).unwrap();
        world.rows.commit(&changes);
        assert_eq!(world.rows.store.holding("a").unwrap().layer.is_some(), pushed);
        assert_eq!(world.rows.overlays["a"], if pushed { "overlay-1" } else { OVERLAY });
        world.collect(&mut unhindered).unwrap();
        world.check("a worker that lives");
    }
    fs::remove_dir_all(root).unwrap();
}
