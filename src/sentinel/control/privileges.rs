//! On a node the sentinel is born as root, reads the node's configuration, and gives up everything but CAP_NET_RAW
//! (which ping needs) before it touches the network, a buffer or a plugin.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, chown};
use std::path::Path;

use nix::unistd::{Gid, Uid, geteuid, setgroups, setresgid, setresuid};

/// User and group of the sentinel on a node (rootfs/host/etc/passwd). The control socket shows it what viewers may see.
pub const USER: u32 = 900;

/// Linux: include/uapi/linux/capability.h.
const CAP_NET_RAW: u32 = 13;
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Makes the data directory the user's, then becomes the user. Call before any thread is started.
pub fn give_up(data: &Path) -> Result<(), String> {
    if !geteuid().is_root() {
        return Ok(());
    }
    let failed = |what: &str, e: io::Error| format!("{what}: {e}");
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(data);
    made.and_then(|()| chown(data, Some(USER), Some(USER))).map_err(|e| failed(&data.display().to_string(), e))?;
    drop_bounding_set().map_err(|e| failed("capabilities", e))?;
    nix::sys::prctl::set_keepcaps(true).map_err(|e| failed("capabilities", e.into()))?;
    let (user, group) = (Uid::from_raw(USER), Gid::from_raw(USER));
    setgroups(&[]).map_err(|e| failed("groups", e.into()))?;
    setresgid(group, group, group).map_err(|e| failed("group", e.into()))?;
    setresuid(user, user, user).map_err(|e| failed("user", e.into()))?;
    keep_only(1 << CAP_NET_RAW).map_err(|e| failed("capabilities", e))?;
    // What it starts (plugins) gains nothing either.
    nix::sys::prctl::set_no_new_privs().map_err(|e| failed("no_new_privs", e.into()))
}

/// No program that is started from here ever gets a capability.
fn drop_bounding_set() -> io::Result<()> {
    for capability in 0.. {
        // SAFETY: prctl with numbers only.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
            let error = io::Error::last_os_error();
            // The first number that the kernel does not know.
            return if error.raw_os_error() == Some(libc::EINVAL) && capability > 0 { Ok(()) } else { Err(error) };
        }
    }
    Ok(())
}

fn keep_only(set: u32) -> io::Result<()> {
    let header = Header { version: CAPABILITY_VERSION_3, pid: 0 };
    let low = Data { effective: set, permitted: set, inheritable: 0 };
    let data = [low, Data::default()];
    // SAFETY: both have the layout of version 3 (two times 32 capabilities) and live through the call, which only
    // reads them.
    if unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
