//! The history of executions: each program and code run has a record, which is written behind what happens and stays when
//! its sandbox goes. Also what else clients have read from the database.

use std::collections::HashMap;
use std::time::Duration;

use super::audit;
use super::requests::Job;
use super::supervisor::{Supervisor, Timer, now_ms};
use crate::control::access::Role;
use crate::sandbox::exec::{Exec, OUTPUTS, Sink, Source, shell_line};
use crate::sandbox::id::SandboxId;
use crate::sandbox::trace::Trace;
use crate::storage::history::{HistoryQuery, MESSAGE_CHARS, Note, Record, RecordQuery, RecordRow};
use crate::storage::state::{Change, Query, Reading, StateError, Ticket};
use crate::wire::{Code, Error, FRAME, Fields, Message};

/// How often records that are too old are looked for.
const PERIOD: Duration = Duration::from_secs(60);
/// How often records that are too many are taken away, in records.
const SWEEP: u64 = 256;
/// Changes that wait for the medium above which no source is kept: sources are what takes memory.
const BEHIND: usize = 1024;

/// Records of executions that have not ended, by sandbox and number.
pub(super) type OpenRecords = HashMap<(String, u64), u64>;

impl Supervisor {
    /// Octets of a source that are kept.
    pub(super) fn source_limit(&self) -> usize {
        let history = &self.config.history;
        let kib = if history.keep_source { history.source_kib } else { 0 };
        usize::try_from(kib * 1024).unwrap_or(0)
    }

    /// Writes what is known of an execution into its record, which it gets here the first time.
    pub(super) fn record_history(&mut self, id: &SandboxId, number: u64) {
        let keeps_command = self.config.history.keep_source;
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let Some(exec) = sandbox.execs.get_mut(&number) else { return };
        let is_new = exec.record.is_none();
        let record = match exec.record {
            Some(record) => record,
            // What had ended when its record was written has it already.
            None if exec.outcome.is_some() => return,
            None => {
                self.next_record += 1;
                *exec.record.insert(self.next_record - 1)
            }
        };
        if exec.outcome.is_some() {
            exec.ended_ms.get_or_insert_with(now_ms);
        }
        let row = row_of(record, id, &sandbox.owner, exec, keeps_command);
        let ended = row.ended_ms.is_some();
        let detail = match (&row.code, row.exit) {
            _ if !ended => row.command.clone(),
            (Some(code), _) => code.clone(),
            (None, exit) => format!("exit {}", exit.unwrap_or(0)),
        };
        let files = OUTPUTS.map(|channel| sandbox.home.output(number, channel));
        self.database.submit(Change::History(Note::Put(Box::new(row))));
        if ended || is_new {
            self.tell(if ended { "exec.ended" } else { "exec.started" }, id, Some(number), &detail);
        }
        if !ended {
            if record.is_multiple_of(SWEEP) {
                self.sweep_history();
            }
            return;
        }
        self.keep_source(id, number);
        let limit = self.config.history.output_kib * 1024;
        self.database.submit(Change::History(Note::Outputs { id: record, files, limit }));
    }

    /// A client has sent all of a run's source.
    pub(super) fn source_ended(&mut self, key: u64, tag: &str, channel: &str) {
        let Some(Job::Exec { sandbox, number }) = self.clients.get(&key).and_then(|client| client.jobs.get(tag)) else {
            return;
        };
        let (sandbox, number) = (sandbox.clone(), *number);
        if channel == "source" {
            self.keep_source(&sandbox, number);
            let exec = self.sandboxes.get_mut(&sandbox).and_then(|sandbox| sandbox.execs.get_mut(&number));
            if let Some(exec) = exec.filter(|exec| exec.detaches) {
                exec.detaches = false;
                exec.viewers.retain(|viewer| viewer.client != key || viewer.tag != tag);
                self.finish(key, &Message::ok(tag, Fields::new().with("exec", number)));
            }
        }
    }

    fn keep_source(&mut self, id: &SandboxId, number: u64) {
        let Some(exec) = self.sandboxes.get_mut(id).and_then(|sandbox| sandbox.execs.get_mut(&number)) else { return };
        let Source { octets, size, .. } = std::mem::take(&mut exec.source);
        if let Some(id) = exec.record.filter(|_| size > 0 && self.database.pending() < BEHIND) {
            self.database.submit(Change::History(Note::Source { id, octets, size }));
        }
    }

    /// After a start: records of executions that have ended are ended, also where nobody saw how.
    pub(super) fn end_records(&mut self, lost: OpenRecords) {
        let ended = self.sandboxes.iter().flat_map(|(id, sandbox)| {
            let ended = sandbox.execs.values().filter(|exec| exec.outcome.is_some() && exec.record.is_some());
            ended.map(|exec| (id.clone(), exec.number))
        });
        for (id, number) in ended.collect::<Vec<_>>() {
            self.record_exec(&id, number);
        }
        for id in lost.into_values() {
            let message = "the supervisor ended meanwhile, and its sandbox is gone".to_string();
            self.database.submit(Change::History(Note::Lost { id, ended_ms: now_ms(), message }));
        }
    }

    /// Looks for records that are too old.
    pub(super) fn history_due(&mut self) {
        self.timers.after(PERIOD, Timer::History);
        self.sweep_history();
    }

    fn sweep_history(&mut self) {
        let history = &self.config.history;
        let limit = |value: u64| (value > 0).then_some(value);
        let before_ms = limit(history.max_age_s).map(|age| now_ms().saturating_sub(age.saturating_mul(1000)));
        let keep = limit(history.max_count);
        if before_ms.is_some() || keep.is_some() {
            self.database.submit(Change::History(Note::Sweep { before_ms, keep }));
        }
    }

    /// `history.list`
    pub(super) fn ask_history(&mut self, key: u64, tag: &str, query: HistoryQuery) {
        // A sandbox that is gone is known by its id only.
        let sandbox = query.sandbox.map(|given| self.find(key, &given).map_or(given, |id| id.to_string()));
        let owner = match (self.only_owner(key), query.owner) {
            (Some(own), Some(asked)) if own != asked => {
                self.answer(key, &Message::ok(tag, Fields::new()));
                return;
            }
            (own, asked) => own.or(asked),
        };
        self.ask_database(key, tag, Query::History(HistoryQuery { sandbox, owner, ..query }));
    }

    /// `history.inspect`
    pub(super) fn ask_record(&mut self, key: u64, tag: &str, id: u64) {
        let owner = self.only_owner(key);
        self.ask_database(key, tag, Query::Record(RecordQuery { id, owner }));
    }

    /// Whose records alone are there for a client; `None` for an admin.
    pub(super) fn only_owner(&self, key: u64) -> Option<String> {
        let identity = self.clients.get(&key).map(|client| client.identity());
        let identity = identity.filter(|identity| identity.role < Role::Admin);
        identity.map(|identity| identity.owner.clone())
    }

    /// Begins to read something from the database for a client.
    pub(super) fn ask_database(&mut self, key: u64, tag: &str, query: Query) {
        let ticket = self.database.read(query);
        self.add_job(key, tag, Job::Reading(ticket));
    }

    /// What was read goes to whoever asked.
    pub(super) fn database_read(&mut self, ticket: Ticket, result: Result<Reading, StateError>) {
        let asked = self.clients.iter().find_map(|(key, client)| {
            let job = client.jobs.iter().find(|(_, job)| matches!(job, Job::Reading(asked) if *asked == ticket));
            job.map(|(tag, _)| (*key, tag.clone()))
        });
        let Some((key, tag)) = asked else { return };
        let Some(client) = self.clients.get_mut(&key) else { return };
        let answer = match result {
            Ok(Reading::Audit(rows)) => {
                rows.iter().for_each(|row| client.send(&Message::item(&tag, audit::fields(row))));
                Ok(Fields::new())
            }
            Ok(Reading::History(rows)) => {
                rows.iter().for_each(|row| client.send(&Message::item(&tag, fields(row))));
                Ok(Fields::new())
            }
            Ok(Reading::Record(Some(record))) => Ok(say(client, &tag, &record)),
            Ok(Reading::Record(None)) => Err(Error::new(Code::NotFound, "no such record in the history")),
            Err(e) => Err(Error::new(Code::Internal, e.to_string())),
        };
        self.finish(
            key,
            &match answer {
                Ok(fields) => Message::ok(&tag, fields),
                Err(error) => Message::err(&tag, error),
            },
        );
    }
}

/// Says what is kept of an execution; gives its row. Each part is within the credit that every channel has at first.
fn say(client: &mut dyn Sink, tag: &str, record: &Record) -> Fields {
    for (channel, kept) in [("source", &record.source), ("stdout", &record.stdout), ("stderr", &record.stderr)] {
        let Some(octets) = kept else { continue };
        octets.chunks(FRAME).for_each(|chunk| client.send(&Message::data(tag, channel, chunk)));
        client.send(&Message::end(tag, channel));
    }
    for artifact in &record.artifacts {
        let fields = Fields::new().with("artifact", &artifact.path).with("size", artifact.size);
        client.send(&Message::item(tag, fields.with("sha256", &artifact.sha256)));
    }
    Trace::parse(&record.row.trace).rows().for_each(|span| client.send(&Message::item(tag, span)));
    fields(&record.row)
}

/// An execution as its record has it.
fn row_of(record: u64, id: &SandboxId, owner: &str, exec: &Exec, keeps_command: bool) -> RecordRow {
    let (fields, error) = match &exec.outcome {
        None => (None, None),
        Some(Ok(fields)) => (Some(fields), None),
        Some(Err(error)) => (Some(&error.fields), Some(error)),
    };
    let number = |key: &str| fields.and_then(|fields| fields.number(key));
    let narrow = |key: &str| number(key).and_then(|n| i32::try_from(n).ok());
    let timed_out = fields.and_then(|fields| fields.get("timeout")) == Some("true");
    let state = match &exec.outcome {
        None if exec.code.as_ref().is_some_and(|run| !run.running) => "pending",
        None => "running",
        Some(Ok(fields)) if fields.get("exit") == Some("0") => "completed",
        Some(_) => "failed",
    };
    let command = if keeps_command { &exec.argv[..] } else { exec.argv.get(..1).unwrap_or_default() };
    RecordRow {
        id: record,
        sandbox: id.to_string(),
        exec: exec.number,
        owner: owner.to_string(),
        is_code: exec.code.is_some(),
        language: exec.code.as_ref().map(|run| run.language.clone()).filter(|language| !language.is_empty()),
        context: exec.code.as_ref().and_then(|run| run.context),
        command: match exec.code {
            Some(_) => String::new(),
            None => String::from_utf8_lossy(&shell_line(command)).into_owned(),
        },
        state: state.to_string(),
        started_ms: exec.started_ms,
        ended_ms: exec.ended_ms,
        exit: narrow("exit"),
        signal: narrow("signal"),
        code: error.map(|error| error.code.clone()).or(timed_out.then(|| Code::Timeout.as_str().to_string())),
        message: error.map(|error| error.message.chars().take(MESSAGE_CHARS).collect()),
        cpu_ms: number("cpu_ms"),
        peak_kib: number("peak_kib"),
        trace: if exec.outcome.is_some() { exec.trace.text() } else { String::new() },
        ..RecordRow::default()
    }
}

/// A record as clients see it.
fn fields(row: &RecordRow) -> Fields {
    let fields = Fields::new()
        .with("record", row.id)
        .with("sandbox", &row.sandbox)
        .with("exec", row.exec)
        .with("owner", &row.owner)
        .with("kind", if row.is_code { "code" } else { "exec" });
    let texts = |fields: Fields, texts: &[(&str, Option<&String>)]| {
        texts.iter().fold(fields, |fields, (key, text)| match text {
            Some(text) => fields.with(key, text),
            None => fields,
        })
    };
    let numbers = |fields: Fields, numbers: &[(&str, Option<u64>)]| {
        numbers.iter().fold(fields, |fields, (key, number)| match number {
            Some(number) => fields.with(key, number),
            None => fields,
        })
    };
    let fields = texts(fields, &[("language", row.language.as_ref())]);
    let fields = numbers(fields, &[("context", row.context)]);
    let fields = texts(fields, &[("command", Some(&row.command).filter(|command| !command.is_empty()))]);
    let fields = fields.with("state", &row.state).with("started_ms", row.started_ms);
    let narrow = |number: Option<i32>| number.and_then(|number| u64::try_from(number).ok());
    let fields =
        numbers(fields, &[("ended_ms", row.ended_ms), ("exit", narrow(row.exit)), ("signal", narrow(row.signal))]);
    let fields = texts(fields, &[("code", row.code.as_ref()), ("message", row.message.as_ref())]);
    numbers(
        fields,
        &[
            ("cpu_ms", row.cpu_ms),
            ("peak_kib", row.peak_kib),
            ("source_bytes", row.source_bytes),
            ("stdout_bytes", row.stdout_bytes),
            ("stderr_bytes", row.stderr_bytes),
        ],
    )
}
