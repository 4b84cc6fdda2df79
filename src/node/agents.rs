//! What workers and agents say, and the programs that run in sandboxes.

use mio::Token;

use super::instance::{Route, Sandbox};
use super::pools::PREPARE;
use super::requests::Job;
use super::supervisor::{Supervisor, now_ms};
use super::tracing::{QUEUE, RUN, START};
use super::turn::{Step, Turn};
use crate::control::client::ANSWERS_HIGH;
use crate::sandbox::agent::{Agent, Approach, Heard};
use crate::sandbox::claims;
use crate::sandbox::exec::{CodeRun, Exec, Sink, output_index};
use crate::sandbox::flow::QUEUE_HIGH;
use crate::sandbox::id::SandboxId;
use crate::sandbox::lifecycle::State;
use crate::sandbox::stdin::Stdin;
use crate::sandbox::worker::{self, LEARN};
use crate::storage::state::Change;
use crate::wire::{Code, Decoded, EXEC_MAX, Error, Fields, Link, Message, Request};

/// Tags of the supervisor's own requests on a worker's control link.
pub(super) const GREETING: &str = "hello";
pub(super) const START_MACHINE: &str = "start";
const WATCH: &str = "watch";

/// Programs of a sandbox whose end was not seen, or is still watched: more than an agent runs.
const EXECS_MAX: usize = 4096;
/// Finished programs that are kept with their output, a sandbox. Those of which somebody was told how they ended go first.
const FINISHED_KEPT: usize = 256;

impl Supervisor {
    /// The worker's control link: the answers to `vm.start` and to what clients ask of it.
    pub(super) fn read_worker(&mut self, id: &SandboxId, token: Token) {
        let mut turn = Turn::new();
        loop {
            let worker = self.sandboxes.get_mut(id).and_then(|sandbox| sandbox.worker.as_mut());
            // One that is ended for a reason has said enough.
            let Some(worker) = worker.filter(|worker| worker.verdict.is_none()) else { return };
            match turn.step(&mut worker.link, Link::next, Link::fill) {
                Step::Heard(Decoded::Message(message)) => self.take_workers_word(id, claims::message(message)),
                Step::Heard(Decoded::Bad { .. }) => {}
                Step::Over => {
                    self.again.insert(token);
                    return;
                }
                // A worker that closes its link is about to end: its process tells.
                Step::Drained | Step::Closed | Step::Failed(_) => return,
            }
        }
    }

    fn take_workers_word(&mut self, id: &SandboxId, message: Message) {
        let Some(worker) = self.sandboxes.get_mut(id).and_then(|sandbox| sandbox.worker.as_mut()) else { return };
        if let (GREETING | START_MACHINE | PREPARE, true) = (message.tag(), message.is_final())
            && !worker.answers(message.tag())
        {
            // Each is answered once, and there is no end of what would be done for each of a flood of them.
            if message.tag() != PREPARE {
                let what = format!("its worker answered {}, which it was not asked", message.tag());
                self.worker_lost(id, &Error::new(Code::LinkLost, what));
            }
            return;
        }
        match message {
            Message::Err { tag, error } if tag == START_MACHINE => worker.refusal = Some(error),
            Message::Ok { tag, fields } if tag == GREETING => {
                let version = worker::link_version(&fields);
                self.greeted(id, version.map(drop));
            }
            Message::Err { tag, error } if tag == GREETING => self.greeted(id, Err(error)),
            Message::Item { tag, fields } if tag == WATCH => {
                if fields.get("event") == Some("disk-full") && !std::mem::replace(&mut worker.disk_full, true) {
                    log::warn!("sandbox {id}: the node has no room for what it writes");
                }
            }
            Message::Ok { tag, .. } if tag == START_MACHINE => self.machine_made(id),
            Message::Ok { tag, .. } if tag == LEARN => self.learned_working_set(id, Ok(())),
            Message::Err { tag, error } if tag == LEARN => self.learned_working_set(id, Err(error)),
            Message::Err { tag, error } if tag == PREPARE => {
                log::warn!("sandbox {id}: its worker could prepare nothing: {error}");
            }
            message => self.take_inquiry(id, &message),
        }
    }

    /// A worker that was taken over has said whether it can be spoken to.
    fn greeted(&mut self, id: &SandboxId, spoken: Result<(), Error>) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let Some(worker) = &mut sandbox.worker else { return };
        match spoken {
            Ok(()) => {
                if sandbox.state == State::Pausing {
                    // Its guest may stand still, and would not hear.
                    worker.link.send(&Message::Request(Request::new("resume", "vm.resume")));
                    self.touched_sandboxes.insert(id.clone());
                }
                worker.agent.join(Approach::Connect);
                if sandbox.state == State::Running {
                    sandbox.reason.clear();
                }
                self.watch_events(id);
            }
            Err(error) => {
                log::error!("sandbox {id} runs on out of reach: {}", error.message);
                sandbox.reason.clone_from(&error.message);
                worker.foreign = Some(error);
                self.record(id);
                self.met(id);
            }
        }
    }

    /// Has a worker tell what happens to it.
    pub(super) fn watch_events(&mut self, id: &SandboxId) {
        let Some(worker) = self.sandboxes.get_mut(id).and_then(|sandbox| sandbox.worker.as_mut()) else { return };
        worker.link.send(&Message::Request(Request::new(WATCH, "vm.watch")));
        self.touched_sandboxes.insert(id.clone());
    }

    /// Whether a disk of a sandbox is known to have found no room on the node, also by what its worker has just said.
    pub(super) fn lacks_room(&mut self, id: &SandboxId) -> bool {
        let worker = |node: &Self| {
            let worker = node.sandboxes.get(id).and_then(|sandbox| sandbox.worker.as_ref());
            worker.map(|worker| (worker.tokens[1], worker.disk_full))
        };
        if let Some((token, false)) = worker(self) {
            self.read_worker(id, token);
        }
        worker(self).is_some_and(|(_, full)| full)
    }

    /// What a guest makes of a write for which the node had no room: an I/O error, and then a file system that it does not
    /// write to any more.
    fn explain(&mut self, id: &SandboxId, error: Error) -> Error {
        let errno = error.fields.get("errno").filter(|errno| ["EIO", "EROFS"].contains(errno)).map(str::to_string);
        let at_fault = error.is(Code::FileFailed) || error.is(Code::ExecFailed);
        match errno.filter(|_| at_fault) {
            Some(errno) if self.lacks_room(id) => no_room(&error.message).with("errno", errno),
            _ => error,
        }
    }

    pub(super) fn read_agent(&mut self, id: &SandboxId, token: Token) {
        let mut turn = Turn::new();
        loop {
            if self.held.iter().any(|(_, held)| *held == token) {
                // A client must take its answers first: `release_held` comes back here.
                return;
            }
            let Some(worker) = self.sandboxes.get_mut(id).and_then(|sandbox| sandbox.worker.as_mut()) else { return };
            if worker.tokens[2] != token {
                return;
            }
            let lost = |what: String| Heard::Broken(Error::new(Code::LinkLost, what));
            let heard = match turn.step(&mut worker.agent, Agent::hear, Agent::fill) {
                Step::Heard(heard) => {
                    worker.probe.heard = true;
                    heard
                }
                Step::Over => {
                    self.again.insert(token);
                    return;
                }
                Step::Drained => return,
                Step::Closed => lost("the agent closed its link".to_string()),
                Step::Failed(e) => lost(format!("link to the agent: {e}")),
            };
            match heard {
                Heard::Ready => self.agent_ready(id),
                Heard::Message(message) => {
                    if let Some(client) = self.take_answer(id, message) {
                        // That client must take its answers before this agent may say more.
                        self.held.insert((client, token));
                    }
                }
                Heard::Broken(error) => {
                    self.agent_lost(id, error);
                    return;
                }
            }
        }
    }

    /// A client takes answers again: agents that were held for it go on.
    pub(super) fn release_held(&mut self, key: u64) {
        let (free, held) = std::mem::take(&mut self.held).into_iter().partition(|(client, _)| *client == key);
        self.held = held;
        let free: std::collections::BTreeSet<(u64, Token)> = free;
        self.again.extend(free.into_iter().map(|(_, token)| token));
    }

    /// Handles what an agent sent. Gives the client that has too much queued because of it, if any.
    fn take_answer(&mut self, id: &SandboxId, message: Message) -> Option<u64> {
        let worker = self.sandboxes.get_mut(id)?.worker.as_mut()?;
        let route = worker.routes.get(message.tag()).cloned()?;
        if message.is_final() {
            worker.routes.remove(message.tag());
        } else if route.has_one_answer() {
            return None;
        }
        match route {
            Route::Configure => match message {
                Message::Ok { .. } => self.configured(id, Ok(())),
                Message::Err { error, .. } => self.configured(id, Err(error)),
                _ => {}
            },
            Route::Parked => self.parked_answered(id),
            Route::Probe => worker.probe.answered(),
            Route::Freeze => {
                let frozen = matches!(&message, Message::Ok { fields, .. } if fields.get("frozen") == Some("true"));
                self.frozen(id, frozen);
            }
            Route::Introduce => match message {
                Message::Ok { .. } => self.introduced(id, Ok(())),
                Message::Err { error, .. } => self.introduced(id, Err(error)),
                _ => {}
            },
            Route::Service => self.guest_says(id, &message),
            Route::PowerOff | Route::Unheeded => {}
            Route::Survey => self.surveyed(id, &message),
            Route::Exec(number) => self.take_exec_answer(id, number, message),
            Route::Relay { client, tag } => return self.take_relay_answer(id, client, &tag, message),
        }
        None
    }

    fn take_relay_answer(&mut self, id: &SandboxId, key: u64, tag: &str, mut message: Message) -> Option<u64> {
        let client = self.clients.get_mut(&key)?;
        let queued = client.queued();
        let Some(Job::Relay { down, up, lost, .. }) = client.jobs.get_mut(tag) else { return None };
        let lossy = lost.is_some();
        match &message {
            Message::Item { .. } if lossy && queued >= QUEUE_HIGH => {
                *lost = lost.map(|lost| lost + 1);
                return None;
            }
            Message::Data { channel, payload, .. } => {
                if let Err(error) = down.take(channel, payload.len()) {
                    self.agent_lost(id, error);
                    return None;
                }
            }
            Message::Credit { octets, .. } => {
                up.allow(*octets);
                self.touched_sandboxes.insert(id.clone());
                return None;
            }
            // No answers.
            Message::Request(_) | Message::Cancel { .. } => return None,
            _ => {}
        }
        message.retag(tag);
        if let Message::Err { tag, error } = message {
            message = Message::Err { tag, error: self.explain(id, error) };
        }
        if let Some(length) = message.over_long() {
            // It fitted under the shorter tag that it has on the agent's link.
            if !message.is_final() {
                self.cancel(key, tag);
            }
            message = Message::err(tag, Error::line_too_long("the answer", length));
        }
        if message.is_final() {
            self.sandboxes.get_mut(id).into_iter().for_each(Sandbox::is_used);
            self.finish(key, &message);
        } else {
            self.answer(key, &message);
        }
        self.clients.get(&key).is_some_and(|client| client.queued() >= ANSWERS_HIGH).then_some(key)
    }

    fn take_exec_answer(&mut self, id: &SandboxId, number: u64, mut message: Message) {
        if let Message::Err { tag, error } = message {
            message = Message::Err { tag, error: self.explain(id, error) };
        }
        let capacity = self.config.sandbox.exec_ring_kib * 1024;
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let Some(exec) = sandbox.execs.get_mut(&number) else { return };
        let mut began = false;
        match message {
            Message::Data { channel, payload, .. } => {
                let Some(index) = output_index(&channel).filter(|&index| exec.unkept.is_none() && exec.has(index))
                else {
                    return;
                };
                match exec.take(&sandbox.home, capacity, index, &payload) {
                    Ok(()) => {}
                    // No room on the data partition: this program ends for it, and not its sandbox.
                    Err(error) if error.is(Code::NoCapacity) => {
                        exec.unkept = Some(error);
                        if let (Some(tag), Some(worker)) = (exec.route.clone(), &mut sandbox.worker) {
                            // The end, also of one that an earlier supervisor started, and no wait for the rest of its output.
                            let kill = Request::new("", "exec.signal").set("exec", number).set("signal", "KILL");
                            let killed = worker.agent.request(kill);
                            worker.routes.insert(killed, Route::Unheeded);
                            worker.agent.send(&Message::Cancel { tag });
                        }
                    }
                    Err(error) => {
                        self.agent_lost(id, error);
                        return;
                    }
                }
            }
            Message::End { channel, .. } => {
                if let Some(index) = output_index(&channel) {
                    exec.end(index);
                }
            }
            Message::Credit { channel, octets, .. } if channel == exec.input() => match exec.code {
                Some(_) => exec.feed.allow(octets),
                None => exec.stdin.allow(octets),
            },
            Message::Item { fields, .. } if exec.code.is_none() && fields.get("stdout_offset").is_some() => {
                return self.streams_stand(id, number, &fields);
            }
            Message::Item { fields, .. } => {
                let before = exec.code.clone();
                let Some(fields) = exec.begins(&fields) else { return };
                let running = exec.code.as_ref().is_none_or(|run| run.running);
                exec.trace.next(if running { RUN } else { QUEUE });
                began = exec.code != before;
                for viewer in exec.viewers.iter().filter(|viewer| viewer.owner) {
                    if let Some(client) = self.clients.get_mut(&viewer.client) {
                        client.send(&Message::item(&viewer.tag, fields.clone()));
                    }
                }
            }
            Message::Ok { fields, .. } => {
                let outcome = exec.unkept.take().map_or(Ok(claims::outcome(&fields)), Err);
                self.exec_ended(id, number, outcome);
            }
            Message::Err { error, .. } => {
                let outcome = Err(exec.unkept.take().unwrap_or(error));
                self.exec_ended(id, number, outcome);
            }
            _ => {}
        }
        if began {
            self.record_history(id, number);
        }
        self.touched_sandboxes.insert(id.clone());
        self.touch_viewers(id, number);
    }

    pub(super) fn touch_viewers(&mut self, id: &SandboxId, number: u64) {
        let exec = self.sandboxes.get(id).and_then(|sandbox| sandbox.execs.get(&number));
        self.touched_clients.extend(exec.into_iter().flat_map(|exec| exec.viewers.iter().map(|viewer| viewer.client)));
    }

    /// A program has ended, one way or another.
    pub(super) fn exec_ended(&mut self, id: &SandboxId, number: u64, outcome: Result<Fields, Error>) {
        self.end_exec(id, number, outcome);
        self.forget_execs(id);
        self.learn_working_set(id);
    }

    /// Programs of one sandbox have ended, all for the same reason.
    pub(super) fn execs_ended(&mut self, id: &SandboxId, numbers: Vec<u64>, error: &Error) {
        for number in numbers {
            self.end_exec(id, number, Err(error.clone()));
        }
        self.forget_execs(id);
    }

    fn end_exec(&mut self, id: &SandboxId, number: u64, outcome: Result<Fields, Error>) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let Some(exec) = sandbox.execs.get_mut(&number) else { return };
        let routed = exec.route.is_some();
        exec.finish(outcome);
        sandbox.is_used();
        if routed && let Some(worker) = sandbox.worker.as_mut().filter(|worker| worker.agent.is_ready()) {
            let tag = worker.agent.request(Request::new("", "exec.forget").set("exec", number));
            worker.routes.insert(tag, Route::Unheeded);
        }
        // Before it may be forgotten: its record says how it ended.
        self.record_exec(id, number);
        self.touched_sandboxes.insert(id.clone());
        self.touch_viewers(id, number);
    }

    /// Only the last of those that have ended are kept.
    fn forget_execs(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id).filter(|sandbox| sandbox.execs.len() > FINISHED_KEPT) else {
            return;
        };
        let finished = sandbox.execs.values().filter(|exec| exec.outcome.is_some() && exec.viewers.is_empty());
        let mut finished: Vec<(bool, u64)> = finished.map(|exec| (!exec.collected, exec.number)).collect();
        finished.sort_unstable();
        for (_, number) in finished.iter().take(finished.len().saturating_sub(FINISHED_KEPT)) {
            if let Some(mut exec) = sandbox.execs.remove(number) {
                exec.forget(&sandbox.home);
                self.database.submit(Change::RemoveExecution { sandbox_id: id.to_string(), exec_id: *number });
            }
        }
    }

    /// Starts a program, or a code run.
    #[allow(clippy::too_many_arguments)] // a request, and what it is about
    pub(super) fn start_exec(
        &mut self,
        key: u64,
        tag: &str,
        given: &str,
        argv: Vec<Vec<u8>>,
        request: Request,
        detach: bool,
        run: Option<CodeRun>,
    ) -> Result<(), Error> {
        let sandbox = self.find_running(key, given)?;
        check_room(&sandbox.id, sandbox.execs.len())?;
        let id = sandbox.id.clone();
        // The source of a code run comes over its request, which lasts until that is there.
        let feeds = run.is_some();
        let watched = (!detach || feeds).then_some((key, tag));
        let Some(number) = self.begin_exec(&id, argv, request, run, watched) else { return Ok(()) };
        if let Some(exec) = self.sandboxes.get_mut(&id).and_then(|sandbox| sandbox.execs.get_mut(&number)) {
            exec.detaches = detach && feeds;
        }
        if detach && !feeds {
            self.answer(key, &Message::ok(tag, Fields::new().with("exec", number)));
        } else {
            self.add_job(key, tag, Job::Exec { sandbox: id, number });
        }
        Ok(())
    }

    /// Has a sandbox's agent start a program, for a client that watches it or for nobody; its number. `None` where there is
    /// no worker.
    pub(super) fn begin_exec(
        &mut self,
        id: &SandboxId,
        argv: Vec<Vec<u8>>,
        request: Request,
        run: Option<CodeRun>,
        watched: Option<(u64, &str)>,
    ) -> Option<u64> {
        let source_limit = self.source_limit();
        let mut trace = self.new_trace();
        let sandbox = self.sandboxes.get_mut(id)?;
        let number = sandbox.next_exec;
        let worker = sandbox.worker.as_mut()?;
        let has_stdin = request.has("stdin");
        let route = worker.agent.request(request.set("id", number));
        worker.routes.insert(route.clone(), Route::Exec(number));
        sandbox.next_exec += 1;
        let mut exec = Exec::new(number, argv, now_ms());
        exec.route = Some(route);
        exec.stdin = Stdin::of_new(has_stdin);
        trace.next(START);
        exec.trace = trace;
        if let Some(run) = run {
            exec.is_run(run);
            exec.source.limit = source_limit;
        }
        if let Some((key, tag)) = watched {
            exec.watch(key, tag, true);
        }
        sandbox.execs.insert(number, exec);
        self.record_exec(id, number);
        self.touched_sandboxes.insert(id.clone());
        Some(number)
    }

    /// Asks an agent that was there before us what runs.
    pub(super) fn survey(&mut self, id: &SandboxId) {
        let Some(worker) = self.sandboxes.get_mut(id).and_then(|sandbox| sandbox.worker.as_mut()) else { return };
        let tag = worker.agent.request(Request::new("", "exec.list"));
        worker.routes.insert(tag, Route::Survey);
        worker.listing.begin();
        self.touched_sandboxes.insert(id.clone());
    }

    fn surveyed(&mut self, id: &SandboxId, message: &Message) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        match message {
            Message::Item { fields, .. } => {
                let Some(number) = fields.number("exec") else { return };
                let Some(worker) = &mut sandbox.worker else { return };
                let running = fields.get("state") == Some("running");
                let unknown = running && !sandbox.execs.contains_key(&number);
                let mut counted = worker.listing.item();
                if unknown {
                    counted = counted.and_then(|()| worker.listing.unknown());
                }
                if number > EXEC_MAX {
                    counted = Err(format!("it lists program {number}, over the limit of {EXEC_MAX}"));
                }
                if let Err(why) = counted {
                    self.agent_lost(id, Error::new(Code::LinkLost, why));
                    return;
                }
                // Also of one that has ended, as long as the agent knows it: two programs with one number are refused.
                sandbox.next_exec = sandbox.next_exec.max(number.saturating_add(1));
                if running && sandbox.returned {
                    // It ended after the snapshot that the sandbox was put back to.
                    let ended = |exec: &&mut Exec| exec.outcome.is_some();
                    if let Some(exec) = sandbox.execs.get_mut(&number).filter(ended) {
                        exec.forget(&sandbox.home);
                        sandbox.execs.remove(&number);
                    }
                }
                if running && !sandbox.execs.contains_key(&number) {
                    // It was started in the last moments of the supervisor before, which could not write it down.
                    let mut exec = Exec::new(number, claims::arguments(fields), now_ms());
                    if let Some(language) = fields.get("language") {
                        let language = language.chars().take(32).collect();
                        exec.is_run(CodeRun { language, context: None, running: true });
                    }
                    exec.reopen(&sandbox.home, self.config.sandbox.exec_ring_kib * 1024);
                    sandbox.execs.insert(number, exec);
                }
                take_over(sandbox, number);
                let unrecorded = sandbox.execs.get(&number).is_some_and(|exec| exec.record.is_none());
                self.touched_sandboxes.insert(id.clone());
                if unrecorded {
                    self.record_history(id, number);
                }
            }
            Message::Ok { .. } => {
                sandbox.returned = false;
                // What the agent does not know any more has ended without anybody seeing how.
                let lost: Vec<u64> = sandbox
                    .execs
                    .values()
                    .filter(|exec| exec.outcome.is_none() && exec.route.is_none())
                    .map(|exec| exec.number)
                    .collect();
                let waits = sandbox.waits_for_survey();
                self.execs_ended(id, lost, &Error::new(Code::LinkLost, "the program ended while nobody watched"));
                if waits {
                    self.runs(id);
                }
                self.met(id);
            }
            Message::Err { error, .. } if sandbox.waits_for_survey() => self.fail_start(id, error.clone()),
            _ => self.met(id),
        }
    }
}

/// Whether a sandbox with so many programs may have another.
fn check_room(id: &SandboxId, programs: usize) -> Result<(), Error> {
    if programs < EXECS_MAX {
        return Ok(());
    }
    let message = format!("sandbox {id} has {EXECS_MAX} programs, the limit");
    Err(Error::new(Code::NoCapacity, message).with("resource", "programs").with("max", EXECS_MAX))
}

/// The error of what failed because the node had no room for what a sandbox wrote.
pub(super) fn no_room(what: &str) -> Error {
    Error::disk_full(format!("the node has no room for what the sandbox writes: {what}"))
}

/// Goes on with a program's output where the kept part ends.
fn take_over(sandbox: &mut Sandbox, number: u64) {
    let Some(worker) = &mut sandbox.worker else { return };
    if sandbox.execs.get(&number).is_some_and(|exec| exec.route.is_some()) {
        // Started over this very link, before the agent was asked what runs.
        return;
    }
    let Some(exec) = sandbox.execs.get_mut(&number).filter(|exec| exec.outcome.is_none()) else {
        // Its end was seen, or it was none of ours: the agent need not keep it.
        let tag = worker.agent.request(Request::new("", "exec.forget").set("exec", number));
        worker.routes.insert(tag, Route::Unheeded);
        return;
    };
    let [stdout, stderr, result] = exec.offsets();
    let mut request = Request::new("", "exec.attach").set("exec", number).set("stdout", stdout).set("stderr", stderr);
    if exec.code.is_some() {
        request = request.set("result", result);
    }
    let route = worker.agent.request(request);
    worker.routes.insert(route.clone(), Route::Exec(number));
    exec.rejoin(route);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sandbox_has_so_many_programs_and_no_more() {
        let id = SandboxId::random().expect("urandom");
        assert!(check_room(&id, 4095).is_ok());
        let error = check_room(&id, 4096).expect_err("one too many");
        assert!(error.is(Code::NoCapacity) && error.fields.number("max") == Some(4096), "{error}");
    }
}
