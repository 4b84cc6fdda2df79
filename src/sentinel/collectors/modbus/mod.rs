//! `modbus`: Modbus TCP, and RTU frames over TCP.
//!
//! A run has a connection of its own (many devices have room for one), on which one request after the other is made.
//! Neighbouring registers are read together as far as the protocol allows; a device that refuses a block because of the
//! holes in it is asked for the wanted parts alone. An answer with another transaction id is left out; what cannot be
//! an answer ends the connection, and the block is asked for once more on a new one.

pub mod frame;
mod plan;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::Interest;
use mio::event::Event;
use mio::net::TcpStream;

use super::{checked, manifest};
use crate::sentinel::collect::{Cancelled, Finished, Gatherer, Io, Plan, Run, Service};
use crate::sentinel::model::Kind;
use crate::sentinel::plugin::{FieldError, Manifest};
use crate::sentinel::schedule::RunId;
use crate::sentinel::task::Task;
use frame::{Answer, answer, exception_name};
use plan::{Block, ModbusPlan};

/// Octets of answers that wait to be understood, at most.
const MOST_BUFFERED: usize = 4096;
/// A busy device is asked again after this.
const BUSY_PAUSE: Duration = Duration::from_millis(100);

/// The service.
pub struct Modbus {
    manifest: Manifest,
    jobs: HashMap<RunId, Job>,
    timers: BinaryHeap<Reverse<(Instant, RunId)>>,
}

struct Job {
    run: Run,
    plan: Arc<ModbusPlan>,
    address: Option<SocketAddr>,
    stream: Option<TcpStream>,
    connected: bool,
    /// The request under way is at the front.
    blocks: VecDeque<Block>,
    transaction: u16,
    /// The request has been sent (or waits to be).
    asked: bool,
    out: Vec<u8>,
    buffer: Vec<u8>,
    busy: u32,
    reconnected: bool,
    values: Vec<Option<f64>>,
    /// The first refusal: the other blocks are read all the same.
    refused: Option<String>,
}

enum Step {
    /// Wait for the device.
    Wait,
    /// Wait for this time, then ask.
    Pause(Duration),
    /// All is read, or nothing more can be.
    End(Option<String>),
}

impl Modbus {
    /// The service.
    #[allow(clippy::new_without_default)] // like the others, whose `new` takes something
    pub fn new() -> Self {
        Self { manifest: manifest("modbus"), jobs: HashMap::new(), timers: BinaryHeap::new() }
    }

    fn connect(&mut self, id: RunId, addresses: Result<Vec<IpAddr>, String>, io: &mut Io<'_>) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let step = match addresses.map(|addresses| addresses.first().copied()) {
            Ok(Some(address)) => {
                job.address = Some(SocketAddr::new(address, job.plan.port));
                job.connect(io)
            }
            Ok(None) => Step::End(Some("the host has no address".into())),
            Err(e) => Step::End(Some(e)),
        };
        self.after(id, step, io);
    }

    fn after(&mut self, id: RunId, step: Step, io: &mut Io<'_>) {
        match step {
            Step::Wait => {}
            Step::Pause(pause) => self.timers.push(Reverse((io.now + pause, id))),
            Step::End(error) => {
                if let Some(finished) = self.take(id, error, io) {
                    io.finish(id, finished);
                }
            }
        }
    }

    fn take(&mut self, id: RunId, error: Option<String>, io: &Io<'_>) -> Option<Finished> {
        let mut job = self.jobs.remove(&id)?;
        job.disconnect(io);
        let error = error.or(job.refused);
        let mut out = Gatherer::new(io.table, &job.run.task.labels, job.run.started_ms);
        let instance = job.plan.instance();
        let up = f64::from(u8::from(error.is_none()));
        out.add("up", Kind::Gauge, &[("instance", &instance)], up);
        for (point, value) in job.plan.points.iter().zip(&job.values) {
            if let Some(value) = value {
                let mut labels = point.labels.clone();
                labels.push(("instance".into(), instance.clone()));
                out.add(&point.name, point.kind, &labels, *value);
            }
        }
        Some(Finished { gathered: out.done(), error })
    }
}

impl Job {
    fn connect(&mut self, io: &Io<'_>) -> Step {
        let Some(address) = self.address else { return Step::Wait };
        (self.connected, self.asked) = (false, false);
        self.out.clear();
        self.buffer.clear();
        let opened = TcpStream::connect(address).and_then(|mut stream| {
            io.watch(&mut stream, self.run.id.0, Interest::READABLE | Interest::WRITABLE)?;
            Ok(stream)
        });
        match opened {
            Ok(stream) => {
                self.stream = Some(stream);
                Step::Wait
            }
            Err(e) => Step::End(Some(format!("cannot connect to {address}: {e}"))),
        }
    }

    fn disconnect(&mut self, io: &Io<'_>) {
        if let Some(mut stream) = self.stream.take() {
            io.unwatch(&mut stream);
        }
    }

    /// Goes on as far as the connection lets it.
    fn go_on(&mut self, io: &Io<'_>) -> Step {
        let Some(stream) = &mut self.stream else { return Step::Wait };
        if !self.connected {
            if let Ok(Some(e)) | Err(e) = stream.take_error() {
                return Step::End(Some(format!("cannot connect: {e}")));
            }
            if stream.peer_addr().is_err() {
                return Step::Wait;
            }
            self.connected = true;
        }
        loop {
            if !self.asked {
                let Some(block) = self.blocks.front() else { return Step::End(None) };
                self.transaction = self.transaction.wrapping_add(1);
                self.out = block.ask.encode(self.plan.framing, self.transaction, self.plan.unit);
                self.asked = true;
            }
            match self.exchange() {
                Ok(None) => return Step::Wait,
                Ok(Some(answer)) => {
                    if let Some(step) = self.answered(answer) {
                        return step;
                    }
                }
                Err(e) if self.reconnected => return Step::End(Some(e)),
                Err(_) => {
                    self.reconnected = true;
                    self.disconnect(io);
                    return self.connect(io);
                }
            }
        }
    }

    /// Writes what waits and reads what there is.
    fn exchange(&mut self) -> Result<Option<Answer>, String> {
        let Some(stream) = &mut self.stream else { return Ok(None) };
        while !self.out.is_empty() {
            match stream.write(&self.out) {
                Ok(count) => _ = self.out.drain(..count),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(format!("the connection failed: {e}")),
            }
        }
        let Some(ask) = self.blocks.front().map(|block| block.ask) else { return Ok(None) };
        let mut chunk = [0; 1024];
        loop {
            let taken = answer(&mut self.buffer, self.plan.framing, self.transaction, self.plan.unit, &ask)?;
            if taken.is_some() {
                return Ok(taken);
            }
            match stream.read(&mut chunk) {
                Ok(0) => return Err("the device closed the connection".into()),
                Ok(count) => self.buffer.extend_from_slice(&chunk[..count]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(format!("the connection failed: {e}")),
            }
            if self.buffer.len() > MOST_BUFFERED {
                return Err("the device sends what nobody asked for".into());
            }
        }
    }

    fn answered(&mut self, answer: Answer) -> Option<Step> {
        const ACKNOWLEDGE: u8 = 5;
        const BUSY: u8 = 6;
        const ADDRESS: u8 = 2;
        if answer == Answer::Other {
            return None;
        }
        self.asked = false;
        if let Answer::Exception(ACKNOWLEDGE | BUSY) = answer
            && self.busy < self.plan.busy_retries
        {
            self.busy += 1;
            return Some(Step::Pause(BUSY_PAUSE));
        }
        let block = self.blocks.pop_front()?;
        match answer {
            Answer::Data(data) => {
                self.busy = 0;
                for point in &block.points {
                    self.values[*point] = self.plan.value(*point, &block.ask, &data);
                }
            }
            Answer::Exception(code) => {
                // A hole that the device does not have spoils the block: ask around it.
                let parts = self.plan.blocks(block.points.iter().copied(), 0);
                if code == ADDRESS && parts.len() > 1 {
                    parts.into_iter().rev().for_each(|part| self.blocks.push_front(part));
                } else {
                    let (table, address) = (block.ask.table, block.ask.address);
                    let error = format!("{table:?} {address}: {} (code {code})", exception_name(code));
                    self.refused.get_or_insert(error);
                }
            }
            Answer::Other => {}
        }
        let pause = Duration::from_millis(self.plan.pause_ms);
        (!pause.is_zero() && !self.blocks.is_empty()).then_some(Step::Pause(pause))
    }
}

impl Service for Modbus {
    fn prepare(&mut self, task: &Task) -> Result<Plan, FieldError> {
        let (device, config) = checked(&self.manifest, task)?;
        Ok(Arc::new(Arc::new(ModbusPlan::new(&device, &config)?)))
    }

    fn begin(&mut self, run: Run, io: &mut Io<'_>) {
        let Some(plan) = run.plan::<Arc<ModbusPlan>>().cloned() else { return };
        let id = run.id;
        let addresses = io.resolve(id, &plan.host);
        let job = Job {
            blocks: plan.blocks(0..plan.points.len(), plan.max_gap).into(),
            values: vec![None; plan.points.len()],
            run,
            plan,
            address: None,
            stream: None,
            connected: false,
            transaction: id.0 as u16,
            asked: false,
            out: Vec::new(),
            buffer: Vec::new(),
            busy: 0,
            reconnected: false,
            refused: None,
        };
        self.jobs.insert(id, job);
        if let Some(addresses) = addresses {
            self.connect(id, addresses, io);
        }
    }

    fn resolved(&mut self, run: RunId, addresses: Result<Vec<IpAddr>, String>, io: &mut Io<'_>) {
        self.connect(run, addresses, io);
    }

    fn cancel(&mut self, run: RunId, io: &mut Io<'_>) -> Cancelled {
        let job = self.jobs.get(&run);
        let said = job.map(|job| format!("{} requests were not answered", job.blocks.len()));
        Cancelled::Gone(self.take(run, said, io).unwrap_or_default())
    }

    fn ready(&mut self, number: u64, _event: &Event, io: &mut Io<'_>) {
        let id = RunId(number);
        // A pause is not cut short by an event: the timer goes on with the run.
        let paused = self.timers.iter().any(|Reverse((_, run))| *run == id);
        if let Some(job) = self.jobs.get_mut(&id).filter(|_| !paused) {
            let step = job.go_on(io);
            self.after(id, step, io);
        }
    }

    fn wake_at(&self) -> Option<Instant> {
        self.timers.peek().map(|Reverse((at, _))| *at)
    }

    fn wake(&mut self, io: &mut Io<'_>) {
        while let Some(Reverse((at, id))) = self.timers.peek().copied()
            && at <= io.now
        {
            self.timers.pop();
            if let Some(job) = self.jobs.get_mut(&id) {
                let step = job.go_on(io);
                self.after(id, step, io);
            }
        }
    }
}

#[cfg(test)]
mod tests;
