//! Requests about programs and files, most of which are passed on to a sandbox's agent.

use super::command::{Command, done, missing, sandbox};
use crate::sandbox::spec::Defaults;
use crate::wire::{Arg, Args, Error, Request};

/// Largest terminal, in columns or rows: the kernel's `struct winsize` holds 16 bits.
const MAX_TERMINAL: u64 = 65_535;

pub(super) fn exec_start(verb: &str, mut args: Args, _: Defaults) -> Result<Command, Error> {
    let sandbox = sandbox(&mut args)?;
    let argv = args.rest();
    if argv.first().is_none_or(Vec::is_empty) {
        return Err(missing("program"));
    }
    let mut request = argv.iter().fold(Request::new("", verb), Request::arg);
    for entry in args.all("env") {
        request = request.set_bytes("env", &entry);
    }
    for key in ["cwd", "user"] {
        if let Some(value) = args.bytes(key)? {
            request = request.set_bytes(key, &value);
        }
    }
    let flags = [("stdin", args.flag("stdin")?), ("tty", args.flag("tty")?), ("privileged", args.flag("privileged")?)];
    request = flags.iter().filter(|(_, on)| *on).fold(request, |request, (key, _)| request.set(key, true));
    for (key, limits) in
        [("cols", 1..=MAX_TERMINAL), ("rows", 1..=MAX_TERMINAL), ("timeout_ms", 1..=u64::MAX / 2_000_000)]
    {
        if let Some(number) = args.number(key, limits)? {
            request = request.set(key, number);
        }
    }
    let detach = args.flag("detach")?;
    done(args, Command::ExecStart { sandbox, argv, request, detach })
}

pub(super) fn exec_attach(_: &str, mut args: Args, _: Defaults) -> Result<Command, Error> {
    let sandbox = sandbox(&mut args)?;
    let exec = args.number("exec", 0..=u64::MAX)?.ok_or_else(|| missing("exec"))?;
    let feeds = args.flag("stdin")?;
    done(args, Command::ExecAttach { sandbox, exec, feeds })
}

pub(super) fn exec_signal(verb: &str, mut args: Args, _: Defaults) -> Result<Command, Error> {
    let sandbox = sandbox(&mut args)?;
    let exec = args.number("exec", 0..=u64::MAX)?.ok_or_else(|| missing("exec"))?;
    let signal = args.text("signal")?.ok_or_else(|| missing("signal"))?;
    let request = Request::new("", verb).set("exec", exec).set("signal", signal);
    done(args, Command::ExecControl { sandbox, request })
}

pub(super) fn exec_resize(verb: &str, mut args: Args, _: Defaults) -> Result<Command, Error> {
    let sandbox = sandbox(&mut args)?;
    let exec = args.number("exec", 0..=u64::MAX)?.ok_or_else(|| missing("exec"))?;
    let cols = args.number("cols", 1..=MAX_TERMINAL)?.ok_or_else(|| missing("cols"))?;
    let rows = args.number("rows", 1..=MAX_TERMINAL)?.ok_or_else(|| missing("rows"))?;
    let request = Request::new("", verb).set("exec", exec).set("cols", cols).set("rows", rows);
    done(args, Command::ExecControl { sandbox, request })
}

/// The keys of each file verb; the agent checks their values.
pub(super) const FILE_KEYS: &[(&str, &[&str])] = &[
    ("file.read", &["path", "offset", "length"]),
    ("file.write", &["path", "mode", "user", "append"]),
    ("file.list", &["path"]),
    ("file.stat", &["path"]),
    ("file.watch", &["path", "recursive"]),
    ("file.mkdir", &["path", "mode", "parents", "user"]),
    ("file.move", &["from", "to"]),
    ("file.link", &["path", "target", "user"]),
    ("file.remove", &["path", "recursive"]),
];

pub(super) fn file(verb: &str, mut args: Args, _: Defaults) -> Result<Command, Error> {
    let sandbox = sandbox(&mut args)?;
    let mut request = Request::new("", verb);
    let keys = FILE_KEYS.iter().find(|(name, _)| *name == verb).map_or(&[][..], |(_, keys)| keys);
    for key in keys {
        match args.bytes(key)? {
            Some(value) => request.args.push(Arg::Named((*key).to_string(), value)),
            None if matches!(*key, "path" | "from" | "to" | "target") => return Err(missing(key)),
            None => {}
        }
    }
    done(args, Command::File { sandbox, request })
}
