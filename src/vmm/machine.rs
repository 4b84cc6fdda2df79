//! One microVM from its parts: memory, devices, KVM, boot. What `vm.start` makes and the end takes apart.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::boot::acpi::MmioDevice;
use super::boot::{self, BootError, BootSource, layout};
use mio::Registry;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::config::{MIN_TARGET_MIB, StartConfig};
use super::devices::{DeviceConfig, DeviceError, DeviceSet, QUEUE_NOTIFY};
use super::generation;
use super::jail::{self, lists::Kind};
use super::kvm::{Bus, ExitCounts, KvmError, Processors, Vm};
use super::last_words::End;
use super::memory::{GuestMemory, MemoryError};
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
        Self::Kvm(e)
    }
}

impl StartError {
    /// As the supervisor is told.
    pub fn to_wire(&self) -> Error {
        let code = match self {
            Self::Memory(_) | Self::Event(_) => Code::NoCapacity,
            Self::Devices(DeviceError::Overlay(e)) if e.is_corrupt() => Code::Corrupt,
            Self::Boot(e) => e.code(),
            Self::Devices(_) | Self::Watch(_) | Self::Kvm(_) | Self::Jail(_) => Code::VmFailed,
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

/// A running microVM.
pub struct Machine {
    memory_bytes: u64,
    processors: Processors,
    exits: Arc<ExitCounts>,
    devices: Arc<DeviceSet>,
    memory: GuestMemory,
    /// Makes the guest's kernel look at its generation identifier.
    generation: EventFd,
    /// Closed last: its memory slots and event descriptors are in use by the above.
    _vm: Vm,
}

impl Machine {
    /// Makes the microVM and lets it run. The devices are watched by `registry` under tokens from `first_token` on.
    /// `ended` is called on another thread when the guest meets its end.
    pub fn start<F>(config: StartConfig, registry: &Registry, first_token: usize, ended: F) -> Result<Self, StartError>
    where
        F: Fn(End) + Send + Sync + 'static,
    {
        let memory = GuestMemory::new(config.memory_bytes)?;
        let StartConfig { base, overlay, layers, disks, disk_limits, net, serial, cid, .. } = config;
        let devices = DeviceConfig { base, overlay, layers, disks, disk_limits, net, serial, cid };
        let devices = Arc::new(DeviceSet::new(&memory, devices)?);
        let windows = devices.windows();
        let places: Vec<MmioDevice> = windows.iter().map(|w| MmioDevice { addr: w.base, gsi: w.gsi }).collect();

        let source = BootSource {
            kernel: &config.kernel,
            initramfs: &config.initramfs,
            command_line: &config.command_line,
            vcpus: config.vcpus,
            devices: &places,
        };
        let entry = boot::load(&memory, &source)?;

        let vm = Vm::new(config.kvm, memory.clone())?;
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
        let vcpus = vm.create_vcpus(config.vcpus, entry)?;
        let exits = Arc::new(ExitCounts::default());
        let processors = Processors::start(vcpus, devices.clone(), exits.clone(), ended)?;
        // Before the guest's first instruction every thread is under its last list.
        jail::all_entered();
        jail::enter(Kind::Device).map_err(StartError::Jail)?;
        processors.run();
        Ok(Self { memory_bytes: config.memory_bytes, processors, exits, devices, memory, generation, _vm: vm })
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
    pub fn renew(&self) -> Result<(), Error> {
        let drawn = generation::draw(&self.memory);
        drawn.map_err(|e| Error::new(Code::VmFailed, format!("no new generation identifier: {e}")))?;
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
