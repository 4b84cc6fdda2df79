//! Passwords and tokens: never shown, overwritten when they are not needed any more.

use std::fmt;
use std::ops::{Deref, DerefMut};

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};
use zeroize::Zeroize;

/// A secret text.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct Secret(String);

impl Secret {
    /// Takes over a text.
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The text itself: for the one request that needs it.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<'de> Deserialize<'de> for Secret {
    /// An error does not repeat what was given.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self).map_err(|_| D::Error::custom("a secret is a text"))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[secret]")
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// What a task gives for its fields, passwords among them: all of it is overwritten when it is not needed any more.
#[derive(Clone, PartialEq, Default, Deserialize)]
#[serde(transparent)]
pub struct Given(Map<String, Value>);

impl From<Map<String, Value>> for Given {
    fn from(fields: Map<String, Value>) -> Self {
        Self(fields)
    }
}

impl Deref for Given {
    type Target = Map<String, Value>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for Given {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

impl Drop for Given {
    fn drop(&mut self) {
        self.0.values_mut().for_each(wipe);
    }
}

/// Overwrites every text in a value.
pub fn wipe(value: &mut Value) {
    match value {
        Value::String(text) => text.zeroize(),
        Value::Array(items) => items.iter_mut().for_each(wipe),
        Value::Object(fields) => fields.values_mut().for_each(wipe),
        _ => {}
    }
}

/// Base64 with padding (RFC 4648 section 4).
pub fn base64(data: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(data.len().div_ceil(3) * 4);
    for three in data.chunks(3) {
        let bits = three.iter().fold(0u32, |bits, &octet| bits << 8 | u32::from(octet)) << (8 * (3 - three.len()));
        for n in 0..4 {
            let digit = char::from(DIGITS[(bits >> (18 - 6 * n) & 63) as usize]);
            out.push(if n <= three.len() { digit } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_text_of_a_value_is_overwritten() {
        let mut value = serde_json::json!({"a": "secret", "b": [{"c": "secret"}, 7], "d": null});
        wipe(&mut value);
        assert_eq!(value, serde_json::json!({"a": "", "b": [{"c": ""}, 7], "d": null}));
    }

    #[test]
    fn the_examples_of_rfc_4648_hold() {
        for (text, encoded) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(text.as_bytes()), encoded);
        }
    }
}
