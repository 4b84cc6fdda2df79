//! `warren run --lang`, `warren code`, `warren context`: code and what it came to.

pub(super) mod args;
pub mod result;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use self::args::{CodeArgs, ContextVerb};
use self::result::{Lines, Said, base64};
use super::Failure;
use super::args::{Cli, RunArgs};
use super::client::{Call, Client, Event, INTERRUPTED, LOCAL_IO, local};
use super::exec::{OWN_FAILURE, take_signals};
use super::output::{StatusLine, complain, json_object, print, print_json, printable, table};
use super::run::{id_of, make, remove};
use super::signals::{Signals, exit_code};
use super::values::resolve_env;
use crate::control::code::Memory;
use crate::wire::{Code, Error, FRAME, Fields, Request};

/// What a client keeps of a run's streams for one document, in octets.
const KEPT: usize = 64 * 1024 * 1024;
/// What is read of a source: enough for the node to say that it is too large.
const SOURCE_READ: u64 = 2 * 1024 * 1024;

/// `warren run --lang LANGUAGE FILE`: a sandbox for one run of code, which goes with it.
pub(super) fn run(cli: &Cli, args: &RunArgs, language: &str) -> Result<u8, Failure> {
    let source = read(Path::new(&args.template))?;
    let signals = take_signals().map_err(Failure::Exec)?;
    let mut client = Client::connect(&cli.socket()).map_err(Failure::Exec)?;
    let template = match &args.template_option {
        Some(template) => template.clone(),
        None => smallest(&mut client, language, !args.dependencies.is_empty()).map_err(Failure::Exec)?,
    };
    let interrupt = signals.duplicate().map_err(|e| local(LOCAL_IO, e.to_string())).map_err(Failure::Exec)?;
    client.interrupt_on(Some(interrupt));
    let fields = match make(&mut client, &args.shape, Some(&template)) {
        Ok(fields) => fields,
        Err(error) if error.code == INTERRUPTED => return Ok(signals.next().map_or(OWN_FAILURE, exit_code)),
        Err(error) => return Err(Failure::Exec(error)),
    };
    let id = id_of(&fields).map_err(Failure::Exec)?;
    let mut request = Request::new("", "code.run").arg(&id).set("language", language);
    request = args.dependencies.add_to(request);
    if args.shape.network.network.as_deref() == Some("on") {
        request = request.set("network", "on");
    }
    if args.shape.memory.is_some() {
        // The sandbox is there for it alone.
        request = request.set("memory_mib", Memory::Max);
    }
    if let Some(workdir) = &args.how.workdir {
        request = request.set("cwd", workdir);
    }
    if let Some(user) = &args.how.user {
        request = request.set("user", user);
    }
    if let Some(timeout) = args.how.timeout {
        request = request.set("timeout_ms", timeout.as_millis());
    }
    let session = Session { client: &mut client, signals: &signals, sandbox: &id, context: None };
    let done = session.run(request, &source, args.save.as_deref(), cli.json);
    remove(cli, &id);
    done
}

/// `warren code SANDBOX`: a run in a sandbox that is there.
pub(super) fn code(cli: &Cli, args: &CodeArgs) -> Result<u8, Failure> {
    let source = read(&args.file)?;
    let signals = take_signals().map_err(Failure::Exec)?;
    let mut client = Client::connect(&cli.socket()).map_err(Failure::Exec)?;
    let interrupt = signals.duplicate().map_err(|e| local(LOCAL_IO, e.to_string())).map_err(Failure::Exec)?;
    client.interrupt_on(Some(interrupt));
    let mut request = Request::new("", "code.run").arg(&args.id);
    if let Some(language) = &args.lang {
        request = args.bounds.add_to(request.set("language", language));
    }
    if let Some(context) = args.context {
        request = request.set("context", context);
    }
    if let Some(timeout) = args.timeout {
        request = request.set("timeout_ms", timeout.as_millis());
    }
    for entry in resolve_env(&args.env) {
        request = request.set_bytes("env", &entry);
    }
    if args.detach {
        request = request.set("detach", true);
    }
    let session = Session { client: &mut client, signals: &signals, sandbox: &args.id, context: args.context };
    session.run(request, &source, args.save.as_deref(), cli.json)
}

/// `warren context`
pub(super) fn context(client: &mut Client, verb: &ContextVerb, as_json: bool) -> Result<u8, Failure> {
    let about = |name: &str, id: &str, context: u64| Request::new("", name).arg(id).set("context", context);
    let request = match verb {
        ContextVerb::Create { id, lang, bounds, env } => {
            let request = bounds.add_to(Request::new("", "code.context.create").arg(id).set("language", lang));
            let request = resolve_env(env).iter().fold(request, |request, entry| request.set_bytes("env", entry));
            let fields = client.call(request)?.fields;
            if as_json {
                print_json(&json_object(&fields))?;
            } else {
                print(format!("{}\n", fields.get("context").unwrap_or_default()))?;
            }
            return Ok(0);
        }
        ContextVerb::Ls { id } => {
            let rows = client.call(Request::new("", "code.context.list").arg(id))?.items;
            if as_json {
                print_json(&Value::Array(rows.iter().map(json_object).collect()))?;
                return Ok(0);
            }
            let columns = ["context", "language", "state", "runs", "memory_mib", "network", "reason"];
            let cell = |row: &Fields, key: &str| printable(row.get(key).unwrap_or("-"));
            let rows: Vec<Vec<String>> =
                rows.iter().map(|row| columns.iter().map(|key| cell(row, key)).collect()).collect();
            print(table(&["CONTEXT", "LANGUAGE", "STATE", "RUNS", "MIB", "NETWORK", "REASON"], &rows))?;
            return Ok(0);
        }
        ContextVerb::Interrupt { id, context } => about("code.context.interrupt", id, *context),
        ContextVerb::Restart { id, context } => about("code.context.restart", id, *context),
        ContextVerb::Rm { id, context } => about("code.context.delete", id, *context),
    };
    let fields = client.call(request)?.fields;
    if as_json {
        print_json(&json_object(&fields))?;
    }
    Ok(0)
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    let mut source = Vec::new();
    let result = if path.as_os_str() == "-" {
        io::stdin().lock().take(SOURCE_READ).read_to_end(&mut source)
    } else {
        File::open(path).and_then(|file| file.take(SOURCE_READ).read_to_end(&mut source))
    };
    let failed = |e: io::Error| Failure::Exec(local(LOCAL_IO, format!("{}: {e}", path.display())));
    result.map(|_| source).map_err(failed)
}

/// The template with the smallest image that has a language, and can install packages of it where it has to.
fn smallest(client: &mut Client, language: &str, installs: bool) -> Result<String, Error> {
    let rows = client.call(Request::new("", "template.list"))?.items;
    let says = |row: &&Fields, said: &str| row.0.iter().any(|(key, v)| key == said && v == language.as_bytes());
    let of = |said: &str| {
        let fit = rows.iter().filter(|row| says(row, said));
        fit.min_by_key(|row| row.number("size_bytes")).and_then(|row| row.get("name")).map(str::to_string)
    };
    let none = |code: Code, what: String| Error::new(code, what).with("language", language);
    match of("language") {
        None => Err(none(Code::NotFound, format!("no template of this node has the language {language}"))),
        Some(_) if installs => of("installs").ok_or_else(|| {
            none(Code::NoInstaller, format!("no template of this node says how packages of {language} are installed"))
        }),
        Some(name) => Ok(name),
    }
}

/// One run and who watches it.
struct Session<'a> {
    client: &'a mut Client,
    signals: &'a Signals,
    sandbox: &'a str,
    context: Option<u64>,
}

impl Session<'_> {
    fn run(mut self, request: Request, source: &[u8], save: Option<&Path>, as_json: bool) -> Result<u8, Failure> {
        let call = self.client.start(request).map_err(Failure::Exec)?;
        let (mut lines, mut sent) = (Lines::default(), 0);
        let mut shown = Shown { save: save.map(Path::to_path_buf), ..Shown::default() };
        let mut document = as_json.then(Document::default);
        let (mut interrupted, mut status) = (None, StatusLine::new());
        let result = loop {
            sent += self.feed(&call, source, sent);
            let event = match self.client.next(&call, None) {
                Ok(event) => event,
                Err(error) if error.code == INTERRUPTED => {
                    interrupted = self.signals.next().map(exit_code).or(interrupted);
                    self.interrupt(&call);
                    continue;
                }
                Err(error) => return Err(Failure::Exec(error)),
            };
            match event {
                Event::Data { channel, payload } => {
                    match (channel.as_str(), &mut document) {
                        ("result", None) => {
                            let mut failed = None;
                            lines.take(&payload, |said| failed = shown.show(&said).err().or(failed.take()));
                            if let Some(e) = failed {
                                return Err(Failure::Output(e));
                            }
                        }
                        ("result", Some(document)) => lines.take(&payload, |said| document.add(said)),
                        (_, Some(document)) => document.keep(&channel, &payload),
                        ("stderr", None) => io::stderr().write_all(&payload).map_err(Failure::Output)?,
                        (_, None) => print(&payload)?,
                    }
                    self.client.consumed(&call, &channel, payload.len());
                }
                Event::Done(result) => break result,
                Event::Item(fields) if fields.get("state") == Some("installing") => {
                    status.show("packages: installing");
                }
                Event::Item(_) => status.clear(),
                Event::End { .. } => {}
            }
        };
        if let Some(document) = document {
            let document = document.finish(&result);
            print_json(&document)?;
        }
        match result {
            // It runs on.
            Ok(fields) if fields.get("exit").is_none() && !as_json => {
                print(format!("{}\n", fields.get("exec").unwrap_or_default()))?;
                Ok(0)
            }
            Ok(fields) if fields.get("exit").is_none() => Ok(0),
            Ok(fields) => Ok(fields.number("exit").and_then(|code| u8::try_from(code).ok()).unwrap_or(1)),
            Err(_) if interrupted.is_some() => Ok(interrupted.unwrap_or(OWN_FAILURE)),
            Err(error) => Err(Failure::Exec(error)),
        }
    }

    /// Sends what may be sent of the source, and its end; gives how much.
    fn feed(&mut self, call: &Call, source: &[u8], sent: usize) -> usize {
        // One more than there are octets: the end.
        let Some(rest) = source.get(sent..) else { return 0 };
        let mut taken = 0;
        while let Some(piece) = rest.get(taken..).filter(|piece| !piece.is_empty()) {
            let n = self.client.write(call, "source", piece.get(..piece.len().min(FRAME)).unwrap_or_default());
            if n == 0 {
                return taken;
            }
            taken += n;
        }
        self.client.end(call, "source");
        taken + 1
    }

    /// A context goes on after an interrupt; a run of its own ends by it.
    fn interrupt(&mut self, call: &Call) {
        match self.context {
            Some(context) => {
                let request = Request::new("", "code.context.interrupt").arg(self.sandbox).set("context", context);
                if let Ok(call) = self.client.start(request) {
                    self.client.forget(&call);
                }
            }
            None => self.client.cancel(call),
        }
    }
}

/// Shows results as they come, for people.
#[derive(Debug, Default)]
pub(super) struct Shown {
    save: Option<PathBuf>,
    saved: usize,
}

impl Shown {
    pub(super) fn show(&mut self, said: &Said) -> io::Result<()> {
        match said {
            Said::Value { forms } | Said::Display { forms } => {
                if let Some(text) = forms.get("text/plain") {
                    print(format!("{text}\n"))?;
                }
                for (media, content) in forms {
                    self.save(media, content)?;
                }
                Ok(())
            }
            Said::Error { traceback, .. } => io::stderr().write_all(traceback.as_bytes()),
            Said::Artifact { path, size, .. } => {
                complain(&format!("file: {} ({size} bytes)", printable(path)));
                Ok(())
            }
        }
    }

    fn save(&mut self, media: &str, content: &str) -> io::Result<()> {
        let Some(directory) = &self.save else { return Ok(()) };
        let (extension, binary) = match media {
            "text/html" => ("html", false),
            "text/markdown" => ("md", false),
            "image/svg+xml" => ("svg", false),
            "application/json" => ("json", false),
            "image/png" => ("png", true),
            "image/jpeg" => ("jpg", true),
            _ => return Ok(()),
        };
        let octets = if binary { base64(content) } else { Some(content.as_bytes().to_vec()) };
        let Some(octets) = octets else { return Ok(()) };
        self.saved += 1;
        fs::create_dir_all(directory)?;
        let path = directory.join(format!("result-{}.{extension}", self.saved));
        fs::write(&path, octets)?;
        complain(&format!("saved: {}", path.display()));
        Ok(())
    }
}

/// Everything about a run in one document.
#[derive(Default)]
struct Document {
    streams: [Vec<u8>; 2],
    results: Vec<Value>,
    kept: usize,
    cut: bool,
}

impl Document {
    fn room(&mut self, octets: usize) -> bool {
        self.kept = self.kept.saturating_add(octets);
        self.cut |= self.kept > KEPT;
        !self.cut
    }

    fn keep(&mut self, channel: &str, payload: &[u8]) {
        if self.room(payload.len()) {
            let [stdout, stderr] = &mut self.streams;
            if channel == "stderr" { stderr } else { stdout }.extend_from_slice(payload);
        }
    }

    fn add(&mut self, said: Said) {
        let value = match said {
            Said::Value { forms } => json!({ "type": "value", "forms": forms }),
            Said::Display { forms } => json!({ "type": "display", "forms": forms }),
            Said::Error { name, value, traceback } => {
                json!({ "type": "error", "name": name, "value": value, "traceback": traceback })
            }
            Said::Artifact { path, size, sha256 } => {
                json!({ "type": "artifact", "path": path, "size": size, "sha256": sha256 })
            }
        };
        if self.room(value.to_string().len()) {
            self.results.push(value);
        }
    }

    fn finish(self, result: &Result<Fields, Error>) -> Value {
        let [stdout, stderr] = self.streams.map(|octets| String::from_utf8_lossy(&octets).into_owned());
        let mut document = match result {
            Ok(fields) => json_object(fields),
            Err(error) => json!({ "code": error.code, "message": error.message, "fields": json_object(&error.fields) }),
        };
        if let Value::Object(map) = &mut document {
            map.insert("stdout".to_string(), Value::String(stdout));
            map.insert("stderr".to_string(), Value::String(stderr));
            map.insert("results".to_string(), Value::Array(self.results));
            if self.cut {
                map.insert("cut".to_string(), Value::Bool(true));
            }
        }
        document
    }
}
