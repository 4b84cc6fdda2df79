//! Reading of small files that the kernel makes up: bounded, and as text.

use std::fs::File;
use std::io::Read;
use std::path::Path;

/// More than this is read of no file: /proc/diskstats of a machine with thousands of disks is smaller.
const MOST: u64 = 4 * 1024 * 1024;

/// A file's text, or nothing where it is not there or cannot be read.
pub fn read(path: &Path) -> String {
    let mut octets = Vec::new();
    if let Ok(file) = File::open(path)
        && let Err(e) = file.take(MOST).read_to_end(&mut octets)
    {
        // A sensor that is asleep says EAGAIN or EIO: then it has no value.
        log::trace!("node: {}: {e}", path.display());
        return String::new();
    }
    String::from_utf8_lossy(&octets).into_owned()
}

/// A file's one number.
pub fn number(path: &Path) -> Option<f64> {
    read(path).trim().parse().ok()
}

/// The names in a directory, sorted, at most 4,096.
pub fn names(path: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.take(4096).filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}
