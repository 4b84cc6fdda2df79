//! Names for virtio-serial ports: /dev/virtio-ports/NAME -> ../vportNpM, which elsewhere udev makes.
//!
//! The host names a port some time after its device appears, so the links are made again on each kernel event of
//! such a port. The folder is always there: who waits for a port can watch it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket};

const CLASS: &str = "/sys/class/virtio-ports";
const LINKS: &str = "/dev/virtio-ports";
const DRIVER: &str = "/sys/bus/virtio/drivers/virtio_console";
const MAX_NAME: usize = 128;
/// How long the start waits for the host to name its ports; it takes a few milliseconds where it does.
const PATIENCE: Duration = Duration::from_millis(200);

/// Keeps the links true.
pub struct Ports {
    events: Option<OwnedFd>,
}

impl Ports {
    /// Makes the links, after a short wait for names that are under way, and listens for more.
    pub fn new() -> Self {
        // Listen first, so that no name falls between the look and the listening.
        let events = listen().map_err(|error| log::error!("no kernel events for virtio ports: {error}")).ok();
        let deadline = Instant::now() + PATIENCE;
        while !all_named(Path::new(DRIVER), Path::new(CLASS)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        update(Path::new(CLASS), Path::new(LINKS));
        Self { events }
    }

    /// To poll for reading.
    pub fn events(&self) -> Option<BorrowedFd<'_>> {
        self.events.as_ref().map(OwnedFd::as_fd)
    }

    /// Call when `events` is readable.
    pub fn handle(&self) {
        let Some(events) = &self.events else { return };
        let mut concerned = false;
        let mut message = [0; 8192];
        loop {
            match recv(events.as_raw_fd(), &mut message, MsgFlags::empty()) {
                Ok(0) => break,
                // Begins with `action@/devices/…/virtio-ports/vport0p1`; only a hint to look again.
                Ok(n) => {
                    let path = message[..n].split(|&b| b == 0).next().unwrap_or_default();
                    concerned |= path.windows(14).any(|part| part == b"/virtio-ports/");
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => break,
                Err(Errno::ENOBUFS) => concerned = true, // some were lost
                Err(error) => {
                    log::error!("kernel events: {error}");
                    break;
                }
            }
        }
        if concerned {
            update(Path::new(CLASS), Path::new(LINKS));
        }
    }
}

fn listen() -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Netlink, SockType::Datagram, flags, SockProtocol::NetlinkKObjectUEvent)?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 1))?; // group 1: the kernel's own events
    Ok(socket)
}

/// Makes the links in `links` say what `class` says.
fn update(class: &Path, links: &Path) {
    if let Err(error) = try_update(class, links) {
        log::error!("cannot update {}: {error}", links.display());
    }
}

fn try_update(class: &Path, links: &Path) -> io::Result<()> {
    fs::create_dir_all(links)?;
    let wanted = wanted(class);
    for entry in fs::read_dir(links)?.flatten() {
        let same = entry.file_name().to_str().is_some_and(|name| {
            wanted.get(name).is_some_and(|device| fs::read_link(entry.path()).is_ok_and(|target| target == *device))
        });
        if !same {
            fs::remove_file(entry.path())?;
        }
    }
    for (name, device) in &wanted {
        match symlink(device, links.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Whether no port is known to be still without its name. A machine without such a device has nothing to wait for.
fn all_named(driver: &Path, class: &Path) -> bool {
    let has_device = fs::read_dir(driver)
        .is_ok_and(|entries| entries.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with("virtio")));
    let mut ports = fs::read_dir(class).into_iter().flatten().flatten().peekable();
    !has_device || (ports.peek().is_some() && ports.all(|port| port.path().join("name").exists()))
}

/// Port names and where their links lead.
fn wanted(class: &Path) -> BTreeMap<String, PathBuf> {
    let Ok(entries) = fs::read_dir(class) else { return BTreeMap::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let name = fs::read_to_string(entry.path().join("name")).ok()?;
            let name = name.trim_end_matches('\n');
            is_port_name(name).then(|| (name.to_string(), Path::new("..").join(entry.file_name())))
        })
        .collect()
}

/// The host chose it, and it becomes a file name.
fn is_port_name(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
        && !name.starts_with('.')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_follow_the_names_of_the_ports() {
        let root = std::env::temp_dir().join(format!("warren-ports-{}", std::process::id()));
        let (class, links) = (root.join("class"), root.join("links"));
        let port = |device: &str, name: &str| {
            fs::create_dir_all(class.join(device)).unwrap();
            fs::write(class.join(device).join("name"), name).unwrap();
        };
        let look = || {
            update(&class, &links);
            let mut found: Vec<_> = fs::read_dir(&links)
                .unwrap()
                .flatten()
                .map(|e| (e.file_name().into_string().unwrap(), fs::read_link(e.path()).unwrap()))
                .collect();
            found.sort();
            found
        };
        assert_eq!(look(), [], "no class at all");
        port("vport0p1", "org.warren.control.0\n");
        port("vport0p2", "../../etc/passwd\n");
        port("vport0p3", "\n");
        fs::create_dir_all(class.join("vport0p4")).unwrap(); // has no name yet
        assert_eq!(look(), [("org.warren.control.0".to_string(), PathBuf::from("../vport0p1"))]);
        port("vport0p4", "org.warren.control.0\n");
        fs::remove_dir_all(class.join("vport0p1")).unwrap();
        assert_eq!(look(), [("org.warren.control.0".to_string(), PathBuf::from("../vport0p4"))]);
        let driver = root.join("driver");
        assert!(all_named(&driver, &class), "no device, nothing to wait for");
        fs::create_dir_all(driver.join("virtio1")).unwrap();
        assert!(all_named(&driver, &class));
        fs::create_dir_all(class.join("vport0p5")).unwrap();
        assert!(!all_named(&driver, &class), "a port has no name yet");
        assert!(!all_named(&driver, &root.join("nowhere")), "the device has no ports yet");
        fs::remove_dir_all(&root).unwrap();
    }
}
