//! Logs of sandboxes, their consoles' and their programs', read by clients, some of them while they grow.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use super::requests::Job;
use super::supervisor::{Supervisor, Timer};
use crate::control::client::Client;
use crate::control::command::LogSource;
use crate::sandbox::exec::Sink;
use crate::sandbox::flow::QUEUE_HIGH;
use crate::sandbox::guest_log;
use crate::sandbox::id::SandboxId;
use crate::storage::ring::Ring;
use crate::vmm::devices::console::LOG_BYTES;
use crate::wire::{Code, Error, FRAME, Fields, INITIAL_CREDIT, Message};

/// How often followed logs are looked at: nothing tells when a file grows but a look at it.
const PERIOD: Duration = Duration::from_millis(100);
/// Octets by which a reader finds its place again in a log that was begun anew.
const MARK: usize = 64;

/// One client's reading of one log.
#[derive(Debug)]
pub struct Reader {
    /// Whose log it is; `None` for a file that does not grow.
    sandbox: Option<SandboxId>,
    channel: &'static str,
    origin: Origin,
    offset: u64,
    credit: u64,
    follow: bool,
}

#[derive(Debug)]
enum Origin {
    /// A file that is begun anew with its end when it is full. `mark` is what was read last, `seen` its longest.
    File { file: File, mark: Vec<u8>, seen: u64 },
    /// A ring that somebody else writes.
    Ring(Ring),
}

impl Origin {
    fn of_file(file: File) -> Self {
        Self::File { file, mark: Vec::new(), seen: 0 }
    }

    /// Reads on from `offset`, which is moved where that is not there any more. Gives the octets that are lost by that, as
    /// far as is known, and those that were read.
    fn read(&mut self, offset: &mut u64, length: usize) -> io::Result<(u64, Vec<u8>)> {
        let mut chunk = vec![0u8; length];
        match self {
            Self::Ring(ring) => {
                ring.refresh()?;
                let mut lost = 0;
                if *offset < ring.oldest() {
                    let start = line_start(ring)?;
                    lost = start - *offset;
                    *offset = start;
                }
                let read = ring.read_at(*offset, &mut chunk)?;
                chunk.truncate(read);
                *offset += chunk.len() as u64;
                Ok((lost, chunk))
            }
            Self::File { file, mark, seen } => {
                let mut before = vec![0; mark.len()];
                let at = offset.saturating_sub(mark.len() as u64);
                let mut lost = 0;
                if file.read_exact_at(&mut before, at).is_err() || before != *mark {
                    let mut all = Vec::new();
                    let mut whole = &*file;
                    io::Seek::seek(&mut whole, io::SeekFrom::Start(0))?;
                    // The worker, which writes it, keeps it shorter than that, and is not trusted to.
                    io::Read::read_to_end(&mut io::Read::take(whole, (*seen).min(2 * LOG_BYTES)), &mut all)?;
                    let place = all.windows(mark.len().max(1)).rposition(|window| window == mark.as_slice());
                    (lost, *offset) = match place {
                        Some(place) => (0, (place + mark.len()) as u64),
                        None => (seen.saturating_sub(*offset).max(1), 0),
                    };
                }
                *seen = file.metadata()?.len().max(*seen);
                let read = file.read_at(&mut chunk, *offset)?;
                chunk.truncate(read);
                *offset += chunk.len() as u64;
                mark.extend_from_slice(&chunk);
                mark.drain(..mark.len().saturating_sub(MARK));
                Ok((lost, chunk))
            }
        }
    }
}

/// Where the first whole line of a ring begins.
fn line_start(ring: &Ring) -> io::Result<u64> {
    let mut at = ring.oldest();
    if at == 0 {
        return Ok(0);
    }
    let mut chunk = [0; 4096];
    loop {
        let read = ring.read_at(at, &mut chunk)?;
        match chunk[..read].iter().position(|octet| *octet == b'\n') {
            Some(place) => return Ok(at + place as u64 + 1),
            None if read == 0 => return Ok(at),
            None => at += read as u64,
        }
    }
}

impl Reader {
    /// The reading of a file that is whole.
    pub fn of_file(channel: &'static str, file: File) -> Self {
        let origin = Origin::of_file(file);
        Self { sandbox: None, channel, origin, offset: 0, credit: INITIAL_CREDIT, follow: false }
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
            let length = usize::try_from(self.credit).unwrap_or(FRAME).min(FRAME);
            let (lost, chunk) = self.origin.read(&mut self.offset, length).unwrap_or_default();
            if lost > 0 {
                sink.send(&Message::item(tag, Fields::new().with("lost", lost)));
            }
            if !chunk.is_empty() {
                self.credit -= chunk.len() as u64;
                sink.send(&Message::data(tag, self.channel, chunk));
            } else if self.follow && live {
                return false;
            } else {
                let fields = Fields::new();
                let fields = if self.sandbox.is_none() { fields.with("size", self.offset) } else { fields };
                sink.send(&Message::end(tag, self.channel));
                sink.send(&Message::ok(tag, fields));
                return true;
            }
        }
        false
    }
}

impl Supervisor {
    pub(super) fn open_logs(
        &mut self,
        key: u64,
        tag: &str,
        given: &str,
        follow: bool,
        source: LogSource,
    ) -> Result<(), Error> {
        let id = self.find(key, given)?;
        let Some(sandbox) = self.sandboxes.get_mut(&id) else { return Ok(()) };
        let opened = match source {
            LogSource::Console => File::open(sandbox.home.serial_log()).map(Origin::of_file),
            LogSource::Guest => {
                let path = sandbox.home.guest_log();
                let there = sandbox.guest_log.prepare(&sandbox.home).map(drop);
                there.and_then(|()| Ring::open(&path, guest_log::KEPT)).map(Origin::Ring)
            }
        };
        let origin = opened.map_err(|e| Error::new(Code::NotFound, format!("sandbox {id} has no log: {e}")))?;
        // What is kept is read from its start, and is all that there is.
        let offset = if let Origin::Ring(ring) = &origin { line_start(ring).unwrap_or(ring.oldest()) } else { 0 };
        let reader = Reader { sandbox: Some(id), channel: "log", origin, offset, credit: INITIAL_CREDIT, follow };
        self.add_job(key, tag, Job::Logs(Box::new(reader)));
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

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// Takes messages for a client that has room for some.
    #[derive(Default)]
    struct Taken(Vec<Message>);

    impl Sink for Taken {
        fn send(&mut self, message: &Message) {
            self.0.push(message.clone());
        }
        fn queued(&self) -> usize {
            0
        }
    }

    #[test]
    fn who_stops_reading_a_ring_is_told_exactly_how_much_of_it_is_lost_and_goes_on_with_a_line() {
        let path = std::env::temp_dir().join(format!("warren-follow-ring-{}", std::process::id()));
        let mut ring = Ring::create(&path, 4096).expect("a ring");
        let origin = Origin::Ring(Ring::open(&path, 4096).expect("the ring"));
        let mut reader = Reader { sandbox: None, channel: "log", origin, offset: 0, credit: 10, follow: true };
        let mut taken = Taken::default();
        for number in 0..1000u32 {
            ring.append(format!("line {number:04}\n").as_bytes()).expect("append");
            assert!(!reader.pump("a", &mut taken, true));
        }
        assert_eq!(taken.0.len(), 1, "what it had credit for");
        reader.credit(1 << 20);
        assert!(!reader.pump("a", &mut taken, true));
        let Message::Item { fields, .. } = &taken.0[1] else { panic!("{:?}", taken.0) };
        let text = taken.0.iter().filter_map(|message| match message {
            Message::Data { payload, .. } => Some(String::from_utf8_lossy(payload).into_owned()),
            _ => None,
        });
        let text: String = text.collect();
        assert_eq!(fields.number("lost").expect("a count") + text.len() as u64, 10_000);
        assert!(text.starts_with("line 0000\nline 0") && text.ends_with("line 0999\n"), "{text}");
        std::fs::remove_file(&path).expect("clean up");
    }

    #[test]
    fn a_log_that_is_begun_anew_is_read_on_where_it_was_left_or_says_what_is_lost() {
        let path = std::env::temp_dir().join(format!("warren-follow-{}", std::process::id()));
        std::fs::write(&path, "one\ntwo\n").expect("write");
        let mut origin = Origin::of_file(File::open(&path).expect("open"));
        let (mut offset, mut file) = (0, File::options().write(true).open(&path).expect("open"));
        let mut text = |offset: &mut u64| {
            let (lost, octets) = origin.read(offset, 1000).expect("read");
            (lost, String::from_utf8(octets).expect("text"))
        };
        assert_eq!(text(&mut offset), (0, "one\ntwo\n".to_string()));
        // Its end is kept, as the worker does.
        file.set_len(0).expect("truncate");
        file.write_all(b"one\ntwo\nthree\n").expect("write");
        assert_eq!(text(&mut offset), (0, "three\n".to_string()));
        file.set_len(0).expect("truncate");
        let mut file = File::options().append(true).open(&path).expect("open");
        file.write_all(b"something else that is longer\n").expect("write");
        assert_eq!(text(&mut offset), (1, "something else that is longer\n".to_string()));
        std::fs::remove_file(&path).expect("clean up");
    }
}
