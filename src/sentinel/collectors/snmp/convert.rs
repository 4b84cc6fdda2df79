//! From variables to numbers and label values.

use super::ber::Value;
use super::oid::dotted;

/// How a value becomes a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Number {
    /// As it is; text is read as a decimal number.
    Plain,
    /// Octets as one big-endian number.
    Hex,
    /// Hundredths of a second, to seconds.
    Ticks,
}

impl Number {
    /// By the name that a task gives.
    pub fn of(name: &str) -> Option<Self> {
        Some(match name {
            "number" => Self::Plain,
            "hex" => Self::Hex,
            "ticks" => Self::Ticks,
            _ => return None,
        })
    }
}

/// A value as a number.
pub fn number(value: &Value, how: Number) -> Option<f64> {
    let number = match (value, how) {
        (Value::Octets(octets) | Value::Opaque(octets), Number::Hex) => {
            let digits = octets.strip_prefix(&[0]).unwrap_or(octets);
            (digits.len() <= 8).then(|| digits.iter().fold(0u64, |n, octet| n << 8 | u64::from(*octet)) as f64)?
        }
        (Value::Integer(number), _) => *number as f64,
        (Value::Counter(number) | Value::Gauge(number) | Value::Ticks(number), _) => *number as f64,
        (Value::Float(number), _) => *number,
        (Value::Octets(octets), _) => {
            let text = std::str::from_utf8(octets).ok()?;
            // Units often follow ("23.5 C"): what stands before the first space counts.
            let word = text.trim_matches(|c: char| c.is_whitespace() || c == '\0').split_whitespace().next()?;
            word.parse::<f64>().ok().filter(|number| number.is_finite())?
        }
        _ => return None,
    };
    Some(if how == Number::Ticks { number / 100.0 } else { number })
}

/// How a value becomes a label's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Text {
    /// Text where it is printable, hexadecimal digits otherwise.
    Auto,
    /// `00:11:22:33:44:55`
    Mac,
    /// `192.0.2.1`, `2001:db8::1`
    Address,
    /// Hexadecimal digits.
    Hex,
}

impl Text {
    /// By the name that a task gives.
    pub fn of(name: &str) -> Option<Self> {
        Some(match name {
            "text" => Self::Auto,
            "mac" => Self::Mac,
            "address" => Self::Address,
            "hexdigits" => Self::Hex,
            _ => return None,
        })
    }
}

/// A value as text.
pub fn text(value: &Value, how: Text) -> String {
    let octets = match value {
        Value::Octets(octets) | Value::Opaque(octets) => octets.as_slice(),
        Value::Address(address) => return std::net::Ipv4Addr::from(*address).to_string(),
        Value::Integer(number) => return number.to_string(),
        Value::Counter(number) | Value::Gauge(number) | Value::Ticks(number) => return number.to_string(),
        Value::Float(number) => return number.to_string(),
        Value::Oid(oid) => return dotted(&oid.0),
        Value::Null | Value::Missing | Value::End => return String::new(),
    };
    let digits = |between: &str| octets.iter().map(|octet| format!("{octet:02x}")).collect::<Vec<_>>().join(between);
    match how {
        Text::Mac => digits(":"),
        Text::Hex => digits(""),
        Text::Address => match octets.len() {
            4 => <[u8; 4]>::try_from(octets).map(|a| std::net::Ipv4Addr::from(a).to_string()).unwrap_or_default(),
            16 => <[u8; 16]>::try_from(octets).map(|a| std::net::Ipv6Addr::from(a).to_string()).unwrap_or_default(),
            _ => digits(""),
        },
        Text::Auto => match std::str::from_utf8(octets) {
            Ok(text) if text.chars().all(|c| !c.is_control() || c.is_whitespace() || c == '\0') => {
                text.trim_matches(|c: char| c.is_whitespace() || c == '\0').to_string()
            }
            _ => digits(""),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_become_numbers() {
        let octets = |text: &str| Value::Octets(text.as_bytes().to_vec());
        for (value, how, expected) in [
            (Value::Integer(-3), Number::Plain, Some(-3.0)),
            (Value::Ticks(12_345), Number::Ticks, Some(123.45)),
            (octets(" 23.5 C"), Number::Plain, Some(23.5)),
            (octets("n/a"), Number::Plain, None),
            (octets("inf"), Number::Plain, None),
            (Value::Octets(vec![0, 1, 0]), Number::Hex, Some(256.0)),
            (Value::Octets(vec![1; 9]), Number::Hex, None),
            (Value::Missing, Number::Plain, None),
        ] {
            assert_eq!(number(&value, how), expected, "{value:?}");
        }
    }

    #[test]
    fn values_become_text() {
        let mac = Value::Octets(vec![0, 0x1b, 0xff, 1, 2, 3]);
        assert_eq!(text(&mac, Text::Mac), "00:1b:ff:01:02:03");
        assert_eq!(text(&mac, Text::Auto), "001bff010203");
        assert_eq!(text(&Value::Octets(b"eth0\0".to_vec()), Text::Auto), "eth0");
        assert_eq!(text(&Value::Address([10, 0, 0, 1]), Text::Auto), "10.0.0.1");
        assert_eq!(text(&Value::Octets([vec![0x20, 1], vec![0; 13], vec![1]].concat()), Text::Address), "2001::1");
    }
}
