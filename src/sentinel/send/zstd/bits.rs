//! Bits in the order in which zstd wants them: written forwards from the lowest bit of each octet on, read backwards from a
//! final one (RFC 8878 §4.1, "Bitstream").

/// Appends bits to octets.
pub struct Bits<'a> {
    out: &'a mut Vec<u8>,
    held: u64,
    count: u32,
}

impl<'a> Bits<'a> {
    /// Begins at the end of `out`.
    pub fn new(out: &'a mut Vec<u8>) -> Self {
        Self { out, held: 0, count: 0 }
    }

    /// The lowest `count` bits, at most 32, of a value that has no others.
    pub fn put(&mut self, value: u32, count: u32) {
        debug_assert!(count == 32 || value >> count == 0);
        self.held |= u64::from(value) << self.count;
        self.count += count;
        if self.count >= 32 {
            self.out.extend_from_slice(&(self.held as u32).to_le_bytes());
            self.held >>= 32;
            self.count -= 32;
        }
    }

    /// Ends with the octet that holds the last bit, without a mark.
    pub fn pad(self) {
        let octets = self.count.div_ceil(8) as usize;
        self.out.extend_from_slice(&self.held.to_le_bytes()[..octets]);
    }

    /// Ends with the one that a reader begins at.
    pub fn end(mut self) {
        self.put(1, 1);
        self.pad();
    }
}
