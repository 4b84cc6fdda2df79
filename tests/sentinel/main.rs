//! The sentinel as a process: started, killed, cut off, restarted, against receivers of our own and a real Prometheus.

#![allow(clippy::unwrap_used)] // a failure is the finding

mod buffer;
mod config;
mod core;
mod measure;
mod process;
mod prometheus;
mod receiver;
mod survival;
