//! Block device (virtio 1.2 §5.2): one disk of the guest, over its medium.
//!
//! Requests run on the disk's own thread (see `disk`), one after the other, straight between files and guest memory.

mod counters;
mod request;

use std::fs::File;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use counters::add;
pub use counters::{BlockCounters, LATENCY_BUCKETS};
use request::{HEADER, MAX_DISCARD, MAX_RANGES, MAX_ZEROES, Request, SECTOR};

use super::device::{Context, Device, Progress};
use super::queue::{Chain, MAX_SIZE, QueueError};
use super::rate::Limiter;
use super::segments::Window;
use crate::storage::medium::Medium;
use crate::storage::overlay::OverlayError;
use crate::storage::space;

/// Longest name that `GET_ID` answers, in octets.
pub const ID_LEN: usize = 20;

const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

/// Longest single data buffer that the driver is asked to make, in octets.
const SIZE_MAX: u32 = 1 << 20;
/// Data buffers of a request: what a chain holds beside header and status.
const SEG_MAX: u32 = MAX_SIZE as u32 - 2;
/// What file systems are told to write at least, in octets: the unit of overlays and of the host's page cache.
const GOOD_WRITE: u64 = 4096;
/// After this much, a reset or a stop gets its turn.
const BATCH_OCTETS: usize = 4 << 20;
/// After this much, the driver hears of what is done, although more is queued: it can work meanwhile.
const ANNOUNCE_OCTETS: usize = 256 << 10;
const BATCH_REQUESTS: usize = 128;

/// The device.
#[derive(Debug)]
pub struct Block {
    medium: Medium,
    id: [u8; ID_LEN],
    counters: Arc<BlockCounters>,
    /// Of all disks of the guest together; `None` when there is no limit.
    limiter: Option<Arc<Mutex<Limiter>>>,
    /// When requests that wait for their limit may go on.
    wake: Option<Instant>,
}

impl Block {
    /// A disk; `id` is what `GET_ID` answers, at most 20 octets of it.
    pub fn new(medium: Medium, id: &str) -> Self {
        let mut octets = [0; ID_LEN];
        let len = id.len().min(ID_LEN);
        octets[..len].copy_from_slice(&id.as_bytes()[..len]);
        Self { medium, id: octets, counters: Arc::default(), limiter: None, wake: None }
    }

    /// The same disk with limits, which it may share with others.
    pub fn limited(mut self, limiter: &Arc<Mutex<Limiter>>) -> Self {
        self.limiter = Some(limiter.clone());
        self
    }

    /// The device's counters.
    pub fn counters(&self) -> Arc<BlockCounters> {
        Arc::clone(&self.counters)
    }

    /// When the queue is to be looked at although nothing notifies.
    pub fn deadline(&self) -> Option<Instant> {
        self.wake
    }

    /// Puts everything on the medium, for an orderly end.
    pub fn flush(&mut self) -> io::Result<()> {
        self.medium.flush()
    }

    /// Freezes what was written and goes on with an empty layer. Requests before it are in the frozen one, on the
    /// medium; those after it are not.
    pub fn push(&mut self, new_top: File) -> Result<(), OverlayError> {
        self.medium.push(new_top)
    }

    /// Whether the next request has to wait for its limit; `wake` is then when it need not any more.
    fn must_wait(&mut self) -> bool {
        self.wake = None;
        let Some(limiter) = &self.limiter else { return false };
        let mut limiter = limiter.lock().unwrap_or_else(PoisonError::into_inner);
        if !limiter.is_limited() {
            return false;
        }
        let now = Instant::now();
        if let Some(wait) = limiter.wait(now) {
            self.wake = Some(now + wait);
            add(&self.counters.throttled, 1);
        }
        self.wake.is_some()
    }

    fn pay(&self, chain: &Chain<'_>) {
        if let Some(limiter) = &self.limiter {
            let octets = chain.readable.len().max(chain.writable.len()) as u64;
            limiter.lock().unwrap_or_else(PoisonError::into_inner).take(octets, 1);
        }
    }

    /// Serves one request; gives the octets written into its buffers.
    fn serve(&mut self, chain: &Chain<'_>) -> u32 {
        add(&self.counters.requests, 1);
        // The last writable octet is the status, the ones before it are data to read.
        let Some(data_in) = chain.writable.len().checked_sub(1) else {
            return 0;
        };
        let (status, written) = match self.execute(chain, data_in) {
            Ok(done) => done,
            // The guest then stops asking for it.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => (S_UNSUPP, 0),
            Err(error) => {
                // The guest can make errors at will: not all of them are worth a line.
                if self.counters.errors.load(Ordering::Relaxed) < 16 {
                    log::warn!("disk {}: request failed: {error}", self.id.escape_ascii());
                }
                add(&self.counters.errors, 1);
                if space::is_full(&error) {
                    add(&self.counters.without_room, 1);
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
        let counters = &self.counters;
        match Request::parse(&chain.readable, data_in)? {
            Request::Read { offset } => {
                add(&counters.reads, 1);
                self.medium.read(offset, data_in, Window::new(&chain.writable, 0))?;
                add(&counters.read_bytes, data_in as u64);
                return Ok((S_OK, data_in));
            }
            Request::Write { offset, len } => {
                add(&counters.writes, 1);
                self.medium.write(offset, len, Window::new(&chain.readable, HEADER))?;
                add(&counters.written_bytes, len as u64);
            }
            Request::Flush => {
                add(&counters.flushes, 1);
                self.medium.flush()?;
            }
            Request::GetId => {
                let len = data_in.min(ID_LEN);
                chain.writable.copy_from(0, &self.id[..len]);
                return Ok((S_OK, len));
            }
            Request::Discard(ranges) => {
                add(&counters.discards, 1);
                for range in ranges.iter() {
                    self.medium.discard(range.offset, range.len)?;
                    add(&counters.discarded_bytes, range.len);
                }
            }
            Request::WriteZeroes(ranges) => {
                add(&counters.discards, 1);
                for range in ranges.iter() {
                    self.medium.write_zeroes(range.offset, range.len, range.unmap)?;
                    add(&counters.discarded_bytes, range.len);
                }
            }
            Request::Unsupported => return Ok((S_UNSUPP, 0)),
        }
        Ok((S_OK, 0))
    }
}

impl Device for Block {
    const TYPE: u32 = 2;
    const QUEUES: &'static [u16] = &[MAX_SIZE];

    fn features(&self) -> u64 {
        let always = F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY;
        always | if self.medium.is_read_only() { F_RO } else { F_DISCARD | F_WRITE_ZEROES }
    }

    /// `struct virtio_blk_config`, §5.2.4. Logical blocks are small so that any file system mounts; the topology
    /// tells of larger ones, so that it seldom writes parts of one.
    fn config(&self) -> Vec<u8> {
        let sector = self.medium.sector();
        let mut config = vec![0; 60];
        let mut put = |at: usize, octets: &[u8]| config[at..at + octets.len()].copy_from_slice(octets);
        put(0, &(self.medium.disk_bytes() / SECTOR).to_le_bytes());
        put(8, &SIZE_MAX.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &(sector as u32).to_le_bytes());
        let blocks = (GOOD_WRITE / sector).max(1); // logical blocks in a physical one
        put(24, &[blocks.trailing_zeros() as u8]);
        put(26, &(blocks as u16).to_le_bytes()); // smallest good transfer, in logical blocks
        if !self.medium.is_read_only() {
            put(36, &MAX_DISCARD.to_le_bytes());
            put(40, &(MAX_RANGES as u32).to_le_bytes());
            put(44, &((self.medium.granularity() / SECTOR) as u32).to_le_bytes());
            put(48, &MAX_ZEROES.to_le_bytes());
            put(52, &(MAX_RANGES as u32).to_le_bytes());
            put(56, &[1]); // writing zeroes may give space back
        }
        config
    }

    fn queue_notified(&mut self, context: &mut Context<'_>, index: usize) -> Result<Progress, QueueError> {
        let memory = context.memory;
        let mut chain = Chain::default();
        let (mut octets, mut announced) = (0, 0);
        // The end of one request is the start of the next.
        let mut begun = Instant::now();
        for _ in 0..BATCH_REQUESTS {
            if octets >= BATCH_OCTETS {
                break;
            }
            if self.must_wait() {
                // The driver need not notify meanwhile.
                context.interrupt_for(index)?;
                return Ok(Progress::Idle);
            }
            if !context.queues[index].pop(memory, &mut chain)? {
                // What is done is announced before the driver is asked to notify again.
                context.interrupt_for(index)?;
                self.counters.queue.store(0, Ordering::Relaxed);
                if !context.queues[index].enable_notifications(memory)? {
                    return Ok(Progress::Idle);
                }
                begun = Instant::now();
                continue;
            }
            self.counters.queue.store(u64::from(context.queues[index].waiting()) + 1, Ordering::Relaxed);
            let written = self.serve(&chain);
            self.pay(&chain);
            let ended = Instant::now();
            self.counters.took(ended.saturating_duration_since(begun));
            begun = ended;
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

    fn reset(&mut self) {
        self.wake = None;
        self.counters.queue.store(0, Ordering::Relaxed);
    }
}
