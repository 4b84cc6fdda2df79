//! A disk that fails: every operation may, and a crash loses what was not made durable, in any combination.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use super::super::files::{Files, LogFile};

const SECTOR: usize = 512;

/// Pseudo-random numbers (xorshift64*).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// True this many times of a thousand.
    pub fn per_mille(&mut self, chance: u64) -> bool {
        self.below(1000) < chance
    }
}

/// How often what fails, of a thousand.
#[derive(Clone, Copy, Default)]
pub struct Chances {
    pub short_write: u64,
    pub write_error: u64,
    pub sync_error: u64,
    pub directory_sync_error: u64,
    pub create_error: u64,
    pub remove_error: u64,
}

#[derive(Clone)]
enum Change {
    Write(usize, Vec<u8>),
    Length(usize),
}

#[derive(Default)]
struct Inode {
    now: Vec<u8>,
    durable: Vec<u8>,
    changes: Vec<Change>,
}

enum Entry {
    Link(String, u64),
    Remove(String),
}

struct Simulated {
    random: Random,
    chances: Chances,
    capacity: usize,
    inodes: BTreeMap<u64, Inode>,
    now: BTreeMap<String, u64>,
    durable: BTreeMap<String, u64>,
    entries: Vec<Entry>,
    next: u64,
}

/// The disk. A clone is the same one.
#[derive(Clone)]
pub struct Faulty(Arc<Mutex<Simulated>>);

struct FaultyFile {
    disk: Faulty,
    inode: u64,
}

fn apply(data: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Write(offset, octets) => {
            let end = offset + octets.len();
            if data.len() < end {
                data.resize(end, 0);
            }
            data[*offset..end].copy_from_slice(octets);
        }
        Change::Length(len) => data.resize(*len, 0),
    }
}

fn link(names: &mut BTreeMap<String, u64>, entry: &Entry) {
    match entry {
        Entry::Link(name, inode) => {
            names.insert(name.clone(), *inode);
        }
        Entry::Remove(name) => {
            names.remove(name);
        }
    }
}

impl Simulated {
    /// Makes some of the changes durable: all of it, nothing, or some of its sectors.
    fn write_back_some(&mut self, inode: u64) {
        let Some(file) = self.inodes.get_mut(&inode) else { return };
        for change in file.changes.drain(..) {
            match (&change, self.random.below(3)) {
                (_, 0) => {}
                (Change::Write(offset, octets), 1) => {
                    let mut from = 0;
                    while from < octets.len() {
                        let end = ((offset + from) / SECTOR * SECTOR + SECTOR - offset).min(octets.len());
                        if self.random.per_mille(500) {
                            apply(&mut file.durable, &Change::Write(offset + from, octets[from..end].to_vec()));
                        }
                        from = end;
                    }
                }
                _ => apply(&mut file.durable, &change),
            }
        }
    }
}

impl Faulty {
    pub fn new(seed: u64, capacity: usize) -> Self {
        Self(Arc::new(Mutex::new(Simulated {
            random: Random(seed | 1),
            chances: Chances::default(),
            capacity,
            inodes: BTreeMap::new(),
            now: BTreeMap::new(),
            durable: BTreeMap::new(),
            entries: Vec::new(),
            next: 1,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Simulated> {
        self.0.lock().unwrap()
    }

    pub fn set(&self, chances: Chances) {
        self.lock().chances = chances;
    }

    pub fn set_capacity(&self, capacity: usize) {
        self.lock().capacity = capacity;
    }

    /// The power fails and comes back.
    pub fn crash(&self) {
        let disk = &mut *self.lock();
        for inode in disk.inodes.keys().copied().collect::<Vec<_>>() {
            disk.write_back_some(inode);
        }
        for entry in std::mem::take(&mut disk.entries) {
            if disk.random.per_mille(500) {
                link(&mut disk.durable, &entry);
            }
        }
        disk.now = disk.durable.clone();
        for file in disk.inodes.values_mut() {
            file.now = file.durable.clone();
        }
    }
}

fn fails(disk: &mut Simulated, chance: u64) -> io::Result<()> {
    if disk.random.per_mille(chance) { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
}

impl Files for Faulty {
    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.lock().now.keys().cloned().collect())
    }

    fn create(&self, name: &str, size: u64) -> io::Result<Arc<dyn LogFile>> {
        let disk = &mut *self.lock();
        let chance = disk.chances.create_error;
        fails(disk, chance)?;
        if disk.now.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let used: usize = disk.now.values().map(|inode| disk.inodes[inode].now.len()).sum();
        if used + size as usize > disk.capacity {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        let inode = disk.next;
        disk.next += 1;
        let changes = vec![Change::Length(size as usize)];
        disk.inodes.insert(inode, Inode { now: vec![0; size as usize], durable: Vec::new(), changes });
        let entry = Entry::Link(name.to_string(), inode);
        link(&mut disk.now, &entry);
        disk.entries.push(entry);
        Ok(Arc::new(FaultyFile { disk: self.clone(), inode }))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn LogFile>> {
        let inode = *self.lock().now.get(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(FaultyFile { disk: self.clone(), inode }))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let disk = &mut *self.lock();
        if !disk.now.contains_key(name) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let chance = disk.chances.remove_error;
        fails(disk, chance)?;
        let entry = Entry::Remove(name.to_string());
        link(&mut disk.now, &entry);
        disk.entries.push(entry);
        Ok(())
    }

    fn sync_directory(&self) -> io::Result<()> {
        let disk = &mut *self.lock();
        let chance = disk.chances.directory_sync_error;
        fails(disk, chance)?;
        disk.entries.clear();
        disk.durable = disk.now.clone();
        Ok(())
    }

    fn free(&self) -> io::Result<u64> {
        let disk = self.lock();
        let used: usize = disk.now.values().map(|inode| disk.inodes[inode].now.len()).sum();
        Ok(disk.capacity.saturating_sub(used) as u64)
    }
}

impl FaultyFile {
    fn change(&self, disk: &mut Simulated, change: Change) {
        let file = disk.inodes.get_mut(&self.inode).unwrap();
        apply(&mut file.now, &change);
        file.changes.push(change);
    }
}

impl LogFile for FaultyFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let disk = self.disk.lock();
        let there = disk.inodes[&self.inode].now.get(offset as usize..).unwrap_or_default();
        let count = there.len().min(buffer.len());
        buffer[..count].copy_from_slice(&there[..count]);
        Ok(count)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<usize> {
        let disk = &mut *self.disk.lock();
        let chances = disk.chances;
        fails(disk, chances.write_error)?;
        let short = disk.random.per_mille(chances.short_write) && data.len() > 1;
        let count = if short { 1 + disk.random.below(data.len() as u64 - 1) as usize } else { data.len() };
        self.change(disk, Change::Write(offset as usize, data[..count].to_vec()));
        Ok(count)
    }

    fn sync(&self) -> io::Result<()> {
        let disk = &mut *self.disk.lock();
        let chance = disk.chances.sync_error;
        if fails(disk, chance).is_err() {
            // The kernel calls the pages clean all the same; what did not get to the disk never will.
            disk.write_back_some(self.inode);
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let file = disk.inodes.get_mut(&self.inode).unwrap();
        for change in std::mem::take(&mut file.changes) {
            apply(&mut file.durable, &change);
        }
        Ok(())
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.disk.lock().inodes[&self.inode].now.len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let disk = &mut *self.disk.lock();
        let chance = disk.chances.write_error;
        fails(disk, chance)?;
        self.change(disk, Change::Length(len as usize));
        Ok(())
    }
}
