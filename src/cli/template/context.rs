//! What COPY sends: files of the recipe's directory as one archive, the same octets for the same files.

use std::fs::{self, File};
use std::io::{self, Cursor, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::archive::{BLOCK, Entry, Kind, write_entry};
use crate::recipe::RecipeError;
use crate::recipe::ignore::{Held, Ignore};
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

/// Something of the directory.
struct Found {
    path: PathBuf,
    /// In the archive; empty where only what is in it comes.
    name: Vec<u8>,
    /// From the directory's top.
    from: Vec<u8>,
    /// Which patterns hold for it.
    held: Held,
}

impl Context {
    /// Lists what `sources` name in `root`, but for what is to be left out. Links are sent as links.
    pub fn new(root: &Path, sources: &[String], ignore: &Ignore) -> Result<Self, RecipeError> {
        let mut context = Self { pieces: Vec::new(), directory: sources.len() > 1 };
        let top = root.canonicalize().map_err(failed(root))?;
        for source in sources {
            let found = find(root, &top, source, ignore)?;
            context.directory |= found.name.is_empty();
            let (path, by, before) = (found.path.clone(), ignore.left_out(&found.held), context.pieces.len());
            context.add(found, ignore)?;
            if let Some(by) = by.filter(|_| context.pieces.len() == before) {
                return Err(RecipeError::new(path.display(), format!("is left out by {by}")));
            }
        }
        context.pieces.push(Piece::Octets(vec![0; 2 * BLOCK]));
        Ok(context)
    }

    fn add(&mut self, found: Found, ignore: &Ignore) -> Result<(), RecipeError> {
        let Found { path, name, from, held } = found;
        let (path, before) = (path.as_path(), self.pieces.len());
        if before > 2 * MAX_ENTRIES {
            return Err(RecipeError::new(path.display(), format!("is one of more than {MAX_ENTRIES} files")));
        }
        let meta = fs::symlink_metadata(path).map_err(failed(path))?;
        let comes = ignore.left_out(&held).is_none();
        let is_looked_into = meta.is_dir() && ignore.has_exceptions();
        if !(comes || is_looked_into) {
            return Ok(());
        }
        // Times are no part of what is built: the same files are the same archive.
        let mut entry = Entry { path: name, mode: meta.permissions().mode() & 0o7777, ..Entry::default() };
        if meta.is_dir() {
            entry.kind = Kind::Directory;
            let has_entry = !entry.path.is_empty();
            if has_entry {
                self.pieces.push(Piece::Octets(write_entry(&entry)));
            }
            for child in list(path).map_err(failed(path))? {
                let below = |above: &[u8]| match above {
                    b"" => child.clone(),
                    above => [above, b"/", &child].concat(),
                };
                let (name, from) = (below(&entry.path), below(&from));
                let held = ignore.held(&from, &held);
                self.add(Found { path: path.join(std::ffi::OsStr::from_bytes(&child)), name, from, held }, ignore)?;
            }
            if !comes && has_entry && self.pieces.len() == before + 1 {
                // Nothing in it is an exception.
                self.pieces.pop();
            }
            return Ok(());
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

/// What a recipe names.
fn find(root: &Path, top: &Path, source: &str, ignore: &Ignore) -> Result<Found, RecipeError> {
    let path = root.join(source.trim_start_matches('/'));
    let directory = fs::symlink_metadata(&path).map_err(failed(&path))?.is_dir();
    let whole = fs::canonicalize(&path).map_err(failed(&path))?;
    // What a link in the path leads to may be anywhere: then it is no file of the directory.
    if !whole.starts_with(top) {
        return Err(RecipeError::new(path.display(), "leads out of the directory that is built from"));
    }
    // A link that comes is itself, and no other name of what is left out by another.
    let (real, name) = match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) if !directory => {
            (fs::canonicalize(parent).map_err(failed(parent))?.join(name), name.as_bytes().to_vec())
        }
        _ => (whole, Vec::new()),
    };
    let (mut from, mut held) = (PathBuf::new(), Held::default());
    for part in real.strip_prefix(top).unwrap_or(Path::new("")) {
        from.push(part);
        held = ignore.held(from.as_os_str().as_bytes(), &held);
    }
    Ok(Found { path, name, from: from.into_os_string().into_vec(), held })
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
            let context = Context::new(&root, &sources, &Ignore::default())?;
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

    #[test]
    fn what_is_ignored_is_left_out_and_no_part_of_what_is_hashed() {
        let root = std::env::temp_dir().join(format!("warren-ignored-{}", std::process::id()));
        for (file, content) in [
            (".env", "secret"),
            (".git/config", "x"),
            ("src/main", "x"),
            ("src/x.o", "x"),
            ("src/keep.o", "x"),
            ("out/a/b", "x"),
        ] {
            fs::create_dir_all(root.join(file).parent().unwrap()).unwrap();
            fs::write(root.join(file), content).unwrap();
        }
        std::os::unix::fs::symlink(".env", root.join("src/link")).unwrap();
        std::os::unix::fs::symlink(".git", root.join("git")).unwrap();
        let read = |ignore: &str, source: &str| {
            let ignore = Ignore::parse(ignore.as_bytes(), "I")?;
            let context = Context::new(&root, &[source.to_string()], &ignore)?;
            let mut octets = Vec::new();
            context.open().read_to_end(&mut octets).unwrap();
            Ok::<_, RecipeError>(octets)
        };
        let names = |octets: &[u8]| {
            let (mut archive, mut names) = (Archive::new(octets), Vec::new());
            while let Some(entry) = archive.next().unwrap() {
                names.push(String::from_utf8(entry.path).unwrap());
            }
            names.join(" ")
        };
        let list = ".env\n.git\n**/*.o\n!src/keep.o\nout\n!out/a/b\nnone\n";
        let first = read(list, ".").unwrap();
        assert_eq!(names(&first), "git out out/a out/a/b src src/keep.o src/link src/main");
        fs::write(root.join(".env"), "another").unwrap();
        fs::create_dir_all(root.join("none/x")).unwrap();
        assert_eq!(read(list, ".").unwrap(), first);
        assert_eq!(names(&read(list, "src").unwrap()), "keep.o link main");
        assert_eq!(names(&read(list, "out").unwrap()), "a a/b");
        // A directory of which nothing comes is none; nor is something that is named, by whatever path.
        for (source, line) in [(".env", 1), (".git/config", 2), ("git/config", 2), ("src/x.o", 3), ("none", 7)] {
            let error = read(list, source).unwrap_err();
            assert_eq!(error.message, format!("is left out by I:{line}"), "{source}");
        }
        fs::remove_dir_all(&root).unwrap();
    }
}
