//! What the parts of a sentinel want of its configuration.

use std::path::Path;
use std::time::Duration;

use super::{BufferMode, Config, FsyncMode, SenderMode, Target, TargetKind, TaskEntry, secret};
use crate::sentinel::http::{TlsOptions, Url};
use crate::sentinel::log::{Fsync, Options};
use crate::sentinel::secret::Secret;
use crate::sentinel::send::{LaneOptions, Protocol};
use crate::sentinel::task::Task;

/// Samples sent together to VictoriaMetrics, where nothing else is said.
const VICTORIAMETRICS_BATCH: u64 = 10_000;

impl Config {
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
                    TargetKind::Prometheus => Protocol::RemoteWrite1,
                    TargetKind::VictoriaMetrics => Protocol::VictoriaMetrics,
                    TargetKind::Prometheus2 => Protocol::RemoteWrite2,
                    TargetKind::ClickHouse => Protocol::ClickHouse { table: target.table.clone() },
                };
                let own = target.batch.or((protocol == Protocol::VictoriaMetrics).then_some(VICTORIAMETRICS_BATCH));
                let mut lane = self.lane(&target.name, protocol, url, tls, target.credentials()?);
                lane.batch = own.map_or(lane.batch, |own| own as usize);
                lanes.push(lane);
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
            let header = format!("Basic {}", crate::sentinel::secret::base64(both.reveal().as_bytes()));
            credentials.push(("Authorization", Secret::new(header)));
        }
        if !token.is_empty() {
            credentials.push(("Authorization", Secret::new(format!("Bearer {}", token.reveal()))));
        }
        Ok(credentials)
    }
}

fn tls(ca: &Path, cert: &Path, key: &Path, verify: bool) -> TlsOptions {
    let given = |path: &Path| (!path.as_os_str().is_empty()).then(|| path.to_path_buf());
    TlsOptions { ca: given(ca), identity: given(cert).zip(given(key)), verify }
}
