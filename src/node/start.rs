//! From a request to a running sandbox.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::time::Duration;

use mio::net::UnixStream;

use super::agents::{START_MACHINE, no_room};
use super::health::Probe;
use super::instance::{Awaited, Route, Sandbox, Waiter, Worker};
use super::pools::{PREPARE, Shape};
use super::supervisor::{Done, Source, Stopping, Supervisor, Timer, now_ms};
use super::tracing::{ADMIT, AGENT_READY, REGISTER, VM};
use super::warm::Parked;
use crate::network::MTU;
use crate::sandbox::agent::{Agent, Approach};
use crate::sandbox::berth::Berth;
use crate::sandbox::claims::Listing;
use crate::sandbox::disk::Shelf;
use crate::sandbox::id::SandboxId;
use crate::sandbox::ledger::{Holding, Resource};
use crate::sandbox::lifecycle::State;
use crate::sandbox::limits::{self, Limits};
use crate::sandbox::spec::{MAX_DISK_MIB, Spec};
use crate::sandbox::worker;
use crate::storage::state::SnapshotRow;
use crate::storage::template_disk::TemplateEvent;
use crate::storage::templates::{self, Template, TemplateError};
use crate::wire::{Code, Error, Link, Message, Request};

pub(super) const MIB: u64 = 1024 * 1024;
/// The guest's vsock address. Each worker has its own vsock device, so one number serves all.
const GUEST_CID: u32 = 3;

impl Supervisor {
    /// Accepts a sandbox and begins to make it. What fails at once is this function's error and leaves nothing.
    /// With `origin` it goes on from that snapshot.
    pub(super) fn create(
        &mut self,
        spec: Spec,
        owner: String,
        waiter: Option<Waiter>,
        origin: Option<&SnapshotRow>,
    ) -> Result<SandboxId, Error> {
        let mut trace = self.new_trace();
        self.check_new(&spec, &owner)?;
        trace.next(ADMIT);
        let idle = self.take_idle(origin.map(|row| row.id.as_str()));
        if let Some(row) = origin {
            self.prefer_snapshot(row);
        }
        let id = match &idle {
            Some(item) => item.thing.id.clone(),
            None => SandboxId::random().map_err(|e| Error::new(Code::Internal, format!("no random id: {e}")))?,
        };
        let mut sandbox = Sandbox::new(id.clone(), owner, spec, self.places.of(&id), now_ms());
        sandbox.state = State::Scheduling;
        sandbox.waiters.extend(waiter);
        sandbox.trace = trace;
        if let Some(row) = origin {
            sandbox.template_sha256.clone_from(&row.template_sha256);
            (sandbox.layer, sandbox.snapshot) = (row.layer.clone(), Some(row.id.clone()));
        }
        self.sandboxes.insert(id.clone(), sandbox);
        if origin.is_some() {
            self.hold(&id);
        }
        self.notify_waiters(&id);
        self.fit_account(&id);
        if let Err(error) = self.settle_worker(&id, idle).and_then(|()| self.schedule(&id)) {
            self.discard(&id);
            return Err(error);
        }
        Ok(id)
    }

    /// Whether the node takes a new sandbox.
    pub(super) fn check_new(&self, spec: &Spec, owner: &str) -> Result<(), Error> {
        if self.stopping.is_some() {
            return Err(Error::new(Code::Stopping, "the node is stopping"));
        }
        if self.drain.is_some() {
            return Err(Error::new(Code::Draining, "the node is being drained: node.undrain takes that back"));
        }
        let live = self.sandboxes.values().filter(|sandbox| sandbox.state.is_live() && sandbox.parked.is_none());
        let live = live.count() as u64;
        let max = self.config.sandbox.max_sandboxes;
        if live >= max {
            return Err(
                Error::new(Code::NoCapacity, format!("{live} sandboxes live, the limit of this node")).with("max", max)
            );
        }
        super::time_limits::check(spec)?;
        if let Some(name) = &spec.name
            && let Some(holder) = self
                .sandboxes
                .values()
                .find(|sandbox| sandbox.owner == owner && sandbox.spec.name.as_ref() == Some(name))
        {
            return Err(Error::new(Code::AlreadyExists, format!("name={name} is taken by sandbox {}", holder.id))
                .with("sandbox", &holder.id));
        }
        if !self.catalogue.importing {
            self.catalogue.row(&spec.template)?;
        }
        Ok(())
    }

    /// Goes on with a sandbox once its template is known to be whole.
    pub(super) fn schedule(&mut self, id: &SandboxId) -> Result<(), Error> {
        let Some(sandbox) = self.sandboxes.get(id) else { return Ok(()) };
        let name = sandbox.spec.template.clone();
        if self.catalogue.importing && self.catalogue.row(&name).is_err() {
            // It may be on a disk that is being looked at: `imported` comes back here.
            return Ok(());
        }
        // A supervisor that is replaced ends what it has begun.
        let ends = |stopping: &Stopping| !stopping.hands_over || sandbox.restarting;
        if sandbox.comes_back() && self.stopping.as_ref().is_some_and(ends) {
            return Err(Error::new(Code::Stopping, "the node is stopping"));
        }
        let template = self.catalogue.get(&name)?.clone();
        if self.catalogue.is_verified(&name)? {
            let origin = sandbox.origin().map(str::to_string);
            if let Some(snapshot) = origin
                && !self.want_whole(&snapshot)?
            {
                // `flattened` comes back here.
                return Ok(());
            }
            if self.settle_pause(id) {
                // And so does `pause_settled`.
                return Ok(());
            }
            let shape = self.shape(id, &template)?;
            self.trace(id, |trace| trace.end(ADMIT));
            // All of it is asked for at once, the slot once it is written down that there may be one.
            let slot = self.is_booked(id) && self.has_slot(id)?;
            let has = [slot, self.has_overlay(id, shape), self.has_worker(id)];
            self.trace_allocation(id, has);
            return if has.contains(&false) { Ok(()) } else { self.build(id, &template, shape) };
        }
        self.verify(template)
    }

    /// What the sandbox's disk is to be.
    fn shape(&mut self, id: &SandboxId, template: &Template) -> Result<Shape, Error> {
        let base_mib = template.manifest.size_bytes.div_ceil(MIB);
        let asked = self.sandboxes.get(id).and_then(|sandbox| sandbox.spec.disk_mib);
        let disk_mib = asked.unwrap_or(base_mib + self.config.sandbox.default_extra_disk_mib);
        if disk_mib < base_mib || disk_mib > MAX_DISK_MIB {
            return Err(Error::new(
                Code::OutOfRange,
                format!("disk_mib={disk_mib} is out of range: {base_mib} (the template's disk) to {MAX_DISK_MIB}"),
            )
            .with("argument", "disk_mib")
            .with("min", base_mib)
            .with("max", MAX_DISK_MIB));
        }
        if let Some(sandbox) = self.sandboxes.get_mut(id) {
            if (sandbox.comes_back() || sandbox.layer.is_some())
                && sandbox.template_sha256 != template.manifest.sha256_hex()
            {
                let message = format!("template {} is another than the one below its disk", sandbox.spec.template);
                return Err(Error::new(Code::Corrupt, message));
            }
            sandbox.spec.disk_mib = Some(disk_mib);
            sandbox.template_sha256 = template.manifest.sha256_hex();
        }
        let (base_bytes, base_sha256) = (template.manifest.size_bytes, template.manifest.sha256);
        Ok(Shape { disk_bytes: disk_mib * MIB, base_bytes, base_sha256 })
    }

    /// Begins to hash a template's image, unless that is under way.
    fn verify(&mut self, template: Template) -> Result<(), Error> {
        if self.catalogue.begin_verifying(&template.manifest.name) {
            let job = move || Done::Verified {
                template: template.manifest.name.clone(),
                result: templates::verify(&template),
            };
            self.background.run("verify", job).map_err(|e| Error::new(Code::NoCapacity, format!("no thread: {e}")))?;
        }
        Ok(())
    }

    /// Hashes the templates that came with the node before anybody asks for them: the first sandbox need not wait.
    pub(super) fn verify_built_in(&mut self) {
        for name in self.catalogue.built_in() {
            let Ok(template) = self.catalogue.get(&name).cloned() else { continue };
            if self.catalogue.is_verified(&name).unwrap_or(true) {
                continue;
            }
            if let Err(error) = self.verify(template) {
                log::warn!("template {name} is hashed when it is used: {error}");
            }
        }
    }

    /// A template's image was hashed: the sandboxes that wait for it go on, or fail.
    pub(super) fn verified(&mut self, name: &str, result: Result<(), TemplateError>) {
        let untouched = self.catalogue.hashed(name, result.is_ok());
        let failure = match result {
            // Whoever waits for an image that changed meanwhile has it hashed again.
            _ if !untouched => None,
            Ok(()) => None,
            Err(e) => {
                log::error!("template {name}: {e}");
                Some(Error::new(Code::Corrupt, format!("template {name}: {e}")).with("template", name))
            }
        };
        for id in self.scheduled(|sandbox| sandbox.spec.template == name) {
            let done = match &failure {
                Some(error) => Err(error.clone()),
                None => self.schedule(&id),
            };
            if let Err(error) = done {
                self.fail_start(&id, error);
            }
        }
    }

    /// The template disks were looked at.
    pub(super) fn imported(&mut self, events: Vec<TemplateEvent>) {
        let arrived = self.catalogue.imported(events, &mut self.database, now_ms());
        for (name, digest) in arrived {
            self.tell_template("template.imported", &name, "", &digest);
        }
        self.drop_template_snapshots();
        for id in self.scheduled(|_| true) {
            if let Err(error) = self.schedule(&id) {
                self.fail_start(&id, error);
            }
        }
    }

    /// Sandboxes that wait for what they start from.
    pub(super) fn scheduled(&self, which: impl Fn(&Sandbox) -> bool) -> Vec<SandboxId> {
        let waiting = self.sandboxes.values().filter(|sandbox| {
            (sandbox.state == State::Scheduling || sandbox.comes_back() && sandbox.worker.is_none()) && which(sandbox)
        });
        waiting.map(|sandbox| sandbox.id.clone()).collect()
    }

    /// Starts the worker that waits for the sandbox.
    fn build(&mut self, id: &SandboxId, template: &Template, shape: Shape) -> Result<(), Error> {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return Ok(()) };
        if !sandbox.comes_back() {
            sandbox.state.become_(State::Creating)?;
        }
        self.notify_waiters(id);
        let Some((berth, token)) = self.take_berth(id) else { return Ok(()) };
        self.trace(id, |trace| trace.next(VM));
        let launched = self.launch(id, template, shape, berth, token);
        if launched.is_err() {
            self.unwatch(token);
        }
        launched
    }

    fn launch(
        &mut self,
        id: &SandboxId,
        template: &Template,
        shape: Shape,
        berth: Berth,
        token: mio::Token,
    ) -> Result<(), Error> {
        let share = self.config.paths.share.clone();
        let open =
            |path: &Path| File::open(path).map_err(|e| Error::new(Code::VmFailed, format!("{}: {e}", path.display())));
        let Some(sandbox) = self.sandboxes.get(id) else { return Ok(()) };
        let layers = self.snapshots.store.layers_from(sandbox.layer.as_deref());
        let layers = layers.ok_or_else(|| Error::new(Code::Corrupt, "a frozen layer of its disk is missing"))?;
        let layers = self.snapshots.shelves.open_layers(&layers);
        let layers = layers.map_err(|e| Error::new(Code::Corrupt, format!("a frozen layer of its disk: {e}")))?;
        let goes_on = Some(sandbox).filter(|s| s.state == State::Resuming || s.origin().is_some());
        let (keys, source) = match goes_on {
            None => {
                // A builder's has what fills its disk besides.
                let initramfs = if sandbox.spec.fills_a_disk() { "builder.img" } else { "initramfs.img" };
                (["kernel", "initramfs"], [open(&share.join("vmlinux"))?, open(&share.join(initramfs))?])
            }
            Some(sandbox) => {
                let files = match sandbox.origin() {
                    Some(snapshot) => self.snapshots.open(snapshot),
                    None => sandbox.home.open_paused(),
                };
                let (state, memory) =
                    files.map_err(|e| Error::new(Code::Corrupt, format!("what it is to go on from: {e}")))?;
                (["state", "memory"], [state, memory])
            }
        };
        let working_set = sandbox.origin().and_then(|id| File::open(self.snapshots.shelves.working_set(id)).ok());
        let base = templates::open_image(template).map_err(|e| Error::new(Code::Corrupt, e.to_string()))?;
        let kvm = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .map_err(|e| Error::new(Code::VmFailed, format!("/dev/kvm: {e}")))?;

        let no_room = |what: &str| {
            let what = what.to_string();
            move |e: std::io::Error| Error::of_io(Code::NoCapacity, format!("{what}: {e}"), &e)
        };
        let Berth { pid, pidfd, link, serial, .. } = berth;
        let overlay = self.take_blank(id, shape).map_err(no_room("overlay"))?;
        self.ledger.taken(id, &[Resource::Disk]);
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return Ok(()) };
        let shelf = Shelf { directory: &self.config.disks.directory, devices: &self.config.disks.devices };
        let disks = sandbox.spec.disks.iter().map(|disk| shelf.open(disk, &sandbox.home));
        let disks = disks.collect::<Result<Vec<File>, Error>>()?;
        let in_memory = [&overlay].into_iter().chain(&disks).filter(|disk| limits::is_in_memory(disk));
        let limits = Limits {
            vcpus: sandbox.spec.vcpus.into(),
            cpu_quota: sandbox.spec.cpu_quota,
            memory_bytes: u64::from(sandbox.spec.memory_mib) * MIB,
            disks: 1 + disks.len() as u64,
            files_in_memory: in_memory.map(|disk| disk.metadata().map_or(0, |meta| meta.len())).sum(),
            disk_iops: sandbox.spec.disk_iops,
            disk_bytes_per_s: sandbox.spec.disk_mbps.map(|mbps| mbps * 1_000_000),
        };
        limits
            .apply(sandbox.home.cgroup(), &overlay)
            .map_err(no_room("the sandbox's control group cannot be limited"))?;
        self.ledger.taken(id, &[Resource::Memory]);
        self.ledger.with(id, |account| {
            account.note(Resource::Disk, shape.disk_bytes / MIB);
            account.advance_all(Holding::Reserved, Holding::Active)
        });

        let joined = (|| -> std::io::Result<(UnixStream, Agent)> {
            let stream = link;
            let mut request = Request::new(START_MACHINE, "vm.start")
                .set("vcpus", sandbox.spec.vcpus)
                .set("memory_mib", sandbox.spec.memory_mib)
                .set("cid", GUEST_CID)
                .set("kvm", "fd:0")
                .set(keys[0], "fd:1")
                .set(keys[1], "fd:2")
                .set("serial", "fd:3")
                .set("base", "fd:4")
                .set("overlay", "fd:5");
            let mut descriptors = [&kvm, &source[0], &source[1], &serial, &base, &overlay].map(AsFd::as_fd).to_vec();
            if let Some(snapshot) = sandbox.origin() {
                request = request.set("prepared", snapshot);
            }
            if let Some(file) = &working_set {
                request = request.set("working_set", format!("fd:{}", descriptors.len()));
                descriptors.push(file.as_fd());
            }
            for layer in &layers {
                request = request.set("layer", format!("fd:{}", descriptors.len()));
                descriptors.push(layer.as_fd());
            }
            for (spec, file) in sandbox.spec.disks.iter().zip(&disks) {
                let mode = if spec.read_only { "ro" } else { "rw" };
                request = request.set("disk", format!("{}:{mode}:fd:{}", spec.name, descriptors.len()));
                descriptors.push(file.as_fd());
            }
            if let (Some(slot), Some(tap)) = (&sandbox.slot, &sandbox.tap) {
                let mac = slot.mac.map(|octet| format!("{octet:02x}")).join(":");
                request = request.set("tap", format!("fd:{}", descriptors.len())).set("mac", mac);
                request = request.set("ipv4", slot.guest).set("mtu", MTU);
                descriptors.push(tap.as_fd());
            }
            let net_bytes = sandbox.spec.net_mbps.map(|mbps| mbps * 1_000_000);
            for (key, limit) in [
                ("net_rx_bytes_per_s", net_bytes),
                ("net_tx_bytes_per_s", net_bytes),
                ("disk_iops", sandbox.spec.disk_iops),
                ("disk_bytes_per_s", sandbox.spec.disk_mbps.map(|mbps| mbps * 1_000_000)),
            ] {
                if let Some(limit) = limit {
                    request = request.set(key, limit);
                }
            }
            worker::send_with_descriptors(&stream, request, &descriptors)?;
            stream.set_nonblocking(true)?;
            Ok((UnixStream::from_std(stream), Agent::open(sandbox.home.socket(), Approach::Accept)?))
        })();
        let (stream, mut agent) = joined.map_err(|e| Error::new(Code::VmFailed, format!("worker {pid}: {e}")))?;
        let link = Link::new(stream);
        sandbox.tap = None;
        if !sandbox.comes_back() {
            sandbox.state.become_(State::Starting)?;
        }
        let (control, guest) = (link_descriptor(&link), agent.stream().as_raw_fd());
        let mut held = Worker {
            pid,
            _pidfd: pidfd,
            link,
            agent,
            routes: std::collections::HashMap::new(),
            inquiries: std::collections::HashMap::new(),
            next_inquiry: 0,
            asked: vec![START_MACHINE, PREPARE],
            listing: Listing::default(),
            tokens: [token; 3],
            refusal: None,
            status: None,
            told_to_stop: false,
            dead: false,
            agent_losses: 0,
            probe: Probe::default(),
            verdict: None,
            foreign: None,
            disk_full: false,
            learning: None,
        };
        let unwatched = |e| Error::new(Code::NoCapacity, format!("worker {pid} cannot be watched: {e}"));
        held.tokens[1] = self.watch(control, Source::WorkerLink(id.clone())).map_err(unwatched)?;
        let watched = self.watch(guest, Source::Agent(id.clone()));
        if watched.is_err() {
            self.unwatch(held.tokens[1]);
        }
        held.tokens[2] = watched.map_err(unwatched)?;
        if let Some(sandbox) = self.sandboxes.get_mut(id) {
            sandbox.worker = Some(held);
        }
        self.watch_events(id);
        self.timers.after(Duration::from_secs(self.config.sandbox.boot_timeout_s), Timer::Boot(id.clone(), pid));
        self.touched_sandboxes.insert(id.clone());
        self.post(id);
        self.record(id);
        self.notify_waiters(id);
        Ok(())
    }

    /// The agent of a sandbox greeted: the sandbox runs.
    pub(super) fn agent_ready(&mut self, id: &SandboxId) {
        self.trace(id, |trace| trace.next(AGENT_READY));
        if self.park(id) {
            return;
        }
        self.serve_guest(id);
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let from_snapshot = sandbox.origin().is_some();
        match sandbox.state {
            State::Resuming if from_snapshot => return self.returned_agent_ready(id),
            State::Resuming => return self.resumed_agent_ready(id),
            State::Starting if from_snapshot => return self.introduce(id),
            // A supervisor before this one had its programs frozen, or had not told it yet who it is.
            State::Running
                if sandbox.snapshotting.is_none()
                    && sandbox.worker.as_ref().is_some_and(|worker| worker.agent.is_frozen()) =>
            {
                if self.snapshots.interrupted.remove(id) {
                    self.thaw(id);
                } else {
                    return self.introduce(id);
                }
            }
            // Taken over from a supervisor that was pausing it.
            State::Pausing if sandbox.pausing.is_none() => {
                self.run_on(id);
                return self.survey(id);
            }
            _ => {}
        }
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let configure =
            configure_request(sandbox.spec.name.as_deref().unwrap_or(id.as_str()), &sandbox.spec, &self.catalogue);
        let configure = sandbox.configure_network(configure, &self.config.network.dns);
        let booting = sandbox.is_booting();
        let Some(worker) = &mut sandbox.worker else { return };
        let tag = worker.agent.request(configure);
        worker.routes.insert(tag, Route::Configure);
        self.touched_sandboxes.insert(id.clone());
        if !booting {
            // A supervisor before this one may have ended between telling it who it is and this.
            worker.link.send(&Message::Request(Request::new("open", "vm.open")));
            self.survey(id);
            return;
        }
        if sandbox.slot.is_none() {
            self.runs(id);
        }
    }

    /// The agent of a sandbox took its settings, or refused them. One with a network runs only with these.
    pub(super) fn configured(&mut self, id: &SandboxId, outcome: Result<(), Error>) {
        let Some(sandbox) = self.sandboxes.get(id) else { return };
        let starting = sandbox.is_booting();
        match outcome {
            Ok(()) if starting => self.runs(id),
            Ok(()) => {}
            Err(error) if starting => {
                let message = format!("the guest could not be configured: {}", error.message);
                self.fail_start(id, Error::new(Code::VmFailed, message));
            }
            Err(error) if self.lacks_room(id) => {
                log::warn!("sandbox {id} could not be configured: {}", no_room(&error.message));
            }
            Err(error) => log::error!("sandbox {id} could not be configured: {error}"),
        }
    }

    pub(super) fn runs(&mut self, id: &SandboxId) {
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        if std::mem::take(&mut sandbox.restarting) && sandbox.snapshot.take().is_some() {
            // It was booted: nothing of the snapshot's memory is in it.
            self.hold(id);
        }
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        let booted = sandbox.state != State::Resuming && sandbox.snapshot.is_none();
        if let Err(e) = sandbox.state.become_(State::Running) {
            log::error!("sandbox {id}: {e}");
        }
        sandbox.started_ms = Some(now_ms());
        sandbox.ended_ms = None;
        sandbox.trace.next(REGISTER);
        self.look_at_pools();
        self.watch_health(id);
        let writing = self.record(id);
        if let Some(sandbox) = self.sandboxes.get_mut(id) {
            sandbox.writing = writing;
        }
        if booted {
            self.begin_start_command(id);
        }
        self.notify_waiters(id);
    }

    /// A start that failed: its clients are told, nothing of the sandbox stays.
    pub(super) fn fail_start(&mut self, id: &SandboxId, mut error: Error) {
        // A guest that cannot write to its disk says that it is damaged, or nothing.
        let of_guest = [Code::Corrupt, Code::VmFailed, Code::GuestTimeout].iter().any(|code| error.is(*code));
        if of_guest && self.lacks_room(id) {
            error = no_room(&error.message);
        }
        self.unparked_by_end(id, &error.message);
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        if sandbox.restarting && !sandbox.removing {
            self.restart_failed(id, &error);
            return;
        }
        if sandbox.state == State::Resuming && !sandbox.removing {
            self.resume_failed(id, &error);
            return;
        }
        if self.boot_instead(id, &error) {
            return;
        }
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        log::warn!("sandbox {id} could not be started: {error}");
        sandbox.reason = error.to_string();
        let error = self.trace_failure(id, error);
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return };
        for waiter in std::mem::take(&mut sandbox.waiters) {
            match waiter.what {
                Awaited::Created { .. }
                | Awaited::Prepared
                | Awaited::Builder
                | Awaited::Tried
                | Awaited::Halted
                | Awaited::Stopped
                | Awaited::Paused
                | Awaited::Resumed => {
                    self.finish(waiter.client, &Message::err(&waiter.tag, error.clone().with("sandbox", id)));
                }
                Awaited::Forked => self.forked(waiter.client, &waiter.tag, Err(error.clone().with("sandbox", id))),
                Awaited::Removed => {
                    if let Some(sandbox) = self.sandboxes.get_mut(id) {
                        sandbox.waiters.push(waiter);
                    }
                }
            }
        }
        self.remove(id);
        self.builder_failed(id, &error);
    }

    pub(super) fn boot_expired(&mut self, id: &SandboxId, pid: i32) {
        let Some(sandbox) = self.sandboxes.get(id) else { return };
        if sandbox.is_booting()
            && !sandbox.parked.is_some_and(Parked::is_ready)
            && sandbox.worker.as_ref().is_some_and(|worker| worker.pid == pid)
        {
            let seconds = self.config.sandbox.boot_timeout_s;
            let error = Error::new(Code::GuestTimeout, format!("the guest's agent did not answer within {seconds} s"));
            let error = with_console(error, sandbox);
            self.fail_start(id, error);
        }
    }
}

/// The end of the guest's console, for an error about a guest that did not come up.
pub(super) fn with_console(error: Error, sandbox: &Sandbox) -> Error {
    let tail = String::from_utf8_lossy(&sandbox.home.console_tail(512)).into_owned();
    if tail.is_empty() { error } else { error.with("console", tail) }
}

fn link_descriptor(link: &Link<UnixStream>) -> i32 {
    link.stream_ref().as_raw_fd()
}

fn configure_request(hostname: &str, spec: &Spec, catalogue: &super::catalogue::Catalogue) -> Request {
    let request = Request::new("", "system.configure")
        .set("hostname", hostname)
        .set("clock_ns", u128::from(now_ms()) * 1_000_000)
        .set("grow", true);
    with_environment(request, spec, catalogue)
}

/// What programs of a sandbox have that do not say: the template's, then its own.
pub(super) fn with_environment(mut request: Request, spec: &Spec, catalogue: &super::catalogue::Catalogue) -> Request {
    let defaults = catalogue.get(&spec.template).ok().map(|template| &template.manifest.defaults);
    if let Some(defaults) = defaults {
        request = request.set("user", defaults.user).set("cwd", &defaults.cwd);
        request = defaults.env.iter().fold(request, |request, entry| request.set("env", entry));
    }
    if spec.read_only {
        request = request.set("read_only", true);
    }
    spec.env.iter().fold(request, |request, entry| request.set("env", entry))
}
