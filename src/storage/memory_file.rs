//! Memory files of snapshots: a guest's RAM, its regions one after the other, octet by octet.
//!
//! A flat file is the memory: holes are zeroes. A diff has data where the memory differs from that of the snapshot below
//! (pages of zeroes among it are written), and holes where it does not. `flatten` makes a flat file of a diff, in
//! place: what is copied is what a reader of both would have seen, so a crash at any octet of it changes nothing.

use std::fmt;
use std::fs::File;
use std::io;

use super::space::{copy, data_extents};
use super::verity::{self, Digest, SealError};

/// Memory comes in units of this many octets.
pub const PAGE: u64 = 4096;

/// Why a memory file cannot be used.
#[derive(Debug)]
pub enum MemoryFileError {
    /// It is not as long as the guest's memory.
    Length {
        /// As found, in octets.
        found: u64,
        /// The guest's memory, in octets.
        expected: u64,
    },
    /// Memory of a length that cannot be.
    NoMemory {
        /// In octets.
        len: u64,
    },
    /// It is not the file that was sealed.
    Seal(SealError),
    /// The host could not do it.
    Io {
        /// What was being done.
        doing: &'static str,
        /// The host's reason.
        cause: io::Error,
    },
}

impl fmt::Display for MemoryFileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length { found, expected } => {
                write!(f, "the memory file has {found} octets, the guest's memory {expected}")
            }
            Self::NoMemory { len } => write!(f, "a memory of {len} octets: must be a multiple of {PAGE}, and not 0"),
            Self::Seal(cause) => write!(f, "the memory file: {cause}"),
            Self::Io { doing, cause } => write!(f, "{doing}: {cause}"),
        }
    }
}

impl std::error::Error for MemoryFileError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { cause, .. } => Some(cause),
            Self::Seal(cause) => Some(cause),
            _ => None,
        }
    }
}

fn while_doing(doing: &'static str) -> impl FnOnce(io::Error) -> MemoryFileError {
    move |cause| MemoryFileError::Io { doing, cause }
}

/// Makes `file`, whatever it held, a memory of `len` octets without a page.
pub fn create(file: &File, len: u64) -> Result<(), MemoryFileError> {
    check_len(len)?;
    file.set_len(0).map_err(while_doing("emptying the memory file"))?;
    file.set_len(len).map_err(while_doing("sizing the memory file"))
}

/// Whether a file can be the memory of `len` octets and, where `seal` is given, is the one that was sealed. To be asked
/// whenever one is opened: a mapping of a file that is too short ends in SIGBUS.
pub fn check(file: &File, len: u64, seal: Option<&Digest>) -> Result<(), MemoryFileError> {
    check_len(len)?;
    let found = file.metadata().map_err(while_doing("measuring the memory file"))?.len();
    if found != len {
        return Err(MemoryFileError::Length { found, expected: len });
    }
    seal.map_or(Ok(()), |digest| verity::check(file, digest).map_err(MemoryFileError::Seal))
}

fn check_len(len: u64) -> Result<(), MemoryFileError> {
    if len == 0 || !len.is_multiple_of(PAGE) || i64::try_from(len).is_err() {
        return Err(MemoryFileError::NoMemory { len });
    }
    Ok(())
}

/// Fills each hole of `diff` (readable and writable, not sealed) with the data of `below` (readable), both of `len` octets,
/// and syncs. Where `below` is a diff itself, what is left are holes of both, and `diff` is one over what is below that.
///
/// It may be interrupted anywhere and done again. Blocks for as long as the copying takes.
pub fn flatten(diff: &File, below: &File, len: u64) -> Result<(), MemoryFileError> {
    check(diff, len, None)?;
    check(below, len, None)?;
    let mut hole = 0;
    // Extents are looked for while holes before them are filled: those are behind, and found no more.
    for extent in data_extents(diff, 0..len) {
        let extent = extent.map_err(while_doing("looking for pages in the diff"))?;
        fill(diff, below, hole..extent.start)?;
        hole = extent.end;
    }
    fill(diff, below, hole..len)?;
    diff.sync_all().map_err(while_doing("syncing the memory file"))
}

fn fill(diff: &File, below: &File, hole: std::ops::Range<u64>) -> Result<(), MemoryFileError> {
    for extent in data_extents(below, hole) {
        let extent = extent.map_err(while_doing("looking for pages below the diff"))?;
        let len = extent.end - extent.start;
        copy(below, extent.start, diff, extent.start, len).map_err(while_doing("copying pages into the diff"))?;
    }
    Ok(())
}

/// Room that a file takes on the disk, in octets.
pub fn taken(file: &File) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(file.metadata()?.blocks() * 512)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::devices::driver::Seed;
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::os::unix::fs::FileExt;

    const PAGES: u64 = 300;
    const LEN: u64 = PAGES * PAGE;

    fn memory() -> File {
        let file = File::from(memfd_create(c"memory-test", MFdFlags::MFD_CLOEXEC).unwrap());
        create(&file, LEN).unwrap();
        file
    }

    fn content(file: &File) -> Vec<u8> {
        let mut octets = vec![0; LEN as usize];
        file.read_exact_at(&mut octets, 0).unwrap();
        octets
    }

    /// Writes random pages, zeroes among them, into a file and the model of what is read through it.
    fn change(random: &mut Seed, file: &File, model: &mut [u8]) {
        for _ in 0..random.below(60) {
            let page = random.below(PAGES);
            let octet = random.below(3) as u8;
            file.write_all_at(&[octet; PAGE as usize], page * PAGE).unwrap();
            model[(page * PAGE) as usize..((page + 1) * PAGE) as usize].fill(octet);
        }
    }

    #[test]
    fn a_chain_of_diffs_is_flattened_in_any_order() {
        for seed in 0..40 {
            let mut random = Seed(seed);
            let mut model = vec![0; LEN as usize];
            let files: Vec<File> = (0..4).map(|_| memory()).collect();
            let expected: Vec<Vec<u8>> = files
                .iter()
                .map(|file| {
                    change(&mut random, file, &mut model);
                    model.clone()
                })
                .collect();
            let [flat, first, second, third] = &files[..] else { unreachable!() };
            if seed % 2 == 0 {
                for [below, diff] in [[flat, first], [first, second], [second, third]] {
                    flatten(diff, below, LEN).unwrap();
                }
            } else {
                // The newest takes over the ones between, which stay diffs.
                for below in [second, first, flat] {
                    flatten(third, below, LEN).unwrap();
                }
                flatten(second, first, LEN).unwrap();
                flatten(second, flat, LEN).unwrap();
                flatten(first, flat, LEN).unwrap();
            }
            for (file, expected) in files.iter().zip(&expected) {
                assert!(content(file) == *expected, "seed {seed}");
                // And done once more.
                flatten(file, flat, LEN).unwrap();
                assert!(content(file) == *expected, "seed {seed}");
            }
        }
    }

    #[test]
    fn a_flatten_that_was_cut_anywhere_is_done_again() {
        for seed in 0..40 {
            let mut random = Seed(seed);
            let (below, diff) = (memory(), memory());
            let mut model = vec![0; LEN as usize];
            change(&mut random, &below, &mut model);
            let lower = content(&below);
            change(&mut random, &diff, &mut model);
            // What was copied before the cut: any pages that are holes.
            let data: Vec<_> = data_extents(&diff, 0..LEN).map(Result::unwrap).collect();
            for page in 0..PAGES {
                let (at, part) = (page * PAGE, &lower[(page * PAGE) as usize..((page + 1) * PAGE) as usize]);
                if random.below(2) == 0 && !data.iter().any(|extent| extent.contains(&at)) {
                    diff.write_all_at(part, at).unwrap();
                }
            }
            flatten(&diff, &below, LEN).unwrap();
            assert!(content(&diff) == model, "seed {seed}");
        }
    }

    #[test]
    fn a_flat_file_stays_sparse() {
        let (below, diff) = (memory(), memory());
        below.write_all_at(&[1; 3 * PAGE as usize], 7 * PAGE).unwrap();
        diff.write_all_at(&[2; PAGE as usize], 200 * PAGE).unwrap();
        flatten(&diff, &below, LEN).unwrap();
        assert_eq!(taken(&diff).unwrap(), 4 * PAGE);
    }

    #[test]
    fn a_file_of_another_length_is_refused() {
        let file = memory();
        check(&file, LEN, None).unwrap();
        for found in [0, LEN - 1, LEN + 1, LEN + PAGE] {
            file.set_len(found).unwrap();
            assert!(matches!(check(&file, LEN, None), Err(MemoryFileError::Length { expected: LEN, .. })));
            assert!(flatten(&file, &memory(), LEN).is_err());
            assert!(flatten(&memory(), &file, LEN).is_err());
        }
        for len in [0, 1, PAGE + 1, !(PAGE - 1)] {
            assert!(matches!(create(&file, len), Err(MemoryFileError::NoMemory { .. })), "{len}");
            assert!(check(&file, len, None).is_err());
        }
        file.set_len(LEN).unwrap();
        let wanted = [1; 32];
        assert!(matches!(check(&file, LEN, Some(&wanted)), Err(MemoryFileError::Seal(SealError::Exchanged))));
    }
}
