//! The states of a sandbox and the moves between them, as data.

use std::fmt;

use crate::wire::{Code, Error};

macro_rules! states {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// Where a sandbox is in its life.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum State { $($(#[$doc])* $name,)* }

        impl State {
            /// All states, in the order of a life.
            pub const ALL: &'static [State] = &[$(State::$name,)*];

            /// The state as written on the wire and in the database.
            pub fn as_str(self) -> &'static str {
                match self { $(State::$name => $text,)* }
            }

            /// The state that is written so, where there is one.
            pub fn parse(text: &str) -> Option<State> {
                match text { $($text => Some(State::$name),)* _ => None }
            }
        }
    };
}

states! {
    /// Accepted; nothing is taken yet.
    Pending = "pending",
    /// Waits for what it needs (a template being verified, room on the node).
    Scheduling = "scheduling",
    /// Its directory, overlay, cgroup and sockets are being made.
    Creating = "creating",
    /// Its worker runs; the agent has not answered yet.
    Starting = "starting",
    /// The agent answers.
    Running = "running",
    /// On the way to paused.
    Pausing = "pausing",
    /// On disk, without a worker.
    Paused = "paused",
    /// On the way back to running.
    Resuming = "resuming",
    /// The guest shuts down.
    Stopping = "stopping",
    /// Ended in order; its disk is kept until it is removed.
    Stopped = "stopped",
    /// Ended out of order; the reason says why.
    Error = "error",
}

/// Every legal move but those into `Error`, which any state except `Stopped` and `Error` itself may make.
const MOVES: &[(State, State)] = &[
    (State::Pending, State::Scheduling),
    (State::Pending, State::Stopped),
    (State::Scheduling, State::Creating),
    (State::Scheduling, State::Stopped),
    (State::Creating, State::Starting),
    (State::Starting, State::Running),
    (State::Running, State::Stopping),
    (State::Running, State::Pausing),
    (State::Pausing, State::Paused),
    // It could not be paused, or not be resumed: it is what it was.
    (State::Pausing, State::Running),
    (State::Paused, State::Resuming),
    (State::Resuming, State::Running),
    (State::Resuming, State::Paused),
    (State::Paused, State::Stopping),
    (State::Stopping, State::Stopped),
    (State::Error, State::Stopped),
    (State::Error, State::Running),
    // It is put back to a snapshot, as it may be from `Paused`.
    (State::Running, State::Resuming),
    (State::Stopped, State::Resuming),
    (State::Error, State::Resuming),
];

impl State {
    /// Whether a sandbox may go from here to `next`.
    pub fn may_become(self, next: State) -> bool {
        match next {
            State::Error => !matches!(self, State::Stopped | State::Error),
            _ => MOVES.contains(&(self, next)),
        }
    }

    /// The move itself. Fails with `BAD_STATE` where the table has no such move.
    pub fn become_(&mut self, next: State) -> Result<(), Error> {
        if !self.may_become(next) {
            return Err(Error::new(Code::BadState, format!("a sandbox that is {self} cannot become {next}"))
                .with("from", self)
                .with("to", next));
        }
        *self = next;
        Ok(())
    }

    /// Whether the sandbox has, or is about to have, a worker.
    pub fn is_live(self) -> bool {
        !matches!(self, State::Stopped | State::Error | State::Paused)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_the_one_of_the_requirements() {
        use State::*;
        let legal = |from: State| State::ALL.iter().copied().filter(|&to| from.may_become(to)).collect::<Vec<_>>();
        assert_eq!(legal(Pending), [Scheduling, Stopped, Error]);
        assert_eq!(legal(Scheduling), [Creating, Stopped, Error]);
        assert_eq!(legal(Creating), [Starting, Error]);
        assert_eq!(legal(Starting), [Running, Error]);
        assert_eq!(legal(Running), [Pausing, Resuming, Stopping, Error]);
        assert_eq!(legal(Pausing), [Running, Paused, Error]);
        assert_eq!(legal(Paused), [Resuming, Stopping, Error]);
        assert_eq!(legal(Resuming), [Running, Paused, Error]);
        assert_eq!(legal(Stopping), [Stopped, Error]);
        assert_eq!(legal(Stopped), [Resuming]);
        assert_eq!(legal(Error), [Running, Resuming, Stopped]);
    }

    #[test]
    fn an_illegal_move_is_a_typed_error_and_changes_nothing() {
        let mut state = State::Stopped;
        let error = state.become_(State::Running).expect_err("not without a snapshot");
        assert!(error.is(Code::BadState));
        assert_eq!(state, State::Stopped);
    }

    #[test]
    fn names_round_trip() {
        for &state in State::ALL {
            assert_eq!(State::parse(state.as_str()), Some(state));
        }
        assert_eq!(State::parse("Running"), None);
    }
}
