//! Starts a worker: init as its parent, its sandbox's cgroup, namespaces of its own, a user id of its own, and nothing
//! that it may keep of what the supervisor can do.
//!
//! The worker is made with CLONE_PARENT, so that it outlives the supervisor, and is born inside its cgroup:
//! moving a process there later waits for an RCU grace period of many milliseconds. Between fork and exec the child
//! gives up all that the kernel lets it give up before the program runs; what is left (system calls, Landlock) is the
//! program's own first act: `vmm::jail`. docs/security.md has the whole.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use super::void::Void;

/// Descriptor numbers that a worker is born with; `warren vmm` relies on them.
pub const WORKER_LISTENER_FD: RawFd = 3;
/// Where a worker leaves its last words.
pub const WORKER_LAST_WORDS_FD: RawFd = 4;

/// What can start workers: the program, opened once, and the place that workers are put in.
#[derive(Debug)]
pub struct Spawner {
    program: File,
    null: File,
    argv: Vec<CString>,
    parent: Parent,
    void: Arc<Void>,
}

/// Whose child a worker becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parent {
    /// That of the caller's parent, which is init: the worker outlives the caller.
    Init,
    /// The caller's, and it is killed when the thread that started it ends.
    Caller,
}

/// One worker to be started.
#[derive(Debug)]
pub struct Birth<'a> {
    /// The directory of its cgroup, opened for reading; that of the caller where there is none.
    pub cgroup: Option<&'a File>,
    /// The socket that it listens on.
    pub listener: BorrowedFd<'a>,
    /// Takes its last words.
    pub last_words: &'a File,
    /// Takes what it says.
    pub log: &'a File,
    /// User and group id, its own.
    pub uid: u32,
}

/// A started worker.
#[derive(Debug)]
pub struct Spawned {
    /// In the node's pid namespace.
    pub pid: i32,
    /// Becomes readable when the worker has ended.
    pub pidfd: OwnedFd,
}

/// What a worker's process may have, beside the length of its files, which it limits itself when it knows them:
/// (resource, soft and hard limit). Memory is its cgroup's matter: address space is no measure of it.
const LIMITS: [(libc::__rlimit_resource_t, u64); 9] = [
    // 1,024 streams to the guest, 256 that wait for it, the supervisor's connections, disks, events, doorbells.
    (libc::RLIMIT_NOFILE, 2048),
    // 16 processors, 9 disks, the console's log, the device thread, and what KVM starts on its own.
    (libc::RLIMIT_NPROC, 64),
    (libc::RLIMIT_CORE, 0),
    (libc::RLIMIT_MEMLOCK, 0),
    (libc::RLIMIT_MSGQUEUE, 0),
    (libc::RLIMIT_NICE, 0),
    (libc::RLIMIT_RTPRIO, 0),
    // One kick for each processor.
    (libc::RLIMIT_SIGPENDING, 64),
    (libc::RLIMIT_STACK, 8 << 20),
];

impl Spawner {
    /// Starts this very program as `warren vmm`, opened now, so that an update of the file does not mix versions.
    pub fn new() -> io::Result<Self> {
        Self::of(File::open("/proc/self/exe")?, &["warren", "vmm"], Parent::Init)
    }

    /// Starts `program` with these arguments, the first being its name.
    pub fn of(program: File, argv: &[&str], parent: Parent) -> io::Result<Self> {
        let argv = texts(argv)?;
        let null = File::options().read(true).write(true).open("/dev/null")?;
        Ok(Self { program, null, argv, parent, void: Arc::new(Void::make()?) })
    }

    /// The same for another program, into the same namespaces.
    pub fn another(&self, program: File, argv: &[&str]) -> io::Result<Self> {
        let (null, void) = (self.null.try_clone()?, self.void.clone());
        Ok(Self { program, null, argv: texts(argv)?, parent: self.parent, void })
    }

    /// Starts a worker.
    pub fn spawn(&self, birth: &Birth<'_>) -> io::Result<Spawned> {
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
        let listener = high(birth.listener.as_raw_fd())?;
        let last_words = high(birth.last_words.as_raw_fd())?;
        let log = high(birth.log.as_raw_fd())?;
        let program = high(self.program.as_raw_fd())?;
        let (mounts, network) = (high(self.void.mounts.as_raw_fd())?, high(self.void.network.as_raw_fd())?);
        let mut argv: Vec<*const libc::c_char> = self.argv.iter().map(|arg| arg.as_ptr()).collect();
        argv.push(std::ptr::null());
        let plan = Plan {
            moves: [
                (self.null.as_raw_fd(), 0),
                (log.as_raw_fd(), 1),
                (log.as_raw_fd(), 2),
                (listener.as_raw_fd(), WORKER_LISTENER_FD),
                (last_words.as_raw_fd(), WORKER_LAST_WORDS_FD),
            ],
            program: program.as_raw_fd(),
            argv: &argv,
            mounts: mounts.as_raw_fd(),
            network: network.as_raw_fd(),
            uid: birth.uid,
            parent: self.parent,
        };

        let mut pidfd: RawFd = -1;
        // SAFETY: clone_args is plain integers, for which zero means "not asked for".
        let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
        args.flags = (libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_PIDFD) as u64
            | CLONE_CLEAR_SIGHAND;
        args.pidfd = &raw mut pidfd as u64;
        if let Some(cgroup) = birth.cgroup {
            args.flags |= CLONE_INTO_CGROUP;
            args.cgroup = u64::try_from(cgroup.as_raw_fd()).map_err(|_| io::ErrorKind::InvalidInput)?;
        }
        match self.parent {
            // The exit signal is then that of the caller, and must be zero here.
            Parent::Init => args.flags |= libc::CLONE_PARENT as u64,
            Parent::Caller => args.exit_signal = libc::SIGCHLD as u64,
        }
        // SAFETY: without CLONE_VM this is a fork; `args` and `pidfd` outlive the call, and the child runs only
        // `become_worker`, which makes nothing but system calls.
        let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
        match pid {
            -1 => Err(io::Error::last_os_error()),
            0 => become_worker(&plan),
            pid => {
                let pid = i32::try_from(pid).map_err(|_| io::ErrorKind::InvalidData)?;
                // SAFETY: the kernel put a new descriptor there, which nobody else has.
                Ok(Spawned { pid, pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) } })
            }
        }
    }
}

fn texts(argv: &[&str]) -> io::Result<Vec<CString>> {
    let texts: Result<_, _> = argv.iter().map(|arg| CString::new(*arg)).collect();
    texts.map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// <linux/sched.h>: signal handlers of the child are the default ones. The libc crate gives these two as `c_int`,
/// which is too small for them.
const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
/// <linux/sched.h>: the child is born in the cgroup of `clone_args::cgroup`.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
/// <linux/securebits.h>: user id 0 has no capabilities, none are kept over a change of user id nor handed on, and all of
/// this stays so.
const SECUREBITS: libc::c_ulong = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 7;
/// Capabilities have numbers below this (<linux/capability.h>: two words of 32 bits).
const CAPABILITIES: libc::c_ulong = 64;
/// <linux/capability.h>
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

/// What the child does, made up before it is born: it cannot allocate.
struct Plan<'a> {
    moves: [(RawFd, RawFd); 5],
    program: RawFd,
    /// Ends with a null pointer.
    argv: &'a [*const libc::c_char],
    mounts: RawFd,
    network: RawFd,
    uid: u32,
    parent: Parent,
}

/// The child's side: gives everything up and turns into the program. Only async-signal-safe calls.
fn become_worker(plan: &Plan<'_>) -> ! {
    // SAFETY: see `confine`; `_exit` instead of a return into code that is not fit for a forked child.
    unsafe {
        let step = confine(plan);
        leave_word(step, *libc::__errno_location());
        libc::_exit(126)
    }
}

/// Returns only when something fails: with the name of what did.
///
/// # Safety
/// Only for a process that was just forked. Makes nothing but system calls on descriptors and arrays that the parent
/// prepared: no allocation, no lock.
unsafe fn confine(plan: &Plan<'_>) -> &'static [u8] {
    macro_rules! step {
        ($name:literal, $call:expr) => {
            if i64::from($call) < 0 {
                return $name;
            }
        };
    }
    // SAFETY: this function's own contract.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        step!(b"signal mask", libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()));
        for (from, to) in plan.moves {
            step!(b"descriptors", libc::dup2(from, to));
        }
        // The supervisor's own all close at exec; this one does not rely on it.
        step!(b"close_range", libc::syscall(libc::SYS_close_range, 5, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC));
        step!(b"setsid", libc::setsid());
        step!(b"network namespace", libc::setns(plan.network, libc::CLONE_NEWNET));
        // Root and working directory are the namespace's root with this.
        step!(b"mount namespace", libc::setns(plan.mounts, libc::CLONE_NEWNS));
        // The cgroup namespace begins at the group that the child was born in, so it is made by the child itself.
        step!(b"own namespaces", libc::unshare(libc::CLONE_NEWNS | libc::CLONE_NEWCGROUP));
        step!(b"host name", libc::sethostname(c"worker".as_ptr(), 6));

        for (resource, limit) in LIMITS {
            let limit = libc::rlimit { rlim_cur: limit, rlim_max: limit };
            step!(b"resource limits", libc::setrlimit(resource, &raw const limit));
        }

        step!(b"ambient capabilities", libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0));
        for capability in 0..CAPABILITIES {
            if libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) < 0 {
                if *libc::__errno_location() == libc::EINVAL {
                    break; // one more than this kernel has
                }
                return b"bounding capabilities";
            }
        }
        step!(b"securebits", libc::prctl(libc::PR_SET_SECUREBITS, SECUREBITS, 0, 0, 0));
        // The system calls themselves: the C library's functions would look after other threads, which a child has not.
        step!(b"groups", libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()));
        step!(b"group id", libc::syscall(libc::SYS_setresgid, plan.uid, plan.uid, plan.uid));
        step!(b"user id", libc::syscall(libc::SYS_setresuid, plan.uid, plan.uid, plan.uid));
        let header = [CAPABILITY_VERSION_3, 0];
        let nothing = [0_u32; 6];
        step!(b"capabilities", libc::syscall(libc::SYS_capset, header.as_ptr(), nothing.as_ptr()));
        step!(b"no_new_privs", libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
        if plan.parent == Parent::Caller {
            // After the change of user id, which takes it away.
            step!(b"death signal", libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0));
        }

        let envp = [std::ptr::null::<libc::c_char>()];
        let flags = libc::AT_EMPTY_PATH;
        libc::syscall(libc::SYS_execveat, plan.program, c"".as_ptr(), plan.argv.as_ptr(), envp.as_ptr(), flags);
        b"exec"
    }
}

/// The last words of a worker that was never born: which step failed, and the kernel's reason.
fn leave_word(step: &[u8], errno: libc::c_int) {
    let mut line = [0_u8; 128];
    let mut length = 0;
    let mut digits = [0_u8; 4];
    for (digit, place) in digits.iter_mut().zip([1000, 100, 10, 1]) {
        *digit = b'0' + (errno / place % 10) as u8;
    }
    let zeroes = digits.iter().take(3).take_while(|&&digit| digit == b'0').count();
    let parts: [&[u8]; 5] =
        [b"- item reason=start-failed detail=\"jail: ", step, b" failed with errno ", &digits[zeroes..], b"\"\n"];
    for octet in parts.into_iter().flatten() {
        if let Some(place) = line.get_mut(length) {
            *place = *octet;
            length += 1;
        }
    }
    // SAFETY: `line` is live memory of that length. There is nobody to tell of a failure.
    unsafe { libc::pwrite(WORKER_LAST_WORDS_FD, line.as_ptr().cast(), length, 0) };
}
