//! A destination's thread: from its cursor in the log to its receiver's acknowledgement.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::dead_letter::DeadLetters;
use super::encode::{Encoded, Encoder, Origin, Protocol};
use super::gather::{Gathered, Outgoing};
use super::policy::{Verdict, judge};
use crate::outbound::{Answered, BreakerState, Clock, Guard, Policy};
use crate::sentinel::http::{Abort, Client, HttpError, Request, TlsOptions, Url};
use crate::sentinel::log::{DropReason, Log, Reader};
use crate::sentinel::secret::Secret;

/// How often a paused destination is asked whether it would take something again.
const PAUSE: Duration = Duration::from_secs(60);
/// How long to wait after the log could not be read.
const READ_PAUSE: Duration = Duration::from_secs(1);
/// Octets kept of an answer: for the log line and the dead letter.
const ANSWER: usize = 4096;

/// How one destination is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaneOptions {
    /// Its name: `[a-z0-9_-]{1,64}`. The cursor goes by it.
    pub name: String,
    /// What it speaks.
    pub protocol: Protocol,
    /// Where it is.
    pub url: Url,
    /// How it is known.
    pub tls: TlsOptions,
    /// Headers with what proves who we are.
    pub credentials: Vec<(&'static str, Secret)>,
    /// Samples sent together, 1–100,000.
    pub batch: usize,
    /// A smaller batch is sent when its first sample has waited so long.
    pub flush: Duration,
    /// For one request.
    pub timeout: Duration,
    /// Quick tries after a failed one, before the breaker opens.
    pub retries: u32,
    /// The wait before the first of them is at most this; it doubles.
    pub retry_first: Duration,
    /// No wait is longer.
    pub retry_longest: Duration,
    /// Where refused batches are kept, and how many octets of them.
    pub dead_letters: Option<(PathBuf, u64)>,
}

/// What a lane counts.
#[derive(Debug, Clone, Default)]
pub struct LaneStats {
    /// Samples that the receiver acknowledged.
    pub sent_samples: u64,
    /// Octets of the requests that it acknowledged.
    pub sent_bytes: u64,
    /// Requests by status; 0: no answer.
    pub requests: BTreeMap<u16, u64>,
    /// Requests that did not hand over their batch.
    pub errors: u64,
    /// Requests made again.
    pub retries: u64,
    /// Where the breaker stands.
    pub breaker: BreakerState,
    /// Whether the receiver does not know us (401, 403, …): data is kept until that has changed.
    pub paused: bool,
    /// Times that a receiver got the older form of remote write.
    pub fallbacks: u64,
    /// The last error, until there was a success.
    pub last_error: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Phase {
    Running = 0,
    /// Send what there is, then end; end at the first failure.
    Draining = 1,
    /// End at once.
    Ending = 2,
}

struct Shared {
    phase: AtomicU8,
    stats: Mutex<LaneStats>,
    /// Told when the phase changes.
    changed: Condvar,
}

impl Shared {
    fn stats(&self) -> MutexGuard<'_, LaneStats> {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stopping(&self) -> bool {
        self.phase.load(Ordering::Acquire) != Phase::Running as u8
    }

    fn ending(&self) -> bool {
        self.phase.load(Ordering::Acquire) == Phase::Ending as u8
    }
}

impl Clock for Shared {
    fn now(&self) -> Instant {
        Instant::now()
    }

    /// Waits, unless the lane is to stop.
    fn wait(&self, time: Duration) -> bool {
        let stats = self.stats();
        let waiting = |_: &mut LaneStats| !self.stopping();
        drop(self.changed.wait_timeout_while(stats, time, waiting).unwrap_or_else(PoisonError::into_inner));
        !self.stopping()
    }
}

/// A destination that is being served.
pub struct Lane {
    options: LaneOptions,
    log: Arc<Log>,
    shared: Arc<Shared>,
    abort: Abort,
    thread: Option<JoinHandle<()>>,
}

impl Lane {
    /// Starts the thread. The log must know the destination.
    pub fn start(options: LaneOptions, log: &Arc<Log>, sentinel: &str) -> Result<Self, HttpError> {
        let client = Client::new(options.url.clone(), &options.tls, options.timeout)?;
        let shared = Arc::new(Shared {
            phase: AtomicU8::new(Phase::Running as u8),
            stats: Mutex::default(),
            changed: Condvar::new(),
        });
        let abort = client.abort_handle();
        let policy = Policy {
            failures: options.retries.saturating_add(1),
            open: options.retry_longest,
            first: options.retry_first,
            longest: options.retry_longest,
            deadline: options.timeout,
        };
        let guard = Guard::new(policy, log.id() ^ Arc::as_ptr(&shared) as u64);
        let work = Work {
            reader: Reader::new(log, &options.name),
            log: Arc::clone(log),
            protocol: options.protocol.clone(),
            proven: false,
            gathered: Gathered::default(),
            since: Instant::now(),
            encoder: Encoder::default(),
            origin: Origin { sentinel: sentinel.to_string(), log: log.id() },
            client,
            guard,
            letters: options
                .dead_letters
                .clone()
                .map(|(directory, limit)| DeadLetters::new(directory, &options.name, limit)),
            options: options.clone(),
            shared: Arc::clone(&shared),
        };
        let thread = thread::Builder::new()
            .name(format!("to-{}", options.name))
            .spawn(move || work.run())
            .map_err(HttpError::Io)?;
        Ok(Self { options, log: Arc::clone(log), shared, abort, thread: Some(thread) })
    }

    /// What it was started with.
    pub fn options(&self) -> &LaneOptions {
        &self.options
    }

    /// What it has counted.
    pub fn stats(&self) -> LaneStats {
        self.shared.stats().clone()
    }

    /// Lets it send what is in the log and then end. Failures are not tried again.
    pub fn drain(&self) {
        self.enter(Phase::Draining);
    }

    /// Whether its thread has ended.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    fn enter(&self, phase: Phase) {
        // Under the lock, so that nobody looks before and waits after.
        let stats = self.shared.stats();
        self.shared.phase.fetch_max(phase as u8, Ordering::AcqRel);
        drop(stats);
        self.shared.changed.notify_all();
        self.log.wake();
    }
}

impl Drop for Lane {
    /// Ends it at once: what was not acknowledged stays in the log.
    fn drop(&mut self) {
        self.enter(Phase::Ending);
        self.abort.abort();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What the thread owns.
struct Work {
    options: LaneOptions,
    shared: Arc<Shared>,
    log: Arc<Log>,
    reader: Reader,
    gathered: Gathered,
    /// When the first of what is gathered was read.
    since: Instant,
    /// The form in use: that of the options or the one fallen back to.
    protocol: Protocol,
    proven: bool,
    encoder: Encoder,
    origin: Origin,
    client: Client,
    guard: Guard,
    letters: Option<DeadLetters>,
}

/// Whether a lane goes on.
#[derive(PartialEq, Eq)]
enum Next {
    Go,
    End,
}

impl Work {
    fn run(mut self) {
        while let Some(batch) = self.gather() {
            if self.deliver(batch) == Next::End {
                break;
            }
        }
    }

    /// The next batch: a full one, or what there is when its first sample has waited long enough. Nothing: the lane is
    /// to end.
    fn gather(&mut self) -> Option<Outgoing> {
        loop {
            if self.shared.ending() {
                return None;
            }
            self.read();
            let (have, waited) = (self.gathered.len(), self.since.elapsed());
            let stopping = self.shared.stopping();
            if have >= self.options.batch || (have > 0 && (stopping || waited >= self.options.flush)) {
                return self.gathered.take(self.options.batch);
            }
            if stopping {
                return None;
            }
            let time = if have > 0 { self.options.flush - waited } else { Duration::from_secs(3600) };
            let shared = &self.shared;
            self.log.wait(self.reader.position(), time, || shared.stopping());
        }
    }

    /// Reads until there is enough for a batch or nothing more.
    fn read(&mut self) {
        while self.gathered.len() < self.options.batch {
            match self.reader.next_block() {
                Ok(Some(block)) => {
                    if self.gathered.len() == 0 {
                        self.since = Instant::now();
                    }
                    self.gathered.push(block, self.reader.position());
                }
                Ok(None) => return,
                Err(e) => {
                    self.fail(format!("the buffer cannot be read: {e}"));
                    if !self.shared.wait(READ_PAUSE) {
                        return;
                    }
                }
            }
        }
    }

    /// Sends a batch, in parts if need be, until it is acknowledged or refused.
    fn deliver(&mut self, batch: Outgoing) -> Next {
        let end = batch.end;
        let mut parts = vec![batch];
        while let Some(part) = parts.pop() {
            self.log.begin(&self.options.name, part.first..end);
            match self.settle(&part) {
                Settled::Delivered => self.log.acknowledge(&self.options.name, part.end),
                Settled::Refused(status, answer) => self.refuse(part, status, &answer),
                Settled::Split(status, answer) => match part.split() {
                    Ok((first, second)) => parts.extend([second, first]),
                    Err(single) => self.refuse(single, status, &answer),
                },
                Settled::Stopped => {
                    self.log.release(&self.options.name, DropReason::Size);
                    return Next::End;
                }
            }
        }
        Next::Go
    }

    /// Makes requests until it is clear what becomes of a part.
    fn settle(&mut self, part: &Outgoing) -> Settled {
        let mut encoded = self.encode(part);
        loop {
            let deadline = match self.guard.admit(Instant::now()) {
                Ok(deadline) => deadline,
                Err(left) if self.shared.wait(left) => continue,
                Err(_) => return Settled::Stopped,
            };
            self.shared.stats().breaker = self.guard.state();
            let (wait, sentence) = match self.request(&encoded, deadline) {
                Ok(response) => {
                    let status = response.status;
                    *self.shared.stats().requests.entry(status).or_default() += 1;
                    let verdict = judge(&self.protocol, self.proven, &response);
                    if !matches!(verdict, Verdict::Retry(_)) {
                        self.guard.note(Instant::now(), Answered::Reached);
                    }
                    let answer = String::from_utf8_lossy(&response.body);
                    let answer = answer.lines().next().unwrap_or_default();
                    let sentence = format!("{}: status {status} {answer}", self.options.url);
                    match verdict {
                        Verdict::Delivered => {
                            self.proven = true;
                            self.succeed(part.samples.len(), encoded.body.len());
                            return Settled::Delivered;
                        }
                        Verdict::Refused | Verdict::Split => {
                            self.fail(sentence);
                            return match verdict {
                                Verdict::Split => Settled::Split(status, response.body),
                                _ => Settled::Refused(status, response.body),
                            };
                        }
                        Verdict::Fallback => {
                            log::info!("{}: remote write 1.0 in snappy from now on ({status})", self.options.name);
                            self.protocol = Protocol::RemoteWrite1;
                            self.shared.stats().fallbacks += 1;
                            encoded = self.encode(part);
                            continue;
                        }
                        Verdict::Pause => {
                            self.shared.stats().paused = true;
                            (PAUSE, sentence)
                        }
                        Verdict::Retry(after) => (self.failed(after), sentence),
                    }
                }
                Err(error) => {
                    *self.shared.stats().requests.entry(0).or_default() += 1;
                    (self.failed(None), format!("{}: {error}", self.options.url))
                }
            };
            self.fail(sentence);
            if self.shared.stopping() || !self.shared.wait(wait) {
                return Settled::Stopped;
            }
            self.shared.stats().retries += 1;
        }
    }

    fn encode(&mut self, part: &Outgoing) -> Encoded {
        self.encoder.encode(&self.protocol, &self.options.url.target, &self.origin, part)
    }

    /// A call failed: how long to wait now.
    fn failed(&mut self, asked: Option<Duration>) -> Duration {
        self.guard.note(Instant::now(), Answered::Failed(asked))
    }

    fn request(&mut self, encoded: &Encoded, deadline: Instant) -> Result<crate::sentinel::http::Response, HttpError> {
        let credentials = self.options.credentials.iter().map(|(name, value)| (*name, value.reveal()));
        let headers: Vec<(&str, &str)> =
            encoded.headers.iter().map(|(name, value)| (*name, value.as_str())).chain(credentials).collect();
        let request =
            Request { method: "POST", target: &encoded.target, headers: &headers, body: &encoded.body, keep: ANSWER };
        self.client.send_by(&request, deadline)
    }

    fn refuse(&mut self, part: Outgoing, status: u16, answer: &[u8]) {
        if let Some(letters) = &self.letters
            && let Err(e) = letters.keep(status, answer, &part)
        {
            log::warn!("{}: a refused batch cannot be kept: {e}", self.options.name);
        }
        self.log.refuse(&self.options.name, part.end, part.samples.len() as u64);
    }

    fn succeed(&mut self, samples: usize, octets: usize) {
        let mut stats = self.shared.stats();
        stats.sent_samples += samples as u64;
        stats.sent_bytes += octets as u64;
        stats.breaker = self.guard.state();
        stats.paused = false;
        if stats.last_error.take().is_some() {
            log::info!("{}: works again", self.options.name);
        }
    }

    fn fail(&mut self, sentence: String) {
        let mut stats = self.shared.stats();
        stats.errors += 1;
        stats.breaker = self.guard.state();
        // Once per kind of failure, not once per try.
        if stats.last_error.as_ref() != Some(&sentence) {
            log::warn!("{}: {sentence}", self.options.name);
            stats.last_error = Some(sentence);
        }
    }
}

/// What became of a part.
enum Settled {
    Delivered,
    Refused(u16, Vec<u8>),
    Split(u16, Vec<u8>),
    Stopped,
}
