//! What a sandbox may reach.
//!
//! Nothing that is not the public internet, whatever a request says: `SPECIAL`. Of the rest, what the sandbox's lists
//! leave. The same rule is written twice, as `permits` for one address and as `ranges` for the kernel's sets, and a test
//! holds them together.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddrV4};

use super::cidr::Cidr;

/// Addresses that are not the public internet, with the RFC that says so: the IANA registry of special-purpose
/// addresses (RFC 6890), and multicast. No sandbox reaches any of them.
pub const SPECIAL: &[(Cidr, &str)] = &[
    (Cidr::new([0, 0, 0, 0], 8), "this network, RFC 791"),
    (Cidr::new([10, 0, 0, 0], 8), "private use, RFC 1918"),
    (Cidr::new([100, 64, 0, 0], 10), "shared by carriers, RFC 6598"),
    (Cidr::new([127, 0, 0, 0], 8), "loopback, RFC 1122"),
    (Cidr::new([169, 254, 0, 0], 16), "link local, RFC 3927"),
    (Cidr::new([172, 16, 0, 0], 12), "private use, RFC 1918"),
    (Cidr::new([192, 0, 0, 0], 24), "protocol assignments, RFC 6890"),
    (Cidr::new([192, 0, 2, 0], 24), "documentation, RFC 5737"),
    (Cidr::new([192, 88, 99, 0], 24), "6to4 relays, RFC 7526"),
    (Cidr::new([192, 168, 0, 0], 16), "private use, RFC 1918"),
    (Cidr::new([198, 18, 0, 0], 15), "measurements, RFC 2544"),
    (Cidr::new([198, 51, 100, 0], 24), "documentation, RFC 5737"),
    (Cidr::new([203, 0, 113, 0], 24), "documentation, RFC 5737"),
    (Cidr::new([224, 0, 0, 0], 4), "multicast, RFC 1112"),
    (Cidr::new([240, 0, 0, 0], 4), "reserved and broadcast, RFC 1112 and RFC 919"),
];

/// Of the special ones, those that a policy may reach single services in: a company's own networks.
const PRIVATE: &[Cidr] = &[
    Cidr::new([10, 0, 0, 0], 8),
    Cidr::new([100, 64, 0, 0], 10),
    Cidr::new([172, 16, 0, 0], 12),
    Cidr::new([192, 168, 0, 0], 16),
];

/// Most ranges in the two lists of a policy together.
pub const MAX_RANGES: usize = 512;

/// Why an address can never be reached, where it is special.
pub fn special(range: Cidr) -> Option<&'static str> {
    SPECIAL.iter().find(|(special, _)| special.covers(range)).map(|(_, why)| *why)
}

/// Why no policy reaches a service at an address, private or not.
pub fn no_service_at(address: Ipv4Addr) -> Option<&'static str> {
    let one = Cidr::new(address.octets(), 32);
    special(one).filter(|_| !PRIVATE.iter().any(|range| range.contains(address)))
}

/// What of the public internet a sandbox may reach. Of the ranges in both lists that hold an address, the longest prefix
/// decides; an address in none of them is reachable where nothing is allowed expressly.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Policy {
    /// Anything at all.
    pub on: bool,
    allow: BTreeSet<Cidr>,
    deny: BTreeSet<Cidr>,
    /// TCP services that it reaches beside all that, private ones too: the index of packages that a builder installs. No
    /// request of a client's gives any, and nothing keeps them.
    services: BTreeSet<SocketAddrV4>,
}

/// Why lists were refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadPolicy {
    /// `allow` or `deny`.
    pub list: &'static str,
    /// A sentence that names the range.
    pub message: String,
}

impl Policy {
    /// No network.
    pub fn off() -> Self {
        Self::default()
    }

    /// With these lists.
    pub fn on(allow: BTreeSet<Cidr>, deny: BTreeSet<Cidr>) -> Result<Self, BadPolicy> {
        let bad = |list, message| Err(BadPolicy { list, message });
        for range in &allow {
            if let Some(why) = special(*range) {
                return bad("allow", format!("{range} can never be reached: {why}"));
            }
            if deny.contains(range) {
                return bad("deny", format!("{range} is both allowed and denied"));
            }
        }
        if allow.len() + deny.len() > MAX_RANGES {
            let count = allow.len() + deny.len();
            return bad("allow", format!("{count} ranges are over the limit of {MAX_RANGES} in both lists"));
        }
        Ok(Self { on: true, allow, deny, services: BTreeSet::new() })
    }

    /// The same with services that it reaches besides.
    pub fn with_services(self, services: BTreeSet<SocketAddrV4>) -> Result<Self, BadPolicy> {
        if let Some((service, why)) = services.iter().find_map(|service| Some((service, no_service_at(*service.ip())?)))
        {
            return Err(BadPolicy { list: "service", message: format!("{service} can never be reached: {why}") });
        }
        Ok(Self { services, ..self })
    }

    /// Services that are reached beside what the lists leave.
    pub fn services(&self) -> impl Iterator<Item = SocketAddrV4> {
        self.services.iter().copied().filter(|_| self.on)
    }

    /// What is allowed expressly.
    pub fn allow(&self) -> impl Iterator<Item = Cidr> {
        self.allow.iter().copied()
    }

    /// What is denied expressly.
    pub fn deny(&self) -> impl Iterator<Item = Cidr> {
        self.deny.iter().copied()
    }

    /// Whether all of the public internet may be reached.
    pub fn is_open(&self) -> bool {
        self.on && self.allow.is_empty() && self.deny.is_empty()
    }

    /// Whether the lists leave this address; that it may be special is not asked here.
    fn listed(&self, address: Ipv4Addr) -> bool {
        let allowed = self.allow.iter().map(|range| (range, true));
        let denied = self.deny.iter().map(|range| (range, false));
        let holding = allowed.chain(denied).filter(|(range, _)| range.contains(address));
        holding.max_by_key(|(range, _)| range.prefix()).map_or(self.allow.is_empty(), |(_, allowed)| allowed)
    }

    /// Whether a connection to this address may be one that the policy permits: ports are not asked for.
    pub fn may_permit(&self, address: Ipv4Addr, never: &[Cidr]) -> bool {
        self.permits(address, never) || self.services().any(|service| *service.ip() == address)
    }

    /// Whether a packet to this address may leave, whatever its port. `never` are ranges that the node keeps from all sandboxes beside the
    /// special ones.
    pub fn permits(&self, address: Ipv4Addr, never: &[Cidr]) -> bool {
        let one = Cidr::new(address.octets(), 32);
        self.on && special(one).is_none() && !never.iter().any(|range| range.contains(address)) && self.listed(address)
    }

    /// What the lists leave, as first and last addresses of ranges that neither touch nor overlap, in order.
    pub fn ranges(&self) -> Vec<(Ipv4Addr, Ipv4Addr)> {
        if !self.on {
            return Vec::new();
        }
        // Between two neighbouring edges all addresses fare alike.
        let mut edges = BTreeSet::from([0u64, 1 << 32]);
        for range in self.allow.iter().chain(&self.deny) {
            edges.extend([u64::from(u32::from(range.first())), u64::from(u32::from(range.last())) + 1]);
        }
        let edges: Vec<u64> = edges.into_iter().collect();
        let mut found: Vec<(u64, u64)> = Vec::new();
        for pair in edges.windows(2) {
            let (begin, end) = (pair[0], pair[1]);
            if !self.listed(Ipv4Addr::from(begin as u32)) {
                continue;
            }
            match found.last_mut() {
                Some((_, last)) if *last == begin => *last = end,
                _ => found.push((begin, end)),
            }
        }
        found.into_iter().map(|(begin, end)| ((begin as u32).into(), ((end - 1) as u32).into())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(allow: &[&str], deny: &[&str]) -> Policy {
        let list = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        Policy::on(list(allow), list(deny)).unwrap()
    }

    #[test]
    fn nothing_special_is_ever_reached() {
        let open = policy(&[], &[]);
        for address in [
            "0.1.2.3",
            "10.0.0.1",
            "100.64.0.1",
            "127.0.0.1",
            "169.254.169.254",
            "172.31.255.255",
            "192.0.0.8",
            "192.168.1.1",
            "198.19.0.1",
            "203.0.113.9",
            "224.0.0.1",
            "239.1.1.1",
            "255.255.255.255",
        ] {
            assert!(!open.permits(address.parse().unwrap(), &[]), "{address}");
        }
        for address in ["1.1.1.1", "9.255.255.255", "11.0.0.0", "172.15.255.255", "172.32.0.0", "223.255.255.255"] {
            assert!(open.permits(address.parse().unwrap(), &[]), "{address}");
            assert!(!Policy::off().permits(address.parse().unwrap(), &[]), "{address}");
        }
        assert!(!open.permits([1, 1, 1, 1].into(), &["1.1.0.0/16".parse().unwrap()]));
    }

    #[test]
    fn the_longest_prefix_decides() {
        let only = policy(&["93.184.216.0/24"], &[]);
        assert!(only.permits([93, 184, 216, 34].into(), &[]) && !only.permits([1, 1, 1, 1].into(), &[]));
        let not = policy(&[], &["93.184.216.0/24"]);
        assert!(!not.permits([93, 184, 216, 34].into(), &[]) && not.permits([1, 1, 1, 1].into(), &[]));
        let both = policy(&["8.8.8.0/24", "8.8.4.4/32"], &["8.0.0.0/8", "8.8.8.9/32"]);
        assert!(both.permits([8, 8, 8, 8].into(), &[]) && both.permits([8, 8, 4, 4].into(), &[]));
        assert!(!both.permits([8, 8, 8, 9].into(), &[]) && !both.permits([8, 1, 1, 1].into(), &[]));
        assert!(!both.permits([1, 1, 1, 1].into(), &[]), "something is allowed expressly");
    }

    #[test]
    fn a_service_may_be_private_and_is_neither_the_node_nor_a_link() {
        let with = |text: &str| {
            Policy::on(BTreeSet::new(), BTreeSet::new()).unwrap().with_services(BTreeSet::from([text.parse().unwrap()]))
        };
        for service in ["10.1.2.3:443", "172.31.0.1:80", "192.168.1.1:8080", "100.64.0.1:80", "1.2.3.4:443"] {
            let policy = with(service).unwrap();
            let address = *service.parse::<SocketAddrV4>().unwrap().ip();
            assert!(policy.may_permit(address, &[]), "{service}");
            assert_eq!(policy.permits(address, &[]), special(Cidr::new(address.octets(), 32)).is_none(), "{service}");
        }
        for service in
            ["127.0.0.1:80", "169.254.169.254:80", "0.0.0.0:80", "224.0.0.1:80", "255.255.255.255:80", "198.18.0.1:80"]
        {
            assert_eq!(with(service).unwrap_err().list, "service", "{service}");
        }
    }

    #[test]
    fn lists_that_make_no_sense_are_refused() {
        let list = |text: &str| BTreeSet::from([text.parse().unwrap()]);
        let error = Policy::on(list("10.1.0.0/16"), BTreeSet::new()).unwrap_err();
        assert_eq!(error.message, "10.1.0.0/16 can never be reached: private use, RFC 1918");
        assert_eq!(Policy::on(list("1.1.1.1"), list("1.1.1.1")).unwrap_err().list, "deny");
        let many = (0..600u32).map(|n| Cidr::new((0x0100_0000 + n).to_be_bytes(), 32)).collect();
        assert!(Policy::on(BTreeSet::new(), many).is_err());
        assert!(Policy::on(list("0.0.0.0/0"), list("10.0.0.0/8")).is_ok());
    }

    #[test]
    fn the_ranges_for_the_kernel_are_what_the_rule_permits() {
        assert_eq!(policy(&[], &[]).ranges(), [([0, 0, 0, 0].into(), [255, 255, 255, 255].into())]);
        assert_eq!(Policy::off().ranges(), []);
        assert_eq!(policy(&[], &["0.0.0.0/0"]).ranges(), []);
        assert_eq!(policy(&["1.0.0.0/31", "1.0.0.2/31"], &[]).ranges(), [([1, 0, 0, 0].into(), [1, 0, 0, 3].into())]);
        // Many lists of ranges that lie within each other.
        let mut state = 0x2545_f491_4f6c_dd1du64;
        let mut random = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for _ in 0..200 {
            let (mut allow, mut deny) = (BTreeSet::new(), BTreeSet::new());
            for _ in 0..random() % 12 {
                let range =
                    Cidr::new((0x0100_0000 | (random() as u32 & 0x3f)).to_be_bytes(), 26 + (random() % 7) as u8);
                let list = if random() % 2 == 0 { &mut allow } else { &mut deny };
                list.insert(range);
            }
            deny.retain(|range| !allow.contains(range));
            let policy = Policy::on(allow, deny).unwrap();
            let ranges = policy.ranges();
            for host in 0..=0x41u32 {
                let address = Ipv4Addr::from(0x0100_0000u32.wrapping_sub(1).wrapping_add(host));
                let in_ranges = ranges.iter().any(|(first, last)| (first..=last).contains(&&address));
                let one = Cidr::new(address.octets(), 32);
                assert_eq!(in_ranges && special(one).is_none(), policy.permits(address, &[]), "{address} {policy:?}");
            }
            assert!(ranges.windows(2).all(|pair| u32::from(pair[0].1) + 1 < u32::from(pair[1].0)), "{ranges:?}");
        }
    }
}
