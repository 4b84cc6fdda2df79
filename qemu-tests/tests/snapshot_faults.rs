//! Snapshots, rollbacks, forks, removals and pauses that are cut short at each of their steps: the supervisor is killed, the
//! worker, both, or the step fails as on a full disk. Whatever happens, a sandbox is what it was or what it was to become.
//!
//! In every run the supervisor is killed at each step, and the other blows fall at some of them, which `WARREN_SOAK_SEED` (1)
//! chooses; with `WARREN_SOAK_FAULTS=1` all fall everywhere.

use std::collections::BTreeSet;

use qemu_tests::fault::{Blow, assert_agree, strike, strike_at};
use qemu_tests::state::NodeState;
use qemu_tests::witness::files;
use qemu_tests::{Code, Error, Node, Reply, Request, Sandbox, shared, timing, witness};
use warren::node::faults::Point;
use warren::storage::snapshots::files::FaultPoint;

/// The steps of a snapshot, in their order.
const SNAPSHOT: [Point; 10] = [
    Point::Storage(FaultPoint::RowWritten),
    Point::Storage(FaultPoint::DirectoryMade),
    Point::Storage(FaultPoint::FilesMade),
    Point::Storage(FaultPoint::OverlayMade),
    Point::Storage(FaultPoint::Pushed),
    Point::Storage(FaultPoint::Captured),
    Point::Storage(FaultPoint::FilesSynced),
    Point::Storage(FaultPoint::LayerLinked),
    Point::Storage(FaultPoint::Committed),
    Point::Storage(FaultPoint::OverlayDropped),
];

/// Those at which a step can fail: in `SNAPSHOT`.
const FAILING: [usize; 6] = [1, 2, 3, 5, 6, 7];

/// The steps of a rollback.
const ROLLBACK: [Point; 6] = [
    Point::Storage(FaultPoint::OverlayMade),
    Point::RollbackWritten,
    Point::RollbackEnded,
    Point::AgentReturned,
    Point::ReturnWritten,
    Point::Introduced,
];

/// The steps of a fork of a running sandbox, beside those of its snapshot.
const FORK: [Point; 3] = [Point::Storage(FaultPoint::OverlayDropped), Point::ForkBegun, Point::Introduced];

/// The steps of a removal.
const REMOVAL: [Point; 3] =
    [Point::Storage(FaultPoint::RemovalWritten), Point::Collected, Point::Storage(FaultPoint::Swept)];

const PAUSE: [Point; 4] = [Point::PauseWritten, Point::PauseCaptured, Point::PauseCommitted, Point::PauseEnded];
/// The steps of making a memory whole that a sandbox is paused as.
const SETTLE: [Point; 3] = [Point::SettleBegun, Point::SettleCopied, Point::SettleRenamed];
const RESUME: [Point; 3] = [Point::AgentResumed, Point::Unpaused, Point::Introduced];

/// The steps of a merge of layers.
const MERGE: [Point; 3] = [Point::MergeBegun, Point::MergeSynced, Point::MergeWritten];
/// The steps of making a memory whole that is a difference to another.
const FLATTEN: [Point; 4] = [
    Point::FlattenBegun,
    Point::Storage(FaultPoint::Filled),
    Point::Storage(FaultPoint::Copied),
    Point::FlattenWritten,
];
/// The steps of an import.
const IMPORT: [Point; 3] = [Point::ImportReceived, Point::ImportSynced, Point::ImportWritten];

/// Most layers of a disk that are left as they are.
const LAYERS: usize = 8;

/// Whether a blow beside the supervisor's end falls at the step of that number.
fn falls(step: usize, kind: u64) -> bool {
    let setting = |name: &str, default| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    let every: u64 = setting("WARREN_SOAK_FAULTS", 0);
    every > 0 || (step as u64 + kind + setting("WARREN_SOAK_SEED", 1)).is_multiple_of(4)
}

fn listed(node: &Node, request: Request) -> BTreeSet<String> {
    let rows = node.control().ok(request).items;
    rows.iter().map(|row| row.get("id").expect("an id").to_string()).collect()
}

fn snapshots(node: &Node, sandbox: &Sandbox) -> BTreeSet<String> {
    listed(node, Request::new("", "snapshot.list").set("sandbox", &sandbox.id))
}

/// Those of all sandboxes.
fn all(node: &Node) -> BTreeSet<String> {
    listed(node, Request::new("", "snapshot.list"))
}

fn take(sandbox: &Sandbox) -> Request {
    sandbox.request("snapshot.create")
}

fn back(sandbox: &Sandbox, snapshot: &str) -> Request {
    sandbox.request("sandbox.rollback").set("snapshot", snapshot)
}

fn remove(snapshot: &str) -> Request {
    Request::new("", "snapshot.remove").arg(snapshot)
}

/// A sandbox with a program that counts.
fn counting(node: &Node, network: &str) -> Sandbox {
    let sandbox = node.sandbox(&[("network", network)]);
    witness::start(&sandbox);
    sandbox
}

/// The node hears what it sends.
fn is_heard(node: &Node, sandbox: &Sandbox, after: &str) {
    let address = sandbox.inspect().get("address").expect("it has one").to_string();
    let route = node.sh(&format!("ip route get {address}"));
    let device = route.split_whitespace().skip_while(|word| *word != "dev").nth(1).expect("a device");
    let packets = || {
        let text = node.sh(&format!("cat /sys/class/net/{device}/statistics/rx_packets"));
        text.trim().parse::<u64>().expect("a number")
    };
    let before = packets();
    timing::wait_for(&format!("a packet of the sandbox after {after}"), || {
        sandbox.sh("timeout 2 nc -w 1 1.2.3.4 80 < /dev/null > /dev/null 2>&1; true");
        (packets() > before).then_some(())
    });
}

/// It runs, it counts, and it says this.
fn runs(sandbox: &Sandbox, word: &str, after: &str) {
    assert_eq!(sandbox.state(), "running", "after {after}: {:?}", sandbox.inspect());
    witness::answers(sandbox);
    assert_eq!(witness::word(sandbox), word, "after {after}");
    witness::goes_on(sandbox);
}

/// Takes away a sandbox and its snapshots: nothing is left.
fn leave_nothing(node: &Node, sandbox: Sandbox, before: &BTreeSet<String>, state: &NodeState) {
    for id in snapshots(node, &sandbox) {
        node.control().ok(remove(&id));
    }
    sandbox.remove().expect("it can be removed");
    timing::wait_for("nothing to be left", || (files(node) == *before).then_some(()));
    state.assert_restored(node);
}

#[test]
fn a_supervisor_that_dies_at_any_step_of_a_snapshot_leaves_a_sandbox_that_runs_on() {
    let node = shared::node_with_faults();
    let (before, state) = (files(&node), witness::quiet(&node));
    let sandbox = counting(&node, "off");
    for (step, point) in SNAPSHOT.into_iter().enumerate() {
        let known = snapshots(&node, &sandbox);
        let word = point.name();
        witness::say(&sandbox, &word);
        let from = witness::count(&sandbox);
        let mut blows = vec![(point, Blow::Supervisor)];
        // What the next one settles is cut short as well.
        if [FaultPoint::Pushed, FaultPoint::FilesSynced].map(Point::Storage).contains(&point) {
            blows.push((Point::Storage(FaultPoint::LayerLinked), Blow::Supervisor));
            blows.push((Point::Storage(FaultPoint::Swept), Blow::Supervisor));
        }
        let result = strike(&node, &blows, take(&sandbox));
        runs(&sandbox, &word, &word);
        assert!(witness::count(&sandbox) >= from, "it went back by itself");
        assert_agree(&node, &word);
        let new: Vec<String> = snapshots(&node, &sandbox).difference(&known).cloned().collect();
        if let Ok(reply) = &result {
            assert_eq!(new, [reply.field("id")], "after {word}: what was answered is there");
        }
        assert_eq!(new.len(), usize::from(step >= 8), "after {word}: {new:?}");
        for id in new {
            witness::say(&sandbox, "later");
            node.control().ok(back(&sandbox, &id));
            runs(&sandbox, &word, &format!("a rollback to what {word} left"));
        }
        node.assert_ledger_agrees();
    }
    // The sandbox can be taken a snapshot of, and go back to it.
    witness::say(&sandbox, "last");
    let last = node.control().ok(take(&sandbox)).field("id").to_string();
    witness::say(&sandbox, "later");
    node.control().ok(back(&sandbox, &last));
    runs(&sandbox, "last", "all of it");
    leave_nothing(&node, sandbox, &before, &state);
}

#[test]
fn a_worker_that_dies_at_a_step_of_a_snapshot_leaves_a_sandbox_that_can_go_back() {
    let node = shared::node_with_faults();
    let (before, state) = (files(&node), witness::quiet(&node));
    let sandbox = counting(&node, "off");
    witness::say(&sandbox, "safe");
    let safe = node.control().ok(take(&sandbox)).field("id").to_string();
    for (step, point) in SNAPSHOT.into_iter().enumerate() {
        for (kind, both) in [(0, false), (1, true)] {
            if !falls(step, kind) {
                continue;
            }
            let word = format!("{}-{both}", point.name());
            witness::say(&sandbox, &word);
            let worker = node.worker(&sandbox.id);
            let blow = if both { Blow::Both(worker) } else { Blow::Worker(worker) };
            let known = snapshots(&node, &sandbox);
            let result = strike(&node, &[(point, blow)], take(&sandbox));
            timing::wait_for("the end to be seen", || (witness::settled(&node, &sandbox.id) == "error").then_some(()));
            let new: Vec<String> = snapshots(&node, &sandbox).difference(&known).cloned().collect();
            if let Ok(reply) = &result {
                assert_eq!(new, [reply.field("id")], "after {word}: what was answered is there");
            }
            assert_agree(&node, &word);
            // The one that was made is as good as the one before.
            for (id, said) in new.iter().map(|id| (id, &*word)).chain([(&safe, "safe")]) {
                witness::insist(&node, &back(&sandbox, id));
                runs(&sandbox, said, &word);
            }
            assert_agree(&node, &word);
            node.assert_ledger_agrees();
        }
    }
    leave_nothing(&node, sandbox, &before, &state);
}

#[test]
fn a_step_that_finds_no_room_is_said_and_changes_nothing() {
    let node = shared::node_with_faults();
    let (before, state) = (files(&node), witness::quiet(&node));
    let sandbox = counting(&node, "off");
    witness::say(&sandbox, "on");
    let refused = |point: Point, result: Result<Reply, Error>| {
        let error = result.expect_err("it cannot be done");
        assert!(error.is(Code::NoCapacity), "{}: {error}", point.name());
        runs(&sandbox, "on", &point.name());
        assert_agree(&node, &point.name());
    };
    for point in FAILING.map(|step| SNAPSHOT[step]) {
        refused(point, strike(&node, &[(point, Blow::Full)], take(&sandbox)));
        assert_eq!(snapshots(&node, &sandbox), BTreeSet::new(), "{}", point.name());
    }
    for point in [SNAPSHOT[2], SNAPSHOT[6]] {
        let fork = Request::new("", "snapshot.fork").arg(&sandbox.id).set("n", 2);
        refused(point, strike(&node, &[(point, Blow::Full)], fork));
    }
    refused(PAUSE[1], strike(&node, &[(PAUSE[1], Blow::Full)], sandbox.request("sandbox.pause")));
    let id = node.control().ok(take(&sandbox)).field("id").to_string();
    refused(ROLLBACK[0], strike(&node, &[(ROLLBACK[0], Blow::Full)], back(&sandbox, &id)));
    witness::say(&sandbox, "later");
    node.control().ok(back(&sandbox, &id));
    runs(&sandbox, "on", "a rollback with room");
    leave_nothing(&node, sandbox, &before, &state);
}

#[test]
fn whoever_dies_at_a_step_of_a_rollback_leaves_the_old_or_the_new() {
    let node = shared::node_with_faults();
    let (before, state) = (files(&node), witness::quiet(&node));
    let sandbox = counting(&node, "on");
    witness::say(&sandbox, "then");
    let then = node.control().ok(take(&sandbox)).field("id").to_string();
    for (step, point) in ROLLBACK.into_iter().enumerate() {
        for kind in 0..3 {
            // By then it has another worker than the one whose number is known.
            if kind > 0 && (!falls(step, kind) || step > 1) {
                continue;
            }
            let after = format!("{} {kind}", point.name());
            witness::say(&sandbox, "now");
            let worker = node.worker(&sandbox.id);
            let blow = [Blow::Supervisor, Blow::Worker(worker), Blow::Both(worker)][kind as usize];
            let result = strike(&node, &[(point, blow)], back(&sandbox, &then));
            let found = timing::wait_for("a state that lasts", || {
                let found = witness::settled(&node, &sandbox.id);
                // A worker that was killed may not have been missed yet.
                (found != "running" || kind != 1 || result.is_ok() || step > 0).then_some(found)
            });
            match found.as_str() {
                "running" => {
                    let word = if step == 0 && result.is_err() { "now" } else { "then" };
                    runs(&sandbox, word, &after);
                }
                "paused" => {
                    assert!(step > 0, "after {after} it is in the snapshot already");
                    witness::insist(&node, &sandbox.request("sandbox.resume"));
                    runs(&sandbox, "then", &after);
                }
                "error" => assert!(step == 0 && kind > 0, "after {after}: {:?}", sandbox.inspect()),
                other => panic!("after {after} it is {other}"),
            }
            if found != "error" {
                is_heard(&node, &sandbox, &after);
            }
            assert_agree(&node, &after);
            witness::insist(&node, &back(&sandbox, &then));
            runs(&sandbox, "then", &after);
            node.assert_ledger_agrees();
        }
    }
    leave_nothing(&node, sandbox, &before, &state);
}

#[test]
fn a_supervisor_that_dies_at_a_step_of_a_fork_leaves_whole_sandboxes_or_none() {
    let node = shared::node_with_faults();
    let (before, state) = (files(&node), witness::quiet(&node));
    let sandbox = counting(&node, "off");
    for (step, point) in SNAPSHOT.into_iter().take(9).chain(FORK).enumerate() {
        // Those of its snapshot are walked above: one in four says that a fork's is none but that it goes.
        if step < 9 && !falls(step, 0) {
            continue;
        }
        let word = point.name();
        witness::say(&sandbox, &word);
        let request = Request::new("", "snapshot.fork").arg(&sandbox.id).set("n", 2);
        let result = strike(&node, &[(point, Blow::Supervisor)], request);
        runs(&sandbox, &word, &word);
        let told: BTreeSet<String> = result
            .iter()
            .flat_map(|reply| &reply.items)
            .filter_map(|item| item.get("id"))
            .map(str::to_string)
            .collect();
        let rows = node.control().ok(Request::new("", "sandbox.list")).items;
        let clones: BTreeSet<String> =
            rows.iter().filter_map(|row| row.get("id")).filter(|id| *id != sandbox.id).map(str::to_string).collect();
        assert!(told.is_subset(&clones), "after {word}: {told:?} were told, {clones:?} are there");
        for id in clones {
            let clone = Sandbox::of(node.control(), &id);
            if witness::settled(&node, &id) == "running" {
                runs(&clone, &word, &word);
                assert_eq!(clone.sh("hostname").trim(), id, "after {word}");
            } else {
                assert!(!told.contains(&id), "after {word}: {id} was told");
            }
            clone.remove().expect("a clone can be removed");
        }
        assert_eq!(snapshots(&node, &sandbox), BTreeSet::new(), "after {word}");
        assert_agree(&node, &word);
        node.assert_ledger_agrees();
    }
    leave_nothing(&node, sandbox, &before, &state);
}

#[test]
fn a_supervisor_that_dies_at_a_step_of_a_removal_leaves_no_file_of_what_is_gone() {
    let node = shared::node_with_faults();
    let (before, state) = (files(&node), witness::quiet(&node));
    let sandbox = counting(&node, "off");
    witness::say(&sandbox, "kept");
    let kept = node.control().ok(take(&sandbox)).field("id").to_string();
    for point in REMOVAL {
        let word = point.name();
        let doomed = node.control().ok(take(&sandbox)).field("id").to_string();
        // A cut while the next one sweeps: it is gone on with.
        let blows = [(point, Blow::Supervisor), (Point::Storage(FaultPoint::Swept), Blow::Supervisor)];
        let blows = if point == Point::Collected { &blows[..] } else { &blows[..1] };
        let _ = strike(&node, blows, remove(&doomed));
        assert_eq!(snapshots(&node, &sandbox), BTreeSet::from([kept.clone()]), "after {word}");
        assert_agree(&node, &word);
        let error = node.control().err(back(&sandbox, &doomed));
        assert!(error.is(Code::NotFound), "{error}");
        runs(&sandbox, "kept", &word);
        node.assert_ledger_agrees();
    }
    witness::say(&sandbox, "later");
    node.control().ok(back(&sandbox, &kept));
    runs(&sandbox, "kept", "all of it");
    leave_nothing(&node, sandbox, &before, &state);
}

#[test]
fn whoever_dies_at_a_step_of_a_pause_or_a_resume_leaves_the_one_state_or_the_other() {
    let node = shared::node_with_faults();
    let (before, state) = (files(&node), witness::quiet(&node));
    let sandbox = counting(&node, "on");
    for (step, point) in PAUSE.into_iter().chain(RESUME).enumerate() {
        let word = format!("{}-{step}", point.name());
        witness::say(&sandbox, &word);
        let from = witness::count(&sandbox);
        let resumes = step >= PAUSE.len();
        if resumes {
            node.control().ok(sandbox.request("sandbox.pause"));
        }
        let verb = if resumes { "sandbox.resume" } else { "sandbox.pause" };
        let result = strike(&node, &[(point, Blow::Supervisor)], sandbox.request(verb));
        let found = witness::settled(&node, &sandbox.id);
        if result.is_ok() {
            assert_eq!(found, if resumes { "running" } else { "paused" }, "after {word}");
        }
        if found == "paused" {
            witness::insist(&node, &sandbox.request("sandbox.resume"));
        }
        runs(&sandbox, &word, &word);
        assert!(witness::count(&sandbox) >= from, "after {word} it began anew");
        is_heard(&node, &sandbox, &word);
        assert_agree(&node, &word);
        node.assert_ledger_agrees();
    }
    leave_nothing(&node, sandbox, &before, &state);
}

#[test]
fn a_pause_that_is_a_difference_is_whole_before_it_goes_on_whatever_ends_that() {
    let node = shared::node_with_faults();
    let (before, state) = (files(&node), witness::quiet(&node));
    let sandbox = counting(&node, "on");
    witness::load(&sandbox);
    let pause = || sandbox.request("sandbox.pause");
    let resume = || sandbox.request("sandbox.resume");
    let home = format!("/data/sandboxes/{}", sandbox.id);
    let settled = |after: &str| {
        timing::wait_for("what it is paused as to be whole", || {
            let names = node.sh(&format!("ls {home}/paused | tr '\\n' ' '"));
            (names == "memory state ").then_some(()).ok_or(names).ok()
        });
        assert_eq!(node.sh(&format!("ls -d {home}/pausing 2>/dev/null; true")), "", "after {after}");
    };
    // By itself: first it differs from what it was paused as before, then from a snapshot.
    node.control().ok(pause());
    settled("a pause of a guest that was booted");
    node.control().ok(resume());
    let mut from_snapshot: Option<String> = None;
    for round in 0..2 {
        for point in SETTLE {
            for blows in [vec![Blow::Supervisor], vec![Blow::Supervisor; 2], vec![Blow::Full]] {
                if round == 1 && (blows.len() == 2 || point == Point::SettleRenamed) {
                    continue;
                }
                let after = format!("{}-{blows:?}-{round}", point.name());
                if let Some(snapshot) = &from_snapshot {
                    node.control().ok(back(&sandbox, snapshot));
                    runs(&sandbox, "snapshot", &after);
                }
                witness::say(&sandbox, &after);
                let count = witness::count(&sandbox);
                let full = blows[0] == Blow::Full;
                let blows: Vec<(Point, Blow)> = blows.into_iter().map(|blow| (point, blow)).collect();
                let _ = strike(&node, &blows, pause());
                assert_eq!(witness::settled(&node, &sandbox.id), "paused", "after {after}");
                if full {
                    // Who wants it is told, and it stays what it is.
                    let error = strike(&node, &[(point, Blow::Full)], resume()).expect_err("there is no room");
                    assert!(error.is(Code::NoCapacity), "{after}: {error}");
                    assert_eq!(witness::settled(&node, &sandbox.id), "paused", "after {after}");
                }
                witness::insist(&node, &resume());
                runs(&sandbox, &after, &after);
                assert!(witness::count(&sandbox) >= count, "after {after} it began anew");
                assert_agree(&node, &after);
                node.assert_ledger_agrees();
            }
        }
        witness::say(&sandbox, "snapshot");
        from_snapshot = Some(node.control().ok(take(&sandbox)).field("id").to_string());
    }
    // Without anybody's asking.
    node.control().ok(pause());
    settled("a pause");
    node.control().ok(resume());
    runs(&sandbox, "snapshot", "all of it");
    // What is stopped, put back or removed meanwhile leaves nothing.
    let snapshot = from_snapshot.expect("one was taken");
    node.control().ok(pause());
    witness::insist(&node, &back(&sandbox, &snapshot));
    runs(&sandbox, "snapshot", "a rollback of a paused sandbox");
    node.control().ok(pause());
    node.control().ok(sandbox.request("sandbox.stop"));
    timing::wait_for("its files to go", || {
        node.sh(&format!("ls -d {home}/paused {home}/mapped 2>/dev/null; true")).is_empty().then_some(())
    });
    witness::insist(&node, &back(&sandbox, &snapshot));
    runs(&sandbox, "snapshot", "a rollback of a stopped sandbox");
    node.control().ok(pause());
    leave_nothing(&node, sandbox, &before, &state);
}

#[test]
fn a_supervisor_that_is_replaced_finishes_what_it_has_begun() {
    let node = shared::node_with_faults();
    let (before, state) = (files(&node), witness::quiet(&node));
    let sandbox = counting(&node, "off");
    for point in [SNAPSHOT[0], SNAPSHOT[3], SNAPSHOT[4], SNAPSHOT[7], SNAPSHOT[8]] {
        let word = point.name();
        witness::say(&sandbox, &word);
        let worker = node.worker(&sandbox.id);
        let result = strike(&node, &[(point, Blow::HandOver)], take(&sandbox));
        let id = result.unwrap_or_else(|error| panic!("{word}: {error}")).field("id").to_string();
        assert!(snapshots(&node, &sandbox).contains(&id), "{word}");
        runs(&sandbox, &word, &word);
        assert_eq!(node.worker(&sandbox.id), worker, "it runs on");
        witness::say(&sandbox, "later");
        // And what goes on from it is begun by one and ended by the same.
        let result = strike(&node, &[(ROLLBACK[1], Blow::HandOver)], back(&sandbox, &id));
        result.unwrap_or_else(|error| panic!("{word}: {error}"));
        runs(&sandbox, &word, &word);
        assert_agree(&node, &word);
    }
    leave_nothing(&node, sandbox, &before, &state);
}

#[test]
fn whatever_ends_a_merge_leaves_the_same_disk() {
    let node = shared::node_with_faults();
    let (before, state) = (files(&node), witness::quiet(&node));
    let layers = || files(&node).iter().filter(|name| name.starts_with("layers/")).count();
    let sandbox = counting(&node, "off");
    witness::say(&sandbox, "kept");
    let kept = node.control().ok(take(&sandbox)).field("id").to_string();
    let mut written = String::new();
    let mut write = |round: &str| {
        sandbox.sh(&format!("cd /workspace && echo {round} >> rounds && cp rounds round-{round} && sync"));
        written.push_str(round);
        written.push('\n');
        written.clone()
    };
    let leave_one = || {
        for id in snapshots(&node, &sandbox).into_iter().filter(|id| *id != kept) {
            node.control().ok(remove(&id));
        }
    };
    let blows = MERGE.into_iter().enumerate().flat_map(|step| [(step, Blow::Supervisor), (step, Blow::Full)]);
    for ((step, point), blow) in blows {
        // Rows that are there are no step that can fail.
        if blow == Blow::Full && (point == Point::MergeWritten || !falls(step, 3)) {
            continue;
        }
        let after = format!("{}-{blow:?}", point.name());
        while layers() < LAYERS {
            write(&format!("{after}-{}", layers()));
            node.control().ok(take(&sandbox));
            leave_one();
        }
        // One more is one too many.
        let written = write(&after);
        let _ = strike(&node, &[(point, blow)], take(&sandbox));
        witness::answers(&sandbox);
        assert_eq!(sandbox.sh("cat /workspace/rounds"), written, "after {after}");
        leave_one();
        if blow == Blow::Full {
            // It is tried again with the next, or a minute later.
            write(&format!("{after}-again"));
            node.control().ok(take(&sandbox));
            leave_one();
        }
        timing::wait_for("the layers to be merged", || (layers() <= LAYERS).then_some(()));
        assert_agree(&node, &after);
        node.assert_ledger_agrees();
    }
    // What the worker has open is older than that: another one reads what there is now.
    let written = write("last");
    node.control().ok(sandbox.request("sandbox.pause"));
    witness::insist(&node, &sandbox.request("sandbox.resume"));
    node.control().ok(sandbox.exec_request(&["sh", "-c", "echo 3 > /proc/sys/vm/drop_caches"]).set("user", 0));
    assert_eq!(sandbox.sh("cat /workspace/rounds"), written);
    for round in written.lines() {
        assert!(written.starts_with(&sandbox.sh(&format!("cat /workspace/round-{round}"))), "{round}");
    }
    node.control().ok(back(&sandbox, &kept));
    runs(&sandbox, "kept", "all of it");
    assert_eq!(sandbox.sh("ls /workspace"), "word\n");
    leave_nothing(&node, sandbox, &before, &state);
}

#[test]
fn whatever_ends_an_import_leaves_a_whole_snapshot_or_none() {
    let node = shared::node_with_faults();
    let (before, state) = (files(&node), witness::quiet(&node));
    let sandbox = counting(&node, "off");
    witness::say(&sandbox, "sent");
    let id = node.control().ok(take(&sandbox)).field("id").to_string();
    let exported = node.run(&["warren", "snapshot", "export", &id, "/data/exported"]);
    assert_eq!(exported.exit, 0, "{exported:?}");
    for (point, blow) in IMPORT.into_iter().flat_map(|point| [(point, Blow::Supervisor), (point, Blow::Full)]) {
        if (point, blow) == (Point::ImportWritten, Blow::Full) {
            continue;
        }
        let after = format!("{}-{blow:?}", point.name());
        let known: BTreeSet<String> = all(&node);
        let output =
            strike_at(&node, &[(point, blow)], || node.run(&["warren", "snapshot", "import", "/data/exported"]));
        assert_ne!(output.exit, 0, "{after}: {output:?}");
        assert_eq!(output.stderr.contains("NO_CAPACITY"), blow == Blow::Full, "{after}: {output:?}");
        assert_agree(&node, &after);
        let new: Vec<String> = all(&node).difference(&known).cloned().collect();
        assert_eq!(new.len(), usize::from(point == Point::ImportWritten), "after {after}: {new:?}");
        for id in new {
            let reply = node.control().ok(Request::new("", "snapshot.fork").arg(&id));
            let clone = Sandbox::of(node.control(), reply.items[0].get("id").expect("an id"));
            runs(&clone, "sent", &after);
            clone.remove().expect("a clone can be removed");
            node.control().ok(remove(&id));
        }
        node.assert_ledger_agrees();
    }
    node.sh("rm /data/exported");
    leave_nothing(&node, sandbox, &before, &state);
}

#[test]
fn whatever_ends_the_making_whole_of_a_memory_leaves_it_the_same() {
    let node = shared::node_with_faults();
    let (before, state) = (files(&node), witness::quiet(&node));
    let sandbox = counting(&node, "off");
    witness::load(&sandbox);
    witness::say(&sandbox, "first");
    let mut below = node.control().ok(take(&sandbox)).field("id").to_string();
    node.control().ok(back(&sandbox, &below));
    runs(&sandbox, "first", "a rollback");
    // What the next supervisor does of it is cut short as well.
    let blows = FLATTEN.into_iter().flat_map(|point| {
        let once = vec![(point, Blow::Supervisor)];
        let twice = if point == Point::FlattenWritten { vec![] } else { vec![(point, Blow::Supervisor); 2] };
        [once, twice, vec![(point, Blow::Full)]]
    });
    for blows in blows.filter(|blows| !blows.is_empty() && *blows != [(Point::FlattenWritten, Blow::Full)]) {
        let after = blows.iter().map(|(point, blow)| format!("{}-{blow:?}-", point.name())).collect::<String>();
        let known = snapshots(&node, &sandbox);
        witness::say(&sandbox, &after);
        let from = witness::count(&sandbox);
        let result = strike(&node, &blows, take(&sandbox));
        runs(&sandbox, &after, &after);
        let new: Vec<String> = snapshots(&node, &sandbox).difference(&known).cloned().collect();
        assert_eq!(new.len(), 1, "after {after}: {new:?} {result:?}");
        if let Ok(reply) = &result {
            assert_eq!((reply.field("id"), reply.field("difference_to")), (&*new[0], &*below), "after {after}");
        }
        assert_agree(&node, &after);
        // What it is a difference to goes, and it does not care.
        node.control().ok(remove(&below));
        witness::say(&sandbox, "later");
        if blows[0].1 == Blow::Full {
            // Who asks for it is told, and has what was there.
            let point = blows[0].0;
            let error = strike(&node, &[(point, Blow::Full)], back(&sandbox, &new[0])).expect_err("there is no room");
            assert!(error.is(Code::NoCapacity), "{after}: {error}");
            let error = strike(&node, &[(point, Blow::Full)], Request::new("", "snapshot.fork").arg(&new[0]));
            let error = error.expect_err("there is no room");
            assert!(error.is(Code::NoCapacity), "{after}: {error}");
            runs(&sandbox, "later", &after);
            assert_agree(&node, &after);
        }
        node.control().ok(back(&sandbox, &new[0]));
        runs(&sandbox, &after, &after);
        assert!(witness::count(&sandbox) >= from, "after {after} it began anew");
        timing::wait_for("what is below to go", || {
            (node.run(&["test", "-e", &format!("/data/snapshots/{below}")]).exit != 0).then_some(())
        });
        assert_agree(&node, &after);
        node.assert_ledger_agrees();
        below.clone_from(&new[0]);
    }
    leave_nothing(&node, sandbox, &before, &state);
}

#[test]
fn a_full_disk_leaves_a_difference_as_it_was() {
    let node = shared::node_with_faults();
    let (before, state) = (files(&node), witness::quiet(&node));
    let sandbox = counting(&node, "off");
    witness::load(&sandbox);
    witness::say(&sandbox, "first");
    let first = node.control().ok(take(&sandbox)).field("id").to_string();
    node.control().ok(back(&sandbox, &first));
    witness::say(&sandbox, "second");
    // It stays a difference for a while.
    let reply = strike(&node, &[(Point::FlattenBegun, Blow::Full)], take(&sandbox)).expect("it is taken");
    let (second, bytes) = (reply.field("id").to_string(), reply.field("bytes").to_string());
    assert_eq!(reply.field("difference_to"), first);
    witness::say(&sandbox, "third");
    node.fill_data();
    let refused = [back(&sandbox, &second), take(&sandbox), Request::new("", "snapshot.fork").arg(&second)]
        .map(|request| node.control().call(request));
    let row = node.control().ok(Request::new("", "snapshot.inspect").arg(&second)).fields;
    node.free_data();
    for result in refused {
        let error = result.expect_err("there is no room");
        assert!(error.is(Code::NoCapacity), "{error}");
    }
    assert_eq!((row.get("difference_to"), row.get("bytes")), (Some(&*first), Some(&*bytes)), "{row:?}");
    runs(&sandbox, "third", "a full disk");
    assert_agree(&node, "a full disk");
    node.control().ok(back(&sandbox, &second));
    runs(&sandbox, "second", "a rollback with room");
    node.control().ok(back(&sandbox, &first));
    runs(&sandbox, "first", "a rollback with room");
    node.assert_ledger_agrees();
    leave_nothing(&node, sandbox, &before, &state);
}

#[test]
fn every_point_is_walked() {
    let walked =
        [&SNAPSHOT[..], &ROLLBACK, &FORK, &REMOVAL, &PAUSE, &SETTLE, &RESUME, &MERGE, &FLATTEN, &IMPORT].concat();
    let missing: Vec<String> = Point::all().filter(|point| !walked.contains(point)).map(Point::name).collect();
    assert_eq!(missing, [""; 0]);
}
