//! Runs the processors: one thread each, from exit to exit, until the guest ends or the worker says stop.

use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use kvm_ioctls::{VcpuExit, VcpuFd};

use super::stats::{Counters, GuestExits};
use super::{KvmError, Vcpu, registers};
use crate::vmm::jail::{self, lists::Kind};
use crate::vmm::last_words::{End, Reason};
use crate::vmm::platform;

/// Stack of a processor's thread, in octets; only what is used counts.
const STACK: usize = 256 * 1024;

/// What the guest reaches by memory and port accesses; called from the processors' threads.
pub trait Bus: Send + Sync {
    /// A read of 1 to 8 octets; what nobody answers stays as it is (all ones).
    fn mmio_read(&self, addr: u64, octets: &mut [u8]);
    /// A write of 1 to 8 octets.
    fn mmio_write(&self, addr: u64, octets: &[u8]);
    /// A read from a port; what nobody answers stays as it is (all ones).
    fn pio_read(&self, port: u16, octets: &mut [u8]);
    /// A write to a port.
    fn pio_write(&self, port: u16, octets: &[u8]);
    /// All processors are told to stop: one that waits in a call above is to come back.
    fn let_go(&self);
}

/// How often processors came back to the worker, by reason.
#[derive(Debug, Default)]
pub struct ExitCounts {
    /// Port accesses.
    pub io: AtomicU64,
    /// Memory accesses outside of RAM.
    pub mmio: AtomicU64,
    /// Interrupted by a signal of the host.
    pub interrupted: AtomicU64,
}

impl ExitCounts {
    /// All of them.
    pub fn total(&self) -> u64 {
        [&self.io, &self.mmio, &self.interrupted].iter().map(|c| c.load(Ordering::Relaxed)).sum()
    }
}

/// What all processors' threads share.
struct Shared<B, F> {
    bus: Arc<B>,
    exits: Arc<ExitCounts>,
    stop: AtomicBool,
    gate: Arc<Gate>,
    ended: F,
}

/// Holds the processors until everything else is ready, the jail of all threads above all.
#[derive(Debug, Default)]
struct Gate {
    is_open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn open(&self) {
        *self.is_open.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.opened.notify_all();
    }

    fn wait(&self) {
        let is_open = self.is_open.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.opened.wait_while(is_open, |is_open| !*is_open).unwrap_or_else(PoisonError::into_inner));
    }
}

/// The running processors. Dropping it stops them.
pub struct Processors {
    threads: Vec<Running>,
    counters: Vec<Counters>,
    gate: Arc<Gate>,
    stop: Arc<dyn Fn() + Send + Sync>,
}

impl std::fmt::Debug for Processors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Processors").field("threads", &self.threads.len()).finish()
    }
}

struct Running {
    /// Gives the descriptor back, so that the page below stays mapped until the thread was joined.
    handle: JoinHandle<VcpuFd>,
    /// `immediate_exit` in the page that this processor shares with KVM.
    immediate_exit: *const AtomicU8,
}

// SAFETY: the pointer is to a field in a page of KVM that is mapped until `handle` was joined (the thread gives back the
// descriptor whose mapping it is), and it is only used for atomic stores. The thread itself never touches that octet: it
// is the kernel that reads it, at the next KVM_RUN.
unsafe impl Send for Running {}

/// The signal that makes KVM_RUN return.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn on_kick(_: libc::c_int) {
    // The signal's arrival is all that is wanted: it interrupts KVM_RUN.
}

impl Processors {
    /// Makes all processors' threads; they wait for `run`. `ended` is called, on a processor's thread, when one of them meets the guest's end;
    /// it may be called more than once.
    pub fn start<B, F>(vcpus: Vec<Vcpu>, bus: Arc<B>, exits: Arc<ExitCounts>, ended: F) -> Result<Self, KvmError>
    where
        B: Bus + 'static,
        F: Fn(End) + Send + Sync + 'static,
    {
        let action: extern "C" fn(libc::c_int) = on_kick;
        // SAFETY: a zeroed sigaction is valid; the handler does nothing. No SA_RESTART: KVM_RUN is to return.
        unsafe {
            let mut new: libc::sigaction = std::mem::zeroed();
            new.sa_sigaction = action as libc::sighandler_t;
            libc::sigaction(kick_signal(), &new, std::ptr::null_mut());
        }
        let gate = Arc::new(Gate::default());
        let shared = Arc::new(Shared { bus, exits, stop: AtomicBool::new(false), gate: gate.clone(), ended });
        let stop = {
            let shared = shared.clone();
            Arc::new(move || {
                shared.stop.store(true, Ordering::SeqCst);
                shared.bus.let_go();
                shared.gate.open();
            })
        };
        let mut all = Self { threads: Vec::with_capacity(vcpus.len()), counters: Vec::new(), gate, stop };
        for mut vcpu in vcpus {
            all.counters.extend(vcpu.counters.take());
            let field: *mut u8 = &raw mut vcpu.fd.get_kvm_run().immediate_exit;
            let shared = shared.clone();
            let name = format!("vcpu{}", vcpu.id);
            let body = move || {
                shared.gate.wait();
                if let Some(end) = run(&mut vcpu, &shared) {
                    (shared.ended)(end);
                }
                vcpu.fd
            };
            let handle = jail::spawn(Kind::Processor, name, STACK, body).map_err(KvmError::Thread)?;
            all.threads.push(Running { handle, immediate_exit: field.cast::<AtomicU8>() });
        }
        Ok(all)
    }

    /// Lets them run.
    pub fn run(&self) {
        self.gate.open();
    }

    /// How often the processors left the guest, by KVM's own count; nothing where this kernel does not count.
    pub fn guest_exits(&self) -> GuestExits {
        let mut sum = GuestExits::default();
        self.counters.iter().for_each(|counters| counters.add_to(&mut sum));
        sum
    }

    /// Makes all processors leave the guest and waits until they did.
    pub fn stop(&mut self) {
        (self.stop)();
        for running in &self.threads {
            // A processor about to enter KVM_RUN sees the flag, one inside is interrupted by the signal, one in a
            // device sees `stop` afterwards.
            // SAFETY: see `Running`: the page is mapped until the thread was joined, which is below.
            unsafe { &*running.immediate_exit }.store(1, Ordering::SeqCst);
            // SAFETY: the thread was not joined, so its id is valid even if it ended.
            unsafe { libc::pthread_kill(running.handle.as_pthread_t(), kick_signal()) };
        }
        for running in self.threads.drain(..) {
            // A thread that panicked ended the whole process.
            drop(running.handle.join());
        }
    }
}

impl Drop for Processors {
    fn drop(&mut self) {
        self.stop();
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Runs one processor; gives the end of the guest, or `None` when it was told to stop.
fn run<B: Bus, F>(vcpu: &mut Vcpu, shared: &Shared<B, F>) -> Option<End> {
    let id = vcpu.id;
    let (bus, exits) = (&*shared.bus, &*shared.exits);
    while !shared.stop.load(Ordering::SeqCst) {
        match vcpu.fd.run() {
            Ok(VcpuExit::IoOut(port, octets)) => {
                count(&exits.io);
                if let Some(end) = platform::write(port, octets) {
                    return Some(end);
                }
                bus.pio_write(port, octets);
            }
            Ok(VcpuExit::IoIn(port, octets)) => {
                count(&exits.io);
                octets.fill(0xff);
                if !platform::read(port, octets) {
                    bus.pio_read(port, octets);
                }
            }
            Ok(VcpuExit::MmioRead(addr, octets)) => {
                count(&exits.mmio);
                octets.fill(0xff);
                bus.mmio_read(addr, octets);
            }
            Ok(VcpuExit::MmioWrite(addr, octets)) => {
                count(&exits.mmio);
                bus.mmio_write(addr, octets);
            }
            Ok(VcpuExit::Intr) => count(&exits.interrupted),
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => count(&exits.interrupted),
            // Each other exit is the guest's end.
            Ok(VcpuExit::Shutdown) => {
                let state = registers::describe(&vcpu.fd);
                return Some(End::new(Reason::GuestReset, format!("triple fault on processor {id}: {state}")));
            }
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                let detail = format!("processor {id} could not be entered on host CPU {cpu}: reason {reason:#x}");
                return Some(End::new(Reason::KvmError, detail));
            }
            Ok(VcpuExit::InternalError) => return Some(internal_error(vcpu)),
            Ok(VcpuExit::MemoryFault { gpa, .. }) => {
                return Some(End::new(Reason::KvmError, format!("no memory behind guest address {gpa:#x}")));
            }
            Ok(exit) => {
                // Exits that nothing here asks for: HLT stays in KVM, hypercalls and debugging are off.
                return Some(End::new(Reason::KvmError, format!("unexpected exit of processor {id}: {exit:?}")));
            }
            Err(e) => return Some(End::new(Reason::KvmError, format!("processor {id} cannot run: {e}"))),
        }
    }
    None
}

/// KVM gave up: most often an instruction that it cannot emulate, at an address without memory.
fn internal_error(vcpu: &mut Vcpu) -> End {
    // SAFETY: the exit reason says that this is the member of the union in use.
    let error = unsafe { vcpu.fd.get_kvm_run().__bindgen_anon_1.internal };
    let state = registers::describe(&vcpu.fd);
    let detail = format!("KVM internal error {} on processor {}: {state}", error.suberror, vcpu.id);
    End::new(Reason::KvmError, detail)
}
