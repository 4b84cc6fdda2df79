//! KVM as the worker uses it: one virtual machine with KVM's own interrupt controllers, its memory slots, the
//! event descriptors of its devices, and its processors.
//!
//! No PIT is created: the guest is told of a hardware-reduced platform, takes its time from kvm-clock and the
//! TSC, and never looks for one. That saves a kernel thread for each guest and the guest its calibration.

mod cpuid;
mod msr;
mod prefault;
mod registers;
mod run;
mod state;
mod stats;
mod vcpu;

pub use cpuid::{Make, Mismatch};
pub use prefault::fault_in;
pub use run::{Bus, ExitCounts, PauseError, Processors};
pub use state::VcpuState;
pub use stats::GuestExits;
pub use vcpu::Vcpu;

use std::fmt;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_PMU_CAPABILITY, KVM_CAP_X86_NOTIFY_VMEXIT, KVM_MAX_CPUID_ENTRIES, KVM_PMU_CAP_DISABLE,
    KVM_X86_NOTIFY_VMEXIT_ENABLED, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use super::boot::layout;
use super::memory::GuestMemory;
use super::snapshot::{Saved, SavedError};

/// What KVM must be able to do, with the name of it for people.
const NEEDED: [(Cap, &str); 6] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
];

/// How often KVM_CREATE_VM is tried when a signal interrupts it.
const CREATE_TRIES: usize = 5;

/// What KVM refused, and why.
#[derive(Debug)]
pub enum KvmError {
    /// An ioctl failed.
    Refused {
        /// Which one, and on what.
        what: String,
        /// The kernel's reason.
        cause: errno::Error,
    },
    /// The host's KVM lacks something.
    Lacks(String),
    /// A thread of a processor cannot be started.
    Thread(std::io::Error),
    /// The saved state of a processor or of the machine cannot be.
    Saved(SavedError),
    /// A snapshot of a processor that can do more than this host's, or of another kind.
    Mismatch(Box<Mismatch>),
}

impl fmt::Display for KvmError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused { what, cause } => write!(f, "KVM refused {what}: {cause}"),
            Self::Lacks(what) => write!(f, "the host's KVM lacks {what}"),
            Self::Saved(cause) => cause.fmt(f),
            Self::Mismatch(cause) => cause.fmt(f),
            Self::Thread(cause) => write!(f, "a processor's thread cannot be started: {cause}"),
        }
    }
}

impl std::error::Error for KvmError {}

impl From<SavedError> for KvmError {
    fn from(cause: SavedError) -> Self {
        Self::Saved(cause)
    }
}

/// For `map_err`: names what was refused.
fn refused(what: impl Into<String>) -> impl FnOnce(errno::Error) -> KvmError {
    let what = what.into();
    move |cause| KvmError::Refused { what, cause }
}

/// A virtual machine without processors yet.
#[derive(Debug)]
pub struct Vm {
    fd: VmFd,
    /// Keeps the guest's memory mapped for as long as KVM may use it.
    _memory: GuestMemory,
    /// What KVM and this host's processor offer.
    offer: cpuid::Offer,
    has_tsc_deadline: bool,
    /// MSRs that KVM keeps for a processor.
    msrs: Arc<[u32]>,
}

impl Vm {
    /// Makes a virtual machine with the given memory on an open /dev/kvm.
    pub fn new(kvm: OwnedFd, memory: GuestMemory) -> Result<Self, KvmError> {
        // SAFETY: the descriptor is open and owned by nobody else; whether it is /dev/kvm, the next call finds out.
        let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
        if kvm.get_api_version() != KVM_API_VERSION as i32 {
            return Err(KvmError::Lacks(format!("API version {KVM_API_VERSION}, or it is no KVM")));
        }
        if let Some((_, name)) = NEEDED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            return Err(KvmError::Lacks((*name).to_string()));
        }
        let has_tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(refused("the supported CPUID"))?;
        let offer = cpuid::Offer::new(supported.as_slice().to_vec());
        let msrs = kvm.get_msr_index_list().map_err(refused("the list of MSRs"))?.as_slice().into();

        let fd = create(&kvm)?;
        // Both are outside of RAM; Intel processors without unrestricted guest mode use them (api.rst 4.35, 4.33).
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP).map_err(refused("the identity map's address"))?;
        fd.set_tss_address(layout::KVM_TSS as usize).map_err(refused("the TSS address"))?;
        for (slot, region) in memory.regions().iter().enumerate() {
            let slot = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: region.guest_addr,
                memory_size: region.size,
                userspace_addr: region.host_addr,
            };
            // SAFETY: the region is a live mapping of that size, and `_memory` keeps it for as long as the VM.
            unsafe { fd.set_user_memory_region(slot) }.map_err(refused(format!("memory slot {}", slot.slot)))?;
        }
        fd.create_irq_chip().map_err(refused("an interrupt controller"))?;
        // Older kernels and processors have neither; CPUID hides performance counters in any case.
        for (cap, arguments) in [
            // They tell a guest about its neighbours.
            (KVM_CAP_PMU_CAPABILITY, u64::from(KVM_PMU_CAP_DISABLE)),
            // Intel: a guest that never lets an interrupt in leaves after the processor's own limit (a window of 0 more).
            (KVM_CAP_X86_NOTIFY_VMEXIT, u64::from(KVM_X86_NOTIFY_VMEXIT_ENABLED)),
        ] {
            let mut wish = kvm_enable_cap { cap, ..Default::default() };
            wish.args[0] = arguments;
            let _ = fd.enable_cap(&wish);
        }
        Ok(Self { fd, _memory: memory, offer, has_tsc_deadline, msrs })
    }

    /// Lets writes to `event` raise a global system interrupt.
    pub fn wire_interrupt(&self, event: &EventFd, gsi: u32) -> Result<(), KvmError> {
        self.fd.register_irqfd(event, gsi).map_err(refused(format!("an irqfd for interrupt {gsi}")))
    }

    /// Lets the guest's 32-bit write of `queue` to `addr` signal `event` without leaving KVM.
    pub fn wire_doorbell(&self, event: &EventFd, addr: u64, queue: u32) -> Result<(), KvmError> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(addr), queue)
            .map_err(refused(format!("an ioeventfd at {addr:#x} for queue {queue}")))
    }

    /// Makes all processors; the first one starts at `entry` with PVH's registers, the others wait for it.
    /// To be called once, after the interrupt controller is there (KVM asks for that order).
    pub fn create_vcpus(&self, count: u8, entry: u64) -> Result<Vec<Vcpu>, KvmError> {
        (0..count).map(|id| Vcpu::new(self, id, count, entry)).collect()
    }

    /// Makes processors that can become those that were saved. To be called once. Where this host lacks something of them,
    /// nothing is made.
    pub fn prepare(&self, count: u8, saved: &Saved) -> Result<Vec<VcpuFd>, KvmError> {
        for id in 0..count {
            let processor = cpuid::Processor { id, count, has_tsc_deadline: self.has_tsc_deadline, tsc_khz: 0 };
            state::check(&self.offer, &processor, &self.msrs, saved)?;
        }
        let fds = (0..count).map(|id| self.create_vcpu(id)).collect::<Result<Vec<_>, _>>()?;
        (0..).zip(&fds).try_for_each(|(id, fd)| state::identify(fd, id, &self.offer, saved))?;
        Ok(fds)
    }

    /// Makes prepared processors what they were when they were saved, and then the interrupt controllers and the clock: the
    /// guest's time goes on from this moment.
    pub fn restore(&self, fds: Vec<VcpuFd>, saved: &Saved) -> Result<Vec<Vcpu>, KvmError> {
        let now = state::moment();
        for (id, fd) in (0..).zip(&fds) {
            state::restore(fd, id, &self.offer, saved, now)?;
        }
        state::restore_vm(&self.fd, saved)?;
        Ok((0..).zip(fds).map(|(id, fd)| Vcpu::of(self, fd, id)).collect())
    }

    fn create_vcpu(&self, id: u8) -> Result<VcpuFd, KvmError> {
        self.fd.create_vcpu(u64::from(id)).map_err(refused(format!("processor {id}")))
    }

    /// Adds processors, which stand still, interrupt controllers and clock to a microVM's state. Devices raise no
    /// interrupts any more.
    pub fn save(&self, processors: &Processors, saved: &mut Saved) -> Result<(), KvmError> {
        for state in processors.save(state::moment())? {
            state.put(saved);
        }
        state::save_vm(&self.fd, saved)
    }
}

fn create(kvm: &Kvm) -> Result<VmFd, KvmError> {
    let mut tries = 1;
    loop {
        match kvm.create_vm() {
            Ok(fd) => return Ok(fd),
            Err(e) if e.errno() == libc::EINTR && tries < CREATE_TRIES => tries += 1,
            Err(cause) => return Err(KvmError::Refused { what: "a virtual machine".to_string(), cause }),
        }
    }
}
