//! Boots the node in QEMU and drives it: the harness that the tests in `tests/` share.
//!
//! A test asks for the binary's shared node (`shared::node`) or boots one of its own (`Boot`), talks to
//! the node's control socket (`Client`, `Sandbox`) and, as root on the node itself, through a second
//! serial channel (`Node::run`). When the test is over, however it ended, the node's console is searched
//! for kernel splats, every process that was started is ended by its id, and every file is removed.
//! docs/testing.md is the guide.

pub mod artefacts;
pub mod attacks;
pub mod bench;
pub mod client;
pub mod connection;
pub mod console;
pub mod cpio;
pub mod fault;
pub mod files;
pub mod internet;
pub mod load;
pub mod machine;
pub mod node;
pub mod packages;
pub mod process;
pub mod qmp;
pub mod rig;
pub mod sandbox;
pub mod shared;
pub mod stand_in;
pub mod state;
pub mod templates;
pub mod timing;
pub mod transcript;
pub mod witness;
pub mod writes;

pub use client::{Call, Client, Reply};
pub use node::{Boot, Node, Output};
pub use sandbox::Sandbox;
pub use warren::wire::{Code, Error, Fields, Message, Request};
