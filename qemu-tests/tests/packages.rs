//! Packages that code runs ask for: real installers against an index that the tests make, on a host of the node's internet.

use std::process::Stdio;

use qemu_tests::internet::{HOST, Internet, OTHER};
use qemu_tests::node::Boot;
use qemu_tests::packages::{INDEX, MIRROR, Release, URL, put_npm, put_wheel};
use qemu_tests::shared::Turn;
use qemu_tests::templates::{command, traces, wait_until_gone, warren};
use qemu_tests::timing::{self, wait_for};
use qemu_tests::{Call, Code, Error, Message, Node, Request, Sandbox, artefacts::Artefact, shared};

/// What nothing but the index and its installers may ever show; and as the header has it.
const PASSWORD: &str = "tr4de%53ecret";
const PLAIN: &str = "tr4deSecret";
const AUTHORIZATION: &str = "Basic cmVhZGVyOnRyNGRlU2VjcmV0";

/// A node whose index is a company's mirror: at a private address, by a name that the node has, with a password.
fn with_mirror(boot: Boot) -> Boot {
    let timeout_s = (300 * timing::factor()).min(3600);
    let configuration = format!(
        "[packages]\npip_index = \"file:/etc/warren/pip\"\nnpm_registry = \"file:/etc/warren/npm\"\nmax_mib = 16\ntimeout_s = {timeout_s}\n"
    );
    let address = |path: &str| URL.replace("://", &format!("://reader:{PASSWORD}@")) + path;
    boot.file("/etc/warren/warren.toml", 0o644, configuration.into_bytes())
        .file("/etc/warren/pip", 0o600, address("/pip").into_bytes())
        .file("/etc/warren/npm", 0o600, address("/npm/").into_bytes())
        .file("/etc/hosts", 0o644, format!("127.0.0.1 localhost\n{MIRROR} mirror.test\n").into_bytes())
}

fn wait_for_template(node: &Node, name: &str) {
    wait_for("the template", || {
        let rows = node.control().ok(Request::new("", "template.list")).items;
        rows.iter().any(|row| row.get("name") == Some(name)).then_some(())
    });
}

fn node() -> Turn {
    let node = shared::node_with_code_and(with_mirror);
    wait_for_template(&node, "python");
    wait_for_template(&node, "code");
    node
}

/// A node's internet, with a fresh index.
fn internet(node: &Node) -> Internet<'_> {
    node.sh(&format!("rm -rf {INDEX}; mkdir -p {INDEX}; echo '{AUTHORIZATION}' > {INDEX}/authorization"));
    Internet::of(node)
}

fn sandbox(node: &Node, template: &str) -> Sandbox {
    node.sandbox(&[("template", template), ("memory_mib", "256")])
}

/// Begins a run with packages.
fn begin(sandbox: &Sandbox, language: &str, packages: &[&str], source: &str) -> Call {
    let request = sandbox.request("code.run").set("language", language).set("timeout_ms", 60_000 * timing::factor());
    let request = packages.iter().fold(request, |request, name| request.set("dependency", name));
    let call = sandbox.start(request);
    let writer = call.writer();
    if writer.write("source", source.as_bytes()) {
        writer.end("source");
    }
    call
}

/// How a run ended: what it printed, and whether something was installed for it.
fn end(mut call: Call) -> Result<(String, bool), Error> {
    let (mut said, mut installed) = ([Vec::new(), Vec::new()], false);
    loop {
        match call.message() {
            Message::Item { fields, .. } => installed |= fields.get("state") == Some("installing"),
            Message::Data { channel, payload, .. } => match channel.as_str() {
                "stdout" => said[0].extend(payload),
                _ => said[1].extend(payload),
            },
            Message::Ok { fields, .. } => {
                let [out, err] = said.map(|octets| String::from_utf8_lossy(&octets).into_owned());
                assert_eq!(fields.get("exit"), Some("0"), "{err}");
                return Ok((out, installed));
            }
            Message::Err { error, .. } => {
                let [out, err] = said.map(|octets| String::from_utf8_lossy(&octets).into_owned());
                return Err(Error { message: format!("{} ({out}{err})", error.message), ..error });
            }
            _ => {}
        }
    }
}

fn run(sandbox: &Sandbox, language: &str, packages: &[&str], source: &str) -> Result<(String, bool), Error> {
    end(begin(sandbox, language, packages, source))
}

fn fails(sandbox: &Sandbox, language: &str, packages: &[&str], code: Code) -> Error {
    let error = run(sandbox, language, packages, "").expect_err("it is to fail");
    assert!(error.is(code), "{packages:?}: {error}: {:?}", error.fields);
    let all = format!("{error:?}");
    assert!(![PASSWORD, PLAIN, &AUTHORIZATION[6..]].iter().any(|secret| all.contains(secret)), "{all}");
    error
}

/// The spans of a sandbox's last code run, which has ended: one after the other.
fn spans(of: &Sandbox) -> Vec<String> {
    let runs = of.client().ok(of.request("code.list")).items;
    let last = runs.last().and_then(|run| run.get("exec")).expect("a run has a number");
    let trace = of.client().ok(of.request("sandbox.trace").set("exec", last));
    let mut end = 0;
    for span in &trace.items {
        let (start, took) = (span.number("start_us"), span.number("duration_us"));
        assert!(start.is_some_and(|start| start >= end), "{trace:?}");
        end = start.zip(took).map(|(start, took)| start + took).expect("it has ended");
    }
    trace.items.iter().map(|span| span.get("span").expect("a name").to_string()).collect()
}

/// Two packages, one of which needs the other.
fn put_greeting(node: &Node) {
    put_wheel(
        node,
        ("greeting", "1.0"),
        &["words"],
        "import words\ndef greet():\n    return words.HELLO + ' there'\n",
        false,
    );
    put_wheel(node, ("words", "2.1"), &[], "HELLO = 'hello'\n", false);
}

/// Nothing that the node keeps or says has the password of its index.
fn no_secret_is_left(node: &Node) {
    let patterns = format!("-e {PASSWORD} -e {PLAIN} -e {}", &AUTHORIZATION[6..]);
    let kept = "find /data /run/warren -path /data/templates -prune -o -type f -size -32M -print";
    assert_eq!(node.sh(&format!("{kept} | xargs grep -l -F {patterns} || true")), "");
    let console = node.console_text();
    assert!(!console.contains(PASSWORD) && !console.contains(PLAIN), "the console has it");
}

const GREET: &str = "import greeting\nprint(greeting.greet())";

#[test]
fn packages_of_python_are_installed_once_and_reached_by_runs_and_contexts() {
    let node = node();
    let internet = internet(&node);
    put_greeting(&node);
    let one = sandbox(&node, "python");
    assert_eq!(run(&one, "python", &["greeting"], GREET).unwrap(), ("hello there\n".to_string(), true));
    assert_eq!(spans(&one)[..3], ["validate", "packages", "start"]);
    let requests = internet.count(MIRROR, "http");
    assert!(requests >= 4, "two pages and two wheels: {requests}");
    // The same in the same sandbox, in another, and written otherwise: nothing is asked for any more.
    assert_eq!(run(&one, "python", &["Greeting"], GREET).unwrap(), ("hello there\n".to_string(), false));
    let two = sandbox(&node, "python");
    assert_eq!(run(&two, "python", &["greeting"], GREET).unwrap(), ("hello there\n".to_string(), false));
    // A context has them for all of its runs, before what its environment names.
    let request = two.request("code.context.create").set("language", "python").set("dependency", "greeting");
    let context = two.client().ok(request.set("env", "PYTHONPATH=/elsewhere"));
    let call = two.start(two.request("code.run").set("context", context.field("context")));
    let writer = call.writer();
    assert!(writer.write("source", b"import sys, greeting\nprint(greeting.greet(), '/elsewhere' in sys.path)"));
    writer.end("source");
    assert_eq!(end(call).unwrap().0, "hello there True\n");
    assert_eq!(internet.count(MIRROR, "http"), requests);
    // A run that asks for none has none, and what was installed is nobody's to change.
    let none = "try:\n    import greeting\nexcept ImportError:\n    print('none')";
    assert_eq!(run(&two, "python", &[], none).unwrap().0, "none\n");
    assert!(!spans(&two).contains(&"packages".to_string()), "{:?}", spans(&two));
    let modes = "stat -c '%U %a' /var/lib/warren/packages/*/site-packages/greeting/__init__.py";
    assert_eq!(two.sh(modes), "root 644\n");
    no_secret_is_left(&node);
    // Builders and their templates are gone, and no list shows anything.
    let rows = node.control().ok(Request::new("", "template.list")).items;
    assert!(rows.iter().all(|row| !row.get("name").unwrap_or_default().starts_with("packages")), "{rows:?}");
}

#[test]
fn the_command_line_has_a_sandbox_made_for_code_with_packages() {
    let node = node();
    let internet = internet(&node);
    put_greeting(&node);
    let mut child = command(&node, &["run", "--lang", "python", "--pip", "greeting==1.0", "--pip", "words", "-"]);
    let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), GREET.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "hello there\n", "{}", String::from_utf8_lossy(&output.stderr));
    for (arguments, part) in [
        (&["run", "--lang", "bash", "--pip", "words", "/dev/null"][..], "error: NO_INSTALLER: "),
        (&["run", "--lang", "python", "--npm", "words", "/dev/null"], "error: BAD_ARGUMENT: "),
        (&["run", "--lang", "python", "--pip", "../words", "/dev/null"], "error: BAD_ARGUMENT: "),
        (&["run", "--lang", "python", "--pip", "nothing-like-it", "/dev/null"], "error: INSTALL_FAILED: "),
    ] {
        let done = warren(&node, arguments);
        assert_eq!(done.code, Some(125), "{arguments:?}: {}", done.stderr);
        assert!(done.stderr.contains(part), "{arguments:?}: {}", done.stderr);
    }
    drop(internet);
}

#[test]
fn what_cannot_be_installed_is_an_error_that_says_why_and_leaves_nothing() {
    let node = node();
    let internet = internet(&node);
    put_wheel(&node, ("broken", "1.0"), &[], "", true);
    put_wheel(&node, ("half", "1.0"), &["nothing-like-it"], "", false);
    let sandbox = sandbox(&node, "code");
    let before = traces(&node);
    // A builder is of the template that was meant, and of no other that has its name by then.
    let other = Request::new("", "template.build").arg("any").set("from", "base").set("base", "0".repeat(64));
    let error = node.control().err(other);
    assert!(error.is(Code::BadState) && error.message.contains("another by now"), "{error}");
    // Nothing reaches an installer that is more than a name.
    for name in
        ["-r", "--index-url=http://5.6.7.8/", "a b", "./a", "/etc", "http://5.6.7.8/a.whl", "a;b", "a[x]", "a==*", ""]
    {
        fails(&sandbox, "python", &[name], Code::BadArgument);
    }
    for name in ["--registry=http://5.6.7.8/", "../a", "a@http://5.6.7.8/", "@a", "a@>1"] {
        fails(&sandbox, "javascript", &[name], Code::BadArgument);
    }
    let many: Vec<String> = (0..65).map(|n| format!("p{n}")).collect();
    let error = fails(&sandbox, "python", &many.iter().map(String::as_str).collect::<Vec<_>>(), Code::OutOfRange);
    assert_eq!(error.fields.get("max"), Some("64"));
    fails(&sandbox, "bash", &["a"], Code::NoInstaller);
    let other = sandbox.request("code.run").set("language", "python").set("index", "npm").set("dependency", "a");
    assert!(sandbox.client().err(other).is(Code::BadArgument));
    assert_eq!(internet.count(MIRROR, "http"), 0);

    let error = fails(&sandbox, "python", &["nothing-like-it"], Code::InstallFailed);
    let output = |error: &Error| error.fields.get("output").unwrap_or_default().to_string();
    assert!(output(&error).contains("No matching distribution found for nothing-like-it"), "{}", output(&error));
    let error = fails(&sandbox, "python", &["half"], Code::InstallFailed);
    assert!(output(&error).contains("nothing-like-it"), "{}", output(&error));
    let error = fails(&sandbox, "python", &["broken"], Code::InstallFailed);
    assert!(output(&error).contains("DO NOT MATCH THE HASHES"), "{}", output(&error));
    // Pages and files without an end: what bounds them is the builder, whose disk is full.
    node.sh(&format!("mkdir -p {INDEX}/pip/endless-file"));
    let link = "<a href=\"/pip-files/endless_file-1.0-py3-none-any.whl\">endless_file-1.0-py3-none-any.whl</a>";
    node.write_file(&format!("{INDEX}/pip/endless-file/index.html"), 0o644, link.as_bytes());
    let error = fails(&sandbox, "python", &["endless-file"], Code::NoCapacity);
    assert_eq!(error.fields.get("resource"), Some("disk"), "{error}");
    fails(&sandbox, "python", &["endless"], Code::OutOfMemory);
    let error = fails(&sandbox, "javascript", &["endless"], Code::InstallFailed);
    assert!(output(&error).contains("more than 67108864 octets"), "{}", output(&error));
    // An index that does not take the password any more.
    node.sh(&format!("echo 'Basic b3RoZXI6b3RoZXI=' > {INDEX}/authorization"));
    let error = fails(&sandbox, "python", &["half"], Code::InstallFailed);
    assert!(output(&error).contains("401"), "{}", output(&error));
    let error = fails(&sandbox, "javascript", &["half"], Code::InstallFailed);
    assert!(output(&error).contains("401"), "{}", output(&error));
    wait_until_gone(&node, &before);
    assert_eq!(node.sh("ls /data/packages | grep -v '[.]tar$' || true"), "");
    // Nobody but the index was asked.
    assert_eq!(internet.count(OTHER, "tcp"), 0);
    no_secret_is_left(&node);
}

/// Versions, ranges, and whether the one is in the other: what npm's own semver says.
const RANGES: [(&str, &str, bool); 36] = [
    ("1.2.3", "^1.0.0", true),
    ("2.0.0", "^1.0.0", false),
    ("0.2.5", "^0.2.3", true),
    ("0.3.0", "^0.2.3", false),
    ("0.0.3", "^0.0.3", true),
    ("0.0.4", "^0.0.3", false),
    ("0.5.0", "^0", true),
    ("0.1.0", "^0.0", false),
    ("1.2.9", "~1.2.3", true),
    ("1.3.0", "~1.2.3", false),
    ("1.9.0", "~1", true),
    ("1.2.3", "1.x", true),
    ("2.0.0", "1.x", false),
    ("1.2.3", "*", true),
    ("1.2.3", "", true),
    ("1.0.0-a", "*", false),
    ("1.2.3", ">=1.0.0 <2.0.0", true),
    ("2.0.0", ">= 1.0.0 < 2.0.0", false),
    ("1.5.0", "1.0.0 - 2.0.0", true),
    ("2.0.1", "1.0.0 - 2", true),
    ("3.0.0", "1.0.0 - 2", false),
    ("3.1.0", "^1 || ^3", true),
    ("2.1.0", "^1 || ^3", false),
    ("1.0.0-a", "^1.0.0", false),
    ("1.0.0-b", "^1.0.0-a", true),
    ("1.0.1-b", "^1.0.0-a", false),
    ("2.0.0-a", "^1.0.0", false),
    ("1.0.0-rc.1", ">=1.0.0-beta", true),
    ("1.0.0-2", ">1.0.0-10", false),
    ("1.2.3", "=1.2.3", true),
    ("1.2.3", "v1.2.3", true),
    ("1.2.4", "1.2.3", false),
    ("1.2.0", ">1.1", true),
    ("1.1.5", ">1.1", false),
    ("1.1.5", "<=1.1", true),
    ("1.2.0", "<=1.1", false),
];

#[test]
fn packages_of_node_js_come_with_what_they_need() {
    let node = node();
    let internet = internet(&node);
    let release = |version, files, requires| Release { version, manifest: "\"main\": \"index.js\"", files, requires };
    put_npm(
        &node,
        "words",
        &[
            release("1.0.0", &[("index.js", "exports.hello = 'hello'")], &[]),
            release("1.2.0", &[("index.js", "exports.hello = 'hallo'")], &[]),
            release("2.0.0", &[("index.js", "exports.hello = 'salve'")], &[]),
        ],
        false,
    );
    let greet = &[("index.js", "exports.greet = () => require('words').hello + ' there'")];
    put_npm(&node, "greeting", &[release("1.0.0", greet, &[("words", "^1.0.0")])], false);
    let module = Release {
        version: "0.1.0",
        manifest: "\"type\": \"module\", \"exports\": { \"import\": \"./lib/m.js\" }",
        files: &[("lib/m.js", "import words from 'words'; export const said = words.hello;")],
        requires: &[("words", "~1.0.0")],
    };
    put_npm(&node, "@test/module", &[module], false);
    put_npm(&node, "broken", &[release("1.0.0", &[], &[])], true);
    put_npm(&node, "leaves", &[release("1.0.0", &[("../../../../etc/x", "")], &[])], false);

    let sandbox = sandbox(&node, "code");
    // Both versions of what two need are there, each where it is looked for, and `latest` for code itself.
    let source = "const { said } = await import('@test/module');\n\
                  console.log(require('greeting').greet(), said, require('words').hello)";
    let packages = ["words", "greeting@1.0.0", "@test/module@latest"];
    let (said, installed) = run(&sandbox, "javascript", &packages, source).unwrap();
    assert_eq!((said.as_str(), installed), ("hallo there hello salve\n", true));
    let requests = internet.count(MIRROR, "http");
    let again = run(&sandbox, "javascript", &["greeting@1.0.0", "@test/module@latest", "words"], source).unwrap();
    assert_eq!((again.0.as_str(), again.1), ("hallo there hello salve\n", false));
    assert_eq!(internet.count(MIRROR, "http"), requests);

    // Ranges as npm has them: the installer is where it unpacked.
    let table = RANGES.iter().map(|(version, range, fits)| format!("[\"{version}\",\"{range}\",{fits}],"));
    let source = format!(
        "const {{ parseRange, parseVersion, satisfies }} = require('/run/warren/npm.js');\n\
         for (const [v, r, fits] of [{}])\n\
         if (satisfies(parseVersion(v), parseRange(r)) !== fits) console.log(v, r)",
        table.collect::<String>()
    );
    assert_eq!(run(&sandbox, "javascript", &[], &source).unwrap().0, "");

    let output = |error: &Error| error.fields.get("output").unwrap_or_default().to_string();
    let error = fails(&sandbox, "javascript", &["broken"], Code::InstallFailed);
    assert!(output(&error).contains("the registry says"), "{}", output(&error));
    let error = fails(&sandbox, "javascript", &["leaves"], Code::InstallFailed);
    assert!(output(&error).contains("leaves its package"), "{}", output(&error));
    let error = fails(&sandbox, "javascript", &["nothing-like-it"], Code::InstallFailed);
    assert!(output(&error).contains("404"), "{}", output(&error));
    let error = fails(&sandbox, "javascript", &["words@9.9.9"], Code::InstallFailed);
    assert!(output(&error).contains("no version of words is 9.9.9"), "{}", output(&error));
}

/// Waits until an installation has asked the index for something, which it does not get.
fn held(node: &Node) {
    wait_for("a request", || (node.sh("nc 93.0.0.2 9 < /dev/null").contains(" http ")).then_some(()));
}

/// What a builder reaches, and a sandbox with a network beside it does not.
fn reaches_its_index_and_nothing_else_that_is_private(node: &Node, builder: &str) {
    let script = "import socket\n\
        for host, port in (('10.0.0.5', 8000), ('10.0.0.5', 80), ('192.168.1.1', 80), ('93.0.0.1', 22), ('1.2.3.4', 80)):\n\
        \x20   s = socket.socket(); s.settimeout(2)\n\
        \x20   print(host, port, s.connect_ex((host, port)) == 0)";
    let reached = |id: &str| {
        let request = Request::new("", "exec.start").arg(id).arg("python3").arg("-c").arg(script);
        node.control().ok(request).text("stdout")
    };
    let other = node.sandbox(&[("template", "python"), ("memory_mib", "256"), ("network", "on")]);
    let rest = "10.0.0.5 80 False\n192.168.1.1 80 False\n93.0.0.1 22 False\n1.2.3.4 80 True\n";
    assert_eq!(reached(builder), format!("10.0.0.5 8000 True\n{rest}"));
    assert_eq!(reached(&other.id), format!("10.0.0.5 8000 False\n{rest}"));
    // Nobody else can ask for it.
    let request = Request::new("", "template.build").arg("mine").set("from", "base").set("network", "on");
    let error = node.control().err(request.set("service", "10.0.0.5:8000"));
    assert!(error.is(Code::Forbidden), "{error}");
}

#[test]
fn two_that_ask_for_the_same_at_once_have_it_installed_once_and_one_that_goes_takes_nothing_along() {
    let node = node();
    let internet = internet(&node);
    put_greeting(&node);
    let sandboxes = [sandbox(&node, "python"), sandbox(&node, "python"), sandbox(&node, "python")];
    let before = traces(&node);
    node.sh(&format!("touch {INDEX}/hold"));
    let mut calls: Vec<Call> = sandboxes.iter().map(|one| begin(one, "python", &["words"], "import words")).collect();
    held(&node);
    for call in &mut calls {
        assert_eq!(call.item().get("state"), Some("installing"));
    }
    let builder = traces(&node).difference(&before).next().cloned().expect("a builder");
    assert_eq!(traces(&node).len() - before.len(), 1, "one builder");
    reaches_its_index_and_nothing_else_that_is_private(&node, &builder);
    assert_eq!(node.sh("ls /data/packages | grep -c '[.]partial$'"), "1\n");
    // One waits no more, whether or not it was the one that installs.
    calls.remove(0).cancel();
    node.sh(&format!("rm {INDEX}/hold"));
    for call in calls {
        end(call).unwrap();
    }
    wait_until_gone(&node, &before);
    drop(internet);
}

#[test]
fn an_installation_that_is_cancelled_or_whose_supervisor_is_killed_leaves_nothing() {
    let node = node();
    let internet = internet(&node);
    put_wheel(&node, ("late", "1.0"), &[], "NOW = 'late'\n", false);
    let sandbox = sandbox(&node, "python");
    let before = traces(&node);
    let left = || node.sh("ls /data/packages | grep -v '[.]tar$' || true");
    node.sh(&format!("touch {INDEX}/hold"));
    let call = begin(&sandbox, "python", &["late"], "");
    held(&node);
    call.cancel();
    assert!(end(call).unwrap_err().is(Code::Cancelled));
    wait_until_gone(&node, &before);
    wait_for("the file to go", || left().is_empty().then_some(()));

    let requests = internet.count(MIRROR, "http");
    let call = begin(&sandbox, "python", &["late"], "");
    wait_for("a request", || (internet.count(MIRROR, "http") > requests).then_some(()));
    assert_ne!(left(), "");
    let supervisor = node.supervisor();
    node.sh(&format!("kill -9 {supervisor}"));
    wait_for("another supervisor", || (node.supervisor() != supervisor).then_some(()));
    assert!(end(call).is_err());
    node.wait_until_ready();
    wait_until_gone(&node, &before);
    assert_eq!(left(), "");
    node.sh(&format!("rm {INDEX}/hold"));
    let (said, installed) = run(&sandbox, "python", &["late"], "import late; print(late.NOW)").unwrap();
    assert_eq!((said.as_str(), installed), ("late\n", true));
    // What was kept and is damaged is installed anew.
    node.sh("for f in /data/packages/*.tar; do printf x | dd of=$f bs=1 seek=600 conv=notrunc 2> /dev/null; done");
    let other = self::sandbox(&node, "python");
    let (said, _) = run(&other, "python", &["late"], "import late; print(late.NOW)").unwrap();
    assert_eq!(said, "late\n");
}

#[test]
fn a_full_disk_of_the_node_ends_an_installation_and_nobody_else() {
    let node = node();
    let internet = internet(&node);
    put_greeting(&node);
    let sandbox = sandbox(&node, "python");
    let before = traces(&node);
    node.sh(&format!("touch {INDEX}/hold; rm -f /data/packages/*.tar"));
    let call = begin(&sandbox, "python", &["greeting"], GREET);
    held(&node);
    node.fill_data();
    node.sh(&format!("rm {INDEX}/hold"));
    let error = end(call).unwrap_err();
    assert!(error.is(Code::NoCapacity), "{error}: {:?}", error.fields);
    assert_eq!(error.fields.get("resource"), Some("disk"), "{error}: {:?}", error.fields);
    assert_eq!(sandbox.sh("echo on"), "on\n");
    wait_until_gone(&node, &before);
    assert_eq!(node.sh("ls /data/packages"), "");
    node.free_data();
    assert_eq!(run(&sandbox, "python", &["greeting"], GREET).unwrap(), ("hello there\n".to_string(), true));
    drop(internet);
}

/// A node whose index is public, and which keeps two sets of packages.
fn with_public_index(timeout_s: u64) -> String {
    let index = format!("http://{HOST}:8000/pip");
    let bounds = format!("timeout_s = {timeout_s}\ncache_count = 2\n");
    format!("[packages]\npip_index = \"{index}\"\nallow = [\"{OTHER}\"]\nmax_mib = 64\n{bounds}")
}

#[test]
fn a_silent_index_and_a_power_cut_leave_nothing_half_made_and_the_oldest_set_goes() {
    let boot = |boot: Boot, timeout_s| {
        let node = boot.template_disk(&Artefact::TemplateDisk.path());
        let text = with_public_index(timeout_s).into_bytes();
        let node = node.file("/etc/warren/warren.toml", 0o644, text).start();
        wait_for_template(&node, "python");
        node
    };
    let node = boot(Boot::kernel(), 15);
    let outside = internet(&node);
    let one = sandbox(&node, "python");
    let before = traces(&node);
    node.sh(&format!("touch {INDEX}/hold"));
    let error = fails(&one, "python", &["words"], Code::Timeout);
    assert_eq!(error.fields.get("timeout_ms"), Some("15000"));
    wait_until_gone(&node, &before);
    drop((one, outside));
    let disk = node.power_off().remove(0);

    let node = boot(Boot::kernel().data_disk(disk), 3600);
    let outside = internet(&node);
    let module = format!("SAID = 'whole'\nMORE = '{}'\n", "0123456789abcdef".repeat(1 << 19));
    put_wheel(&node, ("large", "1.0"), &[], &module, false);
    let one = sandbox(&node, "python");
    let call = begin(&one, "python", &["large"], "");
    // As soon as the node has something of it.
    wait_for("the archive to be written", || {
        let sizes = node.sh("cd /data/packages; stat -c %s * 2> /dev/null || true");
        sizes.lines().any(|size| size != "0").then_some(())
    });
    std::mem::forget((call, one, outside));
    let disk = node.power_cut().remove(0);

    let node = boot(Boot::kernel().data_disk(disk), 3600);
    let _outside = internet(&node);
    put_wheel(&node, ("large", "1.0"), &[], &module, false);
    put_greeting(&node);
    // The installation that was cut is on record as one that ended.
    timing::wait_for("its record", || {
        let rows = node.control().ok(Request::new("", "history.list")).items;
        rows.iter().all(|row| row.get("state") != Some("running")).then_some(())
    });
    // Whatever has the name of a set is whole, and there is nothing else.
    let kept = || node.sh("cd /data/packages; ls").lines().map(str::to_string).collect::<Vec<_>>();
    for name in kept() {
        let digest = name.strip_suffix(".tar").and_then(|name| name.split_once('-')).expect("the name of a set").1;
        assert!(node.sh(&format!("sha256sum /data/packages/{name}")).starts_with(digest), "{name}");
    }
    let one = sandbox(&node, "python");
    let said = |of: &Sandbox, name: &str, what: &str| {
        run(of, "python", &[name], &format!("import {name}; print({name}.{what})"))
    };
    assert_eq!(said(&one, "large", "SAID").unwrap().0, "whole\n");
    // Two sets are kept: of three, the one that was used longest ago goes.
    let large = kept();
    assert_eq!(large.len(), 1);
    assert_eq!(said(&one, "words", "HELLO").unwrap(), ("hello\n".to_string(), true));
    let words: Vec<String> = kept().into_iter().filter(|name| !large.contains(name)).collect();
    let two = sandbox(&node, "python");
    assert_eq!(said(&two, "large", "SAID").unwrap(), ("whole\n".to_string(), false));
    assert_eq!(said(&one, "greeting", "greet()").unwrap(), ("hello there\n".to_string(), true));
    let now = kept();
    assert_eq!(now.len(), 2, "{now:?}");
    assert!(now.contains(&large[0]) && !now.contains(&words[0]), "{now:?}");
    drop((one, two));
    drop(_outside);
    node.power_off();
}
