//! A block device with a thread of its own, so that a medium that does not answer stalls one queue and nothing
//! else: not the device thread, and not another disk.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::block::{Block, BlockCounters};
use super::mmio::{MmioTransport, Window};
use crate::storage::overlay::OverlayError;
use crate::vmm::jail::{self, lists::Kind};
use crate::vmm::memory::GuestMemory;

/// Stack of a disk's thread, in octets: requests are served with small buffers on it.
const STACK: usize = 256 << 10;

/// What a disk's thread does beside serving its queue.
enum Order {
    Do(Box<dyn FnOnce(&mut Block) + Send>),
    Stop,
}

/// One disk of the guest while it is served.
pub struct Disk {
    name: String,
    window: Arc<MmioTransport<Block>>,
    counters: Arc<BlockCounters>,
    /// What the thread is asked to do, and what wakes it up for that.
    orders: Sender<Order>,
    ordered: Arc<EventFd>,
    /// Layers that the thread has frozen.
    pushed: Arc<AtomicU64>,
    /// How the last flush went, once the thread has ended.
    end: Mutex<Receiver<io::Result<()>>>,
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Disk {
    /// Puts a block device behind a window and starts its thread. `name` is for messages.
    pub fn start(memory: GuestMemory, name: &str, block: Block) -> io::Result<Self> {
        let counters = block.counters();
        let window = Arc::new(MmioTransport::new(memory, block)?);
        let ordered = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let poll = Poll::new()?;
        for (event, token) in [(&window.queue_events()[0], QUEUE), (&ordered, ORDERED)] {
            poll.registry().register(&mut SourceFd(&event.as_raw_fd()), token, Interest::READABLE)?;
        }
        let (tell, end) = mpsc::channel();
        let (orders, taken) = mpsc::channel();
        // The thread holds what it watches: a descriptor that was closed would never wake it.
        let (served, told) = (window.clone(), ordered.clone());
        jail::spawn(Kind::Disk, format!("disk {name}"), STACK, move || {
            // Nobody listens any more when the set was dropped meanwhile.
            let _ = tell.send(serve(poll, &served, &taken));
            drop(told);
        })?;
        Ok(Self {
            name: name.to_string(),
            window,
            counters,
            orders,
            ordered,
            pushed: Arc::default(),
            end: Mutex::new(end),
        })
    }

    /// As the supervisor named it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The device's registers.
    pub fn window(&self) -> Arc<dyn Window> {
        self.window.clone()
    }

    /// What the device did so far.
    pub fn counters(&self) -> &BlockCounters {
        &self.counters
    }

    /// Puts what was written on the medium. As `push` otherwise.
    pub fn flush(&self, until: Instant) -> io::Result<()> {
        self.ask(until, Block::flush)?
    }

    /// Freezes what was written and goes on with an empty layer (`Overlay::push`). The thread does it after the request
    /// under way. Where it does not answer until then, whether it comes to it later is not known: the disk is lost.
    pub fn push(&self, new_top: File, until: Instant) -> Result<(), OverlayError> {
        let pushed = self.pushed.clone();
        let asked = self.ask(until, move |block| {
            block.push(new_top)?;
            pushed.fetch_add(1, Ordering::Relaxed);
            Ok(())
        });
        asked.unwrap_or_else(|cause| Err(OverlayError::Io { doing: "freezing the disk's layer", cause }))
    }

    /// How often `push` was done, also where it was given up before. Never waits.
    pub fn pushed(&self) -> u64 {
        self.pushed.load(Ordering::Relaxed)
    }

    fn ask<R: Send + 'static>(
        &self,
        until: Instant,
        work: impl FnOnce(&mut Block) -> R + Send + 'static,
    ) -> io::Result<R> {
        let (answer, answered) = mpsc::channel();
        let order = move |block: &mut Block| {
            // Nobody listens any more when it took too long.
            let _ = answer.send(work(block));
        };
        self.order(Order::Do(Box::new(order)));
        let result = answered.recv_timeout(until.saturating_duration_since(Instant::now()));
        result.map_err(|e| match e {
            RecvTimeoutError::Timeout => self.failed("does not answer"),
            RecvTimeoutError::Disconnected => self.failed("was stopped already"),
        })
    }

    fn order(&self, order: Order) {
        // Fails only when the thread has ended.
        let _ = self.orders.send(order);
        // Fails only when the counter is full: then the thread has yet to look.
        let _ = self.ordered.write(1);
    }

    fn failed(&self, how: &str) -> io::Error {
        io::Error::new(io::ErrorKind::TimedOut, format!("disk {} {how}", self.name))
    }

    /// Has the thread look at its queue: what it waits for may have changed.
    pub fn kick(&self) {
        self.window.kick(0);
    }

    /// Lets the thread flush and end, when it is through with the request under way. Does not wait.
    pub fn stop(&self) {
        self.order(Order::Stop);
    }

    /// Waits for the end that `stop` began: how the flush went, or that the disk does not answer. A thread that
    /// hangs in the kernel cannot be ended from here; it keeps what it works on until it comes back.
    pub fn wait(&self, until: Instant) -> io::Result<()> {
        let end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        let result = end.recv_timeout(until.saturating_duration_since(Instant::now()));
        match result {
            Ok(result) => result.map_err(|e| io::Error::new(e.kind(), format!("disk {}: {e}", self.name))),
            Err(RecvTimeoutError::Timeout) => Err(self.failed("does not answer; what was not flushed may be lost")),
            Err(RecvTimeoutError::Disconnected) => Err(self.failed("was stopped already")),
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.stop();
    }
}

const QUEUE: Token = Token(0);
const ORDERED: Token = Token(1);

/// The thread: serves the queue until it is told to stop, then flushes. Both events are edge-triggered, so nothing is read.
fn serve(mut poll: Poll, window: &MmioTransport<Block>, orders: &Receiver<Order>) -> io::Result<()> {
    let mut events = Events::with_capacity(2);
    loop {
        let deadline = window.with_device(|block| block.deadline());
        match poll.poll(&mut events, deadline.map(|at| at.saturating_duration_since(Instant::now()))) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        }
        if events.iter().any(|event| event.token() == ORDERED) {
            while let Ok(order) = orders.try_recv() {
                match order {
                    Order::Do(work) => window.with_device(work),
                    Order::Stop => return window.with_device(Block::flush),
                }
            }
        }
        if !events.is_empty() || deadline.is_some_and(|at| at <= Instant::now()) {
            window.serve(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::storage::medium::Medium;
    use crate::storage::overlay::Overlay;
    use crate::vmm::devices::driver::{self, DriverQueue, read, write};
    use crate::vmm::devices::tests::disk;

    const LONG: Duration = Duration::from_secs(30);

    fn start() -> (GuestMemory, Disk) {
        let memory = GuestMemory::new(1 << 20).unwrap();
        let (base, overlay) = disk(4);
        let block = Block::new(Medium::Overlay(Overlay::open(overlay, Vec::new(), base).unwrap()), "test");
        let disk = Disk::start(memory.clone(), "test", block).unwrap();
        (memory, disk)
    }

    fn flush(memory: &GuestMemory, disk: &Disk, queue: &mut DriverQueue) {
        memory.write(0x8_0000, &[4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        queue.add(memory, &[(0x8_0000, 16, false), (0x8_1000, 1, true)]);
        disk.window.kick(0);
    }

    fn wait_for(what: &str, done: impl Fn() -> bool) {
        let until = Instant::now() + LONG;
        while !done() {
            assert!(Instant::now() < until, "{what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn the_thread_serves_what_is_notified_and_ends_with_a_flush() {
        let (memory, disk) = start();
        let mut queue = driver::start(&*disk.window(), 0, 1, 16, 0).remove(0);
        for _ in 0..3 {
            flush(&memory, &disk, &mut queue);
            wait_for("no request was served", || memory.read_u16(queue.device + 2).unwrap() != 0);
        }
        assert!(disk.wait(Instant::now()).is_err(), "it was not told to stop yet");
        disk.stop();
        disk.wait(Instant::now() + LONG).unwrap();
        assert!(disk.wait(Instant::now() + LONG).is_err());
    }

    #[test]
    fn a_disk_that_does_not_answer_holds_who_resets_it_until_the_end_and_is_named_then() {
        let (memory, disk) = start();
        let mut queue = driver::start(&*disk.window(), 0, 1, 16, 0).remove(0);
        std::thread::scope(|scope| {
            let (release, held) = mpsc::channel::<()>();
            let (holding, taken) = mpsc::channel();
            // What a request that hangs in the kernel does: it has the device's lock.
            let window = &disk.window;
            scope.spawn(move || {
                window.with_device(|_| {
                    holding.send(()).unwrap();
                    held.recv().unwrap();
                });
            });
            taken.recv().unwrap();
            flush(&memory, &disk, &mut queue);
            // What needs no lock goes on.
            assert_eq!(read(&*disk.window(), 0x70), 15);
            assert_eq!(disk.counters().flushes.load(std::sync::atomic::Ordering::Relaxed), 0);
            let reset = scope.spawn(|| write(&*disk.window(), 0x70, 0));
            std::thread::sleep(Duration::from_millis(50));
            assert!(!reset.is_finished());
            disk.window.let_go();
            reset.join().unwrap();
            disk.stop();
            let error = disk.wait(Instant::now() + Duration::from_millis(50)).unwrap_err();
            assert_eq!(error.to_string(), "disk test does not answer; what was not flushed may be lost");
            release.send(()).unwrap();
        });
        disk.wait(Instant::now() + LONG).unwrap();
    }

    #[test]
    fn the_thread_freezes_its_layer_and_serves_on() {
        use crate::storage::overlay::create;
        use crate::vmm::devices::tests::scratch;
        let (memory, disk) = start();
        let mut queue = driver::start(&*disk.window(), 0, 1, 16, 0).remove(0);
        let until = || Instant::now() + LONG;
        let blank = |blocks: u64| {
            let file = scratch(0);
            create(&file, blocks * 4096, 4 * 4096, [0; 32]).unwrap();
            file
        };
        disk.push(blank(4), until()).unwrap();
        assert!(disk.push(blank(5), until()).unwrap_err().is_corrupt());
        disk.push(blank(4), until()).unwrap();
        disk.flush(until()).unwrap();
        assert_eq!(disk.pushed(), 2);
        assert!(disk.window.with_device(|block| format!("{block:?}")).contains("frozen: 2"));
        flush(&memory, &disk, &mut queue);
        wait_for("no request was served", || memory.read_u16(queue.device + 2).unwrap() != 0);
        disk.stop();
        disk.wait(until()).unwrap();
        assert!(matches!(disk.push(blank(4), until()), Err(OverlayError::Io { .. })));
        assert!(disk.flush(until()).is_err());
    }

    #[test]
    fn a_dropped_disk_lets_its_thread_go() {
        let (_, disk) = start();
        let window = Arc::downgrade(&disk.window);
        drop(disk);
        wait_for("the thread goes on", || window.strong_count() == 0);
    }
}
