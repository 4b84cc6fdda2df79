//! KVM's own counters of a processor, by its binary statistics (Linux Documentation/virt/kvm/api.rst 4.133): how often
//! and why it left the guest. Most exits end inside KVM and are never seen by the worker's threads.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

const KVMIO: u32 = 0xae;
ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);

/// `struct kvm_stats_header`: six 32-bit numbers.
const HEADER_LEN: usize = 24;
/// `struct kvm_stats_desc` up to the name.
const DESCRIPTOR_LEN: usize = 16;
/// More than KVM has; a header that says otherwise is not understood.
const MAX_NAME_LEN: usize = 256;
const MAX_DESCRIPTORS: usize = 1024;

/// The counters that are read, as KVM names them.
const NAMES: [&str; 5] = ["exits", "halt_exits", "irq_exits", "io_exits", "mmio_exits"];

/// How often processors left the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GuestExits {
    /// For any reason.
    pub total: u64,
    /// To wait for an interrupt.
    pub halt: u64,
    /// For an interrupt of the host.
    pub interrupt: u64,
    /// At a port.
    pub io: u64,
    /// At an address without memory; doorbells are not among them.
    pub mmio: u64,
}

/// The counters of one processor.
#[derive(Debug)]
pub(super) struct Counters {
    file: File,
    /// Where in the file each of `NAMES` is; `None` for one that this kernel does not have.
    places: [Option<u64>; NAMES.len()],
}

impl Counters {
    /// Opens the counters of a processor; they stay readable from any thread while it runs. `None` where the kernel
    /// has none (before 5.14), or in a form that is not understood.
    pub(super) fn open(fd: &VcpuFd) -> Option<Self> {
        // SAFETY: the ioctl has no argument, and gives a new descriptor or an error.
        let raw = unsafe { ioctl(fd, KVM_GET_STATS_FD()) };
        if raw < 0 {
            return None;
        }
        // SAFETY: the descriptor is new, so nobody else owns it.
        let file = unsafe { File::from_raw_fd(raw) };
        // Not for programs that the worker might ever start.
        // SAFETY: sets a flag of a descriptor that is open.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) };
        let places = places(|octets, offset| file.read_exact_at(octets, offset)).ok()?;
        Some(Self { file, places })
    }

    /// Adds this processor's counters to `sum`. A counter that cannot be read counts nothing.
    pub(super) fn add_to(&self, sum: &mut GuestExits) {
        let into = [&mut sum.total, &mut sum.halt, &mut sum.interrupt, &mut sum.io, &mut sum.mmio];
        for (counter, place) in into.into_iter().zip(self.places) {
            let mut octets = [0; 8];
            if place.is_some_and(|offset| self.file.read_exact_at(&mut octets, offset).is_ok()) {
                *counter = counter.saturating_add(u64::from_ne_bytes(octets));
            }
        }
    }
}

/// Finds the counters by the descriptors that the file begins with. `read` fills a buffer from an offset.
fn places(read: impl Fn(&mut [u8], u64) -> io::Result<()>) -> io::Result<[Option<u64>; NAMES.len()]> {
    let number = |octets: &[u8], n: usize| -> u32 {
        octets.chunks_exact(4).nth(n).and_then(|four| four.try_into().ok()).map_or(0, u32::from_ne_bytes)
    };
    let mut header = [0; HEADER_LEN];
    read(&mut header, 0)?;
    // flags, name_size, num_desc, id_offset, desc_offset, data_offset.
    let [name_len, count] = [1, 2].map(|n| number(&header, n) as usize);
    let [descriptors, data] = [4, 5].map(|n| u64::from(number(&header, n)));
    if name_len > MAX_NAME_LEN || count > MAX_DESCRIPTORS {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut table = vec![0; count * (DESCRIPTOR_LEN + name_len)];
    read(&mut table, descriptors)?;
    let mut places = [None; NAMES.len()];
    for descriptor in table.chunks_exact(DESCRIPTOR_LEN + name_len) {
        // flags, exponent and size, offset, bucket_size, name.
        let name = descriptor[DESCRIPTOR_LEN..].split(|octet| *octet == 0).next().unwrap_or_default();
        if let Some(at) = NAMES.iter().position(|wanted| wanted.as_bytes() == name) {
            places[at] = Some(data + u64::from(number(descriptor, 2)));
        }
    }
    Ok(places)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name_len: u32, counters: &[(&str, u32)]) -> Vec<u8> {
        let mut octets: Vec<u8> = Vec::new();
        let data = 24 + counters.len() as u32 * (16 + name_len);
        for field in [0, name_len, counters.len() as u32, 0, 24, data] {
            octets.extend(field.to_ne_bytes());
        }
        for (name, offset) in counters {
            for field in [0, 1 << 16, *offset, 0] {
                octets.extend(field.to_ne_bytes());
            }
            let mut name = name.as_bytes().to_vec();
            name.resize(name_len as usize, 0);
            octets.extend(name);
        }
        octets
    }

    fn of(octets: &[u8]) -> io::Result<[Option<u64>; NAMES.len()]> {
        places(|into, offset| {
            let from = usize::try_from(offset).ok().and_then(|start| octets.get(start..)).unwrap_or_default();
            let from = from.get(..into.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
            into.copy_from_slice(from);
            Ok(())
        })
    }

    #[test]
    fn counters_are_found_by_their_whole_name() {
        let octets = file(48, &[("halt_exits", 8), ("exits", 16), ("exits_of_others", 24), ("mmio_exits", 40)]);
        let data = 24 + 4 * 64;
        assert_eq!(of(&octets).unwrap(), [Some(data + 16), Some(data + 8), None, None, Some(data + 40)]);
    }

    #[test]
    fn a_file_of_another_form_is_refused() {
        assert!(of(&[]).is_err());
        assert!(of(&file(MAX_NAME_LEN as u32 + 1, &[])).is_err());
        let mut octets = file(16, &[("exits", 0)]);
        octets.truncate(octets.len() - 1);
        assert!(of(&octets).is_err());
        octets[8..12].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert!(of(&octets).is_err(), "more descriptors than there can be");
    }
}
