//! A timer of the device thread's loop.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::{Duration, Instant};

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

/// Goes off once at the earliest time it was armed for.
#[derive(Debug)]
pub struct Timer {
    fd: TimerFd,
    armed: Option<Instant>,
}

impl Timer {
    /// A timer that is not armed. Fails when the host has no descriptors left.
    pub fn new() -> io::Result<Self> {
        let fd = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
        Ok(Self { fd, armed: None })
    }

    /// Readable when the timer went off: then `went_off`.
    pub fn fd(&self) -> RawFd {
        self.fd.as_fd().as_raw_fd()
    }

    /// Makes the timer go off at `at`, or before when it is armed for an earlier time: whoever is woken too early looks
    /// and arms again, and a wake-up that is not needed any more costs a look.
    pub fn arm(&mut self, at: Instant, now: Instant) {
        if self.armed.is_some_and(|armed| armed <= at) {
            return;
        }
        // A time of 0 would disarm it.
        let wait = at.saturating_duration_since(now).max(Duration::from_nanos(1));
        let once = Expiration::OneShot(TimeSpec::from_duration(wait));
        match self.fd.set(once, TimerSetTimeFlags::empty()) {
            Ok(()) => self.armed = Some(at),
            Err(e) => log::warn!("a timer cannot be set: {e}"),
        }
    }

    /// Takes the event of the descriptor.
    pub fn went_off(&mut self) {
        // Non-blocking: without an event there is nothing to take.
        let _ = self.fd.wait();
        self.armed = None;
    }
}
