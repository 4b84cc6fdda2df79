//! The device side of a split virtqueue (virtio 1.2 §2.7), with indirect descriptors and event index.
//!
//! Everything in a ring comes from the guest and may change while it is read. Each number is read once,
//! checked, and used from the copy; a chain has at most `MAX_CHAIN` descriptors, so loops end; each buffer
//! is checked against RAM before it becomes a `GuestSlice`. A violation is a `QueueError`, which makes the
//! transport stop the device until the driver resets it.

use std::fmt;
use std::sync::atomic::{Ordering, fence};

use super::segments::Segments;
use crate::vmm::memory::{GuestMemory, MemoryError};

/// Ring entries that devices offer (`QueueNumMax`).
pub const MAX_SIZE: u16 = 256;
/// Descriptors in one chain. §2.7.5.3.1 forbids chains longer than the ring; Linux goes by the device's own
/// limits (`seg_max`) when it uses indirect tables, so a ring that the driver made smaller does not count.
pub const MAX_CHAIN: usize = MAX_SIZE as usize;

const DESCRIPTOR: u64 = 16;
const FLAG_NEXT: u16 = 1;
const FLAG_WRITE: u16 = 2;
const FLAG_INDIRECT: u16 = 4;
const AVAIL_NO_INTERRUPT: u16 = 1;

/// What a driver got wrong in a ring.
#[derive(Debug)]
pub enum QueueError {
    /// Ring size is no power of two from 1 to the device's maximum.
    Size {
        /// As the driver wrote it.
        size: u32,
        /// The device's limit.
        max: u16,
    },
    /// A part of the ring is outside of RAM or misaligned.
    Memory(MemoryError),
    /// The available index went forward by more than the ring holds.
    AvailableJump {
        /// Entries it claims to have added.
        by: u16,
        /// Ring size.
        size: u16,
    },
    /// A descriptor index is outside of its table.
    Index {
        /// As the driver wrote it.
        index: u32,
        /// Entries in the table.
        size: u32,
    },
    /// The chain goes on after `MAX_CHAIN` descriptors: it is too long or a loop.
    TooLong,
    /// An indirect table inside an indirect table, after other descriptors, or without the feature.
    Indirect,
    /// An indirect table whose length is zero or no multiple of a descriptor.
    IndirectLength {
        /// As the driver wrote it.
        len: u32,
    },
    /// A buffer for the device to read comes after one to write (§2.7.4.2).
    Order,
    /// The chain's buffers hold more than 4 GiB - 1 in all (§2.7.5).
    TooBig,
    /// The chain has less room than the device needs for anything.
    TooSmall {
        /// As found, in octets.
        len: usize,
        /// Least room, in octets.
        least: usize,
    },
}

impl fmt::Display for QueueError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Size { size, max } => write!(f, "ring of {size} entries: must be a power of two up to {max}"),
            Self::Memory(cause) => write!(f, "ring or buffer: {cause}"),
            Self::AvailableJump { by, size } => write!(f, "{by} entries were added to a ring of {size}"),
            Self::Index { index, size } => write!(f, "descriptor {index} of a table of {size}"),
            Self::TooLong => write!(f, "chain of more than {MAX_CHAIN} descriptors"),
            Self::Indirect => f.write_str("indirect table where none may be"),
            Self::IndirectLength { len } => write!(f, "indirect table of {len} octets"),
            Self::Order => f.write_str("readable buffer after a writable one"),
            Self::TooBig => f.write_str("chain of more than 4 GiB"),
            Self::TooSmall { len, least } => write!(f, "chain with room for {len} octets, needs {least}"),
        }
    }
}

impl std::error::Error for QueueError {}

impl From<MemoryError> for QueueError {
    fn from(cause: MemoryError) -> Self {
        Self::Memory(cause)
    }
}

/// Where the driver put a ring, as it wrote it into the transport's registers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Layout {
    /// Ring entries.
    pub size: u32,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the driver area (available ring).
    pub driver: u64,
    /// Guest-physical address of the device area (used ring).
    pub device: u64,
}

impl Layout {
    /// Checks size, alignment (§2.7) and that all three parts are in RAM.
    pub fn check(&self, memory: &GuestMemory, max: u16) -> Result<(), QueueError> {
        if !self.size.is_power_of_two() || self.size > u32::from(max) {
            return Err(QueueError::Size { size: self.size, max });
        }
        let size = u64::from(self.size);
        for (addr, align, len) in
            [(self.descriptors, 16, DESCRIPTOR * size), (self.driver, 2, 6 + 2 * size), (self.device, 4, 6 + 8 * size)]
        {
            if addr % align != 0 {
                return Err(MemoryError::Unaligned { addr }.into());
            }
            if !memory.contains(addr, len) {
                return Err(MemoryError::OutOfRange { addr, len }.into());
            }
        }
        Ok(())
    }
}

struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn read(memory: &GuestMemory, table: u64, index: u32) -> Result<Self, QueueError> {
        let mut octets = [0u8; DESCRIPTOR as usize];
        let addr = table.checked_add(DESCRIPTOR * u64::from(index));
        memory.read(addr.unwrap_or(u64::MAX), &mut octets)?;
        let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = octets;
        Ok(Self {
            addr: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        })
    }
}

/// One request of the driver: buffers to read from, then buffers to write to. Reused from one `pop` to the
/// next, so that a busy queue allocates nothing.
#[derive(Debug, Default)]
pub struct Chain<'m> {
    /// Index of the first descriptor: what `add_used` gives back.
    pub head: u16,
    /// What the driver filled.
    pub readable: Segments<'m>,
    /// What the driver wants filled.
    pub writable: Segments<'m>,
}

/// A virtqueue in use. A queue that the driver did not set up never has anything.
#[derive(Debug, Default)]
pub struct Queue {
    /// `None` until the driver made the queue ready.
    ring: Option<Ring>,
}

#[derive(Debug)]
struct Ring {
    size: u16,
    descriptors: u64,
    driver: u64,
    device: u64,
    event_index: bool,
    indirect: bool,
    /// Next entry of the available ring to take.
    next_avail: u16,
    /// The available index as last read: entries up to here may be taken without reading it again.
    seen_avail: u16,
    /// Next entry of the used ring to fill, and to announce.
    next_used: u16,
    /// Entries filled from there on that are not announced yet.
    unannounced: u16,
    /// The used index at the last decision about an interrupt.
    decided_used: u16,
}

impl Queue {
    /// Takes a ring into use after checking where it is. `max` is the device's limit of entries.
    pub fn new(
        memory: &GuestMemory,
        layout: Layout,
        max: u16,
        event_index: bool,
        indirect: bool,
    ) -> Result<Self, QueueError> {
        layout.check(memory, max.min(MAX_SIZE))?;
        Ok(Self {
            ring: Some(Ring {
                size: layout.size as u16,
                descriptors: layout.descriptors,
                driver: layout.driver,
                device: layout.device,
                event_index,
                indirect,
                next_avail: 0,
                seen_avail: 0,
                next_used: 0,
                unannounced: 0,
                decided_used: 0,
            }),
        })
    }

    /// How far the ring has been served, for `resumed`: next entry to take, next to give back, and the used index at the
    /// last decision about an interrupt. Between two pieces of work nothing else is known of it.
    pub fn progress(&self) -> Option<[u16; 3]> {
        self.ring.as_ref().map(|ring| [ring.next_avail, ring.next_used, ring.decided_used])
    }

    /// The same ring, served so far.
    pub fn resumed(mut self, [next_avail, next_used, decided_used]: [u16; 3]) -> Self {
        if let Some(ring) = &mut self.ring {
            (ring.next_avail, ring.seen_avail) = (next_avail, next_avail);
            (ring.next_used, ring.decided_used) = (next_used, decided_used);
        }
        self
    }

    /// Takes the next chain, if there is one.
    pub fn pop<'m>(&mut self, memory: &'m GuestMemory, chain: &mut Chain<'m>) -> Result<bool, QueueError> {
        match &mut self.ring {
            Some(ring) => ring.pop(memory, chain),
            None => Ok(false),
        }
    }

    /// Puts the last `count` popped chains back, to be popped again. They must not have been used.
    pub fn undo_pop(&mut self, count: u16) {
        if let Some(ring) = &mut self.ring {
            ring.next_avail = ring.next_avail.wrapping_sub(count);
        }
    }

    /// Chains that wait to be popped, as far as was seen at the last look into the ring.
    pub fn waiting(&self) -> u16 {
        self.ring.as_ref().map_or(0, |ring| ring.seen_avail.wrapping_sub(ring.next_avail))
    }

    /// Ring entries: no more chains than this can be with the device.
    pub fn size(&self) -> u16 {
        self.ring.as_ref().map_or(0, |ring| ring.size)
    }

    /// Gives a chain back to the driver; `len` is how many octets were written into its writable buffers.
    pub fn add_used(&mut self, memory: &GuestMemory, head: u16, len: u32) -> Result<(), QueueError> {
        self.put_used(memory, head, len)?;
        self.announce_used(memory)
    }

    /// The same for one of several chains that the driver is to see at once: they are there with `announce_used`.
    pub fn put_used(&mut self, memory: &GuestMemory, head: u16, len: u32) -> Result<(), QueueError> {
        let Some(ring) = &mut self.ring else { return Ok(()) };
        let mut element = [0u8; 8];
        element[..4].copy_from_slice(&u32::from(head).to_le_bytes());
        element[4..].copy_from_slice(&len.to_le_bytes());
        let slot = u64::from(ring.next_used.wrapping_add(ring.unannounced) % ring.size);
        memory.write(ring.device + 4 + 8 * slot, &element)?;
        ring.unannounced = ring.unannounced.wrapping_add(1);
        Ok(())
    }

    /// Lets the driver see what was put into the used ring.
    pub fn announce_used(&mut self, memory: &GuestMemory) -> Result<(), QueueError> {
        let Some(ring) = &mut self.ring else { return Ok(()) };
        ring.next_used = ring.next_used.wrapping_add(std::mem::take(&mut ring.unannounced));
        // Release: elements and data are visible before the index that announces them.
        memory.store_u16(ring.device + 2, ring.next_used, Ordering::Release)?;
        Ok(())
    }

    /// Asks for a notification when the driver adds a chain. `true` when one is there already (it may have
    /// been added before the driver saw the wish): go on popping then.
    pub fn enable_notifications(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        let Some(ring) = &mut self.ring else { return Ok(false) };
        if ring.event_index {
            // The driver notifies when its index passes this one, so not asking anew suppresses.
            let avail_event = ring.device + 4 + 8 * u64::from(ring.size);
            memory.store_u16(avail_event, ring.next_avail, Ordering::Relaxed)?;
        }
        // The wish must be visible before the index is read, or both sides could miss each other (§2.7.10).
        fence(Ordering::SeqCst);
        ring.available(memory)
    }

    /// The same where there are chains, but too few: asks for a notification when the driver adds to those that were
    /// seen. `true` when it did already.
    pub fn enable_notifications_of_more(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        let Some(ring) = &mut self.ring else { return Ok(false) };
        let seen = ring.seen_avail;
        if ring.event_index {
            memory.store_u16(ring.device + 4 + 8 * u64::from(ring.size), seen, Ordering::Relaxed)?;
        }
        // As above.
        fence(Ordering::SeqCst);
        ring.look(memory)?;
        Ok(ring.seen_avail != seen)
    }

    /// Whether the driver wants an interrupt for what was given back since the last call. Call once after
    /// a batch of `add_used`.
    pub fn needs_interrupt(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        let Some(ring) = &mut self.ring else { return Ok(false) };
        let (old, new) = (ring.decided_used, ring.next_used);
        if old == new {
            return Ok(false);
        }
        ring.decided_used = new;
        // The used index must be visible before the driver's wish is read (§2.7.7.2).
        fence(Ordering::SeqCst);
        if ring.event_index {
            let event = memory.load_u16(ring.driver + 4 + 2 * u64::from(ring.size), Ordering::Relaxed)?;
            // The wished-for index lies in (old, new], all modulo 2^16.
            Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
        } else {
            let flags = memory.load_u16(ring.driver, Ordering::Relaxed)?;
            Ok(flags & AVAIL_NO_INTERRUPT == 0)
        }
    }
}

impl Ring {
    /// Whether a chain can be popped.
    fn available(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        if self.seen_avail == self.next_avail {
            self.look(memory)?;
        }
        Ok(self.seen_avail != self.next_avail)
    }

    /// Reads the available index.
    fn look(&mut self, memory: &GuestMemory) -> Result<(), QueueError> {
        // Acquire: ring entries, descriptors and data are read after the index that announces them.
        let index = memory.load_u16(self.driver + 2, Ordering::Acquire)?;
        let by = index.wrapping_sub(self.next_avail);
        if by > self.size {
            return Err(QueueError::AvailableJump { by, size: self.size });
        }
        self.seen_avail = index;
        Ok(())
    }

    fn pop<'m>(&mut self, memory: &'m GuestMemory, chain: &mut Chain<'m>) -> Result<bool, QueueError> {
        if !self.available(memory)? {
            return Ok(false);
        }
        let slot = u64::from(self.next_avail % self.size);
        let head = memory.load_u16(self.driver + 4 + 2 * slot, Ordering::Relaxed)?;
        self.next_avail = self.next_avail.wrapping_add(1);
        chain.head = head;
        chain.readable.clear();
        chain.writable.clear();

        let (mut table, mut size) = (self.descriptors, u32::from(self.size));
        let mut index = u32::from(head);
        let mut total = 0u32;
        let mut inside_indirect = false;
        let mut count = 0;
        loop {
            if index >= size {
                return Err(QueueError::Index { index, size });
            }
            let descriptor = Descriptor::read(memory, table, index)?;
            if descriptor.flags & FLAG_INDIRECT != 0 {
                // Linux makes an indirect table the whole chain. §2.7.5.3.2 lets it end a longer one and forbids
                // NEXT beside it; a table inside a table is forbidden.
                if !self.indirect || inside_indirect || descriptor.flags & FLAG_NEXT != 0 {
                    return Err(QueueError::Indirect);
                }
                let len = descriptor.len;
                if len == 0 || u64::from(len) % DESCRIPTOR != 0 {
                    return Err(QueueError::IndirectLength { len });
                }
                inside_indirect = true;
                (table, size, index) = (descriptor.addr, len / DESCRIPTOR as u32, 0);
                continue;
            }
            count += 1;
            if count > MAX_CHAIN {
                return Err(QueueError::TooLong);
            }
            total = total.checked_add(descriptor.len).ok_or(QueueError::TooBig)?;
            let slice = memory.slice(descriptor.addr, descriptor.len as usize)?;
            if descriptor.flags & FLAG_WRITE != 0 {
                chain.writable.push(slice);
            } else if chain.writable.is_empty() {
                chain.readable.push(slice);
            } else {
                return Err(QueueError::Order);
            }
            if descriptor.flags & FLAG_NEXT == 0 {
                return Ok(true);
            }
            index = u32::from(descriptor.next);
        }
    }
}
