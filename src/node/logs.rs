//! Logs of sandboxes, their consoles' and their programs', read by clients, some of them while they grow.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use super::requests::Job;
use super::supervisor::{Supervisor, Timer};
use crate::control::client::Client;
use crate::control::command::{LogSource, LogStart};
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

impl LogStart {
    /// The place in what is kept.
    fn of(self, kept: &[u8]) -> usize {
        let mut at = 0;
        if let Some(since) = self.since_ms {
            let earlier = |line: &&[u8]| time_of(line).is_none_or(|time| time < since);
            at = kept.split_inclusive(|octet| *octet == b'\n').take_while(earlier).map(<[u8]>::len).sum();
        }
        match self.tail {
            None => at,
            Some(0) => kept.len(),
            Some(lines) => {
                let body = kept.strip_suffix(b"\n").unwrap_or(kept);
                let ends = body.iter().enumerate().rev().filter(|(_, octet)| **octet == b'\n');
                let before = usize::try_from(lines - 1).ok().and_then(|lines| ends.map(|(at, _)| at + 1).nth(lines));
                at.max(before.unwrap_or(0))
            }
        }
    }
}

/// The time of a line that a program has logged, which `sandbox::guest_log` has put in front.
fn time_of(line: &[u8]) -> Option<u64> {
    let digits = line.strip_prefix(guest_log::TIME.as_bytes())?;
    let end = digits.iter().position(|octet| !octet.is_ascii_digit())?;
    std::str::from_utf8(&digits[..end]).ok()?.parse().ok()
}

impl Origin {
    /// Where a reading begins.
    fn begin(&mut self, from: LogStart) -> io::Result<u64> {
        let anywhere = from == LogStart::default();
        let begin = match self {
            // What is kept is read from its start, and is all that there is.
            Self::Ring(ring) => line_start(ring).unwrap_or(ring.oldest()),
            Self::File { .. } if anywhere => 0,
            // The worker, which writes it, keeps it shorter than that, and is not trusted to.
            Self::File { file, .. } => file.metadata()?.len().saturating_sub(2 * LOG_BYTES),
        };
        if anywhere {
            return Ok(begin);
        }
        let (mut kept, mut chunk) = (Vec::new(), vec![0; 64 * 1024]);
        while (kept.len() as u64) < 2 * LOG_BYTES {
            let at = begin + kept.len() as u64;
            match match self {
                Self::Ring(ring) => ring.read_at(at, &mut chunk)?,
                Self::File { file, .. } => file.read_at(&mut chunk, at)?,
            } {
                0 => break,
                read => kept.extend_from_slice(&chunk[..read]),
            }
        }
        let at = from.of(&kept);
        if let Self::File { mark, seen, .. } = self {
            *mark = kept[at.saturating_sub(MARK)..at].to_vec();
            *seen = begin + kept.len() as u64;
        }
        Ok(begin + at as u64)
    }

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
        from: LogStart,
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
        let begun = opened.and_then(|mut origin| Ok((origin.begin(from)?, origin)));
        let (offset, origin) =
            begun.map_err(|e| Error::new(Code::NotFound, format!("sandbox {id} has no log: {e}")))?;
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

    fn from(tail: Option<u64>, since_ms: Option<u64>) -> LogStart {
        LogStart { tail, since_ms }
    }

    #[test]
    fn a_reading_begins_with_a_line_before_the_end_or_at_a_time() {
        let console = b"one\ntwo\n\nlast";
        for (tail, expected) in [(0, ""), (1, "last"), (2, "\nlast"), (3, "two\n\nlast"), (4, "one\ntwo\n\nlast")] {
            let at = from(Some(tail), None).of(console);
            assert_eq!(&console[at..], expected.as_bytes(), "{tail}");
        }
        assert_eq!(from(Some(u64::MAX), None).of(console), 0);
        assert_eq!((from(Some(1), None).of(b"one\ntwo\n"), from(Some(1), None).of(b"")), (4, 0));
        let line = |time: u64| format!("{{\"time_ms\":{time},\"sandbox\":\"x\",\"log\":\"{time}\"}}\n");
        let (first, second, third) = (line(998), line(1000), line(1002));
        let timed = [first.as_str(), &second, &third].concat().into_bytes();
        let rest = |tail, since| String::from_utf8(timed[from(tail, Some(since)).of(&timed)..].to_vec()).expect("text");
        assert_eq!(rest(None, 0).len(), timed.len());
        assert_eq!(rest(None, 999), format!("{second}{third}"));
        assert_eq!(rest(None, 1002), third);
        assert_eq!(rest(None, 1003), "");
        assert_eq!((rest(Some(1), 0), rest(Some(2), 1002)), (third.clone(), third));
    }

    #[test]
    fn a_log_that_was_begun_anew_after_a_reading_from_its_end_began_is_read_on_all_the_same() {
        let path = std::env::temp_dir().join(format!("warren-tail-{}", std::process::id()));
        let log: String = (0..50).map(|number| format!("line {number:02}\n")).collect();
        std::fs::write(&path, &log).expect("write");
        let mut origin = Origin::of_file(File::open(&path).expect("open"));
        let mut offset = origin.begin(from(Some(1), None)).expect("a start");
        assert_eq!(&log[offset as usize..], "line 49\n");
        // Its end is kept, as the worker does.
        std::fs::write(&path, format!("{}line 50\n", &log[200..])).expect("write");
        let (lost, octets) = origin.read(&mut offset, 1000).expect("read");
        assert_eq!((lost, octets.as_slice()), (0, &b"line 49\nline 50\n"[..]));
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
