//! What a create or an execution spends its time on: spans since it was asked for, of which some may be at the same time.

use std::borrow::Cow;
use std::time::Instant;

use crate::wire::{Error, Fields};

/// Longest reason that a span keeps, in characters.
const MAX_ERROR: usize = 512;

/// One part of the work.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct Span {
    name: Cow<'static, str>,
    /// Microseconds after the request.
    start_us: u64,
    /// `None` while it goes on.
    end_us: Option<u64>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl Span {
    fn duration_us(&self) -> Option<u64> {
        self.end_us.map(|end| end.saturating_sub(self.start_us))
    }
}

/// The spans of one create or execution.
#[derive(Debug, Clone)]
pub struct Trace {
    asked: Instant,
    spans: Vec<Span>,
    /// Nothing more is to come.
    closed: bool,
}

impl Trace {
    /// Of what was asked for at that time.
    pub fn since(asked: Instant) -> Self {
        Self { asked, spans: Vec::new(), closed: false }
    }

    /// As [`Trace::text`] wrote it, by an earlier supervisor perhaps; empty where it is no such text.
    pub fn parse(text: &str) -> Self {
        Self { asked: Instant::now(), spans: serde_json::from_str(text).unwrap_or_default(), closed: true }
    }

    fn now_us(&self) -> u64 {
        u64::try_from(self.asked.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// A span begins, unless it has before.
    pub fn begin(&mut self, name: &'static str) {
        if !self.closed && self.spans.iter().all(|span| span.name != name) {
            let start_us = self.now_us();
            self.spans.push(Span { name: Cow::Borrowed(name), start_us, end_us: None, error: None });
        }
    }

    /// The first span, which began with the request.
    pub fn begin_at_once(&mut self, name: &'static str) {
        self.spans.push(Span { name: Cow::Borrowed(name), start_us: 0, end_us: None, error: None });
    }

    fn end_those(&mut self, which: impl Fn(&Span) -> bool) {
        let now = self.now_us();
        let open = self.spans.iter_mut().filter(|span| span.end_us.is_none() && which(span));
        open.for_each(|span| span.end_us = Some(now));
    }

    /// A span ends, if it is going on.
    pub fn end(&mut self, name: &str) {
        self.end_those(|span| span.name == name);
    }

    /// All that is going on ends, and a span begins.
    pub fn next(&mut self, name: &'static str) {
        if !self.closed {
            self.end_those(|_| true);
            self.begin(name);
        }
    }

    /// All is done.
    pub fn close(&mut self) {
        self.end_those(|_| true);
        self.closed = true;
    }

    /// It failed, in the span of that name where one is going on, else in the one that began last.
    pub fn fail(&mut self, name: Option<&str>, error: &Error) {
        let at = |span: &Span| span.end_us.is_none() && name.is_none_or(|name| span.name == name);
        let failed = self.spans.iter().rposition(at).or_else(|| self.spans.len().checked_sub(1));
        if let Some(span) = failed.filter(|_| !self.closed).and_then(|at| self.spans.get_mut(at)) {
            span.error = Some(error.to_string().chars().take(MAX_ERROR).collect());
        }
        self.close();
    }

    /// As it is kept in the database; empty where there is nothing.
    pub fn text(&self) -> String {
        if self.spans.is_empty() { String::new() } else { serde_json::to_string(&self.spans).unwrap_or_default() }
    }

    /// The spans as clients see them: those that go on have no duration.
    pub fn rows(&self) -> impl Iterator<Item = Fields> {
        self.spans.iter().map(|span| {
            let mut fields = Fields::new().with("span", &*span.name).with("start_us", span.start_us);
            if let Some(duration) = span.duration_us() {
                fields = fields.with("duration_us", duration);
            }
            span.error.iter().fold(fields, |fields, error| fields.with("error", error))
        })
    }

    /// All of it: how long it took so far, which span was the slowest, which failed.
    pub fn summary(&self) -> Fields {
        let end = |span: &Span| span.end_us.unwrap_or_else(|| if self.closed { span.start_us } else { self.now_us() });
        let mut fields = Fields::new().with("total_us", self.spans.iter().map(end).max().unwrap_or(0));
        let slowest = self.spans.iter().max_by_key(|span| end(span).saturating_sub(span.start_us));
        let failed = self.spans.iter().find(|span| span.error.is_some());
        for (key, span) in [("slowest", slowest), ("failed", failed)] {
            fields = span.iter().fold(fields, |fields, span| fields.with(key, &*span.name));
        }
        fields
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Code;

    fn names(trace: &Trace) -> Vec<String> {
        trace.rows().map(|row| row.get("span").unwrap_or_default().to_string()).collect()
    }

    #[test]
    fn spans_follow_each_other_overlap_and_are_kept() {
        let mut trace = Trace::since(Instant::now());
        trace.next("validate");
        trace.next("admit");
        trace.end("admit");
        for name in ["network", "storage", "network"] {
            trace.begin(name);
        }
        trace.end("network");
        std::thread::sleep(std::time::Duration::from_millis(2));
        assert_eq!(trace.rows().filter(|row| row.get("duration_us").is_none()).count(), 1, "storage goes on");
        trace.next("vm");
        trace.close();
        trace.next("late");
        assert_eq!(names(&trace), ["validate", "admit", "network", "storage", "vm"]);
        let summary = trace.summary();
        assert_eq!((summary.get("slowest"), summary.get("failed")), (Some("storage"), None));
        let kept = Trace::parse(&trace.text());
        assert_eq!(kept.rows().collect::<Vec<_>>(), trace.rows().collect::<Vec<_>>());
        assert_eq!(kept.summary(), summary);
    }

    #[test]
    fn the_span_that_failed_has_the_error() {
        let error = Error::new(Code::NoCapacity, "all 4 slots are taken");
        let of = |blamed| {
            let mut trace = Trace::since(Instant::now());
            trace.begin("network");
            trace.begin("storage");
            trace.fail(blamed, &error);
            (trace.summary().get("failed").unwrap_or_default().to_string(), trace)
        };
        assert_eq!(of(Some("network")).0, "network");
        assert_eq!(of(Some("boot")).0, "storage");
        let (failed, trace) = of(None);
        assert_eq!(failed, "storage");
        let row = trace.rows().nth(1).expect("two");
        assert!(row.get("error").is_some_and(|said| said.contains("all 4 slots")), "{row:?}");
    }

    #[test]
    fn what_is_no_trace_is_none() {
        for text in ["", "x", "[1]", "{}", "[{\"name\":1}]"] {
            let trace = Trace::parse(text);
            assert_eq!((trace.rows().count(), trace.summary().get("total_us")), (0, Some("0")), "{text}");
        }
    }
}
