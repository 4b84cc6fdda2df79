//! A driver for tests and fuzz targets: the guest's side of the transport and of split queues.

#![allow(clippy::unwrap_used)] // a failure is the test's failure

use std::sync::atomic::Ordering;

use super::mmio::Window;
use crate::vmm::memory::GuestMemory;

/// A small generator of numbers (splitmix64), so that a failing case is named by its seed.
#[derive(Debug, Clone)]
pub struct Seed(pub u64);

impl Seed {
    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.number() % limit
    }

    /// That many octets.
    pub fn octets(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.number() as u8).collect()
    }
}

/// The driver's side of one queue. It gives descriptors out in a circle and does not check for reuse: tests add
/// no more than fits.
#[derive(Debug)]
pub struct DriverQueue {
    /// Ring entries.
    pub size: u16,
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring.
    pub driver: u64,
    /// Used ring.
    pub device: u64,
    next_descriptor: u16,
    next_avail: u16,
    seen_used: u16,
}

impl DriverQueue {
    /// Octets that a queue takes in memory, at most.
    pub const BYTES: u64 = 0x2000;

    /// A queue in the `BYTES` octets from `base`, a multiple of a page.
    pub fn new(base: u64, size: u16) -> Self {
        let (driver, device) = (base + 0x1000, base + 0x1400);
        Self { size, descriptors: base, driver, device, next_descriptor: 0, next_avail: 0, seen_used: 0 }
    }

    /// Writes a descriptor as it is.
    pub fn put_descriptor(&self, memory: &GuestMemory, table: u64, index: u16, fields: (u64, u32, u16, u16)) {
        let at = table + 16 * u64::from(index);
        memory.write_u64(at, fields.0).unwrap();
        memory.write_u32(at + 8, fields.1).unwrap();
        memory.write_u16(at + 12, fields.2).unwrap();
        memory.write_u16(at + 14, fields.3).unwrap();
    }

    /// Makes a chain available: buffers of (address, length, whether the device writes it). Gives its head.
    pub fn add(&mut self, memory: &GuestMemory, buffers: &[(u64, u32, bool)]) -> u16 {
        let head = self.next_descriptor % self.size;
        for (n, &(addr, len, write)) in buffers.iter().enumerate() {
            let index = self.next_descriptor % self.size;
            self.next_descriptor = self.next_descriptor.wrapping_add(1);
            let more = n + 1 < buffers.len();
            let next = self.next_descriptor % self.size;
            self.put_descriptor(memory, self.descriptors, index, (addr, len, flags(write, more), next));
        }
        self.publish(memory, head);
        head
    }

    /// The same with an indirect table at `table`.
    pub fn add_indirect(&mut self, memory: &GuestMemory, table: u64, buffers: &[(u64, u32, bool)]) -> u16 {
        for (n, &(addr, len, write)) in buffers.iter().enumerate() {
            let more = n + 1 < buffers.len();
            self.put_descriptor(memory, table, n as u16, (addr, len, flags(write, more), n as u16 + 1));
        }
        let head = self.next_descriptor % self.size;
        self.next_descriptor = self.next_descriptor.wrapping_add(1);
        self.put_descriptor(memory, self.descriptors, head, (table, 16 * buffers.len() as u32, 4, 0));
        self.publish(memory, head);
        head
    }

    /// Puts a head into the available ring.
    pub fn publish(&mut self, memory: &GuestMemory, head: u16) {
        let slot = u64::from(self.next_avail % self.size);
        memory.write_u16(self.driver + 4 + 2 * slot, head).unwrap();
        self.next_avail = self.next_avail.wrapping_add(1);
        memory.store_u16(self.driver + 2, self.next_avail, Ordering::Release).unwrap();
    }

    /// The next chain that the device gave back: head and octets written.
    pub fn used(&mut self, memory: &GuestMemory) -> Option<(u16, u32)> {
        if memory.load_u16(self.device + 2, Ordering::Acquire).unwrap() == self.seen_used {
            return None;
        }
        let at = self.device + 4 + 8 * u64::from(self.seen_used % self.size);
        self.seen_used = self.seen_used.wrapping_add(1);
        Some((memory.read_u32(at).unwrap() as u16, memory.read_u32(at + 4).unwrap()))
    }

    /// Wishes to be interrupted for the next chain given back (with event index).
    pub fn want_interrupt(&self, memory: &GuestMemory) {
        memory.write_u16(self.driver + 4 + 2 * u64::from(self.size), self.seen_used).unwrap();
    }

    /// When the device wishes to be notified (with event index).
    pub fn avail_event(&self, memory: &GuestMemory) -> u16 {
        memory.read_u16(self.device + 4 + 8 * u64::from(self.size)).unwrap()
    }
}

fn flags(write: bool, more: bool) -> u16 {
    u16::from(more) | if write { 2 } else { 0 }
}

/// Reads a register.
pub fn read(window: &dyn Window, offset: u64) -> u32 {
    let mut octets = [0; 4];
    window.read(offset, &mut octets);
    u32::from_le_bytes(octets)
}

/// Writes a register.
pub fn write(window: &dyn Window, offset: u64, value: u32) {
    window.write(offset, &value.to_le_bytes());
}

/// `VIRTIO_F_VERSION_1`, which every driver here takes up.
pub const VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_EVENT_IDX`.
pub const EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_INDIRECT_DESC`.
pub const INDIRECT: u64 = 1 << 28;

/// Initialises a device as Linux does (virtio 1.2 §3.1.1), with queues of `size` entries in memory from `base`
/// on; gives the queues.
pub fn start(window: &dyn Window, features: u64, queues: usize, size: u16, base: u64) -> Vec<DriverQueue> {
    write(window, 0x70, 0);
    write(window, 0x70, 1);
    write(window, 0x70, 3);
    for (select, part) in [(0, features as u32), (1, ((features | VERSION_1) >> 32) as u32)] {
        write(window, 0x24, select);
        write(window, 0x20, part);
    }
    write(window, 0x70, 11);
    assert_eq!(read(window, 0x70), 11, "features refused");
    let mut made = Vec::new();
    for index in 0..queues {
        let queue = DriverQueue::new(base + index as u64 * DriverQueue::BYTES, size);
        set_up(window, index as u32, &queue);
        made.push(queue);
    }
    write(window, 0x70, 15);
    assert_eq!(read(window, 0x70), 15, "device not active");
    made
}

/// Writes a queue's registers.
pub fn set_up(window: &dyn Window, index: u32, queue: &DriverQueue) {
    write(window, 0x30, index);
    write(window, 0x38, u32::from(queue.size));
    for (offset, addr) in [(0x80, queue.descriptors), (0x90, queue.driver), (0xa0, queue.device)] {
        write(window, offset, addr as u32);
        write(window, offset + 4, (addr >> 32) as u32);
    }
    write(window, 0x44, 1);
}

/// What the device thread does: serves every queue whose event came, until none comes any more.
pub fn run(window: &dyn Window) {
    for _ in 0..10_000 {
        let mut any = false;
        for (index, event) in window.queue_events().iter().enumerate() {
            if event.read().is_ok() {
                any = true;
                window.serve(index);
            }
        }
        if !any {
            return;
        }
    }
    panic!("the device does not come to rest");
}

/// Whether an interrupt was raised since the last call; acknowledges it.
pub fn interrupted(window: &dyn Window) -> u32 {
    let came = window.interrupt().read().is_ok();
    let status = read(window, 0x60);
    write(window, 0x64, status);
    if came { status } else { 0 }
}
