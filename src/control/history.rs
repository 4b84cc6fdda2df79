//! What clients may ask about the history of executions: `history.list`, `history.inspect`.

use super::command::Command;
use crate::sandbox::id::check_name;
use crate::sandbox::spec::Defaults;
use crate::storage::history::HistoryQuery;
use crate::wire::{Args, Code, Error};

/// Records in one answer, where a request does not say, and at most.
const ROWS: u64 = 100;
const MAX_ROWS: u64 = 1000;
/// Largest number of a record, and latest time.
const MAX: u64 = i64::MAX as u64;

fn one_of(args: &mut Args, key: &str, words: &[&str]) -> Result<Option<String>, Error> {
    match args.text(key)? {
        Some(word) if !words.contains(&word.as_str()) => {
            let message = format!("{key}={word} is none of {}", words.join(", "));
            Err(Error::new(Code::BadArgument, message).with("argument", key))
        }
        other => Ok(other),
    }
}

pub(super) fn list(_: &str, mut args: Args, _: Defaults) -> Result<Command, Error> {
    let owner = args.text("owner")?;
    owner.iter().try_for_each(|owner| check_name("owner", owner))?;
    let query = HistoryQuery {
        before: args.number("before", 1..=MAX)?,
        owner,
        sandbox: args.text("sandbox")?,
        exec: args.number("exec", 0..=MAX)?,
        is_code: one_of(&mut args, "kind", &["exec", "code"])?.map(|kind| kind == "code"),
        language: args.text("language")?,
        state: one_of(&mut args, "state", &["pending", "running", "completed", "failed"])?,
        since_ms: args.number("since_ms", 0..=MAX)?,
        until_ms: args.number("until_ms", 0..=MAX)?,
        limit: args.number("limit", 1..=MAX_ROWS)?.unwrap_or(ROWS),
    };
    args.finish().map(|()| Command::HistoryList(query))
}

pub(super) fn inspect(_: &str, mut args: Args, _: Defaults) -> Result<Command, Error> {
    let given = args.next_text("record")?;
    args.finish()?;
    match given.parse() {
        Ok(id) if id <= MAX => Ok(Command::HistoryInspect(id)),
        _ => {
            let message = format!("{given} is not the number of a record");
            Err(Error::new(Code::BadArgument, message).with("argument", "record"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::time_limits::TimeLimits;
    use crate::wire::Request;

    const DEFAULTS: Defaults = Defaults { vcpus: 1, memory_mib: 512, time_limits: TimeLimits::NONE };

    #[test]
    fn filters_are_checked() {
        let of = |request| Command::of(request, DEFAULTS);
        let list = || Request::new("1", "history.list");
        assert!(of(list().set("kind", "shell")).unwrap_err().is(Code::BadArgument));
        assert!(of(list().set("state", "done")).unwrap_err().is(Code::BadArgument));
        assert!(of(list().set("limit", 1001)).unwrap_err().is(Code::OutOfRange));
        assert!(of(list().set("stdout", "x")).unwrap_err().is(Code::UnknownArgument));
        let query = HistoryQuery { is_code: Some(true), limit: 5, ..HistoryQuery::default() };
        assert_eq!(of(list().set("kind", "code").set("limit", 5)), Ok(Command::HistoryList(query)));
        let inspect = |id: &str| of(Request::new("1", "history.inspect").arg(id));
        assert_eq!(inspect("7"), Ok(Command::HistoryInspect(7)));
        assert!(inspect("-1").unwrap_err().is(Code::BadArgument) && inspect("x").unwrap_err().is(Code::BadArgument));
    }
}
