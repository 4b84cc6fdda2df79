//! The log of what a machine wrote to a disk, and the disk as a power cut at any instant would have left it.
//!
//! QEMU's blklogwrites driver writes the log, in the form of the kernel's dm-log-writes
//! (Documentation/admin-guide/device-mapper/log-writes.rst; QEMU's block/blklogwrites.c): a superblock, then an entry's
//! header in a sector of its own and its data behind it. Numbers are little endian, 64 bits where not said.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::files::{Disk, TempDir};

/// What the superblock begins with.
const MAGIC: u64 = 0x006a_7366_7773_6872;
/// Everything before it is on the medium.
const FLUSH: u64 = 1;
/// It is on the medium itself when it is done.
const FUA: u64 = 2;
/// Its octets are of no use any more.
const DISCARD: u64 = 4;
/// Octets that are moved at once.
const PIECE: usize = 1 << 20;

/// One write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    /// Where on the disk, in octets.
    to: u64,
    length: u64,
    flags: u64,
    /// Where in the log its data is.
    from: u64,
}

/// A log that is read.
#[derive(Debug)]
pub struct Writes {
    log: File,
    entries: Vec<Entry>,
}

/// A number that is not there is an error, as everything that does not fit.
fn bad(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("the log of writes: {what}"))
}

impl Writes {
    /// Reads a log up to its last whole entry.
    pub fn open(path: &Path) -> io::Result<Self> {
        let log = File::open(path)?;
        let end = log.metadata()?.len();
        let number = |at: u64| -> io::Result<u64> {
            let mut octets = [0; 8];
            log.read_exact_at(&mut octets, at)?;
            Ok(u64::from_le_bytes(octets))
        };
        if number(0)? != MAGIC || number(8)? != 1 {
            return Err(bad("not of this form"));
        }
        let sector = number(24)? & 0xffff_ffff;
        if !(512..=65_536).contains(&sector) {
            return Err(bad("sectors of no known size"));
        }
        let (mut entries, mut at) = (Vec::new(), sector);
        // The count in the superblock is that of the last flush: what came after it is read as far as it is there.
        while at.saturating_add(sector) <= end {
            let [to, sectors, flags] = [number(at)?, number(at + 8)?, number(at + 16)?];
            let (Some(to), Some(length)) = (to.checked_mul(sector), sectors.checked_mul(sector)) else { break };
            let from = at + sector;
            let data = if flags & DISCARD == 0 { length } else { 0 };
            if from.saturating_add(data) > end || (length == 0 && flags & FLUSH == 0) {
                break;
            }
            entries.push(Entry { to, length, flags, from });
            at = from + data;
        }
        Ok(Self { log, entries })
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// How many entries lie within the first `octets` of the log.
    pub fn within(&self, octets: u64) -> usize {
        self.entries.iter().take_while(|entry| entry.from <= octets).count()
    }

    fn apply(&self, entry: &Entry, disk: &File) -> io::Result<()> {
        if entry.flags & DISCARD != 0 {
            return Ok(()); // what a discarded block reads as is the medium's choice
        }
        let mut piece = vec![0; PIECE];
        let mut done = 0;
        while done < entry.length {
            let length = usize::try_from(entry.length - done).map_or(PIECE, |left| left.min(PIECE));
            self.log.read_exact_at(&mut piece[..length], entry.from + done)?;
            disk.write_all_at(&piece[..length], entry.to + done)?;
            done += length as u64;
        }
        Ok(())
    }
}

/// A disk that goes through a log, with power cuts on the way.
#[derive(Debug)]
pub struct Replay<'a> {
    writes: &'a Writes,
    /// What was on the medium for sure when the last entry was done that it has.
    flushed: Disk,
    /// Entries that are in it.
    done: usize,
}

impl<'a> Replay<'a> {
    /// Begins with the disk as it was before the first write.
    pub fn new(writes: &'a Writes, image: &Path, octets: u64) -> io::Result<Self> {
        Ok(Self { writes, flushed: Disk::copy_of(image, octets)?, done: 0 })
    }

    /// The disk after a power cut once `count` entries were written: what was flushed by then, and of what was not, those
    /// writes that `survives` says yes to. Counts must not go down from call to call.
    pub fn cut(&mut self, count: usize, mut survives: impl FnMut() -> bool) -> io::Result<Disk> {
        let entries = &self.writes.entries[..count.min(self.writes.entries.len())];
        let flush = entries.iter().rposition(|entry| entry.flags & FLUSH != 0).map_or(0, |at| at + 1);
        let medium = File::options().write(true).open(self.flushed.path())?;
        for entry in entries.get(self.done..flush).unwrap_or_default() {
            self.writes.apply(entry, &medium)?;
        }
        self.done = self.done.max(flush);
        let disk = Disk::empty()?;
        copy(&self.flushed.path(), &disk.path())?;
        let file = File::options().write(true).open(disk.path())?;
        for entry in &entries[flush..] {
            if entry.flags & FUA != 0 || survives() {
                self.writes.apply(entry, &file)?;
            }
        }
        Ok(disk)
    }
}

/// Copies a file with its holes.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let status = Command::new("cp").args(["--sparse=always", "--reflink=auto"]).arg(from).arg(to).status()?;
    if status.success() { Ok(()) } else { Err(io::Error::other(format!("cp ended with {status}"))) }
}

fn run(program: &str, arguments: &[&str], disk: &Path) -> io::Result<(i32, String)> {
    let output =
        Command::new(program).args(arguments).arg(disk).env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin").output()?;
    let text = [output.stdout, output.stderr].concat();
    Ok((output.status.code().unwrap_or(-1), String::from_utf8_lossy(&text).into_owned()))
}

/// Replays the journal of a copy of the file system and checks it, as a mount and the tidying up after it would: orphans
/// and counters are put right, and nothing else may be left to repair. Gives the copy.
///
/// # Panics
/// When something is.
pub fn check_file_system(disk: &Disk) -> Disk {
    let mounted = Disk::empty().expect("a temporary directory can be made");
    copy(&disk.path(), &mounted.path()).expect("a disk can be copied");
    let (code, said) = run("e2fsck", &["-y", "-E", "journal_only"], &mounted.path()).expect("e2fsck is there");
    assert!(code <= 1, "the journal cannot be replayed ({code}): {said}");
    let (code, said) = run("e2fsck", &["-f", "-p"], &mounted.path()).expect("e2fsck is there");
    assert!(code <= 1, "the file system cannot be put right by itself ({code}): {said}");
    let (code, said) = run("e2fsck", &["-f", "-n"], &mounted.path()).expect("e2fsck is there");
    assert_eq!(code, 0, "the file system is damaged: {said}");
    mounted
}

/// Takes a file out of a file system, whose journal has been replayed; `None` where there is none of that name.
pub fn file_of(disk: &Disk, name: &str, into: &TempDir) -> Option<PathBuf> {
    let to = into.path().join(name.rsplit('/').next().unwrap_or(name));
    let _ = fs::remove_file(&to);
    let command = format!("dump {name} {}", to.display());
    run("debugfs", &["-R", &command], &disk.path()).expect("debugfs is there");
    fs::metadata(&to).is_ok_and(|meta| meta.len() > 0).then_some(to)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(entries: &[(u64, u64, &[u8])]) -> Vec<u8> {
        let mut octets = [MAGIC, 1, 0, 512].map(u64::to_le_bytes).concat();
        octets.resize(512, 0);
        for (to, flags, data) in entries {
            let begin = octets.len();
            octets.extend([*to, (data.len() / 512) as u64, *flags, data.len() as u64].map(u64::to_le_bytes).concat());
            octets.resize(begin + 512, 0);
            octets.extend(*data);
        }
        octets
    }

    #[test]
    fn what_was_flushed_is_there_and_what_was_not_may_be() {
        let dir = TempDir::new().unwrap();
        let (path, image) = (dir.path().join("log"), dir.path().join("image"));
        let (a, b, c) = ([1; 512], [2; 512], [3; 1024]);
        let mut octets = log(&[(0, 0, &a), (0, FLUSH, &[]), (1, 0, &b), (0, FUA, &c), (3, 0, &a)]);
        octets.truncate(octets.len() - 1);
        fs::write(&path, octets).unwrap();
        fs::write(&image, [0; 2048]).unwrap();
        let writes = Writes::open(&path).unwrap();
        assert_eq!(writes.len(), 4, "an entry that is cut is none");
        let mut replay = Replay::new(&writes, &image, 0).unwrap();
        let mut firsts = |count, survives: bool| {
            let disk = fs::read(replay.cut(count, || survives).unwrap().path()).unwrap();
            [disk[0], disk[512], disk[1024]]
        };
        assert_eq!(firsts(0, true), [0, 0, 0]);
        assert_eq!(firsts(1, false), [0, 0, 0]);
        assert_eq!(firsts(1, true), [1, 0, 0]);
        assert_eq!(firsts(2, false), [1, 0, 0]);
        assert_eq!(firsts(3, false), [1, 0, 0]);
        assert_eq!(firsts(3, true), [1, 2, 0]);
        assert_eq!(firsts(4, false), [3, 3, 0]);
        fs::write(&path, [0; 512]).unwrap();
        assert!(Writes::open(&path).is_err());
    }
}
