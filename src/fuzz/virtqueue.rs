use super::Input;
use crate::vmm::devices::queue::{Chain, Layout, MAX_CHAIN, Queue};
use crate::vmm::memory::GuestMemory;

const RAM: u64 = 64 << 10;
const DESCRIPTORS: u64 = 0;
const DRIVER: u64 = 0x1000;
const DEVICE: u64 = 0x1400;

/// Whatever stands in the rings, and however it changes meanwhile: `pop` ends, gives buffers inside RAM only, and
/// never more chains than the ring was said to have.
pub fn virtqueue(data: &[u8]) {
    let mut input = Input(data);
    let memory = GuestMemory::new(RAM).unwrap();
    let size = 1 << (input.u8() % 9);
    let options = input.u8();
    let mut layout = Layout { size, descriptors: DESCRIPTORS, driver: DRIVER, device: DEVICE };
    if options & 0x80 != 0 {
        layout = Layout { size: input.u32(), descriptors: input.u64(), driver: input.u64(), device: input.u64() };
    }
    let Ok(mut queue) = Queue::new(&memory, layout, 256, options & 1 != 0, options & 2 != 0) else {
        return;
    };
    let ram = memory.slice(0, RAM as usize).unwrap();
    let mut chain = Chain::default();
    while !input.ended() {
        // The driver writes something: a descriptor, an entry of the available ring, its index, or anything.
        let (kind, place) = (input.u8(), u64::from(input.u16()));
        match kind % 4 {
            0 => {
                let at = DESCRIPTORS + place % u64::from(size.min(256)) * 16;
                memory.write_u64(at, u64::from(input.u32()) % (RAM + 64)).unwrap();
                memory.write_u32(at + 8, u32::from(input.u16())).unwrap();
                memory.write_u16(at + 12, input.u16()).unwrap();
                memory.write_u16(at + 14, input.u16()).unwrap();
            }
            1 => memory.write_u16(DRIVER + 4 + place % 256 * 2, input.u16()).unwrap(),
            2 => memory.write_u16(DRIVER + 2, place as u16 % 300).unwrap(),
            _ => memory.write_u64(place % (RAM - 8), input.u64()).unwrap(),
        }
        for _ in 0..=256 {
            match queue.pop(&memory, &mut chain) {
                Ok(true) => {}
                Ok(false) => break,
                // The transport stops the device here.
                Err(_) => return,
            }
            let buffers = chain.readable.slices().iter().chain(chain.writable.slices());
            assert!(buffers.clone().count() <= MAX_CHAIN);
            assert!(buffers.clone().all(|buffer| ram.encloses(buffer)));
            let mut octets = [0; 64];
            chain.readable.copy_to(usize::from(kind), &mut octets);
            let written = chain.writable.copy_from(0, &octets);
            if kind & 0x40 != 0 {
                queue.undo_pop(1);
                break;
            }
            queue.add_used(&memory, chain.head, written as u32).unwrap();
        }
        let _ = queue.needs_interrupt(&memory).unwrap();
        if queue.enable_notifications(&memory).is_err() {
            return;
        }
    }
}
