//! Building templates: `template.build`, `template.step`, `template.commit`, `template.publish`.
//!
//! A build is a sandbox, the builder, and a request of the client that has it built, `template.build`. The client has the
//! builder's programs do the work; the node never looks at what they do it to. The end of the request, whatever ends it,
//! takes the builder and all that was made so far. A builder has a label by which the next supervisor knows it and takes it
//! down; what is made of its disk has no name until it is whole (`storage::template_file`).

use std::collections::BTreeSet;
use std::fs::File;
use std::net::SocketAddrV4;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::checkpoint::Want;
use super::events::BUILD_FAILED;
use super::faults::{self, Point};
use super::instance::{Awaited, Waiter};
use super::requests::Job;
use super::supervisor::{Done, Supervisor};
use crate::control::build::{BuildAsk, CommitAsk};
use crate::network::policy::{BadPolicy, Policy};
use crate::sandbox::id::SandboxId;
use crate::sandbox::lifecycle::State;
use crate::sandbox::spec::Spec;
use crate::storage::snapshots::{SnapshotKind, SnapshotRow, SnapshotState};
use crate::storage::state::{Change, TemplateRow};
use crate::storage::template_file;
use crate::storage::templates::{self, Build as Built, Defaults, Manifest, Template, TemplateError};
use crate::wire::{Code, Error, Fields, Message, Request};

/// Builds at once.
const MOST: usize = 8;

/// A template that is being built.
#[derive(Debug)]
pub(super) struct Build {
    client: u64,
    tag: String,
    /// What the template is to be called.
    name: String,
    owner: String,
    /// The sandbox that is worked in now.
    sandbox: SandboxId,
    stage: Stage,
    /// A thread that makes its image ends early.
    stop: Arc<AtomicBool>,
    /// A thread of the node has it for another purpose: no template comes of it.
    is_node: bool,
    /// What was made of the builder's disk, without a name.
    made: Option<Template>,
}

/// How far it is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Stage {
    /// A sandbox starts.
    Starting,
    /// The client has it work.
    Working,
    /// The builder stops, and its disk is made a template; with what a trial is to be.
    Committing(Box<CommitAsk>),
    /// The trial of what was made is what its snapshot is taken of.
    Trying,
    /// It gets its name.
    Publishing,
}

/// What a template is to be beside its disk.
fn manifest_of(name: &str, base: &Template, ask: &CommitAsk) -> Result<Manifest, Error> {
    let CommitAsk { user, cwd, env, start, ready, languages, key, description, .. } = ask;
    let inherited = &base.manifest.defaults;
    let manifest = Manifest {
        name: name.to_string(),
        description: description.clone().unwrap_or_else(|| format!("Built from {}", base.manifest.name)),
        sha256: [0; 32],
        size_bytes: templates::BLOCK,
        defaults: Defaults {
            user: user.unwrap_or(inherited.user),
            cwd: cwd.clone().unwrap_or_else(|| inherited.cwd.clone()),
            env: if env.is_empty() { inherited.env.clone() } else { env.clone() },
        },
        languages: languages.clone().unwrap_or_else(|| base.manifest.languages.clone()),
        build: Built { key: key.clone(), start: start.clone(), ready: ready.clone() },
    };
    manifest.checked().map_err(|error| Error::new(Code::BadArgument, error.to_string()))
}

/// What a builder of the node itself reaches beside what others do. Nobody else's ever does.
fn with_services(policy: Policy, services: BTreeSet<SocketAddrV4>, is_node: bool) -> Result<Policy, Error> {
    if !is_node {
        let message = "service= is for builders of the node itself, which install packages";
        return Err(Error::new(Code::Forbidden, message).with("argument", "service"));
    }
    let bad = |error: BadPolicy| Error::new(Code::BadArgument, error.message).with("argument", error.list);
    policy.with_services(services).map_err(bad)
}

impl Supervisor {
    /// Whether a template can get that name now.
    pub(super) fn template_name_is_free(&self, name: &str) -> Result<(), Error> {
        if !templates::is_template_name(name) {
            let message = format!("name={name} is not of the form [a-z0-9][a-z0-9._-]{{0,62}}[:TAG]");
            return Err(Error::new(Code::BadArgument, message).with("argument", "name"));
        }
        let built_in = self.catalogue.built_in();
        if built_in.iter().any(|other| other == name) {
            let message = format!("template {name} came with the node: another cannot have its name");
            return Err(Error::new(Code::AlreadyExists, message).with("template", name));
        }
        self.template_is_unused(name)
    }

    /// Whether no sandbox and no snapshot stands on a template.
    pub(super) fn template_is_unused(&self, name: &str) -> Result<(), Error> {
        let used = |what: &str, id: &str| {
            let message = format!("template {name} is used by {what} {id}");
            Err(Error::new(Code::InUse, message).with("template", name).with(what, id))
        };
        let sandboxes = self.sandboxes.values().filter(|sandbox| !sandbox.removing && sandbox.parked.is_none());
        if let Some(user) = sandboxes.filter(|sandbox| sandbox.spec.template == name).map(|sandbox| &sandbox.id).next()
        {
            return used("sandbox", user.as_str());
        }
        let lasting = |row: &&SnapshotRow| {
            row.state != SnapshotState::Removing && !matches!(row.kind, SnapshotKind::Template | SnapshotKind::Step)
        };
        match self.snapshots.store.snapshots().filter(lasting).find(|row| row.template == name) {
            Some(row) => used("snapshot", &row.id),
            None => Ok(()),
        }
    }

    /// A client wants to build a template.
    pub(super) fn ask_build(&mut self, key: u64, tag: &str, ask: BuildAsk) -> Result<(), Error> {
        let BuildAsk { name, mut spec, steps, key: digest, base, services } = ask;
        let is_node = self.clients.get(&key).is_some_and(|client| client.identity().is_node());
        if !self.config.templates.build && !is_node {
            let message = "templates are not built on this node: templates.build is false";
            return Err(Error::new(Code::Forbidden, message).with("setting", "templates.build"));
        }
        if let Ok(there) = self.catalogue.get(&name)
            && !digest.is_empty()
            && there.manifest.build.key == digest
        {
            let fields = Fields::new().with("name", &name).with("cached", true);
            let fields =
                fields.with("sha256", there.manifest.sha256_hex()).with("size_bytes", there.manifest.size_bytes);
            self.answer(key, &Message::ok(tag, fields));
            return Ok(());
        }
        if !is_node {
            // What the node builds for itself is no template.
            self.template_name_is_free(&name)?;
        }
        if let Some(base) = base {
            let manifest = &self.catalogue.get(&spec.template)?.manifest;
            if manifest.fingerprint().ok() != Some(base) {
                let message = format!("template {} is another by now", manifest.name);
                return Err(Error::new(Code::BadState, message).with("argument", "base"));
            }
        }
        if self.builds.len() >= MOST {
            let message = format!("{} builds are under way, the most at once", self.builds.len());
            return Err(Error::new(Code::NoCapacity, message).with("resource", "builds").with("max", MOST));
        }
        let Some(client) = self.clients.get(&key) else { return Ok(()) };
        let owner = client.identity().owner.clone();
        let step = steps.iter().find_map(|step| self.kept_step(&owner, step));
        if let Some(row) = &step {
            spec = Spec::of_line(&row.settings, super::fork::SETTINGS)?;
        }
        spec.build_of(&name);
        if !services.is_empty() {
            spec.network = spec.network.map(|policy| with_services(policy, services, is_node)).transpose()?;
        }
        let waiter = Waiter { client: key, tag: tag.to_string(), what: Awaited::Builder };
        let id = self.create(spec, owner.clone(), Some(waiter), step.as_ref())?;
        if !self.sandboxes.contains_key(&id) {
            return Ok(());
        }
        let build = Build {
            client: key,
            tag: tag.to_string(),
            name,
            owner,
            sandbox: id.clone(),
            stage: Stage::Starting,
            stop: Arc::default(),
            is_node,
            made: None,
        };
        self.builds.insert(id.clone(), build);
        self.add_job(key, tag, Job::Build(id));
        Ok(())
    }

    /// What is kept of an owner's builds under that key.
    fn kept_step(&self, owner: &str, step: &str) -> Option<SnapshotRow> {
        let mut rows = self.snapshots.store.snapshots();
        let row = rows.find(|row| {
            row.kind == SnapshotKind::Step
                && row.state == SnapshotState::Ready
                && row.owner == owner
                && row.name.as_deref() == Some(step)
                && !self.snapshots.unfit.contains(&row.id)
        });
        let here = |row: &&SnapshotRow| {
            let base = self.catalogue.get(&row.template);
            base.is_ok_and(|base| base.manifest.sha256_hex() == row.template_sha256)
        };
        row.filter(here).cloned()
    }

    /// A builder, or a trial, runs: its client may go on.
    pub(super) fn builder_ready(&mut self, id: &SandboxId) {
        let Some((root, build)) = self.builds.iter_mut().find(|(_, build)| build.sandbox == *id) else { return };
        let step = self.sandboxes.get(id).and_then(|sandbox| sandbox.snapshot.as_deref());
        let step = step.and_then(|snapshot| self.snapshots.store.snapshot(snapshot)?.name.clone());
        let (client, tag) = (build.client, build.tag.clone());
        let fields = Fields::new().with("build", root).with("sandbox", id);
        let fields = match (&build.stage, step) {
            (Stage::Starting, Some(step)) => fields.with("step", step),
            _ => fields,
        };
        build.stage = if build.made.is_some() { Stage::Trying } else { Stage::Working };
        self.answer(client, &Message::item(&tag, fields));
    }

    fn build_of(&self, id: &SandboxId) -> Result<(SandboxId, &Build), Error> {
        let found = self.builds.iter().find(|(_, build)| build.sandbox == *id);
        found.map(|(root, build)| (root.clone(), build)).ok_or_else(|| {
            Error::new(Code::BadState, format!("sandbox {id} is no builder of a template that is being built"))
        })
    }

    // ---- Steps ----

    /// What a builder is now is to be gone on from when the same is built again.
    pub(super) fn ask_step(&mut self, key: u64, tag: &str, given: &str, step: String) -> Result<(), Error> {
        let id = self.find_running(key, given)?.id.clone();
        let (_, build) = self.build_of(&id)?;
        if self.config.templates.cache_steps == 0 || self.kept_step(&build.owner, &step).is_some() {
            self.answer(key, &Message::ok(tag, Fields::new().with("kept", self.config.templates.cache_steps > 0)));
            return Ok(());
        }
        let want = Want::Step { key, tag: tag.to_string() };
        self.begin_snapshot(&id, Some(step), SnapshotKind::Step, want)?;
        self.add_job(key, tag, Job::Snapshot);
        Ok(())
    }

    /// Steps that are too many, or take too much room, go: the oldest first.
    pub(super) fn retain_steps(&mut self) {
        let rows = self.snapshots.store.snapshots();
        let rows = rows.filter(|row| row.kind == SnapshotKind::Step && row.state == SnapshotState::Ready);
        let size = |row: &SnapshotRow| {
            let layer = row.layer.as_deref().and_then(|layer| self.snapshots.store.layer(layer));
            row.bytes.saturating_add(layer.map_or(0, |layer| layer.bytes))
        };
        let mut rows: Vec<(u64, u64, String)> = rows.map(|row| (row.created_ms, size(row), row.id.clone())).collect();
        rows.sort_unstable();
        let (mut count, mut bytes) = (rows.len() as u64, rows.iter().map(|row| row.1).sum::<u64>());
        let most = (self.config.templates.cache_steps, self.config.templates.cache_mib.saturating_mul(1 << 20));
        for (_, size, id) in rows {
            if count <= most.0 && bytes <= most.1 {
                break;
            }
            (count, bytes) = (count - 1, bytes.saturating_sub(size));
            self.let_go_of_snapshot(&id);
        }
    }

    // ---- From a builder's disk to a template ----

    /// A client has done all there is to do in a builder.
    pub(super) fn ask_commit(&mut self, key: u64, tag: &str, given: &str, ask: CommitAsk) -> Result<(), Error> {
        let id = self.find_running(key, given)?.id.clone();
        let (root, build) = self.build_of(&id)?;
        if build.stage != Stage::Working {
            return Err(Error::new(Code::BadState, format!("sandbox {id} is not what a template is made of")));
        }
        let Some(sandbox) = self.sandboxes.get(&id) else { return Ok(()) };
        if let Some(snapshot) = &sandbox.snapshotting {
            return Err(Error::new(Code::BadState, format!("sandbox {id} is being taken a snapshot of ({snapshot})")));
        }
        manifest_of(&build.name, self.catalogue.get(&sandbox.spec.template)?, &ask)?;
        self.stop(&id, None)?;
        if let Some(build) = self.builds.get_mut(&root) {
            build.stage = Stage::Committing(Box::new(ask));
        }
        self.await_(key, tag, &id, Awaited::Halted);
        Ok(())
    }

    /// A builder has stopped: its disk is made a template.
    pub(super) fn builder_halted(&mut self, client: u64, tag: &str, id: &SandboxId) {
        if let Err(error) = self.flatten(client, tag, id) {
            self.finish(client, &Message::err(tag, error));
        }
    }

    fn flatten(&mut self, client: u64, tag: &str, id: &SandboxId) -> Result<(), Error> {
        let (root, build) = self.build_of(id)?;
        let Some(sandbox) = self.sandboxes.get(id) else { return Ok(()) };
        if sandbox.state != State::Stopped {
            let message = format!("the builder ended: {}", sandbox.reason);
            return Err(Error::new(Code::VmFailed, message).with("sandbox", id));
        }
        let Stage::Committing(ask) = &build.stage else {
            return Err(Error::new(Code::BadState, format!("sandbox {id} is not what a template is made of")));
        };
        let base = self.catalogue.get(&sandbox.spec.template)?.clone();
        let manifest = manifest_of(&build.name, &base, ask)?;
        let corrupt = |e: &dyn std::fmt::Display| Error::new(Code::Corrupt, format!("the builder's disk: {e}"));
        let layers = self.snapshots.store.layers_from(sandbox.layer.as_deref());
        let layers = layers.ok_or_else(|| corrupt(&"a frozen layer of it is missing"))?;
        let layers = self.snapshots.shelves.open_layers(&layers).map_err(|e| corrupt(&e))?;
        let image = templates::open_image(&base).map_err(|e| corrupt(&e))?;
        let (top, stop) = (sandbox.home.overlay(), Arc::clone(&build.stop));
        let place = template_file::staged(&self.templates_folder(), root.as_str());
        let (owned, tag) = (root, tag.to_string());
        let work = move || {
            let disk = template_file::open_disk(&top, layers, image);
            let disk = disk.map_err(|e| Error::new(Code::Corrupt, format!("the builder's disk: {e}")));
            let made = disk.and_then(|disk| {
                template_file::flatten(&disk, manifest, &place, &stop).map_err(|error| to_error(&error))
            });
            faults::pass(Point::TemplateFlattened);
            Done::TemplateMade { build: owned, client, tag, result: made }
        };
        self.background.run("template", work).map_err(|e| Error::new(Code::NoCapacity, format!("no thread: {e}")))
    }

    /// The image of a template is there, or cannot be.
    pub(super) fn template_made(&mut self, root: &SandboxId, client: u64, tag: &str, result: Result<Template, Error>) {
        let Some(build) = self.builds.get_mut(root) else {
            if let Ok(template) = result {
                self.discard_folder(template.folder);
            }
            return;
        };
        let template = match result {
            Ok(template) => template,
            Err(error) => return self.finish(client, &Message::err(tag, error)),
        };
        let builder = build.sandbox.clone();
        build.made = Some(template.clone());
        let Stage::Committing(ask) = build.stage.clone() else { return };
        self.remove(&builder);
        let Some(mut spec) = ask.trial else { return self.publish(root, client, tag) };
        // What has no name yet is known to the catalogue by one that no client can say.
        spec.template = template_file::staged_name(root.as_str());
        self.catalogue.put(&spec.template, template, true);
        let (name, owner) = match self.builds.get(root) {
            Some(build) => (build.name.clone(), build.owner.clone()),
            None => return,
        };
        spec.build_of(&name);
        let waiter = Waiter { client, tag: tag.to_string(), what: Awaited::Tried };
        match self.create(spec, owner, Some(waiter), None) {
            Ok(id) => {
                if let Some(build) = self.builds.get_mut(root) {
                    (build.sandbox, build.stage) = (id, Stage::Starting);
                }
            }
            Err(error) => self.finish(client, &Message::err(tag, error)),
        }
    }

    /// What was made works: sandboxes are to start from what its trial is now.
    pub(super) fn ask_publish(&mut self, key: u64, tag: &str, given: &str) -> Result<(), Error> {
        let id = self.find_running(key, given)?.id.clone();
        let (_, build) = self.build_of(&id)?;
        if build.stage != Stage::Trying {
            return Err(Error::new(Code::BadState, format!("sandbox {id} is not what a template is tried in")));
        }
        self.begin_snapshot(&id, None, SnapshotKind::Template, Want::Publish { key, tag: tag.to_string() })?;
        self.add_job(key, tag, Job::Snapshot);
        Ok(())
    }

    /// The snapshot of a trial is there: what it is of gets its name.
    pub(super) fn trial_taken(&mut self, client: u64, tag: &str, id: &SandboxId, snapshot: &str) {
        match self.build_of(id).map(|(root, _)| root) {
            Ok(root) => self.publish(&root, client, tag),
            Err(_) => self.let_go_of_snapshot(snapshot),
        }
    }

    fn publish(&mut self, root: &SandboxId, client: u64, tag: &str) {
        let folder = self.templates_folder();
        let Some(build) = self.builds.get_mut(root) else { return };
        let (Some(template), name) = (build.made.clone(), build.name.clone()) else { return };
        build.stage = Stage::Publishing;
        let (owned, whose) = (root.clone(), tag.to_string());
        let work = move || {
            let result = template_file::publish(&template, &folder).map_err(|error| to_error(&error));
            faults::pass(Point::TemplatePublished);
            Done::TemplatePublished { build: owned, client, tag: whose, result }
        };
        let free = self.template_name_is_free(&name);
        let started = free.and_then(|()| {
            self.background.run("template", work).map_err(|e| Error::new(Code::NoCapacity, format!("no thread: {e}")))
        });
        if let Err(error) = started {
            self.finish(client, &Message::err(tag, error));
        }
    }

    /// A template has its name.
    pub(super) fn template_published(
        &mut self,
        root: &SandboxId,
        client: u64,
        tag: &str,
        result: Result<Template, Error>,
    ) {
        let build = self.builds.remove(root);
        let staged = template_file::staged_name(root.as_str());
        self.catalogue.forget(&staged);
        if let Some(build) = &build {
            let job = self.clients.get_mut(&build.client).and_then(|client| client.jobs.remove(&build.tag));
            if self.sandboxes.contains_key(&build.sandbox) {
                self.remove(&build.sandbox);
            }
            if job.is_some() {
                let answer = match &result {
                    Ok(template) => Message::ok(&build.tag, template_fields(template)),
                    Err(error) => Message::err(&build.tag, error.clone()),
                };
                self.finish(build.client, &answer);
            }
        }
        match result {
            Ok(template) => {
                let name = template.manifest.name.clone();
                self.rename_snapshots(&staged, &name);
                let fields = template_fields(&template);
                let (owner, digest) = (build.map(|build| build.owner), template.manifest.sha256_hex());
                self.take_template(template, true);
                log::info!("template {name} was built");
                self.tell_template("template.built", &name, &owner.unwrap_or_default(), &digest);
                self.finish(client, &Message::ok(tag, fields));
            }
            Err(error) => {
                if let Some(build) = &build {
                    self.tell_template(BUILD_FAILED, &build.name, &build.owner, &error.to_string());
                }
                if let Some(template) = build.and_then(|build| build.made) {
                    self.discard_folder(template.folder);
                }
                self.drop_template_snapshots();
                self.finish(client, &Message::err(tag, error));
            }
        }
    }

    /// A template that was made here is one from now on. With `whole` its image is what its manifest says.
    pub(super) fn take_template(&mut self, template: Template, whole: bool) {
        let manifest = &template.manifest;
        self.database.submit(Change::PutTemplate(TemplateRow {
            name: manifest.name.clone(),
            sha256: manifest.sha256_hex(),
            size_bytes: manifest.size_bytes,
            description: manifest.description.clone(),
            imported_ms: super::supervisor::now_ms(),
            path: template.folder.display().to_string(),
        }));
        let name = manifest.name.clone();
        self.catalogue.put(&name, template, whole);
        self.drop_template_snapshots();
    }

    /// Snapshots of a template that had no name have it.
    fn rename_snapshots(&mut self, staged: &str, name: &str) {
        let rows: Vec<SnapshotRow> =
            self.snapshots.store.snapshots().filter(|row| row.template == staged).cloned().collect();
        for mut row in rows {
            if let Ok(mut spec) = Spec::of_line(&row.settings.replace(staged, name), super::fork::SETTINGS) {
                spec.labels.clear();
                row.settings = spec.to_line();
            }
            row.template = name.to_string();
            self.snapshots.store.put_snapshot(row.clone());
            self.database.submit_durable(Change::PutSnapshot(Box::new(row)));
        }
    }

    /// A sandbox that was booted has its start command run, as what comes of its template's snapshot has. Nobody waits for it
    /// to be ready.
    pub(super) fn begin_start_command(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get(id) else { return };
        let Ok(template) = self.catalogue.get(&sandbox.spec.template) else { return };
        let Built { start, .. } = &template.manifest.build;
        if start.is_empty() || sandbox.spec.is_builder() {
            return;
        }
        let argv: Vec<Vec<u8>> = start.iter().map(|word| word.clone().into_bytes()).collect();
        let request = start.iter().fold(Request::new("", "exec.start"), |request, word| request.arg(word));
        self.begin_exec(id, argv, request, None, None);
    }

    // ---- Ends ----

    /// A builder could not start, or a client has no more use for a build: nothing of it stays.
    pub(super) fn end_build(&mut self, root: &SandboxId, why: &str) {
        let Some(build) = self.builds.remove(root) else { return };
        if build.stage != Stage::Publishing && !build.is_node {
            self.tell_template(BUILD_FAILED, &build.name, &build.owner, why);
        }
        build.stop.store(true, Ordering::Relaxed);
        let staged = template_file::staged_name(root.as_str());
        self.catalogue.forget(&staged);
        if let Some(sandbox) = self.sandboxes.get_mut(&build.sandbox) {
            sandbox.waiters.retain(|waiter| !matches!(waiter.what, Awaited::Builder | Awaited::Tried));
            self.remove(&build.sandbox);
        }
        // One that is getting its name has it soon.
        if build.stage != Stage::Publishing
            && let Some(template) = build.made
        {
            self.discard_folder(template.folder);
        }
        self.drop_template_snapshots();
    }

    /// A builder's start failed, or that of a trial.
    pub(super) fn builder_failed(&mut self, id: &SandboxId, error: &Error) {
        let Ok((root, build)) = self.build_of(id) else { return };
        let (client, tag) = (build.client, build.tag.clone());
        self.end_build(&root, &error.to_string());
        // Who waits for a trial was told by another answer.
        if self.clients.get_mut(&client).is_some_and(|client| client.jobs.remove(&tag).is_some()) {
            self.finish(client, &Message::err(&tag, error.clone()));
        }
    }

    pub(super) fn templates_folder(&self) -> PathBuf {
        self.config.paths.data.join("templates")
    }

    /// Has a thread take a folder away that is no template's.
    pub(super) fn discard_folder(&mut self, folder: PathBuf) {
        self.clear(move || template_file::discard(&folder));
    }
}

fn template_fields(template: &Template) -> Fields {
    let manifest = &template.manifest;
    let fields = Fields::new().with("name", &manifest.name).with("sha256", manifest.sha256_hex());
    fields.with("size_bytes", manifest.size_bytes)
}

/// What a client is told.
pub(super) fn to_error(error: &TemplateError) -> Error {
    let code = match error {
        TemplateError::Io { disk_full: true, .. } => return Error::disk_full(error.to_string()),
        TemplateError::Io { .. } => Code::Internal,
        TemplateError::NameTaken { .. } => Code::AlreadyExists,
        _ => Code::Corrupt,
    };
    Error::new(code, error.to_string())
}

/// An image, to read it.
pub(super) fn open(template: &Template) -> Result<File, Error> {
    templates::open_image(template).map_err(|error| to_error(&error))
}
