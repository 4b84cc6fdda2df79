//! What may be typed about code.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Subcommand};

use crate::cli::values::{parse_duration, parse_mib};
use crate::control::code::{MAX, Memory};
use crate::wire::Request;

/// What code may use.
#[derive(Debug, Default, Args)]
pub struct CodeBounds {
    /// Memory, such as 256M or 1G; a bare number is MiB, max all that the sandbox can give [default: 512M, or what there is]
    #[arg(short, long, value_name = "SIZE", value_parser = parse_memory)]
    pub memory: Option<Memory>,
    /// Whether it has its sandbox's network [default: off]
    #[arg(long, value_name = "on|off", value_parser = ["on", "off"])]
    pub network: Option<String>,
    /// User, as a name or number, and group
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
    /// Working directory [default: the sandbox's]
    #[arg(short, long, value_name = "PATH")]
    pub workdir: Option<String>,
    /// Packages
    #[command(flatten)]
    pub dependencies: Dependencies,
}

/// Packages that code asks for.
#[derive(Debug, Default, Args)]
pub struct Dependencies {
    /// A Python package, installed once from the node's index (packages.pip_index) and kept; may be given again
    #[arg(long, value_name = "NAME[==VERSION]", action = ArgAction::Append, conflicts_with = "npm")]
    pub pip: Vec<String>,
    /// A Node.js package, installed once from the node's registry (packages.npm_registry) and kept; may be given again
    #[arg(long, value_name = "NAME[@VERSION]", action = ArgAction::Append)]
    pub npm: Vec<String>,
}

impl Dependencies {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.pip.is_empty() && self.npm.is_empty()
    }

    /// The request with these.
    pub fn add_to(&self, request: Request) -> Request {
        if self.is_empty() {
            return request;
        }
        let (index, names) = if self.npm.is_empty() { ("pip", &self.pip) } else { ("npm", &self.npm) };
        names.iter().fold(request.set("index", index), |request, name| request.set("dependency", name))
    }
}

fn parse_memory(text: &str) -> Result<Memory, String> {
    if text == MAX { Ok(Memory::Max) } else { parse_mib(text).map(Memory::Mib) }
}

impl CodeBounds {
    /// The request with these.
    pub fn add_to(&self, request: Request) -> Request {
        let request = self.memory.iter().fold(request, |request, memory| request.set("memory_mib", memory));
        let request = self.network.iter().fold(request, |request, network| request.set("network", network));
        let request = self.user.iter().fold(request, |request, user| request.set("user", user));
        let request = self.workdir.iter().fold(request, |request, path| request.set("cwd", path));
        self.dependencies.add_to(request)
    }
}

/// `warren code`.
#[derive(Debug, Args)]
pub struct CodeArgs {
    /// The language, for a run with an interpreter of its own
    #[arg(long, visible_alias = "language", value_name = "LANGUAGE", required_unless_present = "context")]
    pub lang: Option<String>,
    /// The context to run in
    #[arg(short, long, value_name = "N", conflicts_with_all = ["lang", "memory", "network", "user", "workdir", "env", "pip", "npm"])]
    pub context: Option<u64>,
    /// What it may use
    #[command(flatten)]
    pub bounds: CodeBounds,
    /// An environment variable; without =VALUE it is taken from here
    #[arg(short, long, value_name = "NAME[=VALUE]", action = ArgAction::Append)]
    pub env: Vec<String>,
    /// Print its number once its source is there, and leave it running: `warren attach` shows what came of it
    #[arg(short, long, conflicts_with = "save")]
    pub detach: bool,
    /// End it after this time, such as 500ms, 30s, 5m [default: 30s]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub timeout: Option<Duration>,
    /// A directory for the pictures and documents that it shows
    #[arg(long, value_name = "DIR")]
    pub save: Option<PathBuf>,
    /// Id or name of the sandbox
    #[arg(value_name = "SANDBOX")]
    pub id: String,
    /// The file with the code, or - for standard input
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// Verbs of `warren context`.
#[derive(Debug, Subcommand)]
pub enum ContextVerb {
    /// Start an interpreter that keeps its state between runs, and print its number
    Create {
        /// The language
        #[arg(long, visible_alias = "language", value_name = "LANGUAGE")]
        lang: String,
        /// What its runs may use
        #[command(flatten)]
        bounds: CodeBounds,
        /// An environment variable; without =VALUE it is taken from here
        #[arg(short, long, value_name = "NAME[=VALUE]", action = ArgAction::Append)]
        env: Vec<String>,
        /// Id or name of the sandbox
        #[arg(value_name = "SANDBOX")]
        id: String,
    },
    /// List the contexts of a sandbox
    #[command(alias = "list")]
    Ls {
        /// Id or name
        #[arg(value_name = "SANDBOX")]
        id: String,
    },
    /// Interrupt what a context runs; its state stays
    Interrupt {
        /// Id or name
        #[arg(value_name = "SANDBOX")]
        id: String,
        /// Its number
        #[arg(value_name = "CONTEXT")]
        context: u64,
    },
    /// Start a context's interpreter anew; its state is gone
    Restart {
        /// Id or name
        #[arg(value_name = "SANDBOX")]
        id: String,
        /// Its number
        #[arg(value_name = "CONTEXT")]
        context: u64,
    },
    /// End a context
    Rm {
        /// Id or name
        #[arg(value_name = "SANDBOX")]
        id: String,
        /// Its number
        #[arg(value_name = "CONTEXT")]
        context: u64,
    },
}
