mod real;

use std::fs::File;
use std::io::{ErrorKind, Read, Write};

use super::*;
use crate::vmm::devices::driver::{self, DriverQueue, Seed};
use crate::vmm::devices::mmio::MmioTransport;
use crate::vmm::devices::rate::Rate;
use crate::vmm::memory::GuestMemory;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const OWN: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const BUFFERS: u64 = 0x10_0000;
const FRAMES: u64 = 0x80_0000;
/// Between two receive buffers.
const STEP: u64 = 0x4000;

const COMMON: u64 = driver::EVENT_IDX | driver::INDIRECT;
const MERGE: u64 = COMMON | features::MRG_RXBUF | features::OFFLOADS;

/// A guest, and the host's end of its network.
struct Guest {
    memory: GuestMemory,
    transport: MmioTransport<Net>,
    queues: Vec<DriverQueue>,
    counters: Arc<NetCounters>,
    host: File,
    given: u64,
}

fn config() -> NetConfig {
    let (rx, tx) = (Limits::default(), Limits::default());
    NetConfig { mac: MAC, mtu: 1500, ipv4: Some(OWN), offloads: true, rx, tx }
}

impl Guest {
    fn new(features: u64, config: NetConfig) -> Self {
        let memory = GuestMemory::new(16 << 20).unwrap();
        let (tap, host) = Tap::stand_in().unwrap();
        let net = Net::new(tap, config).unwrap();
        let counters = net.counters();
        let transport = MmioTransport::new(memory.clone(), net).unwrap();
        let queues = driver::start(&transport, features, 2, 256, 0);
        let guest = Self { memory, transport, queues, counters, host, given: 0 };
        guest.run();
        guest
    }

    /// Gives receive buffers of `len` octets.
    fn give(&mut self, count: usize, len: u32) {
        for _ in 0..count {
            let at = BUFFERS + self.given % 256 * STEP;
            self.given += 1;
            self.queues[RX].add(&self.memory, &[(at, len, true)]);
        }
    }

    /// What the device thread does until nothing is left to do: the TAP device is readable, queues were notified.
    fn run(&self) {
        if self.transport.with_queues(|net, context| net.receive(context)) == Some(Progress::More) {
            self.transport.kick(RX);
        }
        self.transport.kick(RX);
        self.transport.kick(TX);
        driver::run(&self.transport);
    }

    /// A frame of the host comes; its header is zero but for `gso_type`, which must reach the guest.
    fn host_sends(&mut self, frame: &[u8]) {
        let mut header = [0; HEADER];
        header[1] = 0x11;
        header[10] = 0xff;
        self.host.write_all(&[&header, frame].concat()).unwrap();
        self.run();
    }

    /// The next frame that the guest received, and the buffers it was in.
    fn received(&mut self) -> Option<(Vec<u8>, usize)> {
        let mut octets = Vec::new();
        let (mut expected, mut buffers) = (1, 0);
        while buffers < expected {
            let Some((head, len)) = self.queues[RX].used(&self.memory) else {
                assert_eq!(buffers, 0, "a part of a frame");
                return None;
            };
            let at = self.memory.read_u64(16 * u64::from(head)).unwrap();
            let mut part = vec![0; len as usize];
            self.memory.read(at, &mut part).unwrap();
            if buffers == 0 {
                assert_eq!(part[1], 0x11);
                expected = usize::from(u16::from_le_bytes([part[10], part[11]]));
                part.drain(..HEADER);
            }
            octets.extend(part);
            buffers += 1;
        }
        Some((octets, buffers))
    }

    /// The guest sends octets as they are, header included, cut into buffers at `cuts`.
    fn send_raw(&mut self, octets: &[u8], cuts: &[usize]) {
        self.memory.write(FRAMES, octets).unwrap();
        let mut bounds = [&[0], cuts, &[octets.len()]].concat();
        bounds.sort_unstable();
        let buffers: Vec<_> =
            bounds.windows(2).map(|at| (FRAMES + at[0] as u64, (at[1] - at[0]) as u32, false)).collect();
        self.queues[TX].add(&self.memory, &buffers);
        self.transport.kick(TX);
        driver::run(&self.transport);
    }

    fn send(&mut self, frame: &[u8]) {
        self.send_raw(&[&[0; HEADER], frame].concat(), &[HEADER]);
    }

    /// The next frame that the host got, without its header.
    fn sent(&mut self) -> Option<Vec<u8>> {
        let mut octets = vec![0; MOST];
        match self.host.read(&mut octets) {
            Ok(len) => Some(octets[HEADER..len].to_vec()),
            Err(e) => {
                assert_eq!(e.kind(), ErrorKind::WouldBlock);
                None
            }
        }
    }

    fn count(&self, counter: fn(&NetCounters) -> &AtomicU64) -> u64 {
        counter(&self.counters).load(Ordering::Relaxed)
    }

    fn dropped(&self, refusal: Refusal) -> u64 {
        self.counters.tx_dropped[refusal as usize].load(Ordering::Relaxed)
    }
}

/// A datagram from the guest's own address in its frame; `len` octets behind the Ethernet header.
fn datagram(len: usize) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(MAC);
    frame.extend([8, 0, 0x45]);
    frame.extend((1..len).map(|n| n as u8));
    frame[ETHERNET + 12..ETHERNET + 16].copy_from_slice(&OWN.octets());
    frame
}

#[test]
fn frames_go_to_the_host_however_they_are_cut() {
    let mut guest = Guest::new(COMMON, config());
    let frame = datagram(1500);
    for cuts in [&[][..], &[HEADER], &[3, 12, 13, 26, 40], &[1511], &[200, 200, 700]] {
        guest.send_raw(&[&[0; HEADER], &frame[..]].concat(), cuts);
        assert_eq!(guest.sent().as_deref(), Some(&frame[..]), "{cuts:?}");
        assert_eq!(guest.queues[TX].used(&guest.memory).unwrap().1, 0);
    }
    assert_eq!(guest.count(|c| &c.tx.packets), 5);
    assert_eq!(guest.count(|c| &c.tx.bytes), 5 * 1514);
}

#[test]
fn forged_and_broken_frames_are_dropped_counted_and_given_back() {
    let mut guest = Guest::new(COMMON, config());
    let good = datagram(100);
    let change = |at: usize, to: &[u8]| {
        let mut frame = good.clone();
        frame[at..at + to.len()].copy_from_slice(to);
        frame
    };
    for (frame, refusal) in [
        (change(6, &[2, 0, 0, 0, 0, 9]), Refusal::Mac),
        (change(26, &[10, 0, 0, 3]), Refusal::Address),
        (change(12, &[0x81, 0]), Refusal::Vlan),
        (change(12, &[0x86, 0xdd]), Refusal::Protocol),
        (vec![0; 5], Refusal::Length),
        (datagram(1501), Refusal::Length),
    ] {
        let before = guest.dropped(refusal);
        guest.send(&frame);
        assert_eq!(guest.sent(), None, "{refusal:?}");
        assert_eq!(guest.dropped(refusal), before + 1, "{refusal:?}");
        assert!(guest.queues[TX].used(&guest.memory).is_some());
    }
    let mut header = [0; HEADER];
    header[0] = 1;
    guest.send_raw(&[&header, &good[..]].concat(), &[]);
    assert_eq!((guest.sent(), guest.dropped(Refusal::Header)), (None, 1), "checksums were not negotiated");
    // Not even a header.
    guest.send_raw(&[1, 2, 3], &[]);
    assert_eq!((guest.sent(), guest.dropped(Refusal::Length)), (None, 3));
    assert_eq!(guest.count(|c| &c.tx.packets), 0);
}

#[test]
fn a_host_that_takes_no_frame_costs_the_frame() {
    let mut guest = Guest::new(COMMON, config());
    guest.host = File::open("/dev/null").unwrap();
    guest.send(&datagram(100));
    assert_eq!(guest.dropped(Refusal::Host), 1);
    assert!(guest.queues[TX].used(&guest.memory).is_some());
}

#[test]
fn a_long_frame_lies_in_as_many_buffers_as_it_needs() {
    let mut guest = Guest::new(MERGE, config());
    guest.give(64, 1536);
    let long: Vec<u8> = Seed(1).octets(60_000);
    guest.host_sends(&long);
    assert_eq!(guest.received(), Some((long.clone(), 60_012_usize.div_ceil(1536))));
    // The next one goes straight into the buffers, and short ones do not waste them.
    guest.give(40, 1536);
    guest.host_sends(&long);
    assert_eq!(guest.received().unwrap().0, long);
    guest.give(2, 1536);
    guest.host_sends(&[7; 60]);
    guest.host_sends(&[8; 60]);
    assert_eq!(guest.received(), Some((vec![7; 60], 1)));
    assert_eq!(guest.received(), Some((vec![8; 60], 1)));
    assert_eq!(guest.count(|c| &c.rx.packets), 4);
    assert_eq!(guest.count(|c| &c.rx.bytes), 120_120);
    assert_eq!(guest.count(|c| &c.rx_dropped), 0);
}

#[test]
fn a_frame_waits_for_the_buffers_it_needs() {
    let mut guest = Guest::new(MERGE, config());
    guest.host_sends(&[1; 60]);
    assert_eq!(guest.received(), None);
    let long: Vec<u8> = Seed(2).octets(9000);
    guest.host_sends(&long);
    // The first has a buffer, the long one half of what it needs.
    guest.give(4, 1536);
    guest.run();
    assert_eq!(guest.received(), Some((vec![1; 60], 1)));
    assert_eq!(guest.received(), None);
    // The device is to be told of the next buffer, whichever it has seen.
    assert_eq!(guest.queues[RX].avail_event(&guest.memory), 4);
    for _ in 0..2 {
        guest.give(1, 1536);
        guest.run();
        assert_eq!(guest.received(), None);
    }
    guest.give(1, 1536);
    guest.run();
    assert_eq!(guest.received(), Some((long, 6)));
}

#[test]
fn a_frame_that_no_ring_of_buffers_holds_is_dropped() {
    let memory = GuestMemory::new(16 << 20).unwrap();
    let (tap, mut host) = Tap::stand_in().unwrap();
    let net = Net::new(tap, config()).unwrap();
    let counters = net.counters();
    let transport = MmioTransport::new(memory.clone(), net).unwrap();
    let mut queues = driver::start(&transport, MERGE, 2, 4, 0);
    for n in 0..4 {
        queues[RX].add(&memory, &[(BUFFERS + n * STEP, 100, true)]);
    }
    for len in [2000, 300] {
        host.write_all(&vec![0; len]).unwrap();
    }
    transport.kick(RX);
    driver::run(&transport);
    assert_eq!(counters.rx_dropped.load(Ordering::Relaxed), 1);
    assert_eq!((0..4).map_while(|_| queues[RX].used(&memory)).map(|(_, len)| len).sum::<u32>(), 300);
}

#[test]
fn without_merging_each_frame_has_its_own_buffer() {
    let mut guest = Guest::new(COMMON, config());
    guest.give(3, 2048);
    guest.host_sends(&[1; 1514]);
    assert_eq!(guest.received(), Some((vec![1; 1514], 1)));
    guest.host_sends(&[2; 3000]);
    assert_eq!((guest.received(), guest.count(|c| &c.rx_dropped)), (None, 1));
    guest.host_sends(&[3; 14]);
    assert_eq!(guest.received(), Some((vec![3; 14], 1)));
}

#[test]
fn buffers_without_room_for_a_frame_stop_the_device() {
    let mut guest = Guest::new(MERGE, config());
    guest.give(1, HEADER as u32);
    guest.host_sends(&[0; 60]);
    assert_eq!(driver::read(&guest.transport, 0x70) & 64, 64);
}

#[test]
fn frames_come_in_order_with_one_interrupt_for_many() {
    let mut guest = Guest::new(MERGE, config());
    guest.give(200, 1536);
    guest.run();
    driver::interrupted(&guest.transport);
    guest.queues[RX].want_interrupt(&guest.memory);
    for n in 0..100u8 {
        guest.host.write_all(&[&[0x11; HEADER][..], &[n; 60]].concat()).unwrap();
    }
    guest.run();
    assert_eq!(driver::interrupted(&guest.transport), 1);
    for n in 0..100 {
        assert_eq!(guest.received(), Some((vec![n; 60], 1)));
    }
}

#[test]
fn a_driver_sees_the_addresses_and_only_what_is_offered() {
    let read = |guest: &Guest, at| driver::read(&guest.transport, at);
    let guest = Guest::new(COMMON, NetConfig { mtu: 9000, ..config() });
    assert_eq!([read(&guest, 0x100), read(&guest, 0x104)], [2, 0x1_0100]);
    assert_eq!(read(&guest, 0x108), 9000 << 16);
    driver::write(&guest.transport, 0x14, 0);
    assert_eq!(u64::from(read(&guest, 0x10)) & features::OFFLOADS, features::OFFLOADS);
    let plain = Guest::new(COMMON, NetConfig { offloads: false, ..config() });
    driver::write(&plain.transport, 0x14, 0);
    assert_eq!(u64::from(read(&plain, 0x10)) & features::OFFLOADS, 0);
}

/// Whether `passed` is what such limits let pass since `began`: however long that is, they let more pass.
fn within(burst: u64, passed: u64, began: Instant) -> bool {
    (burst..=burst + began.elapsed().as_secs() + 1).contains(&passed)
}

/// Limits of so many packets at once, and one a second after that.
fn few(burst: u64) -> Limits {
    Limits { bytes: None, operations: Some(Rate { per_second: 1, burst }) }
}

#[test]
fn each_direction_has_its_own_limits_and_waits_without_work() {
    let began = Instant::now();
    let mut guest = Guest::new(MERGE, NetConfig { rx: few(3), tx: few(5), ..config() });
    guest.give(20, 1536);
    for _ in 0..10 {
        guest.host_sends(&[0; 60]);
        guest.send(&datagram(60));
    }
    assert!(within(3, guest.count(|c| &c.rx.packets), began) && within(5, guest.count(|c| &c.tx.packets), began));
    assert!(guest.count(|c| &c.rx.waits) > 0 && guest.count(|c| &c.tx.waits) > 0);
    // `driver::run` came to rest, so nothing spins; and a timer will wake the device.
    let mut poll =
        libc::pollfd { fd: guest.transport.with_device(|net| net.timer_fd()), events: libc::POLLIN, revents: 0 };
    // SAFETY: one entry, which outlives the call.
    assert_eq!(unsafe { libc::poll(&raw mut poll, 1, 10_000) }, 1);
    guest.transport.with_device(Net::timer_event);
    guest.run();
    assert!(guest.count(|c| &c.rx.packets) > 3 || guest.count(|c| &c.tx.packets) > 5);
    assert!(within(3, guest.count(|c| &c.rx.packets), began) && within(5, guest.count(|c| &c.tx.packets), began));
}

#[test]
fn dropped_frames_and_resets_do_not_get_around_a_limit() {
    let began = Instant::now();
    let mut guest = Guest::new(COMMON, NetConfig { tx: few(4), ..config() });
    for _ in 0..100 {
        guest.send(&[0; 60]);
    }
    let dropped = guest.dropped(Refusal::Mac);
    assert!(within(4, dropped, began), "{dropped}");
    guest.queues = driver::start(&guest.transport, COMMON, 2, 256, 0);
    (0..100).for_each(|_| guest.send(&datagram(60)));
    assert!(within(4, dropped + guest.count(|c| &c.tx.packets), began));
}

#[test]
fn frames_that_are_to_be_cut_count_as_what_they_become() {
    let mut guest = Guest::new(MERGE, NetConfig { tx: few(10), ..config() });
    let mut header = [0; HEADER];
    (header[0], header[1], header[2]) = (1, 1, 54);
    header[4..6].copy_from_slice(&1000u16.to_le_bytes());
    (header[6], header[8]) = (34, 16);
    let mut frame = datagram(40 + 20_000);
    frame[ETHERNET + 9] = 6;
    for _ in 0..3 {
        guest.send_raw(&[&header, &frame[..]].concat(), &[]);
    }
    assert_eq!(guest.sent(), Some(frame));
    assert_eq!(guest.count(|c| &c.tx.packets), 1);
}

/// Random traffic both ways with buffers of all sizes: every frame arrives whole, once and in order, or is counted.
#[test]
fn everything_arrives_in_order_or_is_counted() {
    for seed in 0..60 {
        let mut random = Seed(seed);
        let merge = random.below(3) > 0;
        let mut guest = Guest::new(if merge { MERGE } else { COMMON }, config());
        let (mut to_guest, mut to_host, mut free) = (Vec::new(), Vec::new(), 250);
        let (mut sent, mut received) = (0u64, 0u64);
        for step in 0..200u32 {
            match random.below(3) {
                0 => {
                    let count = random.below(20).min(free);
                    free -= count;
                    guest.give(count as usize, if merge { 20 + random.below(3000) as u32 } else { 2048 });
                }
                1 if to_guest.len() < 20 => {
                    let len = ETHERNET + random.below(if merge && step % 4 == 0 { 20_000 } else { 1500 }) as usize;
                    let mut frame = random.octets(len);
                    frame[..4].copy_from_slice(&step.to_le_bytes());
                    guest.host_sends(&frame);
                    to_guest.push(frame);
                    sent += 1;
                }
                _ => {
                    let mut frame = datagram(20 + random.below(1480) as usize);
                    frame[..4].copy_from_slice(&step.to_le_bytes());
                    let cuts: Vec<usize> = (0..random.below(4)).map(|_| random.below(20) as usize).collect();
                    guest.send_raw(&[&[0; HEADER], &frame[..]].concat(), &cuts);
                    to_host.push(frame);
                }
            }
            guest.run();
            while let Some((frame, buffers)) = guest.received() {
                free += buffers as u64;
                received += 1;
                let at = to_guest.iter().position(|other| *other == frame).expect("unknown or changed");
                to_guest.drain(..=at);
            }
            while guest.queues[TX].used(&guest.memory).is_some() {}
        }
        for frame in to_host {
            assert_eq!(guest.sent(), Some(frame), "seed {seed}");
        }
        assert_eq!(guest.sent(), None);
        assert_eq!(guest.count(|c| &c.rx.packets), received, "seed {seed}");
        let lost = sent - received - to_guest.len() as u64;
        assert_eq!(guest.count(|c| &c.rx_dropped), lost, "seed {seed}");
    }
}
