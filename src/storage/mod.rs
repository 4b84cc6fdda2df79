//! What the node keeps: overlays, templates, state database.

pub mod audit;
pub mod backup;
pub mod block_devices;
pub mod medium;
pub mod overlay;
pub mod raw;
mod schema;
pub mod space;
pub mod state;
pub mod template_disk;
pub mod templates;
