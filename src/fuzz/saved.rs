use std::fs::File;

use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::vmm::devices::balloon::Balloon;
use crate::vmm::devices::mmio::{MmioTransport, PART, Window};
use crate::vmm::devices::serial::{self, Serial};
use crate::vmm::devices::vsock::Vsock;
use crate::vmm::memory::GuestMemory;
use crate::vmm::snapshot::Saved;
use crate::vmm::snapshot::saved::sealed;

const RAM: u64 = 256 << 10;

/// State of any contents, under a right checksum (the fuzzer cannot guess one), is refused or makes devices that serve
/// what they find and can be saved and made once more.
pub fn saved(data: &[u8]) {
    let _ = Saved::decode(data);
    let Ok(state) = Saved::decode(&sealed(data)) else { return };
    let _ = state.shape();
    let memory = GuestMemory::new(RAM).unwrap();
    let devices: [Box<dyn Window>; 2] = [
        Box::new(MmioTransport::new(memory.clone(), Balloon::new(RAM)).unwrap()),
        Box::new(MmioTransport::new(memory.clone(), Vsock::new(3).unwrap()).unwrap()),
    ];
    for (index, device) in (0..).zip(&devices) {
        let Some(part) = state.get(PART, index) else { continue };
        if device.restore(part).is_ok() {
            (0..device.queue_events().len()).for_each(|queue| device.serve(queue));
            let again = device.save(index);
            device.restore(&again).unwrap();
        }
    }
    let log = File::from(memfd_create(c"warren-fuzz", MFdFlags::MFD_CLOEXEC).unwrap());
    let port = Serial::new(log).unwrap();
    if let Some(part) = state.get(serial::PART, 0)
        && port.restore(part).is_ok()
    {
        port.restore(&port.save()).unwrap();
    }
}
