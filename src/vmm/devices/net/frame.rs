//! What a guest may send: its frames' headers, and whom they say they are from.
//!
//! The host's kernel believes the virtio-net header in front of a frame, and the network believes addresses. Both are
//! checked here on a copy of a frame's first octets, and the copy is what is sent, so that a guest cannot change them
//! meanwhile. The rest of a frame is the guest's own business.

use std::net::Ipv4Addr;

use super::features::{self, HEADER, NEEDS_CSUM, gso};

/// Octets of an Ethernet header.
pub const ETHERNET: usize = 14;
/// Octets of a frame that are checked: Ethernet with ARP, or with an IPv6 header.
pub const CHECKED: usize = ETHERNET + 40;
/// Longest frame that is to be cut later: an IP datagram behind its Ethernet header.
pub const LONGEST: usize = 65_535 + ETHERNET;

/// Least size of pieces that a frame is cut into: what Linux takes for the least maximal segment size
/// (`TCP_MIN_SND_MSS`). Smaller ones would make one frame a burden of tens of thousands of packets for the host.
const LEAST_GSO_SIZE: u16 = 48;

const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const IPV6: u16 = 0x86dd;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// Why a frame of the guest was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// It is shorter than an Ethernet header or longer than the MTU allows.
    Length,
    /// Its virtio-net header does not fit the frame, or uses what was not negotiated.
    Header,
    /// It does not come from the guest's own hardware address.
    Mac,
    /// It does not come from the guest's own IPv4 address, or claims another one by ARP.
    Address,
    /// It has a VLAN tag.
    Vlan,
    /// It is neither IPv4 nor ARP, where the guest has a fixed IPv4 address.
    Protocol,
    /// The host did not take it: its interface is down or out of memory.
    Host,
}

impl Refusal {
    /// All reasons; the place of each is its number.
    pub const ALL: [Self; 7] =
        [Self::Length, Self::Header, Self::Mac, Self::Address, Self::Vlan, Self::Protocol, Self::Host];

    /// Its name in statistics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Length => "length",
            Self::Header => "header",
            Self::Mac => "mac",
            Self::Address => "address",
            Self::Vlan => "vlan",
            Self::Protocol => "protocol",
            Self::Host => "host",
        }
    }
}

/// What the guest may send, beside what it negotiated.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// The only source of frames.
    pub mac: [u8; 6],
    /// The only source of datagrams; then nothing but IPv4 and ARP passes.
    pub ipv4: Option<Ipv4Addr>,
    /// Most octets behind an Ethernet header.
    pub mtu: u16,
}

impl Rules {
    /// Checks a frame of `len` octets of which `octets` holds the virtio-net header and the first ones, `CHECKED` or all.
    /// What the header says beyond need is taken out. Gives how many packets it will be on a wire.
    pub fn check(&self, octets: &mut [u8], len: usize, driver: u64) -> Result<u64, Refusal> {
        let Some((header, frame)) = octets.split_first_chunk_mut::<HEADER>() else { return Err(Refusal::Length) };
        if len < ETHERNET || frame.len() < len.min(CHECKED) {
            return Err(Refusal::Length);
        }
        let mut vnet = Header::decode(header);
        let most = if vnet.gso_type == gso::NONE { usize::from(self.mtu) + ETHERNET } else { LONGEST };
        if len > most {
            return Err(Refusal::Length);
        }
        self.check_source(frame)?;
        let packets = vnet.check(frame, len, self.mtu, driver)?;
        *header = vnet.encode();
        Ok(packets)
    }

    fn check_source(&self, frame: &[u8]) -> Result<(), Refusal> {
        if frame[6..12] != self.mac {
            return Err(Refusal::Mac);
        }
        let kind = ethertype(frame);
        if matches!(kind, 0x8100 | 0x88a8 | 0x9100) {
            return Err(Refusal::Vlan);
        }
        if kind == ARP {
            return self.check_arp(&frame[ETHERNET..]);
        }
        let Some(own) = self.ipv4 else { return Ok(()) };
        if kind != IPV4 {
            return Err(Refusal::Protocol);
        }
        match frame.get(ETHERNET..ETHERNET + 20) {
            Some(ip) if ip[0] >> 4 == 4 && ip[12..16] == own.octets() => Ok(()),
            _ => Err(Refusal::Address),
        }
    }

    /// Addresses in ARP (RFC 826) are claims as well. Before it uses an address a host asks who has it, from 0.0.0.0
    /// (RFC 5227).
    fn check_arp(&self, arp: &[u8]) -> Result<(), Refusal> {
        let Some(arp) = arp.get(..28) else { return Err(Refusal::Length) };
        // Ethernet and IPv4, with addresses of 6 and 4 octets.
        if arp[..6] != [0, 1, 8, 0, 6, 4] {
            return Err(Refusal::Protocol);
        }
        if arp[8..14] != self.mac {
            return Err(Refusal::Mac);
        }
        match self.ipv4 {
            Some(own) if arp[14..18] != own.octets() && arp[14..18] != [0; 4] => Err(Refusal::Address),
            _ => Ok(()),
        }
    }
}

fn ethertype(frame: &[u8]) -> u16 {
    u16::from_be_bytes([frame[12], frame[13]])
}

/// `struct virtio_net_hdr`, without the number of buffers, which means nothing here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Header {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
}

impl Header {
    fn decode(octets: &[u8; HEADER]) -> Self {
        let [flags, gso_type, h0, h1, g0, g1, s0, s1, o0, o1, _, _] = *octets;
        Self {
            flags,
            gso_type,
            hdr_len: u16::from_le_bytes([h0, h1]),
            gso_size: u16::from_le_bytes([g0, g1]),
            csum_start: u16::from_le_bytes([s0, s1]),
            csum_offset: u16::from_le_bytes([o0, o1]),
        }
    }

    fn encode(self) -> [u8; HEADER] {
        let [h0, h1] = self.hdr_len.to_le_bytes();
        let [g0, g1] = self.gso_size.to_le_bytes();
        let [s0, s1] = self.csum_start.to_le_bytes();
        let [o0, o1] = self.csum_offset.to_le_bytes();
        [self.flags, self.gso_type, h0, h1, g0, g1, s0, s1, o0, o1, 0, 0]
    }

    fn check(&mut self, frame: &[u8], len: usize, mtu: u16, driver: u64) -> Result<u64, Refusal> {
        let ensure = |holds: bool| if holds { Ok(()) } else { Err(Refusal::Header) };
        // What a driver may not set (§5.1.6.2.1) is not passed on.
        self.flags &= NEEDS_CSUM;
        if self.flags == 0 {
            (self.csum_start, self.csum_offset) = (0, 0);
        } else {
            ensure(driver & features::CSUM != 0)?;
            let (start, offset) = (usize::from(self.csum_start), usize::from(self.csum_offset));
            ensure(start >= ETHERNET && start + offset + 2 <= len)?;
        }
        if self.gso_type == gso::NONE {
            (self.hdr_len, self.gso_size) = (0, 0);
            return Ok(1);
        }
        // Pieces get checksums of their own.
        ensure(self.flags != 0 && usize::from(self.hdr_len) <= len)?;
        ensure((LEAST_GSO_SIZE..=mtu).contains(&self.gso_size))?;
        let (kind, marks) = (self.gso_type & !gso::ECN, self.gso_type & gso::ECN != 0);
        let (needed, transport) = match kind {
            gso::TCPV4 => (features::HOST_TSO4, TCP),
            gso::TCPV6 => (features::HOST_TSO6, TCP),
            gso::UDP => (features::HOST_UFO, UDP),
            gso::UDP_L4 => (features::HOST_USO, UDP),
            _ => return Err(Refusal::Header),
        };
        ensure(driver & needed != 0)?;
        ensure(!marks || (transport == TCP && driver & features::HOST_ECN != 0))?;
        // What is said to be TCP over IPv4 is, and so on: the kernel cuts by it.
        let network = match (ethertype(frame), kind) {
            (IPV4, gso::TCPV4 | gso::UDP | gso::UDP_L4) => {
                ensure(frame.len() >= ETHERNET + 20 && frame[ETHERNET] >> 4 == 4)?;
                ensure(frame[ETHERNET + 9] == transport)?;
                20
            }
            // Headers may stand between this one and the transport's.
            (IPV6, gso::TCPV6 | gso::UDP | gso::UDP_L4) => {
                ensure(frame.len() >= ETHERNET + 40 && frame[ETHERNET] >> 4 == 6)?;
                40
            }
            _ => return Err(Refusal::Header),
        };
        // The place of the checksum tells of the transport header.
        let (place, header) = if transport == TCP { (16, 20) } else { (6, 8) };
        let start = usize::from(self.csum_start);
        ensure(usize::from(self.csum_offset) == place)?;
        ensure(start >= ETHERNET + network && start + header <= len)?;
        let payload = len - start - header;
        Ok(payload.div_ceil(usize::from(self.gso_size)).max(1) as u64)
    }
}

#[cfg(test)]
mod tests;
