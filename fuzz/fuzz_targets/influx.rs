//! See `warren::fuzz::influx`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| warren::fuzz::influx(data));
