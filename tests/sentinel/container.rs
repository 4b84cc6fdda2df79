//! The container's recipe, followed by hand (what it copies is the whole root of a process with its user and its command),
//! and by buildah.

use std::collections::BTreeMap;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::peers::program;
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

fn packaging() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/sentinel")
}

/// As `package` lays the release's directory out.
fn release(scratch: &Scratch) -> PathBuf {
    let packaging = packaging();
    let release = scratch.path("release");
    std::fs::create_dir(&release).unwrap();
    std::fs::copy(env!("CARGO_BIN_EXE_warren"), release.join("warren")).unwrap();
    // But for the port, which may be somebody's on this machine.
    let config = std::fs::read_to_string(packaging.join("sentinel.toml")).unwrap();
    assert!(config.contains("listen = \"127.0.0.1:9475\""));
    let config = config.replace("listen = \"127.0.0.1:9475\"", "listen = \"\"");
    std::fs::write(release.join("sentinel.toml"), config).unwrap();
    std::fs::copy(packaging.join("../../LICENSE"), release.join("LICENSE")).unwrap();
    std::fs::copy(packaging.join("Containerfile"), release.join("Containerfile")).unwrap();
    for (name, mode) in [("warren", 0o755), ("sentinel.toml", 0o644), ("LICENSE", 0o644)] {
        std::fs::set_permissions(release.join(name), PermissionsExt::from_mode(mode)).unwrap();
    }
    release
}

#[test]
fn the_containers_recipe_gives_a_root_in_which_the_sentinel_runs_as_its_user() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: only root can make another root its own");
        return;
    }
    let recipe = std::fs::read_to_string(packaging().join("Containerfile")).unwrap();
    let said: Vec<(&str, &str)> =
        recipe.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once(' ')).collect();
    let one: BTreeMap<&str, &str> = said.iter().copied().collect();
    assert_eq!(said[0], ("FROM", "scratch"));

    let scratch = Scratch::new();
    let release = release(&scratch);
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

/// A list of libraries, where they are, words. What a builder of images leaves outside of its store goes with the process;
/// and it starts itself again without its environment, so that its libraries must be among the system's.
const BUILDER: &str = "mkdir -p /var/lib/containers && mount -t tmpfs none /var/lib/containers && list=$1 && \
                       ldconfig -X -C \"$list\" $2 2> /dev/null && mount --bind \"$list\" /etc/ld.so.cache && \
                       shift 2 && exec \"$@\"";

#[test]
fn buildah_makes_an_image_of_the_recipe_and_the_sentinel_runs_in_it() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: only root can make another root its own");
        return;
    }
    let Some(buildah) = program("buildah", "usr/bin/buildah") else { return };
    let scratch = Scratch::new();
    let release = release(&scratch);
    std::fs::write(scratch.path("policy.json"), r#"{"default": [{"type": "insecureAcceptAnything"}]}"#).unwrap();
    std::fs::set_permissions(&scratch.0, PermissionsExt::from_mode(0o755)).unwrap();
    let places = buildah.get_envs().find_map(|(name, value)| (name == "LD_LIBRARY_PATH").then_some(value?));
    let places = places.and_then(|places| places.to_str()).unwrap().replace(':', " ");
    let run = |words: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", BUILDER, "sh"]);
        command.arg(scratch.path("libraries")).arg(&places).arg(buildah.get_program());
        command.arg("--root").arg(scratch.path("store")).arg("--runroot").arg(scratch.path("run"));
        command.args(["--storage-driver", "vfs"]).args(words).current_dir(&scratch.0).stdin(Stdio::null());
        command
    };
    let said = |words: &[&str]| {
        let output = run(words).output().unwrap();
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_string()
    };
    // Without a runtime for containers: that wants more of the machine than it has everywhere.
    let release = release.to_str().unwrap();
    said(&["bud", "--isolation", "chroot", "--signature-policy", "policy.json", "-q", "-t", "sentinel", release]);
    let image: serde_json::Value = serde_json::from_str(&said(&["inspect", "--type", "image", "sentinel"])).unwrap();
    let config = &image["OCIv1"]["config"];
    assert_eq!((&config["User"], &config["StopSignal"]), (&"900:900".into(), &"SIGTERM".into()));
    assert!(config["Volumes"].get("/var/lib/sentinel").is_some(), "{config}");
    let words = |key: &str| -> Vec<String> { serde_json::from_value(config[key].clone()).unwrap() };
    let (entry, start) = (words("Entrypoint"), words("Cmd"));

    let container = said(&["from", "--signature-policy", "policy.json", "sentinel"]);
    let volume = scratch.path("volume");
    std::fs::create_dir(&volume).unwrap();
    chown(&volume, Some(900), Some(900)).unwrap();
    let volume = format!("{}:/var/lib/sentinel", volume.display());
    let inside = |more: &[String]| {
        let before = ["run", "--isolation", "chroot", "-v", &volume, &container, "--"];
        run(&[&before[..], &entry.iter().chain(more).map(String::as_str).collect::<Vec<_>>()].concat())
    };
    let log = scratch.path("log");
    let out = std::fs::File::create(&log).unwrap();
    let mut running = Running(inside(&start).stdout(out.try_clone().unwrap()).stderr(out).spawn().unwrap());
    let said = || std::fs::read_to_string(&log).unwrap();
    // Two that set their places up in one root at the same time get into each other's way: the first has to be through.
    until("its control socket", || {
        assert!(running.0.try_wait().unwrap().is_none(), "it ended: {}", said());
        scratch.path("volume/control.sock").exists().then_some(())
    });
    let asked = |word: &str| inside(&[&[word.to_string()], &start[1..]].concat()).output().unwrap();
    let status = until("an answer", || {
        assert!(running.0.try_wait().unwrap().is_none(), "it ended: {}", said());
        serde_json::from_slice::<serde_json::Value>(&asked("status").stdout).ok()
    });
    assert_eq!(status["state"], "running", "{status}");
    assert!(asked("stop").status.success());
    let ended = until("the end", || running.0.try_wait().unwrap());
    assert!(ended.success(), "{ended}");
}
