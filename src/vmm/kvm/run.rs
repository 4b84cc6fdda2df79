//! Runs the processors: one thread each, from exit to exit, until the guest ends or the worker says stop.

use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_ioctls::{VcpuExit, VcpuFd};

use super::state::VcpuState;
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
    gate: Arc<Gate>,
    ended: F,
}

/// What the processors are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Stand still: before everything else is ready, the jail of all threads above all, and while the guest is paused.
    Held,
    /// Run the guest.
    Running,
    /// Come to an end.
    Stopped,
}

#[derive(Debug)]
struct Turn {
    phase: Phase,
    /// Processors that stand still, or have met the guest's end.
    still: usize,
    /// Of them, those that have met the end.
    ended: usize,
    /// Grows by one for each time that all are to tell their state, which they do against this TSC of the host.
    round: u64,
    at: u64,
    states: Vec<(u8, Result<VcpuState, KvmError>)>,
}

/// Where the processors' threads wait for their turn.
#[derive(Debug)]
struct Gate {
    turn: Mutex<Turn>,
    changed: Condvar,
    /// `turn.phase` is not `Running`: looked at on each way out of the guest.
    leave: AtomicBool,
}

impl Gate {
    fn new() -> Self {
        let turn = Turn { phase: Phase::Held, still: 0, ended: 0, round: 0, at: 0, states: Vec::new() };
        Self { turn: Mutex::new(turn), changed: Condvar::new(), leave: AtomicBool::new(true) }
    }

    fn lock(&self) -> MutexGuard<'_, Turn> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, phase: Phase) {
        let mut turn = self.lock();
        // An end is for good.
        if turn.phase != Phase::Stopped {
            turn.phase = phase;
        }
        self.leave.store(turn.phase != Phase::Running, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Stands still until the processor may run; `false` when it is to end. Tells its state whenever that is asked for.
    fn wait(&self, vcpu: &Vcpu) -> bool {
        let mut turn = self.lock();
        turn.still += 1;
        let mut round = turn.round;
        self.changed.notify_all();
        loop {
            match turn.phase {
                Phase::Held if turn.round == round => {}
                Phase::Held => {
                    round = turn.round;
                    let state = vcpu.save(turn.at);
                    turn.states.push((vcpu.id, state));
                    self.changed.notify_all();
                }
                Phase::Running | Phase::Stopped => {
                    turn.still -= 1;
                    return turn.phase == Phase::Running;
                }
            }
            turn = self.changed.wait(turn).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The processor met the guest's end and will never run again.
    fn end(&self) {
        let mut turn = self.lock();
        turn.still += 1;
        turn.ended += 1;
        self.changed.notify_all();
    }
}

/// Why the processors do not stand still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PauseError {
    /// The guest met its end.
    Ended,
    /// A processor waits for a device that does not answer, or KVM keeps it.
    Timeout,
}

/// The running processors. Dropping it stops them.
pub struct Processors {
    threads: Vec<Running>,
    counters: Vec<Counters>,
    gate: Arc<Gate>,
    let_go: Arc<dyn Fn() + Send + Sync>,
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

impl Running {
    fn set_immediate_exit(&self, value: u8) {
        // SAFETY: see below: the page is mapped until the thread was joined.
        unsafe { &*self.immediate_exit }.store(value, Ordering::SeqCst);
    }
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
        let gate = Arc::new(Gate::new());
        let shared = Arc::new(Shared { bus, exits, gate: gate.clone(), ended });
        let let_go = {
            let shared = shared.clone();
            Arc::new(move || shared.bus.let_go())
        };
        let mut all = Self { threads: Vec::with_capacity(vcpus.len()), counters: Vec::new(), gate, let_go };
        for mut vcpu in vcpus {
            all.counters.extend(vcpu.counters.take());
            let field: *mut u8 = &raw mut vcpu.fd.get_kvm_run().immediate_exit;
            let shared = shared.clone();
            let name = format!("vcpu{}", vcpu.id);
            let body = move || {
                while shared.gate.wait(&vcpu) {
                    // The guest is not to take the time that it stood still for a processor that hung. Guests without
                    // KVM's clock have nothing to be told.
                    let _ = vcpu.fd.kvmclock_ctrl();
                    if let Some(end) = run(&mut vcpu, &shared) {
                        shared.gate.end();
                        (shared.ended)(end);
                        break;
                    }
                }
                vcpu.fd
            };
            let handle = jail::spawn(Kind::Processor, name, STACK, body).map_err(KvmError::Thread)?;
            all.threads.push(Running { handle, immediate_exit: field.cast::<AtomicU8>() });
        }
        Ok(all)
    }

    /// How many there are.
    pub fn count(&self) -> u8 {
        self.threads.len() as u8
    }

    /// Lets them run, for the first time or again.
    pub fn run(&self) {
        for running in &self.threads {
            running.set_immediate_exit(0);
        }
        self.gate.set(Phase::Running);
    }

    /// Makes all processors stand still between two instructions, and waits for that. After an error they run on.
    pub fn pause(&self, wait: Duration) -> Result<(), PauseError> {
        self.leave(Phase::Held);
        let moving = |turn: &mut Turn| turn.still < self.threads.len();
        let waited = self.gate.changed.wait_timeout_while(self.gate.lock(), wait, moving);
        let (turn, result) = waited.unwrap_or_else(PoisonError::into_inner);
        let (ended, late) = (turn.ended > 0, result.timed_out());
        drop(turn);
        if ended || late {
            self.run();
            return Err(if ended { PauseError::Ended } else { PauseError::Timeout });
        }
        Ok(())
    }

    /// The state of all processors, which stand still, in their order. `at` is the host's TSC at this moment.
    pub fn save(&self, at: u64) -> Result<Vec<VcpuState>, KvmError> {
        let mut turn = self.gate.lock();
        turn.round += 1;
        turn.at = at;
        self.gate.changed.notify_all();
        let waiting = |turn: &mut Turn| turn.states.len() < self.threads.len();
        let waited = self.gate.changed.wait_while(turn, waiting);
        let mut states = std::mem::take(&mut waited.unwrap_or_else(PoisonError::into_inner).states);
        states.sort_by_key(|(id, _)| *id);
        states.into_iter().map(|(_, state)| state).collect()
    }

    /// Makes them leave the guest for another phase.
    fn leave(&self, phase: Phase) {
        self.gate.set(phase);
        for running in &self.threads {
            // A processor about to enter KVM_RUN sees the flag, one inside is interrupted by the signal, one in a
            // device sees the phase afterwards.
            running.set_immediate_exit(1);
            // SAFETY: the thread was not joined, so its id is valid even if it ended.
            unsafe { libc::pthread_kill(running.handle.as_pthread_t(), kick_signal()) };
        }
    }

    /// How often the processors left the guest, by KVM's own count; nothing where this kernel does not count.
    pub fn guest_exits(&self) -> GuestExits {
        let mut sum = GuestExits::default();
        self.counters.iter().for_each(|counters| counters.add_to(&mut sum));
        sum
    }

    /// Makes all processors leave the guest and waits until they did.
    pub fn stop(&mut self) {
        self.leave(Phase::Stopped);
        (self.let_go)();
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

/// Runs one processor; gives the end of the guest, or `None` when it is to leave. It leaves only where KVM_RUN came
/// back without an exit: then what the guest asked of a device is finished, and its registers are all there is.
fn run<B: Bus, F>(vcpu: &mut Vcpu, shared: &Shared<B, F>) -> Option<End> {
    let id = vcpu.id;
    let (bus, exits) = (&*shared.bus, &*shared.exits);
    loop {
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
            Ok(VcpuExit::Intr) if !shared.gate.leave.load(Ordering::SeqCst) => count(&exits.interrupted),
            Ok(VcpuExit::Intr) => return None,
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {
                count(&exits.interrupted);
                if shared.gate.leave.load(Ordering::SeqCst) {
                    return None;
                }
            }
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
}

/// KVM gave up: most often an instruction that it cannot emulate, at an address without memory.
fn internal_error(vcpu: &mut Vcpu) -> End {
    // SAFETY: the exit reason says that this is the member of the union in use.
    let error = unsafe { vcpu.fd.get_kvm_run().__bindgen_anon_1.internal };
    let state = registers::describe(&vcpu.fd);
    let detail = format!("KVM internal error {} on processor {}: {state}", error.suberror, vcpu.id);
    End::new(Reason::KvmError, detail)
}
