//! Warren turns a bare machine into a node that runs untrusted code in microVM sandboxes.
//!
//! One package, three programs: `warren` (every role of the node and the command line), `burrow`
//! (the agent inside a sandbox) and `mason` (fills disks of templates, inside a sandbox that builds one). Dependencies point one way: `wire` is used by everything, `vmm`,
//! `network` and `storage` know nothing of `control` or `node`.

pub mod archive;
pub mod cli;
pub mod control;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
pub mod guest;
pub mod init;
pub mod mason;
pub mod network;
pub mod node;
pub mod outbound;
pub mod pool;
pub mod recipe;
pub mod sandbox;
pub mod seccomp;
pub mod sentinel;
pub mod storage;
pub mod vmm;
pub mod wire;
