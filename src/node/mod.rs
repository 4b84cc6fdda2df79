//! To be written.

pub mod config;
pub mod logging;

/// Entry.
pub fn main(_args: Vec<std::ffi::OsString>) -> std::process::ExitCode {
    std::process::ExitCode::SUCCESS
}
