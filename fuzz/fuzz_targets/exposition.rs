//! See `warren::fuzz::exposition`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| warren::fuzz::exposition(data));
