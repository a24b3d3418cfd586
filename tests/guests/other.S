// A PVH guest that has nothing in common with the built-in one but its habits, so that vmrun cannot
// come to depend on details of its own guest: linked by the linker's default script (several
// segments, .bss larger than the file) at 4 MiB, page tables inside the image, one vCPU, a full-size
// I/O bitmap, no command line, no clock but the TSC.
//
// At the end of the addresses, where kernels have themselves, it has 10 MiB once more, not for ring 3: the 2 MiB of its
// image, and the first 8 MiB of the area below, which are written to all the time.
//
// In ring 3 it goes round the 32 MiB from 16 MiB on: checks that every word of a page still holds
// what it wrote there in the last pass, writes new values, and after every 64 pages prints `tick N`.
// A word that is wrong: `BAD address`, then reset (i8042, or else a triple fault).
//
// build: gcc -nostdlib -static -no-pie -Wl,--build-id=none,-Ttext-segment=0x400000 other.S -o other.elf
// needs: 64 MiB of RAM, a serial port at 0x3f8

    .set AREA, 16 << 20
    .set AREA_END, 48 << 20
    .set PAGE_TICKS, 1 << 17        // TSC ticks between two pages, about 50 us

    .section .note.pvh, "a", @note
    .align 4
    .long 4, 4, 18                  // XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long _start

    .text
    .code32
    .globl _start
_start:
    movl $(pdpt + 7), pml4
    movl $(pd + 7), pdpt
    xorl %ecx, %ecx
    movl $0x87, %eax                // present, writable, user, 2 MiB
1:  movl %eax, pd(, %ecx, 8)
    addl $0x200000, %eax
    incl %ecx
    cmpl $(AREA_END >> 21), %ecx
    jb 1b

    movl $(upper_pdpt + 3), pml4 + 511 * 8
    movl $(upper_pd + 3), upper_pdpt + 510 * 8
    movl $(0x400000 + 0x83), upper_pd       // present, writable, 2 MiB
    movl $(AREA + 0x83), upper_pd + 8
    movl $(AREA + 0x200083), upper_pd + 16
    movl $(AREA + 0x400083), upper_pd + 24
    movl $(AREA + 0x600083), upper_pd + 32

    movl $tss, %eax                 // the base in the TSS descriptor
    movw %ax, gdt_tss + 2
    shrl $16, %eax
    movb %al, gdt_tss + 4
    movb %ah, gdt_tss + 7
    lgdt gdt_pointer

    movl $pml4, %eax
    movl %eax, %cr3
    movl %cr4, %eax
    orl $0x20, %eax
    movl %eax, %cr4
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl %cr0, %eax
    orl $0x80000001, %eax
    movl %eax, %cr0
    ljmp $0x08, $long_mode

    .code64
long_mode:
    movl $0x28, %eax
    ltr %ax
    movl $0x1b, %eax
    movl %eax, %ds
    movl %eax, %es
    movl $stack_top, %esp
    pushq $0x1b
    pushq $stack_top
    pushq $2
    pushq $0x23
    pushq $ring3
    iretq

// r12 = pass (of the value to write), r13 = ticks, r14 = pages, r15 = time of the last page
ring3:
    leaq hello(%rip), %rsi
    call print
    xorl %r13d, %r13d
    xorl %r14d, %r14d
    movl $1, %r12d
pass:
    movl $AREA, %ebx
page:
    movl $512, %ecx
word:
    cmpl $1, %r12d                  // nothing was written before the first pass
    je 1f
    leaq -1(%r12), %rdi
    call value
    cmpq %rax, (%rbx)
    jne bad
1:  movq %r12, %rdi
    call value
    movq %rax, (%rbx)
    addq $8, %rbx
    decl %ecx
    jnz word

    incq %r14
    testl $63, %r14d
    jnz 2f
    incq %r13
    leaq tick(%rip), %rsi
    call print
    movq %r13, %rax
    call decimal
2:  pause
    rdtsc                           // a TSC that went back counts as time passed
    shlq $32, %rdx
    orq %rdx, %rax
    movq %rax, %rdx
    subq %r15, %rdx
    cmpq $PAGE_TICKS, %rdx
    jb 2b
    movq %rax, %r15
    cmpq $AREA_END, %rbx
    jb page
    incq %r12
    jmp pass

value:                              // rax = what pass rdi writes to address rbx
    movabsq $0x9e3779b97f4a7c15, %rax
    imulq %rdi, %rax
    xorq %rbx, %rax
    ret

bad:
    leaq bad_text(%rip), %rsi
    call print
    movq %rbx, %rax
    call decimal
    movl $0x64, %edx
    movb $0xfe, %al
    outb %al, %dx
    movl $100000000, %ecx
3:  decl %ecx
    jnz 3b
    ud2                             // there is no IDT

print:                              // rsi = text, ends with a zero byte
    movl $0x3f8, %edx
4:  lodsb
    testb %al, %al
    jz 5f
    outb %al, %dx
    jmp 4b
5:  ret

decimal:                            // rax in decimal, and a newline
    leaq digits_end(%rip), %rsi
    movl $10, %ecx
6:  xorl %edx, %edx
    divq %rcx
    addb $'0', %dl
    decq %rsi
    movb %dl, (%rsi)
    testq %rax, %rax
    jnz 6b
    jmp print

    .section .rodata
hello:
    .asciz "other: up\n"
tick:
    .asciz "tick "
bad_text:
    .asciz "BAD "

    .data
    .align 8
gdt:
    .quad 0
    .quad 0x00af9b000000ffff        // 0x08 ring 0, 64-bit code
    .quad 0x00cf93000000ffff        // 0x10 ring 0, data
    .quad 0x00cff3000000ffff        // 0x1b ring 3, data
    .quad 0x00affb000000ffff        // 0x23 ring 3, 64-bit code
gdt_tss:                            // 0x28
    .quad 0x0000890000000000 | (tss_end - tss - 1), 0
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .long gdt
    .skip 20
digits_end:
    .asciz "\n"
    .align 16
tss:
    .skip 102
    .word 104                       // where the I/O bitmap starts: every port is allowed
    .skip 8192
    .byte 0xff
tss_end:

    .bss
    .align 4096
pml4:
    .skip 4096
pdpt:
    .skip 4096
pd:
    .skip 4096
upper_pdpt:
    .skip 4096
upper_pd:
    .skip 4096
    .skip 4096
stack_top:

    .section .note.GNU-stack, "", @progbits
