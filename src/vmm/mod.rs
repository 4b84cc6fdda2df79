//! The virtual machine monitor: `warren vmm`, one process for each microVM.

mod bare;
pub mod boot;
mod config;
pub mod kvm;
mod last_words;
mod link;
mod machine;
pub mod memory;
mod platform;
mod worker;

pub use worker::main;
