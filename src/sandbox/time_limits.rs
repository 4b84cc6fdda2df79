//! How long a sandbox may be there, by three clocks, and what becomes of it when its time is over.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use crate::wire::{Args, Code, Error, Fields};

/// Least and most seconds of a limit: a year at most.
pub const SECONDS: RangeInclusive<u64> = 1..=366 * 24 * 3600;

/// What a request writes for no limit.
const NONE: &str = "none";

/// What becomes of a sandbox whose time is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AtEnd {
    /// It is stopped.
    Stop,
    /// It is paused: whoever resumes it finds it as it was.
    Pause,
}

impl AtEnd {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Pause => "pause",
        }
    }
}

/// A limit, written `SECONDS[:stop|pause]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimeLimit {
    /// In `SECONDS`.
    pub seconds: u64,
    /// What becomes of the sandbox then; it is stopped where nothing is said.
    pub at_end: AtEnd,
}

impl fmt::Display for TimeLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.seconds, self.at_end.as_str())
    }
}

impl FromStr for TimeLimit {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let (seconds, at_end) = match text.split_once(':') {
            None => (text, AtEnd::Stop),
            Some((seconds, "stop")) => (seconds, AtEnd::Stop),
            Some((seconds, "pause")) => (seconds, AtEnd::Pause),
            Some(_) => return Err(malformed(text)),
        };
        if seconds.is_empty() || !seconds.bytes().all(|octet| octet.is_ascii_digit()) {
            return Err(malformed(text));
        }
        match seconds.parse().ok().filter(|seconds| SECONDS.contains(seconds)) {
            Some(seconds) => Ok(Self { seconds, at_end }),
            None => {
                let (min, max) = (SECONDS.start(), SECONDS.end());
                let message = format!("a time limit of {seconds} s is out of range: {min} to {max}");
                Err(Error::new(Code::OutOfRange, message).with("min", min).with("max", max))
            }
        }
    }
}

fn malformed(text: &str) -> Error {
    let message = format!("{} is no time limit: SECONDS, SECONDS:stop, SECONDS:pause or none", text.escape_debug());
    Error::new(Code::BadArgument, message)
}

/// Which clock a limit goes by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// From its creation, or from when the limit was last changed.
    Ttl,
    /// From when a client last used it.
    Idle,
    /// From its creation, whatever happens.
    Lifetime,
}

impl Clock {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Ttl, Self::Idle, Self::Lifetime];

    /// The key of its limit in requests, replies and the configuration.
    pub const fn key(self) -> &'static str {
        match self {
            Self::Ttl => "ttl",
            Self::Idle => "idle_timeout",
            Self::Lifetime => "max_lifetime",
        }
    }

    /// Why a sandbox ended whose time by this clock was over.
    pub fn reason(self, limit: TimeLimit) -> String {
        let seconds = limit.seconds;
        match self {
            Self::Ttl => format!("ttl: its {seconds} s are over"),
            Self::Idle => format!("idle-timeout: nobody used it for {seconds} s"),
            Self::Lifetime => format!("max-lifetime: its {seconds} s are over"),
        }
    }
}

/// A limit that is to hold by a clock from now on, or none.
pub type Change = (Clock, Option<TimeLimit>);

/// Takes the limits that a request names from its arguments.
///
/// # Errors
/// `BAD_ARGUMENT` and `OUT_OF_RANGE`, with the argument's name.
pub fn take(args: &mut Args) -> Result<Vec<Change>, Error> {
    let mut changes = Vec::new();
    for clock in Clock::ALL {
        if let Some(text) = args.text(clock.key())? {
            changes.push((clock, parse(&text).map_err(|error| error.with("argument", clock.key()))?));
        }
    }
    Ok(changes)
}

/// Reads a limit, or `none`.
///
/// # Errors
/// `BAD_ARGUMENT` and `OUT_OF_RANGE`.
pub fn parse(text: &str) -> Result<Option<TimeLimit>, Error> {
    if text == NONE { Ok(None) } else { text.parse().map(Some) }
}

/// The limits of a sandbox; without one it may be there for ever.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TimeLimits([Option<TimeLimit>; 3]);

impl TimeLimits {
    /// It may be there for ever.
    pub const NONE: Self = Self([None; 3]);

    /// The limit by a clock.
    pub fn get(&self, clock: Clock) -> Option<TimeLimit> {
        self.0[clock as usize]
    }

    /// Whether a sandbox is paused by any of them.
    pub fn may_pause(&self) -> bool {
        self.0.iter().flatten().any(|limit| limit.at_end == AtEnd::Pause)
    }

    /// The limits with some of them changed.
    pub fn with(mut self, changes: &[Change]) -> Self {
        changes.iter().for_each(|(clock, limit)| self.0[*clock as usize] = *limit);
        self
    }

    /// The limits as fields of a reply.
    pub fn fields(&self, fields: Fields) -> Fields {
        Clock::ALL.into_iter().fold(fields, |fields, clock| match self.get(clock) {
            Some(limit) => fields.with(clock.key(), limit),
            None => fields.with(clock.key(), NONE),
        })
    }
}

/// As the database keeps them: those that there are, `ttl=600:stop idle_timeout=60:pause`.
impl fmt::Display for TimeLimits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let limits = Clock::ALL.into_iter().filter_map(|clock| Some((clock.key(), self.get(clock)?)));
        for (at, (key, limit)) in limits.enumerate() {
            write!(f, "{}{key}={limit}", if at > 0 { " " } else { "" })?;
        }
        Ok(())
    }
}

impl FromStr for TimeLimits {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        text.split_ascii_whitespace().try_fold(Self::default(), |limits, word| {
            let (key, limit) = word.split_once('=').ok_or_else(|| malformed(word))?;
            let clock = Clock::ALL.into_iter().find(|clock| clock.key() == key).ok_or_else(|| malformed(word))?;
            Ok(limits.with(&[(clock, Some(limit.parse()?))]))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Request;

    #[test]
    fn limits_are_written_as_they_are_read() {
        for (text, written) in [("1", "1:stop"), ("600:stop", "600:stop"), ("31622400:pause", "31622400:pause")] {
            assert_eq!(text.parse::<TimeLimit>().expect(text).to_string(), written);
        }
        let limits = "ttl=600:pause max_lifetime=7:stop".parse::<TimeLimits>().expect("two of three");
        assert_eq!(limits.to_string(), "ttl=600:pause max_lifetime=7:stop");
        assert!(limits.may_pause() && limits.get(Clock::Idle).is_none());
        assert_eq!("".parse::<TimeLimits>().expect("none"), TimeLimits::default());
        for text in ["x", "ttl", "life=3", "ttl=0"] {
            assert!(text.parse::<TimeLimits>().is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_no_limit_is_refused_by_name() {
        for text in ["", ":pause", "5:", "5:kill", "5s", "-5", "+5", "5:pause:stop", "5 "] {
            assert!(text.parse::<TimeLimit>().expect_err(text).is(Code::BadArgument), "{text}");
        }
        for text in ["0", "31622401", "99999999999999999999999"] {
            let error = text.parse::<TimeLimit>().expect_err(text);
            assert!(error.is(Code::OutOfRange) && error.message.contains(text), "{error}");
            assert_eq!((error.fields.get("min"), error.fields.get("max")), (Some("1"), Some("31622400")));
        }
    }

    #[test]
    fn a_request_changes_what_it_names() {
        let before: TimeLimits = "ttl=600:stop idle_timeout=60:pause".parse().expect("limits");
        let request = Request::new("1", "sandbox.update").set("ttl", "none").set("max_lifetime", "9");
        let after = before.with(&take(&mut Args::of(request)).expect("limits"));
        assert_eq!(after.to_string(), "idle_timeout=60:pause max_lifetime=9:stop");
        let error = take(&mut Args::of(Request::new("1", "x").set("idle_timeout", "0"))).expect_err("zero");
        assert_eq!(error.fields.get("argument"), Some("idle_timeout"));
    }
}
