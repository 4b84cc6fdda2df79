//! Workers that wait in homes of their own: made, handed out, taken down.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Instant;

use mio::Token;

use super::exhausted;
use super::prepared::Prepared;
use crate::node::ledger::Booking;
use crate::node::supervisor::{Done, Source, Supervisor};
use crate::pool::Item;
use crate::sandbox::berth::Berth;
use crate::sandbox::death;
use crate::sandbox::home::Home;
use crate::sandbox::id::SandboxId;
use crate::sandbox::ledger::Resource;
use crate::sandbox::limits::Oom;
use crate::sandbox::worker::LastWords;
use crate::wire::{Code, Error};

/// A worker that waits for a sandbox.
#[derive(Debug)]
pub(in crate::node) struct Idle {
    /// The id that the sandbox will have.
    pub id: SandboxId,
    /// Its home.
    pub berth: Berth,
    /// The user id that it runs by.
    pub uid: u32,
    /// Its process as an event source.
    pub token: Token,
    /// What it was told to prepare.
    pub prepared: Option<Prepared>,
}

impl Supervisor {
    /// A worker that is ready, and lives; where there is one that prepared `snapshot`, that one.
    pub(in crate::node) fn take_idle(&mut self, snapshot: Option<&str>) -> Option<Item<Idle>> {
        while let Some(dead) = self.pools.workers.lost(|idle| !idle.berth.is_alive()) {
            self.idle_broke(dead);
        }
        self.refill_later();
        self.pools.workers.take_best(Instant::now(), |idle| match &idle.prepared {
            Some(prepared) if snapshot == Some(&prepared.snapshot) => 2,
            None => 1,
            Some(_) => 0,
        })
    }

    /// Gives a new sandbox the worker that was taken for it, or sees to it that it gets one.
    pub(in crate::node) fn settle_worker(&mut self, id: &SandboxId, taken: Option<Item<Idle>>) -> Result<(), Error> {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return Ok(()) };
        if let Some(Item { number, thing: Idle { berth, uid, token, .. }, .. }) = taken {
            sandbox.uid = Some(uid);
            sandbox.held.place = Some(number);
            sandbox.held.berth = Some((berth, token));
            return Ok(());
        }
        match self.pools.workers.order() {
            Some(place) => self.order_worker(id, place),
            None => {
                self.pools.workers.wait(id.clone(), Instant::now());
                Ok(())
            }
        }
    }

    /// Begins to make a worker for a sandbox.
    fn order_worker(&mut self, id: &SandboxId, place: u32) -> Result<(), Error> {
        let Some(uid) = self.uids.take() else {
            self.pools.workers.freed(place);
            let count = self.uids.count();
            let message = format!("all {count} user ids for workers are taken (jail.uid_count)");
            return Err(Error::new(Code::NoCapacity, message).with("resource", "uid").with("max", count));
        };
        if let Some(sandbox) = self.sandboxes.get_mut(id) {
            sandbox.uid = Some(uid);
            sandbox.held.place = Some(place);
            sandbox.held.making = true;
        }
        self.make_worker(Booking { id: id.clone(), place, uid, ordered: true });
        Ok(())
    }

    /// Makes a home and its worker, once that is written down.
    fn make_worker(&mut self, booking: Booking) {
        self.pools.under_way += 1;
        self.book(booking);
    }

    /// Makes a home and its worker.
    pub(in crate::node) fn begin_worker(&self, Booking { id, place, uid, ordered }: Booking) -> io::Result<()> {
        let (home, spawner) = (self.places.of(&id), Arc::clone(&self.spawner));
        self.background.run("worker", move || {
            let result = Berth::make(home, uid, &spawner).map(Box::new);
            Done::WorkerMade { id, place, uid, ordered, result }
        })
    }

    /// A thread made a worker, or could not.
    pub(in crate::node) fn worker_made(
        &mut self,
        id: &SandboxId,
        (place, uid): (u32, u32),
        ordered: bool,
        result: io::Result<Box<Berth>>,
    ) {
        self.pools.under_way -= 1;
        self.pools.look = true;
        let now = Instant::now();
        if let Ok(berth) = &result {
            self.ledger.taken(
                id,
                &[Resource::User, Resource::Directory, Resource::Socket, Resource::Cgroup, Resource::Process],
            );
            let pid = u64::try_from(berth.pid).unwrap_or(0);
            self.ledger.with(id, |account| {
                account.note(Resource::Process, pid);
                Ok(())
            });
        }
        let made = match result {
            Ok(berth) => match self.watch(berth.pidfd.as_raw_fd(), Source::WorkerProcess(id.clone())) {
                Ok(token) => Ok((*berth, token)),
                Err(e) => return self.cannot_be_watched(id, (place, uid), ordered, *berth, &e),
            },
            Err(e) => Err(e),
        };
        match made {
            Ok((berth, token)) if !ordered => {
                let thing = Idle { id: id.clone(), berth, uid, token, prepared: None };
                self.pools.workers.made(Item { number: place, thing, made: now }, now);
                if self.stopping.is_some() {
                    self.drain_pools();
                }
            }
            Ok((berth, token)) => {
                self.pools.workers.delivered();
                let Some(sandbox) = self.sandboxes.get_mut(id) else {
                    self.unwatch(token);
                    self.unmake(berth.home, Some((place, uid)), None);
                    return;
                };
                sandbox.held.berth = Some((berth, token));
                self.go_on(id);
            }
            Err(e) => {
                log::error!("a worker cannot be started: {e}");
                self.uids.give_back(uid);
                if !self.sandboxes.contains_key(id) {
                    self.close_account(id);
                }
                if !ordered {
                    self.pools.workers.failed(place, e.to_string(), now);
                    return;
                }
                self.pools.workers.freed(place);
                self.pools.workers.broke(e.to_string(), now);
                let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
                (sandbox.uid, sandbox.held.place) = (None, None);
                if sandbox.held.after.is_some() {
                    self.go_on(id);
                    return;
                }
                sandbox.held.making = false;
                self.fail_start(
                    id,
                    Error::new(Code::NoCapacity, format!("worker cannot be started: {e}")).with("resource", "worker"),
                );
            }
        }
    }

    /// A worker whose end nobody would notice is of no use. It is taken down, and its user and place are free after that.
    fn cannot_be_watched(
        &mut self,
        id: &SandboxId,
        worker: (u32, u32),
        ordered: bool,
        berth: Berth,
        error: &io::Error,
    ) {
        let why = format!("worker {} cannot be watched: {error}", berth.pid);
        log::error!("{why}");
        let now = Instant::now();
        if ordered {
            self.pools.workers.broke(why.clone(), now);
        } else {
            self.pools.workers.spoiled(why.clone(), now);
        }
        // A sandbox's home is taken down with the sandbox, whose user and place these are.
        let Some(sandbox) = self.sandboxes.get_mut(id).filter(|_| ordered) else {
            return self.unmake(berth.home, Some(worker), None);
        };
        if sandbox.held.after.is_some() {
            self.go_on(id);
            return;
        }
        sandbox.held.making = false;
        self.fail_start(id, Error::new(Code::NoCapacity, why).with("resource", "worker"));
    }

    /// The thread that made a sandbox's worker is done: it is started, or taken down where it was removed meanwhile.
    fn go_on(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        sandbox.held.making = false;
        match sandbox.held.after.take() {
            Some(extent) => self.release(id, extent),
            None => self.schedule_or_fail(id),
        }
    }

    /// A worker has ended before its sandbox was started, or before it had one.
    pub(in crate::node) fn waiting_worker_ended(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else {
            if let Some(item) = self.pools.workers.lost(|idle| idle.id == *id) {
                self.idle_broke(item);
            }
            return;
        };
        let Some((berth, token)) = sandbox.held.berth.take() else { return };
        self.unwatch(token);
        let cause = death::reason(LastWords::read(&berth.home.last_words()).as_ref(), None, Oom::None, b"");
        self.fail_start(id, Error::new(Code::VmFailed, format!("the machine ended before it was started: {cause}")));
    }

    fn idle_broke(&mut self, Item { number, thing, .. }: Item<Idle>) {
        let Idle { id, berth, uid, token, .. } = thing;
        self.unwatch(token);
        let cause = death::reason(LastWords::read(&berth.home.last_words()).as_ref(), None, Oom::None, b"");
        let what = format!("worker {} of no sandbox yet ({id}) ended: {cause}", berth.pid);
        log::warn!("{what}");
        self.pools.workers.broke(what, Instant::now());
        self.unmake(berth.home, Some((number, uid)), None);
    }

    /// Takes a home down that no sandbox has, or has any more; then its places are free.
    pub(super) fn unmake(&mut self, home: Home, worker: Option<(u32, u32)>, overlay_place: Option<u32>) {
        let id = home.id().and_then(SandboxId::parse);
        if let Some(id) = &id {
            self.ledger.with(id, |account| {
                account.give_back(Resource::ALL);
                Ok(())
            });
        }
        let started = self.background.run("release", move || {
            let result = home.remove();
            Done::Unmade { id, worker, overlay_place, result }
        });
        match started {
            Ok(()) => self.pools.under_way += 1,
            Err(e) => log::error!("no thread to take a home down: {e}"),
        }
    }

    /// A home was taken down.
    pub(in crate::node) fn unmade(
        &mut self,
        id: Option<SandboxId>,
        worker: Option<(u32, u32)>,
        overlay_place: Option<u32>,
        result: io::Result<()>,
    ) {
        self.pools.under_way -= 1;
        self.pools.look = true;
        if let Some(id) = id {
            self.ledger.with(&id, |account| {
                account.given_back(Resource::ALL, result.is_ok());
                Ok(())
            });
            if result.is_ok() {
                self.close_account(&id);
            }
        }
        if let Err(e) = result {
            // Its places are not given out again: what has them is not known.
            log::error!("a home cannot be taken down: {e}");
            return;
        }
        if let Some((place, uid)) = worker {
            self.pools.workers.freed(place);
            self.uids.give_back(uid);
        }
        if let Some(place) = overlay_place {
            self.pools.overlays.freed(place);
        }
    }

    /// Whether a sandbox's worker waits for it.
    pub(in crate::node) fn has_worker(&self, id: &SandboxId) -> bool {
        self.sandboxes.get(id).is_some_and(|sandbox| sandbox.held.berth.is_some())
    }

    /// The worker that waits for a sandbox, for it to be started.
    pub(in crate::node) fn take_berth(&mut self, id: &SandboxId) -> Option<(Berth, Token)> {
        self.sandboxes.get_mut(id)?.held.berth.take()
    }

    pub(super) fn end_idle(&mut self, Item { number, thing, .. }: Item<Idle>) {
        self.unwatch(thing.token);
        self.unmake(thing.berth.home, Some((number, thing.uid)), None);
    }

    pub(super) fn tend_workers(&mut self, now: Instant) {
        while let Some((id, place)) = self.pools.workers.next_order() {
            if let Err(error) = self.order_worker(&id, place) {
                self.fail_start(&id, error);
            }
        }
        for id in self.pools.workers.too_late(now) {
            let (key, limits) = if u64::from(self.pools.workers.limits().max) == self.config.jail.uid_count {
                ("jail.uid_count", "uid")
            } else {
                ("worker_pool.max", "worker")
            };
            self.fail_start(&id, exhausted(limits, key, self.pools.workers.limits()));
        }
        // One that is ready bears an id of its own: who waits for a place is better served without it.
        if self.pools.workers.is_waited_for()
            && let Some(item) = self.pools.workers.lost(|_| true)
        {
            self.end_idle(item);
        }
        for item in self.pools.workers.expired(now) {
            self.end_idle(item);
        }
        if now < self.pools.refill || self.stopping.is_some() {
            return;
        }
        self.tend_prepared();
        while let Some(place) = self.pools.workers.wanted(now) {
            let made = match (self.uids.take(), SandboxId::random()) {
                (Some(uid), Ok(id)) => {
                    self.make_worker(Booking { id, place, uid, ordered: false });
                    Ok(())
                }
                (None, _) => Err(io::Error::other("all user ids for workers are taken (jail.uid_count)")),
                (Some(uid), Err(e)) => {
                    self.uids.give_back(uid);
                    Err(e)
                }
            };
            if let Err(e) = made {
                self.pools.workers.failed(place, e.to_string(), now);
            }
        }
    }
}
