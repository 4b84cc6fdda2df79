//! What is made before anybody asks for a sandbox: workers in homes of their own, and overlays.
//!
//! A request takes what is ready; what it took is made again afterwards, on threads of its own. A worker's home bears the
//! id of the sandbox that moves in (`sandbox::berth`), so who finds none ready has one made under its own id. An overlay
//! is a file that moves into the home, whoever's that is. Neither is recorded: what a supervisor finds at its start and no
//! sandbox owns is taken down.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::Token;

use super::components::Progress;
use super::config::Config;
use super::finish::Extent;
use super::ledger::Booking;
use super::supervisor::{Done, Source, Supervisor, Timer};
use crate::pool::{Item, Limits, Pool, Shown};
use crate::sandbox::berth::Berth;
use crate::sandbox::death;
use crate::sandbox::home::Home;
use crate::sandbox::id::SandboxId;
use crate::sandbox::ledger::Resource;
use crate::sandbox::limits::Oom;
use crate::sandbox::worker::LastWords;
use crate::storage::overlay;
use crate::wire::{Code, Error, Fields};

/// When the pools are filled first: the start of the node must not wait for that.
const FIRST_FILL: Duration = Duration::from_millis(200);
/// Pause between a request and the making of what it took: on a node of one processor it would take its guest's time.
const REFILL: Duration = Duration::from_millis(100);

/// A worker that waits for a sandbox.
#[derive(Debug)]
pub(super) struct Idle {
    /// The id that the sandbox will have.
    pub id: SandboxId,
    /// Its home.
    pub berth: Berth,
    /// The user id that it runs by.
    pub uid: u32,
    /// Its process as an event source.
    pub token: Token,
}

/// What an overlay is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    /// Size of the disk, in octets.
    pub disk_bytes: u64,
    /// Size of the image below, in octets.
    pub base_bytes: u64,
    /// Digest of that image.
    pub base_sha256: [u8; 32],
}

impl Shape {
    fn write(&self, file: &File) -> io::Result<()> {
        let made = overlay::create(file, self.disk_bytes, self.base_bytes, self.base_sha256);
        made.map_err(|e| io::Error::other(e.to_string()))
    }
}

/// An overlay that waits for a sandbox.
#[derive(Debug)]
pub(super) struct Blank {
    path: PathBuf,
    file: File,
    shape: Shape,
}

impl Blank {
    fn name(&self) -> Option<String> {
        Some(self.path.file_name()?.to_str()?.to_string())
    }
}

impl Held {
    /// Name of its overlay, until that has moved into its home.
    pub fn spare_overlay(&self) -> Option<String> {
        self.blank.as_ref()?.thing.name()
    }
}

/// What a sandbox has of the pools.
#[derive(Debug, Default)]
pub(super) struct Held {
    /// Its place among workers, until all of its worker is taken down.
    place: Option<u32>,
    /// The worker that waits for it, until it is started.
    berth: Option<(Berth, Token)>,
    /// A thread makes its worker.
    making: bool,
    /// What is to be taken down when that thread is done.
    after: Option<Extent>,
    /// Its place among overlays, for as long as there is one of it.
    overlay_place: Option<u32>,
    /// Its overlay, until that has moved into its home.
    blank: Option<Item<Blank>>,
    /// It waits for an overlay.
    asked: bool,
}

/// Both pools.
#[derive(Debug)]
pub(super) struct Pools {
    workers: Pool<Idle, SandboxId>,
    overlays: Pool<Blank, SandboxId>,
    /// Of overlays without a sandbox.
    directory: PathBuf,
    /// What overlays are made for: the last that was asked for.
    shape: Option<Shape>,
    /// Nothing is made to be ready before.
    refill: Instant,
    /// Looks by timers to come. Each was the earliest when it was added, so there are few.
    timers: Vec<Instant>,
    /// Something happened: `tend_pools` has something to do.
    look: bool,
    /// Homes that threads make or take down.
    under_way: usize,
}

impl Pools {
    /// Empty ones.
    pub fn new(config: &Config) -> Self {
        let workers = config.worker_pool.limits();
        // Each has a user id.
        let users = u32::try_from(config.jail.uid_count).unwrap_or(u32::MAX);
        Self {
            workers: Pool::new(Limits { max: workers.max.min(users), ..workers }),
            overlays: Pool::new(config.overlay_pool.limits()),
            directory: config.paths.data.join("overlays"),
            shape: None,
            refill: Instant::now() + FIRST_FILL,
            timers: Vec::new(),
            look: true,
            under_way: 0,
        }
    }

    /// Ids of the homes that have a worker and no sandbox yet.
    pub fn idle(&self) -> impl Iterator<Item = &SandboxId> {
        self.workers.ready().map(|idle| &idle.id)
    }

    /// Where overlays without a sandbox are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Names of the overlays that are ready.
    pub fn spare_overlays(&self) -> impl Iterator<Item = String> {
        self.overlays.ready().filter_map(Blank::name)
    }

    /// Whether homes are being made or taken down.
    pub fn are_busy(&self) -> bool {
        self.under_way > 0
    }
}

fn exhausted(what: &str, key: &str, Limits { max, wait, .. }: Limits) -> Error {
    let message = format!("all {max} {what}s are in use, and none came free within {} ms ({key})", wait.as_millis());
    Error::new(Code::NoCapacity, message).with("resource", what).with("max", max)
}

/// What a pool is like, for people and programs.
pub(super) fn fields(name: &str, pool: &Shown) -> Fields {
    let counters = &pool.counters;
    let fields = Fields::new()
        .with("pool", name)
        .with("ready", pool.ready)
        .with("making", pool.making)
        .with("in_use", pool.in_use)
        .with("waiting", pool.waiting)
        .with("made", counters.made)
        .with("hits", counters.hits)
        .with("misses", counters.misses)
        .with("waited", counters.waited)
        .with("late", counters.late)
        .with("expired", counters.expired)
        .with("failed", counters.failed);
    match &pool.problem {
        Some(problem) => fields.with("problem", problem),
        None => fields,
    }
}

impl Supervisor {
    /// Takes into account what is there already, and takes down overlays of an earlier supervisor.
    pub(super) fn start_pools(&mut self) {
        for sandbox in self.sandboxes.values_mut() {
            if sandbox.worker.is_some() {
                sandbox.held.place = Some(self.pools.workers.adopt_any());
            }
            if sandbox.home.overlay().exists() {
                sandbox.held.overlay_place = Some(self.pools.overlays.adopt_any());
            }
        }
        let directory = self.pools.directory.clone();
        if let Err(e) = DirBuilder::new().recursive(true).mode(0o700).create(&directory) {
            log::error!("{}: {e}", directory.display());
        }
        let left: Vec<PathBuf> = fs::read_dir(&directory).into_iter().flatten().flatten().map(|e| e.path()).collect();
        remove_files(left);
    }

    /// What `node.info` says of the pools.
    pub(super) fn pool_rows(&self) -> Vec<Fields> {
        let workers = fields("workers", &self.pools.workers.shown());
        let workers = self.pools.idle().fold(workers, |fields, id| fields.with("idle", id));
        let slots = self.network.as_ref().map(|network| fields("slots", &network.pool()));
        [Some(workers), Some(fields("overlays", &self.pools.overlays.shown())), slots].into_iter().flatten().collect()
    }

    /// A worker that is ready, and lives.
    pub(super) fn take_idle(&mut self) -> Option<Item<Idle>> {
        while let Some(dead) = self.pools.workers.lost(|idle| !idle.berth.is_alive()) {
            self.idle_broke(dead);
        }
        self.refill_later();
        self.pools.workers.take(Instant::now())
    }

    fn refill_later(&mut self) {
        let now = Instant::now();
        if self.pools.refill <= now {
            self.pools.refill = now + REFILL;
        }
        self.pools.look = true;
    }

    /// Gives a new sandbox the worker that was taken for it, or sees to it that it gets one.
    pub(super) fn settle_worker(&mut self, id: &SandboxId, taken: Option<Item<Idle>>) -> Result<(), Error> {
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
    pub(super) fn begin_worker(&self, Booking { id, place, uid, ordered }: Booking) -> io::Result<()> {
        let (home, spawner) = (self.places.of(&id), Arc::clone(&self.spawner));
        self.background.run("worker", move || {
            let result = Berth::make(home, uid, &spawner).map(Box::new);
            Done::WorkerMade { id, place, uid, ordered, result }
        })
    }

    /// A thread made a worker, or could not.
    pub(super) fn worker_made(
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
        let made = result.and_then(|berth| {
            let token = self.watch(berth.pidfd.as_raw_fd(), Source::WorkerProcess(id.clone()));
            token.map(|token| (*berth, token))
        });
        match made {
            Ok((berth, token)) if !ordered => {
                let thing = Idle { id: id.clone(), berth, uid, token };
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
                self.fail_start(id, Error::new(Code::NoCapacity, format!("worker cannot be started: {e}")));
            }
        }
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

    pub(super) fn schedule_or_fail(&mut self, id: &SandboxId) {
        if let Err(error) = self.schedule(id) {
            self.fail_start(id, error);
        }
    }

    /// A worker has ended before its sandbox was started, or before it had one.
    pub(super) fn waiting_worker_ended(&mut self, id: &SandboxId) {
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
        let Idle { id, berth, uid, token } = thing;
        self.unwatch(token);
        let cause = death::reason(LastWords::read(&berth.home.last_words()).as_ref(), None, Oom::None, b"");
        let what = format!("worker {} of no sandbox yet ({id}) ended: {cause}", berth.pid);
        log::warn!("{what}");
        self.pools.workers.broke(what, Instant::now());
        self.unmake(berth.home, Some((number, uid)), None);
    }

    /// Takes a home down that no sandbox has, or has any more; then its places are free.
    fn unmake(&mut self, home: Home, worker: Option<(u32, u32)>, overlay_place: Option<u32>) {
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
    pub(super) fn unmade(
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
    pub(super) fn has_worker(&self, id: &SandboxId) -> bool {
        self.sandboxes.get(id).is_some_and(|sandbox| sandbox.held.berth.is_some())
    }

    /// Sees to it that a sandbox has an overlay. `false` when that is still to come.
    pub(super) fn has_overlay(&mut self, id: &SandboxId, shape: Shape) -> bool {
        let now = Instant::now();
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return false };
        if sandbox.held.blank.is_some() || sandbox.restarting {
            return true;
        }
        if std::mem::replace(&mut sandbox.held.asked, true) {
            return false;
        }
        self.pools.shape = Some(shape);
        let taken = self.pools.overlays.take(now);
        match &taken {
            Some(item) => {
                sandbox.held.asked = false;
                sandbox.held.overlay_place = Some(item.number);
            }
            None => self.pools.overlays.wait(id.clone(), now),
        }
        let has = taken.is_some();
        sandbox.held.blank = taken;
        self.refill_later();
        has
    }

    /// The worker that waits for a sandbox, for it to be started.
    pub(super) fn take_berth(&mut self, id: &SandboxId) -> Option<(Berth, Token)> {
        self.sandboxes.get_mut(id)?.held.berth.take()
    }

    /// Moves a sandbox's overlay into its home. One that is started again has it there.
    pub(super) fn take_blank(&mut self, id: &SandboxId, shape: Shape) -> io::Result<File> {
        let sandbox = self.sandboxes.get_mut(id).ok_or(io::ErrorKind::NotFound)?;
        if sandbox.restarting {
            return OpenOptions::new().read(true).write(true).open(sandbox.home.overlay());
        }
        let Item { thing: Blank { path, file, shape: made_for }, .. } =
            sandbox.held.blank.take().ok_or(io::ErrorKind::NotFound)?;
        let ready = if made_for == shape { Ok(()) } else { shape.write(&file) };
        let moved = ready.and_then(|()| sandbox.home.take_overlay(&path));
        if moved.is_err() {
            remove_files(vec![path]);
        }
        moved.map(|()| file)
    }

    /// A thread made an overlay, or could not.
    pub(super) fn overlay_made(&mut self, place: u32, path: PathBuf, shape: Shape, result: io::Result<File>) {
        self.pools.look = true;
        let now = Instant::now();
        match result {
            Ok(file) => {
                let item = Item { number: place, thing: Blank { path, file, shape }, made: now };
                self.pools.overlays.made(item, now);
                if self.stopping.is_some() {
                    self.drain_pools();
                }
            }
            Err(e) => self.no_overlay(place, &e),
        }
    }

    fn no_overlay(&mut self, place: u32, error: &io::Error) {
        log::error!("an overlay cannot be made: {error}");
        self.pools.overlays.failed(place, error.to_string(), Instant::now());
        for id in self.pools.overlays.give_up() {
            self.fail_start(&id, Error::new(Code::NoCapacity, format!("overlay: {error}")));
        }
    }

    /// A sandbox that was never recorded is forgotten: what it has goes back, or is taken down.
    pub(super) fn discard(&mut self, id: &SandboxId) {
        self.let_go_of_pools(id);
        let Some(mut sandbox) = self.sandboxes.remove(id) else { return };
        if let (true, Some(network)) = (sandbox.holds_slot, &self.network) {
            sandbox.tap = None;
            network.release(id.as_str());
        }
        // What a thread makes is taken down when it is there: nobody waits for it then.
        if !sandbox.held.making && sandbox.home.is_there() {
            let worker = sandbox.held.place.zip(sandbox.uid);
            self.unmake(sandbox.home, worker, sandbox.held.overlay_place);
        }
    }

    /// Whether a sandbox that is to be taken down must wait for a thread that makes its worker; then that goes on.
    pub(super) fn waits_for_its_worker(&mut self, id: &SandboxId, extent: Extent) -> bool {
        self.let_go_of_pools(id);
        let Some(sandbox) = self.sandboxes.get_mut(id).filter(|sandbox| sandbox.held.making) else { return false };
        sandbox.held.after = Some(extent);
        true
    }

    /// Nothing is kept ready for a sandbox any more.
    fn let_go_of_pools(&mut self, id: &SandboxId) {
        self.pools.workers.forget(id);
        self.pools.overlays.forget(id);
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let (berth, blank) = (sandbox.held.berth.take(), sandbox.held.blank.take());
        if let Some(item) = blank {
            sandbox.held.overlay_place = None;
            if let Some(old) = self.pools.overlays.put_back(item, Instant::now()) {
                self.drop_blank(old);
            }
        }
        if let Some((_, token)) = berth {
            self.unwatch(token);
        }
        self.pools.look = true;
    }

    /// Places of a sandbox whose worker or overlay is taken down are free.
    pub(super) fn give_back(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        // The cgroup is empty, so nothing runs by its user id any more.
        if let Some(uid) = sandbox.uid.take() {
            self.uids.give_back(uid);
        }
        if let Some(place) = sandbox.held.place.take() {
            self.pools.workers.freed(place);
        }
        if let Some(place) = sandbox.held.overlay_place.take_if(|_| !sandbox.home.overlay().exists()) {
            self.pools.overlays.freed(place);
        }
        self.pools.look = true;
    }

    fn drop_blank(&mut self, Item { number, thing, .. }: Item<Blank>) {
        remove_files(vec![thing.path]);
        self.pools.overlays.freed(number);
    }

    /// Ends what is ready: the node is stopping.
    pub(super) fn drain_pools(&mut self) {
        for item in self.pools.workers.drain() {
            self.end_idle(item);
        }
        for item in self.pools.overlays.drain() {
            self.drop_blank(item);
        }
    }

    /// What waits for nobody is taken down, and what was begun has ended.
    pub(super) fn stop_pools(&mut self) -> Result<Progress, String> {
        self.drain_pools();
        let busy = self.pools.are_busy();
        Ok(if busy { Progress::Waits("homes that are made or taken down".to_string()) } else { Progress::Done })
    }

    fn end_idle(&mut self, Item { number, thing, .. }: Item<Idle>) {
        self.unwatch(thing.token);
        self.unmake(thing.berth.home, Some((number, thing.uid)), None);
    }

    /// A look by the timer is due.
    pub(super) fn pools_due(&mut self) {
        let now = Instant::now();
        self.pools.timers.retain(|timer| *timer > now);
        self.pools.look = true;
    }

    /// Serves who waits, makes what is wanted, destroys what nobody needs.
    pub(super) fn tend_pools(&mut self) {
        while std::mem::take(&mut self.pools.look) {
            let now = Instant::now();
            self.tend_workers(now);
            self.tend_overlays(now);
            let refill = Some(self.pools.refill).filter(|refill| *refill > now);
            let next = [self.pools.workers.next_look(), self.pools.overlays.next_look(), refill];
            let Some(next) = next.into_iter().flatten().min() else { continue };
            if self.pools.timers.iter().all(|timer| next < *timer) {
                self.pools.timers.push(next);
                self.timers.after(next.saturating_duration_since(now), Timer::Pools);
            }
        }
    }

    fn tend_workers(&mut self, now: Instant) {
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

    fn tend_overlays(&mut self, now: Instant) {
        while let Some((id, item)) = self.pools.overlays.serve(now) {
            let Some(sandbox) = self.sandboxes.get_mut(&id) else {
                self.pools.overlays.put_back(item, now);
                continue;
            };
            sandbox.held.overlay_place = Some(item.number);
            sandbox.held.blank = Some(item);
            self.schedule_or_fail(&id);
        }
        for id in self.pools.overlays.too_late(now) {
            self.fail_start(&id, exhausted("overlay", "overlay_pool.max", self.pools.overlays.limits()));
        }
        for item in self.pools.overlays.expired(now) {
            self.drop_blank(item);
        }
        let early = now < self.pools.refill && !self.pools.overlays.is_waited_for();
        let Some(shape) = self.pools.shape.or_else(|| self.usual_shape()) else { return };
        if early || self.stopping.is_some() {
            return;
        }
        while let Some(place) = self.pools.overlays.wanted(now) {
            if let Err(e) = self.make_overlay(place, shape) {
                self.no_overlay(place, &e);
            }
        }
    }

    /// What a sandbox of which nothing is said has.
    fn usual_shape(&self) -> Option<Shape> {
        let manifest = &self.catalogue.get("base").ok()?.manifest;
        let extra = self.config.sandbox.default_extra_disk_mib;
        let disk_bytes = (manifest.size_bytes.div_ceil(super::start::MIB) + extra) * super::start::MIB;
        Some(Shape { disk_bytes, base_bytes: manifest.size_bytes, base_sha256: manifest.sha256 })
    }

    fn make_overlay(&self, place: u32, shape: Shape) -> io::Result<()> {
        let path = self.pools.directory.join(SandboxId::random()?.as_str());
        self.background.run("overlay", move || {
            let result = new_overlay(&path, &shape);
            Done::OverlayMade { place, path, shape, result }
        })
    }
}

fn new_overlay(path: &Path, shape: &Shape) -> io::Result<File> {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true).mode(0o600).open(path)?;
    if let Err(e) = shape.write(&file) {
        let _ = fs::remove_file(path);
        return Err(e);
    }
    Ok(file)
}

/// Removes files on a thread of its own: a large one takes its time.
fn remove_files(files: Vec<PathBuf>) {
    if files.is_empty() {
        return;
    }
    let body = move || {
        for file in files {
            if let Err(e) = fs::remove_file(&file) {
                log::error!("{}: {e}", file.display());
            }
        }
    };
    if let Err(e) = std::thread::Builder::new().name("overlays".to_string()).stack_size(64 * 1024).spawn(body) {
        // The next supervisor removes them.
        log::warn!("no thread to remove overlays: {e}");
    }
}
