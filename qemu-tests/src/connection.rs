//! One blocking connection that speaks the protocol: messages or raw octets out, messages in.
//!
//! The tests do not share code with the command line's client on purpose: a fault in that one must not hide
//! from them.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use warren::wire::{Decoded, Decoder, Message};

/// A connection to a control socket, a worker or an agent.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    decoder: Decoder,
}

impl Connection {
    /// Connects to the Unix socket at `path`.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self::over(UnixStream::connect(path)?))
    }

    /// Speaks over a stream that is connected already.
    pub fn over(stream: UnixStream) -> Self {
        Self { stream, decoder: Decoder::new() }
    }

    /// The stream below, to clone, shut down or give a time limit.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Writes one message.
    pub fn send(&mut self, message: &Message) -> io::Result<()> {
        self.stream.write_all(&message.to_bytes())
    }

    /// Writes octets as they are, well-formed or not.
    pub fn send_raw(&mut self, octets: &[u8]) -> io::Result<()> {
        self.stream.write_all(octets)
    }

    /// Takes octets that were read from the stream already.
    pub fn feed(&mut self, octets: &[u8]) {
        self.decoder.push(octets);
    }

    /// The next message. `UnexpectedEof` when the peer has closed, `InvalidData` for what is no message.
    pub fn receive(&mut self) -> io::Result<Message> {
        let mut chunk = [0u8; 32 * 1024];
        loop {
            match self.decoder.next() {
                Some(Decoded::Message(message)) => return Ok(message),
                Some(Decoded::Bad { error, .. }) => {
                    return Err(io::Error::new(
                        ErrorKind::InvalidData,
                        format!("the peer sent what is no message: {error}"),
                    ));
                }
                None => match self.stream.read(&mut chunk) {
                    Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                    Ok(n) => self.decoder.push(&chunk[..n]),
                    Err(e) if e.kind() == ErrorKind::Interrupted => {}
                    Err(e) => return Err(e),
                },
            }
        }
    }
}
