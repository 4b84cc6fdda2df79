//! What a guest hears after it was restored.

use super::*;

const EVENT: u64 = 0x7_0000;

/// Gives the device a buffer of `len` octets for an event, with other content in it.
fn give_event_buffer(guest: &mut Guest, len: u32) {
    guest.memory.write(EVENT, &[0xff; 8]).unwrap();
    guest.queues[EVENTS].add(&guest.memory, &[(EVENT, len, true)]);
    guest.transport.kick(EVENTS);
    guest.run();
}

fn restore(guest: &Guest) {
    guest.transport.with_queues(Vsock::transport_reset);
    guest.run();
}

#[test]
fn a_restored_guest_hears_at_once_that_its_connections_are_gone() {
    let mut guest = Guest::new(16);
    give_event_buffer(&mut guest, 4);
    assert_eq!(guest.queues[EVENTS].used(&guest.memory), None, "nothing has happened yet");
    let mut peer = guest.connected((5000, 33));
    driver::interrupted(&guest.transport);
    guest.queues[EVENTS].want_interrupt(&guest.memory);
    restore(&guest);
    assert_eq!(guest.queues[EVENTS].used(&guest.memory).map(|(_, len)| len), Some(4));
    let mut octets = [0; 8];
    guest.memory.read(EVENT, &mut octets).unwrap();
    assert_eq!(octets, [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], "id 0, and no more than the structure");
    assert_eq!(driver::interrupted(&guest.transport), 1);
    assert_eq!((drain(&mut peer), guest.connections()), ((Vec::new(), true), 0));
    // Only once.
    give_event_buffer(&mut guest, 4);
    assert_eq!((guest.queues[EVENTS].used(&guest.memory), guest.ops()), (None, vec![]));
    // The guest calls anew, and whoever waits for it has it.
    let mut peer = guest.accept(HELD_PORT);
    guest.send(Op::Request, (HELD_PORT, 34), &[]);
    assert_eq!((guest.ops(), line(&mut peer).as_str()), (vec![Op::Response], "a1 ok\n"));
}

#[test]
fn nothing_else_reaches_a_guest_before_it_has_taken_note() {
    let mut guest = Guest::new(16);
    give_event_buffer(&mut guest, 4);
    give_event_buffer(&mut guest, 4);
    let key = (5000, 33);
    let _old = guest.connected(key);
    restore(&guest);
    // It was in the middle of a sentence.
    for op in [Op::Data, Op::CreditUpdate, Op::Shutdown] {
        guest.send(op, key, &[]);
    }
    let mut new = guest.connect(22, &[]);
    guest.transport.kick(EVENTS);
    guest.run();
    assert_eq!(guest.ops(), []);
    // Linux gives the buffer back when it has read it.
    give_event_buffer(&mut guest, 4);
    let (request, _) = guest.packet().unwrap();
    assert_eq!(request.op, Some(Op::Request));
    guest.send(Op::Response, (request.src_port, 22), &[]);
    assert_eq!(line(&mut new), "c1 ok\n");
    // From then on there are resets again for what does not exist.
    guest.send(Op::Data, key, b"x");
    assert_eq!(guest.ops(), [Op::Reset]);
}

#[test]
fn a_guest_that_connects_anew_has_taken_note() {
    let mut guest = Guest::new(16);
    give_event_buffer(&mut guest, 4);
    restore(&guest);
    let mut peer = guest.accept(HELD_PORT);
    guest.send(Op::Request, (HELD_PORT, 34), &[]);
    assert_eq!((guest.ops(), line(&mut peer).as_str()), (vec![Op::Response], "a1 ok\n"));
}

#[test]
fn the_news_of_a_restore_wait_for_a_buffer() {
    let mut guest = Guest::new(16);
    let mut waiting = guest.accept(5000);
    restore(&guest);
    restore(&guest);
    driver::interrupted(&guest.transport);
    guest.queues[EVENTS].want_interrupt(&guest.memory);
    give_event_buffer(&mut guest, 4);
    assert!(guest.queues[EVENTS].used(&guest.memory).is_some());
    assert_eq!(driver::interrupted(&guest.transport), 1);
    // The driver is to say when it gives the next one.
    assert_eq!(guest.queues[EVENTS].avail_event(&guest.memory), 1);
    // A link that waited for the guest before still does.
    guest.send(Op::Request, (5000, 1), &[]);
    assert_eq!((guest.ops(), line(&mut waiting).as_str()), (vec![Op::Response], "a1 ok\n"));
    give_event_buffer(&mut guest, 4);
    assert_eq!(guest.queues[EVENTS].used(&guest.memory), None, "two restores without a buffer are one for the guest");
}

#[test]
fn a_new_driver_hears_nothing_of_a_restore_before_it() {
    let mut guest = Guest::new(0);
    restore(&guest);
    guest.queues = driver::start(&guest.transport, driver::EVENT_IDX, 3, 256, 0);
    give_event_buffer(&mut guest, 4);
    assert_eq!(guest.queues[EVENTS].used(&guest.memory), None);
    guest.give(1);
    guest.send(Op::Data, (5000, 1), b"x");
    assert_eq!(guest.ops(), [Op::Reset]);
}

#[test]
fn an_event_buffer_too_small_stops_the_device() {
    let mut guest = Guest::new(0);
    restore(&guest);
    give_event_buffer(&mut guest, 3);
    assert_eq!(driver::read(&guest.transport, 0x70), 0x4f);
}
