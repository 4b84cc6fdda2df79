//! What clients may ask about code: `code.run`, `code.list`, `code.context.*`. docs/code.md.

use super::command::Command;
use crate::sandbox::spec::Defaults;
use crate::storage::languages::{IndexKind, is_language_name};
use crate::wire::{Args, Code, Error, Request};

/// Longest run, in milliseconds: a day.
const TIMEOUT_MAX_MS: u64 = 24 * 3600 * 1000;
/// Memory of a run or context, in MiB; a sandbox has its own limit below this.
const MEMORY_MIB: std::ops::RangeInclusive<u64> = 16..=32_768;

/// How much memory a run or context may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// So many MiB.
    Mib(u64),
    /// What the sandbox can give.
    Max,
}

impl std::fmt::Display for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Mib(mib) => mib.fmt(f),
            Self::Max => f.write_str(MAX),
        }
    }
}

/// The word for all that a sandbox can give.
pub const MAX: &str = "max";

/// What a run, or a context, may use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bounds {
    /// `NAME=value` each.
    pub env: Vec<Vec<u8>>,
    /// Whom it runs as; the sandbox's user when not said.
    pub user: Option<String>,
    /// Its memory; 512 MiB, or what the sandbox has, when not said.
    pub memory: Option<Memory>,
    /// Where it begins; the sandbox's working directory when not said.
    pub cwd: Option<Vec<u8>>,
    /// Whether it has its sandbox's network.
    pub network: bool,
    /// Packages that it is to have, as they were asked for.
    pub dependencies: Vec<String>,
    /// The index that they are thought to come from; whatever the language's is when not said.
    pub index: Option<IndexKind>,
}

/// `code.run`, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunAsk {
    /// The language of a run that has no context.
    pub language: Option<String>,
    /// The context to run in.
    pub context: Option<u64>,
    /// Of a run that has no context.
    pub bounds: Bounds,
    /// When it is ended; 30 s when not said.
    pub timeout_ms: Option<u64>,
    /// Answers at once and lets it run.
    pub detach: bool,
}

fn bad(argument: &str, message: &str) -> Error {
    Error::new(Code::BadArgument, message).with("argument", argument)
}

fn language(args: &mut Args) -> Result<Option<String>, Error> {
    match args.text("language")? {
        Some(name) if !is_language_name(&name) => {
            Err(bad("language", &format!("language={name} is no language's name")))
        }
        other => Ok(other),
    }
}

fn bounds(args: &mut Args) -> Result<Bounds, Error> {
    let network = match args.text("network")?.as_deref() {
        None | Some("off") => false,
        Some("on") => true,
        Some(other) => return Err(bad("network", &format!("network={other} is neither on nor off"))),
    };
    let index = match args.text("index")?.as_deref() {
        None => None,
        Some("pip") => Some(IndexKind::Pip),
        Some("npm") => Some(IndexKind::Npm),
        Some(other) => return Err(bad("index", &format!("index={other} is neither pip nor npm"))),
    };
    let dependencies = args.all("dependency").into_iter().map(String::from_utf8).collect::<Result<Vec<_>, _>>();
    let dependencies = dependencies.map_err(|_| bad("dependency", "the name of a package is not UTF-8"))?;
    let memory = match args.take_word("memory_mib", MAX) {
        true => Some(Memory::Max),
        false => args.number("memory_mib", MEMORY_MIB)?.map(Memory::Mib),
    };
    Ok(Bounds {
        env: args.all("env"),
        user: args.text("user")?,
        memory,
        cwd: args.bytes("cwd")?,
        network,
        dependencies,
        index,
    })
}

pub(super) fn run(_: &str, mut args: Args, _: Defaults) -> Result<Command, Error> {
    let sandbox = args.next_text("sandbox")?;
    let language = language(&mut args)?;
    let context = args.number("context", 1..=u64::MAX)?;
    let bounds = bounds(&mut args)?;
    let timeout_ms = args.number("timeout_ms", 1..=TIMEOUT_MAX_MS)?;
    let detach = args.flag("detach")?;
    args.finish()?;
    match (&language, context) {
        (None, None) => {
            let message = "language is missing, or the context to run in";
            return Err(Error::new(Code::MissingArgument, message).with("argument", "language"));
        }
        (Some(_), Some(_)) => return Err(bad("language", "a context has its language already")),
        (None, Some(_)) if bounds != Bounds::default() => {
            return Err(bad(
                "context",
                "env, cwd, user, memory, network and dependencies are a context's from its creation on",
            ));
        }
        _ => {}
    }
    let ask = RunAsk { language, context, bounds, timeout_ms, detach };
    Ok(Command::CodeRun { sandbox, ask: Box::new(ask) })
}

pub(super) fn list(_: &str, mut args: Args, _: Defaults) -> Result<Command, Error> {
    let sandbox = args.next_text("sandbox")?;
    args.finish().map(|()| Command::CodeList(sandbox))
}

pub(super) fn create(_: &str, mut args: Args, _: Defaults) -> Result<Command, Error> {
    let sandbox = args.next_text("sandbox")?;
    let missing = || Error::new(Code::MissingArgument, "language is missing").with("argument", "language");
    let language = language(&mut args)?.ok_or_else(missing)?;
    let bounds = bounds(&mut args)?;
    args.finish().map(|()| Command::CodeContextCreate { sandbox, language, bounds })
}

pub(super) fn contexts(verb: &str, mut args: Args, _: Defaults) -> Result<Command, Error> {
    let sandbox = args.next_text("sandbox")?;
    let request = Request::new("", verb);
    args.finish().map(|()| Command::ExecControl { sandbox, request })
}

pub(super) fn context(verb: &str, mut args: Args, _: Defaults) -> Result<Command, Error> {
    let sandbox = args.next_text("sandbox")?;
    let missing = || Error::new(Code::MissingArgument, "context is missing").with("argument", "context");
    let number = args.number("context", 1..=u64::MAX)?.ok_or_else(missing)?;
    let request = Request::new("", verb).set("context", number);
    args.finish().map(|()| Command::ExecControl { sandbox, request })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::time_limits::TimeLimits;

    const DEFAULTS: Defaults = Defaults { vcpus: 1, memory_mib: 512, time_limits: TimeLimits::NONE };

    fn of(request: Request) -> Result<Command, Error> {
        Command::of(request, DEFAULTS)
    }

    #[test]
    fn a_run_has_a_language_or_a_context_and_not_both() {
        let run = || Request::new("1", "code.run").arg("a");
        assert!(of(run()).unwrap_err().is(Code::MissingArgument));
        assert!(of(run().set("language", "python").set("context", 1)).unwrap_err().is(Code::BadArgument));
        assert!(of(run().set("context", 1).set("memory_mib", 64)).unwrap_err().is(Code::BadArgument));
        assert!(of(run().set("language", "../python")).unwrap_err().is(Code::BadArgument));
        assert!(of(run().set("language", "python").set("network", "yes")).unwrap_err().is(Code::BadArgument));
        assert!(of(run().set("language", "python").set("memory_mib", 1)).unwrap_err().is(Code::OutOfRange));
        assert!(of(run().set("context", 1).set("timeout_ms", 100)).is_ok());
        let with = |memory: &str| match of(run().set("language", "python").set("memory_mib", memory)) {
            Ok(Command::CodeRun { ask, .. }) => ask.bounds.memory,
            _ => None,
        };
        assert_eq!((with("64"), with("max"), with("maximal")), (Some(Memory::Mib(64)), Some(Memory::Max), None));
    }

    #[test]
    fn a_context_is_named_by_its_number() {
        for verb in ["code.context.interrupt", "code.context.restart", "code.context.delete"] {
            assert!(of(Request::new("1", verb).arg("a")).unwrap_err().is(Code::MissingArgument));
            let request = Request::new("", verb).set("context", 3);
            let asked = of(Request::new("1", verb).arg("a").set("context", 3));
            assert_eq!(asked, Ok(Command::ExecControl { sandbox: "a".to_string(), request }));
        }
    }
}
