//! Mistakes in the configuration, and secrets.

use crate::process::{QUICK, Sentinel, target, until, write_private};
use crate::receiver::Receiver;

/// Each is wrong in its own way; the text must be in the complaint.
const MISTAKES: [(&str, &str); 35] = [
    ("[[aggregate]]\nregex = \"a\"\nwindow_s = 60\nfunctions = [\"median\"]", "median"),
    ("[log]\noutput = \"file\"", "log.file"),
    ("unknown = 1", "unknown"),
    ("[buffer]\nsize = 1", "buffer.size"),
    ("buffer = 3", "buffer"),
    ("[buffer]\nmax_kib = 10", "1024 to"),
    ("[buffer]\nmode = \"tape\"", "buffer.mode"),
    ("[buffer]\nmode = \"memory\"\nmax_kib = 2000000", "buffer.max_kib"),
    ("[buffer]\npolicy = \"drop\"", "buffer.policy"),
    ("[buffer]\nfsync = true", "buffer.fsync"),
    ("[buffer]\nfsync_ms = 1", "buffer.fsync_ms"),
    ("[sender]\nbatch = 0", "sender.batch"),
    ("[sender]\nbatch = -1", "sender.batch"),
    ("[sender]\nbatch = \"many\"", "sender.batch"),
    ("[[target]]\nname = \"two\"\nkind = \"prometheus\"\nurl = \"http://localhost/\"\nbatch = 0", "target.batch"),
    ("[sender]\nmode = \"core\"", "sender.mode"),
    ("[sender]\ntimeout_s = 0", "sender.timeout_s"),
    ("[heartbeat]\ninterval_s = 0", "heartbeat.interval_s"),
    ("[collector]\nworkers = 1000", "collector.workers"),
    ("id = \"a b\"", "id"),
    ("[labels]\n\"a-b\" = \"c\"", "labels"),
    ("[core]\nurl = \"ftp://x\"", "core.url"),
    ("[core]\nurl = \"http://core.example\"", "allow_http"),
    ("[core]\nurl = \"https://u:p@core.example\"", "core.url"),
    ("[core]\nurl = \"https://core.example\"\ncert = \"/a\"", "core.cert"),
    ("[[target]]\nname = \"One\"\nkind = \"prometheus\"\nurl = \"http://localhost/\"", "target.name"),
    ("[[target]]\nname = \"first\"\nkind = \"prometheus\"\nurl = \"http://localhost/\"", "twice"),
    ("[[target]]\nname = \"two\"\nkind = \"graphite\"\nurl = \"http://localhost/\"", "graphite"),
    ("[[target]]\nname = \"two\"\nkind = \"clickhouse\"\nurl = \"http://localhost/\"\ntable = \"a b\"", "target.table"),
    ("[[target]]\nname = \"two\"\nkind = \"prometheus\"\nurl = \"http://localhost/\"\npassword = \"p\"", "username"),
    ("[[task]]\nid = \"a\"\nplugin = \"node\"\ninterval_ms = 1", "task.interval_ms"),
    ("[[task]]\nid = \"a\"\nplugin = \"node\"\ninterval_ms = 1000\ntimeout_ms = 2000", "task.timeout_ms"),
    ("[[task]]\nid = \"a\"\nplugin = \"node\"", "interval_ms"),
    ("[[rule]]\nregex = \"(\"\ntarget_label = \"a\"", "rule"),
    ("[[rule]]\naction = \"explode\"", "explode"),
];

#[test]
fn every_mistake_is_named_and_leaves_the_running_configuration_in_place() {
    let receiver = Receiver::new();
    let good = format!("{QUICK}{}", target("first", "prometheus", &receiver.url()));
    let mut sentinel = Sentinel::new(&good);
    sentinel.start();
    for (mistake, named) in MISTAKES {
        sentinel.configure_only(&format!("{mistake}\n{}", target("first", "prometheus", &receiver.url())));
        let check = sentinel.command("check");
        let complaint = String::from_utf8(check.stderr).unwrap();
        assert!(!check.status.success() && complaint.contains(named), "{mistake}: {complaint}");
        let reload = sentinel.command("reload");
        let answer = String::from_utf8(reload.stdout).unwrap();
        assert!(!reload.status.success() && answer.contains("error"), "{mistake}: {answer}");
        assert_eq!(sentinel.status().unwrap()["targets"].as_array().unwrap().len(), 1);
    }
    sentinel.configure(&format!("{good}{}", target("second", "prometheus", &receiver.url())));
    assert!(sentinel.command("reload").status.success());
    assert_eq!(sentinel.status().unwrap()["targets"].as_array().unwrap().len(), 2);
}

#[test]
fn a_changed_file_is_taken_over_without_being_asked() {
    let receiver = Receiver::new();
    let one = target("one", "prometheus", &receiver.url());
    let mut sentinel = Sentinel::new(&one);
    sentinel.start();
    sentinel.configure(&format!("{one}{}", target("two", "prometheus", &receiver.url())));
    until("the second target", || (sentinel.status()?["targets"].as_array()?.len() == 2).then_some(()));
}

#[test]
fn a_file_with_a_secret_that_others_can_read_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let secret = "username = \"u\"\npassword = \"swordfish\"\n";
    let sentinel = Sentinel::new(&format!("{}{secret}", target("one", "prometheus", "http://localhost/")));
    assert!(sentinel.command("check").status.success());
    std::fs::set_permissions(sentinel.config(), std::fs::Permissions::from_mode(0o644)).unwrap();
    let complaint = String::from_utf8(sentinel.command("check").stderr).unwrap();
    assert!(complaint.contains("0600") && !complaint.contains("swordfish"), "{complaint}");
}

#[test]
fn secrets_are_in_no_log_no_status_no_metric_and_no_core_dump() {
    let receiver = Receiver::new();
    let secrets = ["swordfish-in-file", "swordfish-in-environment", "swordfish-in-secret-file"];
    let mut sentinel = Sentinel::new("");
    let file = sentinel.scratch.path("secret");
    write_private(&file, secrets[2]);
    // The address is wrong, so that errors are logged as well.
    let one = target("one", "prometheus", "http://127.0.0.1:9/");
    let config = format!(
        "log.level = \"trace\"\n{QUICK}{one}username = \"u\"\npassword = \"{}\"\n{}token = \"${{SECRET_TOKEN}}\"\n{}token = \"file:{}\"\n",
        secrets[0],
        target("two", "prometheus", &receiver.url()),
        target("three", "prometheus", "http://127.0.0.1:9/"),
        file.display(),
    );
    sentinel.configure(&format!("{config}{}", crate::process::NODE));
    sentinel.start_with(&[("SECRET_TOKEN", secrets[1])]);
    until("errors", || (sentinel.target("one")["errors"].as_u64() > Some(2)).then_some(()));
    let status = sentinel.status().unwrap().to_string();
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", sentinel.pid())).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap().to_string();
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
    assert_eq!(sentinel.stop(), 0);
    for secret in secrets {
        assert!(!sentinel.log().contains(secret) && !status.contains(secret));
    }
    for place in ["buffer", "rejected"] {
        let Ok(files) = std::fs::read_dir(sentinel.data().join(place)) else { continue };
        for file in files {
            let octets = std::fs::read(file.unwrap().path()).unwrap();
            assert!(!octets.windows(9).any(|nine| nine == b"swordfish"));
        }
    }
}

#[test]
fn log_lines_go_to_a_file_as_json_when_that_is_asked_for() {
    let receiver = Receiver::new();
    let to = target("one", "prometheus", &receiver.url());
    let mut sentinel = Sentinel::new("");
    let file = sentinel.scratch.path("s.log");
    sentinel.configure(&format!("log = {{ output = \"file\", format = \"json\", file = {file:?} }}\n{to}"));
    sentinel.start();
    sentinel.configure(&format!("log = {{ output = \"both\", file = {file:?} }}\n{to}"));
    assert!(sentinel.command("reload").status.success());
    let lines = |text: &str| text.lines().map(str::to_string).collect::<Vec<_>>();
    let text = until("a line of text", || {
        let text = lines(&std::fs::read_to_string(&file).unwrap());
        text.last().is_some_and(|last| last.contains("audit: reload")).then_some(text)
    });
    let (json, plain): (Vec<_>, Vec<_>) = text.iter().partition(|line| line.starts_with('{'));
    assert!(json.iter().all(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["level"].is_string()));
    assert!(plain.iter().all(|line| line.contains("Z warren[sentinel]: ")));
    // Standard error has what was told since, and nothing from before.
    assert!(sentinel.log().contains("in force") && !sentinel.log().contains('{'));
    assert_eq!(sentinel.stop(), 0);
}

#[test]
fn windows_give_series_of_their_own_and_the_last_one_at_the_stop() {
    let receiver = Receiver::new();
    let to = target("one", "prometheus", &receiver.url());
    let window = "[[aggregate]]\nregex = \"node_load1\"\nwindow_s = 86400\nfunctions = [\"count\", \"last\"]\n";
    let mut sentinel = Sentinel::new(&format!("{QUICK}{to}{window}{}", crate::process::NODE));
    sentinel.start();
    until("samples", || (receiver.got.lock().unwrap().unique() > 1000).then_some(()));
    assert_eq!(sentinel.stop(), 0);
    let got = receiver.got.lock().unwrap();
    let of = |name: &str| -> Vec<f64> {
        let series = format!("__name__={name:?},");
        let values =
            got.samples.iter().filter(|((known, _), _)| *known == series).map(|(_, (bits, _))| f64::from_bits(*bits));
        values.filter(|value| value.is_finite()).collect()
    };
    assert!(of("node_load1").is_empty(), "the samples themselves went on");
    assert!(of("node_load1_count").iter().sum::<f64>() >= 1.0 && !of("node_load1_last").is_empty());
}
