//! The command line: connects to a node's control socket and speaks its protocol.
//!
//! `args` says what may be typed, `shape` what may be said of a sandbox, `values` in which units, `client` speaks to the node, `run` has the verbs around commands, `show` those
//! that list and change, `code` runs code, `copy` moves files, `bridge` serves a node in QEMU to many clients.
//!
//! Exit codes: 0, 1 for a failure (`error: CODE: sentence` on standard error), 2 for misuse, 141 when the reader of
//! standard output has gone. `exec`, `run` and `sh` pass the command's own code on and have 125 for Warren's
//! failures, 126 and 127 for a program that cannot be run or found.

use std::io;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use crate::wire::Error;

mod args;
mod backup;
mod bridge;
pub mod client;
pub mod code;
mod copy;
mod exec;
mod history;
mod logs;
mod output;
mod run;
mod shape;
mod show;
mod signals;
mod snapshot;
mod template;
mod terminal;
mod trace;
mod values;
mod watch;

use args::{Cli, NodeVerb, Verb};
use client::Client;
use exec::Mode;

/// Why a verb ended without an exit code of its own.
#[derive(Debug)]
enum Failure {
    /// The node or this side could not do it.
    Error(Error),
    /// A command could not be run: exit codes 125, 126, 127.
    Exec(Error),
    /// It was asked for in a wrong way.
    Misuse(String),
    /// Standard output could not be written.
    Output(io::Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

impl Failure {
    /// Says why on standard error and gives the exit code.
    fn report(&self) -> u8 {
        match self {
            Self::Error(error) => {
                output::print_error(error);
                1
            }
            Self::Exec(error) => {
                output::print_error(error);
                exec::failure_code(error)
            }
            Self::Misuse(sentence) => {
                output::complain(&format!("error: {sentence}"));
                2
            }
            Self::Output(e) if e.kind() == io::ErrorKind::BrokenPipe => exec::BROKEN_PIPE,
            Self::Output(e) => {
                output::complain(&format!("error: {}: standard output: {e}", client::LOCAL_IO));
                1
            }
        }
    }
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(refused) => {
            let _ = refused.print();
            return ExitCode::from(u8::try_from(refused.exit_code()).unwrap_or(2));
        }
    };
    ExitCode::from(dispatch(&cli).unwrap_or_else(|failure| failure.report()))
}

fn dispatch(cli: &Cli) -> Result<u8, Failure> {
    let connect = || Client::connect(&cli.socket());
    match &cli.verb {
        Verb::Run(args) => match &args.lang {
            Some(language) => code::run(cli, args, language),
            None => run::run(cli, args),
        },
        Verb::Code(args) => code::code(cli, args),
        Verb::Context { verb } => code::context(&mut connect()?, verb, cli.json),
        Verb::Exec(args) => run::exec(cli, args),
        Verb::Sh { id } => run::sh(cli, id),
        Verb::Create(args) => run::create(&mut connect()?, args, cli.json),
        Verb::Ps(args) => show::ps(&mut connect()?, args, cli.json),
        Verb::Inspect { ids } => show::inspect(&mut connect()?, "sandbox.inspect", ids),
        Verb::Top { ids, follow } => show::top(&mut connect()?, ids, *follow, cli.json),
        Verb::Update { id, memory_target, network, limits, time_limits } => {
            show::update(&mut connect()?, id, *memory_target, network, limits, time_limits, cli.json)
        }
        Verb::Stop { ids, time } => show::stop(&mut connect()?, ids, *time, cli.json),
        Verb::Pause { ids } => show::change_each(&mut connect()?, "sandbox.pause", ids, cli.json),
        Verb::Resume { ids } => show::change_each(&mut connect()?, "sandbox.resume", ids, cli.json),
        Verb::Snapshot { verb, sandbox, name } => {
            let (sandbox, name) = (sandbox.as_deref(), name.as_deref());
            snapshot::snapshot(&mut connect()?, verb.as_ref(), sandbox, name, cli.json)
        }
        Verb::Rollback { sandbox, snapshot } => snapshot::rollback(&mut connect()?, sandbox, snapshot, cli.json),
        Verb::Fork { from, count } => snapshot::fork(&mut connect()?, from, *count, cli.json),
        Verb::Rm { ids, force } => show::rm(&mut connect()?, ids, *force, cli.json),
        Verb::Logs(args) => logs::logs(&mut connect()?, args),
        Verb::Attach { interactive, tty, id, exec } => {
            watch::attach(cli, id, *exec, Mode { stdin: *interactive, tty: *tty, watches: true })
        }
        Verb::Execs { id } => watch::execs(&mut connect()?, id, cli.json),
        Verb::Signal { id, exec, signal } => watch::signal(&mut connect()?, id, *exec, signal),
        Verb::Watch(args) => watch::watch(&mut connect()?, args, cli.json),
        Verb::Events(args) => watch::events(&mut connect()?, args, cli.json),
        Verb::History(args) => history::history(&mut connect()?, args, cli.json),
        Verb::Trace { id, exec } => trace::trace(&mut connect()?, id, *exec, cli.json),
        Verb::Cp { source, target } => copy::cp(&connect, source, target),
        Verb::Node { verb } => match verb.as_ref().unwrap_or(&NodeVerb::Info) {
            NodeVerb::Audit(args) => show::audit(&mut connect()?, args, cli.json),
            NodeVerb::Ledger { all } => show::ledger(&mut connect()?, *all, cli.json),
            NodeVerb::Backup { file } => backup::backup(&mut connect()?, file),
            NodeVerb::Restore { file, force } => backup::restore(&mut connect()?, file, *force),
            NodeVerb::Drain { deadline, pause } => show::drain(&mut connect()?, *deadline, *pause, cli.json),
            NodeVerb::Undrain => show::undrain(&mut connect()?),
            NodeVerb::Info => show::node(&mut connect()?, cli.json),
            NodeVerb::Stop => show::stop_node(&mut connect()?, "poweroff"),
            NodeVerb::Reboot => show::stop_node(&mut connect()?, "reboot"),
        },
        Verb::Template { verb } => template::template(cli, &connect, verb),
        Verb::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "warren", &mut script);
            output::print(script)?;
            Ok(0)
        }
        Verb::Bridge(args) => bridge::main(args).map_err(Failure::from),
    }
}
