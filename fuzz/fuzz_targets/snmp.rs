//! See `warren::fuzz::snmp`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| warren::fuzz::snmp(data));
