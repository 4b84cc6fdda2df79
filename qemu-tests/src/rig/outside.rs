//! A network namespace that stands for everything beyond the node's uplink: one end of a pair of veth devices, and a
//! socket that sees and sends whatever frames pass there.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use warren::network::link;
use warren::network::netlink::{Attributes, CREATE, EXCL, Family, Request, Socket};

// <linux/if_link.h>, <linux/veth.h>
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
/// ETH_P_ALL in network order.
const EVERY_PROTOCOL: u16 = 0x0003_u16.to_be();

/// Makes a pair of veth devices: `name` here, `peer` in another network namespace.
///
/// # Panics
/// When the kernel refuses.
pub fn veth(name: &str, peer: &str, namespace: &File) {
    let other = Attributes::new()
        .text(IFLA_IFNAME, peer)
        .native32(IFLA_NET_NS_FD, u32::try_from(namespace.as_raw_fd()).expect("a descriptor is not negative"));
    let content = [&[0; 16], other.as_octets()].concat();
    let info = Attributes::new()
        .text(IFLA_INFO_KIND, "veth")
        .nest(IFLA_INFO_DATA, Attributes::new().octets(VETH_INFO_PEER, &content));
    let attributes = Attributes::new().text(IFLA_IFNAME, name).nest(IFLA_LINKINFO, info);
    let request = Request::new(libc::RTM_NEWLINK, CREATE | EXCL, &[0; 16], attributes);
    let mut route = Socket::open(Family::Route).expect("a netlink socket");
    route.ask(&request).unwrap_or_else(|e| panic!("veth {name}: {e}"));
}

/// Switches an interface of the caller's network namespace on.
///
/// # Panics
/// When the kernel refuses.
pub fn up(name: &str) {
    let index = link::index(name).unwrap_or_else(|| panic!("no interface {name}"));
    let mut content = [0; 16];
    content[4..8].copy_from_slice(&index.to_ne_bytes());
    content[8..12].copy_from_slice(&(libc::IFF_UP as u32).to_ne_bytes());
    content[12..16].copy_from_slice(&(libc::IFF_UP as u32).to_ne_bytes());
    let mut route = Socket::open(Family::Route).expect("a netlink socket");
    let request = Request::new(libc::RTM_NEWLINK, 0, &content, Attributes::new());
    route.ask(&request).unwrap_or_else(|e| panic!("{name} up: {e}"));
}

/// Leaves the caller's network namespace for a new one. Only of this thread, and of those that it starts later.
///
/// # Panics
/// When the kernel refuses.
pub fn new_namespace() -> File {
    // SAFETY: unshare takes flags and changes only this thread's namespace.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(result, 0, "unshare: {}", io::Error::last_os_error());
    File::open("/proc/thread-self/ns/net").expect("a thread has a network namespace")
}

/// Goes into a network namespace. Only this thread does.
///
/// # Panics
/// When the kernel refuses.
pub fn enter(namespace: &File) {
    // SAFETY: setns takes a descriptor that is open, and changes only this thread's namespace.
    let result = unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
    assert_eq!(result, 0, "setns: {}", io::Error::last_os_error());
}

/// Sees every frame of one interface and can send any.
#[derive(Debug)]
pub struct Outside {
    socket: OwnedFd,
    /// Its network namespace.
    pub namespace: File,
}

impl Outside {
    /// Joins the caller's network namespace by the interface `name` to a new one, where the other end has no address.
    ///
    /// # Panics
    /// When the kernel refuses.
    pub fn beyond(name: &str) -> Self {
        let (ready, made) = std::sync::mpsc::channel();
        let (go, joined) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            let namespace = new_namespace();
            ready.send(namespace.try_clone().expect("a descriptor can be copied")).expect("it is waited for");
            joined.recv().expect("the pair is made");
            std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").expect("root may set it");
            up("outer0");
            Self { socket: packet_socket("outer0"), namespace }
        });
        let namespace = made.recv().expect("a thread may have a network namespace");
        veth(name, "outer0", &namespace);
        go.send(()).expect("the thread waits");
        let outside = thread.join().expect("the outside is set up");
        up(name);
        outside
    }

    /// Sends a frame toward the node.
    ///
    /// # Panics
    /// When it cannot be sent.
    pub fn send(&self, frame: &[u8]) {
        // SAFETY: the descriptor is open and the frame is readable for its length.
        let sent = unsafe { libc::send(self.socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        assert_eq!(usize::try_from(sent), Ok(frame.len()), "{}", io::Error::last_os_error());
    }

    /// The next frame that came out of the node, within a time.
    pub fn receive(&self, within: Duration) -> Option<Vec<u8>> {
        let mut poll = libc::pollfd { fd: self.socket.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let milliseconds = i32::try_from(within.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: one pollfd is given, and it lives through the call.
        if unsafe { libc::poll(&raw mut poll, 1, milliseconds) } <= 0 {
            return None;
        }
        let mut frame = vec![0; 65_536];
        // SAFETY: an all-zero sockaddr_ll is valid; it is filled by the call.
        let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        let mut len = size_of_val(&from) as libc::socklen_t;
        // SAFETY: buffer and address are writable for the lengths that are given.
        let got = unsafe {
            libc::recvfrom(
                self.socket.as_raw_fd(),
                frame.as_mut_ptr().cast(),
                frame.len(),
                0,
                (&raw mut from).cast(),
                &raw mut len,
            )
        };
        frame.truncate(usize::try_from(got).ok()?);
        // What this socket sent itself is seen as well.
        if from.sll_pkttype == libc::PACKET_OUTGOING { self.receive(within) } else { Some(frame) }
    }
}

fn packet_socket(interface: &str) -> OwnedFd {
    // SAFETY: socket takes numbers and gives a new descriptor or -1.
    let socket =
        unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(EVERY_PROTOCOL)) };
    assert!(socket >= 0, "packet socket: {}", io::Error::last_os_error());
    // SAFETY: the kernel just made it, and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: an all-zero sockaddr_ll is valid.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = EVERY_PROTOCOL;
    address.sll_ifindex = link::index(interface).expect("the interface is there") as i32;
    // SAFETY: bind reads the address, which lives through the call, for its length.
    let bound = unsafe {
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as libc::socklen_t)
    };
    assert_eq!(bound, 0, "bind: {}", io::Error::last_os_error());
    socket
}
