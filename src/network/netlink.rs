//! Netlink: how messages for the kernel are written and how its answers are read (netlink(7),
//! Documentation/userspace-api/netlink/intro.rst).
//!
//! The kernel answers a request before its `sendmsg` returns, so every exchange here is one request and its answers, in
//! order, on a socket that nobody else uses. Answers are read as if they were hostile: lengths before use, no panic.

use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::sockopt::{ReceiveTimeout, SndBufForce};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket};
use nix::sys::time::{TimeVal, TimeValLike};

// <linux/netlink.h>
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// It is a request.
const REQUEST: u16 = 0x1;
/// It is to be answered also when it succeeds.
pub const ACK: u16 = 0x4;
/// Every object is asked for.
pub const DUMP: u16 = 0x300;
/// An object that is there is replaced.
pub const REPLACE: u16 = 0x100;
/// It must not be there yet.
pub const EXCL: u16 = 0x200;
/// An object that is not there is made.
pub const CREATE: u16 = 0x400;
/// It is put behind those that are there.
pub const APPEND: u16 = 0x800;
/// Of an answer: objects changed while they were listed.
const DUMP_INTERRUPTED: u16 = 0x10;
/// Of an error: it does not repeat the request but for its header.
const CAPPED: u16 = 0x100;
/// Of an error: attributes follow.
const ACK_TLVS: u16 = 0x200;
/// Of an attribute: it holds attributes.
const NESTED: u16 = 0x8000;
/// The bits of an attribute's type that are its number.
const TYPE_MASK: u16 = 0x3fff;
// enum nlmsgerr_attrs
const NLMSGERR_ATTR_MSG: u16 = 1;
const NLMSGERR_ATTR_OFFS: u16 = 2;

/// Octets of `struct nlmsghdr`.
pub const HEADER: usize = 16;
/// Octets that are read at once. The kernel cuts its lists to at most 32 KiB (netlink_dump).
const BUFFER: usize = 64 * 1024;
/// Longest text of the kernel that is passed on.
const MAX_TEXT: usize = 256;
/// A list that keeps changing while it is read is begun anew this often.
const DUMP_TRIES: usize = 5;

/// Attributes one after the other.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attributes(Vec<u8>);

impl Attributes {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    fn add(mut self, kind: u16, data: &[u8]) -> Self {
        // What is longer than an attribute can be is cut off here and refused by the kernel; callers split their lists.
        let data = data.get(..usize::from(u16::MAX) - 4).unwrap_or(data);
        self.0.extend((4 + data.len() as u16).to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(data);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// Octets as they are.
    pub fn octets(self, kind: u16, data: &[u8]) -> Self {
        self.add(kind, data)
    }

    /// A number in the machine's own order: what rtnetlink uses.
    pub fn native32(self, kind: u16, value: u32) -> Self {
        self.add(kind, &value.to_ne_bytes())
    }

    /// A number in network order: what nfnetlink uses.
    pub fn be32(self, kind: u16, value: u32) -> Self {
        self.add(kind, &value.to_be_bytes())
    }

    /// Text with the zero behind it.
    pub fn text(self, kind: u16, text: &str) -> Self {
        self.add(kind, &[text.as_bytes(), &[0]].concat())
    }

    /// Attributes within an attribute.
    pub fn nest(self, kind: u16, inner: Self) -> Self {
        self.add(kind | NESTED, &inner.0)
    }

    /// Attributes that are there already, behind these.
    pub fn and(mut self, others: Self) -> Self {
        self.0.extend(others.0);
        self
    }

    /// All octets.
    pub fn as_octets(&self) -> &[u8] {
        &self.0
    }
}

/// A request: its type and flags, the fixed structure that begins its content, and its attributes.
#[derive(Debug, Clone)]
pub struct Request {
    kind: u16,
    flags: u16,
    fixed: Vec<u8>,
    attributes: Attributes,
}

impl Request {
    /// A request; `fixed` is the structure that its type prescribes.
    pub fn new(kind: u16, flags: u16, fixed: &[u8], attributes: Attributes) -> Self {
        Self { kind, flags: flags | REQUEST, fixed: fixed.to_vec(), attributes }
    }

    fn write(&self, sequence: u32, extra: u16, to: &mut Vec<u8>) {
        let fixed = self.fixed.len().next_multiple_of(4);
        let len = HEADER + fixed + self.attributes.0.len();
        let begin = to.len();
        // A request is at most a few attributes of 64 KiB.
        to.extend((len as u32).to_ne_bytes());
        to.extend(self.kind.to_ne_bytes());
        to.extend((self.flags | extra).to_ne_bytes());
        to.extend(sequence.to_ne_bytes());
        to.extend([0; 4]); // from this socket's own address
        to.extend(&self.fixed);
        to.resize(begin + HEADER + fixed, 0);
        to.extend(&self.attributes.0);
    }
}

/// A message of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received<'a> {
    /// Its type.
    pub kind: u16,
    /// `NLM_F_*`.
    pub flags: u16,
    /// Of the request that it answers.
    pub sequence: u32,
    /// What follows its header.
    pub payload: &'a [u8],
}

/// The messages in what was received. One that is cut ends them.
pub fn messages(mut octets: &[u8]) -> impl Iterator<Item = Received<'_>> {
    std::iter::from_fn(move || {
        let len = u32::from_ne_bytes(*octets.first_chunk()?) as usize;
        let kind = u16::from_ne_bytes(*octets.get(4..)?.first_chunk()?);
        let flags = u16::from_ne_bytes(*octets.get(6..)?.first_chunk()?);
        let sequence = u32::from_ne_bytes(*octets.get(8..)?.first_chunk()?);
        let payload = octets.get(HEADER..len)?;
        octets = len.checked_next_multiple_of(4).and_then(|len| octets.get(len..)).unwrap_or_default();
        Some(Received { kind, flags, sequence, payload })
    })
}

/// The attributes in some octets: number and content. One that is cut ends them.
pub fn attributes(mut octets: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16::from_ne_bytes(*octets.first_chunk()?));
        let kind = u16::from_ne_bytes(*octets.get(2..)?.first_chunk()?);
        let data = octets.get(4..len)?;
        octets = octets.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & TYPE_MASK, data))
    })
}

/// The first attribute of that number.
pub fn attribute(octets: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(octets).find(|(kind, _)| *kind == wanted).map(|(_, data)| data)
}

/// An attribute's number in the machine's order.
pub fn native32(data: &[u8]) -> Option<u32> {
    data.first_chunk().map(|octets| u32::from_ne_bytes(*octets))
}

/// Why the kernel refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelError {
    /// What was being done.
    pub what: &'static str,
    /// The error's number.
    pub errno: Errno,
    /// What the kernel said beside it (Documentation/userspace-api/netlink/intro.rst, "Ext ACK"); may be empty.
    pub text: String,
    /// Where in the request the fault is, in octets from its start, where the kernel said so.
    pub offset: Option<u32>,
}

impl KernelError {
    fn new(errno: Errno) -> Self {
        Self { what: "", errno, text: String::new(), offset: None }
    }

    /// With what was being done, in words that follow "cannot".
    pub fn during(mut self, what: &'static str) -> Self {
        self.what = what;
        self
    }
}

impl From<Errno> for KernelError {
    fn from(errno: Errno) -> Self {
        Self::new(errno)
    }
}

impl fmt::Display for KernelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.what.is_empty() {
            write!(f, "cannot {}: ", self.what)?;
        }
        f.write_str(self.errno.desc())?;
        if !self.text.is_empty() {
            write!(f, " ({})", self.text)?;
        }
        match self.offset {
            Some(offset) => write!(f, " at octet {offset} of the request"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for KernelError {}

/// What a message of type NLMSG_ERROR says (`struct nlmsgerr`): success, or an error.
pub fn verdict(message: &Received<'_>) -> Result<(), KernelError> {
    let Some(code) = message.payload.first_chunk().map(|octets| i32::from_ne_bytes(*octets)) else {
        return Err(Errno::EPROTO.into());
    };
    if code == 0 {
        return Ok(());
    }
    let mut error = KernelError::new(Errno::from_raw(code.checked_neg().unwrap_or(libc::EPROTO)));
    if message.flags & ACK_TLVS != 0 {
        // The request's header follows, and the rest of the request unless it was left out.
        let request = message.payload.get(4..).unwrap_or_default();
        let len = match request.first_chunk().map(|octets| u32::from_ne_bytes(*octets) as usize) {
            Some(len) if message.flags & CAPPED == 0 => len.max(HEADER),
            _ => HEADER,
        };
        let rest = len.checked_next_multiple_of(4).and_then(|len| request.get(len..)).unwrap_or_default();
        if let Some(text) = attribute(rest, NLMSGERR_ATTR_MSG) {
            let text = text.split(|&b| b == 0).next().unwrap_or_default();
            error.text = String::from_utf8_lossy(text).chars().filter(|c| !c.is_control()).take(MAX_TEXT).collect();
        }
        error.offset = attribute(rest, NLMSGERR_ATTR_OFFS).and_then(native32);
    }
    Err(error)
}

/// Which part of the kernel a socket talks to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Links, addresses, routes, neighbours: rtnetlink(7).
    Route,
    /// Packet policy and connections: nfnetlink.
    Netfilter,
    /// Open sockets of the Internet protocols: sock_diag(7).
    Sockets,
}

/// A netlink socket. Every request is answered before the next.
#[derive(Debug)]
pub struct Socket {
    descriptor: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// Opens one in the caller's network namespace.
    pub fn open(family: Family) -> nix::Result<Self> {
        let protocol = match family {
            Family::Route => SockProtocol::NetlinkRoute,
            Family::Netfilter => SockProtocol::NetlinkNetFilter,
            Family::Sockets => SockProtocol::NetlinkSockDiag,
        };
        let descriptor = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        for option in [libc::NETLINK_EXT_ACK, libc::NETLINK_CAP_ACK] {
            let on: libc::c_int = 1;
            // SAFETY: the descriptor is open, and the option's value is an int that outlives the call.
            let result = unsafe {
                libc::setsockopt(
                    descriptor.as_raw_fd(),
                    libc::SOL_NETLINK,
                    option,
                    (&raw const on).cast(),
                    size_of_val(&on) as libc::socklen_t,
                )
            };
            Errno::result(result)?;
        }
        // The kernel answers at once; this bounds what a fault of it can cost.
        setsockopt(&descriptor, ReceiveTimeout, &TimeVal::seconds(10))?;
        Ok(Self { descriptor, sequence: 0, buffer: vec![0; BUFFER] })
    }

    /// Lets requests be this long, in octets.
    pub fn allow_long_requests(&self, octets: usize) -> nix::Result<()> {
        setsockopt(&self.descriptor, SndBufForce, &octets)
    }

    fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1).max(1);
        self.sequence
    }

    fn send(&self, octets: &[u8]) -> nix::Result<()> {
        loop {
            match send(self.descriptor.as_raw_fd(), octets, MsgFlags::empty()) {
                Err(Errno::EINTR) => {}
                sent => return sent.map(drop),
            }
        }
    }

    fn receive(&mut self, flags: MsgFlags) -> nix::Result<usize> {
        loop {
            match recv(self.descriptor.as_raw_fd(), &mut self.buffer, flags) {
                Err(Errno::EINTR) => {}
                Ok(0) => return Err(Errno::EPROTO),
                received => return received,
            }
        }
    }

    /// One request, and the kernel's answer to it.
    pub fn ask(&mut self, request: &Request) -> Result<(), KernelError> {
        let sequence = self.next_sequence();
        let mut octets = Vec::new();
        request.write(sequence, ACK, &mut octets);
        self.send(&octets)?;
        loop {
            let len = self.receive(MsgFlags::empty())?;
            for message in messages(&self.buffer[..len]) {
                if message.sequence == sequence && message.kind == NLMSG_ERROR {
                    return verdict(&message);
                }
            }
        }
    }

    /// Asks for all objects of a kind. `take` gets each message of the answer and what was gathered so far; a list that
    /// changed while it was read is begun anew, with nothing gathered.
    pub fn dump<T: Default>(
        &mut self,
        request: &Request,
        mut take: impl FnMut(&mut T, &Received<'_>),
    ) -> Result<T, KernelError> {
        for _ in 0..DUMP_TRIES {
            if let Some(found) = self.dump_once(request, &mut take)? {
                return Ok(found);
            }
        }
        Err(Errno::EINTR.into())
    }

    fn dump_once<T: Default>(
        &mut self,
        request: &Request,
        take: &mut impl FnMut(&mut T, &Received<'_>),
    ) -> Result<Option<T>, KernelError> {
        let sequence = self.next_sequence();
        let mut octets = Vec::new();
        request.write(sequence, DUMP, &mut octets);
        self.send(&octets)?;
        let mut found = T::default();
        let mut whole = true;
        loop {
            let len = self.receive(MsgFlags::empty())?;
            for message in messages(&self.buffer[..len]) {
                if message.sequence != sequence {
                    continue;
                }
                whole &= message.flags & DUMP_INTERRUPTED == 0;
                match message.kind {
                    NLMSG_DONE => return Ok(whole.then_some(found)),
                    NLMSG_ERROR => verdict(&message)?,
                    _ => take(&mut found, &message),
                }
            }
        }
    }

    /// A batch of requests that all take effect or none (nfnetlink_rcv_batch). `begin` and `end` enclose them. The error
    /// is that of the first request that failed, or of the commit.
    pub fn batch(&mut self, begin: &Request, requests: &[Request], end: &Request) -> Result<(), KernelError> {
        let Some((last, others)) = requests.split_last() else { return Ok(()) };
        let mut octets = Vec::new();
        let first = self.next_sequence();
        begin.write(first, 0, &mut octets);
        for request in others {
            let sequence = self.next_sequence();
            request.write(sequence, 0, &mut octets);
        }
        // It is acknowledged after the commit only, and only when all others were taken.
        let acknowledged = self.next_sequence();
        last.write(acknowledged, ACK, &mut octets);
        let sequence = self.next_sequence();
        end.write(sequence, 0, &mut octets);
        self.send(&octets)?;
        // All answers are there when the request has been sent. Errors come in the order of the requests, that of a
        // commit with the number of the batch's begin.
        let mut outcome = None;
        loop {
            let len = match self.receive(MsgFlags::MSG_DONTWAIT) {
                Err(Errno::EAGAIN) => return outcome.unwrap_or(Err(Errno::EPROTO.into())),
                received => received?,
            };
            for message in messages(&self.buffer[..len]) {
                if message.kind != NLMSG_ERROR || message.sequence < first {
                    continue;
                }
                match verdict(&message) {
                    Ok(()) if message.sequence == acknowledged => outcome = outcome.or(Some(Ok(()))),
                    Ok(()) => {}
                    Err(error) => {
                        if !matches!(outcome, Some(Err(_))) {
                            outcome = Some(Err(error));
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, flags: u16, payload: &[u8]) -> Vec<u8> {
        let mut octets = (16 + payload.len() as u32).to_ne_bytes().to_vec();
        octets.extend(kind.to_ne_bytes());
        octets.extend(flags.to_ne_bytes());
        octets.extend(7u32.to_ne_bytes());
        octets.extend([0; 4]);
        octets.extend(payload);
        octets.resize(octets.len().next_multiple_of(4), 0);
        octets
    }

    #[test]
    fn what_is_written_is_read_alike() {
        let inner = Attributes::new().be32(1, 0x0102_0304).text(2, "ab");
        let all = Attributes::new().native32(5, 9).nest(6, inner).octets(7, &[1, 2, 3]);
        let mut octets = Vec::new();
        Request::new(30, CREATE, &[9, 8, 7, 6], all).write(7, ACK, &mut octets);
        let found: Vec<Received> = messages(&octets).collect();
        assert_eq!((found.len(), found[0].kind, found[0].sequence), (1, 30, 7));
        assert_eq!(found[0].flags, REQUEST | CREATE | ACK);
        let (fixed, rest) = found[0].payload.split_at(4);
        assert_eq!(fixed, [9, 8, 7, 6]);
        let kinds: Vec<u16> = attributes(rest).map(|(kind, _)| kind).collect();
        assert_eq!(kinds, [5, 6, 7]);
        assert_eq!(native32(attribute(rest, 5).unwrap()), Some(9));
        let inner = attribute(rest, 6).unwrap();
        assert_eq!(attribute(inner, 1), Some(&[1, 2, 3, 4][..]));
        assert_eq!(attribute(inner, 2), Some(&b"ab\0"[..]));
        assert_eq!(attribute(rest, 7), Some(&[1, 2, 3][..]));
    }

    #[test]
    fn the_kernels_own_words_are_in_the_error() {
        let tlvs = Attributes::new().text(1, "Object is busy\n").native32(2, 20);
        let request = message(3, 0, &[0; 8]);
        let capped = [&(-16i32).to_ne_bytes()[..], &request[..16], tlvs.as_octets()].concat();
        let whole = [&(-16i32).to_ne_bytes()[..], &request[..], tlvs.as_octets()].concat();
        for (payload, flags) in [(capped, ACK_TLVS | CAPPED), (whole, ACK_TLVS)] {
            let octets = message(2, flags, &payload);
            let error = verdict(&messages(&octets).next().unwrap()).unwrap_err().during("delete a set");
            assert_eq!((error.errno, error.text.as_str(), error.offset), (Errno::EBUSY, "Object is busy", Some(20)));
            let shown = error.to_string();
            assert_eq!(
                shown,
                "cannot delete a set: Device or resource busy (Object is busy) at octet 20 of the request"
            );
        }
        let success = message(2, 0, &0i32.to_ne_bytes());
        assert_eq!(verdict(&messages(&success).next().unwrap()), Ok(()));
        let cut = message(2, 0, &[0; 3]);
        assert_eq!(verdict(&messages(&cut).next().unwrap()).unwrap_err().errno, Errno::EPROTO);
        let least = message(2, 0, &i32::MIN.to_ne_bytes());
        assert!(verdict(&messages(&least).next().unwrap()).is_err());
    }

    #[test]
    fn cut_messages_and_attributes_end_the_list() {
        let whole = message(3, 0, &[1; 8]);
        (0..whole.len()).for_each(|len| assert_eq!(messages(&whole[..len]).count(), 0));
        let own = Attributes::new().native32(7, 1);
        (0..8).for_each(|len| assert_eq!(attributes(&own.as_octets()[..len]).count(), 0));
        assert_eq!(attributes(&[3, 0, 1, 0]).count(), 0, "shorter than its own header");
        let long = u32::MAX.to_ne_bytes();
        assert_eq!(messages(&[&long[..], &[0; 20]].concat()).count(), 0);
    }

    #[test]
    fn a_list_comes_from_the_kernel_and_a_refusal_as_well() {
        let mut socket = Socket::open(Family::Route).unwrap();
        let list = Request::new(libc::RTM_GETADDR, 0, &[libc::AF_INET as u8, 0, 0, 0, 0, 0, 0, 0], Attributes::new());
        let found: usize = socket.dump(&list, |count, _| *count += 1).unwrap();
        assert!(found >= 1, "127.0.0.1 is an address of this machine");
        let unknown = Request::new(libc::RTM_DELLINK, 0, &[0; 16], Attributes::new());
        assert!(socket.ask(&unknown).is_err());
    }
}
