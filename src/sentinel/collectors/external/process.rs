//! One plugin program: started in a process group of its own with limits, spoken to over pipes that never block, and
//! ended with all its descendants in the group.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use mio::Interest;
use mio::unix::SourceFd;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::sentinel::collect::Io;
use crate::sentinel::plugin::Program;

/// What waits for a program that does not read its standard input, in octets.
const MOST_WAITING: usize = 4 * 1024 * 1024;
/// Octets read at one go, so that a flood does not hold the loop.
const AT_ONCE: usize = 256 * 1024;
/// Sources of one process: its pipes, and its pidfd.
const SOURCES: u64 = 4;

/// Which source an event is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pipe {
    /// Standard output.
    Output,
    /// Standard error.
    Errors,
    /// Standard input.
    Input,
    /// The process has ended, though what it left behind may hold the pipes open.
    End,
}

/// Which process and pipe a source's number is of.
pub fn of_number(number: u64) -> (u64, Pipe) {
    let pipe = match number % SOURCES {
        0 => Pipe::Output,
        1 => Pipe::Errors,
        2 => Pipe::Input,
        _ => Pipe::End,
    };
    (number / SOURCES, pipe)
}

/// A running program.
pub struct Process {
    child: Child,
    end: Option<OwnedFd>,
    key: u64,
    input: Option<OwnedFd>,
    output: Option<OwnedFd>,
    errors: Option<OwnedFd>,
    waiting: Vec<u8>,
    /// Octets that it wrote since a run was last begun.
    pub written: usize,
    killed: bool,
}

impl Process {
    /// Starts a program in its plugin's directory. `key` names it among the loop's sources.
    pub fn start(
        program: &Program,
        directory: &Path,
        environment: &[(String, String)],
        key: u64,
        io: &Io<'_>,
    ) -> io::Result<Self> {
        let file = directory.join(&program.command[0]);
        // A bare word is looked for in the path, as `python3`.
        let name = if program.command[0].contains('/') { file.as_os_str() } else { program.command[0].as_ref() };
        let mut command = Command::new(name);
        command
            .args(&program.command[1..])
            .current_dir(directory)
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LANG", "C.UTF-8")
            .envs(&program.environment)
            .envs(environment.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        let (memory, files, processes) = (program.memory, program.files, program.processes);
        let limits = move || {
            setrlimit(Resource::RLIMIT_AS, memory, memory)?;
            setrlimit(Resource::RLIMIT_NOFILE, files, files)?;
            setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
            if let Some(processes) = processes {
                setrlimit(Resource::RLIMIT_NPROC, processes, processes)?;
            }
            // A sentinel that was killed leaves no programs: the thread that starts them lives as long as it.
            nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
            Ok(())
        };
        // SAFETY: between fork and exec the closure makes system calls only; it allocates nothing and takes no lock.
        unsafe { command.pre_exec(limits) };
        let mut child = command.spawn()?;
        let input = child.stdin.take().map(OwnedFd::from);
        let output = child.stdout.take().map(OwnedFd::from);
        let errors = child.stderr.take().map(OwnedFd::from);
        let end = open_pidfd(child.id()).ok();
        let mut process =
            Self { child, end, key, input, output, errors, waiting: Vec::new(), written: 0, killed: false };
        match process.watch(io) {
            Ok(()) => Ok(process),
            Err(e) => {
                process.kill();
                process.close(io);
                Err(e)
            }
        }
    }

    fn watch(&self, io: &Io<'_>) -> io::Result<()> {
        let pipes = [&self.output, &self.errors, &self.input, &self.end].into_iter().enumerate();
        for (n, fd) in pipes.filter_map(|(n, fd)| fd.as_ref().map(|fd| (n, fd))) {
            if n < 3 {
                let flags = OFlag::from_bits_truncate(fcntl(fd.as_fd(), FcntlArg::F_GETFL)?);
                fcntl(fd.as_fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
            }
            let interest = if n == 2 { Interest::WRITABLE } else { Interest::READABLE };
            io.watch(&mut SourceFd(&fd.as_raw_fd()), self.key * SOURCES + n as u64, interest)?;
        }
        Ok(())
    }

    /// The process's number, for the log.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends octets, now or when there is room; fails when too many wait. A program that closed its input is about to
    /// end, and its end says more than a broken pipe.
    pub fn send(&mut self, octets: &[u8]) -> Result<(), String> {
        if self.waiting.len() + octets.len() > MOST_WAITING {
            return Err("the plugin does not read its standard input".into());
        }
        self.waiting.extend_from_slice(octets);
        self.flush();
        Ok(())
    }

    /// Sends what waits.
    pub fn flush(&mut self) {
        let Some(input) = &self.input else { return self.waiting.clear() };
        let mut sent = 0;
        while sent < self.waiting.len() {
            match nix::unistd::write(input.as_fd(), &self.waiting[sent..]) {
                Ok(count) => sent += count,
                Err(nix::errno::Errno::EAGAIN) => break,
                Err(nix::errno::Errno::EINTR) => {}
                Err(_) => sent = self.waiting.len(),
            }
        }
        self.waiting.drain(..sent);
    }

    /// Reads what is there, at most so much at one go. Gives the octets, whether there may be more, and whether the pipe
    /// has ended.
    pub fn read(&mut self, pipe: Pipe, io: &Io<'_>) -> (Vec<u8>, bool, bool) {
        let mut octets = Vec::new();
        let fd = match pipe {
            Pipe::Output => &mut self.output,
            Pipe::Errors => &mut self.errors,
            Pipe::Input | Pipe::End => return (octets, false, false),
        };
        let Some(open) = fd else { return (octets, false, true) };
        let mut chunk = [0; 65_536];
        let mut ended = false;
        let mut more = true;
        while octets.len() < AT_ONCE {
            match nix::unistd::read(open.as_fd(), &mut chunk) {
                Ok(0) => ended = true,
                Ok(count) => {
                    octets.extend_from_slice(&chunk[..count]);
                    continue;
                }
                Err(nix::errno::Errno::EINTR) => continue,
                Err(nix::errno::Errno::EAGAIN) => {}
                Err(_) => ended = true,
            }
            more = false;
            break;
        }
        if ended {
            io.unwatch(&mut SourceFd(&open.as_raw_fd()));
            *fd = None;
        }
        if pipe == Pipe::Output {
            self.written = self.written.saturating_add(octets.len());
        }
        (octets, more, ended)
    }

    /// Ends the whole group at once.
    pub fn kill(&mut self) {
        if !self.killed {
            self.killed = true;
            // Before the child is reaped its number, and so the group's, belongs to nobody else.
            let _ = killpg(Pid::from_raw(self.child.id() as i32), Signal::SIGKILL);
        }
    }

    /// Closes the pipes: a child that a plugin left behind may hold the other ends for ever.
    pub fn close(&mut self, io: &Io<'_>) {
        for fd in [&mut self.output, &mut self.errors, &mut self.input, &mut self.end] {
            if let Some(open) = fd.take() {
                io.unwatch(&mut SourceFd(&open.as_raw_fd()));
            }
        }
    }

    /// Closes standard input, which asks a program to end.
    pub fn close_input(&mut self, io: &Io<'_>) {
        if let Some(open) = self.input.take() {
            io.unwatch(&mut SourceFd(&open.as_raw_fd()));
        }
    }

    /// How it ended, once it has. What it left behind in its group is ended as well, while the group is still its own:
    /// a process that is not yet reaped keeps its number.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        match waitid(Id::Pid(Pid::from_raw(self.child.id() as i32)), flags) {
            Ok(WaitStatus::StillAlive) => return None,
            Ok(_) => self.kill(),
            // Reaped before: the answer is kept.
            Err(_) => {}
        }
        self.child.try_wait().ok().flatten()
    }
}

fn open_pidfd(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and gives a new descriptor or -1.
    let descriptor = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) };
    let descriptor = i32::try_from(descriptor).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        // Killed by SIGKILL it ends as soon as it leaves the kernel; a zombie is left only by one that never does.
        for _ in 0..50 {
            if self.ended().is_some() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        log::warn!("plugin process {} does not end", self.child.id());
    }
}

/// Standard error, cut into lines for the log: so many a minute, so long.
#[derive(Debug, Default)]
pub struct ErrorLines {
    partial: Vec<u8>,
    minute: u64,
    count: u32,
    skipped: u64,
}

/// Lines logged in a minute.
const LINES_A_MINUTE: u32 = 60;
/// Octets of a line that are logged.
const LINE: usize = 512;

impl ErrorLines {
    /// Takes octets; logs the lines that are whole. Telegraf's prefixes say how grave a line is.
    pub fn push(&mut self, plugin: &str, octets: &[u8], minute: u64) {
        if minute != self.minute {
            if self.skipped > 0 {
                log::warn!("plugin {plugin}: {} lines of its standard error were left out", self.skipped);
            }
            *self = Self { partial: std::mem::take(&mut self.partial), minute, ..Self::default() };
        }
        for octet in octets {
            if *octet != b'\n' {
                if self.partial.len() < LINE {
                    self.partial.push(*octet);
                }
                continue;
            }
            let line = String::from_utf8_lossy(&self.partial).into_owned();
            self.partial.clear();
            let line: String = line.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
            if self.count >= LINES_A_MINUTE {
                self.skipped += 1;
                continue;
            }
            self.count += 1;
            match line.get(..2) {
                Some("E!") => log::error!("plugin {plugin}: {}", line[2..].trim()),
                Some("W!") => log::warn!("plugin {plugin}: {}", line[2..].trim()),
                Some("I!") => log::info!("plugin {plugin}: {}", line[2..].trim()),
                Some("D!" | "T!") => log::debug!("plugin {plugin}: {}", line[2..].trim()),
                _ => log::warn!("plugin {plugin}: {line}"),
            }
        }
    }
}
