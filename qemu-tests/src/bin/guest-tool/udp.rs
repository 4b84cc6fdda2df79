//! Many small packets.

use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

use crate::{Keys, Outcome, during};

/// So long a silence is the end.
const QUIET: Duration = Duration::from_secs(2);

pub fn send(keys: &Keys) -> Outcome {
    let (to, count) = (keys.get("to", None::<String>)?, keys.get("count", None::<u64>)?);
    let octets = vec![0x5a; keys.get("len", Some(18usize))?];
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).map_err(during("bind"))?;
    socket.connect(&to).map_err(during("connect"))?;
    let start = std::time::Instant::now();
    for n in 0..count {
        socket.send(&octets).map_err(during(&format!("packet {n}")))?;
    }
    println!("sent={count} ns={}", start.elapsed().as_nanos());
    Ok(())
}

pub fn receive(keys: &Keys) -> Outcome {
    let (port, count) = (keys.get("port", None::<u16>)?, keys.get("count", None::<u64>)?);
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).map_err(during("bind"))?;
    println!("listening={port}");
    let mut octets = [0; 65_536];
    // The first may take its time; after that, silence is the end of what is not lost.
    let (mut received, mut bytes) = (0, 0);
    while received < count {
        match socket.recv(&mut octets) {
            Ok(len) => (received, bytes) = (received + 1, bytes + len),
            Err(_) => break,
        }
        if received == 1 {
            socket.set_read_timeout(Some(QUIET)).map_err(during("time limit"))?;
        }
    }
    println!("received={received} bytes={bytes}");
    Ok(())
}
