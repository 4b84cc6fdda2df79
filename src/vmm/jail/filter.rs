//! From a list of system calls to the kernel's filter: a program of classic BPF (seccomp(2), seccomp_unotify.h).
//!
//! The calls are found by bisection. When a filter is put in force the kernel runs it once for every number there is, to
//! know which calls it may let pass without asking again, so a program that compares one call after the other costs a
//! start milliseconds.

use std::io;

use libc::sock_filter;

use super::lists::{CALLS, Call, Kind, REQUESTS, Rule, allows};

/// What becomes of a worker that makes a call outside of its list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Breach {
    /// The kernel kills the whole process, at once and without a word.
    Kill,
    /// It gets SIGSYS, whose handler leaves the call's number in the last words: for who looks for a call that a list
    /// lacks. A hostile program would have its way with the handler, so the supervisor never asks for this.
    Explain,
}

/// <linux/audit.h>: AUDIT_ARCH_X86_64
const ARCHITECTURE: u32 = 0xc000_003e;
/// Offsets in `struct seccomp_data`: the call's number, its architecture, its six arguments of 64 bits.
const NUMBER_AT: u32 = 0;
const ARCHITECTURE_AT: u32 = 4;
const ARGUMENTS_AT: u32 = 16;

/// <linux/filter.h>: BPF_LD | BPF_W | BPF_ABS, BPF_JMP with BPF_JA, BPF_JEQ, BPF_JGE and BPF_JSET, BPF_RET | BPF_K.
const LOAD: u16 = 0x20;
const JUMP: u16 = 0x05;
const IF_EQUAL: u16 = 0x15;
const IF_AT_LEAST: u16 = 0x35;
const IF_ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;

/// A program under construction.
#[derive(Debug)]
struct Program {
    code: Vec<sock_filter>,
    refused: u32,
}

impl Program {
    fn put(&mut self, code: u16, k: u32) {
        self.code.push(sock_filter { code, jt: 0, jf: 0, k });
    }

    /// Goes on with the next instruction where the condition holds, and with the one after it where not.
    fn when(&mut self, condition: u16, k: u32) {
        self.code.push(sock_filter { code: condition, jt: 0, jf: 1, k });
    }

    /// Goes on with the one after the next instruction where the condition holds, and with the next where not.
    fn unless(&mut self, condition: u16, k: u32) {
        self.code.push(sock_filter { code: condition, jt: 1, jf: 0, k });
    }

    fn allow(&mut self) {
        self.put(RETURN, libc::SECCOMP_RET_ALLOW);
    }

    fn refuse(&mut self) {
        self.put(RETURN, self.refused);
    }

    /// The low half of an argument: the kernel looks at no more of those that have rules.
    fn load(&mut self, argument: u8) {
        self.put(LOAD, ARGUMENTS_AT + 8 * u32::from(argument));
    }

    /// One of `calls`, which are in the order of their numbers.
    fn find(&mut self, calls: &[(u32, &Call)], kind: Kind) {
        let middle = calls.len() / 2;
        match calls {
            [] => self.refuse(),
            [(number, call)] => {
                self.unless(IF_EQUAL, *number);
                self.refuse();
                self.judge(call.rule, kind);
            }
            _ => {
                let (before, after) = calls.split_at(middle);
                self.when(IF_AT_LEAST, after[0].0);
                let over = self.code.len();
                self.put(JUMP, 0);
                self.find(before, kind);
                self.code[over].k = (self.code.len() - over - 1) as u32;
                self.find(after, kind);
            }
        }
    }

    fn judge(&mut self, rule: Rule, kind: Kind) {
        let mut one_of = |argument, values: &mut dyn Iterator<Item = u64>| {
            self.load(argument);
            for value in values {
                self.when(IF_EQUAL, value as u32);
                self.allow();
            }
            self.refuse();
        };
        match rule {
            Rule::Any => self.allow(),
            Rule::Requests => {
                let requests = REQUESTS.iter().filter(|request| allows(request.kinds, kind));
                one_of(1, &mut requests.map(|request| request.number));
            }
            Rule::OneOf(argument, values) => one_of(argument, &mut values.iter().map(|(value, _)| *value)),
            Rule::Without(argument, bits, _) => {
                self.load(argument);
                self.when(IF_ANY_BIT, bits as u32);
                self.refuse();
                self.allow();
            }
            Rule::All(values, _) => {
                for (argument, value) in values {
                    self.load(*argument);
                    self.unless(IF_EQUAL, *value as u32);
                    self.refuse();
                }
                self.allow();
            }
        }
    }
}

/// The filter of a list.
fn compile(kind: Kind, breach: Breach) -> Vec<sock_filter> {
    let refused = match breach {
        Breach::Kill => libc::SECCOMP_RET_KILL_PROCESS,
        Breach::Explain => libc::SECCOMP_RET_TRAP,
    };
    let mut program = Program { code: Vec::with_capacity(512), refused };
    program.put(LOAD, ARCHITECTURE_AT);
    program.unless(IF_EQUAL, ARCHITECTURE);
    program.refuse();
    program.put(LOAD, NUMBER_AT);
    let calls = CALLS.iter().filter(|call| allows(call.kinds, kind));
    let mut calls: Vec<(u32, &Call)> = calls.map(|call| (call.number as u32, call)).collect();
    calls.sort_unstable_by_key(|(number, _)| *number);
    program.find(&calls, kind);
    program.code
}

/// Puts a list in force on the calling thread, for good. It must not be able to gain privileges.
pub fn apply(kind: Kind, breach: Breach) -> io::Result<()> {
    let mut code = compile(kind, breach);
    let len = u16::try_from(code.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog { len, filter: code.as_mut_ptr() };
    // SAFETY: the kernel copies `len` instructions from a live vector of that length.
    let done = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel does.
    fn verdict(program: &[sock_filter], architecture: u32, number: u32, arguments: [u64; 6]) -> u32 {
        let (mut at, mut loaded) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            let branch = |holds: bool| usize::from(if holds { jt } else { jf });
            match code {
                LOAD if k == NUMBER_AT => loaded = number,
                LOAD if k == ARCHITECTURE_AT => loaded = architecture,
                LOAD => loaded = arguments[(k - ARGUMENTS_AT) as usize / 8] as u32,
                JUMP => at += k as usize,
                IF_EQUAL => at += branch(loaded == k),
                IF_AT_LEAST => at += branch(loaded >= k),
                IF_ANY_BIT => at += branch(loaded & k != 0),
                RETURN => return k,
                _ => panic!("{code:#x} is no instruction of these programs"),
            }
        }
    }

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
