//! Pages that a guest is known to touch, mapped for it before it runs: each that it meets by itself costs an exit and a fault.

use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iowr_nr;

/// `struct kvm_pre_fault_memory` (Linux Documentation/virt/kvm/api.rst 4.143).
#[repr(C)]
#[derive(Debug, Default)]
struct PreFault {
    gpa: u64,
    size: u64,
    flags: u64,
    padding: [u64; 5],
}

ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, 0xae, 0xd5, PreFault);

/// Maps guest-physical memory, whole pages of RAM, for a processor that does not run; all of its machine's share the mappings.
/// A page that is the worker's own is mapped for writing. `false` where the kernel cannot (before 6.11) or will not.
pub fn fault_in(fd: &VcpuFd, gpa: u64, size: u64) -> bool {
    let mut range = PreFault { gpa, size, ..PreFault::default() };
    while range.size > 0 {
        let before = range.size;
        // SAFETY: the structure is alive and as long as the request's number says; the kernel changes nothing but it.
        let done = unsafe { ioctl_with_mut_ref(fd, KVM_PRE_FAULT_MEMORY(), &mut range) } == 0;
        // It tells what is left where it ended early.
        if !done || range.size >= before {
            return false;
        }
    }
    true
}
