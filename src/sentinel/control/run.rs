//! From start to end.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::{SigSet, Signal};
use serde_json::json;

use super::core::{CoreLink, CoreOptions, Told};
use super::intake::Intake;
use super::logfile;
use super::metrics::{self, Snapshot};
use super::privileges;
use super::seal::replace;
use super::socket;
use super::state::{Shared, State};
use super::system;
use super::taskbook::TaskBook;
use crate::sentinel::aggregate::Aggregator;
use crate::sentinel::collect::{Collector, Settings, Stats};
use crate::sentinel::collectors::BUILT_IN;
use crate::sentinel::config::{BufferMode, Config, Overlay, SenderMode, Source};
use crate::sentinel::http::{Answer, Server};
use crate::sentinel::log::files::{Disk, Files, Memory};
use crate::sentinel::log::{Fsync, Log};
use crate::sentinel::model::SeriesTable;
use crate::sentinel::process::Processor;
use crate::sentinel::send::{Lane, LaneOptions};
use crate::sentinel::task::{Reports, Sink, TaskSource};

/// Running tasks are waited for at most this long when it is to end.
const STOP_WAIT: Duration = Duration::from_secs(30);
/// What the lanes have then for what is in the buffer.
const FLUSH_WAIT: Duration = Duration::from_secs(5);
/// How often the configuration file is looked at.
const WATCH: Duration = Duration::from_secs(2);
/// How often series that are gone are forgotten.
const SWEEP: Duration = Duration::from_secs(60);
/// In the data directory while a sentinel runs.
const RUNNING: &str = "running";

enum Event {
    Stop,
    /// With where to say what became of it.
    Reload(Option<Sender<Result<(), String>>>),
    /// The core's configuration: version, text, and where to say what became of it.
    Overlay(String, String, Sender<Result<(), String>>),
}

/// What the core set the last time, in the data directory: a line with its version, then its text.
const OVERLAY: &str = "core-config";

/// The parts that run, shared with those who show them.
struct Parts {
    events: Mutex<Sender<Event>>,
    state: Arc<Shared>,
    started: Instant,
    unclean: bool,
    id: String,
    log: Arc<Log>,
    table: Arc<SeriesTable>,
    intake: Arc<Intake>,
    book: Arc<TaskBook>,
    collected: Arc<OnceLock<Arc<Stats>>>,
    live: Mutex<Live>,
}

/// Those that a reload changes.
struct Live {
    /// The file's, with what the core set.
    config: Config,
    /// What the core set, and its version.
    overlay: (String, Overlay),
    lanes: Vec<Lane>,
    core: Option<CoreLink>,
    collector: Option<Collector>,
    reloads: (u64, u64, bool),
}

/// Runs a sentinel until it is told to end: by SIGTERM, SIGINT or its control socket. SIGHUP reads the configuration
/// again, and so does a change of the file.
pub fn run(source: &Source) -> Result<(), String> {
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]);
    // Before any thread is started, so that none of them is interrupted.
    signals.thread_block().map_err(|e| format!("signals: {e}"))?;
    // Before it is read, so that a change made while this starts is seen as one.
    let seen = modified(&source.path);
    let config = source.load().map_err(|e| e.to_string())?;
    if source.node {
        privileges::give_up(&config.paths.data)?;
    }
    no_core_dumps();
    let (events, inbox) = channel();
    let parts = Arc::new(start(config, &events)?);
    watch_signals(signals, events.clone()).map_err(|e| format!("signals: {e}"))?;
    serve_socket(&parts, &events)?;
    let server = serve_metrics(&parts)?;
    tick(&parts).map_err(|e| format!("threads: {e}"))?;
    let marker = parts.live().config.paths.data.join(RUNNING);
    replace(&marker, b"").map_err(|e| format!("{}: {e}", marker.display()))?;
    wait(&parts, source, seen, &inbox);
    parts.state.go(State::Stopping);
    stop(&parts)?;
    drop(server);
    let _ = fs::remove_file(marker);
    parts.state.go(State::Stopped);
    Ok(())
}

/// Secrets are in this process's memory.
fn no_core_dumps() {
    if let Err(e) = nix::sys::prctl::set_dumpable(false) {
        log::warn!("core dumps cannot be switched off: {e}");
    }
    if let Err(e) = nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0) {
        log::warn!("core dumps cannot be limited: {e}");
    }
}

/// What the core set the last time. What cannot be used any more is left out: the core will say it again.
fn recall(config: Config) -> (Config, (String, Overlay)) {
    let none = (String::new(), Overlay::default());
    let Ok(text) = fs::read_to_string(config.paths.data.join(OVERLAY)) else { return (config, none) };
    let recalled = text.split_once('\n').ok_or_else(|| "no version".to_string()).and_then(|(version, text)| {
        let overlay = Overlay::parse(text)?;
        Ok((config.clone().overlaid(&overlay)?, (version.to_string(), overlay)))
    });
    recalled.unwrap_or_else(|message| {
        log::warn!("what the core set the last time cannot be used: {message}");
        (config, none)
    })
}

/// Lets the main thread put a configuration of the core's in force.
fn configure(events: &Sender<Event>) -> Box<super::core::Configure> {
    let events = events.clone();
    Box::new(move |version, text, stop| {
        let (sender, receiver) = channel();
        let event = Event::Overlay(version.to_string(), text.to_string(), sender);
        events.send(event).map_err(|_| "stopping".to_string())?;
        loop {
            match receiver.recv_timeout(Duration::from_millis(100)) {
                Ok(result) => return result,
                Err(RecvTimeoutError::Timeout) if !stop() => {}
                Err(_) => return Err("stopping".into()),
            }
        }
    })
}

fn start(config: Config, events: &Sender<Event>) -> Result<Parts, String> {
    let data = config.paths.data.clone();
    let failed = |what: &str, e: &dyn std::fmt::Display| format!("{what}: {e}");
    let (config, overlay) =
        if config.core.url.is_empty() { (config, (String::new(), Overlay::default())) } else { recall(config) };
    logfile::apply(&config.log)?;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&data)
        .map_err(|e| failed(&data.display().to_string(), &e))?;
    let id = identity(&config, &data)?;
    // Everything that can be wrong with the configuration, before anything is running.
    let options = config.lanes()?;
    check_tls(&options)?;
    let core = CoreOptions::new(&config, &id)?;
    let table = Arc::new(SeriesTable::new(config.collector.max_series as usize));
    let processor =
        Processor::new(labels(&config), &config.rule, Arc::clone(&table)).map_err(|e| failed("rule", &e))?;
    let aggregator = Aggregator::new(&config.aggregate, Arc::clone(&table)).map_err(|e| failed("aggregate", &e))?;
    let files: Arc<dyn Files> = match config.buffer.mode {
        BufferMode::Memory => Arc::new(Memory::default()),
        BufferMode::Disk => {
            let directory = data.join("buffer");
            Arc::new(Disk::take(&directory).map_err(|e| failed(&directory.display().to_string(), &e))?)
        }
    };
    let unclean = data.join(RUNNING).exists();
    let names: Vec<String> = options.iter().map(|lane| lane.name.clone()).collect();
    let log = Log::open(files, config.log_options(), Arc::clone(&table), &names).map_err(|e| failed("buffer", &e))?;
    let log = Arc::new(log);
    let state = Arc::new(Shared::default());
    let book = Arc::new(TaskBook::default());
    book.set_own(config.tasks());
    let lanes = options
        .into_iter()
        .map(|lane| Lane::start(lane, &log, &id))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| failed("sender", &e))?;
    let collected = Arc::new(OnceLock::new());
    state.go(if core.is_some() { State::Registering } else { State::Running });
    let core = core
        .map(|options| {
            let told = told(&config, &table, &collected);
            CoreLink::start(options, Arc::clone(&book), Arc::clone(&state), overlay.0.clone(), configure(events), told)
        })
        .transpose()
        .map_err(|e| failed("core", &e))?;
    let intake = Arc::new(Intake::new(processor, aggregator, Arc::clone(&log)));
    let collector = Collector::start(
        settings(&config),
        Arc::clone(&book) as Arc<dyn TaskSource>,
        Arc::clone(&intake) as Arc<dyn Sink>,
        Arc::clone(&book) as Arc<dyn Reports>,
        Arc::clone(&table),
    )
    .map_err(|e| failed("collector", &e))?;
    let _ = collected.set(Arc::clone(collector.stats()));
    let live = Live { config, overlay, lanes, core, collector: Some(collector), reloads: (0, 0, true) };
    let events = events.clone();
    Ok(Parts {
        events: Mutex::new(events),
        state,
        started: Instant::now(),
        unclean,
        id,
        log,
        table,
        intake,
        book,
        collected,
        live: Mutex::new(live),
    })
}

fn told(config: &Config, table: &Arc<SeriesTable>, collected: &Arc<OnceLock<Arc<Stats>>>) -> Told {
    let metadata = (config.sender.mode == SenderMode::Hybrid).then(|| Arc::clone(table));
    Told { metadata, collected: Arc::clone(collected) }
}

/// The id of the configuration; else the one chosen at the first start.
fn identity(config: &Config, data: &Path) -> Result<String, String> {
    if !config.id.is_empty() {
        return Ok(config.id.clone());
    }
    let path = data.join("id");
    match fs::read_to_string(&path) {
        Ok(id) if !id.trim().is_empty() && id.len() <= 128 => return Ok(id.trim().to_string()),
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(format!("{}: {e}", path.display())),
    }
    let id = fs::read_to_string("/proc/sys/kernel/random/uuid").map_err(|e| format!("no random id: {e}"))?;
    replace(&path, id.as_bytes()).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(id.trim().to_string())
}

fn labels(config: &Config) -> std::collections::BTreeMap<String, String> {
    let mut labels = config.labels.clone();
    for (name, value) in [("sentinel", &config.name), ("region", &config.region)] {
        if !value.is_empty() {
            labels.entry(name.to_string()).or_insert_with(|| value.clone());
        }
    }
    labels
}

/// How collection is set up.
pub fn settings(config: &Config) -> Settings {
    let directory = &config.plugins.directory;
    Settings {
        workers: config.collector.workers as usize,
        plugin_directory: (!directory.as_os_str().is_empty()).then(|| directory.clone()),
        plugin_reload: Duration::from_secs(config.plugins.reload_s),
        ..Settings::default()
    }
}

fn check_tls(lanes: &[LaneOptions]) -> Result<(), String> {
    for lane in lanes.iter().filter(|lane| lane.url.tls) {
        lane.tls.load().map_err(|e| format!("target {}: {e}", lane.name))?;
    }
    Ok(())
}

fn watch_signals(signals: SigSet, events: Sender<Event>) -> io::Result<()> {
    thread::Builder::new().name("signals".into()).spawn(move || {
        while let Ok(signal) = signals.wait() {
            let event = if signal == Signal::SIGHUP { Event::Reload(None) } else { Event::Stop };
            if events.send(event).is_err() {
                return;
            }
        }
    })?;
    Ok(())
}

fn serve_socket(parts: &Arc<Parts>, events: &Sender<Event>) -> Result<(), String> {
    let path = parts.live().config.paths.data.join(socket::SOCKET);
    let (parts, events) = (Arc::clone(parts), events.clone());
    let answer = move |word: &str| match word {
        "status" => parts.status().to_string(),
        "tasks" => parts.tasks().to_string(),
        "stop" => {
            let _ = events.send(Event::Stop);
            json!({"ok": true}).to_string()
        }
        "reload" => {
            let (sender, receiver) = channel();
            let _ = events.send(Event::Reload(Some(sender)));
            match receiver.recv_timeout(Duration::from_secs(20)) {
                Ok(Ok(())) => json!({"ok": true}).to_string(),
                Ok(Err(message)) => json!({"ok": false, "error": message}).to_string(),
                Err(_) => json!({"ok": false, "error": "no answer in time"}).to_string(),
            }
        }
        _ => json!({"ok": false, "error": "status, tasks, reload or stop"}).to_string(),
    };
    socket::serve(&path, answer).map_err(|e| format!("{}: {e}", path.display()))
}

fn serve_metrics(parts: &Arc<Parts>) -> Result<Option<Server>, String> {
    let listen = parts.live().config.metrics.listen.clone();
    if listen.is_empty() {
        return Ok(None);
    }
    let address = listen.parse().map_err(|e| format!("metrics.listen: {e}"))?;
    let parts = Arc::clone(parts);
    let server = Server::start(address, 1024, move |request| match (&*request.method, &*request.target) {
        ("GET", "/metrics") => Answer::of("text/plain; version=0.0.4; charset=utf-8", metrics::text(&parts.snapshot())),
        ("GET", "/ready") => Answer::status(if parts.state.get() == State::Running { 200 } else { 503 }),
        _ => Answer::status(404),
    });
    let server = server.map_err(|e| format!("metrics.listen: {listen}: {e}"))?;
    log::info!("metrics at http://{}/metrics", server.address());
    Ok(Some(server))
}

/// What the log wants done now and then.
fn tick(parts: &Arc<Parts>) -> io::Result<()> {
    let parts = Arc::clone(parts);
    thread::Builder::new().name("tick".into()).spawn(move || {
        let mut swept = Instant::now();
        loop {
            let interval = match parts.live().config.log_options().fsync {
                Fsync::Interval(interval) => interval.min(Duration::from_secs(1)),
                _ => Duration::from_secs(1),
            };
            thread::sleep(interval);
            parts.intake.close_windows(Some(wall_ms()));
            parts.log.tick();
            if swept.elapsed() >= SWEEP {
                swept = Instant::now();
                parts.intake.processor().sweep();
                parts.table.sweep();
            }
        }
    })?;
    Ok(())
}

/// `seen` is what [`modified`] said of the file before the running configuration was read.
fn wait(parts: &Parts, source: &Source, mut seen: Option<(SystemTime, u64)>, inbox: &Receiver<Event>) {
    loop {
        match inbox.recv_timeout(WATCH) {
            Ok(Event::Stop) | Err(RecvTimeoutError::Disconnected) => return,
            Ok(Event::Reload(reply)) => {
                seen = modified(&source.path);
                let result = parts.reload(source);
                if let Some(reply) = reply {
                    let _ = reply.send(result);
                }
            }
            Ok(Event::Overlay(version, text, reply)) => {
                let _ = reply.send(parts.set_overlay(source, version, &text));
            }
            Err(RecvTimeoutError::Timeout) => {
                let now = modified(&source.path);
                if now != seen && now.is_some() {
                    seen = now;
                    let _ = parts.reload(source);
                }
            }
        }
    }
}

/// Milliseconds since 1970-01-01 UTC.
fn wall_ms() -> i64 {
    let since = SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// When a file was changed, and its number: an editor may put a new one in its place.
fn modified(path: &Path) -> Option<(SystemTime, u64)> {
    use std::os::unix::fs::MetadataExt;
    let meta = fs::metadata(path).ok()?;
    Some((meta.modified().ok()?, meta.ino()))
}

fn stop(parts: &Parts) -> Result<(), String> {
    let (collector, core) = {
        let live = &mut *parts.live();
        (live.collector.take(), live.core.take())
    };
    if let Some(collector) = collector {
        collector.stop(STOP_WAIT);
    }
    parts.intake.close_windows(None);
    let lanes = std::mem::take(&mut parts.live().lanes);
    parts.log.close();
    lanes.iter().for_each(Lane::drain);
    drop(core);
    let end = Instant::now() + FLUSH_WAIT;
    while Instant::now() < end && !lanes.iter().all(Lane::is_finished) {
        thread::sleep(Duration::from_millis(10));
    }
    drop(lanes);
    parts.log.finish().map_err(|e| format!("buffer: {e}"))
}

impl Parts {
    fn live(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the configuration again. One that is not good leaves everything as it is.
    fn reload(&self, source: &Source) -> Result<(), String> {
        let result = self.try_reload(source);
        let reloads = &mut self.live().reloads;
        match &result {
            Ok(()) => {
                log::info!("{}: in force", source.path.display());
                *reloads = (reloads.0 + 1, reloads.1, true);
            }
            Err(message) => {
                log::error!("the configuration stays as it was: {message}");
                *reloads = (reloads.0, reloads.1 + 1, false);
            }
        }
        result
    }

    /// Puts what the core says over what the file says, for this and the next lives.
    fn set_overlay(&self, source: &Source, version: String, text: &str) -> Result<(), String> {
        if version.contains('\n') {
            return Err("a version with a line end".into());
        }
        let overlay = Overlay::parse(text)?;
        let data = self.live().config.paths.data.clone();
        let before = std::mem::replace(&mut self.live().overlay, (version.clone(), overlay));
        let kept = self.try_reload(source).and_then(|()| {
            let file = data.join(OVERLAY);
            replace(&file, format!("{version}\n{text}").as_bytes()).map_err(|e| format!("{}: {e}", file.display()))
        });
        if kept.is_err() {
            self.live().overlay = before;
        }
        kept
    }

    fn try_reload(&self, source: &Source) -> Result<(), String> {
        let live = &mut *self.live();
        let config = source.load().map_err(|e| e.to_string())?.overlaid(&live.overlay.1)?;
        let old = &live.config;
        for (key, changed) in [
            ("id", config.id != old.id),
            ("paths.data", config.paths != old.paths),
            ("buffer.mode", config.buffer.mode != old.buffer.mode),
            ("collector", config.collector != old.collector),
            ("plugins", config.plugins != old.plugins),
            ("metrics.listen", config.metrics != old.metrics),
        ] {
            if changed {
                return Err(format!("{}: {key} can only be changed by a new start", source.path.display()));
            }
        }
        let lanes = config.lanes()?;
        check_tls(&lanes)?;
        let core_changed =
            (config.sender.mode, &config.core, &config.heartbeat, &config.name, &config.region, &config.labels)
                != (old.sender.mode, &old.core, &old.heartbeat, &old.name, &old.region, &old.labels);
        let core = if core_changed { CoreOptions::new(&config, &self.id)? } else { None };
        let processor = Processor::new(labels(&config), &config.rule, Arc::clone(&self.table))?;
        let aggregator = Aggregator::new(&config.aggregate, Arc::clone(&self.table))?;
        if config.log != old.log {
            logfile::apply(&config.log)?;
        }
        // From here on nothing is wrong with it.
        if config.rule != old.rule || labels(&config) != labels(old) {
            self.intake.set_processor(processor);
        }
        if config.aggregate != old.aggregate {
            self.intake.set_aggregator(aggregator);
        }
        self.log.set_options(config.log_options());
        self.book.set_own(config.tasks());
        if core_changed {
            live.core = None;
            if config.core.url.is_empty() {
                self.book.keep_reports(false);
                self.book.set_from_core(String::new(), Vec::new());
                self.state.go(State::Running);
            }
            if let Some(options) = core {
                self.state.go(State::Registering);
                let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
                let (book, state, version) = (Arc::clone(&self.book), Arc::clone(&self.state), live.overlay.0.clone());
                let told = told(&config, &self.table, &self.collected);
                let link = CoreLink::start(options, book, state, version, configure(&events), told);
                live.core = Some(link.map_err(|e| format!("core: {e}"))?);
            }
        }
        // A lane that did not change keeps its connection and its place.
        live.lanes.retain(|lane| lanes.contains(lane.options()));
        let names: Vec<String> = lanes.iter().map(|lane| lane.name.clone()).collect();
        self.log.set_destinations(&names).map_err(|e| format!("buffer: {e}"))?;
        for options in lanes {
            if !live.lanes.iter().any(|lane| *lane.options() == options) {
                let lane = Lane::start(options, &self.log, &self.id).map_err(|e| format!("sender: {e}"))?;
                live.lanes.push(lane);
            }
        }
        live.config = config;
        if let Some(collector) = &live.collector {
            collector.look();
        }
        Ok(())
    }

    fn snapshot(&self) -> Snapshot {
        use std::sync::atomic::Ordering::Relaxed;
        let live = self.live();
        let stats = live.collector.as_ref().map(|collector| Arc::clone(collector.stats()));
        let count = |of: fn(&Stats) -> u64| stats.as_deref().map_or(0, of);
        let options = live.config.log_options();
        Snapshot {
            state: self.state.get(),
            uptime_s: self.started.elapsed().as_secs_f64(),
            unclean: self.unclean,
            tasks: self.book.current().tasks.len(),
            runs: self.book.counts(),
            plugins: BUILT_IN.len() as u64 + count(|stats| stats.plugins.load(Relaxed)),
            plugin_restarts: count(|stats| stats.plugin_restarts.load(Relaxed)),
            log: self.log.stats(),
            log_limit: options.max_bytes,
            disk_free: system::disk(&live.config.paths.data).1,
            lanes: live.lanes.iter().map(|lane| (lane.options().name.clone(), lane.stats())).collect(),
            core: live.core.as_ref().map(CoreLink::stats),
            series: self.table.len(),
            samples_refused: count(|stats| stats.samples_refused.load(Relaxed)) + self.intake.unprocessed(),
            usage: system::usage(),
            reloads: live.reloads,
        }
    }

    fn status(&self) -> serde_json::Value {
        let now = self.snapshot();
        let targets: Vec<_> = now
            .lanes
            .iter()
            .map(|(name, lane)| {
                let (pending, since) = now.log.pending.get(name).copied().unwrap_or_default();
                json!({
                    "name": name, "sent": lane.sent_samples, "pending": pending, "oldest_ms": since,
                    "dropped": now.log.dropped_for(name), "errors": lane.errors,
                    "breaker": lane.breaker.as_str(), "paused": lane.paused,
                    "error": lane.last_error,
                })
            })
            .collect();
        let core = now.core.map(|core| {
            json!({
                "registered": core.registered, "heartbeats": core.heartbeats, "breaker": core.breaker.as_str(),
                "error": core.last_error,
            })
        });
        json!({
            "id": self.id, "state": now.state.name(), "uptime_s": now.uptime_s as u64, "tasks": now.tasks,
            "runs": {"success": now.runs.success, "failed": now.runs.failed},
            "buffer": {"accepted": now.log.accepted, "bytes": now.log.bytes, "segments": now.log.segments},
            "targets": targets, "core": core,
        })
    }

    fn tasks(&self) -> serde_json::Value {
        let live = self.live();
        let Some(collector) = &live.collector else { return json!([]) };
        collector
            .tasks()
            .iter()
            .map(|task| {
                json!({
                    "id": task.id, "plugin": task.plugin, "interval_ms": task.interval.as_millis() as u64,
                    "state": task.state.name(), "due_in_ms": task.due_in.as_millis() as u64,
                    "runs": task.counts.runs, "success": task.counts.success, "failed": task.counts.failed,
                    "retries": task.counts.retries, "skipped": task.counts.skipped,
                    "last_error": task.counts.last_error, "last_duration_ms": task.counts.last_duration,
                    "last_samples": task.counts.last_samples,
                })
            })
            .collect()
    }
}

/// Where a sentinel with this configuration is spoken to.
pub fn socket_path(source: &Source) -> Result<PathBuf, String> {
    Ok(source.data_directory()?.join(socket::SOCKET))
}
