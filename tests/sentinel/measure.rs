//! How fast and how small: through the log and an encoder, and from a scrape to remote write beside others in the same run.
//! No check: `make bench-sentinel`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};
use warren::sentinel::http::{Answer, Server, TlsOptions, Url};
use warren::sentinel::log::files::Disk;
use warren::sentinel::log::{Fsync, Log, Options, Policy};
use warren::sentinel::model::{Batch, Identity, Kind, Sample, SeriesTable};
use warren::sentinel::send::{Lane, LaneOptions, Protocol};

use crate::decode::remote_write;
use crate::peers::Peer;
use crate::process::{Scratch, Sentinel, target, until};

const SERIES: usize = 20_000;
const ROUNDS: i64 = 100;

fn cpu() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    [usage.user_time(), usage.system_time()].iter().map(|time| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6).sum()
}

/// A third stands still, a third counts up, a third is any float.
fn value(series: usize, round: i64) -> f64 {
    match series % 3 {
        0 => (series % 1000) as f64,
        1 => (series as i64 * 7 + round * (series as i64 % 50)) as f64,
        _ => ((series as i64 * 31 + round * 17) % 1000) as f64 / 7.0,
    }
}

/// As in build/bench.tsv: name, value, unit, condition.
fn row(name: &str, value: f64, unit: &str, condition: &str) {
    println!("ROW\t{name}\t{value:.3}\t{unit}\t{condition}");
}

#[test]
#[ignore = "measures"]
fn the_pipeline_without_collection() {
    for (name, protocol, header, batch) in [
        ("zstd", Protocol::VictoriaMetrics, None, 2000),
        ("zstd", Protocol::VictoriaMetrics, None, 10_000),
        ("remote write 1.0", Protocol::RemoteWrite1, None, 2000),
        ("remote write 2.0", Protocol::RemoteWrite2, Some("X-Prometheus-Remote-Write-Samples-Written"), 2000),
    ] {
        let headers = header.map(|name| (name.to_string(), "1".to_string())).into_iter().collect();
        let answer = Answer { status: 204, headers, body: Vec::new() };
        let server = Server::start(([127, 0, 0, 1], 0).into(), 1 << 24, move |_| answer.clone()).unwrap();
        let scratch = Scratch::new();
        let table = Arc::new(SeriesTable::new(SERIES));
        let series: Vec<_> = (0..SERIES)
            .map(|n| {
                let labels = [
                    ("instance", format!("host-{}:9100", n / 1000)),
                    ("device", format!("device{}", n % 25)),
                    ("mode", ["idle", "user", "system", "iowait"][n % 4].to_string()),
                ];
                let name = format!("node_family_{}_seconds_total", n % 1000 / 25);
                table.intern(Identity::new(&name, Kind::Counter, labels).unwrap()).unwrap()
            })
            .collect();
        let options = Options::new(1 << 30, Policy::DropOldest, Fsync::Interval(Duration::from_secs(1)));
        let files = Arc::new(Disk::take(&scratch.path("buffer")).unwrap());
        let log = Arc::new(Log::open(files, options, table, &["one".to_string()]).unwrap());
        let lane = LaneOptions {
            name: "one".into(),
            protocol,
            url: Url::parse(&format!("http://{}/", server.address())).unwrap(),
            tls: TlsOptions::default(),
            credentials: Vec::new(),
            batch,
            flush: Duration::from_secs(1),
            timeout: Duration::from_secs(30),
            retries: 3,
            retry_first: Duration::from_secs(1),
            retry_longest: Duration::from_secs(60),
            dead_letters: None,
        };
        let lane = Lane::start(lane, &log, "bench").unwrap();
        let before = cpu();
        for round in 0..ROUNDS {
            for part in (0..SERIES).collect::<Vec<_>>().chunks(1000) {
                let sample = |&n: &usize| Sample {
                    series: Arc::clone(&series[n]),
                    timestamp_ms: 1_800_000_000_000 + round * 15_000,
                    value: value(n, round),
                };
                log.append(&Batch { samples: part.iter().map(sample).collect() }).unwrap();
            }
        }
        let samples = SERIES as f64 * ROUNDS as f64;
        until("everything sent", || (lane.stats().sent_samples as f64 >= samples).then_some(()));
        let seconds = cpu() - before;
        let condition = format!("{name}, 20,000 series, batches of {batch}");
        row("sentinel_samples_per_core_s", samples / seconds, "1/s", &condition);
        row("sentinel_wire_bytes_per_sample", lane.stats().sent_bytes as f64 / samples, "octets", &condition);
        row("sentinel_log_bytes_per_sample", log.stats().written_bytes as f64 / samples, "octets", &condition);
    }
}

/// Pages of metrics scraped by each process in the same run, and sent by remote write to one that counts.
struct Load {
    pages: usize,
    series_a_page: usize,
    interval_s: usize,
}

const LOADS: [Load; 2] =
    [Load { pages: 20, series_a_page: 1000, interval_s: 2 }, Load { pages: 50, series_a_page: 2000, interval_s: 5 }];
const WARM_UP: Duration = Duration::from_secs(10);
const MEASURED: Duration = Duration::from_secs(30);

/// Samples and octets that have arrived.
#[derive(Default)]
struct Arrived {
    samples: AtomicU64,
    octets: AtomicU64,
}

fn page(series: usize, scrape: u64) -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    for n in 0..series {
        if n % 25 == 0 {
            let _ = writeln!(text, "# TYPE node_family_{}_seconds_total counter", n / 25);
        }
        let (family, device, mode) = (n / 25, n % 25, ["idle", "user", "system", "iowait"][n % 4]);
        let value = value(n, scrape as i64);
        let _ =
            writeln!(text, "node_family_{family}_seconds_total{{device=\"device{device}\",mode=\"{mode}\"}} {value}");
    }
    text
}

/// Processor time of a process and its threads, in seconds, to the nanosecond.
pub fn processor_time(pid: u32) -> f64 {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let time = |path: std::path::PathBuf| -> f64 {
        let text = std::fs::read_to_string(path.join("schedstat")).unwrap_or_default();
        text.split(' ').next().and_then(|word| word.parse::<f64>().ok()).unwrap_or(0.0) / 1e9
    };
    threads.map(|thread| time(thread.unwrap().path())).sum()
}

pub fn resident_kib(pid: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

fn measure(name: &str, pid: u32, arrived: &Arrived, load: &Load) {
    let now = || (processor_time(pid), arrived.samples.load(Relaxed) as f64, arrived.octets.load(Relaxed) as f64);
    std::thread::sleep(WARM_UP);
    let before = now();
    std::thread::sleep(MEASURED);
    let after = now();
    let samples = after.1 - before.1;
    assert!(samples > 0.0, "{name} sent nothing");
    let Load { pages, series_a_page, interval_s } = load;
    let condition = format!("scrape to remote write, {pages} pages of {series_a_page} series each {interval_s} s");
    row(&format!("{name}_cpu_us_per_sample"), (after.0 - before.0) * 1e6 / samples, "us", &condition);
    row(&format!("{name}_scrape_wire_bytes_per_sample"), (after.2 - before.2) / samples, "octets", &condition);
    row(&format!("{name}_rss_kib"), resident_kib(pid), "KiB", &condition);
}

#[test]
#[ignore = "measures"]
fn scrape_to_remote_write_beside_vmagent_and_prometheus() {
    LOADS.iter().for_each(beside_the_others);
}

fn beside_the_others(load: &Load) {
    let series = load.series_a_page;
    let scrapes = AtomicU64::new(0);
    let pages = Server::start(([127, 0, 0, 1], 0).into(), 1024, move |_| {
        Answer::of("text/plain; version=0.0.4", page(series, scrapes.fetch_add(1, Relaxed)))
    })
    .unwrap();
    let arrived = Arc::new(Arrived::default());
    let counting = Arc::clone(&arrived);
    let receiver = Server::start(([127, 0, 0, 1], 0).into(), 1 << 26, move |request| {
        let samples = remote_write(|name| request.header(name), &request.body).len();
        counting.samples.fetch_add(samples as u64, Relaxed);
        counting.octets.fetch_add(request.body.len() as u64, Relaxed);
        Answer::status(204)
    })
    .unwrap();
    let write = format!("http://{}/write", receiver.address());

    let tasks: String = (0..load.pages)
        .map(|n| {
            format!(
                "[[task]]\nid = \"t{n}\"\nplugin = \"http\"\ninterval_ms = {}\nlabels = {{ instance = \"host-{n}:9100\" }}\n\
                 device = {{ url = \"http://{}/{n}\" }}\nconfig = {{ mode = \"scrape\" }}\n",
                load.interval_s * 1000,
                pages.address()
            )
        })
        .collect();
    for (name, kind) in [("sentinel", "prometheus"), ("sentinel_zstd", "victoriametrics")] {
        let mut sentinel = Sentinel::new(&format!(
            "sender.batch = 10000\nsender.flush_ms = 1000\n{}{tasks}",
            target("one", kind, &write)
        ));
        sentinel.start();
        measure(name, sentinel.pid(), &arrived, load);
        assert_eq!(sentinel.stop(), 0);
    }

    let targets: String = (0..load.pages)
        .map(|n| {
            format!(
                "  - targets: ['{}']\n    labels: {{ __metrics_path__: /{n}, instance: 'host-{n}:9100' }}\n",
                pages.address()
            )
        })
        .collect();
    let config = format!(
        "global: {{ scrape_interval: {0}s, scrape_timeout: {0}s }}\nscrape_configs:\n- job_name: bench\n  static_configs:\n{targets}",
        load.interval_s
    );
    if let Some(vmagent) = Peer::vmagent(&config, &write) {
        measure("vmagent", vmagent.pid(), &arrived, load);
    }
    let config = format!("{config}remote_write: [ {{ url: '{write}' }} ]\n");
    if let Some(prometheus) = Peer::prometheus_agent(&config) {
        measure("prometheus_agent", prometheus.pid(), &arrived, load);
    }
}
