//! What is made before anybody asks for a sandbox: workers in homes of their own, and overlays.
//!
//! A request takes what is ready; what it took is made again afterwards, on threads of its own. A worker's home bears the
//! id of the sandbox that moves in (`sandbox::berth`), so who finds none ready has one made under its own id. An overlay
//! is a file that moves into the home, whoever's that is. Neither is recorded: what a supervisor finds at its start and no
//! sandbox owns is taken down.

mod overlays;
mod prepared;
mod workers;

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mio::Token;
pub(super) use overlays::Shape;
use overlays::{Blank, remove_files};
pub(super) use prepared::PREPARE;
use workers::Idle;

use super::components::Progress;
use super::config::Config;
use super::finish::Extent;
use super::supervisor::{Supervisor, Timer};
use crate::pool::{Item, Limits, Pool, Shown};
use crate::sandbox::berth::Berth;
use crate::sandbox::id::SandboxId;
use crate::wire::{Code, Error, Fields};

/// When the pools are filled first: the start of the node must not wait for that.
const FIRST_FILL: Duration = Duration::from_millis(200);
/// Pause between a request and the making of what it took: on a node of one processor it would take its guest's time.
const REFILL: Duration = Duration::from_millis(100);

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

impl Held {
    /// Name of its overlay, until that has moved into its home.
    pub fn spare_overlay(&self) -> Option<String> {
        self.blank.as_ref()?.thing.name()
    }
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
    /// What workers that wait prepare: the template's snapshot that the last sandbox went on from.
    preferred: Option<String>,
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
            preferred: None,
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
            if !sandbox.home.overlays().is_empty() {
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
        let prepared = self.pools.workers.ready().filter(|idle| idle.prepared.is_some()).count();
        let workers = fields("workers", &self.pools.workers.shown()).with("prepared", prepared);
        let workers = self.pools.idle().fold(workers, |fields, id| fields.with("idle", id));
        let slots = self.network.as_ref().map(|network| fields("slots", &network.pool()));
        let rows = [Some(workers), Some(fields("overlays", &self.pools.overlays.shown())), slots].into_iter().flatten();
        rows.chain(self.warm.rows()).collect()
    }

    /// Something changed that they go by.
    pub(super) fn look_at_pools(&mut self) {
        self.pools.look = true;
    }

    fn refill_later(&mut self) {
        let now = Instant::now();
        if self.pools.refill <= now {
            self.pools.refill = now + REFILL;
        }
        self.pools.look = true;
    }

    pub(super) fn schedule_or_fail(&mut self, id: &SandboxId) {
        if let Err(error) = self.schedule(id) {
            self.fail_start(id, error);
        }
    }

    /// A sandbox that was never recorded is forgotten: what it has goes back, or is taken down.
    pub(super) fn discard(&mut self, id: &SandboxId) {
        self.let_go_of_pools(id);
        let Some(mut sandbox) = self.sandboxes.remove(id) else { return };
        // What it was to go on from it needs no longer.
        self.snapshots.store.release(id.as_str());
        self.collect();
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
        if let Some(place) = sandbox.held.overlay_place.take_if(|_| sandbox.home.overlays().is_empty()) {
            self.pools.overlays.freed(place);
        }
        self.pools.look = true;
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
}
