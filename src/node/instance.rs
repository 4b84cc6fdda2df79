//! A sandbox while the supervisor looks after it: its record, its worker, its programs, who waits for it.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use mio::Token;
use mio::net::UnixStream;

use super::finish::Extent;
use super::fork::RollingBack;
use super::health::Probe;
use super::pause::Pausing;
use super::pools::Held;
use super::stats::Inquiry;
use super::time_limits::Clocks;
use super::warm::Parked;
use crate::control::list::ListQuery;
use crate::init::ChildStatus;
use crate::network::plan::Slot;
use crate::sandbox::agent::Agent;
use crate::sandbox::claims::Listing;
use crate::sandbox::disk::DiskSpec;
use crate::sandbox::exec::Exec;
use crate::sandbox::guest_log::GuestLog;
use crate::sandbox::home::Home;
use crate::sandbox::id::SandboxId;
use crate::sandbox::lifecycle::State;
use crate::sandbox::network;
use crate::sandbox::restart::Restart;
use crate::sandbox::spec::Spec;
use crate::sandbox::trace::Trace;
use crate::storage::snapshots::files::OVERLAY;
use crate::storage::state::{ExecutionRow, SandboxRow, Ticket};
use crate::wire::{Error, Fields, Link};

/// What a request on the agent link was for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route {
    /// `system.configure` after the start.
    Configure,
    /// `system.poweroff`; what comes of it shows when the worker ends.
    PowerOff,
    /// `exec.list` after the supervisor was restarted.
    Survey,
    /// A program.
    Exec(u64),
    /// A client's request that passes through.
    Relay {
        /// The client's key.
        client: u64,
        /// The tag of its request.
        tag: String,
    },
    /// `service.serve`: what programs log.
    Service,
    /// Whether it is there.
    Probe,
    /// Whether one that waits in a pool is there.
    Parked,
    /// `system.freeze` before a pause or a snapshot.
    Freeze,
    /// `system.thaw` that tells a guest who it is.
    Introduce,
    /// Nobody waits for the answer.
    Unheeded,
}

impl Route {
    /// Whether it ends with the first answer: anything before that is none.
    pub fn has_one_answer(&self) -> bool {
        matches!(self, Self::Configure | Self::Probe | Self::Parked | Self::Freeze | Self::Introduce)
    }
}

/// A worker process and the links to it.
#[derive(Debug)]
pub struct Worker {
    /// In the node's pid namespace.
    pub pid: i32,
    /// Becomes readable at its end; open for as long as that is watched.
    pub _pidfd: OwnedFd,
    /// Control of the machine.
    pub link: Link<UnixStream>,
    /// The guest's agent.
    pub agent: Agent,
    /// Requests under way on the agent link.
    pub routes: HashMap<String, Route>,
    /// Requests of clients under way on the control link, by their tags there.
    pub inquiries: HashMap<String, Inquiry>,
    /// Number of the last of them.
    pub next_inquiry: u64,
    /// Tags of the supervisor's own requests on the control link that are answered once, and were not yet.
    pub asked: Vec<&'static str>,
    /// What its agent has listed.
    pub listing: Listing,
    /// Event sources to forget with the worker: process, control link, agent link.
    pub tokens: [Token; 3],
    /// Why the machine could not be started, from `vm.start`.
    pub refusal: Option<Error>,
    /// How the process ended, from init.
    pub status: Option<ChildStatus>,
    /// It was asked to end the machine.
    pub told_to_stop: bool,
    /// The process has ended.
    pub dead: bool,
    /// Links to the agent that were lost while the worker lived.
    pub agent_losses: u32,
    /// Whether its agent answers.
    pub probe: Probe,
    /// Why it is ended, where the supervisor ends it for a reason.
    pub verdict: Option<String>,
    /// Why nothing is asked of it: it speaks another version of its link.
    pub foreign: Option<Error>,
    /// A disk of it found no room on the node: what its guest makes of that is not the guest's fault.
    pub disk_full: bool,
    /// It was asked which pages of that snapshot's memory its guest touched, and writes them there.
    pub learning: Option<(String, File)>,
}

impl Worker {
    /// Whether it answers what it was asked; it may once.
    pub fn answers(&mut self, tag: &str) -> bool {
        let at = self.asked.iter().position(|asked| *asked == tag);
        at.map(|at| self.asked.swap_remove(at)).is_some()
    }
}

/// Whose request waits for a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiter {
    /// The client's key.
    pub client: u64,
    /// The tag of its request.
    pub tag: String,
    /// What it waits for.
    pub what: Awaited,
}

/// What a client waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Awaited {
    /// The sandbox runs.
    Created {
        /// States are told on the way.
        progress: bool,
    },
    /// The sandbox has stopped.
    Stopped,
    /// The sandbox is gone.
    Removed,
    /// The sandbox is paused, and its worker gone.
    Paused,
    /// The sandbox runs again.
    Resumed,
    /// The sandbox, one of those of a fork, runs.
    Forked,
    /// The sandbox runs, and its template's snapshot can be taken.
    Prepared,
    /// The sandbox, in which a template is built, runs.
    Builder,
    /// The sandbox, in which a template is tried that was built, runs.
    Tried,
    /// The sandbox, in which a template was built, has stopped.
    Halted,
}

/// A sandbox the node knows.
#[derive(Debug)]
pub struct Sandbox {
    /// Its id.
    pub id: SandboxId,
    /// Whose it is.
    pub owner: String,
    /// What was asked for.
    pub spec: Spec,
    /// Hash of the template's image at creation, hex.
    pub template_sha256: String,
    /// Where it is in its life.
    pub state: State,
    /// Why it ended, or empty.
    pub reason: String,
    /// It is in error and is being started again.
    pub restarting: bool,
    /// How far its pause is, while it is being paused.
    pub pausing: Option<Pausing>,
    /// When the last pause or snapshot began, and how long it may take.
    pub capture: Option<(Instant, Duration)>,
    /// A thread makes the memory whole that it is paused as, and what is to be taken down when that has ended.
    pub settling: bool,
    /// See `settling`.
    pub after_settling: Option<Extent>,
    /// The snapshot that is being made of it.
    pub snapshotting: Option<String>,
    /// How far its rollback is.
    pub rolling_back: Option<RollingBack>,
    /// It was put back to a snapshot, and what runs in it is not known yet.
    pub returned: bool,
    /// The newest frozen layer under its private disk.
    pub layer: Option<String>,
    /// The snapshot whose memory it has, or is to have.
    pub snapshot: Option<String>,
    /// When it will be, in Unix milliseconds.
    pub restart_at_ms: Option<u64>,
    /// How often it was, and how often since it ran well.
    pub restarts: u32,
    /// See `restarts`.
    pub restarts_in_row: u32,
    /// Since when its agent does not answer, in Unix milliseconds.
    pub hung_ms: Option<u64>,
    /// Unix milliseconds.
    pub created_ms: u64,
    /// Unix milliseconds.
    pub started_ms: Option<u64>,
    /// Unix milliseconds.
    pub ended_ms: Option<u64>,
    /// Its places on the node.
    pub home: Home,
    /// Its place in the network, while it has one.
    pub slot: Option<Slot>,
    /// Its end of the network, until the worker has it.
    pub tap: Option<File>,
    /// A slot was asked for and not given back.
    pub holds_slot: bool,
    /// What is to be taken down once its slot is given back.
    pub after_network: Option<Extent>,
    /// The user id that its worker runs by, until all of that is taken down.
    pub uid: Option<u32>,
    /// It waits in a pool for whoever asks for one like it, or is on its way there.
    pub parked: Option<Parked>,
    /// What it has of the pools.
    pub held: Held,
    /// Its worker, while it has one that was started.
    pub worker: Option<Worker>,
    /// How much of its time is over.
    pub clocks: Clocks,
    /// Its programs.
    pub execs: BTreeMap<u64, Exec>,
    /// The number of the next program.
    pub next_exec: u64,
    /// What its programs log.
    pub guest_log: GuestLog,
    /// The state that events have told.
    pub told_state: Option<State>,
    /// What its create spends its time on.
    pub trace: Trace,
    /// Requests that wait for it.
    pub waiters: Vec<Waiter>,
    /// It is to be taken away once its worker has ended.
    pub removing: bool,
    /// A background thread takes things of it down.
    pub releasing: bool,
    /// The change in the database that its clients are not told of before it is on the medium.
    pub writing: Option<Ticket>,
    /// Everything of it was taken down.
    pub gone: bool,
}

impl Sandbox {
    /// A new sandbox that nothing was done for yet.
    pub fn new(id: SandboxId, owner: String, spec: Spec, home: Home, created_ms: u64) -> Self {
        let mut sandbox = Self {
            id,
            owner,
            spec,
            template_sha256: String::new(),
            state: State::Pending,
            reason: String::new(),
            restarting: false,
            pausing: None,
            capture: None,
            settling: false,
            after_settling: None,
            snapshotting: None,
            rolling_back: None,
            returned: false,
            layer: None,
            snapshot: None,
            restart_at_ms: None,
            restarts: 0,
            restarts_in_row: 0,
            hung_ms: None,
            created_ms,
            started_ms: None,
            ended_ms: None,
            home,
            slot: None,
            tap: None,
            holds_slot: false,
            after_network: None,
            uid: None,
            parked: None,
            held: Held::default(),
            worker: None,
            clocks: Clocks::default(),
            execs: BTreeMap::new(),
            next_exec: 1,
            guest_log: GuestLog::default(),
            told_state: None,
            trace: Trace::since(Instant::now()),
            waiters: Vec::new(),
            removing: false,
            releasing: false,
            writing: None,
            gone: false,
        };
        sandbox.begin_ttl(created_ms);
        sandbox
    }

    /// Whether its worker was started and its agent is waited for.
    pub fn is_booting(&self) -> bool {
        self.state == State::Starting || (self.comes_back() && self.worker.is_some())
    }

    /// Whether it is being started on the disk that it has: again, or where it was paused.
    pub fn comes_back(&self) -> bool {
        self.restarting || self.state == State::Resuming
    }

    /// Whether it is a new sandbox that goes on from a snapshot, of whose programs is not known yet which there are.
    pub fn waits_for_survey(&self) -> bool {
        self.state == State::Starting && self.origin().is_some()
    }

    /// The snapshot that its next worker, or the one that is being started, goes on from. `None` for a boot, and for what
    /// was paused, which has files of its own.
    pub fn origin(&self) -> Option<&str> {
        let starts = match self.state {
            State::Scheduling | State::Creating | State::Starting => !self.restarting,
            State::Paused | State::Resuming => true,
            _ => false,
        };
        self.snapshot.as_deref().filter(|_| starts)
    }

    /// The sandbox of an earlier supervisor. `None` when the row is not one that Warren writes.
    pub fn from_row(row: &SandboxRow, home: impl FnOnce(&SandboxId) -> Home) -> Option<Self> {
        let id = SandboxId::parse(&row.id)?;
        let spec = Spec {
            template: row.template.clone(),
            name: row.name.clone(),
            vcpus: row.vcpus.try_into().ok()?,
            cpu_quota: row.cpu_quota,
            memory_mib: row.memory_mib.try_into().ok()?,
            disk_mib: Some(row.disk_mib),
            disks: row.disks.iter().map(|disk| DiskSpec::parse(disk).ok()).collect::<Option<_>>()?,
            disk_iops: row.disk_iops,
            disk_mbps: row.disk_mbps,
            network: match &row.network {
                Some(word) => Some(network::of_row(word, &row.net_allow, &row.net_deny)?),
                None => None,
            },
            net_mbps: row.net_mbps,
            restart: row.restart.parse().ok()?,
            time_limits: row.time_limits.parse().ok()?,
            read_only: row.read_only,
            env: row.env.clone(),
            labels: row.labels.iter().map(|(k, v)| (k.clone(), v.clone())).collect(),
        };
        let mut home = home(&id);
        if let Some(overlay) = &row.overlay {
            home.use_overlay(overlay);
        }
        Some(Self {
            layer: row.layer.clone(),
            snapshot: row.snapshot.clone(),
            template_sha256: row.template_sha256.clone(),
            state: State::parse(&row.state)?,
            told_state: State::parse(&row.state),
            reason: row.reason.clone(),
            restarts: row.restarts,
            restarts_in_row: row.restarts_in_row,
            started_ms: row.started_ms,
            ended_ms: row.ended_ms,
            clocks: Clocks::of_row(row.ttl_until_ms),
            trace: Trace::parse(&row.trace),
            ..Self::new(id, row.owner.clone(), spec, home, row.created_ms)
        })
    }

    /// The sandbox as the database keeps it.
    pub fn row(&self) -> SandboxRow {
        let policy = self.spec.network.as_ref();
        SandboxRow {
            id: self.id.to_string(),
            owner: self.owner.clone(),
            name: self.spec.name.clone(),
            template: self.spec.template.clone(),
            template_sha256: self.template_sha256.clone(),
            state: self.state.to_string(),
            reason: self.reason.clone(),
            vcpus: self.spec.vcpus.into(),
            cpu_quota: self.spec.cpu_quota,
            memory_mib: self.spec.memory_mib.into(),
            disk_mib: self.spec.disk_mib.unwrap_or(0),
            disks: self.spec.disks.iter().map(ToString::to_string).collect(),
            disk_iops: self.spec.disk_iops,
            disk_mbps: self.spec.disk_mbps,
            network: self.spec.network.as_ref().map(|policy| network::word(policy).to_string()),
            net_allow: policy.iter().flat_map(|policy| policy.allow()).map(|range| range.to_string()).collect(),
            net_deny: policy.iter().flat_map(|policy| policy.deny()).map(|range| range.to_string()).collect(),
            net_mbps: self.spec.net_mbps,
            net_address: self.slot.as_ref().map(|slot| slot.guest.to_string()),
            restart: self.spec.restart.to_string(),
            restarts: self.restarts,
            restarts_in_row: self.restarts_in_row,
            time_limits: self.spec.time_limits.to_string(),
            read_only: self.spec.read_only,
            ttl_until_ms: self.clocks.ttl_until_ms,
            env: self.spec.env.clone(),
            labels: self.spec.labels.iter().cloned().collect(),
            created_ms: self.created_ms,
            started_ms: self.started_ms,
            ended_ms: self.ended_ms,
            pid: self.worker.as_ref().and_then(|worker| u32::try_from(worker.pid).ok()),
            layer: self.layer.clone(),
            snapshot: self.snapshot.clone(),
            overlay: Some(self.home.overlay_name()).filter(|name| *name != OVERLAY).map(str::to_string),
            trace: self.trace.text(),
        }
    }

    /// The sandbox as clients see it.
    pub fn fields(&self) -> Fields {
        let mut fields = Fields::new().with("id", &self.id);
        if let Some(name) = &self.spec.name {
            fields = fields.with("name", name);
        }
        fields = fields.with("owner", &self.owner).with("state", self.state);
        if !self.reason.is_empty() {
            fields = fields.with("reason", &self.reason);
        }
        if self.state == State::Running {
            fields = fields.with("health", if self.hung_ms.is_some() { "hung" } else { "ok" });
        }
        fields = self.spec.fields(fields);
        if self.spec.restart != Restart::Never {
            fields = fields.with("restarts", self.restarts);
        }
        if let Some(slot) = &self.slot {
            fields = fields.with("address", slot.guest);
        }
        fields = fields.with("created_ms", self.created_ms);
        for (key, time) in [
            ("started_ms", self.started_ms),
            ("ended_ms", self.ended_ms),
            ("hung_ms", self.hung_ms),
            ("restart_at_ms", self.restart_at_ms),
        ] {
            if let Some(time) = time {
                fields = fields.with(key, time);
            }
        }
        if let Some(worker) = &self.worker {
            fields = fields.with("pid", worker.pid);
        }
        fields = self.clock_fields(fields);
        let running = self.execs.values().filter(|exec| exec.outcome.is_none()).count();
        fields.with("execs", running)
    }

    /// Whether it is one that a list is to have.
    pub fn is_listed(&self, query: &ListQuery) -> bool {
        let within = |time: u64, (since, until): (u64, u64)| (since..until).contains(&time);
        let labelled = |(key, value): &(String, Option<String>)| {
            let mut labels = self.spec.labels.iter();
            labels.any(|(k, v)| k == key && value.as_ref().is_none_or(|value| value == v))
        };
        query.state.is_none_or(|state| state == self.state)
            && query.owner.as_ref().is_none_or(|owner| *owner == self.owner)
            && query.template.as_ref().is_none_or(|template| *template == self.spec.template)
            && query.labels.iter().all(labelled)
            && within(self.created_ms, query.created)
            && within(self.clocks.last_used_ms.unwrap_or(self.created_ms), query.used)
            && query.executing.is_none_or(|executing| executing == self.is_executing())
            && query.after.as_ref().is_none_or(|after| self.id > *after)
    }

    /// A finished or running program as the database keeps it.
    pub fn execution_row(&self, exec: &Exec, now_ms: u64) -> ExecutionRow {
        let outcome = exec.outcome.as_ref();
        let number = |key: &str| match outcome {
            Some(Ok(fields)) => fields.number(key),
            Some(Err(error)) => error.fields.number(key),
            None => None,
        };
        let narrow = |key: &str| number(key).and_then(|n| i32::try_from(n).ok());
        ExecutionRow {
            sandbox_id: self.id.to_string(),
            exec_id: exec.number,
            argv: exec.argv.iter().map(|arg| String::from_utf8_lossy(arg).into_owned()).collect(),
            state: match outcome {
                None => "running",
                Some(Ok(_)) => "exited",
                Some(Err(_)) => "failed",
            }
            .to_string(),
            started_ms: exec.started_ms,
            ended_ms: outcome.map(|_| now_ms),
            exit: narrow("exit"),
            signal: narrow("signal"),
            timeout: matches!(outcome, Some(Ok(fields)) if fields.get("timeout") == Some("true")),
            cpu_ms: number("cpu_ms"),
            peak_kib: number("peak_kib"),
            language: exec.code.as_ref().map(|run| run.language.clone()),
            context: exec.code.as_ref().and_then(|run| run.context),
        }
    }
}
