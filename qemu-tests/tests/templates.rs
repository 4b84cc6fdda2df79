//! Templates from root file systems and container images that other programs have made, and what becomes of them.

use qemu_tests::files::TempDir;
use qemu_tests::node::Boot;
use qemu_tests::templates::{
    build, entry, fails, image, remove, said, sandbox, small, traces, wait_until_gone, warren, write_image,
};
use qemu_tests::{Code, Request, Sandbox, shared};
use warren::archive::{Entry, Kind, pack};

fn text(path: &std::path::Path) -> String {
    path.display().to_string()
}

#[test]
fn a_root_file_system_becomes_a_template_however_it_is_compressed() {
    let node = shared::node();
    let before = traces(&node);
    for file in ["root.tar", "root.tar.gz", "root.tar.zst"] {
        let Some(path) = image(file) else { return };
        let done = build(&node, &small("root", &["--no-cache", "--description", file], &text(&path)));
        assert_eq!(done.stdout, "root\n");
        let row = node.control().ok(Request::new("", "template.inspect").arg("root"));
        assert_eq!((row.field("description"), row.field("origin")), (file, "built"));
        let of = sandbox(&node, "root");
        assert_eq!(
            said(&of, "id -u; pwd; cat /etc/passwd | grep app; ls /data"),
            "1000\n/workspace\napp:x:1234:1234:app:/data:/bin/sh\nold\n"
        );
        // Nothing of the builder is in it.
        assert_eq!(said(&of, "ls -A /run/warren | grep mason; grep -c 127.0.1.1 /etc/hosts"), "1\n");
        drop(of);
        remove(&node, "root");
    }
    wait_until_gone(&node, &before);
}

/// What `image/test-images` has put into its image of several layers.
fn assert_layers(node: &qemu_tests::Node, name: &str) {
    let of = sandbox(node, name);
    assert_eq!(said(&of, "id -u; id -g; pwd; echo $GREETING"), "1234\n1234\n/data\nhello\n");
    assert_eq!(
        said(&of, "cat file hard soft; ls /data/old; [ -e gone ] && echo gone; stat -c %h file"),
        "two\ntwo\ntwo\ny\n2\n"
    );
    assert_eq!(said(&of, "stat -c '%a %u:%g' setuid; [ -e device ] && echo device"), "4755 1234:1234\n");
    let row = node.control().ok(Request::new("", "template.inspect").arg(name));
    let words: Vec<&str> = row
        .fields
        .0
        .iter()
        .filter(|(key, _)| key == "start")
        .filter_map(|(_, value)| std::str::from_utf8(value).ok())
        .collect();
    assert_eq!(words, ["sh", "-c", "echo $GREETING"]);
}

#[test]
fn an_image_of_several_layers_is_what_they_are_on_top_of_each_other() {
    let node = shared::node();
    // The last has layers of many zstd frames.
    for (file, more) in [("layout", &["--ref", "app"][..]), ("docker.tar", &[]), ("oci.tar", &[]), ("chunked", &[])] {
        let Some(path) = image(file) else { continue };
        let name = format!("layers:{}", file.replace(".tar", ""));
        let done = build(&node, &small(&name, &[more, &["--no-cache"]].concat(), &text(&path)));
        assert!(done.stderr.contains("1 device nodes were left out"), "{}", done.stderr);
        assert_layers(&node, &name);
        remove(&node, &name);
    }
}

/// Extended attributes of a file.
fn attributes(of: &Sandbox, path: &str) -> String {
    of.sh(&format!("/run/guest-tool attributes path={path}"))
}

#[test]
fn attributes_owners_links_and_changes_of_kind_are_as_umoci_has_written_them() {
    let node = shared::node();
    if let Some(path) = image("awkward") {
        build(&node, &small("awkward", &["--no-cache"], &text(&path)));
        let of = sandbox(&node, "awkward");
        of.put_guest_tool();
        // In the base: kinds, modes, owners, links.
        assert_eq!(
            of.sh("cd /t && stat -c '%n %F %a %u:%g' attributes group sticky pipe"),
            "attributes regular file 644 100000:4000000000\ngroup directory 2755 0:70000\n\
             sticky directory 1777 0:0\npipe fifo 620 0:0\n"
        );
        assert_eq!(of.sh("cd /t && ls -d character block 2>/dev/null || true"), "", "devices are left out");
        assert_eq!(
            of.sh("cd /t && stat -c %i first second | busybox uniq | busybox wc -l && cat high low"),
            "1\nlow\nlow\n"
        );
        assert_eq!(of.sh(&format!("cat /t/{}file", "long/".repeat(200))), "deep\n");
        let capability = format!("security.capability=0100000200200000{}\n", "0".repeat(24));
        assert_eq!(attributes(&of, "/t/capable"), capability);
        assert_eq!(attributes(&of, "/t/attributes"), "user.test=76616c7565003d0a\n");
        assert_eq!(attributes(&of, "/t/group"), "user.directory=78\n");
        // In the layer above: what became of another kind, and what lies where a link led to.
        assert_eq!(
            of.sh("cd /t && stat -c '%n %F' file directory tree link && readlink tree && ls file link elsewhere"),
            "file directory\ndirectory regular file\ntree symbolic link\nlink directory\n/t/elsewhere\n\
             elsewhere:\nx\n\nfile:\nwithin\n\nlink:\nown\n"
        );
        // In the last: a directory that hides all below.
        assert_eq!(of.sh("cd /t/opaque && find . -type f"), "./file\n");
        drop(of);
        remove(&node, "awkward");
    }
}

#[test]
fn layers_that_no_program_writes_are_applied_within_the_disk() {
    let node = shared::node();
    let Some(root) = image("root.tar") else { return };
    let before = traces(&node);
    let file = |path: &str, content: &'static str| (entry(path), content.as_bytes());
    let link = |kind, path: &str, to: &str| (Entry { kind, link: to.into(), mtime: 77, ..entry(path) }, &b""[..]);
    let directory = |path: &str| (Entry { kind: Kind::Directory, mode: 0o755, mtime: 99, ..entry(path) }, &b""[..]);
    let of_kind = |kind, path: &str| (Entry { kind, ..entry(path) }, &b""[..]);
    let low = pack(&[
        file("d/a", ""),
        file("d/b/c", ""),
        file("e/f", ""),
        file("real/old", ""),
        file("gone/x", ""),
        file("file/x", ""),
        file("moved/1", ""),
        file("device", ""),
        file("keep", "kept\n"),
        link(Kind::SymbolicLink, "link", "real"),
        link(Kind::SymbolicLink, "absolute", "/real"),
        link(Kind::SymbolicLink, "above", "../../../../real"),
        link(Kind::SymbolicLink, "away", "/real"),
        // Nobody ever writes to it: who opens it waits.
        of_kind(Kind::Pipe, "etc/hosts"),
    ]);
    let high = pack(&[
        // Parents that are links lead to where they lead within the disk.
        file("link/1", ""),
        file("absolute/2", ""),
        file("above/3", ""),
        file("link/.wh.old", ""),
        // A link is taken away, and not what it leads to.
        file(".wh.away", ""),
        file("d/.wh.a", ""),
        // It comes again in this layer, whatever the order.
        file("d/.wh.b", ""),
        file("d/b/z", ""),
        file("e/new", ""),
        file("e/.wh..wh..opq", ""),
        file(".wh.gone", ""),
        // As umoci has it where a directory became a file, or a link to another directory.
        file("file", ""),
        file("file/.wh.x", ""),
        link(Kind::SymbolicLink, "moved", "/real"),
        file("moved/.wh.1", ""),
        file("moved/.wh..wh..opq", ""),
        file("keep/.wh.x", ""),
        file(".wh.nothing", ""),
        file(".wh..wh.plnk", ""),
        link(Kind::HardLink, "lower", "keep"),
        file("one", "same\n"),
        link(Kind::HardLink, "two", "one"),
        of_kind(Kind::Character, "device"),
        link(Kind::HardLink, "device-too", "device"),
        directory("dated"),
        file("dated/x", ""),
        (Entry { mode: 0o6755, uid: u32::MAX - 1, gid: 65_536, ..entry("owned") }, b""),
        (Entry { attributes: vec![(b"user.one".to_vec(), vec![7; 2000])], ..entry(&"n".repeat(255)) }, b""),
    ]);
    let place = TempDir::new().unwrap();
    write_image(place.path(), &[std::fs::read(root).unwrap(), low, high]);
    let done = build(&node, &small("written", &["--no-cache"], &text(place.path())));
    assert!(done.stderr.contains("2 device nodes were left out"), "{}", done.stderr);
    let of = sandbox(&node, "written");
    of.put_guest_tool();
    assert_eq!(of.sh("ls /real; cd /; find d e -type f | sort"), "1\n2\n3\nd/b/z\ne/new\n");
    assert_eq!(of.sh("cd /; ls -d gone nothing away device device-too .wh* 2>/dev/null || true"), "");
    assert_eq!(
        of.sh("cat /lower /two; stat -c %i /lower /keep /one /two | busybox uniq | busybox wc -l"),
        "kept\nsame\n2\n"
    );
    assert_eq!(of.sh("stat -c '%a %u:%g' /owned"), "6755 4294967294:65536\n");
    assert_eq!(of.sh("stat -c %Y /dated /link"), "99\n77\n");
    assert_eq!(attributes(&of, &format!("/{}", "n".repeat(255))), format!("user.one={}\n", "07".repeat(2000)));
    drop(of);
    remove(&node, "written");
    wait_until_gone(&node, &before);
}

#[test]
fn what_buildah_has_built_runs() {
    let node = shared::node();
    let Some(path) = image("buildah") else { return };
    build(&node, &small("buildah", &["--no-cache"], &text(&path)));
    let of = sandbox(&node, "buildah");
    assert_eq!(said(&of, "id -u; pwd; echo $BUILT; cat /data/by; ls /data"), "0\n/srv\nbuildah\nby buildah\nby\n");
    // Its image names no user.
    assert_eq!(said(&of, "grep -E 'CapEff|Seccomp:' /proc/self/status"), "CapEff:\t00000000000424fb\nSeccomp:\t2\n");
    drop(of);
    remove(&node, "buildah");
}

#[test]
fn a_debian_root_runs() {
    let node = shared::node();
    let Some(path) = image("debian.tar") else { return };
    build(&node, &["template", "build", "-t", "debian:12", "-m", "256M", "--disk", "192M", "--no-cache", &text(&path)]);
    let of = sandbox(&node, "debian:12");
    assert_eq!(
        said(&of, ". /etc/os-release; echo $ID $VERSION_ID; dpkg-query -W -f '${db:Status-Status}' libc6"),
        "debian 12\ninstalled"
    );
    assert_eq!(said(&of, "stat -c %a /tmp /usr/bin/su"), "1777\n4755\n");
    drop(of);
    remove(&node, "debian:12");
}

#[test]
fn a_template_is_tagged_carried_and_removed() {
    let node = shared::node();
    let Some(path) = image("root.tar") else { return };
    let (before, directory) = (traces(&node), TempDir::new().unwrap());
    build(&node, &small("carried", &["--no-cache"], &text(&path)));
    assert_eq!(warren(&node, &["template", "tag", "carried", "carried:1"]).stdout, "carried:1\n");
    let images = "cd /data/templates && stat -c %i carried/rootfs.img carried:1/rootfs.img | uniq | wc -l";
    assert_eq!(node.sh(images).trim(), "1", "the image is there once");
    fails(&node, &["template", "tag", "carried", "base"], "ALREADY_EXISTS");
    fails(&node, &["template", "rm", "base"], "BAD_STATE");

    let of = sandbox(&node, "carried");
    let refused = fails(&node, &["template", "rm", "carried"], "IN_USE");
    assert!(refused.stderr.contains(&of.id), "{}", refused.stderr);
    remove(&node, "carried:1");
    let snapshot = of.client().ok(of.request("snapshot.create")).field("id").to_string();
    drop(of);
    fails(&node, &["template", "rm", "carried"], "IN_USE");
    node.control().ok(Request::new("", "snapshot.remove").arg(&snapshot));

    let file = directory.path().join("carried.template");
    let exported = warren(&node, &["template", "export", "carried", &text(&file)]);
    assert_eq!(exported.code, Some(0), "{}", exported.stderr);
    let sum = node.control().ok(Request::new("", "template.inspect").arg("carried")).field("sha256").to_string();
    assert_eq!(warren(&node, &["template", "rm", "carried"]).stdout, "carried\n");
    wait_until_gone(&node, &before);
    assert_eq!(warren(&node, &["template", "import", &text(&file)]).stdout, "carried\n");
    assert_eq!(warren(&node, &["template", "import", "--name", "other:x", &text(&file)]).stdout, "other:x\n");
    assert_eq!(node.control().ok(Request::new("", "template.inspect").arg("other:x")).field("sha256"), sum);
    assert_eq!(sandbox(&node, "other:x").sh("cat /etc/group | grep app"), "app:x:1234:\n");

    let mut damaged = std::fs::read(&file).unwrap();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    let bad = directory.path().join("bad.template");
    std::fs::write(&bad, &damaged).unwrap();
    fails(&node, &["template", "import", "--name", "bad", &text(&bad)], "CORRUPT");
    std::fs::write(&bad, &damaged[..middle]).unwrap();
    fails(&node, &["template", "import", "--name", "bad", &text(&bad)], "CORRUPT");
    for name in ["carried", "other:x"] {
        remove(&node, name);
    }
    wait_until_gone(&node, &before);
}

#[test]
fn sandboxes_start_from_what_was_ready() {
    let node = shared::node();
    let Some(path) = image("root.tar") else { return };
    let before = traces(&node);
    let path = text(&path);
    let start = "mkdir -p /tmp/www && echo served > /tmp/www/index.html && exec httpd -f -p 8080 -h /tmp/www";
    let ready = "wget -q -O - http://127.0.0.1:8080/index.html";
    let more = ["--no-cache", "--start", start, "--ready", ready, "--ready-timeout", "300s"];
    build(
        &node,
        &[&["template", "build", "-t", "server", "-m", "128M", "--disk", "48M"], &more[..], &[&path]].concat(),
    );
    let snapshots = node.control().ok(Request::new("", "snapshot.list")).items;
    let of_it =
        snapshots.iter().filter(|row| (row.get("template"), row.get("kind")) == (Some("server"), Some("template")));
    assert_eq!(of_it.count(), 1, "{snapshots:?}");
    // What was started in the trial runs in each.
    let (first, second) = (sandbox(&node, "server"), sandbox(&node, "server"));
    assert_eq!(first.sh(ready), "served\n");
    second.sh("echo other > /tmp/www/index.html");
    assert_eq!((first.sh(ready), second.sh(ready)), ("served\n".to_string(), "other\n".to_string()));
    drop((first, second));

    // A sandbox that cannot start from the snapshot is booted, and has the start command started too.
    for keys in [&[("cold", "true")][..], &[("read_only", "true"), ("cold", "true")], &[("memory_mib", "160")]] {
        let of = node.sandbox(&[&[("template", "server")], keys].concat());
        let served = format!("until {ready}; do sleep 0.2; done 2>/dev/null");
        assert_eq!(of.sh(&served), "served\n", "{keys:?}");
    }

    // A start command that fails ends the build at once, and what it said is told.
    let more = ["--no-cache", "--start", "echo no such config >&2; exit 7", "--ready", "false"];
    let failed = fails(&node, &small("broken", &more, &path), "BUILD_FAILED");
    assert!(failed.stderr.contains("the start command ended before there was anything ready: exit code 7"));
    assert!(failed.stderr.matches("no such config").count() >= 2, "{}", failed.stderr);

    // One whose ready command never succeeds is none, and the one before it stays.
    let more = ["--no-cache", "--start", "sleep 1000", "--ready", "echo not yet; false", "--ready-timeout", "5s"];
    let arguments =
        [&["template", "build", "-t", "server", "-m", "128M", "--disk", "48M"], &more[..], &[&path]].concat();
    let failed = fails(&node, &arguments, "BUILD_FAILED");
    assert!(
        failed.stderr.contains("not yet") && failed.stderr.contains("the ready command did not succeed within 5000 ms"),
        "{}",
        failed.stderr
    );
    assert_eq!(sandbox(&node, "server").sh(ready), "served\n");
    remove(&node, "server");
    wait_until_gone(&node, &before);
    assert!(
        node.control()
            .ok(Request::new("", "snapshot.list"))
            .items
            .iter()
            .all(|row| row.get("template") != Some("server"))
    );
}

#[test]
fn building_can_be_switched_off_on_a_node() {
    let Some(path) = image("root.tar") else { return };
    let node = Boot::kernel().file("/etc/warren/warren.toml", 0o644, b"[templates]\nbuild = false\n".to_vec()).start();
    let refused = fails(&node, &small("root", &[], &text(&path)), "FORBIDDEN");
    assert!(refused.stderr.contains("templates.build is false"), "{}", refused.stderr);
    let error = node.control().err(Request::new("", "template.build").arg("x"));
    assert!(error.is(Code::Forbidden) && error.fields.get("setting") == Some("templates.build"), "{error}");
}
