//! Prometheus text (exposition format 0.0.4) and OpenMetrics 1.0 text.
//!
//! [`lines`] finds each sample's series without taking it apart: a scrape that knows the series from last time needs no
//! more. [`series`] takes a series apart when it is new.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;

use crate::sentinel::model::{Kind, MAX_LABELS};

/// One line that means something.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Line<'a> {
    /// A value.
    Sample {
        /// Name and labels as they stand: `name{a="b"}`.
        series: &'a str,
        /// Any float.
        value: f64,
        /// Milliseconds since 1970-01-01 UTC, where the line has a time.
        timestamp_ms: Option<i64>,
    },
    /// `# TYPE name kind`
    Type {
        /// Of the family.
        name: &'a str,
        /// What its values mean.
        kind: Kind,
    },
    /// `# EOF`: OpenMetrics ends with it, and a body without it was cut.
    Eof,
}

/// What is wrong with a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LineError {
    /// No name, or labels that do not end.
    Series,
    /// A value that is no number.
    Value,
    /// A time that is no number.
    Timestamp,
    /// Something follows that is no exemplar.
    Rest,
}

impl fmt::Display for LineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Series => "a series that has no name or no end",
            Self::Value => "a value that is no number",
            Self::Timestamp => "a time that is no number",
            Self::Rest => "something after the value",
        })
    }
}

/// The meaningful lines of a body. `openmetrics` says that times are in seconds.
pub fn lines(body: &str, openmetrics: bool) -> impl Iterator<Item = Result<Line<'_>, LineError>> {
    body.split('\n').filter_map(move |raw| line(raw, openmetrics, None))
}

/// The series that is expected at a place: what it shares with the beginning of another text, and how it goes on.
#[derive(Debug, Clone, Copy)]
pub struct Expected<'a> {
    /// What it begins with.
    pub shared: &'a str,
    /// The rest of it.
    pub rest: &'a str,
}

impl Expected<'_> {
    /// Whether a text is this one.
    pub fn is(&self, text: &str) -> bool {
        text.len() == self.shared.len() + self.rest.len() && self.begins(text).is_some()
    }

    /// How long it is, where a line begins with it.
    fn begins(&self, line: &str) -> Option<usize> {
        let after = line.as_bytes().strip_prefix(self.shared.as_bytes())?;
        after.starts_with(self.rest.as_bytes()).then_some(self.shared.len() + self.rest.len())
    }
}

/// One line of a body, where it is a meaningful one. Where it begins with the series that is `expected` here, it is not
/// searched for the end of its series: that is half of the work.
pub fn line<'a>(
    raw: &'a str,
    openmetrics: bool,
    expected: Option<Expected<'_>>,
) -> Option<Result<Line<'a>, LineError>> {
    if let Some(known) = expected.and_then(|expected| known(raw, expected)) {
        return Some(Ok(known));
    }
    let line = raw.strip_suffix('\r').unwrap_or(raw).trim_matches([' ', '\t']);
    match line.as_bytes().first()? {
        b'#' => comment(line).map(Ok),
        _ => {
            let after = expected.and_then(|expected| expected.begins(line));
            let end = after.filter(|&at| matches!(line.as_bytes().get(at), Some(b' ' | b'\t')));
            Some(sample(line, end, openmetrics))
        }
    }
}

/// What nearly every line of a target that was scraped before is: the series that is expected, a blank, a number. Anything
/// else is for the slower way to judge.
fn known<'a>(raw: &'a str, expected: Expected<'_>) -> Option<Line<'a>> {
    let end = expected.begins(raw)?;
    let (series, word) = (raw.get(..end)?, raw.get(end..)?.strip_prefix(' ')?);
    // A series never begins with a blank or a `#`, so nothing before it was passed over.
    if matches!(series.as_bytes().first()?, b' ' | b'\t' | b'#') || word.bytes().any(|octet| octet <= b' ') {
        return None;
    }
    let value = number(word)?;
    Some(Line::Sample { series, value, timestamp_ms: None })
}

fn comment(line: &str) -> Option<Line<'_>> {
    let mut words = line[1..].split_ascii_whitespace();
    match words.next()? {
        "EOF" => Some(Line::Eof),
        "TYPE" => {
            let name = words.next()?;
            let kind = match words.next()? {
                "counter" => Kind::Counter,
                "gauge" | "info" | "stateset" => Kind::Gauge,
                "histogram" | "gaugehistogram" => Kind::Histogram,
                "summary" => Kind::Summary,
                _ => Kind::Unknown,
            };
            Some(Line::Type { name, kind })
        }
        _ => None,
    }
}

/// `end`: where the series ends, if that is known.
fn sample(line: &str, end: Option<usize>, openmetrics: bool) -> Result<Line<'_>, LineError> {
    let end = end.or_else(|| series_end(line)).ok_or(LineError::Series)?;
    let (series, rest) = line.split_at(end);
    let mut words = rest.split_ascii_whitespace();
    let value = words.next().and_then(number).ok_or(LineError::Value)?;
    let mut timestamp_ms = None;
    match words.next() {
        None | Some("#") => {}
        Some(word) => {
            timestamp_ms = Some(time(word, openmetrics).ok_or(LineError::Timestamp)?);
            if words.next().is_some_and(|word| word != "#") {
                return Err(LineError::Rest);
            }
        }
    }
    Ok(Line::Sample { series, value, timestamp_ms })
}

fn number(word: &str) -> Option<f64> {
    // So many digits are exact in a float, and quicker read than a fraction that might come.
    if word.len() <= 15 && word.bytes().all(|octet| octet.is_ascii_digit()) {
        let read = |number: u64, octet: u8| number * 10 + u64::from(octet - b'0');
        return (!word.is_empty()).then(|| word.bytes().fold(0, read) as f64);
    }
    // Rust also takes `infinity`, which the formats do not have; nobody writes it.
    word.parse().ok()
}

fn time(word: &str, openmetrics: bool) -> Option<i64> {
    if !openmetrics {
        return word.parse().ok();
    }
    let ms = word.parse::<f64>().ok()? * 1000.0;
    // Beyond 2^53 milliseconds a float is no time any more.
    (ms.abs() < 9.0e15).then_some(ms.round() as i64)
}

/// Where the series ends: at the first blank outside of its labels.
fn series_end(line: &str) -> Option<usize> {
    let octets = line.as_bytes();
    let name_end = octets.iter().position(|octet| matches!(octet, b'{' | b' ' | b'\t'))?;
    if name_end == 0 {
        return None;
    }
    if octets[name_end] != b'{' {
        return Some(name_end);
    }
    let mut quoted = false;
    let mut escaped = false;
    for (at, octet) in octets.iter().enumerate().skip(name_end + 1) {
        match octet {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'}' if !quoted => return Some(at + 1),
            _ => {}
        }
    }
    None
}

/// A series taken apart: its name and its labels in the order in which they stand.
pub type Parts<'a> = (&'a str, Vec<(&'a str, Cow<'a, str>)>);

/// Takes a series apart, as [`lines`] found it.
pub fn series(raw: &str) -> Option<Parts<'_>> {
    let Some(open) = raw.find('{') else { return Some((raw, Vec::new())) };
    let (name, rest) = (&raw[..open], raw[open + 1..].strip_suffix('}')?);
    let mut labels = Vec::new();
    let mut rest = rest.trim_start_matches([' ', '\t']);
    while !rest.is_empty() {
        if labels.len() > MAX_LABELS {
            return None;
        }
        let (label, after) = rest.split_once('=')?;
        let after = after.trim_start_matches([' ', '\t']).strip_prefix('"')?;
        let mut escaped = false;
        let end = after.bytes().position(|octet| {
            let ends = octet == b'"' && !escaped;
            escaped = octet == b'\\' && !escaped;
            ends
        })?;
        labels.push((label.trim_matches([' ', '\t']), unescaped(&after[..end])));
        let after = after[end + 1..].trim_start_matches([' ', '\t']);
        rest = match after.strip_prefix(',') {
            Some(more) => more.trim_start_matches([' ', '\t']),
            None if after.is_empty() => after,
            None => return None,
        };
    }
    Some((name, labels))
}

fn unescaped(raw: &str) -> Cow<'_, str> {
    if !raw.contains('\\') {
        return Cow::Borrowed(raw);
    }
    let mut text = String::with_capacity(raw.len());
    let mut chars = raw.chars();
    while let Some(c) = chars.next() {
        match (c, c == '\\') {
            (_, true) => match chars.next() {
                Some('n') => text.push('\n'),
                Some(other @ ('\\' | '"')) => text.push(other),
                Some(other) => text.extend(['\\', other]),
                None => text.push('\\'),
            },
            (c, false) => text.push(c),
        }
    }
    Cow::Owned(text)
}

/// The kinds that a body has declared, for series that are new.
#[derive(Debug, Default)]
pub struct Kinds<'a>(HashMap<&'a str, Kind>);

impl<'a> Kinds<'a> {
    /// Takes a declaration.
    pub fn declare(&mut self, name: &'a str, kind: Kind) {
        self.0.insert(name, kind);
    }

    /// The kind of a series by its name: its own, or its family's.
    pub fn of(&self, name: &str) -> Kind {
        if let Some(kind) = self.0.get(name) {
            return *kind;
        }
        let family = ["_bucket", "_sum", "_count", "_total", "_created", "_info", "_gsum", "_gcount"]
            .iter()
            .find_map(|suffix| self.0.get(name.strip_suffix(suffix)?).map(|kind| (*kind, *suffix)));
        match family {
            Some((_, "_created")) => Kind::Gauge,
            Some((kind, _)) => kind,
            None => Kind::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: &str, openmetrics: bool) -> Vec<Result<Line<'_>, LineError>> {
        lines(body, openmetrics).collect()
    }

    fn plain(series: &str, value: f64, timestamp_ms: Option<i64>) -> Result<Line<'_>, LineError> {
        Ok(Line::Sample { series, value, timestamp_ms })
    }

    #[test]
    fn the_examples_of_the_formats_are_read() {
        let body = "# HELP http_requests_total The total number of HTTP requests.\n\
                    # TYPE http_requests_total counter\n\
                    http_requests_total{method=\"post\",code=\"200\"} 1027 1395066363000\n\n\
                    msdos_file_access_time_seconds{path=\"C:\\\\DIR\\\\FILE.TXT\",error=\"a:\\n\\\"b\\\"\"} 1.458255915e9\r\n\
                    metric_without_timestamp_and_labels 12.47\n\
                    something_weird{problem=\"division by zero\"} +Inf -3982045\n\
                    braces{a=\"}\"}\t-0x1\nnothing\n{a=\"b\"} 1\nopen{a=\"b 1\na 1 2 3\n";
        let found = read(body, false);
        let counter = Line::Type { name: "http_requests_total", kind: Kind::Counter };
        assert_eq!(found[0], Ok(counter));
        assert_eq!(
            found[1],
            plain("http_requests_total{method=\"post\",code=\"200\"}", 1027.0, Some(1_395_066_363_000))
        );
        let Ok(Line::Sample { series: raw, .. }) = found[2] else { panic!("{:?}", found[2]) };
        let (name, labels) = series(raw).unwrap();
        assert_eq!(name, "msdos_file_access_time_seconds");
        assert_eq!(labels, [("path", "C:\\DIR\\FILE.TXT".into()), ("error", "a:\n\"b\"".into())]);
        assert_eq!(found[3], plain("metric_without_timestamp_and_labels", 12.47, None));
        assert_eq!(found[4], plain("something_weird{problem=\"division by zero\"}", f64::INFINITY, Some(-3_982_045)));
        let errors = [LineError::Value, LineError::Series, LineError::Series, LineError::Series, LineError::Rest];
        assert_eq!(found[5..], errors.map(Err));
    }

    #[test]
    fn a_line_is_read_the_same_whatever_was_expected_there() {
        for raw in [
            "a{b=\"c\"} 1",
            "a{b=\"c\"} 1\r",
            "a{b=\"c\"} +Inf",
            "a{b=\"c\"} x",
            "a{b=\"c\"} 1 # x",
            "a{b=\"c\"}  1",
            "a{b=\"c\"} ",
            "a{b=\"c\"}\t2 3",
            "ab 1",
            "a 1",
            "a 1\u{a0}",
            "a",
            "# EOF",
            " a 1",
            "",
        ] {
            let plain = line(raw, false, None);
            for text in ["a{b=\"c\"}", "a", "ab", "a{b=\"d\"}", "#", " a", ""] {
                for (shared, rest) in (0..=text.len()).map(|at| text.split_at(at)) {
                    let expected = Expected { shared, rest };
                    assert_eq!(line(raw, false, Some(expected)), plain, "{raw} {expected:?}");
                }
            }
        }
    }

    #[test]
    fn a_number_is_read_to_the_last_bit_whatever_way_is_taken() {
        for word in
            ["0", "007", "999999999999999", "9007199254740993", "1234567890123456", "-5", "1e3", "0.1", "", "1_0", "+1"]
        {
            assert_eq!(number(word).map(f64::to_bits), word.parse().ok().map(f64::to_bits), "{word}");
        }
    }

    #[test]
    fn openmetrics_has_seconds_exemplars_and_an_end() {
        let body = "# TYPE foo histogram\nfoo_bucket{le=\"1.0\"} 17 1520879607.789 # {trace_id=\"x\"} 0.67\n\
                    foo_bucket{le=\"+Inf\"} 18 # {} 9\nfoo_created 1 1e300\n# EOF\n";
        let found = read(body, true);
        assert_eq!(found[1], plain("foo_bucket{le=\"1.0\"}", 17.0, Some(1_520_879_607_789)));
        assert_eq!(found[2], plain("foo_bucket{le=\"+Inf\"}", 18.0, None));
        assert_eq!(found[3], Err(LineError::Timestamp));
        assert_eq!(found[4], Ok(Line::Eof));
        let mut kinds = Kinds::default();
        kinds.declare("foo", Kind::Histogram);
        let of = ["foo_bucket", "foo_created", "foo_total", "bar"].map(|name| kinds.of(name));
        assert_eq!(of, [Kind::Histogram, Kind::Gauge, Kind::Histogram, Kind::Unknown]);
    }

    #[test]
    fn labels_may_have_blanks_and_a_last_comma_and_nothing_else() {
        assert_eq!(series("a{ b = \"c\" , d=\"\", }").unwrap().1, [("b", "c".into()), ("d", "".into())]);
        for bad in ["a{b}", "a{b=c}", "a{b=\"c\"d=\"e\"}", "a{b=\"c}", "a{,}"] {
            assert_eq!(series(bad), None, "{bad}");
        }
    }
}
