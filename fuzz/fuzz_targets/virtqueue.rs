//! See `warren::fuzz::virtqueue`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| warren::fuzz::virtqueue(data));
