//! What the transport asks of a device, and what it offers to one.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::queue::{Queue, QueueError};
use crate::vmm::memory::GuestMemory;
use crate::vmm::snapshot::saved::{Part, SavedError};

/// A virtio device behind its transport. Methods run under the transport's device lock: the device's thread
/// calls `queue_notified`, a vCPU thread calls `reset`.
pub trait Device: Send + 'static {
    /// Virtio device type (virtio 1.2 §5).
    const TYPE: u32;
    /// Largest size of each queue.
    const QUEUES: &'static [u16];

    /// Feature bits of the device's own (0 to 23, 50 to 127); the transport adds the common ones.
    fn features(&self) -> u64;
    /// The configuration space as the driver reads it now. Its length never changes. What changes it beside the
    /// driver goes through `MmioTransport::change`, so that the driver hears of it.
    fn config(&self) -> Vec<u8>;
    /// The driver wrote to the configuration space, wholly inside of it. What is not a writable field stays as it is.
    fn write_config(&mut self, _offset: usize, _from: &[u8]) {}
    /// The driver is there, with these features: a part of those offered.
    fn activate(&mut self, _features: u64) {}
    /// The driver added chains to a queue, or there may be some: serve them, within a bound.
    /// An error stops the device until the driver resets it.
    fn queue_notified(&mut self, context: &mut Context<'_>, index: usize) -> Result<Progress, QueueError>;
    /// The driver is gone, or broke the rules: forget everything about it.
    fn reset(&mut self);
    /// Adds to a snapshot what `restore` needs beside features and rings.
    fn save(&self, part: Part) -> Part {
        part
    }
    /// Takes it back, after `activate` where the driver was there.
    fn restore(&mut self, _part: &Part) -> Result<(), SavedError> {
        Ok(())
    }
}

/// How a piece of work ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Progress {
    /// Nothing is left to do until the next notification.
    Idle,
    /// Its bound was reached: the same work is to be called again after others had their turn.
    More,
}

/// What a device works with while its driver is active.
pub struct Context<'a> {
    /// The guest's memory.
    pub memory: &'a GuestMemory,
    /// The device's queues, one for each of `Device::QUEUES`.
    pub queues: &'a mut [Queue],
    pub(super) interrupt: &'a Interrupt,
}

impl Context<'_> {
    /// Interrupts the driver if it wants to hear of the chains given back on a queue.
    pub fn interrupt_for(&mut self, index: usize) -> Result<(), QueueError> {
        if self.queues[index].needs_interrupt(self.memory)? {
            self.interrupt.raise(Interrupt::USED_BUFFER);
        }
        Ok(())
    }
}

/// A device's interrupt line with its status bits (virtio 1.2 §4.2.2, InterruptStatus), shared by the device's
/// thread and the vCPU threads without a lock.
pub struct Interrupt {
    status: AtomicU32,
    needs_reset: AtomicBool,
    event: EventFd,
}

impl Interrupt {
    /// Chains were given back.
    pub const USED_BUFFER: u32 = 1;
    /// The configuration space or the device status changed.
    pub const CONFIGURATION: u32 = 2;

    pub(super) fn new() -> io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        Ok(Self { status: AtomicU32::new(0), needs_reset: AtomicBool::new(false), event })
    }

    /// The descriptor that KVM turns into an interrupt.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Sets a status bit and interrupts.
    pub fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::SeqCst);
        // Fails only when the counter is full: then an interrupt is pending anyway.
        let _ = self.event.write(1);
    }

    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    pub(super) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// The device cannot go on until the driver resets it (virtio 1.2 §2.1.2, DEVICE_NEEDS_RESET).
    pub(super) fn demand_reset(&self, tell: bool) {
        self.needs_reset.store(true, Ordering::SeqCst);
        if tell {
            self.raise(Self::CONFIGURATION);
        }
    }

    /// As it was saved. What was raised and may have been on its way is raised again: to a driver that had it, an
    /// interrupt without a reason is nothing.
    pub(super) fn restore(&self, status: u32, needs_reset: bool) {
        self.needs_reset.store(needs_reset, Ordering::SeqCst);
        if status != 0 {
            self.raise(status);
        }
    }

    pub(super) fn clear(&self) {
        self.status.store(0, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::SeqCst);
    }
}
