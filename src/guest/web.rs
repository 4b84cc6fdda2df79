//! The guest's own service, http://169.254.169.254: `GET /me` and `POST /logs`.
//!
//! The address is on the guest's loopback interface and the agent answers there, so that it needs no network and no packet
//! of it leaves the guest. Who the sandbox is, and what becomes of the logs, is the node's word, over the agent link: the
//! node never sees HTTP. What is not the service's is a typed error; a request has 10 s and some KiB, and there are 16 at
//! once: with another the oldest goes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use mio::Interest;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, SockaddrIn, accept4, bind, listen, setsockopt, shutdown,
    socket, sockopt,
};

use super::agent::{Agent, Due, Kind};
use super::connection::{Connection, Job, QUEUE_HIGH};
use super::verbs::Begun;
use super::{loopback, report};
use crate::wire::{Args, Error, FRAME, Fields, INITIAL_CREDIT, Message};

/// Where programs look for it, as on other clouds.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
const PORT: u16 = 80;
/// The channel on which lines go to the node.
const CHANNEL: &str = "logs";
/// Connections at once.
const VISITORS_MAX: usize = 16;
/// What one has for its request and our answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Octets of a request before its body, and of its body.
const HEAD_MAX: usize = 8 * 1024;
const BODY_MAX: usize = 64 * 1024;
/// Octets of a line of logs.
const LINE_MAX: usize = 16 * 1024;
/// Octets that are taken after a request and thrown away, so that its answer is not lost to a reset.
const REST_MAX: usize = 256 * 1024;

/// The service.
#[derive(Debug, Default)]
pub(super) struct Web {
    listener: Option<OwnedFd>,
    visitors: BTreeMap<u64, Visitor>,
    next: u64,
    /// What `/me` says.
    me: Option<Vec<u8>>,
    node: Option<Node>,
}

/// The request of the node's that lines go to.
#[derive(Debug)]
struct Node {
    link: u64,
    tag: String,
    /// Octets that it takes.
    credit: u64,
}

/// A connection.
#[derive(Debug)]
struct Visitor {
    stream: File,
    input: Vec<u8>,
    output: Vec<u8>,
    answered: bool,
    /// Octets that came after its request.
    rest: usize,
    deadline: Instant,
}

/// An answer.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    status: u16,
    body: Vec<u8>,
    header: &'static str,
}

impl Answer {
    fn ok(status: u16, body: Vec<u8>) -> Self {
        Self { status, body, header: "" }
    }

    fn error(status: u16, message: &str) -> Self {
        let body = format!("{{\"error\":\"{}\",\"message\":\"{message}\"}}\n", reason(status).0);
        Self { status, body: body.into_bytes(), header: "" }
    }

    fn with(self, header: &'static str) -> Self {
        Self { header, ..self }
    }

    fn octets(&self) -> Vec<u8> {
        let head = format!(
            "HTTP/1.1 {} {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n{}Connection: close\r\n\r\n",
            self.status,
            reason(self.status).1,
            self.body.len(),
            self.header
        );
        [head.as_bytes(), &self.body].concat()
    }
}

/// A status' code in our errors and its phrase (RFC 9110, 15).
fn reason(status: u16) -> (&'static str, &'static str) {
    match status {
        200 => ("OK", "OK"),
        202 => ("ACCEPTED", "Accepted"),
        400 => ("BAD_REQUEST", "Bad Request"),
        404 => ("NOT_FOUND", "Not Found"),
        405 => ("METHOD_NOT_ALLOWED", "Method Not Allowed"),
        411 => ("LENGTH_REQUIRED", "Length Required"),
        413 => ("TOO_LARGE", "Content Too Large"),
        429 => ("TOO_MANY_REQUESTS", "Too Many Requests"),
        431 => ("HEADERS_TOO_LARGE", "Request Header Fields Too Large"),
        501 => ("NOT_IMPLEMENTED", "Not Implemented"),
        505 => ("VERSION_NOT_SUPPORTED", "HTTP Version Not Supported"),
        _ => ("UNAVAILABLE", "Service Unavailable"),
    }
}

/// What came of a request so far.
#[derive(Debug, PartialEq, Eq)]
enum Parsed<'a> {
    /// The rest of its head.
    Head,
    /// The rest of its body; `expects` that it is told to send it.
    Body { expects: bool },
    /// All of it.
    Whole { method: &'a str, path: &'a str, body: &'a [u8] },
    /// It is none that can be answered.
    Refused(Answer),
}

/// Where a head ends: what is before the empty line, and where the body begins.
fn head_end(input: &[u8]) -> Option<(usize, usize)> {
    let mut from = 0;
    while let Some(at) = input[from..].iter().position(|octet| *octet == b'\n') {
        let line = from + at;
        match input.get(line + 1..) {
            Some([b'\n', ..]) => return Some((line + 1, line + 2)),
            Some([b'\r', b'\n', ..]) => return Some((line + 1, line + 3)),
            _ => from = line + 1,
        }
    }
    None
}

fn parse(input: &[u8]) -> Parsed<'_> {
    let refused = |status, message| Parsed::Refused(Answer::error(status, message));
    let Some((end, body)) = head_end(input).filter(|(end, _)| *end <= HEAD_MAX) else {
        return if input.len() > HEAD_MAX { refused(431, "the head is over 8 KiB") } else { Parsed::Head };
    };
    let Ok(head) = std::str::from_utf8(&input[..end]) else { return refused(400, "the head is no text") };
    let mut lines = head.lines();
    let words: Vec<&str> = lines.next().unwrap_or_default().split(' ').collect();
    let [method, target, version] = words[..] else { return refused(400, "the first line is no request") };
    if !version.starts_with("HTTP/") || method.is_empty() {
        return refused(400, "the first line is no request");
    }
    if !version.starts_with("HTTP/1.") {
        return refused(505, "the version is HTTP/1.1");
    }
    let (mut length, mut expects) = (None, false);
    for line in lines {
        let Some((name, value)) = line.split_once(':') else { return refused(400, "a header has no colon") };
        let value = value.trim();
        if name.eq_ignore_ascii_case("content-length") {
            let digits = !value.is_empty() && value.len() < 19 && value.bytes().all(|octet| octet.is_ascii_digit());
            let number = value.parse::<u64>().ok().filter(|_| digits);
            if number.is_none() || length.is_some_and(|length| Some(length) != number) {
                return refused(400, "Content-Length is no number");
            }
            length = number;
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            return refused(501, "a body needs Content-Length");
        } else if name.eq_ignore_ascii_case("expect") {
            expects = value.eq_ignore_ascii_case("100-continue");
        }
    }
    let path = target.split('?').next().unwrap_or_default();
    match (method, path) {
        ("GET", "/me") | ("POST", "/logs") => {}
        (_, "/me") => return Parsed::Refused(Answer::error(405, "/me has GET").with("Allow: GET\r\n")),
        (_, "/logs") => return Parsed::Refused(Answer::error(405, "/logs has POST").with("Allow: POST\r\n")),
        _ => return refused(404, "there are GET /me and POST /logs"),
    }
    if method == "POST" && length.is_none() {
        return refused(411, "a body needs Content-Length");
    }
    let Some(length) = usize::try_from(length.unwrap_or(0)).ok().filter(|length| *length <= BODY_MAX) else {
        return refused(413, "a body has at most 64 KiB");
    };
    match input.get(body..body + length) {
        Some(body) => Parsed::Whole { method, path, body },
        None => Parsed::Body { expects: expects && input.len() == body },
    }
}

/// The lines of a body, each with its end; or what is wrong with it.
fn lines_of(body: &[u8]) -> Result<(Vec<u8>, usize), String> {
    let (mut lines, mut count) = (Vec::with_capacity(body.len() + 1), 0);
    for (number, line) in (1..).zip(body.split(|octet| *octet == b'\n')) {
        let line = line.trim_ascii();
        if line.is_empty() {
            continue;
        }
        if line.len() > LINE_MAX {
            return Err(format!("line {number} is over {} KiB", LINE_MAX / 1024));
        }
        if serde_json::from_slice::<serde::de::IgnoredAny>(line).is_err() {
            return Err(format!("line {number} is no JSON"));
        }
        lines.extend_from_slice(line);
        lines.push(b'\n');
        count += 1;
    }
    if count == 0 { Err("there is no line".to_string()) } else { Ok((lines, count)) }
}

impl Visitor {
    /// Reads what there is. `false` when nothing more will come.
    fn read(&mut self) -> bool {
        let mut chunk = [0; 4096];
        while self.answered || self.input.len() <= HEAD_MAX + BODY_MAX {
            match self.stream.read(&mut chunk) {
                Ok(0) => return false,
                Ok(n) if self.answered => {
                    self.rest += n;
                    if self.rest > REST_MAX {
                        return false;
                    }
                }
                Ok(n) => self.input.extend_from_slice(&chunk[..n]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return e.kind() == io::ErrorKind::WouldBlock,
            }
        }
        true
    }

    /// Writes what the stream takes. `false` when it takes nothing more for good.
    fn write(&mut self) -> bool {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(n) => drop(self.output.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return e.kind() == io::ErrorKind::WouldBlock,
            }
        }
        if self.answered {
            let _ = shutdown(self.stream.as_raw_fd(), Shutdown::Write);
        }
        true
    }
}

impl Agent {
    /// Begins to listen. A kernel without the Internet protocols has no such service.
    pub(super) fn open_web(&mut self) {
        match listener().and_then(|listener| {
            self.watch(&listener, Kind::Web, 0, Interest::READABLE)?;
            Ok(listener)
        }) {
            Ok(listener) => self.web.listener = Some(listener),
            Err(e) if e.raw_os_error() == Some(libc::EAFNOSUPPORT) => {}
            Err(e) => report(&format!("no service at {ADDRESS}: {e}")),
        }
    }

    /// `service.serve`: from now on this request is told what programs log, and `me` is what they hear of themselves.
    pub(super) fn service(
        &mut self,
        link: u64,
        connection: &mut Connection,
        tag: &str,
        mut args: Args,
    ) -> Result<Begun, Error> {
        let me = args.bytes("me")?;
        args.finish()?;
        self.web.me = me.map(|me| [me.as_slice(), b"\n"].concat());
        if let Some(before) = self.web.node.take().filter(|node| node.link == link)
            && connection.take(&before.tag).is_some()
        {
            connection.link.send(&Message::ok(&before.tag, Fields::new()));
        }
        self.web.node = Some(Node { link, tag: tag.to_string(), credit: INITIAL_CREDIT });
        Ok(Begun::Job(Job::Service))
    }

    /// The node takes more lines.
    pub(super) fn service_credit(&mut self, octets: u64) {
        if let Some(node) = &mut self.web.node {
            node.credit = node.credit.saturating_add(octets);
        }
    }

    /// Somebody comes.
    pub(super) fn welcome(&mut self) {
        while let Some(listener) = &self.web.listener {
            let stream = match accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK) {
                // SAFETY: accept4 has just made this descriptor and nothing else owns it.
                Ok(fd) => unsafe { File::from_raw_fd(fd) },
                Err(Errno::EINTR | Errno::ECONNABORTED) => continue,
                Err(_) => return,
            };
            self.web.next += 1;
            let (id, deadline) = (self.web.next, Instant::now() + PATIENCE);
            if self.watch(&stream, Kind::Visitor, id, Interest::READABLE | Interest::WRITABLE).is_err() {
                continue;
            }
            if self.web.visitors.len() >= VISITORS_MAX {
                self.dismiss(None);
            }
            let visitor = Visitor { stream, input: Vec::new(), output: Vec::new(), answered: false, rest: 0, deadline };
            self.web.visitors.insert(id, visitor);
            self.add_due(deadline, Due::Visitor(id));
            self.attend(id);
        }
    }

    /// Ends a connection; without a number the oldest.
    pub(super) fn dismiss(&mut self, id: Option<u64>) {
        let Some(id) = id.or_else(|| self.web.visitors.keys().next().copied()) else { return };
        if let Some(visitor) = self.web.visitors.remove(&id) {
            self.due.remove(&(visitor.deadline, Due::Visitor(id)));
        }
    }

    /// Something happened on a connection.
    pub(super) fn attend(&mut self, id: u64) {
        // Out of the map while it is looked at: its answer is everybody's matter.
        let Some(mut visitor) = self.web.visitors.remove(&id) else { return };
        let more = visitor.read();
        if !visitor.answered {
            let answer = match parse(&visitor.input) {
                Parsed::Head => None,
                Parsed::Body { expects } => {
                    if expects {
                        visitor.output.extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
                    }
                    None
                }
                Parsed::Whole { path: "/me", .. } => Some(self.who()),
                Parsed::Whole { body, .. } => Some(self.log(body)),
                Parsed::Refused(answer) => Some(answer),
            };
            if let Some(answer) = answer {
                visitor.output.extend(answer.octets());
                visitor.answered = true;
                visitor.input = Vec::new();
                // What came after it is read on, and of no interest.
                let _ = visitor.read();
            }
        }
        if visitor.write() && (more || !visitor.output.is_empty()) {
            self.web.visitors.insert(id, visitor);
        } else {
            self.due.remove(&(visitor.deadline, Due::Visitor(id)));
        }
    }

    /// `GET /me`
    fn who(&self) -> Answer {
        match &self.web.me {
            Some(me) => Answer::ok(200, me.clone()),
            None => Answer::error(503, "the node has not said yet who this is").with("Retry-After: 1\r\n"),
        }
    }

    /// `POST /logs`
    fn log(&mut self, body: &[u8]) -> Answer {
        let (lines, count) = match lines_of(body) {
            Ok(lines) => lines,
            Err(message) => return Answer::error(400, &message),
        };
        let away = || Answer::error(503, "the node takes no logs right now").with("Retry-After: 1\r\n");
        let Some(node) = &mut self.web.node else { return away() };
        let Some(connection) = self.links.get_mut(&node.link) else { return away() };
        if connection.position(&node.tag).is_none() || connection.link.queued() >= QUEUE_HIGH {
            return away();
        }
        let length = lines.len() as u64;
        if length > node.credit {
            return Answer::error(429, "these are more logs than the node takes in a second")
                .with("Retry-After: 1\r\n");
        }
        node.credit -= length;
        for chunk in lines.chunks(FRAME) {
            connection.link.send(&Message::data(&node.tag, CHANNEL, chunk));
        }
        self.busy_links.insert(node.link);
        Answer::ok(202, format!("{{\"lines\":{count}}}\n").into_bytes())
    }
}

fn listener() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
    loopback::add(ADDRESS)?;
    setsockopt(&listener, sockopt::ReuseAddr, &true)?;
    let [a, b, c, d] = ADDRESS.octets();
    bind(listener.as_raw_fd(), &SockaddrIn::new(a, b, c, d, PORT))?;
    listen(&listener, Backlog::new(64)?)?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(input: &[u8]) -> u16 {
        match parse(input) {
            Parsed::Refused(answer) => answer.status,
            Parsed::Whole { .. } => 200,
            Parsed::Head => 1,
            Parsed::Body { expects: false } => 2,
            Parsed::Body { expects: true } => 3,
        }
    }

    #[test]
    fn requests_are_whole_or_wait_or_are_refused() {
        for (input, expected) in [
            ("GET /me HTTP/1.1\r\nHost: x\r\n\r\n", 200),
            ("GET /me?x=1 HTTP/1.0\n\n", 200),
            ("GET /me HTTP/1.1\r\nHost: x\r\n", 1),
            ("", 1),
            ("POST /logs HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", 200),
            ("POST /logs HTTP/1.1\r\nContent-Length: 2\r\n\r\n{", 2),
            ("POST /logs HTTP/1.1\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n", 3),
            ("POST /logs HTTP/1.1\r\n\r\n{}", 411),
            ("POST /logs HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 501),
            ("POST /logs HTTP/1.1\r\nContent-Length: 65537\r\n\r\n", 413),
            ("POST /logs HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n", 400),
            ("POST /logs HTTP/1.1\r\nContent-Length: +2\r\n\r\n{}", 400),
            ("POST /logs HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
            ("POST /me HTTP/1.1\r\n\r\n", 405),
            ("GET /logs HTTP/1.1\r\n\r\n", 405),
            ("GET /latest/meta-data HTTP/1.1\r\n\r\n", 404),
            ("GET  /me HTTP/1.1\r\n\r\n", 400),
            ("\r\n\r\n", 400),
            ("GET /me HTTP/2\r\n\r\n", 505),
            ("GET /me HTTP/1.1\r\nno colon\r\n\r\n", 400),
            ("\x16\x03\x01\x02\r\n\r\n", 400),
        ] {
            assert_eq!(status(input.as_bytes()), expected, "{input:?}");
        }
        assert_eq!(status(&[b'x'; HEAD_MAX]), 1);
        assert_eq!(status(&[b'x'; HEAD_MAX + 1]), 431);
        assert_eq!(status(&[b"GET /me HTTP/1.1\r\n".as_slice(), &[0xff; 10], b"\r\n\r\n"].concat()), 400);
    }

    #[test]
    fn lines_are_json_each() {
        assert_eq!(lines_of(b"{\"a\":1}\r\n\n  7\n"), Ok((b"{\"a\":1}\n7\n".to_vec(), 2)));
        assert_eq!(lines_of(b"{}\n{"), Err("line 2 is no JSON".to_string()));
        assert_eq!(lines_of(b"\n \n"), Err("there is no line".to_string()));
        assert_eq!(
            lines_of(&[b"1".repeat(LINE_MAX + 1), b"\n".to_vec()].concat()),
            Err("line 1 is over 16 KiB".to_string())
        );
        assert!(lines_of("[".repeat(10_000).as_bytes()).is_err(), "however deep it is");
    }

    #[test]
    fn an_answer_says_how_long_it_is() {
        let text = String::from_utf8(Answer::error(429, "slower").with("Retry-After: 1\r\n").octets()).unwrap();
        assert!(text.starts_with("HTTP/1.1 429 Too Many Requests\r\n") && text.contains("\r\nRetry-After: 1\r\n"));
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert_eq!(body, "{\"error\":\"TOO_MANY_REQUESTS\",\"message\":\"slower\"}\n");
        assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())));
    }
}
