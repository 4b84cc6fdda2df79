//! Waits for a notice as docs/snapshots.md says.

use std::ffi::CStr;
use std::fs::File;
use std::io::Read;
use std::os::fd::FromRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use crate::{Keys, Outcome, during};

/// Octets of `struct inotify_event` without the name.
const EVENT: usize = 16;

pub fn run(keys: &Keys) -> Outcome {
    let directory: PathBuf = keys.get("directory", None)?;
    let path = std::ffi::CString::new(directory.as_os_str().as_bytes()).map_err(during("the directory"))?;
    // SAFETY: inotify_init1 takes a number and gives a new descriptor or -1.
    let inotify = unsafe { libc::inotify_init1(libc::IN_CLOEXEC) };
    // SAFETY: the path is a C string, which the call only reads.
    if inotify < 0 || unsafe { libc::inotify_add_watch(inotify, path.as_ptr(), libc::IN_MOVED_TO) } < 0 {
        return Err(format!("watching {}: {}", directory.display(), std::io::Error::last_os_error()));
    }
    // SAFETY: the kernel just made it, and nobody else has it.
    let mut inotify = unsafe { File::from_raw_fd(inotify) };
    println!("watching");
    let mut event = [0; EVENT + 256];
    let len = inotify.read(&mut event).map_err(during("waiting"))?;
    let name = event.get(EVENT..len).and_then(|name| CStr::from_bytes_until_nul(name).ok());
    println!("name={}", name.map(CStr::to_string_lossy).unwrap_or_default());
    Ok(())
}
