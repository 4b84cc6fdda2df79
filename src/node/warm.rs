//! Sandboxes that are started before anybody asks for one: `[[warm]]` of the configuration.
//!
//! Such a sandbox has come as far as its agent's greeting, and stands there: booted, or with the programs of its template's
//! snapshot frozen and its network closed. A request that asks for one like it gives it its owner, name, env and labels, and
//! only then does it learn who it is. Until then it is nobody's: clients do not see it, and the next supervisor discards it,
//! as everything that had not started.

use std::time::{Duration, Instant};

use super::config::Warm as Table;
use super::instance::{Awaited, Route, Sandbox, Waiter};
use super::requests::Job;
use super::supervisor::{Supervisor, Timer, now_ms};
use super::tracing::ADMIT;
use crate::pool::{Item, Pool};
use crate::sandbox::id::SandboxId;
use crate::sandbox::lifecycle::State;
use crate::sandbox::spec::{Defaults, Spec};
use crate::sandbox::trace::Trace;
use crate::wire::{Error, Fields, Message, Request};

/// How often those that wait are asked whether they are there.
const CHECK: Duration = Duration::from_secs(30);
/// Pause between a request and the making of what it took: on a node of one processor it would take its guest's time.
const REFILL: Duration = Duration::from_millis(100);

/// A pool of sandboxes of one shape.
#[derive(Debug)]
pub(super) struct Warm {
    /// What they are like; without a name, env or labels.
    spec: Spec,
    pool: Pool<SandboxId, Ask>,
}

/// A request that waits for one.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Ask {
    key: u64,
    tag: String,
    spec: Spec,
    owner: String,
    progress: bool,
    asked: Instant,
}

/// A sandbox that belongs to a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parked {
    /// Which pool.
    pool: usize,
    /// Its place there.
    place: u32,
    /// It is ready, and not on its way.
    ready: bool,
    /// It was asked whether it is there and has not answered.
    asked: bool,
}

impl Parked {
    /// Whether it is ready, and not on its way.
    pub fn is_ready(self) -> bool {
        self.ready
    }
}

/// All of these pools.
#[derive(Debug, Default)]
pub(super) struct WarmPools {
    pools: Vec<Warm>,
    /// Something happened: `tend_warm` has something to do.
    pub look: bool,
    /// None is made before.
    refill: Option<Instant>,
    /// When those that are ready are checked next.
    check: Option<Instant>,
    /// The earliest look by a timer to come.
    timer: Option<Instant>,
}

impl WarmPools {
    /// As the configuration has them.
    ///
    /// # Errors
    /// The first table that is none, with the reason.
    pub fn new(tables: &[Table], defaults: Defaults) -> Result<Self, String> {
        let pool = |table: &Table| {
            let spec = table.spec(defaults).map_err(|error| format!("warm: {}", error.message))?;
            Ok::<_, String>(Warm { spec, pool: Pool::new(table.limits()) })
        };
        let pools = tables.iter().map(pool).collect::<Result<_, _>>()?;
        Ok(Self { pools, look: true, ..Self::default() })
    }

    /// What `node.info` says of them.
    pub fn rows(&self) -> impl Iterator<Item = Fields> {
        self.pools.iter().map(|warm| {
            let fields = super::pools::fields("warm", &warm.pool.shown());
            let fields = fields.with("template", &warm.spec.template).with("vcpus", warm.spec.vcpus);
            let network = if warm.spec.network.is_some() { "on" } else { "off" };
            fields.with("memory_mib", warm.spec.memory_mib).with("network", network)
        })
    }
}

impl Supervisor {
    /// Gives a client a sandbox that has started already. Gives the spec back where there is none, or none is coming soon
    /// enough.
    pub(super) fn create_warm(
        &mut self,
        key: u64,
        tag: &str,
        spec: Spec,
        owner: &str,
        progress: bool,
    ) -> Result<Option<Spec>, Error> {
        let disk_mib = self.usual_disk_mib(&spec);
        let Some(at) = self.warm.pools.iter().position(|warm| is_like(&warm.spec, &spec, disk_mib)) else {
            return Ok(Some(spec));
        };
        self.check_new(&spec, owner)?;
        let ask = Ask { asked: self.asked(), key, tag: tag.to_string(), spec, owner: owner.to_string(), progress };
        let now = Instant::now();
        (self.warm.refill, self.warm.look) = (Some(now + REFILL), true);
        while let Some(item) = self.warm.pools[at].pool.take(now) {
            if let Some(id) = self.unpark(item) {
                self.hand_out(&id, ask);
                return Ok(None);
            }
        }
        let pool = &mut self.warm.pools[at].pool;
        if pool.limits().wait.is_zero() || pool.limits().min_ready == 0 {
            return Ok(Some(ask.spec));
        }
        pool.wait(ask, now);
        self.add_job(key, tag, Job::Warm);
        Ok(None)
    }

    /// A client waits no longer for one.
    pub(super) fn forget_warm(&mut self, key: u64, tag: &str) {
        self.warm.pools.iter_mut().for_each(|warm| warm.pool.forget_if(|ask| ask.key == key && ask.tag == tag));
    }

    /// Takes a sandbox out of its pool; `None`, and it goes, where it is of no use any more.
    fn unpark(&mut self, item: Item<SandboxId>) -> Option<SandboxId> {
        let id = item.thing;
        let sandbox = self.sandboxes.get_mut(&id)?;
        let lives = sandbox.worker.as_ref().is_some_and(|worker| !worker.dead && worker.agent.is_ready());
        let template = self.catalogue.get(&sandbox.spec.template).ok();
        let same = template.is_some_and(|template| template.manifest.sha256_hex() == sandbox.template_sha256);
        if !lives || !same || sandbox.state != State::Starting {
            self.remove(&id);
            return None;
        }
        if let Some(parked) = sandbox.parked.take() {
            self.warm.pools[parked.pool].pool.freed(parked.place);
        }
        Some(id)
    }

    /// A sandbox that had started becomes a client's.
    fn hand_out(&mut self, id: &SandboxId, ask: Ask) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        sandbox.spec = Spec { disk_mib: sandbox.spec.disk_mib, ..ask.spec };
        (sandbox.owner, sandbox.created_ms) = (ask.owner, now_ms());
        sandbox.begin_ttl(sandbox.created_ms);
        sandbox.trace = Trace::since(ask.asked);
        sandbox.trace.begin_at_once(ADMIT);
        let what = Awaited::Created { progress: ask.progress };
        sandbox.waiters.push(Waiter { client: ask.key, tag: ask.tag.clone(), what });
        self.add_job(ask.key, &ask.tag, Job::Wait(id.clone()));
        self.notify_waiters(id);
        self.agent_ready(id);
    }

    /// The agent of a sandbox greeted. Whether that sandbox is to wait for whoever asks for one.
    pub(super) fn park(&mut self, id: &SandboxId) -> bool {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return false };
        let Some(parked) = sandbox.parked.as_mut().filter(|_| sandbox.state == State::Starting) else { return false };
        let (pool, place) = (parked.pool, parked.place);
        self.warm.look = true;
        if !std::mem::replace(&mut parked.ready, true) {
            let now = Instant::now();
            self.warm.pools[pool].pool.made(Item { number: place, thing: id.clone(), made: now }, now);
        }
        true
    }

    /// A sandbox could not be started, or ended. What that means for its pool.
    pub(super) fn unparked_by_end(&mut self, id: &SandboxId, why: &str) {
        let Some(parked) = self.sandboxes.get_mut(id).and_then(|sandbox| sandbox.parked.take()) else { return };
        self.warm.look = true;
        let pool = &mut self.warm.pools[parked.pool].pool;
        let now = Instant::now();
        if parked.ready {
            pool.lost(|ready| ready == id);
            pool.broke(why.to_string(), now);
            pool.freed(parked.place);
        } else {
            pool.failed(parked.place, why.to_string(), now);
        }
    }

    /// A sandbox that waits was asked whether it is there, and is.
    pub(super) fn parked_answered(&mut self, id: &SandboxId) {
        if let Some(parked) = self.sandboxes.get_mut(id).and_then(|sandbox| sandbox.parked.as_mut()) {
            parked.asked = false;
        }
    }

    /// All that wait for somebody go: the node is drained, or this supervisor ends.
    pub(super) fn empty_warm(&mut self) {
        let parked = self.sandboxes.values_mut().filter(|sandbox| sandbox.parked.is_some());
        let parked: Vec<SandboxId> = parked.map(|sandbox| sandbox.id.clone()).collect();
        for id in parked {
            self.unparked_by_end(&id, "the node takes no new sandboxes");
            self.remove(&id);
        }
        for at in 0..self.warm.pools.len() {
            for ask in self.warm.pools[at].pool.give_up() {
                self.create_plainly(ask);
            }
        }
    }

    /// A look by a timer is due.
    pub(super) fn warm_due(&mut self) {
        self.warm.timer = None;
    }

    /// Makes what is wanted, serves who waits, ends what nobody needs.
    pub(super) fn tend_warm(&mut self) {
        let early = self.warm.timer.is_some_and(|timer| Instant::now() < timer) && !self.warm.look;
        if self.warm.pools.is_empty() || self.listener.is_none() || early {
            return;
        }
        self.warm.look = false;
        let now = Instant::now();
        let open = self.stopping.is_none() && self.drain.is_none();
        for at in 0..self.warm.pools.len() {
            while let Some((ask, item)) = self.warm.pools[at].pool.serve(now) {
                match self.unpark(item) {
                    Some(id) => self.hand_out(&id, ask),
                    None => self.warm.pools[at].pool.wait(ask, now),
                }
            }
            for ask in self.warm.pools[at].pool.too_late(now) {
                self.create_plainly(ask);
            }
            for item in self.warm.pools[at].pool.expired(now) {
                if let Some(parked) = self.sandboxes.get_mut(&item.thing).and_then(|sandbox| sandbox.parked.take()) {
                    self.warm.pools[at].pool.freed(parked.place);
                }
                self.remove(&item.thing);
            }
            let early = self.warm.refill.is_some_and(|refill| now < refill);
            while open
                && !early
                && let Some(place) = self.warm.pools[at].pool.wanted(now)
            {
                self.start_warm(at, place);
            }
        }
        if self.warm.check.is_none_or(|check| check <= now) {
            self.warm.check = Some(now + CHECK);
            self.check_warm();
        }
        let looks = self.warm.pools.iter().filter_map(|warm| warm.pool.next_look());
        let refill = self.warm.refill.filter(|refill| *refill > now);
        let next =
            looks.chain(refill).chain(self.warm.check).min().map(|next| next.max(now + Duration::from_millis(1)));
        if let Some(next) = next {
            self.warm.timer = Some(next);
            self.timers.after(next.saturating_duration_since(now), Timer::Warm);
        }
    }

    /// Begins to start one more.
    fn start_warm(&mut self, at: usize, place: u32) {
        let spec = self.warm.pools[at].spec.clone();
        let origin = self.template_origin(&spec);
        match self.create(spec, String::new(), None, origin.as_ref()) {
            Ok(id) => {
                if let Some(sandbox) = self.sandboxes.get_mut(&id) {
                    sandbox.parked = Some(Parked { pool: at, place, ready: false, asked: false });
                }
            }
            Err(error) => self.warm.pools[at].pool.failed(place, error.message, Instant::now()),
        }
    }

    /// Asks all that are ready whether they are there; those that did not answer the last time go.
    fn check_warm(&mut self) {
        let ready = |sandbox: &&mut Sandbox| sandbox.parked.is_some_and(|parked| parked.ready);
        let mut gone = Vec::new();
        for sandbox in self.sandboxes.values_mut().filter(ready) {
            let (Some(parked), Some(worker)) = (&mut sandbox.parked, &mut sandbox.worker) else { continue };
            if std::mem::replace(&mut parked.asked, true) || worker.dead || !worker.agent.is_ready() {
                gone.push(sandbox.id.clone());
                continue;
            }
            let tag = worker.agent.request(Request::new("", "system.stats"));
            worker.routes.insert(tag, Route::Parked);
            self.touched_sandboxes.insert(sandbox.id.clone());
        }
        for id in gone {
            self.unparked_by_end(&id, "it did not answer");
            self.remove(&id);
        }
    }

    /// A request that waited for one in vain gets a sandbox like any other.
    fn create_plainly(&mut self, ask: Ask) {
        let Ask { key, tag, spec, owner, progress, asked: _ } = ask;
        let waiter = Waiter { client: key, tag: tag.clone(), what: Awaited::Created { progress } };
        let origin = self.template_origin(&spec);
        match self.create_or_boot(spec, owner, waiter, origin.as_ref()) {
            Ok(id) if self.sandboxes.contains_key(&id) => self.add_job(key, &tag, Job::Wait(id)),
            Ok(_) => {}
            Err(error) => self.finish(key, &Message::err(&tag, error)),
        }
    }

    /// The disk of a sandbox that does not say how large it is to be.
    fn usual_disk_mib(&self, spec: &Spec) -> Option<u64> {
        let template = self.catalogue.get(&spec.template).ok()?;
        let base_mib = template.manifest.size_bytes.div_ceil(super::start::MIB);
        Some(base_mib + self.config.sandbox.default_extra_disk_mib)
    }
}

/// Whether a sandbox of that pool can become what is asked for.
fn is_like(pool: &Spec, asked: &Spec, usual_disk_mib: Option<u64>) -> bool {
    let own = Spec { name: None, env: Vec::new(), labels: Vec::new(), restart: pool.restart, ..asked.clone() };
    let disk = |spec: &Spec| spec.disk_mib.or(usual_disk_mib);
    disk(pool) == disk(asked) && Spec { disk_mib: pool.disk_mib, ..own } == *pool
}
