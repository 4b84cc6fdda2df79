//! One sandbox as the node sees it: its lifecycle, what it holds, its worker, its programs' output.
//!
//! Nothing here knows of clients or of the loop that drives it (`node`).

pub mod agent;
pub mod berth;
pub mod census;
pub mod claims;
pub mod death;
pub mod disk;
pub mod exec;
pub mod flow;
pub mod guest_log;
pub mod home;
pub mod id;
pub mod ledger;
pub mod lifecycle;
pub mod limits;
pub mod network;
pub mod packages;
pub mod restart;
pub mod spawn;
pub mod spec;
pub mod stdin;
pub mod time_limits;
pub mod trace;
pub mod uids;
pub mod usage;
pub mod void;
pub mod worker;
