//! A microVM that goes on from a snapshot, as far as it can be made before it is known whose it is: its memory, and KVM's
//! machine and processors. What is of a moment (registers, timers, clocks) and what is of a sandbox (disks, network) comes with
//! `vm.start`. A worker that waits makes one beforehand (`vm.prepare`), with everything mapped that its guest will touch.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use kvm_ioctls::VcpuFd;

use super::config::{PrepareConfig, SnapshotFiles};
use super::kvm::{Vm, fault_in};
use super::machine::StartError;
use super::memory::GuestMemory;
use super::snapshot::working_set::{Touched, WorkingSet};
use super::snapshot::{Saved, SavedError, saved};

/// The parts.
#[derive(Debug)]
pub struct Restoring {
    /// The snapshot's state.
    pub saved: Saved,
    /// Its memory.
    pub memory: GuestMemory,
    /// KVM's machine on it.
    pub vm: Vm,
    /// Its processors, which have nothing yet of what was saved but their CPUID.
    pub processors: Vec<VcpuFd>,
}

impl Restoring {
    /// Makes them. Of the pages that such guests touch, those that they change are made this one's own and mapped; the others cost more
    /// than they save while somebody waits.
    pub fn new(kvm: OwnedFd, files: &SnapshotFiles, vcpus: u8, memory_bytes: u64) -> Result<Self, StartError> {
        let made = Self::make(kvm, files, vcpus, memory_bytes)?;
        if let Some(set) = &files.working_set {
            let set = WorkingSet::read(set).map_err(StartError::Snapshot)?;
            made.make_own(&set);
            made.map(&set, Touched::Changed);
        }
        Ok(made)
    }

    /// Gives how many pages.
    fn make_own(&self, set: &WorkingSet) -> u64 {
        set.prepare(Touched::Changed, |offset, len| self.memory.make_own(offset, len))
    }

    /// Maps pages that such guests touch, those that are its own for writing. Gives how many.
    fn map(&self, set: &WorkingSet, touched: Touched) -> u64 {
        let Some(processor) = self.processors.first() else { return 0 };
        let one = |offset, len| self.memory.at(offset, len).is_some_and(|gpa| fault_in(processor, gpa, len));
        set.prepare(touched, one)
    }

    fn make(kvm: OwnedFd, files: &SnapshotFiles, vcpus: u8, memory_bytes: u64) -> Result<Self, StartError> {
        let saved = read_state(&files.state, vcpus, memory_bytes)?;
        let memory = GuestMemory::restored(&files.memory, memory_bytes)?;
        let vm = Vm::new(kvm, memory.clone())?;
        let processors = vm.prepare(vcpus, &saved)?;
        Ok(Self { saved, memory, vm, processors })
    }
}

/// What a worker that waits has made beforehand.
#[derive(Debug)]
pub struct Prepared {
    name: String,
    vcpus: u8,
    memory_bytes: u64,
    parts: Restoring,
    /// Pages that are its own.
    pub own: u64,
    /// Pages that are mapped for its processors, these among them.
    pub mapped: u64,
}

impl Prepared {
    /// Makes it.
    pub fn new(config: PrepareConfig) -> Result<Self, StartError> {
        let PrepareConfig { name, vcpus, memory_bytes, kvm, files } = config;
        let parts = Restoring::make(kvm, &files, vcpus, memory_bytes)?;
        let set = files.working_set.as_ref().map(WorkingSet::read).transpose().map_err(StartError::Snapshot)?;
        let (own, mapped) = set.map_or((0, 0), |set| (parts.make_own(&set), parts.map(&set, Touched::Any)));
        Ok(Self { name, vcpus, memory_bytes, parts, own, mapped })
    }

    /// Gives the parts where they are of that name and shape.
    pub fn parts(self, name: &str, vcpus: u8, memory_bytes: u64) -> Option<Restoring> {
        let is_it = (self.name.as_str(), self.vcpus, self.memory_bytes) == (name, vcpus, memory_bytes);
        is_it.then_some(self.parts)
    }
}

/// Reads the state of a snapshot that is to become a microVM of that shape.
fn read_state(file: &File, vcpus: u8, memory_bytes: u64) -> Result<Saved, StartError> {
    let len = file.metadata().map_err(StartError::Snapshot)?.len();
    if len > saved::MAX_BYTES as u64 {
        return Err(SavedError::TooLong { bytes: usize::try_from(len).unwrap_or(usize::MAX) }.into());
    }
    let mut octets = vec![0; len as usize];
    file.read_exact_at(&mut octets, 0).map_err(StartError::Snapshot)?;
    let state = Saved::decode(&octets)?;
    let shape = state.shape()?;
    if shape != (vcpus, memory_bytes) {
        let (had, of) = shape;
        let why = format!("it is of {had} processors and {of} octets of memory, not of {vcpus} and {memory_bytes}");
        return Err(SavedError::NotSaved(why).into());
    }
    Ok(state)
}
