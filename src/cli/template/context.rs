//! What COPY sends: files of the recipe's directory as one archive, the same octets for the same files.

use std::fs::{self, File};
use std::io::{self, Cursor, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::archive::{BLOCK, Entry, Kind, write_entry};
use crate::recipe::RecipeError;
use crate::recipe::store::list;

/// Files and directories that one COPY sends at most.
const MAX_ENTRIES: usize = 400_000;

/// One piece of the archive.
#[derive(Debug, Clone)]
enum Piece {
    Octets(Vec<u8>),
    File { path: PathBuf, size: u64 },
}

/// The archive, which is read as often as it is opened.
#[derive(Debug)]
pub(super) struct Context {
    pieces: Vec<Piece>,
    /// More than one file comes, or what is in a directory: the target is a directory.
    pub directory: bool,
}

fn failed(path: &Path) -> impl Fn(io::Error) -> RecipeError + '_ {
    move |e| RecipeError::new(path.display(), e.to_string())
}

impl Context {
    /// Lists what `sources` name in `root`. Links are sent as links.
    pub fn new(root: &Path, sources: &[String]) -> Result<Self, RecipeError> {
        let mut context = Self { pieces: Vec::new(), directory: sources.len() > 1 };
        for source in sources {
            let path = root.join(source.trim_start_matches('/'));
            let meta = fs::symlink_metadata(&path).map_err(failed(&path))?;
            // What a link in the path leads to may be anywhere: then it is no file of the directory.
            let (real, top) =
                (fs::canonicalize(&path).map_err(failed(&path))?, root.canonicalize().map_err(failed(root))?);
            if !real.starts_with(&top) {
                return Err(RecipeError::new(path.display(), "leads out of the directory that is built from"));
            }
            if meta.is_dir() {
                context.directory = true;
                context.add_children(&path, b"")?;
            } else {
                let name = path.file_name().map(|name| name.as_bytes().to_vec()).unwrap_or_default();
                context.add(&path, name)?;
            }
        }
        context.pieces.push(Piece::Octets(vec![0; 2 * BLOCK]));
        Ok(context)
    }

    fn add_children(&mut self, directory: &Path, prefix: &[u8]) -> Result<(), RecipeError> {
        for name in list(directory).map_err(failed(directory))? {
            let path = directory.join(std::ffi::OsStr::from_bytes(&name));
            let inner = if prefix.is_empty() { name } else { [prefix, b"/", &name].concat() };
            self.add(&path, inner)?;
        }
        Ok(())
    }

    fn add(&mut self, path: &Path, name: Vec<u8>) -> Result<(), RecipeError> {
        if self.pieces.len() > 2 * MAX_ENTRIES {
            return Err(RecipeError::new(path.display(), format!("is one of more than {MAX_ENTRIES} files")));
        }
        let meta = fs::symlink_metadata(path).map_err(failed(path))?;
        // Times are no part of what is built: the same files are the same archive.
        let mut entry = Entry { path: name, mode: meta.permissions().mode() & 0o7777, ..Entry::default() };
        if meta.is_dir() {
            entry.kind = Kind::Directory;
            let name = entry.path.clone();
            self.pieces.push(Piece::Octets(write_entry(&entry)));
            return self.add_children(path, &name);
        }
        if meta.is_symlink() {
            entry.kind = Kind::SymbolicLink;
            entry.link = fs::read_link(path).map_err(failed(path))?.as_os_str().as_bytes().to_vec();
            self.pieces.push(Piece::Octets(write_entry(&entry)));
            return Ok(());
        }
        if !meta.is_file() {
            return Err(RecipeError::new(path.display(), "is neither a file nor a directory nor a link"));
        }
        entry.size = meta.len();
        let padding = entry.size.wrapping_neg() as usize % BLOCK;
        self.pieces.push(Piece::Octets(write_entry(&entry)));
        self.pieces.push(Piece::File { path: path.to_path_buf(), size: entry.size });
        self.pieces.push(Piece::Octets(vec![0; padding]));
        Ok(())
    }

    /// The archive from its begin.
    pub fn open(&self) -> Stream<'_> {
        Stream { pieces: self.pieces.iter(), current: Box::new(io::empty()) }
    }
}

/// An archive that is read.
pub(super) struct Stream<'a> {
    pieces: std::slice::Iter<'a, Piece>,
    current: Box<dyn Read + 'a>,
}

/// A file that must be as long as it was.
struct Exactly {
    file: io::Take<File>,
    path: PathBuf,
}

impl Read for Exactly {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let got = self.file.read(into)?;
        if got == 0 && self.file.limit() > 0 && !into.is_empty() {
            return Err(io::Error::other(format!("{} became shorter while it was read", self.path.display())));
        }
        Ok(got)
    }
}

impl Read for Stream<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            let got = self.current.read(into)?;
            if got > 0 || into.is_empty() {
                return Ok(got);
            }
            self.current = match self.pieces.next() {
                None => return Ok(0),
                Some(Piece::Octets(octets)) => Box::new(Cursor::new(octets)),
                Some(Piece::File { path, size }) => {
                    let file =
                        File::open(path).map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))?;
                    Box::new(Exactly { file: file.take(*size), path: path.clone() })
                }
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::Archive;

    #[test]
    fn the_same_files_are_the_same_archive_and_links_do_not_lead_out() {
        let root = std::env::temp_dir().join(format!("warren-context-{}", std::process::id()));
        fs::create_dir_all(root.join("d/e")).unwrap();
        fs::write(root.join("d/file"), [7; 700]).unwrap();
        fs::write(root.join("d/e/x"), b"x").unwrap();
        std::os::unix::fs::symlink("/etc", root.join("out")).unwrap();
        let read = |sources: &[&str]| {
            let sources: Vec<String> = sources.iter().map(ToString::to_string).collect();
            let context = Context::new(&root, &sources)?;
            let mut octets = Vec::new();
            context.open().read_to_end(&mut octets).unwrap();
            Ok::<_, RecipeError>((context.directory, octets))
        };
        let (directory, first) = read(&["d"]).unwrap();
        fs::write(root.join("d/file"), [7; 700]).unwrap();
        assert_eq!((directory, &first), (true, &read(&["d"]).unwrap().1));
        let (mut archive, mut names) = (Archive::new(first.as_slice()), Vec::new());
        while let Some(entry) = archive.next().unwrap() {
            names.push(String::from_utf8(entry.path).unwrap());
        }
        assert_eq!(names, ["e", "e/x", "file"]);
        assert!(!read(&["d/file"]).unwrap().0);
        assert!(read(&["out/passwd"]).unwrap_err().message.contains("leads out"));
        fs::remove_dir_all(&root).unwrap();
    }
}
