//! Frames as a guest or a host on the internet would send them, octet by octet.

use std::net::Ipv4Addr;

/// Octets of the virtio-net header that a TAP device has before each frame, as it is made.
pub const VNET: usize = 10;

/// A UDP datagram in its frame.
#[derive(Debug, Clone)]
pub struct Udp {
    pub to_mac: [u8; 6],
    pub from_mac: [u8; 6],
    pub from: Ipv4Addr,
    pub to: Ipv4Addr,
    pub ports: (u16, u16),
    pub payload: Vec<u8>,
}

fn sum(octets: &[u8]) -> u16 {
    let mut total: u32 =
        octets.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]))).sum();
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    !(total as u16)
}

/// An Ethernet frame.
pub fn ethernet(to: [u8; 6], from: [u8; 6], kind: u16, content: &[u8]) -> Vec<u8> {
    [&to[..], &from, &kind.to_be_bytes(), content].concat()
}

/// An IPv4 packet; `fragment` is its field of flags and offset.
pub fn ipv4(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, fragment: u16, content: &[u8]) -> Vec<u8> {
    let len = u16::try_from(20 + content.len()).expect("a packet of a test is short");
    let mut header = [0x45, 0, 0, 0, 0x12, 0x34, 0, 0, 64, protocol, 0, 0];
    header[2..4].copy_from_slice(&len.to_be_bytes());
    header[6..8].copy_from_slice(&fragment.to_be_bytes());
    let mut header = [&header[..], &from.octets(), &to.octets()].concat();
    let checksum = sum(&header);
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
    [header, content.to_vec()].concat()
}

impl Udp {
    /// The datagram alone, without a checksum.
    pub fn datagram(&self) -> Vec<u8> {
        let len = u16::try_from(8 + self.payload.len()).expect("a datagram of a test is short");
        let header = [self.ports.0.to_be_bytes(), self.ports.1.to_be_bytes(), len.to_be_bytes(), [0; 2]].concat();
        [header, self.payload.clone()].concat()
    }

    /// The whole frame.
    pub fn frame(&self) -> Vec<u8> {
        ethernet(self.to_mac, self.from_mac, 0x0800, &ipv4(self.from, self.to, 17, 0, &self.datagram()))
    }

    /// The frames of the datagram in fragments of that many octets, a multiple of 8.
    pub fn fragments(&self, size: usize) -> Vec<Vec<u8>> {
        let datagram = self.datagram();
        let count = datagram.len().div_ceil(size);
        let pieces = datagram.chunks(size).enumerate();
        let frame = |(n, piece): (usize, &[u8])| {
            let more = if n + 1 < count { 0x2000 } else { 0 };
            let place = u16::try_from(n * size / 8).expect("a datagram of a test is short");
            ethernet(self.to_mac, self.from_mac, 0x0800, &ipv4(self.from, self.to, 17, more | place, piece))
        };
        pieces.map(frame).collect()
    }

    /// Reads a frame that is a whole UDP datagram.
    pub fn parse(frame: &[u8]) -> Option<Self> {
        let address = |at: usize| Some(Ipv4Addr::from(*frame.get(at..)?.first_chunk::<4>()?));
        let port = |at: usize| Some(u16::from_be_bytes(*frame.get(at..)?.first_chunk::<2>()?));
        if frame.get(12..15)? != [8, 0, 0x45] || frame.get(23) != Some(&17) {
            return None;
        }
        Some(Self {
            to_mac: *frame.first_chunk()?,
            from_mac: *frame.get(6..)?.first_chunk()?,
            from: address(26)?,
            to: address(30)?,
            ports: (port(34)?, port(36)?),
            payload: frame.get(42..34 + usize::from(port(38)?))?.to_vec(),
        })
    }
}

/// A question who has an address.
pub fn arp(from_mac: [u8; 6], from: Ipv4Addr, whose: Ipv4Addr) -> Vec<u8> {
    let head = [0, 1, 8, 0, 6, 4, 0, 1];
    ethernet([0xff; 6], from_mac, 0x0806, &[&head[..], &from_mac, &from.octets(), &[0; 6], &whose.octets()].concat())
}

/// The ICMP error "port unreachable" about a packet.
pub fn unreachable(from: Ipv4Addr, to: Ipv4Addr, about: &[u8]) -> Vec<u8> {
    let mut message = [&[3, 3, 0, 0, 0, 0, 0, 0][..], &about[..about.len().min(28)]].concat();
    let checksum = sum(&message);
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
    ipv4(from, to, 1, 0, &message)
}
