//! The sockets of the agent link: AF_VSOCK inside a sandbox, a Unix socket or a character device elsewhere.

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, VsockAddr, accept4, bind, connect, getpeername, getsockopt,
    listen, send, socket, sockopt,
};

/// Port of the agent, on the guest's address (the agent listens) and on the host's (the agent connects at boot).
pub(super) const AGENT_PORT: u32 = 1024;

fn vsock() -> nix::Result<OwnedFd> {
    socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)
}

/// Listens on `AGENT_PORT` of this guest.
pub(super) fn listen_vsock() -> nix::Result<OwnedFd> {
    let listener = vsock()?;
    bind(listener.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, AGENT_PORT))?;
    listen(&listener, Backlog::new(64)?)?;
    Ok(listener)
}

/// Starts to connect to `AGENT_PORT` of the host; the connection is there when the socket becomes writable.
pub(super) fn connect_to_host() -> nix::Result<OwnedFd> {
    let uplink = vsock()?;
    // Where it cannot be had, a call that nobody takes is merely made again later.
    let _ = wait_as_long_as_the_host(&uplink);
    match connect(uplink.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_HOST, AGENT_PORT)) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(uplink),
        Err(errno) => Err(errno),
    }
}

/// The host holds a call for some seconds before it turns it away (`HELD_PORT` of the worker's vsock device). One that is
/// given up here before that, by default after 2 s, would be taken there and lead nowhere: the kernel does not take it back.
fn wait_as_long_as_the_host(uplink: &OwnedFd) -> nix::Result<()> {
    // <linux/vm_sockets.h>
    const SO_VM_SOCKETS_CONNECT_TIMEOUT: libc::c_int = 6;
    let patience = libc::timeval { tv_sec: 60, tv_usec: 0 };
    // SAFETY: the descriptor is open, and the option's value is a timeval that outlives the call.
    let result = unsafe {
        libc::setsockopt(
            uplink.as_raw_fd(),
            libc::AF_VSOCK,
            SO_VM_SOCKETS_CONNECT_TIMEOUT,
            (&raw const patience).cast(),
            size_of_val(&patience) as libc::socklen_t,
        )
    };
    Errno::result(result).map(drop)
}

/// Takes the next connection, `None` when there is none for now.
///
/// A vsock peer other than the host is turned away: a program in the sandbox that reached the agent
/// would be root by it.
pub(super) fn accept(listener: BorrowedFd<'_>, from_host_only: bool) -> nix::Result<Option<File>> {
    loop {
        let stream = match accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK) {
            // SAFETY: accept4 has just made this descriptor and nothing else owns it.
            Ok(fd) => unsafe { File::from_raw_fd(fd) },
            Err(Errno::EAGAIN) => return Ok(None),
            Err(Errno::EINTR | Errno::ECONNABORTED) => continue,
            Err(errno) => return Err(errno),
        };
        if from_host_only {
            match getpeername::<VsockAddr>(stream.as_raw_fd()) {
                Ok(peer) if peer.cid() == libc::VMADDR_CID_HOST => {}
                _ => continue,
            }
        }
        return Ok(Some(stream));
    }
}

/// Whether a connection under way was made; `Ok(false)` while it is not yet decided.
pub(super) fn connected(socket: BorrowedFd<'_>) -> nix::Result<bool> {
    match getsockopt(&socket, sockopt::SocketError)? {
        0 => match getpeername::<VsockAddr>(socket.as_raw_fd()) {
            Ok(_) => Ok(true),
            Err(Errno::ENOTCONN) => Ok(false),
            Err(errno) => Err(errno),
        },
        errno => Err(Errno::from_raw(errno)),
    }
}

/// Sends octets over a connection that may still be under way. `false`: nothing was sent, try again later.
pub(super) fn try_send(socket: BorrowedFd<'_>, octets: &[u8]) -> bool {
    send(socket.as_raw_fd(), octets, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) == Ok(octets.len())
}
