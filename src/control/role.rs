//! What a peer of the control socket may do, by its user (SO_PEERCRED).

use std::io;

use mio::net::UnixStream;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use crate::sentinel;
use crate::wire::Fields;

/// What viewers may ask.
const VIEWED: &[&str] = &["hello", "help", "node.info", "sandbox.list", "sandbox.stats"];

/// What a peer is to this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It sees everything and changes nothing: the node's sentinel.
    Viewer,
    /// It may do everything.
    Admin,
}

impl Role {
    /// Of whoever made this connection.
    pub fn of(stream: &UnixStream) -> io::Result<Self> {
        Ok(Self::of_user(getsockopt(stream, PeerCredentials)?.uid()))
    }

    /// The socket's mode keeps everybody out but its owner and the sentinel, so who is not the one is the other.
    fn of_user(user: u32) -> Self {
        if user == sentinel::USER { Self::Viewer } else { Self::Admin }
    }

    /// Whether it may use this verb.
    pub fn may(self, verb: &str) -> bool {
        self == Self::Admin || VIEWED.contains(&verb)
    }

    /// What it sees of a sandbox: a viewer not what was put into its environment, which may be secret.
    pub fn shown(self, mut sandbox: Fields) -> Fields {
        if self == Self::Viewer {
            sandbox.0.retain(|(key, _)| key != "env");
        }
        sandbox
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::command::VERBS;

    #[test]
    fn a_viewer_changes_nothing_and_everything_it_may_ask_exists() {
        assert!(VIEWED.iter().all(|verb| VERBS.iter().any(|known| known.name == *verb)));
        let viewer = Role::of_user(sentinel::USER);
        let changes = ["stop", "create", "remove", "update", "logs", "start", "attach", "signal", "write", "read"];
        for verb in VERBS {
            let what = verb.name.rsplit('.').next().unwrap_or_default();
            assert!(!viewer.may(verb.name) || !changes.contains(&what), "{}", verb.name);
            assert!(Role::of_user(0).may(verb.name));
        }
    }

    #[test]
    fn a_viewer_does_not_see_what_was_put_into_an_environment() {
        let sandbox =
            || Fields::new().with("id", "a").with("env", "TOKEN=x").with("env", "B=y").with("state", "running");
        let seen = Role::Viewer.shown(sandbox());
        assert_eq!(seen, Fields::new().with("id", "a").with("state", "running"));
        assert_eq!(Role::Admin.shown(sandbox()), sandbox());
    }
}
