//! See `warren::fuzz::sentinel_log`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| warren::fuzz::sentinel_log(data));
