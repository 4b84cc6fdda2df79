//! Entropy device (virtio 1.2 §5.4): octets from the host's generator, as fast as a guest needs them and not as fast
//! as it likes: making them costs the host's processors.

use std::time::Instant;

use super::device::{Context, Device, Progress};
use super::queue::{Chain, MAX_SIZE, QueueError};
use super::rate::{Limiter, Limits, Rate};
use crate::vmm::memory;

/// Octets for one request at most; a driver asks again for more.
const MAX_REQUEST: usize = 64 * 1024;
/// Requests served before other devices get their turn.
const BATCH_REQUESTS: usize = 16;
/// What a guest gets: about one hundredth of one of the host's processors. A guest's kernel takes 64 octets at its
/// start and then a few a minute; its programs have its own generator.
const LIMITS: Limits = Limits {
    bytes: Some(Rate { per_second: 4 << 20, burst: 512 << 10 }),
    operations: Some(Rate { per_second: 2000, burst: 256 }),
};

/// The device.
#[derive(Debug)]
pub struct Rng {
    limiter: Limiter,
    /// When requests that wait for the limit may go on.
    wake: Option<Instant>,
}

impl Rng {
    /// A device with full buckets.
    pub fn new() -> Self {
        Self { limiter: Limiter::new(LIMITS, Instant::now()), wake: None }
    }

    /// When the queue is to be served again although no notification comes.
    pub fn wake(&self) -> Option<Instant> {
        self.wake
    }

    /// Whether the next request has to wait.
    fn must_wait(&mut self) -> bool {
        let now = Instant::now();
        self.wake = self.limiter.wait(now).map(|wait| now + wait);
        self.wake.is_some()
    }
}

impl Default for Rng {
    fn default() -> Self {
        Self::new()
    }
}

/// Fills a request's buffers; gives the octets filled.
fn serve(chain: &Chain<'_>) -> u32 {
    let mut done = 0;
    for part in chain.writable.parts(0..MAX_REQUEST) {
        // A short or failed answer (a signal came) ends the request with what there is.
        let filled = memory::random(part).unwrap_or(0);
        done += filled;
        if filled < part.len() {
            break;
        }
    }
    done as u32
}

impl Device for Rng {
    const TYPE: u32 = 4;
    const QUEUES: &'static [u16] = &[MAX_SIZE];

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn queue_notified(&mut self, context: &mut Context<'_>, index: usize) -> Result<Progress, QueueError> {
        let memory = context.memory;
        let mut chain = Chain::default();
        for _ in 0..BATCH_REQUESTS {
            if self.must_wait() {
                // Notifications stay off meanwhile: `wake` is when to come again.
                context.interrupt_for(index)?;
                return Ok(Progress::Idle);
            }
            if context.queues[index].pop(memory, &mut chain)? {
                let written = serve(&chain);
                context.queues[index].add_used(memory, chain.head, written)?;
                self.limiter.take(written.into(), 1);
            } else {
                context.interrupt_for(index)?;
                if !context.queues[index].enable_notifications(memory)? {
                    return Ok(Progress::Idle);
                }
            }
        }
        context.interrupt_for(index)?;
        Ok(Progress::More)
    }

    fn reset(&mut self) {
        // The buckets stay as they are: a reset is no way around them.
        self.wake = None;
    }
}
