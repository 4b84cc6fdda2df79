//! From messages to octets.

use super::MAX_LINE;
use super::message::{Arg, Fields, Message};

impl Message {
    /// Appends the message as it travels.
    pub fn encode(&self, out: &mut Vec<u8>) {
        put(out, self.tag().as_bytes());
        match self {
            Self::Request(request) => {
                word(out, &request.verb);
                for arg in &request.args {
                    match arg {
                        Arg::Positional(v) => {
                            out.push(b' ');
                            value(out, v);
                        }
                        Arg::Named(k, v) => pair(out, k, v),
                    }
                }
            }
            Self::Cancel { .. } => word(out, "cancel"),
            Self::Ok { fields, .. } => {
                word(out, "ok");
                pairs(out, fields);
            }
            Self::Err { error, .. } => {
                word(out, "err");
                word(out, &error.code);
                out.push(b' ');
                quoted(out, error.message.as_bytes());
                pairs(out, &error.fields);
            }
            Self::Item { fields, .. } => {
                word(out, "item");
                pairs(out, fields);
            }
            Self::Data { channel, payload, .. } => data_after_tag(out, channel, payload),
            Self::End { channel, .. } => {
                word(out, "end");
                word(out, channel);
            }
            Self::Credit { channel, octets, .. } => {
                word(out, "credit");
                word(out, channel);
                word(out, &octets.to_string());
            }
        }
        out.push(b'\n');
    }

    /// The message as it travels.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64);
        self.encode(&mut out);
        out
    }

    /// The length of its line where that is more than a line may have.
    pub fn over_long(&self) -> Option<usize> {
        let of = |fields: &Fields| fields.0.iter().map(|(key, value)| key.len() + value.len()).sum::<usize>();
        let octets = match self {
            Self::Ok { fields, .. } | Self::Item { fields, .. } => of(fields),
            Self::Err { error, .. } => error.message.len() + of(&error.fields),
            Self::Request(request) => {
                let of = |arg: &Arg| match arg {
                    Arg::Positional(value) => value.len(),
                    Arg::Named(key, value) => key.len() + value.len(),
                };
                request.args.iter().map(of).sum()
            }
            // A tag, a channel and a number at most.
            _ => return None,
        };
        // Most are short, and need not be written to know that: an octet takes four at most, what is around a value four.
        if octets < MAX_LINE / 16 && self.values() < MAX_LINE / 16 {
            return None;
        }
        Some(self.to_bytes().len()).filter(|length| *length > MAX_LINE)
    }

    fn values(&self) -> usize {
        match self {
            Self::Ok { fields, .. } | Self::Item { fields, .. } => fields.0.len(),
            Self::Err { error, .. } => error.fields.0.len(),
            Self::Request(request) => request.args.len(),
            _ => 0,
        }
    }
}

/// Appends a `data` frame whose payload the caller keeps.
pub(super) fn data(out: &mut Vec<u8>, tag: &str, channel: &str, payload: &[u8]) {
    put(out, tag.as_bytes());
    data_after_tag(out, channel, payload);
    out.push(b'\n');
}

fn data_after_tag(out: &mut Vec<u8>, channel: &str, payload: &[u8]) {
    word(out, "data");
    word(out, channel);
    word(out, &payload.len().to_string());
    out.push(b'\n');
    put(out, payload);
}

fn put(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(bytes);
}

fn word(out: &mut Vec<u8>, text: &str) {
    out.push(b' ');
    put(out, text.as_bytes());
}

fn pairs(out: &mut Vec<u8>, fields: &Fields) {
    for (k, v) in &fields.0 {
        pair(out, k, v);
    }
}

fn pair(out: &mut Vec<u8>, key: &str, v: &[u8]) {
    word(out, key);
    out.push(b'=');
    value(out, v);
}

/// Octets that may stand in a bare word: everything printable but space, quote, backslash and `=`.
pub(super) fn is_bare(octet: u8) -> bool {
    octet > b' ' && octet != 0x7f && !matches!(octet, b'"' | b'\\' | b'=')
}

fn value(out: &mut Vec<u8>, v: &[u8]) {
    if !v.is_empty() && v.iter().all(|&b| is_bare(b)) {
        put(out, v);
    } else {
        quoted(out, v);
    }
}

fn quoted(out: &mut Vec<u8>, v: &[u8]) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    out.push(b'"');
    for &octet in v {
        match octet {
            b'"' | b'\\' => out.extend_from_slice(&[b'\\', octet]),
            b'\n' => put(out, b"\\n"),
            0..=0x1f | 0x7f => {
                let digits = [HEX[usize::from(octet >> 4)], HEX[usize::from(octet & 15)]];
                put(out, b"\\x");
                put(out, &digits);
            }
            _ => out.push(octet),
        }
    }
    out.push(b'"');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Code, Error, Request};

    #[test]
    fn a_line_that_is_too_long_is_known_before_it_is_sent() {
        let exact =
            |length: usize| Message::item("t", Fields::new().with("k", "x".repeat(length - "t item k=\n".len())));
        assert_eq!(exact(MAX_LINE).to_bytes().len(), MAX_LINE);
        assert_eq!(exact(MAX_LINE).over_long(), None);
        assert_eq!(exact(MAX_LINE + 1).over_long(), Some(MAX_LINE + 1));
        let escaped = Message::err("t", Error::new(Code::Internal, "\0".repeat(MAX_LINE / 4)));
        assert!(escaped.over_long().is_some());
        let many = (0..9000).fold(Request::new("t", "a.b"), |request, _| request.arg("x\0"));
        assert!(Message::Request(many).over_long().is_some());
        assert_eq!(Message::data("t", "c", vec![0; MAX_LINE * 2]).over_long(), None);
    }
}
