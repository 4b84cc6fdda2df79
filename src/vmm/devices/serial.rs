//! COM1: a 16550A that the guest's console writes to, kept in the sandbox's log file.
//!
//! Transmit only: nothing is ever received, the transmitter is always empty, and the divisor changes nothing.
//! What Linux's 8250 driver probes for (scratch, loopback, FIFO bits, transmitter interrupt) behaves as on the
//! chip (National Semiconductor PC16550D).
//!
//! The log file is a regular file opened for reading and appending (`O_RDWR | O_APPEND`). It never grows over
//! `LOG_BYTES`: when a write would make it so, the file is cut to zero and begins anew with its own last
//! `KEEP_BYTES`. A reader that follows it sees the file shrink and starts again at 0. Text is written by lines;
//! an unfinished line follows after `FLUSH_AFTER`.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Longest log file, in octets.
pub const LOG_BYTES: u64 = 1 << 20;
/// What stays of it when it is full, in octets.
pub const KEEP_BYTES: u64 = 256 << 10;
/// How long an unfinished line waits.
pub const FLUSH_AFTER: Duration = Duration::from_millis(100);
/// A line longer than this is written in pieces.
const LINE: usize = 1024;

const IER_TRANSMITTER: u8 = 0x02;
const IER_MASK: u8 = 0x0f;
const IIR_NONE: u8 = 0x01;
const IIR_TRANSMITTER: u8 = 0x02;
const IIR_FIFO: u8 = 0xc0;
const FCR_ENABLE: u8 = 0x01;
const LCR_DIVISOR: u8 = 0x80;
const MCR_LOOPBACK: u8 = 0x10;
const MCR_MASK: u8 = 0x1f;
/// Transmitter empty, holding register empty.
const LSR_EMPTY: u8 = 0x60;
/// Carrier, data set ready, clear to send: a peer is there and listens.
const MSR_READY: u8 = 0xb0;

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
}

impl Registers {
    fn interrupt_identification(&mut self) -> u8 {
        let fifo = if self.fifo { IIR_FIFO } else { 0 };
        if self.transmitter_pending && self.interrupt_enable & IER_TRANSMITTER != 0 {
            // Reading it is what acknowledges this interrupt.
            self.transmitter_pending = false;
            fifo | IIR_TRANSMITTER
        } else {
            fifo | IIR_NONE
        }
    }

    fn modem_status(&self) -> u8 {
        if self.modem_control & MCR_LOOPBACK == 0 {
            return MSR_READY;
        }
        // Outputs are wired to inputs: RTS to CTS, DTR to DSR, OUT1 to RI, OUT2 to DCD.
        let out = self.modem_control;
        (out & 0x02) << 3 | (out & 0x01) << 5 | (out & 0x0c) << 4
    }
}

/// The log file with its bound.
struct Log {
    file: File,
    len: u64,
    line: Vec<u8>,
    /// The timer runs for the line.
    timed: bool,
    failures: u64,
}

impl Log {
    fn write_out(&mut self) {
        if self.line.is_empty() {
            return;
        }
        let result = self.make_room().and_then(|()| self.file.write_all(&self.line));
        match result {
            Ok(()) => self.len += self.line.len() as u64,
            // The log is a best effort: a full disk must not stop the guest. One line tells of it.
            Err(error) => {
                if self.failures == 0 {
                    log::warn!("serial: the log file cannot be written: {error}");
                }
                self.failures += 1;
            }
        }
        self.line.clear();
    }

    fn make_room(&mut self) -> io::Result<()> {
        if self.len + self.line.len() as u64 <= LOG_BYTES {
            return Ok(());
        }
        let mut keep = vec![0; KEEP_BYTES.min(self.len) as usize];
        // Without the right to read, nothing is kept.
        let from = self.len - keep.len() as u64;
        if self.file.read_exact_at(&mut keep, from).is_err() {
            keep.clear();
        }
        // Not from the middle of a line.
        let start = keep.iter().position(|&octet| octet == b'\n').map_or(0, |at| at + 1);
        self.file.set_len(0)?;
        self.len = 0;
        self.file.write_all(&keep[start..])?;
        self.len = (keep.len() - start) as u64;
        Ok(())
    }
}

struct Inner {
    registers: Registers,
    log: Log,
}

/// The port with its log. Shared by vCPU threads, which read and write ports, and the device thread, which
/// writes out unfinished lines.
pub struct Serial {
    inner: Mutex<Inner>,
    interrupt: EventFd,
    timer: TimerFd,
}

impl Serial {
    /// I/O ports taken, from the first on.
    pub const PORTS: u16 = 8;

    /// A port that logs to `file`. Fails when the host has no descriptors left or the file cannot be measured.
    pub fn new(file: File) -> io::Result<Self> {
        let len = file.metadata()?.len();
        let registers = Registers {
            interrupt_enable: 0,
            line_control: 0x03,
            modem_control: 0x08,
            scratch: 0,
            divisor: [12, 0],
            fifo: false,
            transmitter_pending: false,
        };
        let log = Log { file, len, line: Vec::with_capacity(LINE), timed: false, failures: 0 };
        Ok(Self {
            inner: Mutex::new(Inner { registers, log }),
            interrupt: EventFd::new(EFD_NONBLOCK)?,
            timer: TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The interrupt, for an irqfd.
    pub fn interrupt(&self) -> &EventFd {
        &self.interrupt
    }

    /// What the device thread watches for reading: then `timer_event`.
    pub fn timer_fd(&self) -> i32 {
        use std::os::fd::AsFd;
        self.timer.as_fd().as_raw_fd()
    }

    /// A guest's read of port `offset` (0 to 7).
    pub fn read(&self, offset: u16) -> u8 {
        let registers = &mut self.lock().registers;
        let divisor = registers.line_control & LCR_DIVISOR != 0;
        match offset {
            0 if divisor => registers.divisor[0],
            1 if divisor => registers.divisor[1],
            1 => registers.interrupt_enable,
            2 => registers.interrupt_identification(),
            3 => registers.line_control,
            4 => registers.modem_control,
            5 => LSR_EMPTY,
            6 => registers.modem_status(),
            7 => registers.scratch,
            _ => 0,
        }
    }

    /// A guest's write to port `offset` (0 to 7).
    pub fn write(&self, offset: u16, value: u8) {
        let mut inner = self.lock();
        let Inner { registers, log } = &mut *inner;
        let divisor = registers.line_control & LCR_DIVISOR != 0;
        match offset {
            0 if divisor => registers.divisor[0] = value,
            1 if divisor => registers.divisor[1] = value,
            0 => {
                if registers.modem_control & MCR_LOOPBACK == 0 {
                    self.transmit(log, value);
                }
                // Sent at once, so empty at once.
                registers.transmitter_pending = true;
                self.interrupt_if_enabled(registers);
            }
            1 => {
                let enabled = value & !registers.interrupt_enable & IER_TRANSMITTER != 0;
                registers.interrupt_enable = value & IER_MASK;
                if enabled {
                    // The transmitter is empty: enabling the interrupt raises it.
                    registers.transmitter_pending = true;
                    self.interrupt_if_enabled(registers);
                }
            }
            2 => registers.fifo = value & FCR_ENABLE != 0,
            3 => registers.line_control = value,
            4 => registers.modem_control = value & MCR_MASK,
            7 => registers.scratch = value,
            _ => {}
        }
    }

    fn interrupt_if_enabled(&self, registers: &Registers) {
        if registers.interrupt_enable & IER_TRANSMITTER != 0 {
            // Fails only when the counter is full: then an interrupt is pending anyway.
            let _ = self.interrupt.write(1);
        }
    }

    fn transmit(&self, log: &mut Log, octet: u8) {
        log.line.push(octet);
        if octet == b'\n' || log.line.len() >= LINE {
            log.write_out();
        } else if !log.timed {
            let once = Expiration::OneShot(TimeSpec::from_duration(FLUSH_AFTER));
            // Without a timer the text waits for the end of its line.
            log.timed = self.timer.set(once, TimerSetTimeFlags::empty()).is_ok();
        }
    }

    /// The timer ran out: write what has come of a line. On the device thread.
    pub fn timer_event(&self) {
        let log = &mut self.lock().log;
        // Sets the descriptor back. The timer has run out, so this does not wait; it is non-blocking anyway.
        let _ = self.timer.wait();
        log.timed = false;
        log.write_out();
    }

    /// Writes out what has come, for the end of the worker.
    pub fn flush(&self) {
        self.lock().log.write_out();
    }
}
