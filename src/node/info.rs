//! What the node says of itself.

use std::fs;
use std::time::UNIX_EPOCH;

use super::supervisor::Supervisor;
use crate::sandbox::lifecycle::State;
use crate::wire::Fields;

impl Supervisor {
    /// The fields of `node.info`.
    pub(super) fn info(&self) -> Fields {
        let started = self.started.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        let live = self.sandboxes.values().filter(|sandbox| sandbox.state.is_live() && sandbox.parked.is_none());
        let (mut vcpus, mut memory, mut count) = (0u64, 0u64, 0u64);
        for sandbox in live {
            count += 1;
            vcpus += u64::from(sandbox.spec.vcpus);
            memory += u64::from(sandbox.spec.memory_mib);
        }
        let running = self.sandboxes.values().filter(|sandbox| sandbox.state == State::Running).count();
        let kvm = fs::metadata("/dev/kvm").is_ok();
        let status = match (self.stopping.is_some() || self.drain.is_some(), kvm) {
            (true, _) => "draining",
            (false, true) => "healthy",
            (false, false) => "unhealthy",
        };
        let fields = Fields::new()
            .with("id", &self.node_id)
            .with("name", &self.config.node.name)
            .with("version", env!("CARGO_PKG_VERSION"))
            .with("status", status);
        let fields = if kvm { fields } else { fields.with("problem", "/dev/kvm is missing") };
        let fields = fields
            .with("started_ms", started)
            .with(
                "kernel",
                nix::sys::utsname::uname().map(|u| u.release().to_string_lossy().into_owned()).unwrap_or_default(),
            )
            .with("cpus", std::thread::available_parallelism().map_or(0, std::num::NonZero::get))
            .with("memory_mib", memory_kib("MemTotal:") / 1024)
            .with("memory_available_mib", memory_kib("MemAvailable:") / 1024);
        let fields = match nix::sys::statvfs::statvfs(&self.config.paths.data) {
            Ok(disk) => fields
                .with("disk_mib", disk.blocks() * disk.fragment_size() / (1024 * 1024))
                .with("disk_available_mib", disk.blocks_available() * disk.fragment_size() / (1024 * 1024)),
            Err(_) => fields,
        };
        let until = self.drain.as_ref().and_then(|drain| drain.row.until_ms);
        let fields = until.into_iter().fold(fields, |fields, until| fields.with("drain_until_ms", until));
        self.externals
            .fields(fields)
            .with("sandboxes", count)
            .with("sandboxes_running", running)
            .with("allocated_vcpus", vcpus)
            .with("allocated_memory_mib", memory)
            .with("clients", self.clients.len())
    }
}

/// A value of /proc/meminfo, in KiB; zero where it cannot be read.
fn memory_kib(key: &str) -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    line.and_then(|rest| rest.split_whitespace().next()).and_then(|number| number.parse().ok()).unwrap_or(0)
}
