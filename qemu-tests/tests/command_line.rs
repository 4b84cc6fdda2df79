//! `warren` on the command line against a node: what `make run` does.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use qemu_tests::artefacts::Artefact;
use qemu_tests::{Node, shared, timing};

fn warren(node: &Node, arguments: &[&str]) -> Output {
    Command::new(Artefact::Warren.path())
        .arg("--socket")
        .arg(node.socket())
        .args(arguments)
        .stdin(std::process::Stdio::null())
        .output()
        .expect("warren starts")
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_python_script_is_copied_in_run_and_its_exit_code_passed_through() {
    let node = shared::node_with_templates();
    let created = warren(&node, &["create", "-t", "python"]);
    assert!(created.status.success(), "{}", stderr(&created));
    let id = stdout(&created).trim_end().to_string();
    assert!(!id.is_empty() && !id.contains(char::is_whitespace), "the id alone is printed: {id:?}");
    let guard = qemu_tests::Sandbox::of(node.control(), &id);

    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/hello.py");
    let copied = warren(&node, &["cp", &script.display().to_string(), &format!("{id}:/workspace/hello.py")]);
    assert!(copied.status.success(), "{}", stderr(&copied));
    let run = warren(&node, &["exec", &id, "--", "python3", "/workspace/hello.py"]);
    assert!(run.status.success(), "{} {}", stdout(&run), stderr(&run));
    assert!(stdout(&run).contains("3.11"), "{}", stdout(&run));

    let code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)";
    let run = warren(&node, &["exec", &id, "--", "python3", "-c", code]);
    assert_eq!(run.status.code(), Some(7));
    assert_eq!(stdout(&run), "out\n");
    assert_eq!(stderr(&run), "err\n");

    let listed = warren(&node, &["ps"]);
    assert!(stdout(&listed).contains(&id), "{}", stdout(&listed));
    let removed = warren(&node, &["rm", "--force", &id]);
    assert!(removed.status.success(), "{}", stderr(&removed));
    guard.keep();
}

/// `warren` on a terminal of 101 by 33.
struct Terminal {
    script: std::process::Child,
    keys: std::process::ChildStdin,
    output: std::process::ChildStdout,
    shown: String,
}

impl Terminal {
    fn of(node: &Node, arguments: &str) -> Self {
        let warren = Artefact::Warren.path();
        let line =
            format!("stty rows 33 cols 101; {} --socket {} {arguments}", warren.display(), node.socket().display());
        let mut command = Command::new("script");
        command.args(["-qec", &line, "/dev/null"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut script = command.spawn().expect("script(1) starts");
        let keys = script.stdin.take().expect("it has a standard input");
        let output = script.stdout.take().expect("it has a standard output");
        Self { script, keys, output, shown: String::new() }
    }

    /// Types that, and waits until it shows the answer.
    fn types(&mut self, keys: &[u8], answer: &str) {
        self.keys.write_all(keys).expect("it reads");
        let mut chunk = [0; 4096];
        while !self.shown.contains(answer) {
            let n = self.output.read(&mut chunk).expect("it writes");
            assert!(n > 0, "it ended early: {}", self.shown);
            self.shown.push_str(&String::from_utf8_lossy(&chunk[..n]));
        }
    }

    /// Its exit code, and all that it has shown.
    fn end(mut self) -> (Option<i32>, String) {
        self.output.read_to_string(&mut self.shown).expect("it writes text");
        (self.script.wait().expect("it ends").code(), self.shown)
    }
}

#[test]
fn a_shell_on_a_terminal_has_its_size_and_passes_its_exit_code_on() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    let mut terminal = Terminal::of(&node, &format!("sh {}", sandbox.id));
    terminal.types(b"", "$ ");
    terminal.types(b"tty && stty size && echo $TERM\n", "33 101");
    // An interrupt key ends what runs in there, and not the shell.
    terminal.types(b"sleep 1000\n", "sleep 1000");
    timing::wait_for("sleep to run", || {
        sandbox.sh("cat /proc/[0-9]*/comm 2>/dev/null; true").lines().any(|name| name == "sleep").then_some(())
    });
    terminal.types(b"\x03", "^C");
    terminal.types(b"echo interrupted=$?\n", "interrupted=130");
    terminal.types(b"exit 7\n", "");
    let (code, shown) = terminal.end();
    assert_eq!(code, Some(7), "{shown}");
    assert!(shown.contains("/dev/pts/") && shown.contains("xterm"), "{shown}");
}

#[test]
fn a_shell_in_the_background_is_gone_to_and_left_by_a_key() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    let started = warren(&node, &["exec", "-dit", &sandbox.id, "--", "sh"]);
    let attach = format!("attach -it {} {}", sandbox.id, stdout(&started).trim());
    let mut terminal = Terminal::of(&node, &attach);
    terminal.types(b"", "$ ");
    terminal.types(b"kept=yes; stty size\n", "33 101");
    terminal.types(b"\x1d", "");
    let (code, shown) = terminal.end();
    assert_eq!(code, Some(0), "{shown}");
    assert!(shown.contains("Ctrl-]"), "{shown}");
    let mut terminal = Terminal::of(&node, &attach);
    terminal.types(b"", "33 101");
    terminal.types(b"echo it is $kept; exit 7\n", "it is yes");
    let (code, shown) = terminal.end();
    assert_eq!(code, Some(7), "{shown}");
}

#[test]
fn a_program_in_the_background_is_fed_by_one_command_line_after_the_other() {
    let node = shared::node();
    let sandbox = node.sandbox(&[]);
    let started = warren(&node, &["exec", "-d", "-i", &sandbox.id, "--", "cat"]);
    let number = stdout(&started).trim().to_string();
    let attach = ["attach", "-i", &sandbox.id, &number];
    let spawn = || {
        let mut command = qemu_tests::templates::command(&node, &attach);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("warren starts")
    };
    let mut first = spawn();
    let mut input = first.stdin.take().expect("a pipe");
    input.write_all(b"one\n").expect("it reads");
    let mut line = [0; 4];
    first.stdout.as_mut().expect("a pipe").read_exact(&mut line).expect("it comes back");
    assert_eq!(&line, b"one\n");
    let second = warren(&node, &attach);
    assert_eq!(second.status.code(), Some(125), "{}", stderr(&second));
    assert!(stderr(&second).starts_with("error: BAD_STATE: "), "{}", stderr(&second));
    // An interrupt ends the watching, and leaves the program and its standard input as they are.
    let interrupted = Command::new("kill").args(["-INT", &first.id().to_string()]).status().expect("kill starts");
    assert!(interrupted.success());
    assert_eq!(first.wait().expect("it ends").code(), Some(130));
    drop(input);
    timing::wait_for("nobody to feed it", || {
        let mut call = sandbox.client().start(sandbox.request("exec.attach").set("exec", &number).set("stdin", true));
        matches!(call.message(), qemu_tests::Message::Item { .. }).then(|| {
            call.cancel();
            drop(call.finish());
        })
    });
    let mut last = spawn();
    last.stdin.take().expect("a pipe").write_all(b"two\n").expect("it reads");
    let last = last.wait_with_output().expect("it ends");
    assert_eq!((last.status.code(), stdout(&last).as_str()), (Some(0), "one\ntwo\n"), "{}", stderr(&last));
}

#[test]
fn an_error_is_one_line_with_its_code() {
    let node = shared::node_with_templates();
    let output = warren(&node, &["exec", "nosuchsandbox", "--", "true"]);
    assert!(!output.status.success());
    assert!(stderr(&output).starts_with("error: NOT_FOUND: "), "{}", stderr(&output));
    assert_eq!(stdout(&output), "");
}

#[test]
fn run_creates_runs_and_removes() {
    let node = shared::node_with_templates();
    let before = warren(&node, &["ps", "--all", "--json"]);
    let run = warren(&node, &["run", "--rm", "base", "--", "sh", "-c", "echo in a sandbox; exit 3"]);
    assert_eq!(run.status.code(), Some(3), "{}", stderr(&run));
    assert_eq!(stdout(&run), "in a sandbox\n");
    assert_eq!(stdout(&warren(&node, &["ps", "--all", "--json"])), stdout(&before));
}

/// How large the parts are that a copy goes through: supervisor, worker and agent, in KiB.
struct Sizes<'a> {
    node: &'a Node,
    sandbox: &'a qemu_tests::Sandbox,
    before: [u64; 3],
}

impl<'a> Sizes<'a> {
    fn of(node: &'a Node, sandbox: &'a qemu_tests::Sandbox) -> Self {
        let sizes = Self { node, sandbox, before: [0; 3] };
        Self { before: sizes.now(), ..sizes }
    }

    fn now(&self) -> [u64; 3] {
        let number = |text: String| text.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number");
        let own = |pid: u64, kind: &str| number(self.node.sh(&format!("grep ^{kind}: /proc/{pid}/status")));
        let agent = self.sandbox.exec_request(&["grep", "^VmRSS:", "/proc/1/status"]).set("user", 0);
        // The supervisor's is the most that it ever had. The worker's is without the guest's memory: by far its largest mapping,
        // or the private mapping of a file where it began from a snapshot.
        let length = |line: &str| {
            let ends = line.split(' ').next().and_then(|range| range.split_once('-'));
            let end = |text: &str| u64::from_str_radix(text, 16).expect("an address");
            ends.map_or(0, |(first, last)| end(last) - end(first))
        };
        let maps =
            self.node.sh(&format!("grep -e - -e ^Anonymous: /proc/{}/smaps", self.node.worker(&self.sandbox.id)));
        let (mut worker, mut of_guest) = (0, false);
        for line in maps.lines() {
            match line.strip_prefix("Anonymous:") {
                Some(kib) if !of_guest => worker += number(format!("x {}", kib.trim())),
                Some(_) => {}
                None => of_guest = line.contains(" /") || length(line) >= 32 << 20,
            }
        }
        [own(self.node.supervisor(), "VmHWM"), worker, number(self.sandbox.client().ok(agent).text("stdout"))]
    }

    fn assert_small(&self, what: &str) {
        let (before, after) = (self.before, self.now());
        println!("{what}: supervisor, worker, agent in KiB: {before:?} before, {after:?} after");
        for (at, more) in [16 * 1024, 16 * 1024, 2 * 1024].into_iter().enumerate() {
            assert!(after[at] < before[at] + more, "{what}: {before:?} before, {after:?} after");
        }
    }
}

/// `warren cp` with 16 MiB for its data.
fn copy(node: &Node, from: &str, to: &str, (input, output): (std::process::Stdio, std::process::Stdio)) {
    let mut shell = Command::new("sh");
    shell.args(["-c", "ulimit -d 16384; exec \"$@\"", "sh"]).arg(Artefact::Warren.path()).arg("--socket");
    shell.arg(node.socket()).args(["cp", from, to]).stdin(input).stdout(output).stderr(std::process::Stdio::piped());
    let copied = shell.spawn().and_then(std::process::Child::wait_with_output).expect("a shell starts");
    assert!(copied.status.success(), "{}", stderr(&copied));
}

fn soak(variable: &str, usual: usize) -> usize {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(usual)
}

#[test]
fn a_large_file_goes_in_and_out_unchanged_with_little_memory_on_each_side() {
    let node = shared::node_with_templates();
    let mib = soak("WARREN_SOAK_COPY_MIB", 192);
    let sandbox = node.sandbox(&[("disk_mib", &(mib + 512).to_string())]);
    let sizes = Sizes::of(&node, &sandbox);
    let place = qemu_tests::files::TempDir::new().expect("a temporary directory");
    let (there, back) = (place.path().join("there"), place.path().join("back"));
    let block: Vec<u8> = (0..1u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let mut file = std::fs::File::create(&there).expect("a file");
    for number in 0..mib {
        std::io::Write::write_all(&mut file, &[&number.to_le_bytes(), &block[8..]].concat()).expect("room for it");
    }
    drop(file);
    // With 16 MiB for its data this side could not hold the file.
    let inside = format!("{}:/workspace/large", sandbox.id);
    let none = || (std::process::Stdio::null(), std::process::Stdio::null());
    copy(&node, &there.display().to_string(), &inside, none());
    copy(&node, &inside, &back.display().to_string(), none());
    let same = Command::new("cmp").arg(&there).arg(&back).status().expect("cmp starts");
    assert!(same.success(), "what came back is something else");
    sizes.assert_small(&format!("{mib} MiB both ways"));
}

#[test]
fn a_directory_of_many_files_goes_in_and_out_as_an_archive_with_little_memory_on_each_side() {
    let node = shared::node_with_templates();
    let count = soak("WARREN_SOAK_COPY_FILES", 200);
    let sandbox = node.sandbox(&[("disk_mib", "1024")]);
    let sizes = Sizes::of(&node, &sandbox);
    let place = qemu_tests::files::TempDir::new().expect("a temporary directory");
    let shell = |script: &str| {
        let output = Command::new("sh").args(["-euc", script]).current_dir(place.path()).output().expect("sh starts");
        assert!(output.status.success(), "{script}: {}", stderr(&output));
    };
    std::fs::create_dir(place.path().join("many")).expect("a directory");
    for number in 0..count {
        let text = format!("{number} ").repeat(number % 500);
        std::fs::write(place.path().join(format!("many/file-{number}")), text).expect("room for it");
    }
    shell("tar -cf there.tar many; mkdir out");
    let inside = format!("{}:/workspace", sandbox.id);
    let archive = std::fs::File::open(place.path().join("there.tar")).expect("it was made");
    copy(&node, "-", &inside, (archive.into(), std::process::Stdio::null()));
    let archive = std::fs::File::create(place.path().join("back.tar")).expect("there is room");
    copy(&node, &format!("{inside}/many"), "-", (std::process::Stdio::null(), archive.into()));
    shell("tar -xf back.tar -C out; diff -r many out/many");
    sizes.assert_small(&format!("{count} files both ways"));
}

#[test]
fn a_directory_goes_in_and_out_as_a_tar_archive_and_so_do_links() {
    let node = shared::node_with_templates();
    let sandbox = node.sandbox(&[]);
    let place = qemu_tests::files::TempDir::new().expect("a directory can be made");
    let long = "n".repeat(150);
    let script = format!(
        "cd {0}; mkdir -p tree/{long}/deep out hostile; echo one > tree/one; chmod 755 tree/one; : > tree/empty; \
         head -c 100000 /dev/urandom > tree/{long}/deep/large; ln -s one tree/link; ln -s /etc/passwd tree/{long}/passwd; \
         tar -cf tree.tar tree; tar -cPf hostile.tar --transform s,^tree/one,../../escaped, tree/one tree/empty",
        place.path().display()
    );
    let shell = |script: &str| {
        let output = Command::new("bash").args(["-euc", script]).output().expect("bash starts");
        assert!(output.status.success(), "{script}: {}", stderr(&output));
    };
    shell(&script);
    let file = |name: &str| place.path().join(name).display().to_string();
    let warren_with = |input: Option<&str>, output: Option<&str>, arguments: &[&str]| {
        let mut command = Command::new(Artefact::Warren.path());
        command.arg("--socket").arg(node.socket()).args(arguments).stdin(std::process::Stdio::null());
        if let Some(input) = input {
            command.stdin(std::fs::File::open(input).expect("it was made"));
        }
        if let Some(output) = output {
            command.stdout(std::fs::File::create(output).expect("there is room"));
        }
        command.stderr(std::process::Stdio::piped()).spawn().and_then(|child| child.wait_with_output()).expect("warren")
    };
    let target = format!("{}:/workspace", sandbox.id);
    let sent = warren_with(Some(&file("tree.tar")), None, &["cp", "-", &target]);
    assert!(sent.status.success(), "{}", stderr(&sent));
    let seen = sandbox.sh("cd /workspace/tree; readlink link; stat -c '%a %s' one empty; ls -la . | wc -l");
    assert_eq!(seen, "one\n755 4\n644 0\n7\n");
    let received = warren_with(None, Some(&file("back.tar")), &["cp", &format!("{target}/tree"), "-"]);
    assert!(received.status.success(), "{}", stderr(&received));
    shell(&format!("cd {0}/out; tar -xf ../back.tar; diff -r --no-dereference ../tree tree", place.path().display()));

    // The same tree without an archive, links as well.
    let copied = warren(&node, &["cp", &file("tree"), &format!("{}:/workspace/copy", sandbox.id)]);
    assert!(copied.status.success(), "{}", stderr(&copied));
    assert_eq!(sandbox.sh("readlink /workspace/copy/link; cat /workspace/copy/link"), "one\none\n");

    // What leads out of the directory is left out, and said; the rest is there.
    let refused = warren_with(Some(&file("hostile.tar")), None, &["cp", "-", &format!("{target}/h/")]);
    assert_eq!(refused.status.code(), Some(1), "{}", stderr(&refused));
    assert!(stderr(&refused).contains("leads out"), "{}", stderr(&refused));
    assert_eq!(sandbox.sh("ls /workspace/h/tree; ls / /workspace | grep -c escaped || true"), "empty\n0\n");
    let cut = warren_with(Some(&file("tree.tar")), None, &["cp", "-", &format!("{target}/x")]);
    assert!(cut.status.success(), "no directory there: the archive itself is the file");
    assert_eq!(sandbox.sh("head -c 5 /workspace/x"), "tree/");
}

#[test]
fn a_program_in_the_background_is_listed_attached_to_and_signalled() {
    let node = shared::node_with_templates();
    let sandbox = node.sandbox(&[("name", "background")]);
    let script = "trap 'echo asked to end; exit 5' TERM; echo begun; while true; do sleep 0.1; done";
    let started = warren(&node, &["exec", "-d", "background", "--", "sh", "-c", script]);
    let number = stdout(&started).trim().to_string();
    assert!(number.parse::<u64>().is_ok(), "{number} {}", stderr(&started));
    let listed = warren(&node, &["execs", "background"]);
    assert!(stdout(&listed).contains("running") && stdout(&listed).contains("asked to end"), "{}", stdout(&listed));
    qemu_tests::timing::wait_for("its first line", || {
        let attach = sandbox.client().start(sandbox.request("exec.attach").set("exec", &number));
        let mut attach = attach;
        let begun = attach.read_until("stdout", "begun").contains("begun");
        attach.cancel();
        begun.then_some(())
    });
    let signalled = warren(&node, &["signal", "background", &number]);
    assert!(signalled.status.success(), "{}", stderr(&signalled));
    let attached = warren(&node, &["attach", "background", &number]);
    assert_eq!((attached.status.code(), stdout(&attached).as_str()), (Some(5), "begun\nasked to end\n"));
    let missing = warren(&node, &["attach", "background", "999"]);
    assert!(stderr(&missing).contains("NOT_FOUND"), "{}", stderr(&missing));
}

/// A command line that goes on, and its lines of standard output as they come.
struct Follower {
    _process: qemu_tests::process::Process,
    lines: std::sync::mpsc::Receiver<String>,
}

impl Follower {
    fn of(node: &Node, arguments: &[&str]) -> Self {
        let mut command = qemu_tests::templates::command(node, arguments);
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::null());
        let process = qemu_tests::process::Process::spawn(command).expect("warren starts");
        let output = std::io::BufReader::new(process.take_output().expect("a pipe"));
        let (sender, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in std::io::BufRead::lines(output).map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        Self { _process: process, lines }
    }

    /// Reads on to a line with that text.
    fn until(&self, text: &str) {
        let next = || self.lines.recv_timeout(qemu_tests::timing::hang()).unwrap_or_else(|e| panic!("{text:?}: {e}"));
        while !next().contains(text) {}
    }
}

#[test]
fn console_output_events_and_use_are_followed_and_who_stops_reading_is_told_what_it_lost() {
    let node = shared::node_with_templates();
    let sandbox = node.sandbox(&[("name", "followed")]);
    let root = |script: &str| sandbox.client().ok(sandbox.exec_request(&["sh", "-c", script]).set("user", 0));
    let console = Follower::of(&node, &["logs", "-f", "followed"]);
    let events = Follower::of(&node, &["events", "-f"]);
    let top = Follower::of(&node, &["top", "-f=1s", "followed"]);
    top.until("CPU TIME");
    root("echo said on the console > /dev/console");
    console.until("said on the console");
    qemu_tests::timing::wait_for("its last line", || {
        let said = stdout(&warren(&node, &["logs", "-n", "1", "followed"]));
        (said.lines().count() == 1 && said.contains("said on the console")).then_some(())
    });
    events.until("exec.ended");
    top.until("CPU TIME");

    let script = "while [ ! -e /workspace/begin ]; do sleep 0.05; done; head -c 4000000 /dev/zero; echo; echo end";
    let started = warren(&node, &["exec", "-d", "followed", "--", "sh", "-c", script]);
    let number = stdout(&started).trim().to_string();
    let mut attach = qemu_tests::templates::command(&node, &["attach", "followed", &number]);
    attach.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let attach = attach.spawn().expect("warren starts");
    qemu_tests::timing::wait_for("the attach", || {
        let rows = sandbox.client().ok(sandbox.request("sandbox.inspect"));
        (rows.field("executing") == "true").then_some(())
    });
    sandbox.sh("touch /workspace/begin");
    // Nobody reads what the attach prints; the program ends all the same.
    events.until("exec.ended");
    events.until("exec.ended");
    let output = attach.wait_with_output().expect("it ends");
    let said = stderr(&output);
    let lost = said.lines().filter_map(|line| line.strip_prefix("warning: ")?.split(' ').next()?.parse::<usize>().ok());
    assert_eq!(output.stdout.len() + lost.sum::<usize>(), 4_000_005, "{said}");
    assert!(output.stdout.ends_with(b"\0\nend\n") && said.contains("octets of stdout are lost here"), "{said}");
}
