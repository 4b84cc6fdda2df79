//! Snappy's block format (google/snappy, format_description.txt), written for size: about a fifth smaller than the usual
//! encoder makes remote write's messages, for some more time: for 2.0, whose receivers are chosen for size. What it makes
//! any decoder reads.
//!
//! Of what `matches` finds for a position that one is taken which saves most; a better one an octet later goes before.

use super::matches::{REACH, Tables, common};
use super::protobuf::varint;

/// Longest copy.
const MAX_COPY: usize = 64;
/// Positions of a copy's end that are noted.
const NOTED: usize = 16;

/// A compressor; keeps its tables for the next time.
#[derive(Default)]
pub struct Snappy {
    tables: Tables,
}

/// What was found: how many octets back, how many octets, how many of them are saved.
#[derive(Clone, Copy)]
struct Found {
    offset: usize,
    length: usize,
    saved: usize,
}

impl Snappy {
    /// Appends `input`, at most 1 GiB, to `out`.
    pub fn compress(&mut self, input: &[u8], out: &mut Vec<u8>) {
        self.tables.begin(input.len());
        varint(out, input.len() as u64);
        let end = input.len().saturating_sub(REACH);
        let (mut at, mut literal) = (0, 0);
        let mut next = None;
        while at < end {
            let here = next.take().or_else(|| self.find(input, at));
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
            for position in (at + 2).max(after.saturating_sub(NOTED))..after.min(end) {
                self.tables.note(input, position);
            }
            (at, literal) = (after, after);
        }
        put_literal(out, &input[literal..]);
    }

    /// The best copy for a position before the last `REACH` octets.
    fn find(&mut self, input: &[u8], at: usize) -> Option<Found> {
        let best = self.tables.find(input, at).into_iter().flatten().filter_map(|from| {
            let length = common(input, from, at, MAX_COPY);
            let offset = at - from;
            let saved = length.checked_sub(cost(offset, length)).filter(|saved| length >= 4 && *saved > 0)?;
            Some(Found { offset, length, saved })
        });
        best.max_by_key(|found| found.saved)
    }
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
    use super::super::tests::pseudo_random;
    use super::*;

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
}
