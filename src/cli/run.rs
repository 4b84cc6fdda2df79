//! `create`, `run`, `exec`, `sh`: new sandboxes and commands in them.

use std::io::{self, IsTerminal};
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, Instant};

use super::Failure;
use super::args::{Cli, CreateArgs, ExecArgs, HowArgs, RunArgs};
use super::client::{Call, Client, Event, INTERRUPTED, PROTOCOL_ERROR, local};
use super::exec::{Mode, OWN_FAILURE, Session, take_signals};
use super::output::{StatusLine, complain, json_object, print, print_error, print_json};
use super::shape::Shape;
use super::signals::exit_code;
use super::values::{Disk, resolve_env};
use crate::wire::{Code, Error, Fields, Request};

/// How long the end of an interrupted creation may take.
const CANCEL_TIME: Duration = Duration::from_secs(5);

/// `warren create`: prints the new id alone.
pub fn create(client: &mut Client, args: &CreateArgs, json: bool) -> Result<u8, Failure> {
    let template = args.template.as_deref().or(args.template_option.as_deref());
    let fields = make(client, &args.shape, template)?;
    if json {
        print_json(&json_object(&fields))?;
    } else {
        print(format!("{}\n", id_of(&fields)?))?;
    }
    Ok(0)
}

/// `warren run`: a new sandbox, a command in it, and its exit code.
pub fn run(cli: &Cli, args: &RunArgs) -> Result<u8, Failure> {
    let shell = args.command.is_empty();
    let mode = if shell && !args.how.detach { Mode::of_shell() } else { mode_of(&args.how)? };
    let signals = take_signals().map_err(Failure::Exec)?;
    let mut client = Client::connect(&cli.socket()).map_err(Failure::Exec)?;
    let interrupt = signals.duplicate().map_err(|e| local(super::client::LOCAL_IO, e.to_string()));
    client.interrupt_on(Some(interrupt.map_err(Failure::Exec)?));
    let fields = match make(&mut client, &args.shape, Some(&args.template)) {
        Ok(fields) => fields,
        Err(error) if error.code == INTERRUPTED => {
            return Ok(signals.next().map_or(OWN_FAILURE, exit_code));
        }
        Err(error) => return Err(Failure::Exec(error)),
    };
    let id = id_of(&fields).map_err(Failure::Exec)?;

    // The sandbox has the environment already: the command's own is TERM alone.
    let mut request = Request::new("", "exec.start").arg(&id);
    if shell {
        request = request.arg("/bin/sh");
    }
    for word in &args.command {
        request = request.arg(word.as_bytes());
    }
    let request = with_how(request, &args.how, &[], mode);
    let done = if args.how.detach {
        client.interrupt_on(None);
        client.call(mode.apply(request).set("detach", true)).map(|_| 0)
    } else {
        Session::run(&mut client, &signals, &id, request, mode)
    };
    if args.rm {
        remove(cli, &id);
    } else if args.how.detach && done.is_ok() {
        if cli.json {
            print_json(&json_object(&fields))?;
        } else {
            print(format!("{id}\n"))?;
        }
    } else if io::stderr().is_terminal() {
        complain(&format!("sandbox {id} runs on; remove it with: warren rm -f {id}"));
    }
    done.map_err(Failure::Exec)
}

/// `warren exec`: a command in a sandbox, and its exit code.
pub fn exec(cli: &Cli, args: &ExecArgs) -> Result<u8, Failure> {
    let mode = mode_of(&args.how)?;
    let mut request = Request::new("", "exec.start").arg(&args.id);
    for word in &args.command {
        request = request.arg(word.as_bytes());
    }
    let request = with_how(request, &args.how, &args.env, mode);
    if args.how.detach {
        let mut client = Client::connect(&cli.socket()).map_err(Failure::Exec)?;
        let reply = client.call(mode.apply(request).set("detach", true)).map_err(Failure::Exec)?;
        let fields = reply.items.first().filter(|item| item.get("exec").is_some()).unwrap_or(&reply.fields);
        if cli.json {
            print_json(&json_object(fields))?;
        } else if let Some(number) = fields.get("exec") {
            print(format!("{number}\n"))?;
        }
        return Ok(0);
    }
    serve(cli, &args.id, request, mode)
}

/// `warren sh`: a shell, on a terminal where we have one.
pub fn sh(cli: &Cli, id: &str) -> Result<u8, Failure> {
    let mode = Mode::of_shell();
    let request = Request::new("", "exec.start").arg(id).arg("/bin/sh");
    serve(cli, id, with_how(request, &HowArgs::default(), &[], mode), mode)
}

fn serve(cli: &Cli, id: &str, request: Request, mode: Mode) -> Result<u8, Failure> {
    let signals = take_signals().map_err(Failure::Exec)?;
    let mut client = Client::connect(&cli.socket()).map_err(Failure::Exec)?;
    Session::run(&mut client, &signals, id, request, mode).map_err(Failure::Exec)
}

fn mode_of(how: &HowArgs) -> Result<Mode, Failure> {
    let mode = Mode { stdin: how.interactive, tty: how.tty, ..Mode::default() };
    if how.detach { Ok(mode) } else { mode.checked() }
}

fn with_how(mut request: Request, how: &HowArgs, env: &[String], mode: Mode) -> Request {
    if mode.tty
        && let Some(term) = std::env::var_os("TERM").filter(|term| !term.is_empty())
    {
        request = request.set_bytes("env", &[b"TERM=", term.as_bytes()].concat());
    }
    for entry in resolve_env(env) {
        request = request.set_bytes("env", &entry);
    }
    if let Some(cwd) = &how.workdir {
        request = request.set("cwd", cwd);
    }
    if how.privileged {
        request = request.set("privileged", true);
    }
    if let Some(user) = &how.user {
        request = request.set("user", user);
    }
    if let Some(timeout) = how.timeout {
        request = request.set("timeout_ms", timeout.as_millis());
    }
    request
}

/// Creates a sandbox, with its progress on standard error where that is a terminal. Gives the final reply.
pub(super) fn make(client: &mut Client, shape: &Shape, template: Option<&str>) -> Result<Fields, Error> {
    let mut status = StatusLine::new();
    let mut request = Request::new("", "sandbox.create");
    let named = [("template", template), ("name", shape.name.as_deref()), ("owner", shape.owner.as_deref())];
    for (key, value) in named.into_iter().filter_map(|(key, value)| Some((key, value?))) {
        request = request.set(key, value);
    }
    let numbers = [
        ("vcpus", shape.vcpus),
        ("cpu_quota", shape.cpu_quota),
        ("memory_mib", shape.memory),
        ("disk_iops", shape.disk_iops),
        ("disk_mbps", shape.disk_mbps),
        ("net_mbps", shape.net_mbps),
    ];
    for (key, value) in numbers.into_iter().filter_map(|(key, value)| Some((key, value?))) {
        request = request.set(key, value);
    }
    request = shape.network.add_to(request);
    for disk in &shape.disk {
        request = match disk {
            // Given twice, the node says so.
            Disk::Root(mib) => request.set("disk_mib", mib),
            Disk::Extra(disk) => request.set("disk", disk),
        };
    }
    for entry in resolve_env(&shape.env) {
        request = request.set_bytes("env", &entry);
    }
    if shape.read_only {
        request = request.set("read_only", true);
    }
    if shape.cold {
        request = request.set("cold", true);
    }
    if let Some(restart) = &shape.restart {
        request = request.set("restart", restart);
    }
    request = shape.time_limits.add_to(request);
    for label in &shape.label {
        request = request.set("label", label);
    }
    if status.is_enabled() {
        request = request.set("progress", true);
    }
    let call = client.start(request)?;
    loop {
        match client.next(&call, None) {
            Ok(Event::Item(fields)) => status.show(&format!("sandbox: {}", fields.get("state").unwrap_or("…"))),
            Ok(Event::Done(result)) => return result,
            Ok(_) => {}
            Err(error) => {
                if error.code == INTERRUPTED {
                    unmake(client, &call);
                }
                return Err(error);
            }
        }
    }
}

/// Takes an interrupted creation back, also when it was just done.
fn unmake(client: &mut Client, call: &Call) {
    client.interrupt_on(None);
    client.cancel(call);
    let deadline = Some(Instant::now() + CANCEL_TIME);
    while let Ok(event) = client.next(call, deadline) {
        let Event::Done(result) = event else { continue };
        if let Some(id) = result.ok().as_ref().and_then(|fields| fields.get("id")) {
            let _ = client.call_within(Request::new("", "sandbox.remove").arg(id).set("force", true), CANCEL_TIME);
        }
        return;
    }
}

/// Removes a sandbox after its command, on a connection of its own: the first may be what broke.
pub(super) fn remove(cli: &Cli, id: &str) {
    let gone = Client::connect(&cli.socket())
        .and_then(|mut client| client.call(Request::new("", "sandbox.remove").arg(id).set("force", true)));
    match gone {
        Err(error) if !error.is(Code::NotFound) => {
            complain(&format!("warning: sandbox {id} could not be removed"));
            print_error(&error);
        }
        _ => {}
    }
}

pub(super) fn id_of(fields: &Fields) -> Result<String, Error> {
    fields.get("id").map(str::to_string).ok_or_else(|| local(PROTOCOL_ERROR, "the node created a sandbox without id"))
}
