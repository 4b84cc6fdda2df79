//! Finite state entropy (RFC 8878 §4.1): symbols by fractions of a bit, the rarer the more.
//!
//! A table has 2^`log` states, shared out to the symbols by how often each occurs. The encoder goes through the symbols
//! from the last to the first; at each it leaves those bits of its state that the decoder will need to come back.

use super::bits::Bits;

/// Most symbols of any alphabet here (codes of match lengths).
pub const SYMBOLS: usize = 53;
/// The largest table that the format allows for anything.
const MAX_LOG: u32 = 9;

/// How often each symbol occurs.
pub type Counts = [u32; SYMBOLS];

/// A table made for what is to be encoded.
pub struct Table {
    log: u32,
    /// States of each symbol; their sum is 2^`log`.
    shares: [u16; SYMBOLS],
    /// The states, symbol after symbol, each one's in growing order.
    states: [u16; 1 << MAX_LOG],
    /// Where those of each symbol begin.
    begin: [u16; SYMBOLS],
}

impl Table {
    /// For `counts` that have at least two symbols; `log` is the largest that the format allows here, 5–9.
    pub fn new(counts: &Counts, log: u32) -> Self {
        let total: u32 = counts.iter().sum();
        let present = counts.iter().filter(|&&count| count > 0).count() as u32;
        debug_assert!(present >= 2 && log <= MAX_LOG);
        // A table costs octets too: no finer than there are symbols, and never without a state for each.
        let wanted = total.ilog2().saturating_sub(1).max(present.next_power_of_two().ilog2() + 1);
        let log = wanted.clamp(5, log);
        let shares = share(counts, total, log);
        let mut table = Self { log, shares, states: [0; 1 << MAX_LOG], begin: [0; SYMBOLS] };
        let mut sum = 0;
        for (begin, &share) in table.begin.iter_mut().zip(&shares) {
            *begin = sum;
            sum += share;
        }
        // The order in which the format deals out the states.
        let size = 1usize << log;
        let step = (size >> 1) + (size >> 3) + 3;
        let mut owner = [0u8; 1 << MAX_LOG];
        let mut at = 0;
        for (symbol, &share) in shares.iter().enumerate() {
            for _ in 0..share {
                owner[at] = symbol as u8;
                at = (at + step) & (size - 1);
            }
        }
        let mut next = table.begin;
        for (state, &symbol) in owner[..size].iter().enumerate() {
            let slot = &mut next[usize::from(symbol)];
            table.states[usize::from(*slot)] = state as u16;
            *slot += 1;
        }
        table
    }

    /// Appends the shares, from which a decoder builds the same table.
    pub fn describe(&self, out: &mut Vec<u8>) {
        let mut bits = Bits::new(out);
        bits.put(self.log - 5, 4);
        let mut left = 1u32 << self.log;
        let mut symbol = 0;
        while left > 0 {
            let share = u32::from(self.shares[symbol]);
            symbol += 1;
            // One of `left + 2` numbers: the share and one. So many of the smaller ones take a bit less.
            let most = left + 1;
            let width = most.ilog2() + 1;
            let short = (1 << width) - 1 - most;
            let number = share + 1;
            let half = 1 << (width - 1);
            if number < short {
                bits.put(number, width - 1);
            } else {
                bits.put(if number < half { number } else { number + short }, width);
            }
            left -= share;
            if share == 0 {
                // How many more without a state follow, by threes.
                let more = self.shares[symbol..].iter().take_while(|&&share| share == 0).count();
                symbol += more;
                (0..more / 3).for_each(|_| bits.put(3, 2));
                bits.put((more % 3) as u32, 2);
            }
        }
        bits.pad();
    }
}

/// 2^`log` states by the counts: at least one for each symbol that occurs, what rounding leaves over to the most frequent.
fn share(counts: &Counts, total: u32, log: u32) -> [u16; SYMBOLS] {
    let size = 1u64 << log;
    let mut shares = [0u16; SYMBOLS];
    let mut left = size as i32;
    for (share, &count) in shares.iter_mut().zip(counts) {
        if count > 0 {
            *share = ((u64::from(count) * size + u64::from(total) / 2) / u64::from(total)).max(1) as u16;
            left -= i32::from(*share);
        }
    }
    while left != 0 {
        let step = left.signum();
        // The largest ones notice least.
        let Some(largest) = shares.iter_mut().max() else { break };
        let change = if step > 0 { left } else { left.max(-(i32::from(*largest) / 4).max(1)) };
        *largest = (i32::from(*largest) + change) as u16;
        left -= change;
    }
    shares
}

/// Where an encoder stands in a table.
pub struct State<'a> {
    table: &'a Table,
    /// From 2^`log` to twice that.
    at: u32,
}

impl<'a> State<'a> {
    /// Stands at the last symbol.
    pub fn new(table: &'a Table, symbol: u8) -> Self {
        let state = table.states[usize::from(table.begin[usize::from(symbol)])];
        Self { table, at: (1 << table.log) + u32::from(state) }
    }

    /// The symbol before.
    pub fn encode(&mut self, symbol: u8, bits: &mut Bits) {
        let symbol = usize::from(symbol);
        let share = u32::from(self.table.shares[symbol]);
        let mut count = self.table.log - share.ilog2();
        count -= u32::from(self.at >> count < share);
        bits.put(self.at & ((1 << count) - 1), count);
        let slot = u32::from(self.table.begin[symbol]) + (self.at >> count) - share;
        self.at = (1 << self.table.log) + u32::from(self.table.states[slot as usize]);
    }

    /// Where a decoder begins.
    pub fn end(self, bits: &mut Bits) {
        bits.put(self.at - (1 << self.table.log), self.table.log);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_symbol_that_occurs_has_a_state_and_together_they_fill_the_table() {
        let one_of_many = |rare: u32| {
            let mut counts: Counts = [rare; SYMBOLS];
            counts[5] = 1_000_000;
            counts
        };
        let mut two: Counts = [0; SYMBOLS];
        (two[0], two[52]) = (1, 1);
        for counts in [one_of_many(1), one_of_many(0).map(|count| count.max(1)), [3; SYMBOLS], two] {
            let table = Table::new(&counts, 9);
            assert_eq!(table.shares.iter().map(|&share| u32::from(share)).sum::<u32>(), 1 << table.log);
            assert!(table.shares.iter().zip(counts).all(|(&share, count)| (share > 0) == (count > 0)));
            let mut states = table.states[..1 << table.log].to_vec();
            states.sort_unstable();
            assert!(states.iter().copied().eq(0..1 << table.log));
        }
    }
}
