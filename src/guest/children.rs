//! The table of programs: entered, watched, reaped, remembered, forgotten.

use std::io;
use std::time::{Duration, Instant};

use mio::Interest;
use nix::errno::Errno;
use nix::sys::signal::Signal;

use super::agent::{Agent, Due, Kind};
use super::connection::Connection;
use super::exec::{Exec, Failure, Spawned, Stage, Visit};
use super::system;
use crate::wire::{Code, Error};

/// Programs that have ended and were not forgotten by `exec.forget`, at most.
const FINISHED_MAX: usize = 1024;
/// How long the streams of an ended program stay open for those it left behind.
const LINGER: Duration = Duration::from_secs(1);

impl Agent {
    /// Reaps, or says that the process is to end.
    pub(super) fn take_signals(&mut self) -> bool {
        let mut end = false;
        while let Ok(Some(info)) = self.signals.read_signal() {
            end |= info.ssi_signo != Signal::SIGCHLD as u32;
        }
        self.reap();
        end
    }

    pub(super) fn reap(&mut self) {
        let mut orphans = false;
        loop {
            let mut status = 0;
            // SAFETY: rusage is plain data for which all zeros is a valid value.
            let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
            // SAFETY: wait4 fills one int and one rusage.
            match Errno::result(unsafe { libc::wait4(-1, &mut status, libc::WNOHANG, &mut usage) }) {
                Ok(0) => break,
                Ok(pid) if self.realm.as_ref().is_some_and(|realm| realm.keeper == pid) => {
                    // All that was in there has ended with it; the next program makes another.
                    self.realm = None;
                }
                Ok(pid) => match self.by_pid.remove(&pid) {
                    Some(id) => self.reaped(id, status, &usage),
                    None => orphans |= !self.context_reaped(pid, status),
                },
                Err(Errno::EINTR) => {}
                Err(_) => {
                    // No children at all: what a power-off waits for.
                    if self.stopping && self.pid1 {
                        system::power_off();
                    }
                    break;
                }
            }
        }
        if let (true, Some(users)) = (orphans, &mut self.users) {
            users.sweep();
        }
    }

    pub(super) fn reaped(&mut self, id: u64, status: libc::c_int, usage: &libc::rusage) {
        let Some(exec) = self.execs.get_mut(&id) else { return };
        if let Visit::Failed(failure) = exec.advance() {
            return self.fail_start(id, failure);
        }
        let shared = exec.reaped(status, usage);
        if let Some(deadline) = exec.deadline.take() {
            self.due.remove(&(deadline, Due::Timeout(id)));
        }
        if shared {
            self.due.insert((Instant::now() + LINGER, Due::Linger(id)));
        }
        self.busy_execs.insert(id);
        self.finished.push_back(id);
        while self.finished.len() > FINISHED_MAX {
            let execs = &self.execs;
            let is_idle = |id: &u64| execs.get(id).is_none_or(|exec| exec.attached.is_none());
            match self.finished.iter().position(is_idle).and_then(|at| self.finished.remove(at)) {
                Some(oldest) => self.drop_exec(oldest),
                None => break,
            }
        }
    }

    /// A program that never became one: answers its request, and nothing of it is left.
    pub(super) fn fail_start(&mut self, id: u64, failure: Failure) {
        let Some(mut exec) = self.execs.remove(&id) else { return };
        self.by_pid.remove(&exec.pid);
        if let Some(deadline) = exec.deadline.take() {
            self.due.remove(&(deadline, Due::Timeout(id)));
        }
        if let (Some(cgroup), Some(users)) = (exec.cgroup.take(), &mut self.users) {
            users.retire(cgroup);
        }
        if let Some(attachment) = exec.attached.take()
            && let Some(connection) = self.links.get_mut(&attachment.link)
        {
            connection.fail(&attachment.tag, start_error(&exec, failure));
            self.busy_links.insert(attachment.link);
        }
    }

    /// Registers a program that was just forked.
    ///
    /// # Errors
    /// When its streams cannot be watched; the caller then kills it.
    pub(super) fn watch_exec(&self, id: u64, spawned: &Spawned) -> io::Result<()> {
        self.watch(&spawned.birth.status, Kind::Status, id, Interest::READABLE)?;
        self.watch(&spawned.stdout, Kind::Stdout, id, Interest::READABLE)?;
        if let Some(stdin) = &spawned.stdin {
            self.watch(stdin, Kind::Stdin, id, Interest::WRITABLE)?;
        }
        if let Some(stderr) = &spawned.stderr {
            self.watch(stderr, Kind::Stderr, id, Interest::READABLE)?;
        }
        Ok(())
    }

    /// Enters a program into the tables.
    pub(super) fn enter_exec(&mut self, exec: Exec) {
        self.by_pid.insert(exec.pid, exec.id);
        if let Some(deadline) = exec.deadline {
            self.due.insert((deadline, Due::Timeout(exec.id)));
        }
        self.next_exec = self.next_exec.max(exec.id.saturating_add(1));
        self.busy_execs.insert(exec.id);
        self.execs.insert(exec.id, exec);
    }

    /// Forgets a program that has ended.
    pub(super) fn forget(&mut self, id: u64) {
        self.finished.retain(|&finished| finished != id);
        self.drop_exec(id);
    }

    pub(super) fn drop_exec(&mut self, id: u64) {
        if let Some(mut exec) = self.execs.remove(&id)
            && let (Some(cgroup), Some(users)) = (exec.cgroup.take(), &mut self.users)
        {
            users.retire(cgroup);
        }
    }

    /// Ends another request's hold of a program's streams, for one that takes them over.
    pub(super) fn release(&mut self, current: &mut Connection, current_id: u64, id: u64) {
        let Some(attachment) = self.execs.get_mut(&id).and_then(|exec| exec.attached.take()) else { return };
        let error = Error::new(Code::BadState, format!("the streams of exec {id} were taken over"));
        if attachment.link == current_id {
            current.fail(&attachment.tag, error);
        } else if let Some(connection) = self.links.get_mut(&attachment.link) {
            connection.fail(&attachment.tag, error);
            self.busy_links.insert(attachment.link);
        }
    }
}

/// What the client is told when a program could not be started.
pub(super) fn start_error(exec: &Exec, failure: Failure) -> Error {
    failed_to_start(&exec.name(), failure)
}

/// The same for a program of that name.
pub(super) fn failed_to_start(name: &str, failure: Failure) -> Error {
    let what = match failure.stage {
        Stage::Session => "make a session",
        Stage::Terminal => "take the terminal",
        Stage::Streams => "connect the streams",
        Stage::Limits => "set the limits",
        Stage::User => "become the user",
        Stage::Directory => "enter the working directory",
        Stage::Program => "run the program",
        Stage::Network => "make a network of its own",
        Stage::Realm => "enter the programs' namespaces",
    };
    // As shells do: 127 for what is not there, 126 for what cannot be run.
    let exit = if failure.stage == Stage::Program && failure.errno == Errno::ENOENT { 127 } else { 126 };
    Error::new(Code::ExecFailed, format!("cannot {what} for {name}: {}", failure.errno.desc()))
        .with("errno", format!("{:?}", failure.errno))
        .with("exit", exit)
}
