//! The worker process: one mio loop that serves the supervisor's connections and the guest's devices.
//!
//! It opens no path. The supervisor gives it a listening socket (descriptor 3), a file for its last words
//! (descriptor 4), and with `vm.start` everything that the microVM needs. Until then it knows no sandbox and may wait
//! for long; it ends by itself when its last connection closes meanwhile.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mio::event::Event;
use mio::net::UnixListener;
use mio::{Events, Interest, Poll, Token, Waker};

use super::config::{
    CaptureConfig, MAX_MEMORY_MIB, MIN_TARGET_MIB, PrepareConfig, StartConfig, parse_limits, parse_working_set,
};
use super::jail;
use super::last_words::{End, LastWords, Reason, say};
use super::link::{Connection, RawStream};
use super::machine::Machine;
use super::restoring::Prepared;
use crate::wire::{Args, Code, Decoded, Error, Fields, Filled, Message, PROTOCOL_VERSION, Request, WORKER_LINK};

/// The descriptor that the worker listens on.
const LISTENER_FD: RawFd = 3;
/// Events taken from the kernel at once.
const EVENTS: usize = 64;
/// A connection that leaves this many octets of replies unread is closed.
const QUEUE_MAX: usize = 256 * 1024;
/// Longest wait for a guest's word, in milliseconds, and how many requests may wait at once.
const MAX_WAIT_MS: u64 = 10_000;
const MAX_SURVEYS: usize = 64;

const LISTENER: Token = Token(0);
const ENDED: Token = Token(1);
/// The devices' tokens, and the first of the connections'.
const FIRST_DEVICE: usize = 16;
const FIRST_CONNECTION: usize = 1 << 16;

/// Runs the worker to its end.
pub fn main() -> ExitCode {
    // The one argument that a worker knows; see `Breach::Explain`.
    let explains = std::env::args_os().nth(2).is_some_and(|argument| argument == "explain");
    let breach = if explains { jail::Breach::Explain } else { jail::Breach::Kill };
    let last_words = LastWords::take_over();
    // Children write snapshots and tell how that went by a pipe: nobody waits for them.
    // SAFETY: sets how a signal is taken, before there is another thread.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    if let Err(e) = jail::close(breach) {
        let end = End::new(Reason::StartFailed, e.to_string());
        last_words.write(&end);
        say(&end);
        return ExitCode::FAILURE;
    }
    let run = take_over_listener().and_then(Worker::new).and_then(|worker| worker.run(&last_words));
    let end = match run {
        Ok(end) => end,
        Err(e) => {
            let end = End::new(Reason::Internal, format!("the worker's loop failed: {e}"));
            last_words.write(&end);
            end
        }
    };
    say(&end);
    if end.reason.is_orderly() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn take_over_listener() -> io::Result<StdListener> {
    // SAFETY: the supervisor gives the worker this descriptor and nothing else in the process owns it; if it is no
    // listening socket, the first accept fails.
    let listener = unsafe { StdListener::from_raw_fd(LISTENER_FD) };
    listener.set_nonblocking(true)?;
    // SAFETY: sets a flag of a descriptor that is open: the call above succeeded.
    unsafe { libc::fcntl(LISTENER_FD, libc::F_SETFD, libc::FD_CLOEXEC) };
    Ok(listener)
}

/// A request of a connection that is answered later.
#[derive(Debug)]
struct Pending {
    connection: Token,
    tag: String,
}

struct Worker {
    poll: Poll,
    listener: UnixListener,
    connections: BTreeMap<Token, Connection>,
    next_connection: usize,
    /// The microVM, once `vm.start` made it.
    machine: Option<Machine>,
    /// What was made of a snapshot before that.
    prepared: Option<Prepared>,
    /// How the microVM ended; the loop ends with it.
    end: Option<End>,
    /// Filled by processors' threads; the first end counts.
    guest_end: Arc<Mutex<Option<End>>>,
    waker: Arc<Waker>,
    /// `vm.watch` requests.
    watchers: Vec<Pending>,
    /// A disk found no room on the node for what the guest wrote, and watchers were told so.
    disk_full: bool,
    /// `vm.stop` requests.
    stoppers: Vec<Pending>,
    /// `vm.stats` requests that wait for the guest's word.
    surveys: Vec<Survey>,
}

/// A `vm.stats` request that waits for the guest to say how it is.
#[derive(Debug)]
struct Survey {
    request: Pending,
    asked: Instant,
    /// The guest need not answer: then it is told what there is.
    deadline: Instant,
}

/// What a request leads to.
enum Outcome {
    /// Its final reply.
    Done(Fields),
    /// It is answered later, or was answered already.
    Later,
}

impl Worker {
    /// A worker on a non-blocking listening socket.
    fn new(listener: StdListener) -> io::Result<Self> {
        let mut listener = UnixListener::from_std(listener);
        let poll = Poll::new()?;
        poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
        let waker = Arc::new(Waker::new(poll.registry(), ENDED)?);
        Ok(Self {
            poll,
            listener,
            connections: BTreeMap::new(),
            next_connection: FIRST_CONNECTION,
            machine: None,
            prepared: None,
            end: None,
            guest_end: Arc::default(),
            waker,
            watchers: Vec::new(),
            disk_full: false,
            stoppers: Vec::new(),
            surveys: Vec::new(),
        })
    }

    fn run(mut self, last_words: &LastWords) -> io::Result<End> {
        let mut events = Events::with_capacity(EVENTS);
        loop {
            let deadline = self.surveys.iter().map(|survey| survey.deadline).min();
            let sleep = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            match self.poll.poll(&mut events, sleep) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            }
            // Before anything of the guest is passed on: what it says of a failed write is then known for what it is.
            self.tell_of_full_disks();
            for event in &events {
                match event.token() {
                    LISTENER => self.accept()?,
                    ENDED => {
                        let guest_end = self.guest_end.lock().unwrap_or_else(PoisonError::into_inner).take();
                        self.end = self.end.take().or(guest_end);
                    }
                    token if token.0 < FIRST_CONNECTION => {
                        if let Some(machine) = &self.machine {
                            machine.devices().handle(token);
                        }
                    }
                    token => self.serve(token, event),
                }
            }
            self.answer_surveys();
            if let Some(end) = self.end.take() {
                return Ok(self.finish(end, last_words));
            }
        }
    }

    /// Tells who watches, once, that a disk found no room on the node.
    fn tell_of_full_disks(&mut self) {
        let full = self.machine.as_ref().is_some_and(|machine| machine.devices().found_no_room());
        if !full || std::mem::replace(&mut self.disk_full, true) {
            return;
        }
        for watcher in &self.watchers {
            if let Some(connection) = self.connections.get_mut(&watcher.connection) {
                // A connection that fails is closed when its own event says so.
                let _ = connection.send(&Message::item(&watcher.tag, disk_full()));
            }
        }
    }

    /// Takes every connection that waits.
    fn accept(&mut self) -> io::Result<()> {
        loop {
            let mut stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::ECONNABORTED)) => continue,
                Err(e) if matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)) => {
                    // Who waits is served with the next connection that arrives.
                    say(&format_args!("a connection cannot be taken: {e}"));
                    return Ok(());
                }
                Err(e) => return Err(e),
            };
            let token = Token(self.next_connection);
            self.next_connection += 1;
            self.poll.registry().register(&mut stream, token, Interest::READABLE | Interest::WRITABLE)?;
            self.connections.insert(token, Connection::new(stream));
        }
    }

    fn serve(&mut self, token: Token, event: &Event) {
        if event.is_writable() && self.connections.get_mut(&token).is_some_and(|c| c.flush().is_err()) {
            self.close(token);
        }
        if event.is_readable() {
            self.read(token);
        }
    }

    /// Reads a connection until it has no more (events are edge-triggered) or is handed over.
    fn read(&mut self, token: Token) {
        loop {
            let Some(connection) = self.connections.get_mut(&token) else { return };
            let filled = match connection.fill() {
                Ok(filled) => filled,
                Err(e) => {
                    say(&format_args!("a connection failed: {e}"));
                    return self.close(token);
                }
            };
            while let Some(decoded) = self.connections.get_mut(&token).and_then(Connection::next) {
                self.receive(token, decoded);
            }
            match filled {
                Filled::More => {}
                Filled::Drained => return,
                Filled::Closed => return self.close(token),
            }
        }
    }

    fn receive(&mut self, token: Token, decoded: Decoded) {
        match decoded {
            Decoded::Message(Message::Request(request)) => {
                let tag = request.tag.clone();
                match self.request(token, request) {
                    Ok(Outcome::Done(fields)) => self.send(token, &Message::ok(&tag, fields)),
                    Ok(Outcome::Later) => {}
                    Err(error) => self.send(token, &Message::err(&tag, error)),
                }
            }
            Decoded::Message(Message::Cancel { tag }) => self.cancel(token, &tag),
            Decoded::Message(other) => {
                let error = Error::new(Code::BadLine, "the worker takes requests only");
                self.send(token, &Message::err(other.tag(), error));
            }
            Decoded::Bad { tag, error } => self.send(token, &Message::err(&tag, error)),
        }
    }

    fn request(&mut self, token: Token, request: Request) -> Result<Outcome, Error> {
        let tag = request.tag.clone();
        match request.verb.as_str() {
            "hello" => {
                Args::of(request).finish()?;
                let greeting = Fields::new().with("protocol", PROTOCOL_VERSION).with("link", WORKER_LINK);
                let greeting = greeting.with("role", "worker");
                let is_held = self.machine.as_ref().is_some_and(Machine::is_held);
                let greeting = if is_held { greeting.with("held", true) } else { greeting };
                let overlay = self.machine.as_ref().and_then(Machine::next_overlay);
                Ok(Outcome::Done(overlay.iter().fold(greeting, |greeting, name| greeting.with("overlay", name))))
            }
            "vm.prepare" => self.prepare(token, request),
            "vm.start" => self.start(token, request),
            "vm.watch" => {
                Args::of(request).finish()?;
                if self.machine.is_some() {
                    self.send(token, &Message::item(&tag, Fields::new().with("event", "running")));
                }
                if self.disk_full {
                    self.send(token, &Message::item(&tag, disk_full()));
                }
                self.watchers.push(Pending { connection: token, tag });
                Ok(Outcome::Later)
            }
            "vm.stats" => self.stats(token, request),
            "vm.balloon" => {
                let mut args = Args::of(request);
                let target = args.number("target_mib", MIN_TARGET_MIB..=MAX_MEMORY_MIB)?;
                args.finish()?;
                let target = target.ok_or_else(|| missing("target_mib"))?;
                let machine = self.machine.as_ref().ok_or_else(not_running)?;
                machine.set_memory_target(target)?;
                Ok(Outcome::Done(Fields::new()))
            }
            "vm.renew" => {
                Args::of(request).finish()?;
                let renewed = self.machine.as_ref().ok_or_else(not_running)?.renew();
                renewed.map_err(|e| Error::new(Code::VmFailed, format!("no new generation identifier: {e}")))?;
                Ok(Outcome::Done(Fields::new()))
            }
            "vm.limits" => {
                let (disks, net) = parse_limits(request)?;
                let machine = self.machine.as_ref().ok_or_else(not_running)?;
                if !machine.devices().change_limits(disks, net) {
                    return Err(Error::new(Code::BadState, "the guest has no network device"));
                }
                Ok(Outcome::Done(Fields::new()))
            }
            "vm.capture" => self.capture(token, request),
            "vm.working_set" => {
                let descriptors = self.connections.get_mut(&token).map(Connection::take_descriptors);
                let (page_map, into) = parse_working_set(request, descriptors.unwrap_or_default())?;
                let pages = self.machine.as_ref().ok_or_else(not_running)?.write_working_set(&page_map, &into)?;
                Ok(Outcome::Done(Fields::new().with("pages", pages)))
            }
            "vm.resume" => {
                Args::of(request).finish()?;
                self.machine.as_mut().ok_or_else(not_running)?.resume();
                Ok(Outcome::Done(Fields::new()))
            }
            "vm.open" => {
                Args::of(request).finish()?;
                self.machine.as_ref().ok_or_else(not_running)?.devices().close_net(false);
                Ok(Outcome::Done(Fields::new()))
            }
            "serial.input" => {
                let mut args = Args::of(request);
                let octets = args.next_bytes("octets")?;
                args.finish()?;
                let machine = self.machine.as_ref().ok_or_else(not_running)?;
                let taken = machine.devices().serial_input(&octets);
                Ok(Outcome::Done(Fields::new().with("taken", taken)))
            }
            "vsock.connect" | "vsock.accept" => {
                self.become_stream(token, request)?;
                Ok(Outcome::Later)
            }
            "vm.stop" => {
                Args::of(request).finish()?;
                self.stoppers.push(Pending { connection: token, tag });
                self.end.get_or_insert_with(|| End::new(Reason::Stopped, "the supervisor stopped it"));
                Ok(Outcome::Later)
            }
            verb => Err(Error::new(Code::UnknownVerb, format!("{verb} is no verb of a worker")).with("verb", verb)),
        }
    }

    /// What there is at once, or with `wait_ms` when the guest has said how it is, at the latest after that time.
    fn stats(&mut self, token: Token, request: Request) -> Result<Outcome, Error> {
        let tag = request.tag.clone();
        let mut args = Args::of(request);
        let wait = args.number("wait_ms", 0..=MAX_WAIT_MS)?.unwrap_or(0);
        args.finish()?;
        let machine = self.machine.as_ref().ok_or_else(not_running)?;
        let asked = Instant::now();
        if wait == 0 || self.surveys.len() >= MAX_SURVEYS || !machine.devices().request_memory_statistics() {
            self.tell_stats(&Pending { connection: token, tag });
            return Ok(Outcome::Later);
        }
        let request = Pending { connection: token, tag };
        self.surveys.push(Survey { request, asked, deadline: asked + Duration::from_millis(wait) });
        Ok(Outcome::Later)
    }

    fn answer_surveys(&mut self) {
        let Some(machine) = self.machine.as_ref().filter(|_| !self.surveys.is_empty()) else { return };
        let (heard, now) = (machine.heard(), Instant::now());
        let due = |survey: &mut Survey| survey.deadline <= now || heard.is_some_and(|at| at >= survey.asked);
        let due: Vec<Survey> = self.surveys.extract_if(.., due).collect();
        for Survey { request, .. } in due {
            self.tell_stats(&request);
        }
    }

    /// Answers `vm.stats`.
    fn tell_stats(&mut self, request: &Pending) {
        let Some(machine) = &self.machine else { return };
        let (disks, all) = (machine.devices().disk_rows(), machine.stats());
        for row in disks {
            self.send(request.connection, &Message::item(&request.tag, row));
        }
        self.send(request.connection, &Message::ok(&request.tag, all));
    }

    /// Hands a connection over to the vsock device: what follows on it is a guest's stream.
    fn become_stream(&mut self, token: Token, request: Request) -> Result<(), Error> {
        let (tag, connects) = (request.tag.clone(), request.verb == "vsock.connect");
        let mut args = Args::of(request);
        let port = args.number("port", 0..=u64::from(u32::MAX) - 1)?.ok_or_else(|| missing("port"))? as u32;
        args.finish()?;
        let machine = self.machine.as_ref().ok_or_else(not_running)?;
        let Some(mut connection) = self.connections.remove(&token) else { return Ok(()) };
        // Its other requests end with it.
        self.watchers.retain(|w| w.connection != token);
        self.stoppers.retain(|w| w.connection != token);
        self.surveys.retain(|s| s.request.connection != token);
        self.poll
            .registry()
            .deregister(connection.stream())
            .map_err(|e| Error::new(Code::Internal, format!("the connection cannot be taken out of the loop: {e}")))?;
        let RawStream { stream, read_ahead } = connection.into_raw();
        let stream = StdStream::from(OwnedFd::from(stream));
        if connects {
            machine.devices().vsock_connect(port, stream, &tag, read_ahead);
        } else {
            machine.devices().vsock_accept(port, stream, &tag, read_ahead);
        }
        Ok(())
    }

    /// Begins a snapshot; its files are whole when the pipe that came with the request says so.
    fn capture(&mut self, token: Token, request: Request) -> Result<Outcome, Error> {
        let descriptors = self.connections.get_mut(&token).map(Connection::take_descriptors).unwrap_or_default();
        let to = CaptureConfig::parse(request, descriptors)?;
        let captured = self.machine.as_mut().ok_or_else(not_running)?.capture(to)?;
        let fields = Fields::new()
            .with("state_bytes", captured.state_bytes)
            .with("memory_bytes", captured.memory_bytes)
            .with("diff", captured.is_diff)
            .with("stopped_us", captured.stopped.as_micros());
        Ok(Outcome::Done(fields))
    }

    /// Makes what can be made of a snapshot before it is known whose guest goes on from it. In place of what was prepared before.
    fn prepare(&mut self, token: Token, request: Request) -> Result<Outcome, Error> {
        let descriptors = self.connections.get_mut(&token).map(Connection::take_descriptors).unwrap_or_default();
        if self.machine.is_some() || self.end.is_some() {
            return Err(Error::new(Code::BadState, "this worker was started already"));
        }
        self.prepared = None;
        let prepared = Prepared::new(PrepareConfig::parse(request, descriptors)?).map_err(|e| e.to_wire())?;
        let fields = Fields::new().with("own", prepared.own).with("mapped", prepared.mapped);
        self.prepared = Some(prepared);
        Ok(Outcome::Done(fields))
    }

    fn start(&mut self, token: Token, request: Request) -> Result<Outcome, Error> {
        let descriptors = self.connections.get_mut(&token).map(Connection::take_descriptors).unwrap_or_default();
        if self.machine.is_some() || self.end.is_some() {
            return Err(Error::new(Code::BadState, "this worker was started already"));
        }
        let config = StartConfig::parse(request, descriptors)?;
        if let Err(e) = jail::limit_files(config.longest_file()) {
            self.end = Some(End::new(Reason::StartFailed, e.to_string()));
            return Err(Error::new(Code::VmFailed, e.to_string()));
        }
        let (guest_end, waker) = (self.guest_end.clone(), self.waker.clone());
        let ended = move |end| {
            guest_end.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(end);
            if waker.wake().is_err() {
                // Without the loop nobody would ever notice; the record is left by the panic hook.
                panic!("the worker's loop cannot be woken");
            }
        };
        match Machine::start(config, self.prepared.take(), self.poll.registry(), FIRST_DEVICE, ended) {
            Ok(machine) => {
                self.machine = Some(machine);
                let running = Fields::new().with("event", "running");
                for watcher in &self.watchers {
                    if let Some(connection) = self.connections.get_mut(&watcher.connection) {
                        // A connection that fails is closed when its own event says so.
                        let _ = connection.send(&Message::item(&watcher.tag, running.clone()));
                    }
                }
                Ok(Outcome::Done(Fields::new()))
            }
            Err(e) => {
                self.end = Some(End::new(Reason::StartFailed, e.to_string()));
                Err(e.to_wire())
            }
        }
    }

    fn cancel(&mut self, token: Token, tag: &str) {
        let pending = |worker: &Self| worker.watchers.len() + worker.surveys.len();
        let before = pending(self);
        self.watchers.retain(|w| w.connection != token || w.tag != tag);
        self.surveys.retain(|s| s.request.connection != token || s.request.tag != tag);
        if pending(self) < before {
            let error = Error::new(Code::Cancelled, "the request was cancelled");
            self.send(token, &Message::err(tag, error));
        }
    }

    fn send(&mut self, token: Token, message: &Message) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        if connection.send(message).is_err() || connection.queued() > QUEUE_MAX {
            self.close(token);
        }
    }

    fn close(&mut self, token: Token) {
        // Dropping the stream takes it out of the poll as well.
        self.connections.remove(&token);
        self.watchers.retain(|w| w.connection != token);
        self.stoppers.retain(|w| w.connection != token);
        self.surveys.retain(|s| s.request.connection != token);
        if self.machine.is_none() && self.connections.is_empty() {
            // It was made for a sandbox to come, and whoever knew of it is gone.
            self.end.get_or_insert_with(|| End::new(Reason::Stopped, "nobody is left who could start it"));
        }
    }

    /// Takes the microVM apart, leaves the last words, then tells everybody who asked.
    fn finish(mut self, mut end: End, last_words: &LastWords) -> End {
        self.tell_of_full_disks();
        if let Some(machine) = self.machine.take()
            && let Err(e) = machine.end()
        {
            // What the guest believes to be on its disk is not.
            if end.reason.is_orderly() {
                end = End::new(Reason::DeviceError, format!("after {end}: {e}"));
            }
        }
        last_words.write(&end);
        let item = end.fields();
        let exited = Fields([vec![("event".to_string(), b"exited".to_vec())], item.0].concat());
        for watcher in std::mem::take(&mut self.watchers) {
            self.send(watcher.connection, &Message::item(&watcher.tag, exited.clone()));
            self.send(watcher.connection, &Message::ok(&watcher.tag, Fields::new()));
        }
        for stopper in std::mem::take(&mut self.stoppers) {
            self.send(stopper.connection, &Message::ok(&stopper.tag, Fields::new()));
        }
        end
    }
}

fn missing(key: &str) -> Error {
    Error::new(Code::MissingArgument, format!("{key} is missing")).with("argument", key)
}

/// What watchers are told when a disk found no room on the node.
fn disk_full() -> Fields {
    Fields::new().with("event", "disk-full")
}

fn not_running() -> Error {
    Error::new(Code::BadState, "the microVM does not run yet")
}

#[cfg(test)]
mod tests;
