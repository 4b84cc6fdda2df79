//! Vsock device (virtio 1.2 §5.10), terminated here: a guest's stream sockets end in Unix sockets that the
//! worker's links hand over. No host kernel vsock is involved.

mod connection;
mod muxer;
mod packet;

use std::io;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::device::{Context, Device, Progress};
use super::queue::{Chain, MAX_SIZE, QueueError};
use super::segments::Segments;
use connection::Connection;
use muxer::Muxer;
use packet::{HEADER, Header, Op};

pub use muxer::{HELD_PORT, MAX_CONNECTIONS, MAX_HELD, MAX_WAITERS};
pub use packet::HOST_CID;

const RX: usize = 0;
const TX: usize = 1;
const EVENTS: usize = 2;

/// `struct virtio_vsock_event` (§5.10.6.7) of a guest that was moved or restored: its connections are gone, and its
/// context identifier may be another.
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();

/// Guest buffers that one read of a link fills at most. Linux makes them 4 KiB each, so this is what makes a
/// stream to the guest cost few system calls.
const BURST_BUFFERS: usize = 64;
/// Octets moved in one direction before other devices get their turn.
const BATCH_OCTETS: usize = 2 << 20;
/// Packets taken from the guest before other devices get their turn.
const BATCH_PACKETS: usize = 256;

/// What the device did so far; read by other threads.
#[derive(Debug, Default)]
pub struct VsockCounters {
    /// Octets of data that the guest received.
    pub rx_bytes: AtomicU64,
    /// Octets of data that the guest sent.
    pub tx_bytes: AtomicU64,
    /// Packets that the guest received.
    pub rx_packets: AtomicU64,
    /// Packets that the guest sent.
    pub tx_packets: AtomicU64,
    /// Connections open now.
    pub connections: AtomicU64,
}

/// The device.
pub struct Vsock {
    guest_cid: u64,
    muxer: Muxer,
    counters: Arc<VsockCounters>,
    /// Packets of the guest wait until resets have gone out.
    stalled: bool,
    /// The guest is to hear that its connections are gone, and has given no buffer for it yet.
    reset_owed: bool,
}

impl Vsock {
    /// The device of a guest with that context identifier (3 or more).
    pub fn new(guest_cid: u64) -> io::Result<Self> {
        Ok(Self {
            guest_cid,
            muxer: Muxer::new(guest_cid)?,
            counters: Arc::default(),
            stalled: false,
            reset_owed: false,
        })
    }

    /// The device's counters.
    pub fn counters(&self) -> Arc<VsockCounters> {
        Arc::clone(&self.counters)
    }

    /// Readable when links have events: then `link_events` and `pump`.
    pub fn epoll_fd(&self) -> RawFd {
        self.muxer.epoll_fd()
    }

    /// See `Muxer::connect`; then `pump`.
    pub fn connect(&mut self, port: u32, link: UnixStream, tag: String, early: Vec<u8>) {
        self.muxer.connect(port, link, tag, early, Instant::now());
    }

    /// See `Muxer::accept`; then `pump`.
    pub fn accept(&mut self, port: u32, link: UnixStream, tag: String, early: Vec<u8>) {
        self.muxer.accept(port, link, tag, early, Instant::now());
    }

    /// Takes the events of the links.
    pub fn link_events(&mut self) {
        self.muxer.link_events();
    }

    /// Ends what has waited too long, and says when to come again.
    pub fn expire(&mut self, now: Instant) -> Option<Instant> {
        self.muxer.expire(now);
        self.muxer.next_deadline()
    }

    /// When `expire` has something to do next.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.muxer.next_deadline()
    }

    /// Connections at present, in all states.
    pub fn connections(&self) -> usize {
        self.muxer.connections()
    }

    /// Tells the guest that its connections are gone (§5.10.6.7), at once or as soon as it has a buffer for that. For
    /// after a restore, before the guest runs: it then connects anew. Requests that it has not seen yet and links that
    /// wait for it are for the restored guest and stay; any connection is ended.
    ///
    /// Until the guest has taken note (it gives another buffer, or connects), it gets nothing else, and what it still
    /// sends on its old connections is dropped: a reset of one of them would look like its peer's, and a connection that
    /// is made meanwhile would be taken for an old one.
    ///
    /// # Errors
    /// When the event queue or a buffer in it breaks the rules; that stops the device.
    pub fn transport_reset(&mut self, context: &mut Context<'_>) -> Result<(), QueueError> {
        self.muxer.driver_gone();
        self.muxer.hush(true);
        self.reset_owed = true;
        self.tell_reset(context)
    }

    /// Gives the guest the event that it is owed.
    fn tell_reset(&mut self, context: &mut Context<'_>) -> Result<(), QueueError> {
        let mut chain = Chain::default();
        while self.reset_owed {
            if context.queues[EVENTS].pop(context.memory, &mut chain)? {
                let len = TRANSPORT_RESET.len();
                if chain.writable.len() < len {
                    return Err(QueueError::TooSmall { len: chain.writable.len(), least: len });
                }
                chain.writable.copy_from(0, &TRANSPORT_RESET);
                context.queues[EVENTS].add_used(context.memory, chain.head, len as u32)?;
                self.reset_owed = false;
                // From here on another buffer is an answer.
                context.queues[EVENTS].enable_notifications_of_more(context.memory)?;
            } else if !context.queues[EVENTS].enable_notifications(context.memory)? {
                break;
            }
        }
        context.interrupt_for(EVENTS)
    }

    /// The guest gave buffers for events.
    fn event_buffers(&mut self, context: &mut Context<'_>) -> Result<(), QueueError> {
        if self.reset_owed {
            self.tell_reset(context)
        } else if self.muxer.is_hushed() && context.queues[EVENTS].enable_notifications_of_more(context.memory)? {
            self.muxer.hush(false);
            Ok(())
        } else {
            Ok(())
        }
    }

    /// Gives the guest what there is for it, as long as it has buffers.
    pub fn pump(&mut self, context: &mut Context<'_>) -> Result<Progress, QueueError> {
        if self.muxer.is_hushed() {
            return Ok(Progress::Idle);
        }
        let mut burst = Burst::default();
        let mut octets = 0;
        let progress = loop {
            if octets >= BATCH_OCTETS {
                break Progress::More;
            }
            match self.give(context, &mut burst)? {
                Given::Octets(n) => octets += n + HEADER,
                Given::Nothing => break Progress::Idle,
                Given::NoBuffer => {
                    // What it has is announced first, so that it can give it back.
                    context.interrupt_for(RX)?;
                    if !context.queues[RX].enable_notifications(context.memory)? {
                        break Progress::Idle;
                    }
                }
            }
        };
        context.interrupt_for(RX)?;
        self.counters.connections.store(self.muxer.connections() as u64, Ordering::Relaxed);
        // Room for more resets: packets of the guest can be taken again.
        let resume = self.stalled && self.muxer.takes_packets();
        Ok(if resume { Progress::More } else { progress })
    }

    /// Gives the guest one reset, one control packet or one burst of data.
    fn give<'m>(&mut self, context: &mut Context<'m>, burst: &mut Burst<'m>) -> Result<Given, QueueError> {
        burst.clear();
        if let Some(header) = self.muxer.next_reset() {
            if !burst.gather(context, 0)? {
                return Ok(Given::NoBuffer);
            }
            self.muxer.reset_sent();
            burst.finish(context, 0, |_| header)?;
            self.counters.rx_packets.fetch_add(1, Ordering::Relaxed);
            return Ok(Given::Octets(0));
        }
        let cid = self.guest_cid;
        let Some((id, connection)) = self.muxer.next_ready() else { return Ok(Given::Nothing) };
        let control = connection.owes_control();
        let wanted = if control { 0 } else { connection.appetite() };
        if !burst.gather(context, wanted)? {
            self.muxer.put_back(id);
            return Ok(Given::NoBuffer);
        }
        let octets = if control {
            match connection.next_control(cid) {
                Some(header) => burst.finish(context, 0, |_| header)?,
                None => burst.abandon(context),
            };
            0
        } else {
            match connection.has_data().then(|| connection.receive(&burst.room, wanted)).flatten() {
                Some(n) => {
                    let packets = burst.finish(context, n, |len| data_header(connection, cid, len))?;
                    self.counters.rx_packets.fetch_add(packets as u64, Ordering::Relaxed);
                    self.counters.rx_bytes.fetch_add(n as u64, Ordering::Relaxed);
                    n
                }
                None => burst.abandon(context),
            }
        };
        self.muxer.put_back(id);
        Ok(Given::Octets(octets))
    }

    /// Takes packets of the guest.
    fn take(&mut self, context: &mut Context<'_>) -> Result<Progress, QueueError> {
        let memory = context.memory;
        let now = Instant::now();
        self.stalled = false;
        let mut chain = Chain::default();
        let mut octets = 0;
        for _ in 0..BATCH_PACKETS {
            if octets >= BATCH_OCTETS {
                break;
            }
            if !self.muxer.takes_packets() {
                self.stalled = true;
                context.interrupt_for(TX)?;
                return Ok(Progress::Idle);
            }
            if !context.queues[TX].pop(memory, &mut chain)? {
                context.interrupt_for(TX)?;
                if !context.queues[TX].enable_notifications(memory)? {
                    return Ok(Progress::Idle);
                }
                continue;
            }
            let data = self.muxer.packet(&chain.readable, now);
            octets += data;
            self.counters.tx_packets.fetch_add(1, Ordering::Relaxed);
            self.counters.tx_bytes.fetch_add(data as u64, Ordering::Relaxed);
            context.queues[TX].add_used(memory, chain.head, 0)?;
        }
        context.interrupt_for(TX)?;
        Ok(Progress::More)
    }
}

fn data_header(connection: &mut Connection, cid: u64, len: usize) -> Header {
    connection.header(cid, Op::Data, len as u32)
}

enum Given {
    /// A packet or more, with that much data.
    Octets(usize),
    /// There is nothing to give.
    Nothing,
    /// The guest has no buffer for it.
    NoBuffer,
}

/// Receive buffers of the guest, taken together so that one read of a link fills them all.
#[derive(Default)]
struct Burst<'m> {
    /// Taken from the queue, in order; the first `taken` are in use, the rest are kept for their allocations.
    chains: Vec<Chain<'m>>,
    taken: usize,
    /// Room for data: all buffers without the space for their headers.
    room: Segments<'m>,
}

impl<'m> Burst<'m> {
    fn clear(&mut self) {
        self.taken = 0;
        self.room.clear();
    }

    /// Takes a buffer, and more of them until there is room for `wanted` octets. `false`: there is none.
    fn gather(&mut self, context: &mut Context<'m>, wanted: usize) -> Result<bool, QueueError> {
        let memory = context.memory;
        while self.taken == 0 || (self.room.len() < wanted && self.taken < BURST_BUFFERS) {
            if self.taken == self.chains.len() {
                self.chains.push(Chain::default());
            }
            let chain = &mut self.chains[self.taken];
            if !context.queues[RX].pop(memory, chain)? {
                break;
            }
            // With no room for an octet beside the header, no data would ever go through.
            if chain.writable.len() <= HEADER {
                return Err(QueueError::TooSmall { len: chain.writable.len(), least: HEADER + 1 });
            }
            for part in chain.writable.parts(HEADER..chain.writable.len()) {
                self.room.push(part);
            }
            self.taken += 1;
        }
        Ok(self.taken > 0)
    }

    /// Writes headers for `octets` of data that were put into `room`, gives those buffers to the guest, and the
    /// rest back to the queue; gives the number of packets. Without data, one packet goes out.
    fn finish(
        &mut self,
        context: &mut Context<'m>,
        octets: usize,
        mut header: impl FnMut(usize) -> Header,
    ) -> Result<usize, QueueError> {
        let (mut left, mut packets) = (octets, 0);
        for chain in &self.chains[..self.taken] {
            if left == 0 && packets > 0 {
                break;
            }
            let len = left.min(chain.writable.len() - HEADER);
            left -= len;
            packets += 1;
            chain.writable.copy_from(0, &header(len).encode());
            context.queues[RX].add_used(context.memory, chain.head, (HEADER + len) as u32)?;
        }
        context.queues[RX].undo_pop((self.taken - packets) as u16);
        Ok(packets)
    }

    /// Gives all buffers back to the queue.
    fn abandon(&mut self, context: &mut Context<'m>) -> usize {
        context.queues[RX].undo_pop(self.taken as u16);
        0
    }
}

impl Device for Vsock {
    const TYPE: u32 = 19;
    const QUEUES: &'static [u16] = &[MAX_SIZE, MAX_SIZE, MAX_SIZE];

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> Vec<u8> {
        self.guest_cid.to_le_bytes().to_vec()
    }

    /// Buffers of the event queue wait for a restore.
    fn queue_notified(&mut self, context: &mut Context<'_>, index: usize) -> Result<Progress, QueueError> {
        if index == EVENTS {
            self.event_buffers(context)?;
        }
        let taken = if index == TX || self.stalled { self.take(context)? } else { Progress::Idle };
        // Packets of the guest make answers.
        let given = self.pump(context)?;
        Ok(if taken == Progress::More || given == Progress::More { Progress::More } else { Progress::Idle })
    }

    fn reset(&mut self) {
        self.stalled = false;
        // A driver that begins anew has no connections to lose.
        self.reset_owed = false;
        self.muxer.hush(false);
        self.muxer.driver_gone();
    }
}

#[cfg(test)]
mod tests;
