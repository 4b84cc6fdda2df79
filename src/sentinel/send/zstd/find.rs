//! An input as literals and matches.

use std::ops::Range;

use super::super::matches::{REACH, Tables, common};
use super::sequences::{Offsets, Sequence};

/// Bits that a literal takes, about.
const LITERAL: i32 = 5;
/// Bits of a match besides its offset, about.
const MATCH: i32 = 12;
/// A match so long is taken at once.
const ENOUGH: usize = 10000;
/// Positions of a match's end that are noted.
const NOTED: usize = 2;

/// Finds; what it found for the last block stands in its lists.
#[derive(Default)]
pub struct Finder {
    tables: Tables,
    offsets: Offsets,
    /// What no match covers.
    pub literals: Vec<u8>,
    /// In order; literals after the last one are only in `literals`.
    pub sequences: Vec<Sequence>,
}

#[derive(Clone, Copy)]
struct Found {
    offset: usize,
    length: usize,
    saved: i32,
}

impl Finder {
    /// A new input.
    pub fn begin(&mut self, input: &[u8]) {
        self.tables.begin(input.len());
        self.offsets = Offsets::default();
    }

    /// The last offsets, as a decoder will know them.
    pub fn offsets(&self) -> Offsets {
        self.offsets
    }

    /// Goes back to earlier ones.
    pub fn restore(&mut self, offsets: Offsets) {
        self.offsets = offsets;
    }

    /// The next block of the input. Matches lie in it and come from anywhere before.
    pub fn block(&mut self, input: &[u8], block: Range<usize>) {
        self.literals.clear();
        self.sequences.clear();
        let end = block.end.saturating_sub(REACH);
        let (mut at, mut literal) = (block.start, block.start);
        let mut next = None;
        while at < end {
            let here = next.take().or_else(|| self.find(input, at, block.end, at == literal));
            let Some(found) = here else {
                at += 1;
                continue;
            };
            if found.length < ENOUGH
                && at + 1 < end
                && let Some(later) = self.find(input, at + 1, block.end, false)
                && later.saved - LITERAL > found.saved
            {
                next = Some(later);
                at += 1;
                continue;
            }
            let literals = (at - literal) as u32;
            self.literals.extend_from_slice(&input[literal..at]);
            let offset = self.offsets.code(found.offset as u32, literals);
            self.sequences.push(Sequence { literals, length: found.length as u32, offset });
            let after = at + found.length;
            for position in (at + 2).max(after.saturating_sub(NOTED))..after.min(end) {
                self.tables.note(input, position);
            }
            (at, literal) = (after, after);
        }
        self.literals.extend_from_slice(&input[literal..block.end]);
    }

    /// The best match for a position, up to `end`.
    #[inline]
    fn find(&mut self, input: &[u8], at: usize, end: usize, fresh: bool) -> Option<Found> {
        let mut best: Option<Found> = None;
        let four = |at: usize| input[at..].first_chunk::<4>().map_or(0, |four| u32::from_le_bytes(*four));
        let here = four(at);
        let mut consider = |from: usize, cost: i32| {
            if four(from) != here {
                return;
            }
            let length = 4 + common(input, from + 4, at + 4, end - at - 4);
            let saved = length as i32 * LITERAL - cost;
            if saved > best.map_or(0, |best| best.saved) {
                best = Some(Found { offset: at - from, length, saved });
            }
        };
        // Right after a match the last offset cannot go on.
        for &offset in &self.offsets.0[usize::from(fresh)..] {
            if let Some(from) = at.checked_sub(offset as usize) {
                consider(from, MATCH);
            }
        }
        for from in self.tables.find(input, at).into_iter().flatten() {
            consider(from, MATCH + (at - from).ilog2() as i32);
        }
        best
    }
}
