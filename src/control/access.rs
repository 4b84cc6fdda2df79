//! Who a client is, and what it may: peers of the control socket are known by what the kernel says of them.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::sys::socket::{getsockopt, sockopt};
use serde::Deserialize;

use crate::sentinel;
use crate::wire::Fields;

/// Groups of one peer that are looked at.
const MAX_GROUPS: usize = 256;
/// What a thread of the node is called; no peer of a socket is.
const NODE: &str = "node";
/// Owner of what root and the bridge make.
pub const ROOT: &str = "root";

/// What a client may do. Each role may do what those before it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Measures: sees that sandboxes of all owners are there and what they use, but not their environment.
    Monitor,
    /// Looks at its owner's sandboxes.
    Viewer,
    /// Makes and uses its owner's sandboxes.
    Operator,
    /// Everything, with every owner's sandboxes, and for any owner.
    Admin,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Monitor => "monitor",
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
        })
    }
}

impl Role {
    /// What it sees of a sandbox' row: a monitor not what was put into its environment, which may be secret.
    pub fn shown(self, mut sandbox: Fields) -> Fields {
        if self == Self::Monitor {
            sandbox.0.retain(|(key, _)| key != "env");
        }
        sandbox
    }
}

/// One entry of `control.peers`: which processes of the node are whom.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerRule {
    /// Processes of this user.
    pub uid: Option<u32>,
    /// Processes with this group among theirs. With `uid` too, both must hold.
    pub gid: Option<u32>,
    /// What they may.
    pub role: Role,
    /// Whose sandboxes they see; `uid` and the number of their user when not said.
    pub owner: Option<String>,
}

/// A process at the other end of a Unix socket, as it was when it connected (unix(7)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its process id, as a hint for people.
    pub pid: i32,
    /// Its effective user.
    pub uid: u32,
    /// Its groups, the effective one first.
    pub groups: Vec<u32>,
}

impl Peer {
    /// Asks the kernel: SO_PEERCRED and SO_PEERGROUPS.
    pub fn of(stream: &impl AsFd) -> io::Result<Self> {
        let credentials = getsockopt(&stream.as_fd(), sockopt::PeerCredentials)?;
        let mut groups = [0u32; MAX_GROUPS];
        let mut length = size_of_val(&groups) as libc::socklen_t;
        // SAFETY: the kernel writes at most `length` octets of group numbers, which live through the call.
        let got = unsafe {
            libc::getsockopt(
                stream.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        // One in more groups than that counts by its effective group alone.
        let count = if got == 0 { length as usize / size_of::<u32>() } else { 0 };
        let others = groups.iter().take(count).copied();
        let groups = std::iter::once(credentials.gid()).chain(others).collect();
        Ok(Self { pid: credentials.pid(), uid: credentials.uid(), groups })
    }
}

/// Who a client is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// What it may.
    pub role: Role,
    /// Whose sandboxes it makes and, unless it is an admin, sees.
    pub owner: String,
    /// How it came, for the audit log.
    pub peer: String,
}

impl Identity {
    /// Whoever is behind the bridge: it holds the machine that the node runs on.
    pub fn port() -> Self {
        Self { role: Role::Admin, owner: ROOT.to_string(), peer: "port".to_string() }
    }

    /// A thread of the node, which does in a builder or a sandbox what a client has asked for.
    pub fn node() -> Self {
        Self { role: Role::Admin, owner: ROOT.to_string(), peer: NODE.to_string() }
    }

    /// Whether it is one.
    pub fn is_node(&self) -> bool {
        self.peer == NODE
    }

    /// By the first rule that fits. Without one, root and the user that the node runs as are admins, the node's sentinel
    /// is a monitor, and nobody else is anybody.
    pub fn of(peer: &Peer, rules: &[PeerRule], own_uid: u32) -> Option<Self> {
        let fits = |rule: &&PeerRule| {
            rule.uid.is_none_or(|uid| uid == peer.uid) && rule.gid.is_none_or(|gid| peer.groups.contains(&gid))
        };
        let (role, owner) = match rules.iter().find(fits) {
            Some(rule) => (rule.role, rule.owner.clone().unwrap_or_else(|| format!("uid{}", peer.uid))),
            None if peer.uid == 0 || peer.uid == own_uid => (Role::Admin, ROOT.to_string()),
            None if peer.uid == sentinel::USER => (Role::Monitor, "sentinel".to_string()),
            None => return None,
        };
        Some(Self { role, owner, peer: format!("uid={} pid={}", peer.uid, peer.pid) })
    }

    /// Whether an owner's sandboxes are there for it.
    pub fn sees(&self, owner: &str) -> bool {
        matches!(self.role, Role::Admin | Role::Monitor) || self.owner == owner
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn rule(uid: Option<u32>, gid: Option<u32>, role: Role, owner: Option<&str>) -> PeerRule {
        PeerRule { uid, gid, role, owner: owner.map(str::to_string) }
    }

    fn peer(uid: u32, groups: &[u32]) -> Peer {
        Peer { pid: 7, uid, groups: groups.to_vec() }
    }

    #[test]
    fn the_kernel_says_who_a_peer_is() {
        let (one, _other) = UnixStream::pair().unwrap();
        let peer = Peer::of(&one).unwrap();
        assert_eq!((peer.pid, peer.uid), (std::process::id() as i32, nix::unistd::geteuid().as_raw()));
        assert_eq!(peer.groups[0], nix::unistd::getegid().as_raw());
    }

    #[test]
    fn the_first_rule_that_fits_says_who_a_peer_is() {
        let rules = [
            rule(Some(1000), Some(50), Role::Admin, None),
            rule(Some(1000), None, Role::Viewer, Some("ann")),
            rule(None, Some(60), Role::Operator, None),
            rule(Some(0), None, Role::Operator, Some("zero")),
        ];
        let who = |peer: Peer| Identity::of(&peer, &rules, 5).map(|who| (who.role, who.owner));
        assert_eq!(who(peer(1000, &[1000, 50])), Some((Role::Admin, "uid1000".to_string())));
        assert_eq!(who(peer(1000, &[1000])), Some((Role::Viewer, "ann".to_string())));
        assert_eq!(who(peer(1001, &[1, 60])), Some((Role::Operator, "uid1001".to_string())));
        assert_eq!(who(peer(0, &[0])), Some((Role::Operator, "zero".to_string())), "rules come before root");
        assert_eq!(who(peer(5, &[5])), Some((Role::Admin, ROOT.to_string())), "the node's own user");
        assert_eq!(who(peer(1002, &[1002])), None);
        let measures = Some((Role::Monitor, "sentinel".to_string()));
        assert_eq!(who(peer(sentinel::USER, &[sentinel::USER])), measures);
    }

    #[test]
    fn a_monitor_does_not_see_what_was_put_into_an_environment() {
        let sandbox =
            || Fields::new().with("id", "a").with("env", "TOKEN=x").with("env", "B=y").with("state", "running");
        assert_eq!(Role::Monitor.shown(sandbox()), Fields::new().with("id", "a").with("state", "running"));
        assert_eq!(Role::Viewer.shown(sandbox()), sandbox());
    }

    #[test]
    fn only_admins_see_what_is_anothers() {
        let of = |role| Identity { role, owner: "ann".to_string(), peer: String::new() };
        for role in [Role::Viewer, Role::Operator] {
            assert!(of(role).sees("ann") && !of(role).sees("bob"));
        }
        assert!(of(Role::Admin).sees("bob"));
    }
}
