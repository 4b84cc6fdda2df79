//! What the clocks say, and that the monotonic one never goes back.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::{Keys, Outcome, during};

pub fn run(keys: &Keys) -> Outcome {
    let until: PathBuf = keys.get("until", None)?;
    let (mut last, mut looks) = (monotonic()?, 0u64);
    println!("watching");
    loop {
        // A thousand readings for one look at the file, which takes far longer than they do.
        for _ in 0..1000 {
            let now = monotonic()?;
            if now < last {
                return Err(format!("the monotonic clock went from {last} back to {now} ns"));
            }
            last = now;
        }
        looks += 1;
        if until.exists() {
            break;
        }
        // Others need the processor as well.
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let before = monotonic()?;
    let realtime = SystemTime::now().duration_since(UNIX_EPOCH).map_err(during("the clock"))?.as_nanos();
    println!("looks={looks} monotonic_ns={before} realtime_ns={realtime}");
    Ok(())
}

/// CLOCK_MONOTONIC itself: `Instant` hides a clock that goes back.
fn monotonic() -> Result<u128, String> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: clock_gettime writes one timespec.
    if unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) } != 0 {
        return Err(std::io::Error::last_os_error().to_string());
    }
    Ok(time.tv_sec as u128 * 1_000_000_000 + time.tv_nsec as u128)
}
