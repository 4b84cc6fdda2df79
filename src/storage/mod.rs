//! What the node keeps: overlays, memory files, snapshots, templates, state database.

pub mod audit;
pub mod backup;
pub mod block_devices;
pub mod events;
pub mod history;
pub mod languages;
pub mod medium;
pub mod memory_file;
pub mod overlay;
mod owed;
pub mod raw;
pub mod ring;
mod schema;
pub mod snapshots;
pub mod space;
pub mod state;
pub mod template_disk;
pub mod template_file;
pub mod templates;
pub mod verity;
