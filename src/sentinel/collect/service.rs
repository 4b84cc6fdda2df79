//! What a kind of collection must offer the loop, and what the loop offers it.
//!
//! A service owns its sockets and pipes and all runs under way on them. It is called from the loop's thread only, must
//! never block, and says when it wants to be woken. What blocks goes to the pool.

use std::any::Any;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use mio::event::{Event, Source};
use mio::{Interest, Registry, Token};

use super::gather::Gathered;
use super::names::Names;
use super::pool::{Job, Pool};
use crate::sentinel::model::SeriesTable;
use crate::sentinel::plugin::FieldError;
use crate::sentinel::schedule::RunId;
use crate::sentinel::task::Task;

/// A task's checked settings, in whatever form its service wants them.
pub type Plan = Arc<dyn Any + Send + Sync>;

/// One run to be made.
#[derive(Clone)]
pub struct Run {
    /// Its name.
    pub id: RunId,
    /// What runs.
    pub task: Arc<Task>,
    /// What [`Service::prepare`] made of the task.
    pub plan: Plan,
    /// The time that its samples carry: milliseconds since 1970-01-01 UTC.
    pub started_ms: i64,
    /// When it started.
    pub started: Instant,
    /// When it must have ended; the loop cancels it then.
    pub deadline: Instant,
}

impl Run {
    /// The plan as the type that the service made.
    pub fn plan<T: 'static>(&self) -> Option<&T> {
        self.plan.downcast_ref()
    }
}

/// How a run ended. A failed run may have samples too (`up` 0).
#[derive(Debug, Default)]
pub struct Finished {
    /// What was measured.
    pub gathered: Gathered,
    /// Why it failed; holds no secret.
    pub error: Option<String>,
}

impl Finished {
    /// A run that gave what it should.
    pub fn success(gathered: Gathered) -> Self {
        Self { gathered, error: None }
    }

    /// A run that gave nothing.
    pub fn failure(error: impl Into<String>) -> Self {
        Self { gathered: Gathered::default(), error: Some(error.into()) }
    }
}

/// What became of a run that was to be taken back.
#[derive(Debug)]
pub enum Cancelled {
    /// It is over; a run that met its deadline may still have something to say (`up` 0, how many answers came).
    Gone(Finished),
    /// It sits in a system call. It comes back as a pool job that nobody waits for.
    Held,
}

/// Which of the loop's events are meant for whom: a service's own number for a source, below 2^48.
const SERVICE_SHIFT: u32 = 48;

/// The loop, as a service sees it.
pub struct Io<'a> {
    /// Now.
    pub now: Instant,
    /// Every series there is.
    pub table: &'a Arc<SeriesTable>,
    pub(super) service: usize,
    pub(super) registry: &'a Registry,
    pub(super) pool: &'a mut Pool,
    pub(super) names: &'a mut Names,
    pub(super) done: &'a mut Vec<(RunId, Finished)>,
}

impl Io<'_> {
    /// Says how a run ended.
    pub fn finish(&mut self, run: RunId, finished: Finished) {
        self.done.push((run, finished));
    }

    /// Watches a source; its events come to [`Service::ready`] with this number.
    pub fn watch(&self, source: &mut impl Source, number: u64, interest: Interest) -> std::io::Result<()> {
        self.registry.register(source, self.token(number), interest)
    }

    /// Watches no more. A source that was never watched is no error.
    pub fn unwatch(&self, source: &mut impl Source) {
        let _ = self.registry.deregister(source);
    }

    /// Looks a host name up. What is known is given at once; otherwise [`Service::resolved`] is called later.
    pub fn resolve(&mut self, run: RunId, host: &str) -> Option<Result<Vec<IpAddr>, String>> {
        self.names.look_up(self.service, run, host, self.now)
    }

    /// Has a pool thread do something that blocks; its end is the run's end.
    pub fn work(&mut self, run: RunId, job: Job) {
        self.pool.submit(run, job);
    }

    /// Takes a job back that no thread has begun; `false` when one has.
    pub fn unwork(&mut self, run: RunId) -> bool {
        self.pool.take_back(run)
    }

    fn token(&self, number: u64) -> Token {
        Token((self.service << SERVICE_SHIFT) | (number as usize & ((1 << SERVICE_SHIFT) - 1)))
    }
}

/// Which service an event is for, and its number there.
pub(super) fn split(token: Token) -> (usize, u64) {
    (token.0 >> SERVICE_SHIFT, (token.0 & ((1 << SERVICE_SHIFT) - 1)) as u64)
}

/// One kind of collection.
pub trait Service {
    /// Checks a task's fields and makes a plan of them. Called once for each content of a task.
    fn prepare(&mut self, task: &Task) -> Result<Plan, FieldError>;

    /// Begins a run. It ends by [`Io::finish`], now or later.
    fn begin(&mut self, run: Run, io: &mut Io<'_>);

    /// Ends a run before its time.
    fn cancel(&mut self, run: RunId, io: &mut Io<'_>) -> Cancelled;

    /// A source has something.
    fn ready(&mut self, _number: u64, _event: &Event, _io: &mut Io<'_>) {}

    /// A name was looked up.
    fn resolved(&mut self, _run: RunId, _addresses: Result<Vec<IpAddr>, String>, _io: &mut Io<'_>) {}

    /// When [`Service::wake`] wants to be called.
    fn wake_at(&self) -> Option<Instant> {
        None
    }

    /// The time has come.
    fn wake(&mut self, _io: &mut Io<'_>) {}

    /// A task is gone or has another content: what is kept for it goes.
    fn forget(&mut self, _task: &str, _io: &mut Io<'_>) {}

    /// The sentinel stops.
    fn close(&mut self) {}
}
