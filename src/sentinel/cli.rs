//! `warren sentinel …`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Parser, Subcommand};
use serde_json::Value;

use super::collect::Settings;
use super::collectors::external;
use super::config::{Config, Source};
use super::control;
use super::core_sim;
use super::inspect;
use super::model::SeriesTable;
use super::secret::Secret;
use super::task::{Outcome, Task};

/// A telemetry agent that never loses what it accepted.
#[derive(Parser)]
#[command(name = "warren sentinel", version, disable_help_subcommand = true)]
struct Sentinel {
    #[command(subcommand)]
    verb: Verb,
}

/// Series that a plugin under test may give.
const PLUGIN_SERIES: usize = 100_000;
const CONFIG: &str = "/etc/sentinel/sentinel.toml";

#[derive(Subcommand)]
enum Verb {
    /// Run until SIGTERM, SIGINT or `stop`
    Start(File),
    /// Ask a running sentinel to end
    Stop(File),
    /// Show what a running sentinel does, as JSON
    Status(File),
    /// Show its tasks, as JSON
    Tasks(File),
    /// Show its targets, as JSON
    Targets(File),
    /// Let it read its configuration again
    Reload(File),
    /// Say what is wrong with a configuration file
    Check(File),
    /// Register with the core once
    Register(File),
    /// Run every task of the file once and print what it gives
    #[command(alias = "once")]
    Test(File),
    /// Try external plugins
    #[command(subcommand)]
    Plugin(Plugin),
    /// Run a small reference core, for tests and demonstrations
    CoreSim(CoreSim),
    /// Look at a buffer directory
    #[command(subcommand)]
    Buffer(Buffer),
}

#[derive(clap::Args)]
struct File {
    /// The configuration file
    #[arg(long, value_name = "PATH", default_value = CONFIG)]
    config: PathBuf,
    /// It is a node's file, whose [sentinel] tables count
    #[arg(long)]
    node: bool,
}

impl File {
    fn source(&self) -> Source {
        Source { path: self.config.clone(), node: self.node }
    }

    fn load(&self) -> Result<Config, String> {
        self.source().load().map_err(|e| e.to_string())
    }
}

#[derive(clap::Args)]
struct CoreSim {
    /// Where it listens
    #[arg(long, default_value = "127.0.0.1:9480")]
    listen: std::net::SocketAddr,
    /// The environment's variable with the token that it wants
    #[arg(long, value_name = "NAME")]
    token_env: Option<String>,
    /// Where samples are appended, one JSON object a line
    #[arg(long, value_name = "PATH")]
    out: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Plugin {
    /// Let a plugin test a device, then measure it once, and print what it gives
    Test(PluginTest),
}

#[derive(clap::Args)]
struct PluginTest {
    /// Where its plugin.toml is
    directory: PathBuf,
    /// A field of the device; VALUE is JSON or text, or what the file after @ holds (a password)
    #[arg(long, value_name = "NAME=VALUE", value_parser = field)]
    device: Vec<(String, Value)>,
    /// The same for how to measure
    #[arg(long, value_name = "NAME=VALUE", value_parser = field)]
    config: Vec<(String, Value)>,
    /// Seconds that it may take
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    timeout: u64,
}

/// Of a command line. What is wrong is said without the value, which may be a secret.
fn field(text: &str) -> Result<(String, Value), String> {
    let (name, value) = text.split_once('=').ok_or("a field is NAME=VALUE")?;
    let value = match value.strip_prefix('@') {
        Some(path) => {
            let text = std::fs::read_to_string(path).map_err(|e| format!("{path}: {e}"))?;
            Value::String(text.trim_end_matches('\n').to_string())
        }
        None => serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.to_string())),
    };
    Ok((name.to_string(), value))
}

#[derive(Subcommand)]
enum Buffer {
    /// Segments and cursors, as JSON
    Stat {
        /// DATA/buffer of a sentinel
        directory: PathBuf,
    },
    /// Every sample, one JSON object a line
    Dump {
        /// DATA/buffer of a sentinel
        directory: PathBuf,
    },
    /// Read everything; exit code 1 when something is damaged
    Fsck {
        /// DATA/buffer of a sentinel
        directory: PathBuf,
    },
}

/// The role `sentinel`. `args` are those after it.
pub fn main(args: Vec<OsString>) -> ExitCode {
    crate::node::logging::init("sentinel");
    let args = std::iter::once(OsString::from("warren sentinel")).chain(args);
    let verb = match Sentinel::try_parse_from(args) {
        Ok(sentinel) => sentinel.verb,
        Err(e) => {
            let _ = e.print();
            return ExitCode::from(if e.use_stderr() { 2 } else { 0 });
        }
    };
    match act(verb) {
        Ok(code) => code,
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}

fn act(verb: Verb) -> Result<ExitCode, String> {
    match verb {
        Verb::Start(file) => control::run(&file.source())?,
        Verb::Stop(file) => return ask(&file, "stop"),
        Verb::Status(file) => return ask(&file, "status"),
        Verb::Tasks(file) => return ask(&file, "tasks"),
        Verb::Targets(file) => {
            let path = control::socket_path(&file.source())?;
            let answer = asked(&path, "status")?;
            let status: Value = serde_json::from_str(&answer).map_err(|e| format!("its answer: {e}"))?;
            println!("{}", status["targets"]);
        }
        Verb::Reload(file) => return ask(&file, "reload"),
        Verb::Check(file) => {
            let config = file.load()?;
            for lane in config.lanes()?.iter().filter(|lane| lane.url.tls) {
                lane.tls.load().map_err(|e| format!("target {}: {e}", lane.name))?;
            }
            println!("{}: good", file.config.display());
        }
        Verb::Register(file) => {
            let config = file.load()?;
            let id = if config.id.is_empty() { stored_id(&config)? } else { config.id.clone() };
            let mut core = control::CoreOptions::new(&config, &id)?.ok_or("the configuration has no core")?;
            core.register()?;
            println!("registered as {id}");
        }
        Verb::Test(file) => {
            let config = file.load()?;
            return test(control::settings(&config), config.tasks(), config.collector.max_series as usize);
        }
        Verb::Plugin(Plugin::Test(asked)) => return plugin_test(asked),
        Verb::CoreSim(sim) => {
            let token = match &sim.token_env {
                Some(name) => std::env::var(name).map_err(|_| format!("the environment has no {name}"))?,
                None => String::new(),
            };
            let server = core_sim::start(sim.listen, Secret::new(token), sim.out.as_deref())
                .map_err(|e| format!("{}: {e}", sim.listen))?;
            println!("core at http://{}", server.address());
            loop {
                std::thread::park();
            }
        }
        Verb::Buffer(Buffer::Stat { directory }) => println!("{}", inspect::stat(&directory)?),
        Verb::Buffer(Buffer::Dump { directory }) => inspect::dump(&directory, &mut std::io::stdout().lock())?,
        Verb::Buffer(Buffer::Fsck { directory }) => {
            let (report, good) = inspect::fsck(&directory)?;
            println!("{report}");
            return Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn stored_id(config: &Config) -> Result<String, String> {
    let path = config.paths.data.join("id");
    let id = std::fs::read_to_string(&path);
    id.map(|id| id.trim().to_string()).map_err(|e| format!("{}: {e}: start it first, or set id", path.display()))
}

fn ask(file: &File, word: &str) -> Result<ExitCode, String> {
    let answer = asked(&control::socket_path(&file.source())?, word)?;
    println!("{answer}");
    let refused = serde_json::from_str::<serde_json::Value>(&answer).is_ok_and(|answer| answer["ok"] == false);
    Ok(if refused { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn asked(path: &Path, word: &str) -> Result<String, String> {
    control::ask(path, word).map_err(|e| format!("{}: {e}: is it running?", path.display()))
}

/// Whoever may run a program may do this; it is written to the log all the same, as what goes over the control socket is.
fn plugin_test(asked: PluginTest) -> Result<ExitCode, String> {
    let shown = asked.directory.display().to_string();
    let directory = asked.directory.canonicalize().map_err(|e| format!("{shown}: {e}"))?;
    let name = external::name_of(&directory)?;
    let settings = Settings {
        plugin_directory: directory.parent().map(Path::to_path_buf),
        plugin_reload: Duration::ZERO,
        testing: true,
        ..Settings::default()
    };
    let fields = |given: Vec<(String, Value)>| given.into_iter().collect::<serde_json::Map<_, _>>().into();
    let timeout = Duration::from_secs(asked.timeout);
    let task = Task {
        id: name.clone(),
        plugin: name,
        device: fields(asked.device),
        config: fields(asked.config),
        labels: Default::default(),
        interval: Duration::from_secs(3600),
        timeout,
        priority: 0,
        retries: 0,
    };
    let result = test(settings, vec![task], PLUGIN_SERIES);
    let said = match &result {
        Ok(code) if *code == ExitCode::SUCCESS => "good",
        _ => "failed",
    };
    log::info!("audit: plugin test {} by user {}: {said}", directory.display(), nix::unistd::getuid());
    result
}

fn test(settings: Settings, tasks: Vec<Task>, most_series: usize) -> Result<ExitCode, String> {
    let table = Arc::new(SeriesTable::new(most_series));
    let results = super::collect::once(settings, tasks, table).map_err(|e| format!("collector: {e}"))?;
    let mut good = true;
    for (report, samples) in results {
        match &report.outcome {
            Outcome::Success => println!("# {}: {} samples", report.task, samples.len()),
            outcome => {
                good = false;
                println!("# {}: {outcome:?}", report.task);
            }
        }
        for sample in samples {
            println!("{} {} {}", **sample.series, sample.value, sample.timestamp_ms);
        }
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
