//! `events`, `watch`, `attach`, `execs`, `signal`: what happens in sandboxes, as it happens.

use clap::Args;

use super::Failure;
use super::args::Cli;
use super::client::{Client, Event};
use super::exec::{Mode, Session, take_signals};
use super::output::{ago, complain, human_bytes, json_object, print, print_json, print_json_line, printable, table};
use super::show::text;
use crate::wire::{Fields, Request};

/// `warren events`.
#[derive(Debug, Args)]
pub struct EventsArgs {
    /// Go on printing what comes
    #[arg(short, long)]
    pub follow: bool,
    /// Only events after this number, also from before a restart
    #[arg(long, value_name = "N")]
    pub after: Option<u64>,
    /// Only of this sandbox; one that is gone by its whole id
    #[arg(long)]
    pub sandbox: Option<String>,
    /// Only of this kind: sandbox, exec, template, or one such as sandbox.error
    #[arg(long)]
    pub kind: Option<String>,
    /// Only this owner's
    #[arg(long)]
    pub owner: Option<String>,
}

/// `warren watch`.
#[derive(Debug, Args)]
pub struct WatchArgs {
    /// Also what is in directories below
    #[arg(short, long)]
    pub recursive: bool,
    /// Id or name of the sandbox
    #[arg(value_name = "SANDBOX")]
    pub id: String,
    /// A file or directory in it
    #[arg(value_name = "PATH")]
    pub path: String,
}

/// `warren events`
pub fn events(client: &mut Client, args: &EventsArgs, json: bool) -> Result<u8, Failure> {
    let mut request = Request::new("", "events.watch");
    if args.follow {
        request = request.set("follow", true);
    }
    if let Some(after) = args.after {
        request = request.set("after", after);
    }
    for (key, value) in [("sandbox", &args.sandbox), ("kind", &args.kind), ("owner", &args.owner)] {
        request = value.iter().fold(request, |request, value| request.set(key, value));
    }
    rows(client, request, json, |row| {
        let [seq, kind, sandbox, exec, detail] = ["seq", "kind", "sandbox", "exec", "detail"].map(|key| text(row, key));
        // A template's event is about no sandbox.
        let sandbox = row.get("template").map_or(sandbox, str::to_string);
        let when = row.number("time_ms").map(ago).unwrap_or_default();
        format!("{seq:>6}  {when:<16} {kind:<20} {sandbox:<12} {exec:>4}  {detail}")
    })
}

/// `warren watch`
pub fn watch(client: &mut Client, args: &WatchArgs, json: bool) -> Result<u8, Failure> {
    let request = Request::new("", "file.watch").arg(&args.id).set("path", &args.path);
    let request = if args.recursive { request.set("recursive", true) } else { request };
    rows(client, request, json, |row| {
        let [event, path, to] = ["event", "path", "to"].map(|key| text(row, key));
        format!("{event:<8} {path}{}{to}", if to.is_empty() { "" } else { " -> " })
    })
}

/// Prints rows as they come, a line each: of JSON, or as `line` has it. What is lost is said on standard error.
fn rows(client: &mut Client, request: Request, json: bool, line: impl Fn(&Fields) -> String) -> Result<u8, Failure> {
    let call = client.start(request)?;
    loop {
        match client.next(&call, None)? {
            Event::Item(row) if row.get("event") == Some("watching") => {}
            Event::Item(row) if !json && (row.get("lost").is_some() || row.get("event") == Some("lost")) => {
                let count = row.get("lost").or(row.get("count")).unwrap_or("some");
                complain(&format!("warning: {count} events are lost here"));
            }
            Event::Item(row) if json => print_json_line(&json_object(&row))?,
            Event::Item(row) => print(format!("{}\n", printable(line(&row).trim_end())))?,
            Event::Done(result) => {
                result?;
                return Ok(0);
            }
            _ => {}
        }
    }
}

/// `warren attach`: a program's output from the start of what is kept, what it reads where it is to be fed, and its exit code.
/// An interrupt leaves the program running.
pub fn attach(cli: &Cli, id: &str, exec: u64, mode: Mode) -> Result<u8, Failure> {
    let mode = mode.checked()?;
    if mode.tty {
        complain("Ctrl-] leaves the program running");
    }
    let signals = take_signals().map_err(Failure::Exec)?;
    let mut client = Client::connect(&cli.socket()).map_err(Failure::Exec)?;
    let request = Request::new("", "exec.attach").arg(id).set("exec", exec);
    Session::run(&mut client, &signals, id, request, mode).map_err(Failure::Exec)
}

/// `warren execs`: the programs of a sandbox that run, or whose end is kept.
pub fn execs(client: &mut Client, id: &str, json: bool) -> Result<u8, Failure> {
    let rows = client.call(Request::new("", "exec.list").arg(id))?.items;
    if json {
        print_json(&rows.iter().map(json_object).collect())?;
        return Ok(0);
    }
    let row = |row: &Fields| {
        let peak = row.number("peak_kib").map(|kib| human_bytes(kib.saturating_mul(1024))).unwrap_or_default();
        let started = row.number("started_ms").map(ago).unwrap_or_default();
        let [exec, state, exit, argv] = ["exec", "state", "exit", "argv"].map(|key| text(row, key));
        vec![exec, started, state, exit, text(row, "cpu_ms"), peak, argv.chars().take(60).collect()]
    };
    let heading = ["EXEC", "STARTED", "STATE", "EXIT", "CPU MS", "MEMORY", "COMMAND"];
    print(table(&heading, &rows.iter().map(row).collect::<Vec<_>>()))?;
    Ok(0)
}

/// `warren signal`
pub fn signal(client: &mut Client, id: &str, exec: u64, signal: &str) -> Result<u8, Failure> {
    client.call(Request::new("", "exec.signal").arg(id).set("exec", exec).set("signal", signal))?;
    Ok(0)
}
