//! PID 1 of the node: brings the machine up, runs the supervisor, reaps, brings the machine down.
//!
//! It does little so that it never fails: it parses nothing that an outsider can write but the superblock of a
//! disk and lines of its own supervisor, and a duty that fails is reported and skipped where the node can do
//! without. One thread until shutdown, one loop (`run`).

mod cgroups;
mod client;
mod cmdline;
mod data;
mod ext4;
mod link;
mod machine;
mod mounts;
mod ports;
mod power_button;
mod reaper;
mod run;
mod service;
mod shutdown;
mod spawn;

use std::process::ExitCode;

use crate::node::config::{self, Config};
use crate::node::logging;

pub use client::{ChildExit, ChildStatus, ExitWatch, LINK_FD, LINK_VARIABLE, StopMode};

/// Entry of PID 1. Never comes back: at its end the machine is off or starts again.
pub fn main() -> ExitCode {
    if std::process::id() != 1 {
        eprintln!("error: init is process 1 of a node and nothing else");
        return ExitCode::FAILURE; // its end would kill every process it may
    }
    // Until /dev is there nothing can be said; what failed is said after.
    let failed_mounts = mounts::mount_all();
    machine::log_to_kernel();
    logging::init("init");
    machine::die_loudly();
    for failure in failed_mounts {
        log::error!("{failure}");
    }
    let parameters = cmdline::Parameters::read();
    let config = Config::load(config::DEFAULT_PATH.as_ref()).unwrap_or_else(|error| {
        log::error!("configuration not used: {error}");
        Config::default()
    });
    machine::set_up(&config.node.name);
    cgroups::set_up();
    let data = data::mount(&config.paths.data, parameters.data_wait);
    let mode = run::run(parameters.services, config.sentinel.is_some());
    shutdown::shut_down(mode, data.as_ref())
}
