//! Why a worker ended, and the record of it that outlives the worker.
//!
//! The record is one wire line in a regular file that the supervisor gave: `- item reason=R detail="…"`. It is
//! written on every way out that code can see: an orderly end, a panic, a fatal signal. A worker that leaves
//! none was killed.

use std::fmt;
use std::fs::File;
use std::io::Write;
use std::os::fd::{FromRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::wire::{Fields, Message};

/// The descriptor that the record is written to.
pub const RECORD_FD: RawFd = 4;
/// Longest detail, in octets; what is longer is cut.
const DETAIL_MAX: usize = 1024;

/// Why a microVM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The guest switched itself off.
    GuestPoweroff,
    /// The guest reset itself, by request or by a triple fault.
    GuestReset,
    /// The guest's kernel panicked and said so.
    GuestPanic,
    /// The supervisor asked for it.
    Stopped,
    /// KVM gave up on the guest.
    KvmError,
    /// A device gave up.
    DeviceError,
    /// The microVM never ran.
    StartFailed,
    /// Warren's own fault.
    Internal,
}

impl Reason {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::GuestPoweroff => "guest-poweroff",
            Self::GuestReset => "guest-reset",
            Self::GuestPanic => "guest-panic",
            Self::Stopped => "stopped",
            Self::KvmError => "kvm-error",
            Self::DeviceError => "device-error",
            Self::StartFailed => "start-failed",
            Self::Internal => "internal",
        }
    }

    /// Whether the end was asked for, by the guest or the supervisor.
    pub fn is_orderly(self) -> bool {
        matches!(self, Self::GuestPoweroff | Self::Stopped)
    }
}

/// The end of a microVM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// The kind of end.
    pub reason: Reason,
    /// A sentence for people.
    pub detail: String,
}

impl End {
    /// An end with a sentence.
    pub fn new(reason: Reason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into() }
    }

    /// `reason` and `detail`, as record and watchers carry them.
    pub fn fields(&self) -> Fields {
        let mut len = self.detail.len().min(DETAIL_MAX);
        while !self.detail.is_char_boundary(len) {
            len -= 1;
        }
        Fields::new().with("reason", self.reason.as_str()).with("detail", &self.detail[..len])
    }

    /// The record.
    pub fn line(&self) -> Vec<u8> {
        Message::item("-", self.fields()).to_bytes()
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason.as_str(), self.detail)
    }
}

/// A line of the worker's log. A log that takes nothing, on a full disk say, is no reason to end.
pub fn say(what: &dyn fmt::Display) {
    let _ = std::io::stderr().write_all(format!("warren vmm: {what}\n").as_bytes());
}

/// Whether a record was written: the first one tells the cause.
static WRITTEN: AtomicBool = AtomicBool::new(false);

/// The open record file.
#[derive(Debug)]
pub struct LastWords {
    file: File,
    written: &'static AtomicBool,
}

impl LastWords {
    /// Takes over the descriptor that the supervisor gave, and sees to it that a panic or a fatal signal leaves a
    /// record too. To be called once, first of all.
    pub fn take_over() -> Self {
        // SAFETY: the supervisor gives the worker this descriptor and nothing else in the process owns it. Where it
        // is not open, writes fail and nothing else happens: no other descriptor is opened before this.
        let file = unsafe { File::from_raw_fd(RECORD_FD) };
        // SAFETY: sets a flag of a descriptor; at worst it is not open.
        unsafe { libc::fcntl(RECORD_FD, libc::F_SETFD, libc::FD_CLOEXEC) };
        std::panic::set_hook(Box::new(|info| {
            let payload = info.payload();
            let what = payload.downcast_ref::<&str>().copied();
            let what = what.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message");
            let place = info.location().map(|l| format!(" at {}:{}", l.file(), l.line())).unwrap_or_default();
            let end = End::new(Reason::Internal, format!("panic{place}: {what}"));
            say(&end);
            put(&end.line());
            // Not abort: as PID 1 of its namespace the worker would ignore its own SIGABRT.
            // SAFETY: ends the process; there is nothing to clean up that the kernel does not.
            unsafe { libc::_exit(1) };
        }));
        for (signal, _) in FATAL {
            let action: extern "C" fn(libc::c_int) = on_fatal_signal;
            // SAFETY: a zeroed sigaction is valid (no flags, empty mask); the handler only makes calls that are safe
            // in signal handlers.
            unsafe {
                let mut new: libc::sigaction = std::mem::zeroed();
                new.sa_sigaction = action as libc::sighandler_t;
                libc::sigaction(signal, &new, std::ptr::null_mut());
            }
        }
        Self { file, written: &WRITTEN }
    }

    /// A record in a file of its own, for tests.
    #[cfg(test)]
    pub fn in_file(file: File) -> Self {
        Self { file, written: Box::leak(Box::default()) }
    }

    /// Writes the record, unless there is one already.
    pub fn write(&self, end: &End) {
        if self.written.swap(true, Ordering::SeqCst) {
            return;
        }
        let line = end.line();
        // There is nobody left to tell of a failure but the log.
        if let Err(e) = self.file.write_all_at(&line, 0) {
            say(&format_args!("last words cannot be written: {e}"));
        }
    }
}

/// Signals that end the worker by its own fault, each with its record: a handler cannot format.
const FATAL: [(libc::c_int, &[u8]); 5] = [
    (libc::SIGSEGV, b"- item reason=internal detail=\"fatal signal SIGSEGV\"\n"),
    (
        libc::SIGBUS,
        b"- item reason=internal detail=\"fatal signal SIGBUS: a mapped file was cut or memory is damaged\"\n",
    ),
    (libc::SIGILL, b"- item reason=internal detail=\"fatal signal SIGILL\"\n"),
    (libc::SIGFPE, b"- item reason=internal detail=\"fatal signal SIGFPE\"\n"),
    (libc::SIGABRT, b"- item reason=internal detail=\"fatal signal SIGABRT\"\n"),
];

/// Sees to it that a system call that the jail refuses leaves a record with its number.
pub fn explain_refusals() {
    let action: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_refused_call;
    // SAFETY: a zeroed sigaction is valid; SA_SIGINFO goes with a handler of three arguments.
    unsafe {
        let mut new: libc::sigaction = std::mem::zeroed();
        new.sa_sigaction = action as libc::sighandler_t;
        new.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGSYS, &new, std::ptr::null_mut());
    }
}

/// Where `siginfo_t` has the number of a refused system call: after signal, errno, code and an address
/// (<asm-generic/siginfo.h>, `_sigsys`).
const SYSCALL_AT: usize = 24;

extern "C" fn on_refused_call(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel gives a live `siginfo_t` of 128 octets, whose fields for SIGSYS lie there.
    let number = unsafe { info.cast::<u8>().add(SYSCALL_AT).cast::<libc::c_int>().read_unaligned() };
    let mut line = *b"- item reason=internal detail=\"the jail refused system call 0000\"\n";
    let digits = line.len() - 6;
    for (at, place) in (digits..).zip([1000, 100, 10, 1]) {
        line[at] = b'0' + (number / place % 10).unsigned_abs() as u8;
    }
    put(&line);
    // SAFETY: ends the process; safe in signal handlers.
    unsafe { libc::_exit(1) };
}

extern "C" fn on_fatal_signal(signal: libc::c_int) {
    if let Some((_, record)) = FATAL.iter().find(|(number, _)| *number == signal) {
        put(record);
    }
    // SAFETY: ends the process without running anything of it. Returning would run the faulting instruction again.
    unsafe { libc::_exit(1) };
}

/// Writes a record with nothing but system calls: for the panic hook and signal handlers.
fn put(line: &[u8]) {
    if WRITTEN.swap(true, Ordering::SeqCst) {
        return;
    }
    // SAFETY: `line` is live memory of that length; the calls are safe in signal handlers. If they fail, nothing more
    // can be done.
    unsafe {
        libc::pwrite(RECORD_FD, line.as_ptr().cast(), line.len(), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Decoded, Decoder};

    fn parse(line: &[u8]) -> Fields {
        let mut decoder = Decoder::new();
        decoder.push(line);
        match decoder.next() {
            Some(Decoded::Message(Message::Item { fields, .. })) => fields,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_record_is_one_wire_line_whatever_the_detail_holds() {
        let end = End::new(Reason::GuestPanic, "a \"quoted\"\nsentence");
        let fields = parse(&end.line());
        assert_eq!(fields.get("reason"), Some("guest-panic"));
        assert_eq!(fields.get("detail"), Some("a \"quoted\"\nsentence"));
    }

    #[test]
    fn a_long_detail_is_cut_between_characters() {
        let fields = parse(&End::new(Reason::Internal, "ä".repeat(DETAIL_MAX)).line());
        assert_eq!(fields.get("detail").unwrap().len(), DETAIL_MAX);
        let fields = parse(&End::new(Reason::Internal, format!("x{}", "ä".repeat(DETAIL_MAX))).line());
        assert_eq!(fields.get("detail").unwrap().len(), DETAIL_MAX - 1);
    }

    #[test]
    fn the_records_of_fatal_signals_are_wire_lines_too() {
        for (_, record) in FATAL {
            assert_eq!(parse(record).get("reason"), Some("internal"));
        }
    }
}
