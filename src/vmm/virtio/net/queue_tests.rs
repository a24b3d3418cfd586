//! A driver, written against guest memory: what it puts out, and what it finds.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_HDR_F_DATA_VALID,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::{GuestPhysAddr, RamMap, RamPages, RamRegion};
use crate::sys::tap::VNET_HEADER_BYTES;
use crate::vmm::memory::GuestRam;

const SIZE: u16 = 8;
const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const DATA: u64 = 0x1_0000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

struct Driver {
    ram: GuestRam,
    queue: Queue,
    available: u16,
}

impl Driver {
    fn new() -> Self {
        let region = RamRegion { start: GuestPhysAddr(0), bytes: 2 << 20 };
        let ram = GuestRam::new(RamMap::new(vec![region]).unwrap(), "a test", RamPages::Small).unwrap();
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_desc_table_address(Some(TABLE as u32), None);
        queue.set_avail_ring_address(Some(AVAILABLE as u32), None);
        queue.set_used_ring_address(Some(USED as u32), None);
        queue.set_ready(true);
        Self { ram, queue, available: 0 }
    }

    fn put<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.ram.memory().write_obj(value, GuestAddress(at)).unwrap();
    }

    fn get<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.ram.memory().read_obj(GuestAddress(at)).unwrap()
    }

    fn bytes(&self, at: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.ram.memory().read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn describe(&self, n: u16, address: u64, length: u32, flags: u16, next: u16) {
        let at = TABLE + 16 * u64::from(n);
        self.put(at, address);
        self.put(at + 8, length);
        self.put(at + 12, flags);
        self.put(at + 14, next);
    }

    fn offer(&mut self, head: u16) {
        self.put(AVAILABLE + 4 + 2 * u64::from(self.available % SIZE), head);
        self.available = self.available.wrapping_add(1);
        self.put(AVAILABLE + 2, self.available);
    }

    /// Offers buffer `n` of `length` bytes, for the device to write to, at its own page.
    fn buffer(&mut self, n: u16, length: u32) -> u64 {
        let at = DATA + 0x1000 * u64::from(n);
        self.describe(n, at, length, WRITE, 0);
        self.offer(n);
        at
    }

    /// Id and length of all that was used, and how many there are by the ring's index.
    fn used(&self) -> Vec<(u32, u32)> {
        let count: u16 = self.get(USED + 2);
        let element =
            |n| (self.get(USED + 4 + 8 * u64::from(n % SIZE)), self.get(USED + 8 + 8 * u64::from(n % SIZE)));
        (0..count).map(element).collect()
    }

    fn deliver(&mut self, frame: &mut [u8], mergeable: bool) -> Result<Delivery, virtio_queue::Error> {
        deliver(self.ram.memory(), &mut self.queue, frame, u64::from(mergeable) << VIRTIO_NET_F_MRG_RXBUF)
    }

    /// The frames that are sent, without their headers.
    fn transmit(&mut self) -> (Vec<Vec<u8>>, Transmitted) {
        let mut frames = Vec::new();
        let mut room = vec![0; MAX_FRAME_BYTES];
        let keep = |frame: &[u8]| frames.push(frame[VNET_HEADER_BYTES..].to_vec());
        let done = transmit(self.ram.memory(), &mut self.queue, &mut room, keep).unwrap();
        (frames, done)
    }
}

fn frame(bytes: usize) -> Vec<u8> {
    let header = [0; VNET_HEADER_BYTES];
    header.into_iter().chain((0..bytes).map(|n| n as u8)).collect()
}

#[test]
fn a_frame_fills_one_buffer_and_counts_it() {
    for mergeable in [false, true] {
        let mut driver = Driver::new();
        let at = driver.buffer(3, 2048);
        assert_eq!(driver.deliver(&mut frame(100), mergeable).unwrap(), Delivery::Done { signal: true });
        assert_eq!(driver.used(), [(3, 112)]);
        let got = driver.bytes(at, 112);
        assert_eq!((&got[10..12], &got[12..]), (&[1, 0][..], &frame(100)[12..]));
        assert_eq!(driver.deliver(&mut frame(1), mergeable).unwrap(), Delivery::NoBuffers);
        // What the device wrote is dirty: the used ring and the buffer.
        let mut dirty = vec![0; 8];
        driver.ram.take_device_written(&mut dirty);
        assert_ne!(dirty[0] & 1 << (USED >> 12), 0);
        assert_ne!(dirty[0] & 1 << (at >> 12), 0);
    }
}

#[test]
fn a_driver_that_knows_no_checksums_is_told_nothing_of_them() {
    for (features, told) in [(0, 0), (1 << VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_HDR_F_DATA_VALID as u8)] {
        let mut driver = Driver::new();
        let at = driver.buffer(0, 2048);
        let mut frame = frame(100);
        frame[0] = VIRTIO_NET_HDR_F_DATA_VALID as u8;
        deliver(driver.ram.memory(), &mut driver.queue, &mut frame, features).unwrap();
        assert_eq!(driver.bytes(at, 1), [told]);
    }
}

#[test]
fn a_large_frame_is_spread_over_buffers_that_the_driver_sees_at_once() {
    let mut driver = Driver::new();
    let places = [driver.buffer(0, 1000), driver.buffer(1, 1000)];
    let mut large = frame(2500);
    // Not yet enough: nothing is used, and the frame is as it was.
    assert_eq!(driver.deliver(&mut large, true).unwrap(), Delivery::NoBuffers);
    assert_eq!((driver.used(), driver.queue.next_avail()), (vec![], 0));
    let last = driver.buffer(2, 1000);
    assert_eq!(driver.deliver(&mut large, true).unwrap(), Delivery::Done { signal: true });
    assert_eq!(driver.used(), [(0, 1000), (1, 1000), (2, 512)]);
    let got =
        [driver.bytes(places[0], 1000), driver.bytes(places[1], 1000), driver.bytes(last, 512)].concat();
    assert_eq!((&got[10..12], &got[12..]), (&[3, 0][..], &frame(2500)[12..]));
}

#[test]
fn a_frame_beyond_all_buffers_is_told_and_uses_none() {
    let mut driver = Driver::new();
    driver.buffer(0, 64);
    assert_eq!(driver.deliver(&mut frame(100), false).unwrap(), Delivery::TooLarge);
    for n in 1..SIZE {
        driver.buffer(n, 64);
    }
    assert_eq!(driver.deliver(&mut frame(2000), true).unwrap(), Delivery::TooLarge);
    assert_eq!(driver.used(), []);
    assert_eq!(driver.deliver(&mut frame(100), true).unwrap(), Delivery::Done { signal: true });
}

#[test]
fn buffers_that_are_none_do_no_harm() {
    // Out of RAM, for reading, in a circle, of 4 GiB, and a head that is beyond the table.
    let cases: [fn(&mut Driver); 5] = [
        |d| d.describe(0, 1 << 40, 2048, WRITE, 0),
        |d| d.describe(0, DATA, 2048, 0, 0),
        |d| d.describe(0, DATA, 0, WRITE | NEXT, 0),
        |d| d.describe(0, DATA, u32::MAX, WRITE, 0),
        |d| d.describe(0, u64::MAX - 10, 2048, WRITE, 0),
    ];
    for case in cases {
        let mut driver = Driver::new();
        case(&mut driver);
        driver.offer(0);
        assert_eq!(driver.deliver(&mut frame(100), false).unwrap(), Delivery::TooLarge);
        driver.buffer(1, 2048);
        assert!(matches!(driver.deliver(&mut frame(100), true), Ok(Delivery::Done { .. })));
        assert_eq!(driver.used(), [(0, 0), (1, 112)]);
    }
    let mut driver = Driver::new();
    driver.offer(SIZE + 1);
    driver.buffer(1, 2048);
    assert!(driver.deliver(&mut frame(100), true).is_err());
    assert_eq!(driver.used(), []);
    // More offered than the ring holds.
    driver.put(AVAILABLE + 2, 1000u16);
    assert!(driver.deliver(&mut frame(100), true).is_err());
}

#[test]
fn frames_are_sent_however_their_buffers_are_cut() {
    let mut driver = Driver::new();
    let whole = frame(300);
    driver.ram.memory().write_slice(&whole, GuestAddress(DATA)).unwrap();
    // The header in a buffer of its own, cut in the middle, and all in one.
    driver.describe(0, DATA, 12, NEXT, 1);
    driver.describe(1, DATA + 12, 300, 0, 0);
    driver.describe(2, DATA, 5, NEXT, 3);
    driver.describe(3, DATA + 5, 307, 0, 0);
    driver.describe(4, DATA, 312, 0, 0);
    [0, 2, 4].into_iter().for_each(|head| driver.offer(head));
    let (frames, done) = driver.transmit();
    assert_eq!(frames, vec![whole[12..].to_vec(); 3]);
    assert_eq!(done, Transmitted { signal: true, more: false });
    assert_eq!(driver.used(), [(0, 0), (2, 0), (4, 0)]);
    assert_eq!(driver.transmit().1, Transmitted { signal: false, more: false });
}

#[test]
fn what_is_no_frame_is_given_back_unsent() {
    let mut driver = Driver::new();
    driver.describe(0, DATA, 12, 0, 0); // a header, and nothing behind it
    driver.describe(1, DATA, 1 << 20, 0, 0); // more than any frame
    driver.describe(2, DATA, 100, NEXT, 2); // a circle
    driver.describe(3, 1 << 40, 100, 0, 0); // out of RAM
    driver.describe(4, DATA, 100, WRITE, 0); // nothing to read
    (0..5).for_each(|head| driver.offer(head));
    let (frames, done) = driver.transmit();
    // A circle ends after as many pieces as the table has: then it is a frame like any other.
    assert!(
        frames.len() <= 1 && frames.iter().all(|f| f.len() <= 100 * usize::from(SIZE)),
        "{}",
        frames.len()
    );
    assert!(done.signal);
    assert_eq!(driver.used().len(), 5);
}

#[test]
fn the_driver_says_that_it_has_announced_the_guest() {
    let run = |command: [u8; 2], may: bool| {
        let mut driver = Driver::new();
        driver.put(DATA, command);
        driver.describe(0, DATA, 2, NEXT, 1);
        driver.describe(1, DATA + 0x100, 1, WRITE, 0);
        driver.offer(0);
        let done = commands(driver.ram.memory(), &mut driver.queue, may).unwrap();
        assert!(done.signal && !done.more);
        assert_eq!(driver.used(), [(0, 1)]);
        (done.announced, driver.bytes(DATA + 0x100, 1)[0])
    };
    assert_eq!(run([3, 0], true), (true, 0));
    assert_eq!(run([3, 0], false), (false, 1));
    assert_eq!(run([3, 1], true), (false, 1));
    assert_eq!(run([0, 0], true), (false, 1));

    // A command of one byte, and one without a place for the answer.
    let mut driver = Driver::new();
    driver.describe(0, DATA, 1, 0, 0);
    driver.offer(0);
    let done = commands(driver.ram.memory(), &mut driver.queue, true).unwrap();
    assert!(!done.announced);
    assert_eq!(driver.used(), [(0, 0)]);
}
