//! PID 1 of the node.

mod client;

pub use client::{ChildExit, ChildStatus, ExitWatch, LINK_FD, LINK_VARIABLE, StopMode};

/// Entry of PID 1.
pub fn main() -> std::process::ExitCode {
    std::process::ExitCode::SUCCESS
}
