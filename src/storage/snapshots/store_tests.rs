use super::retention::{Retention, expired};
use super::store::{Dependent, Flatten};
use super::*;
use crate::vmm::devices::driver::Seed;
use std::collections::BTreeSet;

fn some(id: &str) -> Option<String> {
    (!id.is_empty()).then(|| id.to_string())
}

/// A ready snapshot over the memory of another, and with a layer; empty for none.
fn snapshot(id: &str, below: &str, layer: &str) -> SnapshotRow {
    let (memory_below, layer) = (some(below), some(layer));
    SnapshotRow { id: id.to_string(), memory_below, layer, state: SnapshotState::Ready, ..SnapshotRow::default() }
}

fn removing(row: SnapshotRow) -> SnapshotRow {
    SnapshotRow { state: SnapshotState::Removing, ..row }
}

fn layer(id: &str, below: &str) -> LayerRow {
    LayerRow { id: id.to_string(), below: some(below), bytes: 1 }
}

fn holding(layer: &str, snapshot: &str) -> Holding {
    Holding { layer: some(layer), snapshot: some(snapshot) }
}

fn sandbox(id: &str, layer: &str, snapshot: &str) -> (String, Holding) {
    (id.to_string(), holding(layer, snapshot))
}

fn strings(ids: &[&str]) -> Vec<String> {
    ids.iter().map(ToString::to_string).collect()
}

#[test]
fn layers_are_listed_from_the_newest_down_and_holes_in_a_stack_are_seen() {
    let store = Store::new([], [layer("a", ""), layer("b", "a"), layer("c", "b"), layer("x", "none")], []);
    assert_eq!(store.layers_from(Some("c")).unwrap(), ["c", "b", "a"]);
    assert_eq!(store.layers_from(None).unwrap(), [""; 0]);
    assert!(store.layers_from(Some("x")).is_none() && store.layers_from(Some("none")).is_none());
    let circle = Store::new([], [layer("a", "b"), layer("b", "a")], []);
    assert!(circle.layers_from(Some("a")).is_none());
    let circle = Store::new([snapshot("a", "b", ""), snapshot("b", "a", "")], [], []);
    assert!(circle.memory_below("a").is_none());
    assert!(circle.flatten_plan().is_empty());
}

#[test]
fn what_is_reached_from_sandboxes_and_snapshots_stays() {
    let pause = |id: &str| SnapshotRow { kind: SnapshotKind::Pause, ..snapshot(id, "", "") };
    let rows = [
        snapshot("s1", "", "l1"),
        removing(snapshot("s2", "s1", "l2")),
        snapshot("s3", "s2", "l3"),
        removing(snapshot("s4", "s3", "l4")),
        pause("p1"),
        pause("p2"),
        SnapshotRow { state: SnapshotState::Making, ..snapshot("m", "s2", "l9") },
    ];
    let layers =
        [layer("l1", ""), layer("l2", "l1"), layer("l3", "l1"), layer("l4", "l3"), layer("l5", "l4"), layer("l6", "")];
    let mut store = Store::new(rows, layers, [sandbox("a", "l5", "p1")]);
    // s2 for its memory alone, s4 for nothing; l2 was s2's disk; l4 is under a's.
    let garbage = store.garbage();
    assert_eq!((garbage.snapshots, garbage.layers), (strings(&["p2", "s4"]), strings(&["l2", "l6"])));
    assert_eq!(store.interrupted().iter().map(|row| row.id.as_str()).collect::<Vec<_>>(), ["m"]);
    store.release("a");
    store.remove_snapshot("m");
    store.put_snapshot(removing(snapshot("s3", "s2", "l3")));
    let garbage = store.garbage();
    assert_eq!(garbage.snapshots, strings(&["p1", "p2", "s2", "s3", "s4"]));
    assert_eq!(garbage.layers, strings(&["l2", "l3", "l4", "l5", "l6"]));
}

#[test]
fn who_needs_something_is_named() {
    let store = Store::new(
        [snapshot("s1", "", "l1"), snapshot("s2", "s1", "l1")],
        [layer("l1", ""), layer("l2", "l1")],
        [sandbox("a", "l2", "s1"), sandbox("b", "l1", "")],
    );
    assert_eq!(store.dependents("s1"), [Dependent::Sandbox("a".into()), Dependent::Snapshot("s2".into())]);
    assert!(store.dependents("s2").is_empty());
    let expected = [
        Dependent::Sandbox("b".into()),
        Dependent::Snapshot("s1".into()),
        Dependent::Snapshot("s2".into()),
        Dependent::Layer("l2".into()),
    ];
    assert_eq!(store.layer_dependents("l1"), expected);
}

#[test]
fn diffs_are_flattened_from_the_lowest_and_across_what_is_being_removed() {
    let mut rows = vec![snapshot("s00", "", "")];
    rows.extend((1..20).map(|n| snapshot(&format!("s{n:02}"), &format!("s{:02}", n - 1), "")));
    let plan = Store::new(rows.clone(), [], []).flatten_plan();
    let expected: Vec<Flatten> =
        (1..20).map(|n| Flatten { snapshot: format!("s{n:02}"), below: vec![format!("s{:02}", n - 1)] }).collect();
    assert_eq!(plan, expected);
    for middle in [9, 10] {
        rows[middle] = removing(rows[middle].clone());
    }
    let plan = Store::new(rows, [], []).flatten_plan();
    assert_eq!(plan.len(), 17);
    let over = plan.iter().find(|step| step.snapshot == "s11").unwrap();
    assert_eq!(over.below, strings(&["s10", "s09", "s08"]));
}

#[test]
fn layers_that_only_their_stack_needs_are_made_one() {
    let mut layers = vec![layer("l0", "")];
    layers.extend((1..8).map(|n| layer(&format!("l{n}"), &format!("l{}", n - 1))));
    layers.push(layer("other", "l4"));
    let store = Store::new([snapshot("s", "", "l2")], layers, [sandbox("a", "l7", ""), sandbox("b", "other", "")]);
    let plan = store.merge_plan(3);
    let found: Vec<_> = plan.iter().map(|merge| (merge.layers.clone(), merge.below.as_deref())).collect();
    // Not l4, which two stacks share, nor l2, which a snapshot has: they are the tops of their runs.
    assert_eq!(
        found,
        [
            (strings(&["l7", "l6", "l5"]), Some("l4")),
            (strings(&["l4", "l3"]), Some("l2")),
            (strings(&["l2", "l1", "l0"]), None),
        ]
    );
    assert!(store.merge_plan(8).is_empty());
}

/// Random histories: what is asked for stays whole, what nobody can reach goes, and whatever order things go in ends the same.
#[test]
fn nothing_that_is_needed_is_garbage_and_all_else_is() {
    for seed in 0..300 {
        let mut random = Seed(seed);
        let mut store = Store::default();
        for step in 0..60 {
            let pick = |random: &mut Seed, ids: Vec<String>| {
                let at = random.below(ids.len() as u64 + 1) as usize;
                ids.get(at).cloned()
            };
            let ready = |store: &Store| -> Vec<String> {
                store.snapshots().filter(|row| row.state == SnapshotState::Ready).map(|row| row.id.clone()).collect()
            };
            let layers = |store: &Store| store.layers().map(|row| row.id.clone()).collect::<Vec<_>>();
            match random.below(8) {
                0 | 1 => {
                    let below = pick(&mut random, layers(&store));
                    store.put_layer(LayerRow { id: format!("l{step}"), below, bytes: 1 });
                }
                2 | 3 => {
                    let kind = SnapshotKind::ALL[random.below(4) as usize];
                    let state = if random.below(5) == 0 { SnapshotState::Making } else { SnapshotState::Ready };
                    let memory_below = pick(&mut random, ready(&store));
                    let layer = pick(&mut random, layers(&store));
                    let id = format!("s{step}");
                    store.put_snapshot(SnapshotRow { id, kind, state, memory_below, layer, ..SnapshotRow::default() });
                }
                4 => {
                    let (layer, snapshot) = (pick(&mut random, layers(&store)), pick(&mut random, ready(&store)));
                    store.hold(&format!("b{}", random.below(4)), Holding { layer, snapshot });
                }
                5 => {
                    if let Some(id) = pick(&mut random, ready(&store)) {
                        store.put_snapshot(removing(store.snapshot(&id).unwrap().clone()));
                    }
                }
                6 => store.release(&format!("b{}", random.below(4))),
                _ => collect(&mut store),
            }
            check(&store, seed);
        }
    }
}

fn collect(store: &mut Store) {
    let garbage = store.garbage();
    garbage.snapshots.iter().for_each(|id| drop(store.remove_snapshot(id)));
    garbage.layers.iter().for_each(|id| drop(store.remove_layer(id)));
    assert_eq!(store.garbage(), Default::default(), "what was left is still needed");
}

fn check(store: &Store, seed: u64) {
    let mut after = store.clone();
    collect(&mut after);
    // Whoever is left has all that it is over.
    for row in after.snapshots() {
        assert!(after.memory_below(&row.id).is_some(), "seed {seed}: memory of {}", row.id);
        if row.state != SnapshotState::Removing {
            assert!(after.layers_from(row.layer.as_deref()).is_some(), "seed {seed}: disk of {}", row.id);
        }
    }
    for id in (0..4).map(|n| format!("b{n}")) {
        if let Some(holding) = after.holding(&id) {
            assert!(after.layers_from(holding.layer.as_deref()).is_some(), "seed {seed}: disk of {id}");
            assert!(holding.snapshot.as_deref().is_none_or(|id| after.snapshot(id).is_some()), "seed {seed}: {id}");
        }
    }
    // Nothing that stays for its own sake has gone, and nothing is left that has no dependent and does not stay.
    for row in store.snapshots() {
        let stays = row.state == SnapshotState::Making
            || (row.state == SnapshotState::Ready && row.kind != SnapshotKind::Pause);
        assert!(!stays || after.snapshot(&row.id).is_some(), "seed {seed}: {} is gone", row.id);
    }
    for row in after.snapshots() {
        let stays = row.state == SnapshotState::Making
            || (row.state == SnapshotState::Ready && row.kind != SnapshotKind::Pause);
        assert!(stays || !after.dependents(&row.id).is_empty(), "seed {seed}: {} is left", row.id);
    }
    for row in after.layers() {
        assert!(!after.layer_dependents(&row.id).is_empty(), "seed {seed}: layer {} is left", row.id);
    }
    // Plans are about what is there, and each diff is over a flat file when its turn comes.
    let mut flat: BTreeSet<&str> =
        after.snapshots().filter(|row| row.memory_below.is_none()).map(|row| row.id.as_str()).collect();
    let plan = after.flatten_plan();
    for step in &plan {
        assert!(flat.contains(step.below.last().unwrap().as_str()), "seed {seed}: {step:?}");
        let chain = after.memory_below(&step.snapshot).unwrap();
        assert_eq!(chain[..step.below.len()], step.below[..]);
        flat.insert(&step.snapshot);
    }
    for merge in after.merge_plan(2) {
        let chain = after.layers_from(Some(&merge.layers[0])).unwrap();
        assert_eq!(chain[..merge.layers.len()], merge.layers[..]);
        assert_eq!(chain.get(merge.layers.len()), merge.below.as_ref());
        for (above, lower) in merge.layers.iter().zip(&merge.layers[1..]) {
            assert_eq!(after.layer_dependents(lower), [Dependent::Layer(above.clone())], "seed {seed}");
        }
    }
    let none = Retention::default();
    assert!(expired(after.snapshots(), &BTreeSet::new(), none, u64::MAX).is_empty());
}
