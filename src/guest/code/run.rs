//! One execution of code: from its source, over a context's process, to its answer.

use std::time::{Duration, Instant};

use super::artifacts::Moment;
use super::context::{Measure, Start};
use crate::wire::{Code, Error, Fields};

/// Octets of source at most.
pub(super) const SOURCE_MAX: usize = 1024 * 1024;

/// Where a run stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Its source is on the way.
    Source,
    /// It waits for its context.
    Pending,
    /// It runs.
    Running,
    /// It has ended; its output is being read.
    Settling,
    /// The files that it made are being looked for.
    Looking,
}

/// How a run ended.
#[derive(Debug, Clone)]
pub(crate) enum How {
    /// The runner says so.
    Done(u8),
    /// Its process ended; what waitpid(2) gave.
    Exit(libc::c_int),
}

/// A run.
#[derive(Debug)]
pub(crate) struct Run {
    pub language: String,
    /// In which context.
    pub context: Option<u64>,
    /// Of a run that has a context of its own.
    pub start: Option<Start>,
    pub source: Vec<u8>,
    pub timeout: Duration,
    pub stage: Stage,
    /// What the link was told last.
    pub announced: Option<&'static str>,
    /// Nobody waits for it any more.
    pub cancelled: bool,
    pub timed_out: bool,
    /// When it began, by both clocks, and what its context had used by then.
    pub began: Option<(Instant, Moment, Measure)>,
    /// How it ended, after how long, and what the context had used by then.
    pub ended: Option<(How, Duration, Measure)>,
}

impl Run {
    /// A run whose source is to come.
    pub(super) fn new(language: String, context: Option<u64>, start: Option<Start>, timeout: Duration) -> Self {
        Self {
            language,
            context,
            start,
            source: Vec::new(),
            timeout,
            stage: Stage::Source,
            announced: None,
            cancelled: false,
            timed_out: false,
            began: None,
            ended: None,
        }
    }

    /// What is to be told of where it stands, where that is news.
    pub(crate) fn announce(&mut self) -> Option<Fields> {
        let state = match self.stage {
            Stage::Source | Stage::Pending => "pending",
            Stage::Running | Stage::Settling | Stage::Looking => "running",
        };
        if self.announced == Some(state) {
            return None;
        }
        self.announced = Some(state);
        Some(Fields::new().with("state", state).with("language", &self.language))
    }

    /// Takes a piece of the source.
    pub(super) fn take(&mut self, piece: &[u8]) -> Result<(), Error> {
        if self.stage != Stage::Source {
            return Err(Error::new(Code::BadArgument, "the source has ended already").with("channel", "source"));
        }
        if self.source.len() + piece.len() > SOURCE_MAX {
            let message = format!("the source has more than {SOURCE_MAX} octets, which is the limit");
            return Err(Error::new(Code::SourceTooLarge, message).with("max", SOURCE_MAX));
        }
        self.source.extend_from_slice(piece);
        Ok(())
    }

    /// Checks the source once it is whole.
    pub(super) fn check(&self) -> Result<(), Error> {
        let bad = |what: &str, at: usize| {
            let error = Error::new(Code::BadArgument, format!("the source has {what} at octet {at}"));
            Err(error.with("argument", "source").with("octet", at))
        };
        if let Some(at) = self.source.iter().position(|&octet| octet == 0) {
            return bad("a NUL", at);
        }
        match std::str::from_utf8(&self.source) {
            Ok(_) => Ok(()),
            Err(error) => bad("what is not UTF-8", error.valid_up_to()),
        }
    }

    /// The answer, once it has ended. `gone`: its context ended with it; `complete`: all its files were looked at.
    pub(super) fn answer(&self, limits: Limits, gone: bool, complete: bool) -> Result<Fields, Error> {
        let Some((how, took, after)) = &self.ended else {
            return Err(Error::new(Code::Internal, "a run was answered before its end"));
        };
        let (exit, signal) = match *how {
            How::Done(exit) => (i32::from(exit), None),
            How::Exit(status) if libc::WIFSIGNALED(status) => {
                (128 + libc::WTERMSIG(status), Some(libc::WTERMSIG(status)))
            }
            How::Exit(status) => (libc::WEXITSTATUS(status), None),
        };
        let before = self.began.as_ref().map(|(_, _, measure)| measure.clone()).unwrap_or_default();
        let used = after.since(&before);
        let mut fields = Fields::new();
        if let Some(signal) = signal {
            fields = fields.with("signal", signal);
        }
        fields = fields
            .with("cpu_ms", used.cpu_us.div_ceil(1000))
            .with("wall_ms", took.as_millis())
            .with("peak_kib", used.peak_kib);
        for (key, count) in [("network_refused", used.network), ("processes_refused", used.tasks)] {
            if count > 0 {
                fields = fields.with(key, count);
            }
        }
        if gone && self.start.is_none() {
            fields = fields.with("context_ended", true);
        }
        if !complete {
            fields = fields.with("artifacts", "incomplete");
        }
        let refused = |code: Code, message: String, key: &str, value: u64| {
            let error = Error::new(code, message).with(key, value).with("exit", exit);
            Err(Error { fields: error.fields.and(fields.clone()), ..error })
        };
        if self.timed_out {
            let ms = self.timeout.as_millis() as u64;
            return refused(Code::Timeout, format!("the run took longer than {ms} ms"), "timeout_ms", ms);
        }
        if used.ran_out {
            let mib = limits.memory_mib;
            return refused(Code::OutOfMemory, format!("the run used more than {mib} MiB"), "memory_mib", mib);
        }
        if exit != 0 && used.network > 0 {
            let message = "the run failed, and needed a network, which it has only with network=on".to_string();
            return refused(Code::NetworkOff, message, "refused", used.network);
        }
        if exit != 0 && used.tasks > 0 {
            let message = format!("the run failed, and needed more than {} processes and threads", limits.tasks);
            return refused(Code::TooManyProcesses, message, "max", limits.tasks);
        }
        Ok(Fields::new().with("exit", exit).and(fields))
    }
}

/// The bounds that a run had.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub memory_mib: u64,
    pub tasks: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { memory_mib: 512, tasks: 256 };

    fn run() -> Run {
        Run::new("python".to_string(), Some(1), None, Duration::from_secs(30))
    }

    fn ended(how: How, measure: Measure) -> Run {
        let mut run = run();
        run.ended = Some((how, Duration::from_millis(5), measure));
        run
    }

    #[test]
    fn the_source_is_bounded_to_the_octet() {
        let mut run = run();
        run.take(&vec![b'x'; SOURCE_MAX]).unwrap();
        let error = run.take(b"x").unwrap_err();
        assert!(error.is(Code::SourceTooLarge) && error.fields.number("max") == Some(SOURCE_MAX as u64), "{error}");
        run.check().unwrap();
    }

    #[test]
    fn nul_and_what_is_not_utf_8_are_named_by_their_place() {
        for (source, at) in [(&b"ab\0c"[..], "2"), (b"abc\xff", "3"), (b"\xc3", "0")] {
            let mut run = run();
            run.take(source).unwrap();
            let error = run.check().unwrap_err();
            assert!(error.is(Code::BadArgument) && error.fields.get("octet") == Some(at), "{error}");
        }
    }

    #[test]
    fn each_limit_has_an_error_of_its_own() {
        let measure = |ran_out, network, tasks| Measure { ran_out, network, tasks, ..Measure::default() };
        let killed = How::Exit(libc::SIGKILL);
        let code = |run: &Run| run.answer(LIMITS, false, true).map_err(|error| error.code);
        assert_eq!(code(&ended(killed.clone(), measure(true, 0, 0))), Err("OUT_OF_MEMORY".to_string()));
        assert_eq!(code(&ended(How::Done(1), measure(false, 1, 0))), Err("NETWORK_OFF".to_string()));
        assert_eq!(code(&ended(How::Done(1), measure(false, 0, 1))), Err("TOO_MANY_PROCESSES".to_string()));
        let late = Run { timed_out: true, ..ended(killed, measure(false, 1, 1)) };
        assert_eq!(code(&late), Err("TIMEOUT".to_string()));
    }

    #[test]
    fn code_that_copes_with_a_refusal_is_completed_and_the_refusal_counted() {
        let measure = Measure { network: 2, ..Measure::default() };
        let fields = ended(How::Done(0), measure).answer(LIMITS, false, true).unwrap();
        assert_eq!((fields.get("exit"), fields.get("network_refused")), (Some("0"), Some("2")));
    }

    #[test]
    fn a_state_is_told_once() {
        let mut run = run();
        assert!(run.announce().is_some() && run.announce().is_none());
        run.stage = Stage::Running;
        assert_eq!(run.announce().unwrap().get("state"), Some("running"));
    }
}
