//! Bodies of the fuzz targets: each takes any octets and panics when a promise is broken. The targets in `fuzz/`
//! and the replay of their corpus in `cargo test` both call these.

#![allow(clippy::unwrap_used)] // a failure is the finding

mod block;
mod bundle;
mod elf;
mod exposition;
mod http_response;
mod influx;
mod ledger;
mod mmio;
mod modbus;
mod net;
mod netlink;
mod node;
mod overlay;
mod recipe;
mod runner;
mod saved;
mod sentinel_log;
mod snmp;
mod unpack;
mod virtqueue;
mod vsock;
mod wire;

pub use block::block;
pub use bundle::bundle;
pub use elf::elf;
pub use exposition::exposition;
pub use http_response::http_response;
pub use influx::influx;
pub use ledger::ledger;
pub use mmio::mmio;
pub use modbus::modbus;
pub use net::net;
pub use netlink::netlink;
pub use node::node;
pub use overlay::overlay;
pub use recipe::recipe;
pub use runner::runner;
pub use saved::saved;
pub use sentinel_log::sentinel_log;
pub use snmp::snmp;
pub use unpack::unpack;
pub use virtqueue::virtqueue;
pub use vsock::vsock;
pub use wire::wire;

/// Reads numbers off the input; zeroes once it has ended.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn u8(&mut self) -> u8 {
        match self.0.split_first() {
            Some((&first, rest)) => {
                self.0 = rest;
                first
            }
            None => 0,
        }
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.u8(), self.u8()])
    }

    fn u32(&mut self) -> u32 {
        u32::from(self.u16()) | u32::from(self.u16()) << 16
    }

    fn u64(&mut self) -> u64 {
        u64::from(self.u32()) | u64::from(self.u32()) << 32
    }

    fn ended(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::devices::driver::Seed;
    use std::path::Path;

    type Target = (&'static str, fn(&[u8]));
    const TARGETS: [Target; 22] = [
        ("block", block),
        ("bundle", bundle),
        ("elf", elf),
        ("exposition", exposition),
        ("http_response", http_response),
        ("influx", influx),
        ("ledger", ledger),
        ("modbus", modbus),
        ("net", net),
        ("netlink", netlink),
        ("node", node),
        ("mmio", mmio),
        ("overlay", overlay),
        ("recipe", recipe),
        ("runner", runner),
        ("saved", saved),
        ("sentinel_log", sentinel_log),
        ("snmp", snmp),
        ("unpack", unpack),
        ("virtqueue", virtqueue),
        ("vsock", vsock),
        ("wire", wire),
    ];

    #[test]
    fn every_input_of_the_corpus_passes() {
        for (name, target) in TARGETS {
            let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
            let mut count = 0;
            for entry in std::fs::read_dir(&directory).unwrap() {
                let path = entry.unwrap().path();
                println!("{}", path.display());
                target(&std::fs::read(path).unwrap());
                count += 1;
            }
            assert!(count > 0, "{} is empty", directory.display());
        }
    }

    #[test]
    fn random_inputs_pass() {
        for (name, target) in TARGETS {
            let rounds = if cfg!(debug_assertions) { 400 } else { 20_000 };
            for seed in 0..rounds {
                let mut random = Seed(seed);
                let len = random.below(2048) as usize;
                let mut input = random.octets(len);
                // Small numbers are indices, lengths and flags that mean something.
                if seed % 2 == 0 {
                    input.iter_mut().for_each(|octet| *octet &= 0x1f);
                }
                println!("{name} seed {seed}");
                target(&input);
            }
        }
    }
}
