//! A guest that becomes another one: each test runs a part of `vm-rig`'s `identity`.

use qemu_tests::shared;

#[test]
fn a_frozen_guest_goes_on_as_somebody_else() {
    print!("{}", shared::node().rig(&["identity", "thaw"]));
}

#[test]
fn a_guest_that_was_another_machine_reseeds_its_kernel_and_calls_again() {
    print!("{}", shared::node().rig(&["identity", "renew"]));
}
