//! What the command line may say: options, verbs and the units of their values.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Parser, Subcommand};
use clap_complete::Shell;

use super::code::args::{CodeArgs, ContextVerb, Dependencies};
use super::history::HistoryArgs;
use super::logs::LogsArgs;
use super::shape::{LimitArgs, NetworkArgs, Shape, TimeLimitArgs};
use super::show::{AuditArgs, PsArgs};
use super::values::{parse_duration, parse_mib};
use super::watch::{EventsArgs, WatchArgs};

/// Where the node listens when neither `--socket` nor `WARREN_SOCKET` says otherwise.
pub const DEFAULT_SOCKET: &str = "/run/warren/control.sock";

/// Runs untrusted code in microVM sandboxes.
#[derive(Debug, Parser)]
#[command(name = "warren", version, propagate_version = true, arg_required_else_help = true)]
pub struct Cli {
    /// The node's control socket [env: WARREN_SOCKET] [default: /run/warren/control.sock]
    #[arg(long, global = true, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Print one JSON document instead of text
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do
    #[command(subcommand)]
    pub verb: Verb,
}

impl Cli {
    /// The socket to connect to: the option, else the environment, else the default.
    pub fn socket(&self) -> PathBuf {
        self.socket
            .clone()
            .or_else(|| std::env::var_os("WARREN_SOCKET").filter(|v| !v.is_empty()).map(PathBuf::from))
            .unwrap_or_else(|| PathBuf::from(DEFAULT_SOCKET))
    }
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Create a sandbox and run a command in it
    Run(RunArgs),
    /// Create a sandbox and print its id
    Create(CreateArgs),
    /// Run a command in a sandbox
    Exec(ExecArgs),
    /// Run code in a sandbox
    Code(CodeArgs),
    /// Interpreters in a sandbox that keep their state between runs of code
    Context {
        /// What to do
        #[command(subcommand)]
        verb: ContextVerb,
    },
    /// Open an interactive shell in a sandbox
    Sh {
        /// Id, unique prefix of an id, or name of the sandbox
        #[arg(value_name = "SANDBOX")]
        id: String,
    },
    /// Replay a program's output and follow it, and feed it; an interrupt leaves the program running
    Attach {
        /// Feed a program that was started with -i; the end of standard input ends the program's, for good
        #[arg(short, long)]
        interactive: bool,
        /// The program has a terminal (-t): be its keyboard and size. Ctrl-] leaves it running
        #[arg(short, long, requires = "interactive")]
        tty: bool,
        /// Id or name
        #[arg(value_name = "SANDBOX")]
        id: String,
        /// The program's number, as `exec --detach` and `execs` print it
        #[arg(value_name = "EXEC")]
        exec: u64,
    },
    /// List the programs of a sandbox
    Execs {
        /// Id or name
        #[arg(value_name = "SANDBOX")]
        id: String,
    },
    /// Send a signal to a program and all of its process group
    Signal {
        /// Id or name
        #[arg(value_name = "SANDBOX")]
        id: String,
        /// The program's number
        #[arg(value_name = "EXEC")]
        exec: u64,
        /// Name or number
        #[arg(value_name = "SIGNAL", default_value = "TERM")]
        signal: String,
    },
    /// List sandboxes
    Ps(PsArgs),
    /// Show everything about sandboxes, as JSON
    Inspect {
        /// Ids or names
        #[arg(required = true, value_name = "SANDBOX")]
        ids: Vec<String>,
    },
    /// Show what running sandboxes use
    Top {
        /// Ids or names; all that run when none is given
        #[arg(value_name = "SANDBOX")]
        ids: Vec<String>,
        /// Go on every so often, such as 2s, until interrupted
        #[arg(short, long, value_name = "TIME", num_args = 0..=1, require_equals = true, default_missing_value = "2s", value_parser = parse_duration)]
        follow: Option<Duration>,
    },
    /// Change a running sandbox
    Update {
        /// Id or name
        #[arg(value_name = "SANDBOX")]
        id: String,
        /// Memory it is asked to do with; what is above goes back to the node as far as the guest can spare it
        #[arg(long, required_unless_present_any = ["network", "limits", "time limits"], value_name = "SIZE", value_parser = parse_mib)]
        memory_target: Option<u64>,
        /// What it may reach; the lists are as a whole what they are from now on
        #[command(flatten)]
        network: NetworkArgs,
        /// What it may take; 0 is no limit
        #[command(flatten)]
        limits: LimitArgs,
        /// How long it may be there
        #[command(flatten)]
        time_limits: TimeLimitArgs,
    },
    /// Stop sandboxes; their disks stay
    Stop {
        /// Ids or names
        #[arg(required = true, value_name = "SANDBOX")]
        ids: Vec<String>,
        /// Time for an orderly end before the machine is switched off
        #[arg(short, long, value_name = "TIME", value_parser = parse_duration)]
        time: Option<Duration>,
    },
    /// Pause sandboxes: their memory goes to disk, and is free
    Pause {
        /// Ids or names
        #[arg(required = true, value_name = "SANDBOX")]
        ids: Vec<String>,
    },
    /// Let paused sandboxes go on where they were
    Resume {
        /// Ids or names
        #[arg(required = true, value_name = "SANDBOX")]
        ids: Vec<String>,
    },
    /// Take a snapshot of a running sandbox, which runs on; or list, show and remove snapshots
    #[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
    Snapshot {
        /// What to do with snapshots
        #[command(subcommand)]
        verb: Option<SnapshotVerb>,
        /// Id or name of the sandbox
        #[arg(required = true, value_name = "SANDBOX")]
        sandbox: Option<String>,
        /// A name for the snapshot
        #[arg(long)]
        name: Option<String>,
    },
    /// Put a sandbox back to a snapshot of it
    Rollback {
        /// Id or name
        #[arg(value_name = "SANDBOX")]
        sandbox: String,
        /// Id or name
        #[arg(value_name = "SNAPSHOT")]
        snapshot: String,
    },
    /// Make sandboxes that go on from a snapshot, or from what a running sandbox is now; prints their ids
    Fork {
        /// Id or name of a sandbox or a snapshot
        #[arg(value_name = "SANDBOX|SNAPSHOT")]
        from: String,
        /// How many
        #[arg(short = 'n', long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=256))]
        count: u64,
    },
    /// Remove sandboxes and their disks
    Rm {
        /// Ids or names
        #[arg(required = true, value_name = "SANDBOX")]
        ids: Vec<String>,
        /// Remove running sandboxes too
        #[arg(short, long)]
        force: bool,
    },
    /// Print a sandbox's console log, or what its programs log at http://169.254.169.254/logs
    Logs(LogsArgs),
    /// Show what becomes of sandboxes and executions
    Events(EventsArgs),
    /// Show what changes at a path in a sandbox, as it changes
    Watch(WatchArgs),
    /// Show what was executed, also in sandboxes that are gone; or all that is kept of one execution
    History(HistoryArgs),
    /// Show what a sandbox's create, or one of its programs, spent its time on
    Trace {
        /// An id or name; also the id of one that could not be created
        #[arg(value_name = "SANDBOX")]
        id: String,
        /// The number of a program in it
        #[arg(value_name = "EXEC")]
        exec: Option<u64>,
    },
    /// Copy files between here and a sandbox: one side is SANDBOX:PATH
    ///
    /// Directories are copied with everything in them. `-` is standard input or output: a single file, or, where the
    /// other side is a directory, a tar archive of it.
    Cp {
        /// PATH, SANDBOX:PATH or -
        #[arg(value_name = "SOURCE")]
        source: OsString,
        /// PATH, SANDBOX:PATH or -
        #[arg(value_name = "TARGET")]
        target: OsString,
    },
    /// Show the node, or stop or reboot it
    Node {
        /// What to do with the node
        #[command(subcommand)]
        verb: Option<NodeVerb>,
    },
    /// Build, list, show and remove templates
    Template {
        /// What to do
        #[command(subcommand)]
        verb: TemplateVerb,
    },
    /// Print a completion script for a shell
    Completion {
        /// Which shell
        shell: Shell,
    },
    /// Serve a node in QEMU to many clients on this machine
    Bridge(BridgeArgs),
}

/// Verbs of `warren node`.
#[derive(Debug, Clone, Subcommand)]
pub enum NodeVerb {
    /// Show the node
    Info,
    /// Show who changed what, newest first
    Audit(AuditArgs),
    /// Compare what sandboxes hold by the node's record with what the kernel has
    ///
    /// Prints `none` where they agree; else a row a difference, and the exit code is 1.
    Ledger {
        /// Show the record instead
        #[arg(short, long)]
        all: bool,
    },
    /// Copy the state database to a file while the node runs
    Backup {
        /// A file that is not there yet, or - for standard output
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Begin again with a state database that `backup` wrote
    ///
    /// It is checked first. Sandboxes that run go on where it knows them; the database before it is kept on the node.
    Restore {
        /// The file, or - for standard input
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// Take down sandboxes that it does not know
        #[arg(long)]
        force: bool,
    },
    /// Take no new sandboxes, and wait until none runs and everything is written
    Drain {
        /// Stop those that still run after so many seconds; without it they end by themselves
        #[arg(long, value_name = "SECONDS")]
        deadline: Option<u64>,
        /// Pause them then, where they can be, instead of stopping them
        #[arg(long, requires = "deadline")]
        pause: bool,
    },
    /// Take new sandboxes again
    Undrain,
    /// Stop all sandboxes and switch the node off
    Stop,
    /// Stop all sandboxes and start the node anew
    Reboot,
}

/// Verbs of `warren snapshot`.
#[derive(Debug, Subcommand)]
pub enum SnapshotVerb {
    /// List snapshots
    #[command(alias = "list")]
    Ls {
        /// Only those of the sandbox of this id
        #[arg(value_name = "SANDBOX")]
        sandbox: Option<String>,
    },
    /// Show everything about snapshots, as JSON
    Inspect {
        /// Ids or names
        #[arg(required = true, value_name = "SNAPSHOT")]
        ids: Vec<String>,
    },
    /// Write all of a snapshot, memory and disk, to one file
    Export {
        /// Id or name
        #[arg(value_name = "SNAPSHOT")]
        id: String,
        /// A file that is not there yet, or - for standard output
        #[arg(value_name = "FILE", default_value = "-")]
        file: PathBuf,
    },
    /// Read a snapshot that `export` wrote; prints its id
    ///
    /// The template that it was taken of must be on this node with the same content.
    Import {
        /// The file, or - for standard input
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// A name for the snapshot
        #[arg(long)]
        name: Option<String>,
    },
    /// Remove snapshots; sandboxes that came from them stay
    Rm {
        /// Ids or names
        #[arg(required = true, value_name = "SNAPSHOT")]
        ids: Vec<String>,
    },
}

/// Verbs of `warren template`.
#[derive(Debug, Subcommand)]
pub enum TemplateVerb {
    /// List templates
    #[command(alias = "list")]
    Ls,
    /// Show everything about templates, as JSON
    Inspect {
        /// Their names
        #[arg(required = true, value_name = "TEMPLATE")]
        names: Vec<String>,
    },
    /// Build a template from a root file system, a container image or a recipe; prints its name
    ///
    /// PATH is a tar archive of a root file system (plain, gzip or zstd), an OCI image layout (a directory or a tar
    /// archive of one), an archive of `docker save`, a Dockerfile, or a directory with one. All work is done in a
    /// microVM that is thrown away.
    Build(Box<BuildArgs>),
    /// Give a template a further name
    Tag {
        /// What it is called
        #[arg(value_name = "TEMPLATE")]
        name: String,
        /// The further name
        #[arg(value_name = "NAME[:TAG]")]
        new: String,
    },
    /// Remove templates that no sandbox and no snapshot uses
    Rm {
        /// Their names
        #[arg(required = true, value_name = "TEMPLATE")]
        names: Vec<String>,
    },
    /// Write all of a template to one file
    Export {
        /// Its name
        #[arg(value_name = "TEMPLATE")]
        name: String,
        /// A file that is not there yet, or - for standard output
        #[arg(value_name = "FILE", default_value = "-")]
        file: PathBuf,
    },
    /// Read a template that `export` wrote; prints its name
    Import {
        /// The file, or - for standard input
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// Another name than the one in the file
        #[arg(long, value_name = "NAME[:TAG]")]
        name: Option<String>,
    },
    /// Have new sandboxes of a template and shape start from a snapshot instead of booting; prints its id
    Snapshot {
        /// Its name
        #[arg(value_name = "TEMPLATE")]
        name: String,
        /// Virtual CPUs [default: the node's]
        #[arg(long, value_name = "N")]
        vcpus: Option<u64>,
        /// Memory [default: the node's]
        #[arg(short, long, value_name = "SIZE", value_parser = parse_mib)]
        memory: Option<u64>,
        /// For sandboxes with a network
        #[arg(long)]
        network: bool,
    },
}

/// `warren template build`.
#[derive(Debug, Args)]
pub struct BuildArgs {
    /// What the template is to be called
    #[arg(short, long, value_name = "NAME[:TAG]")]
    pub tag: String,
    /// The recipe [default: Dockerfile in PATH, or PATH]
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Which image, where there is more than one at PATH
    #[arg(long = "ref", value_name = "REFERENCE")]
    pub reference: Option<String>,
    /// The start command, for a shell, in place of the recipe's or the image's: it is started in every sandbox, once that has
    /// booted; '' is none
    #[arg(long, value_name = "COMMAND")]
    pub start: Option<String>,
    /// The ready command, for a shell: once it succeeds, the snapshot is taken that new sandboxes start from
    #[arg(long, value_name = "COMMAND")]
    pub ready: Option<String>,
    /// How long the ready command may take to succeed [default: 60s]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub ready_timeout: Option<Duration>,
    /// How code is run: tables [languages.NAME] as in a manifest, in place of the base's
    #[arg(long, value_name = "FILE")]
    pub languages: Option<PathBuf>,
    /// A line for people
    #[arg(long, value_name = "TEXT")]
    pub description: Option<String>,
    /// Size of the template's disk [default: by what is built from, and 1G]
    #[arg(long, value_name = "SIZE", value_parser = parse_mib)]
    pub disk: Option<u64>,
    /// Memory of the builder [default: the node's]
    #[arg(short, long, value_name = "SIZE", value_parser = parse_mib)]
    pub memory: Option<u64>,
    /// Virtual CPUs of the builder [default: the node's]
    #[arg(long, value_name = "N")]
    pub vcpus: Option<u64>,
    /// The builder's network
    #[command(flatten)]
    pub network: NetworkArgs,
    /// Do every step anew, and keep none for the next build
    #[arg(long)]
    pub no_cache: bool,
    /// What it is built from
    #[arg(value_name = "PATH")]
    pub path: PathBuf,
}

/// `warren create`.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// What the sandbox shall be like
    #[command(flatten)]
    pub shape: Shape,
    /// The template [default: the node's, base]
    #[arg(short, long = "template", value_name = "TEMPLATE", conflicts_with = "template")]
    pub template_option: Option<String>,
    /// The template
    #[arg(value_name = "TEMPLATE")]
    pub template: Option<String>,
}

/// `warren run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// What the sandbox shall be like
    #[command(flatten)]
    pub shape: Shape,
    /// How the command shall run
    #[command(flatten)]
    pub how: HowArgs,
    /// Remove the sandbox when the command has ended
    #[arg(long, conflicts_with = "detach")]
    pub rm: bool,
    /// Run the code of FILE in this language, in a sandbox of its own that goes with it
    #[arg(long, visible_alias = "language", value_name = "LANGUAGE", conflicts_with_all = ["interactive", "tty", "detach", "privileged", "command"])]
    pub lang: Option<String>,
    /// The template of a sandbox for code [default: the smallest that has the language]
    #[arg(long = "template", value_name = "TEMPLATE", requires = "lang")]
    pub template_option: Option<String>,
    /// Packages that the code asks for
    #[command(flatten)]
    pub dependencies: Dependencies,
    /// A directory for the pictures and documents that the code shows
    #[arg(long, value_name = "DIR", requires = "lang")]
    pub save: Option<PathBuf>,
    /// The template; with --lang the file with the code, or - for standard input
    #[arg(value_name = "TEMPLATE|FILE")]
    pub template: String,
    /// The command and its arguments; without one, a shell
    #[arg(value_name = "COMMAND", trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<OsString>,
}

/// `warren exec`.
#[derive(Debug, Args)]
pub struct ExecArgs {
    /// How the command shall run
    #[command(flatten)]
    pub how: HowArgs,
    /// An environment variable; without =VALUE it is taken from here
    #[arg(short, long, value_name = "NAME[=VALUE]", action = ArgAction::Append)]
    pub env: Vec<String>,
    /// Id or name of the sandbox
    #[arg(value_name = "SANDBOX")]
    pub id: String,
    /// The command and its arguments
    #[arg(value_name = "COMMAND", required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<OsString>,
}

/// How a command runs.
#[derive(Debug, Default, Clone, Args)]
pub struct HowArgs {
    /// Pass standard input on to the command; with --detach, leave it open for attach -i
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Leave the command running in the background
    #[arg(short, long)]
    pub detach: bool,
    /// Working directory
    #[arg(short, long, value_name = "PATH")]
    pub workdir: Option<String>,
    /// User, as a name or number, and group
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
    /// With the sandbox's own namespaces and all system calls, also when the user is not root
    #[arg(long)]
    pub privileged: bool,
    /// End the command and all it started after this time, such as 500ms, 30s, 5m
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub timeout: Option<Duration>,
}

/// `warren bridge`.
#[derive(Debug, Args)]
pub struct BridgeArgs {
    /// The socket of QEMU's character device that is the node's control port
    #[arg(long, value_name = "SOCKET")]
    pub chardev: PathBuf,
    /// Where to listen for clients
    #[arg(long, value_name = "SOCKET")]
    pub listen: PathBuf,
    /// How long to wait for QEMU's socket
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_duration)]
    pub wait: Duration,
}

#[cfg(test)]
mod tests {
    use super::super::values::Disk;
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from([&["warren"], line].concat())
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_after_the_sandbox_belong_to_the_command() {
        for line in [
            &["exec", "-i", "sb", "ls", "-la", "--json", "-i"][..],
            &["exec", "-i", "sb", "--", "ls", "-la", "--json", "-i"],
        ] {
            let cli = parse(line).unwrap();
            assert!(!cli.json);
            let Verb::Exec(exec) = cli.verb else { panic!("not exec") };
            assert_eq!((exec.id.as_str(), exec.how.interactive), ("sb", true));
            assert_eq!(exec.command, ["ls", "-la", "--json", "-i"]);
        }
    }

    #[test]
    fn a_second_double_dash_reaches_the_command() {
        let Verb::Exec(exec) = parse(&["exec", "sb", "--", "git", "log", "--", "x"]).unwrap().verb else {
            panic!("not exec")
        };
        assert_eq!(exec.command, ["git", "log", "--", "x"]);
    }

    #[test]
    fn run_takes_a_template_and_a_command() {
        for line in [
            &["run", "--rm", "-m", "1G", "-e", "A=b", "python", "python3", "-c", "x"][..],
            &["run", "--rm", "-m", "1G", "-e", "A=b", "python", "--", "python3", "-c", "x"],
        ] {
            let Verb::Run(run) = parse(line).unwrap().verb else { panic!("not run") };
            assert_eq!((run.template.as_str(), run.shape.memory, run.rm), ("python", Some(1024), true));
            assert_eq!(run.command, ["python3", "-c", "x"]);
        }
        let Verb::Run(run) = parse(&["run", "base"]).unwrap().verb else { panic!("not run") };
        assert!(run.command.is_empty());
    }

    #[test]
    fn create_takes_its_template_either_way_but_not_both() {
        assert!(parse(&["create", "-t", "python"]).is_ok());
        assert!(parse(&["create", "python", "--json"]).unwrap().json);
        assert!(parse(&["create", "-t", "python", "base"]).is_err());
        assert!(parse(&["create"]).is_ok());
    }

    #[test]
    fn a_disk_is_a_size_or_a_further_disk() {
        let line = ["create", "--disk", "4G", "--disk", "d:new:1G", "--disk", "m:file:m.img:ro", "--disk-iops", "5"];
        let Verb::Create(create) = parse(&line).unwrap().verb else { panic!("not create") };
        let extra = |text: &str| Disk::Extra(text.to_string());
        assert_eq!(create.shape.disk, [Disk::Root(4096), extra("d:new:1024"), extra("m:file:m.img:ro")]);
        assert_eq!(create.shape.disk_iops, Some(5));
        for bad in ["x", "", "d:new:", "d:new:1X"] {
            assert!(parse(&["create", "--disk", bad]).is_err(), "{bad}");
        }
    }

    #[test]
    fn labels_are_pairs() {
        assert!(parse(&["create", "-l", "team=a b=c"]).is_ok());
        assert!(parse(&["create", "-l", "=a"]).is_err());
        assert!(parse(&["create", "-l", "team"]).is_err());
    }
}
