//! What people type, and what is written down of it.

use std::path::PathBuf;
use std::process::{Command, Output};

use crate::process::{NODE, QUICK, Scratch, Sentinel, target, write_private};
use crate::receiver::Receiver;

fn plugin_test(plugin: &str, arguments: &[String]) -> Output {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("examples/plugins").join(plugin);
    let mut command = Command::new(env!("CARGO_BIN_EXE_warren"));
    command.args(["sentinel", "plugin", "test", "--timeout", "60"]).args(arguments).arg(directory).output().unwrap()
}

#[test]
fn a_plugin_is_tried_from_its_directory_and_that_is_written_down() {
    let scratch = Scratch::new();
    for name in ["a.log", "b.log", "c.txt"] {
        std::fs::write(scratch.path(name), "12345").unwrap();
    }
    write_private(&scratch.path("where"), &format!("{}\n", scratch.0.display()));
    let path = [scratch.0.display().to_string(), format!("@{}", scratch.path("where").display())];
    for path in path {
        let arguments = ["--device".into(), format!("path={path}"), "--config".into(), "suffixes=[\".log\"]".into()];
        let output = plugin_test("python", &arguments);
        let (said, log) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
        assert!(output.status.success(), "{said}{log}");
        let count = said.lines().find(|line| line.starts_with("files_count{")).unwrap();
        assert_eq!(count.split(' ').nth(1), Some("2"), "{said}");
        let user = nix::unistd::getuid();
        assert!(log.contains("audit: plugin test /") && log.contains(&format!(" by user {user}: good")), "{log}");
    }
    let output = plugin_test("python", &["--device".into(), "path=tmp".into()]);
    let (said, log) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(!output.status.success() && said.contains("device.path"), "{said}");
    assert!(log.contains(": failed"), "{log}");
}

#[test]
fn who_changes_a_running_sentinel_is_written_down() {
    let receiver = Receiver::new();
    let mut sentinel = Sentinel::new(&format!("{QUICK}{}{NODE}", target("one", "prometheus", &receiver.url())));
    sentinel.start();
    let targets = sentinel.command("targets");
    assert!(String::from_utf8(targets.stdout).unwrap().starts_with("[{"));
    assert!(!sentinel.log().contains("audit"));
    let user = nix::unistd::getuid();
    for word in ["reload", "stop"] {
        assert!(sentinel.command(word).status.success());
        let log = sentinel.log();
        let line = log.lines().find(|line| line.contains(&format!("audit: {word} by user {user}, process "))).unwrap();
        assert!(line.ends_with(": done"), "{line}");
    }
}
