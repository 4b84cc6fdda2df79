//! Scattered guest buffers seen as one run of octets: drivers may cut a request as they like (virtio 1.2
//! §2.7.4), so devices never look at single descriptors.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::fd::AsFd;

use crate::storage::overlay::{Sink, Source};
use crate::vmm::memory::{self, GuestSlice};

/// Checked guest buffers in order. Empty buffers are left out.
#[derive(Debug, Default, Clone)]
pub struct Segments<'m> {
    slices: Vec<GuestSlice<'m>>,
    len: usize,
}

impl<'m> Segments<'m> {
    /// No buffers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Forgets all buffers and keeps the allocation.
    pub fn clear(&mut self) {
        self.slices.clear();
        self.len = 0;
    }

    /// Adds a buffer at the end. Callers bound the sum (a chain is at most 4 GiB).
    pub fn push(&mut self, slice: GuestSlice<'m>) {
        if !slice.is_empty() {
            self.len += slice.len();
            self.slices.push(slice);
        }
    }

    /// Octets in all.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no octets.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The buffers.
    pub fn slices(&self) -> &[GuestSlice<'m>] {
        &self.slices
    }

    /// The pieces that make up `range`, cut to what there is.
    pub fn parts(&self, range: Range<usize>) -> impl Iterator<Item = GuestSlice<'m>> + Clone + '_ {
        let mut before = 0;
        self.slices.iter().filter_map(move |slice| {
            let start = range.start.max(before);
            let end = range.end.min(before + slice.len());
            let part = (start < end).then(|| slice.part(start - before, end - start));
            before += slice.len();
            part
        })
    }

    /// Copies octets out from `offset` on; gives how many there were.
    pub fn copy_to(&self, offset: usize, into: &mut [u8]) -> usize {
        let mut done = 0;
        for part in self.parts(offset..offset.saturating_add(into.len())) {
            done += part.copy_to(&mut into[done..]);
        }
        done
    }

    /// Copies octets in from `offset` on; gives how many there was room for.
    pub fn copy_from(&self, offset: usize, from: &[u8]) -> usize {
        let mut done = 0;
        for part in self.parts(offset..offset.saturating_add(from.len())) {
            done += part.copy_from(&from[done..]);
        }
        done
    }
}

/// A range of guest buffers as the overlay's reader and writer see it.
#[derive(Debug)]
pub struct Window<'a, 'm> {
    segments: &'a Segments<'m>,
    start: usize,
    /// Pieces of the transfer under way; kept for its allocation.
    pieces: Vec<GuestSlice<'m>>,
}

impl<'a, 'm> Window<'a, 'm> {
    /// The octets of `segments` from `start` on.
    pub fn new(segments: &'a Segments<'m>, start: usize) -> Self {
        Self { segments, start, pieces: Vec::new() }
    }

    /// Repeats a vectored transfer until `range` is through. `offset` is the place of `range.start` in the file.
    fn transfer(
        &mut self,
        range: Range<usize>,
        mut offset: u64,
        none: ErrorKind,
        call: impl Fn(&[GuestSlice<'m>], u64) -> io::Result<usize>,
    ) -> io::Result<()> {
        let (mut start, end) = (self.start + range.start, self.start + range.end);
        while start < end {
            self.pieces.clear();
            self.pieces.extend(self.segments.parts(start..end));
            match call(&self.pieces, offset) {
                Ok(0) => return Err(none.into()),
                Ok(n) => {
                    start += n;
                    offset += n as u64;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

impl Sink for Window<'_, '_> {
    fn fill(&mut self, range: Range<usize>, file: &File, offset: u64) -> io::Result<()> {
        self.transfer(range, offset, ErrorKind::UnexpectedEof, |pieces, at| memory::read_at(file.as_fd(), pieces, at))
    }

    fn zero(&mut self, range: Range<usize>) {
        for part in self.segments.parts(self.start + range.start..self.start + range.end) {
            part.zero();
        }
    }
}

impl Source for Window<'_, '_> {
    fn drain(&mut self, range: Range<usize>, file: &File, offset: u64) -> io::Result<()> {
        self.transfer(range, offset, ErrorKind::WriteZero, |pieces, at| memory::write_at(file.as_fd(), pieces, at))
    }
}
