//! How clients come in: by the control socket, one connection each, and by the control port.

use std::time::Duration;

use super::listener::Listener;
use super::requests::Job;
use super::supervisor::{Source, Supervisor, Timer};
use crate::control::access::{Identity, Peer};
use crate::control::client::Client;
use crate::control::port::Port;

/// How often the control port is looked for after the start; the last look is about 13 s after it.
const PORT_LOOKS: u32 = 8;
/// Pause before a control port is tried again that is there and cannot be opened.
const PORT_AGAIN: Duration = Duration::from_millis(200);
/// Requests under way at once through the control port, which is one connection for all clients behind a bridge.
const PORT_REQUESTS: usize = 4096;

impl Supervisor {
    /// Looks for the control port, and again where it is not there yet or cannot be opened.
    pub(super) fn open_port(&mut self) {
        let path = std::path::Path::new("/dev/virtio-ports").join(crate::control::port::NAME);
        if !path.exists() {
            // The host may name its ports late, and most nodes have none: a cheap look, less and less often.
            if self.port_looks < PORT_LOOKS {
                self.timers.after(Duration::from_millis(50) * 2u32.pow(self.port_looks), Timer::Port);
                self.port_looks += 1;
            }
            return;
        }
        match Port::open(&path) {
            Ok(port) => {
                self.add_client(Client::port(port, PORT_REQUESTS));
            }
            Err(e) => {
                // What the supervisor before had begun may still have it open, for as long as its end takes.
                if self.port_looks < PORT_LOOKS {
                    log::error!("control port {}: {e}; it is tried again", path.display());
                    self.port_looks = PORT_LOOKS;
                }
                self.timers.after(PORT_AGAIN, Timer::Port);
            }
        }
    }

    /// The port was closed, by a fault of it or because its host took no answers: whoever is behind it has no other way here.
    pub(super) fn reopen_port(&mut self) {
        log::warn!("the control port is opened anew");
        self.port_looks = 0;
        self.timers.after(PORT_AGAIN, Timer::Port);
    }

    /// Takes the connections that wait at the control socket.
    pub(super) fn accept(&mut self) {
        if !self.meeting.is_over() {
            return;
        }
        loop {
            let Some(listener) = &self.listener else { return };
            match listener.accept() {
                Ok(Some(stream)) => {
                    let peer = match Peer::of(&stream) {
                        Ok(peer) => peer,
                        Err(e) => {
                            log::warn!("a client's credentials cannot be read: {e}");
                            continue;
                        }
                    };
                    let own = nix::unistd::geteuid().as_raw();
                    let Some(identity) = Identity::of(&peer, &self.config.control.peers, own) else {
                        log::warn!("a client of user {} (process {}) has no role", peer.uid, peer.pid);
                        Listener::refuse_peer(stream, peer.uid);
                        continue;
                    };
                    if self.clients.len() as u64 >= self.config.control.max_clients {
                        Listener::refuse(stream, self.config.control.max_clients);
                        continue;
                    }
                    let max_jobs = usize::try_from(self.config.control.max_requests_per_client).unwrap_or(usize::MAX);
                    self.add_client(Client::socket(stream, identity, max_jobs));
                }
                Ok(None) => return,
                Err(e) => {
                    log::error!("control socket: {e}");
                    return;
                }
            }
        }
    }

    /// Takes up a connection; its key.
    pub(super) fn add_client(&mut self, mut client: Client<Job>) -> u64 {
        let key = self.next_client;
        self.next_client += 1;
        match self.watch(client.descriptor(), Source::Client(key)) {
            Ok(token) => {
                self.client_tokens.insert(key, token);
                self.clients.insert(key, client);
            }
            Err(e) => log::error!("a client cannot be watched: {e}"),
        }
        key
    }
}
