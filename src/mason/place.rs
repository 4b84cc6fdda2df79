//! Paths within the disk, and what is there.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, chown, lchown};
use std::path::{Path, PathBuf};

use super::Refusal;

/// Directories that are below each other at most.
const MAX_DEPTH: usize = 512;

/// Octets that a name has at most (NAME_MAX), and a path, without the 0 at its end (PATH_MAX).
const MAX_NAME: usize = 255;
const MAX_PATH: usize = 4095;

/// A path that the kernel takes.
pub(super) fn bounded(path: PathBuf) -> Result<PathBuf, Refusal> {
    let octets = path.as_os_str().len();
    if octets > MAX_PATH {
        return Err(Refusal::new("BAD_ARCHIVE", format!("a path has {octets} octets, the limit is {MAX_PATH}")));
    }
    Ok(path)
}

/// A path that does not leave the root: relative, and without `..`. With `absolute` one that begins with `/`, too.
pub(super) fn within(path: &[u8], absolute: bool) -> Result<PathBuf, Refusal> {
    let shown = || String::from_utf8_lossy(path).into_owned();
    if path.starts_with(b"/") && !absolute {
        return Err(Refusal::new("BAD_ARCHIVE", format!("path {:?} is absolute", shown())));
    }
    let mut clean = PathBuf::from("/");
    let mut depth = 0;
    for part in path.split(|&octet| octet == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err(Refusal::new("BAD_ARCHIVE", format!("path {:?} leaves the root", shown()))),
            part if part.len() > MAX_NAME => {
                let message = format!("a name has {} octets, the limit is {MAX_NAME}", part.len());
                return Err(Refusal::new("BAD_ARCHIVE", message));
            }
            part => {
                clean.push(std::ffi::OsStr::from_bytes(part));
                depth += 1;
            }
        }
    }
    if depth > MAX_DEPTH {
        let message = format!("a path has {depth} directories, the limit is {MAX_DEPTH}");
        return Err(Refusal::new("BAD_ARCHIVE", message));
    }
    bounded(clean)
}

/// Makes a directory, and those above it, that are not there. What is made has this owner.
pub(super) fn directories(path: &Path, owner: Option<(u32, u32)>) -> Result<(), Refusal> {
    let failed = |e: &io::Error| Refusal::io(path.display(), e);
    let missing: Vec<&Path> = path.ancestors().take_while(|above| !above.is_dir()).collect();
    for above in missing.into_iter().rev() {
        match fs::DirBuilder::new().mode(0o755).create(above) {
            Ok(()) => {
                if let Some((uid, gid)) = owner {
                    chown(above, Some(uid), Some(gid)).map_err(|e| failed(&e))?;
                }
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && above.is_dir() => {}
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                let message = format!("{} is no directory, and something is to be in it", above.display());
                return Err(Refusal::new("BAD_ARCHIVE", message));
            }
            Err(e) => return Err(failed(&e)),
        }
    }
    Ok(())
}

/// Takes away whatever is there, a tree also.
pub(super) fn clear(path: &Path) -> io::Result<()> {
    let gone = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    match gone {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Sets an owner without following a link.
pub(super) fn own(path: &Path, (uid, gid): (u32, u32)) -> io::Result<()> {
    lchown(path, Some(uid), Some(gid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_leave_the_root_are_refused_and_named() {
        for (path, clean) in [("a/b", "/a/b"), ("./a//b/.", "/a/b"), (".", "/"), ("a/", "/a")] {
            assert_eq!(within(path.as_bytes(), false).unwrap(), Path::new(clean));
        }
        for path in ["..", "a/../../b", "../a", "a/.."] {
            let refusal = within(path.as_bytes(), true).unwrap_err();
            assert_eq!(refusal.message, format!("path {path:?} leaves the root"));
        }
        assert_eq!(within(b"/etc/passwd", false).unwrap_err().message, "path \"/etc/passwd\" is absolute");
        assert_eq!(within(b"/etc", true).unwrap(), Path::new("/etc"));
        assert!(within("a/".repeat(600).as_bytes(), false).unwrap_err().message.contains("600"));
        assert!(within("n".repeat(255).as_bytes(), false).is_ok());
        let error = within("n".repeat(256).as_bytes(), false).unwrap_err().message;
        assert_eq!(error, "a name has 256 octets, the limit is 255");
        let long = vec!["n".repeat(255); 16].join("/");
        let error = within(long.as_bytes(), false).unwrap_err().message;
        assert_eq!(error, "a path has 4096 octets, the limit is 4095");
        assert!(within(&long.as_bytes()[1..], false).is_ok());
    }
}
