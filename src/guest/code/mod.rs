//! Code: sources run by runners of their language, each run with bounds of its own. docs/code.md.
//!
//! A context is a process (`context`) that runs one source after the other; a run without one gets its own, which ends
//! with it. A run (`run`) is a program's entry without a process: its streams are those of the context for as long as
//! it has it. What a runner says is hostile (`control`); it can end its own run and nothing else.

mod artifacts;
mod context;
mod control;
mod launch;
mod run;
mod verbs;

use std::time::{Duration, Instant};

use artifacts::PATIENCE;
pub(super) use artifacts::Told;
pub(super) use context::Context;
use context::{Heard, Process};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use control::Lines;
use control::Word;
pub(super) use run::Run;
use run::{How, Limits, Stage};

use super::agent::{Agent, Due};
use super::children::failed_to_start;
use super::exec::Born;
use super::tasks::{Flow, Report};
use crate::wire::{Code, Error, Fields, Message};

/// Processes and threads of a context at most.
const TASKS_MAX: u64 = 256;
/// How long code may take to heed an interrupt, once its time is up.
const GRACE: Duration = Duration::from_secs(3);

impl Agent {
    fn run_of(&mut self, id: u64) -> Option<&mut Run> {
        self.execs.get_mut(&id)?.run.as_deref_mut()
    }

    /// Gives a context to the run that is next.
    fn next_run(&mut self, number: u64) {
        let Some(context) = self.contexts.get_mut(&number) else { return };
        if context.current.is_some() || context.process.is_none() {
            return;
        }
        let Some(id) = context.queue.pop_front() else { return };
        if let Err(error) = self.begin_run(number, id) {
            self.conclude_run(id, Err(error));
            self.next_run(number);
        }
    }

    fn begin_run(&mut self, number: u64, id: u64) -> Result<(), Error> {
        let lost = || Error::new(Code::Internal, "a run was begun that is not there");
        let context = self.contexts.get_mut(&number).ok_or_else(lost)?;
        let process = context.process.as_mut().ok_or_else(lost)?;
        let exec = self.execs.get_mut(&id).ok_or_else(lost)?;
        let failed = |e: std::io::Error| Error::new(Code::NoCapacity, format!("the run's streams: {e}"));
        let [stdout, stderr, result] = process.open_pipes(&mut self.scratch).map_err(failed)?;
        let registry = self.poll.registry();
        super::agent::watch_outputs(registry, id, [&stdout, &stderr, &result]).map_err(failed)?;
        exec.stdout.open(stdout);
        exec.stderr.open(stderr);
        exec.result.open(result);
        let run = exec.run.as_deref_mut().ok_or_else(lost)?;
        if context.start.runner {
            let mode = if context.kept { "keep" } else { "once" };
            process.tell(format!("run {id} {} {mode}\n", run.source.len()).as_bytes());
            process.tell(&std::mem::take(&mut run.source));
        }
        let now = Instant::now();
        run.stage = Stage::Running;
        run.began = Some((now, artifacts::now(), process.measure()));
        context.current = Some(id);
        context.runs += 1;
        let deadline = now + run.timeout;
        exec.deadline = Some(deadline);
        self.due.insert((deadline, Due::Timeout(id)));
        self.busy_contexts.insert(number);
        self.busy_execs.insert(id);
        Ok(())
    }

    /// Visits the contexts that something happened to.
    pub(super) fn serve_contexts(&mut self) {
        while let Some(number) = self.busy_contexts.pop_first() {
            let Some(context) = self.contexts.get_mut(&number) else { continue };
            let Some(process) = &mut context.process else { continue };
            match process.birth() {
                Born::NotYet => {}
                Born::Failed(failure) => {
                    let error = failed_to_start(&context.start.language, failure);
                    self.lose_process(number, "its interpreter could not be started", Some(error));
                    continue;
                }
                Born::Runs => {}
            }
            process.flush();
            match process.listen() {
                Heard::Words(words) => {
                    for Word::Done { run, exit } in words {
                        if self.contexts.get(&number).is_some_and(|context| context.current == Some(run)) {
                            self.end_run(run, How::Done(exit));
                        }
                    }
                }
                // Without it one run can still come to its end, but there cannot be another.
                Heard::Lost(_) if !context.kept => {}
                Heard::Lost(why) => {
                    context.ended = Some(why.to_string());
                    process.kill();
                }
            }
        }
    }

    /// A process was reaped. `false` when it is no context's.
    pub(super) fn context_reaped(&mut self, pid: libc::pid_t, status: libc::c_int) -> bool {
        let of = |context: &Context| context.process.as_ref().is_some_and(|process| process.pid == pid);
        let Some(number) = self.contexts.iter().find(|(_, context)| of(context)).map(|(number, _)| *number) else {
            return false;
        };
        let Some(context) = self.contexts.get_mut(&number) else { return true };
        // What it said last counts, and that it was never more than a failure to start.
        if let Some(process) = &mut context.process {
            if let Born::Failed(failure) = process.birth() {
                let error = failed_to_start(&context.start.language, failure);
                self.lose_process(number, "its interpreter could not be started", Some(error));
                return true;
            }
            let current = context.current;
            let mut how = How::Exit(status);
            if let Heard::Words(words) = process.listen() {
                let done = words.iter().find_map(|Word::Done { run, exit }| (Some(*run) == current).then_some(*exit));
                how = done.map_or(how, How::Done);
            }
            process.kill_rest();
            if let Some(id) = current {
                self.end_run(id, how);
            }
        }
        let how = match libc::WIFSIGNALED(status) {
            true => format!("its interpreter was ended by signal {}", libc::WTERMSIG(status)),
            false => format!("its interpreter ended with {}", libc::WEXITSTATUS(status)),
        };
        self.lose_process(number, &how, None);
        true
    }

    /// A context has no process any more. A run that has it ends with `error`, where there is one.
    fn lose_process(&mut self, number: u64, why: &str, error: Option<Error>) {
        let Some(context) = self.contexts.get_mut(&number) else { return };
        let process = context.process.take();
        let why = context.ended.get_or_insert_with(|| why.to_string()).clone();
        let waiting: Vec<u64> = context.queue.drain(..).collect();
        let current = context.current.filter(|_| error.is_some());
        self.forget_process(process);
        if let (Some(id), Some(error)) = (current, error) {
            self.conclude_run(id, Err(error));
        }
        for id in waiting {
            let error = Error::new(Code::BadState, format!("context {number} has ended: {why}"));
            self.conclude_run(id, Err(error.with("context", number)));
        }
    }

    /// Kills what is left of a process and gives its cgroup back.
    fn forget_process(&mut self, process: Option<Process>) {
        let Some(mut process) = process else { return };
        if let Some(cgroup) = process.cgroup.take() {
            cgroup.kill();
            if let Some(users) = &mut self.users {
                users.retire(cgroup);
            }
        }
    }

    /// A run's time is up, or nobody waits for it any more: an interrupt first where others are to follow.
    pub(super) fn stop_run(&mut self, id: u64) {
        let Some(exec) = self.execs.get_mut(&id) else { return };
        let Some(run) = exec.run.as_deref_mut() else { return };
        match run.stage {
            Stage::Source | Stage::Pending => {
                let number = run.context;
                if let Some(context) = number.and_then(|number| self.contexts.get_mut(&number)) {
                    context.queue.retain(|&other| other != id);
                }
                self.conclude_run(id, Err(Error::new(Code::Cancelled, "cancelled before it ran")));
            }
            Stage::Running => {
                let Some(context) = run.context.and_then(|number| self.contexts.get(&number)) else { return };
                let Some(process) = &context.process else { return };
                if context.kept {
                    process.signal(libc::SIGINT);
                    self.due.insert((Instant::now() + GRACE, Due::Grace(id)));
                } else {
                    process.kill();
                }
            }
            Stage::Settling | Stage::Looking => {}
        }
    }

    /// The time of a run is up.
    pub(super) fn time_out_run(&mut self, id: u64) {
        if let Some(run) = self.run_of(id).filter(|run| run.stage == Stage::Running) {
            run.timed_out = true;
            self.stop_run(id);
        }
    }

    /// It did not heed the interrupt: its context goes with it.
    pub(super) fn end_by_force(&mut self, id: u64) {
        let Some(run) = self.run_of(id).filter(|run| run.stage == Stage::Running) else { return };
        let Some(number) = run.context else { return };
        if let Some(context) = self.contexts.get_mut(&number)
            && let Some(process) = &context.process
        {
            context.ended = Some("its code did not end when it was interrupted".to_string());
            process.kill();
        }
    }

    /// A run's client cancelled it.
    pub(super) fn cancel_run(&mut self, id: u64) {
        if let Some(run) = self.run_of(id) {
            run.cancelled = true;
            self.stop_run(id);
        }
    }

    /// A run has ended; its output is still to be read.
    fn end_run(&mut self, id: u64, how: How) {
        let Some(exec) = self.execs.get_mut(&id) else { return };
        let Some(run) = exec.run.as_deref_mut().filter(|run| run.stage == Stage::Running) else { return };
        let Some(context) = run.context.and_then(|number| self.contexts.get(&number)) else { return };
        let measure = context.process.as_ref().map(Process::measure).unwrap_or_default();
        let took = run.began.as_ref().map(|(began, ..)| began.elapsed()).unwrap_or_default();
        run.ended = Some((how, took, measure));
        run.stage = Stage::Settling;
        if let (false, Some(process)) = (context.kept, &context.process) {
            // It may be reaped already; what it started is in its cgroup.
            process.kill_rest();
        }
        if let Some(deadline) = exec.deadline.take() {
            self.due.remove(&(deadline, Due::Timeout(id)));
        }
        exec.outputs().for_each(super::exec::Output::cut);
        self.busy_execs.insert(id);
        if self.run_of(id).is_some_and(|run| run.cancelled) {
            self.answer_run(id, true);
        }
    }

    /// All of a run's output was read: now to its files.
    pub(super) fn settled(&mut self, id: u64) {
        let root = self.settings.cwd.clone();
        let Some(run) = self.run_of(id).filter(|run| run.stage == Stage::Settling) else { return };
        run.stage = Stage::Looking;
        let since = run.began.as_ref().map_or((0, 0), |(_, since, _)| *since);
        let told = self.told.clone();
        let look = move |_: &super::tasks::Desk| {
            let found = artifacts::changed(&root, since, &told);
            let fields = Fields::new().with("incomplete", found.incomplete);
            Ok(found.lines.iter().fold(fields, |fields, line| fields.with_bytes("line", line)))
        };
        match self.tasks.run(&self.poll, Self::TASKS, 0, "", Flow::Answer, look) {
            Ok(task) => {
                self.own_tasks.insert(task.number, (task, id));
                self.due.insert((Instant::now() + PATIENCE * 2, Due::Artifacts(id)));
            }
            Err(_) => self.answer_run(id, false),
        }
    }

    /// Whether a run's output was read to its end, and nothing more was done about it.
    pub(super) fn is_settled(exec: &mut super::exec::Exec) -> bool {
        exec.run.as_deref().is_some_and(|run| run.stage == Stage::Settling)
            && exec.outputs().all(|output| output.is_closed())
    }

    /// A thread of the agent's own has come back.
    pub(super) fn own_task_reported(&mut self, report: &Report) {
        let Some((_, id)) = self.own_tasks.remove(&report.number) else { return };
        let Message::Ok { fields, .. } = &report.message else { return self.answer_run(id, false) };
        if let Some(exec) = self.execs.get_mut(&id)
            && exec.run.as_deref().is_some_and(|run| run.stage == Stage::Looking)
        {
            for (_, line) in fields.0.iter().filter(|(key, _)| key == "line") {
                exec.result.append(line);
            }
            self.answer_run(id, fields.get("incomplete") == Some("false"));
        }
    }

    /// The files were looked for long enough.
    pub(super) fn answer_without_files(&mut self, id: u64) {
        if self.run_of(id).is_some_and(|run| run.stage == Stage::Looking) {
            self.answer_run(id, false);
        }
    }

    fn answer_run(&mut self, id: u64, complete: bool) {
        let Some(run) = self.run_of(id) else { return };
        let number = run.context;
        let context = number.and_then(|number| self.contexts.get(&number));
        let gone = context.is_none_or(|context| context.process.is_none() || context.ended.is_some());
        let memory_mib = context.map_or(0, |context| context.start.memory_mib.unwrap_or(0));
        let limits = Limits { memory_mib, tasks: TASKS_MAX };
        let answer = match self.run_of(id) {
            Some(run) => run.answer(limits, gone, complete),
            None => return,
        };
        self.conclude_run(id, answer);
    }

    /// Gives a run its answer and its context to the next.
    fn conclude_run(&mut self, id: u64, answer: Result<Fields, Error>) {
        let Some(exec) = self.execs.get_mut(&id) else { return };
        let attached = exec.attached.is_some();
        if let Some(deadline) = exec.deadline.take() {
            self.due.remove(&(deadline, Due::Timeout(id)));
        }
        let run = exec.run.as_deref_mut();
        let (number, cancelled) = run.map_or((None, false), |run| (run.context, run.cancelled));
        exec.conclude(answer);
        self.finished.push_back(id);
        if cancelled && !attached {
            self.forget(id);
        } else {
            self.busy_execs.insert(id);
        }
        let Some(number) = number else { return };
        let Some(context) = self.contexts.get_mut(&number) else { return };
        if context.current == Some(id) {
            context.current = None;
        }
        if context.kept {
            self.next_run(number);
        } else if let Some(mut context) = self.contexts.remove(&number) {
            let process = context.process.take();
            self.forget_process(process);
        }
    }
}
