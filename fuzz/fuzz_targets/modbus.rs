//! See `warren::fuzz::modbus`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| warren::fuzz::modbus(data));
