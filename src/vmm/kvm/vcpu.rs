//! One processor: its CPUID, boot MSRs and the registers of the PVH entry.

use std::sync::Arc;

use kvm_bindings::{CpuId, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use super::cpuid::Processor;
use super::state::{self, VcpuState};
use super::stats::Counters;
use super::{KvmError, Vm, msr, refused};
use crate::vmm::boot::layout::START_INFO;

const CR0_PROTECTED_MODE: u64 = 1;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
/// RFLAGS with nothing set but the bit that always is.
const RFLAGS_RESERVED: u64 = 1 << 1;

/// A processor that has not run yet.
#[derive(Debug)]
pub struct Vcpu {
    pub(super) fd: VcpuFd,
    pub(super) id: u8,
    /// KVM's counters, where it has them.
    pub(super) counters: Option<Counters>,
    /// MSRs that KVM keeps.
    msrs: Arc<[u32]>,
}

impl Vcpu {
    pub(super) fn new(vm: &Vm, id: u8, count: u8, entry: u64) -> Result<Self, KvmError> {
        let fd = vm.create_vcpu(id)?;
        // Unknown on hosts with an unstable TSC: then the guest is not told a frequency.
        let tsc_khz = fd.get_tsc_khz().unwrap_or(0);
        let processor = Processor { id, count, has_tsc_deadline: vm.has_tsc_deadline, tsc_khz };
        let entries = vm.offer.filter(&processor);
        let entries = CpuId::from_entries(&entries)
            .map_err(|_| KvmError::Lacks(format!("room for {} CPUID entries", entries.len())))?;
        fd.set_cpuid2(&entries).map_err(refused(format!("the CPUID of processor {id}")))?;

        // KVM resets FPU and local APIC (LINT0 = ExtINT on processor 0) to what is wanted here.
        msr::set_boot(&fd, id)?;
        if id == 0 {
            set_entry(&fd, entry)?;
        }
        Ok(Self::of(vm, fd, id))
    }

    pub(super) fn of(vm: &Vm, fd: VcpuFd, id: u8) -> Self {
        let counters = Counters::open(&fd);
        Self { fd, id, counters, msrs: vm.msrs.clone() }
    }

    /// Its state, while it stands still. `at` is the host's TSC that all processors are read against.
    pub(super) fn save(&self, at: u64) -> Result<VcpuState, KvmError> {
        state::save(&self.fd, self.id, &self.msrs, at)
    }
}

/// A flat 32-bit segment of 4 GiB.
fn flat(kind: u8, selector: u16) -> kvm_segment {
    kvm_segment { base: 0, limit: u32::MAX, selector, type_: kind, present: 1, db: 1, s: 1, g: 1, ..Default::default() }
}

/// 32-bit protected mode without paging, EBX at the start_info (Xen misc/pvh.pandoc, "x86 HVM direct boot ABI").
fn set_entry(fd: &VcpuFd, entry: u64) -> Result<(), KvmError> {
    let mut special = fd.get_sregs().map_err(refused("a read of the system registers"))?;
    // Selectors as they would be with a table of null, code, data, task; the table itself is the kernel's affair.
    special.cs = flat(0b1011, 0x8);
    let data = flat(0b0011, 0x10);
    (special.ds, special.es, special.fs, special.gs, special.ss) = (data, data, data, data, data);
    special.tr = kvm_segment { limit: 0x67, selector: 0x18, type_: 0b1011, present: 1, s: 0, ..Default::default() };
    special.cr0 = CR0_PROTECTED_MODE | CR0_EXTENSION_TYPE;
    special.cr4 = 0;
    special.efer = 0;
    fd.set_sregs(&special).map_err(refused("the system registers"))?;
    let registers = kvm_regs { rip: entry, rbx: START_INFO, rflags: RFLAGS_RESERVED, ..Default::default() };
    fd.set_regs(&registers).map_err(refused("the registers"))
}
