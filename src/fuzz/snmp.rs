/// Whatever comes over UDP, reading it does not panic and nothing passes for signed by chance.
pub fn snmp(data: &[u8]) {
    crate::sentinel::collectors::snmp::fuzz_datagram(data);
}
