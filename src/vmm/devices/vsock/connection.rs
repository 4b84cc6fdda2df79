//! One stream between a guest socket and a Unix socket (virtio 1.2 §5.10.6.3 to §5.10.6.6).
//!
//! Two directions, each with credit. Guest to link: sent to the socket at once; what the socket does not take
//! is kept, and the credit given to the guest bounds it. Link to guest: read from the socket straight into the
//! guest's buffers, never more than the guest's credit, so nothing is kept.

use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use super::super::segments::Segments;
use super::packet::{HEADER, HOST_CID, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};
use crate::vmm::memory;

/// Names a connection: the host's port, the guest's port.
pub type Key = (u32, u32);

/// Bounds of `Connection::appetite`, in octets.
const LEAST_APPETITE: usize = 8 << 10;
const MOST_APPETITE: usize = 256 << 10;

/// Where a connection is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The guest was asked, or is about to be, and has not answered.
    Connecting,
    /// Data may flow.
    Established,
    /// Both directions have ended on the link, which is closed; the guest is to confirm by a reset.
    Closing,
    /// The guest is gone; what it sent last is still on its way to the link.
    Draining,
}

/// Packets that a connection has to send to the guest as soon as there is a buffer. Each at most once: so the
/// guest cannot make replies pile up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Owed {
    pub request: bool,
    pub response: bool,
    pub credit_update: bool,
    pub credit_request: bool,
    pub shutdown: bool,
}

/// Why a connection must be reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Violation;

#[derive(Debug)]
pub struct Connection {
    pub key: Key,
    pub state: State,
    /// Gone once both directions have ended.
    pub link: Option<UnixStream>,
    /// Of the request that this connection answers.
    pub tag: String,
    /// Octets that came before the link was handed over, and how many of them the guest has.
    early: Vec<u8>,
    early_sent: usize,
    pub owed: Owed,
    /// In the list of connections that have something for the guest.
    pub queued: bool,
    pub deadline: Option<Instant>,

    /// The link may have something to read.
    pub readable: bool,
    /// The link's peer has closed it wholly.
    pub hung_up: bool,
    /// The link's stream has ended.
    link_ended: bool,
    /// The link takes nothing any more.
    link_deaf: bool,
    /// `shutdown` flags that the guest sent.
    guest_shut: u32,
    /// `shutdown` flags that the guest was told.
    told_shut: u32,
    /// The link was told that nothing more comes.
    write_closed: bool,

    // Link to guest.
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    sent: u32,
    credit_asked: bool,
    /// How much to ask the link for next time: it follows what came, so that a talk of short messages does not
    /// gather buffers for a long stream.
    appetite: usize,

    // Guest to link.
    window: u32,
    kept: Vec<u8>,
    kept_sent: usize,
    forwarded: u32,
    told_forwarded: u32,
}

impl Connection {
    /// A connection that the link's side asked for. `window` is the credit that the guest gets.
    pub fn connecting(key: Key, link: UnixStream, tag: String, early: Vec<u8>, window: u32) -> Self {
        Self {
            key,
            state: State::Connecting,
            link: Some(link),
            tag,
            early,
            early_sent: 0,
            owed: Owed { request: true, ..Owed::default() },
            queued: false,
            deadline: None,
            // Assumed, so that the first attempt finds out: an event may have come before.
            readable: true,
            hung_up: false,
            link_ended: false,
            link_deaf: false,
            guest_shut: 0,
            told_shut: 0,
            write_closed: false,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
            sent: 0,
            credit_asked: false,
            appetite: LEAST_APPETITE,
            window,
            kept: Vec::new(),
            kept_sent: 0,
            forwarded: 0,
            told_forwarded: 0,
        }
    }

    /// The connection stands. Tells the link's client by `line`, which must go out whole: the link was idle.
    pub fn establish(&mut self, line: &[u8]) -> Result<(), Violation> {
        self.state = State::Established;
        self.owed.request = false;
        match self.send(line) {
            Ok(n) if n == line.len() => Ok(()),
            _ => Err(Violation),
        }
    }

    /// Sends a plain buffer to the link, without waiting.
    pub fn send(&self, octets: &[u8]) -> io::Result<usize> {
        let link = self.link.as_ref().ok_or(ErrorKind::NotConnected)?;
        memory::send_octets(link.as_fd(), octets)
    }

    /// A header for a packet of this connection to the guest. Every header carries the credit of the guest.
    pub fn header(&mut self, guest_cid: u64, op: Op, len: u32) -> Header {
        self.told_forwarded = self.forwarded;
        self.owed.credit_update = false;
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.key.0,
            dst_port: self.key.1,
            len,
            kind: TYPE_STREAM,
            op: Some(op),
            flags: 0,
            buf_alloc: self.window,
            fwd_cnt: self.forwarded,
        }
    }

    /// The next packet without data that the guest is owed.
    pub fn next_control(&mut self, guest_cid: u64) -> Option<Header> {
        let owed = &mut self.owed;
        let in_order = [
            (&mut owed.request, Op::Request),
            (&mut owed.response, Op::Response),
            (&mut owed.credit_request, Op::CreditRequest),
            (&mut owed.credit_update, Op::CreditUpdate),
            (&mut owed.shutdown, Op::Shutdown),
        ];
        let op = in_order.into_iter().find_map(|(flag, op)| std::mem::take(flag).then_some(op))?;
        let flags = if op == Op::Shutdown { self.shut_flags() } else { 0 };
        self.told_shut |= flags;
        Some(Header { flags, ..self.header(guest_cid, op, 0) })
    }

    /// Whether the guest is owed a packet without data.
    pub fn owes_control(&self) -> bool {
        self.owed != Owed::default()
    }

    /// Takes the guest's credit from a header.
    pub fn take_credit(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_fwd_cnt = header.fwd_cnt;
        if self.credit() > 0 {
            self.credit_asked = false;
        }
    }

    /// Octets that the guest can take now (§5.10.6.3).
    pub fn credit(&self) -> u32 {
        self.peer_buf_alloc.saturating_sub(self.sent.wrapping_sub(self.peer_fwd_cnt))
    }

    /// Octets of guest buffers that are of use for the next read of the link.
    pub fn appetite(&self) -> usize {
        self.appetite.min(self.credit() as usize)
    }

    /// Whether there may be data for the guest.
    pub fn has_data(&self) -> bool {
        self.state == State::Established
            && self.guest_shut & SHUTDOWN_RECEIVE == 0
            && !self.link_ended
            && (self.readable || self.has_early())
    }

    /// The guest's credit is used up and there is data: ask for more, once.
    pub fn ask_credit(&mut self) {
        if !self.credit_asked {
            self.credit_asked = true;
            self.owed.credit_request = true;
        }
    }

    fn has_early(&self) -> bool {
        self.early_sent < self.early.len()
    }

    /// Fills guest buffers from the link, no more than `limit` octets; gives how many came. `None`: nothing for
    /// now, or the stream has ended (`settle` then).
    pub fn receive(&mut self, buffers: &Segments<'_>, limit: usize) -> Option<usize> {
        let limit = limit.min(self.credit() as usize).min(buffers.len());
        if limit == 0 {
            return None;
        }
        let n = if self.has_early() {
            let rest = &self.early[self.early_sent..];
            let n = buffers.copy_from(0, &rest[..rest.len().min(limit)]);
            self.early_sent += n;
            if !self.has_early() {
                self.early = Vec::new();
                self.early_sent = 0;
            }
            n
        } else {
            match self.receive_link(buffers, limit) {
                Ok(0) => {
                    self.link_ended = true;
                    return None;
                }
                Ok(n) => n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    self.readable = false;
                    return None;
                }
                // The peer closed without reading everything: nobody is there for either direction.
                Err(_) => {
                    self.link_ended = true;
                    self.hung_up = true;
                    return None;
                }
            }
        };
        self.sent = self.sent.wrapping_add(n as u32);
        if n >= self.appetite {
            self.appetite = (self.appetite * 4).min(MOST_APPETITE);
        } else if n < self.appetite / 4 {
            self.appetite = (self.appetite / 2).max(LEAST_APPETITE);
        }
        Some(n)
    }

    fn receive_link(&self, buffers: &Segments<'_>, limit: usize) -> io::Result<usize> {
        let link = self.link.as_ref().ok_or(ErrorKind::NotConnected)?;
        loop {
            let result = if limit == buffers.len() {
                memory::receive(link.as_fd(), buffers.slices())
            } else {
                let parts: Vec<_> = buffers.parts(0..limit).collect();
                memory::receive(link.as_fd(), &parts)
            };
            match result {
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }

    /// Forwards the data of a packet from the guest: `len` octets after the header in `packet`.
    pub fn forward(&mut self, packet: &Segments<'_>, len: usize) -> Result<(), Violation> {
        let kept = self.kept.len() - self.kept_sent;
        if self.state != State::Established || self.guest_shut & SHUTDOWN_SEND != 0 || kept + len > self.window as usize
        {
            return Err(Violation);
        }
        let mut done = 0;
        while kept == 0 && done < len && !self.link_deaf {
            let Some(link) = &self.link else { break };
            let parts: Vec<_> = packet.parts(HEADER + done..HEADER + len).collect();
            match memory::send(link.as_fd(), &parts) {
                Ok(n) => done += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(_) => self.link_deaf = true,
            }
        }
        if self.link_deaf {
            // Nobody will read it: gone through, as far as the guest's credit goes.
            done = len;
        }
        if done < len {
            if self.kept_sent > 0 {
                self.kept.drain(..self.kept_sent);
                self.kept_sent = 0;
            }
            let start = self.kept.len();
            self.kept.resize(start + len - done, 0);
            packet.copy_to(HEADER + done, &mut self.kept[start..]);
        }
        self.count_forwarded(done);
        Ok(())
    }

    /// The link takes more: sends what was kept.
    pub fn flush(&mut self) {
        while self.kept_sent < self.kept.len() {
            match self.send(&self.kept[self.kept_sent..]) {
                Ok(n) => {
                    self.kept_sent += n;
                    self.count_forwarded(n);
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.link_deaf = true;
                    self.count_forwarded(self.kept.len() - self.kept_sent);
                    break;
                }
            }
        }
        self.kept = Vec::new();
        self.kept_sent = 0;
    }

    /// Whether octets of the guest wait for the link.
    pub fn keeps(&self) -> bool {
        self.kept_sent < self.kept.len()
    }

    fn count_forwarded(&mut self, octets: usize) {
        self.forwarded = self.forwarded.wrapping_add(octets as u32);
        // Half of the window: the guest never stalls while data flows, and not every packet is answered.
        if self.forwarded.wrapping_sub(self.told_forwarded) >= self.window / 2 && self.state == State::Established {
            self.owed.credit_update = true;
        }
    }

    /// The guest ended one direction or both.
    pub fn guest_shutdown(&mut self, flags: u32) {
        self.guest_shut |= flags & SHUTDOWN_BOTH;
    }

    /// Whether the guest will send no more.
    pub fn guest_done_sending(&self) -> bool {
        self.guest_shut & SHUTDOWN_SEND != 0
    }

    /// What the guest is to know about the link's side.
    fn shut_flags(&self) -> u32 {
        let mut flags = 0;
        if self.link_ended {
            flags |= SHUTDOWN_SEND;
        }
        if self.link_deaf {
            flags |= SHUTDOWN_RECEIVE;
        }
        if self.state == State::Closing { SHUTDOWN_BOTH } else { flags }
    }

    /// Draws the conclusions of what ended: shuts the link's halves, owes the guest a shutdown, or finds that
    /// all is over.
    pub fn settle(&mut self) -> Settled {
        if self.state == State::Draining {
            return if self.keeps() && !self.link_deaf { Settled::Open } else { Settled::Gone };
        }
        if self.state != State::Established {
            return Settled::Open;
        }
        if self.hung_up && self.link_ended {
            self.link_deaf = true;
        }
        let flushed = !self.keeps() || self.link_deaf;
        if let Some(link) = &self.link {
            // Errors mean that the peer is gone, which events and transfers tell as well.
            if self.guest_done_sending() && flushed && !self.write_closed {
                self.write_closed = true;
                let _ = link.shutdown(std::net::Shutdown::Write);
            }
            if self.guest_shut & SHUTDOWN_RECEIVE != 0 && !self.link_ended {
                self.link_ended = true;
                let _ = link.shutdown(std::net::Shutdown::Read);
            }
        }
        let to_link_over = self.link_deaf || (self.guest_done_sending() && flushed);
        if self.link_ended && to_link_over {
            self.link = None;
            self.kept = Vec::new();
            self.kept_sent = 0;
            if self.guest_shut == SHUTDOWN_BOTH {
                return Settled::Reset;
            }
            self.state = State::Closing;
            self.owed = Owed { shutdown: true, response: self.owed.response, ..Owed::default() };
            return Settled::Closing;
        }
        if self.shut_flags() & !self.told_shut != 0 {
            self.owed.shutdown = true;
        }
        Settled::Open
    }
}

/// What `Connection::settle` found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settled {
    /// It goes on.
    Open,
    /// It waits for the guest's reset from now on, for a while.
    Closing,
    /// It is over; the guest is to get a reset.
    Reset,
    /// It is over; the guest knows.
    Gone,
}
