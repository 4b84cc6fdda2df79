use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use mio::{Events, Poll};

use super::{disk, scratch};
use crate::vmm::devices::rate::Limits;
use crate::vmm::devices::{DeviceConfig, DeviceError, DeviceSet, MMIO_BASE, SERIAL_PORT, WINDOW, mmio};
use crate::vmm::memory::GuestMemory;
use crate::vmm::snapshot::saved::{Part, SavedError};

fn set() -> (GuestMemory, DeviceSet) {
    let memory = GuestMemory::new(1 << 20).unwrap();
    let (base, overlay) = disk(4);
    let config = DeviceConfig {
        base,
        overlay,
        layers: Vec::new(),
        disks: Vec::new(),
        disk_limits: Limits::default(),
        net: None,
        serial: scratch(0),
        cid: 3,
    };
    let set = DeviceSet::new(&memory, config).unwrap();
    (memory, set)
}

#[test]
fn windows_follow_each_other_in_the_order_of_the_tables() {
    let (_, set) = set();
    let windows = set.windows();
    let places: Vec<_> = windows.iter().map(|w| (w.base, w.gsi, w.queue_events.len())).collect();
    assert_eq!(places, [(0xd000_0000, 5, 1), (0xd000_1000, 6, 3), (0xd000_2000, 7, 1), (0xd000_3000, 8, 4)]);
    for (window, kind) in windows.iter().zip([2u32, 19, 4, 5]) {
        let mut octets = [0; 4];
        assert!(set.mmio_read(window.base + 8, &mut octets));
        assert_eq!(u32::from_le_bytes(octets), kind);
    }
}

#[test]
fn addresses_without_a_device_are_told() {
    let (_, set) = set();
    let mut octets = [0; 4];
    for addr in [0, MMIO_BASE - 1, MMIO_BASE + 4 * WINDOW, u64::MAX] {
        assert!(!set.mmio_read(addr, &mut octets));
        assert_eq!(octets, [0xff; 4]);
        assert!(!set.mmio_write(addr, &octets));
    }
    for port in [0, SERIAL_PORT - 1, SERIAL_PORT + 8, u16::MAX] {
        assert!(!set.pio_read(port, &mut octets));
        assert!(!set.pio_write(port, &octets));
    }
    assert!(set.pio_read(SERIAL_PORT + 5, &mut octets[..1]));
    assert_eq!(octets[0], 0x60);
}

#[test]
fn a_corrupt_overlay_and_a_cid_of_the_host_are_refused() {
    let memory = GuestMemory::new(4096).unwrap();
    let (base, _) = disk(1);
    let config = DeviceConfig {
        base,
        overlay: scratch(8192),
        layers: Vec::new(),
        disks: Vec::new(),
        disk_limits: Limits::default(),
        net: None,
        serial: scratch(0),
        cid: 3,
    };
    assert!(matches!(DeviceSet::new(&memory, config), Err(DeviceError::Overlay(cause)) if cause.is_corrupt()));
    for cid in [0, 2, u32::MAX] {
        let (base, overlay) = disk(1);
        let config = DeviceConfig {
            base,
            overlay,
            layers: Vec::new(),
            disks: Vec::new(),
            disk_limits: Limits::default(),
            net: None,
            serial: scratch(0),
            cid,
        };
        assert!(matches!(DeviceSet::new(&memory, config), Err(DeviceError::Cid { .. })));
    }
}

/// Turns the loop of the device thread until nothing comes for a while.
fn turn(poll: &mut Poll, set: &DeviceSet) {
    let mut events = Events::with_capacity(16);
    loop {
        poll.poll(&mut events, Some(Duration::from_millis(150))).unwrap();
        if events.is_empty() {
            return;
        }
        for event in &events {
            assert!(set.handle(event.token()));
        }
    }
}

#[test]
fn the_device_threads_loop_serves_queues_links_and_timers() {
    let (memory, set) = set();
    let mut poll = Poll::new().unwrap();
    let next = set.register(poll.registry(), 100).unwrap();
    assert_eq!(next, 100 + 3 + 8);
    assert!(!set.handle(mio::Token(99)) && !set.handle(mio::Token(next)));
    // The console, without a line's end.
    assert!(set.pio_write(SERIAL_PORT, b"login: "));
    // vsock, set up through the bus: a request of the host is there when the driver comes.
    let (link, mut peer) = UnixStream::pair().unwrap();
    set.vsock_connect(1024, link, "t", Vec::new());
    let window = Bus { set: &set, base: MMIO_BASE + WINDOW };
    let mut queues = crate::vmm::devices::driver::start(&window, 0, 3, 16, 0);
    queues[0].add(&memory, &[(0x8_0000, 200, true)]);
    set.windows()[1].queue_events[0].write(1).unwrap();
    turn(&mut poll, &set);
    assert_eq!(queues[0].used(&memory).unwrap().1, 44);
    assert!(set.windows()[1].interrupt.read().is_ok());
    assert_eq!(memory.read_u16(0x8_0000 + 30).unwrap(), 1);
    // The guest accepts, the link talks.
    let host_port = memory.read_u32(0x8_0000 + 16).unwrap();
    let mut response = [0; 44];
    response[0] = 3;
    response[8] = 2;
    response[16..20].copy_from_slice(&1024u32.to_le_bytes());
    response[20..24].copy_from_slice(&host_port.to_le_bytes());
    response[28] = 1;
    response[30] = 2;
    response[37] = 0x10;
    memory.write(0x9_0000, &response).unwrap();
    queues[1].add(&memory, &[(0x9_0000, 44, false)]);
    set.windows()[1].queue_events[1].write(1).unwrap();
    turn(&mut poll, &set);
    let mut line = [0; 5];
    peer.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"t ok\n");
    for n in 0..3u8 {
        queues[0].add(&memory, &[(0x8_0000, 200, true)]);
        set.windows()[1].queue_events[0].write(1).unwrap();
        peer.write_all(&[n; 10]).unwrap();
        turn(&mut poll, &set);
        assert_eq!(queues[0].used(&memory).unwrap().1, 54);
    }
    assert_eq!((set.stats().vsock_rx_bytes, set.stats().vsock_connections), (30, 1));
    set.shutdown().unwrap();
}

/// One device's window on the set's bus.
struct Bus<'a> {
    set: &'a DeviceSet,
    base: u64,
}

impl mmio::Window for Bus<'_> {
    fn read(&self, offset: u64, into: &mut [u8]) {
        assert!(self.set.mmio_read(self.base + offset, into));
    }
    fn write(&self, offset: u64, from: &[u8]) {
        assert!(self.set.mmio_write(self.base + offset, from));
    }
    fn interrupt(&self) -> &vmm_sys_util::eventfd::EventFd {
        self.set.windows()[1].interrupt
    }
    fn queue_events(&self) -> &[vmm_sys_util::eventfd::EventFd] {
        self.set.windows()[1].queue_events
    }
    fn serve(&self, _: usize) {}
    fn let_go(&self) {}
    fn pause(&self, _: bool, _: Instant) -> bool {
        true
    }
    fn save(&self, index: u64) -> Part {
        Part::new(mmio::PART, index)
    }
    fn restore(&self, _: &Part) -> Result<(), SavedError> {
        Ok(())
    }
}

#[test]
fn a_guest_gets_entropy_at_a_bounded_rate() {
    let (memory, set) = set();
    let mut poll = Poll::new().unwrap();
    set.register(poll.registry(), 0).unwrap();
    let window = Bus { set: &set, base: MMIO_BASE + 2 * WINDOW };
    let mut queues = crate::vmm::devices::driver::start(&window, 0, 1, 64, 0);
    // Three times what may be saved up, in requests of the largest size.
    for _ in 0..24 {
        queues[0].add(&memory, &[(0x8_0000, 0x1_0000, true)]);
    }
    let event = set.windows()[2].queue_events[0].try_clone().unwrap();
    let started = Instant::now();
    event.write(1).unwrap();
    let mut events = Events::with_capacity(16);
    let mut filled = 0u64;
    while filled < 24 << 16 {
        poll.poll(&mut events, Some(Duration::from_secs(60))).unwrap();
        assert!(!events.is_empty(), "the timer wakes the device");
        events.iter().for_each(|event| assert!(set.handle(event.token())));
        filled += std::iter::from_fn(|| queues[0].used(&memory)).map(|(_, len)| u64::from(len)).sum::<u64>();
        let allowed = (512 << 10) + ((4 << 20) as f64 * started.elapsed().as_secs_f64()) as u64 + (1 << 16);
        assert!(filled <= allowed, "{filled} octets after {:?}", started.elapsed());
    }
}
