//! `warren bridge`: gives the one serial port of a node in QEMU to many clients on this machine.
//!
//! One mio loop owns QEMU's socket, the listening socket and the clients. `relay` has the rules, `port` reads the
//! port. A client that does not read what it asked for is dropped at `MAX_UNREAD`; one that sends faster than the
//! node takes is not read for a while; neither costs the others anything.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mio::net::{UnixListener, UnixStream};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use nix::sys::stat::{Mode, umask};

use super::args::BridgeArgs;
use super::client::{CONNECT_FAILED, LOCAL_IO, local};
use super::signals::{ENDING, Signals};
use crate::wire::{Code, Error, Filled, Link, Message};
use port::PortReader;
use relay::Relay;

mod port;
mod relay;

/// Octets of answers that may wait for a client before it is dropped.
const MAX_UNREAD: usize = 8 * 1024 * 1024;
/// Clients at a time.
const MAX_CLIENTS: usize = 256;
/// Octets in the port's buffer before clients' queues wait: little, so that cancels are not late.
const PORT_BUFFER: usize = 64 * 1024;
/// Between two attempts to reach QEMU's socket.
const RETRY: Duration = Duration::from_millis(50);
/// How long QEMU's socket may be away before QEMU has ended for good.
const GRACE: Duration = Duration::from_millis(500);
/// How long the rest of a message may take before it is taken for lost.
const STALL: Duration = Duration::from_secs(2);

const LISTENER: Token = Token(0);
const SIGNALS: Token = Token(1);
const PORT: Token = Token(2);
/// A client's token is its number plus this.
const CLIENTS: usize = 2;

/// A line for whoever reads the bridge's log.
fn note(sentence: &str) {
    super::output::complain(&format!("bridge: {sentence}"));
}

/// Runs the bridge until QEMU ends or a signal asks for the end: both are success.
pub fn main(args: &BridgeArgs) -> Result<u8, Error> {
    let signals = Signals::take(&ENDING).map_err(|e| local(LOCAL_IO, format!("signalfd: {e}")))?;
    let mut bridge = Bridge::new(args)?;
    bridge
        .poll
        .registry()
        .register(&mut SourceFd(&signals.as_fd().as_raw_fd()), SIGNALS, Interest::READABLE)
        .map_err(|e| local(LOCAL_IO, format!("epoll: {e}")))?;
    bridge.serve(&signals)?;
    Ok(0)
}

/// The listening socket's file; removed on drop, unless another has taken its place.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.identity) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Binds with mode 0600, in place of a socket that nobody listens on any more.
fn bind(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
    let before = umask(Mode::from_bits_truncate(0o177));
    let bound = UnixListener::bind(path).or_else(|e| {
        let is_stale = e.kind() == ErrorKind::AddrInUse
            && std::os::unix::net::UnixStream::connect(path).is_err_and(|e| e.kind() == ErrorKind::ConnectionRefused);
        if !is_stale {
            return Err(e);
        }
        fs::remove_file(path)?;
        UnixListener::bind(path)
    });
    umask(before);
    let listener = bound?;
    let made = fs::symlink_metadata(path)?;
    Ok((listener, SocketFile { path: path.to_path_buf(), identity: (made.dev(), made.ino()) }))
}

#[derive(Debug)]
struct Port {
    stream: UnixStream,
    reader: PortReader,
    out: Vec<u8>,
    written: usize,
    readable: bool,
    /// When octets last came.
    heard: Instant,
}

#[derive(Debug)]
struct Client {
    link: Link<UnixStream>,
    readable: bool,
    /// It sends nothing more; what it asked for is still answered.
    half_closed: bool,
    gone: bool,
}

struct Bridge {
    poll: Poll,
    listener: UnixListener,
    _file: SocketFile,
    chardev: PathBuf,
    wait: Duration,
    port: Option<Port>,
    /// While there is no port: until when to look for it.
    give_up: Instant,
    was_connected: bool,
    clients: BTreeMap<u64, Client>,
    relay: Relay,
}

impl Bridge {
    fn new(args: &BridgeArgs) -> Result<Self, Error> {
        let failed = |e: io::Error| local(LOCAL_IO, format!("cannot listen at {}: {e}", args.listen.display()));
        let (mut listener, file) = bind(&args.listen).map_err(failed)?;
        let poll = Poll::new().map_err(failed)?;
        poll.registry().register(&mut listener, LISTENER, Interest::READABLE).map_err(failed)?;
        Ok(Self {
            poll,
            listener,
            _file: file,
            chardev: args.chardev.clone(),
            wait: args.wait,
            port: None,
            give_up: Instant::now() + args.wait,
            was_connected: false,
            clients: BTreeMap::new(),
            relay: Relay::new(),
        })
    }

    fn serve(&mut self, signals: &Signals) -> Result<(), Error> {
        let mut events = Events::with_capacity(256);
        loop {
            if self.port.is_none() && !self.connect()? {
                return Ok(());
            }
            match self.poll.poll(&mut events, self.timeout()) {
                Ok(()) => {}
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => return Err(local(LOCAL_IO, format!("epoll: {e}"))),
            }
            for event in &events {
                match event.token() {
                    SIGNALS => {
                        // Taken, so that they do not strike when they are let through again.
                        while signals.next().is_some() {}
                        return Ok(());
                    }
                    LISTENER => self.accept(),
                    PORT => {
                        if let Some(port) = &mut self.port {
                            port.readable |= event.is_readable() || event.is_read_closed();
                        }
                    }
                    Token(token) => {
                        if let Some(client) = self.clients.get_mut(&((token - CLIENTS) as u64)) {
                            client.readable |= event.is_readable() || event.is_read_closed();
                            // Not a half close: the client cannot read either.
                            client.gone |= event.is_write_closed() || event.is_error();
                        }
                    }
                }
            }
            self.find_swallowed_greeting();
            while self.turn() {}
        }
    }

    fn timeout(&self) -> Option<Duration> {
        match &self.port {
            None => Some(RETRY),
            Some(port) if port.reader.is_in_message() => Some(STALL),
            Some(_) => None,
        }
    }

    /// Tries to reach QEMU's socket; `false` when QEMU has ended.
    fn connect(&mut self) -> Result<bool, Error> {
        let attempt = UnixStream::connect(&self.chardev).and_then(|mut stream| {
            let interest = Interest::READABLE | Interest::WRITABLE;
            self.poll.registry().register(&mut stream, PORT, interest).map(|()| stream)
        });
        match attempt {
            Ok(stream) => {
                self.was_connected = true;
                let (reader, heard) = (PortReader::new(), Instant::now());
                self.port = Some(Port { stream, reader, out: Vec::new(), written: 0, readable: true, heard });
            }
            Err(_) if Instant::now() < self.give_up => {}
            Err(_) if self.was_connected => return Ok(false),
            Err(e) => {
                let (path, wait) = (self.chardev.display(), self.wait);
                return Err(local(CONNECT_FAILED, format!("QEMU's socket {path} did not appear in {wait:?}: {e}")));
            }
        }
        Ok(true)
    }

    fn accept(&mut self) {
        loop {
            let mut stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => continue,
                Err(e) => return note(&format!("accept: {e}")),
            };
            if self.clients.len() >= MAX_CLIENTS {
                let error = Error::new(Code::NoCapacity, format!("the bridge has {MAX_CLIENTS} clients"));
                let _ = stream.write(&Message::err("-", error).to_bytes());
                continue;
            }
            let id = self.relay.connected();
            let token = Token(id as usize + CLIENTS);
            let interest = Interest::READABLE | Interest::WRITABLE;
            if let Err(e) = self.poll.registry().register(&mut stream, token, interest) {
                note(&format!("epoll: {e}"));
                self.relay.gone(id);
                continue;
            }
            let client = Client { link: Link::new(stream), readable: true, half_closed: false, gone: false };
            self.clients.insert(id, client);
        }
    }

    /// Moves what can be moved once, everybody in turn; `true` while there is more to do.
    fn turn(&mut self) -> bool {
        let mut more = self.read_port();
        more |= self.read_clients();
        more |= self.write_port();
        self.write_clients();
        more
    }

    fn read_port(&mut self) -> bool {
        let Some(port) = self.port.as_mut().filter(|port| port.readable) else { return false };
        let mut chunk = [0u8; 64 * 1024];
        match port.stream.read(&mut chunk) {
            Ok(0) => self.lose_port("closed"),
            Ok(n) => {
                port.heard = Instant::now();
                port.reader.push(&chunk[..n]);
                while let Some(found) = port.reader.next() {
                    if let Some(greeting) = self.relay.take_from_port(found) {
                        greet(port, &greeting);
                    }
                }
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                port.readable = false;
                return false;
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => self.lose_port(&e.to_string()),
        }
        true
    }

    fn find_swallowed_greeting(&mut self) {
        let Some(port) = self.port.as_mut().filter(|port| port.heard.elapsed() >= STALL) else { return };
        if let Some(greeting) = port.reader.greeting_in_message().and_then(|found| self.relay.take_from_port(found)) {
            note("the node went away in the middle of a message");
            greet(port, &greeting);
        }
    }

    fn read_clients(&mut self) -> bool {
        let mut more = false;
        for (&id, client) in &mut self.clients {
            if !client.readable || client.half_closed || client.gone || !self.relay.accepts(id) {
                continue;
            }
            match client.link.fill() {
                Ok(Filled::Drained) => client.readable = false,
                Ok(Filled::More) => {
                    more = true;
                    while let Some(found) = client.link.next() {
                        self.relay.take_from_client(id, found);
                    }
                }
                Ok(Filled::Closed) => client.half_closed = true,
                Err(_) => client.gone = true,
            }
        }
        more
    }

    /// Hands answers out, and drops who has gone, is done, or does not read.
    fn write_clients(&mut self) {
        loop {
            for (id, message) in self.relay.take_replies() {
                if let Some(client) = self.clients.get_mut(&id) {
                    client.link.send(&message);
                }
            }
            for (id, client) in &mut self.clients {
                client.gone |= client.link.flush().is_err();
                if client.link.queued() > MAX_UNREAD && !client.gone {
                    note(&format!("client {id} does not read its answers: dropped"));
                    client.gone = true;
                }
                client.gone |= client.half_closed && client.link.queued() == 0 && self.relay.is_idle(*id);
            }
            let gone: Vec<u64> = self.clients.iter().filter(|(_, c)| c.gone).map(|(&id, _)| id).collect();
            if gone.is_empty() {
                return;
            }
            for id in gone {
                self.relay.gone(id);
                if let Some(mut client) = self.clients.remove(&id) {
                    let _ = self.poll.registry().deregister(client.link.stream());
                }
            }
            self.write_port();
        }
    }

    /// Fills the port's buffer and writes it; `true` when all of a full buffer went out.
    fn write_port(&mut self) -> bool {
        let Some(port) = &mut self.port else { return false };
        while port.out.len() - port.written < PORT_BUFFER {
            let Some(message) = self.relay.next_for_port() else { break };
            port.out.extend_from_slice(&message);
        }
        while port.written < port.out.len() {
            match port.stream.write(&port.out[port.written..]) {
                Ok(n) if n > 0 => port.written += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    port.out.drain(..port.written);
                    port.written = 0;
                    return false;
                }
                Ok(_) => return false,
                Err(e) => {
                    self.lose_port(&e.to_string());
                    return true;
                }
            }
        }
        port.out.clear();
        port.written = 0;
        self.relay.has_for_port()
    }

    fn lose_port(&mut self, why: &str) {
        note(&format!("QEMU's socket: {why}"));
        if let Some(mut port) = self.port.take() {
            let _ = self.poll.registry().deregister(&mut port.stream);
        }
        self.relay.port_lost();
        self.give_up = Instant::now() + GRACE;
    }
}

/// Answers the node's greeting.
fn greet(port: &mut Port, greeting: &relay::Greeting) {
    if greeting.is_new {
        // The rest of a half written message would follow the answer, and the new supervisor would believe it.
        port.out.clear();
        port.written = 0;
    }
    port.out.extend_from_slice(&greeting.answer);
}
