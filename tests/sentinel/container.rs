//! The container's recipe, followed by hand: what it copies is the whole root of a process with its user and its command.

use std::collections::BTreeMap;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::process::{Scratch, until};

/// A process that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// User, root, words: what every container engine gives a root, in mounts that go with the process.
const ENTER: &str = "mount --rbind /dev \"$2/dev\" && mount -t proc proc \"$2/proc\" && user=$1 && root=$2 && shift 2 && \
                     exec chroot --userspec=\"$user\" \"$root\" \"$@\"";

/// The words of a list: `["a", "b"]`.
fn list(text: &str) -> Vec<String> {
    serde_json::from_str(text).unwrap()
}

#[test]
fn the_containers_recipe_gives_a_root_in_which_the_sentinel_runs_as_its_user() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: only root can make another root its own");
        return;
    }
    let packaging = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/sentinel");
    let recipe = std::fs::read_to_string(packaging.join("Containerfile")).unwrap();
    let said: Vec<(&str, &str)> =
        recipe.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once(' ')).collect();
    let one: BTreeMap<&str, &str> = said.iter().copied().collect();
    assert_eq!(said[0], ("FROM", "scratch"));

    // As `package` lays the release's directory out.
    let scratch = Scratch::new();
    let release = scratch.path("release");
    std::fs::create_dir(&release).unwrap();
    std::fs::copy(env!("CARGO_BIN_EXE_warren"), release.join("warren")).unwrap();
    // But for the port, which may be somebody's on this machine.
    let config = std::fs::read_to_string(packaging.join("sentinel.toml")).unwrap();
    assert!(config.contains("listen = \"127.0.0.1:9475\""));
    let config = config.replace("listen = \"127.0.0.1:9475\"", "listen = \"\"");
    std::fs::write(release.join("sentinel.toml"), config).unwrap();
    std::fs::copy(packaging.join("../../LICENSE"), release.join("LICENSE")).unwrap();
    for (name, mode) in [("warren", 0o755), ("sentinel.toml", 0o644), ("LICENSE", 0o644)] {
        std::fs::set_permissions(release.join(name), PermissionsExt::from_mode(mode)).unwrap();
    }

    let root = scratch.path("root");
    let inside = |path: &str| root.join(path.trim_start_matches('/'));
    for (_, files) in said.iter().filter(|(word, _)| *word == "COPY") {
        let (from, to) = files.split_once(' ').unwrap();
        std::fs::create_dir_all(inside(to).parent().unwrap()).unwrap();
        std::fs::copy(release.join(from), inside(to)).unwrap();
    }
    ["dev", "proc"].iter().for_each(|place| std::fs::create_dir(root.join(place)).unwrap());
    // The recipe's comment gives the volume to the user (`:U`).
    let (user, group) = one["USER"].split_once(':').unwrap();
    let volume = inside(one["VOLUME"]);
    std::fs::create_dir_all(&volume).unwrap();
    chown(&volume, user.parse().ok(), group.parse().ok()).unwrap();
    std::fs::set_permissions(&scratch.0, PermissionsExt::from_mode(0o755)).unwrap();

    let enter = |words: &[String]| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", ENTER, "sh", one["USER"]]);
        command.arg(&root).args(words);
        command.stdin(Stdio::null()).stderr(Stdio::null());
        command
    };
    let entry = list(one["ENTRYPOINT"]);
    let start = [entry.clone(), list(one["CMD"])].concat();
    // The shipped file sends to a receiver that is not here, and keeps what it cannot send.
    let mut running = Running(enter(&start).stdout(Stdio::null()).spawn().unwrap());
    let ask = [entry, ["status", "--config", start.last().unwrap()].map(String::from).to_vec()].concat();
    let status = until("an answer", || {
        assert!(running.0.try_wait().unwrap().is_none(), "it ended");
        serde_json::from_slice::<serde_json::Value>(&enter(&ask).output().unwrap().stdout).ok()
    });
    assert_eq!(status["state"], "running", "{status}");
    let ids = std::fs::read_to_string(format!("/proc/{}/status", running.0.id())).unwrap();
    assert!(ids.lines().any(|line| line == format!("Uid:\t{user}\t{user}\t{user}\t{user}")), "{ids}");
    assert_eq!(one["STOPSIGNAL"], "SIGTERM");
    let pid = nix::unistd::Pid::from_raw(running.0.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    let ended = until("the end", || running.0.try_wait().unwrap());
    assert!(ended.success(), "{ended}");
}
