//! Saved state of a microVM: a file of lines of the wire grammar, so that one parser reads all that is hostile, and a
//! person reads the file.
//!
//! ```text
//! warren item part=snapshot version=2 vcpus=1 memory_bytes=134217728
//! warren item part=vcpu index=0 regs=48ffz12. …
//! …
//! warren ok sha256=…
//! ```
//!
//! Each line is a part, found by its name and number. Keys and parts that a reader does not know are ignored; one that
//! is missing has the default that the reader gives it. `version` grows only when an older reader would go wrong: in the
//! first, octets stood as they are in quotes; since the second they are short words (`packed`), because the guest waits
//! for this file to be read. The last line is the SHA-256 of all octets before it.

use std::fmt;
use std::fmt::Write as _;

use sha2::{Digest, Sha256};

use super::packed::{pack, unpack};
use crate::wire::{Decoded, Decoder, Fields, Message};

/// The form that this program writes, and the newest that it reads.
pub const VERSION: u64 = 2;
/// From this one on octets are `packed`.
const PACKED_SINCE: u64 = 2;
/// Longest file, in octets: sixteen processors need less than one mebibyte.
pub const MAX_BYTES: usize = 4 << 20;
/// Most parts of a file.
const MAX_PARTS: usize = 4096;
/// Tag of every line.
const TAG: &str = "warren";

/// Why saved state cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SavedError {
    /// More octets than any state has.
    TooLong {
        /// As found.
        bytes: usize,
    },
    /// No line of the form, or something after the last one.
    NotSaved(String),
    /// Its end is missing, or it was changed.
    Damaged(&'static str),
    /// Written by a newer program.
    Version {
        /// As found.
        version: u64,
    },
    /// A part is not there.
    Missing {
        /// Its name.
        part: String,
        /// Its number.
        index: u64,
    },
    /// A field is not there or cannot be what it says.
    Field {
        /// Of which part.
        part: String,
        /// Its key.
        key: &'static str,
        /// What is wrong.
        why: String,
    },
}

impl fmt::Display for SavedError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong { bytes } => write!(f, "saved state of {bytes} octets is over the limit of {MAX_BYTES}"),
            Self::NotSaved(why) => write!(f, "this is no saved state: {why}"),
            Self::Damaged(why) => write!(f, "the saved state is damaged: {why}"),
            Self::Version { version } => {
                write!(f, "the saved state is of version {version}, this program reads up to {VERSION}")
            }
            Self::Missing { part, index } => write!(f, "the saved state has no {part} {index}"),
            Self::Field { part, key, why } => write!(f, "saved state, {part}: {key} {why}"),
        }
    }
}

impl std::error::Error for SavedError {}

/// One part: a row of fields with its name and number.
#[derive(Debug, Clone)]
pub struct Part {
    fields: Fields,
    /// Its octets are packed.
    packed: bool,
}

impl PartialEq for Part {
    fn eq(&self, other: &Self) -> bool {
        self.fields == other.fields
    }
}

impl Eq for Part {}

impl Part {
    /// An empty part.
    pub fn new(name: &str, index: u64) -> Self {
        Self { fields: Fields::new().with("part", name).with("index", index), packed: true }
    }

    /// Adds a number or a text.
    pub fn with(mut self, key: &str, value: impl ToString) -> Self {
        self.fields = self.fields.with(key, value);
        self
    }

    /// Adds octets.
    pub fn with_bytes(mut self, key: &str, value: &[u8]) -> Self {
        self.fields = self.fields.with(key, pack(value));
        self
    }

    /// Its name.
    pub fn name(&self) -> &str {
        self.fields.get("part").unwrap_or_default()
    }

    /// Its number among those of the name.
    pub fn index(&self) -> u64 {
        self.fields.number("index").unwrap_or(0)
    }

    /// A field's text, where it is there.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.fields.get(key)
    }

    /// A field's octets, where it is there.
    pub fn bytes(&self, key: &'static str) -> Result<Option<Vec<u8>>, SavedError> {
        match self.fields.bytes(key) {
            Some(word) if self.packed => {
                unpack(word).map(Some).ok_or_else(|| self.wrong(key, "is no row of octets, or a very long one"))
            }
            octets => Ok(octets.map(<[u8]>::to_vec)),
        }
    }

    /// The error about a field of this part.
    pub fn wrong(&self, key: &'static str, why: impl Into<String>) -> SavedError {
        SavedError::Field { part: format!("{} {}", self.name(), self.index()), key, why: why.into() }
    }

    /// A number up to `max`; `default` where it is not there.
    pub fn number(&self, key: &'static str, max: u64, default: u64) -> Result<u64, SavedError> {
        let Some(text) = self.fields.bytes(key) else { return Ok(default) };
        let number = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok());
        number.filter(|n| *n <= max).ok_or_else(|| {
            self.wrong(key, format!("is {:.40}, must be a number up to {max}", text.escape_ascii().to_string()))
        })
    }

    /// Octets of exactly that length, which must be there.
    pub fn exact(&self, key: &'static str, len: usize) -> Result<Vec<u8>, SavedError> {
        let octets = self.bytes(key)?.ok_or_else(|| self.wrong(key, "is missing"))?;
        if octets.len() != len {
            return Err(self.wrong(key, format!("has {} octets, must have {len}", octets.len())));
        }
        Ok(octets)
    }
}

/// The whole state.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Saved {
    parts: Vec<Part>,
}

impl Saved {
    /// The state of a microVM of that shape, without anything of it yet.
    pub fn new(vcpus: u8, memory_bytes: u64) -> Self {
        let head = Part::new("snapshot", 0).with("version", VERSION);
        Self { parts: vec![head.with("vcpus", vcpus).with("memory_bytes", memory_bytes)] }
    }

    /// Adds a part.
    pub fn push(&mut self, part: Part) {
        self.parts.push(part);
    }

    /// All parts, in their order.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// A part, if it is there.
    pub fn get(&self, name: &str, index: u64) -> Option<&Part> {
        self.parts.iter().find(|part| part.name() == name && part.index() == index)
    }

    /// A part that must be there.
    pub fn find(&self, name: &str, index: u64) -> Result<&Part, SavedError> {
        self.get(name, index).ok_or_else(|| SavedError::Missing { part: name.to_string(), index })
    }

    /// How many parts have that name.
    pub fn count(&self, name: &str) -> usize {
        self.parts.iter().filter(|part| part.name() == name).count()
    }

    /// Processors and octets of memory.
    pub fn shape(&self) -> Result<(u8, u64), SavedError> {
        let head = self.find("snapshot", 0)?;
        let vcpus = head.number("vcpus", 255, 0)?;
        Ok((vcpus as u8, head.number("memory_bytes", u64::MAX, 0)?))
    }

    /// The file.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for part in &self.parts {
            Message::item(TAG, part.fields.clone()).encode(&mut out);
        }
        let end = last_line(&out);
        out.extend(end);
        out
    }

    /// Reads a file, whoever wrote it.
    pub fn decode(octets: &[u8]) -> Result<Self, SavedError> {
        if octets.len() > MAX_BYTES {
            return Err(SavedError::TooLong { bytes: octets.len() });
        }
        // The last line is by itself, so that the sum is checked before anything is believed.
        let body_end = octets.strip_suffix(b"\n").and_then(|rest| rest.iter().rposition(|octet| *octet == b'\n'));
        let body_end = body_end.ok_or(SavedError::Damaged("it has no end"))? + 1;
        let (body, end) = octets.split_at(body_end);
        if end != last_line(body) {
            let is_last = end.starts_with(format!("{TAG} ok ").as_bytes());
            return Err(SavedError::Damaged(if is_last { "its checksum is another" } else { "it has no end" }));
        }
        let mut decoder = Decoder::new();
        decoder.push(body);
        let mut saved = Self::default();
        while let Some(decoded) = decoder.next() {
            match decoded {
                Decoded::Message(Message::Item { fields, .. }) if saved.parts.len() < MAX_PARTS => {
                    saved.parts.push(Part { fields, packed: true });
                }
                Decoded::Message(other) => return Err(SavedError::NotSaved(format!("a line {other:.60?}"))),
                Decoded::Bad { error, .. } => return Err(SavedError::NotSaved(error.message)),
            }
        }
        let version = saved.find("snapshot", 0)?.number("version", u64::MAX, 0)?;
        if !(1..=VERSION).contains(&version) {
            return Err(SavedError::Version { version });
        }
        saved.parts.iter_mut().for_each(|part| part.packed = version >= PACKED_SINCE);
        Ok(saved)
    }
}

/// A body with its right end, for who makes bodies.
#[cfg(any(test, feature = "fuzzing"))]
pub fn sealed(body: &[u8]) -> Vec<u8> {
    [body, &last_line(body)].concat()
}

fn last_line(body: &[u8]) -> Vec<u8> {
    Message::ok(TAG, Fields::new().with("sha256", hex(&Sha256::digest(body)))).to_bytes()
}

fn hex(octets: &[u8]) -> String {
    octets.iter().fold(String::with_capacity(2 * octets.len()), |mut text, octet| {
        let _ = write!(text, "{octet:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some() -> Saved {
        let mut saved = Saved::new(2, 128 << 20);
        saved.push(Part::new("vcpu", 0).with_bytes("regs", &[0, 255, b'"', b'\n', b'=']).with("mp_state", 3));
        saved.push(Part::new("vcpu", 1).with_bytes("regs", &[7; 400]));
        saved
    }

    #[test]
    fn what_was_written_is_read() {
        let saved = Saved::decode(&some().encode()).unwrap();
        assert_eq!(saved, some());
        assert_eq!(saved.shape().unwrap(), (2, 128 << 20));
        let part = saved.find("vcpu", 0).unwrap();
        assert_eq!(part.exact("regs", 5).unwrap(), [0, 255, b'"', b'\n', b'=']);
        assert_eq!(part.number("mp_state", 5, 0).unwrap(), 3);
        assert_eq!(part.number("missing", 5, 4).unwrap(), 4);
        assert_eq!(saved.count("vcpu"), 2);
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_seen() {
        let octets = some().encode();
        for at in 0..octets.len() {
            let mut bad = octets.clone();
            bad[at] ^= 1 << (at % 8);
            assert!(Saved::decode(&bad).is_err(), "bit of octet {at}");
            assert!(Saved::decode(&octets[..at]).is_err(), "cut at {at}");
        }
        assert!(Saved::decode(&[octets.clone(), octets].concat()).is_err());
    }

    #[test]
    fn files_of_the_first_version_stay_readable() {
        use crate::vmm::devices::balloon::Balloon;
        use crate::vmm::devices::mmio::{MmioTransport, PART, Window};
        use crate::vmm::memory::GuestMemory;

        let saved = Saved::decode(include_bytes!("tests/version-1")).unwrap();
        assert_eq!(saved.shape().unwrap(), (1, 128 << 20));
        let memory = GuestMemory::new(1 << 20).unwrap();
        let balloon = MmioTransport::new(memory, Balloon::new(1 << 20)).unwrap();
        balloon.restore(saved.find(PART, 0).unwrap()).unwrap();
        assert_eq!(balloon.save(0), *saved.find(PART, 0).unwrap(), "it is what it was, to the last field");
        assert_eq!(saved.find("serial", 0).unwrap().bytes("input").unwrap().unwrap(), b"ls\n");
    }

    #[test]
    fn what_newer_programs_write_is_ignored_or_refused_by_name() {
        let mut saved = some();
        saved.push(Part::new("toaster", 9).with("slices", 2));
        assert!(Saved::decode(&saved.encode()).is_ok());
        let newer = Saved { parts: vec![Part::new("snapshot", 0).with("version", 3)] };
        assert_eq!(Saved::decode(&newer.encode()), Err(SavedError::Version { version: 3 }));
        let none = Saved { parts: vec![Part::new("vcpu", 0)] };
        assert_eq!(Saved::decode(&none.encode()), Err(SavedError::Missing { part: "snapshot".into(), index: 0 }));
    }

    #[test]
    fn errors_name_part_key_and_value() {
        let saved = some();
        let part = saved.find("vcpu", 1).unwrap();
        assert_eq!(
            part.exact("regs", 144).unwrap_err().to_string(),
            "saved state, vcpu 1: regs has 400 octets, must have 144"
        );
        assert_eq!(part.exact("lapic", 1).unwrap_err().to_string(), "saved state, vcpu 1: lapic is missing");
        let odd = Part::new("vcpu", 3).with("mp_state", "x").with("lapic", "0");
        let error = odd.exact("lapic", 1).unwrap_err().to_string();
        assert_eq!(error, "saved state, vcpu 3: lapic is no row of octets, or a very long one");
        let error = odd.number("mp_state", 9, 0).unwrap_err().to_string();
        assert_eq!(error, "saved state, vcpu 3: mp_state is x, must be a number up to 9");
        assert!(matches!(Saved::decode(&vec![b'a'; MAX_BYTES + 1]), Err(SavedError::TooLong { .. })));
    }
}
