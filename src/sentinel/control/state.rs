//! Where a sentinel stands.

use std::sync::atomic::{AtomicU8, Ordering};

/// What it is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// Reading its configuration and opening its buffer.
    Initializing = 0,
    /// Running, but the core does not know it yet: from its own and from cached tasks.
    Registering = 1,
    /// Running.
    Running = 2,
    /// No new tasks; buffers are flushed.
    Stopping = 3,
    /// Ended.
    Stopped = 4,
    /// It could not start.
    Error = 5,
}

impl State {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Initializing => "initializing",
            Self::Registering => "registering",
            Self::Running => "running",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Error => "error",
        }
    }

    fn from_number(number: u8) -> Self {
        match number {
            0 => Self::Initializing,
            1 => Self::Registering,
            2 => Self::Running,
            3 => Self::Stopping,
            4 => Self::Stopped,
            _ => Self::Error,
        }
    }

    /// Whether one may follow the other.
    pub fn leads_to(self, next: Self) -> bool {
        matches!(
            (self, next),
            (Self::Initializing, Self::Registering | Self::Running | Self::Error)
                | (Self::Registering, Self::Running | Self::Stopping)
                | (Self::Running, Self::Registering | Self::Stopping)
                | (Self::Stopping, Self::Stopped)
        )
    }
}

/// The state that all threads see.
#[derive(Debug)]
pub struct Shared(AtomicU8);

impl Default for Shared {
    fn default() -> Self {
        Self(AtomicU8::new(State::Initializing as u8))
    }
}

impl Shared {
    /// The state now.
    pub fn get(&self) -> State {
        State::from_number(self.0.load(Ordering::Acquire))
    }

    /// Goes on to another state, if that may follow.
    pub fn go(&self, next: State) {
        let step = |now| State::from_number(now).leads_to(next).then_some(next as u8);
        if self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, step).is_ok() {
            log::info!("state: {}", next.name());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_followed_only_by_those_that_may() {
        let shared = Shared::default();
        for (next, then) in [
            (State::Stopping, State::Initializing),
            (State::Registering, State::Registering),
            (State::Running, State::Running),
            (State::Stopped, State::Running),
            (State::Stopping, State::Stopping),
            (State::Running, State::Stopping),
            (State::Stopped, State::Stopped),
            (State::Initializing, State::Stopped),
        ] {
            shared.go(next);
            assert_eq!(shared.get(), then);
        }
    }
}
