//! Zstandard (RFC 8878), the encoder's half: what VictoriaMetrics takes in place of snappy, at less than half the size.
//!
//! Written for messages of metrics of some hundred KiB: the frame is one segment whose length stands in front, blocks refer
//! to all before them, tables are made anew for each block, no dictionary, no checksum (there is one below, and receivers
//! do not ask for it). `find` sees what repeats itself, `huffman` writes what does not, `sequences` and `fse` where and how much.
//! Crates that do it are bindings to C of some 400 KiB, or make it as large as snappy.

mod bits;
mod find;
mod fse;
mod huffman;
mod sequences;

use self::find::Finder;

const MAGIC: u32 = 0xfd2f_b528;
/// One segment, four octets of length.
const DESCRIPTOR: u8 = 2 << 6 | 1 << 5;
/// No block stands for more.
const BLOCK: usize = 128 * 1024;

/// A compressor; keeps its tables for the next time.
#[derive(Default)]
pub struct Zstd {
    finder: Finder,
}

impl Zstd {
    /// Appends `input`, at most 1 GiB, to `out`: one frame.
    pub fn compress(&mut self, input: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(&MAGIC.to_le_bytes());
        out.push(DESCRIPTOR);
        out.extend_from_slice(&(input.len() as u32).to_le_bytes());
        self.finder.begin(input);
        let mut start = 0;
        loop {
            let end = (start + BLOCK).min(input.len());
            let last = end == input.len();
            let header = out.len();
            out.extend_from_slice(&[0; 3]);
            let before = self.finder.offsets();
            self.finder.block(input, start..end);
            huffman::literals(&self.finder.literals, out);
            sequences::sequences(&self.finder.sequences, out);
            let mut len = out.len() - header - 3;
            let mut kind = 2;
            if len >= end - start {
                // A block that is not compressed has no offsets either.
                self.finder.restore(before);
                (kind, len) = (0, end - start);
                out.truncate(header + 3);
                out.extend_from_slice(&input[start..end]);
            }
            let bits = u32::from(last) | kind << 1 | (len as u32) << 3;
            out[header..header + 3].copy_from_slice(&bits.to_le_bytes()[..3]);
            if last {
                return;
            }
            start = end;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{decode::unzstd, pseudo_random};
    use super::*;

    /// Frames one after the other are one stream for the program, so that all need it once.
    #[test]
    fn another_decoder_gets_back_what_went_in() {
        let mut zstd = Zstd::default();
        let mut next = pseudo_random(11);
        let (mut all, mut packed, mut largest) = (Vec::new(), Vec::new(), 0);
        for round in 0..600 {
            // Between noise and repetition, short and long, near and far, few octets and all.
            let (length, octets) = (next(1 << (round % 20)) as usize, next(9));
            let alphabet = 1 + next(1 << octets);
            let (noise, skew) = (next(80) + 1, next(3));
            let mut input: Vec<u8> = Vec::new();
            while input.len() < length {
                if !input.is_empty() && next(3) > 0 {
                    let from = next(input.len() as u64) as usize;
                    let more: Vec<u8> = input[from..].iter().copied().take(next(2000) as usize / 10 + 1).collect();
                    input.extend(more);
                } else {
                    let octet = (0..noise).map(|_| (0..skew).fold(next(alphabet), |octet, _| next(octet + 1)) as u8);
                    input.extend(octet.collect::<Vec<_>>());
                }
            }
            let before = packed.len();
            zstd.compress(&input, &mut packed);
            assert!(packed.len() - before <= input.len() + 16 + 3 * (input.len() / BLOCK));
            largest = largest.max(input.len());
            all.extend(input);
        }
        // Blocks of one octet, a match over blocks, nothing at all.
        for input in [vec![7; 3 * BLOCK + 1], [&all[..BLOCK], &all[..BLOCK]].concat(), Vec::new()] {
            let before = packed.len();
            zstd.compress(&input, &mut packed);
            assert!(packed.len() - before < 100 + input.len() / 2);
            all.extend(input);
        }
        assert!(largest > 2 * BLOCK);
        assert!(unzstd(&packed) == all);
    }
}
