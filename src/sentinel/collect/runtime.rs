//! The collecting thread: schedule, services, pool and sink around one mio loop.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mio::{Events, Poll, Token, Waker};

use super::names::Names;
use super::pool::Pool;
use super::service::{Cancelled, Finished, Io, Plan, Run, Service, split};
use super::stale::LastSeries;
use crate::sentinel::collectors;
use crate::sentinel::model::{Batch, Sample, SeriesTable};
use crate::sentinel::schedule::{Action, Counts, RunId, Schedule, Start, State};
use crate::sentinel::task::{Outcome, Refusal, Report, Reports, Sink, Task, TaskSet, TaskSource};

/// Wakes the loop; no service has this number.
const WAKER: Token = Token(usize::MAX);
/// The loop looks at the set of tasks at least this often.
const TICK: Duration = Duration::from_secs(1);
/// A batch that the sink had no room for is offered again after this.
const OFFER_AGAIN: Duration = Duration::from_millis(250);
/// Samples kept for a sink that makes its producers wait.
const MOST_KEPT: usize = 200_000;

/// How collection is set up.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Threads for what blocks, 1–256.
    pub workers: usize,
    /// Runs under way at once, 1–65,536; the others wait in order of priority.
    pub max_runs: usize,
    /// Where external plugins are: one directory each, with a `plugin.toml`.
    pub plugin_directory: Option<PathBuf>,
    /// How often the directory is searched for new, changed and removed plugins; zero: only at start.
    pub plugin_reload: Duration,
    /// Whether external plugins are asked to test the device before they measure: `sentinel plugin test`.
    pub testing: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            workers: 10,
            max_runs: 4096,
            plugin_directory: None,
            plugin_reload: Duration::from_secs(300),
            testing: false,
        }
    }
}

/// Counted by collection.
#[derive(Debug, Default)]
pub struct Stats {
    /// Samples that could not be taken: a bad name or label, or too many series.
    pub samples_refused: AtomicU64,
    /// Samples that the sink did not take.
    pub samples_dropped: AtomicU64,
    /// Staleness markers made.
    pub markers: AtomicU64,
    /// External plugins loaded.
    pub plugins: AtomicU64,
    /// Times that an external plugin was started again after it ended unasked.
    pub plugin_restarts: AtomicU64,
}

/// One task as `sentinel tasks` shows it.
#[derive(Debug, Clone)]
pub struct TaskView {
    /// Its id.
    pub id: String,
    /// What runs it.
    pub plugin: String,
    /// From slot to slot.
    pub interval: Duration,
    /// Where it is.
    pub state: State,
    /// Until its next slot.
    pub due_in: Duration,
    /// What is known of its runs.
    pub counts: Counts,
}

/// What comes to the loop from other threads.
pub(super) enum Note {
    /// A pool job came back.
    Worked(RunId, Finished),
    /// A name was looked up.
    Resolved(String, Result<Vec<std::net::IpAddr>, String>),
    /// The set of tasks may have changed.
    Look,
    /// Somebody wants to see the tasks.
    Tasks(Sender<Vec<TaskView>>),
    /// No new runs; end when none is under way, or at this time.
    Stop(Instant),
}

/// Sends notes to the loop.
#[derive(Clone)]
pub(super) struct Notes {
    sender: Sender<Note>,
    waker: Arc<Waker>,
}

impl Notes {
    pub(super) fn send(&self, note: Note) {
        // A loop that has ended needs no notes.
        if self.sender.send(note).is_ok()
            && let Err(e) = self.waker.wake()
        {
            log::error!("collect: cannot wake the loop: {e}");
        }
    }
}

/// The collecting thread, as the controller holds it.
pub struct Collector {
    notes: Notes,
    thread: Option<JoinHandle<()>>,
    stats: Arc<Stats>,
}

impl Collector {
    /// Starts collecting: the tasks in force are looked at once, before anything else.
    pub fn start(
        settings: Settings,
        source: Arc<dyn TaskSource>,
        sink: Arc<dyn Sink>,
        reports: Arc<dyn Reports>,
        table: Arc<SeriesTable>,
    ) -> io::Result<Self> {
        let stats = Arc::new(Stats::default());
        let poll = Poll::new()?;
        let (notes, inbox) = mailbox(&poll)?;
        let (own, counted) = (notes.clone(), Arc::clone(&stats));
        let thread = std::thread::Builder::new().name("collect".into()).spawn(move || {
            // Services are made here: they are not to move between threads.
            match Runtime::new(settings, poll, own, inbox, source, sink, reports, table, counted) {
                Ok(mut runtime) => {
                    while runtime.turn() {}
                    runtime.end();
                }
                Err(e) => log::error!("collect: cannot start: {e}"),
            }
        })?;
        Ok(Self { notes, thread: Some(thread), stats })
    }

    /// Says that the set of tasks has changed; without it the loop sees it within a second.
    pub fn look(&self) {
        self.notes.send(Note::Look);
    }

    /// Every task with its state, sorted by id. Empty when the thread does not answer within five seconds.
    pub fn tasks(&self) -> Vec<TaskView> {
        let (sender, receiver) = channel();
        self.notes.send(Note::Tasks(sender));
        receiver.recv_timeout(Duration::from_secs(5)).unwrap_or_default()
    }

    /// What was counted.
    pub fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    /// Starts no more runs, waits for those under way at most this long, ends the others and the plugins. The sink must
    /// still take batches.
    pub fn stop(mut self, wait: Duration) {
        self.halt(wait);
    }

    fn halt(&mut self, wait: Duration) {
        if let Some(thread) = self.thread.take() {
            self.notes.send(Note::Stop(Instant::now() + wait));
            if thread.join().is_err() {
                log::error!("collect: the collecting thread ended by a panic");
            }
        }
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.halt(Duration::ZERO);
    }
}

fn mailbox(poll: &Poll) -> io::Result<(Notes, Receiver<Note>)> {
    let waker = Arc::new(Waker::new(poll.registry(), WAKER)?);
    let (sender, inbox) = channel();
    Ok((Notes { sender, waker }, inbox))
}

/// Runs each task once, now, and gives what it measured and how it ended: `sentinel once`, `sentinel plugin test`.
pub fn once(settings: Settings, tasks: Vec<Task>, table: Arc<SeriesTable>) -> io::Result<Vec<(Report, Vec<Sample>)>> {
    #[derive(Default)]
    struct Ends {
        samples: Vec<Sample>,
        ends: Vec<(Report, Vec<Sample>)>,
    }
    struct Kept(Mutex<Ends>);
    impl Sink for Kept {
        fn offer(&self, batch: &Batch) -> Result<(), Refusal> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).samples.extend_from_slice(&batch.samples);
            Ok(())
        }
    }
    impl Reports for Kept {
        fn report(&self, report: Report) {
            let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            // A run's batch is offered right before its report.
            // A slot that comes while the task runs is none of its ends.
            if !matches!(report.outcome, Outcome::Skipped(_)) {
                let samples = std::mem::take(&mut kept.samples);
                kept.ends.push((report, samples));
            }
        }
    }
    struct Fixed(Arc<TaskSet>);
    impl TaskSource for Fixed {
        fn current(&self) -> Arc<TaskSet> {
            Arc::clone(&self.0)
        }
    }
    let ids: Vec<String> = tasks.iter().map(|task| task.id.clone()).collect();
    let tasks = tasks.into_iter().map(|task| Task { retries: 0, ..task }).collect();
    let source = Arc::new(Fixed(Arc::new(TaskSet { version: 1, tasks })));
    let kept = Arc::new(Kept(Mutex::default()));
    let poll = Poll::new()?;
    let (notes, inbox) = mailbox(&poll)?;
    let (sink, reports) = (Arc::clone(&kept), Arc::clone(&kept));
    let mut runtime = Runtime::new(settings, poll, notes, inbox, source, sink, reports, table, Arc::default())?;
    runtime.refresh();
    ids.iter().for_each(|id| runtime.schedule.run_now(id, runtime.clock.line(Instant::now())));
    let mut open: std::collections::HashSet<String> = ids.into_iter().collect();
    while !open.is_empty() && runtime.turn() {
        let kept = kept.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.ends.iter().for_each(|(report, _)| _ = open.remove(&report.task));
    }
    runtime.services.iter_mut().for_each(|service| service.close());
    let mut kept = kept.0.lock().unwrap_or_else(PoisonError::into_inner);
    let mut all = std::mem::take(&mut kept.ends);
    // A slot may have come meanwhile.
    let mut seen = std::collections::HashSet::new();
    all.retain(|(report, _)| seen.insert(report.task.clone()));
    Ok(all)
}

/// The schedule's line of time: milliseconds that agree with the wall clock at start, so that slots are the same after a
/// restart, and then go on with the monotonic clock, so that a step of the wall clock moves no slot.
#[derive(Debug, Clone, Copy)]
struct Clock {
    anchor: Instant,
    anchor_ms: u64,
}

impl Clock {
    fn new() -> Self {
        Self { anchor: Instant::now(), anchor_ms: u64::try_from(wall_ms()).unwrap_or(0) }
    }

    fn line(&self, at: Instant) -> u64 {
        let since = at.saturating_duration_since(self.anchor).as_millis();
        self.anchor_ms.saturating_add(u64::try_from(since).unwrap_or(u64::MAX))
    }

    fn instant(&self, line: u64) -> Instant {
        self.anchor + Duration::from_millis(line.saturating_sub(self.anchor_ms))
    }
}

/// Milliseconds since 1970-01-01 UTC.
fn wall_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

struct Running {
    task: Arc<Task>,
    service: usize,
    started_ms: i64,
}

struct Runtime {
    poll: Poll,
    events: Events,
    inbox: Receiver<Note>,
    clock: Clock,
    schedule: Schedule,
    services: Vec<Box<dyn Service>>,
    built_in: HashMap<&'static str, usize>,
    pool: Pool,
    names: Names,
    source: Arc<dyn TaskSource>,
    sink: Arc<dyn Sink>,
    reports: Arc<dyn Reports>,
    table: Arc<SeriesTable>,
    stats: Arc<Stats>,
    version: Option<u64>,
    plans: HashMap<String, (Arc<Task>, Plan)>,
    running: HashMap<RunId, Running>,
    last: HashMap<String, LastSeries>,
    done: Vec<(RunId, Finished)>,
    /// Batches that the sink had no room for, and how many samples they are.
    kept: VecDeque<Batch>,
    kept_samples: usize,
    stop_at: Option<Instant>,
}

impl Runtime {
    #[allow(clippy::too_many_arguments)] // the edge to the controller, named once
    fn new(
        settings: Settings,
        poll: Poll,
        notes: Notes,
        inbox: Receiver<Note>,
        source: Arc<dyn TaskSource>,
        sink: Arc<dyn Sink>,
        reports: Arc<dyn Reports>,
        table: Arc<SeriesTable>,
        stats: Arc<Stats>,
    ) -> io::Result<Self> {
        let collectors::Services { all: services, built_in } = collectors::services(&settings, &stats);
        Ok(Self {
            poll,
            events: Events::with_capacity(256),
            inbox,
            clock: Clock::new(),
            schedule: Schedule::new(settings.max_runs),
            services,
            built_in,
            pool: Pool::new(settings.workers, notes.clone()),
            names: Names::new(notes),
            source,
            sink,
            reports,
            table,
            stats,
            version: None,
            plans: HashMap::new(),
            running: HashMap::new(),
            last: HashMap::new(),
            done: Vec::new(),
            kept: VecDeque::new(),
            kept_samples: 0,
            stop_at: None,
        })
    }

    /// Does what is due and waits for what comes next. `false` when the loop is to end.
    fn turn(&mut self) -> bool {
        while let Ok(note) = self.inbox.try_recv() {
            self.note(note);
        }
        self.refresh();
        self.offer_kept();
        let now = Instant::now();
        let line = self.clock.line(now);
        while let Some(action) = self.schedule.poll(line) {
            self.act(action, now);
            self.settle();
        }
        for service in 0..self.services.len() {
            if self.services[service].wake_at().is_some_and(|at| at <= now) {
                self.with(service, now, |service, io| service.wake(io));
                self.settle();
            }
        }
        if let Some(until) = self.stop_at
            && (self.schedule.under_way() == 0 || now >= until)
        {
            return false;
        }
        self.wait()
    }

    fn wait(&mut self) -> bool {
        let now = Instant::now();
        let mut until = now + if self.kept.is_empty() { TICK } else { OFFER_AGAIN };
        let slots = self.schedule.wake_at().map(|line| self.clock.instant(line));
        let services = self.services.iter().filter_map(|service| service.wake_at());
        until = services.chain(slots).chain(self.stop_at).fold(until, Instant::min);
        match self.poll.poll(&mut self.events, Some(until.saturating_duration_since(now))) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return true,
            Err(e) => {
                log::error!("collect: cannot wait for events: {e}");
                return false;
            }
        }
        let now = Instant::now();
        let events = std::mem::replace(&mut self.events, Events::with_capacity(0));
        for event in events.iter().filter(|event| event.token() != WAKER) {
            let (service, number) = split(event.token());
            if service < self.services.len() {
                self.with(service, now, |service, io| service.ready(number, event, io));
                self.settle();
            }
        }
        self.events = events;
        true
    }

    fn note(&mut self, note: Note) {
        match note {
            Note::Worked(run, finished) => self.finished(run, finished, false),
            Note::Resolved(host, answer) => {
                let now = Instant::now();
                let (waiting, answer) = self.names.answered(&host, answer, now);
                for (service, run) in waiting {
                    let answer = answer.clone();
                    if self.running.contains_key(&run) {
                        self.with(service, now, |service, io| service.resolved(run, answer, io));
                        self.settle();
                    }
                }
            }
            Note::Look => {}
            Note::Tasks(to) => {
                // Who asked may have given up.
                let _ = to.send(self.views());
            }
            Note::Stop(until) => {
                self.schedule.stop();
                self.stop_at = Some(until);
            }
        }
    }

    fn views(&self) -> Vec<TaskView> {
        let line = self.clock.line(Instant::now());
        let view = |(task, state, due, counts): (&Arc<Task>, State, u64, &Counts)| TaskView {
            id: task.id.clone(),
            plugin: task.plugin.clone(),
            interval: task.interval,
            state,
            due_in: Duration::from_millis(due.saturating_sub(line)),
            counts: counts.clone(),
        };
        let mut views: Vec<TaskView> = self.schedule.tasks().map(view).collect();
        views.sort_by(|a, b| a.id.cmp(&b.id));
        views
    }

    /// Puts another set of tasks in force, where there is one.
    fn refresh(&mut self) {
        if self.stop_at.is_some() {
            return;
        }
        let set = self.source.current();
        if self.version == Some(set.version) {
            return;
        }
        self.version = Some(set.version);
        let now = Instant::now();
        let changes = self.schedule.replace(&set, self.clock.line(now));
        for run in &changes.ended {
            if let Some(running) = self.running.remove(run) {
                self.with(running.service, now, |service, io| service.cancel(*run, io));
            }
        }
        for id in changes.removed.iter().chain(&changes.changed) {
            self.plans.remove(id);
            for service in 0..self.services.len() {
                self.with(service, now, |service, io| service.forget(id, io));
            }
        }
        for id in &changes.removed {
            if let Some(last) = self.last.remove(id) {
                self.offer_markers(last);
            }
        }
        self.settle();
    }

    fn act(&mut self, action: Action, now: Instant) {
        match action {
            Action::Start(start) => self.begin(start, now),
            Action::Expire(run) => self.expire(run, now),
            Action::Skipped { task, reason, slots } => {
                let report = |outcome| Report {
                    task: task.id.clone(),
                    started_ms: wall_ms(),
                    duration: Duration::ZERO,
                    samples: 0,
                    outcome,
                };
                // Thousands of slots of a suspended machine are one line in the core's list, but all are counted.
                (0..slots.min(1000)).for_each(|_| self.reports.report(report(Outcome::Skipped(reason))));
            }
        }
    }

    fn begin(&mut self, start: Start, now: Instant) {
        let task = start.task;
        // What is not built in may be a program in the plugin directory.
        let external = self.services.len() - 1;
        let service = self.built_in.get(task.plugin.as_str()).copied().unwrap_or(external);
        self.running.insert(start.run, Running { task: Arc::clone(&task), service, started_ms: wall_ms() });
        let plan = match self.plans.get(&task.id) {
            Some((planned, plan)) if Arc::ptr_eq(planned, &task) => Ok(Arc::clone(plan)),
            _ => self.services[service].prepare(&task),
        };
        let plan = match plan {
            Ok(plan) => plan,
            Err(e) => return self.finished(start.run, Finished::failure(e.to_string()), false),
        };
        self.plans.insert(task.id.clone(), (Arc::clone(&task), Arc::clone(&plan)));
        let deadline = self.clock.instant(start.deadline);
        let run = Run { id: start.run, task, plan, started_ms: wall_ms(), started: now, deadline };
        self.with(service, now, |service, io| service.begin(run, io));
    }

    fn expire(&mut self, run: RunId, now: Instant) {
        let Some(running) = self.running.get(&run) else { return };
        let (service, limit) = (running.service, running.task.timeout);
        let (mut finished, held) = match self.with(service, now, |service, io| service.cancel(run, io)) {
            Cancelled::Gone(finished) => (finished, false),
            Cancelled::Held => (Finished::default(), true),
        };
        let error = format!("took longer than its timeout of {} ms", limit.as_millis());
        finished.error = Some(match finished.error {
            Some(more) => format!("{error}: {more}"),
            None => error,
        });
        self.finished(run, finished, held);
    }

    fn with<R>(&mut self, service: usize, now: Instant, call: impl FnOnce(&mut dyn Service, &mut Io<'_>) -> R) -> R {
        let mut io = Io {
            now,
            table: &self.table,
            service,
            registry: self.poll.registry(),
            pool: &mut self.pool,
            names: &mut self.names,
            done: &mut self.done,
        };
        call(&mut *self.services[service], &mut io)
    }

    /// Takes the ends of runs that services have told.
    fn settle(&mut self) {
        while let Some((run, finished)) = self.done.pop() {
            self.finished(run, finished, false);
        }
    }

    fn finished(&mut self, run: RunId, finished: Finished, held: bool) {
        let Some(running) = self.running.remove(&run) else {
            self.schedule.release(run);
            return;
        };
        let Finished { gathered, mut error } = finished;
        let task = running.task;
        if let Some((count, why)) = &gathered.refused {
            self.stats.samples_refused.fetch_add(*count, Ordering::Relaxed);
            log::warn!("collect: task {}: {count} samples could not be taken, the first because {why}", task.id);
        }
        let mut batch = Batch { samples: gathered.samples };
        let measured = batch.samples.len() + gathered.timed.len();
        self.last.entry(task.id.clone()).or_default().update(&mut batch.samples, running.started_ms);
        let markers = batch.samples.len() + gathered.timed.len() - measured;
        self.stats.markers.fetch_add(markers as u64, Ordering::Relaxed);
        batch.samples.extend(gathered.timed);
        if let Err(refused) = self.offer(batch) {
            error.get_or_insert(refused);
        }
        let result = match &error {
            None => Ok(measured as u64),
            Some(error) => Err(error.clone()),
        };
        let ended = self.schedule.finish(run, result, held, self.clock.line(Instant::now()));
        if let Some(error) = &error {
            let again = if ended.as_ref().is_some_and(|ended| ended.retried) { "; it is tried again" } else { "" };
            log::debug!("collect: task {} failed: {error}{again}", task.id);
        }
        self.reports.report(Report {
            task: task.id.clone(),
            started_ms: running.started_ms,
            duration: Duration::from_millis(ended.map_or(0, |ended| ended.duration)),
            samples: measured as u64,
            outcome: error.map_or(Outcome::Success, Outcome::Failed),
        });
    }

    fn offer_markers(&mut self, last: LastSeries) {
        let samples = last.end(wall_ms());
        self.stats.markers.fetch_add(samples.len() as u64, Ordering::Relaxed);
        if let Err(e) = self.offer(Batch { samples }) {
            log::debug!("collect: staleness markers were not taken: {e}");
        }
    }

    /// Hands a batch to the sink, after those that it had no room for: a series stays in time order.
    fn offer(&mut self, batch: Batch) -> Result<(), String> {
        if batch.samples.is_empty() {
            return Ok(());
        }
        let refusal = if self.kept.is_empty() { self.sink.offer(&batch) } else { Err(Refusal::Busy) };
        let count = batch.samples.len();
        match refusal {
            Ok(()) => return Ok(()),
            Err(Refusal::Busy) if self.kept_samples + count <= MOST_KEPT => {
                self.kept_samples += count;
                self.kept.push_back(batch);
                return Ok(());
            }
            Err(_) => {}
        }
        self.stats.samples_dropped.fetch_add(count as u64, Ordering::Relaxed);
        Err(match refusal {
            Err(Refusal::Stopping) => "the sentinel is stopping".to_string(),
            _ => format!("the buffer is full; {count} samples were dropped"),
        })
    }

    fn offer_kept(&mut self) {
        while let Some(batch) = self.kept.front() {
            let count = batch.samples.len();
            match self.sink.offer(batch) {
                Err(Refusal::Busy) => return,
                Ok(()) => {}
                Err(_) => _ = self.stats.samples_dropped.fetch_add(count as u64, Ordering::Relaxed),
            }
            self.kept_samples -= count;
            self.kept.pop_front();
        }
    }

    /// Ends what runs, then says of every series that it has ended.
    fn end(&mut self) {
        let now = Instant::now();
        for run in self.schedule.runs() {
            let Some(running) = self.running.get(&run) else { continue };
            let service = running.service;
            let held = matches!(self.with(service, now, |service, io| service.cancel(run, io)), Cancelled::Held);
            self.finished(run, Finished::failure("the sentinel is stopping"), held);
        }
        self.services.iter_mut().for_each(|service| service.close());
        for (_, last) in std::mem::take(&mut self.last) {
            self.offer_markers(last);
        }
        self.offer_kept();
        self.stats.samples_dropped.fetch_add(self.kept_samples as u64, Ordering::Relaxed);
    }
}
