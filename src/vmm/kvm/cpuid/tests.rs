//! The filter against what KVM offers on two hosts that differ in most of what it looks at.

use super::model::REWRITTEN;
use super::*;

fn bits(list: &[u32]) -> u32 {
    list.iter().fold(0, |mask, n| mask | bit(*n))
}

fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
}

/// SSE3 and CLMUL, SSSE3, FMA, CX16, SSE4.1 to POPCNT, AES, XSAVE, AVX, F16C, RDRAND: what both hosts have in leaf 1.
const LEAF_1_ECX: &[u32] = &[0, 1, 9, 12, 13, 19, 20, 21, 22, 23, 25, 26, 27, 28, 29, 30, 31];
/// FSGSBASE, BMI1, AVX2, SMEP, BMI2, ERMS, INVPCID, RDSEED, ADX, SMAP, CLFLUSHOPT, CLWB, SHA: the same for leaf 7.
const LEAF_7_EBX: &[u32] = &[0, 3, 5, 7, 8, 9, 10, 18, 19, 20, 23, 24, 29];
/// What both hosts' programs have in EDX of leaf 1: all of i686, CLFLUSH, MMX, FXSR, SSE, SSE2.
const LEAF_1_EDX: u32 = 0x078b_fbff;

fn common(vendor: [u32; 3], last: u32, signature: u32) -> Vec<kvm_cpuid_entry2> {
    let [ebx, edx, ecx] = vendor;
    vec![
        entry(0x0, 0, [last, ebx, ecx, edx]),
        // APIC id 37 of 64: the host's processor that the worker happened to run on.
        entry(0x1, 0, [signature, 37 << 24 | 64 << 16 | 8 << 8, bits(LEAF_1_ECX), LEAF_1_EDX | bit(28)]),
        entry(0x5, 0, [0x40, 0x40, 3, 0x11]),
        entry(0x6, 0, [0x77, 2, 9, 0]),
        entry(0xb, 0, [1, 2, 0x100, 37]),
        entry(0xb, 1, [7, 128, 0x201, 37]),
        entry(0xd, 0, [0x7, 0x340, 0x340, 0]),
        entry(0xd, 1, [0xf, 0x340, 0, 0]),
        entry(0xd, 2, [0x100, 0x240, 0, 0]),
        entry(KVM_BASE, 0, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
        entry(0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
        entry(0x8000_0000, 0, [0x8000_0022, 0, 0, 0]),
        entry(BRAND, 0, [0; 4]),
        entry(BRAND + 1, 0, [0; 4]),
        entry(BRAND + 2, 0, [0; 4]),
    ]
}

fn patch(entries: &mut [kvm_cpuid_entry2], leaf: u32, change: impl FnOnce(&mut kvm_cpuid_entry2)) {
    change(entries.iter_mut().find(|e| e.function == leaf).expect("the leaf is in the table"));
}

fn offer(entries: Vec<kvm_cpuid_entry2>) -> Offer {
    Offer { entries, brand: [[0x2061, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 0]], is_software: false }
}

/// AMD family 19h, model 01h (Zen 3), 64 cores with two threads: PPR 55898, AMD APM 3 appendix E.
fn amd() -> Offer {
    let mut entries = common([0x6874_7541, 0x6974_6e65, 0x444d_4163], 0x10, 0x00a0_0f11);
    patch(&mut entries, 0x1, |e| e.ecx |= bit(3));
    entries.extend([
        // TSC_ADJUST; UMIP, PKU, VAES, VPCLMULQDQ, RDPID; FSRM, SPEC_CTRL, STIBP, ARCH_CAPABILITIES, SSBD.
        entry(0x7, 0, [0, bits(LEAF_7_EBX) | bit(1), bits(&[2, 3, 9, 10, 22]), bits(&[4, 26, 27, 29, 31])]),
        // LAHF, CMP_LEGACY, SVM, CR8_LEGACY to 3DNOWPREFETCH, OSVW, IBS, SKINIT, TOPOEXT, PERFCTR_CORE and _NB, LLC.
        entry(
            0x8000_0001,
            0,
            [0x00a0_0f11, 0, bits(&[0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 12, 22, 23, 24, 28]), 0x2fd3_fbff],
        ),
        entry(0x8000_0008, 0, [0x3030, 0x111e_d205, 0x707f, 0]),
        entry(0x8000_000a, 0, [1, 0x8000, 0, 0x119b_9c7f]),
        entry(0x8000_001b, 0, [0x3ff, 0, 0, 0]),
        // Data, instructions, second level for two threads; third level for sixteen.
        entry(0x8000_001d, 0, [0x4121, 0x01c0_003f, 0x3f, 0]),
        entry(0x8000_001d, 1, [0x4122, 0x01c0_003f, 0x3f, 0]),
        entry(0x8000_001d, 2, [0x4143, 0x01c0_003f, 0x3ff, 2]),
        entry(0x8000_001d, 3, [0x3_c163, 0x03c0_003f, 0x7fff, 1]),
        entry(0x8000_001d, 4, [0; 4]),
        entry(0x8000_001e, 0, [37, 0x112, 0x302, 0]),
        entry(0x8000_001f, 0, [0x1_780f, 0x173, 0x1fd, 1]),
        entry(0x8000_0022, 0, [1, 6, 0, 0]),
    ]);
    offer(entries)
}

/// Intel family 6, model 143 (Sapphire Rapids), 60 cores with two threads: SDM 2A "CPUID".
fn intel() -> Offer {
    let mut entries = common([0x756e_6547, 0x4965_6e69, 0x6c65_746e], 0x20, 0x0008_06f8);
    // MONITOR, VMX, PDCM, PCID, TSC_DEADLINE.
    patch(&mut entries, 0x1, |e| e.ecx |= bits(&[3, 5, 15, 17, 24]));
    patch(&mut entries, 0xd, |e| e.eax = 0x6_02e7);
    entries.extend([
        // Data, instructions, second level for two threads; third level for 128.
        entry(0x4, 0, [0xfc00_4121, 0x02c0_003f, 0x3f, 0]),
        entry(0x4, 1, [0xfc00_4122, 0x01c0_003f, 0x3f, 0]),
        entry(0x4, 2, [0xfc00_4143, 0x03c0_003f, 0x7ff, 0]),
        entry(0x4, 3, [0xfc1f_c163, 0x0380_003f, 0x1_bfff, 4]),
        entry(0x4, 4, [0; 4]),
        // TSC_ADJUST, SGX, HLE, RTM, AVX-512, processor trace; PKU, WAITPKG, GFNI, VAES to BITALG, VPOPCNTDQ, LA57,
        // RDPID, SGX_LC; FSRM, MD_CLEAR, AMX, SPEC_CTRL, STIBP, L1D_FLUSH, ARCH_CAPABILITIES, SSBD.
        entry(
            0x7,
            0,
            [
                2,
                bits(LEAF_7_EBX) | bits(&[1, 2, 4, 11, 16, 17, 21, 25, 28, 30, 31]),
                bits(&[1, 2, 3, 5, 6, 8, 9, 10, 11, 12, 14, 16, 22, 30]),
                bits(&[4, 10, 22, 24, 25, 26, 27, 28, 29, 31]),
            ],
        ),
        entry(0x7, 1, [bits(&[4, 5, 21]), 0, 0, bit(8)]),
        entry(0xa, 0, [0x0830_0805, 0, 7, 0x8603]),
        entry(0x12, 0, [0x63, 1, 0, 0x381f]),
        entry(0x14, 0, [1, 0xf, 7, 0]),
        entry(0x1d, 0, [1, 0, 0, 0]),
        entry(0x1d, 1, [0x0400_2000, 0x0008_0040, 0x10, 0]),
        entry(0x1e, 0, [0, 0x4010, 0, 0]),
        entry(0x1f, 0, [1, 2, 0x100, 37]),
        entry(0x8000_0001, 0, [0, 0, bits(&[0, 5, 8]), 0x2c10_0800]),
        entry(0x8000_0008, 0, [0x3934, 0x200, 0, 0]),
    ]);
    offer(entries)
}

fn processor(id: u8, count: u8) -> Processor {
    Processor { id, count, has_tsc_deadline: true, tsc_khz: 2_000_000 }
}

fn of(entries: &[kvm_cpuid_entry2], leaf: u32, index: u32) -> kvm_cpuid_entry2 {
    *entries.iter().find(|e| e.function == leaf && e.index == index).expect("the leaf is there")
}

fn register(entry: &kvm_cpuid_entry2, register: Register) -> u32 {
    match register {
        Register::Eax => entry.eax,
        Register::Ebx => entry.ebx,
        Register::Ecx => entry.ecx,
        Register::Edx => entry.edx,
    }
}

#[test]
fn each_processor_has_its_own_apic_id_everywhere() {
    for (host, count) in [amd(), intel()].iter().flat_map(|host| (1..=16).map(move |count| (host, count))) {
        for id in 0..count {
            let entries = host.filter(&processor(id, count));
            assert_eq!(of(&entries, 0x1, 0).ebx >> 24, u32::from(id));
            for entry in entries.iter().filter(|e| TOPOLOGY.contains(&e.function)) {
                assert_eq!(entry.edx, u32::from(id));
            }
            if host.is_amd() {
                let ids = of(&entries, 0x8000_001e, 0);
                assert_eq!((ids.eax, ids.ebx), (u32::from(id), u32::from(id)));
            }
        }
    }
}

#[test]
fn topology_is_one_package_of_cores_with_one_thread_on_both_hosts() {
    for (count, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (16, 4)] {
        for host in [amd(), intel()] {
            let entries = host.filter(&processor(0, count));
            let (threads, cores, end) = (of(&entries, 0xb, 0), of(&entries, 0xb, 1), of(&entries, 0xb, 2));
            assert_eq!((threads.eax, threads.ebx, threads.ecx), (0, 1, 0x100));
            assert_eq!((cores.eax, cores.ebx, cores.ecx), (bits, u32::from(count), 0x201));
            assert_eq!((end.eax, end.ebx, end.ecx), (0, 0, 2));
            assert_eq!(of(&entries, 1, 0).edx >> 28 & 1, u32::from(count > 1), "HTT");
            assert_eq!(of(&entries, 1, 0).ebx >> 16 & 0xff, 1 << bits);
            if host.is_amd() {
                let sizes = of(&entries, 0x8000_0008, 0).ecx;
                assert_eq!((sizes & 0xff, sizes >> 12 & 15), (u32::from(count) - 1, bits));
                assert_eq!(of(&entries, 0x8000_0001, 0).ecx >> 1 & 1, u32::from(count > 1), "CMP_LEGACY");
                let ids = of(&entries, 0x8000_001e, 0);
                assert_eq!((ids.ebx >> 8 & 0xff, ids.ecx), (0, 0), "threads of a core less one; node and nodes");
                assert!(!entries.iter().any(|e| e.function == 0x1f), "a leaf the host lacks is not made up");
            } else {
                assert_eq!(of(&entries, 0x4, 0).eax >> 26, (1 << bits) - 1);
                assert_eq!(of(&entries, 0x1f, 1).ebx, u32::from(count));
            }
        }
    }
}

#[test]
fn caches_beyond_the_second_level_are_shared_by_all() {
    for (host, leaf, all) in [(intel(), 0x4, 8), (amd(), 0x8000_001d, 5)] {
        let entries = host.filter(&processor(0, 5));
        for (index, sharing) in [(0, 1), (1, 1), (2, 1), (3, all)] {
            assert_eq!((of(&entries, leaf, index).eax >> 14 & 0xfff) + 1, sharing, "{leaf:#x}.{index}");
        }
        assert_eq!(of(&entries, leaf, 4).eax, 0, "the list still ends");
    }
}

#[test]
fn what_the_tables_name_is_gone_and_what_programs_are_built_for_stays() {
    for host in [amd(), intel()] {
        let entries = host.filter(&processor(0, 2));
        for row in HIDDEN.iter().filter(|row| host.is(row.host)) {
            for entry in entries.iter().filter(|e| (e.function, e.index) == (row.leaf, row.index)) {
                let left = register(entry, row.register) & bits(row.bits);
                // The bit of AMD's cores is given back by the rewriting of the same register, none else is.
                assert_eq!(left, 0, "{}", row.name);
            }
        }
        for row in EMPTIED.iter().filter(|row| host.is(row.host)) {
            for e in entries.iter().filter(|e| e.function == row.leaf) {
                assert_eq!((e.eax, e.ebx, e.ecx, e.edx), (0, 0, 0, 0), "{}", row.name);
            }
        }
        // Over-filtering shows as SIGILL in programs that were built for a processor of this kind.
        let features = of(&entries, 0x1, 0);
        assert_eq!(features.ecx & bits(LEAF_1_ECX), bits(LEAF_1_ECX));
        assert_eq!(features.edx & LEAF_1_EDX, LEAF_1_EDX);
        assert_eq!(features.ecx >> 24 & 1, 1, "TSC_DEADLINE");
        assert_eq!(of(&entries, 0x7, 0).ebx & bits(LEAF_7_EBX), bits(LEAF_7_EBX));
        assert_eq!(of(&entries, 0xd, 0).eax & 7, 7, "x87, SSE, AVX");
        assert_eq!(of(&entries, 0x6, 0).eax, bit(2), "ARAT");
        assert_eq!(of(&entries, 0x4000_0001, 0).eax, 0x0100_7efb, "KVM's own features");
    }
    let avx512 = bits(&[16, 17, 21, 28, 30, 31]);
    assert_eq!(of(&intel().filter(&processor(0, 1)), 0x7, 0).ebx & avx512, avx512);
}

#[test]
fn mitigations_are_told_of_on_the_vendor_that_has_them() {
    let of_intel = of(&intel().filter(&processor(0, 1)), 0x7, 0).edx;
    assert_eq!(of_intel & bits(&[10, 26, 27, 28, 29, 31]), bits(&[10, 26, 27, 28, 29, 31]));
    let of_amd = of(&amd().filter(&processor(0, 1)), 0x7, 0).edx;
    assert_eq!(of_amd & bits(&[26, 27, 29, 31]), bits(&[26, 27, 31]), "ARCH_CAPABILITIES is Intel's");
}

#[test]
fn a_guest_on_the_software_cpu_has_no_extended_state() {
    let mut host = amd();
    host.is_software = true;
    let entries = host.filter(&processor(0, 1));
    assert_eq!(of(&entries, 0x1, 0).ecx & bits(&[12, 26, 27, 28, 29]), 0);
    assert_eq!(of(&entries, 0x7, 0).ebx & bit(5), 0);
    assert_eq!(of(&entries, 0xd, 0).eax, 0);
    assert_eq!(of(&entries, 0x1, 0).ecx & bits(&[0, 9, 19, 20, 25]), bits(&[0, 9, 19, 20, 25]), "SSE and AES stay");
}

#[test]
fn the_name_of_the_processor_is_the_hosts() {
    let host = amd();
    let entries = host.filter(&processor(0, 1));
    for (leaf, brand) in (BRAND..).zip(host.brand) {
        let e = of(&entries, leaf, 0);
        assert_eq!([e.eax, e.ebx, e.ecx, e.edx], brand);
    }
}

#[test]
fn timers_are_told_of_where_they_are_known() {
    let entries = amd().filter(&processor(0, 1));
    assert_eq!(of(&entries, TIMING, 0).eax, 2_000_000);
    assert_eq!(of(&entries, KVM_BASE, 0).eax, TIMING);
    let unknown = Processor { tsc_khz: 0, has_tsc_deadline: false, ..processor(0, 1) };
    let entries = intel().filter(&unknown);
    assert!(!entries.iter().any(|e| e.function == TIMING));
    assert_eq!(of(&entries, KVM_BASE, 0).eax, 0x4000_0001);
    assert_eq!(of(&entries, 0x1, 0).ecx >> 24 & 1, 0);
}

#[test]
fn this_machine_can_be_asked() {
    let offer = Offer::new(Vec::new());
    assert!(offer.brand.iter().flatten().any(|r| *r != 0), "every 64-bit processor has a name");
}

/// The rows of docs/processor.md's tables, as the code has them.
fn documented() -> Vec<String> {
    let host = |host| match host {
        Host::Any => "all",
        Host::Amd => "AMD",
        Host::Software => "software CPU",
    };
    let leaf = |leaf: u32, index: u32| {
        if leaf == 0x7 || leaf == 0xd { format!("{leaf:#x}.{index}") } else { format!("{leaf:#x}") }
    };
    let mut rows = Vec::new();
    for row in HIDDEN {
        let list: Vec<String> = row.bits.iter().map(u32::to_string).collect();
        let place = format!("{} {:?} {}", leaf(row.leaf, row.index), row.register, list.join(", "));
        rows.push(format!("| {place} | {} | {} | {} |", row.name, host(row.host), row.why));
    }
    for row in EMPTIED {
        rows.push(format!("| {:#x} | {} | {} | {} |", row.leaf, row.name, host(row.host), row.why));
    }
    for row in REWRITTEN {
        rows.push(format!("| {:#x} | {} | {} |", row.leaf, row.name, row.why));
    }
    rows
}

#[test]
fn the_page_about_the_processor_has_the_codes_tables() {
    let page = include_str!("../../../../docs/processor.md");
    let rows: Vec<&str> = page.lines().filter(|line| line.starts_with("| 0x")).collect();
    let expected = documented();
    for (row, expected) in rows.iter().zip(&expected) {
        assert_eq!(row, expected, "docs/processor.md against src/vmm/kvm/cpuid/model.rs");
    }
    assert_eq!(rows.len(), expected.len());
}

/// What a guest of `saved` would have saved, after a change, put back on `host`.
fn moved(saved: &Offer, host: &Offer, change: impl FnOnce(&mut Vec<kvm_cpuid_entry2>)) -> Result<(), Mismatch> {
    let mut cpuid = saved.filter(&processor(0, 2));
    change(&mut cpuid);
    host.fits(&Needs { cpuid: &cpuid, xcr0: 0b111, msrs: &[] }, &processor(0, 2), &[])
}

fn missing(result: Result<(), Mismatch>) -> Vec<String> {
    result.expect_err("it does not fit").missing
}

#[test]
fn a_snapshot_fits_on_its_own_host_and_on_one_that_has_more() {
    for host in [amd(), intel()] {
        assert_eq!(moved(&host, &host, |_| ()), Ok(()));
        // What follows the guest's registers and the number of its processors says nothing.
        let dynamic = |cpuid: &mut Vec<kvm_cpuid_entry2>| {
            patch(cpuid, 0x1, |e| e.edx ^= bits(&[9, 28]));
            patch(cpuid, 0x7, |e| e.ecx |= bit(4));
        };
        assert_eq!(moved(&host, &host, dynamic), Ok(()));
        let less = |cpuid: &mut Vec<kvm_cpuid_entry2>| patch(cpuid, 0x7, |e| e.ebx &= !bit(5));
        assert_eq!(moved(&host, &host, less), Ok(()));
    }
    // A program that hid less had its guests use what this one hides.
    let hidden = |cpuid: &mut Vec<kvm_cpuid_entry2>| patch(cpuid, 0x7, |e| e.ebx |= bit(11));
    assert_eq!(moved(&intel(), &intel(), hidden), Ok(()), "KVM offers RTM");
}

#[test]
fn what_a_host_lacks_is_named() {
    let mut poor = intel();
    patch(&mut poor.entries, 0x1, |e| e.ecx &= !bits(&[20, 25]));
    patch(&mut poor.entries, 0x7, |e| {
        e.ebx &= !bits(&[5, 16]);
        e.edx &= !bit(4);
    });
    patch(&mut poor.entries, 0x4000_0001, |e| e.eax &= !bit(5));
    let error = moved(&intel(), &poor, |_| ()).expect_err("it does not fit");
    assert_eq!(error.missing, ["aes", "avx2", "avx512f", "fsrm", "kvm_steal_time", "sse4_2"]);
    let text = "the snapshot is of a processor of GenuineIntel family 6, this host's is GenuineIntel family 6 without \
                aes, avx2, avx512f, fsrm, kvm_steal_time, sse4_2";
    assert_eq!(error.to_string(), text);
    let unnamed = |cpuid: &mut Vec<kvm_cpuid_entry2>| patch(cpuid, 0x7, |e| e.edx |= bit(6));
    assert_eq!(missing(moved(&amd(), &amd(), unnamed)), ["cpuid-7.0-edx-6"]);
    let far = |cpuid: &mut Vec<kvm_cpuid_entry2>| patch(cpuid, 0x8000_0008, |e| e.eax = 0x3034);
    assert_eq!(missing(moved(&amd(), &amd(), far)), ["52-bit-addresses"]);
    assert_eq!(missing(moved(&amd(), &amd(), |cpuid| cpuid.push(entry(0x7, 1, [bit(4), 0, 0, 0])))), ["avx_vnni"]);
}

#[test]
fn another_maker_or_family_is_refused_whatever_it_can_do() {
    let error = moved(&amd(), &intel(), |_| ()).expect_err("it does not fit");
    assert_eq!((error.saved.vendor.as_str(), error.saved.family), ("AuthenticAMD", 25));
    assert_eq!((error.host.vendor.as_str(), error.host.family), ("GenuineIntel", 6));
    assert!(error.missing.iter().any(|name| name == "sse4a" || name == "topoext"), "{error}");
    let older = |cpuid: &mut Vec<kvm_cpuid_entry2>| patch(cpuid, 0x1, |e| e.eax = 0x0080_0f12);
    let error = moved(&amd(), &amd(), older).expect_err("it does not fit");
    assert_eq!((error.saved.family, error.missing.len()), (23, 0));
    let text = "the snapshot is of a processor of AuthenticAMD family 23, this host's is AuthenticAMD family 25";
    assert_eq!(error.to_string(), text);
    let model = |cpuid: &mut Vec<kvm_cpuid_entry2>| patch(cpuid, 0x1, |e| e.eax = 0x00a2_0f12);
    assert_eq!(moved(&amd(), &amd(), model), Ok(()), "another model of the family");
}

#[test]
fn extended_state_and_registers_that_a_host_lacks_are_named() {
    let host = amd();
    let cpuid = host.filter(&processor(0, 1));
    let msr = |index, data| kvm_bindings::kvm_msr_entry { index, data, ..Default::default() };
    let fits = |xcr0, msrs: &[_]| host.fits(&Needs { cpuid: &cpuid, xcr0, msrs }, &processor(0, 1), &[0x10, 0x174]);
    assert_eq!(fits(0b111, &[msr(0x174, 16), msr(0x48, 0)]), Ok(()));
    assert_eq!(missing(fits(0b111, &[msr(0x48, 1), msr(0x174, 16)])), ["msr-0x48"]);
    assert_eq!(missing(fits(0b10_0111, &[])), ["avx512-opmask"]);
    assert_eq!(missing(fits(1 << 63, &[])), ["cpuid-d.0-eax-63"]);
    // AVX's part of the state at another place than the host has it.
    let place = |cpuid: &mut Vec<kvm_cpuid_entry2>| {
        let part = cpuid.iter_mut().find(|e| (e.function, e.index) == (0xd, 2));
        part.expect("the leaf is in the table").ebx = 0x280;
    };
    assert_eq!(missing(moved(&host, &host, place)), ["avx-state-layout"]);
}

#[test]
fn saved_cpuid_of_any_contents_is_answered() {
    assert!(missing(moved(&amd(), &intel(), |cpuid| cpuid.clear())).is_empty(), "nothing is needed, of no maker");
    let all = |cpuid: &mut Vec<kvm_cpuid_entry2>| {
        cpuid.iter_mut().for_each(|e| (e.eax, e.ebx, e.ecx, e.edx) = (u32::MAX, u32::MAX, u32::MAX, u32::MAX));
    };
    let error = moved(&amd(), &amd(), all).expect_err("it does not fit");
    assert!(error.missing.len() > 50 && error.to_string().len() < 400, "{error}");
}
