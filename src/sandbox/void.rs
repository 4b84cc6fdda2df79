//! The nothing that workers live in: a mount namespace whose root is empty and read-only, and a network namespace
//! without a link. Both are made once, by a thread that ends with it, and are kept by their descriptors.
//!
//! Workers enter the network namespace and share it. Of the mount namespace each makes a copy of its own: copying one
//! mount waits for nothing, where taking a whole tree of mounts apart would wait for an RCU grace period each time.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

/// The two namespaces.
#[derive(Debug)]
pub struct Void {
    /// For setns(2) with CLONE_NEWNS.
    pub mounts: File,
    /// For setns(2) with CLONE_NEWNET.
    pub network: File,
}

impl Void {
    /// Makes them. Needs CAP_SYS_ADMIN; waits for some milliseconds.
    pub fn make() -> io::Result<Self> {
        let thread = std::thread::Builder::new().name("void".into()).spawn(make)?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that makes the namespaces failed")))
    }
}

/// The thread: its own namespaces become the workers'.
fn make() -> io::Result<Void> {
    unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET)?;
    let void =
        Void { mounts: File::open("/proc/thread-self/ns/mnt")?, network: File::open("/proc/thread-self/ns/net")? };
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    // What hangs below another goes with it.
    for place in mount_points()?.into_iter().rev() {
        let _ = umount2(&place, MntFlags::MNT_DETACH);
    }
    let old = File::open("/")?;
    let root = empty_root()?;
    // SAFETY: system calls on descriptors that are open and on texts that live as long as the program.
    unsafe {
        let to = c"/".as_ptr();
        let flags = libc::MOVE_MOUNT_F_EMPTY_PATH;
        check(libc::syscall(libc::SYS_move_mount, root.as_raw_fd(), c"".as_ptr(), libc::AT_FDCWD, to, flags))?;
        check(libc::fchdir(root.as_raw_fd()).into())?;
        let here = c".".as_ptr();
        match check(libc::syscall(libc::SYS_pivot_root, here, here)) {
            Ok(_) => {
                check(libc::fchdir(old.as_raw_fd()).into())?;
                umount2(".", MntFlags::MNT_DETACH)?;
            }
            // The kernel's first root, which an initramfs is unpacked into, stays at the bottom of every namespace. It
            // lies below the empty root, and only CAP_SYS_ADMIN takes that away.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(void)
}

/// Where something is mounted, but for the root; later ones may hang below earlier ones.
fn mount_points() -> io::Result<Vec<PathBuf>> {
    let text = fs::read("/proc/thread-self/mountinfo")?;
    // proc_pid_mountinfo(5): the fifth word, with blanks and backslashes as octal numbers.
    let words = text.split(|&b| b == b'\n').filter_map(|line| line.split(|&b| b == b' ').nth(4));
    let places = words.map(|word| PathBuf::from(std::ffi::OsString::from_vec(plain(word))));
    Ok(places.filter(|place| place.as_os_str() != "/").collect())
}

fn plain(word: &[u8]) -> Vec<u8> {
    let mut octets = Vec::with_capacity(word.len());
    let mut rest = word;
    while let [first, tail @ ..] = rest {
        let digits = tail.get(..3).filter(|_| *first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        if let Some(octet) = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            octets.push(octet);
            rest = &tail[3..];
        } else {
            octets.push(*first);
            rest = tail;
        }
    }
    octets
}

/// An empty file system that nobody can write to or execute from, mounted nowhere yet.
fn empty_root() -> io::Result<OwnedFd> {
    // linux/mount.h
    const FSOPEN_CLOEXEC: libc::c_uint = 1;
    const FSCONFIG_SET_FLAG: libc::c_uint = 0;
    const FSCONFIG_SET_STRING: libc::c_uint = 1;
    const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
    const FSMOUNT_CLOEXEC: libc::c_uint = 1;
    const READ_ONLY_NO_SUID_DEV_EXEC: libc::c_uint = 0b1111;
    // SAFETY: each call has live texts and open descriptors; each descriptor that is returned is new and ours.
    unsafe {
        let owned = |fd: libc::c_long| check(fd).map(|fd| OwnedFd::from_raw_fd(fd as i32));
        let context = owned(libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), FSOPEN_CLOEXEC))?;
        let configure = |command: libc::c_uint, key: Option<&CStr>, value: Option<&CStr>| {
            let text = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
            check(libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, text(key), text(value), 0))
        };
        for (key, value) in [(c"size", c"4096"), (c"nr_inodes", c"1"), (c"mode", c"0555")] {
            configure(FSCONFIG_SET_STRING, Some(key), Some(value))?;
        }
        configure(FSCONFIG_SET_FLAG, Some(c"ro"), None)?;
        configure(FSCONFIG_CMD_CREATE, None, None)?;
        let context = context.as_raw_fd();
        owned(libc::syscall(libc::SYS_fsmount, context, FSMOUNT_CLOEXEC, READ_ONLY_NO_SUID_DEV_EXEC))
    }
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(Errno::last().into()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_with_blanks_are_found() {
        assert_eq!(plain(br"/a\040b\134c"), br"/a b\c");
        assert_eq!(plain(br"/a\04"), br"/a\04");
        assert_eq!(plain(b"/plain"), b"/plain");
        let places = mount_points().unwrap();
        assert!(places.iter().all(|place| place.is_absolute() && place.as_os_str() != "/"), "{places:?}");
    }
}
