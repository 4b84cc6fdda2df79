//! A remote-write receiver that remembers every sample, and can be away.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use crate::decode::{self, remote_write};
use warren::sentinel::http::{Answer, Server, ServerRequest};

/// Labels with the name, as text.
type Series = String;

#[derive(Default)]
pub struct Got {
    /// Times that each sample arrived: by series and time, with the bits of its value.
    pub samples: BTreeMap<(Series, i64), (u64, u32)>,
    /// Samples that came again with another value.
    pub contradictions: u64,
}

impl Got {
    pub fn unique(&self) -> u64 {
        self.samples.len() as u64
    }

    pub fn repeated(&self) -> u64 {
        self.samples.values().filter(|(_, times)| *times > 1).count() as u64
    }
}

pub struct Receiver {
    address: SocketAddr,
    server: Option<Server>,
    pub got: Arc<Mutex<Got>>,
}

impl Receiver {
    pub fn new() -> Self {
        let mut receiver = Self { address: ([127, 0, 0, 1], 0).into(), server: None, got: Arc::default() };
        receiver.come_back();
        receiver
    }

    pub fn url(&self) -> String {
        format!("http://{}/write", self.address)
    }

    /// Closes its port.
    pub fn go_away(&mut self) {
        self.server = None;
    }

    pub fn come_back(&mut self) {
        let got = Arc::clone(&self.got);
        let answer = move |request: &ServerRequest| {
            take(remote_write(|name| request.header(name), &request.body), &mut got.lock().unwrap());
            Answer::status(204)
        };
        let server = Server::start(self.address, 1 << 24, answer).unwrap();
        self.address = server.address();
        self.server = Some(server);
    }
}

fn take(samples: Vec<decode::Got>, got: &mut Got) {
    for sample in samples {
        let series = sample.labels.iter().map(|(name, value)| format!("{name}={value:?},")).collect();
        let entry = got.samples.entry((series, sample.timestamp)).or_insert((sample.bits, 0));
        entry.1 += 1;
        got.contradictions += u64::from(entry.0 != sample.bits);
    }
}
