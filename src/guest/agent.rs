//! The agent's loop: one thread, one poll, edge-triggered.
//!
//! An event only marks what it is about; `work` then visits what was marked until nothing moves. Everything
//! that produces output stops while its link's queue is at `QUEUE_HIGH` and goes on when it was written.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use mio::event::Event;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::code::{Context, Told};
use super::connection::{Connection, Job, greeting, hello};
use super::exec::{self, Exec, Held, Realm, Users};
use super::freeze::Freeze;
use super::identity::Identity;
use super::port::{self, Port};
use super::settings::Settings;
use super::tasks::{Task, Tasks};
use super::uplink::Call;
use super::web::Web;
use super::{boot, memory, report, socket, system};
use crate::wire::{Code, Error, Fields};

/// After so long without an event memory is given back.
const IDLE: Duration = Duration::from_secs(1);
/// Connections at once.
const LINKS_MAX: usize = 256;

/// What an event is about: the kind in the low bits of the token, the number above.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Listener,
    Signals,
    Tasks,
    Link,
    Status,
    Stdin,
    Stdout,
    Stderr,
    Frozen,
    Result,
    Context,
    Web,
    Visitor,
}

const KINDS: [Kind; 13] = [
    Kind::Listener,
    Kind::Signals,
    Kind::Tasks,
    Kind::Link,
    Kind::Status,
    Kind::Stdin,
    Kind::Stdout,
    Kind::Stderr,
    Kind::Frozen,
    Kind::Result,
    Kind::Context,
    Kind::Web,
    Kind::Visitor,
];
/// Bits of a token that are its kind.
const KIND_BITS: u32 = 4;

/// Contexts that runs have for themselves are numbered from here on.
const OWN_CONTEXTS: u64 = 1 << 32;

fn token(kind: Kind, number: u64) -> Token {
    Token((number as usize) << KIND_BITS | kind as usize)
}

/// Has the streams of a code run watched.
pub(super) fn watch_outputs(registry: &mio::Registry, id: u64, streams: [&File; 3]) -> io::Result<()> {
    let kinds = [Kind::Stdout, Kind::Stderr, Kind::Result];
    streams.into_iter().zip(kinds).try_for_each(|(stream, kind)| {
        registry.register(&mut SourceFd(&stream.as_raw_fd()), token(kind, id), Interest::READABLE)
    })
}

fn of_token(token: Token) -> (Kind, u64) {
    let kind = KINDS.get(token.0 & ((1 << KIND_BITS) - 1)).copied().unwrap_or(Kind::Listener);
    (kind, (token.0 >> KIND_BITS) as u64)
}

/// What is due at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Due {
    /// A program's time is up.
    Timeout(u64),
    /// A program has ended and those it left behind had their second.
    Linger(u64),
    /// A code run's time to heed an interrupt is over.
    Grace(u64),
    /// A code run's files were looked for long enough.
    Artifacts(u64),
    /// Look again whether the port's host side is there.
    Port,
    /// Who waits for the programs to stand still has waited long enough.
    Freeze,
    /// A program has had its time for a request to the guest's own service.
    Visitor(u64),
    /// Call the host again.
    Call,
    /// The sandbox goes down, whether its programs have ended or not.
    PowerOff,
}

/// Where connections come from.
#[derive(Debug)]
pub(super) enum Door {
    /// A listening vsock; none when the sandbox has no such device.
    Vsock(Option<OwnedFd>),
    /// A listening Unix socket, and its path.
    Unix(OwnedFd, PathBuf),
    /// A character device that is one connection at a time.
    Port(Port),
}

/// The agent.
#[derive(Debug)]
pub(super) struct Agent {
    pub(super) poll: Poll,
    pub(super) door: Door,
    pub(super) signals: SignalFd,
    pub(super) links: BTreeMap<u64, Connection>,
    pub(super) next_link: u64,
    pub(super) execs: BTreeMap<u64, Exec>,
    pub(super) next_exec: u64,
    pub(super) by_pid: BTreeMap<libc::pid_t, u64>,
    /// What code runs in, by its number.
    pub(super) contexts: BTreeMap<u64, Context>,
    pub(super) next_context: u64,
    /// The number of the next one that a run has for itself.
    pub(super) next_own_context: u64,
    pub(super) busy_contexts: BTreeSet<u64>,
    /// Files that the last run was told to have changed.
    pub(super) told: Told,
    /// Threads of the agent's own, by their numbers, and the code run that each is for.
    pub(super) own_tasks: BTreeMap<u64, (Task, u64)>,
    /// Programs that were reaped, oldest first.
    pub(super) finished: VecDeque<u64>,
    pub(super) held: Held,
    pub(super) users: Option<Users>,
    /// Where users' programs live, once there is one.
    pub(super) realm: Option<Realm>,
    pub(super) settings: Settings,
    pub(super) tasks: Tasks,
    pub(super) null: File,
    pub(super) due: BTreeSet<(Instant, Due)>,
    pub(super) busy_links: BTreeSet<u64>,
    pub(super) busy_execs: BTreeSet<u64>,
    pub(super) scratch: Vec<u8>,
    /// Whether this is the init of a sandbox.
    pub(super) pid1: bool,
    /// How many of `boot::CHORES` are done.
    pub(super) chores_done: usize,
    pub(super) chores_finished: bool,
    /// Whether memory was given back since the last event.
    pub(super) trimmed: bool,
    /// Going down: nothing new is started.
    pub(super) stopping: bool,
    /// The programs are to stand still.
    pub(super) freeze: Option<Freeze>,
    /// Who this sandbox is.
    pub(super) identity: Identity,
    /// The host is to be told that the agent is there again.
    pub(super) call: Option<Call>,
    /// What programs ask of the sandbox.
    pub(super) web: Web,
}

impl Agent {
    /// The event of a task's report.
    pub(super) const TASKS: Token = Token(Kind::Tasks as usize);

    /// An agent behind `door`.
    pub(super) fn new(door: Door, pid1: bool) -> io::Result<Self> {
        let poll = Poll::new()?;
        let mut watched = SigSet::empty();
        watched.add(Signal::SIGCHLD);
        if !pid1 {
            watched.add(Signal::SIGTERM);
            watched.add(Signal::SIGINT);
        }
        watched.thread_block()?;
        let signals = SignalFd::with_flags(&watched, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        let agent = Self {
            poll,
            door,
            signals,
            links: BTreeMap::new(),
            next_link: 1,
            execs: BTreeMap::new(),
            next_exec: 1,
            by_pid: BTreeMap::new(),
            contexts: BTreeMap::new(),
            next_context: 1,
            next_own_context: OWN_CONTEXTS,
            busy_contexts: BTreeSet::new(),
            told: Told::default(),
            own_tasks: BTreeMap::new(),
            finished: VecDeque::new(),
            held: Rc::default(),
            users: None,
            realm: None,
            settings: if pid1 { Settings::of_sandbox() } else { Settings::of_machine() },
            tasks: Tasks::new(),
            null: File::options().read(true).write(true).open("/dev/null")?,
            due: BTreeSet::new(),
            busy_links: BTreeSet::new(),
            busy_execs: BTreeSet::new(),
            scratch: vec![0; 64 * 1024],
            pid1,
            chores_done: if pid1 { 0 } else { boot::CHORES.len() },
            chores_finished: false,
            trimmed: false,
            stopping: false,
            freeze: None,
            identity: Identity::default(),
            call: None,
            web: Web::default(),
        };
        agent.watch(&agent.signals, Kind::Signals, 0, Interest::READABLE)?;
        match &agent.door {
            Door::Vsock(Some(listener)) | Door::Unix(listener, _) => {
                agent.watch(listener, Kind::Listener, 0, Interest::READABLE)?;
            }
            Door::Vsock(None) | Door::Port(_) => {}
        }
        Ok(agent)
    }

    pub(super) fn watch(&self, fd: &impl AsFd, kind: Kind, number: u64, interest: Interest) -> io::Result<()> {
        self.poll.registry().register(&mut SourceFd(&fd.as_fd().as_raw_fd()), token(kind, number), interest)
    }

    /// Serves the connection that was made to the host at boot.
    pub(super) fn adopt_uplink(&mut self, uplink: OwnedFd, greeted: bool) {
        let mut connection = Connection::new(File::from(uplink));
        connection.connecting = !greeted;
        if !greeted {
            connection.link.send(&greeting(self.hello()));
        }
        self.adopt(connection);
    }

    /// Serves a connection; gives its number. One that cannot be watched is dropped.
    pub(super) fn adopt(&mut self, mut connection: Connection) -> Option<u64> {
        let id = self.next_link;
        let both = Interest::READABLE | Interest::WRITABLE;
        match self.watch(connection.link.stream(), Kind::Link, id, both) {
            Ok(()) => {
                self.next_link += 1;
                self.links.insert(id, connection);
                self.busy_links.insert(id);
                Some(id)
            }
            Err(e) => {
                report(&format!("a connection was dropped: {e}"));
                None
            }
        }
    }

    /// What this agent says about itself now.
    pub(super) fn hello(&self) -> Fields {
        let hello = hello();
        if self.freeze.is_some() { hello.with("frozen", true) } else { hello }
    }

    /// Serves until the process is told to end.
    pub(super) fn run(mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(128);
        // What came before the descriptors were watched.
        self.accept();
        loop {
            self.work();
            let patience = self.patience();
            match self.poll.poll(&mut events, patience) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            }
            if events.is_empty() {
                self.idle(patience != Some(Duration::ZERO));
            } else {
                self.trimmed = false;
            }
            for event in &events {
                if self.mark(event) {
                    self.end();
                    return Ok(());
                }
            }
            self.collect_tasks();
            self.do_what_is_due();
        }
    }

    /// How long to wait for events.
    pub(super) fn patience(&self) -> Option<Duration> {
        let at_once = !self.busy_links.is_empty() || !self.busy_execs.is_empty() || !self.busy_contexts.is_empty();
        if at_once || !self.chores_finished {
            return Some(Duration::ZERO);
        }
        // poll(2) counts whole milliseconds: rounded down it would wake just before the time, again and again.
        let now = Instant::now();
        let due = self.due.first().map(|(when, _)| when.saturating_duration_since(now) + Duration::from_millis(1));
        if self.trimmed { due } else { Some(due.map_or(IDLE, |due| due.min(IDLE))) }
    }

    /// Nothing happened for a while: the next thing to do is one that was put off.
    pub(super) fn idle(&mut self, waited: bool) {
        if !self.chores_finished {
            self.do_chore();
        } else if waited && !self.trimmed {
            memory::give_back();
            self.trimmed = true;
        }
    }

    /// Does one of the things that boot left for later.
    pub(super) fn do_chore(&mut self) {
        match boot::CHORES.get(self.chores_done) {
            Some(chore) => {
                chore();
                self.chores_done += 1;
            }
            None if !self.chores_finished => {
                self.chores_finished = true;
                let name = if self.pid1 { "users".to_string() } else { format!("burrow-{}", std::process::id()) };
                self.users = Users::prepare(&name);
                match &self.users {
                    Some(users) if self.pid1 => users.leave_room_for_tasks(),
                    None if self.pid1 => report("programs have no cgroups"),
                    _ => {}
                }
                if self.pid1 {
                    if !boot::is_builder() {
                        let _ = self.prepare_realm();
                    }
                    self.identity.introduce();
                    self.open_web();
                }
            }
            None => {}
        }
    }

    /// Sees to it that there is a realm for users' programs.
    pub(super) fn prepare_realm(&mut self) -> Result<(), Error> {
        // It is made of what is mounted by then.
        self.do_chores();
        if self.realm.is_none() {
            self.realm = Some(Realm::make().map_err(|errno| realm_error("make namespaces for programs", errno))?);
        }
        self.protect_root()
    }

    /// Keeps programs from writing to the root, where that was asked for.
    pub(super) fn protect_root(&mut self) -> Result<(), Error> {
        if !self.pid1 || !self.settings.read_only {
            return Ok(());
        }
        let Some(realm) = &mut self.realm else { return self.prepare_realm() };
        realm.protect_root().map_err(|errno| realm_error("make the root read-only", errno))
    }

    /// Whether a program of that user, whom a request named or not, is kept to the realm, which is then there: in a sandbox all
    /// but those of whom a request asked to be root's.
    pub(super) fn confines(&mut self, identity: Option<&exec::Identity>, named: Option<&str>) -> Result<bool, Error> {
        let root = |identity: &exec::Identity| identity.uid == 0 && named.is_some_and(exec::names_root);
        let confines = self.pid1 && identity.is_some_and(|identity| !root(identity));
        if confines {
            self.prepare_realm()?;
        }
        Ok(confines)
    }

    /// Does all of them; called before the first request that needs them.
    pub(super) fn do_chores(&mut self) {
        while !self.chores_finished {
            self.do_chore();
        }
    }

    /// Notes what an event is about. `true` when the process is to end.
    pub(super) fn mark(&mut self, event: &Event) -> bool {
        let (kind, number) = of_token(event.token());
        let readable = event.is_readable() || event.is_read_closed() || event.is_error();
        let writable = event.is_writable() || event.is_write_closed() || event.is_error();
        match kind {
            Kind::Listener => self.accept(),
            Kind::Signals => return self.take_signals(),
            Kind::Tasks => {}
            Kind::Frozen => self.look_at_freeze(),
            Kind::Link => {
                if let Some(connection) = self.links.get_mut(&number) {
                    connection.readable |= readable;
                    connection.writable |= writable;
                    self.busy_links.insert(number);
                }
            }
            Kind::Web => self.welcome(),
            Kind::Visitor => self.attend(number),
            Kind::Context => {
                self.busy_contexts.insert(number);
            }
            Kind::Status | Kind::Stdin | Kind::Stdout | Kind::Stderr | Kind::Result => {
                if let Some(exec) = self.execs.get_mut(&number) {
                    match kind {
                        Kind::Stdin => exec.stdin.writable |= writable,
                        Kind::Stdout => exec.stdout.readable |= readable,
                        Kind::Stderr => exec.stderr.readable |= readable,
                        Kind::Result => exec.result.readable |= readable,
                        _ => {}
                    }
                    self.busy_execs.insert(number);
                }
            }
        }
        false
    }

    pub(super) fn accept(&mut self) {
        loop {
            let accepted = match &mut self.door {
                Door::Vsock(Some(listener)) => socket::accept(listener.as_fd(), true),
                Door::Unix(listener, _) => socket::accept(listener.as_fd(), false),
                Door::Vsock(None) => return,
                Door::Port(port) => match port.connect() {
                    Some(stream) => Ok(Some(stream)),
                    None => {
                        if port.is_waiting() {
                            self.due.insert((Instant::now() + port::PAUSE, Due::Port));
                        }
                        return;
                    }
                },
            };
            match accepted {
                Ok(Some(_)) if self.links.len() >= LINKS_MAX => {
                    report(&format!("a connection was turned away: there are {LINKS_MAX}, which is the limit"));
                }
                Ok(Some(stream)) => {
                    let mut connection = Connection::new(stream);
                    connection.link.send(&greeting(self.hello()));
                    self.adopt(connection);
                    // The host came by itself.
                    self.call = None;
                }
                Ok(None) => return,
                Err(errno) => {
                    report(&format!("cannot accept a connection: {errno}"));
                    return;
                }
            }
        }
    }

    /// Passes on what threads said. What belongs to a request that has ended is dropped.
    pub(super) fn collect_tasks(&mut self) {
        while let Some(report) = self.tasks.next() {
            if report.link == 0 {
                self.own_task_reported(&report);
                continue;
            }
            let Some(Connection { link, jobs, .. }) = self.links.get_mut(&report.link) else { continue };
            let task = jobs.iter_mut().enumerate().find_map(|(at, slot)| match &mut slot.job {
                Job::Task(task) if task.number == report.number => Some((at, task)),
                _ => None,
            });
            let Some((at, task)) = task else { continue };
            task.note(&report.message);
            link.send(&report.message);
            if report.message.is_final() {
                jobs.swap_remove(at);
            }
            self.busy_links.insert(report.link);
        }
    }

    pub(super) fn add_due(&mut self, when: Instant, due: Due) {
        self.due.insert((when, due));
    }

    pub(super) fn do_what_is_due(&mut self) {
        if self.due.is_empty() {
            return;
        }
        let now = Instant::now();
        while let Some((when, due)) = self.due.pop_first() {
            if when > now {
                self.due.insert((when, due));
                return;
            }
            match due {
                Due::Timeout(id) => match self.execs.get_mut(&id) {
                    Some(exec) if exec.run.is_some() => self.time_out_run(id),
                    Some(exec) => exec.time_out(),
                    None => {}
                },
                Due::Grace(id) => self.end_by_force(id),
                Due::Artifacts(id) => self.answer_without_files(id),
                Due::Linger(id) => {
                    if let Some(exec) = self.execs.get_mut(&id)
                        && !exec.is_alive()
                    {
                        exec.cut();
                        self.busy_execs.insert(id);
                    }
                }
                Due::Port => self.accept(),
                Due::Freeze => self.mark_freezers(),
                Due::Visitor(id) => self.dismiss(Some(id)),
                Due::Call => self.call_again(),
                Due::PowerOff => system::power_off(),
            }
        }
    }

    /// The end of an agent that is not PID 1: nothing of it is left.
    pub(super) fn end(&mut self) {
        for exec in self.execs.values() {
            exec.kill_all();
        }
        for context in std::mem::take(&mut self.contexts).into_values() {
            context.kill();
        }
        self.execs.clear();
        if let Some(users) = &mut self.users {
            users.abolish();
        }
        if let Door::Unix(_, path) = &self.door {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn realm_error(what: &str, errno: nix::errno::Errno) -> Error {
    Error::new(Code::NoCapacity, format!("cannot {what}: {}", errno.desc())).with("errno", format!("{errno:?}"))
}
