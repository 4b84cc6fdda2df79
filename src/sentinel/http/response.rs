//! Reading a response: RFC 9112, as much of it as a client needs. Everything that comes is bounded.

use std::io::{self, Read};

use super::HttpError;

/// Longest status line and headers together, in octets.
pub const MAX_HEAD: usize = 64 * 1024;
/// Most interim (1xx) responses before the final one.
const MAX_INTERIM: usize = 16;

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// 200–599.
    pub status: u16,
    /// Names in lower case, in the order in which they came.
    pub headers: Vec<(String, String)>,
    /// At most as much as was asked for; the rest was thrown away.
    pub body: Vec<u8>,
    /// Whether the connection can be used again.
    pub keep_alive: bool,
}

impl Response {
    /// The first header of this (lower-case) name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| &**value)
    }

    /// Whether the status is 2xx.
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }
}

/// Octets read ahead.
struct Source<'a> {
    stream: &'a mut dyn Read,
    buffer: Vec<u8>,
    at: usize,
}

impl Source<'_> {
    /// At least one more octet into the buffer; false at the end.
    fn more(&mut self) -> Result<bool, HttpError> {
        if self.at == self.buffer.len() {
            self.buffer.clear();
            self.at = 0;
        }
        let have = self.buffer.len();
        self.buffer.resize(have + 8192, 0);
        let result = loop {
            match self.stream.read(&mut self.buffer[have..]) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => break other,
            }
        };
        self.buffer.truncate(have + *result.as_ref().unwrap_or(&0));
        result.map(|count| count > 0).map_err(HttpError::Io)
    }

    /// A line without its end, which may be CR LF or LF.
    fn line(&mut self, limit: usize) -> Result<String, HttpError> {
        let mut seen = self.at;
        let end = loop {
            if let Some(at) = self.buffer[seen..].iter().position(|&octet| octet == b'\n') {
                break seen + at;
            }
            if self.buffer.len() - self.at > limit {
                return Err(HttpError::Malformed("a line is too long"));
            }
            let unread = self.buffer.len() - self.at;
            if !self.more()? {
                return Err(HttpError::Io(io::ErrorKind::UnexpectedEof.into()));
            }
            seen = self.at + unread;
        };
        let line = &self.buffer[self.at..end];
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.len() > limit {
            return Err(HttpError::Malformed("a line is too long"));
        }
        let line = String::from_utf8_lossy(line).into_owned();
        self.at = end + 1;
        Ok(line)
    }

    /// `count` octets, of which `body` keeps what fits under `limit`.
    fn take(&mut self, mut count: u64, body: &mut Vec<u8>, limit: usize) -> Result<(), HttpError> {
        while count > 0 {
            if self.at == self.buffer.len() && !self.more()? {
                return Err(HttpError::Io(io::ErrorKind::UnexpectedEof.into()));
            }
            let there = self.buffer.len() - self.at;
            let some = there.min(usize::try_from(count).unwrap_or(usize::MAX));
            let kept = some.min(limit.saturating_sub(body.len()));
            body.extend_from_slice(&self.buffer[self.at..self.at + kept]);
            self.at += some;
            count -= some as u64;
        }
        Ok(())
    }
}

/// Reads one response to a request that was no HEAD. `limit`: octets of the body that are kept; 16 times as many may
/// come, then the connection is not worth it.
pub fn read(stream: &mut dyn Read, limit: usize) -> Result<Response, HttpError> {
    let mut source = Source { stream, buffer: Vec::new(), at: 0 };
    let mut response = final_head(&mut source)?;
    let most = (limit as u64 + 4096) * 16;
    let chunked = match response.header("transfer-encoding") {
        Some(coding) if coding.eq_ignore_ascii_case("chunked") => true,
        Some(_) => return Err(HttpError::Malformed("an unknown transfer coding")),
        None => false,
    };
    let length = match response.header("content-length") {
        Some(_) if chunked => return Err(HttpError::Malformed("a length and a transfer coding")),
        Some(text) if text.is_empty() || !text.bytes().all(|c| c.is_ascii_digit()) => {
            return Err(HttpError::Malformed("a length that is no number"));
        }
        Some(text) => Some(text.parse::<u64>().map_err(|_| HttpError::Malformed("a length that is no number"))?),
        None => None,
    };
    let mut body = Vec::new();
    match length {
        _ if response.status == 204 || response.status == 304 => {}
        _ if chunked => chunks(&mut source, &mut body, limit, most)?,
        Some(length) if length > most => {
            source.take(limit as u64, &mut body, limit)?;
            response.keep_alive = false;
        }
        Some(length) => source.take(length, &mut body, limit)?,
        None => {
            response.keep_alive = false;
            let mut got = 0;
            while got < most && (source.at < source.buffer.len() || source.more()?) {
                let there = (source.buffer.len() - source.at) as u64;
                got += there;
                source.take(there, &mut body, limit)?;
            }
        }
    }
    // What nobody asked for is no beginning of the next answer.
    response.keep_alive &= source.at == source.buffer.len();
    response.body = body;
    Ok(response)
}

/// The same for an answer that has come whole, and nothing after it: its body stays where it is.
pub fn whole(mut raw: Vec<u8>, limit: usize) -> Result<Response, HttpError> {
    let mut rest = raw.as_slice();
    let mut source = Source { stream: &mut rest, buffer: Vec::new(), at: 0 };
    let mut response = final_head(&mut source)?;
    let unread = source.buffer.len() - source.at;
    let start = raw.len() - rest.len() - unread;
    let length = response.header("content-length").and_then(|text| text.parse::<usize>().ok());
    let plain = response.header("transfer-encoding").is_none() && !matches!(response.status, 204 | 304);
    if plain && length == Some(raw.len() - start) && raw.len() - start <= limit {
        raw.drain(..start);
        response.body = raw;
        return Ok(response);
    }
    read(&mut raw.as_slice(), limit)
}

/// Reads one response to a HEAD: whatever length it says, no body comes.
pub fn read_head(stream: &mut dyn Read) -> Result<Response, HttpError> {
    final_head(&mut Source { stream, buffer: Vec::new(), at: 0 })
}

/// The head after interim ones.
fn final_head(source: &mut Source) -> Result<Response, HttpError> {
    let mut response = head(source)?;
    for _ in 0..MAX_INTERIM {
        if response.status >= 200 {
            break;
        }
        response = head(source)?;
    }
    Ok(response)
}

fn head(source: &mut Source) -> Result<Response, HttpError> {
    let line = source.line(MAX_HEAD)?;
    let (version, rest) = line.split_once(' ').unwrap_or((&line, ""));
    let code = rest.split(' ').next().unwrap_or_default();
    if !matches!(version, "HTTP/1.1" | "HTTP/1.0") || code.len() != 3 {
        return Err(HttpError::Malformed("no status line"));
    }
    let status: u16 = code.parse().map_err(|_| HttpError::Malformed("no status code"))?;
    if !(100..600).contains(&status) {
        return Err(HttpError::Malformed("no status code"));
    }
    let mut keep_alive = version == "HTTP/1.1";
    let mut headers = Vec::new();
    let mut left = MAX_HEAD;
    loop {
        let line = source.line(left)?;
        left = left.saturating_sub(line.len() + 2);
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(':').ok_or(HttpError::Malformed("a header without a colon"))?;
        let (name, value) = (name.to_ascii_lowercase(), value.trim());
        if name == "connection" {
            keep_alive =
                !value.eq_ignore_ascii_case("close") && (keep_alive || value.eq_ignore_ascii_case("keep-alive"));
        }
        headers.push((name, value.to_string()));
    }
    Ok(Response { status, headers, body: Vec::new(), keep_alive })
}

fn chunks(source: &mut Source, body: &mut Vec<u8>, limit: usize, most: u64) -> Result<(), HttpError> {
    let mut total = 0u64;
    loop {
        let line = source.line(1024)?;
        let digits = line.split(';').next().unwrap_or_default().trim();
        if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|c| c.is_ascii_hexdigit()) {
            return Err(HttpError::Malformed("a chunk without a length"));
        }
        let length = u64::from_str_radix(digits, 16).map_err(|_| HttpError::Malformed("a chunk without a length"))?;
        total += length;
        if total > most {
            return Err(HttpError::Malformed("a body that is too long"));
        }
        if length == 0 {
            break;
        }
        source.take(length, body, limit)?;
        if !source.line(2)?.is_empty() {
            return Err(HttpError::Malformed("a chunk that is longer than it says"));
        }
    }
    let mut left = MAX_HEAD;
    loop {
        let line = source.line(left)?;
        left = left.saturating_sub(line.len() + 2);
        if line.is_empty() {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives one octet at a time.
    struct Slow<'a>(&'a [u8]);

    impl Read for Slow<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let Some((&first, rest)) = self.0.split_first() else { return Ok(0) };
            buffer[0] = first;
            self.0 = rest;
            Ok(1)
        }
    }

    fn both(raw: &str, limit: usize) -> Result<Response, HttpError> {
        let at_once = read(&mut raw.as_bytes(), limit);
        let slowly = read(&mut Slow(raw.as_bytes()), limit);
        let in_place = whole(raw.as_bytes().to_vec(), limit);
        match (&at_once, &slowly) {
            (Ok(a), Ok(b)) => assert_eq!((a.status, &a.headers, &a.body), (b.status, &b.headers, &b.body)),
            (Err(_), Err(_)) => {}
            _ => panic!("{raw:?}: {at_once:?} and {slowly:?}"),
        }
        assert_eq!(in_place.ok(), at_once.as_ref().ok().cloned(), "{raw:?}");
        at_once
    }

    #[test]
    fn every_kind_of_body_is_read_and_its_end_found() {
        for (raw, status, body, keep_alive) in [
            ("HTTP/1.1 204 No Content\r\n\r\n", 204, "", true),
            ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", 200, "abc", true),
            ("HTTP/1.1 200\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc", 200, "abc", false),
            ("HTTP/1.0 400 Bad\r\n\r\nto the end", 400, "to the end", false),
            (
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1;x=y\r\nc\r\n0\r\nT: r\r\n\r\n",
                200,
                "abc",
                true,
            ),
            ("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 Busy\nRetry-After: 7\nContent-Length: 0\n\n", 503, "", true),
        ] {
            let response = both(raw, 100).unwrap();
            assert_eq!((response.status, &*response.body), (status, body.as_bytes()), "{raw}");
            assert_eq!(response.keep_alive, keep_alive, "{raw}");
        }
    }

    #[test]
    fn a_large_body_is_not_kept_whole() {
        let raw = format!("HTTP/1.1 500 X\r\nContent-Length: 50000\r\n\r\n{}", "e".repeat(50_000));
        let response = both(&raw, 100).unwrap();
        assert_eq!(response.body.len(), 100);
    }

    #[test]
    fn what_is_no_response_is_an_error() {
        for raw in [
            "",
            "SSH-2.0-x\r\n",
            "HTTP/1.1 abc\r\n\r\n",
            "HTTP/1.1 999 x\r\n\r\n",
            "HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffff\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n",
        ] {
            assert!(both(raw, 100).is_err(), "{raw}");
        }
        assert!(read(&mut io::repeat(b'a'), 10).is_err());
    }
}
