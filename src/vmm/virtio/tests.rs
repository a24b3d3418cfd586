//! A driver against the registers and queues of a device, in guest memory of its own, without KVM.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use super::rng::Rng;
use super::{Device, Interrupt, Slot};
use crate::memory::{GuestPhysAddr, RamMap, RamPages, RamRegion};
use crate::state::VirtioState;
use crate::vmm::GuestRam;

const PATIENCE: Duration = Duration::from_secs(20);
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const BUFFER: u64 = 0x4000;

/// One machine's end: RAM, the device, its interrupt line.
pub(super) struct Host {
    pub ram: GuestRam,
    pub slot: Slot,
    line: Receiver<bool>,
}

impl Host {
    fn new() -> Self {
        Self::with(Box::new(Rng::new().unwrap()))
    }

    pub fn with(device: Box<dyn Device>) -> Self {
        let region = RamRegion { start: GuestPhysAddr(0), bytes: 2 << 20 };
        let ram = GuestRam::new(RamMap::new(vec![region]).unwrap(), "virtio", RamPages::Small).unwrap();
        let (sender, line) = mpsc::channel();
        let interrupt = Arc::new(Interrupt::with_line(move |up| {
            let _ = sender.send(up);
        }));
        let slot = Slot::new("d", device, Arc::new(ram.memory().clone()), interrupt).unwrap();
        Self { ram, slot, line }
    }

    pub fn get(&self, register: u64) -> u32 {
        let mut bytes = [0; 4];
        self.slot.read(register, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub fn set(&self, register: u64, value: u32) {
        self.slot.write(register, &value.to_le_bytes());
    }

    /// Status up to FEATURES_OK with the high features given, and queue 0.
    pub fn negotiate(&self, low: u32, high: u32) {
        self.set(0x70, 1);
        self.set(0x70, 3);
        for (select, features) in [(0, low), (1, high)] {
            self.set(0x24, select);
            self.set(0x20, features);
        }
        self.set(0x70, 0xb);
    }

    fn set_up(&self, used: u64) {
        self.set(0x30, 0);
        self.set(0x38, 8);
        for (register, address) in [(0x80, DESCRIPTORS), (0x90, AVAILABLE), (0xa0, used)] {
            self.set(register, address as u32);
            self.set(register + 4, (address >> 32) as u32);
        }
        self.set(0x44, 1);
        self.set(0x70, 0xf);
    }

    /// Adds a writable buffer as the `n`th request.
    fn add(&self, n: u16, bytes: u32) {
        let descriptor =
            [&BUFFER.to_le_bytes()[..], &bytes.to_le_bytes(), &2u16.to_le_bytes(), &[0; 2]].concat();
        self.ram.write(GuestPhysAddr(DESCRIPTORS), &descriptor).unwrap();
        self.ram.write(GuestPhysAddr(AVAILABLE + 4 + u64::from(n % 8) * 2), &[0; 2]).unwrap();
        self.ram.write(GuestPhysAddr(AVAILABLE + 2), &(n + 1).to_le_bytes()).unwrap();
    }

    /// Adds a chain of buffers (address, bytes, writable) as the `n`th request.
    pub fn add_chain(&self, n: u16, chain: &[(u64, u32, bool)]) {
        let mut table = Vec::new();
        for (next, (address, bytes, writable)) in (1u16..).zip(chain) {
            let more = u16::from(usize::from(next) < chain.len());
            table.extend(address.to_le_bytes());
            table.extend(bytes.to_le_bytes());
            table.extend((more | u16::from(*writable) << 1).to_le_bytes());
            table.extend(next.to_le_bytes());
        }
        self.ram.write(GuestPhysAddr(DESCRIPTORS), &table).unwrap();
        self.ram.write(GuestPhysAddr(AVAILABLE + 4 + u64::from(n % 8) * 2), &[0; 2]).unwrap();
        self.ram.write(GuestPhysAddr(AVAILABLE + 2), &(n + 1).to_le_bytes()).unwrap();
    }

    pub fn peek(&self, at: u64, bytes: usize) -> Vec<u8> {
        let mut found = vec![0; bytes];
        self.ram.read(GuestPhysAddr(at), &mut found).unwrap();
        found
    }

    pub fn used(&self) -> u16 {
        u16::from_le_bytes(self.peek(USED + 2, 2).try_into().unwrap())
    }

    /// How many bytes the device says that it has written for its `n`th request.
    pub fn used_bytes(&self, n: u16) -> u32 {
        let at = USED + 4 + u64::from(n % 8) * 8 + 4;
        u32::from_le_bytes(self.peek(at, 4).try_into().unwrap())
    }

    pub fn await_used(&self, requests: u16) {
        let deadline = Instant::now() + PATIENCE;
        while self.used() != requests {
            assert!(Instant::now() < deadline, "{} of {requests}", self.used());
            std::thread::yield_now();
        }
    }

    pub fn set_up_usual(&self) {
        self.set_up(USED);
    }

    /// As a driver that begins anew.
    pub fn clear_rings(&self) {
        for ring in [AVAILABLE, USED] {
            self.ram.write(GuestPhysAddr(ring), &[0; 128]).unwrap();
        }
    }

    pub fn line_goes(&self, up: bool) {
        assert_eq!(self.line.recv_timeout(PATIENCE), Ok(up));
    }

    pub fn pause(&self) {
        let (sender, paused) = mpsc::channel();
        self.slot.pause(move || {
            let _ = sender.send(());
        });
        paused.recv_timeout(PATIENCE).unwrap();
        assert!(self.slot.is_still());
    }

    fn dirty_words(&self) -> Vec<u64> {
        let mut words = vec![0; 8];
        self.ram.take_device_written(&mut words);
        words
    }
}

#[test]
fn a_driver_finds_the_device_and_is_held_to_the_rules_of_status() {
    let host = Host::new();
    assert_eq!((host.get(0), host.get(4), host.get(8)), (0x7472_6976, 2, 4));
    assert_eq!(host.get(0xb0), u32::MAX);
    host.negotiate(0, 0);
    assert_eq!(host.get(0x70), 3, "FEATURES_OK without VERSION_1");
    host.set(0x70, 7);
    assert_eq!(host.get(0x70), 3, "DRIVER_OK without FEATURES_OK");
    host.set(0x70, 0);
    host.negotiate(1 << 5, 1);
    assert_eq!(host.get(0x70), 3, "a feature that was not offered");
    host.set(0x70, 0);
    host.negotiate(0, 1);
    assert_eq!(host.get(0x70), 0xb);
    host.set(0x38, 7);
    host.set(0x44, 1);
    host.set(0x38, 4);
    assert_eq!((host.get(0x34), host.get(0x44)), (64, 1));
    host.set(0x70, 0);
    assert_eq!((host.get(0x70), host.get(0x44)), (0, 0));
}

#[test]
fn a_request_is_answered_with_an_interrupt_and_its_pages_are_dirty() {
    let host = Host::new();
    host.slot.resume();
    host.negotiate(0, 1);
    host.set_up(USED);
    host.add(0, 32);
    host.dirty_words();
    host.set(0x50, 0);
    host.line_goes(true);
    assert_eq!((host.used(), host.get(0x60)), (1, 1));
    assert_eq!(host.dirty_words()[0], 1 << (USED >> 12) | 1 << (BUFFER >> 12));
    host.set(0x64, 1);
    host.line_goes(false);
}

#[test]
fn a_queue_that_is_no_ram_and_a_ring_that_lies_need_a_reset() {
    let host = Host::new();
    host.slot.resume();
    host.negotiate(0, 1);
    host.set_up(1 << 40);
    host.line_goes(true);
    assert_eq!((host.get(0x70), host.get(0x60)), (0x4f, 2));
    host.set(0x70, 0);
    host.line_goes(false);
    host.negotiate(0, 1);
    host.set_up(USED);
    host.ram.write(GuestPhysAddr(AVAILABLE + 2), &100u16.to_le_bytes()).unwrap();
    host.set(0x50, 0);
    host.line_goes(true);
    assert_eq!(host.get(0x70), 0x4f);
}

#[test]
fn what_waits_at_a_pause_is_done_at_the_destination_and_only_when_it_runs() {
    let source = Host::new();
    source.slot.resume();
    source.negotiate(1 << 29, 1);
    source.set_up(USED);
    source.pause();
    source.add(0, 16);
    source.set(0x50, 0);
    let state = source.slot.save().unwrap();
    assert_eq!(source.used(), 0, "a device that is paused does nothing");

    let dest = Host::new();
    let mut page = vec![0; 0x5000];
    source.ram.read(GuestPhysAddr(0), &mut page).unwrap();
    dest.ram.write(GuestPhysAddr(0), &page).unwrap();
    dest.slot.restore(state.clone()).unwrap();
    assert!(dest.slot.is_still());
    assert_eq!((dest.used(), dest.line.try_recv().is_err()), (0, true));
    assert_eq!(dest.slot.save().unwrap(), state);
    dest.slot.resume();
    dest.line_goes(false); // as the saved status says
    dest.line_goes(true);
    // The interrupt may be the one that every restored device gives; the request follows.
    dest.await_used(1);
}

/// A state, and what is said of it.
type Case = (fn(&mut VirtioState), &'static str);

#[test]
fn a_state_that_no_driver_brought_about_is_refused() {
    let source = Host::new();
    source.slot.resume();
    source.negotiate(0, 1);
    source.set_up(USED);
    source.pause();
    let good = source.slot.save().unwrap();
    let cases: &[Case] = &[
        (|s| s.transport.queues.clear(), "queues"),
        (|s| s.transport.driver_features |= 1 << 5, "features 0x20"),
        (|s| s.transport.driver_features = 0, "status"),
        (|s| s.transport.status |= 16, "unknown bits"),
        (|s| s.transport.interrupt_status = 4, "unknown bits"),
        (|s| s.transport.queues[0].size = 3, "cannot be"),
        (|s| s.transport.queues[0].size = 128, "cannot be"),
        (|s| s.transport.queues[0].next_available = 9, "cannot be"),
        (|s| s.transport.queues[0].used = 1 << 40, "not all in RAM"),
        (|s| s.transport.queues[0].descriptors = 1, "makes no sense"),
        (|s| s.device = serde_json::json!({"more": 1}), "more"),
    ];
    for (change, said) in cases {
        let mut state = good.clone();
        change(&mut state);
        let error = Host::new().slot.restore(state).unwrap_err().to_string();
        assert!(error.contains(said), "{said}: {error}");
    }
}
