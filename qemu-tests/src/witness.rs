//! A sandbox whose past can be told: a program in it counts, and words lie in its memory and on its disk.

use std::collections::BTreeSet;
use std::sync::Once;

use warren::wire::Request;

use crate::node::Node;
use crate::sandbox::Sandbox;
use crate::state::NodeState;
use crate::timing;

/// Counts in memory for as long as it lives.
const COUNT: &str =
    "n=0; while :; do n=$((n+1)); echo $n > /dev/shm/next; mv /dev/shm/next /dev/shm/count; sleep 0.05; done";

/// Starts the counting program and waits until it counts.
pub fn start(sandbox: &Sandbox) {
    sandbox.client().ok(sandbox.exec_request(&["sh", "-c", COUNT]).set("user", 0).set("detach", true));
    timing::wait_for("the counter's start", || (count(sandbox) > 2).then_some(()));
}

/// Puts what never changes into its memory, so that what it changes is little of the whole.
pub fn load(sandbox: &Sandbox) {
    sandbox.sh("head -c 24000000 /dev/urandom > /dev/shm/load");
}

/// How far it is.
pub fn count(sandbox: &Sandbox) -> u64 {
    sandbox.sh("cat /dev/shm/count 2>/dev/null || echo 0").trim().parse().unwrap_or(0)
}

/// Waits until it goes on.
pub fn goes_on(sandbox: &Sandbox) {
    let from = count(sandbox);
    assert!(from > 0, "the counting program of {} began anew", sandbox.id);
    timing::wait_for("the counter to go on", || (count(sandbox) > from).then_some(()));
}

/// Puts a word into memory and on the disk.
pub fn say(sandbox: &Sandbox, word: &str) {
    sandbox.sh(&format!("echo {word} > /workspace/word; echo {word} > /dev/shm/word; sync"));
}

/// The word that is in memory and on the disk.
///
/// # Panics
/// When they are two.
pub fn word(sandbox: &Sandbox) -> String {
    let said = sandbox.sh("cat /workspace/word /dev/shm/word");
    let words: Vec<&str> = said.lines().collect();
    assert!(words.len() == 2 && words[0] == words[1], "memory and disk are of two instants: {said:?}");
    words[0].to_string()
}

/// Files of snapshots and layers on the data partition.
pub fn files(node: &Node) -> BTreeSet<String> {
    listed(node, "snapshots layers -mindepth 1 -maxdepth 1")
}

/// What `find` finds on the data partition. What goes meanwhile may be missing.
pub fn listed(node: &Node, what: &str) -> BTreeSet<String> {
    let output = node.run(&["sh", "-c", &format!("cd /data && find {what} 2>&1")]);
    output.stdout.lines().filter(|line| !line.starts_with("find: ")).map(str::to_string).collect()
}

/// Waits until a sandbox is in a state that lasts.
pub fn settled(node: &Node, id: &str) -> String {
    timing::wait_for("a state that lasts", || {
        let row = node.control().call(Request::new("", "sandbox.inspect").arg(id)).ok()?.fields;
        let state = row.get("state")?.to_string();
        ["running", "paused", "error", "stopped"].contains(&state.as_str()).then_some(state)
    })
}

/// Waits until the agent of a sandbox that runs answers, also where a supervisor has just taken it over.
pub fn answers(sandbox: &Sandbox) {
    timing::wait_for("its agent", || sandbox.client().call(sandbox.exec_request(&["true"])).ok());
}

/// Asks until nothing is left to be taken down of a worker before, and it is done.
///
/// # Panics
/// When it fails for another reason.
pub fn insist(node: &Node, request: &Request) {
    timing::wait_for("the end of what is under way", || match node.control().call(request.clone()) {
        Ok(_) => Some(()),
        Err(error) if error.is(warren::wire::Code::BadState) => None,
        Err(error) => panic!("{request:?}: {error}"),
    });
}

/// The node as it is before a test, to compare it with afterwards. Whatever it does once, at its first sandbox, is done.
pub fn quiet(node: &Node) -> NodeState {
    static FIRST: Once = Once::new();
    FIRST.call_once(|| drop(node.sandbox(&[])));
    node.assert_ledger_agrees();
    NodeState::of(node)
}
