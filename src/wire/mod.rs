//! The line protocol that every link of the node speaks: control socket, worker link, agent link.
//!
//! One grammar (docs/protocol.md), one parser, one test suite. `Message` is one unit of it,
//! `Decoder` cuts a byte stream into messages, `Message::encode` is the way back, `Args` gives
//! typed, bounded access to a request's arguments.

mod args;
mod decode;
mod encode;
mod error;
mod link;
mod message;

pub use args::Args;
pub use decode::{Decoded, Decoder};
pub use error::{Code, Error};
pub use link::{Filled, Link};
pub use message::{Arg, Fields, Message, Request};

/// Version of the protocol, as `hello` reports it.
pub const PROTOCOL_VERSION: u64 = 1;
/// Version of the link between supervisor and worker: its verbs and what they mean. A worker says it in its `hello`; those of
/// version 1 say nothing of it. It grows whenever a supervisor must know what it speaks to: docs/protocol.md lists what came
/// with each. A supervisor takes over workers of this version and of the one before (`OLDEST_WORKER_LINK`).
pub const WORKER_LINK: u64 = 2;
/// The oldest version of the worker link that a supervisor speaks.
pub const OLDEST_WORKER_LINK: u64 = WORKER_LINK - 1;
/// Longest line, its LF included, in octets.
pub const MAX_LINE: usize = 64 * 1024;
/// Largest payload of one `data` frame, in octets.
pub const MAX_DATA: usize = 1024 * 1024;
/// Payload that senders put into one `data` frame at most; small frames keep links fair.
pub const FRAME: usize = 16 * 1024;
/// Octets a sender may send on a fresh channel before the receiver's first `credit`.
pub const INITIAL_CREDIT: u64 = 256 * 1024;
/// Longest tag, in octets.
pub const MAX_TAG: usize = 64;
/// Largest number of a program: the agent has eight bits beside it in a token.
pub const EXEC_MAX: u64 = u64::MAX >> 8;
/// Longest channel name, in octets.
pub const MAX_CHANNEL: usize = 16;
