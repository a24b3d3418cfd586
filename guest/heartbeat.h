/* Shared by heartbeat.S (ring 0) and heartbeat.c (ring 3). */

#define MAX_VCPUS 64
#define MAX_RAM_GIB 64

/* Guest-physical addresses, identity-mapped. */
#define AP_TRAMPOLINE 0x8000 /* start-up IPI vector 8 */
#define PAGE_TABLES 0x200000 /* PML4, PDPT, up to MAX_RAM_GIB directories */
#define TABLES 0x300000      /* visit counts; the filled area follows */
#define LAPIC_BASE 0xfee00000

#define RING0_STACK_SHIFT 8
#define RING3_STACK_SHIFT 12

/* What only ring 0 can do: service(a, b, number). */
#define SERVICE_SLEEP 0    /* never comes back */
#define SERVICE_SHUTDOWN 1 /* triple fault */
#define SERVICE_CPUID 2    /* a = address of four 32-bit words, b = leaf */
#define SERVICE_WRMSR 3    /* a = value, b = MSR */
