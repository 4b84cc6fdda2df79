//! A small HTTP/1.1 server: for the self metrics and for the reference core. A thread per connection, everything bounded.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Connections at once; the next one is closed.
const MAX_CONNECTIONS: usize = 64;
/// Longest request line and headers together, in octets.
const MAX_HEAD: u64 = 32 * 1024;
/// How long a connection may be silent.
const IDLE: Duration = Duration::from_secs(60);

/// What a client asks.
#[derive(Debug)]
pub struct ServerRequest {
    /// `GET`, `POST`, ….
    pub method: String,
    /// Path and query.
    pub target: String,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    /// As it came.
    pub body: Vec<u8>,
}

impl ServerRequest {
    /// The first header of this (lower-case) name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| &**value)
    }
}

/// What it gets.
#[derive(Debug, Clone, Default)]
pub struct Answer {
    /// 200–599.
    pub status: u16,
    /// Besides `Content-Length`.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
}

impl Answer {
    /// An answer without a body.
    pub fn status(status: u16) -> Self {
        Self { status, ..Self::default() }
    }

    /// A body of some type.
    pub fn of(content_type: &str, body: impl Into<Vec<u8>>) -> Self {
        Self { status: 200, headers: vec![("Content-Type".into(), content_type.into())], body: body.into() }
    }
}

/// Answers requests; called from the connections' threads.
pub type Handler = dyn Fn(&ServerRequest) -> Answer + Send + Sync;

/// A server; ends when it is dropped.
pub struct Server {
    address: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    handler: Box<Handler>,
    max_body: u64,
    ended: AtomicBool,
    open: Mutex<BTreeMap<u64, TcpStream>>,
}

impl Shared {
    fn open(&self) -> MutexGuard<'_, BTreeMap<u64, TcpStream>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Server {
    /// Listens on an address; request bodies may have `max_body` octets.
    pub fn start(
        address: SocketAddr,
        max_body: u64,
        handler: impl Fn(&ServerRequest) -> Answer + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            handler: Box::new(handler),
            max_body,
            ended: AtomicBool::new(false),
            open: Mutex::default(),
        });
        let for_thread = Arc::clone(&shared);
        let thread = thread::Builder::new().name("http".into()).spawn(move || accept(&listener, &for_thread))?;
        Ok(Self { address, shared, thread: Some(thread) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Release);
        // Wakes the thread that accepts.
        let _ = TcpStream::connect_timeout(&self.address, Duration::from_secs(1));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        for socket in self.shared.open().values() {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    for number in 0.. {
        let accepted = listener.accept();
        if shared.ended.load(Ordering::Acquire) {
            return;
        }
        let socket = match accepted {
            Ok((socket, _)) => socket,
            Err(e) => {
                log::warn!("http: no connection could be accepted: {e}");
                thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        let Ok(copy) = socket.try_clone() else { continue };
        let mut open = shared.open();
        if open.len() >= MAX_CONNECTIONS {
            continue;
        }
        open.insert(number, copy);
        drop(open);
        let for_thread = Arc::clone(shared);
        let spawned = thread::Builder::new().name("http-client".into()).spawn(move || {
            let _ = serve(&socket, &for_thread);
            for_thread.open().remove(&number);
        });
        if spawned.is_err() {
            shared.open().remove(&number);
        }
    }
}

fn serve(socket: &TcpStream, shared: &Shared) -> io::Result<()> {
    socket.set_read_timeout(Some(IDLE))?;
    socket.set_write_timeout(Some(IDLE))?;
    socket.set_nodelay(true)?;
    let mut reader = BufReader::new(socket);
    while !shared.ended.load(Ordering::Acquire) {
        let request = match read(&mut reader, shared.max_body)? {
            Ok(Some(request)) => request,
            Ok(None) => return Ok(()),
            Err(status) => return write(socket, &Answer::status(status), false),
        };
        let keep_alive = !request.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
        write(socket, &(shared.handler)(&request), keep_alive)?;
        if !keep_alive {
            return Ok(());
        }
    }
    Ok(())
}

/// The next request; nothing at the end; a status when it is none that we understand.
fn read(reader: &mut impl BufRead, max_body: u64) -> io::Result<Result<Option<ServerRequest>, u16>> {
    let mut head = reader.by_ref().take(MAX_HEAD);
    let mut line = String::new();
    let mut next = |line: &mut String| -> io::Result<bool> {
        line.clear();
        head.read_line(line)?;
        let whole = line.ends_with('\n');
        line.truncate(line.trim_end_matches(['\r', '\n']).len());
        Ok(whole)
    };
    if !next(&mut line)? {
        return Ok(if line.is_empty() { Ok(None) } else { Err(431) });
    }
    let mut parts = line.split(' ');
    let (Some(method), Some(target), Some("HTTP/1.1" | "HTTP/1.0")) = (parts.next(), parts.next(), parts.next()) else {
        return Ok(Err(400));
    };
    let (method, target) = (method.to_string(), target.to_string());
    let mut headers = Vec::new();
    loop {
        if !next(&mut line)? {
            return Ok(Err(431));
        }
        if line.is_empty() {
            break;
        }
        let Some((name, value)) = line.split_once(':') else { return Ok(Err(400)) };
        headers.push((name.to_ascii_lowercase(), value.trim().to_string()));
    }
    let mut request = ServerRequest { method, target, headers, body: Vec::new() };
    if request.header("transfer-encoding").is_some() {
        return Ok(Err(411));
    }
    let length = match request.header("content-length").map(str::parse::<u64>) {
        None => 0,
        Some(Ok(length)) if length <= max_body => length,
        Some(Ok(_)) => return Ok(Err(413)),
        Some(Err(_)) => return Ok(Err(400)),
    };
    reader.take(length).read_to_end(&mut request.body)?;
    if request.body.len() as u64 != length {
        return Ok(Ok(None));
    }
    Ok(Ok(Some(request)))
}

fn write(mut socket: &TcpStream, answer: &Answer, keep_alive: bool) -> io::Result<()> {
    let mut out = format!("HTTP/1.1 {} -\r\nContent-Length: {}\r\n", answer.status, answer.body.len());
    for (name, value) in &answer.headers {
        out.push_str(&format!("{name}: {value}\r\n"));
    }
    if !keep_alive {
        out.push_str("Connection: close\r\n");
    }
    out.push_str("\r\n");
    socket.write_all(&[out.as_bytes(), &answer.body].concat())
}

#[cfg(test)]
mod tests {
    use super::super::{Client, KEPT_BODY, Request, TlsOptions, Url};
    use super::*;

    fn echo() -> Server {
        let answer = |request: &ServerRequest| match &*request.target {
            "/echo" => Answer::of("text/plain", request.body.clone()),
            _ => Answer::status(404),
        };
        Server::start(([127, 0, 0, 1], 0).into(), 1000, answer).unwrap()
    }

    fn client(server: &Server) -> Client {
        let url = Url::parse(&format!("http://{}", server.address())).unwrap();
        Client::new(url, &TlsOptions::default(), Duration::from_secs(20)).unwrap()
    }

    fn post(client: &mut Client, target: &str, body: &[u8]) -> u16 {
        client.send(&Request { method: "POST", target, headers: &[], body, keep: KEPT_BODY }).unwrap().status
    }

    #[test]
    fn client_and_server_understand_each_other_on_one_connection() {
        let server = echo();
        let mut client = client(&server);
        for n in 0..5 {
            let request =
                Request { method: "POST", target: "/echo", headers: &[("X", "y")], body: &[n; 900], keep: 950 };
            let answer = client.send(&request).unwrap();
            assert_eq!((answer.status, &answer.body[..]), (200, &[n; 900][..]));
            assert_eq!(post(&mut client, "/other", b""), 404);
            assert_eq!(server.shared.open().len(), 1);
        }
        assert_eq!(post(&mut client, "/echo", &[0; 1001]), 413);
    }

    #[test]
    fn a_connection_that_the_server_has_closed_is_replaced() {
        let server = echo();
        let mut client = client(&server);
        assert_eq!(post(&mut client, "/echo", b"1"), 200);
        server.shared.open().values().for_each(|socket| socket.shutdown(Shutdown::Both).unwrap());
        assert_eq!(post(&mut client, "/echo", b"2"), 200);
    }

    #[test]
    fn garbage_is_answered_and_costs_nobody_else_anything() {
        let server = echo();
        for garbage in ["GET\r\n\r\n", "POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n", &"x".repeat(40_000)] {
            let mut socket = TcpStream::connect(server.address()).unwrap();
            let _ = socket.write_all(garbage.as_bytes());
            let _ = socket.shutdown(Shutdown::Write);
            let mut answer = String::new();
            let _ = socket.read_to_string(&mut answer);
            assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
        }
        assert_eq!(post(&mut client(&server), "/echo", b""), 200);
    }
}
