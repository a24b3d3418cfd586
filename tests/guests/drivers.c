/* A guest that drives its virtio devices by itself, for tests with real programs: a disk (id 2) and
 * sockets (id 19) on virtio-mmio, polled, in ring 3. guest/heartbeat.S starts it.
 *
 * A round, some ms, ends with `b COUNT`. In each it reads a block of the disk, checks that it holds
 * what was written there a turn before, and writes the next; buffers go round 4 MiB of RAM, so that
 * the device comes upon pages that are missing in postcopy. Of its sockets it echoes what is sent to
 * port 5000, and connects to port 80 of the host, to which it says `hello COUNT`.
 *
 * CORRUPT: the disk holds something else. FAULT: an exception, or a device that does not go on. */

#include "heartbeat.h"

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

#define SLOTS 0xd0000000UL
#define ENTRIES 8
#define BLOCK 4096
#define AREA (4UL << 20) /* the disk's buffers; above the image and the page tables */
#define BUFFERS 1024
#define ECHO_PORT 5000
#define SERVICE_PORT 80

/* ---- Output ---- */

void service(u64 a, u64 b, u32 number);

static void outb(u32 port, u8 value) { asm volatile("outb %0, %w1" : : "a"(value), "Nd"(port)); }

static void print(const char *text)
{
    for (; *text; text++)
        outb(0x3f8, *text);
}

static void print_number(const char *text, u64 number)
{
    char digits[21], *at = digits + 20;
    *at = 0;
    do
        *--at = '0' + number % 10;
    while (number /= 10);
    print(text);
    print(at);
    print("\n");
}

static _Noreturn void stop(const char *why, u64 what)
{
    print_number(why, what);
    for (;;)
        service(0, 0, SERVICE_SLEEP);
}

void guest_fault(u64 vector, u64 error, u64 rip, u64 cr2)
{
    (void)error, (void)rip, (void)cr2;
    stop("FAULT vector ", vector);
}

/* ---- Queues ---- */

struct queue {
    struct { u64 address; u32 bytes; u16 flags, next; } descriptors[ENTRIES];
    struct { u16 flags, index, ring[ENTRIES], event; } available;
    u16 pad;
    struct { u16 flags, index; struct { u32 id, bytes; } ring[ENTRIES]; u16 event; } used;
    u64 base;
    u32 number;
    u16 seen; /* used buffers that were looked at */
} __attribute__((aligned(64)));

static void barrier(void) { asm volatile("mfence" : : : "memory"); }
static void relax(void) { asm volatile("pause" : : : "memory"); }
static u32 get(u64 base, u32 offset) { return *(volatile u32 *)(base + offset); }
static void set(u64 base, u32 offset, u32 value) { *(volatile u32 *)(base + offset) = value; }

static void set_up(struct queue *queue, u64 base, u32 number)
{
    queue->base = base;
    queue->number = number;
    queue->available.flags = 1; /* no interrupts */
    set(base, 0x30, number);
    set(base, 0x38, ENTRIES);
    set(base, 0x80, (u32)(u64)queue->descriptors);
    set(base, 0x90, (u32)(u64)&queue->available);
    set(base, 0xa0, (u32)(u64)&queue->used);
    set(base, 0x44, 1);
}

static void describe(struct queue *queue, u16 n, void *buffer, u32 bytes, u16 flags, u16 next)
{
    queue->descriptors[n].address = (u64)buffer;
    queue->descriptors[n].bytes = bytes;
    queue->descriptors[n].flags = flags;
    queue->descriptors[n].next = next;
}

static void offer(struct queue *queue, u16 head)
{
    queue->available.ring[queue->available.index % ENTRIES] = head;
    barrier();
    queue->available.index++;
    barrier();
    set(queue->base, 0x50, queue->number);
}

static int has_used(struct queue *queue) { return *(volatile u16 *)&queue->used.index != queue->seen; }

static void await_used(struct queue *queue)
{
    while (!has_used(queue)) {
        relax();
        if (get(queue->base, 0x70) & 0x40)
            stop("FAULT device that needs a reset, id ", get(queue->base, 8));
    }
    queue->seen = *(volatile u16 *)&queue->used.index;
}

/* Up to FEATURES_OK; then the queues, then DRIVER_OK. */
static void begin(u64 base, u32 features)
{
    set(base, 0x70, 1);
    set(base, 0x70, 3);
    set(base, 0x24, 0);
    set(base, 0x20, features);
    set(base, 0x24, 1);
    set(base, 0x20, 1); /* VERSION_1 */
    set(base, 0x70, 0xb);
}

static u64 find(u32 id)
{
    for (u64 base = SLOTS; base < SLOTS + 13 * 0x1000; base += 0x1000)
        if (get(base, 0) == 0x74726976 && get(base, 8) == id)
            return base;
    return 0;
}

/* ---- The disk ---- */

static struct queue disk_queue;
static u64 disk, disk_blocks;

static void disk_request(u32 kind, u64 block, void *buffer)
{
    static struct { u32 kind, reserved; u64 sector; } header;
    static u8 status;
    header.kind = kind;
    header.sector = block * (BLOCK / 512);
    status = 0xff;
    describe(&disk_queue, 0, &header, 16, 1, 1);
    if (buffer)
        describe(&disk_queue, 1, buffer, BLOCK, 1 | (kind == 0 ? 2 : 0), 2);
    describe(&disk_queue, 2, &status, 1, 2, 0);
    if (!buffer)
        disk_queue.descriptors[0].next = 2;
    offer(&disk_queue, 0);
    await_used(&disk_queue);
    if (*(volatile u8 *)&status)
        stop("FAULT disk request of kind ", kind);
}

static u64 word(u64 round, u64 n) { return (round << 20 | n) * 0x9e3779b97f4a7c15UL; }

static void disk_round(u64 round)
{
    u64 block = round % disk_blocks;
    u64 *words = (u64 *)(AREA + round % BUFFERS * BLOCK);
    disk_request(0, block, words);
    if (round > disk_blocks)
        for (u64 n = 0; n < BLOCK / 8; n++)
            if (words[n] != word(round - disk_blocks, n)) {
                print_number("disk: found ", words[n]);
                print_number("disk: wanted ", word(round - disk_blocks, n));
                print_number("disk: at word ", n);
                stop("CORRUPT disk in round ", round);
            }
    for (u64 n = 0; n < BLOCK / 8; n++)
        words[n] = word(round, n);
    disk_request(1, block, words);
    if (round % 16 == 0)
        disk_request(4, 0, 0);
}

/* ---- Sockets ---- */

struct packet {
    u64 src_cid, dst_cid;
    u32 src_port, dst_port, bytes;
    u16 type, op;
    u32 flags, room, forwarded;
    u8 data[2048];
} __attribute__((packed));

enum { REQUEST = 1, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST };
#define HEADER 44

static struct queue receive_queue, transmit_queue, event_queue;
static struct packet incoming[ENTRIES], outgoing;
static u32 events[ENTRIES];
static u64 sockets, cid;
/* What has come of each stream, by the low bits of the host's port: a few at a time. */
static u32 forwarded[64];
static u32 own_port = 1000, greetings, refused;

static void say(u32 host_port, u32 own, u16 op, const u8 *data, u32 bytes)
{
    outgoing.src_cid = cid;
    outgoing.dst_cid = 2;
    outgoing.src_port = own;
    outgoing.dst_port = host_port;
    outgoing.bytes = bytes;
    outgoing.type = 1;
    outgoing.op = op;
    outgoing.flags = 0;
    outgoing.room = 65536;
    outgoing.forwarded = forwarded[host_port % 64];
    for (u32 n = 0; n < bytes; n++)
        outgoing.data[n] = data[n];
    describe(&transmit_queue, 0, &outgoing, HEADER + bytes, 0, 0);
    offer(&transmit_queue, 0);
    await_used(&transmit_queue);
}

static void dial(void)
{
    own_port++;
    refused = 0;
    forwarded[SERVICE_PORT % 64] = 0;
    say(SERVICE_PORT, own_port, REQUEST, 0, 0);
}

static void hear(struct packet *packet)
{
    u32 host = packet->src_port, own = packet->dst_port;
    if (packet->op == REQUEST) {
        forwarded[host % 64] = 0;
        say(host, own, own == ECHO_PORT ? RESPONSE : RST, 0, 0);
    } else if (packet->op == RESPONSE) {
        u8 hello[] = "hello 0\n";
        hello[6] += ++greetings % 10;
        print("vsock: connected\n");
        say(host, own, RW, hello, sizeof hello - 1);
    } else if (packet->op == RW) {
        forwarded[host % 64] += packet->bytes;
        say(host, own, own == ECHO_PORT ? RW : CREDIT_UPDATE, packet->data, own == ECHO_PORT ? packet->bytes : 0);
    } else if (packet->op == SHUTDOWN) {
        say(host, own, RST, 0, 0);
    } else if (packet->op == CREDIT_REQUEST) {
        say(host, own, CREDIT_UPDATE, 0, 0);
    } else if (packet->op == RST && host == SERVICE_PORT && own == own_port) {
        refused = 1;
    }
}

static void sockets_poll(void)
{
    while (has_used(&event_queue)) {
        u16 head = event_queue.used.ring[event_queue.seen++ % ENTRIES].id;
        cid = get(sockets, 0x100);
        print_number("vsock: reset, cid ", cid);
        dial();
        offer(&event_queue, head);
    }
    while (has_used(&receive_queue)) {
        u16 head = receive_queue.used.ring[receive_queue.seen++ % ENTRIES].id;
        hear(&incoming[head]);
        offer(&receive_queue, head);
    }
}

static void sockets_begin(void)
{
    begin(sockets, 0);
    set_up(&receive_queue, sockets, 0);
    set_up(&transmit_queue, sockets, 1);
    set_up(&event_queue, sockets, 2);
    set(sockets, 0x70, 0xf);
    cid = get(sockets, 0x100);
    for (u16 n = 0; n < ENTRIES; n++) {
        describe(&receive_queue, n, &incoming[n], sizeof incoming[n], 2, 0);
        offer(&receive_queue, n);
        describe(&event_queue, n, &events[n], 4, 2, 0);
        offer(&event_queue, n);
    }
    dial();
}

/* ---- All of it ---- */

void guest_main(u32 id, const void *info)
{
    (void)id, (void)info;
    disk = find(2);
    sockets = find(19);
    if (disk) {
        begin(disk, 1 << 9); /* FLUSH */
        set_up(&disk_queue, disk, 0);
        set(disk, 0x70, 0xf);
        disk_blocks = get(disk, 0x100) / (BLOCK / 512);
        print_number("disk: blocks ", disk_blocks);
    }
    if (sockets)
        sockets_begin();
    for (u64 round = 1;; round++) {
        if (disk)
            disk_round(round);
        for (u32 n = 0; n < 20000; n++) {
            relax();
            if (sockets)
                sockets_poll();
        }
        if (sockets && refused && round % 8 == 0)
            dial();
        print_number("b ", round);
    }
}
