//! Disks of a sandbox beside its root disk: how they are written in a request, and what they are on the node.
//!
//! A client names disks, never paths of the node: files lie in the one directory that `[disks]` of the configuration
//! names, block devices are those that it lists, and new disks belong to the sandbox and go with it.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::home::Home;
use super::spec::MAX_DISK_MIB;
use crate::vmm::devices::block::ID_LEN;
use crate::vmm::devices::{MAX_EXTRA_DISKS, ROOT};
use crate::wire::{Args, Code, Error};

/// Longest name of a file, in octets.
const MAX_FILE_NAME: usize = 128;
const MIB: u64 = 1024 * 1024;

/// A disk beside the root disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSpec {
    /// Its serial number in the guest: 1 to 20 of `[a-z0-9_-]`, the first a letter or digit.
    pub name: String,
    /// What it is on the node.
    pub source: DiskSource,
    /// The guest must not change it.
    pub read_only: bool,
}

/// What a disk is on the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskSource {
    /// Empty at first; it goes with the sandbox.
    New {
        /// Size.
        mib: u64,
    },
    /// A file in the node's directory of disks.
    File(String),
    /// A block device that the configuration lists under this name.
    Device(String),
}

impl DiskSpec {
    /// Whether it is something of the node that is there without the sandbox.
    pub fn is_the_nodes(&self) -> bool {
        !matches!(self.source, DiskSource::New { .. })
    }
}

impl fmt::Display for DiskSpec {
    /// As it is written in a request.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            DiskSource::New { mib } => write!(f, "{}:new:{mib}", self.name)?,
            DiskSource::File(file) => write!(f, "{}:file:{file}", self.name)?,
            DiskSource::Device(device) => write!(f, "{}:device:{device}", self.name)?,
        }
        f.write_str(if self.read_only { ":ro" } else { "" })
    }
}

fn bad(message: impl Into<String>) -> Error {
    Error::new(Code::BadArgument, message).with("argument", "disk")
}

impl DiskSpec {
    /// Takes the disks from a request's arguments: at most 8, in the guest's order.
    pub fn take(args: &mut Args) -> Result<Vec<Self>, Error> {
        let mut disks: Vec<Self> = Vec::new();
        for value in args.all("disk") {
            let disk = Self::parse(&String::from_utf8(value).map_err(|_| bad("disk is not UTF-8"))?)?;
            if disks.iter().any(|other| other.name == disk.name) {
                return Err(bad(format!("disk={disk}: the name is given twice")));
            }
            disks.push(disk);
        }
        if disks.len() > MAX_EXTRA_DISKS {
            let message = format!("{} disks are over the limit of {MAX_EXTRA_DISKS}", disks.len());
            return Err(bad(message).with("max", MAX_EXTRA_DISKS));
        }
        Ok(disks)
    }

    /// Reads `NAME:new:MIB`, `NAME:file:FILE[:ro]` or `NAME:device:DEVICE[:ro]`.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let shown: String = text.chars().take(80).collect();
        let mut parts = text.splitn(5, ':');
        let (Some(name), Some(kind), Some(what)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(bad(format!("disk={shown} is neither NAME:new:MIB nor NAME:file|device:WHAT[:ro]")));
        };
        if !is_disk_name(name) || name == ROOT {
            return Err(bad(format!(
                "disk={shown}: a name is 1 to {ID_LEN} of a-z 0-9 _ -, the first a letter or digit, and not {ROOT}"
            )));
        }
        let read_only = match (parts.next(), parts.next()) {
            (None, None) => false,
            (Some("ro"), None) if kind != "new" => true,
            _ => return Err(bad(format!("disk={shown} has something at its end that is not :ro"))),
        };
        let source = match kind {
            "new" if !what.is_empty() && what.bytes().all(|b| b.is_ascii_digit()) => match what.parse() {
                Ok(mib) if (1..=MAX_DISK_MIB).contains(&mib) => DiskSource::New { mib },
                _ => {
                    let message = format!("disk={shown} is out of range: 1 to {MAX_DISK_MIB} MiB");
                    let error = Error::new(Code::OutOfRange, message).with("argument", "disk");
                    return Err(error.with("min", 1).with("max", MAX_DISK_MIB));
                }
            },
            "file" if is_file_name(what) => DiskSource::File(what.to_string()),
            "device" if is_file_name(what) => DiskSource::Device(what.to_string()),
            _ => return Err(bad(format!("disk={shown} is neither NAME:new:MIB nor NAME:file|device:WHAT[:ro]"))),
        };
        Ok(Self { name: name.to_string(), source, read_only })
    }
}

fn is_disk_name(name: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'_' | b'-');
    name.len() <= ID_LEN
        && name.bytes().all(inner)
        && name.bytes().next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
}

/// One component of a path, and neither hidden nor the directory itself or its parent.
pub fn is_file_name(name: &str) -> bool {
    (1..=MAX_FILE_NAME).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
        && !name.starts_with(['.', '-'])
}

/// Where the node keeps the disks that sandboxes may be given.
#[derive(Debug, Clone, Copy)]
pub struct Shelf<'a> {
    /// The directory of files.
    pub directory: &'a Path,
    /// Block devices by name.
    pub devices: &'a BTreeMap<String, PathBuf>,
}

impl Shelf<'_> {
    /// Opens a disk for a sandbox's worker, making a new one. What is writable has one user, and what is read-only
    /// only others that read: a lock that lasts as long as any copy of the descriptor says so, whoever holds it.
    pub fn open(&self, disk: &DiskSpec, home: &Home) -> Result<File, Error> {
        let failed = |e: io::Error| {
            let code = if e.kind() == io::ErrorKind::NotFound { Code::NotFound } else { Code::VmFailed };
            Error::new(code, format!("disk {}: {e}", disk.name)).with("disk", &disk.name)
        };
        let in_use =
            || Error::new(Code::InUse, format!("disk {} is in use: {disk}", disk.name)).with("disk", &disk.name);
        let mut options = OpenOptions::new();
        options.read(true).write(!disk.read_only);
        let file = match &disk.source {
            DiskSource::New { mib } => {
                let no_room = |e| Error::of_io(Code::NoCapacity, format!("disk {}: {e}", disk.name), &e);
                return home.make_disk(&disk.name, mib * MIB).map_err(no_room);
            }
            DiskSource::File(name) => {
                // Whatever lies there is opened without waiting and without leaving the directory.
                options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
                let file = options.open(self.directory.join(name)).map_err(failed)?;
                if !file.metadata().map_err(failed)?.is_file() {
                    return Err(bad(format!("disk={disk} is no regular file")));
                }
                file
            }
            DiskSource::Device(name) => {
                let path = self.devices.get(name).ok_or_else(|| {
                    Error::new(Code::NotFound, format!("disk={disk}: the configuration lists no such device"))
                        .with("disk", &disk.name)
                })?;
                // Exclusively (open(2)): not while the node has it mounted.
                options.custom_flags(libc::O_NONBLOCK | if disk.read_only { 0 } else { libc::O_EXCL });
                let file = match options.open(path) {
                    Err(e) if e.raw_os_error() == Some(libc::EBUSY) => return Err(in_use()),
                    other => other.map_err(failed)?,
                };
                if !file.metadata().map_err(failed)?.file_type().is_block_device() {
                    return Err(bad(format!("disk={disk} is no block device")));
                }
                file
            }
        };
        let locked = if disk.read_only { file.try_lock_shared() } else { file.try_lock() };
        match locked {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => Err(in_use()),
            Err(TryLockError::Error(e)) => Err(failed(e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::home::Places;
    use super::super::id::SandboxId;
    use super::*;
    use crate::wire::Request;

    #[test]
    fn a_disk_is_written_as_it_is_read() {
        for text in ["data:new:1024", "m-1:file:models.img:ro", "w_2:file:A-b.c", "s:device:scratch", "t:device:x:ro"] {
            assert_eq!(DiskSpec::parse(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_no_disk_is_refused_with_its_argument() {
        let long = format!("{}:new:1", "n".repeat(21));
        for text in [
            "",
            "data",
            "data:new",
            "data:new:",
            "data:new:x",
            "data:new:-1",
            "data:new:1:ro",
            "root:new:1",
            "Data:new:1",
            "a b:new:1",
            "-a:new:1",
            "a:file:",
            "a:file:..",
            "a:file:.hidden",
            "a:file:../x",
            "a:file:a/b",
            "a:file:/dev/vda",
            "a:file:x:rw",
            "a:file:x:ro:ro",
            "a:device:/dev/vda",
            "a:disk:x",
            ":new:1",
            &long,
        ] {
            let error = DiskSpec::parse(text).unwrap_err();
            assert!(error.is(Code::BadArgument), "{text}: {error}");
            assert_eq!(error.fields.get("argument"), Some("disk"));
        }
        for text in ["a:new:0", "a:new:1048577", "a:new:99999999999999999999"] {
            assert!(DiskSpec::parse(text).unwrap_err().is(Code::OutOfRange), "{text}");
        }
        let twice = Request::new("1", "x").set("disk", "a:new:1").set("disk", "a:file:b");
        assert!(DiskSpec::take(&mut Args::of(twice)).unwrap_err().message.contains("twice"));
        let nine = (0..9).fold(Request::new("1", "x"), |request, n| request.set("disk", format!("d{n}:new:1")));
        assert_eq!(DiskSpec::take(&mut Args::of(nine)).unwrap_err().fields.get("max"), Some("8"));
    }

    #[test]
    fn a_writable_file_has_one_user_and_a_read_only_one_many() {
        let root = std::env::temp_dir().join(format!("warren-shelf-{}", std::process::id()));
        let directory = root.join("disks");
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join("a.img"), [0; 4096]).unwrap();
        std::fs::hard_link(directory.join("a.img"), directory.join("b.img")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", directory.join("link")).unwrap();
        std::fs::create_dir(directory.join("folder")).unwrap();
        let places = Places { disks: root.join("s"), sockets: root.join("r"), cgroups: root.join("c") };
        places.prepare().unwrap();
        let home = places.of(&SandboxId::random().unwrap());
        let devices = BTreeMap::from([("null".to_string(), PathBuf::from("/dev/null"))]);
        let shelf = Shelf { directory: &directory, devices: &devices };
        let open = |text: &str| shelf.open(&DiskSpec::parse(text).unwrap(), &home);

        let first = open("a:file:a.img").unwrap();
        for other in ["a:file:a.img", "a:file:b.img", "a:file:a.img:ro"] {
            assert!(open(other).unwrap_err().is(Code::InUse), "{other}");
        }
        // The lock stays with any copy, as that of a worker.
        let copy = first.try_clone().unwrap();
        drop(first);
        assert!(open("a:file:b.img").unwrap_err().is(Code::InUse));
        drop(copy);
        let readers = [open("a:file:a.img:ro").unwrap(), open("a:file:b.img:ro").unwrap()];
        assert!(open("a:file:a.img").unwrap_err().is(Code::InUse));
        drop(readers);
        open("a:file:a.img").unwrap();

        assert!(open("a:file:none").unwrap_err().is(Code::NotFound));
        assert!(open("a:device:none").unwrap_err().is(Code::NotFound));
        assert!(open("a:file:link").is_err());
        assert!(open("a:file:folder:ro").unwrap_err().is(Code::BadArgument));
        assert!(open("a:device:null").unwrap_err().is(Code::BadArgument));
        std::fs::remove_dir_all(root).unwrap();
    }
}
