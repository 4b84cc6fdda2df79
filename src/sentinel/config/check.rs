//! The rules that types do not say.

use std::net::SocketAddr;
use std::path::Path;

use super::{BufferMode, Config, LogOutput, SenderMode, Target, TargetKind, TaskEntry};
use crate::node::config::within;
use crate::sentinel::http::Url;
use crate::sentinel::model::{is_label_name, is_series_name};

/// Shortest interval of a task.
const MIN_INTERVAL_MS: u64 = 100;

/// Why a value is not taken: its key and a sentence.
pub(crate) type Wrong = (String, String);

fn wrong(key: &str, message: impl Into<String>) -> Wrong {
    (key.to_string(), message.into())
}

impl Config {
    /// The rules that types do not say. Gives the first key that breaks one.
    pub(crate) fn validate(&self) -> Result<(), Wrong> {
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
            ("log.max_mib", self.log.max_mib, 1..=10_240),
            ("log.files", self.log.files, 0..=100),
            ("log.days", self.log.days, 1..=3650),
            ("plugins.reload_s", self.plugins.reload_s, 0..=86_400),
        ] {
            within(key, value, limits).map_err(|(key, message)| wrong(key, message))?;
        }
        if self.log.output != LogOutput::Stderr && !self.log.file.is_absolute() {
            return Err(wrong("log.file", format!("{:?} is not an absolute path", self.log.file)));
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
        for aggregate in &self.aggregate {
            aggregate.check().map_err(|message| wrong("aggregate", message))?;
        }
        Ok(())
    }
}

impl TaskEntry {
    pub(super) fn validate(&self) -> Result<(), Wrong> {
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
}

impl Target {
    pub(super) fn validate(&self) -> Result<(), Wrong> {
        let named = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_';
        if !(1..=64).contains(&self.name.len()) || !self.name.chars().all(named) || self.name == "core" {
            let message = format!("{:?} is no name: 1–64 of a-z 0-9 - _, and not \"core\"", self.name);
            return Err(wrong("target.name", message));
        }
        address("target.url", &self.url, self.allow_http)?;
        identity("target", &self.cert, &self.key)?;
        if let Some(batch) = self.batch {
            within("target.batch", batch, 1..=100_000).map_err(|(key, message)| wrong(key, message))?;
        }
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
