use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::time::Duration;

use super::packet::{SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::*;
use crate::vmm::devices::driver::{self, DriverQueue, Seed};
use crate::vmm::devices::mmio::MmioTransport;
use crate::vmm::memory::GuestMemory;

mod restore;

const CID: u64 = 7;
const BUFFER: u32 = 4096 + HEADER as u32;
const BUFFERS: u64 = 0x10_0000;
const PACKETS: u64 = 0x8_0000;
/// What the guest's sockets hold, as Linux's by default.
const GUEST_BUFFER: u32 = 256 << 10;

/// A guest with its side of the device: buffers are given when the test says so.
struct Guest {
    memory: GuestMemory,
    transport: MmioTransport<Vsock>,
    queues: Vec<DriverQueue>,
    given: u64,
    /// For every packet sent: what the guest's socket holds and has read.
    buf_alloc: u32,
    fwd_cnt: u32,
}

impl Guest {
    fn new(buffers: usize) -> Self {
        let memory = GuestMemory::new(8 << 20).unwrap();
        let transport = MmioTransport::new(memory.clone(), Vsock::new(CID).unwrap()).unwrap();
        let queues = driver::start(&transport, driver::EVENT_IDX | driver::INDIRECT, 3, 256, 0);
        let mut guest = Self { memory, transport, queues, given: 0, buf_alloc: GUEST_BUFFER, fwd_cnt: 0 };
        guest.give(buffers);
        guest.run();
        guest
    }

    /// Gives receive buffers.
    fn give(&mut self, count: usize) {
        for _ in 0..count {
            let at = BUFFERS + self.given % 256 * 0x2000;
            self.given += 1;
            self.queues[RX].add(&self.memory, &[(at, BUFFER, true)]);
        }
        self.transport.kick(RX);
    }

    /// What the device thread does until nothing is left to do.
    fn run(&self) {
        self.transport.with_device(Vsock::link_events);
        self.transport.kick(RX);
        driver::run(&self.transport);
    }

    fn accept(&self, port: u32) -> UnixStream {
        let (link, peer) = UnixStream::pair().unwrap();
        peer.set_nonblocking(true).unwrap();
        self.transport.with_device(|vsock| vsock.accept(port, link, "a1".into(), Vec::new()));
        self.run();
        peer
    }

    fn connect(&self, port: u32, early: &[u8]) -> UnixStream {
        let (link, peer) = UnixStream::pair().unwrap();
        peer.set_nonblocking(true).unwrap();
        self.transport.with_device(|vsock| vsock.connect(port, link, "c1".into(), early.to_vec()));
        self.run();
        peer
    }

    fn header(&self, op: Op, key: (u32, u32), len: usize) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: key.1,
            dst_port: key.0,
            len: len as u32,
            kind: 1,
            op: Some(op),
            flags: 0,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
        }
    }

    fn send_raw(&mut self, header: &Header, data: &[u8]) {
        self.memory.write(PACKETS, &header.encode()).unwrap();
        self.memory.write(PACKETS + HEADER as u64, data).unwrap();
        let buffers = [(PACKETS, HEADER as u32, false), (PACKETS + HEADER as u64, data.len() as u32, false)];
        self.queues[TX].add(&self.memory, &buffers);
        self.transport.kick(TX);
        self.run();
        while self.queues[TX].used(&self.memory).is_some() {}
    }

    fn send(&mut self, op: Op, key: (u32, u32), data: &[u8]) {
        self.send_raw(&self.header(op, key, data.len()), data);
    }

    fn shutdown(&mut self, key: (u32, u32), flags: u32) {
        self.send_raw(&Header { flags, ..self.header(Op::Shutdown, key, 0) }, &[]);
    }

    /// The next packet for the guest.
    fn packet(&mut self) -> Option<(Header, Vec<u8>)> {
        let (head, written) = self.queues[RX].used(&self.memory)?;
        let at = self.memory.read_u64(16 * u64::from(head)).unwrap();
        let mut octets = [0; HEADER];
        self.memory.read(at, &mut octets).unwrap();
        let header = Header::decode(&octets);
        assert_eq!((header.src_cid, header.dst_cid, header.kind), (HOST_CID, CID, 1));
        assert_eq!(written, HEADER as u32 + header.len);
        let mut data = vec![0; header.len as usize];
        self.memory.read(at + HEADER as u64, &mut data).unwrap();
        Some((header, data))
    }

    fn ops(&mut self) -> Vec<Op> {
        std::iter::from_fn(|| self.packet()).map(|(header, _)| header.op.unwrap()).collect()
    }

    /// A connection that the guest opened to a waiting link.
    fn connected(&mut self, key: (u32, u32)) -> UnixStream {
        let mut peer = self.accept(key.0);
        self.send(Op::Request, key, &[]);
        assert_eq!(self.ops(), [Op::Response]);
        assert_eq!(line(&mut peer), "a1 ok\n");
        peer
    }

    fn connections(&self) -> usize {
        self.transport.with_device(|vsock| vsock.connections())
    }

    fn expire_in(&self, seconds: u64) {
        self.transport.with_device(|vsock| vsock.expire(Instant::now() + Duration::from_secs(seconds)));
        self.run();
    }
}

/// Reads what there is.
fn drain(peer: &mut UnixStream) -> (Vec<u8>, bool) {
    let mut all = Vec::new();
    let mut octets = [0; 65536];
    loop {
        match peer.read(&mut octets) {
            Ok(0) => return (all, true),
            Ok(n) => all.extend_from_slice(&octets[..n]),
            Err(e) if e.kind() == ErrorKind::WouldBlock => return (all, false),
            Err(_) => return (all, true),
        }
    }
}

fn line(peer: &mut UnixStream) -> String {
    let mut text = Vec::new();
    let mut octet = [0];
    while !text.ends_with(b"\n") && peer.read(&mut octet).unwrap_or(0) == 1 {
        text.push(octet[0]);
    }
    String::from_utf8(text).unwrap()
}

#[test]
fn a_guest_connects_talks_and_closes_in_order() {
    let mut guest = Guest::new(16);
    let key = (5000, 33);
    let mut peer = guest.connected(key);
    guest.send(Op::Data, key, b"hello");
    assert_eq!(drain(&mut peer), (b"hello".to_vec(), false));
    peer.write_all(b"world").unwrap();
    guest.run();
    let (header, data) = guest.packet().unwrap();
    assert_eq!((header.op, header.fwd_cnt, data.as_slice()), (Some(Op::Data), 5, &b"world"[..]));
    // The guest is done sending; the link's side goes on.
    guest.shutdown(key, SHUTDOWN_SEND);
    assert_eq!(drain(&mut peer), (Vec::new(), true));
    peer.write_all(b"more").unwrap();
    guest.run();
    assert_eq!(guest.packet().unwrap().1, b"more");
    // The link's side is done too: both are.
    peer.shutdown(Shutdown::Write).unwrap();
    guest.run();
    let (header, _) = guest.packet().unwrap();
    assert_eq!((header.op, header.flags), (Some(Op::Shutdown), SHUTDOWN_BOTH));
    assert_eq!(guest.connections(), 1);
    guest.send(Op::Reset, key, &[]);
    assert_eq!((guest.connections(), guest.packet()), (0, None));
}

#[test]
fn the_links_half_close_reaches_the_guest() {
    let mut guest = Guest::new(16);
    let key = (5000, 33);
    let mut peer = guest.connected(key);
    peer.write_all(b"last").unwrap();
    peer.shutdown(Shutdown::Write).unwrap();
    guest.run();
    assert_eq!(guest.packet().unwrap().1, b"last");
    let (header, _) = guest.packet().unwrap();
    assert_eq!((header.op, header.flags), (Some(Op::Shutdown), SHUTDOWN_SEND));
    guest.send(Op::Data, key, b"answer");
    assert_eq!(drain(&mut peer), (b"answer".to_vec(), false));
    // Linux's close: both flags. The device confirms.
    guest.shutdown(key, SHUTDOWN_BOTH);
    assert_eq!(guest.ops(), [Op::Reset]);
    assert_eq!(drain(&mut peer), (Vec::new(), true));
    assert_eq!(guest.connections(), 0);
}

#[test]
fn a_link_that_closes_ends_both_directions_after_its_data() {
    let mut guest = Guest::new(16);
    let key = (5000, 33);
    let mut peer = guest.connected(key);
    peer.write_all(b"bye").unwrap();
    drop(peer);
    guest.run();
    assert_eq!(guest.packet().unwrap().1, b"bye");
    let (header, _) = guest.packet().unwrap();
    assert_eq!((header.op, header.flags), (Some(Op::Shutdown), SHUTDOWN_BOTH));
    // What crosses it on the way is dropped in silence.
    guest.send(Op::Data, key, b"late");
    assert_eq!(guest.ops(), []);
    // A guest that never confirms is given up.
    guest.expire_in(30);
    assert_eq!(guest.ops(), [Op::Reset]);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn a_guests_reset_closes_the_link() {
    let mut guest = Guest::new(16);
    let key = (5000, 33);
    let mut peer = guest.connected(key);
    guest.send(Op::Reset, key, &[]);
    assert_eq!(drain(&mut peer), (Vec::new(), true));
    assert_eq!((guest.connections(), guest.packet()), (0, None));
}

#[test]
fn a_guest_that_reads_no_more_stops_the_link() {
    let mut guest = Guest::new(16);
    let key = (5000, 33);
    let mut peer = guest.connected(key);
    guest.shutdown(key, SHUTDOWN_RECEIVE);
    assert_eq!(peer.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    guest.send(Op::Data, key, b"still");
    assert_eq!(drain(&mut peer), (b"still".to_vec(), false));
}

#[test]
fn the_host_connects_to_the_guest() {
    let mut guest = Guest::new(16);
    let mut peer = guest.connect(22, b"early bird");
    let (request, _) = guest.packet().unwrap();
    assert_eq!((request.op, request.dst_port), (Some(Op::Request), 22));
    assert!(request.src_port >= 1 << 30);
    let key = (request.src_port, 22);
    assert_eq!(line(&mut peer), "");
    guest.send(Op::Response, key, &[]);
    assert_eq!(line(&mut peer), "c1 ok\n");
    assert_eq!(guest.packet().unwrap().1, b"early bird");
    guest.send(Op::Data, key, b"pong");
    assert_eq!(drain(&mut peer).0, b"pong");
    // A second one has a port of its own.
    guest.connect(22, &[]);
    assert_ne!(guest.packet().unwrap().0.src_port, request.src_port);
}

#[test]
fn refusals_reach_the_links_client() {
    let mut guest = Guest::new(16);
    let mut refused = guest.connect(22, &[]);
    let key = (guest.packet().unwrap().0.src_port, 22);
    guest.send(Op::Reset, key, &[]);
    assert!(line(&mut refused).starts_with("c1 err LINK_LOST "));
    assert_eq!(drain(&mut refused), (Vec::new(), true));
    let mut silent = guest.connect(23, &[]);
    guest.expire_in(11);
    assert!(line(&mut silent).starts_with("c1 err GUEST_TIMEOUT "));
    assert_eq!(guest.ops(), [Op::Request, Op::Reset]);
    // A client that goes away meanwhile.
    drop(guest.connect(24, &[]));
    guest.run();
    assert_eq!(guest.ops(), [Op::Request, Op::Reset]);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn a_request_waits_for_a_driver() {
    let memory = GuestMemory::new(8 << 20).unwrap();
    let transport = MmioTransport::new(memory.clone(), Vsock::new(CID).unwrap()).unwrap();
    let mut guest = Guest { memory, transport, queues: Vec::new(), given: 0, buf_alloc: GUEST_BUFFER, fwd_cnt: 0 };
    let mut peer = guest.connect(22, &[]);
    // Linux resets a device before it sets it up.
    guest.queues = driver::start(&guest.transport, driver::EVENT_IDX, 3, 256, 0);
    guest.give(4);
    guest.run();
    let key = (guest.packet().unwrap().0.src_port, 22);
    guest.send(Op::Response, key, &[]);
    assert_eq!(line(&mut peer), "c1 ok\n");
    // A reset in flight ends what the old driver knew of.
    driver::write(&guest.transport, 0x70, 0);
    assert_eq!(drain(&mut peer), (Vec::new(), true));
    assert_eq!(guest.connections(), 0);
}

#[test]
fn ports_that_nobody_waits_for_are_reset() {
    let mut guest = Guest::new(16);
    guest.send(Op::Request, (5000, 1), &[]);
    let (reset, _) = guest.packet().unwrap();
    assert_eq!((reset.op, reset.src_port, reset.dst_port), (Some(Op::Reset), 5000, 1));
    for op in [Op::Response, Op::Data, Op::Shutdown, Op::CreditUpdate, Op::CreditRequest] {
        guest.send(op, (5000, 1), &[]);
        assert_eq!(guest.ops(), [Op::Reset], "{op:?}");
    }
    // A reset is never answered.
    guest.send(Op::Reset, (5000, 1), &[]);
    assert_eq!(guest.ops(), []);
    // A waiter that left is nobody.
    drop(guest.accept(5000));
    guest.run();
    guest.send(Op::Request, (5000, 2), &[]);
    assert_eq!(guest.ops(), [Op::Reset]);
}

#[test]
fn requests_to_the_agents_port_wait_for_a_while() {
    let mut guest = Guest::new(16);
    for port in 0..MAX_HELD as u32 {
        guest.send(Op::Request, (HELD_PORT, port), &[]);
    }
    assert_eq!(guest.ops(), []);
    guest.send(Op::Request, (HELD_PORT, 99), &[]);
    assert_eq!(guest.ops(), [Op::Reset]);
    let mut peer = guest.accept(HELD_PORT);
    assert_eq!(line(&mut peer), "a1 ok\n");
    let (response, _) = guest.packet().unwrap();
    assert_eq!((response.op, response.dst_port), (Some(Op::Response), 0));
    // One changes its mind, the others run out of time.
    guest.send(Op::Reset, (HELD_PORT, 1), &[]);
    guest.expire_in(6);
    assert_eq!(guest.ops(), [Op::Reset; MAX_HELD - 2]);
    assert_eq!(guest.connections(), 1);
}

#[test]
fn credit_bounds_what_is_kept_for_a_slow_link() {
    let mut guest = Guest::new(64);
    let key = (5000, 1);
    let mut peer = guest.connected(key);
    let mut random = Seed(1);
    let mut sent = Vec::new();
    let window = 256 << 10;
    // Nobody reads: the socket takes some, the window the rest.
    loop {
        let chunk = random.octets(32 << 10);
        let in_socket = guest.transport.with_device(|vsock| vsock.counters.tx_bytes.load(Ordering::Relaxed)) as usize;
        guest.send(Op::Data, key, &chunk);
        let now = guest.transport.with_device(|vsock| vsock.counters.tx_bytes.load(Ordering::Relaxed)) as usize;
        if now == in_socket {
            break;
        }
        sent.extend_from_slice(&chunk);
        assert!(sent.len() < window + (1 << 20));
    }
    assert!(sent.len() >= window);
    // It sent more than its credit: reset, and the link ends. What was forwarded before is right.
    assert_eq!(guest.ops().last(), Some(&Op::Reset));
    let (received, ended) = drain(&mut peer);
    assert!(ended && sent.starts_with(&received));
}

#[test]
fn kept_octets_follow_in_order_and_give_credit_back() {
    let mut guest = Guest::new(64);
    let key = (5000, 1);
    let mut peer = guest.connected(key);
    let mut random = Seed(2);
    let (mut sent, mut received) = (Vec::new(), Vec::new());
    let (mut told, mut window) = (0u32, 256u32 << 10);
    for _ in 0..400 {
        // As a guest does: never more than the credit.
        let free = window - (sent.len() as u32).wrapping_sub(told);
        let len = random.below(60_000).min(u64::from(free)) as usize;
        if len > 0 {
            let chunk = random.octets(len);
            guest.send(Op::Data, key, &chunk);
            sent.extend_from_slice(&chunk);
        } else {
            received.extend(drain(&mut peer).0);
        }
        guest.run();
        while let Some((header, _)) = guest.packet() {
            assert_eq!(header.op, Some(Op::CreditUpdate));
            (told, window) = (header.fwd_cnt, header.buf_alloc);
            guest.give(1);
        }
    }
    guest.shutdown(key, SHUTDOWN_BOTH);
    while sent.len() > received.len() {
        received.extend(drain(&mut peer).0);
        guest.run();
    }
    assert!(sent == received && sent.len() > 1 << 20);
    assert_eq!(guest.ops().last(), Some(&Op::Reset));
    assert_eq!(drain(&mut peer), (Vec::new(), true));
}

#[test]
fn a_reset_after_a_shutdown_does_not_cost_what_was_sent() {
    let mut guest = Guest::new(64);
    let key = (5000, 1);
    let mut peer = guest.connected(key);
    let mut sent = Vec::new();
    for _ in 0..7 {
        let chunk = Seed(3).octets(60_000);
        guest.send(Op::Data, key, &chunk);
        sent.extend_from_slice(&chunk);
    }
    guest.shutdown(key, SHUTDOWN_BOTH);
    guest.send(Op::Reset, key, &[]);
    let mut received = Vec::new();
    for _ in 0..10 {
        received.extend(drain(&mut peer).0);
        guest.run();
    }
    assert!(received == sent);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn the_guests_credit_is_never_exceeded() {
    let mut guest = Guest::new(200);
    guest.buf_alloc = 10_000;
    let key = (5000, 1);
    let mut peer = guest.connected(key);
    let content = Seed(4).octets(100_000);
    peer.write_all(&content).unwrap();
    let mut received = Vec::new();
    let mut asked = 0;
    guest.run();
    while received.len() < content.len() {
        while let Some((header, data)) = guest.packet() {
            guest.give(1);
            asked += usize::from(header.op == Some(Op::CreditRequest));
            received.extend(data);
        }
        assert!(received.len() - guest.fwd_cnt as usize <= 10_000);
        guest.fwd_cnt = received.len() as u32;
        guest.send(Op::CreditUpdate, key, &[]);
    }
    assert!(received == content);
    assert!((1..=11).contains(&asked), "asked {asked} times");
}

#[test]
fn a_request_for_credit_is_answered() {
    let mut guest = Guest::new(8);
    let key = (5000, 1);
    let _peer = guest.connected(key);
    guest.send(Op::CreditRequest, key, &[]);
    let (header, _) = guest.packet().unwrap();
    assert_eq!((header.op, header.buf_alloc, header.fwd_cnt), (Some(Op::CreditUpdate), 256 << 10, 0));
}

#[test]
fn one_read_of_a_link_fills_many_buffers() {
    let mut guest = Guest::new(64);
    let key = (5000, 1);
    let mut peer = guest.connected(key);
    let content = Seed(5).octets(100_000);
    peer.write_all(&content).unwrap();
    guest.run();
    let packets: Vec<_> = std::iter::from_fn(|| guest.packet()).collect();
    assert_eq!(packets.len(), 100_000usize.div_ceil(4096));
    assert!(packets.iter().flat_map(|(_, data)| data).eq(&content));
}

#[test]
fn data_waits_for_buffers_without_work() {
    let mut guest = Guest::new(1);
    let key = (5000, 1);
    let mut peer = guest.connected(key);
    peer.write_all(&[1; 10_000]).unwrap();
    guest.run();
    assert_eq!(guest.packet(), None);
    let mut received = 0;
    while received < 10_000 {
        guest.give(1);
        guest.run();
        received += guest.packet().unwrap().1.len();
    }
    guest.give(4);
    guest.run();
    assert_eq!(guest.packet(), None);
}

#[test]
fn connections_take_turns() {
    let mut guest = Guest::new(8);
    let keys = [(5000, 1), (5000, 2), (5000, 3)];
    let mut peers = keys.map(|key| guest.connected(key));
    for peer in &mut peers {
        peer.write_all(&[1; 150_000]).unwrap();
    }
    let mut counts = [0usize; 3];
    for _ in 0..40 {
        guest.give(4);
        guest.run();
        while let Some((header, data)) = guest.packet() {
            counts[header.dst_port as usize - 1] += data.len();
        }
    }
    assert!(counts.iter().all(|&count| count > 90_000), "{counts:?}");
}

#[test]
fn packets_that_break_the_rules_reset_their_connection_or_are_dropped() {
    let key = (5000, 1);
    for (change, data, expected) in [
        // Not from this guest, not to the host: nobody's.
        (Header { src_cid: 8, ..Guest::new(0).header(Op::Data, key, 1) }, 1, &[][..]),
        (Header { dst_cid: 3, ..Guest::new(0).header(Op::Data, key, 1) }, 1, &[]),
        (Header { dst_cid: u64::MAX, ..Guest::new(0).header(Op::Data, key, 1) }, 1, &[]),
        // Datagrams do not exist here.
        (Header { kind: 3, ..Guest::new(0).header(Op::Request, key, 0) }, 0, &[Op::Reset]),
        // A length beyond the packet.
        (Header { len: u32::MAX, ..Guest::new(0).header(Op::Data, key, 1) }, 1, &[Op::Reset]),
        (Header { len: 2, ..Guest::new(0).header(Op::Data, key, 1) }, 1, &[Op::Reset]),
        (Header { op: None, ..Guest::new(0).header(Op::Data, key, 0) }, 0, &[Op::Reset]),
        (Guest::new(0).header(Op::Request, key, 0), 0, &[Op::Reset]),
        (Guest::new(0).header(Op::Response, key, 0), 0, &[Op::Reset]),
    ] {
        let mut guest = Guest::new(8);
        let _peer = guest.connected(key);
        guest.send_raw(&change, &vec![0; data]);
        assert_eq!(guest.ops(), expected, "{change:?}");
    }
    // After its own shutdown a guest must not send.
    let mut guest = Guest::new(8);
    let _peer = guest.connected(key);
    guest.shutdown(key, SHUTDOWN_SEND);
    guest.send(Op::Data, key, b"x");
    assert_eq!(guest.ops(), [Op::Reset]);
}

#[test]
fn a_flood_without_buffers_stalls_the_flood_only() {
    let mut guest = Guest::new(0);
    let header = guest.header(Op::Request, (5000, 1), 0).encode();
    guest.memory.write(PACKETS, &header).unwrap();
    let mut taken = 0;
    for _ in 0..20 {
        for _ in 0..100 {
            guest.queues[TX].add(&guest.memory, &[(PACKETS, HEADER as u32, false)]);
        }
        guest.transport.kick(TX);
        guest.run();
        let now = std::iter::from_fn(|| guest.queues[TX].used(&guest.memory)).count();
        taken += now;
        if now < 100 {
            break;
        }
    }
    assert_eq!(taken, muxer::MAX_RESETS);
    // With buffers it goes on.
    guest.give(200);
    guest.run();
    assert!(guest.ops().len() >= 100);
    assert!(std::iter::from_fn(|| guest.queues[TX].used(&guest.memory)).count() > 0);
}

#[test]
fn the_number_of_connections_is_bounded() {
    let mut guest = Guest::new(0);
    let mut peers = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        peers.push(guest.connect(1, &[]));
    }
    assert!(line(&mut guest.connect(1, &[])).starts_with("c1 err NO_CAPACITY "));
    let _waiter = guest.accept(5000);
    guest.give(256);
    guest.run();
    assert_eq!(guest.ops(), [Op::Request; 256]);
    guest.send(Op::Request, (5000, 1), &[]);
    guest.give(256);
    guest.run();
    assert_eq!(guest.ops()[0], Op::Reset);
    drop(peers);
    guest.run();
    guest.expire_in(60);
    assert_eq!(guest.connections(), 0);
    let mut waiters: Vec<_> = (0..MAX_WAITERS - 1).map(|_| guest.accept(6000)).collect();
    waiters.push(guest.accept(6000));
    assert!(line(waiters.last_mut().unwrap()).starts_with("a1 err NO_CAPACITY "));
}

#[test]
fn buffers_too_small_for_a_packet_stop_the_device() {
    let mut guest = Guest::new(0);
    guest.queues[RX].add(&guest.memory, &[(BUFFERS, HEADER as u32, true)]);
    let _peer = guest.connect(1, &[]);
    assert_eq!(driver::read(&guest.transport, 0x70), 0x4f);
}

#[test]
fn a_stream_both_ways_at_once_arrives_unchanged() {
    let mut guest = Guest::new(128);
    let key = (5000, 1);
    let mut peer = guest.connected(key);
    let mut random = Seed(6);
    let (down, up) = (random.octets(3 << 20), random.octets(3 << 20));
    let (mut down_written, mut down_read) = (0, Vec::new());
    let (mut up_sent, mut up_read) = (0usize, Vec::new());
    let (mut told, mut window) = (0u32, 256u32 << 10);
    while down_read.len() < down.len() || up_read.len() < up.len() {
        if let Ok(n) = peer.write(&down[down_written..]) {
            down_written += n;
        }
        let free = (window - (up_sent as u32).wrapping_sub(told)) as usize;
        let len = free.min(up.len() - up_sent).min(65_536);
        if len > 0 {
            let chunk = up[up_sent..up_sent + len].to_vec();
            guest.send(Op::Data, key, &chunk);
            up_sent += len;
        }
        if random.below(3) == 0 {
            up_read.extend(drain(&mut peer).0);
        }
        guest.run();
        while let Some((header, data)) = guest.packet() {
            (told, window) = (header.fwd_cnt, header.buf_alloc);
            down_read.extend(data);
            guest.give(1);
        }
        guest.fwd_cnt = down_read.len() as u32;
        guest.send(Op::CreditUpdate, key, &[]);
    }
    assert!(down_read == down && up_read == up);
    let counters = guest.transport.with_device(|vsock| vsock.counters());
    assert_eq!(counters.rx_bytes.load(Ordering::Relaxed), 3 << 20);
    assert_eq!(counters.tx_bytes.load(Ordering::Relaxed), 3 << 20);
}
