//! Templates that tests have built, by the command line as a user would.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use sha2::{Digest, Sha256};
use warren::archive::Entry;
use warren::wire::Request;

use crate::artefacts::Artefact;
use crate::files::TempDir;
use crate::node::Node;
use crate::process::Process;
use crate::sandbox::Sandbox;
use crate::timing;

/// The command line against a node.
pub fn command(node: &Node, arguments: &[&str]) -> Command {
    let mut command = Command::new(Artefact::Warren.path());
    command.arg("--socket").arg(node.socket()).args(arguments).stdin(Stdio::null());
    command
}

/// What a command line has done.
#[derive(Debug)]
pub struct Done {
    /// Its exit code.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// Runs the command line to its end.
pub fn warren(node: &Node, arguments: &[&str]) -> Done {
    let Output { status, stdout, stderr } = command(node, arguments).output().expect("warren starts");
    let text = |octets: Vec<u8>| String::from_utf8_lossy(&octets).into_owned();
    Done { code: status.code(), stdout: text(stdout), stderr: text(stderr) }
}

/// Arguments of a small build. The disk is no larger than it must be: an emulated node hashes some MiB a second.
pub fn small<'a>(name: &'a str, more: &[&'a str], path: &'a str) -> Vec<&'a str> {
    [&["template", "build", "-t", name, "-m", "192M", "--disk", "48M"], more, &[path]].concat()
}

/// Builds a template.
///
/// # Panics
/// When that fails.
pub fn build(node: &Node, arguments: &[&str]) -> Done {
    let done = warren(node, arguments);
    assert_eq!(done.code, Some(0), "{arguments:?}: {}", done.stderr);
    done
}

/// Has a build fail, with this code.
///
/// # Panics
/// When it does not, or with another one.
pub fn fails(node: &Node, arguments: &[&str], code: &str) -> Done {
    let done = warren(node, arguments);
    assert_eq!(done.code, Some(1), "{arguments:?}: {}", done.stderr);
    let error = format!("error: {code}: ");
    assert!(done.stderr.lines().any(|line| line.starts_with(&error)), "{arguments:?}: {code}: {}", done.stderr);
    done
}

/// Starts a build and leaves it running; its standard error goes to a file.
pub fn start(node: &Node, arguments: &[&str], log: &Path) -> Process {
    let mut command = command(node, arguments);
    command.stdout(Stdio::null()).stderr(fs::File::create(log).expect("a log can be made"));
    Process::spawn(command).expect("warren starts")
}

/// A directory to build from, with its recipe.
pub struct Place(pub TempDir);

impl Place {
    /// One with that recipe.
    ///
    /// # Panics
    /// When it cannot be made, as everything here.
    pub fn new(recipe: &str) -> Self {
        let place = Self(TempDir::new().expect("a directory can be made"));
        place.write("Dockerfile", recipe.as_bytes());
        place
    }

    /// Puts a file into it, in directories that need not be there.
    pub fn write(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        fs::create_dir_all(path.parent().expect("it is in the place")).expect("a directory can be made");
        fs::write(&path, content).expect("a file can be written");
        path
    }

    /// Where it is.
    pub fn path(&self) -> String {
        self.0.path().display().to_string()
    }

    /// Starts a build of it and waits until a step says `begun`.
    pub fn begin(&self, node: &Node, name: &str, more: &[&str]) -> Process {
        let building = start(node, &small(name, more, &self.path()), &self.log());
        timing::wait_for("the step to begin", || self.said().contains("begun\n").then_some(()));
        building
    }

    fn log(&self) -> PathBuf {
        self.0.path().join("log")
    }

    /// What that build has said so far.
    pub fn said(&self) -> String {
        fs::read_to_string(self.log()).unwrap_or_default()
    }
}

/// A sandbox of a template.
pub fn sandbox(node: &Node, template: &str) -> Sandbox {
    node.sandbox(&[("template", template), ("memory_mib", "128")])
}

/// Removes a template.
///
/// # Panics
/// When it cannot be.
pub fn remove(node: &Node, name: &str) {
    node.control().ok(Request::new("", "template.remove").arg(name));
}

/// What there is that builds could leave: folders of templates, and sandboxes.
pub fn traces(node: &Node) -> BTreeSet<String> {
    let folders = node.sh("ls -A /data/templates 2>/dev/null || true");
    let sandboxes = node.control().ok(Request::new("", "sandbox.list")).items;
    let sandboxes = sandboxes.iter().filter_map(|row| row.get("id").map(str::to_string));
    folders.lines().map(str::to_string).chain(sandboxes).collect()
}

/// Waits until there is no more than there was.
///
/// # Panics
/// When something stays.
pub fn wait_until_gone(node: &Node, before: &BTreeSet<String>) {
    timing::wait_for("the build's traces to go", || (traces(node) == *before).then_some(()));
    node.assert_ledger_agrees();
}

/// What a shell says in a sandbox as the user that its template says.
pub fn said(of: &Sandbox, script: &str) -> String {
    of.exec(&["/bin/sh", "-c", script]).text("stdout")
}

/// One of the images that others' programs have made; `None`, with a word on it, where there is none.
pub fn image(name: &str) -> Option<PathBuf> {
    let done = Artefact::Images.path();
    let path = done.parent()?.join(name);
    if path.exists() {
        return Some(path);
    }
    assert!(std::env::var_os("CI").is_none(), "there is no image {name}");
    eprintln!("SKIPPED: there is no image {name}; image/test-images makes it");
    None
}

/// An entry of an archive.
pub fn entry(path: &str) -> Entry {
    Entry { path: path.as_bytes().to_vec(), mode: 0o644, ..Entry::default() }
}

/// Writes an OCI image of these layers, tar archives, the lowest first.
///
/// # Panics
/// When it cannot be written.
pub fn write_image(directory: &Path, layers: &[Vec<u8>]) {
    let blobs = directory.join("blobs/sha256");
    fs::create_dir_all(&blobs).expect("a directory of a test's can be made");
    let put = |content: &[u8]| {
        let digest: String = Sha256::digest(content).iter().map(|octet| format!("{octet:02x}")).collect();
        fs::write(blobs.join(&digest), content).expect("there is room");
        (format!("{{\"digest\":\"sha256:{digest}\",\"size\":{}}}", content.len()), format!("\"sha256:{digest}\""))
    };
    let (layers, ids): (Vec<String>, Vec<String>) = layers.iter().map(|layer| put(layer)).unzip();
    let config = format!(
        "{{\"architecture\":\"amd64\",\"os\":\"linux\",\"config\":{{\"Env\":[\"PATH=/bin\"]}},\"rootfs\":{{\"diff_ids\":[{}]}}}}",
        ids.join(",")
    );
    let manifest = format!("{{\"config\":{},\"layers\":[{}]}}", put(config.as_bytes()).0, layers.join(","));
    let index = format!("{{\"manifests\":[{}]}}", put(manifest.as_bytes()).0);
    fs::write(directory.join("index.json"), index).expect("there is room");
    fs::write(directory.join("oci-layout"), "{\"imageLayoutVersion\":\"1.0.0\"}").expect("there is room");
}
