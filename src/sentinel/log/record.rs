//! What stands in a segment: a header, then records one after the other, then zeroes (space allocated ahead).
//!
//! Every record says itself what it is, so that no index is needed to read a segment and a damaged record costs
//! nothing but itself: the next one is found by its magic and believed by its checksum.
//!
//! ```text
//! segment: magic "WSENTLOG" | version u32 | log u64 | first sequence u64 | created ms i64 | crc32c u32
//! record:  magic u32 | crc32c u32 | payload length u32 | kind u8, 0, 0, 0 | samples u32 | 0 u32 |
//!          sequence u64 | accepted ms i64 | payload
//! ```
//!
//! Everything is little-endian; a checksum covers what follows it (the segment's: what precedes it). A sequence number
//! counts samples, not records: a record's is that of its first sample, so a hole between two records says how many
//! samples are missing.

use super::crc32c::crc32c;

/// Octets of a segment's header.
pub const SEGMENT_HEADER: u64 = 40;
/// Octets of a record's header.
pub const RECORD_HEADER: usize = 40;
/// No payload is longer.
pub const MAX_PAYLOAD: usize = 4 * 1024 * 1024;
/// No record has more samples.
pub const MAX_SAMPLES: usize = 4096;

/// No sequence number is higher: a file that says otherwise was not written by a log.
pub const MAX_SEQUENCE: u64 = 1 << 62;

const SEGMENT_MAGIC: &[u8; 8] = b"WSENTLOG";
const VERSION: u32 = 1;
const RECORD_MAGIC: [u8; 4] = [0xd3, b'W', b'S', b'R'];

/// What a segment says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentHeader {
    /// Chosen at random when a log is made; sequence numbers are unique within one log.
    pub log: u64,
    /// Sequence number of the first sample it may hold.
    pub first: u64,
    /// When it was made: milliseconds since 1970-01-01 UTC.
    pub created_ms: i64,
}

impl SegmentHeader {
    /// As it is written.
    pub fn encode(&self) -> [u8; SEGMENT_HEADER as usize] {
        let mut out = [0; SEGMENT_HEADER as usize];
        out[..8].copy_from_slice(SEGMENT_MAGIC);
        out[8..12].copy_from_slice(&VERSION.to_le_bytes());
        out[12..20].copy_from_slice(&self.log.to_le_bytes());
        out[20..28].copy_from_slice(&self.first.to_le_bytes());
        out[28..36].copy_from_slice(&self.created_ms.to_le_bytes());
        let crc = crc32c(&[&out[..36]]);
        out[36..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Nothing when it is damaged or of another version.
    pub fn decode(raw: &[u8]) -> Option<Self> {
        let raw = raw.first_chunk::<{ SEGMENT_HEADER as usize }>()?;
        let whole = &raw[..8] == SEGMENT_MAGIC && u32_at(raw, 8) == VERSION && u32_at(raw, 36) == crc32c(&[&raw[..36]]);
        let header = Self { log: u64_at(raw, 12), first: u64_at(raw, 20), created_ms: u64_at(raw, 28) as i64 };
        (whole && header.first <= MAX_SEQUENCE).then_some(header)
    }
}

/// What a record holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum RecordKind {
    /// Series that later records of the segment name by number. It has no samples and stands twice.
    Dictionary = 1,
    /// Samples.
    Samples = 2,
}

/// A record without its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordHeader {
    /// What it holds.
    pub kind: RecordKind,
    /// Samples in it.
    pub samples: u32,
    /// Sequence number of its first sample.
    pub sequence: u64,
    /// When it was accepted: milliseconds since 1970-01-01 UTC.
    pub accepted_ms: i64,
}

impl RecordHeader {
    /// The sequence number after its last sample.
    pub fn end(&self) -> u64 {
        self.sequence.saturating_add(u64::from(self.samples))
    }
}

/// Appends a record.
pub fn encode(header: RecordHeader, payload: &[u8], out: &mut Vec<u8>) {
    debug_assert!(payload.len() <= MAX_PAYLOAD);
    let mut raw = [0; RECORD_HEADER];
    raw[..4].copy_from_slice(&RECORD_MAGIC);
    raw[8..12].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    raw[12] = header.kind as u8;
    raw[16..20].copy_from_slice(&header.samples.to_le_bytes());
    raw[24..32].copy_from_slice(&header.sequence.to_le_bytes());
    raw[32..].copy_from_slice(&header.accepted_ms.to_le_bytes());
    let crc = crc32c(&[&raw[8..], payload]);
    raw[4..8].copy_from_slice(&crc.to_le_bytes());
    out.extend_from_slice(&raw);
    out.extend_from_slice(payload);
}

/// What stands at the beginning of some octets.
#[derive(Debug, PartialEq, Eq)]
pub enum Found<'a> {
    /// A whole, undamaged record.
    Record(RecordHeader, &'a [u8]),
    /// The beginning of one that has this many octets altogether, if it is one.
    Needs(usize),
    /// No record.
    Nothing,
}

/// Reads the record at the beginning of `raw`.
pub fn decode(raw: &[u8]) -> Found<'_> {
    let Some(header) = raw.first_chunk::<RECORD_HEADER>() else {
        let magic = &RECORD_MAGIC[..raw.len().min(4)];
        return if raw.starts_with(magic) { Found::Needs(RECORD_HEADER) } else { Found::Nothing };
    };
    let len = u32_at(header, 8) as usize;
    let kind = match header[12] {
        1 => RecordKind::Dictionary,
        2 => RecordKind::Samples,
        _ => return Found::Nothing,
    };
    let samples = u32_at(header, 16);
    if header[..4] != RECORD_MAGIC || len > MAX_PAYLOAD || samples as usize > MAX_SAMPLES {
        return Found::Nothing;
    }
    let Some(payload) = raw[RECORD_HEADER..].get(..len) else { return Found::Needs(RECORD_HEADER + len) };
    if u32_at(header, 4) != crc32c(&[&header[8..], payload]) || u64_at(header, 24) > MAX_SEQUENCE {
        return Found::Nothing;
    }
    let header = RecordHeader { kind, samples, sequence: u64_at(header, 24), accepted_ms: u64_at(header, 32) as i64 };
    Found::Record(header, payload)
}

/// Where the next record may begin: the first place in `raw` with its magic, or with the beginning of it at the end.
pub fn next_magic(raw: &[u8]) -> Option<usize> {
    let mut from = 0;
    while let Some(at) = raw[from..].iter().position(|&octet| octet == RECORD_MAGIC[0]) {
        let at = from + at;
        let there = &raw[at..raw.len().min(at + 4)];
        if RECORD_MAGIC.starts_with(there) {
            return Some(at);
        }
        from = at + 1;
    }
    None
}

fn u32_at(raw: &[u8], at: usize) -> u32 {
    let mut octets = [0; 4];
    octets.copy_from_slice(&raw[at..at + 4]);
    u32::from_le_bytes(octets)
}

fn u64_at(raw: &[u8], at: usize) -> u64 {
    let mut octets = [0; 8];
    octets.copy_from_slice(&raw[at..at + 8]);
    u64::from_le_bytes(octets)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: RecordHeader =
        RecordHeader { kind: RecordKind::Samples, samples: 3, sequence: 1 << 40, accepted_ms: -5 };

    #[test]
    fn a_record_is_read_back_and_any_flipped_bit_in_it_is_seen() {
        let mut raw = Vec::new();
        encode(HEADER, b"payload", &mut raw);
        assert_eq!(decode(&raw), Found::Record(HEADER, b"payload"));
        for bit in 0..raw.len() * 8 {
            let mut flipped = raw.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(!matches!(decode(&flipped), Found::Record(..)), "bit {bit}");
        }
        for len in 0..raw.len() {
            assert!(matches!(decode(&raw[..len]), Found::Needs(n) if n > len), "{len}");
        }
    }

    #[test]
    fn a_segments_header_is_read_back_and_any_flipped_bit_in_it_is_seen() {
        let header = SegmentHeader { log: 7, first: 9, created_ms: 11 };
        let raw = header.encode();
        assert_eq!(SegmentHeader::decode(&raw), Some(header));
        for bit in 0..raw.len() * 8 {
            let mut flipped = raw;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(SegmentHeader::decode(&flipped), None);
        }
    }

    #[test]
    fn the_next_record_is_found_by_its_magic_even_at_the_edge() {
        let mut raw = vec![0xd3, 0xd3, b'W'];
        assert_eq!(next_magic(&raw), Some(1));
        raw.extend_from_slice(b"xx");
        assert_eq!(next_magic(&raw), None);
        encode(HEADER, b"", &mut raw);
        assert_eq!(next_magic(&raw), Some(5));
    }
}
