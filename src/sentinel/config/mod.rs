//! The sentinel's configuration file. Every key has a default; the shipped example (`packaging/sentinel/sentinel.toml`)
//! shows them all. A mistake is an error that names file, line and key, and leaves a running sentinel as it is.
//!
//! A secret is given as it is (then the file must have mode 0600), as `${NAME}` from the environment, or as
//! `file:/path` (that file must have mode 0600). It is never shown.
mod check;
mod defaults;
mod node;
mod parts;
mod read;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;

use super::aggregate::Aggregate;
use super::log::Policy;
use super::process::Rule;
use super::secret::{Given, Secret};

pub use node::Source;
pub use read::secret;

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
    /// `[[aggregate]]`: windows, after the rules.
    pub aggregate: Vec<Aggregate>,
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
    /// Samples sent together, 1–100,000, to the core and to every target that has no number of its own.
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
    /// Samples sent together, 1–100,000. By default `sender.batch`, but 10,000 to VictoriaMetrics, as its own agent has it:
    /// what zstd saves grows with the batch.
    pub batch: Option<u64>,
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

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

/// Where they go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum LogOutput {
    #[default]
    Stderr,
    File,
    Both,
}

/// What is logged.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogSettings {
    /// This and what is graver.
    pub level: crate::node::config::Level,
    /// How lines look.
    pub format: LogFormat,
    /// Where they go.
    pub output: LogOutput,
    /// The file, absolute; needed unless `output` is `stderr`.
    pub file: PathBuf,
    /// MiB of it before it is set aside and a new one begun, 1–10,240.
    pub max_mib: u64,
    /// Files set aside that are kept, 0–100.
    pub files: u64,
    /// Days that they are kept at most, 1–3,650.
    pub days: u64,
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
    pub device: Given,
    /// The plugin's settings.
    #[serde(default)]
    pub config: Given,
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

#[cfg(test)]
mod tests;
