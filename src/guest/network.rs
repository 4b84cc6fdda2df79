//! The network interface, set by rtnetlink (rtnetlink(7)): no program is started for it, so that a clone has its own
//! address at once.

use std::net::Ipv4Addr;

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
        let failed = |what: &'static str| {
            move |error: KernelError| {
                let errno = format!("{:?}", error.errno);
                Error::new(Code::Internal, error.during(what).to_string()).with("errno", errno)
            }
        };
        // SAFETY: the name is a C string, which the call only reads.
        let index = unsafe { libc::if_nametoindex(INTERFACE.as_ptr()) };
        if index == 0 {
            return Err(Error::new(Code::BadState, "the sandbox has no network device"));
        }
        let route = Socket::open(Family::Route).map_err(KernelError::from);
        let mut route = route.map_err(failed("open the kernel's routing socket"))?;
        let mut link = vec![0; 16]; // struct ifinfomsg
        link[4..8].copy_from_slice(&index.to_ne_bytes());
        link[8..12].copy_from_slice(&(libc::IFF_UP as u32).to_ne_bytes());
        link[12..16].copy_from_slice(&(libc::IFF_UP as u32).to_ne_bytes());
        let mtu = self.mtu.iter().fold(Attributes::new(), |all, mtu| all.native32(libc::IFLA_MTU, *mtu));
        let on = Request::new(libc::RTM_NEWLINK, 0, &link, mtu);
        route.ask(&on).map_err(failed("switch the network interface on"))?;
        // An address that goes takes its routes along, so this comes first.
        for (other, prefix) in addresses(&mut route, index).map_err(failed("list the interface's addresses"))? {
            if (other, prefix) != (self.address, self.prefix) {
                let gone = about(libc::RTM_DELADDR, 0, index, other, prefix);
                route.ask(&gone).map_err(failed("take an address from the interface"))?;
            }
        }
        let own = about(libc::RTM_NEWADDR, CREATE | REPLACE, index, self.address, self.prefix);
        route.ask(&own).map_err(failed("give the interface its address"))?;
        if let Some(gateway) = self.gateway {
            let mut default = vec![0; 12]; // struct rtmsg
            default[0] = libc::AF_INET as u8;
            default[4] = libc::RT_TABLE_MAIN;
            default[5] = libc::RTPROT_STATIC;
            default[6] = libc::RT_SCOPE_UNIVERSE;
            default[7] = libc::RTN_UNICAST;
            // The gateway need not be inside the address' own network.
            default[8..12].copy_from_slice(&RTNH_F_ONLINK.to_ne_bytes());
            let to = Attributes::new().octets(libc::RTA_GATEWAY, &gateway.octets()).native32(libc::RTA_OIF, index);
            let request = Request::new(libc::RTM_NEWROUTE, CREATE | REPLACE, &default, to);
            route.ask(&request).map_err(failed("set the default route"))?;
        }
        self.name_servers().map_err(|e| Error::new(Code::Internal, format!("cannot write {RESOLV_CONF}: {e}")))
    }

    /// Writes the name servers down where there are any, in place of a template's own: those are of another network.
    fn name_servers(&self) -> std::io::Result<()> {
        let text: String = self.dns.iter().map(|server| format!("nameserver {server}\n")).collect();
        if text.is_empty() || std::fs::read(RESOLV_CONF).is_ok_and(|found| found == text.as_bytes()) {
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
    fn a_cut_address_is_none() {
        let address = Attributes::new().octets(libc::IFA_LOCAL, &[127, 0, 0, 1]);
        let own = [&[2, 8, 0, 0, 7, 0, 0, 0], address.as_octets()].concat();
        assert_eq!(parse_address(7, &own), Some((Ipv4Addr::LOCALHOST, 8)));
        (0..16).for_each(|len| assert_eq!(parse_address(7, &own[..len]), None));
        assert_eq!(parse_address(8, &own), None);
    }
}
