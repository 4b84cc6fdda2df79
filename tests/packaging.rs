//! The sentinel's release: what is in it, that it is the same each time, and that it installs.

#![allow(clippy::unwrap_used)] // a failure is the finding

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A directory that is removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("warren-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn run(program: &Path, arguments: &[&Path]) -> Output {
    Command::new(program).args(arguments).output().unwrap()
}

/// The release, made of the binary under test.
fn package(scratch: &Scratch, directory: &str) -> PathBuf {
    std::fs::create_dir_all(scratch.path(directory)).unwrap();
    let out = scratch.path(directory).join("sentinel.tar.gz");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/sentinel/package");
    let output = run(&script, &[Path::new(env!("CARGO_BIN_EXE_warren")), &out]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    out
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).permissions().mode() & 0o7777
}

#[test]
fn the_release_is_the_same_each_time_and_installs_into_a_root() {
    let scratch = Scratch::new("package");
    let (one, two) = (package(&scratch, "one"), package(&scratch, "two"));
    assert!(std::fs::read(&one).unwrap() == std::fs::read(&two).unwrap(), "two releases of one tree differ");
    let unpack = Command::new("tar").arg("-xzf").arg(&one).current_dir(&scratch.0).status().unwrap();
    assert!(unpack.success());
    let release = scratch.path("sentinel");
    let listed = Command::new("tar").arg("-tzvf").arg(&one).output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    for file in [
        "warren",
        "install",
        "sentinel.toml",
        "sentinel.service",
        "Containerfile",
        "LICENSE",
        "docs/sentinel.md",
        "docs/plugins.md",
        "examples/plugins/python/warren_plugin.py",
    ] {
        assert!(release.join(file).is_file(), "{file} is missing");
    }
    assert!(listed.lines().all(|line| line.contains(" 0/0 ")), "somebody's name is in it:\n{listed}");
    assert!(!listed.contains("__pycache__"));

    let root = scratch.path("root");
    let install = run(&release.join("install"), &[Path::new("--root"), &root]);
    assert!(install.status.success(), "{}", String::from_utf8_lossy(&install.stderr));
    let binary = root.join("usr/bin/warren");
    let config = root.join("etc/sentinel/sentinel.toml");
    assert_eq!((mode(&binary), mode(&config)), (0o755, 0o600));
    // What was installed is what the unit starts, and the configuration is a good one.
    let unit = std::fs::read_to_string(root.join("etc/systemd/system/sentinel.service")).unwrap();
    assert!(unit.contains("ExecStart=/usr/bin/warren sentinel start --config /etc/sentinel/sentinel.toml\n"));
    for line in [
        "User=sentinel",
        "Restart=on-failure",
        "RestartSec=10",
        "NoNewPrivileges=yes",
        "CapabilityBoundingSet=CAP_NET_RAW",
    ] {
        assert!(unit.lines().any(|known| known == line), "{line}");
    }
    let check = run(&binary, &[Path::new("sentinel"), Path::new("check"), Path::new("--config"), &config]);
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stderr));

    // Again, over one that is configured and runs: its binary is replaced, its configuration kept.
    std::fs::write(&config, "# mine\n").unwrap();
    let open = std::fs::File::open(&binary).unwrap();
    assert!(run(&release.join("install"), &[Path::new("--root"), &root]).status.success());
    assert_eq!(std::fs::read_to_string(&config).unwrap(), "# mine\n");
    use std::os::unix::fs::MetadataExt;
    assert_ne!(open.metadata().unwrap().ino(), std::fs::metadata(&binary).unwrap().ino());
    assert!(!root.join("usr/bin/.warren.new").exists());

    // Misuse is told, and does nothing.
    let misuse = run(&release.join("install"), &[Path::new("--everywhere")]);
    assert_eq!(misuse.status.code(), Some(2));
}

#[test]
fn the_container_recipe_copies_only_what_the_release_has() {
    let recipe = include_str!("../packaging/sentinel/Containerfile");
    let package = include_str!("../packaging/sentinel/package");
    for line in recipe.lines().filter_map(|line| line.strip_prefix("COPY ")) {
        let source = line.split(' ').next().unwrap();
        assert!(package.contains(source), "{source} is not in the release");
    }
    assert!(recipe.contains("USER 900:900"));
}
