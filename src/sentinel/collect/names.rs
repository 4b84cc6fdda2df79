//! Host names to addresses. Looking up blocks in the C library, so it has threads of its own: one question at a time for
//! each name, however many runs wait for it, and what was found is kept for a while.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, ToSocketAddrs};
use std::time::{Duration, Instant};

use super::runtime::{Note, Notes};
use crate::sentinel::schedule::RunId;

/// How long an answer is good.
const KEPT: Duration = Duration::from_secs(60);
/// Questions under way at once; a dead name server holds each for half a minute.
const THREADS: usize = 8;
/// Names kept; beyond that the oldest answers go.
const MOST: usize = 65_536;

type Addresses = Result<Vec<IpAddr>, String>;

/// Names known and asked for.
pub struct Names {
    notes: Notes,
    known: HashMap<String, (Instant, Vec<IpAddr>)>,
    waiting: HashMap<String, Vec<(usize, RunId)>>,
    queue: VecDeque<String>,
    asking: usize,
}

impl Names {
    /// Knows nothing yet.
    pub fn new(notes: Notes) -> Self {
        Self { notes, known: HashMap::new(), waiting: HashMap::new(), queue: VecDeque::new(), asking: 0 }
    }

    /// The addresses of a host, where they are known; otherwise the answer comes as a note.
    pub fn look_up(&mut self, service: usize, run: RunId, host: &str, now: Instant) -> Option<Addresses> {
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        if let Ok(address) = bare.parse::<IpAddr>() {
            return Some(Ok(vec![address]));
        }
        if let Some((until, addresses)) = self.known.get(host)
            && *until > now
        {
            return Some(Ok(addresses.clone()));
        }
        let waiting = self.waiting.entry(host.to_string()).or_default();
        if waiting.is_empty() {
            self.queue.push_back(host.to_string());
        }
        waiting.push((service, run));
        self.ask();
        None
    }

    /// An answer has come; gives who waits for it. Where the server does not answer, the last known addresses do.
    pub fn answered(&mut self, host: &str, answer: Addresses, now: Instant) -> (Vec<(usize, RunId)>, Addresses) {
        self.asking -= 1;
        self.ask();
        let waiting = self.waiting.remove(host).unwrap_or_default();
        let answer = match (answer, self.known.get(host)) {
            (Err(_), Some((_, addresses))) => Ok(addresses.clone()),
            (answer, _) => answer,
        };
        if let Ok(addresses) = &answer {
            if self.known.len() >= MOST {
                self.known.retain(|_, (until, _)| *until > now);
            }
            if self.known.len() < MOST {
                self.known.insert(host.to_string(), (now + KEPT, addresses.clone()));
            }
        }
        (waiting, answer)
    }

    fn ask(&mut self) {
        while self.asking < THREADS
            && let Some(host) = self.queue.pop_front()
        {
            self.asking += 1;
            let (notes, name) = (self.notes.clone(), host.clone());
            let question = move || {
                let answer = question(&name);
                notes.send(Note::Resolved(name, answer));
            };
            if let Err(e) = std::thread::Builder::new().name("collect-names".into()).spawn(question) {
                self.notes.send(Note::Resolved(host, Err(format!("cannot start a thread: {e}"))));
            }
        }
    }
}

fn question(host: &str) -> Addresses {
    let mut addresses: Vec<IpAddr> = match (host, 0u16).to_socket_addrs() {
        Ok(found) => found.map(|address| address.ip()).collect(),
        Err(e) => return Err(format!("{host} cannot be looked up: {e}")),
    };
    addresses.dedup();
    if addresses.is_empty() { Err(format!("{host} has no address")) } else { Ok(addresses) }
}
