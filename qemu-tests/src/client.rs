//! Many requests at once over one connection: a thread reads and hands each answer to the call it belongs to.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use warren::wire::{Arg, Error, FRAME, Fields, INITIAL_CREDIT, Message, Request};

use crate::connection::Connection;
use crate::timing;

/// A connection that many threads may use. It closes when the last clone and the last call are gone.
#[derive(Debug, Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    stream: UnixStream,
    write: Mutex<()>,
    routes: Arc<Routes>,
    next_tag: AtomicU64,
}

#[derive(Debug, Default)]
struct Routes {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    calls: HashMap<String, Route>,
    /// Messages under tags that nobody uses: greetings, and answers to lines without a tag.
    strays: Vec<Message>,
    closed: Option<String>,
}

#[derive(Debug)]
struct Route {
    to: Sender<Message>,
    /// Octets that may still be sent, by channel.
    credit: HashMap<String, u64>,
}

/// What a request came to.
#[derive(Debug, Clone, Default)]
pub struct Reply {
    /// The fields of the final `ok`.
    pub fields: Fields,
    /// The rows before it.
    pub items: Vec<Fields>,
    /// What came on each channel.
    pub data: BTreeMap<String, Vec<u8>>,
}

impl Reply {
    /// A field of the final `ok`.
    ///
    /// # Panics
    /// When there is no such field.
    pub fn field(&self, key: &str) -> &str {
        self.fields.get(key).unwrap_or_else(|| panic!("the reply has no field {key}: {:?}", self.fields))
    }

    /// What came on a channel, nothing where the channel was never used.
    pub fn octets(&self, channel: &str) -> &[u8] {
        self.data.get(channel).map_or(&[], Vec::as_slice)
    }

    /// What came on a channel, as text.
    pub fn text(&self, channel: &str) -> String {
        String::from_utf8_lossy(self.octets(channel)).into_owned()
    }
}

impl Client {
    /// Connects to the Unix socket at `path`.
    pub fn open(path: &Path) -> std::io::Result<Self> {
        Ok(Self::over(UnixStream::connect(path)?))
    }

    /// Speaks over a stream that is connected already.
    pub fn over(stream: UnixStream) -> Self {
        let reader = stream.try_clone().expect("a socket can be cloned while descriptors are left");
        let routes = Arc::new(Routes::default());
        let for_reader = Arc::clone(&routes);
        std::thread::spawn(move || read(Connection::over(reader), &for_reader));
        Self { shared: Arc::new(Shared { stream, write: Mutex::new(()), routes, next_tag: AtomicU64::new(1) }) }
    }

    /// Sends a request under a fresh tag (the request's own tag is replaced).
    pub fn start(&self, request: Request) -> Call {
        let number = self.shared.next_tag.fetch_add(1, Ordering::Relaxed);
        self.start_tagged(Request { tag: format!("t{number}"), ..request })
    }

    /// Sends a request under its own tag.
    pub fn start_tagged(&self, request: Request) -> Call {
        let (to, from) = channel();
        let tag = request.tag.clone();
        let shown = shown(&request);
        self.shared.routes.lock().calls.insert(tag.clone(), Route { to, credit: HashMap::new() });
        // A failed write shows as a closed connection on the reading side.
        let _ = self.shared.send(&Message::Request(request));
        Call { shared: Arc::clone(&self.shared), tag, shown, from, grants: true, over: false }
    }

    /// Sends a request and waits for its end.
    pub fn call(&self, request: Request) -> Result<Reply, Error> {
        self.start(request).finish()
    }

    /// Sends a request that is to succeed.
    ///
    /// # Panics
    /// When it fails.
    pub fn ok(&self, request: Request) -> Reply {
        let text = shown(&request);
        self.call(request).unwrap_or_else(|e| panic!("`{text}` failed: {}", told(&e)))
    }

    /// Sends a request that is to fail.
    ///
    /// # Panics
    /// When it succeeds.
    pub fn err(&self, request: Request) -> Error {
        let text = shown(&request);
        match self.call(request) {
            Ok(reply) => panic!("`{text}` was to fail and gave {:?}", reply.fields),
            Err(e) => e,
        }
    }

    /// Waits for a message under a tag that no call uses (`hello` of an agent, `-` for a bad line).
    ///
    /// # Panics
    /// When the connection closes, or nothing comes for `timing::hang()`.
    pub fn stray(&self, tag: &str) -> Message {
        self.stray_within(tag, timing::hang()).unwrap_or_else(|| match self.closed() {
            Some(why) => panic!("waited for a message tagged {tag}, but {why}"),
            None => panic!("no message tagged {tag} came in {:?}", timing::hang()),
        })
    }

    /// The same, or `None` after `time` without one, or when the connection closed.
    pub fn stray_within(&self, tag: &str, time: Duration) -> Option<Message> {
        let routes = &self.shared.routes;
        let end = Instant::now() + time;
        let mut state = routes.lock();
        loop {
            if let Some(at) = state.strays.iter().position(|message| message.tag() == tag) {
                return Some(state.strays.remove(at));
            }
            let left = end.saturating_duration_since(Instant::now());
            if state.closed.is_some() || left.is_zero() {
                return None;
            }
            state = routes.changed.wait_timeout(state, left).expect("no thread panics with this lock").0;
        }
    }

    /// Writes octets as they are.
    pub fn send_raw(&self, octets: &[u8]) -> std::io::Result<()> {
        let _one_writer = self.shared.write.lock().expect("no thread panics with this lock");
        (&self.shared.stream).write_all(octets)
    }

    /// Why the connection is closed, where it is.
    pub fn closed(&self) -> Option<String> {
        self.shared.routes.lock().closed.clone()
    }

    /// Cuts the connection at once, whatever is under way.
    pub fn cut(&self) {
        let _ = self.shared.stream.shutdown(std::net::Shutdown::Both);
    }
}

impl Shared {
    fn send(&self, message: &Message) -> std::io::Result<()> {
        let _one_writer = self.write.lock().expect("no thread panics with this lock");
        (&self.stream).write_all(&message.to_bytes())
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // The reading thread holds a clone of the descriptor: without this the peer would never see us go.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

impl Routes {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread panics with this lock")
    }
}

fn read(mut connection: Connection, routes: &Routes) {
    loop {
        let message = connection.receive();
        let mut state = routes.lock();
        match message {
            Ok(Message::Credit { tag, channel, octets }) => {
                if let Some(route) = state.calls.get_mut(&tag) {
                    *route.credit.entry(channel).or_insert(INITIAL_CREDIT) += octets;
                }
            }
            Ok(message) => {
                let tag = message.tag().to_string();
                let is_final = message.is_final();
                match state.calls.get(&tag) {
                    // A call that was dropped takes no more messages; that is its good right.
                    Some(route) => drop(route.to.send(message)),
                    None => state.strays.push(message),
                }
                if is_final {
                    state.calls.remove(&tag);
                }
            }
            Err(e) => {
                state.closed = Some(if e.kind() == std::io::ErrorKind::UnexpectedEof {
                    "the peer closed the connection".to_string()
                } else {
                    format!("the connection broke: {e}")
                });
                state.calls.clear();
                routes.changed.notify_all();
                return;
            }
        }
        routes.changed.notify_all();
    }
}

/// A request under way.
#[derive(Debug)]
pub struct Call {
    shared: Arc<Shared>,
    tag: String,
    shown: String,
    from: Receiver<Message>,
    grants: bool,
    over: bool,
}

impl Call {
    /// Grants no credit of its own from now on: the test plays a reader that has stopped.
    pub fn hold_credit(&mut self) {
        self.grants = false;
    }

    /// The next message of this request; data is credited back as it is taken.
    ///
    /// # Panics
    /// When nothing comes for longer than `timing::hang()`, or the connection closes.
    pub fn message(&mut self) -> Message {
        self.message_within(timing::hang())
            .unwrap_or_else(|| panic!("`{}`: nothing came for {:?}", self.shown, timing::hang()))
    }

    /// The next message, or `None` after `time` without one.
    pub fn message_within(&mut self, time: Duration) -> Option<Message> {
        let message = match self.from.recv_timeout(time) {
            Ok(message) => message,
            Err(RecvTimeoutError::Timeout) => return None,
            Err(RecvTimeoutError::Disconnected) => {
                let why = self.shared.routes.lock().closed.clone();
                panic!("`{}`: {}", self.shown, why.unwrap_or_else(|| "the request is over already".to_string()));
            }
        };
        if let (Message::Data { channel, payload, .. }, true) = (&message, self.grants) {
            self.grant(channel, payload.len() as u64);
        }
        self.over |= message.is_final();
        Some(message)
    }

    /// The next row.
    ///
    /// # Panics
    /// When something else comes first.
    pub fn item(&mut self) -> Fields {
        match self.message() {
            Message::Item { fields, .. } => fields,
            other => panic!("`{}`: a row was to come, not {other:?}", self.shown),
        }
    }

    /// Reads a channel until what came on it contains `text`, and gives all of it.
    ///
    /// # Panics
    /// When the request ends before.
    pub fn read_until(&mut self, channel: &str, text: &str) -> String {
        let mut all = Vec::new();
        loop {
            match self.message() {
                Message::Data { channel: on, payload, .. } if on == channel => all.extend_from_slice(&payload),
                Message::Ok { fields, .. } => {
                    panic!("`{}` ended ({fields:?}) before {text:?}: {:?}", self.shown, lossy(&all))
                }
                Message::Err { error, .. } => {
                    panic!("`{}` failed before {text:?}: {error}; got {:?}", self.shown, lossy(&all))
                }
                _ => {}
            }
            if lossy(&all).contains(text) {
                return lossy(&all);
            }
        }
    }

    /// Takes everything up to the request's end.
    pub fn finish(mut self) -> Result<Reply, Error> {
        let mut reply = Reply::default();
        loop {
            match self.message() {
                Message::Ok { fields, .. } => {
                    reply.fields = fields;
                    return Ok(reply);
                }
                Message::Err { error, .. } => return Err(error),
                Message::Item { fields, .. } => reply.items.push(fields),
                Message::Data { channel, payload, .. } => reply.data.entry(channel).or_default().extend(payload),
                Message::End { channel, .. } => drop(reply.data.entry(channel).or_default()),
                other => panic!("`{}`: {other:?} is no answer", self.shown),
            }
        }
    }

    /// Waits for the request's end with success.
    ///
    /// # Panics
    /// When it fails.
    pub fn finish_ok(self) -> Reply {
        let shown = self.shown.clone();
        self.finish().unwrap_or_else(|e| panic!("`{shown}` failed: {}", told(&e)))
    }

    /// The sending side of this request, for a thread of its own.
    pub fn writer(&self) -> CallWriter {
        CallWriter { shared: Arc::clone(&self.shared), tag: self.tag.clone() }
    }

    /// Allows the peer that many more octets on a channel.
    pub fn grant(&self, channel: &str, octets: u64) {
        let _ = self.shared.send(&Message::credit(&self.tag, channel, octets));
    }

    /// Asks for the request's end.
    pub fn cancel(&self) {
        let _ = self.shared.send(&Message::Cancel { tag: self.tag.clone() });
    }

    /// The tag in use.
    pub fn tag(&self) -> &str {
        &self.tag
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if !self.over {
            // As a client does that loses interest; also keeps a test's leftovers from blocking the next one.
            self.cancel();
        }
    }
}

/// Sends on the channels of one request.
#[derive(Debug, Clone)]
pub struct CallWriter {
    shared: Arc<Shared>,
    tag: String,
}

impl CallWriter {
    /// Sends octets on a channel in frames, as credit allows. `false` when the request or the connection ended
    /// before all was sent.
    pub fn write(&self, channel: &str, mut octets: &[u8]) -> bool {
        while !octets.is_empty() {
            let Some(allowed) = self.wait_for_credit(channel, octets.len().min(FRAME)) else { return false };
            let (now, later) = octets.split_at(allowed);
            if self.shared.send(&Message::data(&self.tag, channel, now)).is_err() {
                return false;
            }
            octets = later;
        }
        true
    }

    /// Ends a channel.
    pub fn end(&self, channel: &str) {
        let _ = self.shared.send(&Message::end(&self.tag, channel));
    }

    fn wait_for_credit(&self, channel: &str, wanted: usize) -> Option<usize> {
        let routes = &self.shared.routes;
        let end = Instant::now() + timing::hang();
        let mut state = routes.lock();
        loop {
            let route = state.calls.get_mut(&self.tag)?;
            let credit = route.credit.entry(channel.to_string()).or_insert(INITIAL_CREDIT);
            if *credit > 0 {
                let allowed = usize::try_from(*credit).unwrap_or(usize::MAX).min(wanted);
                *credit -= allowed as u64;
                return Some(allowed);
            }
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "no credit for {channel} came in {:?}", timing::hang());
            state = routes.changed.wait_timeout(state, left).expect("no thread panics with this lock").0;
        }
    }
}

/// An error with its fields, for a person.
fn told(error: &Error) -> String {
    let mut text = error.to_string();
    for (key, value) in &error.fields.0 {
        text.push_str(&format!("\n  {key}: {}", lossy(value).replace('\r', "").trim_end().replace('\n', "\n    ")));
    }
    text
}

fn lossy(octets: &[u8]) -> String {
    String::from_utf8_lossy(octets).into_owned()
}

fn shown(request: &Request) -> String {
    let mut text = request.verb.clone();
    for arg in &request.args {
        text.push(' ');
        match arg {
            Arg::Positional(value) => text.push_str(&lossy(value)),
            Arg::Named(key, value) => {
                text.push_str(key);
                text.push('=');
                text.push_str(&lossy(value));
            }
        }
    }
    if text.len() > 200 {
        let cut = (0..=200).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
        text.truncate(cut);
        text.push('…');
    }
    text
}
