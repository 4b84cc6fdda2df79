//! From an archive to files: as container images' layers are applied (image-spec, layer.md), one over the other.

use std::collections::{BTreeMap, HashSet};
use std::ffi::CString;
use std::fs::{self, OpenOptions, Permissions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{Mode, UtimensatFlags, utimensat};
use nix::sys::statvfs::statvfs;
use nix::sys::time::TimeSpec;

use super::{Refusal, place};
use crate::archive::{Entry, Kind};

/// Entries of one archive at most.
const MAX_ENTRIES: u64 = 500_000;
/// Octets that paths of directories may take while their times wait to be set.
const MAX_WAITING: usize = 32 << 20;
/// Octets that ext4 has for attributes of a file, beside what stands in its inode: a block.
const MAX_ATTRIBUTES: u64 = 4096;
/// A file of this name takes away what lies below, in layers before.
const WHITEOUT: &[u8] = b".wh.";
/// All that a directory has of layers before goes.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Where COPY puts things.
#[derive(Debug)]
pub(super) struct Placement {
    target: PathBuf,
    /// Of everything.
    owner: (u32, u32),
    /// What comes goes into the target, and is not the target.
    into: bool,
}

impl Placement {
    /// `target` is absolute. `directory`: more than one thing comes, or what is in a directory.
    pub fn new(target: &[u8], directory: bool, owner: (u32, u32)) -> Result<Self, Refusal> {
        let path = place::within(target, true)?;
        let into = directory || target.ends_with(b"/") || path.is_dir();
        if into {
            place::directories(&path, Some(owner))?;
        } else if let Some(above) = path.parent() {
            place::directories(above, Some(owner))?;
        }
        Ok(Self { target: path, owner, into })
    }

    fn of(&self, path: &Path) -> PathBuf {
        let relative = path.strip_prefix("/").unwrap_or(path);
        match self.into {
            true => self.target.join(relative),
            // One file: whatever it was called.
            false => self.target.clone(),
        }
    }
}

/// Applies one archive.
#[derive(Debug)]
pub(super) struct Unpacker {
    placement: Option<Placement>,
    whiteouts: bool,
    entries: u64,
    /// Paths of this archive: whiteouts are for what lies below. By their hashes, to be small.
    made: HashSet<u64>,
    /// Those that are no directories.
    leaves: HashSet<u64>,
    /// What directories' times are to be, once nothing changes in them any more.
    times: BTreeMap<PathBuf, i64>,
    /// Octets in the paths of these.
    waiting: usize,
    /// Devices, which are left out, by their paths' hashes.
    devices: HashSet<u64>,
}

impl Unpacker {
    pub fn new(placement: Option<Placement>, whiteouts: bool) -> Self {
        Self {
            placement,
            whiteouts,
            entries: 0,
            made: HashSet::new(),
            leaves: HashSet::new(),
            times: BTreeMap::new(),
            waiting: 0,
            devices: HashSet::new(),
        }
    }

    /// Makes one entry, with its content.
    pub fn place(&mut self, entry: &Entry, content: &mut impl Read) -> Result<(), Refusal> {
        self.entries += 1;
        if self.entries > MAX_ENTRIES {
            return Err(Refusal::new("OUT_OF_RANGE", format!("the archive has more than {MAX_ENTRIES} entries")));
        }
        let path = place::within(&entry.path, false)?;
        let name = path.file_name().map(OsStrExt::as_bytes).unwrap_or_default();
        if self.whiteouts && name.starts_with(WHITEOUT) {
            return self.white_out(&path, name).map_err(|e| Refusal::io(path.display(), &e));
        }
        let path = match &self.placement {
            Some(placement) => place::bounded(placement.of(&path))?,
            None => path,
        };
        if path.parent().is_none() && entry.kind != Kind::Directory {
            return Err(Refusal::new("BAD_ARCHIVE", "the root is to be something else than a directory"));
        }
        if self.placement.is_some() {
            // A directory that is there stays as it is, and where a link leads to one, that stays too.
            if entry.kind == Kind::Directory && path.is_dir() {
                return Ok(());
            }
            if entry.kind != Kind::Directory && fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_dir()) {
                let message = format!("{} is a directory: no file replaces it", path.display());
                return Err(Refusal::new("BUILD_FAILED", message));
            }
        }
        if let Some(above) = path.parent() {
            let owner = self.placement.as_ref().map(|placement| placement.owner);
            place::directories(above, owner)?;
        }
        if self.whiteouts {
            // What is above one that is in there, is in there.
            path.ancestors().map(hash).find(|above| !self.made.insert(*above));
            match entry.kind {
                Kind::Directory => self.leaves.remove(&hash(&path)),
                _ => self.leaves.insert(hash(&path)),
            };
        }
        match entry.kind {
            // A node of a device is of no use in a sandbox, whose /dev is its kernel's.
            Kind::Character | Kind::Block => {
                self.devices.insert(hash(&path));
                place::clear(&path).map_err(|e| Refusal::io(path.display(), &e))
            }
            Kind::HardLink => self.link(&place::within(&entry.link, false)?, &path),
            _ => self.make(entry, &path, content),
        }
    }

    /// Gives a file that is there another name.
    fn link(&mut self, target: &Path, path: &Path) -> Result<(), Refusal> {
        if self.devices.contains(&hash(target)) {
            self.devices.insert(hash(path));
            return place::clear(path).map_err(|e| Refusal::io(path.display(), &e));
        }
        let failed = |e: &io::Error| {
            let what = format!("{} as a hard link to {}", path.display(), target.display());
            match e.kind() {
                io::ErrorKind::NotFound => Refusal::new("BAD_ARCHIVE", format!("{what}: there is no such file")),
                _ => Refusal::io(what, e),
            }
        };
        let is = fs::symlink_metadata(target).map_err(|e| failed(&e))?;
        if fs::symlink_metadata(path).is_ok_and(|there| (there.dev(), there.ino()) == (is.dev(), is.ino())) {
            return Ok(());
        }
        place::clear(path).and_then(|()| fs::hard_link(target, path)).map_err(|e| failed(&e))
    }

    fn make(&mut self, entry: &Entry, path: &Path, content: &mut impl Read) -> Result<(), Refusal> {
        let failed = |e: io::Error| Refusal::io(path.display(), &e);
        let owner = self.placement.as_ref().map_or((entry.uid, entry.gid), |placement| placement.owner);
        match entry.kind {
            Kind::Directory => {
                if fs::symlink_metadata(path).is_ok_and(|meta| !meta.is_dir()) {
                    fs::remove_file(path).map_err(failed)?;
                }
                match fs::create_dir(path) {
                    Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(failed(e)),
                    _ => {}
                }
                self.keep_time(path, entry.mtime)?;
            }
            Kind::SymbolicLink => {
                let target = std::ffi::OsStr::from_bytes(&entry.link);
                place::clear(path).and_then(|()| symlink(target, path)).map_err(failed)?;
            }
            Kind::Pipe => {
                place::clear(path).map_err(failed)?;
                nix::unistd::mkfifo(path, Mode::from_bits_truncate(0o600)).map_err(|e| failed(e.into()))?;
            }
            _ => {
                place::clear(path).map_err(failed)?;
                let new = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
                new.and_then(|mut file| io::copy(content, &mut file)).map_err(failed)?;
            }
        }
        // In this order: a change of the owner takes setuid bits and capabilities away.
        place::own(path, owner).map_err(failed)?;
        if entry.kind != Kind::SymbolicLink {
            fs::set_permissions(path, Permissions::from_mode(entry.mode)).map_err(failed)?;
        }
        attributes(entry, path)?;
        if entry.kind == Kind::Directory { Ok(()) } else { set_time(path, entry.mtime).map_err(failed) }
    }

    /// A directory's time is set when nothing changes in it any more.
    fn keep_time(&mut self, path: &Path, mtime: i64) -> Result<(), Refusal> {
        if self.times.insert(path.to_path_buf(), mtime).is_none() {
            self.waiting += path.as_os_str().len();
        }
        if self.waiting > MAX_WAITING {
            let message = format!("the paths of the archive's directories have more than {MAX_WAITING} octets");
            return Err(Refusal::new("OUT_OF_RANGE", message));
        }
        Ok(())
    }

    fn white_out(&mut self, path: &Path, name: &[u8]) -> io::Result<()> {
        let above = path.parent().unwrap_or(path);
        // Builders name what was in a directory of a layer before also where it is a file or a link by now: what that leads to
        // is another's.
        if !above.is_dir() || above.ancestors().any(|above| self.leaves.contains(&hash(above))) {
            return Ok(());
        }
        if name == OPAQUE {
            for child in fs::read_dir(above)? {
                self.clear_below(&child?.path())?;
            }
            return Ok(());
        }
        match &name[WHITEOUT.len()..] {
            // Remarks of AUFS, for nobody.
            rest if rest.starts_with(WHITEOUT) => Ok(()),
            b"" | b"." | b".." => Err(io::Error::new(io::ErrorKind::InvalidData, "is a whiteout of no name")),
            rest => {
                let hidden = above.join(std::ffi::OsStr::from_bytes(rest));
                if self.made.contains(&hash(&hidden)) { Ok(()) } else { place::clear(&hidden) }
            }
        }
    }

    /// Takes away what layers before have there, but for what this one has put there.
    fn clear_below(&self, path: &Path) -> io::Result<()> {
        if !self.made.contains(&hash(path)) {
            return place::clear(path);
        }
        if fs::symlink_metadata(path)?.is_dir() {
            for child in fs::read_dir(path)? {
                self.clear_below(&child?.path())?;
            }
        }
        Ok(())
    }

    /// All entries are there.
    pub fn finish(self) -> Result<(), Refusal> {
        for (path, mtime) in &self.times {
            // It may be gone, or be another's by now.
            if fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir()) {
                let _ = set_time(path, *mtime);
            }
        }
        match self.devices.len() {
            0 => {}
            count => println!("{count} device nodes were left out"),
        }
        Ok(())
    }
}

fn attributes(entry: &Entry, path: &Path) -> Result<(), Refusal> {
    for (name, value) in &entry.attributes {
        let (Ok(place), Ok(key)) = (CString::new(path.as_os_str().as_bytes()), CString::new(name.as_slice())) else {
            return Err(Refusal::new("BAD_ARCHIVE", format!("{}: an attribute's name has a 0 in it", path.display())));
        };
        // SAFETY: both strings end with NUL, and the value is as long as is said.
        let set = unsafe { libc::lsetxattr(place.as_ptr(), key.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
        let error = io::Error::last_os_error();
        let what = || format!("{}: attribute {} of {} octets", path.display(), key.to_string_lossy(), value.len());
        match error.raw_os_error() {
            _ if set == 0 => {}
            // Labels of a security module that this kernel lacks mean nothing here.
            Some(libc::EOPNOTSUPP) => {}
            // Attributes have a block of their own, which may be full while the disk is not.
            Some(libc::ENOSPC | libc::E2BIG | libc::ERANGE) if has_room() => {
                let message = format!("{}: a file's attributes have room for {MAX_ATTRIBUTES}", what());
                return Err(Refusal::new("OUT_OF_RANGE", message));
            }
            _ => return Err(Refusal::io(what(), &error)),
        }
    }
    Ok(())
}

/// Whether the disk has more than what its file system keeps for itself.
fn has_room() -> bool {
    statvfs("/").is_ok_and(|room| room.blocks_free() > 64)
}

fn hash(path: impl AsRef<Path>) -> u64 {
    let mut hasher = DefaultHasher::new();
    path.as_ref().hash(&mut hasher);
    hasher.finish()
}

/// Sets the time of change without following a link.
fn set_time(path: &Path, mtime: i64) -> io::Result<()> {
    let time = TimeSpec::new(mtime, 0);
    Ok(utimensat(AT_FDCWD, path, &time, &time, UtimensatFlags::NoFollowSymlink)?)
}
