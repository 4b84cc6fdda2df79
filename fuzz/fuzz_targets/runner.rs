//! See `warren::fuzz::runner`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| warren::fuzz::runner(data));
