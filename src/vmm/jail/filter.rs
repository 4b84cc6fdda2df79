//! From a list of system calls to the kernel's filter (`seccomp`).

use std::io;

use libc::sock_filter;

use super::lists::{CALLS, Call, Kind, REQUESTS, Rule, allows};
use crate::seccomp::{self, Filter, IF_ANY_BIT, IF_EQUAL};

/// What becomes of a worker that makes a call outside of its list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Breach {
    /// The kernel kills the whole process, at once and without a word.
    Kill,
    /// It gets SIGSYS, whose handler leaves the call's number in the last words: for who looks for a call that a list
    /// lacks. A hostile program would have its way with the handler, so the supervisor never asks for this.
    Explain,
}

/// The filter of a list.
fn compile(kind: Kind, breach: Breach) -> Vec<sock_filter> {
    let calls = CALLS.iter().filter(|call| allows(call.kinds, kind));
    let mut calls: Vec<(u32, &Call)> = calls.map(|call| (call.number as u32, call)).collect();
    calls.sort_unstable_by_key(|(number, _)| *number);
    let mut filter = Filter::new(match breach {
        Breach::Kill => libc::SECCOMP_RET_KILL_PROCESS,
        Breach::Explain => libc::SECCOMP_RET_TRAP,
    });
    filter.find(&calls, &|filter, call| judge(filter, call.rule, kind), &Filter::refuse);
    filter.into_code()
}

fn judge(filter: &mut Filter, rule: Rule, kind: Kind) {
    let mut one_of = |argument, values: &mut dyn Iterator<Item = u64>| {
        filter.load(argument);
        for value in values {
            filter.when(IF_EQUAL, value as u32);
            filter.allow();
        }
        filter.refuse();
    };
    match rule {
        Rule::Any => filter.allow(),
        Rule::Requests => {
            let requests = REQUESTS.iter().filter(|request| allows(request.kinds, kind));
            one_of(1, &mut requests.map(|request| request.number));
        }
        Rule::OneOf(argument, values) => one_of(argument, &mut values.iter().map(|(value, _)| *value)),
        Rule::Without(argument, bits, _) => {
            filter.load(argument);
            filter.when(IF_ANY_BIT, bits as u32);
            filter.refuse();
            filter.allow();
        }
        Rule::All(values, _) => {
            for (argument, value) in values {
                filter.load(*argument);
                filter.unless(IF_EQUAL, *value as u32);
                filter.refuse();
            }
            filter.allow();
        }
    }
}

/// Puts a list in force on the calling thread, for good. It must not be able to gain privileges.
pub fn apply(kind: Kind, breach: Breach) -> io::Result<()> {
    seccomp::apply(&compile(kind, breach))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seccomp::tests::{NATIVE as ARCHITECTURE, verdict};

    fn holds(rule: Rule, kind: Kind, arguments: [u64; 6]) -> bool {
        match rule {
            Rule::Any => true,
            Rule::Requests => REQUESTS.iter().any(|r| allows(r.kinds, kind) && r.number == arguments[1]),
            Rule::Without(argument, bits, _) => arguments[usize::from(argument)] & bits == 0,
            Rule::OneOf(argument, values) => values.iter().any(|(value, _)| *value == arguments[usize::from(argument)]),
            Rule::All(values, _) => values.iter().all(|(argument, value)| arguments[usize::from(*argument)] == *value),
        }
    }

    #[test]
    fn a_filter_allows_what_its_list_allows_and_nothing_else() {
        // Values that rules are about, and some beside them.
        let mut interesting: Vec<u64> =
            REQUESTS.iter().flat_map(|request| [request.number, request.number + 1]).collect();
        interesting.extend([0, 1, 2, 3, 4, 6, 7, 8, 14, 15, 16, 38, 0x8000_0000, u64::from(u32::MAX)]);
        for kind in Kind::ALL {
            let program = compile(kind, Breach::Kill);
            for number in (0..1024).chain([0x4000_0000, 0x4000_0027, u32::MAX]) {
                let call = CALLS.iter().find(|call| call.number == i64::from(number) && allows(call.kinds, kind));
                for &value in &interesting {
                    for arguments in
                        [[value; 6], [1, value, 7, 0, 0, 0], [1, 1, value, 0, 0, 0], [value, 1, 7, 0, 0, 0]]
                    {
                        let allowed = call.is_some_and(|call| holds(call.rule, kind, arguments));
                        let expected = if allowed { libc::SECCOMP_RET_ALLOW } else { libc::SECCOMP_RET_KILL_PROCESS };
                        let got = verdict(&program, ARCHITECTURE, number, arguments);
                        assert_eq!(got, expected, "{kind:?}, call {number}, {arguments:x?}");
                    }
                }
            }
        }
    }

    #[test]
    fn calls_of_another_architecture_are_refused_and_explained_where_that_is_asked_for() {
        let program = compile(Kind::Start, Breach::Explain);
        let exit_group = libc::SYS_exit_group as u32;
        assert_eq!(verdict(&program, ARCHITECTURE, exit_group, [0; 6]), libc::SECCOMP_RET_ALLOW);
        assert_eq!(verdict(&program, 0x4000_0003, exit_group, [0; 6]), libc::SECCOMP_RET_TRAP, "32 bits");
    }

    /// How a child ends that puts a list in force and then makes a call; a signal's number counts from 128.
    fn end_of_child(kind: Kind, number: libc::c_long) -> i32 {
        let code = compile(kind, Breach::Kill);
        let program = libc::sock_fprog { len: code.len() as u16, filter: code.as_ptr().cast_mut() };
        // SAFETY: the child makes nothing but system calls on what was prepared before the fork, and ends.
        unsafe {
            let pid = libc::fork();
            if pid == 0 {
                libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
                let set = libc::SECCOMP_SET_MODE_FILTER;
                if libc::syscall(libc::SYS_seccomp, set, 0, &raw const program) != 0 {
                    libc::_exit(1);
                }
                libc::syscall(number, 0, 0, 0, 0, 0, 0);
                libc::_exit(0);
            }
            let mut status = 0;
            assert_eq!(libc::waitpid(pid, &raw mut status, 0), pid);
            if libc::WIFSIGNALED(status) { 128 + libc::WTERMSIG(status) } else { libc::WEXITSTATUS(status) }
        }
    }

    #[test]
    fn the_kernel_takes_each_filter_and_kills_for_what_it_refuses() {
        for kind in Kind::ALL {
            assert_eq!(end_of_child(kind, libc::SYS_munmap), 0, "{kind:?}");
            assert_eq!(end_of_child(kind, libc::SYS_getppid), 128 + libc::SIGSYS, "{kind:?}");
            assert_eq!(end_of_child(kind, libc::SYS_socket), 128 + libc::SIGSYS, "{kind:?}");
        }
    }

    #[test]
    fn a_call_is_found_in_few_steps() {
        for kind in Kind::ALL {
            let program = compile(kind, Breach::Kill);
            assert!(program.len() < 512, "{kind:?}: {} instructions", program.len());
        }
    }
}
