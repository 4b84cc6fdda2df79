//! The file verbs: streams of any size in bounded memory. All of this runs on threads (`tasks`): it may block for as
//! long as a file system likes.
//!
//! They act as root, and what they create belongs to the sandbox's user. Paths are the sandbox's and
//! hostile: what is opened may be a FIFO or a device, so nothing is opened blocking and only regular files are
//! read and written.

use std::ffi::OsStr;
use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, fchown};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::statfs::{PROC_SUPER_MAGIC, fstatfs};

use super::tasks::{Desk, Order};
use crate::wire::{Code, Error, FRAME, Fields, Message};

/// Credit for content is given back in portions of this many octets.
const CREDIT_PORTION: u64 = 64 * 1024;
/// Content is read in pieces of this many octets.
const CHUNK: usize = if FRAME < 64 * 1024 { FRAME } else { 64 * 1024 };
/// Bits of a mode that can be asked for.
pub(super) const MODE_MAX: u32 = 0o7777;

/// Who owns what is created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Owner {
    pub uid: u32,
    pub gid: u32,
}

/// A failed file operation as an error of the protocol.
pub(super) fn failed(what: &str, path: &Path, error: &io::Error) -> Error {
    let errno = Errno::from_raw(error.raw_os_error().unwrap_or(match error.kind() {
        ErrorKind::InvalidInput => libc::EINVAL,
        _ => libc::EIO,
    }));
    let code = if errno == Errno::ENOENT { Code::NotFound } else { Code::FileFailed };
    Error::new(code, format!("cannot {what} {}: {}", path.display(), errno.desc())).with("errno", format!("{errno:?}"))
}

fn errno(errno: Errno) -> io::Error {
    io::Error::from_raw_os_error(errno as i32)
}

/// A path argument; a relative one is relative to `cwd`.
pub(super) fn resolve(cwd: &Path, path: &[u8]) -> Result<PathBuf, Error> {
    if path.is_empty() || path.contains(&0) {
        return Err(Error::new(Code::BadArgument, "a path is neither empty nor has it a NUL").with("argument", "path"));
    }
    Ok(cwd.join(OsStr::from_bytes(path)))
}

fn kind(meta: &Metadata) -> &'static str {
    let kind = meta.file_type();
    if kind.is_file() {
        "file"
    } else if kind.is_dir() {
        "dir"
    } else if kind.is_symlink() {
        "link"
    } else {
        "other"
    }
}

fn describe(name: &[u8], path: &Path, meta: &Metadata) -> Fields {
    let mtime_ms = i128::from(meta.mtime()) * 1000 + i128::from(meta.mtime_nsec() / 1_000_000);
    let fields = Fields::new()
        .with_bytes("name", name)
        .with("kind", kind(meta))
        .with("size", meta.len())
        .with("mode", format!("{:04o}", meta.mode() & MODE_MAX))
        .with("uid", meta.uid())
        .with("gid", meta.gid())
        .with("mtime_ms", mtime_ms);
    match fs::read_link(path) {
        Ok(target) if meta.is_symlink() => fields.with_bytes("target", target.as_os_str().as_bytes()),
        _ => fields,
    }
}

/// `file.stat`; a symbolic link is described itself.
pub(super) fn stat(path: &Path) -> Result<Fields, Error> {
    let meta = fs::symlink_metadata(path).map_err(|e| failed("stat", path, &e))?;
    Ok(describe(path.file_name().unwrap_or(OsStr::new("/")).as_bytes(), path, &meta))
}

/// `file.mkdir`
pub(super) fn make_directory(path: &Path, mode: u32, owner: Owner, parents: bool) -> Result<Fields, Error> {
    let make = |path: &Path, mode: u32| -> io::Result<()> {
        fs::DirBuilder::new().mode(mode & 0o777).create(path)?;
        fs::set_permissions(path, Permissions::from_mode(mode))?;
        own(path, owner)
    };
    if parents {
        let missing: Vec<&Path> = path.ancestors().skip(1).take_while(|path| !path.is_dir()).collect();
        for path in missing.into_iter().rev().filter(|path| !path.as_os_str().is_empty()) {
            make(path, 0o755).map_err(|e| failed("make directory", path, &e))?;
        }
    }
    match make(path, mode) {
        Err(e) if parents && e.kind() == ErrorKind::AlreadyExists && path.is_dir() => Ok(Fields::new()),
        Err(e) => Err(failed("make directory", path, &e)),
        Ok(()) => Ok(Fields::new()),
    }
}

/// Only root can give files away; elsewhere than in a sandbox the agent may be someone else.
fn own(path: &Path, owner: Owner) -> io::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    chown(path, Some(owner.uid), Some(owner.gid))
}

/// `file.move`: within one file system, and atomic there.
pub(super) fn relocate(from: &Path, to: &Path) -> Result<Fields, Error> {
    fs::rename(from, to).map_err(|e| failed("move", from, &e))?;
    Ok(Fields::new())
}

/// `file.link`: a symbolic link, in the place of a file or link that is there.
pub(super) fn link(path: &Path, target: &OsStr, owner: Owner) -> Result<Fields, Error> {
    let cannot = |e: io::Error| failed("make link", path, &e);
    // Under a name of its own first, so that the old one goes when the new one is there.
    let mut name = path.file_name().ok_or_else(|| cannot(ErrorKind::InvalidInput.into()))?.to_os_string();
    name.push(format!(".link-{}", std::process::id()));
    let temporary = path.with_file_name(name);
    let _ = fs::remove_file(&temporary);
    std::os::unix::fs::symlink(target, &temporary).map_err(cannot)?;
    let own = || match nix::unistd::geteuid().is_root() {
        true => std::os::unix::fs::lchown(&temporary, Some(owner.uid), Some(owner.gid)),
        false => Ok(()),
    };
    let done = own().and_then(|()| fs::rename(&temporary, path)).map_err(cannot);
    if done.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    done.map(|()| Fields::new())
}

/// `file.read`: sends `length` octets from `offset` on, or what there is of them.
pub(super) fn read(desk: &Desk, path: &Path, offset: u64, length: u64) -> Result<Fields, Error> {
    let cannot = |e: io::Error| failed("read", path, &e);
    let (mut file, there) = open_regular(path, offset).map_err(cannot)?;
    let mut chunk = vec![0; CHUNK];
    let (mut left, mut allowed, mut sent) = (length.min(there), 0u64, 0u64);
    while left > 0 {
        if allowed == 0 {
            match desk.order() {
                Some(Order::More(octets)) => allowed += octets,
                Some(_) => {}
                None => return Err(cancelled()),
            }
            continue;
        }
        let room = usize::try_from(left.min(allowed)).unwrap_or(usize::MAX).min(CHUNK);
        let read = match file.read(&mut chunk[..room]) {
            Ok(0) => break,
            Ok(read) => read,
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Err(e) => return Err(cannot(e)),
        };
        desk.say(Message::data(&desk.tag, "content", &chunk[..read]));
        sent += read as u64;
        left -= read as u64;
        allowed -= read as u64;
    }
    desk.say(Message::end(&desk.tag, "content"));
    Ok(Fields::new().with("size", sent))
}

/// A file to be read from `offset` on, and how much of it there is: one that grows meanwhile would have no end. Files of the
/// kernel's have no length, and are read to their end; the one of /proc that has one is all of memory.
fn open_regular(path: &Path, offset: u64) -> io::Result<(File, u64)> {
    let mut file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    let meta = file.metadata()?;
    if meta.is_dir() {
        return Err(errno(Errno::EISDIR));
    }
    if !meta.is_file() {
        return Err(errno(Errno::EINVAL));
    }
    if offset > 0 {
        file.seek(SeekFrom::Start(offset))?;
    }
    match meta.len() {
        0 => Ok((file, u64::MAX)),
        _ if fstatfs(&file)?.filesystem_type() == PROC_SUPER_MAGIC => Err(errno(Errno::EFBIG)),
        length => Ok((file, length.saturating_sub(offset))),
    }
}

/// What a thread says whose request has ended: nobody hears it.
fn cancelled() -> Error {
    Error::new(Code::Cancelled, "cancelled by its client")
}

/// A file that is being written.
#[derive(Debug)]
pub(super) struct Writing {
    file: File,
    path: PathBuf,
    /// The file beside the target that will replace it; `None` when appending.
    temporary: Option<PathBuf>,
    received: u64,
}

impl Writing {
    /// Begins to replace a file. One that exists keeps mode and owner unless others are given.
    pub(super) fn replace(path: PathBuf, mode: Option<u32>, owner: Option<Owner>, user: Owner) -> Result<Self, Error> {
        let begin = |path: &mut PathBuf| {
            if path.is_symlink() {
                // The content goes where the link points, as with any program that writes a file.
                match fs::canonicalize(&path) {
                    Ok(target) => *path = target,
                    Err(e) if e.kind() == ErrorKind::NotFound => {}
                    Err(e) => return Err(e),
                }
            }
            let old = match fs::symlink_metadata(&path) {
                Ok(meta) if meta.is_dir() => return Err(errno(Errno::EISDIR)),
                Ok(meta) if is_special(&meta) => return Err(errno(Errno::EINVAL)),
                Ok(meta) if meta.is_file() => Some(meta),
                Ok(_) => None,
                Err(e) if e.kind() == ErrorKind::NotFound => None,
                Err(e) => return Err(e),
            };
            let kept = old.as_ref().map(|old| Owner { uid: old.uid(), gid: old.gid() });
            let owner = owner.or(kept).unwrap_or(user);
            let mode = mode.or(old.as_ref().map(|old| old.mode() & MODE_MAX)).unwrap_or(0o644);
            let (temporary, file) = create_beside(path)?;
            if let Err(e) = give(&file, owner).and_then(|()| file.set_permissions(Permissions::from_mode(mode))) {
                let _ = fs::remove_file(&temporary);
                return Err(e);
            }
            Ok((file, Some(temporary)))
        };
        Self::begin(path, begin)
    }

    /// Begins to append to a file, which is made when there is none.
    pub(super) fn append(path: PathBuf, mode: Option<u32>, owner: Option<Owner>, user: Owner) -> Result<Self, Error> {
        let begin = |path: &mut PathBuf| {
            let mut options = OpenOptions::new();
            options.append(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
            let (file, new) = match options.open(&path) {
                Err(e) if e.kind() == ErrorKind::NotFound => (options.create_new(true).mode(0o600).open(&path)?, true),
                other => (other?, false),
            };
            if !file.metadata()?.is_file() {
                return Err(errno(Errno::EINVAL));
            }
            if let Some(owner) = owner.or(new.then_some(user)) {
                give(&file, owner)?;
            }
            if let Some(mode) = mode.or(new.then_some(0o644)) {
                file.set_permissions(Permissions::from_mode(mode))?;
            }
            Ok((file, None))
        };
        Self::begin(path, begin)
    }

    fn begin(
        mut path: PathBuf,
        begin: impl FnOnce(&mut PathBuf) -> io::Result<(File, Option<PathBuf>)>,
    ) -> Result<Self, Error> {
        match begin(&mut path) {
            Ok((file, temporary)) => Ok(Self { file, path, temporary, received: 0 }),
            Err(e) => Err(failed("write", &path, &e)),
        }
    }

    /// Takes the client's content until its end, and gives credit for more.
    pub(super) fn take(mut self, desk: &Desk) -> Result<Fields, Error> {
        let mut owed = 0;
        loop {
            match desk.order() {
                Some(Order::Content(chunk)) => {
                    self.file.write_all(&chunk).map_err(|e| failed("write", &self.path, &e))?;
                    self.received += chunk.len() as u64;
                    owed += chunk.len() as u64;
                }
                Some(Order::End) => return self.finish(),
                Some(Order::More(_)) => {}
                None => return Err(cancelled()),
            }
            if owed >= CREDIT_PORTION {
                desk.say(Message::credit(&desk.tag, "content", owed));
                owed = 0;
            }
        }
    }

    /// Puts the whole content into place, to last.
    fn finish(mut self) -> Result<Fields, Error> {
        let finish = |writing: &mut Self| {
            writing.file.sync_all()?;
            if let Some(temporary) = &writing.temporary {
                fs::rename(temporary, &writing.path)?;
                writing.temporary = None;
                if let Some(directory) = writing.path.parent() {
                    File::open(directory)?.sync_all()?;
                }
            }
            Ok(())
        };
        match finish(&mut self) {
            Ok(()) => Ok(Fields::new().with("size", self.received)),
            Err(e) => Err(failed("write", &self.path, &e)),
        }
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            let _ = fs::remove_file(temporary);
        }
    }
}

fn is_special(meta: &Metadata) -> bool {
    let kind = meta.file_type();
    kind.is_fifo() || kind.is_socket() || kind.is_char_device() || kind.is_block_device()
}

fn give(file: &File, owner: Owner) -> io::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    fchown(file, Some(owner.uid), Some(owner.gid))
}

/// A new file in the target's directory, so that it can be renamed over the target.
fn create_beside(path: &Path) -> io::Result<(PathBuf, File)> {
    let directory = path.parent().ok_or_else(|| errno(Errno::EISDIR))?;
    if path.file_name().is_none() {
        return Err(errno(Errno::EISDIR));
    }
    for number in 0..10_000 {
        let temporary = directory.join(format!(".burrow-{}-{number}.part", std::process::id()));
        match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary) {
            Ok(file) => return Ok((temporary, file)),
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
    }
    Err(errno(Errno::EEXIST))
}

/// `file.list`: the rows in the directory's own order.
pub(super) fn list(desk: &Desk, path: &Path) -> Result<Fields, Error> {
    let cannot = |e: io::Error| failed("list", path, &e);
    let (mut allowed, mut count) = (0u64, 0u64);
    for entry in fs::read_dir(path).map_err(cannot)? {
        let entry = entry.map_err(cannot)?;
        // One that has gone meanwhile is left out.
        let Ok(meta) = entry.metadata() else { continue };
        while allowed == 0 {
            match desk.order() {
                Some(Order::More(rows)) => allowed += rows,
                Some(_) => {}
                None => return Err(cancelled()),
            }
        }
        desk.say(Message::item(&desk.tag, describe(entry.file_name().as_bytes(), &entry.path(), &meta)));
        allowed -= 1;
        count += 1;
    }
    Ok(Fields::new().with("count", count))
}
