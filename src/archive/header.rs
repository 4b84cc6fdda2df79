//! One block of 512 octets that says what follows, and how one is made.

use std::ops::Range;

/// Headers are as long, and contents are filled up to multiples of it.
pub const BLOCK: usize = 512;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kind {
    /// A regular file.
    #[default]
    File,
    /// Another name of a file that came before.
    HardLink,
    /// A symbolic link.
    SymbolicLink,
    /// A character device.
    Character,
    /// A block device.
    Block,
    /// A directory.
    Directory,
    /// A named pipe.
    Pipe,
}

impl Kind {
    /// The kind that the octet of a header says.
    pub(super) fn of(octet: u8) -> Option<Self> {
        match octet {
            0 | b'0' | b'7' => Some(Self::File),
            b'1' => Some(Self::HardLink),
            b'2' => Some(Self::SymbolicLink),
            b'3' => Some(Self::Character),
            b'4' => Some(Self::Block),
            b'5' => Some(Self::Directory),
            b'6' => Some(Self::Pipe),
            _ => None,
        }
    }

    fn octet(self) -> u8 {
        match self {
            Self::File => b'0',
            Self::HardLink => b'1',
            Self::SymbolicLink => b'2',
            Self::Character => b'3',
            Self::Block => b'4',
            Self::Directory => b'5',
            Self::Pipe => b'6',
        }
    }
}

/// A header as it is read.
#[derive(Debug)]
pub(super) struct Raw(pub [u8; BLOCK]);

impl Raw {
    const NAME: Range<usize> = 0..100;
    pub const MODE: Range<usize> = 100..108;
    pub const UID: Range<usize> = 108..116;
    pub const GID: Range<usize> = 116..124;
    pub const SIZE: Range<usize> = 124..136;
    pub const MTIME: Range<usize> = 136..148;
    const SUM: Range<usize> = 148..156;
    const KIND: usize = 156;
    const LINK: Range<usize> = 157..257;
    const MAGIC: Range<usize> = 257..263;
    const PREFIX: Range<usize> = 345..500;

    /// Whether the octets sum up to what stands in them, with spaces in place of the sum.
    pub fn sums(&self) -> bool {
        let sum: u64 = self.0.iter().map(|&octet| u64::from(octet)).sum();
        let own: u64 = self.0[Self::SUM].iter().map(|&octet| u64::from(octet)).sum();
        self.number(Self::SUM) == Some(sum - own + 8 * u64::from(b' '))
    }

    pub fn kind(&self) -> u8 {
        self.0[Self::KIND]
    }

    /// A number: octal digits, or from the first bit on in base 256. `None` where it is none.
    pub fn number(&self, field: Range<usize>) -> Option<u64> {
        let field = &self.0[field];
        if field[0] & 0x80 != 0 {
            let (first, rest) = (u64::from(field[0] & 0x7f), &field[1..]);
            return rest.iter().try_fold(first, |sum, &octet| sum.checked_mul(256)?.checked_add(u64::from(octet)));
        }
        let digits = field.iter().skip_while(|&&octet| octet == b' ');
        let digits = digits.take_while(|&&octet| octet != 0 && octet != b' ');
        digits.copied().try_fold(0u64, |sum, octet| match octet {
            b'0'..=b'7' => sum.checked_mul(8)?.checked_add(u64::from(octet - b'0')),
            _ => None,
        })
    }

    fn text(&self, field: Range<usize>) -> &[u8] {
        let field = &self.0[field];
        &field[..field.iter().position(|&octet| octet == 0).unwrap_or(field.len())]
    }

    pub fn path(&self) -> Vec<u8> {
        // GNU's magic has other fields where POSIX has the prefix.
        let prefix = if self.0[Self::MAGIC] == *b"ustar\0" { self.text(Self::PREFIX) } else { &[] };
        match prefix {
            [] => self.text(Self::NAME).to_vec(),
            _ => [prefix, b"/", self.text(Self::NAME)].concat(),
        }
    }

    pub fn link(&self) -> Vec<u8> {
        self.text(Self::LINK).to_vec()
    }
}

/// The records of an extended header, each `LENGTH KEY=VALUE\n`. `None` where they are not of that form.
pub(super) fn pax_records(mut text: &[u8]) -> Option<Vec<(&[u8], &[u8])>> {
    let mut records = Vec::new();
    while !text.is_empty() {
        let space = text.iter().take(8).position(|&octet| octet == b' ')?;
        let length: usize = std::str::from_utf8(&text[..space]).ok()?.parse().ok()?;
        let record = text.get(space + 1..length)?.strip_suffix(b"\n")?;
        let equals = record.iter().position(|&octet| octet == b'=')?;
        records.push((&record[..equals], &record[equals + 1..]));
        text = &text[length..];
    }
    Some(records)
}

/// The header, or headers, of an entry that is written. Numbers that do not fit their fields, long names and extended
/// attributes go into an extended header.
pub fn write_entry(entry: &super::Entry) -> Vec<u8> {
    let mut records = Vec::new();
    let mut record = |key: &str, value: &[u8]| {
        let body = key.len() + value.len() + 3;
        // Its length counts its own digits.
        let length = (1..).map(|digits| body + digits).find(|length| length.to_string().len() + body == *length);
        records.extend_from_slice(length.unwrap_or(body).to_string().as_bytes());
        records.extend_from_slice(&[b" ", key.as_bytes(), b"=", value, b"\n"].concat());
    };
    if entry.path.len() > Raw::NAME.len() {
        record("path", &entry.path);
    }
    if entry.link.len() > Raw::LINK.len() {
        record("linkpath", &entry.link);
    }
    for (key, value, most) in [
        ("uid", u64::from(entry.uid), 0o7_777_777),
        ("gid", u64::from(entry.gid), 0o7_777_777),
        ("size", entry.size, 0o77_777_777_777),
    ] {
        if value > most {
            record(key, value.to_string().as_bytes());
        }
    }
    for (name, value) in &entry.attributes {
        record(&format!("SCHILY.xattr.{}", String::from_utf8_lossy(name)), value);
    }
    let mut out = Vec::new();
    if !records.is_empty() {
        let extended = super::Entry { path: b"extended".to_vec(), size: records.len() as u64, ..Default::default() };
        out.extend_from_slice(&block(&extended, b'x'));
        out.extend_from_slice(&records);
        out.resize(out.len().next_multiple_of(BLOCK), 0);
    }
    out.extend_from_slice(&block(entry, entry.kind.octet()));
    out
}

fn block(entry: &super::Entry, kind: u8) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    let text = |block: &mut [u8; BLOCK], field: Range<usize>, text: &[u8]| {
        let length = text.len().min(field.len());
        block[field.start..field.start + length].copy_from_slice(&text[..length]);
    };
    let number = |block: &mut [u8; BLOCK], field: Range<usize>, number: u64| {
        let digits = format!("{number:0width$o}", width = field.len() - 1);
        let digits = if digits.len() < field.len() { digits } else { "0".repeat(field.len() - 1) };
        block[field.start..field.start + digits.len()].copy_from_slice(digits.as_bytes());
    };
    text(&mut block, Raw::NAME, &entry.path);
    number(&mut block, Raw::MODE, u64::from(entry.mode & 0o7777));
    number(&mut block, Raw::UID, entry.uid.into());
    number(&mut block, Raw::GID, entry.gid.into());
    number(&mut block, Raw::SIZE, entry.size);
    number(&mut block, Raw::MTIME, u64::try_from(entry.mtime).unwrap_or(0));
    block[Raw::KIND] = kind;
    text(&mut block, Raw::LINK, &entry.link);
    text(&mut block, Raw::MAGIC, b"ustar\0");
    block[263..265].copy_from_slice(b"00");
    block[Raw::SUM].fill(b' ');
    let sum: u64 = block.iter().map(|&octet| u64::from(octet)).sum();
    block[Raw::SUM.start..Raw::SUM.start + 7].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    block
}
