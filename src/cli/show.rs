//! `ps`, `inspect`, `top`, `update`, `stop`, `rm`, `logs`, `node`, `template`: what a node has, and how to end it.

use std::collections::VecDeque;
use std::io::IsTerminal;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use serde_json::{Value, json};

use super::Failure;
use super::client::{CONNECTION_LOST, Call, Client, Event};
use super::output::{ago, human_bytes, human_seconds, json_object, print, print_error, print_json, printable, table};
use super::shape::{LimitArgs, NetworkArgs, TimeLimitArgs};
use crate::wire::{Code, Error, Fields, Request};

const MIB: u64 = 1 << 20;
/// Sandboxes that are stopped or removed at once.
const AHEAD: usize = 16;

/// A field as text; empty where there is none.
pub fn text(fields: &Fields, key: &str) -> String {
    fields.bytes(key).map(|v| String::from_utf8_lossy(v).into_owned()).unwrap_or_default()
}

fn size(fields: &Fields, key: &str, unit: u64) -> String {
    fields.number(key).map(|n| human_bytes(n.saturating_mul(unit))).unwrap_or_default()
}

/// `warren ps`.
#[derive(Debug, Args)]
pub struct PsArgs {
    /// Also stopped sandboxes
    #[arg(short, long)]
    pub all: bool,
    /// Only ids
    #[arg(short, long)]
    pub quiet: bool,
    /// Only sandboxes in this state
    #[arg(long)]
    pub state: Option<String>,
    /// Only this owner's
    #[arg(long)]
    pub owner: Option<String>,
    /// Only of this template
    #[arg(long)]
    pub template: Option<String>,
    /// Only with this label, of any value when none is given
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    pub label: Vec<String>,
    /// Only those that execute something for a client, or none
    #[arg(long, value_name = "true|false", value_parser = ["true", "false"])]
    pub executing: Option<String>,
    /// Only those not used for so long
    #[arg(long, value_name = "TIME", value_parser = super::values::parse_duration)]
    pub unused: Option<Duration>,
    /// Only those made at most so long ago
    #[arg(long, value_name = "TIME", value_parser = super::values::parse_duration)]
    pub since: Option<Duration>,
    /// Only ids after this one
    #[arg(long, value_name = "ID")]
    pub after: Option<String>,
    /// How many
    #[arg(short = 'n', long, value_name = "N")]
    pub limit: Option<u64>,
}

/// `warren ps`.
pub fn ps(client: &mut Client, args: &PsArgs, json: bool) -> Result<u8, Failure> {
    let mut request = Request::new("", "sandbox.list");
    if let Some(state) = &args.state {
        request = request.set("state", state);
    }
    let texts =
        [("owner", &args.owner), ("template", &args.template), ("executing", &args.executing), ("after", &args.after)];
    for (key, value) in texts {
        request = value.iter().fold(request, |request, value| request.set(key, value));
    }
    request = args.label.iter().fold(request, |request, label| request.set("label", label));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    for (key, age) in [("used_until_ms", args.unused), ("created_since_ms", args.since)] {
        request = age.iter().fold(request, |request, age| request.set(key, now.saturating_sub(*age).as_millis()));
    }
    if let Some(limit) = args.limit {
        request = request.set("limit", limit);
    }
    let mut rows = client.call(request)?.items;
    if !args.all && args.state.is_none() {
        rows.retain(|row| row.get("state") != Some("stopped"));
    }
    if json {
        print_json(&rows.iter().map(json_object).collect())?;
    } else if args.quiet {
        print(rows.iter().map(|row| text(row, "id") + "\n").collect::<String>())?;
    } else {
        let rows: Vec<Vec<String>> = rows.iter().map(sandbox_row).collect();
        print(table(&["ID", "NAME", "TEMPLATE", "STATE", "CPUS", "MEMORY", "NETWORK", "CREATED"], &rows))?;
    }
    Ok(0)
}

fn sandbox_row(row: &Fields) -> Vec<String> {
    let state = match (row.get("state"), row.get("reason")) {
        (Some("error"), Some(reason)) => format!("error ({reason})"),
        _ => text(row, "state"),
    };
    let created = row.number("created_ms").map(ago).unwrap_or_default();
    let memory = size(row, "memory_mib", MIB);
    let network = match (row.get("network"), row.get("address")) {
        (Some("on"), Some(address)) => address.to_string(),
        _ => text(row, "network"),
    };
    let (id, name, template) = (text(row, "id"), text(row, "name"), text(row, "template"));
    vec![id, name, template, state, text(row, "vcpus"), memory, network, created]
}

/// `warren inspect` and `warren template inspect`: a JSON list, one object a name, as docker has it.
pub fn inspect(client: &mut Client, verb: &str, names: &[String]) -> Result<u8, Failure> {
    let mut found = Vec::new();
    let code = each(names, |name| {
        let reply = client.call(Request::new("", verb).arg(name))?;
        let fields = if reply.fields.0.is_empty() { reply.items.into_iter().next() } else { Some(reply.fields) };
        found.push(json_object(&fields.unwrap_or_default()));
        Ok(())
    });
    print_json(&Value::Array(found))?;
    Ok(code)
}

/// `warren top`: one look, or one every so often. Without names, what ended meanwhile is left out.
pub fn top(client: &mut Client, names: &[String], follow: Option<Duration>, json: bool) -> Result<u8, Failure> {
    let Some(pause) = follow else { return look(client, names, json) };
    loop {
        if !json && std::io::stdout().is_terminal() {
            // Home, and clear what was there.
            print("\x1b[H\x1b[2J")?;
        }
        look(client, names, json)?;
        std::thread::sleep(pause);
    }
}

fn look(client: &mut Client, names: &[String], json: bool) -> Result<u8, Failure> {
    let mut listed = Vec::new();
    if names.is_empty() {
        let rows = client.call(Request::new("", "sandbox.list").set("state", "running"))?.items;
        listed.extend(rows.iter().map(|row| text(row, "id")));
    }
    let mut rows = Vec::new();
    let asked = if names.is_empty() { &listed } else { names };
    let code = ask_each(
        client,
        asked,
        |id| Request::new("", "sandbox.stats").arg(id),
        |_, done| match done {
            Err(error) if names.is_empty() && (error.is(Code::NotFound) || error.is(Code::BadState)) => Ok(()),
            done => done.map(|fields| rows.push(fields)),
        },
    );
    if json {
        print_json(&rows.iter().map(json_object).collect())?;
        return Ok(code);
    }
    let heading = ["ID", "CPU TIME", "USED", "CACHE", "MEMORY", "HOST", "DISK", "READ", "WRITTEN"];
    print(table(&heading, &rows.iter().map(usage_row).collect::<Vec<_>>()))?;
    Ok(code)
}

fn usage_row(row: &Fields) -> Vec<String> {
    let cpu = row.number("cpu_ms").map(|ms| format!("{}.{:02} s", ms / 1000, ms % 1000 / 10)).unwrap_or_default();
    let kib = |key| size(row, key, 1024);
    vec![
        text(row, "id"),
        cpu,
        kib("memory_used_kib"),
        kib("memory_cache_kib"),
        size(row, "memory_mib", MIB),
        kib("memory_resident_kib"),
        kib("disk_used_kib"),
        size(row, "block_read_bytes", 1),
        size(row, "block_written_bytes", 1),
    ]
}

/// `warren update`.
pub fn update(
    client: &mut Client,
    id: &str,
    memory_target_mib: Option<u64>,
    network: &NetworkArgs,
    limits: &LimitArgs,
    time_limits: &TimeLimitArgs,
    json: bool,
) -> Result<u8, Failure> {
    let request = || Request::new("", "sandbox.update").arg(id);
    // The node takes a request for each.
    let memory = memory_target_mib.map(|mib| request().set("memory_target_mib", mib));
    let network = network.network.as_ref().map(|_| network.add_to(request()));
    let limits = [
        ("cpu_quota", limits.cpu_quota),
        ("disk_iops", limits.disk_iops),
        ("disk_mbps", limits.disk_mbps),
        ("net_mbps", limits.net_mbps),
    ];
    let limits = limits.into_iter().filter_map(|(key, limit)| Some((key, limit?)));
    let limits = limits.fold(None, |request: Option<Request>, (key, limit)| {
        Some(request.unwrap_or_else(|| Request::new("", "sandbox.update").arg(id)).set(key, limit))
    });
    let times = time_limits.are_given().then(|| time_limits.add_to(request()));
    let mut said = Fields::new();
    for request in memory.into_iter().chain(network).chain(limits).chain(times) {
        let reply = client.call(request)?.fields;
        let first = said.0.is_empty();
        said.0.extend(reply.0.into_iter().filter(|(key, _)| first || key != "id"));
    }
    if json {
        print_json(&json_object(&said))?;
    } else {
        print(format!("{id}\n"))?;
    }
    Ok(0)
}

/// `warren stop`.
pub fn stop(client: &mut Client, ids: &[String], time: Option<Duration>, json: bool) -> Result<u8, Failure> {
    change(client, ids, json, |id| {
        let request = Request::new("", "sandbox.stop").arg(id);
        match time {
            Some(time) => request.set("timeout_ms", time.as_millis()),
            None => request,
        }
    })
}

/// `warren pause`, `warren resume`.
pub fn change_each(client: &mut Client, verb: &str, ids: &[String], json: bool) -> Result<u8, Failure> {
    change(client, ids, json, |id| Request::new("", verb).arg(id))
}

/// `warren rm`.
pub fn rm(client: &mut Client, ids: &[String], force: bool, json: bool) -> Result<u8, Failure> {
    change(client, ids, json, |id| {
        let request = Request::new("", "sandbox.remove").arg(id);
        if force { request.set("force", true) } else { request }
    })
}

/// Asks for the same of every sandbox, several at once, and names those where it was done.
fn change(client: &mut Client, ids: &[String], json: bool, request: impl Fn(&str) -> Request) -> Result<u8, Failure> {
    let mut done = Vec::new();
    let mut output = Ok(());
    let code = ask_each(client, ids, request, |id, answer| {
        answer?;
        if json {
            done.push(json!({ "id": id }));
        } else if output.is_ok() {
            output = print(format!("{id}\n"));
        }
        Ok(())
    });
    output?;
    if json {
        print_json(&Value::Array(done))?;
    }
    Ok(code)
}

/// Asks for something of every name, several at once, and hands the answers on in their order; gives the exit code.
fn ask_each(
    client: &mut Client,
    names: &[String],
    request: impl Fn(&str) -> Request,
    mut take: impl FnMut(&str, Result<Fields, Error>) -> Result<(), Error>,
) -> u8 {
    let mut ahead: VecDeque<Result<Call, Error>> = VecDeque::new();
    let mut next = names.iter();
    each(names, |name| {
        while let Some(name) = (ahead.len() < AHEAD).then(|| next.next()).flatten() {
            ahead.push_back(client.start(request(name)));
        }
        let Some(call) = ahead.pop_front() else { return Ok(()) };
        take(name, call.and_then(|call| client.wait(&call, None)).map(|reply| reply.fields))
    })
}

/// Does something for every name and goes on after a failure; gives the exit code.
fn each(names: &[String], mut action: impl FnMut(&str) -> Result<(), Error>) -> u8 {
    let mut code = 0;
    for name in names {
        if let Err(error) = action(name) {
            print_error(&error);
            code = 1;
        }
    }
    code
}

/// `warren node`.
pub fn node(client: &mut Client, json: bool) -> Result<u8, Failure> {
    let reply = client.call(Request::new("", "node.info"))?;
    if json {
        let mut document = json_object(&reply.fields);
        if !reply.items.is_empty() {
            document["items"] = reply.items.iter().map(json_object).collect();
        }
        print_json(&document)?;
        return Ok(0);
    }
    let rows: Vec<(String, String)> = reply.fields.0.iter().map(|(key, raw)| pair(key, raw)).collect();
    let width = rows.iter().map(|(key, _)| key.len()).max().unwrap_or(0) + 1;
    let lines = rows.iter().map(|(key, value)| format!("{:width$}  {}\n", format!("{key}:"), printable(value)));
    print(lines.collect::<String>())?;
    if !reply.items.is_empty() {
        print("\n")?;
        print(table(&POOL_HEADING, &reply.items.iter().map(pool_row).collect::<Vec<_>>()))?;
    }
    for row in &reply.items {
        if let Some(problem) = row.get("problem") {
            print(format!("pool {}: {}\n", text(row, "pool"), printable(problem)))?;
        }
    }
    Ok(0)
}

const POOL_HEADING: [&str; 10] =
    ["POOL", "READY", "IN USE", "MADE", "HITS", "MISSES", "WAITED", "LATE", "EXPIRED", "FAILED"];

fn pool_row(row: &Fields) -> Vec<String> {
    let keys = ["pool", "ready", "in_use", "made", "hits", "misses", "waited", "late", "expired", "failed"];
    keys.map(|key| text(row, key)).into()
}

/// A field for people: the key without its unit, the value with it.
fn pair(key: &str, raw: &[u8]) -> (String, String) {
    let text = String::from_utf8_lossy(raw).into_owned();
    let number = text.parse::<u64>().ok();
    let scaled = |suffix: &str, unit: u64| {
        Some((key.strip_suffix(suffix)?.replace('_', " "), human_bytes(number?.saturating_mul(unit))))
    };
    let time = || {
        let name = key.strip_suffix("_ms")?;
        match name {
            "uptime" => Some((name.to_string(), human_seconds(number? / 1000))),
            "started" | "created" | "booted" => Some((name.to_string(), ago(number?))),
            _ => Some((name.replace('_', " "), format!("{} ms", number?))),
        }
    };
    scaled("_mib", MIB)
        .or_else(|| scaled("_kib", 1024))
        .or_else(|| scaled("_bytes", 1))
        .or_else(time)
        .unwrap_or_else(|| (key.replace('_', " "), text))
}

/// `warren node audit`.
#[derive(Debug, Clone, Args)]
pub struct AuditArgs {
    /// How many rows, 1 to 1000
    #[arg(short = 'n', long, value_name = "N", default_value_t = 20)]
    pub limit: u64,
    /// Only rows with smaller ids
    #[arg(long, value_name = "ID")]
    pub before: Option<u64>,
    /// Only requests of this owner's clients
    #[arg(long)]
    pub owner: Option<String>,
}

/// `warren node audit`.
pub fn audit(client: &mut Client, args: &AuditArgs, json: bool) -> Result<u8, Failure> {
    let mut request = Request::new("", "node.audit").set("limit", args.limit);
    if let Some(before) = args.before {
        request = request.set("before", before);
    }
    if let Some(owner) = &args.owner {
        request = request.set("owner", owner);
    }
    let rows = client.call(request)?.items;
    if json {
        print_json(&rows.iter().map(json_object).collect())?;
        return Ok(0);
    }
    let heading = ["ID", "WHEN", "OWNER", "PEER", "VERB", "SANDBOX", "RESULT"];
    let row = |row: &Fields| {
        let when = row.number("began_ms").map(ago).unwrap_or_default();
        let result = row.get("result").unwrap_or("under way").to_string();
        let [id, owner, peer, verb, sandbox] = ["audit", "owner", "peer", "verb", "sandbox"].map(|key| text(row, key));
        vec![id, when, owner, peer, verb, sandbox, result]
    };
    print(table(&heading, &rows.iter().map(row).collect::<Vec<_>>()))?;
    Ok(0)
}

/// `warren node ledger`.
pub fn ledger(client: &mut Client, all: bool, json: bool) -> Result<u8, Failure> {
    let request = Request::new("", "node.ledger");
    let rows = client.call(if all { request.set("all", true) } else { request })?.items;
    let code = u8::from(!all && !rows.is_empty());
    if json {
        print_json(&rows.iter().map(json_object).collect())?;
        return Ok(code);
    }
    if !all && rows.is_empty() {
        print("none\n")?;
        return Ok(0);
    }
    let keys: &[&str] = match all {
        true => &["sandbox", "resource", "state", "value"],
        false => &["sandbox", "resource", "name", "record", "kernel"],
    };
    let heading: Vec<String> = keys.iter().map(|key| key.to_uppercase()).collect();
    let heading: Vec<&str> = heading.iter().map(String::as_str).collect();
    print(table(
        &heading,
        &rows.iter().map(|row| keys.iter().map(|key| text(row, key)).collect()).collect::<Vec<_>>(),
    ))?;
    Ok(code)
}

/// `warren node drain`.
pub fn drain(client: &mut Client, deadline: Option<u64>, pause: bool, json: bool) -> Result<u8, Failure> {
    let request = Request::new("", "node.drain");
    let request = if pause { request.set("action", "pause") } else { request };
    let request = deadline.into_iter().fold(request, |request, seconds| request.set("deadline_s", seconds));
    let call = client.start(request)?;
    let done = loop {
        match client.next(&call, None)? {
            Event::Item(step) if !json => {
                let left = step.get("sandboxes").unwrap_or("?");
                print(format!("{left} sandboxes left\n").into_bytes())?;
            }
            Event::Done(result) => break result?,
            _ => {}
        }
    };
    if json {
        print_json(&json_object(&done))?;
    }
    Ok(0)
}

/// `warren node undrain`.
pub fn undrain(client: &mut Client) -> Result<u8, Failure> {
    client.call(Request::new("", "node.undrain"))?;
    Ok(0)
}

/// `warren node stop` and `warren node reboot`.
pub fn stop_node(client: &mut Client, mode: &str) -> Result<u8, Failure> {
    match client.call(Request::new("", "node.stop").set("mode", mode)) {
        // The node may be faster with its end than with its answer; the bridge then knows only that the port has
        // closed or that another supervisor answers.
        Err(error) if error.code == CONNECTION_LOST || error.is(Code::LinkLost) || error.is(Code::NodeRestarted) => {
            Ok(0)
        }
        done => done.map(|_| 0).map_err(Failure::from),
    }
}

/// `warren template ls`.
pub fn templates(client: &mut Client, json: bool) -> Result<u8, Failure> {
    let rows = client.call(Request::new("", "template.list"))?.items;
    if json {
        print_json(&rows.iter().map(json_object).collect())?;
        return Ok(0);
    }
    let row = |row: &Fields| vec![text(row, "name"), size(row, "size_bytes", 1), text(row, "description")];
    print(table(&["NAME", "SIZE", "DESCRIPTION"], &rows.iter().map(row).collect::<Vec<_>>()))?;
    Ok(0)
}
