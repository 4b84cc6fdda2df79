//! Landlock (Documentation/userspace-api/landlock.rst): every right that this kernel knows is taken away, and no rule
//! gives one back. Descriptors that were opened before keep what they have.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// LANDLOCK_CREATE_RULESET_VERSION
const VERSION: libc::c_uint = 1;

/// struct landlock_ruleset_attr
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rights {
    files: u64,
    network: u64,
    scopes: u64,
}

impl Rights {
    /// All that a kernel of this ABI version knows.
    fn of(version: i64) -> Self {
        Self {
            // 13 rights to begin with, then REFER, TRUNCATE and IOCTL_DEV.
            files: match version {
                ..=1 => (1 << 13) - 1,
                2 => (1 << 14) - 1,
                3 | 4 => (1 << 15) - 1,
                _ => (1 << 16) - 1,
            },
            // Binding and connecting of TCP sockets.
            network: if version >= 4 { 0b11 } else { 0 },
            // Abstract Unix sockets, and signals to processes outside.
            scopes: if version >= 6 { 0b11 } else { 0 },
        }
    }

    /// Octets of it that a kernel of this version takes.
    fn size(version: i64) -> usize {
        match version {
            ..=3 => 8,
            4 | 5 => 16,
            _ => 24,
        }
    }
}

/// Gives up all rights; gives the kernel's ABI version, or `None` where it has no Landlock.
pub fn shut() -> io::Result<Option<i64>> {
    // SAFETY: with this flag the call takes no structure and gives a number.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<Rights>(), 0, VERSION) };
    if version < 0 {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            // Not built in, or not switched on.
            Some(libc::ENOSYS | libc::EOPNOTSUPP) => Ok(None),
            _ => Err(error),
        };
    }
    let rights = Rights::of(version);
    let check = |result: i64| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) };
    // SAFETY: `rights` lives through the call and has at least that many octets.
    let ruleset = check(unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, &raw const rights, Rights::size(version), 0)
    })?;
    // SAFETY: the kernel just made it, and nobody else has it.
    let ruleset = unsafe { OwnedFd::from_raw_fd(ruleset as i32) };
    // SAFETY: takes an open descriptor and flags.
    check(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) })?;
    Ok(Some(version))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kernel_is_asked_for_what_it_knows() {
        assert_eq!(Rights::of(1), Rights { files: 0x1fff, network: 0, scopes: 0 });
        assert_eq!(Rights::of(3), Rights { files: 0x7fff, network: 0, scopes: 0 });
        assert_eq!(Rights::of(4), Rights { files: 0x7fff, network: 3, scopes: 0 });
        assert_eq!(Rights::of(6), Rights { files: 0xffff, network: 3, scopes: 3 });
        assert_eq!(Rights::of(99), Rights::of(6), "what comes later is not known here");
        assert_eq!((Rights::size(1), Rights::size(4), Rights::size(6)), (8, 16, 24));
    }
}
