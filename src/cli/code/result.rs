//! What comes on a code run's channel `result`: lines of JSON, written by code that nobody trusts. docs/code.md.

use std::collections::BTreeMap;

use serde::Deserialize;

/// Longest line that is read, in octets; of a longer one nothing is kept.
const LINE_MAX: usize = 32 * 1024 * 1024;

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Said {
    /// The value of the last expression, by media type.
    Value {
        /// Text, or base64 where the type is binary.
        forms: BTreeMap<String, String>,
    },
    /// Something shown on the way.
    Display {
        /// As of a value.
        forms: BTreeMap<String, String>,
    },
    /// What ended the code.
    Error {
        /// Its kind.
        name: String,
        /// Its text.
        value: String,
        /// Where it came from.
        traceback: String,
    },
    /// A file that the run made or changed.
    Artifact {
        /// Where.
        path: String,
        /// Octets.
        size: u64,
        /// In hex.
        sha256: String,
    },
}

/// Puts lines together.
#[derive(Debug, Default)]
pub struct Lines {
    begun: Vec<u8>,
    skipping: bool,
}

impl Lines {
    /// Takes octets; gives each line that says something known to `said`. Others are passed over.
    pub fn take(&mut self, mut octets: &[u8], mut said: impl FnMut(Said)) {
        while let Some(end) = octets.iter().position(|&octet| octet == b'\n') {
            let (head, rest) = octets.split_at(end);
            octets = rest.get(1..).unwrap_or_default();
            self.add(head);
            if !std::mem::take(&mut self.skipping)
                && let Ok(line) = serde_json::from_slice(&self.begun)
            {
                said(line);
            }
            self.begun.clear();
        }
        self.add(octets);
    }

    fn add(&mut self, octets: &[u8]) {
        if self.skipping || self.begun.len() + octets.len() > LINE_MAX {
            self.skipping = true;
            self.begun.clear();
        } else {
            self.begun.extend_from_slice(octets);
        }
    }
}

/// The octets of base64 with its padding; `None` when it is none.
pub fn base64(text: &str) -> Option<Vec<u8>> {
    let text = text.trim_end_matches('=').as_bytes();
    let mut out = Vec::with_capacity(text.len() / 4 * 3 + 2);
    for chunk in text.chunks(4) {
        if chunk.len() == 1 {
            return None;
        }
        let mut bits = 0u32;
        for at in 0..4 {
            let value = match chunk.get(at) {
                None => 0,
                Some(octet @ b'A'..=b'Z') => octet - b'A',
                Some(octet @ b'a'..=b'z') => octet - b'a' + 26,
                Some(octet @ b'0'..=b'9') => octet - b'0' + 52,
                Some(b'+') => 62,
                Some(b'/') => 63,
                Some(_) => return None,
            };
            bits = bits << 6 | u32::from(value);
        }
        let [_, a, b, c] = bits.to_be_bytes();
        out.extend_from_slice([a, b, c].get(..chunk.len() - 1).unwrap_or_default());
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(pieces: &[&[u8]]) -> Vec<Said> {
        let (mut lines, mut found) = (Lines::default(), Vec::new());
        pieces.iter().for_each(|piece| lines.take(piece, |said| found.push(said)));
        found
    }

    #[test]
    fn lines_come_in_pieces_and_what_is_not_known_is_passed_over() {
        let found = all(&[
            b"{\"type\":\"value\",\"forms\":{\"text/pl",
            b"ain\":\"2\"}}\nnonsense\n{\"type\":\"later\"}\n\xff\n{\"type\":\"artifact\",",
            b"\"path\":\"/a\",\"size\":3,\"sha256\":\"ab\"}\n{\"type\":",
        ]);
        let forms = BTreeMap::from([("text/plain".to_string(), "2".to_string())]);
        let artifact = Said::Artifact { path: "/a".to_string(), size: 3, sha256: "ab".to_string() };
        assert_eq!(found, [Said::Value { forms }, artifact]);
    }

    #[test]
    fn a_line_without_end_is_not_kept() {
        let mut lines = Lines::default();
        for _ in 0..LINE_MAX / 65_536 + 2 {
            lines.take(&[b'x'; 65_536], |_| panic!("nothing was said"));
            assert!(lines.begun.len() <= LINE_MAX);
        }
        let mut found = 0;
        lines.take(b"\n{\"type\":\"display\",\"forms\":{}}\n", |_| found += 1);
        assert_eq!(found, 1);
    }

    #[test]
    fn base64_is_read_with_any_rest() {
        for (text, octets) in [("", &b""[..]), ("YQ==", b"a"), ("YWI=", b"ab"), ("YWJj", b"abc"), ("//4=", b"\xff\xfe")]
        {
            assert_eq!(base64(text).as_deref(), Some(octets), "{text}");
        }
        assert_eq!((base64("Y"), base64("Y Q=")), (None, None));
    }
}
