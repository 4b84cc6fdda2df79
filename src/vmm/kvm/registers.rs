//! A processor's registers as text, for the record of a guest that ended by a fault.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_sregs, kvm_vcpu_events};
use kvm_ioctls::VcpuFd;

/// Where a processor starts after a reset (Intel SDM 3A table 11-1).
const RESET_RIP: u64 = 0xfff0;

/// The registers that tell how a processor came to its end, in one line of a few hundred octets. The processor must not
/// be in KVM_RUN.
pub(super) fn describe(fd: &VcpuFd) -> String {
    match (fd.get_regs(), fd.get_sregs(), fd.get_vcpu_events()) {
        (Ok(registers), Ok(special), Ok(events)) => text(&registers, &special, &events),
        (Err(e), ..) | (_, Err(e), _) | (.., Err(e)) => format!("its registers cannot be read: {e}"),
    }
}

fn text(registers: &kvm_regs, special: &kvm_sregs, events: &kvm_vcpu_events) -> String {
    // On AMD the control block is undefined after a shutdown, and KVM resets the processor before it says so.
    if registers.rip == RESET_RIP && special.cr3 == 0 && special.efer == 0 {
        return "the host kept no registers".to_string();
    }
    let table = |table: &kvm_dtable| format!("{:#x}+{:#x}", table.base, table.limit);
    let exception = match events.exception.injected | events.exception.pending {
        0 => "none".to_string(),
        _ => format!("{} (error {:#x})", events.exception.nr, events.exception.error_code),
    };
    let kvm_regs { rip, rsp, rflags, rax, rbx, rcx, rdx, rsi, rdi, rbp, .. } = *registers;
    let kvm_sregs { cr0, cr2, cr3, cr4, efer, cs, tr, .. } = *special;
    format!(
        "rip={rip:#x} cs={:#x} rsp={rsp:#x} rflags={rflags:#x} cr0={cr0:#x} cr2={cr2:#x} cr3={cr3:#x} cr4={cr4:#x} \
         efer={efer:#x} idt={} gdt={} tr={:#x}@{:#x} exception={exception} rax={rax:#x} rbx={rbx:#x} rcx={rcx:#x} \
         rdx={rdx:#x} rsi={rsi:#x} rdi={rdi:#x} rbp={rbp:#x}",
        cs.selector,
        table(&special.idt),
        table(&special.gdt),
        tr.selector,
        tr.base,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::last_words::{End, Reason};

    #[test]
    fn all_registers_at_their_longest_fit_the_record() {
        let registers = kvm_regs {
            rip: u64::MAX,
            rsp: u64::MAX,
            rflags: u64::MAX,
            rax: u64::MAX,
            rbx: u64::MAX,
            rcx: u64::MAX,
            rdx: u64::MAX,
            rsi: u64::MAX,
            rdi: u64::MAX,
            rbp: u64::MAX,
            ..Default::default()
        };
        let table = kvm_dtable { base: u64::MAX, limit: u16::MAX, ..Default::default() };
        let mut special =
            kvm_sregs { cr0: u64::MAX, cr2: u64::MAX, cr3: u64::MAX, cr4: u64::MAX, ..Default::default() };
        (special.efer, special.idt, special.gdt, special.tr.base) = (u64::MAX, table, table, u64::MAX);
        let mut events = kvm_vcpu_events::default();
        (events.exception.injected, events.exception.nr, events.exception.error_code) = (1, 14, u32::MAX);
        let detail = format!("triple fault on processor 15: {}", text(&registers, &special, &events));
        let fields = End::new(Reason::GuestReset, &detail).fields();
        assert_eq!(fields.get("detail"), Some(detail.as_str()));
        assert!(detail.contains("exception=14 (error 0xffffffff)"), "{detail}");
    }

    #[test]
    fn a_processor_that_kvm_has_reset_tells_nothing() {
        let registers = kvm_regs { rip: RESET_RIP, rflags: 2, ..Default::default() };
        let special = kvm_sregs { cr0: 0x6000_0010, ..Default::default() };
        assert_eq!(text(&registers, &special, &kvm_vcpu_events::default()), "the host kept no registers");
    }
}
