//! A remote-write receiver that remembers every sample, and can be away.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

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
            let raw = snap::raw::Decoder::new().decompress_vec(&request.body).unwrap();
            take(&raw, &mut got.lock().unwrap());
            Answer::status(204)
        };
        let server = Server::start(self.address, 1 << 24, answer).unwrap();
        self.address = server.address();
        self.server = Some(server);
    }
}

fn varint(raw: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..).step_by(7) {
        let octet = raw[0];
        *raw = &raw[1..];
        value |= u64::from(octet & 0x7f) << shift;
        if octet < 0x80 {
            break;
        }
    }
    value
}

/// Number, integer or bits, octets.
pub fn fields(mut raw: &[u8]) -> Vec<(u64, u64, &[u8])> {
    let mut fields = Vec::new();
    while !raw.is_empty() {
        let key = varint(&mut raw);
        let mut field: (u64, u64, &[u8]) = (key >> 3, 0, &[]);
        match key & 7 {
            0 => field.1 = varint(&mut raw),
            1 => {
                field.1 = u64::from_le_bytes(raw[..8].try_into().unwrap());
                raw = &raw[8..];
            }
            2 => {
                let len = varint(&mut raw) as usize;
                (field.2, raw) = raw.split_at(len);
            }
            other => panic!("wire type {other}"),
        }
        fields.push(field);
    }
    fields
}

fn take(raw: &[u8], got: &mut Got) {
    for (_, _, series) in fields(raw) {
        let mut name = String::new();
        for (number, _, octets) in fields(series) {
            let parts = fields(octets);
            if number == 1 {
                let text = |part: usize| String::from_utf8(parts[part].2.to_vec()).unwrap();
                name.push_str(&format!("{}={:?},", text(0), text(1)));
                continue;
            }
            let of = |wanted| parts.iter().find(|(number, ..)| *number == wanted).map_or(0, |(_, value, _)| *value);
            let (bits, time) = (of(1), of(2) as i64);
            let entry = got.samples.entry((name.clone(), time)).or_insert((bits, 0));
            entry.1 += 1;
            got.contradictions += u64::from(entry.0 != bits);
        }
    }
}
