//! Has a node fail at a given point of a request, and looks at what is left (`warren::node::faults`). For nodes of
//! `shared::node_with_faults`.

use std::collections::BTreeSet;

use warren::node::faults::Point;
use warren::storage::state::{Snapshot as Rows, State};
use warren::wire::{Error, Request};

use crate::client::Reply;
use crate::files::TempDir;
use crate::node::{Boot, Node};
use crate::timing;
use crate::witness;

/// Where the node looks for what is to fail; it goes when the last of that was reached.
pub const FILE: &str = "/run/faults";

/// A node that looks there.
pub fn boot() -> Boot {
    Boot::kernel().parameter(&format!("WARREN_FAULTS={FILE}"))
}

/// Has what is done go no further than a point.
pub fn hold_at(node: &Node, point: Point) {
    node.write_file(FILE, 0o600, format!("{} wait", point.name()).as_bytes());
}

/// Waits until the last of the points was reached.
///
/// # Panics
/// When it is not.
pub fn wait_until_reached(node: &Node, what: &str) {
    timing::wait_for(what, || (node.run(&["test", "-e", FILE]).exit != 0).then_some(()));
}

/// What is to happen at a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blow {
    /// The supervisor is killed.
    Supervisor,
    /// The worker of this process id is killed.
    Worker(u64),
    /// First the worker, then the supervisor.
    Both(u64),
    /// The supervisor is told to end, and goes on.
    HandOver,
    /// The step fails as on a full disk.
    Full,
    /// What begins there is out of time at once.
    Late,
}

impl Blow {
    fn ends_supervisor(self) -> bool {
        matches!(self, Self::Supervisor | Self::Both(_) | Self::HandOver)
    }

    fn words(self) -> String {
        match self {
            Self::Supervisor => "die".to_string(),
            Self::Worker(pid) => pid.to_string(),
            Self::Both(pid) => format!("{pid} die"),
            Self::HandOver => "term".to_string(),
            Self::Full => "full".to_string(),
            Self::Late => "late".to_string(),
        }
    }
}

/// Sends a request during which these things happen, in this order. Gives what it came to, when the supervisor after the
/// last kill answers.
///
/// # Panics
/// When one of the points is not reached.
pub fn strike(node: &Node, blows: &[(Point, Blow)], request: Request) -> Result<Reply, Error> {
    strike_at(node, blows, || node.control().start(request).finish())
}

/// The same for anything that is done.
///
/// # Panics
/// When one of the points is not reached.
pub fn strike_at<T: std::fmt::Debug>(node: &Node, blows: &[(Point, Blow)], what: impl FnOnce() -> T) -> T {
    let lines: Vec<String> = blows.iter().map(|(point, blow)| format!("{} {}", point.name(), blow.words())).collect();
    let first = node.supervisor();
    node.write_file(FILE, 0o600, lines.join("\n").as_bytes());
    let result = what();
    wait_until_reached(node, &format!("{lines:?} to be reached; it came to {result:?}"));
    if blows.iter().any(|(_, blow)| blow.ends_supervisor()) {
        next_supervisor(node, first);
    }
    result
}

/// Waits for the supervisor after the one that was killed, and until it answers.
pub fn next_supervisor(node: &Node, killed: u64) {
    timing::wait_for("another supervisor", || (node.supervisor() != killed).then_some(()));
    timing::wait_for("its answer", || node.control().call(Request::new("", "hello")).ok());
}

/// The rows of the state database, as a supervisor would read them now.
pub fn rows(node: &Node) -> Rows {
    let place = TempDir::new().expect("a temporary directory can be made");
    timing::wait_for("a copy of the database", || {
        // With its log first: a checkpoint between the two copies is a copy that cannot be read.
        node.sh("cp /data/state.db-wal /data/state.db /run/");
        for name in ["state.db", "state.db-wal"] {
            std::fs::write(place.path().join(name), node.read_file(&format!("/run/{name}"))).expect("there is room");
        }
        let (_, rows) = State::open(&place.path().join("state.db"), || {}).ok()?;
        rows.moved_aside.is_none().then_some(rows)
    })
}

/// What of snapshots, layers and overlays is in the database and not on the disk, or the other way around.
pub fn difference(node: &Node) -> Vec<String> {
    let rows = rows(node);
    let snapshots = rows.snapshots.iter().map(|row| format!("snapshots/{}", row.id));
    let layers = rows.layers.iter().map(|row| format!("layers/{}", row.id));
    let overlays = rows
        .sandboxes
        .iter()
        .filter(|row| !["error", "stopped"].contains(&row.state.as_str()))
        .map(|row| format!("sandboxes/{}/{}", row.id, row.overlay.as_deref().unwrap_or("overlay")));
    let recorded: BTreeSet<String> = snapshots.chain(layers).chain(overlays).collect();
    let ended: BTreeSet<String> = rows
        .sandboxes
        .iter()
        .filter(|row| ["error", "stopped"].contains(&row.state.as_str()))
        .map(|row| format!("sandboxes/{}/", row.id))
        .collect();
    let mut listed = witness::files(node);
    listed.extend(witness::listed(node, "sandboxes -maxdepth 2 -name 'overlay*'"));
    listed.extend(witness::listed(node, "sandboxes -maxdepth 2 -name pausing"));
    let is_ended = |file: &str| ended.iter().any(|dir| file.starts_with(dir.as_str()));
    let there: BTreeSet<String> = listed.into_iter().filter(|file| !is_ended(file)).collect();
    let lost = recorded.difference(&there).map(|file| format!("- {file}"));
    lost.chain(there.difference(&recorded).map(|file| format!("+ {file}"))).collect()
}

/// Waits until database and disk agree.
///
/// # Panics
/// When they do not; the message says where they differ.
pub fn assert_agree(node: &Node, after: &str) {
    let end = std::time::Instant::now() + timing::hang() / 4;
    loop {
        let found = difference(node);
        if found.is_empty() {
            return;
        }
        assert!(std::time::Instant::now() < end, "after {after} database and disk differ: {found:#?}");
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
}
