//! `http`: how a web server answers (status, phases, content, the end of its certificate), and what it says where it
//! offers Prometheus or OpenMetrics text.
//!
//! Each run has a connection of its own on the loop; a server that hangs costs nobody else anything.

mod certificate;
mod exchange;
mod scrape;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use mio::event::Event;
use regex_lite::Regex;
use rustls::ClientConfig;

use super::{checked, manifest};
use crate::sentinel::collect::{Cancelled, Finished, Gathered, Gatherer, Io, Plan, Run, Service};
use crate::sentinel::http::{Response, TlsOptions, Url, response};
use crate::sentinel::model::Kind;
use crate::sentinel::plugin::{FieldError, Manifest, Values};
use crate::sentinel::schedule::RunId;
use crate::sentinel::task::Task;
use exchange::{Exchange, Phases, Progress};
use scrape::{Known, Reading};

/// What a scrape takes, in the order of its liking.
const ACCEPT: &str = "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.5,*/*;q=0.1";

/// The service.
pub struct Http {
    manifest: Manifest,
    jobs: HashMap<RunId, Job>,
    /// What scraped targets said last time, by task.
    known: HashMap<String, Known>,
}

struct HttpPlan {
    url: Url,
    tls: Option<Arc<ClientConfig>>,
    request: Vec<u8>,
    scrape: bool,
    status: Vec<String>,
    matches: Option<Regex>,
    no_match: Option<Regex>,
    body_limit: usize,
    sample_limit: u64,
}

struct Job {
    run: Run,
    plan: Arc<HttpPlan>,
    exchange: Option<Exchange>,
}

impl Http {
    /// The service.
    #[allow(clippy::new_without_default)] // like the others, whose `new` takes something
    pub fn new() -> Self {
        Self { manifest: manifest("http"), jobs: HashMap::new(), known: HashMap::new() }
    }

    fn connect(&mut self, id: RunId, addresses: Result<Vec<IpAddr>, String>, io: &mut Io<'_>) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let plan = Arc::clone(&job.plan);
        let address =
            addresses.and_then(|all| all.first().copied().ok_or_else(|| "the host has no address".to_string()));
        let tls = plan.tls.as_ref().map(|config| (Arc::clone(config), plan.url.host.as_str()));
        let started = address.and_then(|address| {
            let address = SocketAddr::new(address, plan.url.port);
            Exchange::start(address, tls, plan.request.clone(), plan.body_limit, id.0, io)
        });
        match started {
            Ok(exchange) => job.exchange = Some(exchange),
            Err(e) => self.end(id, Some(e), io),
        }
    }

    fn end(&mut self, id: RunId, error: Option<String>, io: &mut Io<'_>) {
        if let Some(finished) = self.take(id, error, io) {
            io.finish(id, finished);
        }
    }

    /// Ends a run: with its answer, or with the error.
    fn take(&mut self, id: RunId, error: Option<String>, io: &Io<'_>) -> Option<Finished> {
        let mut job = self.jobs.remove(&id)?;
        let mut answer = Err(error.clone().unwrap_or_default());
        if let Some(exchange) = &mut job.exchange {
            exchange.end(io);
            if error.is_none() {
                let mut raw = exchange.raw.as_slice();
                answer = response::read(&mut raw, job.plan.body_limit).map_err(|e| e.to_string());
            }
        }
        let answer = answer.and_then(|answer| match job.plan.is_good(answer.status) {
            false if job.plan.scrape => Err(format!("the target answers with status {}", answer.status)),
            _ => Ok(answer),
        });
        Some(match job.plan.scrape {
            true => self.scraped(&job, answer, io),
            false => probed(&job, answer, io),
        })
    }

    fn scraped(&mut self, job: &Job, answer: Result<Response, String>, io: &Io<'_>) -> Finished {
        let task = &job.run.task;
        let instance = job.plan.url.authority();
        let target = [("instance", instance.as_str()), ("job", task.id.as_str())];
        let size = answer.as_ref().map_or(0, |answer| answer.body.len());
        let scraped = answer.and_then(|answer| {
            let kind = answer.header("content-type").unwrap_or_default();
            let reading = Reading {
                table: io.table,
                labels: &task.labels,
                target: &target,
                started_ms: job.run.started_ms,
                limit: job.plan.sample_limit,
                openmetrics: kind.starts_with("application/openmetrics-text"),
            };
            let body = String::from_utf8_lossy(&answer.body);
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

/// What a probe measures.
fn probed(job: &Job, answer: Result<Response, String>, io: &Io<'_>) -> Finished {
    let plan = &job.plan;
    let mut out = Gatherer::new(io.table, &job.run.task.labels, job.run.started_ms);
    let instance = plan.url.to_string();
    let labels = [("instance", instance.as_str())];
    let mut error = None;
    match answer {
        Err(e) => error = Some(e),
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
    if let Some(exchange) = &job.exchange {
        phases(&exchange.phases, job.run.started, |phase, seconds| {
            let labels = [labels[0], ("phase", phase)];
            out.add("http_duration_seconds", Kind::Gauge, &labels, seconds);
        });
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
        let tls = match url.tls {
            false => None,
            true => {
                let identity = match (path("certificate"), path("key")) {
                    (Some(certificate), Some(key)) => Some((certificate, key)),
                    (None, None) => None,
                    _ => return Err(wrong("certificate", "certificate and key belong together".into())),
                };
                let options = TlsOptions { ca: path("ca"), identity, verify: config.flag("verify") };
                Some(options.load().map_err(|e| wrong("ca", e.to_string()))?)
            }
        };
        let regex = |key: &str| match config.text(key) {
            "" => Ok(None),
            text => Regex::new(text).map(Some).map_err(|e| wrong(key, e.to_string())),
        };
        let scrape = config.text("mode") == "scrape";
        Ok(Self {
            request: request(&url, config, scrape)?,
            tls,
            scrape,
            status: config.texts("status").into_iter().map(str::to_string).collect(),
            matches: regex("match")?,
            no_match: regex("no_match")?,
            body_limit: config.whole::<usize>("body_limit_kib") << 10,
            sample_limit: config.whole("sample_limit"),
            url,
        })
    }

    fn is_good(&self, status: u16) -> bool {
        let status = status.to_string();
        self.status.iter().any(|good| *good == status || (good.ends_with("xx") && good[..1] == status[..1]))
    }
}

/// The request as it travels.
fn request(url: &Url, config: &Values, scrape: bool) -> Result<Vec<u8>, FieldError> {
    let mut headers = vec![
        ("Host".to_string(), url.authority()),
        ("User-Agent".into(), format!("warren-sentinel/{}", env!("CARGO_PKG_VERSION"))),
        ("Accept".into(), if scrape { ACCEPT } else { "*/*" }.into()),
        ("Connection".into(), "close".into()),
    ];
    let (method, body) = (config.text("method"), config.text("body"));
    if !body.is_empty() || method != "GET" {
        headers.push(("Content-Length".into(), body.len().to_string()));
    }
    let own = config.entries("headers").into_iter().map(|(name, value)| ("headers", name.to_string(), value));
    let secret = Some(config.text("authorization")).filter(|value| !value.is_empty());
    let secret = secret.map(|value| ("authorization", "Authorization".to_string(), value.to_string()));
    for (field, name, value) in own.chain(secret) {
        let token = |c: u8| c.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&c);
        let visible = |c: u8| c == b'\t' || (c >= b' ' && c != 0x7f);
        if name.is_empty() || !name.bytes().all(token) || !value.bytes().all(visible) {
            // The value may be a secret.
            return Err(FieldError::new(format!("config.{field}"), "holds what may not stand in a header"));
        }
        headers.retain(|(known, _)| !known.eq_ignore_ascii_case(&name));
        headers.push((name, value));
    }
    let mut octets = format!("{method} {} HTTP/1.1\r\n", url.target);
    headers.iter().for_each(|(name, value)| octets.extend([name, ": ", value, "\r\n"]));
    octets.push_str("\r\n");
    octets.push_str(body);
    Ok(octets.into_bytes())
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
        self.jobs.insert(id, Job { run, plan, exchange: None });
        if let Some(addresses) = addresses {
            self.connect(id, addresses, io);
        }
    }

    fn resolved(&mut self, run: RunId, addresses: Result<Vec<IpAddr>, String>, io: &mut Io<'_>) {
        self.connect(run, addresses, io);
    }

    fn cancel(&mut self, run: RunId, io: &mut Io<'_>) -> Cancelled {
        Cancelled::Gone(self.take(run, Some("the server did not answer".into()), io).unwrap_or_default())
    }

    fn ready(&mut self, number: u64, _event: &Event, io: &mut Io<'_>) {
        let id = RunId(number);
        let Some(exchange) = self.jobs.get_mut(&id).and_then(|job| job.exchange.as_mut()) else { return };
        match exchange.go_on(io.now) {
            Ok(Progress::Waiting) => {}
            Ok(Progress::Complete) => self.end(id, None, io),
            Err(e) => self.end(id, Some(e), io),
        }
    }

    fn forget(&mut self, task: &str, _io: &mut Io<'_>) {
        self.known.remove(task);
    }
}

#[cfg(test)]
mod tests;
