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
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::connection::{Connection, Job, QUEUE_HIGH, greeting};
use super::exec::{Exec, Failure, Held, Spawned, Stage, Users, Visit as ExecVisit};
use super::files::Visit;
use super::port::{self, Port};
use super::settings::Settings;
use super::tasks::Tasks;
use super::{boot, report, socket, system};
use crate::wire::{Code, Decoded, Error, Filled, Message};

/// Programs that have ended and were not forgotten by `exec.forget`, at most.
const FINISHED_MAX: usize = 1024;
/// How long the streams of an ended program stay open for those it left behind.
const LINGER: Duration = Duration::from_secs(1);
/// Connections at once.
const LINKS_MAX: usize = 256;
/// Rounds of reading and writing on one link before the others get their turn.
const ROUNDS: usize = 16;

/// What an event is about: the kind in the low bits of the token, the number above.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Listener,
    Signals,
    Tasks,
    Link,
    Status,
    Stdin,
    Stdout,
    Stderr,
}

const KINDS: [Kind; 8] =
    [Kind::Listener, Kind::Signals, Kind::Tasks, Kind::Link, Kind::Status, Kind::Stdin, Kind::Stdout, Kind::Stderr];

/// Largest number of a program that fits a token with its kind.
pub(super) const EXEC_MAX: u64 = u64::MAX >> 8;

fn token(kind: Kind, number: u64) -> Token {
    Token((number as usize) << 3 | kind as usize)
}

fn of_token(token: Token) -> (Kind, u64) {
    let kind = KINDS.get(token.0 & 7).copied().unwrap_or(Kind::Listener);
    (kind, (token.0 >> 3) as u64)
}

/// What is due at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Due {
    /// A program's time is up.
    Timeout(u64),
    /// A program has ended and those it left behind had their second.
    Linger(u64),
    /// Look again whether the port's host side is there.
    Port,
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
    door: Door,
    signals: SignalFd,
    links: BTreeMap<u64, Connection>,
    next_link: u64,
    pub(super) execs: BTreeMap<u64, Exec>,
    pub(super) next_exec: u64,
    by_pid: BTreeMap<libc::pid_t, u64>,
    /// Programs that were reaped, oldest first.
    finished: VecDeque<u64>,
    pub(super) held: Held,
    pub(super) users: Option<Users>,
    pub(super) settings: Settings,
    pub(super) tasks: Tasks,
    pub(super) null: File,
    due: BTreeSet<(Instant, Due)>,
    busy_links: BTreeSet<u64>,
    busy_execs: BTreeSet<u64>,
    scratch: Vec<u8>,
    /// Whether this is the init of a sandbox.
    pub(super) pid1: bool,
    /// How many of `boot::CHORES` are done.
    chores_done: usize,
    chores_finished: bool,
    /// Going down: nothing new is started.
    pub(super) stopping: bool,
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
            finished: VecDeque::new(),
            held: Rc::default(),
            users: None,
            settings: Settings::default(),
            tasks: Tasks::new(),
            null: File::options().read(true).write(true).open("/dev/null")?,
            due: BTreeSet::new(),
            busy_links: BTreeSet::new(),
            busy_execs: BTreeSet::new(),
            scratch: vec![0; 64 * 1024],
            pid1,
            chores_done: if pid1 { 0 } else { boot::CHORES.len() },
            chores_finished: false,
            stopping: false,
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

    fn watch(&self, fd: &impl AsFd, kind: Kind, number: u64, interest: Interest) -> io::Result<()> {
        self.poll.registry().register(&mut SourceFd(&fd.as_fd().as_raw_fd()), token(kind, number), interest)
    }

    /// Serves the connection that was made to the host at boot.
    pub(super) fn adopt_uplink(&mut self, uplink: OwnedFd, greeted: bool) {
        let mut connection = Connection::new(File::from(uplink));
        connection.connecting = !greeted;
        if !greeted {
            connection.link.send(&greeting());
        }
        self.adopt(connection);
    }

    fn adopt(&mut self, mut connection: Connection) {
        let id = self.next_link;
        let both = Interest::READABLE | Interest::WRITABLE;
        match self.watch(connection.link.stream(), Kind::Link, id, both) {
            Ok(()) => {
                self.next_link += 1;
                self.links.insert(id, connection);
                self.busy_links.insert(id);
            }
            Err(e) => report(&format!("a connection was dropped: {e}")),
        }
    }

    /// Serves until the process is told to end.
    pub(super) fn run(mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(128);
        // What came before the descriptors were watched.
        self.accept();
        loop {
            self.work();
            match self.poll.poll(&mut events, self.patience()) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            }
            if events.is_empty() {
                self.do_chore();
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
    fn patience(&self) -> Option<Duration> {
        let at_once = !self.busy_links.is_empty() || !self.busy_execs.is_empty() || self.tasks.at_hand;
        if at_once || !self.chores_finished {
            return Some(Duration::ZERO);
        }
        let (when, _) = self.due.first()?;
        // poll(2) counts whole milliseconds: rounded down it would wake just before the time, again and again.
        Some(when.saturating_duration_since(Instant::now()) + Duration::from_millis(1))
    }

    /// Does one of the things that boot left for later.
    fn do_chore(&mut self) {
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
            }
            None => {}
        }
    }

    /// Does all of them; called before the first request that needs them.
    pub(super) fn do_chores(&mut self) {
        while !self.chores_finished {
            self.do_chore();
        }
    }

    /// Notes what an event is about. `true` when the process is to end.
    fn mark(&mut self, event: &Event) -> bool {
        let (kind, number) = of_token(event.token());
        let readable = event.is_readable() || event.is_read_closed() || event.is_error();
        let writable = event.is_writable() || event.is_write_closed() || event.is_error();
        match kind {
            Kind::Listener => self.accept(),
            Kind::Signals => return self.take_signals(),
            Kind::Tasks => {}
            Kind::Link => {
                if let Some(connection) = self.links.get_mut(&number) {
                    connection.readable |= readable;
                    connection.writable |= writable;
                    self.busy_links.insert(number);
                }
            }
            Kind::Status | Kind::Stdin | Kind::Stdout | Kind::Stderr => {
                if let Some(exec) = self.execs.get_mut(&number) {
                    match kind {
                        Kind::Stdin => exec.stdin.writable |= writable,
                        Kind::Stdout => exec.stdout.readable |= readable,
                        Kind::Stderr => exec.stderr.readable |= readable,
                        _ => {}
                    }
                    self.busy_execs.insert(number);
                }
            }
        }
        false
    }

    fn accept(&mut self) {
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
                    connection.link.send(&greeting());
                    self.adopt(connection);
                }
                Ok(None) => return,
                Err(errno) => {
                    report(&format!("cannot accept a connection: {errno}"));
                    return;
                }
            }
        }
    }

    /// Reaps, or says that the process is to end.
    fn take_signals(&mut self) -> bool {
        let mut end = false;
        while let Ok(Some(info)) = self.signals.read_signal() {
            end |= info.ssi_signo != Signal::SIGCHLD as u32;
        }
        self.reap();
        end
    }

    fn reap(&mut self) {
        let mut orphans = false;
        loop {
            let mut status = 0;
            // SAFETY: rusage is plain data for which all zeros is a valid value.
            let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
            // SAFETY: wait4 fills one int and one rusage.
            match Errno::result(unsafe { libc::wait4(-1, &mut status, libc::WNOHANG, &mut usage) }) {
                Ok(0) => break,
                Ok(pid) => match self.by_pid.remove(&pid) {
                    Some(id) => self.reaped(id, status, &usage),
                    None => orphans = true,
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

    fn reaped(&mut self, id: u64, status: libc::c_int, usage: &libc::rusage) {
        let Some(exec) = self.execs.get_mut(&id) else { return };
        if let ExecVisit::Failed(failure) = exec.advance() {
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
    fn fail_start(&mut self, id: u64, failure: Failure) {
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
        self.watch(&spawned.status, Kind::Status, id, Interest::READABLE)?;
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

    fn drop_exec(&mut self, id: u64) {
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

    fn collect_tasks(&mut self) {
        self.tasks.at_hand = false;
        while let Some(report) = self.tasks.next() {
            let Some(connection) = self.links.get_mut(&report.link) else { continue };
            if !matches!(connection.job(&report.tag), Some(Job::Task)) {
                continue; // cancelled meanwhile
            }
            connection.take(&report.tag);
            connection.link.send(&match report.result {
                Ok(fields) => Message::ok(&report.tag, fields),
                Err(error) => Message::err(&report.tag, error),
            });
            self.busy_links.insert(report.link);
        }
    }

    pub(super) fn add_due(&mut self, when: Instant, due: Due) {
        self.due.insert((when, due));
    }

    fn do_what_is_due(&mut self) {
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
                Due::Timeout(id) => {
                    if let Some(exec) = self.execs.get_mut(&id) {
                        exec.time_out();
                    }
                }
                Due::Linger(id) => {
                    if let Some(exec) = self.execs.get_mut(&id)
                        && !exec.is_alive()
                    {
                        exec.cut();
                        self.busy_execs.insert(id);
                    }
                }
                Due::Port => self.accept(),
                Due::PowerOff => system::power_off(),
            }
        }
    }

    /// Visits what was marked, until nothing moves.
    fn work(&mut self) {
        while let Some(id) = self.busy_execs.pop_first() {
            let Some(exec) = self.execs.get_mut(&id) else { continue };
            match &exec.attached {
                Some(attachment) => {
                    self.busy_links.insert(attachment.link);
                }
                None => {
                    if let ExecVisit::Failed(failure) = exec.advance() {
                        self.fail_start(id, failure);
                    }
                }
            }
        }
        // Links that have more to do after their rounds come again after a look at the events.
        for id in std::mem::take(&mut self.busy_links) {
            let Some(mut connection) = self.links.remove(&id) else { continue };
            let more = self.serve(id, &mut connection);
            if connection.broken {
                self.bury(id, connection);
                continue;
            }
            if more {
                self.busy_links.insert(id);
            }
            self.links.insert(id, connection);
        }
    }

    /// Serves one link for some rounds. `true` when there is more to do at once.
    fn serve(&mut self, id: u64, connection: &mut Connection) -> bool {
        if connection.connecting {
            match socket::connected(connection.link.stream().as_fd()) {
                Ok(true) => connection.connecting = false,
                Ok(false) => return false,
                Err(_) => {
                    // Nobody waits on the host: it will come to the listener when it wants.
                    connection.broken = true;
                    return false;
                }
            }
        }
        for _ in 0..ROUNDS {
            let mut progress = self.read(id, connection);
            if connection.link.queued() < QUEUE_HIGH {
                progress |= self.pump(connection);
            }
            if connection.writable && connection.link.queued() > 0 {
                match connection.link.flush() {
                    Ok(true) => progress = true,
                    Ok(false) => connection.writable = false,
                    Err(_) => connection.broken = true,
                }
            }
            if connection.broken || !progress {
                return false;
            }
        }
        true
    }

    fn read(&mut self, id: u64, connection: &mut Connection) -> bool {
        if !connection.readable || connection.link.queued() >= QUEUE_HIGH {
            return false;
        }
        match connection.link.fill() {
            Ok(Filled::More) => {}
            Ok(Filled::Drained) => {
                connection.readable = false;
                return false;
            }
            Ok(Filled::Closed) | Err(_) => {
                connection.broken = true;
                return false;
            }
        }
        while let Some(decoded) = connection.link.next() {
            match decoded {
                Decoded::Message(message) => self.handle(id, connection, message),
                Decoded::Bad { tag, error } => match connection.position(&tag) {
                    // A frame of a request's is lost, and the request with it.
                    Some(_) => {
                        self.abandon(connection, &tag, error);
                    }
                    None => connection.link.send(&Message::err(&tag, error)),
                },
            }
        }
        true
    }

    /// Lets every request on the link go on, in turns.
    fn pump(&mut self, connection: &mut Connection) -> bool {
        let mut progress = false;
        let mut failures = Vec::new();
        let Connection { link, jobs, .. } = connection;
        let (execs, scratch) = (&mut self.execs, self.scratch.as_mut_slice());
        jobs.retain_mut(|slot| {
            let visit = match &mut slot.job {
                Job::Exec(id) => match execs.get_mut(id) {
                    None => Visit::Done,
                    Some(exec) => match exec.pump(link, &slot.tag, scratch) {
                        ExecVisit::Idle => Visit::Idle,
                        ExecVisit::Progress => Visit::Progress,
                        ExecVisit::Done => {
                            exec.attached = None;
                            Visit::Done
                        }
                        ExecVisit::Failed(failure) => {
                            failures.push((*id, failure));
                            link.send(&Message::err(&slot.tag, start_error(exec, failure)));
                            exec.attached = None;
                            Visit::Done
                        }
                    },
                },
                Job::ExecList(next) => list_execs(execs, next, link, &slot.tag),
                Job::Read(reading) => reading.pump(link, &slot.tag, scratch),
                Job::List(listing) => listing.pump(link, &slot.tag),
                Job::Write(_) | Job::Task => Visit::Idle,
            };
            progress |= visit != Visit::Idle;
            visit != Visit::Done
        });
        for (id, failure) in failures {
            self.fail_start(id, failure);
        }
        // When the queue is full, those behind would otherwise never have their turn.
        if connection.link.queued() >= QUEUE_HIGH && connection.jobs.len() > 1 {
            connection.jobs.rotate_left(1);
        }
        progress
    }

    /// Ends a request with an error, and what it was doing with it; a program is killed by `cancel` only.
    pub(super) fn abandon(&mut self, connection: &mut Connection, tag: &str, error: Error) {
        if let Some(Job::Exec(id)) = connection.take(tag)
            && let Some(exec) = self.execs.get_mut(&id)
        {
            exec.attached = None;
        }
        connection.link.send(&Message::err(tag, error));
    }

    /// A link is gone. Its programs go on, for another link to attach to.
    fn bury(&mut self, id: u64, connection: Connection) {
        for slot in &connection.jobs {
            if let Job::Exec(exec) = slot.job
                && let Some(exec) = self.execs.get_mut(&exec)
                && exec.attached.as_ref().is_some_and(|attachment| attachment.link == id)
            {
                exec.attached = None;
            }
        }
        drop(connection);
        if let Door::Port(port) = &mut self.door {
            port.disconnected();
            self.due.insert((Instant::now() + port::PAUSE, Due::Port));
        }
    }

    /// The end of an agent that is not PID 1: nothing of it is left.
    fn end(&mut self) {
        for exec in self.execs.values() {
            exec.kill_all();
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

fn list_execs(execs: &BTreeMap<u64, Exec>, next: &mut u64, link: &mut crate::wire::Link<File>, tag: &str) -> Visit {
    for (&id, exec) in execs.range(*next..) {
        if link.queued() >= QUEUE_HIGH {
            return Visit::Idle;
        }
        link.send(&Message::item(tag, exec.row()));
        *next = id.saturating_add(1);
    }
    link.send(&Message::ok(tag, crate::wire::Fields::new()));
    Visit::Done
}

/// What the client is told when a program could not be started.
fn start_error(exec: &Exec, failure: Failure) -> Error {
    let what = match failure.stage {
        Stage::Session => "make a session",
        Stage::Terminal => "take the terminal",
        Stage::Streams => "connect the streams",
        Stage::Limits => "set the limits",
        Stage::User => "become the user",
        Stage::Directory => "enter the working directory",
        Stage::Program => "run the program",
    };
    // As shells do: 127 for what is not there, 126 for what cannot be run.
    let exit = if failure.stage == Stage::Program && failure.errno == Errno::ENOENT { 127 } else { 126 };
    Error::new(Code::ExecFailed, format!("cannot {what} for {}: {}", exec.name(), failure.errno.desc()))
        .with("errno", format!("{:?}", failure.errno))
        .with("exit", exit)
}
