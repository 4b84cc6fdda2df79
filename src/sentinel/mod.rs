//! The sentinel: a telemetry agent that never loses what it accepted. It runs as a child of init on a node and alone on
//! any Linux host.
//!
//! One pipeline: a task's run gives samples of interned series (`model`), the collector hands them as batches to a
//! [`task::Sink`], and from there on they are in the log until every destination has acknowledged them. Collection
//! never waits for sending.

pub mod aggregate;
mod cli;
pub mod collect;
pub mod collectors;
pub mod config;
pub mod control;
pub mod core_sim;
pub mod formats;
pub mod http;
mod inspect;
pub mod log;
pub mod model;
pub mod plugin;
pub mod process;
pub mod schedule;
pub mod secret;
pub mod send;
pub mod task;

pub use cli::main;
pub use control::{SOCKET, USER, ask_by as ask};
