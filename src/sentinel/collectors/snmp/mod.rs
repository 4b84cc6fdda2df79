//! `snmp`: v1, v2c and v3 (RFC 1157, RFC 3416, RFC 3414).
//!
//! One UDP socket for each address family carries the requests to all devices; answers find their run by the request's
//! number and must come from the address that was asked. A device has one request under way at a time, is asked again
//! after a pause, and has one deadline for all of it, the task's timeout: a silent device costs nobody else anything.

pub(super) mod ber;
mod convert;
mod crypto;
mod message;
mod oid;
mod plan;
mod v3;
mod walk;

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use mio::Interest;
use mio::event::Event;
use mio::net::UdpSocket;

use super::datagrams::{Datagrams, Heard};
use super::{checked, manifest};
use crate::sentinel::collect::{Cancelled, Finished, Gatherer, Io, Plan, Run, Service};
use crate::sentinel::model::SeriesTable;
use crate::sentinel::plugin::{FieldError, Manifest};
use crate::sentinel::schedule::RunId;
use crate::sentinel::secret::Secret;
use crate::sentinel::task::Task;
use crypto::{Auth, Key};
use message::{Message, Pdu, PduKind, community_message};
use plan::{Access, SnmpPlan};
use v3::{Engine, Envelope, Problem};
use walk::Walk;

/// Octets that the kernel may hold for us: answers come in bursts.
const RECEIVE_BUFFER: usize = 4 * 1024 * 1024;
/// Times that one run asks an agent for its engine or time again.
const RESYNCS: u32 = 3;
/// Keys of passwords kept.
const MOST_KEYS: usize = 4096;

/// The service.
pub struct Snmp {
    manifest: Manifest,
    sockets: Datagrams<UdpSocket, i32>,
    buffer: Box<[u8; 65_536]>,
    jobs: HashMap<RunId, Job>,
    by_number: HashMap<i32, RunId>,
    number: i32,
    salt: u64,
    engines: HashMap<String, Engine>,
    keys: HashMap<(Auth, Secret), Key>,
}

struct Job {
    run: Run,
    plan: Arc<SnmpPlan>,
    walk: Walk,
    peer: SocketAddr,
    /// Numbers under which the step's request was sent, the newest last.
    numbers: Vec<i32>,
    resyncs: u32,
    answers: u64,
    /// What was wrong with an answer that was thrown away.
    odd: Option<String>,
}

impl Snmp {
    /// The service.
    #[allow(clippy::new_without_default)] // like the others, whose `new` takes something
    pub fn new() -> Self {
        // Keyed by the system's randomness: numbers and salts of a restarted process do not repeat.
        let random = std::hash::RandomState::new().build_hasher().finish();
        Self {
            manifest: manifest("snmp"),
            sockets: Datagrams::new(),
            buffer: Box::new([0; 65_536]),
            jobs: HashMap::new(),
            by_number: HashMap::new(),
            number: (random >> 33) as i32,
            salt: random,
            engines: HashMap::new(),
            keys: HashMap::new(),
        }
    }

    fn connect(&mut self, run: Run, plan: Arc<SnmpPlan>, addresses: Result<Vec<IpAddr>, String>, io: &mut Io<'_>) {
        let address = match addresses.map(|addresses| addresses.first().copied()) {
            Ok(Some(address)) => address,
            Ok(None) => return self.fail(run, &plan, format!("{} has no address", plan.host), io),
            Err(e) => return self.fail(run, &plan, e, io),
        };
        let family = usize::from(address.is_ipv6());
        if let Err(e) = self.sockets.open(family, || open(address, family, io)) {
            return self.fail(run, &plan, format!("cannot open a UDP socket: {e}"), io);
        }
        let bulk = !matches!(plan.access, Access::Community(message::V1, _));
        let (id, peer) = (run.id, SocketAddr::new(address, plan.port));
        let walk = Walk::new(Arc::clone(&plan), bulk);
        let job = Job { run, plan, walk, peer, numbers: Vec::new(), resyncs: 0, answers: 0, odd: None };
        self.jobs.insert(id, job);
        self.send(id, io);
    }

    fn fail(&mut self, run: Run, plan: &SnmpPlan, error: String, io: &mut Io<'_>) {
        let finished = finished(&run, plan, None, Some(error), io.table);
        io.finish(run.id, finished);
    }

    /// Sends the next request of a run, or ends the run when there is none.
    fn send(&mut self, id: RunId, io: &mut Io<'_>) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Some(mut pdu) = job.walk.request() else { return self.end(id, None, io) };
        self.number = self.number.wrapping_add(1) & 0x7fff_ffff;
        while self.by_number.contains_key(&self.number) {
            self.number = self.number.wrapping_add(1) & 0x7fff_ffff;
        }
        pdu.id = self.number;
        let datagram = match &job.plan.access {
            Access::Community(version, community) => community_message(*version, community, &pdu),
            Access::User(user) => match self.engines.get(&job.run.task.id) {
                None => v3::discovery(pdu.id),
                Some(engine) => {
                    self.salt = self.salt.wrapping_add(1);
                    v3::request(pdu.id, user, engine, self.salt, &pdu, io.now)
                }
            },
        };
        job.numbers.push(pdu.id);
        self.by_number.insert(pdu.id, id);
        self.sockets.set(io.now + job.plan.request_timeout, pdu.id);
        let peer = job.peer;
        let Some(socket) = self.sockets.socket(usize::from(peer.is_ipv6())) else { return };
        match socket.send_to(&datagram, peer) {
            Ok(_) => {}
            // A full queue is a lost datagram: the timer sends it again.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            // So is an ICMP error for what was sent to somebody else before.
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(e) => self.end(id, Some(format!("cannot send to {peer}: {e}")), io),
        }
    }

    fn end(&mut self, id: RunId, error: Option<String>, io: &mut Io<'_>) {
        if let Some(finished) = self.take(id, error, io.table) {
            io.finish(id, finished);
        }
    }

    fn take(&mut self, id: RunId, error: Option<String>, table: &Arc<SeriesTable>) -> Option<Finished> {
        let job = self.jobs.remove(&id)?;
        job.numbers.iter().for_each(|number| _ = self.by_number.remove(number));
        Some(finished(&job.run, &job.plan, Some(&job.walk), error, table))
    }

    fn read(&mut self, family: usize, io: &mut Io<'_>) {
        let mut turn = self.sockets.begin(family);
        loop {
            let buffer = &mut self.buffer[..];
            let next = self.sockets.next(&mut turn, io.now, |socket| receive(socket, buffer));
            let Some((length, from)) = next else { return };
            let datagram = self.buffer[..length].to_vec();
            self.received(&datagram, from, io);
        }
    }

    fn received(&mut self, datagram: &[u8], from: SocketAddr, io: &mut Io<'_>) {
        let message = match Message::decode(datagram) {
            Ok(message) => message,
            Err(e) => return log::debug!("snmp: a datagram from {from} is no message: {e}"),
        };
        let number = match &message {
            Message::Community { pdu, .. } => pdu.id,
            Message::V3(envelope) => envelope.id,
        };
        let Some(id) = self.by_number.get(&number).copied() else { return };
        let Some(job) = self.jobs.get_mut(&id).filter(|job| job.peer == from) else { return };
        let plan = Arc::clone(&job.plan);
        match (&plan.access, message) {
            (Access::Community(version, community), Message::Community { version: v, community: c, pdu })
                if *version == v && community.as_slice() == c && pdu.kind == PduKind::Response =>
            {
                self.answered(id, pdu, io);
            }
            (Access::User(user), Message::V3(envelope)) => self.secured(id, user, &envelope, io),
            _ => job.odd = Some("an answer had another version or community".into()),
        }
    }

    /// An answer of v3: a report, or a response that must be protected as the request was.
    fn secured(&mut self, id: RunId, user: &v3::User, envelope: &Envelope<'_>, io: &mut Io<'_>) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let task = job.run.task.id.clone();
        let pdu = match envelope.open(user, self.engines.get(&task)) {
            Ok(pdu) => pdu,
            // It may be forged: the true one can still come.
            Err(e) => return job.odd = Some(e),
        };
        if pdu.kind == PduKind::Response {
            if let Some(engine) = self.engines.get_mut(&task).filter(|_| envelope.is_signed()) {
                engine.learn(envelope.boots, envelope.time, io.now);
            }
            return match job.numbers.contains(&pdu.id) {
                true => self.answered(id, pdu, io),
                false => job.odd = Some("an answer was to another request".into()),
            };
        }
        if pdu.kind != PduKind::Report {
            return;
        }
        let again = match Problem::of(&pdu) {
            Problem::Refused(why) => return self.end(id, Some(why.to_string()), io),
            Problem::UnknownEngine => !envelope.engine.is_empty(),
            // Believed only when it is signed, where we can tell (RFC 3414 §3.2).
            Problem::NotInTime => envelope.is_signed() || user.auth.is_none(),
        };
        job.resyncs += u32::from(again);
        if !again || job.resyncs > RESYNCS {
            return job.odd = Some("the agent does not agree about its engine's time".into());
        }
        let engine = Engine::new(envelope.engine, envelope.boots, envelope.time, user, io.now);
        self.engines.insert(task, engine);
        self.next_step(id);
        self.send(id, io);
    }

    fn answered(&mut self, id: RunId, pdu: Pdu, io: &mut Io<'_>) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.answers += 1;
        let taken = job.walk.answer(pdu);
        self.next_step(id);
        match taken {
            Ok(()) => self.send(id, io),
            Err(e) => self.end(id, Some(e), io),
        }
    }

    /// Late answers to what was asked so far mean nothing any more.
    fn next_step(&mut self, id: RunId) {
        if let Some(job) = self.jobs.get_mut(&id) {
            job.numbers.drain(..).for_each(|number| _ = self.by_number.remove(&number));
        }
    }

    fn unanswered(&mut self, number: i32, io: &mut Io<'_>) {
        let Some(id) = self.by_number.get(&number).copied() else { return };
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let tries = job.numbers.len();
        if tries > job.plan.retries as usize {
            let error = format!("no answer from {} to {tries} requests", job.peer);
            let error = match job.odd.take() {
                Some(odd) => format!("{error}; {odd}"),
                None => error,
            };
            return self.end(id, Some(error), io);
        }
        job.walk.unanswered();
        self.send(id, io);
    }
}

/// A datagram's length and where it came from.
fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> Heard<(usize, SocketAddr)> {
    match socket.recv_from(buffer) {
        Ok(received) => Heard::Datagram(received),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Heard::Empty,
        Err(e) => {
            log::debug!("snmp: receiving: {e}");
            Heard::Nothing
        }
    }
}

fn open(address: IpAddr, family: usize, io: &Io<'_>) -> io::Result<UdpSocket> {
    let any = match address {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let mut socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
    // Less than asked for is still more than the default.
    if let Err(e) = nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBuf, &RECEIVE_BUFFER) {
        log::debug!("snmp: receive buffer: {e}");
    }
    io.watch(&mut socket, family as u64, Interest::READABLE)?;
    Ok(socket)
}

/// A run's end with what is known: `up` says whether the device answered all of it.
fn finished(
    run: &Run,
    plan: &SnmpPlan,
    walk: Option<&Walk>,
    error: Option<String>,
    table: &Arc<SeriesTable>,
) -> Finished {
    let mut out = Gatherer::new(table, &run.task.labels, run.started_ms);
    let instance = plan.instance();
    let up = f64::from(u8::from(error.is_none()));
    out.add("up", crate::sentinel::model::Kind::Gauge, &[("instance", &instance)], up);
    if let Some(walk) = walk {
        walk.gather(&instance, &mut out);
    }
    Finished { gathered: out.done(), error }
}

impl Service for Snmp {
    fn prepare(&mut self, task: &Task) -> Result<Plan, FieldError> {
        let (device, config) = checked(&self.manifest, task)?;
        let keys = &mut self.keys;
        let plan = SnmpPlan::new(&device, &config, &mut |auth, password| {
            if keys.len() >= MOST_KEYS {
                keys.clear();
            }
            let key = keys.entry((auth, Secret::new(password.to_string())));
            Arc::clone(key.or_insert_with(|| Arc::new(auth.password_key(password.as_bytes()).into())))
        })?;
        Ok(Arc::new(Arc::new(plan)))
    }

    fn begin(&mut self, run: Run, io: &mut Io<'_>) {
        let Some(plan) = run.plan::<Arc<SnmpPlan>>().cloned() else { return };
        match io.resolve(run.id, &plan.host) {
            Some(addresses) => self.connect(run, plan, addresses, io),
            None => {
                let walk = Walk::new(Arc::clone(&plan), true);
                let peer = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
                let job = Job { run, plan, walk, peer, numbers: Vec::new(), resyncs: 0, answers: 0, odd: None };
                self.jobs.insert(job.run.id, job);
            }
        }
    }

    fn resolved(&mut self, run: RunId, addresses: Result<Vec<IpAddr>, String>, io: &mut Io<'_>) {
        if let Some(job) = self.jobs.remove(&run) {
            self.connect(job.run, job.plan, addresses, io);
        }
    }

    fn cancel(&mut self, run: RunId, io: &mut Io<'_>) -> Cancelled {
        let said = self.jobs.get_mut(&run).map(|job| {
            let odd = job.odd.take().map(|odd| format!("; {odd}")).unwrap_or_default();
            format!("{} requests were answered{odd}", job.answers)
        });
        Cancelled::Gone(self.take(run, said, io.table).unwrap_or_default())
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
        while let Some(number) = self.sockets.due(io.now) {
            self.unanswered(number, io);
        }
    }

    fn forget(&mut self, task: &str, _io: &mut Io<'_>) {
        self.engines.remove(task);
    }
}

/// For the fuzz target: whatever a datagram says, reading it does not panic, and a PDU that was read is read again from
/// what it is written as.
#[cfg(any(test, feature = "fuzzing"))]
pub fn fuzz_datagram(datagram: &[u8]) {
    let user = |auth, privacy| v3::User { name: "u".into(), auth, privacy, context: String::new() };
    let key = || Arc::new(zeroize::Zeroizing::new(vec![7; 20]));
    let with_keys = user(Some((Auth::Sha1, key())), Some((crypto::Privacy::Aes128, key())));
    match Message::decode(datagram) {
        Err(_) => {}
        Ok(Message::Community { version, community, pdu }) => {
            let again = community_message(version, community, &pdu);
            let Ok(Message::Community { pdu: read, .. }) = Message::decode(&again) else {
                panic!("{pdu:?} cannot be read again")
            };
            // A NaN is not equal to itself.
            assert_eq!(format!("{read:?}"), format!("{pdu:?}"));
        }
        Ok(Message::V3(envelope)) => {
            let engine = Engine::new(envelope.engine, envelope.boots, envelope.time, &with_keys, Instant::now());
            for user in [&with_keys, &user(None, None)] {
                if let (Ok(pdu), true) = (envelope.open(user, Some(&engine)), envelope.is_signed()) {
                    panic!("{pdu:?} was signed by chance");
                }
            }
        }
    }
}

#[cfg(test)]
mod agent;
#[cfg(test)]
mod tests;
