use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::disk;
use crate::storage::medium::Medium;
use crate::storage::overlay::{BLOCK, Overlay};
use crate::storage::raw::RawDisk;
use crate::vmm::devices::block::Block;
use crate::vmm::devices::driver::{self, DriverQueue, read};
use crate::vmm::devices::mmio::{MmioTransport, Window};
use crate::vmm::devices::rate::{Limiter, Limits, Rate};
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
        let disk = Overlay::open(overlay.try_clone().unwrap(), Vec::new(), base.try_clone().unwrap()).unwrap();
        let window = MmioTransport::new(memory.clone(), Block::new(Medium::Overlay(disk), "test-disk")).unwrap();
        let mut queues = driver::start(&window, driver::EVENT_IDX | driver::INDIRECT | 1 << 9, 1, 256, 0);
        let queue = queues.remove(0);
        Self { memory, window, queue, base, overlay }
    }

    /// A guest with another disk.
    fn with(medium: Medium) -> (GuestMemory, MmioTransport<Block>, DriverQueue) {
        let memory = GuestMemory::new(4 << 20).unwrap();
        let window = MmioTransport::new(memory.clone(), Block::new(medium, "test-disk")).unwrap();
        let queue = driver::start(&window, driver::EVENT_IDX | driver::INDIRECT | 1 << 9, 1, 256, 0).remove(0);
        (memory, window, queue)
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
        self.window.serve(0);
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
    let disk = Overlay::open(guest.overlay.try_clone().unwrap(), Vec::new(), guest.base.try_clone().unwrap()).unwrap();
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
    guest.window.serve(0);
    assert_eq!(guest.octets(STATUS, 1), [0]);
    guest.header(0, 0);
    // Data and status in one buffer.
    guest.queue.add(&memory, &[(HEADER, 16, false), (DATA, 1024 + 1, true)]);
    guest.window.serve(0);
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
    assert_eq!(guest.request(12, 0, &[(DATA, 16, false)]), (2, 1));
    // No status buffer: nothing can be told, the chain just goes back. Then no header.
    let memory = guest.memory.clone();
    guest.queue.add(&memory, &[(HEADER, 16, false)]);
    guest.queue.add(&memory, &[(HEADER, 15, false), (STATUS, 1, true)]);
    guest.window.serve(0);
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
    let disk = Overlay::open(guest.overlay.try_clone().unwrap(), Vec::new(), guest.base.try_clone().unwrap()).unwrap();
    let mut octet = [0];
    disk.read_at(4096, &mut octet).unwrap();
    assert_eq!(octet, [9]);
}

/// One range of a discard or write-zeroes request: sector, sectors, flags.
fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn discards_and_zeroes_have_their_limits_in_the_configuration() {
    let guest = Guest::new(16);
    let fields: Vec<u32> = (0..5).map(|n| read(&guest.window, 0x124 + 4 * n)).collect();
    assert_eq!(fields, [1 << 21, 32, 8, 1 << 17, 32]);
    let mut may_unmap = [0];
    guest.window.read(0x138, &mut may_unmap);
    assert_eq!(may_unmap, [1]);
    assert_eq!(read(&guest.window, 0x10) & (1 << 13 | 1 << 14 | 1 << 5), 1 << 13 | 1 << 14);
}

#[test]
fn several_ranges_are_discarded_or_made_zeroes_at_once() {
    let mut guest = Guest::new(16);
    let ranges = [range(8, 16, 0), range(1, 7, 0), range(64, 8, 0)].concat();
    guest.memory.write(DATA, &ranges).unwrap();
    // The ranges cut at odd places.
    assert_eq!(guest.request(11, 0, &[(DATA, 5, false), (DATA + 5, 43, false)]), (0, 1));
    let mut zeroed = ranges;
    zeroed.extend(range(120, 1, 1));
    guest.memory.write(DATA, &zeroed).unwrap();
    assert_eq!(guest.request(0, 0, &[(DATA + 4096, 16 * 4096, true)]), (0, 16 * 4096 + 1));
    let octets = guest.octets(DATA + 4096, 16 * 4096);
    let block = |n: usize| octets[n * 4096];
    assert_eq!([0, 1, 2, 3, 7, 8, 9].map(block), [1, 0, 0, 4, 8, 0, 10]);
    assert_eq!(octets[4095], 1, "a part of a block stays");
    assert_eq!(guest.request(13, 0, &[(DATA, 64, false)]), (0, 1));
    assert_eq!(guest.request(0, 0, &[(DATA + 4096, 16 * 4096, true)]), (0, 16 * 4096 + 1));
    let octets = guest.octets(DATA + 4096, 16 * 4096);
    assert_eq!([511, 512, 4095, 120 * 512 - 1, 120 * 512, 121 * 512].map(|at: usize| octets[at]), [1, 0, 0, 15, 0, 16]);
    let counters = guest.window.with_device(|block| block.counters());
    let load = |counter: &std::sync::atomic::AtomicU64| counter.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!((load(&counters.discards), load(&counters.discarded_bytes)), (2, (31 + 32) * 512));
}

#[test]
fn ranges_that_cannot_be_are_refused_and_change_nothing() {
    let mut guest = Guest::new(16);
    for (kind, ranges, status) in [
        (11, range(0, 8, 1), 2),
        (11, range(0, 8, 2), 2),
        (13, range(0, 8, 2), 2),
        (13, [range(0, 8, 1), range(0, 8, 1 << 31)].concat(), 2),
        (11, range(0, (1 << 21) + 1, 0), 1),
        (13, range(0, (1 << 17) + 1, 0), 1),
        (11, range(121, 8, 0), 1),
        (13, range(128, 1, 0), 1),
        (11, range(u64::MAX, 8, 0), 1),
        (13, range(u64::MAX / 512, 8, 0), 1),
        (11, range(0, 8, 0).repeat(33), 1),
        (11, range(0, 8, 0)[..15].to_vec(), 1),
        (13, Vec::new(), 1),
    ] {
        guest.memory.write(DATA, &ranges).unwrap();
        assert_eq!(guest.request(kind, 0, &[(DATA, ranges.len() as u32, false)]), (status, 1), "{kind} {ranges:?}");
    }
    assert_eq!(guest.request(0, 0, &[(DATA, 4096, true)]), (0, 4097));
    assert_eq!(guest.octets(DATA, 4096), [1; 4096]);
    guest.memory.write(DATA, &range(0, 8, 0).repeat(32)).unwrap();
    assert_eq!(guest.request(11, 0, &[(DATA, 512, false)]), (0, 1));
    assert_eq!(guest.request(0, 0, &[(DATA, 4096, true)]), (0, 4097));
    assert_eq!(guest.octets(DATA, 4096), [0; 4096]);
}

#[test]
fn a_read_only_disk_says_so_and_refuses_changes() {
    let file = super::scratch(8192);
    let disk = RawDisk::open(file, true).unwrap();
    let (memory, window, queue) = Guest::with(Medium::Raw(disk));
    assert_eq!(read(&window, 0x10) & (1 << 5 | 1 << 13 | 1 << 14), 1 << 5);
    assert_eq!([0x124, 0x128, 0x130].map(|at| read(&window, at)), [0; 3]);
    let (base, overlay) = disk_files();
    let mut guest = Guest { memory, window, queue, base, overlay };
    guest.memory.write(DATA, &range(0, 8, 0)).unwrap();
    assert_eq!(guest.request(1, 0, &[(DATA, 512, false)]), (1, 1));
    assert_eq!(guest.request(11, 0, &[(DATA, 16, false)]), (1, 1));
    assert_eq!(guest.request(13, 0, &[(DATA, 16, false)]), (1, 1));
    assert_eq!(guest.request(4, 0, &[]), (0, 1));
    assert_eq!(guest.request(0, 0, &[(DATA, 8192, true)]), (0, 8193));
    assert_eq!(guest.octets(DATA, 8192), [0; 8192]);
}

fn disk_files() -> (File, File) {
    disk(1)
}

#[test]
fn requests_beyond_the_limit_wait_and_are_served_later() {
    let mut guest = Guest::new(4);
    let rate = Rate { per_second: 1000, burst: 3 };
    let limits = Limits { operations: Some(rate), bytes: None };
    let limiter = Arc::new(Mutex::new(Limiter::new(limits, Instant::now())));
    let disk = Overlay::open(guest.overlay.try_clone().unwrap(), Vec::new(), guest.base.try_clone().unwrap()).unwrap();
    let block = Block::new(Medium::Overlay(disk), "limited").limited(&limiter);
    guest.window = MmioTransport::new(guest.memory.clone(), block).unwrap();
    guest.queue = driver::start(&guest.window, driver::EVENT_IDX | driver::INDIRECT, 1, 256, 0).remove(0);
    guest.header(4, 0);
    let memory = guest.memory.clone();
    for _ in 0..12 {
        guest.queue.add(&memory, &[(HEADER, 16, false), (STATUS, 1, true)]);
    }
    let mut served = 0;
    let mut waits = 0;
    guest.window.serve(0);
    let guard = Instant::now();
    while served < 12 {
        served += std::iter::from_fn(|| guest.queue.used(&memory)).count();
        if let Some(at) = guest.window.with_device(|block| block.deadline()) {
            waits += 1;
            std::thread::sleep(at.saturating_duration_since(Instant::now()));
            guest.window.serve(0);
        }
        assert!(guard.elapsed().as_secs() < 30, "{served} were served");
    }
    assert!(waits >= 1, "nothing had to wait");
    let counters = guest.window.with_device(|block| block.counters());
    assert!(counters.throttled.load(std::sync::atomic::Ordering::Relaxed) >= 1);
    // A reset forgets the wait.
    driver::write(&guest.window, 0x70, 0);
    assert_eq!(guest.window.with_device(|block| block.deadline()), None);
}

/// Random requests through the ring against a vector: what a driver is told is what holds.
#[test]
fn a_disk_behind_its_queue_is_what_a_vector_is() {
    for seed in 0..24 {
        let mut random = driver::Seed(seed);
        let blocks = 1 + random.below(40);
        let sectors = blocks * 8;
        let mut guest = Guest::new(blocks);
        let mut model: Vec<u8> = (0..blocks).flat_map(|n| [(n as u8).wrapping_add(1); 4096]).collect();
        if seed % 2 == 1 {
            let file = super::scratch(0);
            file.write_all_at(&model, 0).unwrap();
            let raw = RawDisk::open(file, false).unwrap();
            (guest.memory, guest.window, guest.queue) = Guest::with(Medium::Raw(raw));
        }
        let granularity = if seed % 2 == 1 { 512 } else { 4096 };
        for step in 0..150 {
            let sector = random.below(sectors + 2);
            let count = random.below((sectors + 2 - sector).min(300) + 1);
            let (start, len) = ((sector * 512) as usize, (count * 512) as usize);
            let fits = sector + count <= sectors;
            // The data in up to three pieces.
            let cuts = [random.below(len as u64 + 1) as u32, random.below(len as u64 + 1) as u32];
            let (first, second) = (cuts[0].min(cuts[1]), cuts[0].max(cuts[1]));
            let pieces = |write| {
                let piece = |from: u32, to: u32| (DATA + u64::from(from), to - from, write);
                let all = [piece(0, first), piece(first, second), piece(second, len as u32)];
                all.into_iter().filter(|piece| piece.1 > 0).collect::<Vec<_>>()
            };
            let what = format!("seed {seed} step {step}: sector {sector}, {count} sectors");
            match random.below(7) {
                0 | 1 => {
                    let new = random.octets(len);
                    guest.memory.write(DATA, &new).unwrap();
                    let (status, _) = guest.request(1, sector, &pieces(false));
                    assert_eq!(status, u8::from(!fits), "{what}");
                    if fits {
                        model[start..start + len].copy_from_slice(&new);
                    }
                }
                kind @ (2 | 3) => {
                    let kind = if kind == 2 { 11 } else { 13 };
                    let unmap = if kind == 13 { random.below(2) as u32 } else { 0 };
                    guest.memory.write(DATA, &range(sector, count as u32, unmap)).unwrap();
                    let (status, _) = guest.request(kind, 0, &[(DATA, 16, false)]);
                    assert_eq!(status, u8::from(!fits), "{what}");
                    let unit = if kind == 11 { granularity } else { 512 };
                    let (from, to) = (start.next_multiple_of(unit), (start + len) / unit * unit);
                    if fits && from < to {
                        model[from..to].fill(0);
                    }
                }
                4 => assert_eq!(guest.request(4, 0, &[]).0, 0),
                _ => {
                    let (status, written) = guest.request(0, sector, &pieces(true));
                    assert_eq!((status, written), (u8::from(!fits), len as u32 + 1), "{what}");
                    if fits {
                        assert!(guest.octets(DATA, len) == model[start..start + len], "{what}");
                    }
                }
            }
        }
    }
}
