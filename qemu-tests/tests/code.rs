//! Code in sandboxes: runs and contexts of real interpreters, what they give back, and what bounds them.

use std::collections::BTreeMap;
use std::process::{Command, Output, Stdio};

use qemu_tests::artefacts::Artefact;
use qemu_tests::shared::Turn;
use qemu_tests::{Call, Code, Error, Fields, Message, Node, Request, Sandbox, shared, timing};
use sha2::{Digest, Sha256};

/// What a run came to.
struct Ran {
    end: Result<Fields, Error>,
    states: Vec<String>,
    channels: BTreeMap<String, Vec<u8>>,
}

impl Ran {
    fn of(mut call: Call) -> Self {
        let (mut states, mut channels) = (Vec::new(), BTreeMap::<String, Vec<u8>>::new());
        loop {
            let end = match call.message() {
                Message::Ok { fields, .. } => Ok(fields),
                Message::Err { error, .. } => Err(error),
                Message::Item { fields, .. } => {
                    states.extend(fields.get("state").map(str::to_string));
                    continue;
                }
                Message::Data { channel, payload, .. } => {
                    channels.entry(channel).or_default().extend(payload);
                    continue;
                }
                _ => continue,
            };
            return Self { end, states, channels };
        }
    }

    fn text(&self, channel: &str) -> String {
        String::from_utf8_lossy(self.channels.get(channel).map_or(&[], Vec::as_slice)).into_owned()
    }

    fn fields(&self) -> &Fields {
        self.end.as_ref().unwrap_or_else(|error| panic!("the run failed: {error}; {}", self.text("stderr")))
    }

    fn exit(&self) -> &str {
        self.fields().get("exit").expect("every end has an exit code")
    }

    /// The code of the error that it ended with.
    fn refused(&self, code: Code) -> &Error {
        match &self.end {
            Err(error) => {
                assert!(error.is(code), "{error}; {}", self.text("stderr"));
                error
            }
            Ok(fields) => panic!("the run was to end with {}: {fields:?}; {}", code.as_str(), self.text("stderr")),
        }
    }

    /// The lines of channel `result` of a type.
    fn said(&self, kind: &str) -> Vec<serde_json::Value> {
        let lines = self.text("result");
        let lines = lines.lines().map(|line| serde_json::from_str(line).expect("a result is a line of JSON"));
        lines.filter(|line: &serde_json::Value| line["type"] == kind).collect()
    }

    /// The value of the last expression as text.
    fn value(&self) -> String {
        let values = self.said("value");
        assert_eq!(values.len(), 1, "{values:?}; {}", self.text("result"));
        values[0]["forms"]["text/plain"].as_str().expect("every value has a text").to_string()
    }
}

fn begin(sandbox: &Sandbox, request: Request, source: &[u8]) -> Call {
    let call = sandbox.start(request);
    let writer = call.writer();
    if writer.write("source", source) {
        writer.end("source");
    }
    call
}

fn language(sandbox: &Sandbox, name: &str) -> Request {
    sandbox.request("code.run").set("language", name).set("timeout_ms", 30_000 * timing::factor())
}

fn run(sandbox: &Sandbox, name: &str, source: &str) -> Ran {
    Ran::of(begin(sandbox, language(sandbox, name), source.as_bytes()))
}

fn python(sandbox: &Sandbox, source: &str) -> Ran {
    run(sandbox, "python", source)
}

/// A context and what runs in it.
struct Context<'a> {
    sandbox: &'a Sandbox,
    number: String,
}

impl<'a> Context<'a> {
    fn new(sandbox: &'a Sandbox, name: &str) -> Self {
        let reply = sandbox.client().ok(sandbox.request("code.context.create").set("language", name));
        Self { sandbox, number: reply.field("context").to_string() }
    }

    fn request(&self, verb: &str) -> Request {
        self.sandbox.request(verb).set("context", &self.number)
    }

    fn begin(&self, source: &str) -> Call {
        let request = self.request("code.run").set("timeout_ms", 30_000 * timing::factor());
        begin(self.sandbox, request, source.as_bytes())
    }

    fn run(&self, source: &str) -> Ran {
        Ran::of(self.begin(source))
    }
}

fn node() -> Turn {
    let node = shared::node_with_code();
    timing::wait_for("the templates", || {
        let rows = node.control().ok(Request::new("", "template.list")).items;
        let there = |name| rows.iter().any(|row| row.get("name") == Some(name));
        (there("python") && there("code")).then_some(())
    });
    node
}

fn sandbox(node: &Node, template: &str) -> Sandbox {
    node.sandbox(&[("template", template), ("memory_mib", "384")])
}

fn warren(node: &Node, arguments: &[&str]) -> Output {
    let mut command = Command::new(Artefact::Warren.path());
    command.arg("--socket").arg(node.socket()).args(arguments).stdin(Stdio::null());
    command.output().expect("warren starts")
}

#[test]
fn a_run_gives_its_value_its_output_and_what_it_used() {
    let node = node();
    let sandbox = sandbox(&node, "python");
    let ran = python(&sandbox, "import sys\nprint('out')\nprint('err', file=sys.stderr)\n6 * 7");
    assert_eq!((ran.exit(), ran.value().as_str()), ("0", "42"));
    assert_eq!((ran.text("stdout").as_str(), ran.text("stderr").as_str()), ("out\n", "err\n"));
    assert_eq!(ran.states.last().map(String::as_str), Some("running"));
    for key in ["cpu_ms", "wall_ms", "peak_kib"] {
        assert!(ran.fields().number(key).is_some(), "{key}: {:?}", ran.fields());
    }
    assert!(ran.fields().number("peak_kib") > Some(1024), "an interpreter takes more than a MiB");
    let listed = sandbox.client().ok(sandbox.request("code.list")).items;
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].get("state"), listed[0].get("language")), (Some("completed"), Some("python")));
}

#[test]
fn output_comes_while_the_code_runs() {
    let node = node();
    let sandbox = sandbox(&node, "python");
    sandbox.sh("mkfifo -m 666 /tmp/go");
    let code = "print('before')\nopen('/tmp/go').read()\nprint('after')";
    let mut call = begin(&sandbox, language(&sandbox, "python"), code.as_bytes());
    assert_eq!(call.read_until("stdout", "\n"), "before\n");
    let listed = sandbox.client().ok(sandbox.request("code.list")).items;
    assert_eq!(listed[0].get("state"), Some("running"));
    sandbox.sh("echo > /tmp/go");
    assert_eq!(Ran::of(call).text("stdout"), "after\n");
}

#[test]
fn a_detached_run_goes_on_when_its_source_is_there_and_is_attached_to_later() {
    let node = node();
    let sandbox = sandbox(&node, "python");
    let source = b"import time; print('begun', flush=True); time.sleep(1); print('done'); 6 * 7";
    let call = begin(&sandbox, language(&sandbox, "python").set("detach", true), source);
    let exec = call.finish_ok().field("exec").to_string();
    let attached = Ran::of(sandbox.start(sandbox.request("exec.attach").set("exec", &exec)));
    assert_eq!((attached.text("stdout").as_str(), attached.exit()), ("begun\ndone\n", "0"));
    assert!(attached.text("result").contains("42"), "{}", attached.text("result"));
    // A person sees what came of it as well.
    let shown = warren(&node, &["attach", &sandbox.id, &exec]);
    assert_eq!(String::from_utf8_lossy(&shown.stdout), "begun\ndone\n42\n", "{shown:?}");
    // Whoever goes away before all of the source is there takes the run along.
    let cut = sandbox.start(language(&sandbox, "python").set("detach", true));
    assert!(cut.writer().write("source", b"print("));
    cut.cancel();
    assert!(cut.finish().expect_err("it was cancelled").is(Code::Cancelled));
    timing::wait_for("its end", || {
        let rows = sandbox.client().ok(sandbox.request("code.list")).items;
        rows.iter().all(|row| row.get("state") != Some("pending")).then_some(())
    });
}

#[test]
fn a_killed_supervisor_ends_neither_runs_nor_contexts() {
    let node = node();
    let sandbox = sandbox(&node, "python");
    let context = Context::new(&sandbox, "python");
    assert_eq!(context.run("kept = 41").exit(), "0");
    let wait =
        "import os, time\nprint('begun', flush=True)\nwhile not os.path.exists('/workspace/go'): time.sleep(0.05)\n";
    let in_context = context.begin(&format!("{wait}kept += 1\nkept"));
    let detached = language(&sandbox, "python").set("detach", true);
    let exec = begin(&sandbox, detached, format!("{wait}print('done')\n6 * 7").as_bytes());
    let exec = exec.finish_ok().field("exec").to_string();
    let states = || {
        let rows = sandbox.client().ok(sandbox.request("code.list")).items;
        rows.iter().map(|row| row.get("state").unwrap_or_default().to_string()).collect::<Vec<_>>()
    };
    timing::wait_for("both to run", || (states() == ["completed", "running", "running"]).then_some(()));
    let before = node.supervisor();
    node.sh(&format!("kill -9 {before}"));
    assert_eq!(in_context.finish().expect_err("its connection is gone").code, "NODE_RESTARTED");
    timing::wait_for("another supervisor", || (node.supervisor() != before).then_some(()));
    node.wait_until_ready();
    assert_eq!(states(), ["completed", "running", "running"]);
    sandbox.sh("touch /workspace/go");
    let attached = Ran::of(sandbox.start(sandbox.request("exec.attach").set("exec", &exec)));
    assert_eq!(
        (attached.text("stdout").as_str(), attached.exit(), attached.value().as_str()),
        ("begun\ndone\n", "0", "42")
    );
    timing::wait_for("both to end", || (states() == ["completed"; 3]).then_some(()));
    // What the run in the context did is there, and so is what it knew before.
    assert_eq!(context.run("kept").value(), "42");
    let rows = node.control().ok(Request::new("", "history.list").set("sandbox", &sandbox.id)).items;
    let ends: Vec<_> = rows.iter().filter(|row| row.get("kind") == Some("code")).map(|row| row.get("state")).collect();
    assert_eq!(ends, [Some("completed"); 4]);
}

#[test]
fn an_exception_comes_as_name_value_and_traceback() {
    let node = node();
    let sandbox = sandbox(&node, "python");
    let ran = python(&sandbox, "def f():\n    raise ValueError('no 7')\nf()");
    assert_eq!(ran.exit(), "1");
    let error = &ran.said("error")[0];
    assert_eq!((error["name"].as_str(), error["value"].as_str()), (Some("ValueError"), Some("no 7")));
    let traceback = error["traceback"].as_str().expect("a text");
    assert!(traceback.contains("line 2, in f") && !traceback.contains("runner"), "{traceback}");
    assert_eq!(sandbox.client().ok(sandbox.request("code.list")).items[0].get("state"), Some("failed"));
    assert_eq!(python(&sandbox, "1 +").said("error")[0]["name"], "SyntaxError");
    // Its record says why as well, and of a run in a context what language that is.
    let context = Context::new(&sandbox, "python");
    assert_eq!(context.run("{}['gone']").exit(), "1");
    let recorded = timing::wait_for("the records", || {
        let rows = node.control().ok(Request::new("", "history.list").set("sandbox", &sandbox.id)).items;
        let ended = rows.iter().filter(|row| row.get("state") == Some("failed")).count();
        (ended == 3 && rows.iter().all(|row| row.get("message").is_some())).then_some(rows)
    });
    let said = |at: usize| (recorded[at].get("language"), recorded[at].get("message"));
    assert_eq!(said(0), (Some("python"), Some("KeyError: 'gone'")));
    assert_eq!(said(2), (Some("python"), Some("ValueError: no 7")));
    assert_eq!(python(&sandbox, "import sys; sys.exit(5)").exit(), "5");
}

#[test]
fn a_context_keeps_variables_imports_and_directory_and_can_be_interrupted_restarted_and_deleted() {
    let node = node();
    let sandbox = sandbox(&node, "python");
    let context = Context::new(&sandbox, "python");
    assert_eq!(context.run("import os\nx = 40\nos.chdir('/tmp')").exit(), "0");
    assert_eq!(context.run("x += 2\n(x, os.getcwd())").value(), "(42, '/tmp')");

    let mut call = context.begin("print('on')\nwhile True: pass");
    call.read_until("stdout", "on\n");
    let waiting = context.begin("x");
    let interrupted = sandbox.client().ok(context.request("code.context.interrupt"));
    assert_eq!(interrupted.field("interrupted"), "true");
    let ran = Ran::of(call);
    assert_eq!((ran.exit(), ran.said("error")[0]["name"].as_str()), ("130", Some("KeyboardInterrupt")));
    assert_eq!(Ran::of(waiting).value(), "42", "the next in the queue has the same variables");

    let listed = sandbox.client().ok(sandbox.request("code.context.list")).items;
    assert_eq!((listed.len(), listed[0].get("state"), listed[0].get("runs")), (1, Some("idle"), Some("4")));
    sandbox.client().ok(context.request("code.context.restart"));
    assert_eq!(context.run("x").said("error")[0]["name"], "NameError");
    sandbox.client().ok(context.request("code.context.delete"));
    context.run("1").refused(Code::NotFound);
    assert!(sandbox.client().ok(sandbox.request("code.context.list")).items.is_empty());
}

#[test]
fn a_context_whose_interpreter_is_gone_says_why_and_starts_anew_on_request() {
    let node = node();
    let sandbox = sandbox(&node, "python");
    let context = Context::new(&sandbox, "python");
    let ran = context.run("import os\nos._exit(9)");
    assert_eq!((ran.exit(), ran.fields().get("context_ended")), ("9", Some("true")));
    let error = context.run("1");
    assert!(error.refused(Code::BadState).message.contains("has ended: "), "{:?}", error.end);
    sandbox.client().ok(context.request("code.context.restart"));
    assert_eq!(context.run("1").value(), "1");
}

#[test]
fn a_context_outlives_a_pause() {
    let node = node();
    let sandbox = sandbox(&node, "python");
    let context = Context::new(&sandbox, "python");
    context.run("x = 'kept'");
    sandbox.client().ok(sandbox.request("sandbox.pause"));
    sandbox.client().ok(sandbox.request("sandbox.resume"));
    assert_eq!(context.run("x").value(), "'kept'");
}

#[test]
fn a_plot_comes_as_a_picture_and_rich_forms_as_they_are_offered() {
    let node = node();
    let sandbox = sandbox(&node, "code");
    let plot = "import numpy as np, matplotlib.pyplot as plt\nplt.plot(np.arange(5) ** 2)\nnp.arange(5).sum()";
    let ran = python(&sandbox, plot);
    assert_eq!((ran.exit(), ran.value().as_str()), ("0", "10"));
    let figures = ran.said("display");
    let png = figures[0]["forms"]["image/png"].as_str().expect("a figure has a picture");
    assert!(png.starts_with("iVBORw0KGgo"), "the signature of a PNG in base64: {}", &png[..24]);
    let forms = "class A:\n  def _repr_html_(self): return '<b>a</b>'\n  def _repr_svg_(self): return '<svg/>'\n  \
                 def _repr_json_(self): return {'a': 1}\n  def _repr_png_(self): raise ValueError\nA()";
    let forms = &python(&sandbox, forms).said("value")[0]["forms"];
    assert_eq!((forms["text/html"].as_str(), forms["image/svg+xml"].as_str()), (Some("<b>a</b>"), Some("<svg/>")));
    assert_eq!((forms["application/json"].as_str(), forms.get("image/png")), (Some("{\"a\": 1}"), None));
}

#[test]
fn javascript_and_bash_have_runners_too() {
    let node = node();
    let sandbox = sandbox(&node, "code");
    let ran = run(&sandbox, "javascript", "setTimeout(() => console.log('late'), 10); ({ a: [1, 2] })");
    assert_eq!((ran.value().as_str(), ran.text("stdout").as_str()), ("{ a: [ 1, 2 ] }", "late\n"));
    let ran = run(&sandbox, "javascript", "throw new TypeError('no')");
    assert_eq!((ran.exit(), ran.said("error")[0]["name"].as_str()), ("1", Some("TypeError")));
    let context = Context::new(&sandbox, "javascript");
    assert_eq!(context.run("let n = 1; const os = require('os')").exit(), "0");
    assert_eq!(context.run("n += os.cpus().length; n").value(), "2");
    let mut call = context.begin("console.log('on'); while (true) {}");
    call.read_until("stdout", "on\n");
    sandbox.client().ok(context.request("code.context.interrupt"));
    assert_eq!(Ran::of(call).exit(), "130");
    assert_eq!(context.run("n").value(), "2");

    let context = Context::new(&sandbox, "bash");
    assert_eq!(context.run("x=5; cd /tmp; f() { echo \"$x in $PWD\"; return 3; }").exit(), "0");
    let ran = context.run("f");
    assert_eq!((ran.exit(), ran.text("stdout").as_str()), ("3", "5 in /tmp\n"));
    let mut call = context.begin("echo on; while :; do sleep 0.1; done");
    call.read_until("stdout", "on\n");
    sandbox.client().ok(context.request("code.context.interrupt"));
    assert_eq!(Ran::of(call).exit(), "130");
    assert_eq!(context.run("echo $x").text("stdout"), "5\n");
}

#[test]
fn a_language_without_a_runner_is_run_once() {
    let node = node();
    let sandbox = node.sandbox(&[]);
    let ran = run(&sandbox, "sh", "echo once\nexit 4");
    assert_eq!((ran.exit(), ran.text("stdout").as_str()), ("4", "once\n"));
    let create = sandbox.request("code.context.create").set("language", "sh");
    assert!(sandbox.client().err(create).is(Code::BadArgument));
    let unknown = run(&sandbox, "cobol", "");
    assert!(unknown.refused(Code::NotFound).message.contains("sh"), "the error names what there is");
}

#[test]
fn files_that_a_run_made_are_told_with_size_and_hash() {
    let node = node();
    let sandbox = sandbox(&node, "python");
    python(&sandbox, "open('old', 'w').write('1')");
    let code = "import os\nos.mkdir('d')\nopen('d/new', 'w').write('abc' * 1000)\nos.symlink('/etc/passwd', 'link')";
    let files = python(&sandbox, code).said("artifact");
    let hash: String = Sha256::digest("abc".repeat(1000)).iter().map(|octet| format!("{octet:02x}")).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    assert_eq!((files[0]["path"].as_str(), files[0]["size"].as_u64()), (Some("/workspace/d/new"), Some(3000)));
    assert_eq!(files[0]["sha256"].as_str(), Some(hash.as_str()));
    assert!(python(&sandbox, "1").said("artifact").is_empty());
}

#[test]
fn a_source_is_at_most_a_mebibyte_of_utf_8_without_nul() {
    let node = node();
    let sandbox = sandbox(&node, "python");
    let of = |source: &[u8]| Ran::of(begin(&sandbox, language(&sandbox, "python"), source));
    let mut large = vec![b'#'; 1 << 20];
    assert_eq!(of(&large).exit(), "0");
    large.push(b'#');
    assert_eq!(of(&large).refused(Code::SourceTooLarge).fields.get("max"), Some("1048576"));
    assert_eq!(of(b"1\0").refused(Code::BadArgument).fields.get("octet"), Some("1"));
    assert_eq!(of(b"12\xff").refused(Code::BadArgument).fields.get("octet"), Some("2"));
    assert_eq!(python(&sandbox, "1 + 1").value(), "2");
    // Packages, on a node that has no index.
    let packages = language(&sandbox, "python").set("dependency", "words");
    let refused = Ran::of(begin(&sandbox, packages, b"1")).refused(Code::NoIndex).fields.clone();
    assert_eq!(refused.get("setting"), Some("packages.pip_index"));
}

#[test]
fn each_limit_has_an_error_of_its_own_and_the_sandbox_goes_on() {
    let node = node();
    let sandbox = sandbox(&node, "python");
    let within = |ms: u32, code: &str| {
        let request = sandbox.request("code.run").set("language", "python").set("timeout_ms", ms * timing::factor());
        Ran::of(begin(&sandbox, request, code.as_bytes()))
    };
    let stubborn = "import signal\nfor s in (2, 15): signal.signal(s, signal.SIG_IGN)\nwhile True: pass";
    assert!(within(250, stubborn).refused(Code::Timeout).fields.number("timeout_ms").is_some());
    let request = || language(&sandbox, "python").set("memory_mib", 64);
    let bomb = "x = []\nwhile True: x.append(bytearray(1 << 20))";
    let ran = Ran::of(begin(&sandbox, request(), bomb.as_bytes()));
    assert_eq!(ran.refused(Code::OutOfMemory).fields.get("memory_mib"), Some("64"));
    let connect = "import socket\nsocket.create_connection(('1.1.1.1', 80), 5)";
    assert!(python(&sandbox, connect).refused(Code::NetworkOff).fields.number("refused") > Some(0));
    let resolve = "import urllib.request\nurllib.request.urlopen('http://example.com')";
    python(&sandbox, resolve).refused(Code::NetworkOff);
    let asked = Ran::of(begin(&sandbox, language(&sandbox, "python").set("network", "on"), b"1"));
    asked.refused(Code::NetworkOff);
    let more = Ran::of(begin(&sandbox, language(&sandbox, "python").set("memory_mib", 2048), b"1"));
    more.refused(Code::OutOfRange);
    let dependency = Ran::of(begin(&sandbox, language(&sandbox, "python").set("dependency", "requests"), b"1"));
    dependency.refused(Code::NoIndex);
    let local = "import socket\ns = socket.create_server(('127.0.0.1', 0))\n\
                 c = socket.create_connection(s.getsockname())\n1";
    assert_eq!(python(&sandbox, local).value(), "1", "its own loopback works");
}

#[test]
fn what_is_not_said_is_half_a_minute_512_mebibytes_no_network_and_the_sandboxs_directory() {
    let node = node();
    let sandbox = node.sandbox(&[("template", "python"), ("memory_mib", "768"), ("network", "on")]);
    let endless = begin(&sandbox, sandbox.request("code.run").set("language", "python"), b"while True: pass");
    let of = |keys: &[(&str, &str)], code: &str| {
        let request = keys.iter().fold(language(&sandbox, "python"), |request, (key, value)| request.set(key, value));
        Ran::of(begin(&sandbox, request, code.as_bytes()))
    };
    let memory = "group = open('/proc/self/cgroup').read().strip().split('::')[1]\n\
                  int(open(f'/sys/fs/cgroup{group}/memory.max').read()) >> 20";
    assert_eq!(of(&[], memory).value(), "512");
    assert_eq!(of(&[("memory_mib", "64")], memory).value(), "64");
    let all = of(&[("memory_mib", "max")], memory).value().parse::<u64>().expect("a number");
    assert!((600..768).contains(&all), "{all} MiB of a sandbox that has 768");
    assert_eq!(of(&[], "import os; os.getcwd()").value(), "'/workspace'");
    assert_eq!(of(&[("cwd", "/tmp")], "import os; os.getcwd()").value(), "'/tmp'");
    assert_eq!(of(&[("env", "COLOUR=blue")], "import os; os.environ['COLOUR']").value(), "'blue'");
    // The sandbox has a network, and code has it only where that is said.
    let me = "import json, urllib.request\njson.load(urllib.request.urlopen('http://169.254.169.254/me'))['template']";
    of(&[], me).refused(Code::NetworkOff);
    assert_eq!(of(&[("network", "on")], me).value(), "'python'");
    let interfaces = "import os; sorted(os.listdir('/sys/class/net'))";
    assert!(of(&[("network", "on")], interfaces).value().contains("eth0"));
    assert_eq!(Ran::of(endless).refused(Code::Timeout).fields.get("timeout_ms"), Some("30000"));
}

#[test]
fn code_that_fills_the_disk_hears_so_and_other_sandboxes_have_room() {
    let node = node();
    let shape = [("template", "python"), ("memory_mib", "256"), ("disk_mib", "128")];
    let (full, neighbour) = (node.sandbox(&shape), node.sandbox(&shape));
    let filler = "f = open('/workspace/fill', 'wb')\nwhile True: f.write(bytes(1 << 20)); f.flush()";
    let ran = python(&full, filler);
    assert_eq!((ran.exit(), ran.said("error")[0]["name"].as_str()), ("1", Some("OSError")));
    assert!(ran.said("error")[0]["value"].as_str().is_some_and(|text| text.contains("No space left")), "{:?}", ran.end);
    let write = "open('/workspace/more', 'wb').write(bytes(1 << 20))";
    assert_eq!(python(&neighbour, write).value(), "1048576");
    let again = python(&full, "import os; os.remove('/workspace/fill'); open('/workspace/more', 'wb').write(b'1')");
    assert_eq!(again.value(), "1");
}

#[test]
fn hostile_code_is_ended_with_the_limit_named_and_harms_nobody() {
    let node = node();
    let sandbox = sandbox(&node, "python");
    let neighbour = Context::new(&sandbox, "python");
    neighbour.run("x = 1");
    let within = |ms: u32, code: &str| {
        let request = sandbox.request("code.run").set("language", "python").set("timeout_ms", ms * timing::factor());
        Ran::of(begin(&sandbox, request, code.as_bytes()))
    };
    let ran = within(400, "import os\nwhile True:\n    os.write(1, b'y' * 4096)");
    ran.refused(Code::Timeout);
    assert!(!ran.text("stdout").is_empty());
    let ran = within(400, "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass");
    assert!(ran.refused(Code::Timeout).fields.number("processes_refused") > Some(0), "{:?}", ran.end);
    let ran = within(30_000, "import os, time\nfor _ in range(400):\n    if os.fork() == 0: time.sleep(1000)");
    assert_eq!(ran.refused(Code::TooManyProcesses).fields.get("max"), Some("256"));
    // Without its streams it goes on; without its channels nobody hears of it but by its end.
    assert_eq!(within(30_000, "import os\nos.close(1)\nos.close(2)\nos.open('/dev/null', 0)\n3").exit(), "0");
    assert_eq!(within(30_000, "import os\nos.closerange(0, 256)\n3").exit(), "0");
    let lies = within(30_000, "import os\nos.write(3, b'x' * 100)\nos.write(4, b'not json\\n')\nos._exit(6)");
    assert_eq!(lies.exit(), "6");
    let context = Context::new(&sandbox, "python");
    context.run("import os\nos.write(3, b'nonsense\\n')\nwhile True: pass");
    context.run("1").refused(Code::BadState);
    let ran = python(&sandbox, "import shutil, os\nfor e in os.listdir('/workspace'): shutil.rmtree(e, True)");
    assert_eq!(ran.exit(), "0");
    sandbox.sh("rm -rf /workspace");
    assert_eq!(python(&sandbox, "import os; os.getcwd()").value(), "'/workspace'");
    assert_eq!(neighbour.run("x").value(), "1");
    assert_eq!(sandbox.state(), "running");
}

#[test]
fn a_context_that_heeds_the_interrupt_outlives_its_time_and_one_that_does_not_is_ended() {
    let node = node();
    let sandbox = sandbox(&node, "python");
    let context = Context::new(&sandbox, "python");
    let late = |code: &str| {
        let request = context.request("code.run").set("timeout_ms", 250 * timing::factor());
        Ran::of(begin(&sandbox, request, code.as_bytes()))
    };
    let ran = late("x = 3\nwhile True: pass");
    assert_eq!(ran.refused(Code::Timeout).fields.get("context_ended"), None);
    assert_eq!(context.run("x").value(), "3");
    let ran = late("import signal\nsignal.signal(2, signal.SIG_IGN)\nwhile True: pass");
    assert_eq!(ran.refused(Code::Timeout).fields.get("context_ended"), Some("true"));
    context.run("x").refused(Code::BadState);
}

#[test]
fn a_run_whose_client_is_gone_is_ended() {
    let node = node();
    let sandbox = sandbox(&node, "python");
    sandbox.sh("mkfifo -m 666 /tmp/go");
    let other = node.connect();
    let request = language(&sandbox, "python");
    let mut call = other.start(request);
    call.writer().write("source", b"print('on')\nopen('/tmp/go').read()");
    call.writer().end("source");
    call.read_until("stdout", "on\n");
    other.cut();
    timing::wait_for("the run to be ended", || {
        let rows = sandbox.client().ok(sandbox.request("code.list")).items;
        (rows[0].get("state") == Some("failed")).then_some(())
    });
    timing::wait_for("its interpreter to end", || {
        let found = sandbox.sh("ps | grep -c '[r]unner.py' || true");
        (found.trim() == "0").then_some(())
    });
}

#[test]
fn the_command_line_runs_code_and_saves_what_it_shows() {
    let node = node();
    let directory = qemu_tests::files::TempDir::new().expect("a temporary directory can be made");
    let file = directory.path().join("code.py");
    std::fs::write(&file, "print('hello')\n1 + 1\n").expect("a file can be written");
    let file = file.to_str().expect("a temporary path is text");
    let before = node.control().ok(Request::new("", "sandbox.list")).items.len();
    let ran = warren(&node, &["run", "--lang", "python", "--timeout", "600s", file]);
    let (out, err) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    assert_eq!((ran.status.code(), out.as_ref()), (Some(0), "hello\n2\n"), "{err}");
    assert_eq!(node.control().ok(Request::new("", "sandbox.list")).items.len(), before, "its sandbox went with it");

    let sandbox = sandbox(&node, "code");
    let made = warren(&node, &["context", "create", "--lang", "python", &sandbox.id]);
    let number = String::from_utf8_lossy(&made.stdout).trim().to_string();
    std::fs::write(file, "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nx = 5\n").expect("a file can be written");
    let save = directory.path().join("saved");
    let save = save.to_str().expect("a temporary path is text");
    let ran = warren(&node, &["code", "--timeout", "600s", "--context", &number, "--save", save, &sandbox.id, file]);
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let png = std::fs::read(directory.path().join("saved/result-1.png")).expect("the figure was saved");
    assert!(png.starts_with(b"\x89PNG\r\n"));
    std::fs::write(file, "raise KeyError(x)").expect("a file can be written");
    let ran = warren(&node, &["--json", "code", "--context", &number, &sandbox.id, file]);
    let document: serde_json::Value = serde_json::from_slice(&ran.stdout).expect("a document");
    assert_eq!((ran.status.code(), document["results"][0]["value"].as_str()), (Some(1), Some("5")), "{document}");
    let ended = warren(&node, &["context", "rm", &sandbox.id, &number]);
    assert!(ended.status.success());
}
