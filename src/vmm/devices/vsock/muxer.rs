//! All vsock connections of a guest: who talks to whom, and what each packet and each socket event means.
//!
//! Bounds, whatever the guest does: `MAX_CONNECTIONS` connections, each keeping no more than its window and
//! owing each kind of packet at most once; `MAX_HELD` connections that wait for somebody to take them; resets
//! for connections that do not exist are queued up to `MAX_RESETS`, and then no packet is taken from the guest
//! until it gives buffers for them.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket;

use super::super::segments::Segments;
use super::connection::{Connection, Key, Settled, State, Violation};
use super::packet::{HEADER, HOST_CID, Header, Op, TYPE_STREAM};
use crate::vmm::memory;
use crate::wire::{Code, Error, Fields, Message};

/// Connections at one time, in all states.
pub const MAX_CONNECTIONS: usize = 1024;
/// Links that wait for the guest to connect.
pub const MAX_WAITERS: usize = 256;
/// The one port where the guest may connect before anybody waits for it: burrow's.
pub const HELD_PORT: u32 = 1024;
/// Connections to `HELD_PORT` that wait.
pub const MAX_HELD: usize = 4;
/// How long they wait.
const HELD_FOR: Duration = Duration::from_secs(5);
/// How long the guest has to answer a request.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// How long the guest has to confirm the end of a connection.
const CLOSE_WITHIN: Duration = Duration::from_secs(10);
/// Resets queued for connections that do not exist.
pub const MAX_RESETS: usize = 256;
/// Credit of a connection, and of those beyond the first `WIDE_CONNECTIONS`, in octets: their sum bounds what is
/// kept for slow links.
const WINDOW: u32 = 256 << 10;
const NARROW_WINDOW: u32 = 32 << 10;
const WIDE_CONNECTIONS: usize = 64;
/// Send buffer of a link, in octets; Linux doubles it for its own overhead, and bounds it.
const LINK_BUFFER: usize = 256 << 10;
/// The host's ports for connections that it opens, above all well-known ones.
const FIRST_PORT: u32 = 1 << 30;
const LAST_PORT: u32 = (1 << 31) - 1;

/// A link whose client waits for the guest to connect.
struct Waiter {
    id: u64,
    port: u32,
    link: UnixStream,
    tag: String,
    early: Vec<u8>,
}

/// A connection request of the guest that waits for somebody to take it.
struct Held {
    key: Key,
    request: Header,
    until: Instant,
}

/// See the module.
pub struct Muxer {
    guest_cid: u64,
    connections: HashMap<u64, Connection>,
    by_key: HashMap<Key, u64>,
    waiters: VecDeque<Waiter>,
    held: Vec<Held>,
    /// Connections that have something for the guest, each once, in turn.
    ready: VecDeque<u64>,
    resets: VecDeque<Key>,
    /// See `hush`.
    hushed: bool,
    /// When connections give up.
    deadlines: BTreeSet<(Instant, u64)>,
    epoll: Epoll,
    next_id: u64,
    next_port: u32,
}

impl Muxer {
    /// A muxer for the guest of that context identifier.
    pub fn new(guest_cid: u64) -> io::Result<Self> {
        Ok(Self {
            guest_cid,
            connections: HashMap::new(),
            by_key: HashMap::new(),
            waiters: VecDeque::new(),
            held: Vec::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            hushed: false,
            deadlines: BTreeSet::new(),
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            next_id: 0,
            next_port: FIRST_PORT,
        })
    }

    /// Readable when a link has something: then `link_events`.
    pub fn epoll_fd(&self) -> RawFd {
        self.epoll.0.as_raw_fd()
    }

    /// Connections at present.
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    // ---- From the worker's links ----

    /// Connects `link` to the guest's `port`. Its client gets `ok` under `tag` and the stream from then on, or `err`.
    pub fn connect(&mut self, port: u32, link: UnixStream, tag: String, early: Vec<u8>, now: Instant) {
        let Some(key) = self.free_key(port) else {
            refuse(&link, &tag, Code::NoCapacity, format!("{MAX_CONNECTIONS} vsock connections are open"));
            return;
        };
        let Some(id) = self.watch(&link, &tag) else { return };
        let connection = Connection::connecting(key, link, tag, early, self.window());
        self.insert(id, connection);
        self.set_deadline(id, Some(now + CONNECT_WITHIN));
        self.mark_ready(id);
    }

    /// Waits with `link` for the guest to connect to the host's `port`; replies as `connect` does.
    pub fn accept(&mut self, port: u32, link: UnixStream, tag: String, early: Vec<u8>, now: Instant) {
        self.expire(now);
        if self.waiters.len() >= MAX_WAITERS {
            refuse(&link, &tag, Code::NoCapacity, format!("{MAX_WAITERS} links wait for the guest"));
            return;
        }
        let Some(id) = self.watch(&link, &tag) else { return };
        let waiter = Waiter { id, port, link, tag, early };
        match self.held.iter().position(|held| held.key.0 == port) {
            Some(at) => {
                let held = self.held.remove(at);
                self.meet(waiter, &held.request);
            }
            None => self.waiters.push_back(waiter),
        }
    }

    /// Watches a link; edge-triggered, so that a link costs no system call beyond its transfers.
    fn watch(&mut self, link: &UnixStream, tag: &str) -> Option<u64> {
        let id = self.next_id;
        self.next_id += 1;
        // So that the socket takes a whole window at once, and none of it has to be kept here. Best effort.
        let _ = socket::setsockopt(link, socket::sockopt::SndBuf, &LINK_BUFFER);
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
        match self.epoll.add(link, EpollEvent::new(flags, id)) {
            Ok(()) => Some(id),
            Err(errno) => {
                refuse(link, tag, Code::NoCapacity, format!("the link cannot be watched: {errno}"));
                None
            }
        }
    }

    fn free_key(&mut self, port: u32) -> Option<Key> {
        if self.connections.len() >= MAX_CONNECTIONS {
            return None;
        }
        // Ends: there are far more ports than connections.
        loop {
            let key = (self.next_port, port);
            self.next_port = if self.next_port >= LAST_PORT { FIRST_PORT } else { self.next_port + 1 };
            if !self.by_key.contains_key(&key) {
                return Some(key);
            }
        }
    }

    fn window(&self) -> u32 {
        if self.connections.len() < WIDE_CONNECTIONS { WINDOW } else { NARROW_WINDOW }
    }

    /// Takes the events of all links.
    pub fn link_events(&mut self) {
        let mut events = [EpollEvent::empty(); 64];
        loop {
            let Ok(count) = self.epoll.wait(&mut events, EpollTimeout::ZERO) else { return };
            for event in &events[..count] {
                self.link_event(event.data(), event.events());
            }
            // Each event is told once, so this ends.
            if count < events.len() {
                return;
            }
        }
    }

    fn link_event(&mut self, id: u64, flags: EpollFlags) {
        let gone = flags.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR);
        let Some(connection) = self.connections.get_mut(&id) else {
            if gone {
                self.waiters.retain(|waiter| waiter.id != id);
            }
            return;
        };
        if flags.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP) || gone {
            connection.readable = true;
        }
        connection.hung_up |= gone;
        if connection.state == State::Connecting && gone {
            self.reset(id);
            return;
        }
        if flags.contains(EpollFlags::EPOLLOUT) || gone {
            connection.flush();
        }
        self.settle(id);
        self.mark_ready(id);
    }

    // ---- From the guest ----

    /// Whether another packet of the guest may be taken.
    pub fn takes_packets(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// Takes one packet of the guest; gives the octets of data in it that belong to a connection.
    /// Packets that are no packets are dropped, ones that break the rules of a connection reset it.
    pub fn packet(&mut self, packet: &Segments<'_>, now: Instant) -> usize {
        let mut octets = [0; HEADER];
        if packet.copy_to(0, &mut octets) < HEADER {
            return 0;
        }
        let header = Header::decode(&octets);
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return 0;
        }
        let key = (header.dst_port, header.src_port);
        if header.kind != TYPE_STREAM {
            // §5.10.6.4.2: an unknown type is answered by a reset.
            if header.op != Some(Op::Reset) {
                self.resets.push_back(key);
            }
            return 0;
        }
        match self.by_key.get(&key) {
            Some(&id) => self.packet_for(id, &header, packet, now),
            None => {
                match header.op {
                    Some(Op::Request) => self.request(key, header, now),
                    Some(Op::Reset | Op::Shutdown) if self.held.iter().any(|held| held.key == key) => {
                        self.held.retain(|held| held.key != key);
                        if header.op == Some(Op::Shutdown) {
                            self.resets.push_back(key);
                        }
                    }
                    Some(Op::Reset) => {}
                    _ if self.hushed => {}
                    _ => self.resets.push_back(key),
                }
                0
            }
        }
    }

    fn packet_for(&mut self, id: u64, header: &Header, packet: &Segments<'_>, now: Instant) -> usize {
        let Some(connection) = self.connections.get_mut(&id) else { return 0 };
        connection.take_credit(header);
        let mut octets = 0;
        match (header.op, connection.state) {
            (Some(Op::Reset), _) => {
                self.guest_reset(id);
                return 0;
            }
            (Some(Op::Response), State::Connecting) => {
                let line = Message::ok(&connection.tag, Fields::new()).to_bytes();
                if connection.establish(&line).is_err() {
                    self.reset(id);
                    return 0;
                }
                self.set_deadline(id, None);
            }
            // Its data crossed our shutdown on the way; the guest's reset will follow.
            (Some(Op::Data | Op::CreditUpdate | Op::CreditRequest), State::Closing) => return 0,
            (Some(Op::Shutdown), State::Closing) => {
                connection.guest_shutdown(header.flags);
                if connection.guest_done_sending() {
                    self.reset(id);
                }
                return 0;
            }
            (Some(Op::Data), _) => {
                let len = header.len as usize;
                let whole = len <= packet.len() - HEADER;
                if !whole || connection.forward(packet, len).is_err() {
                    self.reset(id);
                    return 0;
                }
                octets = len;
            }
            (Some(Op::Shutdown), State::Established) => connection.guest_shutdown(header.flags),
            (Some(Op::CreditUpdate), State::Established) => {}
            (Some(Op::CreditRequest), State::Established) => connection.owed.credit_update = true,
            // A second request or response, or an operation that does not exist.
            _ => {
                self.reset(id);
                return 0;
            }
        }
        self.settle_at(id, now);
        self.mark_ready(id);
        octets
    }

    /// The guest wants a connection to the host's port `key.0`.
    fn request(&mut self, key: Key, request: Header, now: Instant) {
        self.expire(now);
        // Who connects anew knows that the old connections are gone.
        self.hushed = false;
        if self.held.iter().any(|held| held.key == key) {
            self.held.retain(|held| held.key != key);
            self.resets.push_back(key);
            return;
        }
        if let Some(at) = self.waiters.iter().position(|waiter| waiter.port == key.0)
            && self.connections.len() < MAX_CONNECTIONS
        {
            if let Some(waiter) = self.waiters.remove(at) {
                self.meet(waiter, &request);
            }
        } else if key.0 == HELD_PORT && self.held.len() < MAX_HELD {
            self.held.push(Held { key, request, until: now + HELD_FOR });
        } else {
            self.resets.push_back(key);
        }
    }

    /// Brings a guest's request and a waiting link together.
    fn meet(&mut self, waiter: Waiter, request: &Header) {
        let key = (request.dst_port, request.src_port);
        let window = self.window();
        let line = Message::ok(&waiter.tag, Fields::new()).to_bytes();
        let mut connection = Connection::connecting(key, waiter.link, waiter.tag, waiter.early, window);
        connection.take_credit(request);
        if connection.establish(&line) == Err(Violation) {
            self.resets.push_back(key);
            return;
        }
        connection.owed.response = true;
        self.insert(waiter.id, connection);
        self.mark_ready(waiter.id);
    }

    fn insert(&mut self, id: u64, connection: Connection) {
        self.by_key.insert(connection.key, id);
        self.connections.insert(id, connection);
    }

    // ---- Ends ----

    fn settle(&mut self, id: u64) {
        self.settle_at(id, Instant::now());
    }

    fn settle_at(&mut self, id: u64, now: Instant) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        match connection.settle() {
            Settled::Open => {}
            Settled::Closing => self.set_deadline(id, Some(now + CLOSE_WITHIN)),
            Settled::Reset => self.reset(id),
            Settled::Gone => {
                self.remove(id);
            }
        }
    }

    /// The guest ended a connection at once.
    fn guest_reset(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        // Linux gives a slow receiver eight seconds after its shutdown and then resets; what it had sent is
        // still good.
        if connection.state == State::Established && connection.guest_done_sending() && connection.keeps() {
            connection.state = State::Draining;
            connection.owed = super::connection::Owed::default();
            let key = connection.key;
            self.by_key.remove(&key);
            return;
        }
        if let Some(connection) = self.remove(id)
            && connection.state == State::Connecting
            && let Some(link) = &connection.link
        {
            let port = connection.key.1;
            refuse(link, &connection.tag, Code::LinkLost, format!("the guest refused a connection to port {port}"));
        }
    }

    /// Ends a connection at once and tells the guest.
    fn reset(&mut self, id: u64) {
        self.end(id, Code::LinkLost, "the guest reset the connection to port");
    }

    /// Ends a connection at once, tells the guest, and the link's client where it has no answer yet.
    fn end(&mut self, id: u64, code: Code, sentence: &str) {
        let Some(connection) = self.remove(id) else { return };
        if let (State::Connecting, Some(link)) = (connection.state, &connection.link) {
            refuse(link, &connection.tag, code, format!("{sentence} {}", connection.key.1));
        }
        // The guest need not hear of one that it has not seen.
        if connection.state != State::Draining && !connection.owed.request {
            self.resets.push_back(connection.key);
        }
    }

    /// Forgets a connection; its link closes.
    fn remove(&mut self, id: u64) -> Option<Connection> {
        self.set_deadline(id, None);
        let connection = self.connections.remove(&id)?;
        if self.by_key.get(&connection.key) == Some(&id) {
            self.by_key.remove(&connection.key);
        }
        Some(connection)
    }

    /// The guest's driver is gone: so are its connections. Requests that it has not seen yet and links that
    /// wait for it stay for the next driver.
    pub fn driver_gone(&mut self) {
        self.held.clear();
        self.resets.clear();
        let ids: Vec<u64> = self.connections.keys().copied().collect();
        for id in ids {
            if self.connections.get(&id).is_some_and(|c| !c.owed.request && c.state != State::Draining) {
                self.guest_reset(id);
            }
        }
    }

    /// Whether the guest is yet to learn that it was restored: nothing is for it, and packets of connections that do not
    /// exist are dropped without a reset.
    pub fn hush(&mut self, hushed: bool) {
        if hushed {
            // A socket of before is found by its ports until its program closes it, so the new ones are others.
            let anywhere = RandomState::new().build_hasher().finish();
            self.next_port = FIRST_PORT + (anywhere % u64::from(LAST_PORT - FIRST_PORT)) as u32;
        }
        self.hushed = hushed;
    }

    /// See `hush`.
    pub fn is_hushed(&self) -> bool {
        self.hushed
    }

    // ---- Time ----

    fn set_deadline(&mut self, id: u64, deadline: Option<Instant>) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if let Some(old) = std::mem::replace(&mut connection.deadline, deadline) {
            self.deadlines.remove(&(old, id));
        }
        if let Some(new) = deadline {
            self.deadlines.insert((new, id));
        }
    }

    /// When `expire` has something to do next.
    pub fn next_deadline(&self) -> Option<Instant> {
        let held = self.held.iter().map(|held| held.until);
        held.chain(self.deadlines.first().map(|&(at, _)| at)).min()
    }

    /// Ends what has waited too long.
    pub fn expire(&mut self, now: Instant) {
        while let Some(at) = self.held.iter().position(|held| held.until <= now) {
            let held = self.held.remove(at);
            self.resets.push_back(held.key);
        }
        while let Some(&(at, id)) = self.deadlines.first()
            && at <= now
        {
            self.deadlines.remove(&(at, id));
            self.end(id, Code::GuestTimeout, "no answer in time from guest port");
        }
    }

    // ---- To the guest ----

    /// The next connection that does not exist (any more) and is to be reset.
    pub fn next_reset(&self) -> Option<Header> {
        self.resets.front().map(|&(host_port, guest_port)| Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: host_port,
            dst_port: guest_port,
            len: 0,
            kind: TYPE_STREAM,
            op: Some(Op::Reset),
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        })
    }

    /// The guest got it.
    pub fn reset_sent(&mut self) {
        self.resets.pop_front();
    }

    /// The next connection in turn that may have something for the guest. `put_back` it if it still has.
    pub fn next_ready(&mut self) -> Option<(u64, &mut Connection)> {
        while let Some(id) = self.ready.pop_front() {
            // Ids are never used again, so one that is gone is just skipped.
            if self.connections.contains_key(&id) {
                return self.connections.get_mut(&id).map(|connection| {
                    connection.queued = false;
                    (id, connection)
                });
            }
        }
        None
    }

    /// After a turn: draws conclusions and puts the connection at the end of the row if it has more.
    pub fn put_back(&mut self, id: u64) {
        self.settle(id);
        self.mark_ready(id);
    }

    fn mark_ready(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if connection.has_data() && connection.credit() == 0 {
            connection.ask_credit();
        }
        let has = connection.owes_control() || (connection.has_data() && connection.credit() > 0);
        if has && !connection.queued {
            connection.queued = true;
            self.ready.push_back(id);
        }
    }
}

/// Tells a link's client that it gets no stream. Best effort: the link closes in any case.
fn refuse(link: &UnixStream, tag: &str, code: Code, sentence: String) {
    let line = Message::err(tag, Error::new(code, sentence)).to_bytes();
    let _ = memory::send_octets(link.as_fd(), &line);
}
