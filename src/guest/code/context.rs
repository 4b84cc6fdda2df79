//! A context: a runner's process with its channels, its bounds, and who waits for it.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;

use super::control::{Lines, Word};
use crate::guest::exec::{Birth, Born, Cgroup};

/// What a run's process is started from.
#[derive(Debug, Clone)]
pub(crate) struct Start {
    pub language: String,
    /// The interpreter's arguments, with a word in braces for what the agent brings.
    pub argv: Vec<Vec<u8>>,
    /// It speaks the runner protocol; else it runs one source and ends.
    pub runner: bool,
    pub env: Vec<Vec<u8>>,
    pub user: Option<String>,
    /// Where it begins; `None`: where programs do.
    pub cwd: Option<Vec<u8>>,
    /// In MiB; `None`: the default, or what there is.
    pub memory_mib: Option<u64>,
    /// Whether it has the sandbox's network.
    pub network: bool,
}

/// What a context has used.
#[derive(Debug, Clone, Default)]
pub(crate) struct Measure {
    pub cpu_us: u64,
    pub peak_kib: u64,
    /// Something was killed for want of memory.
    pub ran_out: bool,
    /// What the kernel refused for want of a network.
    pub network: u64,
    /// Processes and threads that were refused.
    pub tasks: u64,
}

impl Measure {
    /// What was used since. The peak and a lack of memory are the context's.
    pub(super) fn since(&self, before: &Self) -> Self {
        Self {
            cpu_us: self.cpu_us.saturating_sub(before.cpu_us),
            network: self.network.saturating_sub(before.network),
            tasks: self.tasks.saturating_sub(before.tasks),
            ..self.clone()
        }
    }
}

/// What came of a visit to the control channel.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Heard {
    Words(Vec<Word>),
    /// It was closed, or says what is not of the protocol: no more is listened to.
    Lost(&'static str),
}

/// A started runner.
#[derive(Debug)]
pub(crate) struct Process {
    pub pid: libc::pid_t,
    /// Closes when the interpreter runs.
    pub(super) birth: Option<Birth>,
    pub(super) control: Option<UnixStream>,
    lines: Lines,
    /// What is to be written, and how much of it was.
    outbox: (Vec<u8>, usize),
    /// Ends that are read: stdout, stderr, result.
    pipes: [File; 3],
    pub(super) cgroup: Option<Cgroup>,
    /// The kernel's counts of its network namespace, where that is its own.
    refusals: Option<File>,
    isolated: bool,
}

impl Process {
    pub(super) fn new(
        pid: libc::pid_t,
        birth: Birth,
        control: Option<UnixStream>,
        pipes: [File; 3],
        cgroup: Option<Cgroup>,
        isolated: bool,
    ) -> Self {
        Self {
            pid,
            birth: Some(birth),
            control,
            lines: Lines::default(),
            outbox: (Vec::new(), 0),
            pipes,
            cgroup,
            refusals: None,
            isolated,
        }
    }

    /// Looks whether the interpreter runs.
    pub(super) fn birth(&mut self) -> Born {
        let Some(birth) = &mut self.birth else { return Born::Runs };
        let born = birth.look();
        if born == Born::Runs {
            self.birth = None;
            if self.isolated {
                // Open, it stays the one of that namespace, also when the process has gone.
                self.refusals = File::open(format!("/proc/{}/net/snmp", self.pid)).ok();
            }
        }
        born
    }

    /// Queues what the runner is to read.
    pub(super) fn tell(&mut self, octets: &[u8]) {
        self.outbox.0.extend_from_slice(octets);
    }

    /// Writes what the runner takes.
    pub(super) fn flush(&mut self) {
        let (outbox, written) = &mut self.outbox;
        let Some(control) = &mut self.control else { return };
        while let Some(rest) = outbox.get(*written..).filter(|rest| !rest.is_empty()) {
            match control.write(rest) {
                Ok(n) => *written += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                // Full; or gone, which reading tells.
                Err(_) => return,
            }
        }
        self.outbox = (Vec::new(), 0);
    }

    /// Reads what the runner says, as much as one turn may take.
    pub(super) fn listen(&mut self) -> Heard {
        let mut words = Vec::new();
        let Some(control) = &mut self.control else { return Heard::Words(words) };
        let mut buffer = [0; 256];
        let lost = loop {
            match control.read(&mut buffer) {
                Ok(0) => break "its runner closed the control channel",
                Ok(n) => {
                    let octets = buffer.get(..n).unwrap_or_default();
                    if self.lines.take(octets, |word| words.push(word)).is_err() || words.len() > 16 {
                        break "its runner said what is not of the protocol";
                    }
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Heard::Words(words),
                Err(_) => break "its runner's control channel broke",
            }
        };
        self.control = None;
        Heard::Lost(lost)
    }

    /// Empties the pipes of what came between two runs, and opens them anew: the copies of a run close with it.
    pub(super) fn open_pipes(&mut self, scratch: &mut [u8]) -> std::io::Result<[File; 3]> {
        for pipe in &mut self.pipes {
            // A pipe holds 64 KiB, or what its writer made of it; who writes without end is not waited for.
            for _ in 0..64 {
                if !pipe.read(scratch).is_ok_and(|n| n > 0) {
                    break;
                }
            }
        }
        let again = |pipe: &File| {
            let path = format!("/proc/self/fd/{}", pipe.as_fd().as_raw_fd());
            OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)
        };
        let [stdout, stderr, result] = &self.pipes;
        Ok([again(stdout)?, again(stderr)?, again(result)?])
    }

    /// What it has used so far.
    pub(super) fn measure(&self) -> Measure {
        let cgroup = self.cgroup.as_ref();
        Measure {
            cpu_us: cgroup.and_then(Cgroup::cpu_us).unwrap_or(0),
            peak_kib: cgroup.and_then(Cgroup::peak_kib).unwrap_or(0),
            ran_out: cgroup.is_some_and(Cgroup::ran_out),
            tasks: cgroup.map_or(0, Cgroup::refused_tasks),
            network: self.refusals.as_ref().map_or(0, refused),
        }
    }

    /// Kills all that it started, and itself.
    pub(super) fn kill(&self) {
        if !self.cgroup.as_ref().is_some_and(Cgroup::kill) {
            self.signal(libc::SIGKILL);
        }
    }

    /// Kills what is left when it was reaped itself.
    pub(super) fn kill_rest(&self) {
        if let Some(cgroup) = &self.cgroup {
            cgroup.kill();
        }
    }

    /// Signals its process group. Only before it was reaped.
    pub(super) fn signal(&self, signal: libc::c_int) {
        // SAFETY: kill takes plain numbers. The process was not reaped, so both are its own.
        unsafe {
            if libc::kill(-self.pid, signal) != 0 {
                libc::kill(self.pid, signal);
            }
        }
    }
}

/// Sends for which there was no route, and datagrams that nobody was there for: a name server, mostly.
fn refused(snmp: &File) -> u64 {
    let mut text = vec![0; 8192];
    let len = snmp.read_at(&mut text, 0).unwrap_or(0);
    count_refusals(&String::from_utf8_lossy(text.get(..len).unwrap_or_default()))
}

fn count_refusals(snmp: &str) -> u64 {
    let count = |protocol: &str, name: &str| -> Option<u64> {
        let mut lines = snmp.lines().filter(|line| line.split(':').next() == Some(protocol));
        let at = lines.next()?.split_whitespace().position(|word| word == name)?;
        lines.next()?.split_whitespace().nth(at)?.parse().ok()
    };
    count("Ip", "OutNoRoutes").unwrap_or(0).saturating_add(count("Udp", "NoPorts").unwrap_or(0))
}

/// A context.
#[derive(Debug)]
pub(crate) struct Context {
    pub start: Start,
    /// Stays after its run.
    pub kept: bool,
    pub process: Option<Process>,
    /// Why there is no process any more.
    pub ended: Option<String>,
    /// The run that has it.
    pub current: Option<u64>,
    /// Runs that wait for it.
    pub queue: VecDeque<u64>,
    /// Runs that it had.
    pub runs: u64,
    /// How often it was started: part of its cgroup's name.
    pub starts: u64,
    /// The file of its source, where it is no runner.
    pub source: Option<std::path::PathBuf>,
}

impl Context {
    pub(super) fn new(start: Start, kept: bool) -> Self {
        Self {
            start,
            kept,
            process: None,
            ended: None,
            current: None,
            queue: VecDeque::new(),
            runs: 0,
            starts: 0,
            source: None,
        }
    }

    /// Kills its process, if there is one.
    pub(crate) fn kill(&self) {
        if let Some(process) = &self.process {
            process.kill();
        }
    }

    /// `starting`, `idle`, `busy` or `ended`.
    pub(super) fn state(&self) -> &'static str {
        match &self.process {
            None => "ended",
            Some(_) if self.current.is_some() => "busy",
            Some(Process { birth: Some(_), .. }) => "starting",
            Some(_) => "idle",
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if let Some(path) = &self.source {
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_read_by_their_names() {
        let snmp = "Ip: Forwarding DefaultTTL OutNoRoutes\nIp: 1 64 3\nUdp: InDatagrams NoPorts\nUdp: 9 4\n";
        assert_eq!(count_refusals(snmp), 7);
        for odd in ["", "Ip: OutNoRoutes", "Ip: OutNoRoutes\nIp: x\n", "Udp: NoPorts\nIp: 1\n"] {
            assert_eq!(count_refusals(odd), 0, "{odd:?}");
        }
    }

    #[test]
    fn use_is_counted_from_where_a_run_began() {
        let measure = |cpu_us, network| Measure { cpu_us, network, peak_kib: 10, ..Measure::default() };
        let used = measure(50, 5).since(&measure(20, 5));
        assert_eq!((used.cpu_us, used.network, used.peak_kib), (30, 0, 10));
    }
}
