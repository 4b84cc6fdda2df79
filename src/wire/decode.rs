//! From octets to messages. The octets are hostile: every length is bounded before it is used, a
//! bad line costs that line only, and memory never grows beyond one line or one data frame.

use super::encode::is_bare;
use super::error::{Code, Error};
use super::message::{Arg, Fields, Message, Request};
use super::{MAX_CHANNEL, MAX_DATA, MAX_LINE, MAX_TAG};

/// What the decoder found next in the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decoded {
    /// A whole message.
    Message(Message),
    /// Something that is no message: answer it under this tag (`-` where no tag could be read).
    Bad {
        /// The tag of the bad line, or `-`.
        tag: String,
        /// `BAD_LINE`, `LINE_TOO_LONG` or `DATA_TOO_LONG`.
        error: Error,
    },
}

#[derive(Debug)]
enum State {
    /// Before or inside a line.
    Line,
    /// Inside a line that is too long: drop up to its LF.
    SkipLine,
    /// Inside the payload of a frame; the LF after it counts as part of it.
    Payload { tag: String, channel: String, length: usize },
    /// Inside a payload that is too long: drop that many octets more.
    SkipPayload { left: u64 },
}

/// Cuts a byte stream into messages, however it was cut in transit.
#[derive(Debug)]
pub struct Decoder {
    buffer: Vec<u8>,
    start: usize,
    /// Up to here the current line was searched for its LF.
    searched: usize,
    state: State,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { buffer: Vec::new(), start: 0, searched: 0, state: State::Line }
    }
}

impl Decoder {
    /// A decoder at the start of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes octets that arrived. Call `next` until it gives `None` before the next `push`: then at most
    /// one line or one frame is held.
    pub fn push(&mut self, octets: &[u8]) {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.searched -= self.start;
            self.start = 0;
        }
        self.buffer.extend_from_slice(octets);
    }

    /// Octets held that are not yet part of a message.
    pub fn pending(&self) -> usize {
        self.buffer.len() - self.start
    }

    /// Whether the stream stands between two messages; at the end of a stream, `false` means it was cut.
    pub fn is_idle(&self) -> bool {
        matches!(self.state, State::Line) && self.pending() == 0
    }

    /// Takes back the octets that follow the last message, for a link that turns into a raw stream.
    pub fn into_rest(mut self) -> Vec<u8> {
        self.buffer.split_off(self.start)
    }

    /// The next message, or `None` until more octets arrive.
    #[allow(clippy::should_implement_trait)] // not an iterator: `None` is not the end
    pub fn next(&mut self) -> Option<Decoded> {
        loop {
            let available = self.buffer.len() - self.start;
            match &mut self.state {
                State::Line => match self.find_line_end() {
                    Some(end) if end + 1 - self.start > MAX_LINE => {
                        self.consume_to(end + 1);
                        return Some(too_long());
                    }
                    Some(end) => {
                        let parsed = parse_line(&self.buffer[self.start..end]);
                        self.consume_to(end + 1);
                        match parsed {
                            Ok(Line::Blank) => {}
                            Ok(Line::Message(message)) => return Some(Decoded::Message(message)),
                            Ok(Line::DataHeader { tag, channel, length }) => match usize::try_from(length) {
                                Ok(length) if length <= MAX_DATA => {
                                    self.state = State::Payload { tag, channel, length };
                                }
                                _ => {
                                    self.state = State::SkipPayload { left: length.saturating_add(1) };
                                    return Some(Decoded::Bad {
                                        tag,
                                        error: Error::new(
                                            Code::DataTooLong,
                                            format!("data frame of {length} octets is over the limit of {MAX_DATA}"),
                                        )
                                        .with("max", MAX_DATA),
                                    });
                                }
                            },
                            Err((tag, message)) => {
                                return Some(Decoded::Bad { tag, error: Error::new(Code::BadLine, message) });
                            }
                        }
                    }
                    None if available >= MAX_LINE => {
                        self.consume_to(self.buffer.len());
                        self.state = State::SkipLine;
                        return Some(too_long());
                    }
                    None => return None,
                },
                State::SkipLine => match self.find_line_end() {
                    Some(end) => {
                        self.consume_to(end + 1);
                        self.state = State::Line;
                    }
                    None => {
                        self.consume_to(self.buffer.len());
                        return None;
                    }
                },
                State::Payload { tag, channel, length } => {
                    if available < *length + 1 {
                        return None;
                    }
                    let (tag, channel, length) = (std::mem::take(tag), std::mem::take(channel), *length);
                    let end = self.start + length;
                    let payload = self.buffer[self.start..end].to_vec();
                    self.state = State::Line;
                    if self.buffer[end] != b'\n' {
                        // What follows is out of step with its header: go on after the next LF.
                        self.consume_to(end);
                        self.state = State::SkipLine;
                        return Some(Decoded::Bad {
                            tag,
                            error: Error::new(
                                Code::BadLine,
                                format!("data frame of {length} octets is not followed by LF"),
                            ),
                        });
                    }
                    self.consume_to(end + 1);
                    return Some(Decoded::Message(Message::Data { tag, channel, payload }));
                }
                State::SkipPayload { left } => {
                    let skip = usize::try_from(*left).unwrap_or(usize::MAX).min(available);
                    *left -= skip as u64;
                    let done = *left == 0;
                    self.consume_to(self.start + skip);
                    if !done {
                        return None;
                    }
                    self.state = State::Line;
                }
            }
        }
    }

    fn find_line_end(&mut self) -> Option<usize> {
        let from = self.searched.max(self.start);
        let found = self.buffer[from..].iter().position(|&b| b == b'\n').map(|at| from + at);
        self.searched = found.unwrap_or(self.buffer.len());
        found
    }

    fn consume_to(&mut self, at: usize) {
        self.start = at;
        self.searched = at;
        if self.start == self.buffer.len() {
            self.buffer.clear();
            self.start = 0;
            self.searched = 0;
            // A large frame's room is given back; that of the usual ones is kept.
            if self.buffer.capacity() > 256 * 1024 {
                self.buffer = Vec::new();
            }
        }
    }
}

fn too_long() -> Decoded {
    Decoded::Bad {
        tag: "-".to_string(),
        error: Error::new(Code::LineTooLong, format!("line is over the limit of {MAX_LINE} octets"))
            .with("max", MAX_LINE),
    }
}

enum Line {
    Blank,
    Message(Message),
    DataHeader { tag: String, channel: String, length: u64 },
}

/// A failed parse: the tag to answer under, and a sentence.
type Bad = (String, String);

fn parse_line(line: &[u8]) -> Result<Line, Bad> {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    if line.is_empty() {
        return Ok(Line::Blank);
    }
    let mut cursor = Cursor { line, at: 0 };
    let untagged = |message: String| ("-".to_string(), message);
    let tag = cursor.tag().map_err(untagged)?;
    parse_after_tag(&mut cursor, &tag).map_err(|message| (tag, message))
}

fn parse_after_tag(cursor: &mut Cursor<'_>, tag: &str) -> Result<Line, String> {
    let tag = tag.to_string();
    cursor.space("a verb")?;
    let verb = cursor.verb()?;
    let message = match verb.as_str() {
        "cancel" => Message::Cancel { tag },
        "ok" => Message::Ok { tag, fields: cursor.fields()? },
        "item" => Message::Item { tag, fields: cursor.fields()? },
        "err" => {
            cursor.space("an error code")?;
            let code = cursor.code()?;
            cursor.space("a sentence")?;
            let sentence = cursor.value()?;
            let message = String::from_utf8(sentence).map_err(|_| "error sentence is not UTF-8".to_string())?;
            Message::Err { tag, error: Error { code, message, fields: cursor.fields()? } }
        }
        "data" => {
            cursor.space("a channel")?;
            let channel = cursor.channel()?;
            cursor.space("a length")?;
            let length = cursor.number()?;
            cursor.finish()?;
            return Ok(Line::DataHeader { tag, channel, length });
        }
        "end" => {
            cursor.space("a channel")?;
            Message::End { tag, channel: cursor.channel()? }
        }
        "credit" => {
            cursor.space("a channel")?;
            let channel = cursor.channel()?;
            cursor.space("a count of octets")?;
            Message::Credit { tag, channel, octets: cursor.number()? }
        }
        _ => {
            let mut args = Vec::new();
            while cursor.next_argument()? {
                args.push(cursor.argument()?);
            }
            Message::Request(Request { tag, verb, args })
        }
    };
    cursor.finish()?;
    Ok(Line::Message(message))
}

struct Cursor<'a> {
    line: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn peek(&self) -> Option<u8> {
        self.line.get(self.at).copied()
    }

    fn take_while(&mut self, accept: impl Fn(u8) -> bool) -> &'a [u8] {
        let rest = &self.line[self.at..];
        let length = rest.iter().position(|&b| !accept(b)).unwrap_or(rest.len());
        self.at += length;
        &rest[..length]
    }

    /// A word of ASCII octets, `min..=max` long.
    fn word(&mut self, what: &str, max: usize, accept: impl Fn(u8) -> bool) -> Result<String, String> {
        let taken = self.take_while(|b| b.is_ascii() && accept(b));
        if taken.is_empty() {
            return Err(format!("{what} expected at octet {}", self.at));
        }
        if taken.len() > max {
            return Err(format!("{what} of {} octets is over the limit of {max}", taken.len()));
        }
        Ok(taken.iter().map(|&b| char::from(b)).collect())
    }

    fn tag(&mut self) -> Result<String, String> {
        self.word("tag", MAX_TAG, |b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b':' | b'/'))
    }

    fn verb(&mut self) -> Result<String, String> {
        self.word("verb", 64, |b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'_'))
    }

    fn code(&mut self) -> Result<String, String> {
        self.word("error code", 64, |b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_')
    }

    fn channel(&mut self) -> Result<String, String> {
        self.word("channel", MAX_CHANNEL, |b| b.is_ascii_lowercase() || b.is_ascii_digit())
    }

    fn number(&mut self) -> Result<u64, String> {
        let digits = self.word("number", 20, |b| b.is_ascii_digit())?;
        digits.parse().map_err(|_| format!("number {digits} is over the limit of {}", u64::MAX))
    }

    fn space(&mut self, before: &str) -> Result<(), String> {
        if self.peek() != Some(b' ') {
            return Err(format!("space and {before} expected at octet {}", self.at));
        }
        self.at += 1;
        Ok(())
    }

    fn finish(&self) -> Result<(), String> {
        match self.peek() {
            None => Ok(()),
            Some(_) => Err(format!("end of line expected at octet {}", self.at)),
        }
    }

    /// Steps over the space before a further argument; `false` at the end of the line.
    fn next_argument(&mut self) -> Result<bool, String> {
        match self.peek() {
            None => Ok(false),
            Some(b' ') => {
                self.at += 1;
                Ok(true)
            }
            Some(_) => Err(format!("space expected at octet {}", self.at)),
        }
    }

    fn fields(&mut self) -> Result<Fields, String> {
        let mut fields = Fields::new();
        while self.next_argument()? {
            match self.argument()? {
                Arg::Named(key, value) => fields.0.push((key, value)),
                Arg::Positional(_) => return Err(format!("key=value expected before octet {}", self.at)),
            }
        }
        Ok(fields)
    }

    fn argument(&mut self) -> Result<Arg, String> {
        let start = self.at;
        if self.peek() == Some(b'"') {
            return self.value().map(Arg::Positional);
        }
        let bare = self.take_while(is_bare);
        if self.peek() != Some(b'=') {
            if bare.is_empty() {
                return Err(format!("value expected at octet {start}"));
            }
            return Ok(Arg::Positional(bare.to_vec()));
        }
        let is_key = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'_' | b'.');
        if bare.is_empty() || bare.len() > 64 || !bare.iter().all(is_key) {
            return Err(format!("key expected at octet {start} (a positional value that holds = must be quoted)"));
        }
        self.at += 1;
        let key = bare.iter().map(|&b| char::from(b)).collect();
        Ok(Arg::Named(key, self.value()?))
    }

    fn value(&mut self) -> Result<Vec<u8>, String> {
        if self.peek() == Some(b'"') {
            return self.quoted();
        }
        let bare = self.take_while(is_bare);
        if bare.is_empty() {
            return Err(format!("value expected at octet {}", self.at));
        }
        Ok(bare.to_vec())
    }

    fn quoted(&mut self) -> Result<Vec<u8>, String> {
        let start = self.at;
        self.at += 1;
        let mut out = Vec::new();
        loop {
            out.extend_from_slice(self.take_while(|b| b >= b' ' && b != 0x7f && b != b'"' && b != b'\\'));
            match self.peek() {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(out);
                }
                Some(b'\\') => {
                    self.at += 1;
                    out.push(self.escape()?);
                }
                Some(octet) => {
                    return Err(format!("octet 0x{octet:02x} at {} must be written \\x{octet:02x}", self.at));
                }
                None => return Err(format!("string that starts at octet {start} is not closed")),
            }
        }
    }

    fn escape(&mut self) -> Result<u8, String> {
        let kind = self.peek();
        self.at += 1;
        match kind {
            Some(b'"') => Ok(b'"'),
            Some(b'\\') => Ok(b'\\'),
            Some(b'n') => Ok(b'\n'),
            Some(b'x') => {
                let digits = self.line.get(self.at..self.at + 2).and_then(|d| std::str::from_utf8(d).ok());
                let octet = digits
                    .filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()))
                    .and_then(|d| u8::from_str_radix(d, 16).ok());
                self.at += 2;
                octet.ok_or_else(|| format!("two hex digits expected at octet {}", self.at - 2))
            }
            _ => Err(format!("unknown escape at octet {}: known are \\\" \\\\ \\n \\xHH", self.at - 1)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(bytes: &[u8]) -> Decoded {
        let mut decoder = Decoder::new();
        decoder.push(bytes);
        decoder.next().expect("one message")
    }

    fn bad(bytes: &[u8]) -> (String, String) {
        match one(bytes) {
            Decoded::Bad { tag, error } => (tag, error.code),
            Decoded::Message(message) => panic!("accepted {message:?}"),
        }
    }

    #[test]
    fn a_request_has_tag_verb_and_arguments() {
        let Decoded::Message(Message::Request(request)) =
            one(b"7 exec.start sb1 \"A=1\" env=\"X=\\\"y\\\"\\n\\x00\" tty=true\n")
        else {
            panic!("not a request");
        };
        assert_eq!((request.tag.as_str(), request.verb.as_str()), ("7", "exec.start"));
        assert_eq!(
            request.args,
            [
                Arg::Positional(b"sb1".to_vec()),
                Arg::Positional(b"A=1".to_vec()),
                Arg::Named("env".into(), b"X=\"y\"\n\0".to_vec()),
                Arg::Named("tty".into(), b"true".to_vec()),
            ]
        );
    }

    #[test]
    fn broken_lines_are_answered_under_their_tag_where_it_can_be_read() {
        for line in [
            &b"7 exec.start \"open\n"[..],
            b"7 a b=\"\\q\"\n",
            b"7 a b=\"\\x0\n",
            b"7 a  b\n",
            b"7 a K=v\n",
            b"7 a =v\n",
        ] {
            assert_eq!(bad(line), ("7".into(), "BAD_LINE".into()), "{line:?}");
        }
        for line in [&b"\xff\xfe a\n"[..], b" a\n", b"\0\n"] {
            assert_eq!(bad(line), ("-".into(), "BAD_LINE".into()), "{line:?}");
        }
        assert_eq!(bad(b"7\n").0, "7");
        assert_eq!(bad(b"7 data ch 18446744073709551616\n").1, "BAD_LINE");
        assert_eq!(bad(&[&[b'a'; 65][..], b" v\n"].concat()).0, "-");
    }

    #[test]
    fn an_over_long_line_is_skipped_to_its_end_and_reported_once() {
        let mut decoder = Decoder::new();
        let mut seen = Vec::new();
        for _ in 0..70 {
            decoder.push(&[b'x'; 1024]);
            while let Some(found) = decoder.next() {
                seen.push(found);
            }
            assert!(decoder.pending() <= MAX_LINE);
        }
        decoder.push(b"\n1 hello\n");
        while let Some(found) = decoder.next() {
            seen.push(found);
        }
        assert_eq!(seen.len(), 2);
        assert!(matches!(&seen[0], Decoded::Bad { tag, error } if tag == "-" && error.is(Code::LineTooLong)));
        assert_eq!(seen[1], Decoded::Message(Message::Request(Request::new("1", "hello"))));
    }

    #[test]
    fn a_line_of_exactly_the_limit_passes_and_one_octet_more_does_not() {
        let line = |length: usize| [&b"1 v "[..], &vec![b'a'; length - 5], b"\n"].concat();
        assert!(matches!(one(&line(MAX_LINE)), Decoded::Message(_)));
        assert!(matches!(one(&line(MAX_LINE + 1)), Decoded::Bad { .. }));
    }

    #[test]
    fn a_data_frame_over_the_limit_is_skipped() {
        let mut decoder = Decoder::new();
        decoder.push(format!("5 data stdin {}\n", MAX_DATA + 1).as_bytes());
        assert!(
            matches!(decoder.next(), Some(Decoded::Bad { tag, error }) if tag == "5" && error.is(Code::DataTooLong))
        );
        decoder.push(&vec![b'\n'; MAX_DATA + 1]);
        assert_eq!(decoder.next(), None);
        decoder.push(b"\n6 hello\n");
        assert_eq!(decoder.next(), Some(Decoded::Message(Message::Request(Request::new("6", "hello")))));
    }

    #[test]
    fn a_data_frame_without_its_line_feed_is_an_error_and_costs_only_the_rest_of_that_line() {
        let mut decoder = Decoder::new();
        decoder.push(b"5 data c 2\nabX garbage\n6 hello\n");
        assert!(matches!(decoder.next(), Some(Decoded::Bad { tag, .. }) if tag == "5"));
        assert_eq!(decoder.next(), Some(Decoded::Message(Message::Request(Request::new("6", "hello")))));
    }
}
