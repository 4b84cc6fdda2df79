//! `system.freeze` and `system.thaw`: the programs stand still while the machine is captured, and go on only when it
//! is known who it is from then on. docs/snapshots.md.

use std::fs::File;
use std::io;
use std::time::{Duration, Instant};

use mio::Interest;

use super::agent::{Agent, Due, Kind};
use super::connection::Job;
use super::exec::are_frozen;
use super::identity::{Renewal, sandbox_id};
use super::verbs::Begun;
use crate::wire::{Args, Code, Error, Fields};

/// Longest time that a freeze waits, in milliseconds, and what it waits when nothing is said.
const WAIT_MAX_MS: u64 = 10_000;
const WAIT_MS: u64 = 1000;
/// Turns that the programs are given to come to rest before the agent goes on with other things: the kernel says that
/// they did with up to 10 ms of delay (CGROUP_FILE_NOTIFY_MIN_INTV).
const TURNS: usize = 50;

/// The programs were ordered to stand still.
#[derive(Debug)]
pub(super) struct Freeze {
    /// The cgroup's own word on whether they do.
    events: File,
}

impl Agent {
    /// `system.freeze`
    pub(super) fn freeze(&mut self, mut args: Args) -> Result<Begun, Error> {
        let wait = args.number("wait_ms", 0..=WAIT_MAX_MS)?.unwrap_or(WAIT_MS);
        let id = sandbox_id(&mut args)?;
        args.finish()?;
        if self.stopping {
            return Err(Error::new(Code::Stopping, "the sandbox is going down"));
        }
        let Some(users) = &self.users else {
            return Err(Error::new(Code::BadState, "programs have no cgroups and cannot be frozen"));
        };
        if self.freeze.is_none() {
            let events = users.events().map_err(|e| failed("watch the programs", &e))?;
            self.watch(&events, Kind::Frozen, 0, Interest::PRIORITY).map_err(|e| failed("watch the programs", &e))?;
            users.order(true).map_err(|e| failed("freeze the programs", &e))?;
            self.freeze = Some(Freeze { events });
        }
        if id.is_some() {
            self.identity.id = id;
        }
        for _ in 0..TURNS {
            if self.freeze_is_decided() {
                break;
            }
            std::thread::yield_now();
        }
        if wait == 0 || self.freeze_is_decided() {
            return Ok(Begun::Done(self.freeze_fields()));
        }
        let until = Instant::now() + Duration::from_millis(wait);
        self.add_due(until, Due::Freeze);
        Ok(Begun::Job(Job::Freeze(until)))
    }

    /// Whether waiting for the programs changes nothing any more: they stand still, or need not.
    pub(super) fn freeze_is_decided(&self) -> bool {
        self.freeze.as_ref().is_none_or(|freeze| are_frozen(&freeze.events))
    }

    /// The answer to `system.freeze` as it is now.
    pub(super) fn freeze_fields(&self) -> Fields {
        let frozen = self.freeze.as_ref().is_some_and(|freeze| are_frozen(&freeze.events));
        let fields = Fields::new().with("frozen", frozen);
        match self.users.as_ref().and_then(|users| users.tasks()) {
            Some(tasks) => fields.with("procs", tasks),
            None => fields,
        }
    }

    /// The cgroup's word may have changed.
    pub(super) fn look_at_freeze(&mut self) {
        if self.freeze_is_decided() {
            self.mark_freezers();
        }
    }

    /// Has the links visited that wait for the programs to stand still.
    pub(super) fn mark_freezers(&mut self) {
        let waits = |jobs: &[super::connection::Slot]| jobs.iter().any(|slot| matches!(slot.job, Job::Freeze(_)));
        let waiting = self.links.iter().filter(|(_, connection)| waits(&connection.jobs)).map(|(id, _)| *id);
        self.busy_links.extend(waiting);
    }

    /// `system.thaw`
    pub(super) fn thaw(&mut self, args: Args) -> Result<Fields, Error> {
        let started = Instant::now();
        let renewal = Renewal::parse(args)?;
        // On a machine that is not a sandbox these are not the agent's.
        if self.pid1 {
            renewal.apply(&mut self.identity)?;
        }
        if self.freeze.is_some()
            && let Some(users) = &self.users
        {
            users.order(false).map_err(|e| failed("thaw the programs", &e).with("step", "programs"))?;
        }
        self.freeze = None;
        // Who waited for the opposite has waited for nothing.
        self.mark_freezers();
        Ok(Fields::new().with("generation", self.identity.generation).with("took_us", started.elapsed().as_micros()))
    }
}

fn failed(what: &str, error: &io::Error) -> Error {
    let errno = nix::errno::Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
    Error::new(Code::Internal, format!("cannot {what}: {}", errno.desc())).with("errno", format!("{errno:?}"))
}
