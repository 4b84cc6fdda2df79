//! The file verbs: streams of any size in bounded memory.
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

use super::connection::QUEUE_HIGH;
use crate::wire::{Code, Error, FRAME, Fields, INITIAL_CREDIT, Link, Message};

/// Credit for content is given back in portions of this many octets.
const CREDIT_PORTION: u64 = 64 * 1024;
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

/// What a visit to a stream found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Visit {
    /// It waits: for credit, for room in the link's queue, or for the client.
    Idle,
    /// There is more to do.
    Progress,
    /// The request has been answered.
    Done,
}

/// `file.read` under way.
#[derive(Debug)]
pub(super) struct Reading {
    file: File,
    path: PathBuf,
    left: u64,
    sent: u64,
    granted: u64,
}

impl Reading {
    /// Opens a regular file to send `length` octets from `offset` on, or what there is of them.
    pub(super) fn open(path: PathBuf, offset: u64, length: u64) -> Result<Self, Error> {
        let open = || {
            let mut file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(&path)?;
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
            Ok(file)
        };
        match open() {
            Ok(file) => Ok(Self { file, path, left: length, sent: 0, granted: INITIAL_CREDIT }),
            Err(e) => Err(failed("read", &path, &e)),
        }
    }

    /// The client has taken that many octets.
    pub(super) fn credit(&mut self, octets: u64) {
        self.granted = self.granted.saturating_add(octets);
    }

    /// Sends what may be sent.
    pub(super) fn pump(&mut self, link: &mut Link<File>, tag: &str, scratch: &mut [u8]) -> Visit {
        let mut visit = Visit::Idle;
        while link.queued() < QUEUE_HIGH && (self.sent < self.granted || self.left == 0) {
            let room = self.left.min(self.granted - self.sent);
            let room = usize::try_from(room).unwrap_or(usize::MAX).min(scratch.len());
            let read = match self.file.read(scratch.get_mut(..room).unwrap_or_default()) {
                Ok(read) => read,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => {
                    link.send(&Message::err(tag, failed("read", &self.path, &e)));
                    return Visit::Done;
                }
            };
            if read == 0 {
                link.send(&Message::end(tag, "content"));
                link.send(&Message::ok(tag, Fields::new().with("size", self.sent)));
                return Visit::Done;
            }
            for frame in scratch.get(..read).unwrap_or_default().chunks(FRAME) {
                link.send_data(tag, "content", frame);
            }
            self.sent += read as u64;
            self.left -= read as u64;
            visit = Visit::Progress;
        }
        visit
    }
}

/// `file.write` under way.
#[derive(Debug)]
pub(super) struct Writing {
    file: File,
    path: PathBuf,
    /// The file beside the target that will replace it; `None` when appending.
    temporary: Option<PathBuf>,
    received: u64,
    granted: u64,
    owed: u64,
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
            Ok((file, temporary)) => Ok(Self { file, path, temporary, received: 0, granted: INITIAL_CREDIT, owed: 0 }),
            Err(e) => Err(failed("write", &path, &e)),
        }
    }

    /// Takes a chunk, and gives credit for more.
    pub(super) fn push(&mut self, chunk: &[u8], link: &mut Link<File>, tag: &str) -> Result<(), Error> {
        self.received += chunk.len() as u64;
        if self.received > self.granted {
            return Err(Error::new(
                Code::CreditExceeded,
                format!("content has {} octets, credit is for {}", self.received, self.granted),
            )
            .with("channel", "content"));
        }
        self.file.write_all(chunk).map_err(|e| failed("write", &self.path, &e))?;
        self.owed += chunk.len() as u64;
        if self.owed >= CREDIT_PORTION {
            link.send(&Message::credit(tag, "content", self.owed));
            self.granted = self.granted.saturating_add(self.owed);
            self.owed = 0;
        }
        Ok(())
    }

    /// Puts the whole content into place, to last. May block for long.
    pub(super) fn finish(mut self) -> Result<Fields, Error> {
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

/// `file.list` under way.
#[derive(Debug)]
pub(super) struct Listing {
    path: PathBuf,
    entries: fs::ReadDir,
    count: u64,
}

impl Listing {
    /// Opens a directory.
    pub(super) fn open(path: PathBuf) -> Result<Self, Error> {
        match fs::read_dir(&path) {
            Ok(entries) => Ok(Self { path, entries, count: 0 }),
            Err(e) => Err(failed("list", &path, &e)),
        }
    }

    /// Sends as many rows as the link's queue takes, in the directory's own order.
    pub(super) fn pump(&mut self, link: &mut Link<File>, tag: &str) -> Visit {
        while link.queued() < QUEUE_HIGH {
            match self.entries.next() {
                None => {
                    link.send(&Message::ok(tag, Fields::new().with("count", self.count)));
                    return Visit::Done;
                }
                Some(Ok(entry)) => {
                    // One that has gone meanwhile is left out.
                    if let Ok(meta) = entry.metadata() {
                        let name = entry.file_name();
                        link.send(&Message::item(tag, describe(name.as_bytes(), &entry.path(), &meta)));
                        self.count += 1;
                    }
                }
                Some(Err(e)) => {
                    link.send(&Message::err(tag, failed("list", &self.path, &e)));
                    return Visit::Done;
                }
            }
        }
        Visit::Idle
    }
}
