//! One node for all tests of a binary: a boot takes seconds, most tests need a fraction of one.
//!
//! Tests take turns with it, so that they can compare the node before and after. The first test boots it; a
//! test that finds it broken by the one before boots another; at the process' end it is powered off in order,
//! and a fault on its console then fails the whole run.

use std::ops::Deref;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use crate::artefacts::Artefact;
use crate::node::{Boot, Node};
use crate::timing;

static NODE: Mutex<Option<Node>> = Mutex::new(None);
static AT_EXIT: Once = Once::new();

/// A test's turn with the shared node. Its end searches the console for faults.
#[derive(Debug)]
pub struct Turn {
    node: MutexGuard<'static, Option<Node>>,
}

/// Waits for this test's turn with the node; boots it when there is none.
pub fn node() -> Turn {
    node_from(Boot::kernel)
}

/// The same for a file of tests that need the disk of templates: all of them have to ask here.
pub fn node_with_templates() -> Turn {
    node_from(|| Boot::kernel().template_disk(&Artefact::TemplateDisk.path()))
}

/// The same with the disk of the template `code` besides.
pub fn node_with_code() -> Turn {
    let boot = || Boot::kernel().template_disk(&Artefact::TemplateDisk.path());
    node_from(|| boot().template_disk(&Artefact::CodeDisk.path()))
}

/// The same for a file of tests that need both disks of templates and more: `more` says what.
pub fn node_with_code_and(more: impl FnOnce(Boot) -> Boot) -> Turn {
    node_from(|| {
        let disks = [Artefact::TemplateDisk, Artefact::CodeDisk];
        more(disks.iter().fold(Boot::kernel(), |boot, disk| boot.template_disk(&disk.path())))
    })
}

/// The same for a file of tests that have the node fail at given points (`fault`): all of them have to ask here.
pub fn node_with_faults() -> Turn {
    node_from(crate::fault::boot)
}

fn node_from(boot: impl FnOnce() -> Boot) -> Turn {
    let mut node = NODE.lock().unwrap_or_else(PoisonError::into_inner);
    if node.as_ref().is_some_and(|node| !node.is_running()) {
        *node = None;
    }
    if node.is_none() {
        AT_EXIT.call_once(|| {
            // SAFETY: `power_off_at_exit` is an `extern "C"` function without arguments that lives as long as
            // the program.
            unsafe { libc::atexit(power_off_at_exit) };
        });
        *node = Some(boot().start());
    }
    Turn { node }
}

impl Deref for Turn {
    type Target = Node;

    fn deref(&self) -> &Node {
        self.node.as_ref().expect("a turn has a node")
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let Some(node) = self.node.as_ref() else { return };
        let failed = std::thread::panicking();
        // Whatever a test did: nothing is left that is not written down, and nothing is written down that is not there.
        let ledger = std::panic::AssertUnwindSafe(|| node.assert_ledger_agrees());
        let disagrees = !failed && node.is_running() && std::panic::catch_unwind(ledger).is_err();
        let splats = node.new_splats();
        if failed || disagrees || !splats.is_empty() {
            if !failed {
                let _ = node.keep_console(); // a node dropped by a failed test keeps it by itself
            }
            // The next test gets a fresh one: whatever is wrong with this node shall fail one test only.
            *self.node = None;
        }
        if !splats.is_empty() {
            let text = splats.join("\n");
            if failed {
                eprintln!("the node's console shows faults:\n{text}");
            } else {
                panic!("the node's console shows faults:\n{text}");
            }
        }
        assert!(!disagrees, "the node's ledger and its kernel differ: see above");
    }
}

extern "C" fn power_off_at_exit() {
    let node = NODE.try_lock().ok().and_then(|mut node| node.take());
    let Some(node) = node else { return };
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(node.power_off())));
    if done.is_err() {
        // The test runner has printed its verdict already; only the exit code is left to change.
        eprintln!("error: the shared node did not end in order (limit {:?})", timing::hang());
        // SAFETY: ends the process at once; nothing of it is used afterwards.
        unsafe { libc::_exit(101) };
    }
}
