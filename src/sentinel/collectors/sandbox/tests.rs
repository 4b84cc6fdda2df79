use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use super::*;
use crate::sentinel::model::SeriesTable;

/// A control socket that answers each request with what `answer` gives for its line without the tag; none: hangs up.
fn node(answer: impl Fn(&str) -> Option<String> + Send + 'static) -> (PathBuf, std::thread::JoinHandle<()>) {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("warren-sandboxes-{}-{number}", std::process::id()));
    let listener = UnixListener::bind(&path).unwrap();
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        for line in BufReader::new(stream.try_clone().unwrap()).lines() {
            let Ok(line) = line else { return };
            let (tag, rest) = line.split_once(' ').unwrap();
            let Some(answer) = answer(rest) else { return };
            for line in answer.lines() {
                if writeln!(stream, "{tag} {line}").is_err() {
                    return;
                }
            }
        }
    });
    (path, thread)
}

fn measured(plan: &SandboxPlan, time: Duration) -> (Result<(), Error>, BTreeMap<String, f64>) {
    let (table, labels) = (Arc::new(SeriesTable::new(100_000)), BTreeMap::new());
    let mut out = Gatherer::new(&table, &labels, 1);
    let result = plan.measure(&mut out, Instant::now() + time);
    let _ = std::fs::remove_file(&plan.socket);
    (result, out.done().samples.iter().map(|sample| (sample.series.to_string(), sample.value)).collect())
}

const INFO: &str = "ok id=n1 name=rack2 version=0.1.0 status=healthy started_ms=2000 kernel=6.12 cpus=4 memory_mib=100";

fn plan(socket: PathBuf) -> SandboxPlan {
    SandboxPlan { socket, labels: vec!["team".into()], most: 100 }
}

#[test]
fn what_the_node_says_of_its_sandboxes_becomes_series_in_base_units() {
    let (socket, thread) = node(|request| {
        Some(match request {
            "node.info" => INFO.into(),
            "sandbox.list" => "item id=a name=web state=running template=base vcpus=2 label=\"team=red\" label=\"x=y\" started_ms=5000\n\
                               item id=b state=stopped template=base\nok".into(),
            "sandbox.stats a" => "item disk=root reads=3 read_bytes=4096 queue=1 latency_us=1,0,2\n\
                                  ok id=a state=running cpu_ms=1500 memory_resident_kib=2 exits=7 exits_io=5 kvm_exits=9 kvm_exits_halt=4 net_tx_dropped_mac=1 surprise=1"
                .into(),
            _ => return None,
        })
    });
    let (result, values) = measured(&plan(socket), Duration::from_secs(60));
    result.unwrap();
    thread.join().unwrap();
    let of = |name: &str, more: &str| {
        let comma = if more.is_empty() { "" } else { "," };
        // Labels are in alphabetical order.
        let mut labels: Vec<String> =
            format!("label_team=\"red\",name=\"web\",sandbox=\"a\",template=\"base\"{comma}{more}")
                .split(',')
                .map(str::to_string)
                .collect();
        labels.sort();
        values.get(&format!("{name}{{{}}}", labels.join(","))).copied()
    };
    assert_eq!(values["warren_node_memory_bytes"], 100.0 * 1024.0 * 1024.0);
    assert_eq!(values["warren_node_healthy"], 1.0);
    assert_eq!(values["warren_sandboxes{state=\"running\"}"], 1.0);
    assert_eq!(values["warren_sandboxes{state=\"paused\"}"], 0.0);
    assert_eq!(values["warren_sandboxes_unanswered"], 0.0);
    assert_eq!(of("warren_sandbox_cpu_seconds_total", ""), Some(1.5));
    assert_eq!(of("warren_sandbox_memory_resident_bytes", ""), Some(2048.0));
    assert_eq!(of("warren_sandbox_vcpus", ""), Some(2.0));
    assert_eq!(of("warren_sandbox_exits_total", "reason=\"all\""), Some(7.0));
    assert_eq!(of("warren_sandbox_exits_total", "reason=\"io\""), Some(5.0));
    assert_eq!(of("warren_sandbox_kvm_exits_total", "reason=\"halt\""), Some(4.0));
    assert_eq!(of("warren_sandbox_network_transmit_drop_total", "reason=\"mac\""), Some(1.0));
    assert_eq!(of("warren_sandbox_disk_read_bytes_total", "disk=\"root\""), Some(4096.0));
    let bucket = |le: &str| of("warren_sandbox_disk_latency_seconds_bucket", &format!("disk=\"root\",le=\"{le}\""));
    assert_eq!((bucket("0.000001"), bucket("0.000002"), bucket("+Inf")), (Some(1.0), Some(1.0), Some(3.0)));
    assert!(!values.keys().any(|name| name.contains("surprise") || name.contains("sandbox=\"b\"")));
}

#[test]
fn a_sandbox_that_does_not_answer_costs_only_itself() {
    let (socket, thread) = node(|request| {
        Some(match request {
            "node.info" => INFO.into(),
            "sandbox.list" => "item id=a state=running\nitem id=b state=running\nok".into(),
            "sandbox.stats a" => "err LINK_LOST \"the worker did not answer\"".into(),
            "sandbox.stats b" => "ok id=b cpu_ms=1".into(),
            _ => return None,
        })
    });
    let (result, values) = measured(&plan(socket), Duration::from_secs(60));
    thread.join().unwrap();
    result.unwrap();
    assert_eq!(values["warren_sandboxes_unanswered"], 1.0);
    assert_eq!(values["warren_sandbox_cpu_seconds_total{sandbox=\"b\"}"], 0.001);
}

#[test]
fn a_node_that_is_away_hangs_up_or_stays_silent_fails_the_run() {
    let gone = measured(&plan("/does/not/exist".into()), Duration::from_secs(60)).0.unwrap_err();
    assert_eq!(gone.code, "CONNECT_FAILED");
    let (socket, thread) = node(|request| (request == "node.info").then(|| INFO.to_string()));
    let (result, values) = measured(&plan(socket), Duration::from_secs(60));
    thread.join().unwrap();
    assert_eq!(result.unwrap_err().code, "CONNECTION_LOST");
    assert_eq!(values["warren_node_cpus"], 4.0);
    let (socket, thread) = node(|_| Some(String::new()));
    assert_eq!(measured(&plan(socket), Duration::from_millis(50)).0.unwrap_err().code, "CLIENT_TIMEOUT");
    thread.join().unwrap();
}
