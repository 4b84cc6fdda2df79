//! One running plugin program and what is under way on it, in either form.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use super::process::{ErrorLines, Process};
use crate::sentinel::plugin::{Form, Format, Manifest};
use crate::sentinel::schedule::RunId;
use crate::wire::{Decoded, Decoder, Fields, Message, Request};

/// Lines that are no messages before a plugin is ended.
const MOST_BAD: u32 = 100;

/// What a request of the native form asks.
#[derive(Debug, Clone, PartialEq)]
pub enum Asked {
    /// Who are you?
    Hello,
    /// Which fields do you know?
    Schema,
    /// Are these values good? Then collect.
    Validate(RunId),
    /// Can the device be reached? Then collect.
    Test(RunId),
    /// Measure.
    Collect(RunId),
    /// A run that was cancelled: its answer means nothing, but must come.
    Cancelled,
    /// End.
    Close,
}

/// What an instance tells its service.
#[derive(Debug)]
pub enum Event {
    /// The handshake is done.
    Greeted,
    /// The values are good, or the device was reached: go on with the run.
    GoOn(RunId, Asked),
    /// A run has ended, with an error or with what was said.
    Done(RunId, Result<(), String>),
    /// It must be ended, and why.
    Fatal(String),
}

/// What was said in one run.
#[derive(Debug, Default)]
pub struct Said {
    /// Items of the native form.
    pub items: Vec<Fields>,
    /// Frames of the native form by channel, and the lines of the execd form.
    pub bodies: HashMap<String, Vec<u8>>,
    /// When the execd form last wrote.
    pub last: Option<Instant>,
}

/// A running program.
pub struct Instance {
    /// Of which plugin.
    pub plugin: String,
    /// As it was when the program was started.
    pub manifest: Arc<Manifest>,
    /// The program.
    pub process: Process,
    /// Its standard error.
    pub errors: ErrorLines,
    /// Execd form: the one task that it serves.
    pub task: Option<String>,
    /// The handshake is done (execd has none).
    pub ready: bool,
    /// The handshake must be done by then.
    pub start_deadline: Instant,
    /// Runs that wait for the handshake.
    pub queue: Vec<RunId>,
    /// Tasks whose values the program found good.
    pub validated: HashSet<String>,
    /// What the runs under way have said.
    pub said: HashMap<RunId, Said>,
    /// It takes no more runs and is closed when those under way have ended.
    pub retired: bool,
    /// A cancelled run must have been answered by then.
    pub owing: Option<Instant>,
    /// Since then a pipe may have more than was read at one go.
    pub more: Option<Instant>,
    /// When it was started.
    pub started: Instant,
    /// Since then its output is at its end, or it was killed.
    pub ending: Option<(Instant, String)>,
    decoder: Decoder,
    asked: HashMap<String, Asked>,
    schema: Vec<(String, String)>,
    next_tag: u64,
    bad: u32,
}

impl Instance {
    /// A program that was just started.
    pub fn new(
        plugin: &str,
        manifest: Arc<Manifest>,
        process: Process,
        task: Option<String>,
        deadline: Instant,
    ) -> Self {
        let ready = form(&manifest) == Form::Execd;
        Self {
            plugin: plugin.to_string(),
            manifest,
            process,
            errors: ErrorLines::default(),
            task,
            ready,
            start_deadline: deadline,
            queue: Vec::new(),
            validated: HashSet::new(),
            said: HashMap::new(),
            retired: false,
            owing: None,
            more: None,
            started: Instant::now(),
            ending: None,
            decoder: Decoder::new(),
            asked: HashMap::new(),
            schema: Vec::new(),
            next_tag: 0,
            bad: 0,
        }
    }

    /// Sends a request of the native form.
    pub fn ask(&mut self, asked: Asked, arguments: &[(String, String)]) -> Result<(), String> {
        self.next_tag += 1;
        let tag = self.next_tag.to_string();
        let verb = match &asked {
            Asked::Hello => "hello",
            Asked::Schema => "schema",
            Asked::Validate(_) => "validate",
            Asked::Test(_) => "test",
            Asked::Collect(_) | Asked::Cancelled => "collect",
            Asked::Close => "close",
        };
        let mut request = Request::new(&tag, verb);
        for (key, value) in arguments {
            request = request.set(key, value);
        }
        let mut octets = Vec::new();
        Message::Request(request).encode(&mut octets);
        if octets.len() > crate::wire::MAX_LINE {
            return Err(format!("the task's values make a line of more than {} octets", crate::wire::MAX_LINE));
        }
        self.asked.insert(tag, asked);
        self.process.send(&octets)
    }

    /// Takes a run back: tells the program, and waits for its answer. `None` where there was nothing to take back.
    pub fn cancel(&mut self, run: RunId) -> Option<Result<(), String>> {
        self.queue.retain(|queued| *queued != run);
        self.said.remove(&run);
        let of_run =
            |asked: &Asked| matches!(asked, Asked::Validate(r) | Asked::Test(r) | Asked::Collect(r) if *r == run);
        let (tag, asked) = self.asked.iter_mut().find(|(_, asked)| of_run(asked))?;
        *asked = Asked::Cancelled;
        let octets = Message::Cancel { tag: tag.clone() }.to_bytes();
        Some(self.process.send(&octets))
    }

    /// Whether the answer to a cancelled run has not come yet.
    pub fn owes(&self) -> bool {
        self.asked.values().any(|asked| *asked == Asked::Cancelled)
    }

    /// Takes what was written to standard output.
    pub fn heard(&mut self, octets: &[u8], now: Instant) -> Vec<Event> {
        match form(&self.manifest) {
            Form::Native => self.messages(octets),
            Form::Execd => self.lines(octets, now),
        }
    }

    fn lines(&mut self, octets: &[u8], now: Instant) -> Vec<Event> {
        let openmetrics = self.manifest.program.as_ref().is_some_and(|program| program.format == Format::Openmetrics);
        // What is said outside of a run belongs to none: it is left out.
        let Some((run, said)) = self.said.iter_mut().next() else { return Vec::new() };
        said.last = Some(now);
        let body = said.bodies.entry(String::new()).or_default();
        body.extend_from_slice(octets);
        let ended = openmetrics && (body.ends_with(b"\n# EOF\n") || body == b"# EOF\n");
        if ended { vec![Event::Done(*run, Ok(()))] } else { Vec::new() }
    }

    fn messages(&mut self, octets: &[u8]) -> Vec<Event> {
        let mut events = Vec::new();
        // In parts, so that the decoder never holds more than a line or a frame and one part.
        for part in octets.chunks(crate::wire::FRAME) {
            self.decoder.push(part);
            while let Some(decoded) = self.decoder.next() {
                match decoded {
                    Decoded::Message(message) => self.message(message, &mut events),
                    Decoded::Bad { error, .. } => self.odd(&error.message, &mut events),
                }
                if matches!(events.last(), Some(Event::Fatal(_))) {
                    return events;
                }
            }
        }
        events
    }

    fn odd(&mut self, what: &str, events: &mut Vec<Event>) {
        self.bad += 1;
        let what: String = what.chars().take(200).collect();
        if self.bad == 1 {
            log::warn!("plugin {}: says what is no message: {what}", self.plugin);
        }
        if self.bad > MOST_BAD {
            events.push(Event::Fatal(format!("the plugin says what is no message: {what}")));
        }
    }

    fn message(&mut self, message: Message, events: &mut Vec<Event>) {
        let tag = message.tag().to_string();
        let Some(asked) = self.asked.get(&tag).cloned() else {
            return self.odd("an answer to nothing", events);
        };
        match (asked, message) {
            (Asked::Schema, Message::Item { fields, .. }) => {
                if let (Some(section), Some(name)) = (fields.get("section"), fields.get("name"))
                    && self.schema.len() < 1024
                {
                    self.schema.push((section.to_string(), name.to_string()));
                }
            }
            (Asked::Collect(run), Message::Item { fields, .. }) => {
                self.said.entry(run).or_default().items.push(fields);
            }
            (Asked::Collect(run), Message::Data { channel, payload, .. }) => {
                let body = self.said.entry(run).or_default().bodies.entry(channel).or_default();
                body.extend_from_slice(&payload);
            }
            (asked, Message::Ok { fields, .. }) => {
                self.asked.remove(&tag);
                self.granted(asked, &fields, events);
            }
            (asked, Message::Err { error, .. }) => {
                self.asked.remove(&tag);
                let said: String = error.to_string().chars().take(500).collect();
                match asked {
                    Asked::Hello => events.push(Event::Fatal(format!("the plugin refuses the handshake: {said}"))),
                    Asked::Schema if error.code == "UNKNOWN_VERB" => self.greeted(events),
                    Asked::Schema => events.push(Event::Fatal(format!("the plugin gives no schema: {said}"))),
                    // A plugin without a check or a test of its own has only those of the manifest.
                    Asked::Validate(run) if error.code == "UNKNOWN_VERB" => {
                        events.push(Event::GoOn(run, Asked::Validate(run)));
                    }
                    Asked::Test(run) if error.code == "UNKNOWN_VERB" => events.push(Event::GoOn(run, Asked::Test(run))),
                    Asked::Validate(run) | Asked::Test(run) | Asked::Collect(run) => {
                        events.push(Event::Done(run, Err(said)));
                    }
                    Asked::Cancelled | Asked::Close => {}
                }
            }
            (_, Message::End { .. } | Message::Credit { .. } | Message::Item { .. } | Message::Data { .. }) => {}
            (_, Message::Request(_) | Message::Cancel { .. }) => self.odd("a request", events),
        }
    }

    fn granted(&mut self, asked: Asked, fields: &Fields, events: &mut Vec<Event>) {
        match asked {
            Asked::Hello => {
                if fields.get("name") != Some(self.manifest.name.as_str()) {
                    let said = fields.get("name").unwrap_or("nothing").chars().take(80).collect::<String>();
                    return events.push(Event::Fatal(format!("the plugin says that it is {said:?}")));
                }
                if fields.number("protocol") != Some(crate::wire::PROTOCOL_VERSION) {
                    return events.push(Event::Fatal("the plugin speaks another version of the protocol".into()));
                }
                if let Err(e) = self.ask(Asked::Schema, &[]) {
                    events.push(Event::Fatal(e));
                }
            }
            Asked::Schema => {
                let known = |section: &str, name: &str| {
                    let schema = if section == "device" { &self.manifest.device } else { &self.manifest.config };
                    schema.0.iter().any(|field| field.name == name)
                };
                if let Some((section, name)) = self.schema.iter().find(|(section, name)| !known(section, name)) {
                    let error =
                        format!("the plugin wants the field {section}.{name}, which its manifest does not have");
                    return events.push(Event::Fatal(error));
                }
                self.greeted(events);
            }
            Asked::Validate(run) => events.push(Event::GoOn(run, Asked::Validate(run))),
            Asked::Test(run) => events.push(Event::GoOn(run, Asked::Test(run))),
            Asked::Collect(run) => events.push(Event::Done(run, Ok(()))),
            Asked::Cancelled | Asked::Close => {}
        }
    }

    fn greeted(&mut self, events: &mut Vec<Event>) {
        self.ready = true;
        events.push(Event::Greeted);
    }

    /// Runs under way or waiting.
    pub fn runs(&self) -> Vec<RunId> {
        let asked = self.asked.values().filter_map(|asked| match asked {
            Asked::Validate(run) | Asked::Test(run) | Asked::Collect(run) => Some(*run),
            _ => None,
        });
        let mut runs: Vec<RunId> = asked.chain(self.queue.iter().copied()).chain(self.said.keys().copied()).collect();
        runs.sort();
        runs.dedup();
        runs
    }
}

/// How a manifest's program is spoken to.
pub fn form(manifest: &Manifest) -> Form {
    manifest.program.as_ref().map_or(Form::Native, |program| program.form)
}
