//! Clients that create sandboxes, run programs in them, read what these write again and again, and remove them, while the
//! node's parts are killed under them. What a client was told is written in a book, and so is what must not have happened.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use warren::wire::{Code, Error, Fields, Message, Request};

use crate::connection::Connection;
use crate::node::Node;
use crate::sandbox::Sandbox;
use crate::timing;

/// What clients were told, and what was done to sandboxes behind their backs.
#[derive(Debug, Default)]
pub struct Book {
    /// Sandboxes that run, as a client was told.
    pub created: BTreeSet<String>,
    /// Asked to be removed, answered or not.
    pub leaving: BTreeSet<String>,
    /// Gone, as a client was told.
    pub removed: BTreeSet<String>,
    /// Sandboxes whose workers were killed.
    pub struck: BTreeSet<String>,
    /// Octets of output that were compared with what they have to be.
    pub compared: u64,
    /// How often a stream broke and was attached to again.
    pub attached: u64,
    /// What must not have happened.
    pub wrong: Vec<String>,
}

/// What all clients of a load have in common.
#[derive(Debug, Default)]
pub struct Shared {
    book: Mutex<Book>,
    stop: AtomicBool,
    /// Sandboxes asked for so far.
    turn: AtomicU64,
    /// Answers and pieces of output that clients got so far.
    heard: AtomicU64,
}

impl Shared {
    /// The book, for as long as the caller holds it.
    ///
    /// # Panics
    /// When a client panicked over it.
    pub fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().expect("no thread panics with this lock")
    }
}

/// Clients that create, use and remove sandboxes until they are told to stop or the node is gone.
#[derive(Debug)]
pub struct Load {
    /// Also the tests': they note whose worker they killed.
    pub shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    /// So many clients, each with a connection of its own. Every other sandbox has a network.
    pub fn on(node: &Node, clients: usize) -> Self {
        let shared = Arc::new(Shared::default());
        let threads = (0..clients)
            .map(|_| {
                let (shared, socket) = (Arc::clone(&shared), node.socket());
                std::thread::spawn(move || {
                    // The end of the connection is the end of the node.
                    let _ = work(&shared, &socket);
                })
            })
            .collect();
        Self { shared, threads }
    }

    /// Waits until the clients got so many more answers or pieces of output, or for as long as a node may be silent: who kills
    /// by the clock alone kills a slow machine's creates and nothing else.
    pub fn go_on(&self, answers: u64) {
        let end = Instant::now() + timing::hang();
        let heard = || self.shared.heard.load(Ordering::Relaxed);
        let begin = heard();
        while heard() < begin + answers && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Gives what the clients were told, once each is done with the sandbox that it has.
    ///
    /// # Panics
    /// When a client did.
    pub fn end(self) -> Arc<Shared> {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("a client does not panic");
        }
        self.shared
    }
}

/// Numbers that a program writes, a line of 9 octets each, in pieces: it is still writing when something is killed.
const FIRST: u32 = 10_000_000;
const LINES: u32 = 12_000;
const PIECE: u32 = 2_000;

/// The program.
fn script() -> String {
    let end = FIRST + LINES;
    format!(
        "n={FIRST}; while [ $n -lt {end} ]; do seq $n $((n+{PIECE}-1)) || exit 9; n=$((n+{PIECE})); sleep 0.3; done"
    )
}

/// What it writes.
fn expected() -> Vec<u8> {
    (FIRST..FIRST + LINES).flat_map(|n| format!("{n}\n").into_bytes()).collect()
}

/// How a request ended: its fields, or its error; and what came on standard output until then, also before an error.
type Ended = (Result<Fields, Error>, Vec<u8>);

/// A client's connection.
struct Caller<'a> {
    shared: &'a Shared,
    connection: Connection,
}

impl Caller<'_> {
    /// Sends a request and gives its end.
    fn ask(&mut self, mut request: Request) -> io::Result<Ended> {
        request.tag = "t".to_string();
        self.connection.send(&Message::Request(request))?;
        let mut out = Vec::new();
        loop {
            let message = self.connection.receive()?;
            if !matches!(message, Message::Err { .. }) {
                self.shared.heard.fetch_add(1, Ordering::Relaxed);
            }
            match message {
                Message::Ok { fields, .. } => return Ok((Ok(fields), out)),
                // The bridge's word for the node's end.
                Message::Err { error, .. } if error.message.contains("port was closed") => {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                Message::Err { error, .. } => return Ok((Err(error), out)),
                Message::Data { tag, channel, payload } => {
                    self.connection.send(&Message::credit(&tag, &channel, payload.len() as u64))?;
                    if channel == "stdout" {
                        out.extend(payload);
                    }
                }
                _ => {}
            }
        }
    }

    /// Whether the sandbox that a request names does not run any more.
    fn is_gone(&mut self, request: &Request) -> io::Result<bool> {
        let named = request.args.iter().take(1).cloned().collect();
        let inspect = Request { args: named, ..Request::new("", "sandbox.inspect") };
        Ok(match self.ask(inspect)?.0 {
            Ok(fields) => fields.get("state") != Some("running"),
            Err(error) => !error.is(Code::NodeRestarted),
        })
    }

    /// The same as `ask`, again for as long as the supervisor was killed under it or has not reached the agent yet. `broken` is
    /// called with what had come each time.
    fn insist(&mut self, request: &Request, mut broken: impl FnMut(Vec<u8>)) -> io::Result<Ended> {
        let until = Instant::now() + timing::hang();
        loop {
            let (result, out) = self.ask(request.clone())?;
            match result {
                Err(error) if error.is(Code::NodeRestarted) => broken(out),
                Err(error) if error.is(Code::LinkLost) && Instant::now() < until && !self.is_gone(request)? => {
                    broken(out);
                    std::thread::sleep(Duration::from_millis(100));
                }
                other => return Ok((other, out)),
            }
        }
    }
}

fn work(shared: &Shared, socket: &Path) -> io::Result<()> {
    let mut client = Caller { shared, connection: Connection::open(socket)? };
    client.connection.stream().set_read_timeout(Some(timing::hang()))?;
    while !shared.stop.load(Ordering::Relaxed) {
        let turn = shared.turn.fetch_add(1, Ordering::Relaxed);
        let network = if turn.is_multiple_of(2) { "on" } else { "off" };
        let id = match client.ask(Sandbox::create_request(&[("network", network)]))?.0 {
            Ok(fields) => fields.get("id").unwrap_or_default().to_string(),
            // Its id was told to nobody; or its worker was killed before it ran.
            Err(error) if error.is(Code::NodeRestarted) || error.is(Code::VmFailed) => continue,
            Err(error) => {
                shared.book().wrong.push(format!("create: {error}"));
                continue;
            }
        };
        shared.book().created.insert(id.clone());
        use_it(&mut client, &id)?;
        shared.book().leaving.insert(id.clone());
        let mut lost = false;
        let remove = Request::new("", "sandbox.remove").arg(&id).set("force", true);
        loop {
            match client.ask(remove.clone())?.0 {
                Ok(_) => break,
                Err(error) if error.is(Code::NodeRestarted) => lost = true,
                Err(error) if lost && error.is(Code::NotFound) => break,
                Err(error) => {
                    shared.book().wrong.push(format!("remove {id}: {error}"));
                    break;
                }
            }
        }
        shared.book().removed.insert(id);
    }
    Ok(())
}

/// Runs programs in a sandbox: one that writes for a while and is read again whenever its stream breaks, one that is short.
fn use_it(client: &mut Caller<'_>, id: &str) -> io::Result<()> {
    let shared = client.shared;
    // Of a sandbox whose worker was killed nothing can be expected, but for the kind of error.
    let excused = |error: &Error| {
        let kinds = [Code::LinkLost, Code::BadState, Code::NotFound];
        shared.book().struck.contains(id) && kinds.iter().any(|code| error.is(*code))
    };
    let start = ["sh", "-c", &script()].iter().fold(Request::new("", "exec.start").arg(id), |r, arg| r.arg(arg));
    let started = match client.insist(&start.set("detach", true), |_| {})?.0 {
        Ok(fields) => fields.get("exec").unwrap_or_default().to_string(),
        Err(error) => {
            if !excused(&error) {
                shared.book().wrong.push(format!("exec.start in {id}: {error}"));
            }
            return Ok(());
        }
    };
    let echo = Request::new("", "exec.start").arg(id).arg("echo").arg("on");
    match client.insist(&echo, |_| {})? {
        (Ok(_), out) if out == b"on\n" => {}
        (Err(error), _) if excused(&error) => return Ok(()),
        other => shared.book().wrong.push(format!("echo in {id}: {other:?}")),
    }
    let expected = expected();
    let (mut seen, mut broken) = (Vec::new(), 0);
    let attach = Request::new("", "exec.attach").arg(id).set("exec", &started);
    let (result, out) = client.insist(&attach, |out| {
        broken += 1;
        seen.push(out);
    })?;
    let mut book = shared.book();
    book.attached += broken;
    for piece in seen.iter().chain([&out]) {
        book.compared += piece.len() as u64;
        if !expected.starts_with(piece) {
            let at = piece.iter().zip(&expected).take_while(|(a, b)| a == b).count();
            book.wrong.push(format!("output of exec {started} in {id} differs at octet {at} of {}", piece.len()));
        }
    }
    drop(book);
    match result {
        Ok(fields) if fields.get("exit") == Some("0") && out == expected => {}
        Err(error) if excused(&error) => {}
        Ok(fields) => {
            let what = format!("{} of {} octets, {fields:?}", out.len(), expected.len());
            shared.book().wrong.push(format!("exec {started} in {id} ended with {what}"));
        }
        Err(error) => shared.book().wrong.push(format!("exec.attach in {id}: {error}")),
    }
    Ok(())
}
