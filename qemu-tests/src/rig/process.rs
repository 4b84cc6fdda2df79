//! A worker as a process: how it is started, what it holds, when it has ended.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use warren::sandbox::spawn::{Birth, Parent, Spawned, Spawner};

/// The node's program.
const WARREN: &str = "/usr/bin/warren";
/// User ids of workers; the supervisor's are above.
const FIRST_UID: u32 = 2_000_000_000;

/// A worker's process. Dropping it kills it; so does the end of the thread that started it.
#[derive(Debug)]
pub struct Worker {
    spawned: Spawned,
    status: Option<ExitStatus>,
}

impl Worker {
    /// Starts one as the supervisor does, with the two descriptors that it inherits; what it says goes to the file `log`.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn spawn(listener: &UnixListener, last_words: &File, log: &Path) -> Self {
        static SPAWNER: OnceLock<Spawner> = OnceLock::new();
        let spawner = SPAWNER.get_or_init(|| {
            let program = File::open(WARREN).expect("the node has its program");
            // A system call that its jail refuses is then named in its last words.
            Spawner::of(program, &["warren", "vmm", "explain"], Parent::Caller)
                .expect("the workers' namespaces can be made")
        });
        Self::by(spawner, listener, last_words, log)
    }

    /// The same by another spawner, whose parent is the caller.
    pub fn by(spawner: &Spawner, listener: &UnixListener, last_words: &File, log: &Path) -> Self {
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let log = File::options().append(true).create(true).open(log).expect("a log can be made");
        let number = std::process::id() % 1000 * 1000 + STARTED.fetch_add(1, Ordering::Relaxed) % 1000;
        let uid = FIRST_UID + number;
        let birth = Birth { cgroup: None, listener: listener.as_fd(), last_words, log: &log, uid };
        let spawned = spawner.spawn(&birth).unwrap_or_else(|e| panic!("a worker does not start: {e}"));
        Self { spawned, status: None }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.spawned.pid.unsigned_abs()
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

    /// What its guest has changed of its memory, in KiB.
    pub fn guest_kib(&self, memory_mib: u64) -> io::Result<u64> {
        Ok(private_kib(self.pid(), memory_mib)?.1)
    }

    /// Waits for its end; `None` when it runs on after `limit`.
    pub fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let end = Instant::now() + limit;
        loop {
            if self.status.is_some() {
                return self.status;
            }
            let mut status = 0;
            // SAFETY: waits for a child of ours that nobody else waits for; `status` is live.
            let ended = unsafe { libc::waitpid(self.spawned.pid, &raw mut status, libc::WNOHANG) };
            assert!(ended >= 0, "a child of ours cannot be waited for: {}", io::Error::last_os_error());
            if ended > 0 {
                self.status = Some(ExitStatus::from_raw(status));
            } else if Instant::now() > end {
                return None;
            } else {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }

    /// Waits for its end, however long that takes; `None` when the kernel knows no such child.
    pub fn end(&mut self) -> Option<ExitStatus> {
        let mut status = 0;
        // SAFETY: waits for a child of ours that nobody else waits for; `status` is live.
        if self.status.is_none() && unsafe { libc::waitpid(self.spawned.pid, &raw mut status, 0) } > 0 {
            self.status = Some(ExitStatus::from_raw(status));
        }
        self.status
    }

    /// Kills it at once, with no chance to say anything.
    pub fn kill(&mut self) {
        if self.status.is_none() {
            // SAFETY: the process was not waited for, so the number still means it.
            unsafe { libc::kill(self.spawned.pid, libc::SIGKILL) };
            self.wait(Duration::from_secs(60));
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Private memory of a process outside of its guest's memory, in KiB.
pub fn overhead_kib(pid: u32, memory_mib: u64) -> io::Result<u64> {
    Ok(private_kib(pid, memory_mib)?.0)
}

/// A mapping of a process as smaps (proc(5)) has it, in KiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
struct MappingUse {
    size: u64,
    private: u64,
    /// What is no file's.
    changed: u64,
    /// Core dumps leave it out.
    left_out: bool,
}

/// What is private of a process outside of its guest's memory, and what its guest has changed of that; in KiB. The
/// guest's are the mappings that core dumps leave out, `memory_mib` or more of them, or else the largest one.
fn private_kib(pid: u32, memory_mib: u64) -> io::Result<(u64, u64)> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let mut mappings: Vec<MappingUse> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let Some(key) = words.next() else { continue };
        if key == "Size:" {
            mappings.push(MappingUse::default());
        }
        let Some(last) = mappings.last_mut() else { continue };
        if key == "VmFlags:" {
            last.left_out = words.any(|flag| flag == "dd");
            continue;
        }
        let Some(kib) = words.next().and_then(|word| word.parse::<u64>().ok()) else { continue };
        match key {
            "Size:" => last.size = kib,
            "Private_Clean:" | "Private_Dirty:" => last.private += kib,
            "Anonymous:" => last.changed = kib,
            _ => {}
        }
    }
    let least = memory_mib * 1024;
    let all: u64 = mappings.iter().map(|mapping| mapping.private).sum();
    let mut guest: Vec<MappingUse> = mappings.iter().copied().filter(|mapping| mapping.left_out).collect();
    if guest.iter().map(|mapping| mapping.size).sum::<u64>() < least {
        guest = mappings.into_iter().max().into_iter().filter(|mapping| mapping.size >= least).collect();
    }
    if guest.is_empty() {
        return Err(io::Error::other(format!("process {pid} maps no guest memory")));
    }
    let of_guest: u64 = guest.iter().map(|mapping| mapping.private).sum();
    Ok((all - of_guest, guest.iter().map(|mapping| mapping.changed).sum()))
}
