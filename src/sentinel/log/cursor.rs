//! How far each destination has come. A cursor is kept in two files, written in turn and in place: whichever way the newer
//! one is lost or torn, the older one holds, and a lost or old cursor only means that something is sent twice. Writing
//! over what is there needs no room and no entry in the file system's journal: it happens once a second.

use std::io;

use super::crc32c::crc32c;
use super::files::{Files, read_full, write_full};

const MAGIC: &[u8; 8] = b"WSENTCUR";
const SIZE: usize = 36;

/// A destination's position in a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor {
    /// The log that `sequence` counts in.
    pub log: u64,
    /// Counts the writings; the higher of two is the newer.
    pub generation: u64,
    /// Every sample before this one was acknowledged.
    pub sequence: u64,
}

fn encode(cursor: &Cursor) -> [u8; SIZE] {
    let mut out = [0; SIZE];
    out[..8].copy_from_slice(MAGIC);
    out[8..16].copy_from_slice(&cursor.log.to_le_bytes());
    out[16..24].copy_from_slice(&cursor.generation.to_le_bytes());
    out[24..32].copy_from_slice(&cursor.sequence.to_le_bytes());
    let crc = crc32c(&[&out[..32]]);
    out[32..].copy_from_slice(&crc.to_le_bytes());
    out
}

/// Nothing when it is damaged.
pub fn decode(raw: &[u8]) -> Option<Cursor> {
    let raw: &[u8; SIZE] = raw.try_into().ok()?;
    if &raw[..8] != MAGIC || raw[32..] != crc32c(&[&raw[..32]]).to_le_bytes() {
        return None;
    }
    let number = |at: usize| raw[at..at + 8].iter().rev().fold(0, |value, &octet| value << 8 | u64::from(octet));
    Some(Cursor { log: number(8), generation: number(16), sequence: number(24) })
}

fn file_name(destination: &str, slot: u64) -> String {
    format!("{destination}.{slot}.cursor")
}

/// The destination whose cursor a file of this name holds.
pub fn destination(file: &str) -> Option<&str> {
    let name = file.strip_suffix(".cursor")?;
    name.strip_suffix(".0").or_else(|| name.strip_suffix(".1"))
}

/// The newer of a destination's two cursors that belong to `log`; `any` takes one of whatever log.
pub fn load(files: &dyn Files, destination: &str, log: Option<u64>) -> io::Result<Option<Cursor>> {
    let mut newest: Option<Cursor> = None;
    for slot in 0..2 {
        let file = match files.open(&file_name(destination, slot)) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(e),
        };
        let mut raw = [0; SIZE + 1];
        let len = read_full(&*file, &mut raw, 0)?;
        let found = decode(&raw[..len]).filter(|cursor| log.is_none_or(|log| log == cursor.log));
        newest = newest.into_iter().chain(found).max_by_key(|cursor| cursor.generation);
    }
    Ok(newest)
}

/// Makes a cursor durable in the file of its turn. An error leaves the other file, so the one before, as it was.
pub fn save(files: &dyn Files, destination: &str, cursor: &Cursor) -> io::Result<()> {
    let name = file_name(destination, cursor.generation % 2);
    let (file, new) = match files.open(&name) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => (files.create(&name, 0)?, true),
        opened => (opened?, false),
    };
    write_full(&*file, &encode(cursor), 0)?;
    // Only what damaged it can have made it longer.
    if file.length()? != SIZE as u64 {
        file.set_len(SIZE as u64)?;
    }
    file.sync()?;
    if new { files.sync_directory() } else { Ok(()) }
}

/// Forgets a destination.
pub fn forget(files: &dyn Files, destination: &str) -> io::Result<()> {
    for slot in 0..2 {
        match files.remove(&file_name(destination, slot)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    files.sync_directory()
}

#[cfg(test)]
mod tests {
    use super::super::files::Memory;
    use super::*;

    #[test]
    fn the_newer_cursor_counts_and_a_damaged_one_falls_back_to_the_older() {
        let files = Memory::default();
        let cursor = |generation| Cursor { log: 5, generation, sequence: generation * 100 };
        for generation in 1..=4 {
            save(&files, "prom", &cursor(generation)).unwrap();
            assert_eq!(load(&files, "prom", Some(5)).unwrap(), Some(cursor(generation)));
        }
        assert_eq!(load(&files, "prom", Some(6)).unwrap(), None);
        files.open("prom.0.cursor").unwrap().write_at(&[1], 30).unwrap();
        assert_eq!(load(&files, "prom", Some(5)).unwrap(), Some(cursor(3)));
        files.open("prom.1.cursor").unwrap().set_len(0).unwrap();
        assert_eq!(load(&files, "prom", Some(5)).unwrap(), None);
        // Whatever is there is written over.
        files.open("prom.1.cursor").unwrap().set_len(1000).unwrap();
        save(&files, "prom", &cursor(5)).unwrap();
        assert_eq!(load(&files, "prom", Some(5)).unwrap(), Some(cursor(5)));
        forget(&files, "prom").unwrap();
        assert!(files.list().unwrap().is_empty());
    }
}
