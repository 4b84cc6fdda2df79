use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::Input;
use crate::vmm::devices::driver::{self, DriverQueue};
use crate::vmm::devices::mmio::MmioTransport;
use crate::vmm::devices::vsock::{MAX_CONNECTIONS, Vsock};
use crate::vmm::memory::GuestMemory;

const RX: usize = 0;
const TX: usize = 1;
const RAM: u64 = 1 << 20;
const BUFFERS: u64 = 0x1_0000;
const PACKETS: u64 = 0x8_0000;
const CID: u64 = 3;

/// A guest that sends any packets, with links that come, talk, stop and go: nothing panics or loops, and no more
/// connections exist than may. Each step takes an octet and what it needs.
pub fn vsock(data: &[u8]) {
    let mut input = Input(data);
    let memory = GuestMemory::new(RAM).unwrap();
    let transport = MmioTransport::new(memory.clone(), Vsock::new(CID).unwrap()).unwrap();
    let mut queues = driver::start(&transport, driver::EVENT_IDX | driver::INDIRECT, 3, 256, 0);
    let mut peers: Vec<UnixStream> = Vec::new();
    let mut given = 0;
    while !input.ended() {
        match input.u8() % 8 {
            0 => {
                let port = u32::from(input.u8() % 4) + 1022;
                let (link, peer) = pair();
                peers.push(peer);
                transport.with_device(|vsock| vsock.accept(port, link, "1".into(), Vec::new()));
            }
            1 => {
                let port = u32::from(input.u8() % 4);
                let (link, peer) = pair();
                peers.push(peer);
                transport.with_device(|vsock| vsock.connect(port, link, "2".into(), b"early".to_vec()));
            }
            2 => {
                let length = usize::from(input.u16());
                if let Some(peer) = pick(&mut peers, input.u8()) {
                    let _ = peer.write(&vec![0x61; length]);
                }
            }
            3 => {
                if let Some(peer) = pick(&mut peers, input.u8()) {
                    let _ = peer.read(&mut [0; 4096]);
                }
            }
            4 if !peers.is_empty() => {
                let at = usize::from(input.u8()) % peers.len();
                if input.u8() % 2 == 0 {
                    peers.swap_remove(at);
                } else {
                    let _ = peers[at].shutdown(std::net::Shutdown::Write);
                }
            }
            5 => {
                for _ in 0..input.u8() % 32 {
                    let at = BUFFERS + given % 100 * 4096;
                    given += 1;
                    queues[RX].add(&memory, &[(at, 44 + u32::from(input.u8()) * 8 + 1, true)]);
                }
            }
            6 => {
                let ahead = Duration::from_secs(u64::from(input.u8() % 16));
                transport.with_device(|vsock| vsock.expire(Instant::now() + ahead));
            }
            _ => send(&mut input, &memory, &mut queues[TX]),
        }
        transport.with_device(Vsock::link_events);
        transport.kick(RX);
        transport.kick(TX);
        driver::run(&transport);
        assert!(transport.with_device(|vsock| vsock.connections()) <= MAX_CONNECTIONS);
        while queues[RX].used(&memory).is_some() {}
        while queues[TX].used(&memory).is_some() {}
    }
    // The driver goes; its connections go with it.
    driver::write(&transport, 0x70, 0);
}

fn pair() -> (UnixStream, UnixStream) {
    let (link, peer) = UnixStream::pair().unwrap();
    peer.set_nonblocking(true).unwrap();
    (link, peer)
}

fn pick(peers: &mut [UnixStream], at: u8) -> Option<&mut UnixStream> {
    let len = peers.len();
    peers.get_mut(usize::from(at) % len.max(1))
}

/// One packet: mostly well-formed and to ports that are in use, so that it gets far.
fn send(input: &mut Input<'_>, memory: &GuestMemory, queue: &mut DriverQueue) {
    let (shape, op) = (input.u8(), u16::from(input.u8() % 9));
    let src_cid = if shape & 1 == 0 { CID } else { input.u64() };
    let dst_cid = if shape & 2 == 0 { 2 } else { input.u64() };
    let src_port = u32::from(input.u8() % 4);
    let dst_port =
        if shape & 4 == 0 { 1022 + u32::from(input.u8() % 4) } else { (1 << 30) + u32::from(input.u8() % 8) };
    let kind = if shape & 8 == 0 { 1 } else { input.u16() };
    let octets = u32::from(input.u16());
    let len = if shape & 16 == 0 { octets } else { input.u32() };
    memory.write_u64(PACKETS, src_cid).unwrap();
    memory.write_u64(PACKETS + 8, dst_cid).unwrap();
    memory.write_u32(PACKETS + 16, src_port).unwrap();
    memory.write_u32(PACKETS + 20, dst_port).unwrap();
    memory.write_u32(PACKETS + 24, len).unwrap();
    memory.write_u16(PACKETS + 28, kind).unwrap();
    memory.write_u16(PACKETS + 30, op).unwrap();
    memory.write_u32(PACKETS + 32, u32::from(input.u8())).unwrap();
    memory.write_u32(PACKETS + 36, input.u32()).unwrap();
    memory.write_u32(PACKETS + 40, input.u32()).unwrap();
    if shape & 32 == 0 {
        queue.add(memory, &[(PACKETS, 44, false), (PACKETS + 44, octets, false)]);
    } else {
        // Cut elsewhere.
        let cut = u32::from(input.u8()) % 60;
        queue.add(memory, &[(PACKETS, cut, false), (PACKETS + u64::from(cut), octets, false)]);
    }
}
