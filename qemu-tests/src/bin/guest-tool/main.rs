//! Load and checks for the inside of a guest: `guest-tool COMMAND key=value…`. Static, so that it runs in any guest.
//!
//! Each command is a function in a file of its own, entered in the table below. What it measured goes to standard
//! output as lines of `key=value`; what does not hold goes to standard error, with exit code 1.

mod attributes;
mod clock;
mod cpu;
mod disk;
mod memory;
mod notice;
mod tcp;
mod udp;

use std::fmt::Display;
use std::process::ExitCode;
use std::str::FromStr;

/// What a command gives: nothing, or a sentence about what does not hold.
type Outcome = Result<(), String>;

/// Name, function, arguments.
type Command = (&'static str, fn(&Keys) -> Outcome, &'static str);

const COMMANDS: &[Command] = &[
    ("attributes", attributes::run, "path=PATH: prints a file's extended attributes"),
    (
        "clock",
        clock::run,
        "until=PATH: looks again and again, until that file is there, whether the monotonic clock ever went back; prints both",
    ),
    ("cpu", cpu::run, "threads=1 rounds=N: each thread computes and prints its number and its result"),
    ("disk", disk::run, "device=PATH steps=N seed=1: random writes, discards, zeroes, checked reads of an empty disk"),
    (
        "disk-check",
        disk::check_after_cut,
        "device=PATH flushed=STEP steps=N seed=1: what disk flushed at STEP is there, or something newer",
    ),
    ("memory", memory::run, "mib=N times=1 hold_ms=0: allocates, writes and checks every page, and frees, that often"),
    ("moved-to", notice::run, "directory=PATH: says the name of the next file that is moved into that directory"),
    (
        "tcp-receive",
        tcp::receive,
        "port=N connections=1: takes connections one after the other, checks and counts octets",
    ),
    ("udp-receive", udp::receive, "port=N count=N: counts packets until it has that many or none comes any more"),
    ("udp-send", udp::send, "to=ADDRESS:PORT count=N len=18: sends packets as fast as they go"),
    ("tcp-send", tcp::send, "to=ADDRESS:PORT mib=N chunk=65536: sends octets that tcp-receive can check"),
];

/// The command's `key=value` arguments.
struct Keys(Vec<(String, String)>);

impl Keys {
    /// A value, or `default` where it was not given.
    fn get<T: FromStr>(&self, key: &str, default: Option<T>) -> Result<T, String> {
        match (self.0.iter().find(|(known, _)| known == key), default) {
            (Some((_, value)), _) => value.parse().map_err(|_| format!("{key}={value} is not understood")),
            (None, Some(default)) => Ok(default),
            (None, None) => Err(format!("{key}= is missing")),
        }
    }
}

/// For `map_err`: says what was being done.
fn during<E: Display>(what: &str) -> impl Fn(E) -> String {
    move |error| format!("{what}: {error}")
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let name = arguments.next().unwrap_or_default();
    let Some((_, command, _)) = COMMANDS.iter().find(|(known, ..)| *known == name) else {
        eprintln!("usage: guest-tool COMMAND key=value...");
        COMMANDS.iter().for_each(|(name, _, help)| eprintln!("  {name} {help}"));
        return ExitCode::from(2);
    };
    let mut keys = Vec::new();
    for argument in arguments {
        let Some((key, value)) = argument.split_once('=') else {
            eprintln!("guest-tool: {argument} is not key=value");
            return ExitCode::from(2);
        };
        keys.push((key.to_string(), value.to_string()));
    }
    match command(&Keys(keys)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guest-tool: {name}: {error}");
            ExitCode::FAILURE
        }
    }
}
