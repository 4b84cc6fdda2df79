//! The block devices of the machine, as the kernel lists them.

use std::fs;
use std::path::{Path, PathBuf};

/// Whole disks and partitions that have a medium, as /dev/NAME, sorted by name. Loop, RAM, zram and device-mapper
/// devices are left out: nothing of Warren's lies on one.
pub fn list() -> Vec<PathBuf> {
    list_in(Path::new("/sys/class/block"), Path::new("/dev"))
}

fn list_in(class: &Path, dev: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(class) else { return Vec::new() };
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| !["loop", "ram", "zram", "dm-"].iter().any(|prefix| name.starts_with(prefix)))
        .filter(|name| sectors(&class.join(name)) > 0)
        .collect();
    names.sort();
    // The kernel writes `!` where a device's name has a slash.
    names.into_iter().map(|name| dev.join(name.replace('!', "/"))).collect()
}

/// Size in 512-octet sectors; 0 where there is no medium.
fn sectors(device: &Path) -> u64 {
    fs::read_to_string(device.join("size")).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_without_medium_and_virtual_ones_are_left_out() {
        let root = std::env::temp_dir().join(format!("warren-block-{}", std::process::id()));
        for (name, size) in [("vdb", "2048\n"), ("vda", "64\n"), ("sr0", "0\n"), ("loop0", "64\n"), ("cciss!c0d0", "9")]
        {
            fs::create_dir_all(root.join(name)).unwrap();
            fs::write(root.join(name).join("size"), size).unwrap();
        }
        let found = list_in(&root, Path::new("/dev"));
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(found, ["/dev/cciss/c0d0", "/dev/vda", "/dev/vdb"].map(PathBuf::from));
    }
}
