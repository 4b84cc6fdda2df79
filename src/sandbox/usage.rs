//! What a sandbox costs the node, by the kernel's own account of its cgroup and its files.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::home::Home;
use crate::wire::Fields;

/// What one sandbox uses at a moment; what the kernel does not say is `None`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Processor time of its worker, guest and host part together, since its start; microseconds.
    pub cpu_us: Option<u64>,
    /// Memory of its worker: the guest's touched pages and the worker's own.
    pub resident_bytes: Option<u64>,
    /// All memory charged to it: besides that, the page cache of its files and the kernel's own.
    pub charged_bytes: Option<u64>,
    /// Blocks of its private disk that it wrote.
    pub disk_bytes: Option<u64>,
}

impl Usage {
    /// Reads it. Looks only into the kernel's own file systems and at one inode, so it does not wait for a disk.
    pub fn of(home: &Home) -> Self {
        let cgroup = |file: &str| fs::read_to_string(home.cgroup().join(file)).unwrap_or_default();
        Self {
            cpu_us: keyed(&cgroup("cpu.stat"), "usage_usec"),
            resident_bytes: keyed(&cgroup("memory.stat"), "anon"),
            charged_bytes: cgroup("memory.current").trim().parse().ok(),
            disk_bytes: blocks(&home.overlay()),
        }
    }

    /// As fields of a reply.
    pub fn fields(&self, fields: Fields) -> Fields {
        [
            ("cpu_ms", self.cpu_us.map(|us| us / 1000)),
            ("memory_resident_kib", self.resident_bytes.map(|bytes| bytes >> 10)),
            ("memory_charged_kib", self.charged_bytes.map(|bytes| bytes >> 10)),
            ("disk_used_kib", self.disk_bytes.map(|bytes| bytes >> 10)),
        ]
        .into_iter()
        .filter_map(|(key, value)| Some((key, value?)))
        .fold(fields, |fields, (key, value)| fields.with(key, value))
    }
}

/// The number behind a key in one of a cgroup's flat files.
fn keyed(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.parse().ok())
}

fn blocks(file: &Path) -> Option<u64> {
    file.metadata().ok().map(|meta| meta.blocks() * 512)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_found_whole() {
        let text = "anon_thp 7\nanon 4096\nfile 3\n";
        assert_eq!(keyed(text, "anon"), Some(4096));
        assert_eq!(keyed(text, "file"), Some(3));
        assert_eq!(keyed(text, "fil"), None);
        assert_eq!(keyed("", "anon"), None);
    }
}
