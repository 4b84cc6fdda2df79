//! The loopback interface.

use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// Brings `lo` up. A kernel without the Internet protocols has none, which is no error.
pub(super) fn up() -> nix::Result<()> {
    let socket = match socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None) {
        Ok(socket) => socket,
        Err(Errno::EAFNOSUPPORT) => return Ok(()),
        Err(errno) => return Err(errno),
    };
    // SAFETY: ifreq is plain data for which all zeros is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the socket is open and `request` is a whole ifreq that the kernel only reads here.
    Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) }).map(drop)
}

/// Gives `lo` an address beside its own, as an alias (netdevice(7)): of this host alone.
pub(super) fn add(address: Ipv4Addr) -> nix::Result<()> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let set = |order: libc::Ioctl, value: Ipv4Addr| {
        // SAFETY: ifreq is plain data for which all zeros is a valid value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(b"lo:1") {
            *to = *from as libc::c_char;
        }
        let [a, b, c, d] = value.octets().map(|octet| octet as libc::c_char);
        let port = [0; 2];
        request.ifr_ifru.ifru_addr = libc::sockaddr {
            sa_family: libc::AF_INET as libc::sa_family_t,
            sa_data: [port[0], port[1], a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0],
        };
        // SAFETY: the socket is open and `request` is a whole ifreq that the kernel only reads here.
        Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), order, &request) }).map(drop)
    };
    set(libc::SIOCSIFADDR, address)?;
    set(libc::SIOCSIFNETMASK, Ipv4Addr::BROADCAST)
}
