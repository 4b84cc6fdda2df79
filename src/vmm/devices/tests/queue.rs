use crate::vmm::devices::driver::DriverQueue;
use crate::vmm::devices::queue::{Chain, Layout, Queue, QueueError};
use crate::vmm::memory::{GuestMemory, MemoryError};

const DATA: u64 = 0x8000;
const TABLE: u64 = 0x6000;

fn make(size: u16, event_index: bool, indirect: bool) -> (GuestMemory, DriverQueue, Queue) {
    let memory = GuestMemory::new(1 << 20).unwrap();
    let driver = DriverQueue::new(0, size);
    let layout = layout(&driver);
    let queue = Queue::new(&memory, layout, 256, event_index, indirect).unwrap();
    (memory, driver, queue)
}

fn layout(driver: &DriverQueue) -> Layout {
    Layout {
        size: u32::from(driver.size),
        descriptors: driver.descriptors,
        driver: driver.driver,
        device: driver.device,
    }
}

/// What popping one chain of these raw descriptors gives.
fn pop_raw(indirect: bool, descriptors: &[(u64, u32, u16, u16)]) -> Result<(usize, usize), QueueError> {
    let (memory, mut driver, mut queue) = make(8, false, indirect);
    for (index, &fields) in descriptors.iter().enumerate() {
        driver.put_descriptor(&memory, driver.descriptors, index as u16, fields);
    }
    driver.publish(&memory, 0);
    let mut chain = Chain::default();
    let popped = queue.pop(&memory, &mut chain)?;
    assert!(popped);
    Ok((chain.readable.len(), chain.writable.len()))
}

#[test]
fn chains_come_in_order_and_go_back() {
    let (memory, mut driver, mut queue) = make(4, false, false);
    let mut chain = Chain::default();
    assert!(!queue.pop(&memory, &mut chain).unwrap());
    for round in 0..1000u32 {
        memory.write_u32(DATA, round).unwrap();
        let head = driver.add(&memory, &[(DATA, 3, false), (DATA + 3, 1, false), (DATA + 16, 8, true)]);
        assert!(queue.pop(&memory, &mut chain).unwrap());
        assert_eq!((chain.head, chain.readable.len(), chain.writable.len()), (head, 4, 8));
        let mut octets = [0; 4];
        chain.readable.copy_to(0, &mut octets);
        assert_eq!(u32::from_le_bytes(octets), round);
        assert!(!queue.pop(&memory, &mut chain).unwrap());
        queue.add_used(&memory, head, round).unwrap();
        assert_eq!(driver.used(&memory), Some((head, round)));
        assert_eq!(driver.used(&memory), None);
    }
}

#[test]
fn popped_chains_can_be_put_back() {
    let (memory, mut driver, mut queue) = make(8, true, false);
    let heads: Vec<u16> = (0..4).map(|n| driver.add(&memory, &[(DATA + n, 1, true)])).collect();
    let mut chain = Chain::default();
    for _ in 0..3 {
        assert!(queue.pop(&memory, &mut chain).unwrap());
    }
    queue.undo_pop(2);
    for &head in &heads[1..] {
        assert!(queue.pop(&memory, &mut chain).unwrap());
        assert_eq!(chain.head, head);
    }
    assert!(!queue.pop(&memory, &mut chain).unwrap());
}

#[test]
fn an_indirect_table_is_one_chain() {
    let (memory, mut driver, mut queue) = make(2, false, true);
    let buffers: Vec<_> = (0..200).map(|n| (DATA + n, 1, n >= 100)).collect();
    driver.add_indirect(&memory, TABLE, &buffers);
    let mut chain = Chain::default();
    assert!(queue.pop(&memory, &mut chain).unwrap());
    assert_eq!((chain.readable.len(), chain.writable.len()), (100, 100));
}

#[test]
fn an_indirect_table_may_end_a_chain() {
    let (memory, mut driver, mut queue) = make(8, false, true);
    driver.put_descriptor(&memory, driver.descriptors, 0, (DATA, 5, 1, 1));
    driver.put_descriptor(&memory, driver.descriptors, 1, (TABLE, 16, 4, 0));
    driver.put_descriptor(&memory, TABLE, 0, (DATA, 7, 2, 0));
    driver.publish(&memory, 0);
    let mut chain = Chain::default();
    assert!(queue.pop(&memory, &mut chain).unwrap());
    assert_eq!((chain.readable.len(), chain.writable.len()), (5, 7));
}

#[test]
fn chains_that_break_the_rules_are_refused() {
    use QueueError::{Index, Indirect, IndirectLength, Memory, Order, TooBig, TooLong};
    assert_eq!(pop_raw(false, &[(DATA, 4, 1, 1), (DATA, 0, 1, 2), (DATA, 6, 2, 9)]).unwrap(), (4, 6));
    // Loops, to itself and around.
    assert!(matches!(pop_raw(false, &[(DATA, 1, 1, 0)]), Err(TooLong)));
    assert!(matches!(pop_raw(false, &[(DATA, 0, 1, 1), (DATA, 0, 1, 0)]), Err(TooLong)));
    assert!(matches!(pop_raw(false, &[(DATA, 1, 1, 8)]), Err(Index { index: 8, size: 8 })));
    assert!(matches!(pop_raw(false, &[(DATA, 1, 3, 1), (DATA, 1, 0, 0)]), Err(Order)));
    for (addr, len) in [(1 << 20, 1), ((1 << 20) - 1, 2), (u64::MAX, 1), (u64::MAX - 1, 2), (0, u32::MAX)] {
        assert!(matches!(pop_raw(false, &[(addr, len, 0, 0)]), Err(Memory(MemoryError::OutOfRange { .. }))));
    }
    let half = (DATA, 1 << 19, 3, 0);
    assert!(matches!(pop_raw(false, &[half]), Err(TooLong)));
    // Indirect tables: not taken up, empty, odd, beside NEXT, in another, outside of RAM.
    assert!(matches!(pop_raw(false, &[(TABLE, 16, 4, 0)]), Err(Indirect)));
    assert!(matches!(pop_raw(true, &[(TABLE, 0, 4, 0)]), Err(IndirectLength { len: 0 })));
    assert!(matches!(pop_raw(true, &[(TABLE, 24, 4, 0)]), Err(IndirectLength { len: 24 })));
    assert!(matches!(pop_raw(true, &[(TABLE, 16, 5, 1)]), Err(Indirect)));
    assert!(matches!(pop_raw(true, &[(16, 32, 4, 0), (TABLE, 16, 4, 0)]), Err(Indirect)));
    assert!(matches!(pop_raw(true, &[(1 << 20, 16, 4, 0)]), Err(Memory(_))));
    assert!(matches!(pop_raw(true, &[(u64::MAX - 8, 160, 4, 0)]), Err(Memory(_))));
    // An indirect table that names an entry beyond its end.
    assert!(matches!(pop_raw(true, &[(16, 16, 4, 0), (DATA, 1, 1, 1)]), Err(Index { index: 1, size: 1 })));
    let _ = TooBig;
}

#[test]
fn an_indirect_table_longer_than_a_chain_may_be_is_refused() {
    let (memory, mut driver, mut queue) = make(8, false, true);
    let buffers: Vec<_> = (0..257).map(|n| (DATA + n, 1, false)).collect();
    driver.add_indirect(&memory, TABLE, &buffers);
    assert!(matches!(queue.pop(&memory, &mut Chain::default()), Err(QueueError::TooLong)));
}

#[test]
fn a_chain_of_more_than_four_gib_is_refused() {
    let memory = GuestMemory::new(3 << 30).unwrap();
    let mut driver = DriverQueue::new(0, 8);
    let mut queue = Queue::new(&memory, layout(&driver), 256, false, false).unwrap();
    driver.add(&memory, &[(0, 3 << 30, false), (0, 1 << 30, false)]);
    assert!(matches!(queue.pop(&memory, &mut Chain::default()), Err(QueueError::TooBig)));
}

#[test]
fn an_available_index_that_jumps_is_refused() {
    let (memory, driver, mut queue) = make(8, false, false);
    memory.write_u16(driver.driver + 2, 9).unwrap();
    assert!(matches!(queue.pop(&memory, &mut Chain::default()), Err(QueueError::AvailableJump { by: 9, size: 8 })));
    memory.write_u16(driver.driver + 2, 0xffff).unwrap();
    assert!(queue.enable_notifications(&memory).is_err());
}

#[test]
fn a_head_outside_of_the_table_is_refused() {
    let (memory, mut driver, mut queue) = make(8, false, false);
    driver.publish(&memory, 8);
    assert!(matches!(queue.pop(&memory, &mut Chain::default()), Err(QueueError::Index { index: 8, size: 8 })));
}

#[test]
fn rings_in_bad_places_are_refused() {
    let memory = GuestMemory::new(1 << 20).unwrap();
    let good = Layout { size: 256, descriptors: 0, driver: 0x1000, device: 0x1400 };
    let end = 1 << 20;
    assert!(good.check(&memory, 256).is_ok());
    assert!(Layout { descriptors: end - 4096, ..good }.check(&memory, 256).is_ok());
    for bad in [
        Layout { size: 0, ..good },
        Layout { size: 3, ..good },
        Layout { size: 512, ..good },
        Layout { size: 0x1_0000, ..good },
        Layout { descriptors: 8, ..good },
        Layout { descriptors: end - 4080, ..good },
        Layout { driver: 1, ..good },
        Layout { driver: end - 516, ..good },
        Layout { device: 2, ..good },
        Layout { device: end - 2052, ..good },
        Layout { descriptors: u64::MAX - 15, ..good },
        Layout { driver: u64::MAX - 1, ..good },
    ] {
        assert!(bad.check(&memory, 256).is_err(), "{bad:?}");
        assert!(Queue::new(&memory, bad, 256, true, true).is_err());
    }
}

#[test]
fn interrupts_come_when_the_driver_passed_its_event() {
    let (memory, mut driver, mut queue) = make(4, true, false);
    let mut chain = Chain::default();
    let mut round = |wants: bool| {
        if wants {
            driver.want_interrupt(&memory);
        }
        driver.add(&memory, &[(DATA, 1, true)]);
        queue.pop(&memory, &mut chain).unwrap();
        queue.add_used(&memory, chain.head, 0).unwrap();
        driver.used(&memory);
        queue.needs_interrupt(&memory).unwrap()
    };
    // Over the wrap of the indices.
    for _ in 0..70_000 {
        assert!(round(true));
        assert!(!round(false));
    }
    assert!(!queue.needs_interrupt(&memory).unwrap());
}

#[test]
fn interrupts_follow_the_flag_without_event_index() {
    let (memory, driver, mut queue) = make(4, false, false);
    queue.add_used(&memory, 0, 0).unwrap();
    assert!(queue.needs_interrupt(&memory).unwrap());
    assert!(!queue.needs_interrupt(&memory).unwrap());
    memory.write_u16(driver.driver, 1).unwrap();
    queue.add_used(&memory, 0, 0).unwrap();
    assert!(!queue.needs_interrupt(&memory).unwrap());
}

#[test]
fn notifications_are_wished_for_at_the_next_entry() {
    let (memory, mut driver, mut queue) = make(4, true, false);
    let mut chain = Chain::default();
    driver.add(&memory, &[(DATA, 1, true)]);
    assert!(queue.enable_notifications(&memory).unwrap());
    assert!(queue.pop(&memory, &mut chain).unwrap());
    assert_eq!(driver.avail_event(&memory), 0);
    assert!(!queue.enable_notifications(&memory).unwrap());
    assert_eq!(driver.avail_event(&memory), 1);
}

#[test]
fn a_queue_that_was_not_set_up_has_nothing() {
    let memory = GuestMemory::new(4096).unwrap();
    let mut queue = Queue::default();
    assert!(!queue.pop(&memory, &mut Chain::default()).unwrap());
    queue.add_used(&memory, 0, 0).unwrap();
    assert!(!queue.needs_interrupt(&memory).unwrap());
    assert!(!queue.enable_notifications(&memory).unwrap());
}
