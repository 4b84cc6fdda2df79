//! `network`: the node's packet policy, frame by frame and without guests: what a device that checked nothing could let
//! through. `network matrix`, `network change`, `network pool`, `network rules FILE`.
//!
//! Each runs in network namespaces of its own: one for the node with its TAP devices, one for all that is outside.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::process::Command;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use qemu_tests::rig::outside::{self, Outside};
use qemu_tests::rig::switch_on;
use qemu_tests::timing;
use warren::network::link;
use warren::network::netlink::{Attributes, CREATE, Family, Request, Socket};
use warren::network::plan::{NODE_MAC, Plan, Slot};
use warren::network::policy::{Policy, SPECIAL};
use warren::pool::Limits;

use warren::network::{Lease, Network, NetworkError, Report, Settings, conntrack};

use crate::frames::{Udp, VNET, arp, ethernet, ipv4, unreachable};

/// The node's address on its uplink, and the router beyond it.
const UPLINK: Ipv4Addr = Ipv4Addr::new(93, 0, 0, 1);
const ROUTER: Ipv4Addr = Ipv4Addr::new(93, 0, 0, 2);
const ROUTER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 99];
/// Hosts on the internet.
const HOST: Ipv4Addr = Ipv4Addr::new(1, 2, 3, 4);
const OTHER: Ipv4Addr = Ipv4Addr::new(5, 6, 7, 8);

/// A node with its network, and the outside.
struct Lab {
    network: Network,
    reports: Receiver<Report>,
    outside: Outside,
    uplink_mac: [u8; 6],
    run: std::path::PathBuf,
    marks: u16,
}

/// A guest as its TAP device sees it.
struct Guest {
    slot: Slot,
    tap: File,
}

impl Lab {
    fn new(name: &str, limits: Limits) -> Self {
        outside::new_namespace();
        // It has the settings of the node's own, which passes packets on already.
        fs::write("/proc/sys/net/ipv4/ip_forward", "0").expect("root may set it");
        // The uplink says nothing of its own accord, so that whatever comes out is a guest's.
        fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").expect("root may set it");
        outside::up("lo");
        let outside = Outside::beyond("up0");
        switch_on("up0", &format!("{UPLINK}/24"));
        let uplink = fs::read_to_string("/sys/class/net/up0/address");
        let uplink_mac = uplink.ok().and_then(|text| mac(text.trim())).unwrap_or_else(|| own_mac("up0"));
        let mut route = Socket::open(Family::Route).expect("a netlink socket");
        let index = link::index("up0").expect("it was made");
        // The router's hardware address, and that everything is behind it.
        let mut neighbour = vec![2, 0, 0, 0];
        neighbour.extend(index.to_ne_bytes());
        neighbour.extend([0x80, 0, 0, 1]);
        let attributes = Attributes::new().octets(1, &ROUTER.octets()).octets(2, &ROUTER_MAC);
        let request = Request::new(libc::RTM_NEWNEIGH, CREATE, &neighbour, attributes);
        route.ask(&request).expect("a neighbour");
        let default = [2, 0, 0, 0, 254, 4, 0, 1, 0, 0, 0, 0];
        let attributes = Attributes::new().octets(libc::RTA_GATEWAY, &ROUTER.octets()).native32(libc::RTA_OIF, index);
        route.ask(&Request::new(libc::RTM_NEWROUTE, CREATE, &default, attributes)).expect("a default route");
        let run = std::env::temp_dir().join(format!("rig-network-{name}-{}", std::process::id()));
        fs::create_dir_all(&run).expect("the node has a temporary directory");
        let plan = Plan::new("10.77.0.0/24".parse().expect("a range")).expect("a plan");
        let never = vec!["8.8.0.0/16".parse().expect("a range")];
        let (sender, reports) = channel();
        let settings = Settings { plan, limits, never, run: run.clone() };
        let network = Network::start(settings, Vec::new(), move |report| {
            // The lab may be over.
            let _ = sender.send(report);
        });
        Self { network: network.expect("a thread"), reports, outside, uplink_mac, run, marks: 0 }
    }

    fn report(&self) -> Report {
        self.reports.recv_timeout(timing::hang()).expect("each order is answered")
    }

    fn try_lease(&self, owner: &str, policy: Policy) -> Result<Guest, NetworkError> {
        self.network.lease(owner, policy);
        match self.report() {
            Report::Leased { owner: of, result } if of == owner => {
                result.map(|Lease { slot, tap }| Guest { slot, tap })
            }
            other => panic!("{other:?}"),
        }
    }

    fn guest(&self, owner: &str, policy: Policy) -> Guest {
        self.try_lease(owner, policy).unwrap_or_else(|e| panic!("{owner} gets no slot: {e}"))
    }

    fn release(&self, owner: &str) {
        self.network.release(owner);
        assert!(matches!(self.report(), Report::Released { owner: of } if of == owner));
    }

    fn change(&self, owner: &str, policy: Policy) -> usize {
        self.network.change(owner, policy, 7);
        match self.report() {
            Report::Changed { result, ticket: 7, .. } => result.unwrap_or_else(|e| panic!("{owner}: {e}")),
            other => panic!("{other:?}"),
        }
    }

    /// A payload that no other frame has.
    fn mark(&mut self) -> Vec<u8> {
        self.marks += 1;
        format!("mark {:05}", self.marks).into_bytes()
    }

    /// Sends frames as a guest and then a datagram that passes. Gives what came out before that.
    fn sent_before_mark(&mut self, guest: &Guest, frames: &[Vec<u8>]) -> Vec<Vec<u8>> {
        frames.iter().for_each(|frame| guest.send(frame));
        let mark = guest.udp(HOST, &self.mark());
        guest.send(&mark.frame());
        let mut before = Vec::new();
        loop {
            let Some(frame) = self.outside.receive(timing::hang()) else { panic!("the mark does not come out") };
            match Udp::parse(&frame) {
                Some(udp) if udp.payload == mark.payload => {
                    assert_eq!((udp.from, udp.to), (UPLINK, HOST), "it has the node's own address");
                    return before;
                }
                _ => before.push(frame),
            }
        }
    }

    /// The frame goes nowhere.
    fn stays(&mut self, what: &str, guest: &Guest, frame: Vec<u8>) {
        let out = self.sent_before_mark(guest, &[frame]);
        assert!(out.is_empty(), "{what} came out: {out:02x?}");
    }

    /// The datagram comes out with the node's address. Gives the port that it comes from.
    fn passes(&mut self, what: &str, guest: &Guest, to: Ipv4Addr) -> u16 {
        let payload = self.mark();
        let out = self.sent_before_mark(guest, &[guest.udp(to, &payload).frame()]);
        let out: Vec<Udp> = out.iter().filter_map(|frame| Udp::parse(frame)).collect();
        match &out[..] {
            [udp] if udp.payload == payload && udp.from == UPLINK && udp.to == to => udp.ports.0,
            other => panic!("{what}: {other:?}"),
        }
    }

    /// A datagram from outside to a port of the node's own address.
    fn answer(&self, from: Ipv4Addr, port: u16, payload: &[u8]) -> Udp {
        Udp {
            to_mac: self.uplink_mac,
            from_mac: ROUTER_MAC,
            from,
            to: UPLINK,
            ports: (53, port),
            payload: payload.to_vec(),
        }
    }

    /// What the guest gets until an answer that passes; `frames` are sent from outside before that.
    fn received_before_mark(&mut self, guest: &Guest, frames: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let payload = self.mark();
        let port = self.passes("a question", guest, HOST);
        frames.iter().for_each(|frame| self.outside.send(frame));
        self.outside.send(&self.answer(HOST, port, &payload).frame());
        let mut before = Vec::new();
        loop {
            let frame = guest.receive();
            match Udp::parse(&frame) {
                Some(udp) if udp.payload == payload => {
                    assert_eq!((udp.from, udp.to, udp.to_mac), (HOST, guest.slot.guest, guest.slot.mac));
                    return before;
                }
                _ => before.push(frame),
            }
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.run);
    }
}

impl Guest {
    fn send(&self, frame: &[u8]) {
        let octets = [&[0; VNET][..], frame].concat();
        let sent = (&self.tap).write(&octets).expect("a TAP device takes a frame");
        assert_eq!(sent, octets.len());
    }

    /// The next frame to the guest.
    fn receive(&self) -> Vec<u8> {
        self.try_receive(timing::hang()).expect("a frame to the guest")
    }

    fn try_receive(&self, within: Duration) -> Option<Vec<u8>> {
        use std::os::fd::AsRawFd;
        let mut poll = libc::pollfd { fd: self.tap.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let milliseconds = i32::try_from(within.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: one pollfd is given, and it lives through the call.
        if unsafe { libc::poll(&raw mut poll, 1, milliseconds) } <= 0 {
            return None;
        }
        let mut octets = vec![0; 65_536];
        let len = (&self.tap).read(&mut octets).ok()?;
        octets.get(VNET..len).map(<[u8]>::to_vec)
    }

    fn udp(&self, to: Ipv4Addr, payload: &[u8]) -> Udp {
        let (from_mac, from) = (self.slot.mac, self.slot.guest);
        // A port of its own, which the node keeps when it puts its own address in.
        let port = 4000 + self.slot.number as u16;
        Udp { to_mac: NODE_MAC, from_mac, from, to, ports: (port, 53), payload: payload.to_vec() }
    }

    /// Nothing waits for the guest.
    fn assert_quiet(&self, what: &str) {
        let got = self.try_receive(Duration::ZERO);
        assert!(got.is_none(), "{what}: {got:02x?}");
    }
}

fn mac(text: &str) -> Option<[u8; 6]> {
    let octets: Vec<u8> = text.split(':').filter_map(|part| u8::from_str_radix(part, 16).ok()).collect();
    octets.try_into().ok()
}

/// /sys may show the devices of another namespace: by SIOCGIFHWADDR.
fn own_mac(name: &str) -> [u8; 6] {
    use std::os::fd::AsRawFd;
    let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
    // SAFETY: an ifreq is plain data, for which zeroes are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // SAFETY: SIOCGIFHWADDR reads and writes an ifreq, which lives through the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFHWADDR, &raw mut request) };
    assert_eq!(result, 0, "{name}: {}", std::io::Error::last_os_error());
    // SAFETY: the call filled this member of the union.
    let address = unsafe { request.ifr_ifru.ifru_hwaddr.sa_data };
    std::array::from_fn(|n| address[n] as u8)
}

fn limits() -> Limits {
    let hour = Duration::from_secs(3600);
    Limits { min_ready: 1, max: 8, idle: hour, age: hour, wait: timing::hang() }
}

fn policy(allow: &[&str], deny: &[&str]) -> Policy {
    let list = |texts: &[&str]| texts.iter().map(|text| text.parse().expect("a range")).collect();
    Policy::on(list(allow), list(deny)).expect("lists that make sense")
}

pub fn run(arguments: &[&str]) {
    match arguments {
        ["matrix"] => matrix(),
        ["change"] => change(),
        ["pool"] => pool(),
        ["rules", file] => rules(file),
        ["flows", address] => {
            let mut netfilter = Socket::open(Family::Netfilter).expect("a netlink socket");
            let address = address.parse().expect("an address");
            println!("{}", conntrack::list(&mut netfilter, Some(address)).expect("a list").len());
        }
        _ => panic!("usage: vm-rig network matrix | change | pool | rules FILE | flows ADDRESS"),
    }
}

/// Everything that a guest may try.
fn matrix() {
    let mut lab = Lab::new("matrix", limits());
    let (a, b) = (lab.guest("a", policy(&[], &[])), lab.guest("b", policy(&[], &[])));
    let from_a = |to: Ipv4Addr| a.udp(to, b"x").frame();

    // The internet, and its answers.
    lab.passes("to the internet", &a, OTHER);
    assert!(lab.received_before_mark(&a, &[]).is_empty());
    println!("public: passed, with the node's address, and answered");

    // From outside without a question: to the guest's own address, and to another port of the node's.
    let to_guest = Udp { to: a.slot.guest, ..lab.answer(HOST, 4000, b"in") };
    let elsewhere = Udp { to: Ipv4Addr::new(99, 9, 9, 9), ..lab.answer(HOST, 4000, b"on") };
    let unasked = [to_guest.frame(), lab.answer(OTHER, 999, b"in").frame(), elsewhere.frame()];
    assert!(lab.received_before_mark(&a, &unasked).is_empty(), "unasked");
    // The node itself says that nobody listens at its own address; that is all.
    let out = lab.sent_before_mark(&a, &[]);
    assert!(out.iter().all(|frame| frame[23] == 1 && frame[26..30] == UPLINK.octets()), "{out:02x?}");
    lab.stays("a packet that is no sandbox's", &a, from_a(b.slot.guest));
    println!("from outside: answers only; the node passes nothing else on");

    // An error about a packet of its own.
    let port = lab.passes("to the internet", &a, OTHER);
    let about = Udp { from: UPLINK, to: OTHER, ports: (port, 53), ..a.udp(OTHER, b"12345678901") };
    let error = unreachable(ROUTER, UPLINK, &ipv4(about.from, about.to, 17, 0, &about.datagram()));
    let got = lab.received_before_mark(&a, &[ethernet(lab.uplink_mac, ROUTER_MAC, 0x0800, &error)]);
    assert!(got.len() == 1 && got[0][23] == 1 && got[0][30..34] == a.slot.guest.octets(), "{got:02x?}");
    println!("icmp error about its own packet: passed");

    // Another sandbox.
    lab.stays("to another sandbox", &a, from_a(b.slot.guest));
    let direct = Udp { to_mac: b.slot.mac, ..a.udp(b.slot.guest, b"x") };
    lab.stays("to another sandbox by its hardware address", &a, direct.frame());
    b.assert_quiet("from another sandbox");
    println!("other sandbox: dropped");

    // The node, whichever address of it.
    let service = UdpSocket::bind("0.0.0.0:53").expect("the node's own namespace has this port free");
    service.set_nonblocking(true).expect("a socket may be so");
    let local = UdpSocket::bind("0.0.0.0:0").expect("a socket");
    let port = service.local_addr().expect("it is bound").port();
    local.send_to(b"x", ("127.0.0.1", port)).expect("the node reaches itself");
    wait_for_datagram(&service);
    for to in [a.slot.node, b.slot.node, UPLINK, Ipv4Addr::LOCALHOST, Ipv4Addr::BROADCAST, [224, 0, 0, 1].into()] {
        lab.stays("to the node", &a, from_a(to));
    }
    for to in [[0xff; 6], [0x01, 0, 0x5e, 0, 0, 1]] {
        lab.stays("to the node", &a, Udp { to_mac: to, ..a.udp(a.slot.node, b"x") }.frame());
    }
    assert!(service.recv(&mut [0; 64]).is_err(), "the node's socket got something");
    println!("node: dropped, at each of its addresses");
    // And from the node, which is no sandbox's business either.
    let _ = local.send_to(b"x", (a.slot.guest, 53));
    assert!(lab.received_before_mark(&a, &[]).is_empty(), "from the node");

    // What is not the public internet, and what this node keeps from everybody.
    for (range, why) in SPECIAL {
        for to in [range.first(), range.last()] {
            lab.stays(why, &a, from_a(to));
        }
    }
    lab.stays("kept from everybody", &a, from_a([8, 8, 8, 8].into()));
    lab.stays("the plan's own range", &a, from_a([10, 77, 0, 200].into()));
    println!("private and special: dropped, {} ranges", SPECIAL.len());

    // Somebody else's addresses, which the guest's device would not even send.
    for from in [b.slot.guest, HOST, UPLINK, [10, 0, 0, 1].into(), Ipv4Addr::UNSPECIFIED] {
        lab.stays("from another address", &a, Udp { from, ..a.udp(OTHER, b"x") }.frame());
    }
    for from_mac in [b.slot.mac, NODE_MAC, [2, 0, 0, 0, 0, 1]] {
        lab.stays("from another hardware address", &a, Udp { from_mac, ..a.udp(OTHER, b"x") }.frame());
    }
    println!("spoofed address and hardware address: dropped");

    // Other protocols.
    let ipv6 = [&[0x60, 0, 0, 0, 0, 8, 17, 64][..], &[0x20; 32], &a.udp(HOST, b"").datagram()].concat();
    lab.stays("IPv6", &a, ethernet(NODE_MAC, a.slot.mac, 0x86dd, &ipv6));
    lab.stays("IPv6 to all", &a, ethernet([0x33, 0x33, 0, 0, 0, 1], a.slot.mac, 0x86dd, &ipv6));
    let tagged = [&[0, 5, 8, 0][..], &from_a(OTHER)[14..]].concat();
    lab.stays("VLAN", &a, ethernet(NODE_MAC, a.slot.mac, 0x8100, &tagged));
    a.assert_quiet("an answer to IPv6");
    println!("IPv6, VLAN: dropped");

    // Who has which address: the gateway's is told, and no other.
    for whose in [UPLINK, b.slot.node, b.slot.guest, ROUTER] {
        a.send(&arp(a.slot.mac, a.slot.guest, whose));
    }
    assert!(lab.received_before_mark(&a, &[]).is_empty(), "an answer about another's address");
    a.send(&arp(a.slot.mac, a.slot.guest, a.slot.node));
    let answer = a.receive();
    assert_eq!((answer[12..14].to_vec(), answer[22..28].to_vec()), (vec![8, 6], NODE_MAC.to_vec()));
    // A lie about another's address changes nothing.
    a.send(&arp(a.slot.mac, b.slot.guest, a.slot.node));
    a.send(&arp([2, 9, 9, 9, 9, 9], a.slot.guest, a.slot.node));
    assert!(lab.received_before_mark(&b, &[]).is_empty());
    lab.received_before_mark(&a, &[]);
    println!("ARP: answered for the gateway only, believed never");

    // Fragments: whole when they leave, checked when they arrive.
    let big = a.udp(OTHER, &[0x5a; 2000]);
    let out = lab.sent_before_mark(&a, &big.fragments(1024));
    let octets: usize = out.iter().map(|frame| frame.len() - 34).sum();
    assert!(out.len() == 2 && octets == 2008, "{out:02x?}");
    assert!(out.iter().all(|frame| frame[26..30] == UPLINK.octets()), "all have the node's address: {out:02x?}");
    for to in [b.slot.guest, [192, 168, 1, 1].into()] {
        let out = lab.sent_before_mark(&a, &a.udp(to, &[0x5a; 2000]).fragments(1024));
        assert!(out.is_empty(), "fragments to {to}: {out:02x?}");
    }
    let mut spoofed = big.fragments(1024);
    spoofed[1] = Udp { from: b.slot.guest, ..big.clone() }.fragments(1024).remove(1);
    let out = lab.sent_before_mark(&a, &spoofed);
    assert!(out.is_empty(), "a fragment from another address: {out:02x?}");
    b.assert_quiet("fragments");
    println!("fragments: as whole datagrams");
}

fn wait_for_datagram(socket: &UdpSocket) {
    timing::wait_for("a datagram", || socket.recv(&mut [0; 64]).ok());
}

/// Lists, live changes, what is left of one that is gone.
fn change() {
    let mut lab = Lab::new("change", limits());
    let a = lab.guest("a", policy(&["1.0.0.0/8", "5.6.7.0/24"], &["1.9.0.0/16", "5.6.7.9"]));
    let from_a = |to: [u8; 4]| a.udp(to.into(), b"x").frame();
    lab.passes("allowed", &a, OTHER);
    for to in [[1, 9, 0, 0], [1, 9, 255, 255], [5, 6, 7, 9], [5, 6, 6, 255], [5, 6, 8, 0], [2, 0, 0, 0], [8, 8, 8, 8]] {
        lab.stays("not allowed", &a, from_a(to));
    }
    for to in [[1, 0, 0, 0], [1, 8, 255, 255], [1, 10, 0, 0], [1, 255, 255, 255], [5, 6, 7, 10], [5, 6, 7, 255]] {
        lab.passes("allowed", &a, to.into());
    }
    println!("lists: hold, to the address");

    // What a change forbids ends with its answer: both directions.
    let port = lab.passes("allowed", &a, OTHER);
    let cut = lab.change("a", policy(&[], &["5.6.7.0/24"]));
    assert!(cut >= 1, "the flows to 5.6.7.8 and its neighbours");
    lab.stays("forbidden now", &a, from_a([5, 6, 7, 8]));
    let late = lab.answer(OTHER, port, b"late").frame();
    assert!(lab.received_before_mark(&a, &[late]).is_empty(), "an answer of a flow that was cut");
    lab.passes("allowed now", &a, [2, 0, 0, 1].into());
    assert_eq!(lab.change("a", policy(&[], &["5.6.7.0/24"])), 0, "the same again changes nothing");
    // Flows that may go on go on.
    let port = lab.passes("allowed", &a, HOST);
    lab.change("a", policy(&["1.2.3.0/24"], &[]));
    let payload = lab.mark();
    lab.outside.send(&lab.answer(HOST, port, &payload).frame());
    assert_eq!(Udp::parse(&a.receive()).map(|udp| udp.payload), Some(payload));
    println!("change: cuts what it forbids, {cut} flows, and nothing else");

    // Off and on again; another sandbox does not notice.
    let b = lab.guest("b", policy(&[], &[]));
    let port = lab.passes("allowed", &a, HOST);
    lab.change("a", Policy::off());
    let out = {
        a.send(&from_a(HOST.octets()));
        lab.sent_before_mark(&b, &[])
    };
    assert!(out.is_empty(), "off: {out:02x?}");
    let late = lab.answer(HOST, port, b"late").frame();
    assert!(lab.received_before_mark(&b, &[late]).is_empty());
    a.assert_quiet("off");
    lab.change("a", policy(&[], &[]));
    lab.passes("on again", &a, OTHER);
    println!("off: nothing, and on again");

    // Somebody throws the table away: it is put in place again at the next change.
    let flushed = nft().args(["delete", "table", "inet", "warren"]).status();
    if flushed.is_ok_and(|status| status.success()) {
        lab.change("a", policy(&[], &["2.0.0.0/8"]));
        lab.stays("forbidden", &a, from_a([2, 0, 0, 1]));
        lab.passes("allowed", &b, OTHER);
        println!("a table that was deleted: is there again");
    }

    // Nothing of a sandbox stays; its slot serves the next, who gets nothing of it.
    let port = lab.passes("allowed", &a, HOST);
    let number = a.slot.number;
    lab.release("a");
    let mut netfilter = Socket::open(Family::Netfilter).expect("a netlink socket");
    let flows = conntrack::list(&mut netfilter, Some(a.slot.guest)).expect("a list");
    assert!(flows.is_empty(), "{flows:?}");
    a.send(&from_a(HOST.octets()));
    assert!(lab.sent_before_mark(&b, &[]).is_empty(), "a slot that nobody has");
    let late = lab.answer(HOST, port, b"late").frame();
    lab.received_before_mark(&b, &[late]);
    let next = lab.guest("next", policy(&[], &[]));
    assert_eq!(next.slot.number, number, "the one that was used last serves next");
    next.assert_quiet("frames of the one before");
    lab.passes("the next", &next, OTHER);
    println!("gone: no flow, no rule, no frame is left");
}

/// What happens when there are no slots.
fn pool() {
    let wait = Duration::from_millis(300);
    let lab = Lab::new("pool", Limits { max: 2, wait, ..limits() });
    let (_a, _b) = (lab.guest("a", policy(&[], &[])), lab.guest("b", policy(&[], &[])));
    match lab.try_lease("c", policy(&[], &[])) {
        Err(NetworkError::Exhausted { max: 2, waited }) => assert_eq!(waited, wait),
        Err(other) => panic!("{other}"),
        Ok(guest) => panic!("a third of two: {:?}", guest.slot),
    }
    lab.release("a");
    let c = lab.guest("c", policy(&[], &[]));
    assert_eq!(c.slot.number, 0);
    lab.release("c");
    lab.release("b");
    lab.release("nobody");
    println!("pool: exhausted, refused, and again");
}

/// Debian's nft: as the tests put it on the node with its libraries, or this machine's own.
fn nft() -> Command {
    const PLACE: &str = "/test/nft";
    let loader = format!("{PLACE}/ld-linux-x86-64.so.2");
    if !std::path::Path::new(&loader).exists() {
        return Command::new("nft");
    }
    let mut command = Command::new(loader);
    command.args(["--library-path", PLACE, "/test/nft/nft.program"]);
    command
}

/// The table as Debian's nft lists it, beside the table that Debian's nft makes of a text.
fn rules(file: &str) {
    let lab = Lab::new("rules", limits());
    let _a = lab.guest("a", policy(&[], &[]));
    let services = BTreeSet::from(["10.0.0.5:8443".parse().expect("an address")]);
    let listed = policy(&["1.0.0.0/8", "5.6.7.0/24"], &["1.9.0.0/16"]).with_services(services);
    let _b = lab.guest("b", listed.expect("a private address may be a service"));
    let list = || {
        let output = nft().args(["-j", "-s", "list", "table", "inet", "warren"]).output().expect("nft runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("JSON")
    };
    let ours = list();
    // The text's own table takes its place: the interfaces that it names are here.
    let status = nft().args(["delete", "table", "inet", "warren"]).status().expect("nft runs");
    assert!(status.success());
    let output = nft().args(["-f", file]).output().expect("nft runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    println!("{}\n{}", ours.trim(), list().trim());
}
