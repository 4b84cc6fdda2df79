//! See `warren::fuzz::elf`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| warren::fuzz::elf(data));
