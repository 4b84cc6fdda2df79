//! Hot loops, one a thread.

use crate::{Keys, Outcome};

pub fn run(keys: &Keys) -> Outcome {
    let (threads, rounds) = (keys.get("threads", Some(1u64))?, keys.get("rounds", None::<u64>)?);
    std::thread::scope(|scope| {
        let started: Vec<_> = (0..threads).map(|thread| scope.spawn(move || compute(thread, rounds))).collect();
        for (number, thread) in started.into_iter().enumerate() {
            let result = thread.join().map_err(|_| format!("thread {number} panicked"))?;
            println!("thread={number} result={result:016x}");
        }
        Ok(())
    })
}

/// A chain of numbers that nothing can shorten (xorshift64).
fn compute(thread: u64, rounds: u64) -> u64 {
    let mut number = thread + 1;
    for _ in 0..rounds {
        number ^= number << 13;
        number ^= number >> 7;
        number ^= number << 17;
    }
    std::hint::black_box(number)
}
