//! Memory files of snapshots: a guest's RAM, its regions one after the other, octet by octet.
//!
//! A flat file is the memory: holes are zeroes. A diff has data where the memory differs from that of the snapshot below
//! (pages of zeroes among it are written), and holes where it does not. `flatten` makes a flat file of a diff, in
//! place: what is copied is what a reader of both would have seen, so a crash at any octet of it changes nothing.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;

use super::space::{self, copy, data_extents, punch};
use super::verity::{self, Digest, SealError};

/// Memory comes in units of this many octets.
pub const PAGE: u64 = 4096;
/// What is read at once, in octets.
const CHUNK: usize = 256 << 10;

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

impl MemoryFileError {
    /// As an error of the host, which it may be.
    pub fn into_io(self) -> io::Error {
        match self {
            Self::Io { cause, .. } => cause,
            other => io::Error::other(other),
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

/// Whether the file system keeps holes of single pages apart from data, as a diff needs it; there are some with coarser
/// blocks. `file` is as `create` left it for that `len`, also afterwards.
pub fn keeps_holes(file: &File, len: u64) -> Result<bool, MemoryFileError> {
    use std::os::unix::fs::FileExt;
    if len < 4 * PAGE {
        return Ok(false);
    }
    let page = len / PAGE / 2 * PAGE;
    file.write_all_at(&[0; PAGE as usize], page).map_err(while_doing("writing a page"))?;
    let found: io::Result<Vec<_>> = data_extents(file, 0..len).collect();
    create(file, len)?;
    let found = found.map_err(while_doing("looking for that page"))?;
    Ok(found.len() == 1 && found[0] == (page..page + PAGE))
}

/// Whether a diff has as much data as was written to it, `written` octets: no more, no less.
pub fn check_difference(file: &File, len: u64, written: Option<u64>) -> io::Result<()> {
    let found = data_extents(file, 0..len).map(|extent| extent.map(|extent| extent.end - extent.start));
    let found = found.sum::<io::Result<u64>>()?;
    if written == Some(found) {
        return Ok(());
    }
    Err(io::Error::other(format!("it has {found} octets of data where {written:?} differ")))
}

/// Puts the data of `diff` (readable) in its place in `onto`, the flat file that it is over (readable and writable, not sealed),
/// both of `len` octets, and syncs. Nobody may have `onto` mapped. Pages of zeroes become holes.
///
/// It may be interrupted anywhere and done again: until then `onto` is nothing without `diff`. Blocks.
pub fn apply(diff: &File, onto: &File, len: u64) -> Result<(), MemoryFileError> {
    use std::os::unix::fs::FileExt;
    check(diff, len, None)?;
    check(onto, len, None)?;
    let mut buffer = vec![0; CHUNK];
    for extent in data_extents(diff, 0..len) {
        let Range { mut start, end } = extent.map_err(while_doing("looking for pages in the diff"))?;
        while start < end {
            let part = usize::try_from(end - start).map_or(CHUNK, |left| left.min(CHUNK));
            let octets = &mut buffer[..part];
            diff.read_exact_at(octets, start).map_err(while_doing("reading the diff"))?;
            let mut at = 0;
            while at < part {
                let zeroes = is_zero(page_of(octets, at));
                let begin = at;
                while at < part && is_zero(page_of(octets, at)) == zeroes {
                    at += page_of(octets, at).len();
                }
                let (to, run) = (start + begin as u64, &octets[begin..at]);
                let put = match zeroes {
                    true => space::zero(onto, to, run.len() as u64, true),
                    false => onto.write_all_at(run, to),
                };
                put.map_err(while_doing("copying pages of the diff"))?;
            }
            start += part as u64;
        }
    }
    onto.sync_all().map_err(while_doing("syncing the memory file"))
}

fn page_of(octets: &[u8], at: usize) -> &[u8] {
    &octets[at..(at + PAGE as usize).min(octets.len())]
}

fn is_zero(page: &[u8]) -> bool {
    page.iter().all(|octet| *octet == 0)
}

/// Fills each hole of `diff` (readable and writable, not sealed) with the data of `below` (readable), both of `len` octets,
/// and syncs. Where `below` is a diff itself, what is left are holes of both, and `diff` is one over what is below that.
///
/// It may be interrupted anywhere and done again. An error gives the room back that was taken for what was copied. Blocks
/// for as long as the copying takes.
pub fn flatten(diff: &File, below: &File, len: u64) -> Result<(), MemoryFileError> {
    check(diff, len, None)?;
    check(below, len, None)?;
    let mut filled = Vec::new();
    let done = fill_all(diff, below, len, &mut filled)
        .and_then(|()| diff.sync_all().map_err(while_doing("syncing the memory file")));
    if done.is_err() {
        // What was a hole is one again, with the same meaning. Best effort: what stays is right, too.
        filled.into_iter().for_each(|extent: Range<u64>| drop(punch(diff, extent.start, extent.end - extent.start)));
    }
    done
}

fn fill_all(diff: &File, below: &File, len: u64, filled: &mut Vec<Range<u64>>) -> Result<(), MemoryFileError> {
    let mut hole = 0;
    // Extents are looked for while holes before them are filled: those are behind, and found no more.
    for extent in data_extents(diff, 0..len) {
        let extent = extent.map_err(while_doing("looking for pages in the diff"))?;
        fill(diff, below, hole..extent.start, filled)?;
        hole = extent.end;
    }
    fill(diff, below, hole..len, filled)
}

/// `filled` gets what is written, before it is.
fn fill(diff: &File, below: &File, hole: Range<u64>, filled: &mut Vec<Range<u64>>) -> Result<(), MemoryFileError> {
    for extent in data_extents(below, hole) {
        let extent = extent.map_err(while_doing("looking for pages below the diff"))?;
        filled.push(extent.clone());
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
    fn a_file_that_can_have_a_diff_is_as_it_was_after_the_look() {
        let file = memory();
        assert!(keeps_holes(&file, LEN).unwrap());
        assert_eq!(file.metadata().unwrap().len(), LEN);
        check_difference(&file, LEN, Some(0)).unwrap();
        file.write_all_at(&[0; 2 * PAGE as usize], 7 * PAGE).unwrap();
        check_difference(&file, LEN, Some(2 * PAGE)).expect("zeroes are data");
        assert!(check_difference(&file, LEN, Some(PAGE)).is_err() && check_difference(&file, LEN, None).is_err());
        assert!(!keeps_holes(&memory(), 3 * PAGE).unwrap());
    }

    #[test]
    fn a_diff_that_is_put_into_what_is_below_it_is_the_same_memory() {
        for seed in 0..40 {
            let mut random = Seed(seed);
            let (below, diff) = (memory(), memory());
            let mut model = vec![0; LEN as usize];
            change(&mut random, &below, &mut model);
            change(&mut random, &diff, &mut model);
            // Cut after some of it, and done again.
            let extents: Vec<_> = data_extents(&diff, 0..LEN).map(Result::unwrap).collect();
            for extent in extents.into_iter().filter(|_| random.below(2) == 0) {
                copy(&diff, extent.start, &below, extent.start, (extent.end - extent.start) / 2).unwrap();
            }
            apply(&diff, &below, LEN).unwrap();
            assert!(content(&below) == model, "seed {seed}");
            let zeroes = model.chunks(PAGE as usize).filter(|page| is_zero(page)).count() as u64;
            assert!(taken(&below).unwrap() <= (PAGES - zeroes + 60) * PAGE, "what the diff gives up is a hole");
        }
        assert!(apply(&memory(), &File::open("/proc/self/exe").unwrap(), LEN).is_err());
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
