//! Network device (virtio 1.2 §5.1) over a TAP device of the host.
//!
//! Frames go straight between the TAP device and guest memory, one system call for each. What the guest sends is
//! checked first (`frame`): its hardware address and, where it has a fixed one, its IPv4 address cannot be forged, and
//! the host's kernel sees no virtio-net header that does not fit its frame. Token buckets bound octets and packets
//! each way.
//!
//! The TAP device is watched edge-triggered. While the device has no use for frames (no buffers, no tokens) they wait in
//! the TAP device's own queue; a full one drops without an event, so that a flood costs no more wake-ups than that queue
//! is long.

mod features;
mod frame;
mod room;
mod tap;

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::device::{Context, Device, Progress};
use super::queue::{Chain, MAX_SIZE, QueueError};
use super::rate::{Limiter, Limits, LimitsChange};
use super::timer::Timer;
use crate::wire::Fields;
use features::HEADER;
use frame::{CHECKED, ETHERNET, LONGEST, Rules};
use room::Room;

pub use frame::Refusal;
pub use tap::Tap;

/// Index of the queue of buffers for the guest's frames to come.
pub const RX: usize = 0;
/// Index of the queue of the guest's own frames.
pub const TX: usize = 1;

/// After this much in one direction, others get their turn.
const BATCH_OCTETS: usize = 2 << 20;
const BATCH_FRAMES: usize = 256;
/// After this much, the driver hears of what is done, although there is more: it can work meanwhile.
const ANNOUNCE_OCTETS: usize = 256 << 10;
/// What a frame for the guest takes at most, header and VLAN tag included. The host's kernel makes none longer: TAP
/// devices have no larger segments than 64 KiB.
const MOST: usize = HEADER + LONGEST + 4;
/// So many frames that fit the MTU, one after the other, make the device take fewer buffers ahead.
const QUIET_FRAMES: u32 = 64;
/// A guest that sent so many frames one at a time, with no longer pause between them, will send another at once.
const BURST_FRAMES: u32 = 16;
const BURST_PAUSE: Duration = Duration::from_micros(100);

/// Least MTU: the smallest datagram that IPv4 has to carry whole (RFC 791).
pub const MIN_MTU: u16 = 68;
/// Largest MTU that a TAP device has.
pub const MAX_MTU: u16 = 65_521;

/// What a guest's network is.
#[derive(Debug, Clone, Copy)]
pub struct NetConfig {
    /// The guest's hardware address; frames from any other are dropped.
    pub mac: [u8; 6],
    /// Most octets behind an Ethernet header, `MIN_MTU` to `MAX_MTU`.
    pub mtu: u16,
    /// The guest's IPv4 address. With one, only IPv4 and ARP from this address pass.
    pub ipv4: Option<Ipv4Addr>,
    /// Whether unfinished frames pass: without checksums, and longer than the MTU.
    pub offloads: bool,
    /// Bounds what the guest receives.
    pub rx: Limits,
    /// Bounds what the guest sends.
    pub tx: Limits,
}

/// What one direction carried; read by other threads.
#[derive(Debug, Default)]
pub struct Traffic {
    /// Octets of frames, without virtio-net headers.
    pub bytes: AtomicU64,
    /// Frames. One that is cut later counts once.
    pub packets: AtomicU64,
    /// How often the direction had to wait for tokens.
    pub waits: AtomicU64,
}

impl Traffic {
    fn count(&self, len: usize) {
        self.bytes.fetch_add(len as u64, Ordering::Relaxed);
        self.packets.fetch_add(1, Ordering::Relaxed);
    }
}

/// What the device did so far; read by other threads.
#[derive(Debug, Default)]
pub struct NetCounters {
    /// To the guest.
    pub rx: Traffic,
    /// From the guest.
    pub tx: Traffic,
    /// Frames for the guest that do not fit into its buffers.
    pub rx_dropped: AtomicU64,
    /// Frames of the guest that were dropped, in the order of `Refusal::ALL`.
    pub tx_dropped: [AtomicU64; Refusal::ALL.len()],
}

impl NetCounters {
    /// Adds the counters to a row of statistics.
    pub fn fields(&self, fields: Fields) -> Fields {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let fields = fields
            .with("net_rx_bytes", load(&self.rx.bytes))
            .with("net_rx_packets", load(&self.rx.packets))
            .with("net_rx_waits", load(&self.rx.waits))
            .with("net_rx_dropped", load(&self.rx_dropped))
            .with("net_tx_bytes", load(&self.tx.bytes))
            .with("net_tx_packets", load(&self.tx.packets))
            .with("net_tx_waits", load(&self.tx.waits));
        let dropped = Refusal::ALL.iter().zip(&self.tx_dropped);
        dropped.fold(fields, |fields, (refusal, count)| {
            fields.with(&format!("net_tx_dropped_{}", refusal.name()), load(count))
        })
    }
}

/// The device.
pub struct Net {
    tap: Tap,
    rules: Rules,
    offered: u64,
    /// What the driver took up.
    driver: u64,
    rx_limiter: Limiter,
    tx_limiter: Limiter,
    timer: Timer,
    /// Room to have ready for a frame. What is longer takes a detour.
    appetite: usize,
    /// Frames since the last one that was longer than the MTU.
    quiet: u32,
    /// Frames that the guest sent without a pause, and when it notified last.
    burst: u32,
    notified: Instant,
    /// Where a frame goes that is longer than the room that was ready for it. Untouched, it costs no memory.
    spare: Box<[u8]>,
    /// Octets of such a frame in `spare` that the guest is still to get; 0 when there is none.
    kept: usize,
    counters: Arc<NetCounters>,
    /// The TAP device failed, and the log says so.
    failed: bool,
    /// Frames wait, each way: the guest is a clone that is not told yet who it is.
    closed: bool,
}

impl Net {
    /// Makes the device over the host's end. Fails when the host has no descriptors left.
    pub fn new(tap: Tap, config: NetConfig) -> io::Result<Self> {
        let mut offered = features::MAC | features::MTU | features::STATUS | features::MRG_RXBUF;
        if config.offloads {
            offered |= features::OFFLOADS;
            if tap.has_uso() {
                offered |= features::USO;
            }
        }
        let now = Instant::now();
        Ok(Self {
            tap,
            rules: Rules { mac: config.mac, ipv4: config.ipv4, mtu: config.mtu },
            offered,
            driver: 0,
            rx_limiter: Limiter::new(config.rx, now),
            tx_limiter: Limiter::new(config.tx, now),
            timer: Timer::new()?,
            appetite: 0,
            quiet: 0,
            burst: 0,
            notified: now,
            spare: vec![0; MOST].into(),
            kept: 0,
            counters: Arc::default(),
            failed: false,
            closed: false,
        })
    }

    /// The device's counters.
    pub fn counters(&self) -> Arc<NetCounters> {
        Arc::clone(&self.counters)
    }

    /// Changes the limits of frames to the guest and from it. A direction that waits goes on with the next event.
    pub fn change_limits(&mut self, rx: LimitsChange, tx: LimitsChange) {
        let now = Instant::now();
        self.rx_limiter.change(rx, now);
        self.tx_limiter.change(tx, now);
        self.timer.arm(now, now);
    }

    /// Lets no frames pass any more, or again; then `receive` and `transmit` are to be called.
    pub fn set_closed(&mut self, closed: bool) {
        self.closed = closed;
    }

    /// Readable when frames have come: then `receive`.
    pub fn tap_fd(&self) -> RawFd {
        self.tap.fd()
    }

    /// Readable when there are tokens again: then `timer_event`, `receive` and `transmit`.
    pub fn timer_fd(&self) -> RawFd {
        self.timer.fd()
    }

    /// Takes the event of the timer.
    pub fn timer_event(&mut self) {
        self.timer.went_off();
    }

    /// What a frame of the MTU takes in the guest's buffers.
    fn usual(&self) -> usize {
        HEADER + ETHERNET + 4 + usize::from(self.rules.mtu)
    }

    /// Whether a direction has to wait for tokens; then the timer is armed.
    fn must_wait(limiter: &mut Limiter, now: Option<Instant>, timer: &mut Timer, traffic: &Traffic) -> bool {
        let Some((now, wait)) = now.and_then(|now| Some((now, limiter.wait(now)?))) else { return false };
        timer.arm(now + wait, now);
        traffic.waits.fetch_add(1, Ordering::Relaxed);
        true
    }

    /// Gives the guest the frames that have come, as long as it has buffers.
    pub fn receive(&mut self, context: &mut Context<'_>) -> Result<Progress, QueueError> {
        if self.closed {
            return Ok(Progress::Idle);
        }
        let mut room = Room::default();
        let progress = self.fill(context, &mut room)?;
        room.put_back(&mut context.queues[RX]);
        context.interrupt_for(RX)?;
        Ok(progress)
    }

    fn fill<'m>(&mut self, context: &mut Context<'m>, room: &mut Room<'m>) -> Result<Progress, QueueError> {
        let memory = context.memory;
        let merge = self.driver & features::MRG_RXBUF != 0;
        let now = self.rx_limiter.is_limited().then(Instant::now);
        let (mut octets, mut announced) = (0, 0);
        for _ in 0..BATCH_FRAMES {
            if octets >= BATCH_OCTETS {
                break;
            }
            if Self::must_wait(&mut self.rx_limiter, now, &mut self.timer, &self.counters.rx) {
                return Ok(Progress::Idle);
            }
            let wanted = if self.kept == 0 { self.appetite } else { self.kept };
            room.gather(&mut context.queues[RX], memory, wanted, merge)?;
            if room.is_empty() {
                // What the guest has is announced first, so that it can give it back.
                context.interrupt_for(RX)?;
                if !context.queues[RX].enable_notifications(memory)? {
                    return Ok(Progress::Idle);
                }
                continue;
            }
            let len = if self.kept == 0 {
                match self.read(room, merge) {
                    Read::Frame(len) => len,
                    Read::None => return Ok(Progress::Idle),
                    Read::Kept => continue,
                    Read::Dropped => {
                        self.counters.rx_dropped.fetch_add(1, Ordering::Relaxed);
                        continue;
                    }
                }
            } else if room.len() >= self.kept {
                room.copy_from(&self.spare[..self.kept]);
                std::mem::take(&mut self.kept)
            } else if room.is_all(&context.queues[RX]) {
                // All buffers that the guest can give are not enough.
                self.kept = 0;
                self.counters.rx_dropped.fetch_add(1, Ordering::Relaxed);
                continue;
            } else {
                room.put_back(&mut context.queues[RX]);
                context.interrupt_for(RX)?;
                if !context.queues[RX].enable_notifications_of_more(memory)? {
                    return Ok(Progress::Idle);
                }
                continue;
            };
            room.give(&mut context.queues[RX], memory, len)?;
            let frame = len - HEADER;
            self.counters.rx.count(frame);
            // How many packets a long frame stands for is not known here for certain: at least these.
            self.rx_limiter.take(frame as u64, len.div_ceil(self.usual()) as u64);
            self.grow_or_shrink(len);
            octets += len;
            if octets - announced >= ANNOUNCE_OCTETS {
                announced = octets;
                context.interrupt_for(RX)?;
            }
        }
        Ok(Progress::More)
    }

    /// Reads a frame into the room that is ready.
    fn read(&mut self, room: &Room<'_>, merge: bool) -> Read {
        let ready = room.len();
        let overflow = ready.min(MOST);
        match self.tap.receive(room.slices(), &mut self.spare[overflow..]) {
            Ok(None) => Read::None,
            Ok(Some(len)) if len < HEADER + ETHERNET => Read::Dropped,
            Ok(Some(len)) if len <= ready => Read::Frame(len),
            Ok(Some(_)) if !merge => Read::Dropped,
            Ok(Some(len)) => {
                // The whole frame is put together in one place, and the buffers go back to the queue.
                room.copy_to(&mut self.spare[..overflow]);
                self.kept = len;
                self.appetite = MOST;
                Read::Kept
            }
            Err(e) => {
                if !std::mem::replace(&mut self.failed, true) {
                    log::warn!("net: the TAP device gives no more frames: {e}");
                }
                Read::None
            }
        }
    }

    /// How much room is good to have ready depends on what comes.
    fn grow_or_shrink(&mut self, len: usize) {
        let usual = self.usual();
        if len > usual {
            (self.appetite, self.quiet) = (MOST, 0);
        } else if self.appetite > usual {
            self.quiet += 1;
            if self.quiet >= QUIET_FRAMES {
                self.appetite = usual;
            }
        }
    }

    /// Takes frames of the guest.
    pub fn transmit(&mut self, context: &mut Context<'_>) -> Result<Progress, QueueError> {
        if self.closed {
            return Ok(Progress::Idle);
        }
        let memory = context.memory;
        let notified = Instant::now();
        let now = self.tx_limiter.is_limited().then_some(notified);
        if notified - std::mem::replace(&mut self.notified, notified) > BURST_PAUSE {
            self.burst = 0;
        }
        let mut chain = Chain::default();
        let (mut octets, mut announced, mut yielded) = (0, 0, false);
        for _ in 0..BATCH_FRAMES {
            if octets >= BATCH_OCTETS {
                break;
            }
            if Self::must_wait(&mut self.tx_limiter, now, &mut self.timer, &self.counters.tx) {
                context.interrupt_for(TX)?;
                return Ok(Progress::Idle);
            }
            if !context.queues[TX].pop(memory, &mut chain)? {
                context.interrupt_for(TX)?;
                if self.burst >= BURST_FRAMES && !std::mem::replace(&mut yielded, true) {
                    // A processor that does both is better spent on the guest for a while: a notification, which
                    // takes it away again, costs more than a frame.
                    std::thread::yield_now();
                    continue;
                }
                if !context.queues[TX].enable_notifications(memory)? {
                    return Ok(Progress::Idle);
                }
                continue;
            }
            self.send(&chain);
            self.burst = self.burst.saturating_add(1);
            yielded = false;
            context.queues[TX].add_used(memory, chain.head, 0)?;
            octets += chain.readable.len();
            if octets - announced >= ANNOUNCE_OCTETS {
                announced = octets;
                context.interrupt_for(TX)?;
            }
        }
        context.interrupt_for(TX)?;
        Ok(Progress::More)
    }

    /// Sends one frame, or drops it and counts why.
    fn send(&mut self, chain: &Chain<'_>) {
        let whole = chain.readable.len();
        let len = whole.saturating_sub(HEADER);
        let mut octets = [0; HEADER + CHECKED];
        let copied = chain.readable.copy_to(0, &mut octets);
        let head = &mut octets[..copied];
        let passed = self.rules.check(head, len, self.driver).and_then(|packets| {
            // Interfaces that are down or full take no frame; the guest sees a loss, as on any wire.
            self.tap.send(head, chain.readable.parts(copied..whole)).map_err(|_| Refusal::Host)?;
            Ok(packets)
        });
        match passed {
            Ok(packets) => {
                self.counters.tx.count(len);
                self.tx_limiter.take(len as u64, packets);
            }
            Err(refusal) => {
                self.counters.tx_dropped[refusal as usize].fetch_add(1, Ordering::Relaxed);
                // Nobody gets past the limits by sending what is dropped.
                self.tx_limiter.take(len as u64, 1);
            }
        }
    }
}

/// What a read of the TAP device led to.
enum Read {
    /// A frame of that length, header included, in the room that was ready.
    Frame(usize),
    /// A longer one, that is now in `spare`.
    Kept,
    /// One that the guest cannot get.
    Dropped,
    /// There is none.
    None,
}

impl Device for Net {
    const TYPE: u32 = 1;
    const QUEUES: &'static [u16] = &[MAX_SIZE, MAX_SIZE];

    fn features(&self) -> u64 {
        self.offered
    }

    /// `struct virtio_net_config`, §5.1.4, up to and with the MTU. The link is always up.
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 12];
        config[..6].copy_from_slice(&self.rules.mac);
        config[6..8].copy_from_slice(&1u16.to_le_bytes());
        config[10..12].copy_from_slice(&self.rules.mtu.to_le_bytes());
        config
    }

    fn activate(&mut self, driver: u64) {
        self.driver = driver;
        self.appetite = self.usual();
        if let Err(e) = self.tap.take_offloads(driver) {
            log::warn!("net: the TAP device does not take the driver's offloads {driver:#x}: {e}");
        }
    }

    fn queue_notified(&mut self, context: &mut Context<'_>, index: usize) -> Result<Progress, QueueError> {
        if index == RX { self.receive(context) } else { self.transmit(context) }
    }

    fn reset(&mut self) {
        self.driver = 0;
        self.kept = 0;
    }
}

#[cfg(test)]
mod tests;
