//! A paused microVM as files: its state (`saved`) and its memory (`memory`), and both again as a microVM.
//!
//! Order of capture: processors stand still, devices are drained (they may still raise interrupts into KVM's interrupt
//! controllers), then processors, then the controllers and the clock, then memory. `machine` has it; docs/snapshots.md
//! says what a snapshot is.

pub mod child;
pub mod memory;
mod packed;
pub mod saved;
pub mod working_set;

pub use saved::{Saved, SavedError};
