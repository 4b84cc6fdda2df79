//! Where everything is in the guest's physical address space and on its I/O ports. All of it in one place,
//! so that an overlap can be seen.
//!
//! ```text
//! 0x0000_6000  PVH start_info, module list
//! 0x0000_7000  PVH memory map
//! 0x0002_0000  kernel command line
//! 0x000e_0000  ACPI tables (reported as ACPI data, not RAM)
//! 0x000f_f000  generation identifier (reserved)
//! 0x0010_0000  kernel (1 MiB up)          initramfs: page-aligned at the top of low RAM
//! 0xc000_0000  hole in RAM up to 4 GiB: virtio-mmio windows, IOAPIC, LAPIC, KVM's own pages
//! 0x1_0000_0000  RAM beyond 3 GiB
//! ```

pub use crate::vmm::devices::{
    FIRST_GSI as MMIO_FIRST_GSI, MMIO_BASE as MMIO_START, SERIAL_GSI as COM1_GSI, SERIAL_PORT as COM1,
    WINDOW as MMIO_WINDOW,
};

/// PVH `hvm_start_info`.
pub const START_INFO: u64 = 0x6000;
/// PVH module list: one entry, the initramfs.
pub const MODULE_LIST: u64 = 0x6040;
/// PVH memory map.
pub const MEMORY_MAP: u64 = 0x7000;
/// Kernel command line, NUL-terminated.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Longest command line with its NUL, in octets: x86 Linux' `COMMAND_LINE_SIZE`.
pub const COMMAND_LINE_MAX: usize = 2048;

/// End of the RAM below the legacy hole of a PC.
pub const LOW_RAM_END: u64 = 0xa_0000;
/// ACPI tables. The area is where the firmware of a PC puts them; the kernel learns the address by PVH.
pub const ACPI_START: u64 = 0xe_0000;
/// End of the ACPI area.
pub const ACPI_END: u64 = 0xf_f000;
/// The machine's generation identifier: 16 octets at the start of a page of its own, which the guest is told to be
/// reserved (neither RAM nor ACPI's, as its specification demands).
pub const GENERATION_ID: u64 = ACPI_END;
/// End of that page.
pub const GENERATION_END: u64 = 0x10_0000;
/// Global system interrupt that tells the guest to look at the identifier, edge-triggered; below those of the serial port
/// and the virtio devices.
pub const GENERATION_GSI: u32 = 3;
/// Lowest address a kernel may be loaded at.
pub const KERNEL_START: u64 = 0x10_0000;

/// Inputs of KVM's IOAPIC.
pub const IOAPIC_INPUTS: u32 = 24;
/// KVM's IOAPIC.
pub const IOAPIC: u64 = 0xfec0_0000;
/// Local APICs.
pub const LAPIC: u64 = 0xfee0_0000;
/// One page for KVM's identity map, three for its TSS (needed by Intel CPUs without unrestricted guest).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages for KVM's task state segment.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// Ports of a serial port.
pub const COM1_PORTS: u8 = 8;
/// Command port of the keyboard controller; 0xfe written to it is a reset on every PC.
pub const KEYBOARD_COMMAND: u16 = 0x64;
/// pvpanic (QEMU docs/specs/pvpanic): the guest reports its panic here.
pub const PVPANIC: u16 = 0x505;
/// ACPI sleep control register (ACPI 6.5 §4.8.3.7): power-off.
pub const SLEEP_CONTROL: u16 = 0x600;
/// ACPI sleep status register.
pub const SLEEP_STATUS: u16 = 0x601;
/// ACPI reset register.
pub const RESET: u16 = 0x602;
/// What a guest writes there to be reset.
pub const RESET_VALUE: u8 = 1;
/// Sleep type of S5, soft off.
pub const S5_SLEEP_TYPE: u8 = 5;

// Interrupts do not overlap, and 0 is none (Linux takes it for a missing one).
const _: () = assert!(0 < GENERATION_GSI && GENERATION_GSI < COM1_GSI && COM1_GSI < MMIO_FIRST_GSI);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_below_one_mebibyte_do_not_overlap() {
        let areas = [
            (START_INFO, START_INFO + 56),
            (MODULE_LIST, MODULE_LIST + 32),
            (MEMORY_MAP, MEMORY_MAP + 8 * 24),
            (COMMAND_LINE, COMMAND_LINE + COMMAND_LINE_MAX as u64),
            (LOW_RAM_END, ACPI_START),
            (ACPI_START, ACPI_END),
            (GENERATION_ID, GENERATION_END),
            (KERNEL_START, u64::MAX),
        ];
        for pair in areas.windows(2) {
            assert!(pair[0].1 <= pair[1].0, "{pair:x?}");
        }
    }
}
