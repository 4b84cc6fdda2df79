//! What a guest's processors say of themselves.
//!
//! The start is what KVM offers on this host. Taken away: nested virtualization, performance counters and other
//! things that a sandbox has no use for. Written anew: APIC ids and topology (one package, one thread a core),
//! since KVM passes on those of the host. Sources: Intel SDM 2A "CPUID", AMD APM 3 appendix E, Linux
//! Documentation/virt/kvm/x86/cpuid.rst.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

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

/// First KVM leaf, which holds the last one's number and KVM's signature.
const KVM_BASE: u32 = 0x4000_0000;
/// Leaf with the TSC's and the local APIC timer's frequency, as VMware defined it and others read it.
const TIMING: u32 = 0x4000_0010;
/// KVM's local APIC timer counts nanoseconds.
const LAPIC_KHZ: u32 = 1_000_000;

/// Leaves that only matter for features that are taken away: MONITOR, performance counters, SGX, processor trace,
/// AMX (unless XCR0 has it), SVM, instruction-based sampling, memory encryption, AMD performance counters.
const EMPTIED: [u32; 8] = [0x5, 0xa, 0x12, 0x14, 0x8000_000a, 0x8000_001b, 0x8000_001f, 0x8000_0022];

const fn bit(n: u32) -> u32 {
    1 << n
}

/// Bits of an APIC id that tell `count` processors apart.
fn id_bits(count: u8) -> u32 {
    u32::from(count).next_power_of_two().trailing_zeros()
}

fn set(register: &mut u32, mask: u32, on: bool) {
    *register = if on { *register | mask } else { *register & !mask };
}

/// Puts `value` into `width` bits from `low` on.
fn field(register: &mut u32, low: u32, width: u32, value: u32) {
    let mask = ((1 << width) - 1) << low;
    *register = *register & !mask | value << low & mask;
}

fn find(entries: &[kvm_cpuid_entry2], leaf: u32) -> Option<&kvm_cpuid_entry2> {
    entries.iter().find(|e| e.function == leaf)
}

/// The CPUID entries of one processor, from those that KVM supports.
pub(super) fn filter(supported: &[kvm_cpuid_entry2], processor: &Processor) -> Vec<kvm_cpuid_entry2> {
    // EBX of leaf 0 starts the vendor's name: "Auth"enticAMD, "Hygo"nGenuine.
    let is_amd = find(supported, 0).is_some_and(|e| matches!(&e.ebx.to_le_bytes(), b"Auth" | b"Hygo"));
    // EAX of leaf 0xd names the parts of XCR0: bits 17 and 18 are AMX' tiles. KVM offers AMX by halves unless its
    // state was asked for beforehand.
    let has_tiles = find(supported, 0xd).is_some_and(|e| e.eax & (bit(17) | bit(18)) == bit(17) | bit(18));
    let mut entries: Vec<kvm_cpuid_entry2> =
        supported.iter().filter(|e| !matches!(e.function, 0xb | 0x1f | TIMING)).copied().collect();
    for entry in &mut entries {
        adjust(entry, processor, is_amd, has_tiles);
    }
    add_topology(&mut entries, processor, supported);
    if processor.tsc_khz != 0 && entries.iter().any(|e| e.function == KVM_BASE) {
        entries.push(kvm_cpuid_entry2 {
            function: TIMING,
            eax: processor.tsc_khz,
            ebx: LAPIC_KHZ,
            ..Default::default()
        });
    }
    entries
}

fn adjust(entry: &mut kvm_cpuid_entry2, processor: &Processor, is_amd: bool, has_tiles: bool) {
    let Processor { id, count, .. } = *processor;
    let (id, count) = (u32::from(id), u32::from(count));
    match (entry.function, entry.index) {
        (0x1, _) => {
            field(&mut entry.ebx, 24, 8, id);
            field(&mut entry.ebx, 16, 8, count.next_power_of_two());
            // MONITOR, VMX, PDCM (performance capabilities).
            set(&mut entry.ecx, bit(3) | bit(5) | bit(15), false);
            set(&mut entry.ecx, bit(24), processor.has_tsc_deadline);
            set(&mut entry.ecx, bit(31), true); // hypervisor
            set(&mut entry.edx, bit(28), count > 1); // more than one logical processor
        }
        // Intel caches: the first two levels are a core's own, the others are shared by all.
        (0x4, _) if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level <= 2 { 1 } else { count.next_power_of_two() };
            field(&mut entry.eax, 14, 12, sharing - 1);
            field(&mut entry.eax, 26, 6, count.next_power_of_two() - 1);
        }
        (0x6, _) => {
            // Of power management only the APIC timer that never stops.
            entry.eax &= bit(2);
            (entry.ebx, entry.ecx, entry.edx) = (0, 0, 0);
        }
        (0x7, 0) => {
            set(&mut entry.ebx, bit(2) | bit(25), false); // SGX, processor trace
            set(&mut entry.ecx, bit(5), false); // WAITPKG: a guest could hold the core in a wait state
            set(&mut entry.ecx, bit(30), false); // SGX launch control
            if !has_tiles {
                set(&mut entry.edx, bit(22) | bit(24) | bit(25), false);
            }
            if is_amd {
                // IA32_ARCH_CAPABILITIES is Intel's; KVM emulates it, guests on AMD need not see it.
                set(&mut entry.edx, bit(29), false);
            }
        }
        (0x7, 1) if !has_tiles => set(&mut entry.eax, bit(21), false),
        (0x1d | 0x1e, _) if !has_tiles => empty(entry),
        (KVM_BASE, _) if processor.tsc_khz != 0 => entry.eax = entry.eax.max(TIMING),
        (0x8000_0001, _) => {
            set(&mut entry.ecx, bit(1), is_amd && count > 1); // cores without threads
            // SVM, instruction-based sampling, SKINIT, performance counters of core, northbridge, time stamp, cache.
            let mask = bit(2) | bit(10) | bit(12) | bit(23) | bit(24) | bit(27) | bit(28);
            set(&mut entry.ecx, mask, false);
        }
        (0x8000_0008, _) if is_amd => {
            entry.ecx = 0;
            field(&mut entry.ecx, 0, 8, count - 1);
            field(&mut entry.ecx, 12, 4, id_bits(processor.count));
        }
        // AMD caches, as Intel's above.
        (0x8000_001d, _) if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            field(&mut entry.eax, 14, 12, if level <= 2 { 0 } else { count - 1 });
        }
        (0x8000_001e, _) => {
            entry.eax = id;
            entry.ebx = id; // core, one thread each
            entry.ecx = 0; // one node
            entry.edx = 0;
        }
        (leaf, _) if EMPTIED.contains(&leaf) => empty(entry),
        _ => {}
    }
}

fn empty(entry: &mut kvm_cpuid_entry2) {
    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
}

/// The extended topology leaves: one thread a core, all cores in one package. x2APIC ids are the same numbers.
fn add_topology(entries: &mut Vec<kvm_cpuid_entry2>, processor: &Processor, supported: &[kvm_cpuid_entry2]) {
    const THREADS: u32 = 1;
    const CORES: u32 = 2;
    let last = find(supported, 0).map_or(0, |e| e.eax);
    for leaf in [0xb, 0x1f] {
        // Leaf 0xb is Intel's and AMD's; 0x1f is of newer Intel processors only.
        if leaf > last || find(supported, leaf).is_none() {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    /// Everything on, as a host would never have it.
    fn host(vendor: &[u8; 4]) -> Vec<kvm_cpuid_entry2> {
        let mut all = vec![entry(0, 0, [0x1f, u32::from_le_bytes(*vendor), 0, 0])];
        for leaf in [0x1, 0x5, 0x6, 0xa, 0x12, 0x14, 0x1d, 0x8000_0001, 0x8000_0008, 0x8000_000a, 0x8000_001e] {
            all.push(entry(leaf, 0, [!0; 4]));
        }
        all.push(entry(0x4, 0, [1 << 5 | 1, 0, 0, 0]));
        all.push(entry(0x4, 3, [3 << 5 | 3, 0, 0, 0]));
        all.push(entry(0x7, 0, [1, !0, !0, !0]));
        all.push(entry(0x7, 1, [!0; 4]));
        all.push(entry(0xb, 0, [1, 2, 0x100, 77]));
        all.push(entry(0xd, 0, [0x2e7, 0, 0, 0]));
        all.push(entry(0x8000_001d, 3, [3 << 5 | 3, 0, 0, 0]));
        all.push(entry(KVM_BASE, 0, [0x4000_0001, 0, 0, 0]));
        all
    }

    fn processor(id: u8, count: u8) -> Processor {
        Processor { id, count, has_tsc_deadline: true, tsc_khz: 2_000_000 }
    }

    fn of(entries: &[kvm_cpuid_entry2], leaf: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries.iter().find(|e| e.function == leaf && e.index == index).expect("the leaf is there")
    }

    #[test]
    fn each_processor_has_its_own_apic_id_everywhere() {
        for count in 1..=16 {
            for id in 0..count {
                let entries = filter(&host(b"Auth"), &processor(id, count));
                assert_eq!(of(&entries, 1, 0).ebx >> 24, u32::from(id));
                assert_eq!(of(&entries, 0xb, 0).edx, u32::from(id));
                assert_eq!(of(&entries, 0xb, 1).edx, u32::from(id));
                assert_eq!(of(&entries, 0x8000_001e, 0).eax, u32::from(id));
            }
        }
    }

    #[test]
    fn topology_is_one_package_of_cores_with_one_thread() {
        for (count, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (16, 4)] {
            let entries = filter(&host(b"Genu"), &processor(0, count));
            let (threads, cores, end) = (of(&entries, 0xb, 0), of(&entries, 0xb, 1), of(&entries, 0xb, 2));
            assert_eq!((threads.eax, threads.ebx, threads.ecx), (0, 1, 0x100));
            assert_eq!((cores.eax, cores.ebx, cores.ecx), (bits, u32::from(count), 0x201));
            assert_eq!((end.eax, end.ebx, end.ecx), (0, 0, 2));
            assert_eq!(of(&entries, 1, 0).edx >> 28 & 1, u32::from(count > 1));
            assert!(!entries.iter().any(|e| e.function == 0x1f), "a leaf the host lacks is not made up");
        }
    }

    #[test]
    fn caches_beyond_the_second_level_are_shared_by_all() {
        let entries = filter(&host(b"Genu"), &processor(0, 4));
        assert_eq!(of(&entries, 4, 0).eax >> 14 & 0xfff, 0);
        assert_eq!(of(&entries, 4, 3).eax >> 14 & 0xfff, 3);
        assert_eq!(of(&entries, 0x8000_001d, 3).eax >> 14 & 0xfff, 3);
    }

    #[test]
    fn a_sandbox_sees_a_hypervisor_and_a_deadline_timer_but_no_nesting_or_counters() {
        let entries = filter(&host(b"Auth"), &processor(0, 1));
        let features = of(&entries, 1, 0);
        assert_eq!(features.ecx >> 31, 1);
        assert_eq!(features.ecx >> 24 & 1, 1);
        assert_eq!(features.ecx & (bit(5) | bit(15)), 0);
        assert_eq!(of(&entries, 0x8000_0001, 0).ecx & bit(2), 0);
        for leaf in [0xa, 0x12, 0x14, 0x1d, 0x8000_000a] {
            let e = of(&entries, leaf, 0);
            assert_eq!((e.eax, e.ebx, e.ecx, e.edx), (0, 0, 0, 0), "{leaf:#x}");
        }
        let mut without = processor(0, 1);
        without.has_tsc_deadline = false;
        assert_eq!(of(&filter(&host(b"Auth"), &without), 1, 0).ecx >> 24 & 1, 0);
    }

    #[test]
    fn amx_is_whole_or_absent() {
        let tiles = bit(22) | bit(24) | bit(25);
        assert_eq!(of(&filter(&host(b"Genu"), &processor(0, 1)), 7, 0).edx & tiles, 0);
        let mut with = host(b"Genu");
        with.iter_mut().find(|e| e.function == 0xd).unwrap().eax |= bit(17) | bit(18);
        assert_eq!(of(&filter(&with, &processor(0, 1)), 7, 0).edx & tiles, tiles);
    }

    #[test]
    fn the_tsc_frequency_is_told_where_it_is_known() {
        let entries = filter(&host(b"Auth"), &processor(0, 1));
        assert_eq!(of(&entries, TIMING, 0).eax, 2_000_000);
        assert_eq!(of(&entries, KVM_BASE, 0).eax, TIMING);
        let mut unknown = processor(0, 1);
        unknown.tsc_khz = 0;
        assert!(!filter(&host(b"Auth"), &unknown).iter().any(|e| e.function == TIMING));
    }
}
