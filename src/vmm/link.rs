//! A connection from the supervisor: messages, and descriptors that ride with them (unix(7), SCM_RIGHTS).

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use mio::net::UnixStream;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

use crate::wire::{Decoded, Filled, Link, Message};

/// Most descriptors that wait for the request that names them: `vm.start` has a few, and one for each further disk and
/// each frozen layer. The kernel sends no more than 253 at once.
const MAX_DESCRIPTORS: usize = 96;

/// Stream that keeps the descriptors it receives.
#[derive(Debug)]
struct Receiver {
    stream: UnixStream,
    descriptors: Vec<OwnedFd>,
}

impl Read for Receiver {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let mut control = nix::cmsg_space!([RawFd; MAX_DESCRIPTORS]);
        let mut slices = [IoSliceMut::new(into)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let received = recvmsg::<()>(self.stream.as_raw_fd(), &mut slices, Some(&mut control), flags)?;
        for message in received.cmsgs()? {
            if let ControlMessageOwned::ScmRights(descriptors) = message {
                // SAFETY: the kernel has just put them into this process' table for this message; nobody else owns them.
                self.descriptors.extend(descriptors.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        if received.flags.contains(MsgFlags::MSG_CTRUNC) || self.descriptors.len() > MAX_DESCRIPTORS {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "more descriptors than a request takes"));
        }
        Ok(received.bytes)
    }
}

impl Write for Receiver {
    fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
        // The one call that the vsock device sends by as well, so the jail has one call less.
        Ok(sendmsg::<()>(self.stream.as_raw_fd(), &[IoSlice::new(octets)], &[], MsgFlags::MSG_NOSIGNAL, None)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One connection of the supervisor.
#[derive(Debug)]
pub struct Connection {
    link: Link<Receiver>,
}

/// A connection that carries messages no longer.
#[derive(Debug)]
pub struct RawStream {
    /// The stream, no longer registered anywhere.
    pub stream: UnixStream,
    /// Octets that the supervisor sent ahead.
    pub read_ahead: Vec<u8>,
}

impl Connection {
    /// Takes an accepted connection; it must be non-blocking.
    pub fn new(stream: UnixStream) -> Self {
        Self { link: Link::new(Receiver { stream, descriptors: Vec::new() }) }
    }

    /// The stream, to register or deregister.
    pub fn stream(&mut self) -> &mut UnixStream {
        &mut self.link.stream().stream
    }

    /// Reads once; see `wire::Link::fill`.
    pub fn fill(&mut self) -> io::Result<Filled> {
        self.link.fill()
    }

    /// The next whole message.
    #[allow(clippy::should_implement_trait)] // not an iterator: `None` is not the end
    pub fn next(&mut self) -> Option<Decoded> {
        self.link.next()
    }

    /// The descriptors that came since this was last called.
    pub fn take_descriptors(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.link.stream().descriptors)
    }

    /// Sends a message as far as the stream takes it now; the rest is sent when it is writable.
    pub fn send(&mut self, message: &Message) -> io::Result<()> {
        self.link.send(message);
        self.flush()
    }

    /// Sends what waits.
    pub fn flush(&mut self) -> io::Result<()> {
        self.link.flush().map(|_| ())
    }

    /// Octets that wait to be sent.
    pub fn queued(&self) -> usize {
        self.link.queued()
    }

    /// Ends the messages: what follows on the stream belongs to somebody else. Replies that the peer has not taken yet
    /// are lost; a peer that turns its connection into a stream has none under way.
    pub fn into_raw(self) -> RawStream {
        let (receiver, read_ahead, _) = self.link.into_parts();
        RawStream { stream: receiver.stream, read_ahead }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream as StdStream;

    use nix::sys::socket::ControlMessage;

    use super::*;

    fn pair() -> (StdStream, Connection) {
        let (ours, theirs) = StdStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        (ours, Connection::new(UnixStream::from_std(theirs)))
    }

    fn send_with(stream: &StdStream, octets: &[u8], descriptors: &[RawFd]) {
        let control = [ControlMessage::ScmRights(descriptors)];
        sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(octets)], &control, MsgFlags::empty(), None).unwrap();
    }

    #[test]
    fn descriptors_arrive_with_their_request() {
        let (ours, mut connection) = pair();
        send_with(&ours, b"1 vm.start kvm=fd:0\n", &[ours.as_raw_fd(), ours.as_raw_fd()]);
        assert_eq!(connection.fill().unwrap(), Filled::More);
        assert!(matches!(connection.next(), Some(Decoded::Message(Message::Request(_)))));
        assert_eq!(connection.take_descriptors().len(), 2);
        assert!(connection.take_descriptors().is_empty());
    }

    #[test]
    fn a_peer_that_sends_too_many_descriptors_is_an_error() {
        let (ours, mut connection) = pair();
        for _ in 0..2 {
            send_with(&ours, b"x", &[ours.as_raw_fd(); MAX_DESCRIPTORS / 2 + 1]);
        }
        assert!(connection.fill().and_then(|_| connection.fill()).is_err());
        let (ours, mut connection) = pair();
        send_with(&ours, b"x", &[ours.as_raw_fd(); MAX_DESCRIPTORS + 1]);
        assert!(connection.fill().is_err());
    }

    #[test]
    fn octets_sent_ahead_of_the_reply_are_kept_for_the_raw_stream() {
        let (mut ours, mut connection) = pair();
        ours.write_all(b"1 vsock.connect port=5\nearly").unwrap();
        connection.fill().unwrap();
        assert!(connection.next().is_some());
        assert!(connection.next().is_none());
        assert_eq!(connection.into_raw().read_ahead, b"early");
    }
}
