use std::path::Path;

use super::*;
use crate::node::config::ConfigError;

const EXAMPLE: &str = include_str!("../../../packaging/sentinel/sentinel.toml");

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(text, Path::new("s.toml"))
}

#[test]
fn the_shipped_example_is_the_defaults_with_a_target_and_a_task() {
    let example = parse(EXAMPLE).unwrap();
    assert_eq!((example.target.len(), example.task.len()), (1, 1));
    assert_eq!(Config { target: Vec::new(), task: Vec::new(), ..example }, Config::default());
}

#[test]
fn the_example_shows_every_key() {
    // Serde names the keys that it knows when it meets one that it does not.
    let known = |text: &str| -> Vec<String> {
        let message = parse(text).unwrap_err().to_string();
        let names = message.split("expected").nth(1).unwrap_or_else(|| panic!("{message}"));
        names.split('`').skip(1).step_by(2).map(str::to_string).collect()
    };
    let shown: toml::Table = EXAMPLE.parse().unwrap();
    for table in known("unknown = 1") {
        let keys = match &*table {
            "id" | "name" | "region" | "labels" => Vec::new(),
            "target" | "task" | "rule" | "aggregate" => {
                let known = known(&format!("[[{table}]]\nunknown = 1"));
                assert!(known.iter().all(|key| EXAMPLE.contains(key)), "{table}: {known:?}");
                continue;
            }
            table => known(&format!("[{table}]\nunknown = 1")),
        };
        assert!(shown.contains_key(&table), "{table}");
        assert!(keys.iter().all(|key| shown[&table].get(key).is_some()), "{table}: {keys:?}");
    }
}

#[test]
fn a_mistake_is_named_with_its_line() {
    let target = "[[target]]\nname = \"a\"\nkind = \"prometheus\"\nurl = \"http://localhost/\"\n";
    let error = parse(&format!("[sender]\nbatch = 0\n{target}")).unwrap_err();
    assert_eq!((error.line, error.key.as_deref()), (Some(2), Some("sender.batch")));
    assert!(error.to_string().contains("0 is out of range: 1 to 100000"), "{error}");
    assert!(parse(target).is_ok());
}

#[test]
fn only_this_machine_is_spoken_to_in_the_clear_unless_it_is_allowed() {
    for (url, allowed) in [
        ("http://127.0.0.1/", true),
        ("http://localhost:9/x", true),
        ("http://[::1]/", true),
        ("https://far.example/", true),
        ("http://far.example/", false),
        ("http://127.0.0.1.far.example/", false),
    ] {
        let target = format!("[[target]]\nname = \"a\"\nkind = \"prometheus\"\nurl = \"{url}\"\n");
        assert_eq!(parse(&target).is_ok(), allowed, "{url}");
        assert!(parse(&format!("{target}allow_http = true")).is_ok(), "{url}");
    }
}

#[test]
fn credentials_become_headers_and_show_in_no_debug_form() {
    for (keys, name, value) in [
        ("token = \"t0k\"", "Authorization", "Bearer t0k"),
        ("username = \"u\"\npassword = \"t0k\"", "Authorization", "Basic dTp0MGs="),
    ] {
        let text = format!("[[target]]\nname = \"a\"\nkind = \"prometheus\"\nurl = \"http://localhost/\"\n{keys}");
        let lanes = parse(&text).unwrap().lanes().unwrap();
        assert_eq!(lanes[0].credentials, [(name, Secret::new(value.into()))]);
        assert!(!format!("{lanes:?}").contains("t0k"));
    }
}

#[test]
fn a_target_has_the_batch_that_it_says_or_that_suits_what_it_speaks() {
    for (kind, more, batch) in [
        ("prometheus", "", 2000),
        ("prometheus2", "", 2000),
        ("victoriametrics", "", 10_000),
        ("victoriametrics", "batch = 300", 300),
        ("prometheus", "batch = 7000", 7000),
    ] {
        let target = format!("[[target]]\nname = \"a\"\nkind = \"{kind}\"\nurl = \"http://localhost/\"\n{more}");
        let lanes = parse(&format!("[sender]\nbatch = 2000\n{target}")).unwrap().lanes().unwrap();
        assert_eq!(lanes[0].batch, batch, "{kind} {more}");
    }
}
