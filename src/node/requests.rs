//! What clients ask, and what becomes of it.

use std::time::{Duration, Instant};

use mio::Token;

use super::feeding::is_audited;
use super::instance::{Awaited, Route, Sandbox, Waiter, Worker};
use super::supervisor::{Source, Supervisor};
use super::transfer::{CHANNEL, Download, Upload};
use super::turn::{Step, Turn};
use crate::control::access::Role;
use crate::control::client::{ANSWERS_HIGH, Client};
use crate::control::command::{Command, VERBS, Verb};
use crate::sandbox::disk::DiskSpec;
use crate::sandbox::exec::{Sink, output_index};
use crate::sandbox::flow::Gate;
use crate::sandbox::id::SandboxId;
use crate::sandbox::lifecycle::State;
use crate::sandbox::spec::Spec;
use crate::storage::state::Ticket;
use crate::wire::{Code, Decoded, Error, Fields, Message, PROTOCOL_VERSION, Request};

/// A client's request under way.
#[derive(Debug)]
pub enum Job {
    /// It waits for a sandbox to reach something; the sandbox has the rest.
    Wait(SandboxId),
    /// It waits for packages to be in its sandbox.
    Packages {
        /// Which of those that wait.
        ticket: u64,
        /// What its client has sent meanwhile.
        early: super::packages::Early,
    },
    /// It watches a program.
    Exec {
        /// Where.
        sandbox: SandboxId,
        /// Which.
        number: u64,
    },
    /// It passes through to the agent.
    Relay {
        /// Where.
        sandbox: SandboxId,
        /// The tag on the agent link.
        route: String,
        /// Content from the agent.
        down: Gate,
        /// Content to the agent.
        up: Gate,
        /// Items that the client did not take in time, where it need not have all of them.
        lost: Option<u64>,
    },
    /// It reads a serial log.
    Logs(Box<super::logs::Reader>),
    /// It waits for the worker's answer.
    Inquiry {
        /// Where.
        sandbox: SandboxId,
        /// The tag on the worker's control link.
        route: String,
    },
    /// It waits for a change of a sandbox's network, by its ticket.
    NetworkChange(u64),
    /// It waits for the node to stop.
    NodeStop,
    /// It waits for a copy of the database.
    Backup,
    /// It sends a database.
    Restore {
        /// What it has sent.
        upload: Upload,
        /// Also where the database does not know sandboxes that are there.
        force: bool,
    },
    /// It gets an exported snapshot.
    Export(Download),
    /// It sends an exported snapshot, or has sent it.
    Import(Upload),
    /// It waits for a sandbox that has started already.
    Warm,
    /// It waits for a snapshot to be there, or gone.
    Snapshot,
    /// It has a template built; the builder that it began with.
    Build(SandboxId),
    /// It waits for the sandboxes of a fork.
    Fork {
        /// How many are still to come.
        left: u64,
        /// Why the first of those failed that did.
        failed: Option<Error>,
    },
    /// It waits for the ledger to be compared with the kernel.
    Ledger,
    /// It waits for the node to be drained.
    Drain,
    /// It watches what happens.
    Events(Box<super::events::EventReader>),
    /// It waits for something that is read from the database.
    Reading(Ticket),
}

impl Supervisor {
    pub(super) fn read_client(&mut self, key: u64, token: Token) {
        if let Some(port) = self.clients.get_mut(&key).and_then(Client::as_port) {
            match port.look() {
                Ok(Some(false)) => self.cancel_jobs(key),
                Ok(_) => {}
                Err(e) => log::error!("control port: {e}"),
            }
            self.touched_clients.insert(key);
        }
        let mut turn = Turn::new();
        loop {
            let Some(client) = self.clients.get_mut(&key) else { return };
            if client.queued() >= ANSWERS_HIGH {
                // It must take its answers first; `settle` comes back here.
                return;
            }
            match turn.step(client, Client::next, Client::fill) {
                Step::Heard(Decoded::Message(message)) => self.take_message(key, message),
                Step::Heard(Decoded::Bad { tag, error }) => self.answer_aside(key, &Message::err(&tag, error)),
                Step::Over => {
                    self.again.insert(token);
                    return;
                }
                Step::Drained => return,
                Step::Closed => {
                    client.half_closed = true;
                    self.let_go_of_stdins(key);
                    self.touched_clients.insert(key);
                    return;
                }
                Step::Failed(_) => {
                    self.drop_client(key);
                    return;
                }
            }
        }
    }

    /// Sends a message to a client, if it is still there.
    pub(super) fn answer(&mut self, key: u64, message: &Message) {
        if let Some(client) = self.clients.get_mut(&key) {
            client.send(message);
            self.touched_clients.insert(key);
        }
    }

    /// Sends a client what is no answer to a request that was taken.
    fn answer_aside(&mut self, key: u64, message: &Message) {
        if let Some(client) = self.clients.get_mut(&key) {
            client.send_aside(message);
            self.touched_clients.insert(key);
        }
    }

    /// Ends a client's request with its final answer.
    pub(super) fn finish(&mut self, key: u64, message: &Message) {
        if let Some(client) = self.clients.get_mut(&key) {
            client.finish(message);
            self.touched_clients.insert(key);
        }
    }

    pub(super) fn drop_client(&mut self, key: u64) {
        self.cancel_jobs(key);
        self.audit_gone(key);
        if let Some(token) = self.client_tokens.remove(&key) {
            self.unwatch(token);
        }
        if self.clients.remove(&key).is_some_and(|mut client| client.as_port().is_some()) {
            self.reopen_port();
        }
        // Nobody takes those answers any more: their agents need not wait.
        self.release_held(key);
    }

    /// Ends what a client's request has begun, without an answer. Whether there was any.
    pub(super) fn cancel(&mut self, key: u64, tag: &str) -> bool {
        let job = self.clients.get_mut(&key).and_then(|client| client.jobs.remove(tag));
        let found = job.is_some();
        job.into_iter().for_each(|job| self.cancel_job(key, tag, job));
        found
    }

    fn cancel_jobs(&mut self, key: u64) {
        let Some(client) = self.clients.get_mut(&key) else { return };
        let jobs = std::mem::take(&mut client.jobs);
        for (tag, job) in jobs {
            self.cancel_job(key, &tag, job);
        }
    }

    fn take_message(&mut self, key: u64, message: Message) {
        match message {
            Message::Request(request) => self.take_request(key, request),
            Message::Cancel { tag } => {
                if self.cancel(key, &tag) {
                    let error = Error::new(Code::Cancelled, "the request was cancelled");
                    self.answer(key, &Message::err(&tag, error));
                }
            }
            Message::Data { tag, channel, payload } => self.take_data(key, &tag, &channel, payload),
            Message::End { tag, channel } => self.take_end(key, &tag, &channel),
            Message::Credit { tag, channel, octets } => self.take_credit(key, &tag, &channel, octets),
            Message::Ok { tag, .. } | Message::Err { tag, .. } | Message::Item { tag, .. } => {
                let error = Error::new(Code::BadLine, "a client sends requests, not answers");
                self.answer_aside(key, &Message::err(&tag, error));
            }
        }
    }

    fn take_request(&mut self, key: u64, request: Request) {
        let tag = request.tag.clone();
        let defaults = self.config.sandbox.defaults();
        let Some(client) = self.clients.get(&key) else { return };
        if let Err(error) = client.admit(&tag) {
            return self.answer_aside(key, &Message::err(&tag, error));
        }
        let verb = Verb::of(&request.verb);
        let allowed = match verb {
            Some(verb) if verb.role() > client.identity().role => Err(forbidden(verb, client.identity().role)),
            _ => Ok(()),
        };
        self.taken = Some(Instant::now());
        let noted = if is_audited(&request) { self.audit(key, &request) } else { Ok(()) };
        let done = noted.and(allowed).and_then(|()| Command::of(request, defaults));
        if let Err(error) = done.and_then(|command| self.execute(key, &tag, command)) {
            self.answer(key, &Message::err(&tag, error));
        }
        self.taken = None;
    }

    fn execute(&mut self, key: u64, tag: &str, command: Command) -> Result<(), Error> {
        match command {
            Command::Hello => self.answer(key, &Message::ok(tag, self.hello())),
            Command::Help => {
                for verb in VERBS {
                    let fields = Fields::new().with("verb", verb.name).with("arguments", verb.arguments);
                    self.answer(key, &Message::item(tag, fields.with("summary", verb.summary)));
                }
                self.answer(key, &Message::ok(tag, Fields::new()));
            }
            Command::NodeInfo => {
                for row in self.pool_rows() {
                    self.answer(key, &Message::item(tag, row));
                }
                self.answer(key, &Message::ok(tag, self.info()));
            }
            Command::NodeStop(_) if self.stopping.as_ref().is_some_and(|stopping| stopping.hands_over) => {
                return Err(Error::new(Code::Stopping, "this supervisor is being replaced: ask the next one"));
            }
            Command::NodeStop(mode) => {
                self.add_job(key, tag, Job::NodeStop);
                self.begin_stop(Some(mode), Some((key, tag.to_string())));
            }
            Command::NodeLedger { all } => self.ask_ledger(key, tag, all),
            Command::NodeBackup => self.ask_backup(key, tag)?,
            Command::NodeRestore { force } => self.ask_restore(key, tag, force)?,
            Command::NodeDrain { deadline, pauses } => self.ask_drain(key, tag, deadline, pauses),
            Command::NodeUndrain => {
                self.undrain();
                self.answer(key, &Message::ok(tag, Fields::new()));
            }
            Command::NodeAudit(query) => self.ask_audit(key, tag, query),
            Command::EventsWatch(query) => self.ask_events(key, tag, query)?,
            Command::HistoryList(query) => self.ask_history(key, tag, query),
            Command::HistoryInspect(id) => self.ask_record(key, tag, id),
            Command::TemplateList => {
                let rows: Vec<Fields> = self.catalogue.rows().collect();
                for row in rows {
                    self.answer(key, &Message::item(tag, row));
                }
                self.answer(key, &Message::ok(tag, Fields::new()));
            }
            Command::TemplateInspect(name) => {
                let row = self.catalogue.row(&name)?;
                self.answer(key, &Message::ok(tag, row));
            }
            Command::TemplateSnapshot(spec) => self.ask_template_snapshot(key, tag, spec)?,
            Command::TemplateBuild(ask) => self.ask_build(key, tag, *ask)?,
            Command::TemplateStep { sandbox, key: step } => self.ask_step(key, tag, &sandbox, step)?,
            Command::TemplateCommit { sandbox, ask } => self.ask_commit(key, tag, &sandbox, *ask)?,
            Command::TemplatePublish(sandbox) => self.ask_publish(key, tag, &sandbox)?,
            Command::TemplateTag { template, name } => self.ask_template_tag(key, tag, &template, &name)?,
            Command::TemplateRemove(name) => self.ask_template_remove(key, tag, &name)?,
            Command::TemplateExport(name) => self.ask_template_export(key, tag, &name)?,
            Command::TemplateImport { name } => self.ask_template_import(key, tag, name)?,
            Command::SandboxCreate { spec, owner, progress, cold } => {
                let owner = self.owner_of_new(key, owner, &spec)?;
                let spec = match cold {
                    true => spec,
                    false => match self.create_warm(key, tag, spec, &owner, progress)? {
                        Some(spec) => spec,
                        None => return Ok(()),
                    },
                };
                let waiter = Waiter { client: key, tag: tag.to_string(), what: Awaited::Created { progress } };
                let origin = if cold { None } else { self.template_origin(&spec) };
                let id = self.create_or_boot(spec, owner, waiter, origin.as_ref())?;
                if self.sandboxes.contains_key(&id) {
                    self.add_job(key, tag, Job::Wait(id));
                }
            }
            Command::SandboxList(query) => {
                let limit = query.limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX);
                let rows: Vec<Fields> = self
                    .sandboxes
                    .values()
                    .filter(|sandbox| self.sees(key, sandbox) && sandbox.is_listed(&query))
                    .take(limit)
                    .map(|sandbox| self.shown_to(key, sandbox))
                    .collect();
                for row in rows {
                    self.answer(key, &Message::item(tag, row));
                }
                self.answer(key, &Message::ok(tag, Fields::new()));
            }
            Command::SandboxInspect(name) => {
                let fields = self.sandboxes.get(&self.find(key, &name)?).map(Sandbox::fields).unwrap_or_default();
                self.answer(key, &Message::ok(tag, fields));
            }
            Command::SandboxTrace { sandbox, exec } => self.ask_trace(key, tag, &sandbox, exec)?,
            Command::SandboxStop { sandbox, timeout } => self.ask_stop(key, tag, &sandbox, timeout)?,
            Command::SandboxPause(sandbox) => self.ask_pause(key, tag, &sandbox)?,
            Command::SandboxResume(sandbox) => self.ask_resume(key, tag, &sandbox)?,
            Command::SandboxRollback { sandbox, snapshot } => self.ask_rollback(key, tag, &sandbox, &snapshot)?,
            Command::SnapshotCreate { sandbox, name } => self.ask_snapshot(key, tag, &sandbox, name)?,
            Command::SnapshotFork { from, count } => self.ask_fork(key, tag, &from, count)?,
            Command::SnapshotList { sandbox } => self.list_snapshots(key, tag, sandbox.as_deref()),
            Command::SnapshotInspect(snapshot) => self.inspect_snapshot(key, tag, &snapshot)?,
            Command::SnapshotRemove(snapshot) => self.remove_snapshot(key, tag, &snapshot)?,
            Command::SnapshotExport(snapshot) => self.ask_export(key, tag, &snapshot)?,
            Command::SnapshotImport { name } => self.ask_import(key, tag, name)?,
            Command::SandboxRemove { sandbox, force } => self.ask_remove(key, tag, &sandbox, force)?,
            Command::SandboxStats(sandbox) => self.ask_stats(key, tag, &sandbox)?,
            Command::SandboxUpdate { sandbox, update } => self.ask_update(key, tag, &sandbox, update)?,
            Command::SandboxLogs { sandbox, follow, source, from } => {
                self.open_logs(key, tag, &sandbox, follow, source, from)?
            }
            Command::ExecStart { sandbox, argv, request, detach } => {
                self.start_exec(key, tag, &sandbox, argv, request, detach, None)?;
            }
            Command::ExecList(name) => {
                let id = self.find(key, &name)?;
                let rows: Vec<Fields> = self
                    .sandboxes
                    .get(&id)
                    .map(|s| s.execs.values().map(|exec| exec.fields()).collect())
                    .unwrap_or_default();
                for row in rows {
                    self.answer(key, &Message::item(tag, row));
                }
                self.answer(key, &Message::ok(tag, Fields::new()));
            }
            Command::CodeRun { sandbox, ask } => self.run_code(key, tag, &sandbox, *ask)?,
            Command::CodeList(sandbox) => self.list_code(key, tag, &sandbox)?,
            Command::CodeContextCreate { sandbox, language, bounds } => {
                self.create_context(key, tag, &sandbox, &language, bounds)?;
            }
            Command::ExecAttach { sandbox, exec, feeds } => self.attach_exec(key, tag, &sandbox, exec, feeds)?,
            Command::ExecControl { sandbox, request } | Command::File { sandbox, request } => {
                self.relay(key, tag, &sandbox, request)?;
            }
        }
        Ok(())
    }

    pub(super) fn add_job(&mut self, key: u64, tag: &str, job: Job) {
        if let Some(client) = self.clients.get_mut(&key) {
            client.jobs.insert(tag.to_string(), job);
            self.touched_clients.insert(key);
        }
    }

    fn hello(&self) -> Fields {
        Fields::new()
            .with("protocol", PROTOCOL_VERSION)
            .with("version", env!("CARGO_PKG_VERSION"))
            .with("node", &self.node_id)
            .with("name", &self.config.node.name)
    }

    /// Whether a sandbox is there for a client.
    fn sees(&self, key: u64, sandbox: &Sandbox) -> bool {
        sandbox.parked.is_none() && self.clients.get(&key).is_some_and(|client| client.identity().sees(&sandbox.owner))
    }

    /// A sandbox's row as a client sees it.
    fn shown_to(&self, key: u64, sandbox: &Sandbox) -> Fields {
        let role = self.clients.get(&key).map_or(Role::Monitor, |client| client.identity().role);
        role.shown(sandbox.fields())
    }

    /// Whose a client's new sandbox is. Only an admin makes one for another, or gives it files and devices of the node.
    fn owner_of_new(&self, key: u64, asked: Option<String>, spec: &Spec) -> Result<String, Error> {
        let Some(client) = self.clients.get(&key) else { return Ok(String::new()) };
        let who = client.identity();
        let refused = |what: &str| {
            let message = format!("{what} is an admin's right, and this client is {}", who.role);
            Err(Error::new(Code::Forbidden, message).with("role", who.role))
        };
        if who.role < Role::Admin {
            if asked.as_ref().is_some_and(|asked| *asked != who.owner) {
                return refused("another owner");
            }
            if spec.disks.iter().any(DiskSpec::is_the_nodes) {
                return refused("a disk that is a file or device of the node");
            }
        }
        Ok(asked.unwrap_or_else(|| who.owner.clone()))
    }

    /// The sandbox that a client means, among those that are there for it: by id, by name (its own owner's first), or by
    /// a prefix that only one id has.
    pub(super) fn find(&self, key: u64, given: &str) -> Result<SandboxId, Error> {
        let own = self.clients.get(&key).map_or("", |client| client.identity().owner.as_str());
        let found = choose("sandbox", given, own, || {
            let seen = self.sandboxes.values().filter(|sandbox| self.sees(key, sandbox));
            seen.map(|sandbox| (sandbox.id.as_str(), sandbox.spec.name.as_deref(), sandbox.owner.as_str()))
        })?;
        SandboxId::parse(&found).ok_or_else(|| Error::new(Code::NotFound, format!("no sandbox {given}")))
    }

    /// The sandbox that is meant, where its agent answers.
    pub(super) fn find_running(&mut self, key: u64, given: &str) -> Result<&mut Sandbox, Error> {
        let id = self.find(key, given)?;
        match self.sandboxes.get_mut(&id) {
            Some(sandbox)
                if sandbox.state == State::Running && sandbox.worker.as_ref().is_some_and(|w| w.agent.is_ready()) =>
            {
                sandbox.is_used();
                Ok(sandbox)
            }
            Some(Sandbox { state: State::Running, worker: Some(Worker { foreign: Some(error), .. }), .. }) => {
                Err(error.clone())
            }
            Some(sandbox) if sandbox.state == State::Running => {
                Err(Error::new(Code::LinkLost, format!("the agent of sandbox {id} cannot be reached right now")))
            }
            Some(sandbox) => Err(Error::new(Code::BadState, format!("sandbox {id} is {}, not running", sandbox.state))
                .with("state", sandbox.state)),
            None => Err(Error::new(Code::NotFound, format!("no sandbox {given}"))),
        }
    }

    pub(super) fn relay(&mut self, key: u64, tag: &str, given: &str, request: Request) -> Result<(), Error> {
        let sandbox = self.find_running(key, given)?;
        let id = sandbox.id.clone();
        let Some(worker) = &mut sandbox.worker else { return Ok(()) };
        let lost = (request.verb == "file.watch").then_some(0);
        let route = worker.agent.request(request);
        worker.routes.insert(route.clone(), Route::Relay { client: key, tag: tag.to_string() });
        self.touched_sandboxes.insert(id.clone());
        self.add_job(key, tag, Job::Relay { sandbox: id, route, down: Gate::default(), up: Gate::default(), lost });
        Ok(())
    }

    pub(super) fn take_end(&mut self, key: u64, tag: &str, channel: &str) {
        match self.clients.get_mut(&key).and_then(|client| client.jobs.get_mut(tag)) {
            Some(Job::Restore { upload, .. } | Job::Import(upload)) => upload.end(),
            Some(Job::Packages { early, .. }) => early.end(),
            Some(Job::Exec { .. }) if channel == "stdin" => self.end_feed(key, tag),
            _ => {
                self.pass_to_agent(key, tag, |route| Message::end(route, channel));
                self.source_ended(key, tag, channel);
            }
        }
    }

    pub(super) fn take_data(&mut self, key: u64, tag: &str, channel: &str, payload: Vec<u8>) {
        let Some(job) = self.clients.get_mut(&key).and_then(|client| client.jobs.get_mut(tag)) else {
            // The request may have ended while this was on its way.
            return;
        };
        let mut payload = payload;
        let taken = match job {
            Job::Restore { upload, .. } | Job::Import(upload) if channel == CHANNEL => {
                upload.take(std::mem::take(&mut payload))
            }
            Job::Packages { early, .. } if channel == "source" => early.take(std::mem::take(&mut payload)),
            Job::Relay { up, .. } if channel == "content" => up.take(channel, payload.len()),
            Job::Exec { sandbox, number } if matches!(channel, "stdin" | "source") => {
                match self.sandboxes.get_mut(sandbox).and_then(|sandbox| sandbox.execs.get_mut(number)) {
                    Some(exec) if exec.input() != channel => Err(no_channel(channel)),
                    Some(exec) if exec.code.is_none() => self.feed(key, tag, std::mem::take(&mut payload)),
                    Some(exec) if exec.is_fed_by(key, tag) => {
                        exec.source.take(&payload);
                        exec.feed.take(channel, payload.len())
                    }
                    _ => return,
                }
            }
            _ => Err(no_channel(channel)),
        };
        match taken {
            Ok(()) if channel == "stdin" => {}
            Ok(()) => self.pass_to_agent(key, tag, |route| Message::data(route, channel, payload)),
            Err(error) => {
                self.cancel(key, tag);
                self.answer(key, &Message::err(tag, error));
            }
        }
    }

    /// Passes something of a client's request to the agent, under the tag it has there.
    fn pass_to_agent(&mut self, key: u64, tag: &str, message: impl FnOnce(&str) -> Message) {
        let Some(job) = self.clients.get(&key).and_then(|client| client.jobs.get(tag)) else { return };
        let (id, route) = match job {
            Job::Relay { sandbox, route, .. } => (sandbox.clone(), Some(route.clone())),
            Job::Exec { sandbox, number } => {
                let exec = self.sandboxes.get(sandbox).and_then(|sandbox| sandbox.execs.get(number));
                let fed = exec.filter(|exec| exec.is_fed_by(key, tag));
                (sandbox.clone(), fed.and_then(|exec| exec.route.clone()))
            }
            _ => return,
        };
        let worker = self.sandboxes.get_mut(&id).and_then(|sandbox| sandbox.worker.as_mut());
        if let (Some(worker), Some(route)) = (worker, route) {
            worker.agent.send(&message(&route));
            self.touched_sandboxes.insert(id);
        }
    }

    fn take_credit(&mut self, key: u64, tag: &str, channel: &str, octets: u64) {
        let Some(job) = self.clients.get_mut(&key).and_then(|client| client.jobs.get_mut(tag)) else { return };
        match job {
            Job::Relay { down, .. } if channel == "content" => down.allow(octets),
            Job::Logs(reader) if channel == reader.channel() => reader.credit(octets),
            Job::Export(download) if channel == CHANNEL => download.credit(octets),
            Job::Exec { sandbox, number } => {
                let exec = self.sandboxes.get_mut(sandbox).and_then(|sandbox| sandbox.execs.get_mut(number));
                if let (Some(exec), Some(index)) = (exec, output_index(channel)) {
                    exec.credit(key, tag, index, octets);
                }
            }
            _ => {}
        }
        self.touched_clients.insert(key);
    }

    /// A request that its client no longer wants; it is no longer among the client's jobs.
    fn cancel_job(&mut self, key: u64, tag: &str, job: Job) {
        match job {
            Job::Wait(id) => self.cancel_wait(key, tag, &id),
            Job::Exec { sandbox, number } => {
                let Some(sandbox) = self.sandboxes.get_mut(&sandbox) else { return };
                let id = sandbox.id.clone();
                let Some(exec) = sandbox.execs.get_mut(&number) else { return };
                let Some(at) = exec.viewers.iter().position(|v| v.client == key && v.tag == tag) else { return };
                let viewer = exec.viewers.remove(at);
                if let (true, Some(route), Some(worker)) = (viewer.owner, exec.route.clone(), &mut sandbox.worker) {
                    worker.agent.send(&Message::Cancel { tag: route });
                }
                self.touched_sandboxes.insert(id);
            }
            Job::Relay { sandbox: id, route, .. } => {
                if let Some(worker) = self.sandboxes.get_mut(&id).and_then(|sandbox| sandbox.worker.as_mut()) {
                    worker.routes.insert(route.clone(), Route::Unheeded);
                    worker.agent.send(&Message::Cancel { tag: route });
                    self.touched_sandboxes.insert(id);
                }
            }
            Job::Inquiry { sandbox, route } => self.forget_inquiry(&sandbox, &route),
            Job::NetworkChange(ticket) => self.forget_network_change(ticket),
            Job::Drain => self.forget_drain(key, tag),
            Job::Fork { .. } => self.forget_fork(key, tag),
            Job::Build(id) => self.end_build(&id, "its client ended it"),
            Job::Packages { ticket, .. } => self.forget_packages(ticket),
            Job::Warm => self.forget_warm(key, tag),
            // Whoever makes or takes a copy of the database or of a snapshot sees that nobody waits for it.
            Job::Logs(_)
            | Job::NodeStop
            | Job::Backup
            | Job::Restore { .. }
            | Job::Export(_)
            | Job::Import(_)
            | Job::Ledger
            | Job::Events(_)
            | Job::Reading(_) => {}
            // It is made all the same, and seen in the list.
            Job::Snapshot => {}
        }
    }

    fn ask_stop(&mut self, key: u64, tag: &str, given: &str, timeout: Option<Duration>) -> Result<(), Error> {
        let id = self.find(key, given)?;
        self.stop(&id, timeout)?;
        self.await_(key, tag, &id, Awaited::Stopped);
        Ok(())
    }

    fn ask_remove(&mut self, key: u64, tag: &str, given: &str, force: bool) -> Result<(), Error> {
        let id = self.find(key, given)?;
        let Some(sandbox) = self.sandboxes.get(&id) else { return Ok(()) };
        if sandbox.state.is_live() && !force {
            return Err(Error::new(
                Code::BadState,
                format!("sandbox {id} is {}; stop it first, or force", sandbox.state),
            )
            .with("state", sandbox.state));
        }
        self.await_(key, tag, &id, Awaited::Removed);
        self.remove(&id);
        Ok(())
    }

    /// Registers what has to be watched of a new worker. Gives the three tokens of `Worker::tokens`.
    pub(super) fn watch_worker(
        &mut self,
        id: &SandboxId,
        process: std::os::fd::RawFd,
        link: std::os::fd::RawFd,
        agent: std::os::fd::RawFd,
    ) -> std::io::Result<[Token; 3]> {
        Ok([
            self.watch(process, Source::WorkerProcess(id.clone()))?,
            self.watch(link, Source::WorkerLink(id.clone()))?,
            self.watch(agent, Source::Agent(id.clone()))?,
        ])
    }
}

/// The one that is meant of those that a client sees, each with id, name and owner: by id, by name, where its own come first,
/// or by the unique start of an id. `what` they are is for the error.
pub(super) fn choose<'a, I: Iterator<Item = (&'a str, Option<&'a str>, &'a str)>>(
    what: &str,
    given: &str,
    own: &str,
    seen: impl Fn() -> I,
) -> Result<String, Error> {
    if seen().any(|(id, _, _)| id == given) {
        return Ok(given.to_string());
    }
    let named = || seen().filter(|(_, name, _)| *name == Some(given));
    if let Some((id, _, _)) = named().find(|(_, _, owner)| *owner == own) {
        return Ok(id.to_string());
    }
    let starts =
        |(id, name, _): &(&str, Option<&str>, &str)| *name != Some(given) && !given.is_empty() && id.starts_with(given);
    let mut matching = named().chain(seen().filter(starts));
    match (matching.next(), matching.next()) {
        (Some((id, _, _)), None) => Ok(id.to_string()),
        (Some(_), Some(_)) => {
            Err(Error::new(Code::BadArgument, format!("{given} is the name or start of more than one {what}")))
        }
        _ => Err(Error::new(Code::NotFound, format!("no {what} {given}")).with(what, given)),
    }
}

fn no_channel(channel: &str) -> Error {
    Error::new(Code::BadArgument, format!("this request has no channel {channel} from the client"))
}

fn forbidden(verb: &Verb, role: Role) -> Error {
    let message = format!("{} is for the role {}, and this client is {role}", verb.name, verb.role());
    Error::new(Code::Forbidden, message).with("role", role)
}
