//! The octets of the port. The node writes whole messages, but a bridge, a QEMU or a guest that went away may have
//! left part of one in between: before the node's greeting nothing is believed but the greeting.

use super::relay::session_of;
use crate::wire::{Decoded, Decoder};

/// Longer than any greeting.
const MAX_GREETING: usize = 256;

#[derive(Debug)]
enum Mode {
    /// Looking for the greeting, line by line. Holds the current line; one that is too long is not kept.
    Seeking { line: Vec<u8> },
    /// Messages.
    Decoding(Decoder),
}

/// Cuts the port's octets into messages, from the greeting on.
#[derive(Debug)]
pub struct PortReader {
    mode: Mode,
    /// The last octets that came, to find a greeting that a cut frame swallowed.
    tail: Vec<u8>,
    /// Octets behind the greeting, in the order they came.
    rest: Vec<u8>,
}

impl Default for PortReader {
    fn default() -> Self {
        Self { mode: Mode::Seeking { line: Vec::new() }, tail: Vec::new(), rest: Vec::new() }
    }
}

impl PortReader {
    /// At the start of a connection.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes octets that arrived. Call `next` until it gives `None` before the next `push`.
    pub fn push(&mut self, octets: &[u8]) {
        self.tail.extend_from_slice(&octets[octets.len().saturating_sub(MAX_GREETING)..]);
        self.tail.drain(..self.tail.len().saturating_sub(MAX_GREETING));
        match &mut self.mode {
            Mode::Decoding(decoder) => decoder.push(octets),
            Mode::Seeking { .. } => self.rest.extend_from_slice(octets),
        }
    }

    /// The next message, or `None` until more octets arrive.
    #[allow(clippy::should_implement_trait)] // not an iterator: `None` is not the end
    pub fn next(&mut self) -> Option<Decoded> {
        match &mut self.mode {
            Mode::Decoding(decoder) => match decoder.next() {
                // Part of a long line may have been cut, and the greeting then stands behind it in the same line.
                Some(bad @ Decoded::Bad { .. }) if decoder.is_idle() => {
                    Some(greeting_at_end(&self.tail).unwrap_or(bad))
                }
                other => other,
            },
            Mode::Seeking { line } => {
                let rest = std::mem::take(&mut self.rest);
                for (at, &octet) in rest.iter().enumerate() {
                    if octet != b'\n' {
                        if line.len() <= MAX_GREETING {
                            line.push(octet);
                        }
                        continue;
                    }
                    let found = greeting(line);
                    line.clear();
                    if found.is_some() {
                        let mut decoder = Decoder::new();
                        decoder.push(&rest[at + 1..]);
                        self.mode = Mode::Decoding(decoder);
                        return found;
                    }
                }
                None
            }
        }
    }

    /// Whether part of a message has come: the rest must follow at once, as the node writes whole messages.
    pub fn is_in_message(&self) -> bool {
        matches!(&self.mode, Mode::Decoding(decoder) if !decoder.is_idle())
    }

    /// For when the rest of a message does not come: gives the greeting that stands where the rest should, if it is
    /// the last that came. That is what a node does that was switched off in the middle of a message.
    pub fn greeting_in_message(&mut self) -> Option<Decoded> {
        if !self.is_in_message() {
            return None;
        }
        let found = greeting_at_end(&self.tail)?;
        self.mode = Mode::Decoding(Decoder::new());
        Some(found)
    }
}

const GREETING_START: &[u8] = b"- item event=port ";

/// The greeting that these octets end with, whatever stands before it.
fn greeting_at_end(octets: &[u8]) -> Option<Decoded> {
    let line = octets.strip_suffix(b"\n")?;
    let start = line.windows(GREETING_START.len()).rposition(|window| window == GREETING_START)?;
    greeting(&line[start..])
}

fn greeting(line: &[u8]) -> Option<Decoded> {
    let mut decoder = Decoder::new();
    decoder.push(line);
    decoder.push(b"\n");
    match decoder.next()? {
        Decoded::Message(message) if session_of(&message).is_some() => Some(Decoded::Message(message)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GREETING: &[u8] = b"- item event=port session=abc\n";

    fn all(reader: &mut PortReader, octets: &[u8]) -> Vec<Decoded> {
        reader.push(octets);
        std::iter::from_fn(|| reader.next()).collect()
    }

    #[test]
    fn what_an_earlier_reader_left_is_skipped_up_to_the_greeting() {
        let mut reader = PortReader::new();
        assert!(all(&mut reader, b"left of a frame\n1.1 data stdout 999999\n").is_empty());
        assert!(all(&mut reader, &vec![b'x'; 100_000]).is_empty());
        let found = all(&mut reader, &[b"\n", GREETING, b"1.1 ok\n"].concat());
        assert_eq!(found.len(), 2);
        assert!(!reader.is_in_message());
    }

    #[test]
    fn the_greeting_may_come_octet_by_octet() {
        let mut reader = PortReader::new();
        let found: Vec<Decoded> = GREETING.iter().flat_map(|&octet| all(&mut reader, &[octet])).collect();
        assert_eq!(found.len(), 1);
    }

    #[test]
    fn a_greeting_that_a_cut_frame_swallowed_is_found_when_nothing_follows() {
        let mut reader = PortReader::new();
        all(&mut reader, GREETING);
        assert!(all(&mut reader, b"1.1 data stdout 1000\nhalf").is_empty());
        assert!(reader.is_in_message());
        assert_eq!(reader.greeting_in_message(), None);
        assert!(all(&mut reader, b"- item event=port session=new\n").is_empty());
        assert!(reader.greeting_in_message().is_some());
        assert_eq!(all(&mut reader, b"1.2 ok\n").len(), 1);
    }

    #[test]
    fn a_greeting_behind_a_cut_line_is_found() {
        let mut reader = PortReader::new();
        all(&mut reader, GREETING);
        assert!(all(&mut reader, b"1.1 item name=\"half of a lo").is_empty());
        let found = all(&mut reader, b"- item event=port session=new\n");
        assert!(matches!(&found[..], [Decoded::Message(message)] if session_of(message).is_some()));
        assert_eq!(all(&mut reader, b"1.2 ok\n").len(), 1);
    }
}
