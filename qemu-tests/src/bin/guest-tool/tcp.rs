//! One stream of octets that both ends know, so that a damaged or lost one shows.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};

use crate::{Keys, Outcome, during};

/// The pattern's period, a prime: shifted data never matches.
const PERIOD: usize = 251;

/// The pattern from `offset` on, in a buffer that holds `len` octets from any phase.
fn pattern(len: usize) -> Vec<u8> {
    (0..len + PERIOD).map(|n| (n % PERIOD) as u8).collect()
}

pub fn receive(keys: &Keys) -> Outcome {
    let (port, connections) = (keys.get("port", None::<u16>)?, keys.get("connections", Some(1u32))?);
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).map_err(during("bind"))?;
    println!("listening={port}");
    let mut buffer = vec![0; 256 * 1024];
    let expected = pattern(buffer.len());
    for _ in 0..connections {
        let (mut stream, _) = listener.accept().map_err(during("accept"))?;
        let mut received = 0usize;
        loop {
            let n = match stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => return Err(format!("after {received} octets: {e}")),
            };
            let phase = received % PERIOD;
            if buffer[..n] != expected[phase..phase + n] {
                return Err(format!("damaged between octets {received} and {}", received + n));
            }
            received += n;
        }
        println!("received={received}");
        // The sender waits for the count, so that its time covers the whole way.
        stream.write_all(format!("{received}\n").as_bytes()).map_err(during("answer"))?;
    }
    Ok(())
}

pub fn send(keys: &Keys) -> Outcome {
    let (to, mib) = (keys.get("to", None::<String>)?, keys.get("mib", None::<usize>)?);
    let chunk = keys.get("chunk", Some(64 * 1024usize))?;
    let mut stream = TcpStream::connect(&to).map_err(during("connect"))?;
    let (octets, source) = (mib << 20, pattern(chunk));
    let start = std::time::Instant::now();
    let mut sent = 0;
    while sent < octets {
        let (phase, len) = (sent % PERIOD, chunk.min(octets - sent));
        stream.write_all(&source[phase..phase + len]).map_err(during("send"))?;
        sent += len;
    }
    stream.shutdown(std::net::Shutdown::Write).map_err(during("shutdown"))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(during("answer"))?;
    let time = start.elapsed();
    println!("sent={sent} ns={}", time.as_nanos());
    if answer.trim() == sent.to_string() { Ok(()) } else { Err(format!("sent {sent}, the peer got {answer:?}")) }
}
