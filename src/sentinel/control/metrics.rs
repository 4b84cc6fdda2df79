//! The self metrics in Prometheus text (version 0.0.4).

use std::fmt::{Display, Write as _};

use super::CoreStats;
use super::state::State;
use super::system::Usage;
use super::taskbook::{BUCKETS, RunCounts};
use crate::sentinel::log::{Stats, now_ms};
use crate::sentinel::send::LaneStats;

/// Everything there is to tell, at one moment.
pub struct Snapshot {
    /// The state.
    pub state: State,
    /// Since the start.
    pub uptime_s: f64,
    /// Whether the last process ended without saying so.
    pub unclean: bool,
    /// Tasks in force.
    pub tasks: usize,
    /// Their runs.
    pub runs: RunCounts,
    /// Plugins loaded, built-in ones among them.
    pub plugins: u64,
    /// Times that one was started again.
    pub plugin_restarts: u64,
    /// The log.
    pub log: Stats,
    /// Octets that it may have.
    pub log_limit: u64,
    /// Octets left on its disk.
    pub disk_free: u64,
    /// Destinations by name.
    pub lanes: Vec<(String, LaneStats)>,
    /// The core, if there is one.
    pub core: Option<CoreStats>,
    /// Series known.
    pub series: usize,
    /// Samples that could not be taken or processed.
    pub samples_refused: u64,
    /// This process.
    pub usage: Usage,
    /// Reloads that worked and that did not, and whether the last one did.
    pub reloads: (u64, u64, bool),
}

struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP sentinel_{name} {help}\n# TYPE sentinel_{name} {kind}");
    }

    fn value(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        let _ = write!(self.0, "sentinel_{name}");
        for (n, (label, value)) in labels.iter().enumerate() {
            let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let _ = write!(self.0, "{}{label}=\"{value}\"", if n == 0 { '{' } else { ',' });
        }
        let _ = writeln!(self.0, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, value: impl Display) {
        self.family(name, kind, help);
        self.value(name, &[], value);
    }

    fn each<V: Display>(&mut self, name: &str, kind: &str, help: &str, values: impl Iterator<Item = (String, V)>) {
        self.family(name, kind, help);
        for (target, value) in values {
            self.value(name, &[("target", &target)], value);
        }
    }
}

/// As they are served.
pub fn text(now: &Snapshot) -> String {
    let mut out = Text(String::with_capacity(8192));
    out.family("info", "gauge", "Which sentinel this is.");
    let (os, arch) = (std::env::consts::OS, std::env::consts::ARCH);
    out.value("info", &[("version", env!("CARGO_PKG_VERSION")), ("os", os), ("arch", arch)], 1);
    out.family("state", "gauge", "1 for the state that it is in.");
    for state in [State::Initializing, State::Registering, State::Running, State::Stopping] {
        out.value("state", &[("state", state.name())], u8::from(state == now.state));
    }
    out.one("uptime_seconds", "gauge", "Seconds since its start.", now.uptime_s);
    out.one("prev_shutdown_unclean", "gauge", "Whether the process before this one was killed.", u8::from(now.unclean));
    runs(&mut out, now);
    out.one("plugins_loaded", "gauge", "Plugins, built-in ones among them.", now.plugins);
    out.one("plugin_restarts_total", "counter", "External plugins started again.", now.plugin_restarts);
    buffer(&mut out, now);
    lanes(&mut out, now);
    let core = now.core.clone().unwrap_or_default();
    out.one("registered", "gauge", "Whether the core knows it.", u8::from(core.registered));
    out.one("heartbeat_success_total", "counter", "Heartbeats that the core answered.", core.heartbeats);
    out.one("heartbeat_failed_total", "counter", "Heartbeats that it did not.", core.heartbeats_failed);
    out.one("series_active", "gauge", "Series known.", now.series);
    out.one("samples_refused_total", "counter", "Samples that could not be taken.", now.samples_refused);
    let percent = now.usage.cpu_seconds / now.uptime_s.max(0.001) * 100.0;
    out.one("cpu_usage_percent", "gauge", "CPU time since the start, in percent of one core.", percent);
    out.one("cpu_seconds_total", "counter", "CPU time used.", now.usage.cpu_seconds);
    out.one("memory_usage_bytes", "gauge", "Memory resident.", now.usage.resident_bytes);
    out.one("threads", "gauge", "Threads.", now.usage.threads);
    out.one("open_fds", "gauge", "Descriptors.", now.usage.descriptors);
    let (good, bad, last) = now.reloads;
    out.one("config_reloads_total", "counter", "Reloads that worked.", good);
    out.one("config_reload_errors_total", "counter", "Reloads that kept the running configuration.", bad);
    out.one("config_last_reload_successful", "gauge", "Whether the last one worked.", u8::from(last));
    out.0
}

fn runs(out: &mut Text, now: &Snapshot) {
    let runs = &now.runs;
    out.one("tasks_total", "gauge", "Tasks in force.", now.tasks);
    out.one("tasks_success_total", "counter", "Runs that gave samples.", runs.success);
    out.one("tasks_failed_total", "counter", "Runs that failed.", runs.failed);
    out.family("task_skipped_total", "counter", "Runs that were not started.");
    for (reason, count) in &runs.skipped {
        out.value("task_skipped_total", &[("reason", reason)], count);
    }
    out.family("task_duration_seconds", "histogram", "How long runs took.");
    for (bound, count) in BUCKETS.iter().zip(runs.buckets) {
        out.value("task_duration_seconds_bucket", &[("le", &bound.to_string())], count);
    }
    let count = runs.success + runs.failed;
    out.value("task_duration_seconds_bucket", &[("le", "+Inf")], count);
    out.value("task_duration_seconds_sum", &[], runs.seconds);
    out.value("task_duration_seconds_count", &[], count);
    out.one("reports_dropped_total", "counter", "Task reports that the core never got.", runs.reports_dropped);
}

fn buffer(out: &mut Text, now: &Snapshot) {
    let log = &now.log;
    let most = log.pending.values().map(|(pending, _)| *pending).max().unwrap_or(0);
    out.one("buffer_size", "gauge", "Samples that the slowest destination has not got yet.", most);
    out.one("buffer_bytes", "gauge", "Octets that the buffer takes.", log.bytes);
    let percent = log.bytes as f64 / now.log_limit.max(1) as f64 * 100.0;
    out.one("buffer_usage_percent", "gauge", "Of the octets that it may take.", percent);
    out.one("buffer_accepted_total", "counter", "Samples accepted.", log.accepted);
    out.one("buffer_written_bytes_total", "counter", "Octets written.", log.written_bytes);
    out.one("buffer_held_off_total", "counter", "Samples not taken for now.", log.held_off);
    let pending = log.pending.iter().map(|(name, (pending, _))| (name.clone(), *pending));
    out.each("buffer_pending", "gauge", "Samples that a destination has not got yet.", pending);
    let now_ms = now_ms();
    let age = |since: Option<i64>| since.map_or(0.0, |since| (now_ms.saturating_sub(since)).max(0) as f64 / 1000.0);
    let ages = log.pending.iter().map(|(name, (_, since))| (name.clone(), age(*since)));
    out.each("buffer_oldest_unsent_age_seconds", "gauge", "How long the oldest of them waits, at most.", ages);
    out.family("dropped_total", "counter", "Samples that a destination never gets.");
    for ((target, reason), count) in &log.dropped {
        out.value("dropped_total", &[("target", target), ("reason", reason.name())], count);
    }
    let damaged = log.damaged_records.iter().map(|(name, count)| (name.clone(), *count));
    out.each("corrupt_records_total", "counter", "Damaged places met in the buffer.", damaged);
    out.one("fsync_total", "counter", "Times that the buffer was made durable.", log.fsyncs);
    out.one("fsync_errors_total", "counter", "Times that it could not be.", log.fsync_errors);
    out.one("fsync_seconds_total", "counter", "How long that took.", log.fsync_time.as_secs_f64());
    out.one("disk_free_bytes", "gauge", "Octets left on the buffer's disk.", now.disk_free);
}

fn lanes(out: &mut Text, now: &Snapshot) {
    let of = |value: fn(&LaneStats) -> u64| now.lanes.iter().map(move |(name, stats)| (name.clone(), value(stats)));
    out.each("sent_metrics_total", "counter", "Samples that a receiver acknowledged.", of(|lane| lane.sent_samples));
    out.each("sent_bytes_total", "counter", "Octets of the requests.", of(|lane| lane.sent_bytes));
    out.each("send_errors_total", "counter", "Requests that did not hand over their batch.", of(|lane| lane.errors));
    out.each("send_retries_total", "counter", "Requests made again.", of(|lane| lane.retries));
    out.each("send_fallbacks_total", "counter", "Changes to the older form.", of(|lane| lane.fallbacks));
    let breaker = of(|lane| u64::from(lane.breaker.number()));
    out.each("breaker_state", "gauge", "0 closed, 1 open, 2 half-open.", breaker);
    out.each("send_paused", "gauge", "Whether the receiver does not know us.", of(|lane| u64::from(lane.paused)));
    out.family("send_requests_total", "counter", "Requests by status; 0: no answer.");
    for (name, stats) in &now.lanes {
        for (status, count) in &stats.requests {
            out.value("send_requests_total", &[("target", name), ("status", &status.to_string())], count);
        }
    }
}
