//! `warren trace`: what a create or a program spent its time on.

use serde_json::Value;

use super::Failure;
use super::client::Client;
use super::output::{json_object, print, print_json, printable, table};
use super::show::text;
use crate::wire::{Fields, Request};

/// Width of the picture of all the time, in characters.
const WIDTH: u64 = 32;

/// `warren trace`
pub fn trace(client: &mut Client, id: &str, exec: Option<u64>, json: bool) -> Result<u8, Failure> {
    let mut request = Request::new("", "sandbox.trace").arg(id);
    if let Some(number) = exec {
        request = request.set("exec", number);
    }
    let reply = client.call(request)?;
    if json {
        let mut document = json_object(&reply.fields);
        document["spans"] = reply.items.iter().map(json_object).collect::<Value>();
        print_json(&document)?;
        return Ok(0);
    }
    print(spans_table(&reply.items.iter().collect::<Vec<_>>()))?;
    let said = |key: &str| reply.fields.get(key);
    let total = reply.fields.number("total_us").unwrap_or(0);
    let slowest = said("slowest").map(|span| format!(", the slowest {}", printable(span))).unwrap_or_default();
    let failed = said("failed").map(|span| format!(", failed in {}", printable(span))).unwrap_or_default();
    print(format!("{}{slowest}{failed}\n", milliseconds(total)))?;
    Ok(0)
}

fn milliseconds(us: u64) -> String {
    format!("{}.{} ms", us / 1000, us % 1000 / 100)
}

/// The spans as a table, each with its place in all of the time.
pub fn spans_table(spans: &[&Fields]) -> String {
    let times = |span: &Fields| {
        let start = span.number("start_us").unwrap_or(0);
        (start, start.saturating_add(span.number("duration_us").unwrap_or(0)))
    };
    let total = spans.iter().map(|span| times(span).1).max().unwrap_or(0).max(1);
    let rows: Vec<Vec<String>> = spans
        .iter()
        .map(|span| {
            let (start, end) = times(span);
            let at = |us: u64| usize::try_from(u128::from(us) * u128::from(WIDTH) / u128::from(total)).unwrap_or(0);
            let bar = format!("{}{}", " ".repeat(at(start)), "=".repeat((at(end) - at(start)).max(1)));
            let took = span.number("duration_us").map_or_else(|| "...".to_string(), milliseconds);
            vec![text(span, "span"), milliseconds(start), took, bar, text(span, "error")]
        })
        .collect();
    table(&["SPAN", "START", "TOOK", "", "ERROR"], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_drawn_where_they_were() {
        let span = |name: &str, start: u64, duration: u64| {
            Fields::new().with("span", name).with("start_us", start).with("duration_us", duration)
        };
        let spans = [span("vm", 0, 500), span("boot", 500, 1500), Fields::new().with("span", "register")];
        let shown = spans_table(&spans.iter().collect::<Vec<_>>());
        let lines: Vec<&str> = shown.lines().collect();
        assert!(lines[1].contains("0.5 ms") && lines[1].ends_with(" ========"), "{shown}");
        assert!(lines[2].contains("1.5 ms") && lines[2].ends_with(&"=".repeat(24)), "{shown}");
        assert!(lines[3].contains("..."), "{shown}");
        assert!(spans_table(&[]).starts_with("SPAN"));
    }

    #[test]
    fn absurd_numbers_are_shown_too() {
        let span = Fields::new().with("span", "x").with("start_us", u64::MAX).with("duration_us", u64::MAX);
        assert!(spans_table(&[&span]).contains('='));
    }
}
