//! Entropy device (virtio 1.2 §5.4): octets from the host's generator.

use super::device::{Context, Device, Progress};
use super::queue::{Chain, MAX_SIZE, QueueError};
use crate::vmm::memory;

/// Octets for one request at most; a driver asks again for more.
const MAX_REQUEST: usize = 64 * 1024;
/// Requests served before other devices get their turn.
const BATCH_REQUESTS: usize = 16;

/// The device.
#[derive(Debug, Default)]
pub struct Rng;

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
            if context.queues[index].pop(memory, &mut chain)? {
                let written = serve(&chain);
                context.queues[index].add_used(memory, chain.head, written)?;
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

    fn reset(&mut self) {}
}
