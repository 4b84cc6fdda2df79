//! Where an image's documents and layers are: a directory, or a tar archive of one.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::RecipeError;
use crate::archive::{Archive, Kind};

/// Files of an archive that are looked at. Images have some hundreds.
const MAX_FILES: usize = 10_000;

/// A place that files are read from by their names.
#[derive(Debug)]
pub enum Store {
    /// A directory.
    Directory(PathBuf),
    /// An archive, and where its files are in it.
    Archive {
        /// The archive.
        path: PathBuf,
        /// Offset and length of files by their names, and what links lead to.
        files: BTreeMap<Vec<u8>, Place>,
    },
}

/// What is in an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A file: offset and length, in octets.
    File(u64, u64),
    /// Another name, from the archive's top.
    Link(Vec<u8>),
}

/// A file of a store, with its length in octets.
#[derive(Debug)]
pub struct Blob {
    from: io::Take<File>,
    /// Octets.
    pub size: u64,
}

impl Read for Blob {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.from.read(into)
    }
}

impl Store {
    /// The files of an archive, as far as it can be read as one and has not more than an image would. What is in them is not
    /// looked at.
    pub fn of_archive(path: &Path) -> io::Result<Self> {
        let mut files = BTreeMap::new();
        let mut archive = Archive::new(io::BufReader::with_capacity(1 << 20, File::open(path)?));
        while files.len() < MAX_FILES {
            // Whoever unpacks it says what is wrong with it.
            let Ok(Some(entry)) = archive.next() else { break };
            let name = clean(&entry.path);
            match entry.kind {
                Kind::File => drop(files.insert(name, Place::File(archive.position(), entry.size))),
                Kind::HardLink => drop(files.insert(name, Place::Link(clean(&entry.link)))),
                Kind::SymbolicLink => {
                    let above = name.iter().rposition(|&octet| octet == b'/').map_or(0, |at| at + 1);
                    let target = [&name[..above], &entry.link].concat();
                    files.insert(name, Place::Link(clean(&target)));
                }
                _ => {}
            }
        }
        Ok(Self::Archive { path: path.to_path_buf(), files })
    }

    /// For errors: what it is, and a file in it.
    pub fn place(&self, name: &str) -> String {
        match self {
            Self::Directory(path) => path.join(name).display().to_string(),
            Self::Archive { path, .. } => format!("{}: {name}", path.display()),
        }
    }

    /// Whether it has a file.
    pub fn has(&self, name: &str) -> bool {
        match self {
            Self::Directory(path) => path.join(name).is_file(),
            Self::Archive { files, .. } => files.contains_key(name.as_bytes()),
        }
    }

    /// Opens a file. `name` must not leave the store.
    pub fn open(&self, name: &str) -> Result<Blob, RecipeError> {
        let failed = |e: &dyn std::fmt::Display| RecipeError::new(self.place(name), format!("cannot be read: {e}"));
        if name.is_empty() || name.split('/').any(|part| matches!(part, "" | "." | "..")) {
            return Err(RecipeError::new(self.place(name), "is no name of a file in the image"));
        }
        match self {
            Self::Directory(path) => {
                let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path.join(name));
                let file = file.map_err(|e| failed(&e))?;
                let meta = file.metadata().map_err(|e| failed(&e))?;
                if !meta.is_file() {
                    return Err(failed(&"it is no regular file"));
                }
                Ok(Blob { from: file.take(meta.len()), size: meta.len() })
            }
            Self::Archive { path, files } => {
                let mut name = name.as_bytes();
                // A link to a link to a link is nobody's idea of an image.
                for _ in 0..4 {
                    match files.get(name) {
                        Some(Place::File(offset, size)) => {
                            let mut file = File::open(path).map_err(|e| failed(&e))?;
                            file.seek(SeekFrom::Start(*offset)).map_err(|e| failed(&e))?;
                            return Ok(Blob { from: file.take(*size), size: *size });
                        }
                        Some(Place::Link(other)) => name = other,
                        None => break,
                    }
                }
                Err(failed(&"there is no such file in the archive"))
            }
        }
    }

    /// Reads a document of `most` octets at most.
    pub fn read(&self, name: &str, most: u64) -> Result<Vec<u8>, RecipeError> {
        let mut blob = self.open(name)?;
        if blob.size > most {
            let message = format!("{} octets are over the limit of {most}", blob.size);
            return Err(RecipeError::new(self.place(name), message));
        }
        let mut octets = Vec::new();
        let read = blob.read_to_end(&mut octets);
        read.map_err(|e| RecipeError::new(self.place(name), format!("cannot be read: {e}")))?;
        if octets.len() as u64 != blob.size {
            let message = format!("ends after {} octets of {}", octets.len(), blob.size);
            return Err(RecipeError::new(self.place(name), message));
        }
        Ok(octets)
    }
}

/// A path without `.`, and with `..` taken back as far as there is something to take.
fn clean(path: &[u8]) -> Vec<u8> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|&octet| octet == b'/') {
        match part {
            b"" | b"." => {}
            b".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join(&b'/')
}

/// Whether a file begins as an archive that is not compressed.
pub fn is_archive(path: &Path) -> bool {
    let mut block = [0; 512];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut block));
    read.is_ok() && block[257..262] == *b"ustar"
}

/// The files of a directory, sorted, as names.
pub fn list(directory: &Path) -> io::Result<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory)? {
        names.push(entry?.file_name().as_bytes().to_vec());
    }
    names.sort();
    Ok(names)
}
