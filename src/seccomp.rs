//! Filters of system calls: programs of classic BPF that the kernel runs for each call (seccomp(2), seccomp_unotify.h).
//!
//! Calls are found by bisection. When a filter is put in force the kernel runs it once for every number there is, to know
//! which calls it may let pass without asking again, so a program that compares one call after the other costs a start
//! milliseconds.

use std::io;

use libc::sock_filter;

/// <linux/audit.h>: AUDIT_ARCH_X86_64
const ARCHITECTURE: u32 = 0xc000_003e;
/// Offsets in `struct seccomp_data`: the call's number, its architecture, its six arguments of 64 bits.
const NUMBER_AT: u32 = 0;
const ARCHITECTURE_AT: u32 = 4;
const ARGUMENTS_AT: u32 = 16;

/// <linux/filter.h>: BPF_LD | BPF_W | BPF_ABS, BPF_JMP with BPF_JA, BPF_JEQ, BPF_JGE and BPF_JSET, BPF_RET | BPF_K.
const LOAD: u16 = 0x20;
const JUMP: u16 = 0x05;
/// The argument is a number.
pub const IF_EQUAL: u16 = 0x15;
/// The argument is a number or more.
pub const IF_AT_LEAST: u16 = 0x35;
/// The argument has one of these bits.
pub const IF_ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;

/// A filter under construction. It has looked at the architecture, and the number of the call is loaded.
#[derive(Debug)]
pub struct Filter {
    code: Vec<sock_filter>,
    /// What becomes of a call that is refused: a `SECCOMP_RET_…`.
    refused: u32,
}

impl Filter {
    /// One that refuses calls of any other architecture.
    pub fn new(refused: u32) -> Self {
        let mut filter = Self { code: Vec::with_capacity(512), refused };
        filter.put(LOAD, ARCHITECTURE_AT);
        filter.unless(IF_EQUAL, ARCHITECTURE);
        filter.refuse();
        filter.put(LOAD, NUMBER_AT);
        filter
    }

    fn put(&mut self, code: u16, k: u32) {
        self.code.push(sock_filter { code, jt: 0, jf: 0, k });
    }

    /// Goes on with the next instruction where the condition holds, and with the one after it where not.
    pub fn when(&mut self, condition: u16, k: u32) {
        self.code.push(sock_filter { code: condition, jt: 0, jf: 1, k });
    }

    /// Goes on with the one after the next instruction where the condition holds, and with the next where not.
    pub fn unless(&mut self, condition: u16, k: u32) {
        self.code.push(sock_filter { code: condition, jt: 1, jf: 0, k });
    }

    /// The call is made.
    pub fn allow(&mut self) {
        self.put(RETURN, libc::SECCOMP_RET_ALLOW);
    }

    /// The call is refused as this filter refuses.
    pub fn refuse(&mut self) {
        self.put(RETURN, self.refused);
    }

    /// The call fails with that error.
    pub fn fail(&mut self, errno: i32) {
        self.put(RETURN, libc::SECCOMP_RET_ERRNO | errno.unsigned_abs());
    }

    /// The low half of an argument: the kernel looks at no more of those that have rules.
    pub fn load(&mut self, argument: u8) {
        self.put(LOAD, ARGUMENTS_AT + 8 * u32::from(argument));
    }

    /// Goes to what `found` makes of the call if it is one of `calls`, which are in the order of their numbers, and to what
    /// `other` makes if it is none.
    pub fn find<T>(&mut self, calls: &[(u32, T)], found: &dyn Fn(&mut Self, &T), other: &dyn Fn(&mut Self)) {
        let middle = calls.len() / 2;
        match calls {
            [] => other(self),
            [(number, call)] => {
                self.when(IF_EQUAL, *number);
                let over = self.code.len();
                self.put(JUMP, 0);
                other(self);
                self.code[over].k = (self.code.len() - over - 1) as u32;
                found(self, call);
            }
            _ => {
                let (before, after) = calls.split_at(middle);
                self.when(IF_AT_LEAST, after[0].0);
                let over = self.code.len();
                self.put(JUMP, 0);
                self.find(before, found, other);
                self.code[over].k = (self.code.len() - over - 1) as u32;
                self.find(after, found, other);
            }
        }
    }

    /// The program.
    pub fn into_code(self) -> Vec<sock_filter> {
        self.code
    }
}

/// Puts a filter in force on the calling thread, for good. It must not be able to gain privileges.
pub fn apply(code: &[sock_filter]) -> io::Result<()> {
    let len = u16::try_from(code.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog { len, filter: code.as_ptr().cast_mut() };
    // SAFETY: the kernel copies `len` instructions from a live slice of that length.
    let done = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The architecture of calls of 64 bits.
    pub const NATIVE: u32 = ARCHITECTURE;

    /// Runs a program as the kernel does.
    pub fn verdict(program: &[sock_filter], architecture: u32, number: u32, arguments: [u64; 6]) -> u32 {
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

    #[test]
    fn each_call_is_found_and_no_other() {
        let calls: Vec<(u32, u32)> = (0..40).map(|n| (n * 3, n)).collect();
        let mut filter = Filter::new(libc::SECCOMP_RET_KILL_PROCESS);
        filter.find(&calls, &|filter, n| filter.fail(*n as i32 + 1), &Filter::allow);
        let code = filter.into_code();
        for number in 0..200 {
            let expected = match number % 3 {
                0 if number < 120 => libc::SECCOMP_RET_ERRNO | (number / 3 + 1),
                _ => libc::SECCOMP_RET_ALLOW,
            };
            assert_eq!(verdict(&code, ARCHITECTURE, number, [0; 6]), expected, "{number}");
        }
        assert_eq!(verdict(&code, 0x4000_0003, 1, [0; 6]), libc::SECCOMP_RET_KILL_PROCESS);
    }
}
