//! What a PVH kernel finds in memory when it starts (Xen `public/arch-x86/hvm/start_info.h`).

use super::layout::*;

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
/// Length of `hvm_start_info` version 1.
const START_INFO_LEN: usize = 56;
const TYPE_RAM: u32 = 1;
const TYPE_RESERVED: u32 = 2;
const TYPE_ACPI: u32 = 3;

/// The structures, each with the address it belongs at.
#[derive(Debug)]
pub struct StartInfo {
    /// Address and octets.
    pub parts: Vec<(u64, Vec<u8>)>,
}

/// Builds start_info, the module list and the memory map. `ram` gives the RAM regions as (start, length); the
/// first starts at 0 and is 1 MiB at least. `initramfs` is its address and length.
pub fn build(ram: &[(u64, u64)], initramfs: Option<(u64, u64)>, rsdp: u64) -> StartInfo {
    let map = memory_map(ram);
    let mut info = Vec::with_capacity(START_INFO_LEN);
    for field in [MAGIC, VERSION, 0, u32::from(initramfs.is_some())] {
        info.extend(field.to_le_bytes());
    }
    let modules = if initramfs.is_some() { MODULE_LIST } else { 0 };
    for field in [modules, COMMAND_LINE, rsdp, MEMORY_MAP] {
        info.extend(field.to_le_bytes());
    }
    info.extend((map.len() as u32).to_le_bytes());
    info.extend(0u32.to_le_bytes());
    debug_assert_eq!(info.len(), START_INFO_LEN);

    let mut parts = vec![(START_INFO, info)];
    if let Some((addr, len)) = initramfs {
        // Address, size, its command line, reserved.
        parts.push((MODULE_LIST, [addr, len, 0, 0].iter().flat_map(|f| f.to_le_bytes()).collect()));
    }
    let mut entries = Vec::new();
    for (start, len, kind) in map {
        entries.extend(start.to_le_bytes());
        entries.extend(len.to_le_bytes());
        entries.extend(kind.to_le_bytes());
        entries.extend(0u32.to_le_bytes());
    }
    parts.push((MEMORY_MAP, entries));
    StartInfo { parts }
}

/// The map as (start, length, type): RAM without the legacy hole below 1 MiB, the ACPI tables, the generation identifier.
fn memory_map(ram: &[(u64, u64)]) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, LOW_RAM_END, TYPE_RAM),
        (ACPI_START, ACPI_END - ACPI_START, TYPE_ACPI),
        (GENERATION_ID, GENERATION_END - GENERATION_ID, TYPE_RESERVED),
    ];
    for &(start, len) in ram {
        let from = start.max(GENERATION_END);
        map.push((from, start + len - from, TYPE_RAM));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_has_all_ram_but_the_legacy_hole_in_ascending_order() {
        let map = memory_map(&[(0, 3 << 30), (4 << 30, 1 << 30)]);
        assert_eq!(
            map,
            [
                (0, 0xa_0000, TYPE_RAM),
                (0xe_0000, 0x1_f000, TYPE_ACPI),
                (0xf_f000, 0x1000, TYPE_RESERVED),
                (0x10_0000, (3 << 30) - 0x10_0000, TYPE_RAM),
                (4 << 30, 1 << 30, TYPE_RAM),
            ]
        );
        assert!(map.windows(2).all(|p| p[0].0 + p[0].1 <= p[1].0));
    }

    #[test]
    fn start_info_points_at_the_other_parts() {
        let info = build(&[(0, 64 << 20)], Some((0x200_0000, 0x1234)), 0xe_0000);
        let [(at, head), (modules_at, modules), (map_at, map)] = &info.parts[..] else { panic!("three parts") };
        assert_eq!((*at, *modules_at, *map_at), (START_INFO, MODULE_LIST, MEMORY_MAP));
        assert_eq!((head.len(), modules.len(), map.len()), (56, 32, 4 * 24));
        assert_eq!(head[..4], 0x336e_c578u32.to_le_bytes());
        assert_eq!(head[12], 1);
        assert_eq!(head[16..24], MODULE_LIST.to_le_bytes());
        assert_eq!(head[32..40], 0xe_0000u64.to_le_bytes());
        assert_eq!(head[48], 4);
    }
}
