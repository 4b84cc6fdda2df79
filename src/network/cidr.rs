//! Ranges of IPv4 addresses.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// Addresses that have their first `prefix` bits in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cidr {
    first: u32,
    prefix: u8,
}

impl Cidr {
    /// A range by its first address. For constants: bits behind the prefix are cut off.
    pub const fn new(first: [u8; 4], prefix: u8) -> Self {
        let prefix = if prefix > 32 { 32 } else { prefix };
        Self { first: u32::from_be_bytes(first) & mask(prefix), prefix }
    }

    /// The lowest address.
    pub fn first(self) -> Ipv4Addr {
        self.first.into()
    }

    /// The highest address.
    pub fn last(self) -> Ipv4Addr {
        (self.first | !mask(self.prefix)).into()
    }

    /// How many bits are in common.
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// The bits that are in common.
    pub fn mask(self) -> Ipv4Addr {
        mask(self.prefix).into()
    }

    /// Whether the address is one of these.
    pub fn contains(self, address: Ipv4Addr) -> bool {
        u32::from(address) & mask(self.prefix) == self.first
    }

    /// Whether all of `other` is in these.
    pub fn covers(self, other: Self) -> bool {
        self.prefix <= other.prefix && self.contains(other.first())
    }
}

const fn mask(prefix: u8) -> u32 {
    if prefix == 0 { 0 } else { u32::MAX << (32 - prefix) }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.first(), self.prefix)
    }
}

impl FromStr for Cidr {
    type Err = String;

    /// Reads `A.B.C.D/N`, or `A.B.C.D` for one address. The error is a sentence about the text.
    fn from_str(text: &str) -> Result<Self, String> {
        let shown: String = text.chars().take(40).collect();
        let (address, prefix) = text.split_once('/').unwrap_or((text, "32"));
        let parsed = address.parse::<Ipv4Addr>().ok().zip(
            prefix.parse::<u8>().ok().filter(|n| *n <= 32 && (prefix.len() == 1 || !prefix.starts_with(['0', '+']))),
        );
        let Some((address, prefix)) = parsed else {
            return Err(format!("{shown:?} is neither an IPv4 address nor a range of them, A.B.C.D/0 to /32"));
        };
        let range = Self::new(address.octets(), prefix);
        if range.first() != address {
            return Err(format!("{shown:?} has bits behind its prefix; the range is {range}"));
        }
        Ok(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_written_as_it_is_read() {
        for text in ["0.0.0.0/0", "10.0.0.0/8", "1.2.3.4/32", "255.255.255.254/31"] {
            assert_eq!(text.parse::<Cidr>().unwrap().to_string(), text);
        }
        assert_eq!("1.2.3.4".parse::<Cidr>().unwrap().to_string(), "1.2.3.4/32");
        for bad in ["", "1.2.3", "1.2.3.4/33", "1.2.3.4/", "/8", "1.2.3.4/-1", "1.2.3.4/08", "1.2.3.4/+8", "::/0"] {
            assert!(bad.parse::<Cidr>().is_err(), "{bad}");
        }
        let error = "10.0.0.1/8".parse::<Cidr>().unwrap_err();
        assert_eq!(error, "\"10.0.0.1/8\" has bits behind its prefix; the range is 10.0.0.0/8");
    }

    #[test]
    fn a_range_knows_its_addresses() {
        let range: Cidr = "10.4.0.0/14".parse().unwrap();
        assert_eq!((range.first(), range.last()), ([10, 4, 0, 0].into(), [10, 7, 255, 255].into()));
        assert!(range.contains([10, 7, 1, 1].into()) && !range.contains([10, 8, 0, 0].into()));
        assert!(range.covers("10.5.0.0/16".parse().unwrap()) && !range.covers("10.0.0.0/8".parse().unwrap()));
        let all: Cidr = "0.0.0.0/0".parse().unwrap();
        assert!(all.contains([255, 255, 255, 255].into()) && all.last() == Ipv4Addr::BROADCAST);
    }
}
