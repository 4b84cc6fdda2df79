//! Where the same octets stood before: what both compressors look for.
//!
//! Messages of metrics repeat themselves in short and in long stretches, and the nearest short one hides the better
//! long one. So two tables are kept, by the next 6 and by the next 12 octets.

/// Octets that are looked at from a position on; nearer to the end nothing is sought.
pub const REACH: usize = 16;
const TABLE_BITS: u32 = 15;

/// By hash the last position with it.
pub struct Tables {
    /// Positions and `base`; what is below `base` is of an earlier input.
    short: Vec<u32>,
    long: Vec<u32>,
    base: u32,
    /// Octets of the input.
    len: u32,
}

impl Default for Tables {
    fn default() -> Self {
        Self { short: vec![0; 1 << TABLE_BITS], long: vec![0; 1 << TABLE_BITS], base: 1, len: 0 }
    }
}

impl Tables {
    /// Forgets the input before. The next one has `len` octets, at most 1 GiB.
    pub fn begin(&mut self, len: usize) {
        let base = u64::from(self.base) + u64::from(self.len);
        if base + len as u64 > u64::from(u32::MAX) {
            *self = Self::default();
        } else {
            self.base = base as u32;
        }
        self.len = len as u32;
    }

    /// Earlier positions whose octets may be those of `at`: the one for a long stretch, the one for a short one. Then
    /// remembers `at`.
    #[inline]
    pub fn find(&mut self, input: &[u8], at: usize) -> [Option<usize>; 2] {
        let (short, long) = hashes(input, at);
        let noted = self.base + at as u32;
        let before = [&mut self.long[long], &mut self.short[short]].map(|place| std::mem::replace(place, noted));
        before.map(|noted| noted.checked_sub(self.base).map(|from| from as usize))
    }

    /// Remembers a position.
    #[inline]
    pub fn note(&mut self, input: &[u8], at: usize) {
        let (short, long) = hashes(input, at);
        let noted = self.base + at as u32;
        (self.short[short], self.long[long]) = (noted, noted);
    }
}

/// Of the next 6 and of the next 12 octets.
#[inline]
fn hashes(input: &[u8], at: usize) -> (usize, usize) {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let word = |at: usize| input[at..].first_chunk::<8>().map_or(0, |word| u64::from_le_bytes(*word));
    let short = (word(at) << 16).wrapping_mul(ODD);
    let long = word(at).wrapping_mul(ODD) ^ (word(at + 4) >> 32).wrapping_mul(ODD).rotate_left(17);
    let top = |hash: u64| (hash >> (64 - TABLE_BITS)) as usize;
    (top(short), top(long.wrapping_mul(ODD)))
}

/// Octets that are the same from both positions on, at most `most` and to the end of the input.
#[inline]
pub fn common(input: &[u8], from: usize, at: usize, most: usize) -> usize {
    let (a, b) = (&input[from..], &input[at..]);
    let most = b.len().min(most);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_that_no_longer_fit_are_forgotten() {
        let mut tables = Tables { base: u32::MAX - 100, ..Tables::default() };
        let input = b"repeated repeated repeated ".repeat(20);
        for _ in 0..3 {
            tables.begin(input.len());
            assert_eq!(tables.find(&input, 9), [None, None]);
            tables.note(&input, 0);
            assert_eq!(tables.find(&input, 9), [Some(0), Some(0)]);
            assert_eq!(common(&input, 0, 9, 100), 100);
        }
    }
}
