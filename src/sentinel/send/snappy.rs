//! Snappy's block format (google/snappy, format_description.txt), written for size: about a fifth smaller than the usual
//! encoder makes remote write's messages, for some more time. What it makes any decoder reads.
//!
//! Messages of metrics repeat themselves in short and in long stretches, and the nearest short one hides the better
//! long one. So two tables are kept, by the next 6 and by the next 12 octets, and of what both find that one is taken
//! which saves most; a better one an octet later goes before.

use super::protobuf::varint;

/// Octets that are looked at from a position on; nearer to the end nothing is sought.
const REACH: usize = 16;
/// Longest copy.
const MAX_COPY: usize = 64;
/// Positions of a copy's end that are noted.
const NOTED: usize = 16;
const TABLE_BITS: u32 = 15;

/// A compressor; keeps its tables for the next time.
pub struct Snappy {
    /// By hash the last position with it, plus `base`; what is below `base` is of an earlier input.
    short: Vec<u32>,
    long: Vec<u32>,
    base: u32,
}

/// What was found: how many octets back, how many octets, how many of them are saved.
#[derive(Clone, Copy)]
struct Found {
    offset: usize,
    length: usize,
    saved: usize,
}

impl Default for Snappy {
    fn default() -> Self {
        Self { short: vec![0; 1 << TABLE_BITS], long: vec![0; 1 << TABLE_BITS], base: 1 }
    }
}

impl Snappy {
    /// Appends `input`, at most 1 GiB, to `out`.
    pub fn compress(&mut self, input: &[u8], out: &mut Vec<u8>) {
        if self.base as usize + input.len() > u32::MAX as usize {
            *self = Self::default();
        }
        varint(out, input.len() as u64);
        let end = input.len().saturating_sub(REACH);
        let (mut at, mut literal) = (0, 0);
        let mut next = None;
        while at < end {
            let here = next.take().or_else(|| self.find(input, at));
            self.note(input, at);
            let Some(found) = here else {
                at += 1;
                continue;
            };
            if at + 1 < end
                && let Some(later) = self.find(input, at + 1)
                && later.saved > found.saved
            {
                next = Some(later);
                at += 1;
                continue;
            }
            put_literal(out, &input[literal..at]);
            put_copy(out, found.offset, found.length);
            let after = at + found.length;
            for position in (at + 1).max(after.saturating_sub(NOTED))..after.min(end) {
                self.note(input, position);
            }
            (at, literal) = (after, after);
        }
        put_literal(out, &input[literal..]);
        self.base += input.len() as u32;
    }

    /// The best copy for a position before the last `REACH` octets.
    fn find(&self, input: &[u8], at: usize) -> Option<Found> {
        let (short, long) = hashes(input, at);
        let best = [self.long[long], self.short[short]].into_iter().filter_map(|noted| {
            let from = noted.checked_sub(self.base)? as usize;
            let length = common(input, from, at);
            let offset = at - from;
            let saved = length.checked_sub(cost(offset, length)).filter(|saved| length >= 4 && *saved > 0)?;
            Some(Found { offset, length, saved })
        });
        best.max_by_key(|found| found.saved)
    }

    fn note(&mut self, input: &[u8], at: usize) {
        let (short, long) = hashes(input, at);
        let noted = self.base + at as u32;
        (self.short[short], self.long[long]) = (noted, noted);
    }
}

/// Of the next 6 and of the next 12 octets.
fn hashes(input: &[u8], at: usize) -> (usize, usize) {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let word = |at: usize| input[at..].first_chunk::<8>().map_or(0, |word| u64::from_le_bytes(*word));
    let short = (word(at) << 16).wrapping_mul(ODD);
    let long = word(at).wrapping_mul(ODD) ^ (word(at + 4) >> 32).wrapping_mul(ODD).rotate_left(17);
    let top = |hash: u64| (hash >> (64 - TABLE_BITS)) as usize;
    (top(short), top(long.wrapping_mul(ODD)))
}

/// Octets that are the same from both positions on, as far as a copy goes.
fn common(input: &[u8], from: usize, at: usize) -> usize {
    let (a, b) = (&input[from..], &input[at..]);
    let most = b.len().min(MAX_COPY);
    let mut length = 0;
    while length + 8 <= most {
        let word = |of: &[u8]| of[length..].first_chunk::<8>().map_or(0, |word| u64::from_le_bytes(*word));
        let differ = word(a) ^ word(b);
        if differ != 0 {
            return length + differ.trailing_zeros() as usize / 8;
        }
        length += 8;
    }
    while length < most && a[length] == b[length] {
        length += 1;
    }
    length
}

fn cost(offset: usize, length: usize) -> usize {
    match offset {
        ..2048 if length < 12 => 2,
        ..65_536 => 3,
        _ => 5,
    }
}

fn put_copy(out: &mut Vec<u8>, offset: usize, length: usize) {
    match cost(offset, length) {
        2 => out.extend([1 | ((length - 4) << 2) as u8 | ((offset >> 8) << 5) as u8, offset as u8]),
        3 => {
            out.push(2 | ((length - 1) << 2) as u8);
            out.extend_from_slice(&(offset as u16).to_le_bytes());
        }
        _ => {
            out.push(3 | ((length - 1) << 2) as u8);
            out.extend_from_slice(&(offset as u32).to_le_bytes());
        }
    }
}

fn put_literal(out: &mut Vec<u8>, octets: &[u8]) {
    let Some(last) = octets.len().checked_sub(1) else { return };
    if last < 60 {
        out.push((last << 2) as u8);
    } else {
        let length = (last as u32).to_le_bytes();
        let significant = 4 - (last as u32).leading_zeros() as usize / 8;
        out.push(((59 + significant) << 2) as u8);
        out.extend_from_slice(&length[..significant]);
    }
    out.extend_from_slice(octets);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pseudo_random(seed: u64) -> impl FnMut(u64) -> u64 {
        let mut state = seed | 1;
        move |below| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        }
    }

    #[test]
    fn another_decoder_gets_back_what_went_in() {
        let mut snappy = Snappy::default();
        let mut next = pseudo_random(7);
        for round in 0..400 {
            // Between noise and repetition, short and long, near and far.
            let (length, alphabet) = (next(1 << (round % 18)) as usize, 1 + next(256));
            let mut input: Vec<u8> = Vec::new();
            while input.len() < length {
                if !input.is_empty() && next(3) > 0 {
                    let from = next(input.len() as u64) as usize;
                    let more: Vec<u8> = input[from..].iter().copied().take(next(200) as usize + 1).collect();
                    input.extend(more);
                } else {
                    (0..next(80) + 1).for_each(|_| input.push(next(alphabet) as u8));
                }
            }
            let mut packed = vec![0xee; 3];
            snappy.compress(&input, &mut packed);
            assert!(snap::raw::Decoder::new().decompress_vec(&packed[3..]).unwrap() == input, "round {round}");
            assert!(packed.len() <= 3 + snap::raw::max_compress_len(input.len()));
        }
    }

    #[test]
    fn positions_that_no_longer_fit_are_forgotten() {
        let mut snappy = Snappy { base: u32::MAX - 100, ..Snappy::default() };
        let input = b"repeated repeated repeated ".repeat(20);
        for _ in 0..3 {
            let mut packed = Vec::new();
            snappy.compress(&input, &mut packed);
            assert_eq!(snap::raw::Decoder::new().decompress_vec(&packed).unwrap(), input);
            assert!(packed.len() < input.len() / 4);
        }
    }
}
