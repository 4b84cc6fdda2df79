//! The virtual machine monitor: `warren vmm`, one process for each microVM.

pub mod boot;
pub mod memory;

/// Entry.
pub fn main() -> std::process::ExitCode {
    std::process::ExitCode::SUCCESS
}
