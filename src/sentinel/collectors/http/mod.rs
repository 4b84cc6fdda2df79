//! `http`: how a web server answers (status, phases, content, the end of its certificate), and what it says where it
//! offers Prometheus or OpenMetrics text.
//!
//! Each run has a connection of its own on the loop; a server that hangs costs nobody else anything. A scraped target's
//! connection is kept for its next scrape (`idle`); a probe measures a new one each time.

mod certificate;
mod exchange;
mod idle;
mod request;
mod scrape;

use std::borrow::Cow;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use mio::event::Event;
use regex_lite::Regex;

use super::{checked, manifest};
use crate::sentinel::collect::{Cancelled, Finished, Gathered, Gatherer, Io, Plan, Run, Service};
use crate::sentinel::http::{Response, TlsOptions, Url, response};
use crate::sentinel::model::Kind;
use crate::sentinel::plugin::{FieldError, Manifest, Values};
use crate::sentinel::schedule::RunId;
use crate::sentinel::task::Task;
use exchange::{Chunk, Exchange, Phases, Progress};
use idle::Idle;
use request::{Asking, Hop};
use scrape::{Known, Limits, Reading};

/// Octets of the buffer for answers that is kept from one to the next.
const SPARE: usize = 1024 * 1024;

/// The service.
pub struct Http {
    manifest: Manifest,
    jobs: HashMap<RunId, Job>,
    /// Whose the connections in use are, by their numbers.
    owners: HashMap<u64, RunId>,
    next_number: u64,
    idle: Idle,
    /// An answer's buffer, empty.
    spare: Vec<u8>,
    chunk: Box<Chunk>,
    /// What scraped targets said last time, by task.
    known: HashMap<String, Known>,
}

struct HttpPlan {
    url: Url,
    asking: Asking,
    redirects: u32,
    scrape: bool,
    status: Vec<String>,
    matches: Option<Regex>,
    no_match: Option<Regex>,
    body_limit: usize,
    limits: Limits,
}

struct Job {
    run: Run,
    plan: Arc<HttpPlan>,
    hop: Hop,
    /// When this hop began.
    since: Instant,
    exchange: Option<Exchange>,
}

impl Http {
    /// The service.
    #[allow(clippy::new_without_default)] // like the others, whose `new` takes something
    pub fn new() -> Self {
        Self {
            manifest: manifest("http"),
            jobs: HashMap::new(),
            owners: HashMap::new(),
            next_number: 0,
            idle: Idle::default(),
            spare: Vec::new(),
            chunk: Box::new([0; _]),
            known: HashMap::new(),
        }
    }

    /// Asks: on the connection of the last scrape, or on a new one.
    fn connect(&mut self, id: RunId, addresses: Result<Vec<IpAddr>, String>, io: &mut Io<'_>) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let port = job.hop.url.port;
        let addresses = match addresses {
            Ok(addresses) => addresses,
            Err(e) => return self.end(id, Err(e), io),
        };
        let good = |address: SocketAddr| address.port() == port && addresses.contains(&address.ip());
        if job.plan.asking.keeps()
            && job.hop.number == 0
            && let Some(connection) = self.idle.take(&job.run.task.id, good, io)
        {
            let (request, raw) = (job.plan.asking.octets(&job.hop), std::mem::take(&mut self.spare));
            let exchange = Exchange::again(connection, request, false, job.plan.body_limit, raw, io.now);
            self.owners.insert(exchange.number(), id);
            job.exchange = Some(exchange);
            return self.go_on(id, io);
        }
        match addresses.first() {
            Some(&address) => self.connect_to(id, SocketAddr::new(address, port), io),
            None => self.end(id, Err("the host has no address".into()), io),
        }
    }

    fn connect_to(&mut self, id: RunId, address: SocketAddr, io: &mut Io<'_>) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        self.next_number += 1;
        let (number, plan, url) = (self.next_number, &job.plan, &job.hop.url);
        let tls = url.tls.then(|| plan.asking.tls()).transpose();
        let tls = tls.map(|tls| tls.map(|config| (config, url.host.as_str())));
        let (request, head) = (plan.asking.octets(&job.hop), job.hop.method == "HEAD");
        let raw = std::mem::take(&mut self.spare);
        let started =
            tls.and_then(|tls| Exchange::start(address, tls, request, head, plan.body_limit, raw, number, io));
        match started {
            Ok(exchange) => {
                self.owners.insert(number, id);
                job.exchange = Some(exchange);
            }
            Err(e) => self.end(id, Err(e), io),
        }
    }

    fn go_on(&mut self, id: RunId, io: &mut Io<'_>) {
        let Some(exchange) = self.jobs.get_mut(&id).and_then(|job| job.exchange.as_mut()) else { return };
        match exchange.go_on(io.now, &mut self.chunk) {
            Ok(Progress::Waiting) => {}
            Ok(Progress::Complete) => self.answered(id, io),
            Err(e) => match exchange.was_stale() {
                Some(address) => {
                    self.hang_up(id, io);
                    self.connect_to(id, address, io);
                }
                None => self.end(id, Err(e), io),
            },
        }
    }

    /// Ends the run's connection, if it has one.
    fn hang_up(&mut self, id: RunId, io: &Io<'_>) {
        if let Some(exchange) = self.jobs.get_mut(&id).and_then(|job| job.exchange.take()) {
            self.owners.remove(&exchange.number());
            exchange.into_parts().0.close(io);
        }
    }

    /// An answer is there: it is the run's, or says where to go on.
    fn answered(&mut self, id: RunId, io: &mut Io<'_>) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let (plan, answer) = (Arc::clone(&job.plan), job.answer());
        let next = answer.as_ref().ok().filter(|answer| plan.redirects > 0 && !plan.is_good(answer.status));
        let next = next.and_then(|answer| job.hop.next(answer.status, answer.header("location")));
        match next {
            None => self.end(id, answer, io),
            Some(Err(e)) => self.end(id, Err(e), io),
            Some(Ok(hop)) if hop.number > plan.redirects => {
                self.end(id, Err(format!("the server sends us on more than {} times", plan.redirects)), io);
            }
            Some(Ok(hop)) => {
                (job.hop, job.since) = (hop, io.now);
                let host = job.hop.url.host.clone();
                self.hang_up(id, io);
                if let Some(addresses) = io.resolve(id, &host) {
                    self.connect(id, addresses, io);
                }
            }
        }
    }

    fn end(&mut self, id: RunId, answer: Result<Response, String>, io: &mut Io<'_>) {
        if let Some(finished) = self.take(id, answer, io) {
            io.finish(id, finished);
        }
    }

    /// Ends a run: with its answer, or with the error.
    fn take(&mut self, id: RunId, answer: Result<Response, String>, io: &Io<'_>) -> Option<Finished> {
        let mut job = self.jobs.remove(&id)?;
        let exchange = job.exchange.take();
        let finished = match job.plan.scrape {
            true => self.scraped(&job, answer.as_ref(), io),
            false => probed(&job, exchange.as_ref(), answer.as_ref(), io),
        };
        if let Some(exchange) = exchange {
            self.owners.remove(&exchange.number());
            let (connection, _) = exchange.into_parts();
            let task = &job.run.task;
            if job.plan.asking.keeps() && job.hop.number == 0 && answer.as_ref().is_ok_and(|answer| answer.keep_alive) {
                self.idle.keep(&task.id, task.interval, connection, io);
            } else {
                connection.close(io);
            }
        }
        if let Ok(answer) = answer
            && (self.spare.capacity()..=SPARE).contains(&answer.body.capacity())
        {
            self.spare = answer.body;
            self.spare.clear();
        }
        Some(finished)
    }

    fn scraped(&mut self, job: &Job, answer: Result<&Response, &String>, io: &Io<'_>) -> Finished {
        let task = &job.run.task;
        let instance = job.plan.url.authority();
        let target = [("instance", instance.as_str()), ("job", task.id.as_str())];
        let size = answer.map_or(0, |answer| answer.body.len());
        let scraped = answer.map_err(Clone::clone).and_then(|answer| {
            if !job.plan.is_good(answer.status) {
                return Err(format!("the target answers with status {}", answer.status));
            }
            let kind = answer.header("content-type").unwrap_or_default();
            let reading = Reading {
                table: io.table,
                labels: &task.labels,
                target: &target,
                started_ms: job.run.started_ms,
                limits: job.plan.limits,
                openmetrics: kind.starts_with("application/openmetrics-text"),
            };
            // Nearly always it is UTF-8, and looking for that alone is quick.
            let lossy = || String::from_utf8_lossy(&answer.body);
            let body = std::str::from_utf8(&answer.body).map_or_else(|_| lossy(), Cow::Borrowed);
            self.known.entry(task.id.clone()).or_default().read(&body, &reading)
        });
        let (scraped, error) = match scraped {
            Ok(scraped) => (scraped, None),
            Err(e) => (Default::default(), Some(e)),
        };
        let mut out = Gatherer::new(io.table, &task.labels, job.run.started_ms);
        let mut gauge = |name: &str, value: f64| out.add(name, Kind::Gauge, &target, value);
        gauge("up", f64::from(u8::from(error.is_none())));
        gauge("scrape_duration_seconds", io.now.saturating_duration_since(job.run.started).as_secs_f64());
        gauge("scrape_samples_scraped", scraped.samples as f64);
        gauge("scrape_samples_post_metric_relabeling", scraped.gathered.len() as f64);
        gauge("scrape_series_added", scraped.added as f64);
        gauge("scrape_response_size_bytes", size as f64);
        gauge("scrape_timeout_seconds", task.timeout.as_secs_f64());
        let own = out.done();
        let mut gathered: Gathered = scraped.gathered;
        gathered.samples.extend(own.samples);
        Finished { gathered, error }
    }
}

impl Job {
    /// Takes what has come, once it is complete.
    fn answer(&mut self) -> Result<Response, String> {
        let raw = self.exchange.as_mut().map(|exchange| std::mem::take(&mut exchange.raw)).unwrap_or_default();
        let answer = match &*self.hop.method {
            "HEAD" => response::read_head(&mut raw.as_slice()),
            _ => response::whole(raw, self.plan.body_limit),
        };
        answer.map_err(|e| e.to_string())
    }
}

/// What a probe measures.
fn probed(job: &Job, exchange: Option<&Exchange>, answer: Result<&Response, &String>, io: &Io<'_>) -> Finished {
    let plan = &job.plan;
    let mut out = Gatherer::new(io.table, &job.run.task.labels, job.run.started_ms);
    let instance = plan.url.to_string();
    let labels = [("instance", instance.as_str())];
    let mut error = None;
    match answer {
        Err(e) => error = Some(e.clone()),
        Ok(answer) => {
            let body = String::from_utf8_lossy(&answer.body);
            let matches = plan.matches.as_ref().is_none_or(|regex| regex.is_match(&body))
                && !plan.no_match.as_ref().is_some_and(|regex| regex.is_match(&body));
            if !plan.is_good(answer.status) {
                error = Some(format!("the server answers with status {}", answer.status));
            } else if !matches {
                error = Some("the body is not as it must be".into());
            }
            out.add("http_status_code", Kind::Gauge, &labels, f64::from(answer.status));
            out.add("http_response_bytes", Kind::Gauge, &labels, answer.body.len() as f64);
            out.add("http_match", Kind::Gauge, &labels, f64::from(u8::from(matches)));
        }
    }
    out.add("up", Kind::Gauge, &labels, f64::from(u8::from(error.is_none())));
    out.add("http_redirects", Kind::Gauge, &labels, f64::from(job.hop.number));
    if let Some(exchange) = exchange {
        let mut add = |phase: &str, seconds: f64| {
            let labels = [labels[0], ("phase", phase)];
            out.add("http_duration_seconds", Kind::Gauge, &labels, seconds);
        };
        if job.hop.number > 0 {
            add("redirect", job.since.saturating_duration_since(job.run.started).as_secs_f64());
        }
        phases(&exchange.phases, job.since, add);
        if let Some(end) = exchange.certificate_end() {
            out.add("http_certificate_end_timestamp_seconds", Kind::Gauge, &labels, end as f64);
        }
    }
    Finished { gathered: out.done(), error }
}

fn phases(phases: &Phases, started: Instant, mut add: impl FnMut(&str, f64)) {
    let ends = [
        ("resolve", phases.resolved),
        ("connect", phases.connected),
        ("tls", phases.secured),
        ("processing", phases.answered),
        ("transfer", phases.done),
    ];
    let mut before = started;
    for (phase, end) in ends {
        if let Some(end) = end {
            add(phase, end.saturating_duration_since(before).as_secs_f64());
            before = end;
        }
    }
}

impl HttpPlan {
    fn new(device: &Values, config: &Values) -> Result<Self, FieldError> {
        let wrong = |field: &str, reason: String| FieldError::new(format!("config.{field}"), reason);
        let url = Url::parse(device.text("url")).map_err(|e| FieldError::new("device.url", e))?;
        let path = |key: &str| Some(config.text(key)).filter(|path| !path.is_empty()).map(PathBuf::from);
        let identity = match (path("certificate"), path("key")) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            _ => return Err(wrong("certificate", "certificate and key belong together".into())),
        };
        let scrape = config.text("mode") == "scrape";
        let tls = TlsOptions { ca: path("ca"), identity, verify: config.flag("verify") };
        let asking = Asking::new(config, scrape, tls)?;
        if url.tls {
            asking.tls().map_err(|e| wrong("ca", e))?;
        }
        let regex = |key: &str| match config.text(key) {
            "" => Ok(None),
            text => Regex::new(text).map(Some).map_err(|e| wrong(key, e.to_string())),
        };
        Ok(Self {
            asking,
            redirects: config.whole("redirects"),
            scrape,
            status: config.texts("status").into_iter().map(str::to_string).collect(),
            matches: regex("match")?,
            no_match: regex("no_match")?,
            body_limit: config.whole::<usize>("body_limit_kib") << 10,
            limits: Limits {
                samples: config.whole("sample_limit"),
                labels: config.whole("label_limit"),
                label_name: config.whole("label_name_limit"),
                label_value: config.whole("label_value_limit"),
            },
            url,
        })
    }

    fn is_good(&self, status: u16) -> bool {
        let status = status.to_string();
        self.status.iter().any(|good| *good == status || (good.ends_with("xx") && good[..1] == status[..1]))
    }
}

impl Service for Http {
    fn prepare(&mut self, task: &Task) -> Result<Plan, FieldError> {
        let (device, config) = checked(&self.manifest, task)?;
        Ok(Arc::new(Arc::new(HttpPlan::new(&device, &config)?)))
    }

    fn begin(&mut self, run: Run, io: &mut Io<'_>) {
        let Some(plan) = run.plan::<Arc<HttpPlan>>().cloned() else { return };
        let id = run.id;
        let addresses = io.resolve(id, &plan.url.host);
        let (hop, since) = (plan.asking.to(plan.url.clone()), run.started);
        self.jobs.insert(id, Job { run, plan, hop, since, exchange: None });
        if let Some(addresses) = addresses {
            self.connect(id, addresses, io);
        }
    }

    fn resolved(&mut self, run: RunId, addresses: Result<Vec<IpAddr>, String>, io: &mut Io<'_>) {
        self.connect(run, addresses, io);
    }

    fn cancel(&mut self, run: RunId, io: &mut Io<'_>) -> Cancelled {
        Cancelled::Gone(self.take(run, Err("the server did not answer".into()), io).unwrap_or_default())
    }

    fn ready(&mut self, number: u64, _event: &Event, io: &mut Io<'_>) {
        match self.owners.get(&number).copied() {
            Some(run) => self.go_on(run, io),
            None => self.idle.ready(number, io),
        }
    }

    fn forget(&mut self, task: &str, io: &mut Io<'_>) {
        self.known.remove(task);
        self.idle.forget(task, io);
    }
}

#[cfg(test)]
mod tests;
