//! Archives as they come, plain or compressed, with a bound on what they unpack to.

use std::io::{self, Cursor, Read};

use zlib_rs::{Inflate, InflateFlush, Status};

use super::zstd::Unzstd;

const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
const XZ: [u8; 6] = [0xfd, b'7', b'z', b'X', b'Z', 0];
const BZIP2: [u8; 3] = *b"BZh";
/// Octets of a tar header.
const HEADER: u64 = 512;
/// As `deflate` streams are at most.
const WINDOW_BITS: u8 = 15;
const CHUNK: usize = 64 * 1024;

type Begun<R> = io::Chain<Cursor<Vec<u8>>, R>;

/// What an archive unpacks to.
pub(super) struct Plain<R: Read> {
    form: Form<R>,
    given: u64,
    most: u64,
}

enum Form<R: Read> {
    As(Begun<R>),
    Gzip(Box<Gunzip<Begun<R>>>),
    Zstd(Box<Unzstd<Begun<R>>>),
}

pub(super) fn bad(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

impl<R: Read> Plain<R> {
    /// Looks at the first octets. Gives at most `most` octets: more is an error.
    pub fn of(mut from: R, most: u64) -> io::Result<Self> {
        let mut begin = Vec::new();
        from.by_ref().take(HEADER).read_to_end(&mut begin)?;
        // A file in a tar archive may have any name, also one that begins as something compressed.
        let is_tar = begin.get(257..262) == Some(b"ustar");
        let is = |magic: &[u8]| !is_tar && begin.starts_with(magic);
        let (gzip, zstd) = (is(&GZIP), is(&ZSTD) || !is_tar && is_skipped(&begin));
        for (magic, name) in [(XZ.as_slice(), "xz"), (BZIP2.as_slice(), "bzip2")] {
            if is(magic) {
                return Err(bad(format!("it is compressed with {name}: gzip and zstd are known")));
            }
        }
        let from = Cursor::new(begin).chain(from);
        let form = match (gzip, zstd) {
            (true, _) => Form::Gzip(Box::new(Gunzip::new(from))),
            (_, true) => Form::Zstd(Box::new(Unzstd::new(from))),
            _ => Form::As(from),
        };
        Ok(Self { form, given: 0, most })
    }
}

impl<R: Read> Read for Plain<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let got = match &mut self.form {
            Form::As(from) => from.read(into)?,
            Form::Gzip(from) => from.read(into)?,
            Form::Zstd(from) => from.read(into)?,
        };
        self.given += got as u64;
        if self.given > self.most {
            return Err(bad(format!("it unpacks to more than {} octets, the size of the disk", self.most)));
        }
        Ok(got)
    }
}

/// Whether a zstd frame that is to be skipped begins here.
fn is_skipped(begin: &[u8]) -> bool {
    begin.first().is_some_and(|octet| octet & 0xf0 == 0x50) && begin[1..].starts_with(&[0x2a, 0x4d, 0x18])
}

/// RFC 1952, one member after the other.
struct Gunzip<R> {
    from: R,
    chunk: Vec<u8>,
    at: usize,
    inflate: Option<Inflate>,
    sum: u32,
    size: u32,
    members: u64,
}

impl<R: Read> Gunzip<R> {
    fn new(from: R) -> Self {
        Self { from, chunk: Vec::new(), at: 0, inflate: None, sum: 0, size: 0, members: 0 }
    }

    /// Whether there is another octet.
    fn fill(&mut self) -> io::Result<bool> {
        if self.at == self.chunk.len() {
            self.chunk.resize(CHUNK, 0);
            let got = self.from.read(&mut self.chunk)?;
            self.chunk.truncate(got);
            self.at = 0;
        }
        Ok(self.at < self.chunk.len())
    }

    fn octet(&mut self) -> io::Result<u8> {
        if !self.fill()? {
            return Err(bad("gzip: it ends too early"));
        }
        self.at += 1;
        Ok(self.chunk[self.at - 1])
    }

    fn number(&mut self) -> io::Result<u32> {
        let octets = [self.octet()?, self.octet()?, self.octet()?, self.octet()?];
        Ok(u32::from_le_bytes(octets))
    }

    /// The header of a member; `false` where there is none any more.
    fn begin(&mut self) -> io::Result<bool> {
        if !self.fill()? {
            return if self.members > 0 { Ok(false) } else { Err(bad("gzip: it is empty")) };
        }
        let magic = [self.octet()?, self.octet()?];
        if magic != GZIP {
            // Zeroes fill tapes up.
            return if self.members > 0 && magic == [0, 0] {
                Ok(false)
            } else {
                Err(bad("gzip: no member begins here"))
            };
        }
        let (method, flags) = (self.octet()?, self.octet()?);
        for _ in 0..6 {
            self.octet()?;
        }
        if method != 8 {
            return Err(bad(format!("gzip: method {method} is not known")));
        }
        if flags & 4 != 0 {
            let length = u16::from_le_bytes([self.octet()?, self.octet()?]);
            for _ in 0..length {
                self.octet()?;
            }
        }
        // Name, comment.
        for _ in 0..u32::from(flags & 8 != 0) + u32::from(flags & 16 != 0) {
            while self.octet()? != 0 {}
        }
        if flags & 2 != 0 {
            self.octet()?;
            self.octet()?;
        }
        self.members += 1;
        (self.inflate, self.sum, self.size) = (Some(Inflate::new(false, WINDOW_BITS)), 0, 0);
        Ok(true)
    }
}

impl<R: Read> Read for Gunzip<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if into.is_empty() {
            return Ok(0);
        }
        loop {
            if self.inflate.is_none() && !self.begin()? {
                return Ok(0);
            }
            let more = self.fill()?;
            let Some(inflate) = &mut self.inflate else { continue };
            let (input, output) = (inflate.total_in(), inflate.total_out());
            let status = inflate
                .decompress(&self.chunk[self.at..], into, InflateFlush::NoFlush)
                .map_err(|e| bad(format!("gzip: {}", e.as_str())))?;
            let taken = usize::try_from(inflate.total_in() - input).unwrap_or(0);
            let given = usize::try_from(inflate.total_out() - output).unwrap_or(0);
            self.at += taken;
            self.sum = zlib_rs::crc32::crc32(self.sum, &into[..given]);
            self.size = self.size.wrapping_add(given as u32);
            if matches!(status, Status::StreamEnd) {
                self.inflate = None;
                let (sum, size) = (self.number()?, self.number()?);
                if (sum, size) != (self.sum, self.size) {
                    return Err(bad("gzip: its checksum is wrong"));
                }
            } else if given == 0 && !more {
                return Err(bad("gzip: it ends too early"));
            }
            if given > 0 {
                return Ok(given);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sentinel::send::gzip;

    fn read(octets: &[u8], most: u64) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        Plain::of(octets, most)?.read_to_end(&mut all)?;
        Ok(all)
    }

    #[test]
    fn gzip_is_read_member_by_member_and_cut_or_damaged_is_an_error() {
        let text: Vec<u8> = (0..200_000u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
        let one = gzip(&text);
        assert_eq!(read(&one, u64::MAX).unwrap(), text);
        assert_eq!(
            read(&[one.clone(), one.clone()].concat(), u64::MAX).unwrap(),
            [text.clone(), text.clone()].concat()
        );
        assert!(read(&one[..one.len() - 1], u64::MAX).is_err());
        let mut damaged = one.clone();
        let last = damaged.len() - 6;
        damaged[last] ^= 1;
        assert!(read(&damaged, u64::MAX).unwrap_err().to_string().contains("checksum"));
        let error = read(&one, 1000).unwrap_err().to_string();
        assert_eq!(error, "it unpacks to more than 1000 octets, the size of the disk");
    }

    #[test]
    fn what_is_not_known_is_named() {
        assert!(read(b"BZh91AY", 10).unwrap_err().to_string().contains("bzip2"));
        assert_eq!(read(b"plain", 10).unwrap(), b"plain");
        for name in ["BZhang", "\x1f\u{8b}", "Pieces"] {
            let entry = crate::archive::Entry { path: name.into(), ..Default::default() };
            let archive = crate::archive::pack(&[(entry, b"")]);
            assert_eq!(read(&archive, u64::MAX).unwrap(), archive);
        }
        assert!(read(&ZSTD, 10).is_err() && read(b"\x5f\x2a\x4d\x18\0", 10).is_err());
    }
}
