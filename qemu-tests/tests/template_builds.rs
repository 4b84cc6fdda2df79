//! Recipes: their steps, what is kept of them, how they fail and end; and archives that mean harm.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

use qemu_tests::internet::{HOST, Internet};
use qemu_tests::packages::INDEX;
use qemu_tests::templates::{
    Place, build, entry, fails, image, remove, said, sandbox, small, start, traces, wait_until_gone, write_image,
};
use qemu_tests::{Request, shared, timing};
use warren::archive::{Entry, Kind, pack};

const RECIPE: &str = "FROM base\n\
    ENV COLOUR=blue WHERE=/srv/app\n\
    RUN echo $COLOUR > /made && id -u >> /made && pwd >> /made\n\
    WORKDIR $WHERE\n\
    COPY --chown=1000 files/ ./\n\
    COPY one /usr/local/bin/renamed\n\
    RUN pwd >> /made && stat -c '%U %a' inner/x >> /made\n\
    USER user\n\
    RUN id -u > by-user\n\
    CMD [\"sh\", \"-c\", \"sleep 1000\"]\n";

#[test]
fn the_steps_of_a_recipe_are_done_in_order_and_kept_for_the_next_build() {
    let node = shared::node();
    let before = traces(&node);
    let place = Place::new(&RECIPE.replace("COPY --chown=1000 files/", "RUN chown 1000 .\nCOPY --chown=1000 files/"));
    place.write("files/inner/x", b"content");
    place.write("one", b"#!/bin/sh\necho renamed\n");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(place.0.path().join("one"), mode).unwrap();
    let path = place.path();
    build(&node, &small("app", &[], &path));
    let of = sandbox(&node, "app");
    assert_eq!(said(&of, "cat /made"), "blue\n0\n/workspace\n/srv/app\nuser 644\n");
    assert_eq!(
        said(&of, "pwd; id -u; cat inner/x by-user; echo $COLOUR; renamed"),
        "/srv/app\n1000\ncontent1000\nblue\nrenamed\n"
    );
    drop(of);

    // The same again: nothing is done.
    let sum = || node.control().ok(Request::new("", "template.inspect").arg("app")).field("sha256").to_string();
    let first = sum();
    let again = build(&node, &small("app", &[], &path));
    assert!(again.stderr.contains("nothing has changed") && !again.stderr.contains("[1/"), "{}", again.stderr);
    assert_eq!(sum(), first);
    // Under another name, all steps are kept; a file that changes does those again that come after it.
    let other = build(&node, &small("app:other", &[], &path));
    assert_eq!(other.stderr.matches("(kept)").count(), 7, "{}", other.stderr);
    place.write("files/inner/x", b"another");
    let changed = build(&node, &small("app", &[], &path));
    assert_eq!(changed.stderr.matches("(kept)").count(), 3, "{}", changed.stderr);
    assert_eq!(sandbox(&node, "app").sh("cat inner/x /made | head -c 12"), "anotherblue\n");
    assert_eq!(sandbox(&node, "app:other").sh("cat inner/x"), "content");
    for name in ["app", "app:other"] {
        remove(&node, name);
    }
    wait_until_gone(&node, &before);
}

#[test]
fn a_recipe_is_built_on_an_image_beside_it() {
    let node = shared::node();
    let Some(layout) = image("layout") else { return };
    // What is there stays as it is where COPY has a directory of its name: modes, and links that lead to one.
    let place = Place::new(
        "FROM ./image\nRUN echo $GREETING > /tmp/greeting\nENV GREETING=bye\n\
         USER 0\nRUN mkdir -m 1777 /real && busybox ln -s real /other\nCOPY tree/ /\nUSER app\n",
    );
    place.write("tree/other/x", b"copied");
    std::os::unix::fs::symlink(layout, place.0.path().join("image")).unwrap();
    build(&node, &small("on-image", &["--no-cache", "--ref", "app"], &place.path()));
    let of = sandbox(&node, "on-image");
    assert_eq!(said(&of, "cat /tmp/greeting; echo $GREETING; id -u; pwd"), "hello\nbye\n1234\n/data\n");
    assert_eq!(said(&of, "cat /real/x; readlink /other; stat -c %a /real"), "copiedreal\n1777\n");
    drop(of);
    remove(&node, "on-image");
}

#[test]
fn a_step_has_the_network_that_its_build_asks_for_and_reaches_nothing_private() {
    let node = shared::node();
    let Some(root) = image("root.tar") else { return };
    let (before, internet) = (traces(&node), Internet::of(&node));
    node.sh(&format!("rm -rf {INDEX}; mkdir -p {INDEX} && echo fetched > {INDEX}/file"));
    // What must not be reached answers whoever gets there.
    node.sh("nc -ll -p 80 -e echo hello > /dev/null 2>&1 & echo");
    let fetch = format!("busybox timeout 20 wget -q -O /fetched http://{HOST}:8000/file");
    let place = Place::new(&format!(
        "FROM ./image\n\
         RUN {fetch}\n\
         RUN for host in {HOST} 10.0.0.5 192.168.1.1 93.0.0.1 $(busybox ip route | busybox awk '/default/ {{print $3}}'); do\\\n\
         (echo hello | busybox timeout 6 busybox nc -w 6 $host 80 | grep -q hello && echo $host >> /reached) & done; wait; true\n\
         RUN grep nameserver /etc/resolv.conf > /servers\n"
    ));
    // An image that brings name servers of where it was made.
    let entry = warren::archive::Entry { mode: 0o644, ..entry("etc/resolv.conf") };
    let servers = pack(&[(entry, &b"nameserver 10.0.0.5\n"[..])]);
    write_image(&place.0.path().join("image"), &[fs::read(root).unwrap(), servers]);
    let path = place.path();
    build(&node, &small("fetched", &["--no-cache", "--network", "on"], &path));
    let of = sandbox(&node, "fetched");
    assert_eq!(
        of.sh("cat /fetched /reached; busybox tail -n 1 /servers"),
        format!("fetched\n{HOST}\nnameserver 9.9.9.9\n")
    );
    drop(of);
    assert_eq!((internet.count("10.0.0.5", "tcp"), internet.count("192.168.1.1", "tcp")), (0, 0));
    node.sh("killall nc");
    remove(&node, "fetched");

    // Without a network, and with one that leads elsewhere only, nothing is fetched.
    let requests = internet.count(HOST, "http");
    assert!(requests > 0);
    let place = Place::new(&format!("FROM base\nRUN {}\n", fetch.replace("timeout 20", "timeout 4")));
    for network in [&[][..], &["--network", "on", "--deny", HOST]] {
        let failed =
            fails(&node, &small("fetched", &[network, &["--no-cache"]].concat(), &place.path()), "BUILD_FAILED");
        assert!(failed.stderr.contains("step 1 of 1") && failed.stderr.contains("exit code "), "{}", failed.stderr);
    }
    assert_eq!(internet.count(HOST, "http"), requests);
    wait_until_gone(&node, &before);
}

#[test]
fn a_step_that_fails_is_named_with_what_it_said() {
    let node = shared::node();
    let before = traces(&node);
    let place = Place::new("FROM base\nRUN echo fine\n\nRUN echo it breaks >&2; exit 3\n");
    let failed = fails(&node, &small("broken", &["--no-cache"], &place.path()), "BUILD_FAILED");
    assert!(failed.stderr.contains("step 2 of 2"), "{}", failed.stderr);
    assert!(failed.stderr.contains("Dockerfile:4: RUN echo it breaks"), "{}", failed.stderr);
    assert!(failed.stderr.contains("exit code 3") && failed.stderr.contains("it breaks\n"), "{}", failed.stderr);
    for (recipe, code, part) in [
        ("FROM base\nADD x /\n", "BAD_ARGUMENT", "Dockerfile:2: ADD is an instruction that templates are not built by"),
        ("FROM base\nRUN x\nHALLO\n", "BAD_ARGUMENT", "Dockerfile:3: HALLO says nothing"),
        ("FROM nothing-like-it\nRUN x\n", "NOT_FOUND", "no template nothing-like-it"),
        ("FROM base\nCOPY lacking /\n", "BAD_ARGUMENT", "lacking"),
        ("FROM base\nUSER nobody-like-it\nRUN x\n", "BAD_ARGUMENT", "nobody-like-it"),
    ] {
        let place = Place::new(recipe);
        let failed = fails(&node, &small("broken", &["--no-cache"], &place.path()), code);
        assert!(failed.stderr.contains(part), "{recipe}: {}", failed.stderr);
    }
    wait_until_gone(&node, &before);
}

/// Waits until a build has come so far that its log has this.
fn wait_for_log(log: &std::path::Path, part: &str) {
    timing::wait_for(part, || fs::read_to_string(log).ok().filter(|text| text.contains(part)));
}

#[test]
fn a_build_that_is_cancelled_leaves_nothing() {
    let node = shared::node();
    let before = traces(&node);
    let place = Place::new("FROM base\nRUN echo begun; sleep 100000\n");
    let (path, log) = (place.path(), place.0.path().join("log"));
    let arguments = small("cancelled", &["--no-cache"], &path);
    // Ctrl-C.
    let building = start(&node, &arguments, &log);
    wait_for_log(&log, "begun");
    assert!(traces(&node).len() > before.len());
    let pid = i32::try_from(building.id()).unwrap();
    // SAFETY: the process is a child of ours that has not been waited for.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGINT) }, 0);
    let ended = building.wait(timing::hang()).expect("it ends");
    assert_eq!(ended.code(), Some(130), "{}", fs::read_to_string(&log).unwrap());
    wait_until_gone(&node, &before);
    // A client that is gone.
    let building = start(&node, &arguments, &log);
    wait_for_log(&log, "begun");
    building.kill();
    wait_until_gone(&node, &before);
}

#[test]
fn a_supervisor_that_is_killed_in_a_build_leaves_nothing() {
    let node = shared::node();
    let before = traces(&node);
    let place = Place::new("FROM base\nRUN echo first\nRUN echo begun; sleep 100000\n");
    let (path, log) = (place.path(), place.0.path().join("log"));
    let building = start(&node, &small("killed", &[], &path), &log);
    wait_for_log(&log, "begun");
    // What a thread was making when it went.
    node.sh("mkdir -p /data/templates/.build-left && echo x > /data/templates/.build-left/rootfs.img");
    let supervisor = node.supervisor();
    node.sh(&format!("kill -9 {supervisor}"));
    timing::wait_for("another supervisor", || (node.supervisor() != supervisor).then_some(()));
    let ended = building.wait(timing::hang()).expect("it ends");
    assert_eq!(ended.code(), Some(1), "{}", fs::read_to_string(&log).unwrap());
    node.wait_until_ready();
    wait_until_gone(&node, &before);
    // What was kept of the first step is of use to the next build.
    place.write("Dockerfile", b"FROM base\nRUN echo first\nRUN echo second\n");
    let done = build(&node, &small("killed", &[], &path));
    assert_eq!(done.stderr.matches("(kept)").count(), 1, "{}", done.stderr);
    remove(&node, "killed");
    wait_until_gone(&node, &before);
}

#[test]
fn archives_that_mean_harm_are_errors_that_say_what() {
    let node = shared::node();
    let (before, place) = (traces(&node), Place::new("FROM base\n"));
    let file = |path: &str| (entry(path), &b"x"[..]);
    let link = |kind, path: &str, to: &str| (Entry { kind, link: to.as_bytes().to_vec(), ..entry(path) }, &b""[..]);
    let whole = pack(&[file("a"), file("b")]);
    let mut flipped = whole.clone();
    flipped[1024 + 3] ^= 1;
    for (name, octets, code, part) in [
        ("absolute", pack(&[file("ok"), file("/etc/passwd")]), "BAD_ARCHIVE", "path \"/etc/passwd\" is absolute"),
        ("above", pack(&[file("../../etc/passwd")]), "BAD_ARCHIVE", "path \"../../etc/passwd\" leaves the root"),
        ("hard", pack(&[link(Kind::HardLink, "x", "../../etc/shadow")]), "BAD_ARCHIVE", "\"../../etc/shadow\" leaves"),
        ("cut", pack(&[(entry("a"), &[7; 700])])[..1100].to_vec(), "BAD_ARCHIVE", "ends within an entry"),
        ("flipped", flipped, "BAD_ARCHIVE", "its checksum is wrong"),
        ("xz", b"\xfd7zXZ\0and so on".to_vec(), "BAD_ARCHIVE", "compressed with xz"),
        ("parent", pack(&[file("f"), file("f/x")]), "BAD_ARCHIVE", "/f is no directory, and something is to be in it"),
        ("root", pack(&[file("ok"), link(Kind::SymbolicLink, "./", "ok")]), "BAD_ARCHIVE", "the root is to be"),
        (
            "nothing",
            pack(&[link(Kind::HardLink, "x", "none")]),
            "BAD_ARCHIVE",
            "/x as a hard link to /none: there is no such file",
        ),
        (
            "attribute",
            pack(&[(Entry { attributes: vec![(b"user.a".to_vec(), vec![1; 9000])], ..entry("x") }, b"")]),
            "OUT_OF_RANGE",
            "/x: attribute user.a of 9000 octets: a file's attributes have room for 4096",
        ),
    ] {
        let path = place.write(name, &octets);
        let failed = fails(&node, &small("harm", &["--no-cache"], &path.display().to_string()), code);
        assert!(failed.stderr.contains(part), "{name}: {}", failed.stderr);
    }
    // A link that leads out ends within: what is written through it is in the template.
    let octets = pack(&[
        link(Kind::SymbolicLink, "out", "../../../../inner"),
        (Entry { kind: Kind::Directory, mode: 0o755, ..entry("inner") }, b""),
        file("out/file"),
    ]);
    let Some(root) = image("root.tar") else { return };
    let root = fs::read(root).unwrap();
    let end = root.len() - root.iter().rev().take_while(|&&octet| octet == 0).count();
    let octets = [&root[..end.next_multiple_of(512)], &octets].concat();
    let path = place.write("through", &octets);
    build(&node, &small("harm", &["--no-cache"], &path.display().to_string()));
    assert_eq!(sandbox(&node, "harm").sh("cat /inner/file"), "x");
    remove(&node, "harm");
    wait_until_gone(&node, &before);
}

/// A file of zeroes, compressed on its way to where it goes.
fn gzip(place: &Place, name: &str, write: impl FnOnce(&mut dyn Write)) -> String {
    let path = place.0.path().join(name);
    let mut gzip =
        Command::new("gzip").arg("-1").stdin(Stdio::piped()).stdout(fs::File::create(&path).unwrap()).spawn().unwrap();
    let mut out = std::io::BufWriter::new(gzip.stdin.take().unwrap());
    write(&mut out);
    drop(out);
    assert!(gzip.wait().unwrap().success());
    path.display().to_string()
}

#[test]
fn archives_that_are_too_much_are_errors_with_their_limits() {
    let node = shared::node();
    let (before, place) = (traces(&node), Place::new("FROM base\n"));
    // Some KiB that unpack to a TiB: it ends where the disk does.
    let bomb = gzip(&place, "bomb.gz", |out| {
        out.write_all(&warren::archive::write_entry(&Entry { size: 1 << 40, ..entry("zeroes") })).unwrap();
        (0..128).for_each(|_| out.write_all(&[0; 1 << 20]).unwrap());
    });
    let failed = fails(&node, &small("much", &["--no-cache"], &bomb), "NO_CAPACITY");
    assert!(failed.stderr.contains("the template's disk is full"), "{}", failed.stderr);
    // More files than an archive may have; devices, which take no room.
    let many = gzip(&place, "many.gz", |out| {
        let header = warren::archive::write_entry(&Entry { kind: Kind::Character, ..entry("null") });
        (0..1_000_000).for_each(|_| out.write_all(&header).unwrap());
    });
    let arguments = ["template", "build", "-t", "much", "-m", "192M", "--disk", "640M", "--no-cache", &many];
    let failed = fails(&node, &arguments, "OUT_OF_RANGE");
    assert!(failed.stderr.contains("more than 500000 entries"), "{}", failed.stderr);
    wait_until_gone(&node, &before);
}

#[test]
fn a_layer_that_is_not_what_its_image_says_is_refused() {
    let node = shared::node();
    let Some(layout) = image("layout") else { return };
    let (before, place) = (traces(&node), Place::new("FROM base\n"));
    let copy = place.0.path().join("copy");
    let copied = Command::new("cp").arg("-rL").arg(&layout).arg(&copy).status().unwrap();
    assert!(copied.success());
    // The largest file is a layer.
    let blobs = fs::read_dir(copy.join("blobs/sha256")).unwrap().map(|entry| entry.unwrap().path());
    let largest = blobs.max_by_key(|path| path.metadata().unwrap().len()).unwrap();
    let mut octets = fs::read(&largest).unwrap();
    let last = octets.len() - 1;
    octets[last] ^= 1;
    fs::write(&largest, &octets).unwrap();
    let arguments = small("damaged", &["--no-cache", "--ref", "app"], copy.to_str().unwrap());
    let failed = qemu_tests::templates::warren(&node, &arguments);
    assert_eq!(failed.code, Some(1), "{}", failed.stderr);
    let name = largest.file_name().unwrap().to_str().unwrap();
    assert!(failed.stderr.contains(name) && failed.stderr.contains("has sha256"), "{}", failed.stderr);
    octets.pop();
    fs::write(&largest, &octets).unwrap();
    let failed = fails(&node, &arguments, "CORRUPT");
    assert!(failed.stderr.contains("the image's manifest says"), "{}", failed.stderr);
    wait_until_gone(&node, &before);
}
