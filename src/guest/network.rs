//! The network interface, set by rtnetlink (rtnetlink(7)): no program is started for it, so that a clone has its own
//! address at once.

use std::net::Ipv4Addr;

use nix::errno::Errno;

use crate::network::netlink::{self, Attributes, CREATE, Family, KernelError, REPLACE, Request, Socket};
use crate::wire::{Args, Code, Error};

/// What Linux calls the first network device.
const INTERFACE: &std::ffi::CStr = c"eth0";

/// Most name servers: what resolvers take (MAXNS, resolv.conf(5)).
const MAX_DNS: usize = 3;
/// Where programs find their name servers.
const RESOLV_CONF: &str = "/etc/resolv.conf";

const MTU: std::ops::RangeInclusive<u64> = 68..=65_521;

// <linux/rtnetlink.h>
const RTNH_F_ONLINK: u32 = 4;
/// Octets of `struct ifaddrmsg`.
const ADDRESS: usize = 8;

// <linux/sock_diag.h>, <linux/inet_diag.h>
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
/// Octets of `struct inet_diag_sockid`.
const SOCKET_ID: usize = 48;
/// The states of net/tcp_states.h, a bit each, without TIME_WAIT (6), CLOSE (7) and LISTEN (10).
const CONNECTED: u32 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11;

/// The interface's addresses, as `system.configure` gives them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Network {
    address: Ipv4Addr,
    prefix: u8,
    gateway: Option<Ipv4Addr>,
    mtu: Option<u32>,
    dns: Vec<Ipv4Addr>,
}

impl Network {
    /// Takes `address=A.B.C.D/LEN`, `gateway=`, `mtu=` and `dns=`, where there is an address.
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
        let dns = args.all("dns").into_iter().map(|given| {
            let given = String::from_utf8_lossy(&given).into_owned();
            given.parse().map_err(|_| {
                Error::new(Code::BadArgument, format!("dns={given} is no IPv4 address")).with("argument", "dns")
            })
        });
        let dns = dns.collect::<Result<Vec<Ipv4Addr>, Error>>()?;
        if dns.len() > MAX_DNS {
            let message = format!("{} name servers are over the limit of {MAX_DNS}", dns.len());
            return Err(Error::new(Code::BadArgument, message).with("argument", "dns"));
        }
        Ok(Some(Self { address, prefix, gateway: gateway.transpose()?, mtu, dns }))
    }

    /// Makes the interface have this address and no other, and the default route; switches it on. The same again
    /// changes nothing.
    pub(super) fn apply(&self) -> Result<(), Error> {
        let mut card = Card::open()?;
        card.switch(true, self.mtu()).map_err(failed("switch the network interface on"))?;
        card.take_address(self)?;
        card.take_route(self)?;
        self.write_name_servers()
    }

    /// Makes the interface another one's: nothing of what it had is left, neither addresses nor routes nor what it knew of
    /// its neighbours, and connections from an address that it no longer has are ended (programs see ECONNABORTED). No
    /// packet leaves it between the old and the new.
    pub(super) fn renew(&self, hardware: Option<HardwareAddress>) -> Result<(), Error> {
        let mut card = Card::open()?;
        // Takes routes and neighbours along, also permanent ones (fib_disable_ip, neigh_ifdown).
        card.switch(false, Attributes::new()).map_err(failed("switch the network interface off"))?;
        let gone = card.take_address(self)?;
        end_connections(&gone).map_err(failed("end the connections of an address that is gone"))?;
        let own = hardware.iter().fold(self.mtu(), |all, address| all.octets(libc::IFLA_ADDRESS, &address.0));
        card.switch(true, own).map_err(failed("switch the network interface on"))?;
        card.take_route(self)?;
        self.write_name_servers()
    }

    fn mtu(&self) -> Attributes {
        self.mtu.iter().fold(Attributes::new(), |all, mtu| all.native32(libc::IFLA_MTU, *mtu))
    }

    fn write_name_servers(&self) -> Result<(), Error> {
        self.name_servers().map_err(|e| Error::new(Code::Internal, format!("cannot write {RESOLV_CONF}: {e}")))
    }

    /// Writes the name servers down where there are any, in place of a template's own: those are of another network.
    fn name_servers(&self) -> std::io::Result<()> {
        let text: String = self.dns.iter().map(|server| format!("nameserver {server}\n")).collect();
        if text.is_empty() || super::read_file(RESOLV_CONF) == text.as_bytes() {
            return Ok(());
        }
        // It may be a link to where a service of another system would write it.
        match std::fs::remove_file(RESOLV_CONF) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        std::fs::create_dir_all("/etc")?;
        std::fs::write(RESOLV_CONF, text)
    }
}

/// An Ethernet address of one interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HardwareAddress([u8; 6]);

impl HardwareAddress {
    /// `mac=aa:bb:cc:dd:ee:ff`
    pub(super) fn parse(args: &mut Args) -> Result<Option<Self>, Error> {
        let Some(given) = args.text("mac")? else { return Ok(None) };
        let octets: Option<Vec<u8>> = given
            .split(':')
            .map(|part| u8::from_str_radix(part, 16).ok().filter(|_| part.len() == 2 && !part.starts_with('+')))
            .collect();
        let octets = octets.and_then(|octets| <[u8; 6]>::try_from(octets).ok());
        // Bit 0 of the first octet: a group's address.
        octets.filter(|octets| octets[0] & 1 == 0 && octets != &[0; 6]).map(|octets| Some(Self(octets))).ok_or_else(
            || {
                let sentence = format!("mac={given} is no Ethernet address of one interface");
                Error::new(Code::BadArgument, sentence).with("argument", "mac")
            },
        )
    }
}

fn failed(what: &'static str) -> impl Fn(KernelError) -> Error {
    move |error| {
        let errno = format!("{:?}", error.errno);
        Error::new(Code::Internal, error.during(what).to_string()).with("errno", errno)
    }
}

/// The interface, and the kernel's ear for it.
struct Card {
    index: u32,
    route: Socket,
}

impl Card {
    fn open() -> Result<Self, Error> {
        // SAFETY: the name is a C string, which the call only reads.
        let index = unsafe { libc::if_nametoindex(INTERFACE.as_ptr()) };
        if index == 0 {
            return Err(Error::new(Code::BadState, "the sandbox has no network device"));
        }
        let route = Socket::open(Family::Route).map_err(KernelError::from);
        Ok(Self { index, route: route.map_err(failed("open the kernel's routing socket"))? })
    }

    /// Switches it on or off, with other changes; the kernel makes those first (do_setlink).
    fn switch(&mut self, on: bool, changes: Attributes) -> Result<(), KernelError> {
        let up = libc::IFF_UP as u32;
        let mut link = vec![0; 16]; // struct ifinfomsg
        link[4..8].copy_from_slice(&self.index.to_ne_bytes());
        link[8..12].copy_from_slice(&(if on { up } else { 0 }).to_ne_bytes());
        link[12..16].copy_from_slice(&up.to_ne_bytes());
        self.route.ask(&Request::new(libc::RTM_NEWLINK, 0, &link, changes))
    }

    /// Gives it this address and no other; gives those that it had.
    fn take_address(&mut self, network: &Network) -> Result<Vec<Ipv4Addr>, Error> {
        let wanted = (network.address, network.prefix);
        let found = addresses(&mut self.route, self.index).map_err(failed("list the interface's addresses"))?;
        let others: Vec<_> = found.into_iter().filter(|address| *address != wanted).collect();
        // An address that goes takes its routes along, so this comes first.
        for (other, prefix) in &others {
            let gone = about(libc::RTM_DELADDR, 0, self.index, *other, *prefix);
            match self.route.ask(&gone) {
                // A secondary address goes with the first of its network.
                Err(error) if error.errno == Errno::EADDRNOTAVAIL => {}
                result => result.map_err(failed("take an address from the interface"))?,
            }
        }
        let own = about(libc::RTM_NEWADDR, CREATE | REPLACE, self.index, network.address, network.prefix);
        self.route.ask(&own).map_err(failed("give the interface its address"))?;
        Ok(others.into_iter().map(|(address, _)| address).filter(|address| *address != network.address).collect())
    }

    /// Sets the default route where there is a gateway.
    fn take_route(&mut self, network: &Network) -> Result<(), Error> {
        let Some(gateway) = network.gateway else { return Ok(()) };
        let mut default = vec![0; 12]; // struct rtmsg
        default[0] = libc::AF_INET as u8;
        default[4] = libc::RT_TABLE_MAIN;
        default[5] = libc::RTPROT_STATIC;
        default[6] = libc::RT_SCOPE_UNIVERSE;
        default[7] = libc::RTN_UNICAST;
        // The gateway need not be inside the address' own network.
        default[8..12].copy_from_slice(&RTNH_F_ONLINK.to_ne_bytes());
        let to = Attributes::new().octets(libc::RTA_GATEWAY, &gateway.octets()).native32(libc::RTA_OIF, self.index);
        let request = Request::new(libc::RTM_NEWROUTE, CREATE | REPLACE, &default, to);
        self.route.ask(&request).map_err(failed("set the default route"))
    }
}

/// Ends TCP connections from these addresses at once (sock_diag(7), SOCK_DESTROY). Without it they would wait a quarter of
/// an hour for answers that cannot come.
fn end_connections(from: &[Ipv4Addr]) -> Result<(), KernelError> {
    if from.is_empty() {
        return Ok(());
    }
    let mut sockets = match Socket::open(Family::Sockets) {
        // A kernel that was built without it.
        Err(Errno::EPROTONOSUPPORT) => return Ok(()),
        sockets => sockets?,
    };
    let all = Request::new(SOCK_DIAG_BY_FAMILY, 0, &about_sockets(&[0; SOCKET_ID]), Attributes::new());
    let found = sockets.dump(&all, |found: &mut Vec<_>, message| found.extend(parse_socket(message.payload)))?;
    for (address, id) in found {
        if from.contains(&address) {
            match sockets.ask(&Request::new(SOCK_DESTROY, 0, &about_sockets(&id), Attributes::new())) {
                // It ended meanwhile.
                Err(error) if error.errno == Errno::ENOENT => {}
                result => result?,
            }
        }
    }
    Ok(())
}

/// `struct inet_diag_req_v2`: TCP sockets that have, or had, a peer.
fn about_sockets(id: &[u8; SOCKET_ID]) -> Vec<u8> {
    let mut request = vec![libc::AF_INET as u8, libc::IPPROTO_TCP as u8, 0, 0];
    request.extend(CONNECTED.to_ne_bytes());
    request.extend(id);
    request
}

/// A socket's own address and its id (`struct inet_diag_sockid`), of a `struct inet_diag_msg`.
fn parse_socket(payload: &[u8]) -> Option<(Ipv4Addr, [u8; SOCKET_ID])> {
    let id: &[u8; SOCKET_ID] = payload.get(4..)?.first_chunk()?;
    // Behind two ports.
    Some((Ipv4Addr::from(*id.get(4..)?.first_chunk::<4>()?), *id))
}

/// A request about an address of an interface: `struct ifaddrmsg` and the address.
fn about(kind: u16, flags: u16, index: u32, address: Ipv4Addr, prefix: u8) -> Request {
    let mut message = vec![libc::AF_INET as u8, prefix, 0, libc::RT_SCOPE_UNIVERSE];
    message.extend(index.to_ne_bytes());
    let octets = address.octets();
    let attributes = Attributes::new().octets(libc::IFA_LOCAL, &octets).octets(libc::IFA_ADDRESS, &octets);
    Request::new(kind, flags, &message, attributes)
}

/// The IPv4 addresses of an interface with their prefix lengths.
fn addresses(route: &mut Socket, index: u32) -> Result<Vec<(Ipv4Addr, u8)>, KernelError> {
    let mut filter = [0; ADDRESS];
    filter[0] = libc::AF_INET as u8;
    let request = Request::new(libc::RTM_GETADDR, 0, &filter, Attributes::new());
    route.dump(&request, |found: &mut Vec<_>, message| found.extend(parse_address(index, message.payload)))
}

/// The address of an RTM_NEWADDR message, where it is that interface's.
fn parse_address(index: u32, payload: &[u8]) -> Option<(Ipv4Addr, u8)> {
    let prefix = *payload.get(1)?;
    if netlink::native32(payload.get(4..)?)? != index {
        return None;
    }
    let address = netlink::attribute(payload.get(ADDRESS..)?, libc::IFA_LOCAL)?;
    Some((Ipv4Addr::from(*address.first_chunk::<4>()?), prefix))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Request as Line;

    fn parse(keys: &[(&str, &str)]) -> Result<Option<Network>, String> {
        let request = keys.iter().fold(Line::new("1", "system.configure"), |r, (key, value)| r.set(key, *value));
        Network::parse(&mut Args::of(request)).map_err(|e| e.code)
    }

    #[test]
    fn an_address_comes_with_its_prefix_length() {
        assert_eq!(parse(&[]), Ok(None));
        let (address, gateway) = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 0));
        let full = Network { address, prefix: 31, gateway: Some(gateway), mtu: Some(9000), dns: vec![] };
        assert_eq!(
            parse(&[("address", "10.0.0.1/31"), ("gateway", "10.0.0.0"), ("mtu", "9000")]),
            Ok(Some(full.clone()))
        );
        let named = Network { dns: vec![[1, 1, 1, 1].into(), [9, 9, 9, 9].into()], ..full.clone() };
        let keys = [
            ("address", "10.0.0.1/31"),
            ("gateway", "10.0.0.0"),
            ("mtu", "9000"),
            ("dns", "1.1.1.1"),
            ("dns", "9.9.9.9"),
        ];
        assert_eq!(parse(&keys), Ok(Some(named)));
        assert_eq!(parse(&[("address", "10.0.0.1/31"), ("dns", "a")]), Err("BAD_ARGUMENT".into()));
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
        let mut route = Socket::open(Family::Route).unwrap();
        let found = addresses(&mut route, lo).unwrap();
        assert!(found.contains(&(Ipv4Addr::LOCALHOST, 8)), "{found:?}");
        assert!(!addresses(&mut route, u32::MAX).unwrap().contains(&(Ipv4Addr::LOCALHOST, 8)));
    }

    #[test]
    fn what_the_kernel_refuses_is_an_error() {
        let unknown = about(libc::RTM_NEWADDR, 0, u32::MAX, Ipv4Addr::LOCALHOST, 8);
        assert!(Socket::open(Family::Route).unwrap().ask(&unknown).is_err());
    }

    #[test]
    fn open_connections_are_found_by_their_address() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut sockets = Socket::open(Family::Sockets).unwrap();
        let all = Request::new(SOCK_DIAG_BY_FAMILY, 0, &about_sockets(&[0; SOCKET_ID]), Attributes::new());
        let found = sockets.dump(&all, |found: &mut Vec<_>, m| found.extend(parse_socket(m.payload))).unwrap();
        let port = client.local_addr().unwrap().port().to_be_bytes();
        assert!(found.iter().any(|(address, id)| *address == Ipv4Addr::LOCALHOST && id[..2] == port));
        // Those that listen have no peer.
        let port = listener.local_addr().unwrap().port().to_be_bytes();
        assert!(!found.iter().any(|(_, id)| id[..2] == port && id[2..4] == [0, 0]));
        // None of an address that nobody has.
        end_connections(&[Ipv4Addr::new(192, 0, 2, 1)]).unwrap();
        assert_eq!(parse_socket(&[0; 51]), None);
    }

    #[test]
    fn a_cut_address_is_none() {
        let address = Attributes::new().octets(libc::IFA_LOCAL, &[127, 0, 0, 1]);
        let own = [&[2, 8, 0, 0, 7, 0, 0, 0], address.as_octets()].concat();
        assert_eq!(parse_address(7, &own), Some((Ipv4Addr::LOCALHOST, 8)));
        (0..16).for_each(|len| assert_eq!(parse_address(7, &own[..len]), None));
        assert_eq!(parse_address(8, &own), None);
    }
}
