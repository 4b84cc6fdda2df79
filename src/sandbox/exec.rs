//! A program in a sandbox as the node sees it: its output so far, who watches it, how it ended.

use std::io;
use std::time::Instant;

use super::flow::{Gate, QUEUE_HIGH};
use super::home::Home;
use super::trace::Trace;
use crate::storage::languages::is_language_name;
use crate::storage::ring::Ring;
use crate::wire::{Code, Error, FRAME, Fields, INITIAL_CREDIT, Message};

/// The output channels, in the order of the arrays below.
pub const OUTPUTS: [&str; 3] = ["stdout", "stderr", "result"];
/// Those of a program that is no code run.
const PROGRAM_OUTPUTS: usize = 2;

/// The index of an output channel.
pub fn output_index(channel: &str) -> Option<usize> {
    OUTPUTS.iter().position(|&name| name == channel)
}

/// One output stream of a program.
#[derive(Debug, Default)]
struct Output {
    /// Made with the first octet: most programs write little, many write nothing.
    ring: Option<Ring>,
    /// Octets that the agent may have sent, from the start of the stream.
    granted: u64,
    /// Offset at which this link to the agent began.
    ended: bool,
}

impl Output {
    fn total(&self) -> u64 {
        self.ring.as_ref().map_or(0, Ring::total)
    }

    fn oldest(&self) -> u64 {
        self.ring.as_ref().map_or(0, Ring::oldest)
    }
}

/// A client's request that watches a program: the one that started it, or an attach.
#[derive(Debug)]
pub struct Viewer {
    /// The client's key in the supervisor.
    pub client: u64,
    /// The tag of its request.
    pub tag: String,
    /// Whether the program is this client's: it feeds stdin, and the program ends with it.
    pub owner: bool,
    seen: [u64; 3],
    credit: [u64; 3],
    ended: [bool; 3],
}

/// What a viewer is to be sent; the caller has the client.
pub trait Sink {
    /// Queues a message to the viewer's client.
    fn send(&mut self, message: &Message);
    /// Octets queued toward it.
    fn queued(&self) -> usize;
}

/// What a program is that is a code run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CodeRun {
    /// Its language; empty where its context knows it.
    pub language: String,
    /// The context that it runs in.
    pub context: Option<u64>,
    /// It does not wait for its context or source any more.
    pub running: bool,
}

/// The source of a code run on its way into its record.
#[derive(Debug, Default)]
pub struct Source {
    /// Octets of it that are kept at most; 0 where it is not to be kept.
    pub limit: usize,
    /// The start of it.
    pub octets: Vec<u8>,
    /// How long it is so far.
    pub size: u64,
}

impl Source {
    /// More of it.
    pub fn take(&mut self, octets: &[u8]) {
        if self.limit > 0 {
            self.size += octets.len() as u64;
            let room = self.limit.saturating_sub(self.octets.len()).min(octets.len());
            self.octets.extend_from_slice(&octets[..room]);
        }
    }
}

/// A program in a sandbox.
#[derive(Debug)]
pub struct Exec {
    /// Unique within the sandbox.
    pub number: u64,
    /// As it was started.
    pub argv: Vec<Vec<u8>>,
    /// Unix milliseconds.
    pub started_ms: u64,
    /// The tag of its request on the agent link, while it runs and the link stands.
    pub route: Option<String>,
    /// How it ended.
    pub outcome: Option<Result<Fields, Error>>,
    /// From the owner to the program.
    pub stdin: Gate,
    /// Why its output could not be kept: it is being ended for that, and what still comes is dropped.
    pub unkept: Option<Error>,
    /// Who watches it.
    pub viewers: Vec<Viewer>,
    /// Where it is a code run.
    pub code: Option<CodeRun>,
    /// The number of its record in the history.
    pub record: Option<u64>,
    /// When it ended, in Unix milliseconds.
    pub ended_ms: Option<u64>,
    /// What it runs, until that is in its record.
    pub source: Source,
    /// What it spends its time on.
    pub trace: Trace,
    /// Its owner goes once its source is there, and it runs on.
    pub detaches: bool,
    /// Somebody was told how it ended.
    pub collected: bool,
    /// Its agent has said that it has begun: a code run's on this link.
    begun: bool,
    outputs: [Output; 3],
}

impl Exec {
    /// A program that is about to be started.
    pub fn new(number: u64, argv: Vec<Vec<u8>>, started_ms: u64) -> Self {
        let output = || Output { granted: INITIAL_CREDIT, ..Output::default() };
        Self {
            number,
            argv,
            started_ms,
            route: None,
            outcome: None,
            stdin: Gate::default(),
            unkept: None,
            viewers: Vec::new(),
            code: None,
            record: None,
            ended_ms: None,
            source: Source::default(),
            trace: Trace::since(Instant::now()),
            detaches: false,
            collected: false,
            begun: false,
            outputs: [output(), output(), Output { ended: true, ..output() }],
        }
    }

    /// It is a code run, which has a channel of results. To be said before anybody watches it.
    pub fn is_run(&mut self, code: CodeRun) {
        self.code = Some(code);
        self.outputs[PROGRAM_OUTPUTS].ended = false;
    }

    /// The channel that its owner feeds.
    pub fn input(&self) -> &'static str {
        if self.code.is_some() { "source" } else { "stdin" }
    }

    /// Whether it has this one of the output channels.
    pub fn has(&self, index: usize) -> bool {
        index < self.channels()
    }

    /// The channels that it has.
    fn channels(&self) -> usize {
        if self.code.is_some() { OUTPUTS.len() } else { PROGRAM_OUTPUTS }
    }

    /// Takes up the outputs that an earlier supervisor kept.
    pub fn reopen(&mut self, home: &Home, capacity: u64) {
        let channels = self.channels();
        for (output, channel) in self.outputs.iter_mut().zip(OUTPUTS).take(channels) {
            output.ring = Ring::open(&home.output(self.number, channel), capacity).ok();
            output.granted = output.total() + INITIAL_CREDIT;
        }
    }

    /// Octets kept of each output: where a new link to the agent goes on.
    pub fn offsets(&self) -> [u64; 3] {
        self.outputs.each_ref().map(Output::total)
    }

    /// Adds a viewer that begins at the oldest output that is kept. Gives the octets lost before it.
    pub fn watch(&mut self, client: u64, tag: &str, owner: bool) -> u64 {
        let seen = self.outputs.each_ref().map(Output::oldest);
        let channels = self.channels();
        self.viewers.push(Viewer {
            client,
            tag: tag.to_string(),
            owner,
            seen,
            credit: [INITIAL_CREDIT; 3],
            // Of a channel that it does not have nobody hears.
            ended: [false, false, channels == PROGRAM_OUTPUTS],
        });
        seen.iter().sum()
    }

    /// Takes output from the agent. Fails when the agent broke its credit (`CREDIT_EXCEEDED`) or the ring cannot
    /// be written (`NO_CAPACITY`).
    pub fn take(&mut self, home: &Home, capacity: u64, index: usize, octets: &[u8]) -> Result<(), Error> {
        let output = &mut self.outputs[index];
        let total = output.total();
        if total + octets.len() as u64 > output.granted {
            return Err(Error::new(
                Code::CreditExceeded,
                format!("{}: the agent sent more than allowed", OUTPUTS[index]),
            ));
        }
        let append = |output: &mut Output| -> io::Result<()> {
            if output.ring.is_none() {
                output.ring = Some(Ring::create(&home.output(self.number, OUTPUTS[index]), capacity)?);
            }
            match &mut output.ring {
                Some(ring) => ring.append(octets),
                None => Ok(()),
            }
        };
        append(output)
            .map_err(|e| Error::new(Code::NoCapacity, format!("output of exec {} cannot be kept: {e}", self.number)))
    }

    /// The agent says that an output has ended.
    pub fn end(&mut self, index: usize) {
        self.outputs[index].ended = true;
    }

    /// The program has ended, or its link is gone for good: nothing more will come.
    pub fn finish(&mut self, outcome: Result<Fields, Error>) {
        self.route = None;
        match &outcome {
            Ok(_) => self.trace.close(),
            Err(error) => self.trace.fail(None, error),
        }
        self.outcome = Some(outcome);
        for output in &mut self.outputs {
            output.ended = true;
        }
    }

    /// What its agent says of its beginning, as its owner is to hear it; `None` where that is no news. A program begins once. A
    /// code run waits, then runs: once on each link.
    pub fn begins(&mut self, said: &Fields) -> Option<Fields> {
        let fields = Fields::new().with("exec", self.number);
        let Some(run) = &mut self.code else {
            let pid = said.number("pid")?;
            return (!std::mem::replace(&mut self.begun, true)).then(|| fields.with("pid", pid));
        };
        let running = match said.get("state")? {
            "running" => true,
            "pending" => false,
            _ => return None,
        };
        // Of a run in a context its agent tells it.
        if let Some(language) = said.get("language").filter(|name| run.language.is_empty() && is_language_name(name)) {
            run.language = language.to_string();
        }
        let first = !std::mem::replace(&mut self.begun, true);
        if !first && (run.running || !running) {
            return None;
        }
        run.running = running;
        Some(fields.with("state", if running { "running" } else { "pending" }))
    }

    /// A viewer allows more octets.
    pub fn credit(&mut self, client: u64, tag: &str, index: usize, octets: u64) {
        if let Some(viewer) = self.viewers.iter_mut().find(|v| v.client == client && v.tag == tag) {
            viewer.credit[index] = viewer.credit[index].saturating_add(octets);
        }
    }

    /// Sends a viewer what it may have now. `true` when it has had everything, the outcome included.
    pub fn pump(&mut self, at: usize, sink: &mut dyn Sink) -> bool {
        let (viewers, outputs) = (&mut self.viewers, &self.outputs);
        let viewer = &mut viewers[at];
        for (index, output) in outputs.iter().enumerate() {
            while viewer.seen[index] < output.total() && viewer.credit[index] > 0 && sink.queued() < QUEUE_HIGH {
                // Who only watches holds nobody up, and may be overtaken.
                let lost = output.oldest().saturating_sub(viewer.seen[index]);
                if lost > 0 {
                    viewer.seen[index] += lost;
                    let fields = Fields::new().with("channel", OUTPUTS[index]).with("lost", lost);
                    sink.send(&Message::item(&viewer.tag, fields));
                }
                let length = usize::try_from(viewer.credit[index]).unwrap_or(FRAME).min(FRAME);
                let mut chunk = vec![0u8; length];
                let Some(Ok(n)) = output.ring.as_ref().map(|ring| ring.read_at(viewer.seen[index], &mut chunk)) else {
                    break;
                };
                chunk.truncate(n);
                viewer.seen[index] += n as u64;
                viewer.credit[index] -= n as u64;
                sink.send(&Message::data(&viewer.tag, OUTPUTS[index], chunk));
            }
            if output.ended && viewer.seen[index] >= output.total() && !viewer.ended[index] {
                viewer.ended[index] = true;
                sink.send(&Message::end(&viewer.tag, OUTPUTS[index]));
            }
        }
        let Some(outcome) = self.outcome.as_ref().filter(|_| viewer.ended == [true; 3]) else { return false };
        sink.send(&match outcome {
            Ok(fields) => Message::ok(&viewer.tag, fields.clone()),
            Err(error) => Message::err(&viewer.tag, error.clone()),
        });
        self.collected = true;
        true
    }

    /// Credit to give the agent for an output now: its owner is never more than a window behind what may come. Who watches it
    /// besides is not waited for.
    pub fn grant(&mut self, index: usize) -> Option<u64> {
        let output = &mut self.outputs[index];
        if output.ended {
            return None;
        }
        let seen =
            self.viewers.iter().filter(|v| v.owner).map(|v| v.seen[index]).min().unwrap_or_else(|| output.total());
        let target = seen + INITIAL_CREDIT;
        let more = target.saturating_sub(output.granted);
        if more < INITIAL_CREDIT / 4 {
            return None;
        }
        output.granted = target;
        Some(more)
    }

    /// A fresh link to the agent begins with a fresh window from where the output stands.
    pub fn rejoin(&mut self, route: String) {
        self.route = Some(route);
        self.begun &= self.code.is_none();
        for output in &mut self.outputs {
            output.granted = output.total() + INITIAL_CREDIT;
        }
    }

    /// A code run as a row of `code.list`.
    pub fn code_fields(&self) -> Option<Fields> {
        let code = self.code.as_ref()?;
        let mut fields = Fields::new().with("exec", self.number);
        if !code.language.is_empty() {
            fields = fields.with("language", &code.language);
        }
        if let Some(context) = code.context {
            fields = fields.with("context", context);
        }
        let fields = fields.with("started_ms", self.started_ms);
        Some(match &self.outcome {
            None if code.running => fields.with("state", "running"),
            None => fields.with("state", "pending"),
            Some(Ok(outcome)) => {
                let state = if outcome.get("exit") == Some("0") { "completed" } else { "failed" };
                fields.with("state", state).and(outcome.clone())
            }
            Some(Err(error)) => {
                fields.with("state", "failed").with("code", &error.code).with("message", &error.message)
            }
        })
    }

    /// The program as a row of `exec.list`.
    pub fn fields(&self) -> Fields {
        let fields = Fields::new().with("exec", self.number).with_bytes("argv", &shell_line(&self.argv));
        let fields = fields.with("started_ms", self.started_ms);
        match &self.outcome {
            None => fields.with("state", "running"),
            Some(Ok(outcome)) => {
                let mut fields = fields.with("state", "exited");
                fields.0.extend(outcome.0.iter().cloned());
                fields
            }
            Some(Err(error)) => {
                fields.with("state", "failed").with("code", &error.code).with("message", &error.message)
            }
        }
    }

    /// Deletes the kept outputs.
    pub fn forget(&mut self, home: &Home) {
        for (output, channel) in self.outputs.iter_mut().zip(OUTPUTS) {
            if output.ring.take().is_some() {
                let _ = std::fs::remove_file(home.output(self.number, channel));
            }
        }
    }
}

/// Arguments as one readable line.
pub fn shell_line(argv: &[Vec<u8>]) -> Vec<u8> {
    let mut line = Vec::new();
    for (at, arg) in argv.iter().enumerate() {
        if at > 0 {
            line.push(b' ');
        }
        let plain = !arg.is_empty() && arg.iter().all(|b| b.is_ascii_alphanumeric() || b"-_./:=,+@%".contains(b));
        if plain {
            line.extend_from_slice(arg);
        } else {
            line.push(b'\'');
            for &octet in arg {
                match octet {
                    b'\'' => line.extend_from_slice(b"'\\''"),
                    _ => line.push(octet),
                }
            }
            line.push(b'\'');
        }
    }
    line.truncate(1024);
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::home::Places;
    use crate::sandbox::id::SandboxId;

    struct Reader {
        got: Vec<u8>,
        lost: u64,
        done: Option<Message>,
        queued: usize,
    }

    impl Sink for Reader {
        fn send(&mut self, message: &Message) {
            match message {
                Message::Data { payload, .. } => self.got.extend_from_slice(payload),
                Message::Item { fields, .. } => self.lost += fields.number("lost").unwrap_or(0),
                Message::Ok { .. } | Message::Err { .. } => self.done = Some(message.clone()),
                _ => {}
            }
        }
        fn queued(&self) -> usize {
            self.queued
        }
    }

    #[test]
    fn a_beginning_is_news_once() {
        let pid = |pid: u64| Fields::new().with("exec", 99).with("pid", pid);
        let mut exec = Exec::new(1, vec![b"true".to_vec()], 0);
        assert_eq!(exec.begins(&Fields::new().with("stdout_offset", 0)), None);
        assert_eq!(exec.begins(&pid(7)), Some(Fields::new().with("exec", 1).with("pid", 7)));
        exec.rejoin("2".to_string());
        assert_eq!(exec.begins(&pid(7)), None);

        let state = |state: &str| Fields::new().with("state", state);
        let mut exec = Exec::new(2, Vec::new(), 0);
        exec.is_run(CodeRun { language: String::new(), context: None, running: false });
        let news = |exec: &mut Exec, word: &str| exec.begins(&state(word)).is_some();
        let heard = ["pending", "pending", "sleeping", "running", "pending", "running"].map(|w| news(&mut exec, w));
        assert_eq!(heard, [true, false, false, true, false, false]);
        exec.rejoin("2".to_string());
        assert_eq!(["pending", "running", "pending"].map(|word| news(&mut exec, word)), [true, true, false]);
        assert!(exec.code.is_some_and(|run| run.running));
    }

    fn home(name: &str) -> (std::path::PathBuf, Home) {
        let dir = std::env::temp_dir().join(format!("warren-exec-{name}-{}", std::process::id()));
        let id = SandboxId::random().expect("urandom");
        std::fs::create_dir_all(dir.join(id.as_str()).join("exec")).expect("temp dir");
        let places = Places { disks: dir.clone(), sockets: dir.clone(), cgroups: dir.join("cgroups") };
        (dir, places.of(&id))
    }

    #[test]
    fn a_slow_viewer_holds_the_agent_and_loses_nothing() {
        let (dir, home) = home("slow");
        let mut exec = Exec::new(1, vec![b"yes".to_vec()], 0);
        exec.watch(7, "a", true);
        let mut reader = Reader { got: Vec::new(), lost: 0, done: None, queued: 0 };
        let mut sent = 0u64;
        let mut allowed = INITIAL_CREDIT;
        for round in 0..100u64 {
            while sent < allowed {
                let piece = vec![
                    u8::try_from(round).expect("small");
                    10_000.min(usize::try_from(allowed - sent).expect("fits"))
                ];
                exec.take(&home, 1024 * 1024, 0, &piece).expect("within credit");
                sent += piece.len() as u64;
            }
            exec.pump(0, &mut reader);
            if let Some(more) = exec.grant(0) {
                allowed += more;
            }
            if round % 3 == 0 {
                exec.credit(7, "a", 0, 100_000);
            }
        }
        assert!(
            exec.take(&home, 1024 * 1024, 0, &vec![0; usize::try_from(allowed - sent).expect("fits") + 1]).is_err()
        );
        exec.finish(Ok(Fields::new().with("exit", 0)));
        exec.credit(7, "a", 0, u64::MAX);
        assert!(exec.pump(0, &mut reader));
        assert_eq!(reader.got.len() as u64, sent);
        assert!(matches!(reader.done, Some(Message::Ok { .. })));
        std::fs::remove_dir_all(&dir).expect("clean up");
    }

    #[test]
    fn without_viewers_the_program_runs_on_and_an_attach_is_told_what_it_lost() {
        let (dir, home) = home("lost");
        let capacity = 512 * 1024;
        let mut exec = Exec::new(1, vec![b"yes".to_vec()], 0);
        let mut total = 0u64;
        for _ in 0..100 {
            exec.take(&home, capacity, 0, &[b'y'; 16 * 1024]).expect("granted as it comes");
            total += 16 * 1024;
            exec.grant(0);
        }
        assert_eq!(exec.watch(7, "a", false), total - capacity);
        let mut reader = Reader { got: Vec::new(), lost: 0, done: None, queued: 0 };
        exec.credit(7, "a", 0, u64::MAX);
        assert!(!exec.pump(0, &mut reader));
        assert_eq!(reader.got.len() as u64, capacity);
        exec.forget(&home);
        std::fs::remove_dir_all(&dir).expect("clean up");
    }

    #[test]
    fn a_slow_watcher_holds_nobody_up_and_is_told_what_it_lost_of_which_channel() {
        let (dir, home) = home("watcher");
        let capacity = 512 * 1024;
        let mut exec = Exec::new(1, vec![b"yes".to_vec()], 0);
        exec.watch(7, "slow", false);
        let mut reader = Reader { got: Vec::new(), lost: 0, done: None, queued: 0 };
        exec.take(&home, capacity, 0, &[b'x'; 1000]).expect("within credit");
        exec.credit(7, "slow", 0, 0);
        exec.pump(0, &mut reader);
        assert_eq!(reader.got.len(), 1000);
        let mut total = 1000;
        for _ in 0..100 {
            exec.take(&home, capacity, 0, &[b'y'; 16 * 1024]).expect("granted as it comes");
            total += 16 * 1024;
            exec.grant(0);
        }
        exec.finish(Ok(Fields::new().with("exit", 0)));
        assert!(!exec.collected);
        exec.credit(7, "slow", 0, u64::MAX);
        assert!(exec.pump(0, &mut reader) && exec.collected);
        assert_eq!(reader.lost, total - 1000 - capacity);
        assert_eq!(reader.got.len() as u64, 1000 + capacity);
        exec.forget(&home);
        std::fs::remove_dir_all(&dir).expect("clean up");
    }

    #[test]
    fn argv_is_shown_as_a_shell_would_read_it() {
        let argv = [b"sh".to_vec(), b"-c".to_vec(), b"echo 'a b'".to_vec(), b"".to_vec()];
        assert_eq!(shell_line(&argv), b"sh -c 'echo '\\''a b'\\''' ''");
    }
}
