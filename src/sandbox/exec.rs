//! A program in a sandbox as the node sees it: its output so far, who watches it, how it ended.

use std::io;
use std::time::Instant;

use super::flow::{Gate, QUEUE_HIGH};
use super::home::Home;
use super::stdin::Stdin;
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
    /// Whether the program is this client's: it ends with it.
    pub owner: bool,
    /// Whether it feeds the program's input, as an owner does. One at a time.
    pub feeds: bool,
    greeting: Option<Greeting>,
    seen: [u64; 3],
    credit: [u64; 3],
    ended: [bool; 3],
}

/// What who attaches is told first.
#[derive(Debug, Clone, Copy)]
struct Greeting {
    /// Octets of output that are not kept any more.
    lost: u64,
    /// Where in stdin it begins, if it feeds that and it is known by now.
    start: Option<u64>,
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
    /// Its source, from its owner, where it is a code run.
    pub feed: Gate,
    /// Its stdin, where it is a program.
    pub stdin: Stdin,
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
            feed: Gate::default(),
            stdin: Stdin::unknown(),
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

    /// The channel that is fed.
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
            feeds: owner,
            greeting: None,
            seen,
            credit: [INITIAL_CREDIT; 3],
            // Of a channel that it does not have nobody hears.
            ended: [false, false, channels == PROGRAM_OUTPUTS],
        });
        seen.iter().sum()
    }

    /// Adds a viewer whose program it is not, and which may feed it all the same. `pump` greets it.
    pub fn attach(&mut self, client: u64, tag: &str, feeds: bool) {
        let start = if feeds { self.stdin.begin() } else { None };
        let lost = self.watch(client, tag, false);
        if let Some(viewer) = self.viewers.last_mut() {
            (viewer.feeds, viewer.greeting) = (feeds, Some(Greeting { lost, start }));
        }
    }

    /// Who feeds it.
    pub fn feeder(&self) -> Option<&Viewer> {
        self.viewers.iter().find(|viewer| viewer.feeds)
    }

    /// Whether that request feeds it.
    pub fn is_fed_by(&self, client: u64, tag: &str) -> bool {
        self.feeder().is_some_and(|viewer| viewer.client == client && viewer.tag == tag)
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
        append(output).map_err(|e| {
            Error::of_io(Code::NoCapacity, format!("output of exec {} cannot be kept: {e}", self.number), &e)
        })
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
        self.stdin.close();
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
        if let Some(Greeting { lost, start }) = viewer.greeting {
            let mut fields = Fields::new().with("exec", self.number).with("lost", lost);
            if viewer.feeds {
                match (start.or(self.stdin.said()), &self.outcome) {
                    (Some(start), _) => fields = fields.with("stdin_offset", start),
                    // Its agent is to say.
                    (None, None) => return false,
                    (None, Some(_)) => {
                        sink.send(&Message::err(&viewer.tag, has_ended(self.number)));
                        return true;
                    }
                }
            }
            sink.send(&Message::item(&viewer.tag, fields));
            viewer.greeting = None;
        }
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

    /// Credit to give the agent for an output now: its owner, and who feeds it, is never more than a window behind what may come.
    /// Who only watches is not waited for.
    pub fn grant(&mut self, index: usize) -> Option<u64> {
        let output = &mut self.outputs[index];
        if output.ended {
            return None;
        }
        let seen = self
            .viewers
            .iter()
            .filter(|v| v.owner || v.feeds)
            .map(|v| v.seen[index])
            .min()
            .unwrap_or_else(|| output.total());
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
        self.stdin.away();
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

/// The error of who would feed a program that has ended.
pub fn has_ended(number: u64) -> Error {
    Error::new(Code::BadState, format!("exec {number} has ended: it cannot be fed")).with("exec", number)
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
#[path = "exec_tests.rs"]
mod tests;
