//! Builds and imports of templates under faults: the power goes, the node's disk is full, the builder's disk is full.

use std::fs;
use std::path::Path;

use qemu_tests::fault::{self, assert_agree};
use qemu_tests::files::TempDir;
use qemu_tests::node::Boot;
use qemu_tests::templates::{Place, build, fails, remove, sandbox, small, traces, wait_until_gone, warren};
use qemu_tests::{Call, Node, Request, timing};
use warren::node::faults::Point;

/// Waits in the builder until the test says that it may go on.
const WAIT: &str = "echo begun; until [ -e /run/go ]; do sleep 0.1; done";

/// A program in the one builder there is that lets the step go on once it reads a line. It is there before the disk is full.
fn trigger(node: &Node) -> Call {
    let rows = node.control().ok(Request::new("", "sandbox.list")).items;
    let mut ids = rows.iter().filter_map(|row| row.get("id"));
    let id = ids.next().expect("there is a builder");
    assert_eq!(ids.next(), None);
    let request = ["sh", "-c", "read line; touch /run/go"]
        .iter()
        .fold(Request::new("", "exec.start").arg(id).set("user", 0).set("stdin", true), |request, word| {
            request.arg(word)
        });
    let mut call = node.control().start(request);
    call.item();
    call
}

/// The first step of these is kept.
fn assert_first_step_is_kept(node: &Node, recipe: &str, name: &str) {
    let place = Place::new(recipe);
    let done = build(node, &small(name, &[], &place.path()));
    assert_eq!(done.stderr.matches("(kept)").count(), 1, "{}", done.stderr);
    assert_eq!(sandbox(node, name).sh("cat /first"), "first\n");
    remove(node, name);
}

fn staged(node: &Node) -> Vec<String> {
    let listed = node.sh("ls -A /data/templates 2>/dev/null || true");
    listed.lines().filter(|name| name.starts_with(".build-")).map(str::to_string).collect()
}

/// Waits until that much is written of an image that has no name yet.
fn wait_for_an_image_of(node: &Node, octets: usize) {
    timing::wait_for("a part of an image", || {
        let sizes = node.sh("du -k /data/templates/.build-*/rootfs.img 2>/dev/null || true");
        let largest = sizes.lines().filter_map(|line| line.split_whitespace().next()?.parse::<usize>().ok()).max();
        (largest? * 1024 > octets).then_some(())
    });
}

/// Fills the node's disk at a step of a build, and has that go on.
fn fill_at(node: &Node, recipe: &str, part: &str) {
    let before = traces(node);
    let place = Place::new(recipe);
    let building = place.begin(node, "full", &[]);
    let trigger = trigger(node);
    node.fill_data();
    assert!(trigger.writer().write("stdin", b"\n"));
    let ended = building.wait(timing::hang()).expect("it ends");
    let said = place.said();
    node.free_data();
    assert_eq!(ended.code(), Some(1), "{said}");
    assert!(said.lines().any(|line| line.starts_with("error: NO_CAPACITY: ") && line.contains(part)), "{said}");
    wait_until_gone(node, &before);
    assert_agree(node, recipe);
}

#[test]
fn faults_in_a_build_or_an_import_leave_what_was_kept_and_nothing_else() {
    let node = Boot::kernel().start();
    let recipe = |more: &str| format!("FROM base\nRUN echo first > /first\n{more}");
    let files = TempDir::new().unwrap();
    let exported = files.path().join("there.template");

    // The power goes when a build is in its second step and half an import has arrived.
    build(&node, &small("there", &["--no-cache"], &Place::new("FROM base\nRUN echo there > /there\n").path()));
    export(&node, "there", &exported);
    let octets = fs::read(&exported).unwrap();
    let before = traces(&node);
    let place = Place::new(&recipe(&format!("RUN {WAIT}\n")));
    let building = place.begin(&node, "cut", &[]);
    let import = node.control().start(Request::new("", "template.import").set("name", "half"));
    assert!(import.writer().write("content", &octets[..octets.len() / 2]));
    wait_for_an_image_of(&node, octets.len() / 4);
    assert_eq!(staged(&node).len(), 1);
    let disk = node.power_cut().remove(0);
    drop(import);
    assert_eq!(building.wait(timing::hang()).expect("it ends").code(), Some(1), "{}", place.said());

    let node = Boot::kernel().data_disk(disk).start();
    let after: Vec<String> = before.iter().cloned().collect();
    assert_eq!(traces(&node).into_iter().collect::<Vec<_>>(), after, "what a build or an import left is gone");
    wait_until_gone(&node, &before);
    assert_agree(&node, "the power cut");
    assert_eq!(sandbox(&node, "there").sh("cat /there"), "there\n");
    assert_first_step_is_kept(&node, &recipe("RUN echo after\n"), "after");

    // The node's disk is full when a builder writes, and when a template is made of what it has.
    fill_at(&node, &recipe(&format!("RUN {WAIT}; dd if=/dev/urandom of=/more bs=64k count=200 && sync\n")), "");
    fill_at(&node, &recipe(&format!("RUN {WAIT}\n")), "");
    let full = files.path().join("full.template");
    fs::write(&full, &octets).unwrap();
    let before = traces(&node);
    node.fill_data();
    fails(&node, &["template", "import", "--name", "full", full.to_str().unwrap()], "NO_CAPACITY");
    node.free_data();
    wait_until_gone(&node, &before);
    assert_first_step_is_kept(&node, &recipe("RUN echo then\n"), "then");

    // The builder's own disk is full: for a program that is its own error, for what is copied it is told.
    let place = Place::new(&recipe("RUN dd if=/dev/zero of=/fill bs=64k\n"));
    let failed = fails(&node, &small("small", &[], &place.path()), "BUILD_FAILED");
    assert!(failed.stderr.contains("No space left on device") && failed.stderr.contains("(kept)"), "{}", failed.stderr);
    let place = Place::new(&recipe("RUN dd if=/dev/zero of=/fill bs=64k; true\nCOPY file /file\n"));
    place.write("file", &[7; 1 << 20]);
    let failed = fails(&node, &small("small", &["--no-cache"], &place.path()), "NO_CAPACITY");
    assert!(failed.stderr.contains("the template's disk is full (--disk gives it more)"), "{}", failed.stderr);
    wait_until_gone(&node, &before);
    assert_agree(&node, "full disks of builders");
    remove(&node, "there");
    drop(node.power_off());
}

#[test]
fn a_power_cut_while_a_template_is_made_leaves_the_old_one_or_the_new_one_whole() {
    let recipe = |version: usize| {
        format!("FROM base\nRUN echo begun; dd if=/dev/urandom of=/more bs=64k count=200; echo {version} > /version\n")
    };
    let version = |node: &Node| sandbox(node, "made").sh("cat /version").trim().parse::<usize>().unwrap();
    let mut node = fault::boot().start();
    build(&node, &small("made", &[], &Place::new(&recipe(0)).path()));
    let before = traces(&node);
    let points = Point::OF_TEMPLATES.map(Some);
    for (new, point) in std::iter::once(None).chain(points).enumerate().map(|(at, point)| (at + 1, point)) {
        let old = version(&node);
        let place = Place::new(&recipe(new));
        point.inspect(|point| fault::hold_at(&node, *point));
        let building = place.begin(&node, "made", &[]);
        match point {
            Some(point) => fault::wait_until_reached(&node, &format!("{point:?}")),
            None => wait_for_an_image_of(&node, 1 << 20),
        }
        let disk = node.power_cut().remove(0);
        assert_eq!(building.wait(timing::hang()).expect("it ends").code(), Some(1), "{}", place.said());

        node = fault::boot().data_disk(disk).start();
        wait_until_gone(&node, &before);
        assert_agree(&node, &format!("{point:?}"));
        let found = version(&node);
        match point {
            Some(Point::TemplatePublished) => assert!([old, new].contains(&found), "{found}"),
            _ => assert_eq!(found, old, "{point:?}"),
        }
    }
    // It is what its manifest says, and can be made anew.
    let files = TempDir::new().unwrap();
    export(&node, "made", &files.path().join("made.template"));
    build(&node, &small("made", &[], &Place::new(&recipe(9)).path()));
    assert_eq!(version(&node), 9);
    drop(node.power_off());
}

fn export(node: &Node, name: &str, file: &Path) {
    let exported = warren(node, &["template", "export", name, file.to_str().unwrap()]);
    assert_eq!(exported.code, Some(0), "{}", exported.stderr);
}
