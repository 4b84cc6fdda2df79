//! A program that stands in for a sandbox's worker, for whoever connects to it from then on (`node-tool claim` and `pose`).

use crate::node::Node;
use crate::sandbox::Sandbox;
use crate::timing;
use warren::wire::Request;

/// One that runs.
#[derive(Debug)]
pub struct StandIn<'a> {
    node: &'a Node,
    socket: String,
    real: String,
}

impl<'a> StandIn<'a> {
    /// Starts `node-tool` with these words for a sandbox. The next supervisor meets it.
    pub fn start(node: &'a Node, sandbox: &Sandbox, words: &str) -> Self {
        let (socket, real) =
            (format!("/run/warren/sandboxes/{}.sock", sandbox.id), format!("/run/{}.real", sandbox.id));
        // It writes nothing, and must not hold the shell's output open.
        node.sh(&format!(
            "node-tool {words} {real} {socket} < /dev/null > /dev/null 2>&1 & \
             until [ -S {real} ] && [ -S {socket} ]; do sleep 0.1; done"
        ));
        Self { node, socket, real }
    }

    /// Ends it. The worker has its socket again, where it is not gone with its sandbox.
    pub fn end(self) {
        let Self { node, socket, real } = self;
        node.sh(&format!(
            "for pid in $(node-tool processes | grep '^[0-9]* node-tool .* {real} ' | cut -d' ' -f1); do kill -9 $pid; done; \
             if [ -e {socket} ]; then mv {real} {socket}; else rm -f {real}; fi"
        ));
    }
}

/// Kills the supervisor and waits for the next one.
pub fn next_supervisor(node: &Node) {
    let killed = node.supervisor();
    node.sh(&format!("kill -9 {killed}"));
    timing::wait_for("another supervisor", || (node.supervisor() != killed).then_some(()));
    timing::wait_for("its answer", || node.control().call(Request::new("", "hello")).ok());
}
