//! What recipes say of programs: variables of the base, start commands, languages; and what COPY leaves out.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use qemu_tests::files::TempDir;
use qemu_tests::templates::{build, fails, image, remove, said, sandbox, small, traces, wait_until_gone, warren};
use qemu_tests::{Node, Request, Sandbox, shared, timing};

/// A program that says where it was found; as a start command it runs on.
const OWN: &str = "#!/bin/sh\necho own \"$@\"\n\
    [ \"$1\" = serve ] && { echo \"$2 $(id -u)\" > /tmp/up; exec sleep 100000; }\nexit 0\n";

/// A directory to build from, with the image of several layers in it.
fn place(recipe: &str) -> Option<TempDir> {
    let (place, layout) = (TempDir::new().unwrap(), image("layout")?);
    std::os::unix::fs::symlink(layout, place.path().join("image")).unwrap();
    write(&place, "Dockerfile", recipe);
    write(&place, "own", OWN);
    fs::set_permissions(place.path().join("own"), PermissionsExt::from_mode(0o755)).unwrap();
    Some(place)
}

fn write(place: &TempDir, name: &str, content: &str) {
    let path = place.path().join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn path(place: &TempDir) -> String {
    place.path().display().to_string()
}

/// What the start command has said once it runs, and that it runs on.
fn up(of: &Sandbox) -> String {
    let up = said(of, "until [ -s /tmp/up ]; do sleep 0.2; done; cat /tmp/up");
    let rows = of.client().ok(of.request("exec.list")).items;
    let runs = rows.iter().any(|row| row.get("state") == Some("running"));
    assert!(runs, "{rows:?}");
    up
}

/// Values of a key that a template has more than one of.
fn all(node: &Node, template: &str, key: &str) -> Vec<String> {
    let fields = node.control().ok(Request::new("", "template.inspect").arg(template)).fields;
    let of_key = fields.0.iter().filter(|(other, _)| other == key);
    of_key.map(|(_, value)| String::from_utf8(value.clone()).unwrap()).collect()
}

/// Snapshots that a template's sandboxes start from.
fn snapshots(node: &Node, template: &str) -> usize {
    let rows = node.control().ok(Request::new("", "snapshot.list")).items;
    rows.iter().filter(|row| (row.get("template"), row.get("kind")) == (Some(template), Some("template"))).count()
}

#[test]
fn what_an_image_has_is_there_for_a_recipe_and_its_program_runs_in_every_sandbox() {
    let node = shared::node();
    let before = traces(&node);
    let recipe = "FROM ./image\nUSER root\nENV PATH=/opt/bin:$PATH SAID=$GREETING-you\nCOPY . /srv/\nCOPY own /opt/bin/\n\
                  RUN own built > /made && echo \"$PATH $SAID\" >> /made\nUSER app\nCMD [\"own\", \"serve\", \"image\"]\n";
    let Some(place) = place(recipe) else { return };
    write(&place, ".env", "secret\n");
    write(&place, ".git/config", "secret\n");
    write(&place, "src/.env", "secret\n");
    write(&place, "src/main", "main\n");
    write(&place, ".dockerignore", "# not theirs\n*\n!src\n!own\n**/.env\n");
    let done = build(&node, &small("on-image", &["--no-cache", "--ref", "app"], &path(&place)));
    assert!(done.stderr.contains("start: own serve image: in every sandbox"), "{}", done.stderr);
    let of = sandbox(&node, "on-image");
    assert_eq!(said(&of, "cat /made; echo $PATH"), "own built\n/opt/bin:/bin hello-you\n/opt/bin:/bin\n");
    assert_eq!(said(&of, "cd /srv && find . | sort"), ".\n./own\n./src\n./src/main\n");
    assert_eq!(up(&of), "image 1234\n");
    drop(of);
    // It is there too in what begins with a snapshot of the template, and beside one.
    assert_eq!(snapshots(&node, "on-image"), 0);
    node.control().ok(Request::new("", "template.snapshot").arg("on-image").set("memory_mib", 128));
    assert_eq!(snapshots(&node, "on-image"), 1);
    for cold in ["false", "true"] {
        let of = node.sandbox(&[("template", "on-image"), ("cold", cold)]);
        assert_eq!(up(&of), "image 1234\n", "cold={cold}");
    }
    remove(&node, "on-image");
    wait_until_gone(&node, &before);
}

#[test]
fn a_recipe_says_what_is_started_and_when_it_is_ready() {
    let node = shared::node();
    let before = traces(&node);
    // The base has PATH and HOME from its manifest.
    let recipe = "FROM base\nENV PATH=/opt/bin:$PATH AT=${HOME}/at\nCOPY own /opt/bin/\nWORKDIR $AT\nRUN own > made\n\
                  CMD [\"serve\", \"ready\"]\nENTRYPOINT [\"own\"]\nREADY test -s /tmp/up\n";
    let Some(place) = place(recipe) else { return };
    let done = build(&node, &small("ready", &["--no-cache"], &path(&place)));
    assert!(done.stderr.contains("ready: test -s /tmp/up"), "{}", done.stderr);
    assert_eq!(all(&node, "ready", "start"), ["own", "serve", "ready"]);
    assert_eq!(snapshots(&node, "ready"), 1);
    // Where it is not of the snapshot's shape it is booted.
    for memory in ["192", "144"] {
        let of = node.sandbox(&[("template", "ready"), ("memory_mib", memory)]);
        assert_eq!(up(&of), "ready 1000\n", "{memory}");
        let found = said(&of, "pwd; cat made; command -v own; echo $PATH");
        assert_eq!(found, "/workspace/at\nown\n/opt/bin/own\n/opt/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin\n");
    }
    // What stands on it has both, and is tried again; a start command of its own, or none, takes the place of both.
    for (recipe, start, ready) in [
        ("ENV MORE=1\nUSER root\n", &["own", "serve", "ready"][..], "test -s /tmp/up"),
        ("CMD [\"own\", \"serve\", \"mine\"]\n", &["own", "serve", "mine"], ""),
        ("CMD []\n", &[], ""),
    ] {
        write(&place, "Dockerfile", &format!("FROM ready\n{recipe}"));
        let done = build(&node, &small("on-ready", &["--no-cache"], &path(&place)));
        assert_eq!(done.stderr.contains("ready: test -s /tmp/up"), !ready.is_empty(), "{recipe}: {}", done.stderr);
        assert_eq!(all(&node, "on-ready", "start"), start, "{recipe}");
        assert_eq!(all(&node, "on-ready", "ready").concat(), ready, "{recipe}");
        assert_eq!(snapshots(&node, "on-ready"), usize::from(!ready.is_empty()), "{recipe}");
        let of = sandbox(&node, "on-ready");
        match start.last() {
            Some(word) => assert_eq!(up(&of), format!("{word} {}\n", if ready.is_empty() { 1000 } else { 0 })),
            None => assert!(of.client().ok(of.request("exec.list")).items.is_empty(), "{recipe}"),
        }
        drop(of);
        remove(&node, "on-ready");
    }
    remove(&node, "ready");

    // What it stands on is not there.
    write(&place, "Dockerfile", "FROM nothing-like-it:3.11\nCMD []\n");
    let failed = fails(&node, &small("none", &["--no-cache"], &path(&place)), "NOT_FOUND");
    let told =
        "Dockerfile:1: FROM nothing-like-it:3.11: no template nothing-like-it:3.11; nothing is pulled: build it first";
    assert!(failed.stderr.contains(told), "{}", failed.stderr);
    write(&place, "Dockerfile", "FROM docker.io/library/python\n");
    let failed = fails(&node, &small("none", &["--no-cache"], &path(&place)), "BAD_ARGUMENT");
    assert!(failed.stderr.contains("nothing is pulled"), "{}", failed.stderr);
    write(&place, "Dockerfile", "FROM base\nCOPY own /\n");
    write(&place, ".dockerignore", "ow?\n");
    let failed = fails(&node, &small("none", &["--no-cache"], &path(&place)), "BAD_ARGUMENT");
    assert!(
        failed.stderr.contains("own: is left out by") && failed.stderr.contains(".dockerignore:1"),
        "{}",
        failed.stderr
    );
    wait_until_gone(&node, &before);
}

/// The text of docs/code.md that begins with a line, to the end of its block.
fn example(first: &str) -> String {
    let text = include_str!("../../docs/code.md");
    let begin = text.find(&format!("\n{first}\n")).expect("the example is there") + 1;
    let end = text[begin..].find("\n```").expect("it ends");
    format!("{}\n", &text[begin..begin + end])
}

#[test]
fn code_runs_in_a_template_that_was_made_of_an_image() {
    let node = shared::node();
    let before = traces(&node);
    let Some(place) =
        place("FROM ./image\nCOPY runner /opt/runner\nUSER root\nRUN busybox ln -s busybox /bin/dd\nUSER app\n")
    else {
        return;
    };
    write(&place, "runner", &example("#!/bin/sh"));
    fs::set_permissions(place.path().join("runner"), PermissionsExt::from_mode(0o755)).unwrap();
    write(&place, "languages.toml", &example("# languages.toml"));
    write(&place, "code", "echo from $GREETING; pwd; exit 3\n");
    let languages = place.path().join("languages.toml").display().to_string();
    let more = ["--no-cache", "--ref", "app", "--languages", &languages, "--start", ""];
    build(&node, &small("coded", &more, &path(&place)));
    assert_eq!(all(&node, "coded", "start"), Vec::<String>::new());
    // What stands on it has them too, where it says no other.
    let on_it = TempDir::new().unwrap();
    write(&on_it, "Dockerfile", "FROM coded\nENV GREETING=below\n");
    build(&node, &small("on-coded", &["--no-cache"], &path(&on_it)));
    for (template, from) in [("coded", "hello"), ("on-coded", "below")] {
        assert_eq!(all(&node, template, "language"), ["own", "python", "sh"], "{template}");
        let of = sandbox(&node, template);
        let code = place.path().join("code").display().to_string();
        let ran = warren(&node, &["code", "--lang", "sh", &of.id, &code]);
        assert_eq!((ran.code, ran.stdout), (Some(3), format!("from {from}\n/data\n")), "{}", ran.stderr);
        // The runner of the example keeps what was said.
        let made = warren(&node, &["context", "create", "--lang", "own", &of.id]);
        assert_eq!(made.code, Some(0), "{}", made.stderr);
        for (code, out) in [("kept=$GREETING", ""), ("echo kept $kept", &format!("kept {from}\n"))] {
            write(&place, "code-in-context", code);
            let code = place.path().join("code-in-context").display().to_string();
            let ran = warren(&node, &["code", "--context", made.stdout.trim(), &of.id, &code]);
            assert_eq!((ran.code, ran.stdout.as_str()), (Some(0), out), "{}", ran.stderr);
        }
        drop(of);
    }
    remove(&node, "on-coded");
    remove(&node, "coded");
    // What says no languages ends the build before it has begun.
    write(&place, "languages.toml", "[languages.sh]\n\nonce = [\"/bin/sh\"]\n");
    let failed = fails(&node, &small("none", &more, &path(&place)), "BAD_ARGUMENT");
    assert!(failed.stderr.contains("languages.toml:1: languages.sh.once has no word {source}"), "{}", failed.stderr);
    let request = Request::new("", "template.commit").arg("x").set("languages", "[languages.sh]\n");
    let error = node.control().err(request);
    assert!(error.fields.get("argument") == Some("languages") && error.fields.get("line") == Some("1"), "{error}");
    timing::wait_for("the builds' traces to go", || (traces(&node) == before).then_some(()));
}
