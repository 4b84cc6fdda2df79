//! With the reference core.

use std::time::Duration;

use serde_json::{Value, json};
use warren::sentinel::core_sim;
use warren::sentinel::http::{Client, KEPT_BODY, Request, Server, TlsOptions, Url};
use warren::sentinel::secret::Secret;

use crate::process::{NODE, QUICK, Sentinel, until};
use crate::receiver::Receiver;

const TOKEN: &str = "swordfish";

struct Core {
    server: Option<Server>,
    address: std::net::SocketAddr,
    out: std::path::PathBuf,
}

impl Core {
    fn new(out: std::path::PathBuf) -> Self {
        let mut core = Self { server: None, address: ([127, 0, 0, 1], 0).into(), out };
        core.come_back();
        core
    }

    fn come_back(&mut self) {
        let server = core_sim::start(self.address, Secret::new(TOKEN.into()), Some(&self.out)).unwrap();
        self.address = server.address();
        self.server = Some(server);
    }

    fn ask(&self, method: &str, target: &str, body: &Value) -> Value {
        let url = Url::parse(&format!("http://{}", self.address)).unwrap();
        let mut client = Client::new(url, &TlsOptions::default(), Duration::from_secs(60)).unwrap();
        let body = body.to_string();
        let bearer = format!("Bearer {TOKEN}");
        let headers = [("Authorization", &*bearer)];
        let request = Request { method, target, headers: &headers, body: body.as_bytes(), keep: 64 * KEPT_BODY };
        let answer = client.send(&request).unwrap();
        assert!(answer.is_success(), "{}", answer.status);
        serde_json::from_slice(&answer.body).unwrap_or(Value::Null)
    }

    fn state(&self, id: &str) -> Value {
        self.ask("GET", "/api/v1/state", &Value::Null)[id].clone()
    }

    fn set_tasks(&self, version: &str, interval_ms: u64) {
        let task = json!({"id": "node", "plugin": "node", "interval_ms": interval_ms});
        self.ask("PUT", "/api/v1/tasks", &json!({"version": version, "tasks": [task, {"id": "not one"}]}));
    }
}

fn config(core: &Core, mode: &str) -> String {
    let heartbeat = "heartbeat.interval_s = 1\ncollector.fetch_s = 1\n";
    format!(
        "id = \"s1\"\n{heartbeat}{QUICK}sender.mode = \"{mode}\"\n[core]\nurl = \"http://{}\"\ntoken = \"{TOKEN}\"\n",
        core.address
    )
}

#[test]
fn with_a_core_it_registers_gets_tasks_reports_and_delivers_each_sample_once() {
    let mut sentinel = Sentinel::new("");
    let core = Core::new(sentinel.scratch.path("samples"));
    core.set_tasks("v1", 100);
    sentinel.configure(&config(&core, "core"));
    sentinel.start();
    until("samples", || (core.state("s1")["samples"].as_u64()? > 500).then_some(()));
    until("heartbeats", || (core.state("s1")["heartbeats"].as_u64()? > 1).then_some(()));
    until("reports", || (!core.state("s1")["reports"].as_array()?.is_empty()).then_some(()));
    let state = core.state("s1");
    assert_eq!(state["registration"]["id"], "s1");
    assert_eq!(state["reports"][0]["status"], "success");
    assert_eq!(sentinel.status().unwrap()["state"], "running");
    // Other tasks.
    core.ask("PUT", "/api/v1/tasks", &json!({"version": "v2", "tasks": []}));
    until("no tasks", || (sentinel.status()?["tasks"] == 0).then_some(()));
    // Staleness markers follow the last run.
    let samples = until("every sample", || {
        let accepted = sentinel.accepted();
        (core.state("s1")["samples"] == accepted && sentinel.target("core")["pending"] == 0).then_some(accepted)
    });
    let lines = std::fs::read_to_string(&core.out).unwrap().lines().count() as u64;
    assert!(lines >= samples);
    assert_eq!(core.state("s1")["repeats"], 0);
}

#[test]
fn tasks_are_fetched_and_the_heart_beats_at_once_and_not_after_the_first_interval() {
    let mut sentinel = Sentinel::new("");
    let core = Core::new(sentinel.scratch.path("samples"));
    core.set_tasks("v1", 100);
    let config = config(&core, "core").replace("interval_s = 1", "interval_s = 3600");
    sentinel.configure(&config.replace("fetch_s = 1", "fetch_s = 86400"));
    sentinel.start();
    until("samples", || (sentinel.accepted() > 0).then_some(()));
    until("a heartbeat", || (core.state("s1")["heartbeats"] == 1).then_some(()));
}

/// The numbers of samples are what such a core goes by: none may be given twice.
#[test]
fn killed_again_and_again_a_core_that_drops_repeats_has_every_sample() {
    let mut sentinel = Sentinel::new("");
    let core = Core::new(sentinel.scratch.path("samples"));
    let idle = format!("buffer.fsync = \"always\"\n{}", config(&core, "core"));
    // What was accepted in this life, when all of it is.
    let delivered = |sentinel: &Sentinel| {
        let status = sentinel.status()?;
        let accepted = status["buffer"]["accepted"].as_u64()?;
        (status["targets"][0]["pending"] == 0).then_some(accepted)
    };
    let mut accepted = 0;
    for _ in 0..4 {
        // One life collects and delivers more than it has told; the next has nothing to do but to deliver that once more.
        sentinel.configure(&format!("{idle}{NODE}"));
        sentinel.start();
        until("a cursor", || {
            let files = std::fs::read_dir(sentinel.data().join("buffer")).unwrap();
            let mut names = files.map(|file| file.unwrap().file_name().into_string().unwrap());
            names.any(|name| name.ends_with(".cursor")).then_some(())
        });
        let before = sentinel.accepted();
        accepted += until("everything delivered", || delivered(&sentinel).filter(|accepted| *accepted > before + 100));
        sentinel.kill();
        sentinel.configure(&idle);
        sentinel.start();
        accepted += until("everything delivered", || delivered(&sentinel));
        sentinel.kill();
    }
    let state = core.state("s1");
    assert!(state["samples"].as_u64() >= Some(accepted), "{} of {accepted}", state["samples"]);
}

#[test]
fn without_its_core_it_runs_from_cached_tasks_and_loses_nothing() {
    let mut sentinel = Sentinel::new("");
    let mut core = Core::new(sentinel.scratch.path("samples"));
    core.set_tasks("v1", 100);
    sentinel.configure(&config(&core, "core"));
    sentinel.start();
    until("samples", || (sentinel.accepted() > 200).then_some(()));
    sentinel.stop();
    let before = std::fs::read_to_string(&core.out).unwrap().lines().count() as u64;
    core.server = None;
    // The start waits for nobody.
    sentinel.start();
    assert_eq!(sentinel.status().unwrap()["state"], "registering");
    until("samples", || (sentinel.accepted() > 1000).then_some(()));
    assert_eq!(sentinel.target("core")["sent"], 0);
    core.come_back();
    until("registration", || (sentinel.status()?["state"] == "running").then_some(()));
    core.ask("PUT", "/api/v1/tasks", &json!({"version": "v2", "tasks": []}));
    until("no tasks", || (sentinel.status()?["tasks"] == 0).then_some(()));
    until("every sample", || {
        let lines = std::fs::read_to_string(&core.out).unwrap().lines().count() as u64;
        (lines == before + sentinel.accepted()).then_some(())
    });
    let cache = std::fs::read(sentinel.data().join("core-tasks")).unwrap();
    assert!(!cache.windows(4).any(|four| four == b"node"));
}

#[test]
fn a_wrong_token_pauses_the_lane_and_keeps_the_data() {
    let mut sentinel = Sentinel::new("");
    let core = Core::new(sentinel.scratch.path("samples"));
    let config = config(&core, "core").replace(&format!("token = \"{TOKEN}\""), "token = \"other\"");
    sentinel.configure(&format!("{config}{}", NODE));
    sentinel.start();
    until("a paused lane", || (sentinel.target("core")["paused"] == true).then_some(()));
    assert!(sentinel.target("core")["pending"].as_u64() > Some(0));
    assert_eq!(sentinel.target("core")["dropped"], 0);
    sentinel.configure(&format!("{}{}", self::config(&core, "core"), NODE));
    assert!(sentinel.command("reload").status.success());
    until("samples", || (core.state("s1")["samples"].as_u64()? > 100).then_some(()));
}

#[test]
fn registration_works_from_the_command_line() {
    let sentinel = Sentinel::new("");
    let core = Core::new(sentinel.scratch.path("samples"));
    sentinel.configure(&config(&core, "core"));
    let output = sentinel.command("register");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(core.state("s1")["registration"]["os"], "linux");
}

#[test]
fn the_cores_configuration_is_taken_over_or_refused_and_survives_a_restart() {
    let mut sentinel = Sentinel::new("");
    let core = Core::new(sentinel.scratch.path("samples"));
    let set = |version: &str, config: &str| {
        core.ask("PUT", "/api/v1/config", &json!({"version": version, "config": config}));
    };
    let beat = |key: &str, value: &str| (core.state("s1")["last_heartbeat"][key] == value).then_some(());
    set("c1", "[[rule]]\naction = \"rename\"\nregex = \"(.*)\"\nreplacement = \"core_$1\"\n");
    sentinel.configure(&format!("{}{}", config(&core, "core"), NODE));
    sentinel.start();
    until("the first version", || beat("config_version", "c1"));
    let renamed = || std::fs::read_to_string(&core.out).unwrap().contains("\"name\":\"core_node_");
    until("renamed samples", || renamed().then_some(()));
    // One that may not be set, one that is wrong: the first stays.
    for (version, wrong) in [("c2", "[core]\nurl = \"https://evil.example\""), ("c3", "[sender]\nbatch = 0")] {
        set(version, wrong);
        until("a refusal", || {
            let beat = core.state("s1")["last_heartbeat"].clone();
            (beat["config_refused"]["version"] == version && beat["config_version"] == "c1").then_some(())
        });
    }
    assert_eq!(sentinel.stop(), 0);
    std::fs::write(&core.out, "").unwrap();
    set("", "");
    sentinel.start();
    until("renamed samples", || renamed().then_some(()));
    assert!(!std::fs::read_to_string(&core.out).unwrap().contains("\"name\":\"node_"));
}

#[test]
fn in_hybrid_mode_samples_go_to_the_target_and_what_they_are_and_what_became_of_tasks_to_the_core() {
    let receiver = Receiver::new();
    let mut sentinel = Sentinel::new("");
    let core = Core::new(sentinel.scratch.path("samples"));
    core.set_tasks("1", 200);
    let to = crate::process::target("direct", "prometheus", &receiver.url());
    sentinel.configure(&format!("{}{to}", config(&core, "hybrid")));
    sentinel.start();
    until("metadata and reports", || {
        let state = core.state("s1");
        let known =
            state["metadata"]["node_cpu_seconds_total"] == "counter" && state["metadata"]["node_load1"] == "gauge";
        (known && state["reports"].as_array()?.len() > 2).then_some(())
    });
    until("samples", || (receiver.got.lock().unwrap().unique() > 1000).then_some(()));
    // Six are built in.
    assert_eq!(core.state("s1")["last_heartbeat"]["plugins"], 6);
    assert_eq!(core.state("s1")["samples"], 0, "samples went to the core");
    assert_eq!(sentinel.stop(), 0);
}
