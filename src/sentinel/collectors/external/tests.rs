//! Against real programs: the examples of the tree, and scripts that misbehave in every way.

use std::fs;
use std::path::PathBuf;
use std::sync::Mutex;

use super::*;
use crate::sentinel::collect::{Collector, once};
use crate::sentinel::model::{Batch, Sample, SeriesTable};
use crate::sentinel::task::{Outcome, Refusal, Report, Reports, Sink, TaskSet, TaskSource};
use serde_json::json;

/// A directory of plugins that goes with the test.
struct Plugins(PathBuf);

impl Plugins {
    fn new(name: &str) -> Self {
        let directory = std::env::temp_dir().join(format!("warren-plugins-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(&directory).unwrap();
        Self(directory)
    }

    /// A plugin that is a shell script; `more` goes into `[program]`.
    fn add(&self, name: &str, form: &str, more: &str, script: &str) {
        let directory = self.0.join(name);
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join("run.sh"), script).unwrap();
        let manifest = format!(
            "name = \"{name}\"\nversion = \"1\"\n[program]\ncommand = [\"sh\", \"run.sh\"]\nform = \"{form}\"\n{more}\n\
             [[device_fields]]\nname = \"secret\"\ntype = \"password\"\ndefault = \"hunter22\"\n"
        );
        fs::write(directory.join("plugin.toml"), manifest).unwrap();
    }

    fn settings(&self) -> Settings {
        Settings { plugin_directory: Some(self.0.clone()), ..Settings::default() }
    }
}

impl Drop for Plugins {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

fn task(plugin: &str, timeout_ms: u64) -> Task {
    Task {
        id: format!("{plugin}-task"),
        plugin: plugin.into(),
        device: Default::default(),
        config: Default::default(),
        labels: Default::default(),
        interval: Duration::from_secs(600),
        timeout: Duration::from_millis(timeout_ms),
        priority: 0,
        retries: 0,
    }
}

fn run(settings: Settings, tasks: Vec<Task>) -> Vec<(Report, Vec<Sample>)> {
    let mut ends = once(settings, tasks, Arc::new(SeriesTable::new(100_000))).unwrap();
    ends.sort_by(|a, b| a.0.task.cmp(&b.0.task));
    ends
}

fn shown(samples: &[Sample]) -> Vec<String> {
    samples.iter().map(|sample| format!("{} {}", **sample.series, sample.value)).collect()
}

fn failed(report: &Report) -> &str {
    match &report.outcome {
        Outcome::Failed(error) => error,
        other => panic!("{}: {other:?}", report.task),
    }
}

/// The start of a well-behaved native plugin in shell.
const HELLO: &str = "while read -r tag verb rest; do case $verb in\n\
    hello) echo \"$tag ok protocol=1 name=$NAME version=1\";;\n\
    schema|validate) echo \"$tag err UNKNOWN_VERB \\\"no\\\"\";;\n\
    close) echo \"$tag ok\"; exit 0;;\n";

fn native(name: &str, collect: &str) -> String {
    format!("NAME={name}\n{HELLO}collect) {collect};;\nesac; done\n")
}

#[test]
fn the_examples_of_the_tree_work() {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("examples/plugins");
    let files = directory.join("shell");
    let object = |value: serde_json::Value| value.as_object().unwrap().clone();
    let tasks = vec![
        Task {
            device: object(json!({"path": files})).into(),
            config: object(json!({"suffixes": [".sh"]})).into(),
            ..task("files", 30_000)
        },
        task("load", 30_000),
        Task { config: object(json!({"program": "no \"such\" program"})).into(), ..task("processes", 30_000) },
    ];
    let mut named = tasks.clone();
    named[2].config = object(json!({"program": "no-such one"})).into();
    let settings = Settings { plugin_directory: Some(directory), testing: true, ..Settings::default() };
    let ends = run(settings.clone(), named);
    for (report, _) in &ends {
        assert_eq!(report.outcome, Outcome::Success, "{}", report.task);
    }
    let path = files.display();
    let size = ["processes.sh", "warren-plugin.sh"].map(|file| fs::metadata(files.join(file)).unwrap().len());
    assert_eq!(
        shown(&ends[0].1),
        [
            format!("files_count{{path=\"{path}\"}} 2"),
            format!("files_size_bytes{{path=\"{path}\"}} {}", size[0] + size[1])
        ]
    );
    let names: Vec<&str> = ends[1].1.iter().map(|sample| sample.series.name()).collect();
    assert_eq!(names, ["load_1m", "load_five"]);
    assert_eq!(shown(&ends[2].1), ["processes_running{program=\"no-such one\"} 0"]);
    // The manifest's rules are kept before the program is asked at all.
    let refused = run(settings, tasks);
    assert!(failed(&refused[2].0).starts_with("config.program: "), "{}", failed(&refused[2].0));
}

#[test]
fn whatever_a_plugin_does_the_others_are_on_time() {
    let plugins = Plugins::new("unruly");
    // Ample time for a loaded machine, but for those whose fault is to need too much of it.
    let add = |name: &str, script: &str| {
        let start = if name == "never-greets" { 1 } else { 60 };
        plugins.add(name, "native", &format!("output_kib = 64\nstart_timeout_s = {start}"), script);
    };
    add("fine", &native("fine", "echo \"$tag item name=a.b value=1 type=gauge l.x=\\\"y z\\\"\"; echo \"$tag ok\""));
    add("hangs", &native("hangs", "sleep 1000"));
    add("never-greets", "exec sleep 1000\n");
    add("crashes", &native("crashes", "exit 3"));
    add("floods", &native("floods", "yes \"$tag item name=a value=1\" | head -c 1000000000"));
    add(
        "garbage",
        &native(
            "garbage",
            "head -c 60000 /dev/urandom | tr '\\0-\\40' '\\n'; head -c 60000 /dev/zero | tr '\\0' '\\n'; sleep 1000",
        ),
    );
    add("ignores", &format!("trap '' TERM INT HUP\n{}", native("ignores", "while :; do sleep 1; done")));
    add("forks", &native("forks", "(sleep 1000; sleep 1000) & (sleep 1000) & exit 4"));
    add("liar", &native("somebody-else", "echo \"$tag ok\""));
    add("tells", &native("tells", "echo \"$tag err BAD_LOGIN \\\"password hunter22 is wrong\\\"\""));
    plugins.add("silent", "execd", "", "exec sleep 1000\n");
    let names = [
        "crashes",
        "fine",
        "floods",
        "forks",
        "garbage",
        "hangs",
        "ignores",
        "liar",
        "never-greets",
        "silent",
        "tells",
    ];
    let timeout = |name: &str| if ["hangs", "ignores", "silent"].contains(&name) { 9_000 } else { 60_000 };
    let ends = run(plugins.settings(), names.iter().map(|name| task(name, timeout(name))).collect());
    assert_eq!(ends.len(), names.len());
    for ((report, samples), name) in ends.iter().zip(names) {
        let error = if name == "fine" { "" } else { failed(report) };
        match name {
            "fine" => {
                assert_eq!(report.outcome, Outcome::Success);
                assert_eq!(shown(samples), ["a_b{x=\"y z\"} 1"]);
            }
            "crashes" => assert_eq!(error, "the plugin ended: exit status: 3"),
            "forks" => assert_eq!(error, "the plugin ended: exit status: 4"),
            "floods" => assert_eq!(error, "the plugin wrote more than 65536 octets in one run"),
            "hangs" | "ignores" | "silent" => {
                assert!(error.starts_with("took longer than its timeout of 9000 ms"), "{error}")
            }
            "garbage" => assert!(error.contains("what is no message") || error.contains("wrote more"), "{error}"),
            "liar" => assert_eq!(error, "the plugin says that it is \"somebody-else\""),
            "never-greets" => assert_eq!(error, "the plugin did not greet in time"),
            _ => assert_eq!(error, "BAD_LOGIN: password *** is wrong"),
        }
    }
    // Nothing of them is left, whatever they forked. What was killed takes a moment to be gone on a loaded machine.
    let left = || {
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let theirs = processes.filter_map(|entry| {
            let cwd = fs::read_link(entry.path().join("cwd")).ok()?;
            cwd.starts_with(&plugins.0).then(|| fs::read_to_string(entry.path().join("comm")).unwrap_or_default())
        });
        theirs.collect::<Vec<_>>()
    };
    let guard = Instant::now() + Duration::from_secs(60);
    while !left().is_empty() {
        assert!(Instant::now() < guard, "still there: {:?}", left());
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn both_formats_of_the_compatible_form_are_understood() {
    let plugins = Plugins::new("formats");
    let influx = "while read -r _; do echo \"m,t=$DEVICE_SECRET value=1,b=2i,s=\\\"x\\\" 1700000000000000000\"; echo 'bad'; done\n";
    plugins.add("influx", "execd", "", influx);
    let metrics = "while read -r _; do printf '# TYPE a counter\\na_total{b=\"c\"} 5\\n# EOF\\n'; done\n";
    plugins.add("metrics", "execd", "format = \"openmetrics\"", metrics);
    let ends = run(plugins.settings(), vec![task("influx", 60_000), task("metrics", 60_000)]);
    assert_eq!(shown(&ends[0].1), ["m{t=\"hunter22\"} 1", "m_b{t=\"hunter22\"} 2"]);
    assert_eq!(failed(&ends[0].0), "a field has no value");
    assert_eq!(shown(&ends[1].1), ["a_total{b=\"c\"} 5"]);
    assert_eq!(ends[1].1[0].series.kind(), crate::sentinel::model::Kind::Counter);
    assert_eq!(ends[1].0.outcome, Outcome::Success);
}

struct Fixed(Arc<TaskSet>);

impl TaskSource for Fixed {
    fn current(&self) -> Arc<TaskSet> {
        Arc::clone(&self.0)
    }
}

#[derive(Default)]
struct Kept(Mutex<(Vec<Sample>, Vec<Report>)>);

impl Sink for Kept {
    fn offer(&self, batch: &Batch) -> Result<(), Refusal> {
        self.0.lock().unwrap().0.extend(batch.samples.iter().cloned());
        Ok(())
    }
}

impl Reports for Kept {
    fn report(&self, report: Report) {
        self.0.lock().unwrap().1.push(report);
    }
}

fn wait_for(what: &str, mut ready: impl FnMut() -> bool) {
    let guard = Instant::now() + Duration::from_secs(60);
    while !ready() {
        assert!(Instant::now() < guard, "{what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_new_version_greets_before_the_old_one_goes() {
    let plugins = Plugins::new("versions");
    let version =
        |number: u32| native("v", &format!("echo \"$tag item name=version value={number}\"; echo \"$tag ok\""));
    plugins.add("v", "native", "start_timeout_s = 5", &version(1));
    let task = Task { interval: Duration::from_secs(1), ..task("v", 600_000) };
    let source = Arc::new(Fixed(Arc::new(TaskSet { version: 1, tasks: vec![task] })));
    let kept = Arc::new(Kept::default());
    let settings = Settings { plugin_reload: Duration::from_millis(200), ..plugins.settings() };
    let (sink, reports, table) = (Arc::clone(&kept), Arc::clone(&kept), Arc::new(SeriesTable::new(100)));
    let collector = Collector::start(settings, source, sink, reports, table).unwrap();
    let last = || kept.0.lock().unwrap().0.last().map(|sample| sample.value);
    wait_for("the first version", || last() == Some(1.0));
    // One that does not greet is not taken: the old one goes on.
    fs::write(plugins.0.join("v/run.sh"), "exec sleep 1000\n").unwrap();
    std::thread::sleep(Duration::from_millis(6_000));
    let before = kept.0.lock().unwrap().0.len();
    wait_for("the first version goes on", || kept.0.lock().unwrap().0.len() > before + 1);
    assert_eq!(last(), Some(1.0));
    fs::write(plugins.0.join("v/run.sh"), version(2)).unwrap();
    wait_for("the second version", || last() == Some(2.0));
    collector.stop(Duration::from_secs(5));
    let kept = kept.0.lock().unwrap();
    for report in &kept.1 {
        assert!(!matches!(report.outcome, Outcome::Failed(_)), "{:?}", report.outcome);
    }
}

#[test]
fn a_plugin_that_crashes_again_and_again_is_stopped() {
    let plugins = Plugins::new("loop");
    plugins.add("bad", "native", "", "echo started >> starts; exit 1\n");
    let external = {
        let (settings, stats) = (plugins.settings(), Arc::default());
        let mut external = External::new(&settings, &stats);
        let now = Instant::now();
        for n in 0..CRASH_LOOP {
            external.crashed("bad", "it ended", now);
            let plugin = &external.plugins["bad"];
            assert_eq!(plugin.not_before - now, FIRST_PAUSE * (1 << n));
        }
        external
    };
    assert_eq!(external.plugins["bad"].crashes, CRASH_LOOP);
    let ends = run(plugins.settings(), vec![task("bad", 60_000)]);
    assert_eq!(failed(&ends[0].0), "the plugin ended: exit status: 1");
    assert_eq!(fs::read_to_string(plugins.0.join("bad/starts")).unwrap(), "started\n");
}
