//! A simulated agent for tests: answers Get, GetNext and GetBulk of v1 and v2c from a table of variables.

use std::collections::BTreeMap;
use std::net::{SocketAddr, UdpSocket};
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::ber::Value;
use super::message::{Message, NO_SUCH_NAME, Pdu, PduKind, TOO_BIG, V1, community_message};
use super::oid::Oid;

pub struct Agent {
    pub address: SocketAddr,
    pub requests: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// How an agent behaves.
pub struct Manners {
    pub variables: BTreeMap<Oid, Value>,
    /// Answers with more variables are tooBig.
    pub most: usize,
    /// Requests of these communities are not answered.
    pub silent: fn(&[u8]) -> bool,
    /// The first requests that are dropped.
    pub lost: u64,
    /// Answers every GetNext and GetBulk with the same name.
    pub endless: bool,
}

impl Manners {
    pub fn of(variables: &[(&str, Value)]) -> Self {
        let variables = variables.iter().map(|(oid, value)| (Oid::parse(oid).unwrap(), value.clone())).collect();
        Self { variables, most: 1000, silent: |_| false, lost: 0, endless: false }
    }

    fn next(&self, name: &Oid) -> (Oid, Value) {
        let start = if self.endless { Bound::Unbounded } else { Bound::Excluded(name.clone()) };
        let next = self.variables.range((start, Bound::Unbounded)).next();
        next.map_or((name.clone(), Value::End), |(name, value)| (name.clone(), value.clone()))
    }

    fn answer(&self, version: i32, request: &Pdu) -> Pdu {
        let mut variables = Vec::new();
        match request.kind {
            PduKind::Get => {
                let get = |name: &Oid| self.variables.get(name).cloned().unwrap_or(Value::Missing);
                variables.extend(request.variables.iter().map(|(name, _)| (name.clone(), get(name))));
            }
            PduKind::GetNext => variables.extend(request.variables.iter().map(|(name, _)| self.next(name))),
            PduKind::GetBulk => {
                let mut cursors: Vec<Oid> = request.variables.iter().map(|(name, _)| name.clone()).collect();
                for _ in 0..request.index {
                    for cursor in &mut cursors {
                        let (name, value) = self.next(cursor);
                        *cursor = name.clone();
                        variables.push((name, value));
                    }
                }
            }
            _ => {}
        }
        let answer =
            |status, index, variables| Pdu { kind: PduKind::Response, id: request.id, status, index, variables };
        if variables.len() > self.most {
            return answer(TOO_BIG, 0, Vec::new());
        }
        let missing = variables.iter().position(|(_, value)| matches!(value, Value::Missing | Value::End));
        match missing {
            Some(at) if version == V1 => answer(NO_SUCH_NAME, at as i32 + 1, request.variables.clone()),
            _ => answer(0, 0, variables),
        }
    }
}

impl Agent {
    pub fn start(manners: Manners) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let (address, stop, requests) = (socket.local_addr().unwrap(), Arc::<AtomicBool>::default(), Arc::default());
        let (stopped, counted): (_, Arc<AtomicU64>) = (Arc::clone(&stop), Arc::clone(&requests));
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 65_536];
            while !stopped.load(Ordering::Relaxed) {
                let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
                let Ok(Message::Community { version, community, pdu }) = Message::decode(&buffer[..length]) else {
                    continue;
                };
                let count = counted.fetch_add(1, Ordering::Relaxed);
                if count >= manners.lost && !(manners.silent)(community) {
                    let answer = community_message(version, community, &manners.answer(version, &pdu));
                    socket.send_to(&answer, from).unwrap();
                }
            }
        });
        Self { address, requests, stop, thread: Some(thread) }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}
