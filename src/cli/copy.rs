//! `cp`: files and trees between this machine and a sandbox, streamed with bounded memory, modes kept.
//!
//! What a sandbox says about its files is hostile: a name must be one name, links are made when everything else is
//! done so that no later file can be written through one, and modes lose setuid, setgid and sticky bits here.

mod tar;

use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::Failure;
use super::client::{Client, INTERRUPTED, LOCAL_IO, local};
use super::output::{StatusLine, complain, human_bytes, print};
use super::signals::{ENDING, Signals, exit_code};
use crate::wire::{Code, Error, Fields, Request};

/// Directories deeper than this are not followed: no honest tree is, and a hostile agent could go on for ever.
const MAX_DEPTH: usize = 256;
/// A copy that takes longer shows its progress.
const QUIET_TIME: Duration = Duration::from_millis(700);
/// Between two updates of the progress.
const UPDATE: Duration = Duration::from_millis(100);

/// One side of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Standard,
    Here(PathBuf),
    Sandbox { id: String, path: Vec<u8> },
}

impl Place {
    /// `-`, `SANDBOX:PATH` or a path; a path with a colon is written `./a:b`, as docker has it.
    fn parse(text: &OsStr) -> Result<Self, Failure> {
        let octets = text.as_bytes();
        if octets == b"-" {
            return Ok(Self::Standard);
        }
        let is_path = matches!(octets.first(), None | Some(b'/' | b'.'));
        match octets.iter().position(|&b| b == b':').filter(|&at| at > 0 && !is_path) {
            Some(at) if octets.len() > at + 1 => {
                let id = String::from_utf8(octets[..at].to_vec())
                    .map_err(|_| Failure::Misuse("the sandbox's name is not UTF-8".to_string()))?;
                Ok(Self::Sandbox { id, path: octets[at + 1..].to_vec() })
            }
            Some(_) => Err(Failure::Misuse(format!("{} has no path after its colon", text.to_string_lossy()))),
            None if octets.is_empty() => Err(Failure::Misuse("a path is empty".to_string())),
            None => Ok(Self::Here(PathBuf::from(text))),
        }
    }
}

/// `warren cp`.
pub fn cp(connect: &dyn Fn() -> Result<Client, Error>, source: &OsStr, target: &OsStr) -> Result<u8, Failure> {
    let (source, target) = (Place::parse(source)?, Place::parse(target)?);
    let copier = |id: &str| connect().map(|client| Copier::new(client, id));
    match (source, target) {
        (Place::Standard, Place::Sandbox { id, path }) => {
            let mut copier = copier(&id)?;
            match tar::is_directory(&mut copier, &path)? {
                true => tar::send(&mut copier, &mut io::stdin().lock(), &path)?,
                false => copier.send_stream(&mut io::stdin().lock(), &path, None)?,
            }
            copier.conclude()
        }
        (Place::Here(from), Place::Sandbox { id, path }) => {
            let mut copier = copier(&id)?;
            copier.send(&from, &path)?;
            copier.conclude()
        }
        (Place::Sandbox { id, path }, Place::Standard) => {
            let mut copier = copier(&id)?;
            match copier.stat(&path)?.filter(|found| found.get("kind") == Some("dir")) {
                Some(directory) => {
                    tar::receive(&mut copier, &path, &directory)?;
                    copier.conclude()
                }
                None => receive_to_stdout(copier, &path),
            }
        }
        (Place::Sandbox { id, path }, Place::Here(to)) => {
            // Taken over so that a half written file goes away before we do.
            let signals = Signals::take(&ENDING).map_err(|e| broken("signalfd", &e))?;
            let mut copier = copier(&id)?;
            copier.client.interrupt_on(Some(signals.duplicate().map_err(|e| broken("signalfd", &e))?));
            match copier.receive(&path, &to) {
                Err(error) if error.code == INTERRUPTED => Ok(signals.next().map_or(1, exit_code)),
                done => done.map_err(Failure::from).and_then(|()| copier.conclude()),
            }
        }
        _ => Err(Failure::Misuse("exactly one side must be in a sandbox: SANDBOX:PATH".to_string())),
    }
}

fn receive_to_stdout(mut copier: Copier, path: &[u8]) -> Result<u8, Failure> {
    let mut output = Ok(());
    let request = copier.request("file.read", path);
    let done = copier.client.transfer(request, None, &mut |_, payload| {
        output = print(payload);
        output.as_ref().map_err(|e: &io::Error| e.kind().into()).copied()
    });
    output?;
    done?;
    Ok(0)
}

fn broken(what: impl std::fmt::Display, e: &io::Error) -> Error {
    local(LOCAL_IO, format!("{what}: {e}"))
}

/// The last name of a path, where it has one.
fn last_name(path: &[u8]) -> Option<&[u8]> {
    let end = path.iter().rposition(|&b| b != b'/')? + 1;
    let name = path[..end].rsplit(|&b| b == b'/').next()?;
    is_name(name).then_some(name)
}

/// Whether this is the name of one entry of a directory.
fn is_name(name: &[u8]) -> bool {
    !name.is_empty() && name != b"." && name != b".." && !name.iter().any(|&b| b == b'/' || b == 0)
}

/// Whether a path asks for what is in a directory and not for the directory: it ends in `/.`.
fn is_contents(path: &[u8]) -> bool {
    path == b"." || path.ends_with(b"/.")
}

fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    let slash: &[u8] = if directory.ends_with(b"/") { b"" } else { b"/" };
    [directory, slash, name].concat()
}

fn mode_of(fields: &Fields) -> u32 {
    fields.get("mode").and_then(|mode| u32::from_str_radix(mode, 8).ok()).unwrap_or(0o644) & 0o777
}

struct Copier {
    client: Client,
    id: String,
    progress: Progress,
    /// Entries that could not be copied because of what they are.
    left_out: usize,
}

impl Copier {
    fn new(client: Client, id: &str) -> Self {
        Self { client, id: id.to_string(), progress: Progress::new(), left_out: 0 }
    }

    fn conclude(self) -> Result<u8, Failure> {
        if self.left_out == 0 {
            return Ok(0);
        }
        Err(local("NOT_COPIED", format!("{} entries were left out, as warned", self.left_out)).into())
    }

    fn leave_out(&mut self, path: impl std::fmt::Display, why: &str) {
        self.progress.line.clear();
        complain(&format!("warning: {path} left out: {why}"));
        self.left_out += 1;
    }

    fn request(&self, verb: &str, path: &[u8]) -> Request {
        Request::new("", verb).arg(&self.id).set_bytes("path", path)
    }

    /// What the sandbox knows of a path; `None` where there is nothing. A link is followed.
    fn stat(&mut self, path: &[u8]) -> Result<Option<Fields>, Error> {
        let mut ask = |path: &[u8]| match self.client.call(self.request("file.stat", path)) {
            Ok(reply) if reply.fields.get("kind").is_some() => Ok(Some(reply.fields)),
            Ok(reply) => Ok(reply.items.into_iter().next()),
            Err(error) if error.is(Code::NotFound) || error.fields.get("errno") == Some("ENOENT") => Ok(None),
            Err(error) => Err(error),
        };
        let found = ask(path)?;
        if found.as_ref().is_some_and(|f| f.get("kind") == Some("link"))
            && let Ok(Some(directory)) = ask(&join(path, b"."))
        {
            return Ok(Some(directory));
        }
        Ok(found)
    }

    // To the sandbox.

    fn send(&mut self, from: &Path, to: &[u8]) -> Result<(), Error> {
        let meta = fs::metadata(from).map_err(|e| broken(from.display(), &e))?;
        let target = self.stat(to)?;
        let is_directory = target.as_ref().is_some_and(|f| f.get("kind") == Some("dir"));
        let source = from.as_os_str().as_bytes();
        let name = match last_name(source) {
            Some(name) => name.to_vec(),
            None => fs::canonicalize(from)
                .ok()
                .and_then(|path| path.file_name().map(|name| name.as_bytes().to_vec()))
                .unwrap_or_default(),
        };
        if !meta.is_dir() {
            let to = if is_directory || to.ends_with(b"/") { join(to, &name) } else { to.to_vec() };
            return self.send_file(from, &to);
        }
        let root = match (is_directory, &target) {
            (true, _) if is_contents(source) || name.is_empty() => to.to_vec(),
            (true, _) => join(to, &name),
            (false, None) => to.to_vec(),
            (false, Some(_)) => {
                let (from, to) = (from.display(), String::from_utf8_lossy(to));
                return Err(local("NOT_A_DIRECTORY", format!("{from} is a directory and {to} is not")));
            }
        };
        self.send_tree(from, &root)
    }

    fn send_tree(&mut self, from: &Path, to: &[u8]) -> Result<(), Error> {
        let mut links = Vec::new();
        let mut left = vec![(from.to_path_buf(), to.to_vec(), 0)];
        while let Some((from, to, depth)) = left.pop() {
            let failed = |e: io::Error| broken(from.display(), &e);
            let mode = fs::metadata(&from).map_err(failed)?.permissions().mode() & 0o7777;
            self.make_directory(&to, mode)?;
            let mut entries: Vec<_> = fs::read_dir(&from).map_err(failed)?.collect::<Result<_, _>>().map_err(failed)?;
            entries.sort_by_key(fs::DirEntry::file_name);
            for entry in entries {
                let (path, target) = (entry.path(), join(&to, entry.file_name().as_bytes()));
                let kind = entry.file_type().map_err(failed)?;
                if kind.is_file() {
                    self.send_file(&path, &target)?;
                } else if kind.is_dir() && depth < MAX_DEPTH {
                    left.push((path, target, depth + 1));
                } else if kind.is_symlink() {
                    links.push((target, fs::read_link(&path).map_err(failed)?));
                } else {
                    self.leave_out(
                        path.display(),
                        if kind.is_dir() { "too deep" } else { "neither a file nor a directory" },
                    );
                }
            }
        }
        links.into_iter().try_for_each(|(path, target)| self.make_link(&path, target.as_os_str().as_bytes()))
    }

    /// One that is there stays as it is.
    fn make_directory(&mut self, path: &[u8], mode: u32) -> Result<(), Error> {
        let request = self.request("file.mkdir", path).set("mode", format!("{mode:04o}")).set("parents", true);
        match self.client.call(request) {
            Err(error) if !error.is(Code::AlreadyExists) => Err(error),
            _ => Ok(()),
        }
    }

    fn make_link(&mut self, path: &[u8], target: &[u8]) -> Result<(), Error> {
        let request = self.request("file.link", path).set_bytes("target", target);
        self.client.call(request).map(drop)
    }

    fn send_file(&mut self, from: &Path, to: &[u8]) -> Result<(), Error> {
        let failed = |e: io::Error| broken(from.display(), &e);
        let mut file = File::open(from).map_err(failed)?;
        let meta = file.metadata().map_err(failed)?;
        // A pipe or device is read to its end; its own mode is no file's mode.
        let mode = meta.is_file().then(|| meta.permissions().mode() & 0o7777);
        self.progress.begin(&from.to_string_lossy(), meta.is_file().then_some(meta.len()));
        self.send_stream(&mut file, to, mode)
    }

    fn send_stream(&mut self, from: &mut dyn Read, to: &[u8], mode: Option<u32>) -> Result<(), Error> {
        let mut request = self.request("file.write", to);
        if let Some(mode) = mode {
            request = request.set("mode", format!("{mode:04o}"));
        }
        let mut counted = Counted { from, progress: &mut self.progress };
        self.client.transfer(request, Some(("content", &mut counted)), &mut |_, _| Ok(()))?;
        self.progress.line.clear();
        Ok(())
    }

    // From the sandbox.

    fn receive(&mut self, from: &[u8], to: &Path) -> Result<(), Error> {
        let shown = String::from_utf8_lossy(from).into_owned();
        let Some(source) = self.stat(from)? else {
            return Err(Error::new(Code::NotFound, format!("there is no {shown} in sandbox {}", self.id)));
        };
        let target = fs::metadata(to).ok();
        let is_directory = target.as_ref().is_some_and(fs::Metadata::is_dir);
        let name = last_name(from).map(|name| PathBuf::from(OsString::from_vec(name.to_vec())));
        if source.get("kind") == Some("dir") {
            let root = match (is_directory, &target, name) {
                (true, _, Some(name)) if !is_contents(from) => to.join(name),
                (true, ..) | (false, None, _) => to.to_path_buf(),
                (false, Some(_), _) => {
                    let to = to.display();
                    return Err(local("NOT_A_DIRECTORY", format!("{shown} is a directory and {to} is not")));
                }
            };
            return self.receive_tree(from, mode_of(&source), &root);
        }
        let to = match (is_directory, name) {
            (true, Some(name)) => to.join(name),
            (true, None) => return Err(local("NOT_A_FILE", format!("{shown} is no file's name"))),
            (false, _) => to.to_path_buf(),
        };
        self.receive_file(from, &source, &to)
    }

    fn receive_tree(&mut self, from: &[u8], mode: u32, to: &Path) -> Result<(), Error> {
        let (mut modes, mut links) = (Vec::new(), Vec::new());
        let mut left = vec![(from.to_vec(), mode, to.to_path_buf(), 0)];
        while let Some((from, mode, to, depth)) = left.pop() {
            make_directory(&to, depth == 0).map_err(|e| broken(to.display(), &e))?;
            modes.push((to.clone(), mode));
            let mut entries = self.client.call(self.request("file.list", &from))?.items;
            entries.sort_by(|a, b| a.bytes("name").cmp(&b.bytes("name")));
            for entry in entries {
                let Some(name) = entry.bytes("name").filter(|name| is_name(name)) else {
                    self.leave_out(to.display(), "an entry has an impossible name");
                    continue;
                };
                let (path, target) = (join(&from, name), to.join(OsStr::from_bytes(name)));
                match entry.get("kind") {
                    Some("file") => self.receive_file(&path, &entry, &target)?,
                    Some("dir") if depth < MAX_DEPTH => left.push((path, mode_of(&entry), target, depth + 1)),
                    Some("link") if entry.bytes("target").is_some() => {
                        links.push((entry.bytes("target").unwrap_or_default().to_vec(), target));
                    }
                    Some("dir") => self.leave_out(target.display(), "too deep"),
                    _ => self.leave_out(target.display(), "neither a file nor a directory"),
                }
            }
        }
        for (content, path) in links {
            make_link(&content, &path).map_err(|e| broken(path.display(), &e))?;
        }
        // Last, and the deepest first: a directory that may not be written could not be filled.
        for (path, mode) in modes.into_iter().rev() {
            fs::set_permissions(&path, Permissions::from_mode(mode)).map_err(|e| broken(path.display(), &e))?;
        }
        Ok(())
    }

    fn receive_file(&mut self, from: &[u8], source: &Fields, to: &Path) -> Result<(), Error> {
        let failed = |e: io::Error| broken(to.display(), &e);
        let mut target = Target::open(to).map_err(failed)?;
        let progress = &mut self.progress;
        progress.begin(&to.to_string_lossy(), source.number("size"));
        let request = Request::new("", "file.read").arg(&self.id).set_bytes("path", from);
        self.client.transfer(request, None, &mut |_, payload| {
            progress.add(payload.len());
            target.file.write_all(payload)
        })?;
        progress.line.clear();
        target.commit(mode_of(source)).map_err(failed)
    }
}

/// A directory that is there already is as good; a link to one only where the user named it.
fn make_directory(path: &Path, follow: bool) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            let meta = if follow { fs::metadata(path)? } else { fs::symlink_metadata(path)? };
            if meta.is_dir() { Ok(()) } else { Err(e) }
        }
        done => done,
    }
}

fn make_link(content: &[u8], path: &Path) -> io::Result<()> {
    if fs::symlink_metadata(path).is_ok_and(|meta| !meta.is_dir()) {
        fs::remove_file(path)?;
    }
    symlink(OsStr::from_bytes(content), path)
}

/// A file being received: under another name until it is whole, and gone if it never is.
struct Target {
    file: File,
    to: PathBuf,
    temporary: Option<PathBuf>,
}

impl Target {
    fn open(to: &Path) -> io::Result<Self> {
        let special = fs::metadata(to).is_ok_and(|meta| {
            let kind = meta.file_type();
            kind.is_char_device() || kind.is_fifo() || kind.is_block_device()
        });
        if special {
            let file = OpenOptions::new().write(true).open(to)?;
            return Ok(Self { file, to: to.to_path_buf(), temporary: None });
        }
        if fs::symlink_metadata(to).is_ok_and(|meta| meta.is_dir()) {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        let directory = to.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let temporary = directory.join(format!(".warren-cp-{}", std::process::id()));
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        Ok(Self { file, to: to.to_path_buf(), temporary: Some(temporary) })
    }

    fn commit(mut self, mode: u32) -> io::Result<()> {
        let Some(temporary) = &self.temporary else { return Ok(()) };
        self.file.set_permissions(Permissions::from_mode(mode))?;
        fs::rename(temporary, &self.to)?;
        self.temporary = None;
        Ok(())
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            let _ = fs::remove_file(temporary);
        }
    }
}

/// How far a file has come, shown when it takes long.
struct Progress {
    line: StatusLine,
    name: String,
    total: Option<u64>,
    done: u64,
    started: Instant,
    shown: Instant,
}

impl Progress {
    fn new() -> Self {
        let now = Instant::now();
        Self { line: StatusLine::new(), name: String::new(), total: None, done: 0, started: now, shown: now }
    }

    fn begin(&mut self, name: &str, total: Option<u64>) {
        self.name = name.to_string();
        (self.total, self.done, self.started) = (total, 0, Instant::now());
    }

    fn add(&mut self, octets: usize) {
        self.done += octets as u64;
        if !self.line.is_enabled() || self.started.elapsed() < QUIET_TIME || self.shown.elapsed() < UPDATE {
            return;
        }
        self.shown = Instant::now();
        let rate = human_bytes((self.done as f64 / self.started.elapsed().as_secs_f64()) as u64);
        let done = human_bytes(self.done);
        let text = match self.total.filter(|&total| total > 0) {
            Some(total) => {
                let percent = u128::from(self.done.min(total)) * 100 / u128::from(total);
                format!("{}: {done} of {} ({percent} %), {rate}/s", self.name, human_bytes(total))
            }
            None => format!("{}: {done}, {rate}/s", self.name),
        };
        self.line.show(&text);
    }
}

struct Counted<'a> {
    from: &'a mut dyn Read,
    progress: &'a mut Progress,
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.from.read(buffer)?;
        self.progress.add(n);
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_a_path_a_sandbox_path_or_a_stream() {
        let place = |text: &str| Place::parse(OsStr::new(text));
        let here = |text: &str| Place::Here(PathBuf::from(text));
        assert_eq!(place("-").unwrap(), Place::Standard);
        assert_eq!(place("a/b").unwrap(), here("a/b"));
        assert_eq!(place("./a:b").unwrap(), here("./a:b"));
        assert_eq!(place("/a:b").unwrap(), here("/a:b"));
        assert_eq!(place(":b").unwrap(), here(":b"));
        assert_eq!(place("sb:/x:y").unwrap(), Place::Sandbox { id: "sb".into(), path: b"/x:y".to_vec() });
        assert!(place("sb:").is_err());
        assert!(place("").is_err());
    }

    #[test]
    fn names_from_a_sandbox_cannot_leave_their_directory() {
        for bad in [&b""[..], b".", b"..", b"a/b", b"../x", b"a\0b", b"/"] {
            assert!(!is_name(bad), "{bad:?}");
        }
        assert!(is_name(b"..."));
        assert_eq!(last_name(b"/a/b//"), Some(&b"b"[..]));
        assert_eq!(last_name(b"/"), None);
        assert_eq!(last_name(b"/a/.."), None);
        assert_eq!(join(b"/", b"a"), b"/a");
    }

    #[test]
    fn modes_lose_their_special_bits() {
        assert_eq!(mode_of(&Fields::new().with("mode", "4755")), 0o755);
        assert_eq!(mode_of(&Fields::new()), 0o644);
    }
}
