//! One request and its answer on a connection that never blocks, with the time of each phase.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use mio::Interest;
use mio::net::TcpStream;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection};
use zeroize::Zeroizing;

use super::certificate::not_after;
use crate::sentinel::collect::Io;
use crate::sentinel::http::response::MAX_HEAD;

/// Octets read at one go.
const AT_ONCE: usize = 1024 * 1024;

/// Where octets are read to, one call's after the other's.
pub type Chunk = [u8; 64 * 1024];

/// When each phase ended.
#[derive(Debug, Clone, Copy, Default)]
pub struct Phases {
    /// The name was looked up.
    pub resolved: Option<Instant>,
    /// TCP is there.
    pub connected: Option<Instant>,
    /// TLS is there.
    pub secured: Option<Instant>,
    /// The first octet of the answer came.
    pub answered: Option<Instant>,
    /// The last one did.
    pub done: Option<Instant>,
}

/// Where an exchange is.
pub enum Progress {
    /// Something must come.
    Waiting,
    /// The whole answer is there.
    Complete,
}

/// A connection, with a request under way or between two.
pub struct Connection {
    stream: TcpStream,
    tls: Option<ClientConnection>,
    /// The loop's events of it have this number.
    pub number: u64,
    /// Whose it is.
    pub address: SocketAddr,
}

impl Connection {
    fn open(
        address: SocketAddr,
        tls: Option<(Arc<ClientConfig>, &str)>,
        number: u64,
        io: &Io<'_>,
    ) -> Result<Self, String> {
        let tls = match tls {
            Some((config, host)) => {
                let name = ServerName::try_from(host.to_string()).map_err(|e| format!("TLS: {e}"))?;
                let mut connection = ClientConnection::new(config, name).map_err(|e| format!("TLS: {e}"))?;
                connection.set_buffer_limit(None);
                Some(connection)
            }
            None => None,
        };
        let failed = |e: io::Error| format!("cannot connect to {address}: {e}");
        let mut stream = TcpStream::connect(address).map_err(failed)?;
        io.watch(&mut stream, number, Interest::READABLE | Interest::WRITABLE).map_err(failed)?;
        Ok(Self { stream, tls, number, address })
    }

    /// Whether nothing has come since the last answer: not its end either.
    pub fn is_quiet(&mut self) -> bool {
        let silent = |e: io::Error| e.kind() == io::ErrorKind::WouldBlock;
        let Some(tls) = &mut self.tls else { return self.stream.peek(&mut [0]).is_err_and(silent) };
        loop {
            match tls.read_tls(&mut self.stream) {
                Ok(0) => return false,
                Ok(_) => {}
                Err(e) => return silent(e),
            }
            // Tickets for other sessions are nothing that is said.
            match tls.process_new_packets() {
                Ok(state) if state.plaintext_bytes_to_read() == 0 && !state.peer_has_closed() => {}
                _ => return false,
            }
        }
    }

    /// Gives it up.
    pub fn close(mut self, io: &Io<'_>) {
        io.unwatch(&mut self.stream);
    }
}

/// A request and its answer.
pub struct Exchange {
    connection: Connection,
    /// The connection had an answer before.
    reused: bool,
    /// What is still to be sent; it may hold secrets.
    out: Zeroizing<Vec<u8>>,
    /// Whether only a head is to come.
    head: bool,
    /// The answer as it came.
    pub raw: Vec<u8>,
    limit: usize,
    body: Body,
    /// What has been walked of the chunks.
    walked: usize,
    /// When each phase ended.
    pub phases: Phases,
}

/// How the answer's body ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Body {
    /// The head has not all come yet.
    Unknown,
    /// At this octet of the answer.
    At(usize),
    /// With a chunk of no octets.
    Chunks,
    /// With the connection.
    Close,
}

impl Exchange {
    /// Connects; `head`: the answer has no body; `limit` bounds it; `raw`: empty, where it will stand.
    #[allow(clippy::too_many_arguments)] // what an exchange is, named once
    pub fn start(
        address: SocketAddr,
        tls: Option<(Arc<ClientConfig>, &str)>,
        request: Zeroizing<Vec<u8>>,
        head: bool,
        limit: usize,
        raw: Vec<u8>,
        number: u64,
        io: &Io<'_>,
    ) -> Result<Self, String> {
        let connection = Connection::open(address, tls, number, io)?;
        let phases = Phases { resolved: Some(io.now), ..Phases::default() };
        let (reused, out, body, walked) = (false, request, Body::Unknown, 0);
        Ok(Self { connection, reused, out, head, raw, limit, body, walked, phases })
    }

    /// On a connection that had an answer before; to be gone on with at once.
    pub fn again(
        connection: Connection,
        request: Zeroizing<Vec<u8>>,
        head: bool,
        limit: usize,
        raw: Vec<u8>,
        now: Instant,
    ) -> Self {
        let secured = connection.tls.is_some().then_some(now);
        let phases = Phases { resolved: Some(now), connected: Some(now), secured, ..Phases::default() };
        let (reused, out, body, walked) = (true, request, Body::Unknown, 0);
        Self { connection, reused, out, head, raw, limit, body, walked, phases }
    }

    /// Its events' number.
    pub fn number(&self) -> u64 {
        self.connection.number
    }

    /// Whether it failed only because the server had given the kept connection up: then it has seen nothing of the
    /// request, as far as anybody can know, and a new connection is worth a try (RFC 9112 §9.3.1). Whose it was.
    pub fn was_stale(&self) -> Option<SocketAddr> {
        (self.reused && self.raw.is_empty()).then_some(self.connection.address)
    }

    /// The connection and what came on it.
    pub fn into_parts(self) -> (Connection, Vec<u8>) {
        (self.connection, self.raw)
    }

    /// When the certificate that the server showed ends, in seconds since 1970-01-01 UTC; of a chain, the first to end.
    pub fn certificate_end(&self) -> Option<i64> {
        let chain = self.connection.tls.as_ref()?.peer_certificates()?;
        chain.iter().filter_map(|certificate| not_after(certificate)).min()
    }

    /// Goes on as far as the connection lets it.
    pub fn go_on(&mut self, now: Instant, chunk: &mut Chunk) -> Result<Progress, String> {
        if self.phases.connected.is_none() {
            let stream = &self.connection.stream;
            if let Ok(Some(e)) | Err(e) = stream.take_error() {
                return Err(format!("cannot connect: {e}"));
            }
            if stream.peer_addr().is_err() {
                return Ok(Progress::Waiting);
            }
            self.phases.connected = Some(now);
            // A small request must not wait for more to come.
            let _ = stream.set_nodelay(true);
        }
        let ended = match self.connection.tls {
            Some(_) => self.secured(now, chunk),
            None => self.plain(chunk),
        };
        let ended = ended.map_err(|e| format!("the connection failed: {e}"))?;
        if !self.raw.is_empty() {
            self.phases.answered.get_or_insert(now);
        }
        if self.complete(ended)? {
            self.phases.done = Some(now);
            return Ok(Progress::Complete);
        }
        Ok(Progress::Waiting)
    }

    fn plain(&mut self, chunk: &mut Chunk) -> io::Result<bool> {
        let stream = &mut self.connection.stream;
        while !self.out.is_empty() {
            match stream.write(&self.out) {
                Ok(count) => _ = self.out.drain(..count),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        drain(stream, chunk, &mut self.raw, self.limit)
    }

    fn secured(&mut self, now: Instant, chunk: &mut Chunk) -> io::Result<bool> {
        let Connection { stream, tls: Some(tls), .. } = &mut self.connection else { return Ok(false) };
        // Waits inside until the handshake is done.
        tls.writer().write_all(&std::mem::take(&mut self.out))?;
        loop {
            while tls.wants_write() {
                match tls.write_tls(stream) {
                    Ok(_) => {}
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                    Err(e) => return Err(e),
                }
            }
            let ended = match tls.read_tls(stream) {
                Ok(count) => count == 0,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            if let Err(e) = tls.process_new_packets() {
                // The server learns why, if it still listens.
                let _ = tls.write_tls(stream);
                return Err(io::Error::other(format!("TLS: {e}")));
            }
            if !tls.is_handshaking() {
                self.phases.secured.get_or_insert(now);
            }
            let closed = match drain(&mut tls.reader(), chunk, &mut self.raw, self.limit) {
                // Without a goodbye: whether something is missing shows in the answer's own framing.
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => true,
                other => other?,
            };
            if ended || closed || self.raw.len() > self.limit + MAX_HEAD {
                return Ok(true);
            }
        }
    }

    /// Whether the whole answer is there, now that so much has come.
    fn complete(&mut self, ended: bool) -> Result<bool, String> {
        if self.body == Body::Unknown {
            let head = self.raw.windows(4).take(MAX_HEAD).position(|octets| octets == b"\r\n\r\n");
            match head {
                Some(at) => {
                    self.walked = at + 4;
                    self.body = if self.head { Body::At(at + 4) } else { framing(&self.raw[..at], at + 4)? };
                }
                None if self.raw.len() > MAX_HEAD => return Err("the answer's head is too long".into()),
                None if ended => return Err("the server closed the connection before it answered".into()),
                None => return Ok(false),
            }
        }
        if self.raw.len() > self.limit + MAX_HEAD {
            return Err(format!("the answer is longer than {} octets", self.limit));
        }
        let complete = match self.body {
            Body::At(end) if end > self.limit + MAX_HEAD => {
                return Err(format!("the answer is longer than {} octets", self.limit));
            }
            Body::At(end) => self.raw.len() >= end,
            Body::Chunks => self.chunks()?,
            Body::Close | Body::Unknown => ended,
        };
        if ended && !complete {
            return Err("the server closed the connection in the middle of its answer".into());
        }
        Ok(complete)
    }

    fn chunks(&mut self) -> Result<bool, String> {
        loop {
            let rest = &self.raw[self.walked..];
            let Some(line) = rest.windows(2).take(256).position(|octets| octets == b"\r\n") else {
                return if rest.len() > 256 { Err("a chunk has no length".into()) } else { Ok(false) };
            };
            let digits = std::str::from_utf8(&rest[..line]).unwrap_or_default();
            let digits = digits.split(';').next().unwrap_or_default().trim();
            let length = usize::from_str_radix(digits, 16).map_err(|_| "a chunk has no length".to_string())?;
            if length == 0 {
                // Trailers may follow; the last line is empty.
                return Ok(rest[line..].windows(4).any(|octets| octets == b"\r\n\r\n"));
            }
            let next = length.checked_add(line + 4).filter(|next| *next <= self.limit + MAX_HEAD);
            let next = next.ok_or_else(|| format!("the answer is longer than {} octets", self.limit))?;
            if rest.len() < next {
                return Ok(false);
            }
            self.walked += next;
        }
    }
}

/// Reads what there is; `true` at the end.
fn drain(from: &mut dyn Read, chunk: &mut Chunk, into: &mut Vec<u8>, limit: usize) -> io::Result<bool> {
    let start = into.len();
    // The rest comes with the next event: what is registered for reading is told again after a short read only, so
    // reading stops early only where the answer is too long anyway.
    while into.len() - start < AT_ONCE.max(limit) + 2 * MAX_HEAD {
        match from.read(chunk) {
            Ok(0) => return Ok(true),
            Ok(count) => into.extend_from_slice(&chunk[..count]),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(false)
}

/// How the body ends that follows this head at octet `start`.
fn framing(head: &[u8], start: usize) -> Result<Body, String> {
    let text = String::from_utf8_lossy(head);
    let mut lines = text.split("\r\n");
    let status = lines.next().and_then(|line| line.split(' ').nth(1)).unwrap_or_default();
    let mut length = None;
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        if name.eq_ignore_ascii_case("transfer-encoding") && value.trim().eq_ignore_ascii_case("chunked") {
            return Ok(Body::Chunks);
        }
        if name.eq_ignore_ascii_case("content-length") {
            let value: usize = value.trim().parse().map_err(|_| "a length that is no number".to_string())?;
            length = Some(start.checked_add(value).ok_or("a length that is no number")?);
        }
    }
    Ok(match length {
        _ if matches!(status, "204" | "304") => Body::At(start),
        Some(end) => Body::At(end),
        None => Body::Close,
    })
}
