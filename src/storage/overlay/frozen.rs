//! Frozen layers: what lies between the layer that a disk writes to and the base.
//!
//! Frozen layers never change, so whose a block is stands in one list of runs, made when a layer is added. It takes five
//! octets a run, however many layers there are, and a lookup is one binary search. Runs are as long as they can be.

use std::fs::File;
use std::io;

use super::MAX_LAYERS;
use super::bitmap::Bitmap;
use super::format::{Geometry, OverlayError, read, while_doing};

/// Owner of the blocks that no frozen layer has.
const BASE: u8 = 0;
// Owners are octets.
const _: () = assert!(MAX_LAYERS < 255);

/// Whose blocks are, run by run. Blocks before the first run are the base's.
#[derive(Default)]
struct Owners {
    /// First block of each run, rising. A disk has 2^32 blocks at most.
    starts: Vec<u32>,
    /// Whose it is: `BASE`, or n for `layers[n - 1]`. Neighbours differ.
    owners: Vec<u8>,
}

impl Owners {
    /// The owner of `block`, and the first block after it of another one, `end` at most.
    fn run(&self, block: u64, end: u64) -> (u8, u64) {
        let next = self.starts.partition_point(|&start| u64::from(start) <= block);
        let owner = next.checked_sub(1).map_or(BASE, |at| self.owners[at]);
        (owner, self.starts.get(next).map_or(end, |&start| u64::from(start).min(end)))
    }

    fn put(&mut self, start: u64, owner: u8) {
        if self.owners.last().copied().unwrap_or(BASE) != owner {
            self.starts.push(start as u32);
            self.owners.push(owner);
        }
    }

    /// These with the blocks of `bitmap` in the hands of `owner`.
    fn with(&self, bitmap: &Bitmap, blocks: u64, owner: u8) -> Self {
        let mut merged = Self::default();
        let mut block = 0;
        while block < blocks {
            let (in_bitmap, end) = bitmap.run(block, blocks);
            if in_bitmap {
                merged.put(block, owner);
                block = end;
            }
            while block < end {
                let (old, old_end) = self.run(block, end);
                merged.put(block, old);
                block = old_end;
            }
        }
        merged.starts.shrink_to_fit();
        merged.owners.shrink_to_fit();
        merged
    }
}

/// Frozen layers of one geometry.
pub(super) struct Frozen {
    /// Oldest first, so that a new one changes nobody's number.
    layers: Vec<File>,
    owners: Owners,
}

impl Frozen {
    pub fn new() -> Self {
        Self { layers: Vec::new(), owners: Owners::default() }
    }

    /// Opens layers (newest first, readable) that have to agree with `geometry`.
    pub fn open(newest_first: Vec<File>, geometry: &Geometry) -> Result<Self, OverlayError> {
        let mut frozen = Self::new();
        for (index, file) in newest_first.into_iter().enumerate().rev() {
            let blame = |cause| OverlayError::Layer { index, cause: Box::new(cause) };
            let (found, bitmap) = read(&file).map_err(blame)?;
            geometry.agrees(&found).map_err(blame)?;
            frozen.add(file, &bitmap, geometry)?;
        }
        Ok(frozen)
    }

    /// The same of files that stay the caller's; the oldest says what the others have to agree with.
    pub fn share(newest_first: &[&File]) -> Result<(Geometry, Self), OverlayError> {
        let Some(oldest) = newest_first.last() else { return Err(OverlayError::NotAnOverlay) };
        let blame = |cause| OverlayError::Layer { index: newest_first.len() - 1, cause: Box::new(cause) };
        let (geometry, _) = read(oldest).map_err(blame)?;
        let clones: io::Result<Vec<File>> = newest_first.iter().map(|layer| layer.try_clone()).collect();
        let frozen = Self::open(clones.map_err(while_doing("sharing a layer"))?, &geometry)?;
        Ok((geometry, frozen))
    }

    /// Puts a layer on top of the others.
    pub fn add(&mut self, file: File, bitmap: &Bitmap, geometry: &Geometry) -> Result<(), OverlayError> {
        self.check_room()?;
        self.layers.push(file);
        self.owners = self.owners.with(bitmap, geometry.blocks(), self.layers.len() as u8);
        Ok(())
    }

    /// Whether one more layer can be added.
    pub fn check_room(&self) -> Result<(), OverlayError> {
        if self.layers.len() < MAX_LAYERS { Ok(()) } else { Err(OverlayError::TooManyLayers) }
    }

    pub fn count(&self) -> usize {
        self.layers.len()
    }

    /// The file of the layer that has `block`, `None` where that is the base; and the first block after it of
    /// another one, `end` at most.
    pub fn run(&self, block: u64, end: u64) -> (Option<&File>, u64) {
        if self.layers.is_empty() {
            return (None, end);
        }
        let (owner, end) = self.owners.run(block, end);
        (usize::from(owner).checked_sub(1).map(|at| &self.layers[at]), end)
    }
}
