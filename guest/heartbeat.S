// Built-in trial guest, ring 0: from the PVH entry, or from a start-up IPI, to
// ring 3 on every vCPU. Everything the guest is for happens in heartbeat.c.
//
// As little as possible runs here: a KVM without hardware virtualisation
// emulates ring 0 one instruction at a time, while ring 3 runs natively.

#include "heartbeat.h"

#define SEL_CODE32  0x08
#define SEL_DATA32  0x10
#define SEL_CODE64  0x18
#define SEL_UDATA   0x23
#define SEL_UCODE   0x2b
#define SEL_TSS     0x30            /* + 16 for every vCPU */

// A TSS is 104 bytes; its I/O bitmap covers ports 0 to 0x3ff (serial port,
// i8042, PIT) and must be followed by a byte of ones.
#define TSS_SIZE    256
#define TSS_RSP0    4
#define TSS_IOMAP   102
#define TSS_HEAD    104
#define TSS_LIMIT   (TSS_HEAD + 0x400 / 8)

#define VECTORS     32

#define PTE_TABLE   0x07            /* present, writable, user */
#define PTE_2M      0x87            /* and a large page */
#define MSR_APIC_BASE 0x1b
#define MSR_EFER    0xc0000080

    .section .note.pvh, "a", @note
    .align 4
    .long 4, 8, 18                  // name size, value size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_entry

// ---- The first vCPU: 32-bit protected mode, paging off, ebx = start_info ----

    .text
    .code32
    .globl pvh_entry
pvh_entry:
    cli
    cld
    // How many 2 MiB pages are there to map? Up to the end of the highest RAM,
    // at least 4 GiB (the local APIC is there), at most MAX_RAM_GIB.
    movl $(4 * 512), %ebp
    movl 40(%ebx), %esi             // memmap_paddr
    movl 48(%ebx), %ecx             // memmap_entries
1:  jecxz 3f
    cmpl $1, 16(%esi)               // RAM
    jne 2f
    movl (%esi), %eax
    movl 4(%esi), %edx
    addl 8(%esi), %eax
    adcl 12(%esi), %edx
    addl $0x1fffff, %eax
    adcl $0, %edx
    shrdl $21, %edx, %eax
    cmpl %ebp, %eax
    jbe 2f
    movl %eax, %ebp
2:  addl $24, %esi
    decl %ecx
    jmp 1b
3:  cmpl $(MAX_RAM_GIB * 512), %ebp
    jbe 4f
    movl $(MAX_RAM_GIB * 512), %ebp
4:
    // PML4, PDPT, then the page directories one after the other.
    movl $(PAGE_TABLES + 0x1000 + PTE_TABLE), PAGE_TABLES
    movl $(PAGE_TABLES + 0x1000), %edi
    movl $(PAGE_TABLES + 0x2000 + PTE_TABLE), %eax
    leal 511(%ebp), %ecx
    shrl $9, %ecx
5:  movl %eax, (%edi)
    addl $0x1000, %eax
    addl $8, %edi
    decl %ecx
    jnz 5b

    movl $(PAGE_TABLES + 0x2000), %edi
    movl $PTE_2M, %eax
    xorl %edx, %edx
    movl %ebp, %ecx
6:  movl %eax, (%edi)
    movl %edx, 4(%edi)
    addl $0x200000, %eax
    adcl $0, %edx
    addl $8, %edi
    decl %ecx
    jnz 6b

    // Interrupt gates for the exceptions.
    movl $idt, %edi
    movl $vector_stubs, %eax
    movl $VECTORS, %ecx
7:  movl %eax, %edx
    andl $0xffff, %edx
    orl $(SEL_CODE64 << 16), %edx
    movl %edx, (%edi)
    movl %eax, %edx
    andl $0xffff0000, %edx
    orl $0x8e00, %edx               // interrupt gate
    movl %edx, 4(%edi)
    addl $16, %eax                  // stubs are 16 bytes each
    addl $16, %edi
    decl %ecx
    jnz 7b

    // Start-up IPIs are sent from ring 3, where only the memory-mapped local
    // APIC can be reached: leave x2APIC mode (by way of "disabled") if in it.
    movl $MSR_APIC_BASE, %ecx
    rdmsr
    testl $0x400, %eax
    jz 8f
    andl $~0xc00, %eax
    wrmsr
    orl $0x800, %eax
    wrmsr
8:
    movl %ebx, start_info
    lgdt gdt_pointer
    ljmp $SEL_CODE32, $enter_long_mode

// ---- Common to all vCPUs from here; the first one and those started later ----

enter_long_mode:
    movl $SEL_DATA32, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl %cr4, %eax
    orl $0x20, %eax                 // PAE
    movl %eax, %cr4
    movl $PAGE_TABLES, %eax
    movl %eax, %cr3
    movl $MSR_EFER, %ecx
    rdmsr
    orl $0x100, %eax                // LME
    wrmsr
    movl %cr0, %eax
    andl $~0x6000000c, %eax         // no CD, NW, TS, EM
    orl $0x80000001, %eax           // PG, PE
    movl %eax, %cr0
    ljmp $SEL_CODE64, $long_mode

    .code64
long_mode:
    // The APIC id is the vCPU's number. Ids beyond the table sleep for ever.
    movl $(LAPIC_BASE + 0x20), %eax
    movl (%rax), %edi
    shrl $24, %edi
    cmpl $MAX_VCPUS, %edi
    jae sleep

    // Its TSS: ring-0 stack, I/O bitmap (zero: every port allowed).
    movl %edi, %ebx
    imull $TSS_SIZE, %ebx, %ebx
    addl $tss, %ebx
    movl %edi, %eax
    incl %eax
    shll $RING0_STACK_SHIFT, %eax
    addl $ring0_stacks, %eax
    movl %eax, TSS_RSP0(%rbx)
    movw $TSS_HEAD, TSS_IOMAP(%rbx)
    movb $0xff, TSS_LIMIT(%rbx)

    // Its descriptor. The image lies below 16 MiB, so bits 24 up are zero.
    movl %edi, %ecx
    shll $4, %ecx
    movl %ebx, %eax
    shll $16, %eax
    orl $TSS_LIMIT, %eax
    movl %eax, gdt_tss(%rcx)
    shrl $16, %ebx
    orl $0x8900, %ebx               // available 64-bit TSS
    movl %ebx, gdt_tss + 4(%rcx)
    addl $SEL_TSS, %ecx
    ltr %cx
    lidt idt_pointer

    movl $SEL_UDATA, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %edi, %eax
    incl %eax
    shll $RING3_STACK_SHIFT, %eax
    addl $ring3_stacks, %eax
    subl $8, %eax                   // as after a call
    movl start_info, %esi
    // The frame for iretq goes to the top of the ring-3 stack; it is not
    // needed any more once it has been used.
    movl %eax, %esp
    pushq $SEL_UDATA
    pushq %rax
    pushq $2                        // flags: interrupts stay off
    pushq $SEL_UCODE
    pushq $guest_main               // guest_main(vcpu, start_info)
    iretq

sleep:
    cli
    hlt
    jmp sleep

// ---- Exceptions and services ----

    .align 16
vector_stubs:
    vector = 0
    .rept VECTORS
    .align 16
    .if !((vector == 8) || (vector >= 10 && vector <= 14) || (vector == 17) || (vector == 21))
    pushq $0                        // where the CPU pushes no error code
    .endif
    pushq $vector
    jmp fault
    vector = vector + 1
    .endr

// A call for service is an exception too: ud2 at service_trap, number in eax
// (heartbeat.h). Not every KVM delivers a software interrupt from ring 3.
fault:
    cmpq $service_trap, 16(%rsp)
    jne report_fault
    addq $16, %rsp                  // vector, error code
    addq $2, (%rsp)                 // go on behind the ud2
    cmpl $SERVICE_CPUID, %eax
    je service_cpuid
    cmpl $SERVICE_WRMSR, %eax
    je service_wrmsr
    cmpl $SERVICE_SHUTDOWN, %eax
    jne sleep
    lidt no_idt                     // no handler for anything: a triple fault
    ud2

service_cpuid:                      // esi = leaf, rdi = four words for the result
    movl %esi, %eax
    xorl %ecx, %ecx
    cpuid
    movl %eax, (%rdi)
    movl %ebx, 4(%rdi)
    movl %ecx, 8(%rdi)
    movl %edx, 12(%rdi)
    iretq

service_wrmsr:                      // esi = MSR, rdi = value
    movl %esi, %ecx
    movl %edi, %eax
    movq %rdi, %rdx
    shrq $32, %rdx
    wrmsr
    iretq

// An exception is a bug or a corrupted machine. Ring 3 reports it:
// guest_fault(vector, error code, rip, cr2).
report_fault:
    popq %rdi
    popq %rsi
    movq (%rsp), %rdx
    movq %cr2, %rcx
    movq $guest_fault, (%rsp)
    movq 24(%rsp), %rax
    subq $256, %rax
    andq $~15, %rax
    subq $8, %rax
    movq %rax, 24(%rsp)
    iretq

    .globl service
service:                            // service(a, b, number)
    movl %edx, %eax
    pushq %rbx
service_trap:
    ud2
    popq %rbx
    ret

// ---- Started by INIT-SIPI-SIPI: copied to AP_TRAMPOLINE, real mode ----

    .globl ap_trampoline, ap_trampoline_end
    .code16
ap_trampoline:
    cli
    cld
    xorw %ax, %ax
    movw %ax, %ds
    lgdtl AP_TRAMPOLINE + (ap_gdt_pointer - ap_trampoline)
    movl %cr0, %eax
    orb $1, %al
    movl %eax, %cr0
    ljmpl $SEL_CODE32, $enter_long_mode
    .align 4
ap_gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
ap_trampoline_end:

    .data
    .align 16
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff        // ring 0, 32-bit code
    .quad 0x00cf93000000ffff        // ring 0, data
    .quad 0x00af9b000000ffff        // ring 0, 64-bit code
    .quad 0x00cff3000000ffff        // ring 3, data
    .quad 0x00affb000000ffff        // ring 3, 64-bit code
gdt_tss:
    .fill 16 * MAX_VCPUS, 1, 0
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
    .align 8
idt_pointer:
    .word 16 * VECTORS - 1
    .quad idt
no_idt:
    .word 0
    .quad 0
start_info:
    .long 0

    .bss
    .align 256
tss:
    .skip TSS_SIZE * MAX_VCPUS
idt:
    .skip 16 * VECTORS
    .align 16
ring0_stacks:
    .skip MAX_VCPUS << RING0_STACK_SHIFT
ring3_stacks:
    .skip MAX_VCPUS << RING3_STACK_SHIFT
