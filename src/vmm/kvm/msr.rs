//! Model-specific registers that a processor starts with, where KVM's reset value will not do. docs/processor.md shows
//! the table and says why a guest's accesses are left to KVM's own list.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::{KvmError, refused};

/// A register with its first value.
#[derive(Debug)]
struct Boot {
    index: u32,
    value: u64,
    name: &'static str,
    #[cfg_attr(not(test), allow(dead_code, reason = "for the page"))]
    why: &'static str,
}

const FAST_STRINGS: u64 = 1;
const MTRR_ON: u64 = 1 << 11;
const WRITE_BACK: u64 = 6;

/// KVM resets everything else to what a kernel that enters by PVH expects.
const BOOT: [Boot; 2] = [
    Boot {
        index: 0x1a0,
        value: FAST_STRINGS,
        name: "IA32_MISC_ENABLE",
        why: "fast strings, as on any host; KVM resets it to 0",
    },
    Boot {
        index: 0x2ff,
        value: MTRR_ON | WRITE_BACK,
        name: "IA32_MTRR_DEF_TYPE",
        why: "everything write-back; without it a guest may take all of its RAM for uncacheable",
    },
];

/// Sets them on a processor that has not run yet.
pub(super) fn set_boot(fd: &VcpuFd, id: u8) -> Result<(), KvmError> {
    let entries = BOOT.map(|msr| kvm_msr_entry { index: msr.index, data: msr.value, ..Default::default() });
    let msrs = Msrs::from_entries(&entries).map_err(|_| KvmError::Lacks("room for the boot MSRs".to_string()))?;
    // KVM gives how many it took before one that it does not know.
    let set = fd.set_msrs(&msrs).map_err(refused(format!("the MSRs of processor {id}")))?;
    match BOOT.get(set) {
        Some(msr) => Err(KvmError::Lacks(format!("MSR {:#x}, {}", msr.index, msr.name))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_about_the_processor_has_the_boot_values() {
        let page = include_str!("../../../docs/processor.md");
        let rows: Vec<&str> = page.lines().filter(|line| line.starts_with("| IA32_")).collect();
        let expected = BOOT.map(|m| format!("| {} ({:#x}) | {:#x} | {} |", m.name, m.index, m.value, m.why));
        assert_eq!(rows, expected);
    }
}
