//! `sentinel buffer stat | dump | fsck`.

use std::os::unix::fs::FileExt;
use std::process::Command;

use crate::process::{NODE, QUICK, Sentinel, target, until};

fn inspect(verb: &str, directory: &std::path::Path) -> (i32, String) {
    let output =
        Command::new(env!("CARGO_BIN_EXE_warren")).args(["sentinel", "buffer", verb]).arg(directory).output().unwrap();
    (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap())
}

#[test]
fn a_buffer_is_looked_into_and_damage_is_found_and_outlived() {
    // Nobody listens on port 9.
    let to = target("one", "prometheus", "http://127.0.0.1:9/");
    let mut sentinel = Sentinel::new(&format!("{QUICK}{to}{NODE}"));
    sentinel.start();
    until("samples", || (sentinel.accepted() > 1000).then_some(()));
    assert_eq!(sentinel.stop(), 0);
    let directory = sentinel.data().join("buffer");
    let (code, stat) = inspect("stat", &directory);
    let stat: serde_json::Value = serde_json::from_str(&stat).unwrap();
    let samples = stat["segments"][0]["samples"].as_u64().unwrap();
    assert!(code == 0 && samples > 1000, "{stat}");
    let (code, dump) = inspect("dump", &directory);
    assert_eq!((code, dump.lines().count() as u64), (0, samples));
    for line in dump.lines() {
        let sample: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(sample["name"].is_string() && sample["timestamp"].is_i64());
    }
    assert_eq!(inspect("fsck", &directory).0, 0);
    let name = stat["segments"][0]["segment"].as_str().unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(directory.join(name)).unwrap();
    file.write_all_at(&[0xff; 8], file.metadata().unwrap().len() / 2).unwrap();
    let (code, report) = inspect("fsck", &directory);
    assert!(code == 1 && report.contains(name), "{report}");
    let (_, after) = inspect("dump", &directory);
    assert!(after.lines().count() as u64 > samples / 2);
    sentinel.start();
    assert_eq!(inspect("stat", std::path::Path::new("/does/not/exist")).0, 1);
}
