//! How fast and how small, without collection: through the log and an encoder. Not a check:
//! `cargo test --release --test sentinel measure -- --ignored --nocapture`.

use std::sync::Arc;
use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};
use warren::sentinel::http::{Answer, Server, TlsOptions, Url};
use warren::sentinel::log::files::Disk;
use warren::sentinel::log::{Fsync, Log, Options, Policy};
use warren::sentinel::model::{Batch, Identity, Kind, Sample, SeriesTable};
use warren::sentinel::send::{Lane, LaneOptions, Protocol};

use crate::process::{Scratch, until};

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

#[test]
#[ignore = "measures"]
fn the_pipeline_without_collection() {
    for (name, protocol, header) in [
        ("remote write 1.0", Protocol::RemoteWrite1, None),
        ("remote write 2.0", Protocol::RemoteWrite2, Some("X-Prometheus-Remote-Write-Samples-Written")),
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
            batch: 2000,
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
        println!("{name}: sentinel_samples_per_core_s {:.0}", samples / seconds);
        println!("{name}: sentinel_wire_bytes_per_sample {:.2}", lane.stats().sent_bytes as f64 / samples);
        println!("{name}: sentinel_log_bytes_per_sample {:.2}", log.stats().written_bytes as f64 / samples);
    }
}
