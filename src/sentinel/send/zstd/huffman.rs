//! Literals by Huffman codes (RFC 8878 §4.2): the octets that no match covers.

use super::bits::Bits;
use super::fse::{Counts, SYMBOLS, State, Table};

/// No code is longer.
const MAX_BITS: u32 = 11;
/// The largest table of weights.
const WEIGHTS_LOG: u32 = 6;
/// From here on four streams, which a decoder reads side by side.
const ONE_STREAM: usize = 256;

/// Appends the literals section of a block: by whatever form is shortest.
pub fn literals(octets: &[u8], out: &mut Vec<u8>) {
    let mut counts = [0u32; 256];
    octets.iter().for_each(|&octet| counts[usize::from(octet)] += 1);
    let start = out.len();
    match counts.iter().filter(|&&count| count > 0).count() {
        0 => plain(0, octets.len(), out),
        1 => {
            plain(1, octets.len(), out);
            out.push(octets[0]);
            return;
        }
        _ => {
            if compressed(octets, &counts, out).is_some() && out.len() - start < octets.len() {
                return;
            }
            out.truncate(start);
            plain(0, octets.len(), out);
        }
    }
    out.extend_from_slice(octets);
}

/// The header of literals as they are (0), or of one that is repeated (1).
fn plain(kind: u32, len: usize, out: &mut Vec<u8>) {
    let len = len as u32;
    match len {
        0..32 => out.push((kind | len << 3) as u8),
        32..4096 => out.extend_from_slice(&((kind | 1 << 2 | len << 4) as u16).to_le_bytes()),
        _ => out.extend_from_slice(&(kind | 3 << 2 | len << 4).to_le_bytes()[..3]),
    }
}

/// Nothing where the weights cannot be told: a caller then leaves the literals as they are.
fn compressed(octets: &[u8], counts: &[u32; 256], out: &mut Vec<u8>) -> Option<()> {
    let lengths = lengths(counts);
    let longest = u32::from(lengths.iter().copied().max()?);
    let start = out.len();
    // The widest header: what it has to say is known at the end.
    let (format, width, header) = match octets.len() {
        0..ONE_STREAM => (0, 10, 3),
        ONE_STREAM..1024 => (1, 10, 3),
        1024..16_384 => (2, 14, 4),
        _ => (3, 18, 5),
    };
    out.resize(start + header, 0);
    weights(&lengths, longest, out)?;
    let codes = codes(&lengths, longest);
    let stream = |part: &[u8], out: &mut Vec<u8>| {
        let mut bits = Bits::new(out);
        for &octet in part.iter().rev() {
            let (code, length) = codes[usize::from(octet)];
            bits.put(u32::from(code), u32::from(length));
        }
        bits.end();
    };
    if format == 0 {
        stream(octets, out);
    } else {
        let jumps = out.len();
        out.resize(jumps + 6, 0);
        for (n, part) in octets.chunks(octets.len().div_ceil(4)).enumerate() {
            let before = out.len();
            stream(part, out);
            let len = u16::try_from(out.len() - before).ok()?;
            if n < 3 {
                out[jumps + 2 * n..][..2].copy_from_slice(&len.to_le_bytes());
            }
        }
    }
    let len = (out.len() - start - header) as u64;
    if len >= 1 << width {
        return None;
    }
    let bits = 2 | format << 2 | (octets.len() as u64) << 4 | len << (4 + width);
    out[start..start + header].copy_from_slice(&bits.to_le_bytes()[..header]);
    Some(())
}

/// Octets of a tree made by joining the two rarest again and again; then no longer than the format allows. At least two
/// symbols occur.
fn lengths(counts: &[u32; 256]) -> [u8; 256] {
    let mut leaves: Vec<(u32, u8)> =
        (0..=255u8).zip(counts).filter(|(_, count)| **count > 0).map(|(symbol, &count)| (count, symbol)).collect();
    leaves.sort_unstable();
    // Leaves first, then what joins them; both in growing order, so that the rarest is at the head of one of the two.
    let total = 2 * leaves.len() - 1;
    let mut weight: Vec<u32> = leaves.iter().map(|(count, _)| *count).collect();
    let mut parent = vec![0usize; total];
    let (mut leaf, mut joint) = (0, leaves.len());
    while weight.len() < total {
        let mut sum = 0;
        for _ in 0..2 {
            let take_leaf = leaf < leaves.len() && (joint >= weight.len() || weight[leaf] <= weight[joint]);
            let rarest = if take_leaf { &mut leaf } else { &mut joint };
            sum += weight[*rarest];
            parent[*rarest] = weight.len();
            *rarest += 1;
        }
        weight.push(sum);
    }
    let mut depth = vec![0u32; total];
    for node in (0..total - 1).rev() {
        depth[node] = depth[parent[node]] + 1;
    }
    // The rarest have the longest codes and stand first. Each code takes 2^-length of what there is; cutting them at the
    // limit takes too much.
    let mut cut: Vec<u32> = depth[..leaves.len()].iter().map(|&depth| depth.min(MAX_BITS)).collect();
    let part = |length: u32| 1i64 << (MAX_BITS - length);
    let mut over = cut.iter().map(|&length| part(length)).sum::<i64>() - (1 << MAX_BITS);
    while over > 0 {
        // The longest that can still grow gives the least away.
        let Some(length) = cut.iter_mut().filter(|length| **length < MAX_BITS).max_by_key(|length| **length) else {
            break;
        };
        *length += 1;
        over -= part(*length);
    }
    for length in cut.iter_mut().rev() {
        while *length > 1 && part(*length) <= -over {
            over += part(*length);
            *length -= 1;
        }
    }
    let mut lengths = [0; 256];
    for ((_, symbol), length) in leaves.iter().zip(cut) {
        lengths[usize::from(*symbol)] = length as u8;
    }
    lengths
}

/// Code and length of each octet: shorter ones are larger numbers, those of one length grow with the octet.
fn codes(lengths: &[u8; 256], longest: u32) -> [(u16, u8); 256] {
    let mut codes = [(0, 0); 256];
    let mut next = 0u32;
    for length in (1..=longest).rev() {
        for (code, _) in codes.iter_mut().zip(lengths).filter(|(_, of)| u32::from(**of) == length) {
            *code = ((next >> (longest - length)) as u16, length as u8);
            next += 1 << (longest - length);
        }
    }
    codes
}

/// Appends the tree: a weight for each octet up to the last but one that occurs.
fn weights(lengths: &[u8; 256], longest: u32, out: &mut Vec<u8>) -> Option<()> {
    let last = lengths.iter().rposition(|&length| length > 0)?;
    let weight = |&length: &u8| if length == 0 { 0 } else { longest as u8 + 1 - length };
    let weights: Vec<u8> = lengths[..last].iter().map(weight).collect();
    let mut counts: Counts = [0; SYMBOLS];
    weights.iter().for_each(|&weight| counts[usize::from(weight)] += 1);
    let start = out.len();
    out.push(0);
    if weights.len() > 1 && counts.iter().filter(|&&count| count > 0).count() > 1 {
        let table = Table::new(&counts, WEIGHTS_LOG);
        table.describe(out);
        // Two states take turns, the first one at the even places.
        let mut bits = Bits::new(out);
        let mut states: [Option<State>; 2] = [None, None];
        for (n, &weight) in weights.iter().enumerate().rev() {
            match &mut states[n % 2] {
                Some(state) => state.encode(weight, &mut bits),
                none => *none = Some(State::new(&table, weight)),
            }
        }
        states.into_iter().rev().flatten().for_each(|state| state.end(&mut bits));
        bits.end();
    }
    let len = out.len() - start - 1;
    if len > 0 && len < 128 && (len < weights.len().div_ceil(2) || weights.len() > 128) {
        out[start] = len as u8;
        return Some(());
    }
    // Four bits for each.
    out.truncate(start);
    if weights.len() > 128 {
        return None;
    }
    out.push(127 + weights.len() as u8);
    out.extend(weights.chunks(2).map(|pair| pair[0] << 4 | pair.get(1).copied().unwrap_or(0)));
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_fill_what_there_is_and_none_is_longer_than_the_limit() {
        // Fibonacci's numbers make the deepest tree there can be.
        let (mut one, mut two) = (1u32, 1u32);
        let mut deep = [0; 256];
        for count in &mut deep[..40] {
            *count = one;
            (one, two) = (two, one + two);
        }
        let mut wide = [1; 256];
        wide[9] = 1 << 30;
        let mut pair = [0; 256];
        (pair[3], pair[200]) = (1, 1_000_000);
        for counts in [deep, wide, pair, [5; 256]] {
            let lengths = lengths(&counts);
            let longest = u32::from(*lengths.iter().max().unwrap());
            assert!(longest <= MAX_BITS);
            let parts: u32 =
                lengths.iter().filter(|length| **length > 0).map(|&length| 1 << (longest - u32::from(length))).sum();
            assert_eq!(parts, 1 << longest);
            assert!(lengths.iter().zip(counts).all(|(&length, count)| (length > 0) == (count > 0)));
            // No code begins another.
            let codes = codes(&lengths, longest);
            for (a, (code, length)) in codes.iter().enumerate().filter(|(_, (_, length))| *length > 0) {
                for (b, (other, longer)) in codes.iter().enumerate().filter(|(_, (_, longer))| longer >= length) {
                    assert!(a == b || other >> (longer - length) != *code, "{a} {b}");
                }
            }
        }
    }
}
