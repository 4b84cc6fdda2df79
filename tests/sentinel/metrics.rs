//! The sentinel's own metrics, as Prometheus would scrape them.

use std::collections::{BTreeMap, BTreeSet};

use warren::sentinel::formats::exposition::{Line, lines, series};
use warren::sentinel::http::{Answer, Client, Request, Server, TlsOptions, Url};

use crate::peers::free_address;
use crate::process::{GUARD, NODE, QUICK, Sentinel, target, until};
use crate::receiver::Receiver;

/// Names without their beginning, kinds, and labels: those that are promised (requirement T13), and those that alarms need.
const PROMISED: &[(&str, &str, &[&str])] = &[
    ("info", "gauge", &["arch", "os", "version"]),
    ("uptime_seconds", "gauge", &[]),
    ("tasks_total", "gauge", &[]),
    ("tasks_success_total", "counter", &[]),
    ("tasks_failed_total", "counter", &[]),
    ("task_duration_seconds", "histogram", &[]),
    ("plugins_loaded", "gauge", &[]),
    ("buffer_size", "gauge", &[]),
    ("buffer_usage_percent", "gauge", &[]),
    ("sent_metrics_total", "counter", &["target"]),
    ("sent_bytes_total", "counter", &["target"]),
    ("send_errors_total", "counter", &["target"]),
    ("heartbeat_success_total", "counter", &[]),
    ("heartbeat_failed_total", "counter", &[]),
    ("cpu_usage_percent", "gauge", &[]),
    ("memory_usage_bytes", "gauge", &[]),
    ("threads", "gauge", &[]),
    ("dropped_total", "counter", &["reason", "target"]),
    ("buffer_bytes", "gauge", &[]),
    ("buffer_oldest_unsent_age_seconds", "gauge", &["target"]),
    ("send_retries_total", "counter", &["target"]),
    ("corrupt_records_total", "counter", &["target"]),
    ("fsync_seconds_total", "counter", &[]),
    ("disk_free_bytes", "gauge", &[]),
    ("prev_shutdown_unclean", "gauge", &[]),
    ("task_skipped_total", "counter", &["reason"]),
    ("plugin_restarts_total", "counter", &[]),
    ("breaker_state", "gauge", &["target"]),
    ("config_reloads_total", "counter", &[]),
    ("config_last_reload_successful", "gauge", &[]),
    ("series_active", "gauge", &[]),
];

#[test]
fn every_promised_metric_is_served_with_its_kind_and_labels_and_no_secret() {
    let receiver = Receiver::new();
    let address = free_address();
    let mut sentinel = Sentinel::new("");
    // A destination that refuses everything: something is dropped.
    let refusing = Server::start(([127, 0, 0, 1], 0).into(), 1 << 24, |_| Answer::status(400)).unwrap();
    let never = target("never", "prometheus", &format!("http://{}/", refusing.address()));
    sentinel.configure_only(&format!(
        "metrics.listen = \"{address}\"\nbuffer.min_free_mib = 0\n{QUICK}{}token = \"swordfish\"\n{never}{NODE}",
        target("real", "prometheus", &receiver.url())
    ));
    sentinel.start();
    let url = Url::parse(&format!("http://{address}")).unwrap();
    let mut client = Client::new(url, &TlsOptions::default(), GUARD).unwrap();
    let page = until("drops", || {
        let request = Request { method: "GET", target: "/metrics", headers: &[], body: b"", keep: 1 << 20 };
        let answer = client.send(&request).ok().filter(|answer| answer.status == 200)?;
        let page = String::from_utf8(answer.body).unwrap();
        page.contains("sentinel_dropped_total{").then_some(page)
    });
    assert!(!page.contains("swordfish"));
    assert_eq!(sentinel.stop(), 0);

    let types: BTreeMap<&str, &str> =
        page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' ')).collect();
    let mut labels: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    for line in lines(&page, false) {
        let Line::Sample { series: raw, .. } = line.unwrap() else { continue };
        assert!(seen.insert(raw), "{raw} is there twice");
        let (name, own) = series(raw).unwrap();
        labels.entry(name).or_default().extend(own.iter().map(|(label, _)| label.to_string()));
    }
    for (name, kind, expected) in PROMISED {
        let name = format!("sentinel_{name}");
        assert_eq!(types.get(&*name), Some(kind), "{name}");
        let (series, more) = match *kind {
            "histogram" => (format!("{name}_bucket"), Some("le")),
            _ => (name.clone(), None),
        };
        // What is counted by reason or by damaged place has no series before there is one.
        match labels.get(&*series) {
            Some(labels) => {
                assert!(labels.iter().map(String::as_str).eq(more.into_iter().chain(expected.iter().copied())))
            }
            None => assert!(
                ["task_skipped_total", "corrupt_records_total"].iter().any(|rare| name.ends_with(rare)),
                "{name}"
            ),
        }
        for suffix in ["_sum", "_count"] {
            assert!(*kind != "histogram" || labels.contains_key(&*format!("{name}{suffix}")), "{name}{suffix}");
        }
    }
}
