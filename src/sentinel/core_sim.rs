//! `warren sentinel core-sim`: a small reference core for tests and demonstrations. It keeps everything in memory but
//! the samples, which go to a file, one JSON object a line.
//!
//! Besides what `control::core` says a core answers, it has for whoever plays the centre:
//! `PUT /api/v1/tasks` with `{version, tasks}`, `PUT /api/v1/config` with `{version, config}`, and `GET /api/v1/state`.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use serde_json::{Value, json};

use super::http::{Answer, Server, ServerRequest};
use super::secret::Secret;
use super::send::gunzip;

/// Longest body of a request, in octets, as it comes and unpacked.
const MAX_BODY: u64 = 16 * 1024 * 1024;
const MAX_UNPACKED: usize = 256 * 1024 * 1024;
/// Reports and heartbeats kept of each sentinel.
const KEPT: usize = 1000;
/// Names of metrics kept of each.
const MAX_METADATA: usize = 100_000;

#[derive(Default)]
struct Sentinel {
    registration: Value,
    heartbeats: u64,
    last_heartbeat: Value,
    reports: Vec<Value>,
    /// Types of metrics by their names.
    metadata: BTreeMap<String, Value>,
    /// By log: which samples are there, as ranges from first to end.
    logs: BTreeMap<String, BTreeMap<u64, u64>>,
    samples: u64,
    repeats: u64,
}

#[derive(Default)]
struct Core {
    sentinels: BTreeMap<String, Sentinel>,
    version: String,
    tasks: Value,
    config_version: String,
    config: Value,
    out: Option<File>,
}

/// Notes that the samples `first..end` came; gives those parts of the range that were not there before.
fn add(ranges: &mut BTreeMap<u64, u64>, first: u64, end: u64) -> Vec<(u64, u64)> {
    let mut fresh = Vec::new();
    let mut at = first;
    let (mut start, mut stop) = (first, end);
    let before = ranges.range(..first).next_back().map(|(&first, &end)| (first, end));
    let touching: Vec<(u64, u64)> = before
        .into_iter()
        .filter(|&(_, known)| known >= first)
        .chain(ranges.range(first..=end).map(|(&first, &end)| (first, end)))
        .collect();
    for (known, known_end) in touching {
        if known > at {
            fresh.push((at, known.min(end)));
        }
        at = at.max(known_end);
        start = start.min(known);
        stop = stop.max(known_end);
        ranges.remove(&known);
    }
    if at < end {
        fresh.push((at, end));
    }
    ranges.insert(start, stop);
    fresh
}

impl Core {
    fn answer(&mut self, request: &ServerRequest) -> Answer {
        let (path, query) = request.target.split_once('?').unwrap_or((&request.target, ""));
        match (&*request.method, path) {
            ("GET", "/api/v1/state") => json_answer(&self.state()),
            ("GET", "/api/v1/tasks") => {
                let wanted: String = self.version.bytes().map(|octet| format!("%{octet:02x}")).collect();
                if self.version.is_empty() || query.ends_with(&format!("version={wanted}")) {
                    return Answer::status(304);
                }
                json_answer(&json!({"version": self.version, "tasks": self.tasks}))
            }
            ("GET", "/api/v1/config") => json_answer(&json!({"version": self.config_version, "config": self.config})),
            ("PUT" | "POST", _) => self.take(path, request).unwrap_or_else(Answer::status),
            _ => Answer::status(404),
        }
    }

    /// Takes what a sentinel or the centre sends; a status where it cannot.
    fn take(&mut self, path: &str, request: &ServerRequest) -> Result<Answer, u16> {
        let unpacked = match request.header("content-encoding") {
            Some("gzip") => gunzip(&request.body, MAX_UNPACKED).ok_or(400u16)?,
            Some(_) => return Err(415),
            None => request.body.clone(),
        };
        let body: Value = serde_json::from_slice(&unpacked).map_err(|_| 400u16)?;
        if (&*request.method, path) == ("PUT", "/api/v1/tasks") {
            self.version = body["version"].as_str().filter(|version| !version.is_empty()).ok_or(400u16)?.to_string();
            self.tasks = body["tasks"].clone();
            return Ok(Answer::status(204));
        }
        if (&*request.method, path) == ("PUT", "/api/v1/config") {
            self.config_version = body["version"].as_str().ok_or(400u16)?.to_string();
            self.config = body["config"].clone();
            return Ok(Answer::status(204));
        }
        let id = body["id"].as_str().or(body["sentinel"].as_str()).ok_or(400u16)?.to_string();
        match path {
            "/api/v1/register" => {
                self.sentinels.entry(id).or_default().registration = body;
                Ok(Answer::status(201))
            }
            "/api/v1/metrics" => {
                self.samples(&id, body)?;
                Ok(Answer::status(202))
            }
            "/api/v1/heartbeat" => {
                let sentinel = self.sentinels.get_mut(&id).ok_or(404u16)?;
                sentinel.heartbeats += 1;
                sentinel.last_heartbeat = body;
                Ok(json_answer(&json!({"tasks_version": self.version, "config_version": self.config_version})))
            }
            "/api/v1/metadata" => {
                let sentinel = self.sentinels.get_mut(&id).ok_or(404u16)?;
                for entry in body["metadata"].as_array().ok_or(400u16)? {
                    let name = entry["name"].as_str().ok_or(400u16)?;
                    if sentinel.metadata.len() < MAX_METADATA || sentinel.metadata.contains_key(name) {
                        sentinel.metadata.insert(name.to_string(), entry["type"].clone());
                    }
                }
                Ok(Answer::status(204))
            }
            "/api/v1/reports" => {
                let sentinel = self.sentinels.get_mut(&id).ok_or(404u16)?;
                sentinel.reports.extend(body["reports"].as_array().ok_or(400u16)?.iter().cloned());
                let surplus = sentinel.reports.len().saturating_sub(KEPT);
                sentinel.reports.drain(..surplus);
                Ok(Answer::status(204))
            }
            _ => Err(404),
        }
    }

    /// Each sample once, however often it comes: its log and its number say which one it is.
    fn samples(&mut self, id: &str, body: Value) -> Result<(), u16> {
        let first = body["sequence"].as_u64().ok_or(400u16)?;
        let log = body["log"].as_str().ok_or(400u16)?.to_string();
        let samples = body["samples"].as_array().ok_or(400u16)?;
        let end = first.checked_add(samples.len() as u64).ok_or(400u16)?;
        let sentinel = self.sentinels.entry(id.to_string()).or_default();
        let fresh = add(sentinel.logs.entry(log).or_default(), first, end);
        let mut lines = String::new();
        let mut count = 0;
        for (from, to) in fresh {
            for sample in &samples[(from - first) as usize..(to - first) as usize] {
                count += 1;
                lines.push_str(&sample.to_string());
                lines.push('\n');
            }
        }
        sentinel.samples += count;
        sentinel.repeats += samples.len() as u64 - count;
        match &mut self.out {
            Some(out) => out.write_all(lines.as_bytes()).map_err(|_| 507),
            None => Ok(()),
        }
    }

    fn state(&self) -> Value {
        // Samples that lie between others of the same log and have not come.
        let missing = |ranges: &BTreeMap<u64, u64>| -> u64 {
            ranges.values().zip(ranges.keys().skip(1)).map(|(end, first)| first - end).sum()
        };
        let of = |sentinel: &Sentinel| {
            json!({
                "registration": sentinel.registration, "heartbeats": sentinel.heartbeats,
                "last_heartbeat": sentinel.last_heartbeat, "reports": sentinel.reports, "metadata": sentinel.metadata,
                "samples": sentinel.samples, "repeats": sentinel.repeats,
                "missing": sentinel.logs.values().map(missing).sum::<u64>(),
            })
        };
        self.sentinels.iter().map(|(id, sentinel)| (id.clone(), of(sentinel))).collect()
    }
}

fn json_answer(value: &Value) -> Answer {
    Answer::of("application/json", value.to_string())
}

/// Starts a core that wants `token` (empty: none) and appends samples to a file.
pub fn start(listen: SocketAddr, token: Secret, out: Option<&Path>) -> io::Result<Server> {
    let out = out.map(|path| OpenOptions::new().create(true).append(true).open(path)).transpose()?;
    let core = Mutex::new(Core { out, ..Core::default() });
    let wanted = Secret::new(format!("Bearer {}", token.reveal()));
    Server::start(listen, MAX_BODY, move |request| {
        if !token.is_empty() && request.header("authorization") != Some(wanted.reveal()) {
            return Answer::status(401);
        }
        core.lock().unwrap_or_else(PoisonError::into_inner).answer(request)
    })
}

#[cfg(test)]
mod tests {
    use super::add;
    use std::collections::BTreeMap;

    #[test]
    fn of_ranges_that_overlap_only_what_is_new_is_taken() {
        let mut ranges = BTreeMap::new();
        assert_eq!(add(&mut ranges, 10, 20), [(10, 20)]);
        assert_eq!(add(&mut ranges, 10, 20), []);
        assert_eq!(add(&mut ranges, 30, 40), [(30, 40)]);
        assert_eq!(add(&mut ranges, 5, 12), [(5, 10)]);
        assert_eq!(add(&mut ranges, 0, 50), [(0, 5), (20, 30), (40, 50)]);
        assert_eq!(ranges, BTreeMap::from([(0, 50)]));
        assert_eq!(add(&mut ranges, 50, 60), [(50, 60)]);
        assert_eq!(add(&mut ranges, 20, 20), []);
        assert_eq!(ranges, BTreeMap::from([(0, 60)]));
    }
}
