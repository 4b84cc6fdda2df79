//! What holds where the file says nothing.

use super::*;

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

impl Default for LogSettings {
    fn default() -> Self {
        Self {
            level: Default::default(),
            format: LogFormat::Text,
            output: LogOutput::Stderr,
            file: PathBuf::new(),
            max_mib: 100,
            files: 7,
            days: 30,
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self { listen: "127.0.0.1:9475".into() }
    }
}
