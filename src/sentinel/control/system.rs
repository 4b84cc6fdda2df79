//! What the kernel says of this process and this machine.

use std::fs;

/// This process.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Usage {
    /// Seconds of CPU time used since its start.
    pub cpu_seconds: f64,
    /// Octets resident.
    pub resident_bytes: u64,
    /// Threads.
    pub threads: u64,
    /// Open descriptors.
    pub descriptors: u64,
}

/// Reads /proc/self.
pub fn usage() -> Usage {
    let mut usage = Usage::default();
    if let Ok(stat) = fs::read_to_string("/proc/self/stat") {
        usage.cpu_seconds = cpu_seconds(&stat).unwrap_or(0.0);
    }
    if let Ok(status) = fs::read_to_string("/proc/self/status") {
        usage.resident_bytes = status_value(&status, "VmRSS:").unwrap_or(0) * 1024;
        usage.threads = status_value(&status, "Threads:").unwrap_or(0);
    }
    usage.descriptors = fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count() as u64);
    usage
}

/// Fields 14 and 15 (utime, stime) in hundredths of a second; the name in field 2 may hold anything (proc(5)).
fn cpu_seconds(stat: &str) -> Option<f64> {
    let after_name = stat.rsplit_once(')')?.1;
    let mut fields = after_name.split_ascii_whitespace().skip(11);
    let user: f64 = fields.next()?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some((user + system) / 100.0)
}

fn status_value(status: &str, key: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

/// Octets of memory altogether and available.
pub fn memory() -> (u64, u64) {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let of = |key| status_value(&text, key).unwrap_or(0) * 1024;
    (of("MemTotal:"), of("MemAvailable:"))
}

/// Octets altogether and available on the file system of a path.
pub fn disk(path: &std::path::Path) -> (u64, u64) {
    nix::sys::statvfs::statvfs(path).map_or((0, 0), |stat| {
        let unit = stat.fragment_size();
        (stat.blocks().saturating_mul(unit), stat.blocks_available().saturating_mul(unit))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_measured() {
        let usage = usage();
        assert!(usage.resident_bytes > 0 && usage.threads > 0 && usage.descriptors > 2);
        assert!(memory().0 >= memory().1);
        assert!(disk(std::path::Path::new("/")).0 > 0);
    }

    #[test]
    fn a_process_name_with_anything_in_it_is_got_over() {
        assert_eq!(cpu_seconds("1 (a) b) S 1 1 1 0 -1 4194560 1 2 3 4 150 50 0 0 20"), Some(2.0));
        assert_eq!(cpu_seconds("x"), None);
    }
}
