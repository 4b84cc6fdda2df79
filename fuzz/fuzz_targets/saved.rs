//! See `warren::fuzz::saved`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| warren::fuzz::saved(data));
