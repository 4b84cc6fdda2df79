//! The part of ASN.1's basic encoding rules that SNMP uses (RFC 3417 §8; X.690): definite lengths, tags of one octet.
//! What is read came over UDP from anybody: every length is checked before it is used.

use std::fmt;

use super::oid::{MAX_IDS, Oid};

/// INTEGER
pub const INTEGER: u8 = 0x02;
/// OCTET STRING
pub const OCTETS: u8 = 0x04;
/// NULL
pub const NULL: u8 = 0x05;
/// OBJECT IDENTIFIER
pub const OID: u8 = 0x06;
/// SEQUENCE
pub const SEQUENCE: u8 = 0x30;

/// A value of a variable (RFC 3416 §3).
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Integer32, also larger ones from agents that do not know better.
    Integer(i64),
    /// Octet string.
    Octets(Vec<u8>),
    /// What a request has in place of a value.
    Null,
    /// Object identifier.
    Oid(Oid),
    /// IpAddress.
    Address([u8; 4]),
    /// Counter32 and Counter64.
    Counter(u64),
    /// Gauge32, Unsigned32.
    Gauge(u64),
    /// TimeTicks, in hundredths of a second.
    Ticks(u64),
    /// Opaque with a float inside (net-snmp).
    Float(f64),
    /// Opaque with anything else.
    Opaque(Vec<u8>),
    /// noSuchObject, noSuchInstance.
    Missing,
    /// endOfMibView.
    End,
}

/// What is wrong with octets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BerError {
    /// Ends in the middle.
    Short,
    /// A length of the indefinite form or of more than four octets.
    Length,
    /// Another tag than must be here.
    Tag(u8),
    /// A number that does not fit.
    Number,
    /// An object identifier that is none.
    Oid,
}

impl fmt::Display for BerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Short => f.write_str("it ends in the middle"),
            Self::Length => f.write_str("a length is of a form that SNMP does not have"),
            Self::Tag(tag) => write!(f, "tag {tag:#04x} is not expected here"),
            Self::Number => f.write_str("a number does not fit"),
            Self::Oid => f.write_str("an object identifier is malformed"),
        }
    }
}

/// Reads one element after another.
#[derive(Debug, Clone, Copy)]
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next element: its tag and content.
    pub fn next(&mut self) -> Result<(u8, &'a [u8]), BerError> {
        let (&tag, rest) = self.0.split_first().ok_or(BerError::Short)?;
        let (&first, rest) = rest.split_first().ok_or(BerError::Short)?;
        let (length, rest) = match first {
            0..=0x7f => (usize::from(first), rest),
            0x81..=0x84 => {
                let (octets, rest) = rest.split_at_checked(usize::from(first & 0x7f)).ok_or(BerError::Short)?;
                (octets.iter().fold(0usize, |length, octet| length << 8 | usize::from(*octet)), rest)
            }
            _ => return Err(BerError::Length),
        };
        let (content, rest) = rest.split_at_checked(length).ok_or(BerError::Short)?;
        self.0 = rest;
        Ok((tag, content))
    }

    /// The next element, which must have this tag.
    pub fn expect(&mut self, tag: u8) -> Result<&'a [u8], BerError> {
        match self.next()? {
            (found, content) if found == tag => Ok(content),
            (found, _) => Err(BerError::Tag(found)),
        }
    }

    /// The next element, a SEQUENCE.
    pub fn sequence(&mut self) -> Result<Reader<'a>, BerError> {
        self.expect(SEQUENCE).map(Reader)
    }

    /// The next element, an INTEGER of 32 bits.
    pub fn int(&mut self) -> Result<i32, BerError> {
        i32::try_from(integer(self.expect(INTEGER)?)?).map_err(|_| BerError::Number)
    }

    /// The next element as the value of a variable.
    pub fn value(&mut self) -> Result<Value, BerError> {
        let (tag, content) = self.next()?;
        Ok(match tag {
            INTEGER => Value::Integer(integer(content)?),
            OCTETS => Value::Octets(content.to_vec()),
            NULL => Value::Null,
            OID => Value::Oid(oid(content)?),
            0x40 => Value::Address(content.try_into().map_err(|_| BerError::Number)?),
            0x41 | 0x46 => Value::Counter(unsigned(content)?),
            0x42 | 0x47 => Value::Gauge(unsigned(content)?),
            0x43 => Value::Ticks(unsigned(content)?),
            0x44 => opaque(content),
            0x80 | 0x81 => Value::Missing,
            0x82 => Value::End,
            other => return Err(BerError::Tag(other)),
        })
    }
}

fn integer(content: &[u8]) -> Result<i64, BerError> {
    let negative = content.first().ok_or(BerError::Number)? & 0x80 != 0;
    if content.len() > 8 {
        return Err(BerError::Number);
    }
    let start = if negative { -1i64 } else { 0 };
    Ok(content.iter().fold(start, |value, octet| value << 8 | i64::from(*octet)))
}

/// Some agents leave out the zero octet in front of a number whose first bit is set: it is unsigned all the same.
fn unsigned(content: &[u8]) -> Result<u64, BerError> {
    let digits = match content {
        [] => return Err(BerError::Number),
        [0, digits @ ..] if digits.len() == 8 => digits,
        digits => digits,
    };
    if digits.len() > 8 {
        return Err(BerError::Number);
    }
    Ok(digits.iter().fold(0, |value, octet| value << 8 | u64::from(*octet)))
}

/// net-snmp puts floats into an Opaque: tag 0x9f 0x78 (float) or 0x9f 0x79 (double).
fn opaque(content: &[u8]) -> Value {
    match content {
        [0x9f, 0x78, 4, a, b, c, d] => Value::Float(f64::from(f32::from_be_bytes([*a, *b, *c, *d]))),
        [0x9f, 0x79, 8, double @ ..] => match <[u8; 8]>::try_from(double) {
            Ok(double) => Value::Float(f64::from_be_bytes(double)),
            Err(_) => Value::Opaque(content.to_vec()),
        },
        _ => Value::Opaque(content.to_vec()),
    }
}

/// An object identifier's content.
pub fn oid(content: &[u8]) -> Result<Oid, BerError> {
    let mut ids: Vec<u32> = Vec::with_capacity(content.len() + 1);
    let mut value: u32 = 0;
    for octet in content {
        if value > u32::MAX >> 7 {
            return Err(BerError::Oid);
        }
        value = value << 7 | u32::from(octet & 0x7f);
        if octet & 0x80 == 0 {
            if ids.is_empty() {
                let first = (value / 40).min(2);
                ids.extend([first, value - 40 * first]);
            } else {
                ids.push(value);
            }
            value = 0;
        }
        if ids.len() > MAX_IDS {
            return Err(BerError::Oid);
        }
    }
    // The last octet ends its number; 0x80 at the end leaves one open.
    if content.last().is_none_or(|last| last & 0x80 != 0) { Err(BerError::Oid) } else { Ok(Oid(ids)) }
}

/// Appends an element; `content` is written behind room for its length.
pub fn element(out: &mut Vec<u8>, tag: u8, content: impl FnOnce(&mut Vec<u8>)) {
    out.push(tag);
    let start = out.len();
    content(out);
    let length = out.len() - start;
    let octets = (length as u64).to_be_bytes();
    let head: &[u8] = match length {
        0..=0x7f => &octets[7..],
        0x80..=0xff => &[0x81, octets[7]],
        0x100..=0xffff => &[0x82, octets[6], octets[7]],
        _ => &[0x84, octets[4], octets[5], octets[6], octets[7]],
    };
    out.splice(start..start, head.iter().copied());
}

/// Appends an INTEGER in the fewest octets.
pub fn put_int(out: &mut Vec<u8>, value: i64) {
    put_signed(out, INTEGER, i128::from(value));
}

/// Appends an OCTET STRING.
pub fn put_octets(out: &mut Vec<u8>, octets: &[u8]) {
    element(out, OCTETS, |out| out.extend_from_slice(octets));
}

fn put_signed(out: &mut Vec<u8>, tag: u8, value: i128) {
    let octets = value.to_be_bytes();
    let fill = if value < 0 { 0xff } else { 0 };
    let mut from = 0;
    while from < 15 && octets[from] == fill && (octets[from + 1] ^ fill) & 0x80 == 0 {
        from += 1;
    }
    element(out, tag, |out| out.extend_from_slice(&octets[from..]));
}

/// Appends an OBJECT IDENTIFIER.
pub fn put_oid(out: &mut Vec<u8>, oid: &Oid) {
    element(out, OID, |out| {
        let (first, second) = (oid.0.first().copied().unwrap_or(0), oid.0.get(1).copied().unwrap_or(0));
        put_id(out, first.saturating_mul(40).saturating_add(second));
        oid.0.iter().skip(2).for_each(|id| put_id(out, *id));
    });
}

fn put_id(out: &mut Vec<u8>, id: u32) {
    for shift in [28, 21, 14, 7] {
        if id >> shift != 0 {
            out.push((id >> shift) as u8 & 0x7f | 0x80);
        }
    }
    out.push(id as u8 & 0x7f);
}

/// Appends a variable's value.
pub fn put_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::Integer(value) => put_int(out, *value),
        Value::Octets(octets) => put_octets(out, octets),
        Value::Null => element(out, NULL, |_| {}),
        Value::Oid(oid) => put_oid(out, oid),
        Value::Address(address) => element(out, 0x40, |out| out.extend_from_slice(address)),
        Value::Counter(value) => {
            put_signed(out, if *value > u64::from(u32::MAX) { 0x46 } else { 0x41 }, i128::from(*value));
        }
        Value::Gauge(value) => put_signed(out, 0x42, i128::from(*value)),
        Value::Ticks(value) => put_signed(out, 0x43, i128::from(*value)),
        Value::Float(value) => element(out, 0x44, |out| {
            out.extend_from_slice(&[0x9f, 0x79, 8]);
            out.extend_from_slice(&value.to_be_bytes());
        }),
        Value::Opaque(octets) => element(out, 0x44, |out| out.extend_from_slice(octets)),
        Value::Missing => element(out, 0x80, |_| {}),
        Value::End => element(out, 0x82, |_| {}),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_the_encoding_of_the_standard() {
        for (value, octets) in [
            (0i64, &[2u8, 1, 0][..]),
            (127, &[2, 1, 127]),
            (128, &[2, 2, 0, 128]),
            (-1, &[2, 1, 255]),
            (-129, &[2, 2, 0xff, 0x7f]),
            (i64::from(i32::MIN), &[2, 4, 0x80, 0, 0, 0]),
        ] {
            let mut out = Vec::new();
            put_int(&mut out, value);
            assert_eq!(out, octets);
            assert_eq!(Reader(octets).value(), Ok(Value::Integer(value)));
        }
    }

    #[test]
    fn every_value_survives_the_way_out_and_back() {
        let oid = |text: &str| Oid::parse(text).unwrap();
        for value in [
            Value::Octets(vec![7; 300]),
            Value::Null,
            Value::Oid(oid("1.3.6.1.4.1.4294967295.128.0")),
            Value::Oid(oid("2.999.1")),
            Value::Address([192, 0, 2, 1]),
            Value::Counter(u64::from(u32::MAX)),
            Value::Counter(u64::MAX),
            Value::Gauge(1 << 31),
            Value::Ticks(5),
            Value::Float(-1.5),
            Value::Opaque(vec![1, 2]),
            Value::Missing,
            Value::End,
        ] {
            let mut out = Vec::new();
            put_value(&mut out, &value);
            let mut reader = Reader(&out);
            assert_eq!(reader.value(), Ok(value));
            assert!(reader.is_empty());
        }
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        for (octets, error) in [
            (&[][..], BerError::Short),
            (&[2], BerError::Short),
            (&[2, 2, 1], BerError::Short),
            (&[2, 0x80, 0, 0], BerError::Length),
            (&[2, 0x85, 0, 0, 0, 0, 1, 1], BerError::Length),
            (&[2, 0x84, 0xff, 0xff, 0xff, 0xff, 1], BerError::Short),
            (&[2, 0], BerError::Number),
            (&[2, 9, 1, 1, 1, 1, 1, 1, 1, 1, 1], BerError::Number),
            (&[6, 0], BerError::Oid),
            (&[6, 1, 0x80], BerError::Oid),
            (&[6, 6, 0x2b, 0xff, 0xff, 0xff, 0xff, 0x7f], BerError::Oid),
            (&[0x40, 3, 1, 2, 3], BerError::Number),
            (&[0x1f, 0], BerError::Tag(0x1f)),
        ] {
            assert_eq!(Reader(octets).value(), Err(error), "{octets:?}");
        }
    }
}
