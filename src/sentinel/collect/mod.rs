//! Collection: the schedule and the kinds of collection around one loop.
//!
//! [`Collector`] is the handle: a thread with one mio loop that has the timers, the sockets of `ping`, `snmp`, `http` and
//! `modbus` and the pipes of external plugins. Nothing on it blocks; what must block has the [`pool`]. A run that meets
//! its deadline is ended whatever it does, and a thing that hangs delays nothing but itself.

mod gather;
mod names;
mod pool;
mod runtime;
mod service;
mod stale;

pub use gather::{Gathered, Gatherer, series_identity};
pub use runtime::{Collector, Settings, Stats, TaskView, once};
pub use service::{Cancelled, Finished, Io, Plan, Run, Service};
