//! The agent calls the host when its links were taken away.
//!
//! A restore resets the vsock transport: every connection is gone at once, although nobody closed it, and the node that
//! restored the sandbox waits for its agent as at a boot. A supervisor that ends closes its links instead; the next one
//! comes to the agent's listener, so nobody is called then.

use std::fs::File;
use std::time::{Duration, Instant};

use super::agent::{Agent, Door, Due};
use super::connection::{Connection, greeting};
use super::socket;

/// The first pause before the host is called again, and the longest; each is twice the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// A call to the host.
#[derive(Debug)]
pub(super) struct Call {
    /// The link that is being made; `None` during a pause.
    link: Option<u64>,
    /// The pause after it when nobody takes it.
    pause: Duration,
}

impl Agent {
    /// A link is gone; `torn`: with the transport.
    pub(super) fn lost(&mut self, id: u64, torn: bool) {
        match &self.call {
            Some(Call { link, pause }) if *link == Some(id) => {
                let pause = *pause;
                self.call = Some(Call { link: None, pause: (pause * 2).min(LONGEST_PAUSE) });
                self.add_due(Instant::now() + pause, Due::Call);
            }
            // However many links were torn, it is one call.
            None if torn && matches!(self.door, Door::Vsock(_)) => {
                self.call = Some(Call { link: None, pause: FIRST_PAUSE });
                self.call_again();
            }
            _ => {}
        }
    }

    /// The host has taken a link.
    pub(super) fn answered(&mut self, id: u64) {
        if self.call.as_ref().is_some_and(|call| call.link == Some(id)) {
            self.call = None;
        }
    }

    /// Calls the host, unless it came by itself meanwhile.
    pub(super) fn call_again(&mut self) {
        let Some(Call { link: None, pause }) = self.call else { return };
        let made = socket::connect_to_host().ok().and_then(|uplink| {
            let mut connection = Connection::new(File::from(uplink));
            connection.connecting = true;
            connection.link.send(&greeting(self.hello().with("resumed", true)));
            self.adopt(connection)
        });
        self.call = Some(Call { link: made, pause });
        if made.is_none() {
            self.call = Some(Call { link: None, pause: (pause * 2).min(LONGEST_PAUSE) });
            self.add_due(Instant::now() + pause, Due::Call);
        }
    }
}
