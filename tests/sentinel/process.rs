//! A sentinel in a directory of its own.

use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Only a guard against a hang.
pub const GUARD: Duration = Duration::from_secs(180);

/// A directory that is removed at the end.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("warren-sentinel-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Waits until `done` gives something.
pub fn until<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + GUARD;
    loop {
        if let Some(result) = done() {
            return result;
        }
        assert!(Instant::now() < end, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// One sentinel: its directory, its configuration and, when it runs, its process.
pub struct Sentinel {
    pub scratch: Scratch,
    child: Option<Child>,
}

impl Sentinel {
    /// Not running yet. `more` is added to a configuration that needs little.
    pub fn new(more: &str) -> Self {
        let sentinel = Self { scratch: Scratch::new(), child: None };
        sentinel.configure(more);
        sentinel
    }

    pub fn config(&self) -> PathBuf {
        self.scratch.path("sentinel.toml")
    }

    pub fn data(&self) -> PathBuf {
        self.scratch.path("data")
    }

    /// Replaces the configuration in one step.
    pub fn configure(&self, more: &str) {
        self.configure_only(&format!("metrics.listen = \"\"\nbuffer.min_free_mib = 0\n{more}"));
    }

    /// The same, without anything but the directory.
    pub fn configure_only(&self, more: &str) {
        let text = format!("paths.data = {:?}\n{more}\n", self.data());
        write_private(&self.scratch.path("new.toml"), &text);
        std::fs::rename(self.scratch.path("new.toml"), self.config()).unwrap();
    }

    /// Runs `warren sentinel VERB --config …`.
    pub fn command(&self, verb: &str) -> Output {
        Command::new(env!("CARGO_BIN_EXE_warren"))
            .args(["sentinel", verb, "--config"])
            .arg(self.config())
            .output()
            .unwrap()
    }

    /// Starts it and waits until it answers.
    pub fn start(&mut self) {
        self.start_with(&[]);
    }

    pub fn start_with(&mut self, environment: &[(&str, &str)]) {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.scratch.path("log")).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_warren"))
            .args(["sentinel", "start", "--config"])
            .arg(self.config())
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
        until("the start", || {
            let ended = self.child.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none(), "{ended:?}: {}", self.log());
            self.status()
        });
    }

    /// What it has logged so far, over all its lives.
    pub fn log(&self) -> String {
        let mut text = String::new();
        std::fs::File::open(self.scratch.path("log")).unwrap().read_to_string(&mut text).unwrap();
        text
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// Nothing when it does not answer.
    pub fn status(&self) -> Option<Value> {
        let output = self.command("status");
        serde_json::from_slice(&output.stdout).ok()
    }

    /// Samples accepted in this life.
    pub fn accepted(&self) -> u64 {
        self.status().unwrap()["buffer"]["accepted"].as_u64().unwrap()
    }

    pub fn target(&self, name: &str) -> Value {
        let status = self.status().unwrap();
        let targets = status["targets"].as_array().unwrap();
        targets.iter().find(|target| target["name"] == name).unwrap().clone()
    }

    /// kill -9.
    pub fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// SIGTERM, and its exit code.
    pub fn stop(&mut self) -> i32 {
        let mut child = self.child.take().unwrap();
        let pid = nix::unistd::Pid::from_raw(child.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        let end = Instant::now() + GUARD;
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status.code().unwrap_or(-1);
            }
            if Instant::now() > end {
                child.kill().unwrap();
                panic!("it did not end: {}", self.log());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Sentinel {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Mode 0600.
pub fn write_private(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

/// This machine's own metrics, ten times a second.
pub const NODE: &str = "[[task]]\nid = \"node\"\nplugin = \"node\"\ninterval_ms = 100\n";

/// Sending without waiting.
pub const QUICK: &str = "sender.flush_ms = 20\nsender.retry_ms = 50\nsender.retry_longest_s = 1\n";

pub fn target(name: &str, kind: &str, url: &str) -> String {
    format!("[[target]]\nname = \"{name}\"\nkind = \"{kind}\"\nurl = \"{url}\"\n")
}
