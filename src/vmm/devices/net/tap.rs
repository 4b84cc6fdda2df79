//! A TAP device of the host as the other end of the guest's network device (Documentation/networking/tuntap.rst).

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use super::features::{self, HEADER};
use crate::vmm::memory::{self, GuestSlice};

/// The host's end: an open TAP queue with virtio-net headers.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    /// Its device takes `ioctl`s; a stand-in of a test does not.
    is_tap: bool,
    /// The host's kernel cuts UDP datagrams (Linux 6.2 and later).
    has_uso: bool,
}

impl Tap {
    /// Takes an open TAP queue: its flags have to be IFF_TAP, IFF_NO_PI and IFF_VNET_HDR. Fails with a sentence when
    /// the descriptor is something else.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        // SAFETY: ifreq is plain data for which all zeroes is a valid value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: the descriptor is open and TUNGETIFF writes one ifreq.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &raw mut request) })
            .map_err(|e| io::Error::new(e.kind(), format!("the descriptor is no TAP device: {e}")))?;
        // SAFETY: TUNGETIFF fills the flags of the union.
        let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags });
        let needed = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if flags & needed != needed {
            let kind = io::ErrorKind::InvalidInput;
            return Err(io::Error::new(kind, format!("a TAP device with flags {flags:#x}: must have {needed:#x}")));
        }
        let header = HEADER as libc::c_int;
        // SAFETY: the descriptor is open and TUNSETVNETHDRSZ reads one int.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header) })?;
        set_nonblocking(&fd)?;
        let mut tap = Self { fd, is_tap: true, has_uso: false };
        tap.has_uso = tap.set_offload(libc::TUN_F_CSUM | libc::TUN_F_USO4 | libc::TUN_F_USO6).is_ok();
        tap.set_offload(0)?;
        Ok(tap)
    }

    /// A socket that keeps the bounds of frames instead of a TAP device, and its other end; neither blocks.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn stand_in() -> io::Result<(Self, std::fs::File)> {
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (fd, other) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        setsockopt(&other, sockopt::SndBuf, &(1 << 20))?;
        Ok((Self { fd, is_tap: false, has_uso: true }, other.into()))
    }

    /// Readable when a frame has come. Nothing is to be read from it but by `receive`.
    pub fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Whether the host's kernel cuts UDP datagrams.
    pub fn has_uso(&self) -> bool {
        self.has_uso
    }

    /// Tells the host what the guest's driver can take, from the features it took up.
    pub fn take_offloads(&self, features: u64) -> io::Result<()> {
        self.set_offload(offloads(features))
    }

    fn set_offload(&self, offload: libc::c_uint) -> io::Result<()> {
        if !self.is_tap {
            return Ok(());
        }
        // SAFETY: the descriptor is open and TUNSETOFFLOAD takes a number.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offload)) })
    }

    /// Reads the next frame, header first, into guest memory and what does not fit there into `rest`; `None` when there
    /// is none.
    pub fn receive(&self, slices: &[GuestSlice<'_>], rest: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match memory::read_frame(self.fd.as_fd(), slices, rest) {
                // Only a stand-in has an end.
                Ok(0) => return Ok(None),
                Ok(len) => return Ok(Some(len)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Writes a frame, header first: `head`, then guest memory.
    pub fn send<'m>(&self, head: &[u8], slices: impl Iterator<Item = GuestSlice<'m>> + Clone) -> io::Result<()> {
        loop {
            match memory::write_frame(self.fd.as_fd(), head, slices.clone()) {
                Ok(_) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
}

/// TUN_F_* for what the driver can take.
fn offloads(driver: u64) -> libc::c_uint {
    // Without checksums nothing else can be (virtio 1.2 §5.1.3.1); the kernel refuses it.
    if driver & features::GUEST_CSUM == 0 {
        return 0;
    }
    let pairs = [
        (features::GUEST_CSUM, libc::TUN_F_CSUM),
        (features::GUEST_TSO4, libc::TUN_F_TSO4),
        (features::GUEST_TSO6, libc::TUN_F_TSO6),
        (features::GUEST_ECN, libc::TUN_F_TSO_ECN),
        (features::GUEST_UFO, libc::TUN_F_UFO),
        (features::GUEST_USO4, libc::TUN_F_USO4),
        (features::GUEST_USO6, libc::TUN_F_USO6),
    ];
    let mut offload = pairs.iter().filter(|(feature, _)| driver & feature != 0).fold(0, |all, (_, one)| all | one);
    // The kernel takes both or none of these.
    let uso = libc::TUN_F_USO4 | libc::TUN_F_USO6;
    if offload & uso != uso {
        offload &= !uso;
    }
    offload
}

fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    // SAFETY: reads the flags of an open descriptor.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    check(flags)?;
    // SAFETY: sets the flags of an open descriptor.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn the_host_sends_only_what_the_driver_can_take() {
        assert_eq!(offloads(0), 0);
        assert_eq!(offloads(features::GUEST_TSO4), 0, "without checksums");
        assert_eq!(offloads(features::GUEST_CSUM | features::CSUM), libc::TUN_F_CSUM);
        let tso = features::GUEST_CSUM | features::GUEST_TSO4 | features::GUEST_TSO6 | features::GUEST_ECN;
        assert_eq!(offloads(tso), libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN);
        assert_eq!(offloads(features::GUEST_CSUM | features::GUEST_USO4), libc::TUN_F_CSUM, "half of USO");
    }

    #[test]
    fn what_is_no_tap_is_refused() {
        let error = Tap::new(File::open("/dev/null").unwrap().into()).unwrap_err();
        assert!(error.to_string().starts_with("the descriptor is no TAP device"), "{error}");
    }
}
