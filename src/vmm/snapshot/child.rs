//! The child of the worker that writes a snapshot: a copy of the process at one instant, so that the guest goes on while its
//! memory is written.
//!
//! The child has the memory of that instant for itself. The octets of the state, which take longer to put together than the
//! guest should stand still, are handed to it afterwards, by a page or more that both share.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::saved::MAX_BYTES;

/// Octets before those that are handed over: how many they are.
const HEAD: usize = size_of::<AtomicU32>();
/// Nothing is handed over yet, or will ever be.
const NOTHING: u32 = 0;
const NEVER: u32 = u32::MAX;
/// How long the child waits. The worker needs milliseconds, and takes the child along when it ends.
const PATIENCE: Duration = Duration::from_secs(60);
/// One look of the child at whether something was handed over.
const LOOK: libc::timespec = libc::timespec { tv_sec: 1, tv_nsec: 0 };

/// Memory that the worker and its child share, in which octets are handed over once.
#[derive(Debug)]
struct Shared {
    start: *mut u8,
}

impl Shared {
    const LEN: usize = HEAD + MAX_BYTES;

    fn new() -> io::Result<Self> {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe { libc::mmap(ptr::null_mut(), Self::LEN, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        if start == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Self { start: start.cast() }) }
    }

    fn len(&self) -> &AtomicU32 {
        // SAFETY: the start of a mapping that lives as long as `self`, aligned to a page, of zeroes at first; it is used as
        // this atomic only.
        unsafe { &*self.start.cast() }
    }

    fn put(&self, octets: &[u8]) -> io::Result<()> {
        if octets.is_empty() || octets.len() > MAX_BYTES {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: as many octets as the mapping has behind its head; the other side reads them only once the length is
        // there, which is put there once.
        unsafe { ptr::copy_nonoverlapping(octets.as_ptr(), self.start.add(HEAD), octets.len()) };
        self.say(octets.len() as u32);
        Ok(())
    }

    fn say(&self, len: u32) {
        self.len().store(len, Ordering::Release);
        // SAFETY: wakes who waits on an address that is mapped; takes plain numbers besides.
        unsafe { libc::syscall(libc::SYS_futex, self.len().as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
    }

    /// Waits for them. Makes system calls only.
    fn take(&self) -> io::Result<&[u8]> {
        let until = Instant::now() + PATIENCE;
        loop {
            match self.len().load(Ordering::Acquire) {
                NOTHING if Instant::now() > until => return Err(io::Error::from_raw_os_error(libc::ETIMEDOUT)),
                NOTHING => {
                    let (address, look) = (self.len().as_ptr(), LOOK);
                    // SAFETY: waits for at most a second while the mapped word is `NOTHING`. It is shared by processes, so
                    // not a private one.
                    unsafe { libc::syscall(libc::SYS_futex, address, libc::FUTEX_WAIT, NOTHING, &raw const look) };
                }
                NEVER => return Err(io::Error::from_raw_os_error(libc::ECANCELED)),
                // SAFETY: that many octets lie behind the head and do not change any more.
                len => return Ok(unsafe { std::slice::from_raw_parts(self.start.add(HEAD), len as usize) }),
            }
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: our own mapping, of which nothing is borrowed any more; the other process has it for itself.
        unsafe { libc::munmap(self.start.cast(), Self::LEN) };
    }
}

/// The child, which waits for the state. Dropping this ends it with ECANCELED.
#[derive(Debug)]
pub struct Child(Shared);

impl Child {
    /// Makes it, with memory as it is now: `write` is what it does with that, after it has written the state,
    /// which `give` hands over, to `state`. Then it tells `done` its `errno` as four octets, 0 when all went well.
    ///
    /// Other threads are not there in it, and may have held any lock: `write` allocates nothing and takes no lock.
    pub fn make(done: &File, state: &File, write: impl FnOnce() -> io::Result<()>) -> io::Result<Self> {
        let shared = Shared::new()?;
        // SAFETY: a plain copy of the process: no flags, no stack, no pointers. The child makes system calls only, as the
        // caller promises, and ends without running anything of the C library's. Nobody waits for it: SIGCHLD is ignored.
        let pid = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
        if pid < 0 {
            return Err(io::Error::last_os_error());
        }
        if pid == 0 {
            // First, so that on one processor the child does not run before the guest does again.
            let written = shared.take().and_then(|octets| state.write_all_at(octets, 0)).and_then(|()| write());
            let errno = written.map_or_else(|e| e.raw_os_error().unwrap_or(libc::EIO), |()| 0);
            let octets = errno.to_le_bytes();
            // SAFETY: writes octets that are alive; `exit_group` does not come back.
            unsafe {
                libc::write(done.as_raw_fd(), octets.as_ptr().cast(), octets.len());
                libc::syscall(libc::SYS_exit_group, 0);
            }
        }
        Ok(Self(shared))
    }

    /// Hands the state over.
    pub fn give(self, state: &[u8]) -> io::Result<()> {
        self.0.put(state)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.0.len().load(Ordering::Relaxed) == NOTHING {
            self.0.say(NEVER);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_handed_over_is_taken_and_nothing_else() {
        let shared = Shared::new().unwrap();
        for len in [0, MAX_BYTES + 1] {
            assert!(shared.put(&vec![7; len]).is_err(), "{len}");
        }
        shared.put(b"state").unwrap();
        assert_eq!(shared.take().unwrap(), b"state");
        let never = Child(Shared::new().unwrap());
        never.0.say(NEVER);
        assert_eq!(never.0.take().unwrap_err().raw_os_error(), Some(libc::ECANCELED));
        let most = Shared::new().unwrap();
        most.put(&vec![7; MAX_BYTES]).unwrap();
        assert_eq!(most.take().unwrap().len(), MAX_BYTES);
    }
}
