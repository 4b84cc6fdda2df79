//! What a guest's processors say of themselves.
//!
//! The start is what KVM offers on this host. Taken away: nested virtualization, performance counters and other
//! things that a sandbox has no use for. Written anew: APIC ids and topology (one package, one thread a core),
//! since KVM passes on those of the host. The tables in `model` have each of it with its reason. Sources: Intel SDM
//! 2A "CPUID", AMD APM 3 appendix E, Linux Documentation/virt/kvm/x86/cpuid.rst.

mod fit;
mod model;
#[cfg(test)]
mod tests;

pub(super) use fit::Needs;
pub use fit::{Make, Mismatch};

use std::arch::x86_64::{__cpuid, CpuidResult};

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use model::{EMPTIED, HIDDEN, Host, Register};

/// One processor of a guest.
#[derive(Debug, Clone, Copy)]
pub(super) struct Processor {
    /// Its number, which is its APIC id too.
    pub id: u8,
    /// How many the guest has, 1 to 16.
    pub count: u8,
    /// Whether KVM has the TSC deadline timer; it does not say so by CPUID.
    pub has_tsc_deadline: bool,
    /// Frequency of the guest's TSC, 0 where it is unknown.
    pub tsc_khz: u32,
}

/// What KVM offers on this host, and what of the host's own processor KVM leaves out.
#[derive(Debug)]
pub(super) struct Offer {
    /// KVM_GET_SUPPORTED_CPUID's entries.
    pub entries: Vec<kvm_cpuid_entry2>,
    /// Leaves 0x80000002 to 0x80000004, the processor's name; zeroes where it has none.
    pub brand: [[u32; 4]; 3],
    /// Whether the host's processor is QEMU's software CPU.
    pub is_software: bool,
}

/// First KVM leaf, which holds the last one's number and KVM's signature; on the host, any hypervisor's.
const KVM_BASE: u32 = 0x4000_0000;
/// Leaf with the TSC's and the local APIC timer's frequency, as VMware defined it and others read it.
const TIMING: u32 = 0x4000_0010;
/// KVM's local APIC timer counts nanoseconds.
const LAPIC_KHZ: u32 = 1_000_000;
/// First of the three leaves of the processor's name.
const BRAND: u32 = 0x8000_0002;
/// Topology leaves, which are made anew from nothing.
const TOPOLOGY: [u32; 2] = [0xb, 0x1f];

impl Offer {
    /// Adds to KVM's entries what the host's processor says itself.
    pub(super) fn new(entries: Vec<kvm_cpuid_entry2>) -> Self {
        let registers = |leaf| {
            let CpuidResult { eax, ebx, ecx, edx } = __cpuid(leaf);
            [eax, ebx, ecx, edx]
        };
        let has_brand = registers(0x8000_0000)[0] >= BRAND + 2;
        let brand = [0, 1, 2].map(|n| if has_brand { registers(BRAND + n) } else { [0; 4] });
        // The hypervisor's leaves mean something only where there is one; QEMU's signature fills three registers.
        let has_hypervisor = registers(1)[2] & bit(31) != 0;
        let [_, signature @ ..] = registers(KVM_BASE);
        let is_software = has_hypervisor && signature.map(u32::to_le_bytes).concat() == b"TCGTCGTCGTCG";
        Self { entries, brand, is_software }
    }

    fn find(&self, leaf: u32) -> Option<&kvm_cpuid_entry2> {
        self.entries.iter().find(|e| e.function == leaf)
    }

    fn is_amd(&self) -> bool {
        // EBX of leaf 0 starts the vendor's name: "Auth"enticAMD, "Hygo"nGenuine.
        self.find(0).is_some_and(|e| matches!(&e.ebx.to_le_bytes(), b"Auth" | b"Hygo"))
    }

    /// Whether a row of the model's tables is for this host.
    fn is(&self, host: Host) -> bool {
        match host {
            Host::Any => true,
            Host::Amd => self.is_amd(),
            Host::Software => self.is_software,
        }
    }

    /// The CPUID entries of one processor.
    pub(super) fn filter(&self, processor: &Processor) -> Vec<kvm_cpuid_entry2> {
        let made_anew = |leaf: u32| leaf == TIMING || TOPOLOGY.contains(&leaf);
        let mut entries: Vec<_> = self.entries.iter().filter(|e| !made_anew(e.function)).copied().collect();
        for entry in &mut entries {
            self.take_away(entry);
            self.rewrite(entry, processor);
        }
        self.add_topology(&mut entries, processor);
        if processor.tsc_khz != 0 && self.find(KVM_BASE).is_some() {
            entries.push(kvm_cpuid_entry2 {
                function: TIMING,
                eax: processor.tsc_khz,
                ebx: LAPIC_KHZ,
                ..Default::default()
            });
        }
        entries
    }

    fn take_away(&self, entry: &mut kvm_cpuid_entry2) {
        for row in HIDDEN.iter().filter(|row| (row.leaf, row.index) == (entry.function, entry.index)) {
            if self.is(row.host) {
                let register = match row.register {
                    Register::Eax => &mut entry.eax,
                    Register::Ebx => &mut entry.ebx,
                    Register::Ecx => &mut entry.ecx,
                    Register::Edx => &mut entry.edx,
                };
                let mask = row.bits.iter().fold(0, |mask, n| mask | bit(*n));
                set(register, mask, false);
            }
        }
        if EMPTIED.iter().any(|row| row.leaf == entry.function && self.is(row.host)) {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
    }

    fn rewrite(&self, entry: &mut kvm_cpuid_entry2, processor: &Processor) {
        let Processor { id, count, .. } = *processor;
        let (id, count) = (u32::from(id), u32::from(count));
        match entry.function {
            0x1 => {
                field(&mut entry.ebx, 24, 8, id);
                field(&mut entry.ebx, 16, 8, count.next_power_of_two());
                set(&mut entry.ecx, bit(24), processor.has_tsc_deadline);
                set(&mut entry.ecx, bit(31), true); // hypervisor
                set(&mut entry.edx, bit(28), count > 1); // more than one logical processor
            }
            0x4 if entry.eax & 0x1f != 0 => {
                let sharing = sharing(entry.eax, count.next_power_of_two());
                field(&mut entry.eax, 14, 12, sharing - 1);
                field(&mut entry.eax, 26, 6, count.next_power_of_two() - 1);
            }
            0x6 => {
                entry.eax &= bit(2);
                (entry.ebx, entry.ecx, entry.edx) = (0, 0, 0);
            }
            KVM_BASE if processor.tsc_khz != 0 => entry.eax = entry.eax.max(TIMING),
            0x8000_0001 => set(&mut entry.ecx, bit(1), self.is_amd() && count > 1),
            BRAND..=0x8000_0004 => {
                [entry.eax, entry.ebx, entry.ecx, entry.edx] = self.brand[(entry.function - BRAND) as usize];
            }
            0x8000_0008 if self.is_amd() => {
                entry.ecx = 0;
                field(&mut entry.ecx, 0, 8, count - 1);
                field(&mut entry.ecx, 12, 4, id_bits(processor.count));
            }
            0x8000_001d if entry.eax & 0x1f != 0 => {
                let sharing = sharing(entry.eax, count);
                field(&mut entry.eax, 14, 12, sharing - 1);
            }
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (id, id, 0, 0),
            _ => {}
        }
    }

    /// The extended topology leaves: one thread a core, all cores in one package. x2APIC ids are the same numbers.
    fn add_topology(&self, entries: &mut Vec<kvm_cpuid_entry2>, processor: &Processor) {
        const THREADS: u32 = 1;
        const CORES: u32 = 2;
        let last = self.find(0).map_or(0, |e| e.eax);
        for leaf in TOPOLOGY {
            // Leaf 0xb is Intel's and AMD's; 0x1f is of newer Intel processors only.
            if leaf > last || self.find(leaf).is_none() {
                continue;
            }
            let levels = [(0, 1, THREADS), (id_bits(processor.count), u32::from(processor.count), CORES), (0, 0, 0)];
            for (index, (shift, count, kind)) in (0u32..).zip(levels) {
                entries.push(kvm_cpuid_entry2 {
                    function: leaf,
                    index,
                    flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                    eax: shift,
                    ebx: count,
                    ecx: index | kind << 8,
                    edx: u32::from(processor.id),
                    ..Default::default()
                });
            }
        }
    }
}

const fn bit(n: u32) -> u32 {
    1 << n
}

/// Bits of an APIC id that tell `count` processors apart.
fn id_bits(count: u8) -> u32 {
    u32::from(count).next_power_of_two().trailing_zeros()
}

/// How many processors share a cache: the first two levels are a core's own, the others are shared by `all`. The level
/// stands in bits 5 to 7 of EAX in Intel's leaf and AMD's alike.
fn sharing(eax: u32, all: u32) -> u32 {
    if eax >> 5 & 7 <= 2 { 1 } else { all }
}

fn set(register: &mut u32, mask: u32, on: bool) {
    *register = if on { *register | mask } else { *register & !mask };
}

/// Puts `value` into `width` bits from `low` on.
fn field(register: &mut u32, low: u32, width: u32, value: u32) {
    let mask = ((1 << width) - 1) << low;
    *register = *register & !mask | value << low & mask;
}
