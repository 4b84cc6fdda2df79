//! `ping`: ICMP echo.
//!
//! One raw socket for each address family carries the requests to all targets; answers find theirs by a cookie and a
//! number in the packet and must come from the target's address. Times are the kernel's receive time stamps
//! (SO_TIMESTAMPNS), so that a busy loop does not make a network look slow. Needs CAP_NET_RAW and nothing else.

pub mod packet;

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher};
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mio::Interest;
use mio::event::Event;
use mio::unix::SourceFd;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6,
    SockaddrStorage, recvmsg, sendto, setsockopt, socket, sockopt,
};

use super::datagrams::{Datagrams, Heard as Read};
use super::{checked, manifest};
use crate::sentinel::collect::{Cancelled, Finished, Gatherer, Io, Plan, Run, Service};
use crate::sentinel::model::Kind;
use crate::sentinel::plugin::{FieldError, Manifest};
use crate::sentinel::schedule::RunId;
use crate::sentinel::task::Task;
use packet::{Echo, Heard};

/// Octets that the kernel may hold for us.
const RECEIVE_BUFFER: usize = 2 * 1024 * 1024;
/// A run ends this long before its deadline, so that what it has counts.
const MARGIN: Duration = Duration::from_millis(5);

/// The service.
pub struct Ping {
    manifest: Manifest,
    sockets: Datagrams<OwnedFd, RunId>,
    buffer: Box<[u8; 65_536]>,
    jobs: HashMap<RunId, Job>,
    /// Requests under way: by number, and by the sequence that ICMP errors quote.
    sent: HashMap<u64, Sent>,
    by_sequence: HashMap<u16, u64>,
    cookie: u64,
    number: u64,
}

struct PingPlan {
    host: String,
    count: u32,
    spacing: Duration,
    wait: Duration,
    size: usize,
}

struct Job {
    run: Run,
    plan: Arc<PingPlan>,
    address: Option<IpAddr>,
    sent: u32,
    times: Vec<f64>,
    ttl: Option<u8>,
    unreachable: u32,
    numbers: Vec<u64>,
}

struct Sent {
    run: RunId,
    at: Instant,
    wall: Duration,
}

impl Ping {
    /// The service.
    #[allow(clippy::new_without_default)] // like the others, whose `new` takes something
    pub fn new() -> Self {
        Self {
            manifest: manifest("ping"),
            sockets: Datagrams::new(),
            buffer: Box::new([0; 65_536]),
            jobs: HashMap::new(),
            sent: HashMap::new(),
            by_sequence: HashMap::new(),
            cookie: std::hash::RandomState::new().build_hasher().finish(),
            number: 0,
        }
    }

    fn identifier(&self) -> u16 {
        self.cookie as u16
    }

    fn found(&mut self, run: RunId, addresses: Result<Vec<IpAddr>, String>, io: &mut Io<'_>) {
        let address = match addresses {
            Ok(addresses) => addresses.first().copied(),
            Err(e) => return self.end(run, Some(e), io),
        };
        let Some(address) = address else { return self.end(run, Some("the host has no address".into()), io) };
        let family = usize::from(address.is_ipv6());
        if let Err(e) = self.sockets.open(family, || open(address.is_ipv6(), io)) {
            let error = format!("cannot open a raw socket ({e}): ping needs CAP_NET_RAW");
            return self.end(run, Some(error), io);
        }
        if let Some(job) = self.jobs.get_mut(&run) {
            job.address = Some(address);
            self.next(run, io);
        }
    }

    /// Sends a run's next request, or ends the run when the last has had its time.
    fn next(&mut self, id: RunId, io: &mut Io<'_>) {
        let identifier = self.identifier();
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Some(address) = job.address else { return };
        let end = job.run.deadline.checked_sub(MARGIN).unwrap_or(io.now);
        if job.sent >= job.plan.count || io.now >= end {
            return self.end(id, None, io);
        }
        self.number += 1;
        let number = self.number;
        let echo = Echo { cookie: self.cookie, number };
        let octets = packet::request(address.is_ipv6(), identifier, number as u16, echo, job.plan.size);
        let Some(socket) = self.sockets.socket(usize::from(address.is_ipv6())).map(AsRawFd::as_raw_fd) else { return };
        let to = match address {
            IpAddr::V4(v4) => SockaddrStorage::from(SocketAddrV4::new(v4, 0)),
            IpAddr::V6(v6) => SockaddrStorage::from(SocketAddrV6::new(v6, 0, 0, 0)),
        };
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        job.sent += 1;
        job.numbers.push(number);
        let pause = if job.sent < job.plan.count { job.plan.spacing } else { job.plan.wait };
        self.sockets.set((io.now + pause).min(end), id);
        match sendto(socket, &octets, &to, MsgFlags::empty()) {
            Ok(_) => {
                self.sent.insert(number, Sent { run: id, at: Instant::now(), wall });
                self.by_sequence.insert(number as u16, number);
            }
            // A full queue loses it; so does a network that is not there: that is what loss means.
            Err(e) => {
                log::debug!("ping: sending to {address}: {e}");
                job.unreachable += u32::from(e != nix::errno::Errno::EAGAIN);
            }
        }
    }

    fn read(&mut self, family: usize, io: &mut Io<'_>) {
        let mut turn = self.sockets.begin(family);
        loop {
            let buffer = &mut self.buffer[..];
            let next = self.sockets.next(&mut turn, io.now, |socket| receive(socket, buffer));
            let Some((length, from, stamp)) = next else { return };
            if let Some((heard, ttl)) = packet::heard(family == 1, &self.buffer[..length]) {
                self.heard(heard, ttl, from, stamp, io);
            }
        }
    }

    fn heard(&mut self, heard: Heard, ttl: Option<u8>, from: IpAddr, stamp: Option<Duration>, io: &mut Io<'_>) {
        match heard {
            Heard::Reply(echo) if echo.cookie == self.cookie => {
                let Some(sent) = self.sent.get(&echo.number) else { return };
                let Some(job) = self.jobs.get_mut(&sent.run).filter(|job| job.address == Some(from)) else { return };
                let elapsed = sent.at.elapsed();
                // The wall clock may have been set meanwhile: then our own is the better one.
                let stamped = stamp.and_then(|stamp| stamp.checked_sub(sent.wall)).filter(|time| *time <= elapsed);
                job.times.push(stamped.unwrap_or(elapsed).as_secs_f64());
                job.ttl = ttl.or(job.ttl);
                let run = sent.run;
                let complete = job.times.len() as u32 == job.plan.count;
                self.sent.remove(&echo.number);
                if complete {
                    self.end(run, None, io);
                }
            }
            Heard::Unreachable(identifier, sequence) if identifier == self.identifier() => {
                let number = self.by_sequence.get(&sequence);
                let run = number.and_then(|number| self.sent.get(number)).map(|sent| sent.run);
                if let Some(job) = run.and_then(|run| self.jobs.get_mut(&run)) {
                    job.unreachable += 1;
                }
            }
            _ => {}
        }
    }

    fn end(&mut self, id: RunId, error: Option<String>, io: &mut Io<'_>) {
        if let Some(finished) = self.take(id, error, io) {
            io.finish(id, finished);
        }
    }

    fn take(&mut self, id: RunId, error: Option<String>, io: &Io<'_>) -> Option<Finished> {
        let job = self.jobs.remove(&id)?;
        for number in &job.numbers {
            self.sent.remove(number);
            if self.by_sequence.get(&(*number as u16)) == Some(number) {
                self.by_sequence.remove(&(*number as u16));
            }
        }
        let mut out = Gatherer::new(io.table, &job.run.task.labels, job.run.started_ms);
        let labels = [("instance", job.plan.host.as_str())];
        let mut gauge = |name: &str, value: f64| out.add(name, Kind::Gauge, &labels, value);
        let received = job.times.len() as f64;
        gauge("up", f64::from(u8::from(received > 0.0)));
        if job.sent > 0 {
            gauge("ping_sent", f64::from(job.sent));
            gauge("ping_received", received);
            gauge("ping_loss_ratio", 1.0 - received / f64::from(job.sent));
            gauge("ping_unreachable", f64::from(job.unreachable));
        }
        if let Some(summary) = packet::summary(&job.times) {
            gauge("ping_rtt_min_seconds", summary.min);
            gauge("ping_rtt_avg_seconds", summary.avg);
            gauge("ping_rtt_max_seconds", summary.max);
            gauge("ping_rtt_stddev_seconds", summary.stddev);
        }
        if let Some(ttl) = job.ttl {
            gauge("ping_ttl", f64::from(ttl));
        }
        Some(Finished { gathered: out.done(), error })
    }
}

/// A packet's length, where it came from and when.
fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> Read<(usize, IpAddr, Option<Duration>)> {
    let mut control = nix::cmsg_space!(nix::sys::time::TimeSpec);
    let mut slices = [IoSliceMut::new(buffer)];
    let received =
        recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut slices, Some(&mut control), MsgFlags::MSG_DONTWAIT);
    let message = match received {
        Ok(message) => message,
        Err(nix::errno::Errno::EAGAIN) => return Read::Empty,
        Err(e) => {
            log::debug!("ping: receiving: {e}");
            return Read::Nothing;
        }
    };
    let stamp = message.cmsgs().into_iter().flatten().find_map(|control| match control {
        ControlMessageOwned::ScmTimestampns(time) => Some(Duration::from(time)),
        _ => None,
    });
    let from = message.address.and_then(|from| {
        let v4 = from.as_sockaddr_in().map(|v4: &SockaddrIn| IpAddr::V4(v4.ip()));
        v4.or_else(|| from.as_sockaddr_in6().map(|v6: &SockaddrIn6| IpAddr::V6(v6.ip())))
    });
    from.map_or(Read::Nothing, |from| Read::Datagram((message.bytes, from, stamp)))
}

fn open(v6: bool, io: &Io<'_>) -> io::Result<OwnedFd> {
    let (family, protocol) = match v6 {
        false => (AddressFamily::Inet, SockProtocol::Icmp),
        true => (AddressFamily::Inet6, SockProtocol::IcmpV6),
    };
    let socket = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, protocol)?;
    setsockopt(&socket, sockopt::ReceiveTimestampns, &true)?;
    if let Err(e) = setsockopt(&socket, sockopt::RcvBuf, &RECEIVE_BUFFER) {
        log::debug!("ping: receive buffer: {e}");
    }
    io.watch(&mut SourceFd(&socket.as_raw_fd()), u64::from(v6), Interest::READABLE)?;
    Ok(socket)
}

impl Service for Ping {
    fn prepare(&mut self, task: &Task) -> Result<Plan, FieldError> {
        let (device, config) = checked(&self.manifest, task)?;
        Ok(Arc::new(Arc::new(PingPlan {
            host: device.text("host").to_string(),
            count: config.whole("count"),
            spacing: Duration::from_millis(config.whole("spacing_ms")),
            wait: Duration::from_millis(config.whole("wait_ms")),
            size: config.whole("size"),
        })))
    }

    fn begin(&mut self, run: Run, io: &mut Io<'_>) {
        let Some(plan) = run.plan::<Arc<PingPlan>>().cloned() else { return };
        let id = run.id;
        let addresses = io.resolve(id, &plan.host);
        let (times, numbers) = (Vec::new(), Vec::new());
        let job = Job { run, plan, address: None, sent: 0, times, ttl: None, unreachable: 0, numbers };
        self.jobs.insert(id, job);
        if let Some(addresses) = addresses {
            self.found(id, addresses, io);
        }
    }

    fn resolved(&mut self, run: RunId, addresses: Result<Vec<IpAddr>, String>, io: &mut Io<'_>) {
        self.found(run, addresses, io);
    }

    fn cancel(&mut self, run: RunId, io: &mut Io<'_>) -> Cancelled {
        Cancelled::Gone(self.take(run, None, io).unwrap_or_default())
    }

    fn ready(&mut self, number: u64, _event: &Event, io: &mut Io<'_>) {
        self.read(usize::from(number == 1), io);
    }

    fn wake_at(&self) -> Option<Instant> {
        self.sockets.wake_at()
    }

    fn wake(&mut self, io: &mut Io<'_>) {
        for family in self.sockets.left_over() {
            self.read(family, io);
        }
        while let Some(run) = self.sockets.due(io.now) {
            self.next(run, io);
        }
    }
}

#[cfg(test)]
mod tests;
