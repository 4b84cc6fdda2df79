//! `file.watch`: what changes below a path, by inotify(7), on a thread as all that may block.
//!
//! A client that takes no rows stops the thread from reading; the kernel's queue is bounded, and what it drops is said.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};

use super::files::failed;
use super::tasks::{Desk, Order};
use crate::wire::{Code, Error, Fields, Message};

/// Watches at once: each has a thread, and other file requests need some too.
const WATCHES_MAX: usize = 16;
/// Directories of one watch.
const DIRECTORIES_MAX: usize = 4096;
/// How soon it is seen that nobody waits any more.
const LOOK: u16 = 500;

static WATCHES: AtomicUsize = AtomicUsize::new(0);

/// One of the watches that there may be at once.
struct Place;

impl Place {
    fn take() -> Result<Self, Error> {
        let place = Self;
        if WATCHES.fetch_add(1, Ordering::SeqCst) >= WATCHES_MAX {
            let message = format!("{WATCHES_MAX} watches are under way, which is the limit");
            return Err(Error::new(Code::NoCapacity, message).with("max", WATCHES_MAX));
        }
        Ok(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        WATCHES.fetch_sub(1, Ordering::SeqCst);
    }
}

/// `file.watch`: says rows until nobody waits any more, or the path is gone.
pub(super) fn watch(desk: &Desk, path: &Path, recursive: bool) -> Result<Fields, Error> {
    let _place = Place::take()?;
    let cannot = |errno: Errno| failed("watch", path, &io::Error::from(errno));
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).map_err(cannot)?;
    let mut tree = Tree { inotify, directories: BTreeMap::new(), paths: BTreeMap::new(), recursive, full: false };
    let root = tree.add(path).map_err(cannot)?;
    let mut found = Vec::new();
    tree.descend(path, &mut found);
    if tree.full {
        let message = format!("{} has more directories than the {DIRECTORIES_MAX} of a watch", path.display());
        return Err(Error::new(Code::NoCapacity, message).with("max", DIRECTORIES_MAX));
    }
    let mut rows = Rows { desk, allowed: 0 };
    rows.say(Fields::new().with("event", "watching").with("directories", tree.directories.len()))?;
    loop {
        rows.take_orders()?;
        let mut ready = [PollFd::new(tree.inotify.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ready, PollTimeout::from(LOOK)) {
            Ok(0) | Err(Errno::EINTR) => continue,
            Ok(_) => {}
            Err(errno) => return Err(cannot(errno)),
        }
        let events = match tree.inotify.read_events() {
            Ok(events) => events,
            Err(Errno::EAGAIN | Errno::EINTR) => continue,
            Err(errno) => return Err(cannot(errno)),
        };
        let ended = events.iter().any(|event| {
            event.wd == root && event.mask.intersects(AddWatchFlags::IN_DELETE_SELF | AddWatchFlags::IN_MOVE_SELF)
        });
        for row in tree.rows(events) {
            rows.say(row)?;
        }
        if ended {
            return Ok(Fields::new());
        }
    }
}

/// The client's side.
struct Rows<'a> {
    desk: &'a Desk,
    allowed: u64,
}

impl Rows<'_> {
    fn gone() -> Error {
        Error::new(Code::Cancelled, "cancelled by its client")
    }

    fn take_orders(&mut self) -> Result<(), Error> {
        while let Some(order) = self.desk.order_now().ok_or_else(Self::gone)? {
            if let Order::More(rows) = order {
                self.allowed += rows;
            }
        }
        Ok(())
    }

    fn say(&mut self, row: Fields) -> Result<(), Error> {
        while self.allowed == 0 {
            match self.desk.order() {
                Some(Order::More(rows)) => self.allowed += rows,
                Some(_) => {}
                None => return Err(Self::gone()),
            }
        }
        self.allowed -= 1;
        self.desk.say(Message::item(&self.desk.tag, row));
        Ok(())
    }
}

/// What is watched.
struct Tree {
    inotify: Inotify,
    /// Paths by what events name them.
    directories: BTreeMap<WatchDescriptor, PathBuf>,
    paths: BTreeMap<PathBuf, WatchDescriptor>,
    recursive: bool,
    /// There are more directories than may be watched.
    full: bool,
}

impl Tree {
    fn add(&mut self, path: &Path) -> nix::Result<WatchDescriptor> {
        let events = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_MODIFY
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF;
        let descriptor = self.inotify.add_watch(path, events)?;
        self.directories.insert(descriptor, path.to_path_buf());
        self.paths.insert(path.to_path_buf(), descriptor);
        Ok(descriptor)
    }

    /// Watches what is below a directory, where that was asked for; `found` gets what is there.
    fn descend(&mut self, path: &Path, found: &mut Vec<(PathBuf, bool)>) {
        if !self.recursive {
            return;
        }
        let mut left = vec![path.to_path_buf()];
        while let Some(path) = left.pop() {
            for entry in fs::read_dir(&path).into_iter().flatten().flatten() {
                // Links are not followed.
                let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
                let path = entry.path();
                if is_directory {
                    if self.directories.len() >= DIRECTORIES_MAX {
                        self.full = true;
                        return;
                    }
                    if self.add(&path).is_ok() {
                        left.push(path.clone());
                    }
                }
                found.push((path, is_directory));
            }
        }
    }

    /// What events mean, in their order.
    fn rows(&mut self, events: Vec<InotifyEvent>) -> Vec<Fields> {
        let mut rows = Vec::new();
        let mut written = BTreeSet::new();
        // Where something was moved from, by the cookie that both ends have.
        let mut left: Option<(u32, PathBuf, bool)> = None;
        for event in events {
            if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                rows.push(Fields::new().with("event", "lost"));
                continue;
            }
            let Some(directory) = self.directories.get(&event.wd).cloned() else { continue };
            let path = match &event.name {
                Some(name) => directory.join(name),
                None => directory,
            };
            let is_directory = event.mask.contains(AddWatchFlags::IN_ISDIR);
            let moved_here = event.mask.contains(AddWatchFlags::IN_MOVED_TO);
            let from = left.take_if(|(cookie, ..)| moved_here && *cookie == event.cookie);
            if let Some((_, path, is_directory)) = left.take() {
                self.forget(&path);
                rows.extend(row("remove", &path, is_directory));
            }
            if event.mask.contains(AddWatchFlags::IN_MOVED_FROM) {
                left = Some((event.cookie, path, is_directory));
            } else if let Some((_, from, _)) = from {
                // A file that is written whole comes under its name by a move of ours.
                match row("move", &from, is_directory) {
                    Some(row) => rows.push(row.with_bytes("to", path.as_os_str().as_bytes())),
                    None => rows.extend(row("write", &path, is_directory)),
                }
                self.rename(&from, &path);
            } else if moved_here || event.mask.contains(AddWatchFlags::IN_CREATE) {
                rows.extend(row("create", &path, is_directory));
                if is_directory && self.recursive {
                    let mut found = Vec::new();
                    if self.directories.len() < DIRECTORIES_MAX && self.add(&path).is_ok() {
                        self.descend(&path, &mut found);
                    } else {
                        self.full = true;
                    }
                    rows.extend(
                        found.into_iter().filter_map(|(path, is_directory)| row("create", &path, is_directory)),
                    );
                }
            } else if event.mask.contains(AddWatchFlags::IN_MODIFY) {
                if written.insert(path.clone()) {
                    rows.extend(row("write", &path, is_directory));
                }
            } else if event.mask.contains(AddWatchFlags::IN_DELETE) {
                self.forget(&path);
                rows.extend(row("remove", &path, is_directory));
            } else if event.mask.intersects(AddWatchFlags::IN_DELETE_SELF) && event.name.is_none() {
                // A directory below is said by the one above it.
                if self.directories.len() == 1 {
                    rows.extend(row("remove", &path, is_directory));
                }
            }
        }
        if let Some((_, path, is_directory)) = left {
            self.forget(&path);
            rows.extend(row("remove", &path, is_directory));
        }
        if std::mem::take(&mut self.full) {
            // Of these directories nothing more is heard.
            rows.push(Fields::new().with("event", "lost").with("max", DIRECTORIES_MAX));
        }
        rows
    }

    /// A directory has another path, and so has all below it.
    fn rename(&mut self, from: &Path, to: &Path) {
        let below: Vec<PathBuf> = self.paths.keys().filter(|path| path.starts_with(from)).cloned().collect();
        for old in below {
            let rest = old.strip_prefix(from).unwrap_or(Path::new(""));
            let new = if rest.as_os_str().is_empty() { to.to_path_buf() } else { to.join(rest) };
            if let Some(descriptor) = self.paths.remove(&old) {
                self.directories.insert(descriptor, new.clone());
                self.paths.insert(new, descriptor);
            }
        }
    }

    /// A directory is there no more.
    fn forget(&mut self, path: &Path) {
        let below: Vec<PathBuf> = self.paths.keys().filter(|watched| watched.starts_with(path)).cloned().collect();
        for path in below {
            if let Some(descriptor) = self.paths.remove(&path) {
                self.directories.remove(&descriptor);
                // One that was deleted has no watch any more.
                let _ = self.inotify.rm_watch(descriptor);
            }
        }
    }
}

/// A row; `None` for a file of `file.write` that is not under its name yet.
fn row(event: &str, path: &Path, is_directory: bool) -> Option<Fields> {
    let name = path.file_name().unwrap_or_default().as_bytes();
    if name.starts_with(b".burrow-") && name.ends_with(b".part") {
        return None;
    }
    let kind = if is_directory { "dir" } else { "file" };
    Some(Fields::new().with("event", event).with_bytes("path", path.as_os_str().as_bytes()).with("kind", kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Watched(PathBuf, Tree);

    impl Watched {
        fn new(name: &str, recursive: bool) -> Self {
            let path = std::env::temp_dir().join(format!("burrow-watch-{name}-{}", std::process::id()));
            fs::create_dir_all(path.join("old")).unwrap();
            let inotify = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
            let mut tree =
                Tree { inotify, directories: BTreeMap::new(), paths: BTreeMap::new(), recursive, full: false };
            tree.add(&path).unwrap();
            tree.descend(&path, &mut Vec::new());
            Self(path, tree)
        }

        fn seen(&mut self) -> Vec<String> {
            let events = self.1.inotify.read_events().unwrap_or_default();
            let place = format!("{}/", self.0.display());
            let words =
                |row: Fields| row.0.iter().map(|(_, v)| String::from_utf8_lossy(v).replace(&place, "")).collect();
            self.1.rows(events).into_iter().map(words).map(|row: Vec<String>| row.join(" ")).collect()
        }
    }

    impl Drop for Watched {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn what_happens_in_a_directory_is_said_in_order() {
        let mut watched = Watched::new("flat", false);
        let at = |name: &str| watched.0.join(name);
        fs::write(at("a"), "1").unwrap();
        fs::rename(at("a"), at("b")).unwrap();
        fs::write(at("old/x"), "below is not watched").unwrap();
        fs::rename(at("b"), at("old/b")).unwrap();
        fs::rename(at("old/x"), at("x")).unwrap();
        fs::remove_file(at("x")).unwrap();
        // As file.write puts a whole file into place.
        fs::write(at(".burrow-1-0.part"), "1").unwrap();
        fs::rename(at(".burrow-1-0.part"), at("whole")).unwrap();
        let expected = [
            "create a file",
            "write a file",
            "move a file b",
            "remove b file",
            "create x file",
            "remove x file",
            "write whole file",
        ];
        assert_eq!(watched.seen(), expected);
    }

    #[test]
    fn directories_that_come_move_and_go_are_followed() {
        let mut watched = Watched::new("deep", true);
        let root = watched.0.clone();
        fs::create_dir_all(root.join("new/deep")).unwrap();
        assert_eq!(watched.seen(), ["create new dir", "create new/deep dir"]);
        fs::write(root.join("new/deep/f"), "").unwrap();
        assert_eq!(watched.seen(), ["create new/deep/f file"]);
        fs::rename(root.join("new"), root.join("moved")).unwrap();
        fs::write(root.join("moved/deep/f"), "1").unwrap();
        assert_eq!(watched.seen(), ["move new dir moved", "write moved/deep/f file"]);
        fs::remove_dir_all(root.join("moved")).unwrap();
        assert_eq!(watched.seen(), ["remove moved/deep/f file", "remove moved/deep dir", "remove moved dir"]);
        fs::write(root.join("old/x"), "").unwrap();
        assert_eq!(watched.seen(), ["create old/x file"]);
        assert_eq!(watched.1.directories.len(), 2);
    }
}
