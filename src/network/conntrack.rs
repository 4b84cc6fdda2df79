//! Connections that the node's kernel keeps, by ctnetlink (<linux/netfilter/nfnetlink_conntrack.h>).
//!
//! A connection of a sandbox is one whose first packet came from the sandbox's address, which is pinned. So connections
//! need no mark.

use std::net::Ipv4Addr;

use nix::errno::Errno;

use super::netlink::{self, Attributes, KernelError, Received, Request, Socket};

/// NFNL_SUBSYS_CTNETLINK, in the upper half of a message's type.
const SUBSYSTEM: u16 = 1 << 8;
const GET: u16 = SUBSYSTEM | 1;
const DELETE: u16 = SUBSYSTEM | 2;
/// `struct nfgenmsg` of IPv4.
const IPV4: [u8; 4] = [libc::AF_INET as u8, 0, 0, 0];
// enum ctattr_type
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_ID: u16 = 12;
const CTA_FILTER: u16 = 25;
// enum ctattr_tuple, enum ctattr_ip
const CTA_TUPLE_IP: u16 = 1;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
/// Of CTA_FILTER: the flags of what is compared of the first direction, and that for the source.
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const CTA_FILTER_F_CTA_IP_SRC: u32 = 1;

/// A connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flow {
    /// Who began it.
    pub source: Ipv4Addr,
    /// To whom.
    pub destination: Ipv4Addr,
    /// What the kernel knows it by: the attribute CTA_TUPLE_ORIG.
    tuple: Vec<u8>,
    /// Tells it from a later one with the same addresses.
    id: Option<Vec<u8>>,
}

impl Flow {
    /// Reads a message of the list; `None` where it is not about IPv4.
    pub fn parse(message: &Received<'_>) -> Option<Self> {
        let attributes = message.payload.get(IPV4.len()..)?;
        let tuple = netlink::attribute(attributes, CTA_TUPLE_ORIG)?;
        let addresses = netlink::attribute(tuple, CTA_TUPLE_IP)?;
        let address = |kind| netlink::attribute(addresses, kind)?.first_chunk::<4>().copied().map(Ipv4Addr::from);
        Some(Self {
            source: address(CTA_IP_V4_SRC)?,
            destination: address(CTA_IP_V4_DST)?,
            tuple: tuple.to_vec(),
            id: netlink::attribute(attributes, CTA_ID).map(<[u8]>::to_vec),
        })
    }
}

/// The connections that `source` began, or all of IPv4.
pub fn list(socket: &mut Socket, source: Option<Ipv4Addr>) -> Result<Vec<Flow>, KernelError> {
    let mut filter = Attributes::new();
    if let Some(source) = source {
        let addresses = Attributes::new().octets(CTA_IP_V4_SRC, &source.octets());
        filter = filter.nest(CTA_TUPLE_ORIG, Attributes::new().nest(CTA_TUPLE_IP, addresses));
        let flags = Attributes::new().native32(CTA_FILTER_ORIG_FLAGS, CTA_FILTER_F_CTA_IP_SRC);
        filter = filter.nest(CTA_FILTER, flags);
    }
    let request = Request::new(GET, 0, &IPV4, filter);
    let found: Vec<Flow> = socket
        .dump(&request, |found: &mut Vec<Flow>, message| found.extend(Flow::parse(message)))
        .map_err(|e| e.during("list connections"))?;
    // The kernel's filter saves work; what is deleted is decided here.
    Ok(found.into_iter().filter(|flow| source.is_none_or(|source| flow.source == source)).collect())
}

/// Ends the connections that `source` began to whom `stays` does not hold. Gives how many these were.
pub fn cut(socket: &mut Socket, source: Ipv4Addr, stays: impl Fn(Ipv4Addr) -> bool) -> Result<usize, KernelError> {
    let flows = list(socket, Some(source))?;
    end(socket, flows.iter().filter(|flow| !stays(flow.destination)))
}

/// Ends connections. Gives how many of them were still there.
pub fn end<'a>(socket: &mut Socket, flows: impl Iterator<Item = &'a Flow>) -> Result<usize, KernelError> {
    let mut count = 0;
    for flow in flows {
        let tuple = Attributes::new().octets(CTA_TUPLE_ORIG | 0x8000, &flow.tuple);
        let attributes = flow.id.iter().fold(tuple, |attributes, id| attributes.octets(CTA_ID, id));
        match socket.ask(&Request::new(DELETE, 0, &IPV4, attributes)) {
            Ok(()) => count += 1,
            // It ended by itself.
            Err(error) if error.errno == Errno::ENOENT => {}
            Err(error) => return Err(error.during("end a connection")),
        }
    }
    Ok(count)
}
