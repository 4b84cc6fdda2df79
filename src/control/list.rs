//! Which sandboxes a client asks for: `sandbox.list`.

use super::command::Command;
use crate::sandbox::id::{SandboxId, check_name};
use crate::sandbox::lifecycle::State;
use crate::sandbox::spec::Defaults;
use crate::wire::{Args, Code, Error};

/// Rows of one answer at most, where a request bounds them.
const MAX_ROWS: u64 = 1_000_000;
/// Latest time.
const MAX: u64 = i64::MAX as u64;

/// What the sandboxes of a list have in common.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ListQuery {
    /// Their state.
    pub state: Option<State>,
    /// Whose they are.
    pub owner: Option<String>,
    /// What they were made from.
    pub template: Option<String>,
    /// Labels that they all have, each of any value where none is given.
    pub labels: Vec<(String, Option<String>)>,
    /// When they were made: not before, and before.
    pub created: (u64, u64),
    /// When they were used last: not before, and before.
    pub used: (u64, u64),
    /// Whether a client waits for something in them.
    pub executing: Option<bool>,
    /// Only those with greater ids.
    pub after: Option<SandboxId>,
    /// At most that many.
    pub limit: Option<u64>,
}

fn bad(key: &str, message: String) -> Error {
    Error::new(Code::BadArgument, message).with("argument", key)
}

fn times(args: &mut Args, since: &str, until: &str) -> Result<(u64, u64), Error> {
    Ok((args.number(since, 0..=MAX)?.unwrap_or(0), args.number(until, 0..=MAX)?.unwrap_or(u64::MAX)))
}

pub(super) fn list(_: &str, mut args: Args, _: Defaults) -> Result<Command, Error> {
    let state = args
        .text("state")?
        .map(|text| State::parse(&text).ok_or_else(|| bad("state", format!("state={text} is not a state"))));
    let owner = args.text("owner")?;
    owner.iter().try_for_each(|owner| check_name("owner", owner))?;
    let labels = args.all("label").into_iter().map(|label| {
        let text = String::from_utf8(label).map_err(|_| bad("label", "a label is UTF-8".to_string()))?;
        Ok(match text.split_once('=') {
            Some((key, value)) => (key.to_string(), Some(value.to_string())),
            None => (text, None),
        })
    });
    let executing = match args.text("executing")?.as_deref() {
        None => None,
        Some("true") => Some(true),
        Some("false") => Some(false),
        Some(other) => return Err(bad("executing", format!("executing={other} is neither true nor false"))),
    };
    let after = args.text("after")?.map(|text| {
        SandboxId::parse(&text).ok_or_else(|| bad("after", format!("after={text} is not the id of a sandbox")))
    });
    let query = ListQuery {
        state: state.transpose()?,
        owner,
        template: args.text("template")?,
        labels: labels.collect::<Result<_, Error>>()?,
        created: times(&mut args, "created_since_ms", "created_until_ms")?,
        used: times(&mut args, "used_since_ms", "used_until_ms")?,
        executing,
        after: after.transpose()?,
        limit: args.number("limit", 1..=MAX_ROWS)?,
    };
    args.finish().map(|()| Command::SandboxList(Box::new(query)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::time_limits::TimeLimits;
    use crate::wire::Request;

    #[test]
    fn filters_are_checked() {
        let of = |request| Command::of(request, Defaults { vcpus: 1, memory_mib: 512, time_limits: TimeLimits::NONE });
        let list = || Request::new("1", "sandbox.list");
        let asked =
            of(list().set("label", "a=b=c").set("label", "x").set("executing", "false").set("used_until_ms", 7));
        let labels = vec![("a".to_string(), Some("b=c".to_string())), ("x".to_string(), None)];
        let (created, used) = ((0, u64::MAX), (0, 7));
        let query = ListQuery { labels, created, used, executing: Some(false), ..ListQuery::default() };
        assert_eq!(asked, Ok(Command::SandboxList(Box::new(query))));
        assert!(of(list().set("after", "../x")).unwrap_err().is(Code::BadArgument));
        assert!(of(list().set("executing", "busy")).unwrap_err().is(Code::BadArgument));
        assert!(of(list().set("limit", 0)).unwrap_err().is(Code::OutOfRange));
    }
}
