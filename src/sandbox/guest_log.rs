//! What a sandbox's programs log by its own service (docs/guest.md): lines of JSON, kept in a ring file, no faster than the
//! node lets them come. All of it is a guest's word.

use serde::de::IgnoredAny;

use super::home::Home;
use crate::storage::ring::Ring;
use crate::wire::{Code, Error, INITIAL_CREDIT};

/// Octets that are kept.
pub const KEPT: u64 = 1024 * 1024;
/// Octets that may come in a second, beyond what may come at once.
const RATE: u64 = 64 * 1024;
/// What each line that is kept begins with, before the node's time.
pub const TIME: &str = "{\"time_ms\":";
/// Longest line.
const LINE_MAX: usize = 16 * 1024;

/// The log of one sandbox.
#[derive(Debug, Default)]
pub struct GuestLog {
    /// The tag of the request on the agent link by which lines come.
    route: String,
    granted: u64,
    received: u64,
    /// The start of a line whose end has not come.
    partial: Vec<u8>,
    ring: Option<Ring>,
    /// A timer runs that allows more.
    pub refilling: bool,
}

impl GuestLog {
    /// A link to the agent begins.
    pub fn begin(&mut self, route: String) {
        self.route = route;
        (self.granted, self.received) = (INITIAL_CREDIT, 0);
        self.partial.clear();
    }

    /// Takes what came. Fails with `CREDIT_EXCEEDED` when that is more than was allowed. What is no line of JSON, and what
    /// cannot be written, is not kept.
    pub fn take(&mut self, home: &Home, id: &str, now_ms: u64, octets: &[u8]) -> Result<(), Error> {
        let received = self.received.saturating_add(octets.len() as u64);
        if received > self.granted {
            return Err(Error::new(Code::CreditExceeded, "logs: the agent sent more than allowed"));
        }
        self.received = received;
        let mut entries = Vec::new();
        for piece in octets.split_inclusive(|octet| *octet == b'\n') {
            if self.partial.len() + piece.len() <= LINE_MAX + 1 {
                self.partial.extend_from_slice(piece);
            } else {
                // So long a line is none, to its end.
                self.partial.clear();
            }
            if piece.last() != Some(&b'\n') {
                continue;
            }
            let line = self.partial.trim_ascii();
            if serde_json::from_slice::<IgnoredAny>(line).is_ok() {
                entries.extend_from_slice(format!("{TIME}{now_ms},\"sandbox\":\"{id}\",\"log\":").as_bytes());
                entries.extend_from_slice(line);
                entries.extend_from_slice(b"}\n");
            }
            self.partial.clear();
        }
        if !entries.is_empty()
            && let Err(e) = self.prepare(home).and_then(|ring| ring.append(&entries))
        {
            log::warn!("what sandbox {id} logs cannot be kept: {e}");
        }
        Ok(())
    }

    /// The file is there from now on.
    pub fn prepare(&mut self, home: &Home) -> std::io::Result<&mut Ring> {
        let path = home.guest_log();
        match &mut self.ring {
            Some(ring) => Ok(ring),
            none => Ok(none.insert(Ring::open(&path, KEPT).or_else(|_| Ring::create(&path, KEPT))?)),
        }
    }

    /// A second is over: what may come beyond what was allowed, and the tag that hears of it. `None` when as much may come as
    /// may at once.
    pub fn refill(&mut self) -> Option<(&str, u64)> {
        let more = RATE.min(INITIAL_CREDIT.saturating_sub(self.granted.saturating_sub(self.received)));
        self.granted += more;
        (more > 0).then_some((self.route.as_str(), more))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::home::Places;
    use crate::sandbox::id::SandboxId;

    #[test]
    fn lines_are_kept_with_their_source_and_come_no_faster_than_allowed() {
        let dir = std::env::temp_dir().join(format!("warren-guest-log-{}", std::process::id()));
        let id = SandboxId::random().expect("urandom");
        std::fs::create_dir_all(dir.join(id.as_str())).expect("temp dir");
        let home = Places { disks: dir.clone(), sockets: dir.clone(), cgroups: dir.clone() }.of(&id);
        let mut log = GuestLog::default();
        log.begin("7".to_string());
        let mut take = |octets: &[u8]| log.take(&home, "abc", 5, octets);
        take(b"{\"a\":1}\n{\"b\"").expect("allowed");
        take(b":2}\ngarbage\n").expect("allowed");
        take(&[b"\"".to_vec(), vec![b'x'; LINE_MAX], b"\"\n1\n".to_vec()].concat()).expect("allowed");
        let (kept, _) = Ring::tail(&home.guest_log(), KEPT).expect("ring");
        let entry = |line: &str| format!("{{\"time_ms\":5,\"sandbox\":\"abc\",\"log\":{line}}}\n");
        let expected = [entry("{\"a\":1}"), entry("{\"b\":2}"), entry("1")].concat();
        assert_eq!(String::from_utf8_lossy(&kept), expected);

        let mut allowed = INITIAL_CREDIT - log.received;
        while allowed > 0 {
            let n = allowed.min(10_000);
            log.take(&home, "abc", 5, &vec![b' '; usize::try_from(n).expect("small")]).expect("allowed");
            allowed -= n;
        }
        assert_eq!(log.refill(), Some(("7", RATE)));
        assert!(log.take(&home, "abc", 5, &[b' '; RATE as usize]).is_ok());
        assert!(log.take(&home, "abc", 5, &vec![b' '; 1 << 20]).is_err());
        assert_eq!(log.refill(), Some(("7", RATE)), "what was refused is not counted");
        std::fs::remove_dir_all(&dir).expect("clean up");
    }
}
