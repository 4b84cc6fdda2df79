//! Where users' programs live: a pid namespace and a mount namespace of their own, one of each for all of a sandbox. They see
//! neither the agent nor what root runs, and what they leave behind becomes the child of process 1 in there, the keeper.
//!
//! The keeper shares the agent's memory, so that it costs a sandbox a stack and nothing else. It therefore makes system calls
//! by itself: the C library's would write the agent's `errno`.

use std::arch::asm;
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
        let slave = (libc::MS_REC | libc::MS_SLAVE) as usize;
        let sealed = (libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC) as usize;
        let mut done = call(libc::SYS_mount, [0, c"/".as_ptr() as usize, 0, slave, 0]);
        if done == 0 {
            let proc = c"proc".as_ptr() as usize;
            done = call(libc::SYS_mount, [proc, c"/proc".as_ptr() as usize, proc, sealed, 0]);
        }
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
