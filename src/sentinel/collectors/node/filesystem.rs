//! Mounted file systems and their room.

use std::collections::HashSet;
use std::path::Path;

use crate::sentinel::collect::Gatherer;
use crate::sentinel::model::Kind;

/// Mounts looked at, at most.
const MOST: usize = 16_384;

/// One line of /proc/mounts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// What is mounted.
    pub device: String,
    /// Where.
    pub point: String,
    /// As which type.
    pub kind: String,
    /// Whether it cannot be written.
    pub read_only: bool,
}

/// The mounts, each mount point once: a later mount hides an earlier one.
pub fn mounts(text: &str) -> Vec<Mount> {
    let mut seen = HashSet::new();
    let mut mounts: Vec<Mount> = text.lines().rev().take(MOST).filter_map(mount).collect();
    mounts.retain(|mount| seen.insert(mount.point.clone()));
    mounts.reverse();
    mounts
}

fn mount(line: &str) -> Option<Mount> {
    let mut words = line.split(' ');
    let (device, point, kind, options) = (words.next()?, words.next()?, words.next()?, words.next()?);
    Some(Mount {
        device: unescaped(device),
        point: unescaped(point),
        kind: kind.to_string(),
        read_only: options.split(',').any(|option| option == "ro"),
    })
}

/// Space, tab, line feed, backslash are `\040`, `\011`, `\012`, `\134` (fs/proc_namespace.c).
fn unescaped(word: &str) -> String {
    let mut octets = Vec::with_capacity(word.len());
    let mut rest = word.as_bytes();
    while let Some((&octet, tail)) = rest.split_first() {
        let digits = tail.get(..3).filter(|digits| octet == b'\\' && digits.iter().all(|d| (b'0'..b'8').contains(d)));
        match digits {
            Some(digits) => {
                octets.push(digits.iter().fold(0u8, |value, digit| value.wrapping_mul(8).wrapping_add(digit - b'0')));
                rest = &tail[3..];
            }
            None => {
                octets.push(octet);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&octets).into_owned()
}

/// Asks a file system for its room. May block for ever on a dead network file system.
pub fn measure(root: &Path, mount: &Mount, out: &mut Gatherer<'_>) {
    let labels =
        [("device", mount.device.as_str()), ("fstype", mount.kind.as_str()), ("mountpoint", mount.point.as_str())];
    let mut gauge = |name: &str, value: f64| out.add(name, Kind::Gauge, &labels, value);
    gauge("node_filesystem_readonly", f64::from(u8::from(mount.read_only)));
    let path = root.join(mount.point.trim_start_matches('/'));
    match nix::sys::statvfs::statvfs(&path) {
        Ok(stat) => {
            let unit = stat.fragment_size() as f64;
            gauge("node_filesystem_device_error", 0.0);
            gauge("node_filesystem_size_bytes", stat.blocks() as f64 * unit);
            gauge("node_filesystem_free_bytes", stat.blocks_free() as f64 * unit);
            gauge("node_filesystem_avail_bytes", stat.blocks_available() as f64 * unit);
            gauge("node_filesystem_files", stat.files() as f64);
            gauge("node_filesystem_files_free", stat.files_free() as f64);
        }
        Err(_) => gauge("node_filesystem_device_error", 1.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_unescaped_and_the_last_mount_counts() {
        let text =
            "/dev/a / ext4 rw,relatime 0 0\ntmpfs /a\\040b tmpfs ro,nosuid 0 0\n/dev/b / ext4 ro 0 0\nshort /x\n";
        let found = mounts(text);
        assert_eq!(found.len(), 2);
        assert_eq!((found[0].point.as_str(), found[0].read_only), ("/a b", true));
        assert_eq!((found[1].device.as_str(), found[1].point.as_str()), ("/dev/b", "/"));
        assert_eq!(unescaped("a\\04"), "a\\04");
    }
}
