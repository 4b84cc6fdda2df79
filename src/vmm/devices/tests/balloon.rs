use crate::vmm::devices::balloon::Balloon;
use crate::vmm::devices::driver::{self, DriverQueue, interrupted, read, write};
use crate::vmm::devices::mmio::MmioTransport;
use crate::vmm::memory::GuestMemory;

const RAM: u64 = 1 << 20;
const ALL: u64 = 0x36;
const POISON: u64 = 1 << 4;
const CONFIG: u64 = 0x100;
/// Where the tests keep buffers, and the pages that they give up.
const BUFFER: u64 = 0x2_0000;
const PAGES: u64 = 0x8_0000;

type Window = MmioTransport<Balloon>;

fn start(features: u64) -> (GuestMemory, Window, Vec<DriverQueue>) {
    let memory = GuestMemory::new(RAM).unwrap();
    let window = MmioTransport::new(memory.clone(), Balloon::new(RAM)).unwrap();
    let queues = driver::start(&window, features, 4, 16, 0);
    driver::run(&window);
    memory.write(PAGES, &[7; 0x8_0000]).unwrap();
    (memory, window, queues)
}

/// Which of the pages from `PAGES` on the host has let go.
fn gone(memory: &GuestMemory) -> Vec<u64> {
    let mut octets = [0; 4096];
    let pages = (0..0x80).filter(|page| {
        memory.read(PAGES + page * 4096, &mut octets).unwrap();
        assert!([[0; 4096], [7; 4096]].contains(&octets));
        octets[0] == 0
    });
    pages.collect()
}

fn put_numbers(memory: &GuestMemory, numbers: &[u32]) -> (u64, u32, bool) {
    let octets: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
    memory.write(BUFFER, &octets).unwrap();
    (BUFFER, octets.len() as u32, false)
}

fn put_statistics(memory: &GuestMemory, at: u64, statistics: &[(u16, u64)]) -> (u64, u32, bool) {
    let octets: Vec<u8> =
        statistics.iter().flat_map(|(tag, n)| [&tag.to_le_bytes()[..], &n.to_le_bytes()].concat()).collect();
    memory.write(at, &octets).unwrap();
    (at, octets.len() as u32, false)
}

#[test]
fn inflated_pages_are_let_go_whatever_their_order() {
    let (memory, window, mut queues) = start(ALL);
    let first = (PAGES / 4096) as u32;
    let buffer = put_numbers(&memory, &[first + 9, first + 3, first + 4, first + 3, first + 5]);
    queues[0].add(&memory, &[buffer]);
    write(&window, 0x50, 0);
    driver::run(&window);
    assert_eq!(queues[0].used(&memory), Some((0, 0)));
    assert_eq!(gone(&memory), [3, 4, 5, 9]);
    // Taking them out again needs nothing: they are ordinary memory.
    queues[1].add(&memory, &[buffer]);
    memory.write(PAGES + 3 * 4096, &[7; 3 * 4096]).unwrap();
    write(&window, 0x50, 1);
    driver::run(&window);
    assert!(queues[1].used(&memory).is_some());
    assert_eq!(gone(&memory), [9]);
}

#[test]
fn page_numbers_that_make_no_sense_cost_only_themselves() {
    let (memory, window, mut queues) = start(ALL);
    let first = (PAGES / 4096) as u32;
    // The last page of RAM with the next one; numbers far outside; half a number at the end.
    let last = (RAM / 4096) as u32 - 1;
    let mut buffer = put_numbers(&memory, &[last, last + 1, u32::MAX, u32::MAX - 1, 0x8000_0000, first]);
    buffer.1 -= 2;
    queues[0].add(&memory, &[buffer]);
    queues[0].add(&memory, &[]);
    write(&window, 0x50, 0);
    driver::run(&window);
    assert_eq!(read(&window, 0x70), 15, "the device goes on");
    assert_eq!(gone(&memory), [0x7f], "the number that is cut short does not count");
    // More numbers than are looked at: the first 1,024 count.
    let many: Vec<u32> = (0..1200).map(|n| if n < 1100 { first } else { first + 1 }).collect();
    let buffer = put_numbers(&memory, &many);
    queues[0].add(&memory, &[buffer]);
    write(&window, 0x50, 0);
    driver::run(&window);
    assert_eq!(gone(&memory), [0, 0x7f]);
    assert_eq!(window.with_device(|b| b.counters().refused.load(std::sync::atomic::Ordering::Relaxed)), 4 + 176);
}

#[test]
fn reported_ranges_are_let_go_by_whole_pages() {
    let (memory, window, mut queues) = start(ALL & !POISON);
    queues[3].add(&memory, &[(PAGES, 0x3000, true), (PAGES + 0x6800, 0x2800, true), (PAGES + 0x2000, 0x2000, true)]);
    write(&window, 0x50, 3);
    driver::run(&window);
    assert!(queues[3].used(&memory).is_some());
    assert_eq!(gone(&memory), [0, 1, 2, 3, 7, 8]);
    // What is for the device to read is no report.
    queues[3].add(&memory, &[(PAGES + 0x1_0000, 0x1000, false)]);
    write(&window, 0x50, 3);
    driver::run(&window);
    assert_eq!(gone(&memory), [0, 1, 2, 3, 7, 8]);
}

#[test]
fn a_kernel_that_fills_free_pages_with_something_keeps_them() {
    for (poison, expected) in [(0xaaaa_aaaau32, &[][..]), (0, &[0, 1][..])] {
        let (memory, window, mut queues) = start(ALL);
        write(&window, CONFIG + 12, poison);
        assert_eq!(read(&window, CONFIG + 12), poison);
        queues[3].add(&memory, &[(PAGES, 0x2000, true)]);
        write(&window, 0x50, 3);
        driver::run(&window);
        assert!(queues[3].used(&memory).is_some());
        assert_eq!(gone(&memory), expected);
    }
}

#[test]
fn without_statistics_the_third_queue_reports() {
    let (memory, window, mut queues) = start(1 << 5);
    queues[2].add(&memory, &[(PAGES, 0x1000, true)]);
    write(&window, 0x50, 2);
    driver::run(&window);
    assert_eq!(gone(&memory), [0]);
    assert!(!window.with_queues(Balloon::request_statistics).unwrap());
}

#[test]
fn statistics_come_when_they_are_asked_for() {
    let (memory, window, mut queues) = start(ALL);
    queues[2].want_interrupt(&memory);
    let first = put_statistics(&memory, BUFFER, &[(4, 1000), (5, 2000), (2, u64::MAX), (999, 5)]);
    queues[2].add(&memory, &[first]);
    write(&window, 0x50, 2);
    driver::run(&window);
    let (taken, then) = window.with_device(|balloon| balloon.statistics()).unwrap();
    assert_eq!((taken.free, taken.total, taken.major_faults), (Some(1000), Some(2000), Some(u64::MAX)));
    assert_eq!((taken.available, taken.oom_kills), (None, None));
    assert_eq!(queues[2].used(&memory), None, "the buffer is kept until the next are wanted");
    assert!(window.with_queues(Balloon::request_statistics).unwrap());
    assert_eq!(queues[2].used(&memory), Some((0, 0)));
    assert_eq!(interrupted(&window), 1);
    // A size beyond the guest's memory is a lie; half an entry is none.
    let mut second = put_statistics(&memory, BUFFER, &[(4, u64::MAX), (6, RAM), (7, 9)]);
    second.1 -= 1;
    queues[2].add(&memory, &[second]);
    write(&window, 0x50, 2);
    driver::run(&window);
    let (taken, now) = window.with_device(|balloon| balloon.statistics()).unwrap();
    assert_eq!((taken.free, taken.available, taken.caches, taken.total), (Some(RAM), Some(RAM), None, None));
    assert!(now >= then);
}

#[test]
fn a_flood_of_statistics_is_taken_one_by_one_as_they_are_asked_for() {
    let (memory, window, mut queues) = start(ALL);
    for n in 0..12 {
        let buffer = put_statistics(&memory, BUFFER + n * 16, &[(4, n)]);
        queues[2].add(&memory, &[buffer]);
        write(&window, 0x50, 2);
    }
    driver::run(&window);
    for n in 0..12 {
        let (taken, _) = window.with_device(|balloon| balloon.statistics()).unwrap();
        assert_eq!(taken.free, Some(n));
        assert_eq!(queues[2].used(&memory), None);
        assert!(window.with_queues(Balloon::request_statistics).unwrap());
        assert!(queues[2].used(&memory).is_some());
    }
}

#[test]
fn a_new_target_is_told_and_the_drivers_answer_is_cut_to_its_memory() {
    let (_, window, _) = start(ALL);
    let generation = read(&window, 0xfc);
    assert_eq!(interrupted(&window), 0);
    window.change(|balloon| balloon.set_target(RAM / 2 + 5));
    assert_eq!(interrupted(&window), 2);
    assert_ne!(read(&window, 0xfc), generation);
    assert_eq!(read(&window, CONFIG), 128);
    let generation = read(&window, 0xfc);
    window.change(|balloon| balloon.set_target(RAM / 2));
    assert_eq!((interrupted(&window), read(&window, 0xfc)), (0, generation), "nothing changed");
    write(&window, CONFIG + 4, 100);
    assert_eq!((read(&window, CONFIG + 4), read(&window, 0xfc)), (100, generation));
    write(&window, CONFIG + 4, u32::MAX);
    assert_eq!(window.with_device(|balloon| balloon.actual()), RAM);
    window.change(|balloon| balloon.set_target(u64::MAX));
    assert_eq!(window.with_device(|balloon| balloon.target()), RAM);
}

#[test]
fn what_is_not_the_drivers_to_write_stays() {
    let (_, window, _) = start(ALL);
    use crate::vmm::devices::mmio::Window as _;
    write(&window, CONFIG, 1);
    write(&window, CONFIG + 8, 1);
    write(&window, CONFIG + 16, 1);
    window.write(CONFIG + 4, &[1; 8]);
    window.write(CONFIG + 5, &[1; 4]);
    window.write(CONFIG + 14, &[1; 4]);
    window.write(u64::MAX, &[1; 4]);
    let fields: Vec<u32> = (0..5).map(|n| read(&window, CONFIG + 4 * n)).collect();
    assert_eq!(fields, [0; 5]);
}

#[test]
fn a_reset_keeps_the_nodes_wish_and_forgets_the_drivers_words() {
    let (memory, window, mut queues) = start(ALL);
    let buffer = put_statistics(&memory, BUFFER, &[(4, 1)]);
    queues[2].add(&memory, &[buffer]);
    write(&window, 0x50, 2);
    driver::run(&window);
    write(&window, CONFIG + 4, 9);
    write(&window, CONFIG + 12, 9);
    window.change(|balloon| balloon.set_target(8 * 4096));
    write(&window, 0x70, 0);
    let fields: Vec<u32> = (0..4).map(|n| read(&window, CONFIG + 4 * n)).collect();
    assert_eq!(fields, [8, 0, 0, 0]);
    assert!(window.with_device(|balloon| balloon.statistics()).is_none());
    assert!(window.with_queues(Balloon::request_statistics).is_none());
}
