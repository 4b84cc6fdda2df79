//! The disk image, as a user boots it.

use qemu_tests::node::Boot;

#[test]
fn the_disk_image_boots_under_uefi_and_runs_a_microvm() {
    let node = Boot::image().start();
    let sandbox = node.sandbox(&[]);
    assert_eq!(sandbox.exec(&["uname", "-s"]).text("stdout"), "Linux\n");
    let id = sandbox.keep();
    let mut disks = node.power_off();
    // The data partition is on the same disk: what was there is there again.
    let disk = disks.pop().expect("the image");
    let node = Boot::image().image_disk(disk).start();
    let row = node.control().ok(qemu_tests::Request::new("", "sandbox.inspect").arg(&id)).fields;
    assert_eq!(row.get("state"), Some("stopped"), "{row:?}");
    node.power_off();
}
