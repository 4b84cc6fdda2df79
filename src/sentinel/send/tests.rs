//! Lanes against receivers that misbehave.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use decode::Got;

use super::{Lane, LaneOptions, Protocol, gunzip};
use crate::outbound::BreakerState;
use crate::sentinel::http::{Answer, Server, ServerRequest, TlsOptions, Url};
use crate::sentinel::log::files::Memory;
use crate::sentinel::log::{DropReason, Fsync, Log, Options, Policy};
use crate::sentinel::model::{Batch, Identity, Kind, Sample, SeriesTable, stale_marker};
use crate::sentinel::secret::Secret;

#[path = "../../../tests/sentinel/decode.rs"]
pub mod decode;

/// Numbers below what is asked for, the same from the same seed: what the compressors are tried with.
pub fn pseudo_random(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed | 1;
    move |below| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    }
}

/// Only a guard against a hang.
const GUARD: Duration = Duration::from_secs(120);

fn decode_core(raw: &[u8]) -> Vec<Got> {
    let json: serde_json::Value = serde_json::from_slice(raw).unwrap();
    let of = |sample: &serde_json::Value| {
        let mut labels = vec![("__name__".to_string(), sample["name"].as_str().unwrap().to_string())];
        for (name, value) in sample["labels"].as_object().unwrap() {
            labels.push((name.clone(), value.as_str().unwrap().to_string()));
        }
        let value = match sample["value"].as_str() {
            Some("NaN") => f64::NAN,
            Some("+Inf") => f64::INFINITY,
            Some("-Inf") => f64::NEG_INFINITY,
            Some("stale") => stale_marker(),
            Some(other) => panic!("{other}"),
            None => sample["value"].as_f64().unwrap(),
        };
        Got { labels, timestamp: sample["timestamp"].as_i64().unwrap(), bits: value.to_bits() }
    };
    json["samples"].as_array().unwrap().iter().map(of).collect()
}

#[derive(Default)]
struct Receiver {
    /// Answers to give before the usual one.
    script: VecDeque<Answer>,
    usual: Option<Answer>,
    requests: Vec<ServerRequest>,
    times: Vec<Instant>,
    got: Vec<Got>,
}

/// A receiver that says what it is told to and remembers what it accepted.
struct Peer {
    server: Server,
    state: Arc<(Mutex<Receiver>, Condvar)>,
}

impl Peer {
    fn new(usual: Answer) -> Self {
        let state = Arc::new((Mutex::new(Receiver { usual: Some(usual), ..Receiver::default() }), Condvar::new()));
        let shared = Arc::clone(&state);
        let answer = move |request: &ServerRequest| {
            let state = &mut *shared.0.lock().unwrap();
            let answer = state.script.pop_front().or(state.usual.clone()).unwrap();
            if (200..300).contains(&answer.status) {
                let decoded = match request.header("content-encoding") {
                    Some("gzip") => decode_core(&gunzip(&request.body, 1 << 24).unwrap()),
                    _ => decode::remote_write(|name| request.header(name), &request.body),
                };
                state.got.extend(decoded);
            }
            let (method, target, headers) = (request.method.clone(), request.target.clone(), request.headers.clone());
            state.requests.push(ServerRequest { method, target, headers, body: request.body.clone() });
            state.times.push(Instant::now());
            shared.1.notify_all();
            answer
        };
        Self { server: Server::start(([127, 0, 0, 1], 0).into(), 1 << 24, answer).unwrap(), state }
    }

    fn script(&self, answers: &[Answer]) {
        self.state.0.lock().unwrap().script.extend(answers.iter().cloned());
    }

    /// Waits until what it knows satisfies `enough`.
    fn until<T>(&self, what: &str, enough: impl Fn(&Receiver) -> Option<T>) -> T {
        let end = Instant::now() + GUARD;
        let mut state = self.state.0.lock().unwrap();
        loop {
            if let Some(result) = enough(&state) {
                return result;
            }
            assert!(Instant::now() < end, "{what} did not happen");
            state = self.state.1.wait_timeout(state, Duration::from_secs(1)).unwrap().0;
        }
    }

    fn samples(&self, count: usize) -> Vec<Got> {
        self.until("enough samples", |state| (state.got.len() >= count).then(|| state.got.clone()))
    }
}

struct Bench {
    log: Arc<Log>,
    table: Arc<SeriesTable>,
    next: u64,
}

impl Bench {
    fn new(destinations: &[&str]) -> Self {
        let table = Arc::new(SeriesTable::new(1000));
        let names: Vec<String> = destinations.iter().map(|name| name.to_string()).collect();
        let options = Options::new(1 << 24, Policy::DropOldest, Fsync::Never);
        let log = Log::open(Arc::new(Memory::default()), options, Arc::clone(&table), &names).unwrap();
        Self { log: Arc::new(log), table, next: 0 }
    }

    fn append(&mut self, count: usize) {
        let samples = (self.next..self.next + count as u64)
            .map(|n| {
                let labels = [("job", "a".to_string()), ("Zone", format!("z{}", n % 7))];
                let identity = Identity::new("value_total", Kind::Counter, labels).unwrap();
                let series = self.table.intern(identity).unwrap();
                Sample { series, timestamp_ms: n as i64, value: n as f64 / 4.0 }
            })
            .collect();
        self.next += count as u64;
        self.log.append(&Batch { samples }).unwrap();
    }

    /// What was appended, as it must arrive.
    fn expected(&self) -> Vec<Got> {
        (0..self.next)
            .map(|n| {
                let labels = [("Zone", format!("z{}", n % 7)), ("__name__", "value_total".into()), ("job", "a".into())];
                let labels = labels.map(|(name, value)| (name.to_string(), value)).to_vec();
                Got { labels, timestamp: n as i64, bits: (n as f64 / 4.0).to_bits() }
            })
            .collect()
    }

    fn lane(&self, name: &str, protocol: Protocol, peer: &Peer) -> LaneOptions {
        LaneOptions {
            name: name.into(),
            protocol,
            url: Url::parse(&format!("http://{}/write", peer.server.address())).unwrap(),
            tls: TlsOptions::default(),
            credentials: Vec::new(),
            batch: 100,
            flush: Duration::from_millis(10),
            timeout: Duration::from_secs(60),
            retries: 3,
            retry_first: Duration::from_millis(4),
            retry_longest: Duration::from_millis(20),
            dead_letters: None,
        }
    }
}

fn sorted(mut got: Vec<Got>) -> Vec<Got> {
    got.sort_by_key(|got| got.timestamp);
    got.iter_mut().for_each(|got| got.labels.sort());
    got
}

fn status(status: u16) -> Answer {
    Answer::status(status)
}

fn with(status: u16, name: &str, value: &str) -> Answer {
    Answer { headers: vec![(name.into(), value.into())], ..Answer::status(status) }
}

const SECOND_FORM: &str = "X-Prometheus-Remote-Write-Samples-Written";

#[test]
fn every_protocol_delivers_every_value_once_and_204_and_202_are_success() {
    for (protocol, usual) in [
        (Protocol::RemoteWrite1, status(204)),
        (Protocol::RemoteWrite2, with(204, SECOND_FORM, "1")),
        (Protocol::VictoriaMetrics, status(204)),
        (Protocol::Core, status(202)),
    ] {
        let peer = Peer::new(usual);
        let mut bench = Bench::new(&["one"]);
        bench.append(250);
        let lane = Lane::start(bench.lane("one", protocol.clone(), &peer), &bench.log, "s").unwrap();
        for _ in 0..7 {
            bench.append(33);
        }
        let got = peer.samples(bench.next as usize);
        assert_eq!(sorted(got), sorted(bench.expected()), "{protocol:?}");
        // The receiver's answer may be a moment older than its acknowledgement.
        let end = Instant::now() + GUARD;
        while bench.log.stats().pending["one"].0 > 0 {
            assert!(Instant::now() < end);
            std::thread::sleep(Duration::from_millis(1));
        }
        let stats = lane.stats();
        assert_eq!((stats.sent_samples, stats.errors, stats.retries), (bench.next, 0, 0));
    }
}

#[test]
fn a_full_batch_does_not_wait_for_the_flush_interval() {
    let peer = Peer::new(status(204));
    let mut bench = Bench::new(&["one"]);
    bench.append(1050);
    let options = LaneOptions { flush: Duration::from_secs(3600), ..bench.lane("one", Protocol::RemoteWrite1, &peer) };
    let lane = Lane::start(options, &bench.log, "s").unwrap();
    peer.samples(1000);
    assert_eq!(peer.until("requests", |state| Some(state.requests.len())), 10);
    // What is left goes when the lane is to end.
    lane.drain();
    assert_eq!(sorted(peer.samples(1050)), sorted(bench.expected()));
}

#[test]
fn remote_write_has_its_headers_and_labels_sorted_with_the_name_among_them() {
    let peer = Peer::new(status(204));
    let mut bench = Bench::new(&["one"]);
    bench.append(1);
    let credentials = vec![("Authorization", Secret::new("Bearer t".into()))];
    let options = LaneOptions { credentials, ..bench.lane("one", Protocol::RemoteWrite1, &peer) };
    let _lane = Lane::start(options, &bench.log, "s").unwrap();
    let got = peer.samples(1);
    assert_eq!(got, bench.expected());
    peer.until("a request", |state| {
        let request = state.requests.first()?;
        assert_eq!((&*request.method, &*request.target), ("POST", "/write"));
        for (name, value) in [
            ("content-encoding", "snappy"),
            ("content-type", "application/x-protobuf"),
            ("x-prometheus-remote-write-version", "0.1.0"),
            ("authorization", "Bearer t"),
        ] {
            assert_eq!(request.header(name), Some(value));
        }
        assert!(request.header("user-agent").unwrap().starts_with("warren-sentinel/"));
        Some(())
    });
}

#[test]
fn edge_values_arrive_to_the_bit() {
    let values = [0.0, -0.0, f64::INFINITY, f64::NEG_INFINITY, f64::NAN, stale_marker(), 1e308, 1e-308, 5e-324, 0.1];
    for (protocol, usual) in [
        (Protocol::RemoteWrite1, status(200)),
        (Protocol::RemoteWrite2, with(200, SECOND_FORM, "1")),
        (Protocol::VictoriaMetrics, status(200)),
        (Protocol::Core, status(200)),
    ] {
        let peer = Peer::new(usual);
        let bench = Bench::new(&["one"]);
        let labels = [("text", "ä \"q\"\n\\".to_string()), ("long", "x".repeat(5000))];
        let series = bench.table.intern(Identity::new("edge", Kind::Gauge, labels).unwrap()).unwrap();
        let sample = |(n, &value): (usize, &f64)| Sample { series: series.clone(), timestamp_ms: n as i64, value };
        bench.log.append(&Batch { samples: values.iter().enumerate().map(sample).collect() }).unwrap();
        let _lane = Lane::start(bench.lane("one", protocol, &peer), &bench.log, "s").unwrap();
        let got = peer.samples(values.len());
        let bits: Vec<u64> = got.iter().map(|got| got.bits).collect();
        assert_eq!(bits, values.map(f64::to_bits));
        let label = |name: &str| got[0].labels.iter().find(|(known, _)| known == name).unwrap().1.clone();
        assert_eq!((label("text").as_str(), label("long").len()), ("ä \"q\"\n\\", 5000));
    }
}

#[test]
fn what_is_to_be_tried_again_is_and_nothing_is_lost_or_sent_twice() {
    let peer = Peer::new(status(204));
    let mut bench = Bench::new(&["one"]);
    let again = [408, 429, 500, 502, 503, 504, 500, 500];
    peer.script(&again.map(status));
    bench.append(250);
    let lane = Lane::start(bench.lane("one", Protocol::RemoteWrite1, &peer), &bench.log, "s").unwrap();
    assert_eq!(sorted(peer.samples(250)), sorted(bench.expected()));
    let stats = lane.stats();
    assert_eq!((stats.errors, stats.retries), (8, 8));
    assert!(bench.log.stats().dropped.is_empty());
}

#[test]
fn retry_after_is_waited_for() {
    let peer = Peer::new(status(204));
    let mut bench = Bench::new(&["one"]);
    peer.script(&[with(429, "Retry-After", "1")]);
    bench.append(10);
    let _lane = Lane::start(bench.lane("one", Protocol::RemoteWrite1, &peer), &bench.log, "s").unwrap();
    peer.samples(10);
    let waited = peer.until("two requests", |state| Some(*state.times.get(1)? - state.times[0]));
    assert!(waited >= Duration::from_millis(950), "{waited:?}");
}

#[test]
fn what_a_receiver_refuses_is_counted_kept_aside_and_holds_up_nothing() {
    let directory = std::env::temp_dir().join(format!("warren-dead-letters-{}", std::process::id()));
    for refusal in [400, 404, 409, 415, 422] {
        let peer = Peer::new(status(204));
        let mut bench = Bench::new(&["one"]);
        peer.script(&[status(refusal)]);
        bench.append(250);
        let dead_letters = Some((directory.clone(), 1 << 20));
        let options = LaneOptions { dead_letters, ..bench.lane("one", Protocol::RemoteWrite1, &peer) };
        let _lane = Lane::start(options, &bench.log, "s").unwrap();
        let got = sorted(peer.samples(150));
        assert_eq!(got, sorted(bench.expected().split_off(100)));
        assert_eq!(bench.log.stats().dropped[&("one".to_string(), DropReason::Rejected)], 100);
        let kept = std::fs::read_to_string(directory.join("one.rejected")).unwrap();
        let last: serde_json::Value = serde_json::from_str(kept.lines().last().unwrap()).unwrap();
        assert_eq!(
            (last["status"].as_u64(), last["samples"].as_array().unwrap().len()),
            (Some(u64::from(refusal)), 100)
        );
    }
    std::fs::remove_dir_all(directory).unwrap();
}

#[test]
fn the_dead_letter_file_is_bounded() {
    let directory = std::env::temp_dir().join(format!("warren-dead-letters-bound-{}", std::process::id()));
    let peer = Peer::new(status(400));
    let mut bench = Bench::new(&["one"]);
    bench.append(5000);
    let options = LaneOptions {
        dead_letters: Some((directory.clone(), 60_000)),
        ..bench.lane("one", Protocol::RemoteWrite1, &peer)
    };
    let lane = Lane::start(options, &bench.log, "s").unwrap();
    peer.until("all requests", |state| (state.requests.len() >= 50).then_some(()));
    lane.drain();
    drop(lane);
    let sizes: Vec<u64> =
        std::fs::read_dir(&directory).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).collect();
    assert_eq!(sizes.len(), 2);
    assert!(sizes.iter().all(|&size| size <= 30_000), "{sizes:?}");
    std::fs::remove_dir_all(directory).unwrap();
}

#[test]
fn a_batch_that_is_too_large_is_split_until_it_fits() {
    let peer = Peer::new(status(204));
    let mut bench = Bench::new(&["one"]);
    peer.script(&[status(413), status(413), status(204), status(413)]);
    bench.append(100);
    let _lane = Lane::start(bench.lane("one", Protocol::RemoteWrite1, &peer), &bench.log, "s").unwrap();
    assert_eq!(sorted(peer.samples(100)), sorted(bench.expected()));
    assert!(bench.log.stats().dropped.is_empty());
}

#[test]
fn a_receiver_that_does_not_know_us_pauses_the_lane_and_loses_nothing() {
    for refusal in [401, 403] {
        let peer = Peer::new(status(refusal));
        let mut bench = Bench::new(&["one"]);
        bench.append(100);
        let lane = Lane::start(bench.lane("one", Protocol::RemoteWrite1, &peer), &bench.log, "s").unwrap();
        peer.until("a request", |state| (!state.requests.is_empty()).then_some(()));
        let end = Instant::now() + GUARD;
        while !lane.stats().paused {
            assert!(Instant::now() < end);
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(lane.stats().breaker, BreakerState::Closed);
        drop(lane);
        assert_eq!(bench.log.stats().pending["one"].0, 100);
        assert!(bench.log.stats().dropped.is_empty());
        // Somebody has put it right.
        peer.state.0.lock().unwrap().usual = Some(status(204));
        let _lane = Lane::start(bench.lane("one", Protocol::RemoteWrite1, &peer), &bench.log, "s").unwrap();
        assert_eq!(sorted(peer.samples(100)), sorted(bench.expected()));
    }
}

#[test]
fn the_newer_forms_fall_back_to_the_first_and_stay_there() {
    use Protocol::{RemoteWrite2, VictoriaMetrics};
    for (protocol, refusal, form) in [
        (RemoteWrite2, 415, "snappy 2.0.0"),
        (RemoteWrite2, 400, "snappy 2.0.0"),
        (VictoriaMetrics, 415, "zstd 1"),
        (VictoriaMetrics, 400, "zstd 1"),
    ] {
        let peer = Peer::new(status(204));
        let mut bench = Bench::new(&["one"]);
        peer.script(&[status(refusal)]);
        bench.append(300);
        let lane = Lane::start(bench.lane("one", protocol, &peer), &bench.log, "s").unwrap();
        assert_eq!(sorted(peer.samples(300)), sorted(bench.expected()));
        let forms = peer.until("requests", |state| {
            let form = |request: &ServerRequest| {
                let version = ["x-prometheus-remote-write-version", "x-victoriametrics-remote-write-version"];
                let version = version.iter().find_map(|name| request.header(name));
                format!("{} {}", request.header("content-encoding").unwrap(), version.unwrap())
            };
            Some(state.requests.iter().map(form).collect::<Vec<_>>())
        });
        assert_eq!(forms, [form, "snappy 0.1.0", "snappy 0.1.0", "snappy 0.1.0"]);
        assert_eq!(lane.stats().fallbacks, 1);
    }
}

#[test]
fn three_destinations_one_dead_one_failing_one_slow_cost_the_healthy_one_nothing() {
    let names = ["healthy", "dead", "failing", "slow"];
    let mut bench = Bench::new(&names);
    let (healthy, failing) = (Peer::new(status(204)), Peer::new(status(204)));
    failing.script(&[500, 204].repeat(20).into_iter().map(status).collect::<Vec<_>>());
    let gate = Arc::new((Mutex::new(false), Condvar::new()));
    let for_server = Arc::clone(&gate);
    let slow = Server::start(([127, 0, 0, 1], 0).into(), 1 << 24, move |_| {
        let open = for_server.0.lock().unwrap();
        drop(for_server.1.wait_while(open, |open| !*open).unwrap());
        status(204)
    })
    .unwrap();
    let dead = Peer::new(status(204));
    let mut lanes = Vec::new();
    for (name, peer) in [("healthy", &healthy), ("failing", &failing), ("dead", &dead)] {
        let mut options = bench.lane(name, Protocol::RemoteWrite1, peer);
        if name == "dead" {
            // Nobody listens on port 9 of this machine.
            options.url = Url::parse("http://127.0.0.1:9/").unwrap();
        }
        lanes.push(Lane::start(options, &bench.log, "s").unwrap());
    }
    let mut options = bench.lane("slow", Protocol::RemoteWrite1, &healthy);
    options.url = Url::parse(&format!("http://{}/", slow.address())).unwrap();
    lanes.push(Lane::start(options, &bench.log, "s").unwrap());
    for _ in 0..30 {
        bench.append(100);
    }
    // Each sample once and in order, while the slow one has not answered anything yet.
    let got = healthy.samples(3000);
    assert_eq!(got.len(), 3000);
    let times: BTreeMap<_, Vec<i64>> = got.iter().fold(BTreeMap::new(), |mut times, got| {
        times.entry(got.labels.clone()).or_insert_with(Vec::new).push(got.timestamp);
        times
    });
    assert!(times.values().all(|times| times.is_sorted_by(|a, b| a < b)));
    assert_eq!(sorted(got), sorted(bench.expected()));
    assert_eq!(sorted(failing.samples(3000)), sorted(bench.expected()));
    assert_eq!(lanes[3].stats().sent_samples, 0);
    assert_eq!(bench.log.stats().pending["dead"].0, 3000);
    assert!(lanes[2].stats().errors > 0);
    assert!(bench.log.stats().dropped.is_empty());
    *gate.0.lock().unwrap() = true;
    gate.1.notify_all();
}

#[test]
fn an_empty_lane_ends_at_once() {
    let peer = Peer::new(status(204));
    let bench = Bench::new(&["one"]);
    let lane = Lane::start(bench.lane("one", Protocol::RemoteWrite1, &peer), &bench.log, "s").unwrap();
    lane.drain();
    let end = Instant::now() + GUARD;
    while !lane.is_finished() {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_secret_shows_in_no_debug_form() {
    let peer = Peer::new(status(401));
    let bench = Bench::new(&["one"]);
    let credentials = vec![("Authorization", Secret::new("Bearer hunter2".into()))];
    let options = LaneOptions { credentials, ..bench.lane("one", Protocol::RemoteWrite1, &peer) };
    assert!(!format!("{options:?}").contains("hunter2"));
}
