//! Serial logs, read by clients, some of them while they grow.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use super::requests::Job;
use super::supervisor::{Supervisor, Timer};
use crate::control::client::Client;
use crate::sandbox::exec::Sink;
use crate::sandbox::flow::QUEUE_HIGH;
use crate::sandbox::id::SandboxId;
use crate::wire::{Code, Error, FRAME, Fields, INITIAL_CREDIT, Message};

/// How often followed logs are looked at: nothing tells when a file grows but a look at it.
const PERIOD: Duration = Duration::from_millis(100);

/// One client's reading of one log.
#[derive(Debug)]
pub struct Reader {
    /// Whose log it is; `None` for a file that does not grow.
    sandbox: Option<SandboxId>,
    channel: &'static str,
    file: File,
    offset: u64,
    credit: u64,
    follow: bool,
}

impl Reader {
    /// The reading of a file that is whole.
    pub fn of_file(channel: &'static str, file: File) -> Self {
        Self { sandbox: None, channel, file, offset: 0, credit: INITIAL_CREDIT, follow: false }
    }

    /// Whose log it is.
    pub fn sandbox(&self) -> Option<&SandboxId> {
        self.sandbox.as_ref()
    }

    /// What the client knows it by.
    pub fn channel(&self) -> &'static str {
        self.channel
    }

    /// The client allows more octets.
    pub fn credit(&mut self, octets: u64) {
        self.credit = self.credit.saturating_add(octets);
    }

    /// Sends what is there and allowed. `true` when the reading has ended; `live`: the log may still grow.
    pub fn pump(&mut self, tag: &str, sink: &mut dyn Sink, live: bool) -> bool {
        while self.credit > 0 && sink.queued() < QUEUE_HIGH {
            // The worker starts its bounded log over by truncating it.
            if self.file.metadata().is_ok_and(|m| m.len() < self.offset) {
                self.offset = 0;
            }
            let mut chunk = vec![0u8; usize::try_from(self.credit).unwrap_or(FRAME).min(FRAME)];
            match self.file.read_at(&mut chunk, self.offset) {
                Ok(n) if n > 0 => {
                    chunk.truncate(n);
                    self.offset += n as u64;
                    self.credit -= n as u64;
                    sink.send(&Message::data(tag, self.channel, chunk));
                }
                _ if self.follow && live => return false,
                _ => {
                    let fields = Fields::new();
                    let fields = if self.sandbox.is_none() { fields.with("size", self.offset) } else { fields };
                    sink.send(&Message::end(tag, self.channel));
                    sink.send(&Message::ok(tag, fields));
                    return true;
                }
            }
        }
        false
    }
}

impl Supervisor {
    pub(super) fn open_logs(&mut self, key: u64, tag: &str, given: &str, follow: bool) -> Result<(), Error> {
        let id = self.find(key, given)?;
        let Some(sandbox) = self.sandboxes.get(&id) else { return Ok(()) };
        let file = File::open(sandbox.home.serial_log())
            .map_err(|e| Error::new(Code::NotFound, format!("sandbox {id} has no log: {e}")))?;
        let sandbox = Some(id);
        let reader = Reader { sandbox, channel: "log", file, offset: 0, credit: INITIAL_CREDIT, follow };
        self.add_job(key, tag, Job::Logs(reader));
        if follow && !self.log_timer {
            self.log_timer = true;
            self.timers.after(PERIOD, Timer::Logs);
        }
        Ok(())
    }

    /// Looks at the followed logs again.
    pub(super) fn logs_due(&mut self) {
        let following =
            |client: &Client<Job>| client.jobs.values().any(|job| matches!(job, Job::Logs(reader) if reader.follow));
        let keys: Vec<u64> = self.clients.iter().filter(|(_, client)| following(client)).map(|(key, _)| *key).collect();
        self.log_timer = !keys.is_empty();
        if self.log_timer {
            self.timers.after(PERIOD, Timer::Logs);
        }
        self.touched_clients.extend(keys);
    }
}
