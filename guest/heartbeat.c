/* Built-in trial guest, ring 3: fills memory, dirties a working set, checks every page on every
 * visit and prints a heartbeat. README.md documents the parameters and the output.
 *
 * Nothing here may depend on the TSC being continuous: a migration makes it jump, either way. */

#include "heartbeat.h"

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long u64;
typedef long s64;

#define PAGE 4096UL
#define WORDS (PAGE / sizeof(u64))
#define MIB (1UL << 20)

/* ---- The machine ---- */

extern const u8 ap_trampoline[], ap_trampoline_end[], image_end[];
void service(u64 a, u64 b, u32 number);

static void outb(u32 port, u8 value) { asm volatile("outb %0, %w1" : : "a"(value), "Nd"(port)); }

static u8 inb(u32 port)
{
    u8 value;
    asm volatile("inb %w1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static u64 rdtsc(void)
{
    u32 low, high;
    asm volatile("rdtsc" : "=a"(low), "=d"(high));
    return (u64)high << 32 | low;
}

static void cpu_relax(void) { asm volatile("pause" : : : "memory"); }

static _Noreturn void sleep_for_ever(void)
{
    for (;;)
        service(0, 0, SERVICE_SLEEP);
}

static u64 tsc_khz = 2000000;

/* Busy-waits. Measures steps, each bounded, so that a jump of the TSC cannot make it last. */
static void delay_us(u64 us)
{
    u64 want = us * tsc_khz / 1000, step = tsc_khz / 100, waited = 0, last = rdtsc();
    while (waited < want) {
        cpu_relax();
        u64 now = rdtsc();
        u64 passed = now - last;
        waited += passed < step ? passed : step;
        last = now;
    }
}

/* ---- Configuration ---- */

enum pattern { ZERO, COMPRESSIBLE, RANDOM };
static const char *const pattern_names[] = {"zero", "compressible", "random", 0};
enum order { SEQ, SHUFFLE };
static const char *const order_names[] = {"seq", "random", 0};
enum place { START, SPREAD };
static const char *const place_names[] = {"start", "spread", 0};

static struct {
    u64 fill, ws; /* bytes; 0 = default */
    u64 rate;     /* pages/ms over all vCPUs; 0 = no limit */
    u64 beat_ms, status_ms, vcpus, stop_after, seed, tsc_khz, kvmclock;
    u64 scan; /* cold pages checked per visit */
    u64 pattern, order, place;
} cfg = {
    .rate = 10,
    .beat_ms = 2,
    .status_ms = 500,
    .vcpus = 1,
    .seed = 1,
    .scan = ~0UL,
    .pattern = RANDOM,
};

static const struct parameter {
    const char *name;
    u64 *value;
    const char *const *choices; /* 0 = a number, with K, M or G */
} parameters[] = {
    {"fill", &cfg.fill, 0},
    {"ws", &cfg.ws, 0},
    {"rate", &cfg.rate, 0},
    {"beat", &cfg.beat_ms, 0},
    {"status", &cfg.status_ms, 0},
    {"vcpus", &cfg.vcpus, 0},
    {"stop_after", &cfg.stop_after, 0},
    {"seed", &cfg.seed, 0},
    {"scan", &cfg.scan, 0},
    {"tsc_khz", &cfg.tsc_khz, 0},
    {"kvmclock", &cfg.kvmclock, 0},
    {"pattern", &cfg.pattern, pattern_names},
    {"order", &cfg.order, order_names},
    {"place", &cfg.place, place_names},
};

/* ---- Shared state ---- */

/* Usable RAM above the visit counts, in whole pages: what fill page numbers count through. */
#define MAX_SEGMENTS 8
static struct segment {
    u64 base, pages;
} segments[MAX_SEGMENTS];
static u32 segment_count;

static u64 fill_pages, ws_pages, ws_stride;
static u32 *const visits = (u32 *)TABLES; /* per working-set page */
static const char *tsc_source = "guessed";

/* Each vCPU writes only its own; vCPU 0 reads them all. */
static struct vcpu {
    volatile u64 alive, filled, loops, dirtied, checked, passes, cold_passes, max_gap, gap_round;
    u64 last_tsc;
} __attribute__((aligned(128))) vcpus[MAX_VCPUS];

static volatile u32 go;        /* set once every vCPU is there and the slices are known */
static volatile u32 stopping;  /* set by the vCPU that ends the guest */
static volatile u64 gap_round; /* a new round starts the largest gaps afresh */

static u32 exchange(volatile u32 *where, u32 value)
{
    asm volatile("xchgl %0, %1" : "+r"(value), "+m"(*where) : : "memory");
    return value;
}

/* Notes the longest time in which this vCPU did nothing, as its own TSC shows it. */
static u64 tick(struct vcpu *me)
{
    u64 now = rdtsc();
    s64 gap = (s64)(now - me->last_tsc);
    me->last_tsc = now;
    if (me->gap_round != gap_round) {
        me->gap_round = gap_round;
        me->max_gap = 0;
    }
    if (gap > (s64)me->max_gap)
        me->max_gap = gap;
    return now;
}

/* ---- Serial output ---- */

#define COM1 0x3f8
#define LSR_THR_EMPTY 0x20
#define LSR_ALL_SENT 0x40

static volatile u32 serial_lock;
static u32 serial_vcpu;
static u32 fifo_room;

/* Every access is an exit, so the FIFO is asked for room only every 16 bytes, and not for ever: a
 * console that nobody reads may lose bytes but not stop the guest. */
static void put(char c)
{
    if (fifo_room == 0) {
        for (u32 i = 0; i < 100 && !(inb(COM1 + 5) & LSR_THR_EMPTY); i++)
            delay_us(50);
        fifo_room = 16;
    }
    outb(COM1, c);
    fifo_room--;
    tick(&vcpus[serial_vcpu]);
}

static void text(const char *s)
{
    while (*s)
        put(*s++);
}

static void number(const char *label, u64 value)
{
    char digits[20];
    u32 n = 0;
    text(label);
    do
        digits[n++] = '0' + value % 10;
    while (value /= 10);
    while (n)
        put(digits[--n]);
}

static void hex(const char *label, u64 value)
{
    u32 shift = 60;
    text(label);
    text("0x");
    while (shift && !(value >> shift))
        shift -= 4;
    for (;; shift -= 4) {
        put("0123456789abcdef"[value >> shift & 15]);
        if (!shift)
            break;
    }
}

/* Lines of different vCPUs do not mix. A holder that got stuck must not silence the others. */
static void begin_line(u32 vcpu)
{
    for (u32 i = 0; i < 10000 && exchange(&serial_lock, 1); i++)
        delay_us(100);
    serial_vcpu = vcpu;
}

static void end_line(void)
{
    put('\n');
    serial_lock = 0;
}

static void line(u32 vcpu, const char *s)
{
    begin_line(vcpu);
    text(s);
    end_line();
}

/* ---- The end ---- */

static _Noreturn void reset(void)
{
    for (u32 i = 0; i < 1000 && !(inb(COM1 + 5) & LSR_ALL_SENT); i++)
        delay_us(50);
    outb(0x64, 0xfe); /* i8042: pulse the reset line */
    delay_us(20000);
    service(0, 0, SERVICE_SHUTDOWN);
    sleep_for_ever();
}

/* Only one vCPU ends the guest; returns in that one. */
static void stop_all(void)
{
    if (exchange(&stopping, 1))
        sleep_for_ever();
}

void guest_fault(u64 vector, u64 error, u64 rip, u64 cr2)
{
    u32 vcpu = *(volatile u32 *)(LAPIC_BASE + 0x20) >> 24;
    stop_all();
    begin_line(vcpu);
    number("FAULT vcpu=", vcpu);
    number(" vector=", vector);
    hex(" error=", error);
    hex(" rip=", rip);
    hex(" cr2=", cr2);
    end_line();
    reset();
}

/* ---- Page contents: a function of seed, page number, visit and pattern ---- */

static u64 mix(u64 x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
}

struct content {
    u64 pattern, head, tag;
};

static struct content content_of(u64 page, u32 visit)
{
    struct content c = {
        /* With zero, every second visit leaves a zero page: one that was not zero before. */
        .pattern = cfg.pattern == ZERO && (visit & 1) ? COMPRESSIBLE : cfg.pattern,
        .head = (u64)visit << 32 | (u32)page,
        .tag = mix(mix(cfg.seed + page) + visit),
    };
    return c;
}

static inline u64 content_word(struct content c, u64 i)
{
    static const u64 filler[4] = {
        0x7262747261656820, 0x206c616972742074, 0x7474657320656761, 0x0a2e676e696c2020};
    if (c.pattern == ZERO)
        return 0;
    if (i == 0)
        return c.head;
    if (c.pattern == RANDOM || (i & 7) == 0) {
        u64 x = c.tag + i * 0x9e3779b97f4a7c15;
        return (x ^ x >> 32) * 0xd6e8feb86659fd93;
    }
    /* Half of every 64-byte line depends on the tag, an eighth does not compress. */
    return (i & 7) < 4 ? c.tag : filler[i & 3];
}

static inline void write_as(volatile u64 *words, struct content c)
{
    for (u64 i = 0; i < WORDS; i++)
        words[i] = content_word(c, i);
}

/* Index of the first word that is not as it should be, WORDS if none; what was found there. */
struct mismatch {
    u64 word, found;
};

static inline struct mismatch check_as(volatile u64 *words, struct content c)
{
    for (u64 i = 0; i < WORDS; i++) {
        u64 found = words[i];
        if (found != content_word(c, i))
            return (struct mismatch){i, found};
    }
    return (struct mismatch){WORDS, 0};
}

/* One loop for each pattern: a test of the pattern for every word would cost more than the word. */
#define BY_PATTERN(function, words, c)                                          \
    ((c).pattern == ZERO ? function(words, (struct content){ZERO, 0, 0})        \
     : (c).pattern == RANDOM                                                    \
         ? function(words, (struct content){RANDOM, (c).head, (c).tag})         \
         : function(words, (struct content){COMPRESSIBLE, (c).head, (c).tag}))

static volatile u64 *page_words(u64 page)
{
    u32 s = 0;
    while (page >= segments[s].pages)
        page -= segments[s++].pages;
    return (volatile u64 *)(segments[s].base + page * PAGE);
}

static void write_page(u64 page, u32 visit)
{
    struct content c = content_of(page, visit);
    BY_PATTERN(write_as, page_words(page), c);
}

static _Noreturn void corrupt(u32 vcpu, u64 page, u32 visit, struct mismatch bad)
{
    volatile u64 *words = page_words(page);
    struct content c = content_of(page, visit);
    u64 bad_words = 0;

    stop_all();
    for (u64 i = 0; i < WORDS; i++)
        bad_words += words[i] != content_word(c, i);
    begin_line(vcpu);
    number("CORRUPT vcpu=", vcpu);
    number(" page=", page);
    hex(" addr=", (u64)&words[bad.word]);
    hex(" expected=", content_word(c, bad.word));
    hex(" found=", bad.found);
    /* For the person who looks for the bug: a stale page names the visit it stems from. */
    hex(" now=", words[bad.word]);
    number(" visit=", visit);
    number(" bad_words=", bad_words);
    hex(" head=", words[0]);
    end_line();
    reset();
}

static void check_page(struct vcpu *me, u64 page, u32 visit)
{
    struct content c = content_of(page, visit);
    struct mismatch bad = BY_PATTERN(check_as, page_words(page), c);
    if (bad.word != WORDS)
        corrupt(me - vcpus, page, visit, bad);
    me->checked++;
}

/* ---- Which pages are whose ---- */

/* Fill page number of a working-set page: the first ones, or every ws_stride-th. */
static u64 ws_page(u64 index) { return index * ws_stride; }

/* Fill page number of a page outside the working set. */
static u64 cold_page(u64 index)
{
    u64 between = ws_stride - 1, mixed = between * ws_pages;
    return index < mixed ? index / between * ws_stride + 1 + index % between : index + ws_pages;
}

struct slice {
    u64 start, count;
};

static struct slice slice_of(u64 total, u64 vcpu)
{
    u64 start = total * vcpu / cfg.vcpus;
    return (struct slice){start, total * (vcpu + 1) / cfg.vcpus - start};
}

/* A permutation of 0..count, another one for every pass: a bijection on the next power of two,
 * applied until the result is in range. */
static u64 shuffled(u64 position, u64 count, u64 pass)
{
    u32 bits = 64 - __builtin_clzl(count);
    u64 mask = (1UL << bits) - 1, x = position;
    do {
        for (u32 round = 0; round < 3; round++) {
            x = (x * 0x9e3779b97f4a7c15 + mix(pass + round)) & mask;
            x ^= x >> (bits / 2 + 1);
        }
    } while (x >= count);
    return x;
}

/* ---- Time ---- */

#define MSR_KVM_SYSTEM_TIME 0x4b564d01

/* Virtual machine interface "kvmclock", as Linux' pvclock-abi.h has it. */
static volatile struct {
    u32 version, pad;
    u64 tsc_timestamp, system_time;
    u32 mul;
    signed char shift;
    u8 flags, pad2[2];
} pvclock __attribute__((aligned(64)));

static u64 pvclock_ns(void)
{
    for (;;) {
        u32 version = pvclock.version;
        u64 delta = rdtsc() - pvclock.tsc_timestamp;
        signed char shift = pvclock.shift;
        delta = shift < 0 ? delta >> -shift : delta << shift;
        u64 ns = pvclock.system_time + (u64)((unsigned __int128)delta * pvclock.mul >> 32);
        if (!(version & 1) && version == pvclock.version)
            return ns;
    }
}

static u64 khz_from_cpuid(void)
{
    u32 r[4];
    service((u64)r, 1, SERVICE_CPUID);
    int hypervisor = r[2] >> 31;
    service((u64)r, 0x40000000, SERVICE_CPUID);
    if (hypervisor && r[0] >= 0x40000010 && r[0] < 0x40010000) {
        service((u64)r, 0x40000010, SERVICE_CPUID);
        if (r[0])
            return r[0];
    }
    service((u64)r, 0, SERVICE_CPUID);
    u32 max = r[0];
    if (max >= 0x15) {
        service((u64)r, 0x15, SERVICE_CPUID);
        u64 denominator = r[0], numerator = r[1], crystal_hz = r[2];
        if (denominator && numerator && crystal_hz)
            return crystal_hz / 1000 * numerator / denominator;
        if (denominator && numerator && max >= 0x16) {
            service((u64)r, 0x16, SERVICE_CPUID); /* the TSC runs at the base frequency, MHz */
            return r[0] * 1000UL;
        }
    }
    return 0;
}

static int has_kvmclock(void)
{
    u32 r[4];
    service((u64)r, 1, SERVICE_CPUID);
    if (!(r[2] >> 31))
        return 0;
    service((u64)r, 0x40000000, SERVICE_CPUID);
    if (r[1] != 0x4b4d564b) /* "KVMK" */
        return 0;
    service((u64)r, 0x40000001, SERVICE_CPUID);
    return r[0] >> 3 & 1;
}

static u64 khz_from_kvmclock(void)
{
    if (!has_kvmclock())
        return 0;
    service((u64)&pvclock | 1, MSR_KVM_SYSTEM_TIME, SERVICE_WRMSR);
    u64 khz = pvclock.mul ? (1000000UL << 32) / pvclock.mul : 0;
    s64 shift = pvclock.shift;
    if (!cfg.kvmclock)
        service(0, MSR_KVM_SYSTEM_TIME, SERVICE_WRMSR);
    return shift < 0 ? khz << -shift : khz >> shift;
}

/* Channel 2 of the PIT counts down 20 ms. */
static u64 khz_from_pit(void)
{
    u32 ticks = 1193182 / 50, polls = 0;
    outb(0x61, (inb(0x61) & ~2) | 1); /* gate on, speaker off */
    outb(0x43, 0xb0);                 /* channel 2, both bytes, mode 0 */
    outb(0x42, ticks & 0xff);
    u64 start = rdtsc();
    outb(0x42, ticks >> 8);
    while (!(inb(0x61) & 0x20))
        if (++polls == 100000)
            return 0;
    return polls > 2 ? (rdtsc() - start) / 20 : 0;
}

static void find_tsc_khz(void)
{
    static const struct {
        const char *name;
        u64 (*khz)(void);
    } sources[] = {{"cpuid", khz_from_cpuid}, {"kvmclock", khz_from_kvmclock}, {"pit", khz_from_pit}};

    if (cfg.tsc_khz) {
        tsc_khz = cfg.tsc_khz;
        tsc_source = "cmdline";
        return;
    }
    for (u32 i = 0; i < sizeof sources / sizeof *sources; i++) {
        u64 khz = sources[i].khz();
        if (khz) {
            tsc_khz = khz;
            tsc_source = sources[i].name;
            return;
        }
    }
}

/* ---- Start ---- */

static void bad_parameter(const char *start, const char *end)
{
    begin_line(0);
    text("heartbeat: bad value: ");
    while (start < end)
        put(*start++);
    end_line();
}

static void parse_value(const struct parameter *p, const char *value, const char *end,
                        const char *whole)
{
    if (p->choices) {
        for (u64 i = 0; p->choices[i]; i++) {
            const char *a = p->choices[i], *b = value;
            while (b < end && *a == *b)
                a++, b++;
            if (b == end && !*a) {
                *p->value = i;
                return;
            }
        }
        bad_parameter(whole, end);
        return;
    }
    u64 n = 0;
    const char *c = value;
    while (c < end && *c >= '0' && *c <= '9')
        n = n * 10 + (*c++ - '0');
    if (c > value && c < end) {
        u32 shift = (*c | 32) == 'k' ? 10 : (*c | 32) == 'm' ? 20 : (*c | 32) == 'g' ? 30 : 0;
        n <<= shift;
        c += shift != 0;
    }
    if (c == value || c != end)
        bad_parameter(whole, end);
    else
        *p->value = n;
}

static void parse_cmdline(const char *c)
{
    while (*c) {
        while (*c == ' ')
            c++;
        const char *end = c;
        while (*end && *end != ' ')
            end++;
        for (u32 i = 0; i < sizeof parameters / sizeof *parameters; i++) {
            const char *name = parameters[i].name, *at = c;
            while (*name && *at == *name)
                at++, name++;
            if (!*name && *at == '=')
                parse_value(&parameters[i], at + 1, end, c);
        }
        c = end;
    }
}

/* The parts of Xen's hvm_start_info (version 1) that matter here. */
struct start_info {
    u32 magic, version, flags, nr_modules;
    u64 modlist, cmdline, rsdp, memmap;
    u32 memmap_entries;
};

struct memmap_entry {
    u64 base, size;
    u32 type, pad;
};

static u64 min(u64 a, u64 b) { return a < b ? a : b; }

/* Chooses fill and working set, and where the filled area lies: above the visit counts of the
 * working set, in all RAM there is. */
static void lay_out_memory(const struct start_info *info)
{
    struct memmap_entry ram[MAX_SEGMENTS];
    u32 count = 0;
    u64 top = (u64)MAX_RAM_GIB << 30, above_image = 0;
    const struct memmap_entry *map = (const struct memmap_entry *)info->memmap;

    for (u32 i = 0; i < info->memmap_entries && count < MAX_SEGMENTS; i++)
        if (map[i].type == 1 && map[i].base + map[i].size > TABLES && map[i].base < top) {
            u64 end = min(map[i].base + map[i].size, top);
            ram[count].base = map[i].base > TABLES ? map[i].base : TABLES;
            ram[count].size = end - ram[count].base;
            above_image += ram[count++].size;
        }

    u64 fill = min(cfg.fill ? cfg.fill : above_image / 2, above_image);
    u64 ws = min(cfg.ws ? cfg.ws : 64 * MIB, fill);
    u64 first = TABLES + (ws / PAGE * sizeof(u32) + 2 * MIB - 1) / (2 * MIB) * (2 * MIB);
    u64 usable = 0;
    for (u32 i = 0; i < count; i++) {
        u64 end = (ram[i].base + ram[i].size) & ~(PAGE - 1);
        u64 base = ram[i].base > first ? (ram[i].base + PAGE - 1) & ~(PAGE - 1) : first;
        if (base < end) {
            segments[segment_count++] = (struct segment){base, (end - base) / PAGE};
            usable += (end - base) / PAGE;
        }
    }
    fill_pages = min(fill / PAGE, usable);
    ws_pages = min(ws / PAGE, fill_pages);
    ws_stride = cfg.place == SPREAD && ws_pages ? fill_pages / ws_pages : 1;
}

/* INIT, start-up IPI, start-up IPI, one vCPU after the other, by APIC id. */
static int start_vcpu(u32 id)
{
    volatile u32 *icr_low = (u32 *)(LAPIC_BASE + 0x300), *icr_high = (u32 *)(LAPIC_BASE + 0x310);

    *icr_high = id << 24;
    *icr_low = 0x4500;
    delay_us(10000);
    for (u32 attempt = 0; attempt < 2; attempt++) {
        *icr_high = id << 24;
        *icr_low = 0x4600 | AP_TRAMPOLINE >> 12;
        for (u32 i = 0; i < (attempt ? 20000 : 50) && !vcpus[id].alive; i++)
            delay_us(100);
        if (vcpus[id].alive)
            return 1;
    }
    return 0;
}

static void start_other_vcpus(void)
{
    volatile u8 *to = (u8 *)AP_TRAMPOLINE;
    for (const u8 *from = ap_trampoline; from < ap_trampoline_end;)
        *to++ = *from++;

    /* Enable the local APIC by software first. KVM may not know the vCPU that was created last as
     * a target until something changes in a local APIC. */
    *(volatile u32 *)(LAPIC_BASE + 0xf0) = 0x1ff;

    cfg.vcpus = cfg.vcpus ? min(cfg.vcpus, MAX_VCPUS) : 1;
    for (u32 id = 1; id < cfg.vcpus; id++)
        if (!start_vcpu(id)) {
            begin_line(0);
            number("heartbeat: CPU ", id);
            text(" did not start");
            end_line();
            cfg.vcpus = id;
        }
}

static void print_configuration(void)
{
    begin_line(0);
    number("heartbeat: guest up, ", cfg.vcpus);
    number(" vcpus, fill ", fill_pages);
    number(" pages, ws ", ws_pages);
    number(" pages, rate ", cfg.rate);
    text(" pages/ms, pattern ");
    text(pattern_names[cfg.pattern]);
    text(", order ");
    text(order_names[cfg.order]);
    text(", place ");
    text(place_names[cfg.place]);
    number(", tsc ", tsc_khz);
    text(" kHz (");
    text(tsc_source);
    text(")");
    end_line();
}

/* ---- The heartbeat, on vCPU 0 ---- */

static struct {
    u64 guest_time, last_tsc; /* TSC ticks in which this loop ran: jumps left out */
    u64 next_beat, next_status, beats, verified, last_ns;
    struct {
        u64 loops, moved_at, stalled;
    } seen[MAX_VCPUS];
} monitor;

/* Has `next` come? Advances it by `period`, and starts afresh from `now` when the TSC jumped. */
static int due(u64 *next, u64 now, u64 period)
{
    s64 late = (s64)(now - *next);
    if (late < 0 && late >= -(s64)period)
        return 0;
    *next = late < 0 || late > 4 * (s64)period ? now + period : *next + period;
    return 1;
}

static u64 watch_vcpus(void)
{
    u64 live = 1;
    for (u32 id = 1; id < cfg.vcpus; id++) {
        u64 loops = vcpus[id].loops, was_stalled = monitor.seen[id].stalled;
        if (loops != monitor.seen[id].loops) {
            monitor.seen[id].loops = loops;
            monitor.seen[id].moved_at = monitor.guest_time;
            monitor.seen[id].stalled = 0;
        } else if (monitor.guest_time - monitor.seen[id].moved_at > 1000 * tsc_khz) {
            monitor.seen[id].stalled = 1;
        }
        if (monitor.seen[id].stalled != was_stalled) {
            begin_line(0);
            number("CPU ", id);
            text(was_stalled ? " RUNNING" : " STALLED");
            end_line();
        }
        live += !monitor.seen[id].stalled;
    }
    return live;
}

static void check_clock(void)
{
    if (!cfg.kvmclock || !pvclock.mul)
        return;
    u64 ns = pvclock_ns();
    if (ns < monitor.last_ns) {
        begin_line(0);
        number("CLOCK BACK us=", (monitor.last_ns - ns) / 1000);
        end_line();
    }
    monitor.last_ns = ns;
}

static void print_status(u64 live)
{
    u64 dirtied = 0, checked = 0, passes = ~0UL, verified = ~0UL, gap = 0;
    for (u32 id = 0; id < cfg.vcpus; id++) {
        struct vcpu *v = &vcpus[id];
        dirtied += v->dirtied;
        checked += v->checked;
        passes = min(passes, v->passes);
        verified = min(verified, min(v->passes, v->cold_passes));
        gap = v->max_gap > gap && v->gap_round == gap_round ? v->max_gap : gap;
    }
    gap_round++;
    if (!fill_pages)
        passes = verified = 0;
    begin_line(0);
    number("s b=", monitor.beats);
    number(" d=", dirtied);
    number(" c=", checked);
    number(" p=", passes);
    number(" g=", gap * 1000 / tsc_khz);
    number(" n=", live);
    if (cfg.kvmclock && pvclock.mul)
        number(" k=", monitor.last_ns / 1000000);
    end_line();
    if (verified > monitor.verified) {
        monitor.verified = verified;
        begin_line(0);
        number("verified all pass ", verified);
        end_line();
    }
}

static void keep_time(u64 now)
{
    s64 passed = (s64)(now - monitor.last_tsc);
    u64 most = 20 * tsc_khz;
    monitor.last_tsc = now;
    monitor.guest_time += passed < 0 ? 0 : min(passed, most);
}

static void beat(u64 now)
{
    keep_time(now);
    if (!due(&monitor.next_beat, now, cfg.beat_ms * tsc_khz))
        return;
    check_clock();
    begin_line(0);
    number("b ", ++monitor.beats);
    end_line();
    u64 live = watch_vcpus();
    if (due(&monitor.next_status, now, cfg.status_ms * tsc_khz))
        print_status(live);
    if (monitor.beats == cfg.stop_after) {
        stop_all();
        print_status(live);
        line(0, "heartbeat: done");
        reset();
    }
}

/* ---- What every vCPU does ---- */

static void fill(struct vcpu *me, struct slice ws, struct slice cold)
{
    for (u64 i = 0; i < ws.count; i++, me->loops++) {
        visits[ws.start + i] = 0;
        write_page(ws_page(ws.start + i), 0);
        tick(me);
    }
    for (u64 i = 0; i < cold.count; i++, me->loops++) {
        write_page(cold_page(cold.start + i), 0);
        tick(me);
    }
    me->filled = 1;
}

static void wait_until_all_filled(struct vcpu *me)
{
    for (u32 id = 0; id < cfg.vcpus; id++)
        while (!vcpus[id].filled && !stopping) {
            cpu_relax();
            me->loops++;
            u64 now = tick(me);
            if (me == vcpus) {
                keep_time(now);
                watch_vcpus();
            }
        }
    if (me == vcpus) {
        begin_line(0);
        number("heartbeat: filled ", fill_pages);
        text(" pages");
        end_line();
    }
}

/* Checks a working-set page and writes it anew. Every page is visited once in a pass, so its count
 * must be the number of the pass, which this vCPU knows without looking at memory. */
static void visit_page(struct vcpu *me, u64 index, u32 pass)
{
    u64 page = ws_page(index);
    u32 count = *(volatile u32 *)&visits[index];
    if (count != pass) {
        stop_all();
        begin_line(me - vcpus);
        number("CORRUPT vcpu=", me - vcpus);
        number(" page=", page);
        hex(" addr=", (u64)&visits[index]);
        hex(" expected=", pass);
        hex(" found=", count);
        text(" visit count");
        end_line();
        reset();
    }
    check_page(me, page, count);
    *(volatile u32 *)&visits[index] = count + 1;
    write_page(page, count + 1);
    me->dirtied++;
}

static _Noreturn void work(struct vcpu *me, struct slice ws, struct slice cold)
{
    u64 position = 0, cold_position = 0, pass = 0, cold_pass = 0;
    u64 interval = cfg.rate ? tsc_khz * cfg.vcpus / cfg.rate : 0, next = rdtsc();

    /* A slice of nothing has passed every check. */
    me->passes = ws.count ? 0 : ~0UL;
    me->cold_passes = cold.count && cfg.scan ? 0 : ~0UL;

    while (!stopping) {
        u64 now = tick(me);
        me->loops++;
        if (me == vcpus)
            beat(now);
        if (interval) {
            s64 late = (s64)(now - next);
            if (late < 0 && late >= -(s64)interval) {
                cpu_relax();
                continue;
            }
            /* After a pause or a jump: start afresh, do not catch up with what was missed. */
            if (late < 0 || late > (s64)(20 * tsc_khz))
                next = now;
            next += interval;
        }
        if (ws.count) {
            u64 at = cfg.order == SHUFFLE ? shuffled(position, ws.count, pass) : position;
            visit_page(me, ws.start + at, pass);
            if (++position == ws.count) {
                position = 0;
                me->passes = ++pass;
            }
        }
        for (u64 i = 0; i < cfg.scan && cold.count; i++) {
            check_page(me, cold_page(cold.start + cold_position), 0);
            if (++cold_position == cold.count) {
                cold_position = 0;
                me->cold_passes = ++cold_pass;
            }
        }
    }
    sleep_for_ever();
}

void guest_main(u32 id, const struct start_info *info)
{
    struct vcpu *me = &vcpus[id];

    me->last_tsc = rdtsc();
    me->alive = 1;
    if (id == 0) {
        outb(COM1 + 2, 1); /* FIFO on */
        parse_cmdline((const char *)info->cmdline);
        if (cfg.scan == ~0UL)
            cfg.scan = cfg.rate ? 4 : 1;
        if (!cfg.beat_ms)
            cfg.beat_ms = 1;
        find_tsc_khz();
        if (cfg.kvmclock && !pvclock.mul)
            khz_from_kvmclock();
        lay_out_memory(info); /* before low memory is written to */
        start_other_vcpus();
        print_configuration();
        go = 1;
    }
    while (!go)
        cpu_relax();

    struct slice ws = slice_of(ws_pages, id), cold = slice_of(fill_pages - ws_pages, id);
    fill(me, ws, cold);
    wait_until_all_filled(me);
    work(me, ws, cold);
}
