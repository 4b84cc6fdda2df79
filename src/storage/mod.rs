//! What the node keeps: overlays, templates, state database.

pub mod block_devices;
pub mod overlay;
mod schema;
pub mod state;
pub mod template_disk;
pub mod templates;
