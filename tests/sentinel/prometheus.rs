//! A real Prometheus and a real VictoriaMetrics as receivers: every sample is queried back.

use std::process::Command;

use serde_json::Value;

use crate::peers::Peer;
use crate::process::{NODE, QUICK, Sentinel, target, until};

/// Sorted labels with the name, time in ms, value.
pub type Sample = (Vec<(String, String)>, i64, f64);

impl Peer {
    /// Every sample of every series of the last hour, from Prometheus' interface.
    fn queried(&self) -> Vec<Sample> {
        let body = self.get("/api/v1/query?query=%7B__name__%3D~%22.%2B%22%7D%5B1h%5D").unwrap();
        let answer: Value = serde_json::from_slice(&body).unwrap();
        let mut all = Vec::new();
        for series in answer["data"]["result"].as_array().unwrap() {
            let labels = series["metric"].as_object().unwrap();
            let mut labels: Vec<(String, String)> =
                labels.iter().map(|(name, value)| (name.clone(), value.as_str().unwrap().to_string())).collect();
            labels.sort();
            for pair in series["values"].as_array().unwrap() {
                let time = (pair[0].as_f64().unwrap() * 1000.0).round() as i64;
                let value = pair[1].as_str().unwrap().parse().unwrap();
                all.push((labels.clone(), time, value));
            }
        }
        all
    }

    /// Every sample there is, from VictoriaMetrics' export: one line of JSON per block of a series.
    fn exported(&self) -> Vec<Sample> {
        let body = self.get("/api/v1/export?match%5B%5D=%7B__name__!%3D%22%22%7D").unwrap();
        let mut all = Vec::new();
        for line in String::from_utf8(body).unwrap().lines() {
            let block: Value = serde_json::from_str(line).unwrap();
            let labels = block["metric"].as_object().unwrap();
            let mut labels: Vec<(String, String)> =
                labels.iter().map(|(name, value)| (name.clone(), value.as_str().unwrap().to_string())).collect();
            labels.sort();
            let times = block["timestamps"].as_array().unwrap().iter().map(|time| time.as_i64().unwrap());
            for (time, value) in times.zip(block["values"].as_array().unwrap()) {
                all.push((labels.clone(), time, value.as_f64().unwrap_or(f64::NAN)));
            }
        }
        all
    }
}

/// What is said in the log when a receiver gets the older form.
const OLDER: &str = "remote write 1.0 in snappy from now on";

/// Sends this machine's metrics to a peer, the target `real`, and gives what was sent, in order.
pub fn sent(to: &str) -> Vec<Sample> {
    sent_and_said(to).0
}

/// The same, and what the sentinel logged.
fn sent_and_said(to: &str) -> (Vec<Sample>, String) {
    // The second one, which nobody serves, keeps everything in the buffer.
    let never = target("never", "prometheus", "http://127.0.0.1:9/");
    let mut sentinel = Sentinel::new(&format!("{QUICK}labels.rack = \"r1\"\n{to}{never}{NODE}"));
    sentinel.start();
    until("samples", || (sentinel.target("real")["sent"].as_u64() > Some(3000)).then_some(()));
    assert_eq!(sentinel.stop(), 0, "{}", sentinel.log());
    let output = Command::new(env!("CARGO_BIN_EXE_warren"))
        .args(["sentinel", "buffer", "dump"])
        .arg(sentinel.data().join("buffer"))
        .output()
        .unwrap();
    let mut sent = Vec::new();
    for line in String::from_utf8(output.stdout).unwrap().lines() {
        let sample: Value = serde_json::from_str(line).unwrap();
        // No receiver gives staleness markers back, and a NaN is equal to nothing.
        if !sample["value"].is_number() {
            continue;
        }
        // To the bit, which serde_json is not.
        let digits = line.rsplit_once("\"value\":").unwrap().1.trim_end_matches('}');
        let value: f64 = digits.parse().unwrap();
        let mut labels = vec![("__name__".to_string(), sample["name"].as_str().unwrap().to_string())];
        let given = sample["labels"].as_object().unwrap();
        labels.extend(given.iter().map(|(name, value)| (name.clone(), value.as_str().unwrap().to_string())));
        labels.sort();
        sent.push((labels, sample["timestamp"].as_i64().unwrap(), value));
    }
    assert!(sent.len() > 1000);
    assert!(sent.iter().all(|(labels, _, _)| labels.contains(&("rack".to_string(), "r1".to_string()))));
    (sorted(sent), sentinel.log())
}

/// In order, without what is no number.
pub fn sorted(mut samples: Vec<Sample>) -> Vec<Sample> {
    samples.retain(|(_, _, value)| value.is_finite());
    samples.sort_by(|a, b| (&a.0, a.1).cmp(&(&b.0, b.1)));
    samples
}

#[test]
fn what_a_real_prometheus_has_is_what_the_buffer_has_to_the_last_value() {
    // The second kind is not known to a Prometheus before 3: it has to fall back.
    for kind in ["prometheus", "prometheus2"] {
        let Some(prometheus) = Peer::prometheus() else { return };
        let (sent, said) = sent_and_said(&target("real", kind, &format!("{}/api/v1/write", prometheus.url())));
        if said.contains(OLDER) {
            assert_eq!(kind, "prometheus2");
            eprintln!(
                "SKIPPED: this Prometheus does not know remote write 2.0; what was tested is the way back to 1.0"
            );
        }
        let there = sorted(prometheus.queried());
        assert_eq!(there.len(), sent.len(), "{kind}");
        assert!(there == sent, "{kind}: a value differs");
    }
}

#[test]
fn what_a_real_victoriametrics_has_is_what_the_buffer_has() {
    let Some(victoriametrics) = Peer::victoriametrics() else { return };
    let (sent, said) =
        sent_and_said(&target("real", "victoriametrics", &format!("{}/api/v1/write", victoriametrics.url())));
    if said.contains(OLDER) {
        eprintln!(
            "SKIPPED: this VictoriaMetrics is older than 1.88 and does not know zstd; what was tested is the way back"
        );
    }
    let there = until("all samples", || {
        // What was written is searchable a moment later.
        let there = sorted(victoriametrics.exported());
        (there.len() == sent.len()).then_some(there)
    });
    for (there, sent) in there.iter().zip(&sent) {
        assert_eq!((&there.0, there.1), (&sent.0, sent.1));
        // It keeps decimal numbers of limited length.
        assert!((there.2 - sent.2).abs() <= sent.2.abs() * 1e-9, "{there:?} and {sent:?}");
    }
}
