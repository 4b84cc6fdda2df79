//! What a guest does not get of what KVM offers, with the reason for each. docs/processor.md shows these tables; a
//! test keeps page and tables one.
//!
//! Sources: Intel SDM 2A "CPUID", AMD APM 3 appendix E.

#![cfg_attr(not(test), allow(dead_code, reason = "names and reasons are for the page, which a test compares"))]

/// A register of CPUID's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// The hosts that a row is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Host {
    Any,
    /// AMD's processors and Hygon's, which are built alike.
    Amd,
    /// QEMU's software CPU.
    Software,
}

/// Feature bits that are taken away.
#[derive(Debug)]
pub(super) struct Hidden {
    pub leaf: u32,
    pub index: u32,
    pub register: Register,
    /// The bits, lowest first.
    pub bits: &'static [u32],
    pub host: Host,
    /// The features' names.
    pub name: &'static str,
    /// Why a guest does not get them.
    pub why: &'static str,
}

/// A leaf that is answered with zeroes.
#[derive(Debug)]
pub(super) struct Emptied {
    pub leaf: u32,
    pub host: Host,
    pub name: &'static str,
    pub why: &'static str,
}

/// A leaf that is written anew.
#[derive(Debug)]
pub(super) struct Rewritten {
    pub leaf: u32,
    pub name: &'static str,
    pub why: &'static str,
}

use Host::{Amd, Any, Software};
use Register::{Eax, Ebx, Ecx, Edx};

const fn hidden(
    (leaf, index): (u32, u32),
    register: Register,
    bits: &'static [u32],
    host: Host,
    name: &'static str,
    why: &'static str,
) -> Hidden {
    Hidden { leaf, index, register, bits, host, name, why }
}

const NESTING: &str =
    "a sandbox runs no virtual machines of its own; nesting is the largest part of KVM that a guest could reach";
const COUNTERS: &str = "performance counters tell a guest about its neighbours";
const TILES: &str = "AMX is for a guest whole or not at all, and it is not: see below";
const SOFTWARE: &str =
    "QEMU's software SVM does not leave the guest at XSETBV, so that KVM goes on with another XCR0 than the guest's";

/// Feature bits that are taken away.
pub(super) const HIDDEN: &[Hidden] = &[
    hidden(
        (0x1, 0),
        Ecx,
        &[3],
        Any,
        "MONITOR",
        "MWAIT leaves the guest in any case: KVM would emulate it as doing nothing",
    ),
    hidden((0x1, 0), Ecx, &[5], Any, "VMX", NESTING),
    hidden((0x1, 0), Ecx, &[15], Any, "PDCM", COUNTERS),
    hidden((0x7, 0), Ebx, &[2], Any, "SGX", "enclaves need EPC memory that the worker does not map"),
    hidden(
        (0x7, 0),
        Ebx,
        &[4, 11],
        Any,
        "HLE, RTM",
        "transactions abort by what neighbours do to the cache, and tell of it; Intel has retired them",
    ),
    hidden(
        (0x7, 0),
        Ebx,
        &[25],
        Any,
        "INTEL_PT",
        "a record of where the processor was; KVM offers it only in a mode that the node does not use",
    ),
    hidden(
        (0x7, 0),
        Ecx,
        &[5],
        Any,
        "WAITPKG",
        "UMWAIT holds the host's core in a wait state without leaving the guest",
    ),
    hidden((0x7, 0), Ecx, &[30], Any, "SGX_LC", "goes with SGX"),
    hidden((0x7, 0), Edx, &[22, 24, 25], Any, "AMX_BF16, AMX_TILE, AMX_INT8", TILES),
    hidden(
        (0x7, 0),
        Edx,
        &[29],
        Amd,
        "ARCH_CAPABILITIES",
        "the MSR is Intel's; KVM makes one up on AMD, and guests would read Intel's meaning from it",
    ),
    hidden((0x7, 1), Eax, &[21], Any, "AMX_FP16", TILES),
    hidden((0x7, 1), Edx, &[8], Any, "AMX_COMPLEX", TILES),
    hidden((0xd, 0), Eax, &[17, 18], Any, "XTILECFG, XTILEDATA", TILES),
    hidden((0x8000_0001, 0), Ecx, &[2, 12], Any, "SVM, SKINIT", NESTING),
    hidden((0x8000_0001, 0), Ecx, &[10], Any, "IBS", COUNTERS),
    hidden((0x8000_0001, 0), Ecx, &[23, 24, 27, 28], Any, "PERFCTR_CORE, PERFCTR_NB, PTSC, PERFCTR_LLC", COUNTERS),
    hidden((0x1, 0), Ecx, &[26, 27], Software, "XSAVE, OSXSAVE", SOFTWARE),
    hidden((0x1, 0), Ecx, &[12, 28, 29], Software, "FMA, AVX, F16C", "need XSAVE"),
    hidden((0x7, 0), Ebx, &[5], Software, "AVX2", "needs XSAVE"),
];

const fn emptied(leaf: u32, name: &'static str, why: &'static str) -> Emptied {
    Emptied { leaf, host: Any, name, why }
}

/// Leaves that are answered with zeroes.
pub(super) const EMPTIED: &[Emptied] = &[
    emptied(0x5, "MONITOR/MWAIT", "goes with MONITOR"),
    emptied(0xa, "architectural performance counters", COUNTERS),
    emptied(0x12, "SGX", "goes with SGX"),
    emptied(0x14, "processor trace", "goes with INTEL_PT"),
    emptied(0x1d, "AMX tiles", TILES),
    emptied(0x1e, "AMX multiplication", TILES),
    emptied(0x8000_000a, "SVM", NESTING),
    emptied(0x8000_001b, "IBS", COUNTERS),
    emptied(0x8000_001f, "memory encryption", "a sandbox is no encrypted guest"),
    emptied(0x8000_0022, "performance counters, version 2", COUNTERS),
    emptied(0x8000_0026, "extended topology of AMD", "the host's; leaf 0xb has the guest's"),
    Emptied { leaf: 0xd, host: Software, name: "XSAVE areas", why: "goes with XSAVE" },
];

/// Leaves that are written anew: KVM passes on the host's, or nothing.
pub(super) const REWRITTEN: &[Rewritten] = &[
    Rewritten {
        leaf: 0x1,
        name: "APIC id, processors, HTT, HYPERVISOR, TSC_DEADLINE",
        why: "the guest's own; KVM has the deadline timer but does not say so here",
    },
    Rewritten {
        leaf: 0x4,
        name: "caches of Intel",
        why: "levels 1 and 2 are a core's own, others are shared by all processors of the guest",
    },
    Rewritten {
        leaf: 0x6,
        name: "power management",
        why: "only ARAT, the APIC timer that never stops; frequencies and temperatures are the host's affair",
    },
    Rewritten {
        leaf: 0xb,
        name: "topology",
        why: "one thread a core, all cores in one package; x2APIC ids are the processors' numbers",
    },
    Rewritten { leaf: 0x1f, name: "topology, version 2", why: "as leaf 0xb, where the host has it" },
    Rewritten { leaf: 0x4000_0000, name: "KVM's last leaf", why: "room for leaf 0x40000010" },
    Rewritten {
        leaf: 0x4000_0010,
        name: "TSC and APIC frequencies",
        why: "spares the guest a calibration; left out where the host's TSC is unstable",
    },
    Rewritten { leaf: 0x8000_0001, name: "CMP_LEGACY", why: "AMD: cores, not threads" },
    Rewritten {
        leaf: 0x8000_0002,
        name: "brand string",
        why: "with the two leaves after it: the host's, which KVM leaves out",
    },
    Rewritten { leaf: 0x8000_0008, name: "number of cores", why: "AMD: the guest's own" },
    Rewritten { leaf: 0x8000_001d, name: "caches of AMD", why: "as leaf 0x4" },
    Rewritten { leaf: 0x8000_001e, name: "APIC, core and node id", why: "AMD: one thread a core, one node" },
];
