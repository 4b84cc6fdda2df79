//! Whether what was saved of a processor can go on on this host: a program, and a kernel still more, goes on to use what it
//! found when it started.
//!
//! The host's side is what KVM offers, together with what a new guest would get here: a snapshot of an older program,
//! which hid less, stays good.

use std::collections::BTreeSet;
use std::fmt;

use kvm_bindings::{kvm_cpuid_entry2, kvm_msr_entry};

use super::model::Register::{self, Eax, Ebx, Ecx, Edx};
use super::{Offer, Processor, bit};

/// Most model-specific registers that an error names.
const MAX_NAMED_MSRS: usize = 16;
/// Most features that the sentence of an error names; its field has all.
const MAX_IN_SENTENCE: usize = 12;

/// A processor's maker and family (CPUID, leaves 0 and 1).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Make {
    /// As the processor spells it: `GenuineIntel`, `AuthenticAMD`.
    pub vendor: String,
    /// The family, its extension added.
    pub family: u32,
}

impl fmt::Display for Make {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} family {}", self.vendor, self.family)
    }
}

/// What keeps a snapshot from going on on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mismatch {
    /// Features that this host lacks, as /proc/cpuinfo spells them; without a name there, by their place. Sorted.
    pub missing: Vec<String>,
    /// The snapshot's processor.
    pub saved: Make,
    /// This host's.
    pub host: Make,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the snapshot is of a processor of {}, this host's is {}", self.saved, self.host)?;
        let named = self.missing.len().min(MAX_IN_SENTENCE);
        if named > 0 {
            write!(f, " without {}", self.missing[..named].join(", "))?;
        }
        match self.missing.len() - named {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

/// What of a saved processor the host must have.
#[derive(Debug, Default)]
pub(in crate::vmm::kvm) struct Needs<'a> {
    /// All of its CPUID.
    pub cpuid: &'a [kvm_cpuid_entry2],
    /// The extended state that it has switched on.
    pub xcr0: u64,
    /// Its model-specific registers.
    pub msrs: &'a [kvm_msr_entry],
}

/// A register whose bits are features.
struct Features {
    leaf: u32,
    index: u32,
    register: Register,
    /// Bits that say nothing of what the processor can do: they follow the guest's registers, number something, or take
    /// a feature away.
    ignored: u32,
    /// Names from bit 0 on; `-` for none.
    names: &'static str,
}

const fn features((leaf, index): (u32, u32), register: Register, ignored: &[u32], names: &'static str) -> Features {
    let (mut mask, mut n) = (0, 0);
    while n < ignored.len() {
        mask |= bit(ignored[n]);
        n += 1;
    }
    Features { leaf, index, register, ignored: mask, names }
}

/// Parts of the extended state (XCR0, IA32_XSS).
const COMPONENTS: &str = "x87-state sse-state avx-state mpx-bndregs mpx-bndcsr avx512-opmask avx512-zmm-hi256 \
     avx512-hi16-zmm pt-state pkru-state pasid-state cet-user-state cet-kernel-state hdc-state uintr-state lbr-state \
     hwp-state xtilecfg xtiledata";
/// CPUID's leaf of the extended state.
const EXTENDED_STATE: u32 = 0xd;

/// Sources: Intel SDM 2A "CPUID", AMD APM 3 appendix E, Linux arch/x86/include/asm/cpufeatures.h and
/// Documentation/virt/kvm/x86/cpuid.rst.
const TABLE: &[Features] = &[
    features(
        (0x1, 0),
        Ecx,
        // OSXSAVE follows CR4.
        &[27],
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1 sse4_2 \
         x2apic movbe popcnt tsc_deadline_timer aes xsave - avx f16c rdrand hypervisor",
    ),
    features(
        (0x1, 0),
        Edx,
        // APIC follows its base register; HTT the number of processors.
        &[9, 28],
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx fxsr sse sse2 \
         ss ht tm ia64 pbe",
    ),
    features((0x6, 0), Eax, &[], "- - arat"),
    features(
        (0x7, 0),
        Ebx,
        // FDP_EXCPTN_ONLY and ZERO_FCS_FDS: what the FPU no longer does.
        &[6, 13],
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 - smep bmi2 erms invpcid rtm cqm - mpx rdt_a avx512f avx512dq rdseed adx \
         smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl",
    ),
    features(
        (0x7, 0),
        Ecx,
        // OSPKE follows CR4; MAWAU is a number.
        &[4, 17, 18, 19, 20, 21],
        "prefetchwt1 avx512vbmi umip pku - waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni avx512_bitalg tme \
         avx512_vpopcntdq - la57 - - - - - rdpid key_locker bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc pks",
    ),
    features(
        (0x7, 0),
        Edx,
        // Transactions that always abort, and a mixture of cores.
        &[11, 13, 15],
        "- - avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear - - - serialize - tsxldtrk \
         - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d \
         arch_capabilities core_capabilities spec_ctrl_ssbd",
    ),
    features(
        (0x7, 1),
        Eax,
        &[],
        "- - - - avx_vnni avx512_bf16 - cmpccxadd - - fzrm fsrs fsrc - - - - fred lkgs wrmsrns - amx_fp16 - avx_ifma - - lam",
    ),
    features(
        (0x7, 1),
        Edx,
        &[],
        "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - - prefetchiti - - - - avx10",
    ),
    features((0x7, 2), Edx, &[], "intel_psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no"),
    features((EXTENDED_STATE, 0), Eax, &[], COMPONENTS),
    features((EXTENDED_STATE, 1), Eax, &[], "xsaveopt xsavec xgetbv1 xsaves xfd"),
    features((EXTENDED_STATE, 1), Ecx, &[], COMPONENTS),
    features(
        (0x4000_0001, 0),
        Eax,
        &[],
        "kvmclock kvm_nopiodelay kvm_mmu kvmclock2 kvm_asyncpf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt - kvm_pv_tlb_flush \
         kvm_asyncpf_vmexit kvm_pv_ipi kvm_poll_control kvm_pv_sched_yield kvm_asyncpf_int kvm_msi_ext_dest_id \
         kvm_hc_map_gpa_range kvm_migration_control - - - - - - kvmclock_stable",
    ),
    features(
        (0x8000_0001, 0),
        Ecx,
        // CMP_LEGACY follows the number of processors.
        &[1],
        "lahf_lm - svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp fma4 tce - \
         nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx",
    ),
    features(
        (0x8000_0001, 0),
        Edx,
        // On AMD the same as in leaf 1.
        &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15, 16, 17, 23, 24],
        "- - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    features((0x8000_0007, 0), Edx, &[], "ts fid vid ttp tm stc 100mhzsteps hwpstate nonstop_tsc"),
    features(
        (0x8000_0008, 0),
        Ebx,
        &[],
        "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - ibpb - ibrs stibp - stibp_always_on - - - - - amd_ppin ssbd \
         virt_ssbd ssb_no cppc amd_psfd btc_no ibpb_ret",
    ),
    features(
        (0x8000_0021, 0),
        Eax,
        &[],
        "no_nested_data_bp - lfence_rdtsc - - - null_sel_clr_base - autoibrs no_smm_ctl_msr - - - - - - - - - - - - - - - - \
         - sbpb ibpb_brtype srso_no",
    ),
];

impl Features {
    /// Bit `n`'s name.
    fn name(&self, n: u32) -> String {
        match self.names.split_whitespace().nth(n as usize) {
            None | Some("-") => {
                let register = format!("{:?}", self.register).to_lowercase();
                format!("cpuid-{:x}.{}-{register}-{n}", self.leaf, self.index)
            }
            Some(name) => name.to_string(),
        }
    }
}

fn find(entries: &[kvm_cpuid_entry2], leaf: u32, index: u32) -> kvm_cpuid_entry2 {
    entries.iter().find(|e| (e.function, e.index) == (leaf, index)).copied().unwrap_or_default()
}

fn value(entry: &kvm_cpuid_entry2, register: Register) -> u32 {
    match register {
        Eax => entry.eax,
        Ebx => entry.ebx,
        Ecx => entry.ecx,
        Edx => entry.edx,
    }
}

/// Positions of a number's ones.
fn ones(mut of: u64) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        let n = of.trailing_zeros();
        of &= of.wrapping_sub(1);
        (n < u64::BITS).then_some(n)
    })
}

fn make(entries: &[kvm_cpuid_entry2]) -> Make {
    let zero = find(entries, 0x0, 0);
    let vendor = [zero.ebx, zero.edx, zero.ecx].map(u32::to_le_bytes).concat().escape_ascii().to_string();
    let signature = find(entries, 0x1, 0).eax;
    let (family, extended) = (signature >> 8 & 0xf, signature >> 20 & 0xff);
    Make { vendor, family: if family == 0xf { family + extended } else { family } }
}

/// Bits of a physical address, 36 where the processor does not say.
fn address_bits(entries: &[kvm_cpuid_entry2]) -> u32 {
    match find(entries, 0x8000_0008, 0).eax & 0xff {
        0 => 36,
        bits => bits,
    }
}

impl Offer {
    /// Whether that processor can go on here. `msrs` are those that this host's KVM keeps, `processor` what a new one in
    /// its place would be.
    pub(in crate::vmm::kvm) fn fits(
        &self,
        needs: &Needs<'_>,
        processor: &Processor,
        msrs: &[u32],
    ) -> Result<(), Mismatch> {
        let fresh = self.filter(processor);
        let offered = |leaf, index, register| {
            value(&find(&self.entries, leaf, index), register) | value(&find(&fresh, leaf, index), register)
        };
        let mut missing = BTreeSet::new();
        for row in TABLE {
            let saved = value(&find(needs.cpuid, row.leaf, row.index), row.register) & !row.ignored;
            let lacking = saved & !offered(row.leaf, row.index, row.register);
            missing.extend(ones(u64::from(lacking)).map(|n| row.name(n)));
        }
        // The first two are the FPU's and SSE's, which a processor has without this leaf.
        let low = u64::from(offered(EXTENDED_STATE, 0, Eax)) | 0b11;
        let xcr0 = u64::from(offered(EXTENDED_STATE, 0, Edx)) << 32 | low;
        let components = features((EXTENDED_STATE, 0), Eax, &[], COMPONENTS);
        missing.extend(ones(needs.xcr0 & !xcr0).map(|n| components.name(n)));
        // A part of the extended state lies where the processor has it, in the guest's memory too.
        for n in ones(needs.xcr0 & xcr0 & !0b11) {
            let [saved, here] = [needs.cpuid, &self.entries].map(|entries| find(entries, EXTENDED_STATE, n));
            if saved.eax != 0 && (saved.eax, saved.ebx) != (here.eax, here.ebx) {
                missing.insert(format!("{}-layout", components.name(n)));
            }
        }
        let (bits, here) = (address_bits(needs.cpuid), address_bits(&self.entries));
        if bits > here {
            missing.insert(format!("{bits}-bit-addresses"));
        }
        // KVM lists some that it does not read everywhere; what is zero is as after a reset.
        let unknown = needs.msrs.iter().filter(|msr| msr.data != 0 && !msrs.contains(&msr.index));
        missing.extend(unknown.take(MAX_NAMED_MSRS).map(|msr| format!("msr-{:#x}", msr.index)));
        let (saved, host) = (make(needs.cpuid), make(&self.entries));
        if missing.is_empty() && saved == host {
            return Ok(());
        }
        Err(Mismatch { missing: missing.into_iter().collect(), saved, host })
    }

    /// The error about one thing that shows only when it is put back.
    pub(in crate::vmm::kvm) fn lacks(&self, what: String, cpuid: &[kvm_cpuid_entry2]) -> Mismatch {
        Mismatch { missing: vec![what], saved: make(cpuid), host: make(&self.entries) }
    }
}
