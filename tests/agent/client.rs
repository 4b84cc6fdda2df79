//! Starts `burrow --serve` in a directory of its own and speaks to it.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use warren::wire::{Decoded, Error, Fields, Filled, Link, Message, Request};

/// No answer takes longer, also on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running agent.
pub struct Agent {
    child: Child,
    directory: PathBuf,
}

impl Agent {
    /// Starts one; it runs programs as the tests' own user.
    pub fn start() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("burrow-test-{}-{number}", std::process::id()));
        std::fs::create_dir(&directory).unwrap();
        let child =
            Command::new(env!("CARGO_BIN_EXE_burrow")).arg("--serve").arg(directory.join("sock")).spawn().unwrap();
        let agent = Self { child, directory };
        let mut client = agent.connect();
        client.done(
            Request::new("setup", "system.configure")
                .set_bytes("cwd", agent.directory.as_os_str().as_encoded_bytes())
                .set("user", std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(&agent.directory).unwrap())),
        );
        agent
    }

    /// The directory that relative paths are relative to.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The cgroup above its programs', where cgroups can be used.
    pub fn cgroup(&self) -> Option<PathBuf> {
        let name = format!("burrow-{}", self.pid());
        let paths = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(|root| Path::new(root).join(&name));
        paths.into_iter().find(|path| path.exists())
    }

    /// A new link, after its greeting.
    pub fn connect(&self) -> Client {
        let started = Instant::now();
        let stream = loop {
            match UnixStream::connect(self.directory.join("sock")) {
                Ok(stream) => break stream,
                Err(e) => assert!(started.elapsed() < PATIENCE, "{e}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        stream.set_nonblocking(true).unwrap();
        let mut client = Client { link: Link::new(stream) };
        match client.next() {
            Message::Ok { tag, fields } if tag == "hello" => assert_eq!(fields.get("agent"), Some("burrow")),
            other => panic!("no greeting: {other:?}"),
        }
        client
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        let status = self.child.wait().unwrap();
        std::fs::remove_dir_all(&self.directory).unwrap();
        if !std::thread::panicking() {
            assert!(status.success(), "the agent ended with {status}");
        }
    }
}

/// What a program did, as its client saw it.
#[derive(Debug, Default)]
pub struct Ran {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub result: Fields,
}

/// A link. Whatever waits for the agent also writes what is queued for it, so that neither can block the other.
pub struct Client {
    link: Link<UnixStream>,
}

impl Client {
    /// Sends octets as they are.
    pub fn raw(&mut self, octets: &[u8]) {
        while !self.link.flush().unwrap() {
            self.wait(PollFlags::POLLOUT);
        }
        let mut rest = octets;
        while !rest.is_empty() {
            match std::io::Write::write(self.link.stream(), rest) {
                Ok(n) => rest = &rest[n..],
                Err(_) => self.wait(PollFlags::POLLOUT),
            }
        }
    }

    fn wait(&mut self, what: PollFlags) {
        let stream = self.link.stream();
        let mut fds = [PollFd::new(stream.as_fd(), what)];
        let ready = poll(&mut fds, PollTimeout::try_from(PATIENCE).unwrap()).unwrap();
        assert!(ready > 0, "the agent does not answer");
    }

    pub fn send(&mut self, message: &Message) {
        self.link.send(message);
        self.link.flush().unwrap();
    }

    pub fn request(&mut self, request: Request) {
        self.send(&Message::Request(request));
    }

    /// The next message.
    pub fn next(&mut self) -> Message {
        loop {
            match self.link.next() {
                Some(Decoded::Message(message)) => return message,
                Some(Decoded::Bad { tag, error }) => panic!("the agent sent a bad line under {tag}: {error}"),
                None => {}
            }
            let flushed = self.link.flush().unwrap();
            match self.link.fill().unwrap() {
                Filled::More => {}
                Filled::Drained if flushed => self.wait(PollFlags::POLLIN),
                Filled::Drained => self.wait(PollFlags::POLLIN | PollFlags::POLLOUT),
                Filled::Closed => panic!("the agent closed the link"),
            }
        }
    }

    /// The fields of a request's `ok`, which is its next answer.
    pub fn done(&mut self, request: Request) -> Fields {
        self.request(request);
        match self.next() {
            Message::Ok { fields, .. } => fields,
            other => panic!("not ok: {other:?}"),
        }
    }

    /// Does a request while a program's messages come in between; those are dropped.
    pub fn done_beside(&mut self, request: Request) {
        let wanted = request.tag.clone();
        self.request(request);
        loop {
            match self.next() {
                Message::Ok { tag, .. } if tag == wanted => return,
                Message::Err { tag, error } if tag == wanted => panic!("not ok: {error}"),
                Message::Ok { .. } | Message::Err { .. } => panic!("the program ended first"),
                _ => {}
            }
        }
    }

    /// The error that a request ends with, which is its next answer.
    pub fn refused(&mut self, request: Request) -> Error {
        self.request(request);
        match self.next() {
            Message::Err { error, .. } => error,
            other => panic!("no error: {other:?}"),
        }
    }

    /// The items of a list.
    pub fn rows(&mut self, request: Request) -> Vec<Fields> {
        self.request(request);
        let mut rows = Vec::new();
        loop {
            match self.next() {
                Message::Item { fields, .. } => rows.push(fields),
                Message::Ok { .. } => return rows,
                other => panic!("not a list: {other:?}"),
            }
        }
    }

    /// Starts a program and gives its number.
    pub fn start(&mut self, request: Request) -> u64 {
        self.request(request);
        match self.next() {
            Message::Item { fields, .. } => fields.number("exec").unwrap(),
            other => panic!("not started: {other:?}"),
        }
    }

    /// Takes what a program sends, with credit, until it ends.
    pub fn finish(&mut self, tag: &str) -> Ran {
        let mut ran = Ran::default();
        let mut ended = Vec::new();
        loop {
            match self.next() {
                Message::Data { tag: of, channel, payload } => {
                    assert_eq!(of, tag);
                    self.send(&Message::credit(tag, &channel, payload.len() as u64));
                    match channel.as_str() {
                        "stdout" => ran.stdout.extend(payload),
                        "stderr" => ran.stderr.extend(payload),
                        other => panic!("channel {other}"),
                    }
                }
                Message::End { channel, .. } => ended.push(channel),
                Message::Credit { .. } | Message::Item { .. } => {}
                Message::Ok { tag: of, fields } => {
                    assert_eq!(of, tag);
                    assert!(ended.iter().any(|channel| channel == "stdout"), "{ended:?}");
                    ran.result = fields;
                    return ran;
                }
                other => panic!("unexpected: {other:?}"),
            }
        }
    }

    /// Runs a program to its end.
    pub fn run(&mut self, request: Request) -> Ran {
        let tag = request.tag.clone();
        self.start(request);
        self.finish(&tag)
    }

    /// Reads data of a program until `wanted` is in its stdout.
    pub fn wait_for(&mut self, wanted: &str) -> String {
        let mut seen = String::new();
        while !seen.contains(wanted) {
            if let Message::Data { payload, .. } = self.next() {
                seen.push_str(&String::from_utf8_lossy(&payload));
            }
        }
        seen
    }
}

/// `exec.start` of a shell script under the tag `x`.
pub fn shell(script: &str) -> Request {
    Request::new("x", "exec.start").arg("/bin/sh").arg("-c").arg(script)
}
