//! Processors, interrupt controllers and clock of a paused guest: out of KVM and back.
//!
//! What is saved of a processor, and in which order it is put back, follows from how KVM's parts depend on each other
//! (Linux Documentation/virt/kvm/api.rst): the system registers place the local APIC, the local APIC has the mode that
//! the deadline's register is taken in, and writing the registers forgets pending exceptions. The TSC is one for all
//! processors: each is given as its distance from the host's, so that no two of them drift apart by being restored one
//! after the other.

use std::arch::x86_64::_rdtsc;
use std::mem::size_of;

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, KVM_VCPU_TSC_CTRL,
    KVM_VCPU_TSC_OFFSET, Msrs, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_device_attr, kvm_irqchip,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::cpuid::{Needs, Offer, Processor};
use super::{KvmError, refused};
use crate::vmm::snapshot::saved::{Part, Saved, SavedError};

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, 0xae, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, 0xae, 0xe2, kvm_device_attr);

/// Time stamp counter: restored as a distance, see the module.
const MSR_TSC: u32 = 0x10;
/// Taken only while the local APIC's timer is in that mode, so it comes last.
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// How far the host's TSC may be from the saved one's frequency without being scaled: 250 parts in a million, as KVM
/// has it.
const TSC_TOLERANCE: u64 = 4000;
/// MSRs that one call takes.
const MSRS_AT_ONCE: usize = 64;

/// The parts that a virtual machine has three of.
const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// A structure of KVM's that is nothing but numbers.
///
/// # Safety
/// `repr(C)`, any octets are a value of it, and it has no padding that is not a field.
unsafe trait Plain: Copy {
    fn octets(&self) -> &[u8] {
        // SAFETY: by the trait's promise all octets of it are initialised; the slice borrows it.
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(self).cast(), size_of::<Self>()) }
    }

    fn of(octets: &[u8]) -> Option<Self> {
        // SAFETY: by the trait's promise any octets are a value; there are as many as are read, at any alignment.
        (octets.len() == size_of::<Self>()).then(|| unsafe { octets.as_ptr().cast::<Self>().read_unaligned() })
    }
}

// SAFETY: <asm/kvm.h>: numbers only, with each hole a named field; the kernel's ABI has no other padding.
unsafe impl Plain for kvm_regs {}
// SAFETY: as above.
unsafe impl Plain for kvm_sregs {}
// SAFETY: as above.
unsafe impl Plain for kvm_xcrs {}
// SAFETY: as above.
unsafe impl Plain for kvm_debugregs {}
// SAFETY: as above.
unsafe impl Plain for kvm_vcpu_events {}
// SAFETY: as above.
unsafe impl Plain for kvm_lapic_state {}
// SAFETY: as above; the union is as long as its longest member, whose octets are numbers, and is made from zeroes.
unsafe impl Plain for kvm_irqchip {}
// SAFETY: as above.
unsafe impl Plain for kvm_msr_entry {}
// SAFETY: as above.
unsafe impl Plain for kvm_cpuid_entry2 {}

/// A field of a part as a structure.
fn plain<T: Plain>(part: &Part, key: &'static str) -> Result<T, SavedError> {
    let octets = part.exact(key, size_of::<T>())?;
    T::of(&octets).ok_or_else(|| part.wrong(key, "is of another length"))
}

/// A field of a part as structures.
fn plains<T: Plain>(part: &Part, key: &'static str, max: usize) -> Result<Vec<T>, SavedError> {
    let octets = part.bytes(key)?.unwrap_or_default();
    if !octets.len().is_multiple_of(size_of::<T>()) || octets.len() / size_of::<T>() > max {
        return Err(part.wrong(key, format!("has {} octets, must have a multiple of {}", octets.len(), size_of::<T>())));
    }
    Ok(octets.chunks_exact(size_of::<T>()).filter_map(T::of).collect())
}

fn join<T: Plain>(all: &[T]) -> Vec<u8> {
    all.iter().flat_map(|one| one.octets().iter().copied()).collect()
}

/// One processor, as it stands still.
#[derive(Debug)]
pub struct VcpuState(Vec<Part>);

impl VcpuState {
    /// Adds it to a microVM's state.
    pub fn put(self, saved: &mut Saved) {
        self.0.into_iter().for_each(|part| saved.push(part));
    }
}

/// The host's time stamp counter.
fn host_tsc() -> u64 {
    // SAFETY: RDTSC has no preconditions; every x86_64 processor has it.
    unsafe { _rdtsc() }
}

fn tsc_attribute(value: &mut u64) -> kvm_device_attr {
    let addr = std::ptr::from_mut(value) as u64;
    kvm_device_attr { flags: 0, group: KVM_VCPU_TSC_CTRL, attr: u64::from(KVM_VCPU_TSC_OFFSET), addr }
}

/// Reads a processor that stands still. `msrs` are those that KVM says it keeps, `at` the host's TSC that all
/// processors are read against.
pub(super) fn save(fd: &VcpuFd, id: u8, msrs: &[u32], at: u64) -> Result<VcpuState, KvmError> {
    let index = u64::from(id);
    let what = |what: &str| refused(format!("a read of processor {id}'s {what}"));
    // First: it may finish what the local APIC has pending.
    let mp_state = fd.get_mp_state().map_err(what("state"))?.mp_state;
    let xsave = fd.get_xsave().map_err(what("vector registers"))?;
    let mut region = Vec::with_capacity(size_of_val(&xsave.region));
    xsave.region.iter().for_each(|word| region.extend(word.to_ne_bytes()));
    let mut offset = 0_u64;
    // SAFETY: the attribute names eight octets that are alive, which the kernel fills.
    let has_offset = unsafe { ioctl_with_ref(fd, KVM_GET_DEVICE_ATTR(), &tsc_attribute(&mut offset)) } == 0;
    let mut part = Part::new("vcpu", index)
        .with("mp_state", mp_state)
        .with("tsc_khz", fd.get_tsc_khz().unwrap_or(0))
        .with_bytes("regs", fd.get_regs().map_err(what("registers"))?.octets())
        .with_bytes("sregs", fd.get_sregs().map_err(what("system registers"))?.octets())
        .with_bytes("xcrs", fd.get_xcrs().map_err(what("extended control registers"))?.octets())
        .with_bytes("debugregs", fd.get_debug_regs().map_err(what("debug registers"))?.octets());
    if has_offset {
        part = part.with("tsc", at.wrapping_add(offset));
    }
    let lapic = fd.get_lapic().map_err(what("local APIC"))?;
    let cpuid = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(what("CPUID"))?;
    let msrs = read_msrs(fd, id, msrs, has_offset)?;
    // Last: what came before may have changed it.
    let events = fd.get_vcpu_events().map_err(what("events"))?;
    Ok(VcpuState(vec![
        part.with_bytes("events", events.octets()),
        Part::new("xsave", index).with_bytes("region", &region),
        Part::new("lapic", index).with_bytes("regs", lapic.octets()),
        Part::new("cpuid", index).with_bytes("entries", &join(cpuid.as_slice())),
        Part::new("msrs", index).with_bytes("entries", &join(&msrs)),
    ]))
}

/// What a processor has in those MSRs; those that this KVM lists and does not read are left out.
fn read_msrs(fd: &VcpuFd, id: u8, wanted: &[u32], has_offset: bool) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let mut wanted: Vec<u32> = wanted.iter().copied().filter(|index| !(has_offset && *index == MSR_TSC)).collect();
    wanted.sort_by_key(|index| (*index == MSR_TSC_DEADLINE, *index));
    let mut found = Vec::with_capacity(wanted.len());
    let mut rest = wanted.as_slice();
    while !rest.is_empty() {
        let some = &rest[..rest.len().min(MSRS_AT_ONCE)];
        let entries: Vec<_> = some.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| KvmError::Lacks("room for MSRs".to_string()))?;
        let count = fd.get_msrs(&mut msrs).map_err(refused(format!("a read of processor {id}'s MSRs")))?;
        found.extend_from_slice(&msrs.as_slice()[..count.min(some.len())]);
        // The one that it stopped at is not read.
        rest = &rest[(count + usize::from(count < some.len())).min(rest.len())..];
    }
    Ok(found)
}

/// Whether a saved processor can go on on this host.
pub(super) fn check(offer: &Offer, processor: &Processor, known: &[u32], saved: &Saved) -> Result<(), KvmError> {
    let index = u64::from(processor.id);
    let cpuid = cpuid_of(saved, index)?;
    let msrs = msrs_of(saved, index)?;
    let xcrs: kvm_xcrs = plain(saved.find("vcpu", index)?, "xcrs")?;
    let xcr0 = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).find(|xcr| xcr.xcr == 0).map_or(0, |xcr| xcr.value);
    let needs = Needs { cpuid: &cpuid, xcr0, msrs: &msrs };
    offer.fits(&needs, processor, known).map_err(|e| KvmError::Mismatch(Box::new(e)))
}

fn cpuid_of(saved: &Saved, index: u64) -> Result<Vec<kvm_cpuid_entry2>, SavedError> {
    plains(saved.find("cpuid", index)?, "entries", KVM_MAX_CPUID_ENTRIES)
}

fn msrs_of(saved: &Saved, index: u64) -> Result<Vec<kvm_msr_entry>, SavedError> {
    plains(saved.find("msrs", index)?, "entries", usize::from(u16::MAX))
}

/// Gives a fresh processor what a guest finds of it: the frequency of its TSC and its CPUID. Nothing of it is of a moment.
pub(super) fn identify(fd: &VcpuFd, id: u8, offer: &Offer, saved: &Saved) -> Result<(), KvmError> {
    let index = u64::from(id);
    let entries = cpuid_of(saved, index)?;
    let khz = saved.find("vcpu", index)?.number("tsc_khz", u64::from(u32::MAX), 0)?;
    let own = u64::from(fd.get_tsc_khz().unwrap_or(0));
    if khz != 0 && own != 0 && khz.abs_diff(own) > own / TSC_TOLERANCE {
        // A processor that cannot scale its TSC.
        let lacks = |_| KvmError::Mismatch(Box::new(offer.lacks(format!("tsc-of-{khz}-khz"), &entries)));
        fd.set_tsc_khz(khz as u32).map_err(lacks)?;
    }
    let cpuid = CpuId::from_entries(&entries).map_err(|_| KvmError::Lacks("room for the CPUID entries".to_string()))?;
    fd.set_cpuid2(&cpuid).map_err(refused(format!("the saved CPUID of processor {id}")))
}

/// Makes a processor that was identified the saved one. `now` is the host's TSC that all processors are put back against.
pub(super) fn restore(fd: &VcpuFd, id: u8, offer: &Offer, saved: &Saved, now: u64) -> Result<(), KvmError> {
    let index = u64::from(id);
    let entries = cpuid_of(saved, index)?;
    let lacks = |what: String| KvmError::Mismatch(Box::new(offer.lacks(what, &entries)));
    let what = |what: &str| refused(format!("the saved {what} of processor {id}"));
    let part = saved.find("vcpu", index)?;
    let mp_state = part.number("mp_state", u64::from(u32::MAX), 0)? as u32;
    fd.set_mp_state(kvm_mp_state { mp_state }).map_err(what("state"))?;
    fd.set_regs(&plain(part, "regs")?).map_err(what("registers"))?;
    fd.set_sregs(&plain(part, "sregs")?).map_err(what("system registers"))?;
    let region = saved.find("xsave", index)?.exact("region", 4096)?;
    let mut xsave = kvm_bindings::kvm_xsave::default();
    for (word, octets) in xsave.region.iter_mut().zip(region.as_chunks::<4>().0) {
        *word = u32::from_ne_bytes(*octets);
    }
    // SAFETY: no guest here has features whose state is longer than the structure: none was permitted.
    unsafe { fd.set_xsave(&xsave) }.map_err(what("vector registers"))?;
    fd.set_xcrs(&plain(part, "xcrs")?).map_err(what("extended control registers"))?;
    fd.set_debug_regs(&plain(part, "debugregs")?).map_err(what("debug registers"))?;
    fd.set_lapic(&plain(saved.find("lapic", index)?, "regs")?).map_err(what("local APIC"))?;
    if part.get("tsc").is_some() {
        let mut offset = part.number("tsc", u64::MAX, 0)?.wrapping_sub(now);
        // SAFETY: the attribute names eight octets that are alive, which the kernel reads.
        if unsafe { ioctl_with_ref(fd, KVM_SET_DEVICE_ATTR(), &tsc_attribute(&mut offset)) } != 0 {
            return Err(what("TSC")(errno::Error::last()));
        }
    }
    write_msrs(fd, id, &msrs_of(saved, index)?, lacks)?;
    let events: kvm_vcpu_events = plain(part, "events")?;
    fd.set_vcpu_events(&events).map_err(what("events"))
}

fn write_msrs(
    fd: &VcpuFd,
    id: u8,
    entries: &[kvm_msr_entry],
    lacks: impl Fn(String) -> KvmError,
) -> Result<(), KvmError> {
    let mut rest = entries;
    while !rest.is_empty() {
        let some = &rest[..rest.len().min(MSRS_AT_ONCE)];
        let msrs = Msrs::from_entries(some).map_err(|_| KvmError::Lacks("room for MSRs".to_string()))?;
        let count = fd.set_msrs(&msrs).map_err(refused(format!("the saved MSRs of processor {id}")))?;
        if let Some(msr) = some.get(count) {
            // KVM lists some that it takes on other hosts only; there is nothing in them then.
            if msr.data != 0 {
                return Err(lacks(format!("msr-{:#x}={:#x}", msr.index, msr.data)));
            }
            rest = &rest[count + 1..];
        } else {
            rest = &rest[some.len()..];
        }
    }
    Ok(())
}

/// Reads the interrupt controllers and the clock, once no device raises interrupts any more.
pub(super) fn save_vm(fd: &VmFd, saved: &mut Saved) -> Result<(), KvmError> {
    let clock = fd.get_clock().map_err(refused("a read of the clock"))?;
    let mut part = Part::new("vm", 0).with("clock", clock.clock);
    for (key, chip_id) in CHIP_KEYS.into_iter().zip(CHIPS) {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        fd.get_irqchip(&mut chip).map_err(refused(format!("a read of interrupt controller {chip_id}")))?;
        part = part.with_bytes(key, chip.octets());
    }
    saved.push(part);
    Ok(())
}

const CHIP_KEYS: [&str; 3] = ["pic_master", "pic_slave", "ioapic"];

/// Puts them back, after the processors. The guest's monotonic time goes on where it stood still.
pub(super) fn restore_vm(fd: &VmFd, saved: &Saved) -> Result<(), KvmError> {
    let part = saved.find("vm", 0)?;
    let clock = kvm_clock_data { clock: part.number("clock", u64::MAX, 0)?, ..Default::default() };
    fd.set_clock(&clock).map_err(refused("the saved clock"))?;
    for (key, chip_id) in CHIP_KEYS.into_iter().zip(CHIPS) {
        let chip: kvm_irqchip = plain(part, key)?;
        if chip.chip_id != chip_id {
            return Err(part.wrong(key, format!("is of controller {}", chip.chip_id)).into());
        }
        fd.set_irqchip(&chip).map_err(refused(format!("the saved interrupt controller {chip_id}")))?;
    }
    Ok(())
}

/// The TSC that processors are read or put back against.
pub(super) fn moment() -> u64 {
    host_tsc()
}
