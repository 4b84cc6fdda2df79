//! One connection to one server, kept between requests.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};

use super::{HttpError, Response, TlsOptions, Url, response};

/// Octets of an answer's body that are kept unless more are asked for.
pub const KEPT_BODY: usize = 64 * 1024;

/// What is asked.
pub struct Request<'a> {
    /// `GET`, `POST`, ….
    pub method: &'a str,
    /// Path and query.
    pub target: &'a str,
    /// Besides `Host`, `Content-Length` and `User-Agent`. Neither names nor values hold line ends.
    pub headers: &'a [(&'a str, &'a str)],
    /// Sent with its length.
    pub body: &'a [u8],
    /// Octets of the answer's body that are kept.
    pub keep: usize,
}

/// Ends a client's request under way from another thread. Clones end the same client's.
#[derive(Clone, Default)]
pub struct Abort(Arc<Mutex<Aborted>>);

#[derive(Default)]
struct Aborted {
    aborted: bool,
    socket: Option<TcpStream>,
}

impl Abort {
    /// Ends the request under way and every later one.
    pub fn abort(&self) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.aborted = true;
        if let Some(socket) = state.socket.take() {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    fn watch(&self, socket: &TcpStream) -> io::Result<()> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.aborted {
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "stopping"));
        }
        state.socket = Some(socket.try_clone()?);
        Ok(())
    }
}

/// Speaks to one server.
pub struct Client {
    url: Url,
    tls: Option<Arc<ClientConfig>>,
    /// For a whole request, connecting and answer included.
    timeout: Duration,
    connection: Option<Connection>,
    abort: Abort,
}

enum Connection {
    Plain(TcpStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

impl Connection {
    fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(stream) => &stream.sock,
        }
    }
}

/// A connection that is read and written until a deadline.
struct Timed<'a> {
    connection: &'a mut Connection,
    deadline: Instant,
    read: u64,
}

impl Timed<'_> {
    fn arm(&mut self) -> io::Result<()> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let socket = self.connection.socket();
        socket.set_read_timeout(Some(left))?;
        socket.set_write_timeout(Some(left))
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.arm()?;
        let result = match self.connection {
            Connection::Plain(socket) => socket.read(buffer),
            Connection::Tls(stream) => match stream.read(buffer) {
                // Closed without close_notify: as a plain connection would be.
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(0),
                other => other,
            },
        };
        self.read += *result.as_ref().unwrap_or(&0) as u64;
        result
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.arm()?;
        match self.connection {
            Connection::Plain(socket) => socket.write(data),
            Connection::Tls(stream) => stream.write(data),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.arm()?;
        match self.connection {
            Connection::Plain(socket) => socket.flush(),
            Connection::Tls(stream) => stream.flush(),
        }
    }
}

impl Client {
    /// A client of the server that `url` names; connects when there is something to ask.
    pub fn new(url: Url, tls: &TlsOptions, timeout: Duration) -> Result<Self, HttpError> {
        let tls = if url.tls { Some(tls.load()?) } else { None };
        Ok(Self { url, tls, timeout, connection: None, abort: Abort::default() })
    }

    /// The address it was made with.
    pub fn url(&self) -> &Url {
        &self.url
    }

    /// Ends its requests from elsewhere.
    pub fn abort_handle(&self) -> Abort {
        self.abort.clone()
    }

    /// Asks and waits for the answer. A kept connection that turns out to be closed is replaced once.
    pub fn send(&mut self, request: &Request) -> Result<Response, HttpError> {
        self.send_by(request, Instant::now() + self.timeout)
    }

    /// The same with another time limit than the client's own.
    pub fn send_by(&mut self, request: &Request, deadline: Instant) -> Result<Response, HttpError> {
        if let Some(mut kept) = self.connection.take() {
            let mut read = 0;
            match self.ask(&mut kept, request, deadline, &mut read) {
                Err(HttpError::Io(e)) if read == 0 && e.kind() != io::ErrorKind::TimedOut && !would_block(&e) => {}
                Ok(response) => return Ok(self.keep(kept, response)),
                Err(error) => return Err(error),
            }
        }
        let mut fresh = self.connect(deadline)?;
        let response = self.ask(&mut fresh, request, deadline, &mut 0)?;
        Ok(self.keep(fresh, response))
    }

    fn keep(&mut self, connection: Connection, response: Response) -> Response {
        if response.keep_alive {
            self.connection = Some(connection);
        }
        response
    }

    fn connect(&self, deadline: Instant) -> Result<Connection, HttpError> {
        let addresses = (&*self.url.host, self.url.port).to_socket_addrs().map_err(HttpError::Connect)?;
        let mut result = Err(io::Error::new(io::ErrorKind::NotFound, "the host has no address"));
        for address in addresses {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            result = TcpStream::connect_timeout(&address, left);
            if result.is_ok() {
                break;
            }
        }
        let socket = result.map_err(HttpError::Connect)?;
        socket.set_nodelay(true).map_err(HttpError::Connect)?;
        self.abort.watch(&socket).map_err(HttpError::Connect)?;
        let Some(tls) = &self.tls else { return Ok(Connection::Plain(socket)) };
        let name = ServerName::try_from(self.url.host.clone())
            .map_err(|_| HttpError::Tls(format!("{:?} can be no certificate's name", self.url.host)))?;
        let session = ClientConnection::new(Arc::clone(tls), name).map_err(|e| HttpError::Tls(e.to_string()))?;
        Ok(Connection::Tls(Box::new(StreamOwned::new(session, socket))))
    }

    fn ask(
        &self,
        connection: &mut Connection,
        request: &Request,
        deadline: Instant,
        read: &mut u64,
    ) -> Result<Response, HttpError> {
        let mut head = format!("{} {} HTTP/1.1\r\nHost: {}\r\n", request.method, request.target, self.url.authority());
        head.push_str(concat!("User-Agent: warren-sentinel/", env!("CARGO_PKG_VERSION"), "\r\n"));
        for (name, value) in request.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if request.method != "GET" {
            head.push_str(&format!("Content-Length: {}\r\n", request.body.len()));
        }
        head.push_str("\r\n");
        let mut timed = Timed { connection, deadline, read: 0 };
        let sent = timed
            .write_all(&[head.as_bytes(), request.body].concat())
            .and_then(|()| timed.flush())
            .map_err(HttpError::Io);
        // A server may refuse before it has read everything; its answer counts.
        let answer = response::read(&mut timed, request.keep);
        *read = timed.read;
        match (sent, answer) {
            (Ok(()), answer) => answer,
            (Err(_), Ok(answer)) => Ok(Response { keep_alive: false, ..answer }),
            (Err(error), Err(_)) => Err(error),
        }
    }
}

fn would_block(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}
