use std::time::{Duration, Instant};

use crate::vmm::devices::driver::Seed;
use crate::vmm::devices::rate::{Limiter, Limits, Rate};
use crate::vmm::devices::timer::Timer;

const SECOND: u64 = 1_000_000_000;

fn bytes(per_second: u64, burst: u64) -> Limits {
    Limits { bytes: Some(Rate { per_second, burst }), operations: None }
}

/// Passes pieces as a device does that is woken when its timer says; gives what passed until `end`.
fn pass(limiter: &mut Limiter, start: Instant, end: Duration, mut piece: impl FnMut() -> u64) -> (u64, u64) {
    let (mut now, mut octets, mut pieces) = (start, 0, 0);
    while now < start + end {
        match limiter.wait(now) {
            Some(wait) => now += wait,
            None => {
                let len = piece();
                limiter.take(len, 1);
                (octets, pieces) = (octets + len, pieces + 1);
            }
        }
    }
    (octets, pieces)
}

#[test]
fn without_limits_everything_goes() {
    let now = Instant::now();
    let mut limiter = Limiter::new(Limits::default(), now);
    assert!(!limiter.is_limited());
    limiter.take(u64::MAX, u64::MAX);
    assert_eq!(limiter.wait(now), None);
}

#[test]
fn a_full_bucket_is_spent_at_once_and_the_rest_waits() {
    let now = Instant::now();
    let mut limiter = Limiter::new(bytes(1_000_000, 5000), now);
    for _ in 0..5 {
        assert_eq!(limiter.wait(now), None);
        limiter.take(1000, 1);
    }
    // A millisecond's tokens are worth waiting for.
    assert_eq!(limiter.wait(now), Some(Duration::from_millis(1)));
    assert!(limiter.wait(now + Duration::from_micros(999)).is_none(), "asking earlier does no harm");
}

#[test]
fn a_piece_larger_than_the_bucket_goes_and_is_paid_for_afterwards() {
    let now = Instant::now();
    let mut limiter = Limiter::new(bytes(1000, 10), now);
    assert_eq!(limiter.wait(now), None);
    limiter.take(65_536, 1);
    // 65,526 of debt and a millisecond's token.
    assert_eq!(limiter.wait(now), Some(Duration::from_millis(65_527)));
    assert!(limiter.wait(now + Duration::from_secs(65)).is_some());
    assert_eq!(limiter.wait(now + Duration::from_millis(65_527)), None);
}

#[test]
fn a_bucket_does_not_save_more_than_its_burst() {
    let now = Instant::now();
    let mut limiter = Limiter::new(bytes(1000, 100), now);
    let later = now + Duration::from_secs(3600);
    assert_eq!(limiter.wait(later), None);
    limiter.take(100, 1);
    assert!(limiter.wait(later).is_some());
}

#[test]
fn the_scarcer_of_both_buckets_decides() {
    let now = Instant::now();
    let limits = Limits { bytes: Some(Rate::per_second(1 << 40)), operations: Some(Rate { per_second: 10, burst: 2 }) };
    let mut limiter = Limiter::new(limits, now);
    assert!(limiter.is_limited());
    limiter.take(0, 3);
    assert_eq!(limiter.wait(now), Some(Duration::from_millis(101)));
    limiter.take(1 << 50, 0);
    assert!(limiter.wait(now) > Some(Duration::from_secs(1000)));
}

#[test]
fn a_clock_that_goes_back_changes_nothing() {
    let now = Instant::now() + Duration::from_secs(100);
    let mut limiter = Limiter::new(bytes(1000, 1000), now);
    limiter.take(1000, 1);
    assert!(limiter.wait(now - Duration::from_secs(50)).is_some());
    assert!(limiter.wait(now).is_some());
    assert_eq!(limiter.wait(now + Duration::from_millis(1)), None);
}

#[test]
fn numbers_at_their_limits_do_not_overflow() {
    let now = Instant::now();
    let huge = Rate { per_second: u64::MAX, burst: u64::MAX };
    let mut limiter =
        Limiter::new(Limits { bytes: Some(huge), operations: Some(Rate { per_second: 0, burst: 0 }) }, now);
    for _ in 0..3 {
        limiter.take(u64::MAX, u64::MAX);
        assert!(limiter.wait(now + Duration::from_secs(1 << 40)).is_some());
    }
}

#[test]
fn what_passes_is_the_rate_within_one_piece_and_the_burst() {
    for seed in 0..200 {
        let mut random = Seed(seed);
        let rate = Rate { per_second: 1 + random.below(1 << (10 + seed % 30)), burst: 1 + random.below(1 << 20) };
        let operations = Rate { per_second: 1 + random.below(1 << 16), burst: 1 + random.below(1 << 10) };
        let end = Duration::from_nanos(random.below(2 * SECOND));
        let (start, most) = (Instant::now(), 1 + random.below(65_536));
        let mut limiter = Limiter::new(Limits { bytes: Some(rate), operations: Some(operations) }, start);
        let (octets, pieces) = pass(&mut limiter, start, end, || 1 + random.below(most));
        let come = |rate: Rate| (u128::from(rate.per_second) * end.as_nanos() / u128::from(SECOND)) as u64;
        assert!(octets <= rate.burst + come(rate) + most, "seed {seed}: {octets} octets");
        assert!(pieces <= operations.burst + come(operations) + 1, "seed {seed}: {pieces} pieces");
        // One of the two was used up, but for what a last wait did not bring any more.
        let slack = |rate: Rate| rate.per_second / 500 + 2;
        let octets_used = octets + slack(rate) + most >= come(rate);
        assert!(octets_used || pieces + slack(operations) >= come(operations), "seed {seed}: {octets}, {pieces}");
    }
}

#[test]
fn a_timer_goes_off_at_the_earliest_time_it_was_armed_for() {
    let mut timer = Timer::new().unwrap();
    let readable = |timer: &Timer, wait: i32| {
        let mut poll = libc::pollfd { fd: timer.fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one entry, which outlives the call.
        unsafe { libc::poll(&raw mut poll, 1, wait) == 1 }
    };
    let now = Instant::now();
    timer.arm(now + Duration::from_secs(3600), now);
    assert!(!readable(&timer, 0));
    timer.arm(now, now);
    timer.arm(now + Duration::from_secs(3600), now);
    assert!(readable(&timer, 10_000));
    timer.went_off();
    assert!(!readable(&timer, 0));
}
