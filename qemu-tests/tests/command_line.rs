//! `warren` on the command line against a node: what `make run` does.

use std::path::Path;
use std::process::{Command, Output};

use qemu_tests::artefacts::Artefact;
use qemu_tests::{Node, shared};

fn warren(node: &Node, arguments: &[&str]) -> Output {
    Command::new(Artefact::Warren.path())
        .arg("--socket")
        .arg(node.socket())
        .args(arguments)
        .stdin(std::process::Stdio::null())
        .output()
        .expect("warren starts")
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_python_script_is_copied_in_run_and_its_exit_code_passed_through() {
    let node = shared::node_with_templates();
    let created = warren(&node, &["create", "-t", "python"]);
    assert!(created.status.success(), "{}", stderr(&created));
    let id = stdout(&created).trim_end().to_string();
    assert!(!id.is_empty() && !id.contains(char::is_whitespace), "the id alone is printed: {id:?}");
    let guard = qemu_tests::Sandbox::of(node.control(), &id);

    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/hello.py");
    let copied = warren(&node, &["cp", &script.display().to_string(), &format!("{id}:/workspace/hello.py")]);
    assert!(copied.status.success(), "{}", stderr(&copied));
    let run = warren(&node, &["exec", &id, "--", "python3", "/workspace/hello.py"]);
    assert!(run.status.success(), "{} {}", stdout(&run), stderr(&run));
    assert!(stdout(&run).contains("3.11"), "{}", stdout(&run));

    let code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)";
    let run = warren(&node, &["exec", &id, "--", "python3", "-c", code]);
    assert_eq!(run.status.code(), Some(7));
    assert_eq!(stdout(&run), "out\n");
    assert_eq!(stderr(&run), "err\n");

    let listed = warren(&node, &["ps"]);
    assert!(stdout(&listed).contains(&id), "{}", stdout(&listed));
    let removed = warren(&node, &["rm", "--force", &id]);
    assert!(removed.status.success(), "{}", stderr(&removed));
    guard.keep();
}

#[test]
fn an_error_is_one_line_with_its_code() {
    let node = shared::node_with_templates();
    let output = warren(&node, &["exec", "nosuchsandbox", "--", "true"]);
    assert!(!output.status.success());
    assert!(stderr(&output).starts_with("error: NOT_FOUND: "), "{}", stderr(&output));
    assert_eq!(stdout(&output), "");
}

#[test]
fn run_creates_runs_and_removes() {
    let node = shared::node_with_templates();
    let before = warren(&node, &["ps", "--all", "--json"]);
    let run = warren(&node, &["run", "--rm", "base", "--", "sh", "-c", "echo in a sandbox; exit 3"]);
    assert_eq!(run.status.code(), Some(3), "{}", stderr(&run));
    assert_eq!(stdout(&run), "in a sandbox\n");
    assert_eq!(stdout(&warren(&node, &["ps", "--all", "--json"])), stdout(&before));
}
