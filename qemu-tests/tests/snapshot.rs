//! Snapshots of microVMs, below the supervisor: taken out of a worker and put into others.

use qemu_tests::shared;

#[test]
fn a_microvm_goes_on_in_another_worker_again_and_again() {
    print!("{}", shared::node().rig(&["snapshot", "again"]));
}

#[test]
fn all_processors_go_on_with_one_time() {
    print!("{}", shared::node().rig(&["snapshot", "processors"]));
}

#[test]
fn a_guest_that_runs_on_is_taken_as_it_was_and_cloned() {
    print!("{}", shared::node().rig(&["snapshot", "running"]));
}

#[test]
fn what_is_damaged_or_of_another_microvm_is_refused() {
    print!("{}", shared::node().rig(&["snapshot", "refused"]));
}

#[test]
fn a_processor_that_lacks_features_of_the_snapshots_is_refused_by_their_names() {
    print!("{}", shared::node().rig(&["snapshot", "processor"]));
}
