//! As much of the Protocol Buffers wire format as remote write needs: varints, doubles, lengths.

/// Appends an unsigned integer.
pub fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Octets of an unsigned integer.
pub fn varint_len(value: u64) -> usize {
    (64 - (value | 1).leading_zeros() as usize).div_ceil(7)
}

/// A field of integer type (wire type 0). Negative ones take ten octets.
pub fn integer(out: &mut Vec<u8>, field: u32, value: u64) {
    varint(out, u64::from(field << 3));
    varint(out, value);
}

/// A field of type double (wire type 1).
pub fn double(out: &mut Vec<u8>, field: u32, value: f64) {
    varint(out, u64::from(field << 3 | 1));
    out.extend_from_slice(&value.to_bits().to_le_bytes());
}

/// The beginning of a field with a length (wire type 2); its octets follow.
pub fn header(out: &mut Vec<u8>, field: u32, len: usize) {
    varint(out, u64::from(field << 3 | 2));
    varint(out, len as u64);
}

/// A field of octets or text.
pub fn octets(out: &mut Vec<u8>, field: u32, data: &[u8]) {
    header(out, field, data.len());
    out.extend_from_slice(data);
}

/// Octets that a field (number below 16) of `len` octets takes with its beginning.
pub fn octets_len(len: usize) -> usize {
    1 + varint_len(len as u64) + len
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_what_is_written() {
        for value in [0, 1, 127, 128, 16_383, 16_384, u64::from(u32::MAX), u64::MAX] {
            let mut out = Vec::new();
            varint(&mut out, value);
            assert_eq!(out.len(), varint_len(value));
        }
        let mut out = Vec::new();
        octets(&mut out, 3, &[0; 300]);
        assert_eq!(out.len(), octets_len(300));
    }
}
