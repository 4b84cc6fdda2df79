//! One microVM from its parts: memory, devices, KVM, boot. What `vm.start` makes and the end takes apart.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::bare::Bare;
use super::boot::{self, BootError, BootSource};
use super::config::StartConfig;
use super::kvm::{ExitCounts, KvmError, Processors, Vm};
use super::last_words::End;
use super::memory::{GuestMemory, MemoryError};
use crate::wire::{Code, Error, Fields};

/// Why a microVM could not be started.
#[derive(Debug)]
pub enum StartError {
    /// No memory.
    Memory(MemoryError),
    /// Kernel, initramfs or command line.
    Boot(BootError),
    /// KVM.
    Kvm(KvmError),
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory(e) => e.fmt(f),
            Self::Boot(e) => e.fmt(f),
            Self::Kvm(e) => e.fmt(f),
        }
    }
}

impl std::error::Error for StartError {}

impl From<MemoryError> for StartError {
    fn from(e: MemoryError) -> Self {
        Self::Memory(e)
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
            Self::Memory(_) => Code::NoCapacity,
            Self::Boot(e) => e.code(),
            Self::Kvm(_) => Code::VmFailed,
        };
        Error::new(code, self.to_string())
    }
}

/// A running microVM.
#[derive(Debug)]
pub struct Machine {
    processors: Processors,
    exits: Arc<ExitCounts>,
    /// Closed last: its memory slots and event descriptors are in use by the above.
    _vm: Vm,
}

impl Machine {
    /// Makes the microVM and lets it run. `ended` is called on another thread when the guest meets its end.
    pub fn start<F>(config: StartConfig, ended: F) -> Result<Self, StartError>
    where
        F: Fn(End) + Send + Sync + 'static,
    {
        let memory = GuestMemory::new(config.memory_bytes)?;
        let bus = Arc::new(Bare(config.serial));
        let source = BootSource {
            kernel: &config.kernel,
            initramfs: &config.initramfs,
            command_line: &config.command_line,
            vcpus: config.vcpus,
            devices: &[],
        };
        let entry = boot::load(&memory, &source)?;
        let vm = Vm::new(config.kvm, memory)?;
        let vcpus = vm.create_vcpus(config.vcpus, entry)?;
        let exits = Arc::new(ExitCounts::default());
        let processors = Processors::start(vcpus, bus, exits.clone(), ended)?;
        Ok(Self { processors, exits, _vm: vm })
    }

    /// How the microVM used the worker so far.
    pub fn stats(&self) -> Fields {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Fields::new()
            .with("exits", self.exits.total())
            .with("exits_io", load(&self.exits.io))
            .with("exits_mmio", load(&self.exits.mmio))
            .with("exits_interrupted", load(&self.exits.interrupted))
            .with("exits_other", load(&self.exits.other))
    }

    /// Stops the processors, then closes the devices with everything flushed.
    pub fn end(mut self) -> std::io::Result<()> {
        self.processors.stop();
        Ok(())
    }
}
