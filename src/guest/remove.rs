//! `file.remove`: also of trees that are deeper than paths, descriptors or a stack could follow.
//!
//! Directories deeper than `DEPTH_MAX` are first moved up into the root of the tree that is removed, and
//! emptied from there: so neither the number of open descriptors nor the stack depends on the tree.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::{self, ReadDir};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::files::failed;
use crate::wire::{Error, Fields};

const DEPTH_MAX: usize = 32;

/// Removes a file, a link, an empty directory, or, when `recursive`, a directory with all that is in it.
/// May block for long.
pub(super) fn remove(path: &Path, recursive: bool) -> Result<Fields, Error> {
    let remove = || -> io::Result<()> {
        let meta = fs::symlink_metadata(path)?;
        if !meta.is_dir() {
            return fs::remove_file(path);
        }
        if recursive {
            empty(path)?;
        }
        fs::remove_dir(path)
    };
    remove().map_err(|e| failed("remove", path, &e))?;
    Ok(Fields::new())
}

const DIRECTORY: OFlag =
    OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC).union(OFlag::O_NONBLOCK);

/// A directory on the way down.
struct Level {
    directory: OwnedFd,
    entries: ReadDir,
    name: OsString,
}

impl Level {
    fn new(directory: OwnedFd, name: OsString) -> io::Result<Self> {
        // By its descriptor, so that nobody can put a link to elsewhere in its place.
        let entries = fs::read_dir(format!("/proc/self/fd/{}", directory.as_raw_fd()))?;
        Ok(Self { directory, entries, name })
    }
}

/// Removes all that is in a directory. Goes on after an error and gives the first one.
fn empty(path: &Path) -> io::Result<()> {
    let root = open(path, DIRECTORY, Mode::empty())?;
    let mut first_error = None;
    // Names in the root of directories that were moved up there.
    let mut moved: VecDeque<OsString> = VecDeque::new();
    let mut moves = 0u64;
    empty_below(&root, Level::new(root.try_clone()?, OsString::new())?, &mut moved, &mut moves, &mut first_error);
    while let Some(name) = moved.pop_front() {
        match openat(&root, name.as_os_str(), DIRECTORY, Mode::empty()) {
            Ok(directory) => match Level::new(directory, name.clone()) {
                Ok(level) => {
                    empty_below(&root, level, &mut moved, &mut moves, &mut first_error);
                    note(&mut first_error, unlinkat(&root, name.as_os_str(), UnlinkatFlags::RemoveDir));
                }
                Err(e) => first_error = first_error.or(e.raw_os_error().map(Errno::from_raw)),
            },
            Err(errno) => note(&mut first_error, Err(errno)),
        }
    }
    first_error.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno as i32)))
}

/// What another process removed meanwhile is as good as removed here.
fn note(first_error: &mut Option<Errno>, result: nix::Result<()>) {
    if let Err(errno) = result
        && errno != Errno::ENOENT
    {
        first_error.get_or_insert(errno);
    }
}

fn empty_below(
    root: &OwnedFd,
    top: Level,
    moved: &mut VecDeque<OsString>,
    moves: &mut u64,
    first_error: &mut Option<Errno>,
) {
    let mut way = vec![top];
    while let Some(level) = way.last_mut() {
        let Some(entry) = level.entries.next() else {
            let done = way.pop();
            if let (Some(done), Some(parent)) = (done, way.last()) {
                note(first_error, unlinkat(&parent.directory, done.name.as_os_str(), UnlinkatFlags::RemoveDir));
            }
            continue;
        };
        let entry = match entry {
            Ok(entry) => entry,
            Err(e) => {
                *first_error = first_error.or(e.raw_os_error().map(Errno::from_raw));
                way.pop();
                continue;
            }
        };
        let name = entry.file_name();
        match unlinkat(&level.directory, name.as_os_str(), UnlinkatFlags::NoRemoveDir) {
            Err(Errno::EISDIR) => {}
            other => {
                note(first_error, other);
                continue;
            }
        }
        if way.len() > DEPTH_MAX {
            note(first_error, move_up(root, way.last().map(|level| &level.directory), &name, moved, moves));
            continue;
        }
        let Some(level) = way.last() else { return };
        match openat(&level.directory, name.as_os_str(), DIRECTORY, Mode::empty()) {
            Ok(directory) => match Level::new(directory, name) {
                Ok(level) => way.push(level),
                Err(e) => *first_error = first_error.or(e.raw_os_error().map(Errno::from_raw)),
            },
            Err(errno) => note(first_error, Err(errno)),
        }
    }
}

fn move_up(
    root: &OwnedFd,
    directory: Option<&OwnedFd>,
    name: &OsStr,
    moved: &mut VecDeque<OsString>,
    moves: &mut u64,
) -> nix::Result<()> {
    let Some(directory) = directory else { return Ok(()) };
    loop {
        *moves += 1;
        let target = OsString::from(format!(".burrow-{}-{moves}.gone", std::process::id()));
        // A name that is taken is not replaced.
        if nix::sys::stat::fstatat(root, target.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW).is_ok() {
            continue;
        }
        renameat(directory, name, root, target.as_os_str())?;
        moved.push_back(target);
        return Ok(());
    }
}
