//! Sequences (RFC 8878 §3.1.1.3.2): so many literals, then so many octets from so far back.

use super::bits::Bits;
use super::fse::{Counts, SYMBOLS, State, Table};

/// Literals, then a match.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sequence {
    /// Literals before the match.
    pub literals: u32,
    /// Octets of the match, at least 3.
    pub length: u32,
    /// As the format has it: 1 to 3 for one of the last offsets, else the offset and 3.
    pub offset: u32,
}

/// The last three offsets, the last one first.
#[derive(Debug, Clone, Copy)]
pub struct Offsets(pub [u32; 3]);

impl Default for Offsets {
    fn default() -> Self {
        Self([1, 4, 8])
    }
}

impl Offsets {
    /// How the format says an offset after so many literals; it is the last one from now on.
    pub fn code(&mut self, offset: u32, literals: u32) -> u32 {
        let [first, second, third] = self.0;
        let known = self.0.iter().position(|&known| known == offset);
        // Without literals before it the very last one has no number: it would have gone on.
        let known = known.filter(|&place| place > 0 || literals > 0);
        self.0 = match known {
            Some(0) => self.0,
            Some(1) => [second, first, third],
            _ => [offset, first, second],
        };
        match known {
            Some(place) if literals > 0 => place as u32 + 1,
            Some(place) => place as u32,
            None => offset + 3,
        }
    }
}

/// First length of each code from 16 on, and how many bits tell the rest.
const LITERALS: [(u32, u32); 20] = [
    (16, 1),
    (18, 1),
    (20, 1),
    (22, 1),
    (24, 2),
    (28, 2),
    (32, 3),
    (40, 3),
    (48, 4),
    (64, 6),
    (128, 7),
    (256, 8),
    (512, 9),
    (1024, 10),
    (2048, 11),
    (4096, 12),
    (8192, 13),
    (16_384, 14),
    (32_768, 15),
    (65_536, 16),
];
/// The same for matches, from code 32 on.
const LENGTHS: [(u32, u32); 21] = [
    (35, 1),
    (37, 1),
    (39, 1),
    (41, 1),
    (43, 2),
    (47, 2),
    (51, 3),
    (59, 3),
    (67, 4),
    (83, 4),
    (99, 5),
    (131, 7),
    (259, 8),
    (515, 9),
    (1027, 10),
    (2051, 11),
    (4099, 12),
    (8195, 13),
    (16_387, 14),
    (32_771, 15),
    (65_539, 16),
];

/// A code, with the bits that come after it.
#[derive(Clone, Copy, Default)]
struct Code {
    code: u8,
    rest: u32,
    bits: u32,
}

fn code(value: u32, least: u32, ranges: &[(u32, u32)]) -> Code {
    let small = ranges[0].0;
    if value < small {
        return Code { code: (value - least) as u8, rest: 0, bits: 0 };
    }
    let place = ranges.partition_point(|(first, _)| *first <= value) - 1;
    let (first, bits) = ranges[place];
    Code { code: (small - least) as u8 + place as u8, rest: value - first, bits }
}

/// The codes of one sequence: literals, offset, length.
fn codes(sequence: &Sequence) -> [Code; 3] {
    let bits = sequence.offset.ilog2();
    let offset = Code { code: bits as u8, rest: sequence.offset - (1 << bits), bits };
    [code(sequence.literals, 0, &LITERALS), offset, code(sequence.length, 3, &LENGTHS)]
}

/// Appends the sequences section of a block.
pub fn sequences(all: &[Sequence], out: &mut Vec<u8>) {
    match all.len() {
        few @ 0..128 => out.push(few as u8),
        some @ 128..0x7f00 => out.extend([(some >> 8) as u8 + 128, some as u8]),
        many => {
            out.push(255);
            out.extend_from_slice(&((many - 0x7f00) as u16).to_le_bytes());
        }
    }
    let Some((last, before)) = all.split_last() else { return };
    let mut counts: [Counts; 3] = [[0; SYMBOLS]; 3];
    for sequence in all {
        for (counts, code) in counts.iter_mut().zip(codes(sequence)) {
            counts[usize::from(code.code)] += 1;
        }
    }
    let modes = out.len();
    out.push(0);
    // For each a table of its own, or, where only one code occurs, that code.
    let mut tables: [Option<Table>; 3] = [None, None, None];
    for (n, ((table, counts), log)) in tables.iter_mut().zip(&counts).zip([9, 8, 9]).enumerate() {
        let shift = 6 - 2 * n;
        let mut present = (0..SYMBOLS as u8).filter(|&symbol| counts[usize::from(symbol)] > 0);
        if let (Some(only), None) = (present.next(), present.next()) {
            out[modes] |= 1 << shift;
            out.push(only);
        } else {
            out[modes] |= 2 << shift;
            table.insert(Table::new(counts, log)).describe(out);
        }
    }
    let mut bits = Bits::new(out);
    let mut end = codes(last);
    let [mut literals, mut offset, mut length] =
        [0, 1, 2].map(|n| tables[n].as_ref().map(|table| State::new(table, end[n].code)));
    let encode = |state: &mut Option<State>, code: Code, bits: &mut Bits| {
        if let Some(state) = state {
            state.encode(code.code, bits);
        }
    };
    // What a decoder reads first is written last.
    for sequence in before.iter().rev().map(Some).chain([None]) {
        bits.put(end[0].rest, end[0].bits);
        bits.put(end[2].rest, end[2].bits);
        bits.put(end[1].rest, end[1].bits);
        let Some(sequence) = sequence else { break };
        end = codes(sequence);
        encode(&mut offset, end[1], &mut bits);
        encode(&mut length, end[2], &mut bits);
        encode(&mut literals, end[0], &mut bits);
    }
    [length, offset, literals].into_iter().flatten().for_each(|state| state.end(&mut bits));
    bits.end();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_has_one_code_and_the_bits_that_complete_it() {
        for value in (0..70_000).chain([131_071]) {
            let literals = code(value, 0, &LITERALS);
            assert!(literals.code <= 35 && literals.rest < 1 << literals.bits);
            let length = code(value + 3, 3, &LENGTHS);
            assert!(length.code <= 52 && length.rest < 1 << length.bits);
            let small = |code: &Code, count: u8| code.code < count;
            assert_eq!(small(&literals, 16), value < 16);
            assert_eq!(small(&length, 32), value < 32);
        }
    }

    /// RFC 8878 §3.1.1.5.
    #[test]
    fn the_last_offsets_have_numbers_and_trade_places() {
        let mut offsets = Offsets::default();
        for (offset, literals, code, after) in [
            (100, 1, 103, [100, 1, 4]),
            (100, 1, 1, [100, 1, 4]),
            (1, 1, 2, [1, 100, 4]),
            (4, 1, 3, [4, 1, 100]),
            (1, 0, 1, [1, 4, 100]),
            (100, 0, 2, [100, 1, 4]),
            (100, 0, 103, [100, 100, 1]),
        ] {
            assert_eq!((offsets.code(offset, literals), offsets.0), (code, after), "{offset} {literals}");
        }
    }
}
