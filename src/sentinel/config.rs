//! The sentinel's configuration file. Every key has a default; the shipped example (`rootfs/sentinel/sentinel.toml`)
//! shows them all. A mistake is an error that names file, line and key, and leaves a running sentinel as it is.
//!
//! A secret is given as it is (then the file must have mode 0600), as `${NAME}` from the environment, or as
//! `file:/path` (that file must have mode 0600). It is never shown.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use super::http::{TlsOptions, Url};
use super::log::{Fsync, Options, Policy};
use super::model::{is_label_name, is_series_name};
use super::process::Rule;
use super::secret::Secret;
use super::send::{LaneOptions, Protocol};
use super::task::Task;
use crate::node::config::{ConfigError, Place, within};

/// More than this is no configuration file.
const MAX_FILE: u64 = 4 * 1024 * 1024;
/// Shortest interval of a task.
const MIN_INTERVAL_MS: u64 = 100;

/// The whole file.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Who this is; empty: chosen at the first start and kept.
    pub id: String,
    /// For people.
    pub name: String,
    /// Where it stands.
    pub region: String,
    /// Added to every series that has no label of the same name.
    pub labels: BTreeMap<String, String>,
    /// `[paths]`
    pub paths: Paths,
    /// `[core]`
    pub core: Core,
    /// `[heartbeat]`
    pub heartbeat: Heartbeat,
    /// `[collector]`
    pub collector: Collector,
    /// `[buffer]`
    pub buffer: Buffer,
    /// `[sender]`
    pub sender: Sender,
    /// `[[target]]`
    pub target: Vec<Target>,
    /// `[plugins]`
    pub plugins: Plugins,
    /// `[metrics]`
    pub metrics: Metrics,
    /// `[log]`
    pub log: LogSettings,
    /// `[[rule]]`: the processor stage, in order.
    pub rule: Vec<Rule>,
    /// `[[task]]`: tasks of this file's own.
    pub task: Vec<TaskEntry>,
}

/// Where things are.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Paths {
    /// Buffer, id, cached tasks, control socket.
    pub data: PathBuf,
}

/// The centre.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Core {
    /// Its address; empty: there is none.
    pub url: String,
    /// The bearer token, or where it is.
    pub token: Secret,
    /// Whether a plain `http://` address is allowed elsewhere than on this machine.
    pub allow_http: bool,
    /// Whether its certificate is checked.
    pub verify: bool,
    /// PEM file with the authorities that are believed; empty: the system's.
    pub ca: PathBuf,
    /// PEM file with our certificate; empty: none.
    pub cert: PathBuf,
    /// PEM file with its key.
    pub key: PathBuf,
}

/// Signs of life.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Heartbeat {
    /// Seconds between two, 1–3,600.
    pub interval_s: u64,
    /// Seconds for one, 1–300.
    pub timeout_s: u64,
    /// Tries of one before it counts as failed, 1–10.
    pub retries: u64,
}

/// Collection.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Collector {
    /// Threads for what blocks, 1–256.
    pub workers: u64,
    /// Seconds between two questions to the core for tasks, 1–86,400.
    pub fetch_s: u64,
    /// No run of a task takes longer, in seconds, 1–3,600.
    pub task_limit_s: u64,
    /// Series known at once, 1,000–10,000,000.
    pub max_series: u64,
}

/// Memory or disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum BufferMode {
    Memory,
    #[default]
    Disk,
}

/// When the buffer is made durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum FsyncMode {
    Always,
    #[default]
    Interval,
    Never,
}

/// What is between collection and sending.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Buffer {
    /// Where it is kept.
    pub mode: BufferMode,
    /// Most KiB of it, 1,024–1,073,741,824 (memory: at most 1,048,576).
    pub max_kib: u64,
    /// Hours after which samples are dropped; 0: never; at most 87,600.
    pub max_age_h: u64,
    /// MiB left free on the disk, 0–1,048,576.
    pub min_free_mib: u64,
    /// What happens when it is full.
    pub policy: Policy,
    /// When it is made durable.
    pub fsync: FsyncMode,
    /// Milliseconds between two syncs with `fsync = "interval"`, 10–60,000.
    pub fsync_ms: u64,
}

/// Whom samples go to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SenderMode {
    /// To the core.
    Core,
    /// To the targets.
    #[default]
    Direct,
    /// To the targets; task reports to the core.
    Hybrid,
}

/// Sending.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sender {
    /// Whom samples go to.
    pub mode: SenderMode,
    /// Samples sent together, 1–100,000.
    pub batch: u64,
    /// Milliseconds after which a smaller batch is sent, 1–600,000.
    pub flush_ms: u64,
    /// Seconds for one request, 1–600.
    pub timeout_s: u64,
    /// Quick tries after a failed one, before the breaker opens, 0–100.
    pub retries: u64,
    /// Milliseconds that the wait before the first of them is at most, 1–600,000; it doubles.
    pub retry_ms: u64,
    /// Seconds that no wait is longer than, 1–3,600.
    pub retry_longest_s: u64,
    /// MiB of batches that a receiver refused, kept for a look, 0–1,024.
    pub rejected_mib: u64,
}

/// What a target speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TargetKind {
    /// Remote write 1.0.
    Prometheus,
    /// Remote write 2.0, or 1.0 where the receiver knows no other.
    Prometheus2,
    /// Remote write 1.0 as VictoriaMetrics takes it.
    #[serde(rename = "victoriametrics")]
    VictoriaMetrics,
    /// ClickHouse over HTTP.
    #[serde(rename = "clickhouse")]
    ClickHouse,
}

/// One receiver of samples.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// Its cursor goes by this: `[a-z0-9_-]{1,64}`, unique, not `core`.
    pub name: String,
    /// What it speaks.
    pub kind: TargetKind,
    /// Where it is.
    pub url: String,
    /// ClickHouse: the table, with its database where it is not the default one.
    #[serde(default)]
    pub table: String,
    /// For a user name with a password.
    #[serde(default)]
    pub username: String,
    /// It, or where it is.
    #[serde(default)]
    pub password: Secret,
    /// The bearer token, or where it is.
    #[serde(default)]
    pub token: Secret,
    /// As in `[core]`.
    #[serde(default)]
    pub allow_http: bool,
    /// As in `[core]`.
    #[serde(default = "yes")]
    pub verify: bool,
    /// As in `[core]`.
    #[serde(default)]
    pub ca: PathBuf,
    /// As in `[core]`.
    #[serde(default)]
    pub cert: PathBuf,
    /// As in `[core]`.
    #[serde(default)]
    pub key: PathBuf,
}

fn yes() -> bool {
    true
}

/// External plugins.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Plugins {
    /// One directory each in here; empty: none.
    pub directory: PathBuf,
    /// Seconds between two looks for changed ones; 0: only at start; at most 86,400.
    pub reload_s: u64,
}

/// The self metrics.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Metrics {
    /// Where they can be asked for, such as `127.0.0.1:9475`; empty: nowhere.
    pub listen: String,
}

/// What is logged.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogSettings {
    /// This and what is graver.
    pub level: crate::node::config::Level,
}

/// A task in the file.
#[derive(Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskEntry {
    /// Unique.
    pub id: String,
    /// What runs it.
    pub plugin: String,
    /// What is asked.
    #[serde(default)]
    pub device: serde_json::Map<String, serde_json::Value>,
    /// The plugin's settings.
    #[serde(default)]
    pub config: serde_json::Map<String, serde_json::Value>,
    /// Added to every sample.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Milliseconds from run to run, 100–86,400,000.
    pub interval_ms: u64,
    /// Milliseconds that a run may take; the interval where it is not said, and never longer.
    #[serde(default)]
    pub timeout_ms: Option<u64>,
    /// The higher goes first.
    #[serde(default)]
    pub priority: u8,
    /// Tries of a failed run before the next one is due, 0–10.
    #[serde(default)]
    pub retries: u32,
}

impl std::fmt::Debug for TaskEntry {
    /// Without what may hold secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TaskEntry").field("id", &self.id).field("plugin", &self.plugin).finish_non_exhaustive()
    }
}

impl Default for Paths {
    fn default() -> Self {
        Self { data: "/var/lib/sentinel".into() }
    }
}

impl Default for Core {
    fn default() -> Self {
        let none = PathBuf::new;
        Self {
            url: String::new(),
            token: Secret::default(),
            allow_http: false,
            verify: true,
            ca: none(),
            cert: none(),
            key: none(),
        }
    }
}

impl Default for Heartbeat {
    fn default() -> Self {
        Self { interval_s: 30, timeout_s: 10, retries: 3 }
    }
}

impl Default for Collector {
    fn default() -> Self {
        Self { workers: 10, fetch_s: 60, task_limit_s: 300, max_series: 1_000_000 }
    }
}

impl Default for Buffer {
    fn default() -> Self {
        Self {
            mode: BufferMode::Disk,
            max_kib: 1024 * 1024,
            max_age_h: 0,
            min_free_mib: 256,
            policy: Policy::DropOldest,
            fsync: FsyncMode::Interval,
            fsync_ms: 1000,
        }
    }
}

impl Default for Sender {
    fn default() -> Self {
        Self {
            mode: SenderMode::Direct,
            batch: 1000,
            flush_ms: 10_000,
            timeout_s: 30,
            retries: 3,
            retry_ms: 5000,
            retry_longest_s: 60,
            rejected_mib: 16,
        }
    }
}

impl Default for Plugins {
    fn default() -> Self {
        Self { directory: PathBuf::new(), reload_s: 300 }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self { listen: "127.0.0.1:9475".into() }
    }
}

/// What the core may set: tables of the file, in the same form. Neither where samples go nor what proves who we are.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Overlay {
    /// `[buffer]`, its mode as in the file.
    pub buffer: Option<Buffer>,
    /// `[sender]`, its mode as in the file.
    pub sender: Option<Sender>,
    /// `[log]`
    pub log: Option<LogSettings>,
    /// `[[rule]]`
    pub rule: Option<Vec<Rule>>,
}

impl Overlay {
    /// Reads what a core gave.
    pub fn parse(text: &str) -> Result<Self, String> {
        let place = Place { text, path: Path::new("the core's configuration") };
        toml::from_str(text).map_err(|e| place.of_error(&e).to_string())
    }
}

/// Why a value is not taken: its key and a sentence.
type Wrong = (String, String);

fn wrong(key: &str, message: impl Into<String>) -> Wrong {
    (key.to_string(), message.into())
}

impl Config {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let unreadable = |message: String| ConfigError { file: path.to_path_buf(), line: None, key: None, message };
        let meta = std::fs::metadata(path).map_err(|e| unreadable(e.to_string()))?;
        if meta.len() > MAX_FILE {
            return Err(unreadable(format!("{} octets are over the limit of {MAX_FILE}", meta.len())));
        }
        let text = std::fs::read_to_string(path).map_err(|e| unreadable(e.to_string()))?;
        let config = Self::parse(&text, path)?;
        if meta.mode() & 0o077 != 0
            && let Some(key) = config.plain_secret()
        {
            let message =
                format!("holds a secret, so the file must have mode 0600 and has {:04o}", meta.mode() & 0o7777);
            return Err(Place { text: &text, path }.of_key(&key, message));
        }
        Ok(config)
    }

    /// Checks a text; `path` is only named in errors.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let place = Place { text, path };
        let config: Self = toml::from_str(text).map_err(|e| place.of_error(&e))?;
        config.validate().map_err(|(key, message)| place.of_key(&key, message))?;
        Ok(config)
    }

    /// With what the core sets in the place of what the file says. All rules hold for the result.
    pub fn overlaid(mut self, overlay: &Overlay) -> Result<Self, String> {
        if let Some(buffer) = &overlay.buffer {
            self.buffer = Buffer { mode: self.buffer.mode, ..buffer.clone() };
        }
        if let Some(sender) = &overlay.sender {
            self.sender = Sender { mode: self.sender.mode, ..sender.clone() };
        }
        if let Some(log) = &overlay.log {
            self.log = log.clone();
        }
        if let Some(rules) = &overlay.rule {
            self.rule = rules.clone();
        }
        self.validate().map_err(|(key, message)| format!("the core's configuration: {key}: {message}"))?;
        Ok(self)
    }

    /// The key of a secret that stands in the file itself.
    fn plain_secret(&self) -> Option<String> {
        let mut secrets = vec![("core.token".to_string(), &self.core.token)];
        for target in &self.target {
            secrets.push(("target.password".to_string(), &target.password));
            secrets.push(("target.token".to_string(), &target.token));
        }
        let plain = |text: &str| !text.is_empty() && !text.starts_with("${") && !text.starts_with("file:");
        secrets.into_iter().find(|(_, given)| plain(given.reveal())).map(|(key, _)| key)
    }

    /// The rules that types do not say. Gives the first key that breaks one.
    fn validate(&self) -> Result<(), Wrong> {
        if self.id.len() > 128 || !self.id.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)) {
            return Err(wrong("id", format!("{:?} is no id: at most 128 letters, digits, - _ .", self.id)));
        }
        for (name, value) in &self.labels {
            if !is_label_name(name) || value.len() > 1024 {
                return Err(wrong("labels", format!("{name:?} is no label, or its value is longer than 1024 octets")));
            }
        }
        if !self.paths.data.is_absolute() {
            return Err(wrong("paths.data", format!("{:?} is not an absolute path", self.paths.data)));
        }
        let (buffer, sender) = (&self.buffer, &self.sender);
        let most_kib = if buffer.mode == BufferMode::Memory { 1 << 20 } else { 1 << 30 };
        let metrics = &self.metrics.listen;
        if !metrics.is_empty() && metrics.parse::<SocketAddr>().is_err() {
            return Err(wrong("metrics.listen", format!("{metrics:?} is no address with a port")));
        }
        for (key, value, limits) in [
            ("heartbeat.interval_s", self.heartbeat.interval_s, 1..=3600),
            ("heartbeat.timeout_s", self.heartbeat.timeout_s, 1..=300),
            ("heartbeat.retries", self.heartbeat.retries, 1..=10),
            ("collector.workers", self.collector.workers, 1..=256),
            ("collector.fetch_s", self.collector.fetch_s, 1..=86_400),
            ("collector.task_limit_s", self.collector.task_limit_s, 1..=3600),
            ("collector.max_series", self.collector.max_series, 1000..=10_000_000),
            ("buffer.max_kib", buffer.max_kib, 1024..=most_kib),
            ("buffer.max_age_h", buffer.max_age_h, 0..=87_600),
            ("buffer.min_free_mib", buffer.min_free_mib, 0..=1 << 20),
            ("buffer.fsync_ms", buffer.fsync_ms, 10..=60_000),
            ("sender.batch", sender.batch, 1..=100_000),
            ("sender.flush_ms", sender.flush_ms, 1..=600_000),
            ("sender.timeout_s", sender.timeout_s, 1..=600),
            ("sender.retries", sender.retries, 0..=100),
            ("sender.retry_ms", sender.retry_ms, 1..=600_000),
            ("sender.retry_longest_s", sender.retry_longest_s, 1..=3600),
            ("sender.rejected_mib", sender.rejected_mib, 0..=1024),
            ("plugins.reload_s", self.plugins.reload_s, 0..=86_400),
        ] {
            within(key, value, limits).map_err(|(key, message)| wrong(key, message))?;
        }
        if !self.core.url.is_empty() {
            address("core.url", &self.core.url, self.core.allow_http)?;
            identity("core", &self.core.cert, &self.core.key)?;
        } else if sender.mode != SenderMode::Direct {
            return Err(wrong("sender.mode", "without core.url there is no core to send to"));
        }
        if sender.mode != SenderMode::Core && self.target.is_empty() {
            return Err(wrong("target", "there is none, and sender.mode is not \"core\": samples would go nowhere"));
        }
        for (n, target) in self.target.iter().enumerate() {
            target.validate()?;
            if self.target[..n].iter().any(|other| other.name == target.name) {
                return Err(wrong("target.name", format!("{:?} occurs twice", target.name)));
            }
        }
        for (n, task) in self.task.iter().enumerate() {
            task.validate()?;
            if self.task[..n].iter().any(|other| other.id == task.id) {
                return Err(wrong("task.id", format!("{:?} occurs twice", task.id)));
            }
        }
        for rule in &self.rule {
            rule.check().map_err(|message| wrong("rule", message))?;
        }
        Ok(())
    }

    /// The log's limits and rules.
    pub fn log_options(&self) -> Options {
        let buffer = &self.buffer;
        let fsync = match buffer.fsync {
            _ if buffer.mode == BufferMode::Memory => Fsync::Never,
            FsyncMode::Always => Fsync::Always,
            FsyncMode::Interval => Fsync::Interval(Duration::from_millis(buffer.fsync_ms)),
            FsyncMode::Never => Fsync::Never,
        };
        let disk = buffer.mode == BufferMode::Disk;
        Options {
            max_age: (buffer.max_age_h > 0).then(|| Duration::from_secs(buffer.max_age_h * 3600)),
            min_free_bytes: if disk { buffer.min_free_mib << 20 } else { 0 },
            ..Options::new(buffer.max_kib << 10, buffer.policy, fsync)
        }
    }

    /// One lane for each destination. Reads secrets from environment and files.
    pub fn lanes(&self) -> Result<Vec<LaneOptions>, String> {
        let mut lanes = Vec::new();
        if self.sender.mode == SenderMode::Core {
            let mut credentials = Vec::new();
            let token = secret("core.token", &self.core.token)?;
            if !token.is_empty() {
                credentials.push(("Authorization", Secret::new(format!("Bearer {}", token.reveal()))));
            }
            let url = Url::parse(&self.core.url).map_err(|e| format!("core.url: {e}"))?.join("/api/v1/metrics");
            lanes.push(self.lane("core", Protocol::Core, url, self.core_tls(), credentials));
        } else {
            for target in &self.target {
                let url = Url::parse(&target.url).map_err(|e| format!("target {}: {e}", target.name))?;
                let tls = tls(&target.ca, &target.cert, &target.key, target.verify);
                let protocol = match target.kind {
                    TargetKind::Prometheus | TargetKind::VictoriaMetrics => Protocol::RemoteWrite1,
                    TargetKind::Prometheus2 => Protocol::RemoteWrite2,
                    TargetKind::ClickHouse => Protocol::ClickHouse { table: target.table.clone() },
                };
                lanes.push(self.lane(&target.name, protocol, url, tls, target.credentials()?));
            }
        }
        Ok(lanes)
    }

    /// How the core is known.
    pub fn core_tls(&self) -> TlsOptions {
        tls(&self.core.ca, &self.core.cert, &self.core.key, self.core.verify)
    }

    fn lane(
        &self,
        name: &str,
        protocol: Protocol,
        url: Url,
        tls: TlsOptions,
        credentials: Vec<(&'static str, Secret)>,
    ) -> LaneOptions {
        let sender = &self.sender;
        let rejected = sender.rejected_mib << 20;
        LaneOptions {
            name: name.into(),
            protocol,
            url,
            tls,
            credentials,
            batch: sender.batch as usize,
            flush: Duration::from_millis(sender.flush_ms),
            timeout: Duration::from_secs(sender.timeout_s),
            retries: sender.retries as u32,
            retry_first: Duration::from_millis(sender.retry_ms),
            retry_longest: Duration::from_secs(sender.retry_longest_s),
            dead_letters: (rejected > 0).then(|| (self.paths.data.join("rejected"), rejected)),
        }
    }

    /// The file's own tasks.
    pub fn tasks(&self) -> Vec<Task> {
        let limit = Duration::from_secs(self.collector.task_limit_s);
        self.task.iter().map(|entry| entry.task(limit)).collect()
    }
}

impl TaskEntry {
    fn validate(&self) -> Result<(), Wrong> {
        let named = |text: &str| !text.is_empty() && text.len() <= 256 && !text.contains(char::is_control);
        if !named(&self.id) || !named(&self.plugin) {
            return Err(wrong(
                "task.id",
                "a task has an id and a plugin, at most 256 octets without control characters",
            ));
        }
        let limits = MIN_INTERVAL_MS..=86_400_000;
        within("task.interval_ms", self.interval_ms, limits.clone()).map_err(|(key, message)| wrong(key, message))?;
        let timeout = self.timeout_ms.unwrap_or(self.interval_ms);
        within("task.timeout_ms", timeout, 1..=self.interval_ms).map_err(|(key, message)| wrong(key, message))?;
        within("task.retries", u64::from(self.retries), 0..=10).map_err(|(key, message)| wrong(key, message))?;
        match self.labels.keys().find(|name| !is_label_name(name)) {
            Some(name) => Err(wrong("task.labels", format!("{name:?} is no label"))),
            None => Ok(()),
        }
    }

    /// As the collector wants it; no run may take longer than `limit`.
    pub fn task(&self, limit: Duration) -> Task {
        let interval = Duration::from_millis(self.interval_ms);
        Task {
            id: self.id.clone(),
            plugin: self.plugin.clone(),
            device: self.device.clone(),
            config: self.config.clone(),
            labels: self.labels.clone(),
            interval,
            timeout: self.timeout_ms.map_or(interval, Duration::from_millis).min(limit),
            priority: self.priority,
            retries: self.retries,
        }
    }

    /// A task of the core's, checked as one of the file's.
    pub fn from_core(value: serde_json::Value) -> Result<Self, String> {
        let entry: Self = serde_json::from_value(value).map_err(|e| e.to_string())?;
        entry.validate().map_err(|(key, message)| format!("{key}: {message}"))?;
        Ok(entry)
    }
}

impl Target {
    fn validate(&self) -> Result<(), Wrong> {
        let named = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_';
        if !(1..=64).contains(&self.name.len()) || !self.name.chars().all(named) || self.name == "core" {
            let message = format!("{:?} is no name: 1–64 of a-z 0-9 - _, and not \"core\"", self.name);
            return Err(wrong("target.name", message));
        }
        address("target.url", &self.url, self.allow_http)?;
        identity("target", &self.cert, &self.key)?;
        let is_table = |table: &str| table.split('.').count() <= 2 && table.split('.').all(is_series_name);
        match self.kind {
            TargetKind::ClickHouse if !is_table(&self.table) => {
                Err(wrong("target.table", format!("{:?} is no table: [database.]table", self.table)))
            }
            TargetKind::ClickHouse => Ok(()),
            _ if !self.table.is_empty() => Err(wrong("target.table", "only clickhouse has a table")),
            _ if self.username.is_empty() && !self.password.is_empty() => {
                Err(wrong("target.password", "a password needs a username"))
            }
            _ if !self.username.is_empty() && !self.token.is_empty() => {
                Err(wrong("target.token", "a token and a username exclude each other"))
            }
            _ => Ok(()),
        }
    }

    fn credentials(&self) -> Result<Vec<(&'static str, Secret)>, String> {
        let key = |key: &str| format!("target {}: {key}", self.name);
        let password = secret(&key("password"), &self.password)?;
        let token = secret(&key("token"), &self.token)?;
        let mut credentials = Vec::new();
        if self.kind == TargetKind::ClickHouse && !self.username.is_empty() {
            credentials.push(("X-ClickHouse-User", Secret::new(self.username.clone())));
            credentials.push(("X-ClickHouse-Key", password));
        } else if !self.username.is_empty() {
            let both = Secret::new(format!("{}:{}", self.username, password.reveal()));
            let header = format!("Basic {}", super::secret::base64(both.reveal().as_bytes()));
            credentials.push(("Authorization", Secret::new(header)));
        }
        if !token.is_empty() {
            credentials.push(("Authorization", Secret::new(format!("Bearer {}", token.reveal()))));
        }
        Ok(credentials)
    }
}

/// HTTPS is required elsewhere than on this machine, unless it is explicitly not.
fn address(key: &str, text: &str, allow_http: bool) -> Result<(), Wrong> {
    let url = Url::parse(text).map_err(|e| wrong(key, e))?;
    if !url.tls && !allow_http && !url.is_loopback() {
        return Err(wrong(key, "a plain http:// address needs allow_http = true"));
    }
    Ok(())
}

fn identity(table: &str, cert: &Path, key: &Path) -> Result<(), Wrong> {
    if cert.as_os_str().is_empty() != key.as_os_str().is_empty() {
        return Err(wrong(&format!("{table}.cert"), "a certificate and its key go together"));
    }
    Ok(())
}

fn tls(ca: &Path, cert: &Path, key: &Path, verify: bool) -> TlsOptions {
    let given = |path: &Path| (!path.as_os_str().is_empty()).then(|| path.to_path_buf());
    TlsOptions { ca: given(ca), identity: given(cert).zip(given(key)), verify }
}

/// Gets a secret from where the text says: itself, `${NAME}`, `file:/path`. The error holds no part of it.
pub fn secret(key: &str, given: &Secret) -> Result<Secret, String> {
    let text = given.reveal();
    let secret = if let Some(name) = text.strip_prefix("${").and_then(|rest| rest.strip_suffix('}')) {
        Secret::new(std::env::var(name).map_err(|_| format!("{key}: the environment has no {name}"))?)
    } else if let Some(path) = text.strip_prefix("file:") {
        let meta = std::fs::metadata(path).map_err(|e| format!("{key}: {path}: {e}"))?;
        if meta.mode() & 0o077 != 0 || meta.len() > 64 * 1024 {
            return Err(format!("{key}: {path} must have mode 0600 and at most 65536 octets"));
        }
        let mut text = std::fs::read_to_string(path).map_err(|e| format!("{key}: {path}: {e}"))?;
        let end = text.trim_end().len();
        text.truncate(end);
        Secret::new(text)
    } else {
        Secret::new(text.to_string())
    };
    if secret.reveal().chars().any(|c| c.is_control()) {
        return Err(format!("{key}: a secret may not hold control characters"));
    }
    Ok(secret)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = include_str!("../../packaging/sentinel/sentinel.toml");

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("s.toml"))
    }

    #[test]
    fn the_shipped_example_is_the_defaults_with_a_target_and_a_task() {
        let example = parse(EXAMPLE).unwrap();
        assert_eq!((example.target.len(), example.task.len()), (1, 1));
        assert_eq!(Config { target: Vec::new(), task: Vec::new(), ..example }, Config::default());
    }

    #[test]
    fn the_example_shows_every_key() {
        // Serde names the keys that it knows when it meets one that it does not.
        let known = |text: &str| -> Vec<String> {
            let message = parse(text).unwrap_err().to_string();
            let names = message.split("expected").nth(1).unwrap_or_else(|| panic!("{message}"));
            names.split('`').skip(1).step_by(2).map(str::to_string).collect()
        };
        let shown: toml::Table = EXAMPLE.parse().unwrap();
        for table in known("unknown = 1") {
            let keys = match &*table {
                "id" | "name" | "region" | "labels" => Vec::new(),
                "target" | "task" | "rule" => {
                    let known = known(&format!("[[{table}]]\nunknown = 1"));
                    assert!(known.iter().all(|key| EXAMPLE.contains(key)), "{table}: {known:?}");
                    continue;
                }
                table => known(&format!("[{table}]\nunknown = 1")),
            };
            assert!(shown.contains_key(&table), "{table}");
            assert!(keys.iter().all(|key| shown[&table].get(key).is_some()), "{table}: {keys:?}");
        }
    }

    #[test]
    fn a_mistake_is_named_with_its_line() {
        let target = "[[target]]\nname = \"a\"\nkind = \"prometheus\"\nurl = \"http://localhost/\"\n";
        let error = parse(&format!("[sender]\nbatch = 0\n{target}")).unwrap_err();
        assert_eq!((error.line, error.key.as_deref()), (Some(2), Some("sender.batch")));
        assert!(error.to_string().contains("0 is out of range: 1 to 100000"), "{error}");
        assert!(parse(target).is_ok());
    }

    #[test]
    fn only_this_machine_is_spoken_to_in_the_clear_unless_it_is_allowed() {
        for (url, allowed) in [
            ("http://127.0.0.1/", true),
            ("http://localhost:9/x", true),
            ("http://[::1]/", true),
            ("https://far.example/", true),
            ("http://far.example/", false),
            ("http://127.0.0.1.far.example/", false),
        ] {
            let target = format!("[[target]]\nname = \"a\"\nkind = \"prometheus\"\nurl = \"{url}\"\n");
            assert_eq!(parse(&target).is_ok(), allowed, "{url}");
            assert!(parse(&format!("{target}allow_http = true")).is_ok(), "{url}");
        }
    }

    #[test]
    fn credentials_become_headers_and_show_in_no_debug_form() {
        for (keys, name, value) in [
            ("token = \"t0k\"", "Authorization", "Bearer t0k"),
            ("username = \"u\"\npassword = \"t0k\"", "Authorization", "Basic dTp0MGs="),
        ] {
            let text = format!("[[target]]\nname = \"a\"\nkind = \"prometheus\"\nurl = \"http://localhost/\"\n{keys}");
            let lanes = parse(&text).unwrap().lanes().unwrap();
            assert_eq!(lanes[0].credentials, [(name, Secret::new(value.into()))]);
            assert!(!format!("{lanes:?}").contains("t0k"));
        }
    }
}
