//! Memory that is taken, used and given back to the guest's kernel.

use std::time::Duration;

use crate::{Keys, Outcome};

const PAGE: usize = 4096;

pub fn run(keys: &Keys) -> Outcome {
    let (mib, times) = (keys.get("mib", None::<usize>)?, keys.get("times", Some(1u64))?);
    let hold = Duration::from_millis(keys.get("hold_ms", Some(0))?);
    for round in 0..times {
        // Large allocations are mappings of their own, which `drop` unmaps.
        let mut memory = vec![0u8; mib << 20];
        for (number, page) in memory.chunks_mut(PAGE).enumerate() {
            page[..8].copy_from_slice(&stamp(round, number).to_ne_bytes());
        }
        std::thread::sleep(hold);
        for (number, page) in memory.chunks(PAGE).enumerate() {
            if page[..8] != stamp(round, number).to_ne_bytes() || page[8..] != [0; PAGE][8..] {
                return Err(format!("page {number} is not what was written"));
            }
        }
    }
    println!("mib={mib} times={times}");
    Ok(())
}

fn stamp(round: u64, page: usize) -> u64 {
    (round + 1) << 40 | page as u64
}
