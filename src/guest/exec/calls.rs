//! System calls that programs in a sandbox do not get: those that make the guest's kernel easier to take over, or that only
//! its root could use. docs/guest.md shows this table; a test keeps the two the same.
//!
//! What is refused fails as it would for want of a privilege, so that programs go on without it.

use std::sync::OnceLock;

use libc::{EAFNOSUPPORT, ENOSYS, EPERM, c_long, sock_filter};

use crate::seccomp::{Filter, IF_ANY_BIT, IF_AT_LEAST, IF_EQUAL};

/// The newest call that this list was made for, mseal of Linux 6.10: newer ones are not there. Those of the x32 ABI have
/// numbers above it.
const NEWEST: u32 = 462;

/// Some calls, and why they are refused.
#[derive(Debug)]
pub(super) struct Refusal {
    /// Their names and numbers.
    calls: &'static [(&'static str, c_long)],
    rule: Rule,
    /// Only for the documentation.
    #[cfg_attr(not(test), expect(dead_code, reason = "the documentation's test reads it"))]
    why: &'static str,
}

#[derive(Debug, Clone, Copy)]
enum Rule {
    /// Always.
    Always,
    /// As if the kernel had none: programs then use another.
    Absent,
    /// With any of these bits in that argument.
    AnyBit(u8, u32),
    /// With one of these values in that argument.
    OneOf(u8, &'static [u32]),
    /// With any other value than these in the first argument: a family of sockets that is not there.
    Families(&'static [u32]),
}

macro_rules! calls {
    ($($name:ident = $number:expr),* $(,)?) => { &[$((stringify!($name), $number)),*] };
}

/// CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET (<linux/sched.h>).
const NAMESPACES: u32 = 0x7e02_0000;
/// <asm-generic/ioctls.h>
const TIOCSTI: u32 = 0x5412;
const TIOCLINUX: u32 = 0x541c;
/// AF_UNIX, AF_INET, AF_INET6, AF_NETLINK.
const FAMILIES: &[u32] = &[1, 2, 10, 16];

pub(super) const REFUSALS: &[Refusal] = &[
    Refusal {
        calls: calls! {
            unshare = libc::SYS_unshare, setns = libc::SYS_setns, mount = libc::SYS_mount, umount2 = libc::SYS_umount2,
            pivot_root = libc::SYS_pivot_root, move_mount = libc::SYS_move_mount, open_tree = libc::SYS_open_tree, fsopen = libc::SYS_fsopen, fsconfig = libc::SYS_fsconfig,
            fsmount = libc::SYS_fsmount, fspick = libc::SYS_fspick, mount_setattr = libc::SYS_mount_setattr,
        },
        rule: Rule::Always,
        why: "namespaces and mounts of their own: in a user namespace a program has all capabilities over what it makes",
    },
    Refusal {
        calls: calls! { clone = libc::SYS_clone },
        rule: Rule::AnyBit(0, NAMESPACES),
        why: "the same, with a flag for a namespace",
    },
    Refusal {
        calls: calls! { clone3 = libc::SYS_clone3 },
        rule: Rule::Absent,
        why: "the same; its flags are in memory, where a filter cannot look. C libraries use `clone` then",
    },
    Refusal {
        calls: calls! {
            bpf = libc::SYS_bpf, perf_event_open = libc::SYS_perf_event_open, userfaultfd = libc::SYS_userfaultfd,
            io_uring_setup = libc::SYS_io_uring_setup, io_uring_enter = libc::SYS_io_uring_enter,
            io_uring_register = libc::SYS_io_uring_register, add_key = libc::SYS_add_key,
            request_key = libc::SYS_request_key, keyctl = libc::SYS_keyctl, fanotify_init = libc::SYS_fanotify_init,
            kcmp = libc::SYS_kcmp, modify_ldt = libc::SYS_modify_ldt,
        },
        rule: Rule::Always,
        why: "large parts of the kernel that most exploits go through and few programs need",
    },
    Refusal {
        calls: calls! {
            init_module = libc::SYS_init_module, finit_module = libc::SYS_finit_module,
            delete_module = libc::SYS_delete_module, kexec_load = libc::SYS_kexec_load,
            kexec_file_load = libc::SYS_kexec_file_load, reboot = libc::SYS_reboot, swapon = libc::SYS_swapon,
            swapoff = libc::SYS_swapoff, acct = libc::SYS_acct, quotactl = libc::SYS_quotactl,
            quotactl_fd = libc::SYS_quotactl_fd, syslog = libc::SYS_syslog, iopl = libc::SYS_iopl, ioperm = libc::SYS_ioperm,
            settimeofday = libc::SYS_settimeofday, clock_settime = libc::SYS_clock_settime,
            sethostname = libc::SYS_sethostname, setdomainname = libc::SYS_setdomainname, vhangup = libc::SYS_vhangup,
            open_by_handle_at = libc::SYS_open_by_handle_at,
        },
        rule: Rule::Always,
        why: "only the guest's root could use them",
    },
    Refusal {
        calls: calls! { socket = libc::SYS_socket, socketpair = libc::SYS_socketpair },
        rule: Rule::Families(FAMILIES),
        why: "other families than UNIX, IPv4, IPv6 and netlink, vsock to the node's side among them",
    },
    Refusal {
        calls: calls! { ioctl = libc::SYS_ioctl },
        rule: Rule::OneOf(1, &[TIOCSTI, TIOCLINUX]),
        why: "typing into a terminal that another program reads",
    },
];

/// The filter of this list; made once.
pub(super) fn filter() -> &'static [sock_filter] {
    static FILTER: OnceLock<Vec<sock_filter>> = OnceLock::new();
    FILTER.get_or_init(compile)
}

fn compile() -> Vec<sock_filter> {
    let calls =
        REFUSALS.iter().flat_map(|refusal| refusal.calls.iter().map(|(_, number)| (*number as u32, refusal.rule)));
    let mut calls: Vec<(u32, Rule)> = calls.collect();
    calls.sort_unstable_by_key(|(number, _)| *number);
    // Of another architecture there is nothing: the guest's kernel has none.
    let mut filter = Filter::new(libc::SECCOMP_RET_KILL_PROCESS);
    filter.when(IF_AT_LEAST, NEWEST + 1);
    filter.fail(ENOSYS);
    filter.find(&calls, &|filter, rule| judge(filter, *rule), &Filter::allow);
    filter.into_code()
}

fn judge(filter: &mut Filter, rule: Rule) {
    match rule {
        Rule::Always => filter.fail(EPERM),
        Rule::Absent => filter.fail(ENOSYS),
        Rule::AnyBit(argument, bits) => {
            filter.load(argument);
            filter.when(IF_ANY_BIT, bits);
            filter.fail(EPERM);
            filter.allow();
        }
        Rule::OneOf(argument, values) => {
            filter.load(argument);
            for value in values {
                filter.when(IF_EQUAL, *value);
                filter.fail(EPERM);
            }
            filter.allow();
        }
        Rule::Families(families) => {
            filter.load(0);
            for family in families {
                filter.when(IF_EQUAL, *family);
                filter.allow();
            }
            filter.fail(EAFNOSUPPORT);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seccomp::tests::{NATIVE, verdict};

    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;

    fn fails(errno: i32) -> u32 {
        libc::SECCOMP_RET_ERRNO | errno as u32
    }

    fn of(number: c_long, arguments: [u64; 6]) -> u32 {
        verdict(&compile(), NATIVE, number as u32, arguments)
    }

    #[test]
    fn what_is_listed_fails_and_all_else_is_as_it_was() {
        let program = compile();
        for number in 0..=NEWEST {
            let listed = REFUSALS.iter().find(|refusal| refusal.calls.iter().any(|(_, n)| *n == i64::from(number)));
            let expected = match listed.map(|refusal| refusal.rule) {
                None => ALLOW,
                Some(Rule::Always) => fails(EPERM),
                Some(Rule::Absent) => fails(ENOSYS),
                Some(_) => continue,
            };
            assert_eq!(verdict(&program, NATIVE, number, [0; 6]), expected, "{number}");
        }
        for number in [NEWEST + 1, 0x4000_0000, u32::MAX] {
            assert_eq!(verdict(&program, NATIVE, number, [0; 6]), fails(ENOSYS), "{number}");
        }
        assert_eq!(verdict(&program, 0x4000_0003, 1, [0; 6]), libc::SECCOMP_RET_KILL_PROCESS, "32 bits");
        let numbers: std::collections::BTreeSet<c_long> =
            REFUSALS.iter().flat_map(|refusal| refusal.calls.iter().map(|(_, number)| *number)).collect();
        assert_eq!(numbers.len(), REFUSALS.iter().map(|refusal| refusal.calls.len()).sum::<usize>(), "listed twice");
    }

    #[test]
    fn arguments_decide_where_that_is_said() {
        let first = |value: i32| [value as u64, 0, 0, 0, 0, 0];
        // A fork, a thread of glibc's, and a namespace of each kind.
        assert_eq!(of(libc::SYS_clone, first(libc::SIGCHLD)), ALLOW);
        assert_eq!(of(libc::SYS_clone, first(0x003d_0f00)), ALLOW);
        for flag in [libc::CLONE_NEWNS, libc::CLONE_NEWUSER, libc::CLONE_NEWPID, libc::CLONE_NEWNET, libc::CLONE_NEWUTS]
        {
            assert_eq!(of(libc::SYS_clone, first(flag | libc::SIGCHLD)), fails(EPERM), "{flag:#x}");
        }
        for (family, expected) in [
            (libc::AF_UNIX, ALLOW),
            (libc::AF_INET, ALLOW),
            (libc::AF_INET6, ALLOW),
            (libc::AF_NETLINK, ALLOW),
            (libc::AF_VSOCK, fails(EAFNOSUPPORT)),
            (libc::AF_ALG, fails(EAFNOSUPPORT)),
            (libc::AF_PACKET, fails(EAFNOSUPPORT)),
        ] {
            assert_eq!(of(libc::SYS_socket, first(family)), expected, "{family}");
        }
        assert_eq!(of(libc::SYS_ioctl, [0, u64::from(TIOCSTI), 0, 0, 0, 0]), fails(EPERM));
        assert_eq!(of(libc::SYS_ioctl, [0, libc::TIOCGWINSZ, 0, 0, 0, 0]), ALLOW);
    }

    #[test]
    fn the_documentation_shows_this_table() {
        let text = include_str!("../../../docs/guest.md");
        for Refusal { calls, why, .. } in REFUSALS {
            let names: Vec<String> = calls.iter().map(|(name, _)| format!("`{name}`")).collect();
            let row = format!("| {} | {why} |", names.join(" "));
            assert!(text.contains(&row), "docs/guest.md lacks the row\n{row}");
        }
    }
}
