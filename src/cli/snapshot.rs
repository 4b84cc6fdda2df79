//! `snapshot`, `rollback`, `fork`: what a sandbox was, and sandboxes that go on from there.

use std::io::{self, IsTerminal};
use std::path::Path;

use serde_json::{Value, json};

use super::args::SnapshotVerb;
use super::client::{Client, Event, LOCAL_IO, local};
use super::output::{StatusLine, ago, human_bytes, json_object, print, print_error, print_json, table};
use super::show::{self, text};
use super::{Failure, backup};
use crate::wire::{Fields, Request};

/// `warren snapshot SANDBOX` and `warren snapshot VERB`.
pub fn snapshot(
    client: &mut Client,
    verb: Option<&SnapshotVerb>,
    sandbox: Option<&str>,
    name: Option<&str>,
    json: bool,
) -> Result<u8, Failure> {
    match (verb, sandbox) {
        (Some(SnapshotVerb::Ls { sandbox }), _) => list(client, sandbox.as_deref(), json),
        (Some(SnapshotVerb::Inspect { ids }), _) => show::inspect(client, "snapshot.inspect", ids),
        (Some(SnapshotVerb::Rm { ids }), _) => show::change_each(client, "snapshot.remove", ids, json),
        (Some(SnapshotVerb::Export { id, file }), _) => {
            if file == Path::new("-") && io::stdout().is_terminal() {
                return Err(local(LOCAL_IO, "a snapshot is nothing for a terminal: name a file").into());
            }
            backup::fetch(client, Request::new("", "snapshot.export").arg(id), file)
        }
        (Some(SnapshotVerb::Import { file, name }), _) => {
            let request = Request::new("", "snapshot.import");
            let request = name.iter().fold(request, |request, name| request.set("name", name));
            let mut from = backup::source(file)?;
            let reply = client.transfer(request, Some(("content", &mut *from)), &mut |_, _| Ok(()))?;
            show_id(&reply.fields, json)
        }
        (None, Some(sandbox)) => {
            let request = Request::new("", "snapshot.create").arg(sandbox);
            let request = name.iter().fold(request, |request, name| request.set("name", name));
            let mut status = StatusLine::new();
            status.show("taking a snapshot");
            let made = client.call(request);
            status.clear();
            show_id(&made?.fields, json)
        }
        // The command line's own rules ask for one of them.
        (None, None) => Ok(2),
    }
}

/// `warren template snapshot TEMPLATE`; `memory` is in MiB.
pub fn template(
    client: &mut Client,
    name: &str,
    vcpus: Option<u64>,
    memory: Option<u64>,
    network: bool,
    json: bool,
) -> Result<u8, Failure> {
    let request = Request::new("", "template.snapshot").arg(name);
    let shape = [("vcpus", vcpus), ("memory_mib", memory)].into_iter().filter_map(|(key, value)| Some((key, value?)));
    let request = shape.fold(request, |request, (key, value)| request.set(key, value));
    let request = if network { request.set("network", "on") } else { request };
    show_id(&client.call(request)?.fields, json)
}

/// `warren rollback SANDBOX SNAPSHOT`.
pub fn rollback(client: &mut Client, sandbox: &str, snapshot: &str, json: bool) -> Result<u8, Failure> {
    let reply = client.call(Request::new("", "sandbox.rollback").arg(sandbox).set("snapshot", snapshot))?;
    show_id(&reply.fields, json)
}

/// `warren fork SANDBOX|SNAPSHOT`: the new ids, each as soon as that sandbox runs.
pub fn fork(client: &mut Client, from: &str, count: u64, json: bool) -> Result<u8, Failure> {
    let call = client.start(Request::new("", "snapshot.fork").arg(from).set("n", count))?;
    let (mut ids, mut code) = (Vec::new(), 0);
    loop {
        match client.next(&call, None)? {
            Event::Item(fields) if json => ids.push(json!({ "id": text(&fields, "id") })),
            Event::Item(fields) => print(format!("{}\n", text(&fields, "id")))?,
            Event::Done(Ok(_)) => break,
            Event::Done(Err(error)) => {
                // Those that were named are there all the same.
                print_error(&error);
                code = 1;
                break;
            }
            _ => {}
        }
    }
    if json {
        print_json(&Value::Array(ids))?;
    }
    Ok(code)
}

fn show_id(fields: &Fields, json: bool) -> Result<u8, Failure> {
    match json {
        true => print_json(&json_object(fields))?,
        false => print(format!("{}\n", text(fields, "id")))?,
    }
    Ok(0)
}

fn list(client: &mut Client, sandbox: Option<&str>, json: bool) -> Result<u8, Failure> {
    let request = Request::new("", "snapshot.list");
    let rows = client.call(sandbox.iter().fold(request, |request, id| request.set("sandbox", id)))?.items;
    if json {
        print_json(&rows.iter().map(json_object).collect())?;
        return Ok(0);
    }
    let row = |row: &Fields| {
        let created = row.number("created_ms").map(ago).unwrap_or_default();
        let bytes = human_bytes(row.number("bytes").unwrap_or(0));
        let below = text(row, "difference_to");
        vec![text(row, "id"), text(row, "name"), text(row, "sandbox"), text(row, "template"), bytes, below, created]
    };
    let heading = ["ID", "NAME", "SANDBOX", "TEMPLATE", "SIZE", "DIFFERENCE TO", "CREATED"];
    print(table(&heading, &rows.iter().map(row).collect::<Vec<_>>()))?;
    Ok(0)
}
