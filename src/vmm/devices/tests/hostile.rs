//! Drivers that write garbage into registers and rings: at worst their device asks for a reset.

use std::io::Write;
use std::os::unix::net::UnixStream;

use super::disk;
use crate::storage::medium::Medium;
use crate::storage::overlay::Overlay;
use crate::vmm::devices::balloon::Balloon;
use crate::vmm::devices::block::Block;
use crate::vmm::devices::driver::{self, Seed, read, write};
use crate::vmm::devices::mmio::{MmioTransport, Window};
use crate::vmm::devices::net::{Net, NetConfig, Tap};
use crate::vmm::devices::rate::Limits;
use crate::vmm::devices::rng::Rng;
use crate::vmm::devices::vsock::Vsock;
use crate::vmm::memory::GuestMemory;

const RAM: u64 = 256 << 10;

/// Runs a device, and sees that it rests afterwards and can be set up again.
fn attack(memory: &GuestMemory, window: &dyn Window, features: u64, queues: usize, seed: u64) {
    let mut random = Seed(seed);
    let largest = |index| {
        write(window, 0x30, index as u32);
        read(window, 0x34) as u16
    };
    let size = (0..queues).map(largest).min().unwrap().min(1 << random.below(9));
    for _ in 0..6 {
        memory.zero(0, RAM as usize).unwrap();
        let mut rings = driver::start(window, features, queues, size, 0);
        for _ in 0..60 {
            let ring = &mut rings[random.below(queues as u64) as usize];
            match random.below(6) {
                // A descriptor that is nearly right.
                0..3 => {
                    let index = random.below(u64::from(size)) as u16;
                    let flags = random.below(8) as u16;
                    let addr = random.below(RAM + 100);
                    let len = if random.below(9) == 0 { random.number() } else { random.below(2000) } as u32;
                    let next = random.below(u64::from(size) + 1) as u16;
                    ring.put_descriptor(memory, ring.descriptors, index, (addr, len, flags, next));
                }
                3 => ring.publish(memory, random.below(u64::from(size)) as u16),
                4 => memory.write_u64(random.below(RAM - 8), random.number() & 0x1f1f_1f1f).unwrap(),
                _ => write(window, random.below(0x44) * 4, random.number() as u32),
            }
            if random.below(4) == 0 {
                (0..queues).for_each(|index| write(window, 0x50, index as u32));
                driver::run(window);
            }
        }
        let status = read(window, 0x70);
        assert!([0, 1, 3, 11, 15].contains(&(status & 0xf)), "{status}");
    }
    memory.zero(0, RAM as usize).unwrap();
    driver::start(window, features, queues, size, 0);
    driver::run(window);
    assert_eq!(read(window, 0x70), 15);
    write(window, 0x70, 0);
}

#[test]
fn garbage_in_registers_and_rings_costs_at_most_the_device() {
    let features = driver::EVENT_IDX | driver::INDIRECT;
    for seed in 0..40 {
        let memory = GuestMemory::new(RAM).unwrap();
        let (base, overlay) = disk(4);
        let block = Block::new(Medium::Overlay(Overlay::open(overlay, Vec::new(), base).unwrap()), "attacked");
        attack(&memory, &MmioTransport::new(memory.clone(), block).unwrap(), features, 1, seed);
        attack(&memory, &MmioTransport::new(memory.clone(), Rng::new()).unwrap(), 0, 1, seed);
        let limits = Limits::default();
        let net = NetConfig { mac: [2, 0, 0, 0, 0, 1], mtu: 1500, ipv4: None, offloads: true, rx: limits, tx: limits };
        let (tap, mut host) = Tap::stand_in().unwrap();
        for len in [60, 1500, 9000, 40_000] {
            host.write_all(&vec![0; len]).unwrap();
        }
        let net = Net::new(tap, net).unwrap();
        attack(&memory, &MmioTransport::new(memory.clone(), net).unwrap(), features | 0x1_ffab, 2, seed);
        let balloon = MmioTransport::new(memory.clone(), Balloon::new(RAM)).unwrap();
        attack(&memory, &balloon, features | 0x3e & !8, 4, seed);
        let vsock = MmioTransport::new(memory.clone(), Vsock::new(3).unwrap()).unwrap();
        let links: Vec<_> = (0..8)
            .map(|port| {
                let (link, peer) = UnixStream::pair().unwrap();
                vsock.with_device(|vsock| vsock.connect(port, link, "t".into(), vec![1; 5000]));
                peer
            })
            .collect();
        attack(&memory, &vsock, features, 3, seed);
        drop(links);
    }
}
