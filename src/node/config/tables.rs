//! The tables of the node's file: their keys, defaults, limits, and how the rest of the node takes them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use super::{absolute, within};
use crate::control::access::PeerRule;
use crate::network::Settings;
use crate::network::cidr::Cidr;
use crate::network::plan::{MAX_SLOTS, Plan};
use crate::network::policy::special;
use crate::node::packages::index;
use crate::pool::Limits;
use crate::sandbox::disk::is_file_name;
use crate::sandbox::id::check_name;
use crate::sandbox::spec::{Defaults, Spec};
use crate::sandbox::time_limits::{self, Clock, TimeLimits};
use crate::sentinel::secret::Secret;
use crate::storage::languages::IndexKind;
use crate::storage::snapshots::retention::Retention;
use crate::wire::{Args, Error, Request};

/// Most name servers: what resolvers take (MAXNS, resolv.conf(5)).
pub const MAX_DNS: usize = 3;

/// The node itself.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Node {
    /// Host name: labels of `[a-z0-9-]` joined by dots, at most 64 octets.
    pub name: String,
}

/// The control socket.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Control {
    /// Absolute path of the Unix socket.
    pub socket: PathBuf,
    /// Its permissions, octal, without execution.
    pub socket_mode: String,
    /// Who clients are; the first rule that fits counts. At most 1,024.
    pub peers: Vec<PeerRule>,
    /// Connections at once, 1–4,096.
    pub max_clients: u64,
    /// Requests under way at once on one connection, 1–65,536.
    pub max_requests_per_client: u64,
}

/// Where things are.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Paths {
    /// State database, imported templates, sandboxes' disks and logs.
    pub data: PathBuf,
    /// Sockets.
    pub run: PathBuf,
    /// Guest kernel, guest initramfs and built-in templates.
    pub share: PathBuf,
}

/// Defaults and limits of sandboxes.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sandbox {
    /// vCPUs where a request names none, 1–16.
    pub default_vcpus: u64,
    /// Memory in MiB where a request names none, 64–32,768.
    pub default_memory_mib: u64,
    /// Room in MiB beyond the template's disk where a request names no disk size, 0–1,048,576.
    pub default_extra_disk_mib: u64,
    /// Time to live where a request names none, as requests write it.
    pub default_ttl: String,
    /// Time without use where a request names none, as requests write it.
    pub default_idle_timeout: String,
    /// Longest life where a request names none, as requests write it.
    pub default_max_lifetime: String,
    /// Sandboxes at once that are not stopped, 1–65,536.
    pub max_sandboxes: u64,
    /// Seconds from create until the agent must have answered, 1–600.
    pub boot_timeout_s: u64,
    /// Seconds that a stop waits for the guest before it is ended, 0–600.
    pub stop_timeout_s: u64,
    /// Output kept of each exec for re-attaching, in KiB, 16–1,048,576.
    pub exec_ring_kib: u64,
    /// Workers that wait and have prepared what the last sandbox from a template went on from, 0–256.
    pub prepared: u64,
}

/// How it is seen that a guest has hung.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Health {
    /// Seconds between two questions to an agent, 1–3,600.
    pub probe_interval_s: u64,
    /// Seconds that it has for an answer, 1–600.
    pub probe_timeout_s: u64,
    /// So many times without an answer it has hung, 1–100.
    pub probe_failures: u64,
}

/// Things that are made before anybody asks for a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Pool {
    /// Kept ready, 0–256; with 0 each is made when it is needed.
    pub min_ready: u64,
    /// At most, ready or in use, 1–65,536.
    pub max: u64,
    /// Seconds after which an unused one beyond `min_ready` goes, 1–86,400.
    pub idle_timeout_s: u64,
    /// Seconds after which one that is unused is not used any more, 60–2,592,000.
    pub max_age_s: u64,
    /// Milliseconds that a sandbox waits for one, 0–600,000.
    pub wait_ms: u64,
}

/// How much is kept of each owner's snapshots; 0 is no limit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Snapshots {
    /// Seconds since it was taken, 0–3,153,600,000.
    pub max_age_s: u64,
    /// Snapshots, 0–1,000,000.
    pub max_count: u64,
    /// MiB of memory and state on the disk, 0–1,073,741,824.
    pub max_mib: u64,
}

/// What is kept of executions.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct History {
    /// Whether the source of code runs and the arguments of programs are.
    pub keep_source: bool,
    /// Of each source, in KiB, 0–256.
    pub source_kib: u64,
    /// Of each output, its end, in KiB, 0–256.
    pub output_kib: u64,
    /// Seconds since it began, 0–3,153,600,000; 0 is no limit.
    pub max_age_s: u64,
    /// Records of each owner, 0–10,000,000; 0 is no limit.
    pub max_count: u64,
}

/// Templates that are built on the node: docs/templates.md.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Templates {
    /// Whether there are any.
    pub build: bool,
    /// Steps that are kept for the next builds, 0–10,000; 0 keeps none.
    pub cache_steps: u64,
    /// MiB that they take on the disk at most, 0–1,073,741,824.
    pub cache_mib: u64,
}

/// Packages that code runs ask for: docs/code.md.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Packages {
    /// Where those of Python come from; empty: from nowhere. May hold a password.
    pub pip_index: Secret,
    /// Where those of Node.js come from; empty: from nowhere. May hold a password.
    pub npm_registry: Secret,
    /// What an installation reaches beside the index; empty: the public internet.
    pub allow: Vec<String>,
    /// Seconds that an installation may take, 1–3,600.
    pub timeout_s: u64,
    /// MiB that the packages of one request may take, 1–65,536.
    pub max_mib: u64,
    /// Sets of packages that are kept, 1–10,000.
    pub cache_count: u64,
    /// MiB that they take on the disk at most, 1–1,073,741,824.
    pub cache_mib: u64,
}

/// Where workers are kept in.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Jail {
    /// First of the user ids, and group ids, of workers: 1,000–4,000,000,000.
    pub uid_first: u64,
    /// How many there are; each worker has its own while it runs. 1–1,000,000.
    pub uid_count: u64,
}

/// Disks that sandboxes may be given beside their own.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Disks {
    /// Directory of image files.
    pub directory: PathBuf,
    /// Absolute paths of block devices by the names that requests use.
    pub devices: BTreeMap<String, PathBuf>,
}

/// The sandboxes' network: docs/network.md.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Network {
    /// Addresses of all links, two for each, /15 to /31.
    pub range: String,
    /// Ranges that no sandbox reaches, beside those that are not the public internet.
    pub never: Vec<String>,
    /// IPv4 addresses that guests ask for names.
    pub dns: Vec<String>,
    /// Slots kept ready, 0–1,024.
    pub min_ready: u64,
    /// Slots at most, ready or in use, 1–65,536 and no more than the range has.
    pub max: u64,
    /// Seconds after which an unused slot beyond `min_ready` goes, 1–86,400.
    pub idle_timeout_s: u64,
    /// Seconds after which a slot is not used again, 60–2,592,000.
    pub max_age_s: u64,
    /// Milliseconds that a sandbox waits for a slot, 0–600,000.
    pub wait_ms: u64,
}

/// The log.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// What is logged: this and what is graver.
    pub level: Level,
}

/// How grave a log line is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Level {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

impl From<Level> for log::LevelFilter {
    fn from(level: Level) -> Self {
        match level {
            Level::Error => Self::Error,
            Level::Warn => Self::Warn,
            Level::Info => Self::Info,
            Level::Debug => Self::Debug,
            Level::Trace => Self::Trace,
        }
    }
}

impl Default for Node {
    fn default() -> Self {
        Self { name: "warren".to_string() }
    }
}

impl Default for Control {
    fn default() -> Self {
        Self {
            socket: "/run/warren/control.sock".into(),
            socket_mode: "0600".to_string(),
            peers: Vec::new(),
            max_clients: 256,
            max_requests_per_client: 1024,
        }
    }
}

impl Default for Paths {
    fn default() -> Self {
        Self { data: "/data".into(), run: "/run/warren".into(), share: "/usr/share/warren".into() }
    }
}

impl Paths {
    pub(super) fn validate(&self) -> Result<(), (&'static str, String)> {
        absolute("paths.data", &self.data)?;
        absolute("paths.run", &self.run)?;
        absolute("paths.share", &self.share)
    }
}

impl Default for Health {
    fn default() -> Self {
        Self { probe_interval_s: 30, probe_timeout_s: 10, probe_failures: 3 }
    }
}

impl Health {
    pub(super) fn validate(&self) -> Result<(), (&'static str, String)> {
        within("health.probe_interval_s", self.probe_interval_s, 1..=3600)?;
        within("health.probe_timeout_s", self.probe_timeout_s, 1..=600)?;
        within("health.probe_failures", self.probe_failures, 1..=100)
    }
}

impl Default for Templates {
    fn default() -> Self {
        Self { build: true, cache_steps: 64, cache_mib: 8192 }
    }
}

impl Templates {
    pub(super) fn validate(&self) -> Result<(), (&'static str, String)> {
        within("templates.cache_steps", self.cache_steps, 0..=10_000)?;
        within("templates.cache_mib", self.cache_mib, 0..=1_073_741_824)
    }
}

impl Default for Packages {
    fn default() -> Self {
        Self {
            pip_index: Secret::default(),
            npm_registry: Secret::default(),
            allow: Vec::new(),
            timeout_s: 300,
            max_mib: 1024,
            cache_count: 128,
            cache_mib: 8192,
        }
    }
}

impl Packages {
    /// What says where the index of a kind is, and its key.
    pub fn index(&self, kind: IndexKind) -> (&Secret, &'static str) {
        match kind {
            IndexKind::Pip => (&self.pip_index, "packages.pip_index"),
            IndexKind::Npm => (&self.npm_registry, "packages.npm_registry"),
        }
    }

    /// The key of a password that stands in the file itself.
    pub(super) fn plain_secret(&self) -> Option<&'static str> {
        let given = [IndexKind::Pip, IndexKind::Npm].map(|kind| self.index(kind));
        given.iter().find(|(given, _)| index::is_plain_secret(given)).map(|(_, key)| *key)
    }

    pub(super) fn validate(&self) -> Result<(), (&'static str, String)> {
        for kind in [IndexKind::Pip, IndexKind::Npm] {
            let (given, key) = self.index(kind);
            index::check(given).map_err(|message| (key, message))?;
        }
        let allow: Vec<Vec<u8>> = self.allow.iter().map(|range| range.clone().into_bytes()).collect();
        let request =
            allow.iter().fold(Request::new("", "").set("network", "on"), |r, range| r.set_bytes("allow", range));
        let none = Defaults { vcpus: 1, memory_mib: 512, time_limits: TimeLimits::NONE };
        Spec::take(&mut Args::of(request), none).map_err(|error| ("packages.allow", error.message))?;
        within("packages.timeout_s", self.timeout_s, 1..=3600)?;
        within("packages.max_mib", self.max_mib, 1..=65_536)?;
        within("packages.cache_count", self.cache_count, 1..=10_000)?;
        within("packages.cache_mib", self.cache_mib, 1..=1_073_741_824)
    }
}

impl Snapshots {
    /// The table as retention takes it.
    pub fn retention(&self) -> Retention {
        let limit = |value: u64, unit: u64| (value > 0).then(|| value.saturating_mul(unit));
        Retention {
            age_ms: limit(self.max_age_s, 1000),
            count: limit(self.max_count, 1),
            bytes: limit(self.max_mib, 1 << 20),
        }
    }

    pub(super) fn validate(&self) -> Result<(), (&'static str, String)> {
        within("snapshots.max_age_s", self.max_age_s, 0..=3_153_600_000)?;
        within("snapshots.max_count", self.max_count, 0..=1_000_000)?;
        within("snapshots.max_mib", self.max_mib, 0..=1_073_741_824)
    }
}

impl Default for History {
    fn default() -> Self {
        Self { keep_source: true, source_kib: 64, output_kib: 16, max_age_s: 30 * 24 * 3600, max_count: 10_000 }
    }
}

impl History {
    pub(super) fn validate(&self) -> Result<(), (&'static str, String)> {
        // What an answer may have on a channel before its receiver says more.
        within("history.source_kib", self.source_kib, 0..=256)?;
        within("history.output_kib", self.output_kib, 0..=256)?;
        within("history.max_age_s", self.max_age_s, 0..=3_153_600_000)?;
        within("history.max_count", self.max_count, 0..=10_000_000)
    }
}

impl Default for Pool {
    fn default() -> Self {
        Self { min_ready: 2, max: 4096, idle_timeout_s: 300, max_age_s: 86_400, wait_ms: 5000 }
    }
}

impl Pool {
    /// The table as a pool takes it.
    pub fn limits(&self) -> Limits {
        limits(self.min_ready, self.max, self.idle_timeout_s, self.max_age_s, self.wait_ms)
    }

    pub(super) fn validate(&self, keys: [&'static str; 5]) -> Result<(), (&'static str, String)> {
        within(keys[0], self.min_ready, 0..=256)?;
        within(keys[1], self.max, 1..=65_536)?;
        within(keys[2], self.idle_timeout_s, 1..=86_400)?;
        within(keys[3], self.max_age_s, 60..=2_592_000)?;
        within(keys[4], self.wait_ms, 0..=600_000)
    }
}

/// Sandboxes of one shape that are started before anybody asks for one.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Warm {
    /// Their template.
    pub template: String,
    /// Virtual CPUs; the node's default when not said.
    pub vcpus: Option<u64>,
    /// Memory in MiB; the node's default when not said.
    pub memory_mib: Option<u64>,
    /// Size of the root disk in MiB; the template's and the node's default on top when not said.
    pub disk_mib: Option<u64>,
    /// With a network that reaches the public internet.
    pub network: bool,
    /// Kept ready, 0–256.
    pub min_ready: u64,
    /// Ready or on their way at most, 1–65,536.
    pub max: u64,
    /// Seconds after which an unused one beyond `min_ready` goes, 1–86,400.
    pub idle_timeout_s: u64,
    /// Seconds after which one that is unused is replaced, 60–2,592,000.
    pub max_age_s: u64,
    /// Milliseconds that a request waits for one before it gets a sandbox like any other, 0–600,000.
    pub wait_ms: u64,
}

impl Default for Warm {
    fn default() -> Self {
        Self {
            template: "base".to_string(),
            vcpus: None,
            memory_mib: None,
            disk_mib: None,
            network: false,
            min_ready: 1,
            max: 8,
            idle_timeout_s: 300,
            max_age_s: 3600,
            wait_ms: 0,
        }
    }
}

impl Warm {
    /// What bounds its pool.
    pub fn limits(&self) -> Limits {
        limits(self.min_ready, self.max, self.idle_timeout_s, self.max_age_s, self.wait_ms)
    }

    /// What its sandboxes are.
    ///
    /// # Errors
    /// As of a request for such a sandbox.
    pub fn spec(&self, defaults: Defaults) -> Result<Spec, Error> {
        let shape = [("vcpus", self.vcpus), ("memory_mib", self.memory_mib), ("disk_mib", self.disk_mib)];
        let shape = shape.into_iter().filter_map(|(key, value)| Some((key, value?)));
        let request = Request::new("", "sandbox.create").set("template", &self.template);
        let request = request.set("network", if self.network { "on" } else { "off" });
        Spec::take(&mut Args::of(shape.fold(request, |request, (key, value)| request.set(key, value))), defaults)
    }

    pub(super) fn validate(&self) -> Result<(), (&'static str, String)> {
        let defaults = Defaults { vcpus: 1, memory_mib: 512, time_limits: TimeLimits::NONE };
        self.spec(defaults).map_err(|error| ("warm", error.message))?;
        within("warm.min_ready", self.min_ready, 0..=256)?;
        within("warm.max", self.max, 1..=65_536)?;
        within("warm.idle_timeout_s", self.idle_timeout_s, 1..=86_400)?;
        within("warm.max_age_s", self.max_age_s, 60..=2_592_000)?;
        within("warm.wait_ms", self.wait_ms, 0..=600_000)
    }
}

fn limits(min_ready: u64, max: u64, idle_s: u64, age_s: u64, wait_ms: u64) -> Limits {
    let count = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
    Limits {
        min_ready: count(min_ready),
        max: count(max),
        idle: Duration::from_secs(idle_s),
        age: Duration::from_secs(age_s),
        wait: Duration::from_millis(wait_ms),
    }
}

impl Default for Jail {
    fn default() -> Self {
        // Beyond what distributions give to users, system services and user namespaces (systemd's UIDS-GIDS.md).
        Self { uid_first: 2_100_000_000, uid_count: 65_536 }
    }
}

impl Jail {
    /// All user ids.
    pub fn uids(&self) -> std::ops::Range<u32> {
        let id = |id: u64| u32::try_from(id).unwrap_or(u32::MAX);
        id(self.uid_first)..id(self.uid_first.saturating_add(self.uid_count))
    }

    pub(super) fn validate(&self) -> Result<(), (&'static str, String)> {
        within("jail.uid_first", self.uid_first, 1000..=4_000_000_000)?;
        within("jail.uid_count", self.uid_count, 1..=1_000_000)
    }
}

impl Default for Disks {
    fn default() -> Self {
        Self { directory: "/data/disks".into(), devices: BTreeMap::new() }
    }
}

impl Disks {
    pub(super) fn validate(&self) -> Result<(), (&'static str, String)> {
        absolute("disks.directory", &self.directory)?;
        for (name, path) in &self.devices {
            if !is_file_name(name) {
                return Err(("disks.devices", format!("{name:?} is not a name of letters, digits, . _ and -")));
            }
            absolute("disks.devices", path)?;
        }
        Ok(())
    }
}

impl Default for Network {
    fn default() -> Self {
        Self {
            range: "10.201.0.0/16".to_string(),
            never: Vec::new(),
            dns: vec!["1.1.1.1".to_string(), "9.9.9.9".to_string()],
            min_ready: 4,
            max: 1024,
            idle_timeout_s: 300,
            max_age_s: 86_400,
            wait_ms: 5000,
        }
    }
}

impl Network {
    /// The table as the network takes it. The error names the key that is at fault.
    pub fn settings(&self, run: &Path) -> Result<Settings, (&'static str, String)> {
        let range = self.range.parse().map_err(|e| ("network.range", e))?;
        let plan = Plan::new(range)
            .ok_or_else(|| ("network.range", format!("{range} is out of range: a prefix of /15 to /31")))?;
        within("network.min_ready", self.min_ready, 0..=1024)?;
        within("network.max", self.max, 1..=u64::from(MAX_SLOTS))?;
        let slots = plan.slots();
        if self.max > u64::from(slots) {
            return Err(("network.max", format!("{} slots are more than {range} has: {slots}", self.max)));
        }
        within("network.idle_timeout_s", self.idle_timeout_s, 1..=86_400)?;
        within("network.max_age_s", self.max_age_s, 60..=2_592_000)?;
        within("network.wait_ms", self.wait_ms, 0..=600_000)?;
        let never = self.never.iter().map(|text| text.parse().map_err(|e| ("network.never", e)));
        let never = never.collect::<Result<Vec<Cidr>, _>>()?;
        self.servers(&never, range)?;
        let limits = limits(self.min_ready, self.max, self.idle_timeout_s, self.max_age_s, self.wait_ms);
        Ok(Settings { plan, limits, never, run: run.to_path_buf() })
    }

    /// Name servers that no sandbox could reach are a mistake.
    fn servers(&self, never: &[Cidr], range: Cidr) -> Result<(), (&'static str, String)> {
        if self.dns.len() > MAX_DNS {
            return Err(("network.dns", format!("{} servers are over the limit of {MAX_DNS}", self.dns.len())));
        }
        for server in &self.dns {
            let address = server.parse::<std::net::Ipv4Addr>();
            let address = address.map_err(|_| ("network.dns", format!("{server:?} is no IPv4 address")))?;
            let one = Cidr::new(address.octets(), 32);
            let why = never.iter().chain([&range]).find(|range| range.contains(address));
            let why = special(one).map(str::to_string).or_else(|| why.map(|range| format!("within {range}")));
            if let Some(why) = why {
                return Err(("network.dns", format!("{server} can be reached by no sandbox: {why}")));
            }
        }
        Ok(())
    }
}

impl Default for Sandbox {
    fn default() -> Self {
        Self {
            default_vcpus: 1,
            default_memory_mib: 512,
            default_extra_disk_mib: 1024,
            default_ttl: "none".to_string(),
            default_idle_timeout: "none".to_string(),
            default_max_lifetime: "none".to_string(),
            max_sandboxes: 1024,
            boot_timeout_s: 30,
            stop_timeout_s: 10,
            exec_ring_kib: 1024,
            prepared: 2,
        }
    }
}

impl Control {
    /// `socket_mode` as a number.
    pub fn socket_mode(&self) -> Option<u32> {
        u32::from_str_radix(&self.socket_mode, 8).ok().filter(|mode| mode & !0o666 == 0 && mode & 0o600 == 0o600)
    }

    pub(super) fn validate(&self) -> Result<(), (&'static str, String)> {
        absolute("control.socket", &self.socket)?;
        if self.socket_mode().is_none() {
            return Err((
                "control.socket_mode",
                format!("{:?} is no mode from \"0600\" to \"0666\"", self.socket_mode),
            ));
        }
        let key = "control.peers";
        within(key, self.peers.len() as u64, 0..=1024)?;
        for rule in &self.peers {
            if rule.uid.is_none() && rule.gid.is_none() {
                return Err((key, "a rule names neither uid nor gid".to_string()));
            }
            if let Some(owner) = &rule.owner {
                check_name("owner", owner).map_err(|error| (key, error.message))?;
            }
        }
        within("control.max_clients", self.max_clients, 1..=4096)?;
        within("control.max_requests_per_client", self.max_requests_per_client, 1..=65_536)
    }
}

impl Sandbox {
    /// What a sandbox has of which a request says nothing.
    pub fn defaults(&self) -> Defaults {
        Defaults {
            vcpus: u8::try_from(self.default_vcpus).unwrap_or(1),
            memory_mib: u32::try_from(self.default_memory_mib).unwrap_or(512),
            time_limits: self.time_limits().unwrap_or_default(),
        }
    }

    fn time_limits(&self) -> Result<TimeLimits, (&'static str, String)> {
        let limits = [
            ("sandbox.default_ttl", Clock::Ttl, &self.default_ttl),
            ("sandbox.default_idle_timeout", Clock::Idle, &self.default_idle_timeout),
            ("sandbox.default_max_lifetime", Clock::Lifetime, &self.default_max_lifetime),
        ];
        limits.into_iter().try_fold(TimeLimits::NONE, |limits, (key, clock, text)| {
            let limit = time_limits::parse(text).map_err(|error| (key, error.message))?;
            Ok(limits.with(&[(clock, limit)]))
        })
    }

    /// `boot_timeout_s` as a duration.
    pub fn boot_timeout(&self) -> Duration {
        Duration::from_secs(self.boot_timeout_s)
    }

    /// `stop_timeout_s` as a duration.
    pub fn stop_timeout(&self) -> Duration {
        Duration::from_secs(self.stop_timeout_s)
    }

    pub(super) fn validate(&self) -> Result<(), (&'static str, String)> {
        within("sandbox.default_vcpus", self.default_vcpus, 1..=16)?;
        within("sandbox.default_memory_mib", self.default_memory_mib, 64..=32_768)?;
        within("sandbox.default_extra_disk_mib", self.default_extra_disk_mib, 0..=1_048_576)?;
        self.time_limits()?;
        within("sandbox.max_sandboxes", self.max_sandboxes, 1..=65_536)?;
        within("sandbox.boot_timeout_s", self.boot_timeout_s, 1..=600)?;
        within("sandbox.stop_timeout_s", self.stop_timeout_s, 0..=600)?;
        within("sandbox.exec_ring_kib", self.exec_ring_kib, 16..=1_048_576)?;
        within("sandbox.prepared", self.prepared, 0..=256)
    }
}
