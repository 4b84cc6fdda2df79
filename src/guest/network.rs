//! The network interface, set by rtnetlink (rtnetlink(7)): no program is started for it, so that a clone has its own
//! address at once.

use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

use crate::wire::{Args, Code, Error};

/// What Linux calls the first network device.
const INTERFACE: &std::ffi::CStr = c"eth0";

const MTU: std::ops::RangeInclusive<u64> = 68..=65_521;

// <linux/rtnetlink.h>, <linux/netlink.h>
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const REQUEST: u16 = 0x1;
const ACK: u16 = 0x4;
const DUMP: u16 = 0x300;
const REPLACE: u16 = 0x100;
const CREATE: u16 = 0x400;
const RTNH_F_ONLINK: u32 = 4;
/// Octets of `struct nlmsghdr`.
const HEADER: usize = 16;
/// Octets of `struct ifaddrmsg`.
const ADDRESS: usize = 8;

/// The interface's addresses, as `system.configure` gives them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Network {
    address: Ipv4Addr,
    prefix: u8,
    gateway: Option<Ipv4Addr>,
    mtu: Option<u32>,
}

impl Network {
    /// Takes `address=A.B.C.D/LEN`, `gateway=` and `mtu=`, where there is an address.
    pub(super) fn parse(args: &mut Args) -> Result<Option<Self>, Error> {
        let Some(given) = args.text("address")? else { return Ok(None) };
        let parsed = given.split_once('/').and_then(|(address, prefix)| {
            let prefix = prefix.parse().ok().filter(|prefix| (1..=32).contains(prefix))?;
            let address: Ipv4Addr = address.parse().ok()?;
            (!address.is_unspecified() && !address.is_multicast() && !address.is_broadcast())
                .then_some((address, prefix))
        });
        let (address, prefix) = parsed.ok_or_else(|| {
            Error::new(Code::BadArgument, format!("address={given} is no IPv4 address with its prefix length"))
                .with("argument", "address")
        })?;
        let gateway = args.text("gateway")?.map(|given| {
            given.parse().map_err(|_| {
                Error::new(Code::BadArgument, format!("gateway={given} is no IPv4 address")).with("argument", "gateway")
            })
        });
        let mtu = args.number("mtu", MTU)?.map(|mtu| mtu as u32);
        Ok(Some(Self { address, prefix, gateway: gateway.transpose()?, mtu }))
    }

    /// Makes the interface have this address and no other, and the default route; switches it on. The same again
    /// changes nothing.
    pub(super) fn apply(&self) -> Result<(), Error> {
        let failed = |what: &'static str| {
            move |errno: Errno| {
                Error::new(Code::Internal, format!("cannot {what}: {}", errno.desc()))
                    .with("errno", format!("{errno:?}"))
            }
        };
        // SAFETY: the name is a C string, which the call only reads.
        let index = unsafe { libc::if_nametoindex(INTERFACE.as_ptr()) };
        if index == 0 {
            return Err(Error::new(Code::BadState, "the sandbox has no network device"));
        }
        let route = Route::open().map_err(failed("open the kernel's routing socket"))?;
        let mut link = vec![0; 16]; // struct ifinfomsg
        link[4..8].copy_from_slice(&index.to_ne_bytes());
        link[8..12].copy_from_slice(&(libc::IFF_UP as u32).to_ne_bytes());
        link[12..16].copy_from_slice(&(libc::IFF_UP as u32).to_ne_bytes());
        if let Some(mtu) = self.mtu {
            attribute(&mut link, libc::IFLA_MTU, &mtu.to_ne_bytes());
        }
        route.ask(libc::RTM_NEWLINK, 0, &link).map_err(failed("switch the network interface on"))?;
        // An address that goes takes its routes along, so this comes first.
        for (other, prefix) in route.addresses(index).map_err(failed("list the interface's addresses"))? {
            if (other, prefix) != (self.address, self.prefix) {
                let gone = address(index, other, prefix);
                route.ask(libc::RTM_DELADDR, 0, &gone).map_err(failed("take an address from the interface"))?;
            }
        }
        let own = address(index, self.address, self.prefix);
        route.ask(libc::RTM_NEWADDR, CREATE | REPLACE, &own).map_err(failed("give the interface its address"))?;
        if let Some(gateway) = self.gateway {
            let mut default = vec![0; 12]; // struct rtmsg
            default[0] = libc::AF_INET as u8;
            default[4] = libc::RT_TABLE_MAIN;
            default[5] = libc::RTPROT_STATIC;
            default[6] = libc::RT_SCOPE_UNIVERSE;
            default[7] = libc::RTN_UNICAST;
            // The gateway need not be inside the address' own network.
            default[8..12].copy_from_slice(&RTNH_F_ONLINK.to_ne_bytes());
            attribute(&mut default, libc::RTA_GATEWAY, &gateway.octets());
            attribute(&mut default, libc::RTA_OIF, &index.to_ne_bytes());
            route.ask(libc::RTM_NEWROUTE, CREATE | REPLACE, &default).map_err(failed("set the default route"))?;
        }
        Ok(())
    }
}

/// `struct ifaddrmsg` with the address.
fn address(index: u32, address: Ipv4Addr, prefix: u8) -> Vec<u8> {
    let mut message = vec![libc::AF_INET as u8, prefix, 0, libc::RT_SCOPE_UNIVERSE];
    message.extend(index.to_ne_bytes());
    attribute(&mut message, libc::IFA_LOCAL, &address.octets());
    attribute(&mut message, libc::IFA_ADDRESS, &address.octets());
    message
}

/// Adds `struct rtattr` with its data, padded to four octets.
fn attribute(message: &mut Vec<u8>, kind: u16, data: &[u8]) {
    message.extend((4 + data.len() as u16).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(data);
    message.resize(message.len().next_multiple_of(4), 0);
}

/// A socket to the kernel's routing tables. Every request is answered before the next.
struct Route(OwnedFd);

impl Route {
    fn open() -> nix::Result<Self> {
        let protocol = SockProtocol::NetlinkRoute;
        socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol).map(Self)
    }

    fn send(&self, kind: u16, flags: u16, payload: &[u8]) -> nix::Result<()> {
        let mut message = ((HEADER + payload.len()) as u32).to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.extend((REQUEST | flags).to_ne_bytes());
        message.extend([0; 8]); // sequence number, address
        message.extend(payload);
        send(self.0.as_raw_fd(), &message, MsgFlags::empty()).map(drop)
    }

    fn receive(&self) -> nix::Result<Vec<u8>> {
        let mut octets = vec![0; 32 * 1024];
        loop {
            match recv(self.0.as_raw_fd(), &mut octets, MsgFlags::empty()) {
                Err(Errno::EINTR) => {}
                received => {
                    octets.truncate(received?);
                    return Ok(octets);
                }
            }
        }
    }

    /// One request, and the kernel's answer.
    fn ask(&self, kind: u16, flags: u16, payload: &[u8]) -> nix::Result<()> {
        self.send(kind, flags | ACK, payload)?;
        let octets = self.receive()?;
        match messages(&octets).next() {
            Some((NLMSG_ERROR, payload)) => verdict(payload),
            _ => Err(Errno::EPROTO),
        }
    }

    /// The IPv4 addresses of an interface with their prefix lengths.
    fn addresses(&self, index: u32) -> nix::Result<Vec<(Ipv4Addr, u8)>> {
        let mut filter = [0; ADDRESS];
        filter[0] = libc::AF_INET as u8;
        self.send(libc::RTM_GETADDR, DUMP, &filter)?;
        let mut found = Vec::new();
        loop {
            let octets = self.receive()?;
            for (kind, payload) in messages(&octets) {
                match kind {
                    NLMSG_DONE => return Ok(found),
                    NLMSG_ERROR => verdict(payload)?,
                    libc::RTM_NEWADDR => found.extend(parse_address(index, payload)),
                    _ => {}
                }
            }
        }
    }
}

/// The messages in what the kernel sent: kind and payload.
fn messages(mut octets: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = u32::from_ne_bytes(*octets.first_chunk()?) as usize;
        let kind = u16::from_ne_bytes(*octets.get(4..)?.first_chunk()?);
        let payload = octets.get(HEADER..len)?;
        octets = octets.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, payload))
    })
}

/// What `struct nlmsgerr` says: 0, or a negative errno.
fn verdict(payload: &[u8]) -> nix::Result<()> {
    match payload.first_chunk().map(|octets| i32::from_ne_bytes(*octets)) {
        Some(0) => Ok(()),
        Some(code) => Err(Errno::from_raw(-code)),
        None => Err(Errno::EPROTO),
    }
}

/// The address of an RTM_NEWADDR message, where it is that interface's.
fn parse_address(index: u32, payload: &[u8]) -> Option<(Ipv4Addr, u8)> {
    let prefix = *payload.get(1)?;
    if u32::from_ne_bytes(*payload.get(4..)?.first_chunk()?) != index {
        return None;
    }
    let mut rest = payload.get(ADDRESS..)?;
    loop {
        let len = usize::from(u16::from_ne_bytes(*rest.first_chunk()?));
        let kind = u16::from_ne_bytes(*rest.get(2..)?.first_chunk()?);
        let data = rest.get(4..len)?;
        if kind == libc::IFA_LOCAL {
            return Some((Ipv4Addr::from(*data.first_chunk::<4>()?), prefix));
        }
        rest = rest.get(len.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Request;

    fn parse(keys: &[(&str, &str)]) -> Result<Option<Network>, String> {
        let request = keys.iter().fold(Request::new("1", "system.configure"), |r, (key, value)| r.set(key, *value));
        Network::parse(&mut Args::of(request)).map_err(|e| e.code)
    }

    #[test]
    fn an_address_comes_with_its_prefix_length() {
        assert_eq!(parse(&[]), Ok(None));
        let (address, gateway) = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 0));
        let full = Network { address, prefix: 31, gateway: Some(gateway), mtu: Some(9000) };
        assert_eq!(parse(&[("address", "10.0.0.1/31"), ("gateway", "10.0.0.0"), ("mtu", "9000")]), Ok(Some(full)));
        let least = Network { gateway: None, mtu: None, ..full };
        assert_eq!(parse(&[("address", "10.0.0.1/31")]), Ok(Some(least)));
        for bad in ["10.0.0.1", "10.0.0.1/0", "10.0.0.1/33", "10.0.0/8", "0.0.0.0/8", "224.0.0.1/4", "::1/64", "x/8"] {
            assert_eq!(parse(&[("address", bad)]), Err("BAD_ARGUMENT".into()), "{bad}");
        }
        assert_eq!(parse(&[("address", "10.0.0.1/31"), ("gateway", "host")]), Err("BAD_ARGUMENT".into()));
        assert_eq!(parse(&[("address", "10.0.0.1/31"), ("mtu", "67")]), Err("OUT_OF_RANGE".into()));
    }

    #[test]
    fn the_kernels_own_addresses_are_read() {
        // SAFETY: the name is a C string, which the call only reads.
        let lo = unsafe { libc::if_nametoindex(c"lo".as_ptr()) };
        let found = Route::open().unwrap().addresses(lo).unwrap();
        assert!(found.contains(&(Ipv4Addr::LOCALHOST, 8)), "{found:?}");
        assert!(!Route::open().unwrap().addresses(u32::MAX).unwrap().contains(&(Ipv4Addr::LOCALHOST, 8)));
    }

    #[test]
    fn what_the_kernel_refuses_is_an_error() {
        let route = Route::open().unwrap();
        let unknown = address(u32::MAX, Ipv4Addr::LOCALHOST, 8);
        assert!(route.ask(libc::RTM_NEWADDR, 0, &unknown).is_err());
    }

    #[test]
    fn cut_messages_end_the_list() {
        let whole = [&[20u8, 0, 0, 0, 3, 0][..], &[0; 14]].concat();
        assert_eq!(messages(&whole).count(), 1);
        for len in 0..whole.len() {
            assert_eq!(messages(&whole[..len]).count(), 0);
        }
        let own = address(7, Ipv4Addr::LOCALHOST, 8);
        assert_eq!(parse_address(7, &own), Some((Ipv4Addr::LOCALHOST, 8)));
        (0..16).for_each(|len| assert_eq!(parse_address(7, &own[..len]), None));
        assert_eq!(parse_address(8, &own), None);
    }
}
