//! The device over a real TAP device, in a network namespace of the test's own. Needs root and /dev/net/tun.

use std::fs::File;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::*;
use crate::vmm::devices::driver::{self, DriverQueue};
use crate::vmm::devices::mmio::MmioTransport;
use crate::vmm::memory::GuestMemory;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const OWN: [u8; 4] = [10, 9, 1, 1];
const NODE: [u8; 4] = [10, 9, 1, 0];
const BUFFERS: u64 = 0x10_0000;
const FRAMES: u64 = 0x80_0000;

fn check(result: libc::c_int) {
    assert!(result >= 0, "{}", std::io::Error::last_os_error());
}

fn request() -> libc::ifreq {
    // SAFETY: ifreq is plain data for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"guest") {
        *to = *from as libc::c_char;
    }
    request
}

/// A TAP device that is up and has the node's address.
fn tap(flags: libc::c_int) -> File {
    let file = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    let mut request = request();
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) });
    file
}

fn up() {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    let mut address = request();
    for (call, octets) in [(libc::SIOCSIFADDR, NODE), (libc::SIOCSIFNETMASK, [255, 255, 255, 254])] {
        // SAFETY: sockaddr_in fits into the union's sockaddr, and both are plain data.
        unsafe {
            let inet = (&raw mut address.ifr_ifru).cast::<libc::sockaddr_in>();
            (*inet).sin_family = libc::AF_INET as u16;
            (*inet).sin_addr.s_addr = u32::from_ne_bytes(octets);
            check(libc::ioctl(socket.as_raw_fd(), call, &raw mut address));
        }
    }
    let mut flags = request();
    flags.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads one ifreq.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const flags) });
}

struct Guest {
    memory: GuestMemory,
    transport: MmioTransport<Net>,
    queues: Vec<DriverQueue>,
    given: u64,
}

impl Guest {
    fn give(&mut self, count: u64) {
        for _ in 0..count {
            self.queues[RX].add(&self.memory, &[(BUFFERS + self.given % 256 * 4096, 2048, true)]);
            self.given += 1;
        }
    }

    /// The next frame of that protocol, header included; others come in between.
    fn next(&mut self, kind: [u8; 2]) -> Vec<u8> {
        let end = Instant::now() + Duration::from_secs(60);
        let mut whole = Vec::new();
        while Instant::now() < end {
            let _ = self.transport.with_queues(|net, context| net.receive(context));
            while let Some((head, len)) = self.queues[RX].used(&self.memory) {
                let at = self.memory.read_u64(16 * u64::from(head)).unwrap();
                let mut part = vec![0; len as usize];
                self.memory.read(at, &mut part).unwrap();
                let buffers = if whole.is_empty() { u16::from_le_bytes([part[10], part[11]]) } else { 1 };
                whole.extend(part);
                for _ in 1..buffers {
                    let (head, len) = self.queues[RX].used(&self.memory).expect("all of a frame comes at once");
                    let at = self.memory.read_u64(16 * u64::from(head)).unwrap();
                    let mut part = vec![0; len as usize];
                    self.memory.read(at, &mut part).unwrap();
                    whole.extend(part);
                }
                if whole[HEADER + 12..HEADER + 14] == kind {
                    return whole;
                }
                whole.clear();
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("no frame {kind:x?} came");
    }

    fn send(&mut self, octets: &[u8]) {
        self.memory.write(FRAMES, octets).unwrap();
        self.queues[TX].add(&self.memory, &[(FRAMES, octets.len() as u32, false)]);
        self.transport.kick(TX);
        driver::run(&self.transport);
        while self.queues[TX].used(&self.memory).is_some() {}
    }
}

/// The sum of RFC 1071, not inverted, over octets after `start`.
fn sum(start: u32, octets: &[u8]) -> u16 {
    let mut sum = octets
        .chunks(2)
        .fold(start, |sum, pair| sum + u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)])));
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// A UDP datagram whose checksum the host is to complete, in its frame with its header.
fn datagram(to: [u8; 6], port: u16, payload: &[u8]) -> Vec<u8> {
    let udp_len = 8 + payload.len() as u16;
    let mut ip = vec![0x45, 0, 0, 0, 0, 1, 0, 0, 64, 17, 0, 0];
    ip[2..4].copy_from_slice(&(20 + udp_len).to_be_bytes());
    ip.extend([OWN, NODE].concat());
    let check = !sum(0, &ip);
    ip[10..12].copy_from_slice(&check.to_be_bytes());
    let mut udp = [5353u16.to_be_bytes(), port.to_be_bytes(), udp_len.to_be_bytes()].concat();
    udp.extend(sum(17 + u32::from(udp_len), &[OWN, NODE].concat()).to_be_bytes());
    let mut header = [0; HEADER];
    (header[0], header[6], header[8]) = (features::NEEDS_CSUM, 34, 6);
    [&header[..], &to, &MAC, &[8, 0], &ip, &udp, payload].concat()
}

fn exchange() {
    let plain = tap(libc::IFF_TAP | libc::IFF_NO_PI);
    assert!(Tap::new(plain.into()).unwrap_err().to_string().contains("must have"));
    let file = tap(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
    up();
    let config = NetConfig {
        mac: MAC,
        mtu: 1500,
        ipv4: Some(Ipv4Addr::from(OWN)),
        offloads: true,
        rx: Limits::default(),
        tx: Limits::default(),
    };
    let memory = GuestMemory::new(16 << 20).unwrap();
    let net = Net::new(Tap::new(file.into()).unwrap(), config).unwrap();
    let counters = net.counters();
    let transport = MmioTransport::new(memory.clone(), net).unwrap();
    let features = driver::EVENT_IDX | features::MRG_RXBUF | features::OFFLOADS | features::USO;
    let queues = driver::start(&transport, features, 2, 256, 0);
    let mut guest = Guest { memory, transport, queues, given: 0 };
    guest.give(200);

    // The node asks who has the guest's address, and gets its datagram through with the answer.
    let socket = UdpSocket::bind((Ipv4Addr::from(NODE), 0)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let port = socket.local_addr().unwrap().port();
    let guests = (Ipv4Addr::from(OWN), 5353);
    socket.send_to(b"to the guest", guests).unwrap();
    let asked = guest.next([8, 6]);
    let node: [u8; 6] = asked[HEADER + 22..HEADER + 28].try_into().unwrap();
    let answer = [&[0, 1, 8, 0, 6, 4, 0, 2][..], &MAC, &OWN, &node, &NODE].concat();
    guest.send(&[&[0; HEADER][..], &node, &MAC, &[8, 6], &answer].concat());
    assert!(guest.next([8, 0]).ends_with(b"to the guest"));
    // One way back, with a checksum that the host has to complete.
    guest.send(&datagram(node, port, b"to the node"));
    let mut octets = [0; 100];
    let (len, from) = socket.recv_from(&mut octets).unwrap();
    assert_eq!((&octets[..len], from), (&b"to the node"[..], guests.into()));
    // A forged one does not come; the next honest one does.
    let mut forged = datagram(node, port, b"forged");
    forged[HEADER + 29] = 7;
    guest.send(&forged);
    guest.send(&datagram(node, port, b"honest"));
    let (len, _) = socket.recv_from(&mut octets).unwrap();
    assert_eq!(&octets[..len], b"honest");
    assert_eq!(counters.tx_dropped[Refusal::Address as usize].load(Ordering::Relaxed), 1);
    // Several datagrams as one: the host's kernel cuts them only for a guest that cannot.
    const UDP_SEGMENT: libc::c_int = 103;
    let size: libc::c_int = 1000;
    // SAFETY: sets an option of an open socket from one int.
    check(unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_UDP, UDP_SEGMENT, (&raw const size).cast(), 4) });
    socket.send_to(&[0x77; 8000], guests).unwrap();
    let long = guest.next([8, 0]);
    assert_eq!((long.len(), long[1]), (HEADER + ETHERNET + 28 + 8000, features::gso::UDP_L4));
    // What the host's kernel counted is what the device did.
    let text = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let line = text.lines().find_map(|line| line.trim().strip_prefix("guest:")).unwrap();
    let numbers: Vec<u64> = line.split_whitespace().map(|number| number.parse().unwrap()).collect();
    let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    assert_eq!(numbers[..2], [load(&counters.tx.bytes), load(&counters.tx.packets)]);
    assert_eq!(numbers[8..10], [load(&counters.rx.bytes), load(&counters.rx.packets)]);
}

#[test]
fn frames_pass_a_real_tap_device() {
    if !nix::unistd::geteuid().is_root() || !std::path::Path::new("/dev/net/tun").exists() {
        eprintln!("not run: needs root and /dev/net/tun");
        return;
    }
    // A namespace is a thread's own, and goes with it.
    let thread = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        exchange();
    });
    thread.join().unwrap();
}
