//! The network device between guests on the real node: each test runs a part of `vm-rig`'s `net`.

use qemu_tests::shared;

#[test]
fn streams_arrive_whole_with_and_without_offloads_and_with_long_frames() {
    print!("{}", shared::node().rig(&["net", "tcp"]));
}

#[test]
fn a_hundred_thousand_small_packets_are_counted_alike_by_all_who_see_them() {
    print!("{}", shared::node().rig(&["net", "packets"]));
}

#[test]
fn forged_addresses_reach_nobody_and_are_counted() {
    print!("{}", shared::node().rig(&["net", "forged"]));
}

#[test]
fn limits_bound_what_passes_and_lose_nothing_of_a_stream() {
    print!("{}", shared::node().rig(&["net", "limits"]));
}
