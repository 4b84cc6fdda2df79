use std::fs::File;

use super::disk;
use crate::storage::overlay::{BLOCK, Overlay};
use crate::vmm::devices::block::Block;
use crate::vmm::devices::driver::{self, DriverQueue, read};
use crate::vmm::devices::mmio::{MmioTransport, Window};
use crate::vmm::memory::GuestMemory;

const HEADER: u64 = 0x4000;
const STATUS: u64 = 0x4100;
const DATA: u64 = 0x1_0000;

struct Guest {
    memory: GuestMemory,
    window: MmioTransport<Block>,
    queue: DriverQueue,
    base: File,
    overlay: File,
}

impl Guest {
    fn new(blocks: u64) -> Self {
        let memory = GuestMemory::new(4 << 20).unwrap();
        let (base, overlay) = disk(blocks);
        let disk = Overlay::open(overlay.try_clone().unwrap(), base.try_clone().unwrap()).unwrap();
        let window = MmioTransport::new(memory.clone(), Block::new(disk, "test-disk")).unwrap();
        let mut queues = driver::start(&window, driver::EVENT_IDX | driver::INDIRECT | 1 << 9, 1, 256, 0);
        let queue = queues.remove(0);
        Self { memory, window, queue, base, overlay }
    }

    fn header(&self, kind: u32, sector: u64) {
        self.memory.write_u32(HEADER, kind).unwrap();
        self.memory.write_u64(HEADER + 8, sector).unwrap();
        self.memory.write(STATUS, &[0xee]).unwrap();
    }

    /// One request with the data buffers as given; gives status and octets written.
    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> (u8, u32) {
        self.header(kind, sector);
        let mut buffers = vec![(HEADER, 16, false)];
        buffers.extend_from_slice(data);
        buffers.push((STATUS, 1, true));
        self.queue.want_interrupt(&self.memory);
        self.queue.add_indirect(&self.memory, 0x6000, &buffers);
        self.window.queue_event(0);
        assert_eq!(driver::interrupted(&self.window), 1);
        let (_, written) = self.queue.used(&self.memory).unwrap();
        let mut status = [0];
        self.memory.read(STATUS, &mut status).unwrap();
        (status[0], written)
    }

    fn octets(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut octets = vec![0; len];
        self.memory.read(addr, &mut octets).unwrap();
        octets
    }
}

#[test]
fn the_disk_tells_its_size_and_limits() {
    let guest = Guest::new(16);
    assert_eq!(read(&guest.window, 0x100), 128);
    assert_eq!(read(&guest.window, 0x108), 1 << 20);
    assert_eq!(read(&guest.window, 0x10c), 254);
    assert_eq!(read(&guest.window, 0x114), 512);
}

#[test]
fn what_is_written_and_flushed_is_read_back_by_another_owner() {
    let mut guest = Guest::new(600);
    // 1 MiB in 250 pieces of odd sizes, at an odd sector.
    let content = driver::Seed(3).octets(1 << 20);
    guest.memory.write(DATA, &content).unwrap();
    let mut pieces = Vec::new();
    let mut at = 0;
    for n in 0..250u32 {
        let len = if n == 249 { (1 << 20) - at } else { 4000 + n };
        pieces.push((DATA + u64::from(at), len, false));
        at += len;
    }
    assert_eq!(guest.request(1, 5, &pieces), (0, 1));
    assert_eq!(guest.request(4, 0, &[]), (0, 1));
    assert_eq!(guest.request(0, 5, &[(DATA + (2 << 20), 1 << 20, true)]), (0, (1 << 20) + 1));
    assert!(guest.octets(DATA + (2 << 20), 1 << 20) == content);
    let disk = Overlay::open(guest.overlay.try_clone().unwrap(), guest.base.try_clone().unwrap()).unwrap();
    let mut back = vec![0; 1 << 20];
    disk.read_at(5 * 512, &mut back).unwrap();
    assert!(back == content);
    // Around it, the base.
    let mut edge = [0; 2];
    disk.read_at(5 * 512 - 1, &mut edge[..1]).unwrap();
    disk.read_at(5 * 512 + (1 << 20), &mut edge[1..]).unwrap();
    assert_eq!(edge, [1, (((5 * 512 + (1 << 20)) / BLOCK) as u8).wrapping_add(1)]);
}

#[test]
fn data_may_share_buffers_with_header_and_status() {
    let mut guest = Guest::new(4);
    guest.header(1, 0);
    guest.memory.write(HEADER + 16, &[0x77; 512]).unwrap();
    // Header and data in one buffer, the header cut in two.
    let memory = guest.memory.clone();
    guest.queue.add(&memory, &[(HEADER, 3, false), (HEADER + 3, 13 + 512, false), (STATUS, 1, true)]);
    guest.window.queue_event(0);
    assert_eq!(guest.octets(STATUS, 1), [0]);
    guest.header(0, 0);
    // Data and status in one buffer.
    guest.queue.add(&memory, &[(HEADER, 16, false), (DATA, 1024 + 1, true)]);
    guest.window.queue_event(0);
    let octets = guest.octets(DATA, 1025);
    assert_eq!((octets[511], octets[512], octets[1024]), (0x77, 1, 0));
}

#[test]
fn get_id_gives_the_name() {
    let mut guest = Guest::new(4);
    guest.memory.write(DATA, &[0xff; 32]).unwrap();
    assert_eq!(guest.request(8, 0, &[(DATA, 20, true)]), (0, 21));
    assert_eq!(&guest.octets(DATA, 20), b"test-disk\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(guest.request(8, 0, &[(DATA, 32, true)]), (0, 33));
    assert_eq!(guest.request(8, 0, &[]), (0, 1));
}

#[test]
fn requests_that_cannot_be_served_end_in_an_error() {
    let mut guest = Guest::new(4);
    for (kind, sector, len) in
        [(0, 32, 512), (0, 31, 1024), (0, 0, 511), (0, u64::MAX, 512), (0, u64::MAX / 512, 512), (0, 1 << 55, 512)]
    {
        guest.memory.write(DATA, &[0xff; 1024]).unwrap();
        assert_eq!(guest.request(kind, sector, &[(DATA, len, true)]), (1, len + 1), "sector {sector}");
        assert_eq!(guest.octets(DATA, len as usize), vec![0; len as usize]);
        assert_eq!(guest.request(1, sector, &[(DATA, len, false)]), (1, 1));
    }
    assert_eq!(guest.request(0xffff_ffff, 0, &[(DATA, 512, false)]), (2, 1));
    assert_eq!(guest.request(11, 0, &[(DATA, 16, false)]), (2, 1));
    // No status buffer: nothing can be told, the chain just goes back. Then no header.
    let memory = guest.memory.clone();
    guest.queue.add(&memory, &[(HEADER, 16, false)]);
    guest.queue.add(&memory, &[(HEADER, 15, false), (STATUS, 1, true)]);
    guest.window.queue_event(0);
    assert_eq!(guest.queue.used(&memory).unwrap().1, 0);
    assert_eq!(guest.queue.used(&memory).unwrap().1, 1);
    assert_eq!(guest.octets(STATUS, 1), [1]);
    // It still works.
    assert_eq!(guest.request(0, 0, &[(DATA, 512, true)]), (0, 513));
    let counters = guest.window.with_device(|block| block.counters());
    assert!(counters.errors.load(std::sync::atomic::Ordering::Relaxed) >= 13);
}

#[test]
fn a_full_queue_is_served_in_turns_and_in_order() {
    let mut guest = Guest::new(64);
    let memory = guest.memory.clone();
    guest.header(0, 0);
    for n in 0..64 {
        guest.queue.add(&memory, &[(HEADER, 16, false), (DATA + n * 1024, 512, true), (STATUS, 1, true)]);
    }
    driver::run(&guest.window);
    for n in 0..64 {
        assert_eq!(guest.queue.used(&memory), Some((n * 3, 513)));
    }
}

#[test]
fn an_orderly_end_flushes() {
    let mut guest = Guest::new(4);
    guest.memory.write(DATA, &[9; 512]).unwrap();
    assert_eq!(guest.request(1, 8, &[(DATA, 512, false)]), (0, 1));
    guest.window.with_device(Block::flush).unwrap();
    let disk = Overlay::open(guest.overlay.try_clone().unwrap(), guest.base.try_clone().unwrap()).unwrap();
    let mut octet = [0];
    disk.read_at(4096, &mut octet).unwrap();
    assert_eq!(octet, [9]);
}
