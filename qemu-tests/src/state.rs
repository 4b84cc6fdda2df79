//! What a node holds: taken before and after, it shows what a failed request left behind.

use crate::node::Node;
use crate::timing;

/// Everything on the node that a sandbox takes: processes, cgroups, files, sockets, descriptors. Sorted lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeState(Vec<String>);

impl NodeState {
    /// Takes it.
    pub fn of(node: &Node) -> Self {
        Self(node.run(&["node-tool", "state"]).stdout.lines().map(str::to_string).collect())
    }

    /// Lines that are in one and not in the other, marked + and -.
    fn difference(&self, later: &Self) -> Vec<String> {
        let mut lost = self.0.clone();
        let mut changes = Vec::new();
        for line in &later.0 {
            match lost.iter().position(|earlier| earlier == line) {
                Some(at) => drop(lost.remove(at)),
                None => changes.push(format!("+ {line}")),
            }
        }
        changes.extend(lost.iter().map(|line| format!("- {line}")));
        changes
    }

    /// Waits until the node is as it was.
    ///
    /// # Panics
    /// When it does not get there; the message lists what is left behind.
    pub fn assert_restored(&self, node: &Node) {
        self.assert_restored_but(node, |_| false);
    }

    /// The same, where lines that `expected` takes may be there or not.
    ///
    /// # Panics
    /// As `assert_restored`.
    pub fn assert_restored_but(&self, node: &Node, expected: impl Fn(&str) -> bool) {
        let end = std::time::Instant::now() + timing::hang();
        loop {
            let mut changes = self.difference(&Self::of(node));
            changes.retain(|change| !expected(&change[2..]));
            if changes.is_empty() {
                return;
            }
            assert!(std::time::Instant::now() < end, "left behind on the node:\n{}", changes.join("\n"));
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
    }
}
