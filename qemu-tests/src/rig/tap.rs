//! A TAP device of the test's own.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::process::Command;

/// <linux/if_tun.h>: `_IOW('T', 202, int)`.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
/// <linux/if_tun.h>: `_IOW('T', 208, unsigned int)`.
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
/// <linux/if_tun.h>: `_IOW('T', 216, int)`.
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;

/// How a TAP is made.
#[derive(Debug, Clone, Copy, Default)]
pub struct TapFlags {
    /// With a `virtio_net_hdr` of that many octets before each frame (12 with mergeable buffers); 0 is without.
    pub vnet_header: u32,
    /// `TUN_F_*` of what the reader takes.
    pub offloads: u32,
}

/// A TAP device with its descriptor. It is there for as long as that, or a copy of it, is open.
#[derive(Debug)]
pub struct Tap {
    /// What a worker takes: non-blocking.
    pub file: File,
    name: String,
}

impl Tap {
    /// Makes one of at most 15 octets' name, down and without an address.
    ///
    /// # Panics
    /// When the kernel refuses.
    pub fn create(name: &str, flags: TapFlags) -> Self {
        use std::os::unix::fs::OpenOptionsExt;
        let file = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun");
        let file = file.unwrap_or_else(|e| panic!("/dev/net/tun: {e}"));
        // SAFETY: an ifreq is plain data, for which zeroes are valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        assert!(name.len() < request.ifr_name.len(), "{name} is too long for a network device");
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        let header = if flags.vnet_header > 0 { libc::IFF_VNET_HDR } else { 0 };
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | header) as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes an ifreq, which lives through the call.
        check("TUNSETIFF", unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) });
        if flags.vnet_header > 0 {
            let size = flags.vnet_header as libc::c_int;
            // SAFETY: TUNSETVNETHDRSZ reads an int, which lives through the call.
            check("TUNSETVNETHDRSZ", unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) });
            // SAFETY: TUNSETOFFLOAD takes its argument by value.
            check("TUNSETOFFLOAD", unsafe {
                libc::ioctl(file.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(flags.offloads))
            });
        }
        Self { file, name: name.to_string() }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Gives it an address (`10.0.0.0/31`) and switches it on. In an `own_network` two TAPs are joined by the node.
    pub fn up(&self, address: &str) {
        switch_on(&self.name, address);
    }

    /// Tells the node who has an address on it, so that nobody has to be asked.
    pub fn neighbour(&self, address: &str, hardware_address: &str) {
        run("arp", &["-i", &self.name, "-s", address, hardware_address]);
    }

    /// Sets the longest frame without its header, in octets.
    pub fn mtu(&self, octets: u32) {
        ip(&["link", "set", &self.name, "mtu", &octets.to_string()]);
    }
}

/// `Tap::up` for a device that another program made.
pub fn switch_on(name: &str, address: &str) {
    ip(&["addr", "add", address, "dev", name]);
    ip(&["link", "set", name, "up"]);
}

/// Leaves the node's network for one of this thread's own, which passes packets on between its devices: the node's own
/// packet policy is not for these. Threads and programs that are started later are there as well.
pub fn own_network() {
    super::outside::new_namespace();
    super::outside::up("lo");
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").expect("root may set it");
}

fn ip(arguments: &[&str]) {
    run("ip", arguments);
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|e| panic!("the tests' busybox has {program}: {e}"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn check(what: &str, result: libc::c_int) {
    assert!(result >= 0, "{what}: {}", io::Error::last_os_error());
}
