//! XXH64, by which zstd frames are checked (RFC 8878, 3.1.1; xxHash's own specification, "XXH64 algorithm description").

const PRIMES: [u64; 5] =
    [0x9E37_79B1_85EB_CA87, 0xC2B2_AE3D_27D4_EB4F, 0x1656_67B1_9E37_79F9, 0x85EB_CA77_C2B2_AE63, 0x27D4_EB2F_1656_67C5];
const STRIPE: usize = 32;

/// With the seed 0.
pub(super) struct Xxh64 {
    lanes: [u64; 4],
    /// What does not fill a stripe yet.
    held: Vec<u8>,
    length: u64,
}

fn round(lane: u64, input: u64) -> u64 {
    lane.wrapping_add(input.wrapping_mul(PRIMES[1])).rotate_left(31).wrapping_mul(PRIMES[0])
}

fn number(octets: &[u8]) -> u64 {
    octets.iter().rev().fold(0, |sum, &octet| sum << 8 | u64::from(octet))
}

impl Xxh64 {
    pub fn new() -> Self {
        let first = PRIMES[0].wrapping_add(PRIMES[1]);
        let lanes = [first, PRIMES[1], 0, 0u64.wrapping_sub(PRIMES[0])];
        Self { lanes, held: Vec::with_capacity(STRIPE), length: 0 }
    }

    fn take(lanes: &mut [u64; 4], stripe: &[u8]) {
        for (lane, input) in lanes.iter_mut().zip(stripe.chunks_exact(8)) {
            *lane = round(*lane, number(input));
        }
    }

    pub fn update(&mut self, mut octets: &[u8]) {
        self.length = self.length.wrapping_add(octets.len() as u64);
        if !self.held.is_empty() {
            let (more, rest) = octets.split_at(octets.len().min(STRIPE - self.held.len()));
            self.held.extend_from_slice(more);
            octets = rest;
            if self.held.len() < STRIPE {
                return;
            }
            Self::take(&mut self.lanes, &self.held);
            self.held.clear();
        }
        let stripes = octets.chunks_exact(STRIPE);
        self.held.extend_from_slice(stripes.remainder());
        stripes.for_each(|stripe| Self::take(&mut self.lanes, stripe));
    }

    pub fn digest(&self) -> u64 {
        let mut sum = if self.length < STRIPE as u64 {
            PRIMES[4]
        } else {
            let turned = self.lanes.iter().zip([1, 7, 12, 18]).map(|(lane, by)| lane.rotate_left(by));
            let sum = turned.fold(0u64, u64::wrapping_add);
            let merge = |sum: u64, lane: &u64| (sum ^ round(0, *lane)).wrapping_mul(PRIMES[0]).wrapping_add(PRIMES[3]);
            self.lanes.iter().fold(sum, merge)
        };
        sum = sum.wrapping_add(self.length);
        let eights = self.held.chunks_exact(8);
        let mut rest = eights.remainder();
        for input in eights {
            sum = (sum ^ round(0, number(input))).rotate_left(27).wrapping_mul(PRIMES[0]).wrapping_add(PRIMES[3]);
        }
        if rest.len() >= 4 {
            let (four, behind) = rest.split_at(4);
            sum ^= number(four).wrapping_mul(PRIMES[0]);
            sum = sum.rotate_left(23).wrapping_mul(PRIMES[1]).wrapping_add(PRIMES[2]);
            rest = behind;
        }
        for octet in rest {
            sum = (sum ^ u64::from(*octet).wrapping_mul(PRIMES[4])).rotate_left(11).wrapping_mul(PRIMES[0]);
        }
        for (shift, prime) in [(33, PRIMES[1]), (29, PRIMES[2])] {
            sum = (sum ^ sum >> shift).wrapping_mul(prime);
        }
        sum ^ sum >> 32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(octets: &[u8]) -> u64 {
        let mut sum = Xxh64::new();
        sum.update(octets);
        sum.digest()
    }

    #[test]
    fn sums_are_those_of_xxhash() {
        // What zstd writes behind frames of these: the lower half.
        let lower = |octets: &[u8]| sum(octets) as u32;
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!([lower(b"abc"), lower(&all[..45]), lower(&all)], [0xAD77_0999, 0x6409_ABDF, 0x06CD_904B]);
        for cut in 0..all.len() {
            let mut parts = Xxh64::new();
            parts.update(&all[..cut]);
            parts.update(&all[cut..]);
            assert_eq!(parts.digest(), sum(&all), "{cut}");
        }
    }
}
