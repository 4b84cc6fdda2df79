//! What is asked of a new sandbox, with its limits.

use crate::wire::{Args, Code, Decoded, Decoder, Error, Fields, Message, Request};

use super::disk::DiskSpec;
use super::id::check_name;
use super::network;
use super::restart::Restart;
use super::time_limits::{self, TimeLimits};
use crate::network::policy::Policy;
use crate::storage::template_file;

/// Fewest and most virtual CPUs.
pub const VCPUS: std::ops::RangeInclusive<u64> = 1..=16;
/// Time of processors, in hundredths of one; no more than the sandbox has.
pub const CPU_QUOTA: std::ops::RangeInclusive<u64> = 1..=1600;
/// Least and most memory, in MiB.
pub const MEMORY_MIB: std::ops::RangeInclusive<u64> = 64..=32 * 1024;
/// Least memory that a running sandbox can be asked to do with, in MiB.
pub const MIN_MEMORY_TARGET_MIB: u64 = 32;
/// Largest disk, in MiB (1 TiB).
pub const MAX_DISK_MIB: u64 = 1024 * 1024;
/// Limit of requests to all disks together, for each second.
pub const DISK_IOPS: std::ops::RangeInclusive<u64> = 1..=10_000_000;
/// Limit of octets to and from all disks together, in 10^6 for each second.
pub const DISK_MBPS: std::ops::RangeInclusive<u64> = 1..=1_000_000;
/// Limit of octets each way over the network, in 10^6 for each second.
pub const NET_MBPS: std::ops::RangeInclusive<u64> = 1..=1_000_000;
/// What the node's own labels begin with.
const OWN_LABELS: &str = "warren.";
/// Label of a sandbox that a template is built in: its name.
const BUILDER: &str = "warren.build";
/// Most env entries and labels, each.
const MAX_ENTRIES: usize = 256;

/// A request for a sandbox, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    /// Template to start from.
    pub template: String,
    /// A name that a person chose.
    pub name: Option<String>,
    /// 1 to 16.
    pub vcpus: u8,
    /// Time of processors that it may take, in hundredths of one; that of its own when not said.
    pub cpu_quota: Option<u64>,
    /// 64 to 32768.
    pub memory_mib: u32,
    /// Size of the root disk; the template's size and the node's default on top when not said.
    pub disk_mib: Option<u64>,
    /// Disks beside the root disk, at most 8.
    pub disks: Vec<DiskSpec>,
    /// Requests to all disks together for each second; no limit when not said.
    pub disk_iops: Option<u64>,
    /// Octets to and from all disks together, in 10^6 for each second; no limit when not said.
    pub disk_mbps: Option<u64>,
    /// What it may reach; without a network device when not said, or off.
    pub network: Option<Policy>,
    /// Octets each way over the network, in 10^6 for each second; no limit when not said.
    pub net_mbps: Option<u64>,
    /// Whether it is started again when it fails.
    pub restart: Restart,
    /// How long it may be there.
    pub time_limits: TimeLimits,
    /// Its programs, but for root's, write below `/workspace` and `/tmp` only.
    pub read_only: bool,
    /// `KEY=value` for every program in the sandbox.
    pub env: Vec<String>,
    /// For people and programs to find it by.
    pub labels: Vec<(String, String)>,
}

/// What is to be changed of a running sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Update {
    /// Memory that the guest is asked to do with, in MiB; at least `MIN_MEMORY_TARGET_MIB`.
    Memory(u64),
    /// What it may reach over the network.
    Network(Policy),
    /// How much it may take.
    Quota(Quota),
    /// How long it may be there.
    TimeLimits(Vec<time_limits::Change>),
}

/// A change of what a running sandbox may take: what is not named stays, and 0 is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Quota {
    /// As `Spec::cpu_quota`.
    pub cpu: Option<u64>,
    /// As `Spec::disk_iops`.
    pub disk_iops: Option<u64>,
    /// As `Spec::disk_mbps`.
    pub disk_mbps: Option<u64>,
    /// As `Spec::net_mbps`.
    pub net_mbps: Option<u64>,
}

impl Quota {
    /// Takes a change from a request's arguments; `None` where they name none.
    pub fn take(args: &mut Args) -> Result<Option<Self>, Error> {
        let mut number = |key, limits: std::ops::RangeInclusive<u64>| args.number(key, 0..=*limits.end());
        let quota = Self {
            cpu: number("cpu_quota", CPU_QUOTA)?,
            disk_iops: number("disk_iops", DISK_IOPS)?,
            disk_mbps: number("disk_mbps", DISK_MBPS)?,
            net_mbps: number("net_mbps", NET_MBPS)?,
        };
        Ok((quota != Self::default()).then_some(quota))
    }
}

/// What the node gives when a request does not say.
#[derive(Debug, Clone, Copy)]
pub struct Defaults {
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// How long it may be there.
    pub time_limits: TimeLimits,
}

impl Spec {
    /// Takes a spec from a request's arguments; `template` when they name none.
    pub fn take(args: &mut Args, defaults: Defaults) -> Result<Self, Error> {
        let template = args.text("template")?.unwrap_or_else(|| "base".to_string());
        check_template_name(&template)?;
        let name = args.text("name")?;
        if let Some(name) = &name {
            check_name("name", name)?;
        }
        let vcpus = args.number("vcpus", VCPUS)?.map_or(defaults.vcpus, |n| u8::try_from(n).unwrap_or(u8::MAX));
        let memory_mib = args
            .number("memory_mib", MEMORY_MIB)?
            .map_or(defaults.memory_mib, |n| u32::try_from(n).unwrap_or(u32::MAX));
        let cpu_quota = args.number("cpu_quota", CPU_QUOTA)?;
        check_cpu_quota(cpu_quota, vcpus)?;
        let disk_mib = args.number("disk_mib", 1..=MAX_DISK_MIB)?;
        let disk_iops = args.number("disk_iops", DISK_IOPS)?;
        let disk_mbps = args.number("disk_mbps", DISK_MBPS)?;
        let disks = DiskSpec::take(args)?;
        let network = network::take(args)?.filter(|policy| policy.on);
        let net_mbps = args.number("net_mbps", NET_MBPS)?;
        if net_mbps.is_some() && network.is_none() {
            return Err(bad("net_mbps", "net_mbps has a meaning with network=on only"));
        }
        let restart = args.text("restart")?.map_or(Ok(Restart::Never), |text| text.parse());
        let restart = restart.map_err(|message: String| bad("restart", message))?;
        let time_limits = defaults.time_limits.with(&time_limits::take(args)?);
        let read_only = args.flag("read_only")?;
        let mut env = Vec::new();
        for entry in args.all("env") {
            env.push(check_env(entry)?);
        }
        let mut labels = Vec::new();
        for entry in args.all("label") {
            let entry = String::from_utf8(entry).map_err(|_| bad("label", "a label is not UTF-8"))?;
            let Some((key, value)) = entry.split_once('=') else {
                return Err(bad("label", format!("label={entry} is not of the form key=value")));
            };
            check_name("label", key)?;
            labels.push((key.to_string(), value.to_string()));
        }
        for (what, count) in [("env", env.len()), ("label", labels.len())] {
            if count > MAX_ENTRIES {
                return Err(bad(what, format!("{count} of {what} are over the limit of {MAX_ENTRIES}"))
                    .with("max", MAX_ENTRIES));
            }
        }
        Ok(Self {
            template,
            name,
            vcpus,
            cpu_quota,
            memory_mib,
            disk_mib,
            disks,
            disk_iops,
            disk_mbps,
            network,
            net_mbps,
            restart,
            time_limits,
            read_only,
            env,
            labels,
        })
    }

    /// Makes it a builder of that template.
    pub fn build_of(&mut self, template: &str) {
        self.builds_no_more();
        self.labels.push((BUILDER.to_string(), template.to_string()));
    }

    /// Whether a template is built in it, or tried.
    pub fn is_builder(&self) -> bool {
        self.labels.iter().any(|(key, _)| key == BUILDER)
    }

    /// Whether a template's disk is filled in it.
    pub fn fills_a_disk(&self) -> bool {
        self.is_builder() && !template_file::is_staged(&self.template)
    }

    /// It is no builder.
    pub fn builds_no_more(&mut self) {
        self.labels.retain(|(key, _)| key != BUILDER);
    }

    /// What only the node says of a sandbox is refused: labels of its own, a template without a name.
    pub fn check_asked(&self) -> Result<(), Error> {
        if template_file::is_staged(&self.template) {
            return check_name("template", &self.template);
        }
        match self.labels.iter().find(|(key, _)| key.starts_with(OWN_LABELS)) {
            Some((key, _)) => Err(bad("label", format!("label {key} is one that only the node gives"))),
            None => Ok(()),
        }
    }

    /// The spec as one line, for a snapshot's settings. Its name is not part of it: that is one sandbox's own.
    pub fn to_line(&self) -> String {
        let fields = self.fields(Fields::new()).0.into_iter();
        let request = Request::new("settings", "sandbox.create");
        let request = fields.fold(request, |request, (key, value)| request.set_bytes(&key, &value));
        String::from_utf8_lossy(&Message::Request(request).to_bytes()).trim_end().to_string()
    }

    /// Reads what `to_line` gives.
    ///
    /// # Errors
    /// `CORRUPT` where it is no such line, or names what a sandbox cannot be.
    pub fn of_line(line: &str, defaults: Defaults) -> Result<Self, Error> {
        let mut decoder = Decoder::new();
        decoder.push(line.as_bytes());
        decoder.push(b"\n");
        let Some(Decoded::Message(Message::Request(request))) = decoder.next() else {
            return Err(Error::new(Code::Corrupt, "the settings of the snapshot's sandbox cannot be read"));
        };
        let mut args = Args::of(request);
        Self::take(&mut args, defaults).and_then(|spec| args.finish().map(|()| spec)).map_err(|error| {
            Error::new(Code::Corrupt, format!("the settings of the snapshot's sandbox: {}", error.message))
        })
    }

    /// The spec after a change.
    pub fn with(&self, quota: &Quota) -> Self {
        let changed = |before: Option<u64>, change: Option<u64>| match change {
            Some(limit) => (limit > 0).then_some(limit),
            None => before,
        };
        Self {
            cpu_quota: changed(self.cpu_quota, quota.cpu),
            disk_iops: changed(self.disk_iops, quota.disk_iops),
            disk_mbps: changed(self.disk_mbps, quota.disk_mbps),
            net_mbps: changed(self.net_mbps, quota.net_mbps),
            ..self.clone()
        }
    }

    /// What it may take, as fields of a reply.
    pub fn limits(&self, fields: Fields) -> Fields {
        let limits = [
            ("cpu_quota", self.cpu_quota),
            ("disk_iops", self.disk_iops),
            ("disk_mbps", self.disk_mbps),
            ("net_mbps", self.net_mbps),
        ];
        let limits = limits.into_iter().filter_map(|(key, limit)| Some((key, limit?)));
        limits.fold(fields, |fields, (key, limit)| fields.with(key, limit))
    }

    /// The spec as fields of a reply.
    pub fn fields(&self, fields: Fields) -> Fields {
        let fields = fields
            .with("template", &self.template)
            .with("vcpus", self.vcpus)
            .with("memory_mib", self.memory_mib)
            .with("disk_mib", self.disk_mib.unwrap_or(0));
        let fields = self.disks.iter().fold(fields, |fields, disk| fields.with("disk", disk));
        let fields = network::fields(self.network.as_ref(), fields);
        let fields = self.limits(fields);
        let fields = self.time_limits.fields(fields.with("restart", self.restart));
        let fields = if self.read_only { fields.with("read_only", true) } else { fields };
        let fields = self.env.iter().fold(fields, |fields, entry| fields.with("env", entry));
        self.labels.iter().fold(fields, |fields, (key, value)| fields.with("label", format!("{key}={value}")))
    }
}

/// More time than its processors have would be no limit.
pub fn check_cpu_quota(quota: Option<u64>, vcpus: u8) -> Result<(), Error> {
    let max = u64::from(vcpus) * 100;
    match quota {
        Some(quota) if quota > max => {
            let message = format!("cpu_quota={quota} is out of range: {} to {max} (its processors)", CPU_QUOTA.start());
            let error = Error::new(Code::OutOfRange, message).with("argument", "cpu_quota");
            Err(error.with("min", CPU_QUOTA.start()).with("max", max))
        }
        _ => Ok(()),
    }
}

/// The name of a template may have a tag, or be one of those that only the node gives, in settings that it wrote.
fn check_template_name(name: &str) -> Result<(), Error> {
    if template_file::is_staged(name) {
        return Ok(());
    }
    match name.split_once(':') {
        Some((name, tag)) => check_name("template", name).and_then(|()| check_name("template", tag)),
        None => check_name("template", name),
    }
}

fn bad(argument: &str, message: impl Into<String>) -> Error {
    Error::new(Code::BadArgument, message).with("argument", argument)
}

fn check_env(entry: Vec<u8>) -> Result<String, Error> {
    let entry = String::from_utf8(entry).map_err(|_| bad("env", "an env entry is not UTF-8"))?;
    match entry.split_once('=') {
        Some((key, _)) if !key.is_empty() && !entry.contains('\0') => Ok(entry),
        _ => Err(bad("env", format!("env={} is not of the form KEY=value", entry.escape_debug()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Request;

    const DEFAULTS: Defaults = Defaults { vcpus: 1, memory_mib: 512, time_limits: TimeLimits::NONE };

    fn take(request: Request) -> Result<Spec, Error> {
        Spec::take(&mut Args::of(request), DEFAULTS)
    }

    #[test]
    fn what_is_not_said_has_defaults() {
        let spec = take(Request::new("1", "sandbox.create")).expect("all defaults");
        assert_eq!((spec.template.as_str(), spec.vcpus, spec.memory_mib, spec.disk_mib), ("base", 1, 512, None));
    }

    #[test]
    fn out_of_range_names_the_value_and_the_limits() {
        for (key, value, min, max) in [
            ("vcpus", "0", "1", "16"),
            ("vcpus", "17", "1", "16"),
            ("memory_mib", "1", "64", "32768"),
            ("memory_mib", "1073741824", "64", "32768"),
            ("disk_iops", "0", "1", "10000000"),
            ("disk_mbps", "1000001", "1", "1000000"),
        ] {
            let error = take(Request::new("1", "sandbox.create").set(key, value)).expect_err("out of range");
            assert!(error.is(Code::OutOfRange), "{error}");
            assert_eq!((error.fields.get("min"), error.fields.get("max")), (Some(min), Some(max)));
            assert!(error.message.contains(value), "{error}");
        }
    }

    #[test]
    fn a_change_of_limits_changes_what_it_names() {
        let spec = take(Request::new("1", "sandbox.create").set("disk_iops", 5).set("cpu_quota", 100)).unwrap();
        assert!(take(Request::new("1", "sandbox.create").set("cpu_quota", 101)).unwrap_err().is(Code::OutOfRange));
        let request = Request::new("1", "sandbox.update").set("disk_iops", 0).set("disk_mbps", 7);
        let quota = Quota::take(&mut Args::of(request)).unwrap().unwrap();
        let changed = spec.with(&quota);
        assert_eq!((changed.cpu_quota, changed.disk_iops, changed.disk_mbps), (Some(100), None, Some(7)));
        assert_eq!(Quota::take(&mut Args::of(Request::new("1", "sandbox.update"))).unwrap(), None);
    }

    #[test]
    fn the_settings_of_a_snapshot_are_read_as_they_were_written() {
        let request = Request::new("1", "sandbox.create").set("vcpus", 2).set("disk_mib", 700).set("network", "on");
        let request = request.set("deny", "10.0.0.0/8").set("net_mbps", 5).set("restart", "on-failure:3");
        let request = request.set("env", "A=x y\n=z").set("env", "B=").set("label", "team=blue").set("disk_iops", 9);
        let request = request.set("read_only", true);
        let spec = take(request).unwrap();
        assert_eq!(Spec::of_line(&spec.to_line(), DEFAULTS).unwrap(), spec);
        for line in ["", "x", "settings sandbox.create vcpus=99", "settings sandbox.create surprise=1"] {
            assert!(Spec::of_line(line, DEFAULTS).unwrap_err().is(Code::Corrupt), "{line}");
        }
    }

    #[test]
    fn ill_formed_entries_are_refused() {
        for (key, value) in [
            ("env", "A"),
            ("env", "=x"),
            ("env", "A=\0"),
            ("label", "x"),
            ("label", "X=1"),
            ("template", "../x"),
            ("name", ""),
            ("restart", "always"),
        ] {
            let error = take(Request::new("1", "sandbox.create").set(key, value)).expect_err(value);
            assert!(error.is(Code::BadArgument), "{error}");
        }
    }
}
