//! Init's end of the link to the supervisor. Each start of the supervisor gets a fresh one.
//!
//! | request | answer |
//! |---|---|
//! | `exits.watch` | `item pid= cgroup= code=` or `signal=` for each kept end of a worker and each later one |
//! | `exits.ack pid=` | `ok`: that end is forgotten |
//! | `node.stop mode=poweroff` or `reboot` | `ok`, then the node stops |

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use super::client::{ChildExit, StopMode};
use super::reaper::Kept;
use crate::wire::{Args, Code, Decoded, Error, Fields, Filled, Link, Message, Request};

/// The stream and who watches.
#[derive(Debug)]
pub struct SupervisorLink {
    link: Link<UnixStream>,
    /// Tag of the request `exits.watch`, once it came.
    watch: Option<String>,
}

impl SupervisorLink {
    /// A new link, and the descriptor that the supervisor inherits.
    pub fn new() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        Ok((Self { link: Link::new(ours), watch: None }, theirs.into()))
    }

    /// To poll for reading, and for writing while `wants_to_write`.
    pub fn descriptor(&mut self) -> BorrowedFd<'_> {
        UnixStream::as_fd(self.link.stream())
    }

    /// Whether something waits for the supervisor to read.
    pub fn wants_to_write(&self) -> bool {
        self.link.queued() > 0
    }

    /// Tells the supervisor of an end, where it watches.
    pub fn announce(&mut self, exit: &ChildExit) {
        if let Some(tag) = &self.watch {
            self.link.send(&Message::item(tag, exit.to_fields()));
        }
    }

    /// Reads and answers what came. Gives a wish to stop; an error means that the link is of no more use.
    pub fn handle(&mut self, kept: &mut Kept) -> io::Result<Option<StopMode>> {
        let mut stop = None;
        let result = self.serve(kept, &mut stop);
        // Its last wish holds, whether or not it is still there to hear the answer.
        if stop.is_some() { Ok(stop) } else { result.map(|()| None) }
    }

    fn serve(&mut self, kept: &mut Kept, stop: &mut Option<StopMode>) -> io::Result<()> {
        loop {
            match self.link.fill()? {
                Filled::More => {}
                Filled::Drained => return Ok(()),
                Filled::Closed => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
            while let Some(decoded) = self.link.next() {
                let (tag, result) = match decoded {
                    Decoded::Message(Message::Request(request)) => {
                        (request.tag.clone(), self.answer(request, kept, stop))
                    }
                    Decoded::Message(other) => {
                        let error = Error::new(Code::BadLine, "only requests are expected here");
                        (other.tag().to_string(), Err(error))
                    }
                    Decoded::Bad { tag, error } => (tag, Err(error)),
                };
                match result {
                    Ok(true) => self.link.send(&Message::ok(&tag, Fields::new())),
                    Ok(false) => {}
                    Err(error) => {
                        log::error!("supervisor sent a bad request: {error}");
                        self.link.send(&Message::err(&tag, error));
                    }
                }
            }
            // Answers are short and requests need one each; who sends without reading is not read on.
            if !self.link.flush()? {
                return Ok(());
            }
        }
    }

    /// Writes what waits.
    pub fn flush(&mut self) -> io::Result<()> {
        self.link.flush().map(|_| ())
    }

    /// Whether the request ends with `ok`; a watch goes on.
    fn answer(&mut self, request: Request, kept: &mut Kept, stop: &mut Option<StopMode>) -> Result<bool, Error> {
        let (tag, verb) = (request.tag.clone(), request.verb.clone());
        let mut args = Args::of(request);
        match verb.as_str() {
            "exits.watch" => {
                args.finish()?;
                if self.watch.is_some() {
                    return Err(Error::new(Code::BadState, "exits.watch is under way"));
                }
                for exit in kept.iter() {
                    self.link.send(&Message::item(&tag, exit.to_fields()));
                }
                self.watch = Some(tag);
                Ok(false)
            }
            "exits.ack" => {
                let pid = args.number("pid", 1..=u64::from(u32::MAX))?;
                args.finish()?;
                let pid = pid.ok_or_else(|| Error::new(Code::MissingArgument, "pid is missing"))?;
                if u32::try_from(pid).is_ok_and(|pid| kept.acknowledge(pid)) {
                    return Ok(true);
                }
                Err(Error::new(Code::NotFound, format!("no end of process {pid} is kept")))
            }
            "node.stop" => {
                let mode = args.text("mode")?.unwrap_or_else(|| "poweroff".to_string());
                args.finish()?;
                let parsed = StopMode::parse(&mode);
                *stop = Some(parsed.ok_or_else(|| {
                    Error::new(Code::BadArgument, format!("mode={mode} is neither poweroff nor reboot"))
                })?);
                Ok(true)
            }
            _ => Err(Error::new(Code::UnknownVerb, format!("no verb {verb}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::super::client::{ChildStatus, ExitWatch};
    use super::*;

    fn exit(pid: u32, status: ChildStatus) -> ChildExit {
        ChildExit { pid, cgroup: format!("/sandboxes/s{pid}"), status }
    }

    fn pair() -> (SupervisorLink, ExitWatch) {
        let (link, theirs) = SupervisorLink::new().unwrap();
        (link, ExitWatch::new(UnixStream::from(theirs)).unwrap())
    }

    #[test]
    fn kept_and_later_ends_reach_the_supervisor_until_it_acknowledges() {
        let (mut link, mut watch) = pair();
        let mut kept = Kept::default();
        kept.push(exit(5, ChildStatus::Code(1)));
        assert_eq!(link.handle(&mut kept).unwrap(), None);
        assert_eq!(watch.read_events(), [exit(5, ChildStatus::Code(1))]);

        let later = exit(6, ChildStatus::Signal(9));
        kept.push(later.clone());
        link.announce(&later);
        link.flush().unwrap();
        assert_eq!(watch.read_events(), std::slice::from_ref(&later));
        watch.ack(5);
        link.handle(&mut kept).unwrap();
        assert_eq!(watch.read_events(), []);

        // The supervisor is killed: the next one hears of what was not acknowledged.
        drop(watch);
        assert!(link.handle(&mut kept).is_err());
        let (mut link, mut watch) = pair();
        link.handle(&mut kept).unwrap();
        assert_eq!(watch.read_events(), [later]);
    }

    #[test]
    fn a_wish_to_stop_is_heard_and_answered() {
        let (mut link, mut watch) = pair();
        watch.request_stop(StopMode::Reboot);
        assert_eq!(link.handle(&mut Kept::default()).unwrap(), Some(StopMode::Reboot));
        assert_eq!(watch.read_events(), []);
        assert!(!watch.is_lost());
    }

    #[test]
    fn a_wish_to_stop_outlives_who_had_it() {
        let (mut link, mut watch) = pair();
        watch.request_stop(StopMode::PowerOff);
        drop(watch);
        assert_eq!(link.handle(&mut Kept::default()).unwrap(), Some(StopMode::PowerOff));
    }

    #[test]
    fn garbage_gets_typed_errors_and_changes_nothing() {
        let (mut link, theirs) = SupervisorLink::new().unwrap();
        let mut theirs = UnixStream::from(theirs);
        theirs
            .write_all(
                b"\xff\xff\n1 node.stop mode=explode\n2 exits.ack pid=5\n3 exits.ack\n4 x.y\n5 ok\n6 node.stop a\n",
            )
            .unwrap();
        let mut kept = Kept::default();
        assert_eq!(link.handle(&mut kept).unwrap(), None);
        let mut answers = vec![0; 4096];
        let n = theirs.read(&mut answers).unwrap();
        let answers = String::from_utf8_lossy(&answers[..n]).into_owned();
        let codes: Vec<&str> = answers.lines().filter_map(|line| line.split(' ').nth(2)).collect();
        assert_eq!(
            codes,
            [
                "BAD_LINE",
                "BAD_ARGUMENT",
                "NOT_FOUND",
                "MISSING_ARGUMENT",
                "UNKNOWN_VERB",
                "BAD_LINE",
                "UNKNOWN_ARGUMENT"
            ]
        );
    }

    #[test]
    fn only_one_part_below_sandboxes_names_a_sandbox() {
        let of = |cgroup: &str| ChildExit { pid: 1, cgroup: cgroup.to_string(), status: ChildStatus::Code(0) };
        assert_eq!(of("/sandboxes/abc").sandbox(), Some("abc"));
        for other in ["/sandboxes/", "/sandboxes/a/b", "/supervise", ""] {
            assert_eq!(of(other).sandbox(), None, "{other}");
        }
    }
}
