//! Numbers of the network device (virtio 1.2 §5.1).

/// Octets of `struct virtio_net_hdr` with VERSION_1, in front of every frame (§5.1.6).
pub const HEADER: usize = 12;

/// The device completes checksums.
pub const CSUM: u64 = 1 << 0;
/// The driver takes frames without complete checksums.
pub const GUEST_CSUM: u64 = 1 << 1;
/// The configuration has an MTU.
pub const MTU: u64 = 1 << 3;
/// The configuration has an address.
pub const MAC: u64 = 1 << 5;
/// The driver takes TCP segments longer than a frame, over IPv4.
pub const GUEST_TSO4: u64 = 1 << 7;
/// The same over IPv6.
pub const GUEST_TSO6: u64 = 1 << 8;
/// The same with congestion marks.
pub const GUEST_ECN: u64 = 1 << 9;
/// The driver takes UDP datagrams longer than a frame.
pub const GUEST_UFO: u64 = 1 << 10;
/// The device cuts TCP over IPv4.
pub const HOST_TSO4: u64 = 1 << 11;
/// The device cuts TCP over IPv6.
pub const HOST_TSO6: u64 = 1 << 12;
/// The same with congestion marks.
pub const HOST_ECN: u64 = 1 << 13;
/// The device fragments UDP.
pub const HOST_UFO: u64 = 1 << 14;
/// A frame for the driver may lie in several buffers.
pub const MRG_RXBUF: u64 = 1 << 15;
/// The configuration has the link's state.
pub const STATUS: u64 = 1 << 16;
/// The driver takes several UDP datagrams as one, over IPv4.
pub const GUEST_USO4: u64 = 1 << 54;
/// The same over IPv6.
pub const GUEST_USO6: u64 = 1 << 55;
/// The device cuts such.
pub const HOST_USO: u64 = 1 << 56;

/// What is offered where frames may pass unfinished.
pub const OFFLOADS: u64 =
    CSUM | GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_UFO | HOST_TSO4 | HOST_TSO6 | HOST_ECN | HOST_UFO;
/// The same where the host's kernel cuts UDP.
pub const USO: u64 = GUEST_USO4 | GUEST_USO6 | HOST_USO;

/// Flag of a header: the checksum is to be completed from `csum_start` on.
pub const NEEDS_CSUM: u8 = 1;

/// Kinds of cutting, in `gso_type`.
pub mod gso {
    /// Nothing is to be cut.
    pub const NONE: u8 = 0;
    /// TCP over IPv4.
    pub const TCPV4: u8 = 1;
    /// Fragments of a UDP datagram.
    pub const UDP: u8 = 3;
    /// TCP over IPv6.
    pub const TCPV6: u8 = 4;
    /// Several UDP datagrams.
    pub const UDP_L4: u8 = 5;
    /// With congestion marks; beside one of the TCP kinds.
    pub const ECN: u8 = 0x80;
}
