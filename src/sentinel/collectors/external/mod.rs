//! External plugins: programs in any language, one directory each with a `plugin.toml` (docs/plugins.md).
//!
//! A native plugin is one process for all its tasks, with requests under way side by side; an execd plugin is one process
//! for each task. A program that hangs, floods or says nonsense is ended with its process group and started again after
//! a pause that doubles; five ends in a row without a good run in between stop it until its files change. A new version
//! greets before the old one goes.

mod found;
mod instance;
mod process;
mod values;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use mio::event::Event as Ready;

use super::checked;
use crate::sentinel::collect::{Cancelled, Finished, Gatherer, Io, Plan, Run, Service, Settings, Stats};
use crate::sentinel::plugin::{FieldError, FieldType, Form, Manifest, Schema, Values};
use crate::sentinel::schedule::RunId;
use crate::sentinel::task::Task;
use found::Found;
use instance::{Asked, Event, Instance, Said, form};
use process::{Pipe, Process, of_number};

/// The first pause before a plugin is started again; it doubles up to the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// Ends in a row without a good run in between that stop a plugin.
const CRASH_LOOP: u32 = 5;
/// How long a program has to answer a cancelled request, to end after `close`, or to leave its exit status.
const GRACE: Duration = Duration::from_secs(1);
/// An execd program that has said something and then nothing for this long has said all of it.
const QUIET: Duration = Duration::from_secs(1);
/// How often what must be waited for is looked at.
const LOOK: Duration = Duration::from_millis(25);

/// The service.
pub struct External {
    directory: Option<PathBuf>,
    reload: Duration,
    testing: bool,
    stats: Arc<Stats>,
    next_scan: Option<Instant>,
    plugins: BTreeMap<String, Plugin>,
    instances: HashMap<u64, Instance>,
    runs: HashMap<RunId, (Run, u64)>,
    next_key: u64,
    look_at: Option<Instant>,
}

struct Plugin {
    found: Found,
    /// The native form's process.
    current: Option<u64>,
    /// A new version's process that has not greeted yet, with what it is of.
    candidate: Option<(u64, Found)>,
    /// A version that did not greet is not tried again.
    refused: Option<[u8; 32]>,
    /// The execd form's processes by task.
    tasks: HashMap<String, u64>,
    crashes: u32,
    not_before: Instant,
    last_end: String,
}

struct ExternalPlan {
    manifest: Arc<Manifest>,
    device: Values,
    config: Values,
    /// Passwords, so that no error shows them.
    secrets: Vec<String>,
}

impl External {
    /// The service.
    pub fn new(settings: &Settings, stats: &Arc<Stats>) -> Self {
        let mut external = Self {
            directory: settings.plugin_directory.clone(),
            reload: settings.plugin_reload,
            testing: settings.testing,
            stats: Arc::clone(stats),
            next_scan: None,
            plugins: BTreeMap::new(),
            instances: HashMap::new(),
            runs: HashMap::new(),
            next_key: 0,
            look_at: None,
        };
        // The first search needs no loop: nothing runs yet.
        let now = Instant::now();
        for (name, found) in external.search() {
            external.plugins.insert(name, Plugin::new(found, now));
        }
        external.counted();
        external.next_scan = external.after_scan(now);
        external
    }

    fn search(&self) -> BTreeMap<String, Found> {
        let Some(directory) = &self.directory else { return BTreeMap::new() };
        let (found, wrong) = found::search(directory);
        wrong.iter().for_each(|wrong| log::warn!("plugins: {wrong}"));
        found
    }

    fn after_scan(&self, now: Instant) -> Option<Instant> {
        (self.directory.is_some() && !self.reload.is_zero()).then(|| now + self.reload)
    }

    fn counted(&self) {
        self.stats.plugins.store(self.plugins.len() as u64, Ordering::Relaxed);
    }

    /// Takes up new plugins, replaces changed ones and closes those that are gone.
    fn scan(&mut self, io: &mut Io<'_>) {
        self.next_scan = self.after_scan(io.now);
        let found = self.search();
        let gone: Vec<String> = self.plugins.keys().filter(|name| !found.contains_key(*name)).cloned().collect();
        for name in gone {
            log::info!("plugin {name}: is gone");
            self.plugins.remove(&name);
            self.retire_all(&name, None, io);
        }
        for (name, found) in found {
            let Some(plugin) = self.plugins.get_mut(&name) else {
                log::info!("plugin {name}: version {} is new", found.manifest.version);
                self.plugins.insert(name, Plugin::new(found, io.now));
                continue;
            };
            if plugin.found.hash == found.hash || plugin.refused == Some(found.hash) || plugin.candidate.is_some() {
                continue;
            }
            let live = plugin.current.is_some_and(|key| self.instances.get(&key).is_some_and(|i| i.ready));
            if live && form(&found.manifest) == Form::Native {
                self.next_key += 1;
                let key = self.next_key;
                match self.start(&name, &found, None, key, io) {
                    Ok(()) => _ = self.plugins.get_mut(&name).map(|plugin| plugin.candidate = Some((key, found))),
                    Err(e) => self.refuse(&name, found.hash, &e),
                }
            } else {
                self.replace(&name, found, None, io);
            }
        }
        self.counted();
    }

    fn refuse(&mut self, name: &str, hash: [u8; 32], why: &str) {
        log::error!("plugin {name}: the new version is not taken, the old one goes on: {why}");
        if let Some(plugin) = self.plugins.get_mut(name) {
            plugin.refused = Some(hash);
            plugin.candidate = None;
        }
    }

    fn replace(&mut self, name: &str, found: Found, current: Option<u64>, io: &mut Io<'_>) {
        log::info!("plugin {name}: version {} takes over", found.manifest.version);
        self.retire_all(name, current, io);
        if let Some(plugin) = self.plugins.get_mut(name) {
            *plugin = Plugin { current, ..Plugin::new(found, io.now) };
        }
    }

    /// Every process of a plugin but one takes no more runs; those without any are closed.
    fn retire_all(&mut self, name: &str, but: Option<u64>, io: &mut Io<'_>) {
        let keys: Vec<u64> = self.instances.iter().filter(|(_, i)| i.plugin == name).map(|(key, _)| *key).collect();
        for key in keys.into_iter().filter(|key| Some(*key) != but) {
            self.retire(key, io);
        }
    }

    fn retire(&mut self, key: u64, io: &Io<'_>) {
        let Some(instance) = self.instances.get_mut(&key) else { return };
        instance.retired = true;
        if instance.runs().is_empty() && instance.ending.is_none() {
            if form(&instance.manifest) == Form::Native && instance.ready {
                // A program that cannot be told is ended all the same.
                let _ = instance.ask(Asked::Close, &[]);
            }
            instance.process.close_input(io);
            instance.ending = Some((io.now, "closed".into()));
            self.look_at = Some(io.now + LOOK);
        }
    }

    fn start(
        &mut self,
        name: &str,
        found: &Found,
        run: Option<(&Task, &ExternalPlan)>,
        key: u64,
        io: &Io<'_>,
    ) -> Result<(), String> {
        let Some(program) = &found.manifest.program else { return Err("the plugin has no program".into()) };
        let environment = run.map(|(_, plan)| values::environment(&plan.device, &plan.config)).unwrap_or_default();
        let process = Process::start(program, &found.directory, &environment, key, io)
            .map_err(|e| format!("cannot start {}: {e}", program.command[0]))?;
        let (task, deadline) = (run.map(|(task, _)| task.id.clone()), io.now + program.start_timeout);
        log::debug!("plugin {name}: started as process {}", process.id());
        let mut instance = Instance::new(name, Arc::clone(&found.manifest), process, task, deadline);
        if !instance.ready {
            let version = env!("CARGO_PKG_VERSION").to_string();
            let protocol = crate::wire::PROTOCOL_VERSION.to_string();
            instance.ask(Asked::Hello, &[("protocol".into(), protocol), ("version".into(), version)])?;
        }
        self.instances.insert(key, instance);
        self.look_at = Some(io.now + LOOK);
        Ok(())
    }

    /// The process that a run goes to, started where there is none.
    fn process_for(&mut self, run: &Run, plan: &ExternalPlan, io: &Io<'_>) -> Result<u64, String> {
        let name = &run.task.plugin;
        let Some(plugin) = self.plugins.get(name) else { return Err(format!("there is no plugin {name:?}")) };
        let native = form(&plugin.found.manifest) == Form::Native;
        let known = if native { plugin.current } else { plugin.tasks.get(&run.task.id).copied() };
        if let Some(key) = known
            && self.instances.get(&key).is_some_and(|instance| instance.ending.is_none())
        {
            return Ok(key);
        }
        if plugin.crashes >= CRASH_LOOP {
            return Err(format!(
                "the plugin ended {} times in a row and is stopped: {}",
                plugin.crashes, plugin.last_end
            ));
        }
        if plugin.not_before > io.now {
            let pause = plugin.not_before.saturating_duration_since(io.now).as_secs() + 1;
            return Err(format!("the plugin is started again in {pause} s: {}", plugin.last_end));
        }
        let found = plugin.found.clone();
        if plugin.crashes > 0 {
            self.stats.plugin_restarts.fetch_add(1, Ordering::Relaxed);
        }
        self.next_key += 1;
        let key = self.next_key;
        let of_task = (!native).then_some((&*run.task, plan));
        if let Err(e) = self.start(name, &found, of_task, key, io) {
            self.crashed(name, &e, io.now);
            return Err(e);
        }
        if let Some(plugin) = self.plugins.get_mut(name) {
            match native {
                true => plugin.current = Some(key),
                false => _ = plugin.tasks.insert(run.task.id.clone(), key),
            }
        }
        Ok(key)
    }

    fn crashed(&mut self, name: &str, why: &str, now: Instant) {
        let Some(plugin) = self.plugins.get_mut(name) else { return };
        plugin.crashes += 1;
        plugin.not_before = now + (FIRST_PAUSE * (1 << (plugin.crashes - 1).min(10))).min(LONGEST_PAUSE);
        plugin.last_end = why.to_string();
        match plugin.crashes {
            CRASH_LOOP => log::error!("plugin {name}: stopped after {CRASH_LOOP} ends in a row: {why}"),
            _ => log::warn!("plugin {name}: {why}"),
        }
    }

    /// Sends a run's next request.
    fn go_on(&mut self, id: RunId, after: Option<Asked>, io: &mut Io<'_>) {
        let Some((run, key)) = self.runs.get(&id) else { return };
        let (run, key) = (run.clone(), *key);
        let Some(plan) = run.plan::<ExternalPlan>() else { return };
        let Some(instance) = self.instances.get_mut(&key) else { return };
        let next = match after {
            None if !instance.validated.contains(&run.task.id) => Asked::Validate(id),
            Some(Asked::Validate(_)) if self.testing => Asked::Test(id),
            _ => Asked::Collect(id),
        };
        if matches!(after, Some(Asked::Validate(_))) {
            instance.validated.insert(run.task.id.clone());
        }
        let mut arguments = vec![("task".to_string(), run.task.id.clone())];
        arguments.extend(values::arguments(&plan.device, &plan.config));
        if matches!(next, Asked::Collect(_)) {
            let left = run.deadline.saturating_duration_since(io.now).as_millis();
            arguments.push(("timeout_ms".into(), left.to_string()));
        }
        instance.process.written = 0;
        if let Err(e) = instance.ask(next, &arguments) {
            self.done(id, Err(e), io);
        }
    }

    fn done(&mut self, id: RunId, result: Result<(), String>, io: &mut Io<'_>) {
        let Some((run, key)) = self.runs.remove(&id) else { return };
        let Some(instance) = self.instances.get_mut(&key) else { return };
        let said = instance.said.remove(&id).unwrap_or_default();
        let manifest = Arc::clone(&instance.manifest);
        let (name, retired) = (instance.plugin.clone(), instance.retired);
        if result.is_ok() {
            self.plugins.get_mut(&name).iter_mut().for_each(|plugin| plugin.crashes = 0);
        }
        let finished = measured(&run, &manifest, said, result, io);
        io.finish(id, finished);
        if retired {
            self.retire(key, io);
        }
    }

    /// Ends a process because of what it did.
    fn fatal(&mut self, key: u64, why: String, io: &mut Io<'_>) {
        let Some(instance) = self.instances.get_mut(&key) else { return };
        if instance.ending.is_none() {
            instance.process.kill();
            instance.process.close(io);
            instance.ending = Some((io.now, why));
        }
        self.look_at = Some(io.now + LOOK);
    }

    fn heard(&mut self, key: u64, octets: &[u8], io: &mut Io<'_>) {
        let Some(instance) = self.instances.get_mut(&key) else { return };
        let limit = instance.manifest.program.as_ref().map_or(usize::MAX, |program| program.output);
        if instance.process.written > limit {
            return self.fatal(key, format!("the plugin wrote more than {limit} octets in one run"), io);
        }
        for event in instance.heard(octets, io.now) {
            match event {
                Event::Greeted => self.greeted(key, io),
                Event::GoOn(run, asked) => self.go_on(run, Some(asked), io),
                Event::Done(run, result) => self.done(run, result, io),
                Event::Fatal(why) => return self.fatal(key, why, io),
            }
        }
    }

    fn greeted(&mut self, key: u64, io: &mut Io<'_>) {
        let Some(instance) = self.instances.get_mut(&key) else { return };
        let (name, queue) = (instance.plugin.clone(), std::mem::take(&mut instance.queue));
        let candidate = self.plugins.get_mut(&name).and_then(|plugin| plugin.candidate.take_if(|(of, _)| *of == key));
        if let Some((_, found)) = candidate {
            self.replace(&name, found, Some(key), io);
        }
        for run in queue {
            self.go_on(run, None, io);
        }
    }

    /// A process has ended, or is as good as ended: its runs fail.
    fn ended(&mut self, key: u64, why: &str, io: &mut Io<'_>) {
        let Some(mut instance) = self.instances.remove(&key) else { return };
        instance.process.close(io);
        let runs = instance.runs();
        let manifest = Arc::clone(&instance.manifest);
        for id in runs {
            let Some((run, _)) = self.runs.remove(&id) else { continue };
            let said = instance.said.remove(&id).unwrap_or_default();
            let finished = measured(&run, &manifest, said, Err(why.to_string()), io);
            io.finish(id, finished);
        }
        let Some(plugin) = self.plugins.get_mut(&instance.plugin) else { return };
        if let Some((_, found)) = plugin.candidate.take_if(|(of, _)| *of == key) {
            return self.refuse(&instance.plugin, found.hash, why);
        }
        let was_used = plugin.current == Some(key) || plugin.tasks.values().any(|of| *of == key);
        plugin.current.take_if(|of| *of == key);
        plugin.tasks.retain(|_, of| *of != key);
        if was_used && !instance.retired {
            self.crashed(&instance.plugin, why, io.now);
        }
    }

    /// Looks at everything that has a time: handshakes, quiet, ends.
    fn look(&mut self, io: &mut Io<'_>) {
        let keys: Vec<u64> = self.instances.keys().copied().collect();
        for key in keys {
            let Some(instance) = self.instances.get_mut(&key) else { continue };
            if let Some((since, why)) = instance.ending.clone() {
                match instance.process.ended() {
                    Some(status) if why == "ended" => self.ended(key, &format!("the plugin ended: {status}"), io),
                    Some(_) => self.ended(key, &why, io),
                    None if since + GRACE <= io.now => instance.process.kill(),
                    None => {}
                }
                continue;
            }
            if !instance.ready && instance.start_deadline <= io.now {
                self.fatal(key, "the plugin did not greet in time".into(), io);
                continue;
            }
            let quiet = instance.said.iter().find(|(_, said)| said.last.is_some_and(|last| last + QUIET <= io.now));
            if let Some((run, _)) = quiet {
                let run = *run;
                self.done(run, Ok(()), io);
            }
        }
        // Nothing to wait for: nothing to look at.
        let waits = self.instances.values().any(|instance| {
            instance.ending.is_some()
                || !instance.ready
                || instance.owing.is_some()
                || (instance.task.is_some() && !instance.said.is_empty())
        });
        self.look_at = waits.then(|| io.now + LOOK);
    }

    fn read_more(&mut self, key: u64, pipe: Pipe, io: &mut Io<'_>) {
        let Some(instance) = self.instances.get_mut(&key) else { return };
        let (octets, more, ended) = instance.process.read(pipe, io);
        instance.more = if more { Some(io.now) } else { instance.more.filter(|_| pipe == Pipe::Errors) };
        if pipe == Pipe::Errors {
            let minute = io.now.saturating_duration_since(instance.started).as_secs() / 60;
            instance.errors.push(&instance.plugin, &octets, minute);
            return;
        }
        self.heard(key, &octets, io);
        if ended {
            self.over(key, io);
        }
    }

    /// A program has ended, or closed its output and is about to.
    fn over(&mut self, key: u64, io: &Io<'_>) {
        if let Some(instance) = self.instances.get_mut(&key) {
            instance.ending.get_or_insert((io.now, "ended".into()));
            self.look_at = Some(io.now);
        }
    }

    fn owed(&mut self, io: &mut Io<'_>) {
        let owing: Vec<u64> = self
            .instances
            .iter()
            .filter(|(_, i)| i.owing.is_some_and(|until| until <= io.now) && i.ending.is_none())
            .map(|(key, _)| *key)
            .collect();
        for key in owing {
            if let Some(instance) = self.instances.get_mut(&key)
                && !instance.owes()
            {
                instance.owing = None;
                continue;
            }
            self.fatal(key, "the plugin did not end a run that was cancelled".into(), io);
        }
    }
}

impl Plugin {
    fn new(found: Found, now: Instant) -> Self {
        Self {
            found,
            current: None,
            candidate: None,
            refused: None,
            tasks: HashMap::new(),
            crashes: 0,
            not_before: now,
            last_end: String::new(),
        }
    }
}

fn measured(run: &Run, manifest: &Manifest, said: Said, result: Result<(), String>, io: &Io<'_>) -> Finished {
    let mut out = Gatherer::new(io.table, &run.task.labels, run.started_ms);
    let mut error = result.err();
    let mut take = |taken: Result<(), String>| _ = taken.err().map(|e| error.get_or_insert(e).clone());
    said.items.iter().for_each(|fields| take(values::item(fields, manifest, &mut out)));
    for (channel, body) in &said.bodies {
        let body = String::from_utf8_lossy(body);
        let openmetrics =
            manifest.program.as_ref().is_some_and(|p| p.format == crate::sentinel::plugin::Format::Openmetrics);
        match channel.as_str() {
            "openmetrics" => take(values::exposition_body(&body, &mut out)),
            "" if openmetrics => take(values::exposition_body(&body, &mut out)),
            "influx" | "" => body.lines().for_each(|line| take(values::influx_line(line, manifest, &mut out))),
            other => take(Err(format!("the plugin sends on channel {other}, expected influx or openmetrics"))),
        }
    }
    if let (Some(error), Some(plan)) = (&mut error, run.plan::<ExternalPlan>()) {
        plan.secrets.iter().for_each(|secret| *error = error.replace(secret, "***"));
    }
    Finished { gathered: out.done(), error }
}

fn secrets(schema: &Schema, values: &Values) -> Vec<String> {
    let passwords = schema.0.iter().filter(|field| matches!(field.kind, FieldType::Password));
    passwords.map(|field| values.text(&field.name).to_string()).filter(|secret| !secret.is_empty()).collect()
}

fn plan_of(manifest: &Arc<Manifest>, task: &Task) -> Result<ExternalPlan, FieldError> {
    let (device, config) = checked(manifest, task)?;
    let mut known = secrets(&manifest.device, &device);
    known.extend(secrets(&manifest.config, &config));
    Ok(ExternalPlan { manifest: Arc::clone(manifest), device, config, secrets: known })
}

impl Service for External {
    fn prepare(&mut self, task: &Task) -> Result<Plan, FieldError> {
        let Some(plugin) = self.plugins.get(&task.plugin) else {
            return Err(FieldError::new("plugin", format!("there is no plugin {:?}", task.plugin)));
        };
        Ok(Arc::new(plan_of(&plugin.found.manifest, task)?))
    }

    fn begin(&mut self, mut run: Run, io: &mut Io<'_>) {
        let id = run.id;
        // A new version may have come since the plan was made.
        if let Some(plugin) = self.plugins.get(&run.task.plugin)
            && run.plan::<ExternalPlan>().is_some_and(|plan| !Arc::ptr_eq(&plan.manifest, &plugin.found.manifest))
        {
            match plan_of(&plugin.found.manifest, &run.task) {
                Ok(plan) => run.plan = Arc::new(plan),
                Err(e) => return io.finish(id, Finished::failure(e.to_string())),
            }
        }
        let plan = Arc::clone(&run.plan);
        let Some(plan) = plan.downcast_ref::<ExternalPlan>() else { return };
        let key = match self.process_for(&run, plan, io) {
            Ok(key) => key,
            Err(e) => return io.finish(id, Finished::failure(e)),
        };
        self.runs.insert(id, (run, key));
        let Some(instance) = self.instances.get_mut(&key) else { return };
        if form(&instance.manifest) == Form::Execd {
            instance.process.written = 0;
            instance.said.insert(id, Said::default());
            self.look_at = Some(io.now + LOOK);
            if let Err(e) = instance.process.send(b"\n") {
                self.done(id, Err(e), io);
            }
        } else if instance.ready {
            self.go_on(id, None, io);
        } else {
            instance.queue.push(id);
        }
    }

    fn cancel(&mut self, id: RunId, io: &mut Io<'_>) -> Cancelled {
        let Some((run, key)) = self.runs.remove(&id) else { return Cancelled::Gone(Finished::default()) };
        let Some(instance) = self.instances.get_mut(&key) else { return Cancelled::Gone(Finished::default()) };
        if instance.task.is_some() {
            let said = instance.said.remove(&id).unwrap_or_default();
            let manifest = Arc::clone(&instance.manifest);
            let silent = said.last.is_none();
            let finished = measured(&run, &manifest, said, Err("the plugin's answer did not end".into()), io);
            if silent {
                self.fatal(key, "the plugin did not answer before the deadline".into(), io);
            }
            return Cancelled::Gone(finished);
        }
        match instance.cancel(id) {
            Some(Err(e)) => self.fatal(key, e, io),
            Some(Ok(())) => {
                instance.owing.get_or_insert(io.now + GRACE);
                self.look_at.get_or_insert(io.now + LOOK);
            }
            None => {}
        }
        Cancelled::Gone(Finished::failure("the plugin did not answer"))
    }

    fn ready(&mut self, number: u64, _event: &Ready, io: &mut Io<'_>) {
        let (key, pipe) = of_number(number);
        let Some(instance) = self.instances.get_mut(&key) else { return };
        match pipe {
            Pipe::Input => instance.process.flush(),
            Pipe::Output | Pipe::Errors => self.read_more(key, pipe, io),
            Pipe::End => {
                // What it said last comes first.
                self.read_more(key, Pipe::Output, io);
                self.over(key, io);
            }
        }
    }

    fn wake_at(&self) -> Option<Instant> {
        let more = self.instances.values().filter_map(|instance| instance.more);
        more.chain(self.next_scan).chain(self.look_at).min()
    }

    fn wake(&mut self, io: &mut Io<'_>) {
        let keys: Vec<u64> = self.instances.iter().filter(|(_, i)| i.more.is_some()).map(|(key, _)| *key).collect();
        for key in keys {
            for pipe in [Pipe::Output, Pipe::Errors] {
                self.read_more(key, pipe, io);
            }
        }
        if self.next_scan.is_some_and(|at| at <= io.now) {
            self.scan(io);
        }
        if self.look_at.is_some_and(|at| at <= io.now) {
            self.owed(io);
            self.look(io);
        }
    }

    fn forget(&mut self, task: &str, io: &mut Io<'_>) {
        self.instances.values_mut().for_each(|instance| _ = instance.validated.remove(task));
        let of_task: Vec<u64> = self.plugins.values_mut().filter_map(|plugin| plugin.tasks.remove(task)).collect();
        for key in of_task {
            self.retire(key, io);
        }
    }

    fn close(&mut self) {
        for instance in self.instances.values_mut() {
            if form(&instance.manifest) == Form::Native && instance.ready && instance.ending.is_none() {
                // One that does not hear is killed below.
                let _ = instance.ask(Asked::Close, &[]);
            }
        }
        // Those that end by themselves within the grace do so; dropping kills the others.
        let until = Instant::now() + GRACE;
        while Instant::now() < until && self.instances.values_mut().any(|instance| instance.process.ended().is_none()) {
            std::thread::sleep(LOOK);
        }
        self.instances.clear();
    }
}

/// Runs a plugin by itself, from its directory: `sentinel plugin test`. The name that tasks give it.
pub fn name_of(directory: &Path) -> Result<String, String> {
    found::load(directory).map(|found| found.manifest.name.clone())
}

#[cfg(test)]
mod tests;
