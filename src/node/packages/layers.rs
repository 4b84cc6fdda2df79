//! Sets of packages that were installed, as files: `KEY-DIGEST.tar`, where KEY says what is in it and DIGEST is SHA-256 of the
//! file. What is being made is `KEY.partial`; a file gets its name when it is whole and on the medium, so that whatever ends
//! the supervisor leaves either the whole or what the next start removes.
//!
//! All of it is used by threads of requests, never by the loop.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use crate::recipe::key::Key;
use crate::wire::{Code, Error};

/// Sets that are made at once; each is a builder.
const MAKING: usize = 4;
/// Those of one owner, whose builders may be the ones that do not come to an end.
const MAKING_OF_OWNER: usize = 2;
/// Room of this many octets is none.
const LITTLE: u64 = 1 << 20;
/// How often a thread that waits for another looks whether anybody waits for it.
const LOOK: Duration = Duration::from_millis(250);

/// The files of one node.
#[derive(Debug)]
pub struct Layers {
    directory: PathBuf,
    most: (u64, u64),
    making: Mutex<BTreeMap<String, String>>,
    freed: Condvar,
    /// By how many each set is being read, by key.
    read: Mutex<BTreeMap<String, u64>>,
}

/// A set that is there, and stays until this is dropped.
#[derive(Debug)]
pub struct Layer<'a> {
    /// Its file.
    pub file: File,
    /// SHA-256 that it must have, in hex.
    pub digest: String,
    path: PathBuf,
    key: String,
    layers: &'a Layers,
}

/// What a request finds.
#[derive(Debug)]
pub enum Claim<'a> {
    /// It is there.
    There(Layer<'a>),
    /// It is to be made by who asked, and by nobody else meanwhile.
    Make(Making<'a>),
}

/// A set that is being made. Dropping it leaves nothing.
#[derive(Debug)]
pub struct Making<'a> {
    layers: &'a Layers,
    key: String,
    file: File,
}

fn io_error(what: &str, error: &io::Error) -> Error {
    Error::of_io(Code::Internal, format!("{what}: {error}"), error)
}

impl Layers {
    /// At most so many files, and octets.
    pub fn new(directory: PathBuf, count: u64, bytes: u64) -> Self {
        Self {
            directory,
            most: (count, bytes),
            making: Mutex::default(),
            freed: Condvar::new(),
            read: Mutex::default(),
        }
    }

    /// Removes what a supervisor before was making, and whatever else is no set.
    pub fn sweep(&self) -> io::Result<()> {
        fs::create_dir_all(&self.directory)?;
        for entry in fs::read_dir(&self.directory)?.flatten() {
            if entry.file_name().to_str().is_none_or(|name| parse(name).is_none()) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    /// Whether the node has no room any more: less than a builder writes at once.
    pub fn is_full(&self) -> bool {
        nix::sys::statvfs::statvfs(&self.directory)
            .is_ok_and(|found| found.blocks_available().saturating_mul(found.fragment_size()) < LITTLE)
    }

    fn making(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.making.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) -> MutexGuard<'_, BTreeMap<String, u64>> {
        self.read.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A set, which stays while it is read.
    fn layer(&self, file: File, key: &str, digest: &str, path: PathBuf) -> Layer<'_> {
        *self.read().entry(key.to_string()).or_default() += 1;
        Layer { file, digest: digest.to_string(), path, key: key.to_string(), layers: self }
    }

    fn find(&self, key: &Key) -> Option<Layer<'_>> {
        let names =
            fs::read_dir(&self.directory).ok()?.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let name = names.into_iter().find(|name| parse(name).is_some_and(|(found, _)| found == key.as_str()))?;
        let path = self.directory.join(&name);
        let file = File::open(&path).ok()?;
        Some(self.layer(file, key.as_str(), parse(&name)?.1, path))
    }

    /// The set of a key, or the right to make it for an owner. Waits for whoever makes it already, as long as `goes_on`.
    pub fn claim(
        &self,
        key: &Key,
        owner: &str,
        mut goes_on: impl FnMut() -> Result<(), Error>,
    ) -> Result<Claim<'_>, Error> {
        let mut making = self.making();
        loop {
            if !making.contains_key(key.as_str()) {
                if let Some(layer) = self.find(key) {
                    // What was used last goes last.
                    let _ = layer.file.set_modified(SystemTime::now());
                    return Ok(Claim::There(layer));
                }
                let own = making.values().filter(|other| *other == owner).count();
                if making.len() < MAKING && own < MAKING_OF_OWNER {
                    let path = partial(&self.directory, key.as_str());
                    let file = fs::create_dir_all(&self.directory).and_then(|()| File::create(path));
                    let file = file.map_err(|e| io_error("packages", &e))?;
                    making.insert(key.as_str().to_string(), owner.to_string());
                    return Ok(Claim::Make(Making { layers: self, key: key.as_str().to_string(), file }));
                }
            }
            making = self.freed.wait_timeout(making, LOOK).unwrap_or_else(PoisonError::into_inner).0;
            drop(making);
            goes_on()?;
            making = self.making();
        }
    }

    /// Removes what was used longest ago, as long as there is too much; nothing that is being read.
    fn retain(&self) {
        let entries = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        let sets = entries.filter(|entry| entry.file_name().to_str().is_some_and(|name| parse(name).is_some()));
        let mut sets: Vec<(SystemTime, u64, PathBuf)> = sets
            .filter_map(|entry| entry.metadata().ok().map(|meta| (entry.path(), meta)))
            .map(|(path, meta)| (meta.modified().unwrap_or(SystemTime::UNIX_EPOCH), meta.len(), path))
            .collect();
        // Held on to, so that none begins to be read meanwhile.
        let read = self.read();
        let in_use = |path: &Path| {
            let name = path.file_name().and_then(|name| name.to_str()).and_then(parse);
            name.is_some_and(|(key, _)| read.contains_key(key))
        };
        sets.sort();
        let (mut count, mut bytes) = (sets.len() as u64, sets.iter().map(|set| set.1).sum::<u64>());
        for (_, size, path) in sets {
            if count <= self.most.0 && bytes <= self.most.1 {
                return;
            }
            if in_use(&path) {
                continue;
            }
            match fs::remove_file(&path) {
                Ok(()) => (count, bytes) = (count - 1, bytes - size),
                Err(e) => log::warn!("{}: {e}", path.display()),
            }
        }
    }
}

impl Layer<'_> {
    /// It is not what it was: the next request makes it anew.
    pub fn discard(&self) {
        let _ = fs::remove_file(&self.path);
    }
}

impl Drop for Layer<'_> {
    fn drop(&mut self) {
        let mut read = self.layers.read();
        let left = read.get_mut(&self.key).map_or(0, |count| {
            *count -= 1;
            *count
        });
        if left == 0 {
            read.remove(&self.key);
            drop(read);
            // It may have been what was too much.
            self.layers.retain();
        }
    }
}

impl<'a> Making<'a> {
    /// Where it will be.
    pub fn layers(&self) -> &'a Layers {
        self.layers
    }

    /// Its file.
    pub fn write(&mut self, octets: &[u8]) -> io::Result<()> {
        self.file.write_all(octets)
    }

    /// It is whole: it gets its name, and others go where there are too many.
    pub fn keep(self, digest: &str) -> Result<Layer<'a>, Error> {
        let directory = &self.layers.directory;
        let path = directory.join(format!("{}-{digest}.tar", self.key));
        let kept = self.file.sync_all().and_then(|()| fs::rename(partial(directory, &self.key), &path));
        let kept = kept.and_then(|()| File::open(directory)?.sync_all()).and_then(|()| File::open(&path));
        let file = kept.map_err(|e| io_error("packages", &e))?;
        let layer = self.layers.layer(file, &self.key, digest, path);
        self.layers.retain();
        Ok(layer)
    }
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        let mut making = self.layers.making();
        let _ = fs::remove_file(partial(&self.layers.directory, &self.key));
        making.remove(&self.key);
        self.layers.freed.notify_all();
    }
}

fn partial(directory: &Path, key: &str) -> PathBuf {
    directory.join(format!("{key}.partial"))
}

/// Key and digest of a file's name.
fn parse(name: &str) -> Option<(&str, &str)> {
    let (key, digest) = name.strip_suffix(".tar")?.split_once('-')?;
    let is_hex = |text: &str| text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
    (is_hex(key) && is_hex(digest)).then_some((key, digest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::sync::atomic::{AtomicUsize, Ordering};

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("warren-layers-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn names(&self) -> Vec<String> {
            let names = fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
            let mut names: Vec<String> = names.collect();
            names.sort();
            names
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn key(n: u8) -> Key {
        Key::new().then(&[&[n]])
    }

    fn make(layers: &Layers, n: u8, octets: usize) {
        let Ok(Claim::Make(mut making)) = layers.claim(&key(n), "ann", || Ok(())) else { panic!("it is there") };
        making.write(&vec![n; octets]).unwrap();
        making.keep(&"0".repeat(64)).unwrap();
    }

    #[test]
    fn two_that_ask_for_the_same_make_it_once() {
        let folder = Folder::new("once");
        let layers = Layers::new(folder.0.clone(), 10, 1 << 20);
        let made = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| match layers.claim(&key(1), "ann", || Ok(())).unwrap() {
                    Claim::Make(mut making) => {
                        made.fetch_add(1, Ordering::Relaxed);
                        making.write(b"content").unwrap();
                        making.keep(&"a".repeat(64)).unwrap();
                    }
                    Claim::There(mut layer) => {
                        let mut text = String::new();
                        layer.file.read_to_string(&mut text).unwrap();
                        assert_eq!((text.as_str(), layer.digest.as_str()), ("content", "a".repeat(64).as_str()));
                    }
                });
            }
        });
        assert_eq!(made.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn one_that_is_given_up_leaves_nothing_and_the_next_makes_it() {
        let folder = Folder::new("given-up");
        let layers = Layers::new(folder.0.clone(), 10, 1 << 20);
        let Ok(Claim::Make(mut making)) = layers.claim(&key(1), "ann", || Ok(())) else { panic!("it is there") };
        making.write(b"half").unwrap();
        let stop = || Err(Error::new(Code::Cancelled, "nobody waits"));
        assert!(layers.claim(&key(1), "ann", stop).unwrap_err().is(Code::Cancelled));
        assert_eq!(folder.names(), [format!("{}.partial", key(1).as_str())]);
        drop(making);
        assert_eq!(folder.names(), Vec::<String>::new());
        make(&layers, 1, 1);
        // One that is damaged is made anew.
        let Ok(Claim::There(layer)) = layers.claim(&key(1), "ann", || Ok(())) else { panic!("it was made") };
        layer.discard();
        assert!(matches!(layers.claim(&key(1), "ann", || Ok(())), Ok(Claim::Make(_))));
    }

    #[test]
    fn one_owners_builders_leave_room_for_those_of_others() {
        let folder = Folder::new("owners");
        let layers = Layers::new(folder.0.clone(), 10, 1 << 20);
        let stop = || Err(Error::new(Code::Cancelled, "it waits"));
        let claim = |n: u8, owner: &str| layers.claim(&key(n), owner, stop);
        let held = [claim(1, "ann"), claim(2, "ann")];
        assert!(held.iter().all(|claim| matches!(claim, Ok(Claim::Make(_)))));
        assert!(claim(3, "ann").is_err());
        let others = [claim(4, "bob"), claim(5, "cid")];
        assert!(others.iter().all(|claim| matches!(claim, Ok(Claim::Make(_)))));
        assert!(claim(6, "dan").is_err(), "four are all that there are");
        drop(held);
        assert!(matches!(claim(3, "ann"), Ok(Claim::Make(_))));
    }

    #[test]
    fn what_was_used_longest_ago_goes_where_there_is_too_much() {
        let folder = Folder::new("bounds");
        let layers = Layers::new(folder.0.clone(), 3, 1000);
        let there = |n: u8| layers.find(&key(n)).is_some();
        let age = |n: u8, s: u64| {
            let layer = layers.find(&key(n)).unwrap();
            File::options()
                .append(true)
                .open(&layer.path)
                .unwrap()
                .set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(s))
        };
        for n in 1..=3 {
            make(&layers, n, 100);
            age(n, n.into()).unwrap();
        }
        assert!(matches!(layers.claim(&key(1), "ann", || Ok(())), Ok(Claim::There(_))));
        make(&layers, 4, 100);
        assert_eq!([1, 2, 3, 4].map(there), [true, false, true, true], "count");
        for n in [1, 3, 4] {
            age(n, n.into()).unwrap();
        }
        make(&layers, 5, 900);
        assert_eq!([1, 3, 4, 5].map(there), [false, false, true, true], "octets");
    }

    #[test]
    fn what_is_read_stays_until_it_was_read() {
        let folder = Folder::new("read");
        let layers = Layers::new(folder.0.clone(), 1, 1000);
        make(&layers, 1, 100);
        let Ok(Claim::There(first)) = layers.claim(&key(1), "ann", || Ok(())) else { panic!("it was made") };
        let Ok(Claim::There(again)) = layers.claim(&key(1), "ann", || Ok(())) else { panic!("it was made") };
        make(&layers, 2, 100);
        assert!(
            layers.find(&key(1)).is_some() && layers.find(&key(2)).is_none(),
            "the other, which nobody reads, goes"
        );
        drop(first);
        assert!(layers.find(&key(1)).is_some());
        drop(again);
        make(&layers, 2, 100);
        assert!(layers.find(&key(1)).is_none() && layers.find(&key(2)).is_some());
    }

    #[test]
    fn a_start_removes_what_is_no_set() {
        let folder = Folder::new("sweep");
        let layers = Layers::new(folder.0.join("packages"), 3, 1000);
        layers.sweep().unwrap();
        make(&layers, 1, 1);
        for name in [format!("{}.partial", key(2).as_str()), "other".to_string()] {
            fs::write(layers.directory.join(name), "x").unwrap();
        }
        layers.sweep().unwrap();
        assert_eq!(fs::read_dir(&layers.directory).unwrap().count(), 1);
        assert!(layers.find(&key(1)).is_some());
    }
}
