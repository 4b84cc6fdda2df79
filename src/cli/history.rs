//! `warren history`: what was executed, also in sandboxes that are gone.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use serde_json::{Value, json};

use super::Failure;
use super::client::{Client, Reply};
use super::output::{ago, human_bytes, json_object, print, print_json, printable, table};
use super::show::text;
use super::trace::spans_table;
use super::values::parse_duration;
use crate::wire::{Fields, Request};

/// Parts of a record that are streams.
const PARTS: [&str; 3] = ["source", "stdout", "stderr"];

/// `warren history`.
#[derive(Debug, Args)]
pub struct HistoryArgs {
    /// The number of a record
    #[arg(value_name = "ID")]
    pub id: Option<u64>,
    /// Only in this sandbox; one that is gone by its whole id
    #[arg(long)]
    pub sandbox: Option<String>,
    /// Only programs or only code
    #[arg(long, value_name = "exec|code", value_parser = ["exec", "code"])]
    pub kind: Option<String>,
    /// Only code in this language
    #[arg(long, alias = "lang")]
    pub language: Option<String>,
    /// Only what is pending, running, completed or failed
    #[arg(long)]
    pub state: Option<String>,
    /// Only this owner's
    #[arg(long)]
    pub owner: Option<String>,
    /// Only what began at most so long ago
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub since: Option<Duration>,
    /// Only records with smaller numbers
    #[arg(long, value_name = "ID")]
    pub before: Option<u64>,
    /// How many, 1 to 1000
    #[arg(short = 'n', long, value_name = "N", default_value_t = 20)]
    pub limit: u64,
}

/// `warren history`
pub fn history(client: &mut Client, args: &HistoryArgs, json: bool) -> Result<u8, Failure> {
    match args.id {
        Some(id) => record(client, id, json),
        None => list(client, args, json),
    }
}

fn list(client: &mut Client, args: &HistoryArgs, json: bool) -> Result<u8, Failure> {
    let mut request = Request::new("", "history.list").set("limit", args.limit);
    let texts = [
        ("sandbox", &args.sandbox),
        ("kind", &args.kind),
        ("language", &args.language),
        ("state", &args.state),
        ("owner", &args.owner),
    ];
    for (key, value) in texts {
        request = value.iter().fold(request, |request, value| request.set(key, value));
    }
    if let Some(before) = args.before {
        request = request.set("before", before);
    }
    if let Some(since) = args.since {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        request = request.set("since_ms", now.saturating_sub(since).as_millis());
    }
    let rows = client.call(request)?.items;
    if json {
        print_json(&rows.iter().map(json_object).collect())?;
        return Ok(0);
    }
    let heading = ["ID", "STARTED", "TOOK", "SANDBOX", "KIND", "STATE", "EXIT", "CPU", "MEMORY", "COMMAND"];
    print(table(&heading, &rows.iter().map(row).collect::<Vec<_>>()))?;
    Ok(0)
}

fn row(row: &Fields) -> Vec<String> {
    let kind = row.get("language").map_or_else(|| text(row, "kind"), str::to_string);
    let took = row.number("started_ms").zip(row.number("ended_ms"));
    let ms = |ms: u64| if ms < 10_000 { format!("{ms} ms") } else { format!("{} s", ms / 1000) };
    let state = match (row.get("state"), row.get("code")) {
        (Some("failed"), Some(code)) => format!("failed ({code})"),
        _ => text(row, "state"),
    };
    vec![
        text(row, "record"),
        row.number("started_ms").map(ago).unwrap_or_default(),
        took.map(|(started, ended)| ms(ended.saturating_sub(started))).unwrap_or_default(),
        text(row, "sandbox"),
        kind,
        state,
        text(row, "exit"),
        row.number("cpu_ms").map(ms).unwrap_or_default(),
        row.number("peak_kib").map(|kib| human_bytes(kib.saturating_mul(1024))).unwrap_or_default(),
        text(row, "command").chars().take(60).collect(),
    ]
}

fn record(client: &mut Client, id: u64, json: bool) -> Result<u8, Failure> {
    let reply = client.call(Request::new("", "history.inspect").arg(id.to_string()))?;
    if json {
        print_json(&document(&reply))?;
        return Ok(0);
    }
    let width = reply.fields.0.iter().map(|(key, _)| key.len()).max().unwrap_or(0) + 1;
    for (key, value) in &reply.fields.0 {
        print(format!("{:width$}  {}\n", format!("{key}:"), printable(&String::from_utf8_lossy(value))))?;
    }
    let (artifacts, spans) = parts(&reply);
    for artifact in artifacts {
        let size = artifact.number("size").map(human_bytes).unwrap_or_default();
        print(format!("{:width$}  {} ({size})\n", "artifact:", printable(&text(artifact, "artifact"))))?;
    }
    if !spans.is_empty() {
        print(format!("\n{}", spans_table(&spans)))?;
    }
    for part in PARTS.iter().filter(|part| !reply.channel(part).is_empty()) {
        print(format!("\n{part}:\n"))?;
        for line in String::from_utf8_lossy(reply.channel(part)).lines() {
            print(format!("  {}\n", printable(&line.replace('\t', "    "))))?;
        }
    }
    Ok(0)
}

/// The files, and the spans of its trace.
fn parts(reply: &Reply) -> (Vec<&Fields>, Vec<&Fields>) {
    reply.items.iter().partition(|item| item.get("span").is_none())
}

fn document(reply: &Reply) -> Value {
    let mut document = json_object(&reply.fields);
    for part in PARTS.iter().filter(|part| reply.channels.contains_key(**part)) {
        document[*part] = json!(String::from_utf8_lossy(reply.channel(part)));
    }
    let (artifacts, spans) = parts(reply);
    document["trace"] = spans.iter().map(|span| json_object(span)).collect();
    document["artifacts"] = artifacts
        .iter()
        .map(|artifact| {
            json!({
                "path": text(artifact, "artifact"),
                "size": artifact.number("size"),
                "sha256": text(artifact, "sha256"),
            })
        })
        .collect();
    document
}
