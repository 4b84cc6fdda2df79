//! The processor and raw memory: all that is unsafe about this kernel is that it is one. It owns the machine, every
//! address is mapped, and what an attack breaks is its own.

use core::arch::{asm, global_asm};
use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};

use super::Attack;

global_asm!(include_str!("entry.s"), options(att_syntax));

// Where the compiler calls them; there is no libc.
global_asm!(
    ".text",
    ".globl memcpy, memmove, memset, memcmp, bcmp, rust_eh_personality",
    "memcpy:",
    "memmove:",
    "    movq %rdi, %rax",
    "    movq %rdx, %rcx",
    "    cmpq %rsi, %rdi",
    "    ja 1f",
    "    rep movsb",
    "    ret",
    "1:  std",
    "    leaq -1(%rdi, %rdx), %rdi",
    "    leaq -1(%rsi, %rdx), %rsi",
    "    rep movsb",
    "    cld",
    "    ret",
    "memset:",
    "    movq %rdi, %r8",
    "    movl %esi, %eax",
    "    movq %rdx, %rcx",
    "    rep stosb",
    "    movq %r8, %rax",
    "    ret",
    "memcmp:",
    "bcmp:",
    "    xorl %eax, %eax",
    "    movq %rdx, %rcx",
    "    testq %rcx, %rcx",
    "    repe cmpsb",
    "    je 2f",
    "    movzbl -1(%rdi), %eax",
    "    movzbl -1(%rsi), %ecx",
    "    subl %ecx, %eax",
    "2:  ret",
    "rust_eh_personality:",
    "    ud2",
    options(att_syntax)
);

unsafe extern "C" {
    static exception_gates: [[u8; 16]; 32];
    fn on_interrupt();
    #[link_name = "guarded"]
    fn guarded_call(function: extern "C" fn(u64), call: u64) -> *const Exception;
    #[link_name = "triple_fault"]
    fn triple_fault_now() -> !;
    static mut task_descriptor: [u64; 2];
    static kernel_end_marker: u8;
    static trampoline: u8;
    static trampoline_end: u8;
}

/// A round under way.
struct Call {
    round: fn(&mut Attack),
    attack: *mut Attack,
}

extern "C" fn run(call: u64) {
    let call = call as *mut Call;
    // SAFETY: `guarded` makes both from references that live through the call.
    let (round, attack) = unsafe { ((*call).round, &mut *(*call).attack) };
    round(attack);
}

/// What the processor and a gate of `entry.s` left on the interrupts' stack.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Exception {
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    flags: u64,
    rsp: u64,
    ss: u64,
}

impl fmt::Display for Exception {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { vector, error, rip, cs, flags, rsp, ss } = self;
        let cr2: u64;
        // SAFETY: reads a register.
        unsafe { asm!("mov {}, cr2", out(reg) cr2, options(nomem, nostack)) };
        write!(f, "exception {vector} error {error:#x} rip {cs:#x}:{rip:#x} flags {flags:#x} rsp {ss:#x}:{rsp:#x}")?;
        write!(f, " cr2 {cr2:#x}")
    }
}

/// Runs a round; gives the exception that ended it, if one did.
pub fn guarded(round: fn(&mut Attack), attack: &mut Attack) -> Option<Exception> {
    let mut call = Call { round, attack };
    // SAFETY: what an exception cuts off has nothing to drop, and its stack is given up as a whole. What it left on
    // the interrupts' stack is there until the next exception or interrupt; none comes before it was copied, since
    // the round's end has interrupts off.
    unsafe { guarded_call(run, &raw mut call as u64).as_ref().copied() }
}

/// An exception outside of a round, which `entry.s` comes here with: nothing of an attack's is under way there.
#[unsafe(no_mangle)]
extern "C" fn outside_of_a_round(exception: &Exception) {
    crate::say!("\nhostile: {} outside of a round\n", exception);
}

/// Ends this processor, and so the guest.
pub fn triple_fault() -> ! {
    // SAFETY: does not return.
    unsafe { triple_fault_now() }
}

/// Interrupt gates (AMD APM 2 §4.8.4) and the task state that names the interrupts' stack.
static mut GATES: [[u64; 2]; 256] = [[0; 2]; 256];
static mut TASK: [u32; 26] = [0; 26];
static mut INTERRUPT_STACK: [u64; 2048] = [0; 2048];

/// Makes exceptions end the round under way, and interrupts be acknowledged.
pub fn load_tables() {
    // SAFETY: runs once, on the first processor, before anything else does; the tables live for ever.
    unsafe {
        for vector in 0..256 {
            let interrupt = on_interrupt as *const () as u64;
            let handler = exception_gates.get(vector).map_or(interrupt, |gate| gate as *const _ as u64);
            // Present, 64-bit interrupt gate, code segment 8, stack 1 of the task state.
            let low = handler & 0xffff | 8 << 16 | 1 << 32 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
            (&raw mut GATES).cast::<[u64; 2]>().add(vector).write([low, handler >> 32]);
        }
        let stack = (&raw mut INTERRUPT_STACK).add(1) as u64;
        let task = (&raw mut TASK).cast::<u32>();
        task.add(9).write(stack as u32); // IST1
        task.add(10).write((stack >> 32) as u32);
        let base = task as u64;
        let limit = size_of::<[u32; 26]>() as u64 - 1;
        let low = limit | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24 & 0xff) << 56;
        (&raw mut task_descriptor).write([low, base >> 32]);
        let pointer = Pointer { limit: 4095, base: (&raw const GATES) as u64 };
        asm!("lidt [{}]", "mov {1:e}, 0x20", "ltr {1:x}", in(reg) &raw const pointer, out(reg) _);
    }
}

#[repr(C, packed)]
struct Pointer {
    limit: u16,
    base: u64,
}

/// First address after this kernel.
pub fn kernel_end() -> u64 {
    (&raw const kernel_end_marker) as u64
}

/// End of the RAM that begins at 1 MiB, from the start_info's memory map.
pub fn low_ram_end(info: u64) -> u64 {
    let (map, entries) = (read64(info + 40), u64::from(read32(info + 48)));
    let low = (0..entries).map(|n| map + 24 * n).find(|entry| read64(*entry) == 1 << 20);
    low.map_or(64 << 20, |entry| read64(entry) + read64(entry + 8))
}

/// The NUL-terminated text at an address.
pub fn string(address: u64) -> &'static str {
    let mut len = 0;
    while len < 4096 && read8(address + len) != 0 {
        len += 1;
    }
    // SAFETY: the octets are mapped; nothing writes there before the command line was read.
    let octets = unsafe { core::slice::from_raw_parts(address as *const u8, len as usize) };
    core::str::from_utf8(octets).unwrap_or("")
}

macro_rules! access {
    ($($read:ident $write:ident $kind:ty),*) => { $(
        /// Reads whatever is at a guest-physical address, in one access.
        pub fn $read(address: u64) -> $kind {
            let value: $kind;
            // SAFETY: every address is mapped, and a device's read is what this kernel is for.
            unsafe { asm!("mov {0}, [{1}]", out(reg) value, in(reg) address, options(nostack, readonly)) };
            value
        }

        /// Writes to whatever is at a guest-physical address, in one access.
        pub fn $write(address: u64, value: $kind) {
            // SAFETY: as above; callers keep away from this kernel's own memory, or live with what follows.
            unsafe { asm!("mov [{0}], {1}", in(reg) address, in(reg) value, options(nostack)) };
        }
    )* };
}

access!(read64 write64 u64);

macro_rules! narrow_access {
    ($($read:ident $write:ident $kind:ty, $modifier:literal, $class:ident);*) => { $(
        /// Reads whatever is at a guest-physical address, in one access.
        pub fn $read(address: u64) -> $kind {
            let value: $kind;
            // SAFETY: as for `read64`.
            unsafe {
                asm!(concat!("mov {0", $modifier, "}, [{1}]"), out($class) value, in(reg) address,
                    options(nostack, readonly));
            }
            value
        }

        /// Writes to whatever is at a guest-physical address, in one access.
        pub fn $write(address: u64, value: $kind) {
            // SAFETY: as for `write64`.
            unsafe {
                asm!(concat!("mov [{0}], {1", $modifier, "}"), in(reg) address, in($class) value, options(nostack));
            }
        }
    )* };
}

narrow_access!(read32 write32 u32, ":e", reg; read16 write16 u16, ":x", reg; read8 write8 u8, "", reg_byte);

/// Reads and writes 16 octets at once.
pub fn touch128(address: u64) {
    // SAFETY: as for `read64` and `write64`.
    unsafe {
        asm!("movups {0}, [{1}]", "movups [{1}], {0}", out(xmm_reg) _, in(reg) address, options(nostack));
    }
}

/// Copies by a string instruction, which may cross from RAM into a device.
pub fn move_string(from: u64, to: u64, octets: u64) {
    // SAFETY: as for `read64` and `write64`.
    unsafe {
        asm!("rep movsb", inout("rsi") from => _, inout("rdi") to => _, inout("rcx") octets => _, options(nostack));
    }
}

/// A locked exchange, which KVM has to emulate on a device.
pub fn exchange(address: u64, value: u64) {
    // SAFETY: as for `write64`.
    unsafe {
        asm!("lock cmpxchg [{0}], {1}", in(reg) address, in(reg) value, inout("rax") value => _, options(nostack));
    }
}

pub fn out8(port: u16, value: u8) {
    // SAFETY: ports are the machine's, which this kernel owns.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) };
}

pub fn out16(port: u16, value: u16) {
    // SAFETY: as for `out8`.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack)) };
}

pub fn out32(port: u16, value: u32) {
    // SAFETY: as for `out8`.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack)) };
}

pub fn in8(port: u16) -> u8 {
    let value: u8;
    // SAFETY: as for `out8`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) };
    value
}

pub fn in16(port: u16) -> u16 {
    let value: u16;
    // SAFETY: as for `out8`.
    unsafe { asm!("in ax, dx", in("dx") port, out("ax") value, options(nomem, nostack)) };
    value
}

pub fn in32(port: u16) -> u32 {
    let value: u32;
    // SAFETY: as for `out8`.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack)) };
    value
}

/// Port writes by a string instruction: many octets in one exit.
pub fn out_string(port: u16, from: u64, count: u64) {
    // SAFETY: as for `out8` and `read64`.
    unsafe {
        asm!("rep outsb", in("dx") port, inout("rsi") from => _, inout("rcx") count => _, options(nostack));
    }
}

/// Port reads by a string instruction.
pub fn in_string(port: u16, to: u64, count: u64) {
    // SAFETY: as for `in8` and `write64`.
    unsafe {
        asm!("rep insd", in("dx") port, inout("rdi") to => _, inout("rcx") count => _, options(nostack));
    }
}

/// CPUID of any leaf.
pub fn cpuid(leaf: u32, index: u32) {
    core::hint::black_box(core::arch::x86_64::__cpuid_count(leaf, index));
}

/// Ticks since the machine's start.
pub fn time() -> u64 {
    // SAFETY: every x86-64 processor has it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Reads a model-specific register; an exception where there is none.
pub fn read_msr(index: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the machine is this kernel's.
    unsafe { asm!("rdmsr", in("ecx") index, out("eax") low, out("edx") high, options(nomem, nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

/// Writes a model-specific register; an exception where it refuses.
pub fn write_msr(index: u32, value: u64) {
    // SAFETY: the machine is this kernel's, and so is what breaks.
    unsafe {
        asm!("wrmsr", in("ecx") index, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack));
    }
}

/// A hypercall, in either vendor's form.
pub fn hypercall(amd: bool, number: u64, arguments: [u64; 4]) {
    let [a, b, c, d] = arguments;
    // SAFETY: KVM answers or raises an exception; RBX is put back as the compiler needs it.
    unsafe {
        if amd {
            asm!("xchg rbx, {0}", "vmmcall", "xchg rbx, {0}", inout(reg) a => _, inout("rax") number => _,
                in("rcx") b, in("rdx") c, in("rsi") d);
        } else {
            asm!("xchg rbx, {0}", "vmcall", "xchg rbx, {0}", inout(reg) a => _, inout("rax") number => _,
                in("rcx") b, in("rdx") c, in("rsi") d);
        }
    }
}

/// An instruction that most guests have no right to.
pub fn forbidden(which: u64, value: u64) {
    // SAFETY: as for `write_msr`.
    unsafe {
        match which {
            0 => asm!("ud2"),
            1 => asm!("vmrun rax", in("rax") value),
            2 => asm!("vmload rax", in("rax") value),
            3 => asm!("wbinvd"),
            4 => asm!("invd"),
            5 => asm!("mov cr8, {}", in(reg) value & 15),
            6 => asm!("int 0x80"),
            7 => asm!("monitor", in("rax") value, in("rcx") 0, in("rdx") 0),
            8 => asm!("mwait", in("rax") 0, in("rcx") 0),
            9 => asm!("mov dr7, {}", in(reg) value),
            10 => asm!("int3"),
            11 => asm!("xsetbv", in("ecx") value as u32 & 1, in("eax") (value >> 32) as u32, in("edx") 0),
            12 => asm!("rdpmc", in("ecx") value as u32, out("eax") _, out("edx") _),
            13 => asm!("div {0}", in(reg) 0u64, inout("rax") 1u64 => _, inout("rdx") 1u64 => _),
            14 => asm!("mov cr4, {}", in(reg) value & 0xffff | 0x620),
            15 => asm!("clgi"),
            _ => asm!("pause"),
        }
    }
}

/// Lets interrupts in for a moment.
pub fn breathe() {
    // SAFETY: interrupts come on a stack of their own and change nothing.
    unsafe { asm!("sti", "nop", "nop", "cli") };
}

/// Stops, with or without a way to be woken.
pub fn halt(interrupts: bool) {
    // SAFETY: at worst this processor never goes on, which is then the point.
    unsafe {
        if interrupts {
            asm!("sti", "hlt", "cli");
        } else {
            asm!("hlt");
        }
    }
}

/// Goes on at an address where there may be no code.
pub fn jump(address: u64) {
    // SAFETY: none; the guest ends by it, one way or another.
    unsafe { asm!("call {}", in(reg) address, clobber_abi("C")) };
}

/// Pushes to a stack somewhere else.
pub fn push_at(address: u64) {
    // SAFETY: the stack is back afterwards, unless the access ended the guest.
    unsafe {
        asm!("mov {0}, rsp", "mov rsp, {1}", "push {1}", "pop {1}", "mov rsp, {0}", out(reg) _, inout(reg) address => _);
    }
}

/// Tries to start the second processor (Intel SDM 3A 10.4.4.1); gives whether it has said in `runs` that it is there.
/// It may be called again.
pub fn start_second(runs: &AtomicBool) -> bool {
    const TO: u64 = 0x8000;
    let (from, to) = ((&raw const trampoline) as u64, (&raw const trampoline_end) as u64);
    move_string(from, TO, to - from);
    // To all but this one.
    for command in [0xc_4500, 0xc_4608] {
        write32(super::processor::LAPIC + 0x300, command);
        let start = time();
        while !runs.load(Ordering::Relaxed) && time().wrapping_sub(start) < 200_000_000 {}
    }
    runs.load(Ordering::Relaxed)
}

/// Switches the machine off (ACPI 6.5 §4.8.3.7).
pub fn power_off() -> ! {
    loop {
        out8(0x600, 5 << 2 | 1 << 5);
    }
}
