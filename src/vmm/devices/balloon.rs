//! Memory balloon device (virtio 1.2 §5.5): takes memory from the guest and gives it back, hears what the guest's
//! kernel says of its memory, and lets go of what the guest has free.
//!
//! Everything here is the guest's word. What it puts into the balloon or reports as free is taken from itself alone:
//! the host drops the pages, and the guest finds zeroes when it uses them after all. What it says of its statistics
//! and of its balloon's size is cut to what can be and otherwise only passed on.
//!
//! Giving memory back needs no work: a page that is touched is there again, so the deflate queue is only answered.
//! `DEFLATE_ON_OOM` is always offered: a target too small for the guest costs it its caches, not its programs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::device::{Context, Device, Progress};
use super::queue::{Chain, QueueError};
use super::segments::Segments;
use crate::vmm::memory::{GuestMemory, PAGE};
use crate::vmm::snapshot::saved::{Part, SavedError};

const F_STATS_VQ: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_PAGE_POISON: u64 = 1 << 4;
const F_REPORTING: u64 = 1 << 5;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// The statistics queue, where that feature is in use. The queue after it reports free pages. §5.5.2 gives that one
/// the number 4; Linux counts only the queues of features in use, and monitors go by Linux.
const STATS: usize = 2;

/// Entries of the reporting queue; Linux wants 32 at least, which is how many ranges it reports at once.
const REPORTING_SIZE: u16 = 64;
/// Page numbers that one request may hold; Linux sends 256. Those beyond are not looked at, so the guest keeps them.
const MAX_PFNS: usize = 1024;
/// Requests served before other devices get their turn: a host call for each page of each request at worst.
const BATCH_REQUESTS: usize = 4;
/// Octets that are let go before other devices get their turn.
const BATCH_OCTETS: usize = 256 << 20;
/// Statistics looked at in one buffer; Linux sends 16 at most.
const MAX_STATS: usize = 64;
/// One statistic: a tag of 2 octets, a value of 8 (§5.5.6.3).
const STAT: usize = 10;

/// What a guest's kernel says of its memory; what it did not say is `None`. Sizes are octets and at most the guest's
/// RAM; the rest may be any number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryStatistics {
    /// Page faults that had to wait for a disk, since its start.
    pub major_faults: Option<u64>,
    /// Page faults that did not, since its start.
    pub minor_faults: Option<u64>,
    /// Memory in no use at all.
    pub free: Option<u64>,
    /// Memory in all.
    pub total: Option<u64>,
    /// What programs could get without anybody being killed.
    pub available: Option<u64>,
    /// Contents of files that can be read again.
    pub caches: Option<u64>,
    /// Programs killed because there was no memory left, since its start.
    pub oom_kills: Option<u64>,
}

impl MemoryStatistics {
    fn parse(buffer: &Segments<'_>, ram: u64) -> Self {
        let mut octets = [0; MAX_STATS * STAT];
        let len = buffer.copy_to(0, &mut octets);
        let mut statistics = Self::default();
        for entry in octets[..len].chunks_exact(STAT) {
            let &[t0, t1, ref value @ ..] = entry else { continue };
            let Ok(value) = <[u8; 8]>::try_from(value).map(u64::from_le_bytes) else { continue };
            let size = Some(value.min(ram));
            match u16::from_le_bytes([t0, t1]) {
                2 => statistics.major_faults = Some(value),
                3 => statistics.minor_faults = Some(value),
                4 => statistics.free = size,
                5 => statistics.total = size,
                6 => statistics.available = size,
                7 => statistics.caches = size,
                10 => statistics.oom_kills = Some(value),
                _ => {}
            }
        }
        statistics
    }
}

/// What the device did so far; read by other threads.
#[derive(Debug, Default)]
pub struct BalloonCounters {
    /// Pages that the guest put into the balloon.
    pub inflated_pages: AtomicU64,
    /// Pages that it took out again.
    pub deflated_pages: AtomicU64,
    /// Octets that it reported free and the host let go.
    pub reported_bytes: AtomicU64,
    /// Pages and ranges that could not be let go: outside of RAM, too many in one request, or the host refused.
    pub refused: AtomicU64,
}

/// The device.
#[derive(Debug)]
pub struct Balloon {
    /// Pages of RAM.
    pages: u32,
    /// Pages that the balloon is to hold: the node's wish.
    target: u32,
    /// Pages that it holds, as the driver says.
    actual: u32,
    /// What the guest's kernel fills free pages with, when that feature is in use.
    poison: u32,
    features: u64,
    /// The driver's buffer for statistics, kept until the next ones are wanted.
    held: Option<u16>,
    statistics: MemoryStatistics,
    taken: Option<Instant>,
    counters: Arc<BalloonCounters>,
}

impl Balloon {
    /// The balloon of a guest with `ram` octets (a multiple of a page, at most 16 TiB), empty.
    pub fn new(ram: u64) -> Self {
        Self {
            pages: u32::try_from(ram / PAGE).unwrap_or(u32::MAX),
            target: 0,
            actual: 0,
            poison: 0,
            features: 0,
            held: None,
            statistics: MemoryStatistics::default(),
            taken: None,
            counters: Arc::default(),
        }
    }

    /// The device's counters.
    pub fn counters(&self) -> Arc<BalloonCounters> {
        Arc::clone(&self.counters)
    }

    /// Wishes the balloon to hold so many octets, cut to RAM. By `MmioTransport::change`, so that the driver hears.
    pub fn set_target(&mut self, bytes: u64) {
        self.target = u32::try_from(bytes / PAGE).unwrap_or(u32::MAX).min(self.pages);
    }

    /// Octets that the balloon is to hold.
    pub fn target(&self) -> u64 {
        u64::from(self.target) * PAGE
    }

    /// Octets that the balloon holds, as the driver says; at most RAM.
    pub fn actual(&self) -> u64 {
        u64::from(self.actual) * PAGE
    }

    /// The last statistics that came, and when.
    pub fn statistics(&self) -> Option<(MemoryStatistics, Instant)> {
        self.taken.map(|taken| (self.statistics, taken))
    }

    /// Asks the driver for new statistics; gives whether there is one that may answer. It answers when it likes, or
    /// never.
    pub fn request_statistics(&mut self, context: &mut Context<'_>) -> Result<bool, QueueError> {
        if self.features & F_STATS_VQ == 0 {
            return Ok(false);
        }
        if let Some(head) = self.held.take() {
            context.queues[STATS].add_used(context.memory, head, 0)?;
            context.interrupt_for(STATS)?;
        }
        // It may have put further buffers there already.
        self.take_statistics(context)?;
        Ok(true)
    }

    /// Takes the driver's next buffer, which has new statistics. One at a time: the driver sends the next one when it
    /// gets this one back, and who sends more has them wait.
    fn take_statistics(&mut self, context: &mut Context<'_>) -> Result<(), QueueError> {
        let memory = context.memory;
        let mut chain = Chain::default();
        // Twice, for a buffer that comes while the wish for a notification is written down.
        for _ in 0..2 {
            if self.held.is_some() {
                break;
            }
            if context.queues[STATS].pop(memory, &mut chain)? {
                self.statistics = MemoryStatistics::parse(&chain.readable, memory.size());
                self.taken = Some(Instant::now());
                self.held = Some(chain.head);
            } else if !context.queues[STATS].enable_notifications(memory)? {
                break;
            }
        }
        // With one in hand the next is wanted when this one was given back.
        context.queues[STATS].enable_notifications(memory)?;
        Ok(())
    }

    /// Lets go of the pages of an inflate request.
    fn inflate(&self, memory: &GuestMemory, pages: &Segments<'_>) -> usize {
        let mut octets = [0; 4 * MAX_PFNS];
        let len = pages.copy_to(0, &mut octets);
        let mut numbers: Vec<u32> =
            octets[..len].as_chunks::<4>().0.iter().map(|number| u32::from_le_bytes(*number)).collect();
        let given = (pages.len() / 4) as u64;
        self.counters.refused.fetch_add(given - numbers.len() as u64, Ordering::Relaxed);
        self.counters.inflated_pages.fetch_add(numbers.len() as u64, Ordering::Relaxed);
        // Neighbours go by one call; a page that is named twice goes once.
        numbers.sort_unstable();
        numbers.dedup();
        let mut done = 0;
        for run in numbers.chunk_by(|a, b| a.checked_add(1) == Some(*b)) {
            let slice = memory.slice(u64::from(run[0]) * PAGE, run.len() * PAGE as usize);
            match slice.ok().and_then(|slice| memory.discard(slice).ok()) {
                Some(octets) => done += octets,
                // One page of the run may be outside of RAM, or the host has no way to do it.
                None => done += run.iter().map(|page| self.let_go(memory, *page)).sum::<usize>(),
            }
        }
        done
    }

    fn let_go(&self, memory: &GuestMemory, page: u32) -> usize {
        let slice = memory.slice(u64::from(page) * PAGE, PAGE as usize);
        let done = slice.ok().and_then(|slice| memory.discard(slice).ok());
        if done.is_none() {
            self.counters.refused.fetch_add(1, Ordering::Relaxed);
        }
        done.unwrap_or(0)
    }

    /// Lets go of ranges that the guest has free. It gets them back as zeroes, which must be what it expects to find:
    /// a kernel that fills free pages with something else (§5.5.6.7) keeps them.
    fn report(&self, memory: &GuestMemory, ranges: &Segments<'_>) -> usize {
        if self.features & F_PAGE_POISON != 0 && self.poison != 0 {
            return 0;
        }
        let mut done = 0;
        for slice in ranges.slices() {
            match memory.discard(*slice) {
                Ok(octets) => done += octets,
                Err(_) => {
                    self.counters.refused.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        self.counters.reported_bytes.fetch_add(done as u64, Ordering::Relaxed);
        done
    }
}

impl Device for Balloon {
    const TYPE: u32 = 5;
    const QUEUES: &'static [u16] = &[64, 64, 16, REPORTING_SIZE];

    /// `PAGE_POISON` is there so that kernels that fill free pages may report at all (Linux takes reporting up only
    /// with it then).
    fn features(&self) -> u64 {
        F_STATS_VQ | F_DEFLATE_ON_OOM | F_PAGE_POISON | F_REPORTING
    }

    /// `struct virtio_balloon_config`, §5.5.4: `num_pages`, `actual`, `free_page_hint_cmd_id` (not in use),
    /// `poison_val`; little endian.
    fn config(&self) -> Vec<u8> {
        [self.target, self.actual, 0, self.poison].iter().flat_map(|field| field.to_le_bytes()).collect()
    }

    fn write_config(&mut self, offset: usize, from: &[u8]) {
        let field = <[u8; 4]>::try_from(from).map(u32::from_le_bytes);
        match (offset, field) {
            (4, Ok(actual)) => self.actual = actual.min(self.pages),
            (12, Ok(poison)) => self.poison = poison,
            _ => {}
        }
    }

    fn activate(&mut self, features: u64) {
        self.features = features;
    }

    fn queue_notified(&mut self, context: &mut Context<'_>, index: usize) -> Result<Progress, QueueError> {
        if index == STATS && self.features & F_STATS_VQ != 0 {
            self.take_statistics(context)?;
            return Ok(Progress::Idle);
        }
        let memory = context.memory;
        let mut chain = Chain::default();
        let mut octets = 0;
        for _ in 0..BATCH_REQUESTS {
            if octets >= BATCH_OCTETS {
                break;
            }
            if !context.queues[index].pop(memory, &mut chain)? {
                context.interrupt_for(index)?;
                if !context.queues[index].enable_notifications(memory)? {
                    return Ok(Progress::Idle);
                }
                continue;
            }
            match index {
                INFLATE => octets += self.inflate(memory, &chain.readable),
                DEFLATE => {
                    let pages = (chain.readable.len() / 4).min(MAX_PFNS) as u64;
                    self.counters.deflated_pages.fetch_add(pages, Ordering::Relaxed);
                }
                _ if self.features & F_REPORTING != 0 => octets += self.report(memory, &chain.writable),
                _ => {}
            }
            context.queues[index].add_used(memory, chain.head, 0)?;
        }
        context.interrupt_for(index)?;
        Ok(Progress::More)
    }

    fn save(&self, part: Part) -> Part {
        let part = part.with("target", self.target).with("actual", self.actual).with("poison", self.poison);
        self.held.iter().fold(part, |part, head| part.with("held", head))
    }

    /// Statistics come anew.
    fn restore(&mut self, part: &Part) -> Result<(), SavedError> {
        let pages = u64::from(self.pages);
        self.target = part.number("target", pages, 0)? as u32;
        self.actual = part.number("actual", pages, 0)? as u32;
        self.poison = part.number("poison", u64::from(u32::MAX), 0)? as u32;
        self.held = match part.get("held") {
            Some(_) => Some(part.number("held", u64::from(u16::MAX), 0)? as u16),
            None => None,
        };
        Ok(())
    }

    fn reset(&mut self) {
        (self.actual, self.poison, self.features, self.held) = (0, 0, 0, None);
        (self.statistics, self.taken) = (MemoryStatistics::default(), None);
    }
}
