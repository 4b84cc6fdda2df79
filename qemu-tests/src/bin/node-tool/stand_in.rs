//! Who stands in for a worker: every later connection to its socket comes here.

use std::fs;
use std::io::{self, Read, Write};
use std::net::Shutdown;
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
    let Message::Request(first) = link.receive()? else { return Ok(()) };
    let is_agent = first.verb == "vsock.connect";
    let protocol = Fields::new().with("protocol", 1);
    if is_agent {
        link.send(&Message::ok(&first.tag, Fields::new()))?;
        if mode == "refuse" {
            return link.send(&Message::err("hello", Error::new(Code::Internal, "why ".repeat(15_000))));
        }
        link.send(&Message::ok("hello", protocol))?;
    } else {
        let greeting = Message::ok(&first.tag, protocol.with("link", WORKER_LINK));
        link.send(&greeting)?;
        while mode == "greet" {
            link.send(&greeting)?;
        }
    }
    while mode == "blank" {
        link.send_raw(&[b'\n'; 64 * 1024])?;
    }
    while is_agent && mode == "deaf" {
        std::thread::park();
    }
    loop {
        let Message::Request(request) = link.receive()? else { continue };
        if is_agent && mode == "list" && request.verb == "exec.list" {
            for number in 1_000_000_u64.. {
                let row = Fields::new().with("exec", number).with("state", "running").with("argv", "x".repeat(200));
                link.send(&Message::item(&request.tag, row))?;
            }
        }
        while is_agent && mode == "begin" && request.verb == "exec.start" {
            link.send(&Message::item(&request.tag, Fields::new().with("exec", 1).with("pid", 7)))?;
        }
        link.send(&Message::ok(&request.tag, Fields::new()))?;
    }
}
