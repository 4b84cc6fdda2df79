//! From a plan to a running program.
//!
//! Everything is prepared before the fork: the child only makes system calls on what is there, for the
//! agent may have threads, and a lock that one of them held would stay locked in the child. It is a fork and no
//! vfork, so that a program on a file system that hangs stops its own child and not the agent.

use std::ffi::CString;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;

use super::calls;
use super::realm::Realm;
use super::user::Identity;
use crate::guest::loopback;

/// Descriptors that a program may have: the soft limit is what select(2) can take.
const FILES_SOFT: u64 = 1024;
const FILES_HARD: u64 = 524_288;
/// Descriptors that are passed to a program are below this.
const PASSED_END: RawFd = 16;
/// The group that terminals belong to (`gid=5` of the devpts mount).
const TTY_GROUP: u32 = 5;

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Size {
    pub cols: u16,
    pub rows: u16,
}

/// What is to be run. No string holds a NUL.
#[derive(Debug)]
pub(crate) struct Plan {
    pub argv: Vec<CString>,
    pub env: Vec<CString>,
    /// Where the program may be, in order.
    pub candidates: Vec<CString>,
    pub cwd: CString,
    /// `None`: as the agent itself.
    pub identity: Option<Identity>,
    pub terminal: Option<Size>,
    /// Whether stdin is a pipe; else it is /dev/null. A terminal is always readable by the program.
    pub stdin: bool,
    /// Whether the agent is PID 1, and programs must not gain power over it.
    pub confined: bool,
    /// Whether it has a network namespace of its own, with a loopback interface and nothing else.
    pub isolated: bool,
    /// What it has from descriptor 3 on, in this order.
    pub passed: Vec<OwnedFd>,
}

/// A child on its way to its program.
#[derive(Debug)]
pub(crate) struct Spawned {
    pub pid: libc::pid_t,
    /// Tells when the program runs.
    pub birth: Birth,
    pub stdin: Option<File>,
    pub stdout: File,
    pub stderr: Option<File>,
    /// To resize the terminal.
    pub terminal: Option<File>,
}

/// What the child could not do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Stage {
    Session = 1,
    Terminal,
    Streams,
    Limits,
    User,
    Directory,
    Program,
    Network,
    Realm,
}

/// Why a program could not be run: the step and its errno.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Failure {
    pub stage: Stage,
    pub errno: Errno,
}

/// What a child writes into its status pipe: a stage and a number, 5 octets at once.
type Word = [u8; 5];
/// In the place of a stage: the number is that of the process as it sees itself.
const PID: u8 = 0;

fn word(stage: u8, number: i32) -> Word {
    let [a, b, c, d] = number.to_le_bytes();
    [stage, a, b, c, d]
}

/// A child's status pipe. It closes when the program runs; before that it may carry a failure.
#[derive(Debug)]
pub(crate) struct Birth {
    pub status: File,
    /// Its number as it and its like see it.
    pub pid: libc::pid_t,
}

/// How far a child is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Born {
    /// On its way.
    NotYet,
    /// It is its program, or has ended: which of them, its exit tells.
    Runs,
    /// It never became its program.
    Failed(Failure),
}

impl Birth {
    /// Looks how far it is.
    pub(crate) fn look(&mut self) -> Born {
        loop {
            let mut word: Word = [0; 5];
            match self.status.read(&mut word) {
                Ok(5) if word[0] == PID => self.pid = Failure::number(word),
                Ok(5) => return Born::Failed(Failure::from_word(word)),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return Born::NotYet,
                // Closed by the exec, or by the child's sudden end.
                Ok(_) | Err(_) => return Born::Runs,
            }
        }
    }
}

impl Failure {
    fn number([_, a, b, c, d]: Word) -> i32 {
        i32::from_le_bytes([a, b, c, d])
    }

    fn from_word(word: Word) -> Self {
        let stage = match word[0] {
            1 => Stage::Session,
            2 => Stage::Terminal,
            3 => Stage::Streams,
            4 => Stage::Limits,
            5 => Stage::User,
            6 => Stage::Directory,
            8 => Stage::Network,
            9 => Stage::Realm,
            _ => Stage::Program,
        };
        Self { stage, errno: Errno::from_raw(Self::number(word)) }
    }
}

/// The child's ends of its streams, in the order of their descriptors.
struct ChildStreams {
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

/// Starts a child that becomes the program, in the realm where there is one for it.
///
/// # Errors
/// What the kernel says when pipes, a terminal or a process are not to be had.
pub(crate) fn spawn(
    plan: &Plan,
    null: &File,
    cgroup: Option<BorrowedFd<'_>>,
    realm: Option<&Realm>,
) -> nix::Result<Spawned> {
    let (status, status_of_child) = pipe2(OFlag::O_CLOEXEC)?;
    let mut spawned = Spawned {
        pid: 0,
        birth: Birth { status: own(status)?, pid: 0 },
        stdin: None,
        stdout: null.try_clone().map_err(errno_of)?,
        stderr: None,
        terminal: None,
    };
    let streams = match plan.terminal {
        Some(size) => {
            let (master, slave) = open_terminal(size, plan.identity.as_ref())?;
            let master = own(master)?;
            spawned.stdin = plan.stdin.then(|| master.try_clone()).transpose().map_err(errno_of)?;
            spawned.terminal = Some(master.try_clone().map_err(errno_of)?);
            spawned.stdout = master;
            ChildStreams { stdin: copy(&slave)?, stdout: copy(&slave)?, stderr: slave }
        }
        None => {
            let stdin = if plan.stdin {
                let (theirs, ours) = pipe2(OFlag::O_CLOEXEC)?;
                spawned.stdin = Some(own(ours)?);
                theirs
            } else {
                copy(null)?
            };
            let (stdout, stdout_of_child) = pipe2(OFlag::O_CLOEXEC)?;
            let (stderr, stderr_of_child) = pipe2(OFlag::O_CLOEXEC)?;
            spawned.stdout = own(stdout)?;
            spawned.stderr = Some(own(stderr)?);
            ChildStreams { stdin, stdout: stdout_of_child, stderr: stderr_of_child }
        }
    };
    let (streams, status_of_child) = match plan.passed.is_empty() {
        true => (streams, status_of_child),
        // Else one of them could have the number of one that is passed.
        false => {
            let ChildStreams { stdin, stdout, stderr } = streams;
            let streams = ChildStreams { stdin: raise(stdin)?, stdout: raise(stdout)?, stderr: raise(stderr)? };
            (streams, raise(status_of_child)?)
        }
    };
    let passed = plan.passed.iter().map(|fd| raise(copy(fd)?)).collect::<nix::Result<Vec<_>>>()?;
    let argv = pointers(&plan.argv);
    let env = pointers(&plan.env);
    let status = status_of_child.as_raw_fd();
    let confinement = realm.map(|realm| Confinement { mounts: realm.mounts(), calls: calls::filter() });
    let prepared = Prepared { plan, argv: &argv, env: &env, streams: &streams, passed: &passed, status, confinement };
    let forked = match realm {
        None => fork_into(cgroup, &prepared),
        Some(realm) => {
            realm.enter()?;
            let forked = fork_into(cgroup, &prepared);
            realm.leave()?;
            forked
        }
    };
    spawned.pid = forked?;
    spawned.birth.pid = spawned.pid;
    Ok(spawned)
}

/// The agent's end of a stream: non-blocking, while the other end stays as programs expect it.
fn own(fd: OwnedFd) -> nix::Result<File> {
    fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(File::from(fd))
}

fn copy(fd: &impl AsFd) -> nix::Result<OwnedFd> {
    fd.as_fd().try_clone_to_owned().map_err(errno_of)
}

/// The same descriptor by a number above all that are passed to programs.
fn raise(fd: OwnedFd) -> nix::Result<OwnedFd> {
    let raised = fcntl(&fd, FcntlArg::F_DUPFD_CLOEXEC(PASSED_END))?;
    // SAFETY: fcntl has just made this descriptor and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(raised) })
}

fn errno_of(error: std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

/// A pseudo terminal: the agent's side and the program's.
fn open_terminal(size: Size, identity: Option<&Identity>) -> nix::Result<(OwnedFd, OwnedFd)> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let master = nix::fcntl::open("/dev/ptmx", flags, nix::sys::stat::Mode::empty())?;
    let unlock: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads one int.
    Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &unlock) })?;
    // SAFETY: TIOCGPTPEER takes open flags as its value and gives a new descriptor.
    let slave = Errno::result(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags.bits()) })?;
    // SAFETY: the ioctl has just made this descriptor and nothing else owns it.
    let slave = unsafe { OwnedFd::from_raw_fd(slave) };
    resize(&master, size)?;
    if let Some(identity) = identity {
        // So that the user's programs can open their terminal by name.
        let _ = std::os::unix::fs::fchown(&slave, Some(identity.uid), Some(TTY_GROUP));
    }
    Ok((master, slave))
}

/// Sets a terminal's size; its foreground process group gets SIGWINCH.
pub(super) fn resize(terminal: &impl AsFd, size: Size) -> nix::Result<()> {
    let size = libc::winsize { ws_row: size.rows, ws_col: size.cols, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize.
    Errno::result(unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSWINSZ, &size) }).map(drop)
}

/// What execve(2) takes: the strings' addresses and a null. Valid as long as `strings` is.
fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
}

/// All that the child needs, in memory that it only reads.
struct Prepared<'a> {
    plan: &'a Plan,
    argv: &'a [*const libc::c_char],
    env: &'a [*const libc::c_char],
    streams: &'a ChildStreams,
    passed: &'a [OwnedFd],
    status: RawFd,
    confinement: Option<Confinement>,
}

/// What a program that is not trusted with the sandbox has besides.
struct Confinement {
    /// The realm's mount namespace.
    mounts: RawFd,
    /// The filter of its system calls.
    calls: &'static [libc::sock_filter],
}

/// Forks, into the cgroup where there is one: so the program is never outside of it.
fn fork_into(cgroup: Option<BorrowedFd<'_>>, prepared: &Prepared<'_>) -> nix::Result<libc::pid_t> {
    let pid = match cgroup {
        Some(cgroup) => {
            // SAFETY: clone_args is plain data for which all zeros is a valid value.
            let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
            args.flags = CLONE_INTO_CGROUP;
            args.exit_signal = libc::SIGCHLD as u64;
            args.cgroup = cgroup.as_raw_fd() as u64;
            // SAFETY: `args` is a whole clone_args. Without CLONE_VM and with no stack given this is a
            // fork: the child goes on here in a copy of this memory, and makes only system calls.
            unsafe { libc::syscall(libc::SYS_clone3, &args, size_of::<libc::clone_args>()) as libc::pid_t }
        }
        // SAFETY: the child makes only system calls, so it does not matter what other threads were doing.
        None => unsafe { libc::fork() },
    };
    if pid == 0 {
        // SAFETY: this is the child of the fork above.
        unsafe { become_program(prepared) }
    }
    Errno::result(pid)
}

/// The child's way to its program. It never returns, and allocates nothing.
///
/// # Safety
/// Only in a fresh child process that has one thread.
unsafe fn become_program(prepared: &Prepared<'_>) -> ! {
    // SAFETY: `prepared` holds open descriptors and null-terminated arrays of NUL-terminated strings.
    let failure = match unsafe { try_to_become(prepared) } {
        Ok(never) => match never {},
        Err(failure) => failure,
    };
    let octets = word(failure.stage as u8, failure.errno as i32);
    // SAFETY: the status pipe is open and `octets` is readable; _exit runs no handlers of the parent's.
    unsafe {
        libc::write(prepared.status, octets.as_ptr().cast(), octets.len());
        libc::_exit(127)
    }
}

/// # Safety
/// As `become_program`.
unsafe fn try_to_become(prepared: &Prepared<'_>) -> Result<std::convert::Infallible, Failure> {
    let check = |stage: Stage, result: libc::c_int| match result {
        -1 => Err(Failure { stage, errno: Errno::last() }),
        _ => Ok(()),
    };
    let plan = prepared.plan;
    // SAFETY: system calls on descriptors, strings and arrays that `prepared` keeps alive; the buffers
    // on the stack are whole values of the types that the calls take.
    unsafe {
        // The agent blocks signals that it reads from a descriptor, and Rust ignores SIGPIPE.
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        check(Stage::Session, libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut()))?;
        check(Stage::Session, libc::setsid())?;

        // The agent's own 0, 1 and 2 are taken, so none of these is one of them.
        let streams = prepared.streams;
        for (fd, to) in [(&streams.stdin, 0), (&streams.stdout, 1), (&streams.stderr, 2)] {
            check(Stage::Streams, libc::dup2(fd.as_raw_fd(), to))?;
        }
        for (to, fd) in (3..PASSED_END).zip(prepared.passed) {
            check(Stage::Streams, libc::dup2(fd.as_raw_fd(), to))?;
        }
        if plan.terminal.is_some() {
            check(Stage::Terminal, libc::ioctl(0, libc::TIOCSCTTY, 0))?;
        }

        if plan.confined {
            let files = libc::rlimit { rlim_cur: FILES_SOFT, rlim_max: FILES_HARD };
            check(Stage::Limits, libc::setrlimit(libc::RLIMIT_NOFILE, &files))?;
            // Without it even root cannot trace PID 1, which has it; root can still trace root's programs.
            check(Stage::Limits, libc::prctl(libc::PR_CAPBSET_DROP, CAP_SYS_PTRACE, 0, 0, 0))?;
        }
        if plan.isolated {
            check(Stage::Network, libc::unshare(libc::CLONE_NEWNET))?;
            // System calls and nothing else. Without it the code has less, and no power over anything.
            let _ = loopback::up();
        }
        if let Some(confinement) = &prepared.confinement {
            check(Stage::Realm, libc::setns(confinement.mounts, libc::CLONE_NEWNS))?;
            let kept = match &plan.identity {
                Some(identity) if identity.uid == 0 => KEPT_OF_UID_0,
                _ => 0,
            };
            // Those that this kernel does not know it refuses.
            for capability in (0..=CAP_LAST).filter(|capability| kept & (1 << capability) == 0) {
                libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0);
            }
        }
        if let Some(identity) = &plan.identity {
            // The kernel's own calls: the C library's would wait for the agent's threads, which are not in the child.
            let (uid, gid) = (identity.uid, identity.gid);
            let groups = identity.groups.as_slice();
            let done = |result: libc::c_long| check(Stage::User, if result < 0 { -1 } else { 0 });
            done(libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()))?;
            done(libc::syscall(libc::SYS_setresgid, gid, gid, gid))?;
            done(libc::syscall(libc::SYS_setresuid, uid, uid, uid))?;
        }
        check(Stage::Directory, libc::chdir(plan.cwd.as_ptr()))?;
        let pid = word(PID, libc::syscall(libc::SYS_getpid) as i32);
        libc::write(prepared.status, pid.as_ptr().cast(), pid.len());
        if let Some(confinement) = &prepared.confinement {
            check(Stage::Realm, libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
            let calls = confinement.calls;
            let program = libc::sock_fprog { len: calls.len() as u16, filter: calls.as_ptr().cast_mut() };
            let set = libc::SECCOMP_SET_MODE_FILTER;
            let done = libc::syscall(libc::SYS_seccomp, set, 0, &raw const program);
            check(Stage::Realm, if done == 0 { 0 } else { -1 })?;
        }

        // As execvp(3): a file that may not be run counts only when no other is found.
        let mut errno = Errno::ENOENT;
        for candidate in &plan.candidates {
            libc::execve(candidate.as_ptr(), prepared.argv.as_ptr(), prepared.env.as_ptr());
            match Errno::last() {
                Errno::ENOENT | Errno::ENOTDIR => {}
                Errno::EACCES => errno = Errno::EACCES,
                other => {
                    errno = other;
                    break;
                }
            }
        }
        Err(Failure { stage: Stage::Program, errno })
    }
}

/// include/uapi/linux/sched.h; libc's constant is cut to 32 bits.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
/// include/uapi/linux/capability.h
const CAP_SYS_PTRACE: libc::c_ulong = 19;
/// The last capability that there is room for.
const CAP_LAST: libc::c_ulong = 63;
/// What a program in the realm has that runs as uid 0, one bit each: CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID,
/// NET_BIND_SERVICE, NET_RAW and SYS_CHROOT. It is power over the sandbox's files and over programs that are in there too.
const KEPT_OF_UID_0: u64 = 1 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 10 | 1 << 13 | 1 << 18;
