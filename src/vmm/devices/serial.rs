//! COM1: a 16550A that the guest's console writes to and reads from.
//!
//! The transmitter is always empty, and the divisor changes nothing. What is sent to the guest waits in a bounded ring
//! (`INPUT_BYTES`) until the guest reads it; who sends is told how much of it there was room for, so nothing is lost
//! unseen. What Linux's 8250 driver probes for (scratch, loopback, FIFO bits, interrupts) behaves as on the chip
//! (National Semiconductor PC16550D), but for the receiver's trigger level: its interrupt comes with the first octet.
//!
//! Output goes to the console's log (`console`).

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::console::ConsoleLog;
use crate::vmm::snapshot::saved::{Part, SavedError};

/// Name of the port's part of a microVM's state.
pub const PART: &str = "serial";

/// Octets that wait for the guest at most.
pub const INPUT_BYTES: usize = 4096;
/// How long the end of the worker waits for the log.
const LOG_END: Duration = Duration::from_secs(1);

const IER_RECEIVER: u8 = 0x01;
const IER_TRANSMITTER: u8 = 0x02;
const IER_MASK: u8 = 0x0f;
const IIR_NONE: u8 = 0x01;
const IIR_TRANSMITTER: u8 = 0x02;
const IIR_RECEIVER: u8 = 0x04;
const IIR_FIFO: u8 = 0xc0;
const FCR_ENABLE: u8 = 0x01;
const FCR_CLEAR_RECEIVER: u8 = 0x02;
const LCR_DIVISOR: u8 = 0x80;
const MCR_LOOPBACK: u8 = 0x10;
const MCR_MASK: u8 = 0x1f;
/// There is an octet to read.
const LSR_READY: u8 = 0x01;
/// An octet was lost because there was no room for it.
const LSR_OVERRUN: u8 = 0x02;
/// Transmitter empty, holding register empty.
const LSR_EMPTY: u8 = 0x60;
/// Carrier, data set ready, clear to send: a peer is there and listens.
const MSR_READY: u8 = 0xb0;

/// What passed through the receiver.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct InputCounters {
    /// Octets taken from who sends.
    pub taken: u64,
    /// Octets that there was no room for; who sent them was told, or the guest was where it sent them to itself.
    pub overruns: u64,
    /// Octets that the guest cleared without reading them.
    pub cleared: u64,
}

/// The registers behind the ports.
struct Registers {
    interrupt_enable: u8,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
    divisor: [u8; 2],
    fifo: bool,
    /// The transmitter became empty and the driver has not been told.
    transmitter_pending: bool,
    input: VecDeque<u8>,
    overrun: bool,
    counters: InputCounters,
}

impl Registers {
    fn interrupt_identification(&mut self) -> u8 {
        let fifo = if self.fifo { IIR_FIFO } else { 0 };
        if self.receiver_interrupts() {
            // Reading the octets is what acknowledges this one.
            fifo | IIR_RECEIVER
        } else if self.transmitter_pending && self.interrupt_enable & IER_TRANSMITTER != 0 {
            // Reading it is what acknowledges this interrupt.
            self.transmitter_pending = false;
            fifo | IIR_TRANSMITTER
        } else {
            fifo | IIR_NONE
        }
    }

    fn receiver_interrupts(&self) -> bool {
        self.interrupt_enable & IER_RECEIVER != 0 && !self.input.is_empty()
    }

    fn line_status(&mut self) -> u8 {
        let ready = if self.input.is_empty() { 0 } else { LSR_READY };
        let overrun = if std::mem::take(&mut self.overrun) { LSR_OVERRUN } else { 0 };
        LSR_EMPTY | ready | overrun
    }

    fn modem_status(&self) -> u8 {
        if self.modem_control & MCR_LOOPBACK == 0 {
            return MSR_READY;
        }
        // Outputs are wired to inputs: RTS to CTS, DTR to DSR, OUT1 to RI, OUT2 to DCD.
        let out = self.modem_control;
        (out & 0x02) << 3 | (out & 0x01) << 5 | (out & 0x0c) << 4
    }

    /// Puts octets into the ring; gives how many there was room for.
    fn receive(&mut self, octets: &[u8]) -> usize {
        let taken = octets.len().min(INPUT_BYTES - self.input.len());
        self.input.extend(&octets[..taken]);
        self.counters.taken += taken as u64;
        self.counters.overruns += (octets.len() - taken) as u64;
        taken
    }
}

/// The port with its log. Shared by vCPU threads, which read and write ports, and the device thread, which brings
/// input. The lock is never held over a file.
pub struct Serial {
    registers: Mutex<Registers>,
    log: ConsoleLog,
    interrupt: EventFd,
}

impl Serial {
    /// I/O ports taken, from the first on.
    pub const PORTS: u16 = 8;

    /// A port that logs to `file`. Fails when the host has no descriptors left or the file cannot be measured.
    pub fn new(file: File) -> io::Result<Self> {
        let registers = Registers {
            interrupt_enable: 0,
            line_control: 0x03,
            modem_control: 0x08,
            scratch: 0,
            divisor: [12, 0],
            fifo: false,
            transmitter_pending: false,
            input: VecDeque::new(),
            overrun: false,
            counters: InputCounters::default(),
        };
        Ok(Self {
            registers: Mutex::new(registers),
            log: ConsoleLog::start(file)?,
            interrupt: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The interrupt, for an irqfd.
    pub fn interrupt(&self) -> &EventFd {
        &self.interrupt
    }

    /// A guest's read of port `offset` (0 to 7).
    pub fn read(&self, offset: u16) -> u8 {
        let registers = &mut *self.lock();
        let divisor = registers.line_control & LCR_DIVISOR != 0;
        match offset {
            0 if divisor => registers.divisor[0],
            1 if divisor => registers.divisor[1],
            0 => registers.input.pop_front().unwrap_or(0),
            1 => registers.interrupt_enable,
            2 => registers.interrupt_identification(),
            3 => registers.line_control,
            4 => registers.modem_control,
            5 => registers.line_status(),
            6 => registers.modem_status(),
            7 => registers.scratch,
            _ => 0,
        }
    }

    /// A guest's write to port `offset` (0 to 7).
    pub fn write(&self, offset: u16, value: u8) {
        let registers = &mut *self.lock();
        let divisor = registers.line_control & LCR_DIVISOR != 0;
        match offset {
            0 if divisor => registers.divisor[0] = value,
            1 if divisor => registers.divisor[1] = value,
            0 => {
                if registers.modem_control & MCR_LOOPBACK == 0 {
                    self.log.print(value);
                } else if registers.receive(&[value]) == 0 {
                    registers.overrun = true;
                }
                // Sent at once, so empty at once.
                registers.transmitter_pending = true;
                self.interrupt_if(registers.interrupt_enable & IER_TRANSMITTER != 0 || registers.receiver_interrupts());
            }
            1 => {
                let enabled = value & !registers.interrupt_enable;
                registers.interrupt_enable = value & IER_MASK;
                if enabled & IER_TRANSMITTER != 0 {
                    // The transmitter is empty: enabling the interrupt raises it.
                    registers.transmitter_pending = true;
                }
                let receiver = enabled & IER_RECEIVER != 0 && registers.receiver_interrupts();
                self.interrupt_if(enabled & IER_TRANSMITTER != 0 || receiver);
            }
            2 => {
                registers.fifo = value & FCR_ENABLE != 0;
                if value & FCR_CLEAR_RECEIVER != 0 {
                    registers.counters.cleared += registers.input.len() as u64;
                    registers.input.clear();
                }
            }
            3 => registers.line_control = value,
            4 => registers.modem_control = value & MCR_MASK,
            7 => registers.scratch = value,
            _ => {}
        }
    }

    /// Sends octets to the guest; gives how many there was room for. The rest is the sender's to send again.
    pub fn input(&self, octets: &[u8]) -> usize {
        let registers = &mut *self.lock();
        let taken = registers.receive(octets);
        self.interrupt_if(taken > 0 && registers.receiver_interrupts());
        taken
    }

    /// What passed through the receiver so far.
    pub fn input_counters(&self) -> InputCounters {
        self.lock().counters
    }

    /// Octets of output that came too fast to be logged, so far.
    pub fn output_dropped(&self) -> u64 {
        self.log.dropped()
    }

    /// The registers' state, for a snapshot. What waits for the guest to read it goes with it.
    pub fn save(&self) -> Part {
        let registers = &mut *self.lock();
        Part::new(PART, 0)
            .with_bytes("input", registers.input.make_contiguous())
            .with("interrupt_enable", registers.interrupt_enable)
            .with("line_control", registers.line_control)
            .with("modem_control", registers.modem_control)
            .with("scratch", registers.scratch)
            .with("divisor_low", registers.divisor[0])
            .with("divisor_high", registers.divisor[1])
            .with("fifo", u8::from(registers.fifo))
            .with("transmitter_pending", u8::from(registers.transmitter_pending))
            .with("overrun", u8::from(registers.overrun))
    }

    /// Makes a fresh port the saved one. An interrupt that was on its way is raised again.
    pub fn restore(&self, part: &Part) -> Result<(), SavedError> {
        let octet = |key, default| part.number(key, 255, default).map(|n| n as u8);
        let registers = &mut *self.lock();
        registers.interrupt_enable = octet("interrupt_enable", 0)? & IER_MASK;
        registers.line_control = octet("line_control", 0x03)?;
        registers.modem_control = octet("modem_control", 0x08)? & MCR_MASK;
        registers.scratch = octet("scratch", 0)?;
        registers.divisor = [octet("divisor_low", 12)?, octet("divisor_high", 0)?];
        registers.fifo = octet("fifo", 0)? == 1;
        registers.transmitter_pending = octet("transmitter_pending", 0)? == 1;
        registers.overrun = octet("overrun", 0)? == 1;
        registers.input = part.bytes("input")?.unwrap_or_default().into_iter().take(INPUT_BYTES).collect();
        let transmitter = registers.transmitter_pending && registers.interrupt_enable & IER_TRANSMITTER != 0;
        self.interrupt_if(transmitter || registers.receiver_interrupts());
        Ok(())
    }

    fn interrupt_if(&self, condition: bool) {
        if condition {
            // Fails only when the counter is full: then an interrupt is pending anyway.
            let _ = self.interrupt.write(1);
        }
    }

    /// Writes out what has come, for the end of the worker; waits a bounded time for a disk that does not answer.
    pub fn flush(&self) {
        self.log.flush(LOG_END);
    }
}
