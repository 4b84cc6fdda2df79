//! The verbs of the control socket: one table, and what a request becomes once it is checked.

use std::time::Duration;

use super::access::Role;
use super::build::{self, BuildAsk, CommitAsk};
use super::code::{self, Bounds, RunAsk};
use super::events::{self, EventQuery};
use super::history;
use super::list::{self, ListQuery};
use super::programs::{exec_attach, exec_resize, exec_signal, exec_start, file};
use crate::init::StopMode;
use crate::sandbox::id::check_name;
use crate::sandbox::network;
use crate::sandbox::spec::{Defaults, MEMORY_MIB, MIN_MEMORY_TARGET_MIB, Quota, Spec, Update};
use crate::sandbox::time_limits;
use crate::storage::audit::AuditQuery;
use crate::storage::history::HistoryQuery;
use crate::wire::{Args, Code, Error, Request};

/// A checked request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Who answers, and what it speaks.
    Hello,
    /// The verbs.
    Help,
    /// The node's state and capacity.
    NodeInfo,
    /// Ends the node in order.
    NodeStop(StopMode),
    /// What sandboxes hold, compared with the kernel.
    NodeLedger {
        /// All that is written down, without comparing.
        all: bool,
    },
    /// The state database as a file.
    NodeBackup,
    /// Another state database.
    NodeRestore {
        /// Also when it does not know sandboxes that are there.
        force: bool,
    },
    /// Takes no new sandboxes; those that run end, by themselves or after that time.
    NodeDrain {
        /// How long they have.
        deadline: Option<Duration>,
        /// They are paused then.
        pauses: bool,
    },
    /// Takes new sandboxes again.
    NodeUndrain,
    /// The audit log.
    NodeAudit(AuditQuery),
    /// Records of executions.
    HistoryList(HistoryQuery),
    /// All that is kept of one, by its number.
    HistoryInspect(u64),
    /// The templates.
    TemplateList,
    /// One template.
    TemplateInspect(String),
    /// A snapshot for sandboxes of this shape to start from.
    TemplateSnapshot(Spec),
    /// A builder of a template.
    TemplateBuild(Box<BuildAsk>),
    /// What a builder is now is kept for the next build.
    TemplateStep {
        /// Id of the builder.
        sandbox: String,
        /// Under which key.
        key: String,
    },
    /// A builder's disk becomes a template.
    TemplateCommit {
        /// Id of the builder.
        sandbox: String,
        /// What the template is to be.
        ask: Box<CommitAsk>,
    },
    /// The template that a trial is of gets its name.
    TemplatePublish(String),
    /// A further name of a template.
    TemplateTag {
        /// What it is called.
        template: String,
        /// The name that it gets.
        name: String,
    },
    /// Takes a template away.
    TemplateRemove(String),
    /// A template as one file.
    TemplateExport(String),
    /// A template from such a file.
    TemplateImport {
        /// Its name, where that is not the one in the file.
        name: Option<String>,
    },
    /// A new sandbox.
    SandboxCreate {
        /// What it is to be.
        spec: Spec,
        /// Whose, where that is not the client's owner.
        owner: Option<String>,
        /// Whether its states are told on the way.
        progress: bool,
        /// It is booted, also where its template has a snapshot to start from.
        cold: bool,
    },
    /// The sandboxes.
    SandboxList(Box<ListQuery>),
    /// What happens.
    EventsWatch(EventQuery),
    /// One sandbox.
    SandboxInspect(String),
    /// `sandbox.trace`
    SandboxTrace {
        /// Which; also one that could not be created.
        sandbox: String,
        /// Of this program, and not of the create.
        exec: Option<u64>,
    },
    /// Shuts a sandbox down.
    SandboxStop {
        /// Id, name or unique prefix.
        sandbox: String,
        /// How long the guest may take; the node's default when not said.
        timeout: Option<Duration>,
    },
    /// Puts a running sandbox on disk, without a worker.
    SandboxPause(String),
    /// Lets a paused sandbox go on.
    SandboxResume(String),
    /// Puts a sandbox back to a snapshot of it.
    SandboxRollback {
        /// Id, name or unique prefix.
        sandbox: String,
        /// Id, name or unique prefix.
        snapshot: String,
    },
    /// A snapshot of a running sandbox.
    SnapshotCreate {
        /// Id, name or unique prefix.
        sandbox: String,
        /// For people to find it by.
        name: Option<String>,
    },
    /// New sandboxes that go on from a snapshot, or from a running sandbox as it is now.
    SnapshotFork {
        /// Id, name or unique prefix of a sandbox or a snapshot.
        from: String,
        /// How many.
        count: u64,
    },
    /// The snapshots.
    SnapshotList {
        /// Only those of this sandbox, by its id.
        sandbox: Option<String>,
    },
    /// One snapshot.
    SnapshotInspect(String),
    /// Takes a snapshot away.
    SnapshotRemove(String),
    /// A snapshot as one file.
    SnapshotExport(String),
    /// A snapshot from such a file.
    SnapshotImport {
        /// For people to find it by.
        name: Option<String>,
    },
    /// Takes a sandbox away for good.
    SandboxRemove {
        /// Id, name or unique prefix.
        sandbox: String,
        /// Also when it runs.
        force: bool,
    },
    /// What a sandbox uses.
    SandboxStats(String),
    /// Changes a running sandbox.
    SandboxUpdate {
        /// Id, name or unique prefix.
        sandbox: String,
        /// What is to change.
        update: Update,
    },
    /// The serial log.
    SandboxLogs {
        /// Id, name or unique prefix.
        sandbox: String,
        /// Goes on with what is still to come.
        follow: bool,
        /// Which log.
        source: LogSource,
        /// Where in it to begin.
        from: LogStart,
    },
    /// Starts a program.
    ExecStart {
        /// Id, name or unique prefix.
        sandbox: String,
        /// The program and its arguments.
        argv: Vec<Vec<u8>>,
        /// The request for the agent, without its exec number.
        request: Request,
        /// Answers at once and lets the program run.
        detach: bool,
    },
    /// The programs of a sandbox.
    ExecList(String),
    /// Watches a program from the start of what is kept of its output.
    ExecAttach {
        /// Id, name or unique prefix.
        sandbox: String,
        /// The program's number.
        exec: u64,
        /// Feeds its stdin.
        feeds: bool,
    },
    /// Runs code.
    CodeRun {
        /// Id, name or unique prefix.
        sandbox: String,
        /// What is to be run, and how.
        ask: Box<RunAsk>,
    },
    /// The code runs of a sandbox.
    CodeList(String),
    /// A new context for code.
    CodeContextCreate {
        /// Id, name or unique prefix.
        sandbox: String,
        /// Of what it runs.
        language: String,
        /// What its runs may use.
        bounds: Bounds,
    },
    /// Something about one program or context that the agent does: a signal, a new window size, a restart.
    ExecControl {
        /// Id, name or unique prefix.
        sandbox: String,
        /// The request for the agent.
        request: Request,
    },
    /// A file operation that the agent does.
    File {
        /// Id, name or unique prefix.
        sandbox: String,
        /// The request for the agent.
        request: Request,
    },
}

/// A log of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogSource {
    /// Its serial console.
    Console,
    /// What its programs log by the guest's own service.
    Guest,
}

/// Where in what is kept of a log to begin: at its start where nothing is said, else at the later of both.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LogStart {
    /// So many lines before the end.
    pub tail: Option<u64>,
    /// At the first line of this time or a later one, in Unix milliseconds.
    pub since_ms: Option<u64>,
}

/// Sandboxes of one fork.
const FORKS: std::ops::RangeInclusive<u64> = 1..=256;

/// One verb of the table.
#[derive(Debug)]
pub struct Verb {
    /// As it is written.
    pub name: &'static str,
    /// Its arguments, in the notation of docs/protocol.md.
    pub arguments: &'static str,
    /// One line on what it does.
    pub summary: &'static str,
    parse: fn(&str, Args, Defaults) -> Result<Command, Error>,
}

impl Verb {
    /// The verb of that name.
    pub fn of(name: &str) -> Option<&'static Self> {
        VERBS.iter().find(|verb| verb.name == name)
    }

    /// The least role that may use it. What is not named here changes something.
    pub fn role(&self) -> Role {
        match self.name {
            "hello" | "help" | "node.info" | "sandbox.list" | "sandbox.stats" => Role::Monitor,
            "template.list" | "template.inspect" | "sandbox.inspect" | "sandbox.trace" | "sandbox.logs"
            | "exec.list" | "code.list" | "snapshot.list" | "snapshot.inspect" | "history.list" | "history.inspect"
            | "events.watch" => Role::Viewer,
            "node.stop" | "node.drain" | "node.undrain" | "node.audit" | "node.ledger" | "node.backup"
            | "node.restore" => Role::Admin,
            _ => Role::Operator,
        }
    }

    /// Whether its requests go to the audit log: all that may change something.
    pub fn is_audited(&self) -> bool {
        let looks = matches!(
            self.name,
            "node.audit"
                | "node.ledger"
                | "exec.attach"
                | "code.context.list"
                | "file.read"
                | "file.list"
                | "file.stat"
                | "file.watch"
        );
        self.role() > Role::Viewer && !looks
    }
}

macro_rules! verbs {
    ($($name:literal, $arguments:literal, $summary:literal, $parse:expr;)*) => {
        /// Every verb of the control socket.
        pub const VERBS: &[Verb] = &[
            $(Verb { name: $name, arguments: $arguments, summary: $summary, parse: $parse },)*
        ];
    };
}

verbs! {
    "hello", "", "version of the protocol and of the node", |_, args, _| done(args, Command::Hello);
    "help", "", "the verbs", |_, args, _| done(args, Command::Help);
    "node.info", "", "state and capacity of the node", |_, args, _| done(args, Command::NodeInfo);
    "node.stop", "[mode=poweroff|reboot]", "stop every sandbox, then the node", node_stop;
    "node.drain", "[deadline_s=0..31536000] [action=stop|pause]", "take no new sandboxes, and wait until none runs and all is written", node_drain;
    "node.undrain", "", "take new sandboxes again", |_, args, _| done(args, Command::NodeUndrain);
    "node.audit", "[owner=OWNER] [before=ID] [limit=1..1000]", "who did what, newest first", node_audit;
    "node.ledger", "[all=true]", "where record and kernel differ on what sandboxes hold", |_, mut args, _| {
        let all = args.flag("all")?;
        done(args, Command::NodeLedger { all })
    };
    "node.backup", "", "the state database, on channel content", |_, args, _| done(args, Command::NodeBackup);
    "node.restore", "[force=true]", "begin again with a state database; channel content", |_, mut args, _| {
        let force = args.flag("force")?;
        done(args, Command::NodeRestore { force })
    };
    "template.list", "", "the templates", |_, args, _| done(args, Command::TemplateList);
    "template.inspect", "NAME", "one template", |_, mut args, _| {
        let name = args.next_text("template")?;
        done(args, Command::TemplateInspect(name))
    };
    "template.snapshot",
    "NAME [vcpus=1..16] [memory_mib=64..32768] [disk_mib=N] [network=on|off]",
    "have new sandboxes of that template and shape start from a snapshot", |_, mut args, defaults| {
        let template = args.next_text("template")?;
        let mut shape = Request::new("", "").set("template", template);
        for key in ["vcpus", "memory_mib", "disk_mib", "network"] {
            shape = args.text(key)?.iter().fold(shape, |shape, value| shape.set(key, value));
        }
        let spec = Spec::take(&mut Args::of(shape), defaults)?;
        spec.check_asked()?;
        done(args, Command::TemplateSnapshot(spec))
    };
    "template.build",
    "NAME [from=scratch] [vcpus=1..16] [memory_mib=64..32768] [disk_mib=N] [network=on|off] [allow=CIDR,…]* [deny=CIDR,…]* [key=HEX] [step=HEX]* [base=HEX]",
    "a sandbox to fill the disk of a template in; it goes with the request", build::build;
    "template.step", "SANDBOX key=HEX", "keep what a builder is now for the next build", build::step;
    "template.commit",
    "SANDBOX [user=UID] [cwd=PATH] [env=K=V]* [start=WORD]* [ready=COMMAND] [languages=TOML] [key=HEX] [description=TEXT] [trial=true [vcpus=] [memory_mib=] [disk_mib=] [network=on|off]]",
    "make a template of a builder's disk, or try it first", build::commit;
    "template.publish", "SANDBOX", "take the snapshot of a trial and give its template its name", |_, mut args, _| {
        let sandbox = sandbox(&mut args)?;
        done(args, Command::TemplatePublish(sandbox))
    };
    "template.tag", "NAME name=NAME", "a further name of a template", |_, mut args, _| {
        let template = args.next_text("template")?;
        let name = args.text("name")?.ok_or_else(|| missing("name"))?;
        done(args, Command::TemplateTag { template, name })
    };
    "template.remove", "NAME", "take a template away that nobody uses", |_, mut args, _| {
        let template = args.next_text("template")?;
        done(args, Command::TemplateRemove(template))
    };
    "template.export", "NAME", "all of a template as one file, on channel content", |_, mut args, _| {
        let template = args.next_text("template")?;
        done(args, Command::TemplateExport(template))
    };
    "template.import", "[name=NAME]", "a template from such a file; channel content", |_, mut args, _| {
        let name = args.text("name")?;
        done(args, Command::TemplateImport { name })
    };
    "sandbox.create",
    "[template=base] [name=NAME] [owner=OWNER] [vcpus=1..16] [cpu_quota=N] [memory_mib=64..32768] [disk_mib=N] [disk=NAME:new:MIB|NAME:file|device:WHAT[:ro]]* [disk_iops=N] [disk_mbps=N] [network=on|off] [allow=CIDR,…]* [deny=CIDR,…]* [net_mbps=N] [restart=never|on-failure[:N]] [read_only=true] [ttl=LIMIT] [idle_timeout=LIMIT] [max_lifetime=LIMIT] [env=K=V]* [label=K=V]* [progress=true] [cold=true]",
    "create a sandbox and wait until it answers", sandbox_create;
    "sandbox.list",
    "[state=STATE] [owner=OWNER] [template=NAME] [label=K[=V]]* [executing=true|false] [created_since_ms=TIME] [created_until_ms=TIME] [used_since_ms=TIME] [used_until_ms=TIME] [after=ID] [limit=N]",
    "the sandboxes, by id", list::list;
    "sandbox.inspect", "SANDBOX", "one sandbox", |_, mut args, _| {
        let sandbox = sandbox(&mut args)?;
        done(args, Command::SandboxInspect(sandbox))
    };
    "sandbox.trace", "SANDBOX [exec=N]", "what its create, or one of its programs, spent its time on", |_, mut args, _| {
        let sandbox = sandbox(&mut args)?;
        let exec = args.number("exec", 0..=u64::MAX)?;
        done(args, Command::SandboxTrace { sandbox, exec })
    };
    "sandbox.stop", "SANDBOX [timeout_ms=0..600000]", "shut a sandbox down, by force after the timeout", sandbox_stop;
    "sandbox.pause", "SANDBOX", "put a running sandbox on disk and free its memory", |_, mut args, _| {
        let sandbox = sandbox(&mut args)?;
        done(args, Command::SandboxPause(sandbox))
    };
    "sandbox.resume", "SANDBOX", "let a paused sandbox go on where it was", |_, mut args, _| {
        let sandbox = sandbox(&mut args)?;
        done(args, Command::SandboxResume(sandbox))
    };
    "sandbox.rollback", "SANDBOX snapshot=SNAPSHOT", "put a sandbox back to a snapshot of it", |_, mut args, _| {
        let sandbox = sandbox(&mut args)?;
        let snapshot = args.text("snapshot")?.ok_or_else(|| missing("snapshot"))?;
        done(args, Command::SandboxRollback { sandbox, snapshot })
    };
    "snapshot.create", "SANDBOX [name=NAME]", "take a snapshot of a running sandbox, which runs on", |_, mut args, _| {
        let sandbox = sandbox(&mut args)?;
        let name = args.text("name")?;
        name.iter().try_for_each(|name| check_name("name", name))?;
        done(args, Command::SnapshotCreate { sandbox, name })
    };
    "snapshot.fork", "SANDBOX|SNAPSHOT [n=1..256]", "new sandboxes that go on from there; an item each", |_, mut args, _| {
        let from = sandbox(&mut args)?;
        let count = args.number("n", FORKS)?.unwrap_or(1);
        done(args, Command::SnapshotFork { from, count })
    };
    "snapshot.list", "[sandbox=ID]", "the snapshots", |_, mut args, _| {
        let sandbox = args.text("sandbox")?;
        done(args, Command::SnapshotList { sandbox })
    };
    "snapshot.inspect", "SNAPSHOT", "one snapshot", |_, mut args, _| {
        let snapshot = args.next_text("snapshot")?;
        done(args, Command::SnapshotInspect(snapshot))
    };
    "snapshot.remove", "SNAPSHOT", "take a snapshot away; sandboxes that came from it stay", |_, mut args, _| {
        let snapshot = args.next_text("snapshot")?;
        done(args, Command::SnapshotRemove(snapshot))
    };
    "snapshot.export", "SNAPSHOT", "all of a snapshot as one file, on channel content", |_, mut args, _| {
        let snapshot = args.next_text("snapshot")?;
        done(args, Command::SnapshotExport(snapshot))
    };
    "snapshot.import", "[name=NAME]", "a snapshot from such a file; channel content", |_, mut args, _| {
        let name = args.text("name")?;
        name.iter().try_for_each(|name| check_name("name", name))?;
        done(args, Command::SnapshotImport { name })
    };
    "sandbox.remove", "SANDBOX [force=true]", "take a sandbox and its disk away", sandbox_remove;
    "sandbox.stats", "SANDBOX", "what a running sandbox uses", |_, mut args, _| {
        let sandbox = sandbox(&mut args)?;
        done(args, Command::SandboxStats(sandbox))
    };
    "sandbox.update", "SANDBOX memory_target_mib=N | network=on|off [allow=CIDR,…]* [deny=CIDR,…]* | [cpu_quota=N] [disk_iops=N] [disk_mbps=N] [net_mbps=N] | [ttl=LIMIT] [idle_timeout=LIMIT] [max_lifetime=LIMIT]", "change a running sandbox", sandbox_update;
    "sandbox.logs", "SANDBOX [follow=true] [source=console|guest] [tail=N] [since_ms=TIME]", "the serial log, or what programs log, on channel log", sandbox_logs;
    "exec.start",
    "SANDBOX ARG+ [env=K=V]* [cwd=PATH] [user=USER] [stdin=true] [tty=true cols=N rows=N] [privileged=true] [timeout_ms=N] [detach=true]",
    "start a program; channels stdin, stdout, stderr", exec_start;
    "exec.list", "SANDBOX", "the programs of a sandbox", |_, mut args, _| {
        let sandbox = sandbox(&mut args)?;
        done(args, Command::ExecList(sandbox))
    };
    "exec.attach", "SANDBOX exec=N [stdin=true]", "replay a program's output, follow it, feed its stdin", exec_attach;
    "exec.signal", "SANDBOX exec=N signal=NAME|NUMBER", "signal a program's process group", exec_signal;
    "exec.resize", "SANDBOX exec=N cols=N rows=N", "new size of a program's terminal", exec_resize;
    "code.run",
    "SANDBOX language=NAME|context=N [env=K=V]* [cwd=PATH] [user=USER] [memory_mib=16..32768|max] [network=on|off] [dependency=NAME[==VERSION]|NAME[@VERSION]]* [index=pip|npm] [timeout_ms=1..86400000] [detach=true]",
    "run code; channels source, stdout, stderr, result", code::run;
    "code.list", "SANDBOX", "the code runs of a sandbox", code::list;
    "code.context.create",
    "SANDBOX language=NAME [env=K=V]* [cwd=PATH] [user=USER] [memory_mib=16..32768|max] [network=on|off] [dependency=NAME[==VERSION]|NAME[@VERSION]]* [index=pip|npm]",
    "start an interpreter that keeps its state between runs", code::create;
    "code.context.list", "SANDBOX", "the contexts of a sandbox", code::contexts;
    "code.context.interrupt", "SANDBOX context=N", "interrupt what a context runs", code::context;
    "code.context.restart", "SANDBOX context=N", "start a context's interpreter anew", code::context;
    "code.context.delete", "SANDBOX context=N", "end a context", code::context;
    "history.list",
    "[sandbox=SANDBOX] [exec=N] [kind=exec|code] [language=NAME] [state=STATE] [owner=OWNER] [since_ms=TIME] [until_ms=TIME] [before=RECORD] [limit=1..1000]",
    "what was executed, also in sandboxes that are gone, newest first", history::list;
    "history.inspect", "RECORD", "one execution; channels source, stdout, stderr", history::inspect;
    "events.watch",
    "[after=SEQ] [sandbox=SANDBOX] [kind=KIND] [owner=OWNER] [follow=true]",
    "what becomes of sandboxes and executions, in order", events::watch;
    "file.read", "SANDBOX path=PATH [offset=N] [length=N]", "read a file; channel content", file;
    "file.write", "SANDBOX path=PATH [mode=OCTAL] [user=USER] [append=true]", "write a file at once; channel content", file;
    "file.list", "SANDBOX path=PATH", "the entries of a directory", file;
    "file.stat", "SANDBOX path=PATH", "one file's kind, size, mode, owner, time", file;
    "file.watch", "SANDBOX path=PATH [recursive=true]", "what changes at a path, an item a change", file;
    "file.mkdir", "SANDBOX path=PATH [mode=OCTAL] [parents=true] [user=USER]", "make a directory", file;
    "file.move", "SANDBOX from=PATH to=PATH", "rename a file", file;
    "file.link", "SANDBOX path=PATH target=PATH [user=USER]", "make a symbolic link", file;
    "file.remove", "SANDBOX path=PATH [recursive=true]", "remove a file or directory", file;
}

impl Command {
    /// Checks a request against the table.
    pub fn of(request: Request, defaults: Defaults) -> Result<Self, Error> {
        let verb = request.verb.clone();
        let Some(entry) = Verb::of(&verb) else {
            return Err(
                Error::new(Code::UnknownVerb, format!("{verb} is not a verb; help lists them")).with("verb", verb)
            );
        };
        (entry.parse)(&verb, Args::of(request), defaults)
    }
}

pub(super) fn done(args: Args, command: Command) -> Result<Command, Error> {
    args.finish().map(|()| command)
}

pub(super) fn sandbox(args: &mut Args) -> Result<String, Error> {
    args.next_text("sandbox")
}

pub(super) fn missing(key: &str) -> Error {
    Error::new(Code::MissingArgument, format!("{key} is missing")).with("argument", key)
}

fn node_stop(_: &str, mut args: Args, _: Defaults) -> Result<Command, Error> {
    let mode = match args.text("mode")?.as_deref() {
        None | Some("poweroff") => StopMode::PowerOff,
        Some("reboot") => StopMode::Reboot,
        Some(other) => {
            return Err(Error::new(Code::BadArgument, format!("mode={other} is neither poweroff nor reboot"))
                .with("argument", "mode"));
        }
    };
    done(args, Command::NodeStop(mode))
}

/// Longest time that sandboxes may have when a node is drained: a year.
const MAX_DRAIN_S: u64 = 365 * 24 * 3600;

fn node_drain(_: &str, mut args: Args, _: Defaults) -> Result<Command, Error> {
    let deadline = args.number("deadline_s", 0..=MAX_DRAIN_S)?.map(Duration::from_secs);
    let pauses = match args.text("action")?.as_deref() {
        None | Some("stop") => false,
        Some("pause") => true,
        Some(other) => {
            let message = format!("action={other} is neither stop nor pause");
            return Err(Error::new(Code::BadArgument, message).with("argument", "action"));
        }
    };
    done(args, Command::NodeDrain { deadline, pauses })
}

fn sandbox_create(_: &str, mut args: Args, defaults: Defaults) -> Result<Command, Error> {
    let spec = Spec::take(&mut args, defaults)?;
    spec.check_asked()?;
    let owner = owner(&mut args)?;
    let (progress, cold) = (args.flag("progress")?, args.flag("cold")?);
    done(args, Command::SandboxCreate { spec, owner, progress, cold })
}

fn owner(args: &mut Args) -> Result<Option<String>, Error> {
    let owner = args.text("owner")?;
    owner.map(|owner| check_name("owner", &owner).map(|()| owner)).transpose()
}

/// Rows of the audit log in one answer, where a request does not say, and at most.
const AUDIT_ROWS: u64 = 100;
const MAX_AUDIT_ROWS: u64 = 1000;

fn node_audit(_: &str, mut args: Args, _: Defaults) -> Result<Command, Error> {
    let owner = owner(&mut args)?;
    let before = args.number("before", 1..=i64::MAX as u64)?;
    let limit = args.number("limit", 1..=MAX_AUDIT_ROWS)?.unwrap_or(AUDIT_ROWS);
    done(args, Command::NodeAudit(AuditQuery { before, owner, limit }))
}

fn sandbox_stop(_: &str, mut args: Args, _: Defaults) -> Result<Command, Error> {
    let sandbox = sandbox(&mut args)?;
    let timeout = args.number("timeout_ms", 0..=600_000)?.map(Duration::from_millis);
    done(args, Command::SandboxStop { sandbox, timeout })
}

fn sandbox_remove(_: &str, mut args: Args, _: Defaults) -> Result<Command, Error> {
    let sandbox = sandbox(&mut args)?;
    let force = args.flag("force")?;
    done(args, Command::SandboxRemove { sandbox, force })
}

fn sandbox_update(_: &str, mut args: Args, _: Defaults) -> Result<Command, Error> {
    let sandbox = sandbox(&mut args)?;
    let memory = args.number("memory_target_mib", MIN_MEMORY_TARGET_MIB..=*MEMORY_MIB.end())?;
    let times = Some(time_limits::take(&mut args)?).filter(|changes| !changes.is_empty());
    let update = match (memory, network::take(&mut args)?, Quota::take(&mut args)?, times) {
        (Some(mib), None, None, None) => Update::Memory(mib),
        (None, Some(policy), None, None) => Update::Network(policy),
        (None, None, Some(quota), None) => Update::Quota(quota),
        (None, None, None, Some(changes)) => Update::TimeLimits(changes),
        (None, None, None, None) => return Err(missing("memory_target_mib")),
        _ => {
            let message = "memory, network, limits and time limits are changed by a request each";
            let error = Error::new(Code::BadArgument, message);
            return Err(error.with("argument", "network"));
        }
    };
    done(args, Command::SandboxUpdate { sandbox, update })
}

/// Most lines that are asked for: no log has more octets.
const MAX_TAIL: u64 = 1 << 30;

fn sandbox_logs(_: &str, mut args: Args, _: Defaults) -> Result<Command, Error> {
    let sandbox = sandbox(&mut args)?;
    let follow = args.flag("follow")?;
    let source = match args.text("source")?.as_deref() {
        None | Some("console") => LogSource::Console,
        Some("guest") => LogSource::Guest,
        Some(other) => {
            let message = format!("source={other} is neither console nor guest");
            return Err(Error::new(Code::BadArgument, message).with("argument", "source"));
        }
    };
    let from = LogStart { tail: args.number("tail", 0..=MAX_TAIL)?, since_ms: args.number("since_ms", 0..=u64::MAX)? };
    if from.since_ms.is_some() && source == LogSource::Console {
        let message = "since_ms= is for source=guest: lines of a console have no time";
        return Err(Error::new(Code::BadArgument, message).with("argument", "since_ms"));
    }
    done(args, Command::SandboxLogs { sandbox, follow, source, from })
}

#[cfg(test)]
#[path = "command_tests.rs"]
mod tests;
