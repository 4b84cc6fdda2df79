//! ACPI tables: how the guest finds processors, interrupt controller, devices, power-off and reset.
//!
//! A hardware-reduced platform (ACPI 6.5 §4.1): no legacy interrupt controller, timer or keyboard controller
//! that the guest would have to probe or calibrate, and power-off by one register. The guest needs no PCI.

use super::aml;
use super::layout::*;

/// One virtio-mmio device as the guest is told about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioDevice {
    /// Guest-physical start of its window of `MMIO_WINDOW` octets.
    pub addr: u64,
    /// Its global system interrupt.
    pub gsi: u32,
}

/// All tables as one piece of memory.
#[derive(Debug)]
pub struct AcpiTables {
    /// What belongs at `ACPI_START`.
    pub octets: Vec<u8>,
    /// Guest-physical address of the root pointer.
    pub rsdp: u64,
}

const HEADER_LEN: usize = 36;
const RSDP_LEN: usize = 36;
const OEM_ID: &[u8; 6] = b"WARREN";
const OEM_TABLE_ID: &[u8; 8] = b"MICROVM ";
/// The device whose memory is the generation identifier.
const GENERATION_DEVICE: aml::Name = *b"VGEN";
/// What it is notified of: the identifier has changed.
const GENERATION_CHANGED: u8 = 0x80;

// FADT fixed feature flags (ACPI 6.5 table 5.10).
const FADT_WBINVD: u32 = 1 << 0;
const FADT_PROC_C1: u32 = 1 << 2;
const FADT_NO_POWER_BUTTON: u32 = 1 << 4;
const FADT_NO_SLEEP_BUTTON: u32 = 1 << 5;
const FADT_RESET_REGISTER: u32 = 1 << 10;
const FADT_HARDWARE_REDUCED: u32 = 1 << 20;
// FADT IA-PC boot architecture flags (table 5.11): no VGA, no MSI, no ASPM, no CMOS clock; the bits for
// legacy devices and the keyboard controller stay clear.
const BOOT_NO_VGA: u16 = 1 << 2;
const BOOT_NO_CMOS_CLOCK: u16 = 1 << 5;

/// Builds the tables for `vcpus` processors (APIC ids from 0) and the devices, in the order given: Linux numbers
/// block devices by it.
pub fn build(vcpus: u8, devices: &[MmioDevice]) -> AcpiTables {
    let mut octets = vec![0; RSDP_LEN];
    let mut place = |table: Vec<u8>| {
        // Tables start at multiples of 16, so that no field is unaligned.
        octets.resize(octets.len().next_multiple_of(16), 0);
        let addr = ACPI_START + octets.len() as u64;
        octets.extend(table);
        addr
    };
    let dsdt = place(dsdt(devices));
    let fadt = place(fadt(dsdt));
    let madt = place(madt(vcpus));
    let xsdt = place(xsdt(&[fadt, madt]));
    octets[..RSDP_LEN].copy_from_slice(&rsdp(xsdt));
    assert!(octets.len() as u64 <= ACPI_END - ACPI_START, "tables of 16 processors and 19 devices fit");
    AcpiTables { octets, rsdp: ACPI_START }
}

fn checksum(octets: &[u8]) -> u8 {
    octets.iter().fold(0u8, |sum, b| sum.wrapping_sub(*b))
}

/// A table: the header of §5.2.6 and the content.
fn table(signature: &[u8; 4], revision: u8, content: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER_LEN + content.len());
    out.extend(signature);
    out.extend(((HEADER_LEN + content.len()) as u32).to_le_bytes());
    out.extend([revision, 0]);
    out.extend(OEM_ID);
    out.extend(OEM_TABLE_ID);
    out.extend(1u32.to_le_bytes()); // OEM revision
    out.extend(b"WRRN"); // creator
    out.extend(1u32.to_le_bytes()); // creator revision
    out.extend(content);
    out[9] = checksum(&out);
    out
}

/// Root system description pointer (§5.2.5).
fn rsdp(xsdt: u64) -> [u8; RSDP_LEN] {
    let mut out = [0; RSDP_LEN];
    out[..8].copy_from_slice(b"RSD PTR ");
    out[9..15].copy_from_slice(OEM_ID);
    out[15] = 2; // revision: there is an XSDT
    out[20..24].copy_from_slice(&(RSDP_LEN as u32).to_le_bytes());
    out[24..32].copy_from_slice(&xsdt.to_le_bytes());
    out[8] = checksum(&out[..20]);
    out[32] = checksum(&out);
    out
}

/// Extended system description table (§5.2.8).
fn xsdt(tables: &[u64]) -> Vec<u8> {
    let content: Vec<u8> = tables.iter().flat_map(|t| t.to_le_bytes()).collect();
    table(b"XSDT", 1, &content)
}

/// Generic address structure (§5.2.3.2) of an 8-bit I/O port.
fn port(number: u16) -> [u8; 12] {
    let mut out = [1, 8, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
    out[4..6].copy_from_slice(&number.to_le_bytes());
    out
}

/// Fixed ACPI description table (§5.2.9), revision 6.5.
fn fadt(dsdt: u64) -> Vec<u8> {
    // Offsets as in the specification, less the header.
    let mut out = vec![0; 276 - HEADER_LEN];
    let mut put = |offset: usize, octets: &[u8]| {
        out[offset - HEADER_LEN..offset - HEADER_LEN + octets.len()].copy_from_slice(octets);
    };
    let flags = FADT_WBINVD
        | FADT_PROC_C1
        | FADT_NO_POWER_BUTTON
        | FADT_NO_SLEEP_BUTTON
        | FADT_RESET_REGISTER
        | FADT_HARDWARE_REDUCED;
    put(109, &(BOOT_NO_VGA | BOOT_NO_CMOS_CLOCK).to_le_bytes());
    put(112, &flags.to_le_bytes());
    put(116, &port(RESET));
    put(128, &[RESET_VALUE]);
    put(131, &[5]); // minor version of the FADT
    put(140, &dsdt.to_le_bytes()); // X_DSDT; the 32-bit field stays 0
    put(244, &port(SLEEP_CONTROL));
    put(256, &port(SLEEP_STATUS));
    put(268, b"WARREN\0\0"); // hypervisor vendor
    table(b"FACP", 6, &out)
}

/// Multiple APIC description table (§5.2.12).
fn madt(vcpus: u8) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend((LAPIC as u32).to_le_bytes());
    out.extend(0u32.to_le_bytes()); // flags: no legacy interrupt controllers
    for id in 0..vcpus {
        out.extend([0, 8, id, id]); // local APIC: processor uid, APIC id
        out.extend(1u32.to_le_bytes()); // enabled
    }
    out.extend([1, 12, vcpus, 0]); // IOAPIC; its id is none of a processor
    out.extend((IOAPIC as u32).to_le_bytes());
    out.extend(0u32.to_le_bytes()); // its first global system interrupt
    out.extend([4, 6, 0xff, 0, 0, 1]); // NMI: LINT1 of all processors
    table(b"APIC", 5, &out)
}

/// Differentiated system description table: the devices and soft off.
fn dsdt(devices: &[MmioDevice]) -> Vec<u8> {
    let mut children = vec![
        aml::device(
            *b"COM1",
            &[
                aml::name(*b"_HID", &aml::eisa_id(b"PNP0501")),
                aml::name(*b"_UID", &aml::integer(0)),
                aml::name(*b"_CRS", &aml::resources(&[aml::ports(COM1, COM1_PORTS), aml::interrupt(COM1_GSI)])),
            ],
        ),
        aml::device(
            *b"PEVT",
            &[
                aml::name(*b"_HID", &aml::string("QEMU0001")),
                aml::name(*b"_CRS", &aml::resources(&[aml::ports(PVPANIC, 1)])),
            ],
        ),
    ];
    children.extend(generation());
    for (index, device) in devices.iter().enumerate() {
        let digits = b"0123456789ABCDEF";
        children.push(aml::device(
            [b'V', b'I', digits[(index >> 4) & 15], digits[index & 15]],
            &[
                aml::name(*b"_HID", &aml::string("LNRO0005")),
                aml::name(*b"_UID", &aml::integer(index as u32)),
                aml::name(
                    *b"_CRS",
                    &aml::resources(&[
                        aml::memory_range(device.addr as u32, MMIO_WINDOW as u32),
                        aml::interrupt(device.gsi),
                    ]),
                ),
            ],
        ));
    }
    let s5 = [u32::from(S5_SLEEP_TYPE), 0, 0, 0].map(aml::integer);
    let content = [aml::name(*b"_S5_", &aml::package_of(&s5)), aml::system_bus(&children)].concat();
    table(b"DSDT", 2, &content)
}

/// The generation identifier (Microsoft's "Virtual Machine Generation ID"), and the generic event device (§5.6.9) whose
/// interrupt says that it has changed.
fn generation() -> [Vec<u8>; 2] {
    let (low, high) = (GENERATION_ID as u32, (GENERATION_ID >> 32) as u32);
    [
        aml::device(
            GENERATION_DEVICE,
            &[
                aml::name(*b"_HID", &aml::string("WRRN0001")),
                aml::name(*b"_CID", &aml::string("VM_Gen_Counter")),
                aml::name(*b"_DDN", &aml::string("VM_Gen_Counter")),
                aml::name(*b"ADDR", &aml::package_of(&[low, high].map(aml::integer))),
            ],
        ),
        aml::device(
            *b"GED0",
            &[
                aml::name(*b"_HID", &aml::string("ACPI0013")),
                aml::name(*b"_UID", &aml::integer(0)),
                aml::name(*b"_CRS", &aml::resources(&[aml::interrupt(GENERATION_GSI)])),
                // Its one argument is the interrupt, of which there is one.
                aml::method(*b"_EVT", 1, &[aml::notify(GENERATION_DEVICE, GENERATION_CHANGED)]),
            ],
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(tables: &AcpiTables, addr: u64) -> &[u8] {
        let start = (addr - ACPI_START) as usize;
        let len = u32::from_le_bytes(tables.octets[start + 4..start + 8].try_into().unwrap());
        &tables.octets[start..start + len as usize]
    }

    fn pointers(xsdt: &[u8]) -> Vec<u64> {
        xsdt[HEADER_LEN..].chunks(8).map(|c| u64::from_le_bytes(c.try_into().unwrap())).collect()
    }

    fn sum(octets: &[u8]) -> u8 {
        octets.iter().fold(0u8, |sum, b| sum.wrapping_add(*b))
    }

    fn devices(count: u32) -> Vec<MmioDevice> {
        (0..count)
            .map(|n| MmioDevice { addr: MMIO_START + u64::from(n) * MMIO_WINDOW, gsi: MMIO_FIRST_GSI + n })
            .collect()
    }

    #[test]
    fn every_table_is_reached_from_the_root_and_sums_to_zero() {
        for vcpus in [1, 16] {
            let tables = build(vcpus, &devices(19));
            let root = &tables.octets[..RSDP_LEN];
            assert_eq!((sum(&root[..20]), sum(root)), (0, 0));
            let xsdt = at(&tables, u64::from_le_bytes(root[24..32].try_into().unwrap()));
            let found: Vec<&[u8]> = pointers(xsdt).into_iter().map(|p| at(&tables, p)).collect();
            assert_eq!(found.iter().map(|t| &t[..4]).collect::<Vec<_>>(), [b"FACP", b"APIC"]);
            let dsdt = at(&tables, u64::from_le_bytes(found[0][140..148].try_into().unwrap()));
            assert_eq!(&dsdt[..4], b"DSDT");
            for table in [xsdt, found[0], found[1], dsdt] {
                assert_eq!(sum(table), 0);
            }
        }
    }

    #[test]
    fn the_madt_names_each_processor_once_and_an_ioapic_with_an_id_of_its_own() {
        let madt = madt(16);
        let mut rest = &madt[HEADER_LEN + 8..];
        let (mut apic_ids, mut ioapics) = (Vec::new(), Vec::new());
        while let [kind, len, ..] = *rest {
            match kind {
                0 => apic_ids.push(rest[3]),
                1 => ioapics.push(rest[2]),
                _ => {}
            }
            rest = &rest[usize::from(len)..];
        }
        assert_eq!(apic_ids, (0..16).collect::<Vec<u8>>());
        assert_eq!(ioapics, [16]);
    }

    #[test]
    fn devices_appear_in_the_order_given() {
        let dsdt = dsdt(&devices(3));
        let position = |name: &[u8]| dsdt.windows(4).position(|w| w == name).unwrap();
        assert!(position(b"VI00") < position(b"VI01") && position(b"VI01") < position(b"VI02"));
    }

    #[test]
    fn power_off_and_reset_have_registers_of_their_own() {
        let fadt = fadt(0x1234);
        assert_eq!(fadt.len(), 276);
        assert_eq!(u16::from_le_bytes([fadt[120], fadt[121]]), RESET);
        assert_eq!(u16::from_le_bytes([fadt[248], fadt[249]]), SLEEP_CONTROL);
        assert_eq!(u16::from_le_bytes([fadt[260], fadt[261]]), SLEEP_STATUS);
    }
}
