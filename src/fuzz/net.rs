use std::io::{Read, Write};

use super::Input;
use crate::vmm::devices::driver;
use crate::vmm::devices::mmio::MmioTransport;
use crate::vmm::devices::net::{Net, NetConfig, RX, TX, Tap};
use crate::vmm::devices::rate::Limits;
use crate::vmm::memory::GuestMemory;

const RAM: u64 = 1 << 20;
const BUFFERS: u64 = 0x1_0000;
const FRAMES: u64 = 0x8_0000;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const OWN: [u8; 4] = [10, 0, 0, 2];
/// All features of the device, and those of the transport.
const FEATURES: u64 = 0x01c0_0000_0001_ffab | driver::EVENT_IDX | driver::INDIRECT;

/// A guest that sends any frames and gives any buffers, with a host that sends as well: nothing panics or loops, and
/// what the host gets is from the guest's own addresses, with a header that fits the frame.
pub fn net(data: &[u8]) {
    let mut input = Input(data);
    let (tap, mut host) = Tap::stand_in().unwrap();
    let options = input.u8();
    let limits = Limits::default();
    let ipv4 = (options & 1 == 0).then(|| OWN.into());
    let config = NetConfig { mac: MAC, mtu: 1500, ipv4, offloads: true, rx: limits, tx: limits };
    let memory = GuestMemory::new(RAM).unwrap();
    let device = Net::new(tap, config).unwrap();
    let transport = MmioTransport::new(memory.clone(), device).unwrap();
    let features = if options & 2 == 0 { FEATURES } else { FEATURES & u64::from(input.u32()) };
    let mut queues = driver::start(&transport, features, 2, 1 << (options >> 4 & 7).max(2), 0);
    let mut given = 0;
    while !input.ended() {
        match input.u8() % 4 {
            0 => {
                for _ in 0..input.u8() % 16 {
                    let at = BUFFERS + given % 100 * 4096;
                    given += 1;
                    queues[RX].add(&memory, &[(at, 13 + u32::from(input.u8()) * 16, true)]);
                }
            }
            1 => {
                let len = usize::from(input.u16()) % 9000;
                let _ = host.write(&vec![input.u8(); len]);
            }
            _ => {
                let len = 15 + usize::from(input.u16()) % 3000;
                let mut octets = vec![0; 12 + len];
                // A header and a frame that are right but for what the input changes.
                octets[18..24].copy_from_slice(&MAC);
                octets[24..27].copy_from_slice(&[8, 0, 0x45]);
                if let Some(ip) = octets.get_mut(26..46) {
                    ip[9] = [6, 17][usize::from(input.u8() % 2)];
                    ip[12..16].copy_from_slice(&OWN);
                }
                for _ in 0..input.u8() % 12 {
                    let at = usize::from(input.u8()) % 64;
                    let octet = input.u8();
                    if let Some(to) = octets.get_mut(at) {
                        *to = octet;
                    }
                }
                memory.write(FRAMES, &octets).unwrap();
                let cut = u32::from(input.u8()) % 26;
                let rest = octets.len() as u32 - cut;
                queues[TX].add(&memory, &[(FRAMES, cut, false), (FRAMES + u64::from(cut), rest, false)]);
            }
        }
        transport.kick(RX);
        transport.kick(TX);
        driver::run(&transport);
        let mut octets = vec![0; 4096];
        while let Ok(len @ 1..) = host.read(&mut octets) {
            check(&octets[..len], ipv4.is_some());
        }
        while queues[RX].used(&memory).is_some() {}
        while queues[TX].used(&memory).is_some() {}
        if driver::read(&transport, 0x70) & 64 != 0 {
            // It demands a reset, for a ring or buffer that cannot be.
            return;
        }
    }
}

fn check(octets: &[u8], fixed: bool) {
    let (header, frame) = octets.split_at(12);
    assert_eq!(frame[6..12], MAC);
    if fixed {
        match [frame[12], frame[13]] {
            [8, 0] => assert_eq!(frame[26..30], OWN),
            [8, 6] => assert!(frame[28..32] == OWN || frame[28..32] == [0; 4]),
            other => panic!("protocol {other:x?}"),
        }
    }
    let number = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
    assert!(header[0] <= 1 && number(2) <= frame.len());
    assert!(header[0] == 0 || number(6) + number(8) + 2 <= frame.len());
    assert!(header[1] != 0 || frame.len() <= 1514);
    assert!(header[1] == 0 || (header[0] == 1 && (48..=1500).contains(&number(4))));
}
