//! See `warren::fuzz::netlink`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| warren::fuzz::netlink(data));
