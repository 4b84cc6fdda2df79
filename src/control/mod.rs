//! The control socket's server side: connections, who may ask what, the verb table, typed commands.

pub mod access;
pub mod build;
pub mod client;
pub mod code;
pub mod command;
pub mod events;
mod history;
pub mod list;
pub mod port;
mod programs;
