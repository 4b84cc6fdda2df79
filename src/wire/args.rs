//! Typed, bounded access to a request's arguments. Every failure names the key, the value and the limit.

use std::ops::RangeInclusive;

use super::error::{Code, Error};
use super::message::{Arg, Request};

/// The arguments of one request. Take what the verb knows, then call `finish`: what is left is unknown.
#[derive(Debug)]
pub struct Args {
    positional: std::vec::IntoIter<Vec<u8>>,
    named: Vec<(String, Vec<u8>)>,
}

impl Args {
    /// Takes a request's arguments apart.
    pub fn of(request: Request) -> Self {
        let mut positional = Vec::new();
        let mut named = Vec::new();
        for arg in request.args {
            match arg {
                Arg::Positional(value) => positional.push(value),
                Arg::Named(key, value) => named.push((key, value)),
            }
        }
        Self { positional: positional.into_iter(), named }
    }

    /// The next positional value as octets.
    pub fn next_bytes(&mut self, name: &str) -> Result<Vec<u8>, Error> {
        self.positional
            .next()
            .ok_or_else(|| Error::new(Code::MissingArgument, format!("{name} is missing")).with("argument", name))
    }

    /// The next positional value as text.
    pub fn next_text(&mut self, name: &str) -> Result<String, Error> {
        text(name, self.next_bytes(name)?)
    }

    /// All positional values that are left.
    pub fn rest(&mut self) -> Vec<Vec<u8>> {
        self.positional.by_ref().collect()
    }

    /// The value of a key as octets.
    pub fn bytes(&mut self, key: &str) -> Result<Option<Vec<u8>>, Error> {
        let mut found = self.all(key);
        if found.len() > 1 {
            return Err(
                Error::new(Code::BadArgument, format!("{key} is given {} times", found.len())).with("argument", key)
            );
        }
        Ok(found.pop())
    }

    /// Every value of a key that may be repeated, as octets.
    pub fn all(&mut self, key: &str) -> Vec<Vec<u8>> {
        let (found, rest): (Vec<_>, Vec<_>) = self.named.drain(..).partition(|(k, _)| k == key);
        self.named = rest;
        found.into_iter().map(|(_, v)| v).collect()
    }

    /// The value of a key as text.
    pub fn text(&mut self, key: &str) -> Result<Option<String>, Error> {
        self.bytes(key)?.map(|v| text(key, v)).transpose()
    }

    /// The value of a key as a number within limits.
    pub fn number(&mut self, key: &str, limits: RangeInclusive<u64>) -> Result<Option<u64>, Error> {
        let Some(given) = self.text(key)? else { return Ok(None) };
        if given.is_empty() || !given.bytes().all(|b| b.is_ascii_digit()) {
            return Err(
                Error::new(Code::BadArgument, format!("{key}={given} is not a whole number")).with("argument", key)
            );
        }
        match given.parse::<u64>() {
            Ok(number) if limits.contains(&number) => Ok(Some(number)),
            _ => Err(Error::new(
                Code::OutOfRange,
                format!("{key}={given} is out of range: {} to {}", limits.start(), limits.end()),
            )
            .with("argument", key)
            .with("min", limits.start())
            .with("max", limits.end())),
        }
    }

    /// Whether a key is given once and with this very value, which is taken then.
    pub fn take_word(&mut self, key: &str, word: &str) -> bool {
        let mut of_key = self.named.iter().enumerate().filter(|(_, (k, _))| k == key);
        let (first, second) = (of_key.next(), of_key.next());
        let found = first.filter(|(_, (_, value))| second.is_none() && value == word.as_bytes()).map(|(at, _)| at);
        found.map(|at| self.named.remove(at)).is_some()
    }

    /// The value of a key as `true` or `false`; `false` when not given.
    pub fn flag(&mut self, key: &str) -> Result<bool, Error> {
        match self.text(key)?.as_deref() {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(other) => {
                Err(Error::new(Code::BadArgument, format!("{key}={other} is neither true nor false"))
                    .with("argument", key))
            }
        }
    }

    /// Fails when something is left that the verb does not know.
    pub fn finish(mut self) -> Result<(), Error> {
        if let Some((key, _)) = self.named.first() {
            return Err(Error::new(Code::UnknownArgument, format!("{key} is not an argument of this verb"))
                .with("argument", key));
        }
        if let Some(value) = self.positional.next() {
            let shown = String::from_utf8_lossy(&value[..value.len().min(64)]).into_owned();
            return Err(Error::new(Code::UnknownArgument, format!("{shown} is one value too many")));
        }
        Ok(())
    }
}

fn text(name: &str, value: Vec<u8>) -> Result<String, Error> {
    String::from_utf8(value)
        .map_err(|_| Error::new(Code::BadArgument, format!("{name} is not UTF-8")).with("argument", name))
}
