//! What a step of a build depends on, as one digest: the same key is the same content.

use std::io::{self, Read};

use sha2::{Digest, Sha256};

/// Raised when what steps do changes: then what was kept before is of no use.
const VERSION: &str = "warren build 1";

/// A digest of all that a step and those before it depend on, in lower-case hex.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key(String);

impl Key {
    /// Of nothing.
    pub fn new() -> Self {
        Self(VERSION.to_string()).then(&[])
    }

    /// With what follows.
    pub fn then(&self, parts: &[&[u8]]) -> Self {
        let mut hash = Sha256::new();
        hash.update(self.0.as_bytes());
        for part in parts {
            // With their lengths: no two lists are the same octets.
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        Self(hex(&hash.finalize()))
    }

    /// In hex.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for Key {
    fn default() -> Self {
        Self::new()
    }
}

/// Hashes what is read through it.
#[derive(Debug)]
pub struct Summed<R> {
    from: R,
    hash: Sha256,
}

impl<R> Summed<R> {
    /// Nothing was read yet.
    pub fn new(from: R) -> Self {
        Self { from, hash: Sha256::new() }
    }

    /// SHA-256 of what was read, in hex.
    pub fn digest(self) -> String {
        hex(&self.hash.finalize())
    }
}

impl<R: Read> Read for Summed<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let got = self.from.read(into)?;
        self.hash.update(&into[..got]);
        Ok(got)
    }
}

/// Octets in lower-case hex.
pub fn hex(octets: &[u8]) -> String {
    octets.iter().map(|octet| format!("{octet:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_parts_are_another_key() {
        let key = Key::new();
        assert_eq!(key.then(&[b"ab"]), key.then(&[b"ab"]));
        assert_ne!(key.then(&[b"ab"]), key.then(&[b"a", b"b"]));
        assert_ne!(key.then(&[b"a"]).then(&[b"b"]), key.then(&[b"b"]).then(&[b"a"]));
        assert_eq!(key.as_str().len(), 64);
    }
}
