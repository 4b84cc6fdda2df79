//! TAP devices as the node makes them (Documentation/networking/tuntap.rst).
//!
//! A device is there for as long as its queue is open somewhere: here while it is in the pool, in the worker as well
//! while a sandbox has it. So a supervisor that is killed takes its unused devices along, and a sandbox goes on.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

/// Frames that are taken out of a queue at most; it holds fewer.
const DRAIN: usize = 4096;

/// Makes a TAP device with virtio-net headers, down and without an address. Fails where there is one by that name.
pub fn create(name: &str) -> io::Result<File> {
    let file = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    // SAFETY: an ifreq is plain data, for which zeroes are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.is_empty() || name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes an ifreq, which lives through the call.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

/// Throws away the frames that wait for a guest: they were another one's.
pub fn drain(mut tap: &File) -> io::Result<()> {
    let mut frame = [0; 64];
    for _ in 0..DRAIN {
        match tap.read(&mut frame) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            // A frame that is longer than the buffer is gone with what was read of it.
            other => drop(other?),
        }
    }
    Err(io::Error::other(format!("{DRAIN} frames and still no end")))
}
