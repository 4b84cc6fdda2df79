//! What each message of a link does. docs/protocol.md has the verbs' arguments, results and errors.

use std::ffi::{CString, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::agent::{Agent, Due};
use super::connection::{Connection, Job, Slot};
use super::exec::{self, Attachment, Exec, Plan, Realm, Size};
use super::files::{self, MODE_MAX, Writing};
use super::settings::{check_environment, variable};
use super::tasks::{Desk, Flow};
use super::{remove, system, watch};
use crate::wire::{Args, Code, EXEC_MAX, Error, Fields, Message, Request};

/// Longest path with its NUL (<linux/limits.h>).
const PATH_MAX: usize = 4096;

/// A terminal's columns and rows, each: `struct winsize` has 16 bits.
const TERMINAL: std::ops::RangeInclusive<u64> = 1..=65_535;
/// Programs that run at once.
const RUNNING_MAX: usize = 1024;
/// What is kept of a program's arguments for lists, in octets.
const ARGV_KEPT: usize = 4096;
/// Longest timeout of a program: 30 days in milliseconds.
const TIMEOUT_MAX_MS: u64 = 30 * 24 * 3600 * 1000;

/// How a request goes on.
#[derive(Debug)]
pub(super) enum Begun {
    /// It is answered at once.
    Done(Fields),
    /// It goes on; the job is entered under its tag.
    Job(Job),
    /// It goes on as a job that was entered already.
    Entered,
}

impl Agent {
    /// Handles one message of a link.
    pub(super) fn handle(&mut self, link: u64, connection: &mut Connection, message: Message) {
        match message {
            Message::Request(request) => self.begin(link, connection, request),
            Message::Cancel { tag } => self.cancel(connection, &tag),
            Message::Data { tag, channel, payload } => self.data(connection, &tag, &channel, payload),
            Message::End { tag, channel } => self.end_of(connection, &tag, &channel),
            Message::Credit { tag, channel, octets } => self.credit(connection, &tag, &channel, octets),
            // Replies are nothing that a client sends.
            Message::Ok { .. } | Message::Err { .. } | Message::Item { .. } => {}
        }
    }

    fn begin(&mut self, link: u64, connection: &mut Connection, request: Request) {
        let tag = request.tag.clone();
        let begun = connection.admit(&tag).and_then(|()| self.dispatch(link, connection, request));
        match begun {
            Ok(Begun::Done(fields)) => connection.link.send(&Message::ok(&tag, fields)),
            Ok(Begun::Job(job)) => connection.jobs.push(Slot { tag, job }),
            Ok(Begun::Entered) => {}
            Err(error) => connection.link.send(&Message::err(&tag, error)),
        }
    }

    fn dispatch(&mut self, link: u64, connection: &mut Connection, request: Request) -> Result<Begun, Error> {
        let (tag, verb) = (request.tag.clone(), request.verb.clone());
        let args = Args::of(request);
        // What the boot left undone is needed by everything but these.
        if !matches!(verb.as_str(), "hello" | "system.configure" | "service.serve") {
            self.do_chores();
        }
        match verb.as_str() {
            "hello" => {
                args.finish()?;
                Ok(Begun::Done(self.hello()))
            }
            "system.configure" => {
                let done = system::configure(&mut self.settings, args, self.pid1)?;
                self.protect_root()?;
                Ok(Begun::Done(done))
            }
            "system.stats" => {
                args.finish()?;
                Ok(Begun::Done(system::stats(self.execs.values().filter(|exec| exec.is_alive()).count())))
            }
            "system.freeze" => self.freeze(args),
            "system.thaw" => self.thaw(args).map(Begun::Done),
            "system.poweroff" => self.power_off(args),
            "service.serve" => self.service(link, connection, &tag, args),
            "exec.start" => self.exec_start(link, &tag, args),
            "exec.attach" => self.exec_attach(link, connection, &tag, args),
            "exec.list" => {
                args.finish()?;
                Ok(Begun::Job(Job::ExecList(0)))
            }
            "exec.signal" => self.exec_signal(args),
            "exec.resize" => self.exec_resize(args),
            "exec.forget" => self.exec_forget(args),
            "code.run" => self.code_run(link, connection, &tag, args),
            "code.context.create" => self.context_create(args),
            "code.context.list" => self.context_list(connection, &tag, args),
            "code.context.interrupt" => self.context_interrupt(args),
            "code.context.restart" => self.context_restart(args),
            "code.context.delete" => self.context_delete(args),
            "file.read" => self.file_read(link, &tag, args),
            "file.write" => self.file_write(link, &tag, args),
            "file.list" => {
                let path = self.path(args, "path")?;
                self.task(link, &tag, Flow::ROWS, move |desk| files::list(desk, &path))
            }
            "file.stat" => {
                let path = self.path(args, "path")?;
                self.task(link, &tag, Flow::Answer, move |_| files::stat(&path))
            }
            "file.watch" => self.file_watch(link, &tag, args),
            "file.mkdir" => self.file_mkdir(link, &tag, args),
            "file.move" => self.file_move(link, &tag, args),
            "file.link" => self.file_link(link, &tag, args),
            "file.remove" => self.file_remove(link, &tag, args),
            other => Err(Error::new(Code::UnknownVerb, format!("{other} is not a verb of the agent"))),
        }
    }

    /// The one argument of a verb, a path.
    fn path(&self, mut args: Args, key: &str) -> Result<PathBuf, Error> {
        let path = self.path_of(&mut args, key)?;
        args.finish()?;
        Ok(path)
    }

    fn path_of(&self, args: &mut Args, key: &str) -> Result<PathBuf, Error> {
        let path = args
            .bytes(key)?
            .ok_or_else(|| Error::new(Code::MissingArgument, format!("{key} is missing")).with("argument", key))?;
        files::resolve(&self.settings.cwd, &path)
    }

    fn cancel(&mut self, connection: &mut Connection, tag: &str) {
        // One that has ended already was answered already.
        let Some(job) = connection.job(tag) else { return };
        let mut run = None;
        if let Job::Exec(id) = job
            && let Some(exec) = self.execs.get(id)
        {
            run = exec.run.is_some().then_some(*id);
            if run.is_none() {
                exec.kill_all();
            }
        }
        self.abandon(connection, tag, Error::new(Code::Cancelled, "cancelled by its client"));
        if let Some(id) = run {
            self.cancel_run(id);
        }
    }

    fn data(&mut self, connection: &mut Connection, tag: &str, channel: &str, payload: Vec<u8>) {
        // What was under way when a request ended is dropped.
        let Some(at) = connection.position(tag) else { return };
        let Some(slot) = connection.jobs.get_mut(at) else { return };
        let taken = match (&mut slot.job, channel) {
            (Job::Exec(id), "stdin") => match self.execs.get_mut(id) {
                Some(exec) => exec.stdin.push(payload),
                None => Ok(()),
            },
            (Job::Exec(id), "source") => {
                let id = *id;
                self.source(id, &payload)
            }
            (Job::Task(task), "content") => task.content(payload),
            _ => Err(no_channel(channel)),
        };
        if let Err(error) = taken {
            self.abandon(connection, tag, error);
        }
    }

    fn end_of(&mut self, connection: &mut Connection, tag: &str, channel: &str) {
        match (connection.job(tag), channel) {
            (None, _) => {}
            (Some(Job::Exec(id)), "stdin") => {
                if let Some(exec) = self.execs.get_mut(id) {
                    exec.stdin.end();
                }
            }
            (Some(Job::Exec(id)), "source") => {
                let id = *id;
                if let Err(error) = self.source_ended(id) {
                    self.abandon(connection, tag, error);
                }
            }
            (Some(Job::Task(task)), "content") => {
                if let Err(error) = task.end() {
                    self.abandon(connection, tag, error);
                }
            }
            _ => self.abandon(connection, tag, no_channel(channel)),
        }
    }

    fn credit(&mut self, connection: &mut Connection, tag: &str, channel: &str, octets: u64) {
        match (connection.job(tag), channel) {
            (Some(Job::Exec(id)), _) => {
                if let Some(exec) = self.execs.get_mut(id) {
                    exec.credit(channel, octets);
                }
            }
            (Some(Job::Task(task)), "content") => task.credit(octets),
            (Some(Job::Service), "logs") => self.service_credit(octets),
            _ => {}
        }
    }

    fn exec_start(&mut self, link: u64, tag: &str, mut args: Args) -> Result<Begun, Error> {
        let argv = args.rest();
        let own_env = args.all("env");
        let cwd = args.bytes("cwd")?;
        let user = args.text("user")?;
        let terminal = args.flag("tty")?;
        let cols = args.number("cols", TERMINAL)?;
        let rows = args.number("rows", TERMINAL)?;
        let stdin = args.flag("stdin")?;
        let privileged = args.flag("privileged")?;
        let timeout = args.number("timeout_ms", 1..=TIMEOUT_MAX_MS)?;
        let id = args.number("id", 1..=EXEC_MAX)?.unwrap_or(self.next_exec);
        args.finish()?;

        if self.stopping {
            return Err(Error::new(Code::Stopping, "the sandbox is going down"));
        }
        let Some(program) = argv.first() else {
            return Err(Error::new(Code::MissingArgument, "the program's name is missing").with("argument", "argv"));
        };
        if self.execs.contains_key(&id) {
            return Err(Error::new(Code::AlreadyExists, format!("exec {id} is there already")).with("exec", id));
        }
        let running = self.execs.values().filter(|exec| exec.is_alive()).count();
        if running >= RUNNING_MAX {
            return Err(Error::new(Code::NoCapacity, format!("{running} programs are running, which is the limit")));
        }
        check_environment(&own_env)?;

        let identity = self.settings.identity(user.as_deref())?;
        let confined = !privileged && self.confines(identity.as_ref(), user.as_deref())?;
        let env = self.settings.environment(identity.as_ref(), terminal, own_env);
        let cwd = match cwd {
            Some(cwd) => files::resolve(&self.settings.cwd, &cwd)?,
            None => self.settings.cwd.clone(),
        };
        let plan = Plan {
            candidates: strings("argv", candidates(program, variable(&env, b"PATH").unwrap_or_default()))?,
            argv: strings("argv", argv.clone())?,
            env: strings("env", env)?,
            cwd: string("cwd", cwd.into_os_string().into_encoded_bytes())?,
            identity,
            terminal: terminal.then(|| size(cols.unwrap_or(80), rows.unwrap_or(24))),
            stdin,
            confined: self.pid1,
            isolated: false,
            passed: Vec::new(),
        };
        let mut cgroup = self.users.as_mut().and_then(|users| users.create(id));
        let failed = |what: &str| Error::new(Code::NoCapacity, format!("cannot start a program: {what}"));
        let realm = self.realm.as_ref().filter(|_| confined);
        let spawned = exec::spawn(&plan, &self.null, cgroup.as_ref().map(exec::Cgroup::directory), realm);
        let spawned = match spawned {
            Ok(spawned) => spawned,
            Err(errno) => {
                if let (Some(cgroup), Some(users)) = (cgroup.take(), &mut self.users) {
                    users.retire(cgroup);
                }
                return Err(failed(errno.desc()).with("errno", format!("{errno:?}")));
            }
        };
        let watched = self.watch_exec(id, &spawned);
        let mut exec = Exec::new(id, abridged(argv), spawned, cgroup, &self.held);
        if let Err(e) = watched {
            exec.kill_all();
            return Err(failed(&e.to_string()));
        }
        exec.attached = Some(Attachment { link, tag: tag.to_string() });
        exec.deadline = timeout.map(|ms| Instant::now() + Duration::from_millis(ms));
        self.enter_exec(exec);
        Ok(Begun::Job(Job::Exec(id)))
    }

    /// The program that `exec=` names.
    fn exec_of(&mut self, args: &mut Args) -> Result<u64, Error> {
        let Some(id) = args.number("exec", 1..=EXEC_MAX)? else {
            return Err(Error::new(Code::MissingArgument, "exec is missing").with("argument", "exec"));
        };
        if self.execs.contains_key(&id) {
            return Ok(id);
        }
        Err(Error::new(Code::NotFound, format!("there is no exec {id}")).with("exec", id))
    }

    fn exec_attach(
        &mut self,
        link: u64,
        connection: &mut Connection,
        tag: &str,
        mut args: Args,
    ) -> Result<Begun, Error> {
        let stdout = args.number("stdout", 0..=u64::MAX)?.unwrap_or(0);
        let stderr = args.number("stderr", 0..=u64::MAX)?.unwrap_or(0);
        let result = args.number("result", 0..=u64::MAX)?.unwrap_or(0);
        let id = self.exec_of(&mut args)?;
        args.finish()?;
        self.release(connection, link, id);
        if let Some(exec) = self.execs.get_mut(&id) {
            let row = exec.attach(Attachment { link, tag: tag.to_string() }, [stdout, stderr, result]);
            connection.link.send(&Message::item(tag, row));
            connection.jobs.push(Slot { tag: tag.to_string(), job: Job::Exec(id) });
        }
        Ok(Begun::Entered)
    }

    fn exec_signal(&mut self, mut args: Args) -> Result<Begun, Error> {
        let Some(signal) = args.text("signal")? else {
            return Err(Error::new(Code::MissingArgument, "signal is missing").with("argument", "signal"));
        };
        let id = self.exec_of(&mut args)?;
        args.finish()?;
        let number = signal_number(&signal).ok_or_else(|| {
            Error::new(Code::BadArgument, format!("signal={signal} is neither a signal's name nor 1 to 64"))
                .with("argument", "signal")
        })?;
        if let Some(exec) = self.execs.get(&id) {
            exec.signal(number)?;
        }
        Ok(Begun::Done(Fields::new()))
    }

    fn exec_resize(&mut self, mut args: Args) -> Result<Begun, Error> {
        let cols = args.number("cols", TERMINAL)?;
        let rows = args.number("rows", TERMINAL)?;
        let id = self.exec_of(&mut args)?;
        args.finish()?;
        let (Some(cols), Some(rows)) = (cols, rows) else {
            return Err(Error::new(Code::MissingArgument, "cols and rows are both needed").with("argument", "cols"));
        };
        if let Some(exec) = self.execs.get(&id) {
            exec.resize(size(cols, rows))?;
        }
        Ok(Begun::Done(Fields::new()))
    }

    fn exec_forget(&mut self, mut args: Args) -> Result<Begun, Error> {
        let id = self.exec_of(&mut args)?;
        args.finish()?;
        if let Some(exec) = self.execs.get(&id)
            && (exec.is_alive() || exec.attached.is_some())
        {
            return Err(Error::new(Code::BadState, format!("exec {id} has not ended")).with("exec", id));
        }
        self.forget(id);
        Ok(Begun::Done(Fields::new()))
    }

    /// Begins a file operation on a thread of its own.
    fn task(
        &mut self,
        link: u64,
        tag: &str,
        flow: Flow,
        work: impl FnOnce(&Desk) -> Result<Fields, Error> + Send + 'static,
    ) -> Result<Begun, Error> {
        self.tasks.run(&self.poll, Self::TASKS, link, tag, flow, work).map(|task| Begun::Job(Job::Task(task)))
    }

    fn file_read(&mut self, link: u64, tag: &str, mut args: Args) -> Result<Begun, Error> {
        let path = self.path_of(&mut args, "path")?;
        let offset = args.number("offset", 0..=i64::MAX as u64)?.unwrap_or(0);
        let length = args.number("length", 0..=u64::MAX)?.unwrap_or(u64::MAX);
        args.finish()?;
        self.task(link, tag, Flow::CONTENT, move |desk| files::read(desk, &path, offset, length))
    }

    fn file_write(&mut self, link: u64, tag: &str, mut args: Args) -> Result<Begun, Error> {
        let path = self.path_of(&mut args, "path")?;
        let mode = mode(&mut args)?;
        let append = args.flag("append")?;
        let given = args.text("user")?;
        args.finish()?;
        let user = self.settings.owner(given.as_deref())?;
        let owner = given.is_some().then_some(user);
        let begin = if append { Writing::append } else { Writing::replace };
        self.task(link, tag, Flow::TAKING, move |desk| begin(path, mode, owner, user)?.take(desk))
    }

    fn file_mkdir(&mut self, link: u64, tag: &str, mut args: Args) -> Result<Begun, Error> {
        let path = self.path_of(&mut args, "path")?;
        let mode = mode(&mut args)?.unwrap_or(0o755);
        let parents = args.flag("parents")?;
        let user = args.text("user")?;
        args.finish()?;
        let owner = self.settings.owner(user.as_deref())?;
        self.task(link, tag, Flow::Answer, move |_| files::make_directory(&path, mode, owner, parents))
    }

    fn file_move(&mut self, link: u64, tag: &str, mut args: Args) -> Result<Begun, Error> {
        let from = self.path_of(&mut args, "from")?;
        let to = self.path_of(&mut args, "to")?;
        args.finish()?;
        self.task(link, tag, Flow::Answer, move |_| files::relocate(&from, &to))
    }

    fn file_link(&mut self, link: u64, tag: &str, mut args: Args) -> Result<Begun, Error> {
        let path = self.path_of(&mut args, "path")?;
        let target = args.bytes("target")?.unwrap_or_default();
        let user = args.text("user")?;
        args.finish()?;
        if target.is_empty() || target.len() >= PATH_MAX || target.contains(&0) {
            let message = format!("a link's target has 1 to {} octets and no NUL", PATH_MAX - 1);
            return Err(Error::new(Code::BadArgument, message).with("argument", "target"));
        }
        let owner = self.settings.owner(user.as_deref())?;
        self.task(link, tag, Flow::Answer, move |_| files::link(&path, OsStr::from_bytes(&target), owner))
    }

    fn file_watch(&mut self, link: u64, tag: &str, mut args: Args) -> Result<Begun, Error> {
        let path = self.path_of(&mut args, "path")?;
        let recursive = args.flag("recursive")?;
        args.finish()?;
        self.task(link, tag, Flow::ROWS, move |desk| watch::watch(desk, &path, recursive))
    }

    fn file_remove(&mut self, link: u64, tag: &str, mut args: Args) -> Result<Begun, Error> {
        let path = self.path_of(&mut args, "path")?;
        let recursive = args.flag("recursive")?;
        args.finish()?;
        self.task(link, tag, Flow::Answer, move |_| remove::remove(&path, recursive))
    }

    fn power_off(&mut self, mut args: Args) -> Result<Begun, Error> {
        let patience = args.number("timeout_ms", 0..=60_000)?.unwrap_or(500);
        args.finish()?;
        if !self.pid1 {
            return Err(Error::new(Code::BadState, "this agent is not the init of a sandbox"));
        }
        self.stopping = true;
        self.realm.iter().for_each(Realm::end);
        let patience = if system::ask_all_to_end() { patience } else { 0 };
        self.add_due(Instant::now() + Duration::from_millis(patience), Due::PowerOff);
        Ok(Begun::Done(Fields::new()))
    }
}

fn no_channel(channel: &str) -> Error {
    Error::new(Code::BadArgument, format!("the request takes nothing on channel {channel}")).with("channel", channel)
}

/// A mode as it is written everywhere: octal digits.
fn mode(args: &mut Args) -> Result<Option<u32>, Error> {
    let Some(given) = args.text("mode")? else { return Ok(None) };
    match u32::from_str_radix(&given, 8) {
        Ok(mode) if mode <= MODE_MAX && given.bytes().all(|b| b.is_ascii_digit()) => Ok(Some(mode)),
        _ => Err(Error::new(Code::BadArgument, format!("mode={given} is not an octal number up to 7777"))
            .with("argument", "mode")),
    }
}

/// Both were checked to be of `TERMINAL`.
fn size(cols: u64, rows: u64) -> Size {
    Size { cols: u16::try_from(cols).unwrap_or(u16::MAX), rows: u16::try_from(rows).unwrap_or(u16::MAX) }
}

pub(super) fn string(argument: &str, value: Vec<u8>) -> Result<CString, Error> {
    CString::new(value)
        .map_err(|_| Error::new(Code::BadArgument, format!("{argument} has a NUL")).with("argument", argument))
}

pub(super) fn strings(argument: &str, values: Vec<Vec<u8>>) -> Result<Vec<CString>, Error> {
    values.into_iter().map(|value| string(argument, value)).collect()
}

/// Where a program of that name may be: itself when it has a slash, else in the directories of PATH.
pub(super) fn candidates(program: &[u8], path: &[u8]) -> Vec<Vec<u8>> {
    if program.is_empty() {
        return Vec::new();
    }
    if program.contains(&b'/') {
        return vec![program.to_vec()];
    }
    path.split(|&b| b == b':')
        .map(|directory| {
            // An empty entry is the working directory.
            let directory = if directory.is_empty() { OsStr::new(".") } else { OsStr::from_bytes(directory) };
            PathBuf::from(directory).join(OsStr::from_bytes(program)).into_os_string().into_encoded_bytes()
        })
        .collect()
}

/// The arguments, up to `ARGV_KEPT` octets in all.
fn abridged(argv: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    let mut left = ARGV_KEPT;
    let mut kept = Vec::new();
    for mut arg in argv {
        if left == 0 {
            break;
        }
        arg.truncate(left);
        left -= arg.len().clamp(1, left);
        kept.push(arg);
    }
    kept
}

/// `TERM`, `SIGTERM` or `15`.
fn signal_number(text: &str) -> Option<libc::c_int> {
    if let Ok(number) = text.parse::<libc::c_int>() {
        return (1..=64).contains(&number).then_some(number);
    }
    let name = if text.starts_with("SIG") { text.to_string() } else { format!("SIG{text}") };
    Signal::from_str(&name).ok().map(|signal| signal as libc::c_int)
}
