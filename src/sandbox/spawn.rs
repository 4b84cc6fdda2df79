//! Starts a worker: its own pid namespace, its sandbox's cgroup, and init as its parent.
//!
//! The worker is made with CLONE_PARENT, so that it outlives the supervisor, and is born inside its cgroup:
//! moving a process there later waits for an RCU grace period of many milliseconds.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Descriptor numbers that a worker is born with; `warren vmm` relies on them.
pub const WORKER_LISTENER_FD: RawFd = 3;
/// Where a worker leaves its last words.
pub const WORKER_LAST_WORDS_FD: RawFd = 4;

/// What can start workers: the program, opened once.
#[derive(Debug)]
pub struct Spawner {
    program: File,
    null: File,
    argv: [CString; 2],
}

/// A started worker.
#[derive(Debug)]
pub struct Spawned {
    /// In the node's pid namespace.
    pub pid: i32,
    /// Becomes readable when the worker has ended.
    pub pidfd: OwnedFd,
}

impl Spawner {
    /// Opens this very program, so that an update of the file does not mix versions.
    pub fn new() -> io::Result<Self> {
        let argv = ["warren", "vmm"].map(CString::new);
        let [Ok(name), Ok(role)] = argv else { return Err(io::ErrorKind::InvalidInput.into()) };
        Ok(Self { program: File::open("/proc/self/exe")?, null: File::open("/dev/null")?, argv: [name, role] })
    }

    /// Starts a worker in `cgroup` (a directory opened for reading) with its two inherited descriptors.
    pub fn spawn(&self, cgroup: &File, listener: BorrowedFd<'_>, last_words: &File) -> io::Result<Spawned> {
        // Copies above the numbers that are handed out, so that none of them is overwritten on the way.
        let high = |fd: RawFd| -> io::Result<OwnedFd> {
            // SAFETY: fcntl on a descriptor that lives through this call; F_DUPFD_CLOEXEC returns a new one that we own.
            let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 64) };
            if copy < 0 {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: `copy` was just made and nobody else has it.
            Ok(unsafe { OwnedFd::from_raw_fd(copy) })
        };
        let listener = high(listener.as_raw_fd())?;
        let last_words = high(last_words.as_raw_fd())?;
        let program = high(self.program.as_raw_fd())?;
        let moves = [
            (self.null.as_raw_fd(), 0),
            (listener.as_raw_fd(), WORKER_LISTENER_FD),
            (last_words.as_raw_fd(), WORKER_LAST_WORDS_FD),
        ];
        let argv = [self.argv[0].as_ptr(), self.argv[1].as_ptr(), std::ptr::null()];
        let envp = [std::ptr::null::<libc::c_char>()];

        let mut pidfd: RawFd = -1;
        // SAFETY: clone_args is plain integers, for which zero means "not asked for".
        let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
        args.flags = (libc::CLONE_PARENT | libc::CLONE_NEWPID | libc::CLONE_PIDFD) as u64
            | CLONE_CLEAR_SIGHAND
            | CLONE_INTO_CGROUP;
        args.pidfd = &raw mut pidfd as u64;
        args.cgroup = u64::try_from(cgroup.as_raw_fd()).map_err(|_| io::ErrorKind::InvalidInput)?;
        // With CLONE_PARENT the exit signal is that of the caller, and must be zero here.
        args.exit_signal = 0;
        // SAFETY: without CLONE_VM this is a fork; `args` and `pidfd` outlive the call, and the child runs only
        // `become_worker`, which makes nothing but system calls.
        let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
        match pid {
            -1 => Err(io::Error::last_os_error()),
            0 => become_worker(&moves, program.as_raw_fd(), &argv, &envp),
            pid => {
                let pid = i32::try_from(pid).map_err(|_| io::ErrorKind::InvalidData)?;
                // SAFETY: the kernel put a new descriptor there, which nobody else has.
                Ok(Spawned { pid, pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) } })
            }
        }
    }
}

/// <linux/sched.h>: signal handlers of the child are the default ones. The libc crate gives these two as `c_int`,
/// which is too small for them.
const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
/// <linux/sched.h>: the child is born in the cgroup of `clone_args::cgroup`.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// The child's side: places the descriptors and turns into the program. Only async-signal-safe calls.
fn become_worker(
    moves: &[(RawFd, RawFd)],
    program: RawFd,
    argv: &[*const libc::c_char],
    envp: &[*const libc::c_char],
) -> ! {
    // SAFETY: plain system calls on descriptors and arrays that the parent prepared; no allocation, no lock, and
    // `_exit` instead of a return into code that is not fit for a forked child.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
        for &(from, to) in moves {
            if libc::dup2(from, to) < 0 {
                libc::_exit(126);
            }
        }
        libc::syscall(libc::SYS_execveat, program, c"".as_ptr(), argv.as_ptr(), envp.as_ptr(), libc::AT_EMPTY_PATH);
        libc::_exit(127)
    }
}
