//! The few ACPI machine language encodings that Warren's one definition block needs (ACPI 6.5 §20.2, §6.4).

/// One component of a path: four characters.
pub type Name = [u8; 4];

const ZERO_OP: u8 = 0x00;
const NAME_OP: u8 = 0x08;
const BYTE_PREFIX: u8 = 0x0a;
const DWORD_PREFIX: u8 = 0x0c;
const STRING_PREFIX: u8 = 0x0d;
const SCOPE_OP: u8 = 0x10;
const BUFFER_OP: u8 = 0x11;
const PACKAGE_OP: u8 = 0x12;
const METHOD_OP: u8 = 0x14;
const NOTIFY_OP: u8 = 0x86;
const EXTENDED_OP: u8 = 0x5b;
const DEVICE_OP: u8 = 0x82;

/// `PkgLength` (§20.2.4): the length counts its own octets.
fn package_length(content: usize) -> Vec<u8> {
    if content + 1 < 0x40 {
        return vec![(content + 1) as u8];
    }
    let follow = if content + 2 < 1 << 12 { 1 } else { 2 };
    let total = content + 1 + follow;
    assert!(total < 1 << 20, "no Warren table comes near 1 MiB");
    let mut out = vec![(follow << 6) as u8 | (total & 0xf) as u8];
    out.extend((0..follow).map(|i| (total >> (4 + 8 * i)) as u8));
    out
}

fn package(head: &[u8], content: &[u8]) -> Vec<u8> {
    [head, &package_length(content.len()), content].concat()
}

/// An integer, in the shortest of the encodings that are used here.
pub fn integer(value: u32) -> Vec<u8> {
    match u8::try_from(value) {
        Ok(0) => vec![ZERO_OP],
        // 1 has an encoding of its own too, but this one is valid for it as well.
        Ok(small) => vec![BYTE_PREFIX, small],
        Err(_) => [&[DWORD_PREFIX][..], &value.to_le_bytes()].concat(),
    }
}

/// A string of ASCII characters.
pub fn string(text: &str) -> Vec<u8> {
    [&[STRING_PREFIX][..], text.as_bytes(), &[0]].concat()
}

/// A compressed EISA identifier such as `PNP0501` (§19.3.4): three letters and four hexadecimal digits.
pub fn eisa_id(id: &[u8; 7]) -> Vec<u8> {
    let letters = id[..3].iter().fold(0u32, |all, c| all << 5 | u32::from(c - b'A' + 1));
    let digits = id[3..].iter().fold(0u32, |all, c| all << 4 | (*c as char).to_digit(16).unwrap_or(0));
    [&[DWORD_PREFIX][..], &(letters << 16 | digits).to_be_bytes()].concat()
}

/// `Name(name, value)`.
pub fn name(name: Name, value: &[u8]) -> Vec<u8> {
    [&[NAME_OP][..], &name, value].concat()
}

/// `Package(){…}` of up to 255 elements.
pub fn package_of(elements: &[Vec<u8>]) -> Vec<u8> {
    package(&[PACKAGE_OP], &[&[elements.len() as u8][..], &elements.concat()].concat())
}

/// `Device(name){…}`.
pub fn device(name: Name, content: &[Vec<u8>]) -> Vec<u8> {
    package(&[EXTENDED_OP, DEVICE_OP], &[&name[..], &content.concat()].concat())
}

/// `Method(name, arguments, NotSerialized){…}` of up to 7 arguments.
pub fn method(name: Name, arguments: u8, content: &[Vec<u8>]) -> Vec<u8> {
    package(&[METHOD_OP], &[&name[..], &[arguments & 7], &content.concat()].concat())
}

/// `Notify(\_SB.name, value)`: a device on the system bus gets that notification.
pub fn notify(name: Name, value: u8) -> Vec<u8> {
    // A path from the root, of two names.
    [&[NOTIFY_OP, b'\\', 0x2e][..], b"_SB_", &name, &integer(value.into())].concat()
}

/// `Scope(\_SB){…}`.
pub fn system_bus(content: &[Vec<u8>]) -> Vec<u8> {
    package(&[SCOPE_OP], &[&b"\\_SB_"[..], &content.concat()].concat())
}

/// `ResourceTemplate(){…}`: the descriptors in a buffer, with the end tag.
pub fn resources(descriptors: &[Vec<u8>]) -> Vec<u8> {
    // An end tag with checksum 0 is taken as correct (§6.4.2.9).
    let content = [&descriptors.concat()[..], &[0x79, 0]].concat();
    package(&[BUFFER_OP], &[&integer(content.len() as u32)[..], &content].concat())
}

/// 32-bit fixed memory range, read and write (§6.4.3.4).
pub fn memory_range(start: u32, len: u32) -> Vec<u8> {
    [&[0x86, 9, 0, 1][..], &start.to_le_bytes(), &len.to_le_bytes()].concat()
}

/// I/O ports, all 16 bits decoded (§6.4.2.5).
pub fn ports(start: u16, count: u8) -> Vec<u8> {
    let start = start.to_le_bytes();
    vec![0x47, 1, start[0], start[1], start[0], start[1], 1, count]
}

/// One global system interrupt that the device consumes: edge-triggered, active high, exclusive (§6.4.3.6).
pub fn interrupt(gsi: u32) -> Vec<u8> {
    [&[0x89, 6, 0, 0b0011, 1][..], &gsi.to_le_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn package_lengths_match_the_specification() {
        assert_eq!(package_length(0), [1]);
        assert_eq!(package_length(62), [63]);
        assert_eq!(package_length(63), [0x41, 4]);
        assert_eq!(package_length(0x100), [0x42, 0x10]);
        assert_eq!(package_length(0xffd), [0x4f, 0xff]);
        assert_eq!(package_length(0xffe), [0x81, 0x00, 0x01]);
    }

    #[test]
    fn eisa_identifiers_are_compressed() {
        // As `iasl` writes EISAID("PNP0501").
        assert_eq!(eisa_id(b"PNP0501"), [0x0c, 0x41, 0xd0, 0x05, 0x01]);
    }

    #[test]
    fn a_method_holds_its_arguments_and_terms() {
        // As `iasl` writes Method(_EVT, 1){Notify(\_SB.VGEN, 0x80)}.
        let expected = b"\x14\x13_EVT\x01\x86\\\x2e_SB_VGEN\x0a\x80";
        assert_eq!(method(*b"_EVT", 1, &[notify(*b"VGEN", 0x80)]), expected);
    }

    #[test]
    fn a_resource_template_holds_its_length_and_end_tag() {
        let template = resources(&[interrupt(5)]);
        assert_eq!(template, [0x11, 14, 0x0a, 11, 0x89, 6, 0, 3, 1, 5, 0, 0, 0, 0x79, 0]);
    }
}
