//! Who stands in for a worker: every later connection to its socket comes here.

use std::fs;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};

use qemu_tests::connection::Connection;
use warren::wire::{Code, Error, Fields, Message, WORKER_LINK};

/// Stands between a worker, whose socket moves from `socket` to `real`, and whoever connects to it from now on: the worker's
/// greeting names another version of its link, or none for `-`.
pub fn claim(version: &str, real: &str, socket: &str) -> io::Result<()> {
    fs::rename(socket, real)?;
    let listener = UnixListener::bind(socket)?;
    loop {
        let (client, _) = listener.accept()?;
        let worker = UnixStream::connect(real)?;
        let (mut up, mut down) = ((client.try_clone()?, worker.try_clone()?), (worker, client));
        std::thread::spawn(move || {
            let _ = io::copy(&mut up.0, &mut up.1);
            let _ = up.1.shutdown(Shutdown::Write);
        });
        let version = version.to_string();
        std::thread::spawn(move || {
            let _ = answer(&version, &mut down.0, &mut down.1);
            let _ = down.1.shutdown(Shutdown::Both);
        });
    }
}

/// Passes on what a worker says. Only the first line of a connection can be its greeting.
fn answer(version: &str, worker: &mut UnixStream, client: &mut UnixStream) -> io::Result<()> {
    let mut line = Vec::new();
    let mut octet = [0];
    while line.last() != Some(&b'\n') && worker.read(&mut octet)? == 1 {
        line.push(octet[0]);
    }
    let text = String::from_utf8_lossy(&line).into_owned();
    let words: Vec<String> = text.split(' ').map(str::to_string).collect();
    let words = words.into_iter().filter_map(|word| match (word.starts_with("link="), version) {
        (true, "-") => None,
        (true, version) => Some(format!("link={version}")),
        (false, _) => Some(word),
    });
    client.write_all(words.collect::<Vec<_>>().join(" ").as_bytes())?;
    io::copy(worker, client).map(drop)
}

/// Stands in for a worker that was taken over, and for its guest's agent. What they do is the mode's:
///
/// | mode | who | what |
/// |---|---|---|
/// | `blank` | both | greet, then send empty lines without end |
/// | `greet` | worker | greets without end |
/// | `list` | agent | lists running programs without end |
/// | `refuse` | agent | says in 60,000 octets why it cannot serve |
/// | `deaf` | agent | greets, then reads nothing |
/// | `begin` | agent | says without end that a program has begun |
/// | `hold` | worker | says that it has taken its machine, and writes nothing |
pub fn pose(mode: &str, real: &str, socket: &str) -> io::Result<()> {
    fs::rename(socket, real)?;
    let listener = UnixListener::bind(socket)?;
    loop {
        let (stream, _) = listener.accept()?;
        let mode = mode.to_string();
        std::thread::spawn(move || {
            // It ends when the supervisor has had enough.
            let _ = speak(&mode, Connection::over(stream));
        });
    }
}

fn speak(mode: &str, mut link: Connection) -> io::Result<()> {
    if mode == "hold" && first_word(&link)? == *b"capture" {
        // Who does not read has the descriptors that came with it all the same.
        link.send(&Message::ok("capture", Fields::new()))?;
        loop {
            std::thread::park();
        }
    }
    let Message::Request(first) = link.receive()? else { return Ok(()) };
    let protocol = Fields::new().with("protocol", 1);
    let who = if first.verb == "vsock.connect" { "agent" } else { "worker" };
    let greeting = match who {
        "agent" => {
            link.send(&Message::ok(&first.tag, Fields::new()))?;
            Message::ok("hello", protocol)
        }
        _ => Message::ok(&first.tag, protocol.with("link", WORKER_LINK)),
    };
    if (who, mode) == ("agent", "refuse") {
        return link.send(&Message::err("hello", Error::new(Code::Internal, "why ".repeat(15_000))));
    }
    link.send(&greeting)?;
    match (who, mode) {
        ("worker", "greet") => endless(&mut link, |_| greeting.to_bytes()),
        (_, "blank") => endless(&mut link, |_| vec![b'\n'; 64 * 1024]),
        ("agent", "deaf") => loop {
            std::thread::park();
        },
        _ => answer_requests(who, mode, &mut link),
    }
}

/// The first word that waits on a connection, which stays there.
fn first_word(link: &Connection) -> io::Result<[u8; 7]> {
    let mut word = [0; 7];
    let flags = libc::MSG_PEEK | libc::MSG_WAITALL;
    // SAFETY: `word` has room for its own length.
    match unsafe { libc::recv(link.stream().as_raw_fd(), word.as_mut_ptr().cast(), word.len(), flags) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(word),
    }
}

fn answer_requests(who: &str, mode: &str, link: &mut Connection) -> io::Result<()> {
    loop {
        let Message::Request(request) = link.receive()? else { continue };
        let row = |fields: Fields| Message::item(&request.tag, fields).to_bytes();
        match (who, mode, request.verb.as_str()) {
            ("agent", "list", "exec.list") => {
                let listed = Fields::new().with("state", "running").with("argv", "x".repeat(200));
                endless(link, |number| row(listed.clone().with("exec", 1_000_000 + number)))?;
            }
            ("agent", "begin", "exec.start") => endless(link, |_| row(Fields::new().with("exec", 1).with("pid", 7)))?,
            _ => link.send(&Message::ok(&request.tag, Fields::new()))?,
        }
    }
}

/// Says the same until nobody listens any more.
fn endless(link: &mut Connection, said: impl Fn(u64) -> Vec<u8>) -> io::Result<()> {
    (0..).try_for_each(|number| link.send_raw(&said(number)))
}
