//! The supervisor: one loop that owns all of the node's state. It never blocks on a client, a worker, a guest or
//! a disk: what may block is a background thread's, and every queue has a bound.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mio::event::{Event, Source as _};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use nix::sys::signalfd::SignalFd;

use super::assembly::{Parts, watch_signals};
use super::background::Background;
use super::backup::Backups;
use super::build::Build;
use super::catalogue::Catalogue;
use super::checkpoint::{Held, Written};
use super::config::Config;
use super::drain::Drain;
use super::events::EventLog;
use super::exchange::Arrived;
use super::externals::{External, Externals};
use super::health::{Watched, Wheel};
use super::instance::Sandbox;
use super::ledger::Ledger;
use super::listener::Listener;
use super::meeting::Meeting;
use super::network::NetworkChange;
use super::packages::Packages;
use super::pools::{Pools, Shape};
use super::requests::Job;
use super::snapshots::{RETENTION, Snapshots};
use super::templates::Changed;
use super::timers::Timers;
use super::tracing::FailedCreate;
use super::warm::WarmPools;
use crate::control::client::Client;
use crate::init::{ExitWatch, StopMode};
use crate::network::{Network, Report, Settings};
use crate::sandbox::berth::Berth;
use crate::sandbox::census::Census;
use crate::sandbox::home::Places;
use crate::sandbox::id::SandboxId;
use crate::sandbox::spawn::Spawner;
use crate::sandbox::trace::Trace;
use crate::sandbox::uids::Uids;
use crate::sentinel;
use crate::storage::backup::Contents;
use crate::storage::snapshots::files::Listed;
use crate::storage::state::{Snapshot, State as Database, StateError};
use crate::storage::template_disk::TemplateEvent;
use crate::storage::templates::{Template, TemplateError};
use crate::storage::verity::{Digest, SealError};
use crate::wire::{Error, Fields};

/// What an event comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Source {
    Listener,
    Signals,
    Waker,
    Init,
    Client(u64),
    WorkerProcess(SandboxId),
    WorkerLink(SandboxId),
    Agent(SandboxId),
}

/// What is due later.
#[derive(Debug)]
pub(super) enum Timer {
    /// The agent must have answered by now; the worker's pid.
    Boot(SandboxId, i32),
    /// The guest must have shut down by now.
    Stop(SandboxId),
    /// A removed sandbox's worker must have told by now what it was asked.
    Kill(SandboxId),
    /// Init must have told by now how a worker ended.
    Obituary(SandboxId),
    /// A worker whose agent link broke: link it again.
    Relink(SandboxId),
    /// The agent must have frozen the guest's programs by now.
    Freeze(SandboxId),
    /// A worker must have written by now what a pause or a snapshot needs, which began then.
    Capture(SandboxId, Instant),
    /// What did not work of a snapshot is tried again.
    Snapshot(String),
    /// A merge of layers that failed is tried again.
    Merge,
    /// Memory that could not be made whole is tried again.
    Flatten,
    /// An hour is over: snapshots may be too old.
    Retention,
    /// A minute is over: records of executions may be too old.
    History,
    /// The worker must have answered a client's request by now.
    Inquiry { sandbox: SandboxId, route: String },
    /// The node has started: time to hash its own templates.
    Verify,
    /// A second is over for what a sandbox's programs log.
    GuestLog(SandboxId),
    /// Followed logs may have grown.
    Logs,
    /// The control port was not there: look again.
    Port,
    /// Agents of sandboxes that ran on have had their time.
    Meeting,
    /// A difference was found in the ledger: look again.
    Look,
    /// The database refused to write: put the rows again that are not in it.
    Record,
    /// A sandbox's time may be over; when this was to be looked at, in Unix milliseconds.
    TimeLimit(SandboxId, u64),
    /// Sandboxes have had their time to end.
    Drain,
    /// Externals are looked at.
    Externals,
    /// The same, while somebody waits for what is to be sent to them.
    FlushExternals,
    /// A second is over for agents that are looked after.
    Probe,
    /// A sandbox that failed is started again.
    Restart(SandboxId),
    /// The pools have something to do.
    Pools,
    /// The pools of sandboxes that have started have something to do.
    Warm,
}

/// What a background thread has done.
#[derive(Debug)]
pub(super) enum Done {
    /// Things of a sandbox were taken down; `gone` when all of them.
    Released { sandbox: SandboxId, gone: bool, result: io::Result<()> },
    /// A template's image was hashed.
    Verified { template: String, result: Result<(), TemplateError> },
    /// The template disks were looked at; one event a template.
    Imported(Vec<TemplateEvent>),
    /// What an earlier supervisor left over was taken down, or could not be.
    Swept {
        /// What became of each.
        homes: Vec<(Option<SandboxId>, io::Result<()>)>,
        /// User ids that are free again.
        users: Vec<u32>,
    },
    /// There is something for a client, or what it sent was taken.
    Moved(u64),
    /// A database that is to be restored was gathered and checked.
    Restored { client: u64, tag: String, result: Result<Contents, StateError> },
    /// A worker wrote the files of a pause, or could not.
    Captured { sandbox: SandboxId, result: Result<Fields, Error> },
    /// The memory that a sandbox is paused as is whole, or cannot be made so.
    PauseSettled { sandbox: SandboxId, result: Result<(), Error> },
    /// A worker took its machine for a snapshot, or did not.
    SnapshotHeld { snapshot: String, held: Held },
    /// The files of a snapshot are written, or not.
    SnapshotWritten { snapshot: String, written: Written },
    /// The overlay of a rollback was made, or not.
    RollbackPrepared { sandbox: SandboxId, snapshot: String, overlay: String, result: io::Result<()> },
    /// The memory file of a snapshot was sealed, or could not be.
    Sealed { snapshot: String, result: Result<Digest, SealError> },
    /// Layers were merged to one that takes so much room, or could not be.
    Merged(io::Result<u64>),
    /// The memory of a snapshot is whole, its files taking so much room, or cannot be made so.
    Flattened { snapshot: String, result: Result<u64, Error> },
    /// Files of snapshots that nobody needs were removed, but for these.
    Cleared(Vec<io::Error>),
    /// A worker was asked what its guest has changed so far.
    Learned,
    /// A snapshot that a client sends is there, or is none.
    SnapshotImported { client: u64, tag: String, snapshot: String, result: Result<Arrived, Error> },
    /// The image of a template that is built was made, or not.
    TemplateMade { build: SandboxId, client: u64, tag: String, result: Result<Template, Error> },
    /// A template that was built has its name, or not.
    TemplatePublished { build: SandboxId, client: u64, tag: String, result: Result<Template, Error> },
    /// Something was done to a template that is there, or not.
    TemplateChanged { client: u64, tag: String, result: Result<Changed, Error> },
    /// A template that a client sends is there, or is none.
    TemplateArrived { client: u64, tag: String, result: Result<Template, Error> },
    /// A request waits for packages that have to be installed.
    Installing { client: u64, tag: String },
    /// The packages of a request are in its sandbox, or cannot be.
    Packages { ticket: u64, result: Result<(), Error> },
    /// What a resumed sandbox was paused as is out of the way, or cannot be.
    Unpaused { sandbox: SandboxId, result: io::Result<()> },
    /// The kernel was asked what there is of sandboxes, and of snapshots.
    Counted(Census, io::Result<Listed>),
    /// The network did something.
    Network(Report),
    /// The sentinel was asked for its destinations.
    Externals(io::Result<Vec<External>>),
    /// A home was made and its worker started.
    WorkerMade {
        id: SandboxId,
        place: u32,
        uid: u32,
        /// For the sandbox of that id.
        ordered: bool,
        result: io::Result<Box<Berth>>,
    },
    /// An overlay was made.
    OverlayMade { place: u32, path: PathBuf, shape: Shape, result: io::Result<File> },
    /// A home that no sandbox has any more was taken down.
    Unmade {
        /// Which it was for.
        id: Option<SandboxId>,
        /// Its worker's place and user id.
        worker: Option<(u32, u32)>,
        overlay_place: Option<u32>,
        result: io::Result<()>,
    },
}

/// A supervisor of one node.
pub struct Supervisor {
    pub(super) config: Config,
    pub(super) poll: Poll,
    pub(super) sources: HashMap<Token, Source>,
    next_token: usize,
    /// Sources whose turn was cut short, to go on with at once.
    pub(super) again: BTreeSet<Token>,
    pub(super) clients: BTreeMap<u64, Client<Job>>,
    pub(super) client_tokens: HashMap<u64, Token>,
    pub(super) next_client: u64,
    /// Clients that may have something to be sent.
    pub(super) touched_clients: BTreeSet<u64>,
    /// Sandboxes whose links may have something to be sent.
    pub(super) touched_sandboxes: BTreeSet<SandboxId>,
    /// Agents that are not read until a client has taken its answers.
    pub(super) held: BTreeSet<(u64, Token)>,
    pub(super) sandboxes: BTreeMap<SandboxId, Sandbox>,
    pub(super) catalogue: Catalogue,
    /// Templates that are being built, by their first builders.
    pub(super) builds: BTreeMap<SandboxId, Build>,
    /// Packages of code runs.
    pub(super) packages: Packages,
    pub(super) timers: Timers<Timer>,
    pub(super) background: Background<Done>,
    pub(super) database: Database,
    pub(super) init: Option<ExitWatch>,
    pub(super) spawner: Arc<Spawner>,
    pub(super) pools: Pools,
    /// User ids of workers.
    pub(super) uids: Uids,
    /// What sandboxes hold.
    pub(super) ledger: Ledger,
    /// Copies of the database under way.
    pub(super) backups: Backups,
    pub(super) places: Places,
    pub(super) snapshots: Snapshots,
    /// Sandboxes that were started before anybody asked.
    pub(super) warm: WarmPools,
    /// The network's thread, once it runs.
    pub(super) network: Option<Network>,
    pub(super) network_settings: Settings,
    /// Changes of sandboxes' networks under way, by their tickets.
    pub(super) network_changes: HashMap<u64, NetworkChange>,
    /// The last ticket that was given out.
    pub(super) last_ticket: u64,
    pub(super) node_id: String,
    /// Number of the next row of the audit log.
    pub(super) next_audit: u64,
    /// Number of the next record of the history.
    pub(super) next_record: u64,
    /// When the request that is being taken came.
    pub(super) taken: Option<Instant>,
    /// The trace of a request that has waited and goes on now.
    pub(super) went_on: Option<Trace>,
    /// Creates that failed, the newest first.
    pub(super) failed_creates: VecDeque<FailedCreate>,
    /// What happened last.
    pub(super) events: EventLog,
    pub(super) started: SystemTime,
    pub(super) log_timer: bool,
    /// How often the control port was looked for in vain.
    pub(super) port_looks: u32,
    /// A row could not be written; a timer to put all of them again runs.
    pub(super) unrecorded: bool,
    /// The node is stopping; the clients that asked for it.
    pub(super) stopping: Option<Stopping>,
    /// The node takes no new sandboxes.
    pub(super) drain: Option<Drain>,
    pub(super) externals: Externals,
    /// Sandboxes whose agents are looked after, by when.
    pub(super) probes: Wheel<Watched>,
    /// The control socket, while clients are taken.
    pub(super) listener: Option<Listener>,
    pub(super) meeting: Meeting,
    signals: SignalFd,
}

/// A stop of this process under way.
#[derive(Debug, Default)]
pub(super) struct Stopping {
    /// Sandboxes run on: another supervisor takes them over.
    pub hands_over: bool,
    /// What init is asked to do in the end; `None`: just end this process.
    pub mode: Option<StopMode>,
    /// Requests to answer when all sandboxes have ended.
    pub waiters: Vec<(u64, String)>,
}

impl Supervisor {
    /// A supervisor of the parts that have started.
    pub(super) fn of(parts: &mut Parts) -> Result<Self, String> {
        let missing = |what: &str| format!("{what} did not start");
        let (poll, waker) = parts.events.take().ok_or_else(|| missing("events"))?;
        let signals = parts.signals.take().ok_or_else(|| missing("signals"))?;
        let places = parts.places.take().ok_or_else(|| missing("directories"))?;
        let database = parts.database.take().ok_or_else(|| missing("database"))?;
        let spawner = Arc::new(parts.spawner.take().ok_or_else(|| missing("namespaces"))?);
        let (config, mut init, snapshot) = (std::mem::take(&mut parts.config), parts.init.take(), &parts.snapshot);
        let network_settings =
            config.network.settings(&config.paths.run).map_err(|(key, message)| format!("{key}: {message}"))?;

        let mut sources = HashMap::from([(Token(0), Source::Waker), (Token(1), Source::Signals)]);
        watch_signals(&poll, &signals).map_err(|e| format!("signals: {e}"))?;
        if let Some(init) = &mut init {
            init.register(poll.registry(), Token(3)).map_err(|e| format!("link to init: {e}"))?;
            sources.insert(Token(3), Source::Init);
        }
        let sentinel = config.sentinel.as_ref();
        let externals = Externals::new(sentinel.map(|sentinel| sentinel.paths.data.join(sentinel::SOCKET)));
        let health = &config.health;
        let probes = Wheel::new(health.probe_interval_s.max(health.probe_timeout_s));
        let catalogue = Catalogue::load(&config.paths.share, &config.paths.data);
        Ok(Self {
            poll,
            sources,
            next_token: 16,
            again: BTreeSet::new(),
            clients: BTreeMap::new(),
            client_tokens: HashMap::new(),
            next_client: 1,
            touched_clients: BTreeSet::new(),
            touched_sandboxes: BTreeSet::new(),
            held: BTreeSet::new(),
            sandboxes: BTreeMap::new(),
            catalogue,
            builds: BTreeMap::new(),
            packages: Packages::new(&config),
            timers: Timers::default(),
            background: Background::new(waker),
            database,
            init,
            spawner,
            pools: Pools::new(&config),
            uids: Uids::new(config.jail.uids()),
            ledger: Ledger::default(),
            backups: Backups::default(),
            snapshots: Snapshots::new(&places),
            warm: WarmPools::new(&config.warm, config.sandbox.defaults())?,
            places,
            network: None,
            network_settings,
            network_changes: HashMap::new(),
            last_ticket: 0,
            node_id: snapshot.node_id.clone(),
            next_audit: snapshot.next_audit,
            next_record: snapshot.next_record,
            taken: None,
            went_on: None,
            failed_creates: VecDeque::new(),
            events: EventLog::new(snapshot.events.clone()),
            started: SystemTime::now(),
            log_timer: false,
            port_looks: 0,
            unrecorded: false,
            stopping: None,
            drain: None,
            externals,
            probes,
            listener: None,
            meeting: Meeting::default(),
            signals,
            config,
        })
    }

    pub(super) fn take_up(&mut self, snapshot: &Snapshot) {
        self.sweep_packages();
        let fresh_boot = super::adopt::mark_boot(&self.config.paths.run);
        let sandboxes = self.recover_snapshots(snapshot);
        self.timers.after(RETENTION, Timer::Retention);
        self.adopt(snapshot, &sandboxes, fresh_boot);
        self.history_due();
    }

    pub(super) fn import_templates(&mut self) {
        let directory = self.config.paths.data.join("templates");
        let reserved = self.catalogue.built_in();
        let started =
            self.background.run("templates", move || Done::Imported(super::catalogue::import(directory, reserved)));
        if let Err(e) = started {
            log::error!("template disks cannot be looked at: {e}");
        } else {
            self.catalogue.importing = true;
        }
    }

    /// One turn of the loop: waits until there is something to do, no longer than `patience`, and does it.
    pub(super) fn turn(&mut self, events: &mut Events, patience: Option<Duration>) -> io::Result<()> {
        let sleep = if self.again.is_empty() { self.timers.sleep() } else { Some(Duration::ZERO) };
        let sleep = [sleep, patience].into_iter().flatten().min();
        match self.poll.poll(events, sleep) {
            Err(e) if e.kind() != io::ErrorKind::Interrupted => return Err(e),
            _ => {}
        }
        let again = std::mem::take(&mut self.again);
        for token in again {
            self.serve(token);
        }
        for event in events.iter() {
            self.dispatch(event);
        }
        while let Some(timer) = self.timers.due() {
            self.expire(timer);
        }
        self.tend_pools();
        self.tend_warm();
        self.tend_drain();
        self.settle();
        Ok(())
    }

    fn dispatch(&mut self, event: &Event) {
        match self.sources.get(&event.token()) {
            Some(Source::Client(key)) if event.is_writable() => {
                self.touched_clients.insert(*key);
            }
            Some(Source::WorkerLink(id) | Source::Agent(id)) if event.is_writable() => {
                self.touched_sandboxes.insert(id.clone());
            }
            _ => {}
        }
        self.serve(event.token());
        // The client's own end is closed both ways: there is nobody to answer.
        if let Some(Source::Client(key)) = self.sources.get(&event.token()).cloned()
            && event.is_write_closed()
            && self.clients.get_mut(&key).is_some_and(|client| client.as_port().is_none())
        {
            self.drop_client(key);
        }
    }

    fn serve(&mut self, token: Token) {
        let Some(source) = self.sources.get(&token).cloned() else { return };
        match source {
            Source::Listener => self.accept(),
            Source::Signals => self.take_signals(),
            Source::Waker => self.take_results(),
            Source::Init => self.take_exits(),
            Source::Client(key) => self.read_client(key, token),
            Source::WorkerProcess(id) => self.worker_ended(&id),
            Source::WorkerLink(id) => self.read_worker(&id, token),
            Source::Agent(id) => self.read_agent(&id, token),
        }
    }

    /// Registers a descriptor, edge-triggered, both ways.
    pub(super) fn watch(&mut self, descriptor: RawFd, source: Source) -> io::Result<Token> {
        let token = Token(self.next_token);
        self.next_token += 1;
        let interest = match source {
            Source::WorkerProcess(_) => Interest::READABLE,
            _ => Interest::READABLE | Interest::WRITABLE,
        };
        SourceFd(&descriptor).register(self.poll.registry(), token, interest)?;
        self.sources.insert(token, source);
        Ok(token)
    }

    /// Forgets an event source. Closing the descriptor takes it out of the poll.
    pub(super) fn unwatch(&mut self, token: Token) {
        self.sources.remove(&token);
        self.again.remove(&token);
        self.held.retain(|(_, held)| *held != token);
    }

    fn take_signals(&mut self) {
        while let Ok(Some(signal)) = self.signals.read_signal() {
            // Only init says that the node stops. Whoever else ends a supervisor wants another in its place.
            if i32::try_from(signal.ssi_signo) == Ok(libc::SIGPWR) {
                log::info!("SIGPWR: the sandboxes are stopped");
                self.begin_stop(None, None);
            } else {
                log::info!("signal {}: sandboxes run on without this supervisor", signal.ssi_signo);
                self.hand_over();
            }
        }
    }

    fn take_results(&mut self) {
        for (ticket, result) in self.database.completed() {
            if self.booked(ticket, &result) || self.backed_up(ticket, &result) || self.snapshot_written(ticket, &result)
            {
                continue;
            }
            if let Err(e) = result {
                self.refused(&e);
            }
            self.written(ticket);
        }
        for (ticket, result) in self.database.readings() {
            self.database_read(ticket, result);
        }
        while let Some(done) = self.background.finished() {
            match done {
                Done::Released { sandbox, gone, result } => self.released(&sandbox, gone, result),
                Done::Verified { template, result } => self.verified(&template, result),
                Done::Imported(events) => self.imported(events),
                Done::Network(report) => self.network_reported(report),
                Done::Swept { homes, users } => self.swept(homes, &users),
                Done::Captured { sandbox, result } => self.captured(&sandbox, result),
                Done::PauseSettled { sandbox, result } => self.pause_settled(&sandbox, result),
                Done::SnapshotHeld { snapshot, held } => self.snapshot_held(&snapshot, held),
                Done::SnapshotWritten { snapshot, written } => self.snapshot_written_out(&snapshot, written),
                Done::RollbackPrepared { sandbox, snapshot, overlay, result } => {
                    self.rollback_prepared(&sandbox, &snapshot, &overlay, result);
                }
                Done::Sealed { snapshot, result } => self.sealed(&snapshot, result),
                Done::Merged(result) => self.merged(result),
                Done::Flattened { snapshot, result } => self.flattened(&snapshot, result),
                Done::Learned => self.look_at_pools(),
                Done::Cleared(errors) => self.cleared(&errors),
                Done::SnapshotImported { client, tag, snapshot, result } => {
                    self.snapshot_imported(client, &tag, &snapshot, result);
                }
                Done::TemplateMade { build, client, tag, result } => self.template_made(&build, client, &tag, result),
                Done::TemplatePublished { build, client, tag, result } => {
                    self.template_published(&build, client, &tag, result);
                }
                Done::TemplateChanged { client, tag, result } => self.template_changed(client, &tag, result),
                Done::TemplateArrived { client, tag, result } => self.template_arrived(client, &tag, result),
                Done::Installing { client, tag } => self.installing(client, &tag),
                Done::Packages { ticket, result } => self.packages_there(ticket, result),
                Done::Unpaused { sandbox, result } => self.unpaused(&sandbox, result),
                Done::Counted(census, listed) => self.counted(census, listed),
                Done::Moved(key) => drop(self.touched_clients.insert(key)),
                Done::Restored { client, tag, result } => self.restored(client, &tag, result),
                Done::Externals(result) => self.externals_seen(result),
                Done::WorkerMade { id, place, uid, ordered, result } => {
                    self.worker_made(&id, (place, uid), ordered, result);
                }
                Done::OverlayMade { place, path, shape, result } => self.overlay_made(place, path, shape, result),
                Done::Unmade { id, worker, overlay_place, result } => self.unmade(id, worker, overlay_place, result),
            }
        }
    }

    fn take_exits(&mut self) {
        let exits = self.init.as_mut().map(ExitWatch::read_events).unwrap_or_default();
        for exit in exits {
            let id = exit.sandbox().and_then(SandboxId::parse);
            if let Some(worker) = id.as_ref().and_then(|id| self.sandboxes.get_mut(id)?.worker.as_mut())
                && u32::try_from(worker.pid) == Ok(exit.pid)
            {
                worker.status = Some(exit.status);
            }
            if let Some(init) = &mut self.init {
                init.ack(exit.pid);
            }
            if let Some(id) = id {
                self.bury(&id);
            }
        }
    }

    fn expire(&mut self, timer: Timer) {
        match timer {
            Timer::Boot(id, pid) => self.boot_expired(&id, pid),
            Timer::Stop(id) => self.stop_expired(&id),
            Timer::Kill(id) => self.kill_removed(&id),
            Timer::Obituary(id) => self.bury_anyway(&id),
            Timer::Relink(id) => self.relink(&id),
            Timer::Freeze(id) => self.freeze_expired(&id),
            Timer::Capture(id, began) => self.capture_expired(&id, began),
            Timer::Merge => self.merge_layers(),
            Timer::Flatten => self.flatten_again(),
            Timer::Retention => self.retention_due(),
            Timer::History => self.history_due(),
            Timer::Snapshot(id) => self.snapshot_again(&id),
            Timer::Inquiry { sandbox, route } => self.inquiry_expired(&sandbox, &route),
            Timer::Verify => self.verify_built_in(),
            Timer::GuestLog(id) => self.refill_guest_log(&id),
            Timer::Logs => self.logs_due(),
            Timer::Port => self.open_port(),
            Timer::Meeting => self.meeting_expired(),
            Timer::Record => self.record_all(),
            Timer::Look => self.look(),
            Timer::TimeLimit(id, at) => self.time_limit_due(&id, at),
            Timer::Drain => self.drain_expired(),
            Timer::Externals => self.externals_due(),
            Timer::FlushExternals => self.flush_due(),
            Timer::Probe => self.probe_tick(),
            Timer::Restart(id) => self.restart(&id),
            Timer::Pools => self.pools_due(),
            Timer::Warm => self.warm_due(),
        }
    }
}

/// Milliseconds since the epoch.
pub(super) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
