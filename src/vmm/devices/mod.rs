//! The devices of a guest, and the set of them that a worker runs.
//!
//! | part | what |
//! |---|---|
//! | `queue`, `segments` | split virtqueues and the guest buffers in them |
//! | `mmio`, `device` | the transport, and what it asks of a device |
//! | `balloon`, `block`, `net`, `rng`, `vsock` | virtio devices |
//! | `disk` | a block device on its own thread |
//! | `serial`, `console` | COM1, and its log |
//! | `rate`, `timer` | token buckets, and what wakes a device that waits for tokens |
//! | `set` | all of them, wired |

pub mod balloon;
pub mod block;
pub mod console;
pub mod device;
pub mod disk;
#[cfg(any(test, feature = "fuzzing"))]
pub mod driver;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rate;
pub mod rng;
pub mod segments;
pub mod serial;
pub mod set;
pub mod timer;
pub mod vsock;

#[cfg(test)]
mod tests;

pub use mmio::{QUEUE_NOTIFY, WINDOW};
pub use set::{
    DeviceConfig, DeviceError, DeviceSet, DeviceStats, ExtraDisk, FIRST_GSI, MAX_EXTRA_DISKS, MMIO_BASE, ROOT,
    SERIAL_GSI, SERIAL_PORT, WindowInfo,
};
