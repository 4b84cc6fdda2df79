//! The payloads of records: series for the dictionary, and samples in columns. Both compressed with snappy (its block
//! format), which costs a twentieth of the time that gzip would.
//!
//! Integers are LEB128, signed ones zigzag. A dictionary: number of its first series, count, and for each series kind,
//! name, labels. Samples: count, then three columns: series numbers (differences), timestamps (differences of
//! differences), values. A value that is an integer is kept as one, any other as its eight octets; which of the two is
//! said by a bit per sample. Most of what agents measure is integers and grows slowly.

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

use super::record::{MAX_PAYLOAD, MAX_SAMPLES};
use crate::sentinel::model::{Identity, Kind, Sample, Series, SeriesId};

/// Most series of one dictionary record.
pub const MAX_SERIES: usize = MAX_SAMPLES;
/// No uncompressed payload is longer.
const MAX_RAW: usize = 8 * 1024 * 1024;

/// A payload that its checksum let pass and that is none all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadBlock;

impl fmt::Display for BadBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a record's payload cannot be understood")
    }
}

/// Series ids are counted up, so any multiplication spreads them well enough.
#[derive(Default)]
pub struct IdHasher(u64);

impl Hasher for IdHasher {
    fn write(&mut self, octets: &[u8]) {
        for &octet in octets {
            self.write_u64(u64::from(octet));
        }
    }

    fn write_u64(&mut self, id: u64) {
        self.0 = (self.0 ^ id).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 32
    }
}

/// A map by series.
pub type BySeries<T> = HashMap<SeriesId, T, BuildHasherDefault<IdHasher>>;

/// Compresses what was encoded.
pub struct Encoder {
    raw: Vec<u8>,
    packed: Vec<u8>,
    snappy: snap::raw::Encoder,
}

impl Default for Encoder {
    fn default() -> Self {
        Self { raw: Vec::new(), packed: Vec::new(), snappy: snap::raw::Encoder::new() }
    }
}

impl Encoder {
    /// The payload of a dictionary record: `series` get the numbers from `first` on. Nothing when it would be too long.
    pub fn dictionary(&mut self, first: u32, series: &[Arc<Series>]) -> Option<&[u8]> {
        self.raw.clear();
        put_u64(&mut self.raw, u64::from(first));
        put_u64(&mut self.raw, series.len() as u64);
        for series in series {
            self.raw.push(series.kind() as u8);
            put_text(&mut self.raw, series.name());
            put_u64(&mut self.raw, series.labels().len() as u64);
            for (name, value) in series.labels() {
                put_text(&mut self.raw, name);
                put_text(&mut self.raw, value);
            }
        }
        self.pack()
    }

    /// The payload of a samples record, at most [`MAX_SAMPLES`] of them; `numbers` are those of their series.
    pub fn samples(&mut self, samples: &[Sample], numbers: &[u32]) -> Option<&[u8]> {
        let raw = &mut self.raw;
        raw.clear();
        put_u64(raw, samples.len() as u64);
        let mut before = 0;
        for &number in numbers {
            let number = i64::from(number);
            put_i64(raw, number - before);
            before = number;
        }
        let (mut before, mut step) = (0i64, 0i64);
        for sample in samples {
            let now = sample.timestamp_ms.wrapping_sub(before);
            put_i64(raw, now.wrapping_sub(step));
            (before, step) = (sample.timestamp_ms, now);
        }
        for eight in samples.chunks(8) {
            raw.push(eight.iter().enumerate().fold(0, |bits, (n, s)| bits | u8::from(integer(s.value).is_some()) << n));
        }
        for sample in samples {
            match integer(sample.value) {
                Some(integer) => put_i64(raw, integer),
                None => raw.extend_from_slice(&sample.value.to_bits().to_le_bytes()),
            }
        }
        self.pack()
    }

    fn pack(&mut self) -> Option<&[u8]> {
        self.packed.resize(snap::raw::max_compress_len(self.raw.len()), 0);
        let len = self.snappy.compress(&self.raw, &mut self.packed).ok()?;
        (len <= MAX_PAYLOAD && self.raw.len() <= MAX_RAW).then(|| &self.packed[..len])
    }
}

/// The integer that a value is, when it can be kept as one: in a double's exact range, and not minus zero.
fn integer(value: f64) -> Option<i64> {
    let integer = value as i64;
    let exact = integer.unsigned_abs() < 1 << 53 && (integer as f64).to_bits() == value.to_bits();
    exact.then_some(integer)
}

fn unpack(payload: &[u8]) -> Result<Vec<u8>, BadBlock> {
    let len = snap::raw::decompress_len(payload).map_err(|_| BadBlock)?;
    if len > MAX_RAW {
        return Err(BadBlock);
    }
    snap::raw::Decoder::new().decompress_vec(payload).map_err(|_| BadBlock)
}

/// The series of a dictionary record, and the number of the first.
pub fn read_dictionary(payload: &[u8]) -> Result<(u32, Vec<Identity>), BadBlock> {
    let raw = unpack(payload)?;
    let mut rest = raw.as_slice();
    let first = u32::try_from(take_u64(&mut rest)?).map_err(|_| BadBlock)?;
    let count = take_count(&mut rest, MAX_SERIES)?;
    let mut series = Vec::with_capacity(count);
    for _ in 0..count {
        let (&kind, after) = rest.split_first().ok_or(BadBlock)?;
        rest = after;
        let kind = Kind::from_number(kind).ok_or(BadBlock)?;
        let name = take_text(&mut rest)?;
        let labels = take_count(&mut rest, crate::sentinel::model::MAX_LABELS)?;
        let labels = (0..labels)
            .map(|_| Ok((take_text(&mut rest)?, take_text(&mut rest)?)))
            .collect::<Result<Vec<_>, BadBlock>>()?;
        series.push(Identity::new(name, kind, labels).map_err(|_| BadBlock)?);
    }
    if rest.is_empty() { Ok((first, series)) } else { Err(BadBlock) }
}

/// One sample as it stands in a record.
#[derive(Debug, Clone, Copy)]
pub struct RawSample {
    /// Number of its series in the segment's dictionary.
    pub number: u32,
    /// Milliseconds since 1970-01-01 UTC.
    pub timestamp_ms: i64,
    /// Its value.
    pub value: f64,
}

/// The samples of a record.
pub fn read_samples(payload: &[u8]) -> Result<Vec<RawSample>, BadBlock> {
    let raw = unpack(payload)?;
    let mut rest = raw.as_slice();
    let count = take_count(&mut rest, MAX_SAMPLES)?;
    let mut samples = vec![RawSample { number: 0, timestamp_ms: 0, value: 0.0 }; count];
    let mut number = 0i64;
    for sample in &mut samples {
        number = number.wrapping_add(take_i64(&mut rest)?);
        sample.number = u32::try_from(number).map_err(|_| BadBlock)?;
    }
    let (mut now, mut step) = (0i64, 0i64);
    for sample in &mut samples {
        step = step.wrapping_add(take_i64(&mut rest)?);
        now = now.wrapping_add(step);
        sample.timestamp_ms = now;
    }
    let (bits, mut rest) = rest.split_at_checked(count.div_ceil(8)).ok_or(BadBlock)?;
    for (n, sample) in samples.iter_mut().enumerate() {
        sample.value = if bits[n / 8] >> (n % 8) & 1 == 1 {
            take_i64(&mut rest)? as f64
        } else {
            let (octets, after) = rest.split_first_chunk().ok_or(BadBlock)?;
            rest = after;
            f64::from_bits(u64::from_le_bytes(*octets))
        };
    }
    if rest.is_empty() { Ok(samples) } else { Err(BadBlock) }
}

fn put_u64(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_i64(out: &mut Vec<u8>, value: i64) {
    put_u64(out, (value << 1 ^ value >> 63) as u64);
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    put_u64(out, text.len() as u64);
    out.extend_from_slice(text.as_bytes());
}

fn take_u64(rest: &mut &[u8]) -> Result<u64, BadBlock> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&octet, after) = rest.split_first().ok_or(BadBlock)?;
        *rest = after;
        let bits = u64::from(octet & 0x7f);
        if bits << shift >> shift != bits {
            return Err(BadBlock);
        }
        value |= bits << shift;
        if octet < 0x80 {
            return Ok(value);
        }
    }
    Err(BadBlock)
}

fn take_i64(rest: &mut &[u8]) -> Result<i64, BadBlock> {
    let value = take_u64(rest)?;
    Ok((value >> 1) as i64 ^ -((value & 1) as i64))
}

/// A count of things that take at least one octet each.
fn take_count(rest: &mut &[u8], limit: usize) -> Result<usize, BadBlock> {
    let count = usize::try_from(take_u64(rest)?).map_err(|_| BadBlock)?;
    if count <= limit.min(rest.len()) { Ok(count) } else { Err(BadBlock) }
}

fn take_text<'a>(rest: &mut &'a [u8]) -> Result<&'a str, BadBlock> {
    let len = usize::try_from(take_u64(rest)?).map_err(|_| BadBlock)?;
    let (text, after) = rest.split_at_checked(len).ok_or(BadBlock)?;
    *rest = after;
    std::str::from_utf8(text).map_err(|_| BadBlock)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sentinel::model::{SeriesTable, stale_marker};

    const EDGES: [f64; 16] = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.1,
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::NAN,
        1e308,
        1e-308,
        5e-324,
        9_007_199_254_740_991.0,
        9_007_199_254_740_992.0,
        -9_007_199_254_740_993.0,
        9.3e18,
        -9.3e18,
    ];

    fn series(count: usize) -> Vec<Arc<Series>> {
        let table = SeriesTable::new(count);
        let of = |n: usize| {
            let labels = [("instance", format!("hôte{}", n % 3))];
            Identity::new(&format!("metric_{n}_total"), Kind::Counter, labels).unwrap()
        };
        (0..count).map(|n| table.intern(of(n)).unwrap()).collect()
    }

    #[test]
    fn series_are_read_back() {
        let series = series(100);
        let mut encoder = Encoder::default();
        let (first, back) = read_dictionary(encoder.dictionary(7, &series).unwrap()).unwrap();
        assert_eq!(first, 7);
        assert!(back.iter().eq(series.iter().map(|series| &***series)));
    }

    #[test]
    fn every_value_and_time_is_read_back_to_the_bit() {
        let series = series(EDGES.len());
        let times = [0, i64::MAX, i64::MIN, -1, 1_800_000_000_000];
        let mut samples: Vec<Sample> = Vec::new();
        for (n, &value) in EDGES.iter().chain([stale_marker()].iter()).cycle().take(200).enumerate() {
            let series = Arc::clone(&series[n * 7 % series.len()]);
            samples.push(Sample { series, timestamp_ms: times[n % times.len()], value });
        }
        let mut encoder = Encoder::default();
        let numbers: Vec<u32> = samples.iter().map(|sample| sample.series.id().0 as u32 * 1000).collect();
        let payload = encoder.samples(&samples, &numbers).unwrap();
        let back = read_samples(payload).unwrap();
        assert_eq!(back.len(), samples.len());
        for (back, sample) in back.iter().zip(&samples) {
            assert_eq!(back.number, sample.series.id().0 as u32 * 1000);
            assert_eq!(back.timestamp_ms, sample.timestamp_ms);
            assert_eq!(back.value.to_bits(), sample.value.to_bits());
        }
    }

    #[test]
    fn a_shortened_or_lengthened_payload_is_refused() {
        let series = series(3);
        let sample = |n: usize| Sample { series: Arc::clone(&series[n % 3]), timestamp_ms: n as i64, value: 0.5 };
        let samples: Vec<_> = (0..9).map(sample).collect();
        let mut encoder = Encoder::default();
        encoder.samples(&samples, &[0, 1, 2, 0, 1, 2, 0, 1, 2]).unwrap();
        let raw = encoder.raw.clone();
        let pack = |raw: &[u8]| snap::raw::Encoder::new().compress_vec(raw).unwrap();
        assert!(read_samples(&pack(&raw)).is_ok());
        for len in 0..raw.len() {
            assert!(read_samples(&pack(&raw[..len])).is_err(), "{len}");
        }
        assert!(read_samples(&pack(&[&raw[..], &[0]].concat())).is_err());
        assert!(read_samples(&[0xff; 9]).is_err());
    }
}
