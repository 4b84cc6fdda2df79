//! What the node speaks with that is not part of it, and whether that is there. Today that is what its sentinel sends to:
//! the sentinel is asked, off the loop, by a guarded call. An external that is away leaves the node serving; it is named.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::supervisor::{Done, Supervisor, Timer};
use crate::outbound::{Answered, BreakerState, Guard, Policy};
use crate::sentinel;
use crate::wire::Fields;

/// How often the sentinel is asked while nobody waits for its word.
const LOOK: Duration = Duration::from_secs(10);
/// How often while somebody does, and how long at most.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
const PATIENCE: Duration = Duration::from_secs(5);
/// Longest answer of the sentinel that is read, and most destinations that are shown.
const MAX_ANSWER: u64 = 1 << 20;
const MAX_SHOWN: usize = 256;

/// One external as it was seen last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct External {
    pub name: String,
    /// A breaker's state, or `paused`.
    pub state: String,
    pub error: Option<String>,
    /// Samples that it has not got yet.
    pub pending: u64,
}

impl External {
    fn is_there(&self) -> bool {
        self.state == BreakerState::Closed.as_str()
    }
}

/// The externals of the node.
#[derive(Debug)]
pub(super) struct Externals {
    /// The sentinel's socket, where there is a sentinel.
    socket: Option<PathBuf>,
    guard: Guard,
    seen: Vec<External>,
    asking: bool,
    /// Somebody waits for everything to be sent, since then.
    flushing: Option<Instant>,
    /// What they are told.
    flushed: Option<&'static str>,
}

impl Externals {
    /// `socket` is the sentinel's, where there is one.
    pub fn new(socket: Option<PathBuf>) -> Self {
        let policy = Policy { deadline: Duration::from_secs(2), ..Policy::default() };
        let guard = Guard::new(policy, u64::from(std::process::id()));
        Self { socket, guard, seen: Vec::new(), asking: false, flushing: None, flushed: None }
    }

    /// Fields of `node.info`: each external with its state, and each that is away with why.
    pub fn fields(&self, mut fields: Fields) -> Fields {
        if self.socket.is_none() {
            return fields;
        }
        fields = fields.with("external", format!("sentinel:{}", self.guard.state()));
        for external in &self.seen {
            fields = fields.with("external", format!("{}:{}", external.name, external.state));
        }
        if self.guard.state() != BreakerState::Closed {
            fields = fields.with("away", "sentinel");
        }
        for external in self.seen.iter().filter(|external| !external.is_there()) {
            let why = external.error.as_deref().unwrap_or("no answer");
            fields = fields.with("away", format!("{}: {why}", external.name));
        }
        fields
    }
}

impl Supervisor {
    /// Begins to look after them.
    pub(super) fn start_externals(&mut self) {
        if self.externals.socket.is_some() {
            self.timers.after(LOOK_AGAIN, Timer::Externals);
        }
    }

    /// Time to ask again.
    pub(super) fn externals_due(&mut self) {
        self.timers.after(LOOK, Timer::Externals);
        self.ask_sentinel();
    }

    /// Time to ask again, while somebody waits for everything to be sent.
    pub(super) fn flush_due(&mut self) {
        if self.externals.flushing.is_some() {
            self.timers.after(LOOK_AGAIN, Timer::FlushExternals);
            self.ask_sentinel();
        }
    }

    fn ask_sentinel(&mut self) {
        let Some(socket) = self.externals.socket.clone().filter(|_| !self.externals.asking) else { return };
        let Ok(deadline) = self.externals.guard.admit(Instant::now()) else { return };
        let started = self.background.run("externals", move || Done::Externals(ask(&socket, deadline)));
        match started {
            Ok(()) => self.externals.asking = true,
            Err(e) => self.externals_seen(Err(e)),
        }
    }

    /// The sentinel has answered, or has not.
    pub(super) fn externals_seen(&mut self, result: io::Result<Vec<External>>) {
        let externals = &mut self.externals;
        externals.asking = false;
        let answered = if result.is_ok() { Answered::Reached } else { Answered::Failed(None) };
        externals.guard.note(Instant::now(), answered);
        let sent = result.as_ref().map(|seen| seen.iter().all(|external| external.pending == 0));
        if let Some(since) = externals.flushing {
            externals.flushed = match sent {
                Ok(true) => Some("flushed"),
                _ if since.elapsed() < PATIENCE => None,
                Ok(false) => Some("behind"),
                Err(_) => Some("away"),
            };
            if externals.flushed.is_some() {
                externals.flushing = None;
            }
        }
        match result {
            Ok(seen) => {
                for new in seen.iter().filter(|new| !new.is_there()) {
                    if externals.seen.iter().all(|old| old.name != new.name || old.is_there()) {
                        log::warn!("external {} is away: {}", new.name, new.error.as_deref().unwrap_or("no answer"));
                    }
                }
                externals.seen = seen;
            }
            Err(e) => log::debug!("the sentinel does not answer: {e}"),
        }
    }

    /// Asks the sentinel whether everything is sent; `sentinel_flushed` has the answer in time.
    pub(super) fn flush_sentinel(&mut self) {
        if self.externals.socket.is_none() {
            self.externals.flushed = Some("none");
            return;
        }
        self.externals.flushed = None;
        if self.externals.flushing.replace(Instant::now()).is_none() {
            self.flush_due();
        }
    }

    /// `none`: there is no sentinel; `flushed`: everything is sent; `behind`: not in time; `away`: it does not answer.
    pub(super) fn sentinel_flushed(&mut self) -> Option<&'static str> {
        let externals = &mut self.externals;
        // With its breaker open it is not asked at all.
        if externals.flushing.is_some_and(|since| since.elapsed() > 2 * PATIENCE) {
            (externals.flushing, externals.flushed) = (None, Some("away"));
        }
        externals.flushed
    }
}

/// Asks the sentinel how its destinations are.
fn ask(socket: &Path, deadline: Instant) -> io::Result<Vec<External>> {
    let line = sentinel::ask(socket, "status", deadline, MAX_ANSWER)?;
    parse(&line).ok_or_else(|| io::Error::new(ErrorKind::InvalidData, "the sentinel's status cannot be read"))
}

fn parse(line: &str) -> Option<Vec<External>> {
    let status: serde_json::Value = serde_json::from_str(line).ok()?;
    let text = |value: &serde_json::Value| value.as_str().map(str::to_string);
    let mut seen = Vec::new();
    for target in status["targets"].as_array()?.iter().take(MAX_SHOWN) {
        let paused = target["paused"].as_bool() == Some(true);
        seen.push(External {
            name: text(&target["name"])?,
            state: if paused { "paused".to_string() } else { text(&target["breaker"])? },
            error: text(&target["error"]),
            pending: target["pending"].as_u64().unwrap_or(0),
        });
    }
    if let Some(core) = status["core"].as_object() {
        let state = text(core.get("breaker")?)?;
        seen.push(External { name: "core".to_string(), state, error: core.get("error").and_then(text), pending: 0 });
    }
    Some(seen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_away_is_named_with_its_reason() {
        let status = r#"{"targets":[
            {"name":"metrics","breaker":"open","paused":false,"pending":7,"error":"cannot connect"},
            {"name":"archive","breaker":"closed","paused":true,"pending":0,"error":"status 401"},
            {"name":"fine","breaker":"closed","paused":false,"pending":0,"error":null}],
            "core":{"registered":true,"breaker":"closed","error":null}}"#;
        let mut externals = Externals::new(Some("/nowhere".into()));
        externals.seen = parse(status).expect("a status");
        let fields = externals.fields(Fields::new());
        let all = |key: &str| -> Vec<String> {
            let pairs = fields.0.iter().filter(|(name, _)| name == key);
            pairs.map(|(_, value)| String::from_utf8_lossy(value).into_owned()).collect()
        };
        assert_eq!(
            all("external"),
            ["sentinel:closed", "metrics:open", "archive:paused", "fine:closed", "core:closed"]
        );
        assert_eq!(all("away"), ["metrics: cannot connect", "archive: status 401"]);
        assert_eq!(externals.seen[0].pending, 7);
    }

    #[test]
    fn a_status_that_is_none_is_an_error() {
        for line in ["", "{}", "[]", r#"{"targets":[{"name":1}]}"#, r#"{"targets":[{"name":"a"}]}"#] {
            assert_eq!(parse(line), None, "{line}");
        }
    }

    #[test]
    fn without_a_sentinel_there_is_nothing_to_say() {
        assert_eq!(Externals::new(None).fields(Fields::new()), Fields::new());
    }
}
