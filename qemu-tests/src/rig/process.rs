//! A worker as a process: how it is started, what it holds, when it has ended.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use warren::sandbox::spawn::{WORKER_LAST_WORDS_FD, WORKER_LISTENER_FD};

/// The node's program.
const WARREN: &str = "/usr/bin/warren";

/// A worker's process. Dropping it kills it; so does the end of the thread that started it.
#[derive(Debug)]
pub struct Worker {
    child: Child,
}

impl Worker {
    /// Starts one with the two descriptors that it inherits; what it says goes to the file `log`.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn spawn(listener: &UnixListener, last_words: &File, log: &Path) -> Self {
        let log = File::create(log).expect("a log can be made");
        let moves =
            [(high(listener.as_raw_fd()), WORKER_LISTENER_FD), (high(last_words.as_raw_fd()), WORKER_LAST_WORDS_FD)];
        let mut command = Command::new(WARREN);
        command.arg("vmm").env_clear().stdin(Stdio::null());
        command.stdout(log.try_clone().expect("a descriptor can be cloned")).stderr(log);
        let place = move || {
            for (from, to) in &moves {
                // SAFETY: system calls on descriptors that live in this closure; safe between fork and exec.
                if unsafe { libc::dup2(from.as_raw_fd(), *to) } < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            // A test that ends in a panic takes its worker along.
            // SAFETY: sets an attribute of the child.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            Ok(())
        };
        // SAFETY: `place` makes nothing but system calls.
        unsafe { command.pre_exec(place) };
        let child = command.spawn().unwrap_or_else(|e| panic!("{WARREN} vmm does not start: {e}"));
        Self { child }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How many descriptors it has open.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid())).map_or(0, Iterator::count)
    }

    /// How many threads it has.
    pub fn threads(&self) -> usize {
        fs::read_dir(format!("/proc/{}/task", self.pid())).map_or(0, Iterator::count)
    }

    /// Private memory outside of its guest's memory, in KiB. Fails when the worker has ended.
    pub fn overhead_kib(&self, memory_mib: u64) -> io::Result<u64> {
        overhead_kib(self.pid(), memory_mib)
    }

    /// Waits for its end; `None` when it runs on after `limit`.
    pub fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let end = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child of ours can be waited for") {
                return Some(status);
            }
            if Instant::now() > end {
                return None;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Kills it at once, with no chance to say anything.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A copy above the numbers that are handed out, so that none of them is overwritten on the way.
fn high(fd: RawFd) -> OwnedFd {
    // SAFETY: fcntl on a descriptor that lives through this call.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 64) };
    assert!(copy >= 0, "a descriptor cannot be copied: {}", io::Error::last_os_error());
    // SAFETY: `copy` was just made and nobody else has it.
    unsafe { OwnedFd::from_raw_fd(copy) }
}

/// Private memory of a process outside of its guest's memory (which is its largest mapping, at least `memory_mib`
/// long), in KiB.
pub fn overhead_kib(pid: u32, memory_mib: u64) -> io::Result<u64> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let mut mappings: Vec<(u64, u64)> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(key), value) = (words.next(), words.next().and_then(|word| word.parse::<u64>().ok())) else {
            continue;
        };
        match (key, value, mappings.last_mut()) {
            ("Size:", Some(size), _) => mappings.push((size, 0)),
            ("Private_Clean:" | "Private_Dirty:", Some(kib), Some(last)) => last.1 += kib,
            _ => {}
        }
    }
    let guest = mappings.iter().max().copied().unwrap_or_default();
    if guest.0 < memory_mib * 1024 {
        return Err(io::Error::other(format!("process {pid} maps no guest memory")));
    }
    Ok(mappings.iter().map(|mapping| mapping.1).sum::<u64>() - guest.1)
}
