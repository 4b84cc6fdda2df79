//! Block device (virtio 1.2 §5.2): the sandbox's root disk over its overlay.
//!
//! Requests run on the disk's own thread (see `disk`), one after the other, straight between files and guest memory.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::device::{Context, Device, Progress};
use super::queue::{Chain, MAX_SIZE, QueueError};
use super::segments::Window;
use crate::storage::overlay::Overlay;

/// Unit of the driver's addresses, whatever the block size is.
const SECTOR: u64 = 512;
const HEADER: usize = 16;
const ID_LEN: usize = 20;

const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;

const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

/// Longest single data buffer that the driver is asked to make, in octets.
const SIZE_MAX: u32 = 1 << 20;
/// Data buffers of a request: what a chain holds beside header and status.
const SEG_MAX: u32 = MAX_SIZE as u32 - 2;
/// After this much, other devices get their turn.
const BATCH_OCTETS: usize = 4 << 20;
/// After this much, the driver hears of what is done, although more is queued: it can work meanwhile.
const ANNOUNCE_OCTETS: usize = 256 << 10;
const BATCH_REQUESTS: usize = 128;

/// What the device did so far; read by other threads.
#[derive(Debug, Default)]
pub struct BlockCounters {
    /// Octets read by the guest.
    pub read_bytes: AtomicU64,
    /// Octets written by the guest.
    pub written_bytes: AtomicU64,
    /// Requests of all kinds.
    pub requests: AtomicU64,
    /// Flush requests.
    pub flushes: AtomicU64,
    /// Requests that ended in an I/O error.
    pub errors: AtomicU64,
}

/// The device.
#[derive(Debug)]
pub struct Block {
    disk: Overlay,
    id: [u8; ID_LEN],
    counters: Arc<BlockCounters>,
}

impl Block {
    /// A disk; `id` is what `GET_ID` answers, at most 20 octets of it.
    pub fn new(disk: Overlay, id: &str) -> Self {
        let mut octets = [0; ID_LEN];
        let len = id.len().min(ID_LEN);
        octets[..len].copy_from_slice(&id.as_bytes()[..len]);
        Self { disk, id: octets, counters: Arc::default() }
    }

    /// The device's counters.
    pub fn counters(&self) -> Arc<BlockCounters> {
        Arc::clone(&self.counters)
    }

    /// When the queue is to be looked at although nothing notifies.
    pub fn deadline(&self) -> Option<Instant> {
        None
    }

    /// Puts everything on the medium, for an orderly end.
    pub fn flush(&mut self) -> io::Result<()> {
        self.disk.flush()
    }

    /// Serves one request; gives the octets written into its buffers.
    fn serve(&mut self, chain: &Chain<'_>) -> u32 {
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
        // The last writable octet is the status, the ones before it are data to read.
        let Some(data_in) = chain.writable.len().checked_sub(1) else {
            return 0;
        };
        let (status, written) = match self.execute(chain, data_in) {
            Ok(done) => done,
            Err(error) => {
                let errors = self.counters.errors.fetch_add(1, Ordering::Relaxed);
                // The guest can make errors at will: not all of them are worth a line.
                if errors < 16 {
                    log::warn!("block: request failed: {error}");
                }
                (S_IOERR, 0)
            }
        };
        chain.writable.copy_from(data_in, &[status]);
        // §2.7.8: all octets up to the length given must have been written. Where the status is not right
        // after the data, the rest is cleared.
        if written < data_in {
            for part in chain.writable.parts(written..data_in) {
                part.zero();
            }
        }
        chain.writable.len() as u32
    }

    fn execute(&mut self, chain: &Chain<'_>, data_in: usize) -> io::Result<(u8, usize)> {
        let mut header = [0; HEADER];
        if chain.readable.copy_to(0, &mut header) < HEADER {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "request without a whole header"));
        }
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let kind = u32::from_le_bytes([t0, t1, t2, t3]);
        let sector = u64::from_le_bytes(sector);
        match kind {
            T_IN => {
                let offset = place(sector, data_in)?;
                self.disk.read(offset, data_in, Window::new(&chain.writable, 0))?;
                self.counters.read_bytes.fetch_add(data_in as u64, Ordering::Relaxed);
                Ok((S_OK, data_in))
            }
            T_OUT => {
                let len = chain.readable.len() - HEADER;
                let offset = place(sector, len)?;
                self.disk.write(offset, len, Window::new(&chain.readable, HEADER))?;
                self.counters.written_bytes.fetch_add(len as u64, Ordering::Relaxed);
                Ok((S_OK, 0))
            }
            T_FLUSH => {
                self.counters.flushes.fetch_add(1, Ordering::Relaxed);
                self.disk.flush()?;
                Ok((S_OK, 0))
            }
            T_GET_ID => {
                let len = data_in.min(ID_LEN);
                chain.writable.copy_from(0, &self.id[..len]);
                Ok((S_OK, len))
            }
            _ => Ok((S_UNSUPP, 0)),
        }
    }
}

/// Where a request starts on the disk. The disk checks that it ends inside.
fn place(sector: u64, len: usize) -> io::Result<u64> {
    let invalid = |why| io::Error::new(io::ErrorKind::InvalidInput, why);
    if !(len as u64).is_multiple_of(SECTOR) {
        return Err(invalid("length is no multiple of a sector"));
    }
    sector.checked_mul(SECTOR).ok_or_else(|| invalid("sector number out of range"))
}

impl Device for Block {
    const TYPE: u32 = 2;
    const QUEUES: &'static [u16] = &[MAX_SIZE];

    fn features(&self) -> u64 {
        F_SIZE_MAX | F_SEG_MAX | F_FLUSH | F_TOPOLOGY
    }

    /// `struct virtio_blk_config`, §5.2.4, up to and with the topology. Logical blocks stay at 512 octets so
    /// that any file system mounts; the topology tells of 4 KiB blocks, so that it seldom writes parts of one.
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 32];
        config[0..8].copy_from_slice(&(self.disk.disk_bytes() / SECTOR).to_le_bytes());
        config[8..12].copy_from_slice(&SIZE_MAX.to_le_bytes());
        config[12..16].copy_from_slice(&SEG_MAX.to_le_bytes());
        config[20..24].copy_from_slice(&(SECTOR as u32).to_le_bytes());
        config[24] = 3; // physical block: 2^3 logical blocks
        config[26..28].copy_from_slice(&8u16.to_le_bytes()); // smallest good transfer, in logical blocks
        config
    }

    fn queue_notified(&mut self, context: &mut Context<'_>, index: usize) -> Result<Progress, QueueError> {
        let memory = context.memory;
        let mut chain = Chain::default();
        let (mut octets, mut announced) = (0, 0);
        for _ in 0..BATCH_REQUESTS {
            if octets >= BATCH_OCTETS {
                break;
            }
            if !context.queues[index].pop(memory, &mut chain)? {
                // What is done is announced before the driver is asked to notify again.
                context.interrupt_for(index)?;
                if !context.queues[index].enable_notifications(memory)? {
                    return Ok(Progress::Idle);
                }
                continue;
            }
            let written = self.serve(&chain);
            context.queues[index].add_used(memory, chain.head, written)?;
            octets += chain.readable.len() + chain.writable.len();
            if octets - announced >= ANNOUNCE_OCTETS {
                announced = octets;
                context.interrupt_for(index)?;
            }
        }
        context.interrupt_for(index)?;
        Ok(Progress::More)
    }

    fn reset(&mut self) {}
}
