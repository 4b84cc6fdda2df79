//! Senders: one lane per destination, each with its own reader of the log, connection, retries and breaker, so that no
//! destination can delay another or cost it a repeat.
//!
//! `lane` has the thread, `gather` makes batches of what the log gives, `encode` and its parts turn a batch into a
//! request, `policy` says what an answer means, `crate::outbound` how long to wait, `dead_letter` keeps what a receiver
//! refused.

mod clickhouse;
mod dead_letter;
mod encode;
mod gather;
mod gzip;
pub mod json;
mod lane;
mod matches;
mod policy;
pub(super) mod protobuf;
pub mod remote_write;
mod snappy;
#[cfg(test)]
mod tests;
mod zstd;

pub use encode::Protocol;
pub use gzip::{gunzip, gzip};
pub use lane::{Lane, LaneOptions, LaneStats};
