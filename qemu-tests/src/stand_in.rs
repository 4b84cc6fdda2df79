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

    /// Has it live in its sandbox's control group, as what was a worker does, with as many threads as it likes.
    pub fn join_worker(&self, sandbox: &Sandbox) {
        let worker = self.node.worker(&sandbox.id);
        self.node.sh(&format!(
            "group=/sys/fs/cgroup$(cut -d: -f3 /proc/{worker}/cgroup); echo max > $group/pids.max; \
             for pid in {}; do echo $pid > $group/cgroup.procs; done",
            self.processes()
        ));
    }

    /// What a shell finds it by.
    fn processes(&self) -> String {
        format!("$(node-tool processes | grep '^[0-9]* node-tool .* {} ' | cut -d' ' -f1)", self.real)
    }

    /// Ends it. The worker has its socket again, where it is not gone with its sandbox.
    pub fn end(self) {
        let processes = self.processes();
        let Self { node, socket, real } = self;
        node.sh(&format!(
            "for pid in {processes}; do kill -9 $pid; done; \
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
