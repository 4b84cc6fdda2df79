//! The supervisor: the process that owns the node's sandboxes and answers on the control socket.

mod adopt;
mod agents;
mod assembly;
mod audit;
mod background;
mod backup;
mod build;
mod capture;
mod catalogue;
mod checkpoint;
mod clients;
mod code;
mod components;
pub mod config;
mod delegation;
mod drain;
mod events;
mod exchange;
mod externals;
pub mod faults;
mod feeding;
mod finish;
mod flattening;
mod fork;
mod health;
mod history;
mod info;
mod instance;
mod ledger;
mod listener;
pub mod logging;
mod logs;
mod meeting;
mod merging;
mod network;
mod packages;
mod pause;
mod pools;
mod recording;
mod requests;
mod restart;
mod sealing;
mod service;
mod settle;
mod snapshots;
mod start;
mod stats;
mod supervisor;
mod templates;
mod time_limits;
mod timers;
mod tracing;
mod transfer;
mod turn;
mod waiters;
mod warm;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use assembly::Node;
use config::{Config, DEFAULT_PATH};

use crate::init::ExitWatch;

/// `warren supervise [--config PATH]`. Without `--config` a missing file means the defaults.
pub fn main(args: Vec<OsString>) -> ExitCode {
    logging::init("supervise");
    // Before any thread starts and any descriptor is opened.
    let init = ExitWatch::inherit();
    match serve(&args, init) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            log::error!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn serve(args: &[OsString], init: Option<ExitWatch>) -> Result<(), String> {
    let config = match args {
        [] if !Path::new(DEFAULT_PATH).exists() => Config::default(),
        [] => load(Path::new(DEFAULT_PATH))?,
        [flag, path] if flag == "--config" => load(&PathBuf::from(path))?,
        _ => return Err("usage: warren supervise [--config PATH]".to_string()),
    };
    logging::set_level(config.log.level.into());
    Node::new(config, init).run()
}

fn load(path: &Path) -> Result<Config, String> {
    Config::load(path).map_err(|e| e.to_string())
}
