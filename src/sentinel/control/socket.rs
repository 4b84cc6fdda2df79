//! The control socket: `sentinel status`, `reload`, `stop`. One word in, one line of JSON out.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// Its name in the data directory.
pub const SOCKET: &str = "control.sock";
/// Words that change something: who said them is logged.
const CHANGES: [&str; 2] = ["reload", "stop"];
const MAX_LINE: u64 = 256;
const PATIENCE: Duration = Duration::from_secs(30);

/// Answers words with lines from a thread of its own, as long as the process lives.
pub fn serve(path: &Path, answer: impl Fn(&str) -> String + Send + 'static) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    thread::Builder::new().name("control".into()).spawn(move || {
        for stream in listener.incoming() {
            match stream {
                Ok(stream) => {
                    if let Err(e) = one(&stream, &answer) {
                        log::debug!("control: {e}");
                    }
                }
                Err(e) => {
                    log::warn!("control: {e}");
                    thread::sleep(Duration::from_secs(1));
                }
            }
        }
    })?;
    Ok(())
}

fn one(stream: &UnixStream, answer: &impl Fn(&str) -> String) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.set_write_timeout(Some(Duration::from_secs(5)))?;
    let mut word = String::new();
    BufReader::new(stream.take(MAX_LINE)).read_line(&mut word)?;
    let word = word.trim();
    let mut line = answer(word);
    if CHANGES.contains(&word) {
        let who = nix::sys::socket::getsockopt(stream, nix::sys::socket::sockopt::PeerCredentials)?;
        let result = if line.contains("\"ok\":true") { "done" } else { "refused" };
        log::info!("audit: {word} by user {}, process {}: {result}", who.uid(), who.pid());
    }
    line.push('\n');
    (&mut &*stream).write_all(line.as_bytes())
}

/// Asks a running sentinel.
pub fn ask(path: &Path, word: &str) -> io::Result<String> {
    ask_by(path, word, Instant::now() + PATIENCE, u64::MAX)
}

/// The same with a time limit, and a limit in octets for the answer.
pub fn ask_by(path: &Path, word: &str, deadline: Instant, longest: u64) -> io::Result<String> {
    let mut stream = UnixStream::connect(path)?;
    let left = || Some(deadline.saturating_duration_since(Instant::now())).filter(|left| !left.is_zero());
    stream.set_write_timeout(Some(left().ok_or(io::ErrorKind::TimedOut)?))?;
    writeln!(stream, "{word}")?;
    let mut answer = Vec::new();
    let mut part = [0; 8192];
    loop {
        stream.set_read_timeout(Some(left().ok_or(io::ErrorKind::TimedOut)?))?;
        match stream.read(&mut part)? {
            0 => break,
            octets if (answer.len() + octets) as u64 > longest => return Err(io::ErrorKind::FileTooLarge.into()),
            octets => answer.extend_from_slice(&part[..octets]),
        }
    }
    let answer = String::from_utf8(answer).map_err(|_| io::ErrorKind::InvalidData)?;
    Ok(answer.trim_end().to_string())
}
