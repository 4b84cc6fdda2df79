//! The control socket's server side: connections, who may ask what, the verb table, typed commands.

pub mod client;
pub mod command;
pub mod port;
pub mod role;
