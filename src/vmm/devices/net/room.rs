//! Receive buffers of the guest, taken from the queue ahead of the frames that fill them.

use super::features::HEADER;
use crate::vmm::devices::queue::{Chain, Queue, QueueError};
use crate::vmm::memory::{GuestMemory, GuestSlice};

/// Slices that are taken ahead at most; one more chain may add `MAX_CHAIN` of them, which is less than a call takes.
const MOST_SLICES: usize = 512;
/// Where the number of buffers stands in a frame's header.
const NUM_BUFFERS: usize = 10;

/// One chain of the queue.
#[derive(Debug, Clone, Copy)]
struct Buffer {
    head: u16,
    len: usize,
    slices: usize,
}

/// Buffers that are taken and not filled yet, in the queue's order.
#[derive(Debug, Default)]
pub struct Room<'m> {
    chain: Chain<'m>,
    /// Those from `first` on are left.
    buffers: Vec<Buffer>,
    first: usize,
    /// Of all buffers; those from `first_slice` on are left.
    slices: Vec<GuestSlice<'m>>,
    first_slice: usize,
    len: usize,
}

impl<'m> Room<'m> {
    /// Takes buffers until there is room for `wanted` octets or no buffer is left; one of them where frames cannot lie in
    /// several.
    pub fn gather(
        &mut self,
        queue: &mut Queue,
        memory: &'m GuestMemory,
        wanted: usize,
        merge: bool,
    ) -> Result<(), QueueError> {
        while self.is_empty() || (merge && self.len < wanted && self.slices().len() < MOST_SLICES) {
            if !queue.pop(memory, &mut self.chain)? {
                break;
            }
            let writable = &self.chain.writable;
            // Every buffer holds a whole header (virtio 1.2 §5.1.6.3.1). With nothing beside it, no frame goes through.
            if writable.len() <= HEADER {
                return Err(QueueError::TooSmall { len: writable.len(), least: HEADER + 1 });
            }
            let slices = writable.slices();
            self.buffers.push(Buffer { head: self.chain.head, len: writable.len(), slices: slices.len() });
            self.slices.extend_from_slice(slices);
            self.len += writable.len();
        }
        Ok(())
    }

    /// Octets of room.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no buffer.
    pub fn is_empty(&self) -> bool {
        self.first == self.buffers.len()
    }

    fn buffers(&self) -> usize {
        self.buffers.len() - self.first
    }

    /// Whether there will never be more room than this: all of the ring is here, or as many slices as may be.
    pub fn is_all(&self, queue: &Queue) -> bool {
        self.buffers() >= usize::from(queue.size()) || self.slices().len() >= MOST_SLICES
    }

    /// Where the next frame goes.
    pub fn slices(&self) -> &[GuestSlice<'m>] {
        &self.slices[self.first_slice..]
    }

    /// Copies octets in at the start.
    pub fn copy_from(&self, from: &[u8]) {
        write_at(self.slices(), 0, from);
    }

    /// Copies the first octets out.
    pub fn copy_to(&self, into: &mut [u8]) {
        let mut done = 0;
        for slice in self.slices() {
            done += slice.copy_to(&mut into[done..]);
        }
    }

    /// Gives the guest the buffers that a frame of `len` octets, header included, was put into: there is room for it.
    pub fn give(&mut self, queue: &mut Queue, memory: &GuestMemory, len: usize) -> Result<(), QueueError> {
        let (mut left, mut count) = (len, 0u16);
        for buffer in &self.buffers[self.first..] {
            left -= left.min(buffer.len);
            count += 1;
            if left == 0 {
                break;
            }
        }
        // The host's kernel leaves this field to the device.
        write_at(self.slices(), NUM_BUFFERS, &count.to_le_bytes());
        let mut left = len;
        for buffer in self.buffers.iter().skip(self.first).take(usize::from(count)) {
            let filled = left.min(buffer.len);
            left -= filled;
            queue.put_used(memory, buffer.head, filled as u32)?;
            self.first += 1;
            self.first_slice += buffer.slices;
            self.len -= buffer.len;
        }
        // The driver has to find all buffers of a frame when it finds the first.
        queue.announce_used(memory)
    }

    /// Gives the buffers that are left back to the queue.
    pub fn put_back(&mut self, queue: &mut Queue) {
        queue.undo_pop(self.buffers() as u16);
        self.buffers.clear();
        self.slices.clear();
        (self.first, self.first_slice, self.len) = (0, 0, 0);
    }
}

/// Copies octets into a run of slices.
fn write_at(slices: &[GuestSlice<'_>], mut offset: usize, mut from: &[u8]) {
    for slice in slices {
        if from.is_empty() {
            return;
        }
        let done = slice.part(offset, from.len()).copy_from(from);
        from = &from[done..];
        offset = offset.saturating_sub(slice.len());
    }
}
