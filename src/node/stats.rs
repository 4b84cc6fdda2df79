//! What clients ask of a worker: how its sandbox is, and to change it while it runs.

use std::fs::File;
use std::io;
use std::time::Duration;

use super::instance::Sandbox;
use super::requests::Job;
use super::supervisor::{Supervisor, Timer};
use crate::sandbox::id::SandboxId;
use crate::sandbox::lifecycle::State;
use crate::sandbox::limits::Limits;
use crate::sandbox::spec::{MIN_MEMORY_TARGET_MIB, Quota, Spec, Update, check_cpu_quota};
use crate::sandbox::usage::Usage;
use crate::wire::{Code, Error, Fields, Message, Request};

/// How long the guest's kernel may take to say how its memory is; then there is what it said before.
const GUEST_WAIT_MS: u64 = 500;
/// How long a worker may take to answer.
const WORKER_WAIT: Duration = Duration::from_secs(3);
/// A worker that leaves this many octets of requests unread gets no more.
const UNREAD_MAX: usize = 64 * 1024;

/// Counters of a worker that are passed on as they are.
const PASSED_ON: &[&str] = &[
    "block_read_bytes",
    "block_written_bytes",
    "block_requests",
    "block_flushes",
    "block_errors",
    "net_rx_bytes",
    "net_rx_packets",
    "net_rx_waits",
    "net_rx_dropped",
    "net_tx_bytes",
    "net_tx_packets",
    "net_tx_waits",
    "net_tx_dropped_length",
    "net_tx_dropped_header",
    "net_tx_dropped_mac",
    "net_tx_dropped_address",
    "net_tx_dropped_vlan",
    "net_tx_dropped_protocol",
    "net_tx_dropped_host",
    "serial_dropped_bytes",
    "vsock_rx_bytes",
    "vsock_tx_bytes",
    "vsock_rx_packets",
    "vsock_tx_packets",
    "vsock_connections",
    "exits",
    "exits_io",
    "exits_mmio",
    "exits_interrupted",
    "kvm_exits",
    "kvm_exits_halt",
    "kvm_exits_interrupt",
    "kvm_exits_io",
    "kvm_exits_mmio",
];

/// What is passed on of each disk.
const OF_DISK: &[&str] = &[
    "requests",
    "reads",
    "writes",
    "flushes",
    "discards",
    "read_bytes",
    "written_bytes",
    "discarded_bytes",
    "errors",
    "without_room",
    "throttled",
    "queue",
];
/// Disks of one answer at most.
const MAX_ROWS: usize = 16;
/// Longest name of a disk, longest histogram.
const MAX_TEXT: usize = 1024;

/// What a request on a worker's control link was for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inquiry {
    /// The client's key.
    pub client: u64,
    /// The tag of its request.
    pub tag: String,
    /// What becomes of the answer.
    pub purpose: Purpose,
    /// Rows passed on so far.
    pub rows: usize,
}

/// What becomes of a worker's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// It is the worker's part of `sandbox.stats`.
    Stats,
    /// It is the end of `sandbox.update`: this is what holds now.
    Update {
        /// Memory that the guest is asked to do with, in MiB.
        memory_target_mib: u64,
    },
    /// The same for what the sandbox may take; the cgroup's limits follow the worker's.
    Quota(Quota),
}

impl Supervisor {
    /// Asks a sandbox's worker how it is.
    pub(super) fn ask_stats(&mut self, key: u64, tag: &str, given: &str) -> Result<(), Error> {
        let id = self.find(key, given)?;
        let request = Request::new("", "vm.stats").set("wait_ms", GUEST_WAIT_MS);
        self.ask_worker(key, tag, &id, request, Purpose::Stats)
    }

    /// Asks a sandbox's worker to change it.
    pub(super) fn ask_update(&mut self, key: u64, tag: &str, given: &str, update: Update) -> Result<(), Error> {
        let id = self.find(key, given)?;
        let mib = match update {
            Update::Memory(mib) => mib,
            Update::Network(policy) => return self.ask_network(key, tag, &id, policy),
            Update::Quota(quota) => return self.ask_quota(key, tag, &id, quota),
            Update::TimeLimits(changes) => return self.ask_time_limits(key, tag, &id, &changes),
        };
        let Some(sandbox) = self.sandboxes.get(&id) else { return Ok(()) };
        let max = u64::from(sandbox.spec.memory_mib);
        if mib > max {
            let why = format!(
                "memory_target_mib={mib} is out of range: {MIN_MEMORY_TARGET_MIB} to {max} (the sandbox's memory)"
            );
            let error = Error::new(Code::OutOfRange, why).with("argument", "memory_target_mib");
            return Err(error.with("min", MIN_MEMORY_TARGET_MIB).with("max", max));
        }
        let request = Request::new("", "vm.balloon").set("target_mib", mib);
        self.ask_worker(key, tag, &id, request, Purpose::Update { memory_target_mib: mib })
    }

    /// Changes what a running sandbox may take: of disks and network first in the worker, then in the cgroup.
    fn ask_quota(&mut self, key: u64, tag: &str, id: &SandboxId, quota: Quota) -> Result<(), Error> {
        let Some(sandbox) = self.sandboxes.get(id) else { return Ok(()) };
        if sandbox.state != State::Running {
            let error = Error::new(Code::BadState, format!("sandbox {id} is {}, not running", sandbox.state));
            return Err(error.with("state", sandbox.state));
        }
        check_cpu_quota(quota.cpu, sandbox.spec.vcpus)?;
        if quota.net_mbps.is_some() && sandbox.slot.is_none() {
            let message = format!("sandbox {id} was created without a network: it has no network device");
            return Err(Error::new(Code::BadState, message).with("state", sandbox.state));
        }
        let bytes = |mbps: Option<u64>| mbps.map(|mbps| mbps * 1_000_000);
        let limits = [
            ("disk_iops", quota.disk_iops),
            ("disk_bytes_per_s", bytes(quota.disk_mbps)),
            ("net_rx_bytes_per_s", bytes(quota.net_mbps)),
            ("net_tx_bytes_per_s", bytes(quota.net_mbps)),
        ];
        let limits = limits.into_iter().filter_map(|(key, limit)| Some((key, limit?)));
        let request = limits.fold(Request::new("", "vm.limits"), |request, (key, limit)| request.set(key, limit));
        self.ask_worker(key, tag, id, request, Purpose::Quota(quota))
    }

    fn ask_worker(
        &mut self,
        key: u64,
        tag: &str,
        id: &SandboxId,
        mut request: Request,
        purpose: Purpose,
    ) -> Result<(), Error> {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return Ok(()) };
        let state = sandbox.state;
        let Some(worker) = sandbox.worker.as_mut().filter(|worker| !worker.dead) else {
            let error = Error::new(Code::BadState, format!("sandbox {id} is {state}, not running"));
            return Err(error.with("state", state));
        };
        if let Some(error) = &worker.foreign {
            return Err(error.clone());
        }
        if worker.link.queued() > UNREAD_MAX {
            return Err(Error::new(Code::LinkLost, format!("the worker of sandbox {id} takes no requests")));
        }
        worker.next_inquiry += 1;
        let route = format!("i{}", worker.next_inquiry);
        request.tag.clone_from(&route);
        worker.link.send(&Message::Request(request));
        worker.inquiries.insert(route.clone(), Inquiry { client: key, tag: tag.to_string(), purpose, rows: 0 });
        self.touched_sandboxes.insert(id.clone());
        self.timers.after(WORKER_WAIT, Timer::Inquiry { sandbox: id.clone(), route: route.clone() });
        self.add_job(key, tag, Job::Inquiry { sandbox: id.clone(), route });
        Ok(())
    }

    /// A client no longer wants the answer; the worker's own bound ends the work.
    pub(super) fn forget_inquiry(&mut self, id: &SandboxId, route: &str) {
        if let Some(worker) = self.sandboxes.get_mut(id).and_then(|sandbox| sandbox.worker.as_mut()) {
            worker.inquiries.remove(route);
        }
    }

    /// A worker answered.
    pub(super) fn take_inquiry(&mut self, id: &SandboxId, message: &Message) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let Some(worker) = &mut sandbox.worker else { return };
        if let Message::Item { tag, fields } = message {
            let Some(inquiry) = worker.inquiries.get_mut(tag) else { return };
            if inquiry.purpose == Purpose::Stats && inquiry.rows < MAX_ROWS {
                inquiry.rows += 1;
                let (client, row) = (inquiry.client, Message::item(&inquiry.tag, disk_fields(fields)));
                self.answer(client, &row);
            }
            return;
        }
        let Some(Inquiry { client, tag, purpose, .. }) = worker.inquiries.remove(message.tag()) else { return };
        let answer = match (message, purpose) {
            (Message::Ok { fields, .. }, Purpose::Stats) => {
                let usage = Usage::of(&sandbox.home);
                let reply = Fields::new().with("id", id).with("state", sandbox.state);
                Message::ok(&tag, guest_fields(usage.fields(reply), u64::from(sandbox.spec.memory_mib), fields))
            }
            (Message::Ok { .. }, Purpose::Update { memory_target_mib }) => {
                Message::ok(&tag, Fields::new().with("id", id).with("memory_target_mib", memory_target_mib))
            }
            (Message::Ok { .. }, Purpose::Quota(quota)) => {
                let spec = sandbox.spec.with(&quota);
                match limit_group(&spec, sandbox) {
                    Ok(()) => {
                        sandbox.spec = spec;
                        let fields = sandbox.spec.limits(Fields::new().with("id", id));
                        self.record(id);
                        Message::ok(&tag, fields)
                    }
                    Err(e) => {
                        let message = format!("the control group of sandbox {id} cannot be limited: {e}");
                        Message::err(&tag, Error::new(Code::Internal, message))
                    }
                }
            }
            (Message::Err { error, .. }, _) => Message::err(&tag, error.clone()),
            _ => return,
        };
        self.finish(client, &answer);
    }

    /// A worker did not answer in time.
    pub(super) fn inquiry_expired(&mut self, id: &SandboxId, route: &str) {
        let worker = self.sandboxes.get_mut(id).and_then(|sandbox| sandbox.worker.as_mut());
        let Some(inquiry) = worker.and_then(|worker| worker.inquiries.remove(route)) else { return };
        let seconds = WORKER_WAIT.as_secs();
        let error = Error::new(Code::LinkLost, format!("the worker of sandbox {id} did not answer within {seconds} s"));
        self.finish(inquiry.client, &Message::err(&inquiry.tag, error));
    }
}

/// Puts the limits of processors and disks on a sandbox's cgroup.
fn limit_group(spec: &Spec, sandbox: &Sandbox) -> io::Result<()> {
    let limits = Limits {
        vcpus: spec.vcpus.into(),
        cpu_quota: spec.cpu_quota,
        disk_iops: spec.disk_iops,
        disk_bytes_per_s: spec.disk_mbps.map(|mbps| mbps * 1_000_000),
        ..Limits::default()
    };
    limits.change(sandbox.home.cgroup(), &File::open(sandbox.home.overlay())?)
}

/// The worker's answer as clients see it. It comes from a process that runs hostile code: only numbers are taken, and
/// what it says of memory is cut to what the sandbox has.
fn guest_fields(mut reply: Fields, memory_mib: u64, said: &Fields) -> Fields {
    let memory_kib = memory_mib << 10;
    let size = |key: &str| said.number(key).map(|kib| kib.min(memory_kib));
    reply = reply.with("memory_mib", memory_mib);
    let used = size("guest_total_kib").zip(size("guest_available_kib")).map(|(total, free)| total.saturating_sub(free));
    let rows = [
        ("memory_target_mib", size("memory_target_kib").map(|kib| kib >> 10)),
        ("memory_balloon_kib", size("balloon_kib")),
        ("memory_reported_kib", said.number("balloon_reported_kib")),
        ("memory_used_kib", used),
        ("memory_available_kib", size("guest_available_kib")),
        ("memory_free_kib", size("guest_free_kib")),
        ("memory_cache_kib", size("guest_cache_kib")),
        ("major_faults", said.number("guest_major_faults")),
        ("oom_kills", said.number("guest_oom_kills")),
        ("memory_age_ms", said.number("guest_age_ms")),
    ];
    let passed_on = PASSED_ON.iter().map(|key| (*key, said.number(key)));
    rows.into_iter()
        .chain(passed_on)
        .filter_map(|(key, value)| Some((key, value?)))
        .fold(reply, |reply, (key, value)| reply.with(key, value))
}

/// One disk's row as clients see it.
fn disk_fields(said: &Fields) -> Fields {
    let text = |key: &str, allowed: fn(char) -> bool| {
        said.get(key)
            .filter(|text| text.len() <= MAX_TEXT && text.chars().all(allowed))
            .map(|text| (key.to_string(), text))
    };
    let name = text("disk", |c| c.is_ascii_graphic());
    let histogram = text("latency_us", |c| c.is_ascii_digit() || c == ',');
    let row = name.into_iter().fold(Fields::new(), |row, (key, name)| row.with(&key, name));
    let numbers = OF_DISK.iter().filter_map(|key| Some((*key, said.number(key)?)));
    let row = numbers.fold(row, |row, (key, value)| row.with(key, value));
    histogram.into_iter().fold(row, |row, (key, histogram)| row.with(&key, histogram))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_worker_says_is_numbers_within_the_sandboxs_memory() {
        let said = Fields::new()
            .with("guest_total_kib", 1000)
            .with("guest_available_kib", 400)
            .with("guest_free_kib", u64::MAX)
            .with("guest_cache_kib", "much")
            .with("exits", 7)
            .with("surprise", 1);
        let fields = guest_fields(Fields::new(), 64, &said);
        assert_eq!(fields.number("memory_used_kib"), Some(600));
        assert_eq!(fields.number("memory_free_kib"), Some(64 << 10));
        assert_eq!(fields.number("exits"), Some(7));
        assert!(fields.get("memory_cache_kib").is_none() && fields.get("surprise").is_none());
        let disk = Fields::new().with("disk", "root").with("reads", 3).with("writes", "x").with("latency_us", "1,2");
        let row = disk_fields(&disk);
        assert_eq!((row.get("disk"), row.number("reads"), row.get("latency_us")), (Some("root"), Some(3), Some("1,2")));
        assert!(row.get("writes").is_none());
        let hostile = Fields::new().with("disk", "\x1b[2J").with("latency_us", "1;2");
        assert!(disk_fields(&hostile).0.is_empty());
        let lies = Fields::new().with("guest_total_kib", 1).with("guest_available_kib", 2);
        assert_eq!(guest_fields(Fields::new(), 64, &lies).number("memory_used_kib"), Some(0));
    }
}
