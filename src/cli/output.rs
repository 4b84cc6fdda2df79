//! What goes to standard output: tables, JSON documents, sizes and times for people.

use std::io::{self, IsTerminal, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};

use crate::wire::{Code, Error, Fields};

/// Writes text to standard output. A reader that has gone is `Err` with `BrokenPipe`, never a panic.
pub fn print(text: impl AsRef<[u8]>) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_ref())?;
    out.flush()
}

/// Writes one JSON document to standard output.
pub fn print_json(value: &Value) -> io::Result<()> {
    print(json_text(&format!("{value:#}\n")))
}

/// Writes a JSON document on one line.
pub fn print_json_line(value: &Value) -> io::Result<()> {
    print(json_text(&format!("{value}\n")))
}

/// JSON lets control characters of the upper half stand as they are, which terminals heed.
fn json_text(text: &str) -> String {
    match text.contains(is_heeded) {
        true => text.chars().fold(String::new(), |text, c| match is_heeded(c) {
            true => text + &format!("\\u{:04x}", u32::from(c)),
            false => text + c.encode_utf8(&mut [0; 4]),
        }),
        false => text.to_string(),
    }
}

fn is_heeded(c: char) -> bool {
    ('\u{7f}'..='\u{9f}').contains(&c)
}

/// Writes `error: CODE: sentence` to standard error, and below it the end of the console log where the error has it.
pub fn print_error(error: &Error) {
    complain(&format!("error: {}: {}", error.code, error.message));
    let console = error.fields.bytes("console").map(String::from_utf8_lossy).unwrap_or_default();
    for line in console.lines() {
        complain(&format!("  console: {}", line.trim_end()));
    }
    // What else says something was shown while it ran.
    let said = error.fields.bytes("output").filter(|_| error.is(Code::InstallFailed) || error.is(Code::Timeout));
    for line in said.map(String::from_utf8_lossy).unwrap_or_default().lines() {
        complain(&format!("  {}", line.trim_end()));
    }
}

/// Writes a line to standard error; nothing is left to do when that fails.
pub fn complain(line: &str) {
    let _ = writeln!(io::stderr(), "{}", printable(line));
}

/// The text without control characters: names and messages may come from a sandbox and must not drive a terminal.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// Makes of what a guest says, piece by piece, text that cannot drive a terminal: of control characters, only the ends of lines and
/// tabs are let through, the others are shown.
#[derive(Debug, Default)]
pub struct Visible {
    /// The begin of what only the next piece tells: a character, or the end of a line.
    pending: Vec<u8>,
}

impl Visible {
    /// The next piece.
    pub fn take(&mut self, piece: &[u8]) -> String {
        self.pending.extend_from_slice(piece);
        let octets = std::mem::take(&mut self.pending);
        let cut = match octets.utf8_chunks().last().map(|last| (last.valid().as_bytes().last(), last.invalid())) {
            Some((Some(b'\r'), [])) => 1,
            // A character has four octets at most.
            Some((_, part)) if std::str::from_utf8(part).is_err_and(|e| e.error_len().is_none()) => part.len(),
            _ => 0,
        };
        let (whole, rest) = octets.split_at(octets.len() - cut);
        self.pending = rest.to_vec();
        visible(whole)
    }

    /// What is left when nothing more comes.
    pub fn end(&mut self) -> String {
        visible(&std::mem::take(&mut self.pending))
    }
}

fn visible(octets: &[u8]) -> String {
    let mut text = String::with_capacity(octets.len());
    for chunk in octets.utf8_chunks() {
        let mut characters = chunk.valid().chars().peekable();
        while let Some(c) = characters.next() {
            match c {
                '\n' | '\t' => text.push(c),
                '\r' if characters.peek() == Some(&'\n') => {}
                c if c.is_control() => text.push_str(&format!("\\x{:02x}", u32::from(c))),
                c => text.push(c),
            }
        }
        chunk.invalid().iter().for_each(|octet| text.push_str(&format!("\\x{octet:02x}")));
    }
    text
}

/// A line on standard error that is written over again and again, only on a terminal.
#[derive(Debug)]
pub struct StatusLine {
    shown: bool,
    enabled: bool,
}

impl StatusLine {
    /// Shows nothing yet, and nothing at all unless standard error is a terminal.
    pub fn new() -> Self {
        Self { shown: false, enabled: io::stderr().is_terminal() }
    }

    /// Whether anybody sees it.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Replaces the line.
    pub fn show(&mut self, text: &str) {
        if self.enabled {
            let _ = write!(io::stderr(), "\r\x1b[K{}", printable(text));
            self.shown = true;
        }
    }

    /// Takes the line away.
    pub fn clear(&mut self) {
        if std::mem::take(&mut self.shown) {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

impl Drop for StatusLine {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Lines up rows under a heading; the last column is not padded.
pub fn table(heading: &[&str], rows: &[Vec<String>]) -> String {
    let cells: Vec<Vec<String>> = std::iter::once(heading.iter().map(ToString::to_string).collect())
        .chain(rows.iter().map(|row| row.iter().map(|cell| printable(cell)).collect()))
        .collect();
    let width = |column: usize| {
        cells.iter().filter_map(|row: &Vec<String>| row.get(column)).map(|c| c.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..heading.len()).map(width).collect();
    let mut text = String::new();
    for row in &cells {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{cell:<width$}   "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// A size for people: `512 MiB`, `1.5 GiB`.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    let mut value = bytes as f64;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 || value.fract() == 0.0 || value >= 100.0 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// How long ago a time in Unix milliseconds was: `3 minutes ago`. Clocks differ: the future is `now`.
pub fn ago(then_ms: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
    format_ago(now.saturating_sub(then_ms) / 1000)
}

fn format_ago(seconds: u64) -> String {
    let (count, unit) = match seconds {
        0 => return "now".to_string(),
        1..60 => (seconds, "second"),
        60..3600 => (seconds / 60, "minute"),
        3600..86400 => (seconds / 3600, "hour"),
        _ => (seconds / 86400, "day"),
    };
    format!("{count} {unit}{} ago", if count == 1 { "" } else { "s" })
}

/// A duration for people: `2 h 5 min`, `41 s`.
pub fn human_seconds(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..86400 => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {} h", seconds / 86400, seconds / 3600 % 24),
    }
}

/// Keys whose values are numbers, besides those that end in a unit. A key decides, never the look of a value: a
/// name may consist of digits.
const NUMBERS: [&str; 24] = [
    "vcpus",
    "pid",
    "exec",
    "record",
    "seq",
    "context",
    "exit",
    "signal",
    "size",
    "uid",
    "gid",
    "protocol",
    "cpus",
    "sandboxes",
    "running",
    "templates",
    "user",
    "lost",
    "port",
    "cid",
    "mtime",
    "cols",
    "rows",
    "length",
];
const NUMBER_SUFFIXES: &[&str] = &["_ms", "_ns", "_mib", "_kib", "_bytes", "_offset", "_running", "_vcpus"];
const FLAGS: &[&str] = &["timeout", "tty", "stdin", "verified"];
const LISTS: &[&str] = &["env", "argv"];

/// A reply's fields as a JSON object: numbers and truth values by key, `label=KEY=VALUE` under `labels`, and a list for a
/// key that is given more than once. Keys stand in alphabetical order.
pub fn json_object(fields: &Fields) -> Value {
    let mut object = Map::new();
    let mut labels = Map::new();
    for (key, raw) in &fields.0 {
        let text = String::from_utf8_lossy(raw).into_owned();
        if let ("label", Some((label, value))) = (key.as_str(), text.split_once('=')) {
            labels.insert(label.to_string(), Value::from(value));
            continue;
        }
        let value = json_value(key, text);
        match object.get_mut(key) {
            Some(Value::Array(list)) => list.push(value),
            Some(first) => *first = Value::Array(vec![first.take(), value]),
            None if LISTS.contains(&key.as_str()) => {
                object.insert(key.clone(), Value::Array(vec![value]));
            }
            None => {
                object.insert(key.clone(), value);
            }
        }
    }
    if !labels.is_empty() {
        object.insert("labels".to_string(), Value::Object(labels));
    }
    Value::Object(object)
}

fn json_value(key: &str, text: String) -> Value {
    let is_number = NUMBERS.contains(&key) || NUMBER_SUFFIXES.iter().any(|suffix| key.ends_with(suffix));
    if is_number {
        // A number must survive: no leading zeros, and within 64 bits.
        if let Some(number) = text.parse::<u64>().ok().filter(|n| n.to_string() == text) {
            return Value::from(number);
        }
    }
    match text.as_str() {
        "true" if FLAGS.contains(&key) => Value::Bool(true),
        "false" if FLAGS.contains(&key) => Value::Bool(false),
        _ => Value::String(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_document_has_control_characters_as_they_are() {
        let value = serde_json::json!({ "reason": "a\u{9b}31m\u{7f}\u{1b}[0mé" });
        let text = json_text(&value.to_string());
        assert!(text.contains("a\\u009b31m\\u007f\\u001b[0mé"), "{text}");
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), value);
    }

    #[test]
    fn a_table_lines_up_and_has_no_trailing_spaces() {
        let text = table(&["ID", "NAME"], &[vec!["abc".into(), "x".into()], vec!["a".into(), "".into()]]);
        assert_eq!(text, "ID    NAME\nabc   x\na\n");
    }

    #[test]
    fn a_cell_cannot_drive_the_terminal() {
        assert_eq!(table(&["A"], &[vec!["\x1b[2Jx\n".into()]]), "A\n?[2Jx?\n");
    }

    #[test]
    fn what_a_guest_says_is_shown_and_does_nothing_to_a_terminal_wherever_it_is_cut() {
        let said = b"a\tb\r\n\x1b]0;owned\x07\rover\x7f \xc2\x9b31m \x9b \xe2\x82\xac \xff\xe2\x82\n\xf0\x9f";
        let shown = "a\tb\n\\x1b]0;owned\\x07\\x0dover\\x7f \\x9b31m \\x9b € \\xff\\xe2\\x82\n\\xf0\\x9f";
        for length in 1..=said.len() {
            let mut visible = Visible::default();
            let text: String = said.chunks(length).map(|piece| visible.take(piece)).collect();
            assert_eq!(text + &visible.end(), shown, "in pieces of {length}");
        }
    }

    #[test]
    fn sizes_and_times_are_for_people() {
        assert_eq!(human_bytes(512 << 20), "512 MiB");
        assert_eq!(human_bytes(1536 << 20), "1.5 GiB");
        assert_eq!(human_bytes(17), "17 B");
        assert_eq!(format_ago(0), "now");
        assert_eq!(format_ago(1), "1 second ago");
        assert_eq!(format_ago(7200), "2 hours ago");
        assert_eq!(human_seconds(3725), "1 h 2 min");
    }

    #[test]
    fn json_types_follow_the_key_and_not_the_look_of_a_value() {
        let fields = Fields::new()
            .with("name", "123")
            .with("vcpus", 2)
            .with("created_ms", 1_700_000_000_000_u64)
            .with("timeout", true)
            .with("mode", "0644")
            .with("label", "team=7")
            .with("env", "A=1");
        assert_eq!(
            json_object(&fields).to_string(),
            r#"{"created_ms":1700000000000,"env":["A=1"],"labels":{"team":"7"},"mode":"0644","name":"123","timeout":true,"vcpus":2}"#
        );
        let repeated = Fields::new().with("x", 1).with("x", 2);
        assert_eq!(json_object(&repeated).to_string(), r#"{"x":["1","2"]}"#);
    }
}
