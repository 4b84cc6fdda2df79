use std::cell::RefCell;

use super::*;

/// A file in memory that records what was loaded.
#[derive(Default)]
struct Fake {
    octets: Vec<u8>,
    loaded: RefCell<Vec<(u64, u64, u64)>>,
}

impl KernelFile for Fake {
    fn octets(&self) -> io::Result<u64> {
        Ok(self.octets.len() as u64)
    }
    fn read_exact_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        let start = offset as usize;
        into.copy_from_slice(&self.octets[start..start + into.len()]);
        Ok(())
    }
    fn load(&self, offset: u64, addr: u64, len: u64) -> io::Result<()> {
        self.loaded.borrow_mut().push((offset, addr, len));
        Ok(())
    }
}

#[derive(Clone, Copy)]
struct Header {
    kind: u32,
    offset: u64,
    addr: u64,
    file_len: u64,
    memory_len: u64,
}

fn segment(offset: u64, addr: u64, file_len: u64, memory_len: u64) -> Header {
    Header { kind: SEGMENT_LOAD, offset, addr, file_len, memory_len }
}

fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend((name.len() as u32).to_le_bytes());
    out.extend((desc.len() as u32).to_le_bytes());
    out.extend(kind.to_le_bytes());
    for part in [name, desc] {
        out.extend(part);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    out
}

fn entry_note(entry: u64) -> Vec<u8> {
    [note(b"GNU\0", 3, b"build-id"), note(b"Xen\0", NOTE_PHYS32_ENTRY, &entry.to_le_bytes())].concat()
}

/// A file of 32 KiB: header, program headers, the notes at 0x1000, segments' content from 0x2000 on.
fn kernel(segments: &[Header], notes: &[u8]) -> Fake {
    let mut octets = vec![0; 0x8000];
    octets[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    octets[16..18].copy_from_slice(&TYPE_EXEC.to_le_bytes());
    octets[18..20].copy_from_slice(&MACHINE_X86_64.to_le_bytes());
    octets[32..40].copy_from_slice(&64u64.to_le_bytes());
    octets[54..56].copy_from_slice(&56u16.to_le_bytes());
    let mut headers = segments.to_vec();
    let notes_len = notes.len() as u64;
    headers.push(Header { kind: SEGMENT_NOTE, offset: 0x1000, addr: 0, file_len: notes_len, memory_len: notes_len });
    octets[56..58].copy_from_slice(&(headers.len() as u16).to_le_bytes());
    for (i, h) in headers.iter().enumerate() {
        let at = 64 + i * 56;
        octets[at..at + 4].copy_from_slice(&h.kind.to_le_bytes());
        for (field, value) in [(8, h.offset), (24, h.addr), (32, h.file_len), (40, h.memory_len)] {
            octets[at + field..at + field + 8].copy_from_slice(&value.to_le_bytes());
        }
    }
    octets[0x1000..0x1000 + notes.len()].copy_from_slice(notes);
    Fake { octets, ..Fake::default() }
}

const MEMORY_END: u64 = 64 << 20;

fn two_segments() -> [Header; 2] {
    [segment(0x2000, 0x100_0000, 0x1000, 0x1000), segment(0x3000, 0x120_0000, 0x800, 0x4_0000)]
}

fn failure(file: &Fake) -> ElfError {
    let error = load(file, MEMORY_END).expect_err("a bad kernel was loaded");
    assert!(file.loaded.borrow().is_empty(), "a bad kernel was loaded in part");
    assert!(!error.to_string().is_empty());
    error
}

#[test]
fn a_good_kernel_is_loaded_by_segments_and_enters_where_its_note_says() {
    let file = kernel(&two_segments(), &entry_note(0x100_0040));
    let loaded = load(&file, MEMORY_END).unwrap();
    assert_eq!(loaded, LoadedKernel { entry: 0x100_0040, end: 0x124_0000 });
    assert_eq!(*file.loaded.borrow(), [(0x2000, 0x100_0000, 0x1000), (0x3000, 0x120_0000, 0x800)]);
}

#[test]
fn a_four_octet_entry_note_is_as_good_as_an_eight_octet_one() {
    let file = kernel(&two_segments(), &note(b"Xen\0", NOTE_PHYS32_ENTRY, &0x100_0040u32.to_le_bytes()));
    assert_eq!(load(&file, MEMORY_END).unwrap().entry, 0x100_0040);
}

#[test]
fn files_that_are_no_kernel_are_refused() {
    for (at, octet) in [(0, 0), (4, 1), (5, 2), (6, 0), (16, 1), (18, 3), (54, 32)] {
        let mut file = kernel(&two_segments(), &entry_note(0x100_0040));
        file.octets[at] = octet;
        assert!(matches!(failure(&file), ElfError::NotAKernel(_)), "octet {at}");
    }
    assert!(matches!(failure(&Fake::default()), ElfError::Truncated { what: "file header", .. }));
}

#[test]
fn a_kernel_cut_anywhere_before_its_last_segment_ends_is_refused() {
    let whole = kernel(&two_segments(), &entry_note(0x100_0040));
    for len in (0..0x3800).step_by(7) {
        let file = Fake { octets: whole.octets[..len].to_vec(), ..Fake::default() };
        failure(&file);
    }
}

#[test]
fn program_headers_beyond_the_file_or_the_limit_are_refused() {
    let mut file = kernel(&two_segments(), &entry_note(0x100_0040));
    file.octets[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(matches!(failure(&file), ElfError::Truncated { what: "program headers", .. }));
    let mut file = kernel(&two_segments(), &entry_note(0x100_0040));
    file.octets[56..58].copy_from_slice(&65u16.to_le_bytes());
    assert!(matches!(failure(&file), ElfError::TooMany { count: 65, .. }));
}

#[test]
fn segments_outside_of_the_file_or_of_memory_are_refused() {
    let with = |bad: Header| kernel(&[two_segments()[0], bad], &entry_note(0x100_0040));
    assert!(matches!(failure(&with(segment(0x7fff, 0x200_0000, 2, 2))), ElfError::Truncated { .. }));
    assert!(matches!(failure(&with(segment(u64::MAX, 0x200_0000, 2, 2))), ElfError::Truncated { .. }));
    assert!(matches!(failure(&with(segment(0x2000, 0x200_0000, 2, 1))), ElfError::BadSegment { .. }));
    assert!(matches!(failure(&with(segment(0x2000, u64::MAX, 2, 2))), ElfError::BadSegment { .. }));
    assert!(matches!(failure(&with(segment(0x2000, 0x1000, 2, 2))), ElfError::OutOfMemory { .. }));
    assert!(matches!(failure(&with(segment(0x2000, MEMORY_END - 1, 2, 2))), ElfError::OutOfMemory { .. }));
    assert!(matches!(failure(&with(segment(0x2000, 0x200_0000, 2, MEMORY_END))), ElfError::OutOfMemory { .. }));
    assert!(matches!(failure(&with(segment(0x2000, 0x100_0fff, 2, 2))), ElfError::Overlap { one: 0, other: 1 }));
    assert!(load(&with(segment(u64::MAX, u64::MAX, 0, 0)), MEMORY_END).is_ok(), "an empty segment is nothing");
}

#[test]
fn an_entry_that_is_missing_damaged_or_outside_is_refused() {
    let with = |notes: &[u8]| kernel(&two_segments(), notes);
    assert!(matches!(failure(&with(&[])), ElfError::NoEntry(_)));
    assert!(matches!(failure(&with(&note(b"Xen\0", 17, &[0; 8]))), ElfError::NoEntry(_)));
    assert!(matches!(failure(&with(&note(b"GNU\0", NOTE_PHYS32_ENTRY, &[0; 8]))), ElfError::NoEntry(_)));
    assert!(matches!(failure(&with(&note(b"Xen\0", NOTE_PHYS32_ENTRY, &[0; 3]))), ElfError::NoEntry(_)));
    assert!(matches!(failure(&with(&note(b"Xen\0", NOTE_PHYS32_ENTRY, &[255; 8]))), ElfError::NoEntry(_)));
    assert!(matches!(failure(&with(&entry_note(0x100_1000))), ElfError::EntryOutside(_)));
    // Beyond the part that is in the file: zeroes are no code.
    assert!(matches!(failure(&with(&entry_note(0x120_0800))), ElfError::EntryOutside(_)));
    let mut huge = entry_note(0x100_0040);
    huge[0..4].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(failure(&with(&huge)), ElfError::NoEntry(_)));
}

#[test]
fn a_huge_note_segment_is_refused_before_it_is_read() {
    let mut file = kernel(&two_segments(), &entry_note(0x100_0040));
    let at = 64 + 2 * 56 + 32;
    file.octets[at..at + 8].copy_from_slice(&(u64::MAX / 2).to_le_bytes());
    assert!(matches!(failure(&file), ElfError::TooMany { .. }));
}

/// A small repeatable generator (xorshift64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[test]
fn damage_anywhere_in_the_headers_never_panics_or_loads_outside() {
    let whole = kernel(&two_segments(), &entry_note(0x100_0040)).octets;
    let mut random = Random(1);
    for _ in 0..20_000 {
        let mut octets = whole.clone();
        for _ in 0..1 + random.next() % 6 {
            // Half of the changes in the program headers, the rest anywhere up to the notes' end.
            let at = if random.next().is_multiple_of(2) { 64 + random.next() % 168 } else { random.next() % 0x1060 };
            octets[at as usize] = [random.next() as u8, 0, 0xff][(random.next() % 3) as usize];
        }
        crate::fuzz::elf(&octets);
    }
}

#[test]
fn any_octets_never_panic() {
    let mut random = Random(2);
    for len in 0..2000 {
        let mut octets: Vec<u8> = (0..len % 500).map(|_| random.next() as u8).collect();
        crate::fuzz::elf(&octets);
        octets.splice(..0, *b"\x7fELF\x02\x01\x01");
        crate::fuzz::elf(&octets);
    }
}
