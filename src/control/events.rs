//! Which events a client watches: `events.watch`.

use super::command::Command;
use crate::sandbox::id::check_name;
use crate::sandbox::spec::Defaults;
use crate::wire::{Args, Error};

/// What the events of a watch have in common.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EventQuery {
    /// Only those after this number.
    pub after: Option<u64>,
    /// Whose.
    pub owner: Option<String>,
    /// Of which sandbox.
    pub sandbox: Option<String>,
    /// `sandbox`, `exec`, or one kind as it is written.
    pub kind: Option<String>,
    /// Goes on with those to come.
    pub follow: bool,
}

pub(super) fn watch(_: &str, mut args: Args, _: Defaults) -> Result<Command, Error> {
    let owner = args.text("owner")?;
    owner.iter().try_for_each(|owner| check_name("owner", owner))?;
    let query = EventQuery {
        after: args.number("after", 0..=i64::MAX as u64)?,
        owner,
        sandbox: args.text("sandbox")?,
        kind: args.text("kind")?,
        follow: args.flag("follow")?,
    };
    args.finish().map(|()| Command::EventsWatch(query))
}
