//! Interfaces, addresses and neighbours, by rtnetlink(7).

use std::net::Ipv4Addr;

use super::netlink::{self, Attributes, CREATE, KernelError, REPLACE, Received, Request, Socket};
use super::plan::{NODE_MAC, Slot};
use super::rules::GROUP;

// <linux/if_link.h>
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_TXQLEN: u16 = 13;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_GROUP: u16 = 27;
const IFLA_INET_CONF: u16 = 1;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
/// IN6_ADDR_GEN_MODE_NONE
const NO_IPV6_ADDRESS: u8 = 1;
// <linux/if_addr.h>, <linux/neighbour.h>
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_PERMANENT: u16 = 0x80;

/// Settings of a TAP device for IPv4 (<linux/ip.h>, Documentation/networking/ip-sysctl.rst).
const INET: &[(u16, u32)] = &[
    (1, 1),  // forwarding: packets of this interface are passed on
    (4, 0),  // accept_redirects
    (6, 0),  // send_redirects
    (8, 1),  // rp_filter: sources that would not be answered by this interface are dropped
    (9, 0),  // accept_source_route
    (19, 1), // arp_ignore: the interface's own address is answered for, and no other of the node's
    (21, 0), // arp_accept
    (26, 0), // route_localnet
];

/// Frames for a guest that waits in the TAP device's queue at most.
const QUEUE: u32 = 500;

/// An interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its group.
    pub group: u32,
}

impl Link {
    /// Reads a message of the list (`struct ifinfomsg` and attributes).
    pub fn parse(message: &Received<'_>) -> Option<Self> {
        let index = netlink::native32(message.payload.get(4..)?)?;
        let attributes = message.payload.get(16..)?;
        let name = netlink::attribute(attributes, IFLA_IFNAME)?.split(|&b| b == 0).next()?;
        Some(Self {
            index,
            name: String::from_utf8(name.to_vec()).ok()?,
            group: netlink::attribute(attributes, IFLA_GROUP).and_then(netlink::native32).unwrap_or(0),
        })
    }
}

/// All interfaces.
pub fn list(socket: &mut Socket) -> Result<Vec<Link>, KernelError> {
    let request = Request::new(libc::RTM_GETLINK, 0, &[0; 16], Attributes::new());
    socket
        .dump(&request, |found: &mut Vec<Link>, message| found.extend(Link::parse(message)))
        .map_err(|e| e.during("list interfaces"))
}

/// Makes a new TAP device a slot's: everything that is known beforehand is set, and then it is switched on. It is in the
/// sandboxes' group, whose packets the rules drop, before it is up.
pub fn prepare(socket: &mut Socket, index: u32, slot: &Slot, mtu: u32) -> Result<(), KernelError> {
    let conf = INET.iter().fold(Attributes::new(), |conf, (key, value)| conf.native32(*key, *value));
    let mut families = Attributes::new().nest(libc::AF_INET as u16, Attributes::new().nest(IFLA_INET_CONF, conf));
    // A kernel without IPv6 refuses its settings.
    let has_ipv6 = std::path::Path::new("/proc/sys/net/ipv6").exists();
    if has_ipv6 {
        let none = Attributes::new().octets(IFLA_INET6_ADDR_GEN_MODE, &[NO_IPV6_ADDRESS]);
        families = families.nest(libc::AF_INET6 as u16, none);
    }
    let settings = Attributes::new()
        .native32(IFLA_GROUP, GROUP)
        .octets(IFLA_ADDRESS, &NODE_MAC)
        .native32(IFLA_MTU, mtu)
        .native32(IFLA_TXQLEN, QUEUE)
        .nest(IFLA_AF_SPEC, families);
    socket
        .ask(&Request::new(libc::RTM_NEWLINK, 0, &link(index, 0), settings))
        .map_err(|e| e.during("set up a TAP device"))?;
    if has_ipv6 {
        // Not by rtnetlink: the device sends nothing of IPv6, and takes nothing.
        let path = format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", slot.name);
        if let Err(e) = std::fs::write(&path, "1") {
            log::warn!("{path}: {e}");
        }
    }
    socket
        .ask(&Request::new(libc::RTM_NEWLINK, 0, &link(index, libc::IFF_UP as u32), Attributes::new()))
        .map_err(|e| e.during("switch a TAP device on"))?;
    // The kernel adds the route to the guest's address with it.
    let mut address = vec![libc::AF_INET as u8, 31, 0, libc::RT_SCOPE_UNIVERSE];
    address.extend(index.to_ne_bytes());
    let octets = slot.node.octets();
    let attributes = Attributes::new().octets(IFA_LOCAL, &octets).octets(IFA_ADDRESS, &octets);
    socket
        .ask(&Request::new(libc::RTM_NEWADDR, CREATE | REPLACE, &address, attributes))
        .map_err(|e| e.during("give a TAP device its address"))?;
    neighbour(socket, index, slot.guest, slot.mac)
}

/// Says for good which hardware address a neighbour has: nothing that is heard changes it.
fn neighbour(socket: &mut Socket, index: u32, address: Ipv4Addr, mac: [u8; 6]) -> Result<(), KernelError> {
    let mut entry = vec![libc::AF_INET as u8, 0, 0, 0]; // struct ndmsg
    entry.extend(index.to_ne_bytes());
    entry.extend(NUD_PERMANENT.to_ne_bytes());
    entry.extend([0, libc::RTN_UNICAST]);
    let attributes = Attributes::new().octets(NDA_DST, &address.octets()).octets(NDA_LLADDR, &mac);
    socket
        .ask(&Request::new(libc::RTM_NEWNEIGH, CREATE | REPLACE, &entry, attributes))
        .map_err(|e| e.during("write down a neighbour"))
}

/// Deletes an interface.
pub fn delete(socket: &mut Socket, index: u32) -> Result<(), KernelError> {
    socket
        .ask(&Request::new(libc::RTM_DELLINK, 0, &link(index, 0), Attributes::new()))
        .map_err(|e| e.during("delete an interface"))
}

/// `struct ifinfomsg` of an interface; those of its flags are set that are given.
fn link(index: u32, flags: u32) -> [u8; 16] {
    let mut octets = [0; 16];
    octets[4..8].copy_from_slice(&index.to_ne_bytes());
    octets[8..12].copy_from_slice(&flags.to_ne_bytes());
    octets[12..16].copy_from_slice(&flags.to_ne_bytes());
    octets
}

/// The index of an interface by its name.
pub fn index(name: &str) -> Option<u32> {
    nix::net::if_::if_nametoindex(name).ok()
}
