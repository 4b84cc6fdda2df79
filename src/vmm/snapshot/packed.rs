//! Octets as a word of the grammar that is short, and quick to read: two hexadecimal digits each, and `zN.` for N zeroes.
//! What a processor saves is mostly zeroes.

use std::fmt::Write as _;

/// Shorter runs of zeroes are written as digits.
const LEAST_RUN: usize = 3;
/// Most octets of one word.
pub(super) const MAX_OCTETS: usize = 1 << 20;

/// The word.
pub(super) fn pack(octets: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut word = String::with_capacity(64);
    let mut rest = octets;
    while let Some((&octet, after)) = rest.split_first() {
        let zeroes = rest.iter().take_while(|octet| **octet == 0).count();
        if zeroes >= LEAST_RUN {
            let _ = write!(word, "z{zeroes}.");
            rest = &rest[zeroes..];
        } else {
            word.push(char::from(DIGITS[usize::from(octet >> 4)]));
            word.push(char::from(DIGITS[usize::from(octet & 15)]));
            rest = after;
        }
    }
    word
}

/// The octets of such a word, whoever wrote it; `None` where it is none, or too long.
pub(super) fn unpack(word: &[u8]) -> Option<Vec<u8>> {
    let digit = |character: u8| char::from(character).to_digit(16).map(|digit| digit as u8);
    let mut octets = Vec::with_capacity(word.len() / 2);
    let mut rest = word;
    while let Some((&first, after)) = rest.split_first() {
        if first == b'z' {
            let end = after.iter().position(|character| *character == b'.')?;
            let zeroes: usize = std::str::from_utf8(&after[..end]).ok()?.parse().ok()?;
            if zeroes > MAX_OCTETS - octets.len() {
                return None;
            }
            octets.resize(octets.len() + zeroes, 0);
            rest = &after[end + 1..];
        } else {
            let (&second, after) = after.split_first()?;
            if octets.len() == MAX_OCTETS {
                return None;
            }
            octets.push(digit(first)? << 4 | digit(second)?);
            rest = after;
        }
    }
    Some(octets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_octets_come_back() {
        let all: Vec<u8> = (0..=255).collect();
        for octets in [&[][..], &[0], &[0, 0], &[0; 3], &[0; 5000], &[7, 0, 0, 0, 0, 0, 255], &all] {
            assert_eq!(unpack(pack(octets).as_bytes()).as_deref(), Some(octets));
        }
        assert_eq!(pack(&[&[1, 2][..], &[0; 4094]].concat()), "0102z4094.");
    }

    #[test]
    fn what_is_no_such_word_is_refused() {
        for word in ["1", "0g", "z", "z4", "zx.", "z-1.", "012", "z1048577.", "z1048576.00", "z99999999999999999999."] {
            assert_eq!(unpack(word.as_bytes()), None, "{word}");
        }
        assert_eq!(unpack(b"z1048576.").map(|octets| octets.len()), Some(MAX_OCTETS));
    }
}
