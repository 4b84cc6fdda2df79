//! Workers driven without the supervisor: each test runs a scenario of `vm-rig` on the node.

use qemu_tests::shared;

#[test]
fn a_worker_runs_a_guest_from_its_descriptors_to_its_last_words() {
    shared::node().rig(&["smoke"]);
}
