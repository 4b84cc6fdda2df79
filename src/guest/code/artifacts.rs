//! The files that a run created or changed: those below a directory whose status changed since the run began. Users can
//! set a file's times, but not the time of its status' last change.
//!
//! Everything is bounded: entries looked at, files told of, octets hashed, time. Nothing is followed out of the tree by a
//! symbolic link, and only regular files are opened.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

/// Entries that are looked at.
const ENTRIES_MAX: usize = 100_000;
/// Files that are told of.
const FILES_MAX: usize = 1000;
/// Octets of their names together.
const NAMES_MAX: usize = 128 * 1024;
/// Octets that are hashed.
const HASHED_MAX: u64 = 1 << 30;
/// Time that all of it may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// A moment in the time that file systems write down: seconds and nanoseconds.
pub(super) type Moment = (i64, i64);

/// Now, as a file system would write it down.
pub(super) fn now() -> Moment {
    // SAFETY: timespec is plain data for which all zeros is a valid value.
    let mut time: libc::timespec = unsafe { std::mem::zeroed() };
    // SAFETY: clock_gettime fills one timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_REALTIME_COARSE, &mut time) };
    (time.tv_sec, time.tv_nsec)
}

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// A line of JSON each.
    pub lines: Vec<Vec<u8>>,
    /// A bound was met: there may be more.
    pub incomplete: bool,
}

/// The files that the last run was told to have changed, and when they did. Times are written down in steps of some
/// milliseconds: what one run did last may look as if the next had done it first.
pub(crate) type Told = Arc<Mutex<BTreeSet<(PathBuf, Moment)>>>;

/// Looks for files below `root` that changed at or after `since`.
pub(super) fn changed(root: &Path, since: Moment, told: &Told) -> Found {
    let mut seen = BTreeSet::new();
    let before = std::mem::take(&mut *told.lock().unwrap_or_else(PoisonError::into_inner));
    let found = look(root, since, &before, &mut seen);
    *told.lock().unwrap_or_else(PoisonError::into_inner) = seen;
    found
}

fn look(
    root: &Path,
    since: Moment,
    before: &BTreeSet<(PathBuf, Moment)>,
    seen: &mut BTreeSet<(PathBuf, Moment)>,
) -> Found {
    let end = Instant::now() + PATIENCE;
    let mut found = Found::default();
    let Ok(device) = fs::symlink_metadata(root).map(|meta| meta.dev()) else { return found };
    let (mut entries, mut names, mut hashed) = (0, 0, 0);
    let mut directories = vec![root.to_path_buf()];
    while let Some(directory) = directories.pop() {
        let Ok(listed) = fs::read_dir(&directory) else { continue };
        let mut listed: Vec<_> = listed.flatten().take(ENTRIES_MAX - entries).collect();
        listed.sort_by_key(fs::DirEntry::file_name);
        for entry in listed {
            entries += 1;
            let Ok(meta) = entry.metadata() else { continue };
            let path = entry.path();
            if entries >= ENTRIES_MAX || path.as_os_str().len() >= 4096 || Instant::now() > end {
                found.incomplete = true;
                return found;
            }
            if meta.is_dir() && meta.dev() == device {
                directories.push(path);
            } else if meta.is_file() && (meta.ctime(), meta.ctime_nsec()) >= since {
                let mark = (path.clone(), (meta.ctime(), meta.ctime_nsec()));
                if before.contains(&mark) {
                    continue;
                }
                names += path.as_os_str().len();
                if found.lines.len() >= FILES_MAX || names > NAMES_MAX {
                    found.incomplete = true;
                    return found;
                }
                match hash(&path, HASHED_MAX - hashed, end) {
                    Ok((size, hash)) => {
                        hashed += size;
                        seen.insert(mark);
                        found.lines.push(line(&path, size, &hash));
                    }
                    Err(Unhashed::TooMuch) => found.incomplete = true,
                    // It went, or was another by now.
                    Err(Unhashed::Gone) => {}
                }
            }
        }
    }
    found
}

enum Unhashed {
    TooMuch,
    Gone,
}

fn hash(path: &PathBuf, most: u64, end: Instant) -> Result<(u64, [u8; 32]), Unhashed> {
    // One that was replaced meanwhile by a FIFO or a link does not hold us up, nor lead us elsewhere.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    let mut file: File = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(|_| Unhashed::Gone)?;
    if !file.metadata().is_ok_and(|meta| meta.is_file()) {
        return Err(Unhashed::Gone);
    }
    let (mut digest, mut size, mut buffer) = (Sha256::new(), 0u64, vec![0; 64 * 1024]);
    loop {
        let n = file.read(&mut buffer).map_err(|_| Unhashed::Gone)?;
        if n == 0 {
            return Ok((size, digest.finalize().into()));
        }
        size += n as u64;
        // A file may grow as we read.
        if size > most || Instant::now() > end {
            return Err(Unhashed::TooMuch);
        }
        digest.update(buffer.get(..n).unwrap_or_default());
    }
}

fn line(path: &Path, size: u64, hash: &[u8; 32]) -> Vec<u8> {
    let hash: String = hash.iter().map(|octet| format!("{octet:02x}")).collect();
    let mut line = b"{\"type\":\"artifact\",\"path\":".to_vec();
    line.extend(quoted(path.as_os_str().as_bytes()));
    line.extend(format!(",\"size\":{size},\"sha256\":\"{hash}\"}}\n").into_bytes());
    line
}

/// Octets as a string of JSON. What is not UTF-8 is shown by U+FFFD.
fn quoted(octets: &[u8]) -> Vec<u8> {
    let mut out = vec![b'"'];
    for octet in String::from_utf8_lossy(octets).bytes() {
        match octet {
            b'"' | b'\\' => out.extend([b'\\', octet]),
            0..0x20 => out.extend(format!("\\u{octet:04x}").into_bytes()),
            _ => out.push(octet),
        }
    }
    out.push(b'"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    struct Tree(PathBuf);

    impl Tree {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("warren-artifacts-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn text(found: &Found) -> Vec<String> {
        found.lines.iter().map(|line| String::from_utf8(line.clone()).unwrap()).collect()
    }

    #[test]
    fn new_files_are_told_with_size_and_hash_and_nothing_else_is() {
        let tree = Tree::new("new");
        fs::create_dir(tree.0.join("deep")).unwrap();
        fs::write(tree.0.join("deep/a\"b"), b"abc").unwrap();
        symlink("/etc/passwd", tree.0.join("link")).unwrap();
        nix::unistd::mkfifo(&tree.0.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let found = changed(&tree.0, (0, 0), &Told::default());
        assert!(!found.incomplete);
        let line = format!(
            "{{\"type\":\"artifact\",\"path\":\"{}/deep/a\\\"b\",\"size\":3,\"sha256\":\"{}\"}}\n",
            tree.0.display(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(text(&found), [line]);
    }

    #[test]
    fn what_was_there_before_is_not_told_although_its_times_say_otherwise() {
        let tree = Tree::new("old");
        let path = tree.0.join("old");
        fs::write(&path, b"x").unwrap();
        let changed_at = fs::metadata(&path).unwrap();
        let after = (changed_at.ctime(), changed_at.ctime_nsec() + 1);
        File::options().write(true).open(&path).unwrap().set_modified(std::time::SystemTime::now()).unwrap();
        let at = fs::metadata(&path).unwrap();
        let told = usize::from((at.ctime(), at.ctime_nsec()) >= after);
        assert_eq!(changed(&tree.0, after, &Told::default()).lines.len(), told, "setting times changes the status");
        assert!(changed(&tree.0, (at.ctime() + 1, 0), &Told::default()).lines.is_empty());
    }

    #[test]
    fn what_was_told_of_one_run_is_not_told_of_the_next() {
        let tree = Tree::new("twice");
        let told = Told::default();
        fs::write(tree.0.join("a"), b"1").unwrap();
        assert_eq!(changed(&tree.0, (0, 0), &told).lines.len(), 1);
        assert_eq!(changed(&tree.0, (0, 0), &told).lines.len(), 0);
    }

    #[test]
    fn the_number_of_files_is_bounded() {
        let tree = Tree::new("many");
        (0..FILES_MAX + 1).for_each(|n| fs::write(tree.0.join(n.to_string()), b"").unwrap());
        let found = changed(&tree.0, (0, 0), &Told::default());
        assert!(found.incomplete && found.lines.len() == FILES_MAX);
    }

    #[test]
    fn a_directory_that_is_not_there_has_no_files() {
        assert!(changed(Path::new("/nothing/there"), (0, 0), &Told::default()).lines.is_empty());
    }
}
