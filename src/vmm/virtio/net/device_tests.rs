//! A driver in guest memory against the whole device, on real taps in a network namespace.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::net::{Ipv4Addr, UdpSocket};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use serde_json::json;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS,
};
use vm_memory::{Bytes, GuestAddress};

use super::namespace::{all_frames, in_a_namespace};
use super::*;
use crate::memory::{GuestPhysAddr, RamMap, RamPages, RamRegion};
use crate::state::DeviceDescription;
use crate::sys::tap::VNET_HEADER_BYTES;
use crate::vmm::GuestRam;
use crate::vmm::virtio::{HostEnd, Interrupt, Kind, Slot};

const PATIENCE: Duration = Duration::from_secs(20);
const MAC: MacAddress = MacAddress([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 9);
const SIZE: u16 = 32;
const RECEIVE: u64 = 0;
const TRANSMIT: u64 = 1;
const CONTROL: u64 = 2;
/// Where the buffers of the receive queue are, a page each; those of the others follow.
const BUFFERS: u64 = 0x2_0000;
const OUT: u64 = BUFFERS + 0x1000 * SIZE as u64;
const RAM_BYTES: u64 = 2 << 20;
const FEATURES: u64 = 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_NET_F_CTRL_VQ
    | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << 32;

/// A machine's end: RAM with a driver's queues, and the card in its slot.
struct Machine {
    ram: GuestRam,
    slot: Slot,
}

impl Machine {
    fn new(tap: &str) -> Self {
        let region = RamRegion { start: GuestPhysAddr(0), bytes: RAM_BYTES };
        let ram = GuestRam::new(RamMap::new(vec![region]).unwrap(), "a test", RamPages::Small).unwrap();
        let interrupt = Arc::new(Interrupt::with_line(|_| ()));
        let card = HostEnd::Net { tap: tap.parse().unwrap(), mac: Some(MAC) }.open("net0", None).unwrap();
        let slot = Slot::new("net0", card, Arc::new(ram.memory().clone()), interrupt).unwrap();
        Self { ram, slot }
    }

    fn get(&self, register: u64) -> u32 {
        let mut bytes = [0; 4];
        self.slot.read(register, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn set(&self, register: u64, value: u32) {
        self.slot.write(register, &value.to_le_bytes());
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.ram.memory().write_slice(bytes, GuestAddress(at)).unwrap();
    }

    /// As a driver begins: features, three queues, all receive buffers.
    fn activate(&self, features: u64) {
        [1, 3].into_iter().for_each(|status| self.set(0x70, status));
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.set(0x24, select);
            self.set(0x20, half);
        }
        self.set(0x70, 0xb);
        assert_eq!(self.get(0x70), 0xb);
        for queue in [RECEIVE, TRANSMIT, CONTROL] {
            self.set(0x30, queue as u32);
            self.set(0x38, u32::from(SIZE));
            for (n, register) in [0x80, 0x90, 0xa0].into_iter().enumerate() {
                self.set(register, place(queue, n as u64) as u32);
                self.set(register + 4, 0);
            }
            self.set(0x44, 1);
        }
        self.set(0x70, 0xf);
        for n in 0..SIZE {
            self.describe(RECEIVE, n, BUFFERS + 0x1000 * u64::from(n), 0x1000, 2, 0);
            self.offer(RECEIVE, n, n);
        }
    }

    fn describe(&self, queue: u64, n: u16, address: u64, bytes: u32, flags: u16, next: u16) {
        let rest = [bytes.to_le_bytes(), (u32::from(flags) | u32::from(next) << 16).to_le_bytes()].concat();
        self.put(place(queue, 0) + 16 * u64::from(n), &[&address.to_le_bytes()[..], &rest].concat());
    }

    /// Puts the chain that begins at `head` out as the `n`th, and kicks.
    fn offer(&self, queue: u64, n: u16, head: u16) {
        self.put(place(queue, 1) + 4 + 2 * u64::from(n % SIZE), &head.to_le_bytes());
        self.put(place(queue, 1) + 2, &(n + 1).to_le_bytes());
        self.set(0x50, queue as u32);
    }

    /// Sends a frame as the `n`th.
    fn send(&self, n: u16, frame: &[u8]) {
        let whole = [&[0; VNET_HEADER_BYTES][..], frame].concat();
        let at = OUT + 0x1000 * u64::from(n);
        self.put(at, &whole);
        self.describe(TRANSMIT, n, at, whole.len() as u32, 0, 0);
        self.offer(TRANSMIT, n, n);
    }

    /// Says that the guest was announced, as the first command.
    fn acknowledge(&self) -> u8 {
        let at = OUT + 0x1_0000;
        self.put(at, &[3, 0, 0xff]);
        self.describe(CONTROL, 0, at, 2, 1, 1);
        self.describe(CONTROL, 1, at + 2, 1, 2, 0);
        self.offer(CONTROL, 0, 0);
        self.await_used(CONTROL, 1);
        self.ram.memory().read_obj(GuestAddress(at + 2)).unwrap()
    }

    fn used(&self, queue: u64) -> u16 {
        self.ram.memory().read_obj(GuestAddress(place(queue, 2) + 2)).unwrap()
    }

    fn await_used(&self, queue: u64, count: u16) {
        until("the queue is served", || self.used(queue) == count);
    }

    /// Whether the guest has received a frame with that in it.
    fn has(&self, text: &[u8]) -> bool {
        let mut bytes = vec![0; (OUT - BUFFERS) as usize];
        self.ram.memory().read_slice(&mut bytes, GuestAddress(BUFFERS)).unwrap();
        bytes.windows(text.len()).any(|window| window == text)
    }

    /// The low byte of `status` in the configuration.
    fn link(&self) -> u8 {
        let mut status = [0];
        self.slot.read(0x106, &mut status);
        status[0]
    }

    fn pause(&self) {
        let (sender, paused) = mpsc::channel();
        self.slot.pause(move || {
            let _ = sender.send(());
        });
        paused.recv_timeout(PATIENCE).unwrap();
    }

    fn copy_ram_of(&self, other: &Machine) {
        let mut bytes = vec![0; RAM_BYTES as usize];
        other.ram.memory().read_slice(&mut bytes, GuestAddress(0)).unwrap();
        self.put(0, &bytes);
    }
}

/// The address of a queue's descriptors, available ring, used ring.
fn place(queue: u64, part: u64) -> u64 {
    0x1000 + 0x4000 * queue + 0x1000 * part
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what}: does not happen");
        std::thread::yield_now();
    }
}

/// What the network has for the guest behind `tap`.
fn tell(tap: &str, text: &[u8]) {
    let host = UdpSocket::bind("0.0.0.0:0").unwrap();
    setsockopt(&host, sockopt::BindToDevice, &tap.into()).unwrap();
    host.set_broadcast(true).unwrap();
    host.send_to(text, "255.255.255.255:9").unwrap();
}

/// Reads frames until there is one that `wanted` accepts; gives those before it.
fn read_until(mut wire: &File, wanted: impl Fn(&[u8]) -> bool) -> Vec<Vec<u8>> {
    let mut before = Vec::new();
    let mut buffer = vec![0; MAX_FRAME_BYTES];
    loop {
        let bytes = wire.read(&mut buffer).expect("the frame does not come");
        if wanted(&buffer[..bytes]) {
            return before;
        }
        before.push(buffer[..bytes].to_vec());
    }
}

#[test]
fn a_guest_that_moves_takes_its_card_along_and_is_announced_only_when_it_runs() {
    in_a_namespace(|| {
        let wire = all_frames();
        let source = Machine::new("new:vmsrc0");
        source.slot.resume();
        source.activate(FEATURES);
        let own = gratuitous_arp(MAC, ADDRESS);
        source.send(0, &own);
        read_until(&wire, |frame| frame == own);
        source.await_used(TRANSMIT, 1);
        tell("vmsrc0", b"while it is here");
        until("the frame comes", || source.has(b"while it is here"));

        source.pause();
        tell("vmsrc0", b"after the pause");
        let last = [&[0xff; 6][..], &MAC.0, &[0x88, 0xb5], &[7; 60]].concat();
        source.send(1, &last);
        let state = source.slot.save().unwrap();
        assert_eq!((source.used(TRANSMIT), source.has(b"after the pause")), (1, false));
        assert_eq!(state.device, json!({"seen_v4": [ADDRESS], "seen_v6": [], "announce": false}));

        let dest = Machine::new("new:vmdst0");
        dest.copy_ram_of(&source);
        tell("vmdst0", b"too early");
        dest.slot.restore(state.clone()).unwrap();
        // Its thread has come back from the restore, and sleeps.
        assert_eq!(dest.slot.save().unwrap(), state);
        tell("vmdst0", b"just before");
        let before = read_until(&wire, |frame| frame.ends_with(b"just before"));
        assert!(!before.iter().any(|frame| *frame == last || frame.get(6..12) == Some(&MAC.0)));

        dest.slot.resume();
        let began = Instant::now();
        let after: Vec<_> = (0..5).flat_map(|_| read_until(&wire, |frame| frame == rarp(MAC))).collect();
        assert!(began.elapsed() >= Duration::from_millis(700), "spread over 800 ms");
        assert!(after.iter().filter(|frame| **frame == own).count() >= 4);
        assert!(after.contains(&last), "what waited in the queue is sent here");
        until("what came since is delivered", || dest.has(b"just before"));
        assert!(!dest.has(b"too early"));
        assert_eq!((dest.used(TRANSMIT), dest.link(), dest.get(0x60) & 2), (2, 3, 2));
        // Only the driver's word ends that; another move would ask again.
        dest.pause();
        assert_eq!(dest.slot.save().unwrap().device["announce"], json!(true));
        dest.slot.resume();
        assert_eq!((dest.acknowledge(), dest.link()), (0, 1));
    });
}

#[test]
fn a_driver_that_resets_the_card_gets_nothing_more_and_can_begin_again() {
    in_a_namespace(|| {
        let machine = Machine::new("new:vmrst0");
        machine.slot.resume();
        machine.activate(1 << 32);
        tell("vmrst0", b"the first");
        until("the frame comes", || machine.has(b"the first"));
        machine.set(0x70, 0);
        let used = machine.used(RECEIVE);
        tell("vmrst0", b"the second");
        machine.pause();
        assert_eq!(machine.used(RECEIVE), used);
        machine.slot.resume();
        machine.put(0x1000, &vec![0; 0x1_f000]);
        machine.activate(FEATURES);
        until("it is delivered after all", || machine.has(b"the second"));
    });
}

#[test]
fn a_state_that_no_card_has_is_refused() {
    in_a_namespace(|| {
        let source = Machine::new("new:vmbad0");
        source.slot.resume();
        source.activate(1 << 32);
        source.pause();
        let good = source.slot.save().unwrap();
        let many: Vec<String> = (1..=9).map(|n| format!("10.0.0.{n}")).collect();
        let cases = [
            (json!({"seen_v4": [], "seen_v6": [], "announce": true}), "has not accepted"),
            (json!({"seen_v4": many, "seen_v6": [], "announce": false}), "too many"),
            (json!({"seen_v4": ["0.0.0.0"], "seen_v6": [], "announce": false}), "nobody's"),
            (json!({"seen_v4": [], "seen_v6": ["fe80::1", "fe80::1"], "announce": false}), "twice"),
            (json!({"seen_v4": [], "seen_v6": [], "announce": false, "more": 1}), "more"),
            (json!({"seen_v4": []}), "missing"),
        ];
        for (n, (device, said)) in cases.into_iter().enumerate() {
            let mut state = good.clone();
            state.device = device;
            let error = Machine::new(&format!("new:vmbad1{n}")).slot.restore(state).unwrap_err().to_string();
            assert!(error.contains(said), "{said}: {error}");
        }
    });
}

#[test]
fn a_card_that_comes_in_keeps_its_address_and_needs_a_tap() {
    let end = HostEnd::parse(Kind::Net, "no-such-tap").unwrap();
    assert!(HostEnd::parse(Kind::Net, "no/tap").is_err());
    let with = |mac: &str| DeviceDescription {
        id: "net0".into(),
        kind: Kind::Net.name().into(),
        version: Kind::Net.version(),
        host: None,
        properties: BTreeMap::from([(MAC_PROPERTY.to_owned(), mac.to_owned())]),
    };
    let open = |mac: &str| end.open("net0", Some(&with(mac))).err().unwrap().to_string();
    assert_eq!(open(&MAC.to_string()), "tap no-such-tap: there is no interface of that name");
    assert!(open("none").contains("Ethernet address"));
    in_a_namespace(move || {
        let theirs = with(&MAC.to_string());
        let end = HostEnd::parse(Kind::Net, "new:vmmac0").unwrap();
        assert_eq!(end.open("net0", Some(&theirs)).unwrap().properties(), theirs.properties);
    });
}
