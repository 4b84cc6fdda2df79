//! Credit between a sender and a receiver that never meet: the supervisor stands between and holds little.

use crate::wire::{Code, Error, INITIAL_CREDIT};

/// Octets that the queue toward a receiver may hold before its sender gets no more credit.
pub const QUEUE_HIGH: usize = 256 * 1024;

/// One direction of one channel that passes through the supervisor.
///
/// The sender may have at most `INITIAL_CREDIT` octets under way, and never more than the receiver allows:
/// a receiver that grants without end and reads nothing cannot make the supervisor hold more than that.
#[derive(Debug, Clone)]
pub struct Gate {
    received: u64,
    granted: u64,
    allowed: u64,
}

impl Default for Gate {
    fn default() -> Self {
        Self { received: 0, granted: INITIAL_CREDIT, allowed: INITIAL_CREDIT }
    }
}

impl Gate {
    /// Counts octets that the sender sent. Fails with `CREDIT_EXCEEDED` when it was not allowed that many.
    pub fn take(&mut self, channel: &str, octets: usize) -> Result<(), Error> {
        let total = self.received.saturating_add(octets as u64);
        if total > self.granted {
            return Err(Error::new(
                Code::CreditExceeded,
                format!("{channel}: {octets} octets are over the credit of {}", self.granted - self.received),
            ));
        }
        self.received = total;
        Ok(())
    }

    /// The receiver allows more.
    pub fn allow(&mut self, octets: u64) {
        self.allowed = self.allowed.saturating_add(octets);
    }

    /// Credit to pass on to the sender now, given what is queued toward the receiver. Small grants are held
    /// back until they add up to a quarter of the window.
    pub fn grant(&mut self, queued: usize) -> Option<u64> {
        if queued >= QUEUE_HIGH {
            return None;
        }
        let target = self.allowed.min(self.received.saturating_add(INITIAL_CREDIT));
        let more = target.saturating_sub(self.granted);
        let left = self.granted - self.received;
        if more == 0 || (more < INITIAL_CREDIT / 4 && left > INITIAL_CREDIT / 2) {
            return None;
        }
        self.granted = target;
        Some(more)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sender_never_gets_more_than_the_window_however_much_the_receiver_allows() {
        let mut gate = Gate::default();
        gate.allow(u64::MAX);
        let mut sent = 0u64;
        for _ in 0..100 {
            while gate.take("c", 16 * 1024).is_ok() {
                sent += 16 * 1024;
            }
            assert_eq!(gate.grant(QUEUE_HIGH), None, "the queue is full");
        }
        assert_eq!(sent, INITIAL_CREDIT);
        assert_eq!(gate.grant(0), Some(INITIAL_CREDIT));
    }

    #[test]
    fn a_sender_gets_no_more_than_the_receiver_allows() {
        let mut gate = Gate::default();
        gate.take("c", usize::try_from(INITIAL_CREDIT).expect("fits")).expect("initial credit");
        assert_eq!(gate.grant(0), None);
        gate.allow(10);
        assert_eq!(gate.grant(0), Some(10));
        assert!(gate.take("c", 11).is_err());
        gate.take("c", 10).expect("as allowed");
    }
}
