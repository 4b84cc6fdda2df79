//! The system calls that a worker may make, by kind of thread, each with its reason. docs/security.md shows these tables;
//! a test keeps the two the same.
//!
//! A list is in force on top of the one that its thread was started under, so each is a part of `Start`'s.

use libc::c_long;

use crate::vmm::snapshot::memory::PAGEMAP_SCAN;

/// Kinds of threads, and the main thread's two ages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The main thread from its jail's closing until the machine is made, and each new thread's first moments.
    Start,
    /// The main thread while the guest runs: the loop, the supervisor's requests, the devices.
    Device,
    /// A processor.
    Processor,
    /// A disk.
    Disk,
    /// The writer of the console's log.
    Log,
}

impl Kind {
    /// All of them, in the order of the documentation's columns.
    pub const ALL: [Self; 5] = [Self::Start, Self::Device, Self::Processor, Self::Disk, Self::Log];

    /// The letter that stands for it in the tables.
    pub fn letter(self) -> char {
        match self {
            Self::Start => 'S',
            Self::Device => 'D',
            Self::Processor => 'P',
            Self::Disk => 'K',
            Self::Log => 'L',
        }
    }
}

/// Who may make a call: letters of `Kind`. `Start` may make them all.
pub type Kinds = &'static str;

/// What the arguments have to be.
#[derive(Debug, Clone, Copy)]
pub enum Rule {
    /// Anything.
    Any,
    /// One of `REQUESTS` as the second argument.
    Requests,
    /// The argument of this number (from 0), 32 bits of it, has none of these bits.
    Without(u8, u64, &'static str),
    /// The argument of this number, 32 bits of it, is one of these.
    OneOf(u8, &'static [(u64, &'static str)]),
    /// Each of these arguments, 32 bits of it, has this value.
    All(&'static [(u8, u64)], &'static str),
}

/// A system call.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// Its name in the kernel.
    pub name: &'static str,
    /// Its number on x86_64.
    pub number: c_long,
    /// Who makes it, besides `Start`.
    pub kinds: Kinds,
    /// With which arguments.
    pub rule: Rule,
    /// What for.
    pub why: &'static str,
}

/// An ioctl.
#[derive(Debug, Clone, Copy)]
pub struct Ioctl {
    /// Its name in the kernel's headers.
    pub name: &'static str,
    /// Its request number.
    pub number: u64,
    /// Who makes it, besides `Start`.
    pub kinds: Kinds,
}

macro_rules! calls {
    ($($name:ident $kinds:literal $rule:expr, $why:literal;)*) => {
        /// All calls that any thread may make.
        pub const CALLS: &[Call] = &[$(Call {
            name: stringify!($name),
            number: numbers::$name,
            kinds: $kinds,
            rule: $rule,
            why: $why,
        },)*];
    };
}

/// SYS_* under the names that the kernel gives them.
#[allow(non_upper_case_globals)]
mod numbers {
    macro_rules! number {
        ($($name:ident = $number:ident,)*) => {
            $(pub const $name: libc::c_long = libc::$number;)*
        };
    }
    number! {
        accept4 = SYS_accept4, brk = SYS_brk, clock_gettime = SYS_clock_gettime,
        clock_nanosleep = SYS_clock_nanosleep, clone = SYS_clone, clone3 = SYS_clone3, close = SYS_close, epoll_create1 = SYS_epoll_create1,
        epoll_ctl = SYS_epoll_ctl, epoll_wait = SYS_epoll_wait, eventfd2 = SYS_eventfd2, exit = SYS_exit,
        exit_group = SYS_exit_group, fallocate = SYS_fallocate, fcntl = SYS_fcntl, fdatasync = SYS_fdatasync,
        fstat = SYS_fstat, ftruncate = SYS_ftruncate, futex = SYS_futex, getpid = SYS_getpid,
        getrandom = SYS_getrandom, gettid = SYS_gettid, ioctl = SYS_ioctl, lseek = SYS_lseek,
        madvise = SYS_madvise, mmap = SYS_mmap, mprotect = SYS_mprotect, mremap = SYS_mremap, munmap = SYS_munmap,
        prctl = SYS_prctl, pread64 = SYS_pread64, preadv = SYS_preadv, prlimit64 = SYS_prlimit64, pwrite64 = SYS_pwrite64,
        pwritev = SYS_pwritev, read = SYS_read, readv = SYS_readv, recvmsg = SYS_recvmsg,
        restart_syscall = SYS_restart_syscall, rseq = SYS_rseq, rt_sigaction = SYS_rt_sigaction,
        rt_sigprocmask = SYS_rt_sigprocmask, rt_sigreturn = SYS_rt_sigreturn,
        sched_getaffinity = SYS_sched_getaffinity, sched_yield = SYS_sched_yield, seccomp = SYS_seccomp, sendmsg = SYS_sendmsg,
        set_robust_list = SYS_set_robust_list, setsockopt = SYS_setsockopt, shutdown = SYS_shutdown,
        sigaltstack = SYS_sigaltstack, statx = SYS_statx, tgkill = SYS_tgkill, timerfd_create = SYS_timerfd_create,
        timerfd_settime = SYS_timerfd_settime, write = SYS_write, writev = SYS_writev,
    }
}

const ADVICE: Rule = Rule::OneOf(
    2,
    &[
        (libc::MADV_DONTNEED as u64, "DONTNEED"),
        (libc::MADV_DONTDUMP as u64, "DONTDUMP"),
        (libc::MADV_HUGEPAGE as u64, "HUGEPAGE"),
        (libc::MADV_POPULATE_WRITE as u64, "POPULATE_WRITE"),
    ],
);
const NO_CODE: Rule = Rule::Without(2, libc::PROT_EXEC as u64, "never PROT_EXEC");
const OWN_FLAGS: Rule = Rule::OneOf(
    1,
    &[
        (libc::F_GETFD as u64, "F_GETFD"),
        (libc::F_SETFD as u64, "F_SETFD"),
        (libc::F_GETFL as u64, "F_GETFL"),
        (libc::F_SETFL as u64, "F_SETFL"),
        (libc::F_DUPFD_CLOEXEC as u64, "F_DUPFD_CLOEXEC"),
    ],
);
/// Lower only: CAP_SYS_RESOURCE raises it again.
const OWN_FILES: Rule = Rule::All(&[(0, 0), (1, libc::RLIMIT_FSIZE as u64)], "RLIMIT_FSIZE of itself");
const NAMES_ONLY: Rule = Rule::OneOf(0, &[(libc::PR_SET_NAME as u64, "PR_SET_NAME")]);
/// In its own pid namespace the worker is process 1.
const ITSELF: Rule = Rule::All(&[(0, 1)], "process 1, which is itself");
const SEND_BUFFER: Rule =
    Rule::All(&[(1, libc::SOL_SOCKET as u64), (2, libc::SO_SNDBUF as u64)], "SOL_SOCKET, SO_SNDBUF");
/// A process like this one, under the same list; no thread, no other namespace.
const COPY: Rule = Rule::All(&[(0, libc::SIGCHLD as u64)], "SIGCHLD, and no flag");
const FILTER: Rule = Rule::All(&[(0, libc::SECCOMP_SET_MODE_FILTER as u64)], "SECCOMP_SET_MODE_FILTER");

calls! {
    accept4 "D" Rule::Any, "connections of the supervisor";
    brk "DPKL" Rule::Any, "memory of the allocator";
    clock_gettime "DPKL" Rule::Any, "time, on hosts whose clock cannot be read without the kernel";
    clock_nanosleep "DP" Rule::Any, "a reset looks every millisecond whether its device rests";
    clone "D" COPY, "the child that writes a snapshot's memory while the guest goes on";
    clone3 "" Rule::Any, "threads of processors, disks and log";
    close "DPKL" Rule::Any, "streams that ended, files at the end";
    epoll_create1 "" Rule::Any, "one for each disk";
    epoll_ctl "DP" Rule::Any, "which streams and devices are watched";
    epoll_wait "DK" Rule::Any, "events";
    eventfd2 "" Rule::Any, "doorbells and interrupts";
    exit "DPKL" Rule::Any, "the end of a thread";
    exit_group "DPKL" Rule::Any, "the end of the process, also by a panic";
    fallocate "K" Rule::Any, "a guest's discard and write-zeroes";
    fcntl "" OWN_FLAGS, "flags of descriptors that came with a request";
    fdatasync "K" Rule::Any, "a guest's flush, a layer that is frozen";
    fstat "" Rule::Any, "sizes of files";
    ftruncate "L" Rule::Any, "the console's log begins anew";
    futex "DPKL" Rule::Any, "locks";
    getpid "DP" Rule::Any, "the C library before tgkill";
    getrandom "DP" Rule::Any, "the guest's random device; seeds of hash tables";
    gettid "" Rule::Any, "the C library at the start of a thread";
    ioctl "DPK" Rule::Requests, "see below";
    lseek "" Rule::Any, "sizes of files and block devices";
    madvise "DPKL" ADVICE, "memory that the guest or a thread gives back, and what a restored guest is about to change";
    mmap "DPKL" NO_CODE, "memory of the allocator";
    mprotect "" NO_CODE, "guard pages of threads' stacks";
    mremap "DPKL" Rule::Any, "large buffers that grow";
    munmap "DPKL" Rule::Any, "memory of the allocator and of threads that ended";
    prctl "" NAMES_ONLY, "names of threads";
    pread64 "DKL" Rule::Any, "disks' maps, KVM's counters, the log's own end";
    preadv "K" Rule::Any, "a guest's read from a disk";
    prlimit64 "" OWN_FILES, "how long its files may get, once it knows them";
    pwrite64 "DPKL" Rule::Any, "disks' maps, last words";
    pwritev "K" Rule::Any, "a guest's write to a disk";
    read "D" Rule::Any, "counters of events";
    readv "D" Rule::Any, "a guest's network frames";
    recvmsg "D" Rule::Any, "requests with their descriptors, streams to the guest";
    restart_syscall "DPKL" Rule::Any, "what the kernel makes of a wait that a freeze or stop interrupted";
    rseq "" Rule::Any, "the C library at the start of a thread";
    rt_sigaction "" Rule::Any, "the handler of the processors' kick";
    rt_sigprocmask "DPKL" Rule::Any, "the C library at the end of a thread";
    rt_sigreturn "DPKL" Rule::Any, "the end of a signal's handler";
    sched_getaffinity "" Rule::Any, "the C library at the start of a thread";
    sched_yield "DK" Rule::Any, "a channel whose two ends meet";
    seccomp "" FILTER, "closing a list";
    sendmsg "DP" Rule::Any, "replies, streams from the guest";
    set_robust_list "" Rule::Any, "the C library at the start of a thread";
    setsockopt "D" SEND_BUFFER, "how much a stream's link holds";
    shutdown "DP" Rule::Any, "half of a stream that ended";
    sigaltstack "DPKL" Rule::Any, "the standard library at the end of a thread";
    statx "" Rule::Any, "sizes and kinds of files";
    tgkill "DP" ITSELF, "the kick that brings a processor out of the guest";
    timerfd_create "" Rule::Any, "timers of the devices";
    timerfd_settime "DP" Rule::Any, "timers of the devices";
    write "DPKL" Rule::Any, "interrupts and wake-ups, the logs";
    writev "D" Rule::Any, "a guest's network frames";
}

const fn kvm(name: &'static str, number: u64, kinds: Kinds) -> Ioctl {
    Ioctl { name, number, kinds }
}

/// The ioctls, the most frequent first: the list is searched in this order. <linux/kvm.h>, <linux/if_tun.h>,
/// <linux/fs.h>, <asm-generic/ioctls.h>
pub const REQUESTS: &[Ioctl] = &[
    kvm("KVM_RUN", 0xae80, "P"),
    kvm("KVM_GET_REGS", 0x8090_ae81, "P"),
    kvm("KVM_GET_SREGS", 0x8138_ae83, "P"),
    kvm("KVM_GET_VCPU_EVENTS", 0x8040_ae9f, "P"),
    kvm("KVM_KVMCLOCK_CTRL", 0xaead, "P"),
    kvm("KVM_GET_MP_STATE", 0x8004_ae98, "P"),
    kvm("KVM_GET_XSAVE", 0x9000_aea4, "P"),
    kvm("KVM_GET_XCRS", 0x8188_aea6, "P"),
    kvm("KVM_GET_DEBUGREGS", 0x8080_aea1, "P"),
    kvm("KVM_GET_LAPIC", 0x8400_ae8e, "P"),
    kvm("KVM_GET_CPUID2", 0xc008_ae91, "P"),
    kvm("KVM_GET_MSRS", 0xc008_ae88, "P"),
    kvm("KVM_GET_TSC_KHZ", 0xaea3, "P"),
    kvm("KVM_GET_DEVICE_ATTR", 0x4018_aee2, "P"),
    kvm("KVM_GET_CLOCK", 0x8030_ae7c, "D"),
    kvm("KVM_GET_IRQCHIP", 0xc208_ae62, "D"),
    kvm("PAGEMAP_SCAN", PAGEMAP_SCAN, "D"),
    kvm("TUNSETOFFLOAD", 0x4004_54d0, "DP"),
    kvm("BLKDISCARD", 0x1277, "K"),
    kvm("BLKSSZGET", 0x1268, ""),
    kvm("TUNGETIFF", 0x8004_54d2, ""),
    kvm("TUNSETVNETHDRSZ", 0x4004_54d8, ""),
    kvm("FIONBIO", 0x5421, ""),
    kvm("FIOCLEX", 0x5451, ""),
    kvm("KVM_GET_API_VERSION", 0xae00, ""),
    kvm("KVM_CREATE_VM", 0xae01, ""),
    kvm("KVM_CHECK_EXTENSION", 0xae03, ""),
    kvm("KVM_GET_VCPU_MMAP_SIZE", 0xae04, ""),
    kvm("KVM_GET_SUPPORTED_CPUID", 0xc008_ae05, ""),
    kvm("KVM_CREATE_VCPU", 0xae41, ""),
    kvm("KVM_SET_USER_MEMORY_REGION", 0x4020_ae46, ""),
    kvm("KVM_SET_TSS_ADDR", 0xae47, ""),
    kvm("KVM_SET_IDENTITY_MAP_ADDR", 0x4008_ae48, ""),
    kvm("KVM_CREATE_IRQCHIP", 0xae60, ""),
    kvm("KVM_IRQFD", 0x4020_ae76, ""),
    kvm("KVM_IOEVENTFD", 0x4040_ae79, ""),
    kvm("KVM_SET_REGS", 0x4090_ae82, ""),
    kvm("KVM_SET_SREGS", 0x4138_ae84, ""),
    kvm("KVM_SET_MSRS", 0x4008_ae89, ""),
    kvm("KVM_SET_CPUID2", 0x4008_ae90, ""),
    kvm("KVM_ENABLE_CAP", 0x4068_aea3, ""),
    kvm("KVM_GET_MSR_INDEX_LIST", 0xc004_ae02, ""),
    kvm("KVM_SET_MP_STATE", 0x4004_ae99, ""),
    kvm("KVM_SET_XSAVE", 0x5000_aea5, ""),
    kvm("KVM_SET_XCRS", 0x4188_aea7, ""),
    kvm("KVM_SET_DEBUGREGS", 0x4080_aea2, ""),
    kvm("KVM_SET_LAPIC", 0x4400_ae8f, ""),
    kvm("KVM_SET_VCPU_EVENTS", 0x4040_aea0, ""),
    kvm("KVM_SET_TSC_KHZ", 0xaea2, ""),
    kvm("KVM_SET_DEVICE_ATTR", 0x4018_aee1, ""),
    kvm("KVM_SET_CLOCK", 0x4030_ae7b, ""),
    kvm("KVM_SET_IRQCHIP", 0x8208_ae63, ""),
    kvm("KVM_GET_STATS_FD", 0xaece, ""),
    kvm("KVM_PRE_FAULT_MEMORY", 0xc040_aed5, ""),
];

/// Whether a thread of that kind may make what is entered for `kinds`.
pub fn allows(kinds: Kinds, kind: Kind) -> bool {
    kind == Kind::Start || kinds.contains(kind.letter())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// "S" and the letters of who makes it.
    fn letters(kinds: Kinds) -> String {
        Kind::ALL.iter().filter(|kind| allows(kinds, **kind)).map(|kind| kind.letter()).collect()
    }

    fn arguments(rule: Rule) -> String {
        match rule {
            Rule::Any => String::new(),
            Rule::Requests => "one of the table below".to_string(),
            Rule::Without(_, _, text) | Rule::All(_, text) => text.to_string(),
            Rule::OneOf(_, values) => values.iter().map(|(_, name)| *name).collect::<Vec<_>>().join(", "),
        }
    }

    #[test]
    fn the_page_on_security_shows_these_tables() {
        let mut expected: Vec<String> = CALLS
            .iter()
            .map(|call| {
                let (letters, arguments) = (letters(call.kinds), arguments(call.rule));
                format!("| `{}` | {letters} | {arguments} | {} |", call.name, call.why).replace("|  |", "| |")
            })
            .collect();
        expected.extend(REQUESTS.iter().map(|ioctl| format!("| `{}` | {} |", ioctl.name, letters(ioctl.kinds))));
        let page = include_str!("../../../docs/security.md");
        let written: Vec<&str> = page.lines().filter(|line| line.starts_with("| `")).collect();
        let both = CALLS.iter().filter(|call| call.kinds.contains(['D', 'P'])).count();
        assert!(page.contains(&format!("D and P together make {both} calls")), "{both}");
        for (written, expected) in written.iter().zip(&expected) {
            assert_eq!(written, expected, "docs/security.md against src/vmm/jail/lists.rs");
        }
        assert_eq!(written.len(), expected.len());
    }

    #[test]
    fn processors_and_devices_together_need_few_calls() {
        let both = CALLS.iter().filter(|call| call.kinds.contains(['D', 'P'])).count();
        assert!(both <= 35, "{both} system calls");
        let running = CALLS.iter().filter(|call| !call.kinds.is_empty()).count();
        assert!(running <= 40, "{running} system calls");
    }

    #[test]
    fn the_tables_are_in_order_and_name_known_kinds() {
        assert!(CALLS.is_sorted_by_key(|call| call.name), "by name");
        let numbers: std::collections::BTreeSet<c_long> = CALLS.iter().map(|call| call.number).collect();
        assert_eq!(numbers.len(), CALLS.len());
        for kinds in CALLS.iter().map(|call| call.kinds).chain(REQUESTS.iter().map(|request| request.kinds)) {
            assert!(kinds.chars().all(|letter| "DPKL".contains(letter)), "{kinds}");
        }
    }

    #[test]
    fn what_opens_reaches_or_changes_others_is_in_no_list() {
        for name in [
            "open",
            "openat",
            "openat2",
            "socket",
            "connect",
            "bind",
            "execve",
            "execveat",
            "fork",
            "vfork",
            "kill",
            "tkill",
            "ptrace",
            "process_vm_readv",
            "process_vm_writev",
            "pidfd_open",
            "pidfd_getfd",
            "mount",
            "umount2",
            "unshare",
            "setns",
            "bpf",
            "io_uring_setup",
            "userfaultfd",
            "perf_event_open",
            "keyctl",
            "memfd_create",
            "name_to_handle_at",
            "open_by_handle_at",
            "init_module",
            "kexec_load",
            "setuid",
            "capset",
        ] {
            assert!(!CALLS.iter().any(|call| call.name == name), "{name}");
        }
    }
}
