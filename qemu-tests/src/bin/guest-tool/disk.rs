//! Random writes, discards, zeroes and reads of a whole disk, checked against what was written; and the check after a
//! power cut that what was flushed is there.
//!
//! Every block written names its step, so that a block read later tells which write it is from.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use super::{Keys, Outcome, during};

const BLOCK: u64 = 4096;
/// Blocks of one request, at most.
const MOST: u64 = 64;
/// Blocks that are used, at most: 64 MiB.
const BLOCKS: u64 = 16 * 1024;
/// Steps between two flushes.
const FLUSH_EVERY: u64 = 16;
/// <linux/fs.h> BLKDISCARD and BLKZEROOUT: offset and length in octets.
const BLKDISCARD: libc::c_ulong = 0x1277;
const BLKZEROOUT: libc::c_ulong = 0x127f;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Write,
    Discard,
    Zero,
    Read,
}

/// What a step does, known from seed and number alone.
struct Step {
    kind: Kind,
    first: u64,
    count: u64,
}

fn mix(mut n: u64) -> u64 {
    n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

impl Step {
    fn of(seed: u64, number: u64, blocks: u64) -> Self {
        let random = mix(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(number));
        let kind = match random % 16 {
            0..8 => Kind::Write,
            8..10 => Kind::Discard,
            10 => Kind::Zero,
            _ => Kind::Read,
        };
        let first = (random >> 8) % blocks;
        let count = 1 + (random >> 40) % MOST.min(blocks - first);
        Self { kind, first, count }
    }
}

/// A block's content after a write of step `number`; step 0 is zeroes.
fn content(seed: u64, number: u64, block: u64, into: &mut [u8]) {
    if number == 0 {
        return into.fill(0);
    }
    for (n, word) in (0..).zip(into.chunks_exact_mut(8)) {
        let value = match n {
            0 => number,
            n => mix(seed ^ number << 32 ^ block << 8 ^ n),
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// A buffer for O_DIRECT: it begins at a multiple of a block.
struct Buffer {
    octets: Vec<u8>,
    start: usize,
}

impl Buffer {
    fn new() -> Self {
        let octets = vec![0; ((MOST + 1) * BLOCK) as usize];
        let start = octets.as_ptr().align_offset(BLOCK as usize);
        Self { octets, start }
    }

    fn blocks(&mut self, count: u64) -> &mut [u8] {
        &mut self.octets[self.start..self.start + (count * BLOCK) as usize]
    }
}

fn open(keys: &Keys) -> Result<(File, u64), String> {
    let device: String = keys.get("device", None)?;
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(&device);
    let mut file = file.map_err(during(&device))?;
    let bytes = file.seek(SeekFrom::End(0)).map_err(during("size"))?;
    match (bytes / BLOCK).min(BLOCKS) {
        0 => Err(format!("{device} has no block")),
        blocks => Ok((file, blocks)),
    }
}

fn range_ioctl(file: &File, request: libc::c_ulong, step: &Step) -> Result<(), String> {
    let range = [step.first * BLOCK, step.count * BLOCK];
    // SAFETY: the descriptor is open, and the kernel reads two u64 from a live array.
    match unsafe { libc::ioctl(file.as_raw_fd(), request as _, range.as_ptr()) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error().to_string()),
    }
}

/// `disk device=PATH seed=N steps=N`: an empty disk is filled at random; `flushed=STEP` after each flush.
pub fn run(keys: &Keys) -> Outcome {
    let (file, blocks) = open(keys)?;
    let (seed, steps): (u64, u64) = (keys.get("seed", Some(1))?, keys.get("steps", None)?);
    let mut model = vec![0u64; blocks as usize];
    let mut buffer = Buffer::new();
    let mut expected = vec![0; BLOCK as usize];
    for number in 1..=steps {
        let step = Step::of(seed, number, blocks);
        let range = step.first as usize..(step.first + step.count) as usize;
        let doing = |what: &'static str| move |e: std::io::Error| format!("step {number}: {what}: {e}");
        match step.kind {
            Kind::Write => {
                let octets = buffer.blocks(step.count);
                for (block, octets) in (step.first..).zip(octets.chunks_exact_mut(BLOCK as usize)) {
                    content(seed, number, block, octets);
                }
                file.write_all_at(octets, step.first * BLOCK).map_err(doing("write"))?;
                model[range].fill(number);
            }
            Kind::Discard | Kind::Zero => {
                let request = if step.kind == Kind::Zero { BLKZEROOUT } else { BLKDISCARD };
                range_ioctl(&file, request, &step).map_err(during(&format!("step {number}: discard or zeroes")))?;
                model[range].fill(0);
            }
            Kind::Read => {
                let octets = buffer.blocks(step.count);
                file.read_exact_at(octets, step.first * BLOCK).map_err(doing("read"))?;
                for (block, octets) in (step.first..).zip(octets.chunks_exact(BLOCK as usize)) {
                    content(seed, model[block as usize], block, &mut expected);
                    if octets != expected {
                        return Err(format!(
                            "step {number}: block {block} is not what step {} wrote",
                            model[block as usize]
                        ));
                    }
                }
            }
        }
        if number % FLUSH_EVERY == 0 || number == steps {
            file.sync_data().map_err(doing("flush"))?;
            println!("flushed={number}");
            std::io::stdout().flush().map_err(doing("standard output"))?;
        }
    }
    check(&file, blocks, seed, steps, steps)
}

/// `disk-check device=PATH seed=N flushed=STEP steps=N`: each block is what it was when STEP was flushed, or from a
/// later step.
pub fn check_after_cut(keys: &Keys) -> Outcome {
    let (file, blocks) = open(keys)?;
    check(&file, blocks, keys.get("seed", Some(1))?, keys.get("flushed", None)?, keys.get("steps", None)?)
}

fn check(file: &File, blocks: u64, seed: u64, flushed: u64, steps: u64) -> Outcome {
    // For each block, what was on it at the flush, and what may have come on it since.
    let mut kept = vec![0u64; blocks as usize];
    let mut newer = vec![Vec::new(); blocks as usize];
    for number in 1..=steps {
        let step = Step::of(seed, number, blocks);
        let version = match step.kind {
            Kind::Read => continue,
            Kind::Write => number,
            Kind::Discard | Kind::Zero => 0,
        };
        for block in step.first..step.first + step.count {
            if number <= flushed {
                kept[block as usize] = version;
            } else {
                newer[block as usize].push(version);
            }
        }
    }
    let mut buffer = Buffer::new();
    let mut expected = vec![0; BLOCK as usize];
    let mut later = 0;
    for (block, (kept, newer)) in (0..).zip(kept.into_iter().zip(newer)) {
        let octets = buffer.blocks(1);
        file.read_exact_at(octets, block * BLOCK).map_err(during("read"))?;
        let mut fits = |number| {
            content(seed, number, block, &mut expected);
            octets == expected
        };
        if !fits(kept) {
            if !newer.into_iter().any(&mut fits) {
                return Err(format!("block {block} is neither what step {kept} left nor from a later step"));
            }
            later += 1;
        }
    }
    println!("blocks={blocks} later={later}");
    Ok(())
}
