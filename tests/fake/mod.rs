//! A node for the tests of the command line: it speaks the control protocol and pretends everything else.
//!
//! Programs that `exec.start` knows: `exit N`, `out TEXT`, `err TEXT`, `cat`, `wait` (until a signal), `size` (prints
//! the terminal's size, and again after each change, until end of input), `flood` (output without end), `env` (the
//! request's env entries), `missing`.

#![allow(dead_code)] // each test program uses its part

use std::collections::{BTreeMap, HashMap};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use warren::wire::{Arg, Code, Decoded, Decoder, Error, FRAME, Fields, INITIAL_CREDIT, Message, Request};

/// A directory of its own that goes away with the test.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let name = format!("warren-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// What the node keeps between connections.
#[derive(Default)]
pub struct Store {
    /// Every message that came, as it travels, without payloads.
    pub seen: Vec<String>,
    /// Paths to (mode, content); a directory has no content.
    pub files: BTreeMap<String, (u32, Option<Vec<u8>>)>,
    /// Entries that `file.list` adds to those of a directory, by its path.
    pub strange: HashMap<String, Vec<Fields>>,
}

/// The node.
pub struct Node {
    pub socket: PathBuf,
    pub store: Arc<Mutex<Store>>,
    _scratch: Scratch,
}

impl Node {
    pub fn start() -> Self {
        let scratch = Scratch::new();
        let socket = scratch.path("control.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let store = Arc::new(Mutex::new(Store::default()));
        let shared = Arc::clone(&store);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let store = Arc::clone(&shared);
                std::thread::spawn(move || Connection::new(stream, store).serve());
            }
        });
        Self { socket, store, _scratch: scratch }
    }

    /// Waits until a message that starts so has come.
    pub fn await_seen(&self, start: &str) -> String {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let found = self.store.lock().unwrap().seen.iter().find(|line| line.contains(start)).cloned();
            match found {
                Some(line) => return line,
                None if Instant::now() > deadline => {
                    panic!("no {start:?} among {:#?}", self.store.lock().unwrap().seen)
                }
                None => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    pub fn put(&self, path: &str, mode: u32, content: Option<&[u8]>) {
        self.store.lock().unwrap().files.insert(path.to_string(), (mode, content.map(<[u8]>::to_vec)));
    }

    pub fn content(&self, path: &str) -> Option<(u32, Option<Vec<u8>>)> {
        self.store.lock().unwrap().files.get(path).cloned()
    }
}

/// A request that goes on.
enum Running {
    Cat { content: Vec<u8>, into: Option<(String, u32)>, taken: u64 },
    Wait,
    Size,
    Send { channel: &'static str, left: Vec<u8>, endless: bool, credit: u64, done: Fields },
}

struct Connection {
    stream: UnixStream,
    store: Arc<Mutex<Store>>,
    running: HashMap<String, Running>,
}

impl Connection {
    fn new(stream: UnixStream, store: Arc<Mutex<Store>>) -> Self {
        Self { stream, store, running: HashMap::new() }
    }

    fn say(&mut self, message: Message) {
        let _ = self.stream.write_all(&message.to_bytes());
    }

    fn serve(&mut self) {
        let mut decoder = Decoder::new();
        let mut chunk = vec![0u8; 65536];
        loop {
            // A client that went away before it read everything is a reset, not an end.
            let n = self.stream.read(&mut chunk).unwrap_or(0);
            if n == 0 {
                self.store.lock().unwrap().seen.push("gone".to_string());
                return;
            }
            decoder.push(&chunk[..n]);
            while let Some(found) = decoder.next() {
                let Decoded::Message(message) = found else { panic!("the client sent {found:?}") };
                self.note(&message);
                self.take(message);
            }
        }
    }

    fn note(&self, message: &Message) {
        let line = match message {
            Message::Data { tag, channel, payload } => format!("{tag} data {channel} {}", payload.len()),
            other => String::from_utf8_lossy(&other.to_bytes()).trim_end().to_string(),
        };
        self.store.lock().unwrap().seen.push(line);
    }

    fn take(&mut self, message: Message) {
        let tag = message.tag().to_string();
        match message {
            Message::Request(request) => {
                if let Err(error) = self.request(request) {
                    self.say(Message::err(&tag, error));
                }
            }
            Message::Cancel { .. } => {
                let Some(_) = self.running.remove(&tag) else { return };
                self.say(Message::err(&tag, Error::new(Code::Cancelled, "cancelled")));
            }
            Message::Data { payload, .. } => {
                let Some(Running::Cat { content, into, taken }) = self.running.get_mut(&tag) else { return };
                *taken += payload.len() as u64;
                let channel = if into.is_some() { "content" } else { "stdin" };
                match into {
                    Some(_) => content.extend_from_slice(&payload),
                    None => {
                        let echo = Message::data(&tag, "stdout", &payload[..]);
                        let _ = self.stream.write_all(&echo.to_bytes());
                    }
                }
                self.say(Message::credit(&tag, channel, payload.len() as u64));
            }
            Message::End { .. } => match self.running.remove(&tag) {
                Some(Running::Cat { content, into: Some((path, mode)), .. }) => {
                    let size = content.len();
                    self.store.lock().unwrap().files.insert(path, (mode, Some(content)));
                    self.say(Message::ok(&tag, Fields::new().with("size", size)));
                }
                Some(_) => self.finish(&tag, Fields::new().with("exit", 0)),
                None => {}
            },
            Message::Credit { octets, .. } => {
                if let Some(Running::Send { credit, .. }) = self.running.get_mut(&tag) {
                    *credit += octets;
                }
                self.send_more(&tag);
            }
            _ => {}
        }
    }

    fn finish(&mut self, tag: &str, fields: Fields) {
        for channel in ["stdout", "stderr"] {
            self.say(Message::end(tag, channel));
        }
        self.say(Message::ok(tag, fields));
    }

    fn send_more(&mut self, tag: &str) {
        while let Some(Running::Send { channel, left, endless, credit, .. }) = self.running.get_mut(tag) {
            let take = left.len().min(FRAME).min(*credit as usize);
            if take == 0 {
                break;
            }
            *credit -= take as u64;
            let piece: Vec<u8> = if *endless { left[..take].to_vec() } else { left.drain(..take).collect() };
            let message = Message::data(tag, channel, piece);
            self.say(message);
        }
        if matches!(self.running.get(tag), Some(Running::Send { left, .. }) if left.is_empty()) {
            let Some(Running::Send { done, channel, .. }) = self.running.remove(tag) else { return };
            self.say(Message::end(tag, channel));
            self.say(Message::ok(tag, done));
        }
    }

    fn request(&mut self, request: Request) -> Result<(), Error> {
        let tag = request.tag.clone();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let named = |key: &str| -> Vec<String> {
            let of = |arg: &Arg| match arg {
                Arg::Named(k, v) if k == key => Some(text(v)),
                _ => None,
            };
            request.args.iter().filter_map(of).collect()
        };
        let one = |key: &str| named(key).pop();
        let positional: Vec<String> = request
            .args
            .iter()
            .filter_map(|arg| if let Arg::Positional(v) = arg { Some(text(v)) } else { None })
            .collect();
        let sandbox = |id: &str, state: &str| {
            Fields::new()
                .with("id", id)
                .with("name", "7")
                .with("template", "base")
                .with("state", state)
                .with("vcpus", 1)
                .with("memory_mib", 512)
                .with("created_ms", 1_700_000_000_000_u64)
                .with("label", "team=a")
        };
        match request.verb.as_str() {
            "hello" => self.say(Message::ok(&tag, Fields::new().with("protocol", 1))),
            "node.info" => self.say(Message::ok(&tag, Fields::new().with("name", "n1").with("memory_mib", 2048))),
            "node.stop" => self.say(Message::ok(&tag, Fields::new())),
            "template.list" => {
                self.say(Message::item(&tag, Fields::new().with("name", "base").with("size_bytes", 1 << 20)));
                self.say(Message::ok(&tag, Fields::new()));
            }
            "sandbox.create" if one("template").as_deref() == Some("none") => {
                return Err(Error::new(Code::NotFound, "no template none"));
            }
            "sandbox.create" if one("template").as_deref() == Some("slow") => {
                self.running.insert(tag, Running::Wait);
            }
            "sandbox.create" => {
                if one("progress").is_some() {
                    self.say(Message::item(&tag, Fields::new().with("state", "creating")));
                }
                self.say(Message::ok(&tag, Fields::new().with("id", "abcdefghijkl").with("state", "running")));
            }
            "sandbox.list" => {
                for (id, state) in [("abcdefghijkl", "running"), ("mnopqrstuvwx", "stopped")] {
                    self.say(Message::item(&tag, sandbox(id, state)));
                }
                self.say(Message::ok(&tag, Fields::new()));
            }
            _ if positional.first().is_some_and(|id| id == "nobody") => {
                return Err(Error::new(Code::NotFound, "no sandbox nobody\x1b[2J"));
            }
            "sandbox.inspect" => self.say(Message::ok(&tag, sandbox(&positional[0], "running"))),
            "sandbox.stop" | "sandbox.remove" => self.say(Message::ok(&tag, Fields::new())),
            "sandbox.stats" if positional[0] == "mnopqrstuvwx" => {
                return Err(Error::new(Code::BadState, "sandbox mnopqrstuvwx is stopped, not running"));
            }
            "sandbox.stats" => {
                let fields = Fields::new().with("id", &positional[0]).with("cpu_ms", 1234).with("memory_mib", 512);
                let fields = fields.with("memory_used_kib", 2048).with("block_read_bytes", 4096);
                self.say(Message::ok(&tag, fields));
            }
            "sandbox.update" => {
                let target = one("memory_target_mib").unwrap_or_default();
                self.say(Message::ok(&tag, Fields::new().with("id", &positional[0]).with("memory_target_mib", target)));
            }
            "events.watch" => {
                let fields = Fields::new().with("seq", 9).with("time_ms", 1).with("kind", "sandbox.running");
                self.say(Message::item(&tag, Fields::new().with("lost", 7)));
                self.say(Message::item(&tag, fields.with("owner", "root").with("sandbox", "sb")));
                self.say(Message::ok(&tag, Fields::new().with("seq", 9)));
            }
            "sandbox.logs" => {
                if one("follow").is_some() {
                    self.say(Message::item(&tag, Fields::new().with("lost", 5)));
                }
                let log: &[u8] =
                    if positional[0] == "hostile" { b"\x1b]0;owned\x07\tover\n" } else { b"[    0.0] Linux\n" };
                self.say(Message::data(&tag, "log", log));
                self.say(Message::end(&tag, "log"));
                self.say(Message::ok(&tag, Fields::new()));
            }
            "exec.start" => {
                let words: Vec<&str> = positional[1..].iter().map(String::as_str).collect();
                if one("detach").is_some() {
                    self.say(Message::ok(&tag, Fields::new().with("exec", 4)));
                    return Ok(());
                }
                if words[0] == "missing" {
                    return Err(Error::new(Code::ExecFailed, "missing: no such file").with("exit", 127));
                }
                self.say(Message::item(&tag, Fields::new().with("exec", 4).with("pid", 100)));
                match words[..] {
                    ["exit", code] => self.finish(&tag, Fields::new().with("exit", code)),
                    ["out", what] => {
                        self.say(Message::data(&tag, "stdout", what));
                        self.finish(&tag, Fields::new().with("exit", 0));
                    }
                    ["err", what] => {
                        self.say(Message::data(&tag, "stderr", what));
                        self.finish(&tag, Fields::new().with("exit", 3));
                    }
                    ["env"] => {
                        let all = named("env").join("\n");
                        self.say(Message::data(&tag, "stdout", all));
                        self.finish(&tag, Fields::new().with("exit", 0));
                    }
                    ["cat" | "/bin/sh"] => {
                        self.running.insert(tag, Running::Cat { content: Vec::new(), into: None, taken: 0 });
                    }
                    ["flood"] => {
                        let left = vec![b'y'; FRAME];
                        let done = Fields::new();
                        let credit = INITIAL_CREDIT;
                        let flood = Running::Send { channel: "stdout", left, endless: true, credit, done };
                        self.running.insert(tag.clone(), flood);
                        self.send_more(&tag);
                    }
                    ["size"] => {
                        let size = format!("{}x{}\r\n", one("cols").unwrap(), one("rows").unwrap());
                        self.say(Message::data(&tag, "stdout", size));
                        self.running.insert(tag, Running::Size);
                    }
                    _ => {
                        self.running.insert(tag, Running::Wait);
                    }
                }
            }
            "exec.attach" => {
                self.say(Message::item(&tag, Fields::new().with("exec", 4).with("lost", 0).with("stdin_offset", 0)));
                self.running.insert(tag, Running::Cat { content: Vec::new(), into: None, taken: 0 });
            }
            "exec.resize" => {
                let size = format!("{}x{}\r\n", one("cols").unwrap(), one("rows").unwrap());
                let of = self.running.iter().find(|(_, r)| matches!(r, Running::Size)).map(|(tag, _)| tag.clone());
                if let Some(of) = of {
                    self.say(Message::data(&of, "stdout", size));
                }
                self.say(Message::ok(&tag, Fields::new()));
            }
            "exec.signal" => {
                let waits = self.running.iter().find(|(_, r)| matches!(r, Running::Wait)).map(|(tag, _)| tag.clone());
                self.say(Message::ok(&tag, Fields::new()));
                if let Some(waits) = waits {
                    let code = if one("signal").as_deref() == Some("INT") { 130 } else { 143 };
                    self.running.remove(&waits);
                    self.finish(&waits, Fields::new().with("exit", code).with("signal", code - 128));
                }
            }
            verb if verb.starts_with("file.") => return self.file(verb, &tag, &one("path").unwrap(), one("mode")),
            other => return Err(Error::new(Code::UnknownVerb, format!("{other} is no verb"))),
        }
        Ok(())
    }

    fn file(&mut self, verb: &str, tag: &str, path: &str, mode: Option<String>) -> Result<(), Error> {
        let path = match path.trim_end_matches("/.").trim_end_matches('/') {
            "" => "/".to_string(),
            path => path.to_string(),
        };
        let mode = mode.and_then(|mode| u32::from_str_radix(&mode, 8).ok());
        let fields = |name: &str, (mode, content): &(u32, Option<Vec<u8>>)| {
            let kind = if content.is_some() { "file" } else { "dir" };
            let size = content.as_ref().map_or(0, Vec::len);
            Fields::new().with("name", name).with("kind", kind).with("size", size).with("mode", format!("{mode:04o}"))
        };
        let found = self.store.lock().unwrap().files.get(&path).cloned();
        let absent = Error::new(Code::NotFound, format!("there is no {path}"));
        match verb {
            "file.stat" => {
                let found = found.ok_or(absent)?;
                self.say(Message::ok(tag, fields(&path, &found)));
            }
            "file.read" => {
                let Some((_, Some(left))) = found else { return Err(absent) };
                let done = Fields::new().with("size", left.len());
                let credit = INITIAL_CREDIT;
                let read = Running::Send { channel: "content", left, endless: false, credit, done };
                self.running.insert(tag.to_string(), read);
                self.send_more(tag);
            }
            "file.write" => {
                let into = Some((path, mode.unwrap_or(0o644)));
                self.running.insert(tag.to_string(), Running::Cat { content: Vec::new(), into, taken: 0 });
            }
            "file.mkdir" => {
                self.store.lock().unwrap().files.entry(path).or_insert((mode.unwrap_or(0o755), None));
                self.say(Message::ok(tag, Fields::new()));
            }
            "file.list" => {
                let (rows, strange) = {
                    let store = self.store.lock().unwrap();
                    let inside = |other: &&String| Path::new(other.as_str()).parent() == Some(Path::new(&path));
                    let rows: Vec<Fields> = store
                        .files
                        .keys()
                        .filter(inside)
                        .map(|other| fields(other.rsplit('/').next().unwrap(), &store.files[other]))
                        .collect();
                    (rows, store.strange.get(&path).cloned().unwrap_or_default())
                };
                for row in rows.into_iter().chain(strange) {
                    self.say(Message::item(tag, row));
                }
                self.say(Message::ok(tag, Fields::new()));
            }
            other => return Err(Error::new(Code::UnknownVerb, format!("{other} is no verb"))),
        }
        Ok(())
    }
}
