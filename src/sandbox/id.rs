//! Names of sandboxes: a random id each, and an optional name that a person chose.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};

use crate::wire::{Code, Error};

/// Characters of an id. Twelve of them give 62 bits.
const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
const LENGTH: usize = 12;
/// Longest name a sandbox may be given, in characters.
const MAX_NAME: usize = 63;

/// Random numbers of the node's kernel.
pub fn random(into: &mut [u8]) -> io::Result<()> {
    File::open("/dev/urandom")?.read_exact(into)
}

/// A sandbox's id: twelve characters of `[a-z0-9]`, the first a letter.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SandboxId(String);

impl SandboxId {
    /// A fresh random id.
    pub fn random() -> io::Result<Self> {
        let mut octets = [0u8; 8];
        random(&mut octets)?;
        let mut number = u64::from_le_bytes(octets);
        let mut text = String::with_capacity(LENGTH);
        for at in 0..LENGTH as u64 {
            let base = if at == 0 { 26 } else { 36 };
            let index = usize::try_from(number % base).unwrap_or(0);
            text.push(char::from(ALPHABET[index]));
            number /= base;
        }
        Ok(Self(text))
    }

    /// An id as it was written, where it has the form of one.
    pub fn parse(text: &str) -> Option<Self> {
        let formed = text.len() == LENGTH
            && text.bytes().all(|b| ALPHABET.contains(&b))
            && text.bytes().next().is_some_and(|b| b.is_ascii_lowercase());
        formed.then(|| Self(text.to_string()))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SandboxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Checks a name that a person gives: `[a-z0-9]` first, then `[a-z0-9._-]`, at most 63 in all. Fails with `BAD_ARGUMENT`.
pub fn check_name(what: &str, name: &str) -> Result<(), Error> {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'_' | b'-');
    let formed = name.len() <= MAX_NAME
        && name.bytes().all(inner)
        && name.bytes().next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    if formed {
        return Ok(());
    }
    let shown: String = name.chars().take(MAX_NAME + 1).collect();
    Err(Error::new(
        Code::BadArgument,
        format!("{what}={shown} is not a name: 1 to {MAX_NAME} of a-z 0-9 . _ -, the first a letter or digit"),
    )
    .with("argument", what))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_ids_have_the_form_and_differ() {
        let ids: std::collections::HashSet<_> =
            (0..1000).map(|_| SandboxId::random().expect("urandom").as_str().to_string()).collect();
        assert_eq!(ids.len(), 1000);
        assert!(ids.iter().all(|id| SandboxId::parse(id).is_some()));
    }

    #[test]
    fn names_that_could_leave_a_directory_are_refused() {
        for name in ["", ".", "..", "../x", "a/b", "A", "-a", "a b", &"a".repeat(64)] {
            assert!(check_name("name", name).is_err(), "{name:?}");
        }
        for name in ["a", "0", "web-1", "a.b_c", &"a".repeat(63)] {
            assert!(check_name("name", name).is_ok(), "{name:?}");
        }
    }
}
