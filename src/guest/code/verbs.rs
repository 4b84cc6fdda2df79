//! `code.run` and `code.context.*`, as the node asks them. docs/code.md.

use std::time::Duration;

use super::context::{Context, Start};
use super::launch::{check_words, memory, memory_limit_mib};
use super::run::{How, Run, SOURCE_MAX, Stage};
use crate::guest::agent::Agent;
use crate::guest::connection::{Connection, Job, Slot};
use crate::guest::exec::{Attachment, Exec};
use crate::guest::settings::check_environment;
use crate::guest::verbs::Begun;
use crate::wire::{Args, Code, EXEC_MAX, Error, Fields, Message};

/// Contexts of a sandbox at most.
const CONTEXTS_MAX: usize = 64;
/// Runs that wait for a context at most.
const QUEUE_MAX: usize = 64;
/// Time of a run when nothing is said, and at most.
const TIMEOUT_MS: u64 = 30_000;
const TIMEOUT_MAX_MS: u64 = 24 * 3600 * 1000;

impl Agent {
    /// `code.run`: the run is entered, and begins when its source has come.
    pub(in crate::guest) fn code_run(
        &mut self,
        link: u64,
        connection: &mut Connection,
        tag: &str,
        mut args: Args,
    ) -> Result<Begun, Error> {
        let timeout = args.number("timeout_ms", 1..=TIMEOUT_MAX_MS)?.unwrap_or(TIMEOUT_MS);
        let id = args.number("id", 1..=EXEC_MAX)?.unwrap_or(self.next_exec);
        let context = args.number("context", 1..=u64::MAX)?;
        let start = match context {
            Some(_) => None,
            None => Some(start(&mut args)?),
        };
        args.finish()?;
        if self.stopping {
            return Err(Error::new(Code::Stopping, "the sandbox is going down"));
        }
        if self.execs.contains_key(&id) {
            return Err(Error::new(Code::AlreadyExists, format!("exec {id} is there already")).with("exec", id));
        }
        let language = match (&start, context) {
            (Some(start), _) => start.language.clone(),
            (None, Some(number)) => {
                let context = self.living_context(number)?;
                if context.queue.len() >= QUEUE_MAX {
                    let message = format!("{QUEUE_MAX} runs wait for context {number}, which is the limit");
                    return Err(Error::new(Code::NoCapacity, message).with("max", QUEUE_MAX));
                }
                context.start.language.clone()
            }
            (None, None) => String::new(),
        };
        let run = Run::new(language, context, start, Duration::from_millis(timeout));
        let mut exec = Exec::of_run(id, run, &self.held);
        exec.attached = Some(Attachment { link, tag: tag.to_string() });
        self.next_exec = self.next_exec.max(id.saturating_add(1));
        self.execs.insert(id, exec);
        self.busy_execs.insert(id);
        connection.jobs.push(Slot { tag: tag.to_string(), job: Job::Exec(id) });
        // Beside what every channel may send at once: so that one octet too many is told from one too few.
        connection.link.send(&Message::credit(tag, "source", SOURCE_MAX as u64));
        Ok(Begun::Entered)
    }

    /// A piece of a run's source.
    pub(in crate::guest) fn source(&mut self, id: u64, piece: &[u8]) -> Result<(), Error> {
        match self.run_of(id) {
            Some(run) => run.take(piece),
            None => Err(Error::new(Code::BadArgument, "a program has no channel source").with("channel", "source")),
        }
    }

    /// A run's source is whole.
    pub(in crate::guest) fn source_ended(&mut self, id: u64) -> Result<(), Error> {
        let Some(run) = self.run_of(id).filter(|run| run.stage == Stage::Source) else { return Ok(()) };
        run.check()?;
        let number = match (run.context, run.start.clone()) {
            (Some(number), _) => number,
            (None, Some(start)) => {
                let source = if start.runner { Vec::new() } else { std::mem::take(&mut run.source) };
                let number = self.new_context(start, false, &source)?;
                if let Some(run) = self.run_of(id) {
                    run.context = Some(number);
                }
                number
            }
            (None, None) => return Ok(()),
        };
        // It may have ended while the source was on its way.
        self.living_context(number)?.queue.push_back(id);
        if let Some(run) = self.run_of(id) {
            run.stage = Stage::Pending;
        }
        self.next_run(number);
        Ok(())
    }

    /// A request about a run failed before it began: nothing is left of it.
    pub(in crate::guest) fn drop_run(&mut self, id: u64) {
        if self.run_of(id).is_some_and(|run| run.stage == Stage::Source) {
            self.execs.remove(&id);
        }
    }

    /// `code.context.create`
    pub(in crate::guest) fn context_create(&mut self, mut args: Args) -> Result<Begun, Error> {
        let start = start(&mut args)?;
        args.finish()?;
        if self.stopping {
            return Err(Error::new(Code::Stopping, "the sandbox is going down"));
        }
        if !start.runner {
            let message = format!("{} has no runner, and so no contexts", start.language);
            return Err(Error::new(Code::BadArgument, message).with("argument", "language"));
        }
        let kept = self.contexts.values().filter(|context| context.kept).count();
        if kept >= CONTEXTS_MAX {
            let message = format!("there are {kept} contexts, which is the limit");
            return Err(Error::new(Code::NoCapacity, message).with("max", CONTEXTS_MAX));
        }
        let number = self.new_context(start, true, &[])?;
        Ok(Begun::Done(Fields::new().with("context", number)))
    }

    /// `code.context.list`
    pub(in crate::guest) fn context_list(
        &mut self,
        connection: &mut Connection,
        tag: &str,
        args: Args,
    ) -> Result<Begun, Error> {
        args.finish()?;
        for (number, context) in self.contexts.iter().filter(|(_, context)| context.kept) {
            connection.link.send(&Message::item(tag, row(*number, context)));
        }
        Ok(Begun::Done(Fields::new()))
    }

    /// `code.context.interrupt`
    pub(in crate::guest) fn context_interrupt(&mut self, mut args: Args) -> Result<Begun, Error> {
        let number = context_of(&mut args)?;
        args.finish()?;
        let context = self.living_context(number)?;
        let running = context.current.is_some();
        if let (true, Some(process)) = (running, &context.process) {
            process.signal(libc::SIGINT);
        }
        Ok(Begun::Done(Fields::new().with("interrupted", running)))
    }

    /// `code.context.restart`
    pub(in crate::guest) fn context_restart(&mut self, mut args: Args) -> Result<Begun, Error> {
        let number = context_of(&mut args)?;
        args.finish()?;
        self.context(number)?;
        self.end_context(number, "it was restarted");
        self.launch(number, &[])?;
        self.next_run(number);
        Ok(Begun::Done(Fields::new().with("context", number)))
    }

    /// `code.context.delete`
    pub(in crate::guest) fn context_delete(&mut self, mut args: Args) -> Result<Begun, Error> {
        let number = context_of(&mut args)?;
        args.finish()?;
        self.context(number)?;
        self.end_context(number, "it was deleted");
        self.contexts.remove(&number);
        Ok(Begun::Done(Fields::new()))
    }

    /// Kills a context's process and ends its runs.
    fn end_context(&mut self, number: u64, why: &str) {
        let Some(context) = self.contexts.get_mut(&number) else { return };
        context.ended = Some(why.to_string());
        if let Some(id) = context.current {
            // What it said and wrote so far is still told.
            self.end_run(id, How::Exit(libc::SIGKILL));
        }
        self.lose_process(number, why, None);
    }

    fn context(&mut self, number: u64) -> Result<&mut Context, Error> {
        let none = || Error::new(Code::NotFound, format!("there is no context {number}")).with("context", number);
        self.contexts.get_mut(&number).ok_or_else(none)
    }

    fn living_context(&mut self, number: u64) -> Result<&mut Context, Error> {
        let context = self.context(number)?;
        match &context.ended {
            Some(why) => {
                let message = format!("context {number} has ended: {why}");
                Err(Error::new(Code::BadState, message).with("context", number).with("state", "ended"))
            }
            None => Ok(context),
        }
    }
}

fn context_of(args: &mut Args) -> Result<u64, Error> {
    let missing = || Error::new(Code::MissingArgument, "context is missing").with("argument", "context");
    args.number("context", 1..=u64::MAX)?.ok_or_else(missing)
}

/// What the node says of a language and a run's or context's bounds.
fn start(args: &mut Args) -> Result<Start, Error> {
    let missing = |key: &str| Error::new(Code::MissingArgument, format!("{key} is missing")).with("argument", key);
    let language = args.text("language")?.ok_or_else(|| missing("language"))?;
    let (runner, once) = (args.all("start"), args.all("once"));
    let is_runner = !runner.is_empty();
    let argv = if is_runner { runner } else { once };
    if argv.is_empty() {
        return Err(missing("start"));
    }
    check_words(&argv)?;
    let env = args.all("env");
    check_environment(&env)?;
    let user = args.text("user")?;
    let cwd = args.bytes("cwd")?;
    let memory_mib = match args.take_word("memory_mib", "max") {
        true => memory_limit_mib(),
        false => memory(args.number("memory_mib", 16..=1 << 20)?)?,
    };
    let network = args.text("network")?.as_deref() == Some("on");
    Ok(Start { language, argv, runner: is_runner, env, user, cwd, memory_mib: Some(memory_mib), network })
}

/// A context as a row.
fn row(number: u64, context: &Context) -> Fields {
    let fields = Fields::new()
        .with("context", number)
        .with("language", &context.start.language)
        .with("state", context.state())
        .with("runs", context.runs)
        .with("queued", context.queue.len())
        .with("network", if context.start.network { "on" } else { "off" })
        .with("memory_mib", context.start.memory_mib.unwrap_or(0));
    let fields = match &context.process {
        Some(process) => fields.with("pid", process.pid),
        None => fields,
    };
    match &context.ended {
        Some(why) => fields.with("reason", why),
        None => fields,
    }
}
