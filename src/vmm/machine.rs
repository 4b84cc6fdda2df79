//! One microVM from its parts: memory, devices, KVM, boot. What `vm.start` makes and the end takes apart.

use std::fmt;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::boot::acpi::MmioDevice;
use super::boot::{self, BootError, BootSource, layout};
use mio::Registry;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::config::{CaptureConfig, MIN_TARGET_MIB, NextOverlay, Source, StartConfig};
use super::devices::{DeviceConfig, DeviceError, DeviceSet, QUEUE_NOTIFY};
use super::generation;
use super::jail::{self, lists::Kind};
use super::kvm::{Bus, ExitCounts, KvmError, Mismatch, PauseError, Processors, Vm};
use super::last_words::End;
use super::memory::{GuestMemory, MemoryError};
use super::restoring::{Prepared, Restoring};
use super::snapshot::child::Child;
use super::snapshot::memory::Plan;
use super::snapshot::working_set::WorkingSet;
use super::snapshot::{Saved, SavedError};
use crate::wire::{Code, Error, Fields};

/// Why a microVM could not be started.
#[derive(Debug)]
pub enum StartError {
    /// No memory.
    Memory(MemoryError),
    /// Disk or another device.
    Devices(DeviceError),
    /// The host has no descriptors left.
    Event(io::Error),
    /// The loop cannot watch the devices.
    Watch(io::Error),
    /// Kernel, initramfs or command line.
    Boot(BootError),
    /// KVM.
    Kvm(KvmError),
    /// The state of a snapshot.
    Saved(SavedError),
    /// A file of a snapshot cannot be read.
    Snapshot(io::Error),
    /// The host has no random numbers for a new generation identifier.
    Renew(io::Error),
    /// The list of system calls cannot be put in force.
    Jail(io::Error),
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory(e) => e.fmt(f),
            Self::Devices(e) => e.fmt(f),
            Self::Event(e) => write!(f, "no event descriptor: {e}"),
            Self::Watch(e) => write!(f, "the devices cannot be watched: {e}"),
            Self::Boot(e) => e.fmt(f),
            Self::Kvm(e) => e.fmt(f),
            Self::Saved(e) => e.fmt(f),
            Self::Snapshot(e) => write!(f, "the snapshot cannot be read: {e}"),
            Self::Renew(e) => write!(f, "no new generation identifier: {e}"),
            Self::Jail(e) => write!(f, "the jail cannot be closed: {e}"),
        }
    }
}

impl std::error::Error for StartError {}

impl From<MemoryError> for StartError {
    fn from(e: MemoryError) -> Self {
        Self::Memory(e)
    }
}

impl From<DeviceError> for StartError {
    fn from(e: DeviceError) -> Self {
        Self::Devices(e)
    }
}

impl From<BootError> for StartError {
    fn from(e: BootError) -> Self {
        Self::Boot(e)
    }
}

impl From<KvmError> for StartError {
    fn from(e: KvmError) -> Self {
        match e {
            KvmError::Saved(e) => Self::Saved(e),
            e => Self::Kvm(e),
        }
    }
}

impl From<SavedError> for StartError {
    fn from(e: SavedError) -> Self {
        Self::Saved(e)
    }
}

impl StartError {
    /// As the supervisor is told.
    pub fn to_wire(&self) -> Error {
        if let Self::Kvm(KvmError::Mismatch(mismatch)) = self {
            let Mismatch { missing, saved, host } = &**mismatch;
            return Error::new(Code::CpuMismatch, self.to_string())
                .with("missing", missing.join(" "))
                .with("vendor", &saved.vendor)
                .with("family", saved.family)
                .with("host_vendor", &host.vendor)
                .with("host_family", host.family);
        }
        let code = match self {
            Self::Saved(_) | Self::Memory(MemoryError::File { .. }) => Code::Corrupt,
            Self::Memory(_) | Self::Event(_) => Code::NoCapacity,
            Self::Devices(DeviceError::Overlay(e)) if e.is_corrupt() => Code::Corrupt,
            Self::Boot(e) => e.code(),
            Self::Devices(_) | Self::Watch(_) | Self::Kvm(_) | Self::Snapshot(_) | Self::Renew(_) | Self::Jail(_) => {
                Code::VmFailed
            }
        };
        Error::new(code, self.to_string())
    }
}

impl Bus for DeviceSet {
    fn mmio_read(&self, addr: u64, octets: &mut [u8]) {
        DeviceSet::mmio_read(self, addr, octets);
    }

    fn mmio_write(&self, addr: u64, octets: &[u8]) {
        DeviceSet::mmio_write(self, addr, octets);
    }

    fn pio_read(&self, port: u16, octets: &mut [u8]) {
        DeviceSet::pio_read(self, port, octets);
    }

    fn pio_write(&self, port: u16, octets: &[u8]) {
        DeviceSet::pio_write(self, port, octets);
    }

    fn let_go(&self) {
        DeviceSet::let_go(self);
    }
}

/// Why a snapshot cannot be taken.
fn cannot(what: &'static str) -> impl Fn(io::Error) -> Error {
    move |e| Error::new(Code::VmFailed, format!("the snapshot cannot be taken: {what}: {e}"))
}

/// A running microVM.
pub struct Machine {
    memory_bytes: u64,
    processors: Processors,
    exits: Arc<ExitCounts>,
    devices: Arc<DeviceSet>,
    memory: GuestMemory,
    /// Makes the guest's kernel look at its generation identifier.
    generation: EventFd,
    /// The guest stands still, and nothing of it changes.
    held: bool,
    /// The overlay that the last snapshot was given for its root disk, and how many layers had been frozen before.
    next_overlay: Option<(String, u64)>,
    /// Closed last: its memory slots and event descriptors are in use by the above.
    vm: Vm,
}

/// How long processors and devices have to come to rest for a snapshot, each.
const REST: Duration = Duration::from_secs(2);
/// How long the root disk may take to get what was written on its medium, before that.
const FLUSH: Duration = Duration::from_secs(10);

/// What a client is told of a disk that could not be flushed.
fn disk_code(error: &io::Error) -> Code {
    if error.kind() == io::ErrorKind::StorageFull { Code::NoCapacity } else { Code::VmFailed }
}

/// What a capture was.
#[derive(Debug, Clone, Copy)]
pub struct Captured {
    /// Octets of state.
    pub state_bytes: u64,
    /// Octets of memory that are looked at, zero pages among them.
    pub memory_bytes: u64,
    /// The memory file has only what differs from the one that the guest was restored from.
    pub is_diff: bool,
    /// How long the guest stood still; so far, where it still does.
    pub stopped: Duration,
}

impl Machine {
    /// Makes the microVM and lets it run; of what was `prepared`, where that is what is asked for. The devices are watched by
    /// `registry` under tokens from `first_token` on. `ended` is called on another thread when the guest meets its end.
    pub fn start<F>(
        config: StartConfig,
        prepared: Option<Prepared>,
        registry: &Registry,
        first_token: usize,
        ended: F,
    ) -> Result<Self, StartError>
    where
        F: Fn(End) + Send + Sync + 'static,
    {
        let StartConfig {
            vcpus,
            memory_bytes,
            kvm,
            source,
            base,
            overlay,
            layers,
            disks,
            disk_limits,
            net,
            serial,
            cid,
        } = config;
        let (memory, restoring) = match &source {
            Source::Kernel { .. } => (GuestMemory::new(memory_bytes)?, Err(kvm)),
            Source::Snapshot { files, prepared: name } => {
                let ready = prepared.zip(name.as_deref());
                let ready = ready.and_then(|(prepared, name)| prepared.parts(name, vcpus, memory_bytes));
                let parts = match ready {
                    Some(parts) => parts,
                    None => Restoring::new(kvm, files, vcpus, memory_bytes)?,
                };
                (parts.memory.clone(), Ok(parts))
            }
        };
        let devices = DeviceConfig { base, overlay, layers, disks, disk_limits, net, serial, cid };
        let devices = Arc::new(DeviceSet::new(&memory, devices)?);
        let windows = devices.windows();
        let mut entry = 0;
        if let Source::Kernel { kernel, initramfs, command_line } = &source {
            let places: Vec<MmioDevice> = windows.iter().map(|w| MmioDevice { addr: w.base, gsi: w.gsi }).collect();
            entry = boot::load(&memory, &BootSource { kernel, initramfs, command_line, vcpus, devices: &places })?;
        }
        let (vm, restoring) = match restoring {
            Err(kvm) => (Vm::new(kvm, memory.clone())?, None),
            Ok(Restoring { saved, vm, processors, .. }) => (vm, Some((saved, processors))),
        };
        vm.wire_interrupt(devices.serial_interrupt(), layout::COM1_GSI)?;
        let generation = EventFd::new(EFD_NONBLOCK).map_err(StartError::Event)?;
        vm.wire_interrupt(&generation, layout::GENERATION_GSI)?;
        for window in &windows {
            vm.wire_interrupt(window.interrupt, window.gsi)?;
            for (queue, event) in (0..).zip(window.queue_events) {
                vm.wire_doorbell(event, window.base + QUEUE_NOTIFY, queue)?;
            }
        }
        drop(windows);
        devices.register(registry, first_token).map_err(StartError::Watch)?;
        let is_restored = restoring.is_some();
        let vcpus = match restoring {
            None => vm.create_vcpus(vcpus, entry)?,
            Some((saved, processors)) => {
                let restored = vm.restore(processors, &saved)?;
                // Last: they may raise interrupts into the controllers that were put back just now.
                devices.close_net(true);
                devices.restore(&saved)?;
                restored
            }
        };
        let exits = Arc::new(ExitCounts::default());
        let processors = Processors::start(vcpus, devices.clone(), exits.clone(), ended)?;
        // Before the guest's first instruction every thread is under its last list.
        jail::all_entered();
        jail::enter(Kind::Device).map_err(StartError::Jail)?;
        let machine =
            Self { memory_bytes, processors, exits, devices, memory, generation, held: false, next_overlay: None, vm };
        if is_restored {
            machine.renew().map_err(StartError::Renew)?;
        }
        machine.processors.run();
        Ok(machine)
    }

    /// Whether the guest stands still.
    pub fn is_held(&self) -> bool {
        self.held
    }

    /// Makes the guest stand still, if it does not, and has a child of this process write its state and memory. The
    /// child tells `done` how that went: `errno` as four octets, or nothing and the end where it was killed.
    pub fn capture(&mut self, to: CaptureConfig) -> Result<Captured, Error> {
        if to.overlay.is_some() {
            // While the guest still runs: then freezing the layer is quick.
            let flushed = self.devices.flush_root(Instant::now() + FLUSH);
            flushed.map_err(|e| Error::new(disk_code(&e), format!("the disk cannot be put on its medium: {e}")))?;
        }
        let began = Instant::now();
        self.hold()?;
        let taken = self.take(&to);
        let taken = taken.and_then(|taken| to.overlay.map_or(Ok(()), |next| self.push(next)).map(|()| taken));
        let stopped = began.elapsed();
        if !to.hold || taken.is_err() {
            self.resume();
        }
        let (saved, child, captured) = taken?;
        let state = saved.encode();
        child.give(&state).map_err(cannot("its state"))?;
        Ok(Captured { state_bytes: state.len() as u64, stopped, ..captured })
    }

    /// Freezes the root disk's overlay. Last of a capture: what fails before leaves the disk as it was.
    fn push(&mut self, next: NextOverlay) -> Result<(), Error> {
        self.next_overlay = Some((next.name, self.devices.layers_pushed()));
        let failed = |e| Error::new(Code::VmFailed, format!("the disk's layer cannot be frozen: {e}"));
        self.devices.push_layer(next.file, Instant::now() + REST).map_err(failed)
    }

    /// Name of the overlay that the guest's root disk is written to, where that is one that a snapshot was given.
    pub fn next_overlay(&self) -> Option<&str> {
        let (name, before) = self.next_overlay.as_ref()?;
        (self.devices.layers_pushed() > *before).then_some(name)
    }

    fn hold(&mut self) -> Result<(), Error> {
        if self.held {
            return Ok(());
        }
        self.processors.pause(REST).map_err(|e| match e {
            PauseError::Ended => Error::new(Code::BadState, "the guest has ended"),
            PauseError::Timeout => {
                Error::new(Code::GuestTimeout, format!("a processor did not stand still within {REST:?}"))
            }
        })?;
        if !self.devices.pause(REST) {
            self.processors.run();
            return Err(Error::new(Code::GuestTimeout, format!("a device did not come to rest within {REST:?}")));
        }
        self.held = true;
        Ok(())
    }

    /// The guest goes on.
    pub fn resume(&mut self) {
        if std::mem::take(&mut self.held) {
            self.devices.resume();
            self.processors.run();
        }
    }

    /// What has to be done while the guest stands still: reading its state, and making the child that has its memory.
    fn take(&self, to: &CaptureConfig) -> Result<(Saved, Child, Captured), Error> {
        let mut saved = Saved::new(self.processors.count(), self.memory_bytes);
        self.devices.save(&mut saved);
        self.vm.save(&self.processors, &mut saved).map_err(|e| Error::new(Code::VmFailed, e.to_string()))?;
        let plan = Plan::new(&self.memory, to.page_map.as_ref(), to.diff).map_err(cannot("its pages"))?;
        let mut buffer = Plan::buffer();
        let write = || plan.write(&self.memory, &to.memory, &mut buffer);
        let child = Child::make(&to.done, &to.state, write).map_err(cannot("a process for it"))?;
        let captured =
            Captured { state_bytes: 0, memory_bytes: plan.bytes(), is_diff: plan.is_diff, stopped: Duration::ZERO };
        Ok((saved, child, captured))
    }

    /// Writes down what this restored guest has changed so far of its memory file. Gives how many pages.
    pub fn write_working_set(&self, page_map: &File, into: &File) -> Result<u64, Error> {
        if !self.memory.is_restored() {
            return Err(Error::new(Code::BadState, "the guest was not restored from a file"));
        }
        let set = WorkingSet::of(&self.memory, page_map).and_then(|set| set.write(into).map(|()| set));
        let set = set.map_err(|e| Error::new(Code::VmFailed, format!("no working set: {e}")))?;
        Ok(set.pages())
    }

    /// The devices, for events and streams.
    pub fn devices(&self) -> &DeviceSet {
        &self.devices
    }

    /// How the microVM used the worker so far, and what the guest said last of its memory.
    pub fn stats(&self) -> Fields {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let kvm = self.processors.guest_exits();
        let devices = self.devices.stats();
        let fields = Fields::new()
            .with("exits", self.exits.total())
            .with("exits_io", load(&self.exits.io))
            .with("exits_mmio", load(&self.exits.mmio))
            .with("exits_interrupted", load(&self.exits.interrupted))
            .with("kvm_exits", kvm.total)
            .with("kvm_exits_halt", kvm.halt)
            .with("kvm_exits_interrupt", kvm.interrupt)
            .with("kvm_exits_io", kvm.io)
            .with("kvm_exits_mmio", kvm.mmio)
            .with("block_read_bytes", devices.block_read_bytes)
            .with("block_written_bytes", devices.block_written_bytes)
            .with("block_requests", devices.block_requests)
            .with("block_flushes", devices.block_flushes)
            .with("block_errors", devices.block_errors)
            .with("vsock_rx_bytes", devices.vsock_rx_bytes)
            .with("vsock_tx_bytes", devices.vsock_tx_bytes)
            .with("vsock_rx_packets", devices.vsock_rx_packets)
            .with("vsock_tx_packets", devices.vsock_tx_packets)
            .with("vsock_connections", devices.vsock_connections)
            .with("memory_target_kib", (self.memory_bytes - devices.balloon_target_bytes) >> 10)
            .with("balloon_kib", devices.balloon_bytes >> 10)
            .with("balloon_reported_kib", devices.balloon_reported_bytes >> 10)
            .with("balloon_refused", devices.balloon_refused)
            .with("serial_in_bytes", devices.serial_in_bytes)
            .with("serial_overruns", devices.serial_overruns)
            .with("serial_dropped_bytes", devices.serial_dropped_bytes);
        let fields = self.devices.with_net_counters(fields);
        let Some((memory, taken)) = devices.memory else { return fields };
        let kib = |octets: Option<u64>| octets.map(|octets| octets >> 10);
        [
            ("guest_total_kib", kib(memory.total)),
            ("guest_free_kib", kib(memory.free)),
            ("guest_available_kib", kib(memory.available)),
            ("guest_cache_kib", kib(memory.caches)),
            ("guest_major_faults", memory.major_faults),
            ("guest_minor_faults", memory.minor_faults),
            ("guest_oom_kills", memory.oom_kills),
            ("guest_age_ms", u64::try_from(taken.elapsed().as_millis()).ok()),
        ]
        .into_iter()
        .filter_map(|(key, value)| Some((key, value?)))
        .fold(fields, |fields, (key, value)| fields.with(key, value))
    }

    /// Tells the guest that it is another machine from now on than the one whose memory it has: its kernel reseeds its
    /// random pool, and its vsock connections are gone. After a restore, before the processors run.
    pub fn renew(&self) -> io::Result<()> {
        generation::draw(&self.memory)?;
        self.devices.vsock_transport_reset();
        // Fails only when the counter is full: then an interrupt is pending anyway.
        let _ = self.generation.write(1);
        Ok(())
    }

    /// When the guest's kernel last spoke of its memory.
    pub fn heard(&self) -> Option<Instant> {
        self.devices.stats().memory.map(|(_, taken)| taken)
    }

    /// Asks the guest to do with so much memory, in MiB; from `MIN_TARGET_MIB` to what it has.
    pub fn set_memory_target(&self, mib: u64) -> Result<(), Error> {
        let max = self.memory_bytes >> 20;
        if !(MIN_TARGET_MIB..=max).contains(&mib) {
            let why = format!("target_mib={mib} is out of range: {MIN_TARGET_MIB} to {max} (its memory)");
            let error = Error::new(Code::OutOfRange, why).with("argument", "target_mib");
            return Err(error.with("min", MIN_TARGET_MIB).with("max", max));
        }
        self.devices.set_memory_target(mib << 20);
        Ok(())
    }

    /// Stops the processors, then closes the devices with everything flushed.
    pub fn end(mut self) -> io::Result<()> {
        self.processors.stop();
        self.devices.shutdown()
    }
}
