//! Starts a program in a control group, without ever being between two groups: clone3 with CLONE_INTO_CGROUP.

use std::ffi::{CString, NulError, c_char};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;

use nix::unistd::Pid;

use super::client::LINK_FD;

/// Linux: include/uapi/linux/sched.h (libc's constant is too narrow).
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// A program with arguments and environment, ready to be started again and again.
#[derive(Debug)]
pub struct Program {
    path: CString,
    argv: Vec<CString>,
    environment: Vec<CString>,
    /// What the child says when it cannot become the program; the number of the error follows.
    apology: Vec<u8>,
}

impl Program {
    /// `argv[0]` is only the name it sees; `path` is what is run.
    pub fn new(path: &str, argv: &[String], environment: &[String]) -> Result<Self, NulError> {
        let strings = |of: &[String]| of.iter().map(|s| CString::new(s.as_str())).collect::<Result<Vec<_>, _>>();
        let apology = format!("<3>warren[init]: ERROR cannot execute {path}: error ").into_bytes();
        Ok(Self { path: CString::new(path)?, argv: strings(argv)?, environment: strings(environment)?, apology })
    }

    /// Starts it in `group` (init's own without), in a session of its own, with `link` as descriptor 3.
    /// A program that cannot be executed says so in the log and exits with 127.
    pub fn start(&self, group: Option<&File>, link: Option<&OwnedFd>) -> io::Result<Pid> {
        let pointers =
            |of: &[CString]| -> Vec<*const c_char> { of.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect() };
        // Everything the child needs is made here: between fork and exec it only makes system calls.
        let (argv, environment) = (pointers(&self.argv), pointers(&self.environment));
        let mut apology = self.apology.clone();
        apology.reserve(8);
        // SAFETY: all zeros is a valid `clone_args`.
        let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
        arguments.exit_signal = libc::SIGCHLD as u64;
        if let Some(group) = group {
            arguments.flags = CLONE_INTO_CGROUP;
            arguments.cgroup = group.as_raw_fd() as u64;
        }
        // SAFETY: without CLONE_VM the child has its own copy of memory, as after fork; the pointer and size are
        // of a live `clone_args`.
        let pid = unsafe { libc::syscall(libc::SYS_clone3, &arguments, size_of::<libc::clone_args>()) };
        match pid {
            0 => self.become_program(&argv, &environment, link.map_or(-1, AsRawFd::as_raw_fd), apology),
            pid if pid > 0 => Ok(Pid::from_raw(pid as libc::pid_t)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The child's side.
    fn become_program(
        &self,
        argv: &[*const c_char],
        environment: &[*const c_char],
        link: i32,
        mut apology: Vec<u8>,
    ) -> ! {
        // SAFETY: only async-signal-safe calls; the arrays end with a null pointer and their strings live in
        // `self`; `none` is initialised by sigemptyset before it is used.
        unsafe {
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut());
            libc::signal(libc::SIGPIPE, libc::SIG_DFL); // Rust ignores it, and that would be inherited
            libc::setsid();
            if link == LINK_FD {
                libc::fcntl(link, libc::F_SETFD, 0);
            } else if link >= 0 {
                libc::dup2(link, LINK_FD);
            }
            libc::execve(self.path.as_ptr(), argv.as_ptr(), environment.as_ptr());
            // One write, digits by hand: see `start` for why nothing is allocated or formatted here.
            let error = (*libc::__errno_location()).clamp(0, 255) as u8;
            apology.extend_from_slice(&[b'0' + error / 100, b'0' + error / 10 % 10, b'0' + error % 10, b'\n']);
            libc::write(libc::STDERR_FILENO, apology.as_ptr().cast(), apology.len());
            libc::_exit(127)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use nix::sys::wait::{WaitStatus, waitpid};

    use super::*;

    fn program(argv: &[&str]) -> Program {
        let argv: Vec<String> = argv.iter().map(|s| s.to_string()).collect();
        Program::new(&argv[0], &argv, &["GREETING=hello".to_string()]).unwrap()
    }

    #[test]
    fn a_program_gets_its_arguments_environment_and_link() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let program = program(&["/bin/sh", "-c", "echo $GREETING $1 >&3; exit 7", "sh", "world"]);
        let pid = program.start(None, Some(&OwnedFd::from(theirs))).unwrap();
        assert_eq!(waitpid(pid, None).unwrap(), WaitStatus::Exited(pid, 7));
        let mut said = String::new();
        ours.read_to_string(&mut said).unwrap();
        assert_eq!(said, "hello world\n");
    }

    #[test]
    fn a_program_that_is_not_there_exits_with_127() {
        let pid = program(&["/does/not/exist"]).start(None, None).unwrap();
        assert_eq!(waitpid(pid, None).unwrap(), WaitStatus::Exited(pid, 127));
    }
}
