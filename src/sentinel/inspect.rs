//! Looking into a buffer directory, whoever uses it: `sentinel buffer stat | dump | fsck`. Nothing is changed.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};

use super::log::files::{Disk, Files};
use super::log::record::RecordKind;
use super::log::scan::Scanner;
use super::log::{cursor, read_dictionary, read_samples, segment_name, segment_number};
use super::model::{Sample, Series, SeriesTable};
use super::send::json;

/// What one segment holds.
#[derive(Default)]
struct Found {
    records: u64,
    samples: u64,
    first: Option<u64>,
    end: u64,
    damaged: u64,
    torn: u64,
    undecodable: u64,
    bytes: u64,
}

fn open(directory: &Path) -> Result<Disk, String> {
    Disk::look(directory).map_err(|e| format!("{}: {e}", directory.display()))
}

fn segments(disk: &Disk) -> Result<Vec<u64>, String> {
    let mut numbers: Vec<u64> =
        disk.list().map_err(|e| e.to_string())?.iter().filter_map(|name| segment_number(name)).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// Goes through a segment; `each` gets every sample with its number.
fn walk(disk: &Disk, number: u64, table: &SeriesTable, each: &mut dyn FnMut(u64, &Sample)) -> std::io::Result<Found> {
    let file = disk.open(&segment_name(number))?;
    let bytes = file.length()?;
    let mut scanner = Scanner::new(file);
    let mut found = Found { bytes, ..Found::default() };
    let mut dictionary: std::collections::HashMap<u32, Arc<Series>> = std::collections::HashMap::new();
    while let Some((header, payload)) = scanner.next(bytes)? {
        found.records += 1;
        match header.kind {
            RecordKind::Dictionary => match read_dictionary(payload) {
                Ok((first, series)) => {
                    dictionary.extend((first..).zip(series).map(|(number, identity)| (number, table.adopt(identity))));
                }
                Err(_) => found.undecodable += 1,
            },
            RecordKind::Samples => {
                found.first.get_or_insert(header.sequence);
                found.end = header.end();
                found.samples += u64::from(header.samples);
                let Ok(samples) = read_samples(payload) else {
                    found.undecodable += 1;
                    continue;
                };
                for (sequence, raw) in (header.sequence..).zip(samples) {
                    match dictionary.get(&raw.number) {
                        Some(series) => {
                            let series = Arc::clone(series);
                            each(sequence, &Sample { series, timestamp_ms: raw.timestamp_ms, value: raw.value });
                        }
                        None => found.undecodable += 1,
                    }
                }
            }
        }
    }
    found.damaged = scanner.damaged();
    found.torn = scanner.data_end().saturating_sub(scanner.good_end());
    Ok(found)
}

fn all(directory: &Path, each: &mut dyn FnMut(u64, &Sample)) -> Result<(Disk, Vec<(u64, Found)>), String> {
    let disk = open(directory)?;
    let table = SeriesTable::new(100_000);
    let mut result = Vec::new();
    for number in segments(&disk)? {
        let found = walk(&disk, number, &table, each).map_err(|e| format!("{}: {e}", segment_name(number)))?;
        result.push((number, found));
    }
    Ok((disk, result))
}

fn describe((number, found): &(u64, Found)) -> Value {
    json!({
        "segment": segment_name(*number), "bytes": found.bytes, "records": found.records, "samples": found.samples,
        "first": found.first, "end": found.end, "damaged_places": found.damaged, "torn_bytes": found.torn,
        "undecodable": found.undecodable,
    })
}

/// Segments and cursors.
pub fn stat(directory: &Path) -> Result<Value, String> {
    let (disk, segments) = all(directory, &mut |_, _| {})?;
    let end = segments.iter().map(|(_, found)| found.end).max().unwrap_or(0);
    let mut names: Vec<String> = disk
        .list()
        .map_err(|e| e.to_string())?
        .iter()
        .filter_map(|name| cursor::destination(name).map(str::to_string))
        .collect();
    names.sort();
    names.dedup();
    let mut cursors = Vec::new();
    for name in names {
        let cursor = cursor::load(&disk, &name, None).map_err(|e| e.to_string())?;
        cursors.push(match cursor {
            Some(cursor) => {
                json!({"target": name, "sequence": cursor.sequence, "pending": end.saturating_sub(cursor.sequence)})
            }
            None => json!({"target": name, "damaged": true}),
        });
    }
    Ok(json!({"segments": segments.iter().map(describe).collect::<Vec<_>>(), "cursors": cursors}))
}

/// Every sample, as a line of JSON.
pub fn dump(directory: &Path, out: &mut dyn Write) -> Result<(), String> {
    let mut failed = None;
    let mut line = String::new();
    all(directory, &mut |_, sample| {
        line.clear();
        json::sample(&mut line, sample);
        line.push('\n');
        if failed.is_none() {
            failed = out.write_all(line.as_bytes()).err();
        }
    })?;
    match failed {
        Some(e) => Err(format!("standard output: {e}")),
        None => Ok(()),
    }
}

/// What is damaged, and whether nothing is.
pub fn fsck(directory: &Path) -> Result<(Value, bool), String> {
    let (_, segments) = all(directory, &mut |_, _| {})?;
    let bad = |found: &Found| found.damaged + found.torn + found.undecodable > 0;
    let damaged: Vec<Value> = segments.iter().filter(|(_, found)| bad(found)).map(describe).collect();
    let good = damaged.is_empty();
    Ok((json!({"segments": segments.len(), "damaged": damaged}), good))
}
