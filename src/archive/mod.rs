//! Tar archives, as container images and root file systems come in: POSIX ustar with the extended headers of pax, and GNU's
//! long names. Everything in an archive is hostile: lengths are checked before use, and nothing is held but one entry's
//! header.
//!
//! Format: POSIX.1-2024, pax, "Extended Description"; GNU tar's manual, "Basic Tar Format".

mod header;

use std::fmt;
use std::io::{self, Read};

pub use header::{BLOCK, Kind, write_entry};
use header::{Raw, pax_records};

/// Longest path, in octets; the kernel takes no longer one.
pub const MAX_PATH: u64 = 4096;
/// Largest file, in octets: as large as the kernel takes any to be.
const MAX_SIZE: u64 = i64::MAX as u64;
/// Longest extended header, in octets, all together that an entry has: they carry paths and extended attributes.
pub const MAX_EXTENDED: u64 = 1024 * 1024;

/// One file of an archive.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Entry {
    /// As it is written: it may be absolute, or leave the archive's root. Not empty.
    pub path: Vec<u8>,
    /// Target of a link.
    pub link: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permissions, setuid, setgid and sticky bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Octets of content.
    pub size: u64,
    /// Seconds since 1970.
    pub mtime: i64,
    /// Extended attributes: name and value.
    pub attributes: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Why an archive cannot be read.
#[derive(Debug)]
pub enum ArchiveError {
    /// It ends within an entry.
    Truncated {
        /// Octet at which it ends.
        at: u64,
    },
    /// No header of a tar archive.
    NotAHeader {
        /// Octet at which it stands.
        at: u64,
        /// What is wrong with it.
        what: &'static str,
    },
    /// Something is longer than is taken.
    TooLong {
        /// Octet at which its header stands.
        at: u64,
        /// What it is.
        what: &'static str,
        /// Its length, in octets.
        found: u64,
        /// The limit.
        max: u64,
    },
    /// An entry of a kind that is not understood.
    Unknown {
        /// Octet at which its header stands.
        at: u64,
        /// The octet that says its kind.
        kind: u8,
    },
    /// Reading failed.
    Io(io::Error),
}

impl fmt::Display for ArchiveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Truncated { at } => write!(f, "the archive ends within an entry, at octet {at}"),
            Self::NotAHeader { at, what } => write!(f, "no tar header at octet {at}: {what}"),
            Self::TooLong { at, what, found, max } => {
                write!(f, "{what} of {found} octets at octet {at} is over the limit of {max}")
            }
            Self::Unknown { at, kind } => {
                write!(f, "the entry at octet {at} is of kind {:?}, which is not known", char::from(*kind))
            }
            Self::Io(e) => e.fmt(f),
        }
    }
}

impl std::error::Error for ArchiveError {}

impl From<io::Error> for ArchiveError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// An archive that is read from its begin to its end, entry by entry. `Read` gives the content of the last entry.
#[derive(Debug)]
pub struct Archive<R> {
    from: R,
    /// Octets read so far.
    at: u64,
    /// Octets of the last entry's content that were not read.
    left: u64,
    /// Octets behind that up to the next header.
    padding: u64,
}

/// What extended headers say of the entry that follows.
#[derive(Debug, Default)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    uid: Option<u64>,
    gid: Option<u64>,
    size: Option<u64>,
    mtime: Option<i64>,
    attributes: Vec<(Vec<u8>, Vec<u8>)>,
    sparse: bool,
}

impl<R: Read> Archive<R> {
    /// An archive that begins here.
    pub fn new(from: R) -> Self {
        Self { from, at: 0, left: 0, padding: 0 }
    }

    /// Octets read so far: behind `next`, where the content of its entry begins.
    pub fn position(&self) -> u64 {
        self.at
    }

    /// What is read from.
    pub fn into_inner(self) -> R {
        self.from
    }

    /// The next entry; `None` at the archive's end. What was not read of the last one's content is skipped.
    ///
    /// # Errors
    /// After an error nothing more can be read.
    #[allow(clippy::should_implement_trait)] // it fails, and lends nothing: no iterator
    pub fn next(&mut self) -> Result<Option<Entry>, ArchiveError> {
        let (mut extended, mut held) = (Extended::default(), 0);
        loop {
            let more = self.skip()?;
            let at = self.at;
            let Some(raw) = (if more { self.header()? } else { None }) else {
                // An extended header is of an entry that follows.
                return if held == 0 { Ok(None) } else { Err(ArchiveError::Truncated { at }) };
            };
            let bad = |what| ArchiveError::NotAHeader { at, what };
            let size = raw.number(Raw::SIZE).filter(|size| *size <= MAX_SIZE).ok_or(bad("its size is no number"))?;
            if matches!(raw.kind(), b'x' | b'L' | b'K') {
                // What is kept of them goes with the entry, and is not to grow without end before there is one.
                held = size.saturating_add(held);
                if held > MAX_EXTENDED {
                    let what = if held == size { "an extended header" } else { "extended headers of one entry" };
                    return Err(ArchiveError::TooLong { at, what, found: held, max: MAX_EXTENDED });
                }
            }
            match raw.kind() {
                b'x' => {
                    let text = self.extension(at, size)?;
                    let records = pax_records(&text).and_then(|records| extended.take(records));
                    records.ok_or(bad("its records are not of the form of pax"))?;
                }
                // For all entries that follow. Nobody puts anything there that matters here.
                b'g' => drop(self.extension(at, size)?),
                b'L' => extended.path = Some(without_nul(self.extension(at, size)?)),
                b'K' => extended.link = Some(without_nul(self.extension(at, size)?)),
                kind => return self.entry(at, &raw, kind, size, extended).map(Some),
            }
        }
    }

    fn entry(&mut self, at: u64, raw: &Raw, kind: u8, size: u64, extended: Extended) -> Result<Entry, ArchiveError> {
        let bad = |what| ArchiveError::NotAHeader { at, what };
        if extended.sparse {
            return Err(ArchiveError::Unknown { at, kind: b'S' });
        }
        let path = extended.path.unwrap_or_else(|| raw.path());
        let kind = match Kind::of(kind).ok_or(ArchiveError::Unknown { at, kind })? {
            // Before POSIX a directory was a file whose name ends so.
            Kind::File if path.ends_with(b"/") => Kind::Directory,
            kind => kind,
        };
        let size = if kind == Kind::File { extended.size.unwrap_or(size) } else { 0 };
        // The kernel has no owner of the highest number: it means that nothing is to change.
        let narrow = |wide: Option<u64>, what| {
            wide.and_then(|id| u32::try_from(id).ok()).filter(|id| *id != u32::MAX).ok_or(bad(what))
        };
        let entry = Entry {
            link: extended.link.unwrap_or_else(|| raw.link()),
            kind,
            mode: narrow(raw.number(Raw::MODE), "its mode is no number")? & 0o7777,
            uid: narrow(extended.uid.or_else(|| raw.number(Raw::UID)), "its owner is no number of 32 bits")?,
            gid: narrow(extended.gid.or_else(|| raw.number(Raw::GID)), "its group is no number of 32 bits")?,
            size,
            mtime: extended.mtime.or_else(|| i64::try_from(raw.number(Raw::MTIME)?).ok()).unwrap_or(0),
            attributes: extended.attributes,
            path,
        };
        for (what, text) in [("a path", &entry.path), ("the target of a link", &entry.link)] {
            if text.len() as u64 > MAX_PATH {
                return Err(ArchiveError::TooLong { at, what, found: text.len() as u64, max: MAX_PATH });
            }
            if text.contains(&0) {
                return Err(bad("a name has an octet that is 0"));
            }
        }
        if entry.path.is_empty() {
            return Err(bad("its path is empty"));
        }
        (self.left, self.padding) = (size, size.wrapping_neg() % BLOCK as u64);
        Ok(entry)
    }

    /// A block that is a header; `None` at the end, which is a block of zeroes or that of what is read from.
    fn header(&mut self) -> Result<Option<Raw>, ArchiveError> {
        let (at, mut block) = (self.at, [0; BLOCK]);
        let got = self.fill(&mut block)?;
        if got == 0 || got == BLOCK && block.iter().all(|&octet| octet == 0) {
            return Ok(None);
        }
        if got < BLOCK {
            return Err(ArchiveError::Truncated { at: self.at });
        }
        let raw = Raw(block);
        if raw.sums() {
            return Ok(Some(raw));
        }
        Err(ArchiveError::NotAHeader { at, what: "its checksum is wrong" })
    }

    /// The content of an extended header.
    fn extension(&mut self, at: u64, size: u64) -> Result<Vec<u8>, ArchiveError> {
        if size > MAX_EXTENDED {
            return Err(ArchiveError::TooLong { at, what: "an extended header", found: size, max: MAX_EXTENDED });
        }
        // Not more than 1 MiB, as was checked.
        let mut text = vec![0; usize::try_from(size).unwrap_or(0)];
        (self.left, self.padding) = (0, size.wrapping_neg() % BLOCK as u64);
        if self.fill(&mut text)? < text.len() {
            return Err(ArchiveError::Truncated { at: self.at });
        }
        Ok(text)
    }

    /// Goes to the next header. `false` where all ends behind a whole content: some builders (umoci's insert) fill the last
    /// block of an archive not up.
    fn skip(&mut self) -> Result<bool, ArchiveError> {
        let mut left = std::mem::take(&mut self.left);
        let mut octets = [0; 16 * 1024];
        while left > 0 {
            let step = octets.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            if self.fill(&mut octets[..step])? < step {
                return Err(ArchiveError::Truncated { at: self.at });
            }
            left -= step as u64;
        }
        let padding = usize::try_from(std::mem::take(&mut self.padding)).unwrap_or(0).min(BLOCK);
        Ok(self.fill(&mut octets[..padding])? == padding)
    }

    /// Reads until `into` is full or there is no more; how much.
    fn fill(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let mut got = 0;
        while got < into.len() {
            match self.from.read(&mut into[got..]) {
                Ok(0) => break,
                Ok(n) => got += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        self.at += got as u64;
        Ok(got)
    }
}

impl<R: Read> Read for Archive<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let most = into.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if most == 0 {
            return Ok(0);
        }
        let got = self.from.read(&mut into[..most])?;
        if got == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                ArchiveError::Truncated { at: self.at }.to_string(),
            ));
        }
        (self.at, self.left) = (self.at + got as u64, self.left - got as u64);
        Ok(got)
    }
}

impl Extended {
    /// Takes records; `None` where one has a number that is none. An empty value takes back what was said before.
    fn take(&mut self, records: Vec<(&[u8], &[u8])>) -> Option<()> {
        fn number<N: std::str::FromStr>(value: &[u8]) -> Option<Option<N>> {
            if value.is_empty() {
                return Some(None);
            }
            std::str::from_utf8(value).ok()?.parse().ok().map(Some)
        }
        let text = |value: &[u8]| (!value.is_empty()).then(|| value.to_vec());
        for (key, value) in records {
            match key {
                b"path" => self.path = text(value),
                b"linkpath" => self.link = text(value),
                b"uid" => self.uid = number(value)?,
                b"gid" => self.gid = number(value)?,
                b"size" => {
                    let size = number(value)?;
                    if size.is_some_and(|size| size > MAX_SIZE) {
                        return None;
                    }
                    self.size = size;
                }
                // Parts of seconds are left out.
                b"mtime" => self.mtime = number(value.split(|&octet| octet == b'.').next()?)?,
                _ if key.starts_with(b"GNU.sparse.") => self.sparse = true,
                _ => {
                    if let Some(name) = key.strip_prefix(b"SCHILY.xattr.".as_slice()) {
                        self.attributes.push((name.to_vec(), value.to_vec()));
                    }
                }
            }
        }
        Some(())
    }
}

fn without_nul(mut text: Vec<u8>) -> Vec<u8> {
    let end = text.iter().position(|&octet| octet == 0).unwrap_or(text.len());
    text.truncate(end);
    text
}

/// An archive of these entries, each with its content, in memory.
pub fn pack(entries: &[(Entry, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (entry, content) in entries {
        out.extend(write_entry(&Entry { size: content.len() as u64, ..entry.clone() }));
        out.extend_from_slice(content);
        out.resize(out.len().next_multiple_of(BLOCK), 0);
    }
    out.resize(out.len() + 2 * BLOCK, 0);
    out
}

#[cfg(test)]
mod tests;
