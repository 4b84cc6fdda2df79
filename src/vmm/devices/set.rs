//! The devices of one guest, wired together: what the vCPU threads, the device thread and the worker's links
//! call.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use vmm_sys_util::eventfd::EventFd;

use super::balloon::{Balloon, BalloonCounters, MemoryStatistics};
use super::block::{Block, BlockCounters};
use super::device::Progress;
use super::disk::Disk;
use super::mmio::{self, MmioTransport, WINDOW, Window};
use super::net::{self, Net, NetConfig, NetCounters, Tap};
use super::rate::{Limiter, Limits, LimitsChange};
use super::rng::Rng;
use super::serial::{self, Serial};
use super::timer::Timer;
use super::vsock::{HOST_CID, Vsock, VsockCounters};
use crate::storage::medium::Medium;
use crate::storage::overlay::{Overlay, OverlayError};
use crate::storage::raw::RawDisk;
use crate::vmm::memory::GuestMemory;
use crate::vmm::snapshot::{Saved, SavedError};
use crate::wire::Fields;

/// Guest-physical start of the first virtio-mmio window; the others follow.
pub const MMIO_BASE: u64 = 0xd000_0000;
/// Interrupt of the first window; the others follow.
pub const FIRST_GSI: u32 = 5;
/// First I/O port of COM1.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Interrupt of COM1.
pub const SERIAL_GSI: u32 = 4;
/// Name of the root disk.
pub const ROOT: &str = "root";

/// What the devices work on. All descriptors come from the supervisor.
#[derive(Debug)]
pub struct DeviceConfig {
    /// The template's root disk, readable.
    pub base: File,
    /// The sandbox's overlay, readable and writable.
    pub overlay: File,
    /// The frozen layers below it, readable, newest first; at most `MAX_LAYERS`.
    pub layers: Vec<File>,
    /// Further disks, in the guest's order.
    pub disks: Vec<ExtraDisk>,
    /// For all disks together.
    pub disk_limits: Limits,
    /// An open queue of a TAP device, and the network on it; none without.
    pub net: Option<(OwnedFd, NetConfig)>,
    /// The console log, opened `O_RDWR | O_APPEND`.
    pub serial: File,
    /// The guest's vsock context identifier, 3 to 2^32 - 2.
    pub cid: u32,
}

/// A disk beside the root disk.
#[derive(Debug)]
pub struct ExtraDisk {
    /// Its serial number in the guest, at most `block::ID_LEN` octets.
    pub name: String,
    /// A regular file or a block device; readable, and writable unless `read_only`.
    pub file: File,
    /// The guest must not change it.
    pub read_only: bool,
}

/// Most disks beside the root disk.
pub const MAX_EXTRA_DISKS: usize = 8;

/// Why the devices could not be made.
#[derive(Debug)]
pub enum DeviceError {
    /// The root disk.
    Overlay(OverlayError),
    /// Another disk.
    Disk {
        /// Its name.
        name: String,
        /// Why it cannot be served.
        cause: io::Error,
    },
    /// A context identifier that is not a guest's.
    Cid {
        /// As given.
        cid: u32,
    },
    /// The host could not do it.
    Io {
        /// What was being done.
        doing: &'static str,
        /// The host's reason.
        cause: io::Error,
    },
}

impl fmt::Display for DeviceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Overlay(cause) => cause.fmt(f),
            Self::Disk { name, cause } => write!(f, "disk {name}: {cause}"),
            Self::Cid { cid } => write!(f, "vsock cid {cid}: must be from 3 to {}", u32::MAX - 1),
            Self::Io { doing, cause } => write!(f, "{doing}: {cause}"),
        }
    }
}

impl std::error::Error for DeviceError {}

fn while_doing(doing: &'static str) -> impl FnOnce(io::Error) -> DeviceError {
    move |cause| DeviceError::Io { doing, cause }
}

/// Where a virtio-mmio device is, for KVM and ACPI.
#[derive(Clone, Copy)]
pub struct WindowInfo<'a> {
    /// Guest-physical start; `mmio::WINDOW` octets long.
    pub base: u64,
    /// Interrupt.
    pub gsi: u32,
    /// For an irqfd on `gsi`.
    pub interrupt: &'a EventFd,
    /// For ioeventfds at `base + mmio::QUEUE_NOTIFY`, four octets wide; the index of each is its datamatch.
    pub queue_events: &'a [EventFd],
}

/// What the devices did so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DeviceStats {
    /// Octets that the guest read from its disks.
    pub block_read_bytes: u64,
    /// Octets that the guest wrote to its disks.
    pub block_written_bytes: u64,
    /// Disk requests of all kinds.
    pub block_requests: u64,
    /// Disk flushes.
    pub block_flushes: u64,
    /// Disk requests that failed.
    pub block_errors: u64,
    /// Octets of vsock data to the guest.
    pub vsock_rx_bytes: u64,
    /// Octets of vsock data from the guest.
    pub vsock_tx_bytes: u64,
    /// Vsock packets to the guest.
    pub vsock_rx_packets: u64,
    /// Vsock packets from the guest.
    pub vsock_tx_packets: u64,
    /// Vsock connections now.
    pub vsock_connections: u64,
    /// Octets that the balloon is to hold.
    pub balloon_target_bytes: u64,
    /// Octets that it holds, as the guest says.
    pub balloon_bytes: u64,
    /// Octets that the guest reported free and the host let go, in all.
    pub balloon_reported_bytes: u64,
    /// Pages and ranges that could not be let go.
    pub balloon_refused: u64,
    /// Octets that the guest was sent on its serial port.
    pub serial_in_bytes: u64,
    /// Octets that there was no room for.
    pub serial_overruns: u64,
    /// Octets that the guest printed too fast to be logged.
    pub serial_dropped_bytes: u64,
    /// What the guest's kernel said last of its memory, and when.
    pub memory: Option<(MemoryStatistics, Instant)>,
}

/// What a token of the device thread stands for.
#[derive(Debug, Clone, Copy)]
enum Source {
    VsockLinks,
    VsockTimer,
    Tap,
    NetTimer,
    RngTimer,
    Queue { window: usize, queue: usize },
}

/// How long an orderly end waits for disks: less than the supervisor waits for the worker.
const DISK_END: Duration = Duration::from_secs(2);

/// The devices. vCPU threads call the bus methods; the device thread calls everything else. Disks are served by
/// threads of their own.
pub struct DeviceSet {
    memory: GuestMemory,
    /// In the order of the guest's addresses, which is the order of its drivers' probes.
    windows: Vec<Arc<dyn Window>>,
    /// The root disk first.
    disks: Vec<Disk>,
    /// Of all disks together.
    disk_limiter: Arc<Mutex<Limiter>>,
    vsock: Arc<MmioTransport<Vsock>>,
    rng: Arc<MmioTransport<Rng>>,
    balloon: Arc<MmioTransport<Balloon>>,
    net: Option<Arc<MmioTransport<Net>>>,
    serial: Serial,
    vsock_timer: Mutex<Timer>,
    rng_timer: Mutex<Timer>,
    vsock_counters: Arc<VsockCounters>,
    balloon_counters: Arc<BalloonCounters>,
    net_counters: Option<Arc<NetCounters>>,
    /// What the device thread watches; tokens count from `first_token` in this order.
    sources: Vec<(RawFd, Source)>,
    first_token: Mutex<usize>,
}

/// Indices of devices in `windows`.
const VSOCK_WINDOW: usize = 1;
const RNG_WINDOW: usize = 2;

impl DeviceSet {
    /// Makes the devices: block, vsock, rng, balloon, net where there is one, and the serial port.
    pub fn new(memory: &GuestMemory, config: DeviceConfig) -> Result<Self, DeviceError> {
        if u64::from(config.cid) <= HOST_CID || config.cid == u32::MAX {
            return Err(DeviceError::Cid { cid: config.cid });
        }
        let overlay = Overlay::open(config.overlay, config.layers, config.base).map_err(DeviceError::Overlay)?;
        let vsock = Vsock::new(u64::from(config.cid)).map_err(while_doing("making the vsock device"))?;
        let vsock_counters = vsock.counters();
        let transport = "making a virtio-mmio transport";
        let limiter = Arc::new(Mutex::new(Limiter::new(config.disk_limits, Instant::now())));
        let start = |name: &str, medium| {
            let started = Disk::start(memory.clone(), name, Block::new(medium, name).limited(&limiter));
            started.map_err(while_doing("starting a disk's thread"))
        };
        let mut disks = vec![start(ROOT, Medium::Overlay(overlay))?];
        for ExtraDisk { name, file, read_only } in config.disks {
            match RawDisk::open(file, read_only) {
                Ok(disk) => disks.push(start(&name, Medium::Raw(disk))?),
                Err(cause) => return Err(DeviceError::Disk { name, cause }),
            }
        }
        let vsock = Arc::new(MmioTransport::new(memory.clone(), vsock).map_err(while_doing(transport))?);
        let rng = Arc::new(MmioTransport::new(memory.clone(), Rng::new()).map_err(while_doing(transport))?);
        let balloon = Balloon::new(memory.size());
        let balloon_counters = balloon.counters();
        let balloon = Arc::new(MmioTransport::new(memory.clone(), balloon).map_err(while_doing(transport))?);
        let net = match config.net {
            Some((tap, network)) => {
                let tap = Tap::new(tap).map_err(while_doing("taking the TAP device"))?;
                Some(Net::new(tap, network).map_err(while_doing("making the network device"))?)
            }
            None => None,
        };
        let net_counters = net.as_ref().map(Net::counters);
        let net = net.map(|net| MmioTransport::new(memory.clone(), net)).transpose();
        let net = net.map_err(while_doing(transport))?.map(Arc::new);
        let vsock_timer = Timer::new().map_err(while_doing("making a timer"))?;
        let rng_timer = Timer::new().map_err(while_doing("making a timer"))?;
        let serial = Serial::new(config.serial).map_err(while_doing("making the serial port"))?;
        let mut shared: Vec<Arc<dyn Window>> = vec![vsock.clone(), rng.clone(), balloon.clone()];
        shared.extend(net.iter().map(|net| net.clone() as Arc<dyn Window>));
        // Linux names disks in the order of their windows: the root disk is the first, others follow at the end.
        let (root, extra) = disks.split_at(1);
        let windows: Vec<Arc<dyn Window>> =
            root.iter().map(Disk::window).chain(shared.clone()).chain(extra.iter().map(Disk::window)).collect();

        let mut sources = vec![
            (vsock.with_device(|vsock| vsock.epoll_fd()), Source::VsockLinks),
            (vsock_timer.fd(), Source::VsockTimer),
            (rng_timer.fd(), Source::RngTimer),
        ];
        if let Some(net) = &net {
            let (tap, timer) = net.with_device(|net| (net.tap_fd(), net.timer_fd()));
            sources.extend([(tap, Source::Tap), (timer, Source::NetTimer)]);
        }
        for (window, device) in shared.iter().enumerate().map(|(n, device)| (n + root.len(), device)) {
            for (queue, event) in device.queue_events().iter().enumerate() {
                sources.push((event.as_raw_fd(), Source::Queue { window, queue }));
            }
        }
        Ok(Self {
            memory: memory.clone(),
            windows,
            disks,
            disk_limiter: limiter,
            vsock,
            rng,
            balloon,
            net,
            serial,
            vsock_timer: Mutex::new(vsock_timer),
            rng_timer: Mutex::new(rng_timer),
            vsock_counters,
            balloon_counters,
            net_counters,
            sources,
            first_token: Mutex::new(usize::MAX),
        })
    }

    // ---- Wiring ----

    /// The virtio-mmio devices in their order.
    pub fn windows(&self) -> Vec<WindowInfo<'_>> {
        let places = (MMIO_BASE..).step_by(WINDOW as usize).zip(FIRST_GSI..);
        let windows = self.windows.iter().zip(places);
        windows
            .map(|(window, (base, gsi))| WindowInfo {
                base,
                gsi,
                interrupt: window.interrupt(),
                queue_events: window.queue_events(),
            })
            .collect()
    }

    /// For an irqfd on `SERIAL_GSI`.
    pub fn serial_interrupt(&self) -> &EventFd {
        self.serial.interrupt()
    }

    /// Registers everything that the device thread is to watch, under tokens from `first` on; gives the first
    /// token that is free again.
    pub fn register(&self, registry: &Registry, first: usize) -> io::Result<usize> {
        for (index, (fd, _)) in self.sources.iter().enumerate() {
            registry.register(&mut SourceFd(fd), Token(first + index), Interest::READABLE)?;
        }
        *self.first_token.lock().unwrap_or_else(PoisonError::into_inner) = first;
        Ok(first + self.sources.len())
    }

    /// Handles an event of the device thread's loop; `false` when the token is not one of the devices'.
    /// Work is bounded: a device with more to do makes its own event ready again.
    pub fn handle(&self, token: Token) -> bool {
        let first = *self.first_token.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(index) = token.0.checked_sub(first) else { return false };
        let Some(&(_, source)) = self.sources.get(index) else { return false };
        match source {
            Source::VsockLinks => {
                self.vsock.with_device(Vsock::link_events);
                self.pump_vsock();
            }
            Source::VsockTimer => {
                self.vsock_timer.lock().unwrap_or_else(PoisonError::into_inner).went_off();
                self.vsock.with_device(|vsock| vsock.expire(Instant::now()));
                self.pump_vsock();
            }
            Source::Tap => self.receive_frames(),
            Source::NetTimer => {
                if let Some(net) = &self.net {
                    net.with_device(Net::timer_event);
                    // Whichever direction waits for tokens.
                    net.kick(net::TX);
                    self.receive_frames();
                }
            }
            Source::RngTimer => {
                self.rng_timer.lock().unwrap_or_else(PoisonError::into_inner).went_off();
                self.rng.kick(0);
            }
            Source::Queue { window, queue } => {
                self.windows[window].serve(queue);
                match window {
                    VSOCK_WINDOW => self.arm_vsock_timer(),
                    RNG_WINDOW => self.arm_rng_timer(),
                    _ => {}
                }
            }
        }
        true
    }

    // ---- The bus, from vCPU threads ----

    fn window_at(&self, addr: u64) -> Option<(&dyn Window, u64)> {
        let offset = addr.checked_sub(MMIO_BASE)?;
        let window = self.windows.get((offset / WINDOW) as usize)?;
        Some((window.as_ref(), offset % WINDOW))
    }

    /// A read of guest-physical memory that is no RAM. `false` when no device is there; `into` is then all ones.
    pub fn mmio_read(&self, addr: u64, into: &mut [u8]) -> bool {
        match self.window_at(addr) {
            Some((window, offset)) => {
                window.read(offset, into);
                true
            }
            None => {
                into.fill(0xff);
                false
            }
        }
    }

    /// A write to guest-physical memory that is no RAM. `false` when no device is there.
    pub fn mmio_write(&self, addr: u64, from: &[u8]) -> bool {
        match self.window_at(addr) {
            Some((window, offset)) => {
                window.write(offset, from);
                true
            }
            None => false,
        }
    }

    fn serial_at(port: u16) -> Option<u16> {
        port.checked_sub(SERIAL_PORT).filter(|&offset| offset < Serial::PORTS)
    }

    /// A read of an I/O port. `false` when no device is there; `into` is then all ones.
    pub fn pio_read(&self, port: u16, into: &mut [u8]) -> bool {
        into.fill(0xff);
        match Self::serial_at(port) {
            Some(offset) => {
                if let Some(first) = into.first_mut() {
                    *first = self.serial.read(offset);
                }
                true
            }
            None => false,
        }
    }

    /// A write to an I/O port. `false` when no device is there. String writes (`rep outsb`) come as many octets
    /// for the one port.
    pub fn pio_write(&self, port: u16, from: &[u8]) -> bool {
        match Self::serial_at(port) {
            Some(offset) => {
                from.iter().for_each(|&octet| self.serial.write(offset, octet));
                true
            }
            None => false,
        }
    }

    /// Sends octets to the guest's console; gives how many there was room for. From the device thread.
    pub fn serial_input(&self, octets: &[u8]) -> usize {
        self.serial.input(octets)
    }

    // ---- Links, from the device thread ----

    /// Connects a link to a port of the guest. Its client gets `ok` under `tag` when the guest accepts, and from
    /// the next octet on the stream; or `err` (`LINK_LOST` when the guest refuses, `GUEST_TIMEOUT`,
    /// `NO_CAPACITY`) and the end. `early` is what the client sent after its request.
    /// The link must not be registered anywhere, and have nothing left to write.
    pub fn vsock_connect(&self, port: u32, link: UnixStream, tag: &str, early: Vec<u8>) {
        self.vsock.with_device(|vsock| vsock.connect(port, link, tag.to_string(), early));
        self.pump_vsock();
    }

    /// Waits with a link until the guest connects to the host's `port`. Otherwise as `vsock_connect`.
    pub fn vsock_accept(&self, port: u32, link: UnixStream, tag: &str, early: Vec<u8>) {
        self.vsock.with_device(|vsock| vsock.accept(port, link, tag.to_string(), early));
        self.pump_vsock();
    }

    /// Tells a restored guest that its vsock connections are gone; before its processors run. See
    /// `Vsock::transport_reset`.
    pub fn vsock_transport_reset(&self) {
        self.vsock.with_queues(Vsock::transport_reset);
    }

    fn pump_vsock(&self) {
        if self.vsock.with_queues(|vsock, context| vsock.pump(context)) == Some(Progress::More) {
            self.vsock.kick(0);
        }
        self.arm_vsock_timer();
    }

    fn arm_vsock_timer(&self) {
        let next = self.vsock.with_device(|vsock| vsock.next_deadline());
        if let Some(next) = next {
            self.vsock_timer.lock().unwrap_or_else(PoisonError::into_inner).arm(next, Instant::now());
        }
    }

    fn receive_frames(&self) {
        if let Some(net) = &self.net
            && net.with_queues(|device, context| device.receive(context)) == Some(Progress::More)
        {
            net.kick(net::RX);
        }
    }

    fn arm_rng_timer(&self) {
        if let Some(wake) = self.rng.with_device(|rng| rng.wake()) {
            self.rng_timer.lock().unwrap_or_else(PoisonError::into_inner).arm(wake, Instant::now());
        }
    }

    // ---- Memory, from the device thread ----

    /// Asks the guest to leave itself `bytes` of its memory and to put the rest into the balloon. It does so when it
    /// can, or never.
    pub fn set_memory_target(&self, bytes: u64) {
        let ram = self.memory.size();
        self.balloon.change(|balloon| balloon.set_target(ram.saturating_sub(bytes)));
    }

    /// Changes limits. `false` where there is no network to limit.
    pub fn change_limits(&self, disks: LimitsChange, net: Option<[LimitsChange; 2]>) -> bool {
        if let Some([rx, tx]) = net {
            let Some(device) = &self.net else { return false };
            device.with_device(|device| device.change_limits(rx, tx));
        }
        self.disk_limiter.lock().unwrap_or_else(PoisonError::into_inner).change(disks, Instant::now());
        self.disks.iter().for_each(Disk::kick);
        true
    }

    /// Asks the guest for new statistics of its memory; gives whether some may come. They are there when `stats` has
    /// later ones than before.
    pub fn request_memory_statistics(&self) -> bool {
        self.balloon.with_queues(Balloon::request_statistics) == Some(true)
    }

    // ---- Disks, from the device thread ----

    /// Puts what was written to the root disk on its medium; shortly before `push_layer`, so that that is quick.
    pub fn flush_root(&self, until: Instant) -> io::Result<()> {
        self.disks.iter().take(1).try_for_each(|root| root.flush(until))
    }

    /// Freezes what the root disk's overlay has and goes on with the empty `new_top` (`Overlay::push`). It waits for
    /// the request that is under way and for the medium, until `until` at most.
    pub fn push_layer(&self, new_top: File, until: Instant) -> Result<(), OverlayError> {
        // There is always one.
        self.disks.first().map_or(Err(OverlayError::NotAnOverlay), |root| root.push(new_top, until))
    }

    /// How often the root disk's overlay was frozen since the guest was started. Never waits.
    pub fn layers_pushed(&self) -> u64 {
        self.disks.first().map_or(0, Disk::pushed)
    }

    // ---- Snapshots, from the device thread, while the processors stand still ----

    /// Ends the work under way and begins no other; `false`, and all go on, where a device did not come to rest in time.
    pub fn pause(&self, wait: Duration) -> bool {
        let until = Instant::now() + wait;
        let paused = self.windows.iter().all(|window| window.pause(true, until));
        if !paused {
            self.resume();
        }
        paused
    }

    /// The devices go on.
    pub fn resume(&self) {
        self.windows.iter().for_each(|window| {
            window.pause(false, Instant::now());
        });
    }

    /// Adds all devices, which are paused, to a microVM's state.
    pub fn save(&self, saved: &mut Saved) {
        for (index, window) in (0..).zip(&self.windows) {
            saved.push(window.save(index));
        }
        saved.push(self.serial.save());
    }

    /// Makes fresh devices the saved ones: as many, of the same kinds in the same order.
    pub fn restore(&self, saved: &Saved) -> Result<(), SavedError> {
        if saved.count(mmio::PART) > self.windows.len() {
            return Err(SavedError::NotSaved(format!(
                "it has {} devices, this microVM {}",
                saved.count(mmio::PART),
                self.windows.len()
            )));
        }
        for (index, window) in (0..).zip(&self.windows) {
            window.restore(saved.find(mmio::PART, index)?)?;
        }
        saved.get(serial::PART, 0).map_or(Ok(()), |part| self.serial.restore(part))
    }

    /// Lets no frames pass to and from the guest, or lets them again.
    pub fn close_net(&self, closed: bool) {
        if let Some(net) = &self.net {
            net.with_device(|net| net.set_closed(closed));
            net.kick(net::TX);
            net.kick(net::RX);
        }
    }

    // ---- The end ----

    /// The processors are told to stop: none of them waits for a device any more.
    pub fn let_go(&self) {
        self.windows.iter().for_each(|window| window.let_go());
    }

    /// Puts the disks on their media and the log into its file, for an orderly end. Waits a bounded time for disks
    /// that do not answer; the first that failed is the error.
    pub fn shutdown(&self) -> io::Result<()> {
        self.serial.flush();
        self.disks.iter().for_each(Disk::stop);
        let until = Instant::now() + DISK_END;
        let ends: Vec<io::Result<()>> = self.disks.iter().map(|disk| disk.wait(until)).collect();
        ends.into_iter().collect()
    }

    /// Counters of each disk, as rows: the root disk first.
    pub fn disk_rows(&self) -> Vec<Fields> {
        let row = |disk: &Disk| disk.counters().fields(Fields::new().with("disk", disk.name()));
        self.disks.iter().map(row).collect()
    }

    /// Whether a disk ever found no room on the node for what the guest wrote.
    pub fn found_no_room(&self) -> bool {
        self.disks.iter().any(|disk| disk.counters().without_room.load(Ordering::Relaxed) > 0)
    }

    /// Adds the network's counters to a row of statistics, where there is a network.
    pub fn with_net_counters(&self, fields: Fields) -> Fields {
        match &self.net_counters {
            Some(counters) => counters.fields(fields),
            None => fields,
        }
    }

    /// Counters of all devices but the network.
    pub fn stats(&self) -> DeviceStats {
        let (vsock, balloon) = (&self.vsock_counters, &self.balloon_counters);
        let (target, actual, statistics) =
            self.balloon.with_device(|balloon| (balloon.target(), balloon.actual(), balloon.statistics()));
        let blocks = |counter: fn(&BlockCounters) -> &AtomicU64| {
            self.disks.iter().map(|disk| counter(disk.counters()).load(Ordering::Relaxed)).sum()
        };
        let serial = self.serial.input_counters();
        DeviceStats {
            block_read_bytes: blocks(|block| &block.read_bytes),
            block_written_bytes: blocks(|block| &block.written_bytes),
            block_requests: blocks(|block| &block.requests),
            block_flushes: blocks(|block| &block.flushes),
            block_errors: blocks(|block| &block.errors),
            vsock_rx_bytes: vsock.rx_bytes.load(Ordering::Relaxed),
            vsock_tx_bytes: vsock.tx_bytes.load(Ordering::Relaxed),
            vsock_rx_packets: vsock.rx_packets.load(Ordering::Relaxed),
            vsock_tx_packets: vsock.tx_packets.load(Ordering::Relaxed),
            vsock_connections: vsock.connections.load(Ordering::Relaxed),
            balloon_target_bytes: target,
            balloon_bytes: actual,
            balloon_reported_bytes: balloon.reported_bytes.load(Ordering::Relaxed),
            balloon_refused: balloon.refused.load(Ordering::Relaxed),
            serial_in_bytes: serial.taken,
            serial_overruns: serial.overruns,
            serial_dropped_bytes: self.serial.output_dropped(),
            memory: statistics,
        }
    }
}
