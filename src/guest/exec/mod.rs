//! Programs: started, fed, drained, signalled, reaped, remembered.

mod calls;
mod cgroup;
mod input;
mod output;
mod realm;
mod spawn;
mod user;

use std::fs::File;
use std::time::Instant;

use nix::errno::Errno;

pub(super) use cgroup::{Cgroup, Users, are_frozen};
pub(super) use input::Input;
pub(super) use output::{Held, Output};
pub(super) use realm::Realm;
pub(super) use spawn::{Birth, Born, Failure, Plan, Size, Spawned, Stage, spawn};
pub(super) use user::Identity;
pub(super) use user::names_root;
pub(crate) use user::{FILE_MAX, read_file, resolve};

use super::code::Run;
use crate::wire::{Code, Error, Fields, Link, Message};

/// The request that a program's streams go to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Attachment {
    pub link: u64,
    pub tag: String,
}

/// How a program ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct Outcome {
    /// What waitpid(2) gave.
    pub status: libc::c_int,
    pub cpu_us: u64,
    pub peak_kib: u64,
    /// The guest's kernel killed something of it for want of memory.
    pub ran_out: bool,
}

/// Where a program stands.
#[derive(Debug)]
enum Phase {
    /// Forked; the status pipe will tell whether it became its program.
    Starting(Birth),
    /// It runs, or ran until a moment ago.
    Running,
    /// It was reaped. Its streams may have more.
    Ended(Outcome),
    /// A code run is over, with that answer.
    Over(Result<Fields, Error>),
}

/// One program.
#[derive(Debug)]
pub(super) struct Exec {
    pub id: u64,
    pub pid: libc::pid_t,
    /// The same as it and others in its namespace see it.
    pid_within: libc::pid_t,
    argv: Vec<Vec<u8>>,
    phase: Phase,
    pub attached: Option<Attachment>,
    /// Whether the link was told number and pid.
    announced: bool,
    pub stdin: Input,
    pub stdout: Output,
    pub stderr: Output,
    /// What a code run's runner says of it.
    pub result: Output,
    /// It is a code run, and has no process of its own.
    pub run: Option<Box<Run>>,
    terminal: Option<File>,
    pub cgroup: Option<Cgroup>,
    pub deadline: Option<Instant>,
    timed_out: bool,
}

/// What a visit to a program found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Visit {
    /// Nothing to do for now.
    Idle,
    /// Something was done; there may be more.
    Progress,
    /// All was said to the link.
    Done,
    /// It never became its program; forget it.
    Failed(Failure),
}

impl Exec {
    /// A program that was just forked.
    pub(super) fn new(id: u64, argv: Vec<Vec<u8>>, spawned: Spawned, cgroup: Option<Cgroup>, held: &Held) -> Self {
        let is_terminal = spawned.terminal.is_some();
        let stderr_channel = if is_terminal { "" } else { "stderr" };
        Self {
            id,
            pid: spawned.pid,
            pid_within: spawned.pid,
            argv,
            phase: Phase::Starting(spawned.birth),
            attached: None,
            announced: false,
            stdin: Input::new(spawned.stdin, is_terminal),
            stdout: Output::new("stdout", Some(spawned.stdout), held.clone()),
            stderr: Output::new(stderr_channel, spawned.stderr, held.clone()),
            result: Output::new("", None, held.clone()),
            run: None,
            terminal: spawned.terminal,
            cgroup,
            deadline: None,
            timed_out: false,
        }
    }

    /// A code run that was just asked for.
    pub(super) fn of_run(id: u64, run: Run, held: &Held) -> Self {
        Self {
            id,
            pid: 0,
            pid_within: 0,
            argv: vec![run.language.clone().into_bytes()],
            phase: Phase::Running,
            attached: None,
            announced: false,
            stdin: Input::new(None, false),
            stdout: Output::later("stdout", held.clone()),
            stderr: Output::later("stderr", held.clone()),
            result: Output::later("result", held.clone()),
            run: Some(Box::new(run)),
            terminal: None,
            cgroup: None,
            deadline: None,
            timed_out: false,
        }
    }

    /// The code run is over.
    pub(super) fn conclude(&mut self, answer: Result<Fields, Error>) {
        self.outputs().for_each(|output| {
            output.drop_source();
            output.finish();
        });
        self.phase = Phase::Over(answer);
    }

    /// Its output streams.
    pub(super) fn outputs(&mut self) -> impl Iterator<Item = &mut Output> {
        [&mut self.stdout, &mut self.stderr, &mut self.result].into_iter()
    }

    /// The program's name, for messages.
    pub(super) fn name(&self) -> String {
        String::from_utf8_lossy(self.argv.first().map(Vec::as_slice).unwrap_or_default()).into_owned()
    }

    /// Whether it was not yet reaped.
    pub(super) fn is_alive(&self) -> bool {
        !matches!(self.phase, Phase::Ended(_) | Phase::Over(_))
    }

    /// Sends a signal to its process group.
    pub(super) fn signal(&self, signal: libc::c_int) -> Result<(), Error> {
        if !self.is_alive() || self.run.is_some() {
            // Its number may be another's by now.
            return Err(Error::new(Code::BadState, format!("exec {} has ended", self.id)));
        }
        // SAFETY: kill takes plain numbers. The pid was not reaped, so the group is this program's.
        match Errno::result(unsafe { libc::kill(-self.pid, signal) }) {
            Ok(_) => Ok(()),
            // Forked a moment ago and not yet a group of its own: then it is all there is.
            // SAFETY: as above.
            Err(Errno::ESRCH) if unsafe { libc::kill(self.pid, signal) } == 0 => Ok(()),
            Err(errno) => Err(Error::new(Code::BadState, format!("exec {}: {}", self.id, errno.desc()))),
        }
    }

    /// Kills it with all that it has started, daemons too where it has a cgroup.
    pub(super) fn kill_all(&self) {
        if !self.cgroup.as_ref().is_some_and(Cgroup::kill) || self.is_alive() {
            let _ = self.signal(libc::SIGKILL);
        }
    }

    /// Its time is up.
    pub(super) fn time_out(&mut self) {
        if self.is_alive() {
            self.timed_out = true;
            self.kill_all();
        }
    }

    /// The receiver of one of its streams has taken that many octets.
    pub(super) fn credit(&mut self, channel: &str, octets: u64) {
        for output in self.outputs() {
            if output.channel() == channel {
                output.credit(octets);
            }
        }
    }

    /// Changes the size of its terminal.
    pub(super) fn resize(&self, size: Size) -> Result<(), Error> {
        match &self.terminal {
            Some(terminal) => spawn::resize(terminal, size)
                .map_err(|errno| Error::new(Code::BadState, format!("exec {}: {}", self.id, errno.desc()))),
            None => Err(Error::new(Code::BadState, format!("exec {} has no terminal", self.id))),
        }
    }

    /// It was reaped. Gives whether others hold its streams, which are then to be cut after a while.
    pub(super) fn reaped(&mut self, status: libc::c_int, usage: &libc::rusage) -> bool {
        let cpu_us = |time: libc::timeval| time.tv_sec.unsigned_abs() * 1_000_000 + time.tv_usec.unsigned_abs();
        let outcome = Outcome {
            status,
            cpu_us: self
                .cgroup
                .as_ref()
                .and_then(Cgroup::cpu_us)
                .unwrap_or_else(|| cpu_us(usage.ru_utime) + cpu_us(usage.ru_stime)),
            peak_kib: self.cgroup.as_ref().and_then(Cgroup::peak_kib).unwrap_or(usage.ru_maxrss.unsigned_abs()),
            ran_out: self.cgroup.as_ref().is_some_and(Cgroup::ran_out),
        };
        // What the status pipe holds was read before: `Starting` ends in `advance`.
        self.phase = Phase::Ended(outcome);
        self.terminal = None;
        self.stdin.close();
        !(self.stdout.is_closed() && self.stderr.is_closed())
    }

    /// Its streams end where they are, although others hold them open.
    pub(super) fn cut(&mut self) {
        self.stdout.cut();
        self.stderr.cut();
    }

    /// Another request takes its streams over, from these offsets on or as near as can be.
    pub(super) fn attach(&mut self, attachment: Attachment, [stdout, stderr, result]: [u64; 3]) -> Fields {
        self.attached = Some(attachment);
        self.announced = true;
        let credit = self.stdin.renew_credit();
        let stdout = self.stdout.rewind(stdout);
        let stderr = self.stderr.rewind(stderr);
        let fields = Fields::new().with("exec", self.id).with("stdout_offset", stdout).with("stderr_offset", stderr);
        if let Some(run) = &mut self.run {
            let result = self.result.rewind(result);
            run.announced = None;
            return fields.with("result_offset", result);
        }
        match self.stdin.is_open() {
            true => fields.with("stdin_offset", self.stdin.offset()).with("stdin_credit", credit),
            false => fields,
        }
    }

    /// Does what needs no link: looks whether it started, feeds its stdin.
    pub(super) fn advance(&mut self) -> Visit {
        if let Phase::Starting(birth) = &mut self.phase {
            match birth.look() {
                Born::Failed(failure) => return Visit::Failed(failure),
                Born::NotYet => return Visit::Idle,
                Born::Runs => {
                    self.pid_within = birth.pid;
                    self.phase = Phase::Running;
                }
            }
        }
        if self.stdin.pump() { Visit::Progress } else { Visit::Idle }
    }

    /// Does all that can be done, for the link that it is attached to.
    pub(super) fn pump(&mut self, link: &mut Link<File>, tag: &str, scratch: &mut [u8]) -> Visit {
        let mut visit = self.advance();
        if matches!(visit, Visit::Failed(_)) || matches!(self.phase, Phase::Starting(_)) {
            return visit;
        }
        if let Some(run) = &mut self.run {
            if let Some(fields) = run.announce() {
                link.send(&Message::item(tag, Fields::new().with("exec", self.id).and(fields)));
            }
        } else if !self.announced {
            self.announced = true;
            link.send(&Message::item(tag, Fields::new().with("exec", self.id).with("pid", self.pid_within)));
        }
        self.stdin.give_credit(link, tag);
        // stderr is mostly short, and said about what comes on stdout.
        if self.stderr.pump(link, tag, scratch) | self.stdout.pump(link, tag, scratch) {
            visit = Visit::Progress;
        }
        if self.result.pump(link, tag, scratch) {
            visit = Visit::Progress;
        }
        if let (Phase::Over(answer), true) = (&self.phase, self.outputs_are_done()) {
            link.send(&match answer {
                Ok(fields) => Message::ok(tag, fields.clone()),
                Err(error) => Message::err(tag, error.clone()),
            });
            return Visit::Done;
        }
        if let (Phase::Ended(outcome), true, true) = (&self.phase, self.stdout.is_done(), self.stderr.is_done()) {
            link.send(&Message::ok(tag, self.ended(outcome)));
            return Visit::Done;
        }
        visit
    }

    fn outputs_are_done(&self) -> bool {
        self.stdout.is_done() && self.stderr.is_done() && self.result.is_done()
    }

    fn ended(&self, outcome: &Outcome) -> Fields {
        let signal = libc::WIFSIGNALED(outcome.status).then(|| libc::WTERMSIG(outcome.status));
        let mut fields = Fields::new().with("exit", exit_code(outcome.status));
        if let Some(signal) = signal {
            fields = fields.with("signal", signal);
        }
        if self.timed_out {
            fields = fields.with("timeout", true);
        }
        if outcome.ran_out {
            fields = fields.with("oom", true);
        }
        fields.with("cpu_ms", outcome.cpu_us.div_ceil(1000)).with("peak_kib", outcome.peak_kib)
    }

    /// Its row in a list.
    pub(super) fn row(&self) -> Fields {
        let state = match self.phase {
            Phase::Starting(_) | Phase::Running => "running",
            Phase::Ended(_) | Phase::Over(_) => "exited",
        };
        let mut row = Fields::new()
            .with("exec", self.id)
            .with("pid", self.pid_within)
            .with("state", state)
            .with("stdout_offset", self.stdout.offset())
            .with("stderr_offset", self.stderr.offset());
        if let Phase::Ended(outcome) = &self.phase {
            row.0.extend(self.ended(outcome).0);
        }
        if let Some(run) = &self.run {
            row = row.with("language", &run.language).with("result_offset", self.result.offset());
        }
        for arg in &self.argv {
            row = row.with_bytes("argv", arg);
        }
        row
    }
}

/// The shell's way to put an end into one number.
fn exit_code(status: libc::c_int) -> libc::c_int {
    if libc::WIFSIGNALED(status) { 128 + libc::WTERMSIG(status) } else { libc::WEXITSTATUS(status) }
}
