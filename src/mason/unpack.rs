//! From an archive to files: as container images' layers are applied (image-spec, layer.md), one over the other.

use std::collections::{BTreeMap, HashSet};
use std::ffi::CString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::stat::Mode;

use super::{Refusal, place};
use crate::archive::{Entry, Kind};

/// Entries of one archive at most.
const MAX_ENTRIES: u64 = 500_000;
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
    /// What directories' times are to be, once nothing changes in them any more.
    times: BTreeMap<PathBuf, i64>,
    devices: u64,
}

impl Unpacker {
    pub fn new(placement: Option<Placement>, whiteouts: bool) -> Self {
        Self { placement, whiteouts, entries: 0, made: HashSet::new(), times: BTreeMap::new(), devices: 0 }
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
            Some(placement) => placement.of(&path),
            None => path,
        };
        if let Some(above) = path.parent() {
            let owner = self.placement.as_ref().map(|placement| placement.owner);
            place::directories(above, owner)?;
        }
        if self.whiteouts {
            self.made.extend(path.ancestors().map(hash));
        }
        let done = match entry.kind {
            // A node of a device is of no use in a sandbox, whose /dev is its kernel's.
            Kind::Character | Kind::Block => {
                self.devices += 1;
                return Ok(());
            }
            Kind::HardLink => {
                let target = place::within(&entry.link, false)?;
                place::clear(&path).and_then(|()| fs::hard_link(target, &path))
            }
            _ => self.make(entry, &path, content),
        };
        done.map_err(|e| Refusal::io(path.display(), &e))
    }

    fn make(&mut self, entry: &Entry, path: &Path, content: &mut impl Read) -> io::Result<()> {
        let owner = self.placement.as_ref().map_or((entry.uid, entry.gid), |placement| placement.owner);
        if entry.kind == Kind::Directory {
            if fs::symlink_metadata(path).is_ok_and(|meta| !meta.is_dir()) {
                fs::remove_file(path)?;
            }
            match fs::create_dir(path) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
                _ => {}
            }
            self.times.insert(path.to_path_buf(), entry.mtime);
        } else {
            place::clear(path)?;
        }
        match entry.kind {
            Kind::SymbolicLink => {
                symlink(std::ffi::OsStr::from_bytes(&entry.link), path)?;
                place::own(path, owner)?;
            }
            Kind::Pipe => nix::unistd::mkfifo(path, Mode::from_bits_truncate(0o600))?,
            Kind::File => {
                let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
                io::copy(content, &mut file)?;
                place::own(path, owner)?;
                file.set_permissions(Permissions::from_mode(entry.mode))?;
                // Of ours no one else has them open, so their times stay.
                self.attributes(entry, path)?;
                return file.set_modified(time(entry.mtime));
            }
            _ => {}
        }
        if entry.kind != Kind::SymbolicLink {
            place::own(path, owner)?;
            fs::set_permissions(path, Permissions::from_mode(entry.mode))?;
        }
        self.attributes(entry, path)
    }

    fn attributes(&self, entry: &Entry, path: &Path) -> io::Result<()> {
        for (name, value) in &entry.attributes {
            let (Ok(place), Ok(name)) = (CString::new(path.as_os_str().as_bytes()), CString::new(name.as_slice()))
            else {
                continue;
            };
            // SAFETY: both strings end with NUL, and the value is as long as is said.
            let set = unsafe { libc::lsetxattr(place.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
            let error = io::Error::last_os_error();
            // Labels of a security module that this kernel lacks mean nothing here.
            if set < 0 && error.raw_os_error() != Some(libc::EOPNOTSUPP) {
                return Err(error);
            }
        }
        Ok(())
    }

    fn white_out(&mut self, path: &Path, name: &[u8]) -> io::Result<()> {
        let above = path.parent().unwrap_or(path);
        if name == OPAQUE {
            let children = match fs::read_dir(above) {
                Ok(children) => children,
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(e) => return Err(e),
            };
            for child in children {
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
            if let Ok(directory) = File::open(path) {
                let _ = directory.set_modified(time(*mtime));
            }
        }
        if self.devices > 0 {
            println!("{} device nodes were left out", self.devices);
        }
        Ok(())
    }
}

fn hash(path: impl AsRef<Path>) -> u64 {
    let mut hasher = DefaultHasher::new();
    path.as_ref().hash(&mut hasher);
    hasher.finish()
}

fn time(mtime: i64) -> SystemTime {
    let since = Duration::from_secs(mtime.unsigned_abs());
    let time = if mtime >= 0 { UNIX_EPOCH.checked_add(since) } else { UNIX_EPOCH.checked_sub(since) };
    time.unwrap_or(UNIX_EPOCH)
}
