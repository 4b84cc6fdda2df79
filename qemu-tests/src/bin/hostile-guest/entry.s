# Entry by PVH (Xen misc/pvh.pandoc, "x86 HVM direct boot ABI"): 32-bit protected mode without paging, EBX at the
# start_info. Leaves for 64-bit mode with all of the first 8 GiB mapped to themselves by pages of 2 MiB, so that
# every address, RAM or not, can be touched.

.section .note.Xen, "a", @note
    .balign 4
    .long 4, 4, 18                  # name's length, value's length, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long pvh_entry

.section .text.entry, "ax", @progbits
.code32
.globl pvh_entry
pvh_entry:
    cld
    movl %ebx, %esi
    movl $page_directories, %edi
    movl $0x83, %eax                # present, writable, 2 MiB
    xorl %edx, %edx
1:  movl %eax, (%edi)
    movl %edx, 4(%edi)
    addl $8, %edi
    addl $0x200000, %eax
    adcl $0, %edx
    cmpl $page_directories + 8 * 4096, %edi
    jb 1b
    movl $page_directories + 3, %eax
    movl $page_pointers, %edi
    movl $8, %ecx
2:  movl %eax, (%edi)
    addl $4096, %eax
    addl $8, %edi
    loop 2b
    movl $page_pointers + 3, page_root
    movl $boot_stack_top, %esp

# Another processor comes here from its trampoline, with a stack of its own and ESI zero.
to_long_mode:
    movl $page_root, %eax
    movl %eax, %cr3
    movl $0x620, %eax               # PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $0xc0000080, %ecx          # EFER
    rdmsr
    orl $0x100, %eax                # LME
    wrmsr
    movl $0x80000013, %eax          # PG, ET, MP, PE
    movl %eax, %cr0
    lgdt table_pointer
    ljmp $8, $long_mode

.code64
long_mode:
    movl $16, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl %eax, %fs
    movl %eax, %gs
    movl %esi, %edi
    testl %edi, %edi
    jz 3f
    call kernel_main
    ud2
3:  call second_main
    ud2

# How a second processor starts (Intel SDM 3A 10.4.4): in real mode at a page's start. Copied to 0x8000.
.code16
.globl trampoline, trampoline_end
trampoline:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    lgdtl (0x8000 + trampoline_pointer - trampoline)
    movl $1, %eax
    movl %eax, %cr0
    ljmpl $0x18, $second_entry
    .balign 8
trampoline_pointer:
    .word table_end - table - 1
    .long table
trampoline_end:

.code32
second_entry:
    movl $16, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $second_stack_top, %esp
    xorl %esi, %esi
    jmp to_long_mode

# Exception *guarded(fn(u64), u64): runs a function; what ended it when that was an exception, else null. Registers
# that a callee saves are back in any case.
.code64
.globl guarded
guarded:
    pushq %rbx
    pushq %rbp
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    subq $8, %rsp
    movq %rsp, recovery
    movq %rdi, %rax
    movq %rsi, %rdi
    call *%rax
    xorl %eax, %eax
recovered:
    movq $0, recovery
    addq $8, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbp
    popq %rbx
    ret

# Gates of the exceptions, 16 octets each: all leave an error code (AMD APM 2 8.4.1), their vector, and go on alike.
.globl exception_gates
    .balign 16
exception_gates:
    .set vector, 0
    .rept 32
    .balign 16
    .if (0x60227d00 >> vector & 1) == 0
    pushq $0
    .endif
    pushq $vector
    jmp on_exception
    .set vector, vector + 1
    .endr

# Every exception: back to `guarded`, or, outside of it, the end, after it was told.
on_exception:
    cld
    movq %rsp, %rdi
    movq recovery, %rsp
    testq %rsp, %rsp
    jz 4f
    movw $16, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movq %rdi, %rax
    jmp recovered
4:  lidt no_interrupts              # one more exception is a triple fault
    movq %rdi, %rsp
    andq $-16, %rsp
    call outside_of_a_round
    ud2

# Every interrupt: acknowledged at the local APIC.
.globl on_interrupt
on_interrupt:
    pushq %rax
    movl $0xfee000b0, %eax
    movl $0, (%rax)
    popq %rax
    iretq

.globl triple_fault
triple_fault:
    lidt no_interrupts
    ud2

.section .data
    .balign 16
.globl table
table:
    .quad 0
    .quad 0x00af9b000000ffff        # 0x08: 64-bit code
    .quad 0x00cf93000000ffff        # 0x10: data
    .quad 0x00cf9b000000ffff        # 0x18: 32-bit code
.globl task_descriptor
task_descriptor:
    .quad 0, 0                      # 0x20: task state
table_end:
table_pointer:
    .word table_end - table - 1
    .quad table
no_interrupts:
    .word 0
    .quad 0
recovery:
    .quad 0

.section .bss
    .balign 4096
page_directories:
    .skip 8 * 4096
page_pointers:
    .skip 4096
page_root:
    .skip 4096
    .skip 65536
boot_stack_top:
    .skip 65536
second_stack_top:
