//! What a guest that has taken over its worker would try: one system call each. See `vm-rig jail`.

use libc::{c_char, c_long};

/// One attempt.
#[derive(Debug, Clone, Copy)]
pub struct Attack {
    /// Its name.
    pub name: &'static str,
    /// Makes the call; negative when it was refused, with `errno` set.
    pub call: fn() -> c_long,
    /// What the spawner's part of the jail alone makes of it.
    pub without_list: Without,
}

/// What becomes of an attempt where no list of system calls is in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Without {
    /// Refused, with one of these errors.
    Refused(&'static [i32]),
    /// It works until Landlock is closed, and is then refused with this error.
    UntilLandlock(i32),
    /// It may work: only the list stops it, or it reaches nothing.
    List,
}

macro_rules! attacks {
    ($($name:literal $without:expr, $call:expr;)*) => {
        /// All of them.
        pub const ATTACKS: &[Attack] = &[$(Attack {
            name: $name,
            call: || {
                // SAFETY: each call has plain numbers, null pointers, or texts and buffers that live through it; what it
                // would do to this process is what it is here for.
                unsafe { $call }
            },
            without_list: $without,
        },)*];
    };
}

use Without::{List, Refused, UntilLandlock};

const NULL: *const c_char = std::ptr::null();
/// No such process: in its own pid namespace a worker is alone.
const ALONE: Without = Refused(&[libc::ESRCH]);
/// Only for capabilities that it does not have.
const NO_RIGHT: Without = Refused(&[libc::EPERM]);
const NO_RIGHT_OR_CALL: Without = Refused(&[libc::EPERM, libc::EACCES, libc::ENOSYS]);

attacks! {
    "open-file" Refused(&[libc::ENOENT, libc::EACCES]), libc::syscall(libc::SYS_openat, libc::AT_FDCWD, c"/etc/passwd".as_ptr(), libc::O_RDONLY);
    "open-root" UntilLandlock(libc::EACCES), libc::syscall(libc::SYS_openat, libc::AT_FDCWD, c"/".as_ptr(), libc::O_RDONLY);
    "open-kvm" Refused(&[libc::ENOENT, libc::EACCES]), libc::syscall(libc::SYS_openat, libc::AT_FDCWD, c"/dev/kvm".as_ptr(), libc::O_RDWR);
    "open-proc" Refused(&[libc::ENOENT, libc::EACCES]), libc::syscall(libc::SYS_openat, libc::AT_FDCWD, c"/proc/1/mem".as_ptr(), libc::O_RDWR);
    "create-file" Refused(&[libc::EROFS, libc::EACCES]), libc::syscall(libc::SYS_openat, libc::AT_FDCWD, c"/file".as_ptr(), libc::O_CREAT | libc::O_WRONLY, 0o600);
    "make-node" Refused(&[libc::EROFS, libc::EACCES, libc::EPERM]), libc::syscall(libc::SYS_mknodat, libc::AT_FDCWD, c"/kvm".as_ptr(), libc::S_IFCHR | 0o600, 0xae8);
    "climb-out" Refused(&[libc::ENOENT, libc::EACCES]), libc::syscall(libc::SYS_openat, libc::AT_FDCWD, c"/../../etc".as_ptr(), libc::O_RDONLY);
    "open-by-handle" Refused(&[libc::EPERM, libc::EFAULT, libc::EBADF]), libc::syscall(libc::SYS_open_by_handle_at, 0, NULL, 0);
    "socket-unix" List, libc::syscall(libc::SYS_socket, libc::AF_UNIX, libc::SOCK_STREAM, 0);
    "socket-inet" List, libc::syscall(libc::SYS_socket, libc::AF_INET, libc::SOCK_STREAM, 0);
    "socket-packet" NO_RIGHT, libc::syscall(libc::SYS_socket, libc::AF_PACKET, libc::SOCK_RAW, 0);
    "socket-netlink" List, libc::syscall(libc::SYS_socket, libc::AF_NETLINK, libc::SOCK_RAW, 0);
    "reach-network" Refused(&[libc::ENETUNREACH, libc::EACCES]), reach_network();
    "read-process" ALONE, vector_call(libc::SYS_process_vm_readv, 2);
    "write-process" ALONE, vector_call(libc::SYS_process_vm_writev, 2);
    "ptrace-other" ALONE, libc::syscall(libc::SYS_ptrace, libc::PTRACE_ATTACH, 2, 0, 0);
    "kill-all" ALONE, libc::syscall(libc::SYS_kill, -1, libc::SIGKILL);
    "tgkill-other" ALONE, libc::syscall(libc::SYS_tgkill, 2, 2, libc::SIGKILL);
    "tkill-other" ALONE, libc::syscall(libc::SYS_tkill, 2, libc::SIGKILL);
    "pidfd-open" ALONE, libc::syscall(libc::SYS_pidfd_open, 2, 0);
    "pidfd-getfd" Refused(&[libc::EBADF]), libc::syscall(libc::SYS_pidfd_getfd, 99, 0, 0);
    "mount" Refused(&[libc::EPERM, libc::EACCES]), libc::syscall(libc::SYS_mount, c"none".as_ptr(), c"/".as_ptr(), c"proc".as_ptr(), 0, NULL);
    "remount" Refused(&[libc::EPERM, libc::EACCES]), libc::syscall(libc::SYS_mount, NULL, c"/".as_ptr(), NULL, libc::MS_REMOUNT | libc::MS_BIND, NULL);
    "umount" Refused(&[libc::EPERM, libc::EACCES]), libc::syscall(libc::SYS_umount2, c"/".as_ptr(), libc::MNT_DETACH);
    "pivot-root" Refused(&[libc::EPERM, libc::EACCES]), libc::syscall(libc::SYS_pivot_root, c"/".as_ptr(), c"/".as_ptr());
    "chroot" NO_RIGHT, libc::syscall(libc::SYS_chroot, c"/".as_ptr());
    "fsopen" NO_RIGHT, libc::syscall(libc::SYS_fsopen, c"proc".as_ptr(), 0);
    "unshare-user" Refused(&[libc::ENOSPC, libc::EPERM]), libc::syscall(libc::SYS_unshare, libc::CLONE_NEWUSER | libc::CLONE_NEWNS);
    "unshare-mounts" NO_RIGHT, libc::syscall(libc::SYS_unshare, libc::CLONE_NEWNS);
    "setns" Refused(&[libc::EBADF]), libc::syscall(libc::SYS_setns, 99, 0);
    "fork-sharing" List, libc::syscall(libc::SYS_clone, libc::SIGCHLD | libc::CLONE_FILES, 0, 0, 0, 0);
    "exec" Refused(&[libc::ENOENT, libc::EACCES]), libc::syscall(libc::SYS_execve, c"/bin/sh".as_ptr(), NULL, NULL);
    "exec-empty" Refused(&[libc::EACCES, libc::EBADF, libc::ENOEXEC]), libc::syscall(libc::SYS_execveat, 4, c"".as_ptr(), NULL, NULL, libc::AT_EMPTY_PATH);
    "bpf" Refused(&[libc::EPERM, libc::EINVAL]), libc::syscall(libc::SYS_bpf, 0, NULL, 0);
    "io-uring" List, io_uring();
    "userfaultfd" NO_RIGHT, libc::syscall(libc::SYS_userfaultfd, 0);
    "perf-event" Refused(&[libc::EPERM, libc::EACCES, libc::ENOSYS, libc::ENOENT, libc::EFAULT, libc::E2BIG]), libc::syscall(libc::SYS_perf_event_open, NULL, -1, 0, -1, 0);
    "keyctl" List, libc::syscall(libc::SYS_keyctl, 0, -3, 1);
    "memfd" List, libc::syscall(libc::SYS_memfd_create, c"x".as_ptr(), 0);
    "init-module" NO_RIGHT_OR_CALL, libc::syscall(libc::SYS_init_module, NULL, 0, NULL);
    "kexec" NO_RIGHT_OR_CALL, libc::syscall(libc::SYS_kexec_load, 0, 0, NULL, 0);
    "reboot" NO_RIGHT, libc::syscall(libc::SYS_reboot, 0xfee1_dead_u32, 672_274_793, 0x0123_4567, NULL);
    "become-root" NO_RIGHT, libc::syscall(libc::SYS_setresuid, 0, 0, 0);
    "join-group" NO_RIGHT, libc::syscall(libc::SYS_setresgid, 0, 0, 0);
    "set-groups" NO_RIGHT, libc::syscall(libc::SYS_setgroups, 1, [0_u32].as_ptr());
    "take-capabilities" NO_RIGHT, libc::syscall(libc::SYS_capset, [0x2008_0522_u32, 0].as_ptr(), [u32::MAX; 6].as_ptr());
    "raise-limit" NO_RIGHT, libc::syscall(libc::SYS_prlimit64, 0, libc::RLIMIT_NOFILE, [1_u64 << 20; 2].as_ptr(), NULL);
    "be-dumpable" List, libc::syscall(libc::SYS_prctl, libc::PR_SET_DUMPABLE, 1, 0, 0, 0);
    "personality" List, libc::syscall(libc::SYS_personality, 0x0004_0000);
    "ports" NO_RIGHT_OR_CALL, libc::syscall(libc::SYS_iopl, 3);
    "shared-memory" List, libc::syscall(libc::SYS_shmget, libc::IPC_PRIVATE, 4096, libc::IPC_CREAT | 0o600);
    "fanotify" NO_RIGHT_OR_CALL, libc::syscall(libc::SYS_fanotify_init, 0, 0);
    "inotify" List, libc::syscall(libc::SYS_inotify_init1, 0);
    "own-code" List, libc::syscall(libc::SYS_mmap, 0, 4096, libc::PROT_READ | libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0);
    "code-of-data" List, code_of_data();
    "free-hole" List, libc::syscall(libc::SYS_madvise, 0, 0, libc::MADV_REMOVE);
    "tty-input" Refused(&[libc::ENOTTY, libc::EIO]), libc::syscall(libc::SYS_ioctl, 0, libc::TIOCSTI, c"x".as_ptr());
    "owner-signals" List, libc::syscall(libc::SYS_fcntl, 3, libc::F_SETOWN, 1);
    "x32-call" Refused(&[libc::ENOSYS]), libc::syscall(0x4000_0000 + libc::SYS_getpid);
    "no-such-call" Refused(&[libc::ENOSYS]), libc::syscall(1023);
}

/// # Safety
/// Only of vector calls between processes.
unsafe fn vector_call(number: c_long, pid: libc::pid_t) -> c_long {
    let mut octets = [0_u8; 16];
    let vector = libc::iovec { iov_base: octets.as_mut_ptr().cast(), iov_len: octets.len() };
    // SAFETY: one live vector of this process, and an address of the other's.
    unsafe { libc::syscall(number, pid, &raw const vector, 1, &raw const vector, 1, 0) }
}

/// # Safety
/// None needed; the same kind of function as the others.
unsafe fn io_uring() -> c_long {
    let mut parameters = [0_u64; 64];
    // SAFETY: the structure has 120 octets.
    unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, parameters.as_mut_ptr()) }
}

/// # Safety
/// None needed; the same kind of function as the others.
unsafe fn code_of_data() -> c_long {
    // SAFETY: asks for the rights of a page of this function's own stack, which stays readable and writable.
    unsafe {
        let here = 0_u8;
        let page = (&raw const here as usize) & !4095;
        libc::syscall(libc::SYS_mprotect, page, 4096, libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC)
    }
}

/// # Safety
/// None needed; the same kind of function as the others.
unsafe fn reach_network() -> c_long {
    // SAFETY: a socket of our own and a live address.
    unsafe {
        let socket = libc::syscall(libc::SYS_socket, libc::AF_INET, libc::SOCK_STREAM, 0);
        if socket < 0 {
            return socket;
        }
        let mut address: libc::sockaddr_in = std::mem::zeroed();
        address.sin_family = libc::AF_INET as u16;
        address.sin_port = 80_u16.to_be();
        address.sin_addr.s_addr = u32::from_ne_bytes([1, 1, 1, 1]);
        libc::syscall(libc::SYS_connect, socket, &raw const address, size_of::<libc::sockaddr_in>())
    }
}
