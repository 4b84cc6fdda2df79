//! Time limits of the tests. They guard against hangs and nothing else: no test asserts how long a thing took.

use std::path::Path;
use std::time::{Duration, Instant};

/// Whether this machine can run the node by hardware virtualization. A /dev/kvm of another kind than these
/// two modules may accept every ioctl and still not run a stock kernel.
pub fn hardware_virtualization() -> bool {
    ["kvm_intel", "kvm_amd"].iter().any(|module| Path::new("/sys/module").join(module).exists())
        && std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok()
}

/// How much longer things may take than on hardware: `WARREN_TEST_TIME_FACTOR`, or 1 with hardware
/// virtualization, or 20 with QEMU's software CPU.
pub fn factor() -> u32 {
    let given = std::env::var("WARREN_TEST_TIME_FACTOR").ok().and_then(|text| text.parse().ok());
    given.unwrap_or(if hardware_virtualization() { 1 } else { 20 })
}

/// A limit in seconds on hardware, scaled to this machine.
pub fn limit(seconds: u64) -> Duration {
    Duration::from_secs(seconds) * factor()
}

/// The longest that anything may show no sign of life.
pub fn hang() -> Duration {
    limit(20).max(Duration::from_secs(30))
}

/// Asks `ready` until it gives a value.
///
/// # Panics
/// After `hang()` without one; `what` names what was waited for.
pub fn wait_for<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + hang();
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(Instant::now() < end, "waited {:?} for {what} in vain", hang());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// How many processors a node has: `WARREN_TEST_CPUS`, else two on hardware and one on QEMU's software CPU, where two
/// threads at once lead to faults that no machine has (docs/testing.md, "Known").
pub fn processors() -> u32 {
    let asked = std::env::var("WARREN_TEST_CPUS").ok().and_then(|text| text.parse().ok());
    asked.unwrap_or(if hardware_virtualization() { 2 } else { 1 })
}
