//! `template build`: the client's half of a build. It reads recipe and image, has the builder do one task after the other, and
//! shows what they say; the node sees a sandbox whose programs are fed, and in the end a disk.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::Duration;

use super::source::{
    Base, NOTHING_IS_PULLED, PATH, Source, Surroundings, Task, TaskKind, languages_of, plan, to_error,
};
use crate::cli::Failure;
use crate::cli::args::BuildArgs;
use crate::cli::client::{Call, Client, Event, INTERRUPTED, LOCAL_IO, local};
use crate::cli::output::{complain, json_object, print, print_json};
use crate::cli::show::text;
use crate::cli::signals::{ENDING, Signals, exit_code};
use crate::recipe::dockerfile::Instruction;
use crate::recipe::image::Settings;
use crate::recipe::key::{Key, Summed};
use crate::wire::{Code, Error, Fields, Request};

/// The program that fills disks, in the builder.
const MASON: &str = "/run/warren/mason";
/// What a template's disk has beside the base's when nothing is said, in MiB.
const MORE_MIB: u64 = 1024;
/// So much of a failing step's output is part of its error, in octets.
const TAIL: usize = 2048;
/// Whose programs are, where only a root file system was given, and where they run: as in the node's own templates.
const USER: &str = "1000";
const WORKSPACE: &str = "/workspace";

/// `warren template build`.
pub(super) fn build(connect: &dyn Fn() -> Result<Client, Error>, args: &BuildArgs, json: bool) -> Result<u8, Failure> {
    let mut source = Source::of(&args.path, args.file.as_deref(), args.reference.as_deref())?;
    source.languages = args.languages.as_deref().map(languages_of).transpose()?;
    // From here on a signal ends the connection, and with it the build.
    let signals = Signals::take(&ENDING).map_err(|e| local(LOCAL_IO, format!("signalfd: {e}")))?;
    let mut client = connect()?;
    client.interrupt_on(Some(signals.duplicate().map_err(|e| local(LOCAL_IO, format!("signalfd: {e}")))?));
    match Builder::run(client, &source, args) {
        Ok(fields) => {
            match json {
                true => print_json(&json_object(&fields))?,
                false => print(format!("{}\n", text(&fields, "name")))?,
            }
            Ok(0)
        }
        Err(error) if error.code == INTERRUPTED => Ok(signals.next().map_or(1, exit_code)),
        Err(error) => Err(error.into()),
    }
}

/// A build under way.
struct Builder<'a> {
    client: Client,
    source: &'a Source,
    args: &'a BuildArgs,
    /// The request that the build lasts as long as.
    call: Call,
    sandbox: String,
}

fn say(line: impl std::fmt::Display) {
    complain(&line.to_string());
}

impl<'a> Builder<'a> {
    fn run(mut client: Client, source: &'a Source, args: &'a BuildArgs) -> Result<Fields, Error> {
        let (begin, around, disk) = begin(&mut client, source, args)?;
        let (tasks, mut around, last) = plan(source, begin, around)?;
        if let Some(start) = &args.start {
            let shell = || ["/bin/sh", "-c", start].map(str::to_string).to_vec();
            around.take(&Instruction::Entrypoint(Vec::new()));
            around.take(&Instruction::Cmd(if start.is_empty() { Vec::new() } else { shell() }));
        }
        if let Some(ready) = &args.ready {
            around.take(&Instruction::Ready(ready.clone()));
        }
        let whole = whole_key(&last, &around, source.languages.as_deref());
        let ask = |steps: &[&Task]| {
            let request = Request::new("", "template.build").arg(&args.tag).set("disk_mib", disk);
            let from = if let Base::Template(name) = &source.base { name.as_str() } else { "scratch" };
            let request = shape(request, args).set("from", from);
            let request = if args.no_cache { request } else { request.set("key", whole.as_str()) };
            steps.iter().rev().fold(request, |request, task| request.set("step", task.key.as_str()))
        };
        // The last ones are enough to find: each holds what those before it did.
        let known: Vec<&Task> = if args.no_cache { Vec::new() } else { tasks.iter().collect() };
        let known = &known[known.len().saturating_sub(200)..];
        let begun = match begun(&mut client, ask(known))? {
            // What was kept cannot be gone on from, on this processor say.
            Begun::Failed(error) if !known.is_empty() && is_the_steps(&error) => {
                say(format_args!("what was kept of earlier builds is of no use: {}", error.message));
                begun(&mut client, ask(&[]))?
            }
            begun => begun,
        };
        let (call, sandbox, step) = match begun {
            Begun::Cached(fields) => {
                say(format_args!("{}: nothing has changed", args.tag));
                return Ok(fields);
            }
            Begun::Failed(error) => return Err(error),
            Begun::Builder { call, sandbox, step } => (call, sandbox, step),
        };
        let mut builder = Self { client, source, args, call, sandbox };
        let done = step.and_then(|step| tasks.iter().position(|task| task.key.as_str() == step));
        let count = tasks.len();
        for (at, task) in tasks.iter().enumerate() {
            let number = at + 1;
            if done.is_some_and(|done| at <= done) {
                say(format_args!("[{number}/{count}] {} (kept)", task.title));
                continue;
            }
            say(format_args!("[{number}/{count}] {}", task.title));
            builder.task(task).map_err(|error| of_step(error, number, count, task))?;
            if !args.no_cache {
                builder.keep(&task.key)?;
            }
        }
        builder.commit(&around, &whole)
    }

    /// Does one task.
    fn task(&mut self, task: &Task) -> Result<(), Error> {
        match &task.kind {
            TaskKind::Unpack => self.unpack(),
            TaskKind::Run(argv) => self.exec(&task.around, argv, None).map(drop),
            TaskKind::Directory(path) => {
                let owner = task.around.user.clone();
                let mut argv = mason(&["directory", path]);
                if let Some(owner) = owner {
                    argv.extend(["--owner".to_string(), owner]);
                }
                self.exec(&Surroundings::default(), &argv, None).map(drop)
            }
            TaskKind::Copy { context, digest, target, owner } => {
                let mut argv = mason(&["copy", target]);
                if context.directory {
                    argv.push("--directory".to_string());
                }
                if let Some(owner) = owner {
                    argv.extend(["--owner".to_string(), owner.clone()]);
                }
                let mut summed = Summed::new(context.open());
                self.exec(&Surroundings::default(), &argv, Some(&mut summed))?;
                if summed.digest() != *digest {
                    return Err(local("CHANGED", "a file changed while it was copied: build again"));
                }
                Ok(())
            }
        }
    }

    fn unpack(&mut self) -> Result<(), Error> {
        let source = self.source;
        match &source.base {
            Base::Template(_) => Ok(()),
            Base::Archive(path, _) => {
                let mut file =
                    std::fs::File::open(path).map_err(|e| local(LOCAL_IO, format!("{}: {e}", path.display())))?;
                self.exec(&Surroundings::default(), &mason(&["layer"]), Some(&mut file)).map(drop)
            }
            Base::Image(image) => {
                for (at, layer) in image.layers.iter().enumerate() {
                    let short: String = layer.diff_id.chars().take(12).collect();
                    say(format_args!("layer {}/{} {short}", at + 1, image.layers.len()));
                    let mut from = layer.open(&image.store).map_err(to_error)?;
                    let argv = mason(&["layer", "--whiteouts", "--sha256", &layer.diff_id]);
                    self.exec(&Surroundings::default(), &argv, Some(&mut from)).map_err(|mut error| {
                        error.message = format!("layer {} ({short}): {}", at + 1, error.message);
                        error
                    })?;
                }
                Ok(())
            }
        }
    }

    /// Has what is there now kept for the next build. That it cannot be is no reason to end this one.
    fn keep(&mut self, key: &Key) -> Result<(), Error> {
        let request = Request::new("", "template.step").arg(&self.sandbox).set("key", key.as_str());
        match self.client.call(request) {
            Err(error) if error.code == INTERRUPTED => Err(error),
            Err(error) => {
                say(format_args!("this step is not kept: {}", error.message));
                Ok(())
            }
            Ok(_) => Ok(()),
        }
    }

    /// Runs a program in the builder, and shows what it says. The last of it.
    fn exec(&mut self, around: &Surroundings, argv: &[String], stdin: Option<&mut dyn Read>) -> Result<String, Error> {
        let request = Request::new("", "exec.start").arg(&self.sandbox);
        let request = argv.iter().fold(request, |request, word| request.arg(word));
        let request = request.set("user", around.user.as_deref().unwrap_or("0"));
        let request = request.set("cwd", around.workdir.as_deref().filter(|path| !path.is_empty()).unwrap_or("/"));
        let request =
            around.env.iter().fold(request, |request, (name, value)| request.set("env", format!("{name}={value}")));
        let request = if stdin.is_some() { request.set("stdin", true) } else { request };
        // Numbers that were asked for are nothing to be looked at.
        let shown = argv.get(1).is_none_or(|verb| verb != "user" || argv[0] != MASON);
        let mut tail = Tail::default();
        let mut show = |_: &str, octets: &[u8]| {
            tail.take(octets, shown);
            Ok(())
        };
        let source = stdin.map(|reader| ("stdin", reader));
        let done = self.client.transfer(request, source, &mut show);
        let said = tail.text();
        match failed(&done?.fields) {
            None => Ok(said),
            Some(how) => Err(failure(argv, &said, &how)),
        }
    }

    /// Makes a template of the builder's disk, and where there is a ready command, tries it first.
    fn commit(&mut self, around: &Surroundings, key: &Key) -> Result<Fields, Error> {
        let user = match (&around.user, &self.source.base) {
            // Before its disk is stopped: names are in its /etc/passwd.
            (Some(user), _) => Some(self.exec(&Surroundings::default(), &mason(&["user", user]), None)?),
            (None, Base::Archive(..)) => Some(USER.to_string()),
            (None, _) => None,
        };
        self.exec(&Surroundings::default(), &mason(&["finish"]), None)?;
        let mut request = Request::new("", "template.commit").arg(&self.sandbox).set("key", key.as_str());
        if let Some(uid) = user.as_deref().and_then(|said| said.lines().last()?.split(' ').next()) {
            request = request.set("user", uid);
        }
        request = around.workdir.iter().fold(request, |request, path| request.set("cwd", path));
        request =
            around.env.iter().fold(request, |request, (name, value)| request.set("env", format!("{name}={value}")));
        request = around.start().iter().fold(request, |request, word| request.set("start", word));
        request = self.source.languages.iter().fold(request, |request, text| request.set("languages", text));
        request = self.args.description.iter().fold(request, |request, text| request.set("description", text));
        if around.ready.is_empty() {
            if !around.start().is_empty() {
                say(format_args!(
                    "start: {}: in every sandbox once it has booted, and nobody waits for it",
                    around.start().join(" ")
                ));
            }
            say("make the template");
            return Ok(self.client.call(request)?.fields);
        }
        request = shape(request.set("ready", &around.ready).set("trial", true), self.args);
        say("make the template, and try it");
        let trial = self.client.call(request)?.fields;
        self.sandbox = text(&trial, "sandbox");
        self.try_it(around)?;
        say("take its snapshot");
        let request = Request::new("", "template.publish").arg(&self.sandbox);
        Ok(self.client.call(request)?.fields)
    }

    /// Starts the start command and waits for the ready command to succeed.
    fn try_it(&mut self, around: &Surroundings) -> Result<(), Error> {
        let started = self.start(&around.start())?;
        say(format_args!("ready: {}", around.ready));
        let script = format!("until (\n{}\n); do sleep 0.2; done", around.ready);
        let time = self.args.ready_timeout.unwrap_or(Duration::from_secs(60));
        let request = Request::new("", "exec.start").arg(&self.sandbox).arg("/bin/sh").arg("-c").arg(script);
        let request = request.set("timeout_ms", time.as_millis());
        let ready = self.client.start(request)?;
        let ended = self.watch(&ready, started)?;
        if failed(&ended).is_none() {
            return Ok(());
        }
        let message = format!("the ready command did not succeed within {} ms: {}", time.as_millis(), around.ready);
        Err(local("BUILD_FAILED", message).with("step", "ready"))
    }

    /// Starts the start command where there is one. It is nobody's; what it says and how it ends is watched.
    fn start(&mut self, argv: &[String]) -> Result<Option<Call>, Error> {
        if argv.is_empty() {
            return Ok(None);
        }
        say(format_args!("start: {}", argv.join(" ")));
        let request = Request::new("", "exec.start").arg(&self.sandbox).set("detach", true);
        // User, directory and environment are the template's own by now.
        let request = argv.iter().fold(request, |request, word| request.arg(word));
        let exec = text(&self.client.call(request)?.fields, "exec");
        let request = Request::new("", "exec.attach").arg(&self.sandbox).set("exec", exec);
        self.client.start(request).map(Some)
    }

    /// Waits for the ready command's end. A start command that fails ends it; one that ends well may have left what serves.
    fn watch(&mut self, ready: &Call, mut started: Option<Call>) -> Result<Fields, Error> {
        let mut tail = Tail::default();
        loop {
            while let Some(call) = &started
                && let Some(event) = self.client.try_next(call)?
            {
                match event {
                    Event::Data { channel, payload } => {
                        tail.take(&payload, true);
                        self.client.consumed(call, &channel, payload.len());
                    }
                    Event::Done(ended) => {
                        if let Some(how) = failed(&ended?) {
                            self.client.abandon(ready);
                            let message = format!("the start command ended before there was anything ready: {how}");
                            return Err(local("BUILD_FAILED", message)
                                .with("step", "start")
                                .with("output", tail.text()));
                        }
                        started = None;
                    }
                    Event::Item(_) | Event::End { .. } => {}
                }
            }
            while let Some(event) = self.client.try_next(ready)? {
                match event {
                    Event::Data { channel, payload } => {
                        let _ = io::stderr().write_all(&payload);
                        self.client.consumed(ready, &channel, payload.len());
                    }
                    Event::Done(ended) => {
                        started.iter().for_each(|call| self.client.abandon(call));
                        return ended;
                    }
                    Event::Item(_) | Event::End { .. } => {}
                }
            }
            self.client.turn(None)?;
        }
    }
}

/// The last of what a program says.
#[derive(Default)]
struct Tail(VecDeque<u8>);

impl Tail {
    /// Keeps it, and shows it where that is wanted.
    fn take(&mut self, octets: &[u8], shown: bool) {
        self.0.extend(octets.iter().copied());
        let over = self.0.len().saturating_sub(TAIL);
        self.0.drain(..over);
        // The build goes on where nobody looks.
        if shown {
            let _ = io::stderr().write_all(octets);
        }
    }

    fn text(&mut self) -> String {
        String::from_utf8_lossy(self.0.make_contiguous()).trim_end().to_string()
    }
}

/// How a program ended that did not end well.
fn failed(ended: &Fields) -> Option<String> {
    match (ended.number("exit"), ended.number("signal")) {
        (Some(0), _) => None,
        (Some(exit), _) => Some(format!("exit code {exit}")),
        (None, Some(signal)) => Some(format!("signal {signal}")),
        (None, None) => Some("no exit code".to_string()),
    }
}

impl Drop for Builder<'_> {
    fn drop(&mut self) {
        // The node sees the connection's end, too; this is sooner.
        self.client.abandon(&self.call);
    }
}

fn mason(words: &[&str]) -> Vec<String> {
    [&[MASON], words].concat().into_iter().map(str::to_string).collect()
}

/// How a program failed. `mason` says itself what is wrong.
fn failure(argv: &[String], said: &str, how: &str) -> Error {
    let last = said.lines().last().unwrap_or_default();
    if argv.first().is_some_and(|program| program == MASON)
        && let Some((code, message)) = last.split_once(": ")
        && code.bytes().all(|b| b.is_ascii_uppercase() || b == b'_')
    {
        return local(code, message);
    }
    local("BUILD_FAILED", how).with("output", said)
}

/// An error with the step that it is of.
fn of_step(mut error: Error, number: usize, count: usize, task: &Task) -> Error {
    if error.code == INTERRUPTED {
        return error;
    }
    error.message = format!("step {number} of {count} ({}: {}) failed: {}", task.place, task.title, error.message);
    error.with("step", number).with("place", &task.place)
}

/// Whether a build cannot begin because of what was kept.
fn is_the_steps(error: &Error) -> bool {
    error.is(Code::CpuMismatch)
        || error.is(Code::Corrupt)
        || error.is(Code::VmFailed)
        || error.is(Code::VersionMismatch)
}

enum Begun {
    Cached(Fields),
    Builder { call: Call, sandbox: String, step: Option<String> },
    Failed(Error),
}

fn begun(client: &mut Client, request: Request) -> Result<Begun, Error> {
    let call = client.start(request)?;
    loop {
        match client.next(&call, None) {
            Ok(Event::Item(fields)) => {
                let (sandbox, step) = (text(&fields, "sandbox"), fields.get("step").map(str::to_string));
                return Ok(Begun::Builder { call, sandbox, step });
            }
            Ok(Event::Done(Ok(fields))) => return Ok(Begun::Cached(fields)),
            Ok(Event::Done(Err(error))) => return Ok(Begun::Failed(error)),
            Ok(_) => {}
            Err(error) => {
                client.abandon(&call);
                return Err(error);
            }
        }
    }
}

/// What the builder is to be like, and the trial.
fn shape(request: Request, args: &BuildArgs) -> Request {
    let numbers = [("vcpus", args.vcpus), ("memory_mib", args.memory)];
    let request =
        numbers.into_iter().filter_map(|(key, value)| Some((key, value?))).fold(request, |r, (k, v)| r.set(k, v));
    args.network.add_to(request)
}

/// The key of what the builder begins with, what programs have in the base, and the size of the disk in MiB.
fn begin(client: &mut Client, source: &Source, args: &BuildArgs) -> Result<(Key, Surroundings, u64), Error> {
    let mut around = Surroundings::default();
    let (identity, base_mib) = match &source.base {
        Base::Template(name) => {
            let template = client.call(Request::new("", "template.inspect").arg(name));
            let template = template.map_err(|error| no_base(error, source, name))?.fields;
            for (key, value) in &template.0 {
                let Ok(value) = std::str::from_utf8(value) else { continue };
                match (key.as_str(), value.split_once('=')) {
                    ("env", Some((name, value))) => around.set(name, value),
                    // How much of it was an entry point is not known: a CMD takes the place of all of it.
                    ("start", _) => around.cmd.push(value.to_string()),
                    ("ready", _) => around.ready = value.to_string(),
                    _ => {}
                }
            }
            // Its user stays the template's where a recipe says no other; steps run as root until then.
            around.workdir = template.get("cwd").map(str::to_string);
            // What else it is that is passed on, its user and its languages, is in the key that it was built by.
            let identity = format!("{} {}", text(&template, "sha256"), template.get("key").unwrap_or_default());
            (identity, template.number("size_bytes").unwrap_or(0) >> 20)
        }
        Base::Image(image) => {
            let Settings { env, workdir, user, cmd, entrypoint } = source.settings();
            around.set("PATH", PATH);
            for entry in env.unwrap_or_default() {
                if let Some((name, value)) = entry.split_once('=') {
                    around.set(name, value);
                }
            }
            around.workdir = Some(workdir.filter(|path| path.starts_with('/')).unwrap_or_else(|| "/".to_string()));
            around.user = Some(user.filter(|user| !user.is_empty()).unwrap_or_else(|| "0".to_string()));
            (around.cmd, around.entrypoint) = (cmd.unwrap_or_default(), entrypoint.unwrap_or_default());
            let sizes = image.layers.iter().filter_map(|layer| image.store.open(&layer.file).ok());
            ("image".to_string(), estimate(sizes.map(|blob| blob.size).sum()))
        }
        Base::Archive(path, _) => {
            around.set("PATH", PATH);
            around.set("HOME", WORKSPACE);
            around.workdir = Some(WORKSPACE.to_string());
            ("archive".to_string(), estimate(size_of(path)))
        }
    };
    // In steps, so that a little more is the same size.
    let disk = args.disk.unwrap_or((base_mib + MORE_MIB).next_multiple_of(256));
    let network = format!("{:?} {:?} {:?}", args.network.network, args.network.allow, args.network.deny);
    let numbers = [disk, args.vcpus.unwrap_or(0), args.memory.unwrap_or(0)].map(u64::to_le_bytes);
    let [disk_octets, vcpus, memory] = &numbers;
    let key = Key::new().then(&[identity.as_bytes(), disk_octets, vcpus, memory, network.as_bytes()]);
    Ok((key, around, disk))
}

/// A base that cannot be had, with its place and the way out.
fn no_base(mut error: Error, source: &Source, name: &str) -> Error {
    if error.is(Code::NotFound) {
        let place = format!("{}:{}", source.name, source.from_line);
        error.message = format!("{place}: FROM {name}: {}; {NOTHING_IS_PULLED}", error.message);
    }
    error
}

/// What something that may be compressed takes unpacked, in MiB, as a guess.
fn estimate(octets: u64) -> u64 {
    (octets >> 20).saturating_mul(4)
}

fn size_of(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |meta| meta.len())
}

/// The key of the template: its disk, and what else it is.
fn whole_key(last: &Key, around: &Surroundings, languages: Option<&str>) -> Key {
    let env: Vec<String> = around.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let start = around.start();
    let ends = [around.workdir.as_deref().unwrap_or("\0"), around.user.as_deref().unwrap_or("\0"), &around.ready];
    let strings = |words: &[String], key: &Key| key.then(&words.iter().map(String::as_bytes).collect::<Vec<_>>());
    let key = strings(&start, &strings(&env, last)).then(&ends.map(str::as_bytes));
    languages.iter().fold(key, |key, text| key.then(&[b"languages", text.as_bytes()]))
}
