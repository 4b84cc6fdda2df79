//! A real Prometheus as the receiver: every sample is queried back.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use warren::sentinel::http::{Client, Request, TlsOptions, Url};

use crate::process::{NODE, QUICK, Scratch, Sentinel, target, until};

/// Where `image/peers` puts it, or anywhere on the path.
fn program() -> Option<PathBuf> {
    let cache = std::env::var_os("WARREN_CACHE")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("XDG_CACHE_HOME").map(|path| PathBuf::from(path).join("warren")))
        .or_else(|| std::env::var_os("HOME").map(|path| PathBuf::from(path).join(".cache/warren")))?;
    let path = std::env::var_os("PATH")?;
    let on_path = std::env::split_paths(&path).map(|directory| directory.join("prometheus"));
    std::iter::once(cache.join("peers/prometheus/usr/bin/prometheus")).chain(on_path).find(|path| path.exists())
}

/// Sorted labels with the name, time in ms, value.
type Sample = (Vec<(String, String)>, i64, f64);

struct Prometheus {
    child: Child,
    url: String,
    _scratch: Scratch,
}

impl Prometheus {
    fn start() -> Option<Self> {
        let Some(program) = program() else {
            eprintln!("SKIPPED: there is no prometheus here; image/peers gets it");
            return None;
        };
        let scratch = Scratch::new();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        std::fs::write(scratch.path("empty.yml"), "").unwrap();
        let child = Command::new(program)
            .arg(format!("--config.file={}", scratch.path("empty.yml").display()))
            .arg(format!("--storage.tsdb.path={}", scratch.path("tsdb").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .arg("--web.enable-remote-write-receiver")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let prometheus = Self { child, url: format!("http://127.0.0.1:{port}"), _scratch: scratch };
        until("prometheus", || prometheus.get("/-/ready").map(drop));
        Some(prometheus)
    }

    fn get(&self, target: &str) -> Option<Vec<u8>> {
        let url = Url::parse(&self.url).unwrap();
        let mut client = Client::new(url, &TlsOptions::default(), Duration::from_secs(60)).unwrap();
        let request = Request { method: "GET", target, headers: &[], body: b"", keep: 64 << 20 };
        client.send(&request).ok().filter(|answer| answer.status == 200).map(|answer| answer.body)
    }

    /// Every sample of every series of the last hour.
    fn everything(&self) -> Vec<Sample> {
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
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn what_a_real_prometheus_has_is_what_the_buffer_has_to_the_last_value() {
    for kind in ["prometheus", "prometheus2"] {
        let Some(prometheus) = Prometheus::start() else { return };
        let to = target("real", kind, &format!("{}/api/v1/write", prometheus.url));
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
            // Prometheus gives no staleness markers back, and a NaN is equal to nothing.
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
        let mut there = prometheus.everything();
        let order = |a: &Sample, b: &Sample| (&a.0, a.1).cmp(&(&b.0, b.1));
        sent.sort_by(order);
        there.sort_by(order);
        there.retain(|(_, _, value)| !value.is_nan() && value.is_finite());
        assert!(sent.len() > 3000);
        assert!(sent.iter().all(|(labels, _, _)| labels.contains(&("rack".to_string(), "r1".to_string()))));
        assert_eq!(there.len(), sent.len(), "{kind}");
        assert!(there == sent, "{kind}: a value differs");
    }
}
