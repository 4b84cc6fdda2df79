//! Arguments of the verbs that build templates.

use std::collections::BTreeSet;
use std::net::SocketAddrV4;

use crate::sandbox::spec::{Defaults, Spec};
use crate::storage::languages::{self, Languages};
use crate::wire::{Args, Code, Error, Request};

use super::command::Command;

/// What a template starts from that says nothing else.
const SCRATCH: &str = "scratch";
/// Keys of steps that a build names at most.
const MAX_STEPS: usize = 256;

/// What is to be built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildAsk {
    /// Name of the template to be.
    pub name: String,
    /// The builder.
    pub spec: Spec,
    /// Keys of steps that it may go on from, the last first.
    pub steps: Vec<String>,
    /// Digest of all that it is built from; empty where that is not said.
    pub key: String,
    /// What the template that it is built on must be (`Manifest::fingerprint`); whatever it is where that is not said.
    pub base: Option<String>,
    /// TCP services that the builder reaches beside what its lists leave: only the node itself asks for some.
    pub services: BTreeSet<SocketAddrV4>,
}

/// What a template is to be beside its disk. What is not said is as the template's that it was built on, but for the two
/// commands: that there is none of them is said by leaving them out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CommitAsk {
    /// Of programs.
    pub user: Option<u32>,
    /// Of programs.
    pub cwd: Option<String>,
    /// Of programs.
    pub env: Vec<String>,
    /// The start command.
    pub start: Vec<String>,
    /// The ready command.
    pub ready: String,
    /// How code is run.
    pub languages: Option<Languages>,
    /// As `BuildAsk::key`.
    pub key: String,
    /// A line for people.
    pub description: Option<String>,
    /// A sandbox of it is to run before it gets its name.
    pub trial: Option<Spec>,
}

fn text(what: &str, octets: Vec<u8>) -> Result<String, Error> {
    String::from_utf8(octets)
        .map_err(|_| Error::new(Code::BadArgument, format!("{what} is not UTF-8")).with("argument", what))
}

/// A digest in hex.
fn digest(key: &str, value: &str) -> Result<(), Error> {
    if value.len() == 64 && value.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        return Ok(());
    }
    Err(Error::new(Code::BadArgument, format!("{key}={value} is not 64 hex digits")).with("argument", key))
}

fn read_languages(text: &str) -> Result<Languages, Error> {
    languages::parse(text).map_err(|refused| {
        let error = Error::new(Code::BadArgument, format!("languages: {refused}")).with("argument", "languages");
        let error = refused.line.iter().fold(error, |error, line| error.with("line", line));
        refused.max.iter().fold(error, |error, max| error.with("max", max))
    })
}

/// The shape of a sandbox of a template.
fn shape(args: &mut Args, template: &str, defaults: Defaults) -> Result<Spec, Error> {
    let mut shape = Request::new("", "").set("template", template);
    for key in ["vcpus", "memory_mib", "disk_mib", "network"] {
        shape = args.text(key)?.iter().fold(shape, |shape, value| shape.set(key, value));
    }
    for key in ["allow", "deny"] {
        shape = args.all(key).iter().fold(shape, |shape, value| shape.set_bytes(key, value));
    }
    let spec = Spec::take(&mut Args::of(shape), defaults)?;
    spec.check_asked().map(|()| spec)
}

/// `template.build`
pub(super) fn build(_: &str, mut args: Args, defaults: Defaults) -> Result<Command, Error> {
    let name = args.next_text("template")?;
    let from = args.text("from")?.unwrap_or_else(|| SCRATCH.to_string());
    let spec = shape(&mut args, &from, defaults)?;
    let key = args.text("key")?.unwrap_or_default();
    if !key.is_empty() {
        digest("key", &key)?;
    }
    let steps = args.all("step").into_iter().map(|step| text("step", step)).collect::<Result<Vec<_>, Error>>()?;
    steps.iter().try_for_each(|step| digest("step", step))?;
    if steps.len() > MAX_STEPS {
        let message = format!("{} of step are over the limit of {MAX_STEPS}", steps.len());
        return Err(Error::new(Code::BadArgument, message).with("argument", "step").with("max", MAX_STEPS));
    }
    let services = args.all("service").into_iter().map(|service| {
        text("service", service)?
            .parse()
            .map_err(|_| Error::new(Code::BadArgument, "service is not A.B.C.D:PORT").with("argument", "service"))
    });
    let services = services.collect::<Result<BTreeSet<SocketAddrV4>, Error>>()?;
    let base = args.text("base")?;
    base.iter().try_for_each(|base| digest("base", base))?;
    args.finish()?;
    Ok(Command::TemplateBuild(Box::new(BuildAsk { name, spec, steps, key, base, services })))
}

/// `template.step`
pub(super) fn step(_: &str, mut args: Args, _: Defaults) -> Result<Command, Error> {
    let sandbox = args.next_text("sandbox")?;
    let key = args.text("key")?.unwrap_or_default();
    digest("key", &key)?;
    args.finish()?;
    Ok(Command::TemplateStep { sandbox, key })
}

/// `template.commit`
pub(super) fn commit(_: &str, mut args: Args, defaults: Defaults) -> Result<Command, Error> {
    let sandbox = args.next_text("sandbox")?;
    let all = |args: &mut Args, key: &str| {
        args.all(key).into_iter().map(|value| text(key, value)).collect::<Result<Vec<_>, Error>>()
    };
    let mut ask = CommitAsk {
        user: args.number("user", 0..=u64::from(u32::MAX) - 1)?.and_then(|user| u32::try_from(user).ok()),
        cwd: args.text("cwd")?,
        env: all(&mut args, "env")?,
        start: all(&mut args, "start")?,
        ready: args.text("ready")?.unwrap_or_default(),
        languages: args.text("languages")?.map(|text| read_languages(&text)).transpose()?,
        key: args.text("key")?.unwrap_or_default(),
        description: args.text("description")?,
        trial: None,
    };
    if !ask.key.is_empty() {
        digest("key", &ask.key)?;
    }
    if args.flag("trial")? {
        // Its name is not its own yet.
        ask.trial = Some(shape(&mut args, SCRATCH, defaults)?);
    }
    args.finish()?;
    Ok(Command::TemplateCommit { sandbox, ask: Box::new(ask) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::time_limits::TimeLimits;

    const DEFAULTS: Defaults = Defaults { vcpus: 1, memory_mib: 512, time_limits: TimeLimits::NONE };

    fn commit(languages: &str) -> Result<CommitAsk, Error> {
        let request = Request::new("1", "template.commit").arg("box").set("languages", languages);
        match Command::of(request, DEFAULTS)? {
            Command::TemplateCommit { ask, .. } => Ok(*ask),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn languages_are_checked_before_anything_is_done() {
        let ask = commit("[languages.sh]\nonce = [\"/bin/sh\", \"{source}\"]\n").unwrap();
        assert_eq!(ask.languages.unwrap()["sh"].once, ["/bin/sh", "{source}"]);
        assert_eq!(commit("").unwrap().languages, Some(Languages::new()), "none at all");
        let error = commit("\n[languages.sh]\nonce = [\"/bin/sh\"]\n").unwrap_err();
        assert!(error.is(Code::BadArgument), "{error}");
        assert_eq!((error.fields.get("argument"), error.fields.get("line")), (Some("languages"), Some("2")));
        let error = commit(&"#".repeat(languages::MAX_TEXT + 1)).unwrap_err();
        assert_eq!((error.fields.get("argument"), error.fields.get("max")), (Some("languages"), Some("16384")));
    }
}
