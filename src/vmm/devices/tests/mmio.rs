use crate::vmm::devices::driver::{self, DriverQueue, read, write};
use crate::vmm::devices::mmio::{MmioTransport, Window};
use crate::vmm::devices::rng::Rng;
use crate::vmm::devices::vsock::Vsock;
use crate::vmm::memory::GuestMemory;

const STATUS: u64 = 0x70;
const FEATURES_OK: u32 = 11;

fn transport() -> (GuestMemory, MmioTransport<Rng>) {
    let memory = GuestMemory::new(1 << 20).unwrap();
    (memory.clone(), MmioTransport::new(memory, Rng::new()).unwrap())
}

/// To the status in which queues are set up.
fn to_features_ok(window: &dyn Window) {
    for status in [0, 1, 3] {
        write(window, STATUS, status);
    }
    write(window, 0x24, 1);
    write(window, 0x20, 1);
    write(window, STATUS, FEATURES_OK);
    assert_eq!(read(window, STATUS), FEATURES_OK);
}

#[test]
fn identity_registers_say_what_the_specification_says() {
    let (_, window) = transport();
    assert_eq!(read(&window, 0x00), u32::from_le_bytes(*b"virt"));
    assert_eq!(read(&window, 0x04), 2);
    assert_eq!(read(&window, 0x08), 4);
    assert_eq!((read(&window, 0x30), read(&window, 0x34)), (0, 256));
    write(&window, 0x30, 1);
    assert_eq!(read(&window, 0x34), 0);
    assert_eq!(read(&window, 0xb0), u32::MAX);
}

#[test]
fn status_goes_forward_one_step_at_a_time() {
    let (_, window) = transport();
    for bad in [2, 3, 4, 8, 11, 15, 0x40, 0xffff_ff7f] {
        write(&window, STATUS, bad);
        assert_eq!(read(&window, STATUS), 0, "{bad}");
    }
    write(&window, STATUS, 1);
    write(&window, STATUS, 3);
    write(&window, STATUS, 1);
    assert_eq!(read(&window, STATUS), 3);
    write(&window, STATUS, 0x80 | 3);
    assert_eq!(read(&window, STATUS), 0x83);
    write(&window, STATUS, FEATURES_OK);
    assert_eq!(read(&window, STATUS), 0x83);
    write(&window, STATUS, 0);
    assert_eq!(read(&window, STATUS), 0);
}

#[test]
fn features_that_were_not_offered_or_lack_version_1_are_refused() {
    let (_, window) = transport();
    let try_features = |parts: &[(u32, u32)]| {
        for status in [0, 1, 3] {
            write(&window, STATUS, status);
        }
        for &(select, value) in parts {
            write(&window, 0x24, select);
            write(&window, 0x20, value);
        }
        write(&window, STATUS, FEATURES_OK);
        read(&window, STATUS) == FEATURES_OK
    };
    assert!(try_features(&[(1, 1)]));
    assert!(try_features(&[(0, 3 << 28), (1, 1), (2, 0)]));
    assert!(!try_features(&[]));
    assert!(!try_features(&[(0, 3 << 28)]));
    assert!(!try_features(&[(0, 1), (1, 1)]));
    assert!(!try_features(&[(1, 3)]));
    assert!(!try_features(&[(1, 1), (2, 1)]));
    // Only between DRIVER and FEATURES_OK.
    to_features_ok(&window);
    write(&window, 0x20, 0xffff_ffff);
    write(&window, STATUS, 15);
    assert_eq!(read(&window, STATUS), 15);
}

#[test]
fn queues_are_set_up_after_the_features_only() {
    let (_, window) = transport();
    let queue = DriverQueue::new(0, 16);
    driver::set_up(&window, 0, &queue);
    assert_eq!(read(&window, 0x44), 0);
    to_features_ok(&window);
    driver::set_up(&window, 0, &queue);
    assert_eq!(read(&window, 0x44), 1);
    driver::set_up(&window, 1, &queue);
    assert_eq!(read(&window, 0x44), 0);
    driver::set_up(&window, u32::MAX, &queue);
    assert_eq!(read(&window, 0x44), 0);
}

#[test]
fn a_queue_in_a_bad_place_asks_for_a_reset_once_the_driver_listens() {
    let (_, window) = transport();
    to_features_ok(&window);
    driver::set_up(&window, 0, &DriverQueue::new(0, 24));
    assert_eq!(read(&window, 0x44), 0);
    assert_eq!(driver::interrupted(&window), 0);
    write(&window, STATUS, 0x4f);
    assert_eq!(read(&window, STATUS), 0x4f);
    assert_eq!(driver::interrupted(&window), 2);
    write(&window, STATUS, 0);
    assert_eq!(read(&window, STATUS), 0);
    driver::start(&window, 0, 1, 16, 0);
}

#[test]
fn a_broken_ring_stops_the_device_until_it_is_reset() {
    let (memory, window) = transport();
    let mut queues = driver::start(&window, 0, 1, 16, 0);
    driver::run(&window);
    queues[0].add(&memory, &[(1 << 20, 1, true)]);
    write(&window, 0x50, 0);
    driver::run(&window);
    assert_eq!(read(&window, STATUS), 0x4f);
    assert_eq!(driver::interrupted(&window), 2);
    queues[0].add(&memory, &[(0x8000, 1, true)]);
    write(&window, 0x50, 0);
    driver::run(&window);
    assert_eq!(queues[0].used(&memory), None);
    memory.zero(0, 0x4000).unwrap();
    let mut queues = driver::start(&window, 0, 1, 16, 0);
    queues[0].add(&memory, &[(0x8000, 1, true)]);
    write(&window, 0x50, 0);
    driver::run(&window);
    assert_eq!(queues[0].used(&memory), Some((0, 1)));
}

#[test]
fn chains_added_before_the_device_was_active_are_served() {
    let (memory, window) = transport();
    // As if the driver's notification had been lost.
    let mut early = DriverQueue::new(0, 16);
    early.add(&memory, &[(0x8000, 8, true)]);
    driver::start(&window, 0, 1, 16, 0);
    driver::run(&window);
    assert_eq!(early.used(&memory), Some((0, 8)));
    assert_eq!(driver::interrupted(&window), 1);
    assert_eq!(read(&window, 0x60), 0);
}

#[test]
fn odd_accesses_do_nothing() {
    let (_, window) = transport();
    let mut two = [0xff; 2];
    window.read(0, &mut two);
    assert_eq!(two, [0; 2]);
    let mut eight = [0xff; 8];
    window.read(1, &mut eight);
    assert_eq!(eight, [0; 8]);
    window.write(STATUS, &[1]);
    window.write(STATUS + 1, &[1, 0, 0, 0]);
    window.write(STATUS, &[1; 8]);
    assert_eq!(read(&window, STATUS), 0);
    window.write(u64::MAX, &[1, 0, 0, 0]);
    window.read(u64::MAX, &mut eight);
    window.read(0xffc, &mut eight);
    write(&window, 0x50, u32::MAX);
}

#[test]
fn the_configuration_space_reads_by_any_width() {
    let memory = GuestMemory::new(4096).unwrap();
    let window = MmioTransport::new(memory, Vsock::new(0x1234_5678).unwrap()).unwrap();
    let mut octet = [0];
    window.read(0x101, &mut octet);
    assert_eq!(octet, [0x56]);
    let mut eight = [0xff; 8];
    window.read(0x100, &mut eight);
    assert_eq!(u64::from_le_bytes(eight), 0x1234_5678);
    window.read(0x106, &mut eight);
    assert_eq!(eight, [0; 8]);
    write(&window, 0x100, 7);
    assert_eq!(read(&window, 0x100), 0x1234_5678);
}

#[test]
fn registers_driven_at_random_never_panic() {
    let mut random = driver::Seed(1);
    let (memory, window) = transport();
    for _ in 0..200_000 {
        let offset = random.below(0x120);
        let value = match random.below(4) {
            0 => random.number() as u32,
            1 => 1 << random.below(32),
            _ => random.below(16) as u32,
        };
        if random.below(8) == 0 {
            memory.write_u64(random.below((1 << 20) - 8), random.number()).unwrap();
        }
        write(&window, offset, value);
        read(&window, offset);
        window.serve(0);
    }
}
