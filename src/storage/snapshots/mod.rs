//! Snapshots and frozen layers: their rows, who needs what, their files, and one file that holds all of a snapshot.
//!
//! On the data partition, beside the sandboxes' directories:
//!
//! | place | what |
//! |---|---|
//! | `snapshots/ID/state` | header, processors and devices, as `vmm::snapshot` writes them |
//! | `snapshots/ID/memory` | the guest's memory (`memory_file`) |
//! | `layers/ID` | a frozen layer of disks (`overlay`) |
//!
//! The rows say what is there: a file without a row is nobody's.

pub mod bundle;
pub mod files;
pub mod retention;
pub mod rows;
pub mod store;

pub use files::{FaultPoint, Shelves};
pub use rows::{LayerRow, SnapshotKind, SnapshotRow, SnapshotState};
pub use store::{Holding, Store};

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod store_tests;
