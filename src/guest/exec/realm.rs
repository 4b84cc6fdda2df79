//! Where users' programs live: a pid namespace and a mount namespace of their own, one of each for all of a sandbox. They see
//! neither the agent nor what root runs, and what they leave behind becomes the child of process 1 in there, the keeper. A
//! program that has uid 0 without having been asked to be root is in there too, so that uid 0 must give it no power over the guest.
//!
//! The keeper shares the agent's memory, so that it costs a sandbox a stack and nothing else. It therefore makes system calls
//! by itself: the C library's would write the agent's `errno`.

use std::arch::asm;
use std::ffi::CStr;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::pipe2;

/// The keeper's stack, in octets.
const STACK: usize = 16 * 1024;
/// How often a keeper that is to end looks whether it is alone, in nanoseconds.
const LOOK_NS: i64 = 5_000_000;
/// What stays writable where the root is not, beside file systems in memory.
const WRITABLE: [&str; 2] = ["/workspace", "/tmp"];

/// The keeper is to end as soon as it is alone. In memory that it shares.
static ENDING: AtomicBool = AtomicBool::new(false);

/// The namespaces, and who keeps them.
#[derive(Debug)]
pub(crate) struct Realm {
    /// Process 1 in there, by the number that it has outside.
    pub keeper: libc::pid_t,
    pids: File,
    mounts: File,
    /// The agent's own.
    own_pids: File,
    /// Programs cannot write to the root.
    protected: bool,
}

impl Realm {
    /// Makes the namespaces.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn make() -> nix::Result<Self> {
        let open = |path: String| File::open(path).map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)));
        let own_pids = open("/proc/self/ns/pid".into())?;
        // What root mounts later is seen in there too.
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SHARED, None::<&str>)?;
        let (ready, ready_of_keeper) = pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        ENDING.store(false, Ordering::Relaxed);
        let stack = stack()?;
        let flags = libc::CLONE_VM | libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::SIGCHLD;
        let argument = ready_of_keeper.as_raw_fd() as usize as *mut libc::c_void;
        // SAFETY: the stack is this child's alone and stays mapped; the function makes only system calls and never returns.
        let keeper = Errno::result(unsafe { libc::clone(keep, stack, flags, argument) })?;
        drop(ready_of_keeper);
        let mut errno = [0; 4];
        match File::from(ready).read_exact(&mut errno) {
            Ok(()) if errno == [0; 4] => {}
            Ok(()) => return Err(Errno::from_raw(i32::from_ne_bytes(errno))),
            Err(_) => return Err(Errno::ESRCH),
        }
        let namespace = |kind: &str| open(format!("/proc/{keeper}/ns/{kind}"));
        Ok(Self { keeper, pids: namespace("pid")?, mounts: namespace("mnt")?, own_pids, protected: false })
    }

    /// What the calling thread forks from now on is in there, until `leave`. No thread can be made meanwhile.
    pub(super) fn enter(&self) -> nix::Result<()> {
        setns(self.pids.as_fd(), CloneFlags::CLONE_NEWPID)
    }

    /// What it forks is the agent's again.
    pub(super) fn leave(&self) -> nix::Result<()> {
        setns(self.own_pids.as_fd(), CloneFlags::CLONE_NEWPID)
    }

    /// For a child to enter.
    pub(super) fn mounts(&self) -> RawFd {
        self.mounts.as_raw_fd()
    }

    /// Lets programs write only below `/workspace` and `/tmp`, and to file systems in memory.
    pub(crate) fn protect_root(&mut self) -> nix::Result<()> {
        if self.protected {
            return Ok(());
        }
        let mounts = self.mounts.try_clone().map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))?;
        // A thread may be in another mount namespace than the rest of its process once its working directory is its own.
        let protected = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_FS)?;
            setns(mounts.as_fd(), CloneFlags::CLONE_NEWNS)?;
            let none = None::<&str>;
            for path in WRITABLE {
                match mount(Some(path), path, none, MsFlags::MS_BIND, none) {
                    Ok(()) | Err(Errno::ENOENT) => {}
                    Err(errno) => return Err(errno),
                }
            }
            let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | MsFlags::MS_NOATIME;
            mount(none, "/", none, read_only, none)
        });
        protected.join().unwrap_or(Err(Errno::EIO))?;
        self.protected = true;
        Ok(())
    }

    /// The keeper ends once the last program has. Without its end a power-off would wait for it.
    pub(crate) fn end(&self) {
        ENDING.store(true, Ordering::Relaxed);
        // SAFETY: kill takes plain numbers. The keeper has this signal blocked, and waits for it.
        unsafe { libc::kill(self.keeper, libc::SIGCHLD) };
    }
}

/// The end of the keeper's stack. The same for every keeper: there is one at a time.
fn stack() -> nix::Result<*mut libc::c_void> {
    static MADE: std::sync::OnceLock<usize> = std::sync::OnceLock::new();
    let made = *MADE.get_or_init(|| {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping anywhere.
        let start = unsafe { libc::mmap(ptr::null_mut(), STACK, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED { 0 } else { start as usize + STACK }
    });
    if made == 0 { Err(Errno::ENOMEM) } else { Ok(made as *mut libc::c_void) }
}

/// A system call that touches no memory but what it is given. Negative: an error's number.
///
/// # Safety
/// As the call.
unsafe fn call(number: libc::c_long, arguments: [usize; 5]) -> isize {
    let result: isize;
    let [a, b, c, d, e] = arguments;
    // SAFETY: the kernel's convention (syscall(2)): it changes rax, rcx and r11 only.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number as isize => result,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e,
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
    result
}

/// The nodes of the realm's /dev: name, major and minor number (Documentation/admin-guide/devices.txt).
const DEVICES: [(&CStr, u32, u32); 6] = [
    (c"/proc/null", 1, 3),
    (c"/proc/zero", 1, 5),
    (c"/proc/full", 1, 7),
    (c"/proc/random", 1, 8),
    (c"/proc/urandom", 1, 9),
    (c"/proc/tty", 5, 0),
];
/// Its links: what they lead to, and where they are.
const LINKS: [(&CStr, &CStr); 5] = [
    (c"pts/ptmx", c"/proc/ptmx"),
    (c"/proc/self/fd", c"/proc/fd"),
    (c"/proc/self/fd/0", c"/proc/stdin"),
    (c"/proc/self/fd/1", c"/proc/stdout"),
    (c"/proc/self/fd/2", c"/proc/stderr"),
];
/// File systems of the agent's that are there too: from where, and where they are.
const SHARED: [(&CStr, &CStr); 2] = [(c"/dev/pts", c"/proc/pts"), (c"/dev/shm", c"/proc/shm")];
/// Parts of /proc that change the kernel for everybody, and belong to uid 0 whatever it may do.
const GOVERNING: [&CStr; 5] = [c"/proc/sys", c"/proc/sysrq-trigger", c"/proc/irq", c"/proc/bus", c"/proc/fs"];
/// Whole file systems of that kind.
const READ_ONLY: [&CStr; 2] = [c"/sys/fs/cgroup", c"/sys"];

/// mount(2). Empty strings are none.
///
/// # Safety
/// As `call`.
unsafe fn attach(source: &CStr, target: &CStr, kind: &CStr, flags: libc::c_ulong, data: &CStr) -> isize {
    let [source, target, kind, data] = [source, target, kind, data].map(|text| text.as_ptr() as usize);
    // SAFETY: strings with their NULs, and plain flags.
    unsafe { call(libc::SYS_mount, [source, target, kind, flags as usize, data]) }
}

/// Makes the mount namespace of the process what programs are to see. Negative: the number of an error.
///
/// # Safety
/// Only in the keeper, which has it to itself.
unsafe fn furnish() -> isize {
    const SEALED: libc::c_ulong = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    const BIND: libc::c_ulong = libc::MS_BIND | libc::MS_REC;
    const FREEZE: libc::c_ulong = libc::MS_REMOUNT | libc::MS_BIND | libc::MS_RDONLY | SEALED;
    // A file system that is not there needs nothing.
    let absent = |result: isize| result == -(libc::ENOENT as isize) || result == -(libc::EINVAL as isize);
    let mut failed = 0;
    let mut need = |result: isize| {
        if result < 0 && failed == 0 {
            failed = result;
        }
    };
    // SAFETY: plain numbers and constant strings.
    unsafe {
        need(attach(c"", c"/", c"", libc::MS_REC | libc::MS_SLAVE, c""));
        for path in READ_ONLY {
            let frozen = attach(c"", path, c"", FREEZE, c"");
            need(if absent(frozen) { 0 } else { frozen });
        }
        // Its /dev has no disks and nothing else of the machine's. It is made where /proc will be, and moved.
        call(libc::SYS_umask, [0; 5]);
        let flags = libc::MS_NOSUID | libc::MS_NOEXEC;
        need(attach(c"dev", c"/proc", c"tmpfs", flags, c"mode=755,size=64k,nr_inodes=64"));
        for (path, major, minor) in DEVICES {
            let mode = libc::S_IFCHR as usize | 0o666;
            need(call(libc::SYS_mknod, [path.as_ptr() as usize, mode, (major << 8 | minor) as usize, 0, 0]));
        }
        for (target, path) in LINKS {
            need(call(libc::SYS_symlink, [target.as_ptr() as usize, path.as_ptr() as usize, 0, 0, 0]));
        }
        for (from, path) in SHARED {
            need(call(libc::SYS_mkdir, [path.as_ptr() as usize, 0o755, 0, 0, 0]));
            let shared = attach(from, path, c"", BIND, c"");
            need(if absent(shared) { 0 } else { shared });
        }
        need(attach(c"/proc", c"/dev", c"", libc::MS_MOVE, c""));
        need(attach(c"proc", c"/proc", c"proc", SEALED, c""));
        for path in GOVERNING {
            let bound = attach(path, path, c"", BIND, c"");
            if !absent(bound) {
                need(bound);
                need(attach(c"", path, c"", FREEZE, c""));
            }
        }
    }
    failed
}

/// The keeper: makes its file systems, says so, and reaps until it is told to end.
extern "C" fn keep(ready: *mut libc::c_void) -> libc::c_int {
    let ready = ready as usize;
    let exit = |code: usize| -> ! {
        loop {
            // SAFETY: ends this process.
            unsafe { call(libc::SYS_exit_group, [code, 0, 0, 0, 0]) };
        }
    };
    let all = libc::c_uint::MAX as usize;
    let mask: u64 = 1 << (libc::SIGCHLD - 1);
    // SAFETY: plain numbers, constant strings, and values on this stack.
    unsafe {
        call(libc::SYS_close_range, [0, ready - 1, 0, 0, 0]);
        call(libc::SYS_close_range, [ready + 1, all, 0, 0, 0]);
        call(libc::SYS_prctl, [libc::PR_SET_NAME as usize, c"keeper".as_ptr() as usize, 0, 0, 0]);
        let done = furnish();
        let errno = -done as i32;
        call(libc::SYS_write, [ready, &raw const errno as usize, 4, 0, 0]);
        call(libc::SYS_close, [ready, 0, 0, 0, 0]);
        if errno != 0 {
            exit(1);
        }
        loop {
            while call(libc::SYS_wait4, [usize::MAX, 0, libc::WNOHANG as usize, 0, 0]) > 0 {}
            let ending = ENDING.load(Ordering::Relaxed);
            // Signal 0 to all others in here: there is none.
            if ending && call(libc::SYS_kill, [usize::MAX, 0, 0, 0, 0]) == -(libc::ESRCH as isize) {
                exit(0);
            }
            let look = libc::timespec { tv_sec: 0, tv_nsec: LOOK_NS };
            let patience = if ending { &raw const look as usize } else { 0 };
            call(libc::SYS_rt_sigtimedwait, [&raw const mask as usize, 0, patience, size_of::<u64>(), 0]);
        }
    }
}
