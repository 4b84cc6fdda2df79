//! The virtio-mmio transport, version 2 (virtio 1.2 §4.2): one window of registers for one device.
//!
//! vCPU threads read and write registers; the device's thread (the one of all devices, or a disk's own) serves
//! queues. Notifications reach it by ioeventfd without a VM exit to this process, and the interrupt status is an
//! atomic, so that the registers' lock is taken during set-up only. A reset waits for the device lock: when the
//! write of 0 returns, the device has let go of the driver's memory. A disk that does not answer so holds the
//! processor that resets it, and nobody else, until the guest's end.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{Context, Device, Interrupt, Progress};
use super::queue::{Layout, Queue, QueueError};
use crate::vmm::memory::GuestMemory;
use crate::vmm::snapshot::saved::{Part, SavedError};

/// Size of a window, in octets.
pub const WINDOW: u64 = 0x1000;
/// Register that the driver writes a queue index to; what an ioeventfd stands on.
pub const QUEUE_NOTIFY: u64 = 0x50;

const MAGIC: u32 = 0x7472_6976; // "virt"
const VERSION: u32 = 2;
const VENDOR: u32 = 0x4e52_5257; // "WRRN"
const CONFIG: u64 = 0x100;

const F_INDIRECT_DESC: u64 = 1 << 28;
const F_EVENT_IDX: u64 = 1 << 29;
const F_VERSION_1: u64 = 1 << 32;
const COMMON_FEATURES: u64 = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1;

/// Device status (virtio 1.2 §2.1).
mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
}

/// The steps of a driver's initialisation in their order (§3.1.1).
const STEPS: [u32; 5] = [
    0,
    status::ACKNOWLEDGE,
    status::ACKNOWLEDGE | status::DRIVER,
    status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK,
    status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK,
];
const STEP_DRIVER: u32 = STEPS[2];
const STEP_FEATURES: u32 = STEPS[3];
const STEP_ACTIVE: u32 = STEPS[4];

/// How often a reset looks whether the device has come to rest.
const RESET_LOOK: Duration = Duration::from_millis(1);
/// How many rule violations of a driver get a line in the log.
const LOGGED_FAULTS: u32 = 8;

/// Locks, whatever happened to a thread that held the lock (a panic ends the worker anyway).
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Default)]
struct QueueRegisters {
    layout: Layout,
    ready: bool,
}

#[derive(Default)]
struct Registers {
    /// One of `STEPS`, perhaps with `FAILED`.
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<QueueRegisters>,
}

impl Registers {
    fn new(queues: usize) -> Self {
        let mut registers = Self::default();
        registers.queues.resize_with(queues, QueueRegisters::default);
        registers
    }

    fn queue(&self) -> Option<&QueueRegisters> {
        self.queues.get(self.queue_select as usize)
    }
}

struct Backend<D> {
    device: D,
    /// The queues while the driver is active.
    queues: Option<Vec<Queue>>,
    /// The guest stands still: nothing of it may change.
    paused: bool,
}

/// The transport with its device. Shared by all threads of the worker.
pub struct MmioTransport<D> {
    memory: GuestMemory,
    features: u64,
    registers: Mutex<Registers>,
    // Lock order: registers before backend before config. The device's thread takes only the latter two.
    backend: Mutex<Backend<D>>,
    /// The configuration space as the driver sees it: reads wait for no work of the device.
    config: Mutex<Vec<u8>>,
    /// Changes with the configuration space, except by the driver's own hand (§2.5.1).
    generation: AtomicU32,
    interrupt: Interrupt,
    queue_events: Vec<EventFd>,
    faults: AtomicU32,
    /// The guest is at its end: no processor waits for the device any more.
    ending: AtomicBool,
}

impl<D: Device> MmioTransport<D> {
    /// Puts a device behind a window. Fails when the host has no descriptors left.
    pub fn new(memory: GuestMemory, device: D) -> io::Result<Self> {
        let queue_events = D::QUEUES.iter().map(|_| EventFd::new(EFD_NONBLOCK)).collect::<io::Result<_>>()?;
        Ok(Self {
            memory,
            features: device.features() | COMMON_FEATURES,
            registers: Mutex::new(Registers::new(D::QUEUES.len())),
            config: Mutex::new(device.config()),
            generation: AtomicU32::new(0),
            backend: Mutex::new(Backend { device, queues: None, paused: false }),
            interrupt: Interrupt::new()?,
            queue_events,
            faults: AtomicU32::new(0),
            ending: AtomicBool::new(false),
        })
    }

    /// Runs `f` on the device, whether its driver is active or not. Waits for work under way.
    pub fn with_device<R>(&self, f: impl FnOnce(&mut D) -> R) -> R {
        f(&mut lock(&self.backend).device)
    }

    /// Runs `f` on the device; where that changes its configuration space, an active driver is told.
    pub fn change<R>(&self, f: impl FnOnce(&mut D) -> R) -> R {
        let mut backend = lock(&self.backend);
        let result = f(&mut backend.device);
        if self.renew_config(&backend.device) && backend.queues.is_some() {
            self.interrupt.raise(Interrupt::CONFIGURATION);
        }
        result
    }

    /// Makes the driver see the device's configuration space as it is now; gives whether that changed anything.
    fn renew_config(&self, device: &D) -> bool {
        let mut config = lock(&self.config);
        let now = device.config();
        let changed = *config != now;
        if changed {
            *config = now;
            self.generation.fetch_add(1, Ordering::SeqCst);
        }
        changed
    }

    fn read_config(&self, at: usize, into: &mut [u8]) {
        if let Some(rest) = lock(&self.config).get(at..) {
            let len = rest.len().min(into.len());
            into[..len].copy_from_slice(&rest[..len]);
        }
    }

    fn write_config(&self, at: usize, from: &[u8]) {
        let Some(mut backend) = self.wait_for_backend() else { return };
        let mut config = lock(&self.config);
        if at.checked_add(from.len()).is_some_and(|end| end <= config.len()) {
            backend.device.write_config(at, from);
            *config = backend.device.config();
        }
    }

    /// Runs `f` on the device with its queues, if its driver is active and the guest does not stand still. An error stops
    /// the device.
    pub fn with_queues<R>(&self, f: impl FnOnce(&mut D, &mut Context<'_>) -> Result<R, QueueError>) -> Option<R> {
        let mut backend = lock(&self.backend);
        let Backend { device, queues, paused: false } = &mut *backend else { return None };
        let queues = queues.as_mut()?;
        let mut context = Context { memory: &self.memory, queues, interrupt: &self.interrupt };
        match f(device, &mut context) {
            Ok(result) => Some(result),
            Err(error) => {
                backend.device.reset();
                backend.queues = None;
                self.renew_config(&backend.device);
                // Under the lock still: a reset that comes now must not be followed by this verdict.
                self.fault(&error, true);
                None
            }
        }
    }

    /// Makes the device's thread serve a queue (again) soon.
    pub fn kick(&self, index: usize) {
        if let Some(event) = self.queue_events.get(index) {
            // Fails only when the counter is full: then it is readable anyway.
            let _ = event.write(1);
        }
    }

    fn fault(&self, error: &QueueError, active: bool) {
        if self.faults.fetch_add(1, Ordering::Relaxed) < LOGGED_FAULTS {
            log::warn!("virtio device {}: stopped until its driver resets it: {error}", D::TYPE);
        }
        self.interrupt.demand_reset(active);
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => D::TYPE,
            0x0c => VENDOR,
            0x60 => self.interrupt.status(),
            // Shared memory regions: none, which a length of all ones says (§4.2.2).
            0xb0 | 0xb4 | 0xb8 | 0xbc => u32::MAX,
            0xfc => self.generation.load(Ordering::SeqCst),
            _ => {
                let registers = lock(&self.registers);
                match offset {
                    0x10 => match registers.device_features_select {
                        0 => self.features as u32,
                        1 => (self.features >> 32) as u32,
                        _ => 0,
                    },
                    0x34 => D::QUEUES.get(registers.queue_select as usize).map_or(0, |&max| u32::from(max)),
                    0x44 => registers.queue().map_or(0, |queue| u32::from(queue.ready)),
                    0x70 if self.interrupt.needs_reset() => registers.status | status::NEEDS_RESET,
                    0x70 => registers.status,
                    _ => 0,
                }
            }
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        match offset {
            // With an ioeventfd in place this is never reached.
            QUEUE_NOTIFY => self.kick(value as usize),
            0x64 => self.interrupt.acknowledge(value),
            0x70 => self.write_status(value),
            _ => {
                let mut registers = lock(&self.registers);
                let status = registers.status;
                match offset {
                    0x14 => registers.device_features_select = value,
                    0x24 => registers.driver_features_select = value,
                    0x20 if status == STEP_DRIVER => {
                        let shift = match registers.driver_features_select {
                            0 => 0,
                            1 => 32,
                            // No features are offered there. Taking them up is refused with FEATURES_OK: the
                            // reserved bit 63 stands for them.
                            _ if value != 0 => {
                                registers.driver_features |= 1 << 63;
                                return;
                            }
                            _ => return,
                        };
                        let cleared = registers.driver_features & !(0xffff_ffff << shift);
                        registers.driver_features = cleared | u64::from(value) << shift;
                    }
                    0x30 => registers.queue_select = value,
                    // Queues are set up between FEATURES_OK and DRIVER_OK (§3.1.1 step 7).
                    _ if status == STEP_FEATURES => self.write_queue(&mut registers, offset, value),
                    _ => {}
                }
            }
        }
    }

    fn write_queue(&self, registers: &mut Registers, offset: u64, value: u32) {
        let select = registers.queue_select as usize;
        let (Some(queue), Some(&max)) = (registers.queues.get_mut(select), D::QUEUES.get(select)) else {
            return;
        };
        if offset == 0x44 {
            queue.ready = false;
            if value == 1 {
                match queue.layout.check(&self.memory, max) {
                    Ok(()) => queue.ready = true,
                    Err(error) => self.fault(&error, false),
                }
            }
            return;
        }
        // §4.2.2.2: a queue that is ready must not be changed.
        if queue.ready {
            return;
        }
        let set = |field: &mut u64, shift: u32| {
            *field = *field & !(0xffff_ffff << shift) | u64::from(value) << shift;
        };
        match offset {
            0x38 => queue.layout.size = value,
            0x80 => set(&mut queue.layout.descriptors, 0),
            0x84 => set(&mut queue.layout.descriptors, 32),
            0x90 => set(&mut queue.layout.driver, 0),
            0x94 => set(&mut queue.layout.driver, 32),
            0xa0 => set(&mut queue.layout.device, 0),
            0xa4 => set(&mut queue.layout.device, 32),
            _ => {}
        }
    }

    /// The device lock, once its thread is through with what it does; `None` when the guest's end came first.
    fn wait_for_backend(&self) -> Option<MutexGuard<'_, Backend<D>>> {
        loop {
            match self.backend.try_lock() {
                Ok(backend) => return Some(backend),
                Err(TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) if self.ending.load(Ordering::SeqCst) => return None,
                Err(TryLockError::WouldBlock) => std::thread::sleep(RESET_LOOK),
            }
        }
    }

    fn write_status(&self, value: u32) {
        let mut registers = lock(&self.registers);
        if value == 0 {
            let Some(mut backend) = self.wait_for_backend() else { return };
            backend.device.reset();
            backend.queues = None;
            self.renew_config(&backend.device);
            *registers = Registers::new(D::QUEUES.len());
            self.interrupt.clear();
            return;
        }
        if value & status::FAILED != 0 {
            registers.status |= status::FAILED;
            return;
        }
        // The driver writes back what it read, NEEDS_RESET included.
        let value = value & !status::NEEDS_RESET;
        let next = STEPS.iter().position(|&step| step == registers.status).map(|at| at + 1);
        let Some(&next) = next.and_then(|at| STEPS.get(at)) else { return };
        // One step at a time, and never back: anything else is ignored, and the driver sees that it was.
        if value != next {
            return;
        }
        match next {
            STEP_FEATURES => {
                let accepted = registers.driver_features;
                if accepted & !self.features == 0 && accepted & F_VERSION_1 != 0 {
                    registers.status = next;
                }
            }
            STEP_ACTIVE => self.activate(&mut registers),
            _ => registers.status = next,
        }
    }

    fn activate(&self, registers: &mut Registers) {
        registers.status = STEP_ACTIVE;
        if self.interrupt.needs_reset() {
            // A queue could not be set up; now that the driver listens, tell it.
            self.interrupt.demand_reset(true);
            return;
        }
        let event_index = registers.driver_features & F_EVENT_IDX != 0;
        let indirect = registers.driver_features & F_INDIRECT_DESC != 0;
        let queues = registers.queues.iter().zip(D::QUEUES).map(|(queue, &max)| {
            if queue.ready {
                Queue::new(&self.memory, queue.layout, max, event_index, indirect)
            } else {
                Ok(Queue::default())
            }
        });
        match queues.collect() {
            Ok(queues) => {
                let mut backend = lock(&self.backend);
                backend.device.activate(registers.driver_features);
                backend.queues = Some(queues);
                drop(backend);
                // Notifications that came before were for nobody.
                (0..D::QUEUES.len()).for_each(|index| self.kick(index));
            }
            Err(error) => self.fault(&error, true),
        }
    }
}

/// A queue's registers and how far it has been served, as numbers in a text.
fn write_queue(queue: &QueueRegisters, progress: Option<[u16; 3]>) -> String {
    let Layout { size, descriptors, driver, device } = queue.layout;
    let [avail, used, decided] = progress.unwrap_or_default();
    format!("{size} {descriptors} {driver} {device} {} {avail} {used} {decided}", u8::from(queue.ready))
}

fn read_queue(part: &Part, key: &str) -> Option<(QueueRegisters, [u16; 3])> {
    let numbers: Vec<u64> = part.get(key)?.split(' ').map(str::parse).collect::<Result<_, _>>().ok()?;
    let [size, descriptors, driver, device, ready @ 0..=1, avail, used, decided] = numbers[..] else { return None };
    let layout = Layout { size: u32::try_from(size).ok()?, descriptors, driver, device };
    let progress = [u16::try_from(avail).ok()?, u16::try_from(used).ok()?, u16::try_from(decided).ok()?];
    Some((QueueRegisters { layout, ready: ready == 1 }, progress))
}

/// Keys of the queues of a device; none has more.
const QUEUE_KEYS: [&str; 4] = ["queue0", "queue1", "queue2", "queue3"];

impl<D: Device> MmioTransport<D> {
    fn saved(&self, index: u64) -> Part {
        let registers = lock(&self.registers);
        let backend = lock(&self.backend);
        let mut part = Part::new(PART, index)
            .with("type", D::TYPE)
            .with("status", registers.status)
            .with("device_features_select", registers.device_features_select)
            .with("driver_features_select", registers.driver_features_select)
            .with("driver_features", registers.driver_features)
            .with("queue_select", registers.queue_select)
            .with("generation", self.generation.load(Ordering::SeqCst))
            .with("interrupt", self.interrupt.status())
            .with("needs_reset", u8::from(self.interrupt.needs_reset()))
            .with("active", u8::from(backend.queues.is_some()));
        for (at, (key, queue)) in QUEUE_KEYS.iter().zip(&registers.queues).enumerate() {
            let progress = backend.queues.as_ref().and_then(|queues| queues.get(at)?.progress());
            part = part.with(key, write_queue(queue, progress));
        }
        backend.device.save(part)
    }

    fn restored(&self, part: &Part) -> Result<(), SavedError> {
        let number = |key, max: u32| part.number(key, u64::from(max), 0).map(|n| n as u32);
        if number("type", u32::MAX)? != D::TYPE {
            return Err(part.wrong("type", format!("is another device than {} here", D::TYPE)));
        }
        let status = number("status", u32::MAX)?;
        if !STEPS.contains(&(status & !status::FAILED)) {
            return Err(part.wrong("status", format!("is {status}")));
        }
        let driver_features = part.number("driver_features", u64::MAX, 0)?;
        let active = number("active", 1)? == 1;
        if active && driver_features & !self.features != 0 {
            let lacking = driver_features & !self.features;
            return Err(part.wrong("driver_features", format!("has {lacking:#x}, which this node does not offer")));
        }
        let mut queues = Vec::with_capacity(D::QUEUES.len());
        let mut rings = Vec::with_capacity(D::QUEUES.len());
        for (key, &max) in QUEUE_KEYS.into_iter().zip(D::QUEUES) {
            let (queue, progress) =
                read_queue(part, key).ok_or_else(|| part.wrong(key, "is missing or no queue's numbers"))?;
            let ring = if active && queue.ready {
                let (event_index, indirect) =
                    (driver_features & F_EVENT_IDX != 0, driver_features & F_INDIRECT_DESC != 0);
                let ring = Queue::new(&self.memory, queue.layout, max, event_index, indirect);
                ring.map_err(|error| part.wrong(key, format!("cannot be: {error}")))?.resumed(progress)
            } else {
                Queue::default()
            };
            queues.push(queue);
            rings.push(ring);
        }
        *lock(&self.registers) = Registers {
            status,
            device_features_select: number("device_features_select", u32::MAX)?,
            driver_features_select: number("driver_features_select", u32::MAX)?,
            driver_features,
            queue_select: number("queue_select", u32::MAX)?,
            queues,
        };
        let mut backend = lock(&self.backend);
        if active {
            backend.device.activate(driver_features);
            backend.queues = Some(rings);
        }
        backend.device.restore(part)?;
        *lock(&self.config) = backend.device.config();
        drop(backend);
        self.generation.store(number("generation", u32::MAX)?, Ordering::SeqCst);
        self.interrupt.restore(number("interrupt", u32::MAX)?, number("needs_reset", 1)? == 1);
        // What the driver had asked for and was not served yet.
        (0..D::QUEUES.len()).for_each(|index| self.kick(index));
        Ok(())
    }
}

/// Name of a device's part of a microVM's state.
pub const PART: &str = "device";

/// A window on the bus, whatever its device.
pub trait Window: Send + Sync {
    /// A guest's read at `offset` of the window; fills `into` whatever happens.
    fn read(&self, offset: u64, into: &mut [u8]);
    /// A guest's write at `offset` of the window.
    fn write(&self, offset: u64, from: &[u8]);
    /// The interrupt, for an irqfd.
    fn interrupt(&self) -> &EventFd;
    /// One event for each queue, for ioeventfds at `QUEUE_NOTIFY` with the queue's index as datamatch.
    fn queue_events(&self) -> &[EventFd];
    /// A queue's event came: serves the queue, and has it served again where that was not all. On the device's thread.
    ///
    /// The events are watched edge-triggered and never read, which saves a system call for each: a notification during
    /// the work makes the next wait return at once, whatever the counter has, and that is not full before 2^64 of them.
    fn serve(&self, index: usize);
    /// The guest is at its end: a processor that waits in a register write goes on, whatever the device does.
    fn let_go(&self);
    /// With `true`: the work under way is ended and no other begun, so that nothing of the guest changes; `false` when
    /// that did not come true in time. With `false`: goes on.
    fn pause(&self, paused: bool, until: Instant) -> bool;
    /// The device's state, while it is paused; `index` is its number in the guest.
    fn save(&self, index: u64) -> Part;
    /// Makes a fresh device the saved one.
    fn restore(&self, part: &Part) -> Result<(), SavedError>;
}

impl<D: Device> Window for MmioTransport<D> {
    fn read(&self, offset: u64, into: &mut [u8]) {
        into.fill(0);
        match offset.checked_sub(CONFIG) {
            // Registers are read by words (§4.2.2.2).
            None if offset.is_multiple_of(4) && into.len() == 4 => {
                into.copy_from_slice(&self.read_register(offset).to_le_bytes());
            }
            None => {}
            Some(at) => {
                self.read_config(usize::try_from(at).unwrap_or(usize::MAX), into);
            }
        }
    }

    fn write(&self, offset: u64, from: &[u8]) {
        if let Some(at) = offset.checked_sub(CONFIG) {
            self.write_config(usize::try_from(at).unwrap_or(usize::MAX), from);
        } else if let (true, Ok(octets)) = (offset.is_multiple_of(4), from.try_into()) {
            self.write_register(offset, u32::from_le_bytes(octets));
        }
    }

    fn interrupt(&self) -> &EventFd {
        self.interrupt.event()
    }

    fn queue_events(&self) -> &[EventFd] {
        &self.queue_events
    }

    fn let_go(&self) {
        self.ending.store(true, Ordering::SeqCst);
    }

    fn pause(&self, paused: bool, until: Instant) -> bool {
        loop {
            match self.backend.try_lock() {
                Ok(mut backend) => {
                    backend.paused = paused;
                    break;
                }
                // A panic ends the worker.
                Err(TryLockError::Poisoned(_)) => return false,
                Err(TryLockError::WouldBlock) if paused && Instant::now() >= until => return false,
                Err(TryLockError::WouldBlock) => std::thread::sleep(RESET_LOOK),
            }
        }
        if !paused {
            // Events that came meanwhile were for nobody.
            (0..D::QUEUES.len()).for_each(|index| self.kick(index));
        }
        true
    }

    fn save(&self, index: u64) -> Part {
        self.saved(index)
    }

    fn restore(&self, part: &Part) -> Result<(), SavedError> {
        self.restored(part)
    }

    fn serve(&self, index: usize) {
        if self.with_queues(|device, context| device.queue_notified(context, index)) == Some(Progress::More) {
            self.kick(index);
        }
    }
}
