//! The virtual machine monitor: `warren vmm`, one process for each microVM.
//!
//! | part | what |
//! |---|---|
//! | `worker`, `link`, `config` | the process: its loop, the supervisor's connections, `vm.start` |
//! | `machine` | one microVM from its parts |
//! | `boot` | what a guest kernel finds in memory when it starts |
//! | `generation` | how a restored guest's kernel hears that it is another machine |
//! | `kvm` | the virtual machine and its processors |
//! | `devices` | virtio devices and the serial port |
//! | `platform` | power-off, reset and panic registers |
//! | `memory` | the guest's RAM |
//! | `jail` | what the process gives up before it reads a request |
//! | `snapshot` | a paused microVM as files |
//! | `restoring` | one that goes on from these, before it is known whose it is |
//! | `last_words` | why it ended |
//!
//! Threads: the main one runs the loop and the devices; each processor and each disk has its own.

pub mod boot;
mod config;
pub mod devices;
pub mod generation;
pub mod jail;
pub mod kvm;
mod last_words;
mod link;
mod machine;
pub mod memory;
mod platform;
mod restoring;
pub mod snapshot;
mod worker;

pub use worker::main;
