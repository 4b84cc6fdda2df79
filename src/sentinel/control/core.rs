//! The core, seen from here: registration, signs of life, tasks, reports. Its own thread, apart from the data path: no
//! start and no collection ever waits for it.
//!
//! ```text
//! POST /api/v1/register   {id, name, region, labels, version, os, arch}        → 2xx (or 409: known already)
//! POST /api/v1/heartbeat  {id, state, uptime_s, cpu_percent, …}                → 2xx {tasks_version?, config_version?}
//! GET  /api/v1/config?id=ID                                                    → 200 {version, config}
//! GET  /api/v1/tasks?id=ID&version=VERSION                                     → 200 {version, tasks}, 304: unchanged
//! POST /api/v1/metadata   {id, metadata: [{name, type}]}                       → 2xx
//! POST /api/v1/reports    {id, reports: [{task, started, duration_ms, samples, status, error?}]} → 2xx
//! ```

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::seal;
use super::state::{Shared, State};
use super::system;
use super::taskbook::TaskBook;
use crate::outbound::{Answered, BreakerState, Clock, Guard, Policy};
use crate::sentinel::collect::Stats;
use crate::sentinel::collectors::BUILT_IN;
use crate::sentinel::config::{Config, TaskEntry};
use crate::sentinel::http::{Abort, Client, HttpError, Request, Response, Url};
use crate::sentinel::model::{Kind, SeriesTable};
use crate::sentinel::secret::Secret;
use crate::sentinel::task::{Outcome, Report, Task, TaskSource};

/// Longest answer of the core, in octets.
const MAX_ANSWER: usize = 16 * 1024 * 1024;
/// Most tasks that are taken from it.
const MAX_TASKS: usize = 100_000;
/// Reports sent together.
const REPORTS: usize = 1000;
/// Longest time that the core is left alone after it did not answer several times; no longer than two heartbeats.
const LONGEST_REST: Duration = Duration::from_secs(60);

/// What it counts.
#[derive(Debug, Clone, Default)]
pub struct CoreStats {
    /// Whether the core knows us.
    pub registered: bool,
    /// Where its breaker stands.
    pub breaker: BreakerState,
    /// Heartbeats that were answered.
    pub heartbeats: u64,
    /// Those that were not, after all tries.
    pub heartbeats_failed: u64,
    /// Tasks that the core gave and that are none, the last time.
    pub tasks_refused: u64,
    /// The last error, until there was a success.
    pub last_error: Option<String>,
}

/// The core of a configuration, with what is needed to speak to it.
pub struct CoreOptions {
    url: Url,
    token: Secret,
    id: String,
    name: String,
    region: String,
    labels: BTreeMap<String, String>,
    heartbeat: Duration,
    timeout: Duration,
    tries: u32,
    fetch: Duration,
    task_limit: Duration,
    cache: PathBuf,
    directory: PathBuf,
    client: Client,
}

impl CoreOptions {
    /// Nothing when the configuration has no core. Reads the token and the TLS files.
    pub fn new(config: &Config, id: &str) -> Result<Option<Self>, String> {
        if config.core.url.is_empty() {
            return Ok(None);
        }
        let url = Url::parse(&config.core.url).map_err(|e| format!("core.url: {e}"))?;
        let timeout = Duration::from_secs(config.heartbeat.timeout_s);
        let client = Client::new(url.clone(), &config.core_tls(), timeout).map_err(|e| format!("core: {e}"))?;
        Ok(Some(Self {
            url,
            token: crate::sentinel::config::secret("core.token", &config.core.token)?,
            id: id.to_string(),
            name: config.name.clone(),
            region: config.region.clone(),
            labels: config.labels.clone(),
            heartbeat: Duration::from_secs(config.heartbeat.interval_s),
            timeout,
            tries: u32::try_from(config.heartbeat.retries).unwrap_or(u32::MAX),
            fetch: Duration::from_secs(config.collector.fetch_s),
            task_limit: Duration::from_secs(config.collector.task_limit_s),
            cache: config.paths.data.join("core-tasks"),
            directory: config.paths.data.clone(),
            client,
        }))
    }

    /// Registers once: `sentinel register`.
    pub fn register(&mut self) -> Result<(), String> {
        let deadline = Instant::now() + self.policy().deadline;
        self.register_by(deadline)
    }

    fn register_by(&mut self, deadline: Instant) -> Result<(), String> {
        let body = json!({
            "id": self.id, "name": self.name, "region": self.region, "labels": self.labels,
            "version": env!("CARGO_PKG_VERSION"), "os": std::env::consts::OS, "arch": std::env::consts::ARCH,
        });
        match self.ask("POST", "/api/v1/register", Some(&body), deadline) {
            Ok(answer) if answer.is_success() || answer.status == 409 => Ok(()),
            Ok(answer) => Err(format!("{}: registration: status {}", self.url, answer.status)),
            Err(e) => Err(format!("{}: registration: {e}", self.url)),
        }
    }

    fn policy(&self) -> Policy {
        Policy { open: LONGEST_REST.min(self.heartbeat * 2), deadline: self.timeout, ..Policy::default() }
    }

    fn ask(
        &mut self,
        method: &str,
        path: &str,
        body: Option<&Value>,
        deadline: Instant,
    ) -> Result<Response, HttpError> {
        let target = self.url.join(path).target;
        let bearer = Secret::new(format!("Bearer {}", self.token.reveal()));
        let mut headers = vec![("Content-Type", "application/json")];
        if !self.token.is_empty() {
            headers.push(("Authorization", bearer.reveal()));
        }
        let body = body.map(Value::to_string).unwrap_or_default();
        let request = Request { method, target: &target, headers: &headers, body: body.as_bytes(), keep: MAX_ANSWER };
        self.client.send_by(&request, deadline)
    }
}

struct Control {
    stop: AtomicBool,
    stats: Mutex<CoreStats>,
    changed: Condvar,
}

impl Control {
    fn stats(&self) -> MutexGuard<'_, CoreStats> {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Clock for Control {
    fn now(&self) -> Instant {
        Instant::now()
    }

    /// Waits, unless the thread is to end.
    fn wait(&self, time: Duration) -> bool {
        let stats = self.stats();
        let waiting = |_: &mut CoreStats| !self.stop.load(Ordering::Acquire);
        drop(self.changed.wait_timeout_while(stats, time, waiting).unwrap_or_else(PoisonError::into_inner));
        !self.stop.load(Ordering::Acquire)
    }
}

/// Puts a configuration of the core's in force, or says why it cannot be and leaves everything as it was. Gets its version
/// and its text; comes back soon after the last argument says so.
pub type Configure = dyn Fn(&str, &str, &dyn Fn() -> bool) -> Result<(), String> + Send;

/// What the core is told of besides tasks.
#[derive(Clone)]
pub struct Told {
    /// Names and kinds of metrics, where samples themselves go elsewhere (`sender.mode = "hybrid"`).
    pub metadata: Option<Arc<SeriesTable>>,
    /// Counts plugins, once there is a collector.
    pub collected: Arc<OnceLock<Arc<Stats>>>,
}

/// The thread that speaks to the core; ends when this is dropped.
pub struct CoreLink {
    control: Arc<Control>,
    abort: Abort,
    thread: Option<JoinHandle<()>>,
}

impl CoreLink {
    /// Starts it. The cached tasks are in force when this returns. `config_version`: of the core's configuration in force.
    pub fn start(
        options: CoreOptions,
        book: Arc<TaskBook>,
        state: Arc<Shared>,
        config_version: String,
        configure: Box<Configure>,
        told: Told,
    ) -> Result<Self, HttpError> {
        let control =
            Arc::new(Control { stop: AtomicBool::new(false), stats: Mutex::default(), changed: Condvar::new() });
        let abort = options.client.abort_handle();
        book.keep_reports(true);
        let key = seal::key(&options.directory, &options.token).map_err(HttpError::Io)?;
        let guard = Guard::new(options.policy(), Arc::as_ptr(&control) as u64);
        let mut work = Work {
            options,
            guard,
            key,
            book,
            state,
            control: Arc::clone(&control),
            started: Instant::now(),
            cpu: None,
            config_version,
            config_refused: None,
            configure,
            told,
            metadata: BTreeMap::new(),
        };
        work.recall();
        let thread = thread::Builder::new().name("core".into()).spawn(move || work.run()).map_err(HttpError::Io)?;
        Ok(Self { control, abort, thread: Some(thread) })
    }

    /// What it has counted.
    pub fn stats(&self) -> CoreStats {
        self.control.stats().clone()
    }
}

impl Drop for CoreLink {
    fn drop(&mut self) {
        let stats = self.control.stats();
        self.control.stop.store(true, Ordering::Release);
        drop(stats);
        self.control.changed.notify_all();
        self.abort.abort();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Work {
    options: CoreOptions,
    guard: Guard,
    key: seal::Key,
    book: Arc<TaskBook>,
    state: Arc<Shared>,
    control: Arc<Control>,
    started: Instant,
    /// CPU seconds at some time before.
    cpu: Option<(Instant, f64)>,
    /// In force; empty: none of the core's is.
    config_version: String,
    /// The last one that could not be put in force, and why.
    config_refused: Option<(String, String)>,
    configure: Box<Configure>,
    told: Told,
    /// What the core knows already.
    metadata: BTreeMap<String, Kind>,
}

impl Work {
    fn run(mut self) {
        if !self.register() {
            return;
        }
        self.state.go(State::Running);
        // Both at once, not after their first interval.
        let (mut beat_at, mut fetch_at) = (Instant::now(), Instant::now());
        loop {
            let now = Instant::now();
            if now >= fetch_at {
                self.fetch();
                fetch_at = now + self.options.fetch;
            }
            if now >= beat_at {
                if self.heartbeat() {
                    fetch_at = now;
                }
                self.report();
                self.describe();
                beat_at = now + self.options.heartbeat;
            }
            let next = beat_at.min(fetch_at).saturating_duration_since(Instant::now());
            if !self.control.wait(next) {
                self.report();
                return;
            }
        }
    }

    /// Until it has worked; false: it is to stop.
    fn register(&mut self) -> bool {
        loop {
            let wait = match self.guard.admit(self.control.now()) {
                Ok(deadline) => {
                    let result = self.options.register_by(deadline);
                    // Also a refusal: nothing else can be asked before it is taken.
                    let outcome = if result.is_ok() { Answered::Reached } else { Answered::Failed(None) };
                    let wait = self.guard.note(self.control.now(), outcome);
                    self.control.stats().breaker = self.guard.state();
                    match result {
                        Ok(()) => {
                            self.succeed();
                            self.control.stats().registered = true;
                            return true;
                        }
                        Err(sentence) => self.fail(sentence),
                    }
                    wait
                }
                Err(left) => left,
            };
            if !self.control.wait(wait) {
                return false;
            }
        }
    }

    /// Whether the core has other tasks than those in force.
    fn heartbeat(&mut self) -> bool {
        let body = self.vital_signs();
        match self.ask(self.options.tries, "POST", "/api/v1/heartbeat", Some(&body)) {
            Ok(answer) if answer.is_success() => {
                self.succeed();
                self.control.stats().heartbeats += 1;
                let answer: Value = serde_json::from_slice(&answer.body).unwrap_or(Value::Null);
                if let Some(version) = answer["config_version"].as_str() {
                    self.configure(version);
                }
                let version = answer["tasks_version"].as_str();
                return version.is_some_and(|version| version != self.book.core_version());
            }
            Ok(answer) => self.fail(format!("{}: heartbeat: status {}", self.options.url, answer.status)),
            Err(e) => self.fail(format!("{}: heartbeat: {e}", self.options.url)),
        }
        self.control.stats().heartbeats_failed += 1;
        false
    }

    /// Asks the core, unless it is left alone for a while because it did not answer several times.
    fn ask(&mut self, tries: u32, method: &str, path: &str, body: Option<&Value>) -> Result<Response, String> {
        let Self { options, guard, control, .. } = self;
        let answered = |result: &Result<Response, HttpError>| match result {
            Ok(answer) if !matches!(answer.status, 408 | 429 | 500..) => Answered::Reached,
            _ => Answered::Failed(None),
        };
        let result = guard.call(&**control, tries, |deadline| options.ask(method, path, body, deadline), answered);
        control.stats().breaker = guard.state();
        match result {
            Ok(result) => result.map_err(|e| e.to_string()),
            Err(refused) => Err(refused.to_string()),
        }
    }

    /// Fetches the core's configuration, unless its version is in force or was refused.
    fn configure(&mut self, version: &str) {
        let refused = self.config_refused.as_ref().is_some_and(|(refused, _)| refused == version);
        if version.is_empty() || version == self.config_version || refused {
            return;
        }
        let result = match self.ask(1, "GET", &format!("/api/v1/config?id={}", self.options.id), None) {
            Ok(answer) if answer.status == 200 => {
                serde_json::from_slice::<Value>(&answer.body).map_err(|e| e.to_string())
            }
            // Asked again with the next heartbeat.
            Ok(answer) => return self.fail(format!("{}: config: status {}", self.options.url, answer.status)),
            Err(e) => return self.fail(format!("{}: config: {e}", self.options.url)),
        };
        let result = result.and_then(|answer| {
            let version = answer["version"].as_str().filter(|text| text.len() <= 256).ok_or("no version")?.to_string();
            let text = answer["config"].as_str().ok_or("no text")?;
            let control = &self.control;
            (self.configure)(&version, text, &|| control.stop.load(Ordering::Acquire))?;
            Ok(version)
        });
        match result {
            Ok(version) => {
                log::info!("core: configuration {version:?} is in force");
                (self.config_version, self.config_refused) = (version, None);
            }
            Err(message) => {
                log::error!("core: configuration {version:?} is refused, the one before stays: {message}");
                self.config_refused = Some((version.to_string(), message));
            }
        }
    }

    fn vital_signs(&mut self) -> Value {
        let usage = system::usage();
        let now = Instant::now();
        let (since, before) = self.cpu.replace((now, usage.cpu_seconds)).unwrap_or((self.started, 0.0));
        let passed = now.duration_since(since).as_secs_f64().max(0.001);
        let (memory, available) = system::memory();
        let (disk, free) = system::disk(&self.options.directory);
        json!({
            "id": self.options.id,
            "version": env!("CARGO_PKG_VERSION"),
            "state": self.state.get().name(),
            "uptime_s": self.started.elapsed().as_secs(),
            "cpu_percent": (usage.cpu_seconds - before) / passed * 100.0,
            "memory_bytes": usage.resident_bytes,
            "host_memory_bytes": memory, "host_memory_available_bytes": available,
            "disk_bytes": disk, "disk_free_bytes": free,
            "plugins": BUILT_IN.len() as u64 + self.told.collected.get().map_or(0, |stats| stats.plugins.load(Ordering::Relaxed)),
            "tasks": self.book.current().tasks.len(),
            "tasks_version": self.book.core_version(),
            "config_version": self.config_version,
            "config_refused": self.config_refused.as_ref().map(|(version, message)| {
                json!({"version": version, "error": message})
            }),
        })
    }

    fn fetch(&mut self) {
        let version: String = self.book.core_version().bytes().map(|octet| format!("%{octet:02x}")).collect();
        let path = format!("/api/v1/tasks?id={}&version={version}", self.options.id);
        match self.ask(1, "GET", &path, None) {
            Ok(answer) if answer.status == 304 => self.succeed(),
            Ok(answer) if answer.status == 200 => match self.accept(&answer.body) {
                Ok(()) => {
                    self.succeed();
                    if let Err(e) = self.key.store(&self.options.cache, &answer.body) {
                        log::warn!("the core's tasks cannot be kept: {e}");
                    }
                }
                Err(message) => self.fail(format!("{}: tasks: {message}", self.options.url)),
            },
            Ok(answer) => self.fail(format!("{}: tasks: status {}", self.options.url, answer.status)),
            Err(e) => self.fail(format!("{}: tasks: {e}", self.options.url)),
        }
    }

    /// Takes over a set of tasks. One that is none is left out and counted; the others are not its victims.
    fn accept(&mut self, body: &[u8]) -> Result<(), String> {
        let mut body: Value = serde_json::from_slice(body).map_err(|e| format!("no JSON: {e}"))?;
        let version = body["version"].as_str().filter(|text| text.len() <= 256).ok_or("no version")?.to_string();
        let Value::Array(entries) = body["tasks"].take() else { return Err("no list of tasks".into()) };
        if entries.len() > MAX_TASKS {
            return Err(format!("{} tasks, the limit is {MAX_TASKS}", entries.len()));
        }
        let mut tasks: Vec<Task> = Vec::new();
        let mut seen = std::collections::HashSet::new();
        let mut refused = 0;
        for entry in entries {
            match TaskEntry::from_core(entry) {
                Ok(entry) if seen.insert(entry.id.clone()) => tasks.push(entry.task(self.options.task_limit)),
                Ok(entry) => {
                    refused += 1;
                    log::warn!("core: task {:?} occurs twice", entry.id);
                }
                Err(message) => {
                    refused += 1;
                    log::warn!("core: a task is none: {message}");
                }
            }
        }
        self.control.stats().tasks_refused = refused;
        log::info!("core: {} tasks, version {version:?}", tasks.len());
        self.book.set_from_core(version, tasks);
        Ok(())
    }

    /// The tasks of the last time, until the core says otherwise.
    fn recall(&mut self) {
        if let Some(body) = self.key.load(&self.options.cache)
            && let Err(message) = self.accept(&body)
        {
            log::warn!("the cached tasks cannot be used: {message}");
        }
    }

    fn report(&mut self) {
        loop {
            let reports = self.book.take_reports(REPORTS);
            if reports.is_empty() {
                return;
            }
            let list: Vec<Value> = reports.iter().map(report).collect();
            let body = json!({ "id": self.options.id, "reports": list });
            match self.ask(1, "POST", "/api/v1/reports", Some(&body)) {
                Ok(answer) if answer.is_success() => {}
                // It will never take them.
                Ok(answer) if (400..500).contains(&answer.status) && answer.status != 429 => {
                    self.fail(format!("{}: reports: status {}", self.options.url, answer.status));
                }
                result => {
                    self.book.put_back(reports);
                    let status = result.map(|answer| answer.status);
                    return self.fail(format!("{}: reports: {status:?}", self.options.url));
                }
            }
        }
    }

    /// Tells the core of names that it does not know, or whose kind has changed.
    fn describe(&mut self) {
        let Some(table) = self.told.metadata.clone() else { return };
        let known = table.kinds();
        // A name that is gone and comes back is told again.
        self.metadata.retain(|name, _| known.contains_key(name));
        let new: Vec<(String, Kind)> =
            known.into_iter().filter(|(name, kind)| self.metadata.get(name) != Some(kind)).collect();
        for part in new.chunks(REPORTS) {
            let list: Vec<Value> = part.iter().map(|(name, kind)| json!({"name": name, "type": kind.name()})).collect();
            let body = json!({ "id": self.options.id, "metadata": list });
            match self.ask(1, "POST", "/api/v1/metadata", Some(&body)) {
                Ok(answer) if answer.is_success() => self.metadata.extend(part.iter().cloned()),
                Ok(answer) => return self.fail(format!("{}: metadata: status {}", self.options.url, answer.status)),
                Err(e) => {
                    let url = &self.options.url;
                    return self.fail(format!("{url}: metadata: {e}"));
                }
            }
        }
    }

    fn succeed(&self) {
        if self.control.stats().last_error.take().is_some() {
            log::info!("core: works again");
        }
    }

    fn fail(&self, sentence: String) {
        let mut stats = self.control.stats();
        if stats.last_error.as_ref() != Some(&sentence) {
            log::warn!("core: {sentence}");
            stats.last_error = Some(sentence);
        }
    }
}

fn report(report: &Report) -> Value {
    let (status, error) = match &report.outcome {
        Outcome::Success => ("success", None),
        Outcome::Skipped(reason) => ("skipped", Some(reason.to_string())),
        Outcome::Failed(error) => ("failed", Some(error.clone())),
    };
    json!({
        "task": report.task, "started": report.started_ms, "duration_ms": report.duration.as_millis() as u64,
        "samples": report.samples, "status": status, "error": error,
    })
}
