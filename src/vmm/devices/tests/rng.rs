use crate::vmm::devices::driver;
use crate::vmm::devices::mmio::{MmioTransport, Window};
use crate::vmm::devices::rng::Rng;
use crate::vmm::memory::GuestMemory;

#[test]
fn requests_are_filled_up_to_their_bound() {
    let memory = GuestMemory::new(1 << 20).unwrap();
    let window = MmioTransport::new(memory.clone(), Rng::new()).unwrap();
    let mut queues = driver::start(&window, driver::EVENT_IDX, 1, 64, 0);
    let queue = &mut queues[0];
    // Two buffers, one too large, one readable only.
    queue.add(&memory, &[(0x8000, 100, true), (0x8100, 28, true)]);
    queue.add(&memory, &[(0x1_0000, 0x4_0000, true)]);
    queue.add(&memory, &[(0x8000, 16, false)]);
    window.serve(0);
    assert_eq!(queue.used(&memory).unwrap().1, 128);
    assert_eq!(queue.used(&memory).unwrap().1, 0x1_0000);
    assert_eq!(queue.used(&memory).unwrap().1, 0);
    let mut octets = [0; 128];
    memory.read(0x8000, &mut octets).unwrap();
    assert!(octets[..100].iter().any(|&o| o != 0));
    assert_eq!(&octets[100..], &[0; 28]);
    memory.read(0x2_0000, &mut octets).unwrap();
    assert_eq!(octets, [0; 128], "beyond the bound");
}

#[test]
fn a_flood_of_requests_is_served_in_turns() {
    let memory = GuestMemory::new(1 << 20).unwrap();
    let window = MmioTransport::new(memory.clone(), Rng::new()).unwrap();
    let mut queues = driver::start(&window, 0, 1, 64, 0);
    for _ in 0..64 {
        queues[0].add(&memory, &[(0x8000, 16, true)]);
    }
    window.serve(0);
    let served = std::iter::from_fn(|| queues[0].used(&memory)).count();
    assert!(served < 64);
    driver::run(&window);
    assert_eq!(served + std::iter::from_fn(|| queues[0].used(&memory)).count(), 64);
}

#[test]
fn a_reset_is_no_way_around_the_limit() {
    let memory = GuestMemory::new(1 << 20).unwrap();
    let window = MmioTransport::new(memory.clone(), Rng::new()).unwrap();
    let mut filled = 0;
    for _ in 0..64 {
        let mut queues = driver::start(&window, 0, 1, 16, 0);
        queues[0].add(&memory, &[(0x8_0000, 0x1_0000, true)]);
        window.serve(0);
        filled += queues[0].used(&memory).map_or(0, |(_, len)| u64::from(len));
        if window.with_device(|rng| rng.wake()).is_some() {
            break;
        }
        memory.zero(0, 0x2000).unwrap();
    }
    assert!(window.with_device(|rng| rng.wake()).is_some(), "{filled} octets and no end");
}
