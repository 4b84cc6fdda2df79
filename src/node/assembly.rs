//! The node's components as a table: what each needs, how it starts, how it stops. `warren supervise` starts and stops by
//! it and by nothing else.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::DirBuilderExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::event::Source as _;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::components::{Component, Progress, Running};
use super::config::Config;
use super::delegation;
use super::listener::Listener;
use super::supervisor::{Source, Supervisor, Timer};
use crate::init::ExitWatch;
use crate::sandbox::home::Places;
use crate::sandbox::spawn::Spawner;
use crate::storage::state::{Snapshot, State as Database};

/// When the node's own templates are hashed: after its start, which must not wait for that, and before anybody had the
/// time to ask for a sandbox.
const HASH_AFTER: Duration = Duration::from_millis(200);
/// For components whose stop has nothing to wait for, or not more than what was queued.
const SHORT: Duration = Duration::from_secs(5);
/// How long clients may take to read their last answers.
const LAST_ANSWERS: Duration = Duration::from_secs(1);
/// How often a component that is stopping is asked whether it has.
const ASK: Duration = Duration::from_millis(20);
/// Beyond the time that guests have for their shutdown: for workers to be ended by force, and their things taken down.
const FORCE: Duration = Duration::from_secs(10);

/// What starts before the supervisor is there and then belongs to it.
#[derive(Default)]
pub(super) struct Parts {
    pub config: Config,
    pub init: Option<ExitWatch>,
    pub events: Option<(Poll, Arc<Waker>)>,
    pub signals: Option<SignalFd>,
    pub places: Option<Places>,
    pub database: Option<Database>,
    pub snapshot: Snapshot,
    pub spawner: Option<Spawner>,
}

/// All of the node's process.
#[derive(Default)]
pub(super) struct Node {
    parts: Parts,
    supervisor: Option<Supervisor>,
    /// When clients were first asked to take their last answers.
    last_answers: Option<Instant>,
}

const fn component(name: &'static str, needs: &'static [&'static str]) -> Component<Node> {
    Component { name, needs, start: |_| Ok(()), stop: |_| Ok(Progress::Done), deadline: |_| SHORT }
}

/// The components. Those without a `stop` hold nothing but descriptors of the process.
pub(super) static COMPONENTS: &[Component<Node>] = &[
    Component { start: start_signals, ..component("signals", &[]) },
    Component { start: start_events, ..component("events", &[]) },
    Component { start: start_directories, ..component("directories", &[]) },
    Component {
        start: start_database,
        stop: stop_database,
        // What was queued has to be written out: a slow disk has its time.
        deadline: |_| Duration::from_secs(20),
        ..component("database", &["signals", "events", "directories"])
    },
    Component { start: start_namespaces, ..component("namespaces", &["signals"]) },
    Component {
        start: start_loop,
        stop: stop_background,
        deadline: |_| Duration::from_secs(15),
        ..component("loop", &["signals", "events", "directories", "database", "namespaces"])
    },
    Component { start: start_sandboxes, stop: stop_sandboxes, ..component("sandboxes", &["loop"]) },
    Component {
        start: |node| node.up(Supervisor::start_pools),
        stop: |node| node.ask(Supervisor::stop_pools),
        deadline: |_| FORCE,
        ..component("pools", &["sandboxes"])
    },
    Component {
        start: |node| node.up(Supervisor::start_network),
        stop: |node| node.ask(Supervisor::stop_network),
        ..component("network", &["sandboxes"])
    },
    Component { start: start_templates, ..component("templates", &["loop"]) },
    Component { start: |node| node.up(Supervisor::start_externals), ..component("externals", &["loop"]) },
    Component { start: start_control, stop: stop_control, ..component("control", &["loop"]) },
    // What makes requests come in and sandboxes go on. Before anything it stands on stops, they have come to an end.
    Component {
        start: |node| node.up(Supervisor::open_admission),
        stop: |node| node.ask(Supervisor::close_admission),
        deadline: |node| {
            let config = node.supervisor.as_ref().map_or(&node.parts.config, |supervisor| &supervisor.config);
            config.sandbox.stop_timeout() + FORCE
        },
        ..component("admission", &["sandboxes", "pools", "network", "templates", "externals", "control"])
    },
];

impl Node {
    /// Nothing of it has started yet.
    pub fn new(config: Config, init: Option<ExitWatch>) -> Self {
        Self { parts: Parts { config, init, ..Parts::default() }, ..Self::default() }
    }

    /// Starts everything, serves until the node stops, stops everything. An error names each component that failed.
    pub fn run(mut self) -> Result<(), String> {
        let mut running = Running::start(COMPONENTS, &mut self)?;
        let mut events = Events::with_capacity(256);
        loop {
            let Some(supervisor) = &mut self.supervisor else { return Err("there is no supervisor".to_string()) };
            let patience = supervisor.stopping.as_ref().map(|_| ASK);
            supervisor.turn(&mut events, patience).map_err(|e| format!("event loop: {e}"))?;
            if supervisor.stopping.is_some() && running.step(&mut self, Instant::now()) {
                break;
            }
        }
        if let Some(supervisor) = &mut self.supervisor {
            supervisor.request_stop();
        }
        let result = match running.failures() {
            [] => Ok(()),
            failures => Err(failures.join("; ")),
        };
        // What failed to stop must not hold up the end of the process; the kernel takes back the rest.
        std::mem::forget(self);
        result
    }

    fn supervisor(&mut self) -> Result<&mut Supervisor, String> {
        self.supervisor.as_mut().ok_or_else(|| "the loop has not started".to_string())
    }

    fn up(&mut self, start: fn(&mut Supervisor)) -> Result<(), String> {
        self.supervisor().map(start)
    }

    fn ask(&mut self, stop: fn(&mut Supervisor) -> Result<Progress, String>) -> Result<Progress, String> {
        self.supervisor.as_mut().map_or(Ok(Progress::Done), stop)
    }
}

fn failed(what: &str) -> impl Fn(io::Error) -> String {
    let what = what.to_string();
    move |e| format!("{what}: {e}")
}

/// Before any thread starts: threads inherit what is blocked.
fn start_signals(node: &mut Node) -> Result<(), String> {
    let mask: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGPWR].into_iter().collect();
    mask.thread_block().map_err(|e| format!("signal mask: {e}"))?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
        .map_err(|e| format!("signal descriptor: {e}"))?;
    node.parts.signals = Some(signals);
    Ok(())
}

fn start_events(node: &mut Node) -> Result<(), String> {
    let poll = Poll::new().map_err(failed("event poll"))?;
    let waker = Waker::new(poll.registry(), Token(0)).map_err(failed("event waker"))?;
    node.parts.events = Some((poll, Arc::new(waker)));
    Ok(())
}

fn start_directories(node: &mut Node) -> Result<(), String> {
    let config = &node.parts.config;
    let cgroups = match node.parts.init {
        Some(_) => std::path::Path::new(delegation::ROOT).join("sandboxes"),
        None => delegation::settle().map_err(failed("control groups"))?,
    };
    let places =
        Places { disks: config.paths.data.join("sandboxes"), sockets: config.paths.run.join("sandboxes"), cgroups };
    // The sentinel, which is not root, must find the control socket in it.
    let run = std::fs::DirBuilder::new().recursive(true).mode(0o711).create(&config.paths.run);
    run.map_err(failed("paths.run"))?;
    places.prepare().map_err(failed("directories of the sandboxes"))?;
    if let Err(e) = std::fs::create_dir_all(&config.disks.directory) {
        log::warn!("disks.directory {}: {e}", config.disks.directory.display());
    }
    node.parts.places = Some(places);
    Ok(())
}

fn start_database(node: &mut Node) -> Result<(), String> {
    let path = node.parts.config.paths.data.join("state.db");
    let waker = node.parts.events.as_ref().map(|(_, waker)| Arc::clone(waker));
    let notify = move || {
        if let Some(waker) = &waker {
            let _ = waker.wake();
        }
    };
    let (database, snapshot) = Database::open(&path, notify).map_err(|e| format!("{}: {e}", path.display()))?;
    if let Some(aside) = &snapshot.moved_aside {
        log::error!("the state database was damaged; it is kept as {} and a new one begun", aside.display());
    }
    (node.parts.database, node.parts.snapshot) = (Some(database), snapshot);
    Ok(())
}

/// Every row that was queued is written: of sandboxes, programs, the audit log.
fn stop_database(node: &mut Node) -> Result<Progress, String> {
    let (done, database) = match &mut node.supervisor {
        Some(supervisor) => (supervisor.close_database(), &mut supervisor.database),
        None => match &mut node.parts.database {
            Some(database) => (database.end(), database),
            None => return Ok(Progress::Done),
        },
    };
    if !done {
        return Ok(Progress::Waits(format!("{} rows are not written", database.pending())));
    }
    database.completed();
    match database.refused() {
        (0, _) | (_, None) => Ok(Progress::Done),
        (rows, Some(first)) => Err(format!("{rows} rows were refused, the first: {first}")),
    }
}

fn start_namespaces(node: &mut Node) -> Result<(), String> {
    node.parts.spawner = Some(Spawner::new().map_err(failed("the workers' namespaces"))?);
    Ok(())
}

fn start_loop(node: &mut Node) -> Result<(), String> {
    node.supervisor = Some(Supervisor::of(&mut node.parts)?);
    Ok(())
}

/// What takes things down has done so. What only looks, at images, is left: the next supervisor looks again.
fn stop_background(node: &mut Node) -> Result<Progress, String> {
    node.ask(|supervisor| {
        let under_way = supervisor.background.under_way().into_iter();
        let waits: Vec<&str> =
            under_way.filter(|name| !["verify", "templates", "externals", "packages"].contains(name)).collect();
        Ok(if waits.is_empty() { Progress::Done } else { Progress::Waits(waits.join(", ")) })
    })
}

fn start_sandboxes(node: &mut Node) -> Result<(), String> {
    let snapshot = std::mem::take(&mut node.parts.snapshot);
    let supervisor = node.supervisor()?;
    supervisor.take_up(&snapshot);
    supervisor.resume_drain(snapshot.drain);
    Ok(())
}

/// Workers outlive a supervisor that is replaced; of a node that stops none may be left.
fn stop_sandboxes(node: &mut Node) -> Result<Progress, String> {
    node.ask(|supervisor| {
        if supervisor.stopping.as_ref().is_none_or(|stopping| stopping.hands_over) {
            return Ok(Progress::Done);
        }
        let left = supervisor.sandboxes.values().filter(|sandbox| sandbox.worker.is_some());
        let left: Vec<&str> = left.map(|sandbox| sandbox.id.as_str()).collect();
        if left.is_empty() { Ok(Progress::Done) } else { Err(format!("these still run: {}", left.join(" "))) }
    })
}

fn start_templates(node: &mut Node) -> Result<(), String> {
    node.up(|supervisor| {
        supervisor.import_templates();
        supervisor.timers.after(HASH_AFTER, Timer::Verify);
    })
}

fn start_control(node: &mut Node) -> Result<(), String> {
    let supervisor = node.supervisor()?;
    let mode = supervisor.config.control.socket_mode().unwrap_or(0o600);
    let listener = Listener::bind(&supervisor.config.control.socket, mode).map_err(failed("control socket"))?;
    SourceFd(&listener.descriptor())
        .register(supervisor.poll.registry(), Token(2), Interest::READABLE)
        .map_err(failed("control socket"))?;
    supervisor.sources.insert(Token(2), Source::Listener);
    supervisor.listener = Some(listener);
    supervisor.receive_clients();
    Ok(())
}

/// No new client is taken, and those that are there get what they have coming. One that does not read is not waited for.
fn stop_control(node: &mut Node) -> Result<Progress, String> {
    let since = *node.last_answers.get_or_insert_with(Instant::now);
    node.ask(|supervisor| {
        supervisor.listener = None;
        supervisor.sources.remove(&Token(2));
        Ok(Progress::Done)
    })?;
    let Some(supervisor) = &mut node.supervisor else { return Ok(Progress::Done) };
    let queued = supervisor.unread_answers();
    if queued == 0 || since.elapsed() >= LAST_ANSWERS {
        return Ok(Progress::Done);
    }
    Ok(Progress::Waits(format!("{queued} octets of answers are not read")))
}

/// Registers the signals' descriptor for a supervisor that is being made.
pub(super) fn watch_signals(poll: &Poll, signals: &SignalFd) -> io::Result<()> {
    SourceFd(&signals.as_raw_fd()).register(poll.registry(), Token(1), Interest::READABLE)
}

#[cfg(test)]
mod tests {
    use super::super::components::order;
    use super::*;

    #[test]
    fn the_nodes_components_have_an_order_that_ends_with_what_sandboxes_are_asked_of() {
        let names: Vec<&str> = order(COMPONENTS).expect("an order").iter().map(|component| component.name).collect();
        assert_eq!(names.last(), Some(&"admission"));
        let at = |name: &str| names.iter().position(|other| *other == name).expect(name);
        assert!(at("signals") < at("database"), "threads inherit what is blocked");
        assert!(at("sandboxes") < at("network"), "the network is told whose slots are taken");
    }
}
