//! What is beyond a node's uplink, for tests with real guests: hosts in a network namespace of the node (`vm-rig internet`).

use crate::client::Call;
use crate::node::{Node, root_exec};
use crate::timing::wait_for;

/// A host that echoes.
pub const HOST: &str = "1.2.3.4";
/// Another.
pub const OTHER: &str = "5.6.7.8";

/// The outside of a node; it is there until this is dropped.
#[derive(Debug)]
pub struct Internet<'a> {
    node: &'a Node,
    _call: Call,
}

impl<'a> Internet<'a> {
    /// Makes it.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn of(node: &'a Node) -> Self {
        wait_for("the uplink of a test before to be gone", || {
            node.run(&["ip", "link", "show", "up0"]).exit.ne(&0).then_some(())
        });
        let mut call = node.root().start(root_exec(&[node.rig_program(), "internet"]));
        call.read_until("stdout", "ready\n");
        Self { node, _call: call }
    }

    /// Octets (TCP) or datagrams (UDP) that came to a host.
    ///
    /// # Panics
    /// When it does not say.
    pub fn count(&self, host: &str, protocol: &str) -> u64 {
        let text = self.node.sh("nc 93.0.0.2 9 < /dev/null");
        let mut lines = text.lines().filter_map(|line| line.strip_prefix(&format!("{host} {protocol} ")));
        lines.next().map_or(0, |count| count.parse().expect("a count"))
    }
}
